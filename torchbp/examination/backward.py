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
    same_gradients,
    shape_of,
)

_SAVED = "do not change what is saved, or what is on ctx"


# ---------------------------------------------------------------- calls of backward


class _Call:
    """One call of a hand-written backward.

    Attributes:
        name: the Function's.
        needs: ctx.needs_input_grad.
        received: where the output gradients are in memory.
        result: what it returned.
        edges: for each argument that requires grad the next node of the graph, and the
            argument's shape, dtype and device.
    """

    def __init__(self, ctx: Any, received: Sequence[int], result: Any) -> None:
        self.name = ctx._forward_cls.__name__
        self.needs = tuple(ctx.needs_input_grad)
        self.received = received
        self.result = result if isinstance(result, tuple) else (result,)
        # The edges belong to the arguments that require grad, in order.
        edges = [edge for edge in ctx.next_functions if edge[0] is not None]
        asked = [i for i, need in enumerate(self.needs) if need]
        # Read at once: a node whose backward has run no longer tells.
        self.edges = {
            i: (node, node._input_metadata[output])
            for i, (node, output) in zip(asked, edges, strict=False)
        }

    def check_raw(self, names: dict[int, str]) -> None:
        """Warn unless each gradient has its argument's shape, dtype and device; `names`
        are those of the leaves, by id."""
        for i, (node, meta) in self.edges.items():
            grad = self.result[i] if i < len(self.result) else None
            if not isinstance(grad, Tensor):
                continue
            variable = getattr(node, "variable", None)
            name = names.get(id(variable), f"argument {i} of {self.name}")
            if tuple(grad.shape) != tuple(meta.shape):
                raise Warn(
                    f"{name}: backward returns {shape_of(grad)} for {shape_of(meta)}; "
                    "the engine sums it silently",
                    "sum it over the examples; torch.func and create_graph need it so",
                )
            for what in ("dtype", "device"):
                got, wanted = getattr(grad, what), getattr(meta, what)
                if got != wanted:
                    raise Warn(
                        f"{name}: backward returns {got} for {wanted}; the engine "
                        "casts it silently",
                        f"make new tensors with the argument's {what}",
                    )

    def check_needs(self) -> None:
        """Warn if it made a gradient for an argument that needs none."""
        pairs = list(zip(self.result, self.needs, strict=False))
        needed = {_pointer(t) for t, need in pairs if need and isinstance(t, Tensor)}
        for k, (grad, need) in enumerate(pairs):
            if need or not isinstance(grad, Tensor):
                continue
            if _pointer(grad) not in {*needed, *self.received}:
                raise Warn(
                    f"backward makes a gradient {shape_of(grad)} for argument {k} of "
                    f"{self.name}, which needs none",
                    f"ask ctx.needs_input_grad[{k}] first, and return None",
                )


def _recorded(
    s: Subject, arguments: list[Any], wrt: Sequence[int]
) -> tuple[list[Tensor], list[_Call]]:
    """The leaves, and the calls of hand-written backwards in one backward pass."""
    leaves = s.leaves(arguments, wrt)
    outputs = _call_itself(s, arguments)
    classes = [n._forward_cls for n in custom_nodes(outputs)]
    calls: list[_Call] = []

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def recording(ctx: Any, *grads: Any) -> Any:
            # Boxed gradients come as one list, which the backward empties.
            boxed = bool(grads) and isinstance(grads[0], list)
            every = grads[0] if boxed else grads
            received = [_pointer(g) for g in every if isinstance(g, Tensor)]
            del every
            result = original(ctx, *grads)
            calls.append(_Call(ctx, received, result))
            return result

        return recording

    with replaced_backward(classes, make), must_run("the backward"):
        s.pull_back(outputs, leaves)
    return leaves, calls


def _call_itself(s: Subject, arguments: list[Any]) -> list[Tensor]:
    """The outputs for these very tensors; for clones, where it refuses leaves."""
    if s.in_place:
        return s.evaluate(arguments)
    try:
        return s.call(arguments)
    except RuntimeError:
        return s.evaluate(arguments)


