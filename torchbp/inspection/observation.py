"""z, a, δ and the gradients of every layer, as they come by.

Every number that the package shows of a layer at work has its home here: the table of
a :class:`Trace`, the dashboard and ``torchbp.compare`` read them from a
:class:`Record`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchbp import functional
from torchbp._terminal import aligned, html_table
from torchbp.convert import from_native
from torchbp.nn import BPLinear, check_takes

__all__ = ["Record", "Trace", "evaluating", "observe", "probe"]

# A neuron counts as saturated where σ' is below this share of its largest value: for
# the sigmoid |z| > 4.4, for tanh |z| > 2.2, for ReLU wherever it is off.
SATURATED = 0.05


@dataclass(eq=False)
class Record:
    """One call of one layer. All tensors are copies, detached.

    Attributes:
        name: the layer's name in the observed model ("" if it is the model).
        function: the layer's Function, with its σ'.
        x: a^{ℓ-1}, (*, n_in).
        weight, bias: W and b at the call; bias None if there is none.
        z, a: (*, n_out).
        sigma_prime: σ'(z), (*, n_out).
        delta: ∂C/∂z, (*, n_out); None until a backward pass reaches the call. After
            several backward passes (``retain_graph=True``), that of the last: unlike
            ``.grad``, a record does not add them up.
        grad_weight, grad_bias: ∂C/∂W and ∂C/∂b of this call alone; None as above, and
            for parameters that do not require grad.
        grad_a: ∂C/∂a as it arrived, before σ', (*, n_out): ∇_a C at the last layer.
            None as above.

    `hooked` and `reruns` are for :func:`observe` itself: whether the call's output
    tells of its backward pass, and how often checkpointing has run the call again.

    Examples:
        >>> import torch, torchbp
        >>> layer = torchbp.BPLinearSigmoid(2, 1)
        >>> with observe(layer) as trace:
        ...     C = torchbp.QuadraticCost()(layer(torch.rand(3, 2)), torch.rand(3, 1))
        ...     C.backward()
        >>> record = trace[0]
        >>> torch.allclose(record.delta, record.grad_a * record.sigma_prime)  # BP1
        True
        >>> torch.allclose(record.grad_weight, record.delta.T @ record.x)  # BP4
        True
        >>> record
        <Record of '': 3 x 2 → 1, forward and backward>
    """

    name: str
    function: type[functional.LinearFunction]
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    z: Tensor
    a: Tensor
    sigma_prime: Tensor
    delta: Tensor | None = None
    grad_weight: Tensor | None = None
    grad_bias: Tensor | None = None
    grad_a: Tensor | None = None
    # Whether the call's own output has the hook that fills in the backward half, and
    # how often checkpointing has run the call again because it has not.
    hooked: bool = False
    reruns: int = 0

    def __repr__(self) -> str:
        passed = "forward" if self.delta is None else "forward and backward"
        return f"<Record of {self.name!r}: {self.shapes}, {passed}>"

    @property
    def shapes(self) -> str:
        """Rows, n_in and n_out: "10 x 784 → 30"."""
        return f"{' x '.join(map(str, self.x.shape))} → {self.weight.shape[0]}"

    @property
    def saturated(self) -> float:
        """The share of neurons, over all examples, whose σ' is below 5 % of its largest
        value: BP1 and BP2 multiply by it, so these hardly learn."""
        threshold = SATURATED * self.function.max_slope
        return (self.sigma_prime.abs() < threshold).float().mean().item()

    def norm(self, quantity: str) -> float | None:
        """The root of the sum of squares of one of the record's tensors, say "a" or
        "grad_weight", over all its entries; None where the record has none.

        Raises:
            ValueError: `quantity` names no tensor of a record.
        """
        if quantity not in _QUANTITIES:
            raise ValueError(
                f"quantity: expected one of {', '.join(_QUANTITIES)}, got {quantity!r}"
            )
        t: Tensor | None = getattr(self, quantity)
        return None if t is None else _norm(t)

    @property
    def mean_delta(self) -> Tensor | None:
        """The mean over the examples of their own δ, ∂C_x/∂z, (n_out): the sum of
        `delta`, which carries the 1/n. It is ∂C/∂b, and its norm the "speed at which
        the layer learns" of the book's chapter 5. None without a backward pass."""
        return None if self.delta is None else functional.as_rows(self.delta).sum(0)

    def update_ratio(self, lr: float = 1.0) -> float | None:
        """η‖∂C/∂W‖/‖W‖: how far a step of plain gradient descent moves W, relative to
        W, with η = `lr`; None without ∂C/∂W.
        """
        if self.grad_weight is None:
            return None
        step, size = lr * _norm(self.grad_weight), _norm(self.weight)
        return step / size if size else math.inf if step else 0.0

    @property
    def example_gradient_norms(self) -> Tensor:
        """The norm of ∂C_x/∂(W, b) for every example x, (*).

        The gradient of one example is the outer product of its δ and (a^{ℓ-1}, 1), so
        its norm is n ‖δ‖ √(‖a^{ℓ-1}‖² + 1) and no per-example gradient is made; the n
        undoes the mean that δ carries. For rows that are examples.

        Raises:
            RuntimeError: no backward pass has reached this call.
        """
        if self.delta is None:
            raise RuntimeError(f"{self.name}: expected a backward pass first, got none")
        n = self.delta.shape[:-1].numel()
        ones = 0 if self.bias is None else 1
        inputs = (self.x.square().sum(-1) + ones).sqrt()
        return n * torch.linalg.vector_norm(self.delta, dim=-1) * inputs


