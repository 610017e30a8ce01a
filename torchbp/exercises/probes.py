"""Probes: the functions with which a case examines the learner's code."""

from __future__ import annotations

import contextlib
import inspect
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchbp import data
from torchbp._numeric import central_difference
from torchbp.costs import QuadraticCost
from torchbp.examination import draw, examine
from torchbp.exercises.material import Case
from torchbp.inspection import compare
from torchbp.nn import MLP

F64 = torch.float64
TOLERANCE = torch.finfo(torch.float32).eps ** 0.5  # a share of Σ |entries|
ENOUGH = 0.9  # the share of the test digits that a trained network recognises
EPOCHS, BATCH_SIZE, LR = 30, 10, 1.0


class Misfit(Exception):  # noqa: N818
    """The learner's code does not have the expected form."""


@dataclass
class Outcome:
    """The outcome of one case for one file.

    Attributes:
        values: the results by name.
        right: the right results.
        text: what is wrong, if that is not a number.
        note: a remark on a right file.
        error: the exception that was raised.
    """

    values: dict[str, Any] = field(default_factory=dict)
    right: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    note: str = ""
    error: BaseException | None = None

    @property
    def wrong(self) -> list[str]:
        """The results that are not right, from the last, as a backward pass goes."""
        names = reversed(self.values)
        return [n for n in names if not are_close(self.values[n], self.right[n])]

    @property
    def is_right(self) -> bool:
        """Whether nothing is wrong."""
        return not self.text and not self.wrong

    def resembles(self, other: Outcome) -> bool:
        """Return whether both have the same results, or the same text."""
        mine, theirs = self.values, other.values
        return (self.text, mine.keys()) == (other.text, theirs.keys()) and all(
            are_close(value, theirs[name]) for name, value in mine.items()
        )


def are_close(a: Any, b: Any) -> bool:
    """Return whether two results, tensors or others, are equal up to rounding."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return type(a) is type(b) and bool(a == b)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = a.double(), b.double()
    size = b.nan_to_num(0.0, 0.0, 0.0).abs().sum().item()
    return torch.allclose(a, b, rtol=0, atol=TOLERANCE * size, equal_nan=True)


Names = Mapping[str, Any]


def call(names: Names, case: Case, arguments: dict[str, Any]) -> Any:
    """Call the learner's own function."""
    function = names[case.function]
    if not callable(function):
        raise Misfit(f"{case.function}: expected a function, got {function!r}")
    with contextlib.suppress(ValueError):  # some callables have no signature
        signature = inspect.signature(function)
        try:
            signature.bind(*arguments)
        except TypeError:
            got = f"{case.function}{signature}"
            raise Misfit(f"expected {case}, got {got}") from None
    return function(*arguments.values())


def backward(names: Names, case: Case, arguments: dict[str, Any]) -> Any:
    """Return a Function's gradients for that of its output, which is the last argument,
    and its output."""
    *inputs, grad = arguments.values()
    output = names[case.subject].apply(*[t.requires_grad_() for t in inputs])
    if not isinstance(output, Tensor):
        raise Misfit(f"forward: expected a tensor, got {output!r}")
    if output.shape != grad.shape:
        shapes = f"{tuple(grad.shape)}, got {tuple(output.shape)}"
        raise Misfit(f"forward: expected a tensor of shape {shapes}")
    gradients = torch.autograd.grad(output, inputs, grad, allow_unused=True)
    return *gradients, output.detach()


def find_slope(names: Names, case: Case, arguments: dict[str, Any]) -> Outcome:
    """Compare a layer's σ' at z with the central difference of its own σ."""
    (z,) = (t.double() for t in arguments.values())
    layer = names[case.subject](1, 1, device="cpu", dtype=F64)
    layer.load_state_dict({"weight": torch.ones_like(z[:1]), "bias": 0 * z[0]})
    (ours,) = torch.autograd.grad(layer(z.requires_grad_()).sum(), z)
    with torch.no_grad():
        right = central_difference(lambda t: layer(z + t), 1e-5)
    (name,) = case.results
    return Outcome({name: ours}, {name: right})


def examine_function(names: Names, case: Case, arguments: dict[str, Any]) -> Outcome:
    """Return the first finding of `examine`, for the checks in the case."""
    _, checks, *shapes = case.names
    generator = torch.Generator("cpu").manual_seed(0)
    inputs = [draw(shape, F64, generator) for shape in shapes]
    with contextlib.redirect_stdout(io.StringIO()):  # the file may print at each call
        report = examine(names[case.subject], *inputs, only=checks, strict=True)
    first = next(iter((*report.failures, *report.warnings)), None)
    return Outcome(text=f"{first.reason}: {first.fix}" if first else "")


def compare_layer(names: Names, case: Case, arguments: dict[str, Any]) -> Outcome:
    """Return the faults that `compare` reports in a network with the learner's
    layer."""
    torch.manual_seed(0)
    model = MLP([2, 3, 1], names[case.subject], "sigmoid", device="cpu", dtype=F64)
    x = torch.rand(4, 2, device="cpu", dtype=F64)
    y = torch.rand(4, 1, device="cpu", dtype=F64)
    with contextlib.redirect_stdout(io.StringIO()):
        faults = compare(model, QuadraticCost(), x, y).faults
    return Outcome(
        text="; ".join(f"{f.equation}, layer {f.layer}: {f.fault}" for f in faults)
    )


def train(names: Names, case: Case, arguments: dict[str, Any]) -> Outcome:
    """Train a network of 784, 30 and 10 neurons on the digits."""
    try:
        training, _, test = data.load("digits")
    except data.DataError as error:
        return Outcome(note=f"the gradients are right; no training: {error}")
    backprop, step = (names[name] for name in case.names)
    x, y = data.scale(training.images), F.one_hot(training.labels, 10).float()
    generator = torch.Generator("cpu").manual_seed(0)
    p = [p for sizes in ((784, 30), (30, 10)) for p in _drawn(*sizes, generator)]
    accuracy = 0.0
    for epoch in range(1, EPOCHS + 1):  # noqa: B007
        order = torch.randperm(len(x), generator=generator, device="cpu")
        for rows in order.split(BATCH_SIZE):
            gradients = backprop(*p, x[rows], y[rows])
            p = [step(*both, LR) for both in zip(p, gradients, strict=True)]
        a = data.scale(test.images)
        for W, b in (p[:2], p[2:]):
            a = torch.sigmoid(a @ W.T + b)
        accuracy = (a.argmax(1) == test.labels).double().mean().item()
        if accuracy >= ENOUGH:
            break
    share = f"{accuracy:.1%} of {len(test.labels)} test digits"
    text = f"{share} right after {epoch} epochs"
    if accuracy >= ENOUGH:
        return Outcome(note=f"it learns: {text}")
    return Outcome(text=f"it does not learn: {text}, expected {ENOUGH:.0%}")


def _drawn(n_in: int, n_out: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return normally distributed W and b, W scaled by 1/√n_in (book, chapter 3)."""
    W, b = (
        torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
        for shape in ((n_out, n_in), (n_out,))
    )
    return W / n_in**0.5, b


PROBES: dict[str, Callable[[Names, Case, dict[str, Any]], Any]] = {
    "backward": backward,
    "slope": find_slope,
    "examine": examine_function,
    "compare": compare_layer,
    "train": train,
}
