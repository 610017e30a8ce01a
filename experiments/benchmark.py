"""Time training loops, single layers, and how a step's time grows with the sizes.

    python experiments/benchmark.py                    training loops, then layers
    python experiments/benchmark.py --what networks    the training loops alone
    python experiments/benchmark.py --what layers      the layers alone
    python experiments/benchmark.py --what scaling     over batch size, width and depth
    python experiments/benchmark.py --device cuda      on a GPU
    python experiments/benchmark.py --quick            under a minute

Everything runs in one process; the variants take turns in changing order, so that a
disturbance affects all of them. "x native" is the median over the turns of a variant's
time over native PyTorch's in the same turn, "min" the ratio of the two shortest times.
A training loop whose weights differ from native's after a short run is printed as WRONG
instead of its time. The results are written to a folder in runs/, as JSON and for
TensorBoard.

Exit status: 0; 1 a loop or a layer is wrong; 2 bad arguments or data.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # to find experiments and torchbp

from experiments.support import layer_loops
from experiments.support.options import (
    DATA_HELP,
    check_choices,
    check_least,
    option,
    run_experiment,
)
from experiments.support.timing import (
    machine,
    measure_bandwidth,
    measure_peak,
    ratios,
    take_turns,
)
from experiments.support.training_loops import (
    COMPILED,
    EXPLICIT,
    LOOPS,
    NATIVE,
    ON_ANY_DEVICE,
    Loop,
    Task,
    UnavailableError,
    Workload,
)
from torchbp import data
from torchbp._numeric import relative_distance
from torchbp._terminal import print_note
from torchbp.training import EventWriter, RunFolder, choose_device, cpu_threads

WORKLOADS = (
    Workload("nielsen", (784, 30, 10), 10, 3.0),
    Workload("hidden-100", (784, 100, 10), 10, 3.0),
    Workload("deep", (784, 30, 30, 30, 10), 10, 3.0),
    Workload("half-dense, synthetic", (784, 30, 10), 10, 3.0, is_synthetic=True),
    Workload("wide-128", (784, 512, 512, 10), 128, 0.5),
)
EXAMPLES = 10_240  # in a turn: ten to a thousand steps
# The largest relative distance of a loop's weights from native's after SHORT_RUN steps;
# right loops differ by some 1e-6, which is float32's rounding.
AGREEMENT, SHORT_RUN = 1e-4, 100
# The sizes of --what scaling; each time the others are those of [784, 100, 10] and
# batches of 10.
BATCHES = (1, 4, 16, 64, 256, 1024)
WIDTHS = (16, 64, 256, 1024)
DEPTHS = (1, 2, 4, 8, 16)
SCALED_LOOPS = (NATIVE, "BP layers", EXPLICIT)
TABLES = ("all", "networks", "layers", "scaling")


@dataclass(frozen=True)
class BenchmarkSettings:
    """What is measured, and how often; each field is an option, described by its
    help: `what`, `device`, `threads`, `no_compile`, `repeats`, `seconds`, `quick`,
    `data`, `logdir`, `name`."""

    what: str = option("all", "tables to print; all: networks and layers", TABLES)
    device: str = option("cpu", "auto: CUDA if available")
    threads: int = option(1, "CPU threads")
    no_compile: bool = option(False, "omit torch.compile, which takes most of the time")
    repeats: int = option(7, "repetitions of every timing")
    seconds: float = option(0.05, "least duration of one turn of one layer")
    quick: bool = option(False, "measure less")
    data: str | None = option(None, DATA_HELP)
    logdir: str = option("runs", "folder in which run folders are created")
    name: str | None = option(None, "name of the run folder")

    def __post_init__(self) -> None:
        check_choices(self)
        check_least(self, repeats=1, threads=1, seconds=0)


@dataclass(frozen=True)
class LoopTiming:
    """One training loop on one workload; times in microseconds per step.

    Attributes:
        workload: its name.
        loop: its name.
        median: of the turns.
        shortest: of the turns.
        median_ratio: the median of loop / native, turn by turn.
        min_ratio: the ratio of the shortest times.
        agrees: relative distance of its weights from native's after a short run; None
            for a loop with another cost.
    """

    workload: str
    loop: str
    median: float
    shortest: float
    median_ratio: float
    min_ratio: float
    agrees: float | None

    @property
    def is_wrong(self) -> bool:
        """Whether the loop computes something else than native."""
        return self.agrees is not None and not self.agrees < AGREEMENT


def main(settings: BenchmarkSettings) -> dict[str, Any]:
    """Measure, print the tables and return the content of results.json.

    Args:
        settings: what is measured.

    Raises:
        AssertionError: a layer computes something else than its native counterpart.
    """
    device = choose_device(settings.device)
    described = machine(device, settings.threads)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = RunFolder.create(settings.logdir, settings.name or f"benchmark_{stamp}")
    results: dict[str, Any] = {"machine": described, "settings": asdict(settings)}
    try:
        split = training_set(settings)
        print("   ".join(f"{key} {value}" for key, value in described.items()))
        with cpu_threads(settings.threads):
            if settings.what in ("all", "networks"):
                results["networks"] = networks(settings, split, device)
            if settings.what in ("all", "layers"):
                results["layers"] = layers(settings, device)
            if settings.what == "scaling":
                results["scaling"] = scaling(settings, split, device)
    except BaseException:
        folder.discard()
        raise
    folder.write(results=results)
    write_events(folder.path, results)
    print(f"\nwritten to {folder.path}")
    return results


def training_set(settings: BenchmarkSettings) -> data.Split:
    """Return MNIST's training set; random bytes, with a note, if it is not on disk."""
    try:
        root = settings.data
        return data.load("mnist", root, download=False).train
    except data.DataError as error:
        print_note(f"random bytes instead of MNIST: {error}")
    generator = torch.Generator("cpu").manual_seed(0)
    images = torch.randint(0, 256, (50_000, 784), generator=generator, device="cpu")
    labels = torch.randint(0, 10, (50_000,), generator=generator, device="cpu")
    return data.Split(images.to(torch.uint8), labels)


