"""The derivatives themselves: beside finite differences, beside a reference, in
shorter dtypes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchbp.examination.diagnosis import diagnosis, likeness, off
from torchbp.examination.differences import (
    CLOSE,
    Seen,
    Slopes,
    look,
    names_of,
    where_kinks,
)
from torchbp.examination.subject import Subject
from torchbp.examination.tools import (
    F64,
    difference,
    differences,
    first_line,
)
from torchbp.examination.verdicts import (
    CALCULUS,
    Fail,
    NotApplicable,
    NotSupported,
    dtype_name,
    must_equal,
    must_equal_rounded,
    must_run,
    needs_float64,
    shape_of,
    supported,
)

DRAWS = 3


def forward(s: Subject) -> str:
    """It runs, and returns tensors."""
    outputs = s.evaluate(s.copies(s.own_dtype))
    if not outputs:
        raise Fail("no tensor is returned", "return a tensor or several")
    drawn = "; it draws random numbers" if s.is_random else ""
    return ", ".join(f"{shape_of(y)} {dtype_name(y.dtype)}" for y in outputs) + drawn


# ---------------------------------------------------------------- linear in g


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
        factor: found
        for factor, grads in scaled.items()
        if (found := _not_times(s, grads, factor, once))
    }
    total = [a + b for a, b in zip(once, other, strict=True)]
    if not wrong and not differences(both, total, s.names, _linear(s)):
        return "twice, minus, 1024 times the output's gradient, and a sum of two"
    fix = "multiply the output's gradient by the derivative, and do nothing else to it"
    fix += "; a clipping that is meant belongs into a hook, or skip this check"
    raise Fail(_nonlinearity(s, once, scaled, wrong), fix)


def _not_times(
    s: Subject, grads: list[Tensor], factor: float, once: list[Tensor]
) -> str:
    right = [factor * t for t in once]
    return differences(grads, right, s.names, _linear(s))


def _linear(s: Subject) -> float:
    # What is meant is gross; a backward may compute in float32 inside.
    return 4 * s.tolerance(torch.float32 if s.dtype == F64 else s.dtype)


def _nonlinearity(
    s: Subject, once: list[Tensor], scaled: dict[float, Any], wrong: dict[float, str]
) -> str:
    """What a backward that is not linear does instead."""
    if not wrong:
        return "of a sum of two output gradients, backward gives no sum"
    same = not _not_times(s, scaled[2.0], 1, once)
    if same and not _not_times(s, scaled[-1.0], 1, once):
        return "backward ignores the output's gradient: any gives the same"
    if same and not _not_times(s, scaled[2.0**-10], 1, once):
        return "backward takes the sign of the output's gradient, not its size"
    if -1.0 in wrong:
        return (
            "from minus the output's gradient, backward does not give minus as much: "
            f"{wrong[-1.0]}"
        )
    factor = max(wrong)
    return (
        f"from {factor:g} times the output's gradient, backward does not give "
        f"{factor:g} times as much: {wrong[factor]}; it clips or rounds it"
    )


# ---------------------------------------------------------------- first derivatives


def first_derivatives(s: Subject) -> str:
    """The gradients are those of the forward, in float64 if it takes that."""
    if s.dtype not in (F64, torch.float32):
        needs_float64(s)
    arguments = s.copies()
    if s.surrogate is not None:
        _as_surrogate(s, arguments)
        return "as the surrogate's"
    seen, slopes = examined_at(s, arguments, s.entries)
    count, total = sum(len(one.entries) for one in seen), 0
    total = sum(t.numel() for t in slopes.at)
    if any(one.wrong or one.along for one in seen):
        raise diagnosis(s, arguments, slopes, seen)
    if kinks := ", ".join(where_kinks(seen, s.names, slopes.at)):
        raise NotApplicable(
            f"a kink or a pole at {kinks}: nothing is held against it there",
            "move the input away from it",
        )
    _wider(s)
    where = f"at all {total} entries"
    if count < total:
        where = f"at {count:,} of {total:,} entries and along random directions"
    if s.dtype != F64:
        return f"as finite differences {where}, in float32: float64: {s.refusal}"
    if slopes.is_coarse:
        where += "; it computes in a shorter dtype inside, so coarsely"
    return f"as finite differences {where}"


def examined_at(
    s: Subject, arguments: list[Any], budget: int
) -> tuple[list[Seen], Slopes]:
    """What differences say of the gradients at these arguments."""
    f = s.closure(arguments)
    at = [arguments[i].detach() for i in s.floats]
    cotangents, grads = [], []
    for draw in range(DRAWS):
        own = [t.clone().requires_grad_() for t in at]
        with must_run("the backward"):
            outputs = f(*own)
            gs = s.cotangents(outputs, draw)
            cotangents.append([g.clone() for g in gs])
            grads.append(s.pull_back(outputs, own, gs))
    slopes = Slopes(f, at, s.seed, s.dtype == F64)
    return look(s, slopes, cotangents, grads, budget), slopes


def must_be_right_at(s: Subject, arguments: list[Any], what: str, fix: str) -> None:
    """Fail if the gradients at other arguments are wrong, along random directions."""
    if s.surrogate is not None:
        return _as_surrogate(s, arguments, f"{what}: ")
    seen, _ = examined_at(s, arguments, 0)
    for one, label in zip(seen, s.names, strict=True):
        if one.along:
            raise Fail(
                f"{what}: along a random direction, the gradient of {label} is "
                f"{one.along}",
                fix,
            )
    return None


def _as_surrogate(s: Subject, arguments: list[Any], what: str = "") -> None:
    for draw in range(DRAWS):
        own = [t.clone() if isinstance(t, Tensor) else t for t in arguments]
        with must_run("the backward"):
            outputs, _ = s.gradients(own)
            gs = s.cotangents([y for y in outputs if y.requires_grad], draw)
            _, ours = s.gradients(own, cotangents=gs)
        with must_run("the surrogate"):
            _, right = s.right_gradients(own, gs)
        for label, mine, theirs in zip(s.names, ours, right, strict=True):
            close = s.tolerance() if s.dtype != F64 else CLOSE * 1e-3
            if not difference(mine, theirs, close, close):
                continue
            like = likeness(mine, theirs, 10 * close)
            reason, fix = like or (
                f"the gradient is {difference(mine, theirs, close)}", CALCULUS
            )  # fmt: skip
            raise Fail(f"{what}{label}: beside the surrogate's, {reason}", fix)


def _wider(s: Subject) -> None:
    """Fail if the gradients are wrong where the first input is large: a derivative may
    be wrong in the tails alone. An input of one sign keeps it; one that is symmetric
    or normalised is left alone, since a draw would not be."""
    i = s.floats[0]
    t = s.arguments[i]
    if i >= s.inputs or s.is_random or not t.numel() or _is_structured(t):
        return
    generator = torch.Generator("cpu").manual_seed(s.seed + 2)
    size = torch.rand(t.shape, generator=generator, dtype=F64, device="cpu")
    sign = 2.0 * torch.randint(0, 2, t.shape, generator=generator, device="cpu") - 1
    if not (t < 0).any() or not (t > 0).any():
        sign = t.sign().to("cpu", F64)
    arguments = s.copies()
    arguments[i] = ((6 * size + 2) * sign).to(t.device, s.dtype)
    try:
        if not all(y.isfinite().all() for y in s.evaluate(arguments)):
            return
        seen, slopes = examined_at(s, arguments, min(64, s.entries))
    except Exception:  # it does not take such inputs
        return
    for one, label, at in zip(seen, s.names, slopes.at, strict=True):
        if not (one.wrong and one.right.isfinite().all()):
            continue
        worst = one.wrong[0]
        name = names_of(one, one.wrong, at.shape)
        raise Fail(
            f"at inputs up to 8 in size, the gradient of {label} is wrong: at "
            f"{label}{name.split(', …')[0]} it is {one.ours[worst, 0]:.4g}, expected "
            f"{one.right[worst, 0]:.4g}; at the given inputs it is right",
            f"look at the tails: there {label} is "
            f"{at.reshape(-1)[one.entries[worst]]:.3g}",
        )


def _is_structured(t: Tensor) -> bool:
    t = t.to(F64)
    if t.dim() < 1:
        return False
    square = t.dim() >= 2 and t.shape[-1] == t.shape[-2] > 1
    if square and torch.allclose(t, t.mT):
        return True
    sums, norms = t.sum(-1), t.norm(dim=-1)
    return bool(
        torch.allclose(sums, torch.ones_like(sums), atol=1e-5)
        or torch.allclose(norms, torch.ones_like(norms), atol=1e-5)
    )


# ---------------------------------------------------------------- reference, dtypes


def reference(s: Subject) -> str:
    """Values and gradients are the reference's, to rounding."""
    if s.reference is None:
        raise NotApplicable("no reference")
    with must_run("the reference"):
        right = s.gradients(s.copies(), function=s.reference)
    ours = s.gradients(s.copies())
    if s.surrogate is not None:
        right = right[0], ours[1]
    try:
        must_equal(s, ours, right, s.tolerance())
    except Fail as fail:
        if found := _wrong_reference(s):
            raise NotApplicable(
                f"the reference's own gradient is not that of its values: {found}",
                "take another reference",
            ) from None
        if s.dtype != F64:
            raise
        # Computed in float32 inside, or with a constant of eight digits.
        try:
            must_equal(s, ours, right, s.tolerance(torch.float32) / 10)
        except Fail:
            raise fail from None
        return f"to single precision only: {fail.reason}"
    return f"values and gradients in {dtype_name(s.dtype)}"


