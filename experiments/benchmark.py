"""How fast: training loops, layers, and how the cost of a step grows.

    python experiments/benchmark.py                    training loops, then layers
    python experiments/benchmark.py --what networks    the training loops alone
    python experiments/benchmark.py --what layers      the layers alone
    python experiments/benchmark.py --what sweeps      over batch size, width and depth
    python experiments/benchmark.py --device cuda      on a GPU
    python experiments/benchmark.py --quick            under a minute

Everything runs in one process; the variants take turns, in changing order, so that what
slows the machine down meets them all. x native is the median over the turns of the time
beside native PyTorch's in the same turn, and min the ratio of the two shortest times. A
training loop whose weights are not native's after a short run is printed as WRONG, not
as fast. The table, as JSON and for TensorBoard, goes to a folder in runs/.

Exit status: 0, 1 if a loop was wrong, 2 for bad arguments or data.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the files beside this one

from experiments.support import layer_loops as layer_benchmark
from experiments.support.timing import machine, ratios, synchronize, take_turns
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
from torchbp._terminal import Parser
from torchbp.training import EventWriter, RunFolder, choose_device, cpu_threads

WORKLOADS = (
    Workload("nielsen", (784, 30, 10), 10, 3.0),
    Workload("hidden-100", (784, 100, 10), 10, 3.0),
    Workload("deep", (784, 30, 30, 30, 10), 10, 3.0),
    Workload("half-dense, synthetic", (784, 30, 10), 10, 3.0, is_synthetic=True),
    Workload("wide-128", (784, 512, 512, 10), 128, 0.5),
)
EXAMPLES = 10_240  # in a turn: ten to a thousand steps
# Beside native after a short run; float32 runs part by some 1e-6 of their weights then.
AGREEMENT, SHORT_RUN = 1e-4, 100
# What is swept, with the others as in [784, 100, 10] at batches of 10.
BATCHES = (1, 4, 16, 64, 256, 1024)
WIDTHS = (16, 64, 256, 1024)
DEPTHS = (1, 2, 4, 8, 16)
SWEPT = (NATIVE, "BP layers", EXPLICIT)


@dataclass(frozen=True)
class Settings:
    """What is measured, and how often."""

    what: str = "all"
    device: str = "cpu"
    threads: int = 1
    compiled: bool = True
    repeats: int = 7
    seconds: float = 0.05  # of one turn of one layer, at the least
    quick: bool = False
    data: str | None = None
    logdir: str = "runs"
    name: str | None = None

    def __post_init__(self) -> None:
        if self.what not in WHAT:
            raise ValueError(f"what: expected one of {WHAT}, got {self.what!r}")
        if self.repeats < 1 or self.threads < 1:
            raise ValueError(
                f"repeats, threads: expected at least 1, got {self.repeats} and "
                f"{self.threads}"
            )


WHAT = ("all", "networks", "layers", "sweeps")


@dataclass(frozen=True)
class Result:
    """One training loop on one workload; times in microseconds a step.

    `agrees` is the relative distance of its weights from native's after a short run,
    None where it cannot be compared.
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
        return self.agrees is not None and not self.agrees < AGREEMENT


def main(settings: Settings) -> dict[str, Any]:
    """Measure, print the tables as they grow, and return what is in results.json."""
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
            if settings.what == "sweeps":
                results["sweeps"] = sweeps(settings, split, device)
    except BaseException:
        folder.discard()
        raise
    folder.write(results=results)
    write_events(folder.path, results)
    print(f"\nwritten to {folder.path}")
    return results


def training_set(settings: Settings) -> data.Split:
    """MNIST's training set or, where it is not, as many random bytes, and says so."""
    try:
        root = settings.data
        return data.load("mnist", root, download=False).train
    except data.DataError as error:
        print(f"NOTE: random bytes instead of MNIST: {error}", file=sys.stderr)
    generator = torch.Generator("cpu").manual_seed(0)
    images = torch.randint(0, 256, (50_000, 784), generator=generator, device="cpu")
    labels = torch.randint(0, 10, (50_000,), generator=generator, device="cpu")
    return data.Split(images.to(torch.uint8), labels)


