"""Pictures for the dashboard that show what a network has learned.

Pillow draws them. Its font has ASCII letters only, so the symbols are in the captions.
The pictures are as wide as TensorBoard's cards, which scale others without smoothing,
so that thin strokes get lost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

    from torchbp.inspection import Record

__all__ = [
    "CLASS_NAMES",
    "MOST_CLASSES",
    "confusion",
    "is_journey",
    "journey",
    "misclassified",
    "weights",
    "write",
]

# For data sets whose classes are not digits, short enough for column headings.
CLASS_NAMES = {
    "fashion": (
        "T-shirt trouser pullover dress coat sandal shirt sneaker bag boot".split()
    ),
    "kmnist": "o ki su tsu na ha ma ya re wo".split(),
}

WIDTH = 350
GAP = 4
MOST_TILES = 100
MOST_CLASSES = 100  # of a table of classes
MOST_NAMED = 30  # cells of a row that are wide enough for a name
# The quantile of |W| with the full colour: scaled by the largest weight, most would be
# pale.
FULL_COLOUR = 0.99
MOST_NEURONS = 600  # of a layer in the picture of one example
LEFT = 40  # x of a layer's strips in that picture
BLACK, RED, GREEN, GREY = (20, 20, 20), (190, 25, 45), (20, 120, 50), (120, 120, 120)
PAPER = 255
_RED, _BLUE = (178.0, 24.0, 43.0), (33.0, 102.0, 172.0)


def signed(values: Tensor, scale: float) -> Tensor:
    """Return colours from blue (-scale) through white (0) to red (scale), uint8 (*, 3).

    Args:
        values: numbers (*).
        scale: the absolute value of full colour.
    """
    t = (values.float() / (scale or 1.0)).clamp(-1, 1).unsqueeze(-1)
    ends = torch.where(t < 0, t.new_tensor(_BLUE), t.new_tensor(_RED))
    return (PAPER + (ends - PAPER) * t.abs()).round().to(torch.uint8)


def grey(values: Tensor) -> Tensor:
    """Return colours from black (0) to white (1), uint8 (*, 3).

    Args:
        values: numbers (*) from 0 to 1.
    """
    t = (values.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return t.unsqueeze(-1).expand(*t.shape, 3)


def weights(W: Tensor, names: Sequence[str] | None = None) -> Image:
    """Draw W^1 as a tile for each neuron, all on one scale.

    Args:
        W: (n_out, n_in), n_in a square number.
        names: of the neurons, written above their tiles: the classes, if the network
            has one layer.
    """
    side = math.isqrt(W.shape[1])
    shown = W[:MOST_TILES].detach().cpu()
    sizes = shown.float().abs().flatten()  # torch's quantile takes 16 million at most
    scale = sizes.kthvalue(math.ceil(FULL_COLOUR * len(sizes))).values.item()
    columns = _columns(len(shown))
    step = max((WIDTH - GAP) // columns, side + 1)
    zoom = step // side
    head = 0 if names is None else 18
    rows = math.ceil(len(shown) / columns)
    excerpt = "" if len(shown) == len(W) else f", first {len(shown)} of {len(W)}"
    width = max(WIDTH, columns * step + GAP)
    sheet, pen = _sheet(width, 22 + rows * (step + head) + GAP, 224)
    write(pen, GAP, 3, f"W1{excerpt}: red > 0, blue < 0, full at {scale:.2g}")
    for i, tile in enumerate(signed(shown.unflatten(1, (side, side)), scale)):
        x, y = GAP + i % columns * step, 22 + i // columns * (step + head)
        if names is not None:
            write(pen, x, y, names[i])
        sheet.paste(_image(tile, zoom), (x, y + head))
    return sheet


def misclassified(
    images: Tensor, labels: Tensor, guesses: Tensor, names: Sequence[str]
) -> Image:
    """Draw the first misclassified images, with their label (green) and answer (red).

    Args:
        images: uint8 (n, pixels), the pixels a square number.
        labels, guesses: (n).
        names: of the classes.
    """
    wrong = (labels != guesses).nonzero().flatten()
    columns, rows = 5, 5
    shown = wrong[: columns * rows]
    side = math.isqrt(images.shape[1])
    step = max(WIDTH // columns, side + GAP)
    zoom = step // (side + GAP // 2)
    short = max(map(len, names)) <= 3  # both on one line
    head = 20 if short else 36
    width = max(WIDTH, columns * step)
    sheet, pen = _sheet(width, 26 + rows * (side * zoom + head + GAP))
    share = f"{len(wrong):,} of {len(labels):,} wrong"
    write(pen, GAP, 3, f"{share}: truth (green), answer (red)")
    for i, index in enumerate(shown.tolist()):
        x = GAP + i % columns * step
        y = 26 + i // columns * (side * zoom + head + GAP)
        truth, guess = names[int(labels[index])], names[int(guesses[index])]
        write(pen, x, y, truth, GREEN, size=16)
        if short:
            write(pen, x + side * zoom // 2, y, guess, RED, size=16)
        else:
            write(pen, x, y + 16, guess, RED, size=16)
        tile = 255 - images[index].cpu().unflatten(0, (side, side))
        sheet.paste(_image(tile.unsqueeze(-1).expand(-1, -1, 3), zoom), (x, y + head))
    return sheet


def confusion(counts: Tensor, names: Sequence[str]) -> Image:
    """Draw the number of examples of each class (row) by answer (column).

    Args:
        counts: (K, K); entries off the diagonal are shaded by size.
        names: of the K classes.
    """
    K = len(counts)
    left = 64 if max(map(len, names)) > 3 else 26
    top, tall, cell = 44, 28, max(28, (WIDTH - left) // K)
    sheet, pen = _sheet(max(WIDTH, left + K * cell), top + K * tall + GAP)
    write(pen, GAP, 3, "rows: truth, columns: answer")
    wrong = counts.clone().fill_diagonal_(0)
    shares = wrong.float() / max(1, int(wrong.max()))
    # The root makes rare confusions visible.
    shades = signed(shares.sqrt() * 0.8, 1.0).tolist()
    for i in range(K):
        write(pen, GAP, top + i * tall + 6, names[i])
        x = left + i * cell + cell // 2
        write(pen, x, top - 18, names[i][: cell // 7], size=13, centred=True)
        for j in range(K):
            x, y = left + j * cell, top + i * tall
            fill = (228, 240, 230) if i == j else tuple(shades[i][j])
            pen.rectangle(
                (x, y, x + cell - 1, y + tall - 1), fill, outline=(225, 225, 225)
            )
            count = int(counts[i, j])
            if count:
                ink = GREEN if i == j else BLACK
                write(pen, x + cell // 2, y + 6, str(count), ink, 12, centred=True)
    return sheet


def is_journey(records: list[Record], K: int) -> bool:
    """Return whether :func:`journey` can draw the records.

    Args:
        records: of a pass; each must have one row, and the last one K outputs.
        K: the number of classes.
    """
    shapes = [record.a.shape[:-1] for record in records]
    return (
        all(shape == (1,) for shape in shapes)
        and all(record.delta is not None for record in records)
        and records[-1].a.shape[-1] == K
    )


def journey(records: list[Record], label: int, names: Sequence[str]) -> Image:
    """Draw the a^l and the δ^l of one example in all layers.

    Args:
        records: of a forward and a backward pass of one example, in order.
        label: the example's class.
        names: of the classes.
    """
    strips = [_strip(i, record) for i, record in enumerate(records, start=1)]
    x = records[0].x[0].cpu()
    side = math.isqrt(len(x))
    zoom = max(1, 84 // side)
    size = side * zoom
    heights = [24 + 2 * (strip[1].height + GAP) for strip in strips]
    sheet_width = max(WIDTH, 2 * size + 120)
    sheet, pen = _sheet(sheet_width, size + 34 + sum(heights) + 22)
    guess = int(records[-1].a[0].argmax())
    write(pen, GAP, 4, f"truth {names[label]}", GREEN, size=16)
    ink = GREEN if guess == label else RED
    write(pen, WIDTH // 3, 4, f"answer {names[guess]}", ink, size=16)
    sheet.paste(_image(grey(1 - x.unflatten(0, (side, side))), zoom), (GAP, 28))
    first = records[0]
    assert first.delta is not None
    back = (first.delta[0] @ first.weight).cpu()  # BP2
    scale = back.abs().max().item()
    place = sheet_width - size - GAP
    write(pen, GAP + size + 8, 52, "a0")
    write(pen, place - 8, 52, "dC/da0", right=True)
    write(pen, place - 8, 70, f"up to {scale:.0e}", right=True)
    tile = signed(back.unflatten(0, (side, side)), scale)
    sheet.paste(_image(tile, zoom), (place, 28))
    y = size + 34
    for (title, a, delta), height in zip(strips, heights, strict=True):
        write(pen, GAP, y + 3, title)
        for name, strip in (("a", a), ("delta", delta)):
            top = y + 22 + (0 if name == "a" else strip.height + GAP)
            write(pen, GAP, top, name, GREY)
            sheet.paste(strip, (LEFT, top))
        y += height
    cell = (WIDTH - LEFT - GAP) // len(names)
    for i, name in enumerate(names if len(names) <= MOST_NAMED else ()):
        ink = GREEN if i == label else RED if i == guess else BLACK
        centre = LEFT + i * cell + cell // 2
        write(pen, centre, y + 2, name[: max(1, cell // 7)], ink, centred=True)
    return sheet


def _strip(number: int, record: Record) -> tuple[str, Image, Image]:
    """Return a layer's line of text, and its a and δ as rows of cells."""
    assert record.delta is not None
    a, delta = record.a[0].cpu(), record.delta[0].cpu()
    shown, n = min(len(a), MOST_NEURONS), len(a)
    columns = shown if shown <= MOST_NAMED else min(60, math.ceil(shown / 2))
    largest_a, largest_delta = a.abs().max().item(), delta.abs().max().item()
    is_share = bool(a.min() >= 0) and largest_a <= 1
    colours = grey(1 - a) if is_share else signed(a, largest_a)
    span = "0 to 1" if is_share else f"up to {largest_a:.1f}"
    excerpt = "" if n == shown else f" ({shown} of {n})"
    title = f"layer {number}{excerpt}: a {span}, delta up to {largest_delta:.0e}"
    width = WIDTH - LEFT - GAP
    return (
        title,
        _cells(colours[:shown], columns, width),
        _cells(signed(delta[:shown], largest_delta), columns, width),
    )


