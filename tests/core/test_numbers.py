"""Numbers: as exact as native ones, finite where the mathematics is, and a stop with
the place and the reason where something is not finite."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import tracemalloc
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import bounds
import pytest
import torch
from cases import COSTS, LAYERS, Cost, Layer, all_layers, rand
from torch import Tensor

import torchbp
from torchbp.data.sets import Split, Splits
from torchbp.nn import ACTIVATIONS
from torchbp.training import AutogradSGD, DivergedError, Trainer

INF, NAN = math.inf, math.nan
ENGINES = {"autograd": AutogradSGD, "explicit": torchbp.ExplicitSGD}
engines = pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES.keys())


# float32 beside float64


def a_case(seed: int) -> tuple[str, str, list[Tensor], Tensor]:
    """A layer, a cost, x, W and b of many sizes and scales, and targets."""
    g = torch.Generator().manual_seed(seed)

    def size(most: int) -> int:
        return int(torch.randint(1, most + 1, (), generator=g))

    def scale(low: float, high: float) -> float:
        return 10 ** (low + (high - low) * float(torch.rand((), generator=g)))

    layer = list(LAYERS)[seed % len(LAYERS)]
    cost = list(COSTS)[seed // len(LAYERS) % len(COSTS)]
    m, n_in, n_out = size(64), size(100), size(12)
    x = torch.randn(m, n_in, generator=g) * scale(-3, 2)
    W = torch.randn(n_out, n_in, generator=g) * scale(-2, 1) / math.sqrt(n_in)
    b = torch.randn(n_out, generator=g) * scale(-2, 1)
    y = torch.rand(m, n_out, generator=g)
    if COSTS[cost].is_distribution:
        y /= y.sum(-1, keepdim=True)
    return layer, cost, [x, W, b], y


def gradients(f: Callable[..., Tensor], arguments: list[Tensor]) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in arguments]
    return list(torch.autograd.grad(f(*leaves), leaves))


def allowed(layer: Layer, cost: Cost, arguments: list[Tensor], y: Tensor):
    """The bounds of the gradients by x, W and b in float32, of arguments in float64."""
    x, W, b = arguments
    v = layer.sigma(torch.nn.functional.linear(x, W, b)).requires_grad_()
    (g,) = torch.autograd.grad(cost.native(v, y), v)
    f32 = torch.float32
    of_v = bounds.layer(layer, g, x, W, b, f32)[0]
    _, of_g = bounds.cost(v, y, of_v, f32)
    return bounds.layer(layer, g, x, W, b, f32, of_g)[1:]


def check_float32(cases: int) -> None:
    """Every gradient is within its bound, native's too, which shows that the bounds
    hold; and over all cases of a layer, a cost and a gradient ours are as exact."""
    errors: dict[tuple[str, str, str], list[tuple[float, float]]] = defaultdict(list)
    compared = 0
    for seed in range(cases):
        layer_name, cost_name, arguments, y = a_case(seed)
        layer, cost = LAYERS[layer_name], COSTS[cost_name]
        wide, y64 = [t.double() for t in arguments], y.double()

        def native(*args: Tensor, y: Tensor, layer=layer, cost=cost) -> Tensor:
            return cost.native(layer.native(*args), y)

        exact = gradients(lambda *a: native(*a, y=y64), wide)  # noqa: B023
        theirs = gradients(lambda *a: native(*a, y=y), arguments)  # noqa: B023
        ours = gradients(lambda *a: cost(layer(*a), y), arguments)  # noqa: B023
        off = allowed(layer, cost, wide, y64)
        for name, o, t, e, bound in zip("xWb", ours, theirs, exact, off, strict=True):
            if not (t.isfinite().all() and e.float().isfinite().all()):
                # Native overflows on the way, or float32 does not reach so far.
                continue
            for gradient in (o, t):
                bounds.assert_within(gradient, e, bound)
            size = float(e.norm())
            if size < math.sqrt(bounds.tiny(torch.float32)):
                continue  # near the smallest numbers, digits are lost by anyone
            pair = (float((g - e).norm()) / size for g in (o, t))
            errors[layer_name, cost_name, name].append(tuple(pair))
            compared += 1
    assert compared > 2 * cases
    assert len(errors) == 3 * len(LAYERS) * len(COSTS)
    for pairs in errors.values():
        bounds.assert_as_exact(*zip(*pairs, strict=True))


def test_float32_is_as_exact_as_native_in_1000_cases() -> None:
    check_float32(1000)


@pytest.mark.slow
def test_float32_is_as_exact_as_native_in_30000_cases() -> None:
    check_float32(30_000)


def check_networks(cases: int) -> None:
    """The same of whole networks, by `backprop` and by the layers' own backward, of the
    gradients' norms."""
    errors: list[list[float]] = []
    for seed in range(cases):
        g = torch.Generator().manual_seed(seed)
        depth = int(torch.randint(1, 5, (), generator=g))
        sizes = torch.randint(1, 40, (depth + 1,), generator=g).tolist()
        names = [name for name in ACTIVATIONS if name != "identity"]
        name = names[seed % len(names)]
        cost_name = list(COSTS)[seed % len(COSTS)]
        cost = COSTS[cost_name]
        output = "identity" if cost.module.takes == "z" else None
        torch.manual_seed(seed)
        model = torchbp.MLP(sizes, name, output)
        x = torch.rand(13, sizes[0], generator=g)
        y = torch.rand(13, sizes[-1], generator=g)
        if cost.is_distribution:
            y /= y.sum(-1, keepdim=True)
        native = torchbp.to_native(model)
        ways = [
            list(torchbp.backprop(model, cost.module(), x, y)[1].values()),
            torch.autograd.grad(cost(model(x), y), list(model.parameters())),
            torch.autograd.grad(cost.native(native(x), y), list(native.parameters())),
        ]
        native.double()
        exact = torch.autograd.grad(
            cost.native(native(x.double()), y.double()), list(native.parameters())
        )
        for *gradients, right in zip(*ways, exact, strict=True):
            scale = right.norm()
            off = [float((gradient - right).norm() / scale) for gradient in gradients]
            if scale > bounds.tiny(torch.float32):  # else its neurons are off
                errors.append(off)
    assert len(errors) > cases
    by_hand, layers, native = zip(*errors, strict=True)
    bounds.assert_as_exact(by_hand, native)
    bounds.assert_as_exact(layers, native)