def networks(
    settings: Settings, split: data.Split, device: torch.device
) -> list[dict[str, Any]]:
    """The table of training loops."""
    repeats = 3 if settings.quick else settings.repeats
    peak, bandwidth = measured_peak(device), measured_bandwidth(device)
    print(
        f"\n{peak / 1e9:.0f} GFLOP/s in a product of large matrices, float32; "
        f"{bandwidth / 1e9:.0f} GB/s in a copy of memory"
    )
    results = []
    for workload in WORKLOADS[:1] if settings.quick else WORKLOADS:
        torch.compiler.reset()  # else a second shape is compiled with dynamic sizes
        images = half_dense(split) if workload.is_synthetic else split
        task = on_device(workload, images, device, settings.threads)
        print(
            f"\n{workload.name}: {list(workload.sizes)}, batch {workload.batch_size}, "
            f"lr {workload.lr:g}\n{floor(task, peak, bandwidth)}\n"
            f"{'':26}{'µs/step':>10}{'min':>10}{'x native':>10}{'min':>8}  agrees"
        )
        loops = available(settings, task)
        for result in compare(task, loops, repeats):
            results.append(result)
            print(line(result), flush=True)
    return [asdict(r) | {"is_wrong": r.is_wrong} for r in results]


def half_dense(split: data.Split) -> data.Split:
    """As many seeded random images, in which half of the pixels are zero."""
    generator = torch.Generator("cpu").manual_seed(0)
    shape = split.images.shape
    images = torch.randint(1, 256, shape, generator=generator, device="cpu")
    images *= torch.randint(0, 2, shape, generator=generator, device="cpu")
    return data.Split(images.to(torch.uint8), split.labels)


def floor(task: Task, peak: float, bandwidth: float) -> str:
    """What a step cannot do without, and how long that takes at these speeds."""
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
    workload: Workload, split: data.Split, device: torch.device, number: int
) -> Task:
    moved = data.Split(*(t.to(device) for t in split))
    return Task(workload, moved, device, number)


def available(settings: Settings, task: Task) -> dict[str, Loop]:
    """The loops that can run here; says which cannot, and why."""
    loops = {}
    for name, make in LOOPS.items():
        if task.device.type != "cpu" and name not in ON_ANY_DEVICE:
            continue
        if name in COMPILED and (settings.quick or not settings.compiled):
            continue
        try:
            loops[name] = make(task)
        except UnavailableError as reason:
            print(f"{name:26}skipped: {reason}")
    return loops


