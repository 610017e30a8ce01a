"""experiments/why_backprop.py: every way gives the gradient; claims can fail."""

from __future__ import annotations

import dataclasses
import json
import math

import bounds
import pytest
import torch

from experiments import why_backprop as experiment
from experiments.support import gradient_costs, gradient_ways
from experiments.support.gradient_ways import Problem

TINY = ((3, 2), (5, 4, 2))


@pytest.fixture
def small(monkeypatch):
    """Passes of two small networks, and sampling from 20 parameters on."""
    monkeypatch.setattr(experiment, "PASSES", ((6, 5, 4), (6, 5, 5, 5, 4)))
    monkeypatch.setattr(gradient_costs, "ALL_UP_TO", 20)
    monkeypatch.setattr(gradient_costs, "SAMPLE", 7)


def settings(tmp_path, **changes):
    few = {"sizes": TINY, "repeats": 1, "batch_size": 4, "logdir": str(tmp_path)}
    return experiment.WhySettings(**{**few, "name": "one", **changes})


def test_everything_is_measured_and_written(small, measure, tmp_path):
    written, out, events = measure(experiment.main, settings(tmp_path))
    assert len(written["ways"]) == 2 * 5 and len(written["errors"]) == 4
    by = {(tuple(w["sizes"]), w["way"]): w for w in written["ways"]}
    for sizes, P, is_sampled in ((TINY[0], 8, False), (TINY[1], 34, True)):
        passes = [by[sizes, name]["forward"] for name in experiment.PERTURBING]
        assert passes == pytest.approx([P + 1, 2 * P, P])
        assert by[sizes, experiment.CENTRAL]["is_sampled"] is is_sampled
        for name in experiment.BACKPROPS:
            way = by[sizes, name]
            assert (way["forward"], way["backward"]) == pytest.approx((1, 1))
        assert not by[sizes, experiment.BATCHED]["is_sampled"]
        off = bounds.network(torch.float32, longest=8, layers=2)
        for name in (experiment.MODE, experiment.LOOPS, experiment.BATCHED):
            assert by[sizes, name]["error"] < off
        assert off < by[sizes, experiment.FORWARD]["error"] < 0.1
    assert "~68" in out and "~ extrapolated from 7" in out
    assert '"exponentially cheaper" is loose' in out and "the factor is about P" in out
    assert written["shown"] == all(written["claims"].values())
    shown = [p.step for p in events.Scalars("forward_over_P/forward_mode")]
    assert shown == [8, 34]


def test_perturbation_leaves_the_network_as_it_was():
    problem = Problem((4, 3, 2), 0)
    before = [p.detach().clone() for p in problem.model.parameters()]
    entries = problem.entries(range(23))
    for perturb in gradient_ways.PERTURBATIONS.values():
        perturb(problem, entries, 1e-2)
    for p, expected in zip(problem.model.parameters(), before, strict=True):
        assert torch.equal(p, expected)


@pytest.mark.parametrize("sizes", [(4, 3), (5, 4, 3, 2)])
def test_every_way_gives_autograd_s_gradient(sizes):
    problem = Problem(sizes, 1, torch.float64)
    problem.cost(problem.model(problem.x), problem.y).backward()
    expected = torch.cat([p.grad.flatten() for p in problem.model.parameters()])
    everywhere = problem.entries(range(gradient_ways.count_parameters(sizes)))
    for perturb in gradient_ways.PERTURBATIONS.values():
        found = torch.tensor(perturb(problem, everywhere, 1e-6), dtype=torch.float64)
        torch.testing.assert_close(found, expected, **bounds.difference(1e-6, order=1))
    for way in experiment.BACKPROPS.values():
        grads = gradient_costs.flat(way(problem))
        torch.testing.assert_close(grads, expected)


def test_a_second_pass_of_backprop_would_be_seen(monkeypatch):
    def twice(problem):
        gradient_ways.batched(problem)
        return gradient_ways.batched(problem)

    problem = Problem((6, 5, 4), 0)
    assert gradient_costs.PASS_COUNTS[experiment.BATCHED](problem) == pytest.approx(
        (1, 1)
    )
    assert gradient_costs.PASS_COUNTS[experiment.LOOPS](problem) == pytest.approx(
        (1, 1)
    )
    monkeypatch.setitem(experiment.BACKPROPS, experiment.BATCHED, twice)
    assert gradient_costs.PASS_COUNTS[experiment.BATCHED](problem)[1] > 2


def test_both_dtypes_have_the_same_numbers():
    single, double = (
        Problem((4, 3, 2), 5, dtype) for dtype in (torch.float32, torch.float64)
    )
    pairs = zip(
        [*single.model.parameters(), single.x, single.y],
        [*double.model.parameters(), double.x, double.y],
        strict=True,
    )
    assert all(torch.equal(a.double(), b) for a, b in pairs)


def test_operations_are_predicted_and_counted():
    assert gradient_costs.operation_ratio((784, 30, 10)) == pytest.approx(
        1.0126, **bounds.printed(4)
    )
    assert gradient_costs.operation_ratio((784, 512, 512, 10)) == pytest.approx(
        1.40, **bounds.printed(2)
    )
    assert 2 - 2 / 100 < gradient_costs.operation_ratio((784, *[512] * 99, 10)) < 2
    for sizes in ((6, 5), (6, 5, 4), (6, 5, 5, 5, 4)):
        passes = gradient_costs.measure_passes(sizes, 0, 1, 4)
        assert passes.counted == pytest.approx(passes.predicted)


