"""What is not as in the papers is said where a user sees it: help, model card, pages and docs/ideas/papers.md."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.special import erf

from inform_rm import InfoRMConfig, InfoRMForSequenceClassification
from inform_rm.cli.dispatch import parse
from inform_rm.cli.train import _help
from inform_rm.eval.decompose_report import DecompositionResult
from inform_rm.hub.cards import model_card
from inform_rm.training.reward_arguments import RewardTrainingArguments, card_settings
from inform_rm.util.papers import GAP_DERIVED, MOP_DIFFERS, TRL_TRAINS_BT, differences_of_run

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "docs" / "ideas" / "papers.md"
RESULT = {"train_pairs": {"pairs": 12}, "evaluation": None, "versions": {"torch": "2"}, "data_fingerprints": {}}


def test_published_defaults():
    arguments = RewardTrainingArguments("o", use_cpu=True)
    names = ("latent_dim", "beta", "learning_rate", "num_train_epochs", "pairs_of_step", "kl_reduction")
    assert [getattr(arguments, name) for name in names] == [128, 0.1, 5e-6, 1, 64, "sum"]


@pytest.mark.parametrize("decoder", ["mlp", "linear"])
@pytest.mark.parametrize("reduction", ["sum", "averaged_moments"])
def test_algorithm_2_in_numpy(backbone_configs, decoder, reduction):
    """Encoder, noise, decoder, both terms of eq. 25, from the last tokens' hidden states on; own GELU and KL."""
    torch.manual_seed(0)
    config = InfoRMConfig(backbone_configs["llama"], latent_dim=6, decoder=decoder, kl_reduction=reduction, beta=0.3)
    model = InfoRMForSequenceClassification(config).train()
    for parameter in model.score.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    tokens, noise = torch.randint(3, 300, (4, 7)), torch.randn(4, 6)
    output = model(tokens, latent_noise=noise, return_loss=True)
    with torch.no_grad():
        hidden = model.model(tokens).last_hidden_state[:, -1].double().numpy()
    weights = {name: value.double().numpy() for name, value in model.score.state_dict().items()}
    moments = hidden @ weights["encoder.weight"].T + weights["encoder.bias"]
    mean, log_variance = moments[:, :6], moments[:, 6:]
    at = mean + np.sqrt(np.exp(log_variance)) * noise.double().numpy()
    if decoder == "mlp":
        inner = at @ weights["decoder.0.weight"].T + weights["decoder.0.bias"]
        inner = inner * 0.5 * (1 + erf(inner / np.sqrt(2)))
        rewards = inner @ weights["decoder.2.weight"].T + weights["decoder.2.bias"]
    else:
        rewards = at @ weights["decoder.weight"].T + weights["decoder.bias"]
    rewards = rewards[:, 0]
    if reduction == "sum":
        kl = 0.5 * (mean**2 + np.exp(log_variance) - 1 - log_variance).sum(axis=1)
        term = np.mean(kl[:2] + kl[2:])
    else:
        m, v = mean.mean(axis=1), log_variance.mean(axis=1)
        term = np.mean(0.5 * (m**2 + np.exp(v) - 1 - v))
    loss = np.mean(np.log1p(np.exp(rewards[2:] - rewards[:2]))) + 0.3 * term
    np.testing.assert_allclose(output.logits.detach().numpy()[:, 0], rewards, rtol=1e-4, atol=1e-5)
    assert output.loss.item() == pytest.approx(loss, rel=1e-5)


def one_line(text):
    return " ".join(text.split())


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("kl_warmup_steps", "not in the paper, which has beta from the first step (0)"),
        ("kl_warmup_nats", "unless kl_warmup_steps is 0, the KL weight stays 0 for longer"),
        ("pairs_per_step", "over all processes and forward passes"),
        ("kl_reduction", "K 512, beta 1.0, learning rate 9e-6, linear encoder and decoder without bias"),
        ("objective", "derived from the paper's definitions, it is not the authors' text"),
        ("warmup_fraction", "ours, gaps of a fresh head are noise"),
        ("num_prompts", "without the pair's own"),
    ],
)
def test_the_help_of_train_says_it(setting, said):
    text = one_line(_help(False))
    assert said in text.partition(f"--{setting} ")[2].partition(" --")[0]


