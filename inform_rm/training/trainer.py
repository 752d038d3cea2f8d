"""The transformers Trainer with the reward-model loss."""

import contextlib
import copy
import dataclasses
import functools
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import send_to_device, set_seed
from datasets import IterableDataset
from torch import Tensor
from transformers import EvalPrediction, IntervalStrategy, PreTrainedTokenizerBase, Trainer, TrainerCallback

from inform_rm.data.tokenizer import check_vocabulary, load_tokenizer, with_plain_template
from inform_rm.errors import InputError, Interrupted
from inform_rm.hub.cards import model_card
from inform_rm.hub.export import add_remote_code, push_folder
from inform_rm.scoring.adapters import complete_adapter_folder, holds_adapters
from inform_rm.scoring.packing import CPU_TOKENS_PER_BATCH
from inform_rm.training.checkpoints import (
    check_resume,
    discard,
    discard_beyond,
    discard_incomplete,
    discard_run,
    reading_checkpoint,
)
from inform_rm.training.collators import EpochSeededLengthSampler, PackedPairCollator, PairCollator, counted_pairs
from inform_rm.training.data import ARGUMENTS, TrainingPairs, choose_splits, in_memory, load_training_pairs
from inform_rm.training.half_precision import LostUpdates
from inform_rm.training.interruption import StopOnSignal
from inform_rm.training.losses import PAIR_LOSSES, kl_weight, reward_model_loss
from inform_rm.training.metrics import compute_eval_metrics, metrics_from_sums, pair_sums
from inform_rm.training.models import (
    add_adapters,
    check_max_length,
    check_model,
    choose_batching,
    load_model,
    longest_input,
)
from inform_rm.training.prioritized import PoolCollator, PoolSelector, pool_selector
from inform_rm.training.reward_arguments import RewardTrainingArguments, settings_of
from inform_rm.training.streaming import EncodedStream, StepsAreTheEpoch, StreamSource, open_stream, stream_of
from inform_rm.util.checkpoints import checkpoint_step, is_complete, last_complete, mark_complete
from inform_rm.util.files import atomic_write_text, check_output_directory, versions, write_json

_NOT_FOR_MODEL = ("margin", "share", "counted", "ids", "places")


