"""The main job's settings, its recipes, and its command line."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import torchbp
from experiments.support.options import add_options, check_choices, option
from torchbp import data
from torchbp._terminal import Parser
from torchbp.explicit import KERNELS
from torchbp.nn import ACTIVATIONS, INITIALISATIONS
from torchbp.training import LEVELS, SCHEDULES

# The cost, and the output layer that fits: targets are 0 and 1, so a cost that takes a
# wants a sigmoid there, whatever the hidden layers are.
COSTS = {
    name: (cost, "identity" if cost.takes == "z" else "sigmoid")
    for name, cost in torchbp.costs.COSTS.items()
}
# How steps are taken: by our layers' backward passes and torch.optim.SGD, or by the
# whole algorithm at once.
ENGINES = ("autograd", "explicit")
OUTPUTS = ("text", "json", "quiet")
INPUTS, CLASSES = 784, 10
LARGEST = torch.finfo(torch.float32).max
MOST_THREADS = 1024

# The settings that TensorBoard's HPARAMS tab compares runs by.
COMPARED = (
    "layers", "engine", "sizes", "activation", "cost", "init", "lr", "batch_size",
    "weight_decay", "schedule", "distort", "train_on", "seed", "dataset",
)  # fmt: skip
# What --resume may change; the rest decides which weights come out.
CHANGEABLE = {
    "checkpoint_every", "data", "device", "engine", "epochs", "kernel", "log_level",
    "output", "page", "target_accuracy",
}  # fmt: skip
# Settings that go together; what is given beside a recipe wins over it.
RECIPES: dict[str, dict[str, Any]] = {
    # Chosen by validation scores, among 24- to 60-epoch trainings on the 50,000.
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
        # A second one nearly halves the time on idle cores, and multiplies it where
        # another program wants one of them.
        "threads": 1,
        "dataset": "mnist",
    },
}


@dataclass(frozen=True)
class Settings:
    """One run; the defaults are the book's first network with scaled initialisation."""

    dataset: str = option(
        "auto", "auto: MNIST if it can be had, else digits", ("auto", *data.NAMES)
    )
    data: str | None = option(
        None,
        "folder of the files: in it, its raw or MNIST/raw; also TORCHBP_DATA",
        shown="~/.cache/torchbp",
    )
    sizes: tuple[int, ...] = option((784, 30, 10), "neurons per layer")
    activation: str = option("sigmoid", "of the hidden layers", tuple(ACTIVATIONS))
    cost: str = option(
        "quadratic",
        f"sets the output layer that fits it, too; {torchbp.costs.COUNTERPARTS}",
        tuple(COSTS),
    )
    init: str = option("scaled", "initial weights", tuple(INITIALISATIONS))
    epochs: int = option(30, "passes over the training set, in all")
    batch_size: int = option(10, "examples in a mini-batch")
    lr: float = option(3.0, "learning rate")
    weight_decay: float = option(0.0, "λ/n, on weights only")
    schedule: str = option(
        "constant", "of the learning rate over the epochs", tuple(SCHEDULES)
    )
    distort: float = option(0.0, "turn, stretch, shift, bend the images; 1 is usual")
    train_on: str = option(
        "train", "all: on the validation set's images, too", ("train", "all")
    )
    seed: int = option(0, "of initial weights and batches")
    device: str = option(
        "auto", "auto: CUDA if there is one", ("auto", "cpu", "cuda", "mps")
    )
    threads: int = option(0, "0: one for batches below 128, else all cores")
    engine: str = option("autograd", "of the steps; explicit is the fast one", ENGINES)
    kernel: str = option(
        "auto", "of the explicit engine's steps; compiled is the fastest", KERNELS
    )
    layers: str = option("bp", "hand-written, or torch's own", ("bp", "native"))
    logdir: str = option("runs", "where run folders are made")
    log_level: str = option("full", "basic: curves; full: pictures, too", LEVELS)
    name: str | None = option(None, "of the run folder", shown="from settings and time")
    target_accuracy: float | None = option(
        None, "0 to 1; exit with 1 if the test's ends below"
    )
    checkpoint_every: int = option(1, "epochs between checkpoints")
    page: bool = option(False, "write page.html, the trained network, into the run")
    output: str = "text"  # or "json", "quiet": what a session prints

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
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected 0 to 2^63 - 1, got {self.seed}")
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


def number_of_threads(settings: Settings) -> int:
    """The settings' number of CPU threads; one, where they leave it open, below batches
    of 128.

    There a second thread costs more in hand-over than it gains: 3 to 10 % of the speed
    at batch 10, and most of it when another program wants that core. One thread also
    makes the bits independent of the machine's number of cores.
    """
    automatic = 1 if settings.batch_size < 128 else torch.get_num_threads()
    return settings.threads or automatic


def build(settings: Settings) -> nn.Module:
    """The network, on the CPU, so that a seed means the same start on every device."""
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


def read_settings(state: dict[str, Any]) -> Settings:
    """Those that a checkpoint or settings.json holds."""
    saved = state["settings"]
    return Settings(**{**saved, "sizes": tuple(saved["sizes"])})


def reconcile(run: Path, old: Settings, done: int, changes: dict[str, Any]) -> Settings:
    """A run's settings with those of `changes` that may be changed.

    Args:
        run: its folder.
        old: its settings so far.
        done: the epochs that it has completed.
        changes: settings given anew.

    Raises:
        ValueError: settings that contradict the run's, each named.
    """
    # How a sitting speaks is its own business.
    settings = dataclasses.replace(old, **{"output": "text", "page": False, **changes})
    settings = dataclasses.replace(settings, sizes=tuple(settings.sizes))
    # Where the run is now says more than where it began.
    path = run.resolve()
    there = {**dataclasses.asdict(old), "logdir": str(path.parent), "name": path.name}
    agreed = {
        "dataset": settings.dataset in ("auto", old.dataset),
        "logdir": Path(settings.logdir).resolve() == path.parent,
        "threads": number_of_threads(settings) == number_of_threads(old),
    }
    wrong = [
        f"{name} is {there[name]!r} there and {new!r} here"
        for name in changes
        for new in [getattr(settings, name)]
        if name not in CHANGEABLE and not agreed.get(name, new == there[name])
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
    kept = {name: getattr(old, name) for name in agreed}
    return dataclasses.replace(settings, **kept, name=old.name)


def parse(doc: str | None, arguments: list[str] | None = None) -> dict[str, Any]:
    """The options that were given, by name; those that were not are absent.

    Args:
        doc: the program's docstring: what ``--help`` says around the options.
        arguments: of the command line.
    """
    parser = Parser(doc, argument_default=argparse.SUPPRESS)
    add_options(parser, Settings)
    add = parser.add_argument
    add("--recipe", help="best: the most accurate in ten minutes", choices=RECIPES)
    add(
        "--resume",
        help="run folder to go on with, or a checkpoint in it",
        metavar="RUN",
    )
    said = parser.add_mutually_exclusive_group()
    said.add_argument(
        "--quiet",
        dest="output",
        action="store_const",
        const="quiet",
        help="only notes and errors",
    )
    said.add_argument(
        "--json", dest="output", action="store_const", const="json",
        help="a JSON object on a line for each epoch, and one for the run",
    )  # fmt: skip
    given = vars(parser.parse_args(arguments))
    given = {**RECIPES.get(given.pop("recipe", ""), {}), **given}
    if "sizes" in given:
        given["sizes"] = tuple(given["sizes"])
    return given
