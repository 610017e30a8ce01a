"""The run folder of experiments/mnist.py: settings, versions, checkpoints, events."""

from __future__ import annotations

import dataclasses
import platform
import time
from dataclasses import dataclass
from typing import Any

import torch

import torchbp
from experiments.support.settings import (
    COMPARED,
    COSTS,
    TrainingSettings,
    build,
    number_of_threads,
    read_settings,
)
from experiments.support.trainer_setup import (
    check_memory,
    choose_kernel,
    print_note_once,
)
from torchbp import data
from torchbp.inspection import save_page
from torchbp.training import (
    AutogradSGD,
    CheckpointError,
    Dashboard,
    RunFolder,
    Trainer,
    World,
    check_state,
)

PAGE = "page.html"


@dataclass(frozen=True)
class RunLog:
    """Where the process of rank 0 writes a run.

    Attributes:
        folder: of the run.
        dashboard: its TensorBoard events.
        versions: of what the run depends on.
    """

    folder: RunFolder
    dashboard: Dashboard
    versions: dict[str, str]


def open_log(
    folder: RunFolder,
    settings: TrainingSettings,
    world: World,
    trainer: Trainer,
    resumed_at: int | None = None,
) -> RunLog:
    """Write a run's settings and versions to its folder and open its event file.

    Args:
        folder: of the run.
        settings: of the run.
        world: the processes and the device.
        trainer: of the run.
        resumed_at: the epoch from which the run continues; None for a new run.
    """
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
    return RunLog(folder, dashboard, versions)


def describe_versions(
    settings: TrainingSettings, world: World, trainer: Trainer
) -> dict[str, str]:
    """Return the versions, device and threads that are needed to repeat the run."""
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


def create_folder(settings: TrainingSettings) -> RunFolder:
    """Create the run's folder. Without a name it is called after the settings and the
    time: 784-30-10_quadratic_bp_seed0_20260102-030405."""
    if settings.name is not None:
        return RunFolder.create(settings.logdir, settings.name)
    sizes = "-".join(map(str, settings.sizes))[:80]
    stamp = time.strftime("%Y%m%d-%H%M%S")
    kind = settings.layers if settings.engine == "autograd" else settings.engine
    name = f"{sizes}_{settings.cost}_{kind}_seed{settings.seed}_{stamp}"
    for suffix in ("", *(f"-{i}" for i in range(2, 1000))):
        try:
            return RunFolder.create(settings.logdir, name + suffix)
        except ValueError:  # the name of a run that was started in the same second
            continue
    raise ValueError(f"name: expected an unused one, got a thousand folders {name}")


def find_state(folder: RunFolder) -> dict[str, Any]:
    """Return the run's newest intact checkpoint; "trainer" is None for a run that was
    stopped before its first checkpoint.

    Args:
        folder: of the run.

    Raises:
        CheckpointError: no intact checkpoint, or one of another program.
    """
    if folder.never_began:
        state = {"settings": folder.read("settings"), "trainer": None}
        try:
            read_settings(state)
        except (LookupError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{folder.path}: expected a run of this program, got {error}"
            ) from error
        print_note_once(f"{folder.path} has no checkpoint yet: training starts anew")
        return state
    state, failure = folder.load(check_run)
    if failure is not None:
        epoch = state["trainer"]["epoch"]
        print_note_once(f"{failure}; continuing from {folder.previous}, epoch {epoch}")
    return state


def check_run(state: dict[str, Any]) -> None:
    """Raise an exception unless `state` is what a run of this program saves."""
    settings = read_settings(state)
    check_memory(settings, torch.device("cpu"))
    model = build(settings)
    check_state(state["trainer"], model)
    engine = AutogradSGD(model, COSTS[settings.cost][0](), settings.lr)
    engine.load_state_dict(state["trainer"]["engine"])


def write_page(folder: RunFolder, trainer: Trainer) -> bool:
    """Write the trained network's page, with the first ten test images; return whether
    the network is small enough for a page.

    Args:
        folder: of the run.
        trainer: of the run.

    Raises:
        OSError: the page cannot be written.
    """
    split = trainer.data.test
    images, labels = data.scale(split.images[:10]), split.labels[:10]
    model, lr = torchbp.from_native(trainer.model), trainer.engine.lr
    try:
        save_page(folder.path / PAGE, model, trainer.cost, images, labels, lr)
    except OSError as error:
        raise write_error(folder, error) from error
    except ValueError as error:
        print_note_once(f"no page: {error}")
        return False
    return True


def write_error(folder: RunFolder, error: OSError) -> OSError:
    """Return the error that the run cannot be written, with its intact checkpoint."""
    reason = error.strerror or str(error)
    return OSError(
        f"{folder.path}: the run cannot be written: {reason}; {folder.what_is_left()}"
    )