def compare(task: Task, loops: dict[str, Loop], repeats: int) -> Iterator[Result]:
    """Check the loops against native on the same batches, then time them in turns."""
    m, device = task.workload.batch_size, task.device
    generator = torch.Generator("cpu").manual_seed(0)
    n = len(task.data.labels)
    order = torch.randperm(n, generator=generator, device="cpu").to(device)
    steps = min(SHORT_RUN, len(order) // m)
    for loop in loops.values():
        loop.run(order[: steps * m])
    expected = loops[NATIVE].weights()
    assert expected is not None
    agrees = {name: distance(loop.weights(), expected) for name, loop in loops.items()}
    steps = max(1, min(EXAMPLES, len(order)) // m)
    calls: dict[str, Callable[[], None]] = {
        name: lambda loop=loop: loop.run(order[: steps * m])  # type: ignore[misc]
        for name, loop in loops.items()
    }
    times = take_turns(calls, repeats, 0, device)
    for name in loops:
        yield Result(
            task.workload.name,
            name,
            statistics.median(times[name]) / steps * 1e6,
            min(times[name]) / steps * 1e6,
            *ratios(times[name], times[NATIVE]),
            agrees[name],
        )


def distance(actual: list[Tensor] | None, expected: list[Tensor]) -> float | None:
    """The relative distance of all weights and biases together."""
    if actual is None:
        return None
    a, b = (torch.cat([t.cpu().flatten() for t in ts]) for ts in (actual, expected))
    return ((a - b).norm() / b.norm()).item()


def line(result: Result) -> str:
    if result.is_wrong:
        return f"{result.loop:26}WRONG: its weights are off by {result.agrees:.0e}"
    agrees = "other cost" if result.agrees is None else f"{result.agrees:.0e}"
    if result.loop == NATIVE:
        agrees = ""
    return (
        f"{result.loop:26}{result.median:10.1f}{result.shortest:10.1f}"
        f"{result.median_ratio:10.3f}{result.min_ratio:8.3f}  {agrees}"
    )


def measured_peak(device: torch.device) -> float:
    """FLOP/s of a large float32 product."""
    n = 1024 if device.type == "cpu" else 8192
    a, b = torch.rand(2, n, n, device=device, dtype=torch.float32)
    out = torch.empty_like(a)
    shortest = math.inf
    for _ in range(10):
        synchronize(device)
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        synchronize(device)
        shortest = min(shortest, time.perf_counter() - started)
    return 2 * n**3 / shortest


def measured_bandwidth(device: torch.device) -> float:
    """Bytes read a second, while they are copied."""
    source = torch.zeros(64_000_000, device=device, dtype=torch.uint8)
    target = torch.zeros_like(source)
    shortest = math.inf
    for _ in range(5):
        synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        shortest = min(shortest, time.perf_counter() - started)
    return source.nbytes / shortest


def layers(settings: Settings, device: torch.device) -> list[dict[str, Any]]:
    """The table of single layers."""
    sizes = layer_benchmark.SIZES[:2] if settings.quick else layer_benchmark.SIZES
    compiled = settings.compiled and not settings.quick
    modes = ("eager", "compiled") if compiled else ("eager",)
    repeats = settings.repeats if settings.quick else 2 * settings.repeats + 1
    print(f"\n{layer_benchmark.HEADER}")
    rows = []
    for row in layer_benchmark.measure_all(
        sizes, modes, repeats, settings.seconds, device
    ):
        rows.append(asdict(row))
        print(layer_benchmark.line(row), flush=True)
    return rows


def sweeps(
    settings: Settings, split: data.Split, device: torch.device
) -> dict[str, Any]:
    """How the time of a step grows with batch size, width and depth: the exponent p of
    time ~ size^p over the upper half of the sizes."""
    repeats = 3 if settings.quick else settings.repeats
    swept: dict[str, list[tuple[int, Workload]]] = {
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
    for what, cases in swept.items():
        times: dict[str, list[float]] = {name: [] for name in SWEPT}
        print(f"\nµs/step{what:>17}" + "".join(f"{size:>10}" for size, _ in cases))
        for _, workload in cases:
            task = on_device(workload, split, device, settings.threads)
            loops = {name: LOOPS[name](task) for name in SWEPT}
            for result in compare(task, loops, repeats):
                time_ = math.nan if result.is_wrong else result.median
                times[result.loop].append(time_)
        sizes = [size for size, _ in cases]
        slopes = {name: slope(sizes, t) for name, t in times.items()}
        for name, values in times.items():
            shown = "".join(
                f"{'WRONG' if math.isnan(value) else f'{value:.1f}':>10}"
                for value in values
            )
            print(f"{name:24}{shown}   ~ size^{slopes[name]:.2f} at the end")
        results[what] = {"sizes": sizes, "times": times, "slopes": slopes}
    return results


def slope(sizes: list[int], times: list[float]) -> float:
    """p of time ~ size^p over the upper half of the sizes, by least squares."""
    half = len(sizes) // 2
    x, y = ([math.log(v) for v in values[half:]] for values in (sizes, times))
    if len(x) < 2:
        x, y = ([math.log(v) for v in values[-2:]] for values in (sizes, times))
    mx, my = statistics.mean(x), statistics.mean(y)
    covariance = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mx) ** 2 for a in x)


def write_events(folder: Path, results: dict[str, Any]) -> None:
    """The same figures for TensorBoard."""
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
        for what, sweep in results.get("sweeps", {}).items():
            for name, times in sweep["times"].items():
                for size, value in zip(sweep["sizes"], times, strict=True):
                    tag = f"us_per_step_over_{what.replace(' ', '_')}/{name}"
                    writer.add_scalar(tag, value, size)


def command_line(arguments: list[str] | None = None) -> int:
    parser = Parser(__doc__)
    default = Settings()
    parser.add_argument("--what", choices=WHAT, default=default.what)
    parser.add_argument("--device", default=default.device)
    parser.add_argument("--threads", type=int, default=default.threads)
    parser.add_argument("--repeats", type=int, default=default.repeats)
    parser.add_argument("--seconds", type=float, default=default.seconds)
    parser.add_argument(
        "--no-compile", dest="compiled", action="store_false",
        help="leave out what torch.compile makes, which takes most of the time",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--data", help="folder of MNIST: in it, its raw or MNIST/raw; also TORCHBP_DATA"
    )
    parser.add_argument("--logdir", default=default.logdir)
    parser.add_argument("--name", help="of the folder there")
    try:
        results = main(Settings(**vars(parser.parse_args(arguments))))
    except (ValueError, OSError, data.DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except AssertionError as error:
        print(f"error: a layer is wrong: {error}", file=sys.stderr)
        return 1
    return int(has_wrong(results))


def has_wrong(results: dict[str, Any]) -> bool:
    """Whether a training loop computed something else."""
    swept = [t for s in results.get("sweeps", {}).values() for t in s["times"].values()]
    return any(row["is_wrong"] for row in results.get("networks", [])) or any(
        math.isnan(value) for times in swept for value in times
    )


if __name__ == "__main__":
    sys.exit(command_line())
