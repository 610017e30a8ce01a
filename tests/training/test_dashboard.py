"""What TensorBoard reads back from a run is what happened in it."""

from __future__ import annotations

import io
import itertools
import re
import statistics
import sys
from pathlib import Path

import bounds
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2
from torch import nn

import torchbp
from experiments import mnist
from experiments.support.settings import ENGINES
from torchbp import data
from torchbp.data.sets import Split, Splits, scale
from torchbp.inspection import probe
from torchbp.training import AutogradSGD, EpochResult, Score, Trainer, checkpoint
from torchbp.training.dashboard import captions as _captions
from torchbp.training.dashboard import chart as _chart
from torchbp.training.dashboard import dashboard
from torchbp.training.dashboard import graph as _graph
from torchbp.training.dashboard import pictures as _pictures
from torchbp.training.dashboard.chart import draw_learning
from torchbp.training.dashboard.dashboard import Dashboard, is_pictured
from torchbp.training.dashboard.events import EventWriter, event_files, read_scalars

STEPS = 4  # mini-batches in an epoch
SPLITS = ("train", "validation", "test")
LAYERS = ("layer_1", "layer_2")
# Sums over 784 pixels, in float32, through a few layers.
OFF = bounds.relative(bounds.network(torch.float32, longest=784))


@pytest.fixture
def network():
    torch.manual_seed(0)
    model = torchbp.MLP([6, 5, 3])
    return model, torch.rand(20, 6), torch.randint(0, 3, (20,))


@pytest.fixture
def split():
    torch.manual_seed(1)
    images = torch.randint(0, 256, (20, 36), dtype=torch.uint8)
    return Split(images, torch.randint(0, 3, (20,)))


def seen(sizes=(36, 5, 3), native=False, **options):
    torch.manual_seed(0)
    model = torchbp.MLP(sizes, **options)
    return torchbp.to_native(model) if native else model


def result(epoch, cost=0.5, splits=SPLITS):
    scores = {name: Score(cost, 0.25 * i) for i, name in enumerate(splits, start=1)}
    if not epoch:
        return EpochResult(epoch, scores, None, 0.0, 0.0)
    return EpochResult(epoch, scores, cost, 1.0, 1000.0, [cost] * STEPS)


def ends(*epochs):
    """The steps of the ends of epochs."""
    return [STEPS * epoch for epoch in epochs]


def read(folder):
    guidance = {"histograms": 0, "images": 0, "scalars": 0}
    events = EventAccumulator(str(folder), size_guidance=guidance)
    events.Reload()
    return events


def write(folder, split, epochs, resumed_at=None, cost=0.5, level="full", model=None):
    model = seen() if model is None else model
    hyperparameters = {"sizes": (36, 5, 3), "lr": 3.0}
    board = Dashboard(
        folder,
        {"lr": 3.0},
        hyperparameters,
        {},
        resumed_at,
        level,
        steps_per_epoch=STEPS,
    )
    board.watch(model, torchbp.QuadraticCost(), split, split)
    for epoch in epochs:
        board.log(result(epoch, cost), 3.0, last=epoch == epochs[-1])
    board.close(complete=True)


def values(folder):
    """Every value as TensorBoard's own loader gives it: new-style, with metadata."""
    (file,) = folder.glob("events.*")
    return [v for e in EventFileLoader(str(file)).Load() for v in e.summary.value]


def test_every_curve_is_there(tmp_path, split):
    write(tmp_path, split, range(3))
    tags = read(tmp_path).Tags()
    per_layer = ("delta_norm", "saturated", "update_ratio", "norm_weight", "norm_bias")
    assert set(tags["scalars"]) == {
        *(f"{kind}/{split}" for kind in ("cost", "accuracy") for split in SPLITS),
        *(f"{kind}/{layer}" for kind in per_layer for layer in LAYERS),
        "cost/running",
        "learning_rate",
        "speed/images_per_second",
    }
    assert set(tags["histograms"]) == {
        f"distributions/{kind}_{layer}"
        for kind in ("W", "b", "z", "a", "delta")
        for layer in LAYERS
    }
    assert set(tags["images"]) == {
        f"pictures/{name}"
        for name in ("weights", "misclassified", "confusion", "journey", "learning")
    }
    assert tags["graph"]
    assert {"settings/text_summary", "versions/text_summary"} <= set(tags["tensors"])


def test_the_numbers_are_those_of_the_network(tmp_path, split):
    model = seen()
    write(tmp_path, split, [0], model=model)
    events = read(tmp_path)

    def value(tag):
        (event,) = events.Scalars(tag)
        assert event.step == 0
        return event.value

    torchbp.QuadraticCost()(model(scale(split.images)), split.labels).backward()
    for number, layer in enumerate(model.layers, start=1):
        # The mean of the examples' δ is ∂C/∂b.
        delta = layer.bias.grad.norm().item()
        assert value(f"delta_norm/layer_{number}") == pytest.approx(delta, **OFF)
        norm = layer.weight.norm().item()
        assert value(f"norm_weight/layer_{number}") == pytest.approx(norm, **OFF)
        ratio = 3.0 * layer.weight.grad.norm().item() / norm
        assert value(f"update_ratio/layer_{number}") == pytest.approx(ratio, **OFF)
        (z,) = events.Histograms(f"distributions/z_layer_{number}")
        assert z.histogram_value.num == 20 * layer.out_features
    assert value("accuracy/test") == 0.75
    assert value("learning_rate") == 3.0


