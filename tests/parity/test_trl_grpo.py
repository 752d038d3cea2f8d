"""TRL's reinforcement learning takes an InfoRM folder as reward model, by path and without this package."""

import json

import pytest

pytest.importorskip("trl", reason="TRL is an optional extra: pip install 'inform-rm[rl]'")
pytestmark = pytest.mark.slow

TRAIN_POLICY = """
    import json
    from pathlib import Path

    import trl
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    algorithm, policy, reward_model, output = sys.argv[1:]
    arguments = getattr(trl, f"{algorithm}Config")(
        output, trust_remote_code=True, use_cpu=True, bf16=False, max_steps=2, logging_steps=1, num_generations=4,
        per_device_train_batch_size=8, max_completion_length=6, save_strategy="no", report_to="none",
        disable_tqdm=True, log_completions=False, seed=0, learning_rate=1e-3,
    )
    trainer = getattr(trl, f"{algorithm}Trainer")(
        policy, reward_funcs=reward_model, args=arguments,
        train_dataset=Dataset.from_list([{"prompt": f"{index} red apples"} for index in range(16)]),
    )
    (taken,) = trainer.reward_funcs
    assert type(taken).__module__.startswith("transformers_modules."), type(taken)

    # What TRL passed in and what it made of the answer, seen at the model's own forward.
    calls = []
    taken.register_forward_hook(
        lambda module, arguments, keywords, result: calls.append((keywords, result.logits)), with_kwargs=True
    )
    trainer.train()

    reference = AutoModelForSequenceClassification.from_pretrained(reward_model, trust_remote_code=True)
    largest_difference = 0.0
    for keywords, logits in calls:
        for ids, mask, reward in zip(keywords["input_ids"], keywords["attention_mask"], logits[:, 0]):
            alone = reference(input_ids=ids[mask.bool()][None]).logits[0, 0]
            largest_difference = max(largest_difference, abs(alone - reward).item())
    logged = [row for row in trainer.state.log_history if "reward" in row]
    Path(output, "found.json").write_text(json.dumps({
        "steps": trainer.state.global_step,
        "mean_rewards": [row["reward"] for row in logged],
        "expected_mean_rewards": [logits.mean().item() for _, logits in calls],
        "largest_difference_to_batch_of_one": largest_difference,
        "grad_norms": [row["grad_norm"] for row in logged],
    }))
"""


@pytest.mark.parametrize(("algorithm", "architecture"), [("GRPO", "inform"), ("RLOO", "standard")])
def test_policy_trains_on_the_rewards_of_a_folder(
    algorithm, architecture, save_reward_model, run_without_package, causal_lm_dir, tmp_path
):
    output = tmp_path / "output"
    run_without_package(TRAIN_POLICY, algorithm, causal_lm_dir("llama"), save_reward_model(architecture), output)
    found = json.loads((output / "found.json").read_text())

    assert found["steps"] == 2
    assert found["mean_rewards"] == pytest.approx(found["expected_mean_rewards"], abs=1e-5)
    assert found["largest_difference_to_batch_of_one"] < 1e-5
    assert all(norm > 0 for norm in found["grad_norms"])
