"""Load: many epochs with everything that surrounds them, and very deep networks.

The long forms (``-m slow``) are the same checks over more epochs.
"""

from __future__ import annotations

import copy
import gc
import os
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import bounds
import pytest
import torch

import torchbp
from torchbp import data
from torchbp.training import AutogradSGD, checkpoint

engines = pytest.mark.parametrize("engine", ["autograd", "explicit"])
DEPTH = 1000


@pytest.fixture(autouse=True)
def _few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forty digits for each split."""
    load = data.load

    def load_few(name: str, root: str | None = None, download: bool = True):
        splits = load(name, root, download)
        return data.Splits(*(data.Split(*(t[:40] for t in split)) for split in splits))

    monkeypatch.setattr(data, "load", load_few)


@dataclass
class Meter:
    """What the process and the run hold, measured at each checkpoint."""

    run: Path
    handles: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    objects: list[int] = field(default_factory=list)
    events: list[int] = field(default_factory=list)
    files: list[int] = field(default_factory=list)

    def measure(self) -> None:
        gc.collect()
        self.objects.append(len(gc.get_objects()))
        self.handles.append(len(os.listdir("/proc/self/fd")))
        self.bytes.append(4096 * int(Path("/proc/self/statm").read_text().split()[1]))
        self.files.append(len(list(self.run.iterdir())))
        events = self.run.glob("events.out.tfevents.*")
        self.events.append(sum(path.stat().st_size for path in events))


@pytest.fixture
def meter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Meter]:
    """Measures after each checkpoint of the run in tmp_path/run."""
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs Linux's /proc, to count memory and file handles")
    meter, save = Meter(tmp_path / "run"), checkpoint.save

    def save_and_measure(*args: object, **kwargs: object) -> None:
        save(*args, **kwargs)
        meter.measure()

    monkeypatch.setattr(checkpoint, "save", save_and_measure)
    gc.collect()
    gc.freeze()  # what is there already need not be gone through each time
    yield meter
    gc.unfreeze()


def run_epochs(tmp_path: Path, engine: str, level: str, epochs: int, *more: str) -> int:
    from experiments import mnist

    arguments = ["--dataset", "digits", "--sizes", "784", "5", "10", "--quiet"]
    arguments += ["--engine", engine, "--log-level", level, "--epochs", str(epochs)]
    return mnist.command_line([*arguments, "--logdir", str(tmp_path), *more])


def check_soak(
    tmp_path: Path, meter: Meter, engine: str, level: str, epochs: int
) -> None:
    """From a third of the epochs on, nothing grows but the event file, and that by the
    same for each epoch."""
    assert run_epochs(tmp_path, engine, level, epochs, "--name", "run") == 0
    assert len(meter.handles) == epochs + 1  # before the first, and after each
    start = epochs // 3
    assert max(meter.handles[start:]) <= meter.handles[start]
    assert max(meter.files[start:]) <= meter.files[start]
    # Of objects and memory the least, since caches come and go; each epoch makes
    # hundreds of objects and 100 KB, so what keeps them shows.
    grown = min(meter.objects[-3:]) - min(meter.objects[start : start + 3])
    assert grown / (epochs - start) < 3
    grown = min(meter.bytes[-3:]) - min(meter.bytes[start : start + 3])
    assert (grown - 2_000_000) / (epochs - start) < 5_000
    # What waits to be written is there at the end, and shifts the growth in between.
    half = (start + epochs) // 2
    first = (meter.events[half] - meter.events[start]) / (half - start)
    second = (meter.events[-1] - meter.events[half]) / (epochs - half)
    assert first > 0
    assert 0.75 < second / first < 1.25


@engines
def test_soak(tmp_path: Path, meter: Meter, engine: str) -> None:
    check_soak(tmp_path, meter, engine, "basic", epochs=30)


@pytest.mark.slow
@engines
@pytest.mark.parametrize("level", ["basic", "full"])
def test_long_soak(tmp_path: Path, meter: Meter, engine: str, level: str) -> None:
    check_soak(tmp_path, meter, engine, level, epochs=600)


def test_the_soak_notices_what_is_kept(
    tmp_path: Path, meter: Meter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file handle an epoch."""
    measure, kept = Meter.measure, []

    def measure_and_keep(self: Meter) -> None:
        kept.append(open(os.devnull))  # noqa: SIM115
        measure(self)

    monkeypatch.setattr(Meter, "measure", measure_and_keep)
    try:
        with pytest.raises(AssertionError):
            check_soak(tmp_path, meter, "explicit", "off", epochs=9)
    finally:
        for file in kept:
            file.close()


def check_resumes(tmp_path: Path, meter: Meter, sessions: int) -> None:
    """As many sessions as epochs: no handle stays open, and each session may leave one
    event file."""
    assert run_epochs(tmp_path, "explicit", "basic", 1, "--name", "run") == 0
    handles, files = [], []
    for epoch in range(2, sessions + 1):
        more = ["--resume", str(meter.run)]
        assert run_epochs(tmp_path, "explicit", "basic", epoch, *more) == 0
        handles.append(len(os.listdir("/proc/self/fd")))
        files.append(len(list(meter.run.iterdir())))
    assert handles[-1] <= handles[0]
    assert files[-1] - files[0] <= sessions - 2
    state = checkpoint.load(meter.run / "checkpoint.pt")
    assert state["trainer"]["epoch"] == sessions


