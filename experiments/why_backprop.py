"""Why backpropagation: the cost and the error of a gradient by every other way.

    python experiments/why_backprop.py               networks of 10² to 10⁶ parameters
    python experiments/why_backprop.py --sizes 8 6 4 --sizes 784 30 10
    python experiments/why_backprop.py --quick       up to 10⁴

The claim: one forward and one backward pass give all P partial derivatives of C,

    BP1   δ^L = ∇_a C ⊙ σ'(z^L)                      BP3   ∂C/∂b^ℓ = δ^ℓ
    BP2   δ^ℓ = ((W^{ℓ+1})ᵀ δ^{ℓ+1}) ⊙ σ'(z^ℓ)       BP4   ∂C/∂W^ℓ = δ^ℓ (a^{ℓ-1})ᵀ

while the other ways take one or two forward passes for each parameter:

    forward difference    (C(w + ε e_j) - C(w)) / ε                P + 1 passes
    central difference    (C(w + ε e_j) - C(w - ε e_j)) / (2ε)     2 P
    forward mode          exact, but starts at the P               P
                          parameters; the backward pass
                          starts at C, a single number

A pass takes time ~ P, so perturbation takes ~ P² and backprop ~ P: it is faster by a
factor of about P. "Exponentially cheaper" is loose: nothing is exponential in P.

The backward pass costs about as much as the forward pass. With one matrix product for
δ^ℓ (a^{ℓ-1})ᵀ and, except in the first layer, one for Wᵀ δ, it takes

    back / forward = 1 + Σ_{ℓ≥2} n_ℓ n_{ℓ-1} / Σ_ℓ n_ℓ n_{ℓ-1}      (operations)

1.01 at [784, 30, 10], 1.40 at [784, 512, 512, 10], towards 2 in deep networks.

The error of the differences over ε is a V: rounding ~ u/ε on its left, truncation ~ ε
(central ~ ε²) on its right; the best ε is about √u (central ∛u), u the rounding unit.

Exit status: 0 the claims are shown, 1 a claim is not, 2 bad arguments.

In networks of more than 10⁴ parameters only a sample of them is perturbed. Times and
numbers of passes that are extrapolated from a sample are marked ~.

Source: Nielsen, Neural Networks and Deep Learning, chapter 2.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # to find experiments and torchbp

import torchbp
from experiments.support import gradient_costs, reporting
from experiments.support.gradient_costs import (
    EPSILON,
    POWERS,
    V_SIZES,
    DifferenceErrors,
    GradientCost,
    PassRatio,
    measure_errors,
    measure_passes,
    measure_ways,
)
from experiments.support.gradient_ways import (
    BACKPROPS,
    BATCH_SIZE,
    BATCHED,
    CENTRAL,
    FORWARD,
    LOOPS,
    MODE,
    PERTURBING,
    count_parameters,
)
from experiments.support.options import check_least, option
from torchbp._terminal import aligned, measured_time
from torchbp.training import cpu_threads

SIZES = (
    (8, 6, 4),
    (24, 24, 10),
    (100, 80, 10),
    (784, 100, 10),
    (784, 300, 100, 10),
    (784, 1000, 200, 10),
)
# Networks whose forward and backward passes are timed and counted.
PASSES = ((784, 30, 10), (784, 512, 512, 10), (784, *[512] * 8, 10))
# Tolerances of the claims: factors of the best ε and of P, and the relative deviation
# of the time back / forward from that of the operations.
EPSILON_FACTOR, P_FACTOR, TIME_DEVIATION = 30.0, 10.0, 0.4
QUICK: dict[str, Any] = {"sizes": SIZES[:3], "repeats": 5}


@dataclass(frozen=True, kw_only=True)
class WhySettings(reporting.CommonSettings):
    """Which networks, and how thoroughly they are timed; each field is an option:
    `sizes`, `repeats`, `batch_size`."""

    sizes: tuple[tuple[int, ...], ...] = option(
        SIZES,
        "neurons per layer; repeat the option for each network, at least two",
        shown="8 6 4 up to 784 1000 200 10",
    )
    repeats: int = option(7, "repetitions of every timing")
    batch_size: int = option(512, "examples in the timed passes")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, repeats=1, batch_size=1)
        if len(set(map(count_parameters, self.sizes))) < 2:
            raise ValueError(
                f"sizes: expected two networks or more of different numbers of "
                f"parameters, got {self.sizes}"
            )
        for sizes in self.sizes:  # raises for sizes that are no network
            torchbp.MLP(sizes, device="meta", dtype=torch.float32)


def main(settings: WhySettings) -> dict[str, Any]:
    """Measure, print the tables and return the content of results.json.

    Args:
        settings: what is measured.
    """
    print(reporting.claim_of(__doc__))
    seed, repeats = settings.seed, settings.repeats
    with cpu_threads(1), reporting.ExperimentRun("why_backprop", settings) as run:
        ways = []
        for sizes in sorted(settings.sizes, key=count_parameters):
            P = count_parameters(sizes)
            print(f"{list(sizes)}, {P:,} parameters ...", flush=True)
            ways += measure_ways(tuple(sizes), seed, repeats)
        passes = [
            measure_passes(sizes, seed, repeats, settings.batch_size)
            for sizes in PASSES
        ]
        errors = [
            measure_errors(seed, dtype, way)
            for dtype in POWERS
            for way in (FORWARD, CENTRAL)
        ]
        print(f"\n{way_table(ways, settings)}\n\n{growth_table(ways)}\n")
        print(f"{pass_table(passes, settings)}\n\n{error_table(errors)}")
        measured = {
            "ways": [asdict(way) for way in ways],
            "passes": [asdict(p) for p in passes],
            "errors": [asdict(e) for e in errors],
        }
        return run.conclude(
            settings,
            measured,
            judge(ways, passes, errors),
            curves(ways, errors),
            lambda figure: draw(figure, ways, errors),
        )


Ways = dict[str, list[GradientCost]]


def by_name(ways: list[GradientCost]) -> Ways:
    """Return the measurements of each way, over the networks."""
    names = (*PERTURBING, *BACKPROPS)
    return {name: [w for w in ways if w.way == name] for name in names}


def judge(
    ways: list[GradientCost], passes: list[PassRatio], errors: list[DifferenceErrors]
) -> dict[str, bool]:
    """Return whether the measurements show each claim."""
    of = by_name(ways)
    counted = all(
        math.isclose(w.forward, per * w.P + once, rel_tol=1e-9)
        for name, (per, once) in PERTURBING.items()
        for w in of[name]
    )
    pairs = all(
        math.isclose(number, 1, rel_tol=1e-9)
        for name in BACKPROPS
        for w in of[name]
        for number in (w.forward, w.backward)
    )
    factors = [f / w.P for n in (FORWARD, CENTRAL) for w, f in factors_of(n, of)]
    exponents = [advantage(of[name], of[BATCHED]) for name in PERTURBING]
    exact = [w.error for name in (MODE, LOOPS, BATCHED) for w in of[name]]
    rough = [w.error for name in (FORWARD, CENTRAL) for w in of[name]]
    return {
        "passes forward, counted: P + 1, 2 P and P": counted,
        "BP1-BP4: one pass forward and one back, with the predicted operations": pairs
        and all(math.isclose(p.counted, p.predicted, rel_tol=1e-6) for p in passes),
        f"backprop is faster than differences by about P, P/{P_FACTOR:g} to "
        f"{P_FACTOR:g} P": 1 / P_FACTOR < min(factors) <= max(factors) < P_FACTOR,
        "and than all three by a factor that grows as P (exponent 0.75 to 1.25)": all(
            0.75 < exponent < 1.25 for exponent in exponents
        ),
        "BP1-BP4 and forward mode are exact to rounding, differences are not": (
            max(exact) < 1e-5 < 1e-4 < min(rough)
        ),
        f"a pass back takes its operations' share of time, within "
        f"{TIME_DEVIATION:.0%}": all(
            abs(p.measured / p.predicted - 1) < TIME_DEVIATION for p in passes
        ),
        "and more of it in the deepest network": (
            passes[-1].measured > passes[0].measured
        ),
        "the error over ε has the shape of a V": all(e.is_v for e in errors),
        f"which is lowest at √u, central at ∛u (within {EPSILON_FACTOR:g} x)": all(
            1 / EPSILON_FACTOR < e.epsilons[e.best] / e.balance < EPSILON_FACTOR
            for e in errors
        ),
        "falls on its left as 1/ε": are_close(-1, [e.left for e in errors]),
        "and rises on its right as ε, central as ε²": all(
            are_close(power, [e.right for e in errors if e.way == way])
            for way, power in ((FORWARD, 1), (CENTRAL, 2))
        ),
    }


def are_close(power: int, powers: list[float]) -> bool:
    """Return whether all powers but NaN are about `power`, and there are any."""
    measured = [p for p in powers if not math.isnan(p)]
    return bool(measured) and all(abs(p - power) < 0.3 for p in measured)


def factors_of(name: str, of: Ways) -> list[tuple[GradientCost, float]]:
    """Return each network's time by that way over its time by batched backprop."""
    pairs = zip(of[name], of[BATCHED], strict=True)
    return [(way, way.seconds / batch.seconds) for way, batch in pairs]


