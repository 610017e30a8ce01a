"""Count which of the tests' wrong Functions torch's gradcheck detects.

    python experiments/gradcheck_misses.py       a line for each Function, and the count

A Function counts as detected if gradcheck raises on it but not on its right
counterpart. The column "all" adds gradgradcheck and batched gradients; the last column
names the check of `torchbp.examine` that detects it.

Exit status: 0.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

sys.path.insert(0, str(Path(__file__).parents[1]))  # to find torchbp

import torchbp
from torchbp._terminal import Parser, run_program

TESTS = Path(__file__).parents[1] / "tests"


@dataclass(frozen=True)
class Detection:
    """Which tools detect one wrong Function.

    Attributes:
        name: of the Function.
        first: whether gradcheck with its defaults detects it.
        all: whether gradcheck, gradgradcheck or batched gradients do.
        check: the check of `torchbp.examine` that detects it, "" if none does.
    """

    name: str
    first: bool
    all: bool
    check: str

    def __str__(self) -> str:
        first, all = ("yes" if found else "-" for found in (self.first, self.all))
        return f"{self.name:<26} {first:<10} {all:<5} {self.check}"


def main() -> list[Detection]:
    """Apply gradcheck and `torchbp.examine` to every wrong Function."""
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))
    wrong_functions = importlib.import_module("wrong_functions")
    return [_detect(wrong) for wrong in wrong_functions.WRONG_FUNCTIONS]


def _detect(wrong: Any) -> Detection:
    """Apply every tool to one wrong Function."""
    report = torchbp.examine(wrong.wrong, *wrong.inputs, **wrong.options)
    findings = [*report.failures, *report.warnings]
    first = _detects(gradcheck, wrong)
    any_tool = first or _detects(gradgradcheck, wrong) or _detects(_batched, wrong)
    return Detection(wrong.name, first, any_tool, findings[0].check if findings else "")


def _batched(fn: Any, inputs: Any) -> bool:
    return gradcheck(fn, inputs, check_batched_grad=True)


def _detects(check: Callable[..., Any], wrong: Any) -> bool:
    """Return whether the check raises on the wrong Function and not on the right one.
    All inputs are differentiated, or only the first if the right Function fails then (a
    cost's target is a constant)."""
    for count in (len(wrong.inputs), 1):
        if not _raises(check, wrong.right, wrong.inputs, count):
            return _raises(check, wrong.wrong, wrong.inputs, count)
    return False


def _raises(check: Callable[..., Any], fn: Any, inputs: Any, count: int) -> bool:
    """Return whether the check raises on float64 copies, the first `count` of them
    leaves."""
    copies = [
        t.detach().double().requires_grad_(k < count)
        if isinstance(t, Tensor) and t.is_floating_point()
        else t
        for k, t in enumerate(inputs)
    ]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            check(fn, tuple(copies))
        except Exception:
            return True
    return False


def print_table(rows: list[Detection]) -> None:
    """Print a line for each wrong Function, and the counts."""
    print(f"{'wrong Function':<26} {'gradcheck':<10} {'all':<5} examine")
    for row in rows:
        print(row)
    first, all = sum(row.first for row in rows), sum(row.all for row in rows)
    print(
        f"\nof {len(rows)} wrong Functions gradcheck detects {first}, with "
        f"gradgradcheck and batched gradients {all}, examine "
        f"{sum(bool(row.check) for row in rows)}"
    )


def command_line(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status.

    Args:
        arguments: of the command line; those of the process if None.
    """

    def program() -> int:
        Parser(__doc__).parse_args(arguments)
        print_table(main())
        return 0

    return run_program(program)


if __name__ == "__main__":
    sys.exit(command_line())
