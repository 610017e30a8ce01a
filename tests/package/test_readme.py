"""The README's code runs, prints what it says, and points at the right lines."""

from __future__ import annotations

import ast
import contextlib
import io
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
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


def lines_of(path, qualified_name):
    """The lines of the function `qualified_name`, as "Class.method", in the file."""
    text = (ROOT / path).read_text(encoding="utf-8")
    node = ast.parse(text)
    for name in qualified_name.split("."):
        node = next(n for n in node.body if getattr(n, "name", None) == name)
    return text.splitlines()[node.lineno - 1 : node.end_lineno]


def test_each_equation_points_at_functions_that_implement_it():
    rows = re.findall(r"^\| (BP[1-4]) \| (.*)$", README, flags=re.MULTILINE)
    assert [equation for equation, _ in rows] == ["BP1", "BP2", "BP3", "BP4"]
    for equation, row in rows:
        links = re.findall(r"\[`([\w.]+)`\]\(([\w/]+\.py)\)", row)
        assert links
        for name, path in links:
            comments = [line.partition("  # ")[2] for line in lines_of(path, name)]
            assert any(equation in comment for comment in comments), f"{path}: {name}"


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
    assert commands[1].endswith("-m pytest -n 2")


def test_files_that_are_named_exist():
    for name in re.findall(r"`((?:torchbp|tests|experiments)/[\w/]+\.py)`", README):
        assert (ROOT / name).is_file(), name


def test_each_row_of_what_works_names_a_test_that_exists():
    rows = re.findall(
        r"^\|.*`(tests/[\w/]+\.py)::(\w+)` \|$", README, flags=re.MULTILINE
    )
    assert len(rows) > 15
    for file, name in rows:
        code = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"^def {name}\(", code, flags=re.MULTILINE), f"{file}::{name}"
