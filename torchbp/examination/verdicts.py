"""Outcomes of a check, and assertions that several checks share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from torchbp.examination.subject import Subject
from torchbp.examination.tools import (
    F64,
    differences,
    first_line,
    largest_of,
    place_of,
)

# Jacobians with more entries are not made.
LARGE = 100_000
CALCULUS = "derive it again, and set it beside finite differences"


class Verdict(Exception):  # noqa: N818
    """Any outcome of a check but "pass"."""

    status = ""

    def __init__(self, reason: str, fix: str = "") -> None:
        super().__init__(reason)
        self.reason, self.fix = reason, fix


class Fail(Verdict):
    status = "fail"


class Warn(Verdict):
    status = "warn"


class NotSupported(Verdict):
    status = "not supported"


class NotApplicable(Verdict):
    status = "not applicable"


# What torch says at length.
_KNOWN = {
    "autograd.Function with functorch transforms": "it has no setup_context",
    "does not have vmap support": "it has no vmap rule",
    "must implement the jvp function": "it has no jvp",
    "Unsupported custom jvp": "torch.compile takes no Function with a jvp",
}
# What to do about an error of a backward, by a part of its message.
_FIXES = {
    "incorrect number of gradients": "return one gradient, or None, for each argument "
    "of forward, in their order",
    "returned an invalid gradient": "give each gradient the shape of its argument",
    "view size is not compatible": "use reshape in place of view: an output gradient "
    "may have any strides",
    "NoneType": "treat None: a gradient that is not there is zero",
    "must have the same dtype": "cast to the argument's dtype before products",
    "same dtype": "cast to the argument's dtype before products",
    "cannot reshape tensor of 0": "spell sizes out: reshape(-1, n) is ambiguous for "
    "empty tensors",
    "modified by an inplace operation": "save a copy, or do not write to what is saved",
    "second time": "leave what is saved as it is, and on ctx",
    "AssertionError": "drop the assertion, or say in forward what is not supported",
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
        for part, short in _KNOWN.items():
            reason = short if part in str(error) else reason
        raise NotSupported(reason, fix) from None


@contextmanager
def must_run(what: str, fix: str = "", verdict: type[Verdict] = Fail) -> Iterator[None]:
    """Report an error in the block as failed, or as the verdict given."""
    try:
        yield
    except Verdict:
        raise
    except Exception as error:
        reason = f"{what} raised {first_line(error)}"
        raise verdict(reason, fix_for(error, fix)) from None


def numbered(outputs: Sequence[Any]) -> list[str]:
    if len(outputs) == 1:
        return ["output"]
    return [f"output {k}" for k in range(len(outputs))]


def needs_float64(s: Subject) -> None:
    if s.dtype != F64:
        raise NotSupported(
            f"float64: {s.refusal}", "accept float64, for checks as this"
        )


def needs_own_graph(s: Subject) -> None:
    if s.accumulates:
        raise NotSupported(
            "its backward accumulates into .grad, for backward() alone",
            "return gradients from backward; torch.utils.checkpoint: use_reentrant="
            "False",
        )


def is_large(s: Subject) -> bool:
    entries = sum(s.arguments[i].numel() for i in s.floats)
    outputs = sum(y.numel() for y in s.evaluate(s.copies()))
    return entries * outputs > LARGE


def shape_of(t: Tensor) -> str:
    return str(tuple(t.shape)).replace(",)", ")")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def must_equal(
    s: Subject,
    ours: Any,
    right: Any,
    tolerance: float,
    fix: str = "",
    floor: float = 0.0,
) -> None:
    """Fail unless values and gradients are the same."""
    if len(ours[0]) != len(right[0]):
        raise Fail(f"{len(ours[0])} outputs, expected {len(right[0])}", fix or CALCULUS)
    names = numbered(right[0])
    if found := differences(ours[0], right[0], names, tolerance, floor):
        raise Fail(f"the value of the {found}", fix or "see which of the two is wrong")
    if found := differences(ours[1], right[1], s.names, tolerance, floor):
        raise Fail(f"the gradient of {found}", fix or CALCULUS)


def must_equal_rounded(
    s: Subject, ours: Any, exact: list[Any], dtype: torch.dtype, truth: Any, fix: str
) -> None:
    """Fail unless what was computed in `dtype` is `truth` of the same arguments in the
    working dtype, to its rounding.

    The rounding is granted as it acts on the arguments: what moving each of them by
    one unit in the last place does to the result, is what `dtype` cannot tell. Terms of
    the arguments' size that cancel leave a few units of them.
    """
    eps = torch.finfo(dtype).eps
    floats = [t for t in exact if isinstance(t, Tensor) and t.is_floating_point()]
    size = max([1.0, *map(largest_of, floats)])
    right = s.right_gradients(_cloned(exact), function=truth)
    tolerance, floor = s.tolerance(dtype), 4 * eps * size
    try:
        return must_equal(s, ours, right, tolerance, fix, floor)
    except Fail as fail:
        spread = 0.0
        for draw in range(3):
            moved = _moved(s, exact, eps, draw)
            other = s.right_gradients(moved, function=truth)
            for a, b in zip(
                [*other[0], *other[1]], [*right[0], *right[1]], strict=True
            ):
                if a.shape == b.shape and a.is_floating_point():
                    spread = max(spread, largest_of(a - b))
        if spread == 0:
            raise fail from None
        must_equal(s, ours, right, tolerance, fix, floor + 4 * spread)


def _cloned(arguments: Sequence[Any]) -> list[Any]:
    return [t.detach().clone() if isinstance(t, Tensor) else t for t in arguments]


def _moved(s: Subject, arguments: Sequence[Any], eps: float, draw: int) -> list[Any]:
    """The arguments, each floating one moved by up to `eps` of its largest entry."""
    generator = torch.Generator("cpu").manual_seed(s.seed + draw)
    result = _cloned(arguments)
    for i, t in enumerate(result):
        if isinstance(t, Tensor) and t.is_floating_point():
            noise = (
                2 * torch.rand(t.shape, generator=generator, dtype=F64, device="cpu")
                - 1
            )
            result[i] = t + eps * largest_of(t) * noise.to(t.device, t.dtype)
    return result
