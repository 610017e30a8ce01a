"""What is no block of numbers in memory: native's result, or a refusal that says so."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from cases import LAYERS, all_layers, rand

import torchbp
from torchbp.costs import COSTS
from torchbp.data import Split, Splits
from torchbp.training import AutogradSGD, Trainer

SPARSE = {
    "coo": torch.Tensor.to_sparse,
    "csr": torch.Tensor.to_sparse_csr,
    "csc": torch.Tensor.to_sparse_csc,
    "bsr": lambda t: t.to_sparse_bsr((1, 1)),
    "bsc": lambda t: t.to_sparse_bsc((1, 1)),
}
KINDS = {
    **SPARSE,
    "nested": lambda t: torch.nested.nested_tensor([t[:2], t[2:]]),
    "jagged": lambda t: torch.nested.nested_tensor([t[:2], t[2:]], layout=torch.jagged),
    "quantized": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.quint8),
}
of_any_kind = pytest.mark.parametrize("kind", KINDS)


def made(kind, t):
    with warnings.catch_warnings():  # torch's own: layouts in beta, dtypes to go
        warnings.simplefilter("ignore")
        return KINDS[kind](t)


def x(*shape):
    return rand(*shape, dtype=torch.float32).abs() + 0.1


def network(*sizes, output=None):
    torch.manual_seed(0)
    return torchbp.MLP(sizes, output=output)


@of_any_kind
@pytest.mark.parametrize("cost", COSTS.values(), ids=COSTS)
def test_costs(cost, kind):
    dense, other = x(4, 3), made(kind, x(4, 3))
    with pytest.raises(TypeError, match=r"^input: expected a dense Tensor, got"):
        cost()(other, dense)
    with pytest.raises(TypeError, match=r"^target: expected a dense Tensor, got"):
        cost()(dense, other)


@of_any_kind
def test_the_explicit_engine(kind):
    model, cost = network(4, 3), torchbp.QuadraticCost()
    before = [p.clone() for p in model.parameters()]
    engine = torchbp.ExplicitSGD(model, cost, 1.0)
    dense, other, y, order = x(4, 4), made(kind, x(4, 4)), x(4, 3), torch.arange(4)
    for name, call in (
        ("input", lambda: engine.step(other, y)),
        ("target", lambda: engine.step(dense, made(kind, y))),
        ("images", lambda: engine.epoch(other, y, 2)),
        ("targets", lambda: engine.epoch(dense, made(kind, y), 2)),
        ("images", lambda: engine.steps(other, y, order, 2)),
        ("input", lambda: torchbp.backprop(model, cost, other, y)),
        ("input", lambda: torchbp.compare(model, cost, other, y)),
        ("target", lambda: torchbp.compare(model, cost, dense, made(kind, y))),
    ):
        with pytest.raises(TypeError, match=f"^{name}: expected a dense Tensor, got"):
            call()
    assert all(map(torch.equal, model.parameters(), before))


@of_any_kind
@pytest.mark.parametrize("engine", [AutogradSGD, torchbp.ExplicitSGD])
@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_the_trainer(engine, split, kind):
    images = (255 * x(4, 6).clamp(max=1)).byte()
    good = Split(images, torch.arange(4) % 3)
    other = made(kind, images.float() if kind == "quantized" else images)
    data = Splits(good, good, good)._replace(**{split: Split(other, good.labels)})
    model, cost = network(6, 3), torchbp.QuadraticCost()
    with pytest.raises(TypeError, match=f"^{split} images: expected a dense Tensor"):
        Trainer(model, engine(model, cost, 1.0), cost, data, 2)


def outcome(f, *tensors):
    """The output and the gradients, or None where a step of it is not implemented."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    try:
        output = f(*leaves)
        output.square().sum().backward()
    except (RuntimeError, TypeError) as error:
        return None, error
    return [output.detach(), *(leaf.grad.to_dense() for leaf in leaves)], None


@of_any_kind
@all_layers
def test_layers_do_what_native_ones_do_or_say_why_not(layer, kind):
    """A sparse input is as good as a dense one where torch has the products."""
    dtype = torch.float32 if kind == "quantized" else torch.float64
    input = made(kind, x(4, 4).to(dtype))
    W, b = rand(3, 4, dtype=dtype), rand(3, dtype=dtype)
    native, _ = outcome(lambda W, b: layer.native(input, W, b), W, b)
    ours, error = outcome(lambda W, b: layer(input, W, b), W, b)
    if native is not None and kind in SPARSE:
        assert ours is not None, error
        torch.testing.assert_close(ours, native)
    elif kind not in SPARSE:
        assert isinstance(error, TypeError)
        assert str(error).startswith("input: expected a dense Tensor, got")


def test_a_layer_s_sparse_weight_is_refused_where_torch_has_no_product():
    W, b = rand(3, 4).to_sparse(), rand(3)
    with pytest.raises(RuntimeError):
        F.linear(rand(2, 4), W, b)
    for layer in LAYERS.values():
        with pytest.raises(TypeError, match=r"^weight: expected a dense Tensor, got"):
            layer(rand(2, 4), W, b)


META = {"device": "meta"}


def test_numbers_that_are_not_there():
    """On the device meta a tensor has a shape alone: enough for a layer and a cost."""
    cost = torchbp.QuadraticCost()
    C = cost(
        network(4, 3).to("meta")(torch.rand(5, 4, **META)), torch.rand(5, 3, **META)
    )
    assert C.is_meta
    model, y = network(4, 3), x(5, 3)
    engine = torchbp.ExplicitSGD(model, cost, 1.0)
    with pytest.raises((TypeError, ValueError), match="meta"):
        engine.step(x(5, 4).to("meta"), y)
    with pytest.raises((TypeError, ValueError), match="meta"):
        engine.epoch(x(5, 4), y.to("meta"), 2)
    with pytest.raises(
        TypeError, match=r"^parameters: expected a dense Tensor, got one"
    ):
        torchbp.ExplicitSGD(network(4, 3).to("meta"), cost, 1.0)
    model.to("meta")
    for call in (engine.step, lambda x, y: engine.epoch(x, y, 2)):
        with pytest.raises(TypeError, match="expected a dense Tensor, got one on the"):
            call(torch.rand(5, 4, **META), torch.rand(5, 3, **META))
    split = Split(torch.zeros(4, 6, dtype=torch.uint8), torch.arange(4) % 3)
    gone = Split(split.images, split.labels.to("meta"))
    model = network(6, 3)
    with pytest.raises(
        TypeError, match=r"^test labels: expected a dense Tensor, got one"
    ):
        Trainer(model, engine, cost, Splits(split, split, gone), 2)


def test_complex_numbers():
    z, y = x(4, 3) + 0j, x(4, 3)
    for cost in COSTS.values():
        with pytest.raises(TypeError, match=r"^input: expected a real floating dtype"):
            cost()(z, y)
        with pytest.raises(TypeError, match=r"^target: expected the input's"):
            cost()(y, z)
    engine = torchbp.ExplicitSGD(network(3, 3), torchbp.QuadraticCost(), 1.0)
    with pytest.raises(TypeError, match=r"^input: expected a real floating dtype"):
        engine.step(z, y)
    with pytest.raises(TypeError, match=r"^images: expected uint8 or"):
        engine.epoch(z, y, 2)
    for layer in LAYERS.values():
        with pytest.raises(TypeError, match=r"^input: expected a real floating dtype"):
            layer(z, x(2, 3))
