"""Attention of packed rows alone on an accelerator, soft caps, and where the time of a step goes."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inform_rm.scoring.packed_flex import block_mask, flex_packed_attention, may_attend, row_layout

Run = Callable[[Tensor, Tensor, Tensor], Tensor]


def segments_like_hh(tokens: int) -> list[list[int]]:
    """Pairs of one prompt and two responses with lengths like those of hh-rlhf, up to so many tokens."""
    generator = np.random.default_rng(0)

    def length(mean: float, spread: float, most: int) -> int:
        return int(np.clip(generator.lognormal(mean, spread), 2, most))

    segments: list[list[int]] = []
    while True:
        tree = [length(4.8, 0.8, 1024), length(4.0, 0.9, 512), length(4.0, 0.9, 512)]
        if sum(map(sum, segments)) + sum(tree) > tokens:
            return segments or [[tokens // 2, tokens // 4, tokens // 4]]
        segments.append(tree)


def attention_figures(setting: Any, heads: Sequence[int]) -> dict[str, Any]:
    """Milliseconds of FlexAttention, forward and with backward, and of making the mask; for pairs and best of 16."""
    shapes = {"pairs": segments_like_hh(setting.tokens), "best of 16": [[300, *[100] * 16]] * (setting.tokens // 1900)}
    found = {f"{name}, {key}": value for name, segments in shapes.items() if segments
             for key, value in _milliseconds_of(segments, heads, setting.device).items()}  # fmt: skip
    return {"figures": "; ".join(f"{key}: {value}" for key, value in found.items())}


def _milliseconds_of(segments: list[list[int]], heads: Sequence[int], device: torch.device) -> dict[str, float]:
    total = sum(map(sum, segments))
    length = -(-total // 128) * 128
    layout = [values.to(device) for values in row_layout(segments, length)]
    mask = block_mask(*layout, None)
    inputs = random_inputs(heads, length, device)

    def flex(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return flex_packed_attention(query, key, value, mask, None)

    with torch.no_grad():
        forward = milliseconds(partial(flex, *inputs), device)
    return {
        "forward ms": forward,
        "both ms": milliseconds(partial(gradients_of, flex, inputs, total), device),
        "mask ms": milliseconds(partial(block_mask, *layout, None), device),
    }


def random_inputs(heads: Sequence[int], length: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    queries, keys, size = heads
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    needs = device.type == "cuda"
    return [
        torch.randn(1, length, number, size, device=device, dtype=dtype, generator=generator)
        .transpose(1, 2)
        .requires_grad_(needs)
        for number in (queries, keys, keys)
    ]


def gradients_of(run: Run, inputs: list[Tensor], total: int) -> tuple[Tensor, list[Tensor]]:
    """The output at the first ``total`` tokens and the inputs' gradients there, of a fixed weighting."""
    output = run(*inputs)[:, :, :total]
    if not inputs[0].requires_grad:
        return output, []
    weights = torch.linspace(-1, 1, output.shape[-1], device=output.device, dtype=output.dtype)
    gradients = torch.autograd.grad(output, inputs, weights.expand_as(output))
    return output.detach(), [gradient[:, :, :total] for gradient in gradients]


def milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    """Median of ten runs after three."""
    if device.type == "cpu":
        run()
        return 0.0
    for _ in range(3):
        run()
    times = []
    for _ in range(10):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return round(sorted(times)[len(times) // 2], 3)


def softcap_figures(setting: Any) -> dict[str, Any]:
    """Relative errors of output and gradients under a soft cap against dense scores, in float32, two row lengths."""
    device, figures = setting.device, []
    for tokens in (1000, 600):
        segments = segments_like_hh(tokens)
        total = sum(map(sum, segments))
        length = -(-total // 128) * 128
        layout = [values.to(device) for values in row_layout(segments, length)]
        inputs = [tensor.detach().float().requires_grad_(device.type == "cuda")
                  for tensor in random_inputs((4, 2, 64), length, device)]  # fmt: skip
        places = torch.arange(length, device=device)
        sees = may_attend(*layout, None, places[:, None], places)

        def dense(query: Tensor, key: Tensor, value: Tensor, sees: Tensor = sees) -> Tensor:
            key, value = (tensor.repeat_interleave(2, dim=1) for tensor in (key, value))
            scores = 2.0 * torch.tanh(query @ key.transpose(2, 3) * 0.125 / 2.0)
            return scores.masked_fill(~sees, -torch.inf).softmax(dim=-1) @ value

        mask = block_mask(*layout, None)
        expected, slopes = gradients_of(dense, inputs, total)
        output, found = gradients_of(
            lambda q, k, v, mask=mask: flex_packed_attention(q, k, v, mask, 0.125, softcap=2.0), inputs, total
        )
        figures += [
            ((a - b).norm() / b.norm()).item() for a, b in zip((output, *found), (expected, *slopes), strict=True)
        ]
    return {"figures": "relative errors " + ", ".join(f"{value:.1e}" for value in figures)}


def profile(step: Callable[[], Any]) -> dict[str, Any]:
    """Where the card's time goes in a step: the kernels with the most time, and the share in which it works."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
    kernels = [event for event in profiler.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(event.self_device_time_total for event in kernels) / 1000
    print(f"one step: {start.elapsed_time(end):.1f} ms with the profiler on, {busy:.1f} ms of kernels")
    kernels.sort(key=lambda event: -event.self_device_time_total)
    for event in kernels[:28]:
        print(f"{event.self_device_time_total / 1000:9.2f} ms {event.count:6d}  {event.key[:110]}")
    first = "; ".join(f"{event.key[:60]}: {event.self_device_time_total / 1000:.1f} ms" for event in kernels[:8])
    return {"figures": f"{start.elapsed_time(end):.1f} ms, kernels {busy:.1f} ms; {first}"}