def advantage(slow: list[GradientCost], fast: list[GradientCost]) -> float:
    """Return p of (slow time / fast time) ~ P^p."""
    P = [math.log(w.P) for w in slow]
    pairs = zip(slow, fast, strict=True)
    ratios = [math.log(s.seconds / f.seconds) for s, f in pairs]
    return statistics.linear_regression(P, ratios).slope


def growth(ways: list[GradientCost]) -> float:
    """Return p of time ~ P^p, over the networks beyond 10⁴ parameters if there are two,
    else over the two largest."""
    large = [w for w in ways if w.P > gradient_costs.ALL_UP_TO]
    chosen = large if len(large) > 1 else sorted(ways, key=lambda w: w.P)[-2:]
    points = [(math.log(w.P), math.log(w.seconds)) for w in chosen]
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def way_table(ways: list[GradientCost], settings: WhySettings) -> str:
    """Return the table of ways."""
    title = [
        f"float32, batches of {BATCH_SIZE}, ε {EPSILON:g}; passes of a whole batch; "
        f"processor time, medians of {settings.repeats}"
    ]
    if any(w.is_sampled for w in ways):
        title.append(f"~ extrapolated from {gradient_costs.SAMPLE} parameters")
    lines = [["network", "way", "P", "passes", "back", "time", "over batched", "error"]]
    batch = {w.sizes: w.seconds for w in ways if w.way == BATCHED}
    last = None
    for w in ways:
        name, P = (short(w.sizes), f"{w.P:,}") if w.sizes != last else ("", "")
        last = w.sizes
        mark = "~" * w.is_sampled
        times = w.seconds / batch[w.sizes]
        factor = f"{mark}{times / w.P:.2f} P" if w.way in PERTURBING else f"{times:.1f}"
        figures = [f"{mark}{w.forward:,.0f}", f"{w.backward:,.0f}"]
        figures += [f"{mark}{measured_time(w.seconds)}", factor, f"{w.error:.0e}"]
        lines.append([name, w.way, P, *figures])
    return "\n".join([*title, aligned(lines, left=2)])


