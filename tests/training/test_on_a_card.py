"""`RewardTrainer` on a CUDA device: what it finds of the memory, what it does where that ends, and what it compiles.

A process is allowed a part of the memory alone, so that these tests can run beside others on the same card.
"""

import gc
import logging

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig

from inform_rm import InfoRMConfig, InfoRMForSequenceClassification
from inform_rm.training.trainer import RewardTrainer

pytestmark = pytest.mark.gpu

GIB = 2**30
PASSES = "inform_rm.training.passes"


@pytest.fixture
def allow():
    """Sets how many bytes of the card this process may take."""

    def most(size):
        free_what_is_unused()
        torch.cuda.set_per_process_memory_fraction(size / torch.cuda.get_device_properties(0).total_memory)
        torch.cuda.reset_peak_memory_stats()

    yield most
    torch.cuda.set_per_process_memory_fraction(1.0)
    free_what_is_unused()


def free_what_is_unused():
    gc.collect()
    torch.cuda.empty_cache()


def pairs_of(number, shortest, longest):
    """Pairs with responses of 64 tokens to prompts of ``shortest`` to ``longest``."""
    generator = torch.Generator().manual_seed(number)

    def draw(length):
        return torch.randint(10, 300, (int(length),), generator=generator).tolist()

    rows = []
    for place, length in enumerate(torch.linspace(shortest, longest, number)):
        prompt = draw(length)
        sides = {f"{side}_input_ids": prompt + draw(64) for side in ("chosen", "rejected")}
        rows.append({**sides, "prompt_length": len(prompt), "length": len(prompt) + 64, "margin": None,
                     "id": str(place)})  # fmt: skip
    return Dataset.from_list(rows)


@pytest.fixture
def train_on_card(base_settings, tokenizer, tmp_path):
    """Train the same model, of this width, on pairs; gives the run, its log lines, and the weights on a CPU."""
    runs = []

    def run(pairs, width, layers, **settings):
        torch.manual_seed(0)
        text = LlamaConfig(
            vocab_size=320, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
            num_attention_heads=width // 64, num_key_value_heads=width // 128, max_position_embeddings=1024,
        )  # fmt: skip
        model = InfoRMForSequenceClassification(InfoRMConfig(text_config=text, latent_dim=8))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        runs.append(None)
        args = base_settings(**{
            "model": None, "data": (), "use_cpu": False, "max_steps": 2, "gradient_accumulation_steps": 1,
            "per_device_train_batch_size": len(pairs), "save_strategy": "no", "max_length": 1024,
            # Gradients as they are: steps of Adam, or of gradients cut to a length, would hide a factor.
            "optim": "sgd", "max_grad_norm": 1e9, "learning_rate": 0.01, "lr_scheduler_type": "constant",
            "output_dir": str(tmp_path / f"run-{len(runs)}"), **settings,
        })  # fmt: skip
        trainer = RewardTrainer(model=model, args=args, train_dataset=pairs, processing_class=tokenizer)
        assert trainer.batching == "packed" and trainer.args.device.type == "cuda"
        trainer.train()
        lines = [line for line in trainer.state.log_history if "loss" in line]
        after = {name.replace("_orig_mod.", ""): value.cpu() for name, value in trainer.model.state_dict().items()}
        assert after.keys() == before.keys()
        return trainer, lines, torch.cat([(after[name] - before[name]).flatten() for name in sorted(before)])

    return run


def assert_alike(one, other, tolerance):
    """Log lines and what was added to the weights are the same, but for rounding."""
    (lines, change), (expected_lines, expected) = one, other
    for line, expected_line in zip(lines, expected_lines, strict=True):
        for name in ("loss", "grad_norm", "reward_mean", "kl_nats"):
            assert line[name] == pytest.approx(expected_line[name], rel=tolerance, abs=1e-5), name
    assert expected.norm() > 1e-3
    assert (change - expected).norm() < tolerance * expected.norm()


def test_the_tokens_that_are_found_fill_the_memory_and_fit(train_on_card, allow, caplog, record_property):
    allow(3 * GIB)
    pairs = pairs_of(192, 128, 128)
    with caplog.at_level(logging.INFO, logger=PASSES):
        trainer, _, _ = train_on_card(pairs, 512, 4, optim="adamw_torch", learning_rate=1e-5)
    found = trainer._packing.tokens_per_batch
    # Measured once, and nothing had to be parted.
    lines = [record.getMessage() for record in caplog.records if record.name == PASSES]
    assert lines == [f"tokens_per_batch: {found}, by what a row takes of the free memory."]
    assert 4096 < found < 192 * 256, "the memory is to be the limit, not the batch"
    assert 0.5 < torch.cuda.max_memory_allocated() / (3 * GIB) <= 1
    record_property("tokens_per_batch", found)
    record_property("peak_share", round(torch.cuda.max_memory_allocated() / (3 * GIB), 3))


def test_a_batch_that_is_too_much_for_the_card_is_split_and_gives_the_same_gradients(
    train_on_card, allow, caplog, record_property
):
    pairs = pairs_of(96, 96, 160)
    settings = {"tokens_per_batch": 100_000, "width": 512, "layers": 4}
    allow(torch.cuda.get_device_properties(0).total_memory)
    whole = train_on_card(pairs, **settings)[1:]  # without what holds memory
    peak = torch.cuda.max_memory_allocated()
    allow(0.75 * peak)
    with caplog.at_level(logging.WARNING, logger=PASSES):
        split = train_on_card(pairs, **settings)
    (line,) = [record.getMessage() for record in caplog.records if record.name == PASSES]
    assert "too many for the memory of cuda" in line  # once: the second batch was parted before it was computed
    tokens = int(line.split()[0])
    assert 96 * 256 - 96 < tokens < 96 * 256 + 96
    assert split[0]._packing.tokens_per_batch == tokens // 2
    assert torch.cuda.max_memory_allocated() < 0.75 * peak
    assert_alike(split[1:], whole, 1e-3)
    record_property("peak_gib", [round(size / GIB, 2) for size in (peak, torch.cuda.max_memory_allocated())])


def test_compiled_layers_train_as_they_are_without_breaks_and_are_compiled_for_few_lengths(
    train_on_card, record_property, monkeypatch
):
    # TrainingArguments set it, and trainers after this one would be compiled as well.
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    pairs = pairs_of(48, 16, 400)
    # Compiled, products of float32 numbers would be computed in TF32.
    settings = {"tokens_per_batch": 4096, "max_steps": 6, "per_device_train_batch_size": 16, "tf32": False}
    plain = train_on_card(pairs, 256, 2, **settings)[1:]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = train_on_card(pairs, 256, 2, torch_compile=True, **settings)
    assert_alike(compiled[1:], plain, 1e-3)
    counters = torch._dynamo.utils.counters
    graphs = counters["stats"]["unique_graphs"]
    assert not counters["graph_break"], dict(counters["graph_break"])
    assert 1 <= graphs <= 4
    record_property("graphs", graphs)
