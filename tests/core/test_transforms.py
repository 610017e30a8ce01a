"""Transforms: torch.func and forward-mode AD see our layers and costs as native ones.

Every test here applies one and the same transform to ours and to the native expression
of the same function, in float64, and compares the results. What the transforms must not
change, that the derivatives are the right ones, is in test_functional and test_costs.
"""

import itertools

import bounds
import pytest
import torch
from cases import (
    COSTS,
    F64,
    LAYERS,
    all_costs,
    all_layers,
    check_first,
    check_second,
    operands,
    rand,
    target_for,
    without_warnings,
)
from torch import nn
from torch.autograd import forward_ad, gradgradcheck
from torch.func import (
    functional_call,
    grad,
    grad_and_value,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    stack_module_state,
    vjp,
    vmap,
)
from torch.testing import assert_close

import torchbp

# torch warns of what it does itself when forward AD starts, and in linearize.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings(
        "ignore:Attempted to insert a get_attr Node:UserWarning"
    ),
]
ALL = (0, 1, 2)


def assert_equal(ours, native):
    assert_close(ours, native, **bounds.near())


def energy(f):
    """A number made of f's result, by which to differentiate."""
    return lambda *args: f(*args).square().sum()


def direction(t, seed=0):
    """Fixed numbers of t's shape; inside vmap, random ones would be refused."""
    steps = torch.arange(1 + seed, 1 + seed + t.shape.numel(), dtype=F64)
    return steps.sin().reshape(t.shape)


def tangents(*args):
    return tuple(direction(t, 10 * i) for i, t in enumerate(args))


def push(f, *args):
    """f's derivative along fixed tangents, by forward mode."""
    return jvp(f, args, tangents(*args))[1]


def pull(f, *args):
    """The transposed derivative of f, by reverse mode."""
    y, back = vjp(f, *args)
    return back(direction(y))


# ---------------------------------------------------------------- layers

# Each takes a layer f(x, W, b) with x (3, 4), W (2, 4), b (2). What test_functional has
# already (vmap(grad), jacrev, jacfwd, hessian, jvp(grad)) is not repeated.
OF_LAYERS = {
    "grad": lambda f, x, W, b: grad(energy(f), ALL)(x, W, b),
    "grad_and_value": lambda f, x, W, b: grad_and_value(energy(f), ALL)(x, W, b),
    "grad of one element": lambda f, x, W, b: grad(lambda W: f(x, W, b)[1, 0])(W),
    "vjp": pull,
    "jvp": push,
    "jvp by x": lambda f, x, W, b: push(lambda x: f(x, W, b), x),
    "jvp by W": lambda f, x, W, b: push(lambda W: f(x, W, b), W),
    "jvp by b": lambda f, x, W, b: push(lambda b: f(x, W, b), b),
    "linearize": lambda f, *args: linearize(f, *args)[1](*tangents(*args)),
    "jacrev in chunks": lambda f, *args: jacrev(f, ALL, chunk_size=2)(*args),
    "hessian": lambda f, *args: hessian(energy(f), ALL)(*args),
    "jacrev(jacrev)": lambda f, *args: jacrev(jacrev(f, ALL), ALL)(*args),
    "jacfwd(jacfwd)": lambda f, *args: jacfwd(jacfwd(f, ALL), ALL)(*args),
    "jacrev(jacfwd)": lambda f, *args: jacrev(jacfwd(f, ALL), ALL)(*args),
    "jvp(jvp)": lambda f, *args: push(lambda *args: push(f, *args), *args),
    "vjp(jvp)": lambda f, *args: pull(lambda *args: push(f, *args), *args),
    "jvp(vjp)": lambda f, *args: push(lambda *args: pull(f, *args), *args),
    "grad(grad)": lambda f, x, W, b: grad(
        lambda W: energy(grad(energy(f)))(x, W, b),
    )(W),
    "third derivative": lambda f, x, W, b: grad(
        lambda b: hessian(lambda x: energy(f)(x, W, b))(x[0]).sum()
    )(b),
}


def compare(transform, ours, native, *args):
    assert_equal(transform(ours, *args), transform(native, *args))


@all_layers
@pytest.mark.parametrize("name", OF_LAYERS)
def test_layer(layer, name):
    args = (t.detach() for t in operands(layer, (3,), 4, 2))
    compare(OF_LAYERS[name], layer, layer.native, *args)


