"""Train a network of hand-written layers on MNIST, and watch it in TensorBoard.

    python experiments/mnist.py                           the book's first network
    python experiments/mnist.py --engine explicit         the same, without autograd and
                                                          several times as fast
    python experiments/mnist.py --layers native           the control: same start, same
                                                          batches, torch's own layers
    python experiments/mnist.py --sizes 784 100 10 --cost cross-entropy --lr 0.5
    python experiments/mnist.py --recipe best             the most accurate, 10 minutes
    python experiments/mnist.py --json                    a JSON object for each epoch
    python experiments/mnist.py --resume runs/NAME        go on where a run stopped
    torchrun --nproc-per-node 2 experiments/mnist.py      the same run, by 2 processes
    python experiments/mnist.py --page                    and at the end page.html, the
                                                          trained network for a browser
    tensorboard --logdir runs                             the curves

Exit status: 0 done; 1 --target-accuracy missed or the cost diverged; 2 bad arguments or
data, or a run folder that cannot be read or written: full, read-only, gone, or in use
by another process; 130 interrupted, 141 whoever read the output left, 143
terminated. These can be resumed, and so can a run that was killed.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import platform
import signal
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the file beside this one

import torchbp
from experiments.support.settings import (
    COMPARED,
    COSTS,
    Settings,
    build,
    number_of_threads,
    parse,
    read_settings,
    reconcile,
)
from torchbp import data
from torchbp._terminal import reader_left
from torchbp.data import distort
from torchbp.explicit import kernel_failure
from torchbp.inspection import save_page
from torchbp.training import (
    EVALUATE_AT_ONCE,
    PROGRESS,
    SCHEDULES,
    AutogradSGD,
    Dashboard,
    DivergedError,
    Engine,
    EpochResult,
    ParallelSGD,
    RunFolder,
    Trainer,
    World,
    check_state,
    checkpoint,
    cpu_threads,
    join,
)

PAGE = "page.html"


def main(settings: Settings) -> dict[str, Any]:
    """A new run; returns what the last lines of the output say.

    Raises:
        ValueError, torchbp.data.DataError, OSError: bad settings, data or folder; no
            run folder is left behind.
        DivergedError, KeyboardInterrupt: training stopped; the run can be resumed.
    """
    with join(settings.device) as world, ExitStack() as held:
        folder = make_folder(settings) if world.rank == 0 else None
        try:
            if folder is not None:
                held.enter_context(folder.lock())
            splits, settings = load_data(settings)
            trainer = assemble(settings, splits, world)
            log = None if folder is None else open_log(folder, settings, world, trainer)
        except BaseException:
            if folder is not None:
                folder.discard()
            raise
        return train(settings, trainer, log)


def resume(run: str, **changes: Any) -> dict[str, Any]:
    """Go on with a run from its last checkpoint, or from the one that `run` names.

    Args:
        run: the run's folder, or a checkpoint in it, as in :class:`RunFolder`.
        changes: settings given anew. Those in CHANGEABLE take effect, the others must
            be what the run was started with.

    Raises:
        ValueError: settings that contradict the run's, each named.
        torchbp.training.CheckpointError: no checkpoint, or not a whole one, and no
            whole one before it.
        BlockingIOError: another process is at work on the run.
        and as :func:`main`.
    """
    folder = RunFolder(run)
    if folder.path != Path(run) and not folder.has_settings:
        raise checkpoint.CheckpointError(
            f"{run}: expected a run's folder or a checkpoint in one, but there is no "
            f"settings.json in {folder.path}"
        )
    with ExitStack() as held:
        if RANK == 0:
            held.enter_context(folder.lock())
        state = find_state(folder)
        done = 0 if state["trainer"] is None else state["trainer"]["epoch"]
        old = read_settings(state)
        settings = reconcile(folder.path, old, done, changes)
        world = held.enter_context(join(settings.device))
        splits, _ = load_data(settings)
        trainer = assemble(settings, splits, world)
        if state["trainer"] is not None:
            try:
                trainer.load_state_dict(state["trainer"])
            except (RuntimeError, LookupError, TypeError, ValueError) as error:
                reason = " ".join(str(error).split())
                raise checkpoint.CheckpointError(
                    f"{folder.checkpoint}: expected the state of this run: {reason}"
                ) from error
        before = state.get("versions", {}).get("kernel")
        keep_kernel(trainer, before, "kernel" in changes)
        log = None
        if world.rank == 0:
            if state["trainer"] is not None and settings != old:
                # Or they would be forgotten if this sitting ends in its first epoch.
                try:
                    folder.save({**state, "settings": dataclasses.asdict(settings)})
                except OSError as error:
                    raise cannot_be_written(folder, error) from error
            log = open_log(folder, settings, world, trainer, resumed_at=trainer.epoch)
        return train(settings, trainer, log)


def keep_kernel(trainer: Trainer, before: str | None, is_given: bool) -> None:
    """Go on with the kernel that the run had `before`, unless another one is given or
    it cannot be had; say what changes."""
    engine = trainer.engine
    if not isinstance(engine, torchbp.ExplicitSGD) or before is None:
        return
    if before == "torch" and not is_given:
        engine.kernel = before
    now = choose_kernel(trainer)
    if now != before:
        reason = "" if kernel_failure() is None else f": {kernel_failure()}"
        note(f"the run goes on with the kernel {now}, after {before}{reason}")


def choose_kernel(trainer: Trainer) -> str | None:
    """What computes the steps of the explicit engine; None for another engine."""
    if not isinstance(trainer.engine, torchbp.ExplicitSGD):
        return None
    return trainer.engine.choose_kernel(trainer.data.train.images, trainer.batch_size)


def find_state(folder: RunFolder) -> dict[str, Any]:
    """The run's newest whole checkpoint. A run that was stopped before its first has
    settings alone: its "trainer" is None."""
    if folder.never_began:
        state = {"settings": folder.read("settings"), "trainer": None}
        try:
            read_settings(state)
        except (LookupError, TypeError, ValueError) as error:
            raise checkpoint.CheckpointError(
                f"{folder.path}: expected a run of this program, got {error}"
            ) from error
        note(f"{folder.path} has no checkpoint yet: it begins anew")
        return state
    state, failure = folder.load(check_run)
    if failure is not None:
        epoch = state["trainer"]["epoch"]
        note(f"{failure}; going on from {folder.previous}, epoch {epoch}")
    return state


def note(message: str) -> None:
    """One line on standard error, by one of the processes."""
    if RANK == 0:
        print(f"NOTE: {message}", file=sys.stderr)


def check_run(state: dict[str, Any]) -> None:
    """Raise something unless `state` is what a run of this program saves."""
    settings = read_settings(state)
    check_memory(settings, torch.device("cpu"))
    model = build(settings)
    check_state(state["trainer"], model)
    engine = AutogradSGD(model, COSTS[settings.cost][0](), settings.lr)
    engine.load_state_dict(state["trainer"]["engine"])


def assemble(settings: Settings, splits: data.Splits, world: World) -> Trainer:
    """The network, its cost and its engine, joined to the data on the device."""
    check_memory(settings, world.device)
    try:
        model = build(settings).to(world.device)
    except RuntimeError as error:  # the allocator's
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"sizes: expected a network that fits into memory, got {settings.sizes}: "
            f"{reason}"
        ) from error
    cost = COSTS[settings.cost][0]()
    rates = settings.lr, settings.weight_decay
    engine: Engine
    if settings.engine == "explicit":
        if world.size > 1:
            raise ValueError(
                "engine: expected autograd for several processes, got 'explicit' and "
                f"{world.size} processes"
            )
        engine = torchbp.ExplicitSGD(model, cost, *rates, kernel=settings.kernel)
    elif world.size > 1:
        engine = ParallelSGD(model, cost, *rates, world)
    else:
        engine = AutogradSGD(model, cost, *rates)
    if settings.train_on == "all":
        splits = data.join_validation(splits)
    # The whole set in the device's memory: 55 MB for MNIST, still as uint8.
    on_device = data.Splits(
        *(data.Split(*(t.to(world.device) for t in split)) for split in splits)
    )
    return Trainer(
        model,
        engine,
        cost,
        on_device,
        settings.batch_size,
        settings.seed,
        partial(rate, settings),
        partial(distort, strength=settings.distort) if settings.distort else None,
    )


def check_memory(settings: Settings, device: torch.device) -> None:
    """Refuse a network that this machine or its GPU cannot hold: systems that promise
    more memory than there is would end the program without a word."""
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    elif {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= getattr(os, "sysconf_names", {}).keys():
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
    pairs = itertools.pairwise(settings.sizes)
    weights = sum(n_out * (n_in + 1) for n_in, n_out in pairs)
    rows = max(min(settings.batch_size, 60_000), EVALUATE_AT_ONCE)
    activations = rows * sum(settings.sizes)
    # Of four bytes: weights and gradients or copies, the activations of a batch.
    needed = 4 * (2 * weights + activations)
    if needed > there:
        raise ValueError(
            f"sizes: expected a network that fits into {there // 10**9} GB of memory, "
            f"got {settings.sizes}, which needs {needed // 10**9} GB"
        )


def rate(settings: Settings, epoch: int) -> float:
    """η after so many completed epochs."""
    return settings.lr * SCHEDULES[settings.schedule](epoch / settings.epochs)


def load_data(settings: Settings) -> tuple[data.Splits, Settings]:
    """The data set, and the settings with "auto" replaced by what was found."""
    name, root = settings.dataset, settings.data
    if name != "auto":
        return data.load(name, root), settings
    try:
        name, splits = "mnist", data.load("mnist", root)
    except data.DataError as error:
        if data.find("mnist", root):
            raise  # there, but damaged: not to be passed over
        name, splits = "digits", data.load("digits")
        note(f"MNIST cannot be had: {error}")
        note(
            "training on scikit-learn's 1,797 digits instead; their accuracy is NOT "
            "comparable with MNIST's."
        )
    return splits, dataclasses.replace(settings, dataset=name)


def make_folder(settings: Settings) -> RunFolder:
    """The run's folder: its name, or what distinguishes runs, and when they started:
    784-30-10_quadratic_bp_seed0_20260102-030405."""
    if settings.name is not None:
        return RunFolder.create(settings.logdir, settings.name)
    sizes = "-".join(map(str, settings.sizes))[:80]
    stamp = time.strftime("%Y%m%d-%H%M%S")
    how = settings.layers if settings.engine == "autograd" else settings.engine
    name = f"{sizes}_{settings.cost}_{how}_seed{settings.seed}_{stamp}"
    for suffix in ("", *(f"-{i}" for i in range(2, 1000))):
        try:
            return RunFolder.create(settings.logdir, name + suffix)
        except ValueError:  # taken, by a run that started in the same second
            continue
    raise ValueError(f"name: expected a free one, got a thousand called {name}")


def describe_versions(
    settings: Settings, world: World, trainer: Trainer
) -> dict[str, str]:
    """What a reader needs to know to repeat the run."""
    is_cuda = world.device.type == "cuda"
    kernel = choose_kernel(trainer)
    return {
        "torchbp": torchbp.__version__,
        "torch": str(torch.__version__),  # a plain str: checkpoints hold no classes
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if is_cuda else world.device.type,
        "processes": str(world.size),
        "threads": str(number_of_threads(settings)),
        **({} if kernel is None else {"kernel": kernel}),
    }


@dataclass(frozen=True)
class Log:
    """Where a run is written: by the process of rank 0, so the others have none."""

    folder: RunFolder
    dashboard: Dashboard
    versions: dict[str, str]


def open_log(
    folder: RunFolder,
    settings: Settings,
    world: World,
    trainer: Trainer,
    resumed_at: int | None = None,
) -> Log:
    """The run's folder with its settings and versions, and its event file."""
    record = dataclasses.asdict(settings)
    versions = describe_versions(settings, world, trainer)
    folder.write(settings=record, versions=versions)
    compared = {name: record[name] for name in COMPARED}
    dashboard = Dashboard(
        folder.path,
        record,
        compared,
        versions,
        resumed_at,
        settings.log_level,
        settings.epochs,
        trainer.steps_per_epoch,
    )
    return Log(folder, dashboard, versions)


