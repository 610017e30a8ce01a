"""The algorithm without autograd: the autograd path's numbers, on the same batches."""

from __future__ import annotations

import copy
import itertools
import pickle

import bounds
import pytest
import reference
import torch
from cases import COSTS, LAYERS, Bipolar, SiLU, rand, target_for
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

import torchbp
from torchbp import ExplicitSGD, backprop
from torchbp.explicit.engine import EXAMPLES_AT_ONCE
from torchbp.training import AutogradSGD

pytestmark = pytest.mark.usefixtures("kernel_in_use")
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def relative(a, b):
    """The norm of a - b beside that of b, all tensors together."""
    a, b = (torch.cat([t.detach().flatten().double() for t in ts]) for ts in (a, b))
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


def parameters(model):
    return [p.detach().clone() for p in model.parameters()]


def twins(*args, n=2, seed=0, **kwargs):
    """Equal networks."""
    torch.manual_seed(seed)
    first = torchbp.MLP(*args, **kwargs)
    others = [torchbp.MLP(*args, **kwargs) for _ in range(n - 1)]
    for model in others:
        model.load_state_dict(first.state_dict())
    return [first, *others]


# ---------------------------------------------------------------- backprop


@st.composite
def problems(draw):
    """A network, a cost that fits it, and a batch."""
    sizes = draw(st.lists(st.integers(1, 7), min_size=2, max_size=5))
    name = draw(st.sampled_from(list(COSTS)))
    cost = COSTS[name]
    takes_z = cost.module.takes == "z"
    layers = [layer.module for layer in LAYERS.values()]
    activation = draw(st.sampled_from(layers))
    output = torchbp.BPLinear if takes_z else draw(st.sampled_from(layers))
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    rows = tuple(draw(st.lists(st.integers(1, 4), min_size=0, max_size=3)))
    seed = draw(st.integers(0, 2**20))
    torch.manual_seed(seed)
    model = torchbp.MLP(sizes, activation, output, dtype=dtype)
    x = rand(*rows, sizes[0], seed=seed, dtype=dtype)
    if draw(st.booleans()):
        y = torch.randint(0, sizes[-1], rows)
    else:
        y = target_for(cost, *rows, sizes[-1], seed=seed, dtype=dtype)
    return model, cost.module(), x, y


@settings(max_examples=300, deadline=None)
@given(problems())
def test_backprop_has_autograd_s_cost_and_gradients(problem):
    model, cost, x, y = problem
    C = cost(model(x), y)
    expected = torch.autograd.grad(C, list(model.parameters()))
    value, grads = backprop(model, cost, x, y)
    assert list(grads) == [name for name, _ in model.named_parameters()]
    off = bounds.near(x.dtype, longest=8, layers=5)
    torch.testing.assert_close(value, C.detach(), **off)
    scale = max(float(g.abs().max()) for g in expected)
    off = bounds.near(x.dtype, scale, longest=8, layers=5)
    for grad, by_autograd in zip(grads.values(), expected, strict=True):
        assert grad.shape == by_autograd.shape and grad.dtype == by_autograd.dtype
        torch.testing.assert_close(grad, by_autograd, **off)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("activation", torchbp.nn.ACTIVATIONS)
@pytest.mark.parametrize("name", ["quadratic", "cross-entropy", "log-likelihood"])
def test_backprop_is_the_book_s_algorithm(activation, name):
    """Beside per-example loops over the four equations."""
    output = "identity" if name != "quadratic" else activation
    (model,) = twins([5, 4, 3, 2], activation, output, dtype=torch.float64, n=1)
    cost = COSTS[name]
    x, y = rand(6, 5), target_for(cost, 6, 2)
    layers = reference.layers_of(model)
    oracle = reference.run(layers, name, x.tolist(), y.tolist())
    C, grads = backprop(model, cost.module(), x, y)
    assert C.item() == pytest.approx(oracle.cost, **bounds.approx(bounds.near()))
    for ell in range(3):
        for kind, expected in (("weight", oracle.grad_W), ("bias", oracle.grad_b)):
            actual = grads[f"layers.{ell}.{kind}"]
            expected = torch.tensor(expected[ell], dtype=torch.float64)
            torch.testing.assert_close(actual, expected, **bounds.near())


def test_no_autograd_runs():
    (model,) = twins([4, 3, 2], n=1)
    cost, x, y = torchbp.QuadraticCost(), rand(5, 4).float(), torch.arange(5) % 2
    for mode in (torch.inference_mode, torch.enable_grad):
        with mode():
            C, grads = backprop(model, cost, x, y)
            made = [C, *grads.values(), ExplicitSGD(model, cost, 1.0).step(x, y)]
            made.append(ExplicitSGD(model, cost, 1.0).epoch(x, y, 2))
        assert not any(t.requires_grad for t in made)


def test_frozen_parameters_are_left_out():
    (model,) = twins([4, 3, 2], n=1)
    model.layers[0].weight.requires_grad_(False)
    _, grads = backprop(
        model, torchbp.QuadraticCost(), torch.rand(5, 4), torch.ones(5, 2)
    )
    assert list(grads) == ["layers.0.bias", "layers.1.weight", "layers.1.bias"]


def test_a_layer_that_comes_twice_has_the_sum_of_its_gradients():
    torch.manual_seed(0)
    shared = torchbp.BPLinearTanh(3, 3, bias=False, dtype=torch.float64)
    model = nn.Sequential(shared, nn.Identity(), nn.Sequential(shared))
    x, y = rand(5, 3), rand(5, 3, seed=1)
    cost = torchbp.QuadraticCost()
    _, grads = backprop(model, cost, x, y)
    (expected,) = torch.autograd.grad(cost(model(x), y), [shared.weight])
    torch.testing.assert_close(grads["0.weight"], expected)
    with pytest.raises(ValueError, match="every parameter in one layer only"):
        ExplicitSGD(model, cost, 1.0)


def test_costs_as_functions():
    (model,) = twins([4, 2], n=1)
    x, y = torch.rand(5, 4), torch.rand(5, 2)
    as_function = backprop(model, torchbp.costs.quadratic_cost, x, y)
    as_module = backprop(model, torchbp.QuadraticCost(), x, y)
    assert torch.equal(as_function[0], as_module[0])


