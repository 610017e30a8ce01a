"""A run's output on the terminal: a bar within an epoch, a line for each epoch."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from torchbp._terminal import duration
from torchbp.training.trainer import EpochResult

__all__ = ["PROGRESS", "JSONLines", "Progress", "Quiet"]

BLOCKS = "▁▂▃▄▅▆▇█"
TREND_EPOCHS = 8
SHORT = {"validation": "val"}  # so that a line fits 80 columns


class Progress:
    """Prints a line for each epoch and, on a terminal, a bar within it.

    Args:
        epochs: the run's last epoch.
        images: training examples in an epoch.
        done: epochs completed in earlier sessions.
        stream: where to write; standard output if None.

    Examples:
        >>> from torchbp.training import Score
        >>> progress = Progress(epochs=30, images=50_000)
        >>> scores = {"test": Score(cost=0.4, accuracy=0.1)}
        >>> progress.epoch(EpochResult(0, scores, None, 0.0, 0.0))
        epoch  0/30  test 0.400 10.00%
    """

    def __init__(
        self, epochs: int, images: int, done: int = 0, stream: Any = None
    ) -> None:
        self.epochs, self.images = epochs, images
        self.stream = sys.stdout if stream is None else stream
        self.bar: Any = None
        self.done = self.done_before = done
        self.costs: list[float] = []
        self.started: float | None = None

    def update(self, images: int, cost: float) -> None:
        """Advance the bar.

        Args:
            images: the number of images trained on since the last call.
            cost: the mean cost of their mini-batches.
        """
        if self.started is None:
            self.started = time.perf_counter()
        if not self.stream.isatty():
            return
        if self.bar is None:
            self._open()
        figures = {"cost": f"{cost:.4f}"}
        if self.costs:
            figures["trend"] = trend(self.costs)
        self.bar.set_postfix(figures, refresh=False)
        self.bar.update(images)

    def _open(self) -> None:
        """Show a new bar."""
        from tqdm import tqdm

        self.bar = tqdm(
            total=self.images,
            desc=f"epoch {self.done + 1}/{self.epochs}",
            unit=" images",
            unit_scale=True,
            leave=False,
            bar_format="{desc} {percentage:3.0f}% |{bar}| {rate_fmt}{postfix}",
            file=self.stream,
            dynamic_ncols=True,
        )

    def epoch(self, result: EpochResult) -> None:
        """Close the bar and print the epoch's line.

        Args:
            result: of the epoch.
        """
        self.close()
        self.done = result.epoch
        scores = result.scores
        if result.running_cost is not None:
            self.costs.append(result.running_cost)
        parts = [
            f"{SHORT.get(name, name)} {score.cost:.3f} {score.accuracy:6.2%}"
            for name, score in scores.items()
        ]
        if result.images_per_second:
            parts.append(f"{duration(self._left())} left")
        width = len(str(self.epochs))
        line = "  ".join([f"epoch {result.epoch:{width}}/{self.epochs}", *parts])
        print(line, file=self.stream, flush=True)

    def _left(self) -> float:
        """Return the seconds to the end of the run, at this session's pace."""
        if self.started is None:
            return 0.0
        spent = time.perf_counter() - self.started
        return spent / (self.done - self.done_before) * (self.epochs - self.done)

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class Quiet(Progress):
    """Prints nothing.

    Examples:
        >>> Quiet(epochs=30, images=50_000).update(10, 0.4)
    """

    def update(self, images: int, cost: float) -> None:
        pass

    def epoch(self, result: EpochResult) -> None:
        pass


class JSONLines(Quiet):
    """Prints a JSON object for each epoch, on one line: epoch, cost and accuracy by
    split, running_cost, seconds, images_per_second.

    Examples:
        >>> from torchbp.training import Score
        >>> progress = JSONLines(epochs=30, images=50_000)
        >>> progress.epoch(EpochResult(0, {"test": Score(0.4, 0.1)}, None, 0.0, 0.0))
        ... # doctest: +NORMALIZE_WHITESPACE
        {"epoch": 0, "cost": {"test": 0.4}, "accuracy": {"test": 0.1},
         "running_cost": null, "seconds": 0.0, "images_per_second": 0.0}
    """

    def epoch(self, result: EpochResult) -> None:
        content = {
            "epoch": result.epoch,
            "cost": {name: score.cost for name, score in result.scores.items()},
            "accuracy": {name: s.accuracy for name, s in result.scores.items()},
            "running_cost": result.running_cost,
            "seconds": result.seconds,
            "images_per_second": result.images_per_second,
        }
        print(json.dumps(content), file=self.stream, flush=True)


PROGRESS: dict[str, type[Progress]] = {
    "text": Progress,
    "json": JSONLines,
    "quiet": Quiet,
}


def trend(costs: list[float]) -> str:
    """Return the last epochs' costs as a row of blocks, the highest a full block.

    Args:
        costs: of all epochs.

    >>> trend([1.0, 0.5, 0.25, 0.0])
    '█▅▃▁'
    """
    recent = costs[-TREND_EPOCHS:]
    low = min(recent)
    span = max(recent) - low or 1.0
    return "".join(BLOCKS[round(7 * (C - low) / span)] for C in recent)
