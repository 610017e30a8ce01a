"""`compare` agrees with what is right, and names the equation that is not."""

from __future__ import annotations

import copy
import math

import bounds
import pytest
import torch
import torch.nn.functional as F
from cases import COSTS, LAYERS, LogCosh, SiLU, assert_raises_one_line
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import torchbp
from torchbp import functional
from torchbp.__main__ import main
from torchbp.inspection import sweeps as _sweeps

LOSSES = {"a": torchbp.QuadraticCost(), "z": torchbp.CrossEntropyCost()}


def data(*rows, n_in=4, n_out=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(*rows, n_in, generator=generator, dtype=torch.float64)
    y = torch.rand(*rows, n_out, generator=generator, dtype=torch.float64)
    return x.to(dtype), y.to(dtype)


def network(sizes=(4, 5, 3), dtype=torch.float64, **kwargs):
    torch.manual_seed(0)
    return torchbp.MLP(sizes, dtype=dtype, **kwargs)


def equations(report):
    return [(row.equation, row.layer) for row in report]


# ---------------------------------------------------------------- what is right


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_all_layers_agree(layer, dtype):
    model = network(activation=layer.module, dtype=dtype)
    report = torchbp.compare(model, LOSSES["a"], *data(6, dtype=dtype))
    assert report.ok and not report.faults
    assert report.dtype == dtype
    assert equations(report) == [
        ("A1", 0), ("BP1", 2), ("BP3", 2), ("BP4", 2),
        ("BP2", 1), ("BP3", 1), ("BP4", 1), ("BP2", 1),
    ]  # fmt: skip
    for row in list(report)[1:]:
        off = bounds.network(dtype)
        assert row.native.absolute == 0 or row.native.relative < off
        off += bounds.difference(1e-5)["atol"]
        assert row.numeric is not None and row.numeric.relative < off
        assert row.sampled + row.kinks == min(50, row.entries)


@pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS.keys())
def test_all_costs_agree(cost):
    model = network(output="identity")
    x, y = data(6)
    loss = cost.module()
    assert torchbp.compare(model, loss, x, y / y.sum(-1, keepdim=True)).ok
    assert torchbp.compare(model, loss, x, torch.arange(6) % 3).ok


@pytest.mark.parametrize("name", ["quadratic", "cross_entropy", "log_likelihood"])
def test_costs_as_functions(name):
    cost = getattr(torchbp.costs, f"{name}_cost")
    assert torchbp.compare(network(output="identity"), cost, *data(6)).ok


@pytest.mark.parametrize("rows", [(), (1,), (130,), (2, 3), (2, 1, 3)])
def test_any_rows(rows):
    report = torchbp.compare(network(), LOSSES["a"], *data(*rows))
    assert report.ok
    assert report.rows[1].entries == 3 * math.prod(rows)


def test_equations_are_written_out_and_aligned():
    report = torchbp.compare(network(), LOSSES["a"], *data(6))
    lines = str(report).splitlines()
    assert lines[0] == "layer 1: layers.0, 6 x 4 → 5"
    assert "float64" in lines[2]
    table = lines[lines.index("") + 1 : -2]
    assert [line[:32].rstrip() for line in table] == [
        "equation",
        "A1   C = 1/n Σ_x C_x",
        "BP1  δ^2 = ∇_a C ⊙ σ'(z^2)",
        "BP3  ∂C/∂b^2 = Σ_x δ^2",
        "BP4  ∂C/∂W^2 = Σ_x δ^2 (a^1)ᵀ",
        "BP2  δ^1 = (W^2)ᵀ δ^2 ⊙ σ'(z^1)",
        "BP3  ∂C/∂b^1 = Σ_x δ^1",
        "BP4  ∂C/∂W^1 = Σ_x δ^1 (a^0)ᵀ",
        "BP2  ∂C/∂a^0 = (W^1)ᵀ δ^1",
    ]
    assert len({len(line) for line in table}) == 1
    assert max(map(len, lines)) <= 100
    assert lines[-1] == "8 of 8 equations agree"


def test_a_cost_of_z_has_no_slope_in_bp1():
    report = torchbp.compare(network(output="identity"), LOSSES["z"], *data(6))
    assert report.rows[1].formula == "δ^2 = ∇_z C"


