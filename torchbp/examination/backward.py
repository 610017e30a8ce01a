"""What a backward returns, and what it leaves behind."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchbp.examination.subject import Subject
from torchbp.examination.tools import (
    custom_nodes,
    difference,
    differences,
    flatten,
    replaced_backward,
)
from torchbp.examination.verdicts import (
    Fail,
    NotApplicable,
    Warn,
    must_run,
    numbered,
    shape_of,
)


def raw_gradients(s: Subject) -> str:
    """What backward itself returns: the engine sums a gradient of a broadcast shape and
    casts one of another dtype, silently."""
    seen = False
    for dtype in dict.fromkeys((s.dtype, s.own_dtype)):
        for call in _spied(s, s.copies(dtype), s.floats):
            seen = True
            call.check_raw(s)
    if not seen:
        raise NotApplicable("no autograd.Function of Python's in it")
    return "of their arguments' shapes, dtypes and devices"


class _Call:
    """One call of a hand-written backward."""

    leaves: Sequence[Tensor] = ()

    def __init__(self, ctx: Any, grads: Sequence[Any], result: Any) -> None:
        self.name = ctx._forward_cls.__name__
        self.needs = tuple(ctx.needs_input_grad)
        self.given = grads
        self.result = result if isinstance(result, tuple) else (result,)
        edges = [edge for edge in ctx.next_functions if edge[0] is not None]
        asked = [i for i, need in enumerate(self.needs) if need]
        # The edges that there are belong to the arguments that require grad, in order.
        self.nodes, self.wanted = {}, {}
        for i, (node, output) in zip(asked, edges, strict=False):
            # Now: of a node whose backward has run it can no longer be asked.
            meta = node._input_metadata[output]
            self.nodes[i] = node
            self.wanted[i] = {
                "shape": tuple(meta.shape),
                "dtype": meta.dtype,
                "device": meta.device,
            }

    def label(self, s: Subject, i: int) -> str:
        """What argument i is called, if it is one of the subject's."""
        variable = getattr(self.nodes.get(i), "variable", None)
        for k, leaf in zip(s.floats, self.leaves, strict=False):
            if variable is leaf:
                return s.labels[k]
        return f"argument {i} of {self.name}"

    def check_raw(self, s: Subject) -> None:
        """Warn unless each gradient is as its argument."""
        for i, wanted in self.wanted.items():
            grad = self.result[i] if i < len(self.result) else None
            if not isinstance(grad, Tensor):
                continue
            label = self.label(s, i)
            if tuple(grad.shape) != wanted["shape"]:
                shape = str(wanted["shape"]).replace(",)", ")")
                raise Warn(
                    f"{label}: backward returns {shape_of(grad)} for {shape}; the "
                    f"engine sums it silently",
                    "sum it over the examples; torch.func and create_graph need it so",
                )
            for what in ("dtype", "device"):
                got = getattr(grad, what)
                if got != wanted[what]:
                    raise Warn(
                        f"{label}: backward returns {got} for {wanted[what]}; the "
                        "engine casts it silently",
                        f"make new tensors with the argument's {what}",
                    )


def _spied(s: Subject, arguments: list[Any], wrt: Sequence[int]) -> list[_Call]:
    """The calls of hand-written backwards in one backward pass."""
    leaves = s.leaves(arguments, wrt)
    outputs = s.evaluate(arguments) if s.in_place else _called(s, arguments)
    classes = [n._forward_cls for n in custom_nodes(outputs)]
    calls: list[_Call] = []

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def spy(ctx: Any, *grads: Any) -> Any:
            given = list(grads[0]) if grads and isinstance(grads[0], list) else grads
            pointers = [_pointer(g) for g in given if isinstance(g, Tensor)]
            del given
            result = original(ctx, *grads)
            calls.append(_Call(ctx, pointers, result))
            return result

        return spy

    with replaced_backward(classes, make), must_run("the backward"):
        s.pull_back(outputs, leaves)
    for call in calls:
        call.leaves = leaves
    return calls


def _called(s: Subject, arguments: list[Any]) -> list[Tensor]:
    """The outputs for these very tensors; for clones, if it cannot have leaves."""
    try:
        return s.call(arguments)
    except RuntimeError:
        return s.evaluate(arguments)


def _pointer(t: Tensor) -> int:
    """Where its numbers are; its own number for a tensor without storage."""
    try:
        return t.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return id(t)


