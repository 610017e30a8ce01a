"""Grading: a learner's file beside the solution and the usual mistakes.

The file, the solution and each mistake are programs of the same functions. Each case
calls them with the same numbers. So a mistake is recognised by what it computes, or by
the error that it raises, however it is written.
"""

from __future__ import annotations

import ast
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from torchbp.data import DataError
from torchbp.exercises.material import Case, Exercise
from torchbp.exercises.probes import PROBES, Misfit, Names, Outcome, call


@dataclass(frozen=True)
class Verdict:
    """Whether a file is right, and the lines that say what is wrong, or a note."""

    ok: bool
    lines: list[str]


def grade(exercise: Exercise, path: Path) -> Verdict:
    """Grade the learner's file at `path`, up to the first case that fails.

    Raises:
        OSError: the file cannot be read.
        ValueError: a case cannot be tried on this machine.
        KeyboardInterrupt: with the line of the file that was interrupted.
    """
    file = _File(path)
    try:
        names = _run(file.code, str(path))
        passed: list[Case] = []
        note = ""
        for case in exercise.cases:
            outcome = _outcome(names, case)
            if wrong := _wrong(exercise, case, outcome):
                mistake = _mistake(exercise, case, outcome, passed)
                lines = [*_report(exercise, case, outcome, wrong, file, mistake)]
                return Verdict(False, lines)
            passed.append(case)
            note = note or outcome.note
        return Verdict(True, [note] if note else [])
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(file.place(error) or path.name) from None
    except _ERRORS as error:  # the file itself ends in it
        gap = file.gap(file.tree)
        return Verdict(False, [gap] if gap else [file.place(error), _text(error)])


_ERRORS = (Exception, SystemExit)


class _File:
    """What the learner has written, and where in it something happens."""

    def __init__(self, path: Path) -> None:
        self.path, self.code = path, path.read_bytes()
        self.lines = self.code.decode("utf-8", "replace").splitlines()
        try:
            self.tree: ast.AST | None = ast.parse(self.code)
        except Exception:  # running it says what is wrong
            self.tree = None

    def line(self, number: int) -> str:
        """The line with its number."""
        text = self.lines[number - 1].strip() if number <= len(self.lines) else ""
        return f"{self.path.name}, line {number}: {text}"

    def place(self, error: BaseException) -> str:
        """The innermost line of the file in the traceback of `error`, or ""."""
        numbers = [
            number
            for frame, number in traceback.walk_tb(error.__traceback__)
            if frame.f_code.co_filename == str(self.path)
        ]
        if isinstance(error, SyntaxError) and error.filename == str(self.path):
            numbers.append(error.lineno or 1)
        return self.line(numbers[-1]) if numbers else ""

    def definition(self, name: str) -> Any:
        """The syntax tree of the function or class of that name, or None."""
        body = getattr(self.tree, "body", [])
        return next((n for n in body if getattr(n, "name", None) == name), None)

    def gap(self, tree: Any) -> str:
        """The first line below `tree` with an `...` that is no index, or ""."""
        indices = [n for n in _below(tree, ast.Subscript) for n in ast.walk(n.slice)]
        for node in _below(tree, ast.Constant):
            if node.value is ... and node not in indices:
                return f"not yet written: {self.line(node.lineno)}"
        return ""


def _below(tree: Any, kind: type[ast.AST]) -> list[Any]:
    return [n for n in ast.walk(tree) if isinstance(n, kind)] if tree else []


def _run(code: str | bytes, path: str) -> Names:
    """What a program defines; nothing is written, no cache either."""
    module = ModuleType("exercise")
    module.__file__ = path
    sys.modules["exercise"] = module  # dataclasses look it up
    exec(compile(code, path, "exec", dont_inherit=True), module.__dict__)
    return module.__dict__


def _outcome(names: Names, case: Case) -> Outcome:
    """What `case` shows of the program that has defined `names`."""
    arguments, untouched = _arguments(case), _arguments(case)
    try:
        if case.subject not in names:
            raise Misfit(f"it defines no {case.subject}")
        result = PROBES.get(case.function, call)(names, case, arguments)
        for name, value in untouched.items():
            if not _close(arguments[name], value):
                raise Misfit(f"{name} is overwritten: work on new tensors")
    except DataError as error:
        raise ValueError(error) from error
    except _ERRORS as error:
        return Outcome(text=_text(error), error=error)
    return result if isinstance(result, Outcome) else _labelled(case, result)


def _arguments(case: Case) -> dict[str, Any]:
    return {
        name: torch.tensor(value, dtype=torch.float64, device="cpu")
        if isinstance(value, list)
        else value
        for name, value in case.arguments.items()
    }


