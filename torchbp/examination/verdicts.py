"""What a check can say, and what several checks ask."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from torchbp.examination.subject import Subject
from torchbp.examination.tools import F64, differences, first_line, random_like

# gradcheck's own defaults, 1e-3 and 1e-5, let a σ' that is 0.1 % off pass. Central
# differences with its step of 1e-6 err by some 1e-10 in float64 at sizes of order 1.
TIGHT = {"rtol": 1e-5, "atol": 1e-7}
# In float32, for what does not take float64: gross mistakes only.
COARSE = (1e-2, 1e-2, 1e-4)
# Jacobians with more entries are compared along random directions only, or not at all.
LARGE = 100_000


class Verdict(Exception):  # noqa: N818
    """What a check has to say but "pass"."""

    status = ""

    def __init__(self, reason: str, mend: str = "") -> None:
        super().__init__(reason)
        self.reason, self.mend = reason, mend


class Fail(Verdict):
    status = "fail"


class NotSupported(Verdict):
    status = "not supported"


class NotApplicable(Verdict):
    status = "not applicable"


@contextmanager
def supported(mend: str = "") -> Iterator[None]:
    """What raises in the block is not supported."""
    try:
        yield
    except Verdict:
        raise
    except Exception as error:
        reason = first_line(error)
        for part, short in _KNOWN.items():
            reason = short if part in str(error) else reason
        raise NotSupported(reason, mend) from None


# What torch says at length.
_KNOWN = {
    "autograd.Function with functorch transforms": "it has no setup_context",
    "does not have vmap support": "it has no vmap rule",
    "must implement the jvp function": "it has no jvp",
    "Unsupported custom jvp": "torch.compile takes no Function with a jvp",
}


@contextmanager
def must_run(what: str, mend: str = "") -> Iterator[None]:
    """What raises in the block has failed."""
    try:
        yield
    except Verdict:
        raise
    except Exception as error:
        raise Fail(f"{what} raised {first_line(error)}", mend) from None


def labels_of(s: Subject) -> list[str]:
    return [s.labels[i] for i in s.floats]


def numbered(outputs: Sequence[Tensor]) -> list[str]:
    if len(outputs) == 1:
        return ["output"]
    return [f"output {k}" for k in range(len(outputs))]


def needs_float64(s: Subject) -> None:
    if s.dtype != F64:
        raise NotSupported(
            f"float64: {s.refusal}", "accept float64, for checks as this"
        )


def is_large(s: Subject) -> bool:
    entries = sum(s.arguments[i].numel() for i in s.floats)
    with torch.no_grad():
        outputs = sum(y.numel() for y in s.evaluate(s.copies()))
    return entries * outputs > LARGE


def shape_of(t: Tensor) -> str:
    return str(tuple(t.shape)).replace(",)", ")")


CALCULUS = "derive it again, and set it beside finite differences"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def must_equal(
    s: Subject, ours: Any, right: Any, tolerance: float, mend: str = ""
) -> None:
    """Fail unless values and gradients are the same."""
    if len(ours[0]) != len(right[0]):
        raise Fail(f"{len(ours[0])} outputs, expected {len(right[0])}", mend)
    if found := differences(ours[0], right[0], numbered(right[0]), tolerance):
        raise Fail(f"the value of the {found}", mend or "the forward is wrong")
    if found := differences(ours[1], right[1], labels_of(s), tolerance):
        raise Fail(f"the gradient of {found}", mend or CALCULUS)


def differentiated(s: Subject) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Leaves and outputs of a new graph: what a second pass through one does is the
    business of `retain_graph` alone."""
    arguments = s.copies()
    return s.leaves(arguments), s.differentiable(arguments)


def along_directions(
    s: Subject,
    f: Callable[..., Sequence[Tensor]],
    leaves: Sequence[Tensor],
    labels: Sequence[str],
) -> str:
    """The first gradient of f that is not what f does along three random directions of
    each argument, in words. gradcheck's own way of doing so widens its tolerance with
    the size: at 10 x 784 it let a missing second derivative pass."""
    # What is small enough for the curvature and large enough for the rounding.
    exact = s.dtype == F64
    step, relative, rounding = (1e-6, TIGHT["rtol"], 1e-9) if exact else COARSE
    generator = torch.Generator("cpu").manual_seed(s.seed)
    for draw in range(3):
        outputs = f(*leaves)
        cotangents = s.cotangents(outputs, draw)
        grads = s.pull_back(outputs, leaves, cotangents)
        products = [(g * y).detach() for g, y in zip(cotangents, outputs, strict=True)]
        noise = rounding * sum(p.abs().sum().item() for p in products)
        for k, (leaf, grad) in enumerate(zip(leaves, grads, strict=True)):
            v = random_like(leaf, generator).to(leaf.device)
            ends = []
            for shift in (step, -step):
                moved = [t.detach().clone() for t in leaves]
                moved[k] += shift * v
                pairs = zip(cotangents, f(*moved), strict=True)
                ends.append(sum((g * y).sum().item() for g, y in pairs))
            right, ours = (ends[0] - ends[1]) / (2 * step), (grad * v).sum().item()
            size = torch.linalg.vector_norm(grad).item() + abs(right)
            if not abs(ours - right) <= relative * size + noise:  # so for NaN
                return f"{labels[k]} is {ours:.4g}, expected {right:.4g}"
    return ""
