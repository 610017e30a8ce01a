"""The texts of the page: the steps of a pass, and three lessons of the book.

A lesson is a small network, recorded like the reader's own, and a list of things to do
with it. This module describes them; the page's script does them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchbp.nn import MLP

__all__ = ["COSTS", "LESSONS", "Lesson", "Step", "steps"]

# C_x in the page's notation: ^{} raises, _{} lowers.
COSTS = {
    "quadratic": "½ Σ_{j} (y_{j} − a_{j})^{2}",
    "cross-entropy": "−Σ_{j} [y_{j} ln a_{j} + (1 − y_{j}) ln(1 − a_{j})]",
    "log-likelihood": "−Σ_{j} y_{j} ln a_{j}",
}
TEXTS = {
    "forward": "Each neuron multiplies what arrives by its weights, adds it up and "
    "adds its bias: its weighted input z. Its activation is a = σ(z).",
    "cost": "How wrong the answers are, as one number: the mean over the examples of "
    "what each of them costs. To learn is to bring it down.",
    "bp1": "The error δ = ∂C/∂z is how fast the cost changes with the activation, "
    "∂C/∂a, times the slope of σ there, σ'. Where σ is flat, the neuron is saturated: "
    "δ is small, however wrong the answer is. The gradients of BP3 and BP4 are "
    "multiples of δ, so the neuron learns slowly.",
    "cancels": "With this cost, ∂C/∂a has σ' as its denominator, and BP1 multiplies by "
    "σ': it cancels. The error is how wrong the answer is. A saturated neuron that is "
    "wrong learns fast.",
    "bp2": "The error goes back along the same weights, now from right to left: each "
    "neuron adds up the errors of the neurons that it feeds, weighted, and multiplies "
    "the sum by its own σ'.",
    "half": "∂C/∂a has arrived from above, through whatever lies there; the layer "
    "multiplies it by its own σ'.",
    "bp3": "A bias is added to z as it is, so its gradient is the error δ. Over a "
    "mini-batch, the gradient is the mean of the examples' errors.",
    "bp4": "A weight's gradient is the error where it ends times the activation where "
    "it starts (over a mini-batch, the mean of these). If either is near 0, the weight "
    "learns slowly.",
    "update": "Every weight and bias moves a little against its gradient, all at once. "
    "Then the next pass begins.",
}


@dataclass(frozen=True)
class Step:
    """One equation at one layer.

    Attributes:
        kind: forward, cost, bp1, bp2, bp3, bp4 or update.
        l: the layer, counted from 0.
        title, equation, text: what the page shows.
    """

    kind: str
    l: int  # noqa: E741
    title: str
    equation: str
    text: str


def steps(
    linked: Sequence[bool],
    has_delta: Sequence[bool],
    has_bias: Sequence[bool],
    chain: bool,
    cost: str,
    cost_name: str,
) -> Iterator[Step]:
    """Return the steps of a pass, forward and back.

    Args:
        linked: whether each layer takes the activations of the one before it.
        has_delta: whether a backward pass reached each layer.
        has_bias: whether each layer has a bias.
        chain: whether each layer feeds the next alone, and the last the cost.
        cost: a key of COSTS, or any other name.
        cost_name: the name that is shown for a cost that is not in COSTS.
    """
    last = len(linked) - 1
    up = [f"^{{{ell}}}" for ell in range(1, last + 3)]
    below = [
        f"a^{{{ell}}}" if linked[ell] or ell == 0 else f"x{up[ell]}"
        for ell in range(last + 1)
    ]
    back = [ell for ell in reversed(range(last + 1)) if has_delta[ell]]

    def step(kind: str, ell: int, title: str, equation: str, text: str = "") -> Step:
        return Step(kind, ell, title, equation, TEXTS[text or kind])

    for ell, n in enumerate(up[: last + 1]):
        equation = f"z{n} = W{n} {below[ell]} + b{n},   a{n} = σ(z{n})"
        yield step("forward", ell, f"Feedforward: layer {ell + 1}", equation)
    formula = COSTS.get(cost, cost_name) if chain else cost_name
    yield step(
        "cost", last, "The cost", f"C = 1/n Σ_{{x}} C_{{x}},   C_{{x}} = {formula}"
    )
    for ell in back:
        n, next_ = up[ell], up[ell + 1]
        title, gate = f"the error of layer {ell + 1}", f" ⊙ σ'(z{n})"
        if not chain:
            yield step("bp2", ell, f"BP2: {title}", f"δ{n} = ∂C/∂a{n}{gate}", "half")
        elif ell < last:
            equation = f"δ{n} = ((W{next_})ᵀ δ{next_}){gate}"
            yield step("bp2", ell, f"BP2: {title}", equation)
        elif cost in ("cross-entropy", "log-likelihood"):
            yield step("bp1", ell, f"BP1: {title}", f"δ{n} = a{n} − y", "cancels")
        else:
            yield step("bp1", ell, f"BP1: {title}", f"δ{n} = ∇_{{a}} C{gate}")
    for ell in back:
        if has_bias[ell]:
            title = f"BP3: the gradient with respect to the biases of layer {ell + 1}"
            yield step("bp3", ell, title, f"∂C/∂b{up[ell]} = δ{up[ell]}")
    for ell in back:
        title = f"BP4: the gradient with respect to the weights of layer {ell + 1}"
        equation = f"∂C/∂W{up[ell]} = δ{up[ell]} ({below[ell]})ᵀ"
        yield step("bp4", ell, title, equation)
    yield step("update", last, "The update", "W ← W − η ∂C/∂W,   b ← b − η ∂C/∂b")


@dataclass(frozen=True)
class Lesson:
    """A network of sigmoid neurons with one example, and what to do with it.

    Attributes:
        title, text: its subject.
        parameters: W and b of each layer.
        x, y: the example and its target.
        lr: η.
        acts: each a text, the label of its button and what the script does then:
            "reset" the network, take a "cost", set "inputs", "train" so many steps,
            go to the "step" of that kind at a layer, choose "weight" k of neuron 0,
            "focus" an element.
    """

    title: str
    text: str
    parameters: list[tuple[Any, Any]]
    x: list[float]
    y: list[float]
    lr: float
    acts: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)

    def network(self) -> tuple[MLP, Tensor, Tensor]:
        """Return the MLP, in float64, and its example, (1, n_in) and (1, n_out)."""
        sizes = [len(self.x), *(len(b) for _, b in self.parameters)]
        model = MLP(sizes, device="cpu", dtype=torch.float64)
        with torch.no_grad():
            values = [value for pair in self.parameters for value in pair]
            for p, value in zip(model.parameters(), values, strict=True):
                p.copy_(torch.tensor(value, device="cpu", dtype=torch.float64))
        x = torch.tensor([self.x], device="cpu", dtype=torch.float64)
        return model, x, torch.tensor([self.y], device="cpu", dtype=torch.float64)


def _fading() -> list[tuple[Any, Any]]:
    """Five layers with weights between -2/3 and 4/3, of no particular pattern."""
    sizes = (2, 3, 3, 3, 3, 1)
    return [
        (
            [
                [((5 * j + 3 * k + 2 * ell) % 7 - 2) / 3 for k in range(sizes[ell])]
                for j in range(sizes[ell + 1])
            ],
            [(j - 1) / 4 for j in range(sizes[ell + 1])],
        )
        for ell in range(5)
    ]


LESSONS = [
    Lesson(
        "A saturated neuron",
        "One sigmoid neuron is to turn the input 1 into the answer 0. It starts with "
        "weight 2.5 and bias 2.5 and answers 0.99, as wrong as can be. Does it learn "
        "fast, then?",
        [([[2.5]], [2.5])],
        [1.0],
        [0.0],
        0.15,
        [
            (
                "Look at its error. BP1 multiplies how wrong the answer is, "
                "a − y = 0.99, by σ'(z), the slope of σ. The neuron is saturated: it "
                "sits where σ is flat, and of 0.99 only 0.0066 is left.",
                "Show BP1",
                {"reset": True, "cost": "quadratic", "step": ["bp1", 0]},
            ),
            (
                "Train it. Each step is η times the error times the input, so a "
                "hundred steps change the answer little, although it is still wrong.",
                "100 steps, quadratic cost",
                {
                    "reset": True,
                    "cost": "quadratic",
                    "train": 100,
                    "step": ["bp1", 0],
                },
            ),
            (
                "The same start with the cross-entropy cost. Its ∂C/∂a is "
                "(a − y) / (a (1 − a)), and a (1 − a) is σ': in BP1 the two cancel, "
                "and the error is a − y = 0.99 itself.",
                "Show BP1 with cross-entropy",
                {"reset": True, "cost": "cross-entropy", "step": ["bp1", 0]},
            ),
            (
                "Train again. Now the neuron learns fastest when it is most wrong. "
                "Compare the two curves: only the cost is different.",
                "100 steps, cross-entropy",
                {
                    "reset": True,
                    "cost": "cross-entropy",
                    "train": 100,
                    "step": ["bp1", 0],
                },
            ),
        ],
    ),
    Lesson(
        "Vanishing gradients",
        "Five layers of sigmoid neurons. The output has an error; the layers before it "
        "learn from what BP2 passes back to them.",
        _fading(),
        [0.9, 0.4],
        [0.0],
        1.0,
        [
            (
                "Start at the output's error, then go back layer by layer with Next or "
                "the → key. Each BP2 multiplies the error by weights of about 1 and by "
                "σ', which is never above ¼. The colours have one scale for all "
                "layers: see them fade.",
                "Show BP1 at layer 5",
                {"reset": True, "step": ["bp1", 4]},
            ),
            (
                "Read the table of the layers from below. Each layer's ‖δ‖, the size "
                "of its errors, is about a quarter of the next layer's, and its "
                "gradients shrink with it.",
                "Show the table",
                {"focus": "table"},
            ),
            (
                "Train. The cost falls, but almost only the last layer learned that. "
                "Compare its entry in the last column of the table, by what share of "
                "themselves a step moves the weights, with the first layer's.",
                "100 steps",
                {"reset": True, "train": 100, "step": ["update", 4]},
            ),
        ],
    ),
    Lesson(
        "A dead input",
        "Two inputs, and the second is 0, as are most pixels at the edge of a picture.",
        [([[0.8, -0.6], [-0.5, 0.9]], [0.1, -0.2]), ([[1.2, -0.9]], [0.3])],
        [0.7, 0.0],
        [0.0],
        1.0,
        [
            (
                "BP4: a weight's gradient is the error where it ends times the "
                "activation where it starts. Input 2 is 0, so its two weights have "
                "gradient 0, however large the errors are.",
                "Show BP4 at layer 1",
                {"reset": True, "step": ["bp4", 0], "weight": 1},
            ),
            (
                "Train. The two weights stay as they were, to the last digit.",
                "100 steps",
                {"reset": True, "train": 100, "step": ["bp4", 0], "weight": 1},
            ),
            (
                "From the start again, with the input on. Now its weights have "
                "gradients and learn.",
                "Set input 2 to 0.8",
                {
                    "reset": True,
                    "inputs": [0.7, 0.8],
                    "step": ["bp4", 0],
                    "weight": 1,
                },
            ),
        ],
    ),
]
