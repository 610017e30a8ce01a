"""PyTorch's own sample inputs for linear, nn.Linear and the activations, through ours.

These are the arguments with which PyTorch tests F.linear itself: what it covers, we
cover, but for what is refused on purpose. Those stand in REFUSED_DTYPES and
REFUSED_SAMPLES, and nothing else is refused.
"""

import bounds
import pytest
import torch
import torch.nn.functional as F
from cases import LAYERS, all_layers, rand

from torchbp import BPLinear
from torchbp.nn import ACTIVATIONS

# What torch.testing._internal needs of its own.
pytest.importorskip("expecttest")
pytest.importorskip("numpy")
_methods = pytest.importorskip("torch.testing._internal.common_methods_invocations")
_modules = pytest.importorskip("torch.testing._internal.common_modules")

OPS = {op.name: op for op in _methods.op_db if not op.variant_test_name}
LINEAR = OPS["nn.functional.linear"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# F.linear takes these too. Gradients are real here, so: complex numbers and integers
# are a TypeError. A 1-D weight is a ValueError: W is (n_out, n_in) in the equations.
REFUSED_DTYPES = {
    torch.complex64, torch.complex128,
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
}  # fmt: skip
REFUSED_SAMPLES = {  # shapes of input and weight; torch 2.8 does not draw them yet
    ((8, 3), (3,)),
    ((2, 3, 4), (4,)),
    ((2, 1, 2, 1, 2), (2,)),
    ((3, 4, 0), (0,)),
    ((0, 8), (8,)),
}


@pytest.fixture(autouse=True)
def _seed():
    """The samples are drawn from torch's global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def samples(dtype):
    """Every sample's arguments (input, weight) or (input, weight, bias)."""
    drawn = list(LINEAR.sample_inputs("cpu", dtype, requires_grad=False))
    assert drawn and not any(sample.kwargs for sample in drawn)
    return [(sample.input, *sample.args) for sample in drawn]


def shapes(args):
    return tuple(args[0].shape), tuple(args[1].shape)


def with_grad(args):
    return [t.detach().clone().requires_grad_() for t in args]


def assert_same(ours, native, layer, args, dtype):
    """Values and gradients to their bounds."""
    ours_args, native_args = with_grad(args), with_grad(args)
    y, expected = ours(*ours_args), native(*native_args)
    g = rand(*y.shape, seed=9, dtype=dtype)
    grads = torch.autograd.grad(y, ours_args, g)
    references = torch.autograd.grad(expected, native_args, g)
    off = bounds.layer(layer, g, *args)
    for t, reference, bound in zip(
        (y, *grads), (expected, *references), off, strict=True
    ):
        assert t.dtype == dtype
        bounds.assert_within(t, reference, bound)


@all_layers
@all_dtypes
def test_samples_of_linear(layer, dtype):
    for args in samples(dtype):
        if shapes(args) in REFUSED_SAMPLES:
            with pytest.raises(ValueError, match="weight: expected 2 dimensions"):
                layer(*args)
        else:
            assert_same(layer, layer.native, layer, args, dtype)


@all_layers
def test_dtypes_of_linear(layer):
    """The dtypes that F.linear supports are ours, or refused on purpose."""
    refused = set()
    for dtype in LINEAR.dtypes:
        try:
            layer(torch.ones(2, 3, dtype=dtype), torch.ones(4, 3, dtype=dtype))
        except TypeError:
            refused.add(dtype)
    assert refused == REFUSED_DTYPES & LINEAR.dtypes
    assert LINEAR.dtypes - refused == set(DTYPES)


@all_layers
@pytest.mark.parametrize("dtype", sorted(REFUSED_DTYPES, key=str), ids=str)
def test_samples_of_refused_dtypes(layer, dtype):
    for args in samples(dtype):
        with pytest.raises(TypeError, match=r"input: expected a real floating dtype"):
            layer(*args)


# ---------------------------------------------------------------- activations


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "identity"])
@all_dtypes
def test_samples_of_activations(name, dtype):
    """With W = 1 and no bias z is x, so a layer is its σ: at every size and layout, at
    infinities and NaN."""
    layer, op = LAYERS[name], name if name in OPS else f"nn.functional.{name}"
    one = torch.ones(1, 1, dtype=dtype)
    drawn = list(OPS[op].reference_inputs("cpu", dtype, requires_grad=False))
    assert drawn
    for sample in drawn:
        z = sample.input.detach()
        x = z.unsqueeze(-1).requires_grad_()
        z = z.clone().requires_grad_()
        a, expected = layer(x, one), OPS[op](z)  # by its default options
        g = rand(*x.shape, seed=9, dtype=dtype)
        (ours,) = torch.autograd.grad(a, x, g)
        (native,) = torch.autograd.grad(expected, z, g.squeeze(-1))
        of_a, of_grad, _ = bounds.layer(layer, g, x, one)
        bounds.assert_within(a, expected.unsqueeze(-1), of_a)
        bounds.assert_within(ours, native.unsqueeze(-1), of_grad)


# ---------------------------------------------------------------- nn.Linear

MODULE = next(m for m in _modules.module_db if m.module_cls is torch.nn.Linear)


@all_layers
@all_dtypes
@pytest.mark.parametrize("training", [True, False])
def test_samples_of_nn_linear(layer, dtype, training):
    """Constructor arguments and inputs of nn.Linear's own tests."""
    drawn = MODULE.module_inputs_func(
        MODULE, device="cpu", dtype=dtype, requires_grad=False, training=training
    )
    assert drawn
    for sample in drawn:
        build, call = sample.constructor_input, sample.forward_input
        module = layer.module(*build.args, **build.kwargs, dtype=dtype)
        native = MODULE.module_cls(*build.args, **build.kwargs, dtype=dtype)
        native.load_state_dict(module.state_dict(), strict=True)
        module.train(training)
        assert list(module.state_dict()) == list(native.state_dict())
        x = call.args[0] if call.args else call.kwargs["input"]
        args = (x, *(p.detach() for p in native.parameters()))

        def ours(x, *params, module=module):
            named = dict(zip(module.state_dict(), params, strict=True))
            return torch.func.functional_call(module, named, (x,))

        def theirs(x, *params, native=native):
            named = dict(zip(native.state_dict(), params, strict=True))
            y = torch.func.functional_call(native, named, (x,))
            return layer.sigma(y)

        assert_same(ours, theirs, layer, args, dtype)


def test_the_sample_lists_are_those_of_linear():
    """Should torch rename its operators, this fails before the others pass idly."""
    assert LINEAR.op is F.linear
    assert issubclass(BPLinear, MODULE.module_cls)