def test_the_numbers_are_those_of_an_independent_computation(monkeypatch):
    """A difference that is put in by hand comes out, in size and place."""
    model = network(sizes=(4, 3))
    x, y = data(6)
    right = functional.gradients

    def wrong(delta, x, W, needs):
        grad_x, grad_W, grad_b = right(delta, x, W, needs)
        if grad_W is not None and grad_W.shape == (3, 4):
            grad_W = grad_W.clone()
            grad_W[1, 2] += 0.5
        return grad_x, grad_W, grad_b

    monkeypatch.setattr(functional, "gradients", wrong)
    (row,) = torchbp.compare(model, LOSSES["a"], x, y).faults
    monkeypatch.undo()
    assert row.equation == "BP4"
    LOSSES["a"](model(x), y).backward()
    largest = model.layers[0].weight.grad.abs().max().item()
    assert row.native.absolute == pytest.approx(0.5)
    assert row.native.relative == pytest.approx(0.5 / largest)
    assert row.numeric.absolute == pytest.approx(
        0.5, **bounds.approx(bounds.difference(1e-5))
    )


def test_the_book_s_network_takes_hundreds_of_passes_not_thousands(monkeypatch):
    """Two for each of 50 entries of seven quantities, not of 31,000."""
    model = network((784, 30, 10), dtype=torch.float32)
    x, _ = data(10, n_in=784, dtype=torch.float32)
    passes, run = [], _sweeps.Twin.run
    monkeypatch.setattr(_sweeps.Twin, "run", lambda twin: passes.append(1) or run(twin))
    report = torchbp.compare(model, LOSSES["a"], x, torch.arange(10))
    assert 500 < len(passes) < 800
    assert report.ok
    weights = [row for row in report if row.equation == "BP4"][1]
    assert (weights.sampled, weights.entries) == (50, 23520)
    assert "50 of 23520" in str(report)


def test_saturation_is_not_held_against_our_costs():
    """Where every output is right by far, native float32 has lost the digits of ∇C."""
    model = nn.Sequential(torchbp.BPLinear(2, 2, dtype=torch.float32))
    with torch.no_grad():
        model[0].weight.copy_(20 * torch.eye(2))
        model[0].bias.zero_()
    report = torchbp.compare(
        model, torchbp.LogLikelihoodCost(), torch.eye(2), torch.arange(2)
    )
    assert report.ok
    assert all(row.overruled for row in report.rows[1:])
    assert "digits lost by native, not by ours: δ^1, ∂C/∂b^1" in str(report)


def test_where_c_hardly_moves_differences_tell_nothing():
    model = network((2, 2, 2))
    with torch.no_grad():
        model.layers[0].bias.fill_(26)
    report = torchbp.compare(model, LOSSES["a"], *data(5, n_in=2, n_out=2))
    assert report.ok
    rows = [row for row in report if row.layer == 1]
    assert all(row.numeric is None and row.sampled == 0 for row in rows)
    assert "—" in rows[0].cells()


def test_a_mistake_at_a_single_weight_of_thousands(monkeypatch):
    model = network((784, 30, 10))
    right = functional.gradients

    def wrong(delta, x, W, needs):
        grad_x, grad_W, grad_b = right(delta, x, W, needs)
        if grad_W is not None and grad_W.shape == (30, 784):
            grad_W = grad_W.clone()
            grad_W[17, 391] *= 1.001
        return grad_x, grad_W, grad_b

    monkeypatch.setattr(functional, "gradients", wrong)
    x, _ = data(10, n_in=784)
    (fault,) = torchbp.compare(model, LOSSES["a"], x, torch.arange(10)).faults
    assert (fault.equation, fault.layer) == ("BP4", 1)
    off = bounds.approx(bounds.difference(1e-5))
    assert fault.numeric.absolute == pytest.approx(fault.native.absolute, **off)


# ---------------------------------------------------------------- larger models


class Skip(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 3)
        self.first = torchbp.BPLinearTanh(4, 4)
        self.second = torchbp.BPLinearSigmoid(4, 4, bias=False)
        self.last = torchbp.BPLinear(4, 3)

    def forward(self, input):
        h = self.conv(input.unsqueeze(-2)).flatten(-2)
        h = h + self.first(h)
        return self.last(h + self.second(self.second(h)))