@pytest.mark.parametrize("level", dashboard.LEVELS)
def test_levels(tmp_path, split, level):
    write(tmp_path, split, range(2), level=level)
    if level == "off":
        assert list(tmp_path.iterdir()) == []
        return
    tags = read(tmp_path).Tags()
    assert {"cost/test", "delta_norm/layer_1", "update_ratio/layer_2"} <= {
        *tags["scalars"]
    }
    is_full = level == "full"
    shown = [bool(tags[kind]) for kind in ("histograms", "images", "graph")]
    assert shown == [is_full] * 3


def test_off_needs_no_tensorboard(tmp_path, split, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    write(tmp_path, split, range(2), level="off")
    with pytest.raises(ImportError):
        write(tmp_path, split, range(2), level="basic")


def test_a_level_that_is_none(tmp_path):
    with pytest.raises(ValueError, match="expected one of off, basic, full, got 'all'"):
        Dashboard(tmp_path, {}, {}, {}, level="all")


def test_every_tag_has_a_caption_in_the_form_that_both_readers_take(tmp_path, split):
    """The one in Rust believes metadata with a data class only, the one in Python
    makes its own from the description."""
    write(tmp_path, split, range(3))
    tags = read(tmp_path).Tags()
    shown = {*tags["scalars"], *tags["histograms"], *tags["images"]}
    first = {}
    for value in values(tmp_path):
        first.setdefault(value.tag, value.metadata)
    for tag in shown:
        expected = f"{_captions.caption(tag, 2)} Step: mini-batches."
        if tag in tags["scalars"] and tag != "cost/running":
            expected += " One point an epoch: set Smoothing to 0."
        assert first[tag].summary_description == expected
        assert first[tag].data_class, tag
        assert "{" not in first[tag].summary_description
    about = {tag: md.summary_description for tag, md in first.items()}
    assert "BP2: δ^1 = (W^2)ᵀ δ^2" in about["delta_norm/layer_1"]
    assert "BP1: δ^2 = ∇_a C" in about["delta_norm/layer_2"]
    assert "BP4" in about["update_ratio/layer_1"]


def test_the_first_page_shows_what_the_run_has(tmp_path, split):
    """Each chart's expression finds its tags, whatever the depth."""
    write(tmp_path, split, [0, 1])
    events = read(tmp_path)
    tags = events.Tags()["scalars"]
    (event,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    found = {
        chart.title.partition(":")[0]: [
            tag
            for tag in tags
            if any(re.match(pattern, tag) for pattern in chart.multiline.tag)
        ]
        for category in layout.category
        for chart in category.chart
    }
    assert {title: len(tags) for title, tags in found.items()} == {
        "running cost of the mini-batches": 1,
        "cost C": 3,
        "accuracy": 3,
        "how fast each layer learns": 2,
        "update-to-weight ratio": 2,
        "saturated neurons": 2,
    }


def hparams(folder):
    """What the HPARAMS tab knows of the run, by kind."""
    contents = read(folder).PluginTagToContent("hparams").values()
    data = map(plugin_data_pb2.HParamsPluginData.FromString, contents)
    return {d.WhichOneof("data"): getattr(d, d.WhichOneof("data")) for d in data}


def test_hyperparameters_make_no_second_run(tmp_path, split):
    write(tmp_path, split, range(2))
    names = sorted(p.name.split(".")[0] for p in tmp_path.iterdir())
    assert names == ["events", "learning"]
    row = hparams(tmp_path)
    assert row["session_start_info"].hparams["lr"].number_value == 3.0
    assert row["session_end_info"].status == api_pb2.STATUS_SUCCESS
    # The metrics are the last points of curves of this run.
    metrics = {info.name.tag for info in row["experiment"].metric_infos}
    assert {"accuracy/test", "cost/test"} <= metrics
    assert metrics <= set(read(tmp_path).Tags()["scalars"])


def test_an_interrupted_run_shows_what_there_is_until_it_is_complete(tmp_path, split):
    board = Dashboard(tmp_path, {}, {"lr": 3.0}, {})
    board.log(result(0), 3.0)
    board.close()
    board.close()
    assert "session_end_info" not in hparams(tmp_path)  # it may go on
    assert read(tmp_path).Scalars("accuracy/test")[-1].step == 0
    write(tmp_path, split, range(3), resumed_at=0)
    assert hparams(tmp_path)["session_end_info"].status == api_pb2.STATUS_SUCCESS
    assert [e.step for e in read(tmp_path).Scalars("accuracy/test")] == ends(0, 1, 2)


def test_a_resumed_run_has_each_step_once(tmp_path, split):
    """The first session died after logging epoch 3 and before its checkpoint."""
    write(tmp_path, split, range(4), cost=0.5)
    write(tmp_path, split, range(3, 6), resumed_at=2, cost=0.25)
    events = read(tmp_path)
    curve = events.Scalars("cost/test")
    assert [e.step for e in curve] == ends(0, 1, 2, 3, 4, 5)
    assert [e.value for e in curve] == [0.5] * 3 + [0.25] * 3
    distribution = events.Histograms("distributions/z_layer_1")
    assert [e.step for e in distribution] == ends(0, 1, 2, 3, 4, 5)
    # 3 was the last of the first session.
    assert [e.step for e in events.Images("pictures/weights")] == ends(0, 1, 2, 5)
    running = events.Scalars("cost/running")
    assert [e.step for e in running] == list(range(1, 5 * STEPS + 1))
    assert [e.value for e in running] == [0.5] * 2 * STEPS + [0.25] * 3 * STEPS
    assert events.Graph().node
    assert len(events.Tensors("settings/text_summary")) == 1


def test_a_run_that_did_not_complete_its_first_epoch_has_epoch_0_once(tmp_path, split):
    write(tmp_path, split, [0], cost=0.5)
    write(tmp_path, split, [0, 1], resumed_at=0, cost=0.25)
    events = read(tmp_path)
    curve = events.Scalars("cost/test")
    assert [(e.step, e.value) for e in curve] == [(0, 0.25), (STEPS, 0.25)]
    # What stood at step 0 is superseded with it, and written again.
    resumed_at = curve[0].wall_time
    for tag in ("custom_scalars__config__", "settings/text_summary"):
        assert resumed_at - 1 < events.Tensors(tag)[-1].wall_time <= resumed_at


def test_a_run_that_began_without_a_dashboard_gets_one(tmp_path, split):
    write(tmp_path, split, range(3), level="off")
    write(tmp_path, split, range(3, 5), resumed_at=2)
    events = read(tmp_path)
    assert [e.step for e in events.Scalars("cost/test")] == ends(3, 4)
    assert "settings/text_summary" in events.Tags()["tensors"]
    assert hparams(tmp_path)["session_start_info"].hparams["lr"].number_value == 3.0


@pytest.mark.parametrize("cost", [torchbp.QuadraticCost, torchbp.CrossEntropyCost])
def test_native_and_hand_written_layers_compare(tmp_path, split, cost):
    """The same tags at the same steps, the same pictures, the same graph."""
    output = "identity" if cost.takes == "z" else None
    sides = []
    for native in (False, True):
        folder = tmp_path / str(native)
        board = Dashboard(folder, {}, {}, {})
        board.watch(seen(native=native, output=output), cost(), split, split)
        for epoch in range(3):
            board.log(result(epoch), 3.0)
        board.close()
        events = read(folder)
        tags = events.Tags()
        sides.append(
            {
                "graph": [(n.name, n.op, list(n.input)) for n in events.Graph().node],
                **{
                    tag: [(e.step, e.value) for e in events.Scalars(tag)]
                    for tag in tags["scalars"]
                },
                **{
                    tag: [(e.step, e.encoded_image_string) for e in events.Images(tag)]
                    for tag in tags["images"]
                },
                **{
                    tag: [e.step for e in events.Histograms(tag)]
                    for tag in tags["histograms"]
                },
            }
        )
    assert sides[0].keys() == sides[1].keys()
    for tag, side in sides[0].items():
        if tag.startswith(("delta_norm", "update_ratio")):
            assert dict(side) == pytest.approx(dict(sides[1][tag]), **OFF)
        elif tag == "pictures/learning":  # of curves that differ by rounding
            assert [step for step, _ in side] == [step for step, _ in sides[1][tag]]
        else:
            assert side == sides[1][tag]


@pytest.mark.parametrize(
    "sizes", [(36, 3), (36, 4, 4, 4, 4, 4, 3), (36, 700, 3), (35, 5, 3)]
)
def test_shallow_deep_wide_and_not_square(tmp_path, split, sizes):
    pixels = split.images[:, : sizes[0]].contiguous()
    model = seen(sizes, activation="relu", output="sigmoid")
    write(tmp_path, Split(pixels, split.labels), [0], model=model)
    tags = read(tmp_path).Tags()
    assert f"delta_norm/layer_{len(sizes) - 1}" in tags["scalars"]
    assert len(tags["images"]) == (4 if sizes[0] == 36 else 1)


def test_no_validation_scores_no_bias(tmp_path, split):
    board = Dashboard(tmp_path, {}, {}, {})
    model = torch.nn.Sequential(torchbp.BPLinearSigmoid(36, 3, bias=False))
    board.watch(model, torchbp.QuadraticCost(), split, split)
    board.log(result(0, splits=("train", "test")), 3.0)
    board.close()
    tags = read(tmp_path).Tags()
    assert "cost/validation" not in tags["scalars"]
    assert not [tag for tag in tags["scalars"] if tag.startswith("norm_bias")]
    assert "distributions/b_layer_1" not in tags["histograms"]


@pytest.mark.parametrize("native", [False, True])
def test_looking_leaves_no_trace(tmp_path, split, native):
    """Neither in the model nor in the random numbers: every level trains the same."""
    model = seen(native=native)
    before = [p.detach().clone() for p in model.parameters()]
    rng = torch.get_rng_state()
    write(tmp_path, split, range(3), model=model)
    assert torch.equal(rng, torch.get_rng_state())
    for a, p in zip(before, model.parameters(), strict=True):
        assert torch.equal(a, p) and p.grad is None
    assert all(module.training for module in model.modules())


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


def test_extreme_distributions_can_be_drawn(tmp_path, split, monkeypatch):
    """Where automatic bins would ask for terabytes."""

    def extreme(*args):
        records = probe(*args)
        records[0].delta = torch.full((1000, 5), 1e-12)
        records[0].delta[0, 0] = 1e3
        return records

    monkeypatch.setattr(dashboard, "probe", extreme)
    write(tmp_path, split, [0])
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
    records = probe(model, torchbp.QuadraticCost(), x, y)
    assert torch.equal(rng, torch.get_rng_state())
    assert torch.equal(mean, model[2].running_mean)
    assert all(m.training for m in model.modules())
    graph = {node.name: node for node in _graph.draw(records, "QuadraticCost").node}
    assert "between_1_and_2" in graph["layer_2_sigmoid/z"].input


def test_epochs_that_are_pictured():
    shown = [epoch for epoch in range(201) if is_pictured(epoch)]
    assert shown == [0, 1, 2, 5, 10, 20, 50, 100, 200]


# ------------------------------------------------------------------ the running cost


@pytest.mark.parametrize("epochs", [None, 1, 7, 20, 21, 30, 400, 1000, 1001, 2500])
@pytest.mark.parametrize("n", [1, 13, 50, 51, 5000])
def test_the_running_cost_is_thinned_evenly(epochs, n):
    """At most 50 points an epoch and 1,000 a run, each epoch alike; the last point is
    the run's end."""
    last = epochs or 20
    points = [dashboard.thin([1.0] * n, epoch, epochs) for epoch in range(1, last + 1)]
    numbers = [len(of_epoch) for of_epoch in points]
    assert max(numbers) <= min(50, n) and sum(numbers) <= 1000
    assert points[-1][-1] == (n, 1.0)
    if last <= 1000:
        assert set(numbers) == {min(50, n, 1000 // last)}
    else:
        # The distance from one to the next, but for that to the last.
        at = [epoch for epoch, number in enumerate(numbers, start=1) if number]
        assert len({b - a for a, b in itertools.pairwise(at[:-1])}) == 1
    for of_epoch in filter(None, points):
        steps = [0, *(step for step, _ in of_epoch)]
        gaps = [b - a for a, b in itertools.pairwise(steps)]
        assert steps[-1] == n and max(gaps) - min(gaps) <= 1


def test_a_point_is_the_mean_since_the_point_before():
    costs = [float(i) for i in range(100)]
    points = dashboard.thin(costs, 1, epochs=100)
    assert [step for step, _ in points] == list(range(10, 101, 10))
    assert [cost for _, cost in points] == [4.5 + 10 * i for i in range(10)]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_running_cost_of_a_run_is_that_of_its_mini_batches(tmp_path, engine):
    """And an epoch is one write, whatever the engine."""
    writes, results = [], []
    append, log = dashboard.EventWriter._append, Dashboard.log

    def count(writer, content):
        writes.append(len(content))
        append(writer, content)

    def keep(board, result, *rest):
        results.append(result)
        log(board, result, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dashboard.EventWriter, "_append", count)
        patch.setattr(Dashboard, "log", keep)
        run = job(tmp_path, engine=engine, log_level="basic")
    assert len(writes) == 6  # of the settings, of four epochs, of the end
    costs = [cost for result in results for cost in result.costs]
    assert len(costs) == 390
    curve = read(run).Scalars("cost/running")
    steps = [0, *(e.step for e in curve)]
    assert len(curve) == 150 and {130, 260, 390} < set(steps)
    means = [statistics.fmean(costs[a:b]) for a, b in itertools.pairwise(steps)]
    assert [e.value for e in curve] == torch.tensor(means).tolist()  # both in float32
    times = [e.wall_time for e in curve]
    assert times == sorted(times)


def test_a_run_that_is_extended_has_each_point_once(tmp_path):
    whole = points(job(tmp_path, name="whole", epochs=5))
    part = job(tmp_path, name="part", epochs=2)
    mnist.resume(part, epochs=5, output="quiet")
    assert points(part) == whole


def test_a_resumed_dashboard_needs_its_unit(tmp_path):
    with pytest.raises(ValueError, match="steps_per_epoch: expected the number of"):
        Dashboard(tmp_path, {}, {}, {}, resumed_at=2)
    for wrong in ({"epochs": 0}, {"steps_per_epoch": 0}):
        with pytest.raises(ValueError, match=r"^\w+: expected at least 1, got 0"):
            Dashboard(tmp_path, {}, {}, {}, **wrong)
    assert list(tmp_path.iterdir()) == []


def test_costs_are_not_needed(tmp_path):
    """Of an EpochResult that somebody else made: the running cost as one point."""
    board = Dashboard(tmp_path, {}, {}, {}, steps_per_epoch=STEPS)
    board.log(EpochResult(1, {}, 0.5, 1.0, 1000.0), 3.0)
    board.close()
    curve = read(tmp_path).Scalars("cost/running")
    assert [(e.step, e.value) for e in curve] == [(STEPS, 0.5)]


# ------------------------------------------------------------------ event files


def test_a_later_event_file_sorts_last_without_a_wait(tmp_path):
    """Whatever the clock: TensorBoard reads the files in the order of their names."""
    (tmp_path / "events.out.tfevents.4102444800.host.1.0").write_bytes(b"")
    for step in range(12):
        with EventWriter(tmp_path) as writer:
            writer.add_scalar("cost", 0.5, step)
    files = event_files(tmp_path)
    assert files[-1] == writer.path
    steps = [list(read_scalars([f.read_bytes()], "cost")["cost"]) for f in files[1:]]
    assert steps == [[step] for step in range(12)]


def test_scalars_are_read_as_tensorboard_reads_them(tmp_path, split):
    """Up to the step, by prefix, superseded ones replaced, and from a torn file."""
    write(tmp_path, split, range(4), cost=0.5)
    write(tmp_path, split, range(3, 6), resumed_at=2, cost=0.25)
    contents = [file.read_bytes() for file in event_files(tmp_path)]
    events = read(tmp_path)
    expected = {
        tag: {e.step: e.value for e in events.Scalars(tag)}
        for tag in ("cost/train", "cost/test")
    }
    assert read_scalars(contents, "cost/t") == expected
    earlier = read_scalars(contents, "cost/t", last_step=STEPS)
    assert {tag: list(curve) for tag, curve in earlier.items()} == {
        tag: ends(0, 1) for tag in expected
    }
    whole = contents[0]
    for size in range(len(whole) - 200, len(whole)):
        assert read_scalars([whole[:size]], "cost/test")["cost/test"][0] == 0.5
    flipped = bytearray(whole)
    flipped[whole.index(b"cost/test", whole.index(b"cost/running"))] ^= 1
    read_scalars([bytes(flipped)], "cost")  # a damaged record is no record


# ------------------------------------------------------------------ the chart


FALLING = {
    layer: {STEPS * epoch: 10.0 ** (layer - 4 - epoch / 10) for epoch in range(11)}
    for layer in (1, 2, 3)
}


def inks(picture):
    """The colours of a picture that are more than a few pixels."""
    return {colour for count, colour in picture.getcolors(100_000) if count > 20}


@pytest.mark.parametrize("zoom", [1, 2])
def test_each_layer_has_a_line_and_a_name_of_its_colour(zoom):
    picture = draw_learning(FALLING, "mini-batches", zoom)
    assert picture.size == (_pictures.WIDTH * zoom, _chart.HEIGHT * zoom)
    right = _chart._Axes(FALLING).right
    area = (right + 10) * zoom
    names = picture.crop((area, 0, picture.width, picture.height))
    lines = picture.crop((0, 0, area, picture.height))
    drawn = set(_chart.COLOURS[:3])
    for part in (names, lines):
        assert drawn <= inks(part)
        assert not inks(part) & set(_chart.COLOURS[3:])


def test_the_axis_is_logarithmic_and_the_names_are_in_order():
    """Equal ratios are equal distances, and no name lies on another."""
    axes = _chart._Axes(FALLING)
    heights = [axes.place(0, 10.0**power)[1] for power in (-1, -2, -3)]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1])
    alike = {layer: {0: 0.5, 4: 0.5 + layer / 1e6} for layer in range(1, 9)}
    labels = _chart._Axes(alike).labels
    order = sorted(labels, key=labels.get)
    assert order == list(range(8, 0, -1))
    tops = sorted(labels.values())
    assert min(b - a for a, b in itertools.pairwise(tops)) >= 14
    assert tops[0] >= 0 and tops[-1] <= _chart.HEIGHT


def test_many_layers_zeros_and_numbers_that_are_not_finite():
    picture = draw_learning({n: {0: 1.0, 5: 0.1 / n} for n in range(1, 1001)}, "epochs")
    assert len(inks(picture) & set(_chart.COLOURS)) == _chart.MOST_CURVES
    wild = {1: {0: 0.0, 4: 0.0}, 2: {0: 1e-300, 4: 1e38}, 3: {0: 1.0, 4: float("nan")}}
    assert _chart.COLOURS[0] in inks(draw_learning(wild, "mini-batches"))
    draw_learning({1: {0: 0.0, 4: 0.0}}, "mini-batches")
    draw_learning({1: {0: 1.0, 1: 1.0}}, "epochs")


def test_the_chart_goes_on_after_a_resume(tmp_path):
    """From the points that the event files hold: the picture of an undisturbed run."""
    whole = Path(job(tmp_path, name="whole", epochs=5))
    part = Path(job(tmp_path, name="part", epochs=2))
    mnist.resume(str(part), epochs=5, output="quiet")
    assert (part / "learning.png").read_bytes() == (whole / "learning.png").read_bytes()
    pictures = [
        [e.encoded_image_string for e in read(run).Images("pictures/learning")]
        for run in (whole, part)
    ]
    assert pictures[0][-1] == pictures[1][-1]


# ------------------------------------------------------------------ the pictures


def colours(picture, box):
    """The colours of a part of a picture, most frequent first."""
    counts = picture.crop(box).getcolors(100_000)
    return [colour for _, colour in sorted(counts, reverse=True)]


def test_pictures_are_as_wide_as_a_card_and_say_what_they_should(tmp_path, split):
    write(tmp_path, split, [0])
    events = read(tmp_path)
    for tag in events.Tags()["images"]:
        (event,) = events.Images(tag)
        picture = Image.open(io.BytesIO(event.encoded_image_string))
        assert picture.size == (event.width, event.height)
        assert picture.width == _pictures.WIDTH
        assert len(picture.getcolors(100_000)) > 3


def test_weights_are_red_above_zero_and_blue_below_on_one_scale():
    W = torch.zeros(2, 9)
    W[0], W[1] = 1.0, -0.5
    picture = _pictures.weights(W)
    left, right = picture.width // 4, 3 * picture.width // 4
    middle = (picture.height + 22) // 2
    assert picture.getpixel((left, middle)) == (178, 24, 43)
    half = picture.getpixel((right, middle))
    assert half == pytest.approx((144, 178, 214), **bounds.INTEGERS)
    # 784 weights a tile, a hundred tiles at most.
    assert _pictures.weights(torch.randn(800, 784)).height < 500


def test_the_misclassified_are_those_that_are_and_no_others():
    images = torch.full((40, 784), 255, dtype=torch.uint8)
    labels = torch.zeros(40, dtype=torch.int64)
    none = _pictures.misclassified(images, labels, labels, ["0", "1"])
    assert (0, 0, 0) not in colours(none, (0, 26, 350, none.height))
    guesses = labels.clone()
    guesses[-2:] = 1
    two = _pictures.misclassified(images, labels, guesses, ["0", "1"])
    step, top = _pictures.WIDTH // 5, 60
    black = [two.getpixel((i * step + 30, top)) == (0, 0, 0) for i in range(5)]
    assert black == [True, True, False, False, False]
    # Truth in green, answer in red; strokes are thin, their edges blended with white.
    red, green, _ = min(colours(two, (0, 24, step // 2, 46)), key=sum)
    assert green > red + 80
    red, green, _ = min(colours(two, (step // 2, 24, step, 46)), key=sum)
    assert red > green + 80


def test_the_confusion_is_shaded_off_the_diagonal():
    counts = torch.diag(torch.tensor([900, 800, 700]))
    counts[0, 2] = 50
    picture = _pictures.confusion(counts, ["0", "1", "2"])
    cell = (_pictures.WIDTH - 26) // 3

    def ground(row, column):
        x, y = 26 + column * cell, 44 + row * 28
        return colours(picture, (x + 2, y + 2, x + cell - 2, y + 26))[0]

    assert ground(0, 0) == ground(1, 1)
    red, green, _ = ground(0, 2)
    assert red > green + 80
    assert ground(2, 0) == (255, 255, 255)


def test_a_journey_shows_every_layer(split):
    def height(sizes):
        x, y = scale(split.images[:1]), split.labels[:1]
        records = probe(seen(sizes), torchbp.QuadraticCost(), x, y)
        return _pictures.journey(records, int(y), ["0", "1", "2"]).height

    one, two, four = height((36, 3)), height((36, 5, 3)), height((36, 5, 5, 5, 3))
    assert one < two < four
    assert four - two == 2 * (two - one)
    assert height((36, 5000, 3)) < 500


def test_names_of_classes_fit():
    for names in _pictures.CLASS_NAMES.values():
        assert len(names) == 10
        counts = torch.randint(0, 100, (10, 10))
        assert _pictures.confusion(counts, names).width == _pictures.WIDTH


def test_the_graph_is_the_algorithm(network):
    model, x, y = network
    records = probe(model, torchbp.QuadraticCost(), x, y)
    graph = _graph.draw(records, "QuadraticCost")
    inputs = {node.name: list(node.input) for node in graph.node}
    assert {name for names in inputs.values() for name in names} <= inputs.keys()
    first, second = "layer_1_sigmoid", "layer_2_sigmoid"
    assert inputs[f"{second}/z"] == [f"{first}/a", f"{second}/W", f"{second}/b"]
    assert inputs[f"{second}/BP1_delta"] == ["cost/grad_a", f"{second}/z"]
    assert inputs[f"{first}/BP2_delta"] == [
        f"{second}/BP1_delta",
        f"{first}/z",
        f"{second}/W",
    ]
    assert inputs[f"{first}/BP4_grad_W"] == [f"{first}/BP2_delta", "a0_input"]
    shapes = {node.name: node.attr["shape"].s.decode() for node in graph.node}
    assert shapes[f"{first}/BP4_grad_W"] == shapes[f"{first}/W"] == "5 x 6"


# ------------------------------------------------------------------ the main job


def points(folder):
    """The steps of every tag of every kind."""
    events = read(folder)
    tags = events.Tags()
    readers = {
        "scalars": events.Scalars,
        "histograms": events.Histograms,
        "images": events.Images,
        "tensors": events.Tensors,
    }
    return {
        (kind, tag): [e.step for e in reader(tag)]
        for kind, reader in readers.items()
        for tag in tags[kind]
    }


def job(tmp_path, **changes):
    small = {"dataset": "digits", "sizes": (784, 12, 10), "epochs": 3, "lr": 0.5}
    small |= {"logdir": str(tmp_path), "output": "quiet"}
    return mnist.main(mnist.TrainingSettings(**{**small, **changes}))["run"]


def test_runs_of_either_layers_and_either_engine_lie_side_by_side(tmp_path):
    """The same tags at the same steps, after a resume by the other engine, too."""
    ours = points(job(tmp_path, name="ours"))
    native = points(job(tmp_path, name="native", layers="native"))
    explicit = points(job(tmp_path, name="explicit", engine="explicit"))
    assert ours == native == explicit
    # 1,297 images in batches of 10 are 130 mini-batches.
    assert ours["images", "pictures/journey"] == [0, 130, 260, 390]
    assert ours["images", "pictures/learning"] == [130, 260, 390]
    assert ours["histograms", "distributions/z_layer_2"] == [0, 130, 260, 390]
    begun = job(tmp_path, name="begun", epochs=2)
    mnist.resume(begun, epochs=3, engine="explicit")
    assert points(begun) == ours


@pytest.mark.parametrize("level", dashboard.LEVELS)
def test_every_level_trains_the_same_and_leaves_what_repeats_it(tmp_path, level):
    run = Path(job(tmp_path, log_level=level))
    names = {p.name.split(".")[0] for p in run.iterdir()} - {"events"}
    assert {"checkpoint", "settings", "versions"} <= names
    assert ("learning" in names) == (level == "full")
    assert len(list(run.glob("events.*"))) == (level != "off")
    full = Path(job(tmp_path, name="full"))
    ours, theirs = (
        checkpoint.load(folder / "checkpoint.pt")["trainer"]["model"]
        for folder in (run, full)
    )
    for name, parameter in ours.items():
        assert torch.equal(parameter, theirs[name])


def test_a_later_session_at_full_level_draws_the_graph_once(tmp_path, split):
    write(tmp_path, split, [0, 1], level="basic")
    assert not read(tmp_path).Tags()["graph"]
    write(tmp_path, split, [2], resumed_at=1)
    assert read(tmp_path).Tags()["graph"]
    write(tmp_path, split, [3], resumed_at=2)
    graphs = [
        event
        for file in sorted(tmp_path.iterdir())
        for event in EventFileLoader(str(file)).Load()
        if event.HasField("graph_def")
    ]
    assert len(graphs) == 1


def test_the_graph_says_b_and_sigma_where_they_are():
    model = torch.nn.Sequential(
        torchbp.BPLinearSigmoid(6, 5, bias=False), torchbp.BPLinear(5, 3)
    )
    x, y = torch.rand(4, 6), torch.randint(0, 3, (4,))
    records = probe(model, torchbp.LogLikelihoodCost(), x, y)
    formulas = {node.op for node in _graph.draw(records, "LogLikelihoodCost").node}
    assert {"z^1 = W^1 a^0", "a^1 = σ(z^1)"} <= formulas
    assert {"z^2 = W^2 a^1 + b^2", "a^2 = z^2"} <= formulas


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_distributions_of_every_dtype(tmp_path, split, dtype):
    write(tmp_path, split, [0], model=seen().to(dtype))
    assert read(tmp_path).Tags()["histograms"]


def test_letters_without_freetype(monkeypatch):
    from PIL import ImageFont

    def load_default(size=None):
        if size is not None:
            raise ImportError("FreeType is not there")
        return "the only one"

    monkeypatch.setattr(ImageFont, "load_default", load_default)
    assert _pictures._font.__wrapped__(13) == "the only one"


# ------------------------------------------------- networks of other modules


class Calls(nn.Module):
    """A network whose forward is a function of its parts."""

    def __init__(self, forward, *parts):
        super().__init__()
        self.parts, self.calls = nn.ModuleList(parts), forward

    def forward(self, x):
        return self.calls(x, *self.parts)


def without_grad(x, features, layer):
    with torch.no_grad():
        x = features(x)
    return layer(x)


def convolution(channels, size, layer=torchbp.BPLinear):
    n = channels * (7 - size) ** 2
    conv = nn.Conv2d(1, channels, size)
    return nn.Sequential(nn.Unflatten(1, (1, 6, 6)), conv, nn.Flatten(), layer(n, 3))


ANY = {"confusion", "misclassified", "learning"}
ALL = ANY | {"weights", "journey"}
NETWORKS = {
    "features": (lambda: convolution(2, 3), ANY),
    "native": (lambda: convolution(2, 3, nn.Linear), ANY),
    "as many features as a smaller image has pixels": (lambda: convolution(1, 2), ANY),
    "as many features as pixels": (lambda: convolution(1, 1), ALL),
    "a layer for each row of the image": (
        lambda: nn.Sequential(
            nn.Unflatten(1, (6, 6)),
            torchbp.BPLinearTanh(6, 4),
            nn.Flatten(),
            torchbp.BPLinear(24, 3),
        ),
        ANY,
    ),
    "a layer that is called twice": (
        lambda: Calls(
            lambda x, a, b: b(a(a(x))),
            torchbp.BPLinearSigmoid(36, 36),
            torchbp.BPLinear(36, 3),
        ),
        ALL,
    ),
    "something else gives the answer": (
        lambda: nn.Sequential(
            torchbp.BPLinearSigmoid(36, 4),
            nn.Unflatten(1, (1, 4)),
            nn.Conv1d(1, 3, 4),
            nn.Flatten(),
        ),
        ANY | {"weights"},
    ),
    "features that no_grad hides": (
        lambda: Calls(without_grad, nn.Linear(36, 8), torchbp.BPLinear(8, 3)),
        ANY | {"weights"},
    ),
    "an unused layer": (
        lambda: Calls(
            lambda x, used, unused: used(x[:, None]).flatten(1),
            nn.Conv1d(1, 3, 36),
            torchbp.BPLinear(2, 2),
        ),
        set(),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_pictures_that_cannot_be_drawn_are_left_out(tmp_path, split, name):
    make, expected = NETWORKS[name]
    torch.manual_seed(0)
    write(tmp_path, split, [0, 1], model=make())
    assert pictures_in(tmp_path) == expected


def pictures_in(folder):
    return {tag.split("/")[1] for tag in read(folder).Tags()["images"]}


def test_a_convolution_is_trained_and_pictured(tmp_path):
    """At level full, to the end, by the issue's network."""
    splits = data.load("digits")
    splits = Splits(*(Split(s.images[:40], s.labels[:40]) for s in splits))
    model = nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, 2, 7, 7),
        nn.Flatten(),
        torchbp.BPLinear(32, 10),
    )
    cost = torchbp.QuadraticCost()
    trainer = Trainer(model, AutogradSGD(model, cost, 0.1), cost, splits, 10)
    board = Dashboard(tmp_path, {}, {}, {})
    board.watch(model, cost, splits.train, splits.test)
    trainer.fit(2, lambda result: board.log(result, 0.1))
    board.close()
    assert pictures_in(tmp_path) == ANY
    assert [e.step for e in read(tmp_path).Scalars("saturated/layer_1")] == ends(
        0, 1, 2
    )


@pytest.mark.parametrize(
    ("shape", "classes", "expected"),
    [
        ((35,), 3, {"confusion"}),
        ((1, 6, 6), 3, {"confusion"}),
        ((36,), 1, ALL - {"learning"}),
        ((36,), 31, ALL - {"learning"}),
        ((36,), 120, ALL - {"confusion", "learning"}),
        ((400 * 400,), 3, ALL - {"learning"}),
    ],
)
def test_pictures_of_other_images_and_classes(tmp_path, shape, classes, expected):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (5, *shape), dtype=torch.uint8)
    last = torchbp.BPLinear(4, classes)
    first = torchbp.BPLinearTanh(images[0].numel(), 4)
    model = nn.Sequential(nn.Flatten(), first, last)
    write(tmp_path, Split(images, torch.arange(5) % classes), [0], model=model)
    assert pictures_in(tmp_path) == expected


def test_names_of_another_number_of_classes_are_not_used(tmp_path, split):
    board = Dashboard(tmp_path, {}, {}, {})
    names = []
    for classes in (3, 10):
        model = seen((36, 5, classes))
        board.watch(model, torchbp.QuadraticCost(), split, split, "fashion")
        names.append(list(board.watched.names))
    board.close()
    assert names == [["0", "1", "2"], _pictures.CLASS_NAMES["fashion"]]


@pytest.mark.parametrize(
    "model",
    [nn.Conv2d(1, 3, 6), nn.Sequential(nn.Flatten(), nn.Sigmoid())],
    ids=lambda model: type(model).__name__,
)
def test_a_network_without_linear_layers_is_refused_at_once(tmp_path, split, model):
    """With what helps; that from_native converts it is not among it."""
    board = Dashboard(tmp_path, {}, {}, {})
    with pytest.raises(ValueError, match=r"expected an nn\.Linear.*without watch") as e:
        board.watch(model, torchbp.QuadraticCost(), split, split)
    assert "from_native" not in str(e.value)
    board.log(result(0), 3.0)  # as it says
    board.close()
    assert read(tmp_path).Tags()["scalars"]


def test_observing_recommends_to_convert_what_can_be_converted():
    model = nn.Sequential(nn.Flatten(), nn.Sigmoid())
    with pytest.raises(ValueError, match=r"without any$"), torchbp.observe(model):
        pass
    model.append(nn.Linear(3, 2))
    refused = pytest.raises(ValueError, match=r"from_native converts its nn\.Linear$")
    with refused, torchbp.observe(model):
        pass
    with torchbp.observe(torchbp.from_native(model)):
        pass


def test_any_number_of_weights_can_be_drawn():
    """torch's own quantile takes 16 million."""
    sheet = _pictures.weights(torch.linspace(-1, 1, 100 * 410**2).view(100, -1))
    assert sheet.width > 10 * 410
    assert sheet.getpixel((4, 22)) == tuple(map(int, _pictures._BLUE))
