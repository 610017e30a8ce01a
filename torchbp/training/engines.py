"""Engines, which take the steps of SGD, mini-batch by mini-batch.

This module has :class:`AutogradSGD`: our layers (or native ones), a backward pass,
``torch.optim.SGD``. :class:`torchbp.ExplicitSGD` is another engine.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from torchbp.costs import check, target_rows
from torchbp.data import Split, scale
from torchbp.explicit import Rates
from torchbp.inspection import evaluating
from torchbp.nn import check_takes

__all__ = ["AutogradSGD", "Engine", "batches", "count_outputs"]

# Batches that are gathered and scaled at once, several times faster than one by one.
BATCHES_AT_ONCE = 50


class Engine(Protocol):
    """The interface of engines, which update a model batch by batch.

    Once a generator from `steps` is exhausted or closed, the model's own parameters are
    up to date.

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
        """Take one step for each mini-batch of the examples `order`.

        Args:
            images: uint8 (n, n_in).
            labels: integers (n), of any dtype but bool.
            order: indices of examples.
            batch_size: m; the last mini-batch has what is left.

        Yields:
            the mini-batches' costs before their updates, several at a time, 1-d,
            detached.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the state for checkpoints and :meth:`load_state_dict`."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state` of :meth:`state_dict`."""


class AutogradSGD:
    """W ← W - η ∂C/∂W by ``torch.optim.SGD``, the gradients by a backward pass.

    Args:
        model: the network.
        cost: one of ours, e.g. ``torchbp.QuadraticCost()``.
        lr: η.
        weight_decay: λ/n of the book: on weights (2-D parameters), not on biases.

    Raises:
        ValueError: a negative or non-finite lr or weight decay, or a cost that takes z
            on a network that returns a.

    Attributes:
        model, cost, weight_decay: the arguments.
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
        """Make an optimizer with these rates."""
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
        """Take one step.

        Args:
            input: (m, n_in).
            target: labels or numbers, as the cost accepts.

        Returns:
            the mini-batch's cost before the update, 0-d, detached.
        """
        self.optimizer.zero_grad()
        C: Tensor = self.cost(self.model(input), target)
        C.backward()
        self.optimizer.step()
        return C.detach()

    def steps(
        self, images: Tensor, labels: Tensor, order: Tensor, batch_size: int
    ) -> Generator[Tensor, None, None]:
        """Take one step for each mini-batch of the examples `order`.

        Args:
            images: uint8 (n, n_in).
            labels: integers (n), or numbers (n, K).
            order: indices of examples.
            batch_size: m; the last mini-batch has what is left.

        Yields:
            the mini-batches' costs before their updates, several at a time, 1-d.
        """
        dtype = next(self.model.parameters()).dtype
        classes = count_outputs(self.model, images)
        split = Split(images, labels)
        for xs, ys in batches(split, order, batch_size, classes, dtype):
            costs = [self.step(x, y) for x, y in zip(xs, ys, strict=True)]
            yield self.collect(torch.stack(costs))

    def collect(self, costs: Tensor) -> Tensor:
        """Return the costs of several mini-batches.

        Args:
            costs: the results of :meth:`step`, 1-d.
        """
        return costs

    def state_dict(self) -> dict[str, Any]:
        """Return the rates: plain SGD has no other state, in any engine."""
        return {"lr": self.lr, "weight_decay": self.weight_decay}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the rates from a `state` of :meth:`state_dict`."""
        self._set_rates(Rates(state["lr"], state["weight_decay"]))


def batches(
    split: Split, order: Tensor, batch_size: int, classes: int, dtype: torch.dtype
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield the mini-batches of `split` in `order`, several at a time.

    The last mini-batch may be smaller than the others.

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


def count_outputs(model: nn.Module, images: Tensor) -> int:
    """Return K, the number of outputs of `model`, from a call with the first image.

    Args:
        model: the network.
        images: uint8 (n, n_in), n at least 1.

    Examples:
        >>> import torchbp
        >>> images = torch.zeros(5, 784, dtype=torch.uint8)
        >>> count_outputs(torchbp.MLP([784, 30, 10]), images)
        10
    """
    dtype = next(model.parameters()).dtype
    with torch.inference_mode(), evaluating(model):
        return int(model(scale(images[:1], dtype)).shape[-1])
