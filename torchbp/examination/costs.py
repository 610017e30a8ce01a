"""A1 and A2, of costs."""

from __future__ import annotations

import torch
from torch import Tensor

from torchbp.examination.differences import CLOSE, Slopes, look
from torchbp.examination.subject import Subject
from torchbp.examination.tools import F64, difference, nodes_of
from torchbp.examination.verdicts import Fail, NotApplicable, shape_of


def a1(s: Subject) -> str:
    """C = (1/n) Σ_x C_x."""
    if not s.is_cost:
        raise NotApplicable("not a cost")
    rows = s.row_candidates
    n = s.arguments[rows[0]].shape[0] if rows else 0
    if n < 2:
        raise NotApplicable("fewer than two rows")
    tolerance = s.tolerance()
    outputs, grads = s.gradients(s.copies())
    parts = [s.gradients(s.cut(s.copies(), rows, slice(i, i + 1))) for i in range(n)]
    each = torch.stack([values[0] for values, _ in parts])
    if not each.isfinite().all():
        raise NotApplicable("a row by itself has no finite cost")
    mean = each.mean()
    if text := difference(outputs[0], mean, tolerance, tolerance):
        factor = (outputs[0] / mean).item()
        raise Fail(
            f"C of {n} rows is {factor:.4g} times the mean of their costs ({text})",
            _a1_fix(factor, n),
        )
    for k, i in enumerate(s.floats):
        if i not in rows:
            continue
        right = torch.cat([own[k] for _, own in parts]) / n
        if text := difference(grads[k], right, tolerance, tolerance):
            factor = ((grads[k] * right).sum() / right.square().sum()).item()
            raise Fail(
                f"∂C/∂{s.labels[i]} of {n} rows is {factor:.4g} times the mean of "
                f"theirs ({text})",
                _a1_fix(factor, n),
            )
    return f"C and ∇C of {n} rows are the means of theirs"


def _a1_fix(factor: float, n: int) -> str:
    """What to do about a cost that is `factor` times what it should be."""
    if abs(factor * n - 1) < 1e-3:
        return "divide by n once: it is averaged twice"
    if abs(factor / n - 1) < 1e-3:
        return "divide by n: it is summed"
    return "divide the sum of the rows' costs by the number of rows, nothing else"


def a2(s: Subject) -> str:
    """C depends on the parameters through the outputs only."""
    if not s.is_cost:
        raise NotApplicable("not a cost")
    arguments = s.copies()
    leaves = s.leaves(arguments)
    outputs = s.evaluate(arguments)
    fix = "let C depend on the network's outputs alone"
    if s.inputs < len(s.arguments):
        name = s.labels[s.inputs]
        raise Fail(f"C has a parameter of its own, {name}", fix)
    for node in nodes_of(outputs):
        variable = getattr(node, "variable", None)
        if variable is not None and not any(variable is t for t in leaves):
            raise Fail(
                f"C depends on a tensor {shape_of(variable)} besides its arguments",
                fix,
            )
    passed = "through the outputs only"
    for i, t in enumerate(s.arguments):
        if i in s.floats or not isinstance(t, Tensor) or not t.is_floating_point():
            continue
        passed = _target(s, i) or passed
    return passed


def _target(s: Subject, i: int) -> str:
    """What happens to a target that requires grad: it is refused, or a constant (""),
    or its gradient is right."""
    arguments = s.copies()
    leaves = s.leaves(arguments, (i,))
    try:
        outputs = s.differentiable(arguments)
        if not outputs:
            return ""
        (grad,) = s.pull_back(outputs, leaves)
    except Exception:
        return f"{s.labels[i]} that requires grad is refused"
    if not grad.any() or s.dtype != F64:
        return ""
    f, _ = s.closure(s.copies(), (i,))
    gs = s.cotangents(outputs)
    (seen,) = look(s, Slopes(f, leaves, s.seed), [gs], [[grad]], 64)
    if seen.wrong:
        text = difference(seen.ours, seen.right, CLOSE)
        raise Fail(
            f"the gradient of {s.labels[i]} is {text}",
            f"return None for {s.labels[i]}: under A2 it is a constant",
        )
    return f"{s.labels[i]} gets its gradient, too"
