"""The compiled loops: the torch calls' numbers, no NaN hidden, and builds that harm
nobody."""

from __future__ import annotations

import copy
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import bounds
import pytest
import torch
from cases import COSTS, SiLU, default_dtype
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import torchbp
from torchbp import ExplicitSGD
from torchbp.explicit import kernel
from torchbp.explicit.parameters import place_of

BUILT_IN = [
    name
    for name, layer in torchbp.nn.ACTIVATIONS.items()
    if layer.function in kernel.ACTIVATIONS
]
KERNELS = ["auto", "torch", "compiled"]
ROOT = Path(__file__).parents[2]
LIMIT = 300  # seconds that a child process may take, on any machine


def network_of(sizes, activation="sigmoid", output=None, bias=True):
    torch.manual_seed(0)
    model = torchbp.MLP(sizes, activation, output)
    if not bias:
        for layer in model.layers:
            layer.bias = None
    return model


def weights_of(model):
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


# ---------------------------------------------------------------- the same numbers


def rounding(sizes, rows, steps):
    longest = max(*sizes, rows)
    return bounds.network(torch.float32, longest, len(sizes), steps)


WIDTHS = st.one_of(
    st.integers(1, 20), st.sampled_from([31, 32, 33, 64, 97, 127, 131, 144, 257])
)


@st.composite
def problems(draw):
    sizes = draw(st.lists(WIDTHS, min_size=2, max_size=5))
    name = draw(st.sampled_from(["quadratic", "cross-entropy", "log-likelihood"]))
    takes_z = name != "quadratic"
    output = "identity" if takes_z else draw(st.sampled_from(BUILT_IN))
    model = network_of(
        sizes, draw(st.sampled_from(BUILT_IN)), output, draw(st.booleans())
    )
    for p in model.parameters():
        p.requires_grad_(draw(st.sampled_from([True, True, True, False])))
    n, m = draw(st.integers(1, 30)), draw(st.integers(1, 31))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    images = torch.randint(1, 256, (n, sizes[0]), generator=generator)
    density = draw(st.sampled_from([0.0, 0.2, 1.0]))
    images = images * (torch.rand(images.shape, generator=generator) < density)
    if draw(st.booleans()):
        images = images.to(torch.uint8)
    else:
        images = images / 255 - 0.5 * (images > 0)
    if draw(st.booleans()):
        images = images.t().contiguous().t()  # columns of rows
    if draw(st.booleans()):
        y = torch.randint(0, sizes[-1], (n,), generator=generator)
    else:
        y = torch.rand(n, sizes[-1], generator=generator)
    decay = draw(st.sampled_from([0.0, 0.1]))
    return sizes, model, COSTS[name].module(), images, y, m, decay


@settings(max_examples=300, deadline=None)
@given(problems())
def test_the_numbers_are_those_of_the_torch_calls(built, problem):
    """Beside the torch calls in float64, by `.steps` and by `.step`: relative to the
    way that the parameters go, and to the rounding of the parameters themselves."""
    sizes, model, cost, images, y, m, decay = problem
    lr, order = 1e-3, torch.arange(len(images))
    exact, stepped = copy.deepcopy(model).double(), copy.deepcopy(model)
    x = images.double() / 255 if images.dtype == torch.uint8 else images.double()
    engine = ExplicitSGD(model, cost, lr, decay, kernel="compiled")
    by_step = ExplicitSGD(stepped, cost, lr, decay, kernel="compiled")
    reference = ExplicitSGD(exact, cost, lr, decay, kernel="torch")
    start, frozen = weights_of(model), [not p.requires_grad for p in model.parameters()]
    before = [p.detach().clone() for p in model.parameters()]
    way, expected = 0.0, []
    for rows in order.split(m):
        last = weights_of(exact)
        target = y[rows].double() if y.is_floating_point() else y[rows]
        expected.append(reference.step(x[rows], target))
        way += float((weights_of(exact) - last).norm())
    assume(10 * way < start.norm())  # else it diverges, and float32 does elsewhere
    costs = torch.cat(list(engine.steps(images, y, order, m)))
    for rows in order.split(m):
        by_step.step(x[rows].float(), y[rows])
    off = rounding(sizes, min(m, len(images)), len(expected))
    size = torch.stack(expected).abs() + sizes[-1]
    bounds.assert_within(costs, torch.stack(expected), off * size)
    of_parameters = bounds.trained(len(expected)) * start.norm()
    for trained in (model, stepped):
        apart = (weights_of(trained) - weights_of(exact)).norm()
        assert apart <= off * way + of_parameters
    for p, was, is_frozen in zip(model.parameters(), before, frozen, strict=True):
        assert not is_frozen or torch.equal(p, was)


