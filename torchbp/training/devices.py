"""The device of a training, and its number of CPU threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["choose_device", "cpu_threads"]


def choose_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" is CUDA if available, else the CPU.

    Args:
        name: "auto", "cpu", "cuda" or "mps".

    Raises:
        ValueError: the device is not available.

    Examples:
        >>> choose_device("cpu")
        device(type='cpu')
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    is_available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not is_available.get(name):
        available = ", ".join(key for key, value in is_available.items() if value)
        raise ValueError(f"device: expected one of {available}, got {name!r}")
    return torch.device(name)


@contextmanager
def cpu_threads(number: int) -> Iterator[None]:
    """Run a block with `number` CPU threads, and restore the number before it.

    Args:
        number: of threads within an operation, at least 1.

    Examples:
        >>> with cpu_threads(1):
        ...     torch.get_num_threads()
        1
    """
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
