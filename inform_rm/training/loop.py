"""The training loop: transformers' Trainer with the reward-model loss and checkpoints that survive a kill."""

import contextlib
import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DynamoBackend, send_to_device
from torch import Tensor
from torch.nn import functional
from transformers import TrainerCallback

from inform_rm.hub.export import add_remote_code
from inform_rm.scoring.adapters import complete_adapter_folder, holds_adapters
from inform_rm.training.balance import BalancedSampler, costs_of
from inform_rm.training.checkpoints import discard, discard_beyond, reading_checkpoint
from inform_rm.training.collators import EpochSeededLengthSampler, PackedPairCollator, counted_pairs
from inform_rm.training.kl_warmup import KLWarmup
from inform_rm.training.losses import PAIR_LOSSES, group_loss, reward_model_loss
from inform_rm.training.metrics import group_sums, metrics_from_sums, padded_predictions, pair_sums
from inform_rm.training.passes import PassesThatFit
from inform_rm.training.prioritized import PoolSelector
from inform_rm.training.reward_arguments import RewardTrainingArguments
from inform_rm.training.streaming import EncodedStream
from inform_rm.util.checkpoints import last_complete, mark_complete
from inform_rm.util.files import open_to_readers, write_json

logger = logging.getLogger(__name__)


class OwnSteps(TrainerCallback):
    """A resumed run logs, evaluates and saves as its settings say; the Trainer would do it as the checkpoint's did."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set them."""
        state.compute_steps(args, state.max_steps)


def choose_tf32(args: RewardTrainingArguments) -> None:
    """Where layers are compiled for a GPU, products of float32 numbers in TF32, unless ``tf32`` is false.

    transformers says so by torch's new switch and, whatever ``tf32`` is, Accelerate by the old one. Where they differ,
    torch refuses to read the old one, which its compiler does under ``max-autotune``. This sets both.
    """
    if args.torch_compile and args.device.type == "cuda":
        torch.set_float32_matmul_precision("highest" if args.tf32 is False else "high")


class NonFiniteLossError(FloatingPointError):
    """A loss or a gradient was NaN or infinite; no weight has been changed by it."""


