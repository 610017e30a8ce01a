"""The results that the book reports, trained again on MNIST and set beside them.

    python experiments/nielsen.py                     every row, 3 seeds each
    python experiments/nielsen.py --chapter 5         one chapter: 1, 3 or 5
    python experiments/nielsen.py --engine autograd   by backward passes; 10 x as long
    python experiments/nielsen.py --epochs-scale 0.1  a tenth of the epochs
    python experiments/nielsen.py --quick             a twentieth, in a minute

The claim: BP1-BP4 and W ← W - η ∂C/∂W as they stand here train the networks of the book
to the accuracies that the book prints. 50,000 training images, batches of 10, 30 epochs
unless a row says otherwise; λ is the book's, λ/n the weight decay.

A published accuracy counts as reproduced when it lies within 0.3 points or two standard
deviations of the seeds' mean, whichever is more; where the mean is above that it is
better, where it is below, not reproduced. That is looked into, with 7 more seeds, and
what was seen is printed, as it is of a row that only its standard deviation lets pass;
the verdict stays. A published norm has to lie within the range of 30 starts. The one
neuron, and the growth of accuracy with the number of training examples, are judged by
shape. A row whose epochs were cut is not comparable, unless it is about the first.

Exit status: 0, 1 if a row was not reproduced, 2 bad arguments or data, 130 interrupted
(what was trained until then stays in results.json).

Source: Nielsen, Neural Networks and Deep Learning, chapters 1, 3 and 5.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import sys
import textwrap
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the files beside this one

import torchbp
from experiments.support import reporting
from experiments.support.nielsen_runs import (
    ENGINES,
    EXAMPLES,
    SHORT,
    Run,
    Training,
    build,
    collect,
)
from experiments.support.one_neuron import NEURON_STARTS, Curve, neuron
from experiments.support.options import option
from torchbp import data
from torchbp._terminal import aligned
from torchbp.inspection import probe
from torchbp.training import cpu_threads

CHAPTERS = ("1", "3", "5", "all")
TOLERANCE, SHOWN = 0.3, 6.0  # points of accuracy: of the verdict, of the figure
STARTS, PROBED = 30, 1000  # of the norms: initial networks, and images
MORE = 7  # seeds for what was not reproduced
WANDERING = 10  # last epochs in which an accuracy goes up and down
REPRODUCED, BETTER, MISSED = "reproduced", "better", "not reproduced"
NOT_COMPARABLE = "not comparable"
COLOURS = {REPRODUCED: "C0", BETTER: "C2", MISSED: "C3", NOT_COMPARABLE: "C7"}
Runs = dict[Training, list[Run]]
QUICK: dict[str, Any] = {"epochs_scale": 0.05}


@dataclass(frozen=True, kw_only=True)
class Settings(reporting.Common):
    """Which rows, and how."""

    chapter: str = option("all", "whose rows", CHAPTERS)
    seeds: int = option(3, "trainings of each row")
    engine: str = option("explicit", "of the steps", tuple(ENGINES))
    epochs_scale: float = option(1.0, "share of the epochs")
    workers: int = option(0, "processes; 0: one for each core")

    def __post_init__(self) -> None:
        super().__post_init__()
        reporting.at_least(self, seeds=1, workers=0)
        if not 0 < self.epochs_scale <= 1:
            raise ValueError(
                f"epochs_scale: expected above 0 to 1, got {self.epochs_scale}"
            )


# What a published figure is of. Where the book does not say, a figure of the test set
# is taken for the peak, as its chapter 1 has it, and one of the validation set for the
# end, as its comparison of initialisations has it; results.json holds all epochs.
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
class Row:
    """A published accuracy."""

    chapter: str
    training: Training
    statistic: str
    published: float
    note: str = ""


@dataclass(frozen=True)
class Result:
    """A line of the table."""

    chapter: str
    setting: str
    statistic: str
    published: str
    values: list[Any]  # of the seeds, or what a verdict on the shape is from
    verdict: str
    reason: str = ""
    deviation: float | None = None  # mean - published, in points
    of_seeds: bool = True

    @property
    def cells(self) -> list[str]:
        mean = std = ""
        if self.of_seeds:
            mean, std = number(statistics.fmean(self.values)), number(self.spread)
            low, high = min(self.values), max(self.values)
        else:
            low, high = self.values[0], self.values[-1]
        range_ = f"{number(low)}–{number(high)}"
        said = [self.setting, self.statistic, self.published]
        return [*said, mean, std, range_, self.verdict]

    @property
    def spread(self) -> float:
        return spread(self.values)


TITLES = ["network and training", "statistic", "book", "mean", "std", "range", ""]


def number(value: float | None) -> str:
    """Points and epochs in plain, norms with two digits."""
    if value is None:
        return "never"
    if isinstance(value, int):
        return str(value)
    return f"{value:.2f}" if value >= 1 or value == 0 else f"{value:.2g}"


def spread(values: Sequence[float]) -> float:
    """The standard deviation; 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


