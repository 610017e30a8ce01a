"""Runs that earlier versions of the package made are resumed and read.

The folder `fixtures/run_0_1_0` was written by version 0.1.0 on torch 2.14:
``mnist.py --dataset digits --sizes 784 2 10 --epochs 2 --log-level basic``.
"""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from drawings import draw
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments import mnist, predict
from torchbp.training.dashboard.chart import draw_learning

RUN_0_1_0 = Path(__file__).parents[1] / "fixtures" / "run_0_1_0"


@pytest.fixture
def run_0_1_0(tmp_path):
    return Path(shutil.copytree(RUN_0_1_0, tmp_path / "run"))


def test_torch_opens_an_earlier_checkpoint():
    saved = torch.load(RUN_0_1_0 / "checkpoint.pt", weights_only=True)
    weights = saved["state"]["trainer"]["model"]
    assert weights["layers.0.weight"].shape == (2, 784)


@pytest.mark.parametrize("engine", ["autograd", "explicit"])
def test_an_earlier_run_is_resumed(capsys, run_0_1_0, engine):
    """Its steps are epochs, and stay so: its curves remain one curve, each point once,
    after a second resume, too."""
    command = ["--resume", str(run_0_1_0), "--engine", engine, "--json"]
    assert mnist.command_line([*command, "--epochs", "4"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["epoch"] for line in lines] == [3, 4, 4]
    more = ["--epochs", "5", "--log-level", "full"]
    assert mnist.command_line([*command, *more]) == 0
    events = EventAccumulator(str(run_0_1_0), {"images": 0}).Reload()
    assert [e.step for e in events.Scalars("accuracy/test")] == [0, 1, 2, 3, 4, 5]
    assert [e.step for e in events.Scalars("cost/running")] == [1, 2, 3, 4, 5]
    assert [e.step for e in events.Scalars("delta_norm/layer_1")] == list(range(6))
    caption = events.SummaryMetadata("pictures/learning").summary_description
    assert caption.endswith(" Step: epochs.")
    (drawn,) = events.Images("pictures/learning")
    curves = {
        layer: {e.step: e.value for e in events.Scalars(f"delta_norm/layer_{layer}")}
        for layer in (1, 2)
    }
    expected = io.BytesIO()
    draw_learning(curves, "epochs").save(expected, "PNG", compress_level=3)
    assert drawn.encoded_image_string == expected.getvalue()


def test_an_earlier_run_predicts(capsys, run_0_1_0, tmp_path):
    draw(3).save(tmp_path / "three.png")
    command = [str(run_0_1_0), str(tmp_path / "three.png"), "--json"]
    assert predict.command_line(command) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["digit"] in range(10)
