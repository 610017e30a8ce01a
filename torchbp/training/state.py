"""Checks of a trainer's saved state, and the states of torch's generators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["check_state", "generator_states", "set_generator_states"]


def check_state(state: dict[str, Any], model: nn.Module) -> None:
    """Raise an error unless `state` is from :meth:`Trainer.state_dict` for `model`.

    Args:
        state: the state of a trainer.
        model: a network of the same structure as the trainer's.

    Raises:
        ValueError, TypeError, LookupError, RuntimeError: `state` is not.

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
    """Return whether `best` is an epoch up to `epoch` and two accuracies."""
    if not isinstance(best, (list, tuple)) or len(best) != 3:
        return False
    is_epoch = type(best[0]) is int and 1 <= best[0] <= epoch
    return is_epoch and all(isinstance(a, float) and 0 <= a <= 1 for a in best[1:])


def _check_parameters(saved: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise an error unless the saved parameters are finite and have the expected
    names, shapes and dtypes."""
    if not isinstance(saved, dict):
        raise TypeError(f"model: expected parameters, got {type(saved).__name__}")
    if saved.keys() != expected.keys():
        names = ", ".join(sorted(map(str, saved.keys() ^ expected.keys()))[:4])
        raise ValueError(f"model: expected other parameters, only one side has {names}")
    for name, parameter in expected.items():
        t = saved[name]
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
        if (t.shape, t.dtype) != (parameter.shape, parameter.dtype):
            raise ValueError(
                f"{name}: expected {tuple(parameter.shape)} of {parameter.dtype}, "
                f"got {tuple(t.shape)} of {t.dtype}"
            )
        if not t.isfinite().all():
            raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """Return the states of torch's own generators, which modules such as dropout use.

    Args:
        device: of the training.

    Examples:
        >>> list(generator_states(torch.device("cpu")))
        ['cpu']
    """
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_generator_states(states: dict[str, Tensor], device: torch.device) -> None:
    """Restore the `states` from :func:`generator_states` that `device` has.

    Args:
        states: by the kind of device.
        device: of the training.

    Examples:
        >>> states = generator_states(torch.device("cpu"))
        >>> before = torch.rand(2)
        >>> set_generator_states(states, torch.device("cpu"))
        >>> torch.equal(torch.rand(2), before)
        True
    """
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    elif device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])
