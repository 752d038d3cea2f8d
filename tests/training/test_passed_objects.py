"""What people pass to `RewardTrainer` and expect to work is taken for what it is, or refused before the run."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

from inform_rm import RewardTrainer
from inform_rm.data.preferences import load_preferences
from inform_rm.errors import InputError
from inform_rm.training.reward_arguments import arguments_from_mapping
from inform_rm.training.run import train


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(trainer):
    return [parameter.detach().clone() for parameter in trainer.model.parameters()]


def test_a_name_in_place_of_rows_is_read_as_data_is(base_settings, pairs_file, tmp_path):
    named = RewardTrainer(args=base_settings())
    for given in (str(pairs_file), pairs_file, [str(pairs_file)]):
        args = base_settings(data=(), output_dir=str(tmp_path / "other"))
        trainer = RewardTrainer(args=args, train_dataset=given, eval_dataset=given)
        assert trainer.train_pairs.fingerprints == named.train_pairs.fingerprints == trainer.eval_pairs.fingerprints
        assert trainer.train_dataset[:] == named.train_dataset[:]
    found, expected = (trainer.evaluate(rows) for rows in (str(pairs_file), rows_of(pairs_file)))
    assert found["eval_margin"] == expected["eval_margin"] and found["eval_num_pairs"] == 48


@pytest.mark.parametrize("form", ("torch", "numpy", "pandas", "arrow"))
@pytest.mark.parametrize("streaming", (False, True))
def test_a_format_of_a_dataset_does_not_change_its_rows(base_settings, pairs_file, form, streaming):
    pairs = [
        {side: [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
         for side in ("chosen", "rejected")} | {"margin": 0.5, "id": number}
        for number, row in enumerate(rows_of(pairs_file))
    ]  # fmt: skip
    rows = Dataset.from_list(pairs)
    if not streaming:
        assert load_preferences(rows.with_format(form)).fingerprint == load_preferences(rows).fingerprint
        return
    stream = rows.to_iterable_dataset().with_format(form)
    trainer = RewardTrainer(args=base_settings(max_steps=1, data=(), eval_strategy="no"), train_dataset=stream)
    assert next(iter(trainer.get_train_dataloader()))["margin"].tolist() == [0.5] * 4


def test_what_holds_no_rows_is_refused_by_what_it_is(base_settings, pairs_file):
    rows = rows_of(pairs_file)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    for given, message in (
        ([Dataset.from_list(rows)] * 2, r"a list of Dataset where rows are expected\. .*concatenate_datasets"),
        (columns, r"a dict of columns; expected rows\. .*from_dict"),
    ):
        with pytest.raises(InputError, match=message):
            RewardTrainer(args=base_settings(data=()), train_dataset=given)


def test_arguments_and_models_of_another_kind_are_refused(base_settings, causal_lm_dir, tmp_path):
    name = str(causal_lm_dir("llama"))
    with pytest.raises(InputError, match=r"args: got a TrainingArguments; expected RewardTrainingArguments"):
        RewardTrainer(name, TrainingArguments(str(tmp_path), use_cpu=True))
    with pytest.raises(InputError, match=r"model_init: a trainer has one model"):
        RewardTrainer(args=base_settings(), model_init=lambda: None)
    tokenizer = AutoTokenizer.from_pretrained(name)
    for model in (
        AutoModelForCausalLM.from_pretrained(name),
        AutoModelForSequenceClassification.from_pretrained(name, num_labels=2),
    ):
        with pytest.raises(InputError, match=f"a {type(model).__name__} with num_labels=2; a reward model has one"):
            RewardTrainer(model, base_settings(), processing_class=tokenizer)


def test_the_model_that_is_trained_is_not_overwritten(base_settings, causal_lm_dir):
    name = causal_lm_dir("llama")
    before = (name / "config.json").read_bytes()
    with pytest.raises(InputError, match=r"output_dir: .* is the model's own, whose weights would be lost"):
        RewardTrainer(args=base_settings(output_dir=f"{name}/"))
    assert (name / "config.json").read_bytes() == before


def test_a_metric_that_no_evaluation_gives_is_refused_before_the_run(base_settings, pairs_file):
    for name in ("eval_loss", "loss", "eval_acc"):
        args = base_settings(metric_for_best_model=name, eval_data=str(pairs_file))
        with pytest.raises(InputError, match=rf"gives no '{name}'\. Choose one of eval_bradley_terry_loss"):
            RewardTrainer(args=args)
    RewardTrainer(args=args, compute_metrics=lambda _: {"acc": 1.0})  # whose names only its author knows


def test_reduce_lr_on_plateau_waits_for_the_loss(base_settings, pairs_file):
    args = base_settings(
        lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps", eval_steps=1, max_steps=2,
        eval_data=str(pairs_file), load_best_model_at_end=True, save_steps=1,
    )  # fmt: skip
    trainer = RewardTrainer(args=args)
    trainer.train()
    losses = [line["eval_bradley_terry_loss"] for line in trainer.state.log_history if "eval_accuracy" in line]
    assert len(losses) == 2 and trainer.state.best_metric == min(losses)
    assert trainer.lr_scheduler.best == min(losses)  # of torch's scheduler, in its mode "min"


def test_a_checkpoint_of_another_folder_goes_on_only_with_its_own_settings(base_settings, tmp_path):
    whole = RewardTrainer(args=base_settings())
    whole.train()
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-3"
    other = str(tmp_path / "other")
    with pytest.raises(InputError, match=r"other settings or data \(learning_rate: 0.001 -> 0.1\)"):
        RewardTrainer(args=base_settings(learning_rate=0.1, output_dir=other)).train(str(checkpoint))
    resumed = RewardTrainer(args=base_settings(output_dir=other))
    resumed.train(str(checkpoint))
    assert all(map(torch.equal, weights(resumed), weights(whole)))
    with pytest.raises(InputError, match=r"other holds checkpoints of a run"):  # which would be mixed with the other's
        RewardTrainer(args=base_settings(output_dir=other)).train(str(checkpoint))
    with pytest.raises(InputError, match=r"overwrite: it discards .*checkpoint-3, from which"):
        RewardTrainer(args=base_settings(overwrite=True)).train(str(checkpoint))
    (checkpoint.parent / "run.json").unlink()
    with pytest.raises(InputError, match=r"run.json, which says what the checkpoint belongs to, is not there"):
        RewardTrainer(args=base_settings(output_dir=str(tmp_path / "third"))).train(str(checkpoint))
    assert checkpoint.is_dir()


def test_evaluation_on_the_training_pairs_is_said(base_settings, pairs_file, tmp_path, caplog):
    part = tmp_path / "part.jsonl"
    part.write_text("".join(pairs_file.read_text().splitlines(keepends=True)[:8]))
    for name, times in ((part, 0), (pairs_file, 1)):
        RewardTrainer(args=base_settings(eval_data=str(name)))
        assert caplog.text.count(f"{name}: these pairs are trained on, too") == times


def test_the_command_names_where_a_run_goes_on(base_settings, tmp_path):
    args = base_settings(resume_from_checkpoint=str(tmp_path / "old" / "checkpoint-3"))
    with pytest.raises(InputError, match=r"resume_from_checkpoint: .*goes on by itself in its own output_dir"):
        train(args)
    train(base_settings(max_steps=1, resume_from_checkpoint="true"))


def test_a_warm_up_of_transformers_4_is_todays():
    values = {"model": "m", "data": "d", "output": "o", "warmup_ratio": 0.25}
    assert arguments_from_mapping(values, "a file").warmup_steps == 0.25


def test_a_checkpoint_without_optimizer_does_not_go_on_as_if_it_had_one(base_settings):
    RewardTrainer(args=base_settings(save_only_model=True, max_steps=3)).train()
    with pytest.raises(InputError, match=r"checkpoint-3 was written with save_only_model: it holds no optimizer"):
        RewardTrainer(args=base_settings()).train(resume_from_checkpoint=True)
