"""Functions with usual mistakes, each with the one check of `torchbp.examine` that must
find it, a part of the reason, and a Function without the mistake, which must pass. And
Functions that are right, in other people's styles.

They import torch alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows(t: Tensor) -> Tensor:
    """(*, n) -> (examples, n)."""
    return t.reshape(t.shape[:-1].numel(), t.shape[-1])


X, W, B = rand(3, 4, seed=1), rand(5, 4, seed=2), rand(5, seed=3)
LAYER = (X, W, B)
SQUARE = (X, rand(4, 4, seed=4), rand(4, seed=5))
BATCH = (X, torch.sigmoid(rand(3, 4, seed=6)))

# ---------------------------------------------------------------- right ones


class Sigmoid(Function):
    """a = σ(x Wᵀ + b), with all that torch supports. Most wrong Functions are this one
    with a mistake."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, W, b):
        return torch.sigmoid(F.linear(x, W, b))

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, W, _ = inputs
        ctx.save_for_backward(x, W, output)
        ctx.save_for_forward(x, W, output)

    @classmethod
    def slope(cls, a):
        return a * (1 - a)

    @staticmethod
    def backward(ctx, grad_a):
        return pull_back(ctx, grad_a, Sigmoid.slope)

    @staticmethod
    def jvp(ctx, dx, dW, db):
        x, W, a = ctx.saved_tensors
        return a * (1 - a) * (dx @ W.t() + x @ dW.t() + db)


def pull_back(ctx, grad_a, slope):
    """BP2 to BP4, right."""
    x, W, a = ctx.saved_tensors
    delta = grad_a * slope(a)
    needs = ctx.needs_input_grad
    return (
        delta @ W if needs[0] else None,
        rows(delta).t() @ rows(x) if needs[1] else None,
        rows(delta).sum(0) if needs[2] else None,
    )


class Product(Function):
    """x ⊙ y, in the ``forward(ctx)`` form."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        need_x, need_y = ctx.needs_input_grad
        return grad * y if need_x else None, grad * x if need_y else None


class Square(Function):
    """x², in the ``forward(ctx)`` form."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class Quadratic(Function):
    """C = 1/(2n) Σ_x ‖y - a‖²; the target is a constant."""

    @staticmethod
    def forward(ctx, a, y):
        ctx.save_for_backward(a, y)
        return (a - y).square().sum() / (2 * a.shape[:-1].numel())

    @staticmethod
    def backward(ctx, grad):
        a, y = ctx.saved_tensors
        return grad * (a - y) / a.shape[:-1].numel(), None


