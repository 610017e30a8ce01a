"""Forward-mode derivatives, J v, beside finite differences or a surrogate's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchbp.examination.differences import CLOSE, ROUNDINGS, Slopes
from torchbp.examination.subject import Subject
from torchbp.examination.tools import (
    difference,
    flat,
    flatten,
    no_memory_of_batched_tensors,
    random_like,
)
from torchbp.examination.transforms import end_to_end
from torchbp.examination.verdicts import (
    Fail,
    NotApplicable,
    Warn,
    needs_float64,
    needs_small_jacobian,
    supported,
)

_DERIVE = "jvp is J v: derive it from forward; a tangent may be None"
_JVP = "add setup_context, with save_for_forward, and a jvp staticmethod"
# A function, the point and the tangents (None: zero), to J v.
Push = Callable[[Callable[..., Any], list[Tensor], list[Any]], list[Tensor]]


def jvp(s: Subject) -> str:
    """torch.func.jvp is right."""
    return _check(s, _pushed, _DERIVE)


def dual_numbers(s: Subject) -> str:
    """Forward-mode AD is right."""

    def push(f: Any, at: list[Tensor], tangents: list[Any]) -> list[Tensor]:
        with forward_ad.dual_level():
            duals = [
                t if v is None else forward_ad.make_dual(t, v)
                for t, v in zip(at, tangents, strict=True)
            ]
            parts = [forward_ad.unpack_dual(y) for y in f(*duals)]
        return [
            torch.zeros_like(p.primal) if p.tangent is None else p.tangent
            for p in parts
        ]

    return _check(s, push, _DERIVE)


def jacfwd(s: Subject) -> str:
    """Its columns, weighted by tangents, are right."""

    def push(f: Any, at: list[Tensor], tangents: list[Any]) -> list[Tensor]:
        transform = torch.func.jacfwd(
            end_to_end(f), argnums=tuple(range(len(at))), randomness="same"
        )
        pairs = zip(transform(*at), tangents, strict=True)
        parts = [
            flat([J]).reshape(len(J), v.numel()) @ flat([v])
            for J, v in pairs
            if v is not None
        ]
        return [torch.stack(parts).sum(0)]

    return _check(s, push, "let jvp take tangents that vmap has batched")


def _check(s: Subject, push: Push, fix: str) -> str:
    """Compare what `push` returns along each argument alone, and along all."""
    needs_float64(s)
    needs_small_jacobian(s)
    f, at = s.closure(s.copies())
    generator = torch.Generator("cpu").manual_seed(s.seed)
    tangents = [random_like(t, generator).to(t.device) for t in at]
    choices = [{k} for k in range(len(at))]
    if len(at) > 1:
        choices.append(set(range(len(at))))
    for chosen in choices:
        some = [v if k in chosen else None for k, v in enumerate(tangents)]
        with supported(_JVP), no_memory_of_batched_tensors():
            ours = flat(push(f, at, some))
        if not (text := _off(s, f, at, ours, some)):
            continue
        names = ", ".join(s.names[k] for k in sorted(chosen))
        if not ours.any():
            raise Warn(
                f"along {names} the tangent is dropped without an error",
                "do without forward mode: a custom operator has no jvp; torch's "
                "operations have one, and an autograd.Function with a jvp",
            )
        raise Fail(f"along {names} it is {text}: not what the forward does", fix)
    return "each argument, and all, as finite differences"


def _off(
    s: Subject, f: Any, at: list[Tensor], ours: Tensor, tangents: list[Any]
) -> str:
    """How `ours` differs from J v, in words; "" if it does not."""
    if s.surrogate is not None:
        surrogate, _ = s.closure(s.copies(), function=s.surrogate)
        right = flat(_pushed(surrogate, at, tangents))
        return difference(ours, right, CLOSE, 1e-9)
    length = max(1.0, sum(v.norm().item() for v in tangents if v is not None) / 2)
    direction = [None if v is None else v.cpu() / length for v in tangents]
    slopes = Slopes(f, at, s.seed)
    noise = slopes.noise.max().item() if slopes.noise.numel() else 0.0
    texts = []
    for step in slopes.steps:
        right = length * slopes.slope(direction, step)
        close = max(CLOSE, s.requested_tolerance, slopes.curvature(step))
        floor = ROUNDINGS * noise * length / step + 1e-9
        texts.append(difference(ours, right, close, floor))
    if all(texts) and slopes.is_kink(direction):
        raise NotApplicable("a kink or a pole: move the input away from it")
    return texts[0] if all(texts) else ""


def _pushed(f: Any, at: list[Tensor], tangents: list[Any]) -> list[Tensor]:
    """J v by torch.func.jvp."""
    pairs = zip(tangents, at, strict=True)
    tangents = [torch.zeros_like(t) if v is None else v for v, t in pairs]
    return flatten(torch.func.jvp(f, tuple(at), tuple(tangents))[1])
