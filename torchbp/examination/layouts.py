"""Checks of memory layouts, missing gradients, N-d and empty inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from torchbp.examination.derivatives import must_be_right_at
from torchbp.examination.subject import Subject
from torchbp.examination.tools import differences, first_line
from torchbp.examination.verdicts import (
    Fail,
    NotApplicable,
    NotSupported,
    Warn,
    must_equal,
    must_run,
    needs_float64,
    needs_own_graph,
    numbered,
    same_gradients,
    supported,
)

# The same numbers elsewhere in memory ("stride 0" repeats the first).
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "narrow": lambda t: torch.cat([t, t, t], -1).narrow(-1, t.shape[-1], t.shape[-1]),
    "strided": lambda t: torch.stack([t, t + 1], -1).flatten(-2)[..., ::2],
    "stride 0": lambda t: t.flatten()[0].expand(t.shape),
}
_STRIDES = "it may have any strides: use reshape for view, and write nothing into it"
_NONE = "treat None: a missing output gradient is zero"
_LEADING = "treat all leading dimensions as one: t.reshape(-1, t.shape[-1])"


def output_gradient_layouts(s: Subject) -> str:
    """Output gradients of any strides give what contiguous ones give."""
    _, outputs = s.new_graph()
    if all(y.dim() == 0 or y.numel() == 0 for y in outputs):
        raise NotApplicable("0-d outputs: one layout")
    cotangents = s.cotangents(outputs)
    for name, lay in LAYOUTS.items():
        gs = [lay(g) if g.dim() and g.numel() else g for g in cotangents]
        plain = [g.contiguous().clone() for g in gs]
        _, right = s.gradients(s.copies(), cotangents=plain)
        which = f"from an output gradient that is {name},"
        with must_run(f"{which} the backward", _STRIDES):
            _, grads = s.gradients(s.copies(), cotangents=gs)
        same_gradients(s, grads, right, which, _STRIDES)
    return ", ".join(LAYOUTS)


def input_layouts(s: Subject) -> str:
    """Inputs of any strides give what contiguous ones give; a forward that refuses them
    is fragile, but right."""
    right = s.gradients(s.copies())
    fix = "use .contiguous() before view, strides or pointers; prefer reshape"
    layouts = {name: lay for name, lay in LAYOUTS.items() if name != "stride 0"}
    warning: Warn | None = None
    for name, lay in layouts.items():
        for i, t in enumerate(s.arguments[: s.inputs]):
            if not isinstance(t, Tensor) or t.dtype == torch.bool:
                continue
            if not (t.dim() and t.numel()):
                continue
            arguments = s.copies()
            arguments[i] = lay(arguments[i]).detach()
            leaves = s.leaves(arguments)
            what = f"with {s.labels[i]} {name},"
            try:
                with must_run(what, fix, Warn):
                    outputs = s.evaluate(arguments) if s.in_place else s.call(arguments)
            except Warn as warn:
                warning = warning or warn
                continue
            with must_run(f"{what} the backward", fix):
                ours = outputs, s.pull_back(outputs, leaves)
            try:
                must_equal(s, ours, right, s.tolerance(), fix)
            except Fail as fail:
                raise Fail(f"{what} {fail.reason}", fix) from None
    if warning:
        raise warning
    return ", ".join(layouts)


class _Swallow(Function):
    """Returns no gradient, so that what comes before it receives None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:  # type: ignore[override]
        return None


def undefined_gradients(s: Subject) -> str:
    """A missing output gradient is a zero one."""
    needs_own_graph(s)
    leaves, outputs = s.new_graph()
    with must_run("without an output gradient, the backward", _NONE):
        ends = [_Swallow.apply(y).sum() for y in outputs]
        grads = torch.autograd.grad(ends, leaves, allow_unused=True)
    for grad, label in zip(grads, s.names, strict=True):
        if grad is not None and not (grad == 0).all():
            raise Fail(f"without an output gradient, {label} gets one", _NONE)
    if len(outputs) == 1:
        return "none gives none"
    for k in range(len(outputs)):
        leaves, outputs = s.new_graph()
        (g,) = s.cotangents([outputs[k]])
        gs = [g if j == k else torch.zeros_like(o) for j, o in enumerate(outputs)]
        right = s.pull_back(outputs, leaves, gs)
        leaves, outputs = s.new_graph()
        with must_run(f"from output {k} alone, the backward", _NONE):
            ours = s.pull_back([outputs[k]], leaves, [g])
        same_gradients(s, ours, right, f"from output {k} alone,", _NONE)
    return "none gives none, and each output alone"


def n_d_inputs(s: Subject) -> str:
    """Fewer and more leading dimensions have right gradients, too."""
    needs_float64(s)
    if not s.rows:
        raise NotApplicable("no inputs whose rows are examples")
    passed, refused = [], {}
    warning: Warn | None = None
    for make in (
        lambda t: t[0],
        lambda t: torch.stack([t, t.flip(0)]),
        lambda t: torch.stack([t, t.flip(0)]).unsqueeze(1),
    ):
        arguments = s.copies()
        for i in s.rows:
            arguments[i] = make(arguments[i]).contiguous()
        name = f"{arguments[s.rows[0]].dim()}-D"
        try:
            outputs = s.evaluate(arguments)
        except Exception as error:
            refused[name] = first_line(error)
            continue
        if not outputs:
            continue
        try:
            with must_run(f"{name}: the forward ran, but the backward", _LEADING, Warn):
                s.gradients(arguments)
        except Warn as warn:
            warning = warning or warn
            continue
        must_be_right_at(s, arguments, name, _LEADING)
        if s.reference is not None:
            _as_reference(s, arguments, name)
        passed.append(name)
    if warning:
        raise warning
    if not passed:
        raise NotSupported("; ".join(f"{n}: {e}" for n, e in refused.items()))
    return ", ".join(passed) + "".join(f"; not {name}" for name in refused)


def _as_reference(s: Subject, arguments: list[Any], name: str) -> None:
    """Fail unless the values are the reference's, where that takes these arguments."""
    try:
        right = s.evaluate(arguments, s.reference)
    except Exception:
        return
    ours = s.evaluate(arguments)
    tolerance = max(s.tolerance(), s.tolerance(torch.float32) / 10)
    if len(ours) == len(right) and (
        text := differences(ours, right, numbered(right), tolerance)
    ):
        raise Fail(f"{name}: the value of the {text}", "correct the forward")


def empty_inputs(s: Subject) -> str:
    """No rows give no gradient, without an error."""
    if not s.rows:
        raise NotApplicable("no inputs whose rows are examples")
    arguments = s.cut(s.copies(), s.rows, slice(0, 0))
    with supported():
        leaves = s.leaves(arguments)
        outputs = s.differentiable(arguments)
    with must_run("the forward ran, but the backward", verdict=Warn):
        grads = s.pull_back(outputs, leaves)
    for grad, leaf, label in zip(grads, leaves, s.names, strict=True):
        if grad.shape != leaf.shape or grad.any():
            raise Warn(
                f"the gradient of {label} is not zero",
                "take no mean over the rows: of none it is NaN",
            )
    return "no rows, no gradient"