def networks(
    settings: BenchmarkSettings, split: data.Split, device: torch.device
) -> list[dict[str, Any]]:
    """Print the table of training loops; return its rows."""
    repeats = 3 if settings.quick else settings.repeats
    peak, bandwidth = measure_peak(device), measure_bandwidth(device)
    print(
        f"\n{peak / 1e9:.0f} GFLOP/s in a product of large matrices, float32; "
        f"{bandwidth / 1e9:.0f} GB/s in a copy of memory"
    )
    results = []
    for workload in WORKLOADS[:1] if settings.quick else WORKLOADS:
        torch.compiler.reset()  # else the second shape is compiled with dynamic sizes
        images = half_dense(split) if workload.is_synthetic else split
        task = on_device(workload, images, device, settings.threads)
        print(
            f"\n{workload.name}: {list(workload.sizes)}, batch {workload.batch_size}, "
            f"lr {workload.lr:g}\n{floor(task, peak, bandwidth)}\n"
            f"{'':26}{'µs/step':>10}{'min':>10}{'x native':>10}{'min':>8}  agrees"
        )
        loops = available(settings, task)
        for result in time_loops(task, loops, repeats):
            results.append(result)
            print(line(result), flush=True)
    return [asdict(r) | {"is_wrong": r.is_wrong} for r in results]


def half_dense(split: data.Split) -> data.Split:
    """Return as many random images, half of whose pixels are zero."""
    generator = torch.Generator("cpu").manual_seed(0)
    shape = split.images.shape
    images = torch.randint(1, 256, shape, generator=generator, device="cpu")
    images *= torch.randint(0, 2, shape, generator=generator, device="cpu")
    return data.Split(images.to(torch.uint8), split.labels)


