"""Runs of the trainer on a tiny model: equal to a plain loop, resumable, loadable, and honest about its counts."""

import contextlib
import dataclasses
import json
import logging
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from inform_rm.errors import InputError
from inform_rm.safety.uploads import scan_folder
from inform_rm.training.collators import EpochSeededLengthSampler, PackedPairCollator, PairCollator
from inform_rm.training.data import load_training_pairs
from inform_rm.training.loop import choose_tf32
from inform_rm.training.losses import reward_model_loss
from inform_rm.training.models import load_model
from inform_rm.training.passes import PassesThatFit
from inform_rm.training.reward_arguments import RewardTrainingArguments
from inform_rm.training.run import train
from inform_rm.training.trainer import RewardTrainer


@pytest.fixture
def settings(base_settings):
    return base_settings(lr_scheduler_type="linear")


@pytest.fixture(scope="module")
def finished(causal_lm_dir, pairs_file, tmp_path_factory):
    """A finished run of six steps with evaluation: its result and its folder, which is to be copied, not changed."""
    output = tmp_path_factory.mktemp("finished") / "run"
    args = RewardTrainingArguments(
        model=str(causal_lm_dir("llama")), data=(str(pairs_file),), output_dir=str(output), latent_dim=8,
        learning_rate=1e-3, max_steps=6, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        logging_steps=1, save_steps=3, use_cpu=True, lr_scheduler_type="linear", eval_data=(str(pairs_file),),
        eval_steps=3,
    )  # fmt: skip
    return train(args), args


@pytest.fixture
def copied(finished, tmp_path):
    """The settings of that run, whose output is a copy of its folder."""
    shutil.copytree(finished[1].output_dir, tmp_path / "run")
    return dataclasses.replace(finished[1], output_dir=str(tmp_path / "run"))


def losses(result):
    return [line["loss"] for line in result["log_history"] if "loss" in line]


def weights(folder):
    return AutoModelForSequenceClassification.from_pretrained(folder).state_dict()


def test_finished_folder_is_complete(finished):
    result, settings = finished
    folder = Path(settings.output_dir)
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "README.md", "config.json", "configuration_inform.py", "modeling_inform.py", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "training_config.yaml", "train_result.json",
        "checkpoints",
    }  # fmt: skip
    assert result["evaluation"]["num_pairs"] == 48
    low, high = result["evaluation"]["accuracy_interval"]
    assert low < result["evaluation"]["accuracy"] < high
    card = (folder / "README.md").read_text()
    assert f"n = 48, 95 % Wilson interval {low:.3f} to {high:.3f}" in card
    assert str(folder.parent) not in card
    # Nothing of this machine is in what goes to the Hub from here; the rest of the folder does not.
    leaks = [finding for finding in scan_folder(folder) if "not a file of a model folder" not in finding]
    assert leaks == [] and f"| model | {Path(settings.model).name} |" in card
    assert {"accuracy", "margin", "kl_nats", "reward_mean", "reward_std"} <= set(result["log_history"][0])
    assert json.loads((folder / "train_result.json").read_text())["steps"] == 6


def test_final_weights_equal_a_plain_loop(settings, tokenizer):
    """`standard` has no noise: Adam over the same batches by hand must give the same weights."""
    config = dataclasses.replace(settings, architecture="standard", max_steps=3, max_grad_norm=1e9, warmup_steps=0)
    train(config)
    torch.manual_seed(0)
    from transformers import set_seed

    set_seed(config.seed)
    data = load_training_pairs(config, config.data, None, tokenizer, "data", None).dataset
    model = load_model(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    # The Trainer's order: one permutation of the seed's generator (accelerate's seedable sampler, epoch 0).
    order = torch.randperm(48, generator=torch.Generator().manual_seed(config.seed)).tolist()
    collate = PairCollator(tokenizer)
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 - step / 3)
        optimizer.zero_grad()
        for half in range(2):
            start = step * 8 + half * 4
            batch = collate([data[index] for index in order[start : start + 4]])
            rewards = model(batch["input_ids"], batch["attention_mask"]).logits[:, 0]
            (reward_model_loss(*rewards.chunk(2)) / 2).backward()
        optimizer.step()
    trained = weights(config.output_dir)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trained[name], value, atol=2e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("sampling", ["random", pytest.param("group_by_length", marks=pytest.mark.slow)])
