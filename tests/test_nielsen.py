"""experiments/nielsen.py: trains what it says, and judges what it measured."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import torchbp
from experiments import nielsen, reporting
from torchbp.data import Split, Splits

SCRIPT = Path(nielsen.__file__)
TINY = nielsen.Training((3,), "quadratic", 3.0, epochs=2, examples=40)
LONGER = dataclasses.replace(TINY, hidden=(4,), cost="cross-entropy", epochs=4)


def _split(n: int, seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 784), generator=generator).to(torch.uint8)
    return Split(images, torch.arange(n) % 10)


DATA = Splits(_split(40, 0), _split(30, 1), _split(20, 2))


@pytest.fixture
def tiny(monkeypatch):
    """Three rows and two sizes, on 40 images; an epoch is 40 examples."""
    monkeypatch.setattr(nielsen, "EXAMPLES", 40)
    monkeypatch.setattr(nielsen, "TIMED_STEPS", 2)
    monkeypatch.setattr(nielsen, "STARTS", 4)
    monkeypatch.setattr(nielsen, "SIZES", (dataclasses.replace(TINY, examples=20),
                                           TINY))  # fmt: skip
    rows = (
        nielsen.Row("1", TINY, "epoch 1", 10.0),
        nielsen.Row("3", LONGER, "peak", 99.99),
        nielsen.Row("5", LONGER, "end", 1.0),
    )
    monkeypatch.setattr(nielsen, "ROWS", rows)
    monkeypatch.setattr(reporting, "load", lambda settings: DATA)


def settings(tmp_path, **changes):
    small = {"seeds": 2, "workers": 1, "logdir": str(tmp_path), "name": "one"}
    return nielsen.Settings(**{**small, **changes})


def test_everything_is_trained_judged_and_written(tiny, tmp_path, capsys):
    results = nielsen.main(settings(tmp_path))
    out = capsys.readouterr().out
    folder = tmp_path / "one"
    written = json.loads((folder / "results.json").read_text())
    assert written == json.loads(json.dumps(results))
    # Two networks and the smaller set, twice each; the whole set is the first network.
    keys = {(str(r["training"]), r["seed"]) for r in written["runs"]}
    assert len(written["runs"]) == len(keys) == 6
    for run in written["runs"]:
        assert len(run["accuracies"]) == run["training"]["epochs"]
        assert 0 <= min(run["accuracies"]) <= max(run["accuracies"]) <= 100
    by_statistic = {row["statistic"]: row for row in written["rows"]}
    # Nothing is to be learned from noise: 99.99 is out of reach, 1 is not.
    assert by_statistic["test peak"]["verdict"] == nielsen.MISSED
    assert by_statistic["test peak"]["reason"]
    assert not results["shown"]
    assert out.splitlines()[-1] == results["verdict"]
    assert "not reproduced" in results["verdict"]
    assert "6/6]" in out and "about" in out
    assert max(map(len, out.splitlines())) <= 100
    events = EventAccumulator(str(folder))
    events.Reload()
    (tag,) = (t for t in events.Tags()["scalars"] if "4_CE" in t and "seed_1" in t)
    shown = [point.value for point in events.Scalars(tag)]
    (run,) = (
        r for r in written["runs"] if r["training"]["hidden"] == [4] and r["seed"] == 1
    )
    assert shown == pytest.approx(run["accuracies"])


def test_a_figure_is_written_where_matplotlib_is(tiny, tmp_path):
    pytest.importorskip("matplotlib")
    nielsen.main(settings(tmp_path))
    assert (tmp_path / "one" / "nielsen.png").read_bytes()[1:4] == b"PNG"


def test_without_matplotlib_a_line_says_so(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    nielsen.main(settings(tmp_path, chapter="1"))
    assert 'pip install ".[plots]"' in capsys.readouterr().out
    assert not list((tmp_path / "one").glob("*.png"))


def test_a_run_is_the_algorithm_of_the_package():
    """Weights, batches and steps are those of ExplicitSGD.epoch with the same seed."""
    training = dataclasses.replace(TINY, lam=5.0)
    run = nielsen.train(training, 3, "explicit", DATA)
    torch.manual_seed(3)
    model = torchbp.MLP([784, 3, 10], init="normal")
    engine = torchbp.ExplicitSGD(model, torchbp.QuadraticCost(), 3.0, 5 / 50_000)
    generator = torch.Generator().manual_seed(3)
    right = []
    for _ in range(training.epochs):
        for _ in range(nielsen.EXAMPLES // 40):
            engine.epoch(*DATA.train, 10, generator)
        output = model(torchbp.data.scale(DATA.test.images))
        right.append((output.argmax(1) == DATA.test.labels).float().mean().item())
    assert run.accuracies == pytest.approx([100 * r for r in right], abs=1e-4)


def test_the_engines_agree(monkeypatch):
    monkeypatch.setattr(nielsen, "EXAMPLES", 40)
    training = dataclasses.replace(LONGER, lam=5.0, lr=0.1)
    explicit, autograd = (
        nielsen.train(training, 0, engine, DATA) for engine in ("explicit", "autograd")
    )
    assert explicit.accuracies == autograd.accuracies


def test_processes_give_what_one_gives(tiny, tmp_path):
    alone = nielsen.main(settings(tmp_path, chapter="1"))
    pooled = nielsen.main(settings(tmp_path, chapter="1", workers=2, name="two"))
    for results in (alone, pooled):
        results["runs"].sort(key=lambda run: run["seed"])
        for run in results["runs"]:
            del run["seconds"]
    assert alone["runs"] == pooled["runs"]
    assert alone["rows"] == pooled["rows"]


@pytest.mark.parametrize(
    ("published", "values", "verdict"),
    [
        (95.0, [94.8, 94.9, 94.7], "reproduced"),
        (95.0, [94.7], "reproduced"),  # the limit itself
        (95.0, [94.6], "not reproduced"),
        (95.0, [94.6, 94.6, 94.6], "not reproduced"),
        (95.0, [94.0, 94.6, 94.9], "reproduced"),  # within two standard deviations
        (95.0, [95.4, 95.4, 95.4], "better"),
        (95.0, [95.29, 95.29], "reproduced"),
    ],
)
def test_verdict_on_accuracies(published, values, verdict):
    assert nielsen.judge(published, values) == verdict


def test_a_miss_is_looked_into():
    row = nielsen.Row("1", TINY, "peak", 95.0, "the book's is the best of 3 runs")
    runs = [
        nielsen.Run(TINY, 0, [80.0, 85.0], 1, 0.1),
        nielsen.Run(TINY, 1, [84.0, 85.2], 0, 0.1),
    ]
    result = nielsen.accuracy_result(row, runs, is_cut=False)
    assert result.verdict == "not reproduced"
    assert "9.90 points short; 1 of 2 seeds never learned some digit" in result.reason
    assert "the others' mean is 85.20" in result.reason
    assert "the best here 85.20" in result.reason
    end = dataclasses.replace(row, statistic="end")
    runs[0].accuracies[-1] = 81.0
    assert "peaks" in nielsen.accuracy_result(end, runs, is_cut=False).reason


def test_rows_whose_epochs_were_cut_are_not_compared(tiny, tmp_path, capsys):
    results = nielsen.main(settings(tmp_path, epochs_scale=0.5))
    verdicts = {row["statistic"]: row["verdict"] for row in results["rows"]}
    assert verdicts["test peak"] == "not comparable"
    assert verdicts["test epoch 1"] != "not comparable"
    assert "not comparable" in capsys.readouterr().out.splitlines()[-1]


def test_verdict_on_norms():
    starts = [0.05, 0.07, 0.09]
    assert nielsen.norm_result("", 1, 0.066, starts).verdict == "reproduced"
    missed = nielsen.norm_result("", 1, 0.1, starts)
    assert missed.verdict == "not reproduced" and "0.05 to 0.09" in missed.reason


def test_norms_are_those_of_the_bias_gradients():
    results = nielsen.norm_results(*DATA.train)
    assert [r.statistic for r in results] == ["‖δ^1‖", "‖δ^2‖", "‖δ^1‖", "‖δ^2‖",
                                              "‖δ^3‖"]  # fmt: skip
    torch.manual_seed(1)
    model = torchbp.MLP([784, 30, 30, 10], output="identity", init="scaled")
    x = torchbp.data.scale(DATA.train.images)
    torchbp.CrossEntropyCost()(model(x), DATA.train.labels).backward()
    expected = [model.layers[i].bias.grad.norm().item() for i in range(2)]
    assert [r.values[1] for r in results[:2]] == pytest.approx(expected)


def test_neuron_as_the_book_shows_it():
    for cost, lr, waits in nielsen.NEURONS:
        curves = [nielsen.neuron_costs(cost, lr, s) for s in nielsen.NEURON_STARTS]
        assert len(curves[0]) == nielsen.NEURON_EPOCHS + 1
        assert nielsen.neuron_result(cost, lr, waits, curves).verdict == "reproduced"
        wrong = nielsen.neuron_result(cost, lr, not waits, curves)
        assert wrong.verdict == "not reproduced" and "epochs" in wrong.reason


def test_neuron_against_its_formula():
    """Two updates of w and b by hand: δ = (a - y) σ' with the quadratic cost."""
    w, b, expected = 0.6, 0.9, []
    for _ in range(3):
        a = torch.sigmoid(torch.tensor(w + b, dtype=torch.float64)).item()
        expected.append(a**2 / 2)
        delta = a * a * (1 - a)
        w, b = w - 0.15 * delta, b - 0.15 * delta
    costs = nielsen.neuron_costs("quadratic", 0.15, (0.6, 0.9))
    assert costs[:3] == pytest.approx(expected, rel=1e-12)
    assert nielsen.halved([4.0, 3.0, 2.0, 1.0]) == 2
    assert nielsen.halved([4.0, 3.0]) is None


