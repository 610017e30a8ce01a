"""Every equation of every layer beside native autograd and finite differences."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from textwrap import wrap
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchbp import costs, functional
from torchbp._checks import explain_storage
from torchbp._terminal import aligned, html_table
from torchbp.inspection.observation import observe
from torchbp.inspection.sweeps import (
    KINDS,
    Agreement,
    Call,
    Cost,
    Sweep,
    Twin,
    agree,
    by_hand,
    close,
    slope,
    tolerance,
)
from torchbp.nn import MLP, BPLinear, check_takes

__all__ = ["Agreement", "Comparison", "Row", "compare"]

# Finite differences are taken at so many entries of each quantity: half of them those
# with the largest gradients, half drawn (in MNIST four of five pixels are 0, and so are
# the gradients of their weights).
SAMPLED = 50
# Of the largest entry; native autograd in float64 is held to 1.5e-8.
NUMERIC_TOLERANCE = 1e-5


@dataclass
class Row:
    """One equation at one layer.

    Attributes:
        equation: "BP1" ... "BP4", or "A1" for the cost itself.
        layer: ℓ, counted over the calls from 1; 0 for the cost.
        name: the layer's name in the model.
        formula: the equation at this layer.
        native: ours against native autograd, in the model's own dtype (in float64 if
            they agree there only in the former).
        numeric: ours against finite differences, in float64; None where they tell
            nothing, since C moves by less than it is rounded.
        sampled, entries: at how many entries of how many they were taken.
        kinks: at how many entries they mean nothing, a kink of σ being within the step.
        overruled: whether native and ours differ, and native is what is off: in float64
            finite differences side with ours, or float64 with our shorter dtype.
        fault: what is wrong in the equation itself; "" if nothing is, or if it is wrong
            only through what it is built on.

    Examples:
        >>> same = Agreement(ok=True, exact=True, absolute=0.0, relative=0.0)
        >>> row = Row("BP3", 1, "layers.0", "∂C/∂b^1 = Σ_x δ^1", same)
        >>> row.ok, row.left
        (True, '∂C/∂b^1')
    """

    equation: str
    layer: int
    name: str
    formula: str
    native: Agreement
    numeric: Agreement | None = None
    sampled: int = 0
    entries: int = 0
    kinks: int = 0
    overruled: bool = False
    fault: str = ""

    @property
    def ok(self) -> bool:
        """Whether ours agrees with native, and with differences where they tell."""
        return self.native.ok and (self.numeric is None or self.numeric.ok)

    @property
    def left(self) -> str:
        """The left-hand side of the formula."""
        return self.formula.partition(" = ")[0]

    def cells(self) -> list[str]:
        """The row of the table."""
        cells = [f"{self.equation:<3}  {self.formula}"]
        for agreement in (self.native, self.numeric):
            if agreement is None:
                cells += ["—", "—", "—"]
            else:
                numbers = agreement.absolute, agreement.relative
                cells += [agreement.word, *(f"{x:.1e}" if x else "0" for x in numbers)]
        sampled = f"{self.sampled} of {self.entries}" if self.entries else "—"
        return [*cells, sampled]


@dataclass
class Comparison:
    """What :func:`compare` found; `str()` is a table.

    Attributes:
        rows: the equations, from the last layer to the first, as a backward pass goes.
        layers: what each layer is, in words.
        dtype: that of the model.

    Examples:
        >>> import torch, torchbp
        >>> model = torchbp.MLP([3, 2])
        >>> report = torchbp.compare(
        ...     model, torchbp.QuadraticCost(), torch.rand(5, 3), torch.rand(5, 2)
        ... )
        >>> report.faults, report.layers
        ([], ['layer 1: layers.0, 5 x 3 → 2'])
    """

    rows: list[Row]
    layers: list[str]
    dtype: torch.dtype

    @property
    def ok(self) -> bool:
        """Whether every equation agrees with both."""
        return all(row.ok for row in self.rows)

    @property
    def faults(self) -> list[Row]:
        """The rows that are wrong by themselves, not through others."""
        return [row for row in self.rows if row.fault]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __str__(self) -> str:
        return "\n".join(
            [*self._above(), "", aligned(self._lines(), 1), "", *self._below()]
        )

    def _repr_html_(self) -> str:
        words = {"exact": "good", "≈": "good", "WRONG": "bad"}
        caption = "\n".join([*self._above(), *self._below()])
        return html_table(caption, self._lines(), left=1, verdicts=words)

    def _above(self) -> list[str]:
        """What was compared."""
        dtype = str(self.dtype).removeprefix("torch.")
        beside = f"beside native autograd in {dtype}, and finite differences in float64"
        return [*self.layers, beside]

    def _lines(self) -> list[list[str]]:
        """The table's headings and rows."""
        titles = "equation|native|max diff|relative|finite|max diff|relative|entries"
        return [titles.split("|"), *(row.cells() for row in self.rows)]

    def _below(self) -> list[str]:
        """What is to be said of the rows."""
        lines: list[str] = []
        kinks = [f"{row.kinks} of {row.left}" for row in self.rows if row.kinks]
        if kinks:
            lines += wrap(f"left out, next to a kink of σ: {', '.join(kinks)}", 96)
        overruled = [row.left for row in self.rows if row.overruled]
        if overruled:
            lines += wrap(
                f"digits lost by native, not by ours: {', '.join(overruled)}", 96
            )
        wrong = sum(not row.ok for row in self.rows)
        lines.append(
            f"{len(self.rows) - wrong} of {len(self.rows)} equations agree"
            + (", the others because of:" if wrong else "")
        )
        lines += [
            f"{row.equation} of {row.name or 'the model'}: {row.fault}"
            for row in self.faults
        ]
        return lines


