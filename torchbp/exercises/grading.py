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
from torchbp.exercises.probes import PROBES, Misfit, Names, Outcome, call

WIDTH = 80
_ERRORS = (Exception, SystemExit)  # what a learner's file may end in
_GAP = r"(^\s*|return |=\s?|\()\.\.\."  # not that of an index
# Of the largest entry, as compare has it of float32.
_TOLERANCE = torch.finfo(torch.float32).eps ** 0.5


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
            outcome = _outcome(names, case)
            if wrong := _wrong(exercise, case, outcome):
                mistake = _mistake(exercise, case, outcome, passed)
                if (gap := file.gap(case.subject)) and not mistake:
                    right = dict.fromkeys(f"{c.subject} is right" for c in passed)
                    return Verdict("open", ["; ".join([*right, gap])])
                report = _report(exercise, case, outcome, wrong, file)
                mistake = mistake or _likeness(outcome, wrong, case)
                return Verdict("wrong", [*report, *filter(None, [mistake])])
            passed.append(case)
            notes += filter(None, [outcome.note])
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(file.place(error) or path.name) from None
    except DataError as error:
        raise ValueError(error) from error
    except _ERRORS as error:  # that of the file as a whole
        if gap := file.gap():
            return Verdict("open", [gap])
        place = file.place(error) or path.name
        return Verdict("wrong", [f"{place}\n{fill(_text(error), WIDTH)}"])
    return Verdict("right", notes)


class _File:
    """What the learner has written, and where in it something happens."""

    def __init__(self, path: Path) -> None:
        self.path, self.code = path, path.read_bytes()
        self.lines = self.code.decode("utf-8", "replace").splitlines()

    def line(self, i: int) -> str:
        """Line i, counted from 0, and where it is."""
        text = self.lines[i].strip() if i < len(self.lines) else ""
        return f"{self.path.name}, line {i + 1}: {text}"

    def place(self, error: BaseException) -> str:
        """The innermost line of the file that `error` has come through, or ""."""
        frames = traceback.walk_tb(error.__traceback__)
        numbers = [n for f, n in frames if f.f_code.co_filename == str(self.path)]
        if getattr(error, "filename", None) == str(self.path):  # a SyntaxError
            numbers.append(getattr(error, "lineno", None) or 1)
        return self.line(numbers[-1] - 1) if numbers else ""

    def body(self, name: str) -> range:
        """The lines of the last function or class of that name."""
        body, end = range(0), len(self.lines)
        for i in range(len(self.lines)):
            if re.match(rf"(def|class) {name}\b", self.lines[i]):
                body = range(i, end)
            elif len(body) and body.stop == end and re.match(r"[^\s#)]", self.lines[i]):
                body = range(body.start, i)
        return body

    def gap(self, name: str | None = None) -> str:
        """The first line with a gap, of the file or of what has that name, or ""."""
        for i in range(len(self.lines)) if name is None else self.body(name):
            if re.search(_GAP, self.lines[i]):
                return f"not yet written: {self.line(i)}"
        return ""


def _run(code: str | bytes, path: str) -> Names:
    """What a program defines; nothing is written, no cache either."""
    module = sys.modules["exercise"] = ModuleType("exercise")  # dataclasses look it up
    exec(compile(code, path, "exec", dont_inherit=True), module.__dict__)
    return module.__dict__


def _arguments(case: Case) -> dict[str, Any]:
    """New tensors of the case's numbers, in float32 as torch.zeros makes them."""
    options: Any = {"dtype": torch.float32, "device": "cpu"}
    return {
        name: torch.tensor(value, **options) if isinstance(value, list) else value
        for name, value in case.arguments.items()
    }


def _outcome(names: Names, case: Case) -> Outcome:
    """What `case` shows of the program that has defined `names`."""
    arguments = _arguments(case)
    try:
        if case.subject not in names:
            own = [n for n, f in names.items() if _module(f) == "exercise"]
            raise Misfit(f"it defines no {case.subject}, but {', '.join(own)}")
        result = PROBES.get(case.function, call)(names, case, arguments)
        for name, value in _arguments(case).items():
            if not _close(arguments[name], value):
                raise Misfit(f"{name} is overwritten: work on new tensors")
        return result if isinstance(result, Outcome) else _labelled(case, result)
    except DataError:
        raise
    except _ERRORS as error:
        return Outcome(text=_text(error), error=error)


