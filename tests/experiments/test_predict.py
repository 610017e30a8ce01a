"""Pictures of digits, of every kind that people have, through a trained run."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
from drawings import draw
from PIL import Image, ImageOps
from torch.nn.functional import interpolate, pad

from experiments import mnist, predict
from experiments.support import pictures
from experiments.support.settings import COSTS
from torchbp import data
from torchbp.training import checkpoint

SCRIPT = Path(predict.__file__)


def train(root, **changes):
    """The folder of a run of a second or two."""
    chosen = {"engine": "explicit", "cost": "log-likelihood", "lr": 0.5, **changes}
    return mnist.main(mnist.TrainingSettings(logdir=str(root), **chosen))["run"]


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """A run that learned scikit-learn's digits, which need no network."""
    root = tmp_path_factory.mktemp("small")
    return train(root, dataset="digits", sizes=(784, 30, 10), epochs=12)


@pytest.fixture(scope="session")
def mnist_run(mnist_root, tmp_path_factory):
    root = tmp_path_factory.mktemp("mnist")
    return train(root, dataset="mnist", data=str(mnist_root), epochs=2)


@pytest.fixture
def digit(tmp_path):
    """The file of a digit's picture, as a hand would draw it."""

    def save(digit=3, name="digit.png", **options):
        draw(digit, **options).save(tmp_path / name)
        return str(tmp_path / name)

    return save


def run(capsys, *arguments):
    """Exit status, output, errors of the program in this process."""
    status = predict.command_line(list(arguments))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


# ------------------------------------------------- as the network was trained on them


def rotated(grey, degrees):
    image = Image.fromarray((255 * grey).round().byte().numpy())
    turned = image.rotate(degrees, Image.Resampling.BICUBIC, expand=True)
    return pictures.levels(turned)


def resized(grey, size):
    large = interpolate(grey[None, None], size, mode="bicubic", antialias=True)
    return large[0, 0].clamp(0, 1)


def noisy(grey):
    generator = torch.Generator().manual_seed(0)
    noise = 0.03 * torch.randn(84, 84, generator=generator)
    return (0.2 + 0.6 * resized(grey, (84, 84)) + noise).clamp(0, 1)


TRANSFORMED = {
    "as it is": lambda g: g,
    "dark on light": lambda g: 1 - g,
    "larger": lambda g: resized(g, (140, 140)),
    "smaller": lambda g: resized(g, (19, 19)),
    "squares of pixels": lambda g: interpolate(g[None, None], (280, 280))[0, 0],
    "off-centre": lambda g: pad(g, (50, 3, 0, 31)),
    "cropped": lambda g: g[g.any(1)][:, g.any(0)],
    "dark on light, larger, off-centre": lambda g: (
        1 - pad(resized(g, (70, 70)), (0, 90))
    ),
    "faint": lambda g: 0.5 + 0.1 * g,
    "turned a little left": lambda g: rotated(g, 5),
    "turned a little right": lambda g: rotated(g, -5),
    "noise": noisy,
}


def accuracy(network, images, labels):
    return (network(data.scale(images)).argmax(1) == labels).double().mean().item()


@pytest.mark.parametrize("name", list(TRANSFORMED))
def test_transformed_digits_are_read_as_well_as_untouched_ones(
    mnist_run, mnist_root, name
):
    network, _ = predict.load_run(mnist_run)
    images, labels = (t[:250] for t in data.load("mnist", mnist_root, False).test)
    transform = TRANSFORMED[name]
    prepared = torch.stack(
        [predict.prepare(transform(data.scale(i).view(28, 28))) for i in images]
    )
    before, after = (accuracy(network, x, labels) for x in (images, prepared))
    assert before > 0.92
    assert after > before - (0.05 if "turned" in name or name == "noise" else 0.03)


def test_mnist_s_own_digits_come_out_as_they_went_in(mnist_root):
    """But for the faintest pixels, and a centre that was between two."""
    images = data.load("mnist", mnist_root, False).test.images[:200]
    again = [predict.prepare(data.scale(image).view(28, 28)) for image in images]
    changes = (torch.stack(again).float() - images.float()).abs().mean(1)
    assert (changes < 4).double().mean() > 0.95


def test_without_mnist_too(small_run):
    network, _ = predict.load_run(small_run)
    images, labels = data.load("digits").test
    transforms = (
        TRANSFORMED["larger"],
        TRANSFORMED["dark on light, larger, off-centre"],
    )
    before = accuracy(network, images, labels)
    assert before > 0.93
    for transform in transforms:
        prepared = [predict.prepare(transform(i.view(28, 28) / 255)) for i in images]
        assert accuracy(network, torch.stack(prepared), labels) > before - 0.08