@all_layers
@pytest.mark.parametrize("rows", [(), (0,), (2, 3)], ids=str)
def test_layer_of_any_shape(layer, rows):
    for bias in (True, False):
        args = [t.detach() for t in operands(layer, rows, 4, 2, bias)]
        every = tuple(range(len(args)))
        compare(push, layer, layer.native, *args)
        compare(pull, layer, layer.native, *args)
        compare(lambda f, *a: jacrev(f, every)(*a), layer, layer.native, *args)  # noqa: B023
        compare(lambda f, *a: jacfwd(f, every)(*a), layer, layer.native, *args)  # noqa: B023


# ---------------------------------------------------------------- layers under vmap

# in_dims of x, W and b, where each that is not None gets a dimension of 5 there.
IN_DIMS = {
    "x": (0, None, None),
    "x, last": (-1, None, None),
    "W": (None, 0, None),
    "W, in the middle": (None, 1, None),
    "b": (None, None, 0),
    "parameters": (None, 0, 0),
    "x and W": (1, 2, None),
    "all": (0, 0, 0),
    "all, differently": (2, 1, 1),
}
# What is mapped: f itself, or a transform of it.
INSIDE = {
    "vmap": lambda f: f,
    "vmap(grad)": lambda f: grad(energy(f), ALL),
    "vmap(vjp)": lambda f: lambda *args: pull(f, *args),
    "vmap(jvp)": lambda f: lambda *args: push(f, *args),
    "vmap(jacrev)": lambda f: jacrev(f, ALL),
    "vmap(jacfwd)": lambda f: jacfwd(f, ALL),
    "vmap(hessian)": lambda f: hessian(energy(f), ALL),
}


def spread(args, in_dims, n=5):
    """Each argument n times, not all alike, along its in_dim."""
    return [
        t if dim is None else torch.stack([t + 0.1 * i for i in range(n)], dim)
        for t, dim in zip(args, in_dims, strict=True)
    ]


@all_layers
@pytest.mark.parametrize("in_dims", IN_DIMS.values(), ids=IN_DIMS.keys())
def test_layer_under_vmap(layer, in_dims):
    args = spread([t.detach() for t in operands(layer, (3,), 4, 2)], in_dims)
    for inside in INSIDE.values():
        compare(
            lambda f, *args: vmap(inside(f), in_dims)(*args),  # noqa: B023
            layer, layer.native, *args,
        )  # fmt: skip


OF_VMAP = {
    "out_dims": lambda f, x, W, b: vmap(f, (0, None, None), out_dims=1)(x, W, b),
    "chunks": lambda f, x, W, b: vmap(f, (0, None, None), chunk_size=2)(x, W, b),
    "vmap(vmap)": lambda f, x, W, b: vmap(
        vmap(f, (0, None, None)), (None, 0, 0)
    )(x, torch.stack([W, 2 * W]), torch.stack([b, -b])),
    "vmap(vmap(grad)): each model's gradient of each example": lambda f, x, W, b: vmap(
        vmap(grad(energy(f), ALL), (0, None, None)), (None, 0, 0)
    )(x, torch.stack([W, 2 * W]), torch.stack([b, -b])),
    "grad(vmap)": lambda f, x, W, b: grad(energy(vmap(f, (0, None, None))), ALL)(
        x, W, b
    ),
    "jvp(vmap)": lambda f, *args: push(vmap(f, (0, None, None)), *args),
    "hessian(vmap)": lambda f, x, W, b: hessian(
        lambda W: energy(vmap(f, (0, None, None)))(x, W, b)
    )(W),
    "jvp(vmap(grad))": lambda f, *args: push(
        lambda *args: vmap(grad(energy(f), 1), (0, None, None))(*args), *args
    ),
    "mapped tangents": lambda f, x, W, b: vmap(
        lambda t: jvp(lambda W: f(x, W, b), (W,), (t,))[1]
    )(torch.stack([W, 2 * W])),
    "mapped output gradients": lambda f, *args: vmap(vjp(f, *args)[1])(
        rand(5, 3, 2, seed=9)
    ),
}  # fmt: skip


