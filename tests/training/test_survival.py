"""Runs of the main job that are killed, interrupted, starved of disk and locked out:
the next session continues, and ends with the bits of a run that nothing happened to.

The sessions are real runs of ``experiments/mnist.py``, in processes that
``survival_driver.py`` forks after the imports, so that there can be many.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import processes
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from experiments import mnist
from experiments.support.settings import ENGINES
from torchbp.training import checkpoint
from torchbp.training.checkpoint import CheckpointError
from torchbp.training.run_folder import RunFolder

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

ROOT = Path(__file__).parents[2]
SMALL = "--dataset digits --sizes 784 12 10 --batch-size 100 --log-level basic".split()
SAVING = ["open", "fsync", "link", "replace", "unlink"]
NOBODY = 65534
TORCH_CALLS = "--kernel", "torch"  # another user has no compiled loops

engines = pytest.mark.parametrize("engine", ENGINES)


def start(driver, folder, engine, epochs, *options, **order):
    folder.parent.mkdir(exist_ok=True)
    where = ["--logdir", folder.parent, "--name", folder.name]
    options = [*SMALL, "--engine", engine, "--epochs", epochs, *options, *where]
    return driver.run(*options, **order)


@pytest.fixture(scope="module")
def undisturbed(driver, tmp_path_factory):
    """Gives the folder of a run of so many epochs that nothing happened to."""
    made = {}

    def give(engine, epochs, *options):
        key = (engine, epochs, *options)
        if key not in made:
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            answer = start(driver, folder, engine, epochs, *options)
            assert (answer["status"], answer["err"]) == (0, "")
            made[key] = folder
        return made[key]

    return give


def prepared(undisturbed, tmp_path, engine, *options):
    """A copy of a finished run of two epochs."""
    folder = tmp_path / "runs" / "run"
    shutil.copytree(undisturbed(engine, 2, *options), folder)
    return folder


def steps_of(folder):
    """The steps that TensorBoard shows, by tag; each once, and in order."""
    events = EventAccumulator(str(folder), {"scalars": 0, "histograms": 0, "images": 0})
    events.Reload()
    tags = events.Tags()
    steps = {tag: [e.step for e in events.Scalars(tag)] for tag in tags["scalars"]}
    steps |= {t: [e.step for e in events.Histograms(t)] for t in tags["histograms"]}
    steps |= {tag: [e.step for e in events.Images(tag)] for tag in tags["images"]}
    for tag, found in steps.items():
        assert found == sorted(set(found)), f"{tag}: {found}"
    # The accumulator leaves superseded texts beside those that took their place.
    steps |= {tag: sorted({e.step for e in events.Tensors(tag)})
              for tag in tags["tensors"]}  # fmt: skip
    return steps


def assert_same(a, b, where="state"):
    """Nested dicts and lists whose tensors agree bit by bit."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape, where
        assert a.numpy().tobytes() == b.numpy().tobytes(), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    else:
        assert a == b, where


def assert_undisturbed(folder, reference):
    """`folder` is what it would be had nothing happened, but for its event files."""
    states = [checkpoint.load(f / "checkpoint.pt") for f in (folder, reference)]
    assert_same(*(state["trainer"] for state in states))
    assert checkpoint.load(folder / "checkpoint.previous.pt")
    assert steps_of(folder) == steps_of(reference)
    names = [sorted({p.name.split(".tf")[0] for p in f.iterdir()})
             for f in (folder, reference)]  # fmt: skip
    assert names[0] == names[1]


def assert_whole(folder):
    """After a kill: a whole checkpoint, and events that can be read."""
    assert RunFolder(folder).load()[0]["trainer"]["epoch"] >= 0
    assert steps_of(folder)


def run_until_done(driver, folder, engine, epochs, happenings, *options):
    """Start `folder`, and resume it until it is done; each session has its happening.

    Returns:
        how many sessions there were.
    """
    for sessions, order in enumerate([*happenings, {}], start=1):
        if (folder / "settings.json").exists():
            answer = driver.run("--resume", folder, **order)
        else:  # stopped before there was anything: the user starts again
            shutil.rmtree(folder, ignore_errors=True)
            answer = start(driver, folder, engine, epochs, *options, **order)
        if answer["status"] == 0:
            return sessions
        assert answer["status"] == -signal.SIGKILL, answer
        if (folder / "settings.json").exists() and not RunFolder(folder).never_began:
            assert_whole(folder)
    pytest.fail("expected the last session to come to the end")


