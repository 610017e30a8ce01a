"""Whatever is typed: an exit status, one line that says why, and nothing left behind.

The main job runs in this process on forty digits. Each option has values that are
right, wrong and absurd; hypothesis puts them together. The long forms (``-m slow``) are
the same with more examples.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import os
import shutil
import tempfile
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import torchbp.__main__ as program
from experiments import mnist
from experiments.support import reporting
from experiments.support.options import run_experiment
from torchbp import data
from torchbp.nn import ACTIVATIONS

SHORT = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
LONG = settings(SHORT, max_examples=3000)

HUGE = ["9" * 20, "9" * 400, "9" * 5000, str(2**31), str(2**63), "-" + "9" * 20]
NO_INTEGER = ["", " ", "x", "1.5", "1e3", "nan", "-1", "0", "٣", "\u00b2", "0x10"]
NO_NUMBER = ["", "x", "nan", "inf", "-inf", "1e999", "-1", "1_0", "--", "1e38", "3e38"]
# Bytes that are no UTF-8 arrive as surrogates.
ODD_NAMES = [
    "", ".", "..", "a/b", "/", "a\nb", "\udcff", "x" * 300, "~", "~nosuchuser/x",
    "-x", "a\\b", "a b", "\u2028", "*", "CON",
]  # fmt: skip

# Each option: what a run takes, and what none takes or nobody means.
OPTIONS: dict[str, tuple[list[str], list[str]]] = {
    "--dataset": (["digits", "auto"], ["mnist", "kmnist", "", "MNIST", "imagenet"]),
    "--data": (["data"], ["file", "absent", *ODD_NAMES]),
    "--activation": ([*ACTIVATIONS], ["", "gelu"]),
    "--cost": (["quadratic", "cross-entropy", "log-likelihood"], ["", "mse"]),
    "--init": (["scaled", "normal", "torch"], ["", "zero"]),
    "--recipe": (["best"], ["", "worst"]),
    "--epochs": (["1", "2"], ["-3", "0", "1.5", "x", ""]),
    "--batch-size": (["1", "7", "40", "41"], NO_INTEGER + HUGE),
    "--lr": (["0", "0.1", "3", "1e30"], NO_NUMBER),
    "--weight-decay": (["0", "1e-4", "10"], NO_NUMBER),
    "--schedule": (["constant", "cosine"], ["", "linear"]),
    "--distort": (["0", "1", "4"], ["4.1", *NO_NUMBER]),
    "--train-on": (["train", "all"], ["", "test"]),
    "--seed": (["0", "7", str(2**63 - 1)], NO_INTEGER + HUGE),
    "--device": (["auto", "cpu"], ["", "tpu", "cuda:99"]),
    "--threads": (["0", "1", "2"], ["1025", *NO_INTEGER[:6], *HUGE]),
    "--engine": (["autograd", "explicit"], ["", "jax"]),
    "--layers": (["bp", "native"], ["", "own"]),
    "--log-level": (["off", "basic", "full"], ["", "all"]),
    "--name": (["run"], ODD_NAMES),
    "--target-accuracy": (["0", "0.5", "1"], NO_NUMBER),
    "--checkpoint-every": (["1", "3", "9" * 20], ["0", "-1", "x", "1.5", ""]),
    "--resume": ([], ["file", "absent", "empty", *ODD_NAMES]),
}
BRIEF = ["--dataset", "digits", "--epochs", "1", "--log-level", "off"]
SIZES = [
    ["784", "5", "10"], ["784", "10"], ["784", "1", "3", "10"], ["784"], [], ["10"],
    ["0", "5", "10"], ["784", "-5", "10"], ["784", "5", "11"], ["784", "x", "10"],
    *(["784", size, "10"] for size in HUGE),
]  # fmt: skip


@st.composite
def commands(draw: st.DrawFn) -> list[str]:
    """A command line: up to seven options, of which now and then one is wrong."""
    arguments: list[str] = []
    names = draw(st.lists(st.sampled_from(sorted(OPTIONS)), max_size=7))
    wrong = draw(st.integers(0, 7))
    for i, name in enumerate(names):
        right, others = OPTIONS[name]
        # One wrong option a line, mostly: a second one would never be looked at.
        values = others if i == wrong or not right else right
        if name == "--resume" and i != wrong:
            continue
        value = draw(st.sampled_from(values))
        arguments += draw(st.sampled_from([[name, value], [f"{name}={value}"]]))
    if draw(st.booleans()):
        arguments += ["--sizes", *draw(st.sampled_from(SIZES))]
    arguments += draw(st.sampled_from([[], [], ["--json"], ["--quiet"], ["--page"]]))
    if draw(st.integers(0, 9)) == 0:
        arguments.insert(draw(st.integers(0, len(arguments))), draw(st.text()))
    return arguments


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """The current folder while this module runs, with forty digits for a data set and
    no mirror to download from."""
    import torchvision.datasets as datasets

    load = data.load

    def load_few(name: str, root: str | None = None, download: bool = True):
        splits = load(name, root, download)
        assert name == "digits"
        return data.Splits(*(data.Split(*(t[:40] for t in split)) for split in splits))

    before = Path.cwd()
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(data, "load", load_few)
        for name in ("MNIST", "FashionMNIST", "KMNIST"):
            patch.setattr(getattr(datasets, name), "mirrors", [])
        patch.delenv("TORCHBP_DATA", raising=False)
        patch.setenv("XDG_CACHE_HOME", folder)
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


@pytest.fixture
def here(place: Path) -> Iterator[Path]:
    yield place
    shutil.rmtree(place / "runs", ignore_errors=True)


def lay_out(folder: Path) -> Path:
    """An empty folder with what the options above name."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / "file").write_bytes(b"a file")
    (folder / "data").mkdir()
    (folder / "empty").mkdir()
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {
        os.fspath(path.relative_to(folder)): path.read_bytes()
        if path.is_file()
        else b""
        for path in folder.rglob("*")
    }


