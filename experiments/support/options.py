"""Options of a command line, declared once: as the fields of a settings dataclass."""

from __future__ import annotations

import argparse
import dataclasses
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

from torchbp._terminal import Parser, run_program

DATA_HELP = (
    "folder with MNIST's files, directly or in raw or MNIST/raw; also TORCHBP_DATA"
)
LARGEST_COUNT = 1_000_000
SettingsType = TypeVar("SettingsType")
Results = TypeVar("Results")
_NOTHING: Mapping[Any, Any] = MappingProxyType({})


def option(
    default: Any, help: str, choices: Sequence[Any] = (), shown: str | None = None
) -> Any:
    """Return a dataclass field that is an option ``--name`` of the command line.

    Args:
        default: the field's.
        help: the option's; the default is added to it.
        choices: the allowed values, if they can be listed.
        shown: the default as ``--help`` shows it, where that is not its ``str``.
    """
    metadata = {"help": help, "choices": tuple(choices), "shown": shown}
    return dataclasses.field(default=default, metadata=metadata)


def add_options(parser: argparse.ArgumentParser, settings: type[Any]) -> None:
    """Add an option for each field that :func:`option` declares.

    Args:
        parser: what the options are added to.
        settings: the dataclass that has the fields.
    """
    hints = typing.get_type_hints(settings)
    for field in dataclasses.fields(settings):
        if "help" in field.metadata:
            _add_option(parser, field, hints[field.name])


def _add_option(
    parser: argparse.ArgumentParser, field: dataclasses.Field[Any], hint: Any
) -> None:
    """Add the option of one field, whose type is `hint`."""
    name = "--" + field.name.replace("_", "-")
    help, choices, shown = (field.metadata[k] for k in ("help", "choices", "shown"))
    if hint is bool:
        parser.add_argument(name, action="store_true", help=help)
        return
    default: Any = field.default
    if shown is None and default is not None:
        is_sequence = isinstance(default, tuple)
        shown = " ".join(map(str, default)) if is_sequence else str(default)
    keywords: dict[str, Any] = {"choices": choices or None}
    types = [t for t in typing.get_args(hint) if t not in (type(None), Ellipsis)]
    if typing.get_origin(hint) is tuple:
        keywords["nargs"] = "+"
        if typing.get_origin(types[0]) is tuple:  # a tuple of tuples
            keywords["action"] = "append"
            types = list(typing.get_args(types[0]))
    keywords["type"] = types[0] if types else hint
    suffix = f" (default {shown})" if shown else ""
    parser.add_argument(name, help=help + suffix, **keywords)


def check_choices(settings: Any) -> None:
    """Raise ValueError unless each setting that has choices is one of them.

    Args:
        settings: an instance of a dataclass with :func:`option` fields.
    """
    for field in dataclasses.fields(settings):
        allowed = field.metadata.get("choices")
        value = getattr(settings, field.name)
        if allowed and value not in allowed:
            names = ", ".join(map(str, allowed))
            raise ValueError(f"{field.name}: expected one of {names}, got {value!r}")


def check_least(settings: Any, **least: float) -> None:
    """Raise ValueError unless each named setting is finite and large enough, and no
    count is above LARGEST_COUNT.

    Args:
        settings: an instance of a settings dataclass.
        least: the smallest allowed value of each setting.
    """
    for name, bound in least.items():
        value = getattr(settings, name)
        if isinstance(value, int) and value > LARGEST_COUNT:  # may exceed any float
            raise ValueError(
                f"{name}: expected at most {LARGEST_COUNT:,}, got a larger number"
            )
        if not (math.isfinite(value) and value >= bound):
            raise ValueError(f"{name}: expected at least {bound}, got {value}")


def check_seed(seed: int) -> None:
    """Raise ValueError unless torch accepts `seed`."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected 0 to 2^63 - 1, got {seed}")


def run_experiment(
    main: Callable[[SettingsType], Results],
    settings: type[SettingsType],
    doc: str | None,
    arguments: Sequence[str] | None,
    status: Callable[[Results], int],
    quick: Mapping[str, Any] = _NOTHING,
    statuses: Mapping[type[BaseException], int] = _NOTHING,
) -> int:
    """Run an experiment's ``main`` with the settings of a command line, and return the
    exit status.

    Args:
        main: takes the settings and returns results.
        settings: the settings' class.
        doc: the program's docstring, which ``--help`` prints around the options.
        arguments: of the command line; those of the process if None.
        status: the exit status for the results.
        quick: the settings that ``--quick`` changes unless they are options themselves.
        statuses: exceptions that ``main`` may raise, and the status of each.
    """

    def program() -> int:
        parser = Parser(doc, argument_default=argparse.SUPPRESS)
        add_options(parser, settings)
        options = vars(parser.parse_args(arguments))
        changes = quick if options.get("quick") else {}
        return status(main(settings(**{**changes, **options})))

    return run_program(program, statuses)
