"""Everything that torch does with native layers it does with ours, and alike.

Each test does the same to a network of our layers and to its native copy and compares
what comes out: outputs, gradients, weights after steps, what hooks see.
"""

import copy
import io
import pickle
from functools import partial
from itertools import pairwise

import bounds
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import BUILT_IN, F64, LAYERS, SiLU, all_layers, operands, rand
from torch import nn
from torch.autograd import graph
from torch.nn.utils import parametrizations, parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import torchbp

# One layer each, in this order.
NAMES = [*(name for name in BUILT_IN if name != "linear"), "linear"]
SIZES = [6, 5, 4, *[3] * (len(NAMES) - 3), 2]


@pytest.fixture
def pair():
    """A network with one of each of our layers, and a native copy of it: (ours, native)
    with no parameter in common. Children of the native one are Linear or (Linear, σ).
    """
    torch.manual_seed(0)
    sizes = pairwise(SIZES)
    ours = nn.Sequential(
        *(LAYERS[name].module(*size) for name, size in zip(NAMES, sizes, strict=True))
    ).double()
    native = nn.Sequential(*map(torchbp.to_native, ours))
    return ours, copy.deepcopy(native)


X, Y = rand(7, SIZES[0]), rand(7, SIZES[-1], seed=1)


def linears(model):
    """The modules that hold W and b."""
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def cost(model, x=X, y=Y):
    return F.mse_loss(model(x), y)


def gradients(model):
    return [p.grad for p in model.parameters()]


def assert_alike(pair):
    """The same output and the same gradients of x and of every parameter."""
    sweeps = []
    for model in pair:
        model.zero_grad()
        x = X.clone().requires_grad_()
        y = model(x)
        (y * Y).sum().backward()
        sweeps.append([y, x.grad, *gradients(model)])
    assert_close(*sweeps, **bounds.near())


def test_the_pair_is_alike_and_shares_nothing(pair):
    assert_alike(pair)
    ours, native = ({p.data_ptr() for p in model.parameters()} for model in pair)
    assert not ours & native


# ---------------------------------------------------------------- copies and files


def test_shallow_copy_shares_parameters(pair):
    for layer in pair[0]:
        other = copy.copy(layer)
        assert type(other) is type(layer)
        assert other.weight is layer.weight and other.bias is layer.bias


@pytest.mark.parametrize(
    "again",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "pickle"],
)
def test_networks_are_copied(pair, again):
    """Layers from define_layer, too: pickle finds them by name."""
    model = nn.Sequential(*pair[0], SiLU(2, 2).double())
    cost(model).backward()  # what a pass leaves behind is in nobody's way
    other = again(model)
    assert [type(layer) for layer in other] == [type(layer) for layer in model]
    assert_close(other(X), model(X), **bounds.EXACT)


def test_state_through_a_file_with_weights_only(pair):
    ours, _ = pair
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = copy.deepcopy(ours)
    for p in other.parameters():
        nn.init.zeros_(p)
    assert other.load_state_dict(state) == ([], [])
    assert_close(other(X), ours(X), **bounds.EXACT)


def test_state_of_a_native_sequence_by_position(pair):
    """The σ of Sequential(Linear, Sigmoid, ...) count as places there, so the keys
    differ, but the order does not."""
    ours, native = pair
    flat = nn.Sequential(*(m for m in native.modules() if not list(m.children())))
    for p in ours.parameters():
        nn.init.zeros_(p)
    values = flat.state_dict().values()
    ours.load_state_dict(dict(zip(ours.state_dict(), values, strict=True)))
    assert_alike((ours, flat))


def test_state_of_one_native_pair(pair):
    """Sequential(Linear, Sigmoid) itself: "0.weight" and "0.bias" fit as they are."""
    ours = nn.Sequential(torchbp.BPLinearSigmoid(6, 5, dtype=F64))
    native = nn.Sequential(nn.Linear(6, 5, dtype=F64), nn.Sigmoid())
    assert ours.load_state_dict(native.state_dict()) == ([], [])
    assert torch.equal(ours(X), native(X))