def _pointer(t: Tensor) -> int:
    """The address of its numbers; its id if it has no storage."""
    try:
        return t.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return id(t)


def raw_gradients(s: Subject) -> str:
    """What backward itself returns has its arguments' shapes, dtypes and devices: the
    engine sums a gradient of a broadcast shape and casts one of another dtype,
    silently."""
    count = 0
    for dtype in dict.fromkeys((s.dtype, s.own_dtype)):
        leaves, calls = _recorded(s, s.copies(dtype), s.floats)
        count += len(calls)
        for call in calls:
            call.check_raw({id(t): n for t, n in zip(leaves, s.names, strict=True)})
    if not count:
        raise NotApplicable("no Python autograd.Function in it")
    return "of their arguments' shapes, dtypes and devices"


def unneeded_gradients(s: Subject) -> str:
    """Nothing is computed for arguments that need no gradient; a tensor that was
    received or is needed anyway costs nothing."""
    several = False
    for i in s.floats:
        for call in _recorded(s, s.copies(), (i,))[1]:
            several = several or len(call.needs) > 1
            call.check_needs()
    if not several:
        raise NotApplicable("no Python autograd.Function of several arguments in it")
    return "not computed"


def subsets(s: Subject) -> str:
    """The gradients are the same whichever others are requested."""
    count = len(s.floats)
    if count < 2:
        raise NotApplicable("one argument to differentiate")
    _, everything = s.gradients(s.copies())
    right = dict(zip(s.floats, everything, strict=True))
    masks = range(1, 2**count) if count <= 4 else [2**k for k in range(count)]
    for mask in masks:
        chosen = [i for k, i in enumerate(s.floats) if mask >> k & 1]
        labels = [s.labels[i] for i in chosen]
        which = f"with requires_grad for {', '.join(labels)} only, the"
        arguments = s.copies()
        with must_run(f"{which} backward"):
            leaves = s.leaves(arguments, chosen)
            outputs = s.differentiable(arguments)
            if not outputs:
                continue
            grads = s.pull_back(outputs, leaves)
        expected = [right[i] for i in chosen]
        if text := differences(grads, expected, labels, s.tolerance()):
            raise Fail(
                f"{which} gradient of {text}",
                "let each gradient depend on its own entry of ctx.needs_input_grad",
            )
    return f"all {len(masks)} alike" if count <= 4 else "each alone as all together"


# ---------------------------------------------------------------- side effects


def inputs_unchanged(s: Subject) -> str:
    """No argument is written to, constants included, in its own dtype: a cast to
    another dtype is a copy, a cast to its own is not."""
    if s.in_place:
        raise NotApplicable("it works in place, and declares it")
    arguments = s.copies(s.own_dtype)
    leaves = s.leaves(arguments)
    # Not leaves: torch refuses to overwrite those.
    passed = [t * 1 if type(t) is Tensor and t.requires_grad else t for t in arguments]
    before = [
        (t, t.detach().clone(), t._version, label)
        for t, label in zip(passed, s.labels, strict=True)
        if isinstance(t, Tensor)
    ]

    def must_be_unchanged(who: str) -> None:
        for t, value, version, label in before:
            if difference(t, value, 0.0) or t._version != version:
                raise Fail(
                    f"{who} overwrites {label}",
                    "work out of place, or declare it with ctx.mark_dirty in forward",
                )

    outputs = s.call(passed)
    must_be_unchanged("forward")
    if s.backward_error or s.underivable:
        return "by forward"
    with must_run("the backward"):
        s.pull_back(outputs, leaves)
    must_be_unchanged("backward")
    return "by forward and backward"


def output_gradients_unchanged(s: Subject) -> str:
    """Backward writes neither to the output gradients nor to the outputs."""
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
                "work out of place: it may be in use elsewhere",
            )
    for b, y, label in zip(values, outputs, numbered(outputs), strict=True):
        if difference(y, b, 0.0):
            raise Fail(f"backward overwrites the {label}", "work out of place")
    return "by backward"


