"""LoRA, QLoRA and 8-bit optimizers: what is trained, what is saved, and that it loads back as the same model."""

import dataclasses
import json
import logging
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, set_seed
from transformers.pytorch_utils import Conv1D

from inform_rm.errors import InputError
from inform_rm.eval.evaluate import evaluate
from inform_rm.hub.export import export_model
from inform_rm.scoring.adapters import load_adapter_model
from inform_rm.scoring.packing import why_not_packed
from inform_rm.scoring.scorer import RewardScorer
from inform_rm.training.models import add_adapters, load_model
from inform_rm.training.run import train
from inform_rm.training.trainer import RewardTrainer

pytest.importorskip("peft", reason="peft is not installed")

PROMPTS = ["Name the colour red", "Name the colour blue please", "How many apples?"]
RESPONSES = ["It is red.", "It is red. Indeed.", "Seven."]
BITS = pytest.mark.parametrize("bits", [4, 8])
RUNS_OF_BITS = pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def wider_model(tmp_path_factory, tokenizer):
    """Layers of 64 x 64 and 64 x 128 weights: optimizer states of 4096 numbers and more."""
    folder = tmp_path_factory.mktemp("wider")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def settings(base_settings):
    return base_settings(learning_rate=5e-3, lr_scheduler_type="linear", lora_r=4)


def losses(result):
    return [line["loss"] for line in result["log_history"] if "loss" in line]


def adapted_model(config, seed=0):
    """A model with adapters that change it: lora_B starts at zero."""
    set_seed(seed)
    model = add_adapters(load_model(config), config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=0.05)
    return model.eval()


def rewards(model, tokenizer, **options):
    return RewardScorer(model, tokenizer, **options).score(PROMPTS, RESPONSES)


def bitsandbytes_layers(module):
    return [name for name, part in module.named_modules() if type(part).__module__.startswith("bitsandbytes")]


@pytest.mark.parametrize(
    ("architecture", "head"),
    [
        ("llama", "inform"),
        ("llama_tied", "standard"),
        ("qwen2", "inform"),
        ("gpt_neox", "standard"),
        ("gpt2", "inform"),
    ],
)  # fmt: skip
def test_every_linear_layer_of_the_backbone_has_an_adapter_and_the_head_none(
    settings, causal_lm_dir, architecture, head
):
    config = dataclasses.replace(settings, model=str(causal_lm_dir(architecture)), architecture=head)
    linear = {
        name
        for name, module in load_model(config).named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not name.startswith("score")
    }
    model = add_adapters(load_model(config), config)
    adapted = {
        name.removeprefix("base_model.model.") for name, module in model.named_modules() if hasattr(module, "lora_A")
    }
    assert adapted == linear
    assert len(linear) == {"gpt_neox": 8, "gpt2": 8}.get(architecture, 14)
    trainable = {name for name, value in model.named_parameters() if value.requires_grad}
    assert {".lora_A." in name or ".lora_B." in name or ".score.modules_to_save." in name for name in trainable} == {
        True
    }
    whole_head = sum(
        value.numel() for name, value in load_model(config).named_parameters() if name.startswith("score")
    )
    assert whole_head == sum(value.numel() for name, value in model.named_parameters()
                             if name in trainable and ".score." in name)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "scale"),
    [({}, 6 / 4), ({"use_rslora": True}, 6 / math.sqrt(4)), ({"use_dora": True}, 6 / 4)],
    ids=["lora", "rslora", "dora"],
)
def test_merged_weights_are_those_of_the_papers(settings, changes, scale, tokenizer):
    """LoRA: W + alpha/r B A; rsLoRA: alpha/sqrt(r); DoRA: rows of that sum, brought to the length m."""
    config = dataclasses.replace(settings, lora_alpha=6.0, **changes)
    model = adapted_model(config)
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    base = layer.base_layer.weight.detach().clone()
    expected = base + scale * layer.lora_B["default"].weight.detach() @ layer.lora_A["default"].weight.detach()
    if config.use_dora:
        magnitude = layer.lora_magnitude_vector["default"].weight.detach().clone()
        torch.testing.assert_close(magnitude, base.norm(dim=1))  # where DoRA starts
        with torch.no_grad():
            layer.lora_magnitude_vector["default"].weight.mul_(1.5)
        expected = 1.5 * magnitude[:, None] * expected / expected.norm(dim=1, keepdim=True)
    before = rewards(model, tokenizer)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged.model.layers[1].mlp.up_proj.weight, expected)
    assert (expected - base).abs().max() > 0.01
    torch.testing.assert_close(rewards(merged, tokenizer), before, atol=1e-5, rtol=0)


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"load_in_4bit": True}, {"load_in_8bit": True}])
def test_packed_and_padded_rewards_are_equal_with_adapters(settings, changes, tokenizer):
    model = adapted_model(dataclasses.replace(settings, **changes))
    assert why_not_packed(model) is None
    padded = rewards(model, tokenizer, batching="padded")
    alone = torch.cat([RewardScorer(model, tokenizer, batching="padded").score([prompt], [response])
                       for prompt, response in zip(PROMPTS, RESPONSES, strict=True)])  # fmt: skip
    scorer = RewardScorer(model, tokenizer)
    assert scorer.batching == "packed"
    torch.testing.assert_close(scorer.score(PROMPTS, RESPONSES), alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_packed_and_padded_batches_train_alike_with_adapters(settings, tmp_path):
    config = dataclasses.replace(settings, architecture="standard", use_dora=True)
    packed = train(config)
    padded = train(dataclasses.replace(config, batching="padded", output_dir=str(tmp_path / "padded")))
    assert (packed["batching"], padded["batching"]) == ("packed", "padded")
    assert losses(packed) == pytest.approx(losses(padded), abs=1e-4)


@pytest.mark.slow
def test_recomputed_activations_give_the_same_training(settings, tmp_path):
    config = dataclasses.replace(settings, architecture="standard", max_steps=4)
    stored = train(config)
    recomputed = train(
        dataclasses.replace(config, gradient_checkpointing=True, output_dir=str(tmp_path / "recomputed"))
    )
    assert losses(recomputed) == pytest.approx(losses(stored), abs=1e-6)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("gpt_neox", "gpt2")]


