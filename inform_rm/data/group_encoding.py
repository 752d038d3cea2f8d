"""Pairs, rankings and scored responses of one run as token ids: pairs are groups of two."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset, Features, concatenate_datasets

from inform_rm.data.encoding import ENCODED_GROUPS, EncodedPairs, encode_pairs
from inform_rm.data.pairs import BadRow
from inform_rm.data.rendered_text import add_partly_rendered


def encode_mixed(parts: Sequence[tuple[str, Dataset]], tokenizer: Any, **rules: Any) -> EncodedPairs:
    """Encode data sets of several layouts (layout and rows of each), pairs as groups of two; counts are of all.

    ``rules`` are ``max_length``, ``overlong`` and ``on_bad_row`` of `encode_pairs`.
    """
    datasets: list[Dataset] = []
    counts: dict[str, Any] = {}
    bad_rows: list[BadRow] = []
    for layout, part in parts:
        encoded = encode_pairs(part, tokenizer, **rules)
        datasets.append(as_groups(encoded.dataset) if layout == "pair" else encoded.dataset)
        bad_rows += encoded.bad_rows
        lost = counts.pop("partly_rendered", {"n": 0, "examples": []})
        add_partly_rendered(lost, encoded.counts.pop("partly_rendered"))
        counts = {name: counts.get(name, 0) + number for name, number in encoded.counts.items()}
        counts["partly_rendered"] = lost
    return EncodedPairs(concatenate_datasets(datasets), counts, bad_rows)


def as_groups(pairs: Dataset) -> Dataset:
    """Encoded pairs as groups of two, the chosen response first, with their margin."""

    def groups(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        sides = zip(batch["chosen_input_ids"], batch["rejected_input_ids"], strict=True)
        characters = zip(batch["chosen_characters"], batch["rejected_characters"], strict=True)
        return {
            "responses_input_ids": list(map(list, sides)),
            "labels": [[1.0, 0.0] for _ in batch["id"]],
            "characters": list(map(list, characters)),
        }

    return pairs.map(
        groups, batched=True, remove_columns=[name for name in pairs.column_names if name not in ENCODED_GROUPS],
        features=Features(ENCODED_GROUPS), load_from_cache_file=False,
        new_fingerprint=f"{pairs._fingerprint}-groups", desc="Pairs as groups",
    )  # fmt: skip
