"""functional: BP2-BP4 by hand are the derivatives, in every shape, layout and mode."""

import itertools
import weakref

import bounds
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from cases import (
    DTYPES,
    F64,
    LAYERS,
    LAYOUTS,
    Square,
    all_layers,
    assert_raises_one_line,
    check_first,
    check_native,
    check_raw_shapes,
    check_second,
    check_untouched,
    has_compiler,
    operands,
    rand,
    raw_gradients,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.gradcheck import GradcheckError
from torch.testing import assert_close

import torchbp
from torchbp import functional
from torchbp.nn import ACTIVATIONS

# rows (the dimensions before the last), n_in, n_out, bias
SHAPES = {
    "1-D": ((), 3, 2, True),
    "2-D": ((3,), 5, 2, True),
    "3-D": ((2, 3), 3, 2, True),
    "4-D": ((2, 1, 3), 2, 3, True),
    "5-D": ((1, 2, 1, 2), 3, 2, True),
    "no bias": ((3,), 2, 3, False),
    "no bias, 1-D": ((), 3, 2, False),
    "one by one": ((1,), 1, 1, True),
    "primes": ((7,), 13, 5, True),
    "no rows": ((0,), 3, 2, True),
    "no rows, 3-D": ((2, 0), 3, 2, True),
    "no inputs": ((3,), 0, 2, True),
    "no inputs, no bias": ((2, 2), 0, 2, False),
    "no outputs": ((3,), 2, 0, True),
    "no outputs, 3-D": ((2, 3), 2, 0, True),
    "nothing": ((0,), 0, 0, True),
}
all_shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
all_layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
MASKS = list(itertools.product([True, False], repeat=3))
all_masks = pytest.mark.parametrize(
    "mask",
    MASKS,
    ids=lambda mask: "".join("xWb"[i] for i in range(3) if mask[i]) or "-",
)
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(
            not torch.cuda.is_available(), reason="needs a CUDA device"
        ),
    ),
]


# ---------------------------------------------------------------- derivatives


@all_layers
@all_shapes
def test_first_derivatives(layer, shape):
    args = operands(layer, *shape)
    check_first(layer, *args)
    check_raw_shapes(layer, *args)
    check_native(layer, layer.native, *args)
    check_untouched(layer, *args)


@all_layers
@pytest.mark.parametrize(
    "name", ["1-D", "2-D", "3-D", "no bias", "no rows", "no inputs"]
)
def test_second_derivatives(layer, name):
    check_second(layer, *operands(layer, *SHAPES[name]))


@all_layers
@all_layouts
def test_arguments_of_any_layout(layer, layout):
    """Gradients go to dense leaves: those are perturbed, not overlapping memory."""
    for rows in [(3,), (2, 3)]:
        dense = operands(layer, rows, 4, 2)

        def f(x, W, b):
            return layer(layout(x), layout(W), layout(b))

        def native(x, W, b):
            return layer.native(layout(x), layout(W), layout(b))

        assert not layout(dense[0]).is_contiguous()
        check_native(f, native, *dense)
        check_first(f, *dense)


@all_layers
@pytest.mark.parametrize("rows", [(3,), (2, 3)], ids=str)
@all_layouts
def test_output_gradients_of_any_layout(layer, rows, layout):
    args = operands(layer, rows, 5, 4)
    y, expected = layer(*args), layer.native(*args)
    g = layout(rand(*y.shape, seed=9))
    sent = g.clone()
    assert_close(
        torch.autograd.grad(y, args, g), torch.autograd.grad(expected, args, g)
    )
    assert torch.equal(g, sent)


@all_layers
def test_gradient_of_a_sum(layer):
    """The most usual output gradient of all has stride 0 in every dimension."""
    args = operands(layer)
    assert_close(
        torch.autograd.grad(layer(*args).sum(), args),
        torch.autograd.grad(layer.native(*args).sum(), args),
    )


@all_layers
def test_double_backward_equals_native(layer):
    args = operands(layer)
    g = rand(3, 2, seed=9).requires_grad_()
    weights = [rand(*t.shape, seed=20 + i) for i, t in enumerate(args)]

    def second(f):
        first = torch.autograd.grad(f(*args), args, g, create_graph=True)
        mixed = sum((d * w).sum() for d, w in zip(first, weights, strict=True))
        return torch.autograd.grad(mixed, (*args, g), allow_unused=True,
                                   materialize_grads=True)  # fmt: skip

    assert_close(second(layer), second(layer.native))