def test_a_convolution_before_and_a_connection_around():
    torch.manual_seed(0)
    report = torchbp.compare(Skip().double(), LOSSES["z"], *data(6))
    assert report.ok
    assert equations(report)[1:] == [
        ("BP1", 4), ("BP3", 4), ("BP4", 4), ("BP2", 4),
        ("BP2", 3), ("BP4", 3), ("BP2", 3),
        ("BP2", 2), ("BP4", 2), ("BP2", 2),
        ("BP2", 1), ("BP3", 1), ("BP4", 1), ("BP2", 1),
    ]  # fmt: skip
    assert [r.formula for r in report if r.layer == 1] == [
        "δ^1 = ∂C/∂a^1 ⊙ σ'(z^1)",
        "∂C/∂b^1 = Σ_x δ^1",
        "∂C/∂W^1 = Σ_x δ^1 (x^1)ᵀ",
        "∂C/∂x^1 = (W^1)ᵀ δ^1",
    ]


def test_what_comes_before_the_first_layer_of_a_sequence_does_not_matter():
    model = nn.Sequential(
        nn.Unflatten(-1, (1, 4)),
        nn.Conv1d(1, 2, 3),
        nn.Flatten(),
        nn.Sequential(torchbp.BPLinearTanh(4, 5), torchbp.BPLinearSigmoid(5, 3)),
    ).double()
    report = torchbp.compare(model, LOSSES["a"], *data(6))
    assert report.ok
    assert report.rows[4].formula == "δ^1 = (W^2)ᵀ δ^2 ⊙ σ'(z^1)"


@pytest.mark.parametrize("reuse", ["layer", "parameter"])
def test_tied_weights(reuse):
    torch.manual_seed(0)
    first = torchbp.BPLinearTanh(4, 4)
    second = first if reuse == "layer" else torchbp.BPLinearSigmoid(4, 4)
    second.weight = first.weight
    model = nn.Sequential(first, second, torchbp.BPLinearSigmoid(4, 3)).double()
    report = torchbp.compare(model, LOSSES["a"], *data(6))
    assert report.ok and len(report.rows) == 11


def test_batch_norm_parametrizations_frozen_layers_and_unused_ones():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(torchbp.BPLinearTanh(4, 5)),
        nn.BatchNorm1d(5),
        nn.utils.parametrizations.weight_norm(torchbp.BPLinearSigmoid(5, 3)),
    ).double()
    model[2].requires_grad_(False)
    model[1].unused = torchbp.BPLinear(2, 2).double()
    report = torchbp.compare(model, LOSSES["a"], *data(6))
    assert report.ok and len(report.rows) == 9


def test_a_layer_whose_output_is_not_used_has_no_rows():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = torchbp.BPLinear(4, 3), torchbp.BPLinear(4, 3)

        def forward(self, input):
            output = self.used(input)
            self.spare(input)
            return output

    report = torchbp.compare(Spare().double(), LOSSES["a"], *data(6))
    assert report.ok
    assert {row.name for row in report} == {"", "used"}


# ---------------------------------------------------------------- kinks


def test_entries_next_to_a_kink_are_left_out_and_counted():
    model = network((2, 3, 2), activation="relu", output="identity")
    with torch.no_grad():
        model.layers[0].bias.zero_()
        model.layers[0].weight[0] = 0  # z^1 of neuron 0 is 0, on the kink
    report = torchbp.compare(model, LOSSES["a"], *data(5, n_in=2, n_out=2))
    assert report.ok
    rows = {row.formula: row for row in report}
    delta = rows["δ^1 = (W^2)ᵀ δ^2 ⊙ σ'(z^1)"]
    assert (delta.sampled, delta.kinks, delta.entries) == (10, 5, 15)
    assert rows["∂C/∂b^1 = Σ_x δ^1"].kinks == 1
    assert rows["∂C/∂W^1 = Σ_x δ^1 (a^0)ᵀ"].kinks == 2
    assert rows["∂C/∂a^0 = (W^1)ᵀ δ^1"].kinks == 0
    assert "left out, next to a kink of σ: 5 of δ^1" in str(report)


def test_kinks_of_a_layer_of_one_s_own():
    Leaky = torchbp.define_layer(
        "Leaky",
        lambda z: F.leaky_relu(z, 0.1),
        lambda a: torch.where(a > 0, torch.ones_like(a), 0.1 * torch.ones_like(a)),
    )
    layer = Leaky(2, 2).double()
    with torch.no_grad():
        layer.weight[0] = 0
        layer.bias.zero_()
    report = torchbp.compare(layer, LOSSES["a"], *data(5, n_in=2, n_out=2))
    assert report.ok and report.rows[1].kinks == 5


