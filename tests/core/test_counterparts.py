"""Costs beside torch's losses: which is which, by what factor, and where it is said."""

from __future__ import annotations

import functools
import re
import tempfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import rand
from torch import nn

import torchbp
from experiments.support.settings import parse
from torchbp import inspection
from torchbp.__main__ import main
from torchbp.costs import COSTS, counterpart
from torchbp.data import Split, Splits
from torchbp.training import AutogradSGD, Dashboard, Trainer, evaluate

ROOT = Path(__file__).parents[2]
N, K = 6, 5
# By how much C is larger than the native counterpart, for K outputs.
FACTORS = {"quadratic": K / 2, "cross-entropy": K, "log-likelihood": 1}
NEIGHBOURS = {
    "cross-entropy": "nn.CrossEntropyLoss",
    "log-likelihood": "nn.BCEWithLogitsLoss",
}
all_costs = pytest.mark.parametrize("name", COSTS)


def native_of(name):
    return COSTS[name].native()


@all_costs
def test_the_counterpart_is_one_to_the_factor_that_is_said(name):
    v, labels = rand(N, K).requires_grad_(), torch.arange(N) % K
    y = F.one_hot(labels, K).double()
    for target in (y, rand(N, K, seed=1).softmax(-1)):
        ours = torch.autograd.grad(COSTS[name]()(v, target), v)[0]
        loss = native_of(name)(v, target)
        torch.testing.assert_close(COSTS[name]()(v, target), FACTORS[name] * loss)
        native = torch.autograd.grad(loss, v)[0]
        torch.testing.assert_close(ours, FACTORS[name] * native)
    torch.testing.assert_close(COSTS[name]()(v, labels), COSTS[name]()(v, y))


@all_costs
def test_docstrings_name_the_counterpart_the_factor_and_the_neighbour(name):
    """In the class's help, in the function's and where the module lists them."""
    cost = COSTS[name]
    function = getattr(torchbp.costs, f"{name.replace('-', '_')}_cost")
    text = " ".join(cost.__doc__.split())
    native = f"nn.{cost.native.__name__}"
    assert f"Its native counterpart is ``{native}``" in text
    factor = {K / 2: "K/2 times", K: "K times", 1: "the same C"}[FACTORS[name]]
    assert factor in text
    table = torchbp.costs.__doc__
    row = next(line for line in table.splitlines() if f"`{cost.__name__}`" in line)
    assert native in row and factor.removesuffix(" C") in row
    if name in NEIGHBOURS:
        assert NEIGHBOURS[name] in text
        assert re.search(r"`F\.\w+`", function.__doc__)
        assert len(set(re.findall(r"`F\.(\w+)`", function.__doc__))) == 2


def test_lists_of_costs_name_the_counterparts(capsys):
    texts = {"README": (ROOT / "README.md").read_text(encoding="utf-8")}
    with pytest.raises(SystemExit):
        parse("", ["--help"])
    texts["mnist.py"] = capsys.readouterr().out
    assert main(["observe", "--help"]) == 0
    texts["observe"] = capsys.readouterr().out
    for where, text in texts.items():
        for cost in COSTS.values():
            native = f"nn.{cost.native.__name__}"
            assert native in text, f"{where} does not name {native}"


NATIVE = {
    nn.MSELoss: "QuadraticCost",
    F.mse_loss: "QuadraticCost",
    nn.BCELoss: "CrossEntropyCost",
    F.binary_cross_entropy: "CrossEntropyCost",
    nn.BCEWithLogitsLoss: "CrossEntropyCost",
    F.binary_cross_entropy_with_logits: "CrossEntropyCost",
    nn.CrossEntropyLoss: "LogLikelihoodCost",
    F.cross_entropy: "LogLikelihoodCost",
    nn.NLLLoss: "LogLikelihoodCost",
    F.nll_loss: "LogLikelihoodCost",
}
SPLIT = Split(torch.zeros(4, 6, dtype=torch.uint8), torch.arange(4) % 3)
x, y = torch.rand(4, 6), torch.arange(4) % 3


def watch(model, cost, folder):
    pytest.importorskip("tensorboard")
    board = Dashboard(Path(tempfile.mkdtemp(dir=folder)), {}, {}, {})
    try:
        board.watch(model, cost, SPLIT, SPLIT)
    finally:
        board.close()


def train(model, cost, folder):
    engine = AutogradSGD(model, torchbp.QuadraticCost(), 1.0)
    Trainer(model, engine, cost, Splits(SPLIT, SPLIT, SPLIT), 2)


TAKERS = {
    "backprop": lambda model, cost, folder: torchbp.backprop(model, cost, x, y),
    "ExplicitSGD": lambda model, cost, folder: torchbp.ExplicitSGD(model, cost, 1.0),
    "compare": lambda model, cost, folder: torchbp.compare(model, cost, x, y),
    "probe": lambda model, cost, folder: inspection.probe(model, cost, x, y),
    "AutogradSGD": lambda model, cost, folder: AutogradSGD(model, cost, 1.0),
    "Trainer": train,
    "evaluate": lambda model, cost, folder: evaluate(model, cost, SPLIT),
    "Dashboard.watch": watch,
}


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize("native", NATIVE, ids=lambda native: native.__name__)
def test_a_native_loss_is_told_its_counterpart(taker, native, tmp_path):
    model = torchbp.MLP([6, 3])
    text = f"counterpart of {native.__name__} is {NATIVE[native]}"
    given = [native, functools.partial(native)]
    if isinstance(native, type):
        own = type("Own", (native,), {})
        given += [native(), own(), own]
    for cost in given:
        with pytest.raises(TypeError, match=text):
            TAKERS[taker](model, cost, tmp_path)


@pytest.mark.parametrize("taker", TAKERS)
def test_what_is_no_cost(taker, tmp_path):
    take, model = TAKERS[taker], torchbp.MLP([6, 3])
    for other in (nn.HuberLoss(), lambda a, y: (a - y).sum()):
        with pytest.raises(TypeError, match="define_cost makes one"):
            take(model, other, tmp_path)
    with pytest.raises(TypeError, match="expected a cost") as error:
        take(model, None, tmp_path)
    assert "define_cost" not in str(error.value)
    with pytest.raises(TypeError, match="got the class QuadraticCost"):
        take(model, torchbp.QuadraticCost, tmp_path)
    with pytest.raises(ValueError, match="σ would be applied twice"):
        take(model, torchbp.CrossEntropyCost(), tmp_path)


def test_what_the_errors_recommend_is_there():
    natives = [native for native in NATIVE if isinstance(native, type)]
    named = {re.findall(r"is (\w+)", counterpart(native()))[0] for native in natives}
    assert named == {cost.__name__ for cost in COSTS.values()}
