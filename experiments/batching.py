"""A mini-batch's gradient: the mean of its examples' gradients, and an estimate.

    python experiments/batching.py            on MNIST
    python experiments/batching.py --quick    fewer images and draws

The claim: the gradient of a mini-batch is the mean of its examples' gradients,

    A1   C = (1/n) Σ_x C_x, so that ∂C/∂w = (1/n) Σ_x ∂C_x/∂w

``torchbp.backprop`` and our layers under autograd compute a batch at once, with the 1/n
in the cost. They give the same as one example at a time, and as ``torch.func``'s
vmap(grad).

A mini-batch of m examples drawn from all estimates the gradient over all, and

    E ‖∂C_m/∂w - ∂C/∂w‖²  =  (mean of ‖∂C_x/∂w‖² - ‖∂C/∂w‖²) / m

so its error falls as 1/√m, while its cost grows as m. The right side is computed from
‖∂C_x/∂w‖² = (n ‖δ_x‖)² (‖a_x‖² + 1), layer by layer (BP3, BP4), without the gradient of
any single example.

Exit status: 0 the claims are shown, 1 a claim is not, 2 bad arguments or data.

Source: Nielsen, Neural Networks and Deep Learning, chapters 1 and 2.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import one_hot

sys.path.insert(0, str(Path(__file__).parents[1]))  # to find experiments and torchbp

import torchbp
from experiments.support import reporting
from experiments.support.options import check_least, option
from experiments.support.timing import take_turns
from torchbp import data
from torchbp._numeric import relative_distance
from torchbp._terminal import aligned
from torchbp.inspection import probe
from torchbp.training import cpu_threads

HIDDEN, CLASSES = 30, 10
BATCHES = (1, 2, 5, 10, 20, 50, 100, 200, 500)
COST = torchbp.QuadraticCost()
LOOPED, MAPPED = "one by one, backprop", "torch.func, vmap(grad)"
BATCHED, RECORDED = "batch, backprop", "batch, our layers and autograd"
# Relative distance between the ways: some roundings of the dtype.
AGREEMENT = {"float32": 1e-5, "float64": 1e-13}
QUICK: dict[str, Any] = {"examples": 2000, "draws": 100, "repeats": 3}


@dataclass(frozen=True, kw_only=True)
class BatchingSettings(reporting.ImageSettings):
    """The batch of the comparison, and how many are drawn; each field is an option:
    `examples`, `batch_size`, `draws`, `repeats`."""

    examples: int = option(10_000, "training images")
    batch_size: int = option(100, "examples in the comparison of ways")
    draws: int = option(400, "mini-batches of each size")
    repeats: int = option(7, "repetitions of every timing")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, examples=2, batch_size=1, draws=2, repeats=1)


@dataclass(frozen=True)
class BatchWay:
    """One way to a mini-batch's gradient.

    Attributes:
        way: its name.
        seconds: that it takes in float32.
        errors: relative distance from the mean taken one by one, by dtype.
    """

    way: str
    seconds: float
    errors: dict[str, float]


@dataclass(frozen=True)
class Noise:
    """The relative error of a mini-batch's gradient as an estimate of all examples'.

    Attributes:
        m: the size of the mini-batch.
        measured: root mean square over the draws.
        predicted: from the gradients of single examples.
    """

    m: int
    measured: float
    predicted: float


def main(settings: BatchingSettings) -> dict[str, Any]:
    """Measure, print the tables and return the content of results.json.

    Args:
        settings: what is measured.
    """
    splits = reporting.load(settings)
    print(reporting.claim_of(__doc__))
    split = data.Split(*(t[: settings.examples] for t in splits.train))
    with cpu_threads(1), reporting.ExperimentRun("batching", settings) as run:
        ways = measure_ways(settings, split)
        noise = draw_batches(settings, split)
        print(f"{way_table(ways, settings)}\n\n{noise_table(noise, len(split.labels))}")
        return run.conclude(
            settings,
            {
                "ways": [asdict(way) for way in ways],
                "noise": [asdict(n) for n in noise],
            },
            judge(ways, noise),
            curves(noise),
            lambda figure: draw(figure, noise),
            (6, 4),
        )


def one_by_one(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """Return the mean of the examples' gradients, each by its own backprop."""
    sums = [torch.zeros_like(p) for p in model.parameters()]
    for row, target in zip(x.split(1), y.split(1), strict=True):
        _, grads = torchbp.backprop(model, COST, row, target)
        for total, part in zip(sums, grads.values(), strict=True):
            total += part
    return [total / len(x) for total in sums]


