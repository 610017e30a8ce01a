"""Verdicts of experiments/nielsen.py: published figures beside measured ones."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.support.nielsen_runs import SHORT, Run, Training
from experiments.support.one_neuron import Curve

TOLERANCE = 0.3  # points of accuracy
LAST_EPOCHS = 10  # over which the fluctuation of an accuracy is measured
WAITS_UNTIL = 150  # epochs
REPRODUCED, BETTER, MISSED = "reproduced", "better", "not reproduced"
NOT_COMPARABLE = "not comparable"
Runs = dict[Training, list[Run]]

# The figure of a run that is published. Where the book is not explicit, a figure of the
# test set is taken as the peak, as in its chapter 1, and one of the validation set as
# the end, as in its comparison of initialisations; results.json has all epochs.
STATISTICS: dict[str, Callable[[Run], float]] = {
    "epoch 1": lambda run: run.accuracies[0],
    "peak": lambda run: run.peak,
    "end": lambda run: run.accuracies[-1],
}
UNLEARNED: dict[str, Callable[[Run], int]] = {
    "epoch 1": lambda run: run.unlearned[0],
    "peak": lambda run: run.unlearned[run.accuracies.index(run.peak)],
    "end": lambda run: run.unlearned[-1],
}


@dataclass(frozen=True)
class Published:
    """A published accuracy.

    Attributes:
        chapter: of the book.
        training: the network and how it is trained.
        statistic: a key of `STATISTICS`.
        published: the accuracy in percent.
        comment: for the reason of a miss.
    """

    chapter: str
    training: Training
    statistic: str
    published: float
    comment: str = ""


@dataclass(frozen=True)
class Reproduction:
    """A line of the table: a published figure, the measured ones and the verdict.

    Attributes:
        chapter: of the book.
        setting: network and training.
        statistic: which figure.
        published: the book's figure.
        values: of the seeds, or those that a verdict on the shape is based on.
        verdict: one of REPRODUCED, BETTER, MISSED, NOT_COMPARABLE.
        reason: of the verdict, if it needs one.
        deviation: mean - published, in points.
        of_seeds: whether `values` are those of the seeds.
    """

    chapter: str
    setting: str
    statistic: str
    published: str
    values: list[Any]
    verdict: str
    reason: str = ""
    deviation: float | None = None
    of_seeds: bool = True

    @property
    def cells(self) -> list[str]:
        """The cells of the line."""
        mean = std = ""
        if self.of_seeds:
            mean, std = number(statistics.fmean(self.values)), number(self.spread)
            low, high = min(self.values), max(self.values)
        else:
            low, high = self.values[0], self.values[-1]
        first = [self.setting, self.statistic, self.published]
        return [*first, mean, std, f"{number(low)}–{number(high)}", self.verdict]

    @property
    def spread(self) -> float:
        """The standard deviation of the values."""
        return spread(self.values)


def number(value: float | None) -> str:
    """Return points and epochs with two decimals, norms with two digits."""
    if value is None:
        return "never"
    if isinstance(value, int):
        return str(value)
    return f"{value:.2f}" if value >= 1 or value == 0 else f"{value:.2g}"


def spread(values: Sequence[float]) -> float:
    """Return the standard deviation; 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def judge_accuracy(published: float, values: Sequence[float]) -> str:
    """Return the verdict on a published accuracy from those of the seeds."""
    mean = statistics.fmean(values)
    allowed = max(TOLERANCE, 2 * spread(values))
    # Both are rounded to a hundredth of a point: the limit itself is allowed.
    if abs(published - mean) <= allowed + 1e-9:
        return REPRODUCED
    return BETTER if mean > published else MISSED


def reproduce_accuracy(
    row: Published, runs: Sequence[Run], is_cut: bool, more: Sequence[Run] = ()
) -> Reproduction:
    """Compare a published accuracy with those of the seeds.

    Args:
        row: what is published.
        runs: with the seeds that the verdict is based on.
        is_cut: whether the runs have fewer epochs than the row.
        more: with other seeds, for the reason.
    """
    values = [STATISTICS[row.statistic](run) for run in runs]
    comparable = row.statistic == "epoch 1" or not is_cut
    verdict = judge_accuracy(row.published, values) if comparable else NOT_COMPARABLE
    deviation = statistics.fmean(values) - row.published
    by_spread = verdict == REPRODUCED and abs(deviation) > TOLERANCE + 1e-9
    split = "test" if row.training.scored == "test" else "val."
    epochs = row.training.epochs
    return Reproduction(
        row.chapter,
        str(row.training) + f" {epochs} ep" * (epochs != 30),
        f"{split} {row.statistic}",
        f"{row.published:.2f}",
        list(values),
        verdict,
        explain_miss(row, runs, more) if verdict == MISSED or by_spread else "",
        deviation,
    )


