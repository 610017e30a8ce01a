"""Epochs over anything that takes a step, with everything that surrounds the steps.

The trainer draws the mini-batches, watches the cost, evaluates, and says what happened;
how a step is taken is the engine's business. The engine of this module is
:class:`AutogradSGD`: our layers (or native ones), a backward pass, ``torch.optim.SGD``.
:class:`torchbp.ExplicitSGD` is another.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from torchbp._checks import explain_memory
from torchbp.costs import check, target_rows
from torchbp.data import Split, Splits, scale
from torchbp.explicit import Rates, summing_dtype
from torchbp.inspection import evaluating
from torchbp.nn import check_takes
from torchbp.training.state import (
    check_state,
    generator_states,
    set_generator_states,
)

__all__ = [
    "SCHEDULES",
    "AutogradSGD",
    "DivergedError",
    "Engine",
    "EpochResult",
    "Score",
    "Trainer",
    "batches",
    "check_state",
    "choose_device",
    "count_outputs",
    "cpu_threads",
    "evaluate",
]

# Batches that are gathered and scaled in one go: at 10 images of 784 numbers this takes
# 2.4 µs a batch, where indexing for each batch takes 15.
BATCHES_AT_ONCE = 50
EVALUATE_AT_ONCE = 2000
LOOK_EVERY = 0.05  # seconds between looks at the costs of an epoch
# The training set's score is that of its first images, so that it costs what the test
# set's costs.
TRAIN_SCORED = 10_000
# What the learning rate is multiplied by, after a share of the epochs.
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


class Engine(Protocol):
    """Whatever takes steps: updates its model's parameters, mini-batch by mini-batch.

    Once a generator that `steps` returned is exhausted or closed, the model's own
    parameters are up to date.

    Attributes:
        lr: η; it may be changed between steps.

    Examples:
        >>> import torchbp
        >>> model, cost = torchbp.MLP([784, 30, 10]), torchbp.QuadraticCost()
        >>> images = torch.randint(256, (20, 784), dtype=torch.uint8)
        >>> for make in (AutogradSGD, torchbp.ExplicitSGD):
        ...     engine: Engine = make(model, cost, lr=0.1)
        ...     steps = engine.steps(images, torch.arange(20) % 10, torch.arange(20), 8)
        ...     print(len(torch.cat(list(steps))))
        3
        3
    """

    lr: float

    def steps(
        self, images: Tensor, labels: Tensor, order: Tensor, batch_size: int
    ) -> Generator[Tensor, None, None]:
        """One update for each mini-batch of the examples `order`.

        Args:
            images: uint8 (n, n_in).
            labels: integers (n), of any dtype but bool.
            order: indices of examples.
            batch_size: m; the last mini-batch has what is left.

        Yields:
            the mini-batches' costs before their updates, a few at a time, 1-d,
            detached.
        """

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs to go on, as a checkpoint keeps it."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the `state` of :meth:`state_dict`."""


