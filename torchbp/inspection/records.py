"""Records of the calls of layers: z, a, δ and the gradients.

Whatever shows the numbers of a layer reads them from a :class:`Record`: the table of a
:class:`Trace`, the dashboard, the page, the tour and ``torchbp.compare``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import overload

import torch
from torch import Tensor

from torchbp import functional
from torchbp._terminal import aligned, html_table

__all__ = ["Record", "Trace"]

# A neuron is saturated if σ' is below this share of its largest value: for the sigmoid
# if |z| > 4.4, for tanh if |z| > 2.2, for ReLU if z < 0.
SATURATED = 0.05


@dataclass(eq=False)
class Record:
    """One call of one layer. All tensors are detached copies.

    Attributes:
        name: the layer's name in the observed model ("" if it is the model).
        function: the layer's Function, with its σ'.
        x: a^{ℓ-1}, (*, n_in).
        weight, bias: W and b at the call; bias None if there is none.
        z, a: (*, n_out).
        sigma_prime: σ'(z), (*, n_out).
        delta: ∂C/∂z, (*, n_out); None until a backward pass reaches the call. After
            several backward passes (``retain_graph=True``), that of the last: unlike
            ``.grad``, a record does not sum them.
        grad_weight, grad_bias: ∂C/∂W and ∂C/∂b of this call alone; None as above, and
            for parameters that do not require grad.
        grad_a: ∂C/∂a as it arrived, before σ', (*, n_out): ∇_a C at the last layer.
            None as above.

    Examples:
        >>> import torch, torchbp
        >>> layer = torchbp.BPLinearSigmoid(2, 1)
        >>> with torchbp.observe(layer) as trace:
        ...     C = torchbp.QuadraticCost()(layer(torch.rand(3, 2)), torch.rand(3, 1))
        ...     C.backward()
        >>> record = trace[0]
        >>> torch.allclose(record.delta, record.grad_a * record.sigma_prime)  # BP1
        True
        >>> torch.allclose(record.grad_weight, record.delta.T @ record.x)  # BP4
        True
        >>> record
        <Record of '': 3 x 2 → 1, forward and backward>
    """

    name: str
    function: type[functional.LinearFunction]
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    z: Tensor
    a: Tensor
    sigma_prime: Tensor
    delta: Tensor | None = None
    grad_weight: Tensor | None = None
    grad_bias: Tensor | None = None
    grad_a: Tensor | None = None

    def __repr__(self) -> str:
        passed = "forward" if self.delta is None else "forward and backward"
        return f"<Record of {self.name!r}: {self.shapes}, {passed}>"

    @property
    def shapes(self) -> str:
        """Rows, n_in and n_out: "10 x 784 → 30"."""
        return f"{' x '.join(map(str, self.x.shape))} → {self.weight.shape[0]}"

    @property
    def saturated(self) -> float:
        """The share of neurons, over all examples, whose σ' is below 5 % of its largest
        value. BP1 and BP2 multiply by σ', so these neurons hardly learn."""
        threshold = SATURATED * self.function.max_slope
        return (self.sigma_prime.abs() < threshold).float().mean().item()

    def norm(self, quantity: str) -> float | None:
        """Return the root of the sum of squares of one of the record's tensors, over
        all its entries, or None if the record lacks the tensor.

        Args:
            quantity: the tensor's name, for example "a" or "grad_weight".

        Raises:
            ValueError: `quantity` names no tensor of a record.
        """
        if quantity not in _QUANTITIES:
            raise ValueError(
                f"quantity: expected one of {', '.join(_QUANTITIES)}, got {quantity!r}"
            )
        t: Tensor | None = getattr(self, quantity)
        return None if t is None else _norm(t)

    @property
    def mean_delta(self) -> Tensor | None:
        """The mean over the examples of ∂C_x/∂z, (n_out): the sum of `delta`, which has
        the factor 1/n. It equals ∂C/∂b, and its norm is the "speed of learning" of the
        book's chapter 5. None without a backward pass."""
        return None if self.delta is None else functional.as_rows(self.delta).sum(0)

    def update_ratio(self, lr: float = 1.0) -> float | None:
        """Return η‖∂C/∂W‖/‖W‖, the size of a step of gradient descent relative to W;
        None without ∂C/∂W.

        Args:
            lr: η.
        """
        if self.grad_weight is None:
            return None
        step, size = lr * _norm(self.grad_weight), _norm(self.weight)
        return step / size if size else math.inf if step else 0.0

    @property
    def example_gradient_norms(self) -> Tensor:
        """The norm of ∂C_x/∂(W, b) for every example x, (*).

        The gradient of one example is the outer product of its δ and (a^{ℓ-1}, 1). So
        its norm is n ‖δ‖ √(‖a^{ℓ-1}‖² + 1), without making per-example gradients; the
        factor n undoes the 1/n in δ. Rows must be examples.

        Raises:
            RuntimeError: no backward pass has reached this call.
        """
        if self.delta is None:
            raise RuntimeError(f"{self.name}: expected a backward pass first, got none")
        n = self.delta.shape[:-1].numel()
        ones = 0 if self.bias is None else 1
        inputs = (self.x.square().sum(-1) + ones).sqrt()
        return n * torch.linalg.vector_norm(self.delta, dim=-1) * inputs


