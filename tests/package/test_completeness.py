"""A built-in layer or cost is in every place that `.github/CONTRIBUTING.md` lists; what
lacks it is named."""

from __future__ import annotations

import re
from pathlib import Path

import cases
import pytest
import reference
from torch import nn

import torchbp
from experiments import gradcheck
from torchbp import costs, functional
from torchbp.costs import COSTS
from torchbp.inspection import page
from torchbp.nn import ACTIVATIONS, BPLinear

README = Path(__file__).parents[2] / "README.md"
SCRIPT = Path(page.__file__).with_suffix(".js")


def read(path):
    return path.read_text(encoding="utf-8")


def rows_of_readme():
    """The first column of README's tables."""
    return re.findall(r"^\| `(\w+)`", read(README), re.M)


def keys_in_script(table):
    (body,) = re.findall(rf"^const {table} = {{$(.*?)^}};$", read(SCRIPT), re.M | re.S)
    return re.findall(r'^  "?([\w-]+)"?: {', body, re.M)


def converts(layer):
    """Whether the layer becomes native, and the native one the same layer again."""
    native = torchbp.to_native(nn.Sequential(layer(2, 3)))
    return type(torchbp.from_native(native)[0]) is layer


def layer_is_in(name, layer):
    """Whether the layer `name` is in each place, by the place's name."""
    function = layer.function
    is_identity = layer is BPLinear
    helper = "linear" if is_identity else f"linear_{name}"
    return {
        "torchbp.__all__": layer.__name__ in torchbp.__all__,
        "torchbp.nn.__all__": layer.__name__ in torchbp.nn.__all__,
        "torchbp.functional.__all__": (
            {function.__name__, helper} <= set(functional.__all__)
        ),
        "the module's native counterpart": is_identity or layer.native is not None,
        "conversion": converts(layer),
        "the fast form: slope, or slope = None": "slope" in vars(function),
        "experiments/gradcheck.py": name in gradcheck.LAYERS,
        "the oracle, tests/reference.py": name in reference.SIGMA,
        "README's table": layer.__name__ in rows_of_readme(),
        "tests/cases.py": layer in [case.module for case in cases.LAYERS.values()],
        "inspection/page.js": name in keys_in_script("SIGMA"),
    }


def cost_is_in(name, cost):
    """Whether the cost `name` is in each place, by the place's name."""
    function, helper = cost.function, f"{name.replace('-', '_')}_cost"
    advice = costs.counterpart(cost.native()) if cost.native else ""
    return {
        "torchbp.__all__": cost.__name__ in torchbp.__all__,
        "torchbp.costs.__all__": (
            {cost.__name__, function.__name__, helper} <= set(costs.__all__)
        ),
        "the module's native counterpart": cost.native is not None,
        "the module's replaces": cost.__name__ in advice,
        "the fast form: one_hot_nabla, or one_hot_nabla = None": (
            "one_hot_nabla" in vars(function)
        ),
        "experiments/gradcheck.py": name in gradcheck.COSTS,
        "the oracle, tests/reference.py": name in reference.COSTS,
        "README's table": cost.__name__ in rows_of_readme(),
        "tests/cases.py": cost in [case.module for case in cases.COSTS.values()],
        "inspection/page.js": name in keys_in_script("COSTS"),
    }


def missing(places):
    return [place for place, is_in in places.items() if not is_in]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_layer_is_in_every_place(name):
    assert missing(layer_is_in(name, ACTIVATIONS[name])) == []


@pytest.mark.parametrize("name", COSTS)
def test_a_cost_is_in_every_place(name):
    assert missing(cost_is_in(name, COSTS[name])) == []


def defined_in(module, base, member):
    """The classes of a module below `base` that have a `member` of their own."""
    classes = [c for c in vars(module).values() if isinstance(c, type)]
    return {c for c in classes if issubclass(c, base) and member in vars(c)}