class AutogradSGD:
    """W ← W - η ∂C/∂W by ``torch.optim.SGD``, the gradients by a backward pass.

    Args:
        model: the network.
        cost: one of ours, e.g. ``torchbp.QuadraticCost()``.
        lr: η.
        weight_decay: λ/n of the book: on weights (2-D parameters), not on biases.

    Raises:
        ValueError: a negative or non-finite lr or weight decay, or a cost that takes z
            on a network that gives a.

    Attributes:
        model, cost, weight_decay: as given.
        optimizer: the ``torch.optim.SGD`` behind it.

    Examples:
        >>> import torchbp
        >>> _ = torch.manual_seed(0)
        >>> model, cost = torchbp.MLP([4, 3, 2]), torchbp.QuadraticCost()
        >>> engine = AutogradSGD(model, cost, lr=1.0)
        >>> x, y = torch.rand(10, 4), torch.tensor([[1.0, 0.0]]).expand(10, 2)
        >>> costs = [engine.step(x, y).item() for _ in range(20)]
        >>> costs[-1] < costs[0]
        True
    """

    def __init__(
        self, model: nn.Module, cost: Any, lr: float, weight_decay: float = 0.0
    ) -> None:
        check_takes(model, cost)
        self.model, self.cost = model, cost
        self._set_rates(Rates(lr, weight_decay))

    def _set_rates(self, rates: Rates) -> None:
        rates.check_dtype(self.model)
        self.weight_decay = rates.weight_decay
        groups: list[dict[str, Any]] = [{"params": list(self.model.parameters())}]
        if rates.weight_decay:
            weights = [p for p in self.model.parameters() if p.dim() > 1]
            biases = [p for p in self.model.parameters() if p.dim() <= 1]
            groups = [
                {"params": weights, "weight_decay": rates.weight_decay},
                {"params": biases},
            ]
        self.optimizer = torch.optim.SGD(groups, lr=rates.lr)

    @property
    def lr(self) -> float:
        """η; it may be changed between steps."""
        return float(self.optimizer.param_groups[0]["lr"])

    @lr.setter
    def lr(self, value: float) -> None:
        Rates(value, self.weight_decay).check_dtype(self.model)
        for group in self.optimizer.param_groups:
            group["lr"] = value

    def step(self, input: Tensor, target: Tensor) -> Tensor:
        """One update; returns the mini-batch's cost before it, 0-d, detached.

        Args:
            input: (m, n_in).
            target: as the cost takes it.
        """
        self.optimizer.zero_grad()
        C: Tensor = self.cost(self.model(input), target)
        C.backward()
        self.optimizer.step()
        return C.detach()

    def steps(
        self, images: Tensor, labels: Tensor, order: Tensor, batch_size: int
    ) -> Generator[Tensor, None, None]:
        """One update for each mini-batch of the examples `order`.

        Args:
            images: uint8 (n, n_in).
            labels: integers (n), or numbers (n, K).
            order: indices of examples.
            batch_size: m; the last mini-batch has what is left.

        Yields:
            the mini-batches' costs before their updates, a few at a time, 1-d.
        """
        dtype = next(self.model.parameters()).dtype
        classes = count_outputs(self.model, images)
        split = Split(images, labels)
        for xs, ys in batches(split, order, batch_size, classes, dtype):
            costs = [self.step(x, y) for x, y in zip(xs, ys, strict=True)]
            yield self.collect(torch.stack(costs))

    def collect(self, costs: Tensor) -> Tensor:
        """The mini-batches' costs, of the `costs` that `step` returned for several."""
        return costs

    def state_dict(self) -> dict[str, Any]:
        """The rates: plain SGD has no other state, whichever engine takes the steps."""
        return {"lr": self.lr, "weight_decay": self.weight_decay}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The rates from the `state` of :meth:`state_dict`."""
        self._set_rates(Rates(state["lr"], state["weight_decay"]))


def count_outputs(model: nn.Module, images: Tensor) -> int:
    """K, the number of outputs of `model`, tried on one of the images.

    Args:
        model: the network.
        images: uint8 (n, n_in), one at least.

    Examples:
        >>> import torchbp
        >>> images = torch.zeros(5, 784, dtype=torch.uint8)
        >>> count_outputs(torchbp.MLP([784, 30, 10]), images)
        10
    """
    dtype = next(model.parameters()).dtype
    with torch.inference_mode(), evaluating(model):
        return int(model(scale(images[:1], dtype)).shape[-1])


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is CUDA if there is one, else the CPU.

    Args:
        name: "auto", "cpu", "cuda" or "mps".

    Raises:
        ValueError: the device is not there.

    Examples:
        >>> choose_device("cpu")
        device(type='cpu')
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    there = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not there.get(name):
        found = ", ".join(key for key, value in there.items() if value)
        raise ValueError(f"device: expected one that is there ({found}), got {name!r}")
    return torch.device(name)


@contextmanager
def cpu_threads(number: int) -> Iterator[None]:
    """Run with `number` CPU threads; afterwards there are as many as before.

    Args:
        number: of threads within an operation, 1 at least.

    Examples:
        >>> with cpu_threads(1):
        ...     torch.get_num_threads()
        1
    """
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Score(NamedTuple):
    """How a model does on a split.

    Attributes:
        cost: the mean cost per example.
        accuracy: the share of right answers, 0 to 1.

    Examples:
        >>> print(f"{Score(cost=0.03, accuracy=0.9574).accuracy:.2%}")
        95.74%
    """

    cost: float
    accuracy: float


@dataclass(frozen=True)
class EpochResult:
    """What one epoch came to.

    Attributes:
        epoch: 1 for the first; 0 stands for the untrained network.
        scores: of "train" (its first 10,000 images), "validation", where there is
            one, and "test".
        running_cost: the mean cost of the epoch's mini-batches as they were trained on;
            None for epoch 0.
        seconds: spent on training steps, and on varying the images.
        images_per_second: examples trained on, per second of that.
        costs: of the epoch's mini-batches in their order, each before its update.

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


