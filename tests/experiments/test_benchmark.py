"""The benchmark measures what it says, and nothing that computes something else."""

from __future__ import annotations

import json

import bounds
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import torchbp
from experiments import benchmark
from experiments.support import layer_loops, timing, training_loops
from torchbp._numeric import relative_distance
from torchbp.data import Split

CPU = torch.device("cpu")
TINY = training_loops.Workload("tiny", (784, 5, 10), 7, 0.5)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Two tiny layers, one tiny network and 100 examples."""
    monkeypatch.setattr(layer_loops, "SIZES", ((4, 5, 3), (2, 3, 7)))
    monkeypatch.setattr(benchmark, "WORKLOADS", (TINY,))
    monkeypatch.setattr(benchmark, "EXAMPLES", 50)
    monkeypatch.setattr(benchmark, "training_set", lambda settings: DATA)
    for name in ("BATCHES", "WIDTHS", "DEPTHS"):
        monkeypatch.setattr(benchmark, name, (1, 2, 3))


def _data() -> Split:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (100, 784), generator=generator).to(torch.uint8)
    return Split(images, torch.randint(0, 10, (100,), generator=generator))


DATA = _data()


def settings(tmp_path, **changes):
    small = {"repeats": 2, "seconds": 0.0, "no_compile": True, "logdir": str(tmp_path)}
    return benchmark.BenchmarkSettings(**{**small, **changes})


def test_everything_is_printed_written_and_shown(tmp_path, capsys):
    results = benchmark.main(settings(tmp_path, name="one"))
    out = capsys.readouterr().out
    for loop in benchmark.LOOPS:
        if loop not in benchmark.COMPILED:
            assert f"\n{loop} " in out
    assert f"torch {torch.__version__}" in out and "GFLOP/s" in out
    written = json.loads((tmp_path / "one" / "results.json").read_text())
    assert written == json.loads(json.dumps(results))
    by_name = {row["loop"]: row for row in written["networks"]}
    assert by_name["native"]["median_ratio"] == 1
    assert all(row["shortest"] > 0 and not row["is_wrong"] for row in by_name.values())
    assert len(written["layers"]) == 2 * len(layer_loops.LAYERS)
    for row in written["layers"]:
        assert row["median_ratio"] > 0 and row["our_bytes"] and row["native_bytes"]
    events = EventAccumulator(str(tmp_path / "one"))
    events.Reload()
    shown = events.Scalars("x_native/tiny/ExplicitSGD.epoch")[0].value
    assert shown == pytest.approx(by_name["ExplicitSGD.epoch"]["median_ratio"])


@pytest.mark.parametrize(
    "name",
    [name for name in benchmark.LOOPS if name not in benchmark.COMPILED],
)
def test_every_loop_trains_the_same_network(name):
    """A step for each batch, the ragged last one included, with native's weights."""
    task = training_loops.Task(TINY, DATA, CPU, 1)
    try:
        loop = benchmark.LOOPS[name](task)
    except training_loops.UnavailableError as reason:
        pytest.skip(str(reason))
    native = benchmark.LOOPS[benchmark.NATIVE](task)
    # JAX scans over batches of one shape: its last ragged batch is left out.
    order = torch.randperm(100, generator=torch.Generator().manual_seed(1))
    order = order[:98] if name.startswith("JAX") else order
    start = [w.clone() for w in native.weights()]
    loop.run(order)
    native.run(order)
    assert relative_distance(start, native.weights()) > 1e-2
    weights = loop.weights()
    assert (weights is None) == (name == "scikit-learn")
    if weights is not None:
        off = relative_distance(weights, native.weights())
        assert off < bounds.trained(len(order))


def test_a_loop_that_computes_something_else_is_wrong_not_fast(
    tmp_path, capsys, monkeypatch
):
    class Lazy(training_loops.ExplicitEpochs):
        def run(self, order):
            super().run(order[:-1])

    monkeypatch.setitem(benchmark.LOOPS, "lazy", Lazy)
    options = "--what networks --no-compile --repeats 1 --name one --logdir".split()
    status = benchmark.command_line([*options, str(tmp_path)])
    assert status == 1
    (line,) = (x for x in capsys.readouterr().out.splitlines() if "lazy" in x)
    assert "WRONG: its weights differ by" in line and "x native" not in line
    events = EventAccumulator(str(tmp_path / "one"))
    events.Reload()
    assert not any("lazy" in tag for tag in events.Tags()["scalars"])


