"""The derivatives themselves: beside finite differences, beside a reference, in
shorter dtypes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.gradcheck import GradcheckError

from torchbp.examination.subject import Subject
from torchbp.examination.tools import (
    F64,
    TOLERANCE,
    difference,
    first_line,
    nodes_of,
)
from torchbp.examination.verdicts import (
    CALCULUS,
    LARGE,
    TIGHT,
    Fail,
    NotApplicable,
    NotSupported,
    Verdict,
    along_directions,
    differentiated,
    dtype_name,
    is_large,
    labels_of,
    must_equal,
    must_run,
    needs_float64,
    shape_of,
    supported,
)


def forward(s: Subject) -> str:
    """It runs, and returns tensors."""
    outputs = s.evaluate(s.copies(s.own_dtype))
    if not outputs:
        raise Fail("no tensor is returned", "return a tensor or several")
    return ", ".join(f"{shape_of(y)} {dtype_name(y.dtype)}" for y in outputs)


def first_derivatives(s: Subject) -> str:
    """The gradients are those of the forward, in float64 if it takes that."""
    if s.dtype != torch.float32:
        needs_float64(s)
    arguments = s.copies()
    f, leaves = s.closure(arguments), s.leaves(arguments)
    failed = ""
    if s.dtype != F64 or is_large(s):
        with must_run("the backward"):
            found = along_directions(s, f, leaves, labels_of(s))
        if found:
            raise Fail(
                f"along random directions, the gradient of {found}",
                "give smaller inputs, and accept float64, for a diagnosis",
            )
        if s.dtype != F64:
            return "to 1 %, in float32: it takes no float64"
        return "as finite differences along random directions"
    with must_run("the backward"):
        try:
            gradcheck(f, leaves, check_undefined_grad=False, **_scaled(s))
        except GradcheckError as error:
            failed = first_line(error)
    if failed:
        raise _diagnosis(s, failed)
    return "as finite differences, entry by entry"


def _scaled(s: Subject) -> dict[str, Any]:
    """Tolerances; the error of a difference grows with what it is taken of. Whether all
    bits come out the same is not asked here."""
    with torch.no_grad():
        outputs = s.evaluate(s.copies())
    sizes = [y[y.isfinite()].abs().max().item() for y in outputs if y.numel()
             and y.is_floating_point() and y.isfinite().any()]  # fmt: skip
    atol = TIGHT["atol"] * max([1.0, *sizes])
    return {"rtol": TIGHT["rtol"], "atol": atol, "nondet_tol": atol}


def _along(s: Subject, outputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Output gradients, and the argument gradients that they should have."""
    cotangents = s.cotangents(outputs)
    flat = torch.cat([g.reshape(-1) for g in cotangents])
    expected = [
        (flat @ J).reshape(s.arguments[i].shape) if J.numel() else None
        for i, J in zip(s.floats, s.jacobian, strict=True)
    ]
    zeros = [torch.zeros_like(s.arguments[i], dtype=F64) for i in s.floats]
    return cotangents, [
        z if e is None else e for e, z in zip(expected, zeros, strict=True)
    ]


def _diagnosis(s: Subject, message: str) -> Fail:
    """Which gradient is wrong, and if it can be told, in what way."""
    _, outputs = differentiated(s)
    cotangents, right = _along(s, outputs)

    def pull(gs: Sequence[Tensor]) -> list[Tensor]:
        leaves, outputs = differentiated(s)
        return s.pull_back(outputs, leaves, [g.clone() for g in gs])

    ours, labels = pull(cotangents), labels_of(s)
    close = TIGHT["rtol"]
    wrong = [k for k in range(len(ours)) if difference(ours[k], right[k], close, close)]
    if not wrong:
        return Fail(message, CALCULUS)
    if len(outputs) == 1:
        for what, factor, mend in _slopes(outputs[0].detach()):
            if not factor.isfinite().all():
                continue
            mended = pull([cotangents[0] * factor])
            if not any(difference(mended[k], right[k], close) for k in wrong):
                return Fail(what, mend)
    for k in wrong:
        for j in range(len(ours)):
            same = j != k and ours[k].shape == right[j].shape
            if same and not difference(ours[k], right[j], close):
                return Fail(
                    f"{labels[k]}: the gradient is that of {labels[j]}",
                    "return gradients in the order of forward's arguments",
                )
        if reason := _likeness(ours[k], right[k], close):
            return Fail(f"{labels[k]}: {reason[0]}", reason[1])
    k = wrong[0]
    found = difference(ours[k], right[k], close) or message
    return Fail(f"{labels[k]}: the gradient is {found}", CALCULUS)


def _likeness(ours: Tensor, right: Tensor, close: float) -> tuple[str, str] | None:
    """What a wrong gradient is like."""
    if not ours.any():
        largest = right.abs().max().item()
        return (
            f"no gradient, expected one up to {largest:.2g}",
            "return it; if the argument is a constant, let the inputs that are not "
            "require grad",
        )
    if ours.dim() == 2 and not difference(ours, right.t(), close):
        return "the gradient is the transpose of the right one", "transpose it back"
    factor = ((ours * right).sum() / right.square().sum()).item()
    if not difference(ours, factor * right, close):
        if abs(factor + 1) < close:
            return "the gradient has the wrong sign", "change its sign"
        return (
            f"the gradient is {factor:.4g} times the right one",
            "look for a missing, doubled or wrong factor (a mean for a sum)",
        )
    return None


def _slopes(a: Tensor) -> Iterator[tuple[str, Tensor, str]]:
    """Mistakes in σ': what they are, the factor on the output's gradient that makes
    them good, and the mend. A backward is linear in that gradient, so if the factor
    mends every gradient, the mistake is known."""
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


