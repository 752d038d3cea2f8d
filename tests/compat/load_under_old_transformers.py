"""Check that an exported model gives the same rewards under the oldest supported transformers (run by .ci/run).

    python load_under_old_transformers.py export FOLDER    with this package: writes models and folded ones, with
                                                           their rewards
    python load_under_old_transformers.py load FOLDER      with torch and transformers 4.57 only: loads and compares

Not a pytest file: the two halves need two environments.
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch
import transformers

# Rotary settings differ from every default: transformers 5 saves them under a name that 4.57 does not know.
SETTINGS = {
    "llama": {
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
    },
    "mistral": {
        "num_key_value_heads": 2,
        "sliding_window": 4,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 50.0, "factor": 3.0},
    },
    "qwen2": {
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 100.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "gpt_neox": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}},
}
TEXTS = ["good answer", "a bad and much longer answer", "good", "answer the bad one"]
TOLERANCE = 1e-5


def build_tokenizer() -> transformers.PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<eos>", "<unk>", *sorted({word for text in TEXTS for word in text.split()})]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def rewards_of(model, tokenizer, padding_side: str) -> list[float]:
    tokenizer.padding_side = padding_side
    # Not every 4.57 tokenizer leaves out token_type_ids; they mean nothing to a decoder.
    encoded = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(input_ids=encoded["input_ids"], attention_mask=encoded["attention_mask"]).logits[:, 0].tolist()


def export(folder: Path) -> None:
    import inform_rm
    from inform_rm.hub.export import export_model

    tokenizer = build_tokenizer()
    expected = {}
    for model_type, settings in SETTINGS.items():
        for architecture in ("inform", "standard"):
            torch.manual_seed(0)
            text_config = transformers.AutoConfig.for_model(
                model_type,
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=64,
                pad_token_id=0,
                bos_token_id=None,
                eos_token_id=1,
                **settings,
            )
            config = inform_rm.InfoRMConfig(text_config=text_config, latent_dim=8, architecture=architecture)
            model = inform_rm.InfoRMForSequenceClassification(config).eval()
            name = f"{model_type}-{architecture}"
            trained = folder / "trained" / name
            model.save_pretrained(trained)
            tokenizer.save_pretrained(trained)
            export_model(str(trained), str(folder / name))
            expected[name] = rewards_of(model, tokenizer, "right")
            if architecture == "inform":
                config.decoder = "linear"
                model = inform_rm.InfoRMForSequenceClassification(config).eval()
                torch.nn.init.normal_(model.score.decoder.bias)
                model.save_pretrained(trained)
            if model_type == "qwen2":
                continue  # its own tokenizer class, of transformers 5, would read this vocabulary otherwise: refused
            folded = f"folded-{name}"
            export_model(str(trained), str(folder / folded), folded=True)
            expected[folded] = rewards_of(model, tokenizer, "right")
    (folder / "expected.json").write_text(json.dumps(expected))
    print(f"exported {len(expected)} models with transformers {transformers.__version__}")


def load(folder: Path) -> None:
    if importlib.util.find_spec("inform_rm") is not None:
        raise SystemExit("inform_rm is installed here; this check needs an environment without it.")
    if not transformers.__version__.startswith("4.57."):
        raise SystemExit(f"transformers {transformers.__version__} is installed here; this check is for 4.57.")
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
        AutoTokenizer,
        pipeline,
    )

    expected_rewards = json.loads((folder / "expected.json").read_text())
    for name, rewards in expected_rewards.items():
        exported = folder / name
        if name.startswith("folded-"):
            load_folded(exported, torch.tensor(rewards))
            continue
        expected = torch.tensor(rewards)
        assert AutoConfig.from_pretrained(exported, trust_remote_code=True).model_type == "inform", name
        tokenizer = AutoTokenizer.from_pretrained(exported)
        for auto_class in (AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification):
            model, loading = auto_class.from_pretrained(exported, trust_remote_code=True, output_loading_info=True)
            assert not any(loading.values()), f"{name}, {auto_class.__name__}: {loading}"
            for padding_side in ("right", "left"):
                found = torch.tensor(rewards_of(model.eval(), tokenizer, padding_side))
                torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE, msg=f"{name}: {found} {expected}")
        model.save_pretrained(folder / "saved-again" / name)
        again = AutoModelForSequenceClassification.from_pretrained(
            folder / "saved-again" / name, trust_remote_code=True
        )
        torch.testing.assert_close(
            torch.tensor(rewards_of(again.eval(), tokenizer, "right")), expected, rtol=0, atol=TOLERANCE
        )
        classify = pipeline("text-classification", str(exported), trust_remote_code=True, device="cpu")
        scores = torch.tensor([row["score"] for row in classify(TEXTS)])
        torch.testing.assert_close(scores, expected, rtol=0, atol=TOLERANCE)
    print(f"loaded {len(expected_rewards)} models with transformers {transformers.__version__}: the same rewards")


def load_folded(folder: Path, expected: torch.Tensor) -> None:
    """A plain classifier: no remote code is allowed, and its rewards miss only the constant in its config."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, loading = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), f"{folder.name}: {loading}"
    assert type(model).__module__.startswith("transformers."), f"{folder.name}: {type(model)}"
    expected = expected - model.config.reward_offset
    for padding_side in ("right", "left"):
        found = torch.tensor(rewards_of(model.eval(), tokenizer, padding_side))
        torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE, msg=f"{folder.name}: {found} {expected}")
    scores = torch.tensor([row["score"] for row in pipeline("text-classification", str(folder), device="cpu")(TEXTS)])
    torch.testing.assert_close(scores, expected, rtol=0, atol=TOLERANCE)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("export", "load"):
        raise SystemExit(__doc__)
    {"export": export, "load": load}[sys.argv[1]](Path(sys.argv[2]))
