"""torch.func, forward mode, torch.compile, autocast, another device."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchbp.examination.differences import CLOSE, ROUNDINGS, Slopes
from torchbp.examination.subject import Subject
from torchbp.examination.tools import (
    custom_nodes,
    difference,
    differences,
    flatten,
    no_memory_of_batched_tensors,
    random_like,
    replaced_backward,
)
from torchbp.examination.verdicts import (
    Fail,
    NotApplicable,
    Warn,
    dtype_name,
    is_large,
    must_equal,
    must_equal_rounded,
    needs_float64,
    needs_own_graph,
    numbered,
    supported,
)

_SETUP = (
    "write forward without ctx, add setup_context, and generate_vmap_rule = True or "
    "a vmap staticmethod"
)
_DERIVE = "jvp is J v: derive it from forward; a tangent may be None"
_JVP = "add setup_context, with save_for_forward, and a jvp staticmethod"


def _batches(s: Subject, i: int) -> list[Tensor]:
    """Three versions of argument i that are in its domain and differ."""
    t = s.copies()[i].detach()
    flipped = t.flip(0) if t.dim() else t
    return [t, 0.75 * t, 0.5 * flipped]


def _mapped(s: Subject) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """What is mapped over: each argument alone, along its first and last dimension,
    then all together."""
    for i in s.floats:
        yield s.labels[i], (i,), 0
    yield s.labels[s.floats[0]], (s.floats[0],), -1
    if len(s.floats) > 1:
        yield "all arguments", tuple(s.floats), 0


def vmap(s: Subject) -> str:
    """Values under vmap are those of a loop."""

    def f(*tensors: Any) -> tuple[Tensor, ...]:
        return tuple(s.evaluate(tensors))

    return _map_and_compare(s, f, "value")


def vmap_of_grad(s: Subject) -> str:
    """Gradients of each example under vmap(grad) are those of a loop."""
    needs_own_graph(s)
    f = s.closure(s.copies())
    own = s.copies()
    cotangents = s.cotangents(f(*[own[i] for i in s.floats]))

    def total(*tensors: Any) -> Tensor:
        outputs = f(*[tensors[i] for i in s.floats])
        products = [(y * g).sum() for y, g in zip(outputs, cotangents, strict=True)]
        return torch.stack(products).sum()

    return _map_and_compare(s, torch.func.grad(total, argnums=s.floats), "gradient")


def _map_and_compare(s: Subject, f: Callable[..., Any], what: str) -> str:
    for name, which, dim in _mapped(s):
        stacks = {i: _batches(s, i) for i in which}
        arguments = s.copies()
        looped = []
        mapped: list[Any] = list(arguments)
        for i, parts in stacks.items():
            mapped[i] = torch.stack(parts, dim)
        dims = tuple(dim if i in which else None for i in range(len(mapped)))
        with supported(_SETUP), no_memory_of_batched_tensors():
            # A loop over torch.func.grad needs its support, too.
            ours = flatten(torch.func.vmap(f, in_dims=dims, randomness="same")(*mapped))
            for k in range(3):
                single = list(arguments)
                for i, parts in stacks.items():
                    single[i] = parts[k].clone()
                looped.append(flatten(f(*single)))
        for mine, theirs in zip(ours, zip(*looped, strict=True), strict=True):
            if found := difference(mine, torch.stack(theirs), s.tolerance()):
                raise Fail(
                    f"mapped over {name}, a {what} is {found}",
                    "let the vmap rule keep the examples apart, whichever argument is "
                    "mapped, along whichever dimension",
                )
    return "each argument, and all, as a loop"


def batched_gradients(s: Subject) -> str:
    """Several output gradients at once, as one by one."""
    needs_own_graph(s)
    leaves, outputs = s.new_graph()
    sets = [s.cotangents(outputs, seed) for seed in range(3)]
    stacked = [torch.stack(gs) for gs in zip(*sets, strict=True)]
    looped = [s.gradients(s.copies(), cotangents=gs)[1] for gs in sets]
    fix = "work out of place in backward, by operations that vmap knows"
    with supported(fix), no_memory_of_batched_tensors():
        ours = torch.autograd.grad(
            outputs, leaves, stacked, allow_unused=True, is_grads_batched=True
        )
    for o, parts, label in zip(ours, zip(*looped, strict=True), s.names, strict=True):
        right = torch.stack(parts)
        o = torch.zeros_like(right) if o is None else o
        if found := difference(o, right, s.tolerance()):
            raise Fail(f"the gradient of {label} is {found}", fix)
    return "is_grads_batched, as one by one"


def jacrev(s: Subject) -> str:
    """Its rows, weighted, are what autograd.grad gives from these weights."""
    needs_own_graph(s)
    small(s)
    arguments = s.copies()
    f = s.closure(arguments)
    at = [arguments[i].detach() for i in s.floats]
    with supported(_SETUP), no_memory_of_batched_tensors():
        rows = torch.func.jacrev(_end_to_end(f), argnums=tuple(range(len(at))))(*at)
    _, outputs = s.new_graph()
    gs = s.cotangents(outputs)
    weights = torch.cat([g.reshape(-1) for g in gs])
    _, right = s.gradients(s.copies(), cotangents=gs)
    if not all(t.isfinite().all() for t in right):
        raise NotApplicable("a gradient is infinite: move the input away from the pole")
    ours = [(weights @ J.reshape(len(weights), r.numel())).reshape(r.shape)
            for J, r in zip(rows, right, strict=True)]  # fmt: skip
    if found := differences(ours, right, s.names, s.tolerance()):
        raise Fail(
            f"by {found}",
            "work out of place in backward, by operations that vmap knows",
        )
    return "as autograd.grad"


def _end_to_end(f: Callable[..., Any]) -> Callable[..., Tensor]:
    return lambda *tensors: torch.cat([y.reshape(-1) for y in f(*tensors)])


def small(s: Subject) -> None:
    if is_large(s):
        raise NotApplicable("the Jacobian is too large: give smaller inputs")


# ---------------------------------------------------------------- forward mode


class _Forward:
    """What the checks of forward mode share: a point, tangents, and the right result
    of these, by finite differences or as the surrogate's."""

    def __init__(self, s: Subject) -> None:
        needs_float64(s)
        small(s)
        self.s, arguments = s, s.copies()
        self.f = s.closure(arguments)
        self.at = [arguments[i].detach() for i in s.floats]
        generator = torch.Generator("cpu").manual_seed(s.seed)
        self.tangents = [random_like(t, generator).to(t.device) for t in self.at]
        self.choices = [[k] for k in range(len(self.at))]
        if len(self.at) > 1:
            self.choices.append(list(range(len(self.at))))

    def off(self, ours: Tensor, tangents: list[Any]) -> str:
        """How `ours` departs from J v, in words; "" if it does not."""
        s = self.s
        if s.surrogate is not None:
            right = _flat(self._pushed_through_surrogate(tangents))
            return difference(ours, right, CLOSE, 1e-9)
        length = max(1.0, sum(v.norm().item() for v in tangents if v is not None) / 2)
        direction = [None if v is None else v.cpu() / length for v in tangents]
        slopes = Slopes(self.f, self.at, s.seed)
        noise = slopes.noise.max().item() if slopes.noise.numel() else 0.0
        found = []
        for step in slopes.steps:
            right = length * slopes.slope(direction, step)
            close = max(CLOSE, s.requested_tolerance or 0, slopes.curvature(step))
            floor = ROUNDINGS * noise * length / step + 1e-9
            found.append(difference(ours, right, close, floor))
        if all(found) and slopes.is_kink(direction):
            raise NotApplicable("a kink or a pole: move the input away from it")
        return found[0] if all(found) else ""

    def _pushed_through_surrogate(self, tangents: list[Any]) -> list[Tensor]:
        s, full = self.s, self.s.copies()

        def surrogate(*tensors: Tensor) -> Any:
            for i, t in zip(s.floats, tensors, strict=True):
                full[i] = t
            return s.evaluate(full, s.surrogate)

        return _pushed(surrogate, self.at, tangents)

    def check(self, push: Callable[..., list[Tensor]], fix: str) -> str:
        for chosen in self.choices:
            given = [v if k in chosen else None for k, v in enumerate(self.tangents)]
            with supported(_JVP), no_memory_of_batched_tensors():
                ours = _flat(push(self.f, self.at, given))
            if not (found := self.off(ours, given)):
                continue
            names = ", ".join(self.s.names[k] for k in chosen)
            if not ours.any():
                raise Warn(
                    f"along {names} the tangent is dropped without an error",
                    "do without forward mode: a custom operator has no jvp; torch's "
                    "operations have, and an autograd.Function with a jvp",
                )
            raise Fail(f"along {names} it is {found}: not what the forward does", fix)
        return "each argument, and all, as finite differences"


