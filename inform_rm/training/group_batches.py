"""Encoded rankings and scored responses -> batches; pairs come with them as groups of two.

The responses of a batch stand in this order: the best one of each row, then the second of each row that has one, and
so on. With two responses in every row that is the order of `inform_rm.training.collators.PairCollator`, and all that
follows from it (latent noise, sums) is as for pairs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from inform_rm.scoring.packing import pack_sequences, packed_batches

RESPONSES = "responses_input_ids"


def is_group(row: dict[str, Any]) -> bool:
    """Whether an encoded row is a group, and no pair."""
    return RESPONSES in row


def responses_of(row: dict[str, Any]) -> list[list[int]]:
    """Token ids of the responses of an encoded pair or group."""
    return row[RESPONSES] if is_group(row) else [row["chosen_input_ids"], row["rejected_input_ids"]]


def padded_groups(rows: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """One right-padded batch: ``input_ids`` and ``attention_mask`` ``(N, T)``, and what `_described` adds."""
    places = _in_order(rows)
    sequences = [rows[row][RESPONSES][response] for row, response in places]
    batch = tokenizer.pad({"input_ids": sequences}, padding_side="right", return_tensors="pt")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    return {**inputs, **_described(rows, places), "ids": [row["id"] for row in rows]}


def packed_groups(rows: Sequence[dict[str, Any]], tokens_per_batch: int | None) -> dict[str, Any]:
    """As `PackedPairCollator` for pairs: a prompt's tokens stand once; a group is never parted.

    ``places`` of a packed row says where its responses stand in the batch, ``members`` where its groups do.
    """
    packed_rows = [list(range(len(rows)))]
    if tokens_per_batch is not None:
        prompts = [row[RESPONSES][0][: row["prompt_length"]] for row in rows]
        sizes = [sum(len(ids) - row["prompt_length"] for ids in row[RESPONSES]) for row in rows]
        packed_rows = [sorted(chosen) for chosen in packed_batches(prompts, sizes, tokens_per_batch)]
    place_of = {place: number for number, place in enumerate(_in_order(rows))}
    packed: list[dict[str, Any]] = []
    for chosen in packed_rows:
        part = [rows[row] for row in chosen]
        places = _in_order(part)
        sequences = [part[row][RESPONSES][response] for row, response in places]
        found = pack_sequences(sequences, [part[row]["prompt_length"] for row, _ in places])
        packed.append(
            {
                "input_ids": found.input_ids,
                "position_ids": found.position_ids,
                "packed_segments": found.segments,
                "pooled_positions": found.pooled_positions,
                **_described(part, places),
                "members": torch.tensor(chosen),
                "places": torch.tensor([place_of[chosen[row], response] for row, response in places]),
            }
        )
    ids = [row["id"] for row in rows]
    if len(packed) == 1:
        del packed[0]["places"], packed[0]["members"]
        return {**packed[0], "ids": ids}
    # The Trainer counts what it finds under input_ids.
    return {"rows": packed, "input_ids": torch.cat([row["input_ids"] for row in packed], dim=1), "ids": ids}


def padded_predictions(rewards: Tensor, kl: Tensor | None, labels: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """``(G, K, 4)`` of a batch: reward, label, KL (NaN without one) and 1; where no response is, NaN and 0."""
    before = torch.ones(len(groups), len(groups), device=groups.device).tril(-1)
    places = ((groups[:, None] == groups) * before).sum(dim=1).long()
    found = rewards.new_full((num_groups, int(places.max()) + 1, 4), float("nan"))
    found[..., 3] = 0.0
    kl = torch.full_like(rewards, float("nan")) if kl is None else kl
    found[groups, places] = torch.stack([rewards, labels.to(rewards), kl, torch.ones_like(rewards)], dim=1)
    return found


def _in_order(rows: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
    """(row, response) in the order of a batch; tied responses as they came."""
    best_first = [sorted(range(len(row["labels"])), key=lambda at: -row["labels"][at]) for row in rows]
    most = max(map(len, best_first))
    return [(row, order[rank]) for rank in range(most) for row, order in enumerate(best_first) if rank < len(order)]


def _described(rows: Sequence[dict[str, Any]], places: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """``labels`` and ``groups`` (numbers of rows) of the responses, ``(N,)``, and ``margin`` of the rows, ``(G,)``."""
    return {
        "labels": torch.tensor([rows[row]["labels"][response] for row, response in places], dtype=torch.float32),
        "groups": torch.tensor([row for row, _ in places]),
        "margin": torch.tensor([row["margin"] if row["margin"] is not None else 0.0 for row in rows]),
    }
