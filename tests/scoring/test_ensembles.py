"""Averaged weights are a model like any other, without a common start they are refused; ensembles score as by hand."""

import copy
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification

from inform_rm import InfoRMForSequenceClassification, decompose, evaluate
from inform_rm.data.encoding import encode
from inform_rm.data.tokenizer import load_tokenizer
from inform_rm.errors import InputError
from inform_rm.hub.averaging import average_weights
from inform_rm.scoring.ensembles import EnsembleScorer
from inform_rm.scoring.score_files import score_file
from inform_rm.scoring.scorer import NonFiniteRewardError, RewardScorer

PROMPTS = ["Name a colour.", "How many apples are there?", "Name a colour.", "Is the sky blue?", "Sea?"]
RESPONSES = ["Red.", "There are seven apples in the basket.", "Blue, I think.", "Yes", "The sea is calm today." * 3]
PAIRS = [
    {"prompt": prompt, "chosen": response, "rejected": f"No{'!' * row}", "id": str(row)}
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True))
]


def save(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def with_noise(start, seed):
    """A model "trained" from ``start``: every weight moved by some hundredths."""
    model = copy.deepcopy(start)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def start(causal_lm_dir):
    """``start(architecture, seed)``: rewards of order 1; the seed decides backbone and head."""

    def make(architecture="inform", seed=0, **settings):
        torch.manual_seed(seed)
        model = InfoRMForSequenceClassification.from_backbone(
            str(causal_lm_dir("llama")),
            architecture=architecture,
            latent_dim=settings.pop("latent_dim", 8),
            **settings,
        )
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
        return model.eval()

    return make


@pytest.fixture(scope="module")
def members(start, tokenizer, tmp_path_factory):
    """Folders of three InfoRM models from one start; read-only."""
    base = start()
    root = tmp_path_factory.mktemp("members")
    return [save(with_noise(base, seed), tokenizer, root / str(seed)) for seed in range(3)]


@pytest.fixture(scope="module")
def mixed(start, tokenizer):
    """Read-only: scorers of a standard model, an InfoRM model and a Llama classifier that share the tokenizer."""
    torch.manual_seed(7)
    config = copy.deepcopy(start().config.text_config)
    config.num_labels = 1
    llama = LlamaForSequenceClassification(config).float().eval()
    for parameter in llama.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return [
        RewardScorer(start("standard", 1), tokenizer),
        RewardScorer(start("inform", 2), tokenizer, batching="padded"),
        RewardScorer(llama, tokenizer, tokens_per_batch=30),
    ]


def rewards_by_hand(scorers, prompts, responses, coefficient, offsets=None):
    """``mean - coefficient * population variance`` in numpy, every row alone through the bare models."""
    rows = [encode(scorers[0].tokenizer, *row).input_ids for row in zip(prompts, responses, strict=True)]
    with torch.no_grad():
        found = [[scorer.model(input_ids=torch.tensor([ids])).logits.item() for ids in rows] for scorer in scorers]
    found = np.array(found) - np.zeros(len(scorers))[:, None] - np.array(offsets or [0.0] * len(scorers))[:, None]
    return found.mean(axis=0) - coefficient * found.var(axis=0), found.std(axis=0)


def write_pairs(path):
    path.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS), encoding="utf-8")
    return path


# --- averaged weights


def test_average_is_the_mean_of_the_state_dicts_and_a_complete_folder(members, tmp_path):
    result = average_weights(members, tmp_path / "mean", progress=False)
    states = [load_file(member / "model.safetensors") for member in members]
    mean = load_file(tmp_path / "mean" / "model.safetensors")
    assert mean.keys() == states[0].keys()
    for key, value in mean.items():
        expected = torch.stack([state[key] for state in states]).double().mean(dim=0).float()
        torch.testing.assert_close(value, expected, atol=0, rtol=0)
    assert not torch.equal(mean["score.encoder.weight"], states[0]["score.encoder.weight"])

    by_hand = copy.deepcopy(AutoModelForSequenceClassification.from_pretrained(members[0]))
    by_hand.load_state_dict({key: sum(state[key] for state in states) / 3 for key in mean})
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "mean", trust_remote_code=True)
    tokenizer = load_tokenizer(tmp_path / "mean")
    rewards = [RewardScorer(model.eval(), tokenizer).score(PROMPTS, RESPONSES) for model in (loaded, by_hand)]
    assert rewards[0].std() > 0.01
    torch.testing.assert_close(*rewards, atol=1e-5, rtol=0)

    config = json.loads((tmp_path / "mean" / "config.json").read_text())
    assert "AutoModelForSequenceClassification" in config["auto_map"]
    assert (tmp_path / "mean" / "modeling_inform.py").is_file()
    assert "3 reward models" in (tmp_path / "mean" / "README.md").read_text()
    assert json.loads((tmp_path / "mean" / "average_result.json").read_text()) == result
    assert 0.9 < result["backbone_cosine"] < 1 and 0.9 < result["head_cosine"] < 1


