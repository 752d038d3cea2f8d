"""The reward function and the check work in real TRL runs of a tiny policy, and say what the functions behind say."""

import json
from collections import defaultdict
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from datasets import Dataset

from inform_rm import InfoRMConfig, InfoRMForSequenceClassification
from inform_rm.errors import InputError
from inform_rm.eval.detection.early_stopping import CSIEarlyStopping
from inform_rm.eval.detection.latents import collect_latents
from inform_rm.eval.detection.nearest_neighbours import fit_nearest_neighbours
from inform_rm.eval.detection.outliers import fit_mahalanobis
from inform_rm.eval.detection.settings import DetectionSettings
from inform_rm.eval.detection.statistic import Statistic
from inform_rm.eval.outliers import cluster_separation_index, mahalanobis_outlier_probability
from inform_rm.integrations.trl import OveroptimizationCallback, RewardFunction
from inform_rm.scoring.scorer import RewardScorer

PROMPTS = [f"{number} red apples" for number in range(12)]
REFERENCE = [(prompt, f"So {prompt} it is" + " then" * (number % 4)) for number, prompt in enumerate(PROMPTS * 3)]


@pytest.fixture(scope="module")
def scorer(backbone_configs, tokenizer):
    torch.manual_seed(1)
    model = InfoRMForSequenceClassification(InfoRMConfig(text_config=backbone_configs["llama"], latent_dim=6))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return RewardScorer(model.eval(), tokenizer)


@pytest.fixture(scope="module")
def reference(scorer):
    return collect_latents(scorer, [prompt for prompt, _ in REFERENCE], [text for _, text in REFERENCE]).values


@pytest.mark.parametrize("squared", (False, True))
def test_shaped_rewards_are_the_formula(scorer, reference, squared):
    function = RewardFunction(scorer, reference=reference, shaping_coefficient=0.25, squared=squared, alpha=0.1)
    logged = {}
    texts = ["one apple", "two", "red " * 7]
    rewards = function(PROMPTS[:3], texts, log_metric=logged.__setitem__, trainer_state=None, completion_ids=None)
    plain = scorer.score(PROMPTS[:3], texts).double().numpy()
    found = collect_latents(scorer, PROMPTS[:3], texts)
    distances = np.sqrt(fit_mahalanobis(reference).squared_distances(found.values))
    assert rewards == pytest.approx((plain - 0.25 * (distances**2 if squared else distances)).tolist(), abs=1e-5)
    assert logged["unshaped_reward"] == pytest.approx(plain.mean(), abs=1e-6)
    assert logged["mahalanobis_distance"] == pytest.approx(distances.mean())
    mop = mahalanobis_outlier_probability(found.values, reference, alpha=0.1, tail="reference")
    assert logged["mop"] == mop
    assert function.recent() == (PROMPTS[:3], texts) and function.recent() == ([], [])


def test_plain_rewards_of_text_and_of_messages(scorer):
    function = RewardFunction(scorer, keep=2)
    expected = scorer.score(PROMPTS[:3], ["a", "b", "c"]).tolist()
    assert function(PROMPTS[:3], ["a", "b", "c"]) == pytest.approx(expected, abs=1e-6)
    messages = [[{"role": "user", "content": prompt}] for prompt in PROMPTS[:3]]
    replies = [[{"role": "assistant", "content": text}] for text in "abc"]
    assert function(messages, replies) == pytest.approx(expected, abs=1e-6)
    assert function.recent() == (messages[1:], ["b", "c"])
    for several in (
        [{"role": "assistant", "content": "", "tool_calls": [{}]}, {"role": "tool", "content": "42"}],
        [{"role": "assistant", "content": None, "tool_calls": [{}]}],
        [{"role": "assistant", "content": [{"type": "image"}]}],
    ):  # of which the last message alone is not what the policy wrote
        with pytest.raises(InputError, match=r"completions: .*expected text, or one message"):
            function(messages[:1], [several])
    with pytest.raises(InputError, match=r"shaping_coefficient: 0\.1 needs reference"):
        RewardFunction(scorer, shaping_coefficient=0.1)


