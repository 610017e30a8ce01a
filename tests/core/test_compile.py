"""torch.compile: whole graphs, few of them, and the hand-written backward inside.

Right numbers do not show whose backward ran, since a compiler may differentiate the
forward itself. So each way of compiling is also run with layers and costs whose
backward is wrong on purpose, by a factor of 2: where ours runs, the result doubles.
test_functional and test_costs compile every layer and every cost alone.

What torch does with our Functions, as measured with 2.8, 2.14 and 2.15:

==============================  ===========  ==================  ==================
inside torch.compile            torch 2.8    torch 2.14          torch 2.15
==============================  ===========  ==================  ==================
forward, then backward          ours         ours                ours
compiled autograd, boxed off    ours         ours                ours
compiled autograd, boxed on     (no boxed    ours after a compiled forward,
                                gradients)   else refused
autograd.grad inside the graph  refused      ours, with trace_autograd_ops
torch.func.grad, vjp, jacrev    torch's own  torch's own         ours
grad of functional_call         torch's own  torch's own         ours
vmap(grad), hessian, jvp(grad)  torch's own  torch's own         refused: Internal-
                                                                 TorchDynamoError
vmap of a module                torch's own  torch's own         refused
torch.func.jvp, jacfwd          torch's own  torch's own         torch's own
torch.func.grad(compiled)       refused      refused             refused
==============================  ===========  ==================  ==================

"Torch's own" is our choice before 2.15 (torchbp._autograd.call): left alone, 2.14 gives
zeros for the parameters of every layer after the first.
"""

import contextlib

import bounds
import pytest
import torch
from cases import (
    COSTS,
    F64,
    LAYERS,
    all_costs,
    all_layers,
    has_compiler,
    operands,
    rand,
    target_for,
)
from torch import nn
from torch._dynamo.exc import InternalTorchDynamoError, Unsupported
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.testing import assert_close

import torchbp
from torchbp import costs, functional
from torchbp._autograd import COMPILES_IN_TRANSFORMS

pytestmark = [
    # torch warns of its own use of torch.jit.script when it first traces.
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning"),
    # Dynamo looks at the .grad of whatever enters a graph.
    pytest.mark.filterwarnings(
        "ignore:The .grad attribute of a Tensor that is not a l"
    ),
]
SOME_LAYERS = ["sigmoid", "relu", "silu (z)"]
needs_boxed = pytest.mark.skipif(
    not hasattr(torch.autograd.Function, "boxed_grads_call"),
    reason="needs torch >= 2.13, the first with boxed gradients",
)
needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device"
)
some_layers = pytest.mark.parametrize(
    "layer", [LAYERS[n] for n in SOME_LAYERS], ids=SOME_LAYERS
)
all_backends = pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=has_compiler)]
)
LABELS = torch.tensor([0, 2, 1, 0])


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def _boxed_as_before():
    before = functional.LinearFunction.boxed_grads_call
    yield
    functional.LinearFunction.boxed_grads_call = before


def compiled(f, backend="aot_eager", **options):
    return torch.compile(f, fullgraph=True, backend=backend, **options)


def mlp(activation="sigmoid", output="identity", dtype=F64):
    model = torchbp.MLP([5, 4, 3], activation, output, dtype=dtype)
    model.load_state_dict(
        {k: rand(*p.shape, seed=i, dtype=dtype)
         for i, (k, p) in enumerate(model.state_dict().items())}
    )  # fmt: skip
    return model


def gradients(model, value):
    return torch.autograd.grad(value, list(model.parameters()))


# ---------------------------------------------------------------- whole graphs


# Every layer with one cost, and every other cost with one layer.
PAIRS = [(name, "log-likelihood") for name in LAYERS]
PAIRS += [("sigmoid", name) for name in COSTS if name != "log-likelihood"]


@pytest.mark.parametrize(("layer", "cost"), PAIRS)
@pytest.mark.parametrize("labels", [False, True])
def test_network_and_cost(layer, cost, labels):
    """In one graph: value and gradients as in eager mode."""
    cost, model, x = COSTS[cost], mlp(LAYERS[layer].module), rand(4, 5, seed=30)
    y = LABELS if labels else target_for(cost, 4, 3)

    def f(x, y):
        return cost(model(x), y)

    value, expected = compiled(f)(x, y), f(x, y)
    assert_close(value, expected)
    assert_close(gradients(model, value), gradients(model, expected))


