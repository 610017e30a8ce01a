"""Settings, run folder, curves, figure and verdict of the experiments."""

from __future__ import annotations

import dataclasses
import importlib
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import torchbp
from experiments.support.options import (
    DATA_HELP,
    check_choices,
    check_seed,
    option,
    run_experiment,
)
from experiments.support.timing import processor
from torchbp import data
from torchbp.training import EventWriter, RunFolder

# The points (step, value) of each tag.
Curves = Mapping[str, Sequence[tuple[int, float]]]


@dataclass(frozen=True, kw_only=True)
class CommonSettings:
    """The settings of every experiment.

    Attributes:
        quick: measure less.
        seed: of the random numbers.
        data: folder with MNIST's files; see :func:`torchbp.data.load`.
        logdir: folder in which run folders are created.
        name: of the run folder; the experiment and the time if None.
    """

    quick: bool = option(False, "measure less")
    seed: int = option(0, "seed of the random numbers")
    data: str | None = option(None, DATA_HELP)
    logdir: str = option("runs", "folder in which run folders are created")
    name: str | None = option(None, "name of the run folder")

    def __post_init__(self) -> None:
        check_choices(self)
        check_seed(self.seed)


@dataclass(frozen=True, kw_only=True)
class ImageSettings(CommonSettings):
    """The settings of experiments that run on any data set.

    Attributes:
        dataset: its name.
    """

    dataset: str = option("mnist", "data set", data.NAMES)


def load(settings: CommonSettings) -> data.Splits:
    """Load the data set of the settings from ``--data``, TORCHBP_DATA or the cache."""
    return data.load(getattr(settings, "dataset", "mnist"), settings.data)


class ExperimentRun:
    """One experiment's run folder; removed again if the experiment fails without
    results.

    Args:
        script: the experiment's name.
        settings: its settings.
    """

    def __init__(self, script: str, settings: CommonSettings) -> None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        name = settings.name or f"{script}_{stamp}"
        self.script = script
        self.folder = RunFolder.create(settings.logdir, name)

    def __enter__(self) -> ExperimentRun:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        if kind is not None and not (self.folder.path / "results.json").exists():
            self.folder.discard()

    def conclude(
        self,
        settings: CommonSettings,
        measured: Mapping[str, Any],
        claims: Mapping[str, bool],
        curves: Curves,
        draw: Callable[[Any], None],
        size: tuple[float, float] = (9, 4),
    ) -> dict[str, Any]:
        """Print which claims the measurements show, write everything, and return the
        content of results.json.

        Args:
            settings: of the experiment.
            measured: figures for results.json.
            claims: whether the measurements show each of them.
            curves: for TensorBoard.
            draw: draws the figure.
            size: of the figure, in inches of 80 dots.
        """
        results = {
            "settings": describe_settings(settings),
            **measured,
            "claims": dict(claims),
            "shown": all(claims.values()),
            "verdict": verdict(claims),
        }
        # Before printing, which fails if the reader of the output has stopped reading.
        self.folder.write(results=results)
        print(f"\n{claim_table(claims)}")
        self.finish(results, curves, draw, size)
        return results

    def finish(
        self,
        results: dict[str, Any],
        curves: Curves,
        draw: Callable[[Any], None],
        size: tuple[float, float],
    ) -> None:
        """Write results.json, TensorBoard's events and the figure; print the verdict.

        Args:
            results: the content of results.json.
            curves: for TensorBoard.
            draw: draws the figure.
            size: of the figure, in inches of 80 dots.
        """
        self.folder.write(results=results)
        write_events(self.folder.path, results, curves)
        write_figure(self.folder.path / f"{self.script}.png", draw, size)
        print(f"\nwritten to {self.folder.path}\n{results['verdict']}")


def write_events(folder: Path, results: dict[str, Any], curves: Curves) -> None:
    """Write the curves and the verdict for TensorBoard.

    Args:
        folder: where the event file is created.
        results: their "verdict" is shown as text.
        curves: shown as scalars.
    """
    with EventWriter(folder) as writer:
        writer.add_text("verdict", results["verdict"], 0)
        for tag, points in curves.items():
            for step, value in points:
                writer.add_scalar(tag.replace(" ", "_"), value, step)


def write_figure(
    path: Path, draw: Callable[[Any], None], size: tuple[float, float]
) -> bool:
    """Write a figure as PNG and return True; without matplotlib, print a line that says
    so and return False.

    Args:
        path: of the PNG.
        draw: draws on a matplotlib figure.
        size: of the figure, in inches of 80 dots.
    """
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ImportError:
        print('\nno figure: matplotlib is not installed (pip install ".[plots]")')
        return False
    # The class, not pyplot: no global state, no display.
    figure = figures.Figure(figsize=size, layout="constrained")
    draw(figure)
    figure.savefig(path, dpi=80)
    return True


def verdict(claims: Mapping[str, bool]) -> str:
    """Return the line that says which of the claims the measurements show."""
    if not claims:
        raise ValueError("claims: expected at least one, got none")
    failed = [claim for claim, holds in claims.items() if not holds]
    if failed:
        return f"verdict: NOT shown: {'; '.join(failed)}"
    return f"verdict: shown ({len(claims)} of {len(claims)} claims)"


def claim_of(doc: str | None) -> str:
    """Return the claims and equations of a script's docstring."""
    _, title, body = (doc or "").partition("The claim")
    return title + body.partition("\nExit status")[0]


def claim_table(claims: Mapping[str, bool]) -> str:
    """Return a line for each claim."""
    return "\n".join(
        f"{'shown    ' if holds else 'NOT shown'}  {claim}"
        for claim, holds in claims.items()
    )


def command_line(
    main: Callable[[Any], dict[str, Any]],
    settings: type[CommonSettings],
    quick: Mapping[str, Any],
    doc: str | None,
) -> Callable[..., int]:
    """Return an experiment's program: it takes the arguments of a command line, those
    of the process if there are none, and returns the exit status, 1 if the claims are
    not all shown.

    Args:
        main: returns results; "shown" tells whether the claims are shown.
        settings: the settings' class.
        quick: the settings that ``--quick`` changes.
        doc: the program's docstring.
    """

    def run(arguments: Sequence[str] | None = None) -> int:
        return run_experiment(
            main, settings, doc, arguments, lambda r: 0 if r["shown"] else 1, quick
        )

    return run


def describe_settings(settings: CommonSettings) -> dict[str, Any]:
    """Return the settings, with versions and processor, for results.json."""
    return {
        **dataclasses.asdict(settings),
        "torchbp": torchbp.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
    }
