"""Train a network of hand-written layers on MNIST, and watch it in TensorBoard.

    python experiments/mnist.py                           the book's first network
    python experiments/mnist.py --engine explicit         the same, without autograd and
                                                          several times as fast
    python experiments/mnist.py --layers native           the control: same weights,
                                                          same batches, torch's layers
    python experiments/mnist.py --sizes 784 100 10 --cost cross-entropy --lr 0.5
    python experiments/mnist.py --recipe best             the most accurate, 10 minutes
    python experiments/mnist.py --json                    a JSON object for each epoch
    python experiments/mnist.py --resume runs/NAME        continue a run that stopped
    torchrun --nproc-per-node 2 experiments/mnist.py      the same run, by 2 processes
    python experiments/mnist.py --page                    also write page.html, the
                                                          trained network for a browser
    tensorboard --logdir runs                             the curves; the end of a run
                                                          prints their address

Exit status: 0 done; 1 --target-accuracy missed or the cost diverged; 2 bad arguments or
data, or a run folder that cannot be read or written: full, read-only, missing, or in
use by another process; 130 interrupted; 141 the output's reader stopped reading; 143
terminated. --resume continues the last three, and runs that were killed.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # to find experiments and torchbp

import torchbp
from experiments.support.run_log import (
    PAGE,
    RunLog,
    create_folder,
    find_state,
    open_log,
    write_error,
    write_page,
)
from experiments.support.settings import (
    TrainingSettings,
    number_of_threads,
    parse,
    read_settings,
    reconcile,
)
from experiments.support.trainer_setup import (
    PROCESSES,
    RANK,
    choose_kernel,
    load_data,
    make_trainer,
    print_note_once,
)
from torchbp._terminal import UserError, one_line, print_error, run_program
from torchbp.explicit import kernel_failure
from torchbp.training import (
    PROGRESS,
    CheckpointError,
    DivergedError,
    EpochResult,
    RunFolder,
    Trainer,
    cpu_threads,
    join,
)


class LostProcessError(UserError):
    """Another process of a parallel run ended."""


def main(settings: TrainingSettings) -> dict[str, Any]:
    """Start a run; return the metrics that end its output.

    Args:
        settings: of the run.

    Raises:
        ValueError, torchbp.data.DataError, OSError: bad settings, data or folder; no
            run folder is left behind.
        DivergedError, KeyboardInterrupt: training stopped; the run can be resumed.
    """
    with join(settings.device) as world, ExitStack() as stack:
        folder = create_folder(settings) if world.rank == 0 else None
        try:
            if folder is not None:
                stack.enter_context(folder.lock())
            splits, settings = load_data(settings)
            trainer = make_trainer(settings, splits, world)
            log = None if folder is None else open_log(folder, settings, world, trainer)
        except BaseException:
            if folder is not None:
                folder.discard()
            raise
        return train(settings, trainer, log)


def resume(run: str, **changes: Any) -> dict[str, Any]:
    """Continue a run from its last checkpoint, or from the checkpoint that `run` names.

    Args:
        run: the run's folder, or a checkpoint in it, as in :class:`RunFolder`.
        changes: settings of this session. Those in CHANGEABLE take effect, the others
            must equal the run's.

    Raises:
        ValueError: settings that contradict the run's, each named.
        torchbp.training.CheckpointError: no intact checkpoint.
        BlockingIOError: another process uses the run.
        and as :func:`main`.
    """
    folder = RunFolder(run)
    if folder.path != Path(run) and not folder.has_settings:
        raise CheckpointError(
            f"{run}: expected a run's folder or a checkpoint in one, but there is no "
            f"settings.json in {folder.path}"
        )
    with ExitStack() as stack:
        if RANK == 0:
            stack.enter_context(folder.lock())
        state = find_state(folder)
        done = 0 if state["trainer"] is None else state["trainer"]["epoch"]
        old = read_settings(state)
        settings = reconcile(folder.path, old, done, changes)
        world = stack.enter_context(join(settings.device))
        splits, _ = load_data(settings)
        trainer = make_trainer(settings, splits, world)
        if state["trainer"] is not None:
            restore(trainer, state["trainer"], folder)
        before = state.get("versions", {}).get("kernel")
        restore_kernel(trainer, before, "kernel" in changes)
        log = None
        if world.rank == 0:
            if state["trainer"] is not None and settings != old:
                # Else they would be lost if this session ends in its first epoch.
                try:
                    folder.save({**state, "settings": dataclasses.asdict(settings)})
                except OSError as error:
                    raise write_error(folder, error) from error
            log = open_log(folder, settings, world, trainer, resumed_at=trainer.epoch)
        return train(settings, trainer, log)


def restore(trainer: Trainer, state: dict[str, Any], folder: RunFolder) -> None:
    """Load a checkpoint's state into the trainer; raise CheckpointError if it does not
    fit."""
    try:
        trainer.load_state_dict(state)
    except (RuntimeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder.checkpoint}: expected the state of this run: {one_line(error)}"
        ) from error


def restore_kernel(trainer: Trainer, before: str | None, is_option: bool) -> None:
    """Use the kernel that the run had `before`, unless --kernel asks for another or it
    is not available; print a note if it changes."""
    engine = trainer.engine
    if not isinstance(engine, torchbp.ExplicitSGD) or before is None:
        return
    if before == "torch" and not is_option:
        engine.kernel = before
    now = choose_kernel(trainer)
    if now != before:
        reason = "" if kernel_failure() is None else f": {kernel_failure()}"
        print_note_once(
            f"the run continues with the kernel {now}, after {before}{reason}"
        )


def train(
    settings: TrainingSettings, trainer: Trainer, log: RunLog | None
) -> dict[str, Any]:
    """Train, print the summary and return the metrics.

    Args:
        settings: of the run.
        trainer: of the run.
        log: where it is written; None in processes that write nothing.
    """
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


def train_and_log(settings: TrainingSettings, trainer: Trainer, log: RunLog) -> None:
    """Train with events, checkpoints and progress; if training stops early, print how
    to continue it."""
    try:
        _train_and_log(settings, trainer, log)
    except BaseException as error:
        # A broken pipe concerns the output, not the run's folder.
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            raise write_error(log.folder, error) from error
        if not isinstance(error, DivergedError):
            print(
                f"\nstopped; to continue: --resume {log.folder.path}", file=sys.stderr
            )
        raise


def _train_and_log(settings: TrainingSettings, trainer: Trainer, log: RunLog) -> None:
    """Train with events, checkpoints and progress."""
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


KERNEL_NAMES = {None: "", "torch": ", torch calls", "compiled": ", compiled loops"}


def headline(
    settings: TrainingSettings, trainer: Trainer, versions: dict[str, str]
) -> str:
    """Return the lines that describe the run before its first epoch."""
    n = len(trainer.data.train.labels)
    many = "" if versions["processes"] == "1" else f" x {versions['processes']}"
    engine = f"{settings.engine} engine{KERNEL_NAMES[versions.get('kernel')]}"
    progress = f"\ncontinuing after epoch {trainer.epoch}" if trainer.epoch else ""
    if trainer.epoch == settings.epochs:
        progress = (
            f"\nalready complete: {trainer.epoch} of {settings.epochs} epochs; "
            "more with --epochs"
        )
    return (
        f"{settings.dataset}: {n:,} images   network {list(settings.sizes)}, "
        f"{settings.activation}\n"
        f"{settings.layers} layers   {engine}   seed {settings.seed}   "
        f"{versions['device']}{many}\n"
        f"{settings.cost} cost   batch {settings.batch_size}   lr {settings.lr:g}   "
        f"below: cost, accuracy{progress}"
    )


# Without TensorBoard's smoothing, which bends curves of one point an epoch.
CURVES = "http://localhost:6006/#custom_scalars&_smoothingWeight=0"


def summary(metrics: dict[str, Any], tested: int, has_page: bool) -> str:
    """Return the lines that end the output of a run."""
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
        f"\ntime            {metrics['seconds']:.1f} s, this session"
        f"\nrun             {run}{page}"
        f"\ncurves          tensorboard --logdir {run.parent}"
        f"\n                {CURVES}"
    )


def command_line(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status.

    Args:
        arguments: of the command line; those of the process if None.
    """
    statuses = {DivergedError: 1, LostProcessError: 1, TypeError: 2}
    return run_program(partial(_run, arguments), statuses, PREFIX)


PREFIX = "" if PROCESSES == 1 else f"process {RANK}: "


def _run(arguments: Sequence[str] | None) -> int:
    """Start or resume the run of a command line; return the exit status."""
    options = parse(__doc__, arguments)
    try:
        if "resume" in options:
            metrics = resume(options.pop("resume"), **options)
        else:
            metrics = main(TrainingSettings(**options))
    except (UserError, DivergedError):
        raise
    except torch.OutOfMemoryError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"out of memory: {reason}") from error
    except RuntimeError as error:
        if PROCESSES == 1:
            raise
        reason = one_line(error)[:200]
        raise LostProcessError(
            f"another of the {PROCESSES} processes was lost ({reason})"
        ) from error
    target, accuracy = metrics["target_accuracy"], metrics["test_accuracy"]
    if target is not None and accuracy < target:
        print_error(
            f"test accuracy: expected at least {target:.2%}, got {accuracy:.2%}",
            f"{PREFIX}error: ",
        )
        return 1
    return 0


def terminate(*_: object) -> NoReturn:
    """End as after Ctrl-C, with events flushed and a checkpoint; handles SIGTERM."""
    raise SystemExit(128 + signal.SIGTERM)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, terminate)
    sys.exit(command_line())