@pytest.mark.parametrize(
    ("size", "box", "width", "inverted"),
    [
        ((200, 200), (50, 30, 140), 14, False),
        ((200, 200), (20, 60, 80), 10, True),
        ((1000, 700), (100, 50, 600), 12, False),
        ((1200, 1500), (150, 250, 750), 80, True),
        ((40, 40), (8, 8, 24), 2, False),
    ],
)
def test_digits_drawn_by_hand(mnist_run, size, box, width, inverted):
    network, settings = predict.load_run(mnist_run)
    right = 0
    for digit in range(10):
        image = draw(digit, size, box, width)
        grey = pictures.levels(ImageOps.invert(image) if inverted else image)
        answer = predict.classify(network, settings, predict.prepare(grey))
        right += answer.digit == digit
    assert right >= 9


# ---------------------------------------------------------- pictures of every kind


def transparent(ink):
    """A digit in `ink` on nothing."""
    image = Image.new("RGBA", (200, 200), (0, 0, 0, 0))
    image.paste(ink, mask=draw(3, ink=255, paper=0))
    return image


def palette_with_transparency():
    image = draw(3, ink=1, paper=0, mode="P")
    image.putpalette([255, 0, 255, 30, 30, 30])
    image.info["transparency"] = 0
    return image


def sixteen_bits(scale):
    pixels = pictures.levels(draw(3)) * scale
    return Image.fromarray(pixels.round().to(torch.uint16).numpy())


def card():
    """A dark digit on a white card, whose corners are transparent."""
    image = draw(3).convert("RGBA")
    mask = Image.new("L", image.size, 255)
    mask.paste(0, (0, 0, 200, 12))
    mask.paste(0, (0, 188, 200, 200))
    image.putalpha(mask)
    return image


KINDS = {
    "grey": draw(3),
    "colour": draw(3, ink=(200, 30, 60), paper=(240, 240, 120), mode="RGB"),
    "light on dark": draw(3, ink=(250, 240, 90), paper=(20, 20, 60), mode="RGB"),
    "one bit": draw(3).convert("1"),
    "palette": draw(3).convert("P"),
    "palette with a transparent colour": palette_with_transparency(),
    "grey with alpha": transparent((0, 0, 0)).convert("LA"),
    "black ink on nothing": transparent((0, 0, 0)),
    "white ink on nothing": transparent((255, 255, 255)),
    "a card with transparent edges": card(),
    "cmyk": draw(3).convert("CMYK"),
    "16 bits": sixteen_bits(65535),
    "12 bits in 16": sixteen_bits(4095),
    "32 bits": sixteen_bits(65535).convert("I"),
    "floating": draw(3).convert("F"),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_of_picture_looks_the_same_to_the_network(kind):
    expected = predict.prepare(pictures.levels(draw(3))).float()
    seen = predict.prepare(pictures.levels(KINDS[kind])).float()
    assert (seen - expected).abs().mean() < 3, "\n".join(
        predict.draw_input(seen.byte(), False)
    )


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "gif", "tiff", "webp", "pgm"])
def test_every_format(tmp_path, suffix):
    expected = predict.prepare(pictures.levels(draw(5))).float()
    draw(5).save(tmp_path / f"five.{suffix}")
    seen = predict.prepare(predict.read(tmp_path / f"five.{suffix}")).float()
    # Around the strokes JPEG leaves faint ripples, which widen the digit's box.
    assert (seen - expected).abs().mean() < (10 if suffix == "jpg" else 3)