# ---------------------------------------------------------------- devices and dtypes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_to_dtype(pair, dtype):
    for model in pair:
        model.to(dtype)
    outputs = [model(X.to(dtype)) for model in pair]
    assert outputs[0].dtype == dtype
    assert_close(*outputs)


def test_to_meta_and_back(pair):
    """Shapes without numbers; then storage without values, then values."""
    ours, _ = pair
    state = copy.deepcopy(ours.state_dict())
    expected = ours(X).detach()
    ours.to("meta")
    output = ours(X.to("meta"))
    assert output.is_meta and output.shape == expected.shape
    output.sum().backward()
    assert all(p.grad.is_meta and p.grad.shape == p.shape for p in ours.parameters())
    ours.zero_grad()
    ours.to_empty(device="cpu").load_state_dict(state)
    assert torch.equal(ours(X), expected)


@all_layers
def test_deferred_initialisation(layer):
    """Made on "meta", materialised and initialised: as if made at once."""
    torch.manual_seed(3)
    expected = layer.module(5, 4)
    with torch.device("meta"):
        deferred = layer.module(5, 4)
    assert deferred.weight.is_meta
    deferred.to_empty(device="cpu")
    torch.manual_seed(3)
    deferred.reset_parameters()
    assert torch.equal(deferred.weight, expected.weight)
    assert torch.equal(deferred.bias, expected.bias)


@all_layers
def test_skip_init_and_assign(layer):
    source = layer.module(5, 4)
    skipped = nn.utils.skip_init(layer.module, 5, 4)
    assert type(skipped) is layer.module and not skipped.weight.is_meta
    with torch.device("meta"):
        assigned = layer.module(5, 4)
    x = rand(3, 5, dtype=torch.float32)
    for module, assign in ((skipped, False), (assigned, True)):
        module.load_state_dict(source.state_dict(), assign=assign)
        assert torch.equal(module(x), source(x))


def test_mlp_under_a_device_context():
    """The MLP's own initialisations, too, work where there are no numbers."""
    with torch.device("meta"):
        model = torchbp.MLP([5, 4, 3])
        assert model(torch.empty(2, 5)).shape == (2, 3)
    assert all(p.is_meta for p in model.parameters())


# ---------------------------------------------------------------- other weights

PARAMETRIZATIONS = [
    parametrizations.weight_norm,
    parametrizations.spectral_norm,
    parametrizations.orthogonal,
]


@pytest.mark.parametrize("apply", PARAMETRIZATIONS)
def test_parametrizations(pair, apply):
    for model in pair:
        for i, layer in enumerate(linears(model)):
            torch.manual_seed(i)  # spectral_norm draws where its iteration starts
            apply(layer)
    assert_alike(pair)
    for model in pair:
        for layer in linears(model):
            parametrize.remove_parametrizations(layer, "weight")
    assert [type(layer) for layer in pair[0]] == [LAYERS[n].module for n in NAMES]
    for model in pair:
        model.eval()
    assert_alike(pair)


@pytest.mark.parametrize("method", ["l1_unstructured", "random_unstructured"])
def test_pruning(pair, method):
    for model in pair:
        for i, layer in enumerate(linears(model)):
            torch.manual_seed(i)
            getattr(prune, method)(layer, "weight", amount=0.4)
    assert_alike(pair)
    off = [layer.weight_mask == 0 for layer in linears(pair[0])]
    for layer, mask in zip(linears(pair[0]), off, strict=True):
        assert mask.any() and (layer.weight_orig.grad[mask] == 0).all()
    for model in pair:
        for layer in linears(model):
            prune.remove(layer, "weight")
    assert_alike(pair)
    for layer, mask in zip(linears(pair[0]), off, strict=True):
        assert (
            isinstance(layer.weight, nn.Parameter) and (layer.weight[mask] == 0).all()
        )