def status_of(main, arguments: list[str]) -> tuple[int, str, str]:
    """Exit status, output and errors; any other exception fails the test."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(arguments)
        except SystemExit as error:  # argparse's
            status = error.code
            assert status in (0, 2)
    return status, out.getvalue(), err.getvalue()


def assert_said(err: str) -> None:
    """One line that says what is wrong, behind notes."""
    *notes, last = err.rstrip("\n").split("\n")
    assert last.startswith("error: ") and len(last) > len("error: ")
    assert all(note.startswith("NOTE: ") for note in notes), err


def check_main_job(here: Path, arguments: list[str]) -> None:
    lay_out(here)
    before = contents(here)
    status, out, err = status_of(mnist.command_line, [*BRIEF, *arguments])
    assert status in (0, 1, 2)
    left = {name for name in contents(here) if name not in before} - {"runs"}
    if status == 2:
        assert_said(err)
        assert left == set()
    elif "--help" in arguments or "-h" in arguments:
        assert "usage" in out
    else:
        folders = {name.split(os.sep)[1] for name in left}
        assert len(folders) == 1, left
        if status == 1:
            assert_said(err)
    assert {name: content for name, content in contents(here).items() if name in before}


@SHORT
@given(arguments=commands())
def test_main_job(here: Path, arguments: list[str]) -> None:
    check_main_job(here, arguments)


@pytest.mark.slow
@LONG
@given(arguments=commands())
def test_main_job_at_length(here: Path, arguments: list[str]) -> None:
    check_main_job(here, arguments)


@pytest.mark.parametrize("option", [*OPTIONS, "--sizes"])
def test_each_wrong_value_of_each_option_of_the_main_job(
    here: Path, option: str
) -> None:
    """By itself, so that no other mistake hides it: 2, or a run that is one."""
    others = SIZES[3:] if option == "--sizes" else [[v] for v in OPTIONS[option][1]]
    for values in others:
        check_main_job(here, [option, *values])


@pytest.mark.parametrize(
    "arguments",
    [
        ["--threads", "2147483648"],
        ["--threads", "1025"],
        ["--dataset", "mnist", "--data", "~nosuchuser/x"],
        ["--sizes", "784", "9" * 20, "10"],
        ["--sizes", "784", "9" * 12, "10"],
        ["--engine", "explicit", "--lr", "3e38", "--weight-decay", "3e38"],
        ["--batch-size", "9" * 30],
    ],
    ids=lambda arguments: " ".join(arguments)[:40],
)
def test_refused_by_the_main_job(here: Path, arguments: list[str]) -> None:
    lay_out(here)
    status, out, err = status_of(
        mnist.command_line, ["--dataset", "digits", "--epochs", "1", *arguments]
    )
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"error: {arguments[-2].strip('-').split('-')[0][:4]}") or (
        "lr · weight_decay" in err or "root" in err or "sizes" in err
    )
    assert not list((here / "runs").iterdir() if (here / "runs").exists() else [])


def test_activations_that_overflow_are_no_reason_to_stop(here: Path) -> None:
    """Finite weights and costs, infinite activations: nothing to draw, no error."""
    lay_out(here)
    arguments = ["--dataset", "digits", "--epochs", "1", "--engine", "explicit"]
    arguments += ["--init", "normal", "--activation", "relu", "--lr", "1e30"]
    status, _, err = status_of(mnist.command_line, arguments)
    assert status in (0, 1)
    assert status == 0 or "not finite" in err or "cost became" in err


@st.composite
def changes(draw: st.DrawFn) -> list[str]:
    """Options beside --resume; the run that they are for has one epoch."""
    arguments: list[str] = []
    for name in draw(st.lists(st.sampled_from(sorted(OPTIONS)), max_size=4)):
        if name != "--resume":
            right, wrong = OPTIONS[name]
            arguments += [name, draw(st.sampled_from(right + wrong))]
    return arguments


@pytest.fixture(scope="module")
def finished(place: Path) -> Iterator[Path]:
    """A run of one epoch, outside the folder that is laid out anew each time."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [*BRIEF, "--sizes", "784", "5", "10", "--logdir", folder]
        arguments += ["--name", "whole"]
        assert status_of(mnist.command_line, arguments)[0] == 0
        yield Path(folder, "whole")


