"""The examination of an autograd.Function, a function or a module: whether its backward
is right, and what else it can be used with."""

from __future__ import annotations

import functools
import re
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchbp.examination import backward, costs, derivatives, layouts, transforms
from torchbp.examination.subject import Subject, make_subject
from torchbp.examination.tools import F64, first_line
from torchbp.examination.verdicts import Verdict

__all__ = ["Finding", "Report", "examine"]

STATUSES = ("fail", "pass", "not supported", "not applicable")
WIDTH = 88

CHECKS: dict[str, Callable[[Subject], str]] = {
    "forward": derivatives.forward,
    "first derivatives": derivatives.first_derivatives,
    "second derivatives": derivatives.second_derivatives,
    "reference": derivatives.reference,
    "float32": functools.partial(derivatives.in_dtype, torch.float32),
    "bfloat16": functools.partial(derivatives.in_dtype, torch.bfloat16),
    "float16": functools.partial(derivatives.in_dtype, torch.float16),
    "raw gradients": backward.raw_gradients,
    "requires_grad subsets": backward.subsets,
    "unneeded gradients": backward.unneeded_gradients,
    "output gradients": layouts.output_gradient_layouts,
    "undefined gradients": layouts.undefined_gradients,
    "input layouts": layouts.input_layouts,
    "inputs unchanged": backward.inputs_unchanged,
    "gradients unchanged": backward.output_gradients_unchanged,
    "retain_graph": backward.retain_graph,
    "saved on ctx": backward.saved_on_ctx,
    "changes in between": backward.changes_in_between,
    "outputs freed": backward.outputs_freed,
    "N-d inputs": layouts.n_d_inputs,
    "empty inputs": layouts.empty_inputs,
    "batched gradients": transforms.batched_gradients,
    "vmap": transforms.vmap,
    "vmap of grad": transforms.vmap_of_grad,
    "jacrev": transforms.jacrev,
    "jvp": transforms.jvp,
    "dual numbers": transforms.dual_numbers,
    "jacfwd": transforms.jacfwd,
    "compile": transforms.compile,
    "compiled backward": transforms.compiled_backward,
    "autocast": transforms.autocast,
    "determinism": transforms.determinism,
    "second device": transforms.second_device,
    "A1": costs.a1,
    "A2": costs.a2,
}
# What another check's failure leaves nothing to say about.
AFTER: dict[str, tuple[str, ...]] = {
    "second derivatives": ("first derivatives",),
    "float32": ("reference",),
    "bfloat16": ("reference",),
    "float16": ("reference",),
    "N-d inputs": ("first derivatives", "reference", "output gradients"),
    "compiled backward": ("compile",),
}
# These have something to say of a function without derivatives, too.
OF_VALUES = ("forward", "inputs unchanged", "outputs freed")


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: its name.
        status: "pass"; "fail", where something is wrong; "not supported", where it
            raises an error; "not applicable", where there was nothing to check.
        reason: what was seen.
        mend: what to do about it; "" if nothing.

    Examples:
        >>> print(Finding("vmap", "not supported", "there is no batching rule"))
        vmap                   not supported   there is no batching rule
    """

    check: str
    status: str
    reason: str
    mend: str = ""

    @property
    def line(self) -> str:
        """Everything but the mend, in one line."""
        return f"{self.check:<22} {self.status:<14}  {self.reason}"

    @property
    def is_cut(self) -> bool:
        """Whether the line is longer than a table has room for."""
        return len(self.line) > WIDTH

    def __str__(self) -> str:
        return self.line[: WIDTH - 1].rstrip() + "…" if self.is_cut else self.line


@dataclass(frozen=True)
class Report:
    """The findings on one function, in the order of the checks.

    ``report["vmap"]`` is one of them. ``str(report)`` is a table, and below it what
    failed or did not fit, why, and how to mend it.

    Attributes:
        name: the function's.
        findings: one for each check.

    Examples:
        >>> report = Report("f", (Finding("vmap", "pass", "as a loop does it"),))
        >>> report.ok, report["vmap"].status
        (True, 'pass')
        >>> print(report.brief())
        f: 1 pass
    """

    name: str
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not self.failures

    @property
    def failures(self) -> tuple[Finding, ...]:
        """The findings that failed."""
        return tuple(f for f in self.findings if f.status == "fail")

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __getitem__(self, check: str) -> Finding:
        for finding in self.findings:
            if finding.check == check:
                return finding
        raise KeyError(f"expected one of {[f.check for f in self]}, got {check!r}")

    def __str__(self) -> str:
        cut = [f for f in self if f.is_cut and f.status != "fail"]
        lines = [self._head(), "", *map(str, self.findings)]
        return "\n".join([*lines, *self._details([*self.failures, *cut])])

    def brief(self) -> str:
        """What failed, why, and how to mend it; no table."""
        return "\n".join([self._head(), *self._details(self.failures)])

    def _head(self) -> str:
        counts = [sum(f.status == status for f in self) for status in STATUSES]
        pairs = zip(counts, STATUSES, strict=True)
        summary = ", ".join(f"{count} {status}" for count, status in pairs if count)
        return f"{self.name}: {summary}"

    def _details(self, findings: Iterable[Finding]) -> Iterator[str]:
        for f in findings:
            yield ""
            yield from _wrapped(f"{f.check}: {f.reason}", "")
            if f.mend:
                yield from _wrapped(f"mend: {f.mend}", "  ")


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  "
    )


def examine(
    fn: Any,
    *inputs: Any,
    reference: Callable[..., Any] | None = None,
    cost: bool | None = None,
    compile: bool | str = False,
    seed: int = 0,
) -> Report:
    """Examine the derivatives of `fn` at `inputs`, and report a finding for each check.

    Args:
        fn: an autograd.Function (the class or its ``apply``), a function of tensors, or
            a module, whose parameters are examined as further inputs. What it returns
            may be a tensor or several.
        inputs: what it is called with: tensors, and whatever else it takes. They are
            copied. Those that require grad are differentiated; if none does, all
            floating ones (of a cost, the first). Small ones do: finite differences are
            taken at every entry. Keep off kinks, where they mean nothing. Rows with the
            first tensor's first size are taken as examples where they prove to be.
        reference: what is right: a function of the same arguments; for a module, a
            function of its inputs and parameters, or a module with parameters of the
            same shapes in the same order, for which the first one's stand in.
        cost: whether `fn` is a cost, to be held to A1 and A2; None: if it gives one 0-d
            tensor from two inputs with as many rows and is called a cost, loss, entropy
            or likelihood, or has a second input of integers or without a gradient.
        compile: whether to compile it, with the backend "aot_eager" or the one named.
        seed: of all that is random here.

    Returns:
        the :class:`Report`; for a test, ``assert report.ok, report.brief()``.

    Raises:
        TypeError: `fn` cannot be called, or an input is complex or sparse.
        ValueError: a module as `reference` whose parameters do not fit.

    Whatever goes wrong in a check is a finding. The inputs, the generators of random
    numbers, the grad mode and a module's buffers are as before when it returns. Where
    `fn` does not take float64, most checks make do with its own dtype.

    Examples:
        >>> import torch, torchbp
        >>> x, W, b = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
        >>> report = torchbp.examine(torchbp.functional.linear_sigmoid, x, W, b)
        >>> report.ok, report["first derivatives"].status
        (True, 'pass')
    """
    with _undisturbed(inputs):
        subject = make_subject(fn, inputs, reference, seed)
        subject.backend = "aot_eager" if compile is True else compile or None
        return Report(_title(subject), tuple(_findings(subject, cost)))


@contextmanager
def _undisturbed(inputs: tuple[Any, ...]) -> Iterator[None]:
    """The modes that the checks need, whatever the caller's; his are as before, and his
    random numbers, afterwards."""
    devices = sorted(
        {t.device.index for t in inputs if isinstance(t, Tensor) and t.is_cuda}
    )
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in {"cpu", *(t.device.type for t in inputs if isinstance(t, Tensor))}:
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield


def _title(s: Subject) -> str:
    def short(t: Any) -> str:
        if not isinstance(t, Tensor):
            return repr(t) if len(repr(t)) < 20 else type(t).__name__
        size = "×".join(map(str, t.shape)) or "0-d"
        return size if t.is_floating_point() else f"{size} {t.dtype}"[:20]

    arguments = ", ".join(map(short, s.arguments))
    return f"{s.name}({arguments})".replace("torch.", "")


def _findings(s: Subject, cost: bool | None) -> Iterator[Finding]:
    """Every check's finding; where the function cannot be called at all, that one."""
    try:
        why_not = _first_call(s, cost)
    except Exception as error:
        yield Finding(
            "forward", "fail", f"raised {first_line(error)}", "give it what it takes"
        )
        return
    failed: set[str] = set()
    for name, check in CHECKS.items():
        if why_not and name not in OF_VALUES:
            yield Finding(name, "not applicable", why_not)
        elif before := failed.intersection(AFTER.get(name, ())):
            yield Finding(name, "not applicable", f"see {min(before)} first")
        else:
            finding = _finding(name, check, s)
            if finding.status == "fail":
                failed.add(name)
            yield finding


