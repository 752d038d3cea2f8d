"""Training with FlexAttention, its reference on a CPU: losses and weights of padded batches, plain and compiled."""

import pytest
import torch
from torch.nn.attention import flex_attention

from inform_rm.scoring.packed_flex import flex_inputs
from inform_rm.scoring.packing import use_packed_attention
from inform_rm.training import passes, trainer
from inform_rm.training.trainer import RewardTrainer

pytestmark = pytest.mark.slow


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Packed rows go through FlexAttention, for which PyTorch refuses gradients on a CPU, having them all the same."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(passes, "for_device", flex_inputs)

    def packed(model, args):
        use_packed_attention(model)
        return "packed"

    monkeypatch.setattr(trainer, "choose_batching", packed)


def trained(args):
    run = RewardTrainer(args=args)
    run.train()
    return [line["loss"] for line in run.state.log_history if "loss" in line], run.model.state_dict()


def assert_alike(one, other, tolerance):
    assert one[0] == pytest.approx(other[0], abs=tolerance)
    for name, value in one[1].items():
        torch.testing.assert_close(value, other[1][name.replace("_orig_mod.", "")], atol=tolerance, rtol=0, msg=name)


def test_fifty_steps_are_those_of_padded_batches(base_settings, as_on_a_gpu, tmp_path, monkeypatch):
    settings = {"max_steps": 50, "architecture": "standard", "gradient_accumulation_steps": 1, "logging_steps": 5}
    by_flex = trained(base_settings(**settings, tokens_per_batch=400))
    monkeypatch.setattr(trainer, "choose_batching", lambda model, args: "padded")
    padded = trained(base_settings(**settings, output_dir=str(tmp_path / "padded")))
    assert padded[0][-1] < 0.7 * padded[0][0]  # something was learnt
    assert_alike(by_flex, padded, 2e-3)


def test_layers_compiled_one_by_one_train_as_they_are(base_settings, as_on_a_gpu, tmp_path):
    settings = {"max_steps": 3, "gradient_accumulation_steps": 1, "optim": "sgd", "learning_rate": 0.1}
    plain = trained(base_settings(**settings))
    torch._dynamo.reset()
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager", "output_dir": str(tmp_path / "compiled")}
    assert_alike(trained(base_settings(**settings, **compiled)), plain, 1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
