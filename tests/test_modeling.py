"""`InfoRMForSequenceClassification`: the head's formulas, loading, and "one score" whatever the batch looks like."""

import copy
import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BitsAndBytesConfig,
    LlamaForSequenceClassification,
    pipeline,
)

from inform_rm import InfoRMConfig, InfoRMForSequenceClassification
from inform_rm.modeling_inform import (
    InfoRMHead,
    InfoRMOutput,
    RewardLinear,
    _last_token,
    _with_padding_at_the_end,
    bradley_terry_loss,
    kl_to_standard_normal,
)
from inform_rm.training.losses import hinge_loss

ARCHITECTURES = ["llama", "llama_tied", "mistral", "qwen2", "gpt_neox", "gpt2"]


def tensors(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model(backbone_configs):
    torch.manual_seed(0)
    config = copy.deepcopy(backbone_configs["llama"])  # a test may change it; the fixture serves the whole session
    return InfoRMForSequenceClassification(InfoRMConfig(config, latent_dim=8)).eval()


def rows(seed=0, lengths=(12, 5, 9, 1)):
    """Token rows of the given lengths, and the rewards' batch of one as reference is computed from each."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 320, (length,), generator=generator) for length in lengths]


def padded(token_rows, side, extra=0, pad=0):
    width = max(map(len, token_rows)) + extra
    ids, mask = torch.full((len(token_rows), width), pad), torch.zeros(len(token_rows), width, dtype=torch.long)
    for index, row in enumerate(token_rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[index, place], mask[index, place] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


# --- formulas ---


def test_kl_matches_torch_distributions():
    mean, log_variance = tensors(0, 2, 5, 3)
    expected = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0)).sum(dim=-1)
    torch.testing.assert_close(kl_to_standard_normal(mean, log_variance), expected)


def test_kl_near_the_prior_keeps_its_digits():
    # 0.5 * (exp(v) - 1 - v) = v^2 / 4 for small v: 2.5e-9 for v = 1e-4, below float32's resolution of exp(v) - 1 - v.
    value = kl_to_standard_normal(torch.zeros(1, 1), torch.full((1, 1), 1e-3))
    assert value.item() == pytest.approx(2.5e-7, rel=0.05)


def test_averaged_moments_is_the_kl_of_the_averages(backbone_configs):
    config = InfoRMConfig(backbone_configs["llama"], latent_dim=8, kl_reduction="averaged_moments")
    model = InfoRMForSequenceClassification(config).eval()
    output = model(tensors(0, 2, 6).abs().long() + 3)
    mean, log_variance = output.latent_mean.mean(-1), output.latent_log_variance.mean(-1)
    expected = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(output.kl, expected)


@pytest.mark.parametrize("version", [1, 2])
def test_averaged_moments_weigh_what_the_authors_released_term_does(backbone_configs, version):
    """Their term in NumPy: moments averaged over K, then the KL's mean over all 2 B rows of a batch."""
    config = InfoRMConfig(
        backbone_configs["llama"],
        latent_dim=8,
        kl_reduction="averaged_moments",
        kl_reduction_version=version,
        beta=0.7,
    )
    torch.manual_seed(0)
    model = InfoRMForSequenceClassification(config).eval()
    output = model(tensors(0, 6, 5).abs().long() + 3, return_loss=True)
    rewards = output.logits.detach().double().numpy().flatten()
    mean = output.latent_mean.detach().double().numpy().mean(axis=1)
    log_variance = output.latent_log_variance.detach().double().numpy().mean(axis=1)
    released_term = np.mean(-0.5 * (1 + log_variance - mean**2 - np.exp(log_variance)))
    preference = np.mean(np.log1p(np.exp(rewards[3:] - rewards[:3])))
    assert released_term > 1e-3
    assert output.loss.item() == pytest.approx(preference + 0.7 * {1: 2, 2: 1}[version] * released_term, rel=1e-5)


def test_head_samples_the_posterior_in_training_and_takes_its_mean_in_eval(backbone_configs):
    torch.manual_seed(0)
    config = InfoRMConfig(backbone_configs["llama"], latent_dim=3, decoder="linear")
    head = InfoRMHead(config, 32)
    hidden = tensors(1, 1, 32)
    mean, log_variance = head.encode(hidden)
    weight, bias = head.decoder.weight[0], head.decoder.bias
    torch.testing.assert_close(head.eval()(hidden)[0], mean[0] @ weight[:, None][:, 0] + bias)
    draws = head.train()(hidden.expand(20000, 32))[:, 0]
    # A linear map of a Gaussian: mean w mu + b, variance sum_k w_k^2 sigma_k^2.
    expected_std = (weight.square() * log_variance[0].exp()).sum().sqrt()
    assert draws.mean().item() == pytest.approx((mean[0] @ weight + bias).item(), abs=4 * expected_std.item() / 141)
    assert draws.std().item() == pytest.approx(expected_std.item(), rel=0.03)


@pytest.mark.parametrize("shape", [(2, 32), (2, 5, 32)])
def test_rewards_are_decoded_draws_given_or_from_seed_0(shape, backbone_configs):
    head = InfoRMHead(InfoRMConfig(backbone_configs["llama"], latent_dim=3), 32).eval()
    hidden = tensors(0, *shape)
    rewards, mean, log_variance, std = head(hidden, return_latents=True, reward_samples=7)
    draws = torch.stack([head.decode(mean + log_variance.exp().sqrt() * noise) for noise in tensors(0, 7, 3)])
    torch.testing.assert_close(rewards, draws.mean(dim=0))
    torch.testing.assert_close(std, draws.std(dim=0))
    noise = tensors(1, *mean.shape)
    found = head.train()(hidden, latent_noise=noise)
    torch.testing.assert_close(found, head.decode(mean + log_variance.exp().sqrt() * noise))


def test_draws_are_on_the_device_of_the_latents(backbone_configs, monkeypatch):
    head = InfoRMHead(InfoRMConfig(backbone_configs["llama"], latent_dim=3), 32)
    there = torch.ones(2, 3, device="meta")  # stands for a GPU; autocast does not know it
    monkeypatch.setattr(head, "encode", lambda hidden: (there, there))
    monkeypatch.setattr(head, "decode", lambda latent: latent)
    assert head(there, reward_samples=7).is_meta
    assert head(there, latent_noise=torch.ones(2, 3)).is_meta


def test_given_draws_reach_the_head(model):
    batch, noise = padded(rows(), "right"), tensors(1, 4, 8)
    output = model.train()(**batch, latent_noise=noise)
    drawn = output.latent_mean + output.latent_log_variance.exp().sqrt() * noise
    torch.testing.assert_close(output.logits, model.score.decode(drawn))


def test_loss_matches_ten_lines_of_numpy(model):
    batch = padded(rows(1, (7, 4, 6, 3)), "right")
    margin = torch.tensor([0.3, -0.1])
    output = model(**batch, margin=margin, return_loss=True)
    reward, mean, log_variance = (
        value.detach().double().numpy()
        for value in (output.logits[:, 0], output.latent_mean, output.latent_log_variance)
    )
    kl = 0.5 * (mean**2 + np.exp(log_variance) - 1 - log_variance).sum(axis=1)
    pairs = []
    for pair in range(2):
        difference = reward[pair] - reward[pair + 2] - margin[pair].item()
        pairs.append(np.log1p(np.exp(-difference)) + 0.1 * (kl[pair] + kl[pair + 2]))
    assert output.loss.item() == pytest.approx(np.mean(pairs), rel=1e-6)


def test_head_and_loss_pass_gradcheck_in_float64(backbone_configs):
    torch.manual_seed(0)
    head = InfoRMHead(InfoRMConfig(backbone_configs["llama"], latent_dim=3), 4).double().eval()

    def loss(hidden):
        rewards, mean, log_variance, _ = head(hidden, return_latents=True)
        chosen, rejected = rewards.chunk(2)
        return bradley_terry_loss(chosen, rejected) + 0.1 * kl_to_standard_normal(mean, log_variance).mean()

    assert torch.autograd.gradcheck(loss, tensors(2, 4, 4).double().requires_grad_())


def test_training_and_loss_refuse_unequal_numbers():
    with pytest.raises(ValueError, match=r"shape \(2,\) and rejected_rewards \(3,\)"):
        bradley_terry_loss(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="margin has 3 values for 2 pairs"):
        bradley_terry_loss(torch.zeros(2), torch.zeros(2), torch.zeros(3))


def test_the_models_own_loss_is_the_one_it_was_trained_with_or_refused(model):
    batch = padded(rows()[:2], "right")
    plain = model(**batch, return_loss=True)
    kl = 2 * model.config.beta * plain.kl.mean()
    model.config.loss_type = "hinge"
    with pytest.raises(ValueError, match=r"loss_type='hinge'.*model\.loss_function"):
        model(**batch, return_loss=True)
    model.loss_function = hinge_loss
    expected = hinge_loss(*plain.logits.chunk(2)) + kl
    torch.testing.assert_close(model(**batch, return_loss=True).loss, expected)


def test_score_module_maps_every_position(model):
    hidden = tensors(3, 2, 5, 32)
    rewards = model.score(hidden)
    assert rewards.shape == (2, 5, 1)
    torch.testing.assert_close(rewards[1, 3], model.score(hidden[1, 3]))


def test_reward_samples_do_not_depend_on_batch_mates_or_random_state(model):
    token_rows = rows()
    together = model(**padded(token_rows, "right"), reward_samples=64)
    torch.manual_seed(99)
    alone = model(token_rows[1][None], reward_samples=64)
    torch.testing.assert_close(together.logits[1], alone.logits[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(together.reward_std[1], alone.reward_std[0], atol=1e-5, rtol=0)
    assert (together.reward_std > 0).all()
    assert model(token_rows[0][None], reward_samples=2).reward_std.isfinite().all()  # the fewest


# --- one score ---


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_reward_ignores_padding_and_batch_mates(name, backbone_configs):
    torch.manual_seed(0)
    model = InfoRMForSequenceClassification(InfoRMConfig(backbone_configs[name], latent_dim=8)).eval()
    token_rows = rows(lengths=(12, 5, 9, 1, 20))
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        alone = torch.cat([model(row[None]).logits for row in token_rows])
        for side, extra in itertools.product(("right", "left"), (0, 7)):
            batched = model(**padded(token_rows, side, extra)).logits
            torch.testing.assert_close(batched, alone, atol=1e-5, rtol=0)


def test_pad_token_equal_to_end_token_changes_nothing(model):
    token_rows = [torch.cat([row, torch.tensor([2])]) for row in rows()]
    alone = torch.cat([model(row[None]).logits for row in token_rows])
    model.config.pad_token_id = model.config.text_config.pad_token_id = 2
    torch.testing.assert_close(model(**padded(token_rows, "right", 3, pad=2)).logits, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(model(**padded(token_rows, "left", 3, pad=2)).logits, alone, atol=1e-5, rtol=0)


def test_embeddings_in_place_of_tokens_give_the_same_rewards(model):
    for side in ("right", "left"):
        batch = padded(rows(), side, 3)
        embedded = model.get_input_embeddings()(batch["input_ids"])
        found = model(inputs_embeds=embedded, attention_mask=batch["attention_mask"]).logits
        torch.testing.assert_close(found, model(**batch).logits)


def test_tokens_that_a_mask_leaves_out_are_not_there(model):
    row = rows()[0]
    ids, mask = torch.cat([row[:4], torch.tensor([9, 9]), row[4:]])[None], torch.ones(1, 14).long()
    mask[0, 4:6] = 0
    torch.testing.assert_close(model(ids, mask).logits, model(row[None]).logits)


def test_given_positions_stay_with_their_tokens(model):
    batch = padded(rows(), "left", 3)
    counted = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    expected = model(**batch).logits
    torch.testing.assert_close(model(**batch, position_ids=counted).logits, expected)
    stretched = model(**batch, position_ids=3 * counted).logits
    assert (stretched - expected)[:3].abs().min() > 1e-6  # the last row has one token, at 0


def test_padding_is_turned_and_the_last_token_found_on_the_masks_device():
    mask = torch.ones(2, 3, device="meta")  # stands for a GPU
    assert _with_padding_at_the_end(mask)[0].is_meta
    assert _last_token(mask[:, :, None], mask).is_meta


def test_unknown_keywords_are_ignored_and_eval_is_deterministic(model):
    batch = padded(rows(), "right")
    expected = model(**batch).logits
    torch.testing.assert_close(model(**batch, num_items_in_batch=3, use_cache=True, other="x").logits, expected)
    output = model(**batch, return_dict=False)
    assert type(output) is tuple and len(output) == 4  # logits, mean, log variance, kl
    assert type(model(**batch, return_dict=True)) is InfoRMOutput


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Pass input_ids or inputs_embeds"),
        ({"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(2, 4)}, r"expected \(2, 3\)"),
        ({"input_ids": torch.ones(3, 3).long(), "return_loss": True}, "got 3 rows"),
        ({"input_ids": torch.ones(2, 3).long(), "reward_samples": 1}, "at least 2"),
        ({"input_ids": torch.ones(1, 3).long(), "packed_segments": [[3]]}, "go together.*got 1"),
        ({"input_ids": torch.ones(2, 3).long(), "pooled_positions": torch.tensor([2])}, "go together.*got 2"),
    ],
)
def test_wrong_arguments_are_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model(**arguments)


def test_standard_head_has_no_samples(backbone_configs):
    model = InfoRMForSequenceClassification(InfoRMConfig(backbone_configs["llama"], architecture="standard"))
    with pytest.raises(ValueError, match="reward_samples needs architecture"):
        model(torch.ones(1, 3).long(), reward_samples=4)


# --- numbers of the head under half precision ---


def test_head_computes_in_float32_with_bfloat16_weights(model):
    half = model.to(torch.bfloat16)
    output = half(rows()[0][None])
    assert output.logits.dtype == output.kl.dtype == output.latent_mean.dtype == torch.float32
    layer = RewardLinear(32, 1).to(torch.bfloat16)
    hidden = tensors(4, 3, 32).to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = layer(hidden)
    torch.testing.assert_close(result, hidden.float() @ layer.weight.float().T + layer.bias.float())


# --- loading ---


@pytest.mark.parametrize(
    ("name", "base"),
    [*((name, False) for name in ARCHITECTURES), *((name, True) for name in ("llama", "gpt_neox", "gpt2"))],
)
def test_from_backbone_loads_every_weight_and_the_copy_reloads(name, base, causal_lm_dir, tmp_path):
    reference = AutoModelForCausalLM.from_pretrained(causal_lm_dir(name)).base_model
    source = causal_lm_dir(name)
    if base:
        source = tmp_path / "base"
        reference.save_pretrained(source)
    model = InfoRMForSequenceClassification.from_backbone(source, latent_dim=8)
    expected, found = reference.state_dict(), model.model.state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    mean_rows, log_variance_rows = model.score.encoder.weight.chunk(2)
    assert mean_rows.std().item() * 32**0.5 == pytest.approx(1.0, rel=0.2)
    assert log_variance_rows.std().item() * 32**0.5 == pytest.approx(0.1, rel=0.2)
    means, log_variances = model.score.encoder.bias.chunk(2)
    assert not means.any() and log_variances.eq(-4.0).all()

    model.save_pretrained(tmp_path / "saved")
    reloaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), reloaded.state_dict().values(), strict=True)
    )


def test_from_backbone_refuses_what_is_no_backbone(causal_lm_dir, tmp_path, model):
    model.save_pretrained(tmp_path / "reward")
    with pytest.raises(ValueError, match="is an InfoRM reward model, not a backbone"):
        InfoRMForSequenceClassification.from_backbone(tmp_path / "reward")
    broken = AutoModelForCausalLM.from_pretrained(causal_lm_dir("llama"))
    state = {key: value for key, value in broken.state_dict().items() if "layers.1.mlp" not in key}
    broken.save_pretrained(tmp_path / "broken", state_dict=state)
    with pytest.raises(ValueError, match=r"3 missing \(first: model.layers.1.mlp.down_proj.weight\)"):
        InfoRMForSequenceClassification.from_backbone(tmp_path / "broken")


def test_the_config_is_taken_from_where_the_weights_are(causal_lm_dir, tmp_path, monkeypatch):
    where = {
        "revision": "main", "token": False, "cache_dir": str(tmp_path), "local_files_only": True, "subfolder": "",
        "trust_remote_code": False,
    }  # fmt: skip
    seen, real = [], AutoConfig.from_pretrained
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda name, **given: seen.append(given) or real(name, **given))
    InfoRMForSequenceClassification.from_backbone(causal_lm_dir("llama"), **where, latent_dim=8)
    assert seen[0] == where


