"""experiments/batching.py: every way gives the same mean; claims can fail."""

from __future__ import annotations

import dataclasses

import bounds
import pytest
import torch
from noise import noise_splits

import torchbp
from experiments import batching as experiment
from experiments.support import reporting

DATA = noise_splits(30)
# Sums over 784 pixels, in float32, through a few layers.
OFF = bounds.relative(bounds.network(torch.float32, longest=784))


@pytest.fixture
def noise_images(monkeypatch):
    monkeypatch.setattr(reporting, "load", lambda settings: DATA)


def settings(tmp_path, **changes):
    few = {"batch_size": 7, "draws": 20, "repeats": 1, "logdir": str(tmp_path)}
    return experiment.BatchingSettings(**{**few, "name": "one", **changes})


def test_everything_is_measured_and_written(noise_images, measure, tmp_path):
    written, _, events = measure(experiment.main, settings(tmp_path))
    assert [way["way"] for way in written["ways"]] == list(experiment.WAYS)
    assert [n["m"] for n in written["noise"]] == list(experiment.BATCHES)
    assert written["shown"] == all(written["claims"].values())
    shown = [p.value for p in events.Scalars("error_over_batch_size/measured")]
    assert shown == pytest.approx([n["measured"] for n in written["noise"]])


@pytest.mark.parametrize("way", experiment.WAYS)
def test_every_way_gives_native_autograd_s_gradient(way):
    torch.manual_seed(0)
    model = torchbp.MLP([5, 4, 3], dtype=torch.float64)
    x, y = torch.rand(7, 5, dtype=torch.float64), torch.rand(7, 3, dtype=torch.float64)
    native = torchbp.to_native(model)
    loss = ((native(x) - y) ** 2).sum() / (2 * len(x))
    expected = torch.autograd.grad(loss, list(native.parameters()))
    for actual, want in zip(experiment.WAYS[way](model, x, y), expected, strict=True):
        torch.testing.assert_close(actual, want)


def test_a_wrong_way_is_seen(noise_images, tmp_path, monkeypatch):
    def summed(model, x, y):
        return [len(x) * g for g in experiment.batched(model, x, y)]

    monkeypatch.setitem(experiment.WAYS, experiment.MAPPED, summed)
    results = experiment.main(settings(tmp_path))
    assert results["verdict"].startswith("verdict: NOT shown: A1")


def test_the_prediction_is_the_spread_of_the_examples(tmp_path):
    """tr Σ from all examples' gradients, one by one."""
    few = settings(tmp_path, draws=2)
    noise = experiment.draw_batches(few, DATA.train)
    model = experiment.initial_network(few, DATA.train)
    x, y = torchbp.data.scale(DATA.train.images), DATA.train.labels
    each = torch.stack([
        experiment.flat(experiment.batched(model, x[i : i + 1], y[i : i + 1]))
        for i in range(len(x))
    ])  # fmt: skip
    mean = each.mean(0)
    of_one = (each - mean).square().sum(1).mean().sqrt() / mean.norm()
    assert noise[0].predicted == pytest.approx(of_one.item(), **OFF)
    assert noise[2].predicted == pytest.approx(of_one.item() / 5**0.5, **OFF)


def _ways(**changes):
    times = dict.fromkeys(experiment.WAYS, 0.001)
    times |= {experiment.BATCHED: 1e-4, experiment.RECORDED: 2e-4} | changes
    errors = {"float32": 1e-7, "float64": 1e-16}
    return [experiment.BatchWay(way, seconds, errors) for way, seconds in times.items()]


def _noise(power=-0.5, factor=1.0):
    return [experiment.Noise(m, factor * m**power, m**-0.5) for m in experiment.BATCHES]


def _failed(ways=None, noise=None):
    claims = experiment.judge(ways or _ways(), noise or _noise())
    return [claim for claim, holds in claims.items() if not holds]


def test_claims_hold_on_what_they_say_and_fail_on_the_rest():
    assert _failed() == []
    for dtype, error in (("float32", 1e-4), ("float64", 1e-10)):
        first, *others = _ways()
        wrong = dataclasses.replace(first, errors={**first.errors, dtype: error})
        assert [c[:2] for c in _failed([wrong, *others])] == ["A1"]
    (claim,) = _failed(_ways(**{experiment.BATCHED: 2e-3}))
    assert "faster" in claim
    (claim,) = _failed(noise=_noise(factor=1.2))
    assert "within 10%" in claim
    assert "1/√m" in _failed(noise=_noise(power=-0.4))[0]
    assert "1/√m" in _failed(noise=_noise(power=-1.0))[0]


def test_the_claims_hold_on_the_digits(tmp_path, capsys):
    options = "--dataset digits --quick --logdir".split()
    assert experiment.command_line([*options, str(tmp_path)]) == 0
    assert "verdict: shown (4 of 4 claims)" in capsys.readouterr().out
