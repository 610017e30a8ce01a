"""The slow oracle: backpropagation as the book states it, one example at a time.

Plain Python floats (float64), one sum per neuron; no tensors, no autograd, and nothing
of torchbp. The indices are in the book's order: W[j][k] goes from neuron k to neuron j.

Source: Nielsen, Neural Networks and Deep Learning, chapter 2, equations BP1-BP4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

Vector = list[float]
Matrix = list[Vector]
Layer = tuple[Matrix, Vector, str]  # W, b, the name of σ


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))


# σ and σ', both of z: the package writes σ' in terms of a, so this is another path.
SIGMA = {
    "sigmoid": (sigmoid, lambda z: sigmoid(z) * sigmoid(-z)),
    "tanh": (math.tanh, lambda z: 1 / math.cosh(z) ** 2),
    "relu": (lambda z: max(z, 0.0), lambda z: 1.0 if z > 0 else 0.0),
    "softplus": (lambda z: max(z, 0.0) + math.log1p(math.exp(-abs(z))), sigmoid),
    "identity": (lambda z: z, lambda z: 1.0),
}


def softmax(z: Vector) -> Vector:
    exps = [math.exp(zj - max(z)) for zj in z]
    return [e / sum(exps) for e in exps]


def quadratic(a: Vector, y: Vector) -> float:
    return sum((yj - aj) ** 2 for aj, yj in zip(a, y, strict=True)) / 2


def cross_entropy(z: Vector, y: Vector) -> float:
    pairs = zip(z, y, strict=True)
    terms = (yj * math.log(sigmoid(zj)) + (1 - yj) * math.log(sigmoid(-zj))
             for zj, yj in pairs)  # fmt: skip
    return -sum(terms)


def log_likelihood(z: Vector, y: Vector) -> float:
    return -sum(yj * math.log(pj) for pj, yj in zip(softmax(z), y, strict=True))


# C_x and ∇C_x of the network's output: a, or z where the cost takes z.
COSTS = {
    "quadratic": (
        quadratic,
        lambda a, y: [aj - yj for aj, yj in zip(a, y, strict=True)],
    ),
    "cross-entropy": (
        cross_entropy,
        lambda z, y: [sigmoid(zj) - yj for zj, yj in zip(z, y, strict=True)],
    ),
    "log-likelihood": (
        log_likelihood,
        lambda z, y: [pj * sum(y) - yj for pj, yj in zip(softmax(z), y, strict=True)],
    ),
}


@dataclass
class Result:
    """`z`, `a`, `delta` are [example][layer][neuron]; δ is ∂C_x/∂z, without the 1/n.
    `cost`, `grad_W` and `grad_b`, [layer], are means over the examples (A1)."""

    cost: float
    z: list[Matrix]
    a: list[Matrix]
    delta: list[Matrix]
    grad_W: list[Matrix]  # noqa: N815
    grad_b: list[Vector]


def layers_of(model) -> list[Layer]:
    """Weights, biases and σ of a torchbp.MLP, known by the names of its layers."""
    return [
        (
            layer.weight.tolist(),
            layer.bias.tolist(),
            type(layer).__name__.removeprefix("BPLinear").lower() or "identity",
        )
        for layer in model.layers
    ]


def feedforward(layers: list[Layer], x: Vector) -> tuple[Matrix, Matrix]:
    """z and a of every layer for one example."""
    z, a = [], []
    for W, b, name in layers:
        sigma, _ = SIGMA[name]
        z.append([
            sum(W[j][k] * x[k] for k in range(len(x))) + b[j] for j in range(len(b))
        ])  # fmt: skip
        x = [sigma(zj) for zj in z[-1]]
        a.append(x)
    return z, a


def backpropagate(layers: list[Layer], cost: str, z: Matrix, a: Matrix, y: Vector):
    """δ of every layer for one example."""
    nabla_a = COSTS[cost][1](a[-1], y)
    delta: Matrix = [[] for _ in layers]
    for ell in reversed(range(len(layers))):
        _, sigma_prime = SIGMA[layers[ell][2]]
        slopes = [sigma_prime(zj) for zj in z[ell]]
        if ell == len(layers) - 1:
            delta[ell] = [g * s for g, s in zip(nabla_a, slopes, strict=True)]  # BP1
        else:
            W, above = layers[ell + 1][0], delta[ell + 1]
            delta[ell] = [
                sum(W[j][k] * above[j] for j in range(len(above))) * slopes[k]  # BP2
                for k in range(len(slopes))
            ]
    return delta


def run(layers: list[Layer], cost: str, inputs: Matrix, targets: Matrix) -> Result:
    """The cost and its gradients for the examples `inputs` with the rows `targets`."""
    n = len(inputs)
    result = Result(
        0.0, [], [], [],
        [[[0.0] * len(W[0]) for _ in W] for W, _, _ in layers],
        [[0.0] * len(b) for _, b, _ in layers],
    )  # fmt: skip
    for x, y in zip(inputs, targets, strict=True):
        z, a = feedforward(layers, x)
        delta = backpropagate(layers, cost, z, a, y)
        result.cost += COSTS[cost][0](a[-1], y) / n
        for ell in range(len(layers)):
            below = a[ell - 1] if ell else x
            for j, delta_j in enumerate(delta[ell]):
                result.grad_b[ell][j] += delta_j / n  # BP3
                for k, a_k in enumerate(below):
                    result.grad_W[ell][j][k] += a_k * delta_j / n  # BP4
        result.z.append(z)
        result.a.append(a)
        result.delta.append(delta)
    return result
