"""Check every hand-written gradient against native autograd and finite differences.

    python experiments/gradcheck.py                       a table with a verdict a line
    python experiments/gradcheck.py --device cuda         on another device
    python experiments/gradcheck.py --seed 1              with other numbers

Columns: max abs is the largest difference from native PyTorch in the value and in any
gradient; rel is that over the largest entry of native's; numeric is rel with central
differences instead of native (in float64 only: in shorter types their own error would
hide ours).

Exit status: 0 all pass, 1 a check failed, 2 bad arguments or no such device.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # to find experiments and torchbp

import torchbp
from experiments.support.options import (
    check_choices,
    check_seed,
    option,
    run_experiment,
)
from torchbp import costs, functional
from torchbp._numeric import central_difference
from torchbp.nn import ACTIVATIONS
from torchbp.training import choose_device

Operation = Callable[..., Tensor]
Pair = tuple[Operation, Operation]  # ours and native PyTorch's

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Ours and native run the same products of matrices and differ by a few roundings of
# each entry. In float64 and float32 16 units in the last place of the largest entry
# (2e-6) reveal every wrong factor, in bfloat16 (0.13) and float16 (0.02) gross errors.
ROUNDINGS = 16
# With ε = 1e-6 central differences err by ε² = 1e-12 from curvature, and from rounding
# by 2e-10 of Σ g f, which can be 100 times the largest gradient.
EPSILON, NUMERIC_TOLERANCE = 1e-6, 1e-6
SAMPLE = 50  # entries of each argument, about, at which differences are taken
KINK = 1e-4  # the smallest |z|: across ReLU's kink differences are meaningless

# rows (the dimensions before the last), n_in, n_out
LAYER_SHAPES = (((), 3, 2), ((7,), 13, 5), ((2, 3), 4, 3), ((10,), 784, 30))
COST_SHAPES = ((5,), (7, 10), (2, 3, 4))


def silu_prime(z: Tensor) -> Tensor:
    """Return the derivative of z σ(z)."""
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


_Arsinh = torchbp.define_layer("arsinh", torch.asinh, lambda a: 1 / torch.cosh(a))
_SiLU = torchbp.define_layer("silu", F.silu, silu_prime, saves="z")


def layer_pair(layer: type[torchbp.BPLinear], sigma: Operation) -> Pair:
    """Return the layer class, and native PyTorch's, as functions of x, W and b."""
    return (
        lambda x, W, b: functional.layer(layer.function, x, W, b),
        lambda x, W, b: sigma(F.linear(x, W, b)),
    )


def cost_pair(cost: Any) -> Pair:
    """Return the cost class, and its native counterpart under A1: divided by the number
    of rows, not of entries."""
    native = cost.native(reduction="sum")

    def loss(v: Tensor, y: Tensor) -> Tensor:
        rows = v.reshape(-1, v.shape[-1])
        summed: Tensor = native(rows, y.reshape(rows.shape))
        return cost.scale * summed / len(rows)

    return cost(), loss


LAYERS: dict[str, Pair] = {
    name: layer_pair(layer, layer.native() if layer.native else lambda z: z)
    for name, layer in ACTIVATIONS.items()
}
LAYERS["arsinh, from a"] = layer_pair(_Arsinh, torch.asinh)
LAYERS["silu, from z"] = layer_pair(_SiLU, F.silu)
COSTS = {name: cost_pair(cost) for name, cost in costs.COSTS.items()}


@dataclass(frozen=True)
class GradcheckSettings:
    """The numbers and the device of the checks.

    Attributes:
        device: "auto" for CUDA if available.
        seed: of the random numbers.
    """

    device: str = option(
        "auto", "auto: CUDA if available", ("auto", "cpu", "cuda", "mps")
    )
    seed: int = option(0, "seed of the random numbers")

    def __post_init__(self) -> None:
        check_choices(self)
        check_seed(self.seed)


@dataclass(frozen=True)
class GradientCheck:
    """One line of the table; the errors are the largest over value and gradients.

    Attributes:
        name: of the layer or cost.
        shape: of its inputs.
        dtype: of its inputs.
        max_abs: largest difference from native.
        max_rel: the same over the largest entry.
        numeric: relative difference from central differences; None if not taken.
        tolerance: for `max_rel`.
    """

    name: str
    shape: str
    dtype: torch.dtype
    max_abs: float
    max_rel: float
    numeric: float | None
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether both errors are within their tolerances."""
        # NaN is not <= anything, so it fails.
        is_numeric_ok = self.numeric is None or self.numeric <= NUMERIC_TOLERANCE
        return self.max_rel <= self.tolerance and is_numeric_ok

    def __str__(self) -> str:
        numeric = "-" if self.numeric is None else f"{self.numeric:.1e}"
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.name:<18} {self.shape:<14} {dtype:<9} {self.max_abs:>8.1e} "
            f"{self.max_rel:>8.1e} {numeric:>8}  {'ok' if self.ok else 'FAILED'}"
        )


HEADER = (
    f"{'layer or cost':<18} {'shape':<14} {'dtype':<9} {'max abs':>8} {'rel':>8} "
    f"{'numeric':>8}  verdict"
)


def main(settings: GradcheckSettings) -> list[GradientCheck]:
    """Check every layer and cost in every shape and dtype.

    Args:
        settings: the numbers and the device.

    Raises:
        ValueError: the device is not available.
    """
    device = choose_device(settings.device)
    generator = torch.Generator("cpu").manual_seed(settings.seed)
    # MPS has no float64.
    dtypes = [t for t in DTYPES if device.type != "mps" or t != torch.float64]
    rows = []
    for dtype in dtypes:
        for name, pair in LAYERS.items():
            for lead, n_in, n_out in LAYER_SHAPES:
                arguments = draw_layer(generator, lead, n_in, n_out)
                shape = f"{_times((*lead, n_in))} -> {n_out}"
                rows.append(check(name, shape, pair, arguments, (), dtype, device))
        for name, pair in COSTS.items():
            for size in COST_SHAPES:
                output, target = draw_cost(generator, size)
                checked = check(
                    name, _times(size), pair, [output], [target], dtype, device
                )
                rows.append(checked)
    return rows


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def draw_layer(
    generator: torch.Generator, lead: tuple[int, ...], n_in: int, n_out: int
) -> list[Tensor]:
    """Return x, W and b with z of order 1 and no |z| below KINK."""
    while True:
        x = _normal(generator, *lead, n_in)
        W = _normal(generator, n_out, n_in) / n_in**0.5
        b = _normal(generator, n_out)
        if (F.linear(x, W, b).abs() > KINK).all():
            return [x, W, b]


def draw_cost(
    generator: torch.Generator, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Return outputs, and targets that every cost accepts: rows that sum to 1."""
    return _normal(generator, *shape), _normal(generator, *shape).softmax(-1)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")


