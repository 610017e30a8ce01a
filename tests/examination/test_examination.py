"""The examination: right code passes, each wrong Function has one finding with its
reason, and the caller's state is restored."""

from __future__ import annotations

import gc
import json
import random
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import wrong_functions
from cases import (
    Cost,
    Layer,
    all_costs,
    all_layers,
    operands,
    target_for,
)
from torch import nn
from torch.autograd import Function
from wrong_functions import LAYER, RIGHT, WRONG_FUNCTIONS, X

import torchbp
from torchbp import functional
from torchbp.__main__ import main
from torchbp.examination import CHECKS, execution, prepare
from torchbp.examination.prepare import describe
from torchbp.examination.verdicts import Fail

ROOT = Path(__file__).parents[2]


def checks(report, status):
    return {f.check for f in report if f.status == status}


# ---------------------------------------------------------------- wrong Functions


@pytest.mark.parametrize("wrong", WRONG_FUNCTIONS, ids=lambda a: a.name)
def test_each_wrong_function_has_one_finding_with_its_reason(wrong):
    report = torchbp.examine(wrong.wrong, *wrong.inputs, **wrong.options)
    findings = [*report.failures, *report.warnings]
    assert [f.check for f in findings] == [wrong.check], str(report)
    assert wrong.reason in findings[0].reason
    assert findings[0].fix
    assert findings[0].fix.split()[0] in str(report)
    strict = torchbp.examine(
        wrong.wrong,
        *wrong.inputs,
        **{"only": [wrong.check], "strict": True, **wrong.options},
    )
    assert not strict.ok and wrong.check in strict.brief()


@pytest.mark.parametrize("wrong", WRONG_FUNCTIONS, ids=lambda a: a.name)
def test_the_right_one_beside_it_passes(wrong):
    report = torchbp.examine(wrong.right, *wrong.inputs, **wrong.options)
    assert report.ok, str(report)
    refuses = wrong.right == wrong_functions.OnceNumPy.apply
    assert report[wrong.check].status == ("not supported" if refuses else "pass")


def test_nearly_every_check_has_a_wrong_function():
    caught = {wrong.check for wrong in WRONG_FUNCTIONS}
    # A mistake in these gives no worse than an error, or the tests below have one.
    without = {"forward", "batched-gradients", "vmap-of-grad", "jacrev", "compile"}
    without |= {"autocast", "second-device", "float16", "changes-in-between"}
    without |= {"dual-numbers", "jacfwd"}
    assert set(CHECKS) - caught == without


@pytest.mark.parametrize(
    ("check", "f", "reason"),
    [
        (
            "float32",
            lambda x: wrong_functions.Square.apply(x) * _unless(x, torch.float32),
            "value",
        ),
        (
            "autocast",
            lambda x: wrong_functions.Square.apply(x) * _autocast_factor(),
            "value",
        ),
        ("compile", lambda x: x * x * (2 if _compiling() else 1), "value"),
        (
            "jacrev",
            lambda x: x * x * (2 if functional.transforming() else 1),
            "its rows, the gradient of x",
        ),
        ("forward", lambda x: None, "no tensor"),
    ],
)
def test_checks_that_no_wrong_function_fails_can_fail(check, f, reason):
    report = torchbp.examine(f, X, compile=check == "compile")
    assert report[check].status == "fail", str(report)
    assert reason in report[check].reason


def _unless(x, dtype):
    return 1.5 if x.dtype == dtype else 1


def _autocast_factor():
    return 1.5 if torch.is_autocast_enabled("cpu") else 1


def _compiling():
    return torch.compiler.is_compiling()


