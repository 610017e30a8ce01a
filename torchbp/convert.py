"""Between our layers and native ones, both ways; parameters are kept by identity."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

from torch import nn

from torchbp.nn import MLP, BPLinear, BPLinearReLU, BPLinearSigmoid, BPLinearTanh

__all__ = ["from_native", "to_native"]

_M = TypeVar("_M", bound=nn.Module)

_NATIVE: dict[type[BPLinear], type[nn.Module] | None] = {
    BPLinear: None,
    BPLinearSigmoid: nn.Sigmoid,
    BPLinearTanh: nn.Tanh,
    BPLinearReLU: nn.ReLU,
}
_OURS = {native: ours for ours, native in _NATIVE.items() if native is not None}


def to_native(model: nn.Module) -> nn.Module:
    """The same network of ``nn.Linear`` and activation modules, sharing its parameters.

    Args:
        model: any module; it is left as it is. An :class:`torchbp.MLP` becomes one flat
            ``nn.Sequential(Linear, Sigmoid, ...)``; inside another ``nn.Sequential``
            each of our layers becomes two entries, elsewhere a small ``nn.Sequential``.

    Raises:
        ValueError: a layer from ``define_layer``, which has no native counterpart.
    """
    return _convert(model, _layer_to_native, _sequence_to_native, {})


def from_native(model: nn.Module) -> nn.Module:
    """The same network of our layers, sharing its parameters.

    Args:
        model: any module; it is left as it is. Every ``nn.Linear`` becomes a
            :class:`torchbp.BPLinear`; with an ``nn.Sigmoid``, ``nn.Tanh`` or
            ``nn.ReLU`` right behind it in the same ``nn.Sequential`` the two become one
            layer.
    """
    return _convert(model, _layer_from_native, _sequence_from_native, {})


def _convert(
    module: nn.Module,
    convert_layer: Callable[[nn.Module], nn.Module | None],
    convert_sequence: Callable[[list[nn.Module]], list[nn.Module]],
    done: dict[int, nn.Module],
) -> nn.Module:
    """`module` with every layer converted; one that stands in two places stays one."""
    if id(module) in done:
        return done[id(module)]
    if isinstance(module, MLP) and convert_layer is _layer_to_native:
        result: nn.Module = nn.Sequential(*convert_sequence(list(module.layers)))
    elif (converted := convert_layer(module)) is not None:
        result = converted
    else:
        result = _shallow(module, type(module))
        if type(module) is nn.Sequential:
            children = convert_sequence(list(module))
            result._modules = {str(i): child for i, child in enumerate(children)}
        done[id(module)] = result
        for name, child in result._modules.items():
            if child is not None:
                result._modules[name] = _convert(
                    child, convert_layer, convert_sequence, done
                )
    done[id(module)] = result
    return result


def _shallow(module: nn.Module, cls: type[_M]) -> _M:
    """A module of class `cls` with the state of `module`: its parameters, buffers and
    children are the same objects, the dictionaries that hold them are not."""
    result = copy.copy(module)
    result.__dict__ = {
        key: value.copy() if isinstance(value, (dict, set)) else value
        for key, value in module.__dict__.items()
    }
    result.__class__ = cls
    return result  # type: ignore[return-value]


def _pair_to_native(layer: BPLinear) -> list[nn.Module]:
    """nn.Linear, and the activation unless it is the identity."""
    if type(layer) not in _NATIVE:
        raise ValueError(
            f"to_native: expected layers with a native counterpart, "
            f"got {type(layer).__name__}"
        )
    activation = _NATIVE[type(layer)]
    linear = _shallow(layer, nn.Linear)
    return [linear] if activation is None else [linear, activation()]


def _layer_to_native(module: nn.Module) -> nn.Module | None:
    if not isinstance(module, BPLinear):
        return None
    pair = _pair_to_native(module)
    return pair[0] if len(pair) == 1 else nn.Sequential(*pair)


def _sequence_to_native(children: list[nn.Module]) -> list[nn.Module]:
    result: list[nn.Module] = []
    for child in children:
        is_ours = isinstance(child, BPLinear)
        result += _pair_to_native(child) if is_ours else [child]  # type: ignore[arg-type]
    return result


def _layer_from_native(module: nn.Module) -> nn.Module | None:
    return _shallow(module, BPLinear) if type(module) is nn.Linear else None


def _sequence_from_native(children: list[nn.Module]) -> list[nn.Module]:
    result: list[nn.Module] = []
    for child in children:
        before = result[-1] if result else None
        if type(before) is nn.Linear and type(child) in _OURS:
            result[-1] = _shallow(before, _OURS[type(child)])
        else:
            result.append(child)
    return result