def _module(value: Any) -> str:
    return str(getattr(value, "__module__", ""))


def _text(error: BaseException) -> str:
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    if isinstance(error, SystemExit):
        message = "the program would end here"
    first = (message.strip().splitlines() or [""])[0]
    kind = "" if isinstance(error, Misfit) else type(error).__name__
    return ": ".join(filter(None, (kind, first)))


def _labelled(case: Case, result: Any) -> Outcome:
    """The results by their names."""
    many = len(case.results) > 1 and isinstance(result, (tuple, list))
    values = list(result) if many else [result]
    if len(values) != len(case.results):
        expected = f"{len(case.results)}: {', '.join(case.results)}"
        raise Misfit(f"{case} returns {len(values)} results, expected {expected}")
    may_lack = (Tensor, type(None)) if case.function in PROBES else Tensor
    for name, value in zip(case.results, values, strict=True):
        if not isinstance(value, may_lack):
            if value is None:
                raise Misfit(f"{case} returns None: is its return missing?")
            got = f"{type(value).__name__} {value}"
            raise Misfit(f"{name}: expected a tensor, got {got}")
    return Outcome(dict(zip(case.results, values, strict=True)))


def _close(a: Any, b: Any) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return bool(a is b or (a == b and type(a) is type(b)))
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = a.double(), b.double()
    largest = b[b.isfinite()].abs().amax() if b.isfinite().any() else 0.0
    atol = _TOLERANCE * float(largest)
    return torch.allclose(a, b, rtol=0, atol=atol, equal_nan=True)


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
        other, values = _outcome(names, case), outcome.values
        if (other.text, other.values.keys()) != (outcome.text, values.keys()):
            continue
        if all(_close(values[name], other.values[name]) for name in values):
            return text
    return ""


def _report(
    exercise: Exercise, case: Case, outcome: Outcome, wrong: dict[str, Any], file: _File
) -> Iterator[str]:
    """Where it is, with which numbers, and what the result should be."""
    name, right = next(iter(wrong.items()))
    place = file.place(outcome.error) if outcome.error else ""
    if outcome.text:
        body = file.body(case.subject)
        somewhere = file.line(body[0]) if body else file.path.name
        yield f"{place or somewhere}\n{fill(outcome.text, WIDTH)}"
    rows = [["  " + name, _written(value)] for name, value in _arguments(case).items()]
    if name:
        rows += [[f"your {name}", _written(outcome.values[name])]]
        rows += [[f"right {name}", _written(right)]]
    if rows and (name or place):
        yield f"{case} for\n" + aligned([[a, "= " + b] for a, b in rows], 2)
    if name:
        yield exercise.equations[name]


def _likeness(outcome: Outcome, wrong: dict[str, Any], case: Case) -> str:
    """What the wrong result of an unknown mistake is like, or ""."""
    name, right = next(iter(wrong.items()))
    if outcome.text or (ours := outcome.values[name]) is None:
        return ""
    if ours.shape != right.shape:
        return f"Its shape is {tuple(ours.shape)}, expected {tuple(right.shape)}."
    if ours.dtype != right.dtype:
        return f"Its dtype is {ours.dtype}, expected {right.dtype}."
    if right.dim() == 2 and _close(ours, right.T):
        return "It is transposed."
    n = len(next(iter(_arguments(case).values())))
    factors = {-1: "-1", n: f"n = {n}", 1 / n: f"1/n = 1/{n}", 2: "2", 0.5: "1/2"}
    found = [text for k, text in factors.items() if _close(ours, k * right)]
    return f"It is off by the factor {found[0]}." if found else ""


def _written(value: Any) -> str:
    """A value as it is written in Python."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, list):
        return f"[{', '.join(map(_written, value))}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
