"""README.md and the other pages: their code runs and prints what they show, their links
lead somewhere, and the functions, tests, files and options that they name exist."""

from __future__ import annotations

import ast
import contextlib
import json
import pkgutil
import re
import runpy
import shlex
import sys
from pathlib import Path

import processes
import pytest
from wrong_functions import WRONG_FUNCTIONS

import torchbp
from torchbp.__main__ import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCES = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
BLOCKS = FENCES.findall(README)
PYTHON_BLOCKS = [i for i, (language, _) in enumerate(BLOCKS) if language == "python"]
ROOMS = ("torchbp", "experiments", "tests", ".github")
PAGES = [path for room in ROOMS for path in (ROOT / room).rglob("*.md")]
PAGES.append(ROOT / "README.md")
TEXTS = {str(p.relative_to(ROOT)): p.read_text(encoding="utf-8") for p in PAGES}


def test_readme_is_read_in_five_minutes():
    assert len(README.splitlines()) <= 250


# -------------------------------------------------------------------- blocks of code


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """The exit status and the output of each Python block, run by itself."""
    programs = tmp_path_factory.mktemp("readme") / "programs.json"
    programs.write_text(json.dumps([BLOCKS[i][1] for i in PYTHON_BLOCKS]))
    driver = ROOT / "tests" / "block_driver.py"
    utf8 = {"PYTHONIOENCODING": "utf-8"}
    result = processes.run(sys.executable, driver, programs, env=utf8)
    assert result.returncode == 0, result.stderr
    return dict(zip(PYTHON_BLOCKS, json.loads(result.stdout), strict=True))


def test_readme_has_six_python_blocks():
    assert len(PYTHON_BLOCKS) == 6


@pytest.mark.parametrize("block", PYTHON_BLOCKS)
def test_each_block_runs_by_itself_and_prints_what_the_page_shows(outcomes, block):
    status, output = outcomes[block]
    assert status == 0, output
    following = BLOCKS[block + 1] if block + 1 < len(BLOCKS) else ("", "")
    assert output == (following[1] if following[0] == "text" else "")


def test_there_are_two_commands():
    """`.ci/run` takes them from the page in the same way."""
    commands = [x for x in README.splitlines() if x.startswith("python3 -m venv")]
    assert len(commands) == 2
    assert commands[0].endswith("python experiments/mnist.py")
    assert commands[1].endswith("-m pytest -n 2")


def shell_lines():
    """(program or command, options) of each line of a shell block that has options."""
    for text in TEXTS.values():
        for language, block in FENCES.findall(text):
            if language != "sh":
                continue
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                options = {word for word in words if word.startswith("--")}
                for i, word in enumerate(words):
                    if word == "torchbp" and words[i - 1] == "-m":
                        yield words[i + 1], frozenset(options)
                    elif word.startswith("experiments/"):
                        yield word, frozenset(options - {"--nproc-per-node"})


@pytest.mark.parametrize(
    ("program", "options"), sorted({x for x in shell_lines() if x[1]}, key=str)
)
def test_options_in_shell_blocks_exist(program, options, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    with contextlib.suppress(SystemExit):
        if program.endswith(".py"):
            runpy.run_path(str(ROOT / program), run_name="__main__")
        else:
            main([program, "--help"])
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    assert options <= known, f"{program} does not have {options - known}"


# ------------------------------------------------------------------- links and names


def anchors(text):
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCES.sub("", text), flags=re.MULTILINE)
    names = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {name.replace(" ", "-") for name in names}


def links(text):
    return re.findall(r"\]\(([^()\s]+)\)", FENCES.sub("", text))


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    for link in links(TEXTS[page]):
        if link.startswith(("https://", "http://")):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), f"{page}: {link}"
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


def test_the_number_of_wrong_functions():
    """Wherever a page states it; how many gradcheck detects depends on torch."""
    pattern = r"(\d+) wrong Functions"
    numbers = [int(n) for text in TEXTS.values() for n in re.findall(pattern, text)]
    assert numbers and set(numbers) == {len(WRONG_FUNCTIONS)}


def test_pictures_of_readme():
    pictures = [link for link in links(README) if link.endswith(".png")]
    assert len(pictures) == 2  # the page, and TensorBoard
    assert all((ROOT / picture).stat().st_size < 200_000 for picture in pictures)