def test_resumed_run_equals_the_uninterrupted_one(settings, sampling, tmp_path, train_and_kill):
    whole = dataclasses.replace(settings, train_sampling_strategy=sampling, max_steps=8, save_steps=3)
    expected = train(whole)
    cut = dataclasses.replace(whole, output_dir=str(tmp_path / "cut"))
    train_and_kill(cut, step=6)
    assert not (tmp_path / "cut" / "config.json").exists()
    resumed = train(cut)
    assert resumed["resumed_from_step"] == 6
    assert losses(resumed) == losses(expected)
    first, second = weights(whole.output_dir), weights(cut.output_dir)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_checkpoints_are_hub_folders(finished):
    folder = Path(finished[1].output_dir)
    checkpoint = folder / "checkpoints" / "checkpoint-6"
    assert not list(folder.rglob("training_args.bin"))
    code = (
        "import sys; from transformers import AutoModelForSequenceClassification as A\n"
        "m, i = A.from_pretrained(sys.argv[1], trust_remote_code=True, output_loading_info=True)\n"
        "assert not i['missing_keys'] and not i['unexpected_keys'] and 'inform_rm' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-I", "-c", code, str(checkpoint)], check=True, capture_output=True)
    final, last = weights(folder), weights(checkpoint)
    assert all(torch.equal(final[name], last[name]) for name in final)


def test_changed_setting_or_data_is_refused_on_resume(copied, pairs_file, tmp_path):
    (tmp_path / "run" / "train_result.json").unlink()  # as if killed before the end
    with pytest.raises(InputError, match=r"other settings or data \(beta: 0.1 -> 0.2\)"):
        train(dataclasses.replace(copied, beta=0.2))
    other = tmp_path / "other.jsonl"
    other.write_text(pairs_file.read_text().replace("Indeed", "Truly"))
    with pytest.raises(InputError, match=r"\(the content of data: "):
        train(dataclasses.replace(copied, data=(str(other),)))


def test_finished_run_is_not_overwritten_unasked(finished, copied):
    with pytest.raises(InputError, match="holds a finished run"):
        train(copied)
    again = train(dataclasses.replace(copied, overwrite=True))
    assert losses(again) == losses(finished[0])


def test_one_batch_of_eight_equals_eight_accumulated_pairs(settings, tmp_path):
    config = dataclasses.replace(settings, architecture="standard", max_steps=4)
    small = train(dataclasses.replace(config, per_device_train_batch_size=1, gradient_accumulation_steps=8))
    large = train(
        dataclasses.replace(
            config, per_device_train_batch_size=8, gradient_accumulation_steps=1, output_dir=str(tmp_path / "large")
        )
    )
    assert losses(small) == pytest.approx(losses(large), abs=1e-5)


def test_kl_term_is_absent_in_its_warm_up_and_rises_after(settings):
    config = dataclasses.replace(settings, beta=100.0, max_steps=8, kl_warmup_steps=0.5, learning_rate=1e-6)
    curve = losses(train(config))
    assert max(curve[:5]) < 2  # steps 0 to 4: Bradley-Terry alone
    assert 2 < curve[5] < curve[6] < curve[7]


def test_a_batch_of_several_rows_trains_and_evaluates_as_one(settings, pairs_file, tmp_path):
    config = dataclasses.replace(
        settings, architecture="standard", eval_data=(str(pairs_file),), eval_steps=3, center_rewards_coefficient=0.1
    )
    whole = train(dataclasses.replace(config, tokens_per_batch=100_000))
    split = train(dataclasses.replace(config, tokens_per_batch=40, output_dir=str(tmp_path / "split")))
    assert losses(split) == pytest.approx(losses(whole), abs=1e-5)
    for name in ("accuracy", "margin", "num_pairs"):
        assert split["evaluation"][name] == pytest.approx(whole["evaluation"][name], abs=1e-4)
    one, other = weights(tmp_path / "run"), weights(tmp_path / "split")
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, atol=1e-4, rtol=0)


