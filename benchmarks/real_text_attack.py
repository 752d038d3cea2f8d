"""Stage 4 of `real_text.py`: best-of-n against the proxies, judged by gold, and what CSI says of InfoRM's choices.

The expectation over all sets of n among the candidates of a prompt is the package's (`best_of_n_expectation`); KL is
``log n - (n - 1) / n``. Rewards are in units of a standard deviation of the policy's training responses. CSI is asked
where the candidates of a prompt can be divided into at least `WINNERS` sets of n: the winners are the candidate, as
many random responses to the same prompts the reference. File: ``attack/NAME.safetensors``, rewards of all candidates.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from inform_rm.eval.best_of_n.simulate import best_of_n_expectation, kl_nats
from inform_rm.eval.detection.clusters import auto_eps, cluster_separation_index
from inform_rm.eval.detection.outliers import null_rank, split_half_null
from inform_rm.util.files import write_json
from real_text_gold import gold_rewards
from real_text_models import rewards_of
from real_text_proxies import COEFFICIENT, MEMBERS, Run, load_run, read_run
from real_text_texts import read_rows

PARTS = ("attack", "other")
WINNERS = 8
SPLITS = 100


def score_candidates(folder: Path, model_folder: Path, layers: int, run: Run, device: str, warm: bool) -> None:
    """Rewards of all candidates in units, and of a single InfoRM model's winners CSI, unless they are there."""
    name = f"warm-{run.name}" if warm else run.name
    target = folder / "attack" / f"{name}.safetensors"
    if target.exists():
        return
    model, figures = load_run(folder, model_folder, layers, run, device, warm), read_run(folder, name)
    assert figures is not None
    mean, deviation = figures["units"]
    wanted = run.variant.architecture == "inform" and run.member == 0 and not warm
    found, watched = {}, {}
    for part in PARTS:
        rows = read_rows(folder, part)
        rewards, latents = rewards_of(model, rows, device, latents=wanted)
        found[part] = (rewards - mean) / deviation
        if latents is not None:
            watched[part] = watch(found[part], latents, rows.prompts, run.seed)
    target.parent.mkdir(parents=True, exist_ok=True)
    if watched:
        write_json(target.with_suffix(".csi.json"), watched)
    save_file(found, target)


def candidates_of(folder: Path, run: Run, kind: str, part: str) -> Tensor:
    """``(N,)`` rewards by a single model, ``WARM`` or ``ensemble`` (UWO: mean less COEFFICIENT times variance)."""
    if kind == "WARM":
        return load_file(folder / "attack" / f"warm-{run.name}.safetensors")[part]
    if kind == "ensemble":
        runs = [Run(run.variant, run.noise, run.seed, member) for member in range(MEMBERS)]
        members = torch.stack([candidates_of(folder, each, "single", part) for each in runs])
        return members.mean(dim=0) - COEFFICIENT * members.var(dim=0, correction=0)
    return load_file(folder / "attack" / f"{run.name}.safetensors")[part]


def table_of(prompts: Tensor) -> np.ndarray:
    """``(P, N)`` rows of the responses to each prompt."""
    order = prompts.argsort(stable=True)
    return order.view(len(prompts.unique()), -1).numpy()


def numbers(candidates: int) -> list[int]:
    """Powers of two up to the number of candidates."""
    return [2**power for power in range(candidates.bit_length())]


def curves(proxy: Tensor, gold: Tensor, tokens: Tensor, prompts: Tensor) -> dict[str, Any]:
    """Mean proxy and gold reward of the best of n over prompts, and gold's peak."""
    places = table_of(prompts)
    ns = numbers(places.shape[1])
    own, true, lengths = (values.double().numpy()[places] for values in (proxy, gold, tokens))
    found = {
        name: best_of_n_expectation(own, values, ns)
        for name, values in (("proxy", own), ("gold", true), ("tokens", lengths))
    }
    means = {name: values.mean(axis=0) for name, values in found.items()}
    peak = int(means["gold"].argmax())
    return {
        "n": ns, "kl_nats": kl_nats(ns).tolist(), **{name: values.tolist() for name, values in means.items()},
        "peak": float(means["gold"][peak]), "peak_n": ns[peak],
        "fall": float(means["gold"][peak] - means["gold"][-1]),
        # The best that could be had from the same candidates, by gold itself.
        "possible": best_of_n_expectation(true, true, ns).mean(axis=0).tolist(),
    }  # fmt: skip


def curves_of(folder: Path, run: Run, kind: str, part: str) -> dict[str, Any]:
    rows = read_rows(folder, part)
    return curves(candidates_of(folder, run, kind, part), gold_rewards(folder, part), rows.responses(), rows.prompts)


def watch(proxy: Tensor, latents: Tensor, prompts: Tensor, seed: int) -> list[dict[str, Any]]:
    """CSI of the winners of n, as a multiple of its mean over random halves, and its rank among them."""
    places = table_of(prompts)
    count, candidates = places.shape
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
        sets = shuffled[:, : n * WINNERS].reshape(count, WINNERS, n)
        winners = np.take_along_axis(sets, own[sets].argmax(axis=2)[:, :, None], axis=2).ravel()
        value = csi(points[winners], reference if n > 1 else points[shuffled[:, WINNERS : 2 * WINNERS].ravel()])
        found.append({"n": n, "csi": value, "ratio": value / float(null.mean()), "rank": null_rank(value, null)})
    return found
