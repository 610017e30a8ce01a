"""What is saved comes back; what is not whole is refused by name."""

from __future__ import annotations

import copy
import errno
import io
import json
import os
import pickle
import shutil
import socket
import stat
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import torchbp
from torchbp._files import TEMPORARY
from torchbp.data.sets import Split, Splits
from torchbp.training import AutogradSGD, Trainer, check_state, checkpoint
from torchbp.training.checkpoint import CheckpointError
from torchbp.training.run_folder import RunFolder

STATE = {"a": torch.arange(6.0).reshape(2, 3), "n": 2, "nested": {"b": [1, None, "c"]}}


def test_what_is_saved_comes_back(tmp_path):
    path = tmp_path / "checkpoint.pt"
    state = {"a": torch.rand(3), "n": 2, "nested": {"b": [1, 2.5, None, "c"]}}
    checkpoint.save(path, state)
    loaded = checkpoint.load(path)
    assert torch.equal(loaded.pop("a"), state.pop("a"))
    assert loaded == state
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"n": 1})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(path, {"n": 2})
    monkeypatch.undo()
    assert checkpoint.load(path) == {"n": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


class Evil:
    def __reduce__(self):
        return print, ("code in a checkpoint ran",)


def damaged():
    buffer = io.BytesIO()
    torch.save(
        {"format": checkpoint.FORMAT, "version": checkpoint.VERSION, "state": {}},
        buffer,
    )
    whole = buffer.getvalue()

    def saved(content):
        buffer = io.BytesIO()
        torch.save(content, buffer)
        checkpoint._seal(buffer)
        return buffer.getvalue()

    def unsealed(content):
        return saved(content)[: -checkpoint.SEAL_SIZE]

    newer = {"format": checkpoint.FORMAT, "version": 99, "state": {}}
    no_state = {"format": checkpoint.FORMAT, "version": 3, "state": 3}
    return {
        "empty": (b"", "expected a whole checkpoint, got an empty file"),
        "truncated": (whole[: len(whole) // 2], "expected a whole checkpoint"),
        "text": (b"epoch 3", "expected a whole checkpoint, got a file of another"),
        "code": (pickle.dumps(Evil()), "expected a whole checkpoint"),
        "torch code": (saved({"state": Evil()}), "expected a checkpoint that torch"),
        "another program's": (unsealed({"model": {}}), "another program's"),
        "another content": (saved({"model": {}}), "got another kind of file"),
        "a tensor": (saved(torch.ones(2)), "got another kind of file"),
        "newer": (saved(newer), "expected version 3, got 99"),
        "older": (saved({**newer, "version": 2}), "expected version 3, got 2"),
        "no version": (saved({**newer, "version": None}), "expected version 3"),
        "no checksum": (whole, "expected a whole checkpoint, got a zip archive"),
        "no state": (saved(no_state), "expected a state inside"),
    }


@pytest.mark.parametrize("kind", list(damaged()))
def test_what_is_not_a_checkpoint_is_refused(tmp_path, kind, capfd):
    content, message = damaged()[kind]
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "ran" not in capfd.readouterr().out


def test_no_file(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        checkpoint.load(tmp_path / "none.pt")


def test_run_folder(tmp_path):
    folder = RunFolder.create(tmp_path / "deep" / "runs", "one")
    folder.write(settings={"lr": 3.0}, versions={"torch": "2"})
    assert json.loads((folder.path / "settings.json").read_text()) == {"lr": 3.0}
    with pytest.raises(
        ValueError, match="exists; choose another, or continue with --resume"
    ):
        RunFolder.create(tmp_path / "deep" / "runs", "one")
    folder.discard()
    assert not folder.path.exists()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../up", "a\0b"])
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="expected a plain folder name"):
        RunFolder.create(tmp_path, name)


def test_a_logdir_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    for logdir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match="logdir: "):
            RunFolder.create(logdir, "one")


@pytest.mark.parametrize("odd", [range(3), torch.__version__, Evil()])
def test_what_could_not_be_loaded_again_is_not_saved(tmp_path, odd):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"n": 1})
    with pytest.raises(TypeError, match="expected tensors, numbers, strings"):
        checkpoint.save(path, {"n": odd})
    assert checkpoint.load(path) == {"n": 1}


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_files_have_the_permissions_of_other_files(tmp_path):
    checkpoint.save(tmp_path / "checkpoint.pt", {})
    (tmp_path / "other").touch()
    modes = {p.stat().st_mode for p in tmp_path.iterdir()}
    assert len(modes) == 1


