"""Why the first layers of a deep network learn last: BP2, over and over.

    python experiments/vanishing_gradient.py            1 to 8 hidden layers
    python experiments/vanishing_gradient.py --depth 4  up to 4
    python experiments/vanishing_gradient.py --quick    fewer seeds and epochs

The claim: each layer that the error passes on its way back multiplies it once,

    BP2   δ^ℓ = ((W^{ℓ+1})ᵀ δ^{ℓ+1}) ⊙ σ'(z^ℓ)

so that ‖δ^ℓ‖ falls, or grows, geometrically with the distance from the output. For
independent weights of standard deviation s and n neurons a layer the factor is

    ‖δ^ℓ‖ / ‖δ^{ℓ+1}‖  ≈  s √n · √(mean of σ'(z^ℓ)²)

With the sigmoid, σ' ≤ 1/4, it is well below 1 for every usual start; with ReLU and the
book's first initialisation, s = 1, it is above 1, and the error explodes instead.

‖δ‖ without more is over all examples and neurons; the book's "speed of learning" is the
norm of the mean over the examples, ∂C/∂b, which is shown as well.

Exit status: 0 the claims are shown, 1 one is not, 2 bad arguments or data.

Source: Nielsen, Neural Networks and Deep Learning, chapter 5.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the files beside this one

import torchbp
from experiments import reporting
from experiments.timing import threads
from torchbp import data
from torchbp.dashboard import probe
from torchbp.nn import INITIALISATIONS
from torchbp.observation import Record, aligned

ACTIVATIONS = ("sigmoid", "tanh", "relu")
BOOK = ("sigmoid", "scaled")
EXPLODING = ("relu", "normal")
CLASSES, BATCH_SIZE = 10, 10
TINY = 1e-300  # for the logarithm of an error that has vanished altogether
# Measured over predicted factor a layer: W and σ' are not independent of δ, and a
# network of 30 neurons is not large.
AGREEMENT = 1.1
QUICK: dict[str, Any] = {"seeds": 2, "epochs": 2}


@dataclass(frozen=True, kw_only=True)
class Settings(reporting.OnImages):
    """Which networks, and how long they are trained."""

    depth: int = 8  # hidden layers of the deepest
    width: int = 30
    seeds: int = 10  # starts of each network; the first is trained
    examples: int = 1000  # for training, and for δ
    epochs: int = 20
    lr: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        reporting.at_least(self, depth=3, width=2, seeds=1, examples=1, epochs=1, lr=0)


@dataclass(frozen=True)
class Start:
    """A kind of network before training, at one depth; means over the seeds, those of
    norms geometric. Lists are over the hidden layers, the first one first."""

    activation: str
    init: str
    depth: int
    norms: list[float]  # ‖δ^ℓ‖
    speeds: list[float]  # ‖∂C/∂b^ℓ‖
    predicted: list[float]  # ‖δ^ℓ‖ / ‖δ^{ℓ+1}‖, for all but the last
    saturated: float  # share of hidden neurons

    @property
    def slope(self) -> float:
        """Of ln ‖δ^ℓ‖ over ℓ: above 0, the error vanishes on its way back."""
        logs = [math.log(max(norm, TINY)) for norm in self.norms]
        return reporting.slope(range(self.depth), logs)

    @property
    def factor(self) -> float:
        """What a layer multiplies ‖δ‖ by, geometric mean."""
        ratio = max(self.norms[0], TINY) / max(self.norms[-1], TINY)
        return ratio ** (1 / (self.depth - 1))

    @property
    def predicted_factor(self) -> float:
        return math.exp(statistics.fmean(map(math.log, self.predicted)))


@dataclass(frozen=True)
class Course:
    """‖∂C/∂b^ℓ‖ of the hidden layers before training and after every epoch, as long as
    everything is finite."""

    activation: str
    init: str
    depth: int
    speeds: list[list[float]]
    diverged: bool


def main(settings: Settings) -> dict[str, Any]:
    """Measure, print the tables, and return what is in results.json."""
    splits = reporting.load(settings)
    images, labels = (t[: settings.examples] for t in splits.train)
    with threads(1), reporting.Report("vanishing_gradient", settings) as report:
        kinds = list(itertools.product(ACTIVATIONS, INITIALISATIONS))
        starts, courses = [], []
        for activation, init in kinds:
            print(f"{activation}, {init} ...", flush=True)
            for depth in range(1, settings.depth + 1):
                start, course = measure(
                    settings, activation, init, depth, images, labels
                )
                starts.append(start)
                courses.append(course)
        claims = judge(starts, courses)
        print(f"\n{start_table(starts)}\n\n{depth_table(starts, courses)}\n")
        print(reporting.table_of(claims))
        results = {
            "settings": reporting.plain(settings),
            "starts": [
                asdict(s) | ({"slope": s.slope} if s.depth > 1 else {}) for s in starts
            ],
            "courses": [asdict(course) for course in courses],
            "claims": claims,
            "shown": all(claims.values()),
            "verdict": reporting.verdict(claims),
        }
        report.finish(results, curves(courses), lambda f: draw(f, starts, courses))
    print(results["verdict"])
    return results


def measure(
    settings: Settings,
    activation: str,
    init: str,
    depth: int,
    images: Tensor,
    labels: Tensor,
) -> tuple[Start, Course]:
    """All starts of one kind of network, and the training of the first."""
    x, cost = data.scale(images), torchbp.CrossEntropyCost()
    hidden = [settings.width] * depth
    traces = []
    for seed in reversed(range(settings.seed, settings.seed + settings.seeds)):
        torch.manual_seed(seed)
        sizes = [images.shape[1], *hidden, CLASSES]
        model = torchbp.MLP(sizes, activation, output="identity", init=init)
        traces.append(probe(model, cost, x, labels)[:-1])
    start = summarise(activation, init, traces)
    # The model of the settings' own seed came last.
    speeds = [norms(traces[-1], "mean_delta")]
    sgd = torchbp.ExplicitSGD(model, cost, settings.lr)
    generator = torch.Generator().manual_seed(settings.seed)
    for _ in range(settings.epochs):
        sgd.epoch(images, labels, BATCH_SIZE, generator)
        found = norms(probe(model, cost, x, labels)[:-1], "mean_delta")
        if not all(map(math.isfinite, found)):
            break
        speeds.append(found)
    diverged = len(speeds) <= settings.epochs
    return start, Course(activation, init, depth, speeds, diverged)


def norms(trace: list[Record], quantity: str) -> list[float]:
    values = [record.norm(quantity) for record in trace]
    return [math.nan if value is None else value for value in values]


def summarise(activation: str, init: str, traces: list[list[Record]]) -> Start:
    """The means over the seeds."""

    def means(of_seeds: list[list[float]]) -> list[float]:
        return [
            math.exp(statistics.fmean(math.log(max(v, TINY)) for v in of_layer))
            for of_layer in zip(*of_seeds, strict=True)
        ]

    return Start(
        activation,
        init,
        len(traces[0]),
        means([norms(trace, "delta") for trace in traces]),
        means([norms(trace, "mean_delta") for trace in traces]),
        means([predictions(trace) for trace in traces]),
        statistics.fmean(r.saturated for trace in traces for r in trace),
    )


def predictions(trace: list[Record]) -> list[float]:
    """s √n √(mean σ'²) of every hidden layer but the last: s √n is the root of the mean
    square of W^{ℓ+1} times the number of its rows."""
    return [
        math.sqrt(
            after.weight.square().mean().item()
            * len(after.weight)
            * record.sigma_prime.square().mean().item()
        )
        for record, after in itertools.pairwise(trace)
    ]


def judge(starts: list[Start], courses: list[Course]) -> dict[str, bool]:
    """Every claim, and whether the measurements show it."""
    deepest = max(start.depth for start in starts)
    deep = {(s.activation, s.init): s for s in starts if s.depth == deepest}
    book = [s for s in starts if (s.activation, s.init) == BOOK]
    trained = [c for c in courses if (c.activation, c.init) == BOOK and c.depth > 1]
    firsts = [start.speeds[0] for start in sorted(book, key=lambda s: s.depth)]
    sigmoids = [s.slope for (activation, _), s in deep.items() if activation == BOOK[0]]
    return {
        "sigmoid, every initialisation: ‖δ^ℓ‖ falls towards the input": (
            min(sigmoids) > 0
        ),
        "sigmoid, scaled: by more than half a layer": deep[BOOK].factor < 0.5,
        "sigmoid, scaled: the deeper the network, the slower its first layer": all(
            deeper < shallower for shallower, deeper in itertools.pairwise(firsts)
        ),
        f"all: BP2 predicts the factor a layer within {AGREEMENT - 1:.0%}": all(
            1 / AGREEMENT < s.factor / s.predicted_factor < AGREEMENT
            for s in deep.values()
        ),
        "scaled: tanh and ReLU lose less than half as much a layer (in ln ‖δ‖)": all(
            deep[activation, "scaled"].slope < deep[BOOK].slope / 2
            for activation in ("tanh", "relu")
        ),
        "ReLU, normal: ‖δ^ℓ‖ grows towards the input": deep[EXPLODING].slope < 0,
        "sigmoid, scaled: the first layer stays the slowest in every epoch": all(
            speeds[0] == min(speeds) < speeds[-1]
            for course in trained
            for speeds in course.speeds
        ),
    }


def start_table(starts: list[Start]) -> str:
    """The deepest network of every kind, before training."""
    deepest = max(start.depth for start in starts)
    titles = [
        "activation", "initialisation", "‖δ^1‖", f"‖δ^{deepest}‖", "slope of ln ‖δ‖",
        "factor a layer", "predicted", "saturated",
    ]  # fmt: skip
    lines = [titles]
    for s in starts:
        if s.depth == deepest:
            figures = [f"{s.norms[0]:.2g}", f"{s.norms[-1]:.2g}", f"{s.slope:+.2f}"]
            figures += [f"{s.factor:.3g}", f"{s.predicted_factor:.3g}"]
            lines.append([s.activation, s.init, *figures, f"{s.saturated:.0%}"])
    return f"at the start, {deepest} hidden layers\n{aligned(lines, left=2)}"


def depth_table(starts: list[Start], courses: list[Course]) -> str:
    """The book's network: ‖∂C/∂b^ℓ‖ by layer for every depth."""
    deepest = max(start.depth for start in starts)
    layers = [f"ℓ = {ell}" for ell in range(1, deepest + 1)]
    blocks = [["hidden layers", *layers]]
    for s in starts:
        if (s.activation, s.init) == BOOK:
            shown = [f"{speed:.2g}" for speed in s.speeds]
            blocks.append([str(s.depth), *shown, *[""] * (deepest - s.depth)])
    trained = next(
        c for c in courses if (c.activation, c.init, c.depth) == (*BOOK, deepest)
    )
    last = [f"{speed:.2g}" for speed in trained.speeds[-1]]
    blocks.append([f"{deepest}, {len(trained.speeds) - 1} epochs", *last])
    return f"‖∂C/∂b^ℓ‖, {', '.join(BOOK)}\n{aligned(blocks, left=1)}"


def curves(courses: list[Course]) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: every layer's speed over the epochs."""
    return {
        f"{c.activation} {c.init} {c.depth}/speed_{ell}": list(enumerate(of_layer))
        for c in courses
        for ell, of_layer in enumerate(zip(*c.speeds, strict=True), start=1)
    }


def draw(figure: Any, starts: list[Start], courses: list[Course]) -> None:
    """‖δ^ℓ‖ over ℓ at the start, and the book's network in training."""
    left, right = figure.subplots(1, 2)
    deepest = max(start.depth for start in starts)
    styles = dict(zip(INITIALISATIONS, ("-", "--", ":"), strict=True))
    colours = dict(zip(ACTIVATIONS, ("C0", "C1", "C2"), strict=True))
    for s in starts:
        if s.depth == deepest:
            style = colours[s.activation] + styles[s.init]
            label = f"{s.activation}, {s.init}"
            left.semilogy(range(1, deepest + 1), s.norms, style, label=label)
    left.set(xlabel="ℓ", ylabel="‖δ^ℓ‖ at the start")
    left.legend(fontsize=7)
    for c in courses:
        if (c.activation, c.init, c.depth) == (*BOOK, min(4, deepest)):
            for ell, of_layer in enumerate(zip(*c.speeds, strict=True), start=1):
                right.semilogy(of_layer, label=f"ℓ = {ell}")
    right.set(xlabel="epoch", ylabel=f"‖∂C/∂b^ℓ‖, {', '.join(BOOK)}")
    right.legend(fontsize=7)


def command_line(arguments: list[str] | None = None) -> int:
    """The shell around :func:`main`; returns the exit status."""
    parser = reporting.Parser(__doc__)
    add = parser.add_argument
    add("--dataset", choices=data.NAMES, help="default mnist")
    add("--depth", type=int, help="hidden layers of the deepest (default 8)")
    add("--width", type=int, help="neurons in each (default 30)")
    add("--seeds", type=int, help="starts of each network (default 10)")
    add("--examples", type=int, help="training images (default 1000)")
    add("--epochs", type=int, help="of training (default 20)")
    add("--lr", type=float, help="η (default 0.1)")
    return reporting.run(main, Settings, QUICK, parser, arguments)


if __name__ == "__main__":
    sys.exit(command_line())
