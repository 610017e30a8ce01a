"""Autocast: layers compute in its dtype, costs in float32, and gradients come back in
the parameters' own dtype, as with native layers under the same autocast."""

import itertools

import bounds
import pytest
import torch
from cases import (
    BUILT_IN,
    F64,
    LAYERS,
    all_costs,
    all_layers,
    operands,
    rand,
    target_for,
)
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import torchbp

# torch warns of its own use of torch.jit.script when forward AD starts.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:FutureWarning"
)
needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device"
)
MODES = [
    pytest.param(("cpu", torch.bfloat16), id="cpu bfloat16"),
    pytest.param(("cpu", torch.float16), id="cpu float16"),
    pytest.param(("cuda", torch.bfloat16), id="cuda bfloat16", marks=needs_cuda),
    pytest.param(("cuda", torch.float16), id="cuda float16", marks=needs_cuda),
]
all_modes = pytest.mark.parametrize("mode", MODES)
CPU = ("cpu", torch.bfloat16)
MASKS = list(itertools.product([True, False], repeat=3))[:-1]


def arguments(layer, mode=CPU, rows=(4, 3), dtype=torch.float32):
    return [t.detach().to(mode[0]).requires_grad_()
            for t in operands(layer, rows, 5, 2, dtype=dtype)]  # fmt: skip


def assert_near(ours, native, dtype, steps=1):
    """Equal to some roundings of `dtype`, relative to the largest number: what is
    small here is a sum of large terms, each of them rounded."""
    assert native.isfinite().all()
    size = 1 + (float(native.detach().abs().max()) if native.numel() else 0)
    off = bounds.network(dtype, longest=6, layers=1, steps=steps) * size
    bounds.assert_within(ours, native, off)


def gradients(y, args, g):
    return torch.autograd.grad(y, args, g.to(y.dtype), retain_graph=True)


# ---------------------------------------------------------------- layers


@all_layers
@all_modes
@pytest.mark.parametrize("rows", [(), (4,), (2, 3), (0,)], ids=str)
def test_layer_agrees_with_native(layer, mode, rows):
    args = arguments(layer, mode, rows)
    with torch.autocast(*mode):
        y, expected = layer(*args), layer.native(*args)
    assert y.dtype == mode[1]
    g = rand(*y.shape, seed=9, dtype=mode[1]).to(mode[0])
    of_y, *off = bounds.layer(layer, *(t.cpu() for t in (g, *args)), dtype=mode[1])
    bounds.assert_within(y.cpu(), expected.cpu(), of_y)
    for ours, native, t, bound in zip(
        gradients(y, args, g), gradients(expected, args, g), args, off, strict=True
    ):
        assert ours.dtype == native.dtype == t.dtype == torch.float32
        bounds.assert_within(ours.cpu(), native.cpu(), bound)


@all_layers
@all_modes
def test_inside_and_outside_backward_agree(layer, mode):
    """Whether backward itself runs under autocast makes no difference."""
    args = arguments(layer, mode)
    with torch.autocast(*mode):
        y = layer(*args)
        g = rand(*y.shape, seed=9).to(y)
        inside = gradients(y, args, g)
    assert_close(gradients(y, args, g), inside, **bounds.EXACT)


@all_layers
@all_modes
def test_input_of_the_layer_below(layer, mode):
    """Parameters in float32, the input already in autocast's dtype."""
    x, W, b = arguments(layer, mode)
    x = x.detach().to(mode[1]).requires_grad_()
    with torch.autocast(*mode):
        y = layer(x, W, b)
    dtypes = [t.dtype for t in gradients(y, (x, W, b), torch.ones_like(y))]
    assert dtypes == [mode[1], torch.float32, torch.float32]


@all_layers
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_nothing_is_saved_in_float32(layer, mask):
    args = [t.detach().requires_grad_(n)
            for t, n in zip(arguments(layer), mask, strict=True)]  # fmt: skip
    packed = []

    def pack(t):
        packed.append(t.dtype)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        with torch.autocast(*CPU):
            y = layer(*args)
        saved = [t.dtype for t in y.grad_fn.saved_tensors if t is not None]
    assert set(saved) <= {torch.bfloat16}
    assert set(packed) <= {torch.bfloat16}


