"""From the settings of experiments/mnist.py to a trainer: data, network, engine."""

from __future__ import annotations

import dataclasses
import itertools
import os
from functools import partial

import torch

import torchbp
from experiments.support.settings import COSTS, TrainingSettings, build
from torchbp import data
from torchbp._terminal import print_note
from torchbp.data import distort
from torchbp.training import (
    EVALUATE_AT_ONCE,
    SCHEDULES,
    AutogradSGD,
    Engine,
    ParallelSGD,
    Trainer,
    World,
)

PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
RANK = 0 if PROCESSES == 1 else int(os.environ["RANK"])


def print_note_once(message: str) -> None:
    """Print a note, by the first of the processes only."""
    if RANK == 0:
        print_note(message)


def load_data(settings: TrainingSettings) -> tuple[data.Splits, TrainingSettings]:
    """Load the data set; return it and the settings with its name instead of "auto"."""
    name, root = settings.dataset, settings.data
    if name != "auto":
        return data.load(name, root), settings
    try:
        name, splits = "mnist", data.load("mnist", root)
    except data.DataError as error:
        if data.find("mnist", root):
            raise  # damaged files must not go unnoticed
        name, splits = "digits", data.load("digits")
        print_note_once(f"MNIST is not available: {error}")
        print_note_once(
            "training on scikit-learn's 1,797 digits instead; their accuracy is NOT "
            "comparable with MNIST's."
        )
    return splits, dataclasses.replace(settings, dataset=name)


def make_trainer(
    settings: TrainingSettings, splits: data.Splits, world: World
) -> Trainer:
    """Return a trainer of a new network on the device.

    Args:
        settings: of the run.
        splits: the data set.
        world: the processes and the device.

    Raises:
        ValueError: the network does not fit into memory, or several processes with the
            explicit engine.
    """
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
        partial(learning_rate, settings),
        partial(distort, strength=settings.distort) if settings.distort else None,
    )


def check_memory(settings: TrainingSettings, device: torch.device) -> None:
    """Raise ValueError if this machine or its GPU cannot hold the network: systems that
    overcommit memory would kill the program without a message."""
    if device.type == "cuda":
        available = torch.cuda.get_device_properties(device).total_memory
    elif {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= getattr(os, "sysconf_names", {}).keys():
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
    pairs = itertools.pairwise(settings.sizes)
    weights = sum(n_out * (n_in + 1) for n_in, n_out in pairs)
    rows = max(min(settings.batch_size, 60_000), EVALUATE_AT_ONCE)
    activations = rows * sum(settings.sizes)
    # In numbers of four bytes: weights, their gradients or copies, and activations.
    needed = 4 * (2 * weights + activations)
    if needed > available:
        raise ValueError(
            f"sizes: expected a network that fits into {available // 10**9} GB of "
            f"memory, got {settings.sizes}, which needs {needed // 10**9} GB"
        )


def learning_rate(settings: TrainingSettings, epoch: int) -> float:
    """Return η after a number of completed epochs."""
    return settings.lr * SCHEDULES[settings.schedule](epoch / settings.epochs)


def choose_kernel(trainer: Trainer) -> str | None:
    """Return how the explicit engine computes; None for another engine."""
    if not isinstance(trainer.engine, torchbp.ExplicitSGD):
        return None
    return trainer.engine.choose_kernel(trainer.data.train.images, trainer.batch_size)
