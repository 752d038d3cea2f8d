"""Reward models whose config says nothing of a head: recognised, scored and trained on by their weights."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    T5ForSequenceClassification,
)

from inform_rm.cli import main
from inform_rm.errors import InputError
from inform_rm.eval.detection.latents import collect_latents
from inform_rm.hub.export import export_model
from inform_rm.scoring.reward_models import load_reward_model
from inform_rm.scoring.scorer import RewardScorer
from inform_rm.training.models import load_model
from inform_rm.training.reward_arguments import RewardTrainingArguments
from inform_rm.training.run import train

ROWS = [[5, 6, 7, 8, 9, 10], [5, 6, 7, 20, 21], [30, 31, 2], [40]]
PROMPT_LENGTHS = [3, 3, 0, 0]


def head(bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, 32, generator=generator)
    return (weight, torch.randn(1, generator=generator)) if bias else (weight,)


def openrlhf(folder, name="score", architecture="LlamaForSequenceClassification"):
    """Their `save_model`: the backbone's weights and the head under its prefix, the config without labels."""
    weights = load_file(folder / "model.safetensors")
    weights.pop("lm_head.weight", None)
    (weights[f"{name}.weight"],) = head()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    set_config(folder, architectures=[architecture])


def trl(folder):
    """`AutoModelForCausalLMWithValueHead`: the head's weights among those of the whole causal LM."""
    weights = load_file(folder / "model.safetensors")
    weights["v_head.summary.weight"], weights["v_head.summary.bias"] = head(bias=True)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def llama_factory(folder):
    """The causal LM as it is, the head in a file of its own."""
    weight, bias = head(bias=True)
    save_file({"v_head.summary.weight": weight, "v_head.summary.bias": bias}, folder / "value_head.safetensors")


def set_config(folder, **changes):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, **changes}))


KINDS = {
    "OpenRLHF": openrlhf,
    "OpenRLHF, other name": lambda folder: openrlhf(folder, "value_head", "LlamaModel"),
    "OpenRLHF, custom name": lambda folder: openrlhf(folder, "my.reward_layer", "LlamaForCausalLM"),
    "TRL": trl,
    "LLaMA-Factory": llama_factory,
}


@pytest.fixture
def folder(causal_lm_dir, tmp_path):
    """A copy of a Llama causal LM with tokenizer, to be made a reward model of some kind."""
    return shutil.copytree(causal_lm_dir("llama"), tmp_path / "model")


def expected_rewards(causal_lm, bias):
    """Second implementation: the causal LM's last hidden state at the last token, times the row."""
    weight, *constant = head(bias=bias)
    model = AutoModelForCausalLM.from_pretrained(causal_lm).eval()
    with torch.no_grad():
        states = [model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1] for ids in ROWS]
    return torch.stack(states) @ weight[0] + (constant[0] if constant else 0.0)


@pytest.mark.parametrize(("kind", "batching"), [*((kind, "packed") for kind in KINDS), ("OpenRLHF", "padded")])
def test_head_is_recognised_by_its_weights_and_read_at_the_last_token(kind, batching, folder, causal_lm_dir, caplog):
    KINDS[kind](folder)
    # The classifiers of transformers would read the third row one token early.
    set_config(folder, pad_token_id=2)
    with caplog.at_level(logging.WARNING):
        scorer = RewardScorer(folder, batching=batching, device="cpu")
    assert scorer.batching == batching
    expected = expected_rewards(causal_lm_dir("llama"), bias=kind in ("TRL", "LLaMA-Factory"))
    found = scorer.score_encoded(ROWS, PROMPT_LENGTHS)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert "is taken as reward head, at the last token of each row" in caplog.text


