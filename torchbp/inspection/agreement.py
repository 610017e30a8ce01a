"""The agreement of two computations of one quantity, and the report about it.

:class:`Agreement` compares two tensors, :class:`Row` is one equation at one layer, and
:class:`Comparison` is the table that ``torchbp.compare`` returns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from textwrap import wrap

import torch
from torch import Tensor

from torchbp._terminal import aligned, html_table

__all__ = ["Agreement", "Comparison", "Row"]

WIDTH = 96  # columns of the lines below a table


@dataclass(frozen=True)
class Agreement:
    """The agreement of two computations of one quantity.

    Attributes:
        ok: whether they are equal, exactly or approximately.
        exact: whether they are equal bit by bit.
        absolute: the largest difference of an entry.
        relative: that difference over the largest entry.

    Examples:
        >>> Agreement(ok=True, exact=False, absolute=1e-7, relative=1e-8).word
        '≈'
    """

    ok: bool
    exact: bool
    absolute: float
    relative: float

    @property
    def word(self) -> str:
        """The verdict: "exact", "≈" or "WRONG"."""
        return "WRONG" if not self.ok else "exact" if self.exact else "≈"


def agree(actual: Tensor, expected: Tensor, relative: float | None = None) -> Agreement:
    """Return the agreement of `actual` with `expected`; NaN equals NaN.

    Args:
        actual, expected: tensors of any dtype and device.
        relative: the tolerance, as a share of the largest entry; √ε of the dtype of
            `expected` if None.
    """
    relative = tolerance(expected) if relative is None else relative
    a, e = (t.detach().cpu().double() for t in (actual, expected))
    if a.shape != e.shape:
        return Agreement(False, False, math.inf, math.inf)
    same = (a == e) | (a.isnan() & e.isnan())
    if same.all():
        return Agreement(True, True, 0.0, 0.0)
    largest = e.abs().amax().item()
    difference = (a - e).abs().masked_fill(same, 0).amax().item()
    return Agreement(
        ok=difference <= relative * largest,
        exact=False,
        absolute=difference,
        relative=difference / largest if largest else math.inf,
    )


def close(actual: Tensor, expected: Tensor) -> bool:
    """Return whether `actual` is approximately `expected`."""
    return agree(actual, expected).ok


def tolerance(t: Tensor) -> float:
    """Return √ε of the dtype of `t`."""
    return float(torch.finfo(t.dtype).eps ** 0.5)


@dataclass
class Row:
    """One equation at one layer.

    Attributes:
        equation: "BP1" ... "BP4", or "A1" for the cost itself.
        layer: ℓ, counted over the calls from 1; 0 for the cost.
        name: the layer's name in the model.
        formula: the equation at this layer.
        native: ours against native autograd in the model's own dtype, or in float64 if
            they disagree only there.
        numeric: ours against finite differences, in float64; None if C changes by less
            than its rounding error, so that they are meaningless.
        sampled, entries: the number of entries with finite differences, and of all.
        kinks: the number of entries omitted because a kink of σ is within the step.
        overruled: whether native lost digits where ours did not: they differ, and
            finite differences confirm ours in float64, or the results in float64
            confirm ours in a shorter dtype.
        fault: what is wrong in the equation itself; "" if nothing is, or if only the
            quantities on its right-hand side are wrong.

    Examples:
        >>> same = Agreement(ok=True, exact=True, absolute=0.0, relative=0.0)
        >>> row = Row("BP3", 1, "layers.0", "∂C/∂b^1 = Σ_x δ^1", same)
        >>> row.ok, row.left
        (True, '∂C/∂b^1')
    """

    equation: str
    layer: int
    name: str
    formula: str
    native: Agreement
    numeric: Agreement | None = None
    sampled: int = 0
    entries: int = 0
    kinks: int = 0
    overruled: bool = False
    fault: str = ""

    @property
    def ok(self) -> bool:
        """Whether ours agrees with native, and with finite differences unless `numeric`
        is None."""
        return self.native.ok and (self.numeric is None or self.numeric.ok)

    @property
    def left(self) -> str:
        """The left-hand side of the formula."""
        return self.formula.partition(" = ")[0]

    def cells(self) -> list[str]:
        """Return the cells of the table's row."""
        cells = [f"{self.equation:<3}  {self.formula}"]
        for agreement in (self.native, self.numeric):
            if agreement is None:
                cells += ["—", "—", "—"]
            else:
                numbers = agreement.absolute, agreement.relative
                cells += [agreement.word, *(f"{x:.1e}" if x else "0" for x in numbers)]
        sampled = f"{self.sampled} of {self.entries}" if self.entries else "—"
        return [*cells, sampled]


@dataclass
class Comparison:
    """The result of ``torchbp.compare``; `str()` is a table.

    Attributes:
        rows: the equations, from the last layer to the first, as a backward pass goes.
        layers: a description of each layer.
        dtype: the model's.

    Examples:
        >>> import torch, torchbp
        >>> model = torchbp.MLP([3, 2])
        >>> report = torchbp.compare(
        ...     model, torchbp.QuadraticCost(), torch.rand(5, 3), torch.rand(5, 2)
        ... )
        >>> report.faults, report.layers
        ([], ['layer 1: layers.0, 5 x 3 → 2'])
    """

    rows: list[Row]
    layers: list[str]
    dtype: torch.dtype

    @property
    def ok(self) -> bool:
        """Whether every row is ok."""
        return all(row.ok for row in self.rows)

    @property
    def faults(self) -> list[Row]:
        """The rows whose equation itself is wrong, not only its right-hand side."""
        return [row for row in self.rows if row.fault]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __str__(self) -> str:
        return "\n".join(
            [*self._above(), "", aligned(self._lines(), 1), "", *self._below()]
        )

    def _repr_html_(self) -> str:
        """Return the report as HTML, for notebooks."""
        words = {"exact": "good", "≈": "good", "WRONG": "bad"}
        caption = "\n".join([*self._above(), *self._below()])
        return html_table(caption, self._lines(), left=1, verdicts=words)

    def _above(self) -> list[str]:
        """Return the lines above the table: what was compared."""
        dtype = str(self.dtype).removeprefix("torch.")
        beside = f"beside native autograd in {dtype}, and finite differences in float64"
        return [*self.layers, beside]

    def _lines(self) -> list[list[str]]:
        """Return the table's headings and rows."""
        titles = "equation|native|max diff|relative|finite|max diff|relative|entries"
        return [titles.split("|"), *(row.cells() for row in self.rows)]

    def _below(self) -> list[str]:
        """Return the lines below the table: entries omitted, and faults."""
        lines: list[str] = []
        kinks = [f"{row.kinks} of {row.left}" for row in self.rows if row.kinks]
        if kinks:
            lines += wrap(f"left out, next to a kink of σ: {', '.join(kinks)}", WIDTH)
        overruled = [row.left for row in self.rows if row.overruled]
        if overruled:
            text = f"digits lost by native, not by ours: {', '.join(overruled)}"
            lines += wrap(text, WIDTH)
        wrong = sum(not row.ok for row in self.rows)
        lines.append(
            f"{len(self.rows) - wrong} of {len(self.rows)} equations agree"
            + (", the others because of:" if wrong else "")
        )
        lines += [
            f"{row.equation} of {row.name or 'the model'}: {row.fault}"
            for row in self.faults
        ]
        return lines