def _flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().reshape(-1).to("cpu", torch.float64) for t in tensors])


def _pushed(f: Any, at: list[Tensor], tangents: list[Any]) -> list[Tensor]:
    zeros = [torch.zeros_like(t) for t in at]
    given = [z if v is None else v for v, z in zip(tangents, zeros, strict=True)]
    return flatten(torch.func.jvp(f, tuple(at), tuple(given))[1])


def jvp(s: Subject) -> str:
    """torch.func.jvp beside finite differences."""
    return _Forward(s).check(_pushed, _DERIVE)


def dual_numbers(s: Subject) -> str:
    """Forward-mode AD beside finite differences."""

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

    return _Forward(s).check(push, _DERIVE)


def jacfwd(s: Subject) -> str:
    """Its columns, weighted by tangents, beside finite differences."""

    def push(f: Any, at: list[Tensor], tangents: list[Any]) -> list[Tensor]:
        transform = torch.func.jacfwd(
            _end_to_end(f), argnums=tuple(range(len(at))), randomness="same"
        )
        pairs = zip(transform(*at), tangents, strict=True)
        parts = [
            J.reshape(len(J), v.numel()) @ v.reshape(-1)
            for J, v in pairs
            if v is not None
        ]
        return [torch.stack(parts).sum(0)]

    return _Forward(s).check(push, "let jvp take tangents that vmap has batched")


