"""Grading: a learner's file is compared with the solution and the usual mistakes.

All of them define the same functions, and each case calls these with the same numbers.
So a mistake is recognised by its results, or by the error that it raises, however it is
written.
"""

from __future__ import annotations

import re
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from torchbp._terminal import aligned
from torchbp.exercises.material import Case, Exercise
from torchbp.exercises.probes import PROBES, Misfit, Names, Outcome, are_close, call

WIDTH = 80
_MODULE = "torchbp exercise"  # no file can have this name


@dataclass(frozen=True)
class Verdict:
    """The result for a file: "right", "wrong" or "open", and paragraphs that explain
    it."""

    word: str
    paragraphs: list[str]


def grade(exercise: Exercise, path: Path) -> Verdict:
    """Grade the learner's file at `path`, up to the first case that fails.

    Raises:
        OSError: the file cannot be read.
        KeyboardInterrupt: the file's code was interrupted; the message has its line.
    """
    file, passed = _File(path), list[Case]()
    try:
        names = _run(file.code, str(path))
        for case in exercise.cases:
            outcome = _outcome(exercise, names, case)
            if not outcome.is_right:
                return _judged(exercise, case, outcome, passed, file)
            passed.append(case)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(file.place(error) or path.name) from None
    except BaseException as error:  # raised by the file outside its functions
        outcome = Outcome(text=_text(error), error=error)
        return _judged(exercise, Case("", (), {}, ()), outcome, [], file)
    return Verdict("right", [*filter(None, [outcome.note])])


class _File:
    """The learner's file, and its line where something happens."""

    def __init__(self, path: Path) -> None:
        self.path, self.code = path, path.read_bytes()
        self.lines = self.code.decode("utf-8", "replace").split("\n")

    def place(self, error: BaseException | None, name: str = "") -> str:
        """Return the innermost line of the file in the traceback of `error`, else the
        line that defines `name`, else ""."""
        frames = traceback.walk_tb(error.__traceback__ if error else None)
        numbers = [n for f, n in frames if f.f_code.co_filename == str(self.path)]
        if getattr(error, "filename", None) == str(self.path):  # a SyntaxError
            numbers.append(getattr(error, "lineno", None) or 1)
        head = re.compile(rf"(def|class) {name}\b")
        if name and not numbers:
            numbers = [i for i, text in enumerate(self.lines, 1) if head.match(text)]
        if not numbers:
            return ""
        text = self.lines[numbers[-1] - 1 : numbers[-1]]
        return f"{self.path.name}, line {numbers[-1]}: {''.join(text).strip()}"


def _run(code: str | bytes, path: str) -> Names:
    """Run a program and return the names that it defines; write no cache."""
    module = sys.modules[_MODULE] = ModuleType(_MODULE)  # dataclasses look it up
    exec(compile(code, path, "exec", dont_inherit=True), module.__dict__)
    return module.__dict__


def _arguments(case: Case) -> dict[str, Any]:
    """Return new tensors of the case's numbers, in float32, torch's usual dtype."""
    return {
        name: torch.tensor(value, dtype=torch.float32, device="cpu")
        if isinstance(value, list)
        else value
        for name, value in case.arguments.items()
    }


def _outcome(exercise: Exercise, names: Names, case: Case) -> Outcome:
    """Return the outcome of `case` for the program that defines `names`."""
    try:
        outcome = _tried(names, case)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit, too
        return Outcome(text=_text(error), error=error)
    if outcome.values and not outcome.right:
        outcome.right = _tried(_run(exercise.solution, "solution"), case).values
    return outcome


def _tried(names: Names, case: Case) -> Outcome:
    """Return the same outcome without the right results; let the program's errors
    pass."""
    if case.subject not in names:
        own = [n for n, f in names.items() if getattr(f, "__module__", "") == _MODULE]
        got = ", ".join(own) or "nothing"
        raise Misfit(f"expected a definition of {case.subject}, got {got}")
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
    """Return the kind and the first line of an error."""
    message = str(getattr(error, "msg", error))  # a SyntaxError's without its place
    if isinstance(error, SystemExit):
        message = "the program would end here"
    kind = "" if isinstance(error, Misfit) else type(error).__name__
    return ": ".join(filter(None, [kind, *message.strip().splitlines()[:1]]))


def _mistake(
    exercise: Exercise, case: Case, outcome: Outcome, passed: list[Case]
) -> str:
    """Return the text of the usual mistake that passes and fails like the learner's
    file, or ""."""
    for text, code in exercise.mistakes:
        names = _run(code, "mistake")
        passes = all(_outcome(exercise, names, c).is_right for c in passed)
        if passes and outcome.resembles(_outcome(exercise, names, case)):
            return text
    return ""


def _judged(
    exercise: Exercise, case: Case, outcome: Outcome, passed: list[Case], file: _File
) -> Verdict:
    """Return the verdict on a failed case: the place, the numbers, the equation and the
    mistake."""
    paragraphs, place = [], file.place(outcome.error)
    if outcome.text:
        is_open = "ellipsis" in outcome.text.lower()  # the template's three dots
        text = "not yet written" if is_open else fill(outcome.text, WIDTH)
        line = place or file.place(None, case.subject) or file.path.name
        paragraphs.append(f"{line}\n{text}")
        if is_open:
            done = dict.fromkeys(f"{c.subject} is right" for c in passed)
            return Verdict("open", [*done, *paragraphs])
    rows = [[f"  {name}", value] for name, value in _arguments(case).items()]
    for name in outcome.wrong[:1]:
        rows += [[f"your {name}", outcome.values[name]]]
        rows += [[f"right {name}", outcome.right[name]]]
    if case.arguments and (outcome.wrong or place):
        table = aligned([[head, f"= {_written(value)}"] for head, value in rows], 2)
        paragraphs.append(f"{case} for\n{table}")
    paragraphs += (exercise.equations[name] for name in outcome.wrong[:1])
    mistake = _mistake(exercise, case, outcome, passed) or _likeness(outcome, case)
    return Verdict("wrong", [*paragraphs, *filter(None, [mistake])])


def _likeness(outcome: Outcome, case: Case) -> str:
    """Describe how the wrong result of an unknown mistake resembles the right one, or
    return ""."""
    for name in outcome.wrong[:1]:
        ours, right = outcome.values[name], outcome.right[name]
        for name in ("shape", "dtype"):
            got, expected = getattr(ours, name, None), getattr(right, name)
            if got != expected:
                return f"Its {name} is {_written(got)}, expected {_written(expected)}."
        if right.dim() == 2 and are_close(ours, right.T):
            return "It is transposed."
        n = len(next(iter(_arguments(case).values())))
        for factor, text in ((-1, "-1"), (n, f"n = {n}"), (1 / n, f"1/n = 1/{n}")):
            if are_close(ours, factor * right):
                return f"It is {text} times the right one."
    return ""


def _written(value: Any) -> str:
    """Return a value as it is written in Python, with four digits."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_written, value))}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