@pytest.mark.parametrize("name", BUILT_IN)
def test_saves_no_more_than_native(name):
    """Bytes that wait for the backward, each storage counted once."""
    layer = LAYERS[name]

    def saved_bytes(f):
        storages = {}

        def pack(t):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        args = arguments(layer)
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
            torch.autocast(*CPU),
        ):
            y = f(*args)
        return sum(storages.values()), y

    (ours, _y), (native, _z) = saved_bytes(layer), saved_bytes(layer.native)
    assert 0 < ours <= native


@all_layers
def test_float64_is_left_alone(layer):
    args = arguments(layer, dtype=F64)
    with torch.autocast(*CPU):
        y = layer(*args)
        assert layer.native(*args).dtype == F64
    g = rand(*y.shape, seed=9)
    assert_close(y, layer(*args), **bounds.EXACT)
    assert_close(gradients(y, args, g), gradients(layer.native(*args), args, g))


@all_layers
@pytest.mark.parametrize("wide", [0, 1, 2])
def test_one_float64_argument_is_refused(layer, wide):
    """As natively: it alone would stay what it is."""
    args = arguments(layer)
    args[wide] = args[wide].double()
    with torch.autocast(*CPU):
        with pytest.raises(RuntimeError):
            layer.native(*args)
        with pytest.raises(TypeError, match=r"expected the input's torch\.\w+, got"):
            layer(*args)


@all_layers
@all_modes
def test_nested_on_and_off(layer, mode):
    args = arguments(layer, mode)
    other = torch.float16 if mode[1] == torch.bfloat16 else torch.bfloat16
    seen = [layer(*args)]
    with torch.autocast(*mode):
        seen.append(layer(*args))
        with torch.autocast(mode[0], enabled=False):
            seen.append(layer(*args))
            with torch.autocast(*mode):
                seen.append(layer(*args))
        with torch.autocast(mode[0], other):
            seen.append(layer(*args))
        seen.append(layer(*args))
    seen.append(layer(*args))
    wide, half = torch.float32, mode[1]
    assert [y.dtype for y in seen] == [wide, half, wide, half, other, half, wide]
    for i, j in ((0, 2), (0, 6), (1, 3), (1, 5)):
        assert_close(seen[i], seen[j], **bounds.EXACT)


@all_layers
def test_half_into_a_region_without_autocast(layer):
    """bfloat16 from outside meets float32 parameters: refused, as natively."""
    x, W, b = arguments(layer)
    with torch.autocast(*CPU), torch.autocast("cpu", enabled=False):
        with pytest.raises(RuntimeError):
            layer.native(x.bfloat16(), W, b)
        with pytest.raises(TypeError, match=r"input's torch\.bfloat16, got"):
            layer(x.bfloat16(), W, b)


@all_layers
@needs_cuda
def test_autocast_of_another_device(layer):
    """Autocast for CUDA leaves the CPU alone, and the other way round."""
    with torch.autocast("cuda", torch.float16):
        assert layer(*arguments(layer)).dtype == torch.float32
    with torch.autocast(*CPU):
        assert layer(*arguments(layer, ("cuda",))).dtype == torch.float32


@all_layers
def test_meta_device(layer):
    """torch cannot even be asked whether autocast is on for "meta"."""
    with torch.autocast(*CPU):
        y = layer(*(t.detach().to("meta") for t in arguments(layer)))
    assert (y.dtype, y.device.type) == (torch.float32, "meta")


# ---------------------------------------------------------------- parameters


@all_layers
@pytest.mark.parametrize("first", [torch.no_grad, torch.inference_mode])
def test_forward_without_grad_and_then_with(layer, first):
    """Natively autocast keeps the cast weights of the first call, which have no graph
    (https://github.com/pytorch/pytorch/issues/65766); ours casts each time."""
    module = layer.module(5, 2)
    x = rand(4, 5, dtype=torch.float32)
    with torch.autocast(*CPU):
        with first():
            before = module(x)
        after = module(x)
    assert not before.requires_grad and before.dtype == torch.bfloat16
    assert_close(before.clone(), after.detach(), **bounds.EXACT)
    after.float().square().sum().backward()
    for p in module.parameters():
        assert p.grad.dtype == torch.float32 and p.grad.any()


