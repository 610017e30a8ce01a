"""Check every hand-written gradient against native autograd and finite differences.

    python experiments/gradcheck.py                       a table, a verdict a line
    python experiments/gradcheck.py --device cuda         on another device
    python experiments/gradcheck.py --seed 1              with other numbers

Columns: max abs is the largest difference from native PyTorch in the value and in any
gradient, rel is that over the largest entry of what it is compared with, and numeric
is rel against central finite differences (in float64 only: in shorter types their own
error would hide ours).

Exit status: 0 all pass, 1 a check failed, 2 bad arguments or no such device.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import torchbp
from torchbp import costs, functional
from torchbp._terminal import Parser
from torchbp.nn import ACTIVATIONS
from torchbp.training import choose_device

Operation = Callable[..., Tensor]
Pair = tuple[Operation, Operation]  # ours and native PyTorch's

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Against native: both sides run the same products of matrices and part by a handful of
# roundings an entry; up to 4 ε of the largest entry were seen. In float64 and float32
# 16 ε (2e-6) sees every wrong factor, in bfloat16 (0.13) and float16 (0.02) gross ones.
ROUNDINGS = 16
# Central differences with a step of 1e-6 err by step² = 1e-12 from curvature, and from
# rounding by ε/step = 2e-10 of Σ g f, which can be 100 times the largest gradient.
STEP, NUMERIC_TOLERANCE = 1e-6, 1e-6
SAMPLED = 50  # finite differences are taken at about so many entries of each argument
KINK = 1e-4  # no |z| below: across ReLU's kink they mean nothing

# rows (the dimensions before the last), n_in, n_out
LAYER_SHAPES = (((), 3, 2), ((7,), 13, 5), ((2, 3), 4, 3), ((10,), 784, 30))
COST_SHAPES = ((5,), (7, 10), (2, 3, 4))


def silu_prime(z: Tensor) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


_Arsinh = torchbp.define_layer("arsinh", torch.asinh, lambda a: 1 / torch.cosh(a))
_SiLU = torchbp.define_layer("silu", F.silu, silu_prime, saves="z")


def layer_pair(layer: type[torchbp.BPLinear], sigma: Operation) -> Pair:
    """The layer class, and native PyTorch's, as functions of x, W and b."""
    return (
        lambda x, W, b: functional.layer(layer.function, x, W, b),
        lambda x, W, b: sigma(F.linear(x, W, b)),
    )


def cost_pair(cost: Any) -> Pair:
    """The cost class, and its native counterpart under A1: divided by the rows, not by
    the numbers."""
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
class Settings:
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        names = ("auto", "cpu", "cuda", "mps")
        if self.device not in names:
            raise ValueError(
                f"device: expected one of {', '.join(names)}, got {self.device!r}"
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: expected 0 to 2^63 - 1, got {self.seed}")


@dataclass(frozen=True)
class Row:
    """One line of the table; the errors are the largest over value and gradients."""

    name: str
    shape: str
    dtype: torch.dtype
    max_abs: float
    max_rel: float
    numeric: float | None
    tolerance: float

    @property
    def ok(self) -> bool:
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


def main(settings: Settings) -> list[Row]:
    """Every layer and cost in every shape and dtype.

    Raises:
        ValueError: the device is not there.
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
    """x, W and b with z of order 1, none of it next to 0."""
    while True:
        x = _normal(generator, *lead, n_in)
        W = _normal(generator, n_out, n_in) / n_in**0.5
        b = _normal(generator, n_out)
        if (F.linear(x, W, b).abs() > KINK).all():
            return [x, W, b]


def draw_cost(
    generator: torch.Generator, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Outputs, and targets that every cost takes: rows that sum to 1."""
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
) -> Row:
    """Ours against native, and in float64 against finite differences."""
    ours, native = pair
    arguments, constants = (
        [t.to(device, dtype) for t in group] for group in (arguments, constants)
    )
    leaves = [t.requires_grad_() for t in arguments]
    value, expected = ours(*leaves, *constants), native(*leaves, *constants)
    tolerance = ROUNDINGS * torch.finfo(dtype).eps
    if value.shape != expected.shape:
        return Row(name, shape, dtype, math.nan, math.nan, None, tolerance)
    # Not ones: a gradient of 1 everywhere would hide a sum over the wrong axis.
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
    return Row(
        name,
        shape,
        dtype,
        _largest([_difference(*both) for both in pairs]),
        _largest([_relative(*both) for both in pairs]),
        numeric,
        tolerance,
    )


def _largest(errors: list[float]) -> float:
    """The maximum; unlike `max`, NaN wherever there is one."""
    return torch.tensor(errors, dtype=torch.float64, device="cpu").amax().item()


def _difference(actual: Tensor, expected: Tensor) -> float:
    return (actual.detach().double() - expected.detach().double()).abs().amax().item()


def _relative(actual: Tensor, expected: Tensor) -> float:
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
    """The largest error of the gradients of Σ g f, relative to each one's size, at
    about SAMPLED entries of each argument."""
    arguments = [t.detach().clone() for t in leaves]
    errors = []
    for argument, grad in zip(arguments, grads, strict=True):
        flat, slopes = argument.view(-1), grad.reshape(-1)
        step = max(1, flat.numel() // SAMPLED)
        for i in range(0, flat.numel(), step):
            kept, values = flat[i].item(), []
            for nudged in (kept + STEP, kept - STEP):
                flat[i] = nudged
                values.append((f(*arguments, *constants) * g).sum().item())
            flat[i] = kept
            slope = (values[0] - values[1]) / (2 * STEP)
            # A gradient of zeros, as behind ReLU, is compared as it is.
            scale = max(1e-3, grad.abs().amax().item())
            errors.append(abs(slopes[i].item() - slope) / scale)
    return _largest(errors)


def parse(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = Parser(__doc__)
    default = Settings()
    devices = ("auto", "cpu", "cuda", "mps")
    parser.add_argument(
        "--device",
        choices=devices,
        default=default.device,
        help="auto: CUDA if there is one (default auto)",
    )
    parser.add_argument(
        "--seed", type=int, default=default.seed, help="of the numbers (default 0)"
    )
    return vars(parser.parse_args(arguments))


def command_line(arguments: list[str] | None = None) -> int:
    """The thin shell around :func:`main`; returns the exit status."""
    given = parse(arguments)
    try:
        settings = Settings(**given)
        choose_device(settings.device)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = main(settings)
    print(HEADER)
    for row in rows:
        print(row)
    failed = sum(not row.ok for row in rows)
    print(f"\n{len(rows) - failed} of {len(rows)} checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(command_line())