class OnceLinear(Function):
    """The linear layer of many tutorials, once differentiable."""

    @staticmethod
    def forward(ctx, input, weight, bias=None):
        ctx.save_for_backward(input, weight, bias)
        output = input.mm(weight.t())
        if bias is not None:
            output += bias.unsqueeze(0).expand_as(output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        input, weight, bias = ctx.saved_tensors
        grad_input = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_input = grad_output.mm(weight)
        if ctx.needs_input_grad[1]:
            grad_weight = grad_output.t().mm(input)
        if bias is not None and ctx.needs_input_grad[2]:
            grad_bias = grad_output.sum(0)
        return grad_input, grad_weight, grad_bias


class SinCos(Function):
    """Two outputs."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin(), x.cos()

    @staticmethod
    def backward(ctx, grad_sin, grad_cos):
        (x,) = ctx.saved_tensors
        return grad_sin * x.cos() - grad_cos * x.sin()


class Sort(Function):
    """One output without a gradient: integers."""

    @staticmethod
    def forward(ctx, x):
        values, indices = x.sort(-1)
        ctx.save_for_backward(indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx, grad, _):
        (indices,) = ctx.saved_tensors
        return torch.zeros_like(grad).scatter(-1, indices, grad)


class Clamped(Function):
    """One floating output without a gradient."""

    @staticmethod
    def forward(ctx, x):
        inside = (x.abs() < 1).to(x.dtype)
        ctx.save_for_backward(inside)
        ctx.mark_non_differentiable(inside)
        return x.clamp(-1, 1), inside

    @staticmethod
    def backward(ctx, grad, _):
        (inside,) = ctx.saved_tensors
        return grad * inside


class Cube(Function):
    """``setup_context`` with a vmap rule, a jvp and an intermediate on ctx."""

    @staticmethod
    def forward(x):
        return x**3, 3 * x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        (x,) = inputs
        _, slope = output
        ctx.mark_non_differentiable(slope)
        ctx.power = 3
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx, grad, _):
        (x,) = ctx.saved_tensors
        return ctx.power * grad * x * x

    @staticmethod
    def vmap(info, in_dims, x):
        return Cube.apply(x), (in_dims[0], in_dims[0])

    @staticmethod
    def jvp(ctx, dx):
        (x,) = ctx.saved_tensors
        return ctx.power * dx * x * x, torch.zeros_like(x)


class NamedVjp(Function):
    """Its backward is called vjp, torch's other name for it."""

    @staticmethod
    def forward(ctx, x):
        output = x.exp()
        ctx.save_for_backward(output)
        return output

    @staticmethod
    def vjp(ctx, grad):
        (output,) = ctx.saved_tensors
        return grad * output


class Doubling(Function):
    """Works in place, and declares it."""

    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class Scaled(Function):
    """Takes a number and a flag besides its tensor."""

    @staticmethod
    def forward(ctx, x, factor, squared):
        ctx.save_for_backward(x)
        ctx.factor, ctx.squared = factor, squared
        return factor * (x * x if squared else x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        slope = 2 * x if ctx.squared else 1
        return ctx.factor * grad * slope, None, None


class Intermediate(Function):
    """exp(x)·x with an intermediate on ctx, which is allowed."""

    @staticmethod
    def forward(ctx, x):
        ctx.grew = True
        ctx.sign = x.sign()
        ctx.save_for_backward(x)
        return x.abs()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.sign


def composite(x: Tensor, W: Tensor, b: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x, W, b))


# ---------------------------------------------------------------- σ'


class SlopeMissing(Sigmoid):
    @staticmethod
    def backward(ctx, grad_a):
        return pull_back(ctx, grad_a, torch.ones_like)


class SlopeOfZ(Sigmoid):
    """σ' = a(1 - a), computed from z."""

    @staticmethod
    def backward(ctx, grad_a):
        return pull_back(ctx, grad_a, lambda a: a.logit() * (1 - a.logit()))


class SlopeOfA(Sigmoid):
    """σ'(a) for σ'(z): σ is applied twice."""

    @staticmethod
    def backward(ctx, grad_a):
        return pull_back(ctx, grad_a, lambda a: a.sigmoid() * (1 - a.sigmoid()))


class SlopeTwice(Sigmoid):
    @staticmethod
    def backward(ctx, grad_a):
        return pull_back(ctx, grad_a, lambda a: (a * (1 - a)) ** 2)


class TenthOfAPercent(Sigmoid):
    """Wrong by less than gradcheck's default tolerances."""

    @staticmethod
    def backward(ctx, grad_a):
        return pull_back(ctx, grad_a, lambda a: 1.001 * a * (1 - a))


class TanhSlopeMissing(Function):
    @staticmethod
    def forward(ctx, x):
        return x.tanh()

    @staticmethod
    def backward(ctx, grad):
        return grad.clone()


class ReLUSlopeMissing(Function):
    @staticmethod
    def forward(ctx, x):
        return x.relu()

    @staticmethod
    def backward(ctx, grad):
        return grad.clone()


class RightReLU(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.relu()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (x > 0)


# ---------------------------------------------------------------- BP2 to BP4


class WeightGradientTransposed(Sigmoid):
    @staticmethod
    def backward(ctx, grad_a):
        x, W, b = pull_back(ctx, grad_a, Sigmoid.slope)
        return x, None if W is None else W.t(), b


class TransposeForgotten(Sigmoid):
    """δ Wᵀ for δ W: the shapes of a square layer allow it."""

    @staticmethod
    def backward(ctx, grad_a):
        _, W, a = ctx.saved_tensors
        _, grad_W, grad_b = pull_back(ctx, grad_a, Sigmoid.slope)
        need_x = ctx.needs_input_grad[0]
        return (grad_a * a * (1 - a)) @ W.t() if need_x else None, grad_W, grad_b


class MeanForSum(Sigmoid):
    @staticmethod
    def backward(ctx, grad_a):
        x, W, b = pull_back(ctx, grad_a, Sigmoid.slope)
        n = grad_a.shape[:-1].numel()
        return x, W, None if b is None else b / n


class BiasUnsummed(Sigmoid):
    @staticmethod
    def backward(ctx, grad_a):
        x, W, b = pull_back(ctx, grad_a, Sigmoid.slope)
        a = ctx.saved_tensors[2]
        return x, W, None if b is None else grad_a * a * (1 - a)


class BiasForgotten(Sigmoid):
    @staticmethod
    def backward(ctx, grad_a):
        x, W, _ = pull_back(ctx, grad_a, Sigmoid.slope)
        return x, W, None


class WrongSign(Sigmoid):
    @staticmethod
    def backward(ctx, grad_a):
        x, W, b = pull_back(ctx, grad_a, Sigmoid.slope)
        return x, W, None if b is None else -b


class Difference(Function):
    """x - y."""

    @staticmethod
    def forward(ctx, x, y):
        return x - y

    @staticmethod
    def backward(ctx, grad):
        return grad, -grad if ctx.needs_input_grad[1] else None


class SignForgotten(Difference):
    """The gradient of y is that of x, for which its order is not to blame."""

    @staticmethod
    def backward(ctx, grad):
        return grad, grad


def through_data(x):
    """No Function, but .data hides a dependence."""
    return x * x.data


class WrongArgument(Product):
    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        need_x, need_y = ctx.needs_input_grad
        return grad * x if need_x else None, grad * y if need_y else None


class NeedsIgnored(Product):
    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        return grad * y, grad * x


class NeedsConfused(Product):
    """Gives both gradients or neither."""

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        return (grad * y, grad * x) if all(ctx.needs_input_grad) else (None, None)


# ---------------------------------------------------------------- memory


class OverwritesGradient(Sigmoid):
    @staticmethod
    def backward(ctx, grad_a):
        a = ctx.saved_tensors[2]
        if not torch.is_grad_enabled():
            grad_a = grad_a.mul_(a * (1 - a))
            return pull_back(ctx, grad_a, torch.ones_like)
        return pull_back(ctx, grad_a, Sigmoid.slope)


class Rows(Function):
    """The rows of x with these numbers, negative ones from the end."""

    @staticmethod
    def forward(ctx, x, numbers):
        numbers = numbers % len(x)
        ctx.save_for_backward(numbers)
        ctx.count = len(x)
        return x[numbers]

    @staticmethod
    def backward(ctx, grad):
        (numbers,) = ctx.saved_tensors
        zeros = grad.new_zeros(ctx.count, *grad.shape[1:])
        return zeros.index_add(0, numbers, grad), None


class OverwritesNumbers(Rows):
    @staticmethod
    def forward(ctx, x, numbers):
        return Rows.forward(ctx, x, numbers.remainder_(len(x)))


class OverwritesSaved(Square):
    """Its backward doubles x in place, unseen by autograd."""

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return 2 * x * grad
        return x.data.mul_(2) * grad


class InputOnCtx(Square):
    @staticmethod
    def forward(ctx, x):
        ctx.x = x
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.x * grad


class OutputOnCtx(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.y = x.exp()
        return ctx.y

    @staticmethod
    def backward(ctx, grad):
        return ctx.y * grad


class OutputInAList(NamedVjp):
    """Holds a reference to every output."""

    history: list[Tensor] = []  # noqa: RUF012

    @staticmethod
    def forward(ctx, x):
        output = x.exp()
        ctx.save_for_backward(output)
        OutputInAList.history.append(output)
        return output


class UsedUp(Square):
    """Its backward works once."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.factor = 2
        return x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        factor, ctx.factor = ctx.factor, 0
        return factor * x * grad


class Moody(Square):
    """Every other gradient differs in the last bit, as from atomic sums."""

    calls = 0

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        Moody.calls += 1
        result = 2 * x * grad
        return result if Moody.calls % 2 else result * (1 + torch.finfo(x.dtype).eps)


# ---------------------------------------------------------------- special cases


def as_if_contiguous(t: Tensor) -> Tensor:
    """What C code reads from a pointer and a shape, without strides."""
    strides = torch.empty(t.shape, device="meta").stride()
    flat = t.as_strided((_reach(t),), (1,))
    if flat.numel() < t.numel():  # beyond the end
        flat = torch.cat([flat, flat.new_zeros(t.numel() - flat.numel())])
    return flat.as_strided(t.shape, strides)


def _reach(t: Tensor) -> int:
    return 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))


class MaskOnClass(Function):
    """Saves on the class what belongs to one call: a second layer overwrites it."""

    mask: Tensor

    @staticmethod
    def forward(ctx, x):
        MaskOnClass.mask = x > 0
        return x * MaskOnClass.mask

    @staticmethod
    def backward(ctx, grad):
        return grad * MaskOnClass.mask


class ReadsMemory(Square):
    """Wrong only for output gradients that are not contiguous."""

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        own = grad if grad.is_contiguous() else as_if_contiguous(grad)
        return 2 * x * own


class ViewsGradient(Square):
    """Fails for output gradients that are not contiguous."""

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return (2 * x.reshape(-1) * grad.view(-1)).reshape(x.shape)


class ViewsInput(Square):
    """Refuses inputs that are not contiguous, with an error."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.view(-1).square().view(x.shape)


class ReadsInputMemory(Square):
    """Wrong only for inputs that are not contiguous."""

    @staticmethod
    def forward(ctx, x):
        x = x if x.is_contiguous() else as_if_contiguous(x).clone()
        ctx.save_for_backward(x)
        return x * x


class WrongIn3D(Sigmoid):
    """Raises an error in 1-D, which must not hide the mistake."""

    @staticmethod
    def backward(ctx, grad_a):
        x, _, a = ctx.saved_tensors
        if x.dim() < 2:
            raise RuntimeError("expected two or more dimensions")
        grad_x, grad_W, grad_b = pull_back(ctx, grad_a, Sigmoid.slope)
        if x.dim() == 3 and grad_W is not None:
            delta = grad_a * a * (1 - a)
            grad_W = (delta.transpose(1, 2) @ x).mean(0)
        return grad_x, grad_W, grad_b


class WrongInHalf(Square):
    """Rounds 16-bit numbers to integers."""

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return (x if x.itemsize > 2 else x.round()) * 2 * grad


class SinglePrecision(Square):
    """Makes its constant in float32, whatever the input's dtype."""

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return (x * grad).to(torch.float32) * torch.full(x.shape, 2.0)


class SingleOnly(Square):
    """Takes float32 alone, like much code for GPUs."""

    @staticmethod
    def forward(ctx, x):
        if x.dtype != torch.float32:
            raise TypeError(f"x: expected float32, got {x.dtype}")
        ctx.save_for_backward(x)
        return x * x


class SingleOnlyAndWrong(SingleOnly):
    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return x * grad


class WrongForEmpty(Sigmoid):
    """The mean of no rows, times their number, is NaN."""

    @staticmethod
    def backward(ctx, grad_a):
        x, W, b = pull_back(ctx, grad_a, Sigmoid.slope)
        if b is not None:
            a = ctx.saved_tensors[2]
            delta = rows(grad_a * a * (1 - a))
            b = delta.mean(0) * len(delta)
        return x, W, b


class AmbiguousShape(Sigmoid):
    """reshape(-1, ...) is ambiguous for an empty tensor."""

    @staticmethod
    def backward(ctx, grad_a):
        x, W, b = pull_back(ctx, grad_a, Sigmoid.slope)
        return x, W, None if b is None else b.reshape(len(grad_a) and len(b), -1)[:, 0]


class NoneUnexpected(Square):
    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        return x * x


class OneOutputAlone(SinCos):
    """Right with both output gradients, wrong with one."""

    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        return x.sin(), x.cos()

    @staticmethod
    def backward(ctx, grad_sin, grad_cos):
        (x,) = ctx.saved_tensors
        if grad_sin is None or grad_cos is None:
            return None
        return grad_sin * x.cos() - grad_cos * x.sin()


# ---------------------------------------------------------------- higher and forward


class DetachedTwice(Square):
    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x.detach() * grad


class ThroughNumPy(Square):
    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(2 * x.detach().numpy() * grad.detach().numpy())


class OnceNumPy(Square):
    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return torch.from_numpy(2 * x.numpy() * grad.numpy())


class JvpDisagrees(Sigmoid):
    @staticmethod
    def jvp(ctx, dx, dW, db):
        x, W, _ = ctx.saved_tensors
        return dx @ W.t() + x @ dW.t() + db


class RightRule(Function):
    """x minus the mean of its entries, with a vmap rule of its own."""

    @staticmethod
    def forward(x):
        return x - x.mean()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad - grad.mean()

    @staticmethod
    def vmap(info, in_dims, x):
        x = x.movedim(in_dims[0], 0)
        return x - x.flatten(1).mean(1).reshape(-1, *[1] * (x.dim() - 1)), 0


class MixesExamples(RightRule):
    @staticmethod
    def vmap(info, in_dims, x):
        x = x.movedim(in_dims[0], 0)
        return x - x.mean(), 0


class ForgetsDimension(RightRule):
    """Its vmap rule assumes that the mapped dimension is the first."""

    @staticmethod
    def vmap(info, in_dims, x):
        return x - x.flatten(1).mean(1).reshape(-1, *[1] * (x.dim() - 1)), 0


class RefusesDimension(RightRule):
    """Its vmap rule raises an error unless the mapped dimension is the first."""

    @staticmethod
    def vmap(info, in_dims, x):
        assert in_dims[0] == 0
        return RightRule.vmap(info, in_dims, x)


class NativeWhenCompiled(Square):
    """Uses torch's own operations when it is compiled."""


def native_when_compiled(x):
    return x * x if torch.compiler.is_compiling() else NativeWhenCompiled.apply(x)


# ---------------------------------------------------------------- linear in g


class ClipsGradient(Square):
    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad.clamp(-1.5, 1.5)


class RoundsGradient(Square):
    """Computes in float16 in backward alone."""

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return (2 * x.half() * grad.half()).to(grad.dtype)


class SignOfGradient(Square):
    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad.sign()


class SumOfSquares(Function):
    """A loss."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square().sum()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class IgnoresGradient(SumOfSquares):
    """Right as long as the loss is neither scaled nor weighted."""

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x


# ---------------------------------------------------------------- steps, tails, kinks


class RoundsStraightThrough(Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return grad.clone()


class RoundsToZero(Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return torch.zeros_like(grad)


class WrongInTheTail(NamedVjp):
    """Its derivative is cut off below -3."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return F.softplus(x)

    @staticmethod
    def vjp(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * torch.where(x > -3, x.sigmoid(), x.new_zeros(()))


def softplus(x: Tensor) -> Tensor:
    return F.softplus(x)


# ---------------------------------------------------------------- precision


class SingleInside(Square):
    """Computes in float32, whatever the input's dtype."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.float().square().to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class SingleInsideAndTwice(SingleInside):
    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad * len(x)


class VanishingClamp(Function):
    """ln(1 - p), with p clamped to less than 1 by less than float32 resolves."""

    @staticmethod
    def forward(ctx, p):
        p = p.clamp(max=1 - 1e-15)
        ctx.save_for_backward(p)
        return (1 - p).log()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (p,) = ctx.saved_tensors
        return -grad / (1 - p) * (p < 1 - 1e-14)


class Clamp(VanishingClamp):
    @staticmethod
    def forward(ctx, p):
        p = p.clamp(max=1 - 2**-10)
        ctx.save_for_backward(p)
        return (1 - p).log()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (p,) = ctx.saved_tensors
        return -grad / (1 - p) * (p < 1 - 2**-10)


# ---------------------------------------------------------------- own dtype, errors


class OverwritesSingle(Square):
    """x.float() is a copy of a float64 tensor, and a float32 tensor itself."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.clone())
        return x.float().mul_(x).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class OverwritesWithoutChange(RightReLU):
    """In place on x without mark_dirty."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.relu_().clone()


class WorksOnSaved(Function):
    """Its backward works in place on a saved intermediate."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(2 * x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (slope,) = ctx.saved_tensors
        return slope.mul_(grad)


class OnceSquare(Square):
    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return Square.backward(ctx, grad)


class TooManyGradients(Square):
    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad, None, grad


class Asserts(Square):
    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        assert x.dim() == 7
        return 2 * x * grad


class RunsOnce(Square):
    """Frees what it saved in its first backward."""

    @staticmethod
    def forward(ctx, x):
        ctx.saved = [x.clone()]
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved.pop() * grad


class Noise(Square):
    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad + torch.randn_like(x) / 10


class DropoutDrawnTwice(Function):
    @staticmethod
    def forward(ctx, x):
        return x * torch.bernoulli(torch.full_like(x, 0.5))

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.bernoulli(torch.full_like(grad, 0.5))


class DropoutSaved(Function):
    @staticmethod
    def forward(ctx, x):
        mask = torch.bernoulli(torch.full_like(x, 0.5))
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    def backward(ctx, grad):
        (mask,) = ctx.saved_tensors
        return grad * mask


# ---------------------------------------------------------------- second derivatives


class SavedSlope(Function):
    """e^x whose derivative is a saved intermediate, constant to autograd."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.exp())
        return x.exp()

    @staticmethod
    def backward(ctx, grad):
        (slope,) = ctx.saved_tensors
        return grad * slope


class NotANumberTwice(Function):
    """√x above 0 and 0 below, by a mask after the root."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.where(x > 0, x, x.new_zeros(())).sqrt()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * torch.where(x > 0, 0.5 / x.sqrt(), x.new_zeros(()))


class NumberTwice(NotANumberTwice):
    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        root = torch.where(x > 0, x, x.new_ones(())).sqrt()
        return grad * torch.where(x > 0, 0.5 / root, x.new_zeros(()))


# ---------------------------------------------------------------- costs, references


class AveragedTwice(Quadratic):
    """Forward and backward agree with each other, but not with A1."""

    @staticmethod
    def forward(ctx, a, y):
        ctx.save_for_backward(a, y)
        return (a - y).square().sum(-1).mean() / (2 * a.shape[:-1].numel())

    @staticmethod
    def backward(ctx, grad):
        a, y = ctx.saved_tensors
        return grad * (a - y) / a.shape[:-1].numel() ** 2, None


class GradientAveragedTwice(Quadratic):
    @staticmethod
    def backward(ctx, grad):
        a, y = ctx.saved_tensors
        return grad * (a - y) / a.shape[:-1].numel() ** 2, None


class Summed(Quadratic):
    @staticmethod
    def forward(ctx, a, y):
        ctx.save_for_backward(a, y)
        return (a - y).square().sum() / 2

    @staticmethod
    def backward(ctx, grad):
        a, y = ctx.saved_tensors
        return grad * (a - y), None


WEIGHT = torch.ones(2, requires_grad=True)


def regularised(a: Tensor, y: Tensor) -> Tensor:
    """A cost that depends on a weight besides its inputs."""
    return Quadratic.apply(a, y) + WEIGHT.to(a.dtype).square().sum()


class TargetGradientWrong(Quadratic):
    """Returns ∇C for the target, too, with the sign of the output's."""

    @staticmethod
    def backward(ctx, grad):
        a, y = ctx.saved_tensors
        delta = grad * (a - y) / a.shape[:-1].numel()
        return delta, delta if ctx.needs_input_grad[1] else None


class OtherForward(Function):
    """Forward and backward agree, but it is not the function that is meant."""

    @staticmethod
    def forward(ctx, x):
        output = x.tanh()
        ctx.save_for_backward(output)
        return output

    @staticmethod
    def backward(ctx, grad):
        (output,) = ctx.saved_tensors
        return grad * (1 - output * output)


# ---------------------------------------------------------------- the table


@dataclass(frozen=True)
class WrongFunction:
    """A wrong Function, a right one beside it, the check that finds the mistake, and a
    part of its reason."""

    wrong: Callable[..., Any]
    right: Callable[..., Any]
    inputs: tuple[Any, ...]
    check: str
    reason: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        owner = getattr(self.wrong, "__self__", self.wrong)
        return str(owner.__name__)


FIRST = "first-derivatives"

WRONG_FUNCTIONS = [
    WrongFunction(
        SlopeMissing.apply, Sigmoid.apply, LAYER, FIRST, "a(1 - a) of a sigmoid is"
    ),
    WrongFunction(
        SlopeOfZ.apply, Sigmoid.apply, LAYER, FIRST, "taken of z in place of a"
    ),
    WrongFunction(SlopeOfA.apply, Sigmoid.apply, LAYER, FIRST, "σ is applied twice"),
    WrongFunction(SlopeTwice.apply, Sigmoid.apply, LAYER, FIRST, "is a factor twice"),
    WrongFunction(TenthOfAPercent.apply, Sigmoid.apply, LAYER, FIRST, "1.001 times"),
    WrongFunction(
        TanhSlopeMissing.apply, OtherForward.apply, (X,), FIRST, "1 - a² of a tanh"
    ),
    WrongFunction(
        ReLUSlopeMissing.apply, RightReLU.apply, (X,), FIRST, "[a > 0] of a ReLU"
    ),
    WrongFunction(
        WeightGradientTransposed.apply,
        Sigmoid.apply,
        SQUARE,
        FIRST,
        "W: the gradient is the transpose",
    ),
    WrongFunction(
        TransposeForgotten.apply,
        Sigmoid.apply,
        SQUARE,
        FIRST,
        "x: the gradient is off at",
    ),
    WrongFunction(
        MeanForSum.apply, Sigmoid.apply, LAYER, FIRST, "b: the gradient is 0.3333"
    ),
    WrongFunction(
        BiasUnsummed.apply,
        Sigmoid.apply,
        LAYER,
        "raw-gradients",
        "b: backward returns (3, 5) for (5)",
    ),
    WrongFunction(BiasForgotten.apply, Sigmoid.apply, LAYER, FIRST, "b: no gradient"),
    WrongFunction(
        WrongSign.apply, Sigmoid.apply, LAYER, FIRST, "b: the gradient has the wro"
    ),
    WrongFunction(
        WrongArgument.apply, Product.apply, BATCH, FIRST, "x: the gradient is that of y"
    ),
    WrongFunction(
        NeedsIgnored.apply,
        Product.apply,
        BATCH,
        "unneeded-gradients",
        "for argument 1 of NeedsIgnored",
    ),
    WrongFunction(
        NeedsConfused.apply,
        Product.apply,
        BATCH,
        "requires_grad-subsets",
        "with requires_grad for x only",
    ),
    WrongFunction(
        OverwritesGradient.apply,
        Sigmoid.apply,
        LAYER,
        "gradients-unchanged",
        "backward overwrites the gradient of the output",
    ),
    WrongFunction(
        OverwritesNumbers.apply,
        Rows.apply,
        (X, torch.tensor([0, -1])),
        "inputs-unchanged",
        "forward overwrites numbers",
    ),
    WrongFunction(
        OverwritesSaved.apply,
        Square.apply,
        (X,),
        "inputs-unchanged",
        "backward overwrites x",
    ),
    WrongFunction(
        InputOnCtx.apply,
        Square.apply,
        (X,),
        "saved-on-ctx",
        "the input x is saved on ctx.x",
    ),
    WrongFunction(
        OutputOnCtx.apply,
        NamedVjp.apply,
        (X,),
        "saved-on-ctx",
        "the output is saved on ctx.y",
    ),
    WrongFunction(
        OutputInAList.apply, NamedVjp.apply, (X,), "outputs-freed", "is never freed"
    ),
    WrongFunction(UsedUp.apply, Square.apply, (X,), "retain_graph", "the second time"),
    WrongFunction(
        Moody.apply,
        Square.apply,
        (X,),
        "determinism",
        "with the same arguments again, the gradient of x",
    ),
    WrongFunction(
        ReadsMemory.apply,
        Square.apply,
        (X,),
        "output-gradients",
        "transposed, the gradient of x",
    ),
    WrongFunction(
        ViewsGradient.apply,
        Square.apply,
        (X,),
        "output-gradients",
        "transposed, the backward raised",
    ),
    WrongFunction(
        ReadsInputMemory.apply,
        Square.apply,
        (X,),
        "input-layouts",
        "with x transposed, the value",
    ),
    WrongFunction(
        WrongIn3D.apply,
        Sigmoid.apply,
        LAYER,
        "N-d-inputs",
        "3-D: along a random direction, the gradient of W",
    ),
    WrongFunction(
        WrongInHalf.apply, Square.apply, (X,), "bfloat16", "the gradient of x: off"
    ),
    WrongFunction(
        SinglePrecision.apply,
        Square.apply,
        (X,),
        "raw-gradients",
        "returns torch.float32 for torch.float64",
    ),
    WrongFunction(
        SingleOnlyAndWrong.apply,
        SingleOnly.apply,
        (X,),
        FIRST,
        "x: the gradient is 0.5 times",
    ),
    WrongFunction(
        WrongForEmpty.apply,
        Sigmoid.apply,
        LAYER,
        "empty-inputs",
        "the gradient of b is not zero",
    ),
    WrongFunction(
        AmbiguousShape.apply,
        Sigmoid.apply,
        LAYER,
        "empty-inputs",
        "the backward raised RuntimeError",
    ),
    WrongFunction(
        NoneUnexpected.apply,
        Square.apply,
        (X,),
        "undefined-gradients",
        "raised TypeError",
    ),
    WrongFunction(
        OneOutputAlone.apply,
        SinCos.apply,
        (X,),
        "undefined-gradients",
        "from output 0 alone",
    ),
    WrongFunction(
        DetachedTwice.apply,
        Square.apply,
        (X,),
        "second-derivatives",
        "the gradient of x is a constant to x",
    ),
    WrongFunction(
        ThroughNumPy.apply,
        OnceNumPy.apply,
        (X,),
        "second-derivatives",
        "cut off from the graph",
    ),
    WrongFunction(JvpDisagrees.apply, Sigmoid.apply, LAYER, "jvp", "along x it is off"),
    WrongFunction(
        MixesExamples.apply, RightRule.apply, (X,), "vmap", "mapped over x, a value"
    ),
    WrongFunction(
        ForgetsDimension.apply, RightRule.apply, (X,), "vmap", "mapped over x, a value"
    ),
    WrongFunction(
        RefusesDimension.apply,
        RightRule.apply,
        (X,),
        "vmap",
        "along its last dimension",
    ),
    WrongFunction(
        native_when_compiled,
        Square.apply,
        (X,),
        "compiled-backward",
        "wrong on purpose makes no difference",
        {"compile": True},
    ),
    WrongFunction(
        AveragedTwice.apply, Quadratic.apply, BATCH, "A1", "C of 3 rows is 0.3333"
    ),
    WrongFunction(
        GradientAveragedTwice.apply,
        Quadratic.apply,
        BATCH,
        FIRST,
        "0.3333 times the right one",
    ),
    WrongFunction(Summed.apply, Quadratic.apply, BATCH, "A1", "C of 3 rows is 3 times"),
    WrongFunction(regularised, Quadratic.apply, BATCH, "A2", "a tensor (2) besides"),
    WrongFunction(
        TargetGradientWrong.apply,
        Quadratic.apply,
        BATCH,
        "A2",
        "the gradient of y",
        {"cost": True},
    ),
    WrongFunction(
        OtherForward.apply,
        NamedVjp.apply,
        (X,),
        "reference",
        "the value of the",
        {"reference": torch.exp},
    ),
    WrongFunction(
        ClipsGradient.apply, Square.apply, (X,), "linear-in-g", "it clips or rounds it"
    ),
    WrongFunction(
        RoundsGradient.apply,
        Square.apply,
        (X,),
        "linear-in-g",
        "from the sum of two output gradients, the gradient of x",
    ),
    WrongFunction(
        MaskOnClass.apply,
        RightReLU.apply,
        (X,),
        "determinism",
        "if the function is called again before backward, the gradient of x",
    ),
    WrongFunction(
        SignForgotten.apply, Difference.apply, BATCH, FIRST, "y: the gradient has the w"
    ),
    WrongFunction(through_data, Square.apply, (X,), FIRST, "is 0.5 times the right"),
    WrongFunction(
        ViewsInput.apply, Square.apply, (X,), "input-layouts", "raised RuntimeError"
    ),
    WrongFunction(
        SignOfGradient.apply, Square.apply, (X,), "linear-in-g", "ignores the size of"
    ),
    WrongFunction(
        IgnoresGradient.apply,
        SumOfSquares.apply,
        (X,),
        "linear-in-g",
        "ignores the output's gradient",
    ),
    WrongFunction(
        RoundsStraightThrough.apply,
        RoundsToZero.apply,
        (X,),
        FIRST,
        "x: the forward is a step",
    ),
    WrongFunction(WrongInTheTail.apply, softplus, (X,), FIRST, "at inputs up to 8"),
    WrongFunction(
        SingleInsideAndTwice.apply,
        SingleInside.apply,
        (X,),
        FIRST,
        "x: the gradient is 3 times the right one",
    ),
    WrongFunction(
        VanishingClamp.apply,
        Clamp.apply,
        (torch.tensor([0.25, 1.0, 0.5]),),
        "float32",
        "the value of the output",
        {"only": ["first-derivatives", "float32"]},
    ),
    WrongFunction(
        OverwritesSingle.apply,
        SingleInside.apply,
        (X,),
        "inputs-unchanged",
        "forward overwrites x",
    ),
    WrongFunction(
        OverwritesWithoutChange.apply,
        RightReLU.apply,
        (X.abs(),),
        "inputs-unchanged",
        "forward overwrites x",
    ),
    WrongFunction(
        WorksOnSaved.apply,
        OnceSquare.apply,
        (X,),
        "retain_graph",
        "with retain_graph, the second backward raised RuntimeError",
    ),
    WrongFunction(
        TooManyGradients.apply, Square.apply, (X,), FIRST, "incorrect number of grad"
    ),
    WrongFunction(Asserts.apply, Square.apply, (X,), FIRST, "raised AssertionError"),
    WrongFunction(
        RunsOnce.apply, OnceSquare.apply, (X,), "retain_graph", "raised IndexError"
    ),
    WrongFunction(
        Noise.apply, Square.apply, (X,), "determinism", "backward draws random numbers"
    ),
    WrongFunction(
        DropoutDrawnTwice.apply,
        DropoutSaved.apply,
        (X,),
        "determinism",
        "backward draws random numbers",
    ),
    WrongFunction(
        SavedSlope.apply,
        NamedVjp.apply,
        (X,),
        "second-derivatives",
        "the gradient of x is a constant to x",
    ),
    WrongFunction(
        NotANumberTwice.apply,
        NumberTwice.apply,
        (X,),
        "second-derivatives",
        "is NaN or infinite at",
    ),
]


# Right ones in other people's styles, with their inputs and options.
RIGHT: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = {
    "a composite function": (composite, LAYER, {"reference": Sigmoid.apply}),
    "everything": (Sigmoid.apply, LAYER, {"reference": composite}),
    "once differentiable": (OnceLinear.apply, LAYER, {"reference": F.linear}),
    "no bias": (OnceLinear.apply, (X, W), {"reference": F.linear}),
    "two outputs": (SinCos.apply, (X,), {"reference": lambda x: (x.sin(), x.cos())}),
    "indices": (Sort.apply, (X,), {"reference": lambda x: tuple(x.sort(-1))}),
    "a mask": (Clamped.apply, (X,), {}),
    "a vmap rule and a jvp": (Cube.apply, (X,), {}),
    "vjp for backward": (NamedVjp.apply, (X,), {"reference": torch.exp}),
    "in place": (Doubling.apply, (X,), {}),
    "numbers": (Scaled.apply, (X, 0.5, True), {}),
    "an intermediate on ctx": (Intermediate.apply, (X,), {}),
    "NumPy": (OnceNumPy.apply, (X,), {}),
    "softmax": (lambda x: x.softmax(-1), (X,), {}),
    "layer norm": (lambda x: F.layer_norm(x, (4,)), (X,), {}),
    "matmul": (torch.matmul, (X, rand(4, 2, seed=7)), {}),
    "convolution": (F.conv2d, (rand(2, 3, 5, 5), rand(2, 3, 3, 3, seed=8)), {}),
    "embedding": (F.embedding, (torch.tensor([0, 2, 2]), X), {}),
    "attention": (F.scaled_dot_product_attention, (rand(2, 3, 4),) * 3, {}),
    "logarithm": (torch.log, (X.abs() + 0.1,), {}),
    "0-d": (torch.exp, (torch.tensor(0.3),), {}),
    "dict": (lambda x: {"double": 2 * x, "square": [x * x]}, (X,), {}),
    "mse loss": (F.mse_loss, BATCH, {}),
    "cross entropy": (F.cross_entropy, (X, torch.tensor([0, 3, 1])), {}),
    "dropout": (lambda x: F.dropout(x, 0.5), (X,), {}),
    "log determinant": (lambda x: torch.logdet(x @ x.T + math.pi * torch.eye(3).to(x)),
                        (X,), {}),
}  # fmt: skip
