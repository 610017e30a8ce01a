"""Writing files completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["TEMPORARY", "check_is_file", "write_atomically"]

# The name of a temporary file, with the number of the process that writes it.
TEMPORARY = re.compile(r"\..+\.(\d+)-[0-9a-f]{8}\.torchbp")


def check_is_file(path: str | os.PathLike[str]) -> os.stat_result:
    """Return the status of the file at `path`, following links.

    Nothing is opened: opening a FIFO waits for its writer, and a device may act.

    Args:
        path: of the file.

    Raises:
        OSError: `path` does not exist or is not a regular file.

    Examples:
        >>> check_is_file(__file__).st_size > 0
        True
    """
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "expected a file, got a folder")
    if not stat.S_ISREG(status.st_mode):
        kind = "a FIFO" if stat.S_ISFIFO(status.st_mode) else "a device or socket"
        raise OSError(errno.EINVAL, f"expected a file, got {kind}")
    return status


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """Yield an unused path beside `path`, with this process's number in its name;
    remove the file at the end."""
    name = f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.torchbp"
    temporary = path.with_name(name)
    try:
        yield temporary
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def write_atomically(
    path: str | os.PathLike[str],
    data: Any,
    previous: str | os.PathLike[str] | None = None,
) -> None:
    """Write bytes to a temporary file beside `path`, then rename it over `path`.

    A link at `path` then points to the new file, and a file's permissions remain.

    Args:
        path: the file; its folder must exist.
        data: its bytes.
        previous: path under which the old file remains; None to replace it.

    Raises:
        OSError: the folder is missing, read-only or full, or `path` or `previous` is
            not a regular file; both are unchanged.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_atomically(f"{folder}/text.txt", b"complete")
        ...     Path(folder, "text.txt").read_bytes()
        b'complete'
    """
    try:
        target, mode = _follow_links(path)
        with _temporary(target) as temporary:
            _write_to_disk(temporary, data, mode)
            if previous is not None and mode is not None:
                _copy_as_previous(target, _follow_links(previous)[0], mode)
            os.replace(temporary, target)
    except OSError as error:  # it names the temporary file, or none
        reason = f"cannot be written: {error.strerror}"
        raise OSError(error.errno, reason, str(path)) from error
    except ValueError as error:
        reason = "cannot be written: not a valid path"
        raise OSError(errno.EINVAL, reason, str(path)) from error
    _sync_folder(target.parent)


def _follow_links(path: str | os.PathLike[str]) -> tuple[Path, int | None]:
    """Return the path without links, and the permissions of the file or None if none
    exists; raise OSError for anything but a regular file."""
    try:
        mode = stat.S_IMODE(check_is_file(path).st_mode)
    except FileNotFoundError:
        mode = None
    return Path(os.path.realpath(path)), mode


def _write_to_disk(path: Path, data: Any, mode: int | None) -> None:
    """Create a file, and wait until its bytes are on the disk.

    Args:
        path: of the file, which must not exist.
        data: its bytes.
        mode: its permissions; the usual ones if None.
    """
    # Not mkstemp, which ignores the umask: only the owner could read its files.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    handle = os.open(path, flags, 0o666 if mode is None else mode)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if mode is not None:  # the umask has removed some permissions
        with contextlib.suppress(OSError):  # file systems without permissions
            os.chmod(path, mode)


def _copy_as_previous(path: Path, previous: Path, mode: int) -> None:
    """Make `previous` a hard link to the file at `path`, or a copy on file systems
    without hard links; both names always lead to complete files."""
    with _temporary(previous) as link:
        try:
            os.link(path, link)
        except OSError:
            _write_to_disk(link, path.read_bytes(), mode)
        # If both names already lead to one file, this does nothing.
        os.replace(link, previous)


def _sync_folder(folder: Path) -> None:
    """Make the rename durable, on systems that can open folders (not Windows)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
