"""What is saved comes back; what is not whole is refused by name."""

from __future__ import annotations

import io
import json
import os
import pickle

import pytest
import torch

from torchbp import checkpoint
from torchbp.checkpoint import CheckpointError, RunFolder


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
        return buffer.getvalue()

    newer = {"format": checkpoint.FORMAT, "version": 99, "state": {}}
    no_state = {"format": checkpoint.FORMAT, "version": checkpoint.VERSION, "state": 3}
    return {
        "empty": (b"", "expected a whole checkpoint"),
        "truncated": (whole[: len(whole) // 2], "expected a whole checkpoint"),
        "text": (b"epoch 3", "expected a whole checkpoint"),
        "code": (pickle.dumps(Evil()), "expected a whole checkpoint"),
        "torch code": (saved({"state": Evil()}), "expected a whole checkpoint"),
        "another program's": (saved({"model": {}}), "got another kind of file"),
        "a tensor": (saved(torch.ones(2)), "got another kind of file"),
        "newer": (saved(newer), "expected version 2, got 99"),
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
        ValueError, match="exists; choose another, or go on with --resume"
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