# ---------------------------------------------------------------- what is wrong


class Wrong(functional.LinearSigmoidFunction):
    """The sigmoid layer, spelt out for mistakes."""

    @classmethod
    def backward(cls, ctx, *grads):
        x, W, a = ctx.saved_tensors
        (grad_a,) = grads[0] if isinstance(grads[0], list) else grads
        delta = cls.delta(grad_a, a)
        need_x, need_W, need_b = ctx.needs_input_grad
        return (
            cls.grad_x(delta, W) if need_x else None,
            cls.grad_W(delta, x) if need_W else None,
            cls.grad_b(delta) if need_b else None,
        )

    @staticmethod
    def delta(grad_a, a):
        return grad_a * a * (1 - a)

    @staticmethod
    def grad_x(delta, W):
        return delta @ W

    @staticmethod
    def grad_W(delta, x):  # noqa: N802
        return delta.flatten(0, -2).T @ x.flatten(0, -2)

    @staticmethod
    def grad_b(delta):
        return delta.flatten(0, -2).sum(0)


def mistaken(**mistakes):
    """A layer class whose backward has the mistakes."""
    members = {name: staticmethod(f) for name, f in mistakes.items()}
    function = type("WrongFunction", (Wrong,), members)
    return type("WrongLayer", (torchbp.BPLinearSigmoid,), {"function": function})


