"""Read a trained run, and say which digits pictures show.

    python experiments/predict.py runs/NAME seven.png         a digit, and how sure
    python experiments/predict.py runs/NAME *.png --show      what the network sees, too
    python experiments/predict.py runs/NAME *.png --json      a line of JSON for each

RUN is a folder that experiments/mnist.py has left. A picture shows one digit, of any
size and anywhere in it, dark on light or light on dark, in any format that Pillow
reads. It is made ready as MNIST's are: 20 pixels high or wide, the centre of mass in
the middle of 28 x 28. A picture that cannot be read is reported; the others go on.

Exit status: 0 all pictures are answered, 2 a picture is not, or there is no such run;
130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate

if __name__ == "__main__":  # the repository, where this file's own folder was
    sys.path[0] = str(Path(__file__).parents[1])

from experiments.support.settings import COSTS, Settings, build, read_settings
from torchbp import data
from torchbp._terminal import Parser, in_colour, paint, reader_left
from torchbp.training import RunFolder, checkpoint

SIDE, BOX = 28, 20
LARGEST = 1024  # pixels a side, to which larger pictures are reduced first
FAINTEST = 0.06  # of the range from black to white: below it, nothing is there
FLOOR = 0.05  # of the darkest ink: below it, paper
# Parts side by side, with nothing in between, are two digits if each has this share of
# the largest one's ink and of the height: so are 3 of 30,000 of MNIST's, by mistake.
DIGIT_INK, DIGIT_HEIGHT = 0.25, 0.5


class PictureError(ValueError):
    """A picture in which there is no digit to be read; the message is one line."""


@dataclass(frozen=True)
class Answer:
    """What a network says of one picture.

    Attributes:
        digit: the class with the largest of `values`.
        values: one for each digit, 0 to 1.
        kind: "probability", which sum to 1, or "activation", the outputs of a sigmoid
            layer, each of which answers for its own digit.
        image: what the network saw, uint8 (784).
    """

    digit: int
    values: list[float]
    kind: str
    image: Tensor = field(repr=False)


def load_run(run: str | os.PathLike[str]) -> tuple[nn.Module, Settings]:
    """The trained network of a run folder, or of a checkpoint in one, and its settings.

    Raises:
        torchbp.training.CheckpointError: no such run, or none that learned digits.
    """
    path, folder = Path(run), RunFolder(run)
    if not os.path.isdir(folder.path):
        raise checkpoint.CheckpointError(f"{path}: no such run")
    state, failure = folder.load()
    if failure is not None:
        print(f"NOTE: {failure}; the checkpoint before it answers", file=sys.stderr)
    try:
        settings = read_settings(state)
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            model = build(settings)
        model.load_state_dict(state["trainer"]["model"])
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise checkpoint.CheckpointError(
            f"{path}: expected a run of experiments/mnist.py, got {reason}"
        ) from error
    if settings.dataset not in ("mnist", "digits"):
        raise checkpoint.CheckpointError(
            f"{path}: expected a run that learned digits, got {settings.dataset}"
        )
    return model.eval(), settings


def read(path: str | os.PathLike[str]) -> Tensor:
    """The grey levels of a picture file, 0 to 1, (height, width).

    Colours become grey levels, and transparent parts the paper that sets off what is
    opaque. Of several frames the first counts.

    Raises:
        PictureError: no such file, or none that Pillow can read.
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
    except (OSError, SyntaxError, ValueError) as error:  # what its parsers raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise PictureError(f"expected a whole picture, got {reason}") from None


def levels(image: Image.Image) -> Tensor:
    """The grey levels of `image`, 0 to 1, (height, width)."""
    if image.mode.startswith("I") or image.mode == "F":
        grey = _pixels(image)
        if not grey.isfinite().all():
            raise PictureError("expected finite grey levels, got others")
        grey = grey - grey.min().clamp(max=0)
        top = grey.max().item()
        # Of 1, 8 or 16 bits, the fewest that hold it: Pillow does not tell which.
        return grey / next((white for white in (1, 255, 65535) if top <= white), top)
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        rgba = image.convert("RGBA")
        grey, alpha = (
            _pixels(part) / 255 for part in (rgba.convert("RGB"), rgba.getchannel("A"))
        )
        return grey * alpha + _paper(grey, alpha) * (1 - alpha)
    return _pixels(image.convert("RGB")) / 255


