"""experiments/learning_slowdown.py: figures as BP1 and BP4 say; claims can fail."""

from __future__ import annotations

import dataclasses
import math

import bounds
import pytest
import torch
from noise import noise_splits

import torchbp
from experiments import learning_slowdown as experiment
from experiments.support import reporting
from torchbp.data import Split

DATA = noise_splits(60, always_zero=20)


@pytest.fixture
def noise(monkeypatch):
    monkeypatch.setattr(experiment, "HALF_STEPS", 20)
    monkeypatch.setattr(reporting, "load", lambda settings: DATA)


def settings(tmp_path, **changes):
    small = {"steps": 4, "every": 2, "batches": 3, "logdir": str(tmp_path)}
    return experiment.SlowdownSettings(**{**small, "name": "one", **changes})


def test_everything_is_measured_and_written(noise, measure, tmp_path):
    written, _, events = measure(experiment.main, settings(tmp_path))
    assert [len(c["times"]) for c in written["neurons"]] == [301] * 4
    assert [c["times"] for c in written["networks"]] == [[0, 2, 4]] * 4
    assert written["inputs"]["always_zero"] == 20
    # Too few steps for the network: that is a claim that is not shown.
    assert not written["shown"] and "NOT shown" in written["verdict"]
    assert written["shown"] == all(written["claims"].values())
    shown = [p.value for p in events.Scalars("network_delta/quadratic_bad")]
    (curve,) = (
        c
        for c in written["networks"]
        if (c["cost"], c["start"]) == ("quadratic", "bad")
    )
    assert shown == pytest.approx(curve["delta"])


def test_neuron_against_its_formulas():
    """C, σ' and δ of two updates by hand."""
    for cost in experiment.COSTS:
        curve = experiment.neuron(cost, "bad")
        w = b = 2.0
        for epoch in range(3):
            a = 1 / (1 + math.exp(-(w + b)))
            is_quadratic = cost == "quadratic"
            C = a * a / 2 if is_quadratic else -math.log(1 - a)
            delta = a * a * (1 - a) if is_quadratic else a
            assert curve.C[epoch] == pytest.approx(C)
            assert curve.sigma_prime[epoch] == pytest.approx(a * (1 - a))
            assert curve.delta[epoch] == pytest.approx(delta)
            w, b = w - 0.15 * delta, b - 0.15 * delta
        assert curve.error < bounds.network()


def test_networks_start_where_they_should(tmp_path):
    for cost in experiment.COSTS:
        good, bad = (
            experiment.network(settings(tmp_path), DATA.train, cost, start)
            for start in ("good", "bad")
        )
        assert bad.sigma_prime[0] < 0.03 < good.sigma_prime[0]
        assert bad.C[0] > good.C[0] and bad.C[-1] < bad.C[0]


def test_inputs_that_are_always_zero(tmp_path):
    inputs = experiment.measure_inputs(settings(tmp_path), DATA.train)
    assert inputs.always_zero == 20 and inputs.zero_change == 0 < inputs.other_change
    assert [mean for mean, _ in inputs.bins] == sorted(m for m, _ in inputs.bins)
    all_on = Split(DATA.train.images.clamp(min=1), DATA.train.labels)
    assert experiment.measure_inputs(settings(tmp_path), all_on).always_zero == 0


def test_rank_correlation():
    x = torch.tensor([0.1, 5.0, 2.0, 90.0])
    assert experiment.rank_correlation(x, x.exp()) == pytest.approx(1)
    assert experiment.rank_correlation(x, -x) == pytest.approx(-1)


def test_the_half_is_a_matter_of_the_rate(monkeypatch):
    monkeypatch.setattr(experiment, "HALF_STEPS", 40)
    half = experiment.measure_half(DATA.train)
    assert half.half_rate < bounds.network(steps=40)
    assert half.same_rate > 1e-2
    # A cost without ½ and with a wrong gradient is another matter.
    wrong = torchbp.define_cost(
        "wrong", lambda a, y: (a - y).square().sum(-1), lambda a, y: 3 * (a - y)
    )
    monkeypatch.setattr(experiment, "WholeCost", wrong)
    assert experiment.measure_half(DATA.train).half_rate > 1e-2


