"""What is wrong with arguments, said in full; none of it runs while nothing is."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def explain(x: Any, W: Any, b: Any) -> Exception | None:
    """What is wrong with the arguments, in the order in which a reader would look."""
    named = [("input", x), ("weight", W), *([] if b is None else [("bias", b)])]
    for name, t in named:
        if not isinstance(t, Tensor):
            return TypeError(f"{name}: expected a Tensor, got {type(t).__name__}")
        if (reason := explain_storage(name, t)) is not None:
            return reason
    for name, t in named:
        if not t.is_floating_point():
            return TypeError(f"{name}: expected a real floating dtype, got {t.dtype}")
    if W.dim() != 2:
        return ValueError(
            f"weight: expected 2 dimensions (n_out, n_in), got shape {tuple(W.shape)}"
        )
    if x.dim() == 0:
        return ValueError("input: expected shape (*, n_in), got a 0-d tensor")
    if x.shape[-1] != W.shape[1]:
        return ValueError(
            f"input: expected last dimension {W.shape[1]} to fit weight "
            f"{tuple(W.shape)}, got shape {tuple(x.shape)}"
        )
    if b is not None and tuple(b.shape) != (W.shape[0],):
        return ValueError(f"bias: expected shape ({W.shape[0]},), got {tuple(b.shape)}")
    for name, t in named[1:]:
        if t.dtype != x.dtype:
            return TypeError(f"{name}: expected the input's {x.dtype}, got {t.dtype}")
    for name, t in named[1:]:
        if t.device != x.device:
            return ValueError(
                f"{name}: expected the input's device {x.device}, got {t.device}"
            )
    return None


def explain_storage(name: str, t: Tensor) -> TypeError | None:
    """What is wrong with a tensor whose entries are not numbers in strided memory."""
    if type(t).__name__ == "ExpandedWeight":  # asked for anything else, it raises
        return TypeError(
            f"{name}: expected a plain Tensor, got the ExpandedWeight of "
            "call_for_per_sample_grads; torch.func.vmap(torch.func.grad(...)) gives "
            "per-example gradients"
        )
    if t.is_nested:
        got = "a nested one"
    elif t.is_quantized:
        got = "a quantized one"
    elif t.layout is not torch.strided:
        got = f"one of layout {t.layout}"
    else:
        return None
    return TypeError(f"{name}: expected a dense Tensor, got {got}")


def explain_memory(name: str, t: Tensor) -> TypeError | None:
    """As :func:`explain_storage`, where the numbers themselves are needed."""
    if t.is_meta:
        return TypeError(f"{name}: expected a dense Tensor, got one on the device meta")
    return explain_storage(name, t)


def check_entrywise(role: str, f: Any) -> bool:
    """Try σ or σ' on five numbers that lie in the range of every usual σ; whether the
    result shares memory with the argument."""
    if not callable(f):
        raise TypeError(f"{role}: expected a callable, got {type(f).__name__}")
    probe = torch.linspace(0.1, 0.9, 5, dtype=torch.float64, device="cpu")
    argument = probe.clone()
    with torch.enable_grad():
        result = f(argument)
    if not isinstance(result, Tensor):
        raise TypeError(f"{role}: expected it to return a Tensor, got {result!r}")
    check_reads_no_parameter(role, f, result)
    if result.shape != probe.shape or result.dtype != probe.dtype:
        raise ValueError(
            f"{role}: expected an entrywise function, (5,) float64 -> (5,) float64, "
            f"got {tuple(result.shape)} {result.dtype}"
        )
    with torch.no_grad():
        singly = torch.cat([f(probe[i : i + 1].clone()) for i in range(5)])
    if not torch.allclose(singly, result, equal_nan=True):
        raise ValueError(
            f"{role}: expected an entrywise function, got one whose entries depend on "
            "each other"
        )
    if not torch.equal(argument, probe):
        raise ValueError(f"{role}: expected its argument unchanged, got it overwritten")
    return result.data_ptr() == argument.data_ptr()


def check_reads_no_parameter(role: str, f: Any, result: Tensor | None = None) -> None:
    """Raise ValueError if the `result` of `f`, for arguments that do not require grad,
    requires grad: then `f` reads a tensor that would never get its gradient. Without a
    result, if any of the tensors that `f` can name requires grad."""
    if result is None:
        found = [name for name, t in _tensors_read(f) if t.requires_grad]
    elif result.requires_grad:
        leaves = _leaves(result)
        names = [n for n, t in _tensors_read(f) if any(t is leaf for leaf in leaves)]
        found = names or [f"a tensor of shape {tuple(t.shape)}" for t in leaves]
    else:
        return
    if found:
        raise ValueError(
            f"{role}: expected a function of its arguments alone, got one that reads "
            f"{', '.join(found)}, which requires grad and would never get its "
            "gradient; give its values by .detach()"
        )


def _leaves(result: Tensor) -> list[Tensor]:
    """The leaf tensors that autograd would send gradients of `result` to."""
    if result.grad_fn is None:
        return [result]
    leaves: list[Tensor] = []
    waiting: list[Any] = [result.grad_fn]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        waiting += [below for below, _ in node.next_functions]
    return leaves


def _tensors_read(f: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a callable can name: in its closure, among the globals that it
    reads, in its defaults, as an attribute of its object or as an argument bound
    beforehand; and those that the functions among these can name."""
    waiting = [("", f)]
    seen: dict[
        int, Any
    ] = {}  # values, too: an id may come back once its object is gone
    while waiting:
        name, value = waiting.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, nn.Module):
            yield from ((_member(name, n), p) for n, p in value.named_parameters())
        else:
            waiting += _parts(name, value)


def _parts(name: str, value: Any) -> list[tuple[str, Any]]:
    """What lies directly in a value, with its name."""
    if isinstance(value, functools.partial):
        bound = [(f"{name}({i})", a) for i, a in enumerate(value.args)]
        return [*bound, *value.keywords.items(), (name, value.func)]
    if inspect.ismethod(value):
        return [("self", value.__self__), (name, value.__func__)]
    if inspect.isfunction(value):
        return [] if value.__module__.partition(".")[0] == "torch" else _names(value)
    if isinstance(value, (list, tuple)):
        return [(f"{name}[{i}]", v) for i, v in enumerate(value)]
    if isinstance(value, dict):
        return [(f"{name}[{k!r}]", v) for k, v in value.items()]
    if inspect.ismodule(value):
        of_module = vars(value).items()
        return [(_member(name, k), v) for k, v in of_module if isinstance(v, Tensor)]
    if inspect.isclass(value) or not hasattr(value, "__dict__"):
        return []
    return [(_member(name, k), v) for k, v in vars(value).items()]


def _names(f: Any) -> list[tuple[str, Any]]:
    """The variables around a function, and its defaults."""
    try:
        around = inspect.getclosurevars(f)
    except ValueError:  # a variable that has no value yet
        return []
    defaults = {k: p.default for k, p in inspect.signature(f).parameters.items()}
    return [*around.globals.items(), *around.nonlocals.items(), *defaults.items()]


def _member(name: str, attribute: str) -> str:
    return f"{name}.{attribute}" if name else attribute