def floor(task: Task, peak: float, bandwidth: float) -> str:
    """Return the line with the least work of a step and the time that it takes.

    Args:
        task: what is trained.
        peak: FLOP/s.
        bandwidth: bytes/s.
    """
    images, workload = task.data.images, task.workload
    density = images.count_nonzero().item() / images.numel()
    flops = workload.flops(density)
    read = workload.batch_size * images[0].nbytes
    return (
        f"floor: {flops / 1e6:.2f} MFLOP of the {density:.0%} of pixels that are not 0 "
        f"(all: {workload.flops() / 1e6:.2f}), {flops / peak * 1e6:.1f} µs; "
        f"{read / 1e3:.0f} kB of images, {read / bandwidth * 1e6:.1f} µs"
    )


def on_device(
    workload: Workload, split: data.Split, device: torch.device, threads: int
) -> Task:
    """Return the task of a workload, its data moved to the device."""
    moved = data.Split(*(t.to(device) for t in split))
    return Task(workload, moved, device, threads)


def available(settings: BenchmarkSettings, task: Task) -> dict[str, Loop]:
    """Return the loops that can run; print which cannot, and why."""
    loops = {}
    for name, make in LOOPS.items():
        if task.device.type != "cpu" and name not in ON_ANY_DEVICE:
            continue
        if name in COMPILED and (settings.quick or settings.no_compile):
            continue
        try:
            loops[name] = make(task)
        except UnavailableError as reason:
            print(f"{name:26}skipped: {reason}")
    return loops


