"""What slows learning down: the σ' of BP1, and the a^{ℓ-1} of BP4.

    python experiments/learning_slowdown.py                  on MNIST
    python experiments/learning_slowdown.py --saturation 6   a worse initial network
    python experiments/learning_slowdown.py --quick          fewer images and steps

The claims:

    BP1   δ^L = ∇_a C ⊙ σ'(z^L)      quadratic cost: (a - y) σ', so an output that is
                                     saturated at the wrong end hardly learns;
                                     cross-entropy: a - y, faster the larger the error
    BP4   ∂C/∂W^ℓ = δ^ℓ (a^{ℓ-1})ᵀ   the weights of an input that is always 0 do not
                                     change; the larger an input's mean, the faster
                                     its weights learn
    ½     of the quadratic cost only scales η: without it and with η/2, the same
          trajectory

The program trains one neuron (input 1, target 0) from a good and from a bad start, then
a network [784, 30, 10] from its usual start and from one whose outputs are all
saturated at 1, each with both costs at the same η.

Exit status: 0 the claims are shown, 1 a claim is not, 2 bad arguments or data.

Source: Nielsen, Neural Networks and Deep Learning, chapters 2 and 3.
"""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # to find experiments and torchbp

import torchbp
from experiments.support import reporting
from experiments.support.one_neuron import (
    COSTS,
    NEURON_LR,
    NEURON_STARTS,
    Curve,
    CurveRecorder,
    neuron,
)
from experiments.support.options import check_least, option
from torchbp import data
from torchbp._numeric import relative_distance
from torchbp._terminal import aligned
from torchbp.training import AutogradSGD, cpu_threads

HIDDEN, CLASSES, BATCH_SIZE = 30, 10, 10
PROBED = 200  # images on which the network's curves are measured
ALWAYS_ZERO = 67  # pixels of MNIST's 50,000 training images
HALF_STEPS, HALF_EVERY, HALF_LR = 300, 10, 3.0
BINS = 5

# ‖y - a‖² without the ½.
WholeCost = torchbp.define_cost(
    "WholeCost", lambda a, y: (a - y).square().sum(-1), lambda a, y: 2 * (a - y)
)
QUICK: dict[str, Any] = {"examples": 5000, "steps": 2000, "batches": 50}


@dataclass(frozen=True, kw_only=True)
class SlowdownSettings(reporting.ImageSettings):
    """How saturated the initial network is, and how long its training is recorded; each
    field is an option: `saturation`, `lr`, `steps`, `every`, `examples`, `batches`."""

    saturation: float = option(4.0, "biases of the saturated outputs")
    lr: float = option(0.02, "learning rate η of the network")
    steps: int = option(4000, "training steps of the network")
    every: int = option(5, "steps between the points of a curve")
    examples: int = option(50_000, "training images")
    batches: int = option(500, "mini-batches in which the inputs' speeds are measured")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, steps=1, every=1, examples=1, batches=1, lr=0, saturation=0)
        if self.every > self.steps:
            raise ValueError(
                f"every: expected at most steps, {self.steps}, got {self.every}"
            )


@dataclass(frozen=True)
class InputSpeeds:
    """How the inputs' activations determine the learning of the first layer's weights.

    Attributes:
        always_zero: the number of inputs that are 0 in every image.
        zero_change: the largest change of their weights in an epoch.
        other_change: the largest change of all other weights.
        correlation: of the ranks of mean activation and of learning speed.
        bins: mean activation and mean speed of each fifth of the inputs.
    """

    always_zero: int
    zero_change: float
    other_change: float
    correlation: float
    bins: list[tuple[float, float]]


@dataclass(frozen=True)
class HalfDistances:
    """Trainings without the ½: the largest relative distance of their weights from
    those of the quadratic cost.

    Attributes:
        half_rate: with η/2.
        same_rate: with η.
    """

    half_rate: float
    same_rate: float


