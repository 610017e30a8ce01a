"""The model's parameters as the steps work on them: in place, or packed.

A single step works on the parameters in place. The steps of an epoch work on a copy in
which b is the last column of W and rows start at multiples of 64 bytes, for the reasons
in :mod:`torchbp.explicit.steps`. The copy goes back to the parameters at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchbp.explicit.steps import Unit, memory_key, padded_width
from torchbp.nn import BPLinear


def place_of(layer: BPLinear) -> tuple[Any, ...]:
    """Return the cache key of a layer's own parameters; (None,), which no cached steps
    have, if they are computed from others."""
    parameters = layer._parameters  # looked up in a third of the time of layer.weight
    W, b = parameters.get("weight"), parameters.get("bias")
    if W is None:
        return (None,)
    return memory_key(W, b, W.requires_grad, b is not None and b.requires_grad)


def in_place(layers: Sequence[BPLinear]) -> list[Unit]:
    """Return units on the parameters themselves."""
    return [
        Unit(
            layer.function,
            layer.weight.detach(),
            None if layer.bias is None else layer.bias.detach(),
            None,
            *_trained(layer),
        )
        for layer in layers
    ]


class PackedParameters:
    """The copy of the parameters that an epoch's steps work on.

    Attributes:
        matrices: one for each layer, (n_out, n_in + 1 and padding); made at the first
            call, and again when sizes, dtype or device have changed.
    """

    def __init__(self) -> None:
        self.matrices: list[Tensor] = []

    def copy_from(self, layers: Sequence[BPLinear]) -> list[Unit]:
        """Copy the parameters of `layers`, and return units on the copy."""
        weights = [layer.weight for layer in layers]
        wanted = [
            ((len(W), padded_width(W.shape[1] + 1, W.dtype)), W.dtype, W.device)
            for W in weights
        ]
        if wanted != [(tuple(M.shape), M.dtype, M.device) for M in self.matrices]:
            self.matrices = [
                torch.zeros(shape, dtype=dtype, device=device)
                for shape, dtype, device in wanted
            ]
        units = []
        for matrix, layer in zip(self.matrices, layers, strict=True):
            n_in = layer.weight.shape[1]
            W, b, folded = matrix[:, :n_in], matrix[:, n_in], matrix[:, : n_in + 1]
            W.copy_(layer.weight)
            b.copy_(layer.bias) if layer.bias is not None else b.zero_()
            units.append(Unit(layer.function, W, b, folded, *_trained(layer)))
        return units


def copy_back(units: Sequence[Unit], layers: Sequence[BPLinear]) -> None:
    """Copy the trained parameters from packed `units` to their `layers`."""
    for unit, layer in zip(units, layers, strict=True):
        with torch.inference_mode(layer.weight.is_inference()), torch.no_grad():
            if unit.updates_weight:
                layer.weight.copy_(unit.W)
            if unit.updates_bias and unit.b is not None:
                layer.bias.copy_(unit.b)


def _trained(layer: BPLinear) -> tuple[bool, bool]:
    """Return whether W is trained, and whether b is."""
    b: Any = layer.bias
    return layer.weight.requires_grad, b is not None and b.requires_grad