@pytest.mark.parametrize(("engine", "every"), [("explicit", 1), ("autograd", 4)])
def test_a_kill_before_any_call_of_a_session(
    driver, undisturbed, tmp_path, engine, every
):
    """Any call of a session that saves once: those of its lock, settings and save."""
    reference = undisturbed(engine, 3)
    for at in range(1, 1000, every):
        folder = prepared(undisturbed, tmp_path, engine)
        resume = ["--resume", folder, "--epochs", 3]
        order = {"moments": SAVING, "at": at, "happening": "tear"}
        killed = driver.run(*resume, **order)
        if killed["status"] == 0:
            break
        assert killed["status"] == -signal.SIGKILL
        assert_whole(folder)
        ended = driver.run(*resume)
        assert (ended["status"], ended["err"]) == (0, "")
        assert_undisturbed(folder, reference)
        shutil.rmtree(folder)
    assert at > 20, "expected the calls of two settings files and of a checkpoint"
    assert_undisturbed(folder, reference)


@engines
def test_kills_at_random_calls(driver, undisturbed, tmp_path, engine):
    """A run from its first moment on, killed in saves and within records of events."""
    generator = random.Random(f"calls {engine}")
    happenings = [
        {"happening": "tear", "at": generator.randint(1, 90)} for _ in range(14)
    ]
    folder = tmp_path / "runs" / "run"
    run_until_done(driver, folder, engine, 5, happenings)
    assert_undisturbed(folder, undisturbed(engine, 5))


@engines
def test_kills_at_random_times(driver, undisturbed, tmp_path, engine):
    generator = random.Random(f"times {engine}")
    happenings = [{"at": {"seconds": generator.uniform(0, 0.3)}} for _ in range(10)]
    folder = tmp_path / "runs" / "run"
    run_until_done(driver, folder, engine, 5, happenings)
    assert_undisturbed(folder, undisturbed(engine, 5))


@pytest.mark.slow
@engines
@pytest.mark.parametrize("happening", ["kill", "tear"])
def test_a_kill_before_any_call_of_a_run(
    driver, undisturbed, tmp_path, engine, happening
):
    """From the first moment on, events included, with all that TensorBoard can get."""
    full = ("--log-level", "full")
    reference, folder = undisturbed(engine, 2, *full), tmp_path / "runs" / "run"
    for at in range(1, 10_000):
        order = [{"happening": happening, "at": at}]
        sessions = run_until_done(driver, folder, engine, 2, order, *full)
        assert_undisturbed(folder, reference)
        shutil.rmtree(folder)
        if sessions == 1:
            break
    assert at > 40, "expected the calls of three saves and of four writes of events"


@pytest.mark.slow
@engines
def test_many_kills_at_random_times(driver, undisturbed, tmp_path, engine):
    generator = random.Random(f"many times {engine}")
    for i in range(10):
        happenings = [{"at": {"seconds": generator.uniform(0, 0.4)}} for _ in range(20)]
        folder = tmp_path / "runs" / f"run-{i}"
        run_until_done(driver, folder, engine, 8, happenings)
        assert_undisturbed(folder, undisturbed(engine, 8))


@pytest.mark.slow
@engines
def test_kills_while_it_learns_mnist(driver, tmp_path, mnist_root, engine):
    options = "--dataset mnist --sizes 784 30 10 --log-level full --data".split()
    options.append(str(mnist_root))
    seconds = {"explicit": 2.0, "autograd": 15.0}[engine]
    generator = random.Random(f"mnist {engine}")
    happenings = [{"at": {"seconds": generator.uniform(0, seconds)}} for _ in range(12)]
    folder, reference = tmp_path / "runs" / "run", tmp_path / "whole" / "run"
    assert start(driver, reference, engine, 4, *options)["status"] == 0
    run_until_done(driver, folder, engine, 4, happenings, *options)
    assert_undisturbed(folder, reference)


@pytest.mark.parametrize(("happening", "status"), [("int", 130), ("term", 143)])
def test_a_signal_is_a_clean_end(driver, undisturbed, tmp_path, happening, status):
    """At any call: no leftovers, not even before the next session, and nothing lost."""
    generator = random.Random(happening)
    folder = tmp_path / "runs" / "run"
    reference = undisturbed("explicit", 3)
    length = undisturbed_calls(driver, tmp_path)
    for at in sorted(generator.sample(range(1, length), 6)):
        order = {"happening": happening, "at": at}
        stopped = start(driver, folder, "explicit", 3, **order)
        assert stopped["status"] == status, (at, stopped)
        if folder.exists():
            assert not [p for p in folder.iterdir() if p.name.startswith(".")]
            is_told = f"--resume {folder}" in stopped["err"]
            assert is_told or RunFolder(folder).never_began or is_complete(folder, 3)
            resumed = driver.run("--resume", folder)
        else:  # it never began
            resumed = start(driver, folder, "explicit", 3)
        assert resumed["status"] == 0
        assert_undisturbed(folder, reference)
        shutil.rmtree(folder)


