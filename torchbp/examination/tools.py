"""Tools of the examination: comparing tensors, walking graphs, replacing backwards."""

from __future__ import annotations

import random
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

# Two computations of one number in the same dtype, say with other strides, part by a
# few roundings of the terms that are summed. In float64 and float32 this sees any wrong
# factor, in bfloat16 (0.12) and float16 (0.016) gross ones.
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.bfloat16: 16 * torch.finfo(torch.bfloat16).eps,
    torch.float16: 16 * torch.finfo(torch.float16).eps,
}
F64 = torch.float64


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed Python's, NumPy's and torch's generators of the CPU and of the device."""
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def random_like(t: Tensor, generator: torch.Generator) -> Tensor:
    """Multiples of 1/8 between 1/8 and 2, of either sign, in float64 on the CPU."""
    size = torch.randint(1, 17, t.shape, generator=generator, device="cpu")
    sign = 2 * torch.randint(0, 2, t.shape, generator=generator, device="cpu") - 1
    return (size * sign).to(F64) / 8


def flatten(output: Any) -> list[Tensor]:
    """The tensors of what a function returned."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        return [t for part in output for t in flatten(part)]
    return []


def largest_of(t: Tensor) -> float:
    """The largest finite |entry|, 0 if there is none."""
    finite = t.detach()[t.detach().isfinite()].abs()
    return finite.max().item() if finite.numel() else 0.0


def difference(
    actual: Tensor, expected: Tensor, tolerance: float, floor: float = 0.0
) -> str:
    """How `actual` departs from `expected` by more than `tolerance` of the largest
    entry plus `floor`, in words; "" if it does not."""
    if actual.shape != expected.shape:
        return f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if actual.numel() == 0:
        return ""
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    if not expected.is_floating_point():
        return "" if torch.equal(actual, expected) else "other integers"
    actual, expected = actual.to(F64), expected.to(F64)
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    apart = (actual - expected).abs().masked_fill(same, 0)
    largest, worst = largest_of(expected), apart.max().item()
    if worst <= tolerance * largest + floor:  # never so for NaN
        return ""
    return f"off by {worst:.2g}, where the largest is {largest:.2g}"


def differences(
    actual: Sequence[Tensor],
    expected: Sequence[Tensor],
    labels: Sequence[str],
    tolerance: float,
    floor: float = 0.0,
) -> str:
    """The first of several differences, with its label."""
    overall = max(map(largest_of, expected), default=0.0)
    for a, e, label in zip(actual, expected, labels, strict=True):
        # What is 0 for one may be a rounding of terms that cancel, of the others' size
        # or of order 1, as the output gradients are.
        eps = torch.finfo(e.dtype).eps if e.is_floating_point() else 0.0
        least = 8 * eps + 1e-4 * tolerance * overall
        found = difference(a, e, tolerance, least + floor)
        if found:
            return f"{label}: {found}"
    return ""


def nodes_of(outputs: Sequence[Tensor]) -> list[Any]:
    """Every node of the graph behind the outputs."""
    found: dict[Any, None] = {}
    waiting = [y.grad_fn for y in outputs if y.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node not in found:
            found[node] = None
            waiting += [n for n, _ in node.next_functions if n is not None]
    return list(found)


def variables_of(outputs: Sequence[Tensor]) -> list[Tensor]:
    """The leaves of that graph."""
    nodes = nodes_of(outputs)
    return [n.variable for n in nodes if hasattr(n, "variable")]


def custom_nodes(outputs: Sequence[Tensor]) -> list[Any]:
    """The nodes of the graph that are autograd.Functions written in Python."""
    return [n for n in nodes_of(outputs) if hasattr(n, "_forward_cls")]


@contextmanager
def replaced_backward(
    classes: Sequence[type], make: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Within the block the backward of each class is what `make` makes of it."""
    restore: list[tuple[type, str, Any]] = []
    try:
        for cls in dict.fromkeys(classes):
            name = "backward" if cls.vjp is Function.vjp else "vjp"  # type: ignore[attr-defined]
            restore.append((cls, name, cls.__dict__.get(name)))
            setattr(cls, name, staticmethod(make(getattr(cls, name))))
        yield
    finally:
        for cls, name, own in restore:
            if own is None:
                delattr(cls, name)
            else:
                setattr(cls, name, own)


@contextmanager
def no_memory_of_batched_tensors() -> Iterator[None]:
    """Within the block a batched tensor refuses `data`, `numpy` and `data_ptr`.

    It has no memory of its own: what reads there may end the process.
    """
    functorch = torch._C._functorch

    def refuse(t: Tensor, name: str) -> None:
        if functorch.is_batchedtensor(t) or functorch.is_legacy_batchedtensor(t):
            raise RuntimeError(f".{name} of a batched tensor, which has no memory")

    def guarded(name: str) -> Callable[..., Any]:
        original = getattr(Tensor, name)

        def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            refuse(self, name)
            return original(self, *args, **kwargs)

        return method

    def data(self: Tensor) -> Tensor:
        refuse(self, "data")
        result: Tensor = torch._C.TensorBase.data.__get__(self)  # type: ignore[attr-defined]
        return result

    guards = {name: guarded(name) for name in ("numpy", "data_ptr")}
    guards["data"] = property(data, torch._C.TensorBase.data.__set__)  # type: ignore
    own = {name: Tensor.__dict__.get(name) for name in guards}
    try:
        for name, guard in guards.items():
            setattr(Tensor, name, guard)
        yield
    finally:
        for name, before in own.items():
            if before is None:
                delattr(Tensor, name)
            else:
                setattr(Tensor, name, before)


def first_line(error: BaseException) -> str:
    """The error in one line, without its end if that is far."""
    text = " ".join(str(error).split("\n\n")[0].split())
    text = text if len(text) <= 160 else text[:159].rstrip() + "…"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def place_of(error: BaseException) -> str:
    """The last line of the caller's code that the error came through, or ""."""
    own = __name__.rpartition(".")[0].replace(".", "/")
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = frame.filename.replace("\\", "/")
        if "/torch/" not in file and own not in file and frame.line:
            return f"line {frame.lineno} of {file.rpartition('/')[2]}, {frame.line}"
    return ""
