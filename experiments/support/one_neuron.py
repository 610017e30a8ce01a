"""The book's single neuron that learns slowly, and the curves of a training."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import torchbp
from experiments.support import settings
from torchbp._numeric import relative_distance
from torchbp.inspection import probe

COSTS = {name: settings.COSTS[name] for name in ("quadratic", "cross-entropy")}
NEURON_LR, NEURON_EPOCHS = 0.15, 300
NEURON_STARTS = {"good": (0.6, 0.9), "bad": (2.0, 2.0)}


@dataclass(frozen=True)
class Curve:
    """A training: its cost, σ'(z^L) and δ^L at several times.

    Attributes:
        cost: "quadratic" or "cross-entropy".
        start: "good" or "bad".
        times: steps or epochs.
        C: the cost.
        sigma_prime: mean over examples and outputs.
        delta: root mean square of ‖δ^L‖ over the examples.
        error: the largest relative distance of δ^L from BP1.
    """

    cost: str
    start: str
    times: list[int]
    C: list[float]
    sigma_prime: list[float]
    delta: list[float]
    error: float

    @property
    def halved(self) -> float:
        """The first time at which the cost is at most half of the first, or inf."""
        pairs = zip(self.times, self.C, strict=True)
        return next((time for time, C in pairs if self.C[0] >= 2 * C), math.inf)


class CurveRecorder:
    """A curve that is recorded during a training.

    Args:
        cost: a key of `COSTS`.
        start: "good" or "bad".
    """

    def __init__(self, cost: str, start: str) -> None:
        self.cost, self.start = cost, start
        self.rows: list[tuple[int, float, float, float]] = []
        self.error = 0.0

    def add(self, time: int, model: torch.nn.Module, x: Tensor, y: Tensor) -> None:
        """Record C, σ' and δ^L.

        Args:
            time: steps or epochs so far.
            model: in its present state.
            x: inputs, (n, n_in).
            y: targets, (n, K).
        """
        cost = COSTS[self.cost][0]()
        last = probe(model, cost, x, y)[-1]
        assert last.delta is not None
        a = torch.sigmoid(last.z)
        sigma_prime, delta = a * (1 - a), last.delta * len(x)  # of each example
        expected = (a - y) * sigma_prime if self.cost == "quadratic" else a - y
        self.error = max(self.error, relative_distance(delta, expected))
        rms = delta.square().sum(-1).mean().sqrt().item()
        C = cost(last.a, y).item()
        self.rows.append((time, C, sigma_prime.mean().item(), rms))

    def curve(self) -> Curve:
        """Return what was recorded."""
        columns = (list(column) for column in zip(*self.rows, strict=True))
        times, C, sigma_prime, delta = columns
        return Curve(
            self.cost,
            self.start,
            list(map(int, times)),
            C,
            sigma_prime,
            delta,
            self.error,
        )


def neuron(cost: str, start: str, lr: float = NEURON_LR) -> Curve:
    """Train one sigmoid neuron to turn input 1 into output 0.

    Args:
        cost: a key of `COSTS`.
        start: a key of `NEURON_STARTS`.
        lr: η.
    """
    make, output = COSTS[cost]
    model = torchbp.MLP([1, 1], output=output, device="cpu", dtype=torch.float64)
    with torch.no_grad():
        for p, value in zip(model.parameters(), NEURON_STARTS[start], strict=True):
            p.fill_(value)
    x = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    y = torch.zeros_like(x)
    sgd = torchbp.ExplicitSGD(model, make(), lr)
    recorder = CurveRecorder(cost, start)
    for epoch in range(NEURON_EPOCHS + 1):
        recorder.add(epoch, model, x, y)
        sgd.step(x, y)
    return recorder.curve()
