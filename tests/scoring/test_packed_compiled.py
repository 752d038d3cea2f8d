"""What torch.compile makes of packed rows with FlexAttention, and what a layer asks of Python."""

import pytest
import torch
from torch.nn.attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

from inform_rm import InfoRMConfig, InfoRMForSequenceClassification
from inform_rm.scoring import packed_flex
from inform_rm.scoring.packed_flex import flex_inputs
from inform_rm.scoring.packing import pack_sequences, use_packed_attention
from inform_rm.training.losses import reward_model_loss

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def gradients_on_a_cpu(monkeypatch):
    """PyTorch refuses them for FlexAttention, whose reference has a backward pass all the same."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)


def tiny_model(layers=2):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    text = LlamaConfig(vocab_size=99, head_dim=16, num_hidden_layers=layers, max_position_embeddings=1024, **sizes)
    model = InfoRMForSequenceClassification(InfoRMConfig(text_config=text, latent_dim=4))
    use_packed_attention(model)
    return model


def pairs_of(model, pairs, tokens):
    """Inputs of one row: pairs with prompts and responses of about so many tokens, chosen ones first."""
    generator = torch.Generator().manual_seed(pairs * tokens)

    def draw(length):
        return torch.randint(1, 99, (length,), generator=generator).tolist()

    prompts = [draw(tokens + number) for number in range(pairs)]
    sequences = [prompt + draw(tokens + 3 * side) for side in (1, 2) for prompt in prompts]
    row = pack_sequences(sequences, [len(prompt) for prompt in prompts] * 2)
    inputs = {"input_ids": row.input_ids, "position_ids": row.position_ids, "packed_segments": row.segments}
    noise = torch.randn(2 * pairs, 4, generator=generator)
    return {**flex_inputs(inputs, model.config, CPU), "pooled_positions": row.pooled_positions, "latent_noise": noise}


def loss_of(model, inputs):
    output = model(**inputs)
    return reward_model_loss(*output.logits.flatten().chunk(2), *output.kl.chunk(2), beta=0.1)


def test_what_python_does_for_a_layer_does_not_grow_with_the_segments(monkeypatch):
    class Counter(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += 1
            return function(*args, **(kwargs or {}))

    calls = []

    def kernel(query, *rest, **options):  # as one operation, which it is on a GPU
        calls.append(query.shape)
        return query.clone()

    monkeypatch.setattr(packed_flex, "flex_attention", kernel)
    model = tiny_model()
    counts = []
    for pairs in (1, 8, 30):
        inputs = pairs_of(model, pairs, 4)
        with Counter() as counter:
            loss_of(model, inputs).backward()
        counts.append(counter.count)
    assert counts[0] == counts[1] == counts[2]
    assert len(calls) == 3 * model.config.text_config.num_hidden_layers


@pytest.mark.slow
def test_a_training_step_has_no_graph_breaks_and_is_compiled_for_few_row_lengths():
    model = tiny_model()
    torch._dynamo.reset()
    explained = torch._dynamo.explain(loss_of)(model, pairs_of(model, 3, 20))
    assert explained.graph_break_count == 0 and explained.graph_count == 1

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(loss_of, backend=counter, dynamic=True, fullgraph=True)
    lengths = set()
    for pairs, tokens in ((3, 20), (5, 20), (8, 30), (4, 60), (2, 40), (9, 11), (6, 25), (1, 8)):
        inputs = pairs_of(model, pairs, tokens)
        lengths.add(inputs["input_ids"].shape[1])
        expected = loss_of(model, inputs)
        torch.testing.assert_close(compiled(model, inputs), expected, atol=1e-5, rtol=1e-5)
    assert len(lengths) >= 5
    assert counter.frame_count <= 3  # any length, one block of tokens, and one pair


@pytest.mark.slow
def test_layers_compiled_one_by_one_give_the_same_gradients():
    model = tiny_model(layers=3)
    batches = [pairs_of(model, pairs, tokens) for pairs, tokens in ((3, 20), (5, 30), (4, 60))]
    expected = []
    for inputs in batches:
        model.zero_grad()
        loss_of(model, inputs).backward()
        expected.append({name: value.grad.clone() for name, value in model.named_parameters()})
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for layer in model.model.layers:
        layer.compile(dynamic=True, fullgraph=True, backend=counter)
    for inputs, gradients in zip(batches, expected, strict=True):
        model.zero_grad()
        loss_of(model, inputs).backward()
        for name, value in model.named_parameters():
            torch.testing.assert_close(value.grad, gradients[name], atol=1e-6, rtol=1e-4, msg=name)
    assert counter.frame_count <= 3  # all layers share what is compiled
