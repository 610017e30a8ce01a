"""Labels of every integer dtype are the same labels, whoever takes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import torchbp
from torchbp.costs import COSTS
from torchbp.data import Split, Splits
from torchbp.training import AutogradSGD, Dashboard, Trainer, batches, evaluate

INTEGERS = [
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.uint16, torch.uint32, torch.uint64,
]  # fmt: skip
K = 30  # with pairs of classes beyond the numbers of 8 bits
ENGINES = [AutogradSGD, torchbp.ExplicitSGD]
any_dtype = pytest.mark.parametrize("dtype", INTEGERS, ids=str)
all_costs = pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS)


def split(n, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (n, 16), generator=generator).to(torch.uint8)
    return Split(images, torch.randint(K, (n,), generator=generator).to(dtype))


def network(cost, seed=0):
    torch.manual_seed(seed)
    output = "identity" if cost.takes == "z" else None
    return torchbp.MLP([16, 5, K], output=output)


def trained(engine, dtype, folder):
    model, cost = network(torchbp.QuadraticCost), torchbp.QuadraticCost()
    data = Splits(*(split(n, dtype, seed=n) for n in (23, 7, 11)))
    trainer = Trainer(model, engine(model, cost, 0.5), cost, data, batch_size=5)
    board = Dashboard(folder, {}, {}, {})
    board.watch(model, cost, data.train, data.test)
    results = []
    trainer.fit(2, lambda result: (results.append(result), board.log(result, 0.5)))
    board.close()
    weights = [p.tolist() for p in model.parameters()]
    return weights, [result.scores for result in results], pictures(folder)


def pictures(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), {"images": 0})
    events.Reload()
    tags = events.Tags()["images"]
    return {t: [e.encoded_image_string for e in events.Images(t)] for t in tags}


@any_dtype
@pytest.mark.parametrize("engine", ENGINES)
def test_training(engine, dtype, tmp_path):
    pytest.importorskip("tensorboard")
    expected = trained(engine, torch.int64, tmp_path / "64")
    assert trained(engine, dtype, tmp_path / "other") == expected
    assert {"pictures/confusion", "pictures/misclassified"} < set(expected[2])


@any_dtype
@all_costs
def test_everything_else_that_takes_labels(cost, dtype):
    images, labels = split(12, dtype)
    x, expected = torchbp.data.scale(images), labels.long()
    model, C = network(cost), cost()
    z = model(x)
    assert torch.equal(C(z, labels), C(z, expected))
    ours, theirs = (torchbp.backprop(model, C, x, y) for y in (labels, expected))
    assert torch.equal(ours[0], theirs[0])
    assert all(torch.equal(ours[1][name], grad) for name, grad in theirs[1].items())
    assert str(torchbp.compare(model, C, x, labels)) == str(
        torchbp.compare(model, C, x, expected)
    )
    assert evaluate(model, C, Split(images, labels)) == evaluate(
        model, C, Split(images, expected)
    )
    steps = []
    for y in (labels, expected):
        engine = torchbp.ExplicitSGD(network(cost), C, 0.5)
        order = torch.arange(12)
        costs = [engine.step(x, y), engine.epoch(x, y, 5, torch.Generator())]
        costs += engine.steps(images, y, order, 5)
        steps.append([c.tolist() for c in costs])
    assert steps[0] == steps[1]


@any_dtype
def test_batches_are_one_hot_rows(dtype):
    labels = split(13, dtype)
    order = torch.arange(13)
    rows = [y for _, ys in batches(labels, order, 5, K, torch.float64) for y in ys]
    expected = torch.nn.functional.one_hot(labels.labels.long(), K).double()
    assert torch.equal(torch.cat(rows), expected)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("labels", ["bool", "float32", "complex64", "outside", "below"])
def test_what_is_no_label_is_refused_by_both_engines(engine, labels):
    """By the engine, and before it by the trainer."""
    images, right = split(9, torch.int64)
    wrong = {
        "outside": right.clone().fill_(K),
        "below": right.to(torch.int8).fill_(-1),
    }.get(labels)
    if wrong is None:
        wrong = right.to(getattr(torch, labels))
    cost = torchbp.QuadraticCost()
    model = network(torchbp.QuadraticCost)
    before = [p.tolist() for p in model.parameters()]
    takes = engine(model, cost, 0.5)
    with pytest.raises((TypeError, ValueError), match=r"^target: expected"):
        list(takes.steps(images, wrong, torch.arange(9), 4))
    good = Split(images, right)
    with pytest.raises((TypeError, ValueError), match=r"^test labels: expected"):
        Trainer(model, takes, cost, Splits(good, good, Split(images, wrong)), 4)
    assert [p.tolist() for p in model.parameters()] == before


def test_targets_that_are_numbers_train_alike():
    """Not labels: rows of numbers, as a regression or an autoencoder has them."""
    images, y = split(10, torch.int64).images, torch.rand(10, K)
    weights = []
    for engine in ENGINES:
        model = network(torchbp.QuadraticCost).double()
        takes = engine(model, torchbp.QuadraticCost(), 0.5)
        list(takes.steps(images, y.double(), torch.arange(10), 4))
        weights.append([p.detach() for p in model.parameters()])
    torch.testing.assert_close(*weights)


def test_one_label_for_each_image():
    images, labels = split(9, torch.int64)
    model, cost = network(torchbp.QuadraticCost), torchbp.QuadraticCost()
    good = Split(images, labels)
    for wrong in (labels[:5], labels[:, None]):
        data = Splits(good, Split(images, wrong), good)
        with pytest.raises(ValueError, match=r"^validation labels: expected shape \(9"):
            Trainer(model, AutogradSGD(model, cost, 0.5), cost, data, 4)
