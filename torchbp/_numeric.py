"""The relative distance of tensors, central differences, and the dtype of long sums."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value", float, Tensor)


def relative_distance(
    actual: Tensor | Iterable[Tensor], expected: Tensor | Iterable[Tensor]
) -> float:
    """Return ‖actual - expected‖ / ‖expected‖ over all entries together.

    Args:
        actual: a tensor, or several that count as one.
        expected: what `actual` should be, in the same form.

    Examples:
        >>> relative_distance(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0]))
        0.20000000298023224
    """
    a, b = _flatten(actual), _flatten(expected)
    return ((a - b).norm() / b.norm()).item()


def _flatten(tensors: Tensor | Iterable[Tensor]) -> Tensor:
    """Return all entries of one tensor or of several, 1-d on the CPU."""
    several = [tensors] if isinstance(tensors, Tensor) else tensors
    return torch.cat([t.detach().flatten().cpu() for t in several])


def central_difference(f: Callable[[float], Value], epsilon: float) -> Value:
    """Return (f(ε) - f(-ε)) / 2ε, the slope of `f` at 0.

    Args:
        f: called with ε and then with -ε.
        epsilon: ε.

    Examples:
        >>> central_difference(lambda t: (1 + t) ** 2, 0.25)
        2.0
    """
    return (f(epsilon) - f(-epsilon)) / (2 * epsilon)


def summing_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype for sums over many examples: float64 where the device has it.

    Args:
        device: that of the sums.

    Examples:
        >>> summing_dtype(torch.device("cpu"))
        torch.float64
    """
    return torch.float32 if device.type == "mps" else torch.float64