@pytest.mark.parametrize("name", ["cross-entropy", "log-likelihood"])
def test_saturated_outputs_keep_their_costs_and_errors(built, name):
    """σ(z) - y and 1 - softmax(z) are 0 in float32 at these z; their errors are not."""
    z = torch.tensor([[20.0, -20.0], [-30.0, 40.0]])
    models = [torchbp.BPLinear(2, 2) for _ in range(2)]
    for model, dtype in zip(models, (torch.float32, torch.float64), strict=True):
        with torch.no_grad():
            model.weight.copy_(torch.eye(2))
            model.bias.zero_()
        model.to(dtype)
    labels = torch.tensor([0, 0])
    costs = []
    for model, which in zip(models, ("compiled", "torch"), strict=True):
        engine = ExplicitSGD(model, COSTS[name].module(), 1.0, kernel=which)
        x = z.to(model.weight.dtype)
        costs.append([engine.step(x[i : i + 1], labels[i : i + 1]) for i in (0, 1)])
    # e^z rounds in z ln 2, which is up to 64 units of e^z where |z| is.
    bound = bounds.close(64, torch.float32)
    for ours, exact in zip(*costs, strict=True):
        assert ours.item() == pytest.approx(exact.item(), **bounds.approx(bound))
    # What the biases moved, from 0: the errors themselves.
    ours, exact = (model.bias.detach().double() for model in models)
    torch.testing.assert_close(ours, exact, **bound)


@pytest.mark.parametrize("activation", [n for n in BUILT_IN if n != "identity"])
def test_sigma_and_its_slope_are_exact_to_a_few_units(built, activation):
    """One neuron, W = 1, b = 0, all z from saturation to saturation: its output and,
    by BP3, its error."""
    z = torch.cat([torch.linspace(-90, 90, 7001), torch.linspace(-1, 1, 7001)])
    module = torchbp.nn.ACTIVATIONS[activation]
    layer, exact = module(1, 1), module(1, 1).double()
    for model in (layer, exact):
        torch.nn.init.ones_(model.weight)
        torch.nn.init.zeros_(model.bias)
    layer.weight.requires_grad_(False)
    exact.weight.requires_grad_(False)
    engine = ExplicitSGD(layer, torchbp.QuadraticCost(), 1.0, kernel="compiled")
    a = exact(z.double()[:, None]).detach()
    slope = exact.function.gate(torch.ones_like(a), a)
    # C = ½ a² with y = 0, and b moves by -a σ'(z).
    F32 = torch.float32
    for i in range(0, len(z), 61):
        torch.nn.init.zeros_(layer.bias)
        cost = engine.step(z[i : i + 1, None], torch.zeros(1, 1))
        # Twice the error of a, and the square's own.
        k = 2 * bounds.OPERATIONS + 2
        bounds.assert_within(cost, a[i, 0] ** 2 / 2, bounds.units(k, F32, a[i, 0] ** 2))
        moved = -a[i] * slope[i]
        # 1 - a and 1 - a² lose what a is rounded by.
        size = a[i].abs() * (slope[i].abs() + a[i].abs())
        bounds.assert_within(
            layer.bias, moved, bounds.units(bounds.OPERATIONS, F32, size)
        )


# ---------------------------------------------------------------- nothing is hidden


