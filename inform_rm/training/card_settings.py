"""Which settings of a run stand on the card of its model."""

from typing import Any

from inform_rm.training.reward_arguments import RewardTrainingArguments, settings_of, usual_settings

_ALWAYS = (
    "model", "data", "architecture", "objective", "loss_type", "learning_rate", "lr_scheduler_type", "warmup_steps",
    "num_train_epochs", "pairs_per_step", "seed",
)  # fmt: skip
_OF_INFORM = ("latent_dim", "decoder", "beta", "kl_reduction", "kl_warmup_steps")
_NEVER = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "eval_data", "overwrite", "push_to_hub",
    "hub_model_id", "logging_steps", "save_steps", "use_cpu",
)  # fmt: skip


def card_settings(args: RewardTrainingArguments, has_adapters: bool) -> dict[str, Any]:
    """The settings that say what any run of this kind is, and those that were changed."""
    now, usual = {**args.to_dict(), **settings_of(args)}, usual_settings()
    shown = {name: now[name] for name in _ALWAYS + (_OF_INFORM if args.architecture == "inform" else ())}
    changed = {name: value for name, value in settings_of(args).items() if value is not None and value != usual[name]}
    unused = {"num_train_epochs": args.max_steps > 0, "merge_adapters": not has_adapters}
    left_out = {*_NEVER, *(name for name, is_unused in unused.items() if is_unused)}
    return {name: value for name, value in {**shown, **changed}.items() if name not in left_out}