@all_backends
def test_network_and_cost_in_float32(backend):
    model, x = mlp(dtype=torch.float32), rand(4, 5, seed=30, dtype=torch.float32)

    def f(x):
        return costs.log_likelihood_cost(model(x), LABELS)

    value, expected = compiled(f, backend)(x), f(x)
    assert_close(value, expected)
    assert_close(gradients(model, value), gradients(model, expected))


@pytest.mark.parametrize("rows", [(), (2, 3), (0,)], ids=str)
def test_shapes(rows):
    model, x = mlp("tanh"), rand(*rows, 5, seed=30)
    y, expected = compiled(model)(x), model(x)
    assert_close(y, expected)
    g = rand(*y.shape, seed=9)
    ours, native = (
        torch.autograd.grad(v, list(model.parameters()), g) for v in (y, expected)
    )
    assert_close(ours, native)


def trained(model, step, steps=3):
    x, y = rand(4, 5, seed=30), target_for(COSTS["quadratic"], 4, 3)
    for _ in range(steps):
        step(x, y)
    return [p.detach() for p in model.parameters()]


def training_step(model, cost, optimizer):
    def step(x, y):
        optimizer.zero_grad()
        value = cost(model(x), y)
        value.backward()
        optimizer.step()
        return value.detach()

    return step


# Dynamo tells that it leaves the optimizer's profiler marks out.
@pytest.mark.filterwarnings("ignore:Profiler :UserWarning")
def test_training_step():
    """Forward, backward and update in one function; Dynamo breaks the graph at
    backward(), and what follows is the optimizer's graph."""
    weights = []
    for wrap in (lambda step: step, torch.compile(backend="aot_eager")):
        model = mlp("sigmoid", "sigmoid")
        cost = torchbp.QuadraticCost()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        step = training_step(model, cost, optimizer)
        weights.append(trained(model, wrap(step)))
    assert_close(*weights)


# ---------------------------------------------------------------- recompilation


@pytest.mark.parametrize(
    ("dynamic", "frames"), [(None, 2), (True, 1)], ids=["automatic", "dynamic"]
)
@pytest.mark.parametrize(
    "cost", [COSTS["quadratic"], COSTS["log-likelihood"]], ids=["quadratic", "log-l."]
)
@pytest.mark.parametrize("labels", [False, True])
def test_batch_sizes_share_a_graph(cost, labels, dynamic, frames):
    """The first size is compiled in; at the second, torch makes the size a symbol. None
    is a width of the network: torch would take the two for one symbol."""
    counter, model = CompileCounterWithBackend("aot_eager"), mlp()
    f = compiled(lambda x, y: cost(model(x), y), counter, dynamic=dynamic)
    for n in (7, 11, 2, 100):
        x, y = rand(n, 5, seed=n), target_for(cost, n, 3)
        y = y.argmax(-1) if labels else y
        value, expected = f(x, y), cost(model(x), y)
        assert_close(value, expected)
        assert_close(gradients(model, value), gradients(model, expected))
    assert counter.frame_count == frames


def test_batches_of_one_and_none_have_their_own_graphs():
    """As with native layers: torch always compiles the sizes 0 and 1 in."""
    frames = []
    for model in (mlp(), nn.Linear(5, 3, dtype=F64)):
        counter = CompileCounterWithBackend("aot_eager")
        f = compiled(model, counter)
        for n in (5, 7, 1, 0, 9, 1, 0):
            f(rand(n, 5))
        frames.append(counter.frame_count)
    assert frames == [4, 4]


def test_marked_dimension():
    counter, model = CompileCounterWithBackend("aot_eager"), mlp()
    f = compiled(model, counter)
    for n in (5, 7, 11):
        x = rand(n, 5)
        torch._dynamo.mark_dynamic(x, 0)
        f(x)
    assert counter.frame_count == 1


def test_modes_have_their_own_graphs():
    """Training, no_grad and autocast do not share a graph, nor break each other's."""
    model, x = mlp(dtype=torch.float32), rand(4, 5, dtype=torch.float32)
    f = compiled(model)
    assert f(x).requires_grad
    with torch.no_grad():
        assert not f(x).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert f(x).dtype == torch.bfloat16
    assert f(x).dtype == torch.float32
    assert f(x).requires_grad


# ---------------------------------------------------------------- whose backward


