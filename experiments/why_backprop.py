"""Why backpropagation: what a gradient costs by every other way, and how exact it is.

    python experiments/why_backprop.py               networks of 10² to 10⁶ parameters
    python experiments/why_backprop.py --sizes 8 6 4 --sizes 784 30 10
    python experiments/why_backprop.py --quick       up to 10⁴

The claim: all P partial derivatives of C come from one pass forward and one pass back,

    BP1   δ^L = ∇_a C ⊙ σ'(z^L)                      BP3   ∂C/∂b^ℓ = δ^ℓ
    BP2   δ^ℓ = ((W^{ℓ+1})ᵀ δ^{ℓ+1}) ⊙ σ'(z^ℓ)       BP4   ∂C/∂W^ℓ = δ^ℓ (a^{ℓ-1})ᵀ

while the other ways take a pass forward, or two, for each parameter:

    forward difference    (C(w + ε e_j) - C(w)) / ε                P + 1 passes
    central difference    (C(w + ε e_j) - C(w - ε e_j)) / (2ε)     2 P
    forward mode          exact, too, but it starts at the         P
                          parameters, of which there are P; back
                          starts at C, which is one number

A pass takes time ~ P, so perturbation takes ~ P² where backprop takes ~ P. It is faster
by a factor of about P: "exponentially cheaper" is loose, nothing is exponential in P.

The pass back costs about as much as the one forward: with a product of matrices for
δ^ℓ (a^{ℓ-1})ᵀ and, but for the first layer, one for Wᵀ δ, it takes

    back / forward = 1 + Σ_{ℓ≥2} n_ℓ n_{ℓ-1} / Σ_ℓ n_ℓ n_{ℓ-1}      (operations)

1.01 at [784, 30, 10], 1.40 at [784, 512, 512, 10], towards 2 when deep.

The error of the differences over ε is a V: rounding ~ u/ε on its left, truncation ~ ε
(central ~ ε²) on its right; the best ε is about √u (central ∛u), u the rounding unit.

Exit status: 0 the claims are shown, 1 one is not, 2 bad arguments.

Past 10⁴ parameters the passes are made for a sample of them; numbers and times that are
extrapolated from it are marked ~.

Source: Nielsen, Neural Networks and Deep Learning, chapter 2.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import process_time as clock  # what other programs take does not count
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the files beside this one

import torchbp
from experiments.support import reporting
from experiments.support.gradient_ways import (
    BATCH_SIZE,
    BATCHED,
    CENTRAL,
    FORWARD,
    LOOPS,
    MODE,
    PERTURBATIONS,
    PERTURBING,
    SWEEPS,
    Problem,
    batched,
    parameters,
)
from experiments.support.options import option
from torchbp._numeric import relative_distance
from torchbp._terminal import aligned
from torchbp.training import cpu_threads

SIZES = (
    (8, 6, 4),
    (24, 24, 10),
    (100, 80, 10),
    (784, 100, 10),
    (784, 300, 100, 10),
    (784, 1000, 200, 10),
)
# Whose forward and backward passes are timed beside the operations that they take.
PASSES = ((784, 30, 10), (784, 512, 512, 10), (784, *[512] * 8, 10))
V_SIZES = (8, 6, 4)
ALL_UP_TO, SAMPLE = 10_000, 100  # parameters; sampled beyond
STEP = 1e-3  # of the differences in the table, float32
# Powers of ten, in halves.
STEPS = {
    dtype: [half / 2 for half in range(2 * first, 1)]
    for dtype, first in ((torch.float32, -7), (torch.float64, -15))
}
BALANCE = {FORWARD: 1 / 2, CENTRAL: 1 / 3}  # the best ε is about u to this power
NEAR = 30.0  # times or parts of that
ABOUT = 10.0  # times or parts of P
PREDICTED_WITHIN = 0.4  # of the time back / forward, beside the operations
QUICK: dict[str, Any] = {"sizes": SIZES[:3], "repeats": 5}


@dataclass(frozen=True, kw_only=True)
class Settings(reporting.Common):
    """Which networks, and how thoroughly they are timed."""

    sizes: tuple[tuple[int, ...], ...] = option(
        SIZES,
        "neurons per layer; give it for each network, two or more",
        shown="8 6 4 up to 784 1000 200 10",
    )
    repeats: int = option(7, "turns of every timing")
    batch_size: int = option(512, "of the timed passes")

    def __post_init__(self) -> None:
        super().__post_init__()
        reporting.at_least(self, repeats=1, batch_size=1)
        if len(set(map(parameters, self.sizes))) < 2:
            raise ValueError(
                f"sizes: expected two networks or more of different numbers of "
                f"parameters, got {self.sizes}"
            )
        for sizes in self.sizes:
            torchbp.MLP(
                sizes, device="meta", dtype=torch.float32
            )  # refuses what is no network


@dataclass(frozen=True)
class Way:
    """One way to all partial derivatives of one network."""

    sizes: tuple[int, ...]
    way: str
    P: int
    forward: float  # passes of the batch through the network, counted
    backward: float
    seconds: float
    error: float  # relative, against float64
    is_sampled: bool


@dataclass(frozen=True)
class Passes:
    """The backward pass in forward passes: of operations, and of time."""

    sizes: tuple[int, ...]
    predicted: float
    counted: float
    measured: float


@dataclass(frozen=True)
class Errors:
    """The relative error of the differences over ε, and its two sides."""

    dtype: str
    way: str
    steps: list[float]
    errors: list[float]

    @property
    def best(self) -> int:
        return self.errors.index(min(self.errors))

    @property
    def is_v(self) -> bool:
        """Whether both ends are ten times worse than the middle, or more."""
        ends = self.errors[0], self.errors[-1]
        return min(ends) >= 10 * self.errors[self.best]

    @property
    def balance(self) -> float:
        """The ε at which rounding, u/ε, is as large as truncation, ε or ε²."""
        u: float = torch.finfo(getattr(torch, self.dtype)).eps / 2
        return u ** BALANCE[self.way]

    @property
    def left(self) -> float:
        """p of error ~ ε^p where rounding rules."""
        return self._power(0, self.steps[self.best] / 10)

    @property
    def right(self) -> float:
        """p of error ~ ε^p where truncation rules."""
        return self._power(10 * self.steps[self.best], 0.5)

    def _power(self, above: float, below: float) -> float:
        """Between two ε, a decade from the best one, where the other side no longer
        shows, and without errors of 30 % and more, which grow no further; NaN where too
        little is left."""
        pairs = [
            (math.log10(step), math.log10(error))
            for step, error in zip(self.steps, self.errors, strict=True)
            if above < step < below and 0 < error < 0.3
        ]
        if len(pairs) < 3:
            return math.nan
        x, y = zip(*pairs, strict=True)
        return reporting.slope(x, y)


def main(settings: Settings) -> dict[str, Any]:
    """Measure, print the tables, and return what is in results.json."""
    print(f"{reporting.stated(__doc__)}")
    with cpu_threads(1), reporting.Report("why_backprop", settings) as report:
        ways = []
        for sizes in sorted(settings.sizes, key=parameters):
            print(f"{list(sizes)}, {parameters(sizes):,} parameters ...", flush=True)
            ways += compare(tuple(sizes), settings)
        passes = [time_passes(sizes, settings) for sizes in PASSES]
        errors = [
            error_over_step(settings, dtype, way)
            for dtype in STEPS
            for way in (FORWARD, CENTRAL)
        ]
        print(f"\n{way_table(ways, settings)}\n\n{growth_table(ways)}\n")
        print(f"{pass_table(passes, settings)}\n\n{error_table(errors)}")
        measured = {
            "ways": [asdict(way) for way in ways],
            "passes": [asdict(p) for p in passes],
            "errors": [asdict(e) for e in errors],
        }
        return report.conclude(
            settings,
            measured,
            judge(ways, passes, errors),
            curves(ways, errors),
            lambda figure: draw(figure, ways, errors),
        )


def compare(sizes: tuple[int, ...], settings: Settings) -> list[Way]:
    """Every way on one network. They take turns, so that a disturbance meets all; the
    perturbing ones have a part of the parameters in each turn."""
    problem = Problem(sizes, settings.seed)
    exact = flat(batched(Problem(sizes, settings.seed, torch.float64)))
    P = parameters(sizes)
    indices = sample(P)
    places = problem.places(indices)
    turns = min(settings.repeats, len(places))
    found: dict[str, list[float]] = {name: [] for name in PERTURBING}
    counts = dict.fromkeys(PERTURBING, 0)
    # Of one pass, and of one gradient.
    times: dict[str, list[float]] = {name: [] for name in (*PERTURBING, *SWEEPS)}
    for perturb in PERTURBATIONS.values():
        perturb(problem, places[:2], STEP)  # what is slow only once
    for turn in range(turns):
        part = places[turn * len(places) // turns : (turn + 1) * len(places) // turns]
        for name, perturb in PERTURBATIONS.items():
            problem.passes = 0
            started = clock()
            found[name] += perturb(problem, part, STEP)
            seconds = clock() - started
            times[name].append(seconds / problem.passes)
            counts[name] += problem.passes
        for name, sweep in SWEEPS.items():
            times[name].append(seconds_a_call(lambda run=sweep: run(problem)))  # type: ignore[misc]
    ways = []
    for name, (_, once) in PERTURBING.items():
        # What is there once a turn does not grow with the parameters.
        passes = (counts[name] - turns * once) * P / len(places) + once
        seconds = statistics.median(times[name]) * passes
        error = distance_of_numbers(found[name], exact[indices])
        ways.append(Way(sizes, name, P, passes, 0, seconds, error, len(places) < P))
    for name, sweep in SWEEPS.items():
        error = relative_distance(flat(sweep(problem)).double(), exact)
        seconds = statistics.median(times[name])
        ways.append(Way(sizes, name, P, *PAIRS[name](problem), seconds, error, False))
    return ways


def flat(grads: Sequence[Tensor]) -> Tensor:
    return torch.cat([grad.flatten() for grad in grads])


def sample(P: int) -> list[int]:
    """All parameters, or where they are too many some of them, evenly."""
    if P <= ALL_UP_TO:
        return list(range(P))
    return [int((i + 0.5) * P / SAMPLE) for i in range(SAMPLE)]


def distance_of_numbers(actual: list[float], expected: Tensor) -> float:
    """Return the relative distance of numbers from a float64 tensor."""
    numbers = torch.tensor(actual, dtype=torch.float64, device="cpu")
    return relative_distance(numbers, expected)


def seconds_a_call(run: Callable[[], Any]) -> float:
    """Of the processor, over as many calls as 10 ms have room for."""
    run()  # whoever ran before has filled the caches
    calls, seconds, started = 0, 0.0, clock()
    while seconds < 1e-2:
        run()
        calls += 1
        seconds = clock() - started
    return seconds / calls


def count_loops(problem: Problem) -> tuple[float, float]:
    """The passes counted, those of single examples as parts of the batch's."""
    problem.passes = problem.passes_back = 0
    SWEEPS[LOOPS](problem)
    return problem.passes / BATCH_SIZE, problem.passes_back / BATCH_SIZE


