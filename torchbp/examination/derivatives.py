"""The derivatives themselves: beside finite differences, beside a reference, in
shorter dtypes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torchbp.examination.differences import (
    CLOSE,
    Seen,
    Slopes,
    look,
    names_of,
    where_kinks,
)
from torchbp.examination.subject import Subject
from torchbp.examination.tools import (
    F64,
    difference,
    differences,
    first_line,
    variables_of,
)
from torchbp.examination.verdicts import (
    CALCULUS,
    Fail,
    NotApplicable,
    NotSupported,
    Verdict,
    differentiated,
    dtype_name,
    fix_for,
    labels_of,
    must_equal,
    must_equal_rounded,
    must_run,
    needs_float64,
    needs_own_graph,
    shape_of,
    supported,
)

DRAWS = 3
INTENDED = (
    "if the derivatives are meant to be those of another function f (straight-through "
    "estimators, surrogates), say which: surrogate=f"
)


def forward(s: Subject) -> str:
    """It runs, and returns tensors."""
    outputs = s.evaluate(s.copies(s.own_dtype))
    if not outputs:
        raise Fail("no tensor is returned", "return a tensor or several")
    drawn = "; it draws random numbers" if s.is_random else ""
    return ", ".join(f"{shape_of(y)} {dtype_name(y.dtype)}" for y in outputs) + drawn


def is_exact(s: Subject) -> bool:
    """Whether forward and backward compute in float64, and not in less inside."""
    arguments = s.copies()
    f = s.closure(arguments)
    with torch.no_grad():
        at = [arguments[i].detach() for i in s.floats]
        if s.dtype != F64 or Slopes(f, at, s.seed).is_coarse:
            return False
    _, outputs = differentiated(s)
    g, h = s.cotangents(outputs, 1), s.cotangents(outputs, 2)
    sets = g, h, [a + b for a, b in zip(g, h, strict=True)]
    one, other, both = (s.gradients(s.copies(), cotangents=gs)[1] for gs in sets)
    total = [a + b for a, b in zip(one, other, strict=True)]
    return not differences(both, total, labels_of(s), 1e-12)


# ---------------------------------------------------------------- linear in g


def linear_in_g(s: Subject) -> str:
    """Backward is linear in the output's gradient: twice of it gives twice, its
    negative the negative, and a loss scaled by 1024 gives 1024 times as much."""
    _, outputs = differentiated(s)
    g, h = s.cotangents(outputs, 1), s.cotangents(outputs, 2)

    def pull(factor: float, gs: Sequence[Tensor]) -> list[Tensor]:
        return s.gradients(s.copies(), cotangents=[factor * t for t in gs])[1]

    with must_run("the backward"):
        once = pull(1, g)
        scaled = {factor: pull(factor, g) for factor in (-1.0, 2.0, 1024.0, 2.0**-10)}
        other, both = pull(1, h), pull(1, [a + b for a, b in zip(g, h, strict=True)])
    wrong = {
        factor: found
        for factor, grads in scaled.items()
        if (found := _not_times(s, grads, factor, once))
    }
    total = [a + b for a, b in zip(once, other, strict=True)]
    if not wrong and not differences(both, total, labels_of(s), _linear(s)):
        return "twice, minus, 1024 times the output's gradient, and a sum of two"
    fix = "multiply the output's gradient by the derivative, and do nothing else to it"
    fix += "; a clipping that is meant belongs into a hook, or skip this check"
    raise Fail(_nonlinearity(s, once, scaled, wrong), fix)


def _not_times(
    s: Subject, grads: list[Tensor], factor: float, once: list[Tensor]
) -> str:
    right = [factor * t for t in once]
    return differences(grads, right, labels_of(s), _linear(s))


def _linear(s: Subject) -> float:
    # What is meant is gross; a backward may compute in float32 inside.
    return 4 * s.tolerance(torch.float32 if s.dtype == F64 else s.dtype)


def _nonlinearity(
    s: Subject, once: list[Tensor], scaled: dict[float, Any], wrong: dict[float, str]
) -> str:
    """What a backward that is not linear does instead."""
    if not wrong:
        return "of a sum of two output gradients, backward gives no sum"
    same = not _not_times(s, scaled[2.0], 1, once)
    if same and not _not_times(s, scaled[-1.0], 1, once):
        return "backward ignores the output's gradient: any gives the same"
    if same and not _not_times(s, scaled[2.0**-10], 1, once):
        return "backward takes the sign of the output's gradient, not its size"
    if -1.0 in wrong:
        return (
            "from minus the output's gradient, backward does not give minus as much: "
            f"{wrong[-1.0]}"
        )
    factor = max(wrong)
    return (
        f"from {factor:g} times the output's gradient, backward does not give "
        f"{factor:g} times as much: {wrong[factor]}; it clips or rounds it"
    )


# ---------------------------------------------------------------- first derivatives


def first_derivatives(s: Subject) -> str:
    """The gradients are those of the forward, in float64 if it takes that."""
    if s.dtype not in (F64, torch.float32):
        needs_float64(s)
    arguments = s.copies()
    if s.surrogate is not None:
        _as_surrogate(s, arguments)
        return "as the surrogate's"
    seen, slopes = examined_at(s, arguments, s.entries)
    count, total = sum(len(one.entries) for one in seen), 0
    total = sum(t.numel() for t in slopes.at)
    if any(one.wrong or one.along for one in seen):
        raise _diagnosis(s, arguments, slopes, seen)
    if kinks := ", ".join(where_kinks(seen, labels_of(s), slopes.at)):
        raise NotApplicable(
            f"a kink or a pole at {kinks}: nothing is held against it there",
            "move the input away from it",
        )
    _wider(s)
    where = f"at all {total} entries"
    if count < total:
        where = f"at {count:,} of {total:,} entries and along random directions"
    if s.dtype != F64:
        return f"as finite differences {where}, in float32: float64: {s.refusal}"
    if slopes.is_coarse:
        where += "; it computes in a shorter dtype inside, so coarsely"
    return f"as finite differences {where}"


def examined_at(
    s: Subject, arguments: list[Any], budget: int
) -> tuple[list[Seen], Slopes]:
    """What differences say of the gradients at these arguments."""
    f = s.closure(arguments)
    at = [arguments[i].detach() for i in s.floats]
    cotangents, grads = [], []
    for draw in range(DRAWS):
        own = [t.clone().requires_grad_() for t in at]
        with must_run("the backward"):
            outputs = f(*own)
            gs = s.cotangents(outputs, draw)
            cotangents.append([g.clone() for g in gs])
            grads.append(s.pull_back(outputs, own, gs))
    with torch.no_grad():
        slopes = Slopes(f, at, s.seed, s.dtype == F64)
        return look(s, slopes, cotangents, grads, budget), slopes


def must_be_right_at(s: Subject, arguments: list[Any], what: str, fix: str) -> None:
    """Fail if the gradients at other arguments are wrong, along random directions."""
    if s.surrogate is not None:
        return _as_surrogate(s, arguments, f"{what}: ")
    seen, _ = examined_at(s, arguments, 0)
    for one, label in zip(seen, labels_of(s), strict=True):
        if one.along:
            raise Fail(
                f"{what}: along a random direction, the gradient of {label} is "
                f"{one.along}",
                fix,
            )
    return None


def _as_surrogate(s: Subject, arguments: list[Any], what: str = "") -> None:
    for draw in range(DRAWS):
        own = [t.clone() if isinstance(t, Tensor) else t for t in arguments]
        with must_run("the backward"):
            outputs, _ = s.gradients(own)
            gs = s.cotangents([y for y in outputs if y.requires_grad], draw)
            _, ours = s.gradients(own, cotangents=gs)
        with must_run("the surrogate"):
            _, right = s.right_gradients(own, gs)
        for label, mine, theirs in zip(labels_of(s), ours, right, strict=True):
            close = s.tolerance() if s.dtype != F64 else CLOSE * 1e-3
            if not difference(mine, theirs, close, close):
                continue
            likeness = _likeness(mine, theirs, 10 * close)
            reason, fix = likeness or (
                f"the gradient is {difference(mine, theirs, close)}", CALCULUS
            )  # fmt: skip
            raise Fail(f"{what}{label}: beside the surrogate's, {reason}", fix)


def _wider(s: Subject) -> None:
    """Fail if the gradients are wrong where the first input is large: a derivative may
    be wrong in the tails alone. An input of one sign keeps it; one that is symmetric
    or normalised is left alone, since a draw would not be."""
    i = s.floats[0]
    t = s.arguments[i]
    if i >= s.inputs or s.is_random or not t.numel() or _is_structured(t):
        return
    generator = torch.Generator().manual_seed(s.seed + 2)
    size = torch.rand(t.shape, generator=generator, dtype=F64) * 6 + 2
    sign = 2.0 * torch.randint(0, 2, t.shape, generator=generator) - 1
    if not (t < 0).any() or not (t > 0).any():
        sign = t.sign().to("cpu", F64)
    arguments = s.copies()
    arguments[i] = (size * sign).to(t.device, s.dtype)
    try:
        with torch.no_grad():
            if not all(y.isfinite().all() for y in s.evaluate(arguments)):
                return
        seen, slopes = examined_at(s, arguments, min(64, s.entries))
    except Exception:  # it does not take such inputs
        return
    for one, label, at in zip(seen, labels_of(s), slopes.at, strict=True):
        if not (one.wrong and one.right.isfinite().all()):
            continue
        worst = one.wrong[0]
        name = names_of(one, one.wrong, at.shape)
        raise Fail(
            f"at inputs up to 8 in size, the gradient of {label} is wrong: at "
            f"{label}{name.split(', …')[0]} it is {one.ours[worst, 0]:.4g}, expected "
            f"{one.right[worst, 0]:.4g}; at the given inputs it is right",
            f"look at the tails: there {label} is "
            f"{at.reshape(-1)[one.entries[worst]]:.3g}",
        )


def _is_structured(t: Tensor) -> bool:
    t = t.to(F64)
    if t.dim() < 1:
        return False
    square = t.dim() >= 2 and t.shape[-1] == t.shape[-2] > 1
    if square and torch.allclose(t, t.mT):
        return True
    sums, norms = t.sum(-1), t.norm(dim=-1)
    return bool(
        torch.allclose(sums, torch.ones_like(sums), atol=1e-5)
        or torch.allclose(norms, torch.ones_like(norms), atol=1e-5)
    )


# ---------------------------------------------------------------- what is wrong


def _diagnosis(
    s: Subject, arguments: list[Any], slopes: Slopes, seen: list[Seen]
) -> Fail:
    """Which gradient is wrong, and if it can be told, in what way."""
    labels = labels_of(s)
    wrong = [k for k, one in enumerate(seen) if one.wrong or one.along]
    for k in wrong:
        if seen[k].is_flat:
            return _flat(s, arguments, k)
    if fail := _slope(s, arguments, slopes, seen, wrong):
        return fail
    for k in wrong:
        one = seen[k]
        for j, other in enumerate(seen):
            same = j != k and slopes.at[j].shape == slopes.at[k].shape
            if same and _alike(one.ours, other.right, _tolerance(slopes)):
                return Fail(
                    f"{labels[k]}: the gradient is that of {labels[j]}",
                    "return gradients in the order of forward's arguments",
                )
        shape = slopes.at[k].shape
        whole = len(one.entries) == shape.numel()
        mine, right = one.ours[:, 0], one.right[:, 0]
        if whole:
            mine, right = mine.reshape(shape), right.reshape(shape)
        if likeness := _likeness(mine, right, _tolerance(slopes)):
            return Fail(f"{labels[k]}: {likeness[0]}", likeness[1])
    k = wrong[0]
    return Fail(_off(labels[k], seen[k], slopes.at[k].shape), f"{CALCULUS}; {INTENDED}")


def _tolerance(slopes: Slopes) -> float:
    return 1e-3 if slopes.is_coarse else CLOSE


def _alike(a: Tensor, b: Tensor, close: float) -> bool:
    return a.shape == b.shape and not difference(a, b, close)


def _off(label: str, one: Seen, shape: torch.Size) -> str:
    """How the gradient of one argument is off, in words."""
    if not one.wrong:
        return f"along a random direction, the gradient of {label} is {one.along}"
    gap = (one.ours - one.right)[one.wrong].abs().nan_to_num(float("inf")).amax(1)
    worst = one.wrong[int(gap.argmax())]
    draw = int((one.ours - one.right)[worst].abs().nan_to_num(float("inf")).argmax())
    name = names_of(one, [worst], shape)
    return (
        f"{label}: the gradient is off at {len(one.wrong)} of {len(one.entries)} "
        f"entries; at {label}{name} it is {one.ours[worst, draw]:.4g}, expected "
        f"{one.right[worst, draw]:.4g}"
    )


def _flat(s: Subject, arguments: list[Any], k: int) -> Fail:
    """The forward does not move with argument k: is it a step, or a constant?"""
    label = labels_of(s)[k]
    with torch.no_grad():
        before = s.evaluate(arguments)
        for length in (1.0, -8.0, 64.0):
            moved = list(arguments)
            moved[s.floats[k]] = arguments[s.floats[k]].detach() + length
            after = s.evaluate(moved)
            if any(difference(a, b, 0.0) for a, b in zip(after, before, strict=True)):
                return Fail(
                    f"{label}: the forward is a step, flat at every entry, and the "
                    "backward is not",
                    "if the backward is a surrogate, say which: surrogate=f, say "
                    "lambda x: x for a straight-through estimator; else return zeros",
                )
    return Fail(
        f"{label}: the forward does not depend on it, and gets a gradient",
        f"return None for it, or use it in forward; {INTENDED}",
    )


def _slope(
    s: Subject, arguments: list[Any], slopes: Slopes, seen: list[Seen], wrong: list[int]
) -> Fail | None:
    """A known mistake in σ', which a factor on the output's gradient corrects."""
    outputs = s.closure(arguments)(*[arguments[i] for i in s.floats])
    if len(outputs) != 1 or not all(seen[k].wrong for k in wrong):
        return None
    (g,) = s.cotangents(outputs)
    for what, factor, fix in _slopes(outputs[0].detach()):
        if not factor.isfinite().all():
            continue
        own = [t.detach().clone() if isinstance(t, Tensor) else t for t in arguments]
        _, grads = s.gradients(own, cotangents=[g * factor])
        if all(
            _alike(
                grads[k].reshape(-1).cpu().to(F64)[seen[k].entries],
                seen[k].right[:, 0],
                _tolerance(slopes),
            )
            for k in wrong
        ):
            return Fail(what, fix)
    return None


def _likeness(ours: Tensor, right: Tensor, close: float) -> tuple[str, str] | None:
    """What a wrong gradient is like."""
    ours, right = ours.to(F64), right.to(F64)
    if not right.isfinite().all() or not right.any():
        return None
    if not ours.any():
        largest = right.abs().max().item()
        return (
            f"no gradient, expected one up to {largest:.2g}",
            "return it; if the argument is a constant, let the inputs that are not "
            "require grad",
        )
    if ours.dim() == 2 and _alike(ours, right.t(), close):
        return "the gradient is the transpose of the right one", "transpose it back"
    factor = ((ours * right).sum() / right.square().sum()).item()
    if not difference(ours, factor * right, close):
        if abs(factor + 1) < close:
            return (
                "the gradient has the wrong sign",
                "change its sign; if it is meant (gradient reversal), say so: "
                "surrogate=lambda x: -x, of all arguments",
            )
        nearest = round(factor) or round(1 / factor)
        exact = abs(factor - round(factor)) < close or (
            factor and abs(1 / factor - round(1 / factor)) < close
        )
        name = f"{factor:.4g}"
        if exact and abs(factor) >= 1:
            name = str(nearest)
        return (
            f"the gradient is {name} times the right one",
            "look for a missing, doubled or wrong factor (a mean for a sum)",
        )
    return None


def _slopes(a: Tensor) -> Iterator[tuple[str, Tensor, str]]:
    """Mistakes in σ': what they are, the factor on the output's gradient that corrects
    them, and the fix. A backward is linear in that gradient, so if the factor corrects
    every gradient, the mistake is known."""
    z, t = torch.logit(a), torch.atanh(a)
    s = torch.sigmoid(a)
    multiply = "multiply the output's gradient by σ'(z) before all else"
    yield "σ' = a(1 - a) of a sigmoid is missing", a * (1 - a), multiply
    yield "σ' = 1 - a² of a tanh is missing", 1 - a * a, multiply
    yield "σ' = [a > 0] of a ReLU is missing", (a > 0).to(a.dtype), multiply
    of_a = "σ' = {} is in terms of a: save a, or compute it from z"
    yield (
        "σ' = a(1 - a) was taken of z in place of a",
        a * (1 - a) / (z * (1 - z)),
        of_a.format("a(1 - a)"),
    )
    yield (
        "σ' = 1 - a² was taken of z in place of a",
        (1 - a * a) / (1 - t * t),
        of_a.format("1 - a²"),
    )
    yield (
        "σ' was taken at a in place of z: σ is applied twice",
        a * (1 - a) / (s * (1 - s)),
        "σ'(z) = σ(z)(1 - σ(z)) = a(1 - a)",
    )
    yield (
        "σ' = a(1 - a) of a sigmoid is there twice",
        1 / (a * (1 - a)),
        "multiply by σ'(z) once",
    )


# ---------------------------------------------------------------- second derivatives

_TWICE = (
    "compute it from ctx.saved_tensors by differentiable operations (no detach, .data, "
    "no_grad or NumPy), or mark the backward with once_differentiable"
)
_NOT_TWICE = ("once_differentiable", "implemented", "does not require grad")


def second_derivatives(s: Subject) -> str:
    """The gradients have gradients, and those are right."""
    needs_float64(s)
    needs_own_graph(s)
    arguments = s.copies()
    f = s.closure(arguments)
    at = [arguments[i].detach() for i in s.floats]
    gs = s.cotangents(f(*at))
    names = [*labels_of(s), *["the output's gradient"] * len(gs)]
    weights, ours, cut = _seconds(s, f, at, gs)
    if s.surrogate is not None:
        return _seconds_as_surrogate(s, arguments, ours, names)

    def firsts(*tensors: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            own = [t.detach().requires_grad_() for t in tensors[: len(at)]]
            return s.pull_back(f(*own), own, tensors[len(at) :])

    slopes = Slopes(firsts, [*at, *gs], s.seed)
    if not slopes.values.isfinite().all():
        raise NotApplicable("a gradient is infinite: move the input away from the pole")
    seen = look(s, slopes, weights, ours, s.entries // 2)
    kinks = ", ".join(where_kinks(seen, names, slopes.at))
    for k, one in enumerate(seen):
        if one.wrong or one.along:
            raise _second_diagnosis(s, seen, k, names, slopes.at[k].shape, cut)
    if kinks:
        raise NotApplicable(
            f"the first derivatives have a kink or a pole at {kinks}",
            "move the input away from it",
        )
    return "as finite differences of the first"


def _seconds(
    s: Subject, f: Callable[..., Any], at: Sequence[Tensor], gs: Sequence[Tensor]
) -> tuple[list[list[Tensor]], list[list[Tensor]], bool]:
    """For each argument the gradients of its own gradient, weighted so that no sum
    vanishes; whether all of them are cut off from the graph."""
    weights, ours, cut = [], [], True
    for chosen in range(len(at)):
        own = [t.clone().requires_grad_() for t in (*at, *gs)]
        with must_run("the backward, with create_graph,"):
            outputs = f(*own[: len(at)])
            grads = s.pull_back(
                outputs, own[: len(at)], own[len(at) :], create_graph=True
            )
        draw = s.cotangents(grads, 3 + chosen)
        draw = [w if k == chosen else 0 * w for k, w in enumerate(draw)]
        weights.append(draw)
        total = (grads[chosen] * draw[chosen]).sum()
        cut = cut and not any(g.requires_grad for g in grads)
        seconds: Sequence[Tensor | None] = [None] * len(own)
        if total.requires_grad:
            seconds = _second_pass(total, own)
        ours.append(
            [
                torch.zeros_like(t) if d is None else d
                for d, t in zip(seconds, own, strict=True)
            ]
        )
    return weights, ours, cut


def _second_pass(total: Tensor, own: list[Tensor]) -> Sequence[Tensor | None]:
    try:
        # once_differentiable cuts the graph off, and leaves an error at its end.
        ends = variables_of([total])
        torch.autograd.grad(total, ends, allow_unused=True, retain_graph=True) if (
            ends
        ) else None
        return torch.autograd.grad(total, own, allow_unused=True)
    except Verdict:
        raise
    except Exception as error:
        if any(word in str(error) for word in _NOT_TWICE):
            raise NotSupported(first_line(error), _TWICE) from None
        reason = f"the second backward raised {first_line(error)}"
        raise Fail(reason, fix_for(error, _TWICE)) from None


def _seconds_as_surrogate(
    s: Subject, arguments: list[Any], ours: list[list[Tensor]], names: list[str]
) -> str:
    surrogate = s.surrogate
    assert surrogate is not None

    def f(*tensors: Tensor) -> list[Tensor]:
        full = list(arguments)
        for i, t in zip(s.floats, tensors, strict=True):
            full[i] = t
        return [y for y in s.evaluate(full, surrogate) if y.requires_grad]

    at = [arguments[i].detach() for i in s.floats]
    gs = s.cotangents(s.closure(arguments)(*at))
    _, right, _ = _seconds(s, f, at, gs)
    for mine, theirs in zip(ours, right, strict=True):
        if found := differences(mine, theirs, names, CLOSE, 1e-9):
            raise Fail(
                f"the gradient, derived by {found}, beside the surrogate", _TWICE
            )
    return "as the surrogate's"


def _second_diagnosis(
    s: Subject,
    seen: list[Seen],
    by: int,
    names: list[str],
    shape: torch.Size,
    cut: bool,
) -> Fail:
    """Which gradient does not know that it depends on what."""
    one, labels = seen[by], labels_of(s)
    if cut:
        return Fail(
            f"the gradients are cut off from the graph: derived by {names[by]} they "
            "are not 0",
            _TWICE,
        )
    places = one.wrong or list(range(len(one.entries)))
    gaps = (one.ours - one.right)[places].abs().nan_to_num(float("inf")).amax(0)
    which = int(gaps.argmax())
    what = f"the gradient of {labels[which]}"
    if not one.ours[:, which].any():
        return Fail(
            f"{what} is a constant to {names[by]}, on which it depends: what forward "
            "computed and saved, and what is detached, is constant to autograd",
            _TWICE,
        )
    if not one.wrong:
        return Fail(f"{what}, derived by {names[by]}, is {one.along}", _TWICE)
    nan = [p for p in one.wrong if not one.ours[p].isfinite().all()]
    if nan:
        return Fail(
            f"{what}, derived by {names[by]}, is NaN or infinite at {len(nan)} entries "
            f"{names_of(one, nan, shape)}, where differences are finite",
            "mask before the operation, not after it: 0 times infinity is NaN",
        )
    worst = one.wrong[0]
    return Fail(
        f"{what}, derived by {names[by]}, is off at {len(one.wrong)} of "
        f"{len(one.entries)} entries; at {names_of(one, [worst], shape)} it is "
        f"{one.ours[worst, which]:.4g}, expected {one.right[worst, which]:.4g}",
        _TWICE,
    )


# ---------------------------------------------------------------- reference, dtypes


def reference(s: Subject) -> str:
    """Values and gradients are the reference's, to rounding."""
    if s.reference is None:
        raise NotApplicable("no reference")
    with must_run("the reference"):
        right = s.gradients(s.copies(), function=s.reference)
    ours = s.gradients(s.copies())
    if s.surrogate is not None:
        right = right[0], ours[1]
    try:
        must_equal(s, ours, right, s.tolerance())
    except Fail as fail:
        if found := _wrong_reference(s):
            raise NotApplicable(
                f"the reference's own gradient is not that of its values: {found}",
                "take another reference",
            ) from None
        if s.dtype != F64:
            raise
        # Computed in float32 inside, or with a constant of eight digits.
        try:
            must_equal(s, ours, right, s.tolerance(torch.float32) / 10)
        except Fail:
            raise fail from None
        return f"to single precision only: {fail.reason}"
    return f"values and gradients in {dtype_name(s.dtype)}"