def test_a_detour_is_part_of_the_trajectory(monkeypatch):
    """The largest distance on the way counts, not that at the end."""
    found = iter([0.1, 0.5, 0.9, 0.6, 0.2, 0.3])
    monkeypatch.setattr(experiment, "relative_distance", lambda *_: next(found))
    monkeypatch.setattr(experiment, "HALF_STEPS", 3 * experiment.HALF_EVERY)
    assert experiment.measure_half(DATA.train) == experiment.HalfDistances(0.9, 0.6)


def _curve(cost, start, halved, delta):
    times = list(range(301))
    C = [1.0 if time < halved else 0.4 for time in times]
    return experiment.Curve(cost, start, times, C, [0.1] * 301, [delta] * 301, 0.0)


def _curves(**changes):
    kinds = {
        ("quadratic", "good"): (20, 0.1), ("quadratic", "bad"): (200, 0.02),
        ("cross-entropy", "good"): (6, 0.8), ("cross-entropy", "bad"): (8, 0.98),
    }  # fmt: skip
    kinds |= {tuple(key.replace("__", "-").split("_")): v for key, v in changes.items()}
    return [_curve(*kind, *figures) for kind, figures in kinds.items()]


INPUTS = experiment.InputSpeeds(67, 0.0, 1.0, 0.99, [(0.1, 0.1)])
HALF = experiment.HalfDistances(0.0, 0.5)


def _failed(neurons=None, networks=None, inputs=INPUTS, half=HALF, whole=True):
    curves = neurons or _curves(), networks or _curves()
    claims = experiment.judge(*curves, inputs, half, whole)
    return [claim for claim, holds in claims.items() if not holds]


def test_all_claims_hold_on_what_they_say():
    assert _failed() == []
    never = _curves(quadratic_bad=(999, 0.02))
    assert _failed(neurons=never) == []


@pytest.mark.parametrize("name", ["neuron", "network"])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"quadratic_bad": (50, 0.02)}, "slows quadratic"),
        ({"cross__entropy_bad": (60, 0.98)}, "slows quadratic"),
        ({"quadratic_bad": (200, 0.2)}, "gives a smaller δ"),
        ({"cross__entropy_bad": (8, 0.5)}, "gives a larger δ"),
    ],
)
def test_claims_fail_on_other_curves(name, changes, said):
    (claim,) = _failed(**{f"{name}s": _curves(**changes)})
    assert claim.startswith(name) and said in claim


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"zero_change": 1e-9}, "do not change at all"),
        ({"always_zero": 0}, "do not change at all"),
        ({"other_change": 0.0}, "do not change at all"),
        ({"correlation": 0.5}, "the larger an input"),
        ({"always_zero": 66}, "67 pixels"),
    ],
)
def test_claims_fail_on_other_inputs(changes, said):
    failed = _failed(inputs=dataclasses.replace(INPUTS, **changes))
    assert said in failed[0]


def test_other_claims_fail_too():
    wrong = [dataclasses.replace(curve, error=1e-3) for curve in _curves()]
    assert _failed(neurons=wrong)[0].startswith("BP1")
    for half in (
        experiment.HalfDistances(1e-3, 0.5),
        experiment.HalfDistances(0.0, 0.0),
    ):
        (claim,) = _failed(half=half)
        assert claim.startswith("½")


def test_the_claims_hold_on_the_digits(tmp_path, capsys):
    options = "--dataset digits --quick --steps 600 --every 10 --logdir".split()
    assert experiment.command_line([*options, str(tmp_path)]) == 0
    assert "verdict: shown (10 of 10 claims)" in capsys.readouterr().out