# name: the mistakes, and the equations at fault if the layer is last and if it is first
# of two.
MISTAKES = {
    "nothing wrong": ({}, [], []),
    "σ' missing": (
        {"delta": lambda grad_a, a: grad_a},
        [("BP1", 2, "σ'(z^2) is wrong")],
        [("BP2", 1, "σ'(z^1) is wrong")],
    ),
    "σ' of another layer": (
        {"delta": lambda grad_a, a: grad_a * (1 - a * a)},
        [("BP1", 2, "σ'(z^2) is wrong")],
        [("BP2", 1, "σ'(z^1) is wrong")],
    ),
    "b averaged": (
        {"grad_b": lambda delta: delta.mean(0)},
        [("BP3", 2, "the left-hand side is wrong")],
        [("BP3", 1, "the left-hand side is wrong")],
    ),
    "b doubled": (
        {"grad_b": lambda delta: 2 * delta.sum(0)},
        [("BP3", 2, "the left-hand side is wrong")],
        [("BP3", 1, "the left-hand side is wrong")],
    ),
    "b forgotten": (
        {"grad_b": lambda delta: None},
        [("BP3", 2, "the left-hand side is wrong")],
        [("BP3", 1, "the left-hand side is wrong")],
    ),
    "W averaged": (
        {"grad_W": lambda delta, x: delta.T @ x / len(x)},
        [("BP4", 2, "the left-hand side is wrong")],
        [("BP4", 1, "the left-hand side is wrong")],
    ),
    "W off by a millionth": (
        {"grad_W": lambda delta, x: delta.T @ x * (1 + 1e-6)},
        [("BP4", 2, "the left-hand side is wrong")],
        [("BP4", 1, "the left-hand side is wrong")],
    ),
    "W and b averaged": (
        {
            "grad_W": lambda delta, x: delta.T @ x / len(x),
            "grad_b": lambda delta: delta.mean(0),
        },
        [(bp, 2, "the left-hand side is wrong") for bp in ("BP3", "BP4")],
        [(bp, 1, "the left-hand side is wrong") for bp in ("BP3", "BP4")],
    ),
    "W not transposed": (
        {"grad_x": lambda delta, W: delta @ W.T},
        [("BP2", 1, "(W^2)ᵀ δ^2, which layers.1 returns, is wrong")],
        [("BP2", 1, "the left-hand side is wrong")],
    ),
    "nothing for the layer below": (
        {"grad_x": lambda delta, W: None},
        [("BP2", 1, "(W^2)ᵀ δ^2, which layers.1 returns, is wrong")],
        [("BP2", 1, "the left-hand side is wrong")],
    ),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("where", ["last", "first"])
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(name, where, dtype):
    mistakes, at_last, at_first = MISTAKES[name]
    layer = mistaken(**mistakes)
    model = network(
        (4, 4, 4),
        activation="tanh" if where == "last" else layer,
        output=layer if where == "last" else "tanh",
        dtype=dtype,
    )
    report = torchbp.compare(model, LOSSES["a"], *data(6, n_out=4, dtype=dtype))
    expected = at_last if where == "last" else at_first
    found = [(row.equation, row.layer, row.fault) for row in report.faults]
    assert found == expected
    assert report.ok == (not expected)
    lines = str(report).splitlines()
    for equation, layer, fault in expected:
        assert f"{equation} of layers.{layer - 1}: {fault}" in lines
    assert any("WRONG" in line for line in lines) == bool(expected)


def test_what_is_built_on_a_mistake_is_wrong_but_not_at_fault():
    layer = mistaken(delta=lambda grad_a, a: grad_a)
    model = network((4, 4, 4), activation="tanh", output=layer)
    report = torchbp.compare(model, LOSSES["a"], *data(6, n_out=4))
    assert [row.ok for row in report] == [True] + 7 * [False]
    assert len(report.faults) == 1
    assert "1 of 8 equations agree, the others because of:" in str(report)


def test_a_layer_without_bias_and_a_gate_overridden():
    function = type(
        "Gateless",
        (functional.LinearTanhFunction,),
        {"gate": staticmethod(lambda grad_a, s: grad_a)},
    )
    layer = type("Gateless", (torchbp.BPLinearTanh,), {"function": function})
    model = nn.Sequential(layer(4, 3, bias=False)).double()
    report = torchbp.compare(model, LOSSES["a"], *data(6))
    (fault,) = report.faults
    assert (fault.equation, fault.fault) == ("BP1", "σ'(z^1) is wrong")


def test_a_wrong_slope_of_a_layer_of_one_s_own():
    Own = torchbp.define_layer("Own", torch.sin, torch.sin, saves="z")
    report = torchbp.compare(network(activation=Own), LOSSES["a"], *data(6))
    assert {(r.equation, r.layer) for r in report.faults} == {("BP1", 2), ("BP2", 1)}


def test_a_wrong_cost():
    Wrong = torchbp.define_cost(
        "Wrong",
        lambda a, y: (a - y).square().sum(-1),
        lambda a, y: a - y,  # without the 2
    )
    report = torchbp.compare(network(), Wrong(), *data(6))
    (fault,) = report.faults
    assert fault.fault == "∇_a C, which the cost returns, is wrong"
    assert fault.native.relative == pytest.approx(0.5)
    assert fault.numeric.relative == pytest.approx(0.5)


def test_a_cost_that_is_no_mean():
    class Doubled(torchbp.QuadraticCost):
        class function(torchbp.costs.QuadraticFunction):
            @classmethod
            def evaluate(cls, v, y):
                return 2 * cls.per_example(v, y).mean()

    report = torchbp.compare(network(), Doubled(), *data(6))
    assert [row.equation for row in report.faults] == ["A1"]


def test_a_foreign_cost_is_held_to_finite_differences():
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, y):
            ctx.save_for_backward(a, y)
            return (a - y).square().sum()

        @staticmethod
        def backward(ctx, grad_C):
            a, y = ctx.saved_tensors
            return grad_C * (a - y), None

    def right(a, y):
        return (a - y).square().sum()

    def wrong(a, y):
        return Halved.apply(a, y)

    right.takes = wrong.takes = "a"
    assert torchbp.compare(network(), right, *data(6)).ok
    report = torchbp.compare(network(), wrong, *data(6))
    (fault,) = report.faults
    assert (fault.equation, fault.native.ok, fault.numeric.ok) == ("BP1", True, False)
    assert fault.fault == "finite differences give another value"


def test_a_mistake_in_a_larger_model():
    torch.manual_seed(0)
    model = Skip()
    model.second = mistaken(grad_x=lambda delta, W: delta @ W.T)(4, 4)
    report = torchbp.compare(model.double(), LOSSES["z"], *data(6))
    found = {(row.equation, row.name, row.formula) for row in report.faults}
    assert found == {
        ("BP2", "second", "∂C/∂x^3 = (W^3)ᵀ δ^3"),
        ("BP2", "second", "∂C/∂x^2 = (W^2)ᵀ δ^2"),
    }


def test_a_backward_that_gives_nan_is_wrong():
    layer = mistaken(grad_W=lambda delta, x: delta.T @ x * torch.nan)
    report = torchbp.compare(
        network((4, 4, 4), activation=layer), LOSSES["a"], *data(6, n_out=4)
    )
    assert [row.equation for row in report.faults] == ["BP4", "BP4"]


