"""What a forward and backward pass of a model needs, counted on fake tensors: nothing is loaded and nothing computed.

A fake tensor has a shape, a number type and a storage of known size, and no numbers. PyTorch runs the model's own code
and its own backward pass on them, so that what is kept between the two is what a real pass keeps, whatever the
architecture.
"""

import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from inform_rm.scoring.packing import last_layer_at

_EMBEDDING_GRADIENT = torch.ops.aten.embedding_dense_backward.default
_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# Layers that are run where all of a model's are alike. The first is not quite like the others (with LoRA its input
# needs no gradient), so that memory and operations grow evenly from the second on.
_FEW, _MORE = 2, 3


@dataclass(frozen=True)
class PassCounts:
    """Of one forward and backward pass; weights and their kept gradients are not among the bytes.

    Attributes:
        kept_bytes: what the forward pass leaves for the backward pass.
        layers_bytes: most bytes at once while the layers are computed, kept ones among them.
        embedding_bytes: most bytes at once from the gradient of the embeddings on, when the layers have been freed.
        forward_flops: floating-point operations of matrix products and attention in the forward pass.
        flops: of both passes, with what activation checkpointing computes again.
    """

    kept_bytes: float
    layers_bytes: float
    embedding_bytes: float
    forward_flops: float
    flops: float

    def with_layers(self, more: "PassCounts", layers: int) -> "PassCounts":
        """On the line through this, of `_FEW` layers, and ``more``, of `_MORE`."""
        steps = (layers - _FEW) / (_MORE - _FEW)
        both = {name: (few, getattr(more, name)) for name, few in vars(self).items()}
        return PassCounts(**{name: few + (many - few) * steps for name, (few, many) in both.items()})


def count_pass(model: Any, rows: int, length: int, *, autocast: bool, read: int | None = None) -> PassCounts:
    """Count a pass over ``(rows, length)`` tokens, none of them padding, in bfloat16 where ``autocast`` computes so.

    ``read``: the last layer is computed at so many places of a row alone (`last_layer_at`); ``None``: at all.
    The model is on the meta device and in training mode; its weights are replaced, and it cannot be used afterwards.
    One whose layers all have the same weights is run with few of them, and the rest is on a line.
    """
    layers = layers_of(model)
    number = len(layers)
    alike = len({_shapes(layer) for layer in layers}) == 1
    with FakeTensorMode():
        _give_fake_weights(model)
        for weight in model.parameters():  # kept gradients are counted from the weights, not here
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(_forget_gradient)
        tokens = torch.zeros(rows, length, dtype=torch.long)
        if not alike or number <= _MORE:
            return _count(model, tokens, autocast, read)
        found = []
        for kept in (_MORE, _FEW):
            del layers[kept:]
            found.append(_count(model, tokens, autocast, read))
    more, few = found
    return few.with_layers(more, number)


def layers_of(model: Any) -> nn.ModuleList:
    """The list of a decoder's layers."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    of_layers = [found for found in lists if type(found[0]).__name__ in names]
    return max(of_layers or lists, key=len)


def _count(model: Any, tokens: Tensor, autocast: bool, read: int | None) -> PassCounts:
    backbone = getattr(model, model.base_model_prefix)
    where = nullcontext() if read is None else last_layer_at(backbone, torch.arange(read))
    held = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers(), tokens)]
    with _Counter(held) as counter, where:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            rewards = model(input_ids=tokens).logits
        kept, forward_flops = counter.bytes_now, counter.flops
        rewards.float().sum().backward()
    of_layers, from_embedding = counter.peaks
    return PassCounts(kept, of_layers, from_embedding, forward_flops, counter.flops)


class _Counter(TorchDispatchMode):
    """Counts the bytes of living storages, but for those that are held already, and floating-point operations."""

    def __init__(self, held: list[Any]):
        super().__init__()
        self._held, self._known = held, weakref.WeakSet(held)
        self.bytes_now, self.flops = 0, 0.0
        self.peaks = [0, 0]  # of the layers; from the gradient of the embeddings on
        self._phase = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known.add(storage)
                self.bytes_now += storage.nbytes()
                weakref.finalize(storage, self._forget, storage.nbytes())
        self._phase = max(self._phase, int(func is _EMBEDDING_GRADIENT))
        self.peaks[self._phase] = max(self.peaks[self._phase], self.bytes_now)
        self.flops += _flops(func, args, kwargs or {}, result)
        return result

    def _forget(self, number: int) -> None:
        self.bytes_now -= number


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> float:
    """By PyTorch's own formulas; it has none for the attention kernel of CPUs: two products, five in the backward."""
    operation = func._overloadpacket
    if operation in (_CPU_ATTENTION, _CPU_ATTENTION_BACKWARD):
        query, key = (args[0], args[1]) if operation is _CPU_ATTENTION else (args[1], args[2])
        products = 2 if operation is _CPU_ATTENTION else 5
        return products * 2.0 * query.numel() * key.shape[-2]
    formula = flop_registry.get(operation)
    return 0.0 if formula is None else float(formula(*args, **kwargs, out_val=result))


def _give_fake_weights(model: nn.Module) -> None:
    """Replace weights and buffers, each once, by fake ones on the CPU."""
    made: dict[int, Tensor] = {}
    kinds: Any = (kind for module in model.modules() for kind in (module._parameters, module._buffers))
    for tensors in kinds:
        for name, old in tensors.items():
            if old is None:
                continue
            if id(old) not in made:
                new = torch.empty(old.shape, dtype=old.dtype)
                is_weight = isinstance(old, nn.Parameter)
                made[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad) if is_weight else new
            tensors[name] = made[id(old)]


def _shapes(layer: nn.Module) -> tuple[Any, ...]:
    return tuple((name, tuple(weight.shape)) for name, weight in layer.named_parameters())


def _forget_gradient(weight: Tensor) -> None:
    weight.grad = None