def _finding(name: str, check: Callable[[Subject], str], s: Subject) -> Finding:
    try:
        return Finding(name, "pass", check(s))
    except Verdict as verdict:
        return Finding(name, verdict.status, verdict.reason, verdict.mend)
    except Exception as error:
        return Finding(name, "fail", f"the check stopped at {first_line(error)}")


def _first_call(s: Subject, cost: bool | None) -> str:
    """Learn what the function is like; say why it has no derivatives, or ""."""
    arguments = s.copies(s.own_dtype)
    with torch.no_grad():
        outputs = s.evaluate(arguments)
    if any(y is t for y in outputs for t in arguments):
        s.in_place = True
        original = s.function
        s.function = lambda *ts: original(
            *[t.clone() if isinstance(t, Tensor) else t for t in ts]
        )
    if any(y.layout != torch.strided for y in outputs):
        return "its outputs are not dense"
    s.is_cost = _looks_like_a_cost(s, outputs) if cost is None else bool(cost)
    asked = [i for i in s.floats if i < s.inputs]
    if s.is_cost and len(asked) > 1 and not s.was_asked:
        s.floats = (asked[0], *(i for i in s.floats if i >= s.inputs))
    if not s.floats:
        return "no floating input to differentiate by"
    s.dtype, s.refusal = _working_dtype(s)
    arguments = s.copies()
    s.leaves(arguments)
    if not any(y.requires_grad for y in s.evaluate(arguments)):
        return "no output requires grad"
    return ""


def _looks_like_a_cost(s: Subject, outputs: list[Tensor]) -> bool:
    """One number from two inputs with as many rows, of which the second is a target: by
    the function's name, or because it is of integers or gets no gradient."""
    first = [i for i in range(s.inputs) if isinstance(s.arguments[i], Tensor)][:2]
    if len(outputs) != 1 or outputs[0].dim() > 0 or len(first) < 2:
        return False
    output, target = (s.arguments[i] for i in first)
    if not (output.dim() and target.dim() and len(output) == len(target) > 1):
        return False
    if re.search("cost|loss|entropy|likelihood", s.name, re.IGNORECASE):
        return True
    if not target.is_floating_point():
        return True
    try:
        arguments = s.copies(s.own_dtype)
        (leaf,) = s.leaves(arguments, (first[1],))
        (y,) = s.evaluate(arguments)
        if not y.requires_grad:
            return True
        return torch.autograd.grad(y, leaf, allow_unused=True)[0] is None
    except Exception:
        return True


def _working_dtype(s: Subject) -> tuple[torch.dtype, str]:
    try:
        with torch.no_grad():
            s.evaluate(s.copies(F64))
    except Exception as error:
        return s.own_dtype, first_line(error)
    return F64, ""