def unneeded_gradients(s: Subject) -> str:
    """No work is done for arguments that need no gradient; to hand on what was there
    anyway is no work."""
    seen = False
    for i in s.floats:
        for call in _spied(s, s.copies(), (i,)):
            needed = {
                _pointer(t)
                for t, need in zip(call.result, call.needs, strict=False)
                if need and isinstance(t, Tensor)
            }
            seen = seen or len(call.needs) > 1
            pairs = zip(call.result, call.needs, strict=False)
            for k, (grad, need) in enumerate(pairs):
                if need or not isinstance(grad, Tensor):
                    continue
                if _pointer(grad) not in {*needed, *call.given}:
                    raise Warn(
                        f"backward makes a gradient {shape_of(grad)} for argument {k} "
                        f"of {call.name}, which needs none",
                        f"ask ctx.needs_input_grad[{k}] first, and return None",
                    )
    if not seen:
        raise NotApplicable("no autograd.Function of several arguments in it")
    return "not computed"


def subsets(s: Subject) -> str:
    """The gradients are the same whichever others are asked for."""
    count = len(s.floats)
    if count < 2:
        raise NotApplicable("one argument to differentiate")
    _, everything = s.gradients(s.copies())
    right = dict(zip(s.floats, everything, strict=True))
    masks = range(1, 2**count) if count <= 4 else [2**k for k in range(count)]
    for mask in masks:
        chosen = [i for k, i in enumerate(s.floats) if mask >> k & 1]
        names = ", ".join(s.labels[i] for i in chosen)
        arguments = s.copies()
        with must_run(f"with requires_grad for {names} only, the backward"):
            leaves = s.leaves(arguments, chosen)
            outputs = s.differentiable(arguments)
            if not outputs:
                continue
            grads = s.pull_back(outputs, leaves)
        found = differences(
            grads,
            [right[i] for i in chosen],
            [s.labels[i] for i in chosen],
            s.tolerance(),
        )
        if found:
            raise Fail(
                f"with requires_grad for {names} only, the gradient of {found}",
                "let each gradient depend on its own entry of ctx.needs_input_grad",
            )
    return f"all {len(masks)} alike" if count <= 4 else "each alone as all together"


def inputs_unchanged(s: Subject) -> str:
    """No argument is written to, constants included, in the dtype that it came in: a
    cast to another dtype is a copy, to its own none."""
    if s.in_place:
        raise NotApplicable("it works in place, and declares it")
    arguments = s.copies(s.own_dtype)
    leaves = s.leaves(arguments)
    # Not leaves: torch refuses to overwrite those.
    passed = [t * 1 if t.__class__ is Tensor and t.requires_grad else t
              for t in arguments]  # fmt: skip
    before = [t.detach().clone() if isinstance(t, Tensor) else t for t in passed]
    versions = [t._version if isinstance(t, Tensor) else 0 for t in passed]
    outputs = s.call(passed)
    _unchanged(s, before, passed, versions, "forward")
    if s.backward_error or s.underivable:
        return "by forward"
    with must_run("the backward"):
        s.pull_back(outputs, leaves)
    _unchanged(s, before, passed, versions, "backward")
    return "by forward and backward"


def _unchanged(
    s: Subject, before: list[Any], after: list[Any], versions: list[int], who: str
) -> None:
    """Fail if `who` has written to one of the arguments."""
    for b, a, version, label in zip(before, after, versions, s.labels, strict=True):
        if not isinstance(b, Tensor):
            continue
        if difference(a, b, 0.0) or a._version != version:
            raise Fail(
                f"{who} overwrites {label}",
                "work out of place, or declare it with ctx.mark_dirty in forward",
            )


def output_gradients_unchanged(s: Subject) -> str:
    """Backward writes neither to what it receives nor to the outputs."""
    leaves, outputs = s.new_graph(s.own_dtype)
    values = [y.detach().clone() for y in outputs]
    cotangents = s.cotangents(outputs)
    before = [g.clone() for g in cotangents]
    with must_run("the backward"):
        s.pull_back(outputs, leaves, cotangents)
    for b, a, label in zip(before, cotangents, numbered(outputs), strict=True):
        if difference(a, b, 0.0):
            raise Fail(
                f"backward overwrites the gradient of the {label}",
                "it may be another's too: work out of place on what you did not make",
            )
    for b, y, label in zip(values, outputs, numbered(outputs), strict=True):
        if difference(y, b, 0.0):
            raise Fail(f"backward overwrites the {label}", "work out of place")
    return "by backward"


