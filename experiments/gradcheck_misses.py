"""Count which of the wrong Functions of the tests torch's gradcheck notices.

    python experiments/gradcheck_misses.py       a line for each Function, and the count

A Function counts as noticed where gradcheck raises on it and not on the right Function
beside it. The column "all" adds gradgradcheck and batched gradients; the last one is
the one check of `torchbp.examine` that finds it.

Exit status: 0.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import torchbp
from torchbp._terminal import Parser

TESTS = Path(__file__).parents[1] / "tests"


@dataclass(frozen=True)
class Row:
    """One wrong Function.

    Attributes:
        name: of the Function.
        first: whether gradcheck with its defaults notices it.
        all: whether gradcheck, gradgradcheck or batched gradients do.
        check: the check of `torchbp.examine` that finds it, "" if none does.
    """

    name: str
    first: bool
    all: bool
    check: str

    def __str__(self) -> str:
        first, all = ("yes" if noticed else "-" for noticed in (self.first, self.all))
        return f"{self.name:<26} {first:<10} {all:<5} {self.check}"


def main() -> list[Row]:
    """Try gradcheck and `torchbp.examine` on every wrong Function."""
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))
    wrong_functions = importlib.import_module("wrong_functions")
    return [_row(wrong) for wrong in wrong_functions.WRONG_FUNCTIONS]


def _row(wrong: Any) -> Row:
    report = torchbp.examine(wrong.wrong, *wrong.inputs, **wrong.options)
    found = [*report.failures, *report.warnings]
    first = _notices(gradcheck, wrong)
    everything = first or _notices(gradgradcheck, wrong) or _notices(_batched, wrong)
    return Row(wrong.name, first, everything, found[0].check if found else "")


def _batched(fn: Any, inputs: Any) -> bool:
    return gradcheck(fn, inputs, check_batched_grad=True)


def _notices(check: Callable[..., Any], wrong: Any) -> bool:
    """Whether the check raises on what is wrong where it passes what is right: with all
    inputs differentiated, else with the first one (a cost's target is a constant)."""
    for count in (len(wrong.inputs), 1):
        if not _raises(check, wrong.right, wrong.inputs, count):
            return _raises(check, wrong.wrong, wrong.inputs, count)
    return False


def _raises(check: Callable[..., Any], fn: Any, inputs: Any, count: int) -> bool:
    """Whether the check raises, in float64, on copies of which `count` are leaves."""
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


def command_line(arguments: list[str] | None = None) -> int:
    """Print the table; return the exit status."""
    Parser(__doc__).parse_args(arguments)
    rows = main()
    print(f"{'wrong Function':<26} {'gradcheck':<10} {'all':<5} examine")
    for row in rows:
        print(row)
    first, all = sum(row.first for row in rows), sum(row.all for row in rows)
    print(
        f"\nof {len(rows)} wrong Functions gradcheck notices {first}, with "
        f"gradgradcheck and batched gradients {all}, examine "
        f"{sum(bool(row.check) for row in rows)}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(command_line())
