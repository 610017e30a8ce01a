"""BP2, BP3 and BP4: one autograd.Function per layer, and its checked function.

A layer computes z = x Wᵀ + b and a = σ(z), entrywise. Its backward receives
grad_a = ∂C/∂a and makes δ = grad_a ⊙ σ'(z), from which every gradient follows. The
notation is set out once, in the docstring of :mod:`torchbp`.

:class:`LinearFunction` (σ = identity) holds the one definition of BP2-BP4. The other
layers change σ and σ' only; :func:`define_function` makes more of them.
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
    autocast_off,
    call,
    may_overwrite,
    times,
    transforming,
    varying,
)
from torchbp._checks import check_entrywise, check_reads_no_parameter, explain
from torchbp._define import check_name, make_class

__all__ = [
    "LinearFunction",
    "LinearReLUFunction",
    "LinearSigmoidFunction",
    "LinearTanhFunction",
    "boxed_gradients",
    "define_function",
    "gradients",
    "layer",
    "linear",
    "linear_relu",
    "linear_sigmoid",
    "linear_tanh",
    "transforming",
]


class LinearFunction(TwoFormFunction):
    """a = z = x Wᵀ + b: the identity layer, and BP2-BP4 for every layer.

    Use it through :func:`linear`, which checks its arguments; ``LinearFunction.apply(x,
    W, b)`` does not. Second derivatives are autograd through the operations of
    `backward`, which are all differentiable.

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
    # The largest σ' (for |z| <= 10), by which saturation is judged.
    max_slope: ClassVar[float] = 1.0

    @staticmethod
    def sigma(z: Tensor) -> Tensor:
        """σ(z), entrywise. Leaves `z` as it is: whoever watches the operations, such as
        selective activation checkpointing, may have kept the product."""
        return z

    @staticmethod
    def gate(grad_a: Tensor, s: Any) -> Tensor:
        """`grad_a` ⊙ σ'(z), from the `s` that is saved. Changes neither argument.

        Where σ' does not vary, its derivative is 0 and not missing: :func:`varying`."""
        return grad_a

    @staticmethod
    def saved(output: Any) -> Tensor | None:
        """What σ' is computed from, of the `output` of `evaluate`: a, z or nothing."""
        # The identity layer must not save its output: an in-place operation on it, as
        # in Sequential(BPLinear, ReLU(inplace=True)), would then break the graph.
        return None

    @classmethod
    def evaluate(cls, x: Tensor, W: Tensor, b: Tensor | None) -> Any:
        return cls.sigma(_weighted_input(x, W, b))

    @classmethod
    def tensors_to_save(cls, inputs: Any, output: Any) -> tuple[Tensor | None, ...]:
        x, W, _ = inputs
        return x, W, cls.saved(output)

    @classmethod
    def forward(cls, ctx: Any, x: Tensor, W: Tensor, b: Tensor | None) -> Any:  # type: ignore[override]
        output = cls.evaluate(x, W, b)
        need_x, need_W, _ = ctx.needs_input_grad
        # grad_x reads W and grad_W reads x: what nobody asks for is not kept alive.
        ctx.save_for_backward(
            x if need_W else None, W if need_x else None, cls.saved(output)
        )
        ctx.set_materialize_grads(False)  # no zeros for a gradient that is not there
        return output

    @classmethod
    def backward(cls, ctx: Any, *grads: Any) -> Any:  # type: ignore[override]
        x, W, s = ctx.saved_tensors
        # What is saved lives until backward ends, but native layers let go of a as soon
        # as δ is made. This keeps everything if the graph is retained.
        if not torch.compiler.is_compiling() and cls.boxed_grads_call:
            ctx.maybe_clear_saved_tensors()
        delta = cls.error(grads[0] if isinstance(grads[0], list) else list(grads), s)
        del s
        if delta is None:
            return None, None, None
        return gradients(delta, x, W, ctx.needs_input_grad)

    @classmethod
    def error(cls, grads: list[Any], s: Any) -> Tensor | None:
        """δ, from the `grads` that arrive and the `s` that is saved; takes grad_a
        out of the list, so that it is freed on return.
        """
        grad_a = grads.pop()
        if grad_a is None:
            return None
        return cls.gate(grad_a, s)  # BP2 (and BP1, at the last layer): ⊙ σ'(z)

    @classmethod
    def push_forward(cls, ctx: Any, dx: Any, dW: Any, db: Any) -> Any:
        x, W, s = ctx.saved_tensors
        return cls.gate(_dz(x, W, dx, dW, db), s)  # σ's Jacobian is diagonal