@pytest.mark.slow
@engines
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_at_random_times(driver, undisturbed, tmp_path, engine, number):
    generator = random.Random(f"{number} {engine}")
    folder, seen = tmp_path / "runs" / "run", set()
    for _ in range(40):
        seconds = generator.uniform(0, 0.4)
        at = {"exists": str(folder), "seconds": seconds, "signal": number}
        stopped = start(driver, folder, engine, 5, at=at)
        seen.add(stopped["status"])
        assert stopped["status"] in (0, 128 + number), (seconds, stopped)
        if folder.exists():
            assert not [p for p in folder.iterdir() if p.name.startswith(".")]
            assert driver.run("--resume", folder)["status"] == 0
            assert_undisturbed(folder, undisturbed(engine, 5))
            shutil.rmtree(folder)
    assert 128 + number in seen


def is_complete(folder, epochs):
    return RunFolder(folder).load()[0]["trainer"]["epoch"] == epochs


def undisturbed_calls(driver, tmp_path):
    return start(driver, tmp_path / "other" / "run", "explicit", 3)["calls"]


def assert_stopped(answer, folder, reason, epoch):
    """One line, status 2, and the last checkpoint as it was."""
    assert answer["status"] == 2, answer
    line = answer["err"].strip()
    assert "\n" not in line and line.startswith("error: ") and reason in line, line
    assert RunFolder(folder).load()[1] is None
    state = checkpoint.load(folder / "checkpoint.pt")
    assert state["trainer"]["epoch"] == epoch
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]
    assert steps_of(folder)


@pytest.mark.parametrize("at", [2, 14, 24, 25, 27])
def test_a_disk_that_is_full_from_some_call_on(driver, undisturbed, tmp_path, at):
    folder = prepared(undisturbed, tmp_path, "explicit")
    resume = ["--resume", folder, "--epochs", 3]
    answer = driver.run(*resume, happening="full", at=at)
    assert_stopped(answer, folder, "No space left on device", epoch=2)
    assert driver.run(*resume)["status"] == 0
    assert_undisturbed(folder, undisturbed("explicit", 3))


def test_a_quota_on_the_size_of_files(driver, tmp_path):
    """The checkpoint does not fit, while the events still do."""
    wide = ("--sizes", "784", "64", "10")
    folder = tmp_path / "runs" / "run"
    first = start(driver, folder, "explicit", 1, *wide)
    assert first["status"] == 0
    resume = ["--resume", folder, "--epochs", 2]
    answer = driver.run(*resume, largest=150_000)
    assert_stopped(answer, folder, "File too large", epoch=1)
    assert f"--resume {folder}" in answer["err"]
    assert driver.run(*resume)["status"] == 0


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 300 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    options = ["-t", "tmpfs", "-o", "size=300k", "tmpfs", place]
    mounted = processes.run("mount", *options)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount: {mounted.stderr.strip()}")
    yield place
    assert processes.run("umount", place).returncode == 0


@pytest.mark.skipif(shutil.which("mount") is None, reason="needs mount")
def test_a_small_disk(driver, undisturbed, tmp_path, small_disk):
    folder = small_disk / "runs" / "run"
    assert start(driver, folder, "explicit", 2)["status"] == 0
    resume = ["--resume", folder, "--epochs", 3]
    used = sum(p.stat().st_blocks * 512 for p in small_disk.rglob("*") if p.is_file())
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(300 * 1024 - used - 3 * 4096 - 8 * 4096))
    answer = driver.run(*resume)
    assert_stopped(answer, folder, "No space left on device", epoch=2)
    ballast.unlink()
    assert driver.run(*resume)["status"] == 0
    assert_undisturbed(folder, undisturbed("explicit", 3))


@pytest.fixture
def open_folder():
    """A folder that every user can reach, and as whom permissions bind: root itself
    passes them by."""
    place = Path(tempfile.mkdtemp(prefix="torchbp-survival-"))
    place.chmod(0o777)
    yield place, NOBODY if os.geteuid() == 0 else None
    for path in [place, *place.rglob("*")]:
        with contextlib.suppress(FileNotFoundError):
            path.chmod(0o777)
    shutil.rmtree(place)


