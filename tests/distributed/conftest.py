"""Launches training on two CPU processes, as users launch it."""

import os
import subprocess
import sys

import pytest
import yaml

LAUNCH = {
    "compute_environment": "LOCAL_MACHINE", "mixed_precision": "no", "num_machines": 1, "num_processes": 2,
    "machine_rank": 0, "rdzv_backend": "static", "same_network": True, "use_cpu": True,
}  # fmt: skip


@pytest.fixture
def train_on_two(tmp_path):
    """Run `inform-rm train` under `accelerate launch`; gives the finished process.

    Its arguments: training settings, what the launch configuration has beside `LAUNCH`, and Python code that both
    processes run first (through sitecustomize).
    """

    def launch(settings, configuration, patch=""):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
        (tmp_path / "launch.yaml").write_text(yaml.safe_dump(LAUNCH | configuration))
        (tmp_path / "sitecustomize.py").write_text(patch)
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        command = [
            sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file",
            str(tmp_path / "launch.yaml"), "--main_process_port", "0", "-m", "inform_rm.cli", "train",
            str(tmp_path / "config.yaml"),
        ]  # fmt: skip
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
        assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
        return run

    return launch
