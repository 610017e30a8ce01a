"""compare: every equation of every layer beside native autograd and finite differences.

:mod:`torchbp.inspection.sweeps` runs the passes, :mod:`torchbp.inspection.agreement`
has the report. This module chooses the quantities to compare, and finds the fault.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from torchbp import functional
from torchbp._checks import explain_storage
from torchbp.inspection.agreement import (
    Agreement,
    Comparison,
    Row,
    agree,
    close,
    tolerance,
)
from torchbp.inspection.observation import observe
from torchbp.inspection.sweeps import (
    KINDS,
    Call,
    Sweep,
    Twin,
    by_hand,
    in_float64,
    native_cost,
    plain_copy,
    slope,
)
from torchbp.nn import MLP, BPLinear, check_takes

__all__ = ["compare"]

# Entries of each quantity at which finite differences are taken: half of them have the
# largest gradients, half are drawn. In MNIST four of five pixels are 0, and so are the
# gradients of their weights.
SAMPLED = 50
NUMERIC_TOLERANCE = 1e-5  # a share of the largest entry


def compare(model: nn.Module, cost: Any, input: Tensor, target: Tensor) -> Comparison:
    """Compare BP1-BP4 of every layer with native autograd and with central finite
    differences.

    Ours is what the layers' own backwards return, in the model's dtype and in float64.
    Native is the same model with z = F.linear(x, W, b) and a = σ(z) under autograd, and
    the mean of C_x for a cost of this package (``define_cost`` included); any other
    cost is used as it is. Finite differences nudge z (each example's own), b, W, and
    the input of a layer that no layer of ours feeds, in float64, at 50 entries of each:
    the 25 with the largest gradients and 25 drawn with a fixed seed. The tolerance is
    √ε of the largest entry for native (3e-4 in float32, 1.5e-8 in float64), and 1e-5 of
    it for finite differences.

    It takes some hundreds of forward passes for each layer. A mini-batch is enough: a
    large batch shows no more.

    The model is copied: the model, its ``.grad``, mode and buffers, and the state of
    the random numbers do not change. Frozen layers are compared, too.

    Args:
        model: an MLP, an ``nn.Sequential`` of our layers, or any other module with some
            of them; if other modules are in between, BP2 is compared in its two halves.
        cost: a cost of this package, or any callable with `takes`.
        input, target: what the model and the cost take.

    Returns:
        the rows of all equations; `str()` of it is a table.

    Raises:
        TypeError: an argument is of another type, or the cost does not say what it
            takes.
        ValueError: the cost does not fit the last layer; no layer of ours takes part in
            C; C is not finite, or differs when computed twice (dropout: call ``eval()``
            first); the model is compiled, or cannot be copied; a layer has a forward of
            its own, or a weight that a hook computes.
        RuntimeError: it is called under autocast, torch.compile or a torch.func
            transform; the model has activation checkpointing; or a backward raises.

    Examples:
        >>> import torch, torchbp
        >>> model = torchbp.MLP([3, 4, 2])
        >>> report = torchbp.compare(
        ...     model, torchbp.QuadraticCost(), torch.rand(5, 3), torch.rand(5, 2)
        ... )
        >>> report.ok, [row.equation for row in report]
        (True, ['A1', 'BP1', 'BP3', 'BP4', 'BP2', 'BP3', 'BP4', 'BP2'])
    """
    _check(model, cost, input, target)
    devices = {t.device for t in [*model.parameters(), *model.buffers()]}
    cuda = [device for device in devices if device.type == "cuda"]
    with (
        torch.random.fork_rng(devices=cuda),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        return _Comparer(model, cost, input, target).report()


def _check(model: Any, cost: Any, input: Any, target: Any) -> None:
    """Raise the errors that need no pass."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {type(model).__name__}")
    check_takes(model, cost)
    for name, t in (("input", input), ("target", target)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(t).__name__}")
        if (reason := explain_storage(name, t)) is not None:
            raise reason
        if t.numel() == 0:
            raise ValueError(
                f"{name}: expected at least one example, got shape {tuple(t.shape)}"
            )
    if (
        torch._C._is_any_autocast_enabled()
        or functional.transforming()
        or torch.compiler.is_compiling()
    ):
        raise RuntimeError(
            "compare: expected to run outside autocast, torch.compile and torch.func"
        )
    with observe(model):  # raises if it has no layers of ours, or is compiled
        pass


