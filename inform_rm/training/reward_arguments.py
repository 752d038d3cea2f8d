"""`RewardTrainingArguments`: transformers' TrainingArguments and ours; read from YAML, from flags or from both."""

import contextlib
import copy
import dataclasses
import enum
import math
import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import get_int_from_env
from transformers import SchedulerType, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.training_args import OptimizerNames

from inform_rm.errors import InputError, did_you_mean, shown
from inform_rm.safety.settings_yaml import read_settings_yaml
from inform_rm.training.arguments import OUR_SETTINGS, RewardArguments, decides, read_columns, read_weights
from inform_rm.training.half_precision import COMPENSATED_BETA2, COMPENSATED_OPTIM, check_optimizer
from inform_rm.training.losses import PAIR_LOSSES

_LARGEST_NUMBER = 2**63 - 1  # what torch and numpy can hold
_MOST_DIGITS = 100
_MOST_FAULTS = 20  # as many are listed
_REQUIRED = {
    "model": "backbone (or InfoRM model to continue from): Hub id or folder",
    "data": "training pairs: files, folders or Hub ids",
    "output_dir": "folder for the trained, Hub-ready model; checkpoints go to its subfolder 'checkpoints'",
}
# What TRL calls it, and what earlier versions did, transformers' too, whose warmup_steps takes a share of the steps.
_OTHER_NAMES = {
    "model_name_or_path": "model", "model_revision": "revision", "torch_dtype": "dtype", "dataset_name": "data",
    "dataset_streaming": "streaming", "output": "output_dir", "warmup_ratio": "warmup_steps",
}  # fmt: skip

# What TrainingArguments finds out itself, and a secret.
_OF_THIS_PLACE = ("disable_tqdm", "dataloader_pin_memory", "do_eval", "local_rank", "_n_gpu", "hub_token")
_ALWAYS_ON_CARD = (
    "model", "data", "architecture", "objective", "loss_type", "learning_rate", "lr_scheduler_type", "warmup_steps",
    "num_train_epochs", "pairs_per_step", "seed",
)  # fmt: skip
_ON_CARD_OF_INFORM = ("latent_dim", "decoder", "beta", "kl_reduction", "kl_warmup_steps", "kl_warmup_nats")
_NEVER_ON_CARD = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "eval_data", "overwrite", "push_to_hub",
    "hub_model_id", "logging_steps", "save_steps", "use_cpu",
)  # fmt: skip


