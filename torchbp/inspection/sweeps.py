"""One forward and backward pass, computed in three ways: by our layers, by native
autograd, and by finite differences."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchbp import costs, functional
from torchbp.inspection.agreement import close
from torchbp.inspection.observation import observe
from torchbp.inspection.records import Record
from torchbp.nn import ACTIVATIONS, BPLinear

# The step of central differences. Their error is its square, times a sixth of the third
# derivative, and the rounding error of C over the step.
STEP = 1e-5
ROUNDING = 8 * torch.finfo(torch.float64).eps
# Within two steps σ' changes by this share of its largest value at a kink only.
KINK = 0.01
# Rows of a batch that pass through a layer at once when δ is computed row by row.
ROWS = 64

Cost = Callable[[Tensor, Tensor], Tensor]
# The names of C's derivatives, by the variable.
KINDS = {
    "a": "grad_a", "z": "delta", "b": "grad_bias", "W": "grad_weight", "x": "grad_x",
}  # fmt: skip


@dataclass(eq=False)
class Call:
    """One call of one layer, with the derivatives of this call alone, which are None if
    no backward pass has reached it."""

    name: str
    function: type[functional.LinearFunction]
    x: Tensor
    W: Tensor
    b: Tensor | None
    z: Tensor
    a: Tensor
    grad_a: Tensor | None = None
    delta: Tensor | None = None
    grad_weight: Tensor | None = None
    grad_bias: Tensor | None = None
    grad_x: Tensor | None = None


@dataclass(eq=False)
class Sweep:
    """C, the calls of the layers in order, and whether the a of the last call is the
    model's output."""

    cost: Tensor
    calls: list[Call] = field(default_factory=list)
    returns_last_a: bool = False


def slope(call: Call) -> Tensor:
    """Return σ'(z) by native autograd."""
    z = call.z.detach().clone().requires_grad_()
    with torch.enable_grad():
        (result,) = torch.autograd.grad(call.function.sigma(z.clone()).sum(), z)
    return result


# ---------------------------------------------------------------- models and costs


def in_float64(t: Tensor) -> Tensor:
    """Return floating-point numbers in float64, and labels as they are."""
    return t.double() if t.is_floating_point() else t


def native_cost(cost: Any) -> Cost:
    """Return the cost for native autograd: the mean of C_x, without a backward of ours;
    another cost as it is."""
    function = getattr(cost, "function", None)
    if not (isinstance(function, type) and issubclass(function, costs.CostFunction)):
        return cost  # type: ignore[no-any-return]

    def native(v: Tensor, y: Tensor) -> Tensor:
        if not y.is_floating_point():
            y = torch.nn.functional.one_hot(y.long(), v.shape[-1]).to(v.dtype)
        return function.per_example(v, y).mean()

    return native


def plain_copy(model: nn.Module) -> nn.Module:
    """Return a copy whose weights are plain parameters that all require grad."""
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


# ---------------------------------------------------------------- ours


def by_hand(model: nn.Module, cost: Cost, input: Tensor, target: Tensor) -> Sweep:
    """Return the sweep of the hand-written layers of `model`, which may be changed."""
    layers = dict(model.named_modules())
    with observe(model) as trace:
        C = cost(model(input.clone()), target)
        if not C.requires_grad:
            raise ValueError("model: expected layers of ours that C depends on, got 0")
        C.backward()
    return Sweep(C.detach(), [_measured(layers[r.name], r) for r in trace])


def _measured(layer: Any, record: Record) -> Call:
    """Return the call of a record, with what the layer's own backward returns for its
    grad_a. (The δ and the gradients in the record are the observer's.)"""
    r = record
    call = Call(r.name, r.function, r.x, r.weight, r.bias, r.z, r.a, r.grad_a)
    if call.grad_a is None:
        return call
    with _parameters(layer, layer.weight, _bias_of(layer)):
        x = call.x.clone().requires_grad_()
        a = layer.forward(x)
        leaves = (x, layer.weight, layer.bias)
        call.grad_x, call.grad_weight, call.grad_bias = _grad(a, leaves, call.grad_a)
        call.delta = _delta(layer, call)
    return call


