"""experiments/gradcheck.py: passes on what is right, and fails on what is not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from experiments import gradcheck
from torchbp import costs, functional

SCRIPT = Path(gradcheck.__file__)


@pytest.fixture
def only_small(monkeypatch):
    """One shape and one dtype: enough to see a verdict."""
    monkeypatch.setattr(gradcheck, "LAYER_SHAPES", (((4,), 3, 3),))
    monkeypatch.setattr(gradcheck, "COST_SHAPES", ((4, 3),))
    monkeypatch.setattr(gradcheck, "DTYPES", (torch.float64,))


@pytest.mark.parametrize("seed", range(3))
def test_everything_passes(seed):
    rows = gradcheck.main(gradcheck.GradcheckSettings(device="cpu", seed=seed))
    layers = len(gradcheck.LAYERS) * len(gradcheck.LAYER_SHAPES)
    each = layers + len(gradcheck.COSTS) * len(gradcheck.COST_SHAPES)
    assert len(rows) == each * len(gradcheck.DTYPES)
    assert [str(row) for row in rows if not row.ok] == []
    for row in rows:
        assert (row.numeric is None) == (row.dtype != torch.float64)


def test_a_seed_fixes_the_numbers(only_small):
    first, again, other = (
        gradcheck.main(gradcheck.GradcheckSettings("cpu", seed)) for seed in (0, 0, 1)
    )
    assert first == again != other


class WrongSlope(functional.LinearSigmoidFunction):
    @staticmethod
    def gate(grad_a, a):
        return grad_a * a * (1 - a) * (1 + 1e-5)


class WrongBias(functional.LinearFunction):
    @classmethod
    def backward(cls, ctx, *grads):
        grad_x, grad_W, grad_b = super().backward(ctx, *grads)
        return grad_x, grad_W, grad_b * 0


class NotANumber(functional.LinearFunction):
    @staticmethod
    def gate(grad_a, s):
        return grad_a * float("nan")


WRONG_LAYERS = {
    "slope": (lambda *t: functional.layer(WrongSlope, *t),
              lambda *t: torch.sigmoid(F.linear(*t))),
    "bias": (lambda *t: functional.layer(WrongBias, *t), F.linear),
    "NaN": (lambda *t: functional.layer(NotANumber, *t), F.linear),
    "value": (lambda *t: functional.linear(*t) * 2, F.linear),
    "shape": (lambda *t: functional.linear(*t)[:1], F.linear),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_LAYERS)
def test_a_wrong_layer_fails(monkeypatch, capsys, only_small, wrong):
    monkeypatch.setitem(gradcheck.LAYERS, "wrong", WRONG_LAYERS[wrong])
    assert gradcheck.command_line(["--device", "cpu"]) == 1
    *table, _, count = capsys.readouterr().out.splitlines()
    failed = [line for line in table if line.endswith("FAILED")]
    assert [line.split()[0] for line in failed] == ["wrong"]
    total = len(gradcheck.LAYERS) + len(gradcheck.COSTS)
    assert count == f"{total - 1} of {total} checks passed"


def test_finite_differences_fail_by_themselves(monkeypatch, only_small):
    """Wrong in the same way as what it is compared with: still found out."""
    both = WRONG_LAYERS["slope"][0]
    monkeypatch.setitem(gradcheck.LAYERS, "wrong", (both, both))
    (row,) = (
        r
        for r in gradcheck.main(gradcheck.GradcheckSettings("cpu"))
        if r.name == "wrong"
    )
    assert row.max_rel == 0 and row.numeric > gradcheck.NUMERIC_TOLERANCE
    assert not row.ok


def test_a_cost_divided_by_the_wrong_number_fails(monkeypatch, capsys, only_small):
    wrong = costs.quadratic_cost, F.mse_loss
    monkeypatch.setitem(gradcheck.COSTS, "wrong", wrong)
    assert gradcheck.command_line(["--device", "cpu"]) == 1
    assert "FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", gradcheck.DTYPES, ids=str)
def test_a_missing_transpose_fails_in_every_dtype(monkeypatch, only_small, dtype):
    monkeypatch.setattr(gradcheck, "DTYPES", (dtype,))
    monkeypatch.setattr(
        functional, "gradients", lambda d, x, W, needs: (d @ W.t(), d.t() @ x, d.sum(0))
    )
    rows = gradcheck.main(gradcheck.GradcheckSettings("cpu"))
    wrong = {row.name for row in rows if not row.ok}
    assert wrong == set(gradcheck.LAYERS)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there(capsys, device):
    there = {"cuda": torch.cuda, "mps": torch.backends.mps}[device].is_available()
    if there:
        pytest.skip(f"needs a machine without {device}")
    assert gradcheck.command_line(["--device", device]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: device: expected") and f"got '{device}'" in line


@pytest.mark.parametrize("options", [["--seed", "-1"], ["--seed", str(2**63)]])
def test_a_seed_out_of_range(capsys, options):
    assert gradcheck.command_line(options) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: seed: expected 0 to 2^63 - 1, got")


@pytest.mark.parametrize("options", [["--device", "abacus"], ["--seed", "x"], ["more"]])
def test_bad_options(capsys, options):
    assert gradcheck.command_line(options) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_settings_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"device: expected one of .* got 'abacus'"):
        gradcheck.GradcheckSettings(device="abacus")


def test_as_a_program():
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--device", "cpu"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])},
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[0] == gradcheck.HEADER
    total = len(lines) - 3
    assert lines[-1] == f"{total} of {total} checks passed"