class DoubledSlope(functional.LinearSigmoidFunction):
    @staticmethod
    def gate(grad_a, a):
        return 2 * grad_a * a * (1 - a)


class DoubledNabla(costs.QuadraticFunction):
    @staticmethod
    def nabla(a, y):
        return 2 * (a - y)


class WrongSigmoid(torchbp.BPLinearSigmoid):
    function = DoubledSlope


def wrong_cost(input, target):
    return costs.cost(DoubledNabla, input, target)


def single_layer(wrong):
    make = WrongSigmoid if wrong else torchbp.BPLinearSigmoid
    model = nn.Sequential(make(5, 3, dtype=F64))
    for i, p in enumerate(model.parameters()):
        p.data = rand(*p.shape, seed=i)
    return model


@all_backends
@pytest.mark.parametrize("wrong", ["layer", "cost"])
def test_compiled_backward_is_ours(backend, wrong):
    x, y = rand(4, 5, seed=30), target_for(COSTS["quadratic"], 4, 3)
    results = []
    for is_wrong in (False, True):
        model = single_layer(is_wrong and wrong == "layer")
        cost = costs.quadratic_cost if wrong == "layer" or not is_wrong else wrong_cost
        value = compiled(lambda x, y: cost(model(x), y), backend)(x, y)  # noqa: B023
        results.append((value.detach(), gradients(model, value)))
    (value, right), (same, doubled) = results
    assert_close(same, value)
    assert_close(doubled, tuple(2 * t for t in right))


@all_backends
@pytest.mark.filterwarnings("ignore:Profiler :UserWarning")
def test_compiled_step_is_ours(backend):
    """One step of SGD with a doubled gradient goes twice as far."""
    moved = []
    for wrong in (False, True):
        model = single_layer(wrong)
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = training_step(model, costs.quadratic_cost, optimizer)
        after = trained(model, torch.compile(step, backend=backend), steps=1)
        moved.append([p - q for p, q in zip(after, before, strict=True)])
    assert_close(moved[1], [2 * t for t in moved[0]])


# ---------------------------------------------------------------- around torch.func

# The transforms of energy(W) = sum of a layer's squared outputs.
TRANSFORMS = {
    "grad": lambda f, W: grad(f)(W),
    "vjp": lambda f, W: vjp(f, W)[1](torch.ones((), dtype=F64))[0],
    "jacrev": lambda f, W: jacrev(f)(W),
    "jvp": lambda f, W: jvp(f, (W,), (W,))[1],
    "jacfwd": lambda f, W: jacfwd(f)(W),
    "vmap(grad)": lambda f, W: vmap(grad(f))(torch.stack([W, W])),
    "hessian": lambda f, W: hessian(f)(W),
    "jvp(grad)": lambda f, W: jvp(grad(f), (W,), (W,))[1],
}
REVERSE = ["grad", "vjp", "jacrev"]
FORWARD = ["jvp", "jacfwd"]
NESTED = ["vmap(grad)", "hessian", "jvp(grad)"]


def of_weight(f):
    x, W, b = (t.detach() for t in operands(LAYERS["relu"]))
    return W, lambda W: f(x, W, b).square().sum()


def compiled_transform(name, f):
    W, energy = of_weight(f)
    return compiled(lambda W: TRANSFORMS[name](energy, W))(W)


def wrong_layer(x, W, b):
    return functional.layer(DoubledSlope, x, W, b)


@all_layers
@pytest.mark.parametrize("name", REVERSE)
def test_around_reverse_mode(layer, name):
    W, energy = of_weight(layer.native)
    assert_close(compiled_transform(name, layer), TRANSFORMS[name](energy, W))


@some_layers
@pytest.mark.parametrize("name", FORWARD)
def test_around_forward_mode(layer, name):
    W, energy = of_weight(layer.native)
    assert_close(compiled_transform(name, layer), TRANSFORMS[name](energy, W))


@some_layers
@pytest.mark.parametrize("name", REVERSE)
def test_around_reverse_mode_over_two_layers(layer, name):
    """Where torch 2.14 takes our Functions, it loses the second one's parameters."""
    x = rand(4, 5, seed=30)
    parameters = (rand(4, 5), rand(4), rand(3, 4), rand(3))

    def transformed(layer, parameters):
        def energy(p):
            return layer(layer(x, *p[:2]), *p[2:]).square().sum()

        return TRANSFORMS[name](energy, parameters)

    ours = compiled(lambda p: transformed(layer, p))(parameters)
    assert_close(ours, transformed(layer.native, parameters))


