"""Training survives kills at any moment, SIGTERM, full and read-only disks, clock jumps, and stops at NaN."""

import collections
import dataclasses
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from inform_rm.errors import InputError
from inform_rm.training.checkpoints import discard_incomplete
from inform_rm.training.loop import NonFiniteLossError
from inform_rm.training.reward_arguments import RewardTrainingArguments, settings_of
from inform_rm.training.run import train
from inform_rm.util.checkpoints import complete_checkpoints, is_complete
from inform_rm.util.files import file_digest

KILLS = 32


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [
        {"id": f"row-{n}", "prompt": f"Count to {n}.", "chosen": "one two " * (n % 4 + 1),
         "rejected": "no " * (n % 3 + 1)}
        for n in range(40)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def settings(base_settings):
    return base_settings(max_steps=8, save_steps=2, lr_scheduler_type="linear")


@pytest.fixture(scope="module")
def whole(causal_lm_dir, pairs_file, tmp_path_factory):
    """A finished run with all its checkpoints: its settings; its folder is to be copied, not changed."""
    args = RewardTrainingArguments(
        model=str(causal_lm_dir("llama")), data=(str(pairs_file),), latent_dim=8, learning_rate=1e-3, max_steps=8,
        output_dir=str(tmp_path_factory.mktemp("whole") / "run"), per_device_train_batch_size=4,
        gradient_accumulation_steps=2, logging_steps=1, save_steps=2, save_total_limit=None, use_cpu=True,
    )  # fmt: skip
    train(args)
    return args


@pytest.fixture
def unfinished(whole, tmp_path):
    """The settings of that run, as a kill after its last checkpoint would have left it, in a folder of the test's."""
    shutil.copytree(whole.output_dir, tmp_path / "run")
    (tmp_path / "run" / "train_result.json").unlink()
    return dataclasses.replace(whole, output_dir=str(tmp_path / "run"))


def steps(folder):
    return [int(path.name.rpartition("-")[2]) for path in complete_checkpoints(folder / "checkpoints")]


@pytest.mark.slow
def test_runs_killed_over_thirty_times_end_with_the_same_weights(settings, tmp_path, capsys):
    """SIGKILL at random moments, in saves and in the final one; prints where the kills fell."""
    long = dataclasses.replace(settings, max_steps=30, save_steps=1, save_total_limit=1)
    start = time.monotonic()
    train(long)
    duration = time.monotonic() - start
    expected = file_digest(tmp_path / "run" / "model.safetensors")

    context = multiprocessing.get_context("forkserver")  # imports once; every run is a fresh fork of it
    context.set_forkserver_preload(["inform_rm.training.run"])
    rng = random.Random(0)
    found = collections.Counter()
    finished = kills = 0
    while kills < KILLS or finished == 0:
        output = tmp_path / f"killed-{finished}"
        config = dataclasses.replace(long, output_dir=str(output))
        process = context.Process(target=train, args=(config,))
        process.start()
        if kills < KILLS:
            wait_for_a_moment(output, process, rng, rng.choice(["any"] * 4 + ["save"] * 3 + ["final"]), duration)
            process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            kills += 1
            found[phase(output)] += 1
        if (output / "train_result.json").exists():
            assert file_digest(output / "model.safetensors") == expected
            finished += 1
        else:
            assert process.exitcode == -signal.SIGKILL, "a run ended by itself without a result"
    with capsys.disabled():
        print(f"\n{kills} kills, {finished} runs finished, none with other weights; {dict(found)}")
    assert found["in a save"] and found["between saves"]


def wait_for_a_moment(output, process, rng, moment, duration):
    """Until a random time, or until a checkpoint or the final model is being written."""
    deadline = time.monotonic() + 2 * duration + 20
    if moment == "any":
        process.join(rng.uniform(0, duration))
        return
    while process.is_alive() and time.monotonic() < deadline:
        half_written = [path for path in (output / "checkpoints").glob("checkpoint-*") if not is_complete(path)]
        if (half_written if moment == "save" else (output / ".final").exists()) and rng.random() < 0.3:
            time.sleep(rng.uniform(0, 0.02))
            return
        time.sleep(0.001)


def phase(output):
    checkpoints = output / "checkpoints"
    if (output / ".final").exists():
        return "in the final save"
    if any(not is_complete(path) for path in checkpoints.glob("checkpoint-*")):
        return "in a save"
    if list(checkpoints.glob(".discarded.*")):
        return "while an old checkpoint was removed"
    return "between saves" if complete_checkpoints(checkpoints) else "before the first checkpoint"


# Breaks what the first checkpoint was written to, trains on into the failure, mends it and runs the command again.
FAULT = """
import json, os, resource, sys
from pathlib import Path
from transformers import AutoModelForSequenceClassification
from inform_rm.training import loop
from inform_rm.util.checkpoints import complete_checkpoints
from inform_rm.training.reward_arguments import arguments_from_mapping
from inform_rm.training.run import train

fault, settings = sys.argv[1], json.loads(sys.argv[2])
checkpoints = Path(settings["output_dir"]) / "checkpoints"
filler = Path(settings["output_dir"]) / "filler"
mark = loop.mark_complete

def mark_then_break(folder):
    mark(folder)
    if fault == "full":
        with open(filler, "wb", buffering=0) as file:
            for size in (1 << 16, 1 << 10):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    pass
    elif fault == "read-only":
        os.chmod(checkpoints, 0o555)
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))

loop.mark_complete = mark_then_break
config = arguments_from_mapping(settings, "test")
try:
    train(config)
    sys.exit("nothing failed")
except OSError as error:
    message = str(error)
loop.mark_complete = mark
found = [path.name for path in complete_checkpoints(checkpoints)]
_, loading = AutoModelForSequenceClassification.from_pretrained(checkpoints / found[-1], output_loading_info=True)
if fault == "full":
    filler.unlink()
elif fault == "read-only":
    os.chmod(checkpoints, 0o755)
else:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
result = train(config)
import hashlib
weights = hashlib.sha256((Path(settings["output_dir"]) / "model.safetensors").read_bytes()).hexdigest()
print(json.dumps({"message": message, "found": found, "missing": sorted(loading["missing_keys"]),
                  "resumed": result["resumed_from_step"], "weights": weights}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["file too large", "full", "read-only"])
def test_a_failed_save_leaves_the_last_checkpoint(settings, tmp_path, fault):
    command = [sys.executable, "-c", FAULT, fault]
    cut = dataclasses.replace(settings, output_dir=str(tmp_path / "cut"))
    if fault == "full":
        mount = f'mkdir {cut.output_dir} && mount -t tmpfs -o size=4m tmpfs {cut.output_dir} && exec "$@"'
        command = ["unshare", "-rm", "sh", "-c", mount, "-", *command]
        if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode != 0:
            pytest.skip("no mount namespaces for a small disk of our own")
    elif fault == "read-only" and os.getuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root writes into read-only folders, and there is no setpriv to take that away")
        command = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", "--inh-caps", "-all", *command]
    run = subprocess.run(
        [*command, json.dumps(settings_of(cut))], capture_output=True, text=True, check=False, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert "checkpoint-4 could not be written" in found["message"]
    assert "checkpoint-2 is complete: the same command goes on from there" in found["message"]
    assert (found["found"], found["missing"], found["resumed"]) == (["checkpoint-2"], [], 2)
    train(settings)
    assert found["weights"] == file_digest(tmp_path / "run" / "model.safetensors")


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(settings, tmp_path):
    whole = dataclasses.replace(settings, save_steps=100, logging_steps=100)
    train(whole)
    cut = dataclasses.replace(whole, output_dir=str(tmp_path / "cut"))
    config = tmp_path / "settings.json"  # JSON is YAML
    config.write_text(json.dumps(settings_of(cut)))
    script = (
        "import os, signal, sys\n"
        "from inform_rm.cli import main\n"
        "from inform_rm.training.trainer import RewardTrainer\n"
        "step = RewardTrainer.training_step\n"
        "def signalled(self, *args, **kwargs):\n"
        "    if self.state.global_step == 4: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return step(self, *args, **kwargs)\n"
        "RewardTrainer.training_step = signalled\n"
        "sys.exit(main(['train', sys.argv[1]]))\n"
    )
    run = subprocess.run([sys.executable, "-c", script, str(config)], capture_output=True, text=True, check=False)
    assert run.returncode == 128 + signal.SIGTERM, run.stderr[-3000:]
    assert "SIGTERM: saved" in run.stderr and "checkpoint-5; the same command goes on" in run.stderr
    assert steps(tmp_path / "cut") == [5] and not (tmp_path / "cut" / "config.json").exists()
    before = signal.getsignal(signal.SIGTERM)
    assert train(cut)["resumed_from_step"] == 5
    assert signal.getsignal(signal.SIGTERM) is before
    assert file_digest(tmp_path / "cut" / "model.safetensors") == file_digest(tmp_path / "run" / "model.safetensors")


def test_a_loss_that_is_not_finite_names_its_rows_and_changes_nothing(settings, causal_lm_dir, pairs_file, tmp_path):
    """One token has an embedding of infinities; it stands in one row only."""
    model = AutoModelForCausalLM.from_pretrained(causal_lm_dir("llama"))
    shutil.copytree(causal_lm_dir("llama"), tmp_path / "broken")
    from inform_rm.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(causal_lm_dir("llama"))
    rows = [json.loads(line) for line in pairs_file.open()]
    common = {token for row in rows for text in row.values() for token in tokenizer(str(text))["input_ids"]}
    word = next(word for word in ("Q", "%", "Z", "@", "=") if not common & set(tokenizer(word)["input_ids"]))
    rows[17]["rejected"] = word
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with torch.no_grad():
        for token in tokenizer(word)["input_ids"]:
            if token not in common:
                model.get_input_embeddings().weight[token] = math.inf
    model.save_pretrained(tmp_path / "broken")
    config = dataclasses.replace(
        settings, model=str(tmp_path / "broken"), data=(str(data),), architecture="standard", save_steps=1,
        max_steps=20, save_total_limit=None,
    )  # fmt: skip
    with pytest.raises(NonFiniteLossError, match=r"not finite at step \d.*row-17") as caught:
        train(config)
    report = json.loads((tmp_path / "run" / "nonfinite-0.json").read_text())
    assert str(tmp_path / "run" / "nonfinite-0.json") in str(caught.value)
    broken = [batch for batch in report["batches"] if not batch["is_finite"]]
    assert len(broken) == 1 and "row-17" in broken[0]["ids"] and len(broken[0]["ids"]) == 4
    assert len(report["batches"]) == 2
    # Every step before it is saved, and finite but for the token's own embedding.
    assert steps(tmp_path / "run") == list(range(1, report["step"]))
    if report["step"] > 1:
        last = complete_checkpoints(tmp_path / "run" / "checkpoints")[-1]
        state = AutoModelForSequenceClassification.from_pretrained(last).state_dict()
        assert all(value.isfinite().all() for name, value in state.items() if "embed" not in name)


def test_neither_clock_jumps_nor_a_damaged_checkpoint_change_the_result(unfinished, tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    assert steps(tmp_path / "run") == [2, 4, 6, 8]
    for step, year in ((2, 2100), (4, 2050), (6, 2001), (8, 1971)):
        stamp = (year - 1970) * 365.25 * 86400
        os.utime(checkpoints / f"checkpoint-{step}", (stamp, stamp))
    expected = file_digest(tmp_path / "run" / "model.safetensors")
    os.truncate(checkpoints / "checkpoint-8" / "model.safetensors", 100)
    again = train(dataclasses.replace(unfinished, save_total_limit=2))
    assert again["resumed_from_step"] == 6
    assert steps(tmp_path / "run") == [6, 8]
    assert file_digest(tmp_path / "run" / "model.safetensors") == expected


@pytest.mark.parametrize("damage", ["truncated", "missing", "no list", "list of nonsense"])
def test_a_damaged_checkpoint_is_removed(unfinished, tmp_path, caplog, damage):
    newest = tmp_path / "run" / "checkpoints" / "checkpoint-8"
    if damage == "truncated":
        os.truncate(newest / "model.safetensors", 100)
    elif damage == "missing":
        (newest / "optimizer.pt").unlink()
    elif damage == "no list":
        (newest / "complete.json").unlink()
    else:
        (newest / "complete.json").write_text("[1, 2]")
    discard_incomplete(tmp_path / "run")
    assert "checkpoint-8 is incomplete" in caplog.text
    assert not newest.exists() and steps(tmp_path / "run") == [2, 4, 6]


def test_another_backbone_or_library_is_noticed(settings, causal_lm_dir, tmp_path, caplog):
    folder = shutil.copytree(causal_lm_dir("llama"), tmp_path / "backbone")
    config = dataclasses.replace(settings, model=str(folder))
    train(config)
    (tmp_path / "run" / "train_result.json").unlink()
    record = tmp_path / "run" / "checkpoints" / "run.json"
    run = json.loads(record.read_text())
    run["versions"]["torch"] = "1.0"
    record.write_text(json.dumps(run))
    train(config)
    assert "torch was 1.0 before the interruption" in caplog.text
    (tmp_path / "run" / "train_result.json").unlink()
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[-1, -1] += 1
    model.save_pretrained(folder)
    with pytest.raises(InputError, match="the content of model"):
        train(config)


def test_the_rest_of_the_folder_is_left_alone(unfinished, tmp_path):
    (tmp_path / "run" / "notes.txt").write_text("mine")
    train(dataclasses.replace(unfinished, overwrite=True, max_steps=1))
    assert Path(tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert not list((tmp_path / "run").rglob(".discarded*"))
