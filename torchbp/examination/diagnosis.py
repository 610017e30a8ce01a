"""In what way a gradient is wrong, in words, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torchbp.examination.differences import CLOSE, Seen, Slopes, names_of
from torchbp.examination.subject import Subject
from torchbp.examination.tools import F64, cloned, custom_nodes, difference
from torchbp.examination.verdicts import CALCULUS, Fail

INTENDED = (
    "if the derivatives are meant to be those of another function f (straight-through "
    "estimators, surrogates), pass it: surrogate=f"
)
# Where no backward is written by hand, torch differentiates all that it sees.
HIDDEN = (
    "no Python autograd.Function is in it: look in forward for detach, .data, "
    ".item(), no_grad or NumPy, which hide a dependence from autograd"
)
RANDOM = (
    "random numbers are held fixed: a gradient that is right on average only "
    "(implicit, score function) differs"
)


def diagnosis(
    s: Subject, arguments: list[Any], slopes: Slopes, seen: list[Seen]
) -> Fail:
    """Which gradient is wrong, and in what way where that can be recognised."""
    wrong = [k for k, one in enumerate(seen) if one.wrong or one.along]
    for k in wrong:
        if seen[k].is_flat:
            return _flat(s, arguments, k)
    outputs = slopes.f(*[t.clone().requires_grad_() for t in slopes.at])
    reason, fix = _recognised(s, slopes, seen, wrong)
    if not custom_nodes(outputs):
        fix = f"{HIDDEN}; {INTENDED}"
    elif fail := _wrong_slope(s, arguments, outputs, slopes, seen, wrong):
        return fail
    return Fail(reason, f"{fix}; {RANDOM}" if s.is_random else fix)


def _recognised(
    s: Subject, slopes: Slopes, seen: list[Seen], wrong: list[int]
) -> tuple[str, str]:
    """A reason and a fix: how the first wrong gradient that is like a right one differs
    from it, else how far the first is off."""
    for k in wrong:
        one, shape = seen[k], slopes.at[k].shape
        mine, right = one.ours[:, 0], one.right[:, 0]
        if len(one.entries) == shape.numel():
            mine, right = mine.reshape(shape), right.reshape(shape)
        if like := likeness(mine, right, _tolerance(slopes)):
            return f"{s.names[k]}: {like[0]}", like[1]
        for j, other in enumerate(seen):
            same = j != k and slopes.at[j].shape == shape
            if same and _alike(one.ours, other.right, _tolerance(slopes)):
                return (
                    f"{s.names[k]}: the gradient is that of {s.names[j]}",
                    "return each argument's own gradient, in forward's order",
                )
    k = wrong[0]
    return off(s.names[k], seen[k], slopes.at[k].shape), f"{CALCULUS}; {INTENDED}"


def _tolerance(slopes: Slopes) -> float:
    return 1e-3 if slopes.is_coarse else CLOSE


def _alike(a: Tensor, b: Tensor, close: float) -> bool:
    return a.shape == b.shape and not difference(a, b, close)


def off(label: str, one: Seen, shape: torch.Size) -> str:
    """How far the gradient of one argument is off, in words."""
    if not one.wrong:
        return f"along a random direction, the gradient of {label} is {one.along}"
    errors = one.off_by()
    worst = one.wrong[int(errors[one.wrong].amax(1).argmax())]
    draw = int(errors[worst].argmax())
    return (
        f"{label}: the gradient is off at {len(one.wrong)} of {len(one.entries)} "
        f"entries; at {label}{names_of(one, [worst], shape)} it is "
        f"{one.ours[worst, draw]:.4g}, expected {one.right[worst, draw]:.4g}"
    )


def _flat(s: Subject, arguments: list[Any], k: int) -> Fail:
    """The forward does not move with argument k: whether it is a step, or constant."""
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
                "if the backward is a surrogate, pass it: surrogate=f, for a "
                "straight-through estimator lambda x: x; else return zeros",
            )
    return Fail(
        f"{label}: the forward does not depend on it, and its gradient is not zero",
        f"return None for it, or use it in forward; {INTENDED}",
    )


def likeness(ours: Tensor, right: Tensor, close: float) -> tuple[str, str] | None:
    """How a wrong gradient differs from the right one, and what to do about it, if it
    is like it."""
    ours, right = ours.to(F64), right.to(F64)
    if not right.isfinite().all() or not right.any():
        return None
    if not ours.any():
        largest = right.abs().max().item()
        return (
            f"no gradient, expected one up to {largest:.2g}",
            "return it; if the argument is meant to be a constant, call "
            "requires_grad_() on the other inputs",
        )
    if ours.dim() == 2 and _alike(ours, right.t(), close):
        return "the gradient is the transpose of the right one", "transpose it back"
    factor = ((ours * right).sum() / right.square().sum()).item()
    if difference(ours, factor * right, close):
        return None
    if abs(factor + 1) < close:
        return (
            "the gradient has the wrong sign",
            "change its sign; if it is intended (gradient reversal), pass "
            "surrogate=lambda x: -x, of all arguments",
        )
    whole = abs(factor) >= 1 and abs(factor - round(factor)) < close
    name = str(round(factor)) if whole else f"{factor:.4g}"
    return (
        f"the gradient is {name} times the right one",
        "look for a missing, doubled or wrong factor (a mean for a sum)",
    )


def _wrong_slope(
    s: Subject,
    arguments: list[Any],
    outputs: Sequence[Tensor],
    slopes: Slopes,
    seen: list[Seen],
    wrong: list[int],
) -> Fail | None:
    """A known mistake in σ', if a factor on the output's gradient corrects every wrong
    gradient: a backward is linear in it."""
    if len(outputs) != 1 or not all(seen[k].wrong for k in wrong):
        return None
    (g,) = s.cotangents(outputs)
    for reason, factor, fix in _known_slopes(outputs[0].detach()):
        if not factor.isfinite().all():
            continue
        _, grads = s.gradients(cloned(arguments), cotangents=[g * factor])
        if all(
            _alike(
                grads[k].reshape(-1).cpu().to(F64)[seen[k].entries],
                seen[k].right[:, 0],
                _tolerance(slopes),
            )
            for k in wrong
        ):
            return Fail(reason, fix)
    return None


def _known_slopes(a: Tensor) -> Iterator[tuple[str, Tensor, str]]:
    """Mistakes in σ': the reason, the factor on the output's gradient that corrects
    it, and the fix."""
    z, t, s = torch.logit(a), torch.atanh(a), torch.sigmoid(a)
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
        "σ' = a(1 - a) of a sigmoid is a factor twice",
        1 / (a * (1 - a)),
        "multiply by σ'(z) once",
    )
