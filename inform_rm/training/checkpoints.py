"""Checkpoints of a run: reading and discarding them, and what a run must have in common with its continuation."""

import contextlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from transformers import TrainerState

from inform_rm.data.sources import parse_source, sampled_digest, source_digest
from inform_rm.errors import InputError
from inform_rm.training.arguments import SETTINGS_BY_CONTENT
from inform_rm.training.reward_arguments import (
    RewardTrainingArguments,
    deciding_settings,
    settings_of,
    usual_settings,
)
from inform_rm.util.checkpoints import checkpoint_step, complete_checkpoints, is_complete
from inform_rm.util.files import atomic_write_text, file_digest, versions, write_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

RESULT_FILE = "train_result.json"
CONFIG_FILE = "training_config.yaml"
STAGING = ".final"  # where the finished model is written before its files are moved into the run's folder
_WAIT_SECONDS = 15.0  # so long a run that was killed may take to end, its data loaders among it


@contextlib.contextmanager
def reading_checkpoint(checkpoint: str | Path | None, files: str) -> Iterator[None]:
    """Name the files of a checkpoint that cannot be read; torch reads them without running what they hold.

    Raises:
        InputError: in place of what the code in the ``with`` block raises, but for a lack of memory.
    """
    try:
        yield
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # UnpicklingError where code would run; of other damage torch makes many types
        raise InputError(
            f"output: {files} of the checkpoint {checkpoint} cannot be read safely ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}). Do not trust it: remove the checkpoint, or pass --overwrite true "
            "to start again."
        ) from error


@contextlib.contextmanager
def only_run_in(output: Path) -> Iterator[None]:
    """Inside the block no other process of this machine can train into the folder; the kernel forgets it with us.

    Where the system or the file system has no such locks, nothing is checked.

    Raises:
        InputError: another process trains into it.
    """
    if fcntl is None:
        yield
        return
    handle, last = os.open(output, os.O_RDONLY), time.monotonic() + _WAIT_SECONDS
    try:
        while not _locked(handle):
            if time.monotonic() >= last:
                raise InputError(
                    f"output_dir: another process trains into {output} now. Wait for its end, or name another folder."
                )
            time.sleep(0.5)
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # for what was forked inside the block, too
        os.close(handle)


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.debug("no lock: %s", error)
    return True


def discard(folder: Path) -> None:
    """Remove a folder, under another name first: a kill in between leaves nothing that looks like a checkpoint."""
    if folder.exists():
        trash = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".discarded."))
        os.replace(folder, trash / folder.name)
        shutil.rmtree(trash)


def discard_beyond(checkpoints: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest complete checkpoints until `limit` are left; the newest and the best one stay."""
    if limit is None:
        return
    found = complete_checkpoints(checkpoints)
    removable = [path for path in found[:-1] if best is None or path.name != Path(best).name]
    for path in removable[: max(0, len(found) - limit)]:
        discard(path)


def discard_incomplete(output: Path) -> None:
    """Remove what a kill left half-written in a run's folder."""
    for path in (output / "checkpoints").glob("checkpoint-*"):
        if path.is_dir() and not is_complete(path):
            logger.warning("%s is incomplete (the run was cut off while it was written); removing it.", path)
            discard(path)
    discard(output / STAGING)
    for path in [*output.glob(".discarded.*"), *output.glob("checkpoints/.discarded.*")]:
        shutil.rmtree(path, ignore_errors=True)


def discard_run(output: Path) -> None:
    """Remove what an earlier run left, and nothing else that the folder may hold."""
    for name in ("checkpoints", STAGING):
        discard(output / name)
    for name in (RESULT_FILE, CONFIG_FILE):
        (output / name).unlink(missing_ok=True)


def check_resume(
    output: Path,
    args: RewardTrainingArguments,
    fingerprints: dict[str, str],
    eval_fingerprints: dict[str, str],
    resume_from: Path | None,
    adapters: dict[str, Any] | None = None,
    *,
    kl_reduction_version: int | None = None,
) -> None:
    """Refuse to continue a run under what would change its result; write down what a new run has.

    Settings that decide nothing (`inform_rm.training.arguments.decides`) may change, and so may the spelling of a
    path. Other versions of the libraries are named in a warning: whether they change the result cannot be known here.
    The fingerprints are per source; ``adapters`` is what a ``peft_config`` that the caller passed holds,
    ``kl_reduction_version`` what the model's config says.
    """
    if resume_from is not None:
        with reading_checkpoint(resume_from, "trainer_state.json"):
            found = TrainerState.load_from_json(str(resume_from / "trainer_state.json")).global_step
            if found != checkpoint_step(resume_from):
                raise ValueError(f"it is of step {found!r}")
    settings, launch = settings_of(args), _launch()
    now = {
        **settings, "data_fingerprints": fingerprints | eval_fingerprints,
        "contents": _contents(args, fingerprints, eval_fingerprints) | {"peft_config": adapters}, **launch,
        "kl_reduction_version": kl_reduction_version,
    }  # fmt: skip
    if resume_from is not None:
        before = _recorded_settings(resume_from.parent / "run.json")
        if any(name in before and before[name] != now[name] for name in launch):
            raise InputError(
                f"{resume_from} is of a run of {before['num_processes']} processes "
                f"({before['distribution']}), this one has {now['num_processes']} ({now['distribution']}). Its "
                "checkpoints hold the random state of each process and an optimizer that is stored for this launch: "
                "launch it as before to continue it, name another folder, or pass --overwrite true. To go on from "
                "what it has learnt with a new optimizer, train with model: one of its checkpoints (one of "
                "SHARDED_STATE_DICT needs `accelerate merge-weights` first)."
            )
        if before.get("save_only_model"):
            raise InputError(
                f"{resume_from} was written with save_only_model: it holds no optimizer and no random state, so that "
                "the run cannot go on as it would have. Train with model: this checkpoint, in another folder."
            )
        if changed := _changed(args, before, now):
            raise InputError(
                f"{resume_from} is of a run with other settings or data ({'; '.join(changed)}). "
                "Restore them to continue it, name another folder, or pass --overwrite true."
            )
        software = versions()
        for name, was in before.get("versions", {}).items():
            if software.get(name) != was:
                logger.warning("%s was %s before the interruption and is %s now.", name, was, software.get(name))
        free = [f"; {name} was {before.get(name)!r}" for name in settings if before.get(name) != settings[name]]
        logger.warning("Continuing from %s%s.", resume_from, "".join(free))
    PartialState().wait_for_everyone()
    if PartialState().is_main_process:
        write_json(output / "checkpoints" / "run.json", {**now, "versions": versions()})
        atomic_write_text(output / CONFIG_FILE, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))


