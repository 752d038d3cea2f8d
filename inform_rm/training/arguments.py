"""Settings of a training run that are ours, or whose defaults are; imports neither torch nor transformers.

`inform_rm.training.reward_arguments` joins them with transformers' TrainingArguments.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from inform_rm.data.messages import finite_number
from inform_rm.errors import shown

# Heading of the help -> the first setting under it.
GROUPS = {
    "model": "model", "data": "data", "bottleneck and loss": "beta", "which pairs are learnt from": "objective",
    "LoRA and quantisation": "lora_r", "optimisation": "learning_rate", "forward passes": "batching",
    "logs and checkpoints": "logging_steps",
}  # fmt: skip
# Settings of transformers' TrainingArguments with its own defaults that most runs use.
OFTEN_USED = (
    "output_dir", "max_steps", "weight_decay", "max_grad_norm", "optim", "bf16",
    "gradient_checkpointing", "torch_compile", "use_cpu", "load_best_model_at_end", "report_to", "run_name",
    "dataloader_num_workers", "push_to_hub", "hub_model_id", "deepspeed", "fsdp", "neftune_noise_alpha",
)  # fmt: skip
PAIRS_PER_STEP = 64  # arXiv:2402.09345, appendix J.3
_PAIRS_PER_PASS = 8  # TrainingArguments' default
# Of TrainingArguments' settings: what changes neither weights nor the choice among them, by name or beginning.
_DECIDE_NOTHING = (
    "output_dir", "activation_checkpointing", "gradient_checkpointing", "torch_empty_cache_steps", "logging_", "log_",
    "include_num_input_tokens_seen", "disable_tqdm", "report_to", "run_name", "project", "trackio_", "save_total",
    "save_only_model", "save_on_each_node", "enable_jit_checkpoint", "push_to_hub", "hub_", "dataloader_num",
    "dataloader_p", "dataloader_m", "dataloader_in_order", "ddp_", "debug", "skip_memory_metrics", "do_",
    "resume_from_checkpoint", "restore_callback", "local_rank", "_n_gpu", "use_cache", "overwrite",
)  # fmt: skip
_DECIDE_WHICH_IS_BEST = (
    "eval_", "save_strategy", "per_device_eval", "prediction_loss_only", "include_for_metrics", "batch_eval_metrics",
    "metric_for_best_model", "greater_is_better", "bf16_full_eval", "fp16_full_eval",
)  # fmt: skip


def _setting(
    text: str, default: Any, *, decides: bool | str = True, by_content: bool = False, compare: bool = True
) -> Any:
    """A field of the settings with its sentence of help.

    ``decides``: whether it decides what is learnt, so that a run is not continued under another value; the name of a
    setting: it decides where that one is set. ``by_content``: it names files, and what they hold decides, not how they
    are named.
    """
    return field(
        default=default, compare=compare, metadata={"help": text, "decides": decides, "by_content": by_content}
    )


@dataclass(kw_only=True, repr=False)
class RewardArguments:
    """What decides a run beside TrainingArguments.

    Published defaults (arXiv:2402.09345, appendices E.2 and J.3) are those whose help says "paper";
    docs/ideas/papers.md lists what the paper has not or has otherwise.
    """

    model: str | None = _setting(
        "backbone (or InfoRM model to continue from): Hub id or folder", None, by_content=True
    )
    revision: str | None = _setting("revision of the model on the Hub", None)
    trust_remote_code: bool = _setting("run code from the model's repository", False)
    architecture: Literal["inform", "standard"] = _setting(
        "'inform': information bottleneck; 'standard': one linear reward head, the baseline", "inform"
    )
    latent_dim: int = _setting("K, latent dimensions of the bottleneck (paper: 32, 64 or 128)", 128)
    decoder: Literal["mlp", "linear"] = _setting(
        "map from latent to reward (the authors' released code: linear)", "mlp"
    )
    dtype: Literal["float32", "bfloat16", "auto"] = _setting(
        "number type of the backbone's weights ('auto': the checkpoint's); in bfloat16 most updates are lost unless "
        "optim is stable_adamw or LoRA is on; the head is in float32",
        "float32",
    )
    attn_implementation: str | None = _setting(
        "of padded rows: sdpa, eager, flash_attention_2, ...; none: the model's own; packed rows have another",
        None,
    )
    chat_template: str | None = _setting(
        "template file, or 'plain' (what a tokenizer without one gets)", None, by_content=True
    )

    data: tuple[str, ...] = _setting(
        "training pairs: files, folders or Hub ids, NAME[SPLIT] for one split; several are concatenated",
        (),
        by_content=True,
    )
    eval_data: tuple[str, ...] = _setting(
        "pairs for evaluation during training, given like data", (), decides="load_best_model_at_end", by_content=True
    )
    columns: dict[str, str] | None = _setting(  # noqa: RUF009  # its default is None
        "which columns of data and eval_data are prompt, chosen, rejected, system, history, margin, subset, id, "
        "responses, ranks, scores, response, score: "
        "FIELD=COLUMN; ignore=COLUMN leaves one out knowingly; none: columns of these names",
        None,
    )
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

    beta: float = _setting("weight of the KL term, eq. 25 (paper: 0.1, 0.01 or 0.001)", 0.1)
    kl_reduction: Literal["sum", "averaged_moments"] = _setting(
        "'sum': the paper's bound, of both responses; 'averaged_moments': the term of the authors' released code, a "
        "mean over responses, with their beta (they train K 512, beta 1.0, learning rate 9e-6, linear encoder and "
        "decoder without bias)",
        "sum",
    )
    kl_warmup_steps: float = _setting(
        "the KL weight is 0 for so many steps and rises to beta over as many again; below 1: fraction of all steps; "
        "not in the paper, which has beta from the first step (0)",
        0.1,
    )
    kl_warmup_nats: float = _setting(
        "unless kl_warmup_steps is 0, the KL weight stays 0 for longer, until preferences earn so many nats a pair "
        "(ln 2 - loss), at the latest until two fifths of the steps; 0: no longer",
        0.03,
    )
    loss_type: str = _setting("loss of a pair (`inform_rm.training.losses.PAIR_LOSSES`)", "bradley_terry")
    label_smoothing: float = _setting("probability that a label is wrong, 0 to below 0.5", 0.0)
    center_rewards_coefficient: float = _setting("weight of mean((r_w + r_l)^2), which keeps rewards near 0", 0.0)

    ranking_loss: Literal["all_pairs", "plackett_luce"] = _setting(
        "rankings: the mean of loss_type over all untied pairs (arXiv:2203.02155), or the likelihood of the order",
        "all_pairs",
    )
    score_loss_coefficient: float = _setting("scored responses: weight of the squared error to their score", 1.0)
    score_weights: dict[str, float] | None = _setting(  # noqa: RUF009  # its default is None
        "scored responses: columns whose weighted sum is the score, COLUMN=WEIGHT; none: the column score", None
    )

    objective: Literal["plain", "prioritized"] = _setting(
        "'prioritized': of each pool, learn from the pairs with the smallest prompt-free gap (arXiv:2504.06020; the "
        "gap's equation is derived from the paper's definitions, it is not the authors' text)",
        "plain",
    )
    pool_factor: int = _setting("prioritized: pairs drawn for each pair that is learnt from", 2)
    num_prompts: int = _setting(
        "prioritized: prompts behind each prompt-free gap; with weights 'uniform' without the pair's own, of which a "
        "few others would leave too large a part, with 'behavior' it is among them",
        1,
    )
    weights: Literal["uniform", "behavior"] = _setting(
        "prioritized: prompts count the same, or as likely as behavior_model finds both responses under them",
        "uniform",
    )
    behavior_model: str | None = _setting(
        "prioritized: causal LM near what wrote the responses, a folder or Hub id; what weights 'behavior' needs",
        None,
        by_content=True,
    )
    ess_target: float = _setting("weights 'behavior': effective sample size to keep, as a share of the prompts", 0.25)
    warmup_fraction: float = _setting(
        "prioritized: share of the steps that start without selection; ours, gaps of a fresh head are noise", 0.1
    )
    augmentation: Literal["none", "rrm"] = _setting(
        "'rrm': two more pairs for each, against responses of other prompts (arXiv:2409.13156)", "none"
    )

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

    learning_rate: float = _setting("peak learning rate (paper: 5e-6)", 5e-6)
    num_train_epochs: float = _setting("passes over the data (paper: 1)", 1.0)
    pairs_per_step: int | None = _setting(
        "pairs (rows) that each update learns from, over all processes and forward passes; none: 64 (the paper's), or "
        "per_device_train_batch_size * gradient_accumulation_steps * processes where both are given",
        None,
        compare=False,  # what it was divided into says it
    )
    per_device_train_batch_size: int | None = _setting(
        "pairs per process and forward pass; none: what pairs_per_step leaves, at most 8", None
    )
    gradient_accumulation_steps: int | None = _setting(
        "forward passes per optimizer step; none: what pairs_per_step leaves", None
    )
    lr_scheduler_type: str = _setting("learning rate schedule of transformers", "cosine")
    warmup_steps: float = _setting("steps of linear warm-up; below 1: fraction of all steps", 0.03)
    adam_beta2: float | None = _setting(
        "decay of Adam's second moment; none: 0.999, and 0.99 with stable_adamw (as torch-optimi's authors)", None
    )
    seed: int = _setting("seed of the head, the data order and the latent noise", 0)

    batching: Literal["packed", "padded"] = _setting(
        "'packed': prompts shared by both sides computed once, no padding; 'padded': the same results, slower",
        "packed",
    )
    tokens_per_batch: int | None = _setting(
        "packed: most tokens of a forward pass, a larger batch takes several; none: 2048 on a CPU (several processes: "
        "no limit), on a GPU what its memory takes, measured once",
        None,
        decides="lora_dropout",
    )
    per_device_eval_batch_size: int = _setting(
        "pairs per process and forward pass in evaluation", 16, decides="load_best_model_at_end"
    )

    logging_steps: float = _setting("log every so many steps; below 1: fraction of all steps", 10, decides=False)
    logging_nan_inf_filter: bool = _setting("a loss that is no number stops the run; true would hide it", False)
    eval_strategy: str = _setting(
        "when to evaluate; without pairs for it: never", "steps", decides="load_best_model_at_end"
    )
    eval_steps: float | None = _setting(
        "evaluate every so many steps; below 1: fraction of all steps", 0.25, decides="load_best_model_at_end"
    )
    save_steps: float = _setting(
        "checkpoint every so many steps; below 1: fraction of all steps", 0.25, decides="load_best_model_at_end"
    )
    save_total_limit: int | None = _setting("checkpoints to keep; none: all", 2, decides=False)
    metric_for_best_model: str | None = _setting(
        "what load_best_model_at_end chooses by; none: eval_accuracy", None, decides="load_best_model_at_end"
    )
    overwrite: bool = _setting("discard what the output folder holds from another run", False, decides=False)
    hub_strategy: str = _setting(
        "'end': push_to_hub uploads the finished model, after a scan of it; checkpoints stay here", "end",
        decides=False,
    )  # fmt: skip
    remove_unused_columns: bool = _setting("the collators read every column: leave it false", False)

    def faults(self) -> list[str]:
        """What is impossible, all of it, each with its name."""
        values: Any = self  # also what TrainingArguments adds
        given = {name: getattr(values, name) for name in ("model", "output_dir")}
        faults = [f"{name} is empty" for name, text in given.items() if isinstance(text, str) and not text.strip()]
        at_least = {
            "latent_dim": 1, "beta": 0, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1,
            "gradient_accumulation_steps": 1, "weight_decay": 0, "max_grad_norm": 0, "warmup_steps": 0, "lora_r": 0,
            "kl_warmup_steps": 0, "kl_warmup_nats": 0, "score_loss_coefficient": 0,
            "center_rewards_coefficient": 0, "dataloader_num_workers": 0, "seed": 0, "max_length": 2,
            "max_pairs_per_source": 1, "max_eval_pairs_per_source": 1, "save_total_limit": 1,
            "tokens_per_batch": 1, "pool_factor": 1, "num_prompts": 1,
            "shuffle_buffer": 1, "pairs_per_step": 1,
        }  # fmt: skip
        for name, least in at_least.items():
            value = getattr(values, name)
            if value is not None and not least <= value < float("inf"):
                faults.append(f"{name} must be a finite number of at least {least}, got {value}")
        for name in ("learning_rate", "num_train_epochs", "logging_steps", "eval_steps", "save_steps"):
            value = getattr(values, name)
            if value is not None and not 0 < value < float("inf"):
                faults.append(f"{name} must be a finite number above 0, got {value}")
        for name, limit in (("label_smoothing", 0.5), ("lora_dropout", 1.0), ("warmup_fraction", 1.0)):
            if not 0 <= getattr(self, name) < limit:
                faults.append(f"{name} must be at least 0 and below {limit}, got {getattr(self, name)}")
        chooses_best = values.load_best_model_at_end
        faults += _true_ones(
            (not math.isfinite(self.lora_alpha), f"lora_alpha must be a finite number, got {self.lora_alpha}"),
            (not 0 < self.ess_target <= 1, f"ess_target must be above 0 and at most 1, got {self.ess_target}"),
            ((self.weights == "behavior") != (self.behavior_model is not None),
             f"weights {self.weights!r} does not go with behavior_model {self.behavior_model!r}: 'behavior' needs "
             "one, 'uniform' uses none"),
            (self.weights == "behavior" and self.num_prompts < 2,
             f"weights 'behavior' needs num_prompts of at least 2, got {self.num_prompts}: the pair's own is one"),
            (self.load_in_4bit and self.load_in_8bit, "load_in_4bit and load_in_8bit exclude each other: choose one"),
            (chooses_best and self.data and not self.eval_data, "load_best_model_at_end needs eval_data to choose by"),
            (chooses_best and self.eval_steps != self.save_steps,
             "load_best_model_at_end needs eval_steps equal to save_steps"),
            (values.push_to_hub and values.hub_model_id is None, "push_to_hub needs hub_model_id, name/model"),
            # What would do nothing here, or harm.
            (values.label_smoothing_factor, "label_smoothing_factor is for classifiers: use label_smoothing"),
            (values.batch_eval_metrics, "batch_eval_metrics gives metrics of single batches: leave it out"),
            (values.prediction_loss_only, "prediction_loss_only leaves no rewards to measure: leave it out"),
            (values.auto_find_batch_size, "auto_find_batch_size changes the batch in silence: lower "
             "per_device_train_batch_size"),
            (self.remove_unused_columns, "remove_unused_columns would take the pairs' columns away: leave it false"),
            (self.logging_nan_inf_filter, "logging_nan_inf_filter would hide losses that are no numbers: leave it "
             "false"),
            *self._against_plackett_luce(),
            (getattr(self.hub_strategy, "value", self.hub_strategy) != "end",
             "hub_strategy: only 'end' is known; checkpoints are not uploaded"),
        )  # fmt: skip
        return faults + (self._against_streaming() if self.streaming else [])

    @property
    def drawn_per_pair(self) -> int:
        """Pairs that are drawn for each pair that is learnt from."""
        return self.pool_factor if self.objective == "prioritized" else 1

    def divided_pairs(self, devices: int) -> tuple[int, int]:
        """Pairs of a forward pass on each device, and forward passes of an update.

        ``pairs_per_step`` is divided over the devices; of the other two settings one that is given stays as it is, and
        with both and no ``pairs_per_step`` their product decides. A row is a pair here: so is a ranking or a scored
        response, and so are the pairs that ``augmentation`` adds; with ``objective`` prioritized it is a pair that is
        learnt from, of which each pool has ``pool_factor`` as many.

        Raises:
            ValueError: the number cannot be divided so, with the nearest that can be.
        """
        batch, passes = self.per_device_train_batch_size, self.gradient_accumulation_steps
        if self.pairs_per_step is None and batch and passes:
            return batch, passes
        pairs = PAIRS_PER_STEP if self.pairs_per_step is None else self.pairs_per_step
        unit = devices * (batch or 1) * (passes or 1)
        known = {
            "processes": devices if devices > 1 else None, "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": passes,
        }  # fmt: skip
        product = " x ".join(f"{name} {number}" for name, number in known.items() if number)
        if batch and passes and pairs != unit:
            raise ValueError(f"pairs_per_step is {pairs}, but {product} make {unit}: leave one of them out")
        if pairs % unit:
            nearest = max(1, (2 * pairs + unit) // (2 * unit)) * unit
            raise ValueError(f"pairs_per_step {pairs} is no multiple of {product} = {unit}; nearest: {nearest}")
        share = pairs // devices
        if batch is None:
            batch = share // passes if passes else next(
                size for size in range(_PAIRS_PER_PASS, 0, -1) if share % size == 0
            )  # fmt: skip
        return batch, share // batch

    def faults_without_adapters(self) -> list[str]:
        """What needs LoRA, for a run that has none: neither ``lora_r`` nor a ``peft_config``."""
        if self.lora_r:
            return []
        names = ("use_dora", "use_rslora", "load_in_4bit", "load_in_8bit")
        faults = [f"{name} needs LoRA: set lora_r, 16 for instance" for name in names if getattr(self, name)]
        if not self.merge_adapters:
            faults.append("merge_adapters is false, but lora_r is 0: without LoRA there are no adapters")
        return faults

    def _against_plackett_luce(self) -> list[tuple[Any, str]]:
        """What is defined on pairs, with the reason; nothing under another loss."""
        no = "does not go with ranking_loss 'plackett_luce': it"
        claims = (
            (self.loss_type != "bradley_terry", f"loss_type {self.loss_type!r} {no} is another loss than the one that "
             "Plackett-Luce gives two responses"),
            (self.label_smoothing, f"label_smoothing {no} swaps the labels of pairs"),
            (self.center_rewards_coefficient, f"center_rewards_coefficient {no} is about the two rewards of a pair"),
        )  # fmt: skip
        return list(claims) if self.ranking_loss == "plackett_luce" else []

    def against_groups(self, layouts: set[str]) -> list[str]:
        """What rankings or scored responses among the training data exclude, each with the reason."""
        no = f"does not go with rows of the layout {' and '.join(sorted(layouts - {'pair'}))}: it"
        return _true_ones(
            (self.objective == "prioritized", f"objective 'prioritized' {no} chooses among pairs by their gap"),
            (self.augmentation == "rrm", f"augmentation 'rrm' {no} adds pairs to pairs"),
            (self.loss_type == "scaled_bradley_terry" and "ranking" in layouts,
             f"loss_type 'scaled_bradley_terry' {no} weighs pairs by their margin, of which rankings have none"),
            (layouts == {"scored"} and self.label_smoothing,
             f"label_smoothing {no} is about labels of comparisons, of which there are none"),
            (layouts == {"scored"} and self.center_rewards_coefficient,
             f"center_rewards_coefficient {no} is about the rewards of pairs; scores say where rewards lie"),
        )  # fmt: skip

    def _against_streaming(self) -> list[str]:
        """What streaming cannot do, each with the reason."""
        values: Any = self
        no = "does not go with streaming: it"
        return _true_ones(
            (values.max_steps <= 0,
             "streaming needs max_steps, because the number of pairs is not known before they are read (one pass: "
             "pairs / pairs_per_step)"),
            (self.objective == "prioritized", f"objective 'prioritized' {no} draws prompts from all the data"),
            (self.augmentation == "rrm", f"augmentation 'rrm' {no} draws responses from all the data"),
            (values.train_sampling_strategy == "group_by_length", f"group_by_length {no} sorts all pairs by length"),
            (self.score_weights is not None, f"score_weights {no} reads pairs"),
            (self.max_pairs_per_source is not None, f"max_pairs_per_source {no} chooses among all pairs of a source"),
        )  # fmt: skip


def _true_ones(*claims: tuple[Any, str]) -> list[str]:
    return [text for is_true, text in claims if is_true]


# Name -> dataclass field of what `RewardArguments` adds or gives another default, in order.
OUR_SETTINGS: dict[str, Any] = {spec.name: spec for spec in dataclasses.fields(RewardArguments)}
SETTINGS_BY_CONTENT = [name for name, spec in OUR_SETTINGS.items() if spec.metadata["by_content"]]  # they name files


def decides(name: str) -> bool | str:
    """Whether a setting decides what is learnt; the name of another setting: where that one is set."""
    if name in OUR_SETTINGS:
        return OUR_SETTINGS[name].metadata["decides"]
    if name.startswith(_DECIDE_WHICH_IS_BEST):
        return "load_best_model_at_end"
    return not name.startswith(_DECIDE_NOTHING)


def read_weights(value: Any) -> dict[str, float]:
    """Columns to weights, from YAML or from texts like ``helpfulness=0.65``; `ValueError` for what is none."""
    weights = {str(column): finite_number(weight) for column, weight in _assigned(value, "COLUMN=WEIGHT").items()}
    found = {column: weight for column, weight in weights.items() if weight is not None}
    if not found or len(found) < len(weights):
        raise ValueError(f"must be columns with a finite number each, COLUMN=WEIGHT, got {shown(value)}")
    return found


def read_columns(value: Any) -> dict[str, str]:
    """Fields to columns, from YAML or from texts like ``prompt=question``; `ValueError` for what is none."""
    columns = _assigned(value, "FIELD=COLUMN")
    if not all(isinstance(part, str) and part for pair in columns.items() for part in pair):
        raise ValueError(f"must name a column for each field, got {shown(value)}")
    return columns


def _assigned(value: Any, form: str) -> dict[str, Any]:
    """A mapping as it is, or of one or several texts in the form ``NAME=VALUE``."""
    if isinstance(value, dict):
        return value
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(item, str) and "=" in item for item in items):
        raise ValueError(f"must be {form}, several times if need be, got {shown(value)}")
    found = dict(item.split("=", 1) for item in items)
    if len(found) < len(items):
        raise ValueError(f"must be {form} with each name once, got {shown(value)}")
    return found
