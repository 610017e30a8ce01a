"""The same function under torch.compile, under autocast and on another device."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch

from torchbp.examination.precision import must_equal_rounded
from torchbp.examination.subject import Subject
from torchbp.examination.tools import custom_nodes, differences, replaced_backward
from torchbp.examination.verdicts import (
    Fail,
    NotApplicable,
    dtype_name,
    must_equal,
    same_gradients,
    supported,
)


def _compiled(s: Subject) -> Any:
    """The function, compiled anew: Dynamo remembers what it compiled by the code
    object."""
    function = getattr(s.function, "functional", s.function)

    def run(*arguments: Any) -> Any:
        return function(*arguments)

    code = run.__code__.replace(co_name="examined")
    fresh = types.FunctionType(code, run.__globals__, "examined", None, run.__closure__)
    return torch.compile(fresh, fullgraph=True, backend=s.backend or "aot_eager")


def _needs_backend(s: Subject) -> None:
    if s.backend is None:
        raise NotApplicable("not requested (compile=True, --compile)")


def compile(s: Subject) -> str:
    """Values and gradients under torch.compile are the eager ones."""
    _needs_backend(s)
    right = s.gradients(s.copies())
    with supported("use operations that torch.compile can trace, and no jvp"):
        ours = s.gradients(s.copies(), function=_compiled(s))
    must_equal(s, ours, right, s.tolerance(), "see what the compiler made of it")
    return f"as eager ({s.backend})"


def compiled_backward(s: Subject) -> str:
    """The compiled function runs the hand-written backward, by a backward that is wrong
    on purpose: right numbers do not show it, since a compiler may differentiate the
    forward itself."""
    _needs_backend(s)
    nodes = custom_nodes(s.new_graph()[1])
    if not nodes:
        raise NotApplicable("no Python autograd.Function in it")

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
        with supported("see the finding of compile"):
            _, ours = s.gradients(s.copies(), function=_compiled(s))
    if not differences(ours, right, s.names, s.tolerance()):
        raise Fail(
            "a backward that is wrong on purpose makes no difference, so another ran",
            "avoid torch.func inside what is compiled; try another torch",
        )
    what = "with a backward that is wrong on purpose,"
    same_gradients(s, ours, wrong, what, "see what the compiler made of it")
    return "the hand-written one is what runs"


def autocast(s: Subject) -> str:
    """Values and gradients under bfloat16 autocast are near those in float32."""
    device = s.device.type
    if not torch.amp.is_autocast_available(device):
        raise NotApplicable(f"no autocast on {device}")
    fix = "set the dtype before forward: torch.amp.custom_fwd and custom_bwd"
    arguments = s.copies(torch.float32)
    with supported(fix):
        leaves = s.leaves(arguments)
        with torch.autocast(device, torch.bfloat16):
            outputs = s.evaluate(arguments)
        grads = s.pull_back(outputs, leaves)
    exact = s.copies(torch.float32)
    must_equal_rounded(s, (outputs, grads), exact, torch.bfloat16, s.function, fix)
    dtypes = sorted({dtype_name(y.dtype) for y in outputs if y.is_floating_point()})
    return f"gives {', '.join(dtypes)}"


def second_device(s: Subject) -> str:
    """Another device gives the same, in float32."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if s.device.type != "cpu":
        return on_device(s, "cpu")
    if accelerator is None:
        raise NotApplicable("no second device")
    return on_device(s, accelerator.type)


def on_device(s: Subject, other: str) -> str:
    """Values and gradients on that device are those on the subject's own."""
    right = s.gradients(s.copies(torch.float32))
    with supported("make new tensors on the argument's device"):
        ours = s.gradients(s.copies(torch.float32, other))
    must_equal(s, ours, right, 1e-3, "see what depends on the device")
    return f"{other} as {s.device.type}"
