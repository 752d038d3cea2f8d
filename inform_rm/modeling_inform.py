"""InfoRM reward models: any decoder backbone of transformers with a variational information-bottleneck reward head.

Source of every formula: "InfoRM: Mitigating Reward Hacking in RLHF via Information-Theoretic Reward Modeling",
arXiv:2402.09345. Shapes below: B sequences, T tokens, H hidden size of the backbone, K latent dimensions.
"""

import copy
import inspect
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModel,
    PreTrainedModel,
)
from transformers.utils import ModelOutput

from .configuration_inform import HEAD_SETTINGS, InfoRMConfig

logger = logging.getLogger(__name__)

# Where checkpoints that also see images keep the text model, and what its weights are called here.
_TEXT_MODEL_KEYS = {
    r"^(?:model\.)?(?:language_model|text_model)\.lm_head\.": "lm_head.",
    r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.)?": "model.",
}
# The draws behind `reward_samples` come from this seed and are the same for every row, so that an uncertainty depends
# neither on batch mates nor on the caller's random state.
_REWARD_SAMPLE_SEED = 0


def kl_to_standard_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence of N(mean, exp(log_variance)) from N(0, I), in nats, one value per sequence.

    ``0.5 * sum_k(mean_k**2 + exp(log_variance_k) - 1 - log_variance_k)``: the bound of arXiv:2402.09345, eq. 5 and 25,
    summed over the latent dimensions. With one "dimension" holding the averaged moments it is the authors' released
    variant (``kl_reduction="averaged_moments"``).

    Args:
        mean: ``(B, K)`` posterior means.
        log_variance: ``(B, K)`` natural log of the posterior variances.

    Returns:
        ``(B,)`` float32, never negative.

    Example:
        >>> kl_to_standard_normal(torch.ones(1, 4), torch.zeros(1, 4))
        tensor([2.])
    """
    mean, log_variance = _at_least_float32(mean), _at_least_float32(log_variance)
    # expm1(v) - v is exp(v) - 1 - v without the cancellation near v = 0.
    return 0.5 * (mean.square() + torch.expm1(log_variance) - log_variance).sum(dim=-1)


def bradley_terry_loss(chosen_rewards: Tensor, rejected_rewards: Tensor, margin: Tensor | None = None) -> Tensor:
    """Bradley-Terry loss ``-log sigmoid(r_w - r_l - margin)``, mean over pairs, in nats (arXiv:2402.09345, eq. 25).

    A scalar, at least float32; arguments and errors are those of `pair_gaps`.

    Example:
        >>> bradley_terry_loss(torch.tensor([1.0]), torch.tensor([1.0]))
        tensor(0.6931)
    """
    return -functional.logsigmoid(pair_gaps(chosen_rewards, rejected_rewards, margin)).mean()


def pair_gaps(chosen_rewards: Tensor, rejected_rewards: Tensor, margin: Tensor | None = None) -> Tensor:
    """``r_w - r_l - margin`` of each pair, ``(B,)``, at least float32: what every loss on pairs is a function of.

    Args:
        chosen_rewards: ``(B,)`` or ``(B, 1)`` rewards of the preferred responses.
        rejected_rewards: rewards of the other responses, same shape.
        margin: by how much the chosen reward should win, one number per pair; ``None`` means 0.

    Raises:
        ValueError: if the numbers of rewards (or margins) differ.
    """
    if chosen_rewards.shape != rejected_rewards.shape:
        raise ValueError(
            f"chosen_rewards has shape {tuple(chosen_rewards.shape)} and rejected_rewards "
            f"{tuple(rejected_rewards.shape)}; expected the same shape, one reward per response of each pair."
        )
    gaps = _at_least_float32(chosen_rewards).flatten() - _at_least_float32(rejected_rewards).flatten()
    if margin is None:
        return gaps
    if margin.numel() != gaps.numel():
        raise ValueError(f"margin has {margin.numel()} values for {gaps.numel()} pairs; expected one a pair.")
    return gaps - margin.to(gaps).flatten()


class RewardLinear(nn.Linear):
    """A linear layer that computes in at least float32, also under autocast and with half-precision weights.

    Rewards of good and bad responses often differ by less than the spacing of bfloat16 numbers (0.4 %).

    ``initial_gain`` is the root mean square of a fresh layer's output for inputs of 1, ``initial_bias`` its constant;
    several values divide the outputs into as many equal parts. The last half of a fresh weight along the dimension
    ``mirrored`` is minus its first half.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, initial_gain: tuple[float, ...] = (1.0,),
        initial_bias: tuple[float, ...] = (0.0,), mirrored: int | None = None,
    ):  # fmt: skip
        super().__init__(in_features, out_features, bias=bias)
        self.initial_gain, self.initial_bias, self.mirrored = initial_gain, initial_bias, mirrored

    def forward(self, hidden: Tensor) -> Tensor:
        """``(..., in_features)`` of any float type to ``(..., out_features)`` in float32 (float64 stays float64)."""
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            weight = _at_least_float32(self.weight)
            bias = None if self.bias is None else self.bias.to(weight.dtype)
            return functional.linear(hidden.to(weight.dtype), weight, bias)