@pytest.mark.parametrize("architecture", ["llama", *SLOW])
def test_folder_of_adapters_gives_the_rewards_of_the_merged_model(
    settings, causal_lm_dir, architecture, tmp_path, tokenizer
):
    """Two runs that differ in `merge_adapters` alone; the folder of adapters is read without anything else."""
    config = dataclasses.replace(settings, model=str(causal_lm_dir(architecture)), use_rslora=True)
    train(config)
    train(dataclasses.replace(config, merge_adapters=False, output_dir=str(tmp_path / "adapters")))
    folder = tmp_path / "adapters"
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "config.json", "tokenizer.json"} <= names
    assert "model.safetensors" not in names
    assert "RewardScorer" in (folder / "README.md").read_text()
    expected = rewards(config.output_dir, None)
    torch.testing.assert_close(rewards(folder, None), expected, atol=1e-5, rtol=0)
    fresh = rewards(load_model(config), tokenizer)
    assert (expected - fresh).abs().max() > 0.1  # training has changed them
    export_model(str(folder), str(tmp_path / "whole"))
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "RewardScorer" not in card and "AutoModelForSequenceClassification.from_pretrained" in card
    assert "library_name: transformers" in card and "## Training" in card
    assert (folder / "adapter_model.safetensors").stat().st_size < 0.7 * (
        tmp_path / "run" / "model.safetensors"
    ).stat().st_size


def test_checkpoint_of_adapters_is_evaluated_and_exported_as_the_model_in_training(
    settings, pairs_file, tmp_path, tokenizer
):
    config = dataclasses.replace(settings, max_steps=3, merge_adapters=False)
    train(config)
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-3"
    assert (checkpoint / "adapter_model.safetensors").exists() and not (checkpoint / "README.md").exists()
    # The model in training: the same run, stopped where the checkpoint was written.
    in_training = add_adapters(load_model(config), config)
    in_training.load_adapter(str(checkpoint), "default")
    expected = rewards(in_training, tokenizer)
    torch.testing.assert_close(rewards(checkpoint, None), expected, atol=1e-5, rtol=0)
    export_model(str(checkpoint), str(tmp_path / "exported"))
    exported, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "exported", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(rewards(exported, tokenizer), expected, atol=1e-5, rtol=0)
    result = evaluate(checkpoint, pairs_file, progress=False)
    exported_result = evaluate(tmp_path / "exported", pairs_file, progress=False)
    assert result.model_fingerprint == exported_result.model_fingerprint


