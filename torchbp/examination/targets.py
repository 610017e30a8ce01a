"""Functions and tensors by their names and shapes on a command line."""

from __future__ import annotations

import ast
import importlib
import re
from typing import Any

import torch
from torch import nn

from torchbp.examination.tools import first_line

_TARGET = re.compile(r"([\w.]+):([\w.]+)(\(.*\))?")
# What ast raises for text that is no literal, or for one that is nested too deep.
UNREADABLE = (SyntaxError, ValueError, TypeError, MemoryError, RecursionError)
_KINDS = ("normal", "uniform", "simplex", "bool")


def find(text: str) -> Any:
    """Return what "package.module:Name" names, or for "package.module:Name(4,
    bias=False)" what it returns when it is called with these literals.

    Args:
        text: the name of a function, a Function or a module class.

    Returns:
        the object; of a module class an instance, made without arguments.

    Raises:
        ValueError: there is no such name, or the call fails.

    Examples:
        >>> find("torch.nn:Linear(3, 2, bias=False)")
        Linear(in_features=3, out_features=2, bias=False)
    """
    match = _TARGET.fullmatch(text)
    if not match:
        raise ValueError(f"{text!r}: expected package.module:Name or ...:Name(4, 3)")
    module, names, call = match.groups()
    try:
        value = importlib.import_module(module)
    except Exception as error:
        raise ValueError(
            f"{text}: cannot import {module}: {first_line(error)}"
        ) from None
    for name in names.split("."):
        if not hasattr(value, name):
            raise ValueError(f"{text}: expected a name in {module}, got {name!r}")
        value = getattr(value, name)
    if call is not None:
        value = _called(text, value, call)
    elif isinstance(value, type) and issubclass(value, nn.Module):
        value = _called(text, value, "()")
    return value


def _called(text: str, f: Any, call: str) -> Any:
    """What `f` returns for the literals in `call`, such as "(4, bias=False)"."""
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
        raise ValueError(f"{text}: cannot be made: {first_line(error)}") from None


def draw(text: str, dtype: torch.dtype, generator: torch.Generator) -> Any:
    """Return the argument that SHAPE, SHAPE:KIND or =LITERAL describes.

    Args:
        text: a shape as "3,4" or "()", a shape and a kind as "3:uniform" or "3:int<10",
            or a literal as "=0.5".
        dtype: of floating tensors.
        generator: draws the numbers.

    Returns:
        a tensor on the CPU, or the literal.

    Raises:
        ValueError: it is none of these, or the tensor is too large.

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
        if below or kind == "bool":
            high = int(below[1]) if below else 2
            t = torch.randint(high, shape, generator=generator, device="cpu")
            return t if below else t.bool()
        t = torch.empty(shape, dtype=torch.float64, device="cpu")
        # In float64 first: the same numbers in every dtype, to its rounding.
        if kind == "uniform":
            return t.uniform_(generator=generator).to(dtype)
        t.normal_(generator=generator)
        return (t.softmax(-1) if kind == "simplex" and shape else t).to(dtype)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:  # too large
        raise ValueError(
            f"--input {text}: cannot be made: {first_line(error)}"
        ) from None