def test_networks_are_as_exact_as_native_ones() -> None:
    check_networks(240)


@pytest.mark.slow
def test_many_networks_are_as_exact_as_native_ones() -> None:
    check_networks(10_000)


# Extreme z

EXTREMES = [-INF, -1e30, -1e4, -104.0, -88.0, -17.0, 0.0, 17.0, 88.0, 1e4, 1e30, INF]


@pytest.mark.parametrize("z", EXTREMES)
@all_layers
def test_gradients_at_extreme_z(layer: Layer, z: float) -> None:
    """z by way of b, so that x and W are of order 1 and the product rules hold."""
    x, W = rand(3, 5, dtype=torch.float32), rand(2, 5, seed=1, dtype=torch.float32)
    b = torch.full((2,), z)
    g = rand(3, 2, seed=2, dtype=torch.float32)
    leaves = [t.clone().requires_grad_() for t in (x, W, b)]
    ours = torch.autograd.grad(layer(*leaves), leaves, g)
    native = torch.autograd.grad(layer.native(*leaves), leaves, g)
    off = bounds.layer(layer, g, x, W, b)[1:]
    for o, n, bound in zip(ours, native, off, strict=True):
        finite = n.isfinite()
        bounds.assert_within(o[finite], n[finite], bound[finite])
    if layer.module.__module__.startswith("torchbp"):  # not one whose σ' is a user's
        assert all(o.isfinite().all() for o in ours)
        least = bounds.tiny(torch.float32)
        if abs(z) > 100 and (layer.slope(b.double()) < least).all():
            assert all((o.abs() < least).all() for o in ours)


def softmax(z: Tensor) -> Tensor:
    """In float64 and of the largest z alone where that is infinite: the limit."""
    z = z.double()
    if (z == INF).any():
        return (z == INF).double() / (z == INF).sum()
    return z.softmax(-1)


