"""The same training in one process, in two under DDP and in two under FSDP2, drawn over each other.

    python benchmarks/trajectories.py --model FOLDER --data PAIRS.jsonl --output FOLDER [--steps 20]

All of it runs on the CPU (gloo). Accelerate has no FSDP there; the second half of `PATCH` makes FSDP2 run all the
same, so that what is compared is FSDP2's arithmetic, not its speed, nor accelerate's own way to it on GPUs. Latent
noise is drawn for each process on purpose and set to 0 here, in all runs.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import yaml

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from inform_rm.util.colors import SERIES

PATCH = """
import os
if "TRAJECTORY" in os.environ:
    import torch
    torch.randn_like = torch.zeros_like
if os.environ.get("TRAJECTORY") == "fsdp2" and "RANK" in os.environ:
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType
    plain_init = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        plain_init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init
"""
CONFIGS = Path(__file__).resolve().parents[1] / "inform_rm" / "training" / "accelerate_configs"
RUNS = {"one": ("single_process", 1, "NO"), "ddp": ("ddp", 2, "MULTI_CPU"), "fsdp2": ("fsdp2", 2, "FSDP")}


def run(name: str, arguments: argparse.Namespace) -> dict:
    """Launch one run unless its result is there; its ``train_result.json``."""
    configuration, processes, kind = RUNS[name]
    folder = arguments.output / name
    settings = {
        "model": arguments.model, "data": arguments.data, "output": str(folder), "use_cpu": True, "max_length": 256,
        "overlong": "drop", "max_pairs_per_source": 8 * arguments.steps, "learning_rate": 1e-4,
        "max_steps": arguments.steps, "per_device_train_batch_size": 4 // processes, "logging_steps": 1,
        "gradient_accumulation_steps": 2, "save_steps": 1.0, "batching": "padded", "chat_template": "plain",
        "architecture": arguments.architecture,
    }  # fmt: skip
    if not (folder / "train_result.json").exists():
        arguments.output.mkdir(parents=True, exist_ok=True)
        launch = yaml.safe_load((CONFIGS / f"{configuration}.yaml").read_text(encoding="utf-8"))
        launch |= {"num_processes": processes, "mixed_precision": "no", "use_cpu": True}
        (arguments.output / f"{name}-launch.yaml").write_text(yaml.safe_dump(launch))
        (arguments.output / f"{name}.yaml").write_text(yaml.safe_dump(settings))
        (arguments.output / "sitecustomize.py").write_text(PATCH)
        command = [
            sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file",
            str(arguments.output / f"{name}-launch.yaml"), "--main_process_port", "0", "-m", "inform_rm.cli", "train",
            str(arguments.output / f"{name}.yaml"),
        ]  # fmt: skip
        environment = {
            **os.environ, "PYTHONPATH": str(arguments.output), "TRAJECTORY": name, "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        subprocess.run(command, env=environment, check=True)
    result = json.loads((folder / "train_result.json").read_text())
    if (result["num_processes"], result["distributed_type"]) != (processes, kind):
        raise SystemExit(f"{name} ran as {result['distributed_type']} with {result['num_processes']} processes.")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, nargs="+")
    parser.add_argument("--output", required=True, type=lambda text: Path(text).resolve())
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--architecture", choices=("inform", "standard"), default="inform")
    arguments = parser.parse_args()
    labels = {"one": "1 process", "ddp": "2 processes, DDP", "fsdp2": "2 processes, FSDP2 (CPU patch)"}
    results = {name: run(name, arguments) for name in RUNS}
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, quantity in zip(axes, ("loss", "grad_norm"), strict=True):
        values = {
            name: [line[quantity] for line in result["log_history"] if quantity in line]
            for name, result in results.items()
        }
        for (name, label), style, color in zip(labels.items(), ("-", "--", ":"), SERIES[:3], strict=True):
            width = 5 - 1.5 * len(style)
            axis.plot(range(1, arguments.steps + 1), values[name], style, color=color, label=label, linewidth=width)
        largest = max(
            abs(a - b) for name in ("ddp", "fsdp2") for a, b in zip(values["one"], values[name], strict=True)
        )
        print(f"{quantity}: largest difference from one process over {arguments.steps} steps: {largest:.2g}")
        axis.set(xlabel="step", ylabel=quantity, title=f"largest difference {largest:.2g}")
        axis.legend()
    figure.suptitle(f"{Path(arguments.model).name}, {arguments.architecture}, 8 pairs a step, float32 on the CPU")
    figure.savefig(arguments.output / "trajectories.png", dpi=110)
    print(arguments.output / "trajectories.png")


if __name__ == "__main__":
    main()
