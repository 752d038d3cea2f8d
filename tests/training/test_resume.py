"""What may change between a run and its continuation, and what may not: as each setting declares, and by running."""

import copy
import dataclasses
import json
import os
import shutil
import typing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerState

from inform_rm.errors import InputError
from inform_rm.training.arguments import OUR_SETTINGS, SETTINGS_BY_CONTENT, decides
from inform_rm.training.checkpoints import check_resume
from inform_rm.training.reward_arguments import RewardTrainingArguments, deciding_settings, field_types
from inform_rm.training.run import train
from inform_rm.training.stream_sources import open_stream

# Ours, and of TrainingArguments' own some of each kind.
OF_TRAINER = (
    *(
        "adam_beta1",
        "weight_decay",
        "max_steps",
        "data_seed",
        "bf16",
        "train_sampling_strategy",
        "neftune_noise_alpha",
    ),
    *("output_dir", "run_name", "dataloader_num_workers", "gradient_checkpointing", "torch_empty_cache_steps"),
)
DECIDES = {name: decides(name) for name in (*OUR_SETTINGS, *OF_TRAINER)}
ALWAYS_DECIDE = [name for name, found in DECIDES.items() if found is True]
NEVER_DECIDE = [name for name, found in DECIDES.items() if found is False]
DECIDE_WITH = [(name, other) for name, other in DECIDES.items() if isinstance(other, str)]


@pytest.fixture
def settings(base_settings, pairs_file):
    """A run with latent noise that evaluates and saves twice."""
    return base_settings(
        max_steps=8, eval_data=(str(pairs_file),), eval_steps=3, overwrite=True, save_total_limit=None
    )


@pytest.fixture(scope="module")
def whole(causal_lm_dir, pairs_file, tmp_path_factory):
    """That run with a chat template in a file, whole: its settings, which lie beside its folder."""
    folder = tmp_path_factory.mktemp("whole")
    template = folder / "template.jinja"
    template.write_text("{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}{% endfor %}")
    args = RewardTrainingArguments(
        model=str(causal_lm_dir("llama")), data=(str(pairs_file),), eval_data=(str(pairs_file),),
        output_dir=str(folder / "run"), chat_template=str(template), latent_dim=8, learning_rate=1e-3, max_steps=8,
        per_device_train_batch_size=4, gradient_accumulation_steps=2, logging_steps=1, save_steps=3, eval_steps=3,
        save_total_limit=None, use_cpu=True,
    )  # fmt: skip
    train(args)
    return args


@pytest.fixture
def cut(whole, tmp_path):
    """A copy of the run as a kill after its first checkpoint would have left it."""
    folder = tmp_path / "cut"
    shutil.copytree(whole.output_dir, folder)
    for name in ("checkpoints/checkpoint-6", "checkpoints/checkpoint-8"):
        shutil.rmtree(folder / name)
    for name in ("train_result.json", "model.safetensors"):
        (folder / name).unlink()
    return folder


def lines(result, key):
    return {line["step"]: line[key] for line in result["log_history"] if key in line}


def weights(folder):
    return load_file(f"{folder}/model.safetensors")