# Rows of z: at most one is +inf, since of two the softmax has no limit.
ROWS = [
    [1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [1e4, 1e4, 1e4], [1e30, -1e30, 5.0],
    [3e38, -3e38, 0.0], [INF, 0.0, 1.0], [INF, 1e30, -1e30], [INF, -INF, 2.0],
    [-INF, 0.0, 1.0], [-INF, -INF, 3.0], [17.0, -17.0, 88.0], [104.0, 0.0, -104.0],
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("label", [0, 1, 2])
@pytest.mark.parametrize("kind", ["cross-entropy", "log-likelihood"])
def test_gradients_of_costs_of_extreme_z(
    row: list[float], label: int, kind: str
) -> None:
    """σ(z) - y and softmax(z) - y, which are finite for every z that has them; equal to
    native's where native's are finite; the same by `backprop`."""
    z = torch.tensor([row, [0.5, -0.5, 0.0]], requires_grad=True)
    labels = torch.tensor([label, 1])
    y = torch.nn.functional.one_hot(labels, 3).float()
    cost = COSTS[kind]
    (grad,) = torch.autograd.grad(cost(z, y), z)
    σ = torch.sigmoid if kind == "cross-entropy" else softmax
    exact = torch.stack([σ(r.double()) for r in z.detach()]) - y
    off = bounds.close(bounds.OPERATIONS + 3, torch.float32)  # a sum of three
    torch.testing.assert_close(grad.double(), exact / 2, **off)
    (native,) = torch.autograd.grad(cost.native(z, y), z)
    finite = native.isfinite()
    torch.testing.assert_close(grad[finite], native[finite], **off)

    model = torchbp.BPLinear(1, 3)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(z[0])
    _, by_hand = torchbp.backprop(model, cost.module(), torch.ones(1, 1), labels[:1])
    torch.testing.assert_close(by_hand["bias"].double(), exact[0], **off)


@pytest.mark.parametrize("value", [-1e4, 1e4])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["quadratic", "cross-entropy", "log-likelihood"])
def test_a_step_at_extreme_z_is_the_autograd_path_s(
    kind: str, activation: str, value: float
) -> None:
    """Weighted inputs of ±10,000 in every layer, by both engines and native layers."""
    cost = COSTS[kind]
    ends = []
    for way in ("explicit", "autograd", "native"):
        torch.manual_seed(0)
        output = "identity" if cost.module.takes == "z" else None
        model = torchbp.MLP([4, 3, 3], activation, output)
        with torch.no_grad():
            for layer in model.layers:
                layer.bias.copy_(torch.tensor([value, -value, value / 2]))
        x, y = rand(6, 4, dtype=torch.float32), torch.arange(6) % 3
        if way == "explicit":
            torchbp.ExplicitSGD(model, cost.module(), lr=0.1).step(x, y)
        elif way == "autograd":
            AutogradSGD(model, cost.module(), lr=0.1).step(x, y)
        else:
            native = torchbp.to_native(model)  # shares the parameters
            rows = torch.nn.functional.one_hot(y, 3).float()
            cost.native(native(x), rows).backward()
            torch.optim.SGD(native.parameters(), lr=0.1).step()
        ends.append(list(model.parameters()))
    for explicit, autograd, native in zip(*ends, strict=True):
        assert explicit.isfinite().all()
        off = bounds.near(torch.float32, longest=6, layers=2)
        torch.testing.assert_close(explicit, autograd, **off)
        torch.testing.assert_close(explicit, native, **off)


# What is not finite stops, and says where and why


def few(n: int = 40) -> Splits:
    """Bytes, as training has them: whatever they are, they are finite numbers."""
    g = torch.Generator().manual_seed(0)
    images = torch.randint(256, (n, 16), dtype=torch.uint8, generator=g)
    split = Split(images, torch.arange(n) % 4)
    return Splits(split, split, split)


def a_trainer(engine: type, lr: float = 0.5, **options: object) -> Trainer:
    torch.manual_seed(0)
    model = torchbp.MLP([16, 6, 4], **options)
    cost = torchbp.QuadraticCost()
    return Trainer(model, engine(model, cost, lr), cost, few(), batch_size=5)


def stopped(trainer: Trainer, epochs: int = 3) -> str:
    """The one line of the error in which training must end; nothing is saved or told
    of a network that was not finite from the start."""
    saved: list[dict] = []
    told: list[object] = []
    with pytest.raises(DivergedError) as caught:
        trainer.fit(epochs, on_epoch=told.append, save=saved.append)
    for state in saved:
        assert all(t.isfinite().all() for t in state["model"].values())
    assert "\n" not in str(caught.value)
    return str(caught.value)


@engines
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["layers.0.weight", "layers.1.bias"])
def test_parameters_that_are_not_finite_before_training(
    engine: type, name: str, value: float
) -> None:
    trainer = a_trainer(engine)
    trainer.fit(1)
    with torch.no_grad():
        dict(trainer.model.named_parameters())[name].view(-1)[0] = value
    message = stopped(trainer)
    assert "before epoch 2" in message and message.endswith(f" in {name}")
    assert "lr" not in message  # the rate is not to blame
    with pytest.raises(DivergedError, match=f"before epoch 2.* in {name}"):
        trainer.run_epoch()