def _bias_of(layer: Any) -> nn.Parameter:
    """Return b, or zeros if it is None: ∂C/∂b of a single example is its δ."""
    if layer.bias is not None:
        return layer.bias
    return nn.Parameter(layer.weight.new_zeros(layer.weight.shape[0]))


@contextmanager
def _parameters(layer: Any, W: Tensor, b: Tensor) -> Iterator[None]:
    """Replace the layer's parameters within a block."""
    before = dict(layer._parameters)
    layer._parameters.update(weight=W, bias=b)
    try:
        yield
    finally:
        layer._parameters.update(before)


def _grad(a: Tensor, leaves: Any, grad_a: Tensor, **kwargs: Any) -> list[Tensor]:
    """Return the gradients by the leaves; one that the backward omits is zero, as in
    autograd."""
    grads = torch.autograd.grad(a, leaves, grad_a, allow_unused=True, **kwargs)
    return [
        torch.zeros_like(t) if g is None else g
        for g, t in zip(grads, leaves, strict=True)
    ]


def _delta(layer: Any, call: Call) -> Tensor:
    """Return δ, which no backward returns, from the gradients that are made of it: the
    right δ if one gradient contains it, since the fault is then not in δ; else the one
    in ∂C/∂b."""
    assert call.grad_a is not None
    expected = functional.as_rows(call.grad_a * slope(call))
    deltas = []
    for view in (_delta_in_bias, _delta_in_weight, _delta_in_input):
        try:
            pairs = zip(
                functional.as_rows(call.x).split(ROWS),
                functional.as_rows(call.grad_a).split(ROWS),
                strict=True,
            )
            delta = torch.cat([view(layer, x, grad_a) for x, grad_a in pairs])
        except RuntimeError:  # the backward's shapes are wrong
            continue
        deltas.append(delta)
        if close(delta, expected):
            break
    delta = (
        deltas[-1] if deltas and close(deltas[-1], expected) else [*deltas, expected][0]
    )
    return delta.reshape(call.grad_a.shape)


def _delta_in_bias(layer: Any, x: Tensor, grad_a: Tensor) -> Tensor:
    """Return δ from ∂C/∂b: its row i is ∂C/∂b for a grad_a whose other rows are 0."""
    a = layer.forward(x)
    rows = []
    for i in range(len(x)):
        row_i = torch.zeros_like(grad_a)
        row_i[i] = grad_a[i]
        rows += _grad(a, [layer.bias], row_i, retain_graph=True)
    return torch.stack(rows)


def _delta_in_weight(layer: Any, x: Tensor, grad_a: Tensor) -> Tensor:
    """Return δ from ∂C/∂W: the inputs (x, I) and the weights (W, 0) give the same z,
    and ∂C/∂W is then (δᵀx, δᵀ)."""
    eye = torch.eye(len(x), dtype=x.dtype, device=x.device)
    W = layer.weight.detach()
    W = torch.cat([W, W.new_zeros(len(W), len(x))], 1).requires_grad_()
    with _parameters(layer, W, layer.bias):
        a = layer.forward(torch.cat([x, eye], 1))
        (grad_W,) = _grad(a, [W], grad_a)
    return grad_W[:, x.shape[1] :].t()


def _delta_in_input(layer: Any, x: Tensor, grad_a: Tensor) -> Tensor:
    """Return δ from ∂C/∂x: the inputs (x, 0) and the weights (W, I) give the same z,
    and ∂C/∂x is then (δW, δ)."""
    W = layer.weight.detach()
    eye = torch.eye(len(W), dtype=W.dtype, device=W.device)
    inputs = torch.cat([x, x.new_zeros(len(x), len(W))], 1).requires_grad_()
    with _parameters(layer, torch.cat([W, eye], 1), layer.bias):
        (grad_x,) = _grad(layer.forward(inputs), [inputs], grad_a)
    return grad_x[:, x.shape[1] :]


# ---------------------------------------------------------------- native


