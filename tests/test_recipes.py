"""Recipes: read by the real parser, planned by the command in their first lines, run with a tiny model."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from inform_rm import train
from inform_rm.cli.dispatch import main
from inform_rm.training.reward_arguments import read_arguments

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SCRIPT = ROOT / "recipes" / "several_nodes.slurm"
pytestmark = pytest.mark.skipif(not RECIPES, reason="no source checkout around these tests")


def head_of(path):
    lines = path.read_text().splitlines()
    return " ".join(line.lstrip("#").strip(" \\") for line in lines if line.startswith("#") and "SBATCH" not in line)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_read_and_says_how_it_is_run(recipe, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    args = read_arguments(recipe, {"use_cpu": True})
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps in (64, 8)  # alone, or one of eight
    assert args.beta == 0.1 and args.latent_dim == 128 and args.num_train_epochs == 1
    assert f"train {recipe.relative_to(ROOT)}" in head_of(recipe)
    assert not args.faults() and not args.faults_without_adapters()


def test_the_recipe_on_eight_cards_has_the_papers_settings():
    args = read_arguments(ROOT / "recipes" / "llama-3.1-8b-fsdp2.yaml", {"use_cpu": True})
    assert args.learning_rate == 5e-6 and args.per_device_train_batch_size * args.gradient_accumulation_steps * 8 == 64
    assert not args.lora_r and args.objective == "plain"


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [*RECIPES, SCRIPT], ids=lambda path: path.stem)
def test_card_and_time_are_what_the_named_command_says(recipe, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    head = head_of(recipe)
    command = re.search(r"inform-rm (plan .*?) \(", head)[1]
    assert main([*shlex.split(command), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    card = f"the peak is {found['need']:.1f} GiB"
    time = f"{found['pairs_per_second']:.1f} pairs/s: {found['hours']:.1f} hours for 160,800 pairs"
    assert card in head and time in head, f"{recipe.name} should say: {card}; {time}"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, backbone_configs, tokenizer):
    """A backbone for inputs as long as a recipe allows, and a file of pairs."""
    folder = tmp_path_factory.mktemp("tiny")
    config = type(backbone_configs["llama"])(
        **{**backbone_configs["llama"].to_dict(), "max_position_embeddings": 2048}
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": f"Say {place}", "chosen": f"{place}", "rejected": "no"} for place in range(256)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains(recipe, tiny, tmp_path):
    """Two steps on a CPU: another model, other data; what else the recipe says, 4-bit weights too, stays."""
    changed = {"model": str(tiny / "model"), "data": str(tiny / "pairs.jsonl"), "eval_data": str(tiny / "pairs.jsonl")}
    short = {"max_steps": 2, "max_eval_pairs_per_source": 8, "output_dir": str(tmp_path / "run"), "use_cpu": True}
    args = read_arguments(recipe, changed | short)
    result = train(args)
    assert result["steps"] == 2
    assert 0 <= result["evaluation"]["accuracy"] <= 1
    assert (tmp_path / "run" / "model.safetensors").is_file()
    if args.load_in_4bit:
        assert result["quantization"]["bits"] == 4


def test_the_slurm_script_starts_one_launcher_a_machine(tmp_path):
    """Slurm and Accelerate are replaced by scripts that say what they were called with."""
    fakes = {
        "scontrol": "echo node1; echo node2",
        "srun": 'shift; SLURM_NODEID=0 "$@"; SLURM_NODEID=1 "$@"',
        "accelerate": 'printf "%s " "$@"; echo',
    }
    for name, text in fakes.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    environment = {"PATH": path, "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2"}
    run = subprocess.run(["bash", str(SCRIPT)], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    launches = [line.split() for line in run.stdout.splitlines()]
    assert len(launches) == 2
    for rank, words in enumerate(launches):
        flags = dict(zip(words[1::2], words[2::2], strict=False))
        assert (
            flags["--machine_rank"] == str(rank)
            and flags["--num_machines"] == "2"
            and flags["--num_processes"] == "16"
        )
        assert flags["--main_process_ip"] == "node1"
        assert (ROOT / flags["--config_file"]).is_file()
        train_words = words[words.index("train") + 1 :]
        overrides = dict(zip(train_words[1::2], train_words[2::2], strict=True))
        args = read_arguments(
            ROOT / train_words[0], {name[2:]: value for name, value in overrides.items()} | {"use_cpu": True}
        )
        assert args.per_device_train_batch_size * int(flags["--num_processes"]) == 64