def _pixels(image: Image.Image) -> Tensor:
    """The pixels of an image as float32 grey levels."""
    grey = image.convert("F")
    raw = torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.float32)
    return raw.view(grey.height, grey.width)


def _paper(grey: Tensor, alpha: Tensor) -> float:
    """What lies behind the transparent parts: what most of the opaque ones are, if
    those show a picture of their own, else the opposite of the ink."""
    opaque = grey[alpha > 0.5]
    if not len(opaque):
        return 1.0
    if (opaque.max() - opaque.min()).item() > 0.5:
        return opaque.median().item()
    return 0.0 if opaque.mean().item() > 0.5 else 1.0


def prepare(grey: Tensor) -> Tensor:
    """A picture made ready as MNIST's are: uint8 (784), light on dark.

    Args:
        grey: grey levels, 0 to 1, (height, width).

    Raises:
        PictureError: there is nothing in it, or more than one digit.
    """
    ink = _cropped(_ink(_reduced(grey)))
    _check_single(ink)
    return _centred(_boxed(ink))


def _reduced(grey: Tensor) -> Tensor:
    """A large picture, averaged over squares of pixels."""
    factor = -(-max(grey.shape) // LARGEST)
    if factor == 1 or min(grey.shape) < factor:
        return grey
    return avg_pool2d(grey[None, None], factor, ceil_mode=True)[0, 0]


def _ink(grey: Tensor) -> Tensor:
    """How much of what differs from the paper each pixel has, 0 to 1.

    The paper is what most of the rim is. What differs from it no more than the rim does
    by itself is paper, too.
    """
    edges = [grey[0], grey[-1], grey[:, 0], grey[:, -1]]
    rim = torch.cat(edges)
    paper = rim.median()
    difference = grey - paper
    darker, lighter = -difference.min().item(), difference.max().item()
    strength = max(darker, lighter)
    if strength < FAINTEST:
        raise PictureError("expected a digit, got an empty picture")
    ink = (difference if lighter >= darker else -difference) / strength
    noise = ((rim - paper).abs().median() / strength).item()
    floor = min(max(10 * noise, FLOOR), 0.5)
    return ((ink - floor) / (1 - floor)).clamp(0, 1)


def _cropped(ink: Tensor) -> Tensor:
    """The part of the picture that has ink."""
    rows, columns = (ink.any(d).nonzero()[:, 0].tolist() for d in (1, 0))
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _check_single(ink: Tensor) -> None:
    """Refuse several digits side by side."""
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
        and len(_cropped(part)) >= DIGIT_HEIGHT * len(ink)
    ]
    if len(digits) > 1:
        raise PictureError(
            f"expected one digit, got {len(digits)} things side by side; cut them apart"
        )


def _boxed(ink: Tensor) -> Tensor:
    """Scaled to 20 pixels in height or width, the shape kept, edges smoothed."""
    scale = BOX / max(ink.shape)
    size = [max(1, round(n * scale)) for n in ink.shape]
    box = interpolate(ink[None, None], size, mode="bicubic", antialias=True)[0, 0]
    box = box.clamp(min=0)
    # Thin strokes are faint at this size, but where they cross.
    return (box / box.flatten().quantile(0.98).clamp(min=box.max() / 4)).clamp(max=1)


def _centred(box: Tensor) -> Tensor:
    """In 28 x 28, the centre of mass in the middle: pixel 14, as MNIST's own is."""
    corner = []
    for d, n in enumerate(box.shape):
        places = torch.arange(n, device="cpu").to(box.dtype)
        centre = (box.sum(1 - d) @ places / box.sum()).item()
        corner.append(min(max(round(SIDE / 2 - centre), 0), SIDE - n))
    canvas = torch.zeros(SIDE, SIDE, dtype=torch.float32, device="cpu")
    top, left = corner
    canvas[top : top + box.shape[0], left : left + box.shape[1]] = box
    return (255 * canvas).round().byte().flatten()


@torch.inference_mode()
def classify(model: nn.Module, settings: Settings, image: Tensor) -> Answer:
    """What `model` says of a picture made ready, uint8 (784)."""
    output = model(data.scale(image))
    takes_z = COSTS[settings.cost][0].takes == "z"
    # Of ten outputs σ(z) of which exactly one is 1, the j-th is with softmax(z)_j: it
    # serves the cross-entropy cost as it does the log-likelihood.
    values = output.double().softmax(-1) if takes_z else output.double()
    kind = "probability" if takes_z else "activation"
    return Answer(int(output.argmax()), values.tolist(), kind, image)


