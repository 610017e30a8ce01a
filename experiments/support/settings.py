"""Settings, recipes and command line of experiments/mnist.py."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import torchbp
from experiments.support.options import (
    DATA_HELP,
    add_options,
    check_choices,
    check_seed,
    option,
)
from torchbp import data
from torchbp._terminal import Parser
from torchbp.explicit import KERNELS
from torchbp.nn import ACTIVATIONS, INITIALISATIONS
from torchbp.training import LEVELS, SCHEDULES

# Each cost and the output layer that fits it: targets are 0 and 1, so a cost that takes
# a needs a sigmoid layer, whatever the hidden layers are.
COSTS = {
    name: (cost, "identity" if cost.takes == "z" else "sigmoid")
    for name, cost in torchbp.costs.COSTS.items()
}
# What takes the steps: our layers' backward passes and torch.optim.SGD, or the whole
# algorithm at once.
ENGINES = ("autograd", "explicit")
OUTPUTS = ("text", "json", "quiet")
INPUTS, CLASSES = 784, 10
LARGEST = torch.finfo(torch.float32).max
MOST_THREADS = 1024

# The settings by which TensorBoard's HPARAMS tab compares runs.
COMPARED = (
    "layers", "engine", "sizes", "activation", "cost", "init", "lr", "batch_size",
    "weight_decay", "schedule", "distort", "train_on", "seed", "dataset",
)  # fmt: skip
# The settings that --resume may change; the others determine the weights.
CHANGEABLE = {
    "checkpoint_every", "data", "device", "engine", "epochs", "kernel", "log_level",
    "output", "page", "target_accuracy",
}  # fmt: skip
# Sets of settings; single options override those of a recipe.
RECIPES: dict[str, dict[str, Any]] = {
    # Chosen by validation scores among trainings of 24 to 60 epochs on 50,000 images.
    "best": {
        "sizes": (784, 800, 800, 10),
        "activation": "relu",
        "cost": "log-likelihood",
        "init": "torch",
        "epochs": 100,
        "batch_size": 128,
        "lr": 0.5,
        "weight_decay": 2e-5,
        "schedule": "cosine",
        "distort": 1.0,
        "train_on": "all",
        "engine": "explicit",
        # A second thread nearly halves the time on idle cores, but multiplies it when
        # another program uses one of them.
        "threads": 1,
        "dataset": "mnist",
    },
}


@dataclass(frozen=True)
class TrainingSettings:
    """One run; the defaults are the book's first network with scaled initialisation.

    Each field is an option of the command line, and its help describes it; `output`,
    "text", "json" or "quiet", is what a session prints.
    """

    dataset: str = option(
        "auto", "auto: MNIST if available, else digits", ("auto", *data.NAMES)
    )
    data: str | None = option(None, DATA_HELP, shown="~/.cache/torchbp")
    sizes: tuple[int, ...] = option((784, 30, 10), "neurons per layer")
    activation: str = option(
        "sigmoid", "activation of the hidden layers", tuple(ACTIVATIONS)
    )
    cost: str = option(
        "quadratic",
        f"cost, with the output layer that fits it; {torchbp.costs.COUNTERPARTS}",
        tuple(COSTS),
    )
    init: str = option("scaled", "initial weights", tuple(INITIALISATIONS))
    epochs: int = option(30, "passes over the training set, in total")
    batch_size: int = option(10, "examples in a mini-batch")
    lr: float = option(3.0, "learning rate")
    weight_decay: float = option(0.0, "λ/n, on weights only")
    schedule: str = option(
        "constant", "learning rate over the epochs", tuple(SCHEDULES)
    )
    distort: float = option(
        0.0, "rotate, stretch, shift and bend the images; 1 is usual"
    )
    train_on: str = option(
        "train", "all: also the validation set's images", ("train", "all")
    )
    seed: int = option(0, "seed of initial weights and batches")
    device: str = option(
        "auto", "auto: CUDA if available", ("auto", "cpu", "cuda", "mps")
    )
    threads: int = option(0, "0: one for batches below 128, else all cores")
    engine: str = option(
        "autograd", "what takes the steps; explicit is faster", ENGINES
    )
    kernel: str = option(
        "auto", "how the explicit engine computes; compiled is faster", KERNELS
    )
    layers: str = option("bp", "hand-written or torch's own", ("bp", "native"))
    logdir: str = option("runs", "folder in which run folders are created")
    log_level: str = option("full", "basic: curves; full: also pictures", LEVELS)
    name: str | None = option(
        None, "name of the run folder", shown="from settings and time"
    )
    target_accuracy: float | None = option(
        None, "0 to 1; exit with 1 if the final test accuracy is lower"
    )
    checkpoint_every: int = option(1, "epochs between checkpoints")
    page: bool = option(False, "write page.html, the trained network, to the run")
    output: str = "text"

    def __post_init__(self) -> None:
        check_choices(self)
        if self.output not in OUTPUTS:
            raise ValueError(
                f"output: expected one of {', '.join(OUTPUTS)}, got {self.output!r}"
            )
        if (self.engine, self.layers) == ("explicit", "native"):
            raise ValueError(
                "engine: expected autograd for native layers, got 'explicit', which "
                "works on hand-written ones"
            )
        if self.kernel == "compiled" and self.engine != "explicit":
            raise ValueError(
                "kernel: expected auto or torch for the autograd engine, got 'compiled'"
            )
        for name in ("epochs", "batch_size", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name}: expected at least 1, got {getattr(self, name)}"
                )
        for name in ("lr", "weight_decay"):
            value = getattr(self, name)
            if not 0 <= value <= LARGEST:
                raise ValueError(
                    f"{name}: expected a number from 0 to {LARGEST:.3g}, got {value}"
                )
        if not 0 <= self.distort <= 4:
            raise ValueError(f"distort: expected 0 (none) to 4, got {self.distort}")
        if self.lr * self.weight_decay > LARGEST:
            raise ValueError(
                f"lr · weight_decay: expected at most {LARGEST:.3g}, got "
                f"{self.lr * self.weight_decay:.3g}"
            )
        if not 0 <= self.threads <= MOST_THREADS:
            raise ValueError(
                f"threads: expected 0 (automatic) to {MOST_THREADS}, got {self.threads}"
            )
        check_seed(self.seed)
        if self.target_accuracy is not None and not 0 <= self.target_accuracy <= 1:
            raise ValueError(
                f"target_accuracy: expected 0 to 1, got {self.target_accuracy}"
            )
        if len(self.sizes) < 2 or min(self.sizes) < 1:
            raise ValueError(
                f"sizes: expected at least two positive integers, got {self.sizes}"
            )
        if (self.sizes[0], self.sizes[-1]) != (INPUTS, CLASSES):
            raise ValueError(
                f"sizes: expected {INPUTS} first (28 x 28 pixels) and {CLASSES} last "
                f"(the classes), got {self.sizes[0]} and {self.sizes[-1]}"
            )


def number_of_threads(settings: TrainingSettings) -> int:
    """Return the number of CPU threads; by default one for batches below 128.

    In small batches a second thread costs more time than it saves, above all when
    another program uses its core. One thread also makes the bits independent of the
    number of cores.
    """
    automatic = 1 if settings.batch_size < 128 else torch.get_num_threads()
    return settings.threads or automatic


def build(settings: TrainingSettings) -> nn.Module:
    """Return the network, on the CPU: a seed gives the same weights on every device."""
    torch.manual_seed(settings.seed)
    model = torchbp.MLP(
        settings.sizes,
        activation=settings.activation,
        output=COSTS[settings.cost][1],
        init=settings.init,
        device="cpu",
        dtype=torch.float32,
    )
    return model if settings.layers == "bp" else torchbp.to_native(model)


def read_settings(state: dict[str, Any]) -> TrainingSettings:
    """Return the settings in the content of a checkpoint or of settings.json."""
    saved = state["settings"]
    return TrainingSettings(**{**saved, "sizes": tuple(saved["sizes"])})


def reconcile(
    run: Path, old: TrainingSettings, done: int, changes: dict[str, Any]
) -> TrainingSettings:
    """Return a run's settings with the allowed changes of a new session.

    Args:
        run: the run's folder.
        old: its settings so far.
        done: the epochs that it has completed.
        changes: the new session's settings.

    Raises:
        ValueError: settings that contradict the run's, each named.
    """
    # The output format belongs to this session, not to the run.
    settings = dataclasses.replace(old, **{"output": "text", "page": False, **changes})
    settings = dataclasses.replace(settings, sizes=tuple(settings.sizes))
    # A run may have been moved since it was started.
    path = run.resolve()
    saved = {**dataclasses.asdict(old), "logdir": str(path.parent), "name": path.name}
    agreed = {
        "dataset": settings.dataset in ("auto", old.dataset),
        "logdir": Path(settings.logdir).resolve() == path.parent,
        "threads": number_of_threads(settings) == number_of_threads(old),
    }
    wrong = [
        f"{name} is {saved[name]!r} in the run and {new!r} now"
        for name in changes
        for new in [getattr(settings, name)]
        if name not in CHANGEABLE and not agreed.get(name, new == saved[name])
    ]
    if wrong:
        raise ValueError(f"resume: expected the settings of {run}: {'; '.join(wrong)}")
    if settings.epochs != old.epochs and settings.schedule != "constant":
        raise ValueError(
            f"epochs: expected the {old.epochs} of {run}, over which its "
            f"{settings.schedule} schedule goes, got {settings.epochs}"
        )
    if settings.epochs < done:
        raise ValueError(
            f"epochs: expected at least the {done} that {run} has completed, "
            f"got {settings.epochs}"
        )
    unchanged = {name: getattr(old, name) for name in agreed}
    return dataclasses.replace(settings, **unchanged, name=old.name)


def parse(doc: str | None, arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Return the options of a command line by name, without those that were omitted.

    Args:
        doc: the program's docstring, which ``--help`` prints around the options.
        arguments: of the command line; those of the process if None.
    """
    parser = Parser(doc, argument_default=argparse.SUPPRESS)
    add_options(parser, TrainingSettings)
    parser.add_argument(
        "--recipe", help="best: the most accurate in ten minutes", choices=RECIPES
    )
    parser.add_argument(
        "--resume", help="run folder to continue, or a checkpoint in it", metavar="RUN"
    )
    formats = parser.add_mutually_exclusive_group()
    for name, help in (
        ("quiet", "print only notes and errors"),
        ("json", "print a JSON object on a line for each epoch, and one for the run"),
    ):
        formats.add_argument(
            f"--{name}", dest="output", action="store_const", const=name, help=help
        )
    options = vars(parser.parse_args(arguments))
    options = {**RECIPES.get(options.pop("recipe", ""), {}), **options}
    if "sizes" in options:
        options["sizes"] = tuple(options["sizes"])
    return options
