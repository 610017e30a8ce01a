"""The ways to the partial derivatives of a cost, with their passes counted.

Three ways perturb one parameter after the other and give one derivative each time; two
go back through the network by BP1-BP4 and give all of them at once. The differences are
written out here, not taken from torchbp._numeric: they are what is demonstrated.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

import torchbp

BATCH_SIZE = 10
FORWARD, CENTRAL, MODE = "forward difference", "central difference", "forward mode"
LOOPS, BATCHED = "BP1-BP4, loops", "BP1-BP4, batched"
# Forward passes per parameter, and further ones.
PERTURBING = {FORWARD: (1, 1), CENTRAL: (2, 0), MODE: (1, 0)}
Entries = Sequence[tuple[Tensor, int]]


def count_parameters(sizes: Sequence[int]) -> int:
    """Return P, the number of weights and biases of a network."""
    return sum(n_out * (n_in + 1) for n_in, n_out in itertools.pairwise(sizes))


@dataclass
class Problem:
    """A network, its cost and a mini-batch; passes through the network are counted, by
    a hook or by the way that computes them itself.

    Attributes:
        sizes: neurons per layer.
        seed: of parameters and mini-batch.
        dtype: of all.
        passes: forward, so far.
        passes_back: so far.
    """

    sizes: tuple[int, ...]
    seed: int
    dtype: torch.dtype = torch.float32
    passes: int = field(default=0, init=False)
    passes_back: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        # Drawn in float64 and rounded to float32: the same numbers for both dtypes.
        model = torchbp.MLP(self.sizes, device="cpu", dtype=torch.float64)
        x, y = (
            torch.rand(BATCH_SIZE, n, dtype=torch.float64, device="cpu")
            for n in (self.sizes[0], self.sizes[-1])
        )
        self.model = model.float().to(self.dtype)
        self.x, self.y = (t.float().to(self.dtype) for t in (x, y))
        self.cost = torchbp.QuadraticCost()
        self.layers: list[nn.Linear] = list(self.model.layers)  # type: ignore[arg-type]
        self.model.register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self.passes += 1

    @torch.no_grad()
    def measure(self) -> float:
        """Return C, by one pass forward."""
        value: float = self.cost(self.model(self.x), self.y).item()
        return value

    def entries(self, indices: Sequence[int]) -> Entries:
        """Return (flat parameter, index in it) for indices into all P parameters."""
        flat = [p.detach().view(-1) for p in self.model.parameters()]
        everything = [(p, j) for p in flat for j in range(len(p))]
        return [everything[i] for i in indices]


def forward_differences(
    problem: Problem, entries: Entries, epsilon: float
) -> list[float]:
    """Return (C(w + ε) - C(w)) / ε for each entry w."""
    C = problem.measure()
    slopes = []
    for p, j in entries:
        w = p[j].item()
        p[j] = w + epsilon
        distance = p[j].item() - w  # ε as the dtype rounds it
        slopes.append((problem.measure() - C) / distance if distance else 0.0)
        p[j] = w
    return slopes


def central_differences(
    problem: Problem, entries: Entries, epsilon: float
) -> list[float]:
    """Return (C(w + ε) - C(w - ε)) / 2ε for each entry w."""
    slopes = []
    for p, j in entries:
        w = p[j].item()
        p[j] = w + epsilon
        above, C = p[j].item(), problem.measure()
        p[j] = w - epsilon
        distance = above - p[j].item()
        slopes.append((C - problem.measure()) / distance if distance else 0.0)
        p[j] = w
    return slopes


def forward_mode(problem: Problem, entries: Entries, epsilon: float) -> list[float]:
    """Return ∂C/∂w for each entry w, by our layers' own jvp; `epsilon` is not used."""
    named = {n: p.detach() for n, p in problem.model.named_parameters()}
    names = {p.data_ptr(): n for n, p in named.items()}
    tangents = {n: torch.zeros_like(p) for n, p in named.items()}

    def cost(values: dict[str, Tensor]) -> Tensor:
        output = functional_call(problem.model, values, (problem.x,))
        result: Tensor = problem.cost(output, problem.y)
        return result

    slopes = []
    with warnings.catch_warnings():  # torch warns about its own use of torch.jit.script
        warnings.filterwarnings("ignore", r"`torch\.jit\.script", FutureWarning)
        for p, j in entries:
            direction = tangents[names[p.data_ptr()]].view(-1)
            direction[j] = 1
            slopes.append(jvp(cost, (named,), (tangents,))[1].item())
            direction[j] = 0
    return slopes


@torch.no_grad()
def loops(problem: Problem) -> list[Tensor]:
    """Return the gradients by BP1-BP4, one example after the other."""
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
    """Return the gradients by ``torchbp.backprop``, whose passes no hook counts."""
    _, grads = torchbp.backprop(problem.model, problem.cost, problem.x, problem.y)
    return list(grads.values())


PERTURBATIONS: dict[str, Callable[[Problem, Entries, float], list[float]]] = {
    FORWARD: forward_differences,
    CENTRAL: central_differences,
    MODE: forward_mode,
}
BACKPROPS: dict[str, Callable[[Problem], list[Tensor]]] = {
    LOOPS: loops,
    BATCHED: batched,
}
