"""The folder of a run: its settings, its checkpoints, and one process's at a time."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torchbp._files import TEMPORARY, write_atomically
from torchbp._terminal import one_line
from torchbp.training import checkpoint
from torchbp.training.checkpoint import CheckpointError

__all__ = ["RunFolder"]

NAMES = NEWEST, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"


class RunFolder:
    """``runs/<name>/``: settings.json, versions.json, checkpoint.pt, the one before it
    in checkpoint.previous.pt, and event files.

    Args:
        path: the folder, or a checkpoint in it: "checkpoint.pt" stands for the run,
            and any other is the one that :meth:`load` returns. :meth:`create` makes a
            folder, this opens it as it is.

    Attributes:
        path: the folder.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as logdir:
        ...     run = RunFolder.create(logdir, "first")
        ...     run.write(settings={"lr": 3.0})
        ...     run.save({"epoch": 0})
        ...     sorted(path.name for path in run.path.iterdir()), run.load()
        (['checkpoint.pt', 'settings.json'], ({'epoch': 0}, None))
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._chosen: Path | None = None
        self._is_damaged = False
        if os.path.isdir(self.path):
            return
        if os.path.lexists(self.path) or self.path.name in NAMES:
            self._choose(self.path)

    def _choose(self, file: Path) -> None:
        """Open the folder of the checkpoint `file`, to go on from there."""
        self.path = file.parent
        if os.path.islink(file) and not self.has_settings:  # a link from elsewhere
            file = Path(os.path.realpath(file))
            self.path = file.parent
        self._chosen = None if file == self.checkpoint else file

    @property
    def checkpoint(self) -> Path:
        """The newest checkpoint."""
        return self.path / NEWEST

    @property
    def previous(self) -> Path:
        """The one before it."""
        return self.path / PREVIOUS

    @classmethod
    def create(cls, logdir: str | os.PathLike[str], name: str) -> RunFolder:
        """Make ``logdir/name``.

        Args:
            logdir: the folder of all runs; made if it is not there.
            name: of this one, a plain folder name that is not taken.

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
        """Write each of the keyword arguments `contents` as ``<key>.json``."""
        for name, content in contents.items():
            text = json.dumps(content, indent=2, default=str) + "\n"
            write_atomically(self.path / f"{name}.json", text.encode())

    def read(self, name: str) -> Any:
        """What :meth:`write` wrote under `name`.

        Raises:
            CheckpointError: there is no such file, or it holds something else.
        """
        path = self.path / f"{name}.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: expected {name}, got {error}") from error

    @property
    def never_began(self) -> bool:
        """Whether a run was stopped here before its first checkpoint."""
        written = self.checkpoint, self.previous, *filter(None, [self._chosen])
        return self.has_settings and not any(map(os.path.lexists, written))

    @property
    def has_settings(self) -> bool:
        """Whether this is the folder of a run, and not just of a checkpoint."""
        return os.path.isfile(self.path / "settings.json")

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep the run from every other process for as long as the block lasts, and
        remove what a save that was killed has left.

        The system gives the lock back however this process ends. Where there are no
        such locks (Windows, some network file systems), nothing is locked or removed.

        Raises:
            BlockingIOError: another process has it.
        """
        descriptor = _lock(self.path)
        if descriptor is None:
            yield
            return
        try:
            self._remove_leftovers()
            yield
        finally:
            os.close(descriptor)

    def _remove_leftovers(self) -> None:
        """Remove the temporary files of processes that are no more."""
        for path in self.path.iterdir():
            match = TEMPORARY.fullmatch(path.name)
            if match and not _is_another_alive(int(match[1])):
                with contextlib.suppress(OSError):
                    path.unlink()

    def save(self, state: dict[str, Any]) -> None:
        """Write `state` as the newest checkpoint, and keep the one before it.

        Raises:
            OSError: the checkpoint cannot be written.
            TypeError: `state` has something that a checkpoint cannot hold.
        """
        if self._is_damaged:  # not to take the place of the good one before it
            self._set_aside()
        checkpoint.save(self.checkpoint, state, self.previous)

    def what_is_left(self) -> str:
        """What there is to go on with, for the last words of a run."""
        for path in (self.checkpoint, self.previous):
            if _is_whole(path):
                return f"{path} is whole, to go on: --resume {self.path}"
        return "no checkpoint is left"

    def _set_aside(self) -> None:
        for i in range(1, 1000):
            aside = self.path / f"checkpoint.damaged{f'-{i}' if i > 1 else ''}.pt"
            if not os.path.lexists(aside):
                break
        with contextlib.suppress(FileNotFoundError):
            # The file itself: a link to it stays, and leads to the next checkpoint.
            shutil.move(os.path.realpath(self.checkpoint), aside)
        self._is_damaged = False

    def load(
        self, check: Callable[[dict[str, Any]], None] | None = None
    ) -> tuple[dict[str, Any], str | None]:
        """The newest checkpoint that is whole and passes `check`, and what is wrong
        with the newest if it is the one before it; or the one that was asked for.

        Args:
            check: raises whatever it likes about a state that is not to be used.

        Raises:
            CheckpointError: there is none.
        """
        if self._chosen is not None:
            state = _load_checked(self._chosen, check)
            self._is_damaged = not _is_whole(self.checkpoint)
            return state, None
        try:
            return _load_checked(self.checkpoint, check), None
        except CheckpointError as error:
            failure = error
        if not os.path.lexists(self.previous):
            raise failure
        try:
            state = _load_checked(self.previous, check)
        except CheckpointError as error:
            raise CheckpointError(f"{failure}; {error}") from failure
        self._is_damaged = True
        return state, str(failure)


def _is_whole(path: Path) -> bool:
    try:
        checkpoint.load(path)
    except CheckpointError:
        return False
    return True


def _load_checked(
    path: Path, check: Callable[[dict[str, Any]], None] | None
) -> dict[str, Any]:
    state = checkpoint.load(path)
    try:
        if check is not None:
            check(state)
    except Exception as error:
        reason = one_line(error)
        if isinstance(error, KeyError):
            reason = f"none of {reason}"
        raise CheckpointError(
            f"{path}: expected a run of this program, got {reason}"
        ) from error
    return state


def _lock(folder: Path) -> int | None:
    """The folder itself, open and locked: nothing is left behind. None if it cannot be
    had.

    Raises:
        BlockingIOError: another process has it.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise BlockingIOError(
            f"run: expected one that no process is at work on, got {folder}, which "
            "another process has"
        ) from None
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _is_another_alive(pid: int) -> bool:
    """Whether a process other than this one has that number."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True
