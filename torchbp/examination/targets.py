"""Functions and tensors as they are written on a command line."""

from __future__ import annotations

import ast
import importlib
import re
from typing import Any

import torch
from torch import Tensor, nn

_TARGET = re.compile(r"([\w.]+):([\w.]+)(\(.*\))?")
# What ast raises of text that is no literal, or of one that is nested too deep.
UNREADABLE = (SyntaxError, ValueError, TypeError, MemoryError, RecursionError)
_KINDS = ("normal", "uniform", "simplex", "bool")


def find(text: str) -> Any:
    """What "package.module:Name" stands for; "package.module:Name(4, bias=False)" is
    what it returns when it is called with these literals.

    Args:
        text: the name of a function, a Function or a module class.

    Raises:
        ValueError: there is no such thing, or the call fails.

    Examples:
        >>> find("torch.nn:Linear(3, 2, bias=False)")
        Linear(in_features=3, out_features=2, bias=False)
    """
    match = _TARGET.fullmatch(text)
    if not match:
        raise ValueError(f"{text!r}: expected package.module:Name or ...:Name(4, 3)")
    module, names, call = match.groups()
    try:
        found = importlib.import_module(module)
    except Exception as error:
        raise ValueError(f"{text}: cannot import {module}: {_said(error)}") from None
    for name in names.split("."):
        if not hasattr(found, name):
            raise ValueError(f"{text}: expected a name in {module}, got {name!r}")
        found = getattr(found, name)
    if call is not None:
        found = _called(text, found, call)
    elif isinstance(found, type) and issubclass(found, nn.Module):
        found = _called(text, found, "()")
    return found


def _called(text: str, f: Any, call: str) -> Any:
    try:
        node = ast.parse(f"f{call}", mode="eval").body
        if not isinstance(node, ast.Call):
            raise ValueError("expected one call")
        args = [ast.literal_eval(a) for a in node.args]
        kwargs = {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
    except UNREADABLE:
        raise ValueError(f"{text}: expected literals in {call}") from None
    try:
        return f(*args, **kwargs)
    except Exception as error:
        raise ValueError(f"{text}: cannot be made: {_said(error)}") from None


def _said(error: BaseException) -> str:
    # Without the frames that torch's C++ adds on further lines.
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"


def draw(text: str, dtype: torch.dtype, generator: torch.Generator) -> Any:
    """The argument that SHAPE, SHAPE:KIND or =LITERAL stands for.

    Args:
        text: a shape as "3,4" or "()", a shape and a kind as "3:uniform" or "3:int<10",
            or a literal as "=0.5".
        dtype: of floating tensors.
        generator: draws the numbers.

    Raises:
        ValueError: it is none of these.

    Examples:
        >>> draw("3:int<10", torch.float64, torch.Generator()).shape
        torch.Size([3])
        >>> draw("=0.5", torch.float64, torch.Generator())
        0.5
    """
    if text.startswith("="):
        try:
            return ast.literal_eval(text[1:])
        except UNREADABLE:
            raise ValueError(f"--input {text}: expected a literal after =") from None
    sizes, _, kind = text.partition(":")
    if not re.fullmatch(r"\d+(,\d+)*|\(\)", sizes):
        raise ValueError(f"--input {text}: expected a shape such as 3,4 or ()")
    shape = [] if sizes == "()" else [int(n) for n in sizes.split(",")]
    below = re.fullmatch(r"int<([1-9]\d*)", kind)
    if not below and (kind or "normal") not in _KINDS:
        names = ", ".join(_KINDS)
        raise ValueError(f"--input {text}: expected {names} or int<N, got {kind!r}")
    try:
        if below:
            return torch.randint(
                int(below[1]), shape, generator=generator, device="cpu"
            )
        return _drawn(kind or "normal", shape, dtype, generator)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:  # too large
        raise ValueError(f"--input {text}: cannot be made: {_said(error)}") from None


def _drawn(
    kind: str, shape: list[int], dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    if kind == "bool":
        return torch.randint(2, shape, generator=generator, device="cpu").bool()
    # In float64 first: the same numbers in every dtype, to its rounding.
    if kind == "uniform":
        return torch.rand(
            shape, generator=generator, dtype=torch.float64, device="cpu"
        ).to(dtype)
    t = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
    return (t.softmax(-1) if kind == "simplex" and shape else t).to(dtype)