def train(settings: Settings, trainer: Trainer, log: Log | None) -> dict[str, Any]:
    """Train, and say what came out."""
    started = time.perf_counter()
    with cpu_threads(number_of_threads(settings)):
        if log is None:
            trainer.fit(settings.epochs)
        else:
            train_and_log(settings, trainer, log)
        accuracy = trainer.score()["test"].accuracy
    has_page = log is not None and settings.page and write_page(log.folder, trainer)
    metrics = {
        "epoch": trainer.epoch,
        "test_accuracy": accuracy,
        "target_accuracy": settings.target_accuracy,
        "best": None
        if trainer.best is None
        else dict(zip(("epoch", "validation", "test"), trainer.best, strict=True)),
        "seconds": time.perf_counter() - started,
        "run": None if log is None else str(log.folder.path),
    }
    if log is not None and settings.output == "text":
        print(summary(metrics, len(trainer.data.test.labels), has_page))
    elif log is not None and settings.output == "json":
        print(json.dumps({"done": True, **metrics}))
    return metrics


def write_page(folder: RunFolder, trainer: Trainer) -> bool:
    """Write the trained network's page, with the first ten images of the test set;
    return whether a page can hold it."""
    split = trainer.data.test
    images, labels = data.scale(split.images[:10]), split.labels[:10]
    model, lr = torchbp.from_native(trainer.model), trainer.engine.lr
    try:
        save_page(folder.path / PAGE, model, trainer.cost, images, labels, lr)
    except OSError as error:
        raise cannot_be_written(folder, error) from error
    except ValueError as error:
        note(f"no page: {error}")
        return False
    return True


