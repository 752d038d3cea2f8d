"""The forward passes of a batch: as many as memory asks for, and on several processes without one waiting for ever."""

import logging
from typing import Any

import torch
from accelerate.utils import gather_object, send_to_device
from torch import Tensor
from transformers import Trainer

from inform_rm.scoring.packed_flex import for_device
from inform_rm.training.collators import PackedPairCollator
from inform_rm.training.memory import parts_within, split_in_two, tokens_for_training
from inform_rm.training.reward_arguments import RewardTrainingArguments

logger = logging.getLogger(__name__)

_NOT_FOR_MODEL = ("margin", "share", "counted", "ids", "places", "members", "labels", "groups")


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
            loss = super().training_step(model, part, num_items_in_batch)
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
            super().training_step(model, done, num_items_in_batch)
        self._sums = sums
        losses = []
        for half in halves:  # what the first half showed to be too much is not tried with the second
            for each in parts_within(half, self._most_tokens):
                losses.append(self._forward_and_backward(model, each, num_items_in_batch))
        return torch.stack(losses).sum()

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
