"""Backbones that people have: multimodal checkpoints, old configs, layers with a state, a dozen architectures."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertLMHeadModel,
    CodeGenConfig,
    CodeGenModel,
    CodeGenPreTrainedModel,
    CpmAntConfig,
    CpmAntForCausalLM,
    FalconH1Config,
    Gemma2Config,
    Gemma2ForSequenceClassification,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Llama4Config,
    Llama4ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    RwkvConfig,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from inform_rm import InfoRMConfig, InfoRMForSequenceClassification
from inform_rm.data.tokenizer import load_tokenizer
from inform_rm.errors import InputError
from inform_rm.scoring.packing import why_not_packed
from inform_rm.scoring.reward_models import load_reward_model
from inform_rm.scoring.scorer import RewardScorer
from inform_rm.training.reward_arguments import RewardTrainingArguments
from inform_rm.training.run import train

BENCHMARK = Path(__file__).resolve().parents[1] / "benchmarks" / "architectures.py"
ROWS = [[5, 6, 7, 8, 9, 10, 11], [5, 6, 7, 20, 21], [30, 31, 32], [40]]
TEXT = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
QWEN_VISION = {"depth": 1, "hidden_size": 32, "num_heads": 4, "patch_size": 8}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 1, 2]}}


def multimodal(name):
    """A random tiny model of the kind, and its text model."""
    torch.manual_seed(0)
    if name == "gemma3":
        config = Gemma3Config(text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4)
        model = Gemma3ForConditionalGeneration(config)
    elif name == "mistral3":
        pixtral = {**VISION, "model_type": "pixtral", "head_dim": 8}
        config = Mistral3Config(text_config={**TEXT, "model_type": "mistral"}, vision_config=pixtral)
        model = Mistral3ForConditionalGeneration(config)
    elif name == "qwen2_vl":
        vision = {**QWEN_VISION, "embed_dim": 32, "mlp_ratio": 2}
        model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config={**TEXT, **MROPE}, vision_config=vision))
    elif name == "qwen2_5_vl":
        vision = {**QWEN_VISION, "out_hidden_size": 32, "intermediate_size": 48, "fullatt_block_indexes": [0]}
        config = Qwen2_5_VLConfig(text_config={**TEXT, **MROPE}, vision_config=vision)
        model = Qwen2_5_VLForConditionalGeneration(config)
    elif name == "qwen3_vl":
        vision = {**QWEN_VISION, "out_hidden_size": 32, "intermediate_size": 48, "deepstack_visual_indexes": [0]}
        config = Qwen3VLConfig(text_config={**TEXT, **MROPE}, vision_config={**vision, "num_position_embeddings": 16})
        model = Qwen3VLForConditionalGeneration(config)
    elif name == "llama4":
        text = {**TEXT, "intermediate_size_mlp": 48, "num_local_experts": 2, "num_experts_per_tok": 1}
        sizes = dict.fromkeys(("vision_output_dim", "projector_input_dim", "projector_output_dim"), 32)
        config = Llama4Config(text_config=text, vision_config={**VISION, "intermediate_size": 128, **sizes})
        model = Llama4ForConditionalGeneration(config)
        return model.eval(), model.language_model.model
    else:
        clip = {**VISION, "model_type": "clip_vision_model", "projection_dim": 32}
        config = LlavaConfig(text_config={**TEXT, "model_type": "llama"}, vision_config=clip)
        model = LlavaForConditionalGeneration(config)
    return model.eval(), model.model.language_model


MULTIMODAL = ["gemma3", "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llama4", "llava"]


def rewards_alone(model):
    with torch.no_grad():
        return torch.cat([model(torch.tensor([ids])).logits.flatten() for ids in ROWS])


def padded(side):
    """`ROWS` with some padding on every row, which is an ordinary token."""
    longest = max(map(len, ROWS)) + 2
    ids, mask = torch.full((len(ROWS), longest), 9), torch.zeros(len(ROWS), longest, dtype=torch.long)
    for row, tokens in enumerate(ROWS):
        place = slice(0, len(tokens)) if side == "right" else slice(longest - len(tokens), longest)
        ids[row, place], mask[row, place] = torch.tensor(tokens), 1
    return {"input_ids": ids, "attention_mask": mask}


def assert_one_score(model):
    alone = rewards_alone(model)
    assert alone.std() > 1e-3
    for side in ("right", "left"):
        with torch.no_grad():
            torch.testing.assert_close(model(**padded(side)).logits.flatten(), alone, atol=1e-5, rtol=0)
    found = RewardScorer(model).score_encoded(ROWS, [3, 3, 0, 0])
    torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)


# --- multimodal checkpoints ---


@pytest.mark.parametrize(
    ("name", "architecture"), [*((name, "inform") for name in MULTIMODAL), ("gemma3", "standard")]
)
def test_text_model_of_a_multimodal_checkpoint_is_the_backbone(name, architecture, tmp_path, caplog):
    whole, text_model = multimodal(name)
    whole.save_pretrained(tmp_path / "whole")
    num_others = sum(
        not key.startswith("lm_head") and "language_model." not in key
        for key in whole.state_dict(keep_vars=True)
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        model = InfoRMForSequenceClassification.from_backbone(
            tmp_path / "whole", latent_dim=4, architecture=architecture
        ).eval()
    assert (
        f"{name} checkpoint: its text model is taken, {num_others} weights of other parts are left out" in caplog.text
    )
    assert type(model.model) is type(text_model)
    expected = text_model.state_dict()
    assert set(model.model.state_dict()) == set(expected)
    assert all(torch.equal(value, expected[key]) for key, value in model.model.state_dict().items())
    assert_one_score(model)
    model.save_pretrained(tmp_path / "saved")
    reloaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(rewards_alone(reloaded.eval()), rewards_alone(model), atol=1e-6, rtol=0)


def test_missing_or_unknown_text_weights_of_a_multimodal_checkpoint_are_refused(tmp_path):
    multimodal("gemma3")[0].save_pretrained(tmp_path)
    weights = load((tmp_path / "model.safetensors").read_bytes())  # in memory: the file is written anew below
    (name,) = (key for key in weights if key.endswith("layers.1.mlp.up_proj.weight"))  # its start varies by version
    kept = {key: value for key, value in weights.items() if key != name}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing \(first: model.layers.1.mlp.up_proj.weight\)"):
        InfoRMForSequenceClassification.from_backbone(tmp_path)
    more = {**weights, name.replace("up_proj", "extra"): torch.zeros(2)}
    save_file(more, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 unexpected \(first: model.layers.1.mlp.extra.weight\)"):
        InfoRMForSequenceClassification.from_backbone(tmp_path)


def pairs_file(folder):
    rows = [{"prompt": f"Name {n}", "chosen": "It is red.", "rejected": "Seven apples."} for n in range(4)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "pairs.jsonl")


def run_settings(model, folder, **changes):
    return RewardTrainingArguments(
        **{
            "model": str(model), "data": [pairs_file(folder)], "output_dir": str(folder / "run"), "use_cpu": True,
            "latent_dim": 4, "max_steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
            "report_to": "none", **changes,
        }
    )  # fmt: skip


def test_a_multimodal_checkpoint_is_trained_and_the_tokenizer_comes_along(tokenizer, tmp_path):
    multimodal("gemma3")[0].save_pretrained(tmp_path / "whole")
    tokenizer.save_pretrained(tmp_path / "whole")
    train(run_settings(tmp_path / "whole", tmp_path))
    trained = load_reward_model(tmp_path / "run", device="cpu")
    assert trained.config.text_config.model_type == "gemma3_text"
    text = "Name a colour and a fruit, please."
    assert load_tokenizer(tmp_path / "run")(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_quantized_multimodal_checkpoint_is_refused(tmp_path):
    multimodal("llava")[0].save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="is quantized; its text model can be taken out of the unquantized"):
        InfoRMForSequenceClassification.from_backbone(tmp_path)


@pytest.mark.slow
def test_reward_models_on_multimodal_text_models_load_without_the_package(tmp_path):
    expected = {}
    for name in MULTIMODAL:
        multimodal(name)[0].save_pretrained(tmp_path / "whole" / name)
        for architecture in ("inform", "standard"):
            model = InfoRMForSequenceClassification.from_backbone(
                tmp_path / "whole" / name, latent_dim=4, architecture=architecture
            ).eval()
            model.save_pretrained(tmp_path / f"{name}-{architecture}")
            expected[f"{name}-{architecture}"] = rewards_alone(model).tolist()
    code = f"""
