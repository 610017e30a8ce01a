"""Make a Subject from what the caller passed, and learn the rest from first calls."""

from __future__ import annotations

import functools
import inspect
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from torchbp.examination.differences import Slopes
from torchbp.examination.modules import ModuleFunction
from torchbp.examination.subject import Subject
from torchbp.examination.tools import F64, cloned, differences, first_line

# A slow function is differenced at fewer entries: for some ten seconds in all.
FEWEST, SECONDS = 8, 4


def describe(
    fn: Any,
    inputs: tuple[Any, ...],
    reference: Any = None,
    surrogate: Any = None,
    **options: Any,
) -> Subject:
    """Return `fn` and copies of its inputs as a Subject, without calling it.

    Args:
        fn: a Function class, a function or a module.
        inputs: its arguments.
        reference: a function that is right, or None.
        surrogate: the function whose derivatives are meant, or None.
        options: further attributes of the Subject.

    Raises:
        TypeError: `fn` or `surrogate` cannot be called, or an input is complex or
            sparse.
        ValueError: a module as `reference` or `surrogate` whose parameters do not fit.
    """
    if isinstance(fn, type) and issubclass(fn, Function):
        fn = fn.apply
    if not callable(fn) or isinstance(fn, type):
        got = f"the class {fn.__name__}" if isinstance(fn, type) else type(fn).__name__
        raise TypeError(f"fn: expected a Function, a function or a module, got {got}")
    for i, t in enumerate(inputs):
        if isinstance(t, Tensor) and t.is_complex():
            raise TypeError(f"inputs: expected real tensors, got {t.dtype} as {i}")
        if isinstance(t, Tensor) and t.layout != torch.strided:
            raise TypeError(f"inputs: expected dense tensors, got {t.layout} as {i}")
    count = len(inputs)
    floating = [
        i
        for i, t in enumerate(inputs)
        if isinstance(t, Tensor) and t.is_floating_point()
    ]
    chosen = [i for i in floating if inputs[i].requires_grad]
    parameters = dict(fn.named_parameters()) if isinstance(fn, nn.Module) else {}
    trained = [k for k, p in enumerate(parameters.values(), count) if p.requires_grad]
    return Subject(
        name=_name(fn),
        function=ModuleFunction(fn, count) if isinstance(fn, nn.Module) else fn,
        arguments=tuple(cloned([*inputs, *parameters.values()])),
        labels=(*_input_names(fn, count), *parameters),
        floats=(*(chosen or floating), *trained),
        inputs=count,
        reference=_same_arguments(reference, "reference", parameters, count),
        surrogate=_same_arguments(surrogate, "surrogate", parameters, count),
        chosen_floats=bool(chosen),
        **options,
    )


def _same_arguments(
    f: Any, what: str, parameters: Mapping[str, Tensor], inputs: int
) -> Callable[..., Any] | None:
    """`f` as a function of the subject's arguments, parameters included; a surrogate
    that takes fewer gets the first ones."""
    if isinstance(f, nn.Module):
        theirs = [tuple(p.shape) for p in f.parameters()]
        shapes = [tuple(p.shape) for p in parameters.values()]
        if parameters and theirs != shapes:
            raise ValueError(
                f"{what}: expected parameters of shapes {shapes}, got {theirs}"
            )
        return ModuleFunction(f, inputs, bool(parameters))
    if f is None or what == "reference":
        return f
    if not callable(f):
        raise TypeError(f"{what}: expected a function, got {type(f).__name__}")
    try:
        kinds = [p.kind for p in inspect.signature(f).parameters.values()]
    except (TypeError, ValueError):  # some builtins have no signature
        return f
    P = inspect.Parameter
    if P.VAR_POSITIONAL in kinds:
        return f
    count = sum(kind in (P.POSITIONAL_ONLY, P.POSITIONAL_OR_KEYWORD) for kind in kinds)
    return functools.partial(_first_of, f, count)


def _first_of(f: Callable[..., Any], count: int, *arguments: Any) -> Any:
    return f(*arguments[:count])


def _name(fn: Any) -> str:
    owner = getattr(fn, "__self__", None)
    if isinstance(owner, type):
        return f"{owner.__name__}.{fn.__name__}"
    return str(getattr(fn, "__name__", type(fn).__name__))