def test_what_is_not_installed_is_skipped_with_a_line(monkeypatch, capsys, tmp_path):
    find = training_loops.importlib.util.find_spec
    monkeypatch.setattr(
        training_loops.importlib.util,
        "find_spec",
        lambda name: None if name == "jax" else find(name),
    )
    benchmark.main(settings(tmp_path, what="networks"))
    out = capsys.readouterr().out
    assert "skipped: jax is not installed" in out and '".[peers]"' in out


def test_scaling_shows_how_the_cost_grows(tmp_path, capsys):
    results = benchmark.main(settings(tmp_path, what="scaling"))
    out = capsys.readouterr().out
    for what in ("batch size", "hidden neurons", "hidden layers"):
        assert what in out
        growth = results["scaling"][what]
        assert growth["sizes"] == [1, 2, 3]
        assert all(len(t) == 3 and min(t) > 0 for t in growth["times"].values())
    assert out.count("~ size^") == 9


def test_a_wrong_loop_is_wrong_in_the_scaling_table_too(tmp_path, capsys, monkeypatch):
    class Lazy(training_loops.ExplicitEpochs):
        def run(self, order):
            super().run(order[:1])

    monkeypatch.setitem(benchmark.LOOPS, benchmark.EXPLICIT, Lazy)
    options = "--what scaling --repeats 1 --name one --logdir".split()
    assert benchmark.command_line([*options, str(tmp_path)]) == 1
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.skipif(not training_loops.has_compiler(), reason="needs a C++ compiler")
def test_every_compiled_layer_is_compiled_for_its_own_shape(monkeypatch):
    """More shapes than Dynamo recompiles for before it gives up and runs eagerly."""
    from torch._dynamo.utils import counters

    counters.clear()
    modes = {"backend": "eager"}
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda m: compile_(m, **modes))
    sizes = [(8, n, 16) for n in range(14, 17)]
    rows = list(layer_loops.measure_all(sizes, ["compiled"], 1, 0.0, CPU))
    assert len(rows) == 3 * len(layer_loops.LAYERS)
    assert counters["frames"]["ok"] >= 2 * len(rows)
    torch.compiler.reset()


def test_exponents_of_growth():
    sizes = [1, 2, 4, 8, 16]
    assert benchmark.growth_exponent(
        sizes, [3 * s**1.5 for s in sizes]
    ) == pytest.approx(1.5)
    assert benchmark.growth_exponent([1, 4], [5.0, 5.0]) == pytest.approx(0)


def test_flops_are_those_of_the_products():
    nielsen = training_loops.Workload("nielsen", (784, 30, 10), 10, 3.0)
    forward = 2 * 10 * (784 * 30 + 30 * 10)
    assert nielsen.flops() == forward + forward + 2 * 10 * (30 * 10)
    first = 2 * 10 * 784 * 30
    assert nielsen.flops(0.25) == nielsen.flops() - 0.75 * 2 * first


def test_variants_take_turns():
    calls: list[str] = []
    steps = {name: lambda name=name: calls.append(name) for name in ("a", "b")}
    times = timing.take_turns(steps, 4, 0.0, CPU)
    assert {name: len(t) for name, t in times.items()} == {"a": 4, "b": 4}
    assert calls[-8:] == ["b", "a", "a", "b", "b", "a", "a", "b"]


def test_a_layer_that_computes_something_else_is_not_timed():
    ours = torchbp.BPLinearSigmoid(5, 3)
    x, g = torch.rand(4, 5), torch.rand(4, 3)
    layer_loops.check_agreement(ours, torchbp.to_native(ours), x, g)
    with pytest.raises(AssertionError, match="differ by"):
        layer_loops.check_agreement(ours, nn.Linear(5, 3), x, g)


def test_peak_bytes_count_what_is_held():
    class Held(nn.Module):
        def forward(self, x):
            return (x * 2) * 3  # a temporary, a result, and gradients likewise

    x = torch.ones(1024, 256, requires_grad=True)
    peak = layer_loops.peak_bytes(Held(), x, torch.ones_like(x))
    assert 2 <= peak / x.nbytes <= 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--repeats", "0"], "expected at least 1, got 0"),
        (["--device", "abacus"], "device: expected one of cpu"),
    ],
)
def test_bad_arguments(capsys, tmp_path, options, message):
    assert benchmark.command_line([*options, "--logdir", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