def _changed(args: RewardTrainingArguments, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What decides the result and is not as it was, in words."""
    changed = []
    contents, contents_before = now["contents"], before.get("contents") or {}
    usual = usual_settings()
    for name in deciding_settings(args):
        was, value = before.get(name, usual[name]), now.get(name, usual[name])
        if name in contents:
            if contents_before.get(name) != contents[name]:
                renamed = "" if was == value else f": {was!r} -> {value!r}"
                changed.append(f"the content of {name}{renamed}")
        elif was != value:
            changed.append(f"{name}: {was!r} -> {value!r}")
    if contents_before.get("peft_config") != contents["peft_config"]:
        changed.append("peft_config")
    if before.get("kl_reduction_version") != now["kl_reduction_version"]:
        changed.append("the model's kl_reduction_version")
    return changed


def _contents(
    args: RewardTrainingArguments, fingerprints: dict[str, str], eval_fingerprints: dict[str, str]
) -> dict[str, Any]:
    """What the settings that name files stand for, however they spell it; of what is on the Hub, its name."""

    def content(source: str, fingerprint: str) -> str:
        # Pairs without an id are named after their file, so that their fingerprint changes with its name.
        return source_digest(source) if Path(parse_source(source).name).exists() else fingerprint

    contents: dict[str, Any] = {
        "data": [
            fingerprints.get(source) if args.streaming else content(source, fingerprints[source])
            for source in args.data
        ],
        "eval_data": [content(source, eval_fingerprints[source]) for source in args.eval_data],
    }
    for name in SETTINGS_BY_CONTENT:
        value = getattr(args, name)
        if name not in contents:
            is_file = value is not None and Path(value).is_file()
            contents[name] = value and (file_digest(value) if is_file else _digest_of_model(value) or value)
    return contents


def _recorded_settings(path: Path) -> dict[str, Any]:
    """What a run recorded."""
    if not path.exists():
        raise InputError(
            f"resume_from_checkpoint: {path}, which says what the checkpoint belongs to, is not there. "
            "Copy it along; or go on from what was learnt with a new optimizer: model: the checkpoint."
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
    except (ValueError, RecursionError) as error:
        raise InputError(f"output: {path} is damaged ({error}). Pass --overwrite true to start again.") from None
    return found


def _launch() -> dict[str, Any]:
    """How many processes train, and what is divided among them."""
    distribution = "none" if PartialState().num_processes == 1 else "DDP"
    if is_fsdp_launch():
        distribution = f"FSDP, {os.environ.get('FSDP_STATE_DICT_TYPE', 'FULL_STATE_DICT')}"
    elif parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        distribution = "DeepSpeed"
    return {"num_processes": PartialState().num_processes, "distribution": distribution}


def is_fsdp_launch() -> bool:
    """Whether Accelerate was told to shard the model; on CPUs it then runs DDP without a word."""
    return bool(parse_flag_from_env("ACCELERATE_USE_FSDP"))


def _digest_of_model(model: str) -> str | None:
    """Of the files of a local model; ``None`` for one on the Hub.

    With LoRA the checkpoints do not hold the backbone, so that another one under the same path would go unnoticed.
    """
    folder = Path(model)
    if not folder.is_dir():
        return None
    files = (path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix in (".json", ".safetensors"))
    return sampled_digest((path.name, path) for path in files)