class BatchBlind(Function):
    """Its backward gives other numbers for several gradients at once."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        batched = torch._C._functorch.is_legacy_batchedtensor(grad)
        return (3 if batched else 2) * x * grad


def test_batched_gradients_can_fail():
    report = torchbp.examine(BatchBlind.apply, X)
    assert checks(report, "fail") == {"batched-gradients"}


def test_vmap_of_grad_can_fail():
    def f(x):
        # vmap alone is one level, as is grad in the loop beside it.
        return x * x * (2 if torch._C._functorch.maybe_current_level() == 2 else 1)

    assert torchbp.examine(f, X)["vmap of grad"].status == "fail"


def test_another_device_is_compared():
    subject = describe(lambda x: x * x, (X,))
    assert execution.on_device(subject, "cpu") == "cpu as cpu"
    calls = []

    def changing(x):
        calls.append(x)
        return x * len(calls)

    with pytest.raises(Fail):
        execution.on_device(describe(changing, (X,)), "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda():
    report = torchbp.examine(functional.linear_sigmoid, *LAYER)
    assert report["second-device"].status == "pass"
    report = torchbp.examine(functional.linear_sigmoid, *(t.cuda() for t in LAYER))
    assert report.ok, str(report)


# ---------------------------------------------------------------- right code


@pytest.mark.parametrize("name", RIGHT)
def test_right_ones_in_other_styles_pass(name):
    f, inputs, options = RIGHT[name]
    report = torchbp.examine(f, *inputs, **options)
    assert report.ok, str(report)
    assert report["first-derivatives"].status == "pass"


@all_layers
def test_our_layers_pass_everything(layer: Layer):
    arguments = [t.detach() for t in operands(layer, dtype=torch.float32)]
    report = torchbp.examine(
        layer, *arguments, reference=layer.native, compile="aot_eager"
    )
    assert not checks(report, "fail") | checks(report, "not supported"), str(report)
    assert checks(report, "not applicable") <= {"second-device", "A1", "A2"}


@all_layers
def test_our_functions_and_modules_pass(layer: Layer):
    x, W, b = (t.detach() for t in operands(layer, dtype=torch.float32))
    module = layer.module(5, 2)
    for report in (
        torchbp.examine(layer.function, x, W, b),
        torchbp.examine(layer.function, x, W, None),
        torchbp.examine(layer, x, W),
        torchbp.examine(module, x, reference=layer.native),
    ):
        assert report.ok, str(report)
        assert report["first-derivatives"].status == "pass"


@all_costs
@pytest.mark.parametrize("target", ["numbers", "labels"])
def test_our_costs_pass_everything(cost: Cost, target):
    v = wrong_functions.rand(4, 3)
    y = target_for(cost, 4, 3, dtype=torch.float32)
    y = torch.tensor([0, 2, 1, 1]) if target == "labels" else y
    report = torchbp.examine(cost, v, y, compile=True)
    assert not checks(report, "fail") | checks(report, "not supported"), str(report)
    assert report["A1"].status == report["A2"].status == "pass"
    module = torchbp.examine(cost.module(), v, y)
    assert module.ok and module["A1"].status == "pass"
    if target == "numbers":
        apply = torchbp.examine(cost.module.function, v, y)
        assert apply.ok and apply["A1"].status == "pass"


def test_networks_beside_native_ones():
    deep, shallow = torchbp.MLP([4, 3, 2]), torchbp.MLP([4, 2], output="identity")
    for model, native in (
        (deep, torchbp.to_native(torchbp.MLP([4, 3, 2]))),
        (shallow, nn.Linear(4, 2)),
    ):
        before = [p.clone() for p in model.parameters()]
        report = torchbp.examine(model, X, reference=native)
        assert report.ok, str(report)
        assert report["reference"].status == "pass"
        assert all(map(torch.equal, before, model.parameters()))


def test_frozen_parameters_and_buffers_are_left_alone():
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, affine=False))
    module[0].bias.requires_grad_(False)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    report = torchbp.examine(module, X)
    assert report.ok, str(report)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_large_inputs_are_examined_along_directions():
    inputs = (
        wrong_functions.rand(10, 784),
        wrong_functions.rand(30, 784) / 28,
        wrong_functions.rand(30),
    )
    assert torchbp.examine(functional.linear_sigmoid, *inputs).ok
    for wrong in (
        wrong_functions.SlopeMissing,
        wrong_functions.TenthOfAPercent,
        wrong_functions.WrongSign,
    ):
        report = torchbp.examine(wrong, *inputs)
        assert checks(report, "fail") == {"first-derivatives"}
    report = torchbp.examine(wrong_functions.DetachedTwice, inputs[0])
    assert checks(report, "fail") == {"second-derivatives"}
    assert report["jacfwd"].status == "not applicable"


def test_a_function_without_derivatives():
    for f, x in ((lambda n: n + 1, torch.arange(3)), (lambda x: x.argmax(-1), X)):
        report = torchbp.examine(f, x)
        assert report.ok
        assert report["first-derivatives"].status == "not applicable"
        assert report["inputs-unchanged"].status == "pass"


# ---------------------------------------------------------------- what is examined


def test_inputs_that_require_grad_are_those_differentiated():
    y = wrong_functions.rand(3, 4, seed=9)
    one = torchbp.examine(
        wrong_functions.Quadratic.apply, X.clone().requires_grad_(), y, cost=False
    )
    assert one["requires_grad-subsets"].reason == "one argument to differentiate"
    assert one.ok
    both = torchbp.examine(wrong_functions.Quadratic.apply, X, y, cost=False)
    assert "y: no gradient" in both["first-derivatives"].reason


@pytest.mark.parametrize(
    ("f", "is_cost"),
    [
        (torch.dot, False),  # both get gradients
        (F.mse_loss, True),  # by its name
        (wrong_functions.Quadratic.apply, True),  # its target gets none
        (wrong_functions.Product.apply, False),
    ],
)
def test_what_is_taken_for_a_cost(f, is_cost):
    inputs = (X[0], X[1]) if f is torch.dot else wrong_functions.BATCH
    status = torchbp.examine(f, *inputs)["A1"].status
    assert status == ("pass" if is_cost else "not applicable")


def test_a_cost_with_a_parameter_breaks_a2():
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, a, y):
            return ((a - y) * self.scale).square().sum() / len(a)

    report = torchbp.examine(Weighted(), *wrong_functions.BATCH, cost=True)
    assert checks(report, "fail") == {"A2"}
    assert "scale" in report["A2"].reason


# ---------------------------------------------------------------- the caller's state


def test_the_state_of_the_caller_is_restored():
    inputs = tuple(t.clone() for t in LAYER)
    state, python_state = torch.get_rng_state(), random.getstate()
    filters = list(warnings.filters)
    backward = wrong_functions.Sigmoid.__dict__["backward"]
    with torch.no_grad():
        torchbp.examine(wrong_functions.Sigmoid, *inputs, compile=True)
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        assert torchbp.examine(wrong_functions.Sigmoid, *(t.clone() for t in LAYER)).ok
    with torch.autocast("cpu", torch.bfloat16):
        assert torchbp.examine(wrong_functions.Sigmoid, *inputs).ok
        assert torch.is_autocast_enabled("cpu")
    assert all(map(torch.equal, inputs, LAYER))
    assert not any(t.requires_grad or t.grad is not None for t in inputs)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python_state
    assert warnings.filters == filters
    assert wrong_functions.Sigmoid.__dict__["backward"] is backward
    assert torch.get_default_dtype() == torch.float32
    assert gc.isenabled()


def test_gradients_of_captured_tensors_are_restored():
    torchbp.examine(wrong_functions.regularised, *wrong_functions.BATCH)
    assert wrong_functions.WEIGHT.grad is None


def test_an_inherited_backward_is_restored():
    class Child(wrong_functions.Square):
        pass

    assert torchbp.examine(Child.apply, X, compile=True).ok
    assert "backward" not in Child.__dict__


def test_the_same_seed_gives_the_same_report():
    reports = [
        str(torchbp.examine(wrong_functions.MeanForSum, *LAYER, seed=3))
        for _ in range(2)
    ]
    assert reports[0] == reports[1]


# ---------------------------------------------------------------- errors


class Broken(Function):
    error: type[BaseException] = RuntimeError

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        warnings.warn("a backward may warn", stacklevel=1)
        raise Broken.error("no\nsuch luck")


def test_errors_are_findings():
    report = torchbp.examine(Broken, X)
    assert not report.ok
    assert report["first-derivatives"].reason == (
        "the backward raised RuntimeError: no such luck"
    )
    assert report["forward"].status == "pass"
    report = torchbp.examine(Broken, X, only=["forward", "float32", "vmap"])
    assert checks(report, "fail") == {"float32"}
    assert report["vmap"].reason == "see float32"
    report = torchbp.examine(lambda x: 1 / 0, X)
    (only,) = report.findings
    assert only.status == "fail" and "ZeroDivisionError" in only.reason


def test_a_check_that_crashes_is_a_finding(monkeypatch):
    def crash(subject):
        raise AssertionError

    monkeypatch.setitem(CHECKS, "vmap", crash)
    report = torchbp.examine(wrong_functions.Square, X)
    assert report["vmap"].reason == "the check stopped at AssertionError"
    assert checks(report, "fail") == {"vmap"}


def test_an_interrupt_is_passed_on_and_restores_the_class(monkeypatch):
    monkeypatch.setattr(Broken, "error", KeyboardInterrupt)
    own = Broken.__dict__["backward"]
    state = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        torchbp.examine(Broken, X)
    assert Broken.__dict__["backward"] is own
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("fn", "inputs", "options", "error", "message"),
    [
        (3, (X,), {}, TypeError, "fn: expected a Function, a function or a module, "),
        (nn.Linear, (X,), {}, TypeError, "got the class Linear"),
        (torch.exp, (X.cfloat(),), {}, TypeError, "inputs: expected real tensors, got"),
        (torch.exp, (X.to_sparse(),), {}, TypeError, "inputs: expected dense tensors"),
        (nn.Linear(4, 2), (X,), {"reference": nn.Linear(4, 3)}, ValueError,
         "reference: expected parameters of shapes [(2, 4), (2,)], got [(3, 4), (3,)]"),
    ],
)  # fmt: skip
def test_wrong_use(fn, inputs, options, error, message):
    with pytest.raises(error) as caught:
        torchbp.examine(fn, *inputs, **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


# ---------------------------------------------------------------- the report


def test_the_report_begins_with_what_failed():
    report = torchbp.examine(wrong_functions.MeanForSum, *LAYER)
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 88
    assert lines[0].startswith("MeanForSum.apply(3×4, 5×4, 5): 1 fail, ")
    assert lines[2].startswith("fail: first-derivatives: b: the gradient is 0.3333 ti")
    assert lines[3].startswith("  fix: look for a missing, doubled or wrong factor")
    assert any(line.startswith("pass: forward, determinism, ") for line in lines)
    brief = report.brief().splitlines()
    assert brief == lines[: len(brief)]
    assert not any("autocast" in line for line in brief)
    with pytest.raises(KeyError, match="expected one of"):
        report["nothing"]


def test_a_report_without_failures_fits_a_screen():
    for fn, inputs in ((torch.sin, (X,)), (nn.GRUCell(4, 3), (X,))):
        report = torchbp.examine(fn, *inputs)
        assert report.ok and len(str(report).splitlines()) <= 24


def test_the_table_has_every_finding():
    report = torchbp.examine(wrong_functions.BiasUnsummed, *LAYER)
    lines = report.table().splitlines()
    for finding, line in zip(report, lines[2:], strict=False):
        assert line.startswith(f"{finding.title:<22} {finding.status:<14}  ")
    assert lines[len(report.findings) + 3].startswith(
        "warn: raw-gradients: b: backward"
    )
    assert report["raw gradients"] is report["raw-gradients"]
    written = json.loads(json.dumps(report.to_dict()))
    assert written["findings"][4]["check"] == "raw-gradients"
    assert written["findings"][4]["title"] == "raw gradients"
    assert written["ok"] is True and written["calls"] == report.calls > 0


def test_warnings_count_if_strict():
    lenient = torchbp.examine(wrong_functions.NeedsIgnored, *wrong_functions.BATCH)
    assert lenient.ok and [f.check for f in lenient.warnings] == ["unneeded-gradients"]
    assert "unneeded" not in lenient.brief()
    strict = torchbp.examine(
        wrong_functions.NeedsIgnored, *wrong_functions.BATCH, strict=True
    )
    assert not strict.ok and "warn: unneeded-gradients" in strict.brief()


def test_checks_can_be_chosen():
    only = torchbp.examine(
        wrong_functions.Square, X, only=["vmap", "first derivatives"]
    )
    assert [f.check for f in only] == ["first-derivatives", "vmap"]
    rest = torchbp.examine(wrong_functions.Square, X, skip="vmap")
    assert {f.check for f in rest} == set(CHECKS) - {"vmap"}
    with pytest.raises(ValueError, match=r"skip: expected some of forward, .*'other'"):
        torchbp.examine(wrong_functions.Square, X, skip=["other"])


def test_the_tolerance_is_relative_to_the_largest_entry():
    nearly = wrong_functions.TenthOfAPercent
    assert not torchbp.examine(nearly, *LAYER).ok
    assert torchbp.examine(nearly, *LAYER, tolerance=3e-3).ok


@pytest.mark.parametrize(
    ("f", "fix"),
    [
        (wrong_functions.through_data, "no Python autograd.Function is in it: look in"),
        (
            lambda x: x * torch.tensor(x.tolist()),
            "no Python autograd.Function is in it",
        ),
        (lambda x: torch._standard_gamma(x.abs() + 1), "random numbers are held fixed"),
        (
            wrong_functions.TenthOfAPercent,
            "look for a missing, doubled or wrong factor",
        ),
    ],
)
def test_the_fix_fits_the_code(f, fix):
    inputs = LAYER if f is wrong_functions.TenthOfAPercent else (X,)
    finding = torchbp.examine(f, *inputs)["first-derivatives"]
    assert finding.status == "fail" and fix in finding.fix


def test_tensors_in_lists_are_not_seen_and_the_report_tells():
    report = torchbp.examine(lambda tensors: torch.cat(tensors), [X, X])
    assert "pass each by itself" in report["first-derivatives"].reason


# ---------------------------------------------------------------- intent


class Reversal(Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return -grad


class Heaviside(Function):
    """A step, with the derivative of a steep sigmoid."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        a = (4 * x).sigmoid()
        return 4 * grad * a * (1 - a)