def check_resume(here: Path, finished: Path, arguments: list[str]) -> None:
    shutil.copytree(finished, lay_out(here) / "run")
    before = contents(here)
    status, _, err = status_of(mnist.command_line, ["--resume", "run", *arguments])
    assert status in (0, 1, 2)
    if status == 2:
        assert_said(err)
        assert contents(here) == before


@settings(SHORT, max_examples=30)
@given(arguments=changes())
def test_resume(here: Path, finished: Path, arguments: list[str]) -> None:
    check_resume(here, finished, arguments)


@pytest.mark.slow
@LONG
@given(arguments=changes())
def test_resume_at_length(here: Path, finished: Path, arguments: list[str]) -> None:
    check_resume(here, finished, arguments)


# python -m torchbp

NUMBERS = ["0", "1", "2", "3", *NO_INTEGER, *HUGE]
INPUTS = [
    "3,4", "5,4", "5", "()", "3:int<5", "2,3:simplex", "3:bool", "=0.5", "=None",
    "=[1]", "", "=", "=(", "=" + "(" * 3000, "=" + "-" * 100_000 + "1", "={[]: 1}",
    "=\udcff", "-1", "3,", "3,4:", "3:int<0", f"3:int<{'9' * 30}", "3:gaussian",
    "9" * 30, f"{'9' * 11},{'9' * 11}",
]  # fmt: skip
TARGETS = [
    "torchbp:BPLinear(4,5)", "torchbp:functional.linear", "torchbp:QuadraticCost",
    "", ":", "torchbp", "torchbp:", "torchbp:Nothing", "nosuchmodule:x", "..:x",
    "torchbp:BPLinear", "torchbp:BPLinear('x')", "torchbp:BPLinear(4,)x", "os:path",
    f"torchbp:BPLinear(4,{'9' * 30})", f"torchbp:BPLinear(4,{'9' * 14})",
    f"torchbp:BPLinear({'-' * 100_000}1)", f"torchbp:BPLinear({'(' * 3000})",
    "torchbp:BPLinear({[]: 1})", "torchbp:__doc__", "\udcff:x",
]  # fmt: skip


@st.composite
def questions(draw: st.DrawFn) -> list[str]:
    """A command line of ``python -m torchbp``, often a wrong one."""
    command = draw(st.sampled_from(["observe", "examine", "tour", "", "help"]))
    arguments = [command]
    if command == "examine":
        arguments.append(draw(st.sampled_from(TARGETS)))
        inputs = draw(st.lists(st.sampled_from(INPUTS), max_size=3))
        arguments += [f"--input={text}" for text in inputs]
        if draw(st.booleans()):
            arguments += ["--dtype", draw(st.sampled_from(["float64", "int8", ""]))]
        if draw(st.booleans()):
            arguments += ["--reference", draw(st.sampled_from(TARGETS))]
    if command == "observe" and draw(st.booleans()):
        sizes = draw(st.lists(st.sampled_from(NUMBERS), max_size=4))
        arguments += ["--sizes", *sizes]
    if command == "observe":
        costs = [*program.COSTS, "", "mse"]
        arguments += ["--cost", draw(st.sampled_from(costs))]
        folders = ["empty", "file", "absent", *ODD_NAMES]
        arguments += [f"--data={draw(st.sampled_from(folders))}"]
        arguments += [f"--lr={draw(st.sampled_from(['3', *NO_NUMBER]))}"]
    if draw(st.booleans()):
        arguments += [f"--seed={draw(st.sampled_from(NUMBERS))}"]
    return arguments


