"""A process that dies ends the job, with a message, and the run goes on from its last checkpoint."""

import json
import os
import signal
import time

import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.distributed

# The second process stops for a long time at step 4, while the first waits for it, as long as a file "waits" is there.
PATCH = """
import os, time
from inform_rm.training import trainer

plain_step = trainer.RewardTrainer.training_step

def step(self, *args):
    if os.environ["RANK"] == "1" and self.state.global_step == 4 and os.path.exists("FOLDER/waits"):
        with open("FOLDER/pid.new", "w") as file:
            file.write(str(os.getpid()))
        os.rename("FOLDER/pid.new", "FOLDER/pid")
        time.sleep(1000)
    return plain_step(self, *args)

trainer.RewardTrainer.training_step = step
"""


def test_a_killed_process_ends_the_job_and_the_run_can_be_continued(settings, launcher, tmp_path):
    common = {"architecture": "inform", "max_steps": 6, "save_steps": 3, "batching": "padded"}
    (tmp_path / "waits").touch()
    patch = PATCH.replace("FOLDER", str(tmp_path))
    config = launcher.folder / "config.yaml"
    config.write_text(json.dumps(settings(**common, output_dir="cut")))  # JSON is YAML
    started = launcher.start(["-m", "inform_rm.cli", "train", config], "fsdp2", patch)
    deadline = time.monotonic() + 300
    while not (tmp_path / "pid").exists():
        assert started[0].poll() is None and time.monotonic() < deadline, launcher.finish(started)
        time.sleep(0.2)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    (code,), _, err = launcher.finish(started, timeout=120)  # raises where the other process waits for ever
    assert code != 0 and "Signal 9 (SIGKILL)" in err and "local_rank: 1" in err

    (tmp_path / "waits").unlink()
    launcher.train_all([settings(**common, output_dir=name) for name in ("cut", "whole")], "fsdp2", patch)
    cut, whole = (json.loads((tmp_path / name / "train_result.json").read_text()) for name in ("cut", "whole"))
    assert cut["resumed_from_step"] == 3 and whole["resumed_from_step"] is None
    for quantity in ("loss", "grad_norm", "kl_nats"):
        one, other = ([line[quantity] for line in run["log_history"] if quantity in line] for run in (whole, cut))
        assert len(one) == 6 and other == pytest.approx(one, abs=1e-6), quantity


def test_sigterm_to_the_launcher_saves_on_all_processes(settings, launcher, tmp_path):
    """As a spot instance or a queue ends a job: the launcher passes the signal on; here at step 4, between saves."""
    common = {"architecture": "inform", "max_steps": 6, "save_steps": 100, "batching": "padded"}
    (tmp_path / "waits").touch()
    # Process 1 waits, and so gets the signal, within a step; it goes on as soon as the signal has come.
    patch = PATCH.replace("time.sleep(1000)", "signal.pause()").replace("import os, time", "import os, signal")
    patch = patch.replace("FOLDER", str(tmp_path))
    config = launcher.folder / "config.yaml"
    config.write_text(json.dumps(settings(**common, output_dir="cut")))
    started = launcher.start(["-m", "inform_rm.cli", "train", config], "ddp", patch)
    deadline = time.monotonic() + 300
    while not (tmp_path / "pid").exists():
        assert started[0].poll() is None and time.monotonic() < deadline, launcher.finish(started)
        time.sleep(0.2)
    started[0].send_signal(signal.SIGTERM)
    (code,), _, err = launcher.finish(started, timeout=120)
    assert code != 0 and err.count("SIGTERM: saved") == 2, err[-3000:]
    assert (tmp_path / "cut" / "checkpoints" / "checkpoint-5" / "complete.json").exists()

    (tmp_path / "waits").unlink()
    launcher.train_all([settings(**common, output_dir=name) for name in ("cut", "whole")], "ddp", patch)
    assert json.loads((tmp_path / "cut" / "train_result.json").read_text())["resumed_from_step"] == 5
    one, other = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "cut"))
    assert all((one[name] - other[name]).abs().max() <= 1e-6 for name in one)
