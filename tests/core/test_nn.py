"""nn: the layers drop in for nn.Linear, and the MLP computes what the book says."""

import copy
import functools
import io
import pickle

import bounds
import pytest
import reference
import torch
from cases import (
    F64,
    LAYERS,
    Bipolar,
    SiLU,
    Square,
    all_layers,
    assert_raises_one_line,
    has_compiler,
    rand,
)
from torch import nn
from torch.testing import assert_close

import torchbp
from torchbp.costs import COSTS
from torchbp.nn import ACTIVATIONS, INITIALISATIONS

NATIVE = {name: layer.native or nn.Identity for name, layer in ACTIVATIONS.items()}


# ---------------------------------------------------------------- the layers


@all_layers
@pytest.mark.parametrize("bias", [True, False])
def test_is_a_linear(layer, bias):
    """Same parameters from the same seed, same keys, same way of being printed."""
    torch.manual_seed(3)
    ours = layer.module(5, 4, bias=bias)
    torch.manual_seed(3)
    native = nn.Linear(5, 4, bias=bias)
    assert isinstance(ours, nn.Linear)
    assert ours.state_dict().keys() == native.state_dict().keys()
    for key, value in native.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value)
    name = layer.module.__name__
    assert repr(ours) == f"{name}(in_features=5, out_features=4, bias={bias})"
    x = rand(3, 5, dtype=torch.float32)
    assert_close(ours(x), layer.sigma(native(x)))


@all_layers
def test_loads_the_state_of_a_linear(layer):
    native, ours = nn.Linear(5, 4), layer.module(5, 4)
    assert ours.load_state_dict(native.state_dict()) == ([], [])
    assert torch.equal(ours.weight, native.weight)
    native.load_state_dict(layer.module(5, 4).state_dict())


@all_layers
@pytest.mark.parametrize(
    "again",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))],
    ids=["deepcopy", "pickle"],
)
def test_copies(layer, again):
    ours = layer.module(5, 4)
    other = again(ours)
    assert type(other) is type(ours)
    x = rand(3, 5, dtype=torch.float32)
    assert torch.equal(other(x), ours(x))
    with torch.no_grad():
        other.weight.zero_()
    assert not torch.equal(other(x), ours(x))


@all_layers
def test_whole_module_through_torch_save(layer):
    ours, file = layer.module(5, 4), io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    x = rand(3, 5, dtype=torch.float32)
    assert torch.equal(other(x), ours(x))


@all_layers
def test_device_and_dtype(layer):
    ours = layer.module(5, 4, device="meta", dtype=torch.float64)
    assert ours.weight.is_meta and ours.bias.dtype == F64
    assert ours(torch.empty(3, 5, device="meta", dtype=F64)).shape == (3, 4)
    assert ours.to_empty(device="cpu").to(torch.float32).weight.dtype == torch.float32


@pytest.mark.parametrize("following", [nn.ReLU, nn.SiLU])
@pytest.mark.parametrize("rows", [(3,), (2, 3)], ids=str)
def test_in_place_activation_behind_the_identity_layer(following, rows):
    """nn.Linear does not save its output; were it saved, this would fail."""
    ours = nn.Sequential(torchbp.BPLinear(5, 4), following(inplace=True))
    native = nn.Sequential(nn.Linear(5, 4), following(inplace=True))
    native.load_state_dict(ours.state_dict())
    x = rand(*rows, 5, dtype=torch.float32)
    for model in (ours, native):
        model(x).square().sum().backward()
    for p, q in zip(ours.parameters(), native.parameters(), strict=True):
        assert_close(p.grad, q.grad)


@all_layers
def test_parameters_used_twice_accumulate(layer):
    ours = layer.module(3, 3, dtype=F64)
    x = rand(4, 3)
    ours(ours(x)).sum().backward()
    W, b = (p.detach().clone().requires_grad_() for p in ours.parameters())
    layer.native(layer.native(x, W, b), W, b).sum().backward()
    assert_close((ours.weight.grad, ours.bias.grad), (W.grad, b.grad))


