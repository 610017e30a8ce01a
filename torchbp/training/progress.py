"""What a training run says on the terminal: a bar while it works, a line per epoch."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from torchbp._terminal import duration
from torchbp.training.trainer import EpochResult

__all__ = ["PROGRESS", "JSONLines", "Progress", "Quiet"]

BLOCKS = "▁▂▃▄▅▆▇█"
SHOWN = 8  # epochs in the trend
SHORT = {"validation": "val"}  # a line fits 80 columns


class Progress:
    """A bar on a terminal; plain lines alone where the output goes to a file or a pipe.

    Args:
        epochs: the run's last epoch.
        images: training examples in an epoch.
        done: epochs completed in an earlier sitting.
        stream: where to write; standard output if None.

    Examples:
        >>> from torchbp.training.trainer import Score
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
        """`images` more were trained on; `cost` is the mean cost of their batches."""
        if self.started is None:
            self.started = time.perf_counter()
        if not self.stream.isatty():
            return
        if self.bar is None:
            self._open()
        shown = {"cost": f"{cost:.4f}"}
        if self.costs:
            shown["trend"] = trend(self.costs)
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(images)

    def _open(self) -> None:
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
        """Close the bar and print the line of the epoch that `result` is of."""
        self.close()
        self.done = result.epoch
        scores = result.scores
        if result.running_cost is not None:
            self.costs.append(result.running_cost)
        said = [
            f"{SHORT.get(name, name)} {score.cost:.3f} {score.accuracy:6.2%}"
            for name, score in scores.items()
        ]
        if result.images_per_second:
            said.append(f"{duration(self._left())} left")
        width = len(str(self.epochs))
        line = "  ".join([f"epoch {result.epoch:{width}}/{self.epochs}", *said])
        print(line, file=self.stream, flush=True)

    def _left(self) -> float:
        """Seconds, if the epochs that are left take what those of this sitting took."""
        if self.started is None:
            return 0.0
        spent = time.perf_counter() - self.started
        return spent / (self.done - self.done_before) * (self.epochs - self.done)

    def close(self) -> None:
        """Remove the bar, if there is one."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class Quiet(Progress):
    """Says nothing.

    Examples:
        >>> Quiet(epochs=30, images=50_000).update(10, 0.4)
    """

    def update(self, images: int, cost: float) -> None:
        pass

    def epoch(self, result: EpochResult) -> None:
        pass


class JSONLines(Quiet):
    """One JSON object on a line for each epoch: epoch, cost and accuracy by split,
    running_cost, seconds, images_per_second.

    Examples:
        >>> from torchbp.training.trainer import Score
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
    """The last epochs' costs as a row of blocks, the highest of them full.

    >>> trend([1.0, 0.5, 0.25, 0.0])
    '█▅▃▁'
    """
    shown = costs[-SHOWN:]
    low, high = min(shown), max(shown)
    wide = high - low or 1.0
    return "".join(BLOCKS[round(7 * (C - low) / wide)] for C in shown)
