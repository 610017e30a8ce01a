"""What the experiments share: exit status, errors on a line, claims, folder, figure."""

from __future__ import annotations

import importlib
import json
import sys
import typing

import pytest
import torch

import torchbp
from experiments.support import reporting
from experiments.support.options import run_experiment
from torchbp import data

NAMES = (
    "why_backprop",
    "batching",
    "learning_slowdown",
    "vanishing_gradient",
    "nielsen",
)


def experiment(name):
    return importlib.import_module(f"experiments.{name}")


def settings_of(script):
    """The class of the settings that the script's main takes."""
    return typing.get_type_hints(script.main)["settings"]


@pytest.mark.parametrize("name", NAMES)
def test_exit_status(name, tmp_path, capsys, monkeypatch):
    script, received = experiment(name), []
    defaults = settings_of(script)()
    options = ["--seed", "3", "--logdir", str(tmp_path)]

    def main(settings):
        received.append(settings)
        if isinstance(outcome, bool):
            return {"shown": outcome}
        raise outcome

    def run(script_main, *rest):
        assert script_main is script.main
        return run_experiment(main, *rest)

    monkeypatch.setattr(reporting, "run_experiment", run)
    for result, status, said in (
        (True, 0, ""),
        (False, 1, ""),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (data.DataError("no data\nin here"), 2, "error: no data in here\n"),
        (OSError("disk full"), 2, "error: disk full\n"),
    ):
        outcome = result
        assert script.command_line(options) == status
        assert capsys.readouterr().err == said
    assert all(settings.seed == 3 for settings in received)
    outcome = True
    script.command_line(["--quick"])
    quick = vars(received[-1])
    assert script.QUICK.items() <= quick.items()
    assert vars(defaults) | script.QUICK | {"quick": True} == quick


SHARED = (
    ("--seed -1", "seed: expected 0 to 2^63 - 1, got -1"),
    ("--seed two", "invalid int value: 'two'"),
    ("--name a/b", "name: expected a plain folder name"),
    ("--name ..", "name: expected a plain folder name"),
    ("--nonsense 3", "unrecognized arguments"),
)
OWN = {
    "why_backprop": (
        ("--sizes 3 2", "sizes: expected two networks or more"),
        ("--sizes 3 2 --sizes 3 2", "sizes: expected two networks or more"),
        ("--sizes 3 --sizes 4 2", "sizes: expected at least two, got [3]"),
        ("--sizes 3 0 --sizes 4 2", "sizes: expected positive integers"),
        ("--repeats 0", "repeats: expected at least 1, got 0"),
    ),
    "batching": (
        ("--draws 1", "draws: expected at least 2, got 1"),
        ("--batch-size 0", "batch_size: expected at least 1, got 0"),
        ("--dataset cifar", "invalid choice: 'cifar'"),
    ),
    "learning_slowdown": (
        ("--steps 0", "steps: expected at least 1, got 0"),
        ("--steps 4 --every 5", "every: expected at most steps, 4, got 5"),
        ("--saturation inf", "saturation: expected at least 0, got inf"),
        ("--dataset cifar", "invalid choice: 'cifar'"),
    ),
    "vanishing_gradient": (
        ("--depth 2", "depth: expected at least 3, got 2"),
        ("--epochs 0", "epochs: expected at least 1, got 0"),
        ("--lr nan", "lr: expected at least 0, got nan"),
        ("--dataset cifar", "invalid choice: 'cifar'"),
    ),
    "nielsen": (
        ("--seeds 0", "seeds: expected at least 1, got 0"),
        ("--epochs-scale 2", "epochs_scale: expected above 0 to 1, got 2.0"),
        ("--epochs-scale nan", "epochs_scale: expected above 0 to 1, got nan"),
        ("--workers -1", "workers: expected at least 0, got -1"),
        ("--chapter 2", "invalid choice: '2'"),
        ("--engine magic", "invalid choice: 'magic'"),
    ),
}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [(name, *case) for name in NAMES for case in (*SHARED, *OWN[name])],
)
def test_bad_arguments(name, options, message, tmp_path, capsys, monkeypatch):
    one = data.Split(torch.zeros(1, 784, dtype=torch.uint8), torch.zeros(1).long())
    monkeypatch.setattr(reporting.data, "load", lambda *_: data.Splits(one, one, one))
    logdir = ["--logdir", str(tmp_path)]
    assert experiment(name).command_line([*options.split(), *logdir]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [name for name in NAMES if name != "why_backprop"])
