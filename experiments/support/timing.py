"""How the benchmarks time: in turns, so that a disturbance affects all variants."""

from __future__ import annotations

import importlib
import math
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
    variants: dict[str, Callable[[], None]],
    repeats: int,
    seconds: float,
    device: torch.device,
) -> dict[str, list[float]]:
    """Return the seconds that a call of each variant takes in each of `repeats` turns.

    Args:
        variants: the functions to time, by name.
        repeats: turns of each.
        seconds: the least duration of a turn, from which the slowest variant's time
            determines the number of calls; 0 for one call.
        device: on which the variants compute.
    """

    def timed(run: Callable[[], None], calls: int) -> float:
        synchronize(device)
        started = time.perf_counter()
        for _ in range(calls):
            run()
        synchronize(device)
        return (time.perf_counter() - started) / calls

    slowest = 0.0
    for run in variants.values():
        run()  # compiles and allocates
        if seconds:
            slowest = max(slowest, min(timed(run, 1) for _ in range(3)))
    calls = max(1, round(seconds / slowest)) if seconds else 1
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in range(repeats):
        # The order changes every turn, since the second variant finds warm caches.
        for name in list(variants)[:: 1 if turn % 2 else -1]:
            times[name].append(timed(variants[name], calls))
    return times


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


def ratios(times: list[float], base: list[float]) -> tuple[float, float]:
    """Return the median over the turns of times / base, and the ratio of the minima."""
    pairs = zip(times, base, strict=True)
    return statistics.median(a / b for a, b in pairs), min(times) / min(base)


def shortest_time(
    run: Callable[[], object], repeats: int, device: torch.device
) -> float:
    """Return the seconds of the fastest of several calls."""
    shortest = math.inf
    for _ in range(repeats):
        synchronize(device)
        started = time.perf_counter()
        run()
        synchronize(device)
        shortest = min(shortest, time.perf_counter() - started)
    return shortest


def measure_peak(device: torch.device) -> float:
    """Return the FLOP/s of a product of large float32 matrices."""
    n = 1024 if device.type == "cpu" else 8192
    a, b = torch.rand(2, n, n, device=device, dtype=torch.float32)
    out = torch.empty_like(a)
    return 2 * n**3 / shortest_time(lambda: torch.mm(a, b, out=out), 10, device)


def measure_bandwidth(device: torch.device) -> float:
    """Return the bytes read per second while memory is copied."""
    source = torch.zeros(64_000_000, device=device, dtype=torch.uint8)
    target = torch.zeros_like(source)
    return source.nbytes / shortest_time(lambda: target.copy_(source), 5, device)


def machine(device: torch.device, number_of_threads: int) -> dict[str, str]:
    """Return the versions and the hardware for which measured times hold."""
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
    """Return a module's version, or "?"."""
    return str(getattr(importlib.import_module(module), "__version__", "?"))


def processor() -> str:
    """Return the processor's name, or its architecture if the system hides the name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
