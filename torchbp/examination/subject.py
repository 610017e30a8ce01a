"""The function under examination, with copies of its arguments and the tools to call
and to differentiate it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from torchbp.examination.tools import (
    F64,
    TOLERANCE,
    cloned,
    difference,
    flatten,
    random_like,
    seed_generators,
    variables_of,
)


@dataclass
class CallCount:
    """How often a function was called; the copies of a Subject share one."""

    number: int = 0


@dataclass(frozen=True, eq=False)
class Subject:
    """A function to be examined; nothing of it changes after it is made.

    :func:`~torchbp.examination.prepare.describe` makes one, and
    :func:`~torchbp.examination.prepare.learn` another that knows the attributes from
    `dtype` on, which only calls of the function can tell.

    Attributes:
        name: as the report prints it.
        function: takes all arguments, those of a module's parameters last.
        arguments: copies, detached, in their own dtypes.
        labels: the arguments' names.
        floats: the positions of the arguments that are differentiated.
        inputs: how many arguments are inputs; the rest are a module's parameters.
        reference: a right function of the same arguments, or None.
        surrogate: the function whose derivatives the backward is meant to return, or
            None for the function's own.
        seed: of all random numbers.
        requested_tolerance: the caller's, or 0.
        backend: torch.compile's, or None.
        chosen_floats: whether the caller chose `floats` by requires_grad.
        calls: how often the function was called.
        dtype: the working dtype: float64 where the function takes that.
        refusal: why it does not take float64.
        is_cost: whether A1 and A2 are examined.
        in_place: whether the function returns one of its arguments, overwritten.
        accumulates: whether its backward adds to .grad itself, so that only
            ``backward()`` gives all gradients (a reentrant checkpoint).
        entries: at how many entries of the arguments differences are taken.
        is_exact: whether it computes in float64 inside, where it takes that.
        underivable: why it has no derivatives, or "".
        backward_error: what its backward raises, or None.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    labels: tuple[str, ...]
    floats: tuple[int, ...]
    inputs: int
    reference: Callable[..., Any] | None = None
    surrogate: Callable[..., Any] | None = None
    seed: int = 0
    requested_tolerance: float = 0.0
    backend: str | None = None
    chosen_floats: bool = False
    calls: CallCount = field(default_factory=CallCount)
    dtype: torch.dtype = F64
    refusal: str = ""
    is_cost: bool = False
    in_place: bool = False
    accumulates: bool = False
    entries: int = 200
    is_exact: bool = True
    underivable: str = ""
    backward_error: Exception | None = None

    # ------------------------------------------------------------ arguments

    @property
    def own_dtype(self) -> torch.dtype:
        """The dtype in which the differentiated arguments were passed."""
        tensors = [self.arguments[i] for i in self.floats]
        dtype: torch.dtype = tensors[0].dtype if tensors else torch.float32
        return dtype

    @property
    def names(self) -> list[str]:
        """The labels of the differentiated arguments."""
        return [self.labels[i] for i in self.floats]

    @property
    def device(self) -> torch.device:
        """The first tensor's."""
        tensors = [t for t in self.arguments if isinstance(t, Tensor)]
        return tensors[0].device if tensors else torch.device("cpu")

    def tolerance(self, dtype: torch.dtype | None = None) -> float:
        """The caller's, but no less than the rounding of `dtype`."""
        dtype = dtype or self.dtype
        if dtype == F64 and not self.is_exact:
            dtype = torch.float32
        usual = TOLERANCE.get(dtype, TOLERANCE[torch.float32])
        return max(usual, self.requested_tolerance)

    def copies(self, dtype: torch.dtype | None = None, device: Any = None) -> list[Any]:
        """Copies of the arguments, floating ones in `dtype` or the working dtype."""
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
        """The tensors that the function returns, complex ones as pairs of real ones.

        Each call draws the same random numbers.
        """
        self.calls.number += 1
        seed_generators(self.seed, self.device)
        outputs = flatten((function or self.function)(*arguments))
        return [torch.view_as_real(y) if y.is_complex() else y for y in outputs]

    def evaluate(
        self, arguments: Sequence[Any], function: Callable[..., Any] | None = None
    ) -> list[Tensor]:
        """`call` with clones, so that a function that overwrites its arguments fails
        the check of that alone."""
        clones = [t.clone() if isinstance(t, Tensor) else t for t in arguments]
        return self.call(clones, function)

    def differentiable(self, arguments: Sequence[Any]) -> tuple[Tensor, ...]:
        """Its outputs that have a gradient."""
        return tuple(y for y in self.evaluate(arguments) if y.requires_grad)

    def new_graph(
        self, dtype: torch.dtype | None = None
    ) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """The leaves and the differentiable outputs of a graph that no other check
        uses: only `retain_graph` examines a second pass through one."""
        arguments = self.copies(dtype)
        return self.leaves(arguments), self.differentiable(arguments)

    @cached_property
    def is_random(self) -> bool:
        """Whether another seed gives other values, in the working or the own dtype."""
        other = replace(self, seed=self.seed + 1)
        return any(
            difference(a, b, 0.0)
            for dtype in {self.dtype, self.own_dtype}
            for a, b in zip(
                self.evaluate(self.copies(dtype)),
                other.evaluate(self.copies(dtype)),
                strict=True,
            )
        )

    def closure(
        self,
        arguments: list[Any],
        wrt: Sequence[int] = (),
        function: Callable[..., Any] | None = None,
    ) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
        """A function of the arguments at `wrt` alone that returns the differentiable
        outputs, which a first call tells, and these arguments."""
        positions = tuple(wrt or self.floats)
        at = [arguments[i].detach() for i in positions]

        def evaluated(*tensors: Tensor) -> list[Tensor]:
            full = list(arguments)
            for i, t in zip(positions, tensors, strict=True):
                full[i] = t
            return self.evaluate(full, function)

        first = evaluated(*[t.clone().requires_grad_() for t in at])
        chosen = [k for k, y in enumerate(first) if y.requires_grad]

        def differentiable(*tensors: Tensor) -> tuple[Tensor, ...]:
            outputs = evaluated(*tensors)
            return tuple(outputs[k] for k in chosen)

        return differentiable, at

    # ------------------------------------------------------------ gradients

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
            fresh = cloned(arguments)
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
            grads = _accumulated(outputs, leaves, cotangents, options)
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

    @cached_property
    def rows(self) -> tuple[int, ...]:
        """The inputs whose rows are examples: a row by itself gives what it gives among
        the others. Empty if there are none."""
        candidates = self.row_candidates
        if self.is_cost:
            return candidates
        tries = [candidates, candidates[:1]] if candidates else []
        return next((c for c in tries if self._is_rowwise(c)), ())

    def _is_rowwise(self, candidates: tuple[int, ...]) -> bool:
        arguments = self.copies()
        rows = arguments[candidates[0]].shape[0]
        if rows < 2:
            return False
        try:
            whole = self.evaluate(arguments)
            for part in (slice(0, 1), slice(1, None)):
                outputs = self.evaluate(self.cut(arguments, candidates, part))
                for y, all in zip(outputs, whole, strict=True):
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


def _accumulated(
    outputs: Any, leaves: Any, cotangents: Any, options: dict[str, Any]
) -> list[Tensor | None]:
    """The gradients as ``backward()`` adds them to .grad, which is restored."""
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
