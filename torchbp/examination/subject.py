"""A function under examination, in one form: a function of all its arguments, whatever
it was, with the arguments as copies and the tools to call and to differentiate it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
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
        is_cost: whether A1 and A2 are examined.
        backend: torch.compile's, or None.
        in_place: whether the function gives back one of its arguments, overwritten.
        dtype: in which it is examined: float64 where it takes that.
        refusal: why it does not take float64.
        was_asked: whether the caller chose `floats` by requires_grad.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    labels: tuple[str, ...]
    floats: tuple[int, ...]
    inputs: int
    reference: Callable[..., Any] | None
    seed: int
    is_cost: bool = False
    backend: str | None = None
    in_place: bool = False
    dtype: torch.dtype = F64
    refusal: str = ""
    was_asked: bool = False
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

    def copies(self, dtype: torch.dtype | None = None, device: Any = None) -> list[Any]:
        """The arguments, copied; floating ones in `dtype`, the working one if None."""
        dtype = dtype or self.dtype

        def copied(t: Any) -> Any:
            if not isinstance(t, Tensor):
                return t
            return t.to(device, dtype if t.is_floating_point() else t.dtype, copy=True)

        return [copied(t) for t in self.arguments]

    def leaves(self, arguments: list[Any], wrt: Sequence[int] = ()) -> list[Tensor]:
        """The arguments at `wrt` (all `floats` if none), made to require grad."""
        return [arguments[i].requires_grad_() for i in wrt or self.floats]

    # ------------------------------------------------------------ calls

    def evaluate(
        self, arguments: Sequence[Any], function: Callable[..., Any] | None = None
    ) -> list[Tensor]:
        """The tensors that the function returns, complex ones as pairs of real ones;
        whatever it draws is the same at each call."""
        seed_generators(self.seed, self.device)
        outputs = flatten((function or self.function)(*arguments))
        return [torch.view_as_real(y) if y.is_complex() else y for y in outputs]

    def differentiable(self, arguments: Sequence[Any]) -> tuple[Tensor, ...]:
        """Its outputs that have a gradient."""
        return tuple(y for y in self.evaluate(arguments) if y.requires_grad)

    @functools.cached_property
    def is_random(self) -> bool:
        """Whether it gives something else with another seed."""
        with torch.no_grad():
            first = self.evaluate(self.copies())
            self.seed += 1
            try:
                second = self.evaluate(self.copies())
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
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Every output, and the gradients of the arguments at `wrt`, zeros for None."""
        leaves = self.leaves(arguments, wrt)
        outputs = self.evaluate(arguments, function)
        return outputs, self.pull_back(outputs, leaves)

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
        grads = torch.autograd.grad(
            outputs, leaves, cotangents, allow_unused=True, **options
        )
        return [
            torch.zeros_like(t) if grad is None else grad
            for grad, t in zip(grads, leaves, strict=True)
        ]

    def numeric(
        self, f: Callable[..., Sequence[Tensor]], at: Sequence[Tensor]
    ) -> list[Tensor]:
        """The gradients of Σ f by central differences, an entry at a time."""
        step = 1e-6
        result = []
        with torch.no_grad():
            at = [t.detach().clone() for t in at]
            for t in at:
                grad = torch.zeros(t.shape, dtype=t.dtype, device=t.device)
                t_flat, grad_flat = t.view(-1), grad.view(-1)
                for j in range(t.numel()):
                    value = t_flat[j].item()
                    ends = []
                    for end in (value + step, value - step):
                        t_flat[j] = end
                        ends.append(sum(y.sum() for y in f(*[u.clone() for u in at])))
                    t_flat[j] = value
                    grad_flat[j] = (ends[0] - ends[1]) / (2 * step)
                result.append(grad)
        return result

    @functools.cached_property
    def jacobian(self) -> list[Tensor]:
        """∂(all differentiable outputs, end to end)/∂(each argument), by central
        differences: (outputs, argument's entries)."""
        step = 1e-6
        arguments = self.copies(F64)
        f = self.closure(arguments)
        at = [arguments[i].detach().contiguous() for i in self.floats]
        result = []
        with torch.no_grad():
            for t in at:
                flat, columns = t.view(-1), []
                for j in range(t.numel()):
                    value = flat[j].item()
                    ends = []
                    for end in (value + step, value - step):
                        flat[j] = end
                        outputs = f(*[u.clone() for u in at])
                        ends.append(torch.cat([y.reshape(-1) for y in outputs]))
                    flat[j] = value
                    columns.append((ends[0] - ends[1]) / (2 * step))
                result.append(torch.stack(columns, 1) if columns else flat.view(0, 0))
        return result

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
                        if difference(y, all[part], TOLERANCE[self.dtype]):
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
    reference: Any,
    seed: int,
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
    copies = tuple(_copy(t) for t in inputs)
    labels = tuple(_input_names(fn, len(inputs)))
    asked = [i for i, t in enumerate(inputs) if _is_float(t) and t.requires_grad]
    floats = asked or [i for i, t in enumerate(inputs) if _is_float(t)]
    function, truth = fn, reference
    if isinstance(fn, nn.Module):
        parameters = dict(fn.named_parameters())
        names = list(parameters)
        floats += [
            len(inputs) + k
            for k, p in enumerate(parameters.values())
            if p.requires_grad
        ]
        copies += tuple(_copy(p) for p in parameters.values())
        labels += tuple(names)
        function = _stateless(fn, names, len(inputs))
        if isinstance(reference, nn.Module):
            theirs = {n: p.shape for n, p in reference.named_parameters()}
            shapes = [p.shape for p in parameters.values()]
            if list(theirs.values()) != shapes:
                raise ValueError(
                    f"reference: expected parameters of shapes "
                    f"{[tuple(s) for s in shapes]}, got "
                    f"{[tuple(s) for s in theirs.values()]}"
                )
            truth = _stateless(reference, list(theirs), len(inputs))
    elif isinstance(reference, nn.Module):
        truth = _stateless(reference, (), len(inputs))
    return Subject(
        name=_name(fn),
        function=function,
        arguments=copies,
        labels=labels,
        floats=tuple(floats),
        inputs=len(inputs),
        reference=truth,
        seed=seed,
        was_asked=bool(asked),
    )


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
    """What the function itself calls its inputs, where it says."""
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


def _stateless(
    module: nn.Module, names: Sequence[str], inputs: int
) -> Callable[..., Any]:
    """The module as a function of its inputs and of the parameters named. The rest of
    its state follows them in dtype and device, as copies."""
    state = [*module.named_parameters(), *module.named_buffers()]
    fixed = {n: t for n, t in state if n not in names}

    def function(*arguments: Any) -> Any:
        like = next(
            (t for t in (*arguments[inputs:], *arguments) if _is_float(t)), None
        )

        def following(t: Tensor) -> Tensor:
            if like is None:
                return t.detach().clone()
            dtype = like.dtype if t.is_floating_point() else t.dtype
            return t.detach().to(like.device, dtype, copy=True)

        values = {n: following(t) for n, t in fixed.items()}
        values |= zip(names, arguments[inputs:], strict=True)
        return functional_call(module, values, arguments[:inputs])

    return function if names or fixed else module
