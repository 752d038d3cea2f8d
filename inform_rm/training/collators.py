"""Encoded pairs, rankings and scored responses -> batches, and the order in which they come."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.trainer_pt_utils import LengthGroupedSampler

from inform_rm.scoring.packing import CPU_TOKENS_PER_BATCH, pack_sequences, packed_batches
from inform_rm.training.reward_arguments import RewardTrainingArguments

RESPONSES = "responses_input_ids"  # the column of an encoded group that a pair has not
_LABELS_OF_PAIR = (1.0, 0.0)


def responses_of(row: dict[str, Any]) -> list[list[int]]:
    """Token ids of the responses of an encoded pair or group."""
    return row[RESPONSES] if RESPONSES in row else [row["chosen_input_ids"], row["rejected_input_ids"]]


class PairCollator:
    """Encoded pairs or groups -> one right-padded batch.

    The responses stand in this order: the best one of each row, then the second of each row that has one, and so on.
    Two pairs with tokens c0, c1 / r0, r1 give rows ``c0, c1, r0, r1`` of ``input_ids`` and ``attention_mask``
    ``(N, T)``; there are also ``margin`` ``(B,)`` and the ``ids`` of the rows and, of groups, ``labels`` and
    ``groups`` (numbers of rows) of the responses, ``(N,)``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Pad and stack; see the class."""
        places = _in_order(rows)
        sequences = [responses_of(rows[row])[response] for row, response in places]
        batch = self.tokenizer.pad({"input_ids": sequences}, padding_side="right", return_tensors="pt")
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        return {**inputs, **_described(rows, places), "ids": [row["id"] for row in rows]}


class PackedPairCollator:
    """Encoded pairs or groups -> rows without padding in which a prompt stands once (`inform_rm.scoring.packing`).

    Args:
        tokens_per_batch: most tokens of a row; a pair with more has its own. ``None`` puts all pairs into one.
    """

    def __init__(self, tokens_per_batch: int | None = None):
        self.tokens_per_batch = tokens_per_batch

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The inputs of one forward pass, or ``{"rows": [...]}`` with those of several, pairs of one prompt together.

        Rewards of a row come out in the order of `PairCollator`. ``places`` of a row says where its responses stand in
        the batch, ``members`` where its pairs or groups do, of which none is parted.
        """
        parts = [list(range(len(rows)))]
        if self.tokens_per_batch is not None:
            prompts = [responses_of(row)[0][: row["prompt_length"]] for row in rows]
            sizes = [sum(len(ids) - row["prompt_length"] for ids in responses_of(row)) for row in rows]
            parts = [sorted(part) for part in packed_batches(prompts, sizes, self.tokens_per_batch)]
        ids = [row["id"] for row in rows]
        packed = [_packed([rows[row] for row in part]) for part in parts]
        if len(packed) == 1:
            return {**packed[0], "ids": ids}
        place_of = {place: number for number, place in enumerate(_in_order(rows))}
        for inputs, part in zip(packed, parts, strict=True):
            of_part = _in_order([rows[row] for row in part])
            inputs["members"] = torch.tensor(part)
            inputs["places"] = torch.tensor([place_of[part[row], response] for row, response in of_part])
        # The Trainer counts what it finds under input_ids.
        return {"rows": packed, "input_ids": torch.cat([row["input_ids"] for row in packed], dim=1), "ids": ids}


def _packed(rows: list[dict[str, Any]]) -> dict[str, Any]:
    places = _in_order(rows)
    sequences = [responses_of(rows[row])[response] for row, response in places]
    found = pack_sequences(sequences, [rows[row]["prompt_length"] for row, _ in places])
    return {
        "input_ids": found.input_ids,
        "position_ids": found.position_ids,
        "packed_segments": found.segments,
        "pooled_positions": found.pooled_positions,
        **_described(rows, places),
    }


def _in_order(rows: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
    """(row, response) in the order of a batch; tied responses as they came."""
    labels = [row.get("labels", _LABELS_OF_PAIR) for row in rows]
    best_first = [sorted(range(len(own)), key=own.__getitem__, reverse=True) for own in labels]
    most = max(map(len, best_first))
    return [(row, order[rank]) for rank in range(most) for row, order in enumerate(best_first) if rank < len(order)]


def _described(rows: Sequence[dict[str, Any]], places: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    margin = torch.tensor([row["margin"] if row["margin"] is not None else 0.0 for row in rows])
    if "labels" not in rows[0]:
        return {"margin": margin}
    labels = torch.tensor([rows[row]["labels"][response] for row, response in places], dtype=torch.float32)
    return {"labels": labels, "groups": torch.tensor([row for row, _ in places]), "margin": margin}


def counted_pairs(counted: int, total: int, num_processes: int) -> dict[str, Any]:
    """What a batch has of ``total`` pairs of all processes: their average gradient is then that of the mean."""
    return {"counted": counted, "share": counted * num_processes / total}


def tokens_per_batch(args: RewardTrainingArguments) -> int | None:
    """Most tokens of a packed row, as far as settings tell; ``None``: no limit, or one that is to be found."""
    if args.world_size > 1:
        return args.tokens_per_batch
    return args.tokens_per_batch or (CPU_TOKENS_PER_BATCH if args.device.type == "cpu" else None)


class EpochSeededLengthSampler(LengthGroupedSampler):
    """transformers' length-grouped order, drawn from the seed and the epoch alone.

    The original draws from the process's random state: every process would get another order, and a resumed run too.
    Of ``batch_size`` rows that are used together the lengths are near to each other.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives; the data loader calls it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Row numbers in this epoch's order."""
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()