def test_tied_weights():
    """One parameter in two layers gets the sum of both gradients."""
    torch.manual_seed(0)
    ours = nn.Sequential(torchbp.BPLinearSigmoid(6, 6), torchbp.BPLinearTanh(6, 6))
    ours.double()[1].weight = ours[0].weight
    native = copy.deepcopy(torchbp.to_native(ours))
    assert len([*ours.parameters()]) == len([*native.parameters()]) == 3
    for model in (ours, native):
        model(X).square().sum().backward()
    assert_close(gradients(ours), gradients(native))


# ---------------------------------------------------------------- hooks


def seen(values):
    return [None if v is None else v.detach().clone() for v in values]


def test_hooks_see_what_native_hooks_see(pair):
    """Arguments and outputs on the way up, their gradients on the way down."""
    records = []
    for model in pair:
        record = []

        def note(name, record=record):
            return lambda module, *values: record.append(
                (name, [seen(v if isinstance(v, tuple) else (v,)) for v in values])
            )

        for i, layer in enumerate(model):
            layer.register_forward_pre_hook(note(f"forward pre {i}"))
            layer.register_forward_hook(note(f"forward {i}"))
            layer.register_full_backward_pre_hook(note(f"backward pre {i}"))
            layer.register_full_backward_hook(note(f"backward {i}"))
        cost(model, X.clone().requires_grad_()).backward()
        records.append(record)
    ours, native = records
    assert [name for name, _ in ours] == [name for name, _ in native]
    assert len(ours) == 4 * len(NAMES)
    for (_, a), (_, b) in zip(ours, native, strict=True):
        assert_close(a, b, **bounds.near())


def double(*arguments):
    """A hook of any kind that doubles what it sees last."""
    values = arguments[-1]
    return tuple(2 * v for v in values) if isinstance(values, tuple) else 2 * values


REGISTER = {
    "forward pre": lambda layer: layer.register_forward_pre_hook(double),
    "forward": lambda layer: layer.register_forward_hook(double),
    "backward pre": lambda layer: layer.register_full_backward_pre_hook(double),
    "backward": lambda layer: layer.register_full_backward_hook(
        lambda module, grad_input, grad_output: double(grad_input)
    ),
    "parameter": lambda layer: linears(layer)[0].weight.register_hook(double),
    "output tensor": lambda layer: layer.register_forward_hook(
        lambda module, args, output: output.register_hook(double) and None
    ),
}


@pytest.mark.parametrize("kind", REGISTER)
def test_hooks_that_change_what_they_see(pair, kind):
    plain = copy.deepcopy(pair[0])
    for model in pair:
        handles = [REGISTER[kind](layer) for layer in list(model)[1:]]
    assert_alike(pair)
    cost(plain).backward()
    pair[0].zero_grad()
    cost(pair[0]).backward()
    assert not torch.equal(pair[0][1].weight.grad, plain[1].weight.grad)
    for handle in handles:
        handle.remove()


def test_hooks_after_accumulation_and_over_several_tensors(pair):
    """An optimiser inside the backward pass, and a hook on all gradients at once."""

    def step(p):
        p.detach().sub_(p.grad, alpha=0.1)

    for model in pair:
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(step)
        together = []
        handle = graph.register_multi_grad_hook(
            tuple(model.parameters()), lambda grads, t=together: t.append(seen(grads))
        )
        cost(model).backward()
        handle.remove()
        assert_close(together, [gradients(model)])
    assert_close([*pair[0].parameters()], [*pair[1].parameters()])


# ---------------------------------------------------------------- optimisers


def test_vectors_and_clipping(pair):
    vectors, norms = [], []
    for model in pair:
        cost(model).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.01))
        nn.utils.clip_grad_value_(model.parameters(), 0.005)
        vector = nn.utils.parameters_to_vector(model.parameters())
        nn.utils.vector_to_parameters(2 * vector, model.parameters())
        vectors.append(vector.detach())
    assert_close(*vectors, **bounds.EXACT)
    assert_close(*norms)
    assert_close(*map(gradients, pair))
    assert_alike(pair)


OPTIMISERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "Adam fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=3),
}
if hasattr(torch.optim, "Muon"):  # torch >= 2.9; it takes matrices only
    OPTIMISERS["Muon"] = lambda p: torch.optim.Muon(
        [t for t in p if t.dim() == 2], lr=0.01
    )


@pytest.mark.filterwarnings(
    # torch 2.8's LBFGS, about a line of its own.
    "ignore:Converting a tensor with requires_grad=True to a scalar:UserWarning"
)
@pytest.mark.parametrize("name", OPTIMISERS)
def test_optimisers_take_the_same_steps(pair, name):
    """Five steps, with what the optimiser keeps. Muon's iteration is in bfloat16, to
    which gradients that are equal to 1e-13 round alike."""
    start = copy.deepcopy([*pair[0].parameters()])
    for model in pair:
        optimiser = OPTIMISERS[name]([*model.parameters()])

        def closure(model=model, optimiser=optimiser):
            optimiser.zero_grad()
            value = cost(model)
            value.backward()
            return value

        for _ in range(5):
            optimiser.step(closure)
    ours, native = ([*model.parameters()] for model in pair)
    assert_close(ours, native, **bounds.near(steps=5))
    moved = [p for p, q in zip(ours, start, strict=True) if not torch.equal(p, q)]
    assert len(moved) == (len(NAMES) if name == "Muon" else 2 * len(NAMES))


def test_averaged_models(pair):
    averages = []
    for model in pair:
        average = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        )
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimiser.zero_grad()
            cost(model).backward()
            optimiser.step()
            average.update_parameters(model)
        averages.append(average)
    assert_alike(averages)
    assert type(averages[0].module[0]) is type(pair[0][0])


def test_gradient_accumulation_over_micro_batches(pair):
    """Uneven parts, each cost weighted by its rows, sum to the whole batch."""
    ours, _ = pair
    y = torch.sigmoid(Y)
    c = torchbp.QuadraticCost()
    c(ours(X), y).backward()
    whole = gradients(ours)
    ours.zero_grad()
    for part in torch.arange(len(X)).split(3):
        (c(ours(X[part]), y[part]) * (len(part) / len(X))).backward()
    assert_close(gradients(ours), whole, **bounds.near())


# ---------------------------------------------------------------- what autograd can do


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(pair, use_reentrant):
    """Activations made again in the backward pass, of a layer and of a sequence."""
    ours, native = pair
    x = X.clone().requires_grad_()
    expected = torch.autograd.grad(cost(native, x), [x, *native.parameters()])

    def each(x):
        for layer in ours:
            x = checkpoint(layer, x, use_reentrant=use_reentrant)
        return x

    def whole(x):
        return checkpoint_sequential(ours, 2, x, use_reentrant=use_reentrant)

    for forward in (each, whole):
        x.grad = None
        ours.zero_grad()
        cost(forward, x).backward()
        assert_close([x.grad, *gradients(ours)], list(expected), **bounds.near())


def test_saved_tensors_elsewhere(pair):
    """On the CPU by torch's own hook, and packed by a user's: here as bytes."""
    contexts = [
        graph.save_on_cpu(),
        graph.saved_tensors_hooks(
            lambda t: (t.detach().numpy().tobytes(), t.shape),
            lambda packed: torch.frombuffer(
                bytearray(packed[0]), dtype=F64
            ).reshape(packed[1]),
        ),
    ]  # fmt: skip
    for context in contexts:
        for model in pair:
            model.zero_grad()
            with context:
                value = cost(model)
            value.backward()
        assert_close(*map(gradients, pair))


def test_no_more_is_packed_than_by_native_layers(pair):
    counts = []
    for model in pair:
        packed = []

        def pack(t, packed=packed):
            packed.append(t)
            return t

        with graph.saved_tensors_hooks(pack, lambda t: t):
            cost(model)
        counts.append(len({t.data_ptr() for t in packed}))
    assert counts[0] <= counts[1]  # native softplus packs z, and ours a


