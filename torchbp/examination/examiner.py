"""The examination of an autograd.Function, a function or a module: whether its backward
is right, and what else it can be used with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torchbp.examination import (
    backward,
    basics,
    costs,
    derivatives,
    execution,
    forward_mode,
    layouts,
    precision,
    seconds,
    transforms,
)
from torchbp.examination.isolation import in_a_child, undisturbed
from torchbp.examination.prepare import describe, learn
from torchbp.examination.report import Finding, Report
from torchbp.examination.subject import Subject
from torchbp.examination.tools import first_line
from torchbp.examination.verdicts import Verdict, fix_for

__all__ = ["CHECKS", "examine"]

CHECKS: dict[str, Callable[[Subject], str]] = {
    "forward": basics.forward,
    "determinism": basics.determinism,
    "linear-in-g": basics.linear_in_g,
    "first-derivatives": derivatives.first_derivatives,
    "raw-gradients": backward.raw_gradients,
    "second-derivatives": seconds.second_derivatives,
    "reference": precision.reference,
    "float32": functools.partial(precision.in_dtype, torch.float32),
    "bfloat16": functools.partial(precision.in_dtype, torch.bfloat16),
    "float16": functools.partial(precision.in_dtype, torch.float16),
    "requires_grad-subsets": backward.subsets,
    "unneeded-gradients": backward.unneeded_gradients,
    "gradients-unchanged": backward.output_gradients_unchanged,
    "output-gradients": layouts.output_gradient_layouts,
    "undefined-gradients": layouts.undefined_gradients,
    "input-layouts": layouts.input_layouts,
    "inputs-unchanged": backward.inputs_unchanged,
    "retain_graph": backward.retain_graph,
    "saved-on-ctx": backward.saved_on_ctx,
    "changes-in-between": backward.changes_in_between,
    "outputs-freed": backward.outputs_freed,
    "N-d-inputs": layouts.n_d_inputs,
    "empty-inputs": layouts.empty_inputs,
    "batched-gradients": transforms.batched_gradients,
    "vmap": transforms.vmap,
    "vmap-of-grad": transforms.vmap_of_grad,
    "jacrev": transforms.jacrev,
    "jvp": forward_mode.jvp,
    "dual-numbers": forward_mode.dual_numbers,
    "jacfwd": forward_mode.jacfwd,
    "compile": execution.compile,
    "compiled-backward": execution.compiled_backward,
    "autocast": execution.autocast,
    "second-device": execution.second_device,
    "A1": costs.a1,
    "A2": costs.a2,
}
# These examine a function without derivatives, too.
OF_VALUES = ("forward", "inputs-unchanged", "outputs-freed")
# Where one of these has a finding, every other that compares gradients would repeat it.
OF_GRADIENTS = ("determinism", "linear-in-g", "first-derivatives")
# These do not compare gradients with right ones, so they run whatever those found.
INDEPENDENT = (
    *OF_VALUES, *OF_GRADIENTS, "raw-gradients", "unneeded-gradients", "vmap", "jvp",
    "gradients-unchanged", "retain_graph", "saved-on-ctx", "changes-in-between",
    "dual-numbers", "jacfwd", "compiled-backward", "A1", "A2",
)  # fmt: skip
# One cause, one finding: a finding of these checks explains one of the check.
AFTER: dict[str, tuple[str, ...]] = {
    "linear-in-g": ("determinism",),
    "first-derivatives": ("determinism", "linear-in-g"),
    "second-derivatives": ("raw-gradients",),
    "float32": ("reference",),
    "bfloat16": ("reference", "float32"),
    "float16": ("reference", "float32", "bfloat16"),
    "output-gradients": ("gradients-unchanged",),
    "unneeded-gradients": ("requires_grad-subsets",),
    "retain_graph": ("inputs-unchanged", "gradients-unchanged", "determinism"),
    "changes-in-between": (
        "first-derivatives", "saved-on-ctx", "inputs-unchanged", "gradients-unchanged",
    ),
    "outputs-freed": ("saved-on-ctx",),
    "N-d-inputs": ("raw-gradients", "reference", "output-gradients"),
    "empty-inputs": ("raw-gradients", "N-d-inputs"),
    "batched-gradients": ("raw-gradients", "gradients-unchanged"),
    "vmap-of-grad": ("raw-gradients", "gradients-unchanged", "vmap"),
    "jacrev": ("raw-gradients", "gradients-unchanged", "batched-gradients"),
    "jvp": ("first-derivatives",),
    "dual-numbers": ("first-derivatives", "jvp"),
    "jacfwd": ("first-derivatives", "jvp"),
    "compiled-backward": ("compile",),
    "autocast": ("float32", "bfloat16"),
    "A1": ("first-derivatives", "linear-in-g"),
}  # fmt: skip
# Where a function may draw other random numbers: in another dtype, order or shape.
DRAWN_ANEW = (
    "float32", "bfloat16", "float16", "reference", "input-layouts", "N-d-inputs",
    "empty-inputs", "batched-gradients", "vmap", "vmap-of-grad", "jacrev", "jvp",
    "jacfwd", "compile", "compiled-backward", "autocast", "second-device", "A1",
)  # fmt: skip


def examine(
    fn: Any,
    *inputs: Any,
    reference: Callable[..., Any] | None = None,
    surrogate: Callable[..., Any] | None = None,
    cost: bool | None = None,
    compile: bool | str = False,
    skip: Sequence[str] = (),
    only: Sequence[str] = (),
    strict: bool = False,
    tolerance: float | None = None,
    isolate: bool = False,
    seed: int = 0,
) -> Report:
    """Examine the derivatives of `fn` at `inputs`, and report a finding for each check.

    Args:
        fn: an autograd.Function (the class or its ``apply``), a function of tensors, or
            a module, whose parameters are examined as further inputs. It may return
            a tensor or several, in tuples, lists and dicts.
        inputs: its arguments: tensors of any shape, and whatever else it takes. They
            are copied. Those that require grad are differentiated; if none does, all
            floating ones (of a cost, the first). Avoid kinks such as ReLU at 0. Of up
            to 200 entries each is differenced; of more, that many and random
            directions. Rows are taken as examples where a row by itself gives what it
            gives among the others.
        reference: a function of the same arguments that is right; for a module, a
            function of its inputs and parameters, or a module with parameters of the
            same shapes in the same order, which are replaced by those of `fn`.
        surrogate: the function whose derivatives the backward is meant to return, where
            that is not `fn`: the identity for a straight-through estimator, -x for a
            gradient reversal, or ``lambda v: v + (v.round() - v).detach()``. It takes
            the same arguments, or the first of them.
        cost: whether `fn` is a cost, for which A1 and A2 must hold; None: if it returns
            one 0-d tensor from two inputs with as many rows, and its name contains
            cost, loss, entropy or likelihood, or its second input has integers or gets
            no gradient.
        compile: whether to compile it, with the backend "aot_eager" or the one named.
        skip: checks to leave out, by identifier or title.
        only: the only checks to run; empty: all.
        strict: whether a warning counts as a failure.
        tolerance: how far two results may be apart, relative to the largest entry of
            what is compared; None: 1e-5 from finite differences, and the dtype's
            rounding between two computations. Never less than that rounding.
        isolate: whether to examine in a child process, for code that may crash.
        seed: of all random numbers.

    Returns:
        the :class:`Report`; for a test, ``assert report.ok, report.brief()``.

    Raises:
        TypeError: `fn` or `surrogate` cannot be called, or an input is complex or
            sparse.
        ValueError: the parameters of a module as `reference` or `surrogate` do not fit,
            there is no such check, or `isolate` is not possible in this process.

    An error in a check is a finding. The inputs, the generators of random numbers, the
    grad mode and a module's buffers are restored. Where `fn` does not take float64,
    most checks use its own dtype.

    Differences move each entry by itself. So examine a function of symmetric, positive
    or normalised arguments as one of free arguments: ``lambda x: f(x + x.mT)``,
    ``lambda x: f(x.exp())``, ``lambda x: f(x.softmax(-1))``.

    Examples:
        >>> import torch, torchbp
        >>> x, W, b = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
        >>> report = torchbp.examine(torchbp.functional.linear_sigmoid, x, W, b)
        >>> report.ok, report["first-derivatives"].status
        (True, 'pass')
    """
    chosen = _chosen(skip, only)

    def run() -> Iterator[Any]:
        with undisturbed(inputs):
            subject = describe(
                fn,
                inputs,
                reference,
                surrogate,
                seed=seed,
                requested_tolerance=tolerance or 0.0,
                backend="aot_eager" if compile is True else compile or None,
            )
            yield _title(subject)
            try:
                subject = learn(subject, cost)
            except Exception as error:
                reason = f"raised {first_line(error)}"
                fix = fix_for(error, "pass arguments that it takes")
                yield Finding("forward", "fail", reason, fix)
            else:
                yield from _findings(subject, chosen)
            yield subject.calls.number

    name, *findings, calls = in_a_child(run, chosen) if isolate else run()
    return Report(name, tuple(findings), strict, calls)


def _chosen(skip: Sequence[str], only: Sequence[str]) -> list[str]:
    """The identifiers of the checks to be run."""
    named = {
        what: {
            str(name).replace(" ", "-")
            for name in ([names] if isinstance(names, str) else names)
        }
        for what, names in (("skip", skip), ("only", only))
    }
    for what, names in named.items():
        if unknown := names - set(CHECKS):
            raise ValueError(
                f"{what}: expected some of {', '.join(CHECKS)}, got {min(unknown)!r}"
            )
    wanted = named["only"] or set(CHECKS)
    return [name for name in CHECKS if name in wanted and name not in named["skip"]]


def _title(s: Subject) -> str:
    """The function's name with the shapes of its arguments."""

    def short(t: Any) -> str:
        if not isinstance(t, Tensor):
            return repr(t) if len(repr(t)) < 20 else type(t).__name__
        size = "×".join(map(str, t.shape)) or "0-d"
        return size if t.is_floating_point() else f"{size} {t.dtype}"[:20]

    arguments = ", ".join(map(short, s.arguments))
    return f"{s.name}({arguments})".replace("torch.", "")


