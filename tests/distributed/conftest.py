"""Launches on two CPU processes, as users launch them."""

import json
import os
import socket
import subprocess
import sys
import textwrap
from importlib.resources import files

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from inform_rm import InfoRMForSequenceClassification

LAUNCH = {
    "compute_environment": "LOCAL_MACHINE", "mixed_precision": "no", "num_machines": 1, "num_processes": 2,
    "machine_rank": 0, "rdzv_backend": "static", "same_network": True, "use_cpu": True,
}  # fmt: skip

# Accelerate starts CPU processes for what it calls MULTI_GPU, and none beside the first for MULTI_CPU.
DDP = {"distributed_type": "MULTI_GPU"}
FSDP2 = {
    "distributed_type": "FSDP",
    "fsdp_config": {
        "fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_state_dict_type": "FULL_STATE_DICT", "fsdp_reshard_after_forward": True,
        "fsdp_cpu_ram_efficient_loading": False, "fsdp_offload_params": False,
        "fsdp_activation_checkpointing": False,
    },
}  # fmt: skip

# Says how many forward passes each process made.
COUNT_PASSES = """
import atexit, os
from inform_rm.scoring import scorer as scoring
passes = [0]
plain = scoring.RewardScorer._packed_forward
def counted(self, *arguments):
    passes[0] += 1
    return plain(self, *arguments)
scoring.RewardScorer._packed_forward = counted
atexit.register(lambda: os.write(1, f"PASSES {passes[0]}\\n".encode()))
"""

# Accelerate turns FSDP on CPU processes into DDP without a word. This patch, put in the processes through
# sitecustomize, makes FSDP2 run there; the class that it prints shows that it did.
FSDP2_PATCH = """
import os
import accelerate.accelerator, accelerate.state
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

plain_init = AcceleratorState.__init__

def init(self, *args, fsdp_plugin=None, **kwargs):
    plain_init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP

AcceleratorState.__init__ = init
plain_prepare = accelerate.accelerator.fsdp2_prepare_model

def prepare(*args, **kwargs):
    model = plain_prepare(*args, **kwargs)
    sharded = all(type(value).__name__ == "DTensor" for value in model.parameters())
    # Whole lines, though both processes write.
    os.write(1, f"PREPARED {type(model).__name__}{', all parameters sharded' * sharded}\\n".encode())
    return model

accelerate.accelerator.fsdp2_prepare_model = prepare
"""

# Latent noise is drawn for each process on purpose; without any, runs of one and of several processes can be compared.
NO_NOISE_PATCH = """
import torch
torch.randn_like = torch.zeros_like
"""

# Trains with each of several settings in turn, which saves starting the processes again. An error is written down
# (one line a process) and ends nothing: `train` raises it in all processes alike.
TRAIN_ALL = """
import json, os, sys
from inform_rm.errors import InputError
from inform_rm.training.reward_arguments import arguments_from_mapping
from inform_rm.training.run import train

for settings in json.load(open(sys.argv[1])):
    try:
        train(arguments_from_mapping(settings, "test"))
    except InputError as error:
        os.write(1, f"REFUSED {error}\\n".encode())
"""


# The package's template for several machines: here this machine is both of them, with one process each.
TEMPLATE = files("inform_rm") / "training" / "accelerate_configs" / "multi_node.yaml"
TWO_MACHINES = yaml.safe_load(TEMPLATE.read_text(encoding="utf-8")) | {
    "num_processes": 2, "main_process_ip": "127.0.0.1", "mixed_precision": "no", "use_cpu": True,
}  # fmt: skip
TWO_MACHINES["fsdp_config"]["fsdp_state_dict_type"] = "SHARDED_STATE_DICT"
KINDS = {
    "ddp": (LAUNCH | DDP, ""), "fsdp2": (LAUNCH | FSDP2, FSDP2_PATCH),
    "two machines, sharded": (TWO_MACHINES, FSDP2_PATCH),
}  # fmt: skip


