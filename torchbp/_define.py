"""Classes made at run time: their names, and where pickle looks for them."""

from __future__ import annotations

import sys
import types
from typing import Any, TypeVar

_T = TypeVar("_T", bound=type)


def make_class(name: str, base: _T, members: dict[str, Any]) -> _T:
    """A subclass of `base`, as a class statement would make it, metaclass and all."""
    return types.new_class(name, (base,), {}, lambda body: body.update(members))  # type: ignore[return-value]


def check_name(name: Any) -> None:
    """Raise ValueError unless `name` can name a class."""
    if not (isinstance(name, str) and name.isidentifier()):
        raise ValueError(f"name: expected a Python identifier, got {name!r}")


def place(cls: _T, depth: int = 2) -> _T:
    """Say that `cls` stands in the module of the caller's caller, as namedtuple does,
    so that ``Softplus = define_layer("Softplus", ...)`` at module level can be
    pickled."""
    cls.__module__ = sys._getframe(depth).f_globals.get("__name__", "__main__")
    cls.__qualname__ = cls.__name__
    return cls