@pytest.mark.parametrize("page", TEXTS)
def test_files_that_are_named_exist(page):
    pattern = r"`((?:torchbp|tests|experiments|\.github)/[\w/.-]*)`"
    for name in re.findall(pattern, TEXTS[page]):
        assert (ROOT / name).exists(), f"{page}: {name}"


def function_lines(path, qualified_name):
    """The lines of a function of a Python, C++ or JavaScript file; of a Python method
    that is named without its class, those of all methods of the name."""
    text = (ROOT / path).read_text(encoding="utf-8")
    *outer, name = qualified_name.split(".")
    if not path.endswith(".py"):
        found = re.search(rf"^\S[^\n]*\b{name}\(.*?^}}", text, re.DOTALL | re.MULTILINE)
        return found[0].splitlines() if found else []
    tree = ast.parse(text)
    for cls in outer:
        tree = next(n for n in tree.body if getattr(n, "name", None) == cls)
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    spans = [(n.lineno - 1, n.end_lineno) for n in functions if n.name == name]
    return [line for begin, end in spans for line in text.splitlines()[begin:end]]


def marks(lines):
    """The equations that the lines implement, by the comments at their ends."""
    comments = " ".join(re.findall(r"(?:#|//) (BP[1-4].*)$", "\n".join(lines), re.M))
    return set(re.findall("BP[1-4]", comments))


def test_each_equation_points_at_functions_that_implement_it():
    rows = re.findall(r"^\| (BP[1-4]) \| (.*)$", README, flags=re.MULTILINE)
    assert [equation for equation, _ in rows] == ["BP1", "BP2", "BP3", "BP4"]
    for equation, row in rows:
        named = re.findall(r"\[`([\w.]+)`\]\(([\w/]+\.py)\)", row)
        assert named
        for name, path in named:
            assert equation in marks(function_lines(path, name)), f"{path}: {name}"


def test_the_other_places_of_the_equations():
    """`backprop`, and the functions in brackets behind a link to a file."""
    section = README.partition("## Where each equation stands")[2].partition("\n## ")[0]
    section = " ".join(section.split())
    name, path = re.search(r"\[`(backprop)`\]\((\S+)\)", section).groups()
    every = {"BP1", "BP2", "BP3", "BP4"}
    assert marks(function_lines(path, name)) == every
    places = re.findall(r"`\]\(([\w/]+\.(?:py|cpp|js))\) \((.*?)\)", section)
    assert [Path(path).suffix for path, _ in places] == [".py", ".cpp", ".js"]
    for path, names in places:
        functions, _, slopes = names.partition("; σ' in ")
        found = set()
        for name in re.findall(r"`(\w+)`", functions):
            lines = function_lines(path, name)
            assert lines, f"{path} has no {name}"
            found |= marks(lines)
        assert found == every, f"{path}: {found}"
        for name in re.findall(r"`(\w+)`", slopes):
            assert name in (ROOT / path).read_text(encoding="utf-8")


def test_each_row_of_the_tests_tables_names_a_test_that_exists():
    lines = TEXTS["tests/README.md"].splitlines()
    rows = [x for x in lines if re.match(r"\| (?!what \||promise \|)", x)]
    assert len(rows) > 40
    for row in rows:
        named = re.search(r"`(tests/[\w/]+\.py)::(\w+)` \|$", row)
        assert named, row
        code = (ROOT / named[1]).read_text(encoding="utf-8")
        assert re.search(rf"^def {named[2]}\(", code, re.MULTILINE), named[0]


def test_the_version_is_the_same_everywhere():
    assert f"version {torchbp.__version__}" in README
    versions = re.findall(r"^## (\d\S*)$", TEXTS[".github/CHANGELOG.md"], re.MULTILINE)
    assert versions[0] == torchbp.__version__


def test_names_that_stay_exist():
    text = TEXTS[".github/CHANGELOG.md"]
    rows = re.findall(r"^\| `(torchbp[\w.]*)` \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) > 5
    for module, names in rows:
        for name in re.findall(r"`(\w+)`", names):
            pkgutil.resolve_name(f"{module}:{name}")
