"""Folded export: the linear head as one row vector, in folders that plain transformers loads."""

import copy
import json
import logging
import math
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    MixtralConfig,
    pipeline,
)

from inform_rm import InfoRMConfig, InfoRMForSequenceClassification, export_model
from inform_rm.cli import main
from inform_rm.data.encoding import encode
from inform_rm.errors import InputError
from inform_rm.hub.folding import fold_head, write_folded_model
from inform_rm.scoring.scorer import RewardScorer

PROMPTS = ["Name a colour.", "How many apples are in the basket?", "Say something about the sea."]
RESPONSES = ["Red.", "There are seven apples in the basket.", "It is calm today, and blue and green and red."]
ROPE = {
    "llama": {"rope_type": "default", "rope_theta": 100.0},
    "mistral": {"rope_type": "linear", "rope_theta": 50.0, "factor": 3.0},
    "gpt_neox": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
}


def build(text_config, dtype=torch.float32, **settings):
    """A random model whose head has every weight and bias far from zero."""
    torch.manual_seed(0)
    config = InfoRMConfig(text_config=copy.deepcopy(text_config), latent_dim=8, **{"decoder": "linear", **settings})
    model = InfoRMForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.score.parameters():
            parameter.normal_()
    return model.to(dtype).eval()


@pytest.fixture(scope="module")
def saved(backbone_configs, tokenizer, tmp_path_factory):
    """Folder of a model of the named backbone, and of its folded export; made once."""
    made = {}

    def make(name, **settings):
        key = (name, *settings.items())
        if key not in made:
            folder = tmp_path_factory.mktemp("model")
            text_config = copy.deepcopy(backbone_configs[name])
            if name in ROPE:
                text_config.rope_parameters = ROPE[name]
            build(text_config, **settings).save_pretrained(folder / "original")
            tokenizer.save_pretrained(folder / "original")
            export_model(str(folder / "original"), str(folder / "folded"), folded=True)
            made[key] = folder / "original", folder / "folded"
        return made[key]

    return make


def offset_of(folder):
    return json.loads((folder / "config.json").read_text())["reward_offset"]


def batch_of(tokenizer, padding_side):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = padding_side
    ids = [encode(tokenizer, prompt, response).input_ids for prompt, response in zip(PROMPTS, RESPONSES, strict=True)]
    batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def test_row_and_offset_equal_the_algebra_written_out(backbone_configs):
    model = build(backbone_configs["llama"])
    state = {name: value.double().tolist() for name, value in model.score.state_dict().items()}
    decoder, bias = state["decoder.weight"][0], state["decoder.bias"][0]
    expected = [
        math.fsum(decoder[k] * state["encoder.weight"][k][h] for k in range(8))  # the means are the first 8 of 16
        for h in range(32)
    ]
    weight, offset = fold_head(model)
    assert weight.tolist()[0] == pytest.approx(expected, abs=1e-12)
    constant = math.fsum(decoder[k] * state["encoder.bias"][k] for k in range(8)) + bias
    assert offset == pytest.approx(constant, abs=1e-12)


def test_written_row_equals_float64_algebra_and_the_backbone_is_unchanged(saved):
    original, folded = saved("llama")
    before, after = load_file(original / "model.safetensors"), load_file(folded / "model.safetensors")
    weight = before["score.decoder.weight"].double() @ before["score.encoder.weight"][:8].double()
    assert (after["score.weight"].double() - weight).abs().max() < 1e-6
    assert set(after) == {name for name in before if not name.startswith("score.")} | {"score.weight"}
    assert all(torch.equal(after[name], before[name]) for name in after if name != "score.weight")