@dataclass(repr=False)
class RewardTrainingArguments(RewardArguments, TrainingArguments):  # type: ignore[misc]  # None is resolved
    """Everything that decides a training run: `RewardArguments`, and all of `transformers.TrainingArguments`.

    ``output_dir`` gets the trained, Hub-ready model; checkpoints go to its subfolder ``checkpoints``.

    Args:
        output_dir: see above.
        args: every other field, by keyword; ``inform-rm train --help`` says what ours mean.

    Raises:
        InputError: impossible settings, all of them in one message.
    """

    def __post_init__(self) -> None:
        """Refuse what is impossible, then what TrainingArguments refuses."""
        self.data, self.eval_data = _as_tuple(self.data), _as_tuple(self.eval_data)
        faults = self.faults()
        for name, choices in (
            ("lr_scheduler_type", [choice.value for choice in SchedulerType]),
            ("optim", [choice.value for choice in OptimizerNames]),
            ("loss_type", list(PAIR_LOSSES)),
        ):
            value = getattr(self, name)
            if getattr(value, "value", value) not in choices:
                faults.append(f"{name}: {value!r} is unknown. Choose one of {', '.join(choices)}")
        if self.hub_revision is not None or self.hub_private_repo is False:
            faults.append(
                "hub_revision, hub_private_repo: uploads go to the main branch, new repositories are private"
            )
        if faults:
            raise InputError("Training settings: " + "; ".join(faults) + ".")
        check_optimizer(getattr(self.optim, "value", self.optim))
        if self.adam_beta2 is None:
            self.adam_beta2 = COMPENSATED_BETA2 if self.optim == COMPENSATED_OPTIM else 0.999
        is_plateau = getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type) == "reduce_lr_on_plateau"
        if self.metric_for_best_model is None and (is_plateau or self.load_best_model_at_end):
            # That scheduler waits for a value that falls.
            self.metric_for_best_model = f"eval_{self.loss_type}_loss" if is_plateau else "eval_accuracy"
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available() and not self.use_cpu
        self._given_division = given = self.per_device_train_batch_size, self.gradient_accumulation_steps
        expected = get_int_from_env(["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"], 1)
        try:
            # Before TrainingArguments, which hands both to DeepSpeed; how many devices there are is known after it.
            self.per_device_train_batch_size, self.gradient_accumulation_steps = self.divided_pairs(expected)
            super().__post_init__()
            if (devices := self.world_size * max(1, self.n_gpu)) != expected:
                self.per_device_train_batch_size, self.gradient_accumulation_steps = given
                self.per_device_train_batch_size, self.gradient_accumulation_steps = self.divided_pairs(devices)
        except (ValueError, TypeError, ImportError) as error:
            raise InputError(f"Training settings: {error}") from error

    def divided_over(self, devices: int) -> "RewardTrainingArguments":
        """These settings as a launch on so many GPUs has them."""
        args = copy.copy(self)
        args.per_device_train_batch_size, args.gradient_accumulation_steps = self._given_division
        try:
            args.per_device_train_batch_size, args.gradient_accumulation_steps = args.divided_pairs(devices)
        except ValueError as error:
            raise InputError(f"Training settings: {error}") from error
        return args

    @property
    def division(self) -> tuple[int, int]:
        """Pairs of a forward pass on each device, forward passes of an update."""
        values: Any = self
        return values.per_device_train_batch_size, values.gradient_accumulation_steps

    @property
    def pairs_of_step(self) -> int:
        """Pairs that an update learns from, over all processes."""
        return super().train_batch_size * self.division[1] * self.world_size

    @property
    def train_batch_size(self) -> int:
        """Rows that a process draws for one forward pass: with prioritized training a pool."""
        return super().train_batch_size * self.drawn_per_pair


def settings_of(args: RewardTrainingArguments) -> dict[str, Any]:
    """What a run records, ready for JSON and YAML: our settings, and those of TrainingArguments that were set."""
    now, usual = args.to_dict() | {"pairs_per_step": args.pairs_per_step or args.pairs_of_step}, usual_settings()
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in now.items()
        if name in OUR_SETTINGS or name in _REQUIRED or (value != usual[name] and name not in _OF_THIS_PLACE)
    }


def usual_settings() -> dict[str, Any]:
    """The defaults, as `RewardTrainingArguments.to_dict` gives them.

    Not read from new arguments: making some resets the state that Accelerate keeps of a training under way.
    """
    defaults = {
        spec.name: spec.default_factory() if callable(spec.default_factory) else spec.default
        for spec in dataclasses.fields(RewardTrainingArguments)
    }
    accelerator = AcceleratorConfig().to_dict()
    del accelerator["use_configured_state"]  # as TrainingArguments does
    plain = {name: getattr(value, "value", value) for name, value in defaults.items()}
    return plain | {
        "report_to": [], "debug": [], "activation_checkpointing": False, "gradient_checkpointing": False,
        "accelerator_config": accelerator, "adam_beta2": 0.999,
    }  # fmt: skip