@pytest.mark.parametrize(("dtype", "number"), [(torch.float32, 2), (torch.bfloat16, 7)])
def test_average_of_a_model_with_itself_is_the_model(start, tokenizer, tmp_path, dtype, number):
    member = save(start().to(dtype), tokenizer, tmp_path / "member")
    average_weights([member] * number, tmp_path / "mean", progress=False)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("member", "mean"))
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert after[key].dtype == value.dtype and torch.equal(after[key], value)


def test_models_that_differ_in_a_linear_head_average_to_the_mean_of_their_rewards(start, tokenizer, tmp_path):
    base = start("standard")
    folders = []
    for seed in range(3):
        model = copy.deepcopy(base)
        torch.manual_seed(seed)
        torch.nn.init.normal_(model.score.weight)  # heads that share nothing: a linear one may
        folders.append(save(model, tokenizer, tmp_path / str(seed)))
    result = average_weights(folders, tmp_path / "mean", progress=False)
    assert result["head_cosine"] is None and result["backbone_cosine"] == pytest.approx(1)
    rewards = [RewardScorer(folder).score(PROMPTS, RESPONSES) for folder in folders]
    assert (rewards[0] - rewards[1]).abs().max() > 0.1
    averaged = RewardScorer(tmp_path / "mean").score(PROMPTS, RESPONSES)
    torch.testing.assert_close(averaged, torch.stack(rewards).mean(dim=0), atol=1e-5, rtol=0)


def test_sharded_members_of_another_architecture_keep_their_layout(mixed, tokenizer, tmp_path):
    folders = []
    for seed in range(2):
        with_noise(mixed[2].model, seed).save_pretrained(
            tmp_path / str(seed), max_shard_size=40_000 if seed else "5GB"
        )
        tokenizer.save_pretrained(tmp_path / str(seed))
        folders.append(tmp_path / str(seed))
    models = [AutoModelForSequenceClassification.from_pretrained(folder) for folder in folders]
    assert len(list(folders[1].glob("*.safetensors"))) > 2
    for order in (folders, folders[::-1]):
        output = tmp_path / f"mean-{order[0].name}"
        average_weights(order, output, progress=False)
        assert {path.name for path in output.glob("*.safetensors*")} == {
            path.name for path in order[0].glob("*.safetensors*")
        }
        state = RewardScorer(output).model.state_dict()
        for key, value in models[0].state_dict().items():
            torch.testing.assert_close(state[key], (value + models[1].state_dict()[key]) / 2, atol=1e-6, rtol=0)


def refused(members, output, match, **options):
    with pytest.raises(InputError, match=match):
        average_weights(members, output, progress=False, **options)
    assert not output.exists()
    assert not [path for path in output.parent.iterdir() if path.name.startswith(".")]


def test_members_without_a_common_start_are_refused_unless_the_caller_knows_better(
    start, members, tokenizer, tmp_path
):
    other = save(start(seed=1), tokenizer, tmp_path / "other")
    refused([*members, other], tmp_path / "mean", "the backbones of .* do not share a start.* -?0.0")
    average_weights([*members, other], tmp_path / "mean", same_start=True, progress=False)

    base = start()
    fresh_head = copy.deepcopy(base)
    for name, parameter in fresh_head.score.named_parameters():
        if name.endswith("weight"):
            torch.nn.init.normal_(parameter, std=0.3)
    folders = [save(model, tokenizer, tmp_path / name) for name, model in (("base", base), ("fresh", fresh_head))]
    refused(folders, tmp_path / "mean2", "the heads of .* do not share a start.*one saved head")


