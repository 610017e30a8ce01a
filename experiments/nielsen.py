"""The results that the book reports, reproduced on MNIST.

    python experiments/nielsen.py                     every row, 3 seeds each
    python experiments/nielsen.py --chapter 5         one chapter: 1, 3 or 5
    python experiments/nielsen.py --engine autograd   under autograd; 10 x as long
    python experiments/nielsen.py --epochs-scale 0.1  a tenth of the epochs
    python experiments/nielsen.py --quick             a twentieth, in a minute

The claim: this package's BP1-BP4 and W ← W - η ∂C/∂W train the networks of the book to
the accuracies that the book reports. 50,000 training images, batches of 10, 30 epochs
unless a row states otherwise; λ is the book's, λ/n the weight decay.

A published accuracy counts as reproduced if it is within 0.3 points or two standard
deviations of the seeds' mean, whichever is more; if the mean is above that range, the
row is "better", if below, "not reproduced". Rows that are not reproduced are trained
with 7 more seeds, which do not change the verdict. A reason is printed for them, and
for rows that are reproduced only by their standard deviation. A published norm has to
be within the range of 30 initial networks. The single neuron, and the growth of
accuracy with the number of training examples, are judged by shape. A row whose epochs
were cut is not comparable, unless it is about the first epoch.

Exit status: 0 all rows are reproduced; 1 a row is not; 2 bad arguments or data; 130
interrupted (results.json keeps the finished trainings).

Source: Nielsen, Neural Networks and Deep Learning, chapters 1, 3 and 5.
"""

from __future__ import annotations

import dataclasses
import sys
import textwrap
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # to find experiments and torchbp

import torchbp
from experiments.support import reporting
from experiments.support.nielsen_runs import (
    ENGINES,
    EXAMPLES,
    SHORT,
    Training,
    collect,
    initial_network,
)
from experiments.support.one_neuron import NEURON_STARTS, Curve, neuron
from experiments.support.options import check_least, option
from experiments.support.reproduction import (
    BETTER,
    MISSED,
    NOT_COMPARABLE,
    REPRODUCED,
    TOLERANCE,
    Published,
    Reproduction,
    Runs,
    reproduce_accuracy,
    reproduce_growth,
    reproduce_neuron,
    reproduce_norm,
)
from torchbp import data
from torchbp._terminal import aligned
from torchbp.inspection import probe
from torchbp.training import cpu_threads

CHAPTERS = ("1", "3", "5", "all")
LARGEST_SHOWN = 6.0  # points of accuracy, in the figure
STARTS, PROBED = 30, 1000  # initial networks and images of the norms
MORE_SEEDS = 7  # for rows that are not reproduced
COLOURS = {REPRODUCED: "C0", BETTER: "C2", MISSED: "C3", NOT_COMPARABLE: "C7"}
QUICK: dict[str, Any] = {"epochs_scale": 0.05}


@dataclass(frozen=True, kw_only=True)
class NielsenSettings(reporting.CommonSettings):
    """Which rows are reproduced, and how; each field is an option: `chapter`, `seeds`,
    `engine`, `epochs_scale`, `workers`."""

    chapter: str = option("all", "chapter whose rows are reproduced", CHAPTERS)
    seeds: int = option(3, "trainings of each row")
    engine: str = option("explicit", "what takes the steps", tuple(ENGINES))
    epochs_scale: float = option(1.0, "share of the epochs")
    workers: int = option(0, "processes; 0: one for each core")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, seeds=1, workers=0)
        if not 0 < self.epochs_scale <= 1:
            raise ValueError(
                f"epochs_scale: expected above 0 to 1, got {self.epochs_scale}"
            )


TITLES = ["network and training", "statistic", "book", "mean", "std", "range", ""]


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
    Published("1", _Q30, "epoch 1", 91.29, _BEST_OF_3),
    Published("1", _Q30, "peak", 95.42, _BEST_OF_3),
    Published("1", _Q100, "peak", 96.59, _BEST_OF_3),
    Published("1", _SLOW, "epoch 1", 11.39),
    Published("1", _SLOW, "end", 21.42),
    Published("1", _FAST, "epoch 1", 10.09),
    Published("1", _FAST, "end", 9.82),
    Published("3", Training((30,), _CE, 0.5), "peak", 95.49),
    Published("3", Training((100,), _CE, 0.5), "peak", 96.82),
    Published("3", Training((30,), _CE, 0.5, 5), "peak", 96.49),
    Published("3", Training((100,), _CE, 0.5, 5, scored="validation"), "end", 97.92),
    Published("3", _LONG, "end", 98.04),
    Published("3", _SCALED, "epoch 1", 92.70),
    Published("3", _NORMAL, "epoch 1", 86.43),
    Published("3", _SCALED, "end", 96.50),
    Published("3", _NORMAL, "end", 96.37),
    Published("5", _SCALED, "end", 96.48),
    Published("5", dataclasses.replace(_SCALED, hidden=(30,) * 2), "end", 96.90),
    Published("5", dataclasses.replace(_SCALED, hidden=(30,) * 3), "end", 96.57),
)
# ‖δ^ℓ‖ of the hidden layers at the start, by depth.
NORMS = {2: (0.066, 0.31), 3: (0.012, 0.060, 0.28)}
# (cost, η), and whether the neuron learns from the bad start only after a delay.
NEURONS = (("quadratic", 0.15, True), (_CE, 0.15, False), (_CE, 0.005, False))
# For the curve of accuracy over n: all with the number of steps of 30 epochs of the
# whole set, and with the same λ/n.
SIZES = tuple(
    Training((30,), _CE, 0.5, 5, "scaled", examples=n)
    for n in (100, 250, 500, 1000, 2500, 5000, 10_000, 25_000, EXAMPLES)
)


