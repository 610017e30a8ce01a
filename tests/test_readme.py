"""The README's code runs, prints what it says, and points at the right lines."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)


def test_python_blocks_run_and_print_what_the_text_blocks_say():
    names: dict[str, object] = {"__name__": "readme"}
    checked = 0
    for i, (language, code) in enumerate(BLOCKS):
        if language != "python":
            continue
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(code, f"README block {i}", "exec"), names)
        following = BLOCKS[i + 1] if i + 1 < len(BLOCKS) else ("", "")
        if following[0] == "text":
            assert output.getvalue() == following[1]
            checked += 1
    assert checked >= 2


def test_each_equation_points_at_the_line_that_implements_it():
    rows = re.findall(r"^\| (BP[1-4]) \|.*$", README, flags=re.MULTILINE)
    assert rows == ["BP1", "BP2", "BP3", "BP4"]
    for row in re.findall(r"^\| BP[1-4] \|.*$", README, flags=re.MULTILINE):
        equation = row[2:5]
        links = re.findall(r"\[([\w/]+\.py):(\d+)\]\(([\w/]+\.py)#L(\d+)\)", row)
        assert links
        for shown, line, target, anchor in links:
            assert (shown, line) == (target, anchor)
            text = (ROOT / target).read_text(encoding="utf-8").splitlines()
            code, _, comment = text[int(line) - 1].partition("# ")
            assert equation in comment, f"{target}:{line} is {text[int(line) - 1]!r}"
            assert code.strip()


def test_each_link_to_an_equation_ends_at_it():
    links = re.findall(r"\[(BP[1-4])\]\(([\w/]+\.py)#L(\d+)\)", README)
    assert {equation for equation, _, _ in links} == {"BP1", "BP2", "BP3", "BP4"}
    for equation, target, line in links:
        text = (ROOT / target).read_text(encoding="utf-8").splitlines()[int(line) - 1]
        assert equation in text.partition("# ")[2], f"{target}:{line} is {text!r}"


def test_there_are_two_commands():
    commands = [
        line
        for language, block in BLOCKS
        if language == "sh"
        for line in block.splitlines()
        if "venv .venv" in line
    ]
    assert len(commands) == 2
    assert commands[0].endswith("python experiments/mnist.py")
    assert commands[1].endswith("-m pytest")


def test_files_that_are_named_exist():
    for name in re.findall(r"`((?:torchbp|tests|experiments)/[\w/]+\.py)`", README):
        assert (ROOT / name).is_file(), name


def test_each_row_of_what_works_names_a_test_that_exists():
    rows = re.findall(r"^\|.*`(tests/\w+\.py)::(\w+)` \|$", README, flags=re.MULTILINE)
    assert len(rows) > 15
    for file, name in rows:
        code = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"^def {name}\(", code, flags=re.MULTILINE), f"{file}::{name}"
