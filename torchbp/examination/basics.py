"""What every other check relies on: the function runs, repeats itself, and its backward
is linear in the output's gradient."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchbp.examination.subject import Subject
from torchbp.examination.tools import F64, difference, differences
from torchbp.examination.verdicts import (
    Fail,
    Warn,
    dtype_name,
    must_run,
    numbered,
    same_gradients,
    shape_of,
)


def forward(s: Subject) -> str:
    """It runs, and returns tensors."""
    outputs = s.evaluate(s.copies(s.own_dtype))
    if not outputs:
        raise Fail("no tensor is returned", "return a tensor or several")
    drawn = "; it draws random numbers" if s.is_random else ""
    return ", ".join(f"{shape_of(y)} {dtype_name(y.dtype)}" for y in outputs) + drawn


def variants(s: Subject, i: int, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Three versions of argument i that are in its domain and differ."""
    t = s.copies(dtype)[i].detach()
    return [t, 0.75 * t, 0.5 * (t.flip(0) if t.dim() else t)]


# ---------------------------------------------------------------- determinism


def determinism(s: Subject) -> str:
    """The same arguments and seed give the same bits, whatever was called in between,
    and backward draws no random numbers."""
    first, second = (s.gradients(s.copies(s.own_dtype)) for _ in range(2))
    names = [*numbered(first[0]), *(f"gradient of {n}" for n in s.names)]
    tolerance = s.tolerance(s.own_dtype)
    pairs = zip([*second[0], *second[1]], [*first[0], *first[1]], names, strict=True)
    for a, b, name in pairs:
        if text := difference(a, b, 0.0):
            rounding = not difference(a, b, tolerance)
            raise (Warn if rounding else Fail)(
                f"with the same arguments again, the {name} is {text}",
                "sum in a fixed order" if rounding else "keep no state between calls",
            )
    same_gradients(
        s,
        _after_another_call(s),
        first[1],
        "if the function is called again before backward,",
        "save on ctx what belongs to one call, not on the class or in a global",
        tolerance,
    )
    same_gradients(
        s,
        _reseeded(s),
        s.gradients(s.copies())[1],
        "backward draws random numbers: with another seed",
        "draw in forward and save what was drawn; add intended noise in a hook, or "
        "skip this check",
    )
    return "the same bits again"


def _after_another_call(s: Subject) -> list[Tensor]:
    """The gradients, if other arguments are passed between forward and backward."""
    leaves, outputs = s.new_graph(s.own_dtype)
    others = s.copies(s.own_dtype)
    for i in s.floats:
        others[i] = variants(s, i, s.own_dtype)[2].requires_grad_()
    with suppress(Exception):  # it may not take them
        s.evaluate(others)
    return s.pull_back(outputs, leaves)


def _reseeded(s: Subject) -> list[Tensor]:
    """The gradients with other random numbers in backward alone."""
    leaves, outputs = s.new_graph()
    other = replace(s, seed=s.seed + 1)
    return other.pull_back(outputs, leaves, s.cotangents(outputs))


# ---------------------------------------------------------------- linear in g

_LINEAR = "multiply the output's gradient by the derivative, and do nothing else to it"


def linear_in_g(s: Subject) -> str:
    """Backward is linear in the output's gradient: twice of it gives twice, its
    negative the negative, and a loss scaled by 1024 gives 1024 times as much."""
    _, outputs = s.new_graph()
    g, h = s.cotangents(outputs, 1), s.cotangents(outputs, 2)

    def pull(factor: float, gs: Sequence[Tensor]) -> list[Tensor]:
        return s.gradients(s.copies(), cotangents=[factor * t for t in gs])[1]

    with must_run("the backward"):
        once = pull(1, g)
        scaled = {factor: pull(factor, g) for factor in (-1.0, 2.0, 1024.0, 2.0**-10)}
        other, both = pull(1, h), pull(1, [a + b for a, b in zip(g, h, strict=True)])
    wrong = {
        factor: text
        for factor, grads in scaled.items()
        if (text := _not_times(s, grads, factor, once))
    }
    if wrong:
        raise _nonlinearity(s, once, scaled, wrong)
    total = [a + b for a, b in zip(once, other, strict=True)]
    what = "from the sum of two output gradients,"
    fix = f"{_LINEAR}; compute in the dtype of the arguments"
    same_gradients(s, both, total, what, fix, _linear_tolerance(s))
    return "twice, minus, 1024 times the output's gradient, and a sum of two"


def _not_times(
    s: Subject, grads: list[Tensor], factor: float, once: list[Tensor]
) -> str:
    right = [factor * t for t in once]
    return differences(grads, right, s.names, _linear_tolerance(s))


def _linear_tolerance(s: Subject) -> float:
    # Nonlinear backwards are far off; a linear one may compute in float32 inside.
    return 4 * s.tolerance(torch.float32 if s.dtype == F64 else s.dtype)


def _nonlinearity(
    s: Subject, once: list[Tensor], scaled: dict[float, Any], wrong: dict[float, str]
) -> Fail:
    """What a backward that is not linear does instead."""
    unscaled = {f for f, grads in scaled.items() if not _not_times(s, grads, 1, once)}
    if {2.0, -1.0} <= unscaled:
        return Fail("backward ignores the output's gradient", _LINEAR)
    if {2.0, 2.0**-10} <= unscaled:
        return Fail(
            "backward ignores the size of the output's gradient, as sign does", _LINEAR
        )
    if -1.0 in wrong:
        return Fail(
            "from minus the output's gradient, backward does not return minus as much: "
            f"{wrong[-1.0]}",
            _LINEAR,
        )
    factor = max(wrong)
    return Fail(
        f"from {factor:g} times the output's gradient, backward does not return "
        f"{factor:g} times as much: {wrong[factor]}; it clips or rounds it",
        f"{_LINEAR}; clip intentionally in a hook, or skip this check",
    )