class _OwnSteps(TrainerCallback):
    """A resumed run logs, evaluates and saves as its settings say; the Trainer would do it as the checkpoint's did."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)


class NonFiniteLossError(FloatingPointError):
    """A loss or a gradient was NaN or infinite; no weight has been changed by it."""


class RewardTrainer(Trainer):
    """Trains a reward model on pairs with the loss of arXiv:2402.09345, eq. 25; logs accuracy, margin, rewards and KL.

    >>> trainer = RewardTrainer("backbone", RewardTrainingArguments("run"), train_dataset=pairs)  # doctest: +SKIP
    >>> trainer.train(resume_from_checkpoint=True)  # doctest: +SKIP

    ``output_dir/checkpoints`` gets the checkpoints. One counts only when all of it has been written
    (`inform_rm.training.checkpoints`), and older ones are removed after that. A loss or gradient that is no finite
    number stops the run before the weights are updated; the ids of the update's rows go to ``nonfinite-RANK.json``.

    Args:
        model: a name or folder of a backbone, an InfoRM model or another sequence classifier; or a loaded model with
            a head ``score``. ``None``: ``args.model``.
        args: all settings.
        data_collator: in place of the one that ``args.batching`` chooses.
        train_dataset: pairs in any layout of docs/data.md: `Dataset`, `IterableDataset` (read while training),
            `DatasetDict` (its ``train``), or a list of dicts; or pairs that `encode_pairs` has encoded. ``None``:
            ``args.data``.
        eval_dataset: the same, for evaluation; of a `DatasetDict` ``validation`` or ``test``.
        processing_class: the tokenizer; ``None``: the model's own.
        compute_metrics: further metrics of an evaluation: ``predictions`` ``(N, 3)`` are chosen reward, rejected
            reward and KL, ``label_ids`` the margins.
        callbacks: as of `transformers.Trainer`.
        peft_config: a `peft.LoraConfig`; ``None``: what ``args.lora_r`` and its like say.
        kwargs: further arguments of `transformers.Trainer` (``optimizers``, ...).

    Attributes:
        train_pairs: what was read of the training pairs; so ``eval_pairs``; ``None``: there are none.
        batching: ``"packed"`` or ``"padded"``.
        max_length: most tokens of a prompt with its response; ``None``: no limit.

    Raises:
        InputError: bad data, a model that is no backbone, settings that contradict each other.
    """

    args: RewardTrainingArguments
    # The loss is a mean over the pairs of a batch, so accumulated batches are averaged.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: Any = None,
        args: RewardTrainingArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[..., dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        peft_config: Any = None,
        **kwargs: Any,
    ):
        args = copy.copy(args if args is not None else RewardTrainingArguments())
        set_seed(args.seed)
        loaded = None if model is None or isinstance(model, str | Path) else model
        args.model = _name_of(model) if model is not None else args.model
        if loaded is None:
            if args.model is None:
                raise InputError("model: none given. Pass a name, a folder or a loaded model.")
            check_model(args)
        tokenizer = with_plain_template(processing_class or _tokenizer(args), str(args.model))
        self.max_length = longest_input(args, loaded)
        train_dataset, eval_dataset = choose_splits(train_dataset, eval_dataset)
        self._args_of_pairs, self._tokenizer = args, tokenizer
        self.train_pairs = self._pairs("data", train_dataset)
        self.eval_pairs = self._pairs("eval_data", eval_dataset)
        if self.eval_pairs is None:
            if args.load_best_model_at_end:
                raise InputError("load_best_model_at_end needs eval_dataset (or eval_data) to choose by.")
            args.eval_strategy = IntervalStrategy.NO
        whole = load_model(args) if loaded is None else loaded
        check_max_length(whole, self.max_length)
        check_vocabulary(tokenizer, whole.config.get_text_config().vocab_size)
        whole.config.pad_token_id = tokenizer.pad_token_id
        if data_collator is None:
            self.batching = choose_batching(whole, args)
        else:
            self.batching = "packed" if isinstance(data_collator, PackedPairCollator) else "padded"
        self.peft_config = peft_config
        trained = add_adapters(whole, args, peft_config) if args.lora_r or peft_config is not None else whole
        args.data_seed = args.seed if args.data_seed is None else args.data_seed
        self._since_update: list[tuple[list[str], Tensor]] = []  # since the last update: the rows' ids and the loss
        self._sums: Tensor | None = None
        self._has_kl = False
        self._loss_settings: dict[str, Any] = {
            "loss": PAIR_LOSSES[args.loss_type],
            **{name: getattr(args, name) for name in ("label_smoothing", "center_rewards_coefficient")},
        }
        self.resumed_from: Path | None = None
        self.train_seconds: float | None = None
        self.evaluation: dict[str, Any] | None = None
        self.quantization: dict[str, Any] | None = None
        collate = data_collator or (
            PackedPairCollator(tokens_per_batch(args)) if self.batching == "packed" else PairCollator(tokenizer)
        )
        rows = None if self.train_pairs is None else self.train_pairs.dataset
        self.stream: EncodedStream | None = None
        self._selector: PoolSelector | None = None
        if isinstance(self.train_pairs, StreamSource):
            self.stream = EncodedStream(
                self.train_pairs, tokenizer, args, max_length=self.max_length, overlong=args.overlong,
                on_bad_row=args.on_bad_row,
            )  # fmt: skip
            rows = self.stream.dataset()
            args.ignore_data_skip = True  # a resumed stream begins where it is to go on
        elif args.objective == "prioritized" and rows is not None:
            self._selector = pool_selector(
                args, rows, collate, trained, tokenizer, max_length=self.max_length, batching=self.batching
            )
            rows, collate = rows.add_column("position", np.arange(len(rows))), PoolCollator(collate)
        super().__init__(
            model=trained,
            args=args,
            data_collator=collate,
            train_dataset=rows,
            eval_dataset=None if self.eval_pairs is None else self.eval_pairs.dataset,
            processing_class=tokenizer,
            compute_metrics=functools.partial(_metrics, args.loss_type, compute_metrics),
            callbacks=[*(callbacks or []), LostUpdates(), _OwnSteps(), *([StepsAreTheEpoch()] if self.stream else [])],
            **kwargs,
        )
        self.can_return_loss = True
        self.label_names: list[str] = []
        self._keep_fsdp_output_in_float32()

    def _pairs(self, setting: str, rows: Any) -> TrainingPairs | StreamSource | None:
        """What is given for ``data`` or ``eval_data``, read and, but for a stream, encoded."""
        args = self._args_of_pairs
        argument, sources = ARGUMENTS[setting], getattr(args, setting)
        if rows is None:
            if not sources:
                return None
            if args.streaming and setting == "data":
                return open_stream(args.data, args.columns, seed=args.seed, shuffle_buffer=args.shuffle_buffer)
        else:
            if sources:
                raise InputError(f"{argument}: {setting} names pairs, too ({', '.join(sources)}). Give one of them.")
            name = in_memory(setting)
            setattr(args, setting, (name,))
            sources = (rows,)
            if "chosen_input_ids" in (getattr(rows, "column_names", None) or ()):
                return TrainingPairs(rows, {"pairs": len(rows)}, {name: rows._fingerprint})
            if isinstance(rows, IterableDataset) and setting == "data":
                args.streaming = True
                if faults := args.faults():
                    raise InputError(f"{argument}: " + "; ".join(faults) + ".")
                return stream_of(rows, args.columns, name)
        most = args.max_pairs_per_source if setting == "data" else args.max_eval_pairs_per_source
        return load_training_pairs(args, sources, most, self._tokenizer, setting, self.max_length)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train, or go on with a run that was cut off; its loss curve is that of an uninterrupted run.

        Args:
            resume_from_checkpoint: ``True``: go on from the last complete checkpoint, if there is one; a folder: from
                that one. Else a new run, for which there must be none, unless ``args.overwrite`` discards it.
            args: further arguments of `transformers.Trainer.train`; so ``kwargs``.
            kwargs: see ``args``.

        Raises:
            InputError: the output folder holds another run, or what decides the result has changed.
            NonFiniteLossError: a loss or gradient is NaN or infinite.
            Interrupted: after SIGTERM, when a checkpoint has been saved.
            OSError: a checkpoint cannot be written; earlier ones are as they were.
        """
        output = check_output_directory(str(self.args.output_dir))
        checkpoint = self._prepare_output(output, resume_from_checkpoint)
        check_resume(
            output, self.args, _fingerprints(self.train_pairs), _fingerprints(self.eval_pairs), checkpoint,
            None if self.peft_config is None else json.loads(json.dumps(self.peft_config.to_dict(), default=sorted)),
        )  # fmt: skip
        self.resumed_from = checkpoint
        for part in (self.stream, self._selector):
            if checkpoint is not None and part is not None:
                part.load(checkpoint)
        # Trainer seeds all processes alike: without this, every process would draw the same noise.
        set_seed(self.args.seed, device_specific=True)
        with StopOnSignal(self) as stop:
            outcome = super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)
        if stop.received is not None:
            raise Interrupted(stop.received, f"saved {output}/checkpoints/checkpoint-{self.state.global_step}")
        self.train_seconds = outcome.metrics["train_runtime"]
        return outcome

    def _prepare_output(self, output: Path, resume: Any) -> Path | None:
        """Clear what is half-written, or all; the checkpoint to go on from."""
        if self.is_world_process_zero():
            if self.args.overwrite:
                discard_run(output)
            else:
                discard_incomplete(output)
        self.accelerator.wait_for_everyone()
        last = last_complete(output / "checkpoints")
        if resume and not isinstance(resume, bool):
            if not is_complete(Path(resume)):
                raise InputError(f"resume_from_checkpoint: {resume} is no complete checkpoint of this trainer.")
            return Path(resume)
        if last is not None and not resume:
            raise InputError(
                f"output_dir: {output} holds an unfinished run. Pass resume_from_checkpoint=True to go on with it, "
                "overwrite=True in args to discard it, or name another folder."
            )
        return last

    def get_train_dataloader(self) -> Any:
        """The batches of this process."""
        return super().get_train_dataloader() if self.stream is None else self.stream.loader(self.data_collator)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Batches of the evaluation's pairs, or of others in any layout, which are encoded first."""
        return super().get_eval_dataloader(self._encoded(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Likewise for `predict`."""
        return super().get_test_dataloader(self._encoded(test_dataset))

    def _encoded(self, rows: Any) -> Any:
        if rows is None or isinstance(rows, str) or "chosen_input_ids" in (getattr(rows, "column_names", None) or ()):
            return rows
        rows = choose_splits(None, rows)[1]
        return load_training_pairs(self.args, (rows,), None, self._tokenizer, "eval_data", self.max_length).dataset

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The batches of one update; the last one of an epoch says how many pairs it has on all processes together.

        There the data loader gives every process a full batch and repeats pairs for it, which must not count twice.
        """
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        world = self.accelerator.num_processes
        if world > 1 and batches and self.accelerator.gradient_state.end_of_dataloader:
            data: Any = self.train_dataset
            with contextlib.suppress(TypeError):  # a stream has no length
                batches[-1]["pairs_left"] = len(data) % (world * self.args.train_batch_size)
        return batches, num_items

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
            size = len(inputs["margin"])
            counted = min(max(pairs_left - self.accelerator.process_index * size, 0), size)
            inputs |= counted_pairs(counted, pairs_left, self.accelerator.num_processes)
        rows = inputs.get("rows")
        num_pairs = len(inputs["margin"]) if rows is None else sum(len(row["margin"]) for row in rows)
        noise = self._latent_noise(num_pairs)
        if rows is None:
            loss = super().training_step(model, inputs | noise(slice(None)), num_items_in_batch)
        else:
            losses = []
            for row in rows:
                part = {**row, **noise(row["places"]), "share": len(row["margin"]) / num_pairs}
                losses.append(super().training_step(model, part, num_items_in_batch))
            loss = torch.stack(losses).sum()
        self._since_update.append((ids, loss.detach()))
        if self._selector is not None:
            self._selector.add_seconds(time.perf_counter() - start)
        return loss

    def _latent_noise(self, num_pairs: int) -> Callable[[Any], dict[str, Tensor]]:
        """The model's input ``latent_noise`` for pairs at given places of a batch of ``num_pairs``.

        Drawn for the whole batch at once: into how many forward passes it is split then changes nothing.
        """
        config: Any = self.accelerator.unwrap_model(self.model).config
        if getattr(config, "architecture", None) != "inform":
            return lambda places: {}
        noise = torch.randn_like(torch.empty(2, num_pairs, config.latent_dim, device=self.args.device))
        return lambda places: {"latent_noise": noise[:, places].flatten(0, 1)}

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of a batch or row, times its ``share``; its counts are added to what the next log line divides.

        Where ``counted`` is given, only so many pairs at its start count.
        """
        chosen, rejected, kl, output = self._rewards(model, inputs)
        pair_kl = None if kl is None else torch.stack(kl.chunk(2))  # (2, B)
        counted = inputs.get("counted", len(chosen))
        sums = pair_sums(
            chosen[:counted], rejected[:counted], None if pair_kl is None else pair_kl[:, :counted].flatten()
        )
        used = counted or len(chosen)  # a process without pairs, its share 0, takes part in the backward pass as well
        chosen_kl, rejected_kl = (None, None) if pair_kl is None else pair_kl[:, :used]
        beta = kl_weight(self.state.global_step, self.state.max_steps, self.args.beta, self.args.kl_warmup_steps)
        loss = reward_model_loss(
            chosen[:used],
            rejected[:used],
            chosen_kl,
            rejected_kl,
            beta=beta,
            margin=inputs["margin"][:used],
            **self._loss_settings,
        ) * inputs.get("share", 1.0)
        self._sums = sums if self._sums is None else self._sums + sums
        self._has_kl = kl is not None
        return (loss, output) if return_outputs else loss

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
        if "rows" in inputs:
            parts = [self.prediction_step(model, row, prediction_loss_only, ignore_keys) for row in inputs["rows"]]
            _, predictions, margins = zip(*parts, strict=True)
            return None, torch.cat(predictions), torch.cat(margins)
        chosen, rejected, kl, _ = self._rewards(model, inputs)
        kl_sum = torch.full_like(chosen, float("nan")) if kl is None else torch.stack(kl.chunk(2)).sum(dim=0)
        return None, torch.stack([chosen, rejected, kl_sum], dim=1).detach(), inputs["margin"]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the training metrics since the last line."""
        if "loss" in logs and self._sums is not None:
            sums = self.accelerator.reduce(self._sums, reduction="sum")
            logs.update(metrics_from_sums(sums, self._has_kl))
            self._sums = None
        if "loss" in logs and self._selector is not None:
            logs.update(self._selector.metrics(self.accelerator))
        super().log(logs, *args, **kwargs)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The gradient norm, which is that of all processes; the Trainer asks for it before it updates the weights."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        batches, self._since_update = self._since_update, []
        losses = torch.stack([loss for _, loss in batches])
        if not (losses.isfinite().all() and torch.as_tensor(norm).isfinite().all()):
            self._report_non_finite(float(norm), [(ids, float(loss)) for ids, loss in batches])
        return norm

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
            if self._selector is not None and self.args.should_save:
                self._selector.save(folder, self.state.global_step)
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
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return EpochSeededLengthSampler(batch_size, list(rows["length"]), self.args.seed)

    def _rewards(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None, Any]:
        output = model(**{name: value for name, value in inputs.items() if name not in _NOT_FOR_MODEL})
        chosen, rejected = output.logits.float().flatten().chunk(2)
        kl = getattr(output, "kl", None)
        return chosen, rejected, None if kl is None else kl.float(), output

    def save_whole_model(self, output_dir: str) -> None:
        """`save_model` that writes an ordinary folder under ``SHARDED_STATE_DICT``, too."""
        plugin: Any = getattr(self.accelerator.state, "fsdp_plugin", None)
        if not self.is_fsdp_enabled or "FULL_STATE_DICT" in str(plugin.state_dict_type):
            return self.save_model(output_dir, _internal_call=True)
        self._save(output_dir, state_dict=self.accelerator.get_state_dict(self.model))

    def result(self) -> dict[str, Any]:
        """What is known of the run, as ``train_result.json`` holds it; every process must call it."""
        counts = getattr(self.train_pairs, "counts", None) if self.stream is None else self.stream.total_counts()
        return {
            "settings": settings_of(self.args),
            "versions": versions(),
            "data_fingerprints": _fingerprints(self.train_pairs) | _fingerprints(self.eval_pairs),
            "train_pairs": counts,
            "eval_pairs": getattr(self.eval_pairs, "counts", None),
            "max_length": self.max_length,
            "batching": self.batching,
            "num_processes": self.accelerator.num_processes,
            "distributed_type": str(self.accelerator.distributed_type.value),
            "steps": self.state.global_step,
            "resumed_from_step": None if self.resumed_from is None else checkpoint_step(self.resumed_from),
            "train_runtime_seconds": self.train_seconds,
            "evaluation": self.evaluation,
            "quantization": self.quantization,
            "log_history": self.state.log_history,
        }

    def card(self, result: dict[str, Any]) -> str:
        """The model card of what has been trained; ``result`` as `result` gives it."""
        settings = {name: value for name, value in settings_of(self.args).items() if value is not None}
        if not hasattr(self.accelerator.unwrap_model(self.model), "peft_config"):
            settings["merge_adapters"] = True
        for name in ("eval_data", "overwrite"):
            settings.pop(name, None)
        config = self.accelerator.unwrap_model(self.model).config
        return model_card(config, settings, result)

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Nothing yet: `push_to_hub` makes the repository, private, when there is something to upload."""

    def push_to_hub(self, *args: Any, token: str | None = None, **kwargs: Any) -> Any:
        """Upload the model, its tokenizer, code and card as one commit to ``args.hub_model_id``, after a scan of them.

        The commit's message and that a new repository is private are fixed (`inform_rm.hub.export.push_folder`).

        Raises:
            InputError: before anything is uploaded: no id, or what must not be uploaded.
            ConnectionError: the Hub refuses or cannot be reached.
        """
        if self.args.hub_model_id is None:
            raise InputError("hub_model_id: none given; push_to_hub needs one, name/model.")
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            self.save_whole_model(str(folder))
            card = self.card(self.result())
            if self.is_world_process_zero():
                atomic_write_text(folder / "README.md", card)
                push_folder(folder, self.args.hub_model_id, token=token or self.args.hub_token)

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


def _name_of(model: Any) -> str | None:
    """Where a model comes from: itself if it is a name."""
    if isinstance(model, str | Path):
        return str(model)
    names = (getattr(config, "_name_or_path", None) for config in (model.config, model.config.get_text_config()))
    return next((name for name in names if name), None)


def _tokenizer(args: RewardTrainingArguments) -> PreTrainedTokenizerBase:
    if args.model is None:
        raise InputError("processing_class: the model does not say where it comes from. Pass its tokenizer.")
    names = ("revision", "trust_remote_code", "chat_template")
    return load_tokenizer(args.model, **{name: getattr(args, name) for name in names})


def _fingerprints(pairs: TrainingPairs | StreamSource | None) -> dict[str, str]:
    return {} if pairs is None else pairs.fingerprints


def _metrics(
    loss_type: str, further: Callable[..., dict[str, float]] | None, prediction: EvalPrediction
) -> dict[str, float]:
    return {**compute_eval_metrics(prediction, loss_type), **({} if further is None else further(prediction))}


def tokens_per_batch(args: RewardTrainingArguments) -> int | None:
    """Most tokens of a packed row.

    Raises:
        InputError: a limit is given for several processes.
    """
    if args.world_size > 1:
        # Under FSDP every process must make equally many forward passes.
        if args.tokens_per_batch is not None:
            raise InputError(
                f"tokens_per_batch: {args.tokens_per_batch} with {args.world_size} processes; it works in one "
                "process. Leave it out and lower per_device_train_batch_size."
            )
        return None
    return args.tokens_per_batch or (CPU_TOKENS_PER_BATCH if args.device.type == "cpu" else None)
