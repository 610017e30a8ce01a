"""Several processes: the same trajectory, one log, and an end together."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path

import bounds
import processes
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


def launch(*options):
    """The main job under torchrun in two processes, talking over the loopback."""
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    job = ROOT / "experiments" / "mnist.py"
    environment = {"GLOO_SOCKET_IFNAME": "lo"}
    return processes.start(sys.executable, *torchrun, job, *options, env=environment)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of a run of two processes under torchrun, and their output."""
    root = tmp_path_factory.mktemp("two")
    process = launch(*small(root, "many"))
    out, err = processes.finish(process)
    assert process.returncode == 0, err
    return root / "many", out


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The folder of the same run of one process."""
    root = tmp_path_factory.mktemp("one")
    train_alone(root, "one")
    return root / "one"


def small(tmp_path, name, batch_size=7):
    sizes = ["--sizes", 784, 12, 10, "--batch-size", batch_size, "--lr", 0.1]
    where = ["--logdir", tmp_path, "--name", name]
    return ["--dataset", "digits", "--epochs", 2, *sizes, *where]


def train_alone(tmp_path, name, *options):
    arguments = [*small(tmp_path, name), *options]
    assert mnist.command_line([str(a) for a in arguments]) == 0


def weights(folder):
    state = checkpoint.load(folder / "checkpoint.pt")["trainer"]
    return torch.cat([t.flatten() for t in state["model"].values()]), state


def check_same_steps(folder, out, alone, number):
    (many, state), (one, expected) = weights(folder), weights(alone)
    assert (many - one).norm() / one.norm() < bounds.trained(STEPS)
    assert torch.equal(state["generator"], expected["generator"])
    assert len(re.findall(r"^epoch \d/2", out, flags=re.MULTILINE)) == 3
    assert f"cpu x {number}" in out


def test_two_processes_under_torchrun_take_the_same_steps(two, one):
    """1,297 images in batches of 7: the last batch has 2."""
    check_same_steps(*two, one, 2)


def test_any_number_of_processes_takes_the_same_steps(driver, tmp_path, one):
    """At three processes one of them is left without a row of the last batch."""
    answer = driver.run(*small(tmp_path, "three"), processes=3)
    assert answer["status"] == 0, answer["err"]
    check_same_steps(tmp_path / "three", answer["out"], one, 3)


def test_one_log_with_the_costs_of_whole_batches(two, one):
    running = []
    for folder in (two[0], one):
        files = [p for p in folder.iterdir() if p.name.startswith("events")]
        assert len(files) == 1
        events = EventAccumulator(str(folder))
        events.Reload()
        running.append([e.value for e in events.Scalars("cost/running")])
    assert running[0] == pytest.approx(
        running[1], **bounds.relative(bounds.trained(STEPS))
    )
    versions = json.loads((two[0] / "versions.json").read_text())
    assert versions["processes"] == "2"


def test_resume_in_another_number_of_processes(driver, tmp_path):
    train_alone(tmp_path, "one", "--epochs", 3)
    train_alone(tmp_path, "two", "--epochs", 1)
    resume = ["--resume", tmp_path / "two", "--epochs", 3]
    answer = driver.run(*resume, processes=2)
    assert answer["status"] == 0, answer["err"]
    (two, state), (one, _) = weights(tmp_path / "two"), weights(tmp_path / "one")
    assert state["epoch"] == 3
    assert (two - one).norm() / one.norm() < bounds.trained(STEPS)


def test_a_process_that_dies_ends_all_and_the_run_can_be_resumed(tmp_path):
    process = launch(*small(tmp_path, "two"), "--epochs", 5000)
    processes.read_until(process, "epoch    2/")
    (victim,) = workers(process.pid, rank=1)
    os.kill(victim, signal.SIGKILL)
    _, err = processes.finish(process)
    assert process.returncode != 0
    assert "process 0: error: another of the 2 processes was lost" in err or (
        "stopped; to continue: --resume" in err
    )
    _, state = weights(tmp_path / "two")
    assert state["epoch"] >= 2
    assert not [p for p in (tmp_path / "two").iterdir() if p.name.startswith(".")]
    resumed = mnist.resume(str(tmp_path / "two"), epochs=state["epoch"] + 1)
    assert resumed["epoch"] == state["epoch"] + 1


def test_the_explicit_engine_is_for_one_process(driver, tmp_path):
    answer = driver.run(*small(tmp_path, "two"), "--engine", "explicit", processes=2)
    assert answer["status"] == 2
    assert "error: engine: expected autograd for several processes" in answer["err"]
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


def test_sharded_networks_have_the_gradients_of_whole_ones(driver):
    """FSDP2, a column-wise layer alone, and a column-wise before a row-wise one."""
    answer = driver.run(program="tests/distributed_worker.py", processes=2)
    assert answer["status"] == 0, answer["err"]
    checked = [line.split(":")[0] for line in answer["out"].splitlines()]
    assert checked == ["fsdp", "colwise", "rowwise"]
