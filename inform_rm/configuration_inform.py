"""Configuration of InfoRM reward models: a decoder backbone's own config plus the settings of the reward head."""

import math
from typing import Any

import transformers
from transformers import AutoConfig, PretrainedConfig

AUTO_MAP = {
    "AutoConfig": "configuration_inform.InfoRMConfig",
    "AutoModel": "modeling_inform.InfoRMForSequenceClassification",
    "AutoModelForSequenceClassification": "modeling_inform.InfoRMForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_inform.InfoRMForSequenceClassification",
}
# The arguments of `InfoRMConfig` about the head; the rest is the backbone.
HEAD_SETTINGS = ("architecture", "latent_dim", "decoder", "kl_reduction", "head_bias", "beta")
_CHOICES = {
    "architecture": ("inform", "standard"),
    "decoder": ("mlp", "linear"),
    "kl_reduction": ("sum", "averaged_moments"),
    "kl_reduction_version": (1, 2),
}


class InfoRMConfig(PretrainedConfig):
    """Settings of a reward model with a variational information bottleneck (InfoRM, arXiv:2402.09345).

    Args:
        text_config: config of the decoder backbone, as an object or a dict; a dict without ``model_type`` is read as
            Llama, which is also the default.
        latent_dim: K, latent dimensions of the bottleneck (paper: 32, 64 or 128).
        beta: weight of the KL term in the loss of eq. 25 (paper: 0.1, 0.01 or 0.001).
        decoder: ``"mlp"`` (one hidden layer) or ``"linear"`` map from latent to reward.
        kl_reduction: ``"sum"`` of the KL over latent dimensions (the paper's bound), or ``"averaged_moments"``: the
            authors' released code, which averages mean and log variance over dimensions first. A ``beta`` tuned for
            one does not suit the other.
        kl_reduction_version: what ``"averaged_moments"`` weighs. 2: the authors' released term, ``beta`` times the
            mean over both responses of a pair; 1: their sum, twice that, which a ``config.json`` without this entry
            means. ``"sum"`` is the sum over both (eq. 25) in either.
        architecture: ``"inform"``, or ``"standard"`` for one linear reward head and no bottleneck (the baseline).
        loss_type: the pair loss that the model was trained with, a name of `inform_rm.training.losses.PAIR_LOSSES`.
        head_bias: whether the head of ``"standard"`` adds a constant, as the value heads of TRL and LLaMA-Factory do.

    Raises:
        ValueError: naming every faulty setting at once.

    Example:
        >>> InfoRMConfig(latent_dim=64, beta=0.01).latent_dim
        64
    """

    model_type = "inform"
    sub_configs = {"text_config": AutoConfig}
    # In config.json the setting is called latent_decoder: transformers takes any attribute named decoder for the
    # config of a second text model, also where it reads the file without this class (a Trainer that resumes).
    attribute_map = {"decoder": "latent_decoder"}

    def __init__(
        self,
        text_config: "PretrainedConfig | dict[str, Any] | None" = None,
        latent_dim: int = 128,
        beta: float = 0.1,
        decoder: str = "mlp",
        kl_reduction: str = "sum",
        architecture: str = "inform",
        head_bias: bool = False,
        loss_type: str = "bradley_terry",
        kl_reduction_version: int = 2,
        **kwargs: Any,
    ):
        self.latent_dim = latent_dim
        self.beta = beta
        self.latent_decoder = kwargs.pop("latent_decoder", decoder)
        self.kl_reduction = kl_reduction
        self.kl_reduction_version = kl_reduction_version
        self.architecture = architecture
        self.head_bias = head_bias
        self.loss_type = loss_type
        self._check_settings()
        if text_config is None or isinstance(text_config, dict):
            settings = dict(text_config or {})
            text_config = AutoConfig.for_model(settings.pop("model_type", "llama"), **settings)
            _translate_rope_parameters(text_config)
        self.text_config = text_config

        # A reward is one unbounded number: anything but these makes a text-classification pipeline apply a sigmoid.
        if kwargs.get("id2label") is None and kwargs.get("num_labels") is None:
            kwargs["num_labels"] = 1
        if kwargs.get("problem_type") is None:
            kwargs["problem_type"] = "regression"
        if kwargs.get("pad_token_id") is None:
            kwargs["pad_token_id"] = getattr(text_config, "pad_token_id", None)
        super().__init__(**kwargs)
        if self.num_labels != 1:
            raise ValueError(f"num_labels is {self.num_labels}; a reward model has one output. Leave num_labels out.")
        # Registration for remote code writes two of these four; a loaded config brings its own (with its repository).
        self.auto_map = {**AUTO_MAP, **(getattr(self, "auto_map", None) or {})}

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PretrainedConfig:
        """The backbone's config; transformers would search for it and stumble over our ``decoder`` setting."""
        return self.text_config

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As of `PretrainedConfig`; what an earlier version wrote keeps its ``kl_reduction_version``, 1."""
        return super().from_dict({"kl_reduction_version": 1, **config_dict}, **kwargs)

    @property
    def kl_share(self) -> float:
        """What ``beta`` times the KL of each response counts in the loss of its pair: 1, or 0.5 for a mean of two."""
        return 0.5 if self.kl_reduction == "averaged_moments" and self.kl_reduction_version == 2 else 1.0

    def _check_settings(self) -> None:
        faults = []
        if type(self.latent_dim) is not int or self.latent_dim < 1:
            faults.append(f"latent_dim must be a whole number of at least 1, got {self.latent_dim!r}")
        is_number = isinstance(self.beta, int | float) and not isinstance(self.beta, bool)
        if not is_number or not 0 <= self.beta < math.inf:
            faults.append(f"beta must be a finite number of at least 0, got {self.beta!r}")
        if not isinstance(self.head_bias, bool):
            faults.append(f"head_bias must be true or false, got {self.head_bias!r}")
        elif self.head_bias and self.architecture == "inform":
            faults.append('head_bias needs architecture="standard": the decoder of "inform" has its own constants')
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                faults.append(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
        if faults:
            raise ValueError("InfoRMConfig: " + "; ".join(faults) + ".")


def _translate_rope_parameters(text_config: PretrainedConfig) -> None:
    """Give transformers 4 the rotary settings that transformers 5 saved: it does not know ``rope_parameters``.

    Without this it would take its defaults, and every reward would be wrong in silence.
    """
    rope = getattr(text_config, "rope_parameters", None)
    if rope is None or int(transformers.__version__.split(".")[0]) >= 5:
        return
    if any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(
            f"The {text_config.model_type} backbone was saved with rotary settings per layer type, which transformers "
            f"{transformers.__version__} cannot read. Load it with transformers 5."
        )
    base, share = rope.get("rope_theta"), rope.get("partial_rotary_factor")
    named = {"rope_theta": base, "rotary_emb_base": base, "partial_rotary_factor": share, "rotary_pct": share}
    for name, value in named.items():
        if value is not None:
            setattr(text_config, name, value)
    if rope.get("rope_type", "default") != "default":
        text_config.rope_scaling = {key: value for key, value in rope.items() if key not in named}