def reproduce_norms(images: Tensor, labels: Tensor) -> list[Reproduction]:
    """Compare ‖δ^ℓ‖ of untrained hidden layers with the book's: the norm of the mean of
    δ^ℓ over the images, ∂C/∂b^ℓ (BP3)."""
    x, cost = data.scale(images[:PROBED]), torchbp.CrossEntropyCost()
    results = []
    for depth, published in NORMS.items():
        training = Training((30,) * depth, _CE, 0.1, init="scaled")
        norms = []
        for seed in range(STARTS):
            records = probe(initial_network(training, seed), cost, x, labels[:PROBED])
            norms.append([record.norm("mean_delta") for record in records[:-1]])
        for ell, (value, of_seeds) in enumerate(
            zip(published, zip(*norms, strict=True), strict=True), start=1
        ):
            setting = f"{'-'.join(['30'] * depth)} CE scaled, untrained"
            results.append(reproduce_norm(setting, ell, value, list(of_seeds)))
    return results


def plan(settings: NielsenSettings) -> list[Training]:
    """Return the trainings that the chapter's rows need, each once, longest first."""
    wanted = [row.training for row in rows_of(settings.chapter)]
    if settings.chapter in ("3", "all"):
        wanted += SIZES
    scaled = [cut(training, settings.epochs_scale) for training in wanted]
    return sorted(
        dict.fromkeys(scaled), key=lambda t: t.epochs * sum(t.hidden), reverse=True
    )


def rows_of(chapter: str) -> list[Published]:
    """Return the rows of one chapter, or of "all"."""
    return [row for row in ROWS if chapter in ("all", row.chapter)]


def cut(training: Training, scale: float) -> Training:
    """Return the training with a share of its epochs, at least one."""
    return dataclasses.replace(training, epochs=max(1, round(training.epochs * scale)))


def main(settings: NielsenSettings) -> dict[str, Any]:
    """Train, print the table and return the content of results.json.

    Args:
        settings: which rows are reproduced, and how.
    """
    splits = reporting.load(settings)
    print(reporting.claim_of(__doc__))
    with cpu_threads(1), reporting.ExperimentRun("nielsen", settings) as experiment:
        results: dict[str, Any] = {
            "settings": reporting.describe_settings(settings),
            "runs": [],
        }

        def train(trainings: list[Training], seeds: range) -> Runs:
            """Train and write each finished run to results.json."""
            runs: Runs = {training: [] for training in trainings}
            engine, workers = settings.engine, settings.workers
            finished = collect(trainings, seeds, engine, splits, workers)
            with closing(finished):
                for run in finished:
                    runs[run.training].append(run)
                    results["runs"].append(dataclasses.asdict(run))
                    experiment.folder.write(results=results)
            for of_seeds in runs.values():
                of_seeds.sort(key=lambda run: run.seed)
            return runs

        seeds = range(settings.seed, settings.seed + settings.seeds)
        runs, more = train(plan(settings), seeds), {}
        missed = missed_trainings(settings, runs)
        if missed:
            print(f"\nnot reproduced: {', '.join(map(str, missed))}; more seeds")
            more = train(missed, range(seeds.stop, seeds.stop + MORE_SEEDS))
        neurons = {
            (cost, lr): [neuron(cost, start, lr) for start in NEURON_STARTS]
            for cost, lr, _ in NEURONS
            if settings.chapter in ("3", "all")
        }
        lines = assess(settings, splits, runs, more, neurons)
        print(f"\n{table(lines)}\n")
        for line in lines:
            if line.reason:
                text = f"{line.setting}, {line.statistic}: {line.reason}"
                print(textwrap.fill(text, 98, subsequent_indent="  "))
        results |= {
            "rows": [dataclasses.asdict(line) for line in lines],
            "neurons": {
                f"{cost} η {lr:g}": [curve.C for curve in curves]
                for (cost, lr), curves in neurons.items()
            },
            "shown": all(line.verdict != MISSED for line in lines),
            "verdict": verdict_of(lines),
        }
        curves = curves_of(runs, neurons)
        experiment.finish(results, curves, lambda f: draw(f, lines, runs), (9, 5.5))
    return results


