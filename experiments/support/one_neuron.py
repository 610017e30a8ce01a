"""The book's one neuron that learns slowly, and the curves of a training."""

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
    """A training: its cost, σ'(z^L) and δ^L at several times."""

    cost: str
    start: str
    times: list[int]
    C: list[float]
    sigma_prime: list[float]  # mean over examples and outputs
    delta: list[float]  # root of the mean square over the examples of ‖δ^L‖
    off: float  # the largest distance of δ^L from what BP1 says, relative

    @property
    def halved(self) -> float:
        """The first time at which the cost is at most half of what it was, or inf."""
        pairs = zip(self.times, self.C, strict=True)
        return next((time for time, C in pairs if self.C[0] >= 2 * C), math.inf)


class Points:
    """A curve as it grows."""

    def __init__(self, cost: str, start: str) -> None:
        self.cost, self.start = cost, start
        self.rows: list[tuple[int, float, float, float]] = []
        self.off = 0.0

    def add(self, time: int, model: torch.nn.Module, x: Tensor, y: Tensor) -> None:
        """C, σ' and δ^L of the model as it is on x (n, n_in) and y (n, K)."""
        cost = COSTS[self.cost][0]()
        last = probe(model, cost, x, y)[-1]
        assert last.delta is not None
        a = torch.sigmoid(last.z)
        sigma_prime, delta = a * (1 - a), last.delta * len(x)  # of each example
        expected = (a - y) * sigma_prime if self.cost == "quadratic" else a - y
        self.off = max(self.off, relative_distance(delta, expected))
        rms = delta.square().sum(-1).mean().sqrt().item()
        C = cost(last.a, y).item()
        self.rows.append((time, C, sigma_prime.mean().item(), rms))

    def curve(self) -> Curve:
        columns = (list(column) for column in zip(*self.rows, strict=True))
        times, C, sigma_prime, delta = columns
        return Curve(
            self.cost,
            self.start,
            list(map(int, times)),
            C,
            sigma_prime,
            delta,
            self.off,
        )


def neuron(cost: str, start: str, lr: float = NEURON_LR) -> Curve:
    """One sigmoid neuron that is to turn input 1 into output 0."""
    make, output = COSTS[cost]
    model = torchbp.MLP([1, 1], output=output, device="cpu", dtype=torch.float64)
    with torch.no_grad():
        for p, value in zip(model.parameters(), NEURON_STARTS[start], strict=True):
            p.fill_(value)
    x = torch.ones(1, 1, dtype=torch.float64, device="cpu")
    y = torch.zeros_like(x)
    sgd = torchbp.ExplicitSGD(model, make(), lr)
    found = Points(cost, start)
    for epoch in range(NEURON_EPOCHS + 1):
        found.add(epoch, model, x, y)
        sgd.step(x, y)
    return found.curve()