def retain_graph(s: Subject) -> str:
    """A second backward through one graph gives what the first gave."""
    leaves, outputs = s.new_graph(s.own_dtype)
    with must_run("the first backward"):
        first = s.pull_back(outputs, leaves, retain_graph=True)
        first = [g.clone() for g in first]
    with must_run("with retain_graph, the second backward", _SAVED):
        second = s.pull_back(outputs, leaves, retain_graph=True)
    tolerance = s.tolerance(s.own_dtype)
    same_gradients(s, second, first, "the second time,", _SAVED, tolerance)
    return "the second backward is as the first"


def saved_on_ctx(s: Subject) -> str:
    """Inputs and outputs are saved by save_for_backward: on ctx they escape the check
    for changes in place and the saved-tensor hooks, and outputs make a cycle."""
    arguments = s.copies(s.own_dtype)
    s.leaves(arguments)
    outputs = _call_itself(s, arguments)
    nodes = custom_nodes(outputs)
    if not nodes:
        raise NotApplicable("no Python autograd.Function in it")
    known = {f"the input {n}": t for n, t in zip(s.labels, arguments, strict=True)}
    known |= {f"the {n}": y for n, y in zip(numbered(outputs), outputs, strict=True)}
    known = {what: t for what, t in known.items() if isinstance(t, Tensor)}
    for node in nodes:
        for attribute, value in vars(node).items():
            for t in flatten(value):
                for what, other in known.items():
                    if t.numel() and _pointer(t) == _pointer(other):
                        raise Fail(
                            f"{what} is saved on ctx.{attribute}",
                            "use ctx.save_for_backward, for inputs and outputs alike",
                        )
    return "neither inputs nor outputs"


def outputs_freed(s: Subject) -> str:
    """Outputs are freed with the last reference to them."""
    if s.in_place:
        raise NotApplicable("its output is its input")
    arguments = s.copies()
    s.leaves(arguments)
    was_enabled = gc.isenabled()
    gc.disable()  # freed at once, not by the next collection of cycles
    try:
        outputs = [weakref.ref(y) for y in _call_itself(s, arguments)]
        alive = [k for k, y in enumerate(outputs) if y() is not None]
        if alive:
            gc.collect()
            label, output = numbered(outputs)[alive[0]], outputs[alive[0]]
            fix = "save outputs with ctx.save_for_backward only"
            if output() is None:
                raise Fail(f"the {label} is held by a cycle after it is dropped", fix)
            s.evaluate(arguments)
            if output() is not None:
                raise Fail(f"the {label} is never freed", fix)
    finally:
        if was_enabled:
            gc.enable()
    return "when they are dropped"


def changes_in_between(s: Subject) -> str:
    """An argument or output overwritten between forward and backward gives an error
    where it is needed, not another gradient."""
    leaves, outputs = s.new_graph()
    right = s.pull_back(outputs, leaves)
    # Not parameters: a checkpoint that recomputes does so with the changed ones.
    names = [(s.labels[i], i) for i in s.floats if i < s.inputs]
    names += [(name, -1 - k) for k, name in enumerate(numbered(outputs))]
    for name, target in names:
        arguments = s.copies()
        leaves = s.leaves(arguments)
        passed = list(arguments)
        for i in s.floats:
            passed[i] = arguments[i] * 1  # not a leaf: torch refuses to overwrite those
        outputs = tuple(y for y in s.call(passed) if y.requires_grad)
        cotangents = s.cotangents(outputs)
        try:
            with torch.no_grad():
                (outputs[-1 - target] if target < 0 else passed[target]).add_(1)
            ours = s.pull_back(outputs, leaves, cotangents)
        except RuntimeError:
            continue
        what = f"{name} changed in place after forward: unnoticed,"
        fix = "save tensors with ctx.save_for_backward, not on ctx"
        same_gradients(s, ours, right, what, fix)
    return "are noticed, or do no harm"