def main(settings: SlowdownSettings) -> dict[str, Any]:
    """Measure, print the tables and return the content of results.json.

    Args:
        settings: what is measured.
    """
    splits = reporting.load(settings)
    print(reporting.claim_of(__doc__))
    split = data.Split(*(t[: settings.examples] for t in splits.train))
    with cpu_threads(1), reporting.ExperimentRun("learning_slowdown", settings) as run:
        kinds = list(itertools.product(COSTS, NEURON_STARTS))
        neurons = [neuron(cost, start) for cost, start in kinds]
        networks = [network(settings, split, cost, start) for cost, start in kinds]
        inputs = measure_inputs(settings, split)
        half = measure_half(split)
        is_whole = settings.dataset == "mnist" and len(split.labels) == 50_000
        print(f"one neuron, η {NEURON_LR:g}, epochs\n{curve_table(neurons)}\n")
        print(f"network, η {settings.lr:g}, steps\n{curve_table(networks)}\n")
        print(f"{input_table(inputs)}\n\n{half_table(half)}")
        trainings = {"neuron": neurons, "network": networks}
        return run.conclude(
            settings,
            {
                "neurons": [asdict(curve) for curve in neurons],
                "networks": [asdict(curve) for curve in networks],
                "inputs": asdict(inputs),
                "half": asdict(half),
            },
            judge(neurons, networks, inputs, half, is_whole),
            points(trainings),
            lambda figure: draw(figure, trainings),
            (9, 5.5),
        )


def network(
    settings: SlowdownSettings, split: data.Split, cost: str, start: str
) -> Curve:
    """Train the book's network; its outputs are saturated at 1 if `start` is "bad"."""
    make, output = COSTS[cost]
    torch.manual_seed(settings.seed)
    n_in = split.images.shape[1]
    model = torchbp.MLP(
        [n_in, HIDDEN, CLASSES], output=output, device="cpu", dtype=torch.float32
    )
    if start == "bad":
        torch.nn.init.constant_(model.layers[-1].bias, settings.saturation)  # type: ignore[arg-type]
    sgd = torchbp.ExplicitSGD(model, make(), settings.lr)
    x = data.scale(split.images[:PROBED])
    y = torch.nn.functional.one_hot(split.labels[:PROBED], CLASSES).to(x.dtype)
    generator = torch.Generator("cpu").manual_seed(settings.seed)
    recorder = CurveRecorder(cost, start)
    recorder.add(0, model, x, y)
    n = len(split.labels)
    for step in range(settings.every, settings.steps + 1, settings.every):
        order = torch.randint(
            n, (settings.every * BATCH_SIZE,), generator=generator, device="cpu"
        )
        for _ in sgd.steps(*split, order, BATCH_SIZE):
            pass
        recorder.add(step, model, x, y)
    return recorder.curve()


def measure_inputs(settings: SlowdownSettings, split: data.Split) -> InputSpeeds:
    """Measure how fast the first layer's weights learn, input by input."""
    torch.manual_seed(settings.seed)
    cost = torchbp.QuadraticCost()
    model = torchbp.MLP(
        [split.images.shape[1], HIDDEN, CLASSES], device="cpu", dtype=torch.float32
    )
    mean = split.images.double().mean(0) / 255
    generator = torch.Generator("cpu").manual_seed(settings.seed)
    order = torch.randperm(len(split.labels), generator=generator, device="cpu")
    speed = torch.zeros_like(mean)
    batches = order.split(BATCH_SIZE)[: settings.batches]
    for rows in batches:
        x, y = data.scale(split.images[rows]), split.labels[rows]
        _, grads = torchbp.backprop(model, cost, x, y)
        speed += grads["layers.0.weight"].double().norm(dim=0) / len(batches)
    W: Tensor = model.layers[0].weight  # type: ignore[assignment]
    before = W.detach().clone()
    torchbp.ExplicitSGD(model, cost, 3.0).epoch(*split, BATCH_SIZE, generator)
    change = (W.detach() - before).abs().amax(0)
    is_zero = split.images.amax(0) == 0
    means, speeds = mean[~is_zero], speed[~is_zero]
    fifths = torch.tensor_split(torch.argsort(means), BINS)
    return InputSpeeds(
        always_zero=int(is_zero.sum()),
        zero_change=change[is_zero].max().item() if is_zero.any() else 0.0,
        other_change=change[~is_zero].max().item(),
        correlation=rank_correlation(means, speeds),
        bins=[(means[i].mean().item(), speeds[i].mean().item()) for i in fifths],
    )


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Return Spearman's rank correlation, without a correction for ties."""
    ranks = torch.stack([t.argsort().argsort().double() for t in (x, y)])
    return torch.corrcoef(ranks)[0, 1].item()