def test_settings_that_decide_nothing_may_change_and_change_nothing(whole, cut):
    """All at once. `tokens_per_batch` has a test of its own, because sums of other parts are rounded otherwise."""
    changes = {
        "output_dir": str(cut), "eval_data": whole.data * 2,
        "max_eval_pairs_per_source": 10, "per_device_eval_batch_size": 3, "gradient_checkpointing": True,
        "dataloader_num_workers": 1, "logging_steps": 2, "eval_steps": 0.125, "save_steps": 7, "save_total_limit": 1,
        "report_to": "tensorboard", "run_name": "again", "torch_empty_cache_steps": 2,
    }  # fmt: skip
    elsewhere = {"tokens_per_batch", "overwrite", "eval_strategy", "metric_for_best_model", "hub_strategy"}
    assert {*NEVER_DECIDE, *dict(DECIDE_WITH)} - {*changes} == elsewhere
    assert not {*changes} & {*ALWAYS_DECIDE}
    expected = json.loads(Path(whole.output_dir, "train_result.json").read_text())
    resumed = train(dataclasses.replace(whole, **changes))
    assert resumed["resumed_from_step"] == 3
    first, second = weights(whole.output_dir), weights(cut)
    assert all(torch.equal(first[name], second[name]) for name in first)
    # The new intervals are those of the rest of the run, and not the checkpoint's.
    assert sorted(lines(expected, "loss")) == [*range(1, 9)] and sorted(lines(resumed, "loss")) == [1, 2, 3, 4, 6, 8]
    assert sorted(lines(expected, "eval_accuracy")) == [3, 6, 8]
    assert sorted(lines(resumed, "eval_accuracy")) == [3, 4, 5, 6, 7, 8]
    assert [path.name for path in (cut / "checkpoints").glob("checkpoint-*")] == ["checkpoint-8"]


def test_a_batch_may_be_split_otherwise_after_an_interruption(whole, cut):
    """Each pair keeps its latent noise, whatever forward pass it is part of."""
    expected = json.loads(Path(whole.output_dir, "train_result.json").read_text())
    resumed = train(dataclasses.replace(whole, output_dir=str(cut), tokens_per_batch=40))
    assert resumed["resumed_from_step"] == 3
    assert lines(resumed, "loss") == pytest.approx(lines(expected, "loss"), abs=1e-5)
    first, second = weights(whole.output_dir), weights(cut)
    for name, value in first.items():
        if not name.endswith("decoder.2.bias"):  # a constant has no gradient: Adam makes a step of rounding errors
            torch.testing.assert_close(second[name], value, atol=1e-4, rtol=0, msg=name)


def test_evaluation_leaves_the_latent_noise_of_training_alone(whole, tmp_path):
    train(dataclasses.replace(whole, output_dir=str(tmp_path / "without"), eval_data=()))
    first, second = weights(whole.output_dir), weights(tmp_path / "without")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_paths_may_be_spelt_otherwise(whole, cut, pairs_file, tmp_path, monkeypatch):
    (tmp_path / "linked").symlink_to(whole.model)
    (tmp_path / "other-name.jsonl").symlink_to(pairs_file)
    shutil.copy(whole.chat_template, tmp_path / "copy.jinja")
    monkeypatch.chdir(tmp_path)
    respelt = {
        "model": "./linked/", "data": ("other-name.jsonl",), "eval_data": (os.path.relpath(pairs_file),),
        "chat_template": "copy.jinja", "output_dir": "cut",
    }  # fmt: skip
    resumed = train(dataclasses.replace(whole, **respelt))
    assert resumed["resumed_from_step"] == 3
    first, second = weights(whole.output_dir), weights(cut)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_streamed_file_is_known_by_its_content(pairs_file, tmp_path):
    link = tmp_path / "other-name.jsonl"
    link.symlink_to(pairs_file)
    changed = tmp_path / "changed.jsonl"
    changed.write_text(pairs_file.read_text().replace("Indeed", "Truly!"))
    paths = pairs_file, link, changed
    digests = [open_stream([path], seed=0, shuffle_buffer=1).fingerprints[str(path)] for path in paths]
    assert digests[0] == digests[1] != digests[2]


# --- refused by name, without training ------------------------------------------------------------------------------