class Launcher:
    """Starts two processes; `kind` is one of `KINDS`, `patch` Python code that both run first (sitecustomize)."""

    no_noise_patch = NO_NOISE_PATCH

    def __init__(self, folder):
        self.folder = folder

    def start(self, arguments, kind, patch=""):
        """The launchers (one for each machine), started; what they print goes to files in the folder."""
        configuration, kind_patch = KINDS[kind]
        in_workers = textwrap.indent(kind_patch + patch, "    ")
        (self.folder / "sitecustomize.py").write_text(f'import os\nif "RANK" in os.environ:\n    pass\n{in_workers}')
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        path = [str(self.folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            **os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
            "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
        started = []
        for rank in range(configuration["num_machines"]):
            path = self.folder / f"launch-{rank}.yaml"
            path.write_text(yaml.safe_dump(configuration | {"machine_rank": rank, "main_process_port": port}))
            command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
            with open(self.folder / f"out-{rank}", "w") as out, open(self.folder / f"err-{rank}", "w") as err:
                started.append(
                    subprocess.Popen(
                        [*command, "--config_file", path, *map(str, arguments)],
                        env=environment,
                        stdout=out,
                        stderr=err,
                    )
                )
        return started

    def finish(self, started, timeout=500):
        """Their exit codes and what they printed."""
        try:
            codes = [process.wait(timeout) for process in started]
        finally:
            for process in started:
                process.kill()
        texts = ("".join((self.folder / f"{name}-{rank}").read_text() for rank in range(len(started)))
                 for name in ("out", "err"))  # fmt: skip
        return codes, *texts

    def run(self, arguments, kind, patch="", fails=False):
        codes, out, err = self.finish(self.start(arguments, kind, patch))
        assert all((code != 0) == fails for code in codes), f"{codes} {out[-2000:]} {err[-6000:]}"
        return out, err

    def cli(self, arguments, kind="ddp", patch="", fails=False):
        return self.run(["-m", "inform_rm.cli", *arguments], kind, patch, fails)

    def train_all(self, settings, kind, patch=""):
        (self.folder / "settings.json").write_text(json.dumps(settings))
        (self.folder / "train_all.py").write_text(TRAIN_ALL)
        return self.run([self.folder / "train_all.py", self.folder / "settings.json"], kind, patch)


@pytest.fixture
def launcher(tmp_path):
    folder = tmp_path / "launch"
    folder.mkdir()
    return Launcher(folder)


@pytest.fixture
def pairs_file(tmp_path):
    """Writes `number` pairs of several lengths to a file; gives its name."""

    def write(number):
        path = tmp_path / f"pairs-{number}.jsonl"
        rows = [
            {"prompt": f"Count to {n}.", "chosen": "one two " * (n % 4 + 1), "rejected": "no " * (n % 3 + 1)}
            for n in range(number)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def settings(causal_lm_dir, pairs_file, tmp_path):
    """Training settings for a launch (YAML types); keywords change them, `output` names a folder of the test's."""

    def make(**changes):
        return {
            "model": str(causal_lm_dir("llama")), "data": [pairs_file(32)], "architecture": "standard",
            "latent_dim": 8, "learning_rate": 1e-3, "max_steps": 4, "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1, "logging_steps": 1, "save_steps": 100, "use_cpu": True, **changes,
            "output_dir": str(tmp_path / changes.get("output_dir", "two")),
        }  # fmt: skip

    return make


@pytest.fixture(scope="module")
def model(tmp_path_factory, causal_lm_dir):
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("model")
    made = InfoRMForSequenceClassification.from_backbone(str(causal_lm_dir("llama")), latent_dim=8)
    torch.nn.init.normal_(made.score.encoder.weight, std=0.5)
    made.save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(causal_lm_dir("llama"))).save_pretrained(folder)
    return folder


@pytest.fixture
def count_passes():
    """Code for the start of a process: at its end it says how many forward passes it made."""
    return COUNT_PASSES