def test_records_that_name_different_starts_are_refused(members, tmp_path):
    copies = [shutil.copytree(member, tmp_path / f"copy-{member.name}") for member in members]

    def record(number, **settings):
        (copies[number] / "train_result.json").write_text(json.dumps({"settings": settings}))

    record(0, model="some/backbone", revision=None)
    record(1, model="some/backbone", revision="v2")
    refused(copies, tmp_path / "mean", "copy-0 from some/backbone; .*copy-1 from some/backbone at v2.*same_start=True")
    average_weights(copies, tmp_path / "mean", same_start=True, progress=False)
    record(1, model="some/backbone", revision=None)
    average_weights(copies, tmp_path / "mean2", progress=False)
    (copies[2] / "train_result.json").write_text("{}")
    refused(copies, tmp_path / "mean3", "train_result.json is damaged")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"architecture": "standard"}, "architecture is 'standard', not 'inform'"),
        ({"latent_dim": 16}, "latent_dim is 16, not 8"),
        ({"decoder": "linear"}, "latent_decoder is 'linear', not 'mlp'"),
        ({"kl_reduction": "averaged_moments"}, "kl_reduction is 'averaged_moments'"),
    ],
)
def test_members_of_another_kind_are_refused(start, members, tokenizer, tmp_path, change, match):
    other = save(start(**change), tokenizer, tmp_path / "other")
    refused([members[0], other], tmp_path / "mean", match)


def test_another_beta_is_no_other_kind(start, tokenizer, tmp_path):
    folders = [save(start(beta=beta), tokenizer, tmp_path / str(beta)) for beta in (0.1, 0.01)]
    average_weights(folders, tmp_path / "mean", progress=False)


def test_other_backbones_settings_tensors_and_tokenizers_are_refused(mixed, members, tokenizer, tmp_path):
    llama = save(mixed[2].model, tokenizer, tmp_path / "llama")
    refused([members[0], llama], tmp_path / "mean", "model_type is 'llama', not 'inform'")

    def edited(name):
        return shutil.copytree(members[1], tmp_path / name)

    config = json.loads((folder := edited("epsilon")).joinpath("config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 0.1  # same shapes, other rewards
    (folder / "config.json").write_text(json.dumps(config))
    refused([members[0], folder], tmp_path / "mean", "text_config.rms_norm_eps is 0.1, not 1e-06")

    weights = load_file(members[1] / "model.safetensors")
    half = {key: value.half() for key, value in weights.items()}
    for name, tensors, match in (
        ("half", half, "differ .*is F16 .*, not F32"),
        ("missing", {key: value for key, value in weights.items() if "encoder.bias" not in key}, "absent"),
        (
            "nan",
            {**weights, "model.norm.weight": torch.full((32,), torch.nan)},
            "model.norm.weight of .*nan holds NaN",
        ),
    ):
        save_file(tensors, (folder := edited(name)) / "model.safetensors", metadata={"format": "pt"})
        refused([members[0], folder], tmp_path / "mean", match)

    other = copy.deepcopy(tokenizer)
    other.chat_template = other.chat_template.replace("<|", "<| ")
    other.save_pretrained(folder := edited("template"))
    refused([members[0], folder], tmp_path / "mean", "another tokenizer or chat template")


def test_what_is_no_list_of_reward_models_is_refused(members, causal_lm_dir, tmp_path):
    refused(members[:1], tmp_path / "mean", "at least two folders")
    refused(members[0], tmp_path / "mean", "at least two folders")
    refused([causal_lm_dir("llama")] * 2, tmp_path / "mean", "not a reward model|not complete")
    refused([members[0], tmp_path / "absent"], tmp_path / "mean", "absent has no config.json")
    torn = shutil.copytree(members[1], tmp_path / "torn")
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:500])
    refused([members[0], torn], tmp_path / "mean", "cannot read the weights of .*torn")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="exists and is not an empty folder"):
        average_weights(members, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]


# --- combined rewards


@pytest.mark.parametrize(("coefficient", "offsets"), [(0.0, None), (0.7, [1.0, -2.0, 0.5])])
def test_ensemble_reward_is_mean_minus_coefficient_times_population_variance(mixed, coefficient, offsets):
    expected, expected_std = rewards_by_hand(mixed, PROMPTS, RESPONSES, coefficient, offsets)
    scorer = EnsembleScorer(mixed, coefficient=coefficient, offsets=offsets)
    before = sum(member.tokens_computed for member in mixed)
    rewards, stds = scorer.score(PROMPTS, RESPONSES, uncertainty=3)
    assert expected_std.min() > 0.01
    np.testing.assert_allclose(rewards, expected, atol=2e-5)
    np.testing.assert_allclose(stds, expected_std, atol=2e-5)
    assert scorer.tokens_computed == sum(member.tokens_computed for member in mixed) - before