def test_mutation_of_saved_outputs_where_torch_allows_it(pair):
    """a is saved; overwritten, autograd refuses, but not in this context."""
    for model in pair:
        with graph.allow_mutation_on_saved_tensors():
            a = model(X)
            b = model[0](X)
            value = (a * Y).sum() + b.square().sum()
            with torch.no_grad():
                b.zero_()
            value.backward()
    assert_close(*map(gradients, pair))


def test_gradient_edges(pair):
    """Gradients at a place in the graph, without the tensor that stood there."""
    grads = []
    for model in pair:
        a = model[0](X)
        edge = graph.get_gradient_edge(a)
        value = cost(lambda a, rest=model[1:]: rest(a), a)
        del a
        grads.append(torch.autograd.grad(value, [edge, next(model.parameters())]))
    assert_close(*grads)


def test_anomaly_mode(pair):
    """Sound passes go through; of an unsound one the culprit is named."""
    ours, _ = pair
    with torch.autograd.set_detect_anomaly(True):
        cost(ours).backward()
        assert_alike(pair)
        layer = torchbp.BPLinearSigmoid(6, 5, dtype=F64)
        y = layer(X)
        with (
            pytest.warns(UserWarning, match="Error detected in LinearSigmoid"),
            pytest.raises(RuntimeError, match=r"LinearSigmoidFunctionBackward.*nan"),
        ):
            y.backward(torch.full_like(y, torch.nan))


def test_deterministic_algorithms(pair):
    torch.use_deterministic_algorithms(True)
    try:
        assert_alike(pair)
        runs = []
        for _ in range(2):
            pair[0].zero_grad()
            cost(pair[0]).backward()
            runs.append(gradients(pair[0]))
        assert_close(*runs, **bounds.EXACT)
    finally:
        torch.use_deterministic_algorithms(False)


def test_flops_are_counted_as_for_native_layers(pair):
    """Multiplications of matrices are what is counted: we make no more of them."""
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for model in pair:
        with FlopCounterMode(display=False) as counter:
            cost(model, X.clone().requires_grad_()).backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


# ---------------------------------------------------------------- tools


