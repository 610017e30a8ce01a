"""Recording a network at work: observe, and probe, which runs the pass itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchbp import functional
from torchbp.convert import from_native
from torchbp.inspection.records import Record, Trace
from torchbp.nn import BPLinear, check_takes

__all__ = ["evaluating", "observe", "probe"]


@contextmanager
def observe(model: nn.Module) -> Iterator[Trace]:
    """Record what every hand-written layer in `model` computes, forward and backward.

    Args:
        model: any module; its other layers are not recorded.

    Yields:
        the :class:`Trace`, to which forward passes add records and backward passes add
        gradients. After the block it is still readable, calls are no longer recorded,
        and a backward pass still fills in the calls of the block. A second backward
        pass through the same call overwrites the gradients of the first.

    Raises:
        ValueError: `model` has no hand-written layer, or it or a part of it is
            compiled.
        RuntimeError: in the forward pass, under torch.compile or a torch.func
            transform, where values cannot be read.

    Each call is one record, even if activation checkpointing runs it again in the
    backward pass; with ``use_reentrant=True`` that pass must be within the block.
    Copies of the model are not observed. A function around the model that was compiled
    before the block runs as compiled: the trace stays empty, and says so when printed.

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
    observer = _Observer()
    handles = [
        # Before all other hooks, which may replace the output.
        layer.register_forward_hook(
            observer.hook_of(name, layer), prepend=True, with_kwargs=True
        )
        for name, layer in layers.items()
    ]
    try:
        yield observer.trace
    finally:
        for handle in handles:
            handle.remove()


def _is_compiled(model: nn.Module) -> bool:
    """Return whether torch.compile made `model`. Importing its class for isinstance
    would take a second."""
    return hasattr(model, "_orig_mod") or model._compiled_call_impl is not None


@dataclass(eq=False)
class _Call:
    """A record, and the bookkeeping of its backward pass.

    Attributes:
        is_hooked: whether the output of the call has the hook that fills in the
            record's gradients.
        reruns: how often activation checkpointing has run the call again, since its
            first output had no hook.
    """

    record: Record
    is_hooked: bool
    reruns: int = 0


class _Observer:
    """The hooks of :func:`observe`, and the trace that they fill."""

    def __init__(self) -> None:
        self.trace = Trace()
        self.calls: list[_Call] = []

    def hook_of(self, name: str, observed: BPLinear) -> Any:
        """Return the forward hook of one layer."""

        def hook(layer: Any, args: Any, kwargs: Any, output: Tensor) -> None:
            if layer is observed:  # copies made within the block have this hook, too
                input = args[0] if args else kwargs["input"]
                self.take_call(name, observed, input, output)

        return hook

    def take_call(
        self, name: str, layer: BPLinear, input: Tensor, output: Tensor
    ) -> None:
        """Record a call, unless it repeats a recorded one, and hook its output."""
        if torch.compiler.is_compiling() or functional.transforming():
            raise RuntimeError(
                "observe: expected an eager forward pass, got one under torch.compile "
                "or torch.func, where values cannot be read"
            )
        record = _record(name, layer, input, output)
        in_backward = torch._C._current_graph_task_id() != -1
        earlier = self.repeated_call(record) if in_backward else None
        if earlier is None:
            self.trace.records.append(record)
            self.calls.append(_Call(record, output.requires_grad))
        elif earlier.is_hooked:
            return
        else:
            record = earlier.record
            earlier.reruns += 1
        if output.requires_grad:
            W, b = layer.weight, layer.bias
            needs = False, W.requires_grad, b is not None and b.requires_grad
            # A hook on the tensor: register_full_backward_hook on the module forbids
            # in-place work on the outputs.
            output.register_hook(lambda grad_a: _complete(record, needs, grad_a))

    def repeated_call(self, rerun: Record) -> _Call | None:
        """Return the call that activation checkpointing runs again, with the same
        layer, input and weight, bit by bit. Of several, return the last with the fewest
        reruns, since a backward pass goes from the last call to the first."""
        calls = [
            call
            for call in self.calls
            if call.record.name == rerun.name
            and call.record.x.shape == rerun.x.shape
            and torch.equal(call.record.x, rerun.x)
            and torch.equal(call.record.weight, rerun.weight)
        ]
        return min(reversed(calls), key=lambda call: call.reruns, default=None)


@torch.no_grad()
def _record(name: str, layer: BPLinear, input: Tensor, output: Tensor) -> Record:
    """Return a record with its forward half."""

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
    """Put the layer's parametrizations into evaluation mode: in training mode,
    spectral_norm takes a step each time the weight is read."""
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
    """Fill in the backward half of a record, from the incoming grad_a."""
    if grad_a is None:  # the Function above has returned no gradient
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
    numbers and batch norm updates no statistics; restore their modes afterwards.

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
    """Run a forward and a backward pass in evaluation mode, and return its records.

    The model and its ``.grad`` do not change, and no random number is drawn.

    Args:
        model: a network of hand-written or native layers.
        cost: a cost of this package, or any callable with `takes`.
        input: the examples, (n, n_in).
        target: numbers (n, n_out), or labels (n).

    Raises:
        TypeError: the cost does not say what it takes, or an argument is of another
            type.
        ValueError: `model` has no layer that can be observed, the cost does not fit
            its last layer or returns no single number, or the shapes do not fit.

    Examples:
        >>> import torchbp
        >>> model, cost = torchbp.MLP([4, 3, 2]), torchbp.QuadraticCost()
        >>> labels = torch.tensor([0, 1, 1, 0, 1])
        >>> records = probe(model, cost, torch.rand(5, 4), labels)
        >>> [tuple(record.delta.shape) for record in records]
        [(5, 3), (5, 2)]
    """
    check_takes(model, cost)
    # A native network is recorded in hand-written layers with the same parameters.
    return list(backward_pass(from_native(model), cost, input, target)[0])


def backward_pass(
    model: nn.Module, cost: Any, input: Tensor, target: Tensor
) -> tuple[Trace, Tensor, Tensor]:
    """Run `model` and `cost` forward and backward, in evaluation mode, without changing
    ``.grad``; return the trace, the model's output and C."""
    input = input.detach()
    if input.is_floating_point():
        input = input.requires_grad_()
    with evaluating(model), torch.enable_grad(), observe(model) as trace:
        output = model(input)
        C = cost(output, target)
        if not isinstance(C, Tensor) or C.numel() != 1:
            got = tuple(C.shape) if isinstance(C, Tensor) else type(C).__name__
            raise ValueError(f"cost: expected a tensor of one number, got {got}")
        # A backward pass to the input reaches every layer. If no_grad cuts the input
        # off, go to the parameters.
        if C.requires_grad and not (input.requires_grad and _reach(C, [input])):
            _reach(C, [p for p in model.parameters() if p.requires_grad])
    return trace, output.detach(), C.detach()


def _reach(C: Tensor, leaves: list[Any]) -> bool:
    """Run a backward pass to the leaves; return whether it reached any of them."""
    grads = torch.autograd.grad(C, leaves, retain_graph=True, allow_unused=True)
    return any(grad is not None for grad in grads)