def test_a_run_folder_that_is_read_only(driver, undisturbed, open_folder):
    place, user = open_folder
    folder = prepared(undisturbed, place, "explicit", *TORCH_CALLS)
    for path in [*folder.iterdir(), folder]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    answer = driver.run("--resume", folder, "--epochs", 3, user=user)
    assert_stopped(answer, folder, "Permission denied", epoch=2)
    assert before == {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_run_folder_that_becomes_read_only(driver, undisturbed, open_folder):
    place, user = open_folder
    folder = place / "runs" / "run"
    folder.parent.mkdir()
    folder.parent.chmod(0o777)
    first = start(driver, folder, "explicit", 2, *TORCH_CALLS, user=user)
    assert first["status"] == 0, first
    resume = ["--epochs", 3, "--resume", folder]
    order = {"happening": "read-only", "at": 25, "user": user}
    assert_stopped(driver.run(*resume, **order), folder, "Permission denied", epoch=2)
    for path in [folder, *folder.iterdir()]:
        path.chmod(0o777)
    assert driver.run(*resume, user=user)["status"] == 0
    assert_undisturbed(folder, undisturbed("explicit", 3, *TORCH_CALLS))


@pytest.mark.parametrize("at", [25, 26, 31])
def test_a_log_folder_that_is_deleted_underway(driver, undisturbed, tmp_path, at):
    folder = prepared(undisturbed, tmp_path, "explicit")
    answer = driver.run(
        "--epochs", 3, "--resume", folder, happening="gone", at=at
    )  # fmt: skip
    assert answer["status"] == 2, answer
    line = answer["err"].strip()
    assert "\n" not in line and f"{folder}: the run cannot be written" in line
    assert "No such file or directory" in line and "no checkpoint is left" in line
    assert not folder.exists()


def test_a_file_system_without_hard_links(driver, undisturbed, tmp_path):
    folder = tmp_path / "runs" / "run"
    answer = start(driver, folder, "explicit", 3, happening="no links", at=1)
    assert answer["status"] == 0
    assert_undisturbed(folder, undisturbed("explicit", 3))
    # Killed where only the previous one has its name: it goes on from that.
    os.replace(folder / "checkpoint.pt", folder / "checkpoint.previous.pt")
    answer = driver.run("--resume", folder, "--epochs", 5)
    assert answer["status"] == 0
    assert (
        f"NOTE: {folder / 'checkpoint.pt'}: no such checkpoint; continuing"
        in answer["err"]
    )
    assert_undisturbed(folder, undisturbed("explicit", 5))


def test_two_processes_on_one_run(driver, tmp_path):
    """The second is refused while the first lives, and not when it was killed."""
    command = [sys.executable, mnist.__file__, *SMALL, "--epochs", 100_000]
    folder = tmp_path / "run"
    where = ["--logdir", tmp_path, "--name", "run"]
    with processes.start(*command, *where, stderr=None) as first:
        processes.read_until(first, "epoch      1/")
        try:
            second = driver.run("--resume", folder)
        finally:
            first.kill()
    assert second["status"] == 2
    line = second["err"].strip()
    assert "\n" not in line and f"got {folder}, which another process has" in line
    assert_whole(folder)
    epoch = RunFolder(folder).load()[0]["trainer"]["epoch"]
    third = driver.run("--resume", folder, "--epochs", epoch + 1)
    assert third["status"] == 0
    # 1,297 images in batches of 100 are 13 mini-batches.
    assert steps_of(folder)["cost/test"] == list(range(0, 13 * (epoch + 2), 13))
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("damage", ["flip", "cut", "wrong shapes"])
def test_the_checkpoint_before_a_damaged_one(driver, undisturbed, tmp_path, damage):
    folder = prepared(undisturbed, tmp_path, "explicit")
    newest = folder / "checkpoint.pt"
    content = bytearray(newest.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    elif damage == "cut":
        del content[-1000:]
    else:
        state = checkpoint.load(newest)
        state["trainer"]["model"]["layers.0.bias"] = torch.zeros(3)
        checkpoint.save(newest, state)
        content = newest.read_bytes()
    newest.write_bytes(content)
    answer = driver.run("--resume", folder, "--epochs", 3)
    assert answer["status"] == 0
    assert answer["err"].count("\n") == 1
    assert answer["err"].startswith(f"NOTE: {newest}: expected a ")
    before = folder / "checkpoint.previous.pt"
    assert f"continuing from {before}, epoch 1" in answer["err"]
    aside = folder / "checkpoint.damaged.pt"
    assert aside.read_bytes() == content
    aside.unlink()
    assert_undisturbed(folder, undisturbed("explicit", 3))


def test_both_checkpoints_damaged(driver, undisturbed, tmp_path):
    folder = prepared(undisturbed, tmp_path, "explicit")
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (folder / name).write_bytes(b"spoilt")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    answer = driver.run("--resume", folder, "--epochs", 3)
    assert answer["status"] == 2
    line = answer["err"].strip()
    assert "\n" not in line and line.startswith("error: ")
    assert all(str(folder / name) in line for name in before if "check" in name)
    assert before == {p.name: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(CheckpointError):
        RunFolder(folder).load()
