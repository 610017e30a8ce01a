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
better, where it is below, not reproduced, and what was seen there is printed. A
published norm has to lie within the range of 30 starts. The one neuron, and the growth
of accuracy with the number of training examples, are judged by shape. A row whose
epochs were cut is not comparable, unless it is about the first.

Exit status: 0, 1 if a row was not reproduced, 2 bad arguments or data, 130 interrupted
(what was trained until then stays in results.json).

Source: Nielsen, Neural Networks and Deep Learning, chapters 1, 3 and 5.
"""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import statistics
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the files beside this one

import torchbp
from experiments import reporting
from experiments.timing import threads as number_of_threads
from torchbp import data
from torchbp.dashboard import probe
from torchbp.observation import aligned
from torchbp.trainer import AutogradSGD, DivergedError, Engine, evaluate

# The cost, the output layer that fits it, and its short name.
COSTS: dict[str, tuple[Any, str, str]] = {
    "quadratic": (torchbp.QuadraticCost, "sigmoid", "quad"),
    "cross-entropy": (torchbp.CrossEntropyCost, "identity", "CE"),
}
ENGINES: dict[str, Any] = {"explicit": torchbp.ExplicitSGD, "autograd": AutogradSGD}
CHAPTERS = ("1", "3", "5", "all")
EXAMPLES, BATCH_SIZE, INPUTS, CLASSES = 50_000, 10, 784, 10
TOLERANCE, SHOWN = 0.3, 6.0  # points of accuracy: of the verdict, of the figure
STARTS, PROBED = 30, 1000  # of the norms: initial networks, and images
TIMED_STEPS = 500  # for the estimate
REPRODUCED, BETTER, MISSED = "reproduced", "better", "not reproduced"
NOT_COMPARABLE = "not comparable"
QUICK: dict[str, Any] = {"epochs_scale": 0.05}


@dataclass(frozen=True, kw_only=True)
class Settings(reporting.Common):
    """Which rows, and how."""

    chapter: str = "all"
    seeds: int = 3
    engine: str = "explicit"
    epochs_scale: float = 1.0
    workers: int = 0  # processes; 0 for as many as there are cores

    def __post_init__(self) -> None:
        super().__post_init__()
        reporting.one_of(self, chapter=CHAPTERS, engine=tuple(ENGINES))
        reporting.at_least(self, seeds=1, workers=0)
        if not 0 < self.epochs_scale <= 1:
            raise ValueError(
                f"epochs_scale: expected above 0 to 1, got {self.epochs_scale}"
            )


@dataclass(frozen=True)
class Training:
    """One network and how it is trained. An epoch is 50,000 examples, so with fewer
    training images it goes through them several times."""

    hidden: tuple[int, ...]
    cost: str
    lr: float
    lam: float = 0.0  # λ of the book at n = 50,000
    init: str = "normal"
    epochs: int = 30
    scored: str = "test"
    examples: int = EXAMPLES

    def __str__(self) -> str:
        parts = ["-".join(map(str, self.hidden)), COSTS[self.cost][2], f"η {self.lr:g}"]
        parts += [f"λ {self.lam:g}"] * bool(self.lam)
        parts += [self.init]
        parts += [f"n {self.examples}"] * (self.examples != EXAMPLES)
        return " ".join(parts)


@dataclass(frozen=True)
class Run:
    """What one training with one seed came to: accuracies in percent."""

    training: Training
    seed: int
    accuracies: list[float]  # after every epoch
    unlearned: int  # digits of which fewer than a tenth were recognised in the end
    seconds: float

    @property
    def peak(self) -> float:
        return max(self.accuracies)


# What a published figure is of. Where the book does not say, a figure of the test set
# is taken for the peak, as its chapter 1 has it, and one of the validation set for the
# end, as its comparison of initialisations has it; results.json holds all epochs.
STATISTICS: dict[str, Callable[[Run], float]] = {
    "epoch 1": lambda run: run.accuracies[0],
    "peak": lambda run: run.peak,
    "end": lambda run: run.accuracies[-1],
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
NEURON_STARTS, NEURON_EPOCHS, WAITS_UNTIL = ((0.6, 0.9), (2.0, 2.0)), 300, 150
# Of the curve of accuracy over n. All take as many steps, 30 epochs of the whole set,
# and have the same λ/n.
SIZES = tuple(
    Training((30,), _CE, 0.5, 5, "scaled", examples=n)
    for n in (100, 250, 500, 1000, 2500, 5000, 10_000, 25_000, EXAMPLES)
)


class StoppedError(RuntimeError):
    """Someone asked the training to stop."""


def build(training: Training, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    sizes = (INPUTS, *training.hidden, CLASSES)
    output = COSTS[training.cost][1]
    return torchbp.MLP(sizes, output=output, init=training.init)


def make_engine(engine: str, training: Training, model: torch.nn.Module) -> Engine:
    cost = COSTS[training.cost][0]()
    made: Engine = ENGINES[engine](model, cost, training.lr, training.lam / EXAMPLES)
    return made


def train(
    training: Training,
    seed: int,
    engine: str,
    splits: data.Splits,
    stopped: Callable[[], bool] = lambda: False,
) -> Run:
    """One training, from start to end.

    Args:
        training: what.
        seed: of the weights and of the batches.
        engine: a key of `ENGINES`.
        splits: of MNIST.
        stopped: asked after every epoch.

    Raises:
        DivergedError: the cost is not finite.
        StoppedError: `stopped` said so.
    """
    started = time.perf_counter()
    model = build(training, seed)
    sgd = make_engine(engine, training, model)
    cost = COSTS[training.cost][0]()
    images, labels = (t[: training.examples] for t in splits.train)
    scored = getattr(splits, training.scored)
    generator = torch.Generator().manual_seed(seed)
    accuracies: list[float] = []
    for epoch in range(training.epochs):
        n = len(labels)
        orders = [
            torch.randperm(n, generator=generator)
            for _ in range(max(1, EXAMPLES // training.examples))
        ]
        for C in sgd.steps(images, labels, torch.cat(orders), BATCH_SIZE):
            if not C.isfinite().all():
                raise DivergedError(f"{training}: the cost in epoch {epoch + 1} is NaN")
        accuracies.append(100 * evaluate(model, cost, scored).accuracy)
        if stopped():
            raise StoppedError
    unlearned = count_unlearned(model, scored)
    return Run(training, seed, accuracies, unlearned, time.perf_counter() - started)


@torch.inference_mode()
def count_unlearned(model: torch.nn.Module, split: data.Split) -> int:
    """The digits of which fewer than a tenth are recognised."""
    right = model(data.scale(split.images)).argmax(-1) == split.labels
    there = torch.bincount(split.labels, minlength=CLASSES)
    recognised = torch.bincount(split.labels[right], minlength=CLASSES)
    return int((recognised < 0.1 * there).sum())


def judge(published: float, values: Sequence[float]) -> str:
    """Whether the seeds' accuracies reproduce the published one."""
    mean = statistics.fmean(values)
    allowed = max(TOLERANCE, 2 * spread(values))
    # Both are known to a hundredth of a point: the limit itself is within.
    if abs(published - mean) <= allowed + 1e-9:
        return REPRODUCED
    return BETTER if mean > published else MISSED


