"""What `observe` records is what autograd and the definitions say."""

from __future__ import annotations

import copy

import bounds
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

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


# ---------------------------------------------------------------- the table


def test_the_table_has_the_numbers_in_aligned_columns(network):
    model, x, y = network
    trace = observed(model, x, y)
    head, *rows = str(trace).splitlines()
    assert head.split() == (
        "layer shapes ‖a‖ saturated ‖δ‖ ‖∂C/∂W‖ ‖∂C/∂b‖ ‖∂C/∂W‖/‖W‖".split()
    )
    assert {len(row) for row in rows} == {len(head)} and len(head) <= 100
    for row, record, layer in zip(rows, trace, model.layers, strict=True):
        grad = layer.weight.grad.norm().item()
        expected = [
            f"{record.a.norm().item():.3g}",
            f"{100 * record.saturated:.1f} %",
            f"{record.delta.norm().item():.3g}",
            f"{grad:.3g}",
            f"{layer.bias.grad.norm().item():.3g}",
            f"{grad / layer.weight.norm().item():.3g}",
        ]
        shapes = f"7 x {layer.in_features} → {layer.out_features}"
        assert " ".join(row.split()) == " ".join([record.name, shapes, *expected])


def test_the_update_to_weight_ratio_is_that_of_a_step(network):
    model, x, y = network
    trace = observed(model, x, y)
    *table, note = trace.table(lr=0.25).splitlines()
    assert table[0].endswith("η‖∂C/∂W‖/‖W‖") and note == "η = 0.25"
    before = [layer.weight.detach().clone() for layer in model.layers]
    torch.optim.SGD(model.parameters(), lr=0.25).step()
    for record, layer, W, row in zip(
        trace, model.layers, before, table[1:], strict=True
    ):
        ratio = ((layer.weight - W).norm() / W.norm()).item()
        assert record.update_ratio(0.25) == pytest.approx(ratio)
        assert row.split()[-1] == f"{ratio:.3g}"


def test_the_table_has_a_dash_where_no_backward_pass_came_by(network):
    model, x, y = network
    model.layers[1].requires_grad_(False)
    with torchbp.observe(model) as trace:
        model(x)
        torchbp.QuadraticCost()(model(x), y).backward()
    dashes = [row.count("—") for row in str(trace).splitlines()]
    assert dashes == [0, 4, 4, 0, 3]  # frozen: a δ, and no gradients
    assert trace[0].update_ratio() is None and trace[0].norm("delta") is None
    assert trace[0].mean_delta is None
    assert repr(trace[0]) == "<Record of 'layers.0': 7 x 4 → 5, forward>"
    assert repr(trace) == "<Trace of 4 calls>"


def test_tables_of_one_layer_of_no_calls_and_of_no_rows(network):
    model, x, _ = network
    with torchbp.observe(model.layers[0]) as trace:
        pass
    assert "no calls" in str(trace)
    with torchbp.observe(model.layers[0]) as trace:
        model.layers[0](x[0])
        model.layers[0](x[:0])
    rows = str(trace).splitlines()
    assert rows[1].split()[:4] == ["(model)", "4", "→", "5"]
    assert rows[2].count("—") == 5
    with pytest.raises(ValueError, match=r"expected one of x, weight.*got 'gradient'"):
        trace[0].norm("gradient")


def test_norms_of_half_precision_do_not_overflow():
    layer = torchbp.BPLinear(2, 2, bias=False, dtype=torch.float16)
    with torchbp.observe(layer) as trace:
        layer(torch.full((3, 2), 6e4, dtype=torch.float16))
    off = bounds.approx(bounds.close(bounds.OPERATIONS, torch.float16, size=0))
    assert trace[0].norm("x") == pytest.approx(6e4 * 6**0.5, **off)
    with torch.no_grad():
        layer.weight.zero_()
    with torchbp.observe(layer) as trace:
        (layer(torch.ones(3, 2).half()) ** 2).sum().backward()
    assert trace[0].update_ratio() == 0
    trace[0].grad_weight += 1
    assert trace[0].update_ratio() == float("inf")


# ---------------------------------------------------------------- norms per example