def batches(
    split: Split, order: Tensor, batch_size: int, classes: int, dtype: torch.dtype
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Mini-batches of `split` in `order`, several at a time.

    Every index of `order` comes once; the last batch may be smaller than the others.

    Args:
        split: images and labels.
        order: indices of examples.
        batch_size: m.
        classes: K, the length of a one-hot row.
        dtype: of inputs and targets.

    Yields:
        a list of inputs (m, 784) in [0, 1] and the list of their one-hot targets (m,
        classes).

    Examples:
        >>> images = torch.zeros(25, 784, dtype=torch.uint8)
        >>> split = Split(images, torch.arange(25) % 10)
        >>> for xs, ys in batches(split, torch.randperm(25), 10, 10, torch.float32):
        ...     print([tuple(x.shape) for x in xs], [tuple(y.shape) for y in ys])
        [(10, 784), (10, 784), (5, 784)] [(10, 10), (10, 10), (5, 10)]
    """
    targets = split.labels
    outputs = torch.empty((), dtype=dtype, device=targets.device)
    check(outputs.expand(len(split.images), classes), targets)
    if not targets.is_floating_point():
        targets = targets.long()
    for rows in order.split(BATCHES_AT_ONCE * batch_size):
        x = scale(split.images.index_select(0, rows), dtype)
        y = target_rows(outputs.expand(len(x), classes), targets.index_select(0, rows))
        yield list(x.split(batch_size)), list(y.split(batch_size))


@torch.inference_mode()
def evaluate(model: nn.Module, cost: Any, split: Split) -> Score:
    """The score of `model` on `split`; changes nothing, and draws no random number.

    Args:
        model: the network.
        cost: what the score's cost is measured by.
        split: images and labels, on the model's device.

    Examples:
        >>> import torchbp
        >>> split = Split(torch.zeros(4, 784, dtype=torch.uint8), torch.arange(4))
        >>> model = torchbp.MLP([784, 10], output="identity")
        >>> evaluate(model, torchbp.LogLikelihoodCost(), split).accuracy  # one answer
        0.25
    """
    check_takes(model, cost)
    wide = summing_dtype(split.labels.device)
    total = torch.zeros((), dtype=wide, device=split.labels.device)
    right = torch.zeros((), dtype=torch.int64, device=split.labels.device)
    dtype = next(model.parameters()).dtype
    chunks = zip(
        split.images.split(EVALUATE_AT_ONCE),
        split.labels.split(EVALUATE_AT_ONCE),
        strict=True,
    )
    with evaluating(model):
        for images, labels in chunks:
            output = model(scale(images, dtype))
            total += cost(output, labels).to(wide) * len(labels)
            right += (output.argmax(-1) == labels.long()).sum()
    n = len(split.labels)
    # In float64 both: a float32 share of 10,000 would print as 0.9542999863624573.
    return Score(total.item() / n, right.item() / n)


def _check_split(name: str, split: Split) -> None:
    """Refuse images and labels that are not dense tensors, one label an image."""
    images, labels = split
    for what, t in (("images", images), ("labels", labels)):
        if (reason := explain_memory(f"{name} {what}", t)) is not None:
            raise reason
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"{name} labels: expected integers, got {labels.dtype}")
    if labels.dim() != 1 or len(labels) != len(images):
        raise ValueError(
            f"{name} labels: expected shape ({len(images)},) for so many images, "
            f"got {tuple(labels.shape)}"
        )


class Trainer:
    """Trains a model by an engine's steps, epoch after epoch.

    Args:
        model: the network, on its device.
        engine: takes the steps; it holds `model` too.
        cost: for the scores; the engine's own.
        data: on the model's device. The validation split may be empty, where all
            images are trained on: then it has no score, and there is no best epoch.
        batch_size: m.
        seed: of the order in which the examples come, drawn anew for each epoch.
        schedule: gives η for an epoch from the number of those completed; the engine's
            own stays if None.
        vary: gives the images of an epoch from the training images, with random
            numbers from the generator, e.g. :func:`torchbp.data.distort`.

    Attributes:
        epoch: epochs completed.
        best: (epoch, validation accuracy, test accuracy) at the best validation
            accuracy so far; of equals, the first.

    Raises:
        ValueError: a batch size below 1 or above the training set's size, an empty
            training or test set, images or labels that do not fit the model.

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
        # On the CPU whatever the device: the same seed gives the same batches anywhere.
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
        """Refuse data that do not fit the model."""
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
        """How the model does now on each of the splits, by name."""
        return {
            name: evaluate(self.model, self.cost, split)
            for name, split in self.scored.items()
        }

    def run_epoch(
        self, on_progress: Callable[[int, float], None] | None = None
    ) -> EpochResult:
        """Every training example forward once and backward once, then the scores.

        Args:
            on_progress: called now and then with the number of images trained on since
                the last call and the mean cost of their batches.

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
        except DivergedError as error:  # now that the model has its parameters back
            bad = self._not_finite()
            since = f"; by now not finite: {bad}" if bad else ""
            raise DivergedError(f"{error}{since}") from None
        seconds = time.perf_counter() - started
        self.epoch += 1
        scores = self.score()
        self._check_healthy(scores)
        last = n - (len(costs) - 1) * m  # examples in the last mini-batch
        mean = (math.fsum(costs[:-1]) * m + costs[-1] * last) / n
        result = EpochResult(self.epoch, scores, mean, seconds, n / seconds, costs)
        self._keep_best(result)
        return result

    def _take_costs(
        self,
        steps: Iterable[Tensor],
        on_progress: Callable[[int, float], None] | None,
    ) -> list[float]:
        """Take an epoch's `steps`, and return their costs, which are all finite."""
        costs: list[float] = []
        waiting: list[Tensor] = []
        looked = time.perf_counter()

        def look() -> None:
            """Check the costs that are waiting, and report them."""
            if not waiting:
                return
            values = torch.cat(waiting).tolist()
            waiting.clear()
            self._check_finite(values, len(costs))
            costs.extend(values)
            if on_progress is not None:
                before = (len(costs) - len(values)) * self.batch_size
                n = len(self.data.train.labels)
                images = min(len(costs) * self.batch_size, n) - before
                on_progress(images, sum(values) / len(values))

        for some in steps:
            waiting.append(some)
            # To look at a cost is to wait for the device, so not at every one.
            if time.perf_counter() - looked >= LOOK_EVERY:
                look()
                looked = time.perf_counter()
        look()
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
            epochs: the total, those of an earlier sitting included.
            on_epoch: called after every epoch, and before the first with the scores of
                the untrained network.
            on_progress: see :meth:`run_epoch`.
            save: called with :meth:`state_dict` at the start, every `save_every` epochs
                and after the last one. If anything stops the training, Ctrl-C included,
                it is called with the state that the last complete epoch left.
            save_every: epochs from one to the next.

        Raises:
            DivergedError: see :meth:`run_epoch`.
        """
        if self.epoch < epochs:
            self._check_start()
        kept, saved_at = self.state_dict(), self.epoch if self.epoch else None
        try:
            if self.epoch == 0 and on_epoch is not None:
                on_epoch(EpochResult(0, self.score(), None, 0.0, 0.0))
            if self.epoch == 0 and save is not None:
                save(kept)  # from the first moment there is something to resume
                saved_at = 0
            while self.epoch < epochs:
                result = self.run_epoch(on_progress)
                # First the log, then the state: a run that dies in between repeats the
                # epoch and replaces its points, where the other order loses them.
                if on_epoch is not None:
                    on_epoch(result)
                kept = self.state_dict()
                due = self.epoch % save_every == 0 or self.epoch == epochs
                if save is not None and due:
                    save(kept)
                    saved_at = self.epoch
        except BaseException:
            if save is not None and saved_at != kept["epoch"]:
                save(kept)
            raise

    def _not_finite(self) -> str:
        """The names of the parameters that are not finite, the first few of them."""
        named = self.model.named_parameters()
        bad = [name for name, p in named if not p.isfinite().all()]
        more = f" and {len(bad) - 4} more" if len(bad) > 4 else ""
        return ", ".join(bad[:4]) + more

    def _check_start(self) -> None:
        """Refuse to train a network that is not finite: the rate is not to blame."""
        if bad := self._not_finite():
            raise DivergedError(
                f"expected finite parameters before epoch {self.epoch + 1}, got NaN or "
                f"infinity in {bad}"
            )

    def _check_finite(self, values: list[float], step: int) -> None:
        for i, value in enumerate(values):
            if not math.isfinite(value):
                raise DivergedError(
                    f"the cost became {value} in epoch {self.epoch + 1}, step "
                    f"{step + i + 1}, at lr {self.engine.lr:g}: try a smaller one"
                )

    def _check_healthy(self, scores: dict[str, Score]) -> None:
        """Refuse an epoch whose last step left a network that is not finite."""
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

    def _keep_best(self, result: EpochResult) -> None:
        if "validation" not in result.scores:
            return
        accuracy = result.scores["validation"].accuracy
        if self.best is None or accuracy > self.best[1]:
            self.best = (result.epoch, accuracy, result.scores["test"].accuracy)

    @property
    def step(self) -> int:
        """Steps taken, all epochs together."""
        return self.epoch * self.steps_per_epoch

    @property
    def steps_per_epoch(self) -> int:
        """Mini-batches in an epoch; the last may be smaller than the others."""
        return math.ceil(len(self.data.train.labels) / self.batch_size)

    @property
    def device(self) -> torch.device:
        """Where the data and the model are."""
        return self.data.train.labels.device

    def state_dict(self) -> dict[str, Any]:
        """All that decides how training goes on, as copies; for epoch ends."""
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
        """Go on from the `state` of :meth:`state_dict`, to the bit on the same kind of
        device.

        Raises:
            ValueError, TypeError, LookupError, RuntimeError: a state of another
                network, or of none, or of another number of steps in an epoch; nothing
                is changed.
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
