"""Outcomes of a check, and assertions that several checks share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from torchbp.examination.subject import Subject
from torchbp.examination.tools import F64, differences, first_line, place_of

# Jacobians with more entries are not computed.
LARGE = 100_000
CALCULUS = "derive it again, and compare it with finite differences"


class Verdict(Exception):  # noqa: N818
    """Any outcome of a check but "pass".

    Args:
        reason: what was seen.
        fix: what to do about it, or "".
    """

    status = ""

    def __init__(self, reason: str, fix: str = "") -> None:
        super().__init__(reason)
        self.reason, self.fix = reason, fix


class Fail(Verdict):
    """Something is wrong."""

    status = "fail"


class Warn(Verdict):
    """It is right, but wasteful or fragile."""

    status = "warn"


class NotSupported(Verdict):
    """It raises an error that says so."""

    status = "not supported"


class NotApplicable(Verdict):
    """There is nothing to check."""

    status = "not applicable"


# Short forms of torch's long messages, by a part of them.
_SHORT = {
    "autograd.Function with functorch transforms": "it has no setup_context",
    "does not have vmap support": "it has no vmap rule",
    "must implement the jvp function": "it has no jvp",
    "Unsupported custom jvp": "torch.compile takes no Function with a jvp",
}
# What to do about an error, by a part of its message.
_FIXES = {
    "incorrect number of gradients": "return one gradient, or None, for each argument "
    "of forward, in their order",
    "returned an invalid gradient": "give each gradient the shape of its argument",
    "view size is not compatible": "use reshape in place of view: a tensor may have "
    "any strides",
    "NoneType": "treat None: a missing output gradient is zero",
    "same dtype": "cast to the argument's dtype before products",
    "cannot reshape tensor of 0": "write the sizes out: reshape(-1, n) is ambiguous "
    "for empty tensors",
    "modified by an inplace operation": "save a copy, or do not write to what is saved",
    "second time": "do not change what is saved, or what is on ctx",
    "AssertionError": "drop the assertion, or refuse in forward what is not supported",
}


def fix_for(error: BaseException, otherwise: str = "") -> str:
    """What to do about an error: advice that fits its message, and where it arose."""
    text = f"{type(error).__name__}: {error}"
    known = next((fix for part, fix in _FIXES.items() if part in text), otherwise)
    place = place_of(error)
    return "; ".join(filter(None, (known, place and f"it arose in {place}")))


@contextmanager
def supported(fix: str = "") -> Iterator[None]:
    """Report an error in the block as not supported."""
    try:
        yield
    except Verdict:
        raise
    except Exception as error:
        reason = first_line(error)
        for part, short in _SHORT.items():
            reason = short if part in str(error) else reason
        raise NotSupported(reason, fix) from None


@contextmanager
def must_run(what: str, fix: str = "", verdict: type[Verdict] = Fail) -> Iterator[None]:
    """Report an error in the block as `verdict`."""
    try:
        yield
    except Verdict:
        raise
    except Exception as error:
        reason = f"{what} raised {first_line(error)}"
        raise verdict(reason, fix_for(error, fix)) from None


def numbered(outputs: Sequence[Any]) -> list[str]:
    """What the outputs are called."""
    if len(outputs) == 1:
        return ["output"]
    return [f"output {k}" for k in range(len(outputs))]


def shape_of(t: Tensor) -> str:
    """Its shape, as (3, 4) or (4)."""
    return str(tuple(t.shape)).replace(",)", ")")


def dtype_name(dtype: torch.dtype) -> str:
    """Its name, as float32."""
    return str(dtype).removeprefix("torch.")


def needs_float64(s: Subject) -> None:
    """Report a function that does not take float64 as not supported."""
    if s.dtype != F64:
        raise NotSupported(
            f"float64: {s.refusal}", "accept float64, which checks like this one need"
        )


def needs_own_graph(s: Subject) -> None:
    """Report one that ``backward()`` alone can differentiate as not supported."""
    if s.accumulates:
        raise NotSupported(
            "its backward accumulates into .grad, for backward() alone",
            "return gradients from backward; torch.utils.checkpoint: use_reentrant="
            "False",
        )


def needs_small_jacobian(s: Subject) -> None:
    """Report a function of too many inputs and outputs as not applicable."""
    entries = sum(s.arguments[i].numel() for i in s.floats)
    if entries * sum(y.numel() for y in s.evaluate(s.copies())) > LARGE:
        raise NotApplicable("the Jacobian is too large: pass smaller inputs")


def must_equal(
    s: Subject,
    ours: Any,
    right: Any,
    tolerance: float,
    fix: str = "",
    floor: float = 0.0,
) -> None:
    """Fail unless values and gradients are the same.

    Args:
        s: the function.
        ours: its outputs and gradients.
        right: what they should be.
        tolerance: relative to the largest entry of each.
        fix: what to do about it; "" for the usual advice.
        floor: how far they may differ besides.
    """
    if len(ours[0]) != len(right[0]):
        raise Fail(f"{len(ours[0])} outputs, expected {len(right[0])}", fix or CALCULUS)
    if text := differences(ours[0], right[0], numbered(right[0]), tolerance, floor):
        raise Fail(f"the value of the {text}", fix or "see which of the two is wrong")
    if text := differences(ours[1], right[1], s.names, tolerance, floor):
        raise Fail(f"the gradient of {text}", fix or CALCULUS)


def same_gradients(
    s: Subject,
    ours: Sequence[Tensor],
    right: Sequence[Tensor],
    what: str,
    fix: str,
    tolerance: float | None = None,
) -> None:
    """Fail unless the gradients are the same, to the working dtype's rounding."""
    if text := differences(ours, right, s.names, tolerance or s.tolerance()):
        raise Fail(f"{what} the gradient of {text}", fix)
