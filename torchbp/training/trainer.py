"""Training by epochs: the trainer draws the mini-batches, checks the costs, evaluates,
and reports; an engine takes the steps."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torchbp._checks import explain_memory
from torchbp.data import Split, Splits
from torchbp.nn import check_takes
from torchbp.training.engines import Engine, count_outputs
from torchbp.training.scores import Score, evaluate
from torchbp.training.state import (
    check_state,
    generator_states,
    set_generator_states,
)

__all__ = ["SCHEDULES", "DivergedError", "EpochResult", "Trainer"]

READ_EVERY = 0.05  # seconds between two readings of an epoch's costs
# The training score is that of as many images as the test set usually has.
TRAIN_SCORED = 10_000
# The factor of the learning rate, as a function of the share of completed epochs.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}


class DivergedError(RuntimeError):
    """The cost or a parameter is NaN or infinite; the message names the epoch, the step
    where there is one, the learning rate, and the parameters that are not finite.

    Examples:
        >>> raise DivergedError("the cost became nan in epoch 1, step 3, at lr 9")
        ... # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        torchbp.training.trainer.DivergedError: ... in epoch 1, step 3, at lr 9
    """


@dataclass(frozen=True)
class EpochResult:
    """The results of one epoch.

    Attributes:
        epoch: 1 for the first; 0 stands for the untrained network.
        scores: of "train" (its first 10,000 images), of "validation" unless it is
            empty, and of "test".
        running_cost: the mean cost of the examples, each in its mini-batch before the
            update; None for epoch 0.
        seconds: the time of the training steps and of varying the images.
        images_per_second: training examples per second of that time.
        costs: of the epoch's mini-batches in their order, each before its update; empty
            for epoch 0.

    Examples:
        >>> scores = {"test": Score(cost=0.03, accuracy=0.9574)}
        >>> EpochResult(30, scores, 0.02, 2.0, 25_000.0).scores["test"].accuracy
        0.9574
    """

    epoch: int
    scores: dict[str, Score]
    running_cost: float | None
    seconds: float
    images_per_second: float
    costs: Sequence[float] = field(default=(), repr=False)


def _check_split(name: str, split: Split) -> None:
    """Raise an error unless images and labels are dense, with one label an image."""
    images, labels = split
    for part, t in zip(split._fields, split, strict=True):
        if (reason := explain_memory(f"{name} {part}", t)) is not None:
            raise reason
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"{name} labels: expected integers, got {labels.dtype}")
    if labels.dim() != 1 or len(labels) != len(images):
        raise ValueError(
            f"{name} labels: expected shape ({len(images)},) for so many images, "
            f"got {tuple(labels.shape)}"
        )


def _read_in_groups(steps: Iterable[Tensor]) -> Iterator[list[float]]:
    """Yield the costs of `steps` in groups. A read waits for the device, so that
    reading each cost by itself would be slow."""
    waiting: list[Tensor] = []
    read_at = time.perf_counter()
    for costs in steps:
        waiting.append(costs)
        if time.perf_counter() - read_at >= READ_EVERY:
            yield torch.cat(waiting).tolist()
            waiting.clear()
            read_at = time.perf_counter()
    if waiting:
        yield torch.cat(waiting).tolist()


class Trainer:
    """Trains a model by an engine's steps, epoch after epoch.

    Args:
        model: the network, on its device.
        engine: takes the steps, on the same `model`.
        cost: the engine's cost, for the scores.
        data: on the model's device. An empty validation split has no score, and the
            training no best epoch.
        batch_size: m.
        seed: of the order of the examples, which is drawn anew for each epoch.
        schedule: returns an epoch's η, given the number of complete epochs; if None,
            the engine's η does not change.
        vary: returns an epoch's images, given the training images and a random number
            generator, e.g. :func:`torchbp.data.distort`.

    Attributes:
        epoch: the number of complete epochs.
        best: (epoch, validation accuracy, test accuracy) of the first epoch with the
            best validation accuracy so far; None before the first epoch.

    Raises:
        ValueError: a batch size below 1 or above the size of the training set, an empty
            training or test set, or images or labels that do not fit the model.

    Examples:
        >>> import torchbp
        >>> from torchbp import data
        >>> _ = torch.manual_seed(0)
        >>> model, cost = torchbp.MLP([784, 10]), torchbp.QuadraticCost()
        >>> engine = torchbp.ExplicitSGD(model, cost, lr=1.0)
        >>> trainer = Trainer(model, engine, cost, data.load("digits"), batch_size=10)
        >>> trainer.fit(epochs=3)
        >>> trainer.epoch, trainer.score()["test"].accuracy > 0.8
        (3, True)
    """

    def __init__(
        self,
        model: nn.Module,
        engine: Engine,
        cost: Any,
        data: Splits,
        batch_size: int,
        seed: int = 0,
        schedule: Callable[[int], float] | None = None,
        vary: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    ) -> None:
        check_takes(model, cost)
        for name, split in zip(data._fields, data, strict=True):
            _check_split(name, split)
        n = len(data.train.labels)
        if not n:
            raise ValueError("train: expected at least one example, got none")
        if not 1 <= batch_size <= n:
            raise ValueError(
                f"batch_size: expected 1 to {n}, the size of the training set, "
                f"got {batch_size}"
            )
        self.model, self.engine, self.cost, self.data = model, engine, cost, data
        self.batch_size = batch_size
        self.schedule, self.vary = schedule, vary
        self.epoch = 0
        self.best: tuple[int, float, float] | None = None
        # On the CPU, so that a seed gives the same batches on every device.
        self.generator = torch.Generator("cpu").manual_seed(seed)
        self._check_data()
        self.scored = {
            "train": Split(*(t[:TRAIN_SCORED] for t in data.train)),
            "validation": data.validation,
            "test": data.test,
        }
        if not len(data.validation.labels):
            del self.scored["validation"]

    def _check_data(self) -> None:
        """Raise ValueError unless the data fit the model."""
        outputs = count_outputs(self.model, self.data.train.images)
        for name, split in zip(self.data._fields, self.data, strict=True):
            if name == "validation" and not len(split.labels):
                continue
            if not len(split.labels):
                raise ValueError(f"{name}: expected at least one example, got none")
            labels = split.labels.long()
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= outputs:
                raise ValueError(
                    f"{name} labels: expected 0..{outputs - 1} for {outputs} outputs, "
                    f"got {low}..{high}"
                )

    def score(self) -> dict[str, Score]:
        """Return the model's score on each of the splits, by name."""
        return {
            name: evaluate(self.model, self.cost, split)
            for name, split in self.scored.items()
        }

    def run_epoch(
        self, on_progress: Callable[[int, float], None] | None = None
    ) -> EpochResult:
        """Train on every example once, and return the results.

        Args:
            on_progress: called several times a second with the number of images trained
                on since the last call and the mean cost of their mini-batches.

        Raises:
            DivergedError: the cost, or a parameter before or after the epoch, is NaN or
                infinite.
        """
        self._check_start()
        images, labels = self.data.train
        n, m = len(labels), self.batch_size
        order = torch.randperm(n, generator=self.generator, device="cpu")
        order = order.to(labels.device)
        if self.schedule is not None:
            self.engine.lr = self.schedule(self.epoch)
        started = time.perf_counter()
        if self.vary is not None:
            images = self.vary(images, self.generator)
        try:
            with closing(self.engine.steps(images, labels, order, m)) as steps:
                costs = self._take_costs(steps, on_progress)
        except DivergedError as error:  # closing `steps` has updated the model
            bad = self._not_finite()
            parameters = f"; parameters not finite: {bad}" if bad else ""
            raise DivergedError(f"{error}{parameters}") from None
        seconds = time.perf_counter() - started
        self.epoch += 1
        scores = self.score()
        self._check_healthy(scores)
        last = n - (len(costs) - 1) * m  # examples in the last mini-batch
        mean = (math.fsum(costs[:-1]) * m + costs[-1] * last) / n
        result = EpochResult(self.epoch, scores, mean, seconds, n / seconds, costs)
        self._update_best(result)
        return result

    def _take_costs(
        self,
        steps: Iterable[Tensor],
        on_progress: Callable[[int, float], None] | None,
    ) -> list[float]:
        """Take an epoch's `steps` and return their costs; raise DivergedError unless
        all are finite."""
        costs: list[float] = []
        n, m = len(self.data.train.labels), self.batch_size
        for values in _read_in_groups(steps):
            self._check_finite(values, len(costs))
            before = len(costs) * m
            costs += values
            if on_progress is not None:
                images = min(len(costs) * m, n) - before
                on_progress(images, sum(values) / len(values))
        return costs

    def fit(
        self,
        epochs: int,
        on_epoch: Callable[[EpochResult], None] | None = None,
        on_progress: Callable[[int, float], None] | None = None,
        save: Callable[[dict[str, Any]], None] | None = None,
        save_every: int = 1,
    ) -> None:
        """Train until `epochs` epochs are complete.

        Args:
            epochs: the total, including those of earlier sessions.
            on_epoch: called after every epoch, and before the first with the scores of
                the untrained network.
            on_progress: see :meth:`run_epoch`.
            save: called with :meth:`state_dict` at the start, every `save_every` epochs
                and after the last one. If anything stops the training, Ctrl-C included,
                it is called with the state after the last complete epoch.
            save_every: epochs between two calls of `save`.

        Raises:
            DivergedError: see :meth:`run_epoch`.
        """
        if self.epoch < epochs:
            self._check_start()
        state, saved_at = self.state_dict(), self.epoch if self.epoch else None
        try:
            if self.epoch == 0 and on_epoch is not None:
                on_epoch(EpochResult(0, self.score(), None, 0.0, 0.0))
            if self.epoch == 0 and save is not None:
                save(state)  # so that the run can be resumed from the start
                saved_at = 0
            while self.epoch < epochs:
                result = self.run_epoch(on_progress)
                # The log before the state: a run that is killed in between repeats the
                # epoch and replaces its points. The other order would lose them.
                if on_epoch is not None:
                    on_epoch(result)
                state = self.state_dict()
                is_due = self.epoch % save_every == 0 or self.epoch == epochs
                if save is not None and is_due:
                    save(state)
                    saved_at = self.epoch
        except BaseException:
            if save is not None and saved_at != state["epoch"]:
                save(state)
            raise

    def _not_finite(self) -> str:
        """Return the names of the first few parameters that are not finite."""
        named = self.model.named_parameters()
        bad = [name for name, p in named if not p.isfinite().all()]
        more = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
        return ", ".join(bad[:4]) + more

    def _check_start(self) -> None:
        """Raise DivergedError, without advice on the rate, unless all parameters are
        finite."""
        if bad := self._not_finite():
            raise DivergedError(
                f"expected finite parameters before epoch {self.epoch + 1}, got NaN or "
                f"infinity in {bad}"
            )

    def _check_finite(self, values: list[float], step: int) -> None:
        """Raise DivergedError unless the costs after `step` are finite."""
        for i, value in enumerate(values):
            if not math.isfinite(value):
                raise DivergedError(
                    f"the cost became {value} in epoch {self.epoch + 1}, step "
                    f"{step + i + 1}, at lr {self.engine.lr:g}: try a smaller one"
                )

    def _check_healthy(self, scores: dict[str, Score]) -> None:
        """Raise DivergedError unless scores and parameters are finite after an
        epoch."""
        bad = [
            f"{name} cost" for name, s in scores.items() if not math.isfinite(s.cost)
        ]
        if parameters := self._not_finite():
            bad.append(parameters)
        if bad:
            raise DivergedError(
                f"not finite after epoch {self.epoch}: {', '.join(bad)}, at lr "
                f"{self.engine.lr:g}: try a smaller one"
            )

    def _update_best(self, result: EpochResult) -> None:
        """Set `best` if the epoch's validation accuracy is the best so far."""
        if "validation" not in result.scores:
            return
        accuracy = result.scores["validation"].accuracy
        if self.best is None or accuracy > self.best[1]:
            self.best = (result.epoch, accuracy, result.scores["test"].accuracy)

    @property
    def step(self) -> int:
        """The number of steps of all complete epochs."""
        return self.epoch * self.steps_per_epoch

    @property
    def steps_per_epoch(self) -> int:
        """The number of mini-batches in an epoch, the smaller last one included."""
        return math.ceil(len(self.data.train.labels) / self.batch_size)

    @property
    def device(self) -> torch.device:
        """The device of the data and the model."""
        return self.data.train.labels.device

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state on which the next epochs depend; call it between
        epochs."""
        return {
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
            "model": {k: v.clone() for k, v in self.model.state_dict().items()},
            "engine": copy.deepcopy(self.engine.state_dict()),
            "generator": self.generator.get_state(),
            "torch_generators": generator_states(self.device),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state` of :meth:`state_dict`: bit by bit as without a break,
        on the same kind of device.

        Args:
            state: of a trainer of the same network, data and batch size.

        Raises:
            ValueError, TypeError, LookupError, RuntimeError: `state` is not such a
                state; the trainer has not changed.
        """
        check_state(state, self.model)
        step = state["epoch"] * self.steps_per_epoch
        if state.get("step", step) != step:
            raise ValueError(
                f"step: expected {step} after {state['epoch']} epochs, "
                f"got {state['step']!r}"
            )
        self.engine.load_state_dict(state["engine"])
        self.model.load_state_dict(state["model"])
        self.generator.set_state(state["generator"].cpu())
        self.epoch = state["epoch"]
        self.best = None if state["best"] is None else tuple(state["best"])
        set_generator_states(state.get("torch_generators", {}), self.device)
