"""The function under examination as a function of all its arguments, with copies of
the arguments and the tools to call and to differentiate it."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.func import functional_call

from torchbp.examination.tools import (
    F64,
    TOLERANCE,
    difference,
    flatten,
    random_like,
    seed_generators,
    variables_of,
)


@dataclass(eq=False)
class Subject:
    """What is examined.

    Attributes:
        name: as it stands in the report.
        function: takes all arguments, those of a module's parameters last.
        arguments: copies, detached, in the dtypes they came in.
        labels: what the arguments are called.
        floats: which of them are differentiated.
        inputs: how many are inputs; the rest are a module's parameters.
        reference: a function of the same arguments that is right, or None.
        surrogate: the function whose derivatives the backward is meant to return, or
            None for the function's own.
        given_tolerance: the caller's, or None.
        is_cost: whether A1 and A2 are examined.
        backend: torch.compile's, or None.
        in_place: whether the function returns one of its arguments, overwritten.
        dtype: in which it is examined: float64 where it takes that.
        refusal: why it does not take float64.
        was_asked: whether the caller chose `floats` by requires_grad.
        accumulates: whether its backward adds to .grad itself, so that only
            ``backward()`` gives all gradients (a checkpoint that is reentrant).
        has_backward: whether its backward runs without an error.
        calls: how often the function was called.
        entries: at how many entries of the arguments differences are taken.
        is_exact: whether it computes in float64 inside, where it takes that.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    labels: tuple[str, ...]
    floats: tuple[int, ...]
    inputs: int
    reference: Callable[..., Any] | None
    seed: int
    surrogate: Callable[..., Any] | None = None
    given_tolerance: float | None = None
    is_cost: bool = False
    backend: str | None = None
    in_place: bool = False
    dtype: torch.dtype = F64
    refusal: str = ""
    was_asked: bool = False
    accumulates: bool = False
    calls: int = 0
    has_backward: bool = True
    entries: int = 200
    is_exact: bool = True
    _rows: tuple[int, ...] | None = field(default=None, repr=False)

    # ------------------------------------------------------------ arguments

    @property
    def own_dtype(self) -> torch.dtype:
        """The dtype that the differentiated arguments came in."""
        tensors = [self.arguments[i] for i in self.floats]
        dtype: torch.dtype = tensors[0].dtype if tensors else torch.float32
        return dtype

    @property
    def device(self) -> torch.device:
        tensors = [t for t in self.arguments if isinstance(t, Tensor)]
        return tensors[0].device if tensors else torch.device("cpu")

    def tolerance(self, dtype: torch.dtype | None = None) -> float:
        """The caller's, but no less than the rounding of `dtype`."""
        dtype = dtype or self.dtype
        if dtype == F64 and not self.is_exact:
            dtype = torch.float32
        usual = TOLERANCE.get(dtype, TOLERANCE[torch.float32])
        return max(usual, self.given_tolerance or 0.0)

    def copies(self, dtype: torch.dtype | None = None, device: Any = None) -> list[Any]:
        """The arguments, copied; floating ones in `dtype`, the working one if None."""
        dtype = dtype or self.dtype

        def copied(t: Any) -> Any:
            if isinstance(t, nn.Module):
                return copy.deepcopy(t).to(device, dtype)
            if not isinstance(t, Tensor):
                return t
            return t.to(device, dtype if t.is_floating_point() else t.dtype, copy=True)

        return [copied(t) for t in self.arguments]

    def leaves(self, arguments: list[Any], wrt: Sequence[int] = ()) -> list[Tensor]:
        """The arguments at `wrt` (all `floats` if none), made to require grad."""
        return [arguments[i].requires_grad_() for i in wrt or self.floats]

    # ------------------------------------------------------------ calls

    def call(
        self, arguments: Sequence[Any], function: Callable[..., Any] | None = None
    ) -> list[Tensor]:
        """The tensors that the function returns, complex ones as pairs of real ones;
        the random numbers that it draws are the same at each call."""
        self.calls += 1
        seed_generators(self.seed, self.device)
        outputs = flatten((function or self.function)(*arguments))
        return [torch.view_as_real(y) if y.is_complex() else y for y in outputs]

    def evaluate(
        self, arguments: Sequence[Any], function: Callable[..., Any] | None = None
    ) -> list[Tensor]:
        """The same of clones: a function that overwrites its arguments fails the one
        check of that, and no other."""
        clones = [t.clone() if isinstance(t, Tensor) else t for t in arguments]
        return self.call(clones, function)

    def differentiable(self, arguments: Sequence[Any]) -> tuple[Tensor, ...]:
        """Its outputs that have a gradient."""
        return tuple(y for y in self.evaluate(arguments) if y.requires_grad)

    @functools.cached_property
    def is_random(self) -> bool:
        """Whether it gives other values with another seed, in either dtype."""
        with torch.no_grad():
            return any(self._is_random_in(d) for d in {self.dtype, self.own_dtype})

    def _is_random_in(self, dtype: torch.dtype) -> bool:
        first = self.evaluate(self.copies(dtype))
        self.seed += 1
        try:
            second = self.evaluate(self.copies(dtype))
        finally:
            self.seed -= 1
        return any(difference(a, b, 0.0) for a, b in zip(first, second, strict=True))

    def closure(
        self, arguments: list[Any], wrt: Sequence[int] = ()
    ) -> Callable[..., tuple[Tensor, ...]]:
        """A function of the arguments at `wrt` alone, that returns the differentiable
        outputs, known from a first call."""
        positions = tuple(wrt or self.floats)
        probe = list(arguments)
        for i in positions:
            probe[i] = probe[i].detach().clone().requires_grad_()
        chosen = [k for k, y in enumerate(self.evaluate(probe)) if y.requires_grad]

        def function(*tensors: Tensor) -> tuple[Tensor, ...]:
            full = list(arguments)
            for i, t in zip(positions, tensors, strict=True):
                full[i] = t
            outputs = self.evaluate(full)
            return tuple(outputs[k] for k in chosen)

        return function

    def cotangents(self, outputs: Sequence[Tensor], seed: int = 0) -> list[Tensor]:
        """Output gradients: random, never 0, of few bits, so exact in every dtype."""
        generator = torch.Generator("cpu").manual_seed(self.seed + seed)
        return [
            random_like(y, generator).to(dtype=y.dtype, device=y.device)
            for y in outputs
        ]

    def gradients(
        self,
        arguments: list[Any],
        wrt: Sequence[int] = (),
        function: Callable[..., Any] | None = None,
        cotangents: Sequence[Tensor] | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Every output, and the gradients of the arguments at `wrt`, zeros for None."""
        leaves = self.leaves(arguments, wrt)
        outputs = self.evaluate(arguments, function)
        return outputs, self.pull_back(outputs, leaves, cotangents)

    def right_gradients(
        self,
        arguments: list[Any],
        cotangents: Sequence[Tensor] | None = None,
        function: Callable[..., Any] | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The outputs of `function` (its own if None), and the gradients that it should
        have: the surrogate's where there is one."""
        outputs, grads = self.gradients(arguments, (), function, cotangents)
        if self.surrogate is not None:
            fresh = [
                t.detach().clone() if isinstance(t, Tensor) else t for t in arguments
            ]
            _, grads = self.gradients(fresh, (), self.surrogate, cotangents)
        return outputs, grads

    def pull_back(
        self,
        outputs: Sequence[Tensor],
        leaves: Sequence[Tensor],
        cotangents: Sequence[Tensor] | None = None,
        **options: Any,
    ) -> list[Tensor]:
        """The gradients of `leaves` from those of the differentiable `outputs`."""
        outputs = [y for y in outputs if y.requires_grad]
        if not (outputs and leaves):
            return [torch.zeros_like(t) for t in leaves]
        if cotangents is None:
            cotangents = self.cotangents(outputs)
        # Not the forward's seed: a mask that backward draws anew must differ.
        seed_generators(self.seed + 7919, self.device)
        if self.accumulates and not options.get("create_graph"):
            grads = self._accumulated(outputs, leaves, cotangents, options)
        else:
            grads = list(
                torch.autograd.grad(
                    outputs, leaves, cotangents, allow_unused=True, **options
                )
            )
        return [
            torch.zeros_like(t) if grad is None else grad
            for grad, t in zip(grads, leaves, strict=True)
        ]

    def _accumulated(
        self, outputs: Any, leaves: Any, cotangents: Any, options: dict[str, Any]
    ) -> list[Tensor | None]:
        known = [*leaves, *variables_of(outputs)]
        before = [t.grad for t in known]
        try:
            for t in known:
                t.grad = None
            torch.autograd.backward(outputs, cotangents, **options)
            return [t.grad for t in leaves]
        finally:
            for t, grad in zip(known, before, strict=True):
                t.grad = grad

    # ------------------------------------------------------------ rows

    @property
    def row_candidates(self) -> tuple[int, ...]:
        """The inputs that have as many rows as the first tensor."""
        tensors = {
            i: t
            for i, t in enumerate(self.arguments[: self.inputs])
            if isinstance(t, Tensor) and t.dim() > 0
        }
        if not tensors:
            return ()
        rows = next(iter(tensors.values())).shape[0]
        return tuple(i for i, t in tensors.items() if t.shape[0] == rows)

    @property
    def rows(self) -> tuple[int, ...]:
        """The inputs whose rows are examples: with one row the function gives that row
        of what it gives with all. Empty if there are none."""
        if self._rows is None:
            candidates = self.row_candidates
            if self.is_cost:
                self._rows = candidates
            else:
                tries = [candidates, candidates[:1]] if candidates else []
                self._rows = next((c for c in tries if self._is_rowwise(c)), ())
        return self._rows

    def _is_rowwise(self, candidates: tuple[int, ...]) -> bool:
        arguments = self.copies()
        rows = arguments[candidates[0]].shape[0]
        if rows < 2:
            return False
        try:
            with torch.no_grad():
                whole = self.evaluate(arguments)
                for part in (slice(0, 1), slice(1, None)):
                    got = self.evaluate(self.cut(arguments, candidates, part))
                    for y, all in zip(got, whole, strict=True):
                        if all.dim() == 0 or all.shape[0] != rows:
                            return False
                        if difference(y, all[part], self.tolerance()):
                            return False
        except Exception:
            return False
        return True

    def cut(self, arguments: list[Any], which: Sequence[int], part: Any) -> list[Any]:
        """The arguments with those at `which` cut to the rows `part`."""
        return [
            t.detach()[part].clone() if i in which else t
            for i, t in enumerate(arguments)
        ]


# ---------------------------------------------------------------- making one


def make_subject(
    fn: Any,
    inputs: tuple[Any, ...],
    reference: Any = None,
    seed: int = 0,
    surrogate: Any = None,
) -> Subject:
    """`fn`, its copied inputs and what belongs to them as a Subject."""
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
    asked = [i for i, t in enumerate(inputs) if _is_float(t) and t.requires_grad]
    floats = asked or [i for i, t in enumerate(inputs) if _is_float(t)]
    parameters = dict(fn.named_parameters()) if isinstance(fn, nn.Module) else {}
    floats += [count + k for k, p in enumerate(parameters.values()) if p.requires_grad]
    return Subject(
        name=_name(fn),
        function=_Stateless(fn, count) if isinstance(fn, nn.Module) else fn,
        arguments=tuple(map(_copy, [*inputs, *parameters.values()])),
        labels=(*_input_names(fn, count), *parameters),
        floats=tuple(floats),
        inputs=count,
        reference=_same_arguments(reference, "reference", parameters, count),
        seed=seed,
        surrogate=_same_arguments(surrogate, "surrogate", parameters, count),
        was_asked=bool(asked),
    )


def _same_arguments(
    f: Any, what: str, parameters: Mapping[str, Tensor], inputs: int
) -> Callable[..., Any] | None:
    """`f` as a function of the subject's arguments, parameters included; a function
    that takes fewer gets the first ones."""
    if isinstance(f, nn.Module):
        theirs = [tuple(p.shape) for p in f.parameters()]
        shapes = [tuple(p.shape) for p in parameters.values()]
        if parameters and theirs != shapes:
            raise ValueError(
                f"{what}: expected parameters of shapes {shapes}, got {theirs}"
            )
        return _Stateless(f, inputs, bool(parameters))
    if f is None or what == "reference":
        return f
    if not callable(f):
        raise TypeError(f"{what}: expected a function, got {type(f).__name__}")
    try:
        kinds = [p.kind for p in inspect.signature(f).parameters.values()]
    except (TypeError, ValueError):
        return f
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return f
    P = inspect.Parameter
    positional = P.POSITIONAL_ONLY, P.POSITIONAL_OR_KEYWORD
    return functools.partial(_first_of, f, sum(k in positional for k in kinds))


def _first_of(f: Callable[..., Any], count: int, *arguments: Any) -> Any:
    return f(*arguments[:count])


def _copy(t: Any) -> Any:
    return t.detach().clone() if isinstance(t, Tensor) else t


def _is_float(t: Any) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point()


def _name(fn: Any) -> str:
    owner = getattr(fn, "__self__", None)
    if isinstance(owner, type):
        return f"{owner.__name__}.{fn.__name__}"
    return str(getattr(fn, "__name__", type(fn).__name__))


def _input_names(fn: Any, count: int) -> Iterator[str]:
    """The names of the function's own parameters, where it tells them."""
    owner = getattr(fn, "__self__", None)
    names: list[str] = []
    try:
        if isinstance(owner, type) and issubclass(owner, Function):
            parameters = list(inspect.signature(owner.forward).parameters.values())
            lean = owner.setup_context is Function.setup_context
            parameters = parameters[1:] if lean else parameters
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


class _Stateless:
    """A module as a function of its inputs and then of its parameters.

    Each call sets the tensors on a new copy of the module, which lives as long as the
    graph does: a module that computes again in its backward finds them there.

    Args:
        module: the module; it is not changed.
        inputs: how many of the arguments are inputs.
        takes_parameters: whether the rest replaces its parameters.
    """

    def __init__(
        self, module: nn.Module, inputs: int, takes_parameters: bool = True
    ) -> None:
        self.module, self.inputs = module, inputs
        self.parameters = list(module.parameters()) if takes_parameters else []
        known = {id(p) for p in self.parameters}
        state = [*module.parameters(), *module.buffers()]
        self.fixed = [t for t in state if id(t) not in known]

    def _values(self, arguments: Sequence[Any]) -> list[tuple[Tensor, Tensor]]:
        """Each tensor of the module with the one that takes its place: buffers follow
        the arguments in dtype and device."""
        given = arguments[self.inputs :]
        like = next((t for t in (*given, *arguments) if _is_float(t)), None)

        def following(t: Tensor) -> Tensor:
            if like is None:
                return t.detach().clone()
            dtype = like.dtype if t.is_floating_point() else t.dtype
            return t.detach().to(like.device, dtype, copy=True)

        pairs = list(zip(self.parameters, given, strict=False))
        return [*pairs, *((t, following(t)) for t in self.fixed)]

    def __call__(self, *arguments: Any) -> Any:
        values = self._values(arguments)
        try:
            # Wherever the copy refers to a parameter it finds the one of the memo.
            copied = copy.deepcopy(self.module, {id(old): new for old, new in values})
        except Exception:  # what a module refers to may be impossible to copy
            return self.functional(*arguments)
        return copied(*arguments[: self.inputs])

    def functional(self, *arguments: Any) -> Any:
        """The same by functional_call, which torch.compile can trace."""
        new = {id(old): t for old, t in self._values(arguments)}
        state = [*self.module.named_parameters(), *self.module.named_buffers()]
        values = {name: new[id(t)] for name, t in state}
        return functional_call(self.module, values, arguments[: self.inputs])