def retain_graph(s: Subject) -> str:
    """A second backward through one graph gives what the first gave."""
    leaves, outputs = s.new_graph(s.own_dtype)
    fix = "leave what is saved as it is, and on ctx"
    with must_run("the first backward"):
        first = s.pull_back(outputs, leaves, retain_graph=True)
    with must_run("with retain_graph, the second backward", fix):
        first = [g.clone() for g in first]
        second = s.pull_back(outputs, leaves, retain_graph=True)
    tolerance = s.tolerance(s.own_dtype)
    if found := differences(second, first, s.names, tolerance):
        raise Fail(f"the second time, the gradient of {found}", fix)
    return "the second backward is as the first"


def saved_on_ctx(s: Subject) -> str:
    """Tensors of the caller's belong to save_for_backward: on ctx they escape the check
    for changes in place and saved-tensor hooks; outputs there make a cycle."""
    arguments = s.copies(s.own_dtype)
    s.leaves(arguments)
    outputs = s.evaluate(arguments) if s.in_place else _called(s, arguments)
    nodes = custom_nodes(outputs)
    known = {f"the input {n}": t for n, t in zip(s.labels, arguments, strict=True)}
    known |= {f"the {n}": y for n, y in zip(numbered(outputs), outputs, strict=True)}
    for node in nodes:
        for attribute, value in vars(node).items():
            for t in flatten(value):
                for what, other in known.items():
                    same = (
                        isinstance(other, Tensor)
                        and t.numel()
                        and (t is other or _pointer(t) == _pointer(other))
                    )
                    if same:
                        raise Fail(
                            f"{what} is kept on ctx.{attribute}",
                            "use ctx.save_for_backward, for inputs and outputs alike",
                        )
    if not nodes:
        raise NotApplicable("no autograd.Function of Python's in it")
    return "neither inputs nor outputs"


def outputs_freed(s: Subject) -> str:
    """Outputs die with the last name for them."""
    arguments = s.copies()
    s.leaves(arguments)
    if s.in_place:
        raise NotApplicable("its output is its input")
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        # Not at the next collection of cycles, which may be far away.
        dead = [weakref.ref(y) for y in _called(s, arguments)]
        alive = [k for k, y in enumerate(dead) if y() is not None]
        if alive:
            gc.collect()
            label = numbered(dead)[alive[0]]  # type: ignore[arg-type]
            fix = "keep outputs with ctx.save_for_backward only"
            if dead[alive[0]]() is None:
                raise Fail(f"the {label} lives on in a cycle when it is dropped", fix)
            s.evaluate(arguments)
            if dead[alive[0]]() is not None:
                raise Fail(f"the {label} lives on when it is dropped", fix)
    finally:
        if was_enabled:
            gc.enable()
    return "when they are dropped"


def changes_in_between(s: Subject) -> str:
    """An argument or output overwritten between forward and backward gives an error
    where it is needed, not another gradient."""
    leaves, outputs = s.new_graph()
    right = s.pull_back(outputs, leaves)
    # Not parameters: a checkpoint that computes again does so with those of then.
    inputs = [i for i in s.floats if i < s.inputs]
    targets = [*inputs, *(-1 - k for k in range(len(outputs)))]
    for target in targets:
        arguments = s.copies()
        leaves = s.leaves(arguments)
        call = list(arguments)
        for i in s.floats:
            call[i] = arguments[i] * 1  # not a leaf: that may not be overwritten
        outputs = tuple(y for y in s.call(call) if y.requires_grad)
        cotangents = s.cotangents(outputs)
        name = numbered(outputs)[-1 - target] if target < 0 else s.labels[target]
        try:
            with torch.no_grad():
                changed = outputs[-1 - target] if target < 0 else call[target]
                changed.add_(1)
            ours = s.pull_back(outputs, leaves, cotangents)
        except RuntimeError:
            continue
        if found := differences(ours, right, s.names, s.tolerance()):
            raise Fail(
                f"{name} changed in place after forward: unnoticed, the gradient of "
                f"{found}",
                "save tensors with ctx.save_for_backward, not on ctx",
            )
    return "are noticed, or do no harm"
