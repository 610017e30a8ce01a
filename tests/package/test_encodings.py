"""Every program ends as it does in UTF-8, whatever its output's encoding lacks, and so
do names of files, terminals and input beyond the locale."""

from __future__ import annotations

import ast
import importlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from torchbp.__main__ import main
from torchbp._terminal import replace_unencodable
from torchbp.training import EpochResult, EventWriter, Progress, Score

ROOT = Path(__file__).parents[2]
PROGRAMS = sorted(path.stem for path in (ROOT / "experiments").glob("*.py"))
ENCODINGS = ["cp1252", "ascii", "utf-8"]


def pipes(monkeypatch, encoding):
    """Make standard output and error pipes in that encoding, strict as Python has them.

    Returns what gives the text that was written to one. No fixture, since pytest sets
    the streams anew between a test's fixtures and the test.
    """
    streams = {}
    for name in ("stdout", "stderr"):
        streams[name] = io.TextIOWrapper(io.BytesIO(), encoding, errors="strict")
        monkeypatch.setattr(sys, name, streams[name])

    def written(name):
        streams[name].flush()
        return streams[name].buffer.getvalue().decode(encoding)

    return written


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("program", [*PROGRAMS, "python -m torchbp"])
def test_help(monkeypatch, encoding, program):
    written = pipes(monkeypatch, encoding)
    command = main
    if program in PROGRAMS:
        module = importlib.import_module(f"experiments.{program}")
        command = getattr(module, "command_line", None) or module.main
    with pytest.raises(SystemExit) as stop:
        sys.exit(command(["--help"]))
    assert not stop.value.code
    assert written("stderr") == ""
    assert written("stdout").startswith("usage:") and "--help" in written("stdout")


