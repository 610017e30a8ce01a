"""torch.func and batched gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from torchbp.examination.basics import variants
from torchbp.examination.subject import Subject
from torchbp.examination.tools import (
    difference,
    flat,
    flatten,
    no_memory_of_batched_tensors,
)
from torchbp.examination.verdicts import (
    Fail,
    NotApplicable,
    must_run,
    needs_own_graph,
    needs_small_jacobian,
    same_gradients,
    supported,
)

_SETUP = (
    "write forward without ctx, add setup_context, and generate_vmap_rule = True or "
    "a vmap staticmethod"
)
_APART = (
    "let the vmap rule keep the examples apart, whichever argument is mapped, along "
    "whichever dimension"
)
_OUT_OF_PLACE = "work out of place in backward, by operations that vmap knows"


def vmap(s: Subject) -> str:
    """Values under vmap are those of a loop."""

    def f(*tensors: Any) -> tuple[Tensor, ...]:
        return tuple(s.evaluate(tensors))

    return _map_and_compare(s, f, "value")


def vmap_of_grad(s: Subject) -> str:
    """Gradients of each example under vmap(grad) are those of a loop."""
    needs_own_graph(s)
    f, at = s.closure(s.copies())
    cotangents = s.cotangents(f(*at))

    def total(*tensors: Any) -> Tensor:
        outputs = f(*[tensors[i] for i in s.floats])
        products = [(y * g).sum() for y, g in zip(outputs, cotangents, strict=True)]
        return torch.stack(products).sum()

    return _map_and_compare(s, torch.func.grad(total, argnums=s.floats), "gradient")


def _mapped(s: Subject) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """What is mapped over: each argument alone, the first one along its last dimension,
    then all together."""
    for i in s.floats:
        yield s.labels[i], (i,), 0
    yield s.labels[s.floats[0]], (s.floats[0],), -1
    if len(s.floats) > 1:
        yield "all arguments", tuple(s.floats), 0


def _map_and_compare(s: Subject, f: Callable[..., Any], what: str) -> str:
    for name, which, dim in _mapped(s):
        stacks = {i: variants(s, i) for i in which}
        mapped = s.copies()
        for i, parts in stacks.items():
            mapped[i] = torch.stack(parts, dim)
        dims = tuple(dim if i in which else None for i in range(len(mapped)))
        looped = []
        guard = supported(_SETUP)
        if dim:  # the first argument, which was supported along its first dimension
            guard = must_run(f"mapped over {name} along its last dimension, it", _APART)
        with guard, no_memory_of_batched_tensors():
            # A loop over torch.func.grad needs its support, too.
            ours = flatten(torch.func.vmap(f, in_dims=dims, randomness="same")(*mapped))
            for k in range(3):
                single = s.copies()
                for i, parts in stacks.items():
                    single[i] = parts[k].clone()
                looped.append(flatten(f(*single)))
        for mine, theirs in zip(ours, zip(*looped, strict=True), strict=True):
            if text := difference(mine, torch.stack(theirs), s.tolerance()):
                raise Fail(f"mapped over {name}, a {what} is {text}", _APART)
    return "each argument, and all, as a loop"


def batched_gradients(s: Subject) -> str:
    """Several output gradients at once, as one by one."""
    needs_own_graph(s)
    leaves, outputs = s.new_graph()
    sets = [s.cotangents(outputs, seed) for seed in range(3)]
    stacked = [torch.stack(gs) for gs in zip(*sets, strict=True)]
    looped = [s.gradients(s.copies(), cotangents=gs)[1] for gs in sets]
    with supported(_OUT_OF_PLACE), no_memory_of_batched_tensors():
        grads = torch.autograd.grad(
            outputs, leaves, stacked, allow_unused=True, is_grads_batched=True
        )
    right = [torch.stack(parts) for parts in zip(*looped, strict=True)]
    pairs = zip(grads, right, strict=True)
    ours = [torch.zeros_like(r) if g is None else g for g, r in pairs]
    same_gradients(s, ours, right, "of several at once,", _OUT_OF_PLACE)
    return "is_grads_batched, as one by one"


def end_to_end(f: Callable[..., Any]) -> Callable[..., Tensor]:
    """`f` with all outputs in one vector."""
    return lambda *tensors: torch.cat([y.reshape(-1) for y in f(*tensors)])


def jacrev(s: Subject) -> str:
    """Its rows, weighted, are what autograd.grad returns for these weights."""
    needs_own_graph(s)
    needs_small_jacobian(s)
    f, at = s.closure(s.copies())
    with supported(_SETUP), no_memory_of_batched_tensors():
        rows = torch.func.jacrev(end_to_end(f), argnums=tuple(range(len(at))))(*at)
    _, outputs = s.new_graph()
    gs = s.cotangents(outputs)
    weights = flat(gs)
    _, right = s.gradients(s.copies(), cotangents=gs)
    if not all(t.isfinite().all() for t in right):
        raise NotApplicable("a gradient is infinite: move the input away from the pole")
    ours = [
        (weights @ flat([J]).reshape(len(weights), r.numel())).reshape(r.shape)
        for J, r in zip(rows, right, strict=True)
    ]
    same_gradients(s, ours, right, "from its rows,", _OUT_OF_PLACE)
    return "as autograd.grad"
