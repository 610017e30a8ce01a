"""Gradients beside finite differences, as exact as the function's rounding allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from torchbp._numeric import central_difference
from torchbp.examination.subject import Subject
from torchbp.examination.tools import F64, flat, largest_of, random_like

# gradcheck's own defaults, 1e-3 and 1e-5, let a σ' that is 0.1 % off pass. Central
# differences with a step of 1e-6 err by some 1e-10 in float64 at sizes of order 1.
CLOSE = 1e-5
STEP = 2.0**-20
# How many roundings of the outputs a difference may err by.
ROUNDINGS = 8
# At how many entries that disagree a kink is looked for.
ASKED = 12


class Slopes:
    """Finite differences of `f` at a point.

    The rounding of `f` is measured, since a function of float64 may compute in float32
    inside: at nine points STEP apart the fourth differences of a smooth function
    vanish, and rounding remains.

    Args:
        f: the function, which returns several tensors.
        at: the point.
        seed: of the direction in which rounding is measured.
        exact: whether the dtype is float64.

    Attributes:
        values: all outputs, end to end.
        noise: the rounding of each.
        steps: the step lengths to try, the best one first.
        is_coarse: whether `f` is less exact than float64.
    """

    def __init__(
        self,
        f: Callable[..., Sequence[Tensor]],
        at: Sequence[Tensor],
        seed: int,
        exact: bool = True,
    ) -> None:
        self.f = f
        self.at = [t.detach().clone(memory_format=torch.contiguous_format) for t in at]
        self.values = self._outputs(self.at)
        generator = torch.Generator("cpu").manual_seed(seed)
        line = [random_like(t, generator) for t in self.at]
        points = torch.stack([self._moved(line, k * STEP) for k in range(-4, 5)])
        fourth = points.diff(n=4, dim=0).abs().amax(0) / 4
        eps = torch.finfo(F64 if exact else torch.float32).eps
        sizes = points.abs().amax(0)
        noise = torch.maximum(fourth, eps * sizes).nan_to_num(0, 0, 0)
        # Near 0, where terms of order 1 cancel, that is no share of the output.
        ratios = (noise / sizes.clamp(min=1))[sizes > 0]
        ratio = ratios.median().item() if ratios.numel() else eps
        # Noise far above the other outputs' is a kink, not rounding.
        most = 100 * ratio * max(1.0, largest_of(self.values))
        self.noise = noise.clamp(max=max(most, eps))
        self.is_coarse = not ratio < 1e-12
        # Of four points the error is step⁴ from curvature, and noise / step.
        best = 2.0 ** round(math.log2(max(ratio, eps)) / 5)
        self.steps = (
            [best, best / 4, best / 16, best / 64] if self.is_coarse
            else [STEP, 64 * STEP, STEP / 16]
        )  # fmt: skip

    def _outputs(self, tensors: Sequence[Tensor]) -> Tensor:
        return flat(self.f(*[t.clone() for t in tensors]))

    def _moved(self, direction: Sequence[Tensor | None], length: float) -> Tensor:
        return self._outputs(
            [
                t if v is None else t + (length * v).to(t.device, t.dtype)
                for t, v in zip(self.at, direction, strict=True)
            ]
        )

    def curvature(self, step: float) -> float:
        """The relative error that the length of the step may cause."""
        return 4 * step**4 if self.is_coarse else 0.0

    def slope(self, direction: Sequence[Tensor | None], step: float) -> Tensor:
        """The derivative of each output along the direction."""
        slope = central_difference(partial(self._moved, direction), step)
        if self.is_coarse:
            wider = central_difference(partial(self._moved, direction), 2 * step)
            slope = (4 * slope - wider) / 3
        # An output that is infinite has no slope; the others have theirs.
        return torch.where(self.values.isfinite(), slope, 0)

    def is_kink(self, direction: Sequence[Tensor | None]) -> bool:
        """Whether the one-sided slopes differ at every distance, or are infinite."""
        gaps, finite = [], self.values.isfinite()
        for step in (self.steps[0], self.steps[0] / 8):
            ends = self._moved(direction, step), self._moved(direction, -step)
            if any((end.isfinite() != finite).any() for end in ends):
                return True
            ahead, behind = ((end - self.values).abs() / step for end in ends)
            gap = (ends[0] + ends[1] - 2 * self.values).abs() / step
            gap = gap - 4 * self.noise / step
            gaps.append(torch.where(finite & (gap > 1e-3 * (ahead + behind)), gap, 0))
        # A gap from curvature shrinks with the step, one from a kink does not.
        return bool(((gaps[1] > 0.5 * gaps[0]) & (gaps[1] > 0)).any())

    def entry(self, k: int, j: int) -> list[Tensor | None]:
        """The direction of entry j of argument k."""
        unit = torch.zeros(self.at[k].numel(), dtype=F64, device="cpu")
        unit[j] = 1
        return self.only(k, unit.reshape(self.at[k].shape))

    def only(self, k: int, v: Tensor) -> list[Tensor | None]:
        """The direction `v` of argument k."""
        return [v if i == k else None for i in range(len(self.at))]


@dataclass
class Seen:
    """What finite differences tell of the gradient of one argument.

    Attributes:
        entries: the numbers of the entries that were compared.
        ours: their gradients, of several output gradients: (entries, draws).
        right: the same by differences.
        wrong: the places in `entries` where the two disagree.
        kinks: the places in `entries` where differences tell nothing.
        is_flat: whether no output moves with any of the entries.
        along: the wrong derivative along a random direction, in words, or "".
    """

    entries: list[int]
    ours: Tensor
    right: Tensor
    wrong: list[int] = field(default_factory=list)
    kinks: list[int] = field(default_factory=list)
    is_flat: bool = True
    along: str = ""

    def off_by(self) -> Tensor:
        """|ours - right|, infinite where either is NaN: (entries, draws)."""
        return (self.ours - self.right).abs().nan_to_num(float("inf"))


def look(
    s: Subject,
    slopes: Slopes,
    cotangents: Sequence[Sequence[Tensor]],
    grads: Sequence[Sequence[Tensor]],
    budget: int,
) -> list[Seen]:
    """Compare the gradients of several output gradients with finite differences.

    Args:
        s: the function, for its tolerance and seed.
        slopes: its differences.
        cotangents: the output gradients of each draw.
        grads: the gradients that these give.
        budget: how many entries are differenced; where that is not all, three random
            directions are, too.
    """
    ends = torch.stack([flat(g) for g in cotangents], 1)
    comparison = _Comparison(slopes, ends, s.requested_tolerance or CLOSE, s.seed)
    each = max(1, budget // max(1, len(slopes.at))) if budget else 0
    result = []
    for k, t in enumerate(slopes.at):
        ours = torch.stack([flat([grad[k]]) for grad in grads], 1)
        entries = _sample(t.numel(), each, s.seed)
        seen = comparison.at_entries(k, entries, ours[entries])
        if len(entries) < t.numel() and not seen.wrong:
            comparison.along_directions(k, seen, ours)
        result.append(seen)
    return result


def _sample(count: int, most: int, seed: int) -> list[int]:
    if count <= most:
        return list(range(count))
    generator = torch.Generator("cpu").manual_seed(seed)
    order = torch.randperm(count, generator=generator, device="cpu")
    return sorted(order[:most].tolist())


@dataclass
class _Comparison:
    """Gradients beside the differences of one function.

    Attributes:
        slopes: the differences.
        ends: the output gradients: (outputs, draws).
        tolerance: how far two right results may be apart, relative to the largest.
        seed: of the random directions.
    """

    slopes: Slopes
    ends: Tensor
    tolerance: float
    seed: int

    def at_entries(self, k: int, entries: list[int], ours: Tensor) -> Seen:
        """Compare at these entries of argument k."""
        seen = Seen(entries, ours, torch.zeros_like(ours))
        for place, j in enumerate(entries):
            slope = self.slopes.slope(self.slopes.entry(k, j), self.slopes.steps[0])
            seen.is_flat = seen.is_flat and not slope.any()
            seen.right[place] = slope @ self.ends
        both = torch.cat([ours, seen.right]).nan_to_num(0, 0, 0).abs()
        size = both.amax(0) if both.numel() else ours.new_zeros(ours.shape[1])
        asked = 0
        for place, j in enumerate(entries):
            if self._agree(ours[place], seen.right[place], size, self.slopes.steps[0]):
                continue
            asked += 1
            direction = self.slopes.entry(k, j)
            if asked <= ASKED and self._agree_elsewhere(ours[place], direction, size):
                seen.right[place] = ours[place]
            elif asked <= ASKED and self.slopes.is_kink(direction):
                seen.kinks.append(place)
            else:
                seen.wrong.append(place)
        return seen

    def along_directions(self, k: int, seen: Seen, ours: Tensor) -> None:
        """Compare along three random directions of argument k, and add it to `seen`."""
        generator = torch.Generator("cpu").manual_seed(self.seed + 1)
        for _ in range(3):
            v = random_like(self.slopes.at[k], generator)
            v = v / max(1.0, v.norm().item() / 2)
            direction, step = self.slopes.only(k, v), self.slopes.steps[0]
            slope = self.slopes.slope(direction, step)
            seen.is_flat = seen.is_flat and not slope.any()
            right, own = slope @ self.ends, v.reshape(-1) @ ours
            size = 2 * ours.nan_to_num(0, 0, 0).norm(dim=0) + right.abs()
            if (
                not self._agree(own, right, size, step)
                and not self._agree_elsewhere(own, direction, size)
                and not self.slopes.is_kink(direction)
            ):
                seen.along = f"{own[0]:.4g}, expected {right[0]:.4g}"
                return

    def _agree(self, ours: Tensor, right: Tensor, size: Tensor, step: float) -> bool:
        """Whether they agree to the tolerance and the rounding of the differences."""
        noise = ROUNDINGS * (self.ends.abs().t() @ self.slopes.noise) / step
        close = max(self.tolerance, self.slopes.curvature(step))
        # False for NaN.
        return bool(((ours - right).abs() <= close * size + noise).all())

    def _agree_elsewhere(
        self, ours: Tensor, direction: Sequence[Tensor | None], size: Tensor
    ) -> bool:
        """Whether they agree with another step: the first may have crossed a kink."""
        return any(
            self._agree(
                ours, self.slopes.slope(direction, step) @ self.ends, size, step
            )
            for step in self.slopes.steps[1:]
        )


def names_of(seen: Seen, places: Sequence[int], shape: torch.Size) -> str:
    """Up to three entries, as indices in brackets."""
    named = [_index(seen.entries[p], shape) for p in places[:3]]
    return ", ".join(named) + (", …" if len(places) > 3 else "")


def _index(j: int, shape: torch.Size) -> str:
    if not shape:
        return "[]"
    place: list[int] = []
    for size in reversed(shape):
        j, i = divmod(j, size)
        place.insert(0, i)
    return str(place)


def where_kinks(
    seen: Sequence[Seen], labels: Sequence[str], at: Sequence[Tensor]
) -> Iterator[str]:
    """The entries at which differences tell nothing, by argument and index."""
    for one, label, t in zip(seen, labels, at, strict=True):
        if one.kinks:
            yield label + names_of(one, one.kinks, t.shape)
