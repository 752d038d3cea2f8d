"""A batch that is too much for a GPU's memory is computed in two passes; how many tokens fit is told from one row."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from torch.cuda._utils import _get_device_index
from transformers import LlamaConfig

from inform_rm import InfoRMConfig, InfoRMForSequenceClassification
from inform_rm.scoring.packed_flex import flex_inputs
from inform_rm.scoring.packing import use_packed_attention
from inform_rm.training import passes
from inform_rm.training.loop import RewardLoop
from inform_rm.training.passes import parts_within, probe_row, split_in_two, tokens_for_training, tokens_that_fit
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


def test_what_does_not_fit_in_two_is_computed_in_more_and_later_batches_in_as_many(base_settings, memory, tmp_path):
    settings = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.1, "batching": "padded",
                "gradient_accumulation_steps": 1, "per_device_train_batch_size": 8}  # fmt: skip
    whole = trained(base_settings(**settings))
    memory.most = 0.3 * min(memory.seen)
    memory.seen.clear()
    split = trained(base_settings(**settings, output_dir=str(tmp_path / "split")))
    assert len(memory.failed) <= 4  # after that each batch is parted before it is computed
    assert len(memory.seen) - len(memory.failed) >= 3 * 4
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


def test_of_a_batch_of_which_some_pairs_count_the_halves_count_the_same_ones():
    whole = {**probe_row(1280), "margin": torch.arange(5.0), "share": 0.6, "counted": 3}
    first, second = split_in_two(whole)
    assert (first["counted"], second["counted"]) == (2, 1)
    assert (first["share"], second["share"]) == (pytest.approx(0.4), pytest.approx(0.2))
    assert split_in_two({**whole, "counted": 1})[1]["share"] == 0.0


def test_parts_are_halved_until_they_are_within_a_number_of_tokens_or_one_pair():
    whole = {**probe_row(1280), "margin": torch.arange(5.0)}
    assert parts_within(whole, None) == [whole] == parts_within(whole, 1280)
    parts = parts_within(whole, 600)
    assert [part["input_ids"].numel() for part in parts] == [512, 256, 512]
    assert torch.cat([part["margin"] for part in parts]).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert sum(part["share"] for part in parts) == pytest.approx(1.0)
    assert [part["input_ids"].numel() for part in parts_within(whole, 1)] == [256] * 5


def test_tokens_are_what_memory_allows_by_one_row():
    assert tokens_that_fit(1000, free=100_000_000) == 84_992  # 0.85 of 100,000, down to a multiple of 128
    assert tokens_that_fit(1000, free=3_000_000) == 2_432  # fewer than were measured: the optimizer comes, too
    assert tokens_that_fit(1000, free=-1) == 1024


def test_measured_sequences_are_within_the_longest():
    for longest in (24, 100, 192, 5000, None):
        row = probe_row(4096, longest)
        assert row["position_ids"].max() < min(longest or 192, 192)
        assert 4096 - 4 * 64 < row["input_ids"].numel() <= 4096
        assert row["input_ids"].min() >= 1 and row["input_ids"].max() < 32


@pytest.fixture
def a_card(monkeypatch):
    """A CPU that says of itself what a GPU does: 100 MB free, and 100 bytes a token of the row that is measured."""
    held = {"memory_allocated": 50_000, "memory_reserved": 60_000, "max_memory_allocated": 50_000 + 4096 * 100}
    for name, value in held.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100_000_000, 200_000_000))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda index: 1.0)
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *device: None)
    plain = torch.random.fork_rng
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: plain(devices=[]))
    return torch.device("cpu")


@pytest.mark.parametrize(
    ("dtype", "in_buckets", "weights"), [("float32", False, 3 * 40_000), ("bfloat16", True, 5 * 20_000)]
)
def test_memory_is_measured_beside_gradients_and_the_optimizer(a_card, dtype, in_buckets, weights):
    model = torch.nn.Linear(100, 100, bias=False, dtype=getattr(torch, dtype))
    rows = []

    def run(row):
        assert model.weight.grad is not None  # what is on top of it counts
        rows.append(row["input_ids"].shape[1])
        torch.rand(3)

    torch.manual_seed(0)
    state = torch.get_rng_state()
    found = tokens_for_training(model, run, a_card, in_buckets=in_buckets)
    assert found == int(0.85 * (100_000_000 + 10_000 - weights) / 100) // 128 * 128
    assert rows == [4096] and model.weight.grad is None and torch.get_rng_state().equal(state)


@pytest.mark.parametrize("device", ("cuda", "cuda:0"))
def test_no_more_is_taken_than_the_process_may(a_card, monkeypatch, device):
    def quarter(index):
        if index is not None:
            _get_device_index(index)  # as torch does, which raises for a device without a number
        return 0.25  # 50 MB of 200

    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", quarter)
    found = tokens_for_training(torch.nn.Linear(100, 100, bias=False), lambda row: None, torch.device(device))
    assert found == int(0.85 * (50_000_000 - 50_000 - 3 * 40_000) / 100) // 128 * 128


@pytest.mark.parametrize(
    ("error", "tokens", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), 1024, "a row of 4096 tokens does not fit"),
        (RuntimeError("no kernel image is available"), 8192, "RuntimeError: no kernel image is available"),
    ],
)
def test_a_measurement_that_fails_leaves_a_default_and_one_line(a_card, caplog, error, tokens, told):
    model = torch.nn.Linear(10, 10)

    def run(row):
        raise error

    with caplog.at_level(logging.WARNING):
        assert tokens_for_training(model, run, a_card) == tokens
    assert model.weight.grad is model.bias.grad is None
    (line,) = caplog.messages
    assert line.startswith(f"tokens_per_batch: {tokens}, because") and told in line


def test_all_processes_take_what_fits_into_the_memory_of_each(monkeypatch):
    packing = SimpleNamespace(tokens_per_batch=None)
    args = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    one = SimpleNamespace(_packing=packing, args=args, is_fsdp_enabled=False, is_deepspeed_enabled=False, model=None,
                          max_length=None, accelerator=SimpleNamespace(num_processes=2))  # fmt: skip
    monkeypatch.setattr(passes, "tokens_for_training", lambda *given, **options: 5120)
    monkeypatch.setattr(passes, "gather_object", lambda own: [*own, 3072])
    passes.PassesThatFit.find_tokens_per_batch(one)
    assert packing.tokens_per_batch == 3072
    monkeypatch.setattr(passes, "tokens_for_training", None)  # not measured again
    passes.PassesThatFit.find_tokens_per_batch(one)


@pytest.mark.gpu
def test_the_row_that_is_found_fits_and_fills_most_of_the_memory(request, caplog):
    device = torch.device("cuda")  # without a number, which the trainer's has
    torch.cuda.set_per_process_memory_fraction(0.4)  # others may be tested on the same card
    request.addfinalizer(lambda: torch.cuda.set_per_process_memory_fraction(1.0))
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4, "num_attention_heads": 16}
    text = LlamaConfig(vocab_size=99, **sizes)
    model = InfoRMForSequenceClassification(InfoRMConfig(text_config=text)).to(device, torch.bfloat16).train()
    use_packed_attention(model)

    def run(row):
        places = row.pop("pooled_positions").to(device)
        model(**flex_inputs(row, model.config, device), pooled_positions=places).logits.sum().backward()

    found = tokens_for_training(model, run, device)
    assert not caplog.messages, "it was not measured"
    torch.cuda.reset_peak_memory_stats()
    run(probe_row(found))
    allowed = 0.4 * torch.cuda.get_device_properties(0).total_memory
    assert 0.6 < torch.cuda.max_memory_allocated() / allowed < 0.98