@all_layers
def test_retain_graph(layer):
    args = operands(layer)
    y = layer(*args)
    g = rand(*y.shape, seed=9)
    first = torch.autograd.grad(y, args, g, retain_graph=True)
    assert_close(
        torch.autograd.grad(y, args, g, retain_graph=True), first, **bounds.EXACT
    )
    torch.autograd.grad(y, args, g)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, args, g)


# ---------------------------------------------------------------- who asked for what


def masked(args, mask):
    return [t.detach().requires_grad_(n) for t, n in zip(args, mask, strict=True)]


@all_layers
@all_masks
def test_only_what_was_asked_for(layer, mask):
    args = masked(operands(layer), mask)
    y = layer(*args)
    assert y.requires_grad == any(mask)
    if not any(mask):
        assert y.grad_fn is None
        return
    x, W, _ = y.grad_fn.saved_tensors
    assert (x is not None) == mask[1], "x is kept for grad_W only"
    assert (W is not None) == mask[0], "W is kept for grad_x only"
    g = rand(*y.shape, seed=9)
    raw = raw_gradients(y, g)
    assert tuple(grad is not None for grad in raw) == mask
    asked = [t for t in args if t.requires_grad]
    assert_close(
        torch.autograd.grad(y, asked, g),
        torch.autograd.grad(layer.native(*args), asked, g),
    )


@all_layers
@all_masks
def test_masks_pass_gradcheck(layer, mask):
    args = masked(operands(layer), mask)
    if any(mask):
        check_first(layer, *args)
        check_second(layer, *args)


@all_layers
@pytest.mark.parametrize("which", ["x", "W"])
def test_what_nobody_asked_for_is_freed(layer, which):
    x, W, b = operands(layer)
    if which == "x":
        W = W.detach()  # grad_x alone: x is not read
        kept = x = x * 1
    else:
        x = x.detach()  # grad_W alone: W is not read
        kept = W = W * 1
    y, ref = layer(x, W, b), weakref.ref(kept)
    del x, W, kept
    assert ref() is None
    assert y.requires_grad


def test_identity_layer_keeps_no_output():
    y = functional.linear(*operands(LAYERS["linear"]))
    assert y.grad_fn.saved_tensors[2] is None


@all_layers
def test_layers_from_output_keep_the_output_and_not_z(layer):
    if issubclass(layer.function, functional.LayerFromOutput):
        y = layer(*operands(layer))
        assert y.grad_fn.saved_tensors[2].data_ptr() == y.data_ptr()


@all_layers
def test_nothing_is_recorded_without_grad(layer):
    with torch.no_grad():
        assert not layer(*operands(layer)).requires_grad
    with torch.inference_mode():
        assert layer(*(t.detach() for t in operands(layer))).is_inference()


@all_layers
def test_output_overwritten_before_backward(layer):
    """As native: fine for the identity, refused where σ' is made of the output."""
    args = operands(layer)
    y = layer(*args)
    y.mul_(1)
    if issubclass(layer.function, functional.LayerFromOutput):
        with pytest.raises(RuntimeError, match="inplace operation"):
            y.sum().backward()
    else:
        y.sum().backward()


@all_layers
@pytest.mark.parametrize("mode", ["checkpoint", "save_on_cpu"])
def test_other_ways_of_saving(layer, mode):
    args = operands(layer)
    if mode == "checkpoint":
        y = torch.utils.checkpoint.checkpoint(layer, *args, use_reentrant=False)
    else:
        with torch.autograd.graph.save_on_cpu():
            y = layer(*args)
    g = rand(*y.shape, seed=9)
    expected = torch.autograd.grad(layer.native(*args), args, g)
    assert_close(torch.autograd.grad(y, args, g), expected)


# ---------------------------------------------------------------- against native