def rewritten(model, x):
    """What a tool does that takes every nn.Linear for x Wᵀ + b and computes it so."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            x = F.linear(x, module.weight, module.bias)
        elif not list(module.children()):
            x = module(x)
    return x


def test_tools_that_call_linear_themselves_lose_sigma(pair):
    """Documented, with to_native as the way out; the identity layer is not hurt."""
    ours, _ = pair
    assert not torch.allclose(rewritten(ours, X), ours(X))
    assert torch.equal(rewritten(ours[-1:], ours[:-1](X)), ours(X))
    assert_close(rewritten(torchbp.to_native(ours), X), ours(X))


@pytest.mark.filterwarnings(
    "ignore:.*torch.ao.quantization is deprecated:DeprecationWarning",
    # torch >= 2.13 or so, about what its own quantize_dynamic calls.
    "ignore:.*torch.quantize_per_tensor, torch.quantize_per_channel:UserWarning",
)
def test_dynamic_quantization(pair):
    """It goes by the exact type: it leaves our layers as they are, σ and all, and
    quantizes those that to_native gives it."""
    ours = pair[0].float()
    x = X.float()
    quantize = torch.ao.quantization.quantize_dynamic
    unchanged = quantize(ours, {nn.Linear}, dtype=torch.qint8)
    assert [type(layer) for layer in unchanged] == [LAYERS[n].module for n in NAMES]
    assert torch.equal(unchanged(x), ours(x))
    quantized = quantize(torchbp.to_native(ours), {nn.Linear}, dtype=torch.qint8)
    assert not any(isinstance(module, nn.Linear) for module in quantized.modules())
    native = quantize(pair[1].float(), {nn.Linear}, dtype=torch.qint8)
    assert torch.equal(quantized(x), native(x))
    assert not torch.equal(quantized(x), ours(x))


def saving_products(mutation_allowed):
    """A context of selective checkpointing that keeps what every product returns."""
    from torch.utils.checkpoint import (
        CheckpointPolicy,
        create_selective_checkpoint_contexts,
    )

    def policy(ctx, op, *args, **kwargs):
        kept = op in (torch.ops.aten.addmm.default, torch.ops.aten.mm.default)
        P = CheckpointPolicy
        return P.MUST_SAVE if kept else P.PREFER_RECOMPUTE

    return partial(
        create_selective_checkpoint_contexts,
        policy,
        allow_cache_entry_mutation=mutation_allowed,
    )


@pytest.mark.parametrize("mutation_allowed", [False, True])
@pytest.mark.parametrize("shape", [(5, 4), (2, 5, 4)], ids=["2-D", "3-D"])
@all_layers
def test_selective_checkpointing_that_saves_the_products(
    layer, shape, mutation_allowed
):
    model = nn.Sequential(layer.module(4, 4), layer.module(4, 3)).double()
    plain = rand(*shape).requires_grad_()
    kept = plain.detach().clone().requires_grad_()
    expected = torch.autograd.grad(model(plain).sum(), [plain, *model.parameters()])
    output = torch.utils.checkpoint.checkpoint(
        model, kept, use_reentrant=False, context_fn=saving_products(mutation_allowed)
    )
    actual = torch.autograd.grad(output.sum(), [kept, *model.parameters()])
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("native", [False, True])
def test_a_gradient_penalty_alone_reaches_every_parameter(native):
    torch.manual_seed(0)
    model = torchbp.MLP([4, 5, 3, 2], "relu", output="sigmoid").double()
    model = torchbp.to_native(model) if native else model
    x = rand(6, 4).requires_grad_()
    hidden = model[0:4] if native else nn.Sequential(*model.layers[:2])
    (g,) = torch.autograd.grad(hidden(x).sum(), x, create_graph=True)
    used = list(model.parameters())[:4]
    grads = torch.autograd.grad(g.square().sum(), used)
    assert [p.shape for p in used] == [grad.shape for grad in grads]
    assert not grads[1].any() and not grads[3].any()  # ReLU has no curvature
    assert grads[0].any() and grads[2].any()


def test_a_layer_whose_slope_is_constant_has_zeros_as_second_derivatives():
    Scaled = torchbp.define_layer(
        "Scaled", lambda z: 3 * z, lambda a: torch.full_like(a, 3.0)
    )
    layer, x = Scaled(3, 2).double(), rand(4, 3).requires_grad_()
    (g,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    grad_W, grad_b = torch.autograd.grad(g.square().sum(), [layer.weight, layer.bias])
    assert grad_W.any() and not grad_b.any()


class Keeping:
    """What operations returned, kept as by a cache, and a copy of each."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def keep(self, output):
        if isinstance(output, torch.Tensor) and not output.is_meta:
            self.kept.append((output, output.detach().clone()))
        return output

    def assert_unchanged(self):
        assert self.kept
        for output, copied in self.kept:
            assert torch.equal(output.detach(), copied)