def test_many_sessions(tmp_path: Path, meter: Meter) -> None:
    check_resumes(tmp_path, meter, 6)


@pytest.mark.slow
def test_very_many_sessions(tmp_path: Path, meter: Meter) -> None:
    check_resumes(tmp_path, meter, 100)


# A network of 1,000 layers: nothing recurses, nothing is quadratic


def deep(activation: str = "relu") -> torchbp.MLP:
    torch.manual_seed(0)
    sizes = [5] * DEPTH + [3]
    model = torchbp.MLP(sizes, activation, "sigmoid", init="torch")
    with torch.no_grad():  # signals that survive a thousand layers, so that it counts
        for layer in model.layers:
            torch.nn.init.orthogonal_(layer.weight)
            layer.bias.fill_(0.01)
    return model


X, Y = torch.rand(7, 5), torch.rand(7, 3)
COST = torchbp.QuadraticCost()


@pytest.fixture(scope="module")
def model() -> torchbp.MLP:
    return deep("identity")


def test_deep_gradients_are_native_ones(model: torchbp.MLP) -> None:
    """Autograd through our layers, `backprop` and native layers."""
    parameters = list(model.parameters())
    assert len(parameters) == 2 * DEPTH
    ours = torch.autograd.grad(COST(model(X), Y), parameters)
    _, by_hand = torchbp.backprop(model, COST, X, Y)
    native = torchbp.to_native(model)
    assert len(native) == DEPTH + 1  # and one sigmoid
    theirs = torch.autograd.grad(COST(native(X), Y), parameters)
    assert float(theirs[0].abs().max()) > 1e-6
    for o, h, t in zip(ours, by_hand.values(), theirs, strict=True):
        scale = float(t.abs().max())
        off = bounds.near(torch.float32, scale, longest=7, layers=DEPTH)
        torch.testing.assert_close(o, t, **off)
        torch.testing.assert_close(h, t, **off)


@pytest.mark.parametrize("activation", torchbp.nn.ACTIVATIONS)
def test_deep_gradients_of_every_activation(activation: str) -> None:
    network = deep(activation)
    COST(network(X), Y).backward()
    assert all(
        p.grad is not None and p.grad.isfinite().all() for p in network.parameters()
    )
    _, by_hand = torchbp.backprop(network, COST, X, Y)
    last = network.layers[-1].weight.grad
    torch.testing.assert_close(by_hand[f"layers.{DEPTH - 1}.weight"], last)


def test_deep_networks_are_saved_loaded_and_copied(
    model: torchbp.MLP, tmp_path: Path
) -> None:
    expected = model(X)
    checkpoint.save(tmp_path / "deep.pt", {"model": model.state_dict()})
    loaded = torchbp.MLP(model.sizes, "identity", "sigmoid")
    loaded.load_state_dict(checkpoint.load(tmp_path / "deep.pt")["model"])
    back = torchbp.from_native(torchbp.to_native(model))
    copies = [loaded, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), back]
    for copied in copies:
        assert torch.equal(copied(X), expected)
    assert f"{DEPTH - 1} x BPLinear(" in repr(model)


def test_a_deep_network_is_observed(model: torchbp.MLP) -> None:
    with torchbp.observe(model) as trace:
        COST(model(X), Y).backward()
    assert len(trace) == DEPTH
    assert trace[0].delta.isfinite().all() and trace[0].delta.any()
    assert len(trace.table(lr=1.0).splitlines()) >= DEPTH
    model.zero_grad()


def test_deep_networks_are_trained_by_both_engines() -> None:
    """The same steps; then an epoch, which packs the parameters."""
    first, second = deep("identity"), deep("identity")
    explicit = torchbp.ExplicitSGD(first, COST, lr=1e-3)
    autograd = AutogradSGD(second, COST, lr=1e-3)
    for _ in range(2):
        torch.testing.assert_close(explicit.step(X, Y), autograd.step(X, Y))
    changes = 2e-3 * bounds.network(torch.float32, longest=7, layers=DEPTH)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        bounds.assert_within(
            a, b, bounds.trained(2) * float(b.detach().norm()) + changes
        )
    assert explicit.epoch(X, Y, batch_size=3).isfinite()
    assert copy.deepcopy(explicit).step(X, Y).isfinite()


@pytest.mark.parametrize(
    "engine", ["explicit", pytest.param("autograd", marks=pytest.mark.slow)]
)
def test_the_main_job_trains_and_resumes_a_deep_network(
    tmp_path: Path, engine: str
) -> None:
    from experiments import mnist

    arguments = ["--dataset", "digits", "--quiet", "--logdir", str(tmp_path)]
    arguments += ["--sizes", "784", *["5"] * (DEPTH - 1), "10", "--name", "run"]
    arguments += ["--engine", engine, "--log-level", "off", "--epochs", "1"]
    assert mnist.command_line([*arguments, "--batch-size", "20"]) == 0
    resumed = ["--resume", str(tmp_path / "run"), "--epochs", "2", "--quiet"]
    assert mnist.command_line(resumed) == 0