def test_rows_of_a_batch_keep_the_budget_and_the_order(tokenizer):
    pairs = [
        {"chosen_input_ids": [1, 2, *range(10, 10 + size)], "rejected_input_ids": [1, 2, 9], "prompt_length": 2,
         "margin": float(size), "id": str(size)}
        for size in (3, 4, 20, 1, 1)
    ]  # fmt: skip
    batch = PackedPairCollator(tokens_per_batch=14)(pairs)
    # One prompt for all: rows may take four times its two tokens, or the budget.
    assert [row["margin"].tolist() for row in batch["rows"]] == [[3.0, 4.0], [20.0], [1.0, 1.0]]
    assert [row["input_ids"].shape[1] for row in batch["rows"]] == [11, 23, 6]
    assert batch["input_ids"].shape == (1, 40) and batch["ids"] == ["3", "4", "20", "1", "1"]
    # Pairs of one prompt come into one row, wherever they stand in the batch.
    apart = [
        {
            "chosen_input_ids": [*prompt, 8, 8],
            "rejected_input_ids": [*prompt, 9],
            "prompt_length": 4,
            "margin": margin,
            "id": "",
        }
        for prompt, margin in (([1] * 4, 1.0), ([2] * 4, 2.0), ([1] * 4, 3.0), ([2] * 4, 4.0))
    ]
    rows = PackedPairCollator(tokens_per_batch=12)(apart)["rows"]
    assert [row["margin"].tolist() for row in rows] == [[1.0, 3.0], [2.0, 4.0]]
    assert [row["input_ids"].shape[1] for row in rows] == [10, 10]
    assert "rows" not in PackedPairCollator()(pairs)


@pytest.mark.parametrize("architecture", ["standard", "inform"])
def test_packed_and_padded_batches_train_alike(settings, architecture, tmp_path):
    config = dataclasses.replace(
        settings, architecture=architecture, max_steps=8, save_steps=8, gradient_accumulation_steps=1,
        learning_rate=5e-3, per_device_train_batch_size=16, beta=1e-3, kl_warmup_steps=0,
    )  # fmt: skip
    packed = train(config)
    padded = train(dataclasses.replace(config, batching="padded", output_dir=str(tmp_path / "padded")))
    assert (packed["batching"], padded["batching"]) == ("packed", "padded")
    assert losses(packed) == pytest.approx(losses(padded), abs=1e-4)
    assert losses(packed)[-1] < 0.9 * losses(packed)[0]  # a curve, not a line that anything would match


@pytest.mark.parametrize("more", ({}, {"lora_r": 4}, {"gradient_checkpointing": True}), ids=str)
def test_training_and_evaluation_compute_the_last_layer_where_it_is_read_alone(settings, pairs_file, tmp_path, more):
    config = dataclasses.replace(settings, eval_data=(str(pairs_file),), eval_steps=3, max_steps=3, **more)

    def run(name):
        trainer = RewardTrainer(args=dataclasses.replace(config, output_dir=str(tmp_path / name)))
        seen = []
        *_, last = [module.mlp for module in trainer.model.modules() if hasattr(module, "mlp")]
        last.register_forward_hook(lambda mlp, given, found: seen.append(given[0].shape[1]))
        trainer.train()
        return trainer, seen

    trainer, seen = run("read")
    pairs = config.per_device_train_batch_size
    assert set(seen) <= {2 * size for size in range(1, max(pairs, config.per_device_eval_batch_size) + 1)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PassesThatFit, "computed_where_read", lambda self, part: contextlib.nullcontext())
        whole, every = run("whole")
    # A checkpointed layer is computed again as far as its gradient needs it: that may end before the hook, or not.
    assert len(every) <= len(seen) and statistics.mean(every) > 3 * statistics.mean(seen)
    for one, other in zip(whole.state.log_history[:-1], trainer.state.log_history[:-1], strict=True):
        for name in {"loss", "grad_norm", "eval_loss", "eval_accuracy"} & set(one):
            assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), name
    expected = whole.model.state_dict()
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("batching", ("packed", "padded"))
def test_chosen_attention_is_for_padded_batches_and_one_line_says_what_runs(settings, batching, caplog):
    with caplog.at_level(logging.INFO):
        result = train(dataclasses.replace(settings, attn_implementation="eager", batching=batching, max_steps=1))
    assert result["batching"] == batching
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Training on cpu in")]
    attention = {"packed": "SDPA a segment at a time", "padded": "attention eager"}[batching]
    assert len(lines) == 1 and f"float32, {batching} rows (" in lines[0] and attention in lines[0]


