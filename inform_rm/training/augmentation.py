"""Extra pairs against responses that ignore their prompt (RRM, arXiv:2409.13156)."""

from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from inform_rm.decomposition.gap_grid import distinct_prompts
from inform_rm.errors import InputError

_DRAWS = 20


def add_non_contextual_pairs(pairs: Dataset, seed: int) -> Dataset:
    """Three times the data: under its own prompt each response of a pair is preferred to one of another prompt.

    For every pair (x, y_w, y_l) two more are added, (x, y_w, y') and (x, y_l, y''), in which y' and y'' are responses,
    chosen or rejected, of random pairs with another prompt: a reward that looks at the response alone cannot learn
    them. The paper also adds pairs of two foreign responses without a preference; the loss here has no such label, so
    they are left out.

    Columns are as in `inform_rm.data.preferences.FEATURES`; ids of added pairs end in ``/rrm-chosen`` and
    ``/rrm-rejected``.

    Raises:
        InputError: if all pairs have the same prompt, or a pair's response is repeated under nearly all others.
    """
    prompt_rows, own = distinct_prompts(pairs)
    if len(prompt_rows) < 2:
        raise InputError("augmentation: 'rrm' needs pairs with at least two prompts; these have one.")
    own_prompts = own.numpy()
    parts = [pairs]
    for number, side in enumerate(("chosen", "rejected")):
        generator = np.random.default_rng([seed, number])
        parts.append(_against_foreign_responses(pairs, own_prompts, side, generator))
    return concatenate_datasets(parts)


def _against_foreign_responses(
    pairs: Dataset, own_prompts: np.ndarray, side: str, generator: np.random.Generator
) -> Dataset:
    candidates = generator.integers(len(pairs), size=(len(pairs), _DRAWS))
    sides = np.array(["chosen", "rejected"])[generator.integers(2, size=(len(pairs), _DRAWS))]

    def replaced(batch: dict[str, list[Any]], rows: list[int]) -> dict[str, list[Any]]:
        rejected = []
        for place, row in enumerate(rows):
            drawn = zip(candidates[row].tolist(), sides[row], strict=True)
            texts = (pairs[other][name] for other, name in drawn if own_prompts[other] != own_prompts[row])
            found = next((text for text in texts if text.strip() != batch[side][place].strip()), None)
            if found is None:
                raise InputError(
                    f"augmentation: 'rrm' found no other response for {batch['file'][place]}, row "
                    f"{batch['row'][place]}, in {_DRAWS} draws. Use data with more prompts, or leave augmentation out."
                )
            rejected.append(found)
        return {
            "chosen": batch[side], "rejected": rejected, "margin": [None] * len(rows),
            "id": [f"{name}/rrm-{side}" for name in batch["id"]],
        }  # fmt: skip

    return pairs.map(
        replaced, with_indices=True, batched=True, features=pairs.features, load_from_cache_file=False,
        new_fingerprint=f"{pairs._fingerprint}-{side}-{generator.integers(2**62)}", desc="Adding non-contextual pairs",
    )  # fmt: skip