class KeepingOperations(Keeping, TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        return self.keep(op(*args, **kwargs or {}))


class KeepingCalls(Keeping, TorchFunctionMode):
    def __torch_function__(self, f, types, args=(), kwargs=None):
        output = f(*args, **kwargs or {})
        with torch._C.DisableTorchFunction():
            return self.keep(output)


@all_layers
@pytest.mark.parametrize("rows", [(7,), (2, 3), (99,)], ids=str)
def test_what_a_mode_keeps_of_a_pass_stays_as_it_was(layer, rows):
    """Forward and backward: nothing is overwritten under the eyes of a mode. 99 rows of
    50 are enough for what ReLU does to large layers."""
    model = nn.Sequential(layer.module(4, 50), layer.module(50, 50)).double()
    x = rand(*rows, 4).requires_grad_()
    expected = torch.autograd.grad(model(x).sum(), [x, *model.parameters()])
    with KeepingCalls() as calls:
        y = model(x)
    calls.assert_unchanged()
    with KeepingOperations() as operations:
        y = model(x)
        actual = torch.autograd.grad(y, [x, *model.parameters()], torch.ones_like(y))
    operations.assert_unchanged()
    assert_close(actual, expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a l")
@all_layers
def test_partitioners_that_recompute(layer):
    """functorch's, which choose what the forward pass keeps."""
    from functorch.compile import (
        aot_function,
        min_cut_rematerialization_partition,
        nop,
    )

    args = [t.detach().requires_grad_() for t in (rand(7, 4), rand(3, 4), rand(3))]
    f = aot_function(
        lambda *args: layer(*args).sin(),
        fw_compiler=nop,
        partition_fn=min_cut_rematerialization_partition,
    )
    g = rand(7, 3, seed=9)
    expected = torch.autograd.grad(layer.native(*args).sin(), args, g)
    assert_close(torch.autograd.grad(f(*args), args, g), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a l")
@all_layers
def test_selective_checkpointing_inside_a_compiled_function(layer):
    model = nn.Sequential(layer.module(4, 4), layer.module(4, 3)).double()
    x = rand(5, 4).requires_grad_()
    expected = torch.autograd.grad(model(x).sum(), [x, *model.parameters()])

    context = saving_products(False)

    def f(x):
        return checkpoint(model, x, use_reentrant=False, context_fn=context)

    torch.compiler.reset()
    y = torch.compile(f, backend="aot_eager", fullgraph=True)(x)
    torch.compiler.reset()
    assert_close(torch.autograd.grad(y.sum(), [x, *model.parameters()]), expected)


@all_layers
@pytest.mark.parametrize("bias", [True, False])
def test_a_penalty_on_the_gradient_reaches_what_native_ones_reach(layer, bias):
    """By every argument: a gradient, zeros or none, as native gives them."""
    results = []
    for f in (layer, layer.native):
        args = operands(layer, bias=bias)
        (g,) = torch.autograd.grad(f(*args).sum(), args[0], create_graph=True)
        penalty = g.square().sum()
        results.append(torch.autograd.grad(penalty, args, allow_unused=True))
    ours, native = results
    assert [g is None for g in ours] == [g is None for g in native]
    for a, b in zip(ours, native, strict=True):
        assert a is b is None or assert_close(a, b) is None


@pytest.mark.parametrize("infinite", [torch.inf, torch.nan])
def test_a_penalty_through_a_relu_that_is_not_finite(infinite):
    """Its zeros are zeros there, too."""
    x = torch.tensor([[infinite, -1.0], [2.0, -3.0]], dtype=F64, requires_grad=True)
    eye, b = torch.eye(2, dtype=F64), torch.zeros(2, dtype=F64, requires_grad=True)
    a = torchbp.functional.linear_relu(x, eye, b)
    (g,) = torch.autograd.grad(a, b, torch.ones_like(a), create_graph=True)
    (second,) = torch.autograd.grad(g.square().sum(), b)
    assert torch.equal(second, torch.zeros_like(b))


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()),
    reason="needs torch.distributed with gloo",
)
@pytest.mark.parametrize("name", ["relu", "sigmoid"])
def test_a_penalty_alone_under_distributed_data_parallel(name, tmp_path, monkeypatch):
    """Twice: the reducer refuses a second pass after one that left a parameter out."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    model = torchbp.MLP([4, 5, 3], name, dtype=F64)
    x = rand(6, 4).requires_grad_()
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            parallel.zero_grad()
            (g,) = torch.autograd.grad(parallel(x).sum(), x, create_graph=True)
            g.square().sum().backward()
    finally:
        dist.destroy_process_group()
    (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    expected = torch.autograd.grad(g.square().sum(), list(model.parameters()))
    assert_close(gradients(model), list(expected))


@all_layers
def test_expanded_weights_are_refused_with_the_way_out(layer):
    from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

    with pytest.raises(TypeError, match=r"call_for_per_sample_grads; torch.func.vmap"):
        call_for_per_sample_grads(layer.module(4, 3))(torch.rand(5, 4))