def train_and_log(settings: Settings, trainer: Trainer, log: Log) -> None:
    """Train with events, checkpoints and progress, and say how to go on if anything
    stops it."""
    try:
        _train_and_log(settings, trainer, log)
    except BaseException as error:
        # A broken pipe is that of the output, not of the run's folder.
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            raise cannot_be_written(log.folder, error) from error
        if not isinstance(error, DivergedError):
            print(f"\nstopped; to go on: --resume {log.folder.path}", file=sys.stderr)
        raise


def cannot_be_written(folder: RunFolder, error: OSError) -> OSError:
    reason = error.strerror or str(error)
    return OSError(
        f"{folder.path}: the run cannot be written: {reason}; {folder.what_is_left()}"
    )


def _train_and_log(settings: Settings, trainer: Trainer, log: Log) -> None:
    split = trainer.data.train
    progress = PROGRESS[settings.output](
        settings.epochs, len(split.labels), trainer.epoch
    )

    def on_epoch(result: EpochResult) -> None:
        last = result.epoch == settings.epochs
        log.dashboard.log(result, trainer.engine.lr, last)
        progress.epoch(result)

    def save(state: dict[str, Any]) -> None:
        content = {
            "trainer": state,
            "settings": dataclasses.asdict(settings),
            "versions": log.versions,
        }
        log.folder.save(content)

    try:
        log.dashboard.watch(
            trainer.model, trainer.cost, split, trainer.data.test, settings.dataset
        )
        if settings.output == "text":
            print(headline(settings, trainer, log.versions), flush=True)
        trainer.fit(
            settings.epochs, on_epoch, progress.update, save, settings.checkpoint_every
        )
    finally:
        progress.close()
        log.dashboard.close(complete=trainer.epoch == settings.epochs)