def compare(model: nn.Module, cost: Any, input: Tensor, target: Tensor) -> Comparison:
    """Set BP1-BP4 of every layer beside native autograd and beside central finite
    differences.

    Ours is what the layers' own backwards make, in the model's dtype and in float64.
    Native is the same model with z = F.linear(x, W, b) and a = σ(z) under autograd, and
    for a cost of this package (``define_cost`` included) the mean of its C_x; another
    cost is taken as it is. Finite differences nudge z (each example's own), b, W, and
    the input of a layer that no layer of ours feeds, in float64, at 50 entries of each:
    the 25 with the largest gradients and 25 drawn with a fixed seed. "Equal" is to √ε
    of the largest entry for native (3e-4 in float32, 1.5e-8 in float64), 1e-5 of it for
    finite differences.

    It takes some hundreds of forward passes for each layer, so a mini-batch is the
    right size: it tells as much as a large batch.

    The model is copied: itself, its ``.grad``, its mode and buffers, and the random
    numbers stay as they are. Frozen layers are compared too.

    Args:
        model: an MLP, an ``nn.Sequential`` of our layers, or any other module with some
            of them; around those, BP2 is compared in its two halves.
        cost: of this package, or any callable with `takes`.
        input, target: what the model and the cost take.

    Raises:
        TypeError: an argument is of another type, or the cost does not say what it
            takes.
        ValueError: the cost does not fit the last layer; no layer of ours takes part in
            C; C is not finite, or differs when computed twice (dropout: call ``eval()``
            first); the model is compiled, or cannot be copied; a layer has a forward of
            its own, or a weight that a hook computes.
        RuntimeError: under autocast, torch.compile or a torch.func transform; the model
            has activation checkpointing; or a backward raises.

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
    """Refuse what can be refused before anything runs."""
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
    with observe(model):  # refuses what has no layers of ours, or is compiled
        pass


class _Comparer:
    """The sweeps of one comparison: ours and native's, in the model's dtype and in
    float64."""

    def __init__(
        self, model: nn.Module, cost: Any, input: Tensor, target: Tensor
    ) -> None:
        own = _copy(model)
        x, y, native = input.detach(), target, _native(cost)
        self.hand = by_hand(copy.deepcopy(own), cost, x, y)
        self.native = Twin(own, native, x, y).sweep()
        if any(p.device.type == "mps" for p in own.parameters()):  # has no float64
            own, x, y = own.cpu(), x.cpu(), y.cpu()
        own, x, y = own.double(), _double(x), _double(y)
        self.hand_64 = by_hand(copy.deepcopy(own), cost, x, y)
        self.twin = Twin(own, native, x, y)
        self.native_64 = self.twin.sweep()
        self._check_repeatable()
        # The calls that C depends on, by their numbers.
        self.numbers = self._matched()
        self.takes = cost.takes
        self.chain = is_chain(model)

    def _check_repeatable(self) -> None:
        """Refuse what differs from one pass to the next: nothing could be compared."""
        C = self.native_64.cost.item()
        if not math.isfinite(C):
            raise ValueError(f"cost: expected a finite value, got {C}")
        with torch.no_grad():
            again = self.twin.run()[0].item()
        if not math.isclose(C, again, rel_tol=1e-9, abs_tol=1e-300):
            raise ValueError(
                f"model: expected the same cost twice, got {C:.6g} and {again:.6g}; "
                "if it draws random numbers, as dropout does, call eval() first"
            )

    def _matched(self) -> list[int]:
        """The numbers of the calls that C depends on, after a look at whether all have
        the same calls and values."""
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
        """All rows, from the cost down to the first layer."""
        cost = self._row("A1", -1, "C = 1/n Σ_x C_x", "cost")
        rows = [cost]
        for number in reversed(self.numbers):
            rows += self._layer(number)
        wrong = [row for row in rows if not row.ok]
        if wrong and not any(row.fault for row in wrong):
            wrong[0].fault = "it is not what finite differences say"
        layers = [
            f"layer {self._index(number)}: {call.name or 'the model'}, "
            f"{' x '.join(map(str, call.x.shape))} → {call.W.shape[0]}"
            for number, call in enumerate(self.hand.calls)
            if number in self.numbers
        ]
        dtype = self.hand.calls[self.numbers[-1]].W.dtype
        return Comparison(rows, layers, dtype)

    def _index(self, number: int) -> int:
        """ℓ of a call."""
        return self.numbers.index(number) + 1

    def _above(self, number: int) -> int | None:
        """The number of the call that `number` feeds alone and directly, if any."""
        return number + 1 if self.chain and number < self.numbers[-1] else None

    def _is_last(self, number: int) -> bool:
        """Whether the call's a is what the cost takes."""
        return self.native.last and number == len(self.native.calls) - 1

    def _layer(self, number: int) -> list[Row]:
        """The equations of one call."""
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
        """One quantity, of a call or (number -1) of the whole sweep, in all three
        ways."""

        def of(sweep: Sweep) -> Tensor:
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
        """The finite differences of a row, at some of its entries: those with the
        largest doubts, if there are any, instead of the largest gradients."""
        call = self.native_64.calls[number]
        expected: Tensor = getattr(call, KINDS[kind])
        entries = _entries(expected if doubts is None else doubts)
        slopes, kinks, rounding = self.twin.differences(number, kind, call, entries)
        kept = [i for i, kink in enumerate(kinks) if not kink]
        row.entries, row.kinks = expected.numel(), len(entries) - len(kept)
        largest = expected.abs().amax().item() if expected.numel() else 0.0
        if not kept or 0 < largest < 10 * rounding:
            return
        row.sampled = len(kept)
        actual = ours.detach().cpu().reshape(-1)[[entries[i] for i in kept]]
        numeric = actual.new_tensor([slopes[i] for i in kept])
        absolute = (actual - numeric).abs().amax().item()
        ok = absolute <= NUMERIC_TOLERANCE * largest + rounding
        relative = absolute / largest if largest else 0.0 if ok else math.inf
        row.numeric = Agreement(ok, absolute == 0, absolute, relative)

    def _fault(self, hand: Sweep, native: Sweep, number: int, quantity: str) -> str:
        """What of the equation does not follow from its own right-hand side."""
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
    """Whether finite differences are nearer to ours than native is, by far: at
    saturation autograd may take nearly equal numbers from each other."""
    numeric = row.numeric
    return (
        numeric is not None
        and numeric.ok
        and not row.kinks
        and numeric.absolute < native.absolute / 10
    )


