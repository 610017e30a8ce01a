"""z, a, δ and the gradients of every layer, as they come by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchbp import functional
from torchbp.nn import BPLinear

__all__ = ["Record", "Trace", "observe"]

# A neuron counts as saturated where σ' is below this share of its largest value: for
# the sigmoid |z| > 4.4, for tanh |z| > 2.2, for ReLU wherever it is off.
SATURATED = 0.05


@dataclass(eq=False)
class Record:
    """One call of one layer. All tensors are copies, detached.

    Attributes:
        name: the layer's name in the observed model ("" if it is the model).
        x: a^{ℓ-1}, (*, n_in).
        weight, bias: W and b at the call; bias None if there is none.
        z, a: (*, n_out).
        sigma_prime: σ'(z), (*, n_out).
        delta: ∂C/∂z, (*, n_out); None until a backward pass reaches the call. After
            several backward passes, that of the last.
        grad_weight, grad_bias: ∂C/∂W and ∂C/∂b of this call alone; None as above, and
            for parameters that do not require grad.
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

    @property
    def saturated(self) -> float:
        """The share of neurons, over all examples, whose σ' is below 5 % of its largest
        value: BP1 and BP2 multiply by it, so these hardly learn."""
        threshold = SATURATED * self.function.max_slope
        return (self.sigma_prime.abs() < threshold).double().mean().item()

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


@dataclass(eq=False)
class Trace:
    """The records of every call, in order: ``trace[i]``, or ``trace["layers.0"]`` for
    the calls of one layer."""

    records: list[Record] = field(default_factory=list)

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


@contextmanager
def observe(model: nn.Module) -> Iterator[Trace]:
    """Record what every layer of ours in `model` computes, forward and backward.

    Args:
        model: any module; its layers that are not ours are left alone.

    Yields:
        the :class:`Trace`, which fills as the layers are called and as backward passes
        come by. It stays readable after the block; calls after it are not recorded, the
        backward pass of a call within it is.

    Raises:
        ValueError: `model` has no layer of ours, or is compiled.
        RuntimeError: in the forward pass, under torch.compile or a torch.func
            transform, where values cannot be looked at.

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
        raise ValueError(
            f"observe: expected a model with hand-written layers, got "
            f"{type(model).__name__} without any; from_native converts native ones"
        )
    if _is_compiled(model):
        raise ValueError(
            "observe: expected a model that is not compiled, got one that is; observe "
            "the module that was given to torch.compile"
        )
    trace = Trace()
    handles = [
        # First of all hooks: others may replace the output.
        layer.register_forward_hook(
            _recorder(name, trace), prepend=True, with_kwargs=True
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


def _recorder(name: str, trace: Trace) -> Any:
    """The forward hook of one layer."""

    def hook(layer: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        if not isinstance(layer, BPLinear):  # a native copy, made within the block
            return
        if torch.compiler.is_compiling() or functional.transforming():
            raise RuntimeError(
                "observe: expected an eager forward pass, got one under torch.compile "
                "or torch.func, where values cannot be looked at"
            )
        record = _record(name, layer, args[0] if args else kwargs["input"], output)
        trace.records.append(record)
        if output.requires_grad:
            b = layer.bias
            needs = (
                False,
                layer.weight.requires_grad,
                b is not None and b.requires_grad,
            )
            # On the tensor, not register_full_backward_hook on the module: that one
            # forbids in-place work on the outputs.
            output.register_hook(lambda grad_a: _complete(record, needs, grad_a))

    return hook


@torch.no_grad()
def _record(name: str, layer: BPLinear, input: Tensor, output: Tensor) -> Record:
    def copied(t: Tensor) -> Tensor:
        return t.detach().to(output.dtype, copy=True)

    function = type(layer).function
    x, a, W = copied(input), copied(output), copied(layer.weight)
    b = None if layer.bias is None else copied(layer.bias)
    z = F.linear(x, W, b)
    sigma_prime = function.gate(torch.ones_like(a), _saved(function, a, z))
    return Record(name, function, x, W, b, z, a, sigma_prime)


def _saved(function: type[functional.LinearFunction], a: Tensor, z: Tensor) -> Any:
    """What the layer saves for σ', which is from a or from z."""
    gives_z = issubclass(function, functional.LayerFromWeightedInput)
    return function.saved((a, z) if gives_z else a)


@torch.no_grad()
def _complete(record: Record, needs: tuple[bool, bool, bool], grad_a: Tensor) -> None:
    """Fill in the backward half, once grad_a has arrived."""
    function = record.function
    s = _saved(function, record.a, record.z)
    record.delta = function.gate(grad_a.detach(), s).clone()
    _, record.grad_weight, record.grad_bias = functional.gradients(
        record.delta, record.x, record.weight, needs
    )
