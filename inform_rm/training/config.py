"""Settings of one training run: field name = YAML key = command-line flag. Imports neither torch nor transformers."""

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from inform_rm.errors import InputError, shown
from inform_rm.safety.settings_yaml import read_settings_yaml

_LARGEST_NUMBER = 2**63 - 1  # what torch and numpy can hold
_MOST_DIGITS = 100
_MOST_FAULTS = 20  # as many are listed


def _setting(
    text: str, default: Any = dataclasses.MISSING, *, decides: bool | str = True, by_content: bool = False
) -> Any:
    """A field of the settings; without a default the setting is required.

    Args:
        text: its sentence of help.
        default: its default.
        decides: whether it decides what is learnt, so that a run is not continued under another value; the name of a
            setting: it decides where that one is set.
        by_content: it names files, and what they hold decides, not how they are named.
    """
    return field(default=default, metadata={"help": text, "decides": decides, "by_content": by_content})


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Everything that decides a training run. Published defaults: arXiv:2402.09345, appendices E.2 and J.3."""

    model: str = _setting("backbone (or InfoRM model to continue from): Hub id or folder", by_content=True)
    data: tuple[str, ...] = _setting(
        "training pairs: files, folders or Hub ids, NAME[SPLIT] for one split; several are concatenated",
        by_content=True,
    )
    output: str = _setting(
        "folder for the trained, Hub-ready model; checkpoints go to its subfolder 'checkpoints'", decides=False
    )
    eval_data: tuple[str, ...] = _setting(
        "pairs for evaluation during training, given like data", (), decides="load_best_model_at_end", by_content=True
    )
    columns: dict[str, str] | None = _setting(  # noqa: RUF009  # its default is None
        "which columns of data and eval_data are prompt, chosen, rejected, system, history, margin, subset, id: "
        "FIELD=COLUMN; ignore=COLUMN leaves one out knowingly; none: columns of these names",
        None,
    )

    architecture: Literal["inform", "standard"] = _setting(
        "'inform': information bottleneck; 'standard': one linear reward head, the baseline", "inform"
    )
    latent_dim: int = _setting("K, latent dimensions of the bottleneck (paper: 32, 64 or 128)", 128)
    beta: float = _setting("weight of the KL term, eq. 25 (paper: 0.1, 0.01 or 0.001)", 0.1)
    decoder: Literal["mlp", "linear"] = _setting("map from latent to reward", "mlp")
    kl_reduction: Literal["sum", "averaged_moments"] = _setting(
        "'sum': the paper's bound; 'averaged_moments': the authors' released code", "sum"
    )

    kl_warmup_steps: float = _setting(
        "the KL weight is 0 for so many steps and rises to beta over as many again; below 1: fraction of all steps",
        0.25,
    )

    objective: Literal["bradley_terry", "prioritized"] = _setting(
        "'prioritized': of each pool, learn from the pairs with the smallest prompt-free gap (arXiv:2504.06020)",
        "bradley_terry",
    )
    pool_factor: int = _setting("prioritized: pairs drawn for each pair that is learnt from", 2)
    num_prompts: int = _setting("prioritized: prompts behind each prompt-free gap, the pair's own among them", 8)
    weights: Literal["uniform", "behavior"] = _setting(
        "prioritized: prompts count the same, or as likely as behavior_model finds both responses under them",
        "uniform",
    )
    behavior_model: str | None = _setting(
        "prioritized: causal LM near what wrote the responses, a folder or Hub id; what weights 'behavior' needs",
        None,
        by_content=True,
    )
    length_normalized: bool = _setting("weights 'behavior': mean log-likelihoods of the tokens instead of sums", False)
    ess_target: float = _setting("weights 'behavior': effective sample size to keep, as a share of the prompts", 0.25)
    warmup_fraction: float = _setting("prioritized: share of the steps that start without selection", 0.1)
    refresh: int = _setting("prioritized: steps for which an estimated gap may be used again; 1: never", 1)
    selection: Literal["smallest", "soft"] = _setting(
        "prioritized: the smallest gaps (the paper's), or a draw with probability sigmoid(-gap)", "smallest"
    )

    augmentation: Literal["none", "rrm"] = _setting(
        "'rrm': two more pairs for each, against responses of other prompts (arXiv:2409.13156)", "none"
    )

    label_smoothing: float = _setting("probability that a label is wrong, 0 to below 0.5", 0.0)
    center_rewards_coefficient: float = _setting("weight of mean((r_w + r_l)^2), which keeps rewards near 0", 0.0)

    max_length: int | None = _setting("longest allowed prompt + response in tokens; none: the model's own limit", None)
    overlong: Literal["error", "drop", "truncate_prompt"] = _setting("what to do with a longer pair", "error")
    on_bad_row: Literal["error", "skip"] = _setting("stop at a bad row, or skip, count and list it", "error")
    max_pairs_per_source: int | None = _setting("use a seeded random subset of each item of data; none: all", None)
    max_eval_pairs_per_source: int | None = _setting("the same for eval_data", None, decides="load_best_model_at_end")
    streaming: bool = _setting(
        "read and encode data while training, in bounded memory, instead of before; needs max_steps", False
    )
    shuffle_buffer: int = _setting(
        "streaming: rows held in memory by each reader, from which the next one is drawn; 1: rows in file order",
        10_000,
    )
    chat_template: str | None = _setting(
        "template file, or 'plain' (what a tokenizer without one gets)", None, by_content=True
    )

    learning_rate: float = _setting("peak learning rate (paper: 5e-6)", 5e-6)
    num_train_epochs: float = _setting("passes over the data (paper: 1)", 1.0)
    max_steps: int = _setting("optimizer steps; overrides num_train_epochs when positive", -1)
    per_device_train_batch_size: int = _setting("pairs per process and forward pass", 8)
    per_device_eval_batch_size: int = _setting(
        "pairs per process and forward pass in evaluation", 16, decides="load_best_model_at_end"
    )
    gradient_accumulation_steps: int = _setting("forward passes per optimizer step (paper: 64 pairs a step)", 8)
    lr_scheduler_type: str = _setting("learning rate schedule of transformers", "cosine")
    warmup_steps: float = _setting("steps of linear warm-up; below 1: fraction of all steps", 0.03)
    weight_decay: float = _setting("AdamW weight decay", 0.0)
    max_grad_norm: float = _setting("gradient clipping norm", 1.0)
    optim: str = _setting("optimizer of the transformers Trainer", "adamw_torch_fused")
    batching: Literal["packed", "padded"] = _setting(
        "'packed': prompts shared by both sides computed once, no padding; 'padded': the same results, slower",
        "packed",
    )
    tokens_per_batch: int | None = _setting(
        "packed, one process: most tokens of a forward pass, a larger batch takes several; none: 2048 on a CPU, "
        "else no limit",
        None,
        decides="lora_dropout",
    )
    group_by_length: bool = _setting("put pairs of similar length in one batch", False)
    seed: int = _setting("seed of the head, the data order and the latent noise", 0)

    lora_r: int = _setting("rank of LoRA adapters on all linear layers of the backbone; 0: train all weights", 0)
    lora_alpha: float = _setting("LoRA scale", 16.0)
    lora_dropout: float = _setting("LoRA dropout", 0.0)
    use_dora: bool = _setting("LoRA: also learn the length of each output's weights (DoRA, arXiv:2402.09353)", False)
    use_rslora: bool = _setting(
        "LoRA: scale by lora_alpha / sqrt(lora_r), not lora_alpha / lora_r (arXiv:2312.03732)", False
    )
    load_in_4bit: bool = _setting(
        "LoRA: backbone in 4 bits (QLoRA, arXiv:2305.14314: nf4, double quantisation); the head stays whole", False
    )
    load_in_8bit: bool = _setting("LoRA: backbone in 8 bits (LLM.int8, arXiv:2208.07339); the head stays whole", False)
    merge_adapters: bool = _setting(
        "LoRA: true: the finished folder is a whole model, merged in full precision; false: it holds adapters and "
        "head, and loads where the base model is there too",
        True,
    )

    dtype: Literal["float32", "bfloat16", "auto"] = _setting(
        "number type of the backbone's weights ('auto': the checkpoint's); in bfloat16 most updates are lost unless "
        "optim is stable_adamw or LoRA is on; the head is in float32",
        "float32",
    )
    bf16: bool = _setting("compute in bfloat16 (autocast) and keep the weights in dtype; for GPUs", False)
    gradient_checkpointing: bool = _setting("recompute activations to save memory", False, decides=False)
    attn_implementation: str | None = _setting("sdpa, eager, flash_attention_2, ...; none: the model's own", None)
    use_cpu: bool = _setting("train on the CPU though a GPU is there", False)
    dataloader_num_workers: int = _setting("worker processes that prepare batches", 0, decides=False)

    logging_steps: float = _setting("log every so many steps; below 1: fraction of all steps", 10, decides=False)
    eval_steps: float = _setting(
        "evaluate every so many steps; below 1: fraction of all steps", 0.25, decides="load_best_model_at_end"
    )
    save_steps: float = _setting(
        "checkpoint every so many steps; below 1: fraction of all steps", 0.25, decides="load_best_model_at_end"
    )
    save_total_limit: int | None = _setting("checkpoints to keep; none: all", 2, decides=False)
    load_best_model_at_end: bool = _setting("end with the checkpoint of best accuracy on eval_data", False)
    report_to: str = _setting("where logs go: none, tensorboard, wandb, ...", "none", decides=False)
    overwrite: bool = _setting("discard what the output folder holds from another run", False, decides=False)

    revision: str | None = _setting("revision of the model on the Hub", None)
    trust_remote_code: bool = _setting("run code from the model's repository", False)

    def __post_init__(self) -> None:
        """Refuse impossible settings, all of them in one message."""
        faults = []
        for name in ("model", "output"):
            if not getattr(self, name).strip():
                faults.append(f"{name} is empty")
        if not self.data:
            faults.append("data is empty: name at least one file, dataset folder or Hub id")
        at_least = {
            "latent_dim": 1, "beta": 0, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1,
            "gradient_accumulation_steps": 1, "weight_decay": 0, "max_grad_norm": 0, "warmup_steps": 0, "lora_r": 0,
            "kl_warmup_steps": 0,
            "center_rewards_coefficient": 0, "dataloader_num_workers": 0, "seed": 0, "max_length": 2,
            "max_pairs_per_source": 1, "max_eval_pairs_per_source": 1, "save_total_limit": 1,
            "tokens_per_batch": 1, "pool_factor": 1, "num_prompts": 2, "refresh": 1,
            "shuffle_buffer": 1,
        }  # fmt: skip
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and not least <= value < float("inf"):
                faults.append(f"{name} must be a finite number of at least {least}, got {value}")
        for name in ("learning_rate", "num_train_epochs", "logging_steps", "eval_steps", "save_steps"):
            if not 0 < getattr(self, name) < float("inf"):
                faults.append(f"{name} must be a finite number above 0, got {getattr(self, name)}")
        for name, limit in (("label_smoothing", 0.5), ("lora_dropout", 1.0), ("warmup_fraction", 1.0)):
            if not 0 <= getattr(self, name) < limit:
                faults.append(f"{name} must be at least 0 and below {limit}, got {getattr(self, name)}")
        if not math.isfinite(self.lora_alpha):
            faults.append(f"lora_alpha must be a finite number, got {self.lora_alpha}")
        if not 0 < self.ess_target <= 1:
            faults.append(f"ess_target must be above 0 and at most 1, got {self.ess_target}")
        if (self.weights == "behavior") != (self.behavior_model is not None):
            faults.append(
                f"weights {self.weights!r} does not go with behavior_model {self.behavior_model!r}: 'behavior' needs "
                "one, 'uniform' uses none"
            )
        if self.load_in_4bit and self.load_in_8bit:
            faults.append("load_in_4bit and load_in_8bit exclude each other: choose one")
        for name in ("use_dora", "use_rslora", "load_in_4bit", "load_in_8bit"):
            if getattr(self, name) and not self.lora_r:
                faults.append(f"{name} needs LoRA: set lora_r, 16 for instance")
        if not self.merge_adapters and not self.lora_r:
            faults.append("merge_adapters is false, but lora_r is 0: without LoRA there are no adapters")
        if self.load_best_model_at_end and not self.eval_data:
            faults.append("load_best_model_at_end needs eval_data to choose by")
        if self.load_best_model_at_end and self.eval_steps != self.save_steps:
            faults.append("load_best_model_at_end needs eval_steps equal to save_steps")
        if self.streaming:
            faults += self._against_streaming()
        if faults:
            raise InputError("Training settings: " + "; ".join(faults) + ".")

    def _against_streaming(self) -> list[str]:
        """What streaming cannot do, each with the reason."""
        faults = []
        if self.max_steps <= 0:
            faults.append(
                "streaming needs max_steps, because the number of pairs is not known before they are read (one pass: "
                "pairs / (per_device_train_batch_size * gradient_accumulation_steps * processes))"
            )
        for name, used, reason in (
            ("objective 'prioritized'", self.objective == "prioritized", "draws prompts from all the data"),
            ("augmentation 'rrm'", self.augmentation == "rrm", "draws responses from all the data"),
            ("group_by_length", self.group_by_length, "sorts all pairs by length"),
            ("max_pairs_per_source", self.max_pairs_per_source is not None, "chooses among all pairs of a source"),
        ):
            if used:
                faults.append(f"{name} does not go with streaming: it {reason}")
        return faults


def deciding_settings(config: TrainingConfig) -> list[str]:
    """Names of the settings that decide what this run learns."""
    specs = {spec.name: spec.metadata["decides"] for spec in dataclasses.fields(config)}
    return [
        name
        for name, decides in specs.items()
        if (bool(getattr(config, decides)) if isinstance(decides, str) else decides)
    ]


def settings_by_content() -> list[str]:
    """Names of the settings that name files."""
    return [spec.name for spec in dataclasses.fields(TrainingConfig) if spec.metadata["by_content"]]


def field_types() -> dict[str, Any]:
    """Resolved type of every setting, in order."""
    return typing.get_type_hints(TrainingConfig)


def config_from_mapping(values: dict[str, Any], origin: str) -> TrainingConfig:
    """Settings from parsed YAML or flags, each value checked against its field's type.

    Args:
        values: setting name to value.
        origin: where they come from, for messages.

    Raises:
        InputError: naming unknown keys with the nearest known one, missing keys and wrong types, all at once.
    """
    hints = field_types()
    faults: list[str] = []
    accepted: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            name = key if isinstance(key, str) and len(key) <= 80 else shown(key)
            nearest = difflib.get_close_matches(name, hints, n=1) if len(faults) < _MOST_FAULTS else []
            hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
            faults.append(f"unknown setting {shown(key)}{hint}")
            continue
        try:
            accepted[key] = _convert(value, hints[key])
        except ValueError as error:
            faults.append(f"{key}: {error}")
    for spec in dataclasses.fields(TrainingConfig):
        if spec.default is dataclasses.MISSING and spec.name not in values:
            faults.append(f"missing setting {spec.name!r} ({spec.metadata['help']})")
    if faults:
        if len(faults) > _MOST_FAULTS:
            faults = [*faults[:_MOST_FAULTS], f"and {len(faults) - _MOST_FAULTS} more"]
        raise InputError(f"{origin}: " + "; ".join(faults) + ". `inform-rm train --help` lists every setting.")
    try:
        return TrainingConfig(**accepted)
    except InputError as error:
        raise InputError(f"{origin}: {error}") from None


def read_config(path: str | Path | None, overrides: dict[str, Any]) -> TrainingConfig:
    """Settings from a YAML file, with command-line flags on top.

    Raises:
        InputError: if the file is missing, is not YAML, is not a mapping, or holds a wrong setting.
    """
    values: Any = {}
    if path is not None:
        values = read_settings_yaml(path)
        if values is None:
            values = {}
        if not isinstance(values, dict):
            raise InputError(f"{path}: expected 'setting: value' lines, got a {type(values).__name__}.")
    return config_from_mapping({**values, **overrides}, str(path) if path is not None else "command line")


def read_columns(value: Any) -> dict[str, str]:
    """A mapping of fields to columns, from YAML or from texts like ``prompt=question``.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, dict):
        pairs = list(value.items())
    else:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or not all(isinstance(item, str) and "=" in item for item in items):
            raise ValueError(f"must be FIELD=COLUMN, several times if need be, got {shown(value)}")
        pairs = [tuple(item.split("=", 1)) for item in items]
    if not all(isinstance(part, str) and part for pair in pairs for part in pair):
        raise ValueError(f"must name a column for each field, got {shown(value)}")
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"names a field twice, got {shown(value)}")
    return dict(pairs)