def check_resume(config, tmp_path):
    """A run that lost all after its first checkpoint ends with the weights of the run that did not."""
    expected = train(dataclasses.replace(config, max_steps=4, save_steps=2))
    cut = tmp_path / "cut"
    shutil.copytree(config.output_dir, cut)
    shutil.rmtree(cut / "checkpoints" / "checkpoint-4")
    for name in ("train_result.json", "model.safetensors"):
        (cut / name).unlink()
    resumed = train(dataclasses.replace(config, max_steps=4, save_steps=2, output_dir=str(cut)))
    assert resumed["resumed_from_step"] == 2
    assert losses(resumed) == losses(expected)
    first, second = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", cut))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_resumed_run_of_all_weights_with_an_eight_bit_optimizer_equals_the_uninterrupted_one(settings, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    check_resume(dataclasses.replace(settings, optim="adamw_bnb_8bit", lora_r=0), tmp_path)


@pytest.mark.slow
def test_run_on_a_folder_of_adapters_leaves_no_weights_of_another_kind(settings, tmp_path):
    config = dataclasses.replace(settings, max_steps=1)
    train(config)
    train(dataclasses.replace(config, merge_adapters=False, overwrite=True))
    assert not (tmp_path / "run" / "model.safetensors").exists()
    train(dataclasses.replace(config, overwrite=True))
    assert not list((tmp_path / "run").glob("adapter_*"))


@pytest.mark.slow
def test_best_checkpoint_of_adapters_is_the_final_model(settings, pairs_file, tokenizer):
    config = dataclasses.replace(
        settings, eval_data=(str(pairs_file),), eval_steps=2, save_steps=2, load_best_model_at_end=True,
        save_total_limit=None, merge_adapters=False,
    )  # fmt: skip
    result = train(config)
    accuracies = [line["eval_accuracy"] for line in result["log_history"] if "eval_accuracy" in line]
    assert result["evaluation"]["accuracy"] == max(accuracies)


# --- Quantised backbones -------------------------------------------------------------------------------------------


@pytest.fixture
def quantized(settings, bits):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return dataclasses.replace(settings, load_in_4bit=bits == 4, load_in_8bit=bits == 8)


