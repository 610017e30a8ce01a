"""First derivatives beside finite differences, or beside a surrogate's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchbp.examination.diagnosis import diagnosis, likeness
from torchbp.examination.differences import (
    CLOSE,
    Seen,
    Slopes,
    look,
    names_of,
    where_kinks,
)
from torchbp.examination.subject import Subject
from torchbp.examination.tools import F64, cloned, difference
from torchbp.examination.verdicts import (
    CALCULUS,
    Fail,
    NotApplicable,
    must_run,
    needs_float64,
)

DRAWS = 3


def first_derivatives(s: Subject) -> str:
    """The gradients are those of the forward, in float64 if it takes that."""
    if s.dtype not in (F64, torch.float32):
        needs_float64(s)
    arguments = s.copies()
    if s.surrogate is not None:
        _as_surrogate(s, arguments)
        return "as the surrogate's"
    seen, slopes = examined_at(s, arguments, s.entries)
    if any(one.wrong or one.along for one in seen):
        raise diagnosis(s, arguments, slopes, seen)
    if kinks := ", ".join(where_kinks(seen, s.names, slopes.at)):
        raise NotApplicable(
            f"a kink or a pole at {kinks}, where differences tell nothing",
            "move the input away from it",
        )
    _wider(s)
    count, total = sum(len(o.entries) for o in seen), sum(t.numel() for t in slopes.at)
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
    """Compare the gradients at these arguments with differences at `budget` entries."""
    f, at = s.closure(arguments)
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
    """Fail unless the gradients are the surrogate's."""
    close = s.tolerance() if s.dtype != F64 else CLOSE * 1e-3
    for draw in range(DRAWS):
        own = cloned(arguments)
        with must_run("the backward"):
            outputs, _ = s.gradients(own)
            gs = s.cotangents([y for y in outputs if y.requires_grad], draw)
            _, ours = s.gradients(own, cotangents=gs)
        with must_run("the surrogate"):
            _, right = s.right_gradients(own, gs)
        for label, mine, theirs in zip(s.names, ours, right, strict=True):
            if text := difference(mine, theirs, close, close):
                like = likeness(mine, theirs, 10 * close)
                reason, fix = like or (f"the gradient is {text}", CALCULUS)
                raise Fail(
                    f"{what}{label}: compared with the surrogate's, {reason}", fix
                )


def _wider(s: Subject) -> None:
    """Fail if the gradients are wrong where the first input is large: a derivative may
    be wrong in the tails alone.

    An input of one sign keeps it; one that is symmetric or normalised is left alone,
    since a random one would not be.
    """
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
        value = at.reshape(-1)[one.entries[worst]]
        raise Fail(
            f"at inputs up to 8 in size, the gradient of {label} is wrong: at "
            f"{label}{names_of(one, [worst], at.shape)} = {value:.3g} it is "
            f"{one.ours[worst, 0]:.4g}, expected {one.right[worst, 0]:.4g}; at the "
            "inputs that were passed it is right",
            "look at the derivative where inputs are that large",
        )


def _is_structured(t: Tensor) -> bool:
    """Whether it is symmetric, or sums or norms of its rows are 1."""
    t = t.to(F64)
    if t.dim() < 1:
        return False
    square = t.dim() >= 2 and t.shape[-1] == t.shape[-2] > 1
    if square and torch.allclose(t, t.mT):
        return True
    sums, norms = t.sum(-1), t.norm(dim=-1)
    return any(torch.allclose(v, torch.ones_like(v), atol=1e-5) for v in (sums, norms))