def test_a_base_model_with_a_head_and_no_prefix_is_recognised(folder, causal_lm_dir):
    openrlhf(folder, architecture="LlamaModel")
    weights = load_file(folder / "model.safetensors")
    save_file({key.removeprefix("model."): value for key, value in weights.items()}, folder / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    found = RewardScorer(folder, device="cpu").score_encoded(ROWS)
    torch.testing.assert_close(found, expected_rewards(causal_lm_dir("llama"), False), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["OpenRLHF", "LLaMA-Factory"])  # without and with bias
def test_standard_training_goes_on_from_the_head(kind, folder, causal_lm_dir, caplog, tmp_path):
    KINDS[kind](folder)
    config = RewardTrainingArguments(
        model=str(folder), data=["-"], output_dir="-", architecture="standard", use_cpu=True
    )
    with caplog.at_level(logging.WARNING):
        model = load_model(config).eval()
    bias = kind in ("TRL", "LLaMA-Factory")
    found = RewardScorer(model).score_encoded(ROWS)
    torch.testing.assert_close(found, expected_rewards(causal_lm_dir("llama"), bias), atol=1e-5, rtol=0)
    assert caplog.text.count("is taken as reward head") == 1
    assert model.config.head_bias is bias
    # What is written is a model of this package, whole.
    model.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(
        RewardScorer(load_reward_model(tmp_path / "saved", device="cpu")).score_encoded(ROWS), found
    )


def test_inform_training_starts_with_a_fresh_head_and_says_so(folder, caplog):
    trl(folder)
    config = RewardTrainingArguments(model=str(folder), data=["-"], output_dir="-", latent_dim=4, use_cpu=True)
    with caplog.at_level(logging.WARNING):
        model = load_model(config)
    assert model.config.architecture == "inform"
    assert "architecture: inform starts with a fresh one" in caplog.text


def test_a_run_from_a_value_head_with_adapters_loads_back(folder, tokenizer, tmp_path):
    pytest.importorskip("peft", reason="peft is not installed")
    llama_factory(folder)
    rows = [{"prompt": f"Name {n}", "chosen": "It is red.", "rejected": "Seven."} for n in range(4)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = RewardTrainingArguments(
        model=str(folder), data=[str(tmp_path / "pairs.jsonl")], output_dir=str(tmp_path / "run"), use_cpu=True,
        architecture="standard", lora_r=2, merge_adapters=False, max_steps=3, per_device_train_batch_size=4,
        gradient_accumulation_steps=1, learning_rate=1e-3, report_to="none",
    )  # fmt: skip
    train(config)
    adapted = load_reward_model(tmp_path / "run", device="cpu")
    assert adapted.config.head_bias
    start = load_reward_model(folder, device="cpu")
    moved = (adapted.score.bias - start.score.bias).abs().item()
    assert 0 <= moved < 0.01  # Bradley-Terry gives a constant no gradient
    assert not torch.equal(adapted.score.weight, start.score.weight)


def test_its_latents_and_its_export_are_those_of_a_standard_model(folder, tmp_path):
    trl(folder)
    scorer = RewardScorer(folder, device="cpu")
    latents = collect_latents(scorer, ["Name a fruit."], ["An apple."])
    assert latents.kind == "hidden_state" and latents.values.shape == (1, 32)
    export_model(str(folder), str(tmp_path / "exported"))
    exported = RewardScorer(tmp_path / "exported", device="cpu")
    torch.testing.assert_close(exported.score_encoded(ROWS), scorer.score_encoded(ROWS), atol=1e-6, rtol=0)


def two_heads(folder):
    trl(folder)
    llama_factory(folder)


def pickled(folder):
    torch.save({"v_head.summary.weight": head()[0]}, folder / "value_head.bin")


def several_layers(folder):
    weights = load_file(folder / "model.safetensors")
    weights["v_head.0.weight"], weights["v_head.2.weight"] = torch.randn(32, 32), torch.randn(1, 32)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def beside_of_another_size(folder):
    save_file({"v_head.summary.weight": torch.randn(1, 16)}, folder / "value_head.safetensors")


def broken(folder):
    (folder / "value_head.safetensors").write_bytes(b"\x10" * 20)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            two_heads,
            r"2 heads .*v_head.summary.weight in value_head.safetensors, v_head.summary.weight.*Remove all but",
        ),
        (pickled, r"value_head.bin; reading a pickle can run any code.*convert it"),
        (several_layers, r"It holds v_head.0.weight, which is no head that is read here"),
        (beside_of_another_size, r"holds no linear layer from 32 numbers to one"),
        (broken, r"value_head.safetensors: the safetensors file is incomplete or broken"),
        (lambda folder: None, r"This is not a reward model: it has no trained reward head"),
    ],
)
def test_other_heads_are_refused_by_name(make, message, folder):
    make(folder)
    with pytest.raises(InputError, match=message):
        load_reward_model(folder, device="cpu")


