"""torch.func, forward mode, torch.compile, autocast, another device."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torchbp.examination.subject import Subject
from torchbp.examination.tools import (
    TOLERANCE,
    custom_nodes,
    difference,
    differences,
    flatten,
    random_like,
    replaced_backward,
)
from torchbp.examination.verdicts import (
    TIGHT,
    Fail,
    NotApplicable,
    differentiated,
    dtype_name,
    is_large,
    labels_of,
    must_equal,
    needs_float64,
    numbered,
    supported,
)

_SETUP = (
    "write forward without ctx, add setup_context, and generate_vmap_rule = True or "
    "a vmap staticmethod"
)
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
        with supported(_SETUP):
            # A loop over torch.func.grad needs its support, too.
            ours = flatten(torch.func.vmap(f, in_dims=dims, randomness="same")(*mapped))
            for k in range(3):
                single = list(arguments)
                for i, parts in stacks.items():
                    single[i] = parts[k].clone()
                looped.append(flatten(f(*single)))
        for mine, theirs in zip(ours, zip(*looped, strict=True), strict=True):
            if found := difference(mine, torch.stack(theirs), TOLERANCE[s.dtype]):
                raise Fail(
                    f"mapped over {name}, a {what} is {found}",
                    "let the vmap rule keep the examples apart, whichever argument is "
                    "mapped, along whichever dimension",
                )
    return "each argument, and all, as a loop"


def batched_gradients(s: Subject) -> str:
    """Several output gradients at once, as one by one."""
    leaves, outputs = differentiated(s)
    sets = [s.cotangents(outputs, seed) for seed in range(3)]
    stacked = [torch.stack(gs) for gs in zip(*sets, strict=True)]
    looped = []
    for gs in sets:
        own_leaves, own_outputs = differentiated(s)
        looped.append(s.pull_back(own_outputs, own_leaves, gs))
    with supported("work out of place in backward, by operations that vmap knows"):
        ours = torch.autograd.grad(
            outputs, leaves, stacked, allow_unused=True, is_grads_batched=True
        )
    for o, parts, label in zip(
        ours, zip(*looped, strict=True), labels_of(s), strict=True
    ):
        right = torch.stack(parts)
        o = torch.zeros_like(right) if o is None else o
        if found := difference(o, right, TOLERANCE[s.dtype]):
            raise Fail(f"the gradient of {label} is {found}", "work out of place")
    return "is_grads_batched, as one by one"


def jacrev(s: Subject) -> str:
    """Beside the rows of autograd.grad: what backward is wrong in is told elsewhere."""
    return _jacobian(s, torch.func.jacrev, _by_rows(s), TOLERANCE[s.dtype], _SETUP)


def jacfwd(s: Subject) -> str:
    """Beside finite differences."""
    needs_float64(s)
    small(s)
    transform = functools.partial(torch.func.jacfwd, randomness="same")
    return _jacobian(s, transform, s.jacobian, TIGHT["rtol"], _JVP)


def small(s: Subject) -> None:
    if is_large(s):
        raise NotApplicable("the Jacobian is too large: give smaller inputs")


def _by_rows(s: Subject) -> list[Tensor]:
    small(s)
    arguments = s.copies()
    leaves = s.leaves(arguments)
    flat = torch.cat([y.reshape(-1) for y in s.differentiable(arguments)])
    rows = [
        [g.reshape(-1) for g in s.pull_back([flat], leaves, [unit], retain_graph=True)]
        for unit in torch.eye(len(flat), dtype=flat.dtype, device=flat.device)
    ]
    return [torch.stack(parts) for parts in zip(*rows, strict=True)]


def _jacobian(
    s: Subject, transform: Any, right: list[Tensor], tolerance: float, mend: str
) -> str:
    arguments = s.copies()
    f = s.closure(arguments)

    def flat(*tensors: Tensor) -> Tensor:
        return torch.cat([y.reshape(-1) for y in f(*tensors)])

    at = [arguments[i].detach() for i in s.floats]
    with supported(mend):
        ours = transform(flat, argnums=tuple(range(len(at))))(*at)
    for o, r, label in zip(ours, right, labels_of(s), strict=True):
        if found := difference(o.reshape(r.shape), r, tolerance, tolerance):
            raise Fail(f"by {label}: {found}", "see the other findings")
    return "the right Jacobian"


def jvp(s: Subject) -> str:
    """torch.func.jvp beside finite differences."""

    def push(f: Any, at: list[Tensor], tangents: list[Any]) -> list[Tensor]:
        zeros = [torch.zeros_like(t) for t in at]
        given = [z if v is None else v for v, z in zip(tangents, zeros, strict=True)]
        return flatten(torch.func.jvp(f, tuple(at), tuple(given))[1])

    return _forward_mode(s, push)


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

    return _forward_mode(s, push)


def _forward_mode(s: Subject, push: Callable[..., list[Tensor]]) -> str:
    """J v beside finite differences, for a tangent of each argument and of all."""
    needs_float64(s)
    small(s)
    arguments = s.copies()
    f = s.closure(arguments)
    at = [arguments[i].detach() for i in s.floats]
    generator = torch.Generator("cpu").manual_seed(s.seed)
    tangents = [random_like(t, generator).to(t.device) for t in at]
    choices = [[k] for k in range(len(at))]
    if len(at) > 1:
        choices.append(list(range(len(at))))
    for chosen in choices:
        given = [v if k in chosen else None for k, v in enumerate(tangents)]
        with supported(_JVP):
            ours = torch.cat([v.reshape(-1) for v in push(f, at, given)])
        right = torch.stack(
            [s.jacobian[k] @ tangents[k].reshape(-1) for k in chosen if at[k].numel()]
        ).sum(0)
        if found := difference(ours, right, TIGHT["rtol"], 1e-6):
            names = ", ".join(labels_of(s)[k] for k in chosen)
            raise Fail(
                f"along {names} it is {found}: not what the forward does",
                "jvp is J v: derive it from forward; a tangent may be None",
            )
    return "each argument, and all, as finite differences"


# ---------------------------------------------------------------- compile, autocast


def _compiled(s: Subject) -> Any:
    # New code for each call: Dynamo keeps what it compiled by the code object.
    def run(*arguments: Any) -> Any:
        return s.function(*arguments)

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
    must_equal(s, ours, right, TOLERANCE[s.dtype], "see what the compiler made of it")
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
    if not differences(ours, right, labels_of(s), TOLERANCE[s.dtype]):
        raise Fail(
            "a backward that is wrong on purpose makes no difference: not it ran",
            "avoid torch.func inside what is compiled; try another torch",
        )
    if found := differences(ours, wrong, labels_of(s), TOLERANCE[s.dtype]):
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
    right = s.gradients(s.copies(torch.float32))
    tolerance = TOLERANCE[torch.bfloat16]
    must_equal(s, (outputs, grads), right, tolerance, "settle the dtype before forward")
    made = sorted({dtype_name(y.dtype) for y in outputs if y.is_floating_point()})
    return f"gives {', '.join(made)}"


def determinism(s: Subject) -> str:
    """Twice the same gives the same bits."""
    first, second = (s.gradients(s.copies(s.own_dtype)) for _ in range(2))
    names = [*numbered(first[0]), *(f"gradient of {n}" for n in labels_of(s))]
    for a, b, name in zip([*second[0], *second[1]], [*first[0], *first[1]], names,
                          strict=True):  # fmt: skip
        if found := difference(a, b, 0.0):
            raise Fail(
                f"the same again: the {name} is {found}", "leave no state behind"
            )
    return "the same bits again"


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
