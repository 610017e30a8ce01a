"""Grading: a learner's file beside the solution and the usual mistakes.

The file, the solution and each mistake are programs of the same functions, and each
case calls them with the same numbers. So a mistake is recognised by what it computes,
or by the error that it raises, however it is written.
"""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from torchbp._terminal import aligned
from torchbp.data import DataError
from torchbp.exercises.material import Case, Exercise
from torchbp.exercises.probes import (
    PROBES,
    Misfit,
    Names,
    Outcome,
    are_close,
    call,
)

WIDTH = 80
_MODULE = "torchbp exercise"  # no file can have this name
_ERRORS = (Exception, SystemExit)  # what a learner's file may end in
_GAP = re.compile(r"(^\s*|return |=\s?|\()\.\.\.", re.MULTILINE)  # not of an index


@dataclass(frozen=True)
class Verdict:
    """What has come of a file: "right", "wrong" or "open", and paragraphs on it."""

    word: str
    paragraphs: list[str]


def grade(exercise: Exercise, path: Path) -> Verdict:
    """Grade the learner's file at `path`, up to the first case that fails.

    Raises:
        OSError: the file cannot be read.
        ValueError: a case cannot be tried on this machine.
        KeyboardInterrupt: with the line of the file that was interrupted.
    """
    file, passed, notes = _File(path), list[Case](), list[str]()
    try:
        names = _run(file.code, str(path))
        for case in exercise.cases:
            outcome = _outcome(exercise, names, case)
            if outcome.is_right:
                passed.append(case)
                notes += filter(None, [outcome.note])
                continue
            mistake = _mistake(exercise, case, outcome, passed)
            if not mistake and (gap := file.gap(*file.body(case.subject))):
                right = dict.fromkeys(f"{c.subject} is right" for c in passed)
                return Verdict("open", ["; ".join([*right, gap])])
            report = _report(exercise, case, outcome, file)
            mistake = mistake or _likeness(outcome, case)
            return Verdict("wrong", [*report, *filter(None, [mistake])])
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(file.place(error) or path.name) from None
    except DataError as error:
        raise ValueError(error) from error
    except _ERRORS as error:  # that of the file as a whole
        if gap := file.gap(0, len(file.text)):
            return Verdict("open", [gap])
        place = file.place(error) or path.name
        return Verdict("wrong", [f"{place}\n{fill(_text(error), WIDTH)}"])
    return Verdict("right", notes)


class _File:
    """What the learner has written, and where in it something happens."""

    def __init__(self, path: Path) -> None:
        self.path, self.code = path, path.read_bytes()
        self.text = self.code.decode("utf-8", "replace")

    def line(self, number: int) -> str:
        """The line of that number, and where it is."""
        lines = ["", *self.text.split("\n"), ""]
        text = lines[min(number, len(lines) - 1)].strip()
        return f"{self.path.name}, line {number}: {text}"

    def place(self, error: BaseException) -> str:
        """The innermost line of the file that `error` has come through, or ""."""
        frames = traceback.walk_tb(error.__traceback__)
        numbers = [n for f, n in frames if f.f_code.co_filename == str(self.path)]
        if getattr(error, "filename", None) == str(self.path):  # a SyntaxError
            numbers.append(getattr(error, "lineno", None) or 1)
        return self.line(numbers[-1]) if numbers else ""

    def body(self, name: str) -> tuple[int, int]:
        """Where the last function or class of that name is in the text, or (0, 0)."""
        pattern = rf"^(def|class) {name}\b.*(\n[ \t#)].*|\n$)*"
        found = [*re.finditer(pattern, self.text, re.MULTILINE)]
        return found[-1].span() if found else (0, 0)

    def line_at(self, position: int) -> str:
        """The line that a position in the text is in."""
        return self.line(self.text.count("\n", 0, position) + 1)

    def gap(self, start: int, end: int) -> str:
        """The first line with a gap in that part of the text, or ""."""
        found = _GAP.search(self.text, start, end)
        return f"not yet written: {self.line_at(found.end())}" if found else ""


def _run(code: str | bytes, path: str) -> Names:
    """What a program defines; nothing is written, no cache either."""
    module = sys.modules[_MODULE] = ModuleType(_MODULE)  # dataclasses look it up
    exec(compile(code, path, "exec", dont_inherit=True), module.__dict__)
    return module.__dict__


