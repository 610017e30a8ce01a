"""What several test modules share: the layers and costs under test, each beside its
native counterpart, their arguments, and the checks that every layer must pass.

The checks are functions, so that the mutation tests can run the very same ones on wrong
layers and see them fail.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import bounds
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import torchbp
from torchbp import functional
from torchbp.nn import ACTIVATIONS

F64 = torch.float64
has_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "c++", "clang++")))
    or os.environ.get("ATEN_CPU_CAPABILITY") == "default",
    reason="needs a C++ compiler, and torch.compile's inductor vectors to write in it",
)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# ---------------------------------------------------------------- layers and costs


def silu_slope(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


Bipolar = torchbp.define_layer(
    "Bipolar", lambda z: torch.tanh(z / 2), lambda a: (1 - a * a) / 2
)
SiLU = torchbp.define_layer("SiLU", F.silu, silu_slope, saves="z")
Square = torchbp.define_layer("Square", torch.square, lambda z: 2 * z, saves="z")
LogCosh = torchbp.define_cost(
    "LogCosh",
    lambda a, y: torch.log(torch.cosh(a - y)).sum(-1),
    lambda a, y: torch.tanh(a - y),
)


@dataclass(frozen=True)
class Layer:
    """A layer class, the native σ beside it, and what `bounds.layer` asks of σ'."""

    module: type[torchbp.BPLinear]
    sigma: Callable[[Tensor], Tensor]
    has_kink: bool = False
    # Sizes, by z, of the terms that σ' is made of, where they are larger than σ' is.
    terms: Callable[[Tensor], Tensor] | None = None

    @property
    def function(self) -> type[functional.LinearFunction]:
        return self.module.function

    def __call__(self, x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
        return functional.layer(self.function, x, W, b)

    def native(self, x: Tensor, W: Tensor, b: Tensor | None = None) -> Tensor:
        return self.sigma(F.linear(x, W, b))

    def slope(self, z: Tensor) -> Tensor:
        """σ'(z) by native autograd."""
        z = z.detach().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(self.sigma(z).sum(), z)
        return slope

    def slope_terms(self, z: Tensor) -> Tensor:
        """The size of the largest term that σ'(z) is made of."""
        slope = self.slope(z).abs()
        return slope if self.terms is None else torch.maximum(self.terms(z), slope)


LAYERS = {
    "linear": Layer(torchbp.BPLinear, lambda z: z),
    "sigmoid": Layer(torchbp.BPLinearSigmoid, torch.sigmoid, terms=torch.sigmoid),
    "tanh": Layer(torchbp.BPLinearTanh, torch.tanh, terms=lambda z: z.tanh().square()),
    "relu": Layer(torchbp.BPLinearReLU, torch.relu, has_kink=True),
    "softplus": Layer(torchbp.BPLinearSoftplus, F.softplus),
    "bipolar (a)": Layer(
        Bipolar, lambda z: torch.tanh(z / 2), terms=lambda z: torch.full_like(z, 0.5)
    ),
    "silu (z)": Layer(SiLU, F.silu, terms=lambda z: torch.sigmoid(z) * (1 + z.abs())),
    "square (z)": Layer(Square, torch.square),
}
BUILT_IN = [
    name for name, layer in LAYERS.items() if layer.module in ACTIVATIONS.values()
]
all_layers = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())


@dataclass(frozen=True)
class Cost:
    """A cost class and the native expression of the same cost, for float targets."""

    module: type[torch.nn.Module]
    native: Callable[[Tensor, Tensor], Tensor]
    is_distribution: bool = False  # whether target rows sum to 1

    def __call__(self, v: Tensor, y: Tensor) -> Tensor:
        return self.module()(v, y)


