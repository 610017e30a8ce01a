"""Right code in other people's styles, of torch itself and of its usual extensions:
no check of `torchbp.examine` may fail on any of it.

The pieces import torch alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Piece(NamedTuple):
    """A right function, its arguments, and options of examine."""

    function: Callable[..., Any]
    inputs: tuple[Any, ...]
    options: dict[str, Any] = {}  # noqa: RUF012


# ---------------------------------------------------------------- normalisation


class LayerNorm(Function):
    """Normalises the last dimension; saves what the forward computed anyway."""

    @staticmethod
    def forward(ctx, x, gamma, beta, eps):
        mean = x.mean(-1, keepdim=True)
        rstd = (x.var(-1, unbiased=False, keepdim=True) + eps).rsqrt()
        xhat = (x - mean) * rstd
        ctx.save_for_backward(xhat, rstd, gamma)
        return xhat * gamma + beta

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        xhat, rstd, gamma = ctx.saved_tensors
        dx = dgamma = dbeta = None
        if ctx.needs_input_grad[0]:
            g = dy * gamma
            dx = rstd * (
                g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True)
            )
        lead = tuple(range(dy.dim() - 1))
        if ctx.needs_input_grad[1]:
            dgamma = (dy * xhat).sum(lead)
        if ctx.needs_input_grad[2]:
            dbeta = dy.sum(lead)
        return dx, dgamma, dbeta, None


class RMSNorm(nn.Module):
    """Computes in float32, whatever the input's dtype, as language models do."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return y.type_as(x) * self.weight


class RMSNormFunction(Function):
    """The same by hand: float32 inside, gradients in the dtypes of the arguments."""

    @staticmethod
    def forward(ctx, x, weight):
        y = x.float()
        rstd = torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        ctx.save_for_backward(x, weight, rstd)
        return (y * rstd).type_as(x) * weight

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, rstd = ctx.saved_tensors
        xhat = x.float() * rstd
        g = (grad * weight).float()
        grad_x = rstd * (g - xhat * (g * xhat).mean(-1, keepdim=True))
        grad_w = (grad.float() * xhat).flatten(0, -2).sum(0)
        need_x, need_w = ctx.needs_input_grad
        return (
            grad_x.type_as(x) if need_x else None,
            grad_w.type_as(weight) if need_w else None,
        )


