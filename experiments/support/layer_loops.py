"""One layer, forward and backward, beside its native counterpart.

A row is one of our layers against Sequential(nn.Linear, nn.<σ>) on the same parameters.
Peak bytes are counted from the allocator's own events over one forward and backward,
parameters and input left out. experiments/benchmark.py runs this; it is no program.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import torchbp
from experiments.support.timing import ratios, take_turns

# rows, n_in, n_out
SIZES = ((10, 784, 30), (128, 512, 512), (1024, 512, 512), (1024, 4096, 4096))
LAYERS = torchbp.nn.ACTIVATIONS


@dataclass(frozen=True)
class Row:
    """One layer at one size; times in microseconds, memory in bytes."""

    layer: str
    size: str
    mode: str
    native: float
    ours: float
    median_ratio: float
    min_ratio: float
    native_bytes: int | None
    our_bytes: int | None


HEADER = (
    f"{'layer':9}{'rows x n_in -> n_out':24}{'mode':10}{'native µs':>11}"
    f"{'ours µs':>11}{'ratio':>8}{'min':>8}{'bytes':>8}"
)


def measure_all(
    sizes: Sequence[tuple[int, int, int]],
    modes: Sequence[str],
    repeats: int,
    seconds: float,
    device: torch.device,
) -> Iterator[Row]:
    """A row for each mode ("eager", "compiled"), size and layer."""
    for mode in modes:
        for size in sizes:
            for name in LAYERS:
                yield measure(name, size, mode, repeats, seconds, device)


def measure(
    name: str,
    size: tuple[int, int, int],
    mode: str,
    repeats: int,
    seconds: float,
    device: torch.device,
) -> Row:
    """One row of the table."""
    n, n_in, n_out = size
    torch.manual_seed(0)
    ours: nn.Module = LAYERS[name](n_in, n_out, device=device, dtype=torch.float32)
    native = torchbp.to_native(ours)
    x = torch.rand(n, n_in, device=device, dtype=torch.float32)
    g = torch.rand(n, n_out, device=device, dtype=torch.float32)
    check_agreement(ours, native, x, g)
    parameters = list(ours.parameters())
    variants = {"native": native, "ours": ours}
    peaks: dict[str, int | None] = dict.fromkeys(variants)
    if mode == "compiled":
        # Else the second size is compiled with dynamic shapes, and from the eighth
        # recompilation on everything runs eagerly.
        torch.compiler.reset()
        variants = {key: torch.compile(m) for key, m in variants.items()}  # type: ignore[misc]
    elif device.type == "cpu":
        peaks = {key: peak_bytes(m, x, g) for key, m in variants.items()}
    steps = {key: step(m, x, g, parameters) for key, m in variants.items()}
    times = take_turns(steps, repeats, seconds, device)
    return Row(
        name,
        f"{n} x {n_in} -> {n_out}",
        mode,
        statistics.median(times["native"]) * 1e6,
        statistics.median(times["ours"]) * 1e6,
        *ratios(times["ours"], times["native"]),
        peaks["native"],
        peaks["ours"],
    )


def step(
    module: Any, x: Tensor, g: Tensor, parameters: list[nn.Parameter]
) -> Callable[[], None]:
    """Forward and backward, with fresh gradients."""

    def run() -> None:
        for p in parameters:
            p.grad = None
        module(x).backward(g)

    return run


def check_agreement(ours: nn.Module, native: nn.Module, x: Tensor, g: Tensor) -> None:
    """A variant that computes something else would not be worth timing."""
    results = []
    for module in (ours, native):
        y = module(x)
        grads = torch.autograd.grad(y, list(module.parameters()), g)
        results.append((y.detach(), *grads))
    for a, b in zip(*results, strict=True):
        error = ((a - b).norm() / b.norm()).item()
        if not error < 1e-5:
            raise AssertionError(f"ours and native differ by {error:.1e} (relative)")


def peak_bytes(module: nn.Module, x: Tensor, g: Tensor) -> int:
    """The most that one forward and backward holds at once beyond what was there."""
    for p in module.parameters():
        p.grad = None
    module(x).backward(g)  # whatever is allocated once and for all
    for p in module.parameters():
        p.grad = None
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        module(x).backward(g)
    held = peak = 0
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def line(row: Row) -> str:
    memory = ""
    if row.our_bytes and row.native_bytes:
        memory = f"{row.our_bytes / row.native_bytes:.3f}"
    return (
        f"{row.layer:9}{row.size:24}{row.mode:10}{row.native:11.1f}{row.ours:11.1f}"
        f"{row.median_ratio:8.3f}{row.min_ratio:8.3f}{memory:>8}"
    )
