"""Save and resume: run folders, and files that are either whole or the one before."""

from __future__ import annotations

import contextlib
import io
import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import torch

__all__ = ["CheckpointError", "RunFolder", "load", "save", "write_atomically"]

FORMAT = "torchbp-checkpoint"
VERSION = 2


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read; the message is one line and names the file."""


def save(path: str | os.PathLike[str], state: dict[str, Any]) -> None:
    """Write `state` to `path`; whoever reads `path` finds the old file or the new one.

    Args:
        path: the file; its folder must exist.
        state: tensors, numbers, strings, and lists and dicts of them.

    Raises:
        OSError: the folder is missing, read-only or full; the old file is intact.
        TypeError: `state` holds something that :func:`load` would refuse.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "version": VERSION, "state": state}, buffer)
    buffer.seek(0)
    try:
        torch.load(buffer, weights_only=True)
    except Exception as error:
        raise TypeError(
            "state: expected tensors, numbers, strings, lists and dicts, got what "
            f"cannot be loaded again: {' '.join(str(error).split())[-200:]}"
        ) from error
    write_atomically(path, buffer.getbuffer())


def load(path: str | os.PathLike[str], map_location: Any = "cpu") -> dict[str, Any]:
    """The state that :func:`save` wrote; no code in the file is run.

    Args:
        path: the file.
        map_location: the device for its tensors, as in ``torch.load``.

    Raises:
        CheckpointError: no such file, not one of ours, damaged, or of a newer version.
    """
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except Exception as error:  # torch.load raises whatever its parsers raise
        reason = (str(error).splitlines() or [""])[0][:120]
        kind = type(error).__name__
        raise CheckpointError(
            f"{path}: expected a whole checkpoint, got {kind}: {reason}"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: expected a {FORMAT}, got another kind of file")
    version = content.get("version")
    if version != VERSION:
        raise CheckpointError(f"{path}: expected version {VERSION}, got {version!r}")
    state = content.get("state")
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: expected a state inside, got {type(state)}")
    return state


def write_atomically(path: str | os.PathLike[str], data: Any) -> None:
    """Write bytes to a temporary file beside `path`, then rename it over `path`."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}-{os.getpid()}-{secrets.token_hex(4)}")
    # Not mkstemp: its files are for their owner alone, whatever the umask says.
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_folder(path.parent)


class RunFolder:
    """``runs/<name>/``: settings.json, versions.json, checkpoint.pt and event files.

    Args:
        path: the folder; :meth:`create` makes one, this opens it as it is.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.pt"

    @classmethod
    def create(cls, logdir: str | os.PathLike[str], name: str) -> RunFolder:
        """Make ``logdir/name``.

        Raises:
            ValueError: `name` is not a plain folder name, or the run exists.
            OSError: the folder cannot be made or written.
        """
        if not name or name in (".", "..") or set(name) & set("/\\\0"):
            raise ValueError(f"name: expected a plain folder name, got {name!r}")
        path = Path(logdir) / name
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            if not Path(logdir).is_dir():
                raise OSError(
                    f"logdir: expected a folder, got the file {logdir}"
                ) from None
            raise ValueError(
                f"name: {path} exists; choose another, or go on with --resume {path}"
            ) from None
        except OSError as error:
            reason = error.strerror
            raise OSError(
                f"logdir: cannot make the run folder {path}: {reason}"
            ) from None
        return cls(path)

    def discard(self) -> None:
        """Remove the folder of a run that never began."""
        shutil.rmtree(self.path, ignore_errors=True)

    def write(self, **contents: Any) -> None:
        """Write each of `contents` as ``<key>.json``."""
        for name, content in contents.items():
            text = json.dumps(content, indent=2, default=str) + "\n"
            write_atomically(self.path / f"{name}.json", text.encode())


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where folders can be opened (not on Windows)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