class LayerFromOutput(LinearFunction):
    """A layer whose σ' is given in terms of a, so that z need not be kept."""

    @staticmethod
    def saved(output: Any) -> Tensor | None:
        return output


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
    """What a layer saves for σ', of its a and z."""
    gives_z = issubclass(function, LayerFromWeightedInput)
    return function.saved((a, z) if gives_z else a)


def _weighted_input(x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
    """z = x Wᵀ + b, never a view: autograd lets nobody work in place on a Function's
    output that is one, and some builds of torch compute three dimensions as a view of
    two."""
    if x.dim() == 2 or torch.compiler.is_compiling():
        return F.linear(x, W, b)
    if x.is_nested:
        raise TypeError("input: expected a dense Tensor, got a nested one")
    z = F.linear(x, W, b)
    return torch.ops.aten._unsafe_view(z, z.shape) if z._is_view() else z


def _dz(x: Tensor, W: Tensor, dx: Any, dW: Any, db: Any) -> Tensor:
    """The change of z = x Wᵀ + b along the tangents of x, W and b, None for none."""
    terms = [] if dx is None else [dx @ W.t()]
    if dW is not None:
        terms.append(x @ dW.t())
    if db is not None:
        terms.append(db.expand(*x.shape[:-1], -1))
    return sum(terms[1:], start=terms[0])


def gradients(
    delta: Tensor, x: Tensor, W: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """∂C/∂x, ∂C/∂W and ∂C/∂b from δ, or None for each that nobody asked for.

    Args:
        delta: δ, (*, n_out).
        x: a^{ℓ-1}, (*, n_in).
        W: W^ℓ, (n_out, n_in).
        needs: which of the three are wanted.

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
        grad_x = delta @ W  # BP2 for the layer below, but for its σ'
    if need_W or need_b:
        delta = as_rows(delta)  # (*, n_out) -> (examples, n_out)
    if need_b:
        grad_b = delta.sum(0)  # BP3
    if need_W:
        grad_W = delta.t() @ as_rows(x)  # BP4
    return grad_x, grad_W, grad_b


def as_rows(t: Tensor) -> Tensor:
    """(*, n) -> (examples, n)."""
    if t.dim() == 2:
        return t
    # Both sizes spelt out: reshape(-1, n) raises for n = 0, and flatten has no rule in
    # the vmap that autograd.grad(is_grads_batched=True) runs.
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])


class LinearSigmoidFunction(LayerFromOutput):
    """a = σ(x Wᵀ + b) with σ(z) = 1/(1 + e^-z) and σ' = a(1 - a).

    Examples:
        >>> a = torch.tensor([0.5, 0.9])
        >>> LinearSigmoidFunction.gate(torch.ones(2), a)  # σ' = a(1 - a)
        tensor([0.2500, 0.0900])
    """

    max_slope = 0.25

    @staticmethod
    def sigma(z: Tensor) -> Tensor:
        return z.sigmoid()

    @staticmethod
    def gate(grad_a: Tensor, a: Tensor) -> Tensor:  # type: ignore[override]
        # a - a·a: 1.9 µs with the product at 10 x 30; grad_a * a * (1 - a) takes 4.
        return times(torch.addcmul(a, a, a, value=-1), grad_a)


class LinearTanhFunction(LayerFromOutput):
    """a = tanh(x Wᵀ + b), σ' = 1 - a².

    Examples:
        >>> a = torch.tensor([0.0, 0.5])
        >>> LinearTanhFunction.gate(torch.ones(2), a)  # σ' = 1 - a²
        tensor([1.0000, 0.7500])
    """

    @staticmethod
    def sigma(z: Tensor) -> Tensor:
        return z.tanh()

    @staticmethod
    def gate(grad_a: Tensor, a: Tensor) -> Tensor:  # type: ignore[override]
        # 1 - a·a in one operation: its product is not rounded before the difference,
        # which at saturation is all that is left (0.1 % of σ' at z = 7 in float32).
        return times(torch.addcmul(a.new_ones(()), a, a, value=-1), grad_a)


class LinearReLUFunction(LayerFromOutput):
    """a = max(0, x Wᵀ + b), σ' = [a > 0] (0 at z = 0, as torch has it).

    Examples:
        >>> a = torch.tensor([0.0, 0.5])
        >>> LinearReLUFunction.gate(torch.ones(2), a)  # σ' = [a > 0]
        tensor([0., 1.])
    """

    @staticmethod
    def sigma(z: Tensor) -> Tensor:
        return z.relu()

    @staticmethod
    def gate(grad_a: Tensor, a: Tensor) -> Tensor:  # type: ignore[override]
        # Not a product: 0 · inf would be NaN at a neuron that is off.
        if torch.compiler.is_compiling():  # this way it fuses best
            return torch.where(a <= 0, torch.zeros_like(grad_a), grad_a)
        large = a.is_cpu and type(a) is Tensor and a.numel() > _LARGE
        if large and may_overwrite(grad_a):
            return _masked(grad_a, a)
        return varying(grad_a.masked_fill(a.logical_not(), 0), a)


_LARGE = 4096  # numbers; below, _masked's five calls cost more than the branches
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _masked(grad_a: Tensor, a: Tensor) -> Tensor:
    """grad_a where a > 0, else 0, without a branch for each number: at 128 x 512 that
    takes 20 µs, where masked_fill and where take 195 on a CPU that guesses half of
    them wrong."""
    bits = _BITS[a.itemsize]
    # As an integer a positive float is positive; from 1 and 0 come all bits and none.
    # abs takes the sign off -0.0, which is off, and off NaN, where native is on.
    mask = a.abs().view(bits).clamp_(max=1).neg_()
    return mask.bitwise_and_(grad_a.view(bits)).view(a.dtype)


def layer(
    function: type[LinearFunction],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """a = σ(input weightᵀ + bias) with the σ of `function`, its arguments checked.

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

    Under autocast the arguments are cast to its dtype first (float64 is left alone, as
    native layers do); the gradients come back in the parameters' own dtype.

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
        # The cheap test first: these run at every call.
        if torch._C._is_any_autocast_enabled():
            dtype = autocast_dtype(input)
            if dtype is not None:
                return _layer_autocast(function, dtype, input, weight, bias)
        if _fits(input, weight, bias):
            output = call(function, input, weight, bias)
            return output[0] if type(output) is tuple else output  # (a, z), σ' from z
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = explain(input, weight, bias)
        if reason is None:
            raise
        raise reason from error
    raise explain(input, weight, bias) or AssertionError("_fits and explain differ")


def _layer_autocast(
    function: type[LinearFunction],
    dtype: torch.dtype,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """The layer under autocast: casts first, so that autograd records them and brings
    the gradients back, and so that what is saved has the dtype that was computed in."""

    def cast(t: Any) -> Any:
        eligible = isinstance(t, Tensor) and t.is_floating_point()
        return t.to(dtype) if eligible and t.dtype != torch.float64 else t

    with autocast_off(input.device.type):
        return layer(function, cast(input), cast(weight), cast(bias))


def _fits(x: Tensor, W: Tensor, b: Tensor | None) -> bool:
    """Whether these pass wherever torch's own linear would be too generous: it takes
    1-D weights, integers, biases that broadcast or are promoted, and a weight on
    "meta". The rest it finds itself, and at 10 x 30 each test counts: all of them took
    1.2 µs of 25."""
    return (
        W.dim() == 2
        and W.is_floating_point()
        and x.device == W.device
        and (
            b is None
            or (b.dim() == 1 and b.shape[0] == W.shape[0] and b.dtype is x.dtype)
        )
    )


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """z = input weightᵀ + bias, with BP2-BP4 by hand.

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
    """σ(input weightᵀ + bias), σ' = a(1 - a), with BP2-BP4 by hand.

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
    """tanh(input weightᵀ + bias), σ' = 1 - a², with BP2-BP4 by hand.

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
    """max(0, input weightᵀ + bias), σ' = [a > 0], with BP2-BP4 by hand.

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


def define_function(
    name: str,
    sigma: Callable[[Tensor], Tensor],
    sigma_prime: Callable[[Tensor], Tensor],
    saves: str = "a",
) -> type[LinearFunction]:
    """A layer Function from a user's own σ and σ', both entrywise.

    Args:
        name: the class's name, e.g. "LinearSoftplusFunction".
        sigma: σ(z).
        sigma_prime: σ' as a function of a = σ(z) if `saves` is "a", of z if it is "z".
        saves: "a", or "z" for a σ that is not one-to-one (SiLU, x²).

    Raises:
        TypeError: `sigma` or `sigma_prime` is not callable, or does not map a tensor to
            a tensor.
        ValueError: `name` is not an identifier, `saves` is neither "a" nor "z", or one
            of the two is not entrywise (it changes the shape or the dtype), overwrites
            its argument, or reads a tensor that requires grad.

    Examples:
        >>> Cubic = define_function("Cubic", lambda z: z**3, lambda z: 3 * z**2, "z")
        >>> z = torch.tensor([[2.0]], requires_grad=True)
        >>> a = layer(Cubic, z, torch.ones(1, 1))
        >>> a.backward()
        >>> a.item(), z.grad.item()
        (8.0, 12.0)
    """
    check_name(name)
    if saves not in ("a", "z"):
        raise ValueError(f'saves: expected "a" or "z", got {saves!r}')
    aliases = check_entrywise("sigma", sigma)
    check_entrywise("sigma_prime", sigma_prime)
    z = torch.linspace(-10, 10, 2001, dtype=torch.float64, device="cpu")
    with torch.enable_grad():  # on both sides of 0, where a σ may have two formulas
        a = sigma(z)
        check_reads_no_parameter("sigma", sigma, a)
        slopes = sigma_prime(a if saves == "a" else z).abs()
        check_reads_no_parameter("sigma_prime", sigma_prime, slopes)
    slopes = slopes[slopes.isfinite()]

    def evaluate_sigma(z: Tensor) -> Tensor:
        return sigma(z).clone() if aliases else sigma(z)

    def gate(grad_a: Tensor, s: Tensor) -> Tensor:
        slope = sigma_prime(s)
        return grad_a * (slope if slope.requires_grad else varying(slope, s))

    members = {
        "__doc__": f"a = {getattr(sigma, '__name__', 'σ')}(x Wᵀ + b), σ' from {saves}.",
        "max_slope": slopes.max().item() if len(slopes) else 1.0,
        "sigma": staticmethod(evaluate_sigma),
        "gate": staticmethod(gate),
    }
    base: type[LinearFunction]
    base = LayerFromOutput if saves == "a" else LayerFromWeightedInput
    return make_class(name, base, members)


def boxed_gradients(enabled: bool) -> None:
    """Whether a backward frees its incoming gradient as soon as δ is made (default on
    torch ≥ 2.13, the first that can; peak memory of a layer falls by about a fifth).

    Compiled autograd refuses Functions that do so when the forward ran in eager mode:
    switch it off there, before the forward pass.

    Args:
        enabled: whether it does, from now on, in every layer.

    Raises:
        RuntimeError: switched on with a torch that has no boxed gradients.

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