_TWICE = (
    "compute it from ctx.saved_tensors by differentiable operations (no detach, .data, "
    "no_grad or NumPy), or mark the backward with once_differentiable"
)


def second_derivatives(s: Subject) -> str:
    """The gradients have gradients, and those are right."""
    needs_float64(s)
    arguments = s.copies()
    f = s.closure(arguments)
    leaves = s.leaves(arguments)
    with must_run("the backward, with create_graph,"):
        outputs = f(*leaves)
        cotangents = [g.requires_grad_() for g in s.cotangents(outputs)]
        grads = s.pull_back(outputs, leaves, cotangents, create_graph=True)
    if not any(g.requires_grad for g in grads):
        raise Fail("the gradients are cut off from the graph", _TWICE)
    try:
        # once_differentiable cuts the graph off, and leaves an error at its end, which
        # gradgradcheck does not come by.
        ends = [n.variable for n in nodes_of(grads) if hasattr(n, "variable")]
        total = torch.stack([g.sum() for g in grads if g.requires_grad]).sum()
        torch.autograd.grad(total, ends, allow_unused=True)
        if sum(t.numel() for t in [*leaves, *cotangents]) ** 2 > LARGE:
            _second_along_directions(s, f, [*leaves, *cotangents], len(leaves))
            return "as finite differences along random directions"
        gradgradcheck(f, leaves, check_undefined_grad=False, **_scaled(s))
    except Verdict:
        raise
    except GradcheckError:
        raise Fail(_second_diagnosis(s), _TWICE) from None
    except Exception as error:
        if any(word in str(error) for word in ("once_differentiable", "implemented")):
            raise NotSupported(first_line(error), _TWICE) from None
        raise Fail(f"the second backward raised {first_line(error)}", _TWICE) from None
    return "as finite differences of the first"


def _second_along_directions(
    s: Subject, f: Callable[..., Any], at: Sequence[Tensor], count: int
) -> None:
    """Fail unless the gradients' derivatives, by the `count` arguments and the outputs'
    gradients, are right along random directions."""

    def firsts(*tensors: Tensor) -> list[Tensor]:
        own = [t if t.requires_grad else t.requires_grad_() for t in tensors[:count]]
        return s.pull_back(f(*own), own, tensors[count:], create_graph=True)

    names = [*labels_of(s), *["the output's gradient"] * (len(at) - count)]
    if found := along_directions(s, firsts, at, names):
        raise Fail(f"along random directions, their derivative by {found}", _TWICE)


def _second_diagnosis(s: Subject) -> str:
    """Which gradient does not know that it depends on what."""
    arguments = s.copies()
    f = s.closure(arguments)
    leaves = s.leaves(arguments)
    labels = labels_of(s)
    outputs = f(*leaves)
    at = [*leaves, *[g.requires_grad_() for g in s.cotangents(outputs)]]
    names = [*labels, *["the output's gradient"] * len(outputs)]

    def firsts(*tensors: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            own = [t.detach().requires_grad_() for t in tensors[: len(leaves)]]
            return s.pull_back(f(*own), own, tensors[len(leaves) :])

    grads = s.pull_back(outputs, leaves, at[len(leaves) :], create_graph=True)
    for k, grad in enumerate(grads):
        right = s.numeric(lambda *t, k=k: [firsts(*t)[k]], at)  # type: ignore[misc]
        ours: list[Any] = [None] * len(at)
        if grad.requires_grad:
            ours = list(
                torch.autograd.grad(
                    grad.sum(), at, allow_unused=True, retain_graph=True
                )
            )
        for o, r, name in zip(ours, right, names, strict=True):
            o = torch.zeros_like(r) if o is None else o
            if found := difference(o, r, TIGHT["rtol"], 1e-6):
                if not o.any():
                    return f"the gradient of {labels[k]} is a constant to {name}"
                return f"the gradient of {labels[k]}, derived by {name}: {found}"
    return "not those of the first derivatives"


def reference(s: Subject) -> str:
    """Values and gradients are the reference's, to rounding."""
    if s.reference is None:
        raise NotApplicable("no reference")
    with must_run("the reference"):
        right = s.gradients(s.copies(), function=s.reference)
    ours = s.gradients(s.copies())
    must_equal(s, ours, right, TOLERANCE[s.dtype])
    return f"values and gradients in {dtype_name(s.dtype)}"


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
    right = s.gradients(exact, function=truth)
    mend = "find what depends on the dtype; compute in float32 what needs it"
    if len(outputs) != len(right[0]):
        raise Fail(f"{len(outputs)} outputs, expected {len(right[0])}", mend)
    kinds = [y.dtype for y in outputs if y.is_floating_point()]
    tolerance = TOLERANCE[dtype] * _rounding(s, dtype, right)
    must_equal(s, ours, right, tolerance, mend)
    gave = "" if all(k == dtype for k in kinds) else f", gives {dtype_name(kinds[0])}"
    return f"as in float64, to {dtype_name(dtype)}'s rounding{gave}"


def _rounding(s: Subject, dtype: torch.dtype, right: Any) -> float:
    """How often the usual tolerance is granted: four times as much as the reference
    itself needs in that dtype, and at least once."""
    if s.reference is None:
        return 1.0
    try:
        theirs = s.gradients(s.copies(dtype), function=s.reference)
        for times in (1.0, 4.0, 16.0):
            try:
                must_equal(s, theirs, right, TOLERANCE[dtype] * times / 4)
                return times
            except Fail:
                continue
    except Exception:
        pass  # where the reference has no such dtype, it sets no standard
    return 1.0
