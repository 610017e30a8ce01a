"""What TensorBoard reads back from a run is what happened in it."""

from __future__ import annotations

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import torchbp
from torchbp.dashboard import Dashboard, probe
from torchbp.trainer import EpochResult, Score


@pytest.fixture
def network():
    torch.manual_seed(0)
    model = torchbp.MLP([6, 5, 3])
    return model, torch.rand(20, 6), torch.randint(0, 3, (20,))


def result(epoch, cost=0.5):
    scores = {
        name: Score(cost, 0.25 * i)
        for i, name in enumerate(("train", "validation", "test"), start=1)
    }
    return EpochResult(epoch, scores, cost if epoch else None, 1.0, 1000.0)


def read(folder):
    events = EventAccumulator(str(folder), size_guidance={"histograms": 0})
    events.Reload()
    return events


def write(folder, network, epochs, resumed_at=None, cost=0.5):
    model, x, y = network
    dashboard = Dashboard(folder, {"lr": 3.0}, {"sizes": (6, 5, 3)}, {}, resumed_at)
    for epoch in epochs:
        records = probe(model, torchbp.QuadraticCost(), x, y)
        dashboard.log(result(epoch, cost), 3.0, records)
    dashboard.close()


def test_every_curve_is_there(tmp_path, network):
    write(tmp_path, network, range(3))
    tags = read(tmp_path).Tags()
    layers = ("layer_1", "layer_2")
    splits = ("train", "validation", "test")
    per_layer = ("delta_norm", "saturated", "norm_weight", "norm_bias")
    assert set(tags["scalars"]) == {
        *(f"{kind}/{split}" for kind in ("cost", "accuracy") for split in splits),
        *(f"{kind}/{layer}" for kind in per_layer for layer in layers),
        "cost/running",
        "learning_rate",
        "speed/images_per_second",
    }
    assert set(tags["histograms"]) == {
        f"distributions/{kind}_{layer}"
        for kind in ("W", "b", "a", "delta")
        for layer in layers
    }
    assert {"settings/text_summary", "versions/text_summary"} <= set(tags["tensors"])


def test_the_numbers_are_those_of_the_network(tmp_path, network):
    model, x, y = network
    write(tmp_path, network, [0])
    events = read(tmp_path)

    def value(tag):
        (event,) = events.Scalars(tag)
        assert event.step == 0
        return event.value

    torchbp.QuadraticCost()(model(x), y).backward()
    for number, layer in enumerate(model.layers, start=1):
        # The mean of the examples' δ is ∂C/∂b.
        delta = layer.bias.grad.norm().item()
        assert value(f"delta_norm/layer_{number}") == pytest.approx(delta, rel=1e-5)
        norm = layer.weight.norm().item()
        assert value(f"norm_weight/layer_{number}") == pytest.approx(norm, rel=1e-5)
    assert value("accuracy/test") == 0.75
    assert value("learning_rate") == 3.0


def test_hyperparameters_make_no_second_run(tmp_path, network):
    write(tmp_path, network, range(2))
    assert [p.name.split(".")[0] for p in tmp_path.iterdir()] == ["events"]
    plugins = read(tmp_path).summary_metadata
    assert any(m.plugin_data.plugin_name == "hparams" for m in plugins.values())


def test_a_resumed_run_has_each_step_once(tmp_path, network):
    """The first sitting died after logging epoch 3 and before its checkpoint."""
    write(tmp_path, network, range(4), cost=0.5)
    write(tmp_path, network, range(3, 6), resumed_at=2, cost=0.25)
    events = read(tmp_path).Scalars("cost/test")
    assert [e.step for e in events] == [0, 1, 2, 3, 4, 5]
    assert [e.value for e in events] == [0.5] * 3 + [0.25] * 3


@pytest.mark.parametrize("native", [False, True])
def test_the_probe_leaves_no_trace(network, native):
    model, x, y = network
    model = torchbp.to_native(model) if native else model
    before = [p.detach().clone() for p in model.parameters()]
    rng = torch.get_rng_state()
    records = probe(model, torchbp.QuadraticCost(), x, y)
    assert len(records) == 2
    assert all(p.grad is None for p in model.parameters())
    assert not x.requires_grad
    assert torch.equal(rng, torch.get_rng_state())
    for a, p in zip(before, model.parameters(), strict=True):
        assert torch.equal(a, p)


def test_native_and_hand_written_layers_show_the_same(network):
    model, x, y = network
    ours = probe(model, torchbp.QuadraticCost(), x, y)
    native = probe(torchbp.to_native(model), torchbp.QuadraticCost(), x, y)
    for a, b in zip(ours, native, strict=True):
        torch.testing.assert_close(a.delta, b.delta)
        assert a.saturated == b.saturated


def test_a_run_that_did_not_complete_its_first_epoch_has_epoch_0_once(
    tmp_path, network
):
    write(tmp_path, network, [0], cost=0.5)
    write(tmp_path, network, [0, 1], resumed_at=0, cost=0.25)
    events = read(tmp_path).Scalars("cost/test")
    assert [(e.step, e.value) for e in events] == [(0, 0.25), (1, 0.25)]


def test_extreme_distributions_can_be_drawn(tmp_path, network):
    """Where automatic bins would ask for terabytes."""
    model, x, y = network
    (record, _) = probe(model, torchbp.QuadraticCost(), x, y)
    record.delta = torch.full((1000, 5), 1e-12)
    record.delta[0, 0] = 1e3
    dashboard = Dashboard(tmp_path, {}, {}, {})
    dashboard.log(result(0), 3.0, [record])
    dashboard.close()
    (event,) = read(tmp_path).Histograms("distributions/delta_layer_1")
    assert event.histogram_value.num == 5000


def test_the_probe_draws_no_random_number_and_keeps_the_modes(network):
    _, x, y = network
    model = torch.nn.Sequential(
        torchbp.BPLinearSigmoid(6, 5),
        torch.nn.Dropout(),
        torch.nn.BatchNorm1d(5),
        torchbp.BPLinearSigmoid(5, 3),
    )
    rng, mean = torch.get_rng_state(), model[2].running_mean.clone()
    probe(model, torchbp.QuadraticCost(), x, y)
    assert torch.equal(rng, torch.get_rng_state())
    assert torch.equal(mean, model[2].running_mean)
    assert all(m.training for m in model.modules())