def count_batched(problem: Problem) -> tuple[float, float]:
    """By operations: those of one pass forward are measured, and the rest, over those
    that a pass back should take, has to be one pass back."""
    forward = count(lambda: problem.model(problem.x))
    rest = count(lambda: SWEEPS[BATCHED](problem)) - forward
    return 1.0, rest / (forward * operations(problem.sizes))


PAIRS: dict[str, Callable[[Problem], tuple[float, float]]] = {
    LOOPS: count_loops,
    BATCHED: count_batched,
}


def operations(sizes: Sequence[int]) -> float:
    """The backward pass over the forward, by the products of matrices in both."""
    products = [n_in * n_out for n_in, n_out in itertools.pairwise(sizes)]
    return 1 + sum(products[1:]) / sum(products)


def time_passes(sizes: tuple[int, ...], settings: Settings) -> Passes:
    """Both passes of our layers under autograd, at a batch where the products rule."""
    torch.manual_seed(settings.seed)
    model = torchbp.MLP(sizes, device="cpu", dtype=torch.float32)
    cost = torchbp.QuadraticCost()
    x = torch.rand(settings.batch_size, sizes[0], dtype=torch.float32, device="cpu")
    y = torch.rand(settings.batch_size, sizes[-1], dtype=torch.float32, device="cpu")
    inputs = list(model.parameters())
    ratios = []
    for _ in range(settings.repeats + 1):  # the first allocates
        forward = back = 0.0
        while forward < 1e-2:
            started = clock()
            C = cost(model(x), y)
            turned = clock()
            torch.autograd.grad(C, inputs)
            forward, back = forward + turned - started, back + clock() - turned
        ratios.append(back / forward)
    counted = count(lambda: torchbp.backprop(model, cost, x, y)) / count(
        lambda: model(x)
    )
    measured = statistics.median(ratios[1:])
    return Passes(sizes, operations(sizes), counted - 1, measured)