@settings(deadline=None, max_examples=120, derandomize=True)
@given(
    name=st.sampled_from(list(LAYERS)),
    dtype=st.sampled_from(DTYPES),
    rows=st.lists(st.integers(0, 5), max_size=4),
    n_in=st.integers(0, 9),
    n_out=st.integers(0, 9),
    bias=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_equals_native_autograd(name, dtype, rows, n_in, n_out, bias, seed):
    """Values, gradients, and the weights after a step of SGD."""
    layer, lr = LAYERS[name], 0.5
    args = operands(layer, tuple(rows), n_in, n_out, bias, dtype, seed)
    y, expected = layer(*args), layer.native(*args)
    g = rand(*y.shape, seed=seed + 9, dtype=dtype)
    ours, native = (torch.autograd.grad(v, args, g) for v in (y, expected))
    assert {t.dtype for t in (y, *ours)} == {dtype}
    of_y, *of_grads = bounds.layer(layer, g, *args)
    bounds.assert_within(y, expected, of_y)
    for t, grad, reference, off in zip(args, ours, native, of_grads, strict=True):
        bounds.assert_within(grad, reference, off)
        t = t.detach()
        # Two more roundings: of lr times the gradient, and of the difference.
        off = lr * off + bounds.units(2, dtype, t.double().abs() + grad.double().abs())
        bounds.assert_within(t - lr * grad, t - lr * reference, off)


@all_layers
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_devices_and_dtypes(layer, device, dtype):
    args = [t.detach().to(device).requires_grad_() for t in
            operands(layer, (4, 3), 7, 5, dtype=dtype)]  # fmt: skip
    y, expected = layer(*args), layer.native(*args)
    assert y.device.type == device
    g = rand(*y.shape, seed=9, dtype=dtype).to(device)
    ours, native = (torch.autograd.grad(v, args, g) for v in (y, expected))
    off = bounds.layer(layer, *(t.cpu() for t in (g, *args)))
    for t, reference, bound in zip((y, *ours), (expected, *native), off, strict=True):
        assert t.dtype == dtype
        bounds.assert_within(t.cpu(), reference.cpu(), bound)


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "identity"])
def test_functions_by_name(name):
    args = operands(LAYERS[name])
    named = getattr(functional, f"linear_{name}")
    assert torch.equal(named(*args), LAYERS[name](*args))
    assert torch.equal(functional.linear(*args), F.linear(*args))
    without_bias = named(*args[:2])
    assert_close(without_bias, LAYERS[name].native(*args[:2]))


def test_relu_slope_is_zero_at_zero_and_keeps_infinities_out():
    x = torch.tensor([[0.0], [-1.0], [2.0]], requires_grad=True)
    y = functional.linear_relu(x, torch.ones(1, 1))
    g = torch.tensor([[1.0], [torch.inf], [3.0]])
    assert torch.equal(torch.autograd.grad(y, x, g)[0], torch.tensor([[0.0], [0], [3]]))


def test_slope_at_saturation():
    """σ' goes to 0 with the accuracy that a leaves it: half an ulp of a next to 1."""
    z = torch.linspace(-90, 90, 1801).reshape(-1, 1).requires_grad_()
    one = torch.ones(1, 1)
    for f, sigma in ((functional.linear_sigmoid, torch.sigmoid),
                     (functional.linear_tanh, torch.tanh)):  # fmt: skip
        (slope,) = torch.autograd.grad(f(z, one).sum(), z)
        wide = z.detach().double().requires_grad_()
        (truth,) = torch.autograd.grad(sigma(wide).sum(), wide)
        terms = 1 + truth  # 1 - a is as exact as a is, next to 1
        off = bounds.units(bounds.OPERATIONS, torch.float32, terms)
        bounds.assert_within(slope, truth, off)
        assert (slope >= 0).all() and slope.isfinite().all()


# ---------------------------------------------------------------- the derivation


@all_layers
def test_jacobian_of_sigma_is_diagonal(layer):
    """∂a_j/∂z_k = σ'(z_j) δ_jk, with W = I and b = 0, so that z is the input."""
    n = 4
    z = rand(n)
    jacobian = torch.autograd.functional.jacobian(
        lambda z: layer(z, torch.eye(n, dtype=F64), torch.zeros(n, dtype=F64)), z
    )
    assert_close(jacobian, torch.diag(layer.slope(z)))


def test_jacobians_of_the_weighted_input():
    """∂z/∂b = I, ∂z/∂x = W, ∂z_i/∂W_jk = δ_ij x_k."""
    x, W, b = (t.detach() for t in operands(LAYERS["linear"], (), 3, 2))
    by_x, by_W, by_b = torch.autograd.functional.jacobian(functional.linear, (x, W, b))
    assert_close(by_b, torch.eye(2, dtype=F64))
    assert_close(by_x, W)
    assert_close(by_W, torch.einsum("ij,k->ijk", torch.eye(2, dtype=F64), x))