# ---------------------------------------------------------------- what is left alone


def test_the_model_is_left_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(
        torchbp.BPLinearTanh(4, 5), nn.BatchNorm1d(5), torchbp.BPLinearSigmoid(5, 3)
    ).double()
    x, y = data(6)
    LOSSES["a"](model(x), y).backward()
    model[0].requires_grad_(False)
    model[2].eval()
    before = copy.deepcopy(model)
    grads = [p.grad.clone() for p in model.parameters()]
    inputs = x.clone(), y.clone()
    rng = torch.get_rng_state()
    with torchbp.observe(model) as trace:
        report = torchbp.compare(model, LOSSES["a"], x, y)
    assert report.ok and len(trace) == 0
    assert torch.equal(rng, torch.get_rng_state())
    assert not x.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(inputs, (x, y), strict=True))
    for m, n in zip(model.modules(), before.modules(), strict=True):
        assert m.training == n.training
        assert "forward" not in vars(m)
        assert not m._forward_hooks
    for name, t in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], t)
    for p, q, grad in zip(model.parameters(), before.parameters(), grads, strict=True):
        assert p.requires_grad == q.requires_grad
        assert torch.equal(p.grad, grad)


def test_the_same_report_twice_and_under_no_grad():
    model = network((4, 30, 3))
    x, y = data(6)
    report = torchbp.compare(model, LOSSES["a"], x, y)
    with torch.no_grad():
        again = torchbp.compare(model, LOSSES["a"], x, y)
    assert str(again) == str(report)
    with torch.inference_mode():
        x = x + 0
        assert torchbp.compare(model, LOSSES["a"], x, y).ok


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda():
    model = network((4, 30, 3), dtype=torch.float32).cuda()
    x, y = data(6, dtype=torch.float32)
    rng = torch.cuda.get_rng_state()
    assert torchbp.compare(model, LOSSES["a"], x.cuda(), y.cuda()).ok
    assert torch.equal(rng, torch.cuda.get_rng_state())


# ---------------------------------------------------------------- what is refused


def test_wrong_arguments():
    model, (x, y) = network(), data(6)
    cost = LOSSES["a"]
    refused = [
        (TypeError, ["model", "module", "function"], (lambda x: x, cost, x, y)),
        (TypeError, ["cost", "class"], (model, torchbp.QuadraticCost, x, y)),
        (TypeError, ["MSELoss", "takes"], (model, nn.MSELoss(), x, y)),
        (ValueError, ["CrossEntropyCost", "σ"], (model, LOSSES["z"], x, y)),
        (TypeError, ["input", "Tensor", "list"], (model, cost, [1.0], y)),
        (TypeError, ["target", "Tensor", "int"], (model, cost, x, 3)),
        (ValueError, ["input", "one example"], (model, cost, x[:0], y[:0])),
        (ValueError, ["input", "4", "(6, 3)"], (model, cost, x[:, 1:], y)),
        (TypeError, ["float32", "float64"], (model, cost, x.float(), y)),
        (ValueError, ["target", "(6, 3)"], (model, cost, x, y[:, 1:])),
        (ValueError, ["target", "A2"], (model, cost, x, y.clone().requires_grad_())),
        (ValueError, ["0..2", "7"], (model, cost, x, torch.full((6,), 7))),
        (ValueError, ["cost", "finite", "nan"], (model, cost, x * torch.nan, y)),
        (ValueError, ["hand-written"], (torchbp.to_native(model), cost, x, y)),
    ]
    for kind, parts, arguments in refused:
        assert_raises_one_line(kind, parts, torchbp.compare, *arguments)


