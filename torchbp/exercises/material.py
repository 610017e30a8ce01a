"""The exercises, each read from its Markdown file.

The file's first code block is the solution. A line of it that ends with `# gap` is not
in the learner's file, or is, with the text that follows `# gap` in its place. "Cases"
lists the calls that grade it, smallest first; "Equations" says what each result is;
"Mistakes" has a heading for each, which is what the grader says of it, and how its code
differs from the solution; after "or" another way to make it.
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
    """One call that grades an exercise.

    Attributes:
        function: what is called: one of the learner's functions, or a probe.
        names: the literals without keyword; a probe's first is what it looks at.
        arguments: the literals with keyword.
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
        return f"{self.subject}({', '.join(self.arguments)})"


@dataclass(frozen=True)
class Exercise:
    """One exercise.

    Attributes:
        number: its place in the derivation, from 1.
        name: what it is called on the command line.
        title: in a line.
        template: the learner's file as `start` writes it.
        solution: the same without gaps.
        hints: from the first to the plainest.
        cases: from the smallest to the largest.
        equations: what each result is, by its name.
        mistakes: what is said of wrong code, and that code.
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
    """All exercises, in the order of the derivation."""
    return tuple(map(_read, sorted(Path(__file__).parent.glob("[0-9]_*.md"))))


def _read(path: Path) -> Exercise:
    head, *rest = re.split(r"^## (.+)\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    sections = dict(zip(rest[::2], rest[1::2], strict=True))
    (code,) = _blocks(head)
    solution = re.sub(r"  # gap.*", "", code)
    _, *parts = re.split(r"^### (.+)\n", sections["Mistakes"], flags=re.MULTILINE)
    number, _, name = path.stem.partition("_")
    return Exercise(
        int(number),
        name,
        head.splitlines()[0].removeprefix("# "),
        _with_gaps(code),
        solution,
        tuple(_items(sections["Hints"])),
        tuple(_case(node) for node in ast.parse(_blocks(sections["Cases"])[0]).body),
        dict(item.split(": ", 1) for item in _items(sections["Equations"])),  # type: ignore[misc]
        tuple(
            (text, functools.reduce(_edited, _blocks(way), solution))
            for text, part in zip(parts[::2], parts[1::2], strict=True)
            for way in re.split(r"^or\n", part, flags=re.MULTILINE)
        ),
    )


def _blocks(text: str) -> list[str]:
    return re.findall(r"^```\w+\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def _items(text: str) -> list[str]:
    """The items of a Markdown list, each on one line."""
    items = re.split(r"^- ", text, flags=re.MULTILINE)[1:]
    return [" ".join(item.split()) for item in items]


def _with_gaps(code: str) -> str:
    code = re.sub(r"^.*  # gap\n", "", code, flags=re.MULTILINE)
    return re.sub(r"^( *)\S.*  # gap (.+)", r"\1\2", code, flags=re.MULTILINE)


def _edited(code: str, diff: str) -> str:
    """The code after the change; the lines that it starts from must be there once."""
    lines = diff.splitlines(keepends=True)
    before = "".join(line[1:] for line in lines if line[0] != "+")
    after = "".join(line[1:] for line in lines if line[0] != "-")
    if code.count(before) != 1:
        raise ValueError(f"mistake: expected lines of the solution, got {before!r}")
    return code.replace(before, after)


def _case(node: Any) -> Case:
    """`result, ... = function(literal, ..., name=literal, ...)`, or the call alone."""
    results = []
    if isinstance(node, ast.Assign):
        results = [n.id for n in ast.walk(node.targets[0]) if isinstance(n, ast.Name)]
    call = node.value
    return Case(
        call.func.id,
        tuple(map(ast.literal_eval, call.args)),
        {k.arg: ast.literal_eval(k.value) for k in call.keywords},
        tuple(results),
    )