def _near(actual: Tensor, expected: Tensor) -> bool:
    """Whether numbers of a short dtype are, to its √ε, those in float64."""
    return agree(actual, expected, tolerance(actual)).ok


def _fill(call: Call) -> None:
    """A gradient that did not arrive is zero."""
    for kind, name in KINDS.items():
        t = getattr(call, kind)
        if getattr(call, name) is None and t is not None:
            setattr(call, name, torch.zeros_like(t))


def _entries(gradient: Tensor) -> list[int]:
    """Where finite differences are taken."""
    flat = gradient.detach().abs().reshape(-1).cpu()
    if len(flat) <= SAMPLED:
        return list(range(len(flat)))
    largest = flat.topk(SAMPLED // 2).indices.tolist()
    generator = torch.Generator("cpu").manual_seed(0)
    drawn = torch.randperm(len(flat), generator=generator, device="cpu").tolist()
    return list(dict.fromkeys(largest + drawn))[:SAMPLED]


def _double(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


def _native(cost: Any) -> Cost:
    """The cost under native autograd: the mean of C_x as its definition has it."""
    function = getattr(cost, "function", None)
    if not (isinstance(function, type) and issubclass(function, costs.CostFunction)):
        return cost  # type: ignore[no-any-return]

    def native(v: Tensor, y: Tensor) -> Tensor:
        if not y.is_floating_point():
            y = torch.nn.functional.one_hot(y.long(), v.shape[-1]).to(v.dtype)
        return function.per_example(v, y).mean()

    return native


def _copy(model: nn.Module) -> nn.Module:
    """A copy whose weights are plain parameters that all require grad."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, BPLinear)}
    for name, layer in layers.items():
        if not (parametrize.is_parametrized(layer) or "weight" in layer._parameters):
            raise ValueError(
                f"{name or 'model'}: expected a weight that is a parameter, got one "
                "that a hook computes; make it permanent (prune.remove) first"
            )
    try:
        own = copy.deepcopy(model)
    except RuntimeError as error:
        raise ValueError(
            f"model: expected one that can be copied, got {type(model).__name__}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    for parameter in own.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_()
    for name in layers:
        twin = own.get_submodule(name)
        if parametrize.is_parametrized(twin):
            for parametrized in list(twin.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(twin, parametrized)
    return own


def is_chain(model: nn.Module) -> bool:
    """Whether each layer of ours feeds the next, and nothing else, by the structure:
    what comes before the first of an ``nn.Sequential`` may be anything."""
    if model._forward_hooks or model._forward_pre_hooks:
        return False
    if isinstance(model, BPLinear):
        return True
    if type(model) is MLP:
        return all(map(is_chain, model.layers))
    if type(model) is not nn.Sequential:
        return False
    rest = list(model)
    while rest and not any(isinstance(m, BPLinear) for m in rest[0].modules()):
        rest.pop(0)
    return bool(rest) and all(map(is_chain, rest))