# ---------------------------------------------------------------- compile, autocast


def _compiled(s: Subject) -> Any:
    # New code for each call: Dynamo keeps what it compiled by the code object.
    function = getattr(s.function, "functional", s.function)

    def run(*arguments: Any) -> Any:
        return function(*arguments)

    code = run.__code__.replace(co_name="examined")
    fresh = types.FunctionType(code, run.__globals__, "examined", None, run.__closure__)
    return torch.compile(fresh, fullgraph=True, backend=s.backend or "aot_eager")


def compile(s: Subject) -> str:
    """Values and gradients under torch.compile are the eager ones."""
    if s.backend is None:
        raise NotApplicable("not asked for (compile=True, --compile)")
    right = s.gradients(s.copies())
    with supported("torch.compile takes no jvp, and operations that it can trace"):
        ours = s.gradients(s.copies(), function=_compiled(s))
    must_equal(s, ours, right, s.tolerance(), "see what the compiler made of it")
    return f"as eager ({s.backend})"


def compiled_backward(s: Subject) -> str:
    """Right numbers do not show whose backward ran, since a compiler may differentiate
    the forward itself. So it is run once more with the backward wrong on purpose."""
    if s.backend is None:
        raise NotApplicable("not asked for (compile=True, --compile)")
    arguments = s.copies()
    s.leaves(arguments)
    nodes = custom_nodes(s.evaluate(arguments))
    if not nodes:
        raise NotApplicable("no autograd.Function of Python's in it")

    def doubled(original: Callable[..., Any]) -> Callable[..., Any]:
        def backward(ctx: Any, *grads: Any) -> Any:
            result = original(ctx, *grads)
            if isinstance(result, tuple):
                return tuple(None if r is None else r * 2 for r in result)
            return None if result is None else result * 2

        return backward

    _, right = s.gradients(s.copies())
    with replaced_backward([n._forward_cls for n in nodes], doubled):
        _, wrong = s.gradients(s.copies())
        with supported("see the finding before this one"):
            _, ours = s.gradients(s.copies(), function=_compiled(s))
    if not differences(ours, right, s.names, s.tolerance()):
        raise Fail(
            "a backward that is wrong on purpose makes no difference: not it ran",
            "avoid torch.func inside what is compiled; try another torch",
        )
    if found := differences(ours, wrong, s.names, s.tolerance()):
        raise Fail(f"made wrong on purpose, the gradient of {found}", "")
    return "the hand-written one is what runs"


