"""`train`: one run from settings to a Hub-ready folder."""

import dataclasses
import logging
import os
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase, SchedulerType, TrainingArguments, set_seed
from transformers.training_args import OptimizerNames

from inform_rm.data.tokenizer import check_vocabulary, load_tokenizer, with_plain_template
from inform_rm.decomposition.likelihoods import load_likelihood
from inform_rm.errors import InputError, Interrupted
from inform_rm.hub.cards import model_card
from inform_rm.safety.checkpoints import check_checkpoint
from inform_rm.scoring.adapters import ADAPTER_FILES, holds_adapters, load_adapter_model
from inform_rm.scoring.packing import CPU_TOKENS_PER_BATCH, use_packed_attention, why_not_packed
from inform_rm.scoring.scorer import RewardScorer
from inform_rm.training.checkpoints import STAGING, check_resume, discard, discard_incomplete, discard_run
from inform_rm.training.config import TrainingConfig
from inform_rm.training.data import load_training_pairs
from inform_rm.training.half_precision import COMPENSATED_BETA2, COMPENSATED_OPTIM, LostUpdates, check_optimizer
from inform_rm.training.interruption import StopOnSignal
from inform_rm.training.models import (
    add_adapters,
    check_max_length,
    is_quantized,
    load_model,
    reward_difference,
    sample_rewards,
    with_max_length,
)
from inform_rm.training.prioritized import PoolCollator, PrioritizedRewardTrainer, Selection
from inform_rm.training.streaming import EncodedStream, open_stream
from inform_rm.training.trainer import PackedPairCollator, PairCollator, RewardTrainer
from inform_rm.util.checkpoints import checkpoint_step, last_complete
from inform_rm.util.files import atomic_write_text, check_output_directory, versions, write_json
from inform_rm.util.intervals import wilson_interval

logger = logging.getLogger(__name__)

RESULT_FILE = "train_result.json"


def train(config: TrainingConfig) -> dict[str, Any]:
    """Train a reward model and leave a Hub-ready folder at ``config.output``.

    A run that was cut off goes on from its last complete checkpoint when it is started again with the same settings
    and data; the loss curve is that of an uninterrupted run.

    Args:
        config: all settings.

    Returns:
        The content of ``train_result.json``: settings, versions, data counts and fingerprints, final metrics, log.

    Raises:
        InputError: on bad data, a model that is no backbone, or an output folder that holds another run.
        NonFiniteLossError: if a loss or gradient is NaN or infinite; the rows are written down.
        Interrupted: after SIGTERM, when a checkpoint has been saved.
        OSError: if a checkpoint cannot be written; earlier ones are as they were.
    """
    state = PartialState(cpu=config.use_cpu)
    output = check_output_directory(config.output)
    checkpoints = output / "checkpoints"
    if config.overwrite and state.is_main_process:
        discard_run(output, RESULT_FILE)
    elif state.is_main_process:
        discard_incomplete(output)
    state.wait_for_everyone()
    resume_from = last_complete(checkpoints)
    if not config.overwrite and (output / RESULT_FILE).exists():
        raise InputError(f"output: {output} holds a finished run. Name another folder, or pass --overwrite true.")

    set_seed(config.seed)
    _check_model(config)
    tokenizer = load_tokenizer(
        config.model,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        chat_template=config.chat_template,
    )
    tokenizer = with_plain_template(tokenizer, config.model)
    limited = with_max_length(config)
    train_pairs: Any
    if config.streaming:
        train_pairs = open_stream(config.data, config.columns, seed=config.seed, shuffle_buffer=config.shuffle_buffer)
    else:
        train_pairs = load_training_pairs(limited, config.data, config.max_pairs_per_source, tokenizer, "data")
    eval_pairs, eval_fingerprints = None, {}
    if config.eval_data:
        eval_pairs = load_training_pairs(
            limited, config.eval_data, config.max_eval_pairs_per_source, tokenizer, "eval_data"
        )
        eval_fingerprints = eval_pairs.fingerprints
    check_resume(output, config, train_pairs.fingerprints, eval_fingerprints, resume_from)

    model = load_model(config)
    check_max_length(model, limited.max_length)
    check_vocabulary(tokenizer, model.config.get_text_config().vocab_size)
    model.config.pad_token_id = tokenizer.pad_token_id
    arguments = _training_arguments(config, checkpoints)
    batching = _choose_batching(model, config, arguments)
    trainable = add_adapters(model, config) if config.lora_r else model
    tokens_per_batch = _tokens_per_batch(config, arguments)
    options: dict[str, Any] = {
        "model": trainable,
        "args": arguments,
        "data_collator": PackedPairCollator(tokens_per_batch) if batching == "packed" else PairCollator(tokenizer),
        "train_dataset": train_pairs.dataset,
        "eval_dataset": None if eval_pairs is None else eval_pairs.dataset,
        "processing_class": tokenizer,
        "callbacks": [LostUpdates()],
        **{name: getattr(config, name) for name in
           ("beta", "kl_warmup_steps", "label_smoothing", "center_rewards_coefficient")},
    }  # fmt: skip
    if config.streaming:
        stream = EncodedStream(
            train_pairs, tokenizer, arguments, max_length=limited.max_length, overlong=config.overlong,
            on_bad_row=config.on_bad_row,
        )  # fmt: skip
        trainer = RewardTrainer(**options, stream=stream)
    elif config.objective == "prioritized":
        scorer = RewardScorer(
            trainable, tokenizer, max_length=limited.max_length, batching=batching, split_over_processes=True
        )
        trainer = _prioritized_trainer(config, scorer, options)
    else:
        trainer = RewardTrainer(**options)
    with StopOnSignal(trainer) as stop:
        outcome = trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    if stop.received is not None:
        raise Interrupted(stop.received, f"saved {checkpoints}/checkpoint-{trainer.state.global_step}")
    quantization = None
    if is_quantized(config):
        quantization = _leave_quantized_base(trainer, config, tokenizer, output, batching)
    evaluation = _final_evaluation(trainer) if eval_pairs is not None else None
    counts = trainer.stream.total_counts() if trainer.stream is not None else train_pairs.counts
    result = {
        "settings": dataclasses.asdict(config),
        "versions": versions(),
        "data_fingerprints": train_pairs.fingerprints | eval_fingerprints,
        "train_pairs": counts,
        "eval_pairs": None if eval_pairs is None else eval_pairs.counts,
        "max_length": limited.max_length,
        "batching": batching,
        "num_processes": trainer.accelerator.num_processes,
        "distributed_type": str(trainer.accelerator.distributed_type.value),
        "steps": trainer.state.global_step,
        "resumed_from_step": None if resume_from is None else checkpoint_step(resume_from),
        "train_runtime_seconds": outcome.metrics["train_runtime"],
        "evaluation": evaluation,
        "quantization": quantization,
        "log_history": trainer.state.log_history,
    }
    _save_final(trainer, tokenizer, output, config, result)
    return result