def test_a_classifier_of_several_classes_is_refused_as_such(backbone_configs, tmp_path):
    config = LlamaConfig(**{**backbone_configs["llama"].to_dict(), "num_labels": 3})
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"num_labels=3 .*several classes"):
        load_reward_model(tmp_path, device="cpu")


@pytest.mark.parametrize(
    ("kind", "problem_type"), [("llama", "multi_label_classification"), ("bert", "regression"), ("bert", None)]
)
def test_classifiers_with_one_label_keep_their_own_class(kind, problem_type, backbone_configs, tmp_path):
    sizes = {**backbone_configs["llama"].to_dict(), "num_labels": 1, "problem_type": problem_type}
    sizes.pop("model_type")
    made = LlamaForSequenceClassification(LlamaConfig(**sizes)) if kind == "llama" else (
        BertForSequenceClassification(BertConfig(
            vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, num_labels=1, problem_type=problem_type,
        ))
    )  # fmt: skip
    made.save_pretrained(tmp_path)
    loaded = load_reward_model(tmp_path, device="cpu")
    assert type(loaded) is type(made)
    ids = torch.tensor([ROWS[0]])
    torch.testing.assert_close(loaded(ids).logits, made.eval()(ids).logits)


def test_normalization_of_openrlhf_is_not_applied_and_named(folder, causal_lm_dir, caplog):
    openrlhf(folder)
    set_config(folder, normalize_reward=True, mean=3.0, std=2.0)
    with caplog.at_level(logging.WARNING):
        found = RewardScorer(folder, device="cpu").score_encoded(ROWS)
    torch.testing.assert_close(found, expected_rewards(causal_lm_dir("llama"), False), atol=1e-5, rtol=0)
    assert "mean 3.0 taken off, divided by 2.0; they are given as they are" in caplog.text


# --- encoder-decoders ---

T5 = T5Config(vocab_size=320, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, num_labels=1)
BART = BartConfig(
    vocab_size=320, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, num_labels=1,
)  # fmt: skip


@pytest.mark.parametrize(
    "make",
    [
        lambda: T5ForSequenceClassification(T5),
        lambda: T5ForConditionalGeneration(T5),
        lambda: BartForSequenceClassification(BART),
    ],
    ids=["T5", "T5 language model", "BART"],
)
def test_encoder_decoders_are_refused_in_one_line(make, tokenizer, tmp_path, capsys):
    make().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    row = {"prompt": "Name a fruit.", "chosen": "An apple.", "rejected": "A colour.", "response": "An apple."}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    (tmp_path / "run.yaml").write_text(
        f"model: {tmp_path}/model\ndata: [{tmp_path}/rows.jsonl]\noutput: {tmp_path}/o\n"
    )
    model, data = str(tmp_path / "model"), str(tmp_path / "rows.jsonl")
    for command in (
        ["evaluate", "--model", model, "--data", data, "--output", str(tmp_path / "e")],
        ["score", "--model", model, "--input", data, "--output", str(tmp_path / "s.jsonl")],
        ["train", str(tmp_path / "run.yaml"), "--use_cpu", "true"],
    ):
        assert main(command) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert "is an encoder-decoder model" in error and "Traceback" not in error