def check_question(here: Path, arguments: list[str]) -> None:
    before = contents(lay_out(here))
    status, out, err = status_of(program.main, arguments)
    assert status in (0, 1, 2)
    if status == 2:
        assert err.count("\n") == 1 and err.startswith("error: ")
    else:
        assert out and not err
    assert contents(here) == before


@settings(SHORT, max_examples=80)
@given(arguments=questions())
def test_questions(here: Path, arguments: list[str]) -> None:
    check_question(here, arguments)


@pytest.mark.slow
@LONG
@given(arguments=questions())
def test_questions_at_length(here: Path, arguments: list[str]) -> None:
    check_question(here, arguments)


@pytest.mark.parametrize("text", INPUTS, ids=lambda text: text[:20])
def test_each_input_of_examine(here: Path, text: str) -> None:
    arguments = ["examine", "torchbp:QuadraticCost", "--input=3,4", f"--input={text}"]
    check_question(here, arguments)


@pytest.mark.parametrize("target", TARGETS[3:], ids=lambda text: text[:30])
def test_each_target_of_examine(here: Path, target: str) -> None:
    check_question(here, ["examine", target, "--input", "3,4"])


# The experiments: all that is refused before anything is measured

SCRIPTS = (
    "batching", "benchmark", "gradcheck", "learning_slowdown", "nielsen",
    "vanishing_gradient", "why_backprop",
)  # fmt: skip


class Accepted(BaseException):
    """An experiment began: its settings passed."""


def options_of(script: str) -> dict[str, str]:
    """The script's options with a value that is right, as its settings have it."""
    module = importlib.import_module(f"experiments.{script}")
    settings = typing.get_type_hints(module.main)["settings"]
    defaults = vars(settings())
    return {
        f"--{field.name.replace('_', '-')}": str(defaults[field.name])
        for field in dataclasses.fields(settings)
        if field.name not in ("quick", "logdir", "data", "name", "sizes")
    }


@pytest.mark.parametrize("script", SCRIPTS)
@settings(SHORT, max_examples=60)
@given(chosen=st.data())
def test_experiments_refuse(here: Path, script: str, chosen: st.DataObject) -> None:
    module = importlib.import_module(f"experiments.{script}")
    options = options_of(script)
    arguments = []
    for name in chosen.draw(st.lists(st.sampled_from(sorted(options)), max_size=4)):
        values = [options[name], *NO_INTEGER, *NO_NUMBER, *HUGE]
        arguments.append(f"{name}={chosen.draw(st.sampled_from(values))}")
    arguments += chosen.draw(st.lists(st.sampled_from(["--quick", "x", "--y"])))

    def main(_: object) -> None:
        raise Accepted

    lay_out(here)
    before = contents(here)

    def run(_: object, *rest: typing.Any, **options: typing.Any) -> int:
        return run_experiment(main, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "main", main)
        for place in (module, reporting):  # where the program finds it
            patch.setattr(place, "run_experiment", run, raising=False)
        try:
            status, _, err = status_of(module.command_line, arguments)
        except Accepted:
            return
    assert status == 2
    usage, _, reason = err.partition("error: ")  # argparse's own has its usage before
    assert reason.count("\n") == 1 and (not usage or usage.startswith("usage: "))
    assert contents(here) == before


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("batching", ["--data", "file"]),
        ("batching", ["--data", "~nosuchuser/x"]),
        ("learning_slowdown", ["--data", "absent", "--dataset", "kmnist"]),
        ("nielsen", ["--data", "empty"]),
        ("vanishing_gradient", ["--name", "a/b", "--dataset", "digits"]),
        ("vanishing_gradient", ["--data", "\udcff", "--dataset", "fashion"]),
        ("why_backprop", ["--logdir", "file"]),
    ],
    ids=str,
)
def test_experiments_that_cannot_begin(
    here: Path, script: str, arguments: list[str]
) -> None:
    module = importlib.import_module(f"experiments.{script}")
    before = contents(lay_out(here))
    status, _, err = status_of(module.command_line, ["--quick", *arguments])
    assert status == 2
    assert err.count("\n") == 1 and err.startswith("error: ")
    after = contents(here)
    assert after.pop("runs", b"") == b""
    assert after == before
