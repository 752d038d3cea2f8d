"""A tiny InfoRM model with rewards of order 1, and its scorer, which tests leave as they are."""

import pytest
import torch

from inform_rm import InfoRMConfig, InfoRMForSequenceClassification
from inform_rm.scoring.scorer import RewardScorer


@pytest.fixture(scope="module")
def model(backbone_configs):
    torch.manual_seed(1)
    model = InfoRMForSequenceClassification(InfoRMConfig(text_config=backbone_configs["llama"], latent_dim=8))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def scorer(model, tokenizer):
    return RewardScorer(model, tokenizer, tokens_per_batch=200)