@all_layers
def test_input_of_the_wrong_width(layer):
    parts = ("input", "expected", "5", "got", "(3, 6)")
    assert_raises_one_line(ValueError, parts, layer.module(5, 4), torch.ones(3, 6))


def test_defined_layers_stand_where_they_were_defined():
    for module in (Bipolar, SiLU, Square):
        assert module.__module__ == "cases" and module.__qualname__ == module.__name__


# ---------------------------------------------------------------- the MLP


def test_mlp_keys_and_sizes():
    model = torchbp.MLP([7, 5, 3])
    assert list(model.state_dict()) == [
        "layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias",
    ]  # fmt: skip
    assert tuple(model.sizes) == (7, 5, 3)
    assert [tuple(layer.weight.shape) for layer in model.layers] == [(5, 7), (3, 5)]


@pytest.mark.parametrize("activation", [*ACTIVATIONS, Bipolar])
@pytest.mark.parametrize("output", [None, *ACTIVATIONS, SiLU])
def test_mlp_layers(activation, output):
    model = torchbp.MLP([4, 3, 3, 2], activation, output)
    *hidden, last = (type(layer) for layer in model.layers)
    wanted = ACTIVATIONS.get(activation, activation)
    assert hidden == [wanted, wanted]
    assert last is (wanted if output is None else ACTIVATIONS.get(output, output))


@pytest.mark.parametrize("rows", [(), (1,), (6,), (2, 3), (0,), (2, 0, 3)], ids=str)
def test_mlp_forward_takes_any_rows(rows):
    model = torchbp.MLP([4, 3, 2], dtype=F64)
    x = rand(*rows, 4)
    y = model(x)
    assert y.shape == (*rows, 2)
    assert_close(y.reshape(-1, 2), model(x.reshape(-1, 4)))


