"""costs: BP1 by hand is the derivative, and right where exp has nothing left to say."""

import math

import bounds
import pytest
import torch
import torch.nn.functional as F
from cases import (
    COSTS,
    DTYPES,
    F64,
    LogCosh,
    all_costs,
    assert_raises_one_line,
    check_first,
    check_second,
    rand,
    target_for,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import torchbp
from torchbp import costs
from torchbp.nn import check_takes

SHAPES = [(3,), (1,), (4, 3), (7, 5), (2, 3, 2), (2, 1, 2, 3), (1, 2, 1, 2, 2), (1, 1)]
all_shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
BUILT_IN = {name: cost for name, cost in COSTS.items() if cost.module is not LogCosh}
built_in_costs = pytest.mark.parametrize("cost", BUILT_IN.values(), ids=BUILT_IN.keys())
FUNCTIONS = {
    "quadratic": (costs.quadratic_cost, torchbp.QuadraticCost, "a"),
    "cross-entropy": (costs.cross_entropy_cost, torchbp.CrossEntropyCost, "z"),
    "log-likelihood": (costs.log_likelihood_cost, torchbp.LogLikelihoodCost, "z"),
}
all_functions = pytest.mark.parametrize(
    ("function", "module", "takes"), FUNCTIONS.values(), ids=FUNCTIONS.keys()
)
ignore_jit = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:FutureWarning"  # torch's own use of it
)


def gradient(f, v, *rest):
    v = v.detach().requires_grad_()
    return torch.autograd.grad(f(v, *rest), v)[0]


# ---------------------------------------------------------------- derivatives


@all_costs
@all_shapes
def test_derivatives(cost, shape):
    v, y = rand(*shape).requires_grad_(), target_for(cost, *shape)
    check_first(lambda v: cost(v, y), v)
    check_second(lambda v: cost(v, y), v)


@all_costs
@all_shapes
def test_equals_native(cost, shape):
    v, y = rand(*shape), target_for(cost, *shape)
    assert_close(cost(v, y), cost.native(v, y), **bounds.near())
    ours, native = gradient(cost, v, y), gradient(cost.native, v, y)
    assert_close(ours, native, **bounds.near())


@settings(deadline=None, max_examples=80, derandomize=True)
@given(
    name=st.sampled_from(list(COSTS)),
    dtype=st.sampled_from(DTYPES),
    rows=st.lists(st.integers(1, 5), max_size=3),
    outputs=st.integers(1, 9),
    seed=st.integers(0, 2**20),
)
def test_equals_float64_in_every_dtype(name, dtype, rows, outputs, seed):
    """Against the native cost in float64 of the same numbers."""
    cost = COSTS[name]
    v = rand(*rows, outputs, seed=seed, dtype=dtype)
    y = target_for(cost, *rows, outputs, seed=seed + 1, dtype=dtype)
    of_value, of_grad = bounds.cost(v, y)
    value = cost(v, y)
    assert value.dtype == dtype and value.shape == ()
    expected = cost.native(v.double(), y.double())
    bounds.assert_within(value, expected, of_value)
    grad = gradient(cost, v, y)
    assert grad.dtype == dtype and grad.shape == v.shape
    truth = gradient(cost.native, v.double(), y.double())
    bounds.assert_within(grad, truth, of_grad)


@all_costs
def test_one_over_n_counts_rows(cost):
    """A1: the mean over the rows, all leading dimensions together, not the numbers."""
    v, y = rand(6, 4), target_for(cost, 6, 4)
    singles = torch.stack([cost(v[i], y[i]) for i in range(6)])
    assert_close(cost(v, y), singles.mean())
    assert_close(cost(v.reshape(2, 3, 4), y.reshape(2, 3, 4)), singles.mean())


def test_quadratic_is_not_mse_loss_with_mean():
    v, y = rand(6, 10), rand(6, 10, seed=1)
    ratio = gradient(torchbp.QuadraticCost(), v, y) / gradient(F.mse_loss, v, y)
    assert_close(ratio, torch.full_like(ratio, 5.0))


