"""A mini-batch's gradient: the mean of its examples' own, and an estimate of all.

    python experiments/batching.py            on MNIST
    python experiments/batching.py --quick    fewer images and draws

The claim: the gradient of a mini-batch is the mean of its examples' own,

    A1   C = (1/n) Σ_x C_x, so that ∂C/∂w = (1/n) Σ_x ∂C_x/∂w

so that what ``torchbp.backprop`` and our layers under autograd compute for a batch at
once, with the 1/n in the cost, is what taking its examples one at a time gives, and
what ``torch.func`` gives as vmap(grad).

A mini-batch of m examples drawn from all estimates the gradient over all, and

    E ‖∂C_m/∂w - ∂C/∂w‖²  =  (mean of ‖∂C_x/∂w‖² - ‖∂C/∂w‖²) / m

so its error falls as 1/√m, while its cost grows as m. The right side comes from
‖∂C_x/∂w‖² = (n ‖δ_x‖)² (‖a_x‖² + 1), layer by layer (BP3, BP4): no gradient of a single
example is made for it.

Exit status: 0 the claims are shown, 1 one is not, 2 bad arguments or data.

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

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the files beside this one

import torchbp
from experiments.support import reporting
from experiments.support.options import option
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
# Relative, between the ways: some roundings of the dtype.
AGREEMENT = {"float32": 1e-5, "float64": 1e-13}
QUICK: dict[str, Any] = {"examples": 2000, "draws": 100, "repeats": 3}


@dataclass(frozen=True, kw_only=True)
class Settings(reporting.OnImages):
    """The batch that is taken apart, and how often one is drawn."""

    examples: int = option(10_000, "training images")
    batch_size: int = option(100, "of the comparison of ways")
    draws: int = option(400, "mini-batches of each size")
    repeats: int = option(7, "of every timing")

    def __post_init__(self) -> None:
        super().__post_init__()
        reporting.at_least(self, examples=2, batch_size=1, draws=2, repeats=1)


@dataclass(frozen=True)
class Way:
    """One way to a mini-batch's gradient."""

    way: str
    seconds: float
    off: dict[str, float]  # by dtype: relative distance from the mean one by one


@dataclass(frozen=True)
class Noise:
    """How far mini-batches of m are from all examples, relative to the latter."""

    m: int
    measured: float
    predicted: float


