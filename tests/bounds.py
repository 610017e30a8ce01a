"""Every tolerance of the suite, each with the formula that it follows from.

The model is the standard one of rounding (Higham, Accuracy and Stability of Numerical
Algorithms, chapters 2-4). One operation in a dtype rounds by at most u = eps / 2 of its
result. Where a number is computed in two ways, with k roundings each, the two differ by
at most 2 k u = k eps times the sum of the sizes of the terms: not times the result,
which may be small because the terms cancel. Processors and versions of torch differ in
the order of sums and in how often they round, both of which k counts; so these bounds
hold on all of them. A wrong formula is off by far more.

Plain `assert_close(a, b)` and `approx(b)` have torch's and pytest's own.
`tests/package/test_bounds.py` fails on a number that is a tolerance anywhere else.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

F32, F64 = torch.float32, torch.float64
Tolerance = dict[str, float]  # keyword arguments of assert_close or pytest.approx

# The same operations on the same numbers give the same bits.
EXACT: Tolerance = {"rtol": 0.0, "atol": 0.0}


# ---------------------------------------------------------------- roundings


def eps(dtype: torch.dtype) -> float:
    """The distance from 1 to the next number of `dtype`."""
    return torch.finfo(dtype).eps


def tiny(dtype: torch.dtype) -> float:
    """The smallest normal number: below it there are no relative digits."""
    return torch.finfo(dtype).tiny


def roundings(length: int, dtype: torch.dtype = F64) -> float:
    """The roundings k of a sum of `length` products, in any order.

    At most `length` of them matter to one term. They are of random sign, so that of a
    long sum 6 √length is exceeded with a probability of 2 exp(-6²/2) = 3e-8 (Higham and
    Mary, 2019). torch's kernels accumulate half precision in float32 (at::opmath_type)
    and round once at the end.
    """
    k = min(float(length), 6 * math.sqrt(length))
    return k if eps(dtype) <= eps(F32) else 1 + k * eps(F32) / eps(dtype)


def units(k: float, dtype: torch.dtype = F64, size: Any = 1.0) -> Any:
    """What `k` roundings of terms of `size`, a number or a tensor, come to."""
    return k * eps(dtype) * size + tiny(dtype)


def close(k: float, dtype: torch.dtype = F64, size: float = 1.0) -> Tolerance:
    """For `assert_close`: k roundings of the result, or of terms of `size`."""
    return {"rtol": k * eps(dtype), "atol": float(units(k, dtype, size))}


def approx(tolerance: Tolerance) -> Tolerance:
    """The same for `pytest.approx`, which has other names for it."""
    return {"rel": tolerance["rtol"], "abs": tolerance["atol"]}


def relative(off: float) -> Tolerance:
    """For `pytest.approx`: off by at most `off` of the expected number."""
    return {"rel": off, "abs": 0.0}


def printed(places: int, numbers: int = 1) -> Tolerance:
    """For `pytest.approx`: a number that was printed with `places` decimals is rounded
    by half a unit of the last one, and so is each of the `numbers` that a result is
    worked out from, on which it depends with slopes up to 1. A thousandth more is for
    the errors of what it is compared with."""
    return {"rel": 0.0, "abs": 1.001 * numbers * 0.5 * 10.0**-places}


# For `pytest.approx`: numbers next to one another, rounded to integers.
INTEGERS: Tolerance = {"rel": 0.0, "abs": 1.0}


# ---------------------------------------------------------------- whole networks


def network(
    dtype: torch.dtype = F64, longest: int = 64, layers: int = 4, steps: int = 1
) -> float:
    """By how much results of a whole network may differ, relative to their size.

    Each of `layers` layers has sums of at most `longest` terms and the operations of
    its σ, in each of `steps` steps. Terms that cancel are at most G times their sum:
    G = 2 in half precision and 2^4 in float32, whose tests have networks of few layers
    with numbers of order 1; in float64 there is room for 2^10.
    """
    growth = 2**10 if dtype == F64 else 2**4 if dtype == F32 else 2
    k = steps * layers * (roundings(longest, dtype) + OPERATIONS)
    return growth * k * eps(dtype)


def trained(steps: int, dtype: torch.dtype = F32) -> float:
    """By how much the parameters after `steps` steps may differ, relative to their
    norm, at a rate at which differences do not grow: they round once a step in each of
    the two ways, at random, and what their changes round comes to no more."""
    return 4 * min(steps, 6 * math.sqrt(steps)) * eps(dtype)


def near(dtype: torch.dtype = F64, size: float = 1.0, **network_: int) -> Tolerance:
    """For `assert_close`: :func:`network`, of the result and of terms of `size`."""
    relative = network(dtype, **network_)
    return {"rtol": relative, "atol": relative * size}


# ---------------------------------------------------------------- one layer


# Of δ = grad_a ⊙ σ'(z): σ is within an ulp, two roundings; σ' has up to four operations
# on it, of which 1 - a² doubles σ's; the product rounds once more.
OPERATIONS = 8


def _curvature(case: Any, z: Tensor, radius: Tensor) -> Tensor:
    """The largest |σ''| between z - radius and z + radius, taken at three points."""
    found = torch.zeros_like(z)
    for at in (z - radius, z, z + radius):
        at = at.detach().requires_grad_()
        with torch.enable_grad():
            (first,) = torch.autograd.grad(case.sigma(at).sum(), at, create_graph=True)
            if first.requires_grad:
                (second,) = torch.autograd.grad(
                    first.sum(), at, allow_unused=True, materialize_grads=True
                )
                found = torch.maximum(found, second.abs())
    return found


def layer(
    case: Any,
    g: Tensor,
    x: Tensor,
    W: Tensor,
    b: Tensor | None = None,
    dtype: torch.dtype | None = None,
    error_of_g: Tensor | float = 0.0,
) -> list[Tensor]:
    """By how much y, grad_x, grad_W and, with b, grad_b of a layer may differ, entry by
    entry, between two ways of computing them in `dtype`, x's if it is None.

    Running errors, with sizes in float64 (Higham, 3.3):

        e_z = k(n_in + 1) eps (|x| |W|ᵀ + |b|)
        e_y = |σ'| e_z + 4 eps |y|
        e_δ = |g| (8 eps T + |σ''| e_z) + |σ'| e_g
        e_x = e_δ |W| + k(n_out) eps |δ| |W|, likewise e_W and e_b over the rows

    where k is :func:`roundings` and T the size of the terms that σ' is made of,
    `case.slope_terms`: 1 - a loses relative digits where a is next to 1. At a kink of
    σ nearer than e_z, both slopes are right.

    Args:
        case: a `cases.Layer`.
        g: grad_y, (*, n_out).
        error_of_g: by how much g itself may differ.
    """
    dtype = dtype or x.dtype
    g, x, W = (t.detach().double() for t in (g, x, W))
    rows, (n_out, n_in) = x.shape[:-1].numel(), W.shape
    has_bias = b is not None
    b = b.detach().double() if has_bias else x.new_zeros(n_out)
    z = F.linear(x, W, b)
    e_z = units(roundings(n_in + 1, dtype), dtype, F.linear(x.abs(), W.abs(), b.abs()))
    e_z = torch.where(z.isinf(), 0.0, e_z)  # infinite either way
    slope = case.slope(z).abs()
    y = case.sigma(z).abs()
    e_y = slope * e_z + units(4, dtype, torch.where(y.isinf(), 0.0, y))
    e_slope = units(OPERATIONS, dtype, case.slope_terms(z))
    e_slope = e_slope + _curvature(case, z, e_z) * e_z
    if case.has_kink:
        e_slope = e_slope + (z.abs() <= e_z)
    e_delta = (g.abs() * e_slope + slope * error_of_g).reshape(rows, n_out)
    delta = (g * slope).abs().reshape(rows, n_out)
    over_rows = e_delta + units(roundings(rows, dtype), dtype, delta)
    over_outputs = e_delta + units(roundings(n_out, dtype), dtype, delta)
    e_x = (over_outputs @ W.abs()).reshape(x.shape)
    e_W = over_rows.t() @ x.abs().reshape(rows, n_in)
    least = tiny(dtype)
    errors = [e_y, e_x + least, e_W + least, over_rows.sum(0) + least]
    return errors if has_bias else errors[:3]


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor | float) -> None:
    """Each entry is within its bound, or the same infinity or NaN on both sides."""
    assert actual.shape == expected.shape
    actual, expected = actual.detach().double(), expected.detach().double()
    right = (actual - expected).abs() <= bound
    right |= (actual == expected) | (actual.isnan() & expected.isnan())
    assert right.all(), f"off by {(actual - expected).abs()}, bound {bound}"


# ---------------------------------------------------------------- one cost


def cost(
    v: Tensor,
    y: Tensor,
    error_of_v: Tensor | float = 0.0,
    dtype: torch.dtype | None = None,
) -> tuple[float, Tensor]:
    """By how much a cost of v and its gradient by v may differ in `dtype`, v's if it is
    None.

    C_x is a sum of K terms of at most s = (|v| + |y| + 1)² / 2 for the quadratic one,
    of |v| |y| and a logarithm for the others, each of at most 8 roundings; C is the
    mean of n of them. ∇C_x is a - y, σ(z) - y, softmax(z) - y, or tanh(a - y): at most
    |v| + |y| + 1, of 8 roundings and those of the softmax's sum, with a slope in v of
    at most 1.

    Args:
        error_of_v: by how much v itself may differ.
    """
    dtype = dtype or v.dtype
    v, y = v.detach().double(), y.detach().double()
    n, K = v.shape[:-1].numel(), v.shape[-1]
    terms = v.abs() + y.abs() + 1
    k = OPERATIONS + roundings(K, dtype)
    of_grad = (units(k, dtype, terms) + error_of_v) / n + tiny(dtype)
    k += roundings(n, dtype)
    of_value = units(k, dtype, (terms.square().sum(-1) / 2).mean())
    return float(of_value), of_grad


# ---------------------------------------------------------------- as exact as another


def assert_as_exact(
    ours: Iterable[float], native: Iterable[float], floor: float = eps(F32)
) -> None:
    """The median of our relative errors, over several seeds, is at most twice native's.

    Two orders of a sum have errors of the same distribution, of which one case says
    nothing: native is right by chance now and then, hence medians, and a floor of a
    unit in the last place of what is compared.
    """
    mine, theirs = statistics.median(ours), statistics.median(native)
    assert mine <= 2 * theirs + floor, (mine, theirs, floor)


# ---------------------------------------------------------------- finite differences


def difference(step: float = 1e-6, order: int = 2, k: float = 2**9) -> Tolerance:
    """For `assert_close` and `gradcheck`, in float64: the error of the central
    difference (f(x + h) - f(x - h)) / 2h for f and f''' of order 1 is h²/6, by Taylor's
    formula, and k roundings of f over h; that of the forward difference, of order 1, is
    h/2 instead. (gradcheck's own defaults, 1e-3 and 1e-5, let a σ' that is 0.1 % off
    pass.)"""
    error = step**order / math.factorial(order + 1) + k * eps(F64) / step
    return {"rtol": error, "atol": error}


def power(apart: float, decades: float) -> Tolerance:
    """For `pytest.approx`: a power p that is read off x^p + x^q, |p - q| = `apart`, as
    many `decades` from where both are equal: the slope of log(1 + x^-apart)."""
    return {"rel": 0.0, "abs": apart * 10 ** (-apart * decades)}


# ---------------------------------------------------------------- samples


def mean(std: float, count: int) -> float:
    """The mean of N draws strays by s/√N; by five times that once in 1.7 million."""
    return 5 * std / math.sqrt(count)


def deviation(std: float, count: int) -> float:
    """The standard deviation of N normal draws strays by s/√2N; five of these."""
    return 5 * std / math.sqrt(2 * count)
