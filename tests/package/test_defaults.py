"""torch's default device and dtype are the user's: numbers are the same under any."""

from __future__ import annotations

import contextlib
import functools
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from cases import default_dtype
from PIL import Image, ImageDraw

import torchbp
from experiments import gradcheck, predict
from experiments.support import pictures
from experiments.support.settings import TrainingSettings, build
from torchbp import data
from torchbp.data import Split, Splits
from torchbp.training import AutogradSGD, Dashboard, Trainer

CPU32 = {"device": "cpu", "dtype": torch.float32}


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


CONTEXTS = {
    "torch.device": lambda: torch.device("meta"),
    "set_default_device": lambda: default_device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
}
under_any = pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS)


def network(sizes=(784, 5, 10), output=None):
    torch.manual_seed(0)
    return torchbp.MLP(sizes, output=output, **CPU32)


def digits():
    return Splits(*(Split(s.images[:60], s.labels[:60]) for s in data.load("digits")))


@functools.cache
def usual(function, *arguments):
    """What a function gives under torch's own defaults."""
    return function(*arguments)


def trained(engine):
    """Of two epochs on distorted images: each weight, score and event's number."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model, cost, splits = network(), torchbp.QuadraticCost(), digits()
    trainer = Trainer(model, engine(model, cost, 0.5), cost, splits, 7)
    trainer.vary = data.distort
    folder = Path(tempfile.mkdtemp())
    board = Dashboard(folder, {}, {}, {})
    board.watch(model, cost, splits.train, splits.test)
    trainer.fit(2, lambda result: board.log(result, 0.5))
    saved = trainer.state_dict()
    trainer.load_state_dict(saved)
    board.close()
    events = EventAccumulator(str(folder), {"scalars": 0, "images": 0})
    events.Reload()
    shutil.rmtree(folder)
    tags = events.Tags()
    curves = {
        tag: [event.value for event in events.Scalars(tag)]
        for tag in tags["scalars"]
        if not tag.startswith("speed")
    }
    pictures = {
        tag: [event.encoded_image_string for event in events.Images(tag)]
        for tag in tags["images"]
    }
    weights = {name: p.tolist() for name, p in saved["model"].items()}
    return weights, curves, pictures, {n: tuple(s) for n, s in trainer.score().items()}


@under_any
@pytest.mark.parametrize("engine", [AutogradSGD, torchbp.ExplicitSGD])
def test_training(engine, context):
    expected = usual(trained, engine)
    with context():
        assert trained(engine) == expected
    assert set(expected[2]) > {"pictures/weights", "pictures/confusion"}


def batch():
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.rand(5, 4, generator=generator, **CPU32)
    return x, torch.randint(3, (5,), generator=generator, device="cpu")


def algorithm(cost):
    """The whole algorithm, step by step and at once."""
    model = network((4, 6, 3), "identity" if cost.takes == "z" else None)
    C, grads = torchbp.backprop(model, cost(), *batch())
    engine = torchbp.ExplicitSGD(model, cost(), 0.5)
    costs = [engine.step(*batch()), engine.epoch(*batch(), 2, torch.Generator("cpu"))]
    cost()(model(batch()[0]), batch()[1]).backward()
    grads |= {f"{n}.grad": p.grad for n, p in model.named_parameters()}
    return [t.tolist() for t in (C, *costs, *grads.values())]


def looked_at():
    """What is printed of one backward pass."""
    model, cost = network((4, 6, 3)), torchbp.QuadraticCost()
    with torchbp.observe(model) as trace:
        cost(model(batch()[0]), batch()[1]).backward()
    return str(trace), str(torchbp.compare(model, cost, *batch()))


def examined():
    x = batch()[0].double().requires_grad_()
    layer = torchbp.BPLinearTanh(4, 3, device="cpu", dtype=torch.float64)
    torch.nn.init.constant_(layer.weight, 0.3)
    torch.nn.init.constant_(layer.bias, 0.1)
    return str(torchbp.examine(layer, x))


def defined():
    """A σ and a cost of one's own."""
    layer = torchbp.define_layer("Cubic", lambda z: z**3, lambda z: 3 * z**2, "z")
    cost = torchbp.define_cost(
        "Fourth", lambda a, y: (a - y).pow(4).sum(-1), lambda a, y: 4 * (a - y).pow(3)
    )
    model = torchbp.MLP([4, 3], layer, **CPU32)
    for p in model.parameters():
        torch.nn.init.constant_(p, 0.25)
    C = cost()(model(batch()[0]), batch()[1])
    C.backward()
    return (
        layer.function.max_slope,
        C.item(),
        [p.grad.tolist() for p in model.parameters()],
    )


def programs():
    """The answer of the program that reads pictures, and gradcheck's table."""
    picture = Image.new("L", (40, 40), 255)
    ImageDraw.Draw(picture).line((20, 5, 20, 35), fill=0, width=4)
    settings = TrainingSettings(sizes=(784, 5, 10))
    image = predict.prepare(pictures.levels(picture))
    values = predict.classify(build(settings), settings, image).values
    return values, gradcheck.main(gradcheck.GradcheckSettings(device="cpu"))


@under_any
@pytest.mark.parametrize("cost", torchbp.costs.COSTS.values(), ids=torchbp.costs.COSTS)
def test_the_algorithm(cost, context):
    expected = usual(algorithm, cost)
    with context():
        assert algorithm(cost) == expected


@under_any
@pytest.mark.parametrize("look", [looked_at, examined, defined, programs])
def test_looking_at_it(look, context):
    expected = usual(look)
    with context():
        assert look() == expected


@under_any
def test_what_the_defaults_are_for(context):
    """A network made without device and dtype has the default ones, as nn.Linear."""
    with context():
        native, ours = torch.nn.Linear(3, 2), torchbp.MLP([3, 2]).layers[0]
        assert ours.weight.device == native.weight.device
        assert ours.weight.dtype == native.weight.dtype
        if ours.weight.is_meta:
            return
        splits = digits()
        for engine in (AutogradSGD, torchbp.ExplicitSGD):
            model, cost = torchbp.MLP([784, 4, 10]), torchbp.QuadraticCost()
            trainer = Trainer(model, engine(model, cost, 0.1), cost, splits, 10)
            trainer.fit(1)
            assert {p.dtype for p in model.parameters()} == {native.weight.dtype}
