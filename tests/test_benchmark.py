"""The benchmark measures what it says, and nothing that computes something else."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import torchbp
from experiments import benchmark

TINY = benchmark.Settings(repeats=3, seconds=0.0)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(benchmark, "SIZES", ((4, 5, 3), (2, 3, 7)))


def test_a_row_for_every_layer_and_size(capsys):
    rows = benchmark.main(TINY)
    assert [(r.size, r.layer) for r in rows] == [
        (size, layer)
        for size in ("4 x 5 -> 3", "2 x 3 -> 7")
        for layer in benchmark.LAYERS
    ]
    for row in rows:
        assert row.native > 0 and row.ours > 0
        assert row.median_ratio > 0 and row.min_ratio > 0
        assert row.our_bytes and row.native_bytes
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 + len(rows)
    assert f"torch {torch.__version__}" in printed[0]


def test_variants_take_turns():
    calls: list[str] = []
    steps = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    times = benchmark.take_turns(steps, 4, 0.0, torch.device("cpu"))
    assert {name: len(t) for name, t in times.items()} == {"a": 4, "b": 4}
    assert calls[-8:] == ["b", "a", "a", "b", "b", "a", "a", "b"]


def test_a_layer_that_computes_something_else_is_not_timed():
    ours = torchbp.BPLinearSigmoid(5, 3)
    x, g = torch.rand(4, 5), torch.rand(4, 3)
    benchmark.check_agreement(ours, torchbp.to_native(ours), x, g)
    with pytest.raises(AssertionError, match="differ by"):
        benchmark.check_agreement(ours, nn.Linear(5, 3), x, g)


def test_peak_bytes_count_what_is_held():
    class Held(nn.Module):
        def forward(self, x):
            return (x * 2) * 3  # a temporary, a result, and gradients likewise

    x = torch.ones(1024, 256, requires_grad=True)
    peak = benchmark.peak_bytes(Held(), x, torch.ones_like(x))
    assert 2 * x.nbytes <= peak <= 4 * x.nbytes


def test_rows_as_json(tmp_path, capsys):
    file = tmp_path / "rows.json"
    arguments = ["--repeats", "1", "--seconds", "0", "--json", str(file)]
    assert benchmark.command_line(arguments) == 0
    assert len(json.loads(file.read_text())) == 8
    assert capsys.readouterr().err.count("error") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--repeats", "0"], "expected at least 1, got 0"),
        (["--device", "abacus"], "device: expected one that is there (cpu"),
    ],
)
def test_bad_arguments(capsys, options, message):
    assert benchmark.command_line(options) == 2
    assert message in capsys.readouterr().err
