"""A guided tour of backpropagation: one example, every equation with its numbers.

The network has 2, 3 and 1 neurons: small enough to follow with a pencil, and with a
hidden layer. The package has computed every number shown: :func:`torchbp.observe`
recorded z, a, σ' and δ, :func:`torchbp.backprop` returned the cost and the gradients,
and :class:`torchbp.ExplicitSGD` took the step.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from torchbp.convert import to_native
from torchbp.costs import QuadraticCost
from torchbp.explicit import ExplicitSGD, backprop
from torchbp.inspection.comparison import compare
from torchbp.inspection.layout import (
    Section,
    code_lines,
    equations,
    factor,
    matrices,
    number,
    product,
    prose,
    weighted_sum,
)
from torchbp.inspection.observation import observe
from torchbp.inspection.records import Record
from torchbp.nn import MLP

__all__ = ["Tour"]

SIZES = (2, 3, 1)
LR = 0.5
TOLERANCE = 1e-12  # a share of both sides' sizes, which are computed in float64


class Tour:
    """The tour of one network, one example and one step of gradient descent.

    Args:
        seed: of the weights, the biases and the example.

    Attributes:
        model: the MLP, in float64, as it is before the step.
        x, y: the example and its target, (1, 2) and (1, 1).
        lr: η.
        cost, cost_after: C before and after the step.
        gradients: {parameter name: gradient} by hand.
        native: the same by native autograd.
        sections: the text of the tour, in order.

    Raises:
        ValueError: a seed outside 0 to 2^64 - 1.

    Examples:
        >>> tour = Tour(seed=0)
        >>> tour.ok
        True
        >>> [section.title for section in tour.sections[4:8]]
        ... # doctest: +NORMALIZE_WHITESPACE
        ['BP1: the error of the output layer', 'BP2: the error one layer back',
         'BP3: the gradient with respect to the biases',
         'BP4: the gradient with respect to the weights']
        >>> tour.cost_after < tour.cost
        True
    """

    def __init__(self, seed: int = 0) -> None:
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed: expected 0 to 2^64 - 1, got {seed}")
        self.seed = seed
        self.model, self.x, self.y = _problem(seed)
        self.lr = LR
        cost = QuadraticCost()
        with observe(self.model) as trace:
            cost(self.model(self.x), self.y).backward()
        self.model.zero_grad()
        self.records = list(trace)
        C, self.gradients = backprop(self.model, cost, self.x, self.y)
        self.cost: float = C.item()
        self.native = self._by_autograd()
        self.report = compare(self.model, cost, self.x, self.y)
        # The step is taken by a second network with the same parameters.
        self.after = copy.deepcopy(self.model)
        ExplicitSGD(self.after, cost, LR).step(self.x, self.y)
        with observe(self.after) as trace, torch.no_grad():
            self.cost_after: float = cost(self.after(self.x), self.y).item()
        self.output_after: float = trace[-1].a.item()
        self.sections = list(self._sections())

    @property
    def ok(self) -> bool:
        """Whether every gradient agrees with native autograd's, and every equation with
        finite differences."""
        agree = all(self._agrees(name) for name in self.gradients)
        return agree and self.native.keys() == self.gradients.keys() and self.report.ok

    def _by_autograd(self) -> dict[str, Tensor]:
        """Return the gradients of the same parameters in native layers, by autograd."""
        native = to_native(self.model)
        C = (self.y - native(self.x)).square().sum() / 2
        parameters = dict(self.model.named_parameters())
        grads = torch.autograd.grad(C, list(parameters.values()))
        return dict(zip(parameters, grads, strict=True))

    def _agrees(self, name: str) -> bool:
        """Return whether the gradient of a parameter agrees with native autograd's."""
        ours, native = self.gradients[name], self.native[name]
        scale = (ours.abs() + native.abs()).max().item()
        return (ours - native).abs().max().item() <= TOLERANCE * scale

    def _sections(self) -> Iterator[Section]:
        """Yield the sections in order, each made by a method of its name."""
        yield self._network()
        yield self._feedforward(1)
        yield self._feedforward(2)
        yield self._cost()
        yield self._output_error()
        yield self._error_back()
        yield self._biases()
        yield self._weights()
        yield self._step()
        yield self._check()

    def _network(self) -> Section:
        x1, x2 = self.x[0].tolist()
        rows = [
            line
            for ell, record in enumerate(self.records, start=1)
            for line in ["", *matrices(ell, record.weight, _bias(record))]
        ]
        lines = [
            "Two inputs, a hidden layer of three neurons, one output neuron:",
            "",
            "  layer 0           layer 1      layer 2",
            "                  ┌─ a^1_1 ─┐",
            "  x_1 = a^0_1 ────┤         │",
            "                  ├─ a^1_2 ─┼─── a^2_1   the answer",
            "  x_2 = a^0_2 ────┤         │",
            "                  └─ a^1_3 ─┘",
            "",
            *prose(
                "W^ℓ_jk is the weight of the connection from neuron k in layer ℓ-1 to "
                "neuron j in layer ℓ; b^ℓ_j is the bias of that neuron. Drawn at "
                "random and rounded, so that what you see is exact:"
            ),
            *rows,
            "",
            f"The example is x = ({x1:.2f}, {x2:.2f}), and the answer we want is "
            f"y = {self.y.item():.0f}.",
            "",
            *prose(
                "How would the network's error change if we changed one of these 13 "
                "parameters a little? Backpropagation answers that for all of them, in "
                "one sweep from the output back to the input."
            ),
            "",
            *prose(
                "From here on four decimals are shown. The computation has more, so "
                "your last digit may differ."
            ),
        ]
        return Section("The network and the example", "", lines)

    def _feedforward(self, ell: int) -> Section:
        record = self.records[ell - 1]
        W, b, x = record.weight, _bias(record), record.x[0].tolist()
        z, a = record.z[0].tolist(), record.a[0].tolist()
        neurons = [f"{ell}_{j + 1}" for j in range(len(z))]
        sums = [
            (f"z^{j}", weighted_sum(w, x, c), number(value))
            for j, w, c, value in zip(neurons, W.tolist(), b.tolist(), z, strict=True)
        ]
        squashed = [
            (f"a^{j}", f"σ(z^{j})", f"σ({number(z_j)})", number(a_j))
            for j, z_j, a_j in zip(neurons, z, a, strict=True)
        ]
        lines = [
            *prose(
                "First forward. Each neuron adds up its inputs, weighted, and its "
                "bias. That is its weighted input z:"
                if ell == 1
                else "The same with the activations of layer 1 as inputs:"
            ),
            "",
            *equations(sums),
            "",
            "Its activation is a = σ(z), with σ(z) = 1/(1 + e^-z):",
            "",
            *equations(squashed),
        ]
        if ell == 2:
            wanted = f"we wanted {self.y.item():.0f}"
            lines += ["", f"The network answers {a[0]:.4f}; {wanted}."]
        equation = f"z^{ell} = W^{ell} a^{ell - 1} + b^{ell},  a^{ell} = σ(z^{ell})"
        return Section(f"Feedforward: layer {ell}", equation, lines)

    def _cost(self) -> Section:
        a, y = self.records[1].a.item(), self.y.item()
        numbers = f"½ ({y:.0f} - {a:.4f})²"
        lines = [
            "How wrong is that? Half the squared distance between the two:",
            "",
            *equations([("C", "½ (y - a^2_1)²", numbers, number(self.cost))]),
            "",
            "For several examples C is the mean. The tour has one: n = 1.",
            "",
            "Now backward. The error of a neuron is",
            "",
            "  δ^ℓ_j = ∂C/∂z^ℓ_j",
            "",
            *prose(
                "the rate at which the cost changes with the neuron's weighted input. "
                "BP1 and BP2 compute the errors; BP3 and BP4 make gradients of them."
            ),
        ]
        return Section("The cost", "C = 1/(2n) Σ_x ‖y - a^L‖²", lines)

    def _output_error(self) -> Section:
        record = self.records[1]
        a, y, delta = record.a.item(), self.y.item(), _present(record.delta).item()
        nabla, slope = _present(record.grad_a).item(), record.sigma_prime.item()
        rows = [
            ("∂C/∂a^2_1", "a^2_1 - y", f"{a:7.4f} - {y:.0f}", number(nabla)),
            ("σ'(z^2_1)", "a^2_1 (1 - a^2_1)", product(a, 1 - a), number(slope)),
            ("δ^2_1", "∂C/∂a^2_1 σ'(z^2_1)", product(nabla, slope), number(delta)),
        ]
        sign, move = ("negative", "up") if delta < 0 else ("positive", "down")
        lines = [
            *prose(
                "The cost depends on the output neuron directly. The neuron's error is "
                "how the cost changes with its activation, times how its activation "
                "changes with its weighted input. The first factor is a - y for this "
                "cost, the second is a(1 - a) for this σ:"
            ),
            "",
            *equations(rows),
            "",
            f"δ is {sign}: to lower the cost, z^2_1 has to go {move}.",
            *code_lines("BP1"),
        ]
        title = "BP1: the error of the output layer"
        return Section(title, "δ^L = ∇_a C ⊙ σ'(z^L)", lines)

    def _error_back(self) -> Section:
        first, second = self.records
        W, a, slope = second.weight[0], first.a[0], first.sigma_prime[0]
        delta, ahead = _present(first.delta)[0], _present(second.delta).item()
        arrived = _present(first.grad_a)[0]
        each = range(len(a))
        back = [
            (
                f"W^2_1{k + 1} δ^2_1",
                product(W[k].item(), ahead, places=2),
                number(arrived[k].item()),
            )
            for k in each
        ]
        slopes = [
            (
                f"σ'(z^1_{k + 1})",
                f"a^1_{k + 1} (1 - a^1_{k + 1})",
                product(a[k].item(), 1 - a[k].item()),
                number(slope[k].item()),
            )
            for k in each
        ]
        errors = [
            (
                f"δ^1_{k + 1}",
                f"W^2_1{k + 1} δ^2_1 σ'(z^1_{k + 1})",
                product(arrived[k].item(), slope[k].item()),
                number(delta[k].item()),
            )
            for k in each
        ]
        lines = [
            *prose(
                "A hidden neuron affects the cost only through the neurons of the next "
                "layer. So their errors come back to it through the same weights as "
                "its activation went forward (hence Wᵀ: W in the other direction):"
            ),
            "",
            *equations(back),
            "",
            "Then multiply by the neuron's own slope, as at the output:",
            "",
            *equations(slopes),
            "",
            *equations(errors),
            "",
            *prose(
                "With more layers this repeats down to the first. Each layer "
                "multiplies by its σ', which is ¼ at most. That is why the early "
                "layers of deep networks learn slowly."
            ),
            *code_lines("BP2"),
        ]
        equation = "δ^ℓ = ((W^{ℓ+1})ᵀ δ^{ℓ+1}) ⊙ σ'(z^ℓ)"
        return Section("BP2: the error one layer back", equation, lines)

    def _biases(self) -> Section:
        rows = [
            (f"∂C/∂{label}", label.replace("b", "δ"), number(grad[index].item()))
            for name, grad in self.gradients.items()
            if name.endswith("bias")
            for index, label in _entries(name, grad)
        ]
        lines = [
            *prose(
                "A bias is added to z, so a change of the bias changes z by the same "
                "amount: its gradient is the error itself. (For several examples it is "
                "the sum of their errors.)"
            ),
            "",
            *equations(rows),
            *code_lines("BP3"),
        ]
        return Section(
            "BP3: the gradient with respect to the biases", "∂C/∂b^ℓ_j = δ^ℓ_j", lines
        )

    def _weights(self) -> Section:
        rows = []
        for ell, record in enumerate(self.records, start=1):
            grad = self.gradients[f"layers.{ell - 1}.weight"]
            delta, x = _present(record.delta)[0], record.x[0]
            for (j, k), label in _entries(f"layers.{ell - 1}.weight", grad):
                factors = f"δ^{ell}_{j + 1} a^{ell - 1}_{k + 1}"
                numbers = product(delta[j].item(), x[k].item())
                rows.append(
                    (f"∂C/∂{label}", factors, numbers, number(grad[j, k].item()))
                )
        lines = [
            *prose(
                "A weight multiplies the activation at its start. So its gradient is "
                "the error of the neuron at its end times the activation of the neuron "
                "at its start:"
            ),
            "",
            *equations(rows),
            "",
            *prose(
                "The gradient is small, and the weight learns slowly, if the neuron at "
                "its start is inactive (a near 0) or the one at its end is saturated "
                "(σ' near 0, and so δ)."
            ),
            *code_lines("BP4"),
        ]
        equation = "∂C/∂W^ℓ_jk = δ^ℓ_j a^{ℓ-1}_k"
        return Section("BP4: the gradient with respect to the weights", equation, lines)

    def _step(self) -> Section:
        after = self.after.state_dict()
        moves = [
            (
                f"{label:<6} ← {p[index].item():5.2f} - {LR} · "
                f"{factor(self.gradients[name][index].item())}",
                number(after[name][index].item()),
            )
            for name, p in self.model.state_dict().items()
            for index, label in _entries(name, p)
        ]
        slope = sum(g.square().sum().item() for g in self.gradients.values())
        predicted, change = -LR * slope, self.cost_after - self.cost
        a = self.records[1].a.item()
        lines = [
            f"Every parameter moves by -η times its gradient, η = {LR}:",
            "",
            *equations(moves),
            "",
            "Forward once more, with the new parameters:",
            "",
            f"  a^2_1   before {number(a)}   after {number(self.output_after)}   "
            f"wanted {self.y.item():.0f}",
            f"  C       before {number(self.cost)}   after {number(self.cost_after)}",
            "",
            *prose(
                f"The cost changed by {change:+.4f}. The gradient predicts -η ‖∇C‖² = "
                f"{predicted:+.4f}, which holds for small steps. Learning is to "
                "repeat this many times, with other examples."
            ),
        ]
        equation = "W ← W - η ∂C/∂W,  b ← b - η ∂C/∂b"
        return Section("The step: gradient descent", equation, lines)

    def _check(self) -> Section:
        lines = [
            *prose(
                "The same gradients by PyTorch's autograd, with nn.Linear, nn.Sigmoid "
                "and the same parameters, without a line of this package:"
            ),
            "",
            f"  {'':<11}{'by hand':>18}{'native autograd':>18}{'difference':>14}",
        ]
        for name, ours in self.gradients.items():
            for index, label in _entries(name, ours):
                g, n = ours[index].item(), self.native[name][index].item()
                lines.append(f"  ∂C/∂{label:<7}{g:18.12f}{n:18.12f}{g - n:14.1e}")
        good = sum(row.ok for row in self.report)
        lines += [
            "",
            *prose(
                "Central finite differences, which nudge z, b and W and compute C, "
                f"check each equation, too: {good} of {len(self.report.rows)} agree."
            ),
            "",
            "Every gradient is right." if self.ok else "A GRADIENT IS WRONG.",
            "",
            "To continue:",
            "",
            f"  python -m torchbp tour --seed {self.seed + 1}   another network",
            "  python -m torchbp observe         a batch of examples, layer by layer",
            "  torchbp/explicit/algorithm.py     all of this as code, on one screen",
            "  python -m torchbp exercises       each equation, for you to write",
        ]
        return Section("The check: against native autograd", "", lines)


def _problem(seed: int) -> tuple[MLP, Tensor, Tensor]:
    """Return the network, an example and its target, rounded to two decimals."""
    generator = torch.Generator("cpu").manual_seed(seed)
    # The caller's random numbers do not change.
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        model = MLP(SIZES, device="cpu", dtype=torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.round(decimals=2))
    x = torch.randint(10, 100, (1, SIZES[0]), generator=generator, device="cpu")
    y = torch.randint(2, (1, SIZES[-1]), generator=generator, device="cpu")
    return model, x.double() / 100, y.double()


def _present(t: Tensor | None) -> Tensor:
    """Return a tensor that is not None, as those of a record after a backward pass."""
    assert t is not None
    return t


def _bias(record: Record) -> Tensor:
    """Return the b of a record, which every layer of the tour has."""
    return _present(record.bias)


def _entries(name: str, t: Tensor) -> Iterator[tuple[tuple[int, ...], str]]:
    """Yield the index of each entry of a parameter, and its name in the book:
    W^1_23."""
    ell = int(name.split(".")[1]) + 1
    letter = "W" if name.endswith("weight") else "b"
    for index in itertools.product(*map(range, t.shape)):
        yield index, f"{letter}^{ell}_{''.join(str(i + 1) for i in index)}"