@torch.no_grad()
def count(run: Callable[[], Any]) -> int:
    """Operations of the products of matrices in a call."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def error_over_step(settings: Settings, dtype: torch.dtype, way: str) -> Errors:
    """The error of the differences for every ε of the dtype."""
    exact = flat(batched(Problem(V_SIZES, settings.seed, torch.float64)))
    problem = Problem(V_SIZES, settings.seed, dtype)
    places = problem.places(range(len(exact)))
    steps = [10.0**power for power in STEPS[dtype]]
    errors = []
    for step in steps:
        found = PERTURBATIONS[way](problem, places, step)
        errors.append(distance_of_numbers(found, exact))
    return Errors(str(dtype).removeprefix("torch."), way, steps, errors)


def judge(
    ways: list[Way], passes: list[Passes], errors: list[Errors]
) -> dict[str, bool]:
    """Every claim, and whether the measurements show it."""
    of = {name: [w for w in ways if w.way == name] for name in (*PERTURBING, *SWEEPS)}
    counted = all(
        math.isclose(w.forward, per * w.P + once, rel_tol=1e-9)
        for name, (per, once) in PERTURBING.items()
        for w in of[name]
    )
    pairs = all(
        math.isclose(number, 1, rel_tol=1e-9)
        for name in SWEEPS
        for w in of[name]
        for number in (w.forward, w.backward)
    )
    factors = [f / w.P for n in (FORWARD, CENTRAL) for w, f in factors_of(n, of)]
    exponents = [advantage(of[name], of[BATCHED]) for name in PERTURBING]
    exact = [w.error for name in (MODE, LOOPS, BATCHED) for w in of[name]]
    rough = [w.error for name in (FORWARD, CENTRAL) for w in of[name]]
    return {
        "passes forward, counted: P + 1, 2 P and P": counted,
        "BP1-BP4: one pass forward and one back, by operations as predicted": pairs
        and all(math.isclose(p.counted, p.predicted, rel_tol=1e-6) for p in passes),
        f"backprop is faster than differences by about P, P/{ABOUT:g} to {ABOUT:g} P": (
            1 / ABOUT < min(factors) <= max(factors) < ABOUT
        ),
        "and than all three by a factor that grows as P (exponent 0.75 to 1.25)": all(
            0.75 < exponent < 1.25 for exponent in exponents
        ),
        "BP1-BP4 and forward mode are exact to rounding, differences are not": (
            max(exact) < 1e-5 < 1e-4 < min(rough)
        ),
        f"a pass back takes its operations' share of time, within "
        f"{PREDICTED_WITHIN:.0%}": all(
            abs(p.measured / p.predicted - 1) < PREDICTED_WITHIN for p in passes
        ),
        "and more of it in the deepest network": (
            passes[-1].measured > passes[0].measured
        ),
        "the error over ε has the shape of a V": all(e.is_v for e in errors),
        f"which is lowest at √u, central at ∛u (within {NEAR:g} x)": all(
            1 / NEAR < e.steps[e.best] / e.balance < NEAR for e in errors
        ),
        "falls on its left as 1/ε": shown(-1, [e.left for e in errors]),
        "and rises on its right as ε, central as ε²": all(
            shown(power, [e.right for e in errors if e.way == way])
            for way, power in ((FORWARD, 1), (CENTRAL, 2))
        ),
    }


def shown(power: int, found: list[float]) -> bool:
    """Whether those that could be measured, one at the least, are `power`."""
    measured = [p for p in found if not math.isnan(p)]
    return bool(measured) and all(abs(p - power) < 0.3 for p in measured)


def factors_of(name: str, of: dict[str, list[Way]]) -> list[tuple[Way, float]]:
    """Each network's time by that way over its time by batched backprop."""
    pairs = zip(of[name], of[BATCHED], strict=True)
    return [(way, way.seconds / batch.seconds) for way, batch in pairs]