def _check_model(config: TrainingConfig) -> None:
    if holds_adapters(config.model, config.revision):
        return  # `load_model` says what to do with them
    try:
        check_checkpoint(config.model, revision=config.revision, trust_remote_code=config.trust_remote_code)
    except OSError as error:  # no such repository, or no way to it
        raise InputError(f"model: {config.model} cannot be loaded as a backbone: {str(error)[:400]}") from error


def _choose_batching(model: Any, config: TrainingConfig, arguments: TrainingArguments) -> str:
    """Packed rows where they are asked for and give the model's own rewards; a log line says why not."""
    if config.batching == "padded":
        return "padded"
    if config.attn_implementation is not None:
        reason: str | None = f"attn_implementation is {config.attn_implementation}"
    elif arguments.n_gpu > 1:
        reason = "one process drives several GPUs; start it with accelerate launch"
    else:
        reason = why_not_packed(model)
    if reason is not None:
        logger.warning("Training on padded batches: %s.", reason)
        return "padded"
    use_packed_attention(model)
    return "packed"


def _prioritized_trainer(config: TrainingConfig, scorer: RewardScorer, options: dict[str, Any]) -> RewardTrainer:
    dataset = options["train_dataset"]
    likelihood = None
    if config.behavior_model is not None:
        likelihood = load_likelihood(
            config.behavior_model,
            length_normalized=config.length_normalized,
            chat_template=config.chat_template,
            device=options["args"].device,
            trust_remote_code=config.trust_remote_code,
            split_over_processes=True,
        )
    return PrioritizedRewardTrainer(
        **{
            **options,
            "train_dataset": dataset.add_column("position", np.arange(len(dataset))),
            "data_collator": PoolCollator(options["data_collator"]),
        },
        scorer=scorer,
        likelihood=likelihood,
        selection=Selection(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Selection)}),
    )


def _tokens_per_batch(config: TrainingConfig, arguments: TrainingArguments) -> int | None:
    if arguments.world_size > 1:
        # Under FSDP every process must make equally many forward passes.
        if config.tokens_per_batch is not None:
            raise InputError(
                f"tokens_per_batch: {config.tokens_per_batch} with {arguments.world_size} processes; it works in one "
                "process. Leave it out and lower per_device_train_batch_size."
            )
        return None
    on_cpu = arguments.device.type == "cpu"
    return config.tokens_per_batch or (CPU_TOKENS_PER_BATCH if on_cpu else None)