class RewardLoop(PassesThatFit):
    """Steps, evaluation and checkpoints of `inform_rm.training.trainer.RewardTrainer`, which puts its parts together.

    ``stream``: pairs that are read while training; ``selector``: chooses from each pool what is learnt from;
    ``kl_warmup``: gives the weight of the KL term.
    """

    args: RewardTrainingArguments
    # The loss is a mean over the pairs of a batch, so accumulated batches are averaged.
    loss_is_scaled_for_ga = False

    def __init__(
        self, *, stream: EncodedStream | None, selector: PoolSelector | None, kl_warmup: KLWarmup, **kwargs: Any
    ):
        super().__init__(**kwargs)
        self.stream, self._selector, self._kl_warmup = stream, selector, kl_warmup
        self.can_return_loss = True
        self.label_names: list[str] = []
        self._has_kl = False
        self._kl_share = getattr(self.accelerator.unwrap_model(self.model).config, "kl_share", 1.0)
        self._sums_before: Tensor | None = None  # `_sums` at the last update since the last log line
        self._since_update: list[tuple[list[str], Tensor]] = []  # of the batches since the last update: ids, loss
        self._loss_settings: dict[str, Any] = {
            "loss": PAIR_LOSSES[self.args.loss_type],
            "label_smoothing": self.args.label_smoothing,
            "center_rewards_coefficient": self.args.center_rewards_coefficient,
        }
        # Under a selector the collator is that of its pools, with what makes batches inside.
        collate: Any = self.data_collator
        collate = collate.args[0] if isinstance(collate, functools.partial) else collate
        self._packing = collate if isinstance(collate, PackedPairCollator) else None
        choose_tf32(self.args)
        if self._packing is not None and self.args.torch_compile:
            self._compile_layers()
        self._keep_fsdp_output_in_float32()

    def get_train_dataloader(self) -> Any:
        """The batches of this process; where rows are packed, about as costly as those of the others."""
        if self.stream is not None:
            return self.stream.loader(self.data_collator)
        loader = super().get_train_dataloader()
        world = self.accelerator.num_processes
        # Under what gives this process its part of the batches lies what makes the batches of all.
        dealt: Any = getattr(loader.batch_sampler, "batch_sampler", None)
        is_packed = isinstance(self.data_collator, PackedPairCollator)
        if world > 1 and is_packed and dealt is not None:
            width = self.accelerator.unwrap_model(self.model).config.get_text_config().hidden_size
            costs = costs_of(self.train_dataset, width)
            _, passes = self.args.division
            dealt.sampler = BalancedSampler(dealt.sampler, costs, self.args.train_batch_size, world, passes)
        return loader

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The batches of one update; the last one of an epoch says how many pairs it has on all processes together.

        There the data loader gives every process a full batch and repeats pairs for it, which must not count twice.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        world = self.accelerator.num_processes
        if world > 1 and batches and self.accelerator.gradient_state.end_of_dataloader:
            data: Any = self.train_dataset
            with contextlib.suppress(TypeError):  # a stream has no length
                batches[-1]["pairs_left"] = len(data) % (world * self.args.train_batch_size)
        return batches, None

    def _get_num_items_in_batch(self, *args: Any) -> None:
        """Of labels there is nothing to count: the Trainer would not average for a loss that did."""

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward pass of a batch; row by row where it has several: the gradients add up."""
        start = time.perf_counter()
        if self.stream is not None:
            self.stream.take(inputs)
            inputs = send_to_device(inputs, self.args.device)
        if self._selector is not None:
            inputs = self._selector.batch(inputs, self.accelerator, self.state)
        ids = inputs.pop("ids")
        if pairs_left := inputs.pop("pairs_left", 0):
            size = sum(len(part["margin"]) for part in inputs.get("rows", [inputs]))
            counted = min(max(pairs_left - self.accelerator.process_index * size, 0), size)
            inputs |= counted_pairs(counted, pairs_left, self.accelerator.num_processes)
        rows = inputs.get("rows")
        parts = [inputs] if rows is None else rows
        num_rows, num_responses = (sum(len(part.get(name, ())) for part in parts) for name in ("margin", "groups"))
        noise = self._latent_noise(num_responses or 2 * num_rows)
        if rows is None:
            passes = [inputs | noise(slice(None))]
        else:
            passes = [{**row, **noise(row["places"]), **self._share_of(row, inputs, num_rows)} for row in rows]
        loss = self.run_passes(model, passes, num_items_in_batch)
        self._since_update.append((ids, loss.detach()))
        if self._selector is not None:
            self._selector.add_seconds(time.perf_counter() - start)
        return loss

    def _share_of(self, row: dict[str, Any], inputs: dict[str, Any], num_rows: int) -> dict[str, Any]:
        """What a row's loss counts for, of a batch of which perhaps only some pairs count."""
        if "counted" not in inputs:
            return {"share": len(row["margin"]) / num_rows}
        counted = int((row["members"] < inputs["counted"]).sum())
        return {"counted": counted, "share": inputs["share"] * counted / max(inputs["counted"], 1)}

    def _latent_noise(self, num_responses: int) -> Callable[[Any], dict[str, Tensor]]:
        """The model's input ``latent_noise`` at given places of a batch of so many responses.

        Drawn for the whole batch at once: into how many forward passes it is split then changes nothing.
        """
        config: Any = self.accelerator.unwrap_model(self.model).config
        if getattr(config, "architecture", None) != "inform":
            return lambda places: {}
        noise = torch.randn_like(torch.empty(num_responses, config.latent_dim, device=self.args.device))
        return lambda places: {"latent_noise": noise[places]}

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch or row, times its ``share``; its counts are added to what the next log line divides.

        Where ``counted`` is given, only so many pairs at its start count.
        """
        rewards, kl, output = self.rewards_of(model, inputs)
        beta = self._kl_warmup.weight(self.state.global_step, self.state.max_steps) * self._kl_share
        loss, sums = (self._group_loss if "groups" in inputs else self._pair_loss)(rewards, kl, inputs, beta)
        self._sums = sums if self._sums is None else self._sums + sums
        self._has_kl = kl is not None
        loss = loss * inputs.get("share", 1.0)
        return (loss, output) if return_outputs else loss

    def _pair_loss(
        self, rewards: Tensor, kl: Tensor | None, inputs: dict[str, Any], beta: float
    ) -> tuple[Tensor, Tensor]:
        """The loss of pairs, and what `metrics_from_sums` divides."""
        chosen, rejected = rewards.chunk(2)
        pair_kl = None if kl is None else torch.stack(kl.chunk(2))  # (2, B)
        counted = inputs.get("counted", len(chosen))
        sums = pair_sums(
            chosen[:counted], rejected[:counted], None if pair_kl is None else pair_kl[:, :counted].flatten()
        )
        used = counted or len(chosen)  # a process without pairs, its share 0, takes part in the backward pass as well
        chosen_kl, rejected_kl = (None, None) if pair_kl is None else pair_kl[:, :used]
        loss = reward_model_loss(
            chosen[:used],
            rejected[:used],
            chosen_kl,
            rejected_kl,
            beta=beta,
            margin=inputs["margin"][:used],
            **self._loss_settings,
        )
        return loss, sums

    def _group_loss(
        self, rewards: Tensor, kl: Tensor | None, inputs: dict[str, Any], beta: float
    ) -> tuple[Tensor, Tensor]:
        """The loss of groups, and what `metrics_from_sums` divides."""
        labels, groups, margin = (inputs[name] for name in ("labels", "groups", "margin"))

        def first(number: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
            kept = groups < number
            return rewards[kept], labels[kept], groups[kept], None if kl is None else kl[kept]

        counted = inputs.get("counted", len(margin))
        used = counted or len(margin)  # as for pairs
        loss = group_loss(
            *first(used), margin=margin[:used], beta=beta, ranking_loss=self.args.ranking_loss,
            score_loss_coefficient=self.args.score_loss_coefficient, **self._loss_settings,
        )  # fmt: skip
        return loss, group_sums(*first(counted))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as `transformers.Trainer` does, without a trace in the random state that training goes on with."""
        with torch.random.fork_rng(devices=[]):  # a data loader draws from the CPU's when it starts
            return super().evaluate(*args, **kwargs)

    @torch.no_grad()
    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Rows ``(B, 3)`` for `compute_eval_metrics`, and the margins as labels; gathering counts each pair once."""
        inputs = self._prepare_inputs({name: value for name, value in inputs.items() if name != "ids"})
        rows = inputs.get("rows", [inputs])
        repeated = self.most_passes(len(rows)) - len(rows)
        parts = [self._predicted(model, row) for row in [*rows, *[rows[-1]] * repeated]]
        predictions, margins = zip(*parts[: len(rows)], strict=True)
        if predictions[0].dim() == 3:  # groups, of which some have more responses than others
            most = max(part.shape[1] for part in predictions)
            predictions = tuple(functional.pad(part, (0, 0, 0, most - part.shape[1])) for part in predictions)
        if len(rows) == 1:
            return None, predictions[0], margins[0]
        # In the batch's order: at its end stand the repetitions of the last batch, which gathering leaves out.
        order = torch.cat([row["members"] for row in rows]).argsort()
        return None, torch.cat(predictions)[order], torch.cat(margins)[order]

    def _predicted(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Of one forward pass, what `prediction_step` gives."""
        with self.computed_where_read(inputs):
            rewards, kl, _ = self.rewards_of(model, inputs)
        if "groups" in inputs:
            labels, groups, margin = (inputs[name] for name in ("labels", "groups", "margin"))
            return padded_predictions(rewards.detach(), kl, labels, groups, len(margin)), margin
        chosen, rejected = rewards.chunk(2)
        kl_sum = torch.full_like(chosen, float("nan")) if kl is None else torch.stack(kl.chunk(2)).sum(dim=0)
        return torch.stack([chosen, rejected, kl_sum], dim=1).detach(), inputs["margin"]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the training metrics since the last line."""
        if "loss" in logs and self._sums is not None:
            sums = self.accelerator.reduce(self._sums, reduction="sum")
            logs.update(metrics_from_sums(sums, self._has_kl))
            self._sums = self._sums_before = None
        if "loss" in logs and self._selector is not None:
            logs.update(self._selector.metrics(self.accelerator))
        super().log(logs, *args, **kwargs)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The gradient norm, which is that of all processes; the Trainer asks for it before it updates the weights."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        batches, self._since_update = self._since_update, []
        self._passed = []  # their gradients are about to be used: none will have to be computed again
        self._count_update()
        losses = torch.stack([loss for _, loss in batches])
        if not (losses.isfinite().all() and torch.as_tensor(norm).isfinite().all()):
            self._report_non_finite(float(norm), [(ids, float(loss)) for ids, loss in batches])
        return norm

    def _count_update(self) -> None:
        """Tell the KL term's warm-up, while it waits, what preferences earned in an update, on all processes."""
        if not (self._has_kl and self._kl_warmup.waits):
            return
        assert self._sums is not None
        own = self._sums if self._sums_before is None else self._sums - self._sums_before
        self._sums_before = self._sums
        pairs, _, _, losses, _, _, scored, *_ = self.accelerator.reduce(own, reduction="sum").tolist()
        if scored and not pairs:  # there is no preference in them
            self._kl_warmup.nats = 0.0
        self._kl_warmup.add(pairs, losses)

    def _report_non_finite(self, norm: float, batches: list[tuple[list[str], float]]) -> None:
        step = self.state.global_step + 1
        path = Path(str(self.args.output_dir)) / f"nonfinite-{self.args.process_index}.json"
        report = [{"loss": str(loss), "is_finite": math.isfinite(loss), "ids": ids} for ids, loss in batches]
        write_json(path, {"step": step, "gradient_norm": str(norm), "batches": report})
        suspects = [ids for ids, loss in batches if not math.isfinite(loss)] or [ids for ids, _ in batches]
        shown = [row for ids in suspects for row in ids]
        raise NonFiniteLossError(
            f"The loss or gradient norm ({norm}) is not finite at step {step}: losses "
            f"{[loss for _, loss in batches]} of this process, rows {', '.join(shown[:8])}"
            f"{' ...' if len(shown) > 8 else ''} (all in {path}). The weights were not updated, and earlier "
            "checkpoints are intact. Look at these rows, lower learning_rate, or train in float32."
        )

    def _get_output_dir(self, trial: Any) -> str:
        return str(Path(super()._get_output_dir(trial)) / "checkpoints")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        checkpoints = Path(self._get_output_dir(trial=trial))
        folder = checkpoints / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            discard(folder)  # left by a run that was killed while it wrote
        self.accelerator.wait_for_everyone()
        # The Trainer would remove older checkpoints by file time, and before the new one is known to be whole.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
            if self.stream is not None:
                self.stream.save(folder)
            if self.args.should_save:
                self._kl_warmup.save(folder)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                mark_complete(folder)
        except Exception as error:  # OSError, but also what safetensors and torch.save make of a full disk
            if self.args.should_save:
                with contextlib.suppress(OSError):
                    discard(folder)
            last = last_complete(checkpoints)
            raise OSError(
                f"{folder} could not be written ({error}). "
                + (f"{last} is complete: the same command goes on from there." if last else "There is no earlier one.")
            ) from error
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            discard_beyond(checkpoints, limit, self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with reading_checkpoint(resume_from_checkpoint, "the weights"):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading_checkpoint(checkpoint, "optimizer.pt or scheduler.pt"):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading_checkpoint(checkpoint, "the random state (rng_state*.pth)"):
            super()._load_rng_state(checkpoint)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        # As many as all processes use for one update: their order is then that of one process with such a batch.
        batch_size = self.args.train_batch_size * self.args.division[1] * self.args.world_size
        return EpochSeededLengthSampler(batch_size, list(rows["length"]), self.args.seed)

    def _compile_layers(self) -> None:
        """Compile each decoder layer, in place, in place of the whole model.

        All layers share what is compiled, for rows of any length: seconds of compiling, where the whole model takes
        minutes (docs/results/performance.md).
        """
        self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO
        model: Any = self.accelerator.unwrap_model(self.model)
        names = set(model._no_split_modules or ())
        for module in model.modules():
            if type(module).__name__ in names:
                module.compile(
                    dynamic=True, backend=self.args.torch_compile_backend, mode=self.args.torch_compile_mode
                )

    def save_whole_model(self, output_dir: str) -> None:
        """`save_model` that writes an ordinary folder under ``SHARDED_STATE_DICT``, too."""
        plugin: Any = getattr(self.accelerator.state, "fsdp_plugin", None)
        if not self.is_fsdp_enabled or "FULL_STATE_DICT" in str(plugin.state_dict_type):
            return self.save_model(output_dir, _internal_call=True)
        self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if self.is_fsdp_enabled and "_auto_class" not in type(model).__dict__:
            # FSDP2 gives the model a class of its own; saving that as a registered class would copy torch's FSDP files
            # in place of ours.
            type(model)._auto_class = None
        super()._save(output_dir, state_dict)
        folder = Path(output_dir if output_dir is not None else str(self.args.output_dir))
        if not self.args.should_save:
            return
        with contextlib.suppress(FileNotFoundError):
            (folder / "training_args.bin").unlink()  # a pickle; the settings are in training_config.yaml
        open_to_readers(folder)
        if holds_adapters(folder):
            complete_adapter_folder(folder, model)
        if (folder / "config.json").exists():
            add_remote_code(folder)

    def _keep_fsdp_output_in_float32(self) -> None:
        """FSDP2's mixed precision would round rewards to bfloat16 on their way out of the model."""
        plugin: Any = getattr(self.accelerator.state, "fsdp_plugin", None)
        policy: Any = getattr(plugin, "mixed_precision_policy", None)
        if hasattr(policy, "output_dtype"):
            plugin.mixed_precision_policy = dataclasses.replace(policy, output_dtype=torch.float32)