def _text(error: BaseException) -> str:
    if isinstance(error, Misfit):
        return str(error)
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    first = (message.strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _labelled(case: Case, result: Any) -> Outcome:
    """The results by their names, or what is wrong with their kind."""
    values = list(result) if isinstance(result, (tuple, list)) else [result]
    expected = ", ".join(case.results)
    if result is None:
        return Outcome(text=f"{case} returns None, expected {expected}")
    if len(values) != len(case.results):
        text = f"{len(values)} results, expected {len(case.results)}: {expected}"
        return Outcome(text=f"{case} returns {text}")
    may_lack = (Tensor, type(None)) if case.function == "backward" else Tensor
    for name, value in zip(case.results, values, strict=True):
        if not isinstance(value, may_lack):
            kind = type(value).__name__
            return Outcome(text=f"{name}: expected a tensor, got {kind} {value!r}")
    return Outcome(dict(zip(case.results, values, strict=True)))


def _close(a: Any, b: Any) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return a is b or (not isinstance(a, Tensor) and a == b)
    same = a.shape == b.shape and a.dtype == b.dtype
    return same and torch.allclose(a.detach().double(), b.double(), equal_nan=True)


def _wrong(exercise: Exercise, case: Case, outcome: Outcome) -> dict[str, Any]:
    """The right values of the results that are wrong, from the last to the first, as a
    backward pass goes; {"": None} where it is no number that is wrong."""
    if outcome.text:
        return {"": None}
    right = outcome.right
    if right is None:
        right = _outcome(_run(exercise.solution, "solution"), case).values
    names = reversed(case.results)
    return {n: right[n] for n in names if not _close(outcome.values[n], right[n])}


def _mistake(
    exercise: Exercise, case: Case, outcome: Outcome, passed: list[Case]
) -> str:
    """The usual mistake that passes and fails as the learner's file does, or ""."""
    for text, code in exercise.mistakes:
        names = _run(code, "mistake")
        if any(_wrong(exercise, c, _outcome(names, c)) for c in passed):
            continue
        other = _outcome(names, case)
        if other.text == outcome.text and other.values.keys() == outcome.values.keys():
            values = outcome.values.items()
            if all(_close(value, other.values[name]) for name, value in values):
                return text
    return ""


def _report(
    exercise: Exercise,
    case: Case,
    outcome: Outcome,
    wrong: dict[str, Any],
    file: _File,
    mistake: str,
) -> Iterator[str]:
    """What the learner reads: the place, the numbers, and what the mistake is."""
    definition = file.definition(case.subject)
    if (gap := file.gap(definition)) and not mistake:
        yield gap
        return
    if outcome.text:
        place = file.place(outcome.error) if outcome.error else ""
        if not place and definition:
            place = file.line(definition.lineno)
        yield from filter(None, (place, outcome.text))
    if case.arguments:
        yield f"{case} for"
        for name, value in _arguments(case).items():
            yield from _written(f"    {name} = ", value)
    name, right = next(iter(wrong.items()))
    if name:
        ours = outcome.values[name]
        yield from _written(f"your {name} = ", ours)
        yield from _written(f"expected {name} = ", right)
        mistake = mistake or _likeness(name, ours, right, case)
        yield exercise.equations[name]
    if mistake:
        yield mistake


def _likeness(name: str, ours: Any, right: Tensor, case: Case) -> str:
    """What a wrong number of an unknown mistake is like, or ""."""
    if ours is None or ours.dtype != right.dtype:
        return f"{name} is {getattr(ours, 'dtype', None)}, expected {right.dtype}"
    if ours.shape != right.shape:
        shapes = f"{tuple(ours.shape)}, expected {tuple(right.shape)}"
        return f"{name} has the shape {shapes}"
    if right.dim() == 2 and _close(ours, right.T):
        return f"{name} is transposed"
    factor = ((ours * right).sum() / right.square().sum()).item()
    if factor and _close(ours, factor * right):
        rows = len(next(iter(_arguments(case).values())))
        of_n = {rows: f"n = {rows}", 1 / rows: f"1/n = 1/{rows}"} if rows > 1 else {}
        return f"{name} is off by the factor {of_n.get(factor, f'{factor:.4g}')}"
    return ""


def _written(head: str, value: Any) -> Iterator[str]:
    """A tensor as it is written in Python, a row on each line."""
    if not isinstance(value, Tensor):
        yield f"{head}{value}"
        return
    rows = value.tolist()
    nested = value.dim() > 1
    for i, row in enumerate(rows if nested else [rows]):
        start, end = (head + "[", ",") if i == 0 else (" " * len(head) + " ", ",")
        if nested:
            yield start + _numbers(row) + ("]" if i == len(rows) - 1 else end)
        else:
            yield head + _numbers(row)


def _numbers(values: Any) -> str:
    if isinstance(values, list):
        return f"[{', '.join(map(_numbers, values))}]"
    return f"{values:.4g}"