def _wrong_reference(s: Subject) -> str:
    """How the reference's gradients depart from differences of its values, or ""."""
    other = replace(s, function=s.reference or s.function, surrogate=None)
    try:
        seen, slopes = examined_at(other, s.copies(), min(64, s.entries))
    except Exception:
        return ""
    for one, label, t in zip(seen, s.names, slopes.at, strict=True):
        if one.wrong or one.along:
            return off(label, one, t.shape)
    return ""


def in_dtype(dtype: torch.dtype, s: Subject) -> str:
    """Values and gradients in a shorter dtype, beside those in float64 of the same
    rounded arguments: the reference's where there is one, which also says how exact one
    can be."""
    needs_float64(s)
    with supported():
        arguments = s.copies(dtype)
        leaves = s.leaves(arguments)
        outputs = s.evaluate(arguments)
    with must_run("the forward went through, but the backward"):
        try:
            ours = outputs, s.pull_back(outputs, leaves)
        except (RuntimeError, TypeError) as error:
            if any(word in str(error) for word in ("not implemented for", "unsupp")):
                raise NotSupported(first_line(error)) from None
            raise
    exact = [
        t.to(F64) if isinstance(t, Tensor) and t.is_floating_point() else t
        for t in s.copies(dtype)
    ]
    truth = s.reference or s.function
    fix = "find what depends on the dtype; compute in float32 what needs it"
    try:
        must_equal_rounded(s, ours, exact, dtype, truth, fix)
    except Fail:
        if s.reference is None or not _reference_is_no_better(s, exact, dtype, ours):
            raise
    kinds = [y.dtype for y in outputs if y.is_floating_point()]
    gave = "" if all(k == dtype for k in kinds) else f", gives {dtype_name(kinds[0])}"
    return f"as in float64, to {dtype_name(dtype)}'s rounding{gave}"


def _reference_is_no_better(
    s: Subject, exact: list[Any], dtype: torch.dtype, ours: Any
) -> bool:
    """Whether the function errs by at most four times what the reference does in that
    dtype."""
    try:
        right = s.right_gradients(exact, function=s.reference)
        theirs = s.right_gradients(s.copies(dtype), function=s.reference)
        for times in (1.0, 4.0, 16.0):
            try:
                must_equal(s, theirs, right, s.tolerance(dtype) * times / 4)
            except Fail:
                continue
            must_equal(s, ours, right, s.tolerance(dtype) * times)
            return True
    except Exception:  # where the reference has no such dtype, it sets no standard
        pass
    return False
