"""Sets of latents as arrays: what every function of them accepts, refuses and takes block by block."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from inform_rm.errors import InputError

LatentArray = NDArray | Tensor
# What a statistic finds: values by their keys in a result, and columns with one entry a response.
Measured = tuple[dict[str, Any], dict[str, list[Any]]]
_BLOCK_ELEMENTS = 2**23  # 64 MiB in float64


def check_latents(name: str, values: LatentArray) -> NDArray:
    """``(N, K)`` finite real numbers on the CPU, not copied where possible."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.is_floating_point() and values.itemsize < 4 else values).numpy()
    values = np.asarray(values)
    if values.ndim != 2 or values.dtype.kind not in "fiu" or 0 in values.shape:
        raise InputError(
            f"{name}: shape {values.shape} of {values.dtype}; expected real numbers of shape (responses, latent "
            "dimensions), at least one of each."
        )
    bad = ~np.isfinite(values).all(axis=1)
    if bad.any():
        raise InputError(
            f"{name}: row {int(bad.argmax())} holds NaN or infinity. Leave such responses out, or find out why the "
            "model gives them."
        )
    return values


def check_both(candidate: LatentArray, reference: LatentArray) -> tuple[NDArray, NDArray]:
    """Candidate ``(N, K)`` and reference ``(M, K)``, both checked, of one K."""
    points, others = check_latents("candidate", candidate), check_latents("reference", reference)
    if points.shape[1] != others.shape[1]:
        raise InputError(
            f"candidate: {points.shape[1]} latent dimensions, but the reference has {others.shape[1]}. Take both from "
            "the same reward model."
        )
    return points, others


def blocks(latents: NDArray) -> Iterator[NDArray]:
    """The rows in order, in parts of at most 64 MiB in float64."""
    size = max(1, _BLOCK_ELEMENTS // latents.shape[1])
    return (latents[start : start + size] for start in range(0, len(latents), size))


def subsample(latents: NDArray, most: int, seed: int) -> NDArray:
    """Numbers of at most so many rows, in rising order."""
    if len(latents) <= most:
        return np.arange(len(latents))
    return np.sort(np.random.default_rng(seed).choice(len(latents), most, replace=False))
