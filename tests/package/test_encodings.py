"""Every program ends as it does in UTF-8, whatever its output's encoding lacks."""

from __future__ import annotations

import importlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from torchbp.__main__ import main

ROOT = Path(__file__).parents[2]
PROGRAMS = sorted(path.stem for path in (ROOT / "experiments").glob("*.py"))
ENCODINGS = ["cp1252", "ascii", "utf-8"]


@pytest.fixture(params=ENCODINGS)
def streams(request, monkeypatch):
    """Standard output and error as pipes in that encoding, strict as Python has them;
    the fixture gives what was written, as text."""
    pipes = {}
    for name in ("stdout", "stderr"):
        pipes[name] = io.TextIOWrapper(io.BytesIO(), request.param, errors="strict")
        monkeypatch.setattr(sys, name, pipes[name])

    def written(name):
        pipes[name].flush()
        return pipes[name].buffer.getvalue().decode(request.param)

    return written


@pytest.mark.parametrize("program", [*PROGRAMS, "python -m torchbp"])
def test_help(streams, program):
    with pytest.raises(SystemExit) as stop:
        if program == "python -m torchbp":
            main(["--help"])
        module = importlib.import_module(f"experiments.{program}")
        status = getattr(module, "command_line", None) or module.main
        raise SystemExit(status(["--help"]))
    assert not stop.value.code
    assert streams("stderr") == ""
    assert streams("stdout").startswith("usage:") and "--help" in streams("stdout")


def test_there_are_programs():
    assert len(PROGRAMS) >= 9


def test_a_tour_an_examination_and_an_error(streams):
    assert main(["tour"]) == 0
    assert "Every gradient is right." in streams("stdout")
    shapes = ["--input", "5,3", "--input", "2,3"]
    assert main(["examine", "torchbp.functional:linear_sigmoid", *shapes]) == 0
    assert main(["observe", "--data", "/nowhere/σ"]) in (0, 2)
    assert main(["examine", "ζ:σ"]) == 2
    assert len(streams("stderr").splitlines()) >= 1


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
