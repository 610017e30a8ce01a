"""Checkpoints: files that are written completely or not at all, with a checksum.

A checkpoint is {"format", "version", "state"}, written by ``torch.save``;
``torch.load(path, weights_only=True)`` opens it, too. It is a zip archive, whose
comment is the SHA-256 of all bytes before it: no byte can change unnoticed.

Error messages are one line in this module's words; the error of torch or of the system
is the exception's cause.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
from collections import OrderedDict
from collections.abc import Iterator
from typing import IO, Any

import torch

from torchbp._files import check_is_file, write_atomically
from torchbp._terminal import UserError

__all__ = ["CheckpointError", "load", "save"]

FORMAT = "torchbp-checkpoint"
VERSION = 3
SEAL = b"torchbp sha256 "
SEAL_SIZE = len(SEAL) + 64
ZIP, END_OF_ZIP = b"PK\3\4", b"PK\5\6"  # the latter: 22 bytes, without a comment
OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)


class CheckpointError(UserError):
    """A checkpoint cannot be read; the message is one line and names the file.

    Args:
        message: what is wrong; its lines are joined.

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
    """Write `state` to `path`, which at every moment is the old file or the new one.

    Args:
        path: the file, as in :func:`torchbp._files.write_atomically`.
        state: tensors, numbers, strings, and lists and dicts of them.
        previous: the old file's new path; if None, the old file is replaced.

    Raises:
        OSError: the folder is missing, read-only or full, or `path` is not a file; the
            old file is intact.
        TypeError: `state` has a part that :func:`load` would refuse; the message names
            its place in `state` and its type.

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
    if not isinstance(state, dict):
        raise TypeError(f"state: expected a dict, got {_type_name(state)}")
    try:
        buffer = _serialize({"format": FORMAT, "version": VERSION, "state": state})
    except OUT_OF_MEMORY:
        raise
    except RecursionError as error:
        raise TypeError(
            "state: expected lists and dicts a few hundred levels deep, got more levels"
        ) from error
    except Exception as error:
        raise TypeError(_explain_refusal(state)) from error
    _seal(buffer)
    write_atomically(path, buffer.getbuffer(), previous)


def load(path: str | os.PathLike[str], map_location: Any = "cpu") -> dict[str, Any]:
    """Return the state that :func:`save` wrote, without running code from the file.

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
        check_is_file(path)
        with open(path, "rb") as file:
            _check_seal(file)
            content = _deserialize(file, map_location)
    # ValueError: no system accepts such a path.
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error.__cause__
    return content


def _serialize(content: Any) -> io.BytesIO:
    """Return the file of `content`, without a checksum; raise torch's error if it
    cannot be saved or loaded again."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    buffer.seek(0)
    torch.load(buffer, map_location="cpu", weights_only=True)
    return buffer


def _explain_refusal(state: dict[Any, Any]) -> str:
    """Return the error message about the innermost part of `state` that cannot be
    saved."""
    place, part, outer = "state", state, set[int]()
    while True:
        outer.add(id(part))
        refused = (
            (key, child)
            for key, child in _children(part)
            if id(child) not in outer and _is_refused(child)  # a state may have cycles
        )
        culprit = next(refused, None)
        if culprit is None:
            return (
                f"{place}: expected tensors, numbers, strings, lists and dicts, got "
                f"{_type_name(part)}, which cannot be loaded again"
            )
        place, part = f"{place}{culprit[0]}", culprit[1]


def _children(part: Any) -> Iterator[tuple[str, Any]]:
    """Yield the parts of a list or dict with their places: "[3]", "['a']", ", a
    key"."""
    if type(part) in (dict, OrderedDict):
        yield from ((", a key", key) for key in part)
        yield from ((f"[{_key_name(key)}]", child) for key, child in part.items())
    elif type(part) in (list, tuple):
        yield from ((f"[{i}]", child) for i, child in enumerate(part))


def _is_refused(part: Any) -> bool:
    """Return whether `part` cannot be saved and loaded again."""
    try:
        _serialize(part)
    except OUT_OF_MEMORY:
        raise
    except Exception:
        return True
    return False


def _key_name(key: Any) -> str:
    """Return a dict's key for a message, its type if it is no string or integer."""
    return f"{key!r:.80}" if type(key) in (str, int) else f"a {_type_name(key)}"


def _type_name(value: Any) -> str:
    """Return the qualified name of a value's type, on one line."""
    kind = type(value)
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return " ".join(f"{module}{kind.__qualname__}".split())


def _seal(buffer: io.BytesIO) -> None:
    """Append the checksum to the zip archive in `buffer`, as its comment."""
    buffer.seek(-22, os.SEEK_END)
    end = buffer.read()
    assert end.startswith(END_OF_ZIP) and end.endswith(b"\0\0"), "no comment so far"
    buffer.seek(-2, os.SEEK_END)
    buffer.write(struct.pack("<H", SEAL_SIZE))
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest()
    buffer.write(SEAL + digest.encode())


def _check_seal(file: IO[bytes]) -> None:
    """Raise CheckpointError unless `file` ends with the checksum of the bytes before
    it; rewind `file`."""
    size = file.seek(0, os.SEEK_END)
    remaining = max(0, size - SEAL_SIZE)
    file.seek(remaining)
    seal = file.read(SEAL_SIZE)
    file.seek(0)
    if not seal.startswith(SEAL):
        kind = "a file of another kind" if size else "an empty file"
        if file.read(len(ZIP)) == ZIP:
            kind = "a zip archive without a checksum: cut off, or another program's"
        raise CheckpointError(f"expected a whole checkpoint, got {kind}")
    digest = hashlib.sha256()
    while remaining:
        piece = file.read(min(remaining, 1 << 20))
        if not piece:
            raise CheckpointError(
                "expected a whole checkpoint, got a file that shrank while it was read"
            )
        digest.update(piece)
        remaining -= len(piece)
    if seal != SEAL + digest.hexdigest().encode():
        raise CheckpointError(
            "expected a whole checkpoint, got content that does not match its checksum"
        )
    file.seek(0)


def _deserialize(file: IO[bytes], map_location: Any) -> dict[str, Any]:
    """Return the state in a file that matches its checksum."""
    try:
        content = torch.load(file, map_location=map_location, weights_only=True)
    except OUT_OF_MEMORY:
        raise
    except Exception as error:  # torch.load passes on any error of its parsers
        raise CheckpointError(
            f"expected a checkpoint that torch {torch.__version__} loads to "
            f"{map_location}, got {type(error).__name__}"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"expected a {FORMAT}, got another kind of file")
    version, state = content.get("version"), content.get("state")
    if type(version) is not int or version != VERSION:
        raise CheckpointError(f"expected version {VERSION}, got {version!r:.80}")
    if not isinstance(state, dict):
        raise CheckpointError(f"expected a state inside, got {_type_name(state)}")
    return state