class LearnedStep(Function):
    """Rounds to multiples of s (LSQ); its gradients depend on x and s themselves."""

    @staticmethod
    def forward(ctx, x, s):
        ctx.save_for_backward(x, s)
        return (x / s).round() * s

    @staticmethod
    def backward(ctx, grad):
        x, s = ctx.saved_tensors
        grad_s = None
        if ctx.needs_input_grad[1]:
            grad_s = (grad * ((x / s).round() - x / s)).sum()
        return grad, grad_s


def learned_step(x, s):
    return (x / s + ((x / s).round() - x / s).detach()) * s


def test_a_surrogate_may_detach_what_the_second_derivatives_need():
    report = torchbp.examine(LearnedStep, X, torch.tensor(0.3), surrogate=learned_step)
    assert report.ok, report.brief()
    assert report["second-derivatives"].status == "pass"


@pytest.mark.parametrize(
    ("fn", "surrogate"),
    [
        (wrong_functions.RoundsStraightThrough, lambda x: x),
        (wrong_functions.RoundsStraightThrough, lambda v: v + (v.round() - v).detach()),
        (lambda v: v + (v.round() - v).detach(), lambda x: x),
        (Reversal, lambda x: -x),
        (Heaviside, lambda x: (4 * x).sigmoid()),
    ],
)
def test_a_surrogate_states_the_intent(fn, surrogate):
    report = torchbp.examine(fn, X, surrogate=surrogate)
    assert report.ok, report.brief()
    assert report["first-derivatives"].status == "pass"
    unstated = torchbp.examine(fn, X)
    assert checks(unstated, "fail") == {"first-derivatives"}
    assert "surrogate=" in unstated["first-derivatives"].fix


