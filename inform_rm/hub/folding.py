"""Folding: a reward head that is linear in eval becomes a row vector, its model a plain classifier of transformers.

In eval an InfoRM model with the linear decoder computes ``W_d (W_mu h + b_mu) + b_d`` of the last token's hidden state
h (arXiv:2402.09345, eq. 15 and 19 with s = mu). That is ``w h + c`` with ``w = W_d W_mu`` and ``c = W_d b_mu + b_d``.
The classifiers of transformers have a bias-free ``score``: they hold w. The constant c, equal for every response, is
written beside it as ``reward_offset``.
"""

import copy
import json
import logging
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from inform_rm.data.encoding import encode
from inform_rm.errors import InputError
from inform_rm.hub.cards import TAGS, card_text
from inform_rm.hub.engine_inputs import (
    EngineInput,
    compare_engine_inputs,
    drop_bos_token,
    reads_the_same,
    vllm_command,
)
from inform_rm.scoring.reward_models import fingerprint_model
from inform_rm.util.files import atomic_write_text, write_json
from inform_rm.util.page import Markdown, fill_markdown

logger = logging.getLogger(__name__)

# Relative to the largest reward of the check: float32 arithmetic in another order. Anything else is another model.
_CHECK_TOLERANCE = 1e-4
# Texts whose last token shows what can end a row; no vocabulary holds the last one (a private-use character).
_EXAMPLE_ENDS = ("Yes.", "a", "\U000f0000")


def fold_head(model: Any) -> tuple[Tensor, float]:
    """Row vector ``(1, H)`` and constant of an InfoRM model's reward in eval, ``weight @ h + offset``, in float64.

    `InputError` if the reward is not linear in the hidden state.
    """
    config, head = model.config, model.score
    with torch.no_grad():
        if config.architecture == "standard":
            return head.weight.double(), 0.0 if head.bias is None else head.bias.double().item()
        if config.decoder != "linear":
            raise InputError(
                f"folded: this model's decoder is {config.decoder!r}, so its reward is no linear function of the "
                "hidden state and no plain classifier of transformers computes it. Train with decoder: linear, or "
                "export without folding."
            )
        latent_mean = slice(0, config.latent_dim)  # the encoder's other half are log variances
        decoder = head.decoder.weight.double()
        weight = decoder @ head.encoder.weight[latent_mean].double()
        offset = decoder @ head.encoder.bias[latent_mean].double() + head.decoder.bias.double()
        return weight, offset.item()


def write_folded_model(model: Any, tokenizer: Any, folder: str | Path, *, source: str | None = None) -> None:
    """Write model, tokenizer and card of the folded model into an empty folder.

    The backbone's weights are written as they are. The row vector is written in float32 also beside a half-precision
    backbone: an engine that keeps its head in float32 then gives rewards that differ by less than bfloat16's 0.4 %.
    The tokenizer may get a pad token, and the model's embeddings then a row. ``source`` is the model's Hub id, for the
    card; ``None`` for a local folder, whose name is not told.

    Raises:
        InputError: if the model cannot be folded: its decoder is not linear, it is quantized, transformers has no
            classifier for its backbone or one of another form, the classifier gives other rewards, or the tokenizer
            is no longer the same once it is saved.
    """
    folder = Path(folder)
    if any(getattr(config, "quantization_config", None) for config in (model.config, model.config.get_text_config())):
        raise InputError(
            "folded: this model's backbone is quantized; its weights only mean something to the library that packed "
            "them. Fold the adapters of a QLoRA run (merge_adapters: false) or a model in full precision."
        )
    weight, offset = fold_head(model)
    fingerprint = fingerprint_model(model)
    added_pad_token = _separate_pad_token(tokenizer, model)
    classifier = _classifier(model, weight, offset, tokenizer.pad_token_id)
    difference = _largest_difference(model, classifier, offset)
    classifier.save_pretrained(folder)
    _add_rope_settings_of_transformers_4(folder / "config.json")
    dropped_bos_token, engine_inputs = _save_tokenizer(tokenizer, folder)
    metadata = ModelCardData(
        library_name="transformers", pipeline_tag="text-classification", tags=list(TAGS), base_model=source
    )
    body = fill_markdown(
        "folded_card.md.j2",
        is_inform=model.config.architecture == "inform",
        backbone=model.config.get_text_config().model_type,
        class_name=type(classifier).__name__,
        fingerprint=fingerprint,
        offset=offset,
        largest_difference=f"{difference:.1e}",
        added_pad_token=added_pad_token,
        dropped_bos_token=dropped_bos_token,
        engine_inputs=engine_inputs,
        vllm_command=Markdown(vllm_command("NAME", type(classifier).__name__, offset)),
    )
    atomic_write_text(folder / "README.md", card_text(metadata, body))


