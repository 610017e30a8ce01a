"""Time and memory of one layer, forward and backward, beside its native counterpart.

Our layer and Sequential(nn.Linear, nn.<σ>) have the same parameters. Peak bytes are
counted from the allocator's events over one forward and backward, without parameters
and input. experiments/benchmark.py prints the table.
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
from torchbp._numeric import relative_distance

# rows, n_in, n_out
SIZES = ((10, 784, 30), (128, 512, 512), (1024, 512, 512), (1024, 4096, 4096))
LAYERS = torchbp.nn.ACTIVATIONS


@dataclass(frozen=True)
class LayerTiming:
    """One layer at one size; times in microseconds, memory in bytes.

    Attributes:
        layer: its activation.
        size: rows, inputs and outputs.
        mode: "eager" or "compiled".
        native: the native layer's median time.
        ours: our layer's median time.
        median_ratio: the median of ours / native, turn by turn.
        min_ratio: the ratio of the shortest times.
        native_bytes: the native layer's peak memory; None if not measured.
        our_bytes: our layer's peak memory.
    """

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
) -> Iterator[LayerTiming]:
    """Yield a timing for each mode, size and layer.

    Args:
        sizes: (rows, n_in, n_out) each.
        modes: "eager" and "compiled", or one of them.
        repeats: turns of each timing.
        seconds: the least duration of a turn.
        device: on which the layers compute.
    """
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
) -> LayerTiming:
    """Time one layer; arguments as of :func:`measure_all`, for one of each."""
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
        # Without a reset the second size is compiled with dynamic shapes, and after
        # eight recompilations everything runs eagerly.
        torch.compiler.reset()
        variants = {key: torch.compile(m) for key, m in variants.items()}  # type: ignore[misc]
    elif device.type == "cpu":
        peaks = {key: peak_bytes(m, x, g) for key, m in variants.items()}
    passes = {k: forward_and_backward(m, x, g, parameters) for k, m in variants.items()}
    times = take_turns(passes, repeats, seconds, device)
    return LayerTiming(
        name,
        f"{n} x {n_in} -> {n_out}",
        mode,
        statistics.median(times["native"]) * 1e6,
        statistics.median(times["ours"]) * 1e6,
        *ratios(times["ours"], times["native"]),
        peaks["native"],
        peaks["ours"],
    )


def forward_and_backward(
    module: Any, x: Tensor, g: Tensor, parameters: list[nn.Parameter]
) -> Callable[[], None]:
    """Return a function that runs both passes with new gradients.

    Args:
        module: the layer.
        x: its input.
        g: the gradient of its output.
        parameters: of the layer.
    """

    def run() -> None:
        for p in parameters:
            p.grad = None
        module(x).backward(g)

    return run


def check_agreement(ours: nn.Module, native: nn.Module, x: Tensor, g: Tensor) -> None:
    """Raise AssertionError unless both layers compute the same: else their times would
    not be comparable."""
    results = []
    for module in (ours, native):
        y = module(x)
        grads = torch.autograd.grad(y, list(module.parameters()), g)
        results.append((y, *grads))
    for actual, expected in zip(*results, strict=True):
        error = relative_distance(actual, expected)
        if not error < 1e-5:
            raise AssertionError(
                f"a layer is wrong: ours and native differ by {error:.1e} (relative)"
            )


def peak_bytes(module: nn.Module, x: Tensor, g: Tensor) -> int:
    """Return the largest memory that one forward and backward allocates at once."""
    for p in module.parameters():
        p.grad = None
    module(x).backward(g)  # makes the permanent allocations
    for p in module.parameters():
        p.grad = None
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        module(x).backward(g)
    allocated = peak = 0
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    return peak


def line(row: LayerTiming) -> str:
    """Return the line of one timing in the table."""
    memory = ""
    if row.our_bytes and row.native_bytes:
        memory = f"{row.our_bytes / row.native_bytes:.3f}"
    return (
        f"{row.layer:9}{row.size:24}{row.mode:10}{row.native:11.1f}{row.ours:11.1f}"
        f"{row.median_ratio:8.3f}{row.min_ratio:8.3f}{memory:>8}"
    )
