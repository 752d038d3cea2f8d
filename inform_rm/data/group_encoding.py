"""Token ids of rankings and scored responses, by the rules of pairs (`inform_rm.data.encoding`)."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset, Features, Value, concatenate_datasets

from inform_rm.data.encoding import EncodedPairs, encode_pairs, encode_rows, fitting_groups
from inform_rm.data.pairs import BadRow
from inform_rm.data.rendered_text import add_partly_rendered

ENCODED_GROUPS = Features(
    {
        "responses_input_ids": [[Value("int32")]],
        "labels": [Value("float64")],
        "prompt_length": Value("int32"),
        "length": Value("int32"),
        "margin": Value("float64"),
        "subset": Value("string"),
        "id": Value("string"),
        "characters": [Value("int32")],
        "truncated": Value("bool"),
        "lost": Value("string"),
    }
)


def encode_group_rows(
    dataset: Dataset, tokenizer: Any, *, max_length: int | None, overlong: str = "error", on_bad_row: str = "error"
) -> EncodedPairs:
    """Encode a dataset of groups: as `encode_pairs`, for any number of responses.

    Its columns are ``responses_input_ids`` and ``characters`` (one entry a response, in the order of the row),
    ``labels``, ``prompt_length``, ``length`` (tokens of the longest), ``margin`` (none), ``subset`` and ``id``. The
    same prompt tokens are removed for all responses.

    Args:
        dataset: Columns as in `inform_rm.data.groups.GROUP_FEATURES`.
        tokenizer: As the other arguments and the errors see `encode_pairs`.
        max_length: See there.
        overlong: See there.
        on_bad_row: See there.
    """
    options = {"tokenizer": tokenizer, "max_length": max_length, "overlong": overlong, "on_bad_row": on_bad_row}
    return encode_rows(dataset, _encode_columns, ENCODED_GROUPS, options)


def encode_mixed(parts: Sequence[tuple[str, Dataset]], tokenizer: Any, **rules: Any) -> EncodedPairs:
    """Encode data sets of several layouts, pairs among them as groups of two; counts are of all.

    Args:
        parts: Layout and rows of each.
        tokenizer: See `encode_group_rows`.
        rules: See there: ``max_length``, ``overlong`` and ``on_bad_row``.
    """
    datasets: list[Dataset] = []
    counts: dict[str, Any] = {}
    bad_rows: list[BadRow] = []
    for layout, part in parts:
        encoded = (
            encode_pairs(part, tokenizer, **rules) if layout == "pair" else encode_group_rows(part, tokenizer, **rules)
        )
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

    features = Features({name: value for name, value in ENCODED_GROUPS.items() if name not in ("truncated", "lost")})
    return pairs.map(
        groups, batched=True, remove_columns=[name for name in pairs.column_names if name not in features],
        features=features, load_from_cache_file=False, new_fingerprint=f"{pairs._fingerprint}-groups",
        desc="Pairs as groups",
    )  # fmt: skip


def _encode_columns(batch: dict[str, list], tokenizer: Any, **rules: Any) -> tuple[dict[str, list], list[BadRow]]:
    """See `inform_rm.data.encoding.encode_columns`."""
    places, groups, shared, bad_rows = fitting_groups(batch, tokenizer, **rules)
    columns = {
        "responses_input_ids": [group.ids for group in groups],
        "labels": [batch["labels"][place] for place in places],
        **shared,
        "margin": [None] * len(places),
        "characters": [list(map(len, batch["responses"][place])) for place in places],
    }
    return columns, bad_rows
