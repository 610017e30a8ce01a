"""Digits drawn as a hand would, as strokes between points of a unit square."""

from __future__ import annotations

import math

from PIL import Image, ImageDraw


def arc(x, y, rx, ry, start, end):
    """Points of an ellipse around (x, y), from one angle to another, 0 to the right and
    90 down."""
    steps = max(2, abs(end - start) // 10)
    angles = [math.radians(start + (end - start) * i / steps) for i in range(steps + 1)]
    return [(x + rx * math.cos(t), y + ry * math.sin(t)) for t in angles]


# y runs down; every digit is about as wide and as slanted as people write it.
STROKES = {
    0: [arc(0.5, 0.5, 0.3, 0.48, -60, 300)],
    1: [[(0.58, 0.02), (0.44, 0.98)]],
    2: [[*arc(0.5, 0.28, 0.28, 0.26, -170, 30), (0.2, 0.95), (0.85, 0.93)]],
    3: [
        [*arc(0.48, 0.26, 0.25, 0.24, -150, 80), (0.45, 0.48)],
        [(0.45, 0.48), *arc(0.48, 0.73, 0.29, 0.25, -80, 150)],
    ],
    4: [[(0.3, 0.05), (0.2, 0.55), (0.8, 0.52)], [(0.72, 0.1), (0.66, 0.98)]],
    5: [
        [
            (0.75, 0.04),
            (0.33, 0.05),
            (0.28, 0.42),
            *arc(0.45, 0.69, 0.27, 0.27, -80, 150),
        ]
    ],
    6: [[(0.66, 0.02), (0.4, 0.3), *arc(0.5, 0.72, 0.25, 0.25, 200, -160)]],
    7: [[(0.18, 0.08), (0.8, 0.06), (0.45, 0.98)]],
    8: [arc(0.5, 0.26, 0.2, 0.23, 90, 450), arc(0.5, 0.74, 0.25, 0.25, -90, 270)],
    9: [[*arc(0.46, 0.28, 0.25, 0.25, 0, -350), (0.7, 0.3), (0.6, 0.98)]],
}


def draw(
    digit, size=(200, 200), box=(50, 30, 140), width=14, ink=0, paper=255, mode="L"
):
    """A picture of `digit`: its square's left, top and side are `box`."""
    image = Image.new(mode, size, paper)
    pen = ImageDraw.Draw(image)
    left, top, side = box
    for stroke in STROKES[digit]:
        points = [(left + side * x, top + side * y) for x, y in stroke]
        pen.line(points, fill=ink, width=width, joint="curve")
        for x, y in points:  # round ends
            r = width / 2
            pen.ellipse((x - r, y - r, x + r, y + r), fill=ink)
    return image
