"""Checks of rates, models, batches and sets of examples, for the explicit room.

Every error has the form "name: expected X, got Y" and is raised before anything
changes. The arguments of each step pass a cheap test first; only if that fails is the
reason looked for.
"""

from __future__ import annotations

import contextlib
import math
import numbers
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchbp import costs
from torchbp._checks import explain, explain_memory
from torchbp.convert import from_native
from torchbp.functional import as_rows
from torchbp.nn import MLP, BPLinear

__all__ = ["Rates", "layers_of"]

# ---------------------------------------------------------------- rates


@dataclass(frozen=True)
class Rates:
    """η and λ/n of a step: two finite numbers that are not negative.

    Args:
        lr: η.
        weight_decay: λ/n, on weights and not on biases.

    Attributes:
        lr, weight_decay: the arguments.

    Raises:
        TypeError: one of them is not a number. A tensor is refused, since it could be
            overwritten later.
        ValueError: one of them is negative or not finite.

    Examples:
        >>> Rates(0.5).weight_decay
        0.0
        >>> Rates(-1.0)
        Traceback (most recent call last):
            ...
        ValueError: lr: expected a number >= 0, got -1.0
    """

    lr: float
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay"):
            value = getattr(self, name)
            if not isinstance(value, numbers.Real):
                got = type(value).__name__
                raise TypeError(
                    f"{name}: expected a number, got {value!r} of type {got}"
                )
            if not 0 <= float(value) < math.inf:  # NaN is neither
                raise ValueError(f"{name}: expected a number >= 0, got {value}")

    def check_dtype(self, model: nn.Module) -> None:
        """Raise ValueError if η or ηλ/n overflows in the dtype of `model`, whose
        parameters are multiplied by it."""
        dtype = next((p.dtype for p in model.parameters()), torch.float32)
        largest = torch.finfo(dtype).max
        factors = {"lr": self.lr, "lr · weight_decay": self.lr * self.weight_decay}
        for name, value in factors.items():
            if value > largest:
                raise ValueError(
                    f"{name}: expected at most {largest:.3g}, the largest {dtype}, "
                    f"got {value:.3g}"
                )


# ---------------------------------------------------------------- models


def layers_of(model: nn.Module) -> list[BPLinear]:
    """Return the hand-written layers that `model` calls one after the other.

    Args:
        model: an MLP, a hand-written layer, or an ``nn.Sequential`` of them.

    Raises:
        TypeError: `model` is of another kind, or a layer's parameters are computed from
            others (parametrizations, pruning).
        ValueError, TypeError: layers that do not fit together.

    Examples:
        >>> model = nn.Sequential(MLP([4, 3, 2]), nn.Identity(), BPLinear(2, 1))
        >>> [layer.out_features for layer in layers_of(model)]
        [3, 2, 1]
    """
    modules = list(_chain(model))
    foreign = [type(m).__name__ for m in modules if not _is_ours(m)]
    if foreign:
        raise TypeError(
            "model: expected an MLP, a hand-written layer or an nn.Sequential of them, "
            f"got {foreign[0]}{_advice(model)}"
        )
    if not modules:
        raise TypeError("model: expected at least one hand-written layer, got none")
    layers: list[Any] = modules
    check_layers(layers)
    return layers


def _chain(module: Any) -> Iterator[Any]:
    """Yield the modules that `module` calls one after the other: those of the children
    of an MLP or an ``nn.Sequential``, nothing for an ``nn.Identity``, and any other
    module itself."""
    children: Any = []
    if isinstance(module, MLP) and type(module).forward is MLP.forward:
        children = module.layers
    elif type(module) is nn.Sequential:
        children = module
    elif type(module) is not nn.Identity:
        yield module
    for child in children:
        yield from _chain(child)


def _is_ours(module: Any) -> bool:
    """Return whether `module` is a hand-written layer whose forward is not replaced."""
    return isinstance(module, BPLinear) and type(module).forward is BPLinear.forward


def _advice(model: Any) -> str:
    """Return the advice for a `model` that is not a chain of hand-written layers."""
    if not isinstance(model, nn.Module):
        return ""
    with contextlib.suppress(TypeError, ValueError):  # it cannot be converted
        if all(map(_is_ours, _chain(from_native(model)))):
            return "; from_native(model) converts it"
    return "; other models train by autograd: cost(model(x), y).backward()"


def check_layers(layers: list[BPLinear]) -> None:
    """Raise an error unless the parameters of each layer are its own, agree with each
    other, and fit the layer before."""
    for layer in layers:
        if layer._parameters.keys() != {"weight", "bias"}:
            raise TypeError(
                "model: expected layers with a weight and a bias of their own, got "
                f"{type(layer).__name__} whose parameters are computed (a "
                "parametrization, pruning)"
            )
    width = layers[0].in_features
    for i, layer in enumerate(layers):
        a = layers[max(i - 1, 0)].weight.new_empty(()).expand(1, width)
        if (reason := explain(a, layer.weight, layer.bias)) is not None:
            place = " behind another layer" if i else ""
            raise type(reason)(f"{type(layer).__name__}{place}: {reason}")
        width = layer.weight.shape[0]