def _separate_pad_token(tokenizer: Any, model: Any) -> str | None:
    """Give the tokenizer a pad token that no row ends with, unless it has one; return the token added.

    The classifiers of transformers read the reward at the last token that is not ``pad_token_id``. Where the end token
    pads too, they would read it one token early, in every row.
    """
    last_ids = {tokenizer.eos_token_id}
    for text in _EXAMPLE_ENDS:
        last_ids.add(encode(tokenizer, text, text).input_ids[-1])
        last_ids.update(tokenizer(text, add_special_tokens=False)["input_ids"])
    if tokenizer.pad_token_id not in last_ids:
        return None
    name = "<|pad|>"
    while name in tokenizer.get_vocab():
        name = f"<|{name}|>"
    logger.warning(
        "folded: the pad token %r can be the last token of a row, where a classifier of transformers would not read "
        "the reward. %r is added for padding.",
        tokenizer.pad_token,
        name,
    )
    tokenizer.add_special_tokens({"pad_token": name})
    embeddings = model.get_input_embeddings()
    if tokenizer.pad_token_id >= embeddings.num_embeddings:
        old = embeddings.num_embeddings
        model.resize_token_embeddings(tokenizer.pad_token_id + 1, mean_resizing=False)
        with torch.no_grad():
            model.get_input_embeddings().weight[old:] = 0.0  # masked wherever it occurs
    return name


def _classifier(model: Any, weight: Tensor, offset: float, pad_token_id: int) -> Any:
    """The classifier that transformers has for the backbone, around the model's own backbone and the row vector."""
    config = copy.deepcopy(model.config.get_text_config())
    kind = config.model_type
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise InputError(f"folded: transformers has no sequence classifier for {kind} backbones. Export without it.")
    config.num_labels = 1
    config.problem_type = "regression"  # pipelines and servers then apply no sigmoid
    config.pad_token_id = pad_token_id
    config.reward_offset = offset
    with torch.device("meta"):
        classifier: Any = AutoModelForSequenceClassification.from_config(config)
    prefix = classifier.base_model_prefix
    expected = {f"{prefix}.{name}" for name in model.model.state_dict()} | {"score.weight"}
    found = set(classifier.state_dict())
    if found != expected or classifier.score.weight.shape != weight.shape:
        other = sorted(found ^ expected)
        raise InputError(
            f"folded: {type(classifier).__name__} is not a {kind} backbone with a bias-free linear head named score "
            f"({other[0] if other else 'its head has another size'}). Export without folding."
        )
    setattr(classifier, prefix, model.model)
    classifier.score.weight = nn.Parameter(weight.float(), requires_grad=False)
    return classifier.eval()


def _largest_difference(model: Any, classifier: Any, offset: float) -> float:
    """Largest difference between original and folded reward (+ offset) on three padded rows of random tokens."""
    config = classifier.config
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size - 1, (3, 12), generator=generator)
    ids += (ids >= config.pad_token_id).long()  # any id but that one
    mask = torch.ones_like(ids)
    for row, length in enumerate((12, 7, 1)):
        mask[row, length:] = 0
    ids[mask == 0] = config.pad_token_id
    in_float32 = classifier.score.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))
    try:
        with torch.no_grad():
            original = model(input_ids=ids, attention_mask=mask).logits
            folded = classifier(input_ids=ids, attention_mask=mask).logits
    finally:
        in_float32.remove()
    difference = (folded.double() + offset - original.double()).abs().max().item()
    if not difference <= _CHECK_TOLERANCE * max(1.0, original.abs().max().item(), folded.abs().max().item()):
        raise InputError(
            f"folded: {type(classifier).__name__} gives other rewards than the model (they differ by up to "
            f"{difference:.3g} on random tokens): it does more than a linear map of the last hidden state. Export "
            "without folding."
        )
    return difference


def _add_rope_settings_of_transformers_4(path: Path) -> None:
    """Name rotary settings the way transformers 4 does, too: engines that use it would take defaults in silence."""
    config = json.loads(path.read_text(encoding="utf-8"))
    rope = config.get("rope_parameters")
    if not rope or any(isinstance(value, dict) for value in rope.values()):
        return  # settings per layer type have no older form
    base, share = rope.get("rope_theta"), rope.get("partial_rotary_factor")
    named = {"rope_theta": base, "partial_rotary_factor": share}
    if config["model_type"] == "gpt_neox":
        named = {"rotary_emb_base": base, "rotary_pct": share}
    config.update({name: value for name, value in named.items() if value is not None})
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = {
            name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")
        }
    write_json(path, config)


def _save_tokenizer(tokenizer: Any, folder: Path) -> tuple[str | None, list[EngineInput]]:
    """Write the tokenizer so that as many engines as can be feed the model's own tokens, and say which do not."""
    mended, dropped = drop_bos_token(tokenizer)
    mended.save_pretrained(folder)
    # Transformers 4 would hand token types to the model: most refuse them, and GPT-2 adds embeddings.
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["model_input_names"] = ["input_ids", "attention_mask"]
    write_json(folder / "tokenizer_config.json", settings)
    loaded = AutoTokenizer.from_pretrained(folder)
    if not reads_the_same(tokenizer, loaded):
        raise InputError(
            "folded: the tokenizer makes other tokens of a conversation once it is saved and loaded again, so every "
            "engine would give rewards of other text. Save the model with a tokenizer of one tokenizer.json."
        )
    if dropped is not None:
        logger.warning(
            "folded: the saved tokenizer names no bos_token: verl would take %r away from the front of each text, and "
            "nothing would bring it back.",
            dropped,
        )
    inputs = compare_engine_inputs(loaded)
    wrong = [f"{item.way} {item.difference}. {item.remedy}" for item in inputs if item.is_wrong]
    if wrong:
        logger.warning("folded: not fed what the model was trained on: %s", " ".join(wrong))
    return dropped, inputs
