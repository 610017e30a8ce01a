"""Tools of the examination: comparing tensors, walking graphs, replacing backwards."""

from __future__ import annotations

import random
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

F64 = torch.float64
# How far two computations of one number in the same dtype may be apart, say with other
# strides: a few roundings of the terms that are summed. In float64 and float32 this
# sees any wrong factor, in bfloat16 (0.12) and float16 (0.016) gross ones.
TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.bfloat16: 16 * torch.finfo(torch.bfloat16).eps,
    torch.float16: 16 * torch.finfo(torch.float16).eps,
}


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


def cloned(arguments: Sequence[Any]) -> list[Any]:
    """The arguments with each tensor detached and copied."""
    return [t.detach().clone() if isinstance(t, Tensor) else t for t in arguments]


def flatten(output: Any) -> list[Tensor]:
    """The tensors of what a function returned."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        return [t for part in output for t in flatten(part)]
    return []


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All entries of the tensors, end to end, in float64 on the CPU."""
    parts = [t.detach().reshape(-1).to("cpu", F64) for t in tensors]
    return torch.cat(parts) if parts else torch.empty(0, dtype=F64, device="cpu")


def largest_of(t: Tensor) -> float:
    """The largest finite |entry|, 0 if there is none."""
    values = t.detach().to(F64)
    finite = values[values.isfinite()].abs()
    return finite.max().item() if finite.numel() else 0.0


def difference(
    actual: Tensor, expected: Tensor, tolerance: float, floor: float = 0.0
) -> str:
    """How `actual` differs from `expected` by more than `tolerance` of the largest
    entry plus `floor`, in words; "" if it does not."""
    if actual.shape != expected.shape:
        return f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if actual.numel() == 0:
        return ""
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    if not expected.is_floating_point():
        return "" if torch.equal(actual, expected) else f"other {expected.dtype} values"
    actual, expected = actual.to(F64), expected.to(F64)
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    errors = (actual - expected).abs().masked_fill(same, 0)
    largest, worst = largest_of(expected), errors.max().item()
    if worst <= tolerance * largest + floor:  # False for NaN
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
        if text := difference(a, e, tolerance, least + floor):
            return f"{label}: {text}"
    return ""


def nodes_of(outputs: Sequence[Tensor]) -> list[Any]:
    """Every node of the graph behind the outputs."""
    nodes: dict[Any, None] = {}
    waiting = [y.grad_fn for y in outputs if y.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node not in nodes:
            nodes[node] = None
            waiting += [n for n, _ in node.next_functions if n is not None]
    return list(nodes)


def variables_of(outputs: Sequence[Tensor]) -> list[Tensor]:
    """The leaves of that graph."""
    return [n.variable for n in nodes_of(outputs) if hasattr(n, "variable")]


def custom_nodes(outputs: Sequence[Tensor]) -> list[Any]:
    """The nodes of that graph that are autograd.Functions written in Python."""
    return [n for n in nodes_of(outputs) if hasattr(n, "_forward_cls")]


@contextmanager
def replaced_attribute(cls: type, name: str, value: Any) -> Iterator[None]:
    """Within the block the attribute of the class is `value`."""
    own = cls.__dict__.get(name)
    setattr(cls, name, value)
    try:
        yield
    finally:
        if own is None:  # inherited
            delattr(cls, name)
        else:
            setattr(cls, name, own)


@contextmanager
def replaced_backward(
    classes: Sequence[type], make: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Within the block the backward of each class is what `make` makes of it."""
    with ExitStack() as stack:
        for cls in dict.fromkeys(classes):
            name = "backward" if cls.vjp is Function.vjp else "vjp"  # type: ignore[attr-defined]
            method = staticmethod(make(getattr(cls, name)))
            stack.enter_context(replaced_attribute(cls, name, method))
        yield


@contextmanager
def no_memory_of_batched_tensors() -> Iterator[None]:
    """Within the block a batched tensor refuses `data`, `numpy` and `data_ptr`.

    It has no memory of its own: what reads there may end the process.
    """
    functorch = torch._C._functorch

    def guarded(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def method(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            if functorch.is_batchedtensor(self) or functorch.is_legacy_batchedtensor(
                self
            ):
                raise RuntimeError(f".{name} of a batched tensor, which has no memory")
            return original(self, *args, **kwargs)

        return method

    data = torch._C.TensorBase.data
    getter = guarded("data", data.__get__)  # type: ignore[attr-defined]
    with ExitStack() as stack:
        for name, guard in {
            "numpy": guarded("numpy", Tensor.numpy),
            "data_ptr": guarded("data_ptr", Tensor.data_ptr),
            "data": property(getter, data.__set__),  # type: ignore[attr-defined]
        }.items():
            stack.enter_context(replaced_attribute(Tensor, name, guard))
        yield


def first_line(error: BaseException) -> str:
    """The error in one line of at most 160 characters."""
    text = " ".join(str(error).split("\n\n")[0].split())
    text = text if len(text) <= 160 else text[:159].rstrip() + "…"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def place_of(error: BaseException) -> str:
    """The last line of the caller's code that the error passed through, or ""."""
    own = __name__.rpartition(".")[0].replace(".", "/")
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        file = frame.filename.replace("\\", "/")
        if "/torch/" not in file and own not in file and frame.line:
            return f"line {frame.lineno} of {file.rpartition('/')[2]}, {frame.line}"
    return ""