def test_16_bit_png_files_and_turned_photographs(tmp_path):
    expected = predict.prepare(pictures.levels(draw(3))).float()
    sixteen_bits(65535).save(tmp_path / "deep.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # a camera held on its side
    draw(3).rotate(90).save(tmp_path / "turned.png", exif=turned)
    for name in ("deep.png", "turned.png"):
        seen = predict.prepare(predict.read(tmp_path / name)).float()
        assert (seen - expected).abs().mean() < 1


def test_the_box_and_the_centre_are_mnist_s():
    for digit in range(10):
        image = draw(digit, (500, 300), (270, 20, 200), 16)
        seen = predict.prepare(pictures.levels(image)).view(28, 28).float()
        rows, columns = (seen.any(d).nonzero()[:, 0] for d in (1, 0))
        sides = [int(n[-1] - n[0]) + 1 for n in (rows, columns)]
        assert max(sides) in (19, 20)  # an outermost row may round to nothing
        mass, steps = seen.sum(), torch.arange(28.0)
        for d in (0, 1):
            assert abs((seen.sum(d) @ steps / mass).item() - 14) <= 0.5
        assert seen.max() == 255


def test_shapes_at_the_edge():
    """A digit of one pixel's width, a picture of one pixel, ink at the rim."""
    line = torch.ones(300, 9)
    line[20:280, 4] = 0
    seen = predict.prepare(line).view(28, 28)
    assert seen.any(0).sum() <= 2 and seen.any(1).sum() >= 19
    with pytest.raises(predict.PictureError, match="empty"):
        predict.prepare(torch.zeros(1, 1))
    corner = torch.zeros(50, 50)
    corner[:30, :8] = 1
    assert predict.prepare(corner).view(28, 28).any(1).sum() == 20


@pytest.mark.parametrize("digits", [(1, 2), (7, 1), (8, 8, 8), (0, 5, 1, 4)])
def test_several_digits_are_refused(digits):
    side = 100
    image = Image.new("L", (side * len(digits), side + 20), 255)
    for i, digit in enumerate(digits):
        image.paste(draw(digit, (side, side), (15, 10, 70), 9), (side * i, 10))
    with pytest.raises(predict.PictureError, match=f"got {len(digits)} things side by"):
        predict.prepare(pictures.levels(image))


def test_speckles_are_not_digits():
    image = draw(4)
    image.paste(0, (5, 5, 9, 9))
    with_dust = pictures.levels(image)
    predict.prepare(with_dust)  # and does not take it for two


# -------------------------------------------------------------------- the command


def test_an_answer_to_be_read(capsys, small_run, digit):
    seven = digit(7, "seven.png")
    status, out, err = run(capsys, small_run, seven)
    assert (status, err) == (0, "")
    head, *bars, meaning = out.splitlines()
    network, settings = predict.load_run(small_run)
    answer = predict.predict(network, settings, seven)
    best = max(answer.values)
    assert head == f"{seven}: {answer.digit} (probability {best:.1%})"
    assert sum(answer.values) == pytest.approx(1)
    assert [int(bar.split()[0]) for bar in bars] == list(range(10))
    lengths = [bar.count("█") for bar in bars]
    assert lengths.index(max(lengths)) == answer.digit
    assert {len(bar) for bar in bars} == {len("  0  ") + predict.LENGTH + 7}
    assert "100 %" in meaning and "\x1b" not in out


def test_show_is_what_the_network_sees(capsys, small_run, digit):
    status, out, _ = run(capsys, small_run, digit(1), "--show")
    assert status == 0
    picture = [line[2:30] for line in out.splitlines()[1:15]]
    columns = {i for row in picture for i, c in enumerate(row) if c != " "}
    assert 3 <= len(columns) <= 12 and "█" in "".join(picture)
    assert max(map(len, out.splitlines()[1:15])) <= 80


def test_json_is_a_line_for_each_picture(capsys, small_run, digit, tmp_path):
    good, missing = digit(0), str(tmp_path / "missing.png")
    status, out, err = run(capsys, small_run, good, missing, good, "--json")
    assert status == 2 and err == f"error: {missing}: no such file\n"
    first, second, third = map(json.loads, out.splitlines())
    assert first == third and first["picture"] == good
    assert first["values"][first["digit"]] == max(first["values"])
    assert first["kind"] == "probability"
    assert second == {"picture": missing, "error": "no such file"}


@pytest.mark.parametrize("cost", list(COSTS))
@pytest.mark.parametrize("layers", ["bp", "native"])
def test_what_the_numbers_are(capsys, tmp_path, digit, cost, layers):
    engine = "explicit" if layers == "bp" else "autograd"
    small = {"dataset": "digits", "sizes": (784, 12, 10), "epochs": 1, "layers": layers}
    folder = train(tmp_path, cost=cost, engine=engine, **small)
    network, settings = predict.load_run(folder)
    image = predict.prepare(predict.read(digit()))
    z = network(data.scale(image)).double()
    answer = predict.classify(network, settings, image)
    expected = z if cost == "quadratic" else z.exp() / z.exp().sum()
    assert answer.values == pytest.approx(expected.tolist())
    _, out, _ = run(capsys, folder, digit())
    name = "activation" if cost == "quadratic" else "probability"
    assert f"({name} " in out and predict.MEANINGS[name] in out


def test_loading_leaves_random_numbers_and_finds_checkpoints(small_run):
    before = torch.random.get_rng_state()
    folder, _ = predict.load_run(small_run)
    file, _ = predict.load_run(Path(small_run) / "checkpoint.pt")
    assert torch.equal(before, torch.random.get_rng_state())
    for a, b in zip(folder.parameters(), file.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_run_by_any_of_its_names(capsys, small_run, digit, tmp_path):
    """And a checkpoint alone, which is enough to answer."""
    for name in ("", "/", "/checkpoint.pt", "/checkpoint.previous.pt"):
        status, _, err = run(capsys, small_run + name, digit(7))
        assert (status, err) == (0, ""), name
    shutil.copy(Path(small_run) / "checkpoint.previous.pt", tmp_path / "alone.pt")
    assert run(capsys, str(tmp_path / "alone.pt"), digit(7))[0] == 0
    status, _, err = run(capsys, small_run + "/nothing.pt", digit(7))
    assert status == 2 and err.endswith("nothing.pt: no such run\n")


def test_errors_are_one_line_whatever_the_names(capsys, small_run, tmp_path):
    for arguments in ([small_run, "two\nlines.png"], ["two\nlines", "a.png"]):
        status, _, err = run(capsys, *arguments)
        assert status == 2 and err.count("\n") == 1 and err.startswith("error: two ")


def bad_files(tmp_path):
    """Files that are no digits, by what is said of them."""
    (tmp_path / "text.png").write_text("no picture at all")
    buffer = io.BytesIO()
    draw(3).save(buffer, "PNG")
    (tmp_path / "cut.png").write_bytes(buffer.getvalue()[:300])
    Image.new("L", (90, 90), 255).save(tmp_path / "white.png")
    Image.new("RGBA", (90, 90), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    (tmp_path / "none.png").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    return {
        "text.png": "expected a picture, got a file of another kind",
        "cut.png": "expected a whole picture, got",
        "white.png": "expected a digit, got an empty picture",
        "clear.png": "expected a digit, got an empty picture",
        "none.png": "expected a picture",
        "folder": "expected a whole picture, got Is a directory",
        "missing.png": "no such file",
    }


def test_what_fails_is_one_line_and_does_not_stop_the_others(
    capsys, small_run, digit, tmp_path
):
    reasons = bad_files(tmp_path)
    bad = [str(tmp_path / name) for name in reasons]
    status, out, err = run(capsys, small_run, *bad, digit(2))
    assert status == 2
    lines = err.splitlines()
    assert len(lines) == len(bad)
    for line, path, reason in zip(lines, bad, reasons.values(), strict=True):
        assert line.startswith(f"error: {path}: {reason}"), line
    assert "digit.png: " in out


def test_runs_that_are_none(capsys, small_run, digit, tmp_path):
    picture = digit()
    checkpoint.save(tmp_path / "checkpoint.pt", {"epoch": 3})
    state = checkpoint.load(Path(small_run) / "checkpoint.pt")
    for name, changes in {
        "wide": {"sizes": [784, 31, 10]},
        "clothes": {"dataset": "fashion"},
        "later": {"unheard_of": 1},
    }.items():
        settings = {**state["settings"], **changes}
        (tmp_path / name).mkdir()
        checkpoint.save(
            tmp_path / name / "checkpoint.pt", {**state, "settings": settings}
        )
    (tmp_path / "empty").mkdir()
    for name, said in {
        "nowhere": "no such run",
        "empty": "no such checkpoint",
        "": "expected a run of experiments/mnist.py, got",
        "digit.png": "expected a whole checkpoint",
        "wide": "size mismatch",
        "clothes": "expected a run that learned digits, got fashion",
        "later": "unheard_of",
    }.items():
        status, out, err = run(capsys, str(tmp_path / name), picture)
        assert (status, out) == (2, ""), name
        assert err.startswith("error: ") and err.count("\n") == 1
        assert said in err, err


@pytest.mark.parametrize("arguments", [[], ["run"], ["run", "a.png", "--nonsense"]])
def test_wrong_usage_is_one_line_and_status_2(capsys, arguments):
    assert predict.command_line(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_colours_on_a_terminal_alone(monkeypatch, small_run, digit):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def shown():
        terminal = Terminal()
        monkeypatch.setattr(sys, "stdout", terminal)
        assert predict.command_line([small_run, digit(), "--show"]) == 0
        return terminal.getvalue()

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[32m" in shown() and "▀" in shown()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in shown()


def test_as_a_script_whose_reader_leaves(small_run, digit):
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), small_run, *[digit()] * 200],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=os.path.dirname(digit()),
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert process.stdout is not None and process.stderr is not None
    assert b"digit.png: " in process.stdout.readline()  # blocks become ?
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=processes.LIMIT) == 141


def test_the_checkpoint_before_a_damaged_one_answers(
    capsys, tmp_path, small_run, digit
):
    folder = tmp_path / "damaged"
    shutil.copytree(small_run, folder)
    newest = folder / "checkpoint.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    status, out, err = run(capsys, str(folder), digit(7))
    assert status == 0 and "(probability " in out
    assert err.startswith("NOTE: ") and "checkpoint.pt" in err and err.count("\n") == 1
    (folder / "checkpoint.previous.pt").unlink()
    assert run(capsys, str(folder), digit(7))[0] == 2
