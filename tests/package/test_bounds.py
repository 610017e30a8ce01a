"""Every tolerance is one of tests/bounds.py; and those bounds hold, and can fail."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import bounds
import pytest
import torch
from cases import all_costs, all_layers, operands, rand, target_for

TESTS = Path(__file__).parents[1]
NAMES = {"rtol", "atol", "rel", "abs", "rel_tol", "abs_tol", "nondet_tol"}
# Positional arguments of functions that take tolerances behind them.
OPERANDS = {"assert_close": 2, "allclose": 2, "isclose": 2, "approx": 1, "gradcheck": 3,
            "gradgradcheck": 4}  # fmt: skip
SMALLEST = 1e-2  # smaller numbers to the right of a < are tolerances


def is_number(node: ast.AST) -> bool:
    if isinstance(node, ast.UnaryOp):
        return is_number(node.operand)
    if isinstance(node, ast.BinOp):
        return is_number(node.left) and is_number(node.right)
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def is_multiple(node: ast.AST) -> bool:
    """A number times something, also in a sum: 2 * x + y."""
    if not isinstance(node, ast.BinOp) or is_number(node):
        return False
    if isinstance(node.op, ast.Mult):
        sides = (node.left, node.right)
        return any(is_number(s) or is_multiple(s) for s in sides)
    return is_multiple(node.left) or is_multiple(node.right)


def is_small(node: ast.AST) -> bool:
    if isinstance(node, ast.BinOp):
        return is_small(node.left) or is_small(node.right)
    return (
        isinstance(node, ast.Constant)
        and isinstance(node.value, float)
        and 0 < node.value < SMALLEST
    )


def of_call(node: ast.Call) -> Iterator[str]:
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    if len(node.args) > OPERANDS.get(name, 99):
        yield f"a tolerance by position: {ast.unparse(node)}"
    for keyword in node.keywords:
        if keyword.arg in NAMES:
            yield f"{keyword.arg}= in {ast.unparse(node)}"


def of_comparison(node: ast.Compare) -> Iterator[str]:
    sides = [node.left, *node.comparators]
    for left, op, right in zip(sides, node.ops, sides[1:], strict=False):
        if isinstance(op, (ast.Lt, ast.LtE)):
            larger = right
        elif isinstance(op, (ast.Gt, ast.GtE)):
            larger = left
        else:
            continue
        if is_multiple(larger) or is_small(larger):
            yield ast.unparse(node)


def tolerances(source: str) -> list[str]:
    """What in a test is a tolerance with a number of its own, with its line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        texts: list[str] = []
        if isinstance(node, ast.Call):
            texts = list(of_call(node))
        elif isinstance(node, ast.Compare):
            texts = list(of_comparison(node))
        elif isinstance(node, ast.Dict):
            keys = [k.value for k in node.keys if isinstance(k, ast.Constant)]
            texts = [f"{k!r}: in a dict" for k in keys if k in NAMES]
        elif isinstance(node, ast.Attribute) and "finfo(" in ast.unparse(node):
            texts = [ast.unparse(node)]
        found += [f"{node.lineno}: {text}" for text in texts]
    return found


# One of the wrong Functions returns other last bits at every second call, another has a
# constant that vanishes in float32.
ALLOWED = {"wrong_functions.py": 2}


def test_no_tolerance_stands_anywhere_else() -> None:
    files = sorted(TESTS.rglob("*.py"))
    assert any(path.parent != TESTS for path in files)
    found = {
        str(path.relative_to(TESTS)): tolerances(path.read_text("utf-8"))
        for path in files
        if path not in (TESTS / "bounds.py", Path(__file__))
    }
    others = {name: lines for name, lines in found.items() if lines}
    allowed = {name: len(lines) for name, lines in others.items() if name in ALLOWED}
    assert allowed == ALLOWED
    assert set(others) == set(ALLOWED), others


