"""The exercises, each read from its Markdown file.

The first code block is the solution. "Gap" has the changes that make the learner's file
of it, and "Mistakes" those that make wrong code: each heading is the grader's text, and
"or" separates several ways to make one mistake. "Cases" are the calls that grade a
file, smallest first, and "Equations" has the equation of each result.
"""

from __future__ import annotations

import ast
import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Case:
    """One call that grades an exercise: `results = function(*names, **arguments)`.

    Attributes:
        function: one of the learner's functions, or a probe.
        names: the definitions that the probe examines, and its settings.
        arguments: numbers, as lists.
        results: the names of the results.
    """

    function: str
    names: tuple[Any, ...]
    arguments: dict[str, Any]
    results: tuple[str, ...]

    @property
    def subject(self) -> str:
        """The name in the learner's file that this case is about."""
        return self.names[0] if self.names else self.function

    def __str__(self) -> str:
        return f"{self.function}({', '.join([*self.names[:1], *self.arguments])})"


@dataclass(frozen=True)
class Exercise:
    """One exercise.

    Attributes:
        number: its place in the derivation, from 1.
        name: its name on the command line.
        title: its title.
        template: the learner's file as `start` writes it.
        solution: the same without gaps.
        hints: from the vaguest to the plainest.
        cases: from the smallest to the largest.
        equations: the equation of each result, by the result's name.
        mistakes: the grader's text on wrong code, and that code.
    """

    number: int
    name: str
    title: str
    template: str
    solution: str
    hints: tuple[str, ...]
    cases: tuple[Case, ...]
    equations: dict[str, str]
    mistakes: tuple[tuple[str, str], ...]

    @property
    def file(self) -> str:
        """The name of the learner's file."""
        return f"{self.number}_{self.name}.py"


@functools.cache
def exercises() -> tuple[Exercise, ...]:
    """Return all exercises, in the order of the derivation."""
    return tuple(map(_read, sorted(Path(__file__).parent.glob("[0-9]_*.md"))))


def _read(path: Path) -> Exercise:
    """Return the exercise in a Markdown file."""
    text = path.read_text(encoding="utf-8")
    head, *pieces = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)
    sections = dict(zip(pieces[::2], pieces[1::2], strict=True))
    number, _, name = path.stem.partition("_")
    (solution,) = _blocks(head)
    equations = (item.partition(": ") for item in _items(sections["Equations"]))
    _, *parts = re.split(r"^### (.+)\n", sections["Mistakes"], flags=re.MULTILINE)
    return Exercise(
        int(number),
        name,
        head.splitlines()[0].removeprefix("# "),
        _edited(solution, sections["Gap"]),
        solution,
        tuple(_items(sections["Hints"])),
        tuple(map(_case, ast.parse(_blocks(sections["Cases"])[0]).body)),
        {name: text for name, _, text in equations},
        tuple(
            (text, _edited(solution, change))
            for text, changes in zip(parts[::2], parts[1::2], strict=True)
            for change in re.split(r"^or\n", changes, flags=re.MULTILINE)
        ),
    )


def _blocks(text: str) -> list[str]:
    """Return the contents of the code blocks."""
    return re.findall(r"^```\w+\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def _items(text: str) -> list[str]:
    """Return the items of a Markdown list, each on one line."""
    return [" ".join(item.split()) for item in re.split(r"^- ", text, flags=re.M)[1:]]


def _edited(code: str, section: str) -> str:
    """Return the code after the changes of a section, each of lines that occur once."""
    for diff in _blocks(section):
        lines = diff.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] == "-")
        if code.count(before) != 1:
            raise ValueError(f"expected lines of the solution, got {before!r}")
        after = "".join(line[1:] for line in lines if line[0] == "+")
        code = code.replace(before, after)
    return code


def _case(node: Any) -> Case:
    """Return the case of a line `results = function(literals)`."""
    targets = ast.walk(node.targets[0]) if isinstance(node, ast.Assign) else ()
    call = node.value
    return Case(
        call.func.id,
        tuple(map(ast.literal_eval, call.args)),
        {k.arg: ast.literal_eval(k.value) for k in call.keywords},
        tuple(n.id for n in targets if isinstance(n, ast.Name)),
    )
