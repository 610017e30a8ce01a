"""Pictures of a digit, prepared as MNIST's images are.

A digit of any size, anywhere in a picture, dark on light or light on dark, is scaled to
20 pixels in height or width; its centre of mass is the middle of 28 x 28 pixels.
"""

from __future__ import annotations

import os

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from torchbp._terminal import one_line

SIDE, BOX = 28, 20
LARGEST = 1024  # pixels a side; larger pictures are reduced first
FAINTEST = 0.06  # of the range from black to white; a fainter picture is empty
FLOOR = 0.05  # of the darkest ink; fainter pixels are background
# Parts with a gap between them are two digits if each has this share of the largest
# one's ink and of the height. This splits 3 of 30,000 of MNIST's images by mistake.
DIGIT_INK, DIGIT_HEIGHT = 0.25, 0.5


class PictureError(ValueError):
    """A picture without a single digit in it; the message is one line."""


def read(path: str | os.PathLike[str]) -> Tensor:
    """Return the grey levels of a picture file, 0 to 1, (height, width).

    Colours become grey levels; transparent parts take the background that contrasts
    with the opaque ones. Of an animation the first frame is read.

    Args:
        path: of the file.

    Raises:
        PictureError: no such file, or one that Pillow cannot read.
    """
    try:
        with Image.open(path) as image:
            image.load()
            return levels(ImageOps.exif_transpose(image))
    except PictureError:
        raise
    except FileNotFoundError:
        raise PictureError("no such file") from None
    except UnidentifiedImageError:
        raise PictureError("expected a picture, got a file of another kind") from None
    except Image.DecompressionBombError as error:
        raise PictureError(f"expected a smaller picture: {error}") from None
    except (OSError, SyntaxError, ValueError) as error:  # raised by Pillow's parsers
        reason = getattr(error, "strerror", None) or one_line(error)
        raise PictureError(f"expected a whole picture, got {reason}") from None


def levels(image: Image.Image) -> Tensor:
    """Return the grey levels of `image`, 0 to 1, (height, width)."""
    if image.mode.startswith("I") or image.mode == "F":
        grey = _pixels(image)
        if not grey.isfinite().all():
            raise PictureError("expected finite grey levels, got others")
        grey = grey - grey.min().clamp(max=0)
        top = grey.max().item()
        # Pillow does not tell 1, 8 or 16 bits: take the fewest that hold the values.
        return grey / next((white for white in (1, 255, 65535) if top <= white), top)
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        rgba = image.convert("RGBA")
        grey, alpha = (
            _pixels(part) / 255 for part in (rgba.convert("RGB"), rgba.getchannel("A"))
        )
        return grey * alpha + _background(grey, alpha) * (1 - alpha)
    return _pixels(image.convert("RGB")) / 255


def _pixels(image: Image.Image) -> Tensor:
    """Return the pixels of an image as float32 grey levels."""
    grey = image.convert("F")
    raw = torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.float32)
    return raw.view(grey.height, grey.width)


def _background(grey: Tensor, alpha: Tensor) -> float:
    """Return the grey behind transparent parts: the median of the opaque ones if those
    are a picture by themselves, else the opposite of the ink."""
    opaque = grey[alpha > 0.5]
    if not len(opaque):
        return 1.0
    if (opaque.max() - opaque.min()).item() > 0.5:
        return opaque.median().item()
    return 0.0 if opaque.mean().item() > 0.5 else 1.0


def prepare(grey: Tensor) -> Tensor:
    """Return a picture prepared as MNIST's images are: uint8 (784), light on dark.

    Args:
        grey: grey levels, 0 to 1, (height, width).

    Raises:
        PictureError: the picture is empty or has more than one digit.
    """
    ink = _crop(_ink(_reduce(grey)))
    _check_single(ink)
    return _center(_fit_box(ink))


def _reduce(grey: Tensor) -> Tensor:
    """Average a large picture over squares of pixels."""
    factor = -(-max(grey.shape) // LARGEST)
    if factor == 1 or min(grey.shape) < factor:
        return grey
    return avg_pool2d(grey[None, None], factor, ceil_mode=True)[0, 0]


def _ink(grey: Tensor) -> Tensor:
    """Return the contrast of each pixel to the background, 0 to 1.

    The background is the border's median grey; differences as small as those within
    the border count as background, too.
    """
    border = torch.cat([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    background = border.median()
    difference = grey - background
    darker, lighter = -difference.min().item(), difference.max().item()
    strength = max(darker, lighter)
    if strength < FAINTEST:
        raise PictureError("expected a digit, got an empty picture")
    ink = (difference if lighter >= darker else -difference) / strength
    noise = ((border - background).abs().median() / strength).item()
    floor = min(max(10 * noise, FLOOR), 0.5)
    return ((ink - floor) / (1 - floor)).clamp(0, 1)


def _crop(ink: Tensor) -> Tensor:
    """Return the part of the picture that has ink."""
    rows, columns = (ink.any(d).nonzero()[:, 0].tolist() for d in (1, 0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _check_single(ink: Tensor) -> None:
    """Raise PictureError if several digits stand side by side."""
    gaps = ink.any(0).logical_not()
    inside = (~gaps).nonzero()[:, 0]
    # Neighbouring columns with ink belong to one part.
    cuts = (inside.diff() > 1).nonzero()[:, 0] + 1
    parts = [ink[:, columns] for columns in inside.tensor_split(cuts)]
    most = max(part.sum() for part in parts)
    digits = [
        part
        for part in parts
        if part.sum() >= DIGIT_INK * most
        and len(_crop(part)) >= DIGIT_HEIGHT * len(ink)
    ]
    if len(digits) > 1:
        raise PictureError(
            f"expected one digit, got {len(digits)} things side by side; cut them apart"
        )


def _fit_box(ink: Tensor) -> Tensor:
    """Scale to 20 pixels in height or width, in proportion and with smooth edges."""
    scale = BOX / max(ink.shape)
    size = [max(1, round(n * scale)) for n in ink.shape]
    box = interpolate(ink[None, None], size, mode="bicubic", antialias=True)[0, 0]
    box = box.clamp(min=0)
    # At this size thin strokes are faint except where they cross.
    return (box / box.flatten().quantile(0.98).clamp(min=box.max() / 4)).clamp(max=1)


def _center(box: Tensor) -> Tensor:
    """Place in 28 x 28 with the centre of mass at pixel 14, as in MNIST."""
    corner = []
    for d, n in enumerate(box.shape):
        indices = torch.arange(n, device="cpu").to(box.dtype)
        centre = (box.sum(1 - d) @ indices / box.sum()).item()
        corner.append(min(max(round(SIDE / 2 - centre), 0), SIDE - n))
    canvas = torch.zeros(SIDE, SIDE, dtype=torch.float32, device="cpu")
    top, left = corner
    canvas[top : top + box.shape[0], left : left + box.shape[1]] = box
    return (255 * canvas).round().byte().flatten()
