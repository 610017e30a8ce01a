"""Why the first layers of a deep network learn last: BP2 applied layer by layer.

    python experiments/vanishing_gradient.py            1 to 8 hidden layers
    python experiments/vanishing_gradient.py --depth 4  up to 4
    python experiments/vanishing_gradient.py --quick    fewer seeds and epochs

The claim: each layer multiplies the error that is propagated back,

    BP2   δ^ℓ = ((W^{ℓ+1})ᵀ δ^{ℓ+1}) ⊙ σ'(z^ℓ)

so ‖δ^ℓ‖ falls or grows geometrically with the distance from the output. For
independent weights of standard deviation s and n neurons in layer ℓ the factor is

    ‖δ^ℓ‖ / ‖δ^{ℓ+1}‖  ≈  s √n · √(mean of σ'(z^ℓ)²)

With the sigmoid, σ' ≤ 1/4, it is well below 1 for every usual initialisation; with ReLU
and the book's first initialisation, s = 1, it is above 1, and the error explodes.

‖δ^ℓ‖ is over all examples and neurons; the book's "speed of learning" is the norm of
the mean over the examples, ∂C/∂b^ℓ (BP3), which is shown, too.

Exit status: 0 the claims are shown, 1 a claim is not, 2 bad arguments or data.

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

sys.path.insert(0, str(Path(__file__).parents[1]))  # to find experiments and torchbp

import torchbp
from experiments.support import reporting
from experiments.support.options import check_least, option
from torchbp import data
from torchbp._terminal import aligned
from torchbp.inspection import Record, probe
from torchbp.nn import INITIALISATIONS
from torchbp.training import cpu_threads

ACTIVATIONS = ("sigmoid", "tanh", "relu")
BOOK = ("sigmoid", "scaled")
EXPLODING = ("relu", "normal")
CLASSES, BATCH_SIZE = 10, 10
TINY = 1e-300  # for the logarithm of an error that has vanished completely
# Bounds on the measured over the predicted factor, on average and at each layer: W and
# σ' are not independent of δ, and a layer of 30 neurons is not large.
AGREEMENT, LAYER_AGREEMENT = 1.1, 1.4
QUICK: dict[str, Any] = {"seeds": 2, "epochs": 2}


@dataclass(frozen=True, kw_only=True)
class VanishingSettings(reporting.ImageSettings):
    """Which networks, and how long they are trained; each field is an option: `depth`,
    `width`, `seeds`, `examples`, `epochs`, `lr`."""

    depth: int = option(8, "hidden layers of the deepest network")
    width: int = option(30, "neurons in each hidden layer")
    seeds: int = option(10, "initial networks of each kind; the first is trained")
    examples: int = option(1000, "images for training and for δ")
    epochs: int = option(20, "epochs of training")
    lr: float = option(0.1, "learning rate η")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, depth=3, width=2, seeds=1, examples=1, epochs=1, lr=0)


@dataclass(frozen=True)
class InitialState:
    """A kind of network before training, at one depth. Means are over the seeds, those
    of norms geometric; lists are over the hidden layers, from the input.

    Attributes:
        activation: of the hidden layers.
        init: the initialisation.
        depth: hidden layers.
        norms: ‖δ^ℓ‖.
        speeds: ‖∂C/∂b^ℓ‖.
        predicted: ‖δ^ℓ‖ / ‖δ^{ℓ+1}‖ for all but the last layer.
        saturated: share of the hidden neurons that are saturated.
    """

    activation: str
    init: str
    depth: int
    norms: list[float]
    speeds: list[float]
    predicted: list[float]
    saturated: float

    @property
    def slope(self) -> float:
        """The slope of ln ‖δ^ℓ‖ over ℓ."""
        return slope_of(self.norms)

    @property
    def factor(self) -> float:
        """The factor by which a layer multiplies ‖δ‖, geometric mean."""
        ratio = max(self.norms[0], TINY) / max(self.norms[-1], TINY)
        return ratio ** (1 / (self.depth - 1))

    @property
    def factors(self) -> list[float]:
        """The factor of each layer but the last."""
        norms = [max(norm, TINY) for norm in self.norms]
        return [before / after for before, after in itertools.pairwise(norms)]

    @property
    def predicted_factor(self) -> float:
        """The factor that BP2 predicts, geometric mean."""
        return math.exp(statistics.fmean(map(math.log, self.predicted)))


@dataclass(frozen=True)
class TrainingCourse:
    """The hidden layers before training and after every epoch, until a norm is infinite
    or NaN.

    Attributes:
        activation: of the hidden layers.
        init: the initialisation.
        depth: hidden layers.
        norms: ‖δ^ℓ‖ of each epoch.
        speeds: ‖∂C/∂b^ℓ‖ of each epoch.
        diverged: whether a norm became infinite or NaN.
    """

    activation: str
    init: str
    depth: int
    norms: list[list[float]]
    speeds: list[list[float]]
    diverged: bool


def slope_of(norms: list[float]) -> float:
    """Return the slope of ln ‖δ^ℓ‖ over ℓ; if positive, the error vanishes."""
    logs = [math.log(max(norm, TINY)) for norm in norms]
    return statistics.linear_regression(range(len(norms)), logs).slope


def main(settings: VanishingSettings) -> dict[str, Any]:
    """Measure, print the tables and return the content of results.json.

    Args:
        settings: what is measured.
    """
    splits = reporting.load(settings)
    print(reporting.claim_of(__doc__))
    images, labels = (t[: settings.examples] for t in splits.train)
    with cpu_threads(1), reporting.ExperimentRun("vanishing_gradient", settings) as run:
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
        print(f"\n{start_table(starts, courses)}\n\n{depth_table(starts, courses)}")
        return run.conclude(
            settings,
            {
                "starts": [
                    asdict(start) | ({"slope": start.slope} if start.depth > 1 else {})
                    for start in starts
                ],
                "courses": [asdict(course) for course in courses],
            },
            judge(starts, courses),
            curves(courses),
            lambda figure: draw(figure, starts, courses),
        )


def measure(
    settings: VanishingSettings,
    activation: str,
    init: str,
    depth: int,
    images: Tensor,
    labels: Tensor,
) -> tuple[InitialState, TrainingCourse]:
    """Measure the initial networks of one kind and train the first of them.

    Args:
        settings: of the experiment.
        activation: of the hidden layers.
        init: the initialisation.
        depth: hidden layers.
        images: uint8 (n, 784).
        labels: int64 (n).
    """
    x, cost = data.scale(images), torchbp.CrossEntropyCost()
    hidden = [settings.width] * depth
    traces = []
    for seed in reversed(range(settings.seed, settings.seed + settings.seeds)):
        torch.manual_seed(seed)
        sizes = [images.shape[1], *hidden, CLASSES]
        model = torchbp.MLP(
            sizes,
            activation,
            output="identity",
            init=init,
            device="cpu",
            dtype=torch.float32,
        )
        traces.append(probe(model, cost, x, labels)[:-1])
    start = summarise(activation, init, traces)
    # The model of the settings' seed was the last.
    history = [(norms(traces[-1], "delta"), norms(traces[-1], "mean_delta"))]
    sgd = torchbp.ExplicitSGD(model, cost, settings.lr)
    generator = torch.Generator("cpu").manual_seed(settings.seed)
    for _ in range(settings.epochs):
        sgd.epoch(images, labels, BATCH_SIZE, generator)
        trace = probe(model, cost, x, labels)[:-1]
        now = norms(trace, "delta"), norms(trace, "mean_delta")
        if not all(map(math.isfinite, itertools.chain(*now))):
            break
        history.append(now)
    diverged = len(history) <= settings.epochs
    of_epochs, speeds = (list(column) for column in zip(*history, strict=True))
    return start, TrainingCourse(activation, init, depth, of_epochs, speeds, diverged)


def norms(trace: list[Record], quantity: str) -> list[float]:
    """Return the norm of a quantity in each layer; NaN if there is none."""
    values = [record.norm(quantity) for record in trace]
    return [math.nan if value is None else value for value in values]


def summarise(activation: str, init: str, traces: list[list[Record]]) -> InitialState:
    """Return the means over the seeds."""

    def means(of_seeds: list[list[float]]) -> list[float]:
        return [
            math.exp(statistics.fmean(math.log(max(v, TINY)) for v in of_layer))
            for of_layer in zip(*of_seeds, strict=True)
        ]

    return InitialState(
        activation,
        init,
        len(traces[0]),
        means([norms(trace, "delta") for trace in traces]),
        means([norms(trace, "mean_delta") for trace in traces]),
        means([predictions(trace) for trace in traces]),
        statistics.fmean(r.saturated for trace in traces for r in trace),
    )


def predictions(trace: list[Record]) -> list[float]:
    """Return s √n √(mean σ'²) of every hidden layer but the last: s² is the mean square
    of W^{ℓ+1} and n the number of its columns, the neurons of layer ℓ."""
    return [
        math.sqrt(
            after.weight.square().mean().item()
            * after.weight.shape[1]
            * record.sigma_prime.square().mean().item()
        )
        for record, after in itertools.pairwise(trace)
    ]


def judge(starts: list[InitialState], courses: list[TrainingCourse]) -> dict[str, bool]:
    """Return whether the measurements show each claim."""
    deepest = max(start.depth for start in starts)
    deep = {(s.activation, s.init): s for s in starts if s.depth == deepest}
    book = [s for s in starts if (s.activation, s.init) == BOOK]
    trained = [c for c in courses if (c.activation, c.init) == BOOK and c.depth > 1]
    firsts = [start.speeds[0] for start in sorted(book, key=lambda s: s.depth)]
    sigmoids = [s.slope for (activation, _), s in deep.items() if activation == BOOK[0]]
    return {
        f"BP2 predicts the mean factor of a layer, within {AGREEMENT - 1:.0%}": all(
            1 / AGREEMENT < s.factor / s.predicted_factor < AGREEMENT
            for s in deep.values()
        ),
        f"and the factor of each layer, within {LAYER_AGREEMENT - 1:.0%}": all(
            1 / LAYER_AGREEMENT < factor / predicted < LAYER_AGREEMENT
            for s in deep.values()
            for factor, predicted in zip(s.factors, s.predicted, strict=True)
        ),
        "sigmoid, every initialisation: ‖δ^ℓ‖ falls towards the input": (
            min(sigmoids) > 0
        ),
        "sigmoid, scaled: to less than half per layer": deep[BOOK].factor < 0.5,
        "sigmoid, scaled: the deeper the network, the slower its first layer": all(
            deeper < shallower for shallower, deeper in itertools.pairwise(firsts)
        ),
        "scaled: tanh and ReLU lose less than half as much per layer (in ln ‖δ‖)": all(
            deep[activation, "scaled"].slope < deep[BOOK].slope / 2
            for activation in ("tanh", "relu")
        ),
        "ReLU, normal: ‖δ^ℓ‖ grows towards the input": deep[EXPLODING].slope < 0,
        "sigmoid, scaled: ‖δ^1‖ and ‖∂C/∂b^1‖ are the smallest in training, too": all(
            of_layers[0] == min(of_layers) < of_layers[-1]
            for course in trained
            for of_layers in (*course.norms, *course.speeds)
        ),
    }


def start_table(starts: list[InitialState], courses: list[TrainingCourse]) -> str:
    """Return the table of the deepest networks, before training and after."""
    deepest = max(start.depth for start in starts)
    titles = ["activation", "init", "‖δ^1‖", f"‖δ^{deepest}‖", "slope", "factor"]
    lines = [[*titles, "BP2's", "saturated", "slope, trained"]]
    for s, course in zip(starts, courses, strict=True):
        if s.depth == deepest:
            figures = [f"{s.norms[0]:.2g}", f"{s.norms[-1]:.2g}", f"{s.slope:+.2f}"]
            figures += [f"{s.factor:.3g}", f"{s.predicted_factor:.3g}"]
            figures += [f"{s.saturated:.0%}", f"{slope_of(course.norms[-1]):+.2f}"]
            figures[-1] += " diverged" * course.diverged
            lines.append([s.activation, s.init, *figures])
    epochs = max(len(course.norms) - 1 for course in courses)
    title = (
        f"{deepest} hidden layers before training: slope of ln ‖δ^ℓ‖ over ℓ, factor "
        f"per layer,\nthe factor that BP2 predicts, share of saturated neurons; slope "
        f"after {epochs} epochs"
    )
    return f"{title}\n{aligned(lines, left=2)}"


def depth_table(starts: list[InitialState], courses: list[TrainingCourse]) -> str:
    """Return the table of ‖∂C/∂b^ℓ‖ in the book's network of every depth."""
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


def curves(courses: list[TrainingCourse]) -> dict[str, list[tuple[int, float]]]:
    """Return each layer's ‖δ^ℓ‖ and ‖∂C/∂b^ℓ‖ over the epochs, for TensorBoard."""
    return {
        f"{c.activation} {c.init} {c.depth}/{name}_{ell}": list(enumerate(of_layer))
        for c in courses
        for name, of_epochs in (("norm", c.norms), ("speed", c.speeds))
        for ell, of_layer in enumerate(zip(*of_epochs, strict=True), start=1)
    }


def draw(
    figure: Any, starts: list[InitialState], courses: list[TrainingCourse]
) -> None:
    """Draw ‖δ^ℓ‖ over ℓ before training, and the book's network in training."""
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    deepest = max(start.depth for start in starts)
    styles = dict(zip(INITIALISATIONS, ("-", "--", ":"), strict=True))
    colours = dict(zip(ACTIVATIONS, ("C0", "C1", "C2"), strict=True))
    # The legend has the order of the lines at the left, where they are apart.
    for s in sorted(starts, key=lambda s: -s.norms[0]):
        if s.depth == deepest:
            style = colours[s.activation] + styles[s.init]
            label = f"{s.activation}, {s.init}"
            left.semilogy(range(1, deepest + 1), s.norms, style, label=label)
    left.set_title(f"‖δ^ℓ‖ before training, {deepest} hidden layers", fontsize=10)
    left.set_xlabel("hidden layer ℓ")
    left.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    depth = min(4, deepest)
    for c in courses:
        if (c.activation, c.init, c.depth) == (*BOOK, depth):
            for ell, of_layer in enumerate(zip(*c.norms, strict=True), start=1):
                right.semilogy(of_layer, label=f"ℓ = {ell}")
    right.set_title(f"‖δ^ℓ‖ in training: {', '.join(BOOK)}", fontsize=10)
    right.set_xlabel("epoch")
    right.legend(fontsize=8, ncols=2)


command_line = reporting.command_line(main, VanishingSettings, QUICK, __doc__)

if __name__ == "__main__":
    sys.exit(command_line())