class _Comparer:
    """The sweeps of one comparison, ours and native's, in the model's dtype and in
    float64, and the report about them."""

    def __init__(
        self, model: nn.Module, cost: Any, input: Tensor, target: Tensor
    ) -> None:
        own = plain_copy(model)
        x, y, native = input.detach(), target, native_cost(cost)
        self.hand = by_hand(copy.deepcopy(own), cost, x, y)
        self.native = Twin(own, native, x, y).sweep()
        if any(p.device.type == "mps" for p in own.parameters()):  # has no float64
            own, x, y = own.cpu(), x.cpu(), y.cpu()
        own, x, y = own.double(), in_float64(x), in_float64(y)
        self.hand_64 = by_hand(copy.deepcopy(own), cost, x, y)
        self.twin = Twin(own, native, x, y)
        self.native_64 = self.twin.sweep()
        self._check_repeatable()
        # The numbers of the calls on which C depends.
        self.numbers = self._matched()
        self.takes = cost.takes
        self.chain = is_chain(model)

    def _check_repeatable(self) -> None:
        """Raise ValueError if two passes differ, or C is not finite."""
        C = self.native_64.cost.item()
        if not math.isfinite(C):
            raise ValueError(f"cost: expected a finite value, got {C}")
        with torch.no_grad():
            second = self.twin.run()[0].item()
        if not math.isclose(C, second, rel_tol=1e-9, abs_tol=1e-300):
            raise ValueError(
                f"model: expected the same cost twice, got {C:.6g} and {second:.6g}; "
                "if it draws random numbers, as dropout does, call eval() first"
            )

    def _matched(self) -> list[int]:
        """Return the numbers of the calls on which C depends; raise ValueError if the
        sweeps differ in calls or values."""
        sweeps = (self.hand, self.hand_64, self.native, self.native_64)
        numbers = []
        for number, calls in enumerate(zip(*(s.calls for s in sweeps), strict=True)):
            _, hand, _, native = calls
            name = native.name or "model"
            if not close(hand.a, native.a):
                raise ValueError(
                    f"{name}: expected a = σ(x Wᵀ + b), got a layer with a forward of "
                    "its own"
                )
            if native.delta is not None:
                numbers.append(number)
                for call in calls:
                    _fill(call)
            elif hand.delta is not None:
                raise ValueError(
                    f"{name}: expected a layer that autograd reaches from C, got one "
                    "under no_grad or activation checkpointing"
                )
        if not numbers:
            raise ValueError("model: expected layers of ours that C depends on, got 0")
        return numbers

    def report(self) -> Comparison:
        """Return all rows, from the cost down to the first layer."""
        cost = self._row("A1", -1, "C = 1/n Σ_x C_x", "cost")
        rows = [cost]
        for number in reversed(self.numbers):
            rows += self._layer(number)
        wrong = [row for row in rows if not row.ok]
        if wrong and not any(row.fault for row in wrong):
            wrong[0].fault = "finite differences give another value"
        layers = [
            f"layer {self._index(number)}: {call.name or 'the model'}, "
            f"{' x '.join(map(str, call.x.shape))} → {call.W.shape[0]}"
            for number, call in enumerate(self.hand.calls)
            if number in self.numbers
        ]
        dtype = self.hand.calls[self.numbers[-1]].W.dtype
        return Comparison(rows, layers, dtype)

    def _index(self, number: int) -> int:
        """Return ℓ of a call."""
        return self.numbers.index(number) + 1

    def _above(self, number: int) -> int | None:
        """Return the number of the call whose only input is the a of this one, or
        None."""
        return number + 1 if self.chain and number < self.numbers[-1] else None

    def _is_last(self, number: int) -> bool:
        """Return whether the cost takes the a of the call."""
        return self.native.returns_last_a and number == len(self.native.calls) - 1

    def _layer(self, number: int) -> list[Row]:
        """Return the equations of one call."""
        ell, call = self._index(number), self.native.calls[number]
        gate = f" ⊙ σ'(z^{ell})"
        below = f"a^{ell - 1}" if self.chain else f"x^{ell}"
        if self._is_last(number):
            takes_z = self.takes == "z"
            formula = "∇_z C" if takes_z else f"∇_a C{gate}"
            rows = [self._row("BP1", number, f"δ^{ell} = {formula}", "delta", "z")]
        else:
            from_above = f"∂C/∂a^{ell}"
            if self._above(number) is not None:
                from_above = f"(W^{ell + 1})ᵀ δ^{ell + 1}"
            formula = f"δ^{ell} = {from_above}{gate}"
            rows = [self._row("BP2", number, formula, "delta", "z")]
        if call.b is not None:
            rows.append(
                self._row("BP3", number, f"∂C/∂b^{ell} = Σ_x δ^{ell}", "grad_bias", "b")
            )
        formula = f"∂C/∂W^{ell} = Σ_x δ^{ell} ({below})ᵀ"
        rows.append(self._row("BP4", number, formula, "grad_weight", "W"))
        if not self.chain or number == self.numbers[0]:
            formula = f"∂C/∂{below} = (W^{ell})ᵀ δ^{ell}"
            rows.append(self._row("BP2", number, formula, "grad_x", "x"))
        return rows

    def _row(
        self, equation: str, number: int, formula: str, quantity: str, kind: str = ""
    ) -> Row:
        """Return the row of one quantity, of a call or, for the number -1, of the
        sweep."""

        def of(sweep: Sweep) -> Tensor:
            """Return the quantity in `sweep`."""
            t: Tensor = getattr(sweep if number < 0 else sweep.calls[number], quantity)
            return t

        own = agree(of(self.hand), of(self.native))
        in_64 = agree(of(self.hand_64), of(self.native_64))
        ell, name = 0, ""
        if number >= 0:
            ell, name = self._index(number), self.hand.calls[number].name
        row = Row(equation, ell, name, formula, own)
        if kind:
            doubts = None
            if not in_64.ok:
                doubts = of(self.hand_64) - of(self.native_64)
            self._differentiate(row, number, kind, of(self.hand_64), doubts)
        if not in_64.ok and _sides_with_ours(row, in_64):
            in_64, row.overruled = replace(in_64, ok=True), True
        if not own.ok and in_64.ok and _near(of(self.hand), of(self.hand_64)):
            own, row.overruled = replace(own, ok=True), True
        row.native = own if in_64.ok or not own.ok else in_64
        if not row.ok:
            pairs = [(self.hand, self.native), (self.hand_64, self.native_64)]
            if own.ok:
                del pairs[0]
            row.fault = next(
                filter(None, (self._fault(*p, number, quantity) for p in pairs)), ""
            )
        return row

    def _differentiate(
        self, row: Row, number: int, kind: str, ours: Tensor, doubts: Tensor | None
    ) -> None:
        """Add finite differences to a row, at some of its entries: those with the
        largest `doubts` if there are any, else those with the largest gradients."""
        call = self.native_64.calls[number]
        expected: Tensor = getattr(call, KINDS[kind])
        entries = _entries(expected if doubts is None else doubts)
        slopes, kinks, rounding = self.twin.differences(number, kind, call, entries)
        smooth = [i for i, kink in enumerate(kinks) if not kink]
        row.entries, row.kinks = expected.numel(), len(entries) - len(smooth)
        largest = expected.abs().amax().item() if expected.numel() else 0.0
        if not smooth or 0 < largest < 10 * rounding:
            return
        row.sampled = len(smooth)
        actual = ours.detach().cpu().reshape(-1)[[entries[i] for i in smooth]]
        numeric = actual.new_tensor([slopes[i] for i in smooth])
        absolute = (actual - numeric).abs().amax().item()
        ok = absolute <= NUMERIC_TOLERANCE * largest + rounding
        relative = absolute / largest if largest else 0.0 if ok else math.inf
        row.numeric = Agreement(ok, absolute == 0, absolute, relative)

    def _fault(self, hand: Sweep, native: Sweep, number: int, quantity: str) -> str:
        """Return the part of the equation that is wrong, given the quantities on its
        right-hand side, or ""."""
        if quantity == "cost":
            return "C is not the mean of the examples' C_x"
        call, ell, faults = hand.calls[number], self._index(number), []
        assert call.delta is not None and call.grad_a is not None
        delta, x = functional.as_rows(call.delta), functional.as_rows(call.x)
        if quantity == "delta":
            above = self._above(number)
            if self._is_last(number):
                expected = native.calls[number].grad_a
                assert expected is not None
                if not close(call.grad_a, expected):
                    faults.append(f"∇_{self.takes} C, which the cost returns,")
            elif above is not None:
                feeds = hand.calls[above]
                assert feeds.delta is not None
                if not close(call.grad_a, feeds.delta @ feeds.W):
                    faults.append(
                        f"(W^{ell + 1})ᵀ δ^{ell + 1}, which "
                        f"{feeds.name or 'the layer'} returns,"
                    )
            if not close(call.delta, call.grad_a * slope(call)):
                faults.append(f"σ'(z^{ell})")
        else:
            right = {
                "grad_bias": lambda: delta.sum(0),
                "grad_weight": lambda: torch.einsum("xj,xk->jk", delta, x),
                "grad_x": lambda: torch.einsum("xj,jk->xk", delta, call.W),
            }[quantity]()
            left: Tensor = getattr(call, quantity)
            if not close(left, right.reshape(left.shape)):
                faults.append("the left-hand side")
        return " and ".join(faults) + " is wrong" if faults else ""