def check(
    name: str,
    shape: str,
    pair: Pair,
    arguments: Sequence[Tensor],
    constants: Sequence[Tensor],
    dtype: torch.dtype,
    device: torch.device,
) -> GradientCheck:
    """Compare ours with native, and in float64 with central differences.

    Args:
        name: of the layer or cost.
        shape: of the inputs, for the table.
        pair: ours and native's function.
        arguments: what both are differentiated with respect to.
        constants: their further arguments.
        dtype: of all.
        device: of all.
    """
    ours, native = pair
    arguments, constants = (
        [t.to(device, dtype) for t in group] for group in (arguments, constants)
    )
    leaves = [t.requires_grad_() for t in arguments]
    value, expected = ours(*leaves, *constants), native(*leaves, *constants)
    tolerance = ROUNDINGS * torch.finfo(dtype).eps
    if value.shape != expected.shape:
        return GradientCheck(name, shape, dtype, math.nan, math.nan, None, tolerance)
    # Not ones: a gradient of 1 everywhere would hide a sum over the wrong dimension.
    g = torch.linspace(
        -1, 1.5, max(1, value.numel()), dtype=torch.float64, device="cpu"
    )
    g = g.reshape(value.shape).to(device, dtype)
    grads = torch.autograd.grad(value, leaves, g)
    references = torch.autograd.grad(expected, leaves, g)
    pairs = list(zip((value, *grads), (expected, *references), strict=True))
    numeric = None
    if dtype == torch.float64:
        numeric = against_differences(ours, leaves, constants, g, grads)
    return GradientCheck(
        name,
        shape,
        dtype,
        _largest([_difference(*both) for both in pairs]),
        _largest([_relative(*both) for both in pairs]),
        numeric,
        tolerance,
    )


def _largest(errors: list[float]) -> float:
    """Return the maximum, or NaN if any number is NaN."""
    return torch.tensor(errors, dtype=torch.float64, device="cpu").amax().item()


def _difference(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference of two entries, in float64."""
    return (actual.detach().double() - expected.detach().double()).abs().amax().item()


def _relative(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference of two entries over the largest entry expected."""
    scale = expected.detach().double().abs().amax().item()
    error = _difference(actual, expected)
    return error / scale if scale else (0.0 if error == 0 else math.inf)


def against_differences(
    f: Operation,
    leaves: Sequence[Tensor],
    constants: Sequence[Tensor],
    g: Tensor,
    grads: Sequence[Tensor],
) -> float:
    """Return the largest error of the gradients of Σ g f, relative to each gradient's
    largest entry, at about SAMPLE entries of each argument."""
    arguments = [t.detach().clone() for t in leaves]

    def weighted_sum() -> float:
        return (f(*arguments, *constants) * g).sum().item()

    errors = []
    for argument, grad in zip(arguments, grads, strict=True):
        flat, slopes = argument.view(-1), grad.reshape(-1)
        for i in range(0, flat.numel(), max(1, flat.numel() // SAMPLE)):
            slope = difference_at(weighted_sum, flat, i)
            # A gradient of zeros, as behind ReLU, has no size to compare with.
            scale = max(1e-3, grad.abs().amax().item())
            errors.append(abs(slopes[i].item() - slope) / scale)
    return _largest(errors)


def difference_at(f: Callable[[], float], flat: Tensor, i: int) -> float:
    """Return ∂f/∂flat[i] by a central difference; `flat` is restored."""
    value = flat[i].item()

    def moved(distance: float) -> float:
        flat[i] = value + distance
        return f()

    slope = central_difference(moved, EPSILON)
    flat[i] = value
    return slope


def print_table(rows: list[GradientCheck]) -> int:
    """Print the table; return 1 if a check failed, else 0."""
    print(HEADER)
    for row in rows:
        print(row)
    failed = sum(not row.ok for row in rows)
    print(f"\n{len(rows) - failed} of {len(rows)} checks passed")
    return 1 if failed else 0


def command_line(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status.

    Args:
        arguments: of the command line; those of the process if None.
    """
    return run_experiment(main, GradcheckSettings, __doc__, arguments, print_table)


if __name__ == "__main__":
    sys.exit(command_line())