@pytest.mark.parametrize(
    ("fn", "surrogate", "check"),
    [
        (Reversal, lambda x: -2 * x, "first-derivatives"),
        (Heaviside, lambda x: (3 * x).sigmoid(), "first-derivatives"),
        (wrong_functions.DetachedTwice, lambda x: x * x, "second-derivatives"),
        (wrong_functions.WrongInHalf, lambda x: x * x, "bfloat16"),
    ],
)
def test_the_derivatives_must_be_the_surrogates(fn, surrogate, check):
    report = torchbp.examine(fn, X, surrogate=surrogate)
    assert checks(report, "fail") == {check}, report.brief()


def test_jvp_must_be_the_surrogates():
    report = torchbp.examine(
        wrong_functions.JvpDisagrees, *LAYER, surrogate=wrong_functions.composite
    )
    assert checks(report, "fail") == {"jvp"}
    report = torchbp.examine(wrong_functions.Sigmoid, *LAYER,
                             surrogate=wrong_functions.composite)  # fmt: skip
    assert report.ok and report["jvp"].status == "pass"


# ---------------------------------------------------------------- domains, precision


def test_a_function_does_not_fail_at_a_kink():
    x = X.clone()
    x[0, 2] = 0
    report = torchbp.examine(wrong_functions.RightReLU, x)
    assert report.ok, report.brief()
    finding = report["first-derivatives"]
    assert finding.status == "not applicable"
    assert "kink or a pole at x[0, 2]" in finding.reason and "move" in finding.fix
    # Elsewhere it is.
    report = torchbp.examine(wrong_functions.ReLUSlopeMissing, x)
    assert checks(report, "fail") == {"first-derivatives"}


