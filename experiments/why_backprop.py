"""Why backpropagation: what a gradient costs by every other way, and how exact it is.

    python experiments/why_backprop.py               networks of 10² to 10⁶ parameters
    python experiments/why_backprop.py --sizes 8 6 4 --sizes 784 30 10
    python experiments/why_backprop.py --quick       up to 10⁴

The claim: all P partial derivatives of C come from one pass forward and one pass back
(BP1-BP4), where

    (C(w + ε e_j) - C(w)) / ε               takes P + 1 passes forward
    (C(w + ε e_j) - C(w - ε e_j)) / (2ε)    takes 2 P
    forward-mode differentiation            is exact, but takes P: one for each
                                            parameter, since it starts at the inputs of
                                            C, of which there are P. Backward starts at
                                            C, which is one number.

A pass takes time ~ P, so perturbation takes ~ P² where backprop takes ~ P: it is faster
by a factor of about P. The derivation's "exponentially cheaper" is loose: the factor is
proportional to P, and nothing is exponential in it.

The backward pass costs about as much as the forward: with n_ℓ neurons a layer and a
product of matrices for δ^ℓ a^{ℓ-1} and, but for the first layer, Wᵀ δ,

    backward / forward = 1 + Σ_{ℓ≥2} n_ℓ n_{ℓ-1} / Σ_ℓ n_ℓ n_{ℓ-1}

operations: 1.01 at [784, 30, 10], 1.40 at [784, 512, 512, 10], towards 2 when deep.

The error of the differences has the shape of a V over ε: truncation ~ ε (central ~ ε²)
on the one side, rounding ~ u/ε on the other.

Past 10⁴ parameters the passes are made for a sample of them, and their number and time
extrapolated; such figures are marked ~.

Exit status: 0 the claims are shown, 1 one is not, 2 bad arguments.

Source: Nielsen, Neural Networks and Deep Learning, chapter 2.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the files beside this one

import torchbp
from experiments import reporting
from experiments.timing import threads
from torchbp.observation import aligned

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
BATCH_SIZE = 10
STEP = 1e-3  # of the differences in the table, float32
STEPS = {torch.float32: range(-7, 1), torch.float64: range(-15, 1)}  # powers of ten
FORWARD, CENTRAL, MODE = "forward difference", "central difference", "forward mode"
LOOPS, BATCHED = "BP1-BP4, loops", "BP1-BP4, batched"
PERTURBING = {FORWARD: (1, 1), CENTRAL: (2, 0), MODE: (1, 0)}  # passes per P, and more
QUICK: dict[str, Any] = {"sizes": SIZES[:3], "repeats": 3, "batch_size": 64}


@dataclass(frozen=True, kw_only=True)
class Settings(reporting.Common):
    """Which networks, and how thoroughly they are timed."""

    sizes: tuple[tuple[int, ...], ...] = SIZES
    repeats: int = 7
    batch_size: int = 512  # of the passes that are set beside their operations

    def __post_init__(self) -> None:
        super().__post_init__()
        reporting.at_least(self, repeats=1, batch_size=1)
        if len(set(map(parameters, self.sizes))) < 2:
            raise ValueError(
                f"sizes: expected two networks or more of different numbers of "
                f"parameters, got {self.sizes}"
            )
        for sizes in self.sizes:
            torchbp.MLP(sizes, device="meta")  # refuses what is no network


def parameters(sizes: Sequence[int]) -> int:
    return sum(n_out * (n_in + 1) for n_in, n_out in itertools.pairwise(sizes))


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
    def order(self) -> float:
        """p of error ~ ε^p right of the best ε, where truncation rules."""
        # From one decade past the best, where rounding no longer shows, to below 1.
        pairs = [
            (math.log10(step), math.log10(error))
            for step, error in zip(self.steps, self.errors, strict=True)
            if 10 * self.steps[self.best] < step < 0.5
        ]
        if len(pairs) < 2:
            return math.nan
        x, y = zip(*pairs, strict=True)
        return reporting.slope(x, y)


@dataclass
class Problem:
    """A network, its cost and a mini-batch, with all passes counted."""

    sizes: tuple[int, ...]
    seed: int
    dtype: torch.dtype = torch.float32
    passes: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        # In float64 first: the same numbers for both.
        model = torchbp.MLP(self.sizes, dtype=torch.float64)
        x = torch.rand(BATCH_SIZE, self.sizes[0], dtype=torch.float64)
        self.y = torch.rand(BATCH_SIZE, self.sizes[-1], dtype=torch.float64)
        # What float64 is to be compared with are numbers that float32 can hold.
        self.model = model.float().to(self.dtype)
        self.x, self.y = (t.float().to(self.dtype) for t in (x, self.y))
        self.cost = torchbp.QuadraticCost()
        self.layers: list[nn.Linear] = list(self.model.layers)  # type: ignore[arg-type]
        self.model.register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self.passes += 1

    @torch.no_grad()
    def measure(self) -> float:
        """C, by one pass forward."""
        value: float = self.cost(self.model(self.x), self.y).item()
        return value

    def places(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        """(flat parameter, index in it) of some of all P, in their order."""
        flat = [p.detach().view(-1) for p in self.model.parameters()]
        every = [(p, j) for p in flat for j in range(len(p))]
        return [every[i] for i in indices]


def forward_differences(problem: Problem, places: Any, step: float) -> list[float]:
    C = problem.measure()
    found = []
    for p, j in places:
        w = p[j].item()
        p[j] = w + step
        moved = p[j].item() - w  # what the dtype made of it
        found.append((problem.measure() - C) / moved if moved else 0.0)
        p[j] = w
    return found


def central_differences(problem: Problem, places: Any, step: float) -> list[float]:
    found = []
    for p, j in places:
        w = p[j].item()
        p[j] = w + step
        above, C = p[j].item(), problem.measure()
        p[j] = w - step
        moved = above - p[j].item()
        found.append((C - problem.measure()) / moved if moved else 0.0)
        p[j] = w
    return found


def forward_mode(problem: Problem, places: Any, step: float) -> list[float]:
    """One parameter's direction at a time, through our layers' own jvp."""
    named = {n: p.detach() for n, p in problem.model.named_parameters()}
    names = {p.data_ptr(): n for n, p in named.items()}
    tangents = {n: torch.zeros_like(p) for n, p in named.items()}

    def cost(values: dict[str, Tensor]) -> Tensor:
        output = functional_call(problem.model, values, (problem.x,))
        result: Tensor = problem.cost(output, problem.y)
        return result

    found = []
    with warnings.catch_warnings():  # torch's, of its own use of torch.jit.script
        warnings.filterwarnings("ignore", r"`torch\.jit\.script", FutureWarning)
        for p, j in places:
            direction = tangents[names[p.data_ptr()]].view(-1)
            direction[j] = 1
            found.append(jvp(cost, (named,), (tangents,))[1].item())
            direction[j] = 0
    return found


@torch.no_grad()
def loops(problem: Problem) -> tuple[list[Tensor], int]:
    """BP1-BP4 for one example after the other, the gradients added up; the gradients in
    the order of the parameters, and the number of passes back."""
    layers, n = problem.layers, len(problem.x)
    grads = [torch.zeros_like(p) for p in problem.model.parameters()]
    for x, y in zip(problem.x, problem.y, strict=True):
        a = [x]
        for layer in layers:
            a.append(torch.sigmoid(layer.weight @ a[-1] + layer.bias))
        problem.passes += 1
        delta = (a[-1] - y) * a[-1] * (1 - a[-1])  # BP1
        for ell in reversed(range(len(layers))):
            grads[2 * ell + 1] += delta / n  # BP3
            grads[2 * ell] += torch.outer(delta, a[ell]) / n  # BP4
            if ell:
                gate = a[ell] * (1 - a[ell])
                delta = (layers[ell].weight.t() @ delta) * gate  # BP2
    return grads, n


def batched(problem: Problem) -> tuple[list[Tensor], int]:
    _, grads = torchbp.backprop(problem.model, problem.cost, problem.x, problem.y)
    problem.passes += 1  # it calls no forward that a hook could count
    return list(grads.values()), 1


PERTURBATIONS: dict[str, Callable[[Problem, Any, float], list[float]]] = {
    FORWARD: forward_differences,
    CENTRAL: central_differences,
    MODE: forward_mode,
}
SWEEPS: dict[str, Callable[[Problem], tuple[list[Tensor], int]]] = {
    LOOPS: loops,
    BATCHED: batched,
}


def main(settings: Settings) -> dict[str, Any]:
    """Measure, print the tables, and return what is in results.json."""
    with threads(1), reporting.Report("why_backprop", settings) as report:
        ways = []
        for sizes in sorted(settings.sizes, key=parameters):
            print(f"{list(sizes)}, {parameters(sizes):,} parameters ...", flush=True)
            ways += compare(sizes, settings)
        passes = [time_passes(sizes, settings) for sizes in PASSES]
        errors = [
            error_over_step(settings, dtype, way)
            for dtype in STEPS
            for way in (FORWARD, CENTRAL)
        ]
        claims = judge(ways, passes, errors)
        print(f"\n{way_table(ways)}\n\n{growth_table(ways)}\n")
        print(f"{pass_table(passes)}\n\n{error_table(errors)}\n")
        print(reporting.table_of(claims))
        results = {
            "settings": reporting.plain(settings),
            "ways": [asdict(way) for way in ways],
            "passes": [asdict(p) for p in passes],
            "errors": [asdict(e) for e in errors],
            "claims": claims,
            "shown": all(claims.values()),
            "verdict": reporting.verdict(claims),
        }
        report.finish(results, curves(ways, errors), lambda f: draw(f, ways, errors))
    print(results["verdict"])
    return results


def compare(sizes: tuple[int, ...], settings: Settings) -> list[Way]:
    """Every way on one network."""
    problem = Problem(sizes, settings.seed)
    exact, _ = batched(Problem(sizes, settings.seed, torch.float64))
    P = parameters(sizes)
    whole = torch.cat([grad.flatten() for grad in exact])
    indices = sample(P)
    places, expected = problem.places(indices), whole[indices]
    is_sampled = len(places) < P
    ways = []
    for name, perturb in PERTURBATIONS.items():
        perturb(problem, places[:2], STEP)  # what is slow only once
        problem.passes = 0
        started = time.perf_counter()
        found = perturb(problem, places, STEP)
        seconds = time.perf_counter() - started
        # The passes that are there once do not grow with the sample.
        once = PERTURBING[name][1]
        passes = (problem.passes - once) * P / len(places) + once
        seconds *= passes / problem.passes
        error = distance(torch.tensor(found, dtype=torch.float64), expected)
        ways.append(Way(sizes, name, P, passes, 0, seconds, error, is_sampled))
    for name, sweep in SWEEPS.items():
        problem.passes = 0
        grads, backward = sweep(problem)
        forward = problem.passes
        seconds = median_seconds(lambda run=sweep: run(problem), settings.repeats)  # type: ignore[misc]
        flat = torch.cat([grad.flatten() for grad in grads]).double()
        error = distance(flat, whole)
        # A pass of a single example is a part of one of the batch.
        share = 1 / BATCH_SIZE if name == LOOPS else 1
        counts = forward * share, backward * share
        ways.append(Way(sizes, name, P, *counts, seconds, error, False))
    return ways


def sample(P: int) -> list[int]:
    """All parameters, or where they are too many some of them, evenly."""
    if P <= ALL_UP_TO:
        return list(range(P))
    return [int((i + 0.5) * P / SAMPLE) for i in range(SAMPLE)]


def distance(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    """Of a call, the median over the repeats of at least 2 ms each."""
    run()
    started = time.perf_counter()
    run()
    calls = max(1, round(2e-3 / (time.perf_counter() - started)))
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        for _ in range(calls):
            run()
        times.append((time.perf_counter() - started) / calls)
    return statistics.median(times)


def operations(sizes: Sequence[int]) -> float:
    """The backward pass over the forward, by the products of matrices in both."""
    products = [n_in * n_out for n_in, n_out in itertools.pairwise(sizes)]
    return 1 + sum(products[1:]) / sum(products)


def time_passes(sizes: tuple[int, ...], settings: Settings) -> Passes:
    """Both passes of our layers under autograd, at a batch where the products rule."""
    torch.manual_seed(settings.seed)
    model, cost = torchbp.MLP(sizes), torchbp.QuadraticCost()
    x = torch.rand(settings.batch_size, sizes[0])
    y = torch.rand(settings.batch_size, sizes[-1])
    inputs = list(model.parameters())
    forward, backward = [], []
    for _ in range(2 * settings.repeats + 1):
        started = time.perf_counter()
        C = cost(model(x), y)
        turned = time.perf_counter()
        torch.autograd.grad(C, inputs)
        backward.append(time.perf_counter() - turned)
        forward.append(turned - started)
    measured = statistics.median(backward[1:]) / statistics.median(forward[1:])
    counted = count(lambda: torchbp.backprop(model, cost, x, y)) / count(
        lambda: model(x)
    )
    return Passes(sizes, operations(sizes), counted - 1, measured)


@torch.no_grad()
def count(run: Callable[[], Any]) -> int:
    """Operations of the products of matrices in a call."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def error_over_step(settings: Settings, dtype: torch.dtype, way: str) -> Errors:
    """The error of the differences for every ε of the dtype."""
    exact, _ = batched(Problem(V_SIZES, settings.seed, torch.float64))
    whole = torch.cat([grad.flatten() for grad in exact])
    problem = Problem(V_SIZES, settings.seed, dtype)
    places = problem.places(range(len(whole)))
    steps = [10.0**power for power in STEPS[dtype]]
    errors = []
    for step in steps:
        found = PERTURBATIONS[way](problem, places, step)
        errors.append(distance(torch.tensor(found, dtype=torch.float64), whole))
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
    growth = {name: advantage(of[name], of[BATCHED]) for name in PERTURBING}
    exact = [w.error for name in (MODE, LOOPS, BATCHED) for w in of[name]]
    rough = [w.error for name in (FORWARD, CENTRAL) for w in of[name]]
    orders = {way: [e.order for e in errors if e.way == way] for way in PERTURBATIONS}
    return {
        "passes forward, counted: P + 1, 2 P and P": counted,
        "backprop is faster by a factor that grows as P (exponent 0.8 to 1.2)": all(
            0.8 < exponent < 1.2 for exponent in growth.values()
        ),
        "BP1-BP4 and forward mode are exact to rounding, differences are not": (
            max(exact) < 1e-5 < 1e-4 < min(rough)
        ),
        "backprop is one pass forward and one back, by the operations counted": all(
            math.isclose(p.counted, p.predicted, rel_tol=1e-6) for p in passes
        ),
        "a pass back takes the time of half to three forward, more when deep": (
            all(0.5 < p.measured < 3 for p in passes)
            and passes[-1].measured > passes[0].measured
        ),
        "the error over ε has the shape of a V": all(e.is_v for e in errors),
        "whose right side is ε for forward, ε² for central differences": (
            all(0.7 < p < 1.3 for p in orders[FORWARD] if not math.isnan(p))
            and all(1.7 < p < 2.3 for p in orders[CENTRAL] if not math.isnan(p))
            and not all(map(math.isnan, orders[FORWARD] + orders[CENTRAL]))
        ),
    }


