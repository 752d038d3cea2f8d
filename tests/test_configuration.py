"""`InfoRMConfig`: what it accepts, refuses, and keeps through a round trip."""

import json

import pytest
from transformers import AutoConfig, LlamaConfig, MistralConfig, PretrainedConfig

from inform_rm import InfoRMConfig


def test_default_backbone_is_llama_and_paper_defaults_hold():
    config = InfoRMConfig()
    assert config.text_config.model_type == "llama"
    assert (config.latent_dim, config.beta, config.decoder, config.kl_reduction) == (128, 0.1, "mlp", "sum")


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "gpt_neox", "gpt2"])
def test_round_trip_keeps_every_setting(name, backbone_configs, tmp_path):
    config = InfoRMConfig(
        text_config=backbone_configs[name], latent_dim=7, beta=0, decoder="linear", kl_reduction="averaged_moments"
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
    assert type(loaded.text_config) is type(backbone_configs[name])
    assert loaded.get_text_config() is loaded.text_config


def test_sliding_window_survives(tmp_path):
    InfoRMConfig(text_config=MistralConfig(sliding_window=5)).save_pretrained(tmp_path)
    assert InfoRMConfig.from_pretrained(tmp_path).text_config.sliding_window == 5


def test_reward_model_settings_are_fixed():
    config = InfoRMConfig(text_config=LlamaConfig(pad_token_id=9))
    assert config.num_labels == 1
    assert config.problem_type == "regression"
    assert config.pad_token_id == 9
    assert set(config.auto_map) == {
        "AutoConfig", "AutoModel", "AutoModelForSequenceClassification", "AutoModelForTokenClassification"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latent_dim": 0}, "latent_dim must be a whole number of at least 1, got 0"),
        ({"latent_dim": "x"}, "latent_dim must be a whole number of at least 1, got 'x'"),
        ({"latent_dim": 2.5}, "latent_dim must be a whole number"),
        ({"latent_dim": True}, "latent_dim must be a whole number"),
        ({"beta": -0.1}, "beta must be a finite number of at least 0, got -0.1"),
        ({"beta": float("nan")}, "beta must be a finite number"),
        ({"beta": "0.1"}, "beta must be a finite number"),
        ({"decoder": "tree"}, "decoder must be one of 'mlp', 'linear', got 'tree'"),
        ({"kl_reduction": "mean"}, "kl_reduction must be one of"),
        ({"kl_reduction_version": 3}, "kl_reduction_version must be one of 1, 2, got 3"),
        ({"head_bias": 1}, "head_bias must be true or false, got 1"),
        ({"head_bias": True}, 'head_bias needs architecture="standard"'),
        ({"architecture": "transformer"}, "architecture must be one of 'inform', 'standard'"),
        ({"num_labels": 3}, "num_labels is 3; a reward model has one output"),
        ({"text_config": {"model_type": "no-such-model"}}, "no-such-model"),
    ],
)
def test_wrong_setting_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        InfoRMConfig(**settings)


def test_all_faults_come_in_one_message():
    with pytest.raises(ValueError, match=r"latent_dim.*beta.*decoder"):
        InfoRMConfig(latent_dim=-1, beta=-1, decoder=None)


def test_the_file_can_be_read_without_the_class(tmp_path):
    """The Trainer reads a checkpoint's config as a plain PreTrainedConfig when it resumes."""
    InfoRMConfig(decoder="linear").save_pretrained(tmp_path)
    assert PretrainedConfig.from_json_file(tmp_path / "config.json").latent_decoder == "linear"
    assert InfoRMConfig.from_pretrained(tmp_path).decoder == "linear"


def test_a_file_without_a_version_of_the_kl_term_keeps_what_it_meant(tmp_path):
    InfoRMConfig(kl_reduction="averaged_moments").save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).kl_share == 0.5
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    assert settings.pop("kl_reduction_version") == 2
    path.write_text(json.dumps(settings))
    old = AutoConfig.from_pretrained(tmp_path)
    assert (old.kl_reduction_version, old.kl_share) == (1, 1.0)
    old.save_pretrained(tmp_path)
    assert InfoRMConfig.from_pretrained(tmp_path).kl_share == 1.0
    assert [InfoRMConfig(kl_reduction_version=version).kl_share for version in (1, 2)] == [1.0, 1.0]  # the sum, eq. 25