# ---------------------------------------------------------------- mutations

# Deliberately wrong layers and sweeps, and the checks above that must fail on each: a
# check that cannot fail is a defect. Squares, so that no shape gives the error away.

CHECKS = {
    "first": check_first,
    "second": check_second,
    "raw shapes": check_raw_shapes,
    "native": lambda f, *args: check_native(f, LAYERS["sigmoid"].native, *args),
    "untouched": check_untouched,
}
_Sigmoid = functional.LinearSigmoidFunction


class WrongSlope(_Sigmoid):
    @staticmethod
    def gate(grad_a, a):
        return grad_a * a * (1 - a) * 1.001


class SlopeAtZ(functional.LayerFromWeightedInput):
    sigma = staticmethod(torch.sigmoid)

    @staticmethod
    def gate(grad_a, z):
        return grad_a * z * (1 - z)  # the formula for a


class DetachedSlope(_Sigmoid):
    @staticmethod
    def gate(grad_a, a):
        return grad_a * (a * (1 - a)).detach()


class OverwritesGradient(_Sigmoid):
    @staticmethod
    def gate(grad_a, a):
        return grad_a.mul_(a * (1 - a))


class ForwardModeForgetsBias(_Sigmoid):
    @classmethod
    def push_forward(cls, ctx, dx, dW, db):
        return super().push_forward(ctx, dx, dW, torch.zeros_like(db))


@pytest.mark.parametrize(
    ("function", "caught_by"),
    [
        (_Sigmoid, set()),
        (WrongSlope, {"first", "native"}),
        (SlopeAtZ, {"first", "native"}),
        (DetachedSlope, {"second"}),
        (ForwardModeForgetsBias, {"first"}),
    ],
)
def test_checks_fail_on_wrong_layers(function, caught_by):
    assert failing_checks(function) == caught_by


def test_check_fails_on_an_overwritten_gradient():
    x, W, b = operands(LAYERS["sigmoid"], (3,), 3, 3)

    def f(x, W, b):
        return functional.layer(OverwritesGradient, x, W, b)

    with pytest.raises(AssertionError):
        check_untouched(f, x, W, b)


def sweep(delta, x, W, needs):
    """BP2-BP4 for two dimensions, correct; the mutations below change one line."""
    return delta @ W, delta.t() @ x, delta.sum(0)


MUTATIONS = {
    "none": (sweep, set()),
    "BP2 without the transpose": (
        lambda d, x, W, needs: (d @ W.t(), d.t() @ x, d.sum(0)),
        {"first", "native"},
    ),
    "BP4 transposed": (
        lambda d, x, W, needs: (d @ W, x.t() @ d, d.sum(0)),
        {"first", "native"},
    ),
    "BP3 as a mean": (
        lambda d, x, W, needs: (d @ W, d.t() @ x, d.mean(0)),
        {"first", "native"},
    ),
    "BP3 over the wrong axis": (
        lambda d, x, W, needs: (d @ W, d.t() @ x, d.sum(1)),
        {"first", "native"},
    ),
    "BP3 not summed": (  # the engine sums it: its shape alone gives it away
        lambda d, x, W, needs: (d @ W, d.t() @ x, d),
        {"raw shapes"},
    ),
    "BP4 as a mean": (
        lambda d, x, W, needs: (d @ W, d.t() @ x / len(x), d.sum(0)),
        {"first", "native"},
    ),
    "BP4 cut from the graph": (
        lambda d, x, W, needs: (d @ W, d.t() @ x.detach(), d.sum(0)),
        {"second"},
    ),
}


@pytest.mark.parametrize(
    ("wrong", "caught_by"), MUTATIONS.values(), ids=MUTATIONS.keys()
)
def test_checks_fail_on_wrong_equations(monkeypatch, wrong, caught_by):
    monkeypatch.setattr(functional, "gradients", wrong)
    assert failing_checks(_Sigmoid) == caught_by


def failing_checks(function):
    """The names of the checks that a 3 x 3 layer with `function` does not pass.

    A layer whose first derivatives are wrong has second derivatives of the wrong thing,
    about which the second check says nothing.
    """
    args = operands(LAYERS["sigmoid"], (3,), 3, 3)
    failed = set()
    for name, check in CHECKS.items():
        try:
            check(lambda *args: functional.layer(function, *args), *args)
        except (AssertionError, GradcheckError):
            failed.add(name)
    return failed - {"second"} if "first" in failed else failed