_QUANTITIES = (
    "x weight bias z a sigma_prime delta mean_delta grad_weight grad_bias grad_a"
).split()


def _norm(t: Tensor) -> float:
    # In float16 a norm overflows at 65504.
    wide = torch.promote_types(t.dtype, torch.float32)
    return torch.linalg.vector_norm(t, dtype=wide).item()


@dataclass(eq=False)
class Trace:
    """The records of every call, in order: ``trace[i]``, or ``trace["layers.0"]`` for
    the calls of one layer. ``print(trace)`` is :meth:`table`.

    Attributes:
        records: the same as a list.

    Examples:
        >>> import torch, torchbp
        >>> model = torchbp.MLP([4, 3, 2])
        >>> with observe(model) as trace:
        ...     _ = model(torch.rand(5, 4))
        >>> [record.name for record in trace]
        ['layers.0', 'layers.1']
        >>> [tuple(record.z.shape) for record in trace["layers.1"]]
        [(5, 2)]
    """

    records: list[Record] = field(default_factory=list)

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        return f"<Trace of {len(self)} calls>"

    def table(self, lr: float | None = None) -> str:
        """A line for each call: its shapes, ‖a‖, the share of saturated neurons, ‖δ‖,
        ‖∂C/∂W‖, ‖∂C/∂b‖ and the update-to-weight ratio; "—" where there is none.

        Args:
            lr: η, for η‖∂C/∂W‖/‖W‖. Without it, as in ``print(trace)``, the column is
                ‖∂C/∂W‖/‖W‖, which is the ratio at η = 1.

        Norms are over all entries, examples included.
        """
        if not self.records:
            return (
                "no calls: none was made in the block, or a function compiled before "
                "it made them unseen"
            )
        table = aligned(self._lines(lr), left=2)
        return table if lr is None else f"{table}\nη = {lr:g}"

    def _repr_html_(self) -> str:
        lines = self._lines(None)
        return html_table(repr(self).strip("<>"), lines, left=2, verdicts={})

    def _lines(self, lr: float | None) -> list[list[str]]:
        """The table's headings and rows."""
        titles = "layer|shapes|‖a‖|saturated|‖δ‖|‖∂C/∂W‖|‖∂C/∂b‖".split("|")
        titles.append("‖∂C/∂W‖/‖W‖" if lr is None else "η‖∂C/∂W‖/‖W‖")
        lines = [titles]
        for record in self.records:
            cells = [
                _number(record.norm("a")),
                "—" if record.a.numel() == 0 else f"{100 * record.saturated:.1f} %",
                *map(_number, map(record.norm, ("delta", "grad_weight", "grad_bias"))),
                _number(record.update_ratio(1.0 if lr is None else lr)),
            ]
            lines.append([record.name or "(model)", record.shapes, *cells])
        return lines

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    @overload
    def __getitem__(self, key: int) -> Record: ...
    @overload
    def __getitem__(self, key: str | slice) -> list[Record]: ...
    def __getitem__(self, key: int | slice | str) -> Record | list[Record]:
        if not isinstance(key, str):
            return self.records[key]
        found = [record for record in self.records if record.name == key]
        if not found:
            names = sorted({record.name for record in self.records})
            raise KeyError(f"expected one of {names}, got {key!r}")
        return found


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:.3g}"