def _findings(s: Subject, chosen: list[str]) -> Iterator[Finding]:
    """The finding of every check; an error of backward is that of one check."""
    ordered = ("first-derivatives", *chosen)
    bearer = next((n for n in ordered if n in chosen and n not in OF_VALUES), "")
    blocked = s.underivable or (f"see {bearer}" if s.backward_error else "")
    unexplained: set[str] = set()
    for name in chosen:
        causes = [n for n in _causes(name) if n in unexplained]
        if s.backward_error and name == bearer:
            reason = f"the backward raised {first_line(s.backward_error)}"
            yield Finding(name, "fail", reason, fix_for(s.backward_error, _RAISED))
        elif blocked and name not in OF_VALUES:
            yield Finding(name, "not applicable", blocked)
        elif causes:
            yield Finding(name, "not applicable", f"see {causes[0]}")
        else:
            finding = _finding(name, CHECKS[name], s)
            if finding.status in ("fail", "warn"):
                unexplained.add(name)
            yield finding


_RAISED = "call the backward by itself, with the output gradients that it should take"


def _causes(name: str) -> tuple[str, ...]:
    """The checks whose findings explain those of this one."""
    return (*AFTER.get(name, ()), *(() if name in INDEPENDENT else OF_GRADIENTS))


def _finding(name: str, check: Callable[[Subject], str], s: Subject) -> Finding:
    """The finding of one check."""
    try:
        return Finding(name, "pass", check(s))
    except Verdict as verdict:
        if verdict.status == "fail" and name in DRAWN_ANEW and s.is_random:
            reason = "it draws other random numbers in this check"
            return Finding(name, "not applicable", reason)
        return Finding(name, verdict.status, verdict.reason, verdict.fix)
    except Exception as error:
        reason = f"the check stopped at {first_line(error)}"
        return Finding(name, "fail", reason, fix_for(error))