# ---------------------------------------------------------------- modes of torch


def per_row(layer, W, b):
    return lambda x: layer(x, W, b).square().sum()


def of_transforms(layer):
    """Each transform with a function to apply it to, and its argument."""
    x, W, b = (t.detach() for t in operands(layer, (3,), 4, 2))
    return {
        "vmap(grad)": lambda f: torch.vmap(torch.func.grad(per_row(f, W, b)))(x),
        "vmap(grad by W)": lambda f: torch.vmap(
            torch.func.grad(lambda W, x: f(x, W, b).square().sum()), (None, 0)
        )(W, x),
        "jacrev": lambda f: torch.func.jacrev(f, (0, 1, 2))(x, W, b),
        "jacfwd": lambda f: torch.func.jacfwd(f, (0, 1, 2))(x, W, b),
        "hessian": lambda f: torch.func.hessian(per_row(f, W, b))(x[0]),
        "hessian by W": lambda f: torch.func.hessian(
            lambda W: f(x, W, b).square().sum()
        )(W),
        "jvp(grad)": lambda f: torch.func.jvp(
            torch.func.grad(per_row(f, W, b)), (x[0],), (x[1],)
        ),
    }


@all_layers
@pytest.mark.parametrize("name", of_transforms(LAYERS["linear"]))
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_transforms_equal_native(layer, name):
    transform = of_transforms(layer)[name]
    assert_close(transform(layer), transform(layer.native))


@all_layers
def test_autocast(layer):
    """Computes in bfloat16, and the gradients come back in the parameters' float32."""
    args = operands(layer, (4, 3), 5, 2, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(*args)
        expected = layer.native(*args)
        wide = layer(*(t.double() for t in args))
    assert y.dtype == torch.bfloat16
    assert wide.dtype == F64, "native layers leave float64 alone, too"
    g = rand(*y.shape, seed=9, dtype=torch.bfloat16)
    grads = torch.autograd.grad(y, args, g)
    assert all(grad.dtype == torch.float32 for grad in grads)
    native = torch.autograd.grad(expected, args, g.to(expected.dtype))
    off = bounds.layer(layer, g, *args, dtype=torch.bfloat16)[1:]
    for grad, reference, bound in zip(grads, native, off, strict=True):
        bounds.assert_within(grad, reference, bound)


@all_layers
def test_autocast_switched_off_inside(layer):
    args = operands(layer, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert layer(*args).dtype == torch.float32


def compiled_gradients(f, args, backend):
    torch.compiler.reset()
    y = torch.compile(f, fullgraph=True, backend=backend)(*args)
    return y.detach(), torch.autograd.grad(
        y, args, rand(*y.shape, seed=9, dtype=y.dtype)
    )


@all_layers
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_compiles_whole(layer):
    """aot_eager traces forward and backward as inductor does, but builds no C++."""
    args = operands(layer)
    y, grads = compiled_gradients(layer, args, "aot_eager")
    assert_close(y, layer(*args).detach())
    assert_close(grads, torch.autograd.grad(layer(*args), args, rand(3, 2, seed=9)))


class DoubledSlope(_Sigmoid):
    @staticmethod
    def gate(grad_a, a):
        return 2 * grad_a * a * (1 - a)


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=has_compiler)]
)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_compiled_backward_is_ours(backend):
    """Right numbers would not show it: the compiler could have differentiated the
    forward itself. A backward that is wrong on purpose must come out wrong."""
    args = operands(LAYERS["sigmoid"], dtype=torch.float32)

    def wrong(x, W, b):
        return functional.layer(DoubledSlope, x, W, b)

    _, right = compiled_gradients(LAYERS["sigmoid"], args, backend)
    _, doubled = compiled_gradients(wrong, args, backend)
    assert_close(doubled, tuple(2 * grad for grad in right))
    native = torch.autograd.grad(
        LAYERS["sigmoid"].native(*args), args, rand(3, 2, seed=9, dtype=torch.float32)
    )
    assert_close(right, native)