@all_layers
@pytest.mark.parametrize("name", OF_VMAP)
def test_layer_under_nested_vmap(layer, name):
    args = (t.detach() for t in operands(layer, (3,), 4, 2))
    compare(OF_VMAP[name], layer, layer.native, *args)


# ---------------------------------------------------------------- costs

# Each takes a cost f(v, y) with v and y (4, 3), and differentiates by v.
OF_COSTS = {
    "grad": lambda f, v, y: grad(f)(v, y),
    "grad_and_value": lambda f, v, y: grad_and_value(f)(v, y),
    "vjp": lambda f, v, y: pull(lambda v: f(v, y), v),
    "jvp": lambda f, v, y: push(lambda v: f(v, y), v),
    "linearize": lambda f, v, y: linearize(lambda v: f(v, y), v)[1](*tangents(v)),
    "jvp(grad)": lambda f, v, y: push(lambda v: grad(f)(v, y), v),
    "jvp(jvp)": lambda f, v, y: push(lambda v: push(lambda v: f(v, y), v), v),
    "vjp(jvp)": lambda f, v, y: pull(lambda v: push(lambda v: f(v, y), v), v),
    "grad(grad)": lambda f, v, y: grad(lambda v: energy(grad(f))(v, y))(v),
    "jacrev(jacrev)": lambda f, v, y: jacrev(jacrev(f))(v, y),
    "jacfwd(jacfwd)": lambda f, v, y: jacfwd(jacfwd(f))(v, y),
    "vmap": lambda f, v, y: vmap(f)(v, y),
    "vmap by columns": lambda f, v, y: vmap(f, 1)(v.t(), y.t()),
    "vmap by v": lambda f, v, y: vmap(f, (0, None))(v, y[0]),
    "vmap by y": lambda f, v, y: vmap(f, (None, 0))(v[0], y),
    "vmap(grad) by v": lambda f, v, y: vmap(grad(f), (0, None))(v, y[0]),
    "vmap(grad) by y": lambda f, v, y: vmap(grad(f), (None, 0))(v[0], y),
    "vmap(jvp)": lambda f, v, y: vmap(lambda v, y: push(lambda v: f(v, y), v))(v, y),
    "vmap(hessian)": lambda f, v, y: vmap(hessian(f))(v, y),
    "vmap(vmap(grad))": lambda f, v, y: vmap(vmap(grad(f), (None, 0)), (0, None))(v, y),
    "grad(vmap)": lambda f, v, y: grad(energy(vmap(f)))(v, y),
    "jvp(vmap(grad))": lambda f, v, y: push(lambda v: vmap(grad(f))(v, y), v),
}


# Where torch's own losses fail (binary_cross_entropy_with_logits on a tangent of zeros,
# mse_loss under two vmaps), native gives the same numbers in another way.
FOR_NATIVE = {
    "jacfwd(jacfwd)": OF_COSTS["jacrev(jacrev)"],
    "vmap(vmap(grad))": lambda f, v, y: torch.stack(
        [vmap(grad(f), (None, 0))(row, y) for row in v]
    ),
}


@all_costs
@pytest.mark.parametrize("name", OF_COSTS)
def test_cost(cost, name):
    v, y = rand(4, 3), target_for(cost, 4, 3)
    native = FOR_NATIVE.get(name, OF_COSTS[name])
    assert_equal(OF_COSTS[name](cost, v, y), native(cost.native, v, y))


@all_costs
def test_gradient_by_the_target_is_refused(cost):
    """A2, in reverse mode; test_costs has it for forward mode."""
    with pytest.raises(ValueError, match="A2"):
        grad(cost, argnums=1)(rand(4, 3), target_for(cost, 4, 3))


# ---------------------------------------------------------------- networks


def network(layer, ours, seed=0):
    """Two layers as modules, ours or native with the very same parameters."""

    class Native(nn.Linear):
        def forward(self, input):
            return layer.native(input, self.weight, self.bias)

    make = layer.module if ours else Native
    model = nn.Sequential(make(4, 3, dtype=F64), make(3, 2, dtype=F64))
    model.load_state_dict(
        {name: rand(*p.shape, seed=seed + i) / 2
         for i, (name, p) in enumerate(model.state_dict().items())}
    )  # fmt: skip
    return model


