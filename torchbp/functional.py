"""BP2, BP3 and BP4: one autograd.Function per layer, and its checked function.

A layer computes z = x Wᵀ + b and a = σ(z), entrywise. Its backward receives
grad_a = ∂C/∂a and makes δ = grad_a ⊙ σ'(z), from which every gradient follows. The
notation is set out once, in the docstring of :mod:`torchbp`.

:class:`LinearFunction` (σ = identity) holds the one definition of BP2-BP4. The other
layers change σ and σ' only; :func:`define_function` makes more of them. The rest of the
package learns about σ from these members of its Function: `sigma`, `slope` or `gate`,
`max_slope`, `is_smooth`, `one`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from torchbp._autograd import (
    HAS_BOXED_GRADS,
    TwoFormFunction,
    autocast_dtype,
    call,
    casting,
    is_autocast_enabled,
    times,
    transforming,
    varying,
    where_positive,
)
from torchbp._checks import explain, layer_fits
from torchbp._define import check_name, check_sigma, make_class

__all__ = [
    "LinearFunction",
    "LinearReLUFunction",
    "LinearSigmoidFunction",
    "LinearSoftplusFunction",
    "LinearTanhFunction",
    "boxed_gradients",
    "define_function",
    "gradients",
    "layer",
    "linear",
    "linear_relu",
    "linear_sigmoid",
    "linear_softplus",
    "linear_tanh",
    "transforming",
]


class LinearFunction(TwoFormFunction):
    """a = z = x Wᵀ + b: the identity layer, and BP2-BP4 for every layer.

    Use it through :func:`linear`, which checks its arguments; ``LinearFunction.apply(x,
    W, b)`` does not. Autograd makes second derivatives from the operations of
    `backward`, which are all differentiable.

    Attributes:
        max_slope: the largest σ' (for |z| <= 10), by which saturation is judged.
        is_smooth: whether σ' is known to be continuous, so that finite differences are
            valid at every z.
        slope: σ' as a function of a, written to the argument `out` unless that is None.
            The explicit engine calls it, and `sigma` with the same `out`. If slope is
            None, the engine calls `gate` instead.
        one: a z with σ(z) = 1 exactly; None if no such z exists.

    Examples:
        >>> x, b = torch.ones(2, 3), torch.zeros(4)
        >>> W = torch.ones(4, 3, requires_grad=True)
        >>> LinearFunction.apply(x, W, b).sum().backward()
        >>> W.grad  # δ is 1 everywhere, and two examples add up
        tensor([[2., 2., 2.],
                [2., 2., 2.],
                [2., 2., 2.],
                [2., 2., 2.]])
    """

    boxed_grads_call = HAS_BOXED_GRADS
    max_slope: ClassVar[float] = 1.0
    is_smooth: ClassVar[bool] = True
    slope: ClassVar[Callable[..., Tensor] | None] = None
    one: ClassVar[float | None] = None

    @staticmethod
    def sigma(z: Tensor) -> Tensor:
        """Return σ(z), entrywise, without overwriting `z`: modes that watch operations,
        such as selective activation checkpointing, may have saved it."""
        return z

    @staticmethod
    def gate(grad_a: Tensor, s: Any) -> Tensor:
        """Return `grad_a` ⊙ σ'(z), computed from the saved `s`; overwrite neither.

        The derivative of a constant σ' is 0 and must be in the graph: see `varying`."""
        return grad_a

    @staticmethod
    def saved(output: Any) -> Tensor | None:
        """Return the part of `evaluate`'s `output` from which σ' is computed: a, z or
        None.

        The identity layer must not save its output: an in-place operation on it, as in
        Sequential(BPLinear, ReLU(inplace=True)), would then break the graph."""
        return None

    @classmethod
    def evaluate(cls, x: Tensor, W: Tensor, b: Tensor | None) -> Any:
        return cls.sigma(_weighted_input(x, W, b))

    @classmethod
    def tensors_to_save(cls, inputs: Any, output: Any) -> tuple[Tensor | None, ...]:
        x, W, _ = inputs
        return x, W, cls.saved(output)

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, *, cls: Any) -> Any:
        output = cls.evaluate(x, W, b)
        need_x, need_W, _ = ctx.needs_input_grad
        # grad_x reads W and grad_W reads x: save only what will be read.
        ctx.save_for_backward(
            x if need_W else None, W if need_x else None, cls.saved(output)
        )
        ctx.set_materialize_grads(False)  # no zeros in place of a missing gradient
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any, cls: Any = None) -> Any:
        x, W, s = ctx.saved_tensors
        if type(grads[0]) is list:  # boxed gradients
            # Free a as soon as δ is made, as native layers do, unless the graph is
            # retained: saved tensors would otherwise live until backward ends.
            ctx.maybe_clear_saved_tensors()
            delta = cls.error(grads[0], s)
        else:
            delta = cls.error(list(grads), s)
        del s
        if delta is None:
            return None, None, None
        return gradients(delta, x, W, ctx.needs_input_grad)

    @classmethod
    def error(cls, grads: list[Any], s: Any) -> Tensor | None:
        """Return δ from the incoming `grads` and the saved `s`. Take grad_a out of the
        list, so that it is freed on return."""
        grad_a = grads.pop()
        if grad_a is None:
            return None
        return cls.gate(grad_a, s)  # BP2 (and BP1, at the last layer): ⊙ σ'(z)

    @classmethod
    def push_forward(cls, ctx: Any, dx: Any, dW: Any, db: Any) -> Any:
        x, W, s = ctx.saved_tensors
        return cls.gate(_dz(x, W, dx, dW, db), s)  # σ's Jacobian is diagonal