@all_costs
def test_arguments_of_any_layout(cost):
    v, y = rand(4, 3), target_for(cost, 4, 3)
    expected = cost(v, y), gradient(cost, v, y)
    for layout in (
        lambda t: t.t().contiguous().t(),
        lambda t: torch.cat([t, t], -1)[:, :3],
        lambda t: torch.stack([t, t], -1)[..., 0],
    ):
        w, u = layout(v), layout(y)
        before = w.clone(), u.clone()
        assert_close((cost(w, u), gradient(cost, w, u)), expected)
        assert torch.equal(w, before[0]) and torch.equal(u, before[1])


@all_costs
def test_output_gradient_scales_and_is_kept(cost):
    v, y = rand(4, 3).requires_grad_(), target_for(cost, 4, 3)
    value = cost(v, y)
    g = torch.tensor(-2.5, dtype=F64)
    first = torch.autograd.grad(value, v, g, retain_graph=True)[0]
    second = torch.autograd.grad(value, v, g)[0]
    assert torch.equal(first, second)
    assert_close(first, -2.5 * gradient(cost, v, y))
    assert g.item() == -2.5


# ---------------------------------------------------------------- saturation


def at(z, y, dtype=torch.float32):
    return torch.tensor([[z]], dtype=dtype), torch.tensor([[y]], dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("z", [0.0, 1.0, 17.0, 30.0, 80.0, 300.0, 1e3, 1e4])
@pytest.mark.parametrize("sign", [-1, 1])
def test_cross_entropy_at_saturation(dtype, z, sign):
    """Both targets, both signs: -σ(-z) for y = 1 and σ(z) for y = 0, to roundings."""
    z = sign * z

    def sigmoid(t):
        return 1 / (1 + math.exp(-t)) if t > -700 else 0.0

    def softplus(t):
        return max(t, 0.0) + math.log1p(math.exp(-abs(t)))

    for y, value, slope in ((1.0, softplus(-z), -sigmoid(-z)),
                            (0.0, softplus(z), sigmoid(z))):  # fmt: skip
        v, target = at(z, y, dtype)
        for actual, expected in (
            (costs.cross_entropy_cost(v, target), value),
            (gradient(costs.cross_entropy_cost, v, target), slope),
        ):
            off = bounds.units(bounds.OPERATIONS, dtype, abs(expected))
            assert abs(actual.item() - expected) <= off


def test_cross_entropy_gradient_does_not_vanish():
    """σ(z) - y is 0 in float32 from z = 17 on; σ's tail is not."""
    v, y = at(30.0, 1.0)
    assert torch.sigmoid(v) - y == 0
    grad = gradient(costs.cross_entropy_cost, v, y).item()
    expected = -math.exp(-30) / (1 + math.exp(-30))
    off = bounds.close(bounds.OPERATIONS, torch.float32, size=0)
    assert grad == pytest.approx(expected, **bounds.approx(off))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("margin", [0.0, 1.0, 17.0, 30.0, 60.0, 1e3, 1e4])
@pytest.mark.parametrize("offset", [0.0, -64.0, 1e4])
def test_log_likelihood_at_saturation(dtype, margin, offset):
    """z = (margin, 0, 0) + offset with the first class or the second the true one."""
    z = (torch.tensor([margin, 0.0, 0.0], dtype=dtype) + offset).unsqueeze(0)
    e = math.exp(-margin)
    p = [1 / (1 + 2 * e), e / (1 + 2 * e), e / (1 + 2 * e)]
    rest = 2 * e / (1 + 2 * e)  # 1 - p[0], without the cancellation

    off = bounds.approx(bounds.close(bounds.OPERATIONS, dtype, size=0))

    def near(expected):
        return pytest.approx(expected, **off)

    for label, value, slopes in (
        (0, math.log1p(2 * e), [-rest, p[1], p[2]]),
        (1, margin + math.log1p(2 * e), [p[0], -(p[0] + p[2]), p[2]]),
    ):
        target = torch.tensor([label])
        actual = costs.log_likelihood_cost(z, target).item()
        assert actual == near(value)
        grad = gradient(costs.log_likelihood_cost, z, target)[0].tolist()
        assert grad == [near(slope) for slope in slopes]


def test_log_likelihood_of_a_tie():
    z = torch.zeros(1, 4)
    grad = gradient(costs.log_likelihood_cost, z, torch.tensor([2]))
    assert_close(grad, torch.tensor([[0.25, 0.25, -0.75, 0.25]]))


def test_log_likelihood_ruled_out_class_costs_nothing():
    """0 · ln 0 = 0, where the softmax of that class underflows or is exactly 0."""
    z = torch.tensor([[0.0, -1e4]])
    y = torch.tensor([[1.0, 0.0]])
    assert costs.log_likelihood_cost(z, y) == 0
    z[0, 1] = -torch.inf
    assert costs.log_likelihood_cost(z, y) == 0
    assert torch.equal(gradient(costs.log_likelihood_cost, z, y), torch.zeros(1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1e2, 1e4])
@built_in_costs
def test_finite_at_any_size(cost, dtype, size):
    v = rand(50, 4, dtype=dtype) * size
    y = F.one_hot(torch.arange(50) % 4, 4).to(dtype)
    of_value, of_grad = bounds.cost(v, y)
    bounds.assert_within(cost(v, y), cost.native(v.double(), y.double()), of_value)
    truth = gradient(cost.native, v.double(), y.double())
    bounds.assert_within(gradient(cost, v, y), truth, of_grad)


# ---------------------------------------------------------------- targets


@all_costs
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
@pytest.mark.parametrize("rows", [(), (1,), (6,), (2, 3)], ids=str)
def test_labels_are_one_hot_rows(cost, dtype, rows):
    v = rand(*rows, 4)
    labels = torch.arange(max(1, math.prod(rows))).reshape(rows).remainder(4)
    one_hot = F.one_hot(labels, 4).to(F64)
    labels = labels.to(dtype)
    assert torch.equal(cost(v, labels), cost(v, one_hot))
    assert torch.equal(gradient(cost, v, labels), gradient(cost, v, one_hot))


@all_costs
@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("kind", ["rows", "labels"])
def test_empty_batch(cost, shape, kind):
    v = rand(*shape)
    y = rand(*shape) if kind == "rows" else torch.zeros(shape[:-1], dtype=torch.long)
    assert cost(v, y).isnan(), "the mean of nothing"
    assert gradient(cost, v, y).shape == shape


def test_log_likelihood_of_rows_that_are_no_distribution():
    """The derivative of the same formula: softmax(z) Σ y - y."""
    z, y = rand(3, 4), rand(3, 4, seed=1)
    expected = (torch.softmax(z, -1) * y.sum(-1, keepdim=True) - y) / 3
    assert_close(gradient(costs.log_likelihood_cost, z, y), expected)


v = torch.zeros(4, 3)
ERRORS = {
    "input a list": (([0.0], v), TypeError, "input, target", "Tensors", "list"),
    "target a list": ((v, [0]), TypeError, "input, target", "Tensors", "list"),
    "input int": ((v.int(), v), TypeError, "input", "floating", "torch.int32"),
    "input complex": ((v.cfloat(), v), TypeError, "input", "real", "torch.complex64"),
    "input 0-d": ((v[0, 0], v[0, 0]), ValueError, "input", "(*, K)", "0-d"),
    "bool target": ((v, v.bool()), TypeError, "target", "float32", "torch.bool"),
    "bool labels": ((v, v[:, 0].bool()), TypeError, "target", "float32", "torch.bool"),
    "wide target": ((v, v.double()), TypeError, "target", "float32", "torch.float64"),
    "complex target": (
        (v, v.cfloat()), TypeError, "target", "float32", "torch.complex64",
    ),
    "target of another shape": (
        (v, v[:, :2]), ValueError, "target", "(4, 3)", "(4, 2)",
    ),
    "target that would broadcast": (
        (v, v[:1]), ValueError, "target", "(4, 3)", "(1, 3)",
    ),
    "labels as a column": (
        (v, torch.zeros(4, 1, dtype=torch.long)),
        ValueError, "target", "(4,)", "(4, 1)",
    ),
    "one-hot integers": (
        (v, v.long()), ValueError, "target", "(4,)", "(4, 3) torch.int64",
    ),
    "too few labels": (
        (v, torch.zeros(3, dtype=torch.long)), ValueError, "target", "(4,)", "(3,)",
    ),
    "label too large": (
        (v, torch.tensor([0, 1, 2, 3])), ValueError, "target", "0..2", "3",
    ),
    "label negative": (
        (v, torch.tensor([0, 1, -1, 2])), ValueError, "target", "0..2", "-1",
    ),
    "target elsewhere": ((v, v.to("meta")), ValueError, "target", "cpu", "meta"),
    "target that requires grad": (
        (v, v.clone().requires_grad_()), ValueError, "target", "A2", "True",
    ),
}  # fmt: skip
del v


@all_costs
@pytest.mark.parametrize(("args", "kind", *"pqr"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(cost, args, kind, p, q, r):
    assert_raises_one_line(kind, (p, "expected", q, "got", r), cost, *args)


# ---------------------------------------------------------------- what a cost takes


@all_functions
def test_function_module_and_takes(function, module, takes):
    assert function.takes == module.takes == module().takes == takes
    v = rand(4, 3)
    y = torch.tensor([0, 1, 2, 0])
    assert torch.equal(function(v, y), module()(v, y))
    assert not list(module().parameters())


@all_functions
def test_check_takes(function, module, takes):
    gives_z = torchbp.MLP([3, 2, 2], output="identity")
    native_z = torch.nn.Sequential(torch.nn.Linear(3, 2))
    for model in (gives_z, native_z, torchbp.to_native(gives_z)):
        check_takes(model, function)
        check_takes(model, module())
    gives_a = torchbp.MLP([3, 2, 2])
    for model in (gives_a, torchbp.to_native(gives_a), gives_a.layers[-1]):
        for cost in (function, module()):
            if takes == "a":
                check_takes(model, cost)
            else:
                parts = ("expected", "identity", "got", "Sigmoid", "twice")
                assert_raises_one_line(ValueError, parts, check_takes, model, cost)


def test_check_takes_refuses_what_does_not_say():
    for cost in (F.mse_loss, torch.nn.MSELoss(), None):
        parts = ("expected", "takes", "got", "None")
        model = torchbp.MLP([2, 2])
        assert_raises_one_line(TypeError, parts, check_takes, model, cost)


def rows(a, y):
    return (a - y).sum(-1)


def slopes(a, y):
    return a - y


DEFINE_ERRORS = {
    "name": (("a b", rows, slopes), ValueError, "name", "identifier", "'a b'"),
    "takes": (("N", rows, slopes, "b"), ValueError, "takes", '"a" or "z"', "'b'"),
    "cost no function": (("N", 1, slopes), TypeError, "cost", "callable", "int"),
    "grad no function": (("N", rows, None), TypeError, "grad", "callable", "NoneType"),
    "cost no tensor": (("N", lambda a, y: 0.5, slopes), TypeError, "cost", "Tensor",
                       "0.5"),
    "cost not per row": (("N", lambda a, y: (a - y).sum(), slopes), ValueError, "cost",
                         "(2,)", "()"),
    "grad per row": (("N", rows, rows), ValueError, "grad", "(2, 3)", "(2,)"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("args", "kind", *"pqr"), DEFINE_ERRORS.values(), ids=DEFINE_ERRORS.keys()
)
def test_define_cost_errors(args, kind, p, q, r):
    assert_raises_one_line(
        kind, (p, "expected", q, "got", r), torchbp.define_cost, *args
    )


def test_defined_cost_takes_what_it_says():
    assert torchbp.define_cost("N", rows, slopes).takes == "a"
    assert torchbp.define_cost("N", rows, slopes, takes="z").takes == "z"


def test_defined_cost_does_not_divide_by_n():
    """A1 is applied by the package: a cost that divides too is wrong, and found out."""
    twice = torchbp.define_cost(
        "Twice",
        lambda a, y: (a - y).square().sum(-1) / 2,
        lambda a, y: (a - y) / len(a),
    )
    v, y = rand(4, 3), rand(4, 3, seed=1)
    assert_close(gradient(twice(), v, y) * 4, gradient(torchbp.QuadraticCost(), v, y))
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        check_first(lambda v: twice()(v, y), v.requires_grad_())


class WithoutSaturation(costs.CrossEntropyFunction):
    @staticmethod
    def nabla(z, y):
        return torch.sigmoid(z) - y


def test_saturation_check_can_fail():
    """The plain formula passes gradcheck, and fails where the real one does not."""
    v, y = rand(4, 3).requires_grad_(), target_for(COSTS["cross-entropy"], 4, 3)
    check_first(lambda v: costs.cost(WithoutSaturation, v, y), v)
    v, y = at(30.0, 1.0)
    assert gradient(lambda v: costs.cost(WithoutSaturation, v, y), v) == 0


# ---------------------------------------------------------------- modes of torch


@built_in_costs
def test_autocast_computes_in_float32(cost):
    v, y = rand(4, 3, dtype=torch.float32), target_for(cost, 4, 3, dtype=torch.float32)
    half = v.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert cost(v, y).dtype == torch.float32
        assert cost(v.double(), y.double()).dtype == F64
        assert cost(half, torch.tensor([0, 1, 2, 0])).dtype == torch.float32
        value, grad = cost(half, y), gradient(cost, half, y)
    assert grad.dtype == torch.bfloat16
    assert_close(value, cost(half.float(), y))
    assert_close(grad, gradient(cost, half.float(), y).bfloat16())


TRANSFORMS = {
    "vmap(grad)": lambda f, v, y: torch.vmap(torch.func.grad(f))(v, y),
    "jacrev": lambda f, v, y: torch.func.jacrev(f)(v, y),
    "jacfwd": lambda f, v, y: torch.func.jacfwd(f)(v, y),
    "hessian": lambda f, v, y: torch.func.hessian(f)(v, y),
}


@all_costs
@pytest.mark.parametrize("name", TRANSFORMS)
@ignore_jit
def test_transforms_equal_native(cost, name):
    v, y = rand(4, 3), target_for(cost, 4, 3)
    transform = TRANSFORMS[name]
    assert_close(transform(cost, v, y), transform(cost.native, v, y))


@all_costs
def test_labels_under_vmap(cost):
    v, labels = rand(4, 3), torch.tensor([0, 2, 1, 0])
    one_hot = F.one_hot(labels, 3).to(F64)
    ours = torch.vmap(torch.func.grad(cost))(v, labels)
    assert_close(ours, torch.vmap(torch.func.grad(cost.native))(v, one_hot))


@all_costs
@ignore_jit
def test_compiles_whole(cost):
    v, y = rand(4, 3), target_for(cost, 4, 3)
    torch.compiler.reset()
    compiled = torch.compile(cost.module(), fullgraph=True, backend="aot_eager")
    assert_close(compiled(v, y), cost(v, y))
    assert_close(gradient(compiled, v, y), gradient(cost, v, y))
    labels = torch.tensor([0, 2, 1, 0])
    assert_close(gradient(compiled, v, labels), gradient(cost, v, labels))


@all_costs
def test_a_target_with_a_tangent_is_refused(cost):
    v, y = rand(3, 4), rand(3, 4).softmax(-1)
    for jvp in (
        lambda: torch.func.jvp(lambda t: cost(v, t), (y,), (torch.ones_like(y),)),
        lambda: torch.func.jvp(cost, (v, y), (torch.ones_like(v), torch.ones_like(y))),
    ):
        assert_raises_one_line(ValueError, ("target", "expected", "A2"), jvp)


def test_quadratic_cost_of_many_rows_in_float16_does_not_overflow():
    a, y = torch.zeros(10_000, 10).half(), torch.ones(10_000, 10).half()
    assert torchbp.costs.quadratic_cost(a, y).item() == 5.0


@pytest.mark.parametrize("behind", [nn.Identity(), nn.Dropout(0.5), nn.Flatten()])
def test_check_takes_looks_through_what_passes_values_on(behind):
    cost = torchbp.CrossEntropyCost()
    for layer in (torchbp.BPLinearSigmoid(3, 2), nn.GELU(), nn.Softmax(-1)):
        model = nn.Sequential(nn.Linear(3, 3), layer, behind)
        with pytest.raises(ValueError, match="σ would be applied twice"):
            check_takes(model, cost)
    check_takes(nn.Sequential(torchbp.BPLinearSigmoid(3, 3), nn.Linear(3, 2)), cost)


def test_define_cost_refuses_functions_that_overwrite():
    with pytest.raises(ValueError, match="expected its arguments unchanged"):
        torchbp.define_cost(
            "N", lambda a, y: a.sub_(y).square().sum(-1), lambda a, y: 2 * (a - y)
        )


@pytest.mark.parametrize("outputs", [1, 2, 3])
def test_nan_in_z_is_not_hidden_by_the_log_likelihood(outputs):
    z = torch.full((1, outputs), math.nan, requires_grad=True)
    C = torchbp.LogLikelihoodCost()(z, torch.zeros(1, dtype=torch.int64))
    C.backward()
    assert C.isnan() and z.grad.isnan().all()


def test_a_cost_with_ten_class_weights_works_for_ten_outputs():
    w = torch.linspace(0.5, 2, 10)
    Weighted = torchbp.define_cost(
        "Weighted",
        lambda a, y: (w * (a - y) ** 2).sum(-1) / 2,
        lambda a, y: w * (a - y),
    )
    a, y = torch.rand(4, 10, requires_grad=True), torch.rand(4, 10)
    C = Weighted()(a, y)
    C.backward()
    torch.testing.assert_close(C, (w * (a - y) ** 2).sum(-1).mean() / 2)
    torch.testing.assert_close(a.grad, w * (a - y).detach() / 4)
    model = torchbp.MLP([3, 10])
    x, labels = torch.rand(4, 3), torch.arange(4)
    torchbp.ExplicitSGD(model, Weighted(), 0.1).step(x, labels)
    with pytest.raises(RuntimeError):  # torch's own, of ten weights and three outputs
        Weighted()(torch.rand(4, 3), torch.rand(4, 3))


def test_a_wrong_shape_shows_at_the_first_call_where_it_cannot_before():
    w = torch.rand(10)
    Wrong = torchbp.define_cost(
        "Wrong", lambda a, y: w * (a - y), lambda a, y: w * (a - y)
    )
    with pytest.raises(ValueError, match=r"cost: expected shape \(2,\)"):
        Wrong()(torch.rand(4, 10), torch.rand(4, 10))


class Slope(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, a, y):
        return (self.slope * (a - y)).sum(-1)


LEARNED = torch.nn.Parameter(torch.tensor(2.0))


def test_a_cost_that_reads_a_parameter_is_refused_by_its_name():
    slope = torch.nn.Parameter(torch.tensor(2.0))
    right = lambda a, y: a - y  # noqa: E731
    sums = lambda a, y: (a - y).sum(-1)  # noqa: E731
    readers = {
        "slope": lambda a, y: slope * (a - y).sum(-1),
        "LEARNED": lambda a, y: LEARNED * (a - y).sum(-1),
        "by_default": lambda a, y, by_default=slope: by_default * (a - y).sum(-1),
        "self.slope": Slope().forward,
    }
    for name, reader in readers.items():
        with pytest.raises(ValueError, match=f"cost: .* reads {name}, which requires"):
            torchbp.define_cost("Bad", reader, right)
    with pytest.raises(ValueError, match=r"cost: .* reads slope, which requires grad"):
        torchbp.define_cost("Bad", Slope(), right)
    with pytest.raises(ValueError, match=r"grad: .* reads slope, which requires grad"):
        torchbp.define_cost("Bad", sums, lambda a, y: slope * (a - y))
    fixed = slope.detach()
    torchbp.define_cost("Good", lambda a, y: fixed * (a - y).sum(-1), right)


def test_learned_class_weights_are_refused_at_definition():
    """Before any call: under torch.compile the first call is not tried."""
    w = torch.nn.Parameter(torch.rand(10))
    with pytest.raises(ValueError, match=r"cost: .* reads w, which requires grad"):
        torchbp.define_cost(
            "Bad", lambda a, y: (w * (a - y)).sum(-1), lambda a, y: a - y
        )


@pytest.mark.parametrize("error", [AssertionError, ValueError, IndexError])
def test_a_cost_that_refuses_three_outputs_itself_works_for_ten(error):
    def grad(a, y):
        if a.shape[-1] != 10:
            raise error("ten outputs")
        return a - y

    Ten = torchbp.define_cost("Ten", lambda a, y: (a - y).square().sum(-1) / 2, grad)
    a, y = torch.rand(4, 10, requires_grad=True), torch.rand(4, 10)
    Ten()(a, y).backward()
    torch.testing.assert_close(a.grad, (a - y).detach() / 4)
    x = torch.rand(4, 3, requires_grad=True)
    with pytest.raises(error, match="ten outputs"):
        Ten()(x, torch.rand(4, 3)).backward()


def test_a_mistake_that_no_number_of_outputs_cures_is_raised_at_once():
    with pytest.raises(NameError):
        torchbp.define_cost("Bad", lambda a, y: missing(a), lambda a, y: a)  # noqa: F821


# No local: torch 2.8 compiles no function around a local tensor.
TEN = torch.linspace(0.5, 2, 10, dtype=F64)


def weighted():
    return torchbp.define_cost(
        "Weighted",
        lambda a, y: (TEN * (a - y) ** 2).sum(-1) / 2,
        lambda a, y: TEN * (a - y),
    )()


FIRST_CALLS = {
    "compiled": lambda cost, a, y: torch.autograd.grad(
        torch.compile(cost, backend="aot_eager", fullgraph=True)(a, y), a
    )[0],
    "torch.func.grad": lambda cost, a, y: torch.func.grad(cost)(a, y),
    "vmap": lambda cost, a, y: torch.func.vmap(torch.func.grad(cost))(a, y) / len(a),
}


def identity(n):
    layer = torchbp.BPLinear(n, n, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(n))
        layer.bias.zero_()
    return layer


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
@pytest.mark.parametrize("way", ["compiled", "torch.func.grad", "vmap"])
def test_ten_class_weights_wherever_the_first_call_is(way):
    a, y = rand(4, 10).requires_grad_(), rand(4, 10, seed=1)
    actual = FIRST_CALLS[way](weighted(), a, y)
    torch.testing.assert_close(actual, (TEN * (a - y)).detach() / 4)


def test_ten_class_weights_in_backprop():
    a, y = rand(4, 10), rand(4, 10, seed=1)
    _, grads = torchbp.backprop(identity(10), weighted(), a, y)
    torch.testing.assert_close(grads["bias"], (TEN * (a - y)).mean(0))


def test_the_explicit_engine_refuses_a_wrong_gradient_of_ten_before_any_step():
    """It takes ∇C before C."""
    Wrong = torchbp.define_cost(
        "Wrong",
        lambda a, y: (TEN * (a - y) ** 2).sum(-1) / 2,
        lambda a, y: (TEN * (a - y)).sum(-1, keepdim=True),
    )
    with pytest.raises(ValueError, match=r"grad: expected shape \(2, 10\)"):
        torchbp.ExplicitSGD(identity(10), Wrong(), 0.1)


def test_a_gradient_that_does_not_vary_has_zeros_as_its_derivative():
    """The hinge: native gives zeros, by clamp."""
    Hinge = torchbp.define_cost(
        "Hinge",
        lambda v, y: (1 - v * y).clamp(min=0).sum(-1),
        lambda v, y: torch.where(v * y < 1, -y, torch.zeros_like(y)),
    )
    v, y = rand(4, 3).requires_grad_(), rand(4, 3, seed=1)
    (g,) = torch.autograd.grad(Hinge()(v, y), v, create_graph=True)
    (second,) = torch.autograd.grad(g.square().sum(), v)
    assert g.any() and not second.any()
