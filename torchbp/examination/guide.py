"""The pages of `guide.md`, one for each check."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import shorten

from torchbp.examination.examiner import CHECKS

_TEXT = Path(__file__).with_name("guide.md")
# The classes of the introduction that a page uses.
_BASES = re.compile(r"\b(Square|Product)\b")


def explain(check: str | None = None) -> str:
    """Return the page of one check of the guide.

    Args:
        check: the check's identifier or title; None for the list of all checks.

    Returns:
        what the check asks, why it matters, and a wrong and a right example.

    Raises:
        ValueError: there is no such check.

    Examples:
        >>> print(explain("linear-in-g").splitlines()[2][:44])
        Backward multiplies the output's gradient by
    """
    pages = read_pages()
    if check is None:
        lines = [
            f"{name:<22} {shorten(page.split('. ')[0], 65, placeholder=' …')}"
            for name, page in pages.items()
        ]
        return "\n".join([*lines, "", "--explain CHECK prints the page of one."])
    name = check.replace(" ", "-")
    if name not in pages:
        raise ValueError(
            f"--explain: expected one of {', '.join(CHECKS)}, got {check!r}"
        )
    page = pages[name]
    prelude = blocks(introduction())[0]
    bases = [
        re.findall(
            rf"^class {base}\(.*?(?=^class |\Z)", prelude, re.DOTALL | re.MULTILINE
        )
        for base in sorted(set(_BASES.findall(page)))
    ]
    code = [f"```python\n{text.strip()}\n```" for (text,) in bases]
    return "\n".join([f"{name}\n", page.strip(), *code])


def introduction() -> str:
    """The text before the first page."""
    return _TEXT.read_text(encoding="utf-8").split("\n## ")[0]


def read_pages() -> dict[str, str]:
    """The text of each check's page."""
    pages = _TEXT.read_text(encoding="utf-8").split("\n## ")[1:]
    return {name: text for name, _, text in (page.partition("\n") for page in pages)}


def blocks(page: str) -> list[str]:
    """The code of a page: a wrong example and a right one."""
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)
