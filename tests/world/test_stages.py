import io
import sys
from types import SimpleNamespace

import datasets
import pytest
import transformers.trainer
from transformers.utils import logging as transformers_logging

from inform_rm.world.stages import Stages


class Terminal(io.StringIO):
    def isatty(self):
        return True


def state_of_libraries():
    return (
        transformers.trainer.PrinterCallback,
        transformers.trainer.DEFAULT_PROGRESS_CALLBACK,
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
        datasets.are_progress_bars_disabled(),
    )


def test_on_a_terminal_each_stage_is_a_bar_that_the_trainer_moves(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    with Stages({"train": 3.0, "test": 1.0}) as stages:
        stages.start("train")
        stages.on_step_end(None, SimpleNamespace(global_step=1, max_steps=2), None)
        stages.start("test")
    lines = sys.stdout.getvalue().replace("\r", "\n").splitlines()
    train, test = ([line for line in lines if f" {name} " in line] for name in ("train", "test"))
    assert " 0% |" in train[0] and " 50% |" in train[1] and " left" in train[1]
    assert all(" 100% |" in part[-1] and "left" not in part[-1] for part in (train, test))


def test_libraries_are_quiet_inside_and_as_before_after_a_failure(capsys):
    before = state_of_libraries()
    with pytest.raises(KeyError), Stages({"train": 3.0, "test": 1.0}) as stages:
        stages.start("train")
        assert state_of_libraries() == (stages, stages, transformers_logging.ERROR, False, True)
        raise KeyError
    assert state_of_libraries() == before
    assert capsys.readouterr().out.split() == ["1/2", "train", "0", "s", "gone"]