_QUANTITIES = (
    "x weight bias z a sigma_prime delta mean_delta grad_weight grad_bias grad_a"
).split()


def _norm(t: Tensor) -> float:
    """Return ‖t‖, in float32 at least: in float16 it overflows at 65504."""
    dtype = torch.promote_types(t.dtype, torch.float32)
    return torch.linalg.vector_norm(t, dtype=dtype).item()


@dataclass(eq=False)
class Trace:
    """The records of all calls, in order: ``trace[i]``, or ``trace["layers.0"]`` for
    the calls of one layer. ``print(trace)`` prints :meth:`table`.

    Attributes:
        records: the records as a list.

    Examples:
        >>> import torch, torchbp
        >>> model = torchbp.MLP([4, 3, 2])
        >>> with torchbp.observe(model) as trace:
        ...     _ = model(torch.rand(5, 4))
        >>> [record.name for record in trace]
        ['layers.0', 'layers.1']
        >>> [tuple(record.z.shape) for record in trace["layers.1"]]
        [(5, 2)]
    """

    records: list[Record] = field(default_factory=list)

    def __str__(self) -> str:
        return self.table()

    def __repr__(self) -> str:
        return f"<Trace of {len(self)} calls>"

    def table(self, lr: float | None = None) -> str:
        """Return a table with a line for each call: its shapes, ‖a‖, the share of
        saturated neurons, ‖δ‖, ‖∂C/∂W‖, ‖∂C/∂b‖ and the update-to-weight ratio, "—" for
        a missing one. Norms are over all entries, examples included.

        Args:
            lr: η, for η‖∂C/∂W‖/‖W‖. Without it, as in ``print(trace)``, the column is
                ‖∂C/∂W‖/‖W‖, which is the ratio at η = 1.
        """
        if not self.records:
            return (
                "no calls: none was made in the block, or only by a function compiled "
                "before it, whose calls are not recorded"
            )
        table = aligned(self._lines(lr), left=2)
        return table if lr is None else f"{table}\nη = {lr:g}"

    def _repr_html_(self) -> str:
        """Return the table as HTML, for notebooks."""
        lines = self._lines(None)
        return html_table(repr(self).strip("<>"), lines, left=2, verdicts={})

    def _lines(self, lr: float | None) -> list[list[str]]:
        """Return the table's headings and rows."""
        titles = "layer|shapes|‖a‖|saturated|‖δ‖|‖∂C/∂W‖|‖∂C/∂b‖".split("|")
        titles.append("‖∂C/∂W‖/‖W‖" if lr is None else "η‖∂C/∂W‖/‖W‖")
        lines = [titles]
        for record in self.records:
            cells = [
                _number(record.norm("a")),
                "—" if record.a.numel() == 0 else f"{100 * record.saturated:.1f} %",
                *map(_number, map(record.norm, ("delta", "grad_weight", "grad_bias"))),
                _number(record.update_ratio(1.0 if lr is None else lr)),
            ]
            lines.append([record.name or "(model)", record.shapes, *cells])
        return lines

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    @overload
    def __getitem__(self, key: int) -> Record: ...
    @overload
    def __getitem__(self, key: str | slice) -> list[Record]: ...
    def __getitem__(self, key: int | slice | str) -> Record | list[Record]:
        if not isinstance(key, str):
            return self.records[key]
        records = [record for record in self.records if record.name == key]
        if not records:
            names = sorted({record.name for record in self.records})
            raise KeyError(f"expected one of {names}, got {key!r}")
        return records


def _number(value: float | None) -> str:
    """Return a cell of the table."""
    return "—" if value is None else f"{value:.3g}"
