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
from torchbp.examination.tools import F64, largest_of, random_like

# gradcheck's own defaults, 1e-3 and 1e-5, let a σ' that is 0.1 % off pass. Central
# differences with a step of 1e-6 err by some 1e-10 in float64 at sizes of order 1.
CLOSE = 1e-5
STEP = 2.0**-20
# How many roundings of the outputs a difference may be off by.
ROUNDINGS = 8
# At so many entries that do not fit, it is asked whether there is a kink.
ASKED = 12


class Slopes:
    """Finite differences of `f` at a point.

    Its rounding is measured, since a function of float64 may compute in float32 inside:
    along a line of nine points STEP apart the fourth differences of a smooth function
    vanish, and what is left is rounding.

    Attributes:
        values: all outputs, end to end.
        noise: the rounding of each.
        steps: the lengths to be tried, the best one first.
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
        # What is far above the others' is a kink, not rounding.
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
        outputs = self.f(*[t.clone() for t in tensors])
        flat = [y.detach().reshape(-1).to("cpu", F64) for y in outputs]
        return torch.cat(flat) if flat else torch.empty(0, dtype=F64, device="cpu")

    def _moved(self, direction: Sequence[Tensor | None], length: float) -> Tensor:
        return self._outputs(
            [
                t if v is None else t + (length * v).to(t.device, t.dtype)
                for t, v in zip(self.at, direction, strict=True)
            ]
        )

    def curvature(self, step: float) -> float:
        """The share of an error that comes from the length of the step."""
        return 4 * step**4 if self.is_coarse else 0.0

    def slope(self, direction: Sequence[Tensor | None], step: float) -> Tensor:
        """The derivative of each output along the direction."""
        slope = central_difference(partial(self._moved, direction), step)
        if self.is_coarse:
            wider = central_difference(partial(self._moved, direction), 2 * step)
            slope = (4 * slope - wider) / 3
        # An output that is infinite here has no slope, and the others have theirs.
        return torch.where(self.values.isfinite(), slope, 0)

    def is_kink(self, direction: Sequence[Tensor | None]) -> bool:
        """Whether the slopes to either side part, at any distance, or are infinite."""
        gaps, finite = [], self.values.isfinite()
        for step in (self.steps[0], self.steps[0] / 8):
            ends = self._moved(direction, step), self._moved(direction, -step)
            if any((end.isfinite() != finite).any() for end in ends):
                return True
            ahead, behind = ((end - self.values).abs() / step for end in ends)
            gap = (ends[0] + ends[1] - 2 * self.values).abs() / step
            gap = gap - 4 * self.noise / step
            gaps.append(torch.where(finite & (gap > 1e-3 * (ahead + behind)), gap, 0))
        # Curvature's share shrinks with the step, a kink's does not.
        return bool(((gaps[1] > 0.5 * gaps[0]) & (gaps[1] > 0)).any())

    def entry(self, k: int, j: int) -> list[Tensor | None]:
        """The direction of entry j of argument k."""
        unit = torch.zeros(self.at[k].numel(), dtype=F64, device="cpu")
        unit[j] = 1
        return self.only(k, unit.reshape(self.at[k].shape))

    def only(self, k: int, v: Tensor) -> list[Tensor | None]:
        return [v if i == k else None for i in range(len(self.at))]


@dataclass
class Seen:
    """What was seen of one argument.

    Attributes:
        entries: the numbers of the entries that were looked at.
        ours: their gradients, of several output gradients: (entries, draws).
        right: the same by differences.
        wrong: the places in `entries` where the two part.
        kinks: the places in `entries` where nothing is held against anybody.
        is_flat: whether no output moved with any of the entries.
        along: the gradient along a direction that is wrong, in words.
    """

    entries: list[int]
    ours: Tensor
    right: Tensor
    wrong: list[int] = field(default_factory=list)
    kinks: list[int] = field(default_factory=list)
    is_flat: bool = True
    along: str = ""


def look(
    s: Subject,
    slopes: Slopes,
    cotangents: Sequence[Sequence[Tensor]],
    grads: Sequence[Sequence[Tensor]],
    budget: int,
) -> list[Seen]:
    """What differences say of the gradients that several output gradients give: at
    `budget` entries in all, and where that is not all, along random directions."""
    ends = torch.stack([_flat(g) for g in cotangents], 1)
    each = max(1, budget // max(1, len(slopes.at))) if budget else 0
    result = []
    for k, t in enumerate(slopes.at):
        ours = torch.stack([_flat([grad[k]]) for grad in grads], 1)
        entries = _sample(t.numel(), each, s.seed)
        seen = _entries(s, slopes, k, entries, ours[entries], ends)
        if len(entries) < t.numel() and not seen.wrong:
            _directions(s, slopes, k, seen, ours, ends)
        result.append(seen)
    return result


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1).to("cpu", F64) for t in tensors])


def _sample(count: int, most: int, seed: int) -> list[int]:
    if count <= most:
        return list(range(count))
    generator = torch.Generator("cpu").manual_seed(seed)
    order = torch.randperm(count, generator=generator, device="cpu")
    return sorted(order[:most].tolist())


def _close(s: Subject, slopes: Slopes, step: float) -> float:
    """How far two right results may part, relative to the largest."""
    return max(s.given_tolerance or CLOSE, slopes.curvature(step))


def _fits(
    s: Subject, slopes: Slopes, step: float, ours: Tensor, right: Tensor, size: Tensor,
    ends: Tensor,
) -> bool:  # fmt: skip
    noise = ROUNDINGS * (ends.abs().t() @ slopes.noise) / step
    most = _close(s, slopes, step) * size + noise
    return bool(((ours - right).abs() <= most).all())  # never so for NaN


def _entries(
    s: Subject, slopes: Slopes, k: int, entries: list[int], ours: Tensor, ends: Tensor
) -> Seen:
    right, step = torch.zeros_like(ours), slopes.steps[0]
    seen = Seen(entries, ours, right)
    for place, j in enumerate(entries):
        slope = slopes.slope(slopes.entry(k, j), step)
        seen.is_flat = seen.is_flat and not slope.any()
        right[place] = slope @ ends
    size = _size(ours, right)
    asked = 0
    for place, j in enumerate(entries):
        if _fits(s, slopes, step, ours[place], right[place], size, ends):
            continue
        asked += 1
        direction = slopes.entry(k, j)
        if asked <= ASKED and _fits_elsewhere(
            s, slopes, direction, ours[place], right[place], size, ends
        ):
            right[place] = ours[place]
        elif asked <= ASKED and slopes.is_kink(direction):
            seen.kinks.append(place)
        else:
            seen.wrong.append(place)
    return seen


def _size(ours: Tensor, right: Tensor) -> Tensor:
    """The largest entry of each draw."""
    both = torch.cat([ours, right]).nan_to_num(0, 0, 0).abs()
    return both.amax(0) if both.numel() else ours.new_zeros(ours.shape[1])


def _fits_elsewhere(
    s: Subject, slopes: Slopes, direction: Sequence[Tensor | None], ours: Tensor,
    right: Tensor, size: Tensor, ends: Tensor,
) -> bool:  # fmt: skip
    """Whether another step fits: the first one may have crossed a kink."""
    for step in slopes.steps[1:]:
        right = slopes.slope(direction, step) @ ends
        if _fits(s, slopes, step, ours, right, size, ends):
            return True
    return False


def _directions(
    s: Subject, slopes: Slopes, k: int, seen: Seen, ours: Tensor, ends: Tensor
) -> None:
    """Compare along three random directions of argument k."""
    generator = torch.Generator("cpu").manual_seed(s.seed + 1)
    for _ in range(3):
        v = random_like(slopes.at[k], generator)
        v = v / max(1.0, v.norm().item() / 2)
        direction, step = slopes.only(k, v), slopes.steps[0]
        slope = slopes.slope(direction, step)
        seen.is_flat = seen.is_flat and not slope.any()
        right, own = slope @ ends, v.reshape(-1) @ ours
        size = 2 * ours.nan_to_num(0, 0, 0).norm(dim=0) + right.abs()
        if _fits(s, slopes, step, own, right, size, ends) or _fits_elsewhere(
            s, slopes, direction, own, right, size, ends
        ):
            continue
        if not slopes.is_kink(direction):
            seen.along = f"{own[0]:.4g}, expected {right[0]:.4g}"
            return


def names_of(seen: Seen, places: Sequence[int], shape: torch.Size) -> str:
    """Up to three entries, as they are written."""
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
    """The entries at which nothing can be said, named."""
    for one, label, t in zip(seen, labels, at, strict=True):
        if one.kinks:
            yield label + names_of(one, one.kinks, t.shape)