def test_offsets_from_member_rewards_take_out_each_members_constant(start, tokenizer):
    one = start("inform", 1)
    shifted = copy.deepcopy(one)
    with torch.no_grad():
        shifted.score.decoder[-1].bias += 5.0
    scorer = EnsembleScorer([one, shifted], coefficient=1.0, tokenizer=tokenizer)
    torch.testing.assert_close(scorer.score(["Hi"], ["Red."]), scorer.member_rewards(["Hi"], ["Red."])[0] + 2.5 - 6.25)
    offsets = scorer.member_rewards(PROMPTS, RESPONSES).mean(dim=1).tolist()
    centred = EnsembleScorer(scorer.members, coefficient=1.0, offsets=offsets)
    rewards, stds = centred.score(PROMPTS, RESPONSES, uncertainty=2)
    assert stds.max() < 1e-4 and abs(rewards.mean()) < 1e-4


def test_ensemble_rewards_do_not_depend_on_batches(mixed):
    scorer = EnsembleScorer(mixed, coefficient=0.5)
    alone = torch.cat([scorer.score([x], [y]) for x, y in zip(PROMPTS, RESPONSES, strict=True)])
    for tokens_per_batch in (1, 40, 10_000):
        scorer.tokens_per_batch = tokens_per_batch
        order = [3, 1, 4, 0, 2]
        rewards = scorer.score([PROMPTS[row] for row in order], [RESPONSES[row] for row in order])
        torch.testing.assert_close(rewards, alone[order], atol=2e-5, rtol=0)


def test_evaluate_and_decompose_take_an_ensemble_as_one_reward_model(mixed, tmp_path):
    data = write_pairs(tmp_path / "pairs.jsonl")
    scorer = EnsembleScorer(mixed, coefficient=0.3)
    result = evaluate(scorer, data, tmp_path / "evaluation", progress=False)
    written = [json.loads(line) for line in (tmp_path / "evaluation" / "pairs.jsonl").read_text().splitlines()]
    for side in ("chosen", "rejected"):
        expected, _ = rewards_by_hand(mixed, PROMPTS, [pair[side] for pair in PAIRS], 0.3)
        np.testing.assert_allclose([row[f"{side}_reward"] for row in written], expected, atol=2e-5)
    gaps = np.array([row["chosen_reward"] - row["rejected_reward"] for row in written])
    assert result.accuracy == (gaps > 0).mean() and "mean - 0.3 * variance of 3" in result.model

    audit = decompose(scorer, data, tmp_path / "audit", num_prompts=4, progress=False)  # every distinct prompt
    grid = np.stack([
        rewards_by_hand(mixed, [prompt] * 5, [pair["chosen"] for pair in PAIRS], 0.3)[0]
        - rewards_by_hand(mixed, [prompt] * 5, [pair["rejected"] for pair in PAIRS], 0.3)[0]
        for prompt in dict.fromkeys(PROMPTS)
    ])  # fmt: skip
    flips = (np.sign(grid) != np.sign(gaps)).any(axis=0).mean()
    assert audit.accuracy == (gaps > 0).mean() and audit.sign_flips == flips
    free = pq.read_table(tmp_path / "audit" / "pairs.parquet")["prompt_free_gap"].to_numpy()
    balance = (1 / (1 + np.exp(free - grid))).mean(axis=0)  # its equation: mean over prompts of sigmoid(D - D2) = 1/2
    np.testing.assert_allclose(balance, 0.5, atol=1e-4)


