"""The layout of the tour: prose, aligned equations with numbers, lines of code."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from torchbp._terminal import paint, wait_for_key

__all__ = ["Section", "show"]

WIDTH = 80
# The files whose lines are shown for an equation.
HOMES = ("explicit/algorithm.py", "costs.py", "functional.py")


@dataclass(frozen=True)
class Section:
    """One section of the tour.

    Attributes:
        title: its subject.
        equation: its equation in the book's notation, or "".
        lines: the text, at most 80 columns wide.

    Examples:
        >>> section = Section("BP1: the error", "δ^L = ∇_a C ⊙ σ'(z^L)", ["..."])
        >>> section.title
        'BP1: the error'
    """

    title: str
    equation: str
    lines: list[str]


def prose(text: str) -> list[str]:
    """Return a paragraph as lines."""
    return textwrap.wrap(text, WIDTH - 2)


def matrices(ell: int, W: Tensor, b: Tensor) -> list[str]:
    """Return W^ℓ and b^ℓ in brackets, as on a blackboard."""
    lines = []
    for j, (row, bias) in enumerate(zip(W.tolist(), b.tolist(), strict=True)):
        names = (f"W^{ell} =", f"b^{ell} =") if j == 0 else ("", "")
        numbers = " ".join(f"{w:5.2f}" for w in row)
        lines.append(f"  {names[0]:<5} [ {numbers} ]   {names[1]:<5} [ {bias:5.2f} ]")
    return lines


def number(value: float) -> str:
    """Return a number with four decimals."""
    return f"{value:7.4f}"


def factor(value: float, places: int = 4) -> str:
    """Return a factor of a product, in parentheses if negative, else in spaces."""
    return f"({value:.{places}f})" if value < 0 else f" {value:.{places}f} "


def product(a: float, b: float, places: int = 4) -> str:
    """Return "a · b", with `places` decimals of a."""
    return f"{a:{places + 3}.{places}f} · {factor(b)}"


def weighted_sum(weights: Sequence[float], inputs: Sequence[float], bias: float) -> str:
    """Return "w_1·x_1 + w_2·x_2 + b", with each weight's sign as the operator."""
    result = ""
    for w, x in [*zip(weights, inputs, strict=True), (bias, None)]:
        sign = "-" if w < 0 else "+" if result else " "
        term = f"{abs(w):.2f}" if x is None else f"{abs(w):.2f}·{x:.4f}"
        result += f" {sign} {term}" if result else f"{sign}{term}"
    return result


def equations(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a line "part = part = ..." for each row, with the parts in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + " = ".join(p.ljust(w) for p, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def code_lines(equation: str) -> list[str]:
    """Return the lines of the package whose comment names `equation`."""
    lines = ["", "In the code:"]
    for name in HOMES:
        text = (Path(__file__).parents[1] / name).read_text(encoding="utf-8")
        for line_number, line in enumerate(text.splitlines(), start=1):
            code, mark, comment = line.partition("  # ")
            if mark and equation in comment:
                place = f"torchbp/{name}:{line_number}"
                lines.append(f"  {place:<33} {code.strip()}")
    return [line if len(line) <= WIDTH else line[: WIDTH - 1] + "…" for line in lines]


def show(sections: Sequence[Section], colour: bool, step: bool) -> bool:
    """Print the sections; with `step`, wait for a key before each but the first.

    Args:
        sections: what to print, in order.
        colour: whether to print terminal colours.
        step: whether to wait for a key.

    Returns:
        whether all were printed: False if the reader pressed q.

    Examples:
        >>> show([Section("Feedforward", "", ["z = x Wᵀ + b"])], False, False)
        1/1    Feedforward
        <BLANKLINE>
        z = x Wᵀ + b
        True
    """
    for i, section in enumerate(sections, start=1):
        if step and i > 1:
            prompt = f"-- {i - 1} of {len(sections)}: any key to continue, q to quit --"
            if wait_for_key(prompt).strip().lower() == "q":
                return False
        if i > 1:
            print()
        place = f"{i}/{len(sections)}"
        print(paint(f"{place:<6} {section.title}", "bold", colour))
        if section.equation:
            print(f"       {paint(section.equation, 'cyan', colour)}")
        print()
        for line in section.lines:
            print(_painted(line) if colour else line)
    return True


def _painted(line: str) -> str:
    """Return a line of code dimmed, and any other with its result in colour."""
    if line.startswith("  torchbp/"):
        return paint(line, "dim")
    return re.sub(r"(?<== )( *-?\d+\.\d{4})$", lambda m: paint(m[0], "green"), line)