def explain_miss(row: Published, runs: Sequence[Run], more: Sequence[Run]) -> str:
    """Return what the runs show about the reason of a deviation; arguments as of
    :func:`reproduce_accuracy`."""
    values = [STATISTICS[row.statistic](run) for run in runs]
    deviation = statistics.fmean(values) - row.published
    parts = [
        f"the mean deviates by {deviation:+.2f} points, and 2 std are "
        f"{2 * spread(values):.2f}"
    ]
    unlearned = [UNLEARNED[row.statistic](run) for run in runs]
    whole = [v for v, missing in zip(values, unlearned, strict=True) if not missing]
    if len(whole) < len(values):
        lost = len(values) - len(whole)
        parts.append(f"{lost} of {len(values)} seeds had not learned some digit")
        if whole:
            parts.append(f"the others' mean is {statistics.fmean(whole):.2f}")
    if row.comment:
        parts.append(f"{row.comment}, and the best measured {max(values):.2f}")
    if row.statistic == "end":
        peaks = statistics.fmean(run.peak for run in runs)
        parts.append(f"the mean of the peaks is {peaks:.2f}")
        spreads = [spread(run.accuracies[-LAST_EPOCHS:]) for run in runs]
        parts.append(
            f"within a run the last {LAST_EPOCHS} epochs differ by a std of "
            f"{statistics.fmean(spreads):.2f}"
        )
    if more:
        values += [STATISTICS[row.statistic](run) for run in more]
        mean, std = statistics.fmean(values), spread(values)
        range_ = f"{min(values):.2f}–{max(values):.2f}"
        parts.append(
            f"with {len(more)} more seeds {mean:.2f} ± {std:.2f} ({range_}), by which "
            f"it would be {judge_accuracy(row.published, values)}"
        )
    return "; ".join(parts)


def reproduce_growth(runs: Runs, is_cut: bool) -> Reproduction:
    """Judge whether accuracy grows with the number of training examples.

    Args:
        runs: of each number of examples, ascending.
        is_cut: whether they have fewer epochs than the book's.
    """
    sizes = list(runs)
    means = [statistics.fmean(r.accuracies[-1] for r in runs[t]) for t in sizes]
    rises = all(a < b for a, b in itertools.pairwise(means))
    verdict = REPRODUCED if rises else MISSED
    falls = [
        f"n {b.examples} has {y:.2f} after {x:.2f}"
        for b, (x, y) in zip(sizes[1:], itertools.pairwise(means), strict=True)
        if x >= y
    ]
    return Reproduction(
        "3",
        f"30 CE η 0.5, n {sizes[0].examples}–{sizes[-1].examples}",
        "test end",
        "grows",
        list(means),
        NOT_COMPARABLE if is_cut else verdict,
        "" if rises or is_cut else "; ".join(falls),
        of_seeds=False,
    )


def reproduce_norm(
    setting: str, ell: int, published: float, values: list[Any]
) -> Reproduction:
    """Compare a published norm with those of the initial networks.

    Args:
        setting: network and training.
        ell: the layer.
        published: the book's norm.
        values: of the initial networks.
    """
    low, high = min(values), max(values)
    within = low <= published <= high
    reason = "" if within else f"the range is {low:.3g} to {high:.3g}"
    verdict = REPRODUCED if within else MISSED
    figure = f"{published:g}"
    return Reproduction("5", setting, f"‖δ^{ell}‖", figure, values, verdict, reason)


def reproduce_neuron(
    cost: str, lr: float, waits: bool, curves: list[Curve]
) -> Reproduction:
    """Judge whether the neuron learns from the bad start only after a delay.

    Args:
        cost: of the trainings.
        lr: η.
        waits: whether it does in the book.
        curves: of the good and of the bad start.
    """
    good, bad = (curve.halved for curve in curves)
    if waits:
        agrees = good < math.inf and bad > WAITS_UNTIL and bad >= 3 * good
    else:
        agrees = bad < math.inf and bad <= 2 * good
    epochs = [None if math.isinf(halved) else int(halved) for halved in (good, bad)]
    return Reproduction(
        "3",
        f"neuron {SHORT[cost]} η {lr:g}, 2 starts",
        "cost halves",
        "waits" if waits else "at once",
        epochs,
        REPRODUCED if agrees else MISSED,
        "" if agrees else f"it halves after {' and after '.join(map(number, epochs))}",
        of_seeds=False,
    )