class InfoRMHead(nn.Module):
    """Information-bottleneck reward head: hidden state -> Gaussian latent -> reward (arXiv:2402.09345, eq. 15 and 19).

    ``(mean, log_variance) = encoder(h)``; ``s = mean + exp(log_variance / 2) * eps`` with ``eps ~ N(0, I)`` while
    training and ``s = mean`` in eval; ``r = decoder(s)``.
    """

    def __init__(self, config: InfoRMConfig, hidden_size: int):
        super().__init__()
        # Means as large as the hidden states (root mean square 1 to 5), with small variances, stand out from the noise
        # from the first step; the KL term, hundreds of nats then, needs a warm-up.
        self.encoder = RewardLinear(hidden_size, 2 * config.latent_dim, True, (1.0, 0.1), initial_bias=(0.0, -4.0))
        if config.decoder == "linear":
            self.decoder: nn.Module = RewardLinear(config.latent_dim, 1)
        else:
            # Units in pairs of opposite sign make the start linear (but for one unit of an odd K), gelu(x) - gelu(-x)
            # = x: what chosen and rejected have in common, most of the hidden state, then cancels in their difference.
            self.decoder = nn.Sequential(
                RewardLinear(config.latent_dim, config.latent_dim, mirrored=0),
                nn.GELU(),
                RewardLinear(config.latent_dim, 1, initial_gain=(0.4,), mirrored=1),
            )

    def encode(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """``(..., H)`` hidden states to ``(..., K)`` latent means and log variances, both at least float32."""
        mean, log_variance = self.encoder(hidden).chunk(2, dim=-1)
        return mean, log_variance

    def decode(self, latent: Tensor) -> Tensor:
        """``(..., K)`` latents to ``(..., 1)`` rewards."""
        return self.decoder(latent)

    def forward(
        self,
        hidden: Tensor,
        return_latents: bool = False,
        reward_samples: int | None = None,
        latent_noise: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """``(B, T, H)`` or ``(B, H)`` hidden states to rewards ``(B, T, 1)`` or ``(B, 1)``.

        Args:
            hidden: hidden states of the backbone.
            return_latents: return ``(rewards, latent_mean, latent_log_variance, reward_std)`` instead.
            reward_samples: average the reward over this many draws of the latent; ``reward_std`` is then their sample
                standard deviation, else ``None``.
            latent_noise: the draws of eps while training, in the shape of the means; ``None`` draws them here.
        """
        mean, log_variance = self.encode(hidden)
        reward_std = None
        if reward_samples is not None:
            # Drawn on the CPU: one seed then means the same draws on every device.
            generator = torch.Generator().manual_seed(_REWARD_SAMPLE_SEED)
            noise = torch.randn(reward_samples, mean.shape[-1], generator=generator).to(mean)
            draws = self.decode(mean.unsqueeze(-2) + (0.5 * log_variance).exp().unsqueeze(-2) * noise)
            rewards, reward_std = draws.mean(dim=-2), draws.std(dim=-2)
        elif self.training:
            noise = torch.randn_like(mean) if latent_noise is None else latent_noise.to(mean)
            rewards = self.decode(mean + (0.5 * log_variance).exp() * noise)
        else:
            rewards = self.decode(mean)
        return (rewards, mean, log_variance, reward_std) if return_latents else rewards


@dataclass
class InfoRMOutput(ModelOutput):
    """Output of an InfoRM reward model.

    Args:
        loss: scalar, eq. 25 of arXiv:2402.09345; only with ``return_loss=True``.
        logits: ``(B, 1)`` rewards, at least float32.
        latent_mean: ``(B, K)`` posterior means, at least float32; ``None`` for ``architecture="standard"``.
        latent_log_variance: ``(B, K)`` natural log of the posterior variances; ``None`` likewise.
        kl: ``(B,)`` KL divergence of each posterior from N(0, I) in nats; ``None`` likewise.
        reward_std: ``(B, 1)`` standard deviation of the reward over ``reward_samples`` draws of the latent.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    latent_mean: Tensor | None = None
    latent_log_variance: Tensor | None = None
    kl: Tensor | None = None
    reward_std: Tensor | None = None


class InfoRMForSequenceClassification(PreTrainedModel):
    """A reward model: decoder backbone (``model``) and reward head (``score``) on the last token's hidden state.

    The last token is the rightmost 1 of the attention mask, so the reward does not depend on padding side, padding
    length or on which token id pads. Without a mask every token counts as real.

    Args:
        config: of backbone and head.
    """

    config_class = InfoRMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _loss_function: "Callable[..., Tensor] | None" = None
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]
    # A head in bfloat16 would round what training changes and what tells rewards apart.
    _keep_in_fp32_modules_strict = ["score"]
    # A causal-LM checkpoint brings its output layer (`embed_out` in GPT-NeoX, `head` in RWKV, `decoder` in
    # ModernBERT); a reward model has no use for it.
    _keys_to_ignore_on_load_unexpected = [r"^(lm_head|embed_out)\.", r"^head\.weight$", r"^decoder\.(weight|bias)$"]

    def __init__(self, config: InfoRMConfig):
        super().__init__(config)
        self.num_labels = 1
        if getattr(config.text_config, "attn_logit_softcapping", None) and config._attn_implementation == "sdpa":
            # PyTorch's kernel has no soft cap; versions of transformers before 5.23 take it for Gemma 2 all the same.
            config.text_config._attn_implementation = "eager"
        self.model = AutoModel.from_config(config.text_config)
        self._backbone_takes_positions = "position_ids" in inspect.signature(self.model.forward).parameters
        # OPT's smallest models project their last hidden states to another size.
        hidden_size = getattr(config.text_config, "word_embed_proj_dim", None) or config.text_config.hidden_size
        if config.architecture == "inform":
            self.score: nn.Module = InfoRMHead(config, hidden_size)
        else:
            self.score = RewardLinear(hidden_size, 1, bias=config.head_bias)
        if torch.get_default_dtype().itemsize < 4:  # from_pretrained and from_config set it: a fresh head is float32
            self.score.float()
        self.post_init()

    @classmethod
    def from_backbone(cls, model_id_or_path: str, **kwargs: Any) -> Any:
        """Start from a causal-LM or base checkpoint: every backbone weight loaded, the head fresh.

        Of a checkpoint that also sees images or hears (Gemma 3, Mistral 3, Qwen-VL, Llama 4, ...) the text model is
        taken; how many other weights were left out is logged.

        Args:
            model_id_or_path: Hub id or folder of the backbone.
            kwargs: settings of `InfoRMConfig` (latent_dim, beta, decoder, kl_reduction, architecture, head_bias) and
                keywords of ``from_pretrained`` (dtype, device_map, quantization_config, revision, ...).
                ``use_safetensors`` is True unless given.

        Returns:
            The model; with ``output_loading_info=True`` also the loading info, as ``from_pretrained`` does.

        Raises:
            ValueError: if the checkpoint is an InfoRM model already, is no decoder, lacks backbone weights, or has
                others.
        """
        hub_keys = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "trust_remote_code")
        hub_kwargs = {key: kwargs[key] for key in hub_keys if key in kwargs}
        whole_config = AutoConfig.from_pretrained(model_id_or_path, **hub_kwargs)
        text_config = _text_config_of_decoder(whole_config, model_id_or_path)
        is_multimodal = text_config is not whole_config
        settings = {key: kwargs.pop(key) for key in HEAD_SETTINGS if key in kwargs}
        config = cls.config_class(text_config=text_config, **settings)
        quantization: Any = copy.deepcopy(kwargs.get("quantization_config"))
        if hasattr(quantization, "llm_int8_skip_modules"):
            # A quantised head would have no checkpoint weights to quantise, and rewards need its precision.
            quantization.llm_int8_skip_modules = [*(quantization.llm_int8_skip_modules or []), "score"]
            kwargs["quantization_config"] = quantization
        key_mapping = _TEXT_MODEL_KEYS if is_multimodal else _backbone_keys(text_config, cls.base_model_prefix)
        if key_mapping:
            kwargs["key_mapping"] = {**key_mapping, **kwargs.get("key_mapping", {})}
        wants_loading_info = kwargs.pop("output_loading_info", False)
        kwargs = {"use_safetensors": True, **kwargs, "config": config, "output_loading_info": True}
        loaded: Any = cls.from_pretrained(model_id_or_path, **kwargs)
        model, loading = loaded
        # transformers would otherwise write the next checkpoint under the renamed backbone's old key names, and
        # reloading that would start from random weights.
        model._weight_conversions = None
        unexpected = [key for key in loading["unexpected_keys"] if not key.startswith("score.")]
        if is_multimodal:
            parts = {key.split(".")[0] for key in model.model.state_dict()}
            of_text = [key for key in unexpected if key.removeprefix("model.").split(".")[0] in parts]
            logger.warning(
                "%s is a %s checkpoint: its text model is taken, %d weights of other parts are left out.",
                model_id_or_path,
                whole_config.model_type,
                len(unexpected) - len(of_text),
            )
            unexpected = of_text
        faults = {
            "missing": [key for key in loading["missing_keys"] if not key.startswith("score.")],
            "unexpected": unexpected,
            "of another shape": [str(key) for key in loading["mismatched_keys"]],
        }
        if any(faults.values()):
            found = "; ".join(f"{len(keys)} {kind} (first: {min(keys)})" for kind, keys in faults.items() if keys)
            raise ValueError(
                f"{model_id_or_path} does not hold the weights of a {text_config.model_type} backbone: {found}. "
                "Pass a complete causal-LM or base-model checkpoint."
            )
        return (model, loading) if wants_loading_info else model

    def initialize_weights(self) -> None:
        """Initialise what the checkpoint does not hold, the backbone by its own rules.

        Under the rules for a class outside of transformers, Falcon-H1's multipliers, which no checkpoint holds, would
        stay what the memory happened to contain.
        """
        self.model.initialize_weights()
        super().initialize_weights()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RewardLinear):
            gains = module.initial_gain
            with torch.no_grad():
                if not getattr(module.weight, "_is_hf_initialized", False):
                    for rows, gain in zip(module.weight.chunk(len(gains)), gains, strict=True):
                        rows.normal_(std=gain / math.sqrt(module.in_features))
                    if module.mirrored is not None:
                        half = module.weight.shape[module.mirrored] // 2
                        first = module.weight.narrow(module.mirrored, 0, half)
                        module.weight.narrow(module.mirrored, -half, half).copy_(-first)
                if module.bias is not None and not getattr(module.bias, "_is_hf_initialized", False):
                    for part, value in zip(
                        module.bias.chunk(len(module.initial_bias)), module.initial_bias, strict=True
                    ):
                        part.fill_(value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        margin: Tensor | None = None,
        return_loss: bool = False,
        reward_samples: int | None = None,
        packed_segments: list[list[int]] | None = None,
        pooled_positions: Tensor | None = None,
        latent_noise: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> "InfoRMOutput | tuple[Tensor, ...]":
        """Rewards of a batch of sequences.

        Args:
            input_ids: ``(B, T)`` token ids.
            attention_mask: ``(B, T)``, 1 for real tokens, 0 for padding on either side.
            position_ids: ``(B, T)``, positions of the tokens; counted from the mask if not given.
            inputs_embeds: ``(B, T, H)`` in place of ``input_ids``.
            margin: ``(B / 2,)``, used with ``return_loss``.
            return_loss: rows are chosen responses (first half) and rejected ones (second half, same order); compute
                `loss_function` ``+ beta * (kl_w + kl_l)``, mean over pairs (eq. 25); see ``config.kl_share``.
            reward_samples: at least 2; ``logits`` becomes the mean over that many draws of the latent and
                ``reward_std`` their standard deviation.
            packed_segments: handed to the backbone's attention, for rows that hold several sequences
                (`inform_rm.scoring.packing`); needs ``pooled_positions``.
            pooled_positions: ``(N,)`` places in the single row of ``input_ids`` at which rewards are read off, instead
                of at the last token: the output then has N rows.
            latent_noise: ``(N, K)`` draws from N(0, I) for the N rewards while training; drawn here if not given.
            return_dict: ``False`` returns a tuple without the absent fields.
            kwargs: `output_attentions`, `use_cache` and the like are accepted and ignored: other people's training
                loops pass keywords of their own.

        Raises:
            ValueError: on a mask that is not ``(B, T)``, an odd number of rows with ``return_loss``, or
                ``reward_samples`` that the model cannot give.
        """
        embedded = input_ids if input_ids is not None else inputs_embeds
        if embedded is None:
            raise ValueError("Pass input_ids or inputs_embeds.")
        if attention_mask is not None:
            if attention_mask.shape != embedded.shape[:2]:
                raise ValueError(
                    f"attention_mask has shape {tuple(attention_mask.shape)}; expected {tuple(embedded.shape[:2])}, "
                    "one number per token."
                )
            attention_mask, input_ids, position_ids, inputs_embeds = _with_padding_at_the_end(
                attention_mask, input_ids, position_ids, inputs_embeds
            )
            if position_ids is None:  # positions count real tokens, also where a mask has gaps
                position_ids = (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)
        if (packed_segments and pooled_positions is None) or (pooled_positions is not None and len(embedded) != 1):
            raise ValueError(
                f"packed_segments and pooled_positions go together, with one row of input_ids; got {len(embedded)}."
            )
        is_inform = self.config.architecture == "inform"
        if reward_samples is not None and not is_inform:
            raise ValueError('reward_samples needs architecture="inform": a standard reward head has no latent.')
        if reward_samples is not None and reward_samples < 2:
            raise ValueError(f"reward_samples must be at least 2 for a standard deviation, got {reward_samples}.")
        backbone_inputs: dict[str, Any] = {"attention_mask": attention_mask, "inputs_embeds": inputs_embeds}
        if self._backbone_takes_positions:
            backbone_inputs["position_ids"] = position_ids
        if packed_segments is not None:
            backbone_inputs["packed_segments"] = packed_segments
        hidden = self.model(input_ids=input_ids, **backbone_inputs, use_cache=False).last_hidden_state
        pooled = _last_token(hidden, attention_mask) if pooled_positions is None else hidden[0, pooled_positions]

        mean = log_variance = reward_std = kl = loss = None
        if is_inform:
            rewards, mean, log_variance, reward_std = self.score(
                pooled, return_latents=True, reward_samples=reward_samples, latent_noise=latent_noise
            )
            averages = self.config.kl_reduction == "averaged_moments"
            moments = [part.mean(dim=-1, keepdim=True) if averages else part for part in (mean, log_variance)]
            kl = kl_to_standard_normal(*moments)
        else:
            rewards = self.score(pooled)
        if return_loss:
            if len(rewards) % 2:
                raise ValueError(f"return_loss needs as many chosen as rejected rows, got {len(rewards)} rows.")
            loss = self.loss_function(*rewards.chunk(2), margin)
            if kl is not None:
                loss = loss + self.config.beta * 2.0 * self.config.kl_share * kl.mean()  # of a pair: kl_w + kl_l
        output = InfoRMOutput(loss, rewards, mean, log_variance, kl, reward_std)
        return output.to_tuple() if return_dict is False else output

    @property
    def loss_function(self) -> Callable[..., Tensor]:
        """The pair loss of ``return_loss``: Bradley-Terry, or what was assigned.

        Raises:
            ValueError: the model was trained with another one (``config.loss_type``) and none was assigned.
        """
        if self._loss_function is None and self.config.loss_type != "bradley_terry":
            raise ValueError(
                f"return_loss: loss_type={self.config.loss_type!r} is not part of the model. Assign it: "
                "model.loss_function = inform_rm.training.losses.PAIR_LOSSES[...]."
            )
        return self._loss_function or bradley_terry_loss

    @loss_function.setter
    def loss_function(self, function: Callable[..., Tensor]) -> None:
        self._loss_function = function


def _text_config_of_decoder(config: Any, name: str) -> Any:
    """The config of the text backbone: `config` itself, or the part of a multimodal one; refuses what is none."""
    if config.model_type == InfoRMConfig.model_type:
        raise ValueError(f"{name} is an InfoRM reward model, not a backbone. Load it with from_pretrained.")
    text_config, unfit = config.get_text_config(), None
    kind = text_config.model_type
    if getattr(config, "is_encoder_decoder", False):
        unfit = f"an encoder-decoder model ({config.model_type}); a reward is read at the last token of a decoder"
    elif type(text_config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(text_config, "is_decoder", False):
        unfit = f"an encoder ({kind}), whose tokens see what follows them; a reward is read at a decoder's last token"
    elif kind == "cpmant":  # of the decoders of transformers the only one (docs/reference/backbones.md)
        unfit = "a cpmant model: its states depend on the padding after a token"
    if unfit:
        raise ValueError(f"{name} is {unfit}. Pass a causal language model.")
    if text_config is not config and getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{name} is quantized; its text model can be taken out of the unquantized checkpoint only.")
    return text_config


def _backbone_keys(text_config: Any, prefix: str) -> dict[str, str]:
    """How the weights of a causal LM have to be renamed ("gpt_neox.", "transformer.", ...): none or one pattern."""
    theirs = getattr(MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text_config), None), "base_model_prefix", prefix)
    return {} if theirs == prefix else {rf"^{theirs}\.": f"{prefix}."}


def _with_padding_at_the_end(attention_mask: Tensor, *tensors: Tensor | None) -> list[Any]:
    """Rows ``(B, T)`` or ``(B, T, H)`` turned so that the padding before their first token comes after the last.

    A causal backbone gives tokens the same states whatever follows them. Padding before them is another matter: layers
    with a state (Mamba, RWKV), convolutions and position biases may see it, whatever the mask says.
    """
    length = attention_mask.shape[1]
    first = attention_mask.bool().int().argmax(dim=1, keepdim=True)
    places = (torch.arange(length, device=attention_mask.device) + first) % length

    def turn(rows: Tensor) -> Tensor:
        return rows.gather(1, places if rows.dim() == 2 else places[..., None].expand_as(rows))

    return [None if rows is None else turn(rows) for rows in (attention_mask, *tensors)]


def _last_token(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Hidden states ``(B, T, H)`` at the rightmost 1 of each row of the mask: ``(B, H)``."""
    if attention_mask is None:
        return hidden[:, -1]
    positions = torch.arange(hidden.shape[1], device=attention_mask.device)
    last = (positions * attention_mask.bool()).argmax(dim=-1).to(hidden.device)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
