"""What slows learning down: the σ' of BP1, and the a^{ℓ-1} of BP4.

    python experiments/learning_slowdown.py                  on MNIST
    python experiments/learning_slowdown.py --saturation 6   a worse start
    python experiments/learning_slowdown.py --quick          a smaller part of the data

The claims:

    BP1   δ^L = ∇_a C ⊙ σ'(z^L)      quadratic cost: (a - y) σ', so an output that is
                                     saturated at the wrong end hardly learns;
                                     cross-entropy: a - y, the worse the faster
    BP4   ∂C/∂W^ℓ = δ^ℓ (a^{ℓ-1})ᵀ   a weight from an input that is never on does not
                                     move, and the more an input is on, the faster
                                     its weights learn
    ½     of the quadratic cost is a matter of η: without it and with η/2, the same
          trajectory

One neuron (input 1, target 0), from a good start and from a bad one; then a network
[784, 30, 10], from its usual start and from one whose outputs are all saturated at 1;
both costs at the same η.

Exit status: 0 the claims are shown, 1 one is not, 2 bad arguments or data.

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

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the files beside this one

import torchbp
from experiments.support import reporting
from experiments.support.one_neuron import (
    COSTS,
    NEURON_LR,
    NEURON_STARTS,
    Curve,
    Points,
    neuron,
)
from experiments.support.options import option
from torchbp import data
from torchbp._numeric import relative_distance
from torchbp._terminal import aligned
from torchbp.training import AutogradSGD, cpu_threads

HIDDEN, CLASSES, BATCH_SIZE = 30, 10, 10
PROBED = 200  # images that the network's curves are measured on
NEVER_ON = 67  # pixels of MNIST's 50,000 training images
HALF_STEPS, HALF_EVERY, HALF_LR = 300, 10, 3.0
BINS = 5

# ‖y - a‖² without the ½.
WholeCost = torchbp.define_cost(
    "WholeCost", lambda a, y: (a - y).square().sum(-1), lambda a, y: 2 * (a - y)
)
QUICK: dict[str, Any] = {"examples": 5000, "steps": 2000, "batches": 50}


@dataclass(frozen=True, kw_only=True)
class Settings(reporting.OnImages):
    """How saturated the initial network is, and how long its training is recorded."""

    saturation: float = option(4.0, "biases of the saturated outputs")
    lr: float = option(0.02, "η of the network")
    steps: int = option(4000, "of the network")
    every: int = option(5, "steps between points of a curve")
    examples: int = option(50_000, "training images")
    batches: int = option(500, "for the learning speed of inputs")

    def __post_init__(self) -> None:
        super().__post_init__()
        reporting.at_least(self, steps=1, every=1, examples=1, batches=1, lr=0)
        reporting.at_least(self, saturation=0)
        if self.every > self.steps:
            raise ValueError(
                f"every: expected at most steps, {self.steps}, got {self.every}"
            )


@dataclass(frozen=True)
class Inputs:
    """What a^{ℓ-1} does to the first layer's weights."""

    never_on: int
    moved: float  # by how much any weight from those moved in an epoch
    others_moved: float  # the largest movement of the rest
    correlation: float  # of the ranks of mean activation and of learning speed
    bins: list[tuple[float, float]]  # mean activation, mean speed; of a fifth each


@dataclass(frozen=True)
class Half:
    """The relative distance of the weights from those of the quadratic cost, the
    largest on the way."""

    half_rate: float  # without ½, with η/2
    same_rate: float  # without ½, with η


def main(settings: Settings) -> dict[str, Any]:
    """Measure, print the tables, and return what is in results.json."""
    splits = reporting.load(settings)
    print(reporting.stated(__doc__))
    split = data.Split(*(t[: settings.examples] for t in splits.train))
    with cpu_threads(1), reporting.Report("learning_slowdown", settings) as report:
        kinds = list(itertools.product(COSTS, NEURON_STARTS))
        neurons = [neuron(cost, start) for cost, start in kinds]
        networks = [network(settings, split, cost, start) for cost, start in kinds]
        inputs = look_at_inputs(settings, split)
        half = look_at_half(split)
        whole = settings.dataset == "mnist" and len(split.labels) == 50_000
        print(f"one neuron, η {NEURON_LR:g}, epochs\n{curve_table(neurons)}\n")
        print(f"network, η {settings.lr:g}, steps\n{curve_table(networks)}\n")
        print(f"{input_table(inputs)}\n\n{half_table(half)}")
        shown = {"neuron": neurons, "network": networks}
        return report.conclude(
            settings,
            {
                "neurons": [asdict(curve) for curve in neurons],
                "networks": [asdict(curve) for curve in networks],
                "inputs": asdict(inputs),
                "half": asdict(half),
            },
            judge(neurons, networks, inputs, half, whole),
            points(shown),
            lambda figure: draw(figure, shown),
            (9, 5.5),
        )


def network(settings: Settings, split: data.Split, cost: str, start: str) -> Curve:
    """The book's network, its outputs saturated at 1 if the start is the bad one."""
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
    found = Points(cost, start)
    found.add(0, model, x, y)
    n = len(split.labels)
    for step in range(settings.every, settings.steps + 1, settings.every):
        order = torch.randint(
            n, (settings.every * BATCH_SIZE,), generator=generator, device="cpu"
        )
        for _ in sgd.steps(*split, order, BATCH_SIZE):
            pass
        found.add(step, model, x, y)
    return found.curve()


