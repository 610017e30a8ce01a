"""experiments/why_backprop.py: every way gives the gradient; claims can fail."""

from __future__ import annotations

import dataclasses
import json
import math
import sys

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments import why_backprop as experiment

TINY = ((3, 2), (5, 4, 2))


@pytest.fixture
def small(monkeypatch):
    """Passes of two small networks, and sampling from 20 parameters on."""
    monkeypatch.setattr(experiment, "PASSES", ((6, 5, 4), (6, 5, 5, 5, 4)))
    monkeypatch.setattr(experiment, "ALL_UP_TO", 20)
    monkeypatch.setattr(experiment, "SAMPLE", 7)


def settings(tmp_path, **changes):
    few = {"sizes": TINY, "repeats": 1, "batch_size": 4, "logdir": str(tmp_path)}
    return experiment.Settings(**{**few, "name": "one", **changes})


def test_everything_is_measured_and_written(small, tmp_path, capsys):
    results = experiment.main(settings(tmp_path))
    out = capsys.readouterr().out
    folder = tmp_path / "one"
    written = json.loads((folder / "results.json").read_text())
    assert written == json.loads(json.dumps(results))
    assert len(written["ways"]) == 2 * 5 and len(written["errors"]) == 4
    by = {(tuple(w["sizes"]), w["way"]): w for w in written["ways"]}
    for sizes, P, is_sampled in ((TINY[0], 8, False), (TINY[1], 34, True)):
        passes = [by[sizes, name]["forward"] for name in experiment.PERTURBING]
        assert passes == pytest.approx([P + 1, 2 * P, P])
        assert by[sizes, experiment.CENTRAL]["is_sampled"] is is_sampled
        assert not by[sizes, experiment.BATCHED]["is_sampled"]
        for name in (experiment.MODE, experiment.LOOPS, experiment.BATCHED):
            assert by[sizes, name]["error"] < 1e-5
        assert 1e-5 < by[sizes, experiment.FORWARD]["error"] < 0.1
    assert "~68" in out and "~ extrapolated from 7" in out
    assert out.splitlines()[-1] == results["verdict"]
    assert max(map(len, out.partition("verdict")[0].splitlines())) <= 100
    events = EventAccumulator(str(folder))
    events.Reload()
    shown = [p.step for p in events.Scalars("forward_over_P/forward_mode")]
    assert shown == [8, 34]


def test_perturbation_leaves_the_network_as_it_was():
    problem = experiment.Problem((4, 3, 2), 0)
    before = [p.detach().clone() for p in problem.model.parameters()]
    places = problem.places(range(23))
    for perturb in experiment.PERTURBATIONS.values():
        perturb(problem, places, 1e-2)
    for p, expected in zip(problem.model.parameters(), before, strict=True):
        assert torch.equal(p, expected)


