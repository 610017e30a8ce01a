"""The folder of a run: settings, checkpoints, and a lock for one process at a time."""

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
    """``runs/<name>/``: settings.json, versions.json, checkpoint.pt, the checkpoint
    before it in checkpoint.previous.pt, event files, and at the end learning.png.

    Args:
        path: of an existing folder (:meth:`create` makes one), or of a checkpoint in
            it. "checkpoint.pt" means the run; :meth:`load` returns any other one.

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
        """Open the folder of the checkpoint `file`, to continue from it."""
        self.path = file.parent
        if os.path.islink(file) and not self.has_settings:  # from another folder
            file = Path(os.path.realpath(file))
            self.path = file.parent
        self._chosen = None if file == self.checkpoint else file

    @property
    def checkpoint(self) -> Path:
        """The path of the newest checkpoint."""
        return self.path / NEWEST

    @property
    def previous(self) -> Path:
        """The path of the checkpoint before it."""
        return self.path / PREVIOUS

    @classmethod
    def create(cls, logdir: str | os.PathLike[str], name: str) -> RunFolder:
        """Make ``logdir/name``.

        Args:
            logdir: the folder of all runs; made if it is missing.
            name: of this run; a plain folder name that does not exist yet.

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
                f"name: {path} exists; choose another, or continue with --resume {path}"
            ) from None
        except OSError as error:
            reason = error.strerror
            raise OSError(
                f"logdir: cannot make the run folder {path}: {reason}"
            ) from None
        return cls(path)

    def discard(self) -> None:
        """Remove the folder, of a run that has no checkpoint yet."""
        shutil.rmtree(self.path, ignore_errors=True)

    def write(self, **contents: Any) -> None:
        """Write files of JSON.

        Args:
            contents: by name: ``settings=...`` is written to settings.json.

        Raises:
            OSError: a file cannot be written.
        """
        for name, content in contents.items():
            text = json.dumps(content, indent=2, default=str) + "\n"
            write_atomically(self.path / f"{name}.json", text.encode())

    def read(self, name: str) -> Any:
        """Return the content of a file from :meth:`write`.

        Args:
            name: its keyword.

        Raises:
            CheckpointError: the file is missing or is not JSON.
        """
        path = self.path / f"{name}.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: expected {name}, got {error}") from error

    @property
    def never_began(self) -> bool:
        """Whether the run was stopped before its first checkpoint."""
        written = self.checkpoint, self.previous, *filter(None, [self._chosen])
        return self.has_settings and not any(map(os.path.lexists, written))

    @property
    def has_settings(self) -> bool:
        """Whether this is a run's folder, not just a folder with a checkpoint."""
        return os.path.isfile(self.path / "settings.json")

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Lock the run against other processes while the block runs, and remove the
        temporary files of saves that were killed.

        The system releases the lock however this process ends. On systems without such
        locks (Windows, some network file systems) nothing is locked or removed.

        Raises:
            BlockingIOError: another process holds the lock.
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
        """Remove the temporary files of processes that have ended."""
        for path in self.path.iterdir():
            match = TEMPORARY.fullmatch(path.name)
            if match and not _is_another_alive(int(match[1])):
                with contextlib.suppress(OSError):
                    path.unlink()

    def save(self, state: dict[str, Any]) -> None:
        """Write the newest checkpoint; the one before it becomes the previous one.

        Args:
            state: tensors, numbers, strings, and lists and dicts of them.

        Raises:
            OSError: the checkpoint cannot be written.
            TypeError: `state` has a part that a checkpoint cannot hold.
        """
        if self._is_damaged:  # so that it does not replace the intact one before it
            self._set_aside()
        checkpoint.save(self.checkpoint, state, self.previous)

    def what_is_left(self) -> str:
        """Say which checkpoint is intact, for the final error message."""
        for path in (self.checkpoint, self.previous):
            if _is_intact(path):
                return f"{path} is intact; to continue: --resume {self.path}"
        return "no checkpoint is left"

    def _set_aside(self) -> None:
        """Rename the damaged checkpoint."""
        for i in range(1, 1000):
            aside = self.path / f"checkpoint.damaged{f'-{i}' if i > 1 else ''}.pt"
            if not os.path.lexists(aside):
                break
        with contextlib.suppress(FileNotFoundError):
            # The file itself: a link to it then leads to the next checkpoint.
            shutil.move(os.path.realpath(self.checkpoint), aside)
        self._is_damaged = False

    def load(
        self, check: Callable[[dict[str, Any]], None] | None = None
    ) -> tuple[dict[str, Any], str | None]:
        """Return the state of the newest checkpoint that is intact and passes `check`,
        or of the checkpoint that was passed to the constructor.

        Args:
            check: raises any error for a state that cannot be used.

        Returns:
            the state, and None or, if it is the previous checkpoint's, the reason why
            the newest cannot be used.

        Raises:
            CheckpointError: no checkpoint can be used.
        """
        if self._chosen is not None:
            state = _load_checked(self._chosen, check)
            self._is_damaged = not _is_intact(self.checkpoint)
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


def _is_intact(path: Path) -> bool:
    """Return whether a checkpoint can be loaded."""
    try:
        checkpoint.load(path)
    except CheckpointError:
        return False
    return True


def _load_checked(
    path: Path, check: Callable[[dict[str, Any]], None] | None
) -> dict[str, Any]:
    """Return a checkpoint's state; raise CheckpointError if `check` raises."""
    state = checkpoint.load(path)
    try:
        if check is not None:
            check(state)
    except Exception as error:
        reason = one_line(error)
        if isinstance(error, KeyError):
            reason = f"a state without {reason}"
        raise CheckpointError(
            f"{path}: expected a run of this program, got {reason}"
        ) from error
    return state


def _lock(folder: Path) -> int | None:
    """Open and lock the folder itself, which needs no lock file, and return its
    descriptor; None where the system has no such locks.

    Raises:
        BlockingIOError: another process holds the lock.
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
            f"run: expected one that no other process uses, got {folder}, which "
            "another process has"
        ) from None
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _is_another_alive(pid: int) -> bool:
    """Return whether a process other than this one has that number."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True
