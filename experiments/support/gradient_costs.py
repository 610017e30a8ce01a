"""What gradients cost and how exact they are: measurements of why_backprop.py."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import process_time as clock  # not affected by other programs
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import torchbp
from experiments.support.gradient_ways import (
    BACKPROPS,
    BATCH_SIZE,
    BATCHED,
    CENTRAL,
    FORWARD,
    LOOPS,
    PERTURBATIONS,
    PERTURBING,
    Problem,
    batched,
    count_parameters,
)
from torchbp._numeric import relative_distance

V_SIZES = (8, 6, 4)
ALL_UP_TO, SAMPLE = 10_000, 100  # parameters; larger networks are sampled
EPSILON = 1e-3  # of the differences in the table, float32
# The exponents of ten of the ε in the plot of errors, in steps of a half.
POWERS = {
    dtype: [half / 2 for half in range(2 * first, 1)]
    for dtype, first in ((torch.float32, -7), (torch.float64, -15))
}
BALANCE = {FORWARD: 1 / 2, CENTRAL: 1 / 3}  # the best ε is about u to this power


@dataclass(frozen=True)
class GradientCost:
    """What one way takes for all partial derivatives of one network.

    Attributes:
        sizes: neurons per layer.
        way: its name.
        P: parameters.
        forward: passes of the batch, counted.
        backward: passes of the batch, counted.
        seconds: processor time for all parameters.
        error: relative distance from the gradient in float64.
        is_sampled: whether passes and seconds are extrapolated from a sample.
    """

    sizes: tuple[int, ...]
    way: str
    P: int
    forward: float
    backward: float
    seconds: float
    error: float
    is_sampled: bool


@dataclass(frozen=True)
class PassRatio:
    """The backward pass over the forward pass.

    Attributes:
        sizes: neurons per layer.
        predicted: ratio of operations, by the formula.
        counted: ratio of operations, counted.
        measured: ratio of times.
    """

    sizes: tuple[int, ...]
    predicted: float
    counted: float
    measured: float


@dataclass(frozen=True)
class DifferenceErrors:
    """The relative error of the differences over ε.

    Attributes:
        dtype: of the network.
        way: forward or central differences.
        epsilons: ascending.
        errors: of each ε.
    """

    dtype: str
    way: str
    epsilons: list[float]
    errors: list[float]

    @property
    def best(self) -> int:
        """The index of the smallest error."""
        return self.errors.index(min(self.errors))

    @property
    def is_v(self) -> bool:
        """Whether the errors at both ends are at least ten times the smallest."""
        ends = self.errors[0], self.errors[-1]
        return min(ends) >= 10 * self.errors[self.best]

    @property
    def balance(self) -> float:
        """The ε at which rounding, u/ε, is as large as truncation, ε or ε²."""
        u: float = torch.finfo(getattr(torch, self.dtype)).eps / 2
        return u ** BALANCE[self.way]

    @property
    def left(self) -> float:
        """The p of error ~ ε^p where rounding dominates."""
        return self._power(0, self.epsilons[self.best] / 10)

    @property
    def right(self) -> float:
        """The p of error ~ ε^p where truncation dominates."""
        return self._power(10 * self.epsilons[self.best], 0.5)

    def _power(self, above: float, below: float) -> float:
        """Return p between two ε, without errors above 30 %, which grow no further; NaN
        if fewer than three points remain."""
        points = [
            (math.log10(epsilon), math.log10(error))
            for epsilon, error in zip(self.epsilons, self.errors, strict=True)
            if above < epsilon < below and 0 < error < 0.3
        ]
        if len(points) < 3:
            return math.nan
        return statistics.linear_regression(*zip(*points, strict=True)).slope


def measure_ways(sizes: tuple[int, ...], seed: int, repeats: int) -> list[GradientCost]:
    """Measure every way on one network.

    The ways take turns, so that a disturbance affects all of them; those that perturb
    get a part of the parameters in each turn.

    Args:
        sizes: neurons per layer.
        seed: of parameters and mini-batch.
        repeats: turns.
    """
    problem = Problem(sizes, seed)
    exact = flat(batched(Problem(sizes, seed, torch.float64)))
    P = count_parameters(sizes)
    indices = sample(P)
    entries = problem.entries(indices)
    turns = min(repeats, len(entries))
    slopes: dict[str, list[float]] = {name: [] for name in PERTURBING}
    counts = dict.fromkeys(PERTURBING, 0)
    # Seconds of one pass for the perturbing ways, of one gradient for the others.
    times: dict[str, list[float]] = {name: [] for name in (*PERTURBING, *BACKPROPS)}
    for perturb in PERTURBATIONS.values():
        perturb(problem, entries[:2], EPSILON)  # the first call is slow
    for turn in range(turns):
        first, last = (k * len(entries) // turns for k in (turn, turn + 1))
        for name, perturb in PERTURBATIONS.items():
            problem.passes = 0
            started = clock()
            slopes[name] += perturb(problem, entries[first:last], EPSILON)
            seconds = clock() - started
            times[name].append(seconds / problem.passes)
            counts[name] += problem.passes
        for name, way in BACKPROPS.items():
            times[name].append(seconds_per_call(lambda run=way: run(problem)))  # type: ignore[misc]
    costs = []
    for name, (_, once) in PERTURBING.items():
        # The passes that are needed once per turn do not grow with the parameters.
        passes = (counts[name] - turns * once) * P / len(entries) + once
        seconds = statistics.median(times[name]) * passes
        error = distance_of_numbers(slopes[name], exact[indices])
        is_sampled = len(entries) < P
        costs.append(
            GradientCost(sizes, name, P, passes, 0, seconds, error, is_sampled)
        )
    for name, way in BACKPROPS.items():
        error = relative_distance(flat(way(problem)).double(), exact)
        seconds = statistics.median(times[name])
        passes, passes_back = PASS_COUNTS[name](problem)
        costs.append(
            GradientCost(sizes, name, P, passes, passes_back, seconds, error, False)
        )
    return costs


def flat(grads: Sequence[Tensor]) -> Tensor:
    """Return all gradients as one vector."""
    return torch.cat([grad.flatten() for grad in grads])


def sample(P: int) -> list[int]:
    """Return the indices of all parameters, or of SAMPLE evenly spaced ones."""
    if P <= ALL_UP_TO:
        return list(range(P))
    return [int((i + 0.5) * P / SAMPLE) for i in range(SAMPLE)]


def distance_of_numbers(actual: list[float], expected: Tensor) -> float:
    """Return the relative distance of numbers from a float64 tensor."""
    numbers = torch.tensor(actual, dtype=torch.float64, device="cpu")
    return relative_distance(numbers, expected)


def seconds_per_call(run: Callable[[], Any]) -> float:
    """Return the processor time of a call, the mean of those that fit in 10 ms."""
    run()  # fills the caches
    calls, seconds, started = 0, 0.0, clock()
    while seconds < 1e-2:
        run()
        calls += 1
        seconds = clock() - started
    return seconds / calls


def count_loops(problem: Problem) -> tuple[float, float]:
    """Return the passes of the loops; that of one example counts as 1 / BATCH_SIZE."""
    problem.passes = problem.passes_back = 0
    BACKPROPS[LOOPS](problem)
    return problem.passes / BATCH_SIZE, problem.passes_back / BATCH_SIZE


def count_batched(problem: Problem) -> tuple[float, float]:
    """Return the passes of ``torchbp.backprop``, which no hook counts: the operations
    beyond one forward pass are divided by those that a backward pass should take."""
    forward = count_operations(lambda: problem.model(problem.x))
    rest = count_operations(lambda: BACKPROPS[BATCHED](problem)) - forward
    return 1.0, rest / (forward * operation_ratio(problem.sizes))


PASS_COUNTS: dict[str, Callable[[Problem], tuple[float, float]]] = {
    LOOPS: count_loops,
    BATCHED: count_batched,
}


def operation_ratio(sizes: Sequence[int]) -> float:
    """Return the operations of the backward pass over those of the forward pass, both
    of matrix products."""
    products = [n_in * n_out for n_in, n_out in itertools.pairwise(sizes)]
    return 1 + sum(products[1:]) / sum(products)


def measure_passes(
    sizes: tuple[int, ...], seed: int, repeats: int, batch_size: int
) -> PassRatio:
    """Time both passes of our layers under autograd.

    Args:
        sizes: neurons per layer.
        seed: of parameters and mini-batch.
        repeats: turns.
        batch_size: large enough that matrix products dominate.
    """
    torch.manual_seed(seed)
    model = torchbp.MLP(sizes, device="cpu", dtype=torch.float32)
    cost = torchbp.QuadraticCost()
    x, y = (
        torch.rand(batch_size, n, dtype=torch.float32, device="cpu")
        for n in (sizes[0], sizes[-1])
    )
    parameters = list(model.parameters())
    ratios = []
    for _ in range(repeats + 1):  # the first allocates
        forward = back = 0.0
        while forward < 1e-2:
            started = clock()
            C = cost(model(x), y)
            turned = clock()
            torch.autograd.grad(C, parameters)
            forward, back = forward + turned - started, back + clock() - turned
        ratios.append(back / forward)
    both = count_operations(lambda: torchbp.backprop(model, cost, x, y))
    counted = both / count_operations(lambda: model(x)) - 1
    measured = statistics.median(ratios[1:])
    return PassRatio(sizes, operation_ratio(sizes), counted, measured)


@torch.no_grad()
def count_operations(run: Callable[[], Any]) -> int:
    """Return the operations of the matrix products in a call."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def measure_errors(seed: int, dtype: torch.dtype, way: str) -> DifferenceErrors:
    """Measure the error of differences for every ε of a dtype.

    Args:
        seed: of parameters and mini-batch.
        dtype: of the network.
        way: forward or central differences.
    """
    exact = flat(batched(Problem(V_SIZES, seed, torch.float64)))
    problem = Problem(V_SIZES, seed, dtype)
    entries = problem.entries(range(len(exact)))
    epsilons = [10.0**power for power in POWERS[dtype]]
    errors = [
        distance_of_numbers(PERTURBATIONS[way](problem, entries, epsilon), exact)
        for epsilon in epsilons
    ]
    return DifferenceErrors(str(dtype).removeprefix("torch."), way, epsilons, errors)