def growth_table(ways: list[GradientCost]) -> str:
    """Return the table of exponents, and why "exponentially cheaper" is loose."""
    of = by_name(ways)
    all_up_to = gradient_costs.ALL_UP_TO
    large = sum(all_up_to < w.P for w in of[BATCHED])
    which = f"P > {all_up_to:,}" if large > 1 else "the largest two"
    lines = [["way", f"time ~ P^p, {which}", "time / batched ~ P^p, all"]]
    for name, mine in of.items():
        faster = advantage(mine, of[BATCHED])
        lines.append([name, f"{growth(mine):.2f}", f"{faster:.2f}"])
    factors = [f / w.P for w, f in factors_of(FORWARD, of)]
    text = (
        '"exponentially cheaper" is loose: forward differences take '
        f"{min(factors):.2f} P to {max(factors):.2f} P times\nas long as backprop, so "
        "the factor is about P"
    )
    if large < 2:
        text += "\nin networks as small as these the time of a pass hardly depends on P"
    return f"{aligned(lines, left=1)}\n{text}"


def pass_table(passes: list[PassRatio], settings: WhySettings) -> str:
    """Return the table of passes."""
    lines = [["network", "operations, predicted", "counted", "time"]]
    lines += [
        [short(p.sizes), *(f"{v:.2f}" for v in (p.predicted, p.counted, p.measured))]
        for p in passes
    ]
    title = f"back / forward, batches of {settings.batch_size}, medians"
    return f"{title}\n{aligned(lines, left=1)}"


