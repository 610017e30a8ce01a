"""experiments/nielsen.py: trains what it says, and judges what it measured."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import bounds
import processes
import pytest
import torch

import torchbp
from experiments import nielsen
from experiments.support import (
    nielsen_runs,
    one_neuron,
    reporting,
    reproduction,
)
from torchbp.data import Split, Splits

SCRIPT = Path(nielsen.__file__)
TINY = nielsen_runs.Training((3,), "quadratic", 3.0, epochs=2, examples=40)
LONGER = dataclasses.replace(TINY, hidden=(4,), cost="cross-entropy", epochs=4)


def _split(n: int, seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 784), generator=generator).to(torch.uint8)
    return Split(images, torch.arange(n) % 10)


DATA = Splits(_split(40, 0), _split(30, 1), _split(20, 2))


@pytest.fixture
def tiny(monkeypatch):
    """Three rows and two sizes, on 40 images; an epoch is 40 examples."""
    monkeypatch.setattr(nielsen_runs, "EXAMPLES", 40)
    monkeypatch.setattr(nielsen_runs, "TIMED_STEPS", 2)
    monkeypatch.setattr(nielsen, "MORE_SEEDS", 1)
    monkeypatch.setattr(nielsen, "STARTS", 4)
    monkeypatch.setattr(nielsen, "SIZES", (dataclasses.replace(TINY, examples=20),
                                           TINY))  # fmt: skip
    rows = (
        reproduction.Published("1", TINY, "epoch 1", 10.0),
        reproduction.Published("3", LONGER, "peak", 99.99),
        reproduction.Published("5", LONGER, "end", 1.0),
    )
    monkeypatch.setattr(nielsen, "ROWS", rows)
    monkeypatch.setattr(reporting, "load", lambda settings: DATA)


def settings(tmp_path, **changes):
    small = {"seeds": 2, "workers": 1, "logdir": str(tmp_path), "name": "one"}
    return nielsen.NielsenSettings(**{**small, **changes})


def test_everything_is_trained_judged_and_written(tiny, measure, tmp_path):
    written, out, events = measure(nielsen.main, settings(tmp_path))
    # Two networks and the smaller set, twice each; the whole set is the first network;
    # and the network that is not reproduced with one seed more.
    keys = {(str(r["training"]), r["seed"]) for r in written["runs"]}
    assert len(written["runs"]) == len(keys) == 7
    assert [r["training"]["hidden"] for r in written["runs"] if r["seed"] == 2] == [[4]]
    for run in written["runs"]:
        epochs = run["training"]["epochs"]
        assert len(run["accuracies"]) == len(run["unlearned"]) == epochs
        assert 0 <= min(run["accuracies"]) <= max(run["accuracies"]) <= 100
    by_statistic = {row["statistic"]: row for row in written["rows"]}
    # Nothing is to be learned from noise: 99.99 is out of reach, 1 is not.
    assert by_statistic["test peak"]["verdict"] == nielsen.MISSED
    assert "with 1 more seeds" in by_statistic["test peak"]["reason"]
    assert len(by_statistic["test peak"]["values"]) == 2
    assert not written["shown"]
    assert "not reproduced" in written["verdict"]
    assert "6/6]" in out and "about" in out
    assert max(map(len, out.splitlines())) <= 100
    (tag,) = (t for t in events.Tags()["scalars"] if "4_CE" in t and "seed_1" in t)
    shown = [point.value for point in events.Scalars(tag)]
    (run,) = (
        r for r in written["runs"] if r["training"]["hidden"] == [4] and r["seed"] == 1
    )
    assert shown == pytest.approx(run["accuracies"])


def test_a_run_is_the_algorithm_of_the_package():
    """Weights, batches and steps are those of ExplicitSGD.epoch with the same seed."""
    training = dataclasses.replace(TINY, lam=5.0)
    run = nielsen_runs.train(training, 3, "explicit", DATA)
    torch.manual_seed(3)
    model = torchbp.MLP([784, 3, 10], init="normal")
    engine = torchbp.ExplicitSGD(model, torchbp.QuadraticCost(), 3.0, 5 / 50_000)
    generator = torch.Generator().manual_seed(3)
    right = []
    for _ in range(training.epochs):
        for _ in range(nielsen_runs.EXAMPLES // 40):
            engine.epoch(*DATA.train, 10, generator)
        output = model(torchbp.data.scale(DATA.test.images))
        right.append((output.argmax(1) == DATA.test.labels).float().mean().item())
    off = bounds.approx(bounds.close(bounds.OPERATIONS, torch.float32, size=0))
    assert run.accuracies == pytest.approx([100 * r for r in right], **off)


def test_the_engines_agree(monkeypatch):
    monkeypatch.setattr(nielsen_runs, "EXAMPLES", 40)
    training = dataclasses.replace(LONGER, lam=5.0, lr=0.1)
    explicit, autograd = (
        nielsen_runs.train(training, 0, engine, DATA)
        for engine in ("explicit", "autograd")
    )
    assert explicit.accuracies == autograd.accuracies


def test_processes_give_what_one_gives(tiny, tmp_path, monkeypatch):
    # The processes know of no patch but the rows.
    monkeypatch.setattr(nielsen_runs, "EXAMPLES", 50_000)
    training = nielsen_runs.Training((30,), "cross-entropy", 0.01, 5, epochs=1)
    training = dataclasses.replace(training, examples=40, scored="validation")
    monkeypatch.setattr(
        nielsen, "ROWS", (reproduction.Published("1", training, "end", 10.0),)
    )
    # Weights of N(0, 1) and a small rate: the answers vary from image to image, so that
    # three seeds differ in how many of 5,000 they guess, on any processor.
    splits = DATA._replace(validation=_split(5000, 1))
    monkeypatch.setattr(reporting, "load", lambda settings: splits)
    chosen = settings(tmp_path, chapter="1", seeds=3)
    alone = nielsen.main(chosen)
    pooled = nielsen.main(dataclasses.replace(chosen, workers=2, name="two"))
    for results in (alone, pooled):
        results["runs"].sort(key=lambda run: run["seed"])
        for run in results["runs"]:
            del run["seconds"]
    assert len({tuple(run["accuracies"]) for run in alone["runs"]}) > 1
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
    assert reproduction.judge_accuracy(published, values) == verdict


def _runs(*accuracies, unlearned=None):
    return [
        nielsen_runs.Run(TINY, seed, list(of), unlearned or [0] * len(of), 0.1)
        for seed, of in enumerate(accuracies)
    ]


def test_a_miss_is_explained():
    row = reproduction.Published(
        "1", TINY, "peak", 95.0, "the book's is the best of 3 runs"
    )
    (lost,) = _runs([80.0, 85.0], unlearned=[2, 1])
    runs = [lost, *_runs([84.0, 85.2])]
    result = reproduction.reproduce_accuracy(row, runs, is_cut=False)
    assert result.verdict == "not reproduced"
    assert "deviates by -9.90 points, and 2 std are 0.28" in result.reason
    assert "1 of 2 seeds had not learned some digit" in result.reason
    assert "the others' mean is 85.20" in result.reason
    assert "the best measured 85.20" in result.reason and "more" not in result.reason
    end = dataclasses.replace(row, statistic="end")
    runs[0].accuracies[:] = [85.0, 81.0]
    reason = reproduction.reproduce_accuracy(end, runs, is_cut=False).reason
    assert "the mean of the peaks is 85.10" in reason
    assert "the last 10 epochs differ by a std of 1.84" in reason  # 2.83 and 0.85


def test_more_seeds_are_part_of_the_reason_and_not_of_the_verdict():
    row = reproduction.Published("1", TINY, "peak", 95.0)
    runs = _runs([94.6], [94.6])
    for peak, said in (
        (95.2, "94.80 ± 0.35 (94.60–95.20), by which it would be rep"),
        (94.6, "94.60 ± 0.00 (94.60–94.60), by which it would be not"),
    ):
        result = reproduction.reproduce_accuracy(row, runs, False, _runs([peak]))
        assert result.verdict == "not reproduced" and result.values == [94.6, 94.6]
        assert f"with 1 more seeds {said}" in result.reason


def test_what_passes_by_its_spread_alone_is_explained():
    row = reproduction.Published("1", TINY, "epoch 1", 91.29)
    runs = [*_runs([82.1, 90.0], unlearned=[1, 0]), *_runs([90.9, 91.0])]
    result = reproduction.reproduce_accuracy(row, runs, is_cut=False)
    assert result.verdict == "reproduced"
    assert "1 of 2 seeds had not learned some digit" in result.reason
    close = reproduction.reproduce_accuracy(row, _runs([91.0], [91.3]), is_cut=False)
    assert close.verdict == "reproduced" and not close.reason


def test_a_digit_is_unlearned_below_a_tenth():
    model = torch.nn.Linear(10, 10, bias=False)
    torch.nn.init.eye_(model.weight)
    labels = torch.arange(10).repeat(20)
    images = torch.nn.functional.one_hot(labels).to(torch.uint8) * 255
    assert nielsen_runs.score(model, Split(images, labels)) == (100.0, 0)
    # All sevens but one, and half of the threes, are taken for zeros.
    zero = images[0].clone()
    images[labels == 7] = zero
    images[7] = 255 * torch.nn.functional.one_hot(torch.tensor(7), 10).to(torch.uint8)
    images[:100][labels[:100] == 3] = zero
    accuracy, unlearned = nielsen_runs.score(model, Split(images, labels))
    assert accuracy == pytest.approx(100 * (200 - 19 - 10) / 200) and unlearned == 1


def test_rows_whose_epochs_were_cut_are_not_compared(tiny, tmp_path, capsys):
    results = nielsen.main(settings(tmp_path, epochs_scale=0.5))
    verdicts = {row["statistic"]: row["verdict"] for row in results["rows"]}
    assert verdicts["test peak"] == "not comparable"
    assert verdicts["test epoch 1"] != "not comparable"
    assert "not comparable" in capsys.readouterr().out.splitlines()[-1]


def test_verdict_on_norms():
    starts = [0.05, 0.07, 0.09]
    assert reproduction.reproduce_norm("", 1, 0.066, starts).verdict == "reproduced"
    missed = reproduction.reproduce_norm("", 1, 0.1, starts)
    assert missed.verdict == "not reproduced" and "0.05 to 0.09" in missed.reason


def test_norms_are_those_of_the_bias_gradients():
    results = nielsen.reproduce_norms(*DATA.train)
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
        curves = [one_neuron.neuron(cost, s, lr) for s in nielsen.NEURON_STARTS]
        assert (
            reproduction.reproduce_neuron(cost, lr, waits, curves).verdict
            == "reproduced"
        )
        wrong = reproduction.reproduce_neuron(cost, lr, not waits, curves)
        assert wrong.verdict == "not reproduced" and "halves after" in wrong.reason


def test_a_neuron_that_never_learns():
    curves = [
        one_neuron.Curve("quadratic", start, [0, 1], C, [], [], 0.0)
        for start, C in (("good", [1.0, 0.5]), ("bad", [1.0, 0.9]))
    ]
    waits = reproduction.reproduce_neuron("quadratic", 0.15, True, curves)
    assert waits.verdict == "reproduced" and waits.values == [1, None]
    at_once = reproduction.reproduce_neuron("quadratic", 0.15, False, curves)
    assert at_once.verdict == "not reproduced" and "after never" in at_once.reason
    curves[0] = curves[1]
    assert reproduction.reproduce_neuron("quadratic", 0.15, True, curves).verdict == (
        "not reproduced"
    )


def test_verdict_on_the_number_of_examples(monkeypatch):
    sizes = tuple(dataclasses.replace(TINY, examples=n) for n in (10, 20, 40))
    monkeypatch.setattr(nielsen, "SIZES", sizes)

    def result(ends, is_cut=False):
        runs = {
            t: [nielsen_runs.Run(t, 0, [0.0, end], [0, 0], 0.1)]
            for t, end in zip(sizes, ends, strict=True)
        }
        return reproduction.reproduce_growth(runs, is_cut)

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
    everything = nielsen.plan(nielsen.NielsenSettings())
    assert len(everything) == len(set(everything)) == 22
    epochs = sum(training.epochs for training in everything)
    assert epochs == 690
    assert all(training.examples % 10 == 0 for training in everything)
    chapters = [
        nielsen.plan(nielsen.NielsenSettings(chapter=c)) for c in ("1", "3", "5")
    ]
    assert set(everything) == set().union(*chapters)


def test_lines_fit_the_terminal():
    runs = {
        cut: [
            nielsen_runs.Run(cut, s, [10.0] * cut.epochs, [9] * cut.epochs, 1.0)
            for s in range(2)
        ]
        for cut in nielsen.plan(nielsen.NielsenSettings())
    }
    found = [
        reproduction.reproduce_accuracy(row, runs[row.training], False)
        for row in nielsen.ROWS
    ]
    found.append(
        reproduction.reproduce_growth({t: runs[t] for t in nielsen.SIZES}, False)
    )
    lines = nielsen.table(found).splitlines()
    assert max(map(len, lines)) <= 100
    assert sum(line.startswith("chapter") for line in lines) >= 3


def test_an_interrupt_keeps_what_was_trained(tiny, tmp_path, capsys, monkeypatch):
    real, calls = nielsen_runs.train, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(nielsen_runs, "train", interrupted)
    options = ["--workers", "1", "--name", "one", "--logdir", str(tmp_path)]
    assert nielsen.command_line(options) == 130
    assert capsys.readouterr().err == "interrupted\n"
    written = json.loads((tmp_path / "one" / "results.json").read_text())
    assert len(written["runs"]) == 2 and "verdict" not in written


@pytest.mark.parametrize("line", ["in all", "[  1/"])
def test_ctrl_c_ends_the_processes(mnist_root, tmp_path, line):
    """The script on MNIST with two workers, interrupted as a terminal does it, while
    they start and while they are at work."""
    options = "--chapter 5 --workers 2 --epochs-scale 0.01 --seeds 100".split()
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *options, "--logdir", str(tmp_path)],
        env={**os.environ, "TORCHBP_DATA": str(mnist_root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    while line not in process.stdout.readline():
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    # To its end, and so to that of all who hold the other end of the pipes.
    _, err = process.communicate(timeout=processes.LIMIT)
    assert process.returncode == 130
    assert err.splitlines() == ["interrupted"]