def _sides_with_ours(row: Row, native: Agreement) -> bool:
    """Return whether finite differences are much nearer to ours than native is. At
    saturation autograd may subtract nearly equal numbers."""
    numeric = row.numeric
    return (
        numeric is not None
        and numeric.ok
        and not row.kinks
        and numeric.absolute < native.absolute / 10
    )


def _near(actual: Tensor, expected: Tensor) -> bool:
    """Return whether numbers of a shorter dtype agree with float64 to that dtype's
    √ε."""
    return agree(actual, expected, tolerance(actual)).ok


def _fill(call: Call) -> None:
    """Set the gradients of a call that no backward pass has reached to zero."""
    for kind, name in KINDS.items():
        t = getattr(call, kind)
        if getattr(call, name) is None and t is not None:
            setattr(call, name, torch.zeros_like(t))


def _entries(gradient: Tensor) -> list[int]:
    """Return the entries at which finite differences are taken."""
    flat = gradient.detach().abs().reshape(-1).cpu()
    if len(flat) <= SAMPLED:
        return list(range(len(flat)))
    largest = flat.topk(SAMPLED // 2).indices.tolist()
    generator = torch.Generator("cpu").manual_seed(0)
    drawn = torch.randperm(len(flat), generator=generator, device="cpu").tolist()
    return list(dict.fromkeys(largest + drawn))[:SAMPLED]


def is_chain(model: nn.Module) -> bool:
    """Return whether, by the structure of `model`, each layer of ours feeds the next
    and nothing else. In an ``nn.Sequential`` other modules may precede the first."""
    if model._forward_hooks or model._forward_pre_hooks:
        return False
    if isinstance(model, BPLinear):
        return True
    if type(model) is MLP:
        return all(map(is_chain, model.layers))
    if type(model) is not nn.Sequential:
        return False
    children = list(model)
    while children and not any(isinstance(m, BPLinear) for m in children[0].modules()):
        children.pop(0)
    return bool(children) and all(map(is_chain, children))