def time_loops(
    task: Task, loops: dict[str, Loop], repeats: int
) -> Iterator[LoopTiming]:
    """Compare the loops with native on the same batches, then time them in turns.

    Args:
        task: what is trained.
        loops: by name, native among them.
        repeats: turns of each.
    """
    m, device = task.workload.batch_size, task.device
    generator = torch.Generator("cpu").manual_seed(0)
    n = len(task.data.labels)
    order = torch.randperm(n, generator=generator, device="cpu").to(device)
    steps = min(SHORT_RUN, len(order) // m)
    for loop in loops.values():
        loop.run(order[: steps * m])
    expected = loops[NATIVE].weights()
    assert expected is not None
    weights = {name: loop.weights() for name, loop in loops.items()}
    agrees = {
        name: None if ours is None else relative_distance(ours, expected)
        for name, ours in weights.items()
    }
    steps = max(1, min(EXAMPLES, len(order)) // m)
    calls: dict[str, Callable[[], None]] = {
        name: lambda loop=loop: loop.run(order[: steps * m])  # type: ignore[misc]
        for name, loop in loops.items()
    }
    times = take_turns(calls, repeats, 0, device)
    for name in loops:
        yield LoopTiming(
            task.workload.name,
            name,
            statistics.median(times[name]) / steps * 1e6,
            min(times[name]) / steps * 1e6,
            *ratios(times[name], times[NATIVE]),
            agrees[name],
        )


def line(result: LoopTiming) -> str:
    """Return the line of one loop in the table."""
    if result.is_wrong:
        return f"{result.loop:26}WRONG: its weights differ by {result.agrees:.0e}"
    agrees = "other cost" if result.agrees is None else f"{result.agrees:.0e}"
    if result.loop == NATIVE:
        agrees = ""
    return (
        f"{result.loop:26}{result.median:10.1f}{result.shortest:10.1f}"
        f"{result.median_ratio:10.3f}{result.min_ratio:8.3f}  {agrees}"
    )


def layers(settings: BenchmarkSettings, device: torch.device) -> list[dict[str, Any]]:
    """Print the table of single layers; return its rows."""
    sizes = layer_loops.SIZES[:2] if settings.quick else layer_loops.SIZES
    eager_only = settings.quick or settings.no_compile
    modes = ("eager",) if eager_only else ("eager", "compiled")
    repeats = settings.repeats if settings.quick else 2 * settings.repeats + 1
    print(f"\n{layer_loops.HEADER}")
    rows = []
    for row in layer_loops.measure_all(sizes, modes, repeats, settings.seconds, device):
        rows.append(asdict(row))
        print(layer_loops.line(row), flush=True)
    return rows


def scaling(
    settings: BenchmarkSettings, split: data.Split, device: torch.device
) -> dict[str, Any]:
    """Print and return how the time of a step grows with batch size, width and depth:
    the exponent p of time ~ size^p over the upper half of the sizes."""
    repeats = 3 if settings.quick else settings.repeats
    workloads: dict[str, list[tuple[int, Workload]]] = {
        "batch size": [
            (m, Workload("", (784, 100, 10), m, 0.5))
            for m in (BATCHES[::2] if settings.quick else BATCHES)
        ],
        "hidden neurons": [
            (n, Workload("", (784, n, 10), 10, 0.5))
            for n in (WIDTHS[::2] if settings.quick else WIDTHS)
        ],
        "hidden layers": [
            (k, Workload("", (784, *[100] * k, 10), 10, 0.5))
            for k in (DEPTHS[::2] if settings.quick else DEPTHS)
        ],
    }
    results: dict[str, Any] = {}
    for what, cases in workloads.items():
        times: dict[str, list[float]] = {name: [] for name in SCALED_LOOPS}
        print(f"\nµs/step{what:>17}" + "".join(f"{size:>10}" for size, _ in cases))
        for _, workload in cases:
            task = on_device(workload, split, device, settings.threads)
            loops = {name: LOOPS[name](task) for name in SCALED_LOOPS}
            for result in time_loops(task, loops, repeats):
                microseconds = math.nan if result.is_wrong else result.median
                times[result.loop].append(microseconds)
        sizes = [size for size, _ in cases]
        exponents = {name: growth_exponent(sizes, t) for name, t in times.items()}
        for name, values in times.items():
            shown = "".join(
                f"{'WRONG' if math.isnan(value) else f'{value:.1f}':>10}"
                for value in values
            )
            print(f"{name:24}{shown}   ~ size^{exponents[name]:.2f} at the end")
        results[what] = {"sizes": sizes, "times": times, "exponents": exponents}
    return results


def growth_exponent(sizes: list[int], times: list[float]) -> float:
    """Return p of time ~ size^p over the upper half of the sizes, at least two."""
    first = min(len(sizes) // 2, len(sizes) - 2)
    x, y = ([math.log(v) for v in values[first:]] for values in (sizes, times))
    return statistics.linear_regression(x, y).slope


def write_events(folder: Path, results: dict[str, Any]) -> None:
    """Write the figures of results.json for TensorBoard."""
    with EventWriter(folder) as writer:
        described = "\n".join(f"    {k}: {v}" for k, v in results["machine"].items())
        writer.add_text("machine", described, 0)
        for row in results.get("networks", []):
            if not row["is_wrong"]:
                tag = f"{row['workload']}/{row['loop']}"
                writer.add_scalar(f"us_per_step/{tag}", row["median"], 0)
                writer.add_scalar(f"x_native/{tag}", row["median_ratio"], 0)
        for row in results.get("layers", []):
            tag = f"{row['size']}/{row['layer']} {row['mode']}"
            writer.add_scalar(f"layer_x_native/{tag}", row["median_ratio"], 0)
        for what, growth in results.get("scaling", {}).items():
            for name, times in growth["times"].items():
                for size, value in zip(growth["sizes"], times, strict=True):
                    tag = f"us_per_step_over_{what.replace(' ', '_')}/{name}"
                    writer.add_scalar(tag, value, size)


def has_wrong(results: dict[str, Any]) -> bool:
    """Return whether a training loop computed something else."""
    scaled = results.get("scaling", {}).values()
    return any(row["is_wrong"] for row in results.get("networks", [])) or any(
        math.isnan(value)
        for growth in scaled
        for times in growth["times"].values()
        for value in times
    )


def command_line(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status.

    Args:
        arguments: of the command line; those of the process if None.
    """
    return run_experiment(
        main,
        BenchmarkSettings,
        __doc__,
        arguments,
        lambda results: int(has_wrong(results)),
        statuses={AssertionError: 1},
    )


if __name__ == "__main__":
    sys.exit(command_line())