HOW = {None: "", "torch": ", torch calls", "compiled": ", compiled loops"}


def headline(settings: Settings, trainer: Trainer, versions: dict[str, str]) -> str:
    n = len(trainer.data.train.labels)
    many = "" if versions["processes"] == "1" else f" x {versions['processes']}"
    engine = f"{settings.engine} engine{HOW[versions.get('kernel')]}"
    begun = f"\ngoing on after epoch {trainer.epoch}" if trainer.epoch else ""
    if trainer.epoch == settings.epochs:
        begun = (
            f"\nalready complete: {trainer.epoch} of {settings.epochs} epochs; "
            "more with --epochs"
        )
    return (
        f"{settings.dataset}: {n:,} images   network {list(settings.sizes)}, "
        f"{settings.activation}\n"
        f"{settings.layers} layers   {engine}   seed {settings.seed}   "
        f"{versions['device']}{many}\n"
        f"{settings.cost} cost   batch {settings.batch_size}   lr {settings.lr:g}   "
        f"below: cost, accuracy{begun}"
    )


def summary(metrics: dict[str, Any], tested: int, has_page: bool) -> str:
    best = ""
    if metrics["best"] is not None:
        epoch, validation, test = metrics["best"].values()
        best = (
            f"\nbest epoch      {epoch} (validation {validation:.2%}, test {test:.2%})"
        )
    run = Path(metrics["run"])
    page = f"\npage            {run / PAGE}" if has_page else ""
    return (
        f"\ntest accuracy   {metrics['test_accuracy']:.2%} of all {tested:,} images"
        f"{best}"
        f"\ntime            {metrics['seconds']:.1f} s, this sitting"
        f"\nrun             {run}{page}"
        f"\ncurves          tensorboard --logdir {run.parent}"
    )


