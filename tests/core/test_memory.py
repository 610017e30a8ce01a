"""Memory: what is kept and for how long, counted in the allocator's own bytes.

What the layers save for which gradient is tested in test_functional.py; here are whole
networks: when their tensors go, and how many bytes live at once.
"""

import contextlib
import gc
import weakref
from itertools import pairwise

import pytest
import torch
from cases import BUILT_IN, LAYERS, all_layers, rand
from torch import nn
from torch.profiler import ProfilerActivity, profile

import torchbp
from torchbp._autograd import HAS_BOXED_GRADS

F32 = torch.float32


def network(layer, *sizes):
    return nn.Sequential(*(layer.module(*pair) for pair in pairwise(sizes)))


def allocations(step):
    """Bytes of every allocation (above 0) and release (below) during `step`, in order.

    They are the CPU allocator's own events, the same in every run.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = recorded.profiler.kineto_results.events()
    memory = [event for event in events if event.name() == "[memory]"]
    return [event.nbytes() for event in sorted(memory, key=lambda e: e.start_ns())]


def peak(sizes):
    """The most bytes that lived at once."""
    now = highest = 0
    for size in sizes:
        now += size
        highest = max(highest, now)
    return highest


# ---------------------------------------------------------------- when tensors go


@contextlib.contextmanager
def without_collector():
    """Whatever goes in here goes by its reference count: it was in no cycle."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@all_layers
@pytest.mark.parametrize("swept", [True, False])
def test_output_and_graph_go_with_the_last_reference(layer, swept):
    model, x = network(layer, 5, 4, 3), rand(3, 5, dtype=F32)
    between = []
    model[0].register_forward_hook(lambda *call: between.append(weakref.ref(call[2])))
    with without_collector():
        y = model(x)
        if swept:
            y.sum().backward()
        output, node = weakref.ref(y), weakref.ref(y.grad_fn)
        assert swept or between[0]() is not None, "kept for the backward pass"
        del y
        assert output() is node() is between[0]() is None


def train_step(model, x, cost):
    for parameter in model.parameters():
        parameter.grad = None
    cost(model(x)).backward()


TWICE = "retain_graph", "create_graph"


@all_layers
@pytest.mark.parametrize("how", ["once", *TWICE])
def test_no_reference_cycles(layer, how):
    """The collector has nothing to do after forward and backward passes."""
    x = rand(3, 5, dtype=F32).requires_grad_()
    W = rand(4, 5, dtype=F32).requires_grad_()

    def passes():
        y = layer(x, W).square().sum()
        (grad,) = torch.autograd.grad(y, x, **({how: True} if how in TWICE else {}))
        if how == "retain_graph":
            torch.autograd.grad(y, W)
        elif how == "create_graph":
            torch.autograd.grad(grad.square().sum(), (x, W))

    passes()  # whatever torch sets up at the first call
    with without_collector():
        for _ in range(3):
            passes()
        assert gc.collect() == 0


def test_no_reference_cycles_when_observing_and_converting():
    model = torchbp.MLP([5, 4, 3])
    x, cost = rand(3, 5, dtype=F32), torchbp.QuadraticCost()
    y = torch.zeros(3, 3)

    def passes():
        with torchbp.observe(model):
            cost(model(x), y).backward()
        cost(torchbp.to_native(model)(x), y).backward()

    passes()
    with without_collector():
        passes()
        assert gc.collect() == 0


@all_layers
def test_thousands_of_steps_do_not_grow(layer):
    """Not one byte more after 2,000 steps than after one, and no object more."""
    model, x = network(layer, 5, 4, 3), rand(3, 5, dtype=F32)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-3)

    def steps(count):
        for _ in range(count):
            optimiser.zero_grad(set_to_none=False)
            model(x).square().sum().backward()
            optimiser.step()

    steps(2)  # the first makes the .grad tensors
    gc.collect()
    objects = len(gc.get_objects())
    steps(1998)
    gc.collect()
    assert len(gc.get_objects()) <= objects + 10  # the interpreter's own caches
    assert sum(allocations(lambda: steps(1))) == 0


# ---------------------------------------------------------------- what is not kept


def bytes_saved(model, x):
    """Bytes that a forward pass keeps for the backward pass, parameters aside."""
    saved, parameters = {}, {p.data_ptr() for p in model.parameters()}

    def pack(t):
        saved[t.data_ptr()] = t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    del y
    return sum(size for start, size in saved.items() if start not in parameters)


LAYER_BYTES = 7 * 4  # a batch of 7 rows, float32: times the width of a layer


@pytest.mark.parametrize("name", BUILT_IN)
def test_bytes_kept_for_backward(name):
    """Exactly the activations, and no z: half of what a z beside each a would take."""
    model, x = network(LAYERS[name], 11, 5, 3), rand(7, 11, dtype=F32)
    last = 0 if name == "linear" else 3  # σ' of the identity needs nothing
    assert bytes_saved(model, x) == LAYER_BYTES * (11 + 5 + last)


@pytest.mark.parametrize("name", BUILT_IN)
def test_frozen_layers_keep_nothing(name):
    """Below the first trained layer nothing is kept; above it, no input for a W that
    is not trained."""
    x = rand(7, 11, dtype=F32)
    gate = 0 if name == "linear" else 1

    lower = network(LAYERS[name], 11, 5, 3)
    lower[0].requires_grad_(False)
    assert bytes_saved(lower, x) == LAYER_BYTES * (5 + 3 * gate)

    upper = network(LAYERS[name], 11, 5, 3)
    upper[1].requires_grad_(False)
    assert bytes_saved(upper, x) == LAYER_BYTES * (11 + (5 + 3) * gate)

    assert bytes_saved(network(LAYERS[name], 11, 5, 3).requires_grad_(False), x) == 0


@all_layers
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_only_the_output_stays(layer, mode):
    model, x = network(layer, 11, 5, 3), rand(7, 11, dtype=F32)
    kept = []

    def forward():
        with mode():
            kept.append(model(x))

    assert sum(allocations(forward)) == LAYER_BYTES * 3


# ---------------------------------------------------------------- the peak

# Before torch 2.13 the engine holds the gradient that a backward received until the
# backward ends: one tensor more than native's two nodes need.
LIMIT = 1.0 if HAS_BOXED_GRADS else 1.4


@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize(
    "shape", [(128, 512, 512), (1024, 256, 256)], ids=lambda s: "{}x{}->{}".format(*s)
)
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("needs_x", [False, True], ids=["", "grad_x"])
def test_peak_of_a_training_step(name, shape, depth, needs_x):
    """Forward and backward together take no more bytes than native layers take."""
    rows, n_in, n_out = shape
    ours = network(LAYERS[name], n_in, *[n_out] * depth)
    x = rand(rows, n_in, dtype=F32).requires_grad_(needs_x)
    g = rand(rows, n_out, seed=1, dtype=F32)

    def measured(model):
        model.zero_grad()
        x.grad = None
        return peak(allocations(lambda: model(x).backward(g)))

    # Scalars; and σ' of ReLU goes through a mask, a byte for each number of a layer.
    own = 64 + (rows * n_out if name == "relu" else 0)
    native = measured(torchbp.to_native(ours))
    assert measured(ours) <= LIMIT * native + own


def test_the_measure_counts_bytes():
    """Of a sum, a copy and a release: what was asked for, to the byte."""

    def step():
        first = torch.ones(1000)
        second = first + first
        del first
        second.clone()

    sizes = allocations(step)
    assert sizes == [4000, 4000, -4000, 4000, -4000, -4000]
    assert peak(sizes) == 8000