class LayerFromOutput(LinearFunction):
    """A layer whose σ' is given in terms of a, so that z is not saved."""

    @staticmethod
    def saved(output: Any) -> Tensor | None:
        return output

    @classmethod
    def gate(cls, grad_a: Tensor, s: Any) -> Tensor:
        return times(cls.slope(s), grad_a)  # type: ignore[misc]


class LayerFromWeightedInput(LinearFunction):
    """A layer whose σ' needs z: a does not determine it where σ is not one-to-one.

    z is a second output of the Function, so that second derivatives flow through it: a
    tensor that is neither input nor output would be a constant to autograd.
    """

    @staticmethod
    def saved(output: Any) -> Tensor | None:
        return output[1]

    @classmethod
    def evaluate(cls, x: Tensor, W: Tensor, b: Tensor | None) -> Any:
        z = _weighted_input(x, W, b)
        return cls.sigma(z), z

    @classmethod
    def error(cls, grads: list[Any], s: Any) -> Tensor | None:
        grad_z, grad_a = grads.pop(), grads.pop()  # grad_z in second derivatives only
        if grad_a is None:
            return grad_z
        delta = cls.gate(grad_a, s)  # BP2, as above
        return delta if grad_z is None else delta + grad_z

    @classmethod
    def push_forward(cls, ctx: Any, dx: Any, dW: Any, db: Any) -> Any:
        x, W, z = ctx.saved_tensors
        dz = _dz(x, W, dx, dW, db)
        return cls.gate(dz, z), dz


def saved_of(function: type[LinearFunction], a: Tensor, z: Tensor) -> Any:
    """Return the tensor from which σ' of a layer is computed: a, z or None."""
    gives_z = issubclass(function, LayerFromWeightedInput)
    return function.saved((a, z) if gives_z else a)


