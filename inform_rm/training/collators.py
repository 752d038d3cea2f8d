"""Encoded pairs -> batches, and the order in which they come; groups go to `inform_rm.training.group_batches`."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.trainer_pt_utils import LengthGroupedSampler

from inform_rm.scoring.packing import CPU_TOKENS_PER_BATCH, pack_sequences, packed_batches
from inform_rm.training.group_batches import is_group, packed_groups, padded_groups
from inform_rm.training.reward_arguments import RewardTrainingArguments


class PairCollator:
    """Encoded pairs -> one right-padded batch: the chosen rows, then the rejected rows in the same order.

    Example:
        two pairs with tokens c0, c1 / r0, r1 give rows ``c0, c1, r0, r1`` of ``input_ids`` ``(4, T)``,
        ``attention_mask`` ``(4, T)``, ``margin`` ``(2,)`` and the two ``ids``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def __call__(self, pairs: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Pad and stack; see the class."""
        if is_group(pairs[0]):
            return padded_groups(pairs, self.tokenizer)
        rows = [pair["chosen_input_ids"] for pair in pairs] + [pair["rejected_input_ids"] for pair in pairs]
        batch = self.tokenizer.pad({"input_ids": rows}, padding_side="right", return_tensors="pt")
        return {
            "input_ids": batch["input_ids"],
            "attention_mask": batch["attention_mask"],
            "margin": _margins(pairs),
            "ids": [pair["id"] for pair in pairs],
        }


class PackedPairCollator:
    """Encoded pairs -> rows without padding in which both sides share their prompt (`inform_rm.scoring.packing`).

    Args:
        tokens_per_batch: most tokens of a row; a pair with more has its own. ``None`` puts all pairs into one.
    """

    def __init__(self, tokens_per_batch: int | None = None):
        self.tokens_per_batch = tokens_per_batch

    def __call__(self, pairs: list[dict[str, Any]]) -> dict[str, Any]:
        """The inputs of one forward pass, or ``{"rows": [...]}`` with those of several, pairs of one prompt together.

        ``places`` of a row says where its pairs stand in the batch; so ``members``.

        Rewards of a row come out as with `PairCollator`: of the chosen responses, then of the rejected ones.
        """
        if is_group(pairs[0]):
            return packed_groups(pairs, self.tokens_per_batch)
        rows = [list(range(len(pairs)))]
        if self.tokens_per_batch is not None:
            prompts = [pair["chosen_input_ids"][: pair["prompt_length"]] for pair in pairs]
            sizes = [
                len(pair["chosen_input_ids"]) + len(pair["rejected_input_ids"]) - 2 * pair["prompt_length"]
                for pair in pairs
            ]
            rows = [sorted(row) for row in packed_batches(prompts, sizes, self.tokens_per_batch)]
        packed = [_packed_pairs([pairs[place] for place in row]) for row in rows]
        ids = [pair["id"] for pair in pairs]
        if len(packed) == 1:
            return {**packed[0], "ids": ids}
        for row, places in zip(packed, rows, strict=True):
            row["places"] = row["members"] = torch.tensor(places)
        # The Trainer counts what it finds under input_ids.
        return {"rows": packed, "input_ids": torch.cat([row["input_ids"] for row in packed], dim=1), "ids": ids}


def _packed_pairs(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    sequences = [pair[side] for side in ("chosen_input_ids", "rejected_input_ids") for pair in pairs]
    row = pack_sequences(sequences, [pair["prompt_length"] for pair in pairs] * 2)
    return {
        "input_ids": row.input_ids,
        "position_ids": row.position_ids,
        "packed_segments": row.segments,
        "pooled_positions": row.pooled_positions,
        "margin": _margins(pairs),
    }


def _margins(pairs: list[dict[str, Any]]) -> Tensor:
    return torch.tensor([pair["margin"] if pair["margin"] is not None else 0.0 for pair in pairs])


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

    Args:
        batch_size: rows that are used together; neighbours in length share them.
        lengths: tokens of each row.
        seed: seed of the order.
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
