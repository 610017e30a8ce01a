"""Every way to the partial derivatives of a cost, and what passes each of them takes.

Three of them perturb one parameter after the other, and give a number for each of those
that they are asked for; two go back through the network by BP1-BP4, and give all.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

import torchbp

BATCH_SIZE = 10
FORWARD, CENTRAL, MODE = "forward difference", "central difference", "forward mode"
LOOPS, BATCHED = "BP1-BP4, loops", "BP1-BP4, batched"
PERTURBING = {FORWARD: (1, 1), CENTRAL: (2, 0), MODE: (1, 0)}  # passes per P, and more


def parameters(sizes: Sequence[int]) -> int:
    return sum(n_out * (n_in + 1) for n_in, n_out in itertools.pairwise(sizes))


@dataclass
class Problem:
    """A network, its cost and a mini-batch; the passes through the network are counted,
    where it is called, and where somebody goes through its layers by hand."""

    sizes: tuple[int, ...]
    seed: int
    dtype: torch.dtype = torch.float32
    passes: int = field(default=0, init=False)  # forward
    passes_back: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        # In float64 first: the same numbers for both.
        model = torchbp.MLP(self.sizes, device="cpu", dtype=torch.float64)
        x = torch.rand(BATCH_SIZE, self.sizes[0], dtype=torch.float64, device="cpu")
        self.y = torch.rand(
            BATCH_SIZE, self.sizes[-1], dtype=torch.float64, device="cpu"
        )
        # What float64 is to be compared with are numbers that float32 can hold.
        self.model = model.float().to(self.dtype)
        self.x, self.y = (t.float().to(self.dtype) for t in (x, self.y))
        self.cost = torchbp.QuadraticCost()
        self.layers: list[nn.Linear] = list(self.model.layers)  # type: ignore[arg-type]
        self.model.register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self.passes += 1

    @torch.no_grad()
    def measure(self) -> float:
        """C, by one pass forward."""
        value: float = self.cost(self.model(self.x), self.y).item()
        return value

    def places(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        """(flat parameter, index in it) of some of all P, in their order."""
        flat = [p.detach().view(-1) for p in self.model.parameters()]
        every = [(p, j) for p in flat for j in range(len(p))]
        return [every[i] for i in indices]


def forward_differences(problem: Problem, places: Any, step: float) -> list[float]:
    C = problem.measure()
    found = []
    for p, j in places:
        w = p[j].item()
        p[j] = w + step
        moved = p[j].item() - w  # what the dtype made of it
        found.append((problem.measure() - C) / moved if moved else 0.0)
        p[j] = w
    return found


def central_differences(problem: Problem, places: Any, step: float) -> list[float]:
    found = []
    for p, j in places:
        w = p[j].item()
        p[j] = w + step
        above, C = p[j].item(), problem.measure()
        p[j] = w - step
        moved = above - p[j].item()
        found.append((C - problem.measure()) / moved if moved else 0.0)
        p[j] = w
    return found


def forward_mode(problem: Problem, places: Any, step: float) -> list[float]:
    """One parameter's direction at a time, through our layers' own jvp."""
    named = {n: p.detach() for n, p in problem.model.named_parameters()}
    names = {p.data_ptr(): n for n, p in named.items()}
    tangents = {n: torch.zeros_like(p) for n, p in named.items()}

    def cost(values: dict[str, Tensor]) -> Tensor:
        output = functional_call(problem.model, values, (problem.x,))
        result: Tensor = problem.cost(output, problem.y)
        return result

    found = []
    with warnings.catch_warnings():  # torch's, of its own use of torch.jit.script
        warnings.filterwarnings("ignore", r"`torch\.jit\.script", FutureWarning)
        for p, j in places:
            direction = tangents[names[p.data_ptr()]].view(-1)
            direction[j] = 1
            found.append(jvp(cost, (named,), (tangents,))[1].item())
            direction[j] = 0
    return found


@torch.no_grad()
def loops(problem: Problem) -> list[Tensor]:
    """BP1-BP4 for one example after the other, the gradients added up, in the order of
    the parameters."""
    layers, n = problem.layers, len(problem.x)
    grads = [torch.zeros_like(p) for p in problem.model.parameters()]
    for x, y in zip(problem.x, problem.y, strict=True):
        a = [x]
        for layer in layers:
            a.append(torch.sigmoid(layer.weight @ a[-1] + layer.bias))
        problem.passes += 1
        problem.passes_back += 1
        delta = (a[-1] - y) * a[-1] * (1 - a[-1])  # BP1
        for ell in reversed(range(len(layers))):
            grads[2 * ell + 1] += delta / n  # BP3
            grads[2 * ell] += torch.outer(delta, a[ell]) / n  # BP4
            if ell:
                gate = a[ell] * (1 - a[ell])
                delta = (layers[ell].weight.t() @ delta) * gate  # BP2
    return grads


def batched(problem: Problem) -> list[Tensor]:
    """By ``torchbp.backprop``, which calls no module that could count its passes."""
    _, grads = torchbp.backprop(problem.model, problem.cost, problem.x, problem.y)
    return list(grads.values())


PERTURBATIONS: dict[str, Callable[[Problem, Any, float], list[float]]] = {
    FORWARD: forward_differences,
    CENTRAL: central_differences,
    MODE: forward_mode,
}
SWEEPS: dict[str, Callable[[Problem], list[Tensor]]] = {
    LOOPS: loops,
    BATCHED: batched,
}