def _convert(value: Any, hint: Any) -> Any:
    """`value` as the type `hint`; strings (from flags, and numbers like 5e-6 that YAML reads as text) are parsed."""
    if isinstance(hint, types.UnionType):  # X | None
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null")):
            return None
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    origin = typing.get_origin(hint)
    if origin is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}, got {shown(value)}")
        return value
    if origin is dict:
        return read_columns(value)
    if origin is tuple:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or not all(isinstance(item, str) and item.strip() for item in items):
            raise ValueError(f"must be a path or a list of paths, got {shown(value)}")
        return tuple(items)
    if hint is bool:
        parsed = {"true": True, "false": False}.get(value.lower()) if isinstance(value, str) else value
        if not isinstance(parsed, bool):
            raise ValueError(f"must be true or false, got {shown(value)}")
        return parsed
    if hint is str:
        if not isinstance(value, str):
            raise ValueError(f"must be text, got {shown(value)}")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"must be a number, got {shown(value)}")
    if isinstance(value, str) and len(value) > _MOST_DIGITS:
        raise ValueError(f"must be a number, got {shown(value)}")
    try:
        number = hint(value) if not isinstance(value, float) or hint is float else int(value)
    except (ValueError, OverflowError):
        raise ValueError(f"must be a {'whole ' if hint is int else ''}number, got {shown(value)}") from None
    if _LARGEST_NUMBER < abs(number) != math.inf:
        raise ValueError(f"must be a number of at most {_LARGEST_NUMBER}, got {shown(value)}")
    if hint is int and number != float(value):
        raise ValueError(f"must be a whole number, got {shown(value)}")
    return number