def card_settings(args: RewardTrainingArguments, has_adapters: bool) -> dict[str, Any]:
    """For the card of a model: the settings that say what any run of this kind is, and those that were changed."""
    now, usual = {**args.to_dict(), **settings_of(args)}, usual_settings()
    always = _ALWAYS_ON_CARD + (_ON_CARD_OF_INFORM if args.architecture == "inform" else ())
    shown = {name: now[name] for name in always}
    changed = {name: value for name, value in settings_of(args).items() if value is not None and value != usual[name]}
    unused = {"num_train_epochs": args.max_steps > 0, "merge_adapters": not has_adapters}
    left_out = {*_NEVER_ON_CARD, *(name for name, is_unused in unused.items() if is_unused)}
    return {name: value for name, value in {**shown, **changed}.items() if name not in left_out}


def deciding_settings(args: RewardTrainingArguments) -> list[str]:
    """Names of the settings that decide what this run learns."""
    names = {spec.name: decides(spec.name) for spec in dataclasses.fields(args)}
    return [name for name, found in names.items() if (getattr(args, found) if isinstance(found, str) else found)]


def field_types() -> dict[str, Any]:
    """Resolved type of every setting."""
    hints = typing.get_type_hints(RewardTrainingArguments)
    return {spec.name: hints[spec.name] for spec in dataclasses.fields(RewardTrainingArguments) if spec.init}


def arguments_from_mapping(
    values: Mapping[str, Any], origin: str, overrides: Mapping[str, Any] = types.MappingProxyType({})
) -> RewardTrainingArguments:
    """Settings from parsed YAML or flags, each value checked against its field's type.

    TRL's names are read too (``model_name_or_path``, ``dataset_name``, ``dataset_train_split``, ...), names may have
    dashes for underscores, and so are names of earlier versions (``output``, ``group_by_length``). ``overrides`` win
    over ``values``; messages begin with ``origin``.

    Raises:
        InputError: naming unknown keys with the nearest known one, missing keys and wrong types, all at once.
    """
    hints = field_types()
    faults: list[str] = []
    named = with_our_names(values, overrides, faults)
    accepted: dict[str, Any] = {}
    for key, value in named.items():
        if key not in hints:
            name = key if isinstance(key, str) and len(key) <= 80 else shown(key)
            known = {known: repr(known) for known in (*hints, *_OTHER_NAMES)}
            nearest = did_you_mean(name, known) if len(faults) < _MOST_FAULTS else ""
            faults.append(f"unknown setting {shown(key)}{nearest}")
            continue
        try:
            accepted[key] = _convert(value, hints[key])
        except ValueError as error:
            faults.append(f"{key}: {error}")
    if accepted.get("report_to", "none") is None:  # which TrainingArguments takes for a tracker of this name
        accepted["report_to"] = "none"
    faults += missing_settings(named)
    if "data" in accepted and not accepted["data"]:
        faults.append("data is empty: name at least one file, dataset folder or Hub id")
    if faults:
        if len(faults) > _MOST_FAULTS:
            faults = [*faults[:_MOST_FAULTS], f"and {len(faults) - _MOST_FAULTS} more"]
        raise InputError(f"{origin}: " + "; ".join(faults) + ". `inform-rm train --help` lists every setting.")
    try:
        return RewardTrainingArguments(**accepted)
    except InputError as error:
        raise InputError(f"{origin}: {error}") from None


def missing_settings(given: Collection[str]) -> list[str]:
    """What a run from settings needs and is not there, in words."""
    return [f"missing setting {name!r} ({text})" for name, text in _REQUIRED.items() if name not in given]


def read_arguments(path: str | Path | None, overrides: Mapping[str, Any]) -> RewardTrainingArguments:
    """Settings from a YAML file, with command-line flags on top.

    Raises:
        InputError: if the file is missing, is not YAML, is not a mapping, or holds a wrong setting.
    """
    if path is None:
        return arguments_from_mapping({}, "command line", overrides)
    values = read_settings_yaml(path)
    if not isinstance(values, dict | None):
        raise InputError(f"{path}: expected 'setting: value' lines, got a {type(values).__name__}.")
    return arguments_from_mapping(values or {}, str(path), overrides)