def advantage(slow: list[Way], fast: list[Way]) -> float:
    """p of (time of the one / time of the other) ~ P^p."""
    P = [math.log(w.P) for w in slow]
    pairs = zip(slow, fast, strict=True)
    return reporting.slope(P, [math.log(s.seconds / f.seconds) for s, f in pairs])


def growth(ways: list[Way]) -> float:
    """p of time ~ P^p between the two largest networks."""
    two = sorted(ways, key=lambda w: w.P)[-2:]
    P, seconds = [math.log(w.P) for w in two], [math.log(w.seconds) for w in two]
    return reporting.slope(P, seconds)


def way_table(ways: list[Way]) -> str:
    lines = [["network", "P", "way", "passes forward", "back", "time", "error"]]
    last = None
    for w in ways:
        named = [str(list(w.sizes)), f"{w.P:,}"] if w.sizes != last else ["", ""]
        last = w.sizes
        mark = "~" * w.is_sampled
        forward, seconds = f"{mark}{w.forward:,.0f}", f"{mark}{duration(w.seconds)}"
        counts = [forward, f"{w.backward:,.0f}"]
        lines.append([*named, w.way, *counts, seconds, f"{w.error:.0e}"])
    turned = [[a, c, b, *rest] for a, b, c, *rest in lines]
    table = aligned(turned, left=2)
    if any(w.is_sampled for w in ways):
        return f"~ extrapolated from {SAMPLE} parameters\n{table}"
    return table


