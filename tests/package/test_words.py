"""No reader has to learn a word that this project alone uses: standard terms exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# A stem, and the endings that it has in the words that were used.
STEMS = {
    "mend": "s|ed|ing",
    "sitting": "s",
    "patient": "s",
    "animal": "s",
    "zoo": "s",
    "complain": "s|ed|ing|t|ts",
}
# Letters alone bound a word: names join theirs by underscores.
WORDS = re.compile(
    "|".join(f"(?<![a-z]){stem}(?:{ends})?(?![a-z])" for stem, ends in STEMS.items()),
    re.IGNORECASE,
)
SUFFIXES = {".py", ".md", ".cpp", ".js", ".css", ".html", ".toml", ".txt", ".json"}
ROOMS = ("torchbp", "experiments", "tests", ".github")
FILES = [ROOT / "README.md", ROOT / "pyproject.toml"]
FILES += [
    path
    for room in ROOMS
    for path in sorted((ROOT / room).rglob("*"))
    if path.suffix in SUFFIXES and path != Path(__file__)
]


def test_the_words_are_found_where_they_are():
    text = "Mends test_a_zoo COMPLAINTS, amend, recommend, command, sit, impatient"
    assert WORDS.findall(text) == ["Mends", "zoo", "COMPLAINTS"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_standard_terms_are_used(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [f"line {i}: {x}" for i, x in enumerate(lines, 1) if WORDS.search(x)]
    assert not found, "\n".join(found)