def test_what_is_written_is_in_the_tables():
    """`ACTIVATIONS` and `COSTS`: the one line that the rest is derived from."""
    modules = defined_in(torchbp.nn, BPLinear, "function")
    assert modules == set(ACTIVATIONS.values())
    functions = defined_in(functional, functional.LinearFunction, "sigma")
    assert functions == {layer.function for layer in modules}
    modules = defined_in(costs, nn.Module, "function")
    assert modules == set(COSTS.values())
    functions = defined_in(costs, costs.CostFunction, "nabla") - {costs.CostFunction}
    assert functions == {cost.function for cost in modules}


# Each place without its softplus or its log-likelihood cost.


def without(patch, module, *names):
    patch.setattr(module, "__all__", [n for n in module.__all__ if n not in names])


def without_line(patch, start):
    """Whatever is read has no lines that start so."""
    patch.setattr(
        "test_completeness.read",
        lambda path: re.sub(rf"^{start}.*\n", "", path.read_text("utf-8"), flags=re.M),
    )


def without_case(patch, table, cls):
    (name,) = (name for name, case in table.items() if case.module is cls)
    patch.delitem(table, name)


SOFTPLUS, LOG_LIKELIHOOD = torchbp.BPLinearSoftplus, torchbp.LogLikelihoodCost
LAYER_LEFT_OUT = {
    "torchbp.__all__": lambda p: without(p, torchbp, "BPLinearSoftplus"),
    "torchbp.nn.__all__": lambda p: without(p, torchbp.nn, "BPLinearSoftplus"),
    "torchbp.functional.__all__": lambda p: without(p, functional, "linear_softplus"),
    "the module's native counterpart": lambda p: p.setattr(SOFTPLUS, "native", None),
    "conversion": lambda p: p.delitem(torchbp.convert._OURS, nn.Softplus),
    "the fast form: slope, or slope = None": (
        lambda p: p.delattr(SOFTPLUS.function, "slope")
    ),
    "experiments/gradcheck.py": lambda p: p.delitem(gradcheck.LAYERS, "softplus"),
    "the oracle, tests/reference.py": lambda p: p.delitem(reference.SIGMA, "softplus"),
    "README's table": lambda p: without_line(p, r"\| `BPLinearSoftplus`"),
    "tests/cases.py": lambda p: without_case(p, cases.LAYERS, SOFTPLUS),
    "inspection/page.js": lambda p: without_line(p, "  softplus: {"),
}
COST_LEFT_OUT = {
    "torchbp.__all__": lambda p: without(p, torchbp, "LogLikelihoodCost"),
    "torchbp.costs.__all__": lambda p: without(p, costs, "log_likelihood_cost"),
    "the module's native counterpart": (
        lambda p: p.setattr(LOG_LIKELIHOOD, "native", None)
    ),
    "the module's replaces": lambda p: p.setattr(LOG_LIKELIHOOD, "replaces", {}),
    "the fast form: one_hot_nabla, or one_hot_nabla = None": (
        lambda p: p.delattr(LOG_LIKELIHOOD.function, "one_hot_nabla")
    ),
    "experiments/gradcheck.py": lambda p: p.delitem(gradcheck.COSTS, "log-likelihood"),
    "the oracle, tests/reference.py": (
        lambda p: p.delitem(reference.COSTS, "log-likelihood")
    ),
    "README's table": lambda p: without_line(p, r"\| `LogLikelihoodCost`"),
    "tests/cases.py": lambda p: without_case(p, cases.COSTS, LOG_LIKELIHOOD),
    "inspection/page.js": lambda p: without_line(p, '  "log-likelihood": {'),
}


@pytest.mark.parametrize("place", layer_is_in("softplus", SOFTPLUS))
def test_a_layer_that_is_left_out_is_missed_by_the_place_s_name(monkeypatch, place):
    LAYER_LEFT_OUT[place](monkeypatch)
    assert place in missing(layer_is_in("softplus", SOFTPLUS))


@pytest.mark.parametrize("place", cost_is_in("log-likelihood", LOG_LIKELIHOOD))
def test_a_cost_that_is_left_out_is_missed_by_the_place_s_name(monkeypatch, place):
    COST_LEFT_OUT[place](monkeypatch)
    assert place in missing(cost_is_in("log-likelihood", LOG_LIKELIHOOD))
