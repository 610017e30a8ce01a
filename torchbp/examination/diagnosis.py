"""In what way a gradient is wrong, in words, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from torchbp.examination.differences import (
    CLOSE,
    Seen,
    Slopes,
    names_of,
)
from torchbp.examination.subject import Subject
from torchbp.examination.tools import (
    F64,
    difference,
)
from torchbp.examination.verdicts import (
    CALCULUS,
    Fail,
)

INTENDED = (
    "if the derivatives are meant to be those of another function f (straight-through "
    "estimators, surrogates), say which: surrogate=f"
)


def diagnosis(
    s: Subject, arguments: list[Any], slopes: Slopes, seen: list[Seen]
) -> Fail:
    """Which gradient is wrong, and if it can be told, in what way."""
    labels = s.names
    wrong = [k for k, one in enumerate(seen) if one.wrong or one.along]
    for k in wrong:
        if seen[k].is_flat:
            return _flat(s, arguments, k)
    if fail := _slope(s, arguments, slopes, seen, wrong):
        return fail
    for k in wrong:
        one = seen[k]
        for j, other in enumerate(seen):
            same = j != k and slopes.at[j].shape == slopes.at[k].shape
            if same and _alike(one.ours, other.right, _tolerance(slopes)):
                return Fail(
                    f"{labels[k]}: the gradient is that of {labels[j]}",
                    "return gradients in the order of forward's arguments",
                )
        shape = slopes.at[k].shape
        whole = len(one.entries) == shape.numel()
        mine, right = one.ours[:, 0], one.right[:, 0]
        if whole:
            mine, right = mine.reshape(shape), right.reshape(shape)
        if like := likeness(mine, right, _tolerance(slopes)):
            return Fail(f"{labels[k]}: {like[0]}", like[1])
    k = wrong[0]
    return Fail(off(labels[k], seen[k], slopes.at[k].shape), f"{CALCULUS}; {INTENDED}")


def _tolerance(slopes: Slopes) -> float:
    return 1e-3 if slopes.is_coarse else CLOSE


def _alike(a: Tensor, b: Tensor, close: float) -> bool:
    return a.shape == b.shape and not difference(a, b, close)


def off(label: str, one: Seen, shape: torch.Size) -> str:
    """How the gradient of one argument is off, in words."""
    if not one.wrong:
        return f"along a random direction, the gradient of {label} is {one.along}"
    gap = (one.ours - one.right)[one.wrong].abs().nan_to_num(float("inf")).amax(1)
    worst = one.wrong[int(gap.argmax())]
    draw = int((one.ours - one.right)[worst].abs().nan_to_num(float("inf")).argmax())
    name = names_of(one, [worst], shape)
    return (
        f"{label}: the gradient is off at {len(one.wrong)} of {len(one.entries)} "
        f"entries; at {label}{name} it is {one.ours[worst, draw]:.4g}, expected "
        f"{one.right[worst, draw]:.4g}"
    )


def _flat(s: Subject, arguments: list[Any], k: int) -> Fail:
    """The forward does not move with argument k: is it a step, or a constant?"""
    label = s.names[k]
    before = s.evaluate(arguments)
    for length in (1.0, -8.0, 64.0):
        moved = list(arguments)
        moved[s.floats[k]] = arguments[s.floats[k]].detach() + length
        after = s.evaluate(moved)
        if any(difference(a, b, 0.0) for a, b in zip(after, before, strict=True)):
            return Fail(
                f"{label}: the forward is a step, flat at every entry, and the "
                "backward is not",
                "if the backward is a surrogate, say which: surrogate=f, say "
                "lambda x: x for a straight-through estimator; else return zeros",
            )
    return Fail(
        f"{label}: the forward does not depend on it, and gets a gradient",
        f"return None for it, or use it in forward; {INTENDED}",
    )


def _slope(
    s: Subject, arguments: list[Any], slopes: Slopes, seen: list[Seen], wrong: list[int]
) -> Fail | None:
    """A known mistake in σ', which a factor on the output's gradient corrects."""
    outputs = s.closure(arguments)(*[arguments[i] for i in s.floats])
    if len(outputs) != 1 or not all(seen[k].wrong for k in wrong):
        return None
    (g,) = s.cotangents(outputs)
    for what, factor, fix in _slopes(outputs[0].detach()):
        if not factor.isfinite().all():
            continue
        own = [t.detach().clone() if isinstance(t, Tensor) else t for t in arguments]
        _, grads = s.gradients(own, cotangents=[g * factor])
        if all(
            _alike(
                grads[k].reshape(-1).cpu().to(F64)[seen[k].entries],
                seen[k].right[:, 0],
                _tolerance(slopes),
            )
            for k in wrong
        ):
            return Fail(what, fix)
    return None


def likeness(ours: Tensor, right: Tensor, close: float) -> tuple[str, str] | None:
    """What a wrong gradient is like."""
    ours, right = ours.to(F64), right.to(F64)
    if not right.isfinite().all() or not right.any():
        return None
    if not ours.any():
        largest = right.abs().max().item()
        return (
            f"no gradient, expected one up to {largest:.2g}",
            "return it; if the argument is a constant, let the inputs that are not "
            "require grad",
        )
    if ours.dim() == 2 and _alike(ours, right.t(), close):
        return "the gradient is the transpose of the right one", "transpose it back"
    factor = ((ours * right).sum() / right.square().sum()).item()
    if not difference(ours, factor * right, close):
        if abs(factor + 1) < close:
            return (
                "the gradient has the wrong sign",
                "change its sign; if it is meant (gradient reversal), say so: "
                "surrogate=lambda x: -x, of all arguments",
            )
        nearest = round(factor) or round(1 / factor)
        exact = abs(factor - round(factor)) < close or (
            factor and abs(1 / factor - round(1 / factor)) < close
        )
        name = f"{factor:.4g}"
        if exact and abs(factor) >= 1:
            name = str(nearest)
        return (
            f"the gradient is {name} times the right one",
            "look for a missing, doubled or wrong factor (a mean for a sum)",
        )
    return None


def _slopes(a: Tensor) -> Iterator[tuple[str, Tensor, str]]:
    """Mistakes in σ': what they are, the factor on the output's gradient that corrects
    them, and the fix. A backward is linear in that gradient, so if the factor corrects
    every gradient, the mistake is known."""
    z, t = torch.logit(a), torch.atanh(a)
    s = torch.sigmoid(a)
    multiply = "multiply the output's gradient by σ'(z) before all else"
    yield "σ' = a(1 - a) of a sigmoid is missing", a * (1 - a), multiply
    yield "σ' = 1 - a² of a tanh is missing", 1 - a * a, multiply
    yield "σ' = [a > 0] of a ReLU is missing", (a > 0).to(a.dtype), multiply
    of_a = "σ' = {} is in terms of a: save a, or compute it from z"
    yield (
        "σ' = a(1 - a) was taken of z in place of a",
        a * (1 - a) / (z * (1 - z)),
        of_a.format("a(1 - a)"),
    )
    yield (
        "σ' = 1 - a² was taken of z in place of a",
        (1 - a * a) / (1 - t * t),
        of_a.format("1 - a²"),
    )
    yield (
        "σ' was taken at a in place of z: σ is applied twice",
        a * (1 - a) / (s * (1 - s)),
        "σ'(z) = σ(z)(1 - σ(z)) = a(1 - a)",
    )
    yield (
        "σ' = a(1 - a) of a sigmoid is there twice",
        1 / (a * (1 - a)),
        "multiply by σ'(z) once",
    )