_Q30 = Training((30,), "quadratic", 3.0)
_Q100 = Training((100,), "quadratic", 3.0)
_SLOW = Training((100,), "quadratic", 0.001)
_FAST = Training((30,), "quadratic", 100.0)
_CE = "cross-entropy"
_LONG = Training((100,), _CE, 0.1, 5, epochs=60, scored="validation")
_SCALED = Training((30,), _CE, 0.1, 5, "scaled", scored="validation")
_NORMAL = dataclasses.replace(_SCALED, init="normal")
_BEST_OF_3 = "the book's is the best of 3 runs"

ROWS = (
    Row("1", _Q30, "epoch 1", 91.29, _BEST_OF_3),
    Row("1", _Q30, "peak", 95.42, _BEST_OF_3),
    Row("1", _Q100, "peak", 96.59, _BEST_OF_3),
    Row("1", _SLOW, "epoch 1", 11.39),
    Row("1", _SLOW, "end", 21.42),
    Row("1", _FAST, "epoch 1", 10.09),
    Row("1", _FAST, "end", 9.82),
    Row("3", Training((30,), _CE, 0.5), "peak", 95.49),
    Row("3", Training((100,), _CE, 0.5), "peak", 96.82),
    Row("3", Training((30,), _CE, 0.5, 5), "peak", 96.49),
    Row("3", Training((100,), _CE, 0.5, 5, scored="validation"), "end", 97.92),
    Row("3", _LONG, "end", 98.04),
    Row("3", _SCALED, "epoch 1", 92.70),
    Row("3", _NORMAL, "epoch 1", 86.43),
    Row("3", _SCALED, "end", 96.50),
    Row("3", _NORMAL, "end", 96.37),
    Row("5", _SCALED, "end", 96.48),
    Row("5", dataclasses.replace(_SCALED, hidden=(30,) * 2), "end", 96.90),
    Row("5", dataclasses.replace(_SCALED, hidden=(30,) * 3), "end", 96.57),
)
# ‖δ^ℓ‖ of the hidden layers at the start, by depth.
NORMS = {2: (0.066, 0.31), 3: (0.012, 0.060, 0.28)}
# (cost, η), and whether learning from the bad start has to wait.
NEURONS = (("quadratic", 0.15, True), (_CE, 0.15, False), (_CE, 0.005, False))
WAITS_UNTIL = 150  # epochs
# Of the curve of accuracy over n. All take as many steps, 30 epochs of the whole set,
# and have the same λ/n.
SIZES = tuple(
    Training((30,), _CE, 0.5, 5, "scaled", examples=n)
    for n in (100, 250, 500, 1000, 2500, 5000, 10_000, 25_000, EXAMPLES)
)


def judge(published: float, values: Sequence[float]) -> str:
    """Whether the seeds' accuracies reproduce the published one."""
    mean = statistics.fmean(values)
    allowed = max(TOLERANCE, 2 * spread(values))
    # Both are known to a hundredth of a point: the limit itself is within.
    if abs(published - mean) <= allowed + 1e-9:
        return REPRODUCED
    return BETTER if mean > published else MISSED


def accuracy_result(
    row: Row, runs: Sequence[Run], is_cut: bool, more: Sequence[Run] = ()
) -> Result:
    """A published accuracy beside the seeds'.

    Args:
        row: what is published.
        runs: with the seeds that the verdict is about.
        is_cut: with fewer epochs than the row has.
        more: with others, for the reason.
    """
    values = [STATISTICS[row.statistic](run) for run in runs]
    comparable = row.statistic == "epoch 1" or not is_cut
    verdict = judge(row.published, values) if comparable else NOT_COMPARABLE
    deviation = statistics.fmean(values) - row.published
    by_spread = verdict == REPRODUCED and abs(deviation) > TOLERANCE + 1e-9
    where = "test" if row.training.scored == "test" else "val."
    epochs = row.training.epochs
    return Result(
        row.chapter,
        str(row.training) + f" {epochs} ep" * (epochs != 30),
        f"{where} {row.statistic}",
        f"{row.published:.2f}",
        list(values),
        verdict,
        look_into(row, runs, more) if verdict == MISSED or by_spread else "",
        deviation,
    )