@pytest.mark.parametrize("which", KERNELS)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_pixel_that_is_zero_does_not_hide_a_broken_weight(built, which, value):
    images = torch.zeros(20, 6, dtype=torch.uint8)
    images[:, :5] = torch.arange(100, dtype=torch.uint8).view(20, 5)
    y = torch.arange(20) % 3
    for take in (
        lambda e: e.epoch(images, y, 4),
        lambda e: e.step(images / 255, y),
        lambda e: torch.cat(list(e.steps(images, y, torch.arange(20), 4))),
    ):
        model = network_of([6, 4, 3])
        with torch.no_grad():
            model.layers[0].weight[2, 5] = value  # behind the pixel that is always 0
        engine = ExplicitSGD(model, torchbp.QuadraticCost(), 1.0, kernel=which)
        assert take(engine).isnan().all()
        assert not weights_of(model).isfinite().all()


@pytest.mark.parametrize("activation", ["relu", "identity"])
def test_parameters_that_become_infinite_surface(built, activation):
    """With a rate this large they overflow within the call; then nothing is finite any
    more, by either kernel."""
    images = torch.randint(0, 2, (60, 9), dtype=torch.uint8) * 255
    y = torch.rand(60, 3)
    for which in KERNELS:
        model = network_of([9, 5, 3], activation, "identity")
        engine = ExplicitSGD(model, torchbp.QuadraticCost(), 1e30, kernel=which)
        (costs,) = engine.steps(images, y, torch.arange(60), 5)
        assert costs[0].isfinite() and not costs[-1].isfinite()
        assert not weights_of(model).isfinite().all()


def linear_network(*weights):
    """Layers without σ and bias."""
    layers = []
    for W in weights:
        layers.append(torchbp.BPLinear(len(W[0]), len(W), bias=False))
        layers[-1].weight.data = torch.tensor(W)
    return torch.nn.Sequential(*layers)


@pytest.mark.parametrize("which", KERNELS)
def test_a_weight_that_overflows_is_not_hidden_by_zeros_later(built, which):
    """The first example makes the weight of its pixel infinite and nothing else; in the
    second one that pixel is 0."""
    model = linear_network([[1.0] * 40])
    engine = ExplicitSGD(model, torchbp.QuadraticCost(), 1e25, kernel=which)
    x, y = torch.eye(40)[[0, -1]], torch.tensor([[-1e18], [1.0]])
    (costs,) = engine.steps(x, y, torch.arange(2), 1)
    assert costs[0].isfinite() and costs[1].isnan()


@pytest.mark.parametrize("which", KERNELS)
def test_an_error_that_overflows_is_not_hidden_by_zeros(built, which):
    """δ of the hidden layer is infinite and its inputs are 0: a gradient of NaN."""
    model = linear_network([[1.0, 1.0]], [[1e30]])
    engine = ExplicitSGD(model, torchbp.QuadraticCost(), 1.0, kernel=which)
    (costs,) = engine.steps(
        torch.zeros(1, 2), torch.tensor([[1e15]]), torch.arange(1), 1
    )
    assert costs.isfinite().all() and model[0].weight.isnan().all()


def test_a_call_that_fails_leaves_the_parameters(built, monkeypatch):
    """No memory, say: parameters are those of the last call that returned."""
    monkeypatch.setattr(kernel.CompiledSteps, "_train", _no_memory)
    model = network_of([6, 4, 3])
    before = weights_of(model)
    engine = ExplicitSGD(model, torchbp.QuadraticCost(), 1.0, kernel="compiled")
    images, y = torch.ones(20, 6), torch.arange(20) % 3
    with pytest.raises(MemoryError):
        engine.epoch(images, y, 4)
    assert torch.equal(weights_of(model), before)


def _no_memory(*_):
    raise MemoryError


# ---------------------------------------------------------------- memory

INPUTS = torch.linspace(-1, 1, 77).view(11, 7)
LABELS = torch.arange(11) % 3


def results(which, change=lambda model: None, x=INPUTS, y=LABELS, context=nullcontext):
    """The costs and the parameters of a step and an epoch."""
    model = network_of([7, 5, 3])
    change(model)
    engine = ExplicitSGD(model, torchbp.QuadraticCost(), 0.5, kernel=which)
    with context():
        costs = [engine.step(x, y)]
        costs.append(engine.epoch(x, y, 4, torch.Generator("cpu").manual_seed(0)))
    return torch.stack(costs), weights_of(model)


def assert_as_usual(costs, weights, expected):
    """To the rounding of the four steps, once as products and once in another order."""
    off = 2 * rounding([7, 5, 3], 11, 4)
    bounds.assert_within(costs, expected[0].double(), off * (1 + expected[0]))
    assert (weights - expected[1]).norm() <= off * expected[1].norm()