def _training_arguments(config: TrainingConfig, checkpoints: Path) -> TrainingArguments:
    passed_on = (
        "learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size",
        "gradient_accumulation_steps", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim",
        "seed", "bf16", "use_cpu", "dataloader_num_workers", "logging_steps", "save_steps", "save_total_limit",
        "load_best_model_at_end", "report_to",
    )  # fmt: skip
    evaluates = bool(config.eval_data)
    pool_factor = config.pool_factor if config.objective == "prioritized" else 1
    for name, known in (("lr_scheduler_type", SchedulerType), ("optim", OptimizerNames)):
        choices = [choice.value for choice in known]
        if getattr(config, name) not in choices:
            raise InputError(f"{name}: {getattr(config, name)!r} is unknown. Choose one of {', '.join(choices)}.")
    check_optimizer(config.optim)
    return TrainingArguments(
        output_dir=str(checkpoints),
        **{
            **{name: getattr(config, name) for name in passed_on},
            "per_device_train_batch_size": config.per_device_train_batch_size * pool_factor,
        },
        adam_beta2=COMPENSATED_BETA2 if config.optim == COMPENSATED_OPTIM else 0.999,
        data_seed=config.seed,
        activation_checkpointing=config.gradient_checkpointing,
        train_sampling_strategy="group_by_length" if config.group_by_length else "random",
        length_column_name="length",
        eval_strategy="steps" if evaluates else "no",
        eval_steps=config.eval_steps if evaluates else None,
        metric_for_best_model="eval_accuracy" if config.load_best_model_at_end else None,
        greater_is_better=True if config.load_best_model_at_end else None,
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available() and not config.use_cpu,
        logging_nan_inf_filter=False,
    )


def _leave_quantized_base(
    trainer: RewardTrainer, config: TrainingConfig, tokenizer: PreTrainedTokenizerBase, output: Path, batching: str
) -> dict[str, Any]:
    """Go on with base + adapters in full precision, as the finished folder gives them; say what that changes.

    Merging into the quantised weights would round the adapters away. So the base is loaded anew, unquantised, and
    what follows, the evaluation too, is about the model that people get. Both models are in memory for a moment.
    """
    dataset: Any = trainer.train_dataset
    pairs = list(islice(dataset, 16))
    before = sample_rewards(trainer.accelerator.unwrap_model(trainer.model), pairs, tokenizer, batching)
    staging = output / STAGING
    trainer.save_model(str(staging))
    trainer.accelerator.wait_for_everyone()
    dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    model: Any = load_adapter_model(
        staging, dtype=dtype, device=trainer.args.device, trust_remote_code=config.trust_remote_code
    )
    after = sample_rewards(model, pairs, tokenizer, batching)
    if batching == "packed":
        use_packed_attention(model)
    trainer.model = trainer.model_wrapped = model
    trainer.accelerator.wait_for_everyone()
    if config.merge_adapters and trainer.args.should_save:
        discard(staging)
    return reward_difference(4 if config.load_in_4bit else 8, before, after)


def _final_evaluation(trainer: RewardTrainer) -> dict[str, Any]:
    metrics = trainer.evaluate()
    evaluation = {key.removeprefix("eval_"): value for key, value in metrics.items() if key.startswith("eval_")}
    n = int(evaluation["num_pairs"])
    # The product is a whole number of half points; rounding undoes the division's floating-point error.
    correct = round(evaluation["accuracy"] * n * 2) / 2
    return {**evaluation, "num_pairs": n, "accuracy_interval": list(wilson_interval(correct, n))}


def _save_final(
    trainer: RewardTrainer,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    config: TrainingConfig,
    result: dict[str, Any],
) -> None:
    """Put the finished model into the run's folder, ``config.json`` and the result last, so that a kill shows."""
    staging = output / STAGING
    model: Any = trainer.model
    if config.lora_r and config.merge_adapters and not is_quantized(config):
        model = trainer.accelerator.unwrap_model(model).merge_and_unload()
        trainer.model = model
    if config.merge_adapters or not is_quantized(config):  # else `_leave_quantized_base` has put the adapters there
        trainer.save_whole_model(str(staging))
    if not trainer.args.should_save:
        return
    listed = {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if name not in ("eval_data", "overwrite") and value is not None
    }
    # What an earlier run left: beside adapters, whole weights would be taken for theirs, and the other way round.
    stale = ("model*.safetensors*",) if not config.merge_adapters else ADAPTER_FILES
    for path in [path for pattern in stale for path in output.glob(pattern)]:
        path.unlink()
    atomic_write_text(staging / "README.md", model_card(model.config, listed, result))
    for path in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, output / path.name)
    staging.rmdir()
    write_json(output / RESULT_FILE, result)
