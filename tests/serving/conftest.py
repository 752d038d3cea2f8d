"""One tiny model for all serving tests, and applications around it that end with the test."""

import pytest
import torch
from fastapi.testclient import TestClient

from inform_rm import InfoRMConfig, InfoRMForSequenceClassification
from inform_rm.scoring.scorer import RewardScorer
from inform_rm.serving.app import create_app


@pytest.fixture(scope="session")
def served_dir(backbone_configs, tokenizer, tmp_path_factory):
    """Folder of a tiny InfoRM model whose rewards differ by whole units; takes 128 tokens."""
    torch.manual_seed(3)
    model = InfoRMForSequenceClassification(InfoRMConfig(text_config=backbone_configs["llama"], latent_dim=6))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("served")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def scorer(served_dir):
    return RewardScorer(served_dir, tokens_per_batch=64)


@pytest.fixture
def make_app():
    """`create_app` whose threads end with the test."""
    made = []

    def make(*arguments, **keywords):
        made.append(create_app(*arguments, **keywords))
        return made[-1]

    yield make
    for app in made:
        app.state.batcher.close()


@pytest.fixture
def client(scorer, make_app):
    return TestClient(make_app(scorer), raise_server_exceptions=False)


class Wrapped:
    """A scorer whose forward passes a test can hold up, count or break."""

    def __init__(self, scorer, before=lambda sequences: None):
        self._scorer, self._before = scorer, before

    def __getattr__(self, name):
        return getattr(self._scorer, name)

    def iter_scores(self, sequences, prompt_lengths, **options):
        self._before(sequences)
        return self._scorer.iter_scores(sequences, prompt_lengths, **options)


@pytest.fixture(scope="session")
def wrapped():
    return Wrapped