def test_autocast_has_no_say():
    (model,) = twins([4, 3, 2], n=1)
    x, y = torch.rand(5, 4), torch.arange(5) % 2
    cost = torchbp.QuadraticCost()
    plain, _ = backprop(model, cost, x, y)
    a, b = twins([4, 3, 2])
    expected = ExplicitSGD(a, cost, 1.0).step(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, grads = backprop(model, cost, x, y)
        step = ExplicitSGD(b, cost, 1.0).step(x, y)
    assert torch.equal(plain, value) and torch.equal(step, expected)
    assert {g.dtype for g in grads.values()} == {torch.float32}
    assert relative(b.parameters(), a.parameters()) == 0


class Own(nn.Module):
    def forward(self, x):
        return x


pruned = torchbp.BPLinear(4, 2)
prune.l1_unstructured(pruned, "weight", 1)


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        (nn.Linear(4, 2), TypeError, "expected an MLP.*got Linear; from_native"),
        (nn.Sequential(nn.Flatten(), torchbp.BPLinear(4, 2)), TypeError, "got Flatten"),
        (nn.Sequential(), TypeError, "at least one hand-written layer, got none"),
        (Own(), TypeError, "got Own"),
        (pruned, TypeError, "parameters are computed"),
        (
            nn.utils.parametrizations.weight_norm(torchbp.BPLinear(4, 2)),
            TypeError,
            "expected an MLP|parameters are computed",
        ),
        (
            nn.Sequential(torchbp.BPLinear(4, 3), torchbp.BPLinear(2, 2)),
            ValueError,
            r"expected last dimension 2.*got shape \(1, 3\)",
        ),
        (
            nn.Sequential(torchbp.BPLinear(4, 3), torchbp.BPLinear(3, 2).double()),
            TypeError,
            "BPLinear behind another layer: weight: expected the input's torch.float32",
        ),
    ],
)
def test_models_of_another_kind_are_refused(model, kind, message):
    x, y = torch.rand(5, 4), torch.rand(5, 2)
    with pytest.raises(kind, match=message):
        backprop(model, torchbp.QuadraticCost(), x, y)
    with pytest.raises(kind, match=message):
        ExplicitSGD(model, torchbp.QuadraticCost(), 1.0)


CNN = nn.Sequential(
    nn.Unflatten(1, (1, 2, 2)),
    nn.Conv2d(1, 2, 1),
    nn.Flatten(),
    torchbp.BPLinear(8, 2),
)
CONVERTS = "from_native(model) converts it"


@pytest.mark.parametrize(
    ("model", "helps"),
    [
        (nn.Linear(4, 2), True),
        (nn.Sequential(nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 2)), True),
        (nn.Sequential(torchbp.BPLinear(4, 3), nn.Sequential(nn.Linear(3, 2))), True),
        (torchbp.to_native(torchbp.MLP([4, 3, 2])), True),
        (CNN, False),
        (torchbp.to_native(CNN), False),
        (nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 2)), False),
        (nn.Sequential(nn.Sigmoid(), nn.Linear(4, 2)), False),
        (nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.Linear(3, 2)), False),
        (Own(), False),
        (nn.Sequential(torchbp.BPLinear(4, 2), Own()), False),
    ],
    ids=lambda value: getattr(type(value), "__name__", value),
)
def test_converting_is_recommended_where_it_helps(model, helps):
    """Else autograd is, which trains whatever there is."""
    x, y, cost = torch.rand(5, 4), torch.rand(5, 2), torchbp.QuadraticCost()
    for refuse in (
        lambda: backprop(model, cost, x, y),
        lambda: ExplicitSGD(model, cost, 1.0),
    ):
        with pytest.raises(TypeError) as error:
            refuse()
        assert (CONVERTS in str(error.value)) == helps
        assert ("autograd: cost(model(x), y).backward()" in str(error.value)) != helps
    if helps:
        ExplicitSGD(torchbp.from_native(model), cost, 1.0).step(x, y)


@pytest.mark.parametrize("model", [None, [torchbp.BPLinear(4, 2)], torchbp.MLP])
def test_what_is_no_model_gets_no_advice(model):
    with pytest.raises(TypeError, match=r"got \w+$"):
        ExplicitSGD(model, torchbp.QuadraticCost(), 1.0)


def test_a_cost_that_does_not_fit_is_refused():
    (model,) = twins([4, 2], n=1)
    x, y = torch.rand(5, 4), torch.rand(5, 2)
    for join in (
        lambda cost: backprop(model, cost, x, y),
        lambda cost: ExplicitSGD(model, cost, 1.0),
    ):
        with pytest.raises(ValueError, match="σ would be applied twice"):
            join(torchbp.CrossEntropyCost())
        with pytest.raises(TypeError, match='takes "a" or "z"'):
            join(nn.MSELoss())
    mine = nn.MSELoss()
    mine.takes = "a"
    with pytest.raises(TypeError, match=r"cost: expected one of torchbp's.*MSELoss"):
        backprop(model, mine, x, y)


@pytest.mark.parametrize(
    ("x", "y", "kind", "message"),
    [
        (torch.rand(5, 3), torch.rand(5, 2), ValueError, "input: expected last dim"),
        (torch.rand(5, 4).double(), torch.rand(5, 2), TypeError, "weight: expected"),
        (torch.rand(5, 4), torch.rand(5, 3), ValueError, r"target: expected shape"),
        (torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 0]), ValueError, r"0\.\.1, got 2"),
        (torch.rand(5, 4), [0, 1], TypeError, "input, target: expected two Tensors"),
        ([1.0], torch.rand(5, 2), TypeError, "input: expected a Tensor, got list"),
        (
            torch.rand(5, 4),
            torch.rand(5, 2, requires_grad=True),
            ValueError,
            "A2: a cost depends",
        ),
    ],
)
def test_batches_that_do_not_fit_are_refused(x, y, kind, message):
    (model,) = twins([4, 2], n=1)
    before = parameters(model)
    with pytest.raises(kind, match=message):
        backprop(model, torchbp.QuadraticCost(), x, y)
    with pytest.raises(kind, match=message):
        ExplicitSGD(model, torchbp.QuadraticCost(), 1.0).step(x, y)
    assert relative(model.parameters(), before) == 0


# ---------------------------------------------------------------- ExplicitSGD