def mapped(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """Return the mean of the examples' gradients, all at once by ``torch.func``."""
    values = {name: p.detach() for name, p in model.named_parameters()}

    def example(parameters: dict[str, Tensor], row: Tensor, target: Tensor) -> Tensor:
        output = functional_call(model, parameters, (row[None],))
        cost: Tensor = COST(output, target[None])
        return cost

    grads = vmap(grad(example), in_dims=(None, 0, 0))(values, x, y)
    return [grads[name].mean(0) for name in values]


def batched(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """Return the batch's gradient by ``torchbp.backprop``."""
    return list(torchbp.backprop(model, COST, x, y)[1].values())


def recorded(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """Return the batch's gradient by our layers under autograd."""
    return list(torch.autograd.grad(COST(model(x), y), list(model.parameters())))


WAYS: dict[str, Callable[[nn.Module, Tensor, Tensor], list[Tensor]]] = {
    LOOPED: one_by_one,
    MAPPED: mapped,
    RECORDED: recorded,
    BATCHED: batched,
}


def initial_network(settings: BatchingSettings, split: data.Split) -> torchbp.MLP:
    """Return the untrained network."""
    torch.manual_seed(settings.seed)
    return torchbp.MLP(
        [split.images.shape[1], HIDDEN, CLASSES], device="cpu", dtype=torch.float32
    )


def measure_ways(settings: BatchingSettings, split: data.Split) -> list[BatchWay]:
    """Return the error and the time of every way on one mini-batch."""
    errors: dict[str, dict[str, float]] = {way: {} for way in WAYS}
    model = initial_network(settings, split)
    calls: dict[str, Callable[[], Any]] = {}
    for dtype in (torch.float64, torch.float32):  # the last is timed
        model = model.to(dtype)
        x = data.scale(split.images[: settings.batch_size], dtype)
        y = one_hot(split.labels[: settings.batch_size], CLASSES).to(dtype)
        calls = {n: lambda f=f: f(model, x, y) for n, f in WAYS.items()}  # type: ignore[misc]  # noqa: B023
        gradients = {name: flat(call()) for name, call in calls.items()}
        for name, gradient in gradients.items():
            error = relative_distance(gradient, gradients[LOOPED])
            errors[name][str(dtype).removeprefix("torch.")] = error
    times = take_turns(calls, settings.repeats, 0, torch.device("cpu"))
    return [BatchWay(n, statistics.median(times[n]), errors[n]) for n in WAYS]


def flat(grads: list[Tensor]) -> Tensor:
    """Return all gradients as one vector."""
    return torch.cat([g.flatten() for g in grads])


def draw_batches(settings: BatchingSettings, split: data.Split) -> list[Noise]:
    """Compare mini-batches of every size, drawn with replacement, with all examples."""
    model = initial_network(settings, split)
    x = data.scale(split.images)
    y = one_hot(split.labels, CLASSES).to(x.dtype)
    whole = flat(batched(model, x, y))
    squares = [r.example_gradient_norms.square() for r in probe(model, COST, x, y)]
    of_one = sum(squares).mean().item() - whole.square().sum().item()  # type: ignore[union-attr]
    size = whole.norm().item()
    generator = torch.Generator("cpu").manual_seed(settings.seed)
    noise = []
    for m in BATCHES:
        errors = []
        for _ in range(settings.draws):
            rows = torch.randint(len(x), (m,), generator=generator, device="cpu")
            g = flat(batched(model, x[rows], y[rows]))
            errors.append((g - whole).square().sum().item())
        measured = math.sqrt(statistics.fmean(errors)) / size
        noise.append(Noise(m, measured, math.sqrt(of_one / m) / size))
    return noise


def exponent(noise: list[Noise]) -> float:
    """Return p of error ~ m^p."""
    points = [(math.log(n.m), math.log(n.measured)) for n in noise]
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def judge(ways: list[BatchWay], noise: list[Noise]) -> dict[str, bool]:
    """Return whether the measurements show each claim."""
    times = {way.way: way.seconds for way in ways}
    return {
        "A1: a batch's gradient is the mean of its examples', whichever way": all(
            error < AGREEMENT[dtype]
            for way in ways
            for dtype, error in way.errors.items()
        ),
        "the batch at once is faster than its examples, whichever way": (
            max(times[BATCHED], times[RECORDED]) < min(times[LOOPED], times[MAPPED])
        ),
        "the error of a mini-batch falls as 1/√m (exponent -0.55 to -0.45)": (
            -0.55 < exponent(noise) < -0.45
        ),
        "and is what the examples' gradients predict, within 10%": all(
            abs(n.measured / n.predicted - 1) < 0.1 for n in noise
        ),
    }


def way_table(ways: list[BatchWay], settings: BatchingSettings) -> str:
    """Return the table of ways."""
    titles = [f"error, {dtype}" for dtype in AGREEMENT]
    lines = [["way", "µs, float32", *titles]]
    for way in ways:
        errors = [f"{way.errors[dtype]:.0e}" for dtype in AGREEMENT]
        lines.append([way.way, f"{way.seconds * 1e6:,.0f}", *errors])
    return f"a batch of {settings.batch_size}\n{aligned(lines, left=1)}"


def noise_table(noise: list[Noise], n: int) -> str:
    """Return the table of mini-batch sizes; `n` is the number of images."""
    lines = [["m", "error, measured", "predicted"]]
    lines += [[str(n.m), f"{n.measured:.3f}", f"{n.predicted:.3f}"] for n in noise]
    title = (
        f"mini-batches of m from {n:,} images: root mean square of ‖error‖ / ‖∂C/∂w‖,"
        f"\nproportional to m^{exponent(noise):.3f}"
    )
    return f"{title}\n{aligned(lines, left=0)}"


def curves(noise: list[Noise]) -> dict[str, list[tuple[int, float]]]:
    """Return the curves for TensorBoard."""
    return {
        f"error_over_batch_size/{name}": [(n.m, getattr(n, name)) for n in noise]
        for name in ("measured", "predicted")
    }


def draw(figure: Any, noise: list[Noise]) -> None:
    """Draw the error over m."""
    ax = figure.subplots()
    m = [n.m for n in noise]
    ax.loglog(m, [n.measured for n in noise], "o", label="measured")
    ax.loglog(m, [n.predicted for n in noise], "-", label="predicted, ~ 1/√m")
    ax.set(xlabel="batch size m", ylabel="error / ‖∂C/∂w‖")
    ax.set_title("A mini-batch's gradient as an estimate of the whole", fontsize=10)
    ax.legend()


command_line = reporting.command_line(main, BatchingSettings, QUICK, __doc__)

if __name__ == "__main__":
    sys.exit(command_line())