def short(sizes: Sequence[int]) -> str:
    """Return the sizes as text, with 8 x 512 for eight equal layers in a row."""
    parts = []
    for n, group in itertools.groupby(sizes):
        count = len(list(group))
        parts += [f"{count} x {n}"] if count > 2 else [str(n)] * count
    return f"[{', '.join(parts)}]"


def error_table(errors: list[DifferenceErrors]) -> str:
    """Return the table of the errors over ε."""
    titles = ["dtype", "way", "best ε", "√u or ∛u", "its error", "at both ends"]
    lines = [[*titles, "left ~ ε^p", "right ~ ε^p"]]
    for e in errors:
        best = [f"{v:.0e}" for v in (e.epsilons[e.best], e.balance, e.errors[e.best])]
        ends = f"{e.errors[0]:.0e}, {e.errors[-1]:.0e}"
        powers = ["—" if math.isnan(p) else f"{p:.2f}" for p in (e.left, e.right)]
        lines.append([e.dtype, e.way, *best, ends, *powers])
    title = f"error over ε, {short(V_SIZES)}; — too few ε on that side"
    return f"{title}\n{aligned(lines, left=2)}"


def curves(
    ways: list[GradientCost], errors: list[DifferenceErrors]
) -> dict[str, list[tuple[int, float]]]:
    """Return the curves for TensorBoard: over P, and over the powers of ten of ε."""
    points: dict[str, list[tuple[int, float]]] = {}
    for w in ways:
        for quantity in ("seconds", "error", "forward"):
            tag = f"{quantity}_over_P/{w.way}"
            points.setdefault(tag, []).append((w.P, getattr(w, quantity)))
    for e in errors:
        # TensorBoard's steps are whole numbers: a tenth of a power each.
        powers = [round(-10 * math.log10(epsilon)) for epsilon in e.epsilons]
        pairs = sorted(zip(powers, e.errors, strict=True))
        points[f"error_over_minus_10_log10_epsilon/{e.dtype} {e.way}"] = pairs
    return points


def draw(figure: Any, ways: list[GradientCost], errors: list[DifferenceErrors]) -> None:
    """Draw time over P, and error over ε."""
    left, right = figure.subplots(1, 2)
    colours = {MODE: "C2", CENTRAL: "C1", FORWARD: "C0", LOOPS: "C3", BATCHED: "C4"}
    for name, colour in colours.items():
        mine = [w for w in ways if w.way == name]
        P, seconds = [w.P for w in mine], [w.seconds for w in mine]
        left.loglog(P, seconds, colour + "-", label=name)
        for w in mine:
            face = "white" if w.is_sampled else colour
            left.plot(w.P, w.seconds, colour + "o", markerfacecolor=face)
    P, seconds = [w.P for w in mine], [w.seconds for w in mine]
    guide = [seconds[-1] * p**2 / P[-1] for p in P]
    left.loglog(P, guide, "k:", lw=1, label="slope 2: ∝ P²")
    left.set_title("Time of all partial derivatives", fontsize=10)
    left.set(xlabel="parameters P (hollow: extrapolated)", ylabel="seconds")
    left.legend(fontsize=8)
    for e in errors:
        style = colours[e.way] + ("-" if e.dtype == "float64" else "--")
        right.loglog(e.epsilons, e.errors, style, label=f"{e.dtype}, {e.way}")
    right.set_title("Error of the differences", fontsize=10)
    right.set(xlabel="ε", ylabel="relative error")
    right.legend(fontsize=8, loc="lower left")


command_line = reporting.command_line(main, WhySettings, QUICK, __doc__)

if __name__ == "__main__":
    sys.exit(command_line())
