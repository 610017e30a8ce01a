"""What a trainer's state is held to before it is used, and torch's own generators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["check_state", "generator_states", "set_generator_states"]


def check_state(state: dict[str, Any], model: nn.Module) -> None:
    """Refuse what :meth:`Trainer.state_dict` would not give for such a model.

    Args:
        state: what it is to be.
        model: what it is for.

    Raises:
        ValueError, TypeError, LookupError, RuntimeError: what is wrong with it.

    Examples:
        >>> check_state([3], nn.Linear(2, 1))
        Traceback (most recent call last):
            ...
        TypeError: trainer: expected its state, got list
    """
    if not isinstance(state, dict):
        raise TypeError(f"trainer: expected its state, got {type(state).__name__}")
    epoch, best = state["epoch"], state["best"]
    if type(epoch) is not int or epoch < 0:
        raise ValueError(f"epoch: expected a number of epochs, got {epoch!r}")
    if best is not None and not _is_best(best, epoch):
        raise ValueError(
            f"best: expected (an epoch from 1 to {epoch}, two accuracies), got {best!r}"
        )
    _check_parameters(state["model"], model.state_dict())
    if not isinstance(state["engine"], dict):
        raise TypeError(f"engine: expected its state, got {state['engine']!r}")
    generators = {"trainer": state["generator"], **state.get("torch_generators", {})}
    for name, generator in generators.items():
        if not isinstance(generator, Tensor) or generator.dtype != torch.uint8:
            got = getattr(generator, "dtype", type(generator).__name__)
            raise TypeError(f"{name} generator: expected its bytes, got {got}")
        if name in ("trainer", "cpu"):
            torch.Generator("cpu").set_state(generator.cpu())


def _is_best(best: Any, epoch: int) -> bool:
    if not isinstance(best, (list, tuple)) or len(best) != 3:
        return False
    is_epoch = type(best[0]) is int and 1 <= best[0] <= epoch
    return is_epoch and all(isinstance(a, float) and 0 <= a <= 1 for a in best[1:])


def _check_parameters(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Refuse parameters of other names, shapes or dtypes, and those not finite."""
    if not isinstance(found, dict):
        raise TypeError(f"model: expected parameters, got {type(found).__name__}")
    if found.keys() != expected.keys():
        odd = ", ".join(sorted(map(str, found.keys() ^ expected.keys()))[:4])
        raise ValueError(f"model: expected other parameters, in one of both are {odd}")
    for name, there in expected.items():
        t = found[name]
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
        if (t.shape, t.dtype) != (there.shape, there.dtype):
            raise ValueError(
                f"{name}: expected {tuple(there.shape)} of {there.dtype}, "
                f"got {tuple(t.shape)} of {t.dtype}"
            )
        if not t.isfinite().all():
            raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """Of torch's own generators, which dropout and the like draw from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_generator_states(states: dict[str, Tensor], device: torch.device) -> None:
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    elif device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])
