"""How the benchmarks time: in turns, so that a disturbance meets all variants."""

from __future__ import annotations

import importlib
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch

import torchbp

PEERS = ("numpy", "jax", "sklearn", "torchvision")


def take_turns(
    steps: dict[str, Callable[[], None]],
    repeats: int,
    seconds: float,
    device: torch.device,
) -> dict[str, list[float]]:
    """Seconds a call, of every variant, in each of `repeats` turns.

    Args:
        steps: the variants.
        repeats: turns of each.
        seconds: of one turn, at the least; the slowest variant decides how many calls
            that is. 0 for one call.
    """

    def timed(run: Callable[[], None], calls: int) -> float:
        synchronize(device)
        started = time.perf_counter()
        for _ in range(calls):
            run()
        synchronize(device)
        return (time.perf_counter() - started) / calls

    slowest = 0.0
    for run in steps.values():
        run()  # compiles, allocates
        if seconds:
            slowest = max(slowest, min(timed(run, 1) for _ in range(3)))
    calls = max(1, round(seconds / slowest)) if seconds else 1
    times: dict[str, list[float]] = {key: [] for key in steps}
    for turn in range(repeats):
        # The order changes every turn: whoever comes second finds warm caches.
        for key in list(steps)[:: 1 if turn % 2 else -1]:
            times[key].append(timed(steps[key], calls))
    return times


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def ratios(times: list[float], base: list[float]) -> tuple[float, float]:
    """The median over the turns of times / base, and the ratio of the shortest."""
    pairs = zip(times, base, strict=True)
    return statistics.median(a / b for a, b in pairs), min(times) / min(base)


def machine(device: torch.device, number_of_threads: int) -> dict[str, str]:
    """What the figures hold for."""
    on_cuda = device.type == "cuda"
    return {
        "torchbp": torchbp.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "processor": processor(),
        **{name: version(name) for name in PEERS if find_spec(name) is not None},
        "cores": str(os.cpu_count()),
        "device": torch.cuda.get_device_name(device) if on_cuda else device.type,
        "threads": str(number_of_threads),
    }


def version(module: str) -> str:
    return str(getattr(importlib.import_module(module), "__version__", "?"))


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