@pytest.fixture
def unfinished(settings, tmp_path):
    """Checks a changed config against a run that was cut off at step 3."""
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    TrainerState(global_step=3).save_to_json(str(checkpoint / "trainer_state.json"))
    config = dataclasses.replace(settings, eval_data=("e",), data=("d",))

    def check(digests=("1",), eval_digest="2", start=config, **changes):
        check_resume(tmp_path / "run", start, {"d": "1"}, {"e": "2"}, None)
        changed = copy.copy(start)
        for name, value in changes.items():
            object.__setattr__(changed, name, value)  # also values that need another setting beside them
        fingerprints = dict(zip(changed.data, digests, strict=True))
        check_resume(
            tmp_path / "run", changed, fingerprints, dict.fromkeys(changed.eval_data, eval_digest), checkpoint
        )

    check.config = config
    return check


def other_value(name, value):
    hint = field_types()[name]
    options = [option for option in typing.get_args(hint) if option not in (value, type(None))]
    if typing.get_origin(hint) is typing.Literal:
        return options[0]
    if isinstance(value, bool):
        return not value
    kind = options[0] if value is None else next(kind for kind in (int, float, str, tuple) if isinstance(value, kind))
    texts = {str: "other", tuple: ("other",), dict[str, str]: {"prompt": "other"}}
    return {int: 7, float: 1.5, dict[str, float]: {"other": 1.5}, **texts}[kind]


@pytest.mark.parametrize("name", ALWAYS_DECIDE)
def test_setting_that_decides_is_refused_by_name(unfinished, name):
    value = other_value(name, getattr(unfinished.config, name))
    options = {"digests": ("other",)} if name == "data" else {}
    shown = f"the content of {name}" if name in SETTINGS_BY_CONTENT else f"{name}: "
    with pytest.raises(InputError, match=rf"other settings or data \({shown}"):
        unfinished(**{name: value}, **options)


@pytest.mark.parametrize("name", NEVER_DECIDE)
def test_setting_that_never_decides_is_accepted(unfinished, name):
    unfinished(**{name: other_value(name, getattr(unfinished.config, name))})


@pytest.mark.parametrize(("name", "other"), DECIDE_WITH)
def test_setting_that_decides_with_another_is_refused_only_with_it(unfinished, name, other):
    start = dataclasses.replace(
        unfinished.config, **{"load_best_model_at_end": True} if other == "load_best_model_at_end" else
        {"lora_r": 4, "lora_dropout": 0.1},
    )  # fmt: skip
    change = {name: other_value(name, getattr(start, name)), "eval_digest": "9" if name == "eval_data" else "2"}
    assert name in deciding_settings(start) and name not in deciding_settings(unfinished.config)
    unfinished(**change)
    with pytest.raises(InputError, match=rf"\((the content of )?{name}: "):
        unfinished(**change, start=start)


def test_other_content_under_the_same_name_and_another_order_are_refused(unfinished):
    with pytest.raises(InputError, match=r"\(the content of data\)"):
        unfinished(digests=("3",))
    two = dataclasses.replace(unfinished.config, data=("d", "d"))
    with pytest.raises(InputError, match=r"\(the content of data: \['d', 'd'\] -> \['d'\]\)"):
        unfinished(start=two, data=("d",))
    unfinished(data=("./d",))


def test_changed_files_of_a_model_are_refused(unfinished, settings, tmp_path):
    folder = tmp_path / "backbone"
    shutil.copytree(settings.model, folder)
    unfinished(model=str(folder))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    with pytest.raises(InputError, match=r"\(the content of model: .*backbone'\)"):
        unfinished(model=str(folder))


def test_averaged_moments_keep_the_weight_that_a_run_began_with(base_settings, pairs_file, tmp_path):
    settings = base_settings(data=(str(pairs_file),), kl_reduction="averaged_moments", max_steps=2, save_steps=1)
    train(settings)
    path = tmp_path / "run" / "checkpoints" / "run.json"
    record = json.loads(path.read_text())
    assert record.pop("kl_reduction_version") == 2  # an earlier version wrote none, and trained with another weight
    path.write_text(json.dumps(record))
    (tmp_path / "run" / "train_result.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-2")
    with pytest.raises(InputError, match="the model's kl_reduction_version"):
        train(settings)