@pytest.mark.parametrize(
    "line",
    [
        "assert_close(a, b, rtol=1e-5, atol=0)",
        "assert_close(a, b, atol=TIGHT)",
        "torch.allclose(a, b, 1e-3)",
        "assert x == pytest.approx(y, rel=1e-6)",
        "assert x == pytest.approx(y, 1e-6)",
        "math.isclose(a, b, rel_tol=1e-9)",
        "gradcheck(f, args, 1e-6, 1e-5)",
        "TIGHT = {'rtol': 1e-5}",
        "assert ours < 2 * native",
        "assert ours <= native * 2 + floor",
        "assert 1.25 * total >= ours",
        "assert error < k * 8 * eps",
        "assert (a - b).abs().max() < 1e-6",
        "assert 1e-9 > off",
        "assert error <= torch.finfo(dtype).eps",
    ],
)
def test_a_tolerance_is_seen(line: str) -> None:
    assert tolerances(line)


@pytest.mark.parametrize(
    "line",
    [
        "assert_close(a, b, **bounds.near(torch.float64, 2))",
        "assert x == pytest.approx(y, **bounds.printed(4))",
        "assert ours < bounds.trained(2 * steps)",
        "assert count >= 2 * len(rows)",
        "assert accuracy > 0.95 and n < 100",
    ],
)
def test_what_is_no_tolerance_is_not(line: str) -> None:
    assert not tolerances(line)


# ---------------------------------------------------------------- the bounds themselves


def gradients(f, args, g):
    leaves = [t.detach().clone().requires_grad_() for t in args]
    y = f(*leaves)
    return [y, *torch.autograd.grad(y, leaves, g.to(y.dtype))]


@all_layers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_native_layers_keep_the_bounds_and_a_wrong_slope_does_not(layer, dtype) -> None:
    """Against float64, since a bound for two ways holds for one and the exact value."""
    args = [t.detach() for t in operands(layer, (7,), 5, 4, dtype=dtype)]
    g = rand(7, 4, seed=9, dtype=dtype)
    off = bounds.layer(layer, g, *args)
    exact = gradients(layer.native, [t.double() for t in args], g)
    for t, e, bound in zip(gradients(layer.native, args, g), exact, off, strict=True):
        bounds.assert_within(t, e, bound)
    if dtype == torch.float32:
        for e, bound in zip(exact, off, strict=True):
            with pytest.raises(AssertionError):
                bounds.assert_within(1.001 * e, e, bound)


@all_costs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_costs_keep_the_bounds_and_wrong_ones_do_not(cost, dtype) -> None:
    v, y = rand(6, 4, dtype=dtype), target_for(cost, 6, 4, dtype=dtype)
    off = bounds.cost(v, y)
    exact = gradients(
        lambda v: cost.native(v, y.double()), [v.double()], torch.ones(())
    )
    for t, e, bound in zip(
        gradients(lambda v: cost.native(v, y), [v], torch.ones(())), exact, off,
        strict=True,
    ):  # fmt: skip
        bounds.assert_within(t, e, bound)
        if dtype == torch.float32:
            with pytest.raises(AssertionError):
                bounds.assert_within(1.001 * e, e, bound)


def test_an_error_at_every_seed_is_not_as_exact() -> None:
    native = [1e-5, 2e-5, 3e-5]
    bounds.assert_as_exact([2e-5, 4e-5, 1.0], native)  # the middle one counts
    with pytest.raises(AssertionError):
        bounds.assert_as_exact([5e-5, 5e-5, 5e-5], native)


def test_a_sum_in_float32_keeps_its_roundings() -> None:
    for n in (1, 10, 1000, 100_000):
        terms = rand(n, dtype=torch.float32)
        error = terms.flip(0).cumsum(0)[-1].double() - terms.double().sum()
        size = float(terms.double().abs().sum())
        assert abs(float(error)) <= bounds.units(
            bounds.roundings(n), torch.float32, size
        )