def _arguments(case: Case) -> dict[str, Any]:
    """New tensors of the case's numbers, in float32 as torch.zeros makes them."""
    options: Any = {"dtype": torch.float32, "device": "cpu"}
    return {
        name: torch.tensor(value, **options) if isinstance(value, list) else value
        for name, value in case.arguments.items()
    }


def _outcome(exercise: Exercise, names: Names, case: Case) -> Outcome:
    """What `case` shows of the program that has defined `names`."""
    try:
        outcome = _tried(names, case)
    except DataError:
        raise
    except _ERRORS as error:
        return Outcome(text=_text(error), error=error)
    if outcome.values and not outcome.right:
        outcome.right = _tried(_run(exercise.solution, "solution"), case).values
    return outcome


def _tried(names: Names, case: Case) -> Outcome:
    """The same, without what is right; raise what the program raises."""
    if case.subject not in names:
        own = [n for n, f in names.items() if getattr(f, "__module__", "") == _MODULE]
        raise Misfit(f"it defines {', '.join(own) or 'nothing'}, no {case.subject}")
    arguments = _arguments(case)
    result = PROBES.get(case.function, call)(names, case, arguments)
    for name, value in _arguments(case).items():
        if not are_close(arguments[name], value):
            raise Misfit(f"{name} is overwritten: work on new tensors")
    if isinstance(result, Outcome):
        return result
    several = len(case.results) > 1 and isinstance(result, (tuple, list))
    values = list(result) if several else [result]
    kinds = (Tensor, type(None)) if case.function in PROBES else Tensor
    all_fit = all(isinstance(value, kinds) for value in values)
    if len(values) != len(case.results) or not all_fit:
        got = f"{type(result).__name__} {result}"
        got = "None: is its return missing?" if result is None else got
        raise Misfit(f"expected tensors {', '.join(case.results)}, got {got}")
    return Outcome(dict(zip(case.results, values, strict=True)))


def _text(error: BaseException) -> str:
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    if isinstance(error, SystemExit):
        message = "the program would end here"
    kind = "" if isinstance(error, Misfit) else type(error).__name__
    return ": ".join(filter(None, [kind, *message.strip().splitlines()[:1]]))


def _mistake(
    exercise: Exercise, case: Case, outcome: Outcome, passed: list[Case]
) -> str:
    """The usual mistake that passes and fails as the learner's file does, or ""."""
    for text, code in exercise.mistakes:
        names = _run(code, "mistake")
        passes = all(_outcome(exercise, names, c).is_right for c in passed)
        if passes and outcome.resembles(_outcome(exercise, names, case)):
            return text
    return ""


def _report(
    exercise: Exercise, case: Case, outcome: Outcome, file: _File
) -> Iterator[str]:
    """Where it is, with which numbers, and what the result should be."""
    place = file.place(outcome.error) if outcome.error else ""
    if outcome.text:
        start, end = file.body(case.subject)
        somewhere = file.line_at(start) if end else file.path.name
        yield f"{place or somewhere}\n{fill(outcome.text, WIDTH)}"
    rows = [[f"  {name}", value] for name, value in _arguments(case).items()]
    for name in outcome.wrong[:1]:
        rows += [[f"your {name}", outcome.values[name]]]
        rows += [[f"right {name}", outcome.right[name]]]
    if case.arguments and (outcome.wrong or place):
        table = aligned([[head, f"= {_written(value)}"] for head, value in rows], 2)
        yield f"{case} for\n{table}"
    yield from (exercise.equations[name] for name in outcome.wrong[:1])


def _likeness(outcome: Outcome, case: Case) -> str:
    """What the wrong result of an unknown mistake is like, or ""."""
    for name in outcome.wrong[:1]:
        ours, right = outcome.values[name], outcome.right[name]
        for what in ("shape", "dtype"):
            got, expected = getattr(ours, what, None), getattr(right, what)
            if got != expected:
                return f"Its {what} is {_written(got)}, expected {_written(expected)}."
        if right.dim() == 2 and are_close(ours, right.T):
            return "It is transposed."
        n = len(next(iter(_arguments(case).values())))
        for factor, text in ((-1, "-1"), (n, f"n = {n}"), (1 / n, f"1/n = 1/{n}")):
            if are_close(ours, factor * right):
                return f"It is off by the factor {text}."
    return ""


def _written(value: Any) -> str:
    """A value as it is written in Python."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, torch.Size):
        return str(tuple(value))
    if isinstance(value, list):
        return f"[{', '.join(map(_written, value))}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