def test_without_data_nothing_is_left(name, tmp_path, capsys, monkeypatch):
    def load(_, root):
        raise torchbp.data.DataError(f"no data in {root}")

    monkeypatch.setattr(reporting.data, "load", load)
    options = ["--data", "nowhere", "--logdir", str(tmp_path)]
    assert experiment(name).command_line(options) == 2
    assert capsys.readouterr().err == "error: no data in nowhere\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_the_claim_is_stated_with_its_equation(name):
    stated = reporting.claim_of(experiment(name).__doc__)
    assert stated.startswith("The claim") and "Exit status" not in stated
    equations = {
        "batching": "A1",
        "vanishing_gradient": "BP2",
        "learning_slowdown": "BP4",
    }
    assert equations.get(name, "BP1") in stated
    assert max(map(len, stated.splitlines())) <= 100


CLAIMS = {"water is wet": True, "fire is cold": False}


def conclude(tmp_path, claims=CLAIMS, **measured):
    settings = reporting.CommonSettings(logdir=str(tmp_path), name="one")
    with reporting.ExperimentRun("trial", settings) as run:
        return run.conclude(
            settings,
            measured,
            claims,
            {"a curve/of two": [(0, 1.0), (1, 0.5)]},
            lambda figure: figure.subplots().plot([1, 2]),
            (3, 2),
        )


def test_a_run_prints_and_writes_which_claims_are_shown(tmp_path, capsys):
    results = conclude(tmp_path, figures=[1, 2])
    assert results["figures"] == [1, 2] and not results["shown"]
    lines = capsys.readouterr().out.splitlines()
    assert "shown      water is wet" in lines and "NOT shown  fire is cold" in lines
    assert lines[-1] == results["verdict"] == "verdict: NOT shown: fire is cold"
    written = json.loads((tmp_path / "one" / "results.json").read_text())
    assert written == results and written["settings"]["torchbp"] == torchbp.__version__
    events = importlib.import_module(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator(str(tmp_path / "one"))
    events.Reload()
    assert [p.value for p in events.Scalars("a_curve/of_two")] == [1.0, 0.5]


def test_all_claims_shown(tmp_path):
    results = conclude(tmp_path, {"water is wet": True})
    assert results["shown"] and results["verdict"] == "verdict: shown (1 of 1 claims)"
    with pytest.raises(ValueError, match="claims: expected at least one"):
        reporting.verdict({})


def test_a_figure_is_written_where_matplotlib_is(tmp_path):
    pytest.importorskip("matplotlib")
    conclude(tmp_path)
    content = (tmp_path / "one" / "trial.png").read_bytes()
    assert content[1:4] == b"PNG"
    assert int.from_bytes(content[16:20], "big") == 240  # 3 inches of 80 dots


def test_without_matplotlib_a_line_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    conclude(tmp_path)
    assert 'pip install ".[plots]"' in capsys.readouterr().out
    assert not list((tmp_path / "one").glob("*.png"))


def test_what_was_measured_stays_when_the_reader_leaves(tmp_path, monkeypatch):
    def left(*_, **__):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("builtins.print", left)
    with pytest.raises(BrokenPipeError):
        conclude(tmp_path, figures=[1, 2])
    results = json.loads((tmp_path / "one" / "results.json").read_text())
    assert results["figures"] == [1, 2] and results["claims"] == CLAIMS
