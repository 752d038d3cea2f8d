"""The example scripts run as they stand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.slow
@pytest.mark.parametrize("flags", ([], ["--torch-compile"]), ids=("eager", "compiled"))
def test_a_model_is_trained_from_memory_evaluated_and_exported(flags, tmp_path):
    if not EXAMPLES.is_dir():
        pytest.skip("no source checkout around these tests")
    command = [sys.executable, str(EXAMPLES / "train_in_memory.py"), "--output", str(tmp_path / "run"), *flags]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=900)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "step 8: accuracy" in run.stdout and "accuracy of the exported model: " in run.stdout
    assert {"config.json", "model.safetensors", "README.md"} <= {p.name for p in (tmp_path / "run" / "hub").iterdir()}
