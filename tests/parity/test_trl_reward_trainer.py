"""TRL's RewardTrainer: it trains an InfoRM folder as it is, and our trainer repeats its loss curve."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

pytest.importorskip("trl", reason="TRL is an optional extra: pip install 'inform-rm[rl]'")

STEPS = 20
PAIRS_PER_STEP = 4

TRAIN_WITH_TRL = """
    import json
    from pathlib import Path

    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    folder, data, output = sys.argv[1:]
    rows = json.loads(Path(data).read_text())
    # Everything that is not said here is TRL's default, gradient checkpointing among it.
    arguments = RewardConfig(
        output, trust_remote_code=True, use_cpu=True, bf16=False, learning_rate=3e-3, num_train_epochs=8,
        logging_steps=8, per_device_train_batch_size=8, save_strategy="epoch", save_total_limit=1, report_to="none",
        disable_tqdm=True, seed=0,
    )
    trainer = RewardTrainer(
        folder, args=arguments, train_dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(rows)
    )
    assert type(trainer.model).__module__.startswith("transformers_modules."), type(trainer.model)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    after = trainer.model.state_dict()
    checkpoint = sorted(Path(output).glob("checkpoint-*"))[-1]
    reloaded, loading = AutoModelForSequenceClassification.from_pretrained(
        checkpoint, trust_remote_code=True, output_loading_info=True
    )
    Path(output, "found.json").write_text(json.dumps({
        "accuracy": trainer.evaluate()["eval_accuracy"],
        "unchanged": [name for name in before if torch.equal(before[name], after[name])],
        "loading_faults": sum(len(keys) for keys in loading.values()),
        "reloaded_differs": [
            name for name, tensor in reloaded.state_dict().items() if not torch.equal(tensor, after[name])
        ],
        "logged": [row for row in trainer.state.log_history if "loss" in row],
    }))
"""


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["inform", "standard"])
def test_reward_trainer_trains_a_folder_by_path(
    architecture, save_reward_model, preference_rows, run_without_package, tmp_path
):
    data, output = tmp_path / "pairs.json", tmp_path / "trl"
    data.write_text(json.dumps(preference_rows))
    run_without_package(TRAIN_WITH_TRL, save_reward_model(architecture), data, output)
    found = json.loads((output / "found.json").read_text())

    # Backbone and head both learn; a constant added to all rewards changes no pair, so the last bias has no gradient.
    assert found["unchanged"] == (["score.decoder.2.bias"] if architecture == "inform" else [])
    assert found["accuracy"] > 0.9
    assert found["logged"][-1]["loss"] < 0.5 * found["logged"][0]["loss"]
    assert found["loading_faults"] == 0
    assert found["reloaded_differs"] == []


def test_standard_architecture_repeats_the_loss_curve_of_trl(save_reward_model, preference_rows, tokenizer, tmp_path):
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    from inform_rm.training.collators import PairCollator
    from inform_rm.training.reward_arguments import RewardTrainingArguments
    from inform_rm.training.trainer import RewardTrainer as OurRewardTrainer

    folder = save_reward_model("standard")
    end = tokenizer.eos_token
    pairs = [
        {side: tokenizer(row["prompt"] + row[side] + end)["input_ids"] for side in ("chosen", "rejected")}
        | {"margin": index % 3 / 2}
        for index, row in enumerate(preference_rows)
    ]
    settings = {
        "use_cpu": True,
        "bf16": False,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "max_steps": STEPS,
        "per_device_train_batch_size": PAIRS_PER_STEP,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 11,
    }

    def losses(trainer) -> torch.Tensor:
        trainer.train()
        curve = torch.tensor([row["loss"] for row in trainer.state.log_history if "loss" in row], dtype=torch.float64)
        assert curve.shape == (STEPS,)
        return curve

    theirs = losses(
        RewardTrainer(
            model=AutoModelForSequenceClassification.from_pretrained(folder),
            args=RewardConfig(str(tmp_path / "theirs"), max_length=None, **settings),
            train_dataset=Dataset.from_list(
                [{"chosen_ids": p["chosen"], "rejected_ids": p["rejected"], "margin": p["margin"]} for p in pairs]
            ),
            processing_class=tokenizer,
        )
    )
    ours = losses(
        OurRewardTrainer(
            model=AutoModelForSequenceClassification.from_pretrained(folder),
            args=RewardTrainingArguments(str(Path(tmp_path) / "ours"), **settings),
            train_dataset=Dataset.from_list(
                [
                    {
                        "chosen_input_ids": p["chosen"],
                        "rejected_input_ids": p["rejected"],
                        "margin": p["margin"],
                        "id": str(number),
                    }
                    for number, p in enumerate(pairs)
                ]
            ),
            data_collator=PairCollator(tokenizer),
            processing_class=tokenizer,
        )
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert theirs[-1] < 0.7 * theirs[0]  # a curve, not a line that anything would match