@all_layers
@pytest.mark.parametrize("enabled", [True, False])
def test_boxed_gradients_switch(layer, enabled):
    boxed = functional.LinearFunction.boxed_grads_call
    if enabled and not boxed:
        pytest.skip("needs torch >= 2.13, the first with boxed gradients")
    args = operands(layer)
    g = rand(3, 2, seed=9)
    expected = torch.autograd.grad(layer.native(*args), args, g)
    try:
        functional.boxed_gradients(enabled)
        assert layer.function.boxed_grads_call is enabled
        assert_close(torch.autograd.grad(layer(*args), args, g), expected)
    finally:
        functional.boxed_gradients(boxed)


# ---------------------------------------------------------------- errors

x, W, b = torch.ones(4, 3), torch.ones(2, 3), torch.ones(2)
ERRORS = {
    "input a list": (([[1.0]], W, b), TypeError, "input", "a Tensor", "list"),
    "weight None": ((x, None, b), TypeError, "weight", "a Tensor", "NoneType"),
    "bias a number": ((x, W, 1.0), TypeError, "bias", "a Tensor", "float"),
    "input int": ((x.int(), W, b), TypeError, "input", "floating", "torch.int32"),
    "weight int": ((x, W.int(), b), TypeError, "weight", "floating", "torch.int32"),
    "bias int": ((x, W, b.int()), TypeError, "bias", "floating", "torch.int32"),
    "input bool": ((x.bool(), W, b), TypeError, "input", "floating", "torch.bool"),
    "complex": (
        (x.cfloat(), W.cfloat(), None),
        TypeError, "input", "real floating", "torch.complex64",
    ),
    "weight 1-D": ((x, W[0], None), ValueError, "weight", "2 dimensions", "(3,)"),
    "weight 3-D": ((x, W[None], b), ValueError, "weight", "2 dimensions", "(1, 2, 3)"),
    "input 0-d": ((x[0, 0], W, b), ValueError, "input", "(*, n_in)", "0-d"),
    "input too wide": (
        (torch.ones(4, 5), W, b), ValueError, "input", "dimension 3", "(4, 5)",
    ),
    "weight transposed": ((x, W.t(), b), ValueError, "input", "dimension 2", "(4, 3)"),
    "bias too long": ((x, W, torch.ones(3)), ValueError, "bias", "(2,)", "(3,)"),
    "bias of one": ((x, W, torch.ones(1)), ValueError, "bias", "(2,)", "(1,)"),
    "bias 2-D": ((x, W, torch.ones(1, 2)), ValueError, "bias", "(2,)", "(1, 2)"),
    "bias 0-d": ((x, W, torch.tensor(1.0)), ValueError, "bias", "(2,)", "()"),
    "weight wide": (
        (x, W.double(), b), TypeError, "weight", "torch.float32", "torch.float64",
    ),
    "bias half": (
        (x, W, b.half()), TypeError, "bias", "torch.float32", "torch.float16",
    ),
    "input half": (
        (x.half(), W, b), TypeError, "weight", "torch.float16", "torch.float32",
    ),
    "weight elsewhere": ((x, W.to("meta"), b), ValueError, "weight", "cpu", "meta"),
    "bias elsewhere": ((x, W, b.to("meta")), ValueError, "bias", "cpu", "meta"),
    "input elsewhere": ((x.to("meta"), W, b), ValueError, "weight", "meta", "cpu"),
    "weight elsewhere, no bias": (
        (x, W.to("meta"), None), ValueError, "weight", "cpu", "meta",
    ),
}  # fmt: skip
del x, W, b