def _ways(exponent=1.0, error=1e-7, rough=1e-2, extra=0, factor=1.0, back=1):
    ways = []
    for sizes, P in zip(TINY, (100, 10_000), strict=True):
        for name, (per, once) in experiment.PERTURBING.items():
            passes, off = per * P + once + extra, rough
            if name == experiment.MODE:
                off = error
            ways.append(experiment.GradientCost(
                sizes, name, P, passes, 0, factor * 1e-6 * P**exponent, off, False
            ))  # fmt: skip
        ways += [
            experiment.GradientCost(sizes, name, P, 1, back, 1e-6, error, False)
            for name in experiment.BACKPROPS
        ]
    return ways


PASSES = [
    experiment.PassRatio((6, 5, 4), 1.1, 1.1, 1.0),
    experiment.PassRatio((6, 5, 5, 4), 1.8, 1.8, 1.7),
]


def _vs(forward=1.0, central=2.0, left=1.0, wide=1.0):
    """Vs: rounding u/ε^left, truncation ε^order."""
    steps = [10.0 ** (half / 2) for half in range(-30, 1)]
    u = 2.0**-53
    vs = []
    for way, p in ((experiment.FORWARD, forward), (experiment.CENTRAL, central)):
        errors = [(s * wide) ** p + u / (s * wide) ** left for s in steps]
        vs.append(experiment.DifferenceErrors("float64", way, steps, errors))
    return vs


def _failed(ways=None, passes=None, errors=None):
    claims = experiment.judge(ways or _ways(), passes or PASSES, errors or _vs())
    return [claim for claim, holds in claims.items() if not holds]


def test_all_claims_hold_on_what_they_say():
    assert _failed() == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"exponent": 0.6, "factor": 30}, "grows as P"),
        ({"exponent": 1.3, "factor": 0.1}, "grows as P"),
        ({"factor": 20}, "by about P"),
        ({"factor": 0.05}, "by about P"),
        ({"error": 1e-3}, "exact to rounding"),
        ({"rough": 1e-7}, "exact to rounding"),
        ({"extra": 1}, "passes forward, counted"),
        ({"back": 2}, "one pass forward and one back"),
    ],
)
def test_claims_fail_on_other_ways(changes, said):
    (claim,) = _failed(_ways(**changes))
    assert said in claim


def test_claims_fail_on_other_passes():
    for changes, said in (
        ({"counted": 2.8}, "one pass forward and one back"),
        ({"measured": 2.7}, "share of time"),
        ({"measured": 1.0}, "share of time"),
    ):
        wrong = [PASSES[0], dataclasses.replace(PASSES[1], **changes)]
        assert said in _failed(passes=wrong)[0]
    (claim,) = _failed(passes=PASSES[::-1])
    assert "deepest" in claim


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"central": 1.0}, "rises on its right"),
        ({"forward": 2.0}, "rises on its right"),
        ({"left": 0.5}, "falls on its left"),
        ({"wide": 1000.0}, "lowest at √u"),
    ],
)
def test_claims_fail_on_other_errors(changes, said):
    assert any(said in claim for claim in _failed(errors=_vs(**changes)))


def test_errors_without_a_v_show_nothing():
    falling = experiment.DifferenceErrors(
        "float64", experiment.FORWARD, [0.01, 0.1, 1.0], [1.0, 0.1, 0.01]
    )
    assert not falling.is_v and math.isnan(falling.right)
    failed = _failed(errors=[falling])
    assert any("shape of a V" in claim for claim in failed)
    assert any("right side" in claim or "on its right" in claim for claim in failed)


def test_powers_and_the_best_step():
    for errors, power in zip(_vs(), (1.0, 2.0), strict=True):
        assert errors.is_v
        # A decade from the best of steps that are half a decade apart.
        off = bounds.power(power + 1, decades=0.65)
        assert errors.left == pytest.approx(-1, **off)
        assert errors.right == pytest.approx(power, **off)
        assert abs(math.log10(errors.epsilons[errors.best] / errors.balance)) <= 0.5
    assert errors.balance == pytest.approx((2.0**-53) ** (1 / 3))


def test_a_wrong_backward_is_seen(monkeypatch):
    """It is what the others are compared with: they would all be off."""

    def wrong(problem):
        first, *others = gradient_ways.batched(problem)
        return [1.01 * first, *others]

    monkeypatch.setitem(experiment.BACKPROPS, experiment.BATCHED, wrong)
    monkeypatch.setattr(gradient_costs, "batched", wrong)
    ways = [way for sizes in TINY for way in experiment.measure_ways(sizes, 0, 1)]
    claims = experiment.judge(ways, PASSES, _vs())
    (exact,) = (holds for claim, holds in claims.items() if "exact to r" in claim)
    assert not exact


def test_networks_of_the_command_line(small, tmp_path, capsys):
    options = "--sizes 4 2 --sizes 3 2 --repeats 1 --batch-size 2 --name one".split()
    status = experiment.command_line([*options, "--logdir", str(tmp_path)])
    written = json.loads((tmp_path / "one" / "results.json").read_text())
    assert status == (0 if written["shown"] else 1)
    assert written["settings"]["sizes"] == [[4, 2], [3, 2]]
    assert capsys.readouterr().out.index("[3, 2], 8") > 0