def test_models_that_cannot_be_compared():
    x, y = data(6)

    def refused(kind, parts, model):
        assert_raises_one_line(
            kind, parts, torchbp.compare, model.double(), LOSSES["a"], x, y
        )

    def sequence(*between):
        torch.manual_seed(0)
        return nn.Sequential(
            torchbp.BPLinearTanh(4, 5), *between, torchbp.BPLinearSigmoid(5, 3)
        )

    refused(ValueError, ["same cost twice", "eval()"], sequence(nn.Dropout()))
    assert torchbp.compare(sequence(nn.Dropout()).double().eval(), LOSSES["a"], x, y).ok

    compiled = sequence()
    compiled.compile(backend="eager")
    refused(ValueError, ["compiled"], compiled)

    pruned = sequence()
    prune.identity(pruned[0], "weight")
    refused(ValueError, ["0", "a hook computes", "prune.remove"], pruned)

    class Residual(torchbp.BPLinearTanh):
        def forward(self, input):
            return input + super().forward(input)

    refused(ValueError, ["1", "forward of its own"], sequence(Residual(5, 5)))

    class Around(nn.Module):
        def __init__(self, around):
            super().__init__()
            self.layers, self.around = sequence(), around

        def forward(self, input):
            return self.around(self.layers, input.requires_grad_())

    def reentrant(f, x):
        return checkpoint(f, x, use_reentrant=True)

    def saved(f, x):
        return checkpoint(f, x, use_reentrant=False)

    refused(ValueError, ["layers.0", "activation checkpointing"], Around(reentrant))
    refused(RuntimeError, ["layers.0", "activation checkpointing"], Around(saved))
    detached = Around(lambda f, x: f(x).detach())
    refused(ValueError, ["layers of ours that C depends on"], detached)


def test_places_where_it_cannot_be_called():
    model, (x, y) = network(), data(6)

    def run(x):
        return torchbp.compare(model, LOSSES["a"], x, y)

    with torch.autocast("cpu"):
        assert_raises_one_line(RuntimeError, ["autocast"], run, x)
    assert_raises_one_line(RuntimeError, ["torch.func"], torch.func.vmap(run), x)


def test_layers_defined_elsewhere_are_known_by_their_own_sigma():
    model = nn.Sequential(SiLU(4, 5), torchbp.BPLinearSigmoid(5, 3)).double()
    assert torchbp.compare(model, LogCosh(), *data(6)).ok


# ---------------------------------------------------------------- the command


def test_observe_from_a_terminal(tmp_path, capsys):
    arguments = ["observe", "--sizes", "3", "4", "2", "--lr", "0.5", "--seed", "2"]
    for cost in ("quadratic", "cross-entropy", "log-likelihood"):
        status = main([*arguments, "--cost", cost, "--data", str(tmp_path)])
        out, err = capsys.readouterr()
        assert status == 0 and err == ""
        assert out.startswith(f"[3, 4, 2], {cost} cost, 5 random examples: C = ")
        assert "\nη = 0.5\n" in out and "\n8 of 8 equations agree\n" in out
        assert out.endswith(
            f"MNIST is not in {tmp_path}: its backward pass is omitted "
            "(--data FOLDER)\n"
        )
        assert max(map(len, out.partition("MNIST")[0].splitlines())) <= 100


def test_observe_looks_at_mnist_if_it_is_there(mnist_root, capsys, monkeypatch):
    assert main(["observe", "--data", str(mnist_root)]) == 0
    out = capsys.readouterr().out
    assert "[784, 30, 10], quadratic cost, 10 MNIST examples: C = " in out
    assert out.count("8 of 8 equations agree") == 2
    monkeypatch.setenv("TORCHBP_DATA", str(mnist_root))
    assert main(["observe"]) == 0
    assert capsys.readouterr().out == out


def test_observe_exits_with_1_where_an_equation_disagrees(
    tmp_path, capsys, monkeypatch
):
    right = functional.gradients
    monkeypatch.setattr(
        functional, "gradients", lambda delta, x, W, needs: right(-delta, x, W, needs)
    )
    assert main(["observe", "--data", str(tmp_path)]) == 1
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--sizes", "3"], ["--sizes", "two or more", "[3]"]),
        (["--sizes", "3", "0"], ["--sizes", "positive", "[3, 0]"]),
        (["--sizes", "3", "a"], ["--sizes", "'a'"]),
        (["--lr", "nan"], ["--lr", "positive", "nan"]),
        (["--seed", "-1"], ["--seed", "-1"]),
        (["--cost", "mse"], ["--cost", "'mse'"]),
    ],
)
def test_observe_says_in_one_line_what_it_cannot_do(arguments, parts, capsys):
    try:
        status = main(["observe", *arguments])
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    assert status == 2 and out == ""
    assert err.count("\n") == 1 and err.startswith("error: ")
    assert all(part in err for part in parts)


def test_observe_with_damaged_data(tmp_path, capsys):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(b"no images")
    assert main(["observe", "--data", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
