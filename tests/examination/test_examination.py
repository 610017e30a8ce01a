"""The examination: right ones pass, each animal of the zoo is caught for its reason,
and whoever asks finds everything as it was."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import zoo
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
from zoo import ANIMALS, LAYER, RIGHT, X

import torchbp
from torchbp import functional
from torchbp.__main__ import main
from torchbp.examination import examiner as examination
from torchbp.examination import transforms as _exam_transforms
from torchbp.examination.subject import make_subject
from torchbp.examination.verdicts import Fail

ROOT = Path(__file__).parents[2]


def checks(report, status):
    return {f.check for f in report if f.status == status}


# ---------------------------------------------------------------- the zoo


@pytest.mark.parametrize("animal", ANIMALS, ids=lambda a: a.name)
def test_each_animal_is_caught_for_the_right_reason(animal):
    report = torchbp.examine(animal.wrong, *animal.inputs, **animal.options)
    assert not report.ok
    assert checks(report, "fail") == set(animal.fails), str(report)
    first = report[animal.fails[0]]
    assert animal.says in first.reason
    assert first.mend
    assert first.mend.split()[0] in str(report)


@pytest.mark.parametrize("animal", ANIMALS, ids=lambda a: a.name)
def test_its_sibling_passes(animal):
    report = torchbp.examine(animal.right, *animal.inputs, **animal.options)
    assert report.ok, str(report)
    refuses = animal.right == zoo.OnceNumPy.apply
    assert report[animal.fails[0]].status == ("not supported" if refuses else "pass")


def test_the_zoo_has_an_animal_for_nearly_every_check():
    caught = {check for animal in ANIMALS for check in animal.fails}
    # Where the wrong one can do no worse than raise an error, or is not to be had here.
    spared = {"forward", "batched gradients", "vmap of grad", "jacrev", "compile"}
    spared |= {"autocast", "second device", "float32"}
    assert set(examination.CHECKS) - caught == spared


@pytest.mark.parametrize(
    ("check", "f", "says"),
    [
        ("float32", lambda x: zoo.Square.apply(x) * _unless(x, torch.float32), "value"),
        ("autocast", lambda x: zoo.Square.apply(x) * _autocast_factor(), "value"),
        ("compile", lambda x: x * x * (2 if _compiling() else 1), "value"),
        ("jacrev", lambda x: x * x * (2 if functional.transforming() else 1), "by x"),
        ("forward", lambda x: None, "no tensor"),
    ],
)
def test_checks_that_no_animal_fails_can_fail(check, f, says):
    report = torchbp.examine(f, X, compile=check == "compile")
    assert report[check].status == "fail", str(report)
    assert says in report[check].reason


def _unless(x, dtype):
    return 1.5 if x.dtype == dtype else 1


def _autocast_factor():
    return 1.5 if torch.is_autocast_enabled("cpu") else 1


def _compiling():
    return torch.compiler.is_compiling()


class BatchBlind(Function):
    """Its backward gives other numbers where several gradients come at once."""

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
    assert checks(report, "fail") == {"batched gradients"}


def test_vmap_of_grad_can_fail():
    def f(x):
        # vmap alone is one level, as is grad in the loop beside it.
        return x * x * (2 if torch._C._functorch.maybe_current_level() == 2 else 1)

    assert torchbp.examine(f, X)["vmap of grad"].status == "fail"


def test_another_device_is_compared():
    subject = make_subject(lambda x: x * x, (X,), None, 0)
    assert _exam_transforms.on_device(subject, "cpu") == "cpu as cpu"
    calls = []

    def changing(x):
        calls.append(x)
        return x * len(calls)

    with pytest.raises(Fail):
        _exam_transforms.on_device(make_subject(changing, (X,), None, 0), "cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda():
    report = torchbp.examine(functional.linear_sigmoid, *LAYER)
    assert report["second device"].status == "pass"
    report = torchbp.examine(functional.linear_sigmoid, *(t.cuda() for t in LAYER))
    assert report.ok, str(report)


# ---------------------------------------------------------------- right ones


@pytest.mark.parametrize("name", RIGHT)
def test_right_ones_in_other_styles_pass(name):
    f, inputs, options = RIGHT[name]
    report = torchbp.examine(f, *inputs, **options)
    assert report.ok, str(report)
    assert report["first derivatives"].status == "pass"


@all_layers
def test_our_layers_pass_everything(layer: Layer):
    arguments = [t.detach() for t in operands(layer, dtype=torch.float32)]
    report = torchbp.examine(
        layer, *arguments, reference=layer.native, compile="aot_eager"
    )
    assert not checks(report, "fail") | checks(report, "not supported"), str(report)
    assert checks(report, "not applicable") <= {"second device", "A1", "A2"}


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
        assert report["first derivatives"].status == "pass"


@all_costs
@pytest.mark.parametrize("target", ["numbers", "labels"])
def test_our_costs_pass_everything(cost: Cost, target):
    v = zoo.rand(4, 3)
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


def test_networks_beside_their_native_selves():
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
    inputs = zoo.rand(10, 784), zoo.rand(30, 784) / 28, zoo.rand(30)
    assert torchbp.examine(functional.linear_sigmoid, *inputs).ok
    for wrong in (zoo.SlopeMissing, zoo.TenthOfAPercent, zoo.WrongSign):
        report = torchbp.examine(wrong, *inputs)
        assert checks(report, "fail") == {"first derivatives"}
    report = torchbp.examine(zoo.DetachedTwice, inputs[0])
    assert checks(report, "fail") == {"second derivatives"}
    assert report["jacfwd"].status == "not applicable"


def test_a_function_without_derivatives():
    for f, x in ((lambda n: n + 1, torch.arange(3)), (lambda x: x.argmax(-1), X)):
        report = torchbp.examine(f, x)
        assert report.ok
        assert report["first derivatives"].status == "not applicable"
        assert report["inputs unchanged"].status == "pass"


# ---------------------------------------------------------------- what is examined


def test_inputs_that_require_grad_are_those_differentiated():
    y = zoo.rand(3, 4, seed=9)
    one = torchbp.examine(
        zoo.Quadratic.apply, X.clone().requires_grad_(), y, cost=False
    )
    assert one["requires_grad subsets"].reason == "one argument to differentiate"
    assert one.ok
    both = torchbp.examine(zoo.Quadratic.apply, X, y, cost=False)
    assert "y: no gradient" in both["first derivatives"].reason


@pytest.mark.parametrize(
    ("f", "is_cost"),
    [
        (torch.dot, False),  # both get gradients
        (F.mse_loss, True),  # by its name
        (zoo.Quadratic.apply, True),  # its target gets none
        (zoo.Product.apply, False),
    ],
)
def test_what_is_taken_for_a_cost(f, is_cost):
    inputs = (X[0], X[1]) if f is torch.dot else zoo.BATCH
    status = torchbp.examine(f, *inputs)["A1"].status
    assert status == ("pass" if is_cost else "not applicable")


def test_a_cost_with_a_parameter_breaks_a2():
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, a, y):
            return ((a - y) * self.scale).square().sum() / len(a)

    report = torchbp.examine(Weighted(), *zoo.BATCH, cost=True)
    assert checks(report, "fail") == {"A2"}
    assert "scale" in report["A2"].reason


# ---------------------------------------------------------------- as it was


def test_everything_is_as_before():
    inputs = tuple(t.clone() for t in LAYER)
    state, python_state = torch.get_rng_state(), random.getstate()
    filters = list(warnings.filters)
    backward = zoo.Sigmoid.__dict__["backward"]
    with torch.no_grad():
        torchbp.examine(zoo.Sigmoid, *inputs, compile=True)
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        assert torchbp.examine(zoo.Sigmoid, *(t.clone() for t in LAYER)).ok
    with torch.autocast("cpu", torch.bfloat16):
        assert torchbp.examine(zoo.Sigmoid, *inputs).ok
        assert torch.is_autocast_enabled("cpu")
    assert all(map(torch.equal, inputs, LAYER))
    assert not any(t.requires_grad or t.grad is not None for t in inputs)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python_state
    assert warnings.filters == filters
    assert zoo.Sigmoid.__dict__["backward"] is backward
    assert torch.get_default_dtype() == torch.float32
    assert gc.isenabled()


def test_tensors_that_a_function_knows_are_left_alone():
    torchbp.examine(zoo.regularised, *zoo.BATCH)
    assert zoo.WEIGHT.grad is None


def test_an_inherited_backward_is_put_back():
    class Child(zoo.Square):
        pass

    assert torchbp.examine(Child.apply, X, compile=True).ok
    assert "backward" not in Child.__dict__


def test_the_same_seed_gives_the_same_report():
    reports = [str(torchbp.examine(zoo.MeanForSum, *LAYER, seed=3)) for _ in range(2)]
    assert reports[0] == reports[1]


# ---------------------------------------------------------------- what goes wrong


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
    assert report["first derivatives"].reason == (
        "the backward raised RuntimeError: no such luck"
    )
    assert report["forward"].status == "pass"
    report = torchbp.examine(lambda x: 1 / 0, X)
    (only,) = report.findings
    assert only.status == "fail" and "ZeroDivisionError" in only.reason


def test_a_check_that_crashes_is_a_finding(monkeypatch):
    def crash(subject):
        raise AssertionError

    monkeypatch.setitem(examination.CHECKS, "vmap", crash)
    report = torchbp.examine(zoo.Square, X)
    assert report["vmap"].reason == "the check stopped at AssertionError"
    assert checks(report, "fail") == {"vmap"}


def test_an_interrupt_passes_and_leaves_the_class_whole(monkeypatch):
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


def test_the_report_is_a_table():
    report = torchbp.examine(zoo.BiasUnsummed, *LAYER)
    lines = str(report).splitlines()
    assert lines[0].startswith("BiasUnsummed.apply(3×4, 5×4, 5): 1 fail, ")
    table = lines[2 : 2 + len(report.findings)]
    assert max(map(len, lines)) <= 88
    for finding, line in zip(report, table, strict=True):
        assert line.startswith(f"{finding.check:<22} {finding.status:<14}  ")
    below = lines[len(table) + 3]
    assert below.startswith("raw gradients: b: backward returns (3, 5) for (5); the ")
    assert any(line.startswith("  mend: sum it over the examples") for line in lines)
    # What failed, without the table and the explanations of what is not supported.
    brief = report.brief().splitlines()
    assert brief[0] == lines[0] and set(brief) < set(lines)
    assert [line for line in brief if line.startswith("raw gradients: ")] == [below]
    assert not any(line.startswith("autocast") for line in brief)
    with pytest.raises(KeyError, match="expected one of"):
        report["nothing"]


# ---------------------------------------------------------------- the command


def test_the_command(capsys):
    layer = "--input 3,4 --input 5,4 --input 5".split()
    assert main(["examine", "zoo:Sigmoid", *layer]) == 0
    assert "first derivatives      pass" in capsys.readouterr().out
    assert main(["examine", "zoo:SlopeMissing", *layer]) == 1
    assert "σ' = a(1 - a) of a sigmoid is missing" in capsys.readouterr().out
    reference = ["--reference", "zoo:composite", "--dtype", "float64"]
    assert main(["examine", "zoo:Sigmoid.apply", *layer, *reference]) == 0
    assert "reference              pass" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line",
    [
        "torchbp:BPLinearSigmoid(4,5,bias=False) --input 3,4",
        "torchbp:LogLikelihoodCost --input 3,4 --input 3:int<4 --compile",
        "torchbp:LogLikelihoodCost --input 3,4 --input 3,4:simplex --cost",
        "torchbp:CrossEntropyCost --input 3,4 --input 3,4:uniform --compile eager",
        "zoo:Scaled --input 3,4 --input =0.5 --input =True",
        "torch:exp --input () --dtype bfloat16 --seed 3",
        "torch:where --input 3:bool --input 3 --input 3",
        "torch:logical_not --input 3:bool",
    ],
)
def test_lines_that_are_right(line, capsys):
    assert main(["examine", *line.split()]) == 0, capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "the following arguments are required: target"),
        ("zoo --input 3", "expected package.module:Name"),
        ("zoo:Nobody", "expected a name in zoo, got 'Nobody'"),
        ("no_such_module:X", "cannot import no_such_module: ModuleNotFoundError"),
        ("zoo:LAYER --input 3", "fn: expected a Function"),
        ("zoo:Square --input three", "expected a shape such as 3,4 or ()"),
        ("zoo:Square --input 3:odd", "expected normal, uniform, simplex, bool or int"),
        ("zoo:Square --input =x", "expected a literal after ="),
        ("zoo:Square --input 3 --dtype int8", "invalid choice: 'int8'"),
        ("zoo:Square --input 3 --seed -1", "--seed: expected 0 to 2^32 - 1, got -1"),
        ("torch.nn:Linear --input 3", "cannot be made: TypeError"),
        ("torch.nn:Linear(x) --input 3", "expected literals in (x)"),
        ("torch.nn:Linear(4,2) --reference torch.nn:Linear(4,3) --input 3,4",
         "reference: expected parameters of shapes"),
    ],
)  # fmt: skip
def test_lines_that_are_wrong(line, says, capsys):
    try:
        status = main(["examine", *line.split()])
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ") and output.err.count("\n") == 1
    assert says in output.err


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
