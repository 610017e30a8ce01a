"""The network and its backward pass as the graph that TensorBoard draws.

The graph is made from the records of a pass. This is faster than a trace by torch.jit,
includes the backward pass, and is the same for hand-written and native layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from torchbp.functional import LinearFunction

if TYPE_CHECKING:
    from torchbp.inspection import Record

__all__ = ["FIRST", "draw"]

FIRST = "a0_input"  # the first node: an event file with this name has a graph


def draw(records: list[Record], cost: str) -> Any:
    """Return a GraphDef: each layer is a box with W, b, z, a and, from the backward
    pass, δ, ∂C/∂W and ∂C/∂b. Every node has its formula and its shape.

    Args:
        records: of one forward and backward pass, in order.
        cost: the name of the cost's class.
    """
    from tensorboard.compat.proto.attr_value_pb2 import AttrValue
    from tensorboard.compat.proto.graph_pb2 import GraphDef

    graph = GraphDef()

    def node(name: str, formula: str, shape: tuple[int, ...], *inputs: str) -> str:
        """Add a node, and return its name."""
        text = " x ".join(map(str, shape)) or "a number"
        attributes = {"shape": AttrValue(s=text.encode())}
        graph.node.add(name=name, op=formula, input=inputs, attr=attributes)
        return name

    names = [
        f"layer_{i}_{_sigma(record.function.__name__)}"
        for i, record in enumerate(records, start=1)
    ]
    # The shapes are those of one example, as in the book.
    a = node(FIRST, "a^0 = x", records[0].x.shape[-1:])
    before = []
    for i, (name, record) in enumerate(zip(names, records, strict=True), start=1):
        if i > 1 and not torch.equal(record.x, records[i - 2].a):
            a = node(
                f"between_{i - 1}_and_{i}", "other modules", record.x.shape[-1:], a
            )
        before.append(a)
        n_out = record.a.shape[-1:]
        parts = [a, node(f"{name}/W", f"W^{i}", tuple(record.weight.shape))]
        plus_b, sigma = "", f"z^{i}"
        if record.function is not LinearFunction:
            sigma = f"σ(z^{i})"
        if record.bias is not None:
            plus_b = f" + b^{i}"
            parts.append(node(f"{name}/b", f"b^{i}", n_out))
        z = node(f"{name}/z", f"z^{i} = W^{i} a^{i - 1}{plus_b}", n_out, *parts)
        a = node(f"{name}/a", f"a^{i} = {sigma}", n_out, z)
    target = node("y_target", "y", records[-1].a.shape[-1:])
    node("cost/C", f"C = 1/n Σ_x C_x, {cost}", (), a, target)
    above = node("cost/grad_a", "∇_a C", records[-1].a.shape[-1:], a, target)
    for i in range(len(records), 0, -1):
        name, record = names[i - 1], records[i - 1]
        inputs = [above, f"{name}/z"]
        if i == len(records):
            bp, formula = "BP1", f"δ^{i} = ∇_a C ⊙ σ'(z^{i})"
        else:
            bp, formula = "BP2", f"δ^{i} = (W^{i + 1})ᵀ δ^{i + 1} ⊙ σ'(z^{i})"
            inputs.append(f"{names[i]}/W")
        n_out = record.a.shape[-1:]
        above = node(f"{name}/{bp}_delta", formula, n_out, *inputs)
        if record.bias is not None:
            node(f"{name}/BP3_grad_b", f"∂C/∂b^{i} = Σ_x δ^{i}", n_out, above)
        formula = f"∂C/∂W^{i} = Σ_x δ^{i} (a^{i - 1})ᵀ"
        shape = tuple(record.weight.shape)
        node(f"{name}/BP4_grad_W", formula, shape, above, before[i - 1])
    return graph


def _sigma(function: str) -> str:
    """Return "sigmoid" for "LinearSigmoidFunction": a box has room for 15 letters."""
    return (
        function.removesuffix("Function").removeprefix("Linear").lower() or "identity"
    )