def test_verdict_on_the_number_of_examples(monkeypatch):
    sizes = tuple(dataclasses.replace(TINY, examples=n) for n in (10, 20, 40))
    monkeypatch.setattr(nielsen, "SIZES", sizes)

    def result(ends, is_cut=False):
        runs = {
            t: [nielsen.Run(t, 0, [0.0, end], 0, 0.1)]
            for t, end in zip(sizes, ends, strict=True)
        }
        return nielsen.size_result(runs, is_cut)

    assert result([60.0, 70.0, 80.0]).verdict == "reproduced"
    fell = result([60.0, 80.0, 70.0])
    assert fell.verdict == "not reproduced" and "n 40 has 70.00" in fell.reason
    assert result([60.0, 80.0, 70.0], is_cut=True).verdict == "not comparable"


def test_the_rows_are_the_book_s():
    published = sorted(row.published for row in nielsen.ROWS)
    assert published == [
        9.82, 10.09, 11.39, 21.42, 86.43, 91.29, 92.7, 95.42, 95.49, 96.37, 96.48,
        96.49, 96.5, 96.57, 96.59, 96.82, 96.9, 97.92, 98.04,
    ]  # fmt: skip
    everything = nielsen.plan(nielsen.Settings())
    assert len(everything) == len(set(everything)) == 22
    epochs = sum(training.epochs for training in everything)
    assert epochs == 690
    assert all(training.examples % 10 == 0 for training in everything)
    chapters = [nielsen.plan(nielsen.Settings(chapter=c)) for c in ("1", "3", "5")]
    assert set(everything) == set().union(*chapters)