def look_into(row: Row, runs: Sequence[Run], more: Sequence[Run]) -> str:
    """What the runs show of why they are off, or of why they may be."""
    values = [STATISTICS[row.statistic](run) for run in runs]
    off = statistics.fmean(values) - row.published
    parts = [f"the mean is {off:+.2f} points off, and 2 std {2 * spread(values):.2f}"]
    unlearned = [UNLEARNED[row.statistic](run) for run in runs]
    whole = [v for v, missing in zip(values, unlearned, strict=True) if not missing]
    if len(whole) < len(values):
        lost = len(values) - len(whole)
        parts.append(f"{lost} of {len(values)} seeds had not learned some digit")
        if whole:
            parts.append(f"the others' mean is {statistics.fmean(whole):.2f}")
    if row.note:
        parts.append(f"{row.note}, and the best here {max(values):.2f}")
    if row.statistic == "end":
        peaks = statistics.fmean(run.peak for run in runs)
        parts.append(f"the mean of the peaks is {peaks:.2f}")
        wandering = statistics.fmean(spread(r.accuracies[-WANDERING:]) for r in runs)
        parts.append(f"within a run the last {WANDERING} epochs differ by a std of "
                     f"{wandering:.2f}")  # fmt: skip
    if more:
        values += [STATISTICS[row.statistic](run) for run in more]
        mean, std = statistics.fmean(values), spread(values)
        range_ = f"{min(values):.2f}–{max(values):.2f}"
        parts.append(
            f"with {len(more)} more seeds {mean:.2f} ± {std:.2f} ({range_}), by which "
            f"it would be {judge(row.published, values)}"
        )
    return "; ".join(parts)


def size_result(runs: Runs, is_cut: bool) -> Result:
    """The curve of accuracy over the number of training examples: it rises."""
    means = [statistics.fmean(r.accuracies[-1] for r in runs[t]) for t in SIZES]
    rises = all(a < b for a, b in itertools.pairwise(means))
    verdict = REPRODUCED if rises else MISSED
    falls = [
        f"n {b.examples} has {y:.2f} after {x:.2f}"
        for b, (x, y) in zip(SIZES[1:], itertools.pairwise(means), strict=True)
        if x >= y
    ]
    return Result(
        "3",
        f"30 CE η 0.5, n {SIZES[0].examples}–{SIZES[-1].examples}",
        "test end",
        "grows",
        list(means),
        NOT_COMPARABLE if is_cut else verdict,
        "" if rises or is_cut else "; ".join(falls),
        of_seeds=False,
    )


def norm_results(images: Tensor, labels: Tensor) -> list[Result]:
    """‖δ^ℓ‖ of the hidden layers before any training: of the mean over the images of
    their own δ^ℓ, which is ∂C/∂b^ℓ (BP3)."""
    x, cost = data.scale(images[:PROBED]), torchbp.CrossEntropyCost()
    results = []
    for depth, published in NORMS.items():
        training = Training((30,) * depth, _CE, 0.1, init="scaled")
        norms = []
        for seed in range(STARTS):
            records = probe(build(training, seed), cost, x, labels[:PROBED])
            norms.append([record.norm("mean_delta") for record in records[:-1]])
        for ell, (value, of_seeds) in enumerate(
            zip(published, zip(*norms, strict=True), strict=True), start=1
        ):
            setting = f"{'-'.join(['30'] * depth)} CE scaled, untrained"
            results.append(norm_result(setting, ell, value, list(of_seeds)))
    return results


def norm_result(setting: str, ell: int, published: float, values: list[Any]) -> Result:
    """A published norm beside those of the starts."""
    low, high = min(values), max(values)
    within = low <= published <= high
    reason = "" if within else f"the starts' range is {low:.3g} to {high:.3g}"
    verdict = REPRODUCED if within else MISSED
    return Result("5", setting, f"‖δ^{ell}‖", f"{published:g}", values, verdict, reason)