def _input_names(fn: Any, count: int) -> Iterator[str]:
    """The names of the function's own parameters, "input i" where it has none."""
    owner = getattr(fn, "__self__", None)
    names: list[str] = []
    try:
        if isinstance(owner, type) and issubclass(owner, Function):
            parameters = list(inspect.signature(owner.forward).parameters.values())
            takes_ctx = owner.setup_context is Function.setup_context
            parameters = parameters[1:] if takes_ctx else parameters
        else:
            call = fn.forward if isinstance(fn, nn.Module) else fn
            parameters = list(inspect.signature(call).parameters.values())
        for p in parameters:
            if p.kind not in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD):
                break
            names.append(p.name)
    except (TypeError, ValueError):  # some builtins have no signature
        pass
    for i in range(count):
        yield names[i] if i < len(names) else f"input {i}"


# ---------------------------------------------------------------- first calls


def learn(s: Subject, cost: bool | None) -> Subject:
    """Return `s` with all that calls of the function tell.

    Args:
        s: what :func:`describe` returned.
        cost: whether it is a cost; None: if it looks like one.

    Raises:
        Exception: what the function raises in its own dtype.
    """
    arguments = s.copies(s.own_dtype)
    outputs = s.call(arguments)
    s = replace(s, in_place=any(y is t for y in outputs for t in arguments))
    if any(y.layout != torch.strided for y in outputs):
        return replace(s, underivable="its outputs are not dense")
    s = replace(s, is_cost=_looks_like_a_cost(s, outputs) if cost is None else cost)
    asked = [i for i in s.floats if i < s.inputs]
    if s.is_cost and len(asked) > 1 and not s.chosen_floats:
        trained = [i for i in s.floats if i >= s.inputs]
        s = replace(s, floats=(asked[0], *trained))
    if not s.floats:
        return replace(s, underivable="no floating tensor among its arguments" + (
            "; tensors in lists or dicts are not seen: pass each by itself"
            if any(isinstance(t, (list, tuple, dict)) for t in s.arguments) else ""
        ))  # fmt: skip
    s = _in_working_dtype(s)
    arguments = s.copies()
    s.leaves(arguments)
    start = time.perf_counter()
    outputs = s.evaluate(arguments)
    affordable = SECONDS / (time.perf_counter() - start + 1e-9)
    s = replace(s, entries=int(max(FEWEST, min(s.entries, affordable))))
    if not any(y.requires_grad for y in outputs):
        return replace(s, underivable="no output requires grad")
    s = _with_backward(s)
    return s if s.backward_error else replace(s, is_exact=_is_exact(s))


def _looks_like_a_cost(s: Subject, outputs: Sequence[Tensor]) -> bool:
    """Whether it gives one number from two inputs with as many rows, of which the
    second is a target: by the function's name, or because it is of integers or gets no
    gradient."""
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


def _in_working_dtype(s: Subject) -> Subject:
    """`s` in float64, or in its own dtype if it refuses that."""
    try:
        s.evaluate(s.copies(F64))
    except Exception as error:
        return replace(s, dtype=s.own_dtype, refusal=first_line(error))
    return s


def _with_backward(s: Subject) -> Subject:
    """`s` in the dtype in which its backward runs, or with what that raises."""
    s = _with_engine(s)
    if s.backward_error and s.dtype != s.own_dtype:
        refusal = f"its backward raised {first_line(s.backward_error)}"
        own = _with_engine(replace(s, dtype=s.own_dtype, refusal=refusal))
        return s if own.backward_error else own
    return s


def _with_engine(s: Subject) -> Subject:
    """`s` by torch.autograd.grad, by ``backward()`` if that alone gives gradients, or
    with what its backward raises."""
    errors = []
    for accumulates in (False, True):
        s = replace(s, accumulates=accumulates, backward_error=None)
        arguments = s.copies()
        leaves = s.leaves(arguments)
        try:
            s.pull_back(s.evaluate(arguments), leaves)
        except Exception as error:
            errors.append(error)
            continue
        if s.accumulates or all(t.grad is None for t in leaves):
            return s
    return replace(s, accumulates=False, backward_error=errors[0])


def _is_exact(s: Subject) -> bool:
    """Whether forward and backward compute in float64, and not in less inside."""
    f, at = s.closure(s.copies())
    if s.dtype != F64 or Slopes(f, at, s.seed).is_coarse:
        return False
    _, outputs = s.new_graph()
    g, h = s.cotangents(outputs, 1), s.cotangents(outputs, 2)
    sets = g, h, [a + b for a, b in zip(g, h, strict=True)]
    one, other, both = (s.gradients(s.copies(), cotangents=gs)[1] for gs in sets)
    total = [a + b for a, b in zip(one, other, strict=True)]
    return not differences(both, total, s.names, 1e-12)