def in_memory(lay_out):
    """Let each parameter lie where `lay_out` puts it."""

    def change(model):
        for layer in model.layers:
            for name, p in list(layer.named_parameters()):
                setattr(layer, name, torch.nn.Parameter(lay_out(p.detach())))

    return change


def offset(t):
    """Behind an odd number of others, and padded."""
    padded = torch.zeros(t.numel() // t.shape[-1], t.shape[-1] + 4)
    padded[:, 3:-1] = t.reshape(padded.shape[0], -1)
    return padded.view(*t.shape[:-1], -1)[..., 3:-1]


def every_second(t):
    return t.repeat_interleave(2, -1)[..., ::2]


def columns(t):
    return t.t().contiguous().t()


def misaligned(t):
    """At an address that is not a multiple of 4."""
    memory = torch.frombuffer(
        bytearray(t.numel() * 4 + 1), dtype=t.dtype, count=t.numel(), offset=1
    )
    return memory.view(t.shape).copy_(t)


def negated(t):
    """A view of -t, whose memory has the opposite of its numbers."""
    return torch._neg_view(-t)


LAYOUTS = [offset, every_second, columns, misaligned, negated]


@pytest.mark.parametrize("lay_out", LAYOUTS)
def test_parameters_may_lie_anywhere(built, lay_out):
    found = results("compiled", in_memory(lay_out))
    assert_as_usual(*found, results("torch"))


@pytest.mark.parametrize("lay_out", LAYOUTS)
def test_examples_may_lie_anywhere(built, lay_out):
    y = torch.linspace(0, 1, 33).view(11, 3)
    found = results("compiled", x=lay_out(INPUTS), y=lay_out(y))
    assert_as_usual(*found, results("torch", y=y))


@pytest.mark.parametrize(
    "context", [lambda: torch.device("meta"), lambda: default_dtype(torch.float64)]
)
def test_the_defaults_for_new_tensors_change_nothing(built, context):
    usual = results("compiled")
    for found, expected in zip(
        results("compiled", context=context), usual, strict=True
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("which", KERNELS)
@pytest.mark.parametrize("size", [0, 8])
def test_a_parameter_without_its_memory_is_an_error(built, which, size):
    model = network_of([7, 5, 3])
    engine = ExplicitSGD(model, torchbp.QuadraticCost(), 0.5, kernel=which)
    engine.step(INPUTS, LABELS)
    model.layers[0].weight.untyped_storage().resize_(size)
    with pytest.raises(RuntimeError, match="storage"):
        engine.step(INPUTS, LABELS)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("which", KERNELS)
def test_fake_tensors_are_an_error(built, which):
    model = network_of([7, 5, 3])
    engine = ExplicitSGD(model, torchbp.QuadraticCost(), 0.5, kernel=which)
    x, y = INPUTS, torch.zeros(11, 3)
    before = weights_of(model)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(Exception) as error:
        engine.step(x, y).item()
    assert "DataDependent" in error.typename
    assert torch.equal(weights_of(model), before)


def test_each_call_has_a_description_of_its_examples(built):
    """Other threads run, and may make a step, while the loops read theirs."""
    model = network_of([7, 5, 3])
    engine = ExplicitSGD(model, torchbp.QuadraticCost(), 0.5, kernel="compiled")
    engine.step(INPUTS, LABELS)
    (steps,) = engine._cache.values()
    seen = []

    def train(layers, depth, examples, *rest):
        seen.append(examples)
        return built(layers, depth, examples, *rest)

    steps.train = train
    both = [INPUTS, INPUTS.clone()]
    for x in both:
        engine.step(x, LABELS)
    assert [examples.images for examples in seen] == [x.data_ptr() for x in both]


# ---------------------------------------------------------------- the choice


def test_auto_is_a_rule_of_sizes_and_batch(built):
    bytes_, numbers = torch.zeros(50_000, 784, dtype=torch.uint8), torch.zeros(9, 784)

    def choice(sizes, m, images=bytes_, **changes):
        cost = torchbp.QuadraticCost()
        return ExplicitSGD(network_of(sizes), cost, 1.0, **changes).choose_kernel(
            images, m
        )

    assert choice([784, 30, 10], 10) == choice([784, 100, 10], 10) == "compiled"
    assert choice([784, 30, 30, 30, 10], 10) == "compiled"
    assert choice([784, 30, 10], 9, numbers) == "compiled"
    assert choice([784, 512, 512, 10], 128) == "compiled"
    assert choice([784, 512, 512, 10], 256) == "torch"
    assert choice([784, 512, 512, 10], 256, kernel="compiled") == "compiled"
    assert choice([784, 30, 10], 10, kernel="torch") == "torch"


def test_an_epoch_and_its_steps_use_what_was_chosen(built, monkeypatch):
    used = []
    train = kernel.CompiledSteps._train

    def noting(self, *arguments):
        used.append(self.m)
        return train(self, *arguments)

    monkeypatch.setattr(kernel.CompiledSteps, "_train", noting)
    images, y = torch.zeros(10, 6, dtype=torch.uint8), torch.arange(10) % 3
    for which, expected in (("auto", [4, 2, 10]), ("torch", [])):
        used.clear()
        model = network_of([6, 4, 3])
        engine = ExplicitSGD(model, torchbp.QuadraticCost(), 1.0, kernel=which)
        engine.epoch(images, y, 4)
        engine.step(images / 255, y)
        assert used == expected  # the whole batches, the ragged last, the step


@pytest.mark.parametrize(
    ("model", "cost", "reason"),
    [
        (network_of([4, 3]).double(), "quadratic", "torch.float64 parameters on cpu"),
        (network_of([4, 5, 3], "softplus"), "quadratic", "LinearSoftplus layers"),
        (network_of([4, 5, 3], SiLU), "quadratic", "SiLU layers"),
    ],
)
def test_compiled_is_refused_where_it_cannot_be_had(model, cost, reason):
    message = f"kernel: expected 'auto' or 'torch' for .*{reason}.*, got 'compiled'"
    with pytest.raises(ValueError, match=message):
        ExplicitSGD(model, COSTS[cost].module(), 1.0, kernel="compiled")
    engine = ExplicitSGD(model, COSTS[cost].module(), 1.0)
    assert engine.choose_kernel(torch.zeros(5, 4), 2) == "torch"


def test_own_costs_stay_with_the_torch_calls():
    own = torchbp.define_cost(
        "Own", lambda a, y: (a - y).sum(-1), lambda a, y: 0 * a + 1
    )
    with pytest.raises(ValueError, match="for the cost Own, got 'compiled'"):
        ExplicitSGD(network_of([4, 3]), own(), 1.0, kernel="compiled")


def test_a_dtype_that_changes_later_is_refused(built):
    model = network_of([4, 3])
    engine = ExplicitSGD(model, torchbp.QuadraticCost(), 1.0, kernel="compiled")
    model.double()
    for call in (
        lambda: engine.step(torch.zeros(2, 4).double(), torch.tensor([0, 1])),
        lambda: engine.epoch(torch.zeros(2, 4).double(), torch.tensor([0, 1]), 2),
    ):
        with pytest.raises(ValueError, match=r"torch\.float64 parameters"):
            call()


def test_other_kernels_are_refused():
    with pytest.raises(ValueError, match=r"kernel: expected one of .*, got 'fast'"):
        ExplicitSGD(network_of([4, 3]), torchbp.QuadraticCost(), 1.0, kernel="fast")


def test_import_steps_and_short_epochs_build_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    forget(monkeypatch)

    def build(path):
        raise AssertionError("built")

    monkeypatch.setattr(kernel, "_build", build)
    engine = ExplicitSGD(network_of([4, 3]), torchbp.QuadraticCost(), 1.0)
    images, y = torch.rand(kernel.BUILT_FROM, 4), torch.arange(kernel.BUILT_FROM) % 3
    engine.step(images[:5], y[:5])
    with monkeypatch.context() as patch:  # and the cache is asked once
        patch.setattr(kernel, "_find_or_build", build)
        engine.step(images[:5], y[:5])
        engine.epoch(images[:-1], y[:-1], 500)
    with pytest.raises(AssertionError, match="built"):
        engine.epoch(images, y, 500)


def test_one_call_is_short_enough_for_an_interrupt(built):
    """Python sees it once the call has returned."""
    for sizes, m in (([784, 30, 10], 10), ([784, 800, 10], 10), ([784, 800, 10], 500)):
        model = network_of(sizes)
        engine = ExplicitSGD(model, torchbp.QuadraticCost(), 1.0, kernel="compiled")
        places = tuple(map(place_of, model.layers))
        steps = engine._steps(places, m, 1, True, True)
        products = 3 * sum(p.numel() for p in model.parameters() if p.dim() == 2)
        assert steps.rows_at_once % m == 0
        one_batch = steps.rows_at_once == m
        assert one_batch or steps.rows_at_once * products <= kernel.PRODUCTS_AT_ONCE


# ---------------------------------------------------------------- builds


def forget(monkeypatch):
    """Let the next call look for the library anew."""
    monkeypatch.setattr(kernel, "_library", None)
    monkeypatch.setattr(kernel, "_failure", None)
    monkeypatch.setattr(kernel, "_is_absent", False)


PROGRAM = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
import torch, torchbp
from torchbp.explicit import kernel
model = torchbp.MLP([4, 3])
engine = torchbp.ExplicitSGD(model, torchbp.QuadraticCost(), 1.0, kernel=KERNEL)
images, y = torch.rand(kernel.BUILT_FROM, 4), torch.arange(kernel.BUILT_FROM) % 3
engine.epoch(images, y, 10)
print(engine.choose_kernel(images, 10), kernel.explain_failure())
"""


def start(tmp_path, which="auto", **environment):
    """A process that trains an epoch, with its cache in tmp_path."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    variables |= {"TORCH_EXTENSIONS_DIR": str(tmp_path / "cache"), **environment}
    program = PROGRAM.replace("KERNEL", repr(which))
    return subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=variables,
    )


def finish(process):
    out, error = process.communicate(timeout=LIMIT)
    return process.returncode, out.strip(), error.strip()


def compiler(tmp_path, script):
    """A compiler that says its version and then does what `script` says."""
    path = tmp_path / "compiler"
    path.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && exec c++ --version\n{script}\n'
    )
    path.chmod(0o755)
    return str(path)