def test_a_file_is_scored_by_an_ensemble(mixed, tmp_path):
    rows = [{"prompt": x, "response": y} for x, y in zip(PROMPTS, RESPONSES, strict=True)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scorer = EnsembleScorer(mixed, coefficient=0.3)
    score_file(scorer, tmp_path / "in.jsonl", tmp_path / "out.jsonl", uncertainty=3, progress=False)
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    expected, stds = rewards_by_hand(mixed, PROMPTS, RESPONSES, 0.3)
    np.testing.assert_allclose([row["reward"] for row in written], expected, atol=2e-5)
    np.testing.assert_allclose([row["reward_std"] for row in written], stds, atol=2e-5)


def test_identity_tells_members_coefficients_and_offsets_apart(mixed):
    scorers = [
        EnsembleScorer(mixed, coefficient=0.5),
        EnsembleScorer(mixed, coefficient=0.25),
        EnsembleScorer(mixed[:2], coefficient=0.5),
        EnsembleScorer([*mixed[:2], mixed[0]], coefficient=0.5),
        EnsembleScorer(mixed, coefficient=0.5, offsets=[0.0, 0.0, 1.0]),
    ]
    assert len({scorer.identity()["model"] for scorer in scorers} | {mixed[0].identity()["model"]}) == 6
    assert EnsembleScorer(mixed, coefficient=0.5).identity() == scorers[0].identity()
    assert scorers[0].identity()["tokenizer"] == mixed[0].identity()["tokenizer"]


def test_an_unfinished_evaluation_of_another_ensemble_is_not_continued(mixed, tmp_path, monkeypatch):
    data = write_pairs(tmp_path / "pairs.jsonl")
    monkeypatch.setattr("inform_rm.eval.frame.Frame.finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        evaluate(EnsembleScorer(mixed, coefficient=0.5), data, tmp_path / "run", progress=False)
    with pytest.raises(InputError, match=r"coefficient was 0\.5, is 0\.25"):
        evaluate(EnsembleScorer(mixed, coefficient=0.25), data, tmp_path / "run", progress=False)


def test_folders_and_averaged_models_are_members_too(members, tmp_path):
    average_weights(members, tmp_path / "mean", progress=False)
    folders = [members[0], tmp_path / "mean"]
    scorer = EnsembleScorer(folders, coefficient=0.0, max_length=64)
    assert scorer.max_length == 64
    expected = torch.stack([RewardScorer(folder).score(PROMPTS, RESPONSES) for folder in folders]).mean(dim=0)
    torch.testing.assert_close(scorer.score(PROMPTS, RESPONSES), expected, atol=1e-5, rtol=0)


def test_a_member_in_training_mode_scores_without_noise_and_stays_in_it(mixed):
    scorer = EnsembleScorer(mixed, coefficient=0.5)
    expected = scorer.score(PROMPTS, RESPONSES)
    model = mixed[1].model.train()
    rewards = scorer.score(PROMPTS, RESPONSES)
    assert model.training and model.score.training
    model.eval()
    torch.testing.assert_close(rewards, expected, atol=1e-6, rtol=0)


def test_wrong_ensembles_are_refused(mixed, tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = other.chat_template.replace("<|", "<| ")
    stranger = RewardScorer(mixed[0].model, other)
    for members, options, match in (
        (mixed[:1], {"coefficient": 0.5}, "at least two reward models"),
        (mixed[0], {"coefficient": 0.5}, "at least two reward models"),
        ([mixed[0], stranger], {"coefficient": 0.5}, "another tokenizer or chat template"),
        (mixed, {"coefficient": -0.1}, "reward disagreement"),
        (mixed, {"coefficient": float("nan")}, "finite number"),
        (mixed, {"coefficient": 0.5, "offsets": [1.0]}, "1 numbers for 3 members"),
        (mixed, {"coefficient": 0.5, "offsets": [1.0, 2.0, None]}, "offsets: None"),
        (mixed, {"coefficient": 0.5, "max_length": 5}, "Set them on the scorer"),
    ):
        with pytest.raises(InputError, match=match):
            EnsembleScorer(members, **options)
    scorer = EnsembleScorer(mixed, coefficient=0.5)
    for uncertainty in (2, True, 16):
        with pytest.raises(InputError, match="its 3 members"):
            scorer.score(PROMPTS, RESPONSES, uncertainty=uncertainty)


def test_a_member_that_gives_nan_names_the_row(mixed, tokenizer):
    broken = copy.deepcopy(mixed[2].model)
    with torch.no_grad():
        broken.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids("~")] = float("nan")
    scorer = EnsembleScorer([mixed[0], RewardScorer(broken, tokenizer)], coefficient=0.5)
    with pytest.raises(NonFiniteRewardError, match=r"row 1 \(counted from 0\) has the reward nan"):
        scorer.score(["Hi", "Hi"], ["Red.", "~"])