def accuracy_result(row: Row, runs: Sequence[Run], is_cut: bool) -> Result:
    """A published accuracy beside the seeds'."""
    values = [STATISTICS[row.statistic](run) for run in runs]
    comparable = row.statistic == "epoch 1" or not is_cut
    verdict = judge(row.published, values) if comparable else NOT_COMPARABLE
    where = "test" if row.training.scored == "test" else "val."
    epochs = row.training.epochs
    return Result(
        row.chapter,
        str(row.training) + f" {epochs} ep" * (epochs != 30),
        f"{where} {row.statistic}",
        f"{row.published:.2f}",
        list(values),
        verdict,
        look_into(row, runs, values) if verdict == MISSED else "",
        statistics.fmean(values) - row.published,
    )


def look_into(row: Row, runs: Sequence[Run], values: Sequence[float]) -> str:
    """What the runs show of why they fall short."""
    parts = [f"{row.published - statistics.fmean(values):.2f} points short"]
    whole = [v for v, run in zip(values, runs, strict=True) if not run.unlearned]
    if len(whole) < len(values):
        lost = len(values) - len(whole)
        parts.append(f"{lost} of {len(values)} seeds never learned some digit")
        if whole:
            parts.append(f"the others' mean is {statistics.fmean(whole):.2f}")
    if row.note:
        parts.append(f"{row.note}, and the best here {max(values):.2f}")
    if row.statistic == "end":
        peaks = statistics.fmean(run.peak for run in runs)
        parts.append(f"the mean of the peaks is {peaks:.2f}")
    return "; ".join(parts)