def both(layer, cost, transform):
    """The transform of (parameters, x, y) -> C, for ours and for native."""
    x, y = rand(5, 4, seed=30), target_for(cost, 5, 2)
    results = []
    for ours in (True, False):
        model, c = network(layer, ours), cost if ours else cost.native
        params = {k: p.detach() for k, p in model.named_parameters()}

        def objective(params, x, y, model=model, c=c):
            return c(functional_call(model, params, (x,)), y)

        results.append(transform(objective, params, x, y))
    return results


OF_NETWORKS = {
    "gradient": lambda f, p, x, y: grad(f)(p, x, y),
    "per-example gradients": lambda f, p, x, y: vmap(grad(f), (None, 0, 0))(p, x, y),
    "hessian": lambda f, p, x, y: hessian(f)(p, x, y),
    "per-example hessians": lambda f, p, x, y: vmap(hessian(f), (None, 0, 0))(p, x, y),
    "hessian times vector": lambda f, p, x, y: jvp(
        lambda p: grad(f)(p, x, y), (p,), ({k: 2 * t for k, t in p.items()},)
    ),
}


@all_layers
@all_costs
@pytest.mark.parametrize("name", OF_NETWORKS)
def test_functional_call(layer, cost, name):
    assert_equal(*both(layer, cost, OF_NETWORKS[name]))


@all_layers
def test_per_example_gradients_average_to_the_gradient(layer):
    def both_ways(f, p, x, y):
        each = vmap(grad(f), (None, 0, 0))(p, x, y)
        return {k: t.mean(0) for k, t in each.items()}, grad(f)(p, x, y)

    assert_equal(*both(layer, COSTS["quadratic"], both_ways)[0])


@all_layers
def test_ensemble(layer):
    """Three models as one: outputs and each model's gradient."""
    x = rand(5, 4, seed=30)
    results = []
    for ours in (True, False):
        models = [network(layer, ours, seed) for seed in (0, 10, 20)]
        params, buffers = stack_module_state(models)

        def call(params, x, model=models[0]):
            return functional_call(model, params, (x,))

        y = vmap(call, (0, None))(params, x)
        assert_equal(y, torch.stack([model(x) for model in models]))
        y.square().sum().backward()
        stacked = {k: p.grad for k, p in params.items()}
        each = vmap(grad(energy(call)), (0, None))(params, x)
        assert_equal(stacked, each)
        assert not buffers
        results.append((y, stacked))
    assert_equal(*results)


@all_layers
@pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS.keys())
def test_network_derivatives(layer, cost):
    """Layers and a cost together, against finite differences, in every mode."""
    x, W, b = operands(layer, (3,), 4, 3)
    V, c = (t.requires_grad_() for t in (rand(2, 3, seed=7), rand(2, seed=8)))
    last, y = LAYERS["linear"], target_for(cost, 3, 2)

    def f(*args):
        return cost(last(layer(*args[:3]), *args[3:]), y)

    check_first(f, x, W, b, V, c)
    check_second(f, x, W, b, V, c)


# ---------------------------------------------------------------- forward mode

SUBSETS = [s for n in (0, 1, 2, 3) for s in itertools.combinations("xWb", n)]


def dual(args, subset):
    """The arguments, those in the subset with a tangent."""
    return [
        forward_ad.make_dual(t, direction(t, 10 * i)) if name in subset else t
        for i, (name, t) in enumerate(zip("xWb", args, strict=True))
    ]


@all_layers
@pytest.mark.parametrize("subset", SUBSETS, ids=lambda s: "".join(s) or "none")
@pytest.mark.parametrize("rows", [(), (3,), (2, 3)], ids=str)
def test_dual_arguments(layer, subset, rows):
    args = [t.detach() for t in operands(layer, rows, 4, 2)]
    with forward_ad.dual_level():
        ours, native = (
            forward_ad.unpack_dual(f(*dual(args, subset)))
            for f in (layer, layer.native)
        )
        assert (ours.tangent is None) == (not subset)
        assert_equal(tuple(ours), tuple(native))


@all_layers
@pytest.mark.parametrize("subset", SUBSETS[1:], ids="".join)
def test_forward_over_reverse(layer, subset):
    """The tangents of the gradients, with torch.autograd alone."""
    results = []
    for f in (layer, layer.native):
        args = operands(layer, (3,), 4, 2)
        with forward_ad.dual_level():
            duals = dual(args, subset)
            grads = torch.autograd.grad(energy(f)(*duals), duals, create_graph=True)
            unpacked = [forward_ad.unpack_dual(t) for t in grads]
            results.append([(t.primal, t.tangent) for t in unpacked])
    assert_equal(*results)