def _cells(colours: Tensor, columns: int, width: int) -> Image:
    """Return the colours, uint8 (n, 3), as rows of `columns` cells with borders."""
    cell = max(3, width // columns)
    rows = math.ceil(len(colours) / columns)
    tall = cell if rows > 1 else 16  # the height of the row's name
    grid = colours.new_full((rows * columns, tall, cell, 3), 200)
    grid[len(colours) :] = PAPER
    grid[: len(colours), : tall - 1, : cell - 1] = colours[:, None, None]
    grid = grid.unflatten(0, (rows, columns)).transpose(1, 2)
    return _image(grid.reshape(rows * tall, columns * cell, 3))


def _columns(n: int) -> int:
    """Return the number of columns of a grid of n tiles that is a little wider than
    high and, if possible, full."""
    least = math.ceil(math.sqrt(n))
    return next((c for c in range(least, least + 3) if n % c == 0), least)


def _image(colours: Tensor, zoom: int = 1) -> Image:
    """Return an image of colours, uint8 (height, width, 3), each `zoom` pixels wide."""
    from PIL import Image

    height, width = colours.shape[:2]
    image = Image.fromarray(colours.contiguous().numpy())
    return image.resize((width * zoom, height * zoom), Image.Resampling.NEAREST)


def _sheet(width: int, height: int, shade: int = PAPER) -> tuple[Image, Any]:
    """Return an empty sheet and a pen for it."""
    from PIL import Image, ImageDraw

    sheet = Image.new("RGB", (width, height), (shade, shade, shade))
    return sheet, ImageDraw.Draw(sheet)


@cache
def _font(size: int) -> Any:
    """Return Pillow's own font."""
    from PIL import ImageFont

    try:
        return ImageFont.load_default(size)
    except (TypeError, OSError, ImportError):
        # Before Pillow 10.1, or without FreeType: one size.
        return ImageFont.load_default()


def write(
    pen: Any,
    x: int,
    y: int,
    text: str,
    ink: tuple[int, int, int] = BLACK,
    size: int = 13,
    centred: bool = False,
    right: bool = False,
    zoom: int = 1,
) -> None:
    """Write `text` with `pen`; it starts at `x`, or is centred at it, or ends at it.

    Args:
        pen: an ``ImageDraw``.
        x, y: the position in pixels; y is the top.
        text: of ASCII.
        ink: the colour.
        size: of the letters.
        centred: whether `x` is the middle.
        right: whether `x` is the end.
        zoom: what `size` is multiplied by.
    """
    font = _font(size * zoom)
    width = pen.textlength(text, font=font)
    x -= int(width / 2) if centred else int(width) if right else 0
    pen.text((x, y), text, fill=ink, font=font)