SoftSign = torchbp.define_layer(
    "SoftSign", nn.functional.softsign, lambda a: (1 - a.abs()).square()
)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "layer", [torchbp.BPLinear, torchbp.BPLinearReLU, torchbp.BPLinearTanh, SoftSign]
)
@pytest.mark.parametrize("rows", [(1,), (6,), (2, 3)])
def test_example_gradient_norms_of_any_layer(layer, bias, rows):
    torch.manual_seed(1)
    model = nn.Sequential(layer(4, 5, bias=bias), layer(5, 3, bias=bias)).double()
    x, y = torch.randn(*rows, 4).double(), torch.rand(*rows, 3).double()
    trace = observed(model, x, y)

    def one(parameters, x, y):
        output = torch.func.functional_call(model, parameters, (x[None],))
        return torchbp.costs.quadratic_cost(output, y[None])

    grads = torch.func.vmap(torch.func.grad(one), (None, 0, 0))(
        dict(model.named_parameters()), x.reshape(-1, 4), y.reshape(-1, 3)
    )
    for record in trace:
        mine = [
            g.flatten(1) for n, g in grads.items() if n.startswith(record.name + ".")
        ]
        assert len(mine) == 1 + bias
        expected = torch.cat(mine, 1).norm(dim=1).reshape(rows)
        torch.testing.assert_close(record.example_gradient_norms, expected)


# ---------------------------------------------------------------- several passes


def test_a_second_backward_pass_writes_over_the_first(network):
    model, x, y = network
    with torchbp.observe(model) as trace:
        output = model(x)
        torchbp.QuadraticCost()(output, y).backward(retain_graph=True)
        first = [(r.delta, r.grad_weight, r.grad_bias) for r in trace]
        (3 * torchbp.QuadraticCost()(output, y)).backward()
    assert len(trace) == 2
    for record, before, layer in zip(trace, first, model.layers, strict=True):
        now = record.delta, record.grad_weight, record.grad_bias
        for a, b in zip(now, before, strict=True):
            torch.testing.assert_close(a, 3 * b)
        # Where .grad has the sum.
        torch.testing.assert_close(layer.weight.grad, 4 * before[1])


def test_the_backward_pass_may_come_after_the_block(network):
    model, x, y = network
    with torchbp.observe(model) as trace:
        output = model(x)
    torchbp.QuadraticCost()(output, y).backward()
    assert all(record.delta is not None for record in trace)


def test_several_calls_have_each_their_own_gradients(network):
    model, x, y = network
    with torchbp.observe(model) as trace:
        cost = torchbp.QuadraticCost()
        (cost(model(x), y) + 2 * cost(model(2 * x), y)).backward()
    first, second = trace["layers.0"]
    torch.testing.assert_close(
        first.grad_weight + second.grad_weight, model.layers[0].weight.grad
    )
    assert len(str(trace).splitlines()) == 5


def test_grad_a_is_what_the_cost_returns(network):
    model, x, y = network
    trace = observed(model, x, y)
    torch.testing.assert_close(trace[1].grad_a, (trace[1].a - y) / 7)


# ---------------------------------------------------------------- larger models