def _mean(summed: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A native loss divided by the number of rows, as A1 has it: reduction="mean" would
    divide the elementwise losses by the number of outputs, too."""

    def cost(v: Tensor, y: Tensor) -> Tensor:
        rows = v.reshape(v.shape[:-1].numel(), v.shape[-1])
        return summed(rows, y.reshape(rows.shape), reduction="sum") / len(rows)

    return cost


COSTS = {
    "quadratic": Cost(torchbp.QuadraticCost, lambda v, y: _mean(F.mse_loss)(v, y) / 2),
    "cross-entropy": Cost(
        torchbp.CrossEntropyCost, _mean(F.binary_cross_entropy_with_logits)
    ),
    "log-likelihood": Cost(
        torchbp.LogLikelihoodCost, _mean(F.cross_entropy), is_distribution=True
    ),
    "log-cosh (defined)": Cost(
        LogCosh, lambda v, y: (v - y).cosh().log().sum(-1).mean()
    ),
}
all_costs = pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS.keys())


# ---------------------------------------------------------------- arguments


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=F64).to(dtype)


def operands(
    layer: Layer,
    rows: tuple[int, ...] = (3,),
    n_in: int = 5,
    n_out: int = 2,
    bias: bool = True,
    dtype: torch.dtype = F64,
    seed: int = 0,
) -> tuple[Tensor, ...]:
    """x, W and, with `bias`, b, all requiring grad; no z near a kink of σ, where finite
    differences mean nothing."""
    while True:
        x = rand(*rows, n_in, seed=seed, dtype=dtype)
        W = rand(n_out, n_in, seed=seed + 1, dtype=dtype)
        b = rand(n_out, seed=seed + 2, dtype=dtype)
        z = F.linear(x.double(), W.double(), b.double() if bias else None)
        if not layer.has_kink or not (z.abs() < 1e-2).any() or 0 in (n_in, n_out):
            break
        seed += 100
    chosen = (x, W, b) if bias else (x, W)
    return tuple(t.requires_grad_() for t in chosen)


def target_for(cost: Cost, *shape: int, seed: int = 1, dtype: torch.dtype = F64):
    """Rows between 0 and 1; where the cost wants them, distributions."""
    y = torch.sigmoid(rand(*shape, seed=seed))
    return (y / y.sum(-1, keepdim=True) if cost.is_distribution else y).to(dtype)


# Other places in memory, for the same numbers (but "stride 0", which repeats a row).
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "strided": lambda t: torch.stack([t, t + 1], -1).flatten(-2)[..., ::2],
    "narrow": lambda t: torch.cat([t, t, t], -1).narrow(-1, t.shape[-1], t.shape[-1]),
    "stride 0": lambda t: t[:1].expand_as(t),
}


# ---------------------------------------------------------------- the checks


def assert_raises_one_line(kind, parts, f, *args: Any, **kwargs: Any) -> None:
    """f raises `kind` with one line that has the `parts` in their order."""
    with pytest.raises(kind) as caught:
        f(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    position = 0
    for part in parts:
        position = message.find(part, position)
        assert position >= 0, f"{part!r} missing, or out of order, in: {message}"


def without_warnings(check: Callable[..., bool], *args: Any, **kwargs: Any) -> None:
    """torch warns of its own use of torch.jit.script when forward AD starts."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.script", FutureWarning)
        assert check(*args, **kwargs)


def check_first(f: Callable[..., Tensor], *args: Tensor) -> None:
    """Gradients against finite differences, in reverse, batched and forward mode."""
    modes = {"check_batched_grad": True, "check_forward_ad": True}
    modes["check_batched_forward_grad"] = True
    without_warnings(gradcheck, f, args, **modes, **bounds.difference())


def check_second(f: Callable[..., Tensor], *args: Tensor) -> None:
    """Second derivatives likewise; torch draws random output gradients."""
    modes = {"check_batched_grad": True, "check_fwd_over_rev": True}
    without_warnings(gradgradcheck, f, args, **modes, **bounds.difference())


def raw_gradients(y: Tensor, g: Tensor) -> tuple[Tensor | None, ...]:
    """What a layer's backward itself returns, before the engine puts it right: the
    engine sums a gradient of a broadcast shape silently."""
    has_z = issubclass(y.grad_fn._forward_cls, functional.LayerFromWeightedInput)
    return y.grad_fn.apply(g, torch.zeros_like(g)) if has_z else y.grad_fn.apply(g)


def check_raw_shapes(f: Callable[..., Tensor], *args: Tensor) -> None:
    """Each gradient has its argument's shape before anyone sums or casts it."""
    y = f(*args)
    grads = raw_gradients(y, rand(*y.shape, seed=9, dtype=y.dtype))
    for grad, t in zip(grads, args, strict=False):
        assert grad.shape == t.shape
        assert grad.dtype == t.dtype


def check_native(
    f: Callable[..., Tensor], native: Callable[..., Tensor], *args: Tensor
):
    """Value and gradients equal native autograd's to rounding, in float64."""
    y, expected = f(*args), native(*args)
    torch.testing.assert_close(y, expected, **bounds.near())
    g = rand(*y.shape, seed=9)
    torch.testing.assert_close(
        torch.autograd.grad(y, args, g),
        torch.autograd.grad(expected, args, g),
        **bounds.near(),
    )


def check_untouched(f: Callable[..., Tensor], *args: Tensor) -> None:
    """Neither arguments nor the output's gradient are written to."""
    before = [t.detach().clone() for t in args]
    y = f(*args)
    g = rand(*y.shape, seed=9)
    value, sent = y.detach().clone(), g.clone()
    torch.autograd.grad(y, args, g)
    assert torch.equal(g, sent) and torch.equal(y, value)
    assert all(torch.equal(t, u) for t, u in zip(args, before, strict=True))
