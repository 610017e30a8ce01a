"""Classify pictures of a digit with a trained run.

    python experiments/predict.py runs/NAME seven.png         a digit, and how sure
    python experiments/predict.py runs/NAME *.png --show      also the network's input
    python experiments/predict.py runs/NAME *.png --json      a line of JSON for each

RUN is a run folder of experiments/mnist.py. A picture shows one digit, of any size and
anywhere in it, dark on light or light on dark, in any format that Pillow reads. It is
prepared as MNIST's images are: 20 pixels high or wide, the centre of mass in the middle
of 28 x 28. A picture that cannot be read is reported; the others are still classified.

Exit status: 0 all pictures are classified; 2 a picture is not, or there is no such run;
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
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # to find experiments and torchbp

from experiments.support.pictures import SIDE, PictureError, prepare, read
from experiments.support.settings import COSTS, TrainingSettings, build, read_settings
from torchbp import data
from torchbp._terminal import (
    Parser,
    in_colour,
    one_line,
    paint,
    print_error,
    print_note,
    run_program,
)
from torchbp.training import CheckpointError, RunFolder


@dataclass(frozen=True)
class Answer:
    """A network's classification of one picture.

    Attributes:
        digit: the class with the largest of `values`.
        values: one for each digit, 0 to 1.
        kind: "probability", which sum to 1, or "activation", the outputs of a sigmoid
            layer, each for its own digit.
        image: the network's input, uint8 (784).
    """

    digit: int
    values: list[float]
    kind: str
    image: Tensor = field(repr=False)


def load_run(run: str | os.PathLike[str]) -> tuple[nn.Module, TrainingSettings]:
    """Return the trained network of a run and the run's settings.

    Args:
        run: the run's folder, or a checkpoint in it.

    Raises:
        torchbp.training.CheckpointError: no such run, or one that did not learn digits.
    """
    path, folder = Path(run), RunFolder(run)
    if not os.path.isdir(folder.path):
        raise CheckpointError(f"{path}: no such run")
    state, failure = folder.load()
    if failure is not None:
        print_note(f"{failure}; using the checkpoint before it")
    try:
        settings = read_settings(state)
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            model = build(settings)
        model.load_state_dict(state["trainer"]["model"])
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: expected a run of experiments/mnist.py, got {one_line(error)}"
        ) from error
    if settings.dataset not in ("mnist", "digits"):
        raise CheckpointError(
            f"{path}: expected a run that learned digits, got {settings.dataset}"
        )
    return model.eval(), settings


@torch.inference_mode()
def classify(model: nn.Module, settings: TrainingSettings, image: Tensor) -> Answer:
    """Classify a prepared picture.

    Args:
        model: a network as :func:`load_run` returns it.
        settings: of its run.
        image: uint8 (784).
    """
    output = model(data.scale(image))
    takes_z = COSTS[settings.cost][0].takes == "z"
    # If exactly one of ten outputs σ(z) is 1, it is the j-th with probability
    # softmax(z)_j: so softmax serves the cross-entropy cost, too.
    values = output.double().softmax(-1) if takes_z else output.double()
    kind = "probability" if takes_z else "activation"
    return Answer(int(output.argmax()), values.tolist(), kind, image)


def predict(model: nn.Module, settings: TrainingSettings, path: str) -> Answer:
    """Classify the picture in a file.

    Args:
        model: a network as :func:`load_run` returns it.
        settings: of its run.
        path: of the file.

    Raises:
        PictureError: not a picture, or not of one digit.
    """
    return classify(model, settings, prepare(read(path)))


MEANINGS = {
    "probability": "the probability of each digit; in all 100 %",
    "activation": "the outputs a, each for its own digit; they need not sum to 1",
}
BLOCKS = " ▏▎▍▌▋▊▉█"
LENGTH = 24  # of a whole bar


def chart(answer: Answer, colour: bool) -> list[str]:
    """Return a line for each digit: its bar and its number."""
    lines = []
    for digit, value in enumerate(answer.values):
        eighths = round(8 * LENGTH * min(max(value, 0), 1))
        bar = BLOCKS[8] * (eighths // 8) + BLOCKS[eighths % 8].strip()
        bar = f"{bar:<{LENGTH}}"
        number = f"{value:7.1%}" if answer.kind == "probability" else f"{value:7.3f}"
        line = f"{digit} {bar} {number}"
        lines.append(paint(line, "green", colour and digit == answer.digit))
    return lines


def draw_input(image: Tensor, colour: bool) -> list[str]:
    """Return the network's input as 14 lines of 28 characters, two pixels each."""
    pixels = image.view(SIDE // 2, 2, SIDE)
    if not colour:
        shades = (pixels.float().mean(1) / 256 * 5).long().tolist()
        return ["".join(" ░▒▓█"[shade] for shade in row) for row in shades]
    # The 24 greys of the 256-colour palette: upper pixel in front, lower one behind.
    greys = (232 + pixels.long() * 23 // 255).tolist()
    return [
        "".join(f"\x1b[38;5;{a};48;5;{b}m▀" for a, b in zip(above, below, strict=True))
        + "\x1b[0m"
        for above, below in greys
    ]


def report(path: str, answer: Answer, show: bool, colour: bool) -> str:
    """Return the text about one picture.

    Args:
        path: of the picture.
        answer: its classification.
        show: whether to draw the network's input beside the bars.
        colour: whether to use terminal colours.
    """
    value = answer.values[answer.digit]
    number = f"{value:.1%}" if answer.kind == "probability" else f"{value:.3f}"
    head = f"{path}: {answer.digit} ({answer.kind} {number})"
    lines = ["", *chart(answer, colour), *[""] * 3] if show else chart(answer, colour)
    if show:
        picture = draw_input(answer.image, colour)
        lines = [f"{a}   {b}" for a, b in zip(picture, lines, strict=True)]
    indented = (f"  {line}".rstrip() for line in lines)
    return "\n".join([paint(head, "bold", colour), *indented])


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line; of the process's own if None."""
    parser = Parser(__doc__)
    parser.add_argument("run", metavar="RUN", help="a run's folder, or a checkpoint")
    parser.add_argument(
        "pictures", metavar="PICTURE", nargs="+", help="a picture's file"
    )
    parser.add_argument("--json", action="store_true", help="a line of JSON for each")
    parser.add_argument(
        "--show", action="store_true", help="draw the network's input beside the bars"
    )
    return parser.parse_args(arguments)


def main(options: argparse.Namespace) -> int:
    """Print the classification of each picture; return 2 if one could not be
    classified, else 0.

    Args:
        options: as :func:`parse` returns them.
    """
    model, settings = load_run(options.run)
    status, kind = 0, ""
    colour = in_colour(sys.stdout)
    for path in options.pictures:
        try:
            answer = predict(model, settings, path)
        except PictureError as error:
            status = 2
            print_error(f"{path}: {error}", "error: ")
            if options.json:
                print(json.dumps({"picture": path, "error": str(error)}), flush=True)
            continue
        kind = answer.kind
        if options.json:
            print(json.dumps(as_json(path, answer)), flush=True)
        else:
            print(report(path, answer, options.show, colour), flush=True)
    if kind and not options.json:
        print(paint(f"({MEANINGS[kind]})", "dim", colour))
    return status


def as_json(path: str, answer: Answer) -> dict[str, Any]:
    """Return one picture's answer as JSON."""
    digit, kind, values = answer.digit, answer.kind, answer.values
    return {"picture": path, "digit": digit, "kind": kind, "values": values}


def command_line(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status.

    Args:
        arguments: of the command line; those of the process if None.
    """
    return run_program(lambda: main(parse(arguments)))


if __name__ == "__main__":
    sys.exit(command_line())