@pytest.mark.parametrize("f", [torch.sqrt, torch.log, torch.reciprocal, torch.rsqrt])
def test_a_function_does_not_fail_at_a_pole(f):
    report = torchbp.examine(f, torch.tensor([0.0, 0.5, 2.0]))
    assert report.ok, report.brief()


def test_a_function_that_computes_in_float32_is_recognised():
    report = torchbp.examine(wrong_functions.SingleInside, X)
    assert "shorter dtype inside" in report["first-derivatives"].reason
    exact = torchbp.examine(wrong_functions.Square, X)
    assert "inside" not in exact["first-derivatives"].reason


def test_a_reference_may_compute_in_float32():
    report = torchbp.examine(
        wrong_functions.Square, X, reference=lambda x: x.float().square().to(x.dtype)
    )
    assert report.ok and "single precision" in report["reference"].reason


def test_a_wrong_reference_is_recognised():
    report = torchbp.examine(
        wrong_functions.NamedVjp, X, reference=lambda x: x.exp() + 0 * x.detach()
    )
    assert report.ok
    wrong = torchbp.examine(
        wrong_functions.Square, X, reference=wrong_functions.OverwritesSaved.apply
    )
    assert wrong["reference"].status == "pass"
    wrong = torchbp.examine(
        wrong_functions.SumOfSquares, X, reference=lambda x: (x * x.detach()).sum()
    )
    assert wrong["reference"].status == "not applicable"
    assert "the reference's own gradient" in wrong["reference"].reason