@all_layers
@pytest.mark.parametrize(("args", "kind", *"pqr"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(layer, args, kind, p, q, r):
    assert_raises_one_line(kind, (p, "expected", q, "got", r), layer, *args)


def identity(z):
    return z


DEFINE_ERRORS = {
    "name no identifier": (("no name", identity, identity), ValueError, "name",
                           "identifier", "'no name'"),
    "name no string": ((3, identity, identity), ValueError, "name", "identifier", "3"),
    "saves": (("N", identity, identity, "b"), ValueError, "saves", '"a" or "z"', "'b'"),
    "sigma no function": (("N", 1, identity), TypeError, "sigma", "callable", "int"),
    "sigma_prime no function": (("N", identity, None), TypeError, "sigma_prime",
                                "callable", "NoneType"),
    "sigma returns a number": (("N", lambda z: 1.0, identity), TypeError, "sigma",
                               "Tensor", "1.0"),
    "sigma sums": (("N", torch.sum, identity), ValueError, "sigma", "(5,)", "()"),
    "sigma_prime sums": (("N", identity, torch.sum), ValueError, "sigma_prime", "(5,)",
                         "()"),
    "sigma changes the dtype": (("N", torch.Tensor.float, identity), ValueError,
                                "sigma", "float64", "torch.float32"),
    "sigma overwrites": (("N", torch.Tensor.sigmoid_, identity), ValueError,
                         "sigma", "unchanged", "overwritten"),
    "sigma_prime overwrites": (("N", identity, torch.Tensor.neg_), ValueError,
                               "sigma_prime", "unchanged", "overwritten"),
}  # fmt: skip


@pytest.mark.parametrize("define", [functional.define_function, torchbp.define_layer])
@pytest.mark.parametrize(
    ("args", "kind", *"pqr"), DEFINE_ERRORS.values(), ids=DEFINE_ERRORS.keys()
)
def test_define_errors(define, args, kind, p, q, r):
    assert_raises_one_line(kind, (p, "expected", q, "got", r), define, *args)


@pytest.mark.parametrize("saves", ["a", "z"])
@pytest.mark.parametrize("sigma", [identity, lambda z: z[:], lambda z: z.view(z.shape)])
def test_sigma_that_returns_its_argument(saves, sigma):
    """A Function must not return the same tensor twice, nor a view of what it saves."""
    function = functional.define_function("Alias", sigma, torch.ones_like, saves)
    args = operands(LAYERS["linear"])
    check_native(
        lambda *args: functional.layer(function, *args), LAYERS["linear"].native, *args
    )


def test_an_error_inside_sigma_is_passed_on():
    def fails_on_rows(z):
        if z.dim() > 1:
            raise RuntimeError("from sigma")
        return z

    function = functional.define_function("Fails", fails_on_rows, torch.ones_like)
    with pytest.raises(RuntimeError, match="from sigma"):
        functional.layer(function, *operands(LAYERS["linear"]))


def test_public_names_exist():
    for module in (torchbp, functional, torchbp.costs, torchbp.nn, torchbp.convert):
        missing = [name for name in module.__all__ if not hasattr(module, name)]
        assert not missing, module.__name__


def test_z_layer_gives_one_output():
    out = Square(5, 2)(torch.ones(3, 5))
    assert isinstance(out, torch.Tensor)
    assert out.shape == (3, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("layer", "slope"),
    [
        (functional.linear_sigmoid, lambda a: a * (1 - a)),
        (functional.linear_tanh, lambda a: (1 - a) * (1 + a)),
    ],
)
def test_slopes_are_right_where_neurons_saturate(layer, slope, dtype):
    """Entry by entry: beside the largest one, an error in the tail would not show."""
    z = torch.linspace(-9, 9, 1001).to(dtype).unsqueeze(1)
    one = torch.ones(1, 1, dtype=dtype)
    x = z.requires_grad_()
    a = layer(x, one)
    for g in (1.0, 0.3):
        (grad,) = torch.autograd.grad(a, x, torch.full_like(a, g), retain_graph=True)
        expected = torch.tensor(g, dtype=dtype).double() * slope(a.detach().double())
        # σ' of the a that is saved: three products and a difference. Where a processor
        # has no product and difference in one, that of a and a rounds first, next to 1.
        off = bounds.units(4, dtype, expected) + bounds.units(0.5, torch.float32, g)
        bounds.assert_within(grad, expected, off)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 200])
def test_relu_passes_a_gradient_just_where_native_does(rows, dtype):
    """Small and large layers take different ways; neither lets 0 · inf through."""
    z = torch.randn(rows, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    z[0, :5] = torch.tensor([0.0, -0.0, torch.nan, -torch.nan, torch.inf])
    g = torch.randn(rows, 50, generator=torch.Generator().manual_seed(1)).to(dtype)
    g[:, 5:20] = torch.inf
    for layout in (g, g.t().contiguous().t(), g[0, 5].expand(rows, 50)):
        a = z.relu()
        x = z.clone().requires_grad_()
        x.relu().backward(layout)
        delta = functional.LinearReLUFunction.gate(layout, a)
        torch.testing.assert_close(delta, x.grad, **bounds.EXACT, equal_nan=True)