@pytest.mark.parametrize("sizes", [(4, 3), (5, 4, 3, 2)])
def test_every_way_gives_autograd_s_gradient(sizes):
    problem = experiment.Problem(sizes, 1, torch.float64)
    problem.cost(problem.model(problem.x), problem.y).backward()
    expected = torch.cat([p.grad.flatten() for p in problem.model.parameters()])
    everywhere = problem.places(range(experiment.parameters(sizes)))
    for perturb in experiment.PERTURBATIONS.values():
        found = torch.tensor(perturb(problem, everywhere, 1e-6), dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    for sweep in experiment.SWEEPS.values():
        grads, _ = sweep(problem)
        found = torch.cat([g.flatten() for g in grads])
        torch.testing.assert_close(found, expected)


def test_both_dtypes_have_the_same_numbers():
    single, double = (
        experiment.Problem((4, 3, 2), 5, dtype)
        for dtype in (torch.float32, torch.float64)
    )
    pairs = zip(
        [*single.model.parameters(), single.x, single.y],
        [*double.model.parameters(), double.x, double.y],
        strict=True,
    )
    assert all(torch.equal(a.double(), b) for a, b in pairs)


def test_operations_are_predicted_and_counted():
    assert experiment.operations((784, 30, 10)) == pytest.approx(1.0126, abs=1e-4)
    assert experiment.operations((784, 512, 512, 10)) == pytest.approx(1.40, abs=5e-3)
    assert experiment.operations((784, *[512] * 99, 10)) == pytest.approx(2, abs=0.02)
    few = settings("unused", batch_size=4)
    for sizes in ((6, 5), (6, 5, 4), (6, 5, 5, 5, 4)):
        passes = experiment.time_passes(sizes, few)
        assert passes.counted == pytest.approx(passes.predicted)


def _ways(exponent=1.0, error=1e-7, rough=1e-2, extra=0):
    ways = []
    for sizes, P in zip(TINY, (100, 10_000), strict=True):
        for name, (per, once) in experiment.PERTURBING.items():
            passes, off = per * P + once + extra, rough
            if name == experiment.MODE:
                off = error
            ways.append(experiment.Way(
                sizes, name, P, passes, 0, 1e-6 * P**exponent, off, False
            ))  # fmt: skip
        ways += [
            experiment.Way(sizes, name, P, 1, 1, 1e-6, error, False)
            for name in experiment.SWEEPS
        ]
    return ways


PASSES = [
    experiment.Passes((6, 5, 4), 1.1, 1.1, 1.0),
    experiment.Passes((6, 5, 5, 4), 1.8, 1.8, 1.7),
]


def _errors(order=1.0, depth=1e-6):
    """A V: rounding depth²/ε left, ε^order right."""
    steps = [10.0**power for power in range(-12, 1)]
    errors = [s**order + depth ** (order + 1) / s for s in steps]
    return steps, errors


def _vs(forward=1.0, central=2.0):
    return [
        experiment.Errors("float64", way, *_errors(order))
        for way, order in ((experiment.FORWARD, forward), (experiment.CENTRAL, central))
    ]


def _failed(ways=None, passes=None, errors=None):
    claims = experiment.judge(ways or _ways(), passes or PASSES, errors or _vs())
    return [claim for claim, holds in claims.items() if not holds]


def test_all_claims_hold_on_what_they_say():
    assert _failed() == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"exponent": 0.5}, "grows as P"),
        ({"exponent": 2.0}, "grows as P"),
        ({"error": 1e-3}, "exact to rounding"),
        ({"rough": 1e-7}, "exact to rounding"),
        ({"extra": 1}, "passes forward, counted"),
    ],
)
def test_claims_fail_on_other_ways(changes, said):
    (claim,) = _failed(_ways(**changes))
    assert said in claim


def test_claims_fail_on_other_passes():
    wrong = [PASSES[0], dataclasses.replace(PASSES[1], counted=2.8)]
    assert "operations counted" in _failed(passes=wrong)[0]
    for measured in (5.0, 0.9):  # too slow; not slower than the shallow one
        wrong = [PASSES[0], dataclasses.replace(PASSES[1], measured=measured)]
        (claim,) = _failed(passes=wrong)
        assert "takes the time" in claim


def test_claims_fail_on_other_errors():
    (claim,) = _failed(errors=_vs(central=1.0))
    assert "right side" in claim
    falling = experiment.Errors("float64", experiment.FORWARD, [0.01, 0.1, 1.0], [
        1.0, 0.1, 0.01
    ])  # fmt: skip
    assert not falling.is_v and math.isnan(falling.order)
    failed = _failed(errors=[falling])
    assert any("shape of a V" in claim for claim in failed)
    assert any("right side" in claim for claim in failed)


def test_orders_and_the_best_step():
    for order in (1.0, 2.0):
        errors = experiment.Errors("float64", "", *_errors(order))
        assert errors.is_v and errors.order == pytest.approx(order, abs=0.05)
    assert errors.steps[errors.best] == pytest.approx(1e-6)


def test_exit_status_is_the_verdict(small, tmp_path, monkeypatch):
    options = "--sizes 3 2 --sizes 4 2 --repeats 1 --batch-size 2 --logdir".split()
    for holds, status in ((True, 0), (False, 1)):
        monkeypatch.setattr(experiment, "judge", lambda *_, holds=holds: {"x": holds})
        name = ["--name", f"run{status}"]
        assert experiment.command_line([*options, str(tmp_path), *name]) == status
        written = json.loads((tmp_path / f"run{status}" / "results.json").read_text())
        assert written["settings"]["sizes"] == [[3, 2], [4, 2]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--sizes 3 2", "sizes: expected two networks or more"),
        ("--sizes 3 2 --sizes 3 2", "sizes: expected two networks or more"),
        ("--sizes 3 --sizes 4 2", "sizes: expected at least two, got [3]"),
        ("--sizes 3 0 --sizes 4 2", "sizes: expected positive integers"),
        ("--repeats 0", "repeats: expected at least 1, got 0"),
        ("--name a/b", "name: expected a plain folder name"),
    ],
)
def test_bad_arguments(tmp_path, capsys, options, message):
    assert experiment.command_line([*options.split(), "--logdir", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_a_line_says_so(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    experiment.main(settings(tmp_path))
    assert 'pip install ".[plots]"' in capsys.readouterr().out
    assert not list((tmp_path / "one").glob("*.png"))
