"""Backpropagation in one function: the whole algorithm of the book, without autograd.

Feedforward, output error (BP1), the sweep back (BP2), and the gradients (BP3, BP4). The
docstring of :mod:`torchbp` has the notation; rows are examples. σ and σ' come from
:mod:`torchbp.functional`, C_x and ∇C_x from :mod:`torchbp.costs`.
:class:`torchbp.ExplicitSGD` is the same algorithm to train with.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchbp import costs
from torchbp._autograd import without_autocast
from torchbp.explicit.checks import check_batch, layers_of
from torchbp.nn import check_takes

__all__ = ["backprop"]


@torch.no_grad()
def backprop(
    model: nn.Module, cost: Any, input: Tensor, target: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the cost of a batch and its gradients, by BP1-BP4 alone.

    Nothing in the model changes, and its hooks do not run. Everything is computed in
    the parameters' dtype, under autocast too.

    Args:
        model: an :class:`torchbp.MLP`, a hand-written layer, or an ``nn.Sequential`` of
            them.
        cost: a cost of this package, module or function, or one from ``define_cost``.
        input: a^0, whose rows are examples.
        target: numbers, or integer labels.

    Shape:
        input (*, n_in); target (*, K), or (*) for labels.

    Returns:
        C, 0-d, and {parameter name: gradient, of the parameter's shape} for the
        parameters that require grad.

    Raises:
        TypeError: `model` or `cost` is of another kind, or an argument is not a tensor
            of the parameters' dtype.
        ValueError: the shapes or devices do not fit, a label is out of range, or the
            cost takes z and the last layer gives a.

    Source: Nielsen, Neural Networks and Deep Learning, chapter 2, "The backpropagation
    algorithm".

    Examples:
        >>> import torch, torchbp
        >>> model = torchbp.MLP([4, 3, 2])
        >>> x, y = torch.rand(5, 4), torch.tensor([0, 1, 1, 0, 1])
        >>> C, grads = torchbp.backprop(model, torchbp.QuadraticCost(), x, y)
        >>> {name: tuple(grad.shape) for name, grad in grads.items()}
        ... # doctest: +NORMALIZE_WHITESPACE
        {'layers.0.weight': (3, 4), 'layers.0.bias': (3,),
         'layers.1.weight': (2, 3), 'layers.1.bias': (2,)}
    """
    layers = layers_of(model)
    check_takes(model, cost)
    function = costs.function_of(cost)
    x, y = check_batch(layers, input, target)
    with without_autocast(x):
        # Feedforward: z^ℓ = W^ℓ a^{ℓ-1} + b^ℓ, a^ℓ = σ(z^ℓ). σ' is computed from s: a,
        # z or None.
        a, s = [x], []
        for layer in layers:
            output = layer.function.evaluate(a[-1], layer.weight, layer.bias)
            s.append(layer.function.saved(output))
            a.append(output[0] if isinstance(output, tuple) else output)
        C = function.evaluate(a[-1], y)  # A1: the mean of C_x

        # The output error, and the sweep back through the layers.
        grads: dict[nn.Parameter, Tensor] = {}
        grad_a = (function.nabla(a[-1], y) / len(x)).to(x.dtype)
        for ell in reversed(range(len(layers))):
            layer = layers[ell]
            delta = layer.function.gate(grad_a, s[ell])  # BP1, BP2
            _add(grads, layer.bias, delta.sum(0))  # BP3
            _add(grads, layer.weight, delta.t() @ a[ell])  # BP4
            if ell:
                grad_a = delta @ layer.weight  # BP2
    return C, {n: grads[p] for n, p in model.named_parameters() if p in grads}


def _add(grads: dict[nn.Parameter, Tensor], p: Any, grad: Tensor) -> None:
    """Add `grad` to the gradient of `p`, which several layers may share."""
    if p is not None and p.requires_grad:
        grads[p] = grads[p] + grad if p in grads else grad