# ---------------------------------------------------------------- random numbers


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x + torch.randn_like(x),
        lambda x: x * torch.bernoulli(torch.full_like(x, 0.5)),
        lambda x: F.dropout(x, 0.3),
        lambda x: x * random.random(),
        lambda x: x * torch.rand_like(x.float()),
    ],
)
def test_a_function_may_draw_random_numbers(f):
    report = torchbp.examine(f, wrong_functions.rand(7, 5))
    assert report.ok, report.brief()
    assert report["forward"].reason.endswith("it draws random numbers")


# ---------------------------------------------------------------- errors, crashes


class DoubleRaises(wrong_functions.Square):
    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        if grad.dtype == torch.float64:
            raise RuntimeError("no kernel for Double")
        return 2 * x * grad


def test_a_backward_that_raises_in_float64_only_is_examined_in_its_own_dtype():
    report = torchbp.examine(DoubleRaises, X)
    assert report.ok, report.brief()
    assert "its backward raised RuntimeError" in report["first-derivatives"].reason


def test_a_function_of_ten_thousand_inputs_is_sampled():
    calls = []

    def counted(x):
        calls.append(x)
        return wrong_functions.Square.apply(x)

    report = torchbp.examine(counted, wrong_functions.rand(100, 100))
    assert report.ok, report.brief()
    assert report.calls == len(calls) < 1500
    assert "at 200 of 10,000 entries" in report["first-derivatives"].reason
    assert f"({report.calls} calls)" in str(report)


def test_a_slow_function_is_sampled_more_coarsely(monkeypatch):
    seconds = iter(range(10**6))
    monkeypatch.setattr(prepare.time, "perf_counter", lambda: next(seconds))
    report = torchbp.examine(wrong_functions.Square, X)
    assert report.ok and "at 8 of 12 entries" in report["first-derivatives"].reason
    assert not torchbp.examine(wrong_functions.WrongInTheTail, X).ok


# ---------------------------------------------------------------- opcheck


@torch.library.custom_op("torchbp_tests::wrong_square", mutates_args=())
def wrong_square(x: torch.Tensor) -> torch.Tensor:
    return x * x


@wrong_square.register_fake
def _(x):
    return torch.empty_like(x)