def policy_trainer(algorithm, folder, output, function, steps, **settings):
    trl = pytest.importorskip("trl", reason="TRL is an optional extra: pip install 'inform-rm[rl]'")
    arguments = getattr(trl, f"{algorithm}Config")(
        str(output), use_cpu=True, bf16=False, max_steps=steps, logging_steps=1, num_generations=4,
        per_device_train_batch_size=8, max_completion_length=6, report_to="none", disable_tqdm=True, seed=0,
        learning_rate=1e-3, **settings,
    )  # fmt: skip
    dataset = Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS * 2])
    return getattr(trl, f"{algorithm}Trainer")(
        str(folder), reward_funcs=function, args=arguments, train_dataset=dataset
    )


class Recorder(RewardFunction):
    """Remembers what the check was given."""

    def recent(self):
        taken = super().recent()
        self.seen.append(taken)
        return taken


@pytest.mark.parametrize("algorithm", ("GRPO", pytest.param("RLOO", marks=pytest.mark.slow)))
def test_policy_run_with_checks(algorithm, scorer, reference, causal_lm_dir, tmp_path):
    function = Recorder(scorer, reference=reference, shaping_coefficient=0.1, alpha=0.1)
    function.seen = []
    trainer = policy_trainer(algorithm, causal_lm_dir("llama"), tmp_path / "out", function, 4, save_strategy="no")
    settings = {"eps": 0.8, "alpha": 0.1}
    callback = OveroptimizationCallback(scorer, reference, function.recent, every=2, action="warn", **settings)
    callback.attach(trainer)
    trainer.train()
    history = trainer.state.log_history
    lines = [line for line in history if "csi" in line]
    assert [line["step"] for line in lines] == [2, 4] and len(function.seen) == 2
    rule = CSIEarlyStopping()
    for line, (prompts, texts) in zip(lines, function.seen, strict=True):
        assert len(texts) == 16
        found = collect_latents(scorer, prompts, texts)
        csi = cluster_separation_index(found.values, reference, eps=0.8)
        assert line["csi"] == pytest.approx(csi) and line["csi_normalized"] == pytest.approx(csi / 16)
        mop = mahalanobis_outlier_probability(found.values, reference, alpha=0.1, tail="reference")
        assert line["mop"] == mop
        near = fit_nearest_neighbours(reference, DetectionSettings(**settings))(found.values, 0)[0]
        assert line["knn_outliers"] == near["knn_outliers"]
        assert line["mean_knn_distance"] == pytest.approx(near["mean_knn_distance"])
        assert line["sampled_reward"] == pytest.approx(found.rewards.mean(), abs=1e-6)
        assert line["sampled_words"] == pytest.approx(np.mean([len(text.split()) for text in texts]))
        rule.update(line["csi_normalized"])
    assert callback.stopping.state_dict() == rule.state_dict()
    # TRL's own lines are as they would be without the check, the reward function's metrics among them.
    own = [line for line in history if "reward" in line]
    assert [line["step"] for line in own] == [1, 2, 3, 4]
    for line in own:
        assert line["reward"] == pytest.approx(line["unshaped_reward"] - 0.1 * line["mahalanobis_distance"], abs=1e-5)


