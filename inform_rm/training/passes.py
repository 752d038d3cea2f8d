"""The forward passes of a batch: as many as memory asks for, and on several processes without one waiting for ever."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils import gather_object, send_to_device
from torch import Tensor
from transformers import Trainer

from inform_rm.scoring.packed_flex import ROW_MULTIPLE, for_device, row_layout
from inform_rm.scoring.packing import last_layer_at, pack_sequences
from inform_rm.training.collators import PackedPairCollator
from inform_rm.training.reward_arguments import RewardTrainingArguments

logger = logging.getLogger(__name__)

_NOT_FOR_MODEL = ("margin", "share", "counted", "ids", "places", "members", "labels", "groups")
# Tokens of the row that is measured: enough for what does not depend on them to be small beside the rest.
_PROBE = 4096
# Of the free memory: the rest is for what the allocator cannot use and for rows with more responses than the probe.
_USED = 0.85
SMALLEST_ROW = 1024  # also where not even the row that is measured fits
_PLAIN_ROW = 8192  # where it cannot be measured, as in scoring


class PassesThatFit(Trainer):
    """A Trainer that computes a batch in forward passes, and those that do not fit into a GPU's memory in two.

    Under DDP gradients are averaged in the last pass of an update. Only before that can they be computed again: a
    process that breaks off while it averages would leave the others waiting. So where a process has a pass of more
    tokens than it has computed before, all average afterwards. Where weights are sharded every pass is joint, and one
    that does not fit ends the run.
    """

    args: RewardTrainingArguments
    max_length: int | None
    _packing: PackedPairCollator | None

    def __init__(self, *, args: RewardTrainingArguments, **kwargs: Any):
        # What a model keeps in buffers is the same everywhere; sending it would be another thing to wait for.
        args.ddp_broadcast_buffers = bool(args.ddp_broadcast_buffers)
        super().__init__(args=args, **kwargs)
        self._sums: Tensor | None = None  # what a log line is made of, of the passes since the last one
        self._passed: list[dict[str, Any]] = []  # inputs of the passes since the last update
        self._largest = 0  # tokens of a pass that this process has computed
        self._most_tokens: int | None = None  # of a pass, since one did not fit

    def run_passes(self, model: Any, passes: list[dict[str, Any]], num_items_in_batch: Any) -> Tensor:
        """Forward and backward passes of a batch's parts; the sum of their losses."""
        passes = [part for whole in passes for part in parts_within(whole, self._most_tokens)]
        most, is_larger = self._of_all(len(passes), max(map(_tokens, passes)) > self._largest)
        if not hasattr(model, "require_backward_grad_sync"):  # one process, or FSDP, which wants equally many of all
            passes += [{**passes[-1], "share": 0.0, "counted": 0}] * (most - len(passes))
            return torch.stack([self._forward_and_backward(model, part, num_items_in_batch) for part in passes]).sum()
        last = [] if is_larger else [passes.pop()]
        with self.accelerator.no_sync(model):
            losses = [self._forward_and_backward(model, part, num_items_in_batch) for part in passes]
        losses += [self._forward_and_backward(model, part, num_items_in_batch) for part in last]
        if is_larger and self.accelerator.sync_gradients:
            for weight in model.parameters():
                if weight.grad is not None:
                    weight.grad.copy_(self.accelerator.reduce(weight.grad / self.accelerator.num_processes))
        return torch.stack(losses).sum()

    def most_passes(self, own: int) -> int:
        """Most forward passes that a process makes without gradient; FSDP asks all for equally many."""
        return own if self._packing is None else self._of_all(own, False)[0]

    def _of_all(self, passes: int, is_larger: bool) -> tuple[int, bool]:
        """Over all processes the largest number, and whether it holds for one."""
        if self.accelerator.num_processes == 1:
            return passes, is_larger
        own = torch.tensor([[passes, is_larger]], device=self.args.device)
        passes, larger = self.accelerator.gather(own).amax(dim=0).tolist()
        return passes, bool(larger)

    def _forward_and_backward(self, model: Any, part: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        """The loss of a pass whose gradients have been added; in two, if it is too much for the GPU, or in more."""
        sums = self._sums
        try:
            loss = self._add_gradients(model, part, num_items_in_batch)
        except torch.OutOfMemoryError:
            halves = split_in_two(part)
            is_joint = getattr(model, "require_backward_grad_sync", True) and self.accelerator.num_processes > 1
            if halves is None or is_joint:
                raise
        else:
            self._passed.append(part)
            self._largest = max(self._largest, _tokens(part))
            return loss
        self._most_tokens = _tokens(part) // 2
        if self._packing is not None:
            self._packing.tokens_per_batch = self._most_tokens
        logger.warning(
            "%d tokens in a forward pass are too many for the memory of %s: from here on at most %d, but for what "
            "cannot be parted. Set tokens_per_batch to that.", _tokens(part), self.args.device, self._most_tokens,
        )  # fmt: skip
        # Gradients of the pass that broke off may have been added to those of this update: all are computed again.
        model.zero_grad()
        if self.args.device.type == "cuda":
            torch.cuda.empty_cache()
        for done in self._passed:
            self._add_gradients(model, done, num_items_in_batch)
        self._sums = sums
        losses = []
        for half in halves:  # what the first half showed to be too much is not tried with the second
            for each in parts_within(half, self._most_tokens):
                losses.append(self._forward_and_backward(model, each, num_items_in_batch))
        return torch.stack(losses).sum()

    def _add_gradients(self, model: Any, part: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        with self.computed_where_read(part):
            return super().training_step(model, part, num_items_in_batch)

    def computed_where_read(self, part: dict[str, Any]) -> AbstractContextManager[None]:
        """A block in which a packed row's last layer is computed where its rewards are read alone (`last_layer_at`).

        Compiled layers are left as they are: all share their graphs, and the last would need its own.
        """
        if "packed_segments" not in part or self.args.torch_compile:
            return nullcontext()
        model = self.accelerator.unwrap_model(self.model)
        backbone = getattr(model, model.base_model_prefix)
        return last_layer_at(backbone, part["pooled_positions"].unique().to(self.args.device))

    def rewards_of(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor | None, Any]:
        """Rewards and KL of the batch's responses in order, in float32, and the model's output."""
        given = {name: value for name, value in inputs.items() if name not in _NOT_FOR_MODEL}
        if "packed_segments" in given:
            given = for_device(given, self.accelerator.unwrap_model(self.model).config, self.args.device)
        output = model(**given)
        kl = getattr(output, "kl", None)
        return output.logits.float().flatten(), None if kl is None else kl.float(), output

    def find_tokens_per_batch(self) -> None:
        """Measure how many tokens of a row fit into the GPU's memory, where nobody has said it; the least of all."""
        packing = self._packing
        if packing is None or packing.tokens_per_batch is not None or self.args.device.type != "cuda":
            return
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            logger.info("tokens_per_batch: no limit; with sharded weights the memory is not measured.")
            return
        model: Any = self.model

        def run(row: dict[str, Any]) -> None:
            if self.args.gradient_checkpointing:  # as the Trainer is about to do
                model.gradient_checkpointing_enable(self.args.gradient_checkpointing_kwargs)
            model.train()
            with self.computed_where_read(row):
                with self.accelerator.autocast():
                    rewards, _, _ = self.rewards_of(model, send_to_device(row, self.args.device))
                rewards.sum().backward()

        found = tokens_for_training(
            model, run, self.args.device, self.max_length, in_buckets=self.accelerator.num_processes > 1
        )
        packing.tokens_per_batch = min(gather_object([found]))
        logger.info("tokens_per_batch: %d, by what a row takes of the free memory.", packing.tokens_per_batch)


def _tokens(part: dict[str, Any]) -> int:
    """Tokens of a forward pass, padding included."""
    return part["input_ids"].numel()


def tokens_that_fit(token_bytes: float, free: int) -> int:
    """Most tokens of a row, a multiple of `ROW_MULTIPLE`, at least `SMALLEST_ROW`.

    ``token_bytes`` is what a forward and backward pass takes for a token beside weights and gradients, of the
    ``free`` bytes.
    """
    return max(int(_USED * free / max(token_bytes, 1e-9)), SMALLEST_ROW) // ROW_MULTIPLE * ROW_MULTIPLE


def tokens_for_training(
    model: torch.nn.Module,
    run: Callable[[dict[str, Any]], None],
    device: torch.device,
    max_length: int | None = None,
    *,
    in_buckets: bool = False,
) -> int:
    """`tokens_that_fit` beside the model's gradients and the optimizer's state; measured on the GPU, once.

    It never raises: where a row cannot be measured, a log line says why and what is taken instead. ``run`` makes the
    forward and backward pass of a packed row, given as its inputs, whose sequences have at most ``max_length`` tokens;
    ``in_buckets``: gradients are there twice (DDP). Afterwards they are ``None``, and no random state has moved.
    """
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        row = probe_row(_PROBE, max_length)
        token_bytes = _peak_bytes(learnt, lambda: run(row), device) / row["input_ids"].numel()
        # Beside the gradients Adam's two moments and, of half-precision weights, what rounding took from them.
        weights = sum(parameter.numel() * parameter.element_size() for parameter in learnt)
        halves = sum(parameter.numel() * 2 for parameter in learnt if parameter.element_size() == 2)
        free, total = torch.cuda.mem_get_info(device)
        # What the process may take at most, where others share the card. Of a device, torch wants its number here;
        # None is the current one.
        most = int(total * torch.cuda.get_per_process_memory_fraction(device.index))
        free = min(free + torch.cuda.memory_reserved(device), most)
        free -= torch.cuda.memory_allocated(device) + (4 if in_buckets else 3) * weights + halves
        found, why = tokens_that_fit(token_bytes, free), None
    except torch.OutOfMemoryError:
        found, why = SMALLEST_ROW, f"a row of {_PROBE} tokens does not fit into the memory of {device}"
    except Exception as error:  # a compiler, a driver, a model: whatever it is, a default trains
        found, why = _PLAIN_ROW, f"memory could not be measured ({type(error).__name__}: {str(error)[:200]})"
    if why is not None:
        logger.warning("tokens_per_batch: %d, because %s. Set it to choose another.", found, why)
    torch.cuda.empty_cache()
    return found


def _peak_bytes(learnt: list[torch.nn.Parameter], run: Callable[[], None], device: torch.device) -> int:
    """Peak memory of what ``run`` does, on top of weights and gradients."""
    try:
        for parameter in learnt:
            parameter.grad = torch.zeros_like(parameter)
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        with torch.random.fork_rng(devices=[device]):
            run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    finally:
        for parameter in learnt:
            parameter.grad = None


def probe_row(tokens: int, max_length: int | None = None) -> dict[str, Any]:
    """A row of so many tokens: pairs of a prompt of 128 tokens with two responses of 64; shorter by ``max_length``."""
    response = min(64, max(8, (max_length or 192) // 3))
    pairs = range(tokens // (4 * response))
    sequences = [
        [1 + pair % 9, 1 + pair // 9, *[1] * (2 * response - 2), *[side] * response]
        for side in (1, 2)
        for pair in pairs
    ]
    row = pack_sequences(sequences, [2 * response] * len(sequences))
    return {
        "input_ids": row.input_ids, "position_ids": row.position_ids, "packed_segments": row.segments,
        "pooled_positions": row.pooled_positions,
    }  # fmt: skip


def split_in_two(part: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The inputs of a forward pass over pairs or groups as those of two, whose losses add up to its own.

    ``None`` where there is only one pair or group.
    """
    number = len(part["margin"])
    if number < 2:
        return None
    groups = part["groups"].cpu() if "groups" in part else torch.arange(number).repeat(2)
    halves = []
    for first, last in ((0, number // 2), (number // 2, number)):
        kept = ((groups >= first) & (groups < last)).nonzero().flatten()
        half = part | _rows_of(part, kept)
        half["margin"] = part["margin"][first:last]
        # Pairs that do not count stand at the end.
        counted = part.get("counted", number)
        own = min(max(counted - first, 0), last - first)
        half["share"] = part.get("share", 1.0) * own / max(counted, 1)
        if "counted" in part:
            half["counted"] = own
        if "groups" in part:
            half["groups"] = part["groups"][kept] - first
        for name in {"labels", "latent_noise"} & set(part):
            half[name] = part[name][kept]
        halves.append(half)
    return halves


def parts_within(part: dict[str, Any], most: int | None) -> list[dict[str, Any]]:
    """A forward pass as several, each of at most so many tokens if it has more than one pair or group."""
    halves = None if most is None or part["input_ids"].numel() <= most else split_in_two(part)
    return [part] if halves is None else [small for half in halves for small in parts_within(half, most)]


def _rows_of(part: dict[str, Any], kept: Tensor) -> dict[str, Any]:
    """What the model takes for some of a pass's responses."""
    if "packed_segments" not in part:
        return {name: part[name][kept] for name in ("input_ids", "attention_mask")}
    device = part["input_ids"].device
    trees, branches, _ = row_layout(part["packed_segments"])
    tokens = part["input_ids"][0].cpu()
    sequences, prompt_lengths = [], []
    for place in part["pooled_positions"].cpu()[kept].tolist():
        is_own = (trees == trees[place]) & ((branches == 0) | (branches == branches[place]))
        sequences.append(tokens[is_own].tolist())
        prompt_lengths.append(part["packed_segments"][int(trees[place])][0] if branches[place] else 0)
    row = pack_sequences(sequences, prompt_lengths)
    return {
        "input_ids": row.input_ids.to(device), "position_ids": row.position_ids.to(device),
        "packed_segments": row.segments, "pooled_positions": row.pooled_positions.to(device),
    }  # fmt: skip
