"""`train`: one run from settings to a Hub-ready folder, a finished model and its result."""

import logging
import os
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from inform_rm.errors import InputError
from inform_rm.hub.eval_results import ENTRIES_FOLDER
from inform_rm.scoring.adapters import ADAPTER_FILES, load_adapter_model
from inform_rm.scoring.packing import use_packed_attention
from inform_rm.scoring.scorer import RewardScorer
from inform_rm.training.checkpoints import RESULT_FILE, STAGING, discard
from inform_rm.training.collators import responses_of
from inform_rm.training.models import is_quantized
from inform_rm.training.reward_arguments import RewardTrainingArguments, missing_settings
from inform_rm.training.trainer import RewardTrainer
from inform_rm.util.files import check_output_directory, write_json

logger = logging.getLogger(__name__)


def train(args: RewardTrainingArguments) -> dict[str, Any]:
    """Train a reward model and leave a Hub-ready folder at ``args.output_dir``.

    A run that was cut off goes on from its last complete checkpoint when it is started again with the same settings
    and data; the loss curve is that of an uninterrupted run.

    Args:
        args: all settings; ``model``, ``data`` and ``output_dir`` must be among them.

    Returns:
        The content of ``train_result.json``: settings, versions, data counts and fingerprints, final metrics, log.

    Raises:
        InputError: on bad data, a model that is no backbone, or an output folder that holds another run.
        NonFiniteLossError: if a loss or gradient is NaN or infinite; the rows are written down.
        Interrupted: after SIGTERM, when a checkpoint has been saved.
        OSError: if a checkpoint cannot be written; earlier ones are as they were.
    """
    if missing := missing_settings({name for name in ("model", "data", "output_dir") if getattr(args, name)}):
        raise InputError("Training settings: " + "; ".join(missing) + ".")
    if str(args.resume_from_checkpoint or "true").lower() != "true":
        raise InputError(
            f"resume_from_checkpoint: {args.resume_from_checkpoint!r}; a run goes on by itself in its own output_dir. "
            "Name that folder as output_dir; or as model the checkpoint, to go on from what it has learnt."
        )
    output = check_output_directory(str(args.output_dir))
    if not args.overwrite and (output / RESULT_FILE).exists():
        raise InputError(f"output_dir: {output} holds a finished run. Name another folder, or pass --overwrite true.")
    trainer = RewardTrainer(args=args)
    trainer.train(resume_from_checkpoint=True)
    if is_quantized(args):
        trainer.quantization = _leave_quantized_base(trainer, output)
    trainer.evaluation = trainer.final_evaluation()
    result = trainer.result()
    _save_final(trainer, output, result)
    if args.push_to_hub:
        trainer.push_to_hub()
    return result


def _leave_quantized_base(trainer: RewardTrainer, output: Path) -> dict[str, Any]:
    """Go on with base + adapters in full precision, as the finished folder gives them; say what that changes.

    Merging into the quantised weights would round the adapters away. So the base is loaded anew, unquantised, and
    what follows, the evaluation too, is about the model that people get. Both models are in memory for a moment.
    """
    args, batching = trainer.args, trainer.batching
    dataset: Any = trainer.train_dataset if trainer.stream is None else trainer.stream.pairs()
    sequences = [ids for row in islice(dataset, 16) for ids in responses_of(row)]
    # The model was trained on them, so it takes their length, whatever its own limit.
    scoring: dict[str, Any] = {"max_length": max(map(len, sequences)), "batching": batching}

    def rewards(model: Any) -> torch.Tensor:
        return RewardScorer(model, trainer.processing_class, **scoring).score_encoded(sequences)

    before = rewards(trainer.accelerator.unwrap_model(trainer.model))
    staging = output / STAGING
    trainer.save_model(str(staging), _internal_call=True)
    trainer.accelerator.wait_for_everyone()
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    model: Any = load_adapter_model(staging, dtype=dtype, device=args.device, trust_remote_code=args.trust_remote_code)
    after = rewards(model)
    if batching == "packed":
        use_packed_attention(model)
    trainer.model = trainer.model_wrapped = model
    trainer.accelerator.wait_for_everyone()
    if args.merge_adapters and args.should_save:
        discard(staging)
    difference = (after - before).abs()
    figures = {
        "bits": 4 if args.load_in_4bit else 8,
        "num_responses": len(before),
        "reward_difference_mean": difference.mean().item(),
        "reward_difference_max": difference.max().item(),
        "reward_std": after.std().item(),
    }
    logger.warning(
        "Trained on a %d-bit base, the model goes out in full precision: over %d training responses its rewards "
        "differ from those seen in training by %.3g on average and %.3g at most (their standard deviation is %.3g).",
        *figures.values(),
    )
    return figures


def _save_final(trainer: RewardTrainer, output: Path, result: dict[str, Any]) -> None:
    """Put the finished model into the run's folder, ``config.json`` and the result last, so that a kill shows."""
    staging, args = output / STAGING, trainer.args
    if args.lora_r and args.merge_adapters and not is_quantized(args):
        model: Any = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
        trainer.model = model
    if args.merge_adapters or not is_quantized(args):  # else `_leave_quantized_base` has put the adapters there
        trainer.save_whole_model(str(staging))
    if not args.should_save:
        return
    # What an earlier run left: beside adapters, whole weights would be taken for theirs, and the other way round.
    stale = ("model*.safetensors*",) if not args.merge_adapters else ADAPTER_FILES
    for path in [path for pattern in stale for path in output.glob(pattern)]:
        path.unlink()
    shutil.rmtree(output / ENTRIES_FOLDER, ignore_errors=True)
    trainer.write_card(staging, result)
    for path in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, output / path.name)
    staging.rmdir()
    write_json(output / RESULT_FILE, result)
