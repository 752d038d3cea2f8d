"""Rankings, scored responses and pairs on two CPU processes: as on one with the same global batch."""

import json

import pytest
import torch

from inform_rm.training.reward_arguments import arguments_from_mapping
from inform_rm.training.run import train

pytestmark = pytest.mark.distributed

CASES = {
    "packed": {"architecture": "inform"},
    "plackett-luce": {"ranking_loss": "plackett_luce", "batching": "padded"},
    # 29 rows in global batches of 8: in the last step of an epoch one process has 4 real rows and the other 1.
    "uneven": {"max_steps": -1, "num_train_epochs": 2},
}
COMPARED = ("loss", "grad_norm", "accuracy", "margin", "kendall_tau", "rmse", "reward_std", "num_pairs", "num_prompts",
            "num_scored", "bradley_terry_loss")  # fmt: skip


def files(tmp_path, pairs_file):
    rankings = [
        {"prompt": f"Count to {n}.", "responses": [f"{'one ' * (1 + k)}{n}" for k in range(2 + n % 3)],
         "ranks": [1 + (k + n) % (2 + n % 3) for k in range(2 + n % 3)]}
        for n in range(11)
    ]  # fmt: skip
    scored = [{"prompt": f"Count to {n}.", "response": "one " * (n % 4 + 1), "score": n % 3} for n in range(9)]
    names = []
    for name, rows in (("rankings", rankings), ("scored", scored)):
        names.append(tmp_path / f"{name}.jsonl")
        names[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [pairs_file(9), *map(str, names)]


def test_two_processes_learn_from_groups_as_one(settings, pairs_file, launcher, tmp_path, monkeypatch):
    data = files(tmp_path, pairs_file)

    def made(processes):
        return [
            settings(
                **{**case, "data": data, "eval_data": data, "eval_steps": 2}, output_dir=f"{processes}-{name}",
                per_device_train_batch_size=8 // processes, per_device_eval_batch_size=6 // processes,
            )
            for name, case in CASES.items()
        ]  # fmt: skip

    out, _ = launcher.train_all(made(2), "ddp", launcher.no_noise_patch)
    assert "REFUSED" not in out, out
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    for name, setting in zip(CASES, made(1), strict=True):
        one = train(arguments_from_mapping(setting, "test"))
        two = json.loads((tmp_path / f"2-{name}" / "train_result.json").read_text())
        assert two["num_processes"] == 2
        for quantity in (*COMPARED, *(f"eval_{quantity}" for quantity in COMPARED)):
            first, second = (
                [line[quantity] for line in result["log_history"] if quantity in line] for result in (one, two)
            )
            assert second == pytest.approx(first, abs=1e-5, rel=1e-6), (name, quantity)
            assert first or quantity in ("num_pairs", "num_prompts", "num_scored", "bradley_terry_loss",
                                         "eval_loss", "eval_grad_norm"), quantity  # fmt: skip
        assert two["evaluation"]["num_scored"] == 9
