"""Save and resume: files that are either whole or the one before.

A checkpoint is a file of ``torch.save``, which ``torch.load(path, weights_only=True)``
opens too: {"format", "version", "state"}. It is a zip archive, and the archive's
comment is the SHA-256 of all bytes before it: no byte can change unnoticed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import secrets
import struct
from pathlib import Path
from typing import IO, Any

import torch

__all__ = ["CheckpointError", "load", "save", "write_atomically"]

FORMAT = "torchbp-checkpoint"
VERSION = 3
UNSEALED = 2  # the last version without a checksum
SEAL = b"torchbp sha256 "
SEAL_SIZE = len(SEAL) + 64
END_OF_ZIP = b"PK\5\6"  # begins a zip archive's last 22 bytes, where it has no comment


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read; the message is one line and names the file.

    Examples:
        >>> try:
        ...     load("nowhere/checkpoint.pt")
        ... except CheckpointError as error:
        ...     print(error)
        nowhere/checkpoint.pt: no such checkpoint
    """


def save(
    path: str | os.PathLike[str],
    state: dict[str, Any],
    previous: str | os.PathLike[str] | None = None,
) -> None:
    """Write `state` to `path`; whoever reads `path` finds the old file or the new one.

    Args:
        path: the file; its folder must exist.
        state: tensors, numbers, strings, and lists and dicts of them.
        previous: where the old file is kept, in the same folder; it is not, if None.

    Raises:
        OSError: the folder is missing, read-only or full; the old file is intact.
        TypeError: `state` holds something that :func:`load` would refuse.

    Examples:
        >>> import tempfile, torchbp
        >>> model = torchbp.MLP([4, 3, 2])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     state = {"sizes": model.sizes, "model": model.state_dict()}
        ...     save(f"{folder}/mlp.pt", state)
        ...     state = load(f"{folder}/mlp.pt")
        >>> again = torchbp.MLP(state["sizes"])
        >>> again.load_state_dict(state["model"])
        <All keys matched successfully>
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "version": VERSION, "state": state}, buffer)
    buffer.seek(0)
    try:
        torch.load(buffer, map_location="cpu", weights_only=True)
    except Exception as error:
        raise TypeError(
            "state: expected tensors, numbers, strings, lists and dicts, got what "
            f"cannot be loaded again: {' '.join(str(error).split())[-200:]}"
        ) from error
    _seal(buffer)
    write_atomically(path, buffer.getbuffer(), previous)


def load(path: str | os.PathLike[str], map_location: Any = "cpu") -> dict[str, Any]:
    """The state that :func:`save` wrote; no code in the file is run.

    Args:
        path: the file.
        map_location: the device for its tensors, as in ``torch.load``.

    Raises:
        CheckpointError: no such file, not one of ours, damaged, or of a newer version.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/state.pt", {"epoch": 3, "weights": [torch.ones(2)]})
        ...     load(f"{folder}/state.pt")
        {'epoch': 3, 'weights': [tensor([1., 1.])]}
    """
    try:
        with open(path, "rb") as file:
            is_sealed = _check_seal(file)
            content = torch.load(file, map_location=map_location, weights_only=True)
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
    if type(version) is not int or not UNSEALED <= version <= VERSION:
        raise CheckpointError(
            f"{path}: expected version {UNSEALED} or {VERSION}, got {version!r}"
        )
    if version > UNSEALED and not is_sealed:
        raise CheckpointError(
            f"{path}: expected a whole checkpoint, got one without its checksum"
        )
    state = content.get("state")
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: expected a state inside, got {type(state)}")
    return state


def _seal(buffer: io.BytesIO) -> None:
    """Give the zip archive in `buffer` its checksum as its comment."""
    buffer.seek(-22, os.SEEK_END)
    end = buffer.read()
    assert end.startswith(END_OF_ZIP) and end.endswith(b"\0\0"), "no comment so far"
    buffer.seek(-2, os.SEEK_END)
    buffer.write(struct.pack("<H", SEAL_SIZE))
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest()
    buffer.write(SEAL + digest.encode())


def _check_seal(file: IO[bytes]) -> bool:
    """Whether `file` ends with a checksum, and raise ValueError if it is not that of
    the bytes before it; `file` is left at its start."""
    size = file.seek(0, os.SEEK_END)
    left = max(0, size - SEAL_SIZE)
    file.seek(left)
    seal = file.read(SEAL_SIZE)
    file.seek(0)
    if not seal.startswith(SEAL):
        return False
    digest = hashlib.sha256()
    while left:
        piece = file.read(min(left, 1 << 20))
        if not piece:
            raise ValueError("the file shrank while it was read")
        digest.update(piece)
        left -= len(piece)
    if seal != SEAL + digest.hexdigest().encode():
        raise ValueError("its checksum is not that of its content")
    file.seek(0)
    return True


TEMPORARY = re.compile(r"\..+\.(\d+)-[0-9a-f]{8}\.torchbp")


def _temporary(path: Path) -> Path:
    """A free name beside `path`, which says whose it is."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.torchbp")


def write_atomically(
    path: str | os.PathLike[str],
    data: Any,
    previous: str | os.PathLike[str] | None = None,
) -> None:
    """Write bytes to a temporary file beside `path`, then rename it over `path`.

    Args:
        path: the file; its folder must exist.
        data: its bytes.
        previous: where the old file is kept, in the same folder; it is not, if None.

    Raises:
        OSError: the folder is missing, read-only or full; the old file is intact.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_atomically(f"{folder}/note.txt", b"whole")
        ...     Path(folder, "note.txt").read_text()
        'whole'
    """
    path = Path(path)
    temporary = _temporary(path)
    try:
        # Not mkstemp: its files are for their owner alone, whatever the umask says.
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None:
            _keep(path, Path(previous))
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):  # it names the temporary file, or none
            reason = f"cannot be written: {error.strerror}"
            raise OSError(error.errno, reason, str(path)) from error
        raise
    _sync_folder(path.parent)


def _keep(path: Path, previous: Path) -> None:
    """Make `previous` a second name of the file at `path`, if there is one: at every
    moment both names lead to whole files."""
    link = _temporary(previous)
    try:
        try:
            os.link(path, link)
        except FileNotFoundError:
            raise
        except OSError:  # no hard links here: for a moment there is `previous` alone
            os.replace(path, previous)
        else:
            os.replace(link, previous)
    except FileNotFoundError:  # there is nothing to keep
        pass
    finally:
        # Still there where both names led to one file: to rename it does nothing then.
        with contextlib.suppress(OSError):
            os.unlink(link)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where folders can be opened (not on Windows)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
