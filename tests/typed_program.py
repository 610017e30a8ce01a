"""What somebody writes who uses the package: mypy --strict and Python both take it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import torchbp
from torchbp import costs, data, functional
from torchbp.examination import Report
from torchbp.inspection import Comparison, Record
from torchbp.nn import BPLinear
from torchbp.training import AutogradSGD, Score, Trainer, checkpoint

x, labels = torch.rand(5, 784), torch.arange(5)

# Layers and costs of one's own are classes, whose instances are modules.
Arsinh = torchbp.define_layer("Arsinh", torch.asinh, lambda a: 1 / torch.cosh(a))
assert_type(Arsinh, type[BPLinear])
layer = Arsinh(784, 30, bias=False)
assert_type(layer, BPLinear)
a: Tensor = layer(x)
Absolute = torchbp.define_cost(
    "Absolute", lambda a, y: (a - y).abs().sum(-1), lambda a, y: (a - y).sign()
)
C: Tensor = Absolute()(a, a.detach())
takes: str = Absolute.takes

assert_type(functional.linear_sigmoid(x, layer.weight), Tensor)
assert_type(costs.log_likelihood_cost(a, labels), Tensor)

# Networks, both engines, and what comes of them.
model = torchbp.MLP([784, 30, 10], activation=Arsinh, output="sigmoid")
cost = torchbp.QuadraticCost()
value, gradients = torchbp.backprop(model, cost, x, labels)
assert_type(value, Tensor)
assert_type(gradients["layers.0.weight"], Tensor)
engine = torchbp.ExplicitSGD(model, cost, lr=0.1, weight_decay=1e-4)
assert_type(engine.step(x, labels), Tensor)
splits = data.load("digits")
assert_type(splits.test.images, Tensor)
assert_type(data.scale(splits.test.images), Tensor)
for either in (engine, AutogradSGD(model, cost, lr=0.1)):
    trainer = Trainer(model, either, cost, splits, batch_size=500)
    trainer.fit(epochs=1)
    assert_type(trainer.score()["test"], Score)
    assert_type(trainer.score()["test"].accuracy, float)

# What can be looked at.
small = torchbp.MLP([3, 2], dtype=torch.float64)
rows, targets = torch.rand(4, 3).double(), torch.rand(4, 2).double()
with torchbp.observe(small) as trace:
    cost(small(rows), targets).backward()
assert_type(trace[0], Record)
assert_type(trace["layers.0"], list[Record])
assert_type(trace[0].delta, Tensor | None)
assert_type(torchbp.compare(small, cost, rows, targets), Comparison)
assert_type(torchbp.compare(small, cost, rows, targets).ok, bool)
assert_type(torchbp.examine(torch.sin, torch.rand(2).double()), Report)
assert_type(torchbp.to_native(small), nn.Module)
assert_type(torchbp.__version__, str)

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "checkpoint.pt"
    checkpoint.save(path, {"model": small.state_dict()})
    small.load_state_dict(checkpoint.load(path)["model"])
