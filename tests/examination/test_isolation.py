"""Examinations in a child process.

Each test runs in a fresh interpreter: autograd does not run in the fork of a process in
which it has started threads, as other tests make it do.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import processes
import pytest
import torch
import wrong_functions
from torch.utils.checkpoint import checkpoint
from wrong_functions import LAYER, X

import torchbp
from torchbp.__main__ import main
from torchbp.examination import CHECKS

HERE = [Path(__file__).parent, Path(__file__).parents[1]]
pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs processes that fork")


class NumPyInBackward(wrong_functions.Square):
    """Reads the memory of what may be a batched tensor."""

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        g = torch.from_numpy(grad.data.cpu().numpy().copy())
        return 2 * x * g


class EndsTheProcess(wrong_functions.Square):
    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        if not x.is_contiguous():
            os.kill(os.getpid(), signal.SIGSEGV)
        return 2 * x * grad


def numpy_in_a_backward_does_not_end_the_process():
    report = torchbp.examine(NumPyInBackward, X, isolate=True)
    assert report["batched-gradients"].status == "not supported"
    assert "which has no memory" in report["batched-gradients"].reason
    assert len(report.findings) == len(CHECKS)


def code_that_crashes_is_isolated():
    report = torchbp.examine(EndsTheProcess, X, isolate=True)
    assert {finding.check for finding in report.failures} == {"input-layouts"}
    assert "SIGSEGV" in report["input-layouts"].reason
    assert report["first-derivatives"].status == "pass"
    assert report["vmap"].reason == "see input-layouts"


def isolation_changes_nothing_else():
    isolated = torchbp.examine(wrong_functions.MeanForSum, *LAYER, isolate=True)
    assert isolated == torchbp.examine(wrong_functions.MeanForSum, *LAYER)
    with pytest.raises(TypeError, match="fn: expected a Function"):
        torchbp.examine(3, isolate=True)


def the_command_isolates():
    line = "examine wrong_functions:RoundsStraightThrough --input 3,4 --isolate"
    assert main(line.split()) == 1
    assert main([*line.split(), "--surrogate", "torch:clone"]) == 0


def nested(depth, x):
    """sin(x), whose backward runs inside as many other ones."""
    if depth == 0:
        return torch.sin(x)
    return checkpoint(lambda v: nested(depth - 1, v), x, use_reentrant=True)


def a_process_with_threads_of_autograd_is_refused():
    # At the 60th backward inside another torch starts a thread.
    nested(70, torch.ones(3, requires_grad=True)).sum().backward()
    with pytest.raises(ValueError, match="autograd has started no threads"):
        torchbp.examine(wrong_functions.Square, X, isolate=True)
    assert torchbp.examine(wrong_functions.Square, X).ok


@pytest.mark.parametrize(
    "case",
    [
        numpy_in_a_backward_does_not_end_the_process,
        code_that_crashes_is_isolated,
        isolation_changes_nothing_else,
        the_command_isolates,
        a_process_with_threads_of_autograd_is_refused,
    ],
)
def test_in_a_fresh_process(case):
    done = processes.run(
        sys.executable,
        "-c",
        f"import test_isolation; test_isolation.{case.__name__}()",
        env={"PYTHONPATH": os.pathsep.join(map(str, [*HERE, processes.ROOT]))},
    )
    assert done.returncode == 0, done.stdout + done.stderr
