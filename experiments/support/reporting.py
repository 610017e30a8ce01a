"""What the experiments share: settings, a run folder, curves, a figure, a verdict."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

import torchbp
from experiments.support.options import add_options, check_choices, option
from experiments.support.timing import processor
from torchbp import _terminal, data
from torchbp.training import EventWriter, RunFolder

MOST = 1_000_000
# Tag: its points (step, value).
Curves = Mapping[str, Sequence[tuple[int, float]]]


@dataclass(frozen=True, kw_only=True)
class Common:
    """The settings of every experiment."""

    quick: bool = option(False, "a small version")
    seed: int = option(0, "of the random numbers")
    data: str | None = option(
        None, "folder of MNIST: in it, its raw or MNIST/raw; also TORCHBP_DATA"
    )
    logdir: str = option("runs", "where run folders are made")
    name: str | None = option(None, "of the run folder")

    def __post_init__(self) -> None:
        check_choices(self)
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected 0 to 2^63 - 1, got {self.seed}")


@dataclass(frozen=True, kw_only=True)
class OnImages(Common):
    """The settings of those that any data set will do for."""

    dataset: str = option("mnist", "which images", data.NAMES)


def at_least(settings: Any, **least: float) -> None:
    """Raise ValueError unless each named setting is a finite number of that size, and
    none counts more than MOST things."""
    for name, bound in least.items():
        value = getattr(settings, name)
        if isinstance(value, int) and value > MOST:  # which no float may hold
            raise ValueError(f"{name}: expected at most {MOST:,}, got a larger number")
        if not (math.isfinite(value) and value >= bound):
            raise ValueError(f"{name}: expected at least {bound}, got {value}")


def load(settings: Common) -> data.Splits:
    """The data set, from ``--data``, TORCHBP_DATA or where a download puts it."""
    return data.load(getattr(settings, "dataset", "mnist"), settings.data)


class Report:
    """One experiment's run folder, which is there once there is something to say.

    Args:
        script: the experiment's name.
        settings: its settings.
    """

    def __init__(self, script: str, settings: Common) -> None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        name = settings.name or f"{script}_{stamp}"
        self.script = script
        self.folder = RunFolder.create(settings.logdir, name)

    def __enter__(self) -> Report:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        """Without results the folder of a run that failed is of no use."""
        if kind is not None and not (self.folder.path / "results.json").exists():
            self.folder.discard()

    def conclude(
        self,
        settings: Common,
        measured: Mapping[str, Any],
        claims: Mapping[str, bool],
        curves: Curves,
        draw: Callable[[Any], None],
        size: tuple[float, float] = (9, 4),
    ) -> dict[str, Any]:
        """Print which claims the measurements show, write everything, and return what
        is in results.json: `measured` among it."""
        results = {
            "settings": plain(settings),
            **measured,
            "claims": dict(claims),
            "shown": all(claims.values()),
            "verdict": verdict(claims),
        }
        # Before anything is printed: whoever reads may have left.
        self.folder.write(results=results)
        print(f"\n{table_of(claims)}")
        self.finish(results, curves, draw, size)
        return results

    def finish(
        self,
        results: dict[str, Any],
        curves: Curves,
        draw: Callable[[Any], None],
        size: tuple[float, float],
    ) -> None:
        """Write results.json, the events and what `draw` draws on a figure of `size`
        inches, 80 dots each; the verdict comes last."""
        self.folder.write(results=results)
        write_events(self.folder.path, results, curves)
        write_figure(self.folder.path / f"{self.script}.png", draw, size)
        print(f"\nwritten to {self.folder.path}\n{results['verdict']}")


def write_events(folder: Path, results: dict[str, Any], curves: Curves) -> None:
    """The curves for TensorBoard, and the verdict as text."""
    with EventWriter(folder) as writer:
        writer.add_text("verdict", results["verdict"], 0)
        for tag, points in curves.items():
            for step, value in points:
                writer.add_scalar(tag.replace(" ", "_"), value, step)


def write_figure(
    path: Path, draw: Callable[[Any], None], size: tuple[float, float]
) -> bool:
    """A PNG, where matplotlib is installed; otherwise a line that says so."""
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
    """The line that says which claims the measurements show."""
    if not claims:
        raise ValueError("claims: expected at least one, got none")
    failed = [claim for claim, holds in claims.items() if not holds]
    if failed:
        return f"verdict: NOT shown: {'; '.join(failed)}"
    return f"verdict: shown ({len(claims)} of {len(claims)} claims)"


def stated(doc: str | None) -> str:
    """The claims and their equations, as the script's docstring states them."""
    _, title, body = (doc or "").partition("The claim")
    return title + body.partition("\nExit status")[0]


def table_of(claims: Mapping[str, bool]) -> str:
    """A line for each claim."""
    return "\n".join(
        f"{'shown    ' if holds else 'NOT shown'}  {claim}"
        for claim, holds in claims.items()
    )


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the straight line through the points, by least squares."""
    mx, my = statistics.fmean(x), statistics.fmean(y)
    covariance = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mx) ** 2 for a in x)


S = TypeVar("S", bound=Common)


def run(
    main: Callable[[S], dict[str, Any]],
    settings: type[S],
    quick: Mapping[str, Any],
    doc: str | None,
    arguments: list[str] | None,
) -> int:
    """The shell around an experiment's ``main``; returns the exit status.

    Args:
        main: returns its results; their "shown" says whether the claims are.
        settings: its settings' class.
        quick: settings that ``--quick`` changes, unless they are given themselves.
        doc: the program's docstring: what ``--help`` says around the options.
        arguments: of the command line.
    """
    parser = _terminal.Parser(doc or "", argument_default=argparse.SUPPRESS)
    add_options(parser, settings)
    try:
        given = vars(parser.parse_args(arguments))
    except SystemExit as error:
        return int(error.code or 0)
    defaults = quick if given.get("quick") else {}
    try:
        results = main(settings(**{**defaults, **given}))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return _terminal.reader_left()
    except (ValueError, OSError, ImportError, data.DataError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0 if results["shown"] else 1


def plain(settings: Common) -> dict[str, Any]:
    """The settings for results.json, with what they were run on."""
    return {
        **dataclasses.asdict(settings),
        "torchbp": torchbp.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
    }