def look_at_inputs(settings: Settings, split: data.Split) -> Inputs:
    """How fast the first layer's weights learn, input by input."""
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
    moved = (W.detach() - before).abs().amax(0)
    off = split.images.amax(0) == 0
    by_mean = torch.argsort(mean[~off])
    parts = torch.tensor_split(by_mean, BINS)
    return Inputs(
        never_on=int(off.sum()),
        moved=moved[off].max().item() if off.any() else 0.0,
        others_moved=moved[~off].max().item(),
        correlation=rank_correlation(mean[~off], speed[~off]),
        bins=[
            (mean[~off][part].mean().item(), speed[~off][part].mean().item())
            for part in parts
        ],
    )


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Spearman's, without a correction for ties."""
    ranks = torch.stack([t.argsort().argsort().double() for t in (x, y)])
    return torch.corrcoef(ranks)[0, 1].item()


def look_at_half(split: data.Split) -> Half:
    """The quadratic cost with and without its ½, in float64, on the same batches."""
    sizes = [split.images.shape[1], HIDDEN, CLASSES]
    kinds = ((torchbp.QuadraticCost, 1.0), (WholeCost, 0.5), (WholeCost, 1.0))
    engines = []
    for make, share in kinds:
        torch.manual_seed(0)
        model = torchbp.MLP(sizes, device="cpu", dtype=torch.float64)
        engines.append(AutogradSGD(model, make(), HALF_LR * share))
    generator = torch.Generator("cpu").manual_seed(0)
    off = [0.0, 0.0]
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
        off = [
            max(far, relative_distance(weights, expected))
            for far, weights in zip(off, others, strict=True)
        ]
    return Half(*off)


def judge(
    neurons: list[Curve], networks: list[Curve], inputs: Inputs, half: Half, whole: bool
) -> dict[str, bool]:
    """Every claim, and whether the measurements show it.

    Args:
        whole: all of MNIST's training images were looked at.
    """
    one = {(curve.cost, curve.start): curve for curve in neurons}
    many = {(curve.cost, curve.start): curve for curve in networks}
    claims = {
        "BP1: δ^L is (a - y) σ' with the quadratic cost, a - y with cross-entropy": all(
            curve.off < 1e-5 for curve in (*neurons, *networks)
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
        "BP4: weights from inputs that are never on do not move at all": (
            inputs.never_on > 0 and inputs.moved == 0 < inputs.others_moved
        ),
        "BP4: the more an input is on, the faster its weights (rank corr. > 0.9)": (
            inputs.correlation > 0.9
        ),
        "½: without it and with η/2 the same trajectory, with η another": (
            half.half_rate < 1e-9 and half.same_rate > 1e-3
        ),
    }
    if whole:
        claims[f"MNIST: {NEVER_ON} pixels are never on"] = inputs.never_on == NEVER_ON
    return claims


def slowdown(curves: dict[tuple[str, str], Curve], cost: str) -> float:
    """How many times as long the bad start takes until the cost has halved; inf if it
    does not, NaN if the good one does not either."""
    good, bad = (curves[cost, start].halved for start in NEURON_STARTS)
    return bad / good


def curve_table(curves: list[Curve]) -> str:
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


def input_table(inputs: Inputs) -> str:
    lines = [["inputs k of the first layer", "mean activation", "mean ‖∂C/∂W[:, k]‖"]]
    for i, (mean, speed) in enumerate(inputs.bins, start=1):
        lines.append([f"fifth {i} of those on", f"{mean:.2g}", f"{speed:.2g}"])
    return (
        f"{aligned(lines, left=1)}\nranks of activation and speed correlate by "
        f"{inputs.correlation:.3f}\n{inputs.never_on} inputs are never on: in an epoch "
        f"their weights moved by {inputs.moved:g} at most, others by "
        f"{inputs.others_moved:.2g}"
    )


def half_table(half: Half) -> str:
    lines = [["quadratic cost without its ½", "weights off, at most"]]
    lines += [["η/2", f"{half.half_rate:.1e}"], ["η", f"{half.same_rate:.1e}"]]
    return f"{HALF_STEPS} steps, η {HALF_LR:g}, float64\n{aligned(lines, left=1)}"


def points(shown: dict[str, list[Curve]]) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows."""
    return {
        f"{name}_{quantity}/{c.cost} {c.start}": list(
            zip(c.times, getattr(c, quantity), strict=True)
        )
        for name, curves in shown.items()
        for c in curves
        for quantity in ("C", "sigma_prime", "delta")
    }


def draw(figure: Any, shown: dict[str, list[Curve]]) -> None:
    """Cost, σ' and ‖δ^L‖, of the neuron above and of the network below."""
    axes = figure.subplots(2, 3)
    colours = dict(zip(COSTS, ("C0", "C1"), strict=True))
    names = {"C": "cost C", "sigma_prime": "mean σ'(z^L)", "delta": "‖δ^L‖"}
    for row, (name, curves) in zip(axes, shown.items(), strict=True):
        for ax, (quantity, label) in zip(row, names.items(), strict=True):
            for c in curves:
                style = colours[c.cost] + ("-" if c.start == "good" else "--")
                values = getattr(c, quantity)
                ax.plot(c.times, values, style, label=f"{c.cost}, {c.start} start")
            if quantity != "sigma_prime":  # which has its end at 1/4
                ax.set_yscale("log")
            ax.set_title(f"{name}: {label}", fontsize=10)
            ax.tick_params(labelsize=8)
            ax.set_xlabel("epoch" if name == "neuron" else "step", fontsize=8)
            if name == "network":  # its bad start is over soon
                ax.set_xscale("log")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)


def command_line(arguments: list[str] | None = None) -> int:
    """The shell around :func:`main`; returns the exit status."""
    return reporting.run(main, Settings, QUICK, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(command_line())
