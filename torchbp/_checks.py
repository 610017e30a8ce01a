"""Checks of tensor arguments: a cheap test at each call, and the error messages, which
are made only after the test or the call has failed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def layer_fits(x: Tensor, W: Tensor, b: Tensor | None) -> bool:
    """Return False for what F.linear accepts and a layer refuses: 1-D weights,
    integers, biases that broadcast or are promoted, a weight on "meta". F.linear itself
    rejects other bad arguments; :func:`explain` has the message for both."""
    return (
        W.dim() == 2
        and W.is_floating_point()
        and (not W.is_meta or x.is_meta)
        and (
            b is None
            or (b.dim() == 1 and b.size(0) == W.size(0) and b.dtype is x.dtype)
        )
    )


def explain(x: Any, W: Any, b: Any) -> Exception | None:
    """Return the first error in a layer's arguments, None if they fit."""
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


A2 = (
    "target: expected one that is not differentiated (A2: a cost depends on the "
    "parameters through the outputs only), got {}"
)


def is_dense(t: Any) -> bool:
    """Return whether `t` is a tensor without an error of :func:`explain_storage`."""
    return (
        isinstance(t, Tensor)
        and t.layout is torch.strided
        and not (t.is_nested or t.is_quantized)
    )


def cost_fits(input: Tensor, target: Tensor) -> bool:
    """Return whether a cost's dense arguments fit; the range of labels is not
    checked."""
    shape, dtype = input.shape, target.dtype
    if dtype is input.dtype:
        fits = dtype.is_floating_point and target.shape == shape
    else:
        is_integer = not (dtype.is_floating_point or dtype.is_complex)
        fits = is_integer and dtype is not torch.bool and input.is_floating_point()
        fits = fits and target.shape == shape[:-1]
    return bool(
        fits
        and len(shape)
        and shape[-1]
        and target.device == input.device
        and not target.requires_grad
    )


def explain_cost(input: Tensor, target: Tensor) -> Exception:
    """Return the error for a cost's arguments that do not fit."""
    if not input.is_floating_point():
        return TypeError(f"input: expected a real floating dtype, got {input.dtype}")
    if input.dim() == 0:
        return ValueError("input: expected shape (*, K), got a 0-d tensor")
    shape = tuple(input.shape)
    if shape[-1] == 0:
        return ValueError(f"input: expected shape (*, K) with K >= 1, got {shape}")
    is_label = not (target.is_floating_point() or target.is_complex())
    if target.dtype == torch.bool or not (is_label or target.dtype == input.dtype):
        return TypeError(
            f"target: expected the input's {input.dtype} or integer labels, "
            f"got {target.dtype}"
        )
    if tuple(target.shape) != (shape[:-1] if is_label else shape):
        return ValueError(
            f"target: expected shape {shape}, or {shape[:-1]} for integer labels, "
            f"got {tuple(target.shape)} {target.dtype}"
        )
    if target.device != input.device:
        return ValueError(
            f"target: expected the input's device {input.device}, got {target.device}"
        )
    return ValueError(A2.format("requires_grad=True"))


def explain_storage(name: str, t: Tensor) -> TypeError | None:
    """Return the error for a tensor whose entries are not numbers in strided memory,
    None for any other."""
    if type(t).__name__ == "ExpandedWeight":  # any other question makes it raise
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
    """Return the error of :func:`explain_storage`, or that for a tensor without numbers
    (meta), None for any other."""
    if t.is_meta:
        return TypeError(f"{name}: expected a dense Tensor, got one on the device meta")
    return explain_storage(name, t)