def autocast(s: Subject) -> str:
    """Values and gradients under bfloat16 autocast are near those in float32."""
    device = s.device.type
    if not torch.amp.is_autocast_available(device):
        raise NotApplicable(f"no autocast on {device}")
    arguments = s.copies(torch.float32)
    with supported("let torch.amp.custom_fwd and custom_bwd settle the dtype"):
        leaves = s.leaves(arguments)
        with torch.autocast(device, torch.bfloat16):
            outputs = s.evaluate(arguments)
        grads = s.pull_back(outputs, leaves)
    fix = "settle the dtype before forward: torch.amp.custom_fwd and custom_bwd"
    exact = s.copies(torch.float32)
    must_equal_rounded(s, (outputs, grads), exact, torch.bfloat16, s.function, fix)
    made = sorted({dtype_name(y.dtype) for y in outputs if y.is_floating_point()})
    return f"gives {', '.join(made)}"


def determinism(s: Subject) -> str:
    """Twice the same, with the same seed, gives the same bits; and backward draws no
    random numbers of its own."""
    first, second = (s.gradients(s.copies(s.own_dtype)) for _ in range(2))
    names = [*numbered(first[0]), *(f"gradient of {n}" for n in s.names)]
    tolerance = s.tolerance(s.own_dtype)
    for a, b, name in zip([*second[0], *second[1]], [*first[0], *first[1]], names,
                          strict=True):  # fmt: skip
        if found := difference(a, b, 0.0):
            rounding = not difference(a, b, tolerance)
            raise (Warn if rounding else Fail)(
                f"the same again: the {name} is {found}",
                "sum in a fixed order" if rounding else "leave no state behind",
            )
    _, grads = s.gradients(s.copies())
    if found := differences(_reseeded(s), grads, s.names, s.tolerance()):
        raise Fail(
            f"backward draws random numbers: with another seed the gradient of {found}",
            "draw in forward and save what was drawn; noise that is meant belongs into "
            "a hook, or skip this check",
        )
    return "the same bits again"


def _reseeded(s: Subject) -> list[Tensor]:
    """The gradients with other random numbers in backward alone."""
    leaves, outputs = s.new_graph()
    other = replace(s, seed=s.seed + 1)
    return other.pull_back(outputs, leaves, s.cotangents(outputs))


def second_device(s: Subject) -> str:
    """Another device gives the same, in float32."""
    own = s.device.type
    other = None
    if hasattr(torch, "accelerator") and torch.accelerator.is_available():
        found = torch.accelerator.current_accelerator()
        other = None if found is None else found.type
    if own != "cpu":
        other = "cpu"
    if other is None or other == own:
        raise NotApplicable("no second device")
    return on_device(s, other)


def on_device(s: Subject, other: str) -> str:
    """Values and gradients there are those on the subject's own device."""
    right = s.gradients(s.copies(torch.float32))
    with supported("make new tensors on the argument's device"):
        ours = s.gradients(s.copies(torch.float32, other))
    must_equal(s, ours, right, 1e-3, "see what depends on the device")
    return f"{other} as {s.device.type}"