class Larger(nn.Module):
    """A convolution before our layers, a connection around one of them."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 2, 3)
        self.first = torchbp.BPLinearTanh(4, 4)
        self.last = torchbp.BPLinearSigmoid(4, 3)

    def forward(self, input):
        h = self.conv(input.unsqueeze(-2)).flatten(-2)
        return self.last(h + self.first(h).relu())


def test_layers_in_a_larger_model(network):
    _, x, y = network
    torch.manual_seed(0)
    model = Larger().double()
    trace = observed(model, x, y)
    assert [r.name for r in trace] == ["first", "last"]
    for record in trace:
        layer = model.get_submodule(record.name)
        torch.testing.assert_close(record.grad_weight, layer.weight.grad)
        torch.testing.assert_close(record.grad_bias, layer.bias.grad)
    expected = trace[1].delta @ trace[1].weight * (trace[0].a > 0)
    torch.testing.assert_close(trace[0].grad_a, expected)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("twice", [False, True])
def test_a_call_that_checkpointing_repeats_is_one_record(network, reentrant, twice):
    model, x, y = network

    def run(model):
        inputs = x.clone().requires_grad_()
        output = checkpoint(model, inputs, use_reentrant=reentrant)
        if twice:  # the same bits once more, with another gradient
            output = output + 2 * checkpoint(model, inputs, use_reentrant=reentrant)
        torchbp.QuadraticCost()(output, y).backward()

    with torchbp.observe(model) as trace:
        run(model)
    assert [r.name for r in trace] == (1 + twice) * ["layers.0", "layers.1"]
    for name, layer in zip(("layers.0", "layers.1"), model.layers, strict=True):
        grads = [record.grad_weight for record in trace[name]]
        torch.testing.assert_close(sum(grads), layer.weight.grad)
        if twice:
            torch.testing.assert_close(grads[1], 2 * grads[0])


def test_the_backward_pass_of_a_checkpoint_after_the_block(network):
    model, x, y = network
    with torchbp.observe(model) as trace:
        output = checkpoint(model, x, use_reentrant=False)
    torchbp.QuadraticCost()(output, y).backward()
    assert len(trace) == 2
    torch.testing.assert_close(trace[0].grad_weight, model.layers[0].weight.grad)


def test_a_spectral_norm_takes_no_step_for_being_looked_at(network):
    _, x, y = network
    gradients = []
    for look in (False, True):
        torch.manual_seed(0)
        layer = torchbp.BPLinearSigmoid(4, 3).double()
        nn.utils.parametrizations.spectral_norm(layer)
        if look:
            trace = observed(layer, x, y)
            torch.testing.assert_close(trace[0].a, trace[0].z.sigmoid())
            assert all(m.training for m in layer.modules())
        else:
            torchbp.QuadraticCost()(layer(x), y).backward()
        gradients.append(layer.parametrizations.weight.original.grad)
    assert torch.equal(*gradients)


# ---------------------------------------------------------------- nothing left


def test_no_hooks_are_left_whatever_happens(network):
    model, x, _ = network
    with pytest.raises(ZeroDivisionError), torchbp.observe(model):
        model(x / (1 // 0))
    with pytest.raises(ValueError, match="input"), torchbp.observe(model):
        model(x[:, 1:])
    hooks = "_forward_hooks _forward_pre_hooks _backward_hooks _backward_pre_hooks"
    for layer in model.layers:
        assert not any(getattr(layer, name) for name in hooks.split())
    assert not model(x)._backward_hooks


def test_a_gradient_that_does_not_arrive_is_no_error(network):
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a):
            return a.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    model, x, _ = network
    with torchbp.observe(model) as trace:
        Stop.apply(model(x)).sum().backward()
    assert trace[1].delta is None and trace[0].delta is None


def test_copies_are_not_observed(network):
    model, x, _ = network
    with torchbp.observe(model) as trace:
        copy.deepcopy(model)(x)
        torchbp.from_native(model)(x)
    assert len(trace) == 0


# ---------------------------------------------------------------- compiled, CUDA


def test_a_compiled_part_is_refused(network):
    model, _, _ = network
    model.layers[1].compile(backend="eager")
    with (
        pytest.raises(ValueError, match="expected a model that is not compiled"),
        torchbp.observe(model),
    ):
        pass


def test_a_function_compiled_around_the_model(network):
    model, x, _ = network
    compiled = torch.compile(lambda x: model(x), backend="eager", fullgraph=True)
    with (
        torchbp.observe(model),
        # torch 2.8 says only that there was an error.
        pytest.raises(Exception, match=r"expected an eager forward|Observed exception"),
    ):
        compiled(x)
    torch._dynamo.reset()
    compiled(x)
    with torchbp.observe(model) as trace:
        compiled(x)
    assert len(trace) == 0
    assert "by a function compiled before it, whose calls are not" in str(trace)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_as_on_the_cpu(network):
    model, x, y = network
    trace = observed(model, x, y)
    on_cuda = observed(copy.deepcopy(model).cuda(), x.cuda(), y.cuda())
    for a, b in zip(on_cuda, trace, strict=True):
        assert a.delta.is_cuda
        torch.testing.assert_close(a.delta.cpu(), b.delta)
        torch.testing.assert_close(a.grad_weight.cpu(), b.grad_weight)
    assert str(on_cuda).splitlines()[0] == str(trace).splitlines()[0]