@all_layers
@pytest.mark.parametrize("partly", [False, True])
def test_dual_parameters_of_a_module(layer, partly):
    x, results = rand(5, 4, seed=30), []
    for ours in (True, False):
        model = network(layer, ours)
        names = [k for k, _ in model.named_parameters()][: 1 if partly else None]
        with forward_ad.dual_level():
            params = {
                k: forward_ad.make_dual(p, torch.ones_like(p)) if k in names else p
                for k, p in model.named_parameters()
            }
            y = functional_call(model, params, (x,))
            results.append(tuple(forward_ad.unpack_dual(y)))
    assert_equal(*results)


@all_layers
def test_dual_arguments_without_grad(layer):
    """no_grad switches reverse mode off, and not forward mode."""
    args = operands(layer, (3,), 4, 2)
    with forward_ad.dual_level(), torch.no_grad():
        ours, native = (
            forward_ad.unpack_dual(f(*dual(args, "xWb"))) for f in (layer, layer.native)
        )
        assert not ours.primal.requires_grad
        assert_equal(tuple(ours), tuple(native))


@all_costs
@pytest.mark.parametrize("labels", [False, True])
def test_dual_outputs_into_a_cost(cost, labels):
    v, y = rand(4, 3), target_for(cost, 4, 3)
    chosen = torch.tensor([0, 2, 1, 0])
    one_hot = nn.functional.one_hot(chosen, 3).to(F64)
    with forward_ad.dual_level():
        d = forward_ad.make_dual(v, *tangents(v))
        ours = forward_ad.unpack_dual(cost(d, chosen if labels else y))
        native = forward_ad.unpack_dual(cost.native(d, one_hot if labels else y))
        assert_equal(tuple(ours), tuple(native))


# ---------------------------------------------------------------- finite differences

# What follows a layer decides how the gradient that reaches it lies in memory.
AFTER = {
    "transposed": lambda y: y.transpose(0, -1) * 1,
    "narrow": lambda y: torch.cat([y, torch.ones_like(y)], -1),
    "stride 0": lambda y: y.sum(-1),
    "strided": lambda y: torch.stack([y, torch.ones_like(y)], -1),
}


@all_layers
@pytest.mark.parametrize("after", AFTER.values(), ids=AFTER.keys())
@pytest.mark.parametrize("rows", [(3,), (2, 2)], ids=str)
def test_derivatives_with_output_gradients_of_any_layout(layer, after, rows):
    seen = set()

    def look(g):
        if g is not None:  # gradcheck tries what happens without one, too
            seen.add(g.is_contiguous())

    def f(*args):
        y = layer(*args)
        if y.requires_grad:
            y.register_hook(look)
        return after(y)

    args = operands(layer, rows, 3, 2)
    check_first(f, *args)
    modes = {"check_batched_grad": True, "check_fwd_over_rev": True}
    modes["check_rev_over_rev"] = modes["gen_non_contig_grad_outputs"] = True
    without_warnings(gradgradcheck, f, args, **modes, **bounds.difference())
    assert False in seen, "the gradients were to be non-contiguous"


@all_layers
def test_second_derivatives_along_one_output_gradient(layer):
    """gradgradcheck with a given output gradient, strided in memory."""
    args = operands(layer, (3,), 3, 2)
    g = rand(3, 4, seed=9)[:, ::2].requires_grad_()
    assert not g.is_contiguous()
    modes = {"check_batched_grad": True, "check_fwd_over_rev": True}
    without_warnings(gradgradcheck, layer, args, (g,), **modes, **bounds.difference())


def test_every_public_layer_and_cost_is_in_the_tables():
    layers = {layer.module for layer in LAYERS.values()}
    costs = {cost.module for cost in COSTS.values()}
    assert set(torchbp.nn.ACTIVATIONS.values()) <= layers
    public = {getattr(torchbp.costs, n) for n in torchbp.costs.__all__ if "Cost" in n}
    assert {c for c in public if issubclass(c, nn.Module)} <= costs