def advantage(slow: list[Way], fast: list[Way]) -> float:
    """p of (time of the one / time of the other) ~ P^p."""
    P = [math.log(w.P) for w in slow]
    pairs = zip(slow, fast, strict=True)
    return reporting.slope(P, [math.log(s.seconds / f.seconds) for s, f in pairs])


def growth(ways: list[Way]) -> float:
    """p of time ~ P^p, over the networks past 10⁴ parameters if there are two."""
    large = [w for w in ways if w.P > ALL_UP_TO]
    chosen = large if len(large) > 1 else sorted(ways, key=lambda w: w.P)[-2:]
    P, seconds = zip(*((math.log(w.P), math.log(w.seconds)) for w in chosen))  # noqa: B905
    return reporting.slope(P, seconds)


def way_table(ways: list[Way], settings: Settings) -> str:
    title = [
        f"float32, batches of {BATCH_SIZE}, ε {STEP:g}; passes of a whole batch; "
        f"processor time, medians of {settings.repeats}"
    ]
    if any(w.is_sampled for w in ways):
        title.append(f"~ extrapolated from {SAMPLE} parameters")
    lines = [["network", "way", "P", "passes", "back", "time", "over batched", "error"]]
    of = {BATCHED: [w for w in ways if w.way == BATCHED]}
    batch = {w.sizes: w.seconds for w in of[BATCHED]}
    last = None
    for w in ways:
        name, P = (short(w.sizes), f"{w.P:,}") if w.sizes != last else ("", "")
        last = w.sizes
        mark = "~" * w.is_sampled
        times = w.seconds / batch[w.sizes]
        factor = f"{mark}{times / w.P:.2f} P" if w.way in PERTURBING else f"{times:.1f}"
        figures = [f"{mark}{w.forward:,.0f}", f"{w.backward:,.0f}"]
        figures += [f"{mark}{duration(w.seconds)}", factor, f"{w.error:.0e}"]
        lines.append([name, w.way, P, *figures])
    return "\n".join([*title, aligned(lines, left=2)])