def test_lines_fit_the_terminal():
    runs = {
        cut: [nielsen.Run(cut, s, [10.0] * cut.epochs, 9, 1.0) for s in range(2)]
        for cut in nielsen.plan(nielsen.Settings())
    }
    found = [
        nielsen.accuracy_result(row, runs[row.training], False) for row in nielsen.ROWS
    ]
    found.append(nielsen.size_result({t: runs[t] for t in nielsen.SIZES}, False))
    lines = nielsen.table(found).splitlines()
    assert max(map(len, lines)) <= 100
    assert sum(line.startswith("chapter") for line in lines) >= 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--seeds 0", "seeds: expected at least 1, got 0"),
        ("--epochs-scale 2", "epochs_scale: expected above 0 to 1, got 2.0"),
        ("--epochs-scale nan", "epochs_scale: expected above 0 to 1, got nan"),
        ("--workers -1", "workers: expected at least 0, got -1"),
        ("--seed -1", "seed: expected 0 to"),
        ("--chapter 2", "invalid choice: '2'"),
        ("--engine magic", "invalid choice: 'magic'"),
        ("--name a/b", "name: expected a plain folder name"),
        ("--depth 3", "unrecognized arguments"),
    ],
)
def test_bad_arguments(tiny, tmp_path, capsys, options, message):
    assert nielsen.command_line([*options.split(), "--logdir", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_without_data_nothing_is_left(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reporting.data, "load", lambda name, root: _no_data(root))
    options = ["--data", "nowhere", "--logdir", str(tmp_path)]
    assert nielsen.command_line(options) == 2
    assert capsys.readouterr().err == "error: no data in nowhere\n"
    assert not list(tmp_path.iterdir())


def _no_data(root):
    raise torchbp.data.DataError(f"no data in {root}")


def test_an_interrupt_keeps_what_was_trained(tiny, tmp_path, capsys, monkeypatch):
    real, calls = nielsen.train, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(nielsen, "train", interrupted)
    options = ["--workers", "1", "--name", "one", "--logdir", str(tmp_path)]
    assert nielsen.command_line(options) == 130
    assert capsys.readouterr().err == "interrupted\n"
    written = json.loads((tmp_path / "one" / "results.json").read_text())
    assert len(written["runs"]) == 2 and "verdict" not in written


@pytest.mark.parametrize("wait", [0.5, 6])
def test_ctrl_c_ends_the_processes(mnist_root, tmp_path, wait):
    """The script on MNIST with two workers, interrupted as a terminal does it, while
    they start and while they are at work."""
    command = [sys.executable, str(SCRIPT), "--chapter", "5", "--workers", "2"]
    process = subprocess.Popen(
        [*command, "--logdir", str(tmp_path), "--data", str(mnist_root)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    while "in all" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(wait)
    os.killpg(process.pid, signal.SIGINT)
    # To its end, and so to that of all who hold the other end of the pipes.
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines() == ["interrupted"]