class Twin:
    """A copy of a model whose layers are F.linear and σ, under native autograd, with a
    place to nudge x, W, b and z of each call."""

    def __init__(
        self, model: nn.Module, cost: Cost, input: Tensor, target: Tensor
    ) -> None:
        self.model, self.cost = copy.deepcopy(model), cost
        self.input, self.target = input, target
        self.calls: list[Call] = []
        self.nudged: tuple[int, str] | None = None  # the call's number, its argument
        self.nudge: Tensor | None = None
        for name, layer in self.model.named_modules():
            if isinstance(layer, BPLinear):
                layer.forward = functools.partial(self._forward, name, layer)  # type: ignore[method-assign]

    def run(self) -> tuple[Tensor, bool]:
        """Run the forward pass and fill `calls`; return C, and whether the a of the
        last call is the model's output."""
        self.calls = []
        output = self.model(self.input.clone())
        returns_last_a = bool(self.calls) and output is self.calls[-1].a
        return self.cost(output, self.target), returns_last_a

    def _forward(self, name: str, layer: BPLinear, input: Tensor) -> Tensor:
        """Run one layer as F.linear and σ."""
        if torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                f"compare: expected a model that calls {name or 'its layer'} in the "
                "forward pass only, got one with activation checkpointing"
            )
        x, W = input.clone(), layer.weight.detach()
        b = None if layer.bias is None else layer.bias.detach()
        if torch.is_grad_enabled():  # each call has leaves of its own
            for t in (x, W, b):
                if t is not None and not t.requires_grad:
                    t.requires_grad_()
        x, W = self._with_nudge("x", x), self._with_nudge("W", W)
        b = None if b is None else self._with_nudge("b", b)
        z = self._with_nudge("z", F.linear(x, W, b))
        function = type(layer).function
        a = function.sigma(z.clone())
        self.calls.append(Call(name, function, x, W, b, z, a))
        return a

    def _with_nudge(self, kind: str, t: Tensor) -> Tensor:
        """Return an argument of the current call, nudged if it is the chosen one."""
        nudged = self.nudge is not None and self.nudged == (len(self.calls), kind)
        return t + self.nudge if nudged else t  # type: ignore[operator]

    def sweep(self) -> Sweep:
        """Return the sweep of native autograd."""
        with torch.enable_grad():
            C, returns_last_a = self.run()
        places, leaves = [], []
        for call in self.calls:
            for kind, name in KINDS.items():
                t: Tensor | None = getattr(call, kind)
                if t is not None and t.requires_grad:
                    places.append((call, name))
                    leaves.append(t)
        if leaves and C.requires_grad:
            grads = torch.autograd.grad(C, leaves, allow_unused=True)
            for (call, name), grad in zip(places, grads, strict=True):
                setattr(call, name, grad)
        return Sweep(C.detach(), self.calls, returns_last_a)

    @torch.no_grad()
    def differences(
        self, number: int, kind: str, like: Call, entries: list[int]
    ) -> tuple[list[float], list[bool], float]:
        """Return ∂C/∂entry for entries of an argument of the call by central
        differences, whether a kink of a σ is within each step, and the rounding error.
        """
        factors = {"W": like.x, "x": like.W}.get(kind)
        # So that z changes by STEP at most.
        step = STEP if factors is None else STEP / max(1.0, factors.abs().amax().item())
        self.nudged, self.nudge = (number, kind), torch.zeros_like(getattr(like, kind))
        flat = self.nudge.view(-1)
        slopes, kinks, size = [], [], 0.0
        for entry in entries:
            values, gates = [], []
            for nudge in (step, -step):
                flat[entry] = nudge
                values.append(self.run()[0].item())
                gates.append([slope(c) for c in self.calls if _may_have_kinks(c)])
            flat[entry] = 0
            slopes.append((values[0] - values[1]) / (2 * step))
            largest = [c.function.max_slope for c in self.calls if _may_have_kinks(c)]
            kinks.append(
                any(
                    ((up - down).abs() > KINK * most).any().item()
                    for up, down, most in zip(*gates, largest, strict=True)
                )
            )
            size = max(size, *map(abs, values))
        self.nudged = self.nudge = None
        return slopes, kinks, ROUNDING * size / step


# Identified by σ, since a subclass of a built-in Function may have a σ of its own.
_SMOOTH = [
    layer.function.sigma for layer in ACTIVATIONS.values() if layer.function.is_smooth
]


def _may_have_kinks(call: Call) -> bool:
    """Return whether σ of the call is not known to be smooth."""
    return call.function.sigma not in _SMOOTH