def duration(seconds: float) -> str:
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{short_number(seconds / unit)} {name}"
    return f"{short_number(seconds * 1e6)} µs"


def short_number(value: float) -> str:
    """Three digits, and no power of ten."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def growth_table(ways: list[Way]) -> str:
    """The exponents, and the words that are loose."""
    of = {name: [w for w in ways if w.way == name] for name in (*PERTURBING, *SWEEPS)}
    large = sum(w.P > ALL_UP_TO for w in of[BATCHED])
    which = f"P > {ALL_UP_TO:,}" if large > 1 else "the largest two"
    lines = [["way", f"time ~ P^p, {which}", "time / batched ~ P^p, all"]]
    for name, mine in of.items():
        faster = advantage(mine, of[BATCHED])
        lines.append([name, f"{growth(mine):.2f}", f"{faster:.2f}"])
    factors = [f / w.P for w, f in factors_of(FORWARD, of)]
    said = (
        '"exponentially cheaper" is loose: forward differences take '
        f"{min(factors):.2f} P to {max(factors):.2f} P times\nas long as backprop, so "
        "the factor is about P"
    )
    if large < 2:
        said += "\nnetworks as small as these take as long a pass, whatever P"
    return f"{aligned(lines, left=1)}\n{said}"


def pass_table(passes: list[Passes], settings: Settings) -> str:
    lines = [["network", "operations, predicted", "counted", "time"]]
    lines += [
        [short(p.sizes), *(f"{v:.2f}" for v in (p.predicted, p.counted, p.measured))]
        for p in passes
    ]
    title = f"back / forward, batches of {settings.batch_size}, medians"
    return f"{title}\n{aligned(lines, left=1)}"


def short(sizes: Sequence[int]) -> str:
    """[784, 8 x 512, 10] where a width comes more than twice in a row."""
    parts = []
    for n, group in itertools.groupby(sizes):
        count = len(list(group))
        parts += [f"{count} x {n}"] if count > 2 else [str(n)] * count
    return f"[{', '.join(parts)}]"


def error_table(errors: list[Errors]) -> str:
    titles = ["dtype", "way", "best ε", "√u or ∛u", "error there", "at both ends"]
    lines = [[*titles, "left ~ ε^p", "right ~ ε^p"]]
    for e in errors:
        best = [f"{e.steps[e.best]:.0e}", f"{e.balance:.0e}", f"{e.errors[e.best]:.0e}"]
        ends = f"{e.errors[0]:.0e}, {e.errors[-1]:.0e}"
        powers = ["—" if math.isnan(p) else f"{p:.2f}" for p in (e.left, e.right)]
        lines.append([e.dtype, e.way, *best, ends, *powers])
    title = f"error over ε, {short(V_SIZES)}; — too few ε on that side"
    return f"{title}\n{aligned(lines, left=2)}"


def curves(ways: list[Way], errors: list[Errors]) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: over P, and over the powers of ten of ε."""
    shown: dict[str, list[tuple[int, float]]] = {}
    for w in ways:
        for quantity in ("seconds", "error", "forward"):
            tag = f"{quantity}_over_P/{w.way}"
            shown.setdefault(tag, []).append((w.P, getattr(w, quantity)))
    for e in errors:
        # Its steps are whole numbers: a tenth of a power each.
        powers = [round(-10 * math.log10(step)) for step in e.steps]
        pairs = sorted(zip(powers, e.errors, strict=True))
        shown[f"error_over_minus_10_log10_step/{e.dtype} {e.way}"] = pairs
    return shown


def draw(figure: Any, ways: list[Way], errors: list[Errors]) -> None:
    """Time over P, and error over ε."""
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
        right.loglog(e.steps, e.errors, style, label=f"{e.dtype}, {e.way}")
    right.set_title("Error of the differences", fontsize=10)
    right.set(xlabel="ε", ylabel="relative error")
    right.legend(fontsize=8, loc="lower left")


def command_line(arguments: list[str] | None = None) -> int:
    """The shell around :func:`main`; returns the exit status."""
    return reporting.run(main, Settings, QUICK, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(command_line())