def example_set(n, sizes, cost, *, labels, dtype):
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (n, sizes[0]), generator=generator).to(torch.uint8)
    if labels:
        return images, torch.randint(0, sizes[-1], (n,), generator=generator)
    return images, target_for(cost, n, sizes[-1], dtype=dtype)


ACTIVATIONS = [*(layer.module for layer in LAYERS.values())]
FITTING = [
    (name, output)
    for name, cost in COSTS.items()
    for output in (
        [torchbp.BPLinear]
        if cost.module.takes == "z"
        else [torchbp.BPLinear, torchbp.BPLinearSigmoid, torchbp.BPLinearReLU, SiLU]
    )
]


@pytest.mark.parametrize("labels", [True, False], ids=["labels", "numbers"])
@pytest.mark.parametrize(("name", "output"), FITTING)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=list(LAYERS))
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_steps_and_epochs_are_the_autograd_path_s(
    activation, name, output, labels, decay
):
    """Three equal networks: an epoch, the same batches by step, and by autograd."""
    sizes, n, m, dtype = [7, 5, 4], 23, 5, torch.float64
    cost = COSTS[name]
    a, b, c = twins(sizes, activation, output, dtype=dtype, n=3)
    images, targets = example_set(n, sizes, cost, labels=labels, dtype=dtype)
    x = images.to(dtype) / 255
    rates = (0.1, decay)
    by_epoch, by_step, by_autograd = (
        kind(model, cost.module(), *rates)
        for kind, model in ((ExplicitSGD, a), (ExplicitSGD, b), (AutogradSGD, c))
    )
    for epoch in range(2):
        generator = torch.Generator().manual_seed(epoch)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(epoch))
        mean = by_epoch.epoch(images, targets, m, generator)
        total = 0.0
        for rows in order.split(m):
            C = by_autograd.step(x[rows], targets[rows])
            torch.testing.assert_close(by_step.step(x[rows], targets[rows]), C)
            total += C.item() * len(rows)
        assert mean.item() == pytest.approx(total / n, **bounds.approx(bounds.near()))
        off = bounds.network(longest=8, layers=2, steps=10)
        assert relative(a.parameters(), c.parameters()) < off
        assert relative(b.parameters(), c.parameters()) < off


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=5),
    n=st.integers(1, 60),
    m=st.integers(1, 60),
    activation=st.sampled_from([*torchbp.nn.ACTIVATIONS, Bipolar]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    seed=st.integers(0, 1000),
)
def test_epochs_of_any_shape(sizes, n, m, activation, dtype, seed):
    cost = COSTS["log-likelihood"]
    a, b = twins(sizes, activation, "identity", dtype=dtype, seed=seed)
    images, targets = example_set(n, sizes, cost, labels=True, dtype=dtype)
    x, order = images.to(dtype) / 255, torch.Generator().manual_seed(seed)
    ExplicitSGD(a, cost.module(), 0.05).epoch(images, targets, m, order)
    by_autograd = AutogradSGD(b, cost.module(), 0.05)
    for rows in torch.randperm(n, generator=order.manual_seed(seed)).split(m):
        by_autograd.step(x[rows], targets[rows])
    assert relative(a.parameters(), b.parameters()) < bounds.trained(-(-n // m), dtype)


@pytest.mark.parametrize("name", ["quadratic", "cross-entropy", "log-likelihood"])
@pytest.mark.parametrize("integers", [torch.int64, torch.int32, torch.uint8])
def test_the_costs_of_every_batch_in_order(monkeypatch, name, integers):
    """Several gathers a yield, several yields, a ragged end; integers of any kind."""
    monkeypatch.setattr("torchbp.explicit.engine.EXAMPLES_AT_ONCE", 12)
    monkeypatch.setattr("torchbp.explicit.engine.GATHERED_PER_YIELD", 2)
    cost = COSTS[name].module()
    output = "identity" if cost.takes == "z" else "sigmoid"
    a, b = twins([5, 4, 3], output=output, dtype=torch.float64)
    images, y = example_set(46, [5, 3], None, labels=True, dtype=torch.float64)
    order = torch.randperm(46, generator=torch.Generator().manual_seed(3))
    engine, by_autograd = ExplicitSGD(a, cost, 0.3), AutogradSGD(b, cost, 0.3)
    yielded = list(engine.steps(images, y.to(integers), order, 4))
    assert [len(C) for C in yielded] == [6, 5, 1]
    expected = [
        by_autograd.step(images[rows].double() / 255, y[rows])
        for rows in order.split(4)
    ]
    torch.testing.assert_close(torch.cat(yielded), torch.stack(expected))


def test_a_cost_that_was_returned_stays_what_it_is():
    (model,) = twins([4, 3, 2], n=1)
    engine = ExplicitSGD(model, torchbp.QuadraticCost(), 1.0)
    x, y = torch.rand(5, 4), torch.rand(5, 2)
    first = engine.step(x, y)
    value = first.item()
    engine.step(1 - x, y)
    assert first.item() == value and not first.is_inference()
    assert not engine.epoch(x, y, 2).is_inference()


def test_the_trainer_s_generator_gives_the_trainer_s_batches():
    from tests.training.test_trainer import DATA, make_trainer, weights

    by_autograd = make_trainer(lr=1.0, weight_decay=0.01)
    (model,) = twins([6, 4, 3], n=1)
    engine = ExplicitSGD(model, torchbp.QuadraticCost(), 1.0, 0.01)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        by_autograd.run_epoch()
        engine.epoch(*DATA.train, 5, generator)
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(flat, weights(by_autograd))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    a, b = twins([20, 8, 4], dtype=dtype)
    images, targets = example_set(40, [20, 8, 4], None, labels=True, dtype=dtype)
    cost = torchbp.QuadraticCost()
    x = images.to(dtype) / 255
    engine = ExplicitSGD(a, cost, 0.5)
    by_autograd = AutogradSGD(b, cost, 0.5)
    C = engine.epoch(images, targets, 10, torch.Generator().manual_seed(0))
    for rows in torch.randperm(40, generator=torch.Generator().manual_seed(0)).split(
        10
    ):
        by_autograd.step(x[rows], targets[rows])
    assert C.dtype == dtype
    assert relative(a.parameters(), b.parameters()) < bounds.trained(4, dtype)


def test_saturated_outputs_keep_their_small_errors():
    """σ(z) - y and softmax(z) - y are 0 in float32 where the true error is -e^-20."""
    for cost in (torchbp.CrossEntropyCost(), torchbp.LogLikelihoodCost()):
        model = torchbp.MLP([1, 2], output="identity")
        with torch.no_grad():
            model.layers[0].weight.copy_(torch.tensor([[10.0], [-10.0]]))
            model.layers[0].bias.copy_(torch.tensor([10.0, -10.0]))
        _, grads = backprop(model, cost, torch.ones(1, 1), torch.tensor([0]))
        before = parameters(model)
        lr = 1 / max(float(g.abs().max()) for g in grads.values())  # finite: not 0
        ExplicitSGD(model, cost, lr).epoch(
            torch.full((1, 1), 255, dtype=torch.uint8), torch.tensor([0]), 1
        )
        for p, q, g in zip(model.parameters(), before, grads.values(), strict=True):
            assert not torch.equal(p, q)
            torch.testing.assert_close(p.detach(), q - lr * g)


def test_layers_without_bias_and_frozen_parameters():
    def network():
        torch.manual_seed(0)
        model = nn.Sequential(
            torchbp.BPLinearSigmoid(5, 4, bias=False),
            torchbp.BPLinearTanh(4, 4),
            torchbp.BPLinearReLU(4, 4),
            torchbp.BPLinear(4, 3),
        ).double()
        model[1].weight.requires_grad_(False)
        model[2].bias.requires_grad_(False)
        return model

    images, y = example_set(20, [5, 3], None, labels=True, dtype=torch.float64)
    x, cost = images.double() / 255, torchbp.LogLikelihoodCost()
    for decay in (0.0, 0.1):
        a, b, c = network(), network(), network()
        by_step = ExplicitSGD(b, cost, 0.5, decay)
        by_autograd = AutogradSGD(c, cost, 0.5, decay)
        ExplicitSGD(a, cost, 0.5, decay).epoch(
            images, y, 6, torch.Generator().manual_seed(0)
        )
        order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
        for rows in order.split(6):
            by_step.step(x[rows], y[rows])
            by_autograd.step(x[rows], y[rows])
        for p, q, r, start in zip(
            *(m.parameters() for m in (a, b, c, network())), strict=True
        ):
            torch.testing.assert_close(p, r, **bounds.near())
            torch.testing.assert_close(q, r, **bounds.near())
            assert torch.equal(p, start) != p.requires_grad


def test_a_step_takes_any_leading_dimensions():
    a, b = twins([4, 3, 2])
    x, y = torch.rand(2, 3, 5, 4), torch.rand(2, 3, 5, 2)
    cost = torchbp.QuadraticCost()
    C = ExplicitSGD(a, cost, 1.0).step(x, y)
    torch.testing.assert_close(C, AutogradSGD(b, cost, 1.0).step(x, y))
    torch.testing.assert_close(parameters(a), parameters(b))


def test_parameters_stay_the_objects_they_were():
    (model,) = twins([5, 4, 3], n=1)
    with torch.no_grad():  # laid out the other way round
        W = model.layers[0].weight
        W.data = W.t().contiguous().t()
    before = {
        name: (
            id(p),
            p.data_ptr(),
            p.stride(),
            p.untyped_storage().nbytes(),
            p._version,
        )
        for name, p in model.named_parameters()
    }
    engine = ExplicitSGD(model, torchbp.QuadraticCost(), 1.0)
    images, y = example_set(20, [5, 3], None, labels=True, dtype=torch.float32)
    engine.epoch(images, y, 6)
    engine.step(images[:5] / 255, y[:5])
    for name, p in model.named_parameters():
        *same, version = before[name]
        now = [id(p), p.data_ptr(), p.stride(), p.untyped_storage().nbytes()]
        assert now == same
        assert p._version > version  # autograd knows that they have changed
        assert p.requires_grad and p.is_leaf and not p.is_inference()
        assert p.grad is None


def test_a_graph_from_before_a_step_cannot_be_used_after_it():
    for take in (
        lambda engine, x, y: engine.step(x, y),
        lambda engine, x, y: engine.epoch(x, y, 5),
    ):
        (model,) = twins([4, 3, 2], n=1)
        x, y = torch.rand(5, 4), torch.rand(5, 2)
        C = torchbp.QuadraticCost()(model(x.requires_grad_()), y)
        take(ExplicitSGD(model, torchbp.QuadraticCost(), 1.0), x.detach(), y)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            C.backward()


def test_switching_engines_goes_on_from_the_model():
    a, b = twins([5, 4, 3])
    cost = torchbp.QuadraticCost()
    images, y = example_set(20, [5, 3], None, labels=True, dtype=torch.float32)
    x = images / 255
    explicit, autograd = ExplicitSGD(a, cost, 1.0), AutogradSGD(a, cost, 1.0)
    alone = AutogradSGD(b, cost, 1.0)
    for _ in range(2):
        order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
        explicit.epoch(images, y, 6, torch.Generator().manual_seed(0))
        for rows in order.split(6):
            alone.step(x[rows], y[rows])
        autograd.step(x[:5], y[:5])
        alone.step(x[:5], y[:5])
        explicit.step(x[5:], y[5:])
        alone.step(x[5:], y[5:])
    torch.testing.assert_close(parameters(a), parameters(b))


def test_what_changes_between_calls_counts():
    """The rate, the parameters' values, dtype and memory, and what is frozen."""
    a, b = twins([5, 4, 3])
    cost = torchbp.QuadraticCost()
    images, y = example_set(10, [5, 3], None, labels=True, dtype=torch.float32)
    engine = ExplicitSGD(a, cost, 1.0)

    def compare(lr, dtype=torch.float32, decay=0.0):
        x = images.to(dtype) / 255
        engine.lr, engine.weight_decay = lr, decay
        by_autograd = AutogradSGD(b, cost, lr, decay)
        engine.step(x, y)
        by_autograd.step(x, y)
        engine.epoch(images, y, 10)
        by_autograd.step(x, y)
        # Tighter than float32 can be, once it is float64.
        off = bounds.near(dtype, longest=10, layers=2, steps=2)
        torch.testing.assert_close(parameters(a), parameters(b), **off)

    compare(1.0)
    compare(0.25)
    compare(0.25, decay=0.5)
    for model in (a, b):
        with torch.no_grad():
            model.layers[0].weight.data = torch.ones(4, 5)
    compare(0.25)
    for model in (a, b):
        model.layers[0].bias.data = torch.ones(4)
        model.layers[1].weight.data = torch.arange(12.0).view(4, 3).t()
    compare(0.25)
    for model in (a, b):  # the same memory, read the other way
        model.layers[1].weight.data = model.layers[1].weight.data.t().reshape(3, 4)
    compare(0.25)
    b.load_state_dict(a.state_dict())  # equal to the last bit of float32
    for model in (a, b):
        model.double()
    compare(0.5, torch.float64)
    for model in (a, b):
        model.layers[0].requires_grad_(False)
    compare(0.5, torch.float64)
    with pytest.raises(ValueError, match="lr: expected a number >= 0, got -1"):
        engine.lr = -1.0
    assert engine.lr == 0.5


def test_an_epoch_that_raises_leaves_what_it_had_trained():
    """σ fails in the third batch; two were trained on."""
    calls = 0

    def sigma(z):
        nonlocal calls
        calls += 1
        if failing and calls == 3:
            raise KeyboardInterrupt
        return torch.sigmoid(z)

    failing = False
    Failing = torchbp.define_layer("Failing", sigma, lambda a: a * (1 - a))
    failing, calls = True, 0
    a, b = twins([5, 4, 3])
    (c,) = twins([5, 4, 3], Failing, n=1)
    c.load_state_dict(a.state_dict())
    images, y = example_set(30, [5, 3], None, labels=True, dtype=torch.float32)
    cost = torchbp.QuadraticCost()
    model = nn.Sequential(c.layers[0], a.layers[1])
    with pytest.raises(KeyboardInterrupt):
        ExplicitSGD(model, cost, 1.0).epoch(
            images, y, 5, torch.Generator().manual_seed(0)
        )
    assert calls == 3
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    by_autograd = AutogradSGD(b, cost, 1.0)
    for rows in order.split(5)[:2]:
        by_autograd.step(images[rows] / 255, y[rows])
    torch.testing.assert_close(parameters(model), parameters(b))


def test_a_closed_iterator_leaves_what_it_had_trained(monkeypatch):
    monkeypatch.setattr("torchbp.explicit.engine.EXAMPLES_AT_ONCE", 5)
    monkeypatch.setattr("torchbp.explicit.engine.GATHERED_PER_YIELD", 1)
    a, b = twins([5, 4, 3])
    images, y = example_set(30, [5, 3], None, labels=True, dtype=torch.float32)
    cost = torchbp.QuadraticCost()
    engine, by_autograd = ExplicitSGD(a, cost, 1.0), AutogradSGD(b, cost, 1.0)
    order = torch.arange(30)
    steps = engine.steps(images, y, order, 5)
    assert len(next(steps)) == 1
    for call in (
        lambda: engine.step(images[:5] / 255, y[:5]),
        lambda: engine.epoch(images, y, 5),
    ):
        with pytest.raises(RuntimeError, match="exhausted or closed first"):
            call()
    next(steps)
    steps.close()
    for rows in order.split(5)[:2]:
        by_autograd.step(images[rows] / 255, y[rows])
    torch.testing.assert_close(parameters(a), parameters(b))
    engine.step(images[:5] / 255, y[:5])


def test_a_sigma_that_uses_autograd_itself():
    def slope(z):
        with torch.enable_grad():  # inference mode would have no part of it
            z = z.detach().requires_grad_()
            return torch.autograd.grad(torch.sin(z).sum(), z)[0]

    Sine = torchbp.define_layer("Sine", torch.sin, slope, saves="z")
    a, b = twins([5, 4, 3], Sine)
    images, y = example_set(12, [5, 3], None, labels=True, dtype=torch.float32)
    cost = torchbp.QuadraticCost()
    ExplicitSGD(a, cost, 0.1).epoch(images, y, 12)
    AutogradSGD(b, cost, 0.1).step(images / 255, y)
    torch.testing.assert_close(parameters(a), parameters(b))
    ExplicitSGD(a, cost, 0.1).step(images / 255, y)


def test_no_gradient_is_made_and_hardly_anything_allocated():
    (model,) = twins([300, 200, 10], n=1)
    images, y = example_set(1000, [300, 10], None, labels=True, dtype=torch.float32)
    engine = ExplicitSGD(model, torchbp.QuadraticCost(), 0.1)
    order = torch.arange(1000)
    list(engine.steps(images, y, order, 10))
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        list(engine.steps(images, y, order, 10))
    events = profile.profiler.kineto_results.events()
    sizes = [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0]
    # 100 steps; a gradient of the first layer alone would be 240 kB each time.
    assert max(sizes, default=0) < 100_000
    assert len(sizes) < 100


def test_a_network_that_is_narrowed_in_place():
    """The same memory and strides, fewer neurons."""
    a, b = twins([5, 4, 3])
    cost, x, y = torchbp.QuadraticCost(), torch.rand(6, 5), torch.rand(6, 3)
    engine = ExplicitSGD(a, cost, 0.5)
    engine.step(x, y)
    AutogradSGD(b, cost, 0.5).step(x, y)
    for model in (a, b):
        first, second = model.layers
        first.weight.data, first.bias.data = first.weight.data[:3], first.bias.data[:3]
        second.weight.data = second.weight.data[:, :3]
    by_autograd = AutogradSGD(b, cost, 0.5)
    for take in (engine.step, lambda x, y: engine.epoch(x, y, 6)):
        torch.testing.assert_close(take(x, y), by_autograd.step(x, y))
        torch.testing.assert_close(parameters(a), parameters(b))


def test_parameters_that_share_memory_are_refused():
    model = nn.Sequential(torchbp.BPLinear(3, 3), torchbp.BPLinear(3, 3))
    cost, x, y = torchbp.QuadraticCost(), torch.rand(6, 3), torch.rand(6, 3)
    engine = ExplicitSGD(model, cost, 0.5)
    engine.step(x, y)
    engine.epoch(x, y, 2)
    model[1].weight.data = model[0].weight.data
    before = parameters(model)
    for call in (lambda: engine.step(x, y), lambda: engine.epoch(x, y, 2)):
        with pytest.raises(ValueError, match=r"memory of its own, got one of shape"):
            call()
    model[1].weight.data = torch.zeros(1, 3).expand(3, 3)
    with pytest.raises(ValueError, match=r"memory of its own"):
        ExplicitSGD(model, cost, 0.5)
    assert relative(model[0].parameters(), before[:2]) == 0


def test_an_interrupt_while_the_calls_are_made_leaves_no_old_rate(monkeypatch):
    from torchbp.explicit.steps import Steps

    a, b = twins([5, 4, 3])
    cost, x, y = torchbp.QuadraticCost(), torch.rand(6, 5), torch.rand(6, 3)
    engine = ExplicitSGD(a, cost, 1.0, kernel="torch")
    engine.step(x, y)
    AutogradSGD(b, cost, 1.0).step(x, y)
    engine.lr = 1e-3
    with monkeypatch.context() as patch:

        def interrupted(self, k):
            raise KeyboardInterrupt

        patch.setattr(Steps, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.step(x, y)
    engine.step(x, y)
    AutogradSGD(b, cost, 1e-3).step(x, y)
    torch.testing.assert_close(parameters(a), parameters(b))


def test_the_mean_cost_of_an_epoch_when_a_cost_is_infinite():
    (model,) = twins([2, 1], "identity", n=1)
    nn.init.constant_(model.layers[0].weight, 1e20)  # its square is the cost
    engine = ExplicitSGD(model, torchbp.QuadraticCost(), 0.0)
    x, y = torch.ones(5, 2), torch.zeros(5, 1)
    assert engine.epoch(x, y, 2).item() == float("inf")
    assert engine.epoch(x, y, 5).item() == float("inf")


@pytest.mark.parametrize("batch_size", [9, 10, 10**15, 2**63, 10**20])
def test_a_batch_size_beyond_the_set_is_the_set(batch_size):
    a, b = twins([5, 3])
    x, y = torch.rand(9, 5), torch.rand(9, 3)
    cost = torchbp.QuadraticCost()
    C = ExplicitSGD(a, cost, 0.5).epoch(x, y, batch_size)
    torch.testing.assert_close(C, AutogradSGD(b, cost, 0.5).step(x, y))


def test_a_cost_in_float16_is_a_mean_that_does_not_overflow():
    a, b = twins([20, 10], dtype=torch.float16)
    x = torch.rand(40_000, 20).half()
    y = torch.arange(40_000) % 10
    cost = torchbp.QuadraticCost()
    expected = cost(b(x), y).item()
    engine = ExplicitSGD(a, cost, 0.0)
    off = bounds.approx(bounds.close(bounds.OPERATIONS, torch.float16))
    assert engine.step(x, y).item() == pytest.approx(expected, **off)
    assert engine.epoch(x, y, 40_000).item() == pytest.approx(expected, **off)


def test_a_cost_that_computes_in_a_higher_precision():
    Wide = torchbp.define_cost(
        "Wide",
        lambda a, y: (a.double() - y).square().sum(-1),
        lambda a, y: 2 * (a.double() - y),
    )
    a, b = twins([5, 3], "identity")
    x, y = torch.rand(6, 5), torch.rand(6, 3)
    _, grads = backprop(a, Wide(), x, y)
    expected = torch.autograd.grad(Wide()(a(x), y), list(a.parameters()))
    torch.testing.assert_close(tuple(grads.values()), expected)
    ExplicitSGD(a, Wide(), 0.1).step(x, y)
    AutogradSGD(b, Wide(), 0.1).step(x, y)
    torch.testing.assert_close(parameters(a), parameters(b))


def test_copies_and_pickles_go_on():
    (a,) = twins([5, 3], n=1)
    x, y = torch.rand(6, 5), torch.rand(6, 3)
    engine = ExplicitSGD(a, torchbp.QuadraticCost(), 0.5)
    engine.epoch(x, y, 2)
    others = [copy.deepcopy(engine), pickle.loads(pickle.dumps(engine))]
    engine.step(x, y)
    for other in others:
        assert relative(other.model.parameters(), a.parameters()) > 0
        other.step(x, y)
        torch.testing.assert_close(parameters(other.model), parameters(a))


def test_rates_that_are_loaded_are_checked_first():
    (a,) = twins([5, 3], n=1)
    engine = ExplicitSGD(a, torchbp.QuadraticCost(), 0.5, 0.1)
    with pytest.raises(ValueError, match="weight_decay: expected a number >= 0"):
        engine.load_state_dict({"lr": 2.0, "weight_decay": -1.0})
    assert (engine.lr, engine.weight_decay) == (0.5, 0.1)
    engine.load_state_dict({"lr": 2.0, "weight_decay": 0.0})
    assert engine.state_dict() == {"lr": 2.0, "weight_decay": 0.0}


def test_frozen_values_are_not_written_at_all():
    (model,) = twins([5, 4, 3], n=1)
    model.layers[0].requires_grad_(False)
    versions = [p._version for p in model.layers[0].parameters()]
    images, y = example_set(10, [5, 3], None, labels=True, dtype=torch.float32)
    engine = ExplicitSGD(model, torchbp.QuadraticCost(), 1.0, 0.1)
    engine.epoch(images, y, 3)
    engine.step(images / 255, y)
    assert [p._version for p in model.layers[0].parameters()] == versions


def test_a_layer_that_is_pruned_later_is_refused():
    (model,) = twins([5, 4, 3], n=1)
    engine = ExplicitSGD(model, torchbp.QuadraticCost(), 1.0)
    x, y = torch.rand(6, 5), torch.rand(6, 3)
    engine.step(x, y)
    prune.l1_unstructured(model.layers[1], "weight", 2)
    for call in (lambda: engine.step(x, y), lambda: engine.epoch(x, y, 2)):
        with pytest.raises(TypeError, match="whose parameters are computed"):
            call()


class Largest(TorchDispatchMode):
    """The most numbers of any tensor that is returned by an operation."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() // t.itemsize for t in tensors(result)]
        self.numbers = max(self.numbers, *sizes, 0)
        return result


def tensors(result):
    parts = result if isinstance(result, (list, tuple)) else [result]
    return [t for t in parts if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("integers", [True, False])
def test_no_buffer_has_outputs_times_outputs(name, integers):
    """250 rows of K at the most, whatever K, for labels as for numbers."""
    K, cost = 700, COSTS[name]
    output = "identity" if cost.module.takes == "z" else None
    (model,) = twins([5, 3, K], output=output, n=1)
    x, y = torch.rand(12, 5), target_for(cost, 12, K, dtype=torch.float32)
    y = y.argmax(-1) if integers else y
    with Largest() as largest:
        engine = ExplicitSGD(model, cost.module(), 0.1)
        engine.step(x, y)
        engine.epoch(x, y, 5)
        for _ in engine.steps(x, y, torch.randperm(12), 2):
            pass
    assert K < largest.numbers <= EXAMPLES_AT_ONCE * K < K * K


def test_buffers_of_few_batch_sizes_are_kept():
    (model,) = twins([5, 4, 3], n=1)
    engine = ExplicitSGD(model, torchbp.QuadraticCost(), 0.1)
    for m in range(1, 50):
        engine.step(torch.rand(m, 5), torch.rand(m, 3))
    assert len(engine._cache) <= 8


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size: expected at least 1, got 0"),
        ({"batch_size": 2.0}, TypeError, "batch_size: expected an integer, got 2.0"),
        ({"images": torch.rand(9, 5).double()}, TypeError, "images: expected uint8 or"),
        ({"images": torch.rand(9, 4)}, ValueError, r"images: expected shape \(n, 5\)"),
        ({"images": torch.rand(0, 5)}, ValueError, r"with n >= 1, got \(0, 5\)"),
        ({"images": [1]}, TypeError, "expected two Tensors, got list"),
        ({"targets": torch.rand(8, 3)}, ValueError, r"target: expected shape \(9, 3\)"),
        ({"targets": torch.full((9,), 3)}, ValueError, r"labels in 0\.\.2, got 3"),
        ({"targets": torch.full((9,), -1)}, ValueError, r"labels in 0\.\.2, got -1"),
        ({"targets": torch.rand(9, 3).double()}, TypeError, "target: expected the inp"),
    ],
)
def test_sets_that_do_not_fit_are_refused(change, kind, message):
    (model,) = twins([5, 4, 3], n=1)
    before = parameters(model)
    engine = ExplicitSGD(model, torchbp.QuadraticCost(), 0.1)
    given = {"images": torch.rand(9, 5), "targets": torch.rand(9, 3), "batch_size": 2}
    with pytest.raises(kind, match=message):
        engine.epoch(**{**given, **change})
    assert relative(model.parameters(), before) == 0


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (torch.tensor([0, 9]), r"indices in 0\.\.8, got 9"),
        (torch.tensor([-1, 2]), r"indices in 0\.\.8, got -1"),
        (torch.tensor([[0, 1]]), "expected int64 indices"),
        (torch.tensor([0.0]), "expected int64 indices"),
        (torch.tensor([], dtype=torch.int64), "k >= 1"),
    ],
)
def test_orders_that_are_none_are_refused(order, message):
    (model,) = twins([5, 3], n=1)
    engine = ExplicitSGD(model, torchbp.QuadraticCost(), 0.1)
    with pytest.raises(ValueError, match=message):
        engine.steps(torch.rand(9, 5), torch.rand(9, 3), order, 2)


def test_an_empty_batch_is_refused():
    (model,) = twins([5, 3], n=1)
    engine = ExplicitSGD(model, torchbp.QuadraticCost(), 0.1)
    with pytest.raises(ValueError, match="input: expected an example"):
        engine.step(torch.rand(0, 5), torch.rand(0, 3))


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_bad_rates_are_refused(name, value):
    (model,) = twins([5, 3], n=1)
    rates = {"lr": 1.0, name: value}
    with pytest.raises(ValueError, match=f"{name}: expected a number >= 0"):
        ExplicitSGD(model, torchbp.QuadraticCost(), **rates)


# ---------------------------------------------------------------- how exact it is


@pytest.mark.parametrize("m", [2, 10, 97, 384, 385, 1024, 10_000])
@pytest.mark.parametrize("n_in", [20, 784])
def test_a_step_rounds_once_at_the_size_of_the_parameters(m, n_in):
    """Beside numbers of size 1 the terms of a sum lose their digits if they are added
    one by one, or block by block as BLAS would: each addition rounds."""
    for seed, bias in ((0, True), (1, False)):
        torch.manual_seed(seed)
        model = nn.Sequential(torchbp.BPLinear(n_in, 6, bias))
        x, y, lr = torch.rand(m, n_in), torch.rand(m, 6), 1e-3
        W, *b = (p.detach().clone() for p in model.parameters())
        delta = nn.functional.linear(x, W, *b) - y
        ExplicitSGD(model, torchbp.QuadraticCost(), lr).step(x, y)
        _, _, *off = bounds.layer(LAYERS["linear"], delta / m, x, W, *b)
        # z is computed twice here, by the engine and for δ.
        changes = [delta.double().t() @ x.double() / m, delta.double().mean(0)]
        for p, q, change, bound in zip(
            model.parameters(), (W, *b), changes, off, strict=False
        ):
            exact = q.double() - lr * change
            once = bounds.units(0.5, torch.float32, exact.abs())
            bounds.assert_within(p, exact, once + lr * bound)


@pytest.mark.parametrize("m", [10, 384, 1024, 10_000])
@pytest.mark.parametrize(("lr", "decay"), [(1e-3, 0.0), (0.1, 1e-2)])
def test_sums_over_many_rows_do_not_stagnate(m, lr, decay):
    """The changes of W and of b are as exact as native's."""
    n_in, n_out = 20, 6
    errors = {(side, kind): [] for side in ("ours", "native") for kind in "Wb"}
    for seed, take in itertools.product(range(5), ("step", "epoch")):
        torch.manual_seed(seed)
        x, y = torch.rand(m, n_in), torch.rand(m, n_out)
        models = twins([n_in, n_out], n=3, seed=seed)
        double = models[2].double()
        exact = AutogradSGD(double, torchbp.QuadraticCost(), lr, decay)
        engine = ExplicitSGD(models[0], torchbp.QuadraticCost(), lr, decay)
        native = AutogradSGD(models[1], torchbp.QuadraticCost(), lr, decay)
        for _ in range(20):
            engine.step(x, y) if take == "step" else engine.epoch(x, y, m)
            native.step(x, y)
            exact.step(x.double(), y.double())

        for side, model in zip(("ours", "native"), models, strict=False):
            for i, kind in enumerate("Wb"):
                off = relative([parameters(model)[i]], [parameters(double)[i]])
                errors[side, kind].append(off)
    for kind in "Wb":
        bounds.assert_as_exact(errors["ours", kind], errors["native", kind])


@pytest.fixture(scope="module")
def mnist(mnist_root):
    from torchbp import data

    return data.load("mnist", mnist_root).train


def native_steps(model, lr, images, labels, rows, dtype):
    """The control: torch's own layers, cost and optimizer; nothing of ours."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for batch in rows:
        x = images[batch].to(dtype) / 255
        y = nn.functional.one_hot(labels[batch], 10).to(dtype)
        optimizer.zero_grad()
        C = nn.functional.mse_loss(model(x), y, reduction="sum") / (2 * len(batch))
        C.backward()
        optimizer.step()


def test_500_steps_are_as_exact_as_native_ones(mnist):
    """At lr 3, beside a float64 run, over 8 seeds; weights and biases by themselves."""
    images, labels = mnist
    errors = {"ours": [], "native": []}
    for seed in range(8):
        ours, start = twins([784, 30, 10], seed=seed)
        native, exact = (
            torchbp.to_native(torchbp.MLP([784, 30, 10])) for _ in range(2)
        )
        for model in (native, exact):
            values = nn.utils.parameters_to_vector(start.parameters())
            nn.utils.vector_to_parameters(values, model.parameters())
        exact.double()
        order = torch.randperm(50_000, generator=torch.Generator().manual_seed(seed))
        order = order[:5000]
        rows = order.split(10)
        list(
            ExplicitSGD(ours, torchbp.QuadraticCost(), 3.0).steps(
                images, labels, order, 10
            )
        )
        native_steps(native, 3.0, images, labels, rows, torch.float32)
        native_steps(exact, 3.0, images, labels, rows, torch.float64)
        truth = parameters(exact)
        for name, model in (("ours", ours), ("native", native)):
            values = parameters(model)
            errors[name].append(
                [
                    relative([values[i] for i in kind], [truth[i] for i in kind])
                    for kind in ((0, 2), (1, 3))
                ]
            )
    for kind in (0, 1):
        bounds.assert_as_exact(
            [e[kind] for e in errors["ours"]], [e[kind] for e in errors["native"]]
        )


def test_an_epoch_at_a_small_rate_ends_where_native_ends(mnist):
    images, labels = mnist
    ours, start = twins([784, 30, 10])
    native = torchbp.to_native(start)
    order = torch.randperm(50_000, generator=torch.Generator().manual_seed(0))
    engine = ExplicitSGD(ours, torchbp.QuadraticCost(), 0.1)
    engine.epoch(images, labels, 10, torch.Generator().manual_seed(0))
    native_steps(native, 0.1, images, labels, order.split(10), torch.float32)
    for p, q in zip(ours.parameters(), native.parameters(), strict=True):
        assert relative([p], [q]) < bounds.trained(5000)


# ---------------------------------------------------------------- CUDA


@cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", list(COSTS))
def test_cuda_takes_the_cpu_s_steps(name, dtype):
    cost = COSTS[name]
    output = "identity" if cost.module.takes == "z" else "sigmoid"
    errors = {"cpu": [], "cuda": []}
    for seed in range(3):
        a, b, exact = twins([20, 8, 4], output=output, dtype=dtype, n=3, seed=seed)
        images, targets = example_set(203, [20, 4], cost, labels=True, dtype=dtype)
        places = {"cpu": a, "cuda": b.cuda(), "exact": exact.double()}
        costs = {}
        for place, model in places.items():
            engine = ExplicitSGD(model, cost.module(), 0.5)
            device = "cuda" if place == "cuda" else "cpu"
            for epoch in range(3):
                costs[place] = engine.epoch(
                    images.to(device),
                    targets.to(device),
                    10,
                    torch.Generator().manual_seed(epoch),
                )
            if place == "cuda":
                graphs = [steps.graph for steps in engine._cache.values()]
                assert any(graph is not None for graph in graphs)
        for place, found in errors.items():
            ends = [p.cpu() for p in places[place].parameters()]
            found.append(relative(ends, exact.parameters()))
            found.append(relative([costs[place].cpu()], [costs["exact"]]))
    off = bounds.network(dtype, longest=20, layers=2, steps=60)
    floor = off if dtype == torch.float64 else 4 * bounds.eps(dtype)
    bounds.assert_as_exact(errors["cuda"], errors["cpu"], floor)


@cuda
def test_cuda_falls_back_where_a_graph_cannot_be_captured():
    Looking = torchbp.define_layer(
        "Looking",
        lambda z: torch.sigmoid(z) if z.sum().item() > -1e30 else z,
        lambda a: a * (1 - a),
    )
    a, b = twins([20, 8, 4], Looking)
    images, targets = example_set(2000, [20, 4], None, labels=True, dtype=torch.float32)
    cost = torchbp.QuadraticCost()
    b.cuda()
    for model, device in ((a, "cpu"), (b, "cuda")):
        engine = ExplicitSGD(model, cost, 0.5)
        for epoch in range(3):
            engine.epoch(
                images.to(device),
                targets.to(device),
                10,
                torch.Generator().manual_seed(epoch),
            )
    torch.testing.assert_close([p.cpu() for p in parameters(b)], parameters(a))


@cuda
def test_an_epoch_on_cuda_never_waits():
    (model,) = twins([20, 8, 4], n=1)
    model.cuda()
    images, targets = example_set(2000, [20, 4], None, labels=True, dtype=torch.float32)
    engine = ExplicitSGD(model, torchbp.QuadraticCost(), 0.5)
    images, targets = images.cuda(), targets.cuda()
    engine.epoch(images, targets, 10)
    order = torch.randperm(2000, device="cuda")
    steps = engine.steps(images, targets, order, 10)  # looks at labels and order
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in steps:
            pass
    finally:
        torch.cuda.set_sync_debug_mode("default")