def _weighted_input(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """Return z = x Wᵀ + b, never as a view: autograd refuses in-place work on a view
    that a Function returned, and some builds of torch compute three dimensions as a
    view of two."""
    if x.dim() == 2 or torch.compiler.is_compiling():
        return F.linear(x, W, b)
    if x.is_nested:
        raise TypeError("input: expected a dense Tensor, got a nested one")
    z = F.linear(x, W, b)
    return torch.ops.aten._unsafe_view(z, z.shape) if z._is_view() else z


def _dz(x: Tensor, W: Tensor, dx: Any, dW: Any, db: Any) -> Tensor:
    """Return the derivative of z = x Wᵀ + b along the tangents of x, W and b; at least
    one of them is not None."""
    terms = [] if dx is None else [dx @ W.t()]
    if dW is not None:
        terms.append(x @ dW.t())
    if db is not None:
        terms.append(db.expand(*x.shape[:-1], -1))
    return sum(terms[1:], start=terms[0])


def gradients(
    delta: Tensor, x: Tensor, W: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return ∂C/∂x, ∂C/∂W and ∂C/∂b, with None for each that is not needed.

    Args:
        delta: δ, (*, n_out).
        x: a^{ℓ-1}, (*, n_in).
        W: W^ℓ, (n_out, n_in).
        needs: which of the three to compute.

    Examples:
        >>> x, W = torch.tensor([[5.0, 7.0]]), torch.ones(1, 2)
        >>> delta = torch.tensor([[2.0]])
        >>> gradients(delta, x, W, (True, True, True))
        (tensor([[2., 2.]]), tensor([[10., 14.]]), tensor([2.]))
        >>> gradients(delta, x, W, (False, False, True))
        (None, None, tensor([2.]))
    """
    need_x, need_W, need_b = needs
    grad_x = grad_W = grad_b = None
    if need_x:
        grad_x = delta @ W  # BP2 for the layer below, without its σ'
    if (need_W or need_b) and delta.dim() != 2:
        delta = as_rows(delta)  # (*, n_out) -> (examples, n_out)
    if need_b:
        grad_b = delta.sum(0)  # BP3
    if need_W:
        grad_W = delta.t() @ (x if x.dim() == 2 else as_rows(x))  # BP4
    return grad_x, grad_W, grad_b


def as_rows(t: Tensor) -> Tensor:
    """Reshape (*, n) to (examples, n). reshape(-1, n) would raise for n = 0, and
    flatten has no rule in the vmap of autograd.grad(is_grads_batched=True)."""
    if t.dim() == 2:
        return t
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])


class LinearSigmoidFunction(LayerFromOutput):
    """a = σ(x Wᵀ + b) with σ(z) = 1/(1 + e^-z) and σ' = a(1 - a).

    Examples:
        >>> LinearSigmoidFunction.slope(torch.tensor([0.5, 0.9]))
        tensor([0.2500, 0.0900])
    """

    max_slope, one = 0.25, 40.0

    sigma: Any = staticmethod(torch.sigmoid)

    @staticmethod
    def slope(a: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.addcmul(a, a, a, value=-1, out=out)  # one operation, a - a·a


class LinearTanhFunction(LayerFromOutput):
    """a = tanh(x Wᵀ + b), σ' = 1 - a².

    Examples:
        >>> LinearTanhFunction.slope(torch.tensor([0.0, 0.5]))
        tensor([1.0000, 0.7500])
    """

    one = 20.0

    sigma: Any = staticmethod(torch.tanh)

    @staticmethod
    def slope(a: Tensor, out: Tensor | None = None) -> Tensor:
        one = a.new_ones(()) if out is None else out.fill_(1)
        # In one operation a·a is not rounded before the difference. At saturation that
        # error would count (0.1 % of σ' at z = 7 in float32).
        return torch.addcmul(one, a, a, value=-1, out=out)


class LinearReLUFunction(LayerFromOutput):
    """a = max(0, x Wᵀ + b), σ' = [a > 0] (0 at z = 0, as torch has it).

    Examples:
        >>> LinearReLUFunction.slope(torch.tensor([0.0, 0.5]))
        tensor([0., 1.])
    """

    is_smooth, one = False, 1.0

    @staticmethod
    def sigma(z: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.relu(z) if out is None else torch.clamp_min(z, 0, out=out)

    @staticmethod
    def slope(a: Tensor, out: Tensor | None = None) -> Tensor:
        return torch.sign(a, out=out)  # a is never negative

    @staticmethod
    def gate(grad_a: Tensor, a: Tensor) -> Tensor:  # type: ignore[override]
        return where_positive(grad_a, a)


class LinearSoftplusFunction(LayerFromOutput):
    """a = ln(1 + e^z) with z = x Wᵀ + b, σ' = 1 - e^-a.

    Examples:
        >>> LinearSoftplusFunction.slope(torch.tensor([0.0, 1e-9]))
        tensor([0.0000e+00, 1.0000e-09])
    """

    sigma: Any = staticmethod(F.softplus)

    @staticmethod
    def slope(a: Tensor, out: Tensor | None = None) -> Tensor:
        # -(e^-a - 1), since 1 - e^-a would lose all digits for small a.
        return torch.neg(torch.expm1(torch.neg(a, out=out), out=out), out=out)


def layer(
    function: type[LinearFunction],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """Check the arguments and return a = σ(input weightᵀ + bias), with the σ of
    `function`.

    Args:
        function: a Function of this module, or one from :func:`define_function`.
        input: a^{ℓ-1}, rows are examples.
        weight: W^ℓ.
        bias: b^ℓ, or None.

    Shape:
        input (*, n_in), weight (n_out, n_in), bias (n_out) -> (*, n_out), where * is
        any number of dimensions, none included. Any of them may be zero.

    Raises:
        TypeError: an argument is not a tensor, not of a real floating dtype, or not of
            the input's dtype.
        ValueError: shapes that do not fit, or tensors on different devices.

    Under autocast the arguments are cast to its dtype first (float64 is not, as in
    native layers); the gradients have the parameters' own dtype.

    Examples:
        >>> x, W, b = torch.zeros(5, 3), torch.ones(2, 3), torch.zeros(2)
        >>> layer(LinearSigmoidFunction, x, W, b).shape
        torch.Size([5, 2])
        >>> layer(LinearSigmoidFunction, x, W.T, b)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
            ...
        ValueError: input: expected last dimension 2 to fit weight (3, 2), got ...
    """
    try:
        if is_autocast_enabled() and autocast_dtype(input) is not None:
            with casting(input, weight, bias) as arguments:
                return layer(function, *arguments)
        if layer_fits(input, weight, bias):
            output = call(function, input, weight, bias)
            return output[0] if type(output) is tuple else output
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = explain(input, weight, bias)
        if reason is None:
            raise
        raise reason from error
    raise explain(input, weight, bias) or AssertionError("unexplained")


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return z = input weightᵀ + bias, with BP2-BP4 by hand.

    Args:
        input: a^{ℓ-1}, (*, n_in).
        weight: W^ℓ, (n_out, n_in).
        bias: b^ℓ, (n_out), or None.

    Raises:
        TypeError, ValueError: as :func:`layer`.

    Examples:
        >>> linear(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))
        tensor([[11.]])
    """
    return layer(LinearFunction, input, weight, bias)


def linear_sigmoid(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return a = σ(input weightᵀ + bias); σ' = a(1 - a), with BP2-BP4 by hand.

    Args:
        input: a^{ℓ-1}, (*, n_in).
        weight: W^ℓ, (n_out, n_in).
        bias: b^ℓ, (n_out), or None.

    Raises:
        TypeError, ValueError: as :func:`layer`.

    Examples:
        >>> z = torch.zeros(1, 1, requires_grad=True)
        >>> a = linear_sigmoid(z, torch.ones(1, 1))
        >>> a.backward()
        >>> a.item(), z.grad.item()
        (0.5, 0.25)
    """
    return layer(LinearSigmoidFunction, input, weight, bias)


def linear_tanh(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return a = tanh(input weightᵀ + bias); σ' = 1 - a², with BP2-BP4 by hand.

    Args:
        input: a^{ℓ-1}, (*, n_in).
        weight: W^ℓ, (n_out, n_in).
        bias: b^ℓ, (n_out), or None.

    Raises:
        TypeError, ValueError: as :func:`layer`.

    Examples:
        >>> z = torch.zeros(1, 1, requires_grad=True)
        >>> a = linear_tanh(z, torch.ones(1, 1))
        >>> a.backward()
        >>> a.item(), z.grad.item()
        (0.0, 1.0)
    """
    return layer(LinearTanhFunction, input, weight, bias)


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return a = max(0, input weightᵀ + bias); σ' = [a > 0], with BP2-BP4 by hand.

    Args:
        input: a^{ℓ-1}, (*, n_in).
        weight: W^ℓ, (n_out, n_in).
        bias: b^ℓ, (n_out), or None.

    Raises:
        TypeError, ValueError: as :func:`layer`.

    Examples:
        >>> z = torch.tensor([[-3.0], [3.0]], requires_grad=True)
        >>> a = linear_relu(z, torch.ones(1, 1))
        >>> a.sum().backward()
        >>> a.tolist(), z.grad.tolist()
        ([[0.0], [3.0]], [[0.0], [1.0]])
    """
    return layer(LinearReLUFunction, input, weight, bias)


def linear_softplus(
    input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Return a = ln(1 + e^z), z = input weightᵀ + bias; σ' = 1 - e^-a, with BP2-BP4 by
    hand.

    Args:
        input: a^{ℓ-1}, (*, n_in).
        weight: W^ℓ, (n_out, n_in).
        bias: b^ℓ, (n_out), or None.

    Raises:
        TypeError, ValueError: as :func:`layer`.

    Examples:
        >>> z = torch.zeros(1, 1, requires_grad=True)
        >>> a = linear_softplus(z, torch.ones(1, 1))  # ln 2
        >>> a.backward()
        >>> round(a.item(), 4), round(z.grad.item(), 4)
        (0.6931, 0.5)
    """
    return layer(LinearSoftplusFunction, input, weight, bias)


def define_function(
    name: str,
    sigma: Callable[[Tensor], Tensor],
    sigma_prime: Callable[[Tensor], Tensor],
    saves: str = "a",
) -> type[LinearFunction]:
    """Make a layer's Function from a user's own σ and σ', both entrywise.

    Args:
        name: the class's name, e.g. "LinearSiLUFunction".
        sigma: σ(z).
        sigma_prime: σ' as a function of a = σ(z) if `saves` is "a", of z if it is "z".
        saves: "a", or "z" for a σ that is not one-to-one (SiLU, x²).

    Raises:
        TypeError: `sigma` or `sigma_prime` is not callable, or does not map a tensor to
            a tensor.
        ValueError: `name` is not an identifier, `saves` is neither "a" nor "z", or
            `sigma` or `sigma_prime` is not entrywise, changes the dtype, overwrites its
            argument, or reads a tensor that requires grad.

    Examples:
        >>> Cubic = define_function("Cubic", lambda z: z**3, lambda z: 3 * z**2, "z")
        >>> z = torch.tensor([[2.0]], requires_grad=True)
        >>> a = layer(Cubic, z, torch.ones(1, 1))
        >>> a.backward()
        >>> a.item(), z.grad.item()
        (8.0, 12.0)
    """
    check_name(name)
    bases = {"a": LayerFromOutput, "z": LayerFromWeightedInput}
    if saves not in bases:
        raise ValueError(f'saves: expected "a" or "z", got {saves!r}')
    own_sigma, max_slope = check_sigma(sigma, sigma_prime, saves)

    def gate(grad_a: Tensor, s: Tensor) -> Tensor:
        slope = sigma_prime(s)
        return grad_a * (slope if slope.requires_grad else varying(slope, s))

    members = {
        "__doc__": f"a = {getattr(sigma, '__name__', 'σ')}(x Wᵀ + b), σ' from {saves}.",
        "max_slope": max_slope,
        "is_smooth": False,
        "sigma": staticmethod(own_sigma),
        "gate": staticmethod(gate),
    }
    return make_class(name, bases[saves], members)


def boxed_gradients(enabled: bool) -> None:
    """Choose whether each backward frees its incoming gradient as soon as δ is made,
    which lowers the peak memory of a layer by about a fifth. By default it does so if
    torch can, from 2.13 on.

    Compiled autograd refuses such Functions if the forward pass ran in eager mode: call
    ``boxed_gradients(False)`` before that pass.

    Args:
        enabled: the choice, for every layer from now on.

    Raises:
        RuntimeError: `enabled` with a torch that has no boxed gradients.

    Examples:
        >>> before = LinearFunction.boxed_grads_call
        >>> boxed_gradients(False)
        >>> LinearFunction.boxed_grads_call
        False
        >>> boxed_gradients(before)
    """
    if enabled and not HAS_BOXED_GRADS:
        raise RuntimeError(
            f"boxed gradients: expected torch >= 2.13, got {torch.__version__}"
        )
    LinearFunction.boxed_grads_call = bool(enabled)