wrong_square.register_autograd(
    lambda ctx, grad: grad * ctx.saved_tensors[0],
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@torch.library.custom_op("torchbp_tests::square_without_fake", mutates_args=())
def square_without_fake(x: torch.Tensor) -> torch.Tensor:
    return x * x


square_without_fake.register_autograd(
    lambda ctx, grad: 2 * grad * ctx.saved_tensors[0],
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@pytest.mark.filterwarnings("ignore")
def test_what_opcheck_finds_and_what_examine_finds():
    """opcheck tests how an operator is registered, examine what it computes."""
    torch.library.opcheck(wrong_square, (X.clone().requires_grad_(),))
    assert checks(torchbp.examine(wrong_square, X), "fail") == {"first-derivatives"}
    with pytest.raises(Exception, match="fake"):
        torch.library.opcheck(square_without_fake, (X.clone().requires_grad_(),))
    assert torchbp.examine(square_without_fake, X).ok


# ---------------------------------------------------------------- the command


def test_the_command(capsys):
    layer = "--input 3,4 --input 5,4 --input 5".split()
    assert main(["examine", "wrong_functions:Sigmoid", *layer]) == 0
    assert (
        "pass: forward, determinism, linear-in-g, first-der" in capsys.readouterr().out
    )
    assert main(["examine", "wrong_functions:SlopeMissing", *layer]) == 1
    assert "σ' = a(1 - a) of a sigmoid is missing" in capsys.readouterr().out
    reference = ["--reference", "wrong_functions:composite", "--dtype", "float64"]
    assert main(["examine", "wrong_functions:Sigmoid.apply", *layer, *reference]) == 0
    assert "reference" in capsys.readouterr().out.split("not supported:")[0]


@pytest.mark.parametrize(
    "line",
    [
        "torchbp:BPLinearSigmoid(4,5,bias=False) --input 3,4",
        "torchbp:LogLikelihoodCost --input 3,4 --input 3:int<4 --compile",
        "torchbp:LogLikelihoodCost --input 3,4 --input 3,4:simplex --cost",
        "torchbp:CrossEntropyCost --input 3,4 --input 3,4:uniform --compile eager",
        "wrong_functions:Scaled --input 3,4 --input =0.5 --input =True",
        "torch:exp --input () --dtype bfloat16 --seed 3",
        "torch:where --input 3:bool --input 3 --input 3",
        "torch:logical_not --input 3:bool",
    ],
)
def test_lines_that_are_right(line, capsys):
    assert main(["examine", *line.split()]) == 0, capsys.readouterr().out


def test_options_of_the_command(capsys):
    layer = "--input 3,4 --input 5,4 --input 5".split()
    line = ["examine", "wrong_functions:BiasUnsummed", *layer]
    assert main(line) == 0
    assert "warn: raw-gradients" in capsys.readouterr().out
    assert main([*line, "--strict"]) == 1
    assert main([*line, "--strict", "--skip", "raw-gradients"]) == 0
    capsys.readouterr()
    assert main([*line, "--json", "--only", "forward", "--only", "vmap"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert [f["check"] for f in written["findings"]] == ["forward", "vmap"]
    line = ["examine", "wrong_functions:RoundsStraightThrough", "--input", "3,4"]
    assert main(line) == 1
    assert main([*line, "--surrogate", "torch:clone"]) == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "the following arguments are required: target"),
        ("module --input 3", "expected package.module:Name"),
        ("wrong_functions:Nobody", "expected a name in wrong_functions, got 'Nobody'"),
        ("no_such_module:X", "cannot import no_such_module: ModuleNotFoundError"),
        ("wrong_functions:LAYER --input 3", "fn: expected a Function"),
        ("wrong_functions:Square --input three",
         "expected a shape such as 3,4 or ()"),
        ("wrong_functions:Square --input 3:odd",
         "expected normal, uniform, simplex, bool or int"),
        ("wrong_functions:Square --input =x", "expected a literal after ="),
        ("wrong_functions:Square --input 3 --dtype int8", "invalid choice: 'int8'"),
        ("wrong_functions:Square --input 3 --seed -1",
         "--seed: expected 0 to 2^32 - 1, got -1"),
        ("torch.nn:Linear --input 3", "cannot be made: TypeError"),
        ("torch.nn:Linear(x) --input 3", "expected literals in (x)"),
        ("torch.nn:Linear(4,2) --reference torch.nn:Linear(4,3) --input 3,4",
         "reference: expected parameters of shapes"),
    ],
)  # fmt: skip
def test_lines_that_are_wrong(line, message, capsys):
    try:
        status = main(["examine", *line.split()])
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ") and output.err.count("\n") == 1
    assert message in output.err


def test_modules_of_the_current_folder(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\ndef double(x):\n    return 2 * x\n", encoding="utf-8"
    )
    command = [
        sys.executable,
        "-m",
        "torchbp",
        "examine",
        "mine:double",
        "--input",
        "3",
    ]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("double(3): ")
    assert result.stderr == ""