def predict(model: nn.Module, settings: Settings, path: str) -> Answer:
    """What `model` says of the picture in a file.

    Raises:
        PictureError: no picture, or none of one digit.
    """
    return classify(model, settings, prepare(read(path)))


MEANINGS = {
    "probability": "the probability of each digit; in all 100 %",
    "activation": "the outputs a, each for its own digit; they need not sum to 1",
}
BLOCKS = " ▏▎▍▌▋▊▉█"
LENGTH = 24  # of a whole bar


def chart(answer: Answer, colour: bool) -> list[str]:
    """A line for each digit: its bar and its number."""
    lines = []
    for digit, value in enumerate(answer.values):
        eighths = round(8 * LENGTH * min(max(value, 0), 1))
        bar = BLOCKS[8] * (eighths // 8) + BLOCKS[eighths % 8].strip()
        bar = f"{bar:<{LENGTH}}"
        number = f"{value:7.1%}" if answer.kind == "probability" else f"{value:7.3f}"
        line = f"{digit} {bar} {number}"
        lines.append(paint(line, "green", colour and digit == answer.digit))
    return lines


def seen(image: Tensor, colour: bool) -> list[str]:
    """What the network sees, in 14 lines of 28 characters, each two pixels high."""
    pixels = image.view(SIDE // 2, 2, SIDE)
    if not colour:
        shades = (pixels.float().mean(1) / 256 * 5).long().tolist()
        return ["".join(" ░▒▓█"[shade] for shade in row) for row in shades]
    # The 24 greys of the 256-colour palette: above in the foreground, below behind it.
    greys = (232 + pixels.long() * 23 // 255).tolist()
    return [
        "".join(f"\x1b[38;5;{a};48;5;{b}m▀" for a, b in zip(above, below, strict=True))
        + "\x1b[0m"
        for above, below in greys
    ]


def report(path: str, answer: Answer, show: bool, colour: bool) -> str:
    """One picture's answer, to be read by people."""
    value = answer.values[answer.digit]
    number = f"{value:.1%}" if answer.kind == "probability" else f"{value:.3f}"
    head = f"{path}: {answer.digit} ({answer.kind} {number})"
    lines = ["", *chart(answer, colour), *[""] * 3] if show else chart(answer, colour)
    if show:
        picture = seen(answer.image, colour)
        lines = [f"{a}   {b}" for a, b in zip(picture, lines, strict=True)]
    indented = (f"  {line}".rstrip() for line in lines)
    return "\n".join([paint(head, "bold", colour), *indented])


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__)
    parser.add_argument("run", metavar="RUN", help="a run's folder, or a checkpoint")
    parser.add_argument(
        "pictures", metavar="PICTURE", nargs="+", help="a picture's file"
    )
    parser.add_argument("--json", action="store_true", help="a line of JSON for each")
    parser.add_argument(
        "--show", action="store_true", help="what the network sees, beside the bars"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer the pictures of a command line; returns the exit status."""
    given = parse(arguments)
    try:
        model, settings = load_run(given.run)
        return answer_all(model, settings, given)
    except checkpoint.CheckpointError as error:
        complain(str(error))
        return 2
    except BrokenPipeError:
        return reader_left()
    except KeyboardInterrupt:
        complain("interrupted")
        return 130


def answer_all(model: nn.Module, settings: Settings, given: argparse.Namespace) -> int:
    """Answer each picture in turn; 2 if one could not be."""
    status, kind = 0, ""
    colour = in_colour(sys.stdout)
    for path in given.pictures:
        try:
            answer = predict(model, settings, path)
        except PictureError as error:
            status = 2
            complain(f"{path}: {error}")
            if given.json:
                print(json.dumps({"picture": path, "error": str(error)}), flush=True)
            continue
        kind = answer.kind
        if given.json:
            print(json.dumps(as_json(path, answer)), flush=True)
        else:
            print(report(path, answer, given.show, colour), flush=True)
    if kind and not given.json:
        print(paint(f"({MEANINGS[kind]})", "dim", colour))
    return status


def as_json(path: str, answer: Answer) -> dict[str, Any]:
    """One picture's answer, to be read by programs."""
    kept = ("digit", "kind", "values")
    return {"picture": path, **{name: getattr(answer, name) for name in kept}}


def complain(message: str) -> None:
    print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