@pytest.mark.parametrize("activation", NATIVE)
def test_mlp_equals_native_after_training_steps(activation):
    ours = torchbp.MLP([6, 5, 4], activation, dtype=F64)
    native = nn.Sequential(
        nn.Linear(6, 5), NATIVE[activation](), nn.Linear(5, 4), NATIVE[activation]()
    ).double()
    native.load_state_dict(
        dict(zip(native.state_dict(), ours.state_dict().values(), strict=True))
    )
    for model in (ours, native):
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(5):
            optimiser.zero_grad()
            loss = (model(rand(7, 6, seed=step)) - rand(7, 4, seed=90)).square().sum()
            loss.backward()
            optimiser.step()
    for p, q in zip(ours.parameters(), native.parameters(), strict=True):
        assert_close(p, q, **bounds.near(steps=5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_mlp_dtype(dtype):
    model = torchbp.MLP([4, 3, 2], dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(torch.ones(2, 4, dtype=dtype)).dtype == dtype


# ------------------------------------------------- against the per-example equations


def targets_of(kind, cost, n, outputs):
    """Targets for the cost, and the rows of floats that they stand for."""
    labels = torch.arange(n) % outputs
    if kind == "labels":
        return labels, nn.functional.one_hot(labels, outputs).to(F64)
    rows = torch.softmax(rand(n, outputs, seed=5), -1)
    return rows, rows


@pytest.mark.parametrize("sizes", [(3, 2), (4, 3, 2), (3, 5, 4, 3), (2, 3, 2, 3, 2)])
@pytest.mark.parametrize("activation", list(reference.SIGMA))
@pytest.mark.parametrize("cost", list(COSTS))
@pytest.mark.parametrize("kind", ["rows", "labels"])
def test_mlp_against_the_four_equations(sizes, activation, cost, kind):
    """The cost, every δ of every example, and the means ∂C/∂W and ∂C/∂b."""
    n = 5
    output = activation if cost == "quadratic" else "identity"
    torch.manual_seed(1)
    model = torchbp.MLP(sizes, activation, output, dtype=F64)
    x = rand(n, sizes[0], seed=2)
    y, rows = targets_of(kind, cost, n, sizes[-1])
    truth = reference.run(reference.layers_of(model), cost, x.tolist(), rows.tolist())
    value = COSTS[cost]()(model(x), y)
    value.backward()
    assert value.item() == pytest.approx(truth.cost, **bounds.approx(bounds.near()))
    for ell, layer in enumerate(model.layers):
        near(layer.weight.grad, truth.grad_W[ell])
        near(layer.bias.grad, truth.grad_b[ell])
    for i in range(n):  # one example: ∂C_x/∂b is δ (BP3), and the activations are a
        model.zero_grad()
        COSTS[cost]()(model(x[i]), y[i]).backward()
        a = x[i]
        for ell, layer in enumerate(model.layers):
            near(layer.bias.grad, truth.delta[i][ell])
            near(nn.functional.linear(a, layer.weight, layer.bias), truth.z[i][ell])
            a = layer(a)
            near(a, truth.a[i][ell])


def near(actual, expected):
    expected = torch.tensor(expected, dtype=F64)
    assert_close(actual.detach(), expected, **bounds.near())


def test_the_oracle_against_finite_differences():
    """The oracle itself, by nudging one weight and one bias of every layer."""
    model = torchbp.MLP([3, 4, 2], "tanh", "sigmoid", dtype=F64)
    x, y, step = rand(3, 3).tolist(), rand(3, 2, seed=1).tolist(), 1e-6
    layers = reference.layers_of(model)
    truth = reference.run(layers, "quadratic", x, y)

    def nudged(ell, part, h):
        changed = copy.deepcopy(layers)
        if part == "W":
            changed[ell][0][1][0] += h
        else:
            changed[ell][1][1] += h
        return reference.run(changed, "quadratic", x, y).cost

    for ell in range(2):
        for part, grad in (("W", truth.grad_W[ell][1][0]), ("b", truth.grad_b[ell][1])):
            slope = (nudged(ell, part, step) - nudged(ell, part, -step)) / (2 * step)
            assert slope == pytest.approx(
                grad, **bounds.approx(bounds.difference(step))
            )


# ---------------------------------------------------------------- initialisation


def assert_normal(values, std):
    count = values.numel()
    assert abs(values.mean().item()) <= bounds.mean(std, count)
    assert abs(values.std().item() - std) <= bounds.deviation(std, count)


@pytest.mark.parametrize(
    ("init", "weight_std"), [("scaled", 784**-0.5), ("normal", 1.0)]
)
def test_normal_initialisations(init, weight_std):
    torch.manual_seed(0)
    model = torchbp.MLP([784, 400, 10], init=init)
    first, last = model.layers
    assert_normal(first.weight, weight_std)
    assert_normal(last.weight, 400**-0.5 if init == "scaled" else 1.0)
    assert_normal(first.bias, 1.0)


def test_torch_initialisation():
    torch.manual_seed(4)
    ours = torchbp.MLP([784, 30, 10], init="torch")
    torch.manual_seed(4)
    native = nn.Linear(784, 30), nn.Linear(30, 10)
    for layer, linear in zip(ours.layers, native, strict=True):
        assert torch.equal(layer.weight, linear.weight)
        assert torch.equal(layer.bias, linear.bias)


@pytest.mark.parametrize("init", INITIALISATIONS)
def test_a_seed_fixes_the_start(init):
    def start(seed):
        torch.manual_seed(seed)
        return torchbp.MLP([5, 4, 3], init=init).layers[0].weight

    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))


# ---------------------------------------------------------------- errors

ERRORS = {
    "sizes a number": ({"sizes": 3}, TypeError, "sizes", "sequence", "3"),
    "sizes float": ({"sizes": [3, 2.0]}, TypeError, "sizes", "integers", "2.0"),
    "sizes text": ({"sizes": "32"}, TypeError, "sizes", "integers", "'3'"),
    "sizes bool": ({"sizes": [3, True]}, TypeError, "sizes", "integers", "True"),
    "one size": ({"sizes": [3]}, ValueError, "sizes", "two", "[3]"),
    "no size": ({"sizes": []}, ValueError, "sizes", "two", "[]"),
    "size 0": ({"sizes": [3, 0, 2]}, ValueError, "sizes", "positive", "[3, 0, 2]"),
    "size negative": ({"sizes": [3, -1]}, ValueError, "sizes", "positive", "[3, -1]"),
    "activation unknown": (
        {"sizes": [3, 2], "activation": "gelu"},
        ValueError, "activation", "sigmoid, tanh, relu, softplus, identity", "'gelu'",
    ),
    "activation a native class": (
        {"sizes": [3, 2], "activation": nn.Sigmoid},
        TypeError, "activation", "define_layer", "Sigmoid",
    ),
    "activation a function": (
        {"sizes": [3, 2], "activation": torch.tanh},
        TypeError, "activation", "define_layer", "tanh",
    ),
    "output unknown": (
        {"sizes": [3, 2], "output": "softmax"},
        ValueError, "output", "identity", "'softmax'",
    ),
    "output a number": (
        {"sizes": [3, 2], "output": 3}, TypeError, "output", "define_layer", "3",
    ),
    "init unknown": (
        {"sizes": [3, 2], "init": "xavier"},
        ValueError, "init", "scaled, normal, torch", "'xavier'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("given", "kind", *"pqr"), ERRORS.values(), ids=ERRORS.keys())
def test_mlp_errors(given, kind, p, q, r):
    assert_raises_one_line(kind, (p, "expected", q, "got", r), torchbp.MLP, **given)


def test_mlp_input_of_the_wrong_width():
    parts = ("input", "expected", "784", "got", "(2, 28, 28)")
    model = torchbp.MLP([784, 3])
    assert_raises_one_line(ValueError, parts, model, torch.ones(2, 28, 28))


# ---------------------------------------------------------------- modes of torch


@pytest.mark.parametrize("activation", [*NATIVE, SiLU])
def test_per_example_gradients_through_torch_func(activation):
    model = torchbp.MLP([4, 3, 2], activation, dtype=F64)
    x, y = rand(5, 4), rand(5, 2, seed=1)
    cost = torchbp.QuadraticCost()

    def one(parameters, x, y):
        return cost(torch.func.functional_call(model, parameters, (x,)), y)

    parameters = dict(model.named_parameters())
    each = torch.vmap(torch.func.grad(one), (None, 0, 0))(parameters, x, y)
    cost(model(x), y).backward()
    for name, p in model.named_parameters():
        assert_close(each[name].mean(0), p.grad)


@has_compiler
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_whole_step_compiles():
    model = torchbp.MLP([4, 3, 2], "tanh", "identity")
    x, y = rand(5, 4, dtype=torch.float32), torch.tensor([0, 1, 0, 1, 1])
    cost = torchbp.LogLikelihoodCost()
    cost(model(x), y).backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    torch.compiler.reset()
    torch.compile(lambda: cost(model(x), y), fullgraph=True)().backward()
    assert_close([p.grad for p in model.parameters()], expected)


def test_autocast_trains_float32_parameters():
    model = torchbp.MLP([4, 3, 2], output="identity")
    with torch.autocast("cpu", torch.bfloat16):
        output = model(rand(5, 4, dtype=torch.float32))
        value = torchbp.CrossEntropyCost()(output, torch.tensor([0, 1, 0, 1, 1]))
    value.backward()
    assert output.dtype == torch.bfloat16 and value.dtype == torch.float32
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_tables_agree():
    """Every name that MLP takes is in the table of layers under test."""
    tested = {layer.module for layer in LAYERS.values()}
    assert set(ACTIVATIONS.values()) <= tested


def test_sizes_may_be_numpy_integers():
    import numpy as np

    assert torchbp.MLP(np.array([3, 4, 2])).sizes == (3, 4, 2)


@pytest.mark.parametrize("init", ["scaled", "normal", "torch"])
def test_a_layer_class_without_bias(init):
    class Biasless(torchbp.BPLinearTanh):
        def __init__(self, n_in, n_out, device=None, dtype=None):
            super().__init__(n_in, n_out, bias=False, device=device, dtype=dtype)

    model = torchbp.MLP([3, 4, 2], activation=Biasless, init=init)
    assert [name for name, _ in model.named_parameters()] == [
        "layers.0.weight",
        "layers.1.weight",
    ]


def test_a_function_of_whole_rows_is_no_layer():
    with pytest.raises(ValueError, match="entries depend on each other"):
        torchbp.define_layer("N", lambda z: z.softmax(-1), lambda a: a * (1 - a))


def test_nested_tensors_are_refused():
    nested = torch.nested.nested_tensor(
        [torch.rand(2, 3), torch.rand(4, 3)], layout=torch.jagged
    )
    with pytest.raises(TypeError, match="expected a dense Tensor, got a nested one"):
        torchbp.BPLinearSigmoid(3, 2)(nested)


def test_a_sigma_that_reads_a_parameter_is_refused_by_its_name():
    slope = torch.nn.Parameter(torch.tensor(0.25))
    prelu = torch.nn.PReLU(dtype=torch.float64)
    one = torch.ones_like
    with pytest.raises(ValueError, match=r"sigma: .* reads slope, which requires grad"):
        torchbp.define_layer("Bad", lambda z: torch.where(z > 0, z, slope * z), one)
    with pytest.raises(ValueError, match=r"sigma: .* reads weight, which requires"):
        torchbp.define_layer("Bad", prelu, one)
    with pytest.raises(ValueError, match=r"sigma: .* reads prelu.weight, which"):
        torchbp.define_layer("Bad", lambda z: prelu(z), one)
    with pytest.raises(ValueError, match=r"sigma_prime: .* reads slope, which"):
        torchbp.define_layer("Bad", torch.relu, lambda a: slope * torch.ones_like(a))
    prelu.requires_grad_(False)
    torchbp.define_layer("Good", prelu, one)


class Holder:
    """An object with a σ as its method, and one that is itself called."""

    def __init__(self, slope):
        self.slope = slope

    def __call__(self, z):
        return self.slope * z

    sigma = __call__


def test_a_sigma_that_reaches_a_parameter_on_the_way_is_refused_by_its_name():
    """Through a helper, an argument bound beforehand, an object, a list; for negative z
    alone; and in a recursive function."""
    slope = torch.nn.Parameter(torch.tensor(0.25))

    def helper(z):
        return slope * z

    def below_zero(z):
        return z if z.numel() and bool((z > 0).all()) else torch.where(
            z > 0, z, slope * z)  # fmt: skip

    def countdown(z, n=1):
        return countdown(z, n - 1) if n else slope * z

    slopes = [1.0, {"left": slope}]
    slopes.append(slopes)
    readers = {
        "slope": lambda z: helper(z),
        "slope ": below_zero,
        "slope  ": countdown,
        "gain": functools.partial(lambda z, gain: gain * z, gain=slope),
        r"\(0\)": functools.partial(lambda gain, z: gain * z, slope),
        "self.slope": Holder(slope).sigma,
        "slope   ": Holder(slope),
        r"slopes\[1\]\['left'\]": lambda z: slopes[1]["left"] * z,
    }
    for name, sigma in readers.items():
        pattern = f"sigma: .* reads {name.strip()}, which requires grad"
        with pytest.raises(ValueError, match=pattern):
            torchbp.define_layer("Bad", sigma, torch.ones_like)
    torchbp.define_layer("Good", lambda z: slope.detach() * z, torch.ones_like)
