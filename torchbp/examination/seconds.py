"""Second derivatives: the gradients have gradients, and those are right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchbp.examination.differences import Seen, Slopes, look, names_of, where_kinks
from torchbp.examination.subject import Subject
from torchbp.examination.tools import first_line, variables_of
from torchbp.examination.verdicts import (
    Fail,
    NotApplicable,
    NotSupported,
    fix_for,
    must_run,
    needs_float64,
    needs_own_graph,
)

_TWICE = (
    "compute it from ctx.saved_tensors by differentiable operations (no detach, .data, "
    "no_grad or NumPy), or mark the backward with once_differentiable"
)
_NOT_TWICE = ("once_differentiable", "implemented", "does not require grad")


def second_derivatives(s: Subject) -> str:
    """The gradients have gradients, and those are right, by differences of the first:
    with a surrogate, too, since the first are its own."""
    needs_float64(s)
    needs_own_graph(s)
    f, at = s.closure(s.copies())
    gs = s.cotangents(f(*at))
    names = [*s.names, *["the output's gradient"] * len(gs)]
    weights, ours, cut = _seconds(s, f, at, gs)

    def firsts(*tensors: Tensor) -> list[Tensor]:
        own = [t.detach().requires_grad_() for t in tensors[: len(at)]]
        return s.pull_back(f(*own), own, tensors[len(at) :])

    slopes = Slopes(firsts, [*at, *gs], s.seed)
    if not slopes.values.isfinite().all():
        raise NotApplicable("a gradient is infinite: move the input away from the pole")
    seen = look(s, slopes, weights, ours, s.entries // 2)
    for k, one in enumerate(seen):
        if one.wrong or one.along:
            raise _second_diagnosis(s, one, names[k], slopes.at[k].shape, cut)
    if kinks := ", ".join(where_kinks(seen, names, slopes.at)):
        raise NotApplicable(
            f"the first derivatives have a kink or a pole at {kinks}",
            "move the input away from it",
        )
    return "as finite differences of the first"


def _seconds(
    s: Subject, f: Callable[..., Any], at: Sequence[Tensor], gs: Sequence[Tensor]
) -> tuple[list[list[Tensor]], list[list[Tensor]], bool]:
    """For each argument the gradients of its own gradient, weighted so that no sum
    vanishes; and whether all of them are cut off from the graph."""
    weights, ours, cut = [], [], True
    for chosen in range(len(at)):
        own = [t.clone().requires_grad_() for t in (*at, *gs)]
        with must_run("the backward, with create_graph,"):
            outputs = f(*own[: len(at)])
            grads = s.pull_back(
                outputs, own[: len(at)], own[len(at) :], create_graph=True
            )
        draw = s.cotangents(grads, 3 + chosen)
        draw = [w if k == chosen else 0 * w for k, w in enumerate(draw)]
        weights.append(draw)
        total = (grads[chosen] * draw[chosen]).sum()
        cut = cut and not any(g.requires_grad for g in grads)
        seconds: Sequence[Tensor | None] = [None] * len(own)
        if total.requires_grad:
            seconds = _second_pass(total, own)
        pairs = zip(seconds, own, strict=True)
        ours.append([torch.zeros_like(t) if d is None else d for d, t in pairs])
    return weights, ours, cut


def _second_pass(total: Tensor, own: list[Tensor]) -> Sequence[Tensor | None]:
    try:
        # once_differentiable cuts the graph off, and leaves an error at its end.
        if ends := variables_of([total]):
            torch.autograd.grad(total, ends, allow_unused=True, retain_graph=True)
        return torch.autograd.grad(total, own, allow_unused=True)
    except Exception as error:
        if any(word in str(error) for word in _NOT_TWICE):
            raise NotSupported(first_line(error), _TWICE) from None
        reason = f"the second backward raised {first_line(error)}"
        raise Fail(reason, fix_for(error, _TWICE)) from None


def _second_diagnosis(
    s: Subject, one: Seen, by: str, shape: torch.Size, cut: bool
) -> Fail:
    """Which gradient lacks a dependence on the argument `by`, or is off."""
    if cut:
        return Fail(
            f"the gradients are cut off from the graph: derived by {by} they are not 0",
            _TWICE,
        )
    places = one.wrong or list(range(len(one.entries)))
    which = int(one.off_by()[places].amax(0).argmax())
    what = f"the gradient of {s.names[which]}"
    if not one.ours[:, which].any():
        return Fail(
            f"{what} is a constant to {by}, on which it depends: what forward "
            "computed and saved, and what is detached, is constant to autograd",
            _TWICE,
        )
    if not one.wrong:
        return Fail(f"{what}, derived by {by}, is {one.along}", _TWICE)
    infinite = [p for p in one.wrong if not one.ours[p].isfinite().all()]
    if infinite:
        return Fail(
            f"{what}, derived by {by}, is NaN or infinite at {len(infinite)} entries "
            f"{names_of(one, infinite, shape)}, where differences are finite",
            "mask before the operation, not after it: 0 times infinity is NaN",
        )
    worst = one.wrong[0]
    return Fail(
        f"{what}, derived by {by}, is off at {len(one.wrong)} of {len(one.entries)} "
        f"entries; at {names_of(one, [worst], shape)} it is "
        f"{one.ours[worst, which]:.4g}, expected {one.right[worst, which]:.4g}",
        _TWICE,
    )