def l2_normalised(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


# ---------------------------------------------------------------- activations


class Swish(Function):
    """Saves x only and recomputes the sigmoid."""

    @staticmethod
    def forward(ctx, i):
        result = i * torch.sigmoid(i)
        ctx.save_for_backward(i)
        return result

    @staticmethod
    def backward(ctx, grad_output):
        i = ctx.saved_tensors[0]
        sigmoid_i = torch.sigmoid(i)
        return grad_output * (sigmoid_i * (1 + i * (1 - sigmoid_i)))


class Mish(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.mul(torch.tanh(F.softplus(x)))

    @staticmethod
    def backward(ctx, grad_output):
        (x,) = ctx.saved_tensors
        t = torch.tanh(F.softplus(x))
        return grad_output * (t + x * torch.sigmoid(x) * (1 - t * t))


class LeakyReLUInPlace(Function):
    """Overwrites its input and declares it; the output's sign gives the slope."""

    @staticmethod
    def forward(ctx, x, slope):
        ctx.mark_dirty(x)
        ctx.slope = slope
        F.leaky_relu_(x, slope)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return torch.where(y > 0, grad, ctx.slope * grad), None


class SafeExp(Function):
    """Its gradient is a saved intermediate, so it is once differentiable."""

    @staticmethod
    def forward(ctx, x):
        y = x.clamp(max=15).exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (y,) = ctx.saved_tensors
        return g * y


def geglu(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, -1)
    return value * F.gelu(gate)


# ---------------------------------------------------------------- products


class MatMul(Function):
    """Takes any leading dimensions, as one."""

    @staticmethod
    def forward(ctx, input, weight):
        ctx.save_for_backward(input, weight)
        return input @ weight.t()

    @staticmethod
    def backward(ctx, grad_output):
        input, weight = ctx.saved_tensors
        grad_input = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_input = grad_output @ weight
        if ctx.needs_input_grad[1]:
            flat = grad_output.reshape(-1, grad_output.shape[-1])
            grad_weight = flat.t() @ input.reshape(flat.shape[0], input.shape[-1])
        return grad_input, grad_weight


class ConvolutionByHand(Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return F.conv2d(x, w, padding=1)

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        need_x, need_w = ctx.needs_input_grad
        return (
            torch.nn.grad.conv2d_input(x.shape, w, g, padding=1) if need_x else None,
            torch.nn.grad.conv2d_weight(x, w.shape, g, padding=1) if need_w else None,
        )


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(mask, -math.inf).softmax(-1) @ v


class SymmetricInverse(Function):
    """A⁻¹ by a linear solve; the gradient is -A⁻ᵀ G A⁻ᵀ."""

    @staticmethod
    def forward(ctx, a):
        inverse = torch.linalg.inv(a)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx, g):
        (inverse,) = ctx.saved_tensors
        return -inverse.mT @ g @ inverse.mT


# ---------------------------------------------------------------- losses


class FusedCrossEntropy(Function):
    """Computes its gradient in the forward, as fused losses do."""

    @staticmethod
    def forward(ctx, logits, labels):
        log_p = logits.log_softmax(-1)
        loss = -log_p.gather(1, labels[:, None]).mean()
        grad = (log_p.exp() - F.one_hot(labels, logits.shape[1])) / len(labels)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (grad,) = ctx.saved_tensors
        return g * grad, None


def kl_divergence(mean: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(mean, var) ‖ N(0, 1)), as in every variational autoencoder."""
    return -0.5 * (1 + log_var - mean.pow(2) - log_var.exp()).sum(-1)


def kl_near_zero(logits: Tensor, target: Tensor) -> Tensor:
    return F.kl_div(
        logits.log_softmax(-1), target, reduction="batchmean", log_target=False
    )


def contrastive(x: Tensor, y: Tensor) -> Tensor:
    """The rows of x and y are pairs; every other pair of the batch is a negative."""
    similarity = F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).t() / 0.5
    labels = torch.arange(len(x), device=x.device)
    return F.cross_entropy(similarity, labels)


class Dice(nn.Module):
    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        p = logits.sigmoid().flatten(1)
        t = target.flatten(1)
        overlap = 2 * (p * t).sum(1) + 1
        return 1 - (overlap / (p.sum(1) + t.sum(1) + 1)).mean()


# ---------------------------------------------------------------- indices and shapes


class Gather(Function):
    @staticmethod
    def forward(ctx, table, index):
        ctx.save_for_backward(index)
        ctx.shape = table.shape
        return table.index_select(0, index)

    @staticmethod
    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        result = torch.zeros(ctx.shape, dtype=grad.dtype, device=grad.device)
        return result.index_add(0, index, grad), None


class MaxOver(Function):
    """Values and indices of the maximum; the indices have no gradient."""

    @staticmethod
    def forward(ctx, x, dim):
        values, places = x.max(dim, keepdim=True)
        ctx.mark_non_differentiable(places)
        ctx.save_for_backward(places)
        ctx.dim, ctx.size = dim, x.shape
        return values, places

    @staticmethod
    def backward(ctx, grad_values, grad_places):
        (places,) = ctx.saved_tensors
        zeros = grad_values.new_zeros(ctx.size)
        return zeros.scatter(ctx.dim, places, grad_values), None


class Clone(Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.clone()


class AddOne(Function):
    @staticmethod
    def forward(ctx, x):
        return x + 1

    @staticmethod
    def backward(ctx, grad):
        return grad


class Round(Function):
    """The true derivative of rounding, which is 0."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, grad):
        return torch.zeros_like(grad)


class Split(Function):
    """Two outputs, either of which may be unused."""

    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        return x.square(), x.sin()

    @staticmethod
    def backward(ctx, first, second):
        (x,) = ctx.saved_tensors
        grad = None
        if first is not None:
            grad = 2 * x * first
        if second is not None:
            part = x.cos() * second
            grad = part if grad is None else grad + part
        return grad


# ---------------------------------------------------------------- random numbers


class Dropout(Function):
    @staticmethod
    def forward(ctx, x, p, training):
        if not training:
            ctx.scale = None
            return x.clone()
        scale = torch.empty_like(x).bernoulli_(1 - p) / (1 - p)
        ctx.scale = scale
        return x * scale

    @staticmethod
    def backward(ctx, grad):
        return grad if ctx.scale is None else grad * ctx.scale, None, None


def reparametrised(mean: Tensor, log_std: Tensor) -> Tensor:
    return mean + log_std.exp() * torch.randn_like(mean)


# ---------------------------------------------------------------- recomputation


class Checkpointed(nn.Module):
    """Its first half is recomputed in the backward."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.last = nn.Linear(6, 2)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.first, x, use_reentrant=self.use_reentrant)
        return self.last(hidden)


class CheckpointFunction(Function):
    """A hand-written checkpoint: parameters get their gradients by accumulation."""

    @staticmethod
    def forward(ctx, run, x):
        ctx.run = run
        ctx.save_for_backward(x)
        with torch.no_grad():
            return run(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.run(x)
        torch.autograd.backward(y, grad)
        return None, x.grad


class OwnCheckpoint(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        # Tied to x * 1: it must require grad for the parameters to be reached.
        return CheckpointFunction.apply(self.body, x * 1)


def gradients(y: Tensor, tensors: list[Tensor], grad: Tensor) -> list[Tensor | None]:
    """The gradients of those that require one, None for frozen ones."""
    wanted = [t for t in tensors if t.requires_grad]
    grads = iter(torch.autograd.grad(y, wanted, grad))
    return [next(grads) if t.requires_grad else None for t in tensors]


class ReversibleFunction(Function):
    """y1 = x1 + f(x2), y2 = x2 + g(y1); inputs are rebuilt from outputs."""

    @staticmethod
    def forward(ctx, x, f, g, *parameters):
        ctx.f, ctx.g = f, g
        ctx.half = len(parameters) // 2
        x1, x2 = x.chunk(2, -1)
        with torch.no_grad():
            y1 = x1 + f(x2)
            y2 = x2 + g(y1)
        y = torch.cat([y1, y2], -1)
        ctx.save_for_backward(y, *parameters)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        y, *parameters = ctx.saved_tensors
        y1, y2 = (t.detach() for t in y.chunk(2, -1))
        dy1, dy2 = dy.chunk(2, -1)
        half = ctx.half
        with torch.enable_grad():
            y1.requires_grad_()
            out = ctx.g(y1)
        d1, *dg = gradients(out, [y1, *parameters[half:]], dy2)
        dy1 = dy1 + d1
        x2 = (y2 - out).detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.f(x2)
        d2, *df = gradients(out, [x2, *parameters[:half]], dy1)
        return torch.cat([dy1, dy2 + d2], -1), None, None, *df, *dg


class Reversible(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
        self.g = nn.Sequential(nn.Linear(3, 3), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        parameters = *self.f.parameters(), *self.g.parameters()
        return ReversibleFunction.apply(x, self.f, self.g, *parameters)


class FixedPoint(Function):
    """z = tanh(z W + x) solved by iteration, differentiated implicitly."""

    @staticmethod
    def forward(ctx, x, W):
        z = torch.zeros_like(x)
        for _ in range(200):
            z = torch.tanh(z @ W + x)
        ctx.save_for_backward(z, W)
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        z, W = ctx.saved_tensors
        slope = 1 - z * z
        u = torch.zeros_like(g)
        for _ in range(200):
            u = slope * (g + u @ W.t())
        need_x, need_w = ctx.needs_input_grad
        return u if need_x else None, z.flatten(0, -2).t() @ u.flatten(
            0, -2
        ) if need_w else None


# ---------------------------------------------------------------- custom operators


@torch.library.custom_op("torchbp_tests::scaled_sine", mutates_args=())
def scaled_sine(x: Tensor, scale: float) -> Tensor:
    return (scale * x).sin()


@scaled_sine.register_fake
def _(x, scale):
    return torch.empty_like(x)


def _scaled_sine_setup(ctx, inputs, output):
    x, ctx.scale = inputs
    ctx.save_for_backward(x)


def _scaled_sine_backward(ctx, grad):
    (x,) = ctx.saved_tensors
    return grad * ctx.scale * (ctx.scale * x).cos(), None


scaled_sine.register_autograd(_scaled_sine_backward, setup_context=_scaled_sine_setup)


@torch.library.custom_op("torchbp_tests::row_softmax", mutates_args=())
def row_softmax(x: Tensor) -> Tensor:
    return x.softmax(-1)


@row_softmax.register_fake
def _(x):
    return torch.empty_like(x)


def _row_softmax_setup(ctx, inputs, output):
    ctx.save_for_backward(output)


def _row_softmax_backward(ctx, grad):
    (y,) = ctx.saved_tensors
    return y * (grad - (grad * y).sum(-1, keepdim=True))


row_softmax.register_autograd(_row_softmax_backward, setup_context=_row_softmax_setup)


# ---------------------------------------------------------------- compositions


def spectrum(x: Tensor) -> Tensor:
    """Complex numbers inside, real ones outside."""
    return torch.fft.rfft(x).abs().square()


def filtered(x: Tensor, gain: Tensor) -> Tensor:
    return torch.fft.irfft(torch.fft.rfft(x) * gain, n=x.shape[-1])


def rotated(x: Tensor) -> Tensor:
    """Rotary position embedding by complex multiplication."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    angle = torch.arange(pairs.shape[-2], dtype=x.dtype, device=x.device)[:, None]
    turns = torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(pairs * turns).flatten(-2)


def forces(positions: Tensor) -> Tensor:
    """The negative gradient of an energy: it differentiates inside."""
    x = positions if positions.requires_grad else positions.detach().requires_grad_()
    energy = (x[:, None] - x).square().sum(-1).neg().exp().sum()
    return -torch.autograd.grad(energy, x, create_graph=True)[0]


def scattered(src: Tensor, index: Tensor) -> Tensor:
    return torch.zeros_like(src).scatter_add(1, index, src)


def soft_tree(x: Tensor) -> Tensor:
    left = x.sigmoid()
    return torch.stack([left, 1 - left], -1).cumprod(1).log()


class Tied(nn.Module):
    """One weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(randn(5, 4, seed=31) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.weight).tanh(), self.weight.t())


class GRU(nn.Module):
    """A cell over several steps, from zeros that it makes itself."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 3)

    def forward(self, steps: Tensor) -> Tensor:
        h = steps.new_zeros(steps.shape[1], 3)
        for x in steps:
            h = self.cell(x, h)
        return h


class MixtureOfExperts(nn.Module):
    """Top-1 routing, with the gate's own weight on what the expert returns."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.gate(x).softmax(-1).max(-1)
        result = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            rows = (chosen == k).nonzero()[:, 0]
            result = result.index_add(0, rows, expert(x[rows]))
        return weight[:, None] * result


def seeded(module: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(7)
        return module()


X = randn(3, 4, seed=1)
POSITIVE = X.abs() + 0.2
LABELS = torch.tensor([0, 3, 1])
SPD = randn(3, 3, seed=2) @ randn(3, 3, seed=2).t() + 2 * torch.eye(3)

RIGHT_CODE: dict[str, Piece] = {
    "LayerNorm": Piece(LayerNorm.apply, (X, randn(4), randn(4, seed=3), 1e-5)),
    "layer norm of torch": Piece(nn.LayerNorm(4), (X,)),
    "RMSNorm in float32": Piece(RMSNorm(4), (X,)),
    "RMSNorm in float32 by hand": Piece(RMSNormFunction.apply, (X, randn(4))),
    "batch norm": Piece(nn.BatchNorm1d(4), (X,)),
    "group norm": Piece(nn.GroupNorm(2, 4), (randn(2, 4, 3),)),
    "normalised rows": Piece(l2_normalised, (X,)),
    "swish": Piece(Swish.apply, (X,), {"reference": F.silu}),
    "mish": Piece(Mish.apply, (X,), {"reference": F.mish}),
    "leaky ReLU in place": Piece(LeakyReLUInPlace.apply, (X, 0.1)),
    "module ReLU in place": Piece(nn.ReLU(inplace=True), (X,)),
    "saved exponential": Piece(SafeExp.apply, (X,)),
    "GEGLU": Piece(geglu, (X,)),
    "product": Piece(MatMul.apply, (X, randn(2, 4))),
    "convolution by hand": Piece(
        ConvolutionByHand.apply, (randn(2, 2, 4, 4), randn(3, 2, 3, 3))
    ),
    "convolution in 1-D": Piece(seeded(lambda: nn.Conv1d(2, 3, 2)), (randn(2, 2, 5),)),
    "transposed convolution": Piece(
        F.conv_transpose1d, (randn(1, 2, 4), randn(2, 3, 2))
    ),
    "causal attention": Piece(causal_attention, tuple(randn(2, 3, 4, seed=k)
                                                      for k in range(3))),
    "multi-head attention": Piece(
        seeded(lambda: nn.MultiheadAttention(4, 2, batch_first=True)),
        (randn(2, 3, 4),) * 3,
    ),
    "einsum": Piece(lambda a, b: torch.einsum("bij,bjk->bik", a, b),
                    (randn(2, 3, 2), randn(2, 2, 3))),
    "bilinear": Piece(lambda a, W, b: torch.einsum("bi,oij,bj->bo", a, W, b),
                      (X, randn(2, 4, 3), randn(3, 3))),
    "inverse": Piece(SymmetricInverse.apply, (SPD,)),
    "solve": Piece(torch.linalg.solve, (SPD, randn(3, 2))),
    "cholesky of AAᵀ": Piece(
        lambda a: torch.linalg.cholesky(a @ a.mT + torch.eye(3).to(a)), (randn(3, 3),)
    ),
    "cross entropy": Piece(F.cross_entropy, (X, LABELS)),
    "cross entropy that ignores": Piece(
        lambda x, y: F.cross_entropy(x, y, ignore_index=-100),
        (X, torch.tensor([0, -100, 1])),
    ),
    "fused cross entropy": Piece(FusedCrossEntropy.apply, (X, LABELS)),
    "KL of a Gaussian": Piece(kl_divergence, (0.01 * X, 0.01 * randn(3, 4))),
    "KL near 0": Piece(
        kl_near_zero, (0.01 * X, (0.01 * X + 1e-3 * randn(3, 4)).softmax(-1))
    ),
    "binary cross entropy": Piece(
        F.binary_cross_entropy_with_logits, (X, (randn(3, 4, seed=5) > 0).float())
    ),
    "Huber loss": Piece(F.huber_loss, (X, randn(3, 4, seed=6))),
    "triplet loss": Piece(F.triplet_margin_loss, (X, 0.9 * X, randn(3, 4, seed=7))),
    "contrastive loss": Piece(contrastive, (X, randn(3, 4, seed=8))),
    "Dice loss": Piece(Dice(), (X, (randn(3, 4, seed=9) > 0).float())),
    "embedding": Piece(lambda i, w: F.embedding(i, w),
                       (torch.tensor([[0, 2], [1, 2]]), X)),
    "embedding bag": Piece(
        seeded(lambda: nn.EmbeddingBag(5, 3, mode="sum")),
        (torch.tensor([[0, 2, 4], [1, 2, 2]]),),
    ),
    "gather": Piece(Gather.apply, (X, torch.tensor([2, 0, 2, 1]))),
    "forces": Piece(forces, (X,)),
    "values, indices and a mask": Piece(lambda x: (*x.max(-1), x > 0), (X,)),
    "a number in float64, a vector in float32": Piece(
        lambda t: t * torch.arange(3.0), (torch.tensor(0.5),)
    ),
    "scatter": Piece(scattered, (X, torch.tensor([[0, 1, 1, 3]] * 3))),
    "maximum and its place": Piece(MaxOver.apply, (X, 1)),
    "top k": Piece(lambda x: x.topk(2)[0], (X,)),
    "cumulative sum": Piece(lambda x: x.cumsum(-1), (X,)),
    "cumulative product": Piece(soft_tree, (X,)),
    "logsumexp": Piece(lambda x: x.logsumexp(-1), (X,)),
    "clone": Piece(Clone.apply, (X,)),
    "x + 1": Piece(AddOne.apply, (X,)),
    "round": Piece(Round.apply, (X,)),
    "round of torch": Piece(torch.round, (X,)),
    "sign of torch": Piece(torch.sign, (X,)),
    "absolute value": Piece(torch.abs, (X,)),
    "outputs unused": Piece(Split.apply, (X,)),
    "square root": Piece(torch.sqrt, (POSITIVE,)),
    "norm": Piece(lambda x: x.norm(dim=-1), (X,)),
    # torch.func.jacrev of cdist is wrong on the CPU.
    "pairwise distances": Piece(
        torch.cdist, (X, randn(2, 4, seed=4)), {"skip": ("jacrev",)}
    ),
    "max pooling": Piece(nn.MaxPool2d(2), (randn(1, 2, 4, 4),)),
    "interpolation": Piece(
        lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
        (randn(1, 2, 3, 3),),
    ),
    "unfold": Piece(lambda x: F.unfold(x, 2), (randn(1, 2, 3, 3),)),
    "spectrum": Piece(spectrum, (X,)),
    # The FFT of torch 2.8 takes no gradient of stride 0.
    "filter": Piece(
        filtered, (X, randn(3).abs() + 0.1), {"skip": ("output-gradients",)}
    ),
    "rotary embedding": Piece(rotated, (randn(2, 3, 4),)),
    "dropout": Piece(Dropout.apply, (X, 0.5, True)),
    "module dropout": Piece(nn.Sequential(nn.Dropout(0.5), nn.Tanh()), (X,)),
    "reparametrised sample": Piece(reparametrised, (X, 0.1 * randn(3, 4))),
    "Gumbel softmax": Piece(lambda x: F.gumbel_softmax(x, 0.8), (X,)),
    "GRUCell": Piece(seeded(lambda: nn.GRUCell(4, 3)), (X, randn(3, 3))),
    "GRU over steps": Piece(seeded(GRU), (randn(3, 2, 4),)),
    "LSTM": Piece(seeded(lambda: nn.LSTM(4, 2)), (randn(3, 2, 4),)),
    "tied weights": Piece(Tied(), (X,)),
    "mixture of experts": Piece(seeded(MixtureOfExperts), (X,)),
    "transformer layer": Piece(
        seeded(lambda: nn.TransformerEncoderLayer(4, 2, 8, 0.0, batch_first=True)),
        (randn(2, 3, 4),),
    ),
    # The second derivatives of torch's own weight norm are wrong on the CPU, which
    # gradgradcheck sees, too.
    "weight norm": Piece(
        seeded(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))),
        (X,),
        {"skip": ("second-derivatives",)},
    ),
    "checkpoint": Piece(seeded(lambda: Checkpointed(False)), (X,)),
    "reentrant checkpoint": Piece(
        seeded(lambda: Checkpointed(True)), (X.clone().requires_grad_(),)
    ),
    "checkpoint of one's own": Piece(seeded(OwnCheckpoint), (X,)),
    "reversible block": Piece(seeded(Reversible), (randn(2, 6),)),
    "fixed point": Piece(FixedPoint.apply, (X, randn(4, 4) / 8)),
    "custom operator": Piece(scaled_sine, (X, 1.5)),
    "custom operator that saves its output": Piece(row_softmax, (X,)),
    "xlogy": Piece(torch.special.xlogy, (POSITIVE, POSITIVE.flip(0))),
    "log gamma": Piece(torch.lgamma, (POSITIVE,)),
    "where": Piece(lambda x: torch.where(x > 0, x.square(), x.exp()), (X,)),
    "masked mean": Piece(
        lambda x, m: (x * m).sum(-1) / m.sum(-1).clamp(min=1),
        (X, torch.tensor([[1.0, 1, 0, 0]] * 3).requires_grad_(False)),
    ),
    "labels in float64": Piece(F.mse_loss, (X.double(), randn(3, 4).double())),
    "bfloat16 weights": Piece(F.linear, (X.bfloat16(), randn(2, 4).bfloat16())),
}  # fmt: skip
