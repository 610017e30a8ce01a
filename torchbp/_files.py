"""Files that are written whole or not at all."""

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

TEMPORARY = re.compile(r"\..+\.(\d+)-[0-9a-f]{8}\.torchbp")


def check_is_file(path: str | os.PathLike[str]) -> os.stat_result:
    """The status of the file at `path`, links followed; raise OSError if there is none,
    or something that is no file: it is not opened, since a FIFO would wait for its
    writer and a device may act."""
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "expected a file, got a folder")
    if not stat.S_ISREG(status.st_mode):
        kind = "a FIFO" if stat.S_ISFIFO(status.st_mode) else "a device or socket"
        raise OSError(errno.EINVAL, f"expected a file, got {kind}")
    return status


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A free name beside `path`, which says whose it is; free again in the end."""
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

    What lies at `path` keeps its nature: a link leads to the new file where it led to
    the old one, a file keeps its permissions, and what is no file is refused.

    Args:
        path: the file; its folder must exist.
        data: its bytes.
        previous: where the old file is kept; it is not kept if None.

    Raises:
        OSError: the folder is missing, read-only or full, or what lies at `path` or
            `previous` is no file; what lies there is intact.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_atomically(f"{folder}/note.txt", b"whole")
        ...     Path(folder, "note.txt").read_bytes()
        b'whole'
    """
    try:
        target, mode = _follow_links(path)
        with _temporary(target) as temporary:
            _write_to_disk(temporary, data, mode)
            if previous is not None and mode is not None:
                _keep(target, _follow_links(previous)[0], mode)
            os.replace(temporary, target)
    except OSError as error:  # it names the temporary file, or none
        reason = f"cannot be written: {error.strerror}"
        raise OSError(error.errno, reason, str(path)) from error
    except ValueError as error:
        reason = "cannot be written: no system takes this path"
        raise OSError(errno.EINVAL, reason, str(path)) from error
    _sync_folder(target.parent)


def _follow_links(path: str | os.PathLike[str]) -> tuple[Path, int | None]:
    """The path without links, and the permissions of the file there, if there is one;
    raise OSError if what is there is no file."""
    try:
        mode = stat.S_IMODE(check_is_file(path).st_mode)
    except FileNotFoundError:
        mode = None
    return Path(os.path.realpath(path)), mode


def _write_to_disk(path: Path, data: Any, mode: int | None) -> None:
    """Make a file, and return when its bytes are on the disk.

    Args:
        path: of the file, which is not there yet.
        data: its bytes.
        mode: its permissions; those of any new file if None.
    """
    # Not mkstemp: its files are for their owner alone, whatever the umask says.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    handle = os.open(path, flags, 0o666 if mode is None else mode)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if mode is not None:  # the umask has taken some of them
        with contextlib.suppress(OSError):  # not every file system has them
            os.chmod(path, mode)


def _keep(path: Path, previous: Path, mode: int) -> None:
    """Make `previous` a second name of the file at `path`, or a copy where one file
    cannot have two names: at every moment both names lead to whole files."""
    with _temporary(previous) as link:
        try:
            os.link(path, link)
        except OSError:
            _write_to_disk(link, path.read_bytes(), mode)
        # Where both names lead to one file already, this does nothing.
        os.replace(link, previous)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where folders can be opened (not on Windows)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