def neuron_result(cost: str, lr: float, waits: bool, curves: list[Curve]) -> Result:
    """The two starts of the neuron: whether the bad one has to wait, by the epochs
    until the cost has halved."""
    good, bad = (curve.halved for curve in curves)
    if waits:
        as_said = good < math.inf and bad > WAITS_UNTIL and bad >= 3 * good
    else:
        as_said = bad < math.inf and bad <= 2 * good
    epochs = [None if math.isinf(halved) else int(halved) for halved in (good, bad)]
    return Result(
        "3",
        f"neuron {SHORT[cost]} η {lr:g}, 2 starts",
        "cost halves",
        "waits" if waits else "at once",
        epochs,
        REPRODUCED if as_said else MISSED,
        "" if as_said else f"it halves after {' and after '.join(map(number, epochs))}",
        of_seeds=False,
    )


def plan(settings: Settings) -> list[Training]:
    """The trainings that the chapter's rows need, each once, the longest first."""
    wanted = [row.training for row in rows_of(settings.chapter)]
    if settings.chapter in ("3", "all"):
        wanted += SIZES
    scaled = [cut(training, settings.epochs_scale) for training in wanted]
    return sorted(
        dict.fromkeys(scaled), key=lambda t: t.epochs * sum(t.hidden), reverse=True
    )


def rows_of(chapter: str) -> list[Row]:
    return [row for row in ROWS if chapter in ("all", row.chapter)]


def cut(training: Training, scale: float) -> Training:
    return dataclasses.replace(training, epochs=max(1, round(training.epochs * scale)))


def main(settings: Settings) -> dict[str, Any]:
    """Train, print the table, and return what is in results.json."""
    splits = reporting.load(settings)
    print(reporting.stated(__doc__))
    with cpu_threads(1), reporting.Report("nielsen", settings) as report:
        results: dict[str, Any] = {
            "settings": reporting.plain(settings),
            "runs": [],
        }

        def train(trainings: list[Training], seeds: range) -> Runs:
            """The runs, each of which is kept as soon as it is there."""
            runs: Runs = {training: [] for training in trainings}
            engine, workers = settings.engine, settings.workers
            with closing(collect(trainings, seeds, engine, splits, workers)) as found:
                for run in found:
                    runs[run.training].append(run)
                    results["runs"].append(dataclasses.asdict(run))
                    report.folder.write(results=results)
            for of_seeds in runs.values():
                of_seeds.sort(key=lambda run: run.seed)
            return runs

        seeds = range(settings.seed, settings.seed + settings.seeds)
        runs, more = train(plan(settings), seeds), {}
        missed = missed_trainings(settings, runs)
        if missed:
            print(f"\nnot reproduced: {', '.join(map(str, missed))}; more seeds")
            more = train(missed, range(seeds.stop, seeds.stop + MORE))
        neurons = {
            (cost, lr): [neuron(cost, start, lr) for start in NEURON_STARTS]
            for cost, lr, _ in NEURONS
            if settings.chapter in ("3", "all")
        }
        found = assess(settings, splits, runs, more, neurons)
        print(f"\n{table(found)}\n")
        for result in found:
            if result.reason:
                said = f"{result.setting}, {result.statistic}: {result.reason}"
                print(textwrap.fill(said, 98, subsequent_indent="  "))
        results |= {
            "rows": [dataclasses.asdict(result) for result in found],
            "neurons": {
                f"{cost} η {lr:g}": [curve.C for curve in curves]
                for (cost, lr), curves in neurons.items()
            },
            "shown": all(result.verdict != MISSED for result in found),
            "verdict": conclude(found),
        }
        curves = curves_of(runs, neurons)
        report.finish(results, curves, lambda f: draw(f, found, runs), (9, 5.5))
    return results


def missed_trainings(settings: Settings, runs: Runs) -> list[Training]:
    """Those behind the rows that are not reproduced, as they were cut."""
    pairs = zip(
        rows_of(settings.chapter), accuracy_results(settings, runs, {}), strict=True
    )
    missed = [row.training for row, result in pairs if result.verdict == MISSED]
    return list(dict.fromkeys(cut(t, settings.epochs_scale) for t in missed))