def same(a, b):
    a, b = dict(a), dict(b)
    return torch.equal(a.pop("a"), b.pop("a")) and a == b


def test_torch_opens_a_checkpoint_as_well(tmp_path):
    """And it is a zip archive like any other."""
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, STATE)
    content = torch.load(path, weights_only=True)
    assert content.keys() == {"format", "version", "state"}
    assert same(content["state"], STATE)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"torchbp sha256 ")


class Sized(dict):
    """A dict of another class."""


class Marked(torch.Tensor):
    """A tensor of another class."""


class Unpicklable:
    def __reduce__(self):
        raise RuntimeError("two\nlines")


def marked(mark):
    tensor = torch.ones(2)
    tensor.mark = mark
    return tensor


def in_a_cycle(value):
    cycle = []
    cycle.append({"again": cycle, "f": value})
    return {"c": cycle}


def deep(levels):
    nest = []
    for _ in range(levels):
        nest = [nest]
    return nest


REFUSED = {
    "a NumPy number": ({"best": np.float64(0.95)}, r"state\['best'\].*numpy.float64"),
    "deep inside": ({"a": [1, {"b": 1 + 2j, "c": object()}]}, r"state\['a'\]\[1\]"),
    "a function": ({"f": len}, r"state\['f'\]"),
    "an object": ({"o": Path("x")}, r"state\['o'\].*Path"),
    "a list": ([1, 2], "state: expected a dict, got list"),
    "None": (None, "state: expected a dict, got NoneType"),
    "a kind of dict": ({"d": Sized(a=1)}, r"state\['d'\].*Sized"),
    "a kind of dict at the top": (Sized(a=1), "state: expected tensors.*Sized"),
    "a kind of tensor": ({"t": torch.ones(2).as_subclass(Marked)}, r"\['t'\].*Marked"),
    "a tensor's attribute": ({"t": marked(Evil())}, r"state\['t'\].*torch.Tensor"),
    "an array": ({"a": np.ones(2)}, r"state\['a'\].*numpy.ndarray"),
    "a module": ({"m": torchbp.BPLinear(2, 2)}, r"state\['m'\].*BPLinear"),
    "a lambda": ({"f": [lambda: 0]}, r"state\['f'\]\[0\].*function"),
    "a generator": ({"g": iter([])}, r"state\['g'\].*list_iterator"),
    "what cannot be pickled": ({"o": (1, Unpicklable())}, r"\['o'\]\[1\].*Unpicklable"),
    "a set": ({"s": {np.float64(1)}}, r"state\['s'\].*set"),
    "a key": ({"k": {np.int64(3): 1}}, r"state\['k'\], a key: .*numpy.int64"),
    "in a key": ({(1, np.int64(3)): 1}, r"state, a key\[1\]: .*numpy.int64"),
    "under an odd key": ({"a\nb": {(1,): len}}, r"\['a\\nb'\]\[a tuple\]"),
    "a number without end": ({"n": 10**1000}, r"state\['n'\].*int"),
    "a cycle": (in_a_cycle(len), r"state\['c'\]\[0\]\['f'\]"),
    "too deep": ({"d": deep(10_000)}, "state: expected .* levels deep"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_save_names_what_load_would_refuse(tmp_path, kind):
    state, message = REFUSED[kind]
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, STATE)
    with pytest.raises(TypeError, match=message) as caught:
        checkpoint.save(path, state)
    assert "\n" not in str(caught.value)
    assert same(checkpoint.load(path), STATE)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_all_that_load_takes_may_be_saved(tmp_path):
    path = tmp_path / "checkpoint.pt"
    state = {
        1: {None: 1, True: 2, 1.5: 3, ("a", 1): 4},
        "scalars": [1 + 2j, b"\xff", float("inf"), -(2**70), "\udcff \u2028"],
        "kinds": (torch.float32, torch.Size([2]), torch.device("cpu"), {1, 2}),
        "ordered": OrderedDict(b=1, a=2),
    }
    checkpoint.save(path, state)
    assert checkpoint.load(path) == state
    cycle = in_a_cycle(3)
    checkpoint.save(path, cycle)
    loaded = checkpoint.load(path)["c"]
    assert loaded[0]["again"] is loaded and loaded[0]["f"] == 3


@pytest.mark.skipif(os.name == "nt", reason="POSIX files")
def test_a_link_stays_a_link_and_leads_to_the_new_file(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "real.pt", tmp_path / "checkpoint.pt"
    link.symlink_to(target)  # it leads to nothing yet
    checkpoint.save(link, {"n": 1})
    assert link.is_symlink() and checkpoint.load(target) == {"n": 1}
    checkpoint.save(link, {"n": 2}, tmp_path / "previous.pt")
    assert link.is_symlink() and checkpoint.load(target) == {"n": 2}
    assert checkpoint.load(tmp_path / "previous.pt") == {"n": 1}


@pytest.mark.skipif(os.name == "nt", reason="POSIX files")
@pytest.mark.parametrize("kind", ["a folder", "a FIFO", "a device"])
def test_what_is_no_file_is_refused_and_stays(tmp_path, kind):
    path = tmp_path / "checkpoint.pt"
    if kind == "a folder":
        path.mkdir()
    elif kind == "a FIFO":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/null")
    before = os.stat(path).st_mode
    with pytest.raises(OSError, match="expected a file, got a"):
        checkpoint.save(path, STATE)
    with pytest.raises(CheckpointError, match="expected a file, got a"):
        checkpoint.load(path)
    assert os.stat(path).st_mode == before


@pytest.mark.skipif(os.name == "nt", reason="POSIX files")
def test_a_file_keeps_its_permissions(tmp_path):
    path, previous = tmp_path / "checkpoint.pt", tmp_path / "previous.pt"
    checkpoint.save(path, {"n": 1})
    for mode in (0o600, 0o666):  # the umask may take some of the latter
        path.chmod(mode)
        checkpoint.save(path, {"n": 2}, previous)
        assert stat.S_IMODE(path.stat().st_mode) == mode
        assert stat.S_IMODE(previous.stat().st_mode) == mode


def no_file(kind, folder):
    """A path at which there is no file that could be read."""
    path = folder / "checkpoint.pt"
    if kind == "a link to nothing":
        path.symlink_to(folder / "absent" / "file")
    elif kind == "a loop of links":
        path.symlink_to(path)
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(path))
    elif kind == "below a file":
        path.write_bytes(b"")
        path = path / "below"
    elif kind == "too long a name":
        path = folder / ("x" * 5000)
    elif kind == "a null byte":
        path = folder / "\0"
    return path


@pytest.mark.skipif(os.name == "nt", reason="POSIX files")
@pytest.mark.parametrize(
    "kind",
    [
        "a link to nothing", "a loop of links", "a socket", "below a file",
        "too long a name", "a null byte",
    ],
)  # fmt: skip
def test_no_file_is_one_line(tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    path = no_file(kind, tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError) as unread:
        checkpoint.load(path)
    with pytest.raises(OSError, match="cannot be written: ") as unwritten:
        checkpoint.save(path, STATE)
    for error in (unread.value, unwritten.value):
        assert len(str(error).splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_name_of_two_lines(tmp_path):
    path = tmp_path / "two\nlines"
    for content in (None, b"text"):
        if content:
            path.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            checkpoint.load(path)
        assert len(str(caught.value).splitlines()) == 1


def other_files(folder):
    """Files of other kinds, large ones among them."""
    with zipfile.ZipFile(folder / "other.zip", "w") as archive:
        archive.writestr("note.txt", "hello")
    with zipfile.ZipFile(folder / "comment.zip", "w") as archive:
        archive.comment = b"torchbp sha256 " + b"0" * 64
    torch.save({"weight": torch.ones(2)}, folder / "weights.pt")
    torch.save(STATE, folder / "old.pt", _use_new_zipfile_serialization=False)
    (folder / "pickle").write_bytes(pickle.dumps({"state": Evil()}))
    (folder / "seal alone").write_bytes(checkpoint.SEAL + b"0" * 64)
    (folder / "huge").touch()
    os.truncate(folder / "huge", 10**12)  # sparse: it takes no space
    return sorted(folder.iterdir())


def test_other_files_are_one_line_in_our_own_words(tmp_path, capfd):
    for path in other_files(tmp_path):
        with pytest.raises(CheckpointError, match="expected a whole ch") as caught:
            checkpoint.load(path)
        text = str(caught.value)
        assert text.startswith(f"{path}: ") and len(text.splitlines()) == 1
        assert not any(word in text for word in ("Weights", "PytorchStream", "pickle."))
    assert "ran" not in capfd.readouterr().out


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may")
def test_a_file_that_may_not_be_read(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, STATE)
    path.chmod(0)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied"):
        checkpoint.load(path)


def test_a_device_that_there_is_not(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, STATE)
    with pytest.raises(CheckpointError, match="loads to nowhere, got ") as caught:
        checkpoint.load(path, map_location="nowhere")
    assert len(str(caught.value).splitlines()) == 1


def whole():
    buffer = io.BytesIO()
    content = {"format": checkpoint.FORMAT, "version": 3, "state": STATE}
    torch.save(content, buffer)
    checkpoint._seal(buffer)
    return buffer.getvalue()


@st.composite
def damages(draw):
    """A checkpoint's bytes after a few accidents."""
    content = bytearray(whole())
    for _ in range(draw(st.integers(1, 3))):
        # The ends matter most: what says what the file is, and the checksum.
        n = len(content)
        at = draw(
            st.one_of(
                st.integers(0, n), st.integers(max(0, n - 110), n), st.integers(0, 40)
            )
        )
        kind = draw(st.sampled_from(["flip", "cut", "drop", "extend", "insert"]))
        some = draw(st.binary(min_size=1, max_size=80))
        if kind == "flip" and at < n:
            content[at] ^= draw(st.integers(1, 255))
        elif kind == "cut":
            del content[at:]
        elif kind == "drop":
            del content[at : at + len(some)]
        elif kind == "extend":
            content += some
        else:
            content[at:at] = some
    return bytes(content)


@given(damages())
@settings(max_examples=150, deadline=None)
def test_no_damage_goes_unnoticed(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    path.write_bytes(content)
    try:
        state = checkpoint.load(path)
    except CheckpointError as error:
        assert "\n" not in str(error) and str(path) in str(error)
    else:
        assert same(state, STATE)


def test_every_flipped_bit_of_the_checksum_and_some_of_each_kilobyte(tmp_path):
    path, content = tmp_path / "checkpoint.pt", whole()
    n = len(content)
    for at in [*range(0, n, 97), *range(n - 100, n)]:
        for bit in (0, 5, 7):
            flipped = bytearray(content)
            flipped[at] ^= 1 << bit
            path.write_bytes(flipped)
            with pytest.raises(CheckpointError):
                checkpoint.load(path)


# ------------------------------------------------------------------- the one before


def test_the_checkpoint_before_is_kept(tmp_path):
    folder = RunFolder.create(tmp_path, "run")
    for n in range(4):
        folder.save({"n": n})
        assert checkpoint.load(folder.checkpoint) == {"n": n}
        if n:
            assert checkpoint.load(folder.previous) == {"n": n - 1}
    assert len(list(folder.path.iterdir())) == 2


def test_the_checkpoint_before_is_kept_where_a_file_has_one_name(tmp_path, monkeypatch):
    """As on FAT, and where the one before lies on another disk."""

    folder, replace = RunFolder.create(tmp_path, "run"), os.replace

    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    def replace_and_look(source, target):
        replace(source, target)
        assert folder.checkpoint.exists()  # at every moment

    monkeypatch.setattr(checkpoint.os, "link", refuse)
    monkeypatch.setattr(checkpoint.os, "replace", replace_and_look)
    for n in range(3):
        folder.save({"n": n})
        assert checkpoint.load(folder.checkpoint) == {"n": n}
    assert checkpoint.load(folder.previous) == {"n": 1}
    assert len(list(folder.path.iterdir())) == 2


@pytest.mark.skipif(os.name == "nt", reason="POSIX files")
def test_the_checkpoint_before_keeps_its_nature(tmp_path):
    path, previous = tmp_path / "checkpoint.pt", tmp_path / "previous.pt"
    (tmp_path / "store").mkdir()
    previous.symlink_to(tmp_path / "store" / "before.pt")
    for n in range(3):
        checkpoint.save(path, {"n": n}, previous)
    assert previous.is_symlink()
    assert checkpoint.load(tmp_path / "store" / "before.pt") == {"n": 1}
    previous.unlink()
    os.mkfifo(previous)
    with pytest.raises(OSError, match="expected a file, got a FIFO"):
        checkpoint.save(path, {"n": 3}, previous)
    assert checkpoint.load(path) == {"n": 2} and previous.is_fifo()


@pytest.mark.skipif(os.name == "nt", reason="POSIX files")
def test_a_link_to_a_damaged_checkpoint_stays_a_link(tmp_path):
    folder = RunFolder.create(tmp_path, "run")
    (tmp_path / "store").mkdir()
    target = tmp_path / "store" / "newest.pt"
    folder.checkpoint.symlink_to(target)
    for n in (1, 2):
        folder.save({"n": n})
    target.write_bytes(b"spoilt")
    assert folder.load()[0] == {"n": 1}
    folder.save({"n": 3})
    assert folder.checkpoint.is_symlink() and checkpoint.load(target) == {"n": 3}
    assert checkpoint.load(folder.previous) == {"n": 1}
    assert (folder.path / "checkpoint.damaged.pt").read_bytes() == b"spoilt"


# -------------------------------------------------------------- the names of a run


def run_with_two(tmp_path):
    """A run's folder with checkpoints of n = 1 and n = 2, and settings."""
    folder = RunFolder.create(tmp_path, "run")
    folder.write(settings={})
    for n in (1, 2):
        folder.save({"n": n})
    return folder


def test_a_run_has_several_names(tmp_path, monkeypatch):
    folder = run_with_two(tmp_path)
    shutil.copy(folder.previous, folder.path / "mine.pt")
    names = {"": 2, "checkpoint.pt": 2, "checkpoint.previous.pt": 1, "mine.pt": 1}
    for name, n in names.items():
        opened = RunFolder(folder.path / name)
        assert (opened.path, opened.load()) == (folder.path, ({"n": n}, None))
    monkeypatch.chdir(folder.path)
    for name, n in names.items():
        opened = RunFolder(name)
        assert (opened.path, opened.load()) == (Path("."), ({"n": n}, None))


@pytest.mark.skipif(os.name == "nt", reason="POSIX files")
def test_a_link_to_a_checkpoint_is_a_name_of_its_run(tmp_path):
    folder = run_with_two(tmp_path)
    (tmp_path / "latest.pt").symlink_to(folder.checkpoint)
    opened = RunFolder(tmp_path / "latest.pt")
    assert (opened.path, opened.load()) == (folder.path, ({"n": 2}, None))
    # A link in the folder of a run is that run's, wherever it leads.
    (tmp_path / "store").mkdir()
    folder.checkpoint.rename(tmp_path / "store" / "newest.pt")
    folder.checkpoint.symlink_to(tmp_path / "store" / "newest.pt")
    opened = RunFolder(folder.checkpoint)
    assert (opened.path, opened.load()) == (folder.path, ({"n": 2}, None))


@pytest.mark.parametrize("damage", [b"spoilt", None])
def test_the_newest_checkpoint_stands_for_the_run(tmp_path, damage):
    folder = run_with_two(tmp_path)
    folder.checkpoint.unlink()
    if damage:
        folder.checkpoint.write_bytes(damage)
    state, failure = RunFolder(folder.checkpoint).load()
    assert state == {"n": 1} and failure is not None


def test_a_checkpoint_that_was_asked_for_has_no_substitute(tmp_path):
    folder = run_with_two(tmp_path)
    folder.previous.write_bytes(b"spoilt")
    with pytest.raises(CheckpointError, match=r"previous.pt: expected a whole"):
        RunFolder(folder.previous).load()
    folder.previous.unlink()
    with pytest.raises(CheckpointError, match=r"previous.pt: no such checkpoint"):
        RunFolder(folder.previous).load()


def test_a_checkpoint_that_was_asked_for_outlives_a_damaged_newest(tmp_path):
    folder = run_with_two(tmp_path)
    folder.checkpoint.write_bytes(b"spoilt")
    opened = RunFolder(folder.previous)
    assert opened.load() == ({"n": 1}, None)
    opened.save({"n": 3})
    assert checkpoint.load(folder.previous) == {"n": 1}
    assert (folder.path / "checkpoint.damaged.pt").read_bytes() == b"spoilt"


def test_a_run_that_never_began_is_not_one_of_a_checkpoint_beside_it(tmp_path):
    folder = RunFolder.create(tmp_path, "run")
    folder.write(settings={})
    checkpoint.save(folder.path / "mine.pt", {"n": 5})
    assert folder.never_began
    assert not RunFolder(folder.path / "mine.pt").never_began


def test_two_names_of_one_file(tmp_path):
    """As a kill between the two renames leaves them."""
    folder = RunFolder.create(tmp_path, "run")
    folder.save({"n": 1})
    os.link(folder.checkpoint, folder.previous)
    folder.save({"n": 2})
    assert checkpoint.load(folder.previous) == {"n": 1}
    assert len(list(folder.path.iterdir())) == 2


def test_a_damaged_checkpoint_never_takes_the_place_of_the_good_one(tmp_path):
    folder = RunFolder.create(tmp_path, "run")
    for n in (1, 2):
        folder.save({"n": n})
    for i, damage in enumerate([b"spoilt", b"again"]):
        folder.checkpoint.write_bytes(damage)
        before = checkpoint.load(folder.previous)
        folder = RunFolder(folder.path)
        state, failure = folder.load()
        assert state == before
        assert failure is not None and str(folder.checkpoint) in failure
        folder.save({"n": 10 + i})
        assert checkpoint.load(folder.previous) == before
    # Nothing is lost.
    kept = {p.name: p.read_bytes() for p in folder.path.glob("*damaged*")}
    assert kept == {
        "checkpoint.damaged.pt": b"spoilt",
        "checkpoint.damaged-2.pt": b"again",
    }


def test_what_does_not_pass_the_check_is_passed_over(tmp_path):
    folder = RunFolder.create(tmp_path, "run")
    folder.save({"n": 1})

    def check(state):
        if state["n"] != 1:
            raise ValueError("n: expected 1,\ngot something else")

    assert folder.load(check) == ({"n": 1}, None)
    folder.save({"n": 2})
    state, failure = folder.load(check)
    assert state == {"n": 1}
    assert failure is not None and failure.endswith("n: expected 1, got something else")
    folder.save({"n": 3})
    folder.save({"n": 4})
    with pytest.raises(CheckpointError, match=r"checkpoint.pt.*; .*previous.pt"):
        folder.load(check)


# -------------------------------------------------------------- lock and leftovers


@pytest.mark.skipif(os.name == "nt", reason="POSIX locks")
def test_a_run_is_one_process_s_at_a_time(tmp_path):
    """A folder opened twice is a folder of two processes to the system."""
    folder = RunFolder.create(tmp_path, "run")
    with folder.lock():
        with (
            pytest.raises(BlockingIOError, match="which another process has") as caught,
            RunFolder(folder.path).lock(),
        ):
            pass
        assert str(folder.path) in str(caught.value)
        assert not list(folder.path.iterdir())
    with RunFolder(folder.path).lock():
        pass
    with RunFolder(tmp_path / "none").lock():  # there is nothing to lock
        pass


@pytest.mark.skipif(os.name == "nt", reason="POSIX locks")
def test_leftovers_of_the_dead_are_removed(tmp_path):
    """And nothing else: neither other files nor those of a process that lives."""
    folder = RunFolder.create(tmp_path, "run")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    leftovers = [
        f".checkpoint.pt.{gone.pid}-0123abcd.torchbp",
        f".settings.json.{os.getpid()}-89abcdef.torchbp",
    ]
    others = [
        f".checkpoint.pt.{os.getppid()}-0123abcd.torchbp",
        ".checkpoint.pt.swp",
        f".notes.{gone.pid}-0123abcd",
        "checkpoint.pt",
        "mine.torchbp",
    ]
    for name in leftovers + others:
        (folder.path / name).touch()
    with folder.lock():
        assert {p.name for p in folder.path.iterdir()} == set(others)


def test_the_name_of_a_temporary_file_is_one_that_is_removed(tmp_path, monkeypatch):
    seen = []

    def look(source, target):
        seen.append(Path(source).name)
        os.rename(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", look)
    folder = RunFolder.create(tmp_path, "run")
    folder.save({})
    folder.save({})
    folder.write(settings={})
    assert len(seen) == 4
    for name in seen:
        match = TEMPORARY.fullmatch(name)
        assert match is not None and int(match[1]) == os.getpid()


def test_a_run_that_never_began(tmp_path):
    folder = RunFolder.create(tmp_path, "run")
    assert not folder.never_began
    folder.write(settings={"lr": 3.0})
    assert folder.never_began
    assert folder.read("settings") == {"lr": 3.0}
    folder.save({})
    assert not folder.never_began
    (folder.path / "settings.json").write_text("{")
    with pytest.raises(CheckpointError, match="expected settings, got"):
        folder.read("settings")


# ------------------------------------------------------------- the state of a trainer


def make_trainer(seed=0):
    torch.manual_seed(seed)
    model = torchbp.MLP([6, 4, 3])
    cost = torchbp.QuadraticCost()
    images = torch.randint(0, 256, (23, 6)).to(torch.uint8)
    part = Split(images, torch.arange(23) % 3)
    engine = AutogradSGD(model, cost, 0.5)
    return Trainer(model, engine, cost, Splits(part, part, part), 5, seed)


def trained():
    trainer = make_trainer()
    trainer.run_epoch()
    return trainer


def test_a_state_brings_back_every_generator():
    trainer = trained()
    state = trainer.state_dict()
    drawn = torch.rand(3), trainer.generator.get_state()
    other = make_trainer(seed=1)
    other.load_state_dict(state)
    assert torch.equal(torch.rand(3), drawn[0])
    assert torch.equal(other.generator.get_state(), drawn[1])
    assert (other.epoch, other.step, other.best) == (1, 5, trainer.best)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_state_brings_back_the_generator_of_the_device():
    trainer = trained()
    on_cuda = Splits(*(Split(*(t.cuda() for t in s)) for s in trainer.data))
    trainer.model.cuda()
    trainer.data = on_cuda
    state = trainer.state_dict()
    drawn = torch.rand(3, device="cuda")
    torch.rand(3, device="cuda")
    trainer.load_state_dict(state)
    assert torch.equal(torch.rand(3, device="cuda"), drawn)


GENERATOR = torch.Generator().get_state()
WRONG = {
    "negative epoch": ({"epoch": -1}, "epoch: expected a number of epochs, got -1"),
    "no whole epoch": ({"epoch": 1.0}, "epoch: expected a number of epochs, got 1.0"),
    "an epoch that is a truth": ({"epoch": True}, "epoch: expected a number"),
    "no epoch": ({"epoch": None}, "epoch: expected a number of epochs, got None"),
    "a best epoch to come": ({"best": [2, 0.5, 0.5]}, "best: expected (an epoch from"),
    "half a best": ({"best": [1, 0.5]}, "best: expected"),
    "a best beyond all": ({"best": [1, 1.5, 0.5]}, "best: expected"),
    "a best in words": ({"best": "high"}, "best: expected"),
    "another step": ({"step": 4}, "step: expected 5 after 1 epochs, got 4"),
    "no parameters": ({"model": 3}, "model: expected parameters, got int"),
    "other parameters": ({"model": {"w": torch.ones(1)}}, "model: expected other"),
    "wrong shape": ({"layers.1.bias": torch.ones(4)}, "layers.1.bias: expected (3,)"),
    "wrong dtype": ({"layers.1.bias": torch.ones(3).double()}, "of torch.float64"),
    "no tensor": ({"layers.1.bias": [1, 2, 3]}, "layers.1.bias: expected a tensor"),
    "not finite": ({"layers.1.bias": torch.full((3,), torch.nan)}, "expected finite"),
    "no engine": ({"engine": None}, "engine: expected its state, got None"),
    "an engine without rates": ({"engine": {}}, "lr"),
    "a negative rate": ({"engine": {"lr": -1.0, "weight_decay": 0.0}}, "lr: expected"),
    "a short generator": ({"generator": GENERATOR[:-1]}, "state"),
    "an impossible generator": ({"generator": GENERATOR * 0}, "state"),
    "a generator of floats": ({"generator": GENERATOR.float()}, "got torch.float32"),
    "no generator": ({"generator": None}, "trainer generator: expected its bytes"),
    "torch's generator": ({"torch_generators": {"cpu": GENERATOR[1:]}}, "state"),
    "torch's generators": ({"torch_generators": {"cuda": 3}}, "cuda generator:"),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(WRONG))
def test_a_state_that_does_not_fit_changes_nothing(kind):
    changes, message = WRONG[kind]
    trainer = trained()
    state = trainer.state_dict()
    for name, value in copy.deepcopy(changes).items():
        (state["model"] if "." in name else state)[name] = value
    other = make_trainer(seed=1)
    before = other.state_dict()
    with pytest.raises((ValueError, TypeError, KeyError, RuntimeError)) as caught:
        other.load_state_dict(state)
    assert message in str(caught.value)
    after = other.state_dict()
    assert (after["epoch"], after["best"]) == (0, None)
    for part in ("model", "torch_generators"):
        for name, value in before[part].items():
            assert torch.equal(after[part][name], value)
    assert torch.equal(after["generator"], before["generator"])
    assert after["engine"] == before["engine"]


@pytest.mark.parametrize("name", ["epoch", "best", "model", "engine", "generator"])
def test_a_state_that_lacks_something(name):
    trainer = trained()
    state = trainer.state_dict()
    del state[name]
    with pytest.raises(KeyError, match=name):
        check_state(state, trainer.model)
    with pytest.raises(TypeError, match="trainer: expected its state, got list"):
        check_state([state], trainer.model)