@pytest.mark.parametrize("name", REVERSE)
def test_whose_backward_runs_around_reverse_mode(name):
    """Ours on torch 2.15; before, torch differentiates the forward operations, and a
    backward that is wrong gives right numbers."""
    W, energy = of_weight(LAYERS["sigmoid"].native)
    factor = 2 if COMPILES_IN_TRANSFORMS else 1
    got = compiled_transform(name, wrong_layer)
    assert_close(got, factor * TRANSFORMS[name](energy, W))


@pytest.mark.parametrize("name", FORWARD)
def test_whose_jvp_runs_around_forward_mode(name):
    """Never ours: the lean form, which torch.compile needs, has no jvp, and Dynamo
    differentiates the forward. Outside torch.compile ours runs: it doubles."""
    W, energy = of_weight(LAYERS["sigmoid"].native)
    right = TRANSFORMS[name](energy, W)
    assert_close(compiled_transform(name, wrong_layer), right)
    assert_close(TRANSFORMS[name](of_weight(wrong_layer)[1], W), 2 * right)


@some_layers
@pytest.mark.parametrize("name", NESTED)
def test_around_nested_transforms(layer, name):
    """Torch's own derivative before 2.15. torch 2.15 refuses: what Dynamo makes of a
    Function can neither be mapped nor pushed forward."""
    if not COMPILES_IN_TRANSFORMS:
        W, energy = of_weight(layer.native)
        assert_close(compiled_transform(name, layer), TRANSFORMS[name](energy, W))
    else:
        with pytest.raises((InternalTorchDynamoError, Unsupported)):
            compiled_transform(name, layer)


@some_layers
def test_around_vmap_of_a_module(layer):
    """From 2.15 on torch refuses it, with no result: what Dynamo makes of a Function
    has no rule for vmap. The layer in a region that Dynamo leaves to eager mode is the
    way out."""
    model, x = layer.module(5, 3, dtype=F64), rand(4, 5)
    compiled = torch.compile(lambda x: vmap(model)(x), backend="aot_eager")
    if not COMPILES_IN_TRANSFORMS:
        assert_close(compiled(x), model(x))
    else:
        with pytest.raises((InternalTorchDynamoError, Unsupported)):
            compiled(x)
    torch.compiler.reset()
    mapped = torch.compiler.disable(lambda x: vmap(model)(x))
    y = torch.compile(lambda x: 2 * mapped(x), backend="aot_eager")(x)
    assert_close(y, 2 * model(x))


@some_layers
@pytest.mark.parametrize("name", [*REVERSE, *NESTED])
def test_transform_of_an_uncompiled_layer(layer, name):
    """The way out, where a compiled one is refused or is not ours: the layer in a
    region that Dynamo leaves to eager mode."""
    W, energy = of_weight(layer.native)
    x, _, b = (t.detach() for t in operands(LAYERS["relu"]))

    @torch.compiler.disable
    def transformed(W):
        return TRANSFORMS[name](lambda W: layer(x, W, b).square().sum(), W)

    f = torch.compile(lambda W: 1 * transformed(W), backend="aot_eager")
    assert_close(f(W), TRANSFORMS[name](energy, W))


@all_costs
def test_around_gradient_of_a_cost(cost):
    v, y = rand(4, 3), target_for(cost, 4, 3)
    for target, native in ((y, y), (LABELS, nn.functional.one_hot(LABELS, 3).to(F64))):
        ours = compiled(lambda v, y=target: grad(cost)(v, y))(v)
        assert_close(ours, grad(cost.native)(v, native))


def test_transform_of_a_compiled_function_is_refused():
    W, energy = of_weight(LAYERS["sigmoid"])
    with pytest.raises(Unsupported, match="functorch"):
        grad(compiled(energy))(W)


def test_around_functional_call():
    model, x = mlp(), rand(4, 5, seed=30)
    params = {k: p.detach() for k, p in model.named_parameters()}

    def f(params):
        y = functional_call(model, params, (x,))
        return costs.log_likelihood_cost(y, LABELS)

    ours = compiled(grad(f))(params)
    value = costs.log_likelihood_cost(model(x), LABELS)
    assert_close(list(ours.values()), list(gradients(model, value)))