def cached(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache" / "torchbp").glob("*"))


def test_two_processes_build_at_once(built, tmp_path):
    both = [start(tmp_path) for _ in range(2)]
    for code, out, error in map(finish, both):
        assert (code, out) == (0, "compiled None")
        assert error.count("\n") == 0 and "compiling" in error
    (name,) = cached(tmp_path)
    assert name.startswith("kernel-") and name.endswith(".so")
    code, out, error = finish(start(tmp_path))  # and the next one builds nothing
    assert (code, out, error) == (0, "compiled None", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_build_that_is_stopped_does_no_harm(built, tmp_path, number):
    begun = tmp_path / "begun"
    slow = compiler(tmp_path, f"touch {begun}; exec sleep {LIMIT}")
    process = start(tmp_path, CXX=slow)
    deadline = time.monotonic() + LIMIT
    while not begun.exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    code, _, error = finish(process)
    assert code != 0
    assert number == signal.SIGKILL or "KeyboardInterrupt" in error
    assert not any(name.endswith(".so") for name in cached(tmp_path))
    assert finish(start(tmp_path))[:2] == (0, "compiled None")


def test_a_library_that_is_damaged_is_built_again(built, tmp_path):
    assert finish(start(tmp_path))[0] == 0
    (name,) = cached(tmp_path)
    library = tmp_path / "cache" / "torchbp" / name
    library.write_bytes(library.read_bytes()[:100])
    assert finish(start(tmp_path))[:2] == (0, "compiled None")


def test_a_cache_that_cannot_be_written_does_no_harm(built, tmp_path):
    (tmp_path / "cache").write_text("a file, where a folder should be")
    code, out, _ = finish(start(tmp_path))
    assert (code, out) == (0, "compiled None")


def test_without_a_compiler_the_torch_calls_run(tmp_path):
    code, out, error = finish(start(tmp_path, CXX="no-such-compiler"))
    assert code == 0 and error == ""
    assert out.startswith("torch expected a C++ compiler, got none")
    code, _, error = finish(start(tmp_path, "compiled", CXX="no-such-compiler"))
    assert code == 1
    assert "ValueError: kernel: expected 'auto' or 'torch' where the loops" in error
    assert "no-such-compiler" in error.splitlines()[-1]


def test_a_compiler_that_fails_is_quoted(built, tmp_path):
    script = "echo 'a.cpp:1:2: error: no room for a vector' >&2; exit 1"
    failing = compiler(tmp_path, script)
    code, out, error = finish(start(tmp_path, CXX=failing))
    assert (code, out) == (0, "torch a.cpp:1:2: error: no room for a vector")
    code, _, error = finish(start(tmp_path, "compiled", CXX=failing))
    assert code == 1
    assert error.endswith("got 'compiled': a.cpp:1:2: error: no room for a vector")


def test_another_system_has_the_torch_calls(monkeypatch):
    forget(monkeypatch)
    monkeypatch.setattr(kernel.sys, "platform", "plan9")
    engine = ExplicitSGD(network_of([4, 3]), torchbp.QuadraticCost(), 1.0)
    images = torch.zeros(kernel.BUILT_FROM, 4)
    assert engine.choose_kernel(images, 2) == "torch"
    assert "got plan9" in kernel.explain_failure()


@pytest.mark.skipif(
    kernel.platform.machine() not in ("x86_64", "AMD64"),
    reason="needs an x86 processor",
)
@pytest.mark.parametrize("flag", ["-march=x86-64", "-march=haswell"])
def test_it_is_right_without_wide_vectors(built, monkeypatch, tmp_path, flag):
    if (
        flag == "-march=haswell"
        and torch.backends.cpu.get_cpu_capability() == "DEFAULT"
    ):
        pytest.skip("needs AVX2")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(kernel, "MACHINE_FLAGS", [flag])
    forget(monkeypatch)
    for n in (1, 3, 5, 16, 33, 63, 64, 65, 130, 300):
        model = network_of([n, n, 7], "tanh")
        exact = copy.deepcopy(model).double()
        images = torch.randint(0, 3, (50, n)).clamp_(max=1).to(torch.uint8) * 200
        y, order = torch.arange(50) % 7, torch.arange(50)
        for trained, which in ((model, "compiled"), (exact, "torch")):
            engine = ExplicitSGD(
                trained, torchbp.QuadraticCost(), 0.1, 0.01, kernel=which
            )
            list(engine.steps(images, y, order, 8))
        size = weights_of(exact).norm()
        off = (weights_of(model) - weights_of(exact)).norm()
        assert off <= rounding([n, n, 7], 8, 7) * size


@pytest.mark.parametrize(
    ("compiler", "flags"),
    [
        ("g++", ["-O2", "-march=native"]),
        ("g++", ["-O2"]),
        ("g++", ["-O0"]),
        ("clang++", ["-O2", "-march=native"]),
    ],
    ids=["native", "optimised", "unoptimised", "clang"],
)
def test_the_sanitizers_find_nothing(tmp_path, compiler, flags):
    """AddressSanitizer and UBSan over the C interface, without torch and Python."""
    if not shutil.which(compiler):
        pytest.skip(f"needs {compiler}")
    driver, program = Path(__file__).with_name("kernel_driver.cpp"), tmp_path / "driver"
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    include = f"-I{kernel.SOURCE.parent}"
    flags = [*kernel.FLAGS[1:], include, *flags]
    command = [compiler, "-std=c++17", "-g", *flags, *sanitize]
    built = subprocess.run(
        [*command, str(driver), "-o", str(program)], capture_output=True, text=True
    )
    if built.returncode and "asan" in built.stderr:
        pytest.skip("the compiler has no AddressSanitizer")
    assert built.returncode == 0, built.stderr
    run = subprocess.run([program], capture_output=True, text=True, timeout=LIMIT)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.endswith(" calls\n")


def test_a_learner_can_read_the_loops():
    """At most 350 lines besides comments and blank ones."""
    lines = map(str.strip, kernel.SOURCE.read_text(encoding="utf-8").splitlines())
    assert sum(bool(line) and not line.startswith("//") for line in lines) <= 350
