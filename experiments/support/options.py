"""Options of a command line, declared once: as the fields of a settings dataclass."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Sequence
from typing import Any


def option(
    default: Any, help: str, choices: Sequence[Any] = (), shown: str | None = None
) -> Any:
    """A dataclass field that is an option ``--name`` of the command line.

    Args:
        default: the field's.
        help: the option's; the default is added to it.
        choices: the allowed values, if they can be listed.
        shown: the default as ``--help`` shows it, where that is not its ``str``.
    """
    metadata = {"help": help, "choices": tuple(choices), "shown": shown}
    return dataclasses.field(default=default, metadata=metadata)


def add_options(parser: argparse.ArgumentParser, settings: type[Any]) -> None:
    """Add an option for each field of `settings` that :func:`option` declares."""
    hints = typing.get_type_hints(settings)
    for field in dataclasses.fields(settings):
        if "help" in field.metadata:
            _add_option(parser, field, hints[field.name])


def _add_option(
    parser: argparse.ArgumentParser, field: dataclasses.Field[Any], hint: Any
) -> None:
    name = "--" + field.name.replace("_", "-")
    help, choices, shown = (field.metadata[k] for k in ("help", "choices", "shown"))
    if hint is bool:
        parser.add_argument(name, action="store_true", help=help)
        return
    default: Any = field.default
    if shown is None and default is not None:
        many = isinstance(default, tuple)
        shown = " ".join(map(str, default)) if many else str(default)
    keywords: dict[str, Any] = {"choices": choices or None}
    arguments = [t for t in typing.get_args(hint) if t not in (type(None), Ellipsis)]
    if typing.get_origin(hint) is tuple:
        keywords["nargs"] = "+"
        if typing.get_origin(arguments[0]) is tuple:  # a tuple of tuples
            keywords["action"] = "append"
            arguments = list(typing.get_args(arguments[0]))
    keywords["type"] = arguments[0] if arguments else hint
    note = f" (default {shown})" if shown else ""
    parser.add_argument(name, help=help + note, **keywords)


def check_choices(settings: Any) -> None:
    """Raise ValueError unless each setting that has choices is one of them."""
    for field in dataclasses.fields(settings):
        allowed = field.metadata.get("choices")
        value = getattr(settings, field.name)
        if allowed and value not in allowed:
            names = ", ".join(map(str, allowed))
            raise ValueError(f"{field.name}: expected one of {names}, got {value!r}")