@BITS
@pytest.mark.parametrize(("architecture", "head"), [("llama", "inform"), ("gpt_neox", "inform"), ("gpt2", "standard")])
def test_backbone_is_quantised_and_the_head_is_that_of_a_plain_model(
    quantized, settings, causal_lm_dir, bits, architecture, head
):
    changes = {"model": str(causal_lm_dir(architecture)), "architecture": head}
    set_seed(3)
    plain = load_model(dataclasses.replace(settings, **changes))
    set_seed(3)
    model = load_model(dataclasses.replace(quantized, **changes))
    linear = [name for name, module in plain.model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    assert bitsandbytes_layers(model.model) == linear
    assert not bitsandbytes_layers(model.score)
    for (name, value), (_, quantized_value) in zip(
        plain.score.named_parameters(), model.score.named_parameters(), strict=True
    ):
        assert quantized_value.dtype == torch.float32
        assert torch.equal(value, quantized_value), name
    adapted = add_adapters(model, quantized)
    trainable = {name for name, value in adapted.named_parameters() if value.requires_grad}
    assert not bitsandbytes_layers(adapted.base_model.model.score)
    assert all("lora_" in name or ".score.modules_to_save." in name for name in trainable)
    assert len([name for name in trainable if ".score." in name]) == len(list(plain.score.parameters()))
    in_memory = sum(value.numel() * value.element_size() for value in model.model.layers[0].parameters()
                    if not value.requires_grad) if architecture == "llama" else 0  # fmt: skip
    if architecture == "llama":
        whole = sum(value.numel() * 4 for value in plain.model.layers[0].parameters())
        assert in_memory < {4: 0.15, 8: 0.28}[bits] * whole


@BITS
def test_head_stays_float32_on_a_bfloat16_backbone(quantized, bits):
    model = load_model(dataclasses.replace(quantized, dtype="bfloat16"))
    assert {value.dtype for value in model.score.parameters()} == {torch.float32}
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    if bits == 4:
        layer = model.model.layers[0].mlp.up_proj
        assert layer.compute_dtype == torch.bfloat16
        assert layer.weight.quant_type == "nf4" and layer.weight.quant_state.nested


@BITS
def test_evaluation_leaves_the_gradients_of_a_quantised_model(quantized, wider_model, bits):
    """On CPUs with AVX512-BF16 bitsandbytes repacks weights in eval mode for a kernel without gradient."""
    model = adapted_model(dataclasses.replace(quantized, model=str(wider_model)))
    ids = torch.arange(10, 22).reshape(2, 6)

    def gradients():
        model.train()
        model.base_model.model.score.eval()  # no latent noise
        model.zero_grad()
        model(input_ids=ids).logits.square().sum().backward()
        return {name: value.grad.clone() for name, value in model.named_parameters() if value.requires_grad}

    before = gradients()
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
    after = gradients()
    first_layer = next(name for name in before if "layers.0.self_attn.q_proj.lora_B" in name)
    assert before[first_layer].abs().max() > 0
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


@RUNS_OF_BITS
def test_quantised_run_learns_and_leaves_a_model_in_full_precision(
    quantized, settings, pairs_file, bits, tmp_path, tokenizer, caplog
):
    config = dataclasses.replace(
        quantized, max_steps=20, save_steps=10, eval_data=(str(pairs_file),), eval_steps=20, beta=0.0
    )
    caplog.set_level(logging.WARNING)
    result = train(config)
    assert sum(losses(result)[-5:]) < 0.8 * sum(losses(result)[:5])
    exported, info = AutoModelForSequenceClassification.from_pretrained(
        config.output_dir, trust_remote_code=True, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not bitsandbytes_layers(exported) and {value.dtype for value in exported.parameters()} == {torch.float32}
    assert "quantization_config" not in json.loads((tmp_path / "run" / "config.json").read_text())

    # Base and adapters in full precision, side by side: neither merged nor quantised.
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-20"
    unmerged = add_adapters(load_model(settings), settings)
    unmerged.load_adapter(str(checkpoint), "default")
    expected = rewards(unmerged, tokenizer)
    torch.testing.assert_close(rewards(exported, tokenizer), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(rewards(checkpoint, None), expected, atol=1e-5, rtol=0)

    # On the quantised base the rewards are others, by as much as the result and the log say.
    in_training = add_adapters(load_model(quantized), quantized)
    in_training.load_adapter(str(checkpoint), "default")
    figures = result["quantization"]
    pairs = [json.loads(line) for line in pairs_file.read_text().splitlines()[:16]]
    prompts = [pair["prompt"] for pair in pairs for _ in range(2)]
    responses = [pair[side] for pair in pairs for side in ("chosen", "rejected")]
    difference = (
        RewardScorer(exported, tokenizer).score(prompts, responses)
        - RewardScorer(in_training, tokenizer).score(prompts, responses)
    ).abs()
    assert (figures["bits"], figures["num_responses"]) == (bits, 32)
    assert figures["reward_difference_mean"] == pytest.approx(difference.mean().item(), abs=1e-4)
    assert figures["reward_difference_max"] == pytest.approx(difference.max().item(), abs=1e-4)
    assert 1e-4 < figures["reward_difference_max"]
    assert f"Trained on a {bits}-bit base, the model goes out in full precision" in caplog.text
    # The result's accuracy is that of the model in the folder.
    assert result["evaluation"]["accuracy"] == evaluate(config.output_dir, pairs_file, progress=False).accuracy


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "changes"), [(4, {"use_dora": True}), (4, {"use_rslora": True}), (8, {})])
def test_quantised_run_with_other_adapters_leaves_adapters_that_load(quantized, settings, changes, bits, tokenizer):
    config = dataclasses.replace(quantized, merge_adapters=False, **changes)
    train(config)
    unmerged = add_adapters(load_model(settings), dataclasses.replace(settings, **changes))
    unmerged.load_adapter(config.output_dir, "default")
    expected = rewards(unmerged, tokenizer)
    torch.testing.assert_close(rewards(config.output_dir, None), expected, atol=1e-5, rtol=0)


@RUNS_OF_BITS
def test_resumed_quantised_run_equals_the_uninterrupted_one(quantized, bits, tmp_path):
    """With all that has a state of its own: adapters, their dropout and an 8-bit optimizer."""
    check_resume(dataclasses.replace(quantized, lora_dropout=0.1, optim="adamw_bnb_8bit"), tmp_path)


# --- 8-bit optimizers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optim",
    ["adamw_bnb_8bit", *(pytest.param(name, marks=pytest.mark.slow) for name in ("paged_adamw_8bit", "lion_8bit"))],
)
def test_eight_bit_optimizer_trains_and_keeps_eight_bit_states(settings, optim, wider_model, tmp_path):
    """bitsandbytes keeps states of fewer than 4096 numbers in 32 bits, the Trainer those of embeddings."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    config = dataclasses.replace(
        settings, model=str(wider_model), optim=optim, lora_r=0, max_steps=12, save_steps=12, beta=0.0,
        learning_rate=3e-4 if "lion" in optim else 3e-3,
    )  # fmt: skip
    result = train(config)
    assert sum(losses(result)[-3:]) < 0.8 * sum(losses(result)[:3])
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-12"
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    kinds = {}
    for values in state.values():
        values = values.get("__bnb_optimizer_quant_state__", values)
        for name in {"state1"} if "lion" in optim else {"state1", "state2"}:
            kinds.setdefault(values[name].numel(), set()).add(values[name].dtype)
    embedding, linear = 320 * 64, {64 * 64, 64 * 128}
    assert kinds.pop(embedding) == {torch.float32}
    assert {size: kinds.pop(size) for size in linear} == {size: {torch.uint8} for size in linear}
    assert set.union(*kinds.values()) == {torch.float32} and max(kinds) < 4096


# --- Refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"load_in_4bit": True, "load_in_8bit": True}, "load_in_4bit and load_in_8bit exclude each other"),
        ({"load_in_4bit": True, "lora_r": 0}, "load_in_4bit needs LoRA: set lora_r"),
        ({"load_in_8bit": True, "lora_r": 0}, "load_in_8bit needs LoRA: set lora_r"),
        ({"use_dora": True, "lora_r": 0}, "use_dora needs LoRA"),
        ({"use_rslora": True, "lora_r": 0}, "use_rslora needs LoRA"),
        ({"merge_adapters": False, "lora_r": 0}, "merge_adapters is false, but lora_r is 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, changes, message):
    with pytest.raises(InputError, match=message):
        RewardTrainer(args=dataclasses.replace(settings, **changes))


def test_what_cannot_be_quantised_is_refused(settings, monkeypatch, tmp_path):
    config = dataclasses.replace(settings, load_in_4bit=True)
    load_model(config).save_pretrained(tmp_path / "quantised")
    with pytest.raises(InputError, match="is quantised already"):
        load_model(dataclasses.replace(config, model=str(tmp_path / "quantised")))
    with pytest.raises(InputError, match=r"use_dora: on a CPU peft .* loses the scales of 8-bit weights"):
        load_model(dataclasses.replace(settings, load_in_8bit=True, use_dora=True))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(InputError, match="load_in_4bit: quantised weights under FSDP were never tried"):
        load_model(config)


@pytest.fixture
def adapter_folder(settings, tokenizer, tmp_path):
    """Adapters as a checkpoint holds them, their base in a folder that may be changed."""
    base = tmp_path / "base"
    shutil.copytree(settings.model, base)
    config = dataclasses.replace(settings, model=str(base))
    folder = tmp_path / "adapters"
    train(dataclasses.replace(config, max_steps=1, merge_adapters=False, output_dir=str(folder)))
    return folder


def without_base(folder):
    shutil.rmtree(folder.parent / "base")


def with_another_architecture(folder, base="gpt_neox"):
    without_base(folder)
    config = LlamaConfig(vocab_size=320, hidden_size=48, intermediate_size=48, num_hidden_layers=3,
                         num_attention_heads=4)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder.parent / "base")


def with_a_pickled_base(folder):
    weights = load_file(folder.parent / "base" / "model.safetensors")
    torch.save(weights, folder.parent / "base" / "pytorch_model.bin")
    (folder.parent / "base" / "model.safetensors").unlink()


def without_head(folder):
    path = folder / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if ".score." not in name}, path)


def without_one_adapter(folder):
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    weights.pop(next(name for name in weights if "lora_B" in name))
    save_file(weights, path)


def cut_off(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pickled(folder):
    path = folder / "adapter_model.safetensors"
    torch.save(load_file(path), folder / "adapter_model.bin")
    path.unlink()


def without_config(folder):
    (folder / "config.json").unlink()


def without_name_of_base(folder):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": None}))


def test_broken_folder_of_adapters_is_refused_with_the_reason(adapter_folder):
    faults = {
        without_base: "adapters for the base model .*base, which is not there. Put it back",
        with_another_architecture: "another model now: hidden_size 48 instead of 32, num_hidden_layers 3 instead of 2",
        with_a_pickled_base: "which cannot be loaded: .*safetensors",
        without_head: "adapters without the reward head, which would be random",
        without_one_adapter: "1 adapter weights are missing .*lora_B",
        cut_off: "is incomplete or broken",
        pickled: "Only safetensors are read; a pickled adapter .* is refused",
        without_config: "PEFT adapter, not a whole model, and not one that inform-rm train wrote",
        without_name_of_base: "names no base model",
    }
    whole = adapter_folder.parent / "whole"
    for name in ("adapters", "base"):
        shutil.copytree(adapter_folder.parent / name, whole / name)
    load_adapter_model(adapter_folder)  # as it is, it loads
    for break_it, message in faults.items():
        for name in ("adapters", "base"):
            shutil.rmtree(adapter_folder.parent / name, ignore_errors=True)
            shutil.copytree(whole / name, adapter_folder.parent / name)
        break_it(adapter_folder)
        with pytest.raises(InputError, match=message):
            RewardScorer(adapter_folder)


def test_training_from_a_folder_of_adapters_is_refused(settings, adapter_folder, tmp_path):
    with pytest.raises(InputError, match="holds adapters, not a whole model"):
        train(dataclasses.replace(settings, model=str(adapter_folder), output_dir=str(tmp_path / "other")))


def test_adapters_on_a_trained_reward_model_load_back(settings, tmp_path, tokenizer):
    """The base is itself an InfoRM model, whose head gives way to the one saved with the adapters."""
    first = dataclasses.replace(settings, max_steps=1, lora_r=0)
    train(first)
    second = dataclasses.replace(
        settings, max_steps=3, model=first.output_dir, output_dir=str(tmp_path / "second"), merge_adapters=False
    )
    train(second)
    model = add_adapters(load_model(second), second)
    model.load_adapter(second.output_dir, "default")
    torch.testing.assert_close(rewards(second.output_dir, None), rewards(model, tokenizer), atol=1e-5, rtol=0)
    assert (rewards(second.output_dir, None) - rewards(first.output_dir, None)).abs().max() > 0.01


# --- On a GPU; never run: bitsandbytes was not where the others ran ------------------------------------------------


@pytest.mark.gpu
@BITS
def test_bfloat16_qlora_with_a_paged_optimizer_on_a_gpu(quantized, settings, bits, wider_model, pairs_file, tmp_path):
    config = dataclasses.replace(
        quantized, model=str(wider_model), use_cpu=False, bf16=True, dtype="bfloat16", optim="paged_adamw_8bit",
        gradient_checkpointing=True, max_steps=20, save_steps=10, beta=0.0, eval_data=(str(pairs_file),),
        eval_steps=10,
    )  # fmt: skip
    result = train(config)
    assert sum(losses(result)[-5:]) < 0.8 * sum(losses(result)[:5])
    exported, info = AutoModelForSequenceClassification.from_pretrained(
        config.output_dir, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not bitsandbytes_layers(exported)
    # bfloat16 keeps 8 bits of a number: rewards of merged weights agree to a few per cent of their size.
    checkpoint = rewards(tmp_path / "run" / "checkpoints" / "checkpoint-20", None, device="cuda", dtype="float32")
    torch.testing.assert_close(rewards(config.output_dir, None, device="cuda", dtype="float32"), checkpoint,
                               atol=0.05, rtol=0.05)  # fmt: skip
    assert math.isfinite(result["quantization"]["reward_difference_max"])
