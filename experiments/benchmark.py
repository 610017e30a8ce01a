"""How fast the hand-written layers are beside native ones, and what memory they take.

    python experiments/benchmark.py                    every size and layer, eager
    python experiments/benchmark.py --compiled         torch.compile on both sides, too
    python experiments/benchmark.py --device cuda      on a GPU
    python experiments/benchmark.py --quick            under a minute

A row is one layer, forward and backward, against Sequential(nn.Linear, nn.<σ>) on the
same parameters in the same process. The variants take turns, so that whatever slows the
machine down slows both; a ratio is the median over the turns of ours / native, and min
is the ratio of the two shortest times. Peak bytes are counted from the allocator's own
events over one forward and backward, parameters and input left out.

Exit status: 0, or 2 for bad arguments.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import torchbp
from torchbp.trainer import choose_device

# rows, n_in, n_out
SIZES = ((10, 784, 30), (128, 512, 512), (1024, 512, 512), (1024, 4096, 4096))
LAYERS = {
    "linear": torchbp.BPLinear,
    "sigmoid": torchbp.BPLinearSigmoid,
    "tanh": torchbp.BPLinearTanh,
    "relu": torchbp.BPLinearReLU,
}


@dataclass(frozen=True)
class Settings:
    """What is measured, and how often."""

    what: str = "layers"
    device: str = "cpu"
    threads: int = 1
    compiled: bool = False
    repeats: int = 15
    seconds: float = 0.05  # of one turn of one variant, at the least
    quick: bool = False

    def __post_init__(self) -> None:
        if self.repeats < 1 or self.threads < 1:
            raise ValueError(
                f"repeats, threads: expected at least 1, got {self.repeats} and "
                f"{self.threads}"
            )


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


def main(settings: Settings) -> list[Row]:
    """Measure, print the table as it grows, and return its rows."""
    device = choose_device(settings.device)
    print(
        f"torchbp {torchbp.__version__}   torch {torch.__version__}   "
        f"python {platform.python_version()}   {platform.machine()}   {device}   "
        f"{settings.threads} thread(s)   {settings.repeats} repeats   float32"
    )
    print(
        f"{'layer':9}{'rows x n_in -> n_out':24}{'mode':10}{'native µs':>11}"
        f"{'ours µs':>11}{'ratio':>8}{'min':>8}{'bytes':>8}"
    )
    rows = []
    sizes = SIZES[:2] if settings.quick else SIZES
    modes = ("eager", "compiled") if settings.compiled else ("eager",)
    with threads(settings.threads):
        for mode in modes:
            for size in sizes:
                for name in LAYERS:
                    row = measure(settings, name, size, mode, device)
                    rows.append(row)
                    print(line(row), flush=True)
    return rows


def measure(
    settings: Settings,
    name: str,
    size: tuple[int, int, int],
    mode: str,
    device: torch.device,
) -> Row:
    """One row of the table."""
    n, n_in, n_out = size
    torch.manual_seed(0)
    ours: nn.Module = LAYERS[name](n_in, n_out, device=device)
    native = torchbp.to_native(ours)
    x, g = torch.rand(n, n_in, device=device), torch.rand(n, n_out, device=device)
    check_agreement(ours, native, x, g)
    parameters = list(ours.parameters())
    variants = {"native": native, "ours": ours}
    peaks: dict[str, int | None] = dict.fromkeys(variants)
    if mode == "compiled":
        variants = {key: torch.compile(m) for key, m in variants.items()}  # type: ignore[misc]
    elif device.type == "cpu":
        peaks = {key: peak_bytes(m, x, g) for key, m in variants.items()}
    steps = {key: step(m, x, g, parameters) for key, m in variants.items()}
    times = take_turns(steps, settings.repeats, settings.seconds, device)
    pairs = zip(times["ours"], times["native"], strict=True)
    return Row(
        name,
        f"{n} x {n_in} -> {n_out}",
        mode,
        statistics.median(times["native"]) * 1e6,
        statistics.median(times["ours"]) * 1e6,
        statistics.median(a / b for a, b in pairs),
        min(times["ours"]) / min(times["native"]),
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


def take_turns(
    steps: dict[str, Callable[[], None]],
    repeats: int,
    seconds: float,
    device: torch.device,
) -> dict[str, list[float]]:
    """Seconds a call, of every variant, in each of `repeats` turns."""

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
        slowest = max(slowest, min(timed(run, 1) for _ in range(3)))
    calls = max(1, round(seconds / slowest))
    times: dict[str, list[float]] = {key: [] for key in steps}
    for turn in range(repeats):
        # The order changes every turn: whoever comes second finds warm caches.
        for key in list(steps)[:: 1 if turn % 2 else -1]:
            times[key].append(timed(steps[key], calls))
    return times


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


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


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def line(row: Row) -> str:
    memory = ""
    if row.our_bytes and row.native_bytes:
        memory = f"{row.our_bytes / row.native_bytes:.3f}"
    return (
        f"{row.layer:9}{row.size:24}{row.mode:10}{row.native:11.1f}{row.ours:11.1f}"
        f"{row.median_ratio:8.3f}{row.min_ratio:8.3f}{memory:>8}"
    )


def command_line(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog=(__doc__ or "").partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = Settings()
    parser.add_argument("--what", choices=("layers",), default=default.what)
    parser.add_argument("--device", default=default.device)
    parser.add_argument("--threads", type=int, default=default.threads)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--repeats", type=int, default=default.repeats)
    parser.add_argument("--seconds", type=float, default=default.seconds)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", metavar="FILE", help="write the rows there, too")
    given = vars(parser.parse_args(arguments))
    file = given.pop("json")
    try:
        rows = main(Settings(**given))
        if file is not None:
            with open(file, "w", encoding="utf-8") as stream:
                json.dump([asdict(row) for row in rows], stream, indent=2)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(command_line())