@pytest.mark.parametrize(
    ("name", "architecture"),
    [*((name, "inform") for name in ("llama", "llama_tied", "mistral", "gpt_neox", "gpt2")), ("qwen2", "standard")],
)
def test_transformers_gives_the_same_rewards_on_either_padding_side(saved, name, architecture, tokenizer):
    original, folded = saved(name, architecture=architecture)
    model = AutoModelForSequenceClassification.from_pretrained(original).eval()
    plain, loading = AutoModelForSequenceClassification.from_pretrained(folded, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    assert type(plain).__module__.startswith("transformers.models.")
    offset = offset_of(folded)
    assert (offset == 0.0) == (architecture == "standard")
    # Padding on the left shifts GPT-2's learned positions, for which its classifier has no remedy.
    for side in ("right",) if name == "gpt2" else ("right", "left"):
        batch = batch_of(tokenizer, side)
        with torch.no_grad():
            expected, found = model(**batch).logits, plain.eval()(**batch).logits
        assert expected.std() > 0.01
        torch.testing.assert_close(found + offset, expected, atol=2e-5, rtol=0)


def test_pipeline_gives_the_reward_without_the_offset(saved, tokenizer):
    original, folded = saved("llama")
    texts = [
        tokenizer.decode(encode(tokenizer, prompt, response).input_ids)
        for prompt, response in zip(PROMPTS, RESPONSES, strict=True)
    ]
    expected = RewardScorer(original).score_encoded(tokenizer(texts)["input_ids"]) - offset_of(folded)
    for options in ({"function_to_apply": "none"}, {}):  # "regression" in the config: no sigmoid unasked either
        classify = pipeline("text-classification", str(folded), device="cpu")
        scores = [row["score"] for row in classify(texts, batch_size=3, **options)]
        assert scores == pytest.approx(expected.tolist(), abs=2e-5)


def test_scorer_gives_the_same_rewards_from_both_folders(saved):
    original, folded = saved("gpt2")
    rewards = [RewardScorer(folder).score(PROMPTS, RESPONSES) for folder in (original, folded)]
    torch.testing.assert_close(rewards[1] + offset_of(folded), rewards[0], atol=1e-5, rtol=0)


def test_token_classifiers_give_the_reward_at_the_last_token(saved, tokenizer):
    """verl loads reward models this way; the bias that this class adds begins at zero."""
    original, folded = saved("llama")
    ids = torch.tensor([encode(tokenizer, PROMPTS[0], RESPONSES[0]).input_ids])
    model = AutoModelForTokenClassification.from_pretrained(folded, num_labels=1).eval()
    expected = AutoModelForSequenceClassification.from_pretrained(original).eval()(ids).logits.item()
    assert model(ids).logits[0, -1].item() + offset_of(folded) == pytest.approx(expected, abs=1e-5)


@pytest.mark.slow
def test_folder_loads_in_a_process_without_the_package(saved, tokenizer):
    original, folded = saved("llama")
    assert sorted(path.name for path in folded.iterdir()) == [
        "README.md", "chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    assert "auto_map" not in (folded / "config.json").read_text()
    code = """
import json, sys
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder, messages = sys.argv[1], json.loads(sys.argv[2])
model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
inputs.pop("token_type_ids", None)
reward = model(**inputs).logits.item() + model.config.reward_offset
assert "inform_rm" not in sys.modules
print(json.dumps(reward))
"""
    messages = [{"role": "user", "content": PROMPTS[1]}, {"role": "assistant", "content": RESPONSES[1]}]
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folded.parent / "cache"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-I", "-c", code, str(folded), json.dumps(messages)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    expected = RewardScorer(original).score([PROMPTS[1]], [RESPONSES[1]]).item()
    assert json.loads(result.stdout.splitlines()[-1]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("has_template", [True, False])
def test_where_the_end_token_pads_another_pad_token_is_added(
    backbone_configs, tokenizer, tmp_path, caplog, has_template
):
    model = build(backbone_configs["llama"])
    model.config.text_config.pad_token_id = 2
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    if not has_template:
        tokenizer.chat_template = None
    model.save_pretrained(tmp_path / "original")
    tokenizer.save_pretrained(tmp_path / "original")
    with caplog.at_level(logging.WARNING, "inform_rm"):
        export_model(str(tmp_path / "original"), str(tmp_path / "folded"), folded=True)
    assert "pad token '</s>' can be the last token of a row" in caplog.text
    folded_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folded")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "folded").eval()
    assert folded_tokenizer.pad_token == "<|pad|>"
    assert plain.config.pad_token_id == folded_tokenizer.pad_token_id == len(tokenizer)
    # The vocabulary of 320 was full: one more row of embeddings.
    assert plain.config.vocab_size == plain.get_input_embeddings().weight.shape[0] == len(tokenizer) + 1
    batch = batch_of(folded_tokenizer, "right")
    assert (batch["input_ids"][:, -1] == 2).any()  # a row that ends with the end token
    with torch.no_grad():
        expected = torch.cat([
            model(row[mask.bool()][None]).logits for row, mask in zip(*batch.values(), strict=True)
        ])  # fmt: skip
        found = plain(**batch).logits + plain.config.reward_offset
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    # Without the new token the rewards would be those one token earlier.
    plain.config.pad_token_id = 2
    batch["input_ids"][batch["attention_mask"] == 0] = 2
    assert (plain(**batch).logits + plain.config.reward_offset - expected).abs().min() > 1e-3


def test_a_spare_row_of_the_embeddings_takes_the_added_pad_token(backbone_configs, tokenizer, tmp_path):
    text_config = copy.deepcopy(backbone_configs["llama"])
    text_config.vocab_size = 384
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    write_folded_model(build(text_config), tokenizer, tmp_path)
    assert tokenizer.pad_token == "<|pad|>" and " was added for that" in (tmp_path / "README.md").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == 384


def test_half_precision_backbones_stay_and_the_row_is_float32(backbone_configs, tokenizer, tmp_path):
    model = build(backbone_configs["llama"], torch.bfloat16)
    row, _ = fold_head(model)
    write_folded_model(model, copy.deepcopy(tokenizer), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert {value.dtype for name, value in state.items() if name != "score.weight"} == {torch.bfloat16}
    assert state["score.weight"].dtype == torch.float32
    assert (state["score.weight"].double() - row).abs().max() < 1e-6
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    (difference,) = re.findall(r"the two differed by at most (\S+) when", (tmp_path / "README.md").read_text())
    assert float(difference) < 1e-4
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_mixture_of_experts_is_folded(tokenizer, tmp_path):
    """Its weights have other names in memory than in files."""
    text_config = MixtralConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2, pad_token_id=0, max_position_embeddings=128,
    )  # fmt: skip
    model = build(text_config)
    write_folded_model(model, copy.deepcopy(tokenizer), tmp_path)
    experts = [name for name in load_file(tmp_path / "model.safetensors") if ".experts.1." in name]
    assert len(experts) == 2 * 3  # as published, one matrix each: engines read these names
    plain, loading = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    batch = batch_of(tokenizer, "right")
    with torch.no_grad():
        found = plain.eval()(**batch).logits + plain.config.reward_offset
        torch.testing.assert_close(found, model(**batch).logits, atol=1e-5, rtol=0)


def test_rotary_settings_are_written_for_transformers_4_too(saved):
    config = json.loads((saved("mistral")[1] / "config.json").read_text())
    assert config["rope_theta"] == 50.0 and config["rope_scaling"] == {"rope_type": "linear", "factor": 3.0}
    config = json.loads((saved("gpt_neox")[1] / "config.json").read_text())
    assert config["rotary_emb_base"] == 100.0 and config["rotary_pct"] == 0.5 and "rope_scaling" not in config


def test_card_tells_origin_constant_and_engines(saved):
    original, folded = saved("llama")
    card = (folded / "README.md").read_text()
    assert RewardScorer(original).identity()["model"] in card
    assert repr(abs(offset_of(folded))) in card and str(original) not in card
    for word in ("LlamaForSequenceClassification", "vLLM", "SGLang", "OpenRLHF", "Only vLLM was run"):
        assert word in card


def test_command_line_tells_the_constant(saved, tmp_path, capsys):
    original, folded = saved("llama")
    assert main(["export", "--model", str(original), "--output", str(tmp_path / "again"), "--folded"]) == 0
    offset = offset_of(folded)
    sign = "-" if offset < 0 else "+"
    assert f"LlamaForSequenceClassification: reward of the model = folded reward {sign} {abs(offset)!r}" in (
        capsys.readouterr().out
    )
    for name in ("config.json", "model.safetensors", "README.md"):
        assert (tmp_path / "again" / name).read_bytes() == (folded / name).read_bytes()


def refused(model, tokenizer, tmp_path, message):
    with pytest.raises(InputError, match=message):
        write_folded_model(model, copy.deepcopy(tokenizer), tmp_path)
    assert not list(tmp_path.iterdir())


def test_mlp_decoder_is_refused_with_the_way(backbone_configs, tokenizer, tmp_path, capsys):
    model = build(backbone_configs["llama"], decoder="mlp")
    refused(model, tokenizer, tmp_path, "decoder is 'mlp'.*no linear function.*decoder: linear")
    model.save_pretrained(tmp_path / "original")
    tokenizer.save_pretrained(tmp_path / "original")
    command = ["export", "--model", str(tmp_path / "original"), "--output", str(tmp_path / "folded"), "--folded"]
    assert main(command) == 2
    assert "decoder: linear" in capsys.readouterr().err and not (tmp_path / "folded").exists()


def test_what_no_classifier_of_transformers_holds_is_refused(backbone_configs, tokenizer, tmp_path, monkeypatch):
    model = build(backbone_configs["llama"])
    quantized = copy.deepcopy(model)
    quantized.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    refused(quantized, tokenizer, tmp_path, "backbone is quantized")
    monkeypatch.setattr("inform_rm.hub.folding.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING", {})
    refused(model, tokenizer, tmp_path, "no sequence classifier for llama")
    monkeypatch.undo()

    def with_bias(config):
        classifier = AutoModelForSequenceClassification.from_config(config)
        classifier.score = torch.nn.Linear(32, 1)
        return classifier

    class Stranger:
        from_config = staticmethod(with_bias)

    monkeypatch.setattr("inform_rm.hub.folding.AutoModelForSequenceClassification", Stranger)
    refused(
        model, tokenizer, tmp_path, r"not a llama backbone with a bias-free linear head named score \(score.bias\)"
    )


def test_a_classifier_with_other_rewards_is_refused(backbone_configs, tokenizer, tmp_path, monkeypatch):
    from transformers import LlamaForSequenceClassification

    plain_forward = LlamaForSequenceClassification.forward

    def squashed(self, *args, **kwargs):
        output = plain_forward(self, *args, **kwargs)
        output.logits = output.logits.tanh()
        return output

    monkeypatch.setattr(LlamaForSequenceClassification, "forward", squashed)
    refused(build(backbone_configs["llama"]), tokenizer, tmp_path, "gives other rewards than the model")


def test_adapters_are_merged(causal_lm_dir, tokenizer, tmp_path):
    pytest.importorskip("peft", reason="peft is not installed")
    import dataclasses

    from inform_rm.training.reward_arguments import RewardTrainingArguments
    from inform_rm.training.run import train

    rows = [{"prompt": f"Say {word}.", "chosen": word, "rejected": word + "!"} for word in ("sun", "sea", "sky", "ox")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = RewardTrainingArguments(
        model=str(causal_lm_dir("llama")), data=(str(tmp_path / "pairs.jsonl"),), output_dir=str(tmp_path / "run"),
        latent_dim=8, decoder="linear", learning_rate=5e-2, max_steps=3, save_steps=3, use_cpu=True, lora_r=4,
        per_device_train_batch_size=2, gradient_accumulation_steps=1,
    )  # fmt: skip
    train(dataclasses.replace(config, merge_adapters=False))
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-3"
    assert (checkpoint / "adapter_model.safetensors").exists()
    export_model(str(checkpoint), str(tmp_path / "folded"), folded=True)
    rewards = [RewardScorer(folder).score(PROMPTS, RESPONSES) for folder in (checkpoint, tmp_path / "folded")]
    torch.testing.assert_close(rewards[1] + offset_of(tmp_path / "folded"), rewards[0], atol=1e-5, rtol=0)
    base = load_file(causal_lm_dir("llama") / "model.safetensors")
    merged = load_file(tmp_path / "folded" / "model.safetensors")
    assert not torch.equal(
        base["model.layers.0.self_attn.q_proj.weight"], merged["model.layers.0.self_attn.q_proj.weight"]
    )