def test_best_checkpoint_is_the_final_model(settings, pairs_file):
    config = dataclasses.replace(
        settings, eval_data=(str(pairs_file),), eval_steps=2, save_steps=2, load_best_model_at_end=True,
        save_total_limit=None, learning_rate=5e-3,
    )  # fmt: skip
    result = train(config)
    accuracies = [line["eval_accuracy"] for line in result["log_history"] if "eval_accuracy" in line]
    assert result["evaluation"]["accuracy"] == max(accuracies)


def test_loss_that_is_no_number_stops_the_run(settings):
    with pytest.raises(FloatingPointError, match="not finite at step"):
        train(dataclasses.replace(settings, learning_rate=1e30, max_grad_norm=0.0, max_steps=20))


def test_length_sampler_order_depends_on_seed_and_epoch_only():
    lengths = torch.randint(5, 50, (40,), generator=torch.Generator().manual_seed(0)).tolist()

    def order(seed, epoch, state):
        torch.manual_seed(state)
        sampler = EpochSeededLengthSampler(4, lengths, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert sorted(order(0, 0, 1)) == list(range(40))
    assert order(0, 0, 1) == order(0, 0, 2)
    assert order(0, 0, 1) != order(0, 1, 1)
    assert order(0, 0, 1) != order(1, 0, 1)


def test_collator_keeps_order_and_masks_padding(tokenizer):
    pairs = [
        {"chosen_input_ids": [5, 6, 7], "rejected_input_ids": [8], "margin": None, "id": "a"},
        {"chosen_input_ids": [9], "rejected_input_ids": [10, 11], "margin": 0.5, "id": "b"},
    ]
    batch = PairCollator(tokenizer)(pairs)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [9, 0, 0], [8, 0, 0], [10, 11, 0]]
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 1, 1, 2]
    assert batch["margin"].tolist() == [0.0, 0.5] and batch["ids"] == ["a", "b"]


def test_continuing_from_a_model_of_another_shape_is_refused(finished, settings, tmp_path):
    model = finished[1].output_dir
    config = dataclasses.replace(settings, model=model, output_dir=str(tmp_path / "next"), latent_dim=16)
    with pytest.raises(InputError, match=r"latent_dim: .* has 8, not 16"):
        train(config)
    assert train(dataclasses.replace(config, latent_dim=8))["steps"] == 6


@pytest.mark.parametrize(("tf32", "expected"), [(None, "high"), (True, "high"), (False, "highest")])
def test_float32_products_of_compiled_layers_are_as_tf32_says(tf32, expected):
    card = SimpleNamespace(torch_compile=True, tf32=tf32, device=torch.device("cuda"))
    switch = torch.backends.cuda.matmul
    try:
        switch.fp32_precision = "tf32"  # as transformers says it
        with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
            torch.get_float32_matmul_precision()
        choose_tf32(card)
        assert torch.get_float32_matmul_precision() == expected
        assert switch.fp32_precision == ("tf32" if expected == "high" else "ieee")
        for other in ({"torch_compile": False}, {"device": torch.device("cpu")}):  # not concerned
            choose_tf32(SimpleNamespace(**{**vars(card), "tf32": not tf32, **other}))
            assert torch.get_float32_matmul_precision() == expected
    finally:
        torch.set_float32_matmul_precision("highest")