def test_a_jump_stops_the_run_and_a_resumed_run_decides_alike(scorer, reference, causal_lm_dir, tmp_path, monkeypatch):
    planted = iter([1.0, 1.1, 1.0, 9.0, 9.0])
    statistic = Statistic("csi_normalized", "", "", "", lambda *_: lambda *_: ({"csi_normalized": next(planted)}, {}))
    monkeypatch.setattr("inform_rm.integrations.trl.STATISTICS", [statistic])
    settings = {"save_strategy": "steps", "save_steps": 1}

    def trainer(steps):
        function = RewardFunction(scorer)
        made = policy_trainer("GRPO", causal_lm_dir("llama"), tmp_path / "out", function, steps, **settings)
        callback = OveroptimizationCallback(scorer, reference, function.recent, every=1)
        callback.attach(made)
        return made, callback

    first, _ = trainer(2)
    first.train()
    saved = json.loads((tmp_path / "out" / "checkpoint-2" / "overoptimization_state.json").read_text())
    second, callback = trainer(6)
    second.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert second.state.global_step == 4  # 1.0 -> 9.0 is more than ten times the mean change of 0.1
    by_hand = CSIEarlyStopping()
    for value in (1.0, 1.1):
        by_hand.update(value)
    assert saved == by_hand.state_dict()
    assert [by_hand.update(value) for value in (1.0, 9.0)] == [False, True]
    assert callback.stopping.state_dict() == by_hand.state_dict()


def test_a_second_model_whose_reward_falls_stops_the_run_and_a_resumed_run_decides_alike(
    scorer, reference, causal_lm_dir, tmp_path, monkeypatch, caplog
):
    """A planted reward: 1, 3, 2.95, then 1.5, which has lost more than a tenth of the gain of 2."""
    given, planted = [], iter([1.0, 3.0, 2.95, 1.5, 1.5])
    jumps = Statistic("csi_normalized", "", "", "", lambda *_: lambda *_: ({"csi_normalized": next(csi)}, {}))
    csi = iter([1.0, 1.1, 9.0, 9.0, 9.0])  # a jump at step 3: a warning beside a second model
    monkeypatch.setattr("inform_rm.integrations.trl.STATISTICS", [jumps])

    class Second:
        def score(self, prompts, responses):
            given.append(responses)
            return torch.full((len(responses),), next(planted))

    def trainer(steps):
        function = Recorder(scorer)
        function.seen = []
        made = policy_trainer(
            "GRPO", causal_lm_dir("llama"), tmp_path / "out", function, steps, save_strategy="steps", save_steps=1
        )
        callback = OveroptimizationCallback(
            scorer, reference, function.recent, every=1, second_scorer=Second(), max_reward_fall=0.1
        )
        callback.attach(made)
        return made, function

    first, function = trainer(2)
    first.train()
    assert given == [texts for _, texts in function.seen] and len(given) == 2
    lines = [line["second_reward"] for line in first.state.log_history if "second_reward" in line]
    assert lines == [1.0, 3.0]
    second, _ = trainer(6)
    second.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert second.state.global_step == 4
    assert "CSI jumped to 9" in caplog.text and "Step 4: the second model's reward fell to 1.5" in caplog.text


def test_wrong_settings_are_named(scorer, reference):
    with pytest.raises(InputError, match="every: 0"):
        OveroptimizationCallback(scorer, reference, lambda: ([], []), every=0)
    with pytest.raises(InputError, match="action: 'halt'"):
        OveroptimizationCallback(scorer, reference, lambda: ([], []), action="halt")


def test_trl_trains_an_inform_model_without_its_kl_term(scorer):
    """As the model card says: its trainer computes Bradley-Terry from the rewards alone."""
    trl = pytest.importorskip("trl", reason="TRL is an optional extra: pip install 'inform-rm[rl]'")
    model = scorer.model
    trainer = MagicMock(model=model, _total_train_tokens=0, _tp_size=1)
    trainer.args.center_rewards_coefficient = None
    trainer.accelerator.gather = trainer.accelerator.gather_for_metrics = lambda values: values
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    tokens = torch.randint(3, 300, (4, 5), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    with torch.no_grad():
        loss = trl.RewardTrainer.compute_loss(trainer, model, dict(inputs))
        own = model(**inputs, return_loss=True)
    kl_term = 2 * model.config.beta * own.kl.mean()
    assert kl_term > 0.01
    torch.testing.assert_close(loss, own.loss - kl_term)