def test_from_pretrained_keywords_are_passed_on(causal_lm_dir):
    model = InfoRMForSequenceClassification.from_backbone(
        causal_lm_dir("llama"), dtype=torch.bfloat16, attn_implementation="eager", device_map="auto"
    )
    assert model.dtype == torch.bfloat16
    assert model.model.config._attn_implementation == "eager"
    assert model(torch.ones(1, 3).long()).logits.shape == (1, 1)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_backbone_keeps_a_plain_head(bits, causal_lm_dir, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    quantization = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = InfoRMForSequenceClassification.from_backbone(causal_lm_dir("llama"), quantization_config=quantization)
    assert type(model.score.encoder) is RewardLinear
    assert (
        "bnb" in type(model.model.layers[0].mlp.up_proj).__module__
        or "bitsandbytes" in type(model.model.layers[0].mlp.up_proj).__module__
    )
    ids = rows()[0][None]
    expected = model.eval()(ids).logits
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(reloaded(ids).logits, expected)


def test_standard_architecture_equals_transformers_own_class(causal_lm_dir, tmp_path):
    torch.manual_seed(0)
    theirs = LlamaForSequenceClassification.from_pretrained(
        causal_lm_dir("llama"), num_labels=1, pad_token_id=0
    ).eval()
    ours = InfoRMForSequenceClassification.from_backbone(causal_lm_dir("llama"), architecture="standard").eval()
    ours.score.load_state_dict(theirs.score.state_dict())
    batch = padded(rows(), "right")
    torch.testing.assert_close(ours(**batch).logits, theirs(**batch).logits, atol=1e-6, rtol=0)
    # The other way round: their saved classifier continues as our standard model, head included.
    theirs.save_pretrained(tmp_path)
    continued = InfoRMForSequenceClassification.from_backbone(tmp_path, architecture="standard").eval()
    torch.testing.assert_close(continued(**batch).logits, theirs(**batch).logits, atol=1e-6, rtol=0)


@pytest.mark.parametrize("left", ["weight", "bias"])
def test_of_a_head_that_is_stored_in_part_the_rest_is_fresh(backbone_configs, left, tmp_path):
    config = InfoRMConfig(backbone_configs["llama"], architecture="standard", head_bias=True)
    model = InfoRMForSequenceClassification(config)
    assert model.num_labels == 1  # PEFT asks
    torch.nn.init.constant_(model.score.weight, 5.0)
    torch.nn.init.constant_(model.score.bias, 5.0)
    stored = {
        name: value for name, value in model.state_dict().items() if name.startswith(("model.", f"score.{left}"))
    }
    model.save_pretrained(tmp_path, state_dict=stored)
    score = InfoRMForSequenceClassification.from_pretrained(tmp_path).score
    kept, fresh = (score.weight, score.bias) if left == "weight" else (score.bias, score.weight)
    assert kept.eq(5.0).all() and fresh.abs().max() < 2


@pytest.mark.parametrize(
    ("kind", "chosen", "found"), [("gemma2", "sdpa", "eager"), ("gemma2", "eager", "eager"), ("llama", "sdpa", "sdpa")]
)
def test_soft_caps_are_not_left_to_a_kernel_that_has_none(kind, chosen, found):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(kind, vocab_size=99, **sizes, num_key_value_heads=2, head_dim=16)
    model = InfoRMForSequenceClassification(InfoRMConfig(config, latent_dim=4, attn_implementation=chosen))
    assert model.model.config._attn_implementation == found


@pytest.mark.slow
def test_saved_model_loads_in_a_process_without_the_package(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = rows()[0]
    code = """
import json, sys
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification
folder, ids = sys.argv[1], json.loads(sys.argv[2])
rewards = []
for auto in (AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification):
    model, info = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    rewards.append(model.eval()(torch.tensor([ids])).logits.item())
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).latent_dim == 8
model.save_pretrained(folder + "/again")
again = AutoModel.from_pretrained(folder + "/again", trust_remote_code=True).eval()
rewards.append(again(torch.tensor([ids])).logits.item())
assert "inform_rm" not in sys.modules
print(json.dumps(rewards))
"""
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-I", "-c", code, str(tmp_path), json.dumps(ids.tolist())],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    expected = model(ids[None]).logits.item()
    assert json.loads(result.stdout.splitlines()[-1]) == pytest.approx([expected] * 4, abs=1e-6)


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_with_the_package_no_remote_code_is_needed(auto, model, tmp_path):
    model.save_pretrained(tmp_path)
    assert auto.from_pretrained(tmp_path).__class__.__module__ == "inform_rm.modeling_inform"


def test_pipeline_gives_the_raw_reward(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    text = "The sky is blue and the grass is green."
    expected = model(**tokenizer(text, return_tensors="pt")).logits.item()
    classify = pipeline("text-classification", model=str(tmp_path), device="cpu")
    assert classify(text)[0]["score"] == pytest.approx(expected, abs=1e-5)
    assert classify([text, "Roses are red."], batch_size=2)[0]["score"] == pytest.approx(expected, abs=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients(backbone_configs):
    torch.manual_seed(0)
    model = InfoRMForSequenceClassification(InfoRMConfig(backbone_configs["llama"], latent_dim=8)).train()
    batch = padded(rows(), "right")

    def gradients():
        model.zero_grad()
        torch.manual_seed(1)
        model(**batch, return_loss=True).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    plain = gradients()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    checkpointed = gradients()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


def test_layers_that_must_not_be_split_are_the_backbones(model):
    assert "LlamaDecoderLayer" in model._no_split_modules


def test_embeddings_can_be_resized(model):
    model.resize_token_embeddings(330)
    assert model.get_input_embeddings().weight.shape[0] == 330
    assert model.config.get_text_config().vocab_size == 330


def test_fresh_latent_means_are_as_large_as_the_hidden_states_and_log_variances_a_tenth(backbone_configs):
    torch.manual_seed(0)
    model = InfoRMForSequenceClassification(InfoRMConfig(text_config=backbone_configs["llama"], latent_dim=512))
    mean, log_variance = model.score.encode(torch.randn(64, 32))
    assert mean.std().item() == pytest.approx(1.0, rel=0.05)
    assert log_variance.std().item() == pytest.approx(0.1, rel=0.05)


@pytest.mark.parametrize("size", [1024, 9])
def test_a_fresh_decoder_is_linear(backbone_configs, size):
    torch.manual_seed(0)
    config = InfoRMConfig(backbone_configs["llama"], latent_dim=size)
    decoder = InfoRMForSequenceClassification(config).score.decoder.double()
    if size % 2:  # of an odd number one unit has no partner
        decoder[2].weight.data[:, size // 2] = 0
    latents = torch.randn(2, 100, size, dtype=torch.float64)
    first, second = decoder(latents)
    torch.testing.assert_close(decoder(2 * latents[0] - 3 * latents[1]), 2 * first - 3 * second)
    if size == 1024:
        assert first.std().item() == pytest.approx(0.4 / 2**0.5, rel=0.2)


def test_a_decoder_that_started_linear_learns_what_is_not(backbone_configs):
    torch.manual_seed(0)
    decoder = InfoRMForSequenceClassification(InfoRMConfig(backbone_configs["llama"], latent_dim=8)).score.decoder
    latents = torch.randn(256, 8)
    target = latents[:, :1].square()
    optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-2)
    for _ in range(300):
        loss = (decoder(latents) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2 * target.var()  # a linear function can explain next to nothing of it