@all_layers
def test_parameters_changed_inside_the_region(layer):
    module, x = layer.module(5, 2), rand(4, 5, dtype=torch.float32)
    with torch.autocast(*CPU):
        before = module(x)
        with torch.no_grad():
            module.weight.mul_(-2)
        after = module(x)
    assert not torch.equal(before, after)
    with torch.autocast(*CPU):
        assert torch.equal(module(x), after)


# ---------------------------------------------------------------- checkpointing


@all_layers
@all_modes
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(layer, mode, use_reentrant):
    """The recomputed forward runs under the autocast of the first."""
    args = arguments(layer, mode)
    with torch.autocast(*mode):
        y = layer(*args)
        again = checkpoint(layer, *args, use_reentrant=use_reentrant)
    g = rand(*y.shape, seed=9).to(y)
    y.backward(g)
    expected = [t.grad for t in args]
    for t in args:
        t.grad = None
    again.backward(g)  # not autograd.grad, which the reentrant form refuses
    assert_close([t.grad for t in args], expected, **bounds.EXACT)


# ---------------------------------------------------------------- transforms


def energy(f):
    return lambda *args: f(*args).float().square().sum()


ALL = (0, 1, 2)
TRANSFORMS = {
    "grad": lambda f, x, W, b: grad(energy(f), ALL)(x, W, b),
    "vmap": lambda f, x, W, b: (vmap(f, (0, None, None))(x, W, b),),
    "vmap(grad)": lambda f, x, W, b: vmap(grad(energy(f), ALL), (0, None, None))(
        x, W, b
    ),
    "jacrev": lambda f, x, W, b: jacrev(f, ALL)(x, W, b),
    "jacfwd": lambda f, x, W, b: jacfwd(f, ALL)(x, W, b),
    "hessian": lambda f, x, W, b: (hessian(lambda b: energy(f)(x, W, b))(b),),
    "jvp": lambda f, *args: jvp(f, args, tuple(torch.ones_like(t) for t in args)),
}


@all_layers
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(layer, name):
    args = [t.detach() for t in arguments(layer, rows=(3,))]
    with torch.autocast(*CPU):
        ours = TRANSFORMS[name](layer, *args)
        native = TRANSFORMS[name](layer.native, *args)
    for t, reference in zip(ours, native, strict=True):
        assert_near(t, reference, torch.bfloat16)


@all_layers
def test_dual_numbers(layer):
    with forward_ad.dual_level(), torch.autocast(*CPU):
        args = [forward_ad.make_dual(t.detach(), torch.ones_like(t))
                for t in arguments(layer)]  # fmt: skip
        ours = forward_ad.unpack_dual(layer(*args))
        native = forward_ad.unpack_dual(layer.native(*args))
    assert ours.primal.dtype == ours.tangent.dtype == torch.bfloat16
    for t, reference in zip(ours, native, strict=True):
        assert_near(t, reference, torch.bfloat16)


# ---------------------------------------------------------------- costs


@all_costs
@all_modes
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("labels", [False, True])
def test_cost_computes_in_float32(cost, mode, dtype, labels):
    v = rand(4, 3, dtype=dtype).to(mode[0]).requires_grad_()
    y = target_for(cost, 4, 3, dtype=torch.float32)
    y = (torch.tensor([0, 2, 1, 0]) if labels else y).to(mode[0])
    with torch.autocast(*mode):
        value = cost(v, y)
    wide = v.detach().float().requires_grad_()
    expected = cost(wide, y)
    assert value.dtype == torch.float32
    assert_close(value, expected, **bounds.EXACT)
    (ours,), (reference,) = (
        torch.autograd.grad(value, v), torch.autograd.grad(expected, wide)
    )  # fmt: skip
    assert ours.dtype == dtype
    assert_close(ours, reference.to(dtype), **bounds.EXACT)


