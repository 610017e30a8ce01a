"""What ends a program: its exit status, and one line on standard error."""

from __future__ import annotations

import argparse
import sys

import pytest

from torchbp._terminal import Parser, UserError, one_line, print_note, run_program
from torchbp.data import DataError
from torchbp.training import CheckpointError


class FailedError(Exception):
    """A failure of its own status."""


def failing(error):
    def program():
        raise error

    return program


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (BrokenPipeError(), 141, None),
        (SystemExit(3), 3, None),
        (SystemExit(), 0, None),
        (ValueError("lr: expected\n  a number"), 2, "error: lr: expected a number"),
        (OSError("disk full"), 2, "error: disk full"),
        (ModuleNotFoundError("no jax"), 2, "error: no jax"),
        (DataError("no\ndata"), 2, "error: no data"),
        (CheckpointError("no\ncheckpoint"), 2, "error: no checkpoint"),
        (FailedError("it\nfailed"), 1, "error: it failed"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("prefix", ["", "process 1: "])
def test_a_failure_is_a_status_and_a_line(capfd, error, status, line, prefix):
    assert run_program(failing(error), {FailedError: 1}, prefix) == status
    out, err = capfd.readouterr()
    assert (out, err) == ("", "" if line is None else f"{prefix}{line}\n")


def test_a_status_of_its_own_precedes_the_general_one():
    assert run_program(failing(UserError("x")), {UserError: 5}) == 5
    assert run_program(failing(DataError("x")), {UserError: 5}) == 5
    assert run_program(failing(OSError("x")), {UserError: 5}) == 2


def test_other_exceptions_are_defects_and_keep_their_traceback():
    for error in (RuntimeError("x"), TypeError("x"), AssertionError("x")):
        with pytest.raises(type(error)):
            run_program(failing(error))


def test_output_that_cannot_be_flushed_is_that_of_a_reader_who_left(monkeypatch):
    class Closed:
        errors, encoding = "replace", "utf-8"

        def write(self, text):
            pass

        def flush(self):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    assert run_program(lambda: 0) == 141


@pytest.mark.parametrize("arguments", [["--n", "x"], ["--n=--"], ["--other"]])
def test_bad_arguments_are_one_line(capsys, arguments):
    parser = Parser("A program.\n\nMore of it.", argument_default=argparse.SUPPRESS)
    parser.add_argument("--n", type=int)
    assert run_program(lambda: bool(parser.parse_args(arguments))) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1


def test_lines_are_joined_and_spaces_within_them_kept(capsys):
    assert one_line("a  b\n\n\tc\u2028d ") == "a  b c d"
    print_note("first\nsecond")
    assert capsys.readouterr().err == "NOTE: first second\n"
