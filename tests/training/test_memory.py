"""A batch that is too much for a GPU's memory is computed in two passes; how many tokens fit is told from one row."""

import contextlib
import json
import logging
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from inform_rm import InfoRMConfig, InfoRMForSequenceClassification
from inform_rm.scoring.packed_flex import flex_inputs
from inform_rm.scoring.packing import use_packed_attention
from inform_rm.training.loop import RewardLoop
from inform_rm.training.memory import probe_row, split_in_two, tokens_for_training, tokens_that_fit
from inform_rm.training.trainer import RewardTrainer


@pytest.fixture
def memory(monkeypatch):
    """Notes the tokens of each pass; one of more than ``most`` fails, after it has left gradients behind."""
    plain = RewardLoop.compute_loss
    memory = SimpleNamespace(most=float("inf"), seen=[], failed=[])

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = plain(self, model, inputs, *args, **kwargs)
        tokens = inputs["input_ids"].numel()
        memory.seen.append(tokens)
        if tokens > memory.most:
            memory.failed.append(tokens)
            (7 * loss).backward()
            raise torch.OutOfMemoryError("CUDA out of memory, for a test")
        return loss

    monkeypatch.setattr(RewardLoop, "compute_loss", compute_loss)
    return memory


def trained(args):
    trainer = RewardTrainer(args=args)
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", ("packed", "padded", "rankings"))
def test_a_batch_that_does_not_fit_gives_the_weights_of_one_that_does(kind, base_settings, memory, tmp_path, caplog):
    # Adam would make a step of rounding errors where the gradient is 0, at the last bias.
    settings = {
        "max_steps": 2,
        "optim": "sgd",
        "learning_rate": 0.1,
        "batching": "padded" if kind == "padded" else "packed",
    }
    if kind != "padded":
        settings["tokens_per_batch"] = 100_000
    if kind == "rankings":
        rows = [{"prompt": f"say {at}", "responses": ["a b", "a " * at + "c", "d"], "scores": [2, 1, 0]}
                for at in range(1, 17)]  # fmt: skip
        (tmp_path / "rankings.jsonl").write_text("\n".join(map(json.dumps, rows)))
        settings["data"] = (str(tmp_path / "rankings.jsonl"),)
    whole = trained(base_settings(**settings))
    memory.most = 0.75 * max(memory.seen)
    with caplog.at_level(logging.WARNING):
        split = trained(base_settings(**settings, output_dir=str(tmp_path / "split")))
    assert memory.failed and "too many for the memory" in caplog.text
    for one, other in zip(whole.state.log_history[:-1], split.state.log_history[:-1], strict=True):
        for name in ("loss", "grad_norm", "accuracy", "reward_mean", "kl_nats"):
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), name
    expected = whole.model.state_dict()
    for name, value in split.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-4, msg=name)


def test_what_cannot_be_split_ends_the_run(base_settings, memory):
    memory.most = 1
    with pytest.raises(torch.OutOfMemoryError, match="for a test"):
        trained(base_settings(per_device_train_batch_size=1))


def test_halves_have_the_rewards_of_the_whole():
    torch.manual_seed(0)
    text = LlamaConfig(vocab_size=99, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    model = InfoRMForSequenceClassification(InfoRMConfig(text_config=text, latent_dim=4)).eval()
    use_packed_attention(model)
    whole = {**probe_row(768), "margin": torch.arange(3.0), "latent_noise": torch.randn(6, 4), "share": 0.5}
    names = ("input_ids", "position_ids", "packed_segments", "pooled_positions")
    rewards = model(**{name: whole[name] for name in names}).logits.flatten()
    first, second = split_in_two(whole)
    parts = [model(**{name: half[name] for name in names}).logits.flatten() for half in (first, second)]
    torch.testing.assert_close(parts[0], rewards[[0, 3]])
    torch.testing.assert_close(parts[1], rewards[[1, 2, 4, 5]])
    assert second["latent_noise"].equal(whole["latent_noise"][[1, 2, 4, 5]])
    assert (first["share"], second["share"]) == (pytest.approx(0.5 / 3), pytest.approx(1 / 3))
    assert second["margin"].tolist() == [1.0, 2.0]
    assert split_in_two(first) is None


def test_tokens_are_what_memory_allows_by_one_row():
    measured = []

    def bytes_of(tokens):
        measured.append(tokens)
        return 1000 * tokens

    assert tokens_that_fit(bytes_of, free=100_000_000) == 84_992  # 0.85 of 100,000, down to a multiple of 128
    assert tokens_that_fit(bytes_of, free=1000) == measured[0]  # the row that was measured did fit
    assert len(measured) == 2


@pytest.mark.parametrize("breaks", (False, True))
def test_memory_is_measured_beside_gradients_and_the_optimizer(monkeypatch, breaks):
    model = torch.nn.Linear(100, 100, bias=False)
    held = {"memory_allocated": 50_000, "memory_reserved": 60_000}
    for name, value in held.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 50_000 + 4096 * 100)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100_000_000, 200_000_000))
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *device: None)
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())
    rows = []

    def run(row):
        assert model.weight.grad is not None  # what is on top of it counts
        rows.append(row["input_ids"].shape[1])
        if breaks:
            raise torch.OutOfMemoryError("for a test")

    if breaks:
        with pytest.raises(torch.OutOfMemoryError):
            tokens_for_training(model, run, torch.device("cpu"))
    else:
        free = 100_000_000 + 10_000 - 3 * 40_000
        assert tokens_for_training(model, run, torch.device("cpu")) == int(0.85 * free / 100) // 128 * 128
    assert rows == [4096] and model.weight.grad is None


@pytest.mark.gpu
def test_the_row_that_is_found_fits_and_fills_most_of_the_memory():
    device = torch.device("cuda")
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4, "num_attention_heads": 16}
    text = LlamaConfig(vocab_size=99, **sizes)
    model = InfoRMForSequenceClassification(InfoRMConfig(text_config=text)).to(device, torch.bfloat16).train()
    use_packed_attention(model)

    def run(row):
        places = row.pop("pooled_positions").to(device)
        model(**flex_inputs(row, model.config, device), pooled_positions=places).logits.sum().backward()

    found = tokens_for_training(model, run, device)
    torch.cuda.reset_peak_memory_stats()
    run(probe_row(found))
    assert 0.6 < torch.cuda.max_memory_allocated() / torch.cuda.get_device_properties(0).total_memory < 0.98