@engines
def test_many_parameters_that_are_not_finite_are_counted(engine: type) -> None:
    trainer = a_trainer(engine)
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.fill_(NAN)
    assert "layers.1.bias" in stopped(trainer)
    model = torchbp.MLP([16, *[4] * 9])
    for p in model.parameters():
        torch.nn.init.constant_(p, INF)
    cost = torchbp.QuadraticCost()
    trainer = Trainer(model, engine(model, cost, 0.1), cost, few(), batch_size=5)
    assert stopped(trainer).endswith("layers.1.bias and 14 more")


@engines
def test_a_cost_that_is_not_finite_in_an_epoch(engine: type) -> None:
    trainer = a_trainer(engine, lr=1e30, activation="relu", output="identity")
    message = stopped(trainer)
    assert "in epoch 1, step " in message and "at lr 1e+30" in message
    assert "parameters not finite: layers.0.weight" in message


@engines
def test_a_last_step_that_is_not_finite(engine: type) -> None:
    """One mini-batch an epoch: its cost is that before the step."""
    trainer = a_trainer(engine, lr=3e38, activation="relu", output="identity")
    trainer.batch_size = 40
    message = stopped(trainer)
    assert "after epoch 1" in message and "lr 3e+38" in message


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("what", ["images", "targets"])
def test_an_epoch_refuses_numbers_that_are_not_finite(what: str, value: float) -> None:
    model = torchbp.MLP([4, 3, 2])
    before = [p.clone() for p in model.parameters()]
    sgd = torchbp.ExplicitSGD(model, torchbp.QuadraticCost(), lr=1.0)
    images, targets = torch.rand(10, 4), torch.rand(10, 2)
    {"images": images, "targets": targets}[what][7, 1] = value
    for call in (
        lambda: sgd.epoch(images, targets, 3),
        lambda: sgd.steps(images, targets, torch.arange(10), 3),
    ):
        with pytest.raises(ValueError, match=rf"{what}: .* got {value} in example 7"):
            call()
    assert all(map(torch.equal, before, model.parameters()))


def test_numbers_whose_sum_overflows_are_finite() -> None:
    model = torchbp.MLP([4, 3, 2])
    sgd = torchbp.ExplicitSGD(model, torchbp.QuadraticCost(), lr=0.0)
    images = torch.full((10, 4), 3e38)
    assert sgd.epoch(images, torch.rand(10, 2), 5).isfinite()


@engines
@pytest.mark.parametrize(
    ("lr", "decay"), [(3e38, 3e38), (1e39, 0.0), (1e20, 1e20)], ids=str
)
def test_rates_that_the_dtype_has_no_room_for(
    engine: type, lr: float, decay: float
) -> None:
    model, cost = torchbp.MLP([4, 3, 2]), torchbp.QuadraticCost()
    with pytest.raises(ValueError, match=r"lr.*: expected at most 3.4e\+38, .*float32"):
        engine(model, cost, lr, decay)
    engine(model.double(), cost, lr, decay)


def test_rates_that_come_to_be_too_large() -> None:
    model, cost = torchbp.MLP([4, 3, 2]), torchbp.QuadraticCost()
    before = [p.clone() for p in model.parameters()]
    sgd = torchbp.ExplicitSGD(model, cost, 1.0)
    sgd.lr = 1e39
    x, y = torch.rand(6, 4), torch.rand(6, 2)
    for call in (lambda: sgd.step(x, y), lambda: sgd.epoch(x, y, 2)):
        with pytest.raises(ValueError, match="lr: expected at most"):
            call()
    assert all(map(torch.equal, before, model.parameters()))