def _wrong_reference(s: Subject) -> str:
    """How the reference's gradients depart from differences of its values, or ""."""
    function, s.function = s.function, s.reference or s.function
    surrogate, s.surrogate = s.surrogate, None
    try:
        seen, slopes = examined_at(s, s.copies(), min(64, s.entries))
    except Exception:
        return ""
    finally:
        s.function, s.surrogate = function, surrogate
    for one, label, t in zip(seen, labels_of(s), slopes.at, strict=True):
        if one.wrong or one.along:
            return _off(label, one, t.shape)
    return ""


def in_dtype(dtype: torch.dtype, s: Subject) -> str:
    """Values and gradients in a shorter dtype, beside those in float64 of the same
    rounded arguments: the reference's where there is one, which also says how exact one
    can be."""
    needs_float64(s)
    with supported():
        arguments = s.copies(dtype)
        leaves = s.leaves(arguments)
        outputs = s.evaluate(arguments)
    with must_run("the forward went through, but the backward"):
        try:
            ours = outputs, s.pull_back(outputs, leaves)
        except (RuntimeError, TypeError) as error:
            if any(word in str(error) for word in ("not implemented for", "unsupp")):
                raise NotSupported(first_line(error)) from None
            raise
    exact = [
        t.to(F64) if isinstance(t, Tensor) and t.is_floating_point() else t
        for t in s.copies(dtype)
    ]
    truth = s.reference or s.function
    fix = "find what depends on the dtype; compute in float32 what needs it"
    try:
        must_equal_rounded(s, ours, exact, dtype, truth, fix)
    except Fail:
        if s.reference is None or not _reference_is_no_better(s, exact, dtype, ours):
            raise
    kinds = [y.dtype for y in outputs if y.is_floating_point()]
    gave = "" if all(k == dtype for k in kinds) else f", gives {dtype_name(kinds[0])}"
    return f"as in float64, to {dtype_name(dtype)}'s rounding{gave}"


def _reference_is_no_better(
    s: Subject, exact: list[Any], dtype: torch.dtype, ours: Any
) -> bool:
    """Whether the function errs by at most four times what the reference does in that
    dtype."""
    try:
        right = s.right_gradients(exact, function=s.reference)
        theirs = s.right_gradients(s.copies(dtype), function=s.reference)
        for times in (1.0, 4.0, 16.0):
            try:
                must_equal(s, theirs, right, s.tolerance(dtype) * times / 4)
            except Fail:
                continue
            must_equal(s, ours, right, s.tolerance(dtype) * times)
            return True
    except Exception:  # where the reference has no such dtype, it sets no standard
        pass
    return False