import json, sys
import torch
from transformers import AutoModelForSequenceClassification
rewards = {{}}
for name in {list(expected)}:
    model, info = AutoModelForSequenceClassification.from_pretrained(
        f"{tmp_path}/{{name}}", trust_remote_code=True, output_loading_info=True
    )
    assert not any(info.values()), info
    rewards[name] = [model.eval()(torch.tensor([ids])).logits.item() for ids in {ROWS}]
assert "inform_rm" not in sys.modules
print(json.dumps(rewards))
"""
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-I", "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    for name, rewards in expected.items():
        assert found[name] == pytest.approx(rewards, abs=1e-5), name


# --- configs without pad_token_id ---


def test_a_config_without_a_pad_token_is_trained_scored_and_packed(tokenizer, tmp_path):
    torch.manual_seed(0)
    config = CodeGenConfig(
        vocab_size=320, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, bos_token_id=1, eos_token_id=2
    )
    assert not hasattr(config, "pad_token_id")
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    model = InfoRMForSequenceClassification.from_backbone(tmp_path / "lm", latent_dim=4).eval()
    # Before transformers 5.24 CodeGen does not let its attention be exchanged. Either way no AttributeError.
    assert "attention of its own" in (why_not_packed(model) or "attention of its own")
    assert_one_score(model)
    train(run_settings(tmp_path / "lm", tmp_path))
    scorer = RewardScorer(tmp_path / "run", device="cpu")
    assert scorer.score(["Name a fruit."], ["An apple."]).isfinite().all()


class PadlessConfig(CodeGenConfig):
    model_type = "padless_codegen"


class PadlessClassifier(CodeGenPreTrainedModel):
    """As code of others may be: it asks its config for a pad token, which is not there."""

    config_class = PadlessConfig

    def __init__(self, config):
        super().__init__(config)
        self.transformer = CodeGenModel(config)
        self.score = torch.nn.Linear(config.n_embd, 1, bias=False)
        self.post_init()

    def forward(self, input_ids, attention_mask=None, **kwargs):
        assert self.config.pad_token_id is None and len(input_ids) == 1
        hidden = self.transformer(input_ids, attention_mask=attention_mask).last_hidden_state
        return SequenceClassifierOutput(logits=self.score(hidden[:, -1]))


def test_a_classifier_whose_config_has_no_pad_token_is_scored_row_by_row(tmp_path):
    AutoConfig.register("padless_codegen", PadlessConfig, exist_ok=True)
    AutoModelForSequenceClassification.register(PadlessConfig, PadlessClassifier, exist_ok=True)
    config = PadlessConfig(vocab_size=320, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, num_labels=1)
    assert not hasattr(config, "pad_token_id")
    model = PadlessClassifier(config).eval()
    model.save_pretrained(tmp_path)
    scorer = RewardScorer(load_reward_model(tmp_path, device="cpu"))
    with torch.no_grad():
        states = [model.transformer(torch.tensor([ids])).last_hidden_state[0, -1] for ids in ROWS]
        expected = torch.stack([model.score(state)[0] for state in states])
    torch.testing.assert_close(scorer.score_encoded(ROWS), expected, atol=1e-5, rtol=0)
    del scorer.model.config.pad_token_id
    assert why_not_packed(scorer.model) is not None  # and no AttributeError of ours


# --- layers with a state, and others that are easily got wrong ---

STATES = {
    "mamba": MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2, state_size=8, pad_token_id=0),
    "rwkv": RwkvConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32),
    "falcon_h1": FalconH1Config(
        **{**TEXT, "num_hidden_layers": 2}, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8,
        mamba_chunk_size=8, ssm_multipliers=[0.5, 0.25, 2.0, 0.75, 1.5],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_layers_with_a_state_do_not_see_the_padding(name, tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(STATES[name]).save_pretrained(tmp_path)
    model = InfoRMForSequenceClassification.from_backbone(tmp_path, latent_dim=4).eval()
    assert why_not_packed(model) is not None
    assert_one_score(model)


def test_numbers_that_no_checkpoint_holds_are_the_backbones_own(tmp_path):
    """Falcon-H1 computes multipliers from its config; a wrapper that skipped that would leave them as memory was."""
    torch.manual_seed(0)
    causal_lm = AutoModelForCausalLM.from_config(STATES["falcon_h1"])
    causal_lm.save_pretrained(tmp_path / "lm")
    model = InfoRMForSequenceClassification.from_backbone(tmp_path / "lm", latent_dim=4)
    model.save_pretrained(tmp_path / "reward")
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    for made in (model, reloaded):
        for (key, found), (_, expected) in zip(
            made.model.named_buffers(), causal_lm.base_model.named_buffers(), strict=True
        ):
            assert torch.equal(found, expected), key
    assert any("mup_vector" in key for key, _ in model.model.named_buffers())


def test_embedded_rows_padded_on_the_left_have_the_same_rewards(backbone_configs):
    torch.manual_seed(0)
    model = InfoRMForSequenceClassification(InfoRMConfig(backbone_configs["gpt2"], latent_dim=4)).eval()
    batch = padded("left")
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    embedded = model.get_input_embeddings()(batch["input_ids"])
    with torch.no_grad():
        by_embedding = model(inputs_embeds=embedded, attention_mask=batch["attention_mask"], position_ids=positions)
    torch.testing.assert_close(by_embedding.logits.flatten(), rewards_alone(model), atol=1e-5, rtol=0)


def test_head_fits_hidden_states_that_are_projected(tmp_path):
    config = OPTConfig(vocab_size=320, hidden_size=32, word_embed_proj_dim=16, num_hidden_layers=2, ffn_dim=48,
                       num_attention_heads=4, max_position_embeddings=64, init_std=0.2)  # fmt: skip
    torch.manual_seed(0)
    OPTForCausalLM(config).save_pretrained(tmp_path)
    model = InfoRMForSequenceClassification.from_backbone(tmp_path, latent_dim=4).eval()
    assert model.score.encoder.in_features == 16
    assert_one_score(model)


BERT = BertConfig(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
T5 = T5Config(vocab_size=320, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
CPM_ANT = CpmAntConfig(vocab_size=320, hidden_size=32, num_attention_heads=4, dim_head=8, dim_ff=48,
                       num_hidden_layers=1)  # fmt: skip


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BertLMHeadModel(BERT), r"is an encoder \(bert\), whose tokens see what follows them"),
        (lambda: T5ForConditionalGeneration(T5), r"is an encoder-decoder model \(t5\)"),
        (lambda: CpmAntForCausalLM(CPM_ANT), "is a cpmant model: its states depend on the padding"),
    ],
)
def test_what_is_no_backbone_is_refused_with_the_reason(make, message, tokenizer, tmp_path):
    model = make()
    if not hasattr(model.config, "pad_token_id"):
        model.config.pad_token_id = None
    model.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    with pytest.raises(ValueError, match=message):
        InfoRMForSequenceClassification.from_backbone(tmp_path / "lm")
    with pytest.raises(InputError, match=message):
        train(run_settings(tmp_path / "lm", tmp_path))


@pytest.mark.slow
def test_a_dozen_architectures_have_one_score(tmp_path):
    """The benchmark of docs/reference/backbones.md on some of its models."""
    if not BENCHMARK.is_file():
        pytest.skip("benchmarks/ is not beside the tests")
    names = [
        "bloom", "falcon (ALiBi)", "gemma2", "gpt_neo", "gpt_oss", "jamba", "mamba", "mixtral", "mpt", "olmo2",
        "opt (projected)", "phi", "qwen3_moe", "recurrent_gemma",
    ]  # fmt: skip
    command = [sys.executable, str(BENCHMARK), "--only", ",".join(names), "--json", str(tmp_path / "found.json")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found) == set(names)
    for name, differences in found.items():
        assert "refused" not in differences, (name, differences)
        for check in ("weights", "reloaded", "right", "left"):
            assert differences[check] <= 1e-5, (name, check, differences[check])
        assert differences["packed"] is not None or differences["why_not_packed"], name
        assert differences["packed"] is None or differences["packed"] <= 1e-5, name
    assert {name for name in names if found[name]["packed"] is not None} == {
        "mixtral", "olmo2", "opt (projected)", "phi", "qwen3_moe",
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["inform", "foreign"])
def test_soft_caps_are_kept_whichever_attention_transformers_would_choose(kind, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    capped = Gemma2Config(
        vocab_size=99, **sizes, num_key_value_heads=2, head_dim=8, attn_logit_softcapping=0.05,
        query_pre_attn_scalar=1, initializer_range=1.0, pad_token_id=0, num_labels=1,
    )  # fmt: skip
    if kind == "inform":
        made = InfoRMForSequenceClassification(InfoRMConfig(text_config=capped, latent_dim=4))
    else:
        made = Gemma2ForSequenceClassification(capped)
    made.save_pretrained(tmp_path)
    ids = torch.randint(1, 99, (2, 12))
    ways = [AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation="eager").eval()]
    ways.append(load_reward_model(tmp_path))
    if kind == "inform":  # however it is loaded; of a foreign class that is transformers' matter
        ways += [made.eval(), AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()]
    with torch.no_grad():
        expected, *others = (model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for model in ways)
    for rewards in others:
        torch.testing.assert_close(rewards, expected, atol=1e-5, rtol=0)