def missed_trainings(settings: NielsenSettings, runs: Runs) -> list[Training]:
    """Return the trainings, cut, of the rows that are not reproduced."""
    lines = reproduce_accuracies(settings, runs, {})
    pairs = zip(rows_of(settings.chapter), lines, strict=True)
    missed = [row.training for row, line in pairs if line.verdict == MISSED]
    return list(dict.fromkeys(cut(t, settings.epochs_scale) for t in missed))


def reproduce_accuracies(
    settings: NielsenSettings, runs: Runs, more: Runs
) -> list[Reproduction]:
    """Compare the chapter's accuracies with `runs`; `more` have further seeds."""
    return [
        reproduce_accuracy(
            row, runs[shorter], shorter != row.training, more.get(shorter, [])
        )
        for row in rows_of(settings.chapter)
        for shorter in [cut(row.training, settings.epochs_scale)]
    ]


def assess(
    settings: NielsenSettings,
    splits: data.Splits,
    runs: Runs,
    more: Runs,
    neurons: dict[tuple[str, float], list[Curve]],
) -> list[Reproduction]:
    """Return all lines of the table.

    Args:
        settings: which rows are reproduced.
        splits: of MNIST.
        runs: the trainings.
        more: trainings with further seeds.
        neurons: the trainings of the single neuron.
    """
    lines = reproduce_accuracies(settings, runs, more)
    if settings.chapter in ("3", "all"):
        lines += [
            reproduce_neuron(cost, lr, waits, neurons[cost, lr])
            for cost, lr, waits in NEURONS
        ]
        scale = settings.epochs_scale
        by_size = {training: runs[cut(training, scale)] for training in SIZES}
        lines.append(reproduce_growth(by_size, any(t not in runs for t in SIZES)))
    if settings.chapter in ("5", "all"):
        lines += reproduce_norms(*splits.train)
    return sorted(lines, key=lambda line: line.chapter)


def table(lines: Sequence[Reproduction]) -> str:
    """Return the table, with a heading for each chapter."""
    titles, *texts = aligned([TITLES, *(line.cells for line in lines)], 2).split("\n")
    parts, chapter = [titles], ""
    for line, text in zip(lines, texts, strict=True):
        if line.chapter != chapter:
            chapter = line.chapter
            parts.append(f"chapter {chapter}")
        parts.append(text)
    return "\n".join(parts)


def verdict_of(lines: Sequence[Reproduction]) -> str:
    """Return the line that counts the verdicts."""
    counts = {
        verdict: sum(line.verdict == verdict for line in lines)
        for verdict in (REPRODUCED, BETTER, MISSED, NOT_COMPARABLE)
    }
    parts = (f"{count} {verdict}" for verdict, count in counts.items() if count)
    return f"verdict: {', '.join(parts)}"


def curves_of(
    runs: Runs, neurons: dict[tuple[str, float], list[Curve]]
) -> dict[str, list[tuple[int, float]]]:
    """Return the curves for TensorBoard."""
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


def draw(figure: Any, lines: Sequence[Reproduction], runs: Runs) -> None:
    """Draw each row's deviation from the book, and accuracy over n."""
    sized = [t for t in runs if t.init == "scaled" and t.lr == SIZES[0].lr]
    if sized:
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    else:
        left, right = figure.subplots(), None
    rows = [line for line in lines if line.deviation is not None][::-1]
    for y, line in enumerate(rows):
        assert line.deviation is not None
        error = 2 * line.spread
        # Larger deviations are arrows at the edge.
        x = max(-LARGEST_SHOWN, min(LARGEST_SHOWN, line.deviation))
        marker = "o" if x == line.deviation else "<" if x < 0 else ">"
        style = COLOURS[line.verdict] + marker
        left.errorbar(x, y, xerr=error, fmt=style, capsize=3, markersize=5)
    for verdict in dict.fromkeys(line.verdict for line in rows[::-1]):
        left.plot([], [], COLOURS[verdict] + "o", label=verdict)
    left.axvspan(-TOLERANCE, TOLERANCE, alpha=0.2)
    left.set_xlim(-LARGEST_SHOWN - 0.3, LARGEST_SHOWN + 0.3)
    labels = [f"{r.setting}, {r.statistic}" for r in rows]
    left.set_yticks(range(len(rows)), labels, fontsize=8)
    left.set_title("Accuracy compared with the book", fontsize=10)
    left.set_xlabel("mean - book, points, ± 2 std")
    left.legend(fontsize=8, loc="lower right")
    if right is None:
        return
    for training in sized:
        ends = [run.accuracies[-1] for run in runs[training]]
        right.semilogx([training.examples] * len(ends), ends, "C0.")
    right.set_title("Test accuracy at the end, %", fontsize=10)
    right.set_xlabel("training examples")


command_line = reporting.command_line(main, NielsenSettings, QUICK, __doc__)

if __name__ == "__main__":
    sys.exit(command_line())