def measure_half(split: data.Split) -> HalfDistances:
    """Train with and without the quadratic cost's ½, in float64 on the same batches."""
    sizes = [split.images.shape[1], HIDDEN, CLASSES]
    kinds = ((torchbp.QuadraticCost, 1.0), (WholeCost, 0.5), (WholeCost, 1.0))
    engines = []
    for make, share in kinds:
        torch.manual_seed(0)
        model = torchbp.MLP(sizes, device="cpu", dtype=torch.float64)
        engines.append(AutogradSGD(model, make(), HALF_LR * share))
    generator = torch.Generator("cpu").manual_seed(0)
    distances = [0.0, 0.0]
    for _ in range(HALF_STEPS // HALF_EVERY):
        order = torch.randint(
            len(split.labels),
            (HALF_EVERY * BATCH_SIZE,),
            generator=generator,
            device="cpu",
        )
        for engine in engines:
            for _ in engine.steps(*split, order, BATCH_SIZE):
                pass
        expected, *others = (list(engine.model.parameters()) for engine in engines)
        distances = [
            max(largest, relative_distance(weights, expected))
            for largest, weights in zip(distances, others, strict=True)
        ]
    return HalfDistances(*distances)


def judge(
    neurons: list[Curve],
    networks: list[Curve],
    inputs: InputSpeeds,
    half: HalfDistances,
    is_whole: bool,
) -> dict[str, bool]:
    """Return whether the measurements show each claim.

    Args:
        neurons: the trainings of the neuron.
        networks: the trainings of the network.
        inputs: the learning of the first layer's weights.
        half: the trainings without the ½.
        is_whole: whether all of MNIST's training images were used.
    """
    one = {(curve.cost, curve.start): curve for curve in neurons}
    many = {(curve.cost, curve.start): curve for curve in networks}
    claims = {
        "BP1: δ^L is (a - y) σ' with the quadratic cost, a - y with cross-entropy": all(
            curve.error < 1e-5 for curve in (*neurons, *networks)
        )
    }
    for name, curves in (("neuron", one), ("network", many)):
        slower = {cost: slowdown(curves, cost) for cost in COSTS}
        quadratic, entropy = (
            (curves[cost, "good"].delta[0], curves[cost, "bad"].delta[0])
            for cost in COSTS
        )
        claims |= {
            f"{name}, quadratic: the bad start's larger error gives a smaller δ": (
                quadratic[1] < quadratic[0]
            ),
            f"{name}, cross-entropy: the bad start's larger error gives a larger δ": (
                entropy[1] > entropy[0]
            ),
            f"{name}: the bad start slows quadratic 3 x and more, twice as much as "
            "cross-entropy": (
                slower["quadratic"] >= max(3, 2 * slower["cross-entropy"])
            ),
        }
    claims |= {
        "BP4: the weights of inputs that are always 0 do not change at all": (
            inputs.always_zero > 0 and inputs.zero_change == 0 < inputs.other_change
        ),
        "BP4: the larger an input, the faster its weights (rank correlation > 0.9)": (
            inputs.correlation > 0.9
        ),
        "½: without it, η/2 gives the same trajectory and η another": (
            half.half_rate < 1e-9 and half.same_rate > 1e-3
        ),
    }
    if is_whole:
        claims[f"MNIST: {ALWAYS_ZERO} pixels are always 0"] = (
            inputs.always_zero == ALWAYS_ZERO
        )
    return claims


def slowdown(curves: dict[tuple[str, str], Curve], cost: str) -> float:
    """Return how many times as long the cost takes to halve from the bad start: inf if
    it halves from the good one only, NaN if from neither."""
    good, bad = (curves[cost, start].halved for start in NEURON_STARTS)
    return bad / good


def curve_table(curves: list[Curve]) -> str:
    """Return the table of trainings."""
    titles = [
        "cost",
        "start",
        "C",
        "σ'(z^L)",
        "‖δ^L‖",
        "C halves after",
        "C at the end",
    ]
    lines = [titles]
    for c in curves:
        after = "never" if c.halved == math.inf else str(c.halved)
        first = [f"{c.C[0]:.3g}", f"{c.sigma_prime[0]:.3g}", f"{c.delta[0]:.3g}"]
        lines.append([c.cost, c.start, *first, after, f"{c.C[-1]:.3g}"])
    return aligned(lines, left=2)


def input_table(inputs: InputSpeeds) -> str:
    """Return the table of inputs."""
    lines = [["inputs k of the first layer", "mean activation", "mean ‖∂C/∂W[:, k]‖"]]
    for i, (mean, speed) in enumerate(inputs.bins, start=1):
        lines.append([f"fifth {i} of those not 0", f"{mean:.2g}", f"{speed:.2g}"])
    return (
        f"{aligned(lines, left=1)}\nrank correlation of activation and speed "
        f"{inputs.correlation:.3f}\n{inputs.always_zero} inputs are always 0: in an "
        f"epoch their weights changed by at most {inputs.zero_change:g}, others by "
        f"{inputs.other_change:.2g}"
    )


def half_table(half: HalfDistances) -> str:
    """Return the table of trainings without the ½."""
    lines = [["quadratic cost without its ½", "largest distance of the weights"]]
    lines += [["η/2", f"{half.half_rate:.1e}"], ["η", f"{half.same_rate:.1e}"]]
    return f"{HALF_STEPS} steps, η {HALF_LR:g}, float64\n{aligned(lines, left=1)}"


def points(trainings: dict[str, list[Curve]]) -> dict[str, list[tuple[int, float]]]:
    """Return the curves for TensorBoard."""
    return {
        f"{name}_{quantity}/{c.cost} {c.start}": list(
            zip(c.times, getattr(c, quantity), strict=True)
        )
        for name, curves in trainings.items()
        for c in curves
        for quantity in ("C", "sigma_prime", "delta")
    }


def draw(figure: Any, trainings: dict[str, list[Curve]]) -> None:
    """Draw cost, σ' and ‖δ^L‖, of the neuron above and of the network below."""
    axes = figure.subplots(2, 3)
    colours = dict(zip(COSTS, ("C0", "C1"), strict=True))
    names = {"C": "cost C", "sigma_prime": "mean σ'(z^L)", "delta": "‖δ^L‖"}
    for row, (name, curves) in zip(axes, trainings.items(), strict=True):
        for ax, (quantity, label) in zip(row, names.items(), strict=True):
            for c in curves:
                style = colours[c.cost] + ("-" if c.start == "good" else "--")
                values = getattr(c, quantity)
                ax.plot(c.times, values, style, label=f"{c.cost}, {c.start} start")
            if quantity != "sigma_prime":  # σ' is at most 1/4
                ax.set_yscale("log")
            ax.set_title(f"{name}: {label}", fontsize=10)
            ax.tick_params(labelsize=8)
            ax.set_xlabel("epoch" if name == "neuron" else "step", fontsize=8)
            if name == "network":  # which leaves its bad start in few steps
                ax.set_xscale("log")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)


command_line = reporting.command_line(main, SlowdownSettings, QUICK, __doc__)

if __name__ == "__main__":
    sys.exit(command_line())
