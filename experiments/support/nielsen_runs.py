"""The trainings of experiments/nielsen.py, in one process or in several.

Not joblib: it would replace the queue of tasks alone. Workers would still need code for
their data and threads, to stop after an epoch on Ctrl-C, and to end with their parent.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

import torchbp
from experiments.support.settings import COSTS
from torchbp import data
from torchbp._terminal import duration
from torchbp.training import AutogradSGD, DivergedError, Engine

SHORT = {"quadratic": "quad", "cross-entropy": "CE"}
ENGINES: dict[str, Any] = {"explicit": torchbp.ExplicitSGD, "autograd": AutogradSGD}
EXAMPLES, BATCH_SIZE, INPUTS, CLASSES = 50_000, 10, 784, 10
TIMED_STEPS = 500  # for the estimate of the duration


@dataclass(frozen=True)
class Training:
    """One network and how it is trained.

    Attributes:
        hidden: neurons of the hidden layers.
        cost: a key of `COSTS`.
        lr: η.
        lam: the book's λ at n = 50,000.
        init: the initialisation.
        epochs: of 50,000 examples each: several passes over fewer training images.
        scored: the split on which accuracy is measured.
        examples: training images.
    """

    hidden: tuple[int, ...]
    cost: str
    lr: float
    lam: float = 0.0
    init: str = "normal"
    epochs: int = 30
    scored: str = "test"
    examples: int = EXAMPLES

    def __str__(self) -> str:
        parts = ["-".join(map(str, self.hidden)), SHORT[self.cost], f"η {self.lr:g}"]
        parts += [f"λ {self.lam:g}"] * bool(self.lam)
        parts += [self.init]
        parts += [f"n {self.examples}"] * (self.examples != EXAMPLES)
        return " ".join(parts)


@dataclass(frozen=True)
class Run:
    """The result of one training with one seed.

    Attributes:
        training: the network and how it is trained.
        seed: of weights and batches.
        accuracies: in percent, after every epoch.
        unlearned: after every epoch, the number of digits of which fewer than a tenth
            are recognised.
        seconds: that the training took.
    """

    training: Training
    seed: int
    accuracies: list[float]
    unlearned: list[int]
    seconds: float

    @property
    def peak(self) -> float:
        """The largest accuracy."""
        return max(self.accuracies)


class StoppedError(RuntimeError):
    """The training was asked to stop."""


def initial_network(training: Training, seed: int) -> torch.nn.Module:
    """Return the untrained network."""
    torch.manual_seed(seed)
    sizes = (INPUTS, *training.hidden, CLASSES)
    output = COSTS[training.cost][1]
    return torchbp.MLP(
        sizes, output=output, init=training.init, device="cpu", dtype=torch.float32
    )


def make_engine(engine: str, training: Training, model: torch.nn.Module) -> Engine:
    """Return the engine, a key of `ENGINES`, that trains the model."""
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
    """Train one network with one seed.

    Args:
        training: the network and how it is trained.
        seed: of weights and batches.
        engine: a key of `ENGINES`.
        splits: of MNIST.
        stopped: called after every epoch; True ends the training.

    Raises:
        DivergedError: the cost is not finite.
        StoppedError: `stopped` returned True.
    """
    started = time.perf_counter()
    model = initial_network(training, seed)
    sgd = make_engine(engine, training, model)
    images, labels = (t[: training.examples] for t in splits.train)
    scored = getattr(splits, training.scored)
    generator = torch.Generator("cpu").manual_seed(seed)
    scores = []
    for epoch in range(training.epochs):
        n = len(labels)
        orders = [
            torch.randperm(n, generator=generator, device="cpu")
            for _ in range(max(1, EXAMPLES // training.examples))
        ]
        for C in sgd.steps(images, labels, torch.cat(orders), BATCH_SIZE):
            if not C.isfinite().all():
                raise DivergedError(
                    f"{training}: the cost in epoch {epoch + 1} is infinite or NaN"
                )
        scores.append(score(model, scored))
        if stopped():
            raise StoppedError
    accuracies, unlearned = (list(column) for column in zip(*scores, strict=True))
    return Run(training, seed, accuracies, unlearned, time.perf_counter() - started)


@torch.inference_mode()
def score(model: torch.nn.Module, split: data.Split) -> tuple[float, int]:
    """Return the accuracy in percent, and the number of digits of which fewer than a
    tenth are recognised."""
    right = model(data.scale(split.images)).argmax(-1) == split.labels
    totals = torch.bincount(split.labels, minlength=CLASSES)
    recognised = torch.bincount(split.labels[right], minlength=CLASSES)
    accuracy = 100 * (right.sum().item() / len(right))
    return accuracy, int((recognised < 0.1 * totals).sum())


def collect(
    trainings: Sequence[Training],
    seeds: range,
    engine: str,
    splits: data.Splits,
    workers: int,
) -> Generator[Run, None, None]:
    """Yield all trainings with all seeds as they finish, and print a line for each.

    Args:
        trainings: the networks.
        seeds: of each.
        engine: a key of `ENGINES`.
        splits: of MNIST.
        workers: processes; 0 for the number of cores.
    """
    count = len(trainings) * len(seeds)
    epochs = sum(t.epochs for t in trainings) * len(seeds)
    workers = min(workers or os.cpu_count() or 1, count)
    seconds = estimate(trainings, engine, splits) * len(seeds) / workers
    print(
        f"trainings {len(trainings)}, seeds {len(seeds)}: {epochs:,} epochs of "
        f"{EXAMPLES:,} examples, {engine} engine, {workers} "
        f"process{'es' * (workers > 1)}\nabout {duration(seconds)} in all",
        flush=True,
    )
    started, done = time.perf_counter(), 0
    with closing(run_all(trainings, seeds, engine, splits, workers)) as finished:
        for i, run in enumerate(finished, start=1):
            yield run
            done += run.training.epochs
            left = (time.perf_counter() - started) * (epochs - done) / done
            print(
                f"[{i:{len(str(count))}}/{count}] {run.training!s:31} seed {run.seed}"
                f"  {run.training.epochs:2} epochs  peak {run.peak:5.2f}"
                f"  end {run.accuracies[-1]:5.2f}  {duration(left)} left",
                flush=True,
            )
    print(f"took {duration(time.perf_counter() - started)}")


def estimate(trainings: Sequence[Training], engine: str, splits: data.Splits) -> float:
    """Return the seconds of all trainings with one seed, from some steps of each."""
    total, known = 0.0, {}
    for training in trainings:
        key = (training.hidden, training.cost)
        if key not in known:
            known[key] = seconds_per_epoch(training, engine, splits)
        total += training.epochs * known[key]
    return total


def seconds_per_epoch(training: Training, engine: str, splits: data.Splits) -> float:
    """Return the seconds of one epoch, from TIMED_STEPS steps."""
    model = initial_network(training, 0)
    sgd = make_engine(engine, training, model)
    n = len(splits.train.labels)
    order = torch.randint(n, (TIMED_STEPS * BATCH_SIZE,), device="cpu")
    for _ in sgd.steps(*splits.train, order[: len(order) // 4], BATCH_SIZE):
        pass  # the first steps allocate
    started = time.perf_counter()
    for _ in sgd.steps(*splits.train, order, BATCH_SIZE):
        pass
    trained = time.perf_counter()
    score(model, getattr(splits, training.scored))
    scored = time.perf_counter()
    steps = EXAMPLES / BATCH_SIZE / TIMED_STEPS
    return (trained - started) * steps + scored - trained


def run_all(
    trainings: Sequence[Training],
    seeds: Sequence[int],
    engine: str,
    splits: data.Splits,
    workers: int,
) -> Generator[Run, None, None]:
    """Yield all trainings with all seeds as they finish; arguments as of
    :func:`collect`."""
    tasks = [(training, seed) for training in trainings for seed in seeds]
    if workers == 1:
        for training, seed in tasks:
            yield train(training, seed, engine, splits)
        return
    # Spawned: torch's threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    content = [[t.numpy() for t in split] for split in splits]
    pool = ProcessPoolExecutor(
        workers, context, initializer=start_worker, initargs=(content, stop)
    )
    try:
        with block_interrupts():  # workers inherit this while they start
            futures = [pool.submit(work, *task, engine) for task in tasks]
        for future in as_completed(futures):
            yield future.result()
    except BrokenExecutor as error:
        raise OSError(f"workers: one of {workers} was lost: {error}") from error
    finally:
        # After Ctrl-C, too: running trainings stop after their epoch.
        stop.set()
        pool.shutdown(cancel_futures=True)


@contextmanager
def block_interrupts() -> Iterator[None]:
    """Defer Ctrl-C to the end of the block; processes started in it ignore it."""
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
    """Initialise a worker process.

    Args:
        content: the data set as NumPy arrays.
        stop: an event that ends trainings.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    torch.set_num_threads(1)
    splits = (data.Split(*map(torch.from_numpy, split)) for split in content)
    _worker.update(splits=data.Splits(*splits), stop=stop)
    parent = multiprocessing.parent_process()
    if parent is not None:
        arguments = (parent.sentinel,)
        threading.Thread(target=exit_with_parent, args=arguments, daemon=True).start()


def exit_with_parent(sentinel: int) -> None:
    """Wait for the end of the parent process, then exit."""
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def work(training: Training, seed: int, engine: str) -> Run:
    """Train one network in a worker process."""
    return train(training, seed, engine, _worker["splits"], _worker["stop"].is_set)
