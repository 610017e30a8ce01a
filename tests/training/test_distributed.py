"""Several processes: the same trajectory, one log, and an end together."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import bounds
import pytest
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments import mnist
from torchbp.training import checkpoint

ROOT = Path(__file__).parents[2]
STEPS = 3 * 186  # three epochs of 1,297 digits in batches of 7
pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available() and sys.platform == "linux"),
    reason="needs torch.distributed with gloo, on Linux",
)


def launch(*program, processes=2):
    """`program` under torchrun, talking over the loopback interface."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [*command, "--nproc-per-node", str(processes), *map(str, program)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def train(tmp_path, name, *options, processes=2):
    """The main job on the digits in several processes; its output."""
    job = [ROOT / "experiments" / "mnist.py", *small(tmp_path, name), *options]
    process = launch(*job, processes=processes)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out


def small(tmp_path, name, batch_size=7):
    sizes = ["--sizes", 784, 12, 10, "--batch-size", batch_size, "--lr", 0.1]
    where = ["--logdir", tmp_path, "--name", name]
    return ["--dataset", "digits", "--epochs", 2, *sizes, *where]


def train_alone(tmp_path, name, *options):
    arguments = [*small(tmp_path, name), *options]
    assert mnist.command_line([str(a) for a in arguments]) == 0


def weights(tmp_path, name):
    state = checkpoint.load(tmp_path / name / "checkpoint.pt")["trainer"]
    return torch.cat([t.flatten() for t in state["model"].values()]), state


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_takes_the_same_steps(tmp_path, processes):
    """1,297 images in batches of 7: the last batch has 2, and at three processes one
    of them is left without a row."""
    out = train(tmp_path, "many", processes=processes)
    train_alone(tmp_path, "one")
    (many, state), (one, expected) = weights(tmp_path, "many"), weights(tmp_path, "one")
    assert (many - one).norm() / one.norm() < bounds.trained(STEPS)
    assert torch.equal(state["generator"], expected["generator"])
    assert len(re.findall(r"^epoch \d/2", out, flags=re.MULTILINE)) == 3
    assert f"cpu x {processes}" in out


def test_one_log_with_the_costs_of_whole_batches(tmp_path):
    train(tmp_path, "two")
    train_alone(tmp_path, "one")
    running = []
    for name in ("two", "one"):
        files = [p for p in (tmp_path / name).iterdir() if p.name.startswith("events")]
        assert len(files) == 1
        events = EventAccumulator(str(tmp_path / name))
        events.Reload()
        running.append([e.value for e in events.Scalars("cost/running")])
    assert running[0] == pytest.approx(
        running[1], **bounds.relative(bounds.trained(STEPS))
    )
    versions = json.loads((tmp_path / "two" / "versions.json").read_text())
    assert versions["processes"] == "2"


def test_resume_in_another_number_of_processes(tmp_path):
    train_alone(tmp_path, "one", "--epochs", 3)
    train_alone(tmp_path, "two", "--epochs", 1)
    job = ROOT / "experiments" / "mnist.py"
    process = launch(job, "--resume", tmp_path / "two", "--epochs", "3")
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    (two, state), (one, _) = weights(tmp_path, "two"), weights(tmp_path, "one")
    assert state["epoch"] == 3
    assert (two - one).norm() / one.norm() < bounds.trained(STEPS)


def test_a_process_that_dies_ends_all_and_the_run_can_be_resumed(tmp_path):
    job = [ROOT / "experiments" / "mnist.py", *small(tmp_path, "two")]
    process = launch(*job, "--epochs", "5000")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch    2/"):
            break
    (victim,) = workers(process.pid, rank=1)
    os.kill(victim, signal.SIGKILL)
    started = time.monotonic()
    _, err = process.communicate(timeout=150)
    assert time.monotonic() - started < 120
    assert process.returncode != 0
    assert "process 0: error: another of the 2 processes was lost" in err or (
        "stopped; to go on: --resume" in err
    )
    _, state = weights(tmp_path, "two")
    assert state["epoch"] >= 2
    assert not [p for p in (tmp_path / "two").iterdir() if p.name.startswith(".")]
    resumed = mnist.resume(str(tmp_path / "two"), epochs=state["epoch"] + 1)
    assert resumed["epoch"] == state["epoch"] + 1


def test_the_explicit_engine_is_for_one_process(tmp_path):
    job = [ROOT / "experiments" / "mnist.py", *small(tmp_path, "two")]
    process = launch(*job, "--engine", "explicit")
    _, err = process.communicate(timeout=150)
    assert process.returncode != 0
    assert "error: engine: expected autograd for several processes" in err
    assert not list(tmp_path.iterdir())


def workers(parent: int, rank: int) -> list[int]:
    """The children of torchrun that have this rank in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            stat = (path / "stat").read_text().rpartition(")")[2].split()
            environment = (path / "environ").read_bytes().split(b"\0")
        except OSError:  # gone, or another user's
            continue
        if int(stat[1]) == parent and f"RANK={rank}".encode() in environment:
            found.append(int(path.name))
    return found


@pytest.mark.parametrize("name", ["fsdp", "colwise", "rowwise"])
def test_sharded_networks_have_the_gradients_of_whole_ones(name):
    process = launch(ROOT / "tests" / "distributed_worker.py", name)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
