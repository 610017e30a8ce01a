"""Values and gradients beside a reference, and in shorter dtypes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchbp.examination.derivatives import examined_at
from torchbp.examination.diagnosis import off
from torchbp.examination.subject import Subject
from torchbp.examination.tools import F64, cloned, first_line, largest_of
from torchbp.examination.verdicts import (
    Fail,
    NotApplicable,
    NotSupported,
    dtype_name,
    must_equal,
    must_run,
    needs_float64,
    supported,
)


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
        if text := _error_of_reference(s):
            raise NotApplicable(
                f"the reference's own gradient is not that of its values: {text}",
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


def _error_of_reference(s: Subject) -> str:
    """How the reference's gradients differ from differences of its values, or ""."""
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
    """Values and gradients in a shorter dtype are those in float64 of the same rounded
    arguments: the reference's where one was passed."""
    needs_float64(s)
    with supported():
        arguments = s.copies(dtype)
        leaves = s.leaves(arguments)
        outputs = s.evaluate(arguments)
    with must_run("the forward ran, but the backward"):
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
    fix = "find what depends on the dtype; compute in float32 what needs it"
    must_equal_rounded(s, ours, exact, dtype, s.reference or s.function, fix)
    kinds = [y.dtype for y in outputs if y.is_floating_point()]
    gave = "" if all(k == dtype for k in kinds) else f", gives {dtype_name(kinds[0])}"
    return f"as in float64, to {dtype_name(dtype)}'s rounding{gave}"


def must_equal_rounded(
    s: Subject, ours: Any, exact: list[Any], dtype: torch.dtype, truth: Any, fix: str
) -> None:
    """Fail unless `ours`, computed in `dtype`, is `truth` of the same arguments in the
    working dtype, to the rounding of `dtype`.

    That rounding is measured: what moving each argument by one unit in the last place
    does to the result is what `dtype` cannot tell. Where terms of the arguments' size
    cancel, a few units of them are left.
    """
    eps = torch.finfo(dtype).eps
    floats = [t for t in exact if isinstance(t, Tensor) and t.is_floating_point()]
    size = max([1.0, *map(largest_of, floats)])
    right = s.right_gradients(cloned(exact), function=truth)
    tolerance, floor = s.tolerance(dtype), 4 * eps * size
    try:
        return must_equal(s, ours, right, tolerance, fix, floor)
    except Fail as fail:
        spread = 0.0
        for draw in range(3):
            moved = _moved(exact, eps, s.seed + draw)
            other = s.right_gradients(moved, function=truth)
            pairs = zip([*other[0], *other[1]], [*right[0], *right[1]], strict=True)
            for a, b in pairs:
                if a.shape == b.shape and a.is_floating_point():
                    spread = max(spread, largest_of(a - b))
        if spread == 0:
            raise fail from None
        must_equal(s, ours, right, tolerance, fix, floor + 4 * spread)


def _moved(arguments: Sequence[Any], eps: float, seed: int) -> list[Any]:
    """The arguments, each floating one moved by up to `eps` of its largest entry."""
    generator = torch.Generator("cpu").manual_seed(seed)
    result = cloned(arguments)
    for i, t in enumerate(result):
        if isinstance(t, Tensor) and t.is_floating_point():
            noise = torch.rand(t.shape, generator=generator, dtype=F64, device="cpu")
            noise = (2 * noise - 1).to(t.device, t.dtype)
            result[i] = t + eps * largest_of(t) * noise
    return result
