"""The benchmark for a GPU runs on a CPU with tiny shapes, so that it works the day a card is there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_gpu_benchmark_runs_dry(tmp_path):
    script = Path(__file__).parents[1] / "benchmarks" / "gpu.py"
    if not script.exists():
        pytest.skip("benchmarks/ is not beside the tests")
    command = [sys.executable, str(script), "--dry-run", "--output", str(tmp_path), "--without", "TRL", "gap grid"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    about, *rows = map(json.loads, (tmp_path / "gpu.jsonl").read_text().splitlines())
    assert about["device"]["name"] == "CPU (dry run)"
    assert {row["job"] for row in rows} == {"attention", "train", "best of 16"}
    assert not [row for row in rows if "error" in row]
    assert "packed, segment by segment" in (tmp_path / "gpu.md").read_text()