def check_separate(layers: list[BPLinear]) -> None:
    """Raise an error unless every number of every parameter has its own memory."""
    seen = set()
    for p in (p for layer in layers for p in layer.parameters()):
        if (reason := explain_memory("parameters", p)) is not None:
            raise reason
        strided = zip(p.shape, p.stride(), strict=True)
        if p.data_ptr() in seen or any(n > 1 and not step for n, step in strided):
            raise ValueError(
                "model: expected every parameter in one layer only and with memory of "
                f"its own, got one of shape {tuple(p.shape)} that shares it"
            )
        seen.add(p.data_ptr())


# ---------------------------------------------------------------- a batch of examples


def check_batch(
    layers: list[BPLinear], input: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the rows of the input (examples, n_in) and of the target (examples, K);
    raise the errors of the first layer and of the cost."""
    W, K = layers[0].weight, layers[-1].out_features
    if not _fit(input, target, W, K):
        if (reason := explain(input, W, layers[0].bias)) is not None:
            raise reason
        costs.check_tensors(input, target)
        output = input.new_empty(()).expand(*input.shape[:-1], K)
        target = costs.target_rows(output, target)
    return as_rows(input.detach()), as_rows(target)


def _fit(input: Any, target: Any, W: Tensor, K: int) -> bool:
    """Return whether these are plain tensors that fit W and K outputs. Labels and
    subclasses of Tensor fail this test and may still be right."""
    return (
        type(input) is type(target) is Tensor
        and input.dtype is target.dtype is W.dtype
        and input.device == target.device == W.device
        and input.layout is target.layout is torch.strided
        and not (input.is_nested or target.is_nested or target.requires_grad)
        and input.shape[-1:] == W.shape[1:]
        and target.shape == (*input.shape[:-1], K)
        and K > 0
    )


# ---------------------------------------------------------------- a set of examples


def check_set(
    layers: list[BPLinear], images: Tensor, targets: Tensor, batch_size: int
) -> Tensor:
    """Return the targets of a whole set of examples, labels as int64, or raise an
    error that names the argument."""
    if isinstance(batch_size, bool) or not hasattr(batch_size, "__index__"):
        raise TypeError(f"batch_size: expected an integer, got {batch_size!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    costs.check_tensors(images, targets, ("images", "targets"))
    W = layers[0].weight
    if images.dtype not in (torch.uint8, W.dtype):
        raise TypeError(
            f"images: expected uint8 or the parameters' {W.dtype}, got {images.dtype}"
        )
    if images.dim() != 2 or images.shape[1] != W.shape[1] or not len(images):
        raise ValueError(
            f"images: expected shape (n, {W.shape[1]}) with n >= 1, "
            f"got {tuple(images.shape)}"
        )
    if images.device != W.device:
        raise ValueError(
            f"images: expected the parameters' device {W.device}, got {images.device}"
        )
    _check_finite("images", images)
    outputs = W.new_empty(()).expand(len(images), layers[-1].weight.shape[0])
    costs.check(outputs, targets)
    _check_finite("targets", targets)
    if targets.is_floating_point():
        return targets
    targets = targets.long()
    costs.check_labels(targets, outputs.shape[1])
    return targets


def _check_finite(name: str, t: Tensor) -> None:
    """Raise an error unless `t` has memory, and finite numbers in it."""
    if (reason := explain_memory(name, t)) is not None:
        raise reason
    # A finite sum takes a third of the time and proves it; but a sum may overflow.
    if not t.is_floating_point() or t.sum().isfinite():
        return
    bad = ~t.isfinite().flatten(1).all(1)
    if bad.any():
        i = int(bad.int().argmax())
        raise ValueError(
            f"{name}: expected finite numbers, got {t[i][~t[i].isfinite()][0].item()} "
            f"in example {i} and {int(bad.sum()) - 1} more that are not"
        )


def check_order(order: Tensor, n: int) -> None:
    """Raise ValueError unless `order` is a list of indices of `n` examples."""
    if order.dim() != 1 or order.dtype != torch.int64 or not len(order):
        raise ValueError(
            f"order: expected int64 indices (k) with k >= 1, got {order.dtype} "
            f"{tuple(order.shape)}"
        )
    low, high = int(order.min()), int(order.max())
    if low < 0 or high >= n:
        raise ValueError(
            f"order: expected indices in 0..{n - 1}, got {low if low < 0 else high}"
        )