def accuracy_results(
    settings: Settings,
    runs: Runs,
    more: Runs,
) -> list[Result]:
    return [
        accuracy_result(
            row, runs[shorter], shorter != row.training, more.get(shorter, [])
        )
        for row in rows_of(settings.chapter)
        for shorter in [cut(row.training, settings.epochs_scale)]
    ]


def assess(
    settings: Settings,
    splits: data.Splits,
    runs: Runs,
    more: Runs,
    neurons: dict[tuple[str, float], list[Curve]],
) -> list[Result]:
    """Every line of the table."""
    found = accuracy_results(settings, runs, more)
    if settings.chapter in ("3", "all"):
        found += [
            neuron_result(cost, lr, waits, neurons[cost, lr])
            for cost, lr, waits in NEURONS
        ]
        scale = settings.epochs_scale
        by_size = {training: runs[cut(training, scale)] for training in SIZES}
        found.append(size_result(by_size, any(t not in runs for t in SIZES)))
    if settings.chapter in ("5", "all"):
        found += norm_results(*splits.train)
    return sorted(found, key=lambda result: result.chapter)


def table(found: Sequence[Result]) -> str:
    """The lines, with a heading for each chapter."""
    lines = aligned([TITLES, *(result.cells for result in found)], left=2).split("\n")
    shown, chapter = [lines[0]], ""
    for result, line in zip(found, lines[1:], strict=True):
        if result.chapter != chapter:
            chapter = result.chapter
            shown.append(f"chapter {chapter}")
        shown.append(line)
    return "\n".join(shown)


def conclude(found: Sequence[Result]) -> str:
    counts = {
        verdict: sum(result.verdict == verdict for result in found)
        for verdict in (REPRODUCED, BETTER, MISSED, NOT_COMPARABLE)
    }
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    return f"verdict: {said}"


def curves_of(
    runs: Runs,
    neurons: dict[tuple[str, float], list[Curve]],
) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for training, of_seeds in runs.items():
        for run in of_seeds:
            tag = f"accuracy_{training.scored}/{training} seed {run.seed}"
            curves[tag] = list(enumerate(run.accuracies, start=1))
    for (cost, lr), of_starts in neurons.items():
        for curve in of_starts:
            tag = f"neuron/{SHORT[cost]} η {lr:g} {curve.start} start"
            curves[tag] = list(zip(curve.times, curve.C, strict=True))
    return curves


def draw(figure: Any, found: Sequence[Result], runs: Runs) -> None:
    """Each row's distance from the book, and accuracy over n."""
    sized = [t for t in runs if t.init == "scaled" and t.lr == SIZES[0].lr]
    if sized:
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    else:
        left, right = figure.subplots(), None
    rows = [result for result in found if result.deviation is not None][::-1]
    for y, result in enumerate(rows):
        assert result.deviation is not None
        error = 2 * result.spread
        # Those far off stand as arrows at the edge.
        x = max(-SHOWN, min(SHOWN, result.deviation))
        marker = "o" if x == result.deviation else "<" if x < 0 else ">"
        style = COLOURS[result.verdict] + marker
        left.errorbar(x, y, xerr=error, fmt=style, capsize=3, markersize=5)
    for verdict in dict.fromkeys(result.verdict for result in rows[::-1]):
        left.plot([], [], COLOURS[verdict] + "o", label=verdict)
    left.axvspan(-TOLERANCE, TOLERANCE, alpha=0.2)
    left.set_xlim(-SHOWN - 0.3, SHOWN + 0.3)
    labels = [f"{r.setting}, {r.statistic}" for r in rows]
    left.set_yticks(range(len(rows)), labels, fontsize=8)
    left.set_title("Accuracy beside the book's", fontsize=10)
    left.set_xlabel("mean - book, points, ± 2 std")
    left.legend(fontsize=8, loc="lower right")
    if right is None:
        return
    for training in sized:
        ends = [run.accuracies[-1] for run in runs[training]]
        right.semilogx([training.examples] * len(ends), ends, "C0.")
    right.set_title("Test accuracy at the end, %", fontsize=10)
    right.set_xlabel("training examples")


def command_line(arguments: list[str] | None = None) -> int:
    """The shell around :func:`main`; returns the exit status."""
    return reporting.run(main, Settings, QUICK, __doc__, arguments)


if __name__ == "__main__":
    sys.exit(command_line())
