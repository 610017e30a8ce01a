"""What `observe` records is what autograd and the definitions say."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torchbp
from torchbp import functional


@pytest.fixture
def network():
    torch.manual_seed(0)
    model = torchbp.MLP([4, 5, 3], activation="tanh", output="sigmoid")
    return model.double(), torch.rand(7, 4).double(), torch.rand(7, 3).double()


def observed(model, x, y):
    with torchbp.observe(model) as trace:
        torchbp.QuadraticCost()(model(x), y).backward()
    return trace


def test_records_follow_the_definitions(network):
    model, x, y = network
    trace = observed(model, x, y)
    assert [r.name for r in trace] == ["layers.0", "layers.1"]
    hidden, last = trace
    torch.testing.assert_close(hidden.z, x @ hidden.weight.T + hidden.bias)
    torch.testing.assert_close(hidden.a, hidden.z.tanh())
    torch.testing.assert_close(last.x, hidden.a)
    torch.testing.assert_close(last.sigma_prime, last.a * (1 - last.a))
    delta = (last.a - y) / 7 * last.a * (1 - last.a)
    torch.testing.assert_close(last.delta, delta)
    torch.testing.assert_close(
        hidden.delta, delta @ last.weight * (1 - hidden.a.square())
    )


def test_gradients_are_the_parameters_gradients(network):
    model, x, y = network
    for record, layer in zip(observed(model, x, y), model.layers, strict=True):
        torch.testing.assert_close(record.grad_weight, layer.weight.grad)
        torch.testing.assert_close(record.grad_bias, layer.bias.grad)


@pytest.mark.parametrize("bias", [True, False])
def test_example_gradient_norms_are_those_of_per_sample_gradients(bias):
    torch.manual_seed(1)
    model = nn.Sequential(
        torchbp.BPLinearSigmoid(4, 5, bias=bias),
        torchbp.BPLinearSigmoid(5, 3, bias=bias),
    ).double()
    x, y = torch.rand(6, 4).double(), torch.rand(6, 3).double()
    trace = observed(model, x, y)

    def one(parameters, x, y):
        output = torch.func.functional_call(model, parameters, (x[None],))
        return torchbp.costs.quadratic_cost(output, y[None])

    grads = torch.func.vmap(torch.func.grad(one), (None, 0, 0))(
        dict(model.named_parameters()), x, y
    )
    for record in trace:
        mine = [
            g.flatten(1) for n, g in grads.items() if n.startswith(record.name + ".")
        ]
        expected = torch.cat(mine, 1).norm(dim=1)
        torch.testing.assert_close(record.example_gradient_norms, expected)


def test_silu_layer_is_observed_through_z():
    SiLU = torchbp.define_layer(
        "SiLU",
        nn.functional.silu,
        lambda z: z.sigmoid() * (1 + z * (1 - z.sigmoid())),
        saves="z",
    )
    torch.manual_seed(0)
    layer = SiLU(4, 3).double()
    trace = observed(layer, torch.randn(5, 4).double(), torch.rand(5, 3).double())
    assert trace[0].name == ""
    torch.testing.assert_close(trace[0].grad_weight, layer.weight.grad)


def test_observing_changes_nothing(network):
    model, x, y = network
    cost = torchbp.QuadraticCost()
    cost(model(x), y).backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    observed(model, x, y)
    assert all(
        torch.equal(a, p.grad) for a, p in zip(plain, model.parameters(), strict=True)
    )
    assert not any(layer._forward_hooks for layer in model.layers)


def test_frozen_layer_has_a_delta_and_no_gradients(network):
    model, x, y = network
    model.layers[1].requires_grad_(False)
    trace = observed(model, x, y)
    assert trace[1].delta is not None
    assert trace[1].grad_weight is None and trace[1].grad_bias is None
    torch.testing.assert_close(trace[0].grad_weight, model.layers[0].weight.grad)


def test_calls_of_one_layer_by_name(network):
    model, x, y = network
    with torchbp.observe(model) as trace:
        model(x)
        torchbp.QuadraticCost()(model(x), y).backward()
    assert len(trace) == 4 and len(trace["layers.0"]) == 2
    assert trace["layers.0"][0].delta is None
    assert trace["layers.0"][1].delta is not None
    with pytest.raises(RuntimeError, match="expected a backward pass first"):
        _ = trace[0].example_gradient_norms
    with pytest.raises(KeyError, match=r"layers\.7"):
        trace["layers.7"]


def test_in_place_work_on_an_output_neither_fails_nor_shows(network):
    _, x, _ = network
    layer = torchbp.BPLinear(4, 3).double()
    with torchbp.observe(layer) as trace:
        layer(x).mul_(0).sum().backward()
    assert trace[0].a.abs().sum() > 0
    assert torch.equal(trace[0].delta, torch.zeros(7, 3).double())


def test_saturation_counts_neurons_that_hardly_learn():
    layer = torchbp.BPLinearSigmoid(1, 4)
    with torch.no_grad():
        layer.weight.fill_(1)
        layer.bias.copy_(torch.tensor([0.0, 4.0, 5.0, -5.0]))
    with torchbp.observe(layer) as trace:
        layer(torch.zeros(3, 1))
    assert trace[0].saturated == 0.5


def test_refusals(network):
    model, x, _ = network
    with (
        pytest.raises(ValueError, match="expected a model with hand-written layers"),
        torchbp.observe(nn.Linear(2, 2)),
    ):
        pass
    with (
        torchbp.observe(model),
        pytest.raises(RuntimeError, match="expected an eager forward pass"),
    ):
        torch.func.vmap(model)(x)
    assert functional.LinearTanhFunction.max_slope == 1


def test_the_record_is_the_layer_s_whatever_other_hooks_return():
    torch.manual_seed(0)
    layer = torchbp.BPLinearSigmoid(4, 3).double()
    layer.register_forward_hook(lambda module, args, output: 2 * output)
    x = torch.rand(5, 4).double()
    with torchbp.observe(layer) as trace:
        layer(input=x).square().sum().backward()
    record = trace[0]
    torch.testing.assert_close(record.a, record.z.sigmoid())
    torch.testing.assert_close(record.grad_weight, layer.weight.grad)


def test_an_infinite_gradient_at_a_neuron_that_is_off():
    layer = torchbp.BPLinearReLU(1, 1)
    torch.nn.init.constant_(layer.weight, -1.0)
    torch.nn.init.zeros_(layer.bias)
    with torchbp.observe(layer) as trace:
        layer(torch.ones(1, 1)).backward(torch.full((1, 1), torch.inf))
    assert trace[0].delta.item() == 0
    assert layer.weight.grad.item() == 0


def test_saturation_of_a_layer_of_one_s_own():
    Own = torchbp.define_layer("Own", torch.sigmoid, lambda a: a * (1 - a))
    assert Own.function.max_slope == pytest.approx(0.25)
    torch.manual_seed(0)
    own, built_in = Own(4, 30), torchbp.BPLinearSigmoid(4, 30)
    own.load_state_dict(built_in.state_dict())
    shares = []
    for layer in (own, built_in):
        with torchbp.observe(layer) as trace:
            layer(10 * torch.randn(50, 4))
            torch.manual_seed(0)
        shares.append(trace[0].saturated)
    assert 0 < shares[0] < 1


def test_parametrized_layers_have_gradients():
    layer = nn.utils.parametrizations.weight_norm(torchbp.BPLinearTanh(4, 3))
    with torchbp.observe(layer) as trace:
        layer(torch.rand(5, 4)).sum().backward()
    assert trace[0].grad_weight is not None and len(trace[0:1]) == 1


def test_a_compiled_model_is_refused(network):
    model, _, _ = network
    for compiled in (torch.compile(model, backend="eager"), model):
        if compiled is model:
            model.compile(backend="eager")
        with (
            pytest.raises(ValueError, match="expected a model that is not compiled"),
            torchbp.observe(compiled),
        ):
            pass


def test_a_native_copy_made_within_the_block_can_be_called(network):
    model, x, _ = network
    with torchbp.observe(model):
        native = torchbp.to_native(model)
    torch.testing.assert_close(native(x), model(x))
