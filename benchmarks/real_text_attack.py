"""Stage 5 of `real_text.py`: best-of-n against the proxies, judged by gold, and what CSI says of InfoRM's choices.

The expectation over all sets of n among the candidates of a prompt is the package's (`best_of_n_expectation`); KL is
``log n - (n - 1) / n``. Rewards are in units of a standard deviation of the policy's training responses. CSI is asked
where the candidates of a prompt can be divided into at least `WINNERS` sets of n: the winners are the candidate, as
many random responses to the same prompts the reference. Files: ``attack/NAME.safetensors``, rewards and latents.
"""

from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor

from inform_rm.eval.best_of_n.simulate import best_of_n_expectation, kl_nats
from inform_rm.eval.detection.clusters import auto_eps, cluster_separation_index
from inform_rm.eval.detection.outliers import null_rank, split_half_null
from real_text_models import Prepared, TopLayers, rewards_of, start_of
from real_text_proxies import Run, ensemble, read_run, weights_of_run
from real_text_samples import read_part

PARTS = ("attack", "other")
WINNERS = 8
SPLITS = 100


def score_candidates(folder: Path, model_folder: Path, span: range, runs: list[Run]) -> None:
    """Rewards of all candidates by the models of these runs, where files are missing or have fewer candidates."""
    ready: dict[str, Prepared] = {}
    for part in PARTS:
        rows, _ = read_part(folder, part, (span.start,))
        ready[part] = Prepared(rows.states[span.start], rows.lengths)
    for run in runs:
        target = folder / "attack" / f"{run.name}.safetensors"
        if not target.exists() or any(
            len(load_file(target)[f"member 0.{part}"]) < len(ready[part].lengths) for part in PARTS
        ):
            target.parent.mkdir(exist_ok=True)
            save_file(_rewards(folder, start_of(model_folder, span, run.variant, 0), run, ready), target)
            print(f"attack: {run.name}", flush=True)


def _rewards(folder: Path, model: TopLayers, run: Run, ready: dict[str, Prepared]) -> dict[str, Tensor]:
    weights, figures = weights_of_run(folder, run), read_run(folder, run)
    assert figures is not None
    found: dict[str, Tensor] = {}
    for name, own in weights.items():
        model.load_state_dict(own, strict=False)
        for part in PARTS:
            found[f"{name}.{part}"], latents = rewards_of(model, ready[part])
            if latents is not None and name == "member 0":
                found[f"latents.{part}"] = latents
    if run.members > 1:
        for part in PARTS:
            members = [found[f"member {place}.{part}"] for place in range(run.members)]
            found[f"ensemble.{part}"] = ensemble(members, figures["units"])
    return found


def rewards_of_run(folder: Path, run: Run) -> dict[str, Tensor]:
    return load_file(folder / "attack" / f"{run.name}.safetensors")


def table(lines: list[dict[str, Any]]) -> np.ndarray:
    """``(P, N)`` rows of the responses to each prompt; N is the least that any prompt has."""
    of_prompt: dict[int, list[int]] = {}
    for row, line in enumerate(lines):
        of_prompt.setdefault(line["prompt_number"], []).append(row)
    least = min(len(rows) for rows in of_prompt.values())
    return np.array([of_prompt[prompt][:least] for prompt in sorted(of_prompt)])


def numbers(candidates: int) -> list[int]:
    """Powers of two up to the number of candidates."""
    return [2**power for power in range(candidates.bit_length())]


def curves(proxy: Tensor, gold: Tensor, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean proxy and gold reward of the best of n over prompts, and gold's peak."""
    places = table(lines)
    ns = numbers(places.shape[1])
    own, true = (values.double().numpy()[places] for values in (proxy, gold))
    tokens = np.array([line["tokens"] for line in lines], dtype=float)[places]
    found = {
        name: best_of_n_expectation(own, values, ns)
        for name, values in (("proxy", own), ("gold", true), ("tokens", tokens))
    }
    means = {name: values.mean(axis=0) for name, values in found.items()}
    peak = int(means["gold"].argmax())
    return {
        "n": ns, "kl_nats": kl_nats(ns).tolist(), **{name: values.tolist() for name, values in means.items()},
        "gold_of_prompts": found["gold"].tolist(), "peak": float(means["gold"][peak]), "peak_n": ns[peak],
        "fall": float(means["gold"][peak] - means["gold"][-1]),
        # The best that could be had from the same candidates, by gold itself.
        "possible": best_of_n_expectation(true, true, ns).mean(axis=0).tolist(),
    }  # fmt: skip


def watch(proxy: Tensor, latents: Tensor, lines: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """CSI of the winners of n, as a multiple of its mean over random halves, and its rank among them."""
    places = table(lines)
    prompts, candidates = places.shape
    rng = np.random.default_rng(seed)
    shuffled = np.stack([rng.permutation(row) for row in places])
    points, own = latents.double().numpy(), proxy.double().numpy()
    reference = points[shuffled[:, :WINNERS].ravel()]
    pool = points[shuffled[:, : 2 * WINNERS].ravel()]
    eps = auto_eps(reference)

    def csi(candidate: np.ndarray, others: np.ndarray) -> float:
        return cluster_separation_index(candidate, others, eps=eps, normalized=True)

    null = split_half_null(pool, csi, num_splits=SPLITS, seed=seed)
    found = []
    for n in numbers(candidates // WINNERS):
        sets = shuffled[:, : n * WINNERS].reshape(prompts, WINNERS, n)
        winners = np.take_along_axis(sets, own[sets].argmax(axis=2)[:, :, None], axis=2).ravel()
        value = csi(points[winners], reference if n > 1 else points[shuffled[:, WINNERS : 2 * WINNERS].ravel()])
        found.append({"n": n, "csi": value, "ratio": value / float(null.mean()), "rank": null_rank(value, null)})
    return found