def main(settings: Settings) -> dict[str, Any]:
    """Measure, print the tables, and return what is in results.json."""
    splits = reporting.load(settings)
    print(reporting.stated(__doc__))
    split = data.Split(*(t[: settings.examples] for t in splits.train))
    with cpu_threads(1), reporting.Report("batching", settings) as report:
        ways = compare(settings, split)
        noise = draw_batches(settings, split)
        print(f"{way_table(ways, settings)}\n\n{noise_table(noise, len(split.labels))}")
        return report.conclude(
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
    """The mean of the examples' gradients, each from a backprop of its own."""
    sums = [torch.zeros_like(p) for p in model.parameters()]
    for row, target in zip(x.split(1), y.split(1), strict=True):
        _, grads = torchbp.backprop(model, COST, row, target)
        for total, part in zip(sums, grads.values(), strict=True):
            total += part
    return [total / len(x) for total in sums]


def mapped(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """The same, the examples' gradients all at once."""
    values = {name: p.detach() for name, p in model.named_parameters()}

    def example(parameters: dict[str, Tensor], row: Tensor, target: Tensor) -> Tensor:
        output = functional_call(model, parameters, (row[None],))
        cost: Tensor = COST(output, target[None])
        return cost

    grads = vmap(grad(example), in_dims=(None, 0, 0))(values, x, y)
    return [grads[name].mean(0) for name in values]


def batched(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    return list(torchbp.backprop(model, COST, x, y)[1].values())


def recorded(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(COST(model(x), y), list(model.parameters())))


WAYS: dict[str, Callable[[nn.Module, Tensor, Tensor], list[Tensor]]] = {
    LOOPED: one_by_one,
    MAPPED: mapped,
    RECORDED: recorded,
    BATCHED: batched,
}


def build(settings: Settings, split: data.Split) -> torchbp.MLP:
    torch.manual_seed(settings.seed)
    return torchbp.MLP(
        [split.images.shape[1], HIDDEN, CLASSES], device="cpu", dtype=torch.float32
    )


def compare(settings: Settings, split: data.Split) -> list[Way]:
    """Every way on one mini-batch: what it gives and how long it takes."""
    off: dict[str, dict[str, float]] = {way: {} for way in WAYS}
    model = build(settings, split)
    calls: dict[str, Callable[[], Any]] = {}
    for dtype in (torch.float64, torch.float32):  # timed in the last
        model = model.to(dtype)
        x = data.scale(split.images[: settings.batch_size], dtype)
        y = one_hot(split.labels[: settings.batch_size], CLASSES).to(dtype)
        calls = {n: lambda f=f: f(model, x, y) for n, f in WAYS.items()}  # type: ignore[misc]  # noqa: B023
        found = {name: flat(call()) for name, call in calls.items()}
        for name, gradient in found.items():
            error = relative_distance(gradient, found[LOOPED])
            off[name][str(dtype).removeprefix("torch.")] = error
    times = take_turns(calls, settings.repeats, 0, torch.device("cpu"))
    return [Way(way, statistics.median(times[way]), off[way]) for way in WAYS]


def flat(grads: list[Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in grads])


def draw_batches(settings: Settings, split: data.Split) -> list[Noise]:
    """Mini-batches of every size, drawn with replacement, beside all examples."""
    model = build(settings, split)
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
    """p of error ~ m^p."""
    m = [math.log(n.m) for n in noise]
    return reporting.slope(m, [math.log(n.measured) for n in noise])


def judge(ways: list[Way], noise: list[Noise]) -> dict[str, bool]:
    """Every claim, and whether the measurements show it."""
    times = {way.way: way.seconds for way in ways}
    return {
        "A1: a batch's gradient is the mean of its examples', whichever way": all(
            off < AGREEMENT[dtype] for way in ways for dtype, off in way.off.items()
        ),
        "the batch at once is faster than its examples, whichever way": (
            max(times[BATCHED], times[RECORDED]) < min(times[LOOPED], times[MAPPED])
        ),
        "the error of a mini-batch falls as 1/√m (exponent -0.55 to -0.45)": (
            -0.55 < exponent(noise) < -0.45
        ),
        "and is what the examples' gradients say, within 10%": all(
            abs(n.measured / n.predicted - 1) < 0.1 for n in noise
        ),
    }


def way_table(ways: list[Way], settings: Settings) -> str:
    offs = [f"off the first, {dtype}" for dtype in AGREEMENT]
    lines = [["way", "µs, float32", *offs]]
    for way in ways:
        offs = [f"{way.off[dtype]:.0e}" for dtype in AGREEMENT]
        lines.append([way.way, f"{way.seconds * 1e6:,.0f}", *offs])
    return f"a batch of {settings.batch_size}\n{aligned(lines, left=1)}"


def noise_table(noise: list[Noise], n: int) -> str:
    lines = [["m", "error, measured", "predicted"]]
    lines += [[str(n.m), f"{n.measured:.3f}", f"{n.predicted:.3f}"] for n in noise]
    title = (
        f"mini-batches of m from {n:,} images: the root of the mean of ‖error‖², over "
        f"‖∂C/∂w‖;\nit goes as m^{exponent(noise):.3f}"
    )
    return f"{title}\n{aligned(lines, left=0)}"


def curves(noise: list[Noise]) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows."""
    return {
        f"error_over_batch_size/{name}": [(n.m, getattr(n, name)) for n in noise]
        for name in ("measured", "predicted")
    }


def draw(figure: Any, noise: list[Noise]) -> None:
    """The error over m."""
    ax = figure.subplots()
    m = [n.m for n in noise]
    ax.loglog(m, [n.measured for n in noise], "o", label="measured")
    ax.loglog(m, [n.predicted for n in noise], "-", label="predicted, ~ 1/√m")
    ax.set(xlabel="batch size m", ylabel="error / ‖∂C/∂w‖")
    ax.set_title("A mini-batch's gradient as an estimate of the whole", fontsize=10)
    ax.legend()


def command_line(arguments: list[str] | None = None) -> int:
    """The shell around :func:`main`; returns the exit status."""
    return reporting.run(main, Settings, QUICK, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(command_line())