@needs_boxed
@pytest.mark.parametrize("wrong", [False, True])
def test_autograd_grad_inside_the_graph(wrong):
    """Forward and backward in a single graph; torch 2.8 has no such switch."""
    x, y = rand(4, 5, seed=30), target_for(COSTS["quadratic"], 4, 3)
    model = single_layer(wrong)

    def f(x, y):
        return gradients(model, costs.quadratic_cost(model(x), y))

    with torch._dynamo.config.patch(trace_autograd_ops=True):
        ours = compiled(f)(x, y)
    assert_close(ours, f(x, y))
    if wrong:
        right = single_layer(False)
        expected = gradients(right, costs.quadratic_cost(right(x), y))
        assert_close(ours, tuple(2 * t for t in expected))


# ---------------------------------------------------------------- compiled autograd


def compiled_autograd():
    compile_backward = torch._dynamo.compiled_autograd._enable
    return compile_backward(compiled_graph)


def compiled_graph(graph):
    return torch.compile(graph, backend="aot_eager", fullgraph=True)


def backward_of(model, forward, context):
    x, y = rand(4, 5, seed=30), target_for(COSTS["quadratic"], 4, 3)
    with context:
        costs.quadratic_cost(forward(x), y).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("forward", ["eager", "compiled"])
@pytest.mark.parametrize("wrong", [False, True])
def test_compiled_autograd(forward, wrong):
    """Without boxed gradients it works whatever ran the forward, and runs ours."""
    functional.boxed_gradients(False)
    model, right = single_layer(wrong), single_layer(False)
    f = compiled(model) if forward == "compiled" else model
    ours = backward_of(model, f, compiled_autograd())
    expected = backward_of(right, right, contextlib.nullcontext())
    assert_close(ours, [(1 + wrong) * t for t in expected])


@needs_boxed
def test_compiled_autograd_with_boxed_gradients():
    """With them torch refuses what ran eagerly, and takes what was compiled. Should
    torch learn it, this fails: then boxed_gradients needs no mention of it."""
    functional.boxed_gradients(True)
    model, expected = single_layer(False), single_layer(False)
    with pytest.raises(RuntimeError, match=r"boxed_grads_call=True .* not supported"):
        backward_of(model, model, compiled_autograd())
    assert all(p.grad is None for p in model.parameters())
    ours = backward_of(model, compiled(model), compiled_autograd())
    assert_close(ours, backward_of(expected, expected, contextlib.nullcontext()))


# ---------------------------------------------------------------- autocast inside


@all_layers
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_autocast(layer, where):
    """Computes in bfloat16, whether autocast is compiled or around what is."""
    model = mlp(layer.module, dtype=torch.float32)
    x = rand(4, 5, seed=30, dtype=torch.float32)

    def f(x):
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
            return y, costs.log_likelihood_cost(y, LABELS)

    if where == "inside":
        y, value = compiled(f)(x)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            y = compiled(model)(x)
            value = compiled(costs.log_likelihood_cost)(y, LABELS)
    assert (y.dtype, value.dtype) == (torch.bfloat16, torch.float32)
    expected_y, expected = f(x)
    assert_close(y, expected_y)
    assert_close(value, expected)
    for ours, eager in zip(
        gradients(model, value), gradients(model, expected), strict=True
    ):
        assert ours.dtype == torch.float32
        # bfloat16 sums in another order, relative to the largest.
        off = bounds.network(torch.bfloat16, longest=8, layers=1)
        bounds.assert_within(ours, eager, off * float(eager.abs().max()))


# ---------------------------------------------------------------- CUDA


@needs_cuda
@pytest.mark.parametrize("wrong", [False, True])
def test_reduce_overhead_on_cuda(wrong):
    """CUDA graphs, replayed: the third call is the first that only replays."""
    x, y = (t.cuda() for t in (rand(4, 5), target_for(COSTS["quadratic"], 4, 3)))
    model, right = single_layer(wrong).cuda(), single_layer(False).cuda()

    def f(x, y):
        return costs.quadratic_cost(model(x), y)

    graphed = torch.compile(f, fullgraph=True, mode="reduce-overhead")
    expected = gradients(right, costs.quadratic_cost(right(x), y))
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        ours = gradients(model, graphed(x, y))
        assert_close(ours, tuple((1 + wrong) * t for t in expected))
