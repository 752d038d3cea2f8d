"""The transformers Trainer for reward models: from data and a model, as objects or names, to a Hub-ready folder."""

import copy
import functools
import json
import logging
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import set_seed
from datasets import IterableDataset
from transformers import IntervalStrategy, PreTrainedTokenizerBase, TrainerCallback

from inform_rm.data.tokenizer import check_vocabulary, load_tokenizer, with_plain_template
from inform_rm.errors import InputError, Interrupted
from inform_rm.hub.cards import model_card
from inform_rm.hub.eval_results import entries_of_run, write_entries
from inform_rm.hub.export import push_folder
from inform_rm.training.budget import BudgetWatch, budget_of_run
from inform_rm.training.checkpoints import check_resume, discard_incomplete, discard_run, only_run_in
from inform_rm.training.collators import PackedPairCollator, PairCollator, tokens_per_batch
from inform_rm.training.data import (
    ARGUMENTS,
    TrainingPairs,
    choose_splits,
    in_memory,
    is_encoded,
    load_training_pairs,
    names_in,
)
from inform_rm.training.half_precision import LostUpdates
from inform_rm.training.interruption import StopOnSignal
from inform_rm.training.kl_warmup import KLWarmup
from inform_rm.training.loop import OwnSteps, RewardLoop
from inform_rm.training.losses import PAIR_LOSSES
from inform_rm.training.metrics import check_best_metric, compute_eval_metrics
from inform_rm.training.models import (
    add_adapters,
    check_max_length,
    check_model,
    choose_batching,
    load_model,
    longest_input,
)
from inform_rm.training.prioritized import pool_or_batch, pool_selector
from inform_rm.training.reward_arguments import RewardTrainingArguments, card_settings, settings_of
from inform_rm.training.stream_sources import StreamSource, open_stream, stream_of
from inform_rm.training.streaming import EncodedStream, StepsAreTheEpoch
from inform_rm.util.checkpoints import checkpoint_step, is_complete, last_complete
from inform_rm.util.files import atomic_write_text, check_output_directory, versions
from inform_rm.util.intervals import wilson_interval

logger = logging.getLogger(__name__)