def duration(seconds: float) -> str:
    for unit, name in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{seconds / unit:,.3g} {name}"
    return f"{seconds * 1e6:.3g} µs"


def growth_table(ways: list[Way]) -> str:
    """The exponents."""
    lines = [["way", "time ~ P^p, the largest two", "time / batched ~ P^p"]]
    batch = [w for w in ways if w.way == BATCHED]
    for name in (*PERTURBING, *SWEEPS):
        mine = [w for w in ways if w.way == name]
        lines.append([name, f"{growth(mine):.2f}", f"{advantage(mine, batch):.2f}"])
    return aligned(lines, left=1)


def pass_table(passes: list[Passes]) -> str:
    lines = [["network", "operations, predicted", "counted", "time"]]
    lines += [
        [short(p.sizes), *(f"{v:.2f}" for v in (p.predicted, p.counted, p.measured))]
        for p in passes
    ]
    return f"backward / forward\n{aligned(lines, left=1)}"


def short(sizes: Sequence[int]) -> str:
    """[784, 8 x 512, 10] where a width comes more than twice in a row."""
    parts = []
    for n, group in itertools.groupby(sizes):
        count = len(list(group))
        parts += [f"{count} x {n}"] if count > 2 else [str(n)] * count
    return f"[{', '.join(parts)}]"