def size_result(runs: dict[Training, list[Run]], is_cut: bool) -> Result:
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


def neuron_costs(cost: str, lr: float, start: tuple[float, float]) -> list[float]:
    """The cost of one neuron with input 1 and target 0, before every epoch and after
    the last."""
    make, output, _ = COSTS[cost]
    neuron = torchbp.MLP([1, 1], output=output, dtype=torch.float64)
    with torch.no_grad():
        for p, value in zip(neuron.parameters(), start, strict=True):
            p.fill_(value)
    sgd = torchbp.ExplicitSGD(neuron, make(), lr)
    x = torch.ones(1, 1, dtype=torch.float64)
    y = torch.zeros_like(x)
    return [sgd.step(x, y).item() for _ in range(NEURON_EPOCHS + 1)]


def halved(costs: Sequence[float]) -> int | None:
    """The first epoch at whose end the cost is at most half of what it was."""
    return next((i for i, C in enumerate(costs) if costs[0] >= 2 * C), None)


def neuron_result(
    cost: str, lr: float, waits: bool, curves: Sequence[Sequence[float]]
) -> Result:
    """The two starts of the neuron: whether the bad one has to wait, by the epochs
    until the cost has halved."""
    good, bad = map(halved, curves)
    if good is None:
        as_said = False
    elif waits:
        as_said = bad is None or (bad > WAITS_UNTIL and bad >= 3 * good)
    else:
        as_said = bad is not None and bad <= 2 * good
    return Result(
        "3",
        f"neuron {COSTS[cost][2]} η {lr:g}, 2 starts",
        "cost halves",
        "waits" if waits else "at once",
        [good, bad],
        REPRODUCED if as_said else MISSED,
        "" if as_said else f"the cost halves after {good} and after {bad} epochs",
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


def estimate(
    trainings: list[Training], settings: Settings, splits: data.Splits
) -> float:
    """Seconds that all would take one after the other, from some steps of each."""
    total, known = 0.0, {}
    for training in trainings:
        key = (training.hidden, training.cost)
        if key not in known:
            known[key] = seconds_per_epoch(training, settings.engine, splits)
        total += training.epochs * known[key] * settings.seeds
    return total


def seconds_per_epoch(training: Training, engine: str, splits: data.Splits) -> float:
    model = build(training, 0)
    sgd = make_engine(engine, training, model)
    n = len(splits.train.labels)
    order = torch.randint(n, (TIMED_STEPS * BATCH_SIZE,))
    for _ in sgd.steps(*splits.train, order[: len(order) // 4], BATCH_SIZE):
        pass  # the first steps allocate
    started = time.perf_counter()
    for _ in sgd.steps(*splits.train, order, BATCH_SIZE):
        pass
    trained = time.perf_counter()
    evaluate(model, COSTS[training.cost][0](), getattr(splits, training.scored))
    scored = time.perf_counter()
    steps = EXAMPLES / BATCH_SIZE / TIMED_STEPS
    return (trained - started) * steps + scored - trained


def run_all(
    trainings: list[Training], settings: Settings, splits: data.Splits
) -> Generator[Run, None, None]:
    """All trainings with all seeds, as they are done."""
    tasks = [
        (training, settings.seed + i)
        for training in trainings
        for i in range(settings.seeds)
    ]
    workers = min(settings.workers or os.cpu_count() or 1, len(tasks))
    if workers == 1:
        for training, seed in tasks:
            yield train(training, seed, settings.engine, splits)
        return
    # Not forked: the threads of torch do not survive it.
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    content = [[t.numpy() for t in split] for split in splits]
    pool = ProcessPoolExecutor(
        workers, context, initializer=start_worker, initargs=(content, stop)
    )
    try:
        with without_interrupts():  # nor have the workers any while they start
            futures = [pool.submit(work, *task, settings.engine) for task in tasks]
        for future in as_completed(futures):
            yield future.result()
    except BrokenExecutor as error:
        raise OSError(f"workers: one of {workers} was lost: {error}") from error
    finally:
        # On Ctrl-C too: those at work stop after the epoch they are in.
        stop.set()
        pool.shutdown(cancel_futures=True)


@contextmanager
def without_interrupts() -> Iterator[None]:
    """Ctrl-C waits until the end of the block; processes started in it see none."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# The worker's copy of the data, and the event that stops it.
_worker: dict[str, Any] = {}


def start_worker(content: list[list[Any]], stop: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's business
    torch.set_num_threads(1)
    splits = (data.Split(*map(torch.from_numpy, split)) for split in content)
    _worker.update(splits=data.Splits(*splits), stop=stop)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=follow, args=(parent.sentinel,), daemon=True).start()


def follow(sentinel: int) -> None:
    """End with the parent, however that ends."""
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def work(training: Training, seed: int, engine: str) -> Run:
    return train(training, seed, engine, _worker["splits"], _worker["stop"].is_set)


def main(settings: Settings) -> dict[str, Any]:
    """Train, print the table, and return what is in results.json."""
    splits = reporting.load(settings)
    with number_of_threads(1), reporting.Report("nielsen", settings) as report:
        results: dict[str, Any] = {
            "settings": reporting.plain(settings),
            "runs": [],
        }
        runs = collect(settings, splits, report, results)
        neurons = {
            (cost, lr): [neuron_costs(cost, lr, start) for start in NEURON_STARTS]
            for cost, lr, _ in NEURONS
            if settings.chapter in ("3", "all")
        }
        found = assess(settings, splits, runs, neurons)
        print(f"\n{table(found)}\n")
        for result in found:
            if result.reason:
                said = f"{result.setting}, {result.statistic}: {result.reason}"
                print(textwrap.fill(said, 98, subsequent_indent="  "))
        results |= {
            "rows": [dataclasses.asdict(result) for result in found],
            "neurons": {f"{cost} η {lr:g}": c for (cost, lr), c in neurons.items()},
            "shown": all(result.verdict != MISSED for result in found),
            "verdict": conclude(found),
        }
        curves = curves_of(runs, neurons)
        report.finish(results, curves, lambda f: draw(f, found, runs), (11, 5))
    print(results["verdict"])
    return results


def collect(
    settings: Settings,
    splits: data.Splits,
    report: reporting.Report,
    results: dict[str, Any],
) -> dict[Training, list[Run]]:
    """Train all that is planned; the runs by training, in order of their seeds."""
    trainings = plan(settings)
    count = len(trainings) * settings.seeds
    epochs = sum(t.epochs for t in trainings) * settings.seeds
    workers = min(settings.workers or os.cpu_count() or 1, count)
    seconds = estimate(trainings, settings, splits) / workers
    print(
        f"{len(trainings)} trainings x {settings.seeds} seeds, {epochs:,} epochs of "
        f"{EXAMPLES:,} examples, {settings.engine} engine, {workers} "
        f"process{'es' * (workers > 1)}\nabout {minutes(seconds)} in all",
        flush=True,
    )
    runs: dict[Training, list[Run]] = {training: [] for training in trainings}
    started, done = time.perf_counter(), 0
    with closing(run_all(trainings, settings, splits)) as finished:
        for i, run in enumerate(finished, start=1):
            runs[run.training].append(run)
            results["runs"].append(dataclasses.asdict(run))
            report.folder.write(results=results)
            done += run.training.epochs
            left = (time.perf_counter() - started) * (epochs - done) / done
            print(
                f"[{i:{len(str(count))}}/{count}] {run.training!s:31} seed {run.seed}"
                f"  {run.training.epochs:2} epochs  peak {run.peak:5.2f}"
                f"  end {run.accuracies[-1]:5.2f}  {minutes(left)} left",
                flush=True,
            )
    for of_seeds in runs.values():
        of_seeds.sort(key=lambda run: run.seed)
    return runs


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def assess(
    settings: Settings,
    splits: data.Splits,
    runs: dict[Training, list[Run]],
    neurons: dict[tuple[str, float], list[list[float]]],
) -> list[Result]:
    """Every line of the table."""
    scale = settings.epochs_scale
    found = [
        accuracy_result(row, runs[shorter], shorter != row.training)
        for row in rows_of(settings.chapter)
        for shorter in [cut(row.training, scale)]
    ]
    if settings.chapter in ("3", "all"):
        found += [
            neuron_result(cost, lr, waits, neurons[cost, lr])
            for cost, lr, waits in NEURONS
        ]
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
    runs: dict[Training, list[Run]],
    neurons: dict[tuple[str, float], list[list[float]]],
) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for training, of_seeds in runs.items():
        for run in of_seeds:
            tag = f"accuracy_{training.scored}/{training} seed {run.seed}"
            curves[tag] = list(enumerate(run.accuracies, start=1))
    for (cost, lr), of_starts in neurons.items():
        for (w, b), costs in zip(NEURON_STARTS, of_starts, strict=True):
            tag = f"neuron/{COSTS[cost][2]} η {lr:g} w {w:g} b {b:g}"
            curves[tag] = list(enumerate(costs))
    return curves


def draw(figure: Any, found: Sequence[Result], runs: dict[Training, list[Run]]) -> None:
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
        colour = "C3" if result.verdict == MISSED else "C0"
        # Those far off stand as arrows at the edge.
        x = max(-SHOWN, min(SHOWN, result.deviation))
        marker = "o" if x == result.deviation else "<" if x < 0 else ">"
        left.errorbar(x, y, xerr=error, fmt=colour + marker, capsize=3)
    left.axvspan(-TOLERANCE, TOLERANCE, alpha=0.2)
    left.set_xlim(-SHOWN - 0.3, SHOWN + 0.3)
    labels = [f"{r.setting}, {r.statistic}" for r in rows]
    left.set_yticks(range(len(rows)), labels, fontsize=7)
    left.set_xlabel("mean - book, points of accuracy, ± 2 std")
    if right is None:
        return
    for training in sized:
        ends = [run.accuracies[-1] for run in runs[training]]
        right.semilogx([training.examples] * len(ends), ends, "C0.")
    right.set_xlabel("training examples")
    right.set_ylabel("test accuracy at the end, %")


def command_line(arguments: list[str] | None = None) -> int:
    """The shell around :func:`main`; returns the exit status."""
    parser = reporting.Parser(__doc__)
    add = parser.add_argument
    add("--chapter", choices=CHAPTERS, help="whose rows (default all)")
    add("--seeds", type=int, help="trainings of each row (default 3)")
    add("--engine", choices=tuple(ENGINES), help="of the steps (default explicit)")
    add("--epochs-scale", type=float, help="share of the epochs (default 1)")
    add("--workers", type=int, help="processes (default 0: one for each core)")
    return reporting.run(main, Settings, QUICK, parser, arguments)


if __name__ == "__main__":
    sys.exit(command_line())
