"""A chart of how fast each layer learns, drawn here since TensorBoard gives all curves
of a run one colour, and needs a click for logarithmic axes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torchbp.training.dashboard.pictures import BLACK, GREY, PAPER, WIDTH, write

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["draw_learning"]

HEIGHT = 250
LEFT, TOP, BOTTOM = 44, 44, 40  # margins; the right one depends on the names in it
MOST_CURVES = 8
MOST_DECADES = 12  # gradients below 1e-12 of the largest are drawn at the lower edge
SMOOTH = 4  # lines are drawn this much larger and reduced: Pillow's have hard edges
GRID = (222, 222, 222)
# Dark enough for letters on white, and far apart for colour-blind readers, too.
COLOURS = (
    (0, 90, 170),
    (200, 80, 0),
    (0, 125, 85),
    (175, 50, 125),
    (120, 80, 30),
    (0, 140, 150),
    (160, 115, 0),
    (100, 60, 160),
)


def draw_learning(
    curves: Mapping[int, Mapping[int, float]], unit: str, zoom: int = 1
) -> Image:
    """Draw ‖∂C/∂b‖ of each layer over the steps, on a logarithmic axis.

    Args:
        curves: {layer: {step: value}}. Of more than 8 layers 8 are drawn, including the
            first and the last; a value that is 0 or not finite has no point.
        unit: the unit of the steps.
        zoom: 1 for TensorBoard's cards, more for a screen.
    """
    from PIL import Image, ImageDraw

    drawn = {layer: _positive(curves[layer]) for layer in _some(sorted(curves))}
    drawn = {layer: curve for layer, curve in drawn.items() if curve}
    axis = _Axes(drawn)
    scale = SMOOTH * zoom
    large = Image.new("RGB", (WIDTH * scale, HEIGHT * scale), (PAPER, PAPER, PAPER))
    pen = ImageDraw.Draw(large)

    def line(points: Sequence[tuple[float, float]], ink: Any, width: float) -> None:
        """Draw a line on the enlarged sheet."""
        scaled = [(x * scale, y * scale) for x, y in points]
        pen.line(scaled, ink, round(width * scale), joint="curve")

    for _, y in axis.decades():
        line([(LEFT, y), (axis.right, y)], GRID, 1)
    for (layer, curve), ink in zip(drawn.items(), COLOURS, strict=False):
        points = [axis.place(step, value) for step, value in sorted(curve.items())]
        line(points, ink, 1.8)
        if len(points) <= 40:
            for x, y in points:
                _dot(pen, x * scale, y * scale, 2.2 * scale, ink)
        line([points[-1], (axis.right + 8, axis.labels[layer])], ink, 0.6)
    sheet = large.reduce(SMOOTH)
    pen = ImageDraw.Draw(sheet)

    def text(x: float, y: float, words: str, ink: Any = BLACK, **style: Any) -> None:
        """Write a text on the reduced sheet."""
        write(pen, round(x * zoom), round(y * zoom), words, ink, zoom=zoom, **style)

    text(4, 3, "How fast each layer learns", size=15)
    text(4, 22, "size of dC/db, logarithmic", GREY, size=12)
    for power, y in axis.decades():
        text(LEFT - 5, y - 8, _decade(power), GREY, size=12, right=True)
    for step in axis.steps():
        x, _ = axis.place(step, 1.0)
        text(x, HEIGHT - BOTTOM + 4, f"{step:,}", GREY, size=12, centred=True)
    middle = (LEFT + axis.right) / 2
    text(middle, HEIGHT - 19, unit, GREY, size=12, centred=True)
    for layer, ink in zip(drawn, COLOURS, strict=False):
        y = axis.labels[layer] - 8
        text(axis.right + 11, y, f"layer {layer}", ink, size=13)
    return sheet


class _Axes:
    """The positions of the curves' points, the grid lines and the layers' names."""

    def __init__(self, curves: Mapping[int, Mapping[int, float]]) -> None:
        self.right = WIDTH - 13 - 7 * len(f"layer {max(curves, default=1)}")
        values = [value for curve in curves.values() for value in curve.values()]
        self.top = math.ceil(math.log10(max(values, default=1.0)))
        low = math.floor(math.log10(min(values, default=1.0)))
        self.low = max(min(low, self.top - 1), self.top - MOST_DECADES)
        self.last = max((max(curve) for curve in curves.values()), default=0) or 1
        heights = {
            layer: self.place(0, curve[max(curve)])[1]
            for layer, curve in curves.items()
        }
        self.labels = _apart(heights, 15, TOP + 4, HEIGHT - BOTTOM)

    def place(self, step: int, value: float) -> tuple[float, float]:
        """Return the position of a point in the picture."""
        share = (math.log10(value) - self.low) / (self.top - self.low)
        height = HEIGHT - TOP - BOTTOM
        x = LEFT + (self.right - LEFT) * step / self.last
        return x, TOP + height * (1 - max(share, 0.0))

    def decades(self) -> list[tuple[int, float]]:
        """Return the powers of ten that have a grid line, and its height."""
        every = math.ceil((self.top - self.low) / 6)
        powers = range(self.top, self.low - 1, -every)
        height = HEIGHT - TOP - BOTTOM
        span = self.top - self.low
        return [(p, TOP + height * (self.top - p) / span) for p in powers]

    def steps(self) -> list[int]:
        """Return the round numbers below the picture, four at most besides 0."""
        rough = self.last / 4
        power = 10 ** math.floor(math.log10(rough)) if rough >= 1 else 1
        every = next(k * power for k in (1, 2, 5, 10) if k * power >= rough)
        return list(range(0, self.last + 1, every))


def _positive(curve: Mapping[int, float]) -> dict[int, float]:
    """Return the points that a logarithmic axis can show."""
    return {
        step: value
        for step, value in curve.items()
        if value > 0 and math.isfinite(value)
    }


def _some(layers: Sequence[int]) -> list[int]:
    """Return at most eight of the layers, evenly from the first to the last."""
    if len(layers) <= MOST_CURVES:
        return list(layers)
    last = len(layers) - 1
    return [layers[round(i * last / (MOST_CURVES - 1))] for i in range(MOST_CURVES)]


def _apart(
    heights: Mapping[int, float], distance: float, top: float, bottom: float
) -> dict[int, float]:
    """Return the heights, moved as little as possible so that each is at least
    `distance` below the one above it."""
    order = sorted(heights, key=lambda layer: heights[layer])
    placed = [heights[layer] for layer in order]
    pairs = list(itertools.pairwise(range(len(placed))))
    for _ in range(100):
        for i, j in pairs:
            push = max(0.0, distance - placed[j] + placed[i]) / 2
            placed[i], placed[j] = placed[i] - push, placed[j] + push
    for i in range(len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + distance if i else top)
    for i in reversed(range(len(placed))):
        below = placed[i + 1] - distance if i + 1 < len(placed) else bottom
        placed[i] = min(placed[i], below)
    return dict(zip(order, placed, strict=True))


def _decade(power: int) -> str:
    """Return a power of ten as text."""
    return f"{10.0**power:g}" if -4 < power < 4 else f"1e{power}"


def _dot(pen: Any, x: float, y: float, radius: float, ink: Any) -> None:
    """Draw a disc around (x, y)."""
    pen.ellipse((x - radius, y - radius, x + radius, y + radius), ink)
