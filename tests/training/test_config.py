"""Training settings from YAML and flags: types, faults, round trip."""

import pytest
import yaml

from inform_rm.errors import InputError
from inform_rm.training.reward_arguments import (
    RewardTrainingArguments,
    arguments_from_mapping,
    read_arguments,
    settings_of,
)

REQUIRED = {"model": "m", "data": ["d.jsonl"], "output_dir": "o"}


def test_yaml_and_flags_give_the_same_settings(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("model: m\ndata: d.jsonl\noutput: o\nlearning_rate: 1e-4\nlatent_dim: 64\nuse_cpu: true\n")
    flags = {
        "model": "m",
        "data": ["d.jsonl"],
        "output_dir": "o",
        "learning_rate": "1e-4",
        "latent_dim": "64",
        "use-cpu": "true",
    }
    assert read_arguments(path, {}) == read_arguments(None, REQUIRED | flags)
    assert read_arguments(path, {}).learning_rate == 1e-4  # YAML itself reads 1e-4 as text


def test_flags_win_over_the_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("model: m\ndata: [a, b]\noutput: o\nseed: 1\n")
    assert read_arguments(path, {"seed": "5"}).seed == 5


def test_every_setting_survives_yaml(tmp_path):
    config = RewardTrainingArguments(
        **REQUIRED | {"data": ("a", "b")}, max_length=7, beta=0.5, lora_r=4, eval_data=("e",)
    )
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings_of(config)))
    assert read_arguments(path, {}) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learnin_rate": 1}, "unknown setting 'learnin_rate' .did you mean 'learning_rate'"),
        ({"learning_rate": "fast"}, "learning_rate: must be a number, got 'fast'"),
        ({"learning_rate": -1}, "learning_rate must be a finite number above 0, got -1"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number"),
        ({"latent_dim": 1.5}, "latent_dim: must be a whole number, got 1.5"),
        ({"latent_dim": 0}, "latent_dim must be a finite number of at least 1, got 0"),
        ({"latent_dim": True}, "latent_dim: must be a number, got True"),
        ({"beta": -0.1}, "beta must be a finite number of at least 0"),
        ({"beta": None}, "beta: must be a number, got None"),
        ({"bf16": "maybe"}, "bf16: must be true or false, got 'maybe'"),
        ({"architecture": "infrom"}, "architecture: must be one of inform, standard, got 'infrom'"),
        ({"data": []}, "data is empty"),
        ({"data": [1]}, "data: must be a path or a list of paths"),
        ({"model": 3}, "model: must be text, got 3"),
        ({"model": " "}, "model is empty"),
        ({"label_smoothing": 0.5}, "label_smoothing must be at least 0 and below 0.5"),
        ({"overlong": "cut"}, "overlong: must be one of error, drop, truncate_prompt"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end needs eval_data"),
        ({"max_length": 1}, "max_length must be a finite number of at least 2"),
    ],
)
def test_wrong_setting_is_refused_with_its_name(settings, message):
    with pytest.raises(InputError, match=message):
        arguments_from_mapping({**REQUIRED, **settings}, "test")


def test_missing_and_wrong_settings_come_in_one_message():
    with pytest.raises(
        InputError, match=r"unknown setting 'x'.*latent_dim.*missing setting 'data'.*missing setting 'output_dir'"
    ):
        arguments_from_mapping({"model": "m", "x": 1, "latent_dim": "y"}, "test")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n- b\n", "expected 'setting: value' lines, got a list"),
        (b"model: [unclosed\n", "not valid YAML"),
        (b"\xff\xfe\x00", "not valid YAML"),
        (b"!!python/object/apply:os.system ['true']\n", "not valid YAML"),
        (b"", "missing setting 'model'"),
    ],
)
def test_broken_file_is_refused(content, message, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_arguments(path, {})


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"none\.yaml: cannot be read"):
        read_arguments(tmp_path / "none.yaml", {})


def divided(given):
    """Pairs a forward pass, forward passes an update."""
    names = ("pairs_per_step", "per_device_train_batch_size", "gradient_accumulation_steps")
    known = {name: value for name, value in zip(names, given, strict=True) if value is not None}
    arguments = RewardTrainingArguments("o", use_cpu=True, **known)
    assert arguments.pairs_of_step == arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    return arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((None, None, None), (8, 8)),  # 64, the paper's
        ((None, 4, None), (4, 16)),
        ((None, None, 4), (16, 4)),
        ((None, 4, 2), (4, 2)),  # both given: their product
        ((32, None, None), (8, 4)),
        ((60, None, None), (6, 10)),  # at most 8 a pass
        ((61, None, None), (1, 61)),
        ((24, 12, None), (12, 2)),
        ((24, None, 12), (2, 12)),
        ((8, 4, 2), (4, 2)),
    ],
)
def test_pairs_of_a_step_are_divided(given, expected):
    assert divided(given) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((8, 4, 4), "pairs_per_step is 8, but per_device_train_batch_size 4 x gradient_accumulation_steps 4 make 16"),
        ((60, 8, None), "pairs_per_step 60 is no multiple of per_device_train_batch_size 8 = 8; nearest: 64"),
        ((61, None, 8), "no multiple of gradient_accumulation_steps 8 = 8; nearest: 64"),
        ((3, 8, None), "nearest: 8"),
        ((0, None, None), "pairs_per_step must be a finite number of at least 1"),
    ],
)
def test_pairs_of_a_step_that_cannot_be_divided_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        divided(given)


@pytest.mark.parametrize(
    ("processes", "given", "expected"),
    [
        (8, (None, None, None), (8, 1)),
        (16, (None, None, None), (4, 1)),
        (2, (None, 4, None), (4, 8)),
        (2, (128, None, 16), (4, 16)),
        (3, (None, 4, 2), (4, 2)),  # 24 pairs a step
        (3, (None, None, None), "pairs_per_step 64 is no multiple of processes 3 = 3; nearest: 63"),
        (8, (64, 8, 8), "processes 8 x per_device_train_batch_size 8 x gradient_accumulation_steps 8 make 512"),
        (96, (None, None, None), "nearest: 96"),
    ],
)
def test_pairs_of_a_step_are_those_of_all_processes(processes, given, expected):
    """The rule alone; `tests/distributed` trains with it."""
    arguments = RewardTrainingArguments("o", use_cpu=True)
    names = ("pairs_per_step", "per_device_train_batch_size", "gradient_accumulation_steps")
    for name, value in zip(names, given, strict=True):
        setattr(arguments, name, value)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            arguments.divided_pairs(processes)
    else:
        assert arguments.divided_pairs(processes) == expected


def test_settings_that_were_recorded_ask_for_the_same_pairs_elsewhere(monkeypatch):
    recorded = settings_of(RewardTrainingArguments("o", use_cpu=True))
    assert recorded["pairs_per_step"] == 64
    monkeypatch.setenv("WORLD_SIZE", "2")  # as a launcher sets it
    with pytest.raises(InputError, match=r"processes 2 x .* make 128: leave one of them out"):
        arguments_from_mapping({**recorded, **REQUIRED}, "test")


def test_a_launch_on_other_devices_divides_what_was_given_and_not_what_came_of_it():
    alone = RewardTrainingArguments("o", use_cpu=True)
    assert (alone.division, alone.divided_over(8).division, alone.division) == ((8, 8), (8, 1), (8, 8))
    assert RewardTrainingArguments("o", use_cpu=True, per_device_train_batch_size=2).divided_over(4).division == (2, 8)
    with pytest.raises(InputError, match="pairs_per_step 64 is no multiple of processes 3 = 3; nearest: 63"):
        alone.divided_over(3)