@contextmanager
def observe(model: nn.Module) -> Iterator[Trace]:
    """Record what every layer of ours in `model` computes, forward and backward.

    Args:
        model: any module; its layers that are not ours are left alone.

    Yields:
        the :class:`Trace`, which fills as the layers are called and as backward passes
        come by. It stays readable after the block; calls after it are not recorded, the
        backward pass of a call within it is. A second backward pass through the same
        call writes over what the first left in the record.

    Raises:
        ValueError: `model` has no layer of ours, or it or a part of it is compiled.
        RuntimeError: in the forward pass, under torch.compile or a torch.func
            transform, where values cannot be looked at.

    Each call is one record, also where activation checkpointing runs it again in the
    backward pass; with ``use_reentrant=True`` the backward pass must then be within the
    block. Copies of the model are not observed. A function that was compiled around
    the model before the block runs as it was compiled: the trace stays empty, and says
    so when printed.

    Examples:
        >>> import torch, torchbp
        >>> model = torchbp.MLP([4, 3, 2])
        >>> with torchbp.observe(model) as trace:
        ...     C = torchbp.QuadraticCost()(model(torch.rand(5, 4)), torch.rand(5, 2))
        ...     C.backward()
        >>> [tuple(record.delta.shape) for record in trace]
        [(5, 3), (5, 2)]
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, BPLinear)}
    if not layers:
        native = any(type(m) is nn.Linear for m in model.modules())
        advice = "; from_native converts its nn.Linear" if native else ""
        raise ValueError(
            f"observe: expected a model with hand-written layers, got "
            f"{type(model).__name__} without any{advice}"
        )
    if any(map(_is_compiled, model.modules())):
        raise ValueError(
            "observe: expected a model that is not compiled, got one that is; observe "
            "the module that was given to torch.compile"
        )
    trace = Trace()
    handles = [
        # First of all hooks: others may replace the output.
        layer.register_forward_hook(
            _recorder(name, layer, trace), prepend=True, with_kwargs=True
        )
        for name, layer in layers.items()
    ]
    try:
        yield trace
    finally:
        for handle in handles:
            handle.remove()


def _is_compiled(model: nn.Module) -> bool:
    # By its attribute: the class would cost a second's import of torch._dynamo.
    return hasattr(model, "_orig_mod") or model._compiled_call_impl is not None


def _recorder(name: str, observed: BPLinear, trace: Trace) -> Any:
    """The forward hook of one layer."""

    def hook(layer: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        if layer is not observed:  # a copy made within the block takes the hook along
            return
        if torch.compiler.is_compiling() or functional.transforming():
            raise RuntimeError(
                "observe: expected an eager forward pass, got one under torch.compile "
                "or torch.func, where values cannot be looked at"
            )
        record = _record(name, observed, args[0] if args else kwargs["input"], output)
        in_backward = torch._C._current_graph_task_id() != -1
        earlier = _call_run_again(record, trace) if in_backward else None
        if earlier is None:
            trace.records.append(record)
            record.hooked = output.requires_grad
        elif earlier.hooked:
            return
        else:
            record = earlier
            record.reruns += 1
        if output.requires_grad:
            b = observed.bias
            needs = (
                False,
                observed.weight.requires_grad,
                b is not None and b.requires_grad,
            )
            # On the tensor, not register_full_backward_hook on the module: that one
            # forbids in-place work on the outputs.
            output.register_hook(lambda grad_a: _complete(record, needs, grad_a))

    return hook


def _call_run_again(rerun: Record, trace: Trace) -> Record | None:
    """The call that activation checkpointing repeats, from the bits that went in: of
    several, the last of those that were repeated least, since a backward pass comes by
    from the last to the first."""
    calls = [
        record
        for record in trace.records
        if record.name == rerun.name
        and record.x.shape == rerun.x.shape
        and torch.equal(record.x, rerun.x)
        and torch.equal(record.weight, rerun.weight)
    ]
    return min(reversed(calls), key=lambda record: record.reruns, default=None)


@torch.no_grad()
def _record(name: str, layer: BPLinear, input: Tensor, output: Tensor) -> Record:
    def copied(t: Tensor) -> Tensor:
        return t.detach().to(output.dtype, copy=True)

    function = type(layer).function
    with _reading(layer):
        x, a, W = copied(input), copied(output), copied(layer.weight)
        b = None if layer.bias is None else copied(layer.bias)
    z = F.linear(x, W, b)
    sigma_prime = function.gate(torch.ones_like(a), functional.saved_of(function, a, z))
    return Record(name, function, x, W, b, z, a, sigma_prime)


@contextmanager
def _reading(layer: BPLinear) -> Iterator[None]:
    """Parametrizations in eval mode: in training mode spectral_norm takes a step each
    time that the weight is read."""
    modules = (
        list(layer.parametrizations.modules())  # type: ignore[union-attr, operator]
        if parametrize.is_parametrized(layer)
        else []
    )
    modes = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


@torch.no_grad()
def _complete(
    record: Record, needs: tuple[bool, bool, bool], grad_a: Tensor | None
) -> None:
    """Fill in the backward half, once grad_a has arrived."""
    if grad_a is None:  # from a Function above that gives no gradient
        return
    function = record.function
    s = functional.saved_of(function, record.a, record.z)
    record.grad_a = grad_a.detach().clone()
    record.delta = function.gate(record.grad_a, s).clone()
    _, record.grad_weight, record.grad_bias = functional.gradients(
        record.delta, record.x, record.weight, needs
    )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put all modules of `model` into evaluation mode, in which dropout draws no
    numbers and batch norm remembers nothing; restore each one's mode afterwards.

    Args:
        model: any module.

    Examples:
        >>> model = nn.Dropout()
        >>> with evaluating(model):
        ...     model.training
        False
        >>> model.training
        True
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def probe(model: nn.Module, cost: Any, input: Tensor, target: Tensor) -> list[Record]:
    """z, a, δ of every layer on fixed examples, with the model left as it was: no
    ``.grad`` is touched and no random number drawn.

    Args:
        model: a network of our layers or native ones.
        cost: of ours.
        input: (n, n_in).
        target: (n, n_out), or labels (n).

    Examples:
        >>> import torchbp
        >>> model, cost = torchbp.MLP([4, 3, 2]), torchbp.QuadraticCost()
        >>> labels = torch.tensor([0, 1, 1, 0, 1])
        >>> records = probe(model, cost, torch.rand(5, 4), labels)
        >>> [tuple(record.delta.shape) for record in records]
        [(5, 3), (5, 2)]
    """
    check_takes(model, cost)
    # A native network is seen through a twin of our layers on the same parameters.
    return list(backward_pass(from_native(model), cost, input, target)[0])


def backward_pass(
    model: nn.Module, cost: Any, input: Tensor, target: Tensor
) -> tuple[Trace, Tensor, Tensor]:
    """Run `model` and `cost` once, forward and backward, in evaluation mode; return the
    trace, the model's output and C. No ``.grad`` is touched."""
    input = input.detach()
    if input.is_floating_point():
        input = input.requires_grad_()
    with evaluating(model), torch.enable_grad(), observe(model) as trace:
        output = model(input)
        C = cost(output, target)
        if not isinstance(C, Tensor) or C.numel() != 1:
            got = tuple(C.shape) if isinstance(C, Tensor) else type(C).__name__
            raise ValueError(f"cost: expected a tensor of one number, got {got}")
        # The gradient of the input alone: the sweep passes every layer on its way
        # there. Behind features that no_grad hides, that of the parameters.
        if C.requires_grad and not (input.requires_grad and _sweep(C, [input])):
            _sweep(C, [p for p in model.parameters() if p.requires_grad])
    return trace, output.detach(), C.detach()


def _sweep(C: Tensor, leaves: list[Any]) -> bool:
    """One backward pass to the leaves; whether it arrived at any."""
    grads = torch.autograd.grad(C, leaves, retain_graph=True, allow_unused=True)
    return any(grad is not None for grad in grads)
