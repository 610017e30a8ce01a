"""What a training run says on the terminal: a bar while it works, a line per epoch."""

from __future__ import annotations

import sys
from typing import Any

from torchbp.trainer import EpochResult

__all__ = ["Progress"]


class Progress:
    """A bar on a terminal; plain lines alone where the output goes to a file or a pipe.

    Args:
        epochs: the run's last epoch.
        images: training examples in an epoch.
        done: epochs completed in an earlier sitting.
        stream: where to write; standard output if None.
    """

    def __init__(
        self, epochs: int, images: int, done: int = 0, stream: Any = None
    ) -> None:
        self.epochs, self.images = epochs, images
        self.stream = sys.stdout if stream is None else stream
        self.bar: Any = None
        self.done = done
        self.accuracy: float | None = None

    def update(self, images: int, cost: float) -> None:
        """`images` more were trained on; `cost` is the mean cost of their batches."""
        if not self.stream.isatty():
            return
        if self.bar is None:
            self._open()
        shown = {"cost": f"{cost:.4f}"}
        if self.accuracy is not None:
            shown["validation"] = f"{self.accuracy:.2%}"
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
            file=self.stream,
            dynamic_ncols=True,
        )

    def epoch(self, result: EpochResult) -> None:
        """Close the bar and print the epoch's line."""
        self.close()
        self.done = result.epoch
        self.accuracy = result.scores["validation"].accuracy
        scores = "  ".join(
            f"{name} {score.cost:.4f} {score.accuracy:7.2%}"
            for name, score in result.scores.items()
        )
        speed = ""
        if result.images_per_second:
            speed = f"  {result.images_per_second / 1000:.3g}k images/s"
        width = len(str(self.epochs))
        line = f"epoch {result.epoch:{width}}/{self.epochs}  {scores}{speed}"
        print(line, file=self.stream, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