# Deterministic algorithms


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@engines
@pytest.mark.parametrize("kind", ["quadratic", "cross-entropy", "log-likelihood"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_training_by_deterministic_algorithms(
    engine: type, kind: str, activation: str
) -> None:
    """End to end, ragged last batch and scores included: the same bits as without."""
    cost = COSTS[kind].module()

    def train() -> list[Tensor]:
        torch.manual_seed(0)
        output = "identity" if cost.takes == "z" else "sigmoid"
        model = torchbp.MLP([16, 6, 4], activation, output)
        sgd = engine(model, cost, 0.1, 1e-3)
        Trainer(model, sgd, cost, few(), batch_size=7).fit(2)
        return list(model.parameters())

    with deterministic():
        first, second = train(), train()
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, first, train()))


@pytest.mark.parametrize("engine", ["autograd", "explicit"])
def test_the_main_job_by_deterministic_algorithms(engine: str, tmp_path: Path) -> None:
    for module in ("sklearn", "torchvision", "tensorboard"):
        pytest.importorskip(module)
    from experiments import mnist

    arguments = ["--dataset", "digits", "--epochs", "1", "--batch-size", "50"]
    arguments += ["--sizes", "784", "8", "10", "--distort", "1", "--quiet"]
    arguments += ["--engine", engine, "--logdir", str(tmp_path)]
    with deterministic():
        assert mnist.command_line([*arguments, "--name", "run"]) == 0
        resumed = ["--resume", str(tmp_path / "run"), "--epochs", "2", "--quiet"]
        assert mnist.command_line(resumed) == 0


# Many steps


def resident() -> int:
    """Bytes of memory that this process has, or 0 where Linux's /proc is not."""
    statm = Path("/proc/self/statm")
    return 4096 * int(statm.read_text().split()[1]) if statm.exists() else 0


def check_steps(engine: type, sizes: list[int], steps: int, warm: int = 600) -> None:
    """After `warm` steps, in which what is kept is made, nothing is added: no object
    that Python tracks, and next to no memory by Python's count and the system's: less
    than 90 bytes a step, where a tensor has 240 and more."""
    torch.manual_seed(0)
    model = torchbp.MLP(sizes)
    sgd = engine(model, torchbp.QuadraticCost(), 0.5)
    batches = [
        (torch.rand(m, sizes[0]), torch.rand(m, sizes[-1])) for m in (10, 10, 7, 1)
    ]

    def take(n: int) -> None:
        for i in range(n):
            sgd.step(*batches[i % len(batches)])

    take(warm)
    gc.collect()
    tracemalloc.start()
    try:
        take(100)
        gc.collect()
        objects, traced = len(gc.get_objects()), tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()  # it slows steps down to a third
        held = [resident()]
        for _ in range(3):
            take(steps // 3)
            held.append(resident())
        tracemalloc.start()
        take(100)
        gc.collect()
        assert len(gc.get_objects()) - objects < 50
        assert tracemalloc.get_traced_memory()[0] - traced < 20_000
        # A leak is in every third; what the allocator makes of its pages is not.
        thirds = [after - before for before, after in itertools.pairwise(held)]
        assert min(thirds) / steps < 30
    finally:
        tracemalloc.stop()


@engines
def test_10000_steps_leak_nothing(engine: type) -> None:
    check_steps(engine, [20, 6, 4], 10_000)


class Leaking(AutogradSGD):
    """Keeps what each step returns, as who sums costs without detaching them does."""

    def step(self, input: Tensor, target: Tensor) -> Tensor:
        self.kept = [*getattr(self, "kept", ()), super().step(input, target)]
        return self.kept[-1]


def test_a_leak_is_noticed() -> None:
    with pytest.raises(AssertionError):
        check_steps(Leaking, [20, 6, 4], 400, warm=100)


@pytest.mark.slow
@engines
def test_100000_steps_leak_nothing(engine: type) -> None:
    check_steps(engine, [784, 30, 10], 100_000, warm=2000)