def test_the_help_of_detect_and_decompose_says_it(capsys):
    for command, said in (("detect", MOP_DIFFERS), ("decompose", GAP_DERIVED)):
        with pytest.raises(SystemExit):
            parse([command, "--help"])
        shown = "".join(capsys.readouterr().out.split())
        assert "".join(said.split()) in shown


def card(**settings):
    arguments = RewardTrainingArguments("o", model="m", data=("d",), use_cpu=True, **settings)
    config = InfoRMConfig(architecture=arguments.architecture)
    return model_card(config, card_settings(arguments, False), RESULT)


def test_a_model_card_says_what_its_run_has_otherwise():
    text = card(kl_warmup_steps=0.2)
    assert TRL_TRAINS_BT in text
    assert "- kl_warmup_steps 0.2: the KL term starts at 0 and reaches beta later, not before preferences earn" in text
    assert "later; arXiv:2402.09345 has beta" in card(kl_warmup_nats=0)
    assert "| pairs_per_step | 64 |" in text and "gradient_accumulation_steps" not in text
    prioritized = card(objective="prioritized", kl_reduction="averaged_moments")
    assert GAP_DERIVED in prioritized
    assert "averaged_moments: the KL of the mean moments" in prioritized and "their term at equal beta" in prioritized
    plain = card(architecture="standard")
    assert "RewardTrainer" not in plain and "Not as in the papers" not in plain
    assert "Not as in the papers" not in card(kl_warmup_steps=0)


def test_an_old_weight_of_the_kl_term_is_told():
    settings = {"architecture": "inform", "kl_reduction": "averaged_moments", "kl_reduction_version": 1}
    assert differences_of_run(settings)[0].endswith("twice their term at equal beta.")
    assert differences_of_run({}) == []


def test_every_page_of_gaps_says_whose_equation_it_is():
    cost = {"tokens_computed": 1, "tokens_of_a_plain_loop": 2}
    result = SimpleNamespace(cost=cost, left_out={}, settings={"num_prompts": 4}, distinct_prompts=3,
                             mean_standard_error=0.1, mean_effective_sample_size=2.0)  # fmt: skip
    assert DecompositionResult.notes(result)[-1] == GAP_DERIVED


def test_every_row_of_the_table_is_right_with_a_test_or_says_where_it_differs_or_why_it_is_not_here():
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in ROWS.read_text().splitlines()
        if line.startswith("|") and not line.startswith(("| what", "|---"))
    ]
    assert len(rows) > 40
    for what, _, verdict, where in rows:
        assert verdict in ("right", "differs", "not here"), what
        tests = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", where)
        if verdict == "right":
            assert tests, what
        for path, name in tests:
            source = (ROOT / path).read_text()
            assert not name or re.search(rf"^(?:def|class) {name}\b", source, re.MULTILINE), f"{what}: {path}::{name}"


def test_settings_of_the_authors_code_are_a_file_that_can_be_read(tmp_path):
    """What docs/ideas/papers.md gives to train as the released code does."""
    block = re.search(r"```yaml\n(.*?)```", ROWS.read_text(), re.DOTALL).group(1)
    (tmp_path / "released.yaml").write_text("model: m\ndata: d\noutput_dir: o\nuse_cpu: true\n" + block)
    from inform_rm.training.reward_arguments import read_arguments

    arguments = read_arguments(tmp_path / "released.yaml", {})
    assert (arguments.latent_dim, arguments.beta, arguments.learning_rate) == (512, 1.0, 9e-6)
    assert (arguments.decoder, arguments.kl_reduction, arguments.kl_warmup_steps) == ("linear", "averaged_moments", 0)
    assert json.dumps(arguments.pairs_of_step)