def with_our_names(values: Mapping[str, Any], overrides: Mapping[str, Any], faults: list[str]) -> dict[str, Any]:
    """The settings under today's names, also what TRL and earlier versions have in place of ours; overrides win."""
    named: dict[str, Any] = {}
    for given in (values, overrides):
        found: dict[str, Any] = {}
        for key, value in given.items():
            name = key.replace("-", "_") if isinstance(key, str) else key
            name = _OTHER_NAMES.get(name, name)
            if name in found:
                faults.append(f"{name} is given twice, also as {shown(key)}: keep one")
            found[name] = value
        named |= found
    if "group_by_length" in named:
        grouped = str(named.pop("group_by_length")).lower() == "true"
        named.setdefault("train_sampling_strategy", "group_by_length" if grouped else "random")
    config, train, test = (named.pop(f"dataset_{key}", None) for key in ("config", "train_split", "test_split"))
    data = named.get("data")
    if (train or test or config) and isinstance(data, str):  # TRL's data set and its splits
        inside = f"{config}/" if config else ""
        named["data"] = f"{data}[{inside}{train or 'train'}]"
        if test:
            named.setdefault("eval_data", f"{data}[{inside}{test}]")
    elif train or test or config:
        faults.append("dataset_train_split, dataset_test_split and dataset_config need one dataset_name")
    return named


def _as_tuple(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def _convert(value: Any, hint: Any) -> Any:
    """`value` as the type `hint`; strings (from flags, and numbers like 5e-6 that YAML reads as text) are parsed."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    is_text = isinstance(value, str)
    if origin in (types.UnionType, typing.Union):
        if type(None) in parts and (value is None or (is_text and value.lower() in ("none", "null"))):
            return None
        options = [part for part in parts if part is not type(None) and not _is_enum(part)]
        # A bool is tried first, and text last, which takes everything that is written.
        *others, last = sorted(options, key=lambda option: (option is not bool, option is str))
        for option in others:
            with contextlib.suppress(ValueError):
                return _convert(value, option)
        return _convert(value, last)
    if origin is Literal:
        if value not in parts:
            raise ValueError(f"must be one of {', '.join(map(str, parts))}, got {shown(value)}")
        return value
    if hint == dict[str, str]:
        return read_columns(value)
    if hint == dict[str, float]:
        return read_weights(value)
    if origin in (tuple, list):
        items = [value] if is_text else value
        if not isinstance(items, list | tuple) or not all(isinstance(item, str) and item.strip() for item in items):
            what = "a path or a list of paths" if origin is tuple else "text or a list of texts"
            raise ValueError(f"must be {what}, got {shown(value)}")
        return origin(items)
    if hint in (int, float):
        return _number(value, hint)
    kinds = {bool: "true or false", str: "text", dict: "a mapping"}
    kind = origin or hint
    if kind not in kinds:
        raise ValueError(f"can be given in Python only, as a {hint.__name__}")
    if kind is bool and is_text:
        value = {"true": True, "false": False}.get(value.lower(), value)
    if not isinstance(value, kind):
        raise ValueError(f"must be {kinds[kind]}, got {shown(value)}")
    return value


def _is_enum(option: Any) -> bool:
    return isinstance(option, type) and issubclass(option, enum.Enum)


def _number(value: Any, hint: type) -> int | float:
    is_whole = "whole " if hint is int else ""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"must be a number, got {shown(value)}")
    try:
        if isinstance(value, str) and len(value) > _MOST_DIGITS:
            raise ValueError
        number = hint(value) if isinstance(value, str) else int(value) if hint is int else float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"must be a {is_whole}number, got {shown(value)}") from None
    if _LARGEST_NUMBER < abs(number) != math.inf:
        raise ValueError(f"must be a number of at most {_LARGEST_NUMBER}, got {shown(value)}")
    if is_whole and number != float(value):
        raise ValueError(f"must be a whole number, got {shown(value)}")
    return number