def test_there_are_programs():
    assert len(PROGRAMS) >= 9


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_tour_an_examination_and_an_error(monkeypatch, encoding):
    written = pipes(monkeypatch, encoding)
    assert main(["tour"]) == 0
    assert "Every gradient is right." in written("stdout")
    shapes = ["--input", "5,3", "--input", "2,3"]
    assert main(["examine", "torchbp.functional:linear_sigmoid", *shapes]) == 0
    assert main(["observe", "--data", "/nowhere/σ"]) == 0
    assert written("stderr") == ""
    assert main(["examine", "ζ:σ"]) == 2
    assert len(written("stderr").splitlines()) == 1


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1"])
def test_what_the_encoding_has_is_not_lost(monkeypatch, encoding):
    written = {}
    for name in ("utf-8", encoding):
        texts = pipes(monkeypatch, name)
        assert main(["tour"]) == 0
        written[name] = texts("stdout")
    expected = written["utf-8"].encode(encoding, "replace").decode(encoding)
    assert written[encoding] == expected != written["utf-8"]


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_training_and_what_it_writes(tmp_path, encoding):
    """As a user redirects it: a child whose output is a pipe in that encoding."""
    program = ROOT / "experiments" / "mnist.py"
    options = "--dataset digits --sizes 784 2 10 --epochs 1 --logdir runs --name σ-run"
    settings = {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    result = subprocess.run(
        [sys.executable, str(program), *options.split()],
        cwd=tmp_path,
        env={**os.environ, **settings, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, b"")
    assert "epoch 1/1" in result.stdout.decode(encoding)
    text = (tmp_path / "runs" / "σ-run" / "settings.json").read_text(encoding="utf-8")
    assert json.loads(text)["name"] == "σ-run"


# The C locale without UTF-8 mode, in which all is ASCII

MNIST = ROOT / "experiments" / "mnist.py"
TINY = "--dataset digits --sizes 784 2 10 --epochs".split()
needs_posix = pytest.mark.skipif(os.name == "nt", reason="POSIX locales")


def run(*arguments, folder, **options):
    """The finished child, in the C locale without Python's UTF-8 mode: all is ASCII."""
    variables = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        check=False,
        **options,
    )


@pytest.fixture
def drawn(tmp_path):
    image = Image.new("L", (40, 40), 255)
    image.paste(0, (18, 5, 22, 35))
    image.save(tmp_path / "größe.png")
    return tmp_path


@needs_posix
def test_names_that_the_locale_lacks(drawn):
    """A training, its resumption and its answer, each as in UTF-8."""
    named = ["--logdir", "lüge", "--name", "größe"]
    first = run(MNIST, *TINY, 1, *named, folder=drawn)
    assert (first.returncode, first.stderr) == (0, b"")
    assert b"epoch 1/1" in first.stdout
    checkpoint = "lüge/größe/checkpoint.pt"
    again = run(MNIST, "--resume", checkpoint, "--epochs", 2, "--json", folder=drawn)
    assert (again.returncode, again.stderr) == (0, b"")
    last = json.loads(again.stdout.splitlines()[-1])
    assert os.fsencode(last["run"]) == "lüge/größe".encode()
    events = EventAccumulator(str(drawn / "lüge" / "größe"))
    events.Reload()
    assert [e.step for e in events.Scalars("accuracy/test")] == [0, 130, 260]
    program = MNIST.with_name("predict.py")
    answer = run(program, "lüge/größe", "größe.png", "--show", folder=drawn)
    assert (answer.returncode, answer.stderr) == (0, b"")
    assert b"gr????e.png: " in answer.stdout


@needs_posix
def test_an_experiment_of_a_name_that_the_locale_lacks(tmp_path):
    program = MNIST.with_name("vanishing_gradient.py")
    options = "--quick --dataset digits --seeds 1 --epochs 1 --name σ".split()
    result = run(program, *options, folder=tmp_path)
    assert result.returncode in (0, 1), result.stderr.decode()  # 1: not shown, so early
    assert result.stderr == b"" and b"verdict" in result.stdout
    written = {path.name.split(".")[0] for path in (tmp_path / "runs/σ").iterdir()}
    assert {"results", "events"} <= written


def test_input_that_the_encoding_lacks(tmp_path, monkeypatch):
    steps = b"\xff\xc3\xbc\n" * 40
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")  # strict, as in no locale
    result = run("-m", "torchbp", "tour", "--step", folder=tmp_path, input=steps)
    assert (result.returncode, result.stderr) == (0, b"")
    assert b"Every gradient is right." in result.stdout


def test_the_bar_on_a_terminal_without_blocks(monkeypatch):
    """Of the costs' trend, each block becomes a question mark."""

    class Terminal(io.TextIOWrapper):
        def isatty(self):
            return True

    stream = Terminal(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    replace_unencodable()
    progress = Progress(epochs=3, images=10)
    progress.costs = [0.5, 0.25]
    progress.update(5, 0.125)
    progress.bar.refresh()
    progress.epoch(EpochResult(1, {"test": Score(0.1, 0.5)}, 0.125, 1.0, 10.0))
    text = stream.buffer.getvalue()
    assert b"50% |" in text and b"cost=0.1250, trend=??" in text
    assert b"epoch 1/3  test 0.100 50.00%" in text


@pytest.mark.parametrize("handler", ["strict", "surrogateescape", "surrogatepass"])
def test_handlers_that_may_raise_are_replaced(monkeypatch, handler):
    stream = io.TextIOWrapper(io.BytesIO(), "ascii", errors=handler)
    monkeypatch.setattr(sys, "stdout", stream)
    replace_unencodable()
    print("σ \udcff \U0001f600", flush=True)
    assert stream.buffer.getvalue() == b"? ? ?\n"


@pytest.mark.parametrize("handler", ["ignore", "backslashreplace", "namereplace"])
def test_handlers_that_were_chosen_stay(monkeypatch, handler):
    stream = io.TextIOWrapper(io.BytesIO(), "ascii", errors=handler)
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stdin", None)  # as under pythonw
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    replace_unencodable()
    print("σ", flush=True)
    assert stream.buffer.getvalue() == "σ\n".encode("ascii", handler)


@needs_posix
def test_event_files_in_a_folder_whose_name_is_no_text(tmp_path):
    folder = tmp_path / "\udcff"
    folder.mkdir()
    with EventWriter(folder) as writer:
        writer.add_scalar("cost", 0.5, 1)
    (tmp_path / "seen").symlink_to(folder)
    events = EventAccumulator(str(tmp_path / "seen"))
    events.Reload()
    assert [e.value for e in events.Scalars("cost")] == [0.5]


def opened_as_text(path):
    """The calls in a file that open text in the encoding of the locale."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node)
        name = ast.unparse(node.func)
        opens = name.endswith(("open", "read_text", "write_text", "TemporaryFile"))
        others = ("os.open", "Image.open", "urlopen", "self._open")  # no text, no file
        is_binary = re.search(r"""(, |=|[(])'[rwxa+]*b[+]?'""", call)
        opens = opens and not name.endswith(others) and not is_binary
        if opens and "encoding" not in {keyword.arg for keyword in node.keywords}:
            yield f"{path}:{node.lineno}: {call}"


def test_text_files_are_utf_8_whatever_the_locale(tmp_path):
    files = [*(ROOT / "torchbp").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]
    assert len(files) > 40
    assert [call for path in files for call in opened_as_text(path)] == []
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "open(p)\np.open('w')\np.read_text()\nopen(p, mode='a')\nos.fdopen(1)\n"
        "open(p, 'rb')\nos.open(p, flags)\np.write_text(t, encoding='utf-8')\n",
        encoding="utf-8",
    )
    assert len(list(opened_as_text(wrong))) == 5