class RewardTrainer(RewardLoop):
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
        train_dataset: pairs, rankings or scored responses in any layout of docs/how-to/data.md: `Dataset`,
            `IterableDataset` (of pairs, read while training), `DatasetDict` (its ``train``), or a list of
            dicts; or pairs that `encode_pairs` has encoded; or the name of a file, folder or Hub id, or several.
            ``None``: ``args.data``.
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
        if not isinstance(args, RewardTrainingArguments | None):
            what = f"args: got a {type(args).__name__}; expected RewardTrainingArguments, which take all that"
            raise InputError(f"{what} transformers' TrainingArguments do, and add theirs.")
        if kwargs.pop("model_init", None) is not None:
            raise InputError("model_init: a trainer has one model. Make a trainer for each trial of a search.")
        args = copy.copy(args if args is not None else RewardTrainingArguments())
        if compute_metrics is None:
            check_best_metric(args.metric_for_best_model, args.loss_type)
        if peft_config is None and (faults := args.faults_without_adapters()):
            raise InputError("Training settings: " + "; ".join(faults) + ".")
        set_seed(args.seed)
        loaded = None if model is None or isinstance(model, str | Path) else model
        args.model = _name_of(model) if model is not None else args.model
        if loaded is None:
            if args.model is None:
                raise InputError("model: none given. Pass a name, a folder or a loaded model.")
            check_model(args)
        if args.model is not None and Path(args.model).resolve() == Path(str(args.output_dir)).resolve():
            raise InputError(
                f"output_dir: {args.output_dir} is the model's own, whose weights would be lost. Name another."
            )
        tokenizer = with_plain_template(processing_class or _tokenizer(args), str(args.model))
        self.max_length = longest_input(args, loaded)
        train_dataset, eval_dataset = choose_splits(train_dataset, eval_dataset)
        self._args_of_pairs, self._tokenizer = args, tokenizer
        self.train_pairs = self._pairs("data", train_dataset)
        self.eval_pairs = self._pairs("eval_data", eval_dataset)
        trained, evaluated = self._fingerprints()
        if shared := [name for name, found in evaluated.items() if found in trained.values()]:
            text = "%s: these pairs are trained on, too; how good the model is on others they do not tell."
            logger.warning(text, ", ".join(shared))
        if self.eval_pairs is None:
            if args.load_best_model_at_end:
                raise InputError("load_best_model_at_end needs eval_dataset (or eval_data) to choose by.")
            args.eval_strategy = IntervalStrategy.NO
        whole = load_model(args) if loaded is None else loaded
        self._fit_model(whole)
        if data_collator is None:
            self.batching = choose_batching(whole, args)
        else:
            self.batching = "packed" if isinstance(data_collator, PackedPairCollator) else "padded"
        self.peft_config = peft_config
        args.data_seed = args.seed if args.data_seed is None else args.data_seed
        self.resumed_from: Path | None = None
        self.train_seconds: float | None = None
        self.evaluation: dict[str, Any] | None = None
        self.quantization: dict[str, Any] | None = None
        parts = self._parts(
            add_adapters(whole, args, peft_config) if args.lora_r or peft_config is not None else whole,
            data_collator
            or (PackedPairCollator(tokens_per_batch(args)) if self.batching == "packed" else PairCollator(tokenizer)),
        )
        has_kl = args.beta and getattr(whole.config, "architecture", None) == "inform"
        kl_warmup = KLWarmup(args.beta, args.kl_warmup_steps, args.kl_warmup_nats if has_kl else 0.0)
        super().__init__(
            args=args,
            kl_warmup=kl_warmup,
            eval_dataset=None if self.eval_pairs is None else self.eval_pairs.dataset,
            processing_class=tokenizer,
            compute_metrics=functools.partial(compute_eval_metrics, args.loss_type, compute_metrics),
            callbacks=[
                *(callbacks or []), LostUpdates(), BudgetWatch(kl_warmup), OwnSteps(),
                *([StepsAreTheEpoch()] * bool(parts["stream"])),
            ],
            **parts,
            **kwargs,
        )  # fmt: skip

    def _fit_model(self, model: Any) -> None:
        """Check that a model takes the run's tokens, and make it say of itself what the run does."""
        args, tokenizer = self._args_of_pairs, self._tokenizer
        if model.config.num_labels != 1:
            raise InputError(
                f"model: a {type(model).__name__} with num_labels={model.config.num_labels}; a reward model has one "
                "output. Load a classifier with num_labels=1; of a causal LM pass the name or folder, or make "
                "InfoRMForSequenceClassification.from_backbone of it."
            )
        if model.config.model_type == "inform":
            model.config.beta, model.config.loss_type = args.beta, args.loss_type
            model.loss_function = PAIR_LOSSES[args.loss_type]
        check_max_length(model, self.max_length)
        check_vocabulary(tokenizer, model.config.get_text_config().vocab_size)
        model.config.pad_token_id = tokenizer.pad_token_id

    def _parts(self, model: Any, collate: Any) -> dict[str, Any]:
        """The loop's arguments: from what rows, chosen how, batches are made."""
        args, tokenizer, pairs = self._args_of_pairs, self._tokenizer, self.train_pairs
        parts = {"model": model, "data_collator": collate, "stream": None, "selector": None, "train_dataset": None}
        if isinstance(pairs, StreamSource):
            rules = {"max_length": self.max_length, "overlong": args.overlong, "on_bad_row": args.on_bad_row}
            stream = EncodedStream(pairs, tokenizer, args, **rules)
            args.ignore_data_skip = True  # a resumed stream begins where it is to go on
            return {**parts, "stream": stream, "train_dataset": stream}
        if pairs is None or args.objective != "prioritized":
            return parts if pairs is None else {**parts, "train_dataset": pairs.dataset}
        scoring: dict[str, Any] = {"max_length": self.max_length, "batching": self.batching}
        return {
            **parts, "data_collator": functools.partial(pool_or_batch, collate),
            "train_dataset": pairs.dataset.add_column("position", np.arange(len(pairs.dataset))),
            "selector": pool_selector(args, pairs.dataset, collate, model, tokenizer, **scoring),
        }  # fmt: skip

    def _pairs(self, setting: str, rows: Any) -> TrainingPairs | StreamSource | None:
        """What is given for ``data`` or ``eval_data``, read and, but for a stream, encoded."""
        args = self._args_of_pairs
        argument, sources = ARGUMENTS[setting], getattr(args, setting)
        if rows is not None and sources:
            raise InputError(f"{argument}: {setting} names pairs, too ({', '.join(sources)}). Give one of them.")
        if names := names_in(rows):
            rows, sources = None, names
            setattr(args, setting, names)
        if rows is None:
            if not sources:
                return None
            if args.streaming and setting == "data":
                return open_stream(args.data, args.columns, seed=args.seed, shuffle_buffer=args.shuffle_buffer)
        else:
            name = in_memory(setting)
            setattr(args, setting, (name,))
            sources = (rows,)
            if is_encoded(rows):
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

        With ``resume_from_checkpoint=True`` from the last complete checkpoint, if there is one, or from the one in the
        folder that it names. Else it is a new run, for which there must be none, unless ``args.overwrite`` discards
        it. Further arguments are those of `transformers.Trainer.train`.

        Raises:
            InputError: the output folder holds another run, another process trains into it, or what decides the
                result has changed.
            NonFiniteLossError: a loss or gradient is NaN or infinite.
            Interrupted: after SIGTERM, when a checkpoint has been saved.
            OSError: a checkpoint cannot be written; earlier ones are as they were.
        """
        output = check_output_directory(str(self.args.output_dir))
        with only_run_in(output) if self.is_world_process_zero() else nullcontext():
            return self._train_in(output, resume_from_checkpoint, *args, **kwargs)

    def _train_in(self, output: Path, resume: Any, *args: Any, **kwargs: Any) -> Any:
        checkpoint = self._prepare_output(output, resume)
        adapters = None if self.peft_config is None else self.peft_config.to_dict()
        config: Any = self.accelerator.unwrap_model(self.model).config
        check_resume(
            output, self.args, *self._fingerprints(), checkpoint, json.loads(json.dumps(adapters, default=sorted)),
            kl_reduction_version=getattr(config, "kl_reduction_version", None),
        )  # fmt: skip
        self.resumed_from, self.evaluation = checkpoint, None
        self._kl_warmup.begin(checkpoint)
        if checkpoint is not None and self.stream is not None:
            self.stream.load(checkpoint)
        self.find_tokens_per_batch()
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
        named = None if not resume or isinstance(resume, bool) else Path(resume)
        if named is not None and not is_complete(named):
            raise InputError(f"resume_from_checkpoint: {named} is no complete checkpoint of this trainer.")
        is_own = named is not None and named.resolve().parent == (output / "checkpoints").resolve()
        if is_own and self.args.overwrite:
            raise InputError(f"overwrite: it discards {named}, from which the run is to go on. Leave one of them out.")
        if self.is_world_process_zero():
            if self.args.overwrite:
                discard_run(output)
            else:
                discard_incomplete(output)
        self.accelerator.wait_for_everyone()
        last = last_complete(output / "checkpoints")
        if last is not None and (not resume or (named is not None and not is_own)):
            raise InputError(
                f"output_dir: {output} holds checkpoints of a run. Pass resume_from_checkpoint=True to go on with it, "
                "overwrite=True in args to discard it, or name another folder."
            )
        return last if named is None else named

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Batches of the evaluation's pairs, or of others in any layout, which are encoded first."""
        return super().get_eval_dataloader(self._encoded(eval_dataset))

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Likewise for `predict`."""
        return super().get_test_dataloader(self._encoded(test_dataset))

    def _encoded(self, rows: Any) -> Any:
        if rows is None or is_encoded(rows):
            return rows
        sources = names_in(rows) or (choose_splits(None, rows)[1],)
        return load_training_pairs(self.args, sources, None, self._tokenizer, "eval_data", self.max_length).dataset

    def result(self) -> dict[str, Any]:
        """What is known of the run, as ``train_result.json`` holds it; every process must call it."""
        fingerprints, eval_fingerprints = self._fingerprints()
        counts = getattr(self.train_pairs, "counts", None) if self.stream is None else self.stream.total_counts()
        return {
            "settings": settings_of(self.args),
            "versions": versions(),
            "data_fingerprints": fingerprints | eval_fingerprints,
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
            "budget": None
            if "scored" in (counts or {}).get("layouts", ())
            else budget_of_run(settings_of(self.args), self._kl_share, self.evaluation),
            "quantization": self.quantization,
            "log_history": self.state.log_history,
        }

    def _fingerprints(self) -> tuple[dict[str, str], dict[str, str]]:
        train, evaluation = self.train_pairs, self.eval_pairs
        return {} if train is None else train.fingerprints, {} if evaluation is None else evaluation.fingerprints

    def final_evaluation(self) -> dict[str, Any] | None:
        """What the model as it is now gives on the evaluation pairs; every process must call it.

        Returns:
            The metrics, ``num_pairs`` and ``accuracy_interval`` among them; ``None`` without such pairs.
        """
        if self.eval_pairs is None:
            return None
        metrics = self.evaluate()
        found = {key.removeprefix("eval_"): value for key, value in metrics.items() if key.startswith("eval_")}
        if "accuracy" not in found:  # scored responses alone
            return found
        n = int(found["num_pairs"])
        if "num_prompts" in found:  # pairs of one prompt are not independent: as if each prompt were one observation
            interval = wilson_interval(found["accuracy"] * found["num_prompts"], int(found["num_prompts"]))
        else:
            # The product is a whole number of half points; rounding undoes the division's floating-point error.
            interval = wilson_interval(round(found["accuracy"] * n * 2) / 2, n)
        return {**found, "num_pairs": n, "accuracy_interval": list(interval)}

    def write_card(self, folder: Path, result: dict[str, Any]) -> None:
        """Write the model card of what has been trained and its ``.eval_results``; ``result`` as `result` gives it."""
        model = self.accelerator.unwrap_model(self.model)
        settings = card_settings(self.args, hasattr(model, "peft_config"))
        atomic_write_text(folder / "README.md", model_card(model.config, settings, result))
        write_entries(folder, entries_of_run(result))

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Nothing yet: `push_to_hub` makes the repository, private, when there is something to upload."""

    def push_to_hub(
        self,
        commit_message: str | None = None,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Upload model, tokenizer, code, card and ``.eval_results`` in one commit to ``args.hub_model_id``.

        They are looked through first, and a new repository is private (`inform_rm.hub.export.push_folder`). The
        evaluation pairs, if there are any, are evaluated where that has not been done since training. Every process
        must call it. Without a ``token`` it is ``args.hub_token``, or the one that is logged in; what else
        `transformers.Trainer.push_to_hub` takes is refused if it is given.

        Raises:
            InputError: before anything is uploaded: no id, an argument that would do nothing, or what must not be
                uploaded.
            ConnectionError: the Hub refuses or cannot be reached.
        """
        if self.args.hub_model_id is None:
            raise InputError("hub_model_id: none given; push_to_hub needs one, name/model.")
        given = {"blocking": None if blocking else blocking, "revision": revision, "private": private, **kwargs}
        unknown = [name for name, value in given.items() if value is not None]
        if unknown:
            raise InputError(
                f"{unknown[0]}: push_to_hub makes one commit to the main branch and waits for it; what else a card "
                "should say, inform-rm export --license and --results put there. Leave it out."
            )
        if self.evaluation is None:
            self.evaluation = self.final_evaluation()
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            self.save_whole_model(str(folder))
            result = self.result()
            if self.is_world_process_zero():
                self.write_card(folder, result)
                push_folder(folder, self.args.hub_model_id, token or self.args.hub_token, commit_message)


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