def command_line(arguments: list[str] | None = None) -> int:
    """The shell around :func:`main` and :func:`resume`; returns the exit status."""
    given = parse(__doc__, arguments)
    try:
        if "resume" in given:
            metrics = resume(given.pop("resume"), **given)
        else:
            metrics = main(Settings(**given))
    except KeyboardInterrupt:
        complain("interrupted")
        return 130
    except DivergedError as error:
        complain(f"error: {error}")
        return 1
    except BrokenPipeError:
        return reader_left()
    except torch.OutOfMemoryError as error:
        complain(f"error: out of memory: {str(error).partition(chr(10))[0]}")
        return 2
    except (
        ValueError, TypeError, OSError, ImportError,
        data.DataError, checkpoint.CheckpointError,
    ) as error:  # fmt: skip
        complain(f"error: {error}")
        return 2
    except RuntimeError as error:
        if PROCESSES == 1:
            raise
        reason = " ".join(str(error).split())[:200]
        complain(f"error: another of the {PROCESSES} processes was lost ({reason})")
        return 1
    target, accuracy = metrics["target_accuracy"], metrics["test_accuracy"]
    if target is not None and accuracy < target:
        complain(
            f"error: test accuracy: expected at least {target:.2%}, got {accuracy:.2%}"
        )
        return 1
    return 0


PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
RANK = 0 if PROCESSES == 1 else int(os.environ["RANK"])


def complain(message: str) -> None:
    """One line on standard error, which names the process where there are several."""
    message = " ".join(message.splitlines())
    who = "" if PROCESSES == 1 else f"process {RANK}: "
    print(f"{who}{message}", file=sys.stderr)


def terminate(*_: object) -> NoReturn:
    """On SIGTERM: end as on Ctrl-C, with the events flushed and a checkpoint."""
    raise SystemExit(128 + signal.SIGTERM)


def say_once(failure: threading.ExceptHookArgs) -> None:
    """The event file's thread hands its OSError to the main thread, which reports it:
    no traceback besides."""
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)


if __name__ == "__main__":
    threading.excepthook = say_once
    signal.signal(signal.SIGTERM, terminate)
    sys.exit(command_line())