@all_costs
def test_cost_leaves_float64_alone(cost):
    v, y = rand(4, 3).requires_grad_(), target_for(cost, 4, 3)
    with torch.autocast(*CPU):
        value = cost(v, y)
    assert_close(value, cost(v, y), **bounds.EXACT)
    assert torch.autograd.grad(value, v)[0].dtype == F64


@all_costs
def test_cost_under_transforms(cost):
    v, y = rand(4, 3, dtype=torch.bfloat16), target_for(cost, 4, 3, dtype=torch.float32)
    with torch.autocast(*CPU):
        each = vmap(grad(cost))(v, y)
        _, tangent = jvp(lambda v: cost(v, y), (v,), (torch.ones_like(v),))
    assert (each.dtype, tangent.dtype) == (torch.bfloat16, torch.float32)
    assert_near(each, vmap(grad(cost.native))(v.float(), y), torch.bfloat16)
    assert_near(tangent, each.double().mean(0).sum(), torch.bfloat16)


@all_costs
def test_cost_without_grad(cost):
    v, y = rand(4, 3, dtype=torch.bfloat16), target_for(cost, 4, 3, dtype=torch.float32)
    with torch.autocast(*CPU), torch.no_grad():
        assert cost(v.requires_grad_(), y).dtype == torch.float32
        assert not cost(v, y).requires_grad


# ---------------------------------------------------------------- training


def networks(layer, mode):
    """The same two layers, ours and native."""

    class Native(nn.Linear):
        def forward(self, input):
            return layer.native(input, self.weight, self.bias)

    ours = nn.Sequential(layer.module(5, 4), torchbp.BPLinear(4, 3))
    native = nn.Sequential(Native(5, 4), nn.Linear(4, 3))
    for i, p in enumerate(ours.parameters()):
        p.data = rand(*p.shape, seed=i, dtype=torch.float32) / 2
    native.load_state_dict(ours.state_dict())
    return ours.to(mode[0]), native.to(mode[0])


@all_layers
@all_costs
@all_modes
def test_training(layer, cost, mode):
    """A few steps, scaled as float16 needs it: native's weights, in float32."""
    x = rand(6, 5, seed=30, dtype=torch.float32).to(mode[0])
    y = target_for(cost, 6, 3, dtype=torch.float32).to(mode[0])
    models = networks(layer, mode)
    for model, c in zip(models, (cost, cost.native), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler(mode[0], init_scale=2.0**8)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast(*mode):
                value = c(model(x).float(), y)
            assert value.dtype == torch.float32
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 2.0**8, "a step was skipped"
    for ours, native in zip(*(m.parameters() for m in models), strict=True):
        assert ours.dtype == ours.grad.dtype == torch.float32
        assert_near(ours, native, mode[1])


@all_layers
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_grad_scaler_finds_infinities(layer, device):
    """A scale that overflows float16 skips the step and is lowered."""
    model, _ = networks(layer, (device,))
    x, y = torch.ones(6, 5, device=device), torch.zeros(6, 3, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**40)
    before = [p.detach().clone() for p in model.parameters()]
    with torch.autocast(device, torch.float16):
        value = torchbp.QuadraticCost()(model(x), y)
    scaler.scale(value).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**39
    assert_close(list(model.parameters()), before, **bounds.EXACT)


def test_functional_call_under_autocast():
    model = torchbp.MLP([5, 4, 3], output="identity")
    params = {k: p.detach() for k, p in model.named_parameters()}
    x, labels = rand(6, 5, dtype=torch.float32), torch.tensor([0, 1, 2, 0, 1, 2])
    cost = torchbp.LogLikelihoodCost()

    def f(params, x, label):
        return cost(functional_call(model, params, (x,)), label)

    with torch.autocast(*CPU):
        each = vmap(grad(f), (None, 0, 0))(params, x, labels)
        cost(model(x), labels).backward()
    for name, p in model.named_parameters():
        assert each[name].dtype == p.grad.dtype == torch.float32
        assert_near(each[name].mean(0), p.grad, torch.bfloat16)