def error_table(errors: list[Errors]) -> str:
    lines = [["dtype", "way", "best ε", "error there", "at both ends", "error ~ ε^p"]]
    for e in errors:
        ends = f"{e.errors[0]:.0e}, {e.errors[-1]:.0e}"
        best = [f"{e.steps[e.best]:.0e}", f"{e.errors[e.best]:.0e}"]
        order = "—" if math.isnan(e.order) else f"{e.order:.2f}"
        lines.append([e.dtype, e.way, *best, ends, order])
    return aligned(lines, left=2)


def curves(ways: list[Way], errors: list[Errors]) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows: over P, and over the powers of ten of ε."""
    shown: dict[str, list[tuple[int, float]]] = {}
    for w in ways:
        for quantity in ("seconds", "error", "forward"):
            tag = f"{quantity}_over_P/{w.way}"
            shown.setdefault(tag, []).append((w.P, getattr(w, quantity)))
    for e in errors:
        powers = [round(-math.log10(step)) for step in e.steps]
        pairs = sorted(zip(powers, e.errors, strict=True))
        shown[f"error_over_minus_log10_step/{e.dtype} {e.way}"] = pairs
    return shown


def draw(figure: Any, ways: list[Way], errors: list[Errors]) -> None:
    """Time over P, and error over ε."""
    left, right = figure.subplots(1, 2)
    for name in (*PERTURBING, *SWEEPS):
        mine = [w for w in ways if w.way == name]
        left.loglog([w.P for w in mine], [w.seconds for w in mine], "o-", label=name)
    left.set(xlabel="parameters P", ylabel="seconds for the gradient")
    left.legend(fontsize=7)
    for e in errors:
        label = f"{e.dtype}, {e.way}"
        right.loglog(e.steps, e.errors, ".-", label=label)
    right.set(xlabel="ε", ylabel="relative error")
    right.legend(fontsize=7)


def command_line(arguments: list[str] | None = None) -> int:
    """The shell around :func:`main`; returns the exit status."""
    parser = reporting.Parser(__doc__)
    add = parser.add_argument
    add(
        "--sizes", type=int, nargs="+", action="append",
        help="neurons per layer; give it for each network, two or more",
    )  # fmt: skip
    add("--repeats", type=int, help="of every timing (default 7)")
    add("--batch-size", type=int, help="of the timed passes (default 512)")
    return reporting.run(main, Settings, QUICK, parser, arguments)


if __name__ == "__main__":
    sys.exit(command_line())
