"""Writing and reading TensorBoard's event files; a resumed run reads its own again."""

from __future__ import annotations

import itertools
import os
import socket
import struct
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["EventWriter", "event_files", "read_scalars"]

_NUMBER = itertools.count()


class EventWriter:
    """Writes a new event file; events wait in memory until a flush.

    ``SummaryWriter`` opens its file once for each record, in a second thread, and takes
    only paths that UTF-8 can encode. Here a flush is one write, in the caller's thread,
    where it may raise OSError.

    Args:
        folder: of the event file; made if it is missing.
        purge_step: TensorBoard ignores the points from this step on in earlier files of
            the folder; if None, it ignores none.

    Attributes:
        path: the event file.

    Raises:
        OSError: the folder cannot be made.
        ImportError: tensorboard is not installed.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with EventWriter(folder) as writer:
        ...         writer.add_scalar("cost", 0.5, 1)
        ...     read_scalars([writer.path.read_bytes()], "cost")
        {'cost': {1: 0.5}}
    """

    def __init__(
        self, folder: str | os.PathLike[str], purge_step: int | None = None
    ) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._waiting = bytearray()
        self._records = RecordWriter(_Appender(self._waiting))
        self._event = Event
        # TensorBoard reads event files in name order, and names begin with whole
        # seconds: this file must sort last.
        seconds = [path.name.split(".")[3] for path in event_files(folder)]
        after = [int(second) + 1 for second in seconds if second.isdigit()]
        second = max([int(time.time()), *after])
        process = f"{socket.gethostname()}.{os.getpid()}.{next(_NUMBER)}"
        os.makedirs(folder, exist_ok=True)
        self.path = Path(folder, f"events.out.tfevents.{second:010}.{process}")
        self._add(Event(file_version="brain.Event:2"), 0)
        if purge_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._add(Event(session_log=start), purge_step)

    def __enter__(self) -> EventWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()

    def _add(self, event: Any, step: int, wall_time: float | None = None) -> None:
        """Add an event to those waiting."""
        event.step = step
        event.wall_time = time.time() if wall_time is None else wall_time
        self._records.write(event.SerializeToString())

    def add_summary(
        self, summary: Any, step: int, wall_time: float | None = None
    ) -> None:
        """Add the values of a summary.

        Args:
            summary: a ``Summary`` of TensorBoard.
            step: the global step.
            wall_time: seconds since 1970; now if None.
        """
        self._add(self._event(summary=summary), step, wall_time)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        """Add a point to the curve `tag`.

        Args:
            tag: the curve's name; TensorBoard groups by its part before the slash.
            value: the point's height.
            step: the global step.
        """
        from torch.utils.tensorboard import summary

        self.add_summary(summary.scalar(tag, value), step)

    def add_text(self, tag: str, text: str, step: int) -> None:
        """Add Markdown to the TEXT tab.

        Args:
            tag: the text's name.
            text: Markdown.
            step: the global step.
        """
        from torch.utils.tensorboard import summary

        self.add_summary(summary.text(tag, text), step)

    def add_graph(self, graph: Any) -> None:
        """Add a graph for the GRAPHS tab.

        Args:
            graph: a ``GraphDef`` of TensorBoard.
        """
        self._add(self._event(graph_def=graph.SerializeToString()), 0)

    def flush(self) -> None:
        """Append the waiting events to the file, in one write.

        Raises:
            OSError: the file cannot be written.
        """
        content = bytes(self._waiting)
        # Cleared before the write, so that an interrupt after it causes no second one.
        self._waiting.clear()
        if content:
            self._append(content)

    def _append(self, content: bytes) -> None:
        """Append bytes to the file; a single write may be incomplete."""
        with open(self.path, "ab", buffering=0) as file:
            while content:
                content = content[file.write(content) or 0 :]


class _Appender:
    """The file of a ``RecordWriter``: it appends to a bytearray."""

    def __init__(self, content: bytearray) -> None:
        self.write = content.extend


def event_files(folder: str | os.PathLike[str]) -> list[Path]:
    """Return a folder's event files in the order in which TensorBoard reads them.

    Args:
        folder: of the run.

    Examples:
        >>> event_files("nowhere")
        []
    """
    return sorted(Path(folder).glob("events.out.tfevents.[0-9]*.*"))


def read_scalars(
    contents: Iterable[bytes], prefix: str, last_step: float = float("inf")
) -> dict[str, dict[int, float]]:
    """Return the curves of event files: {tag: {step: value}}.

    Of several points of one step the last one counts, as in TensorBoard: a resumed run
    replaces points of the session before it.

    Args:
        contents: of a run's event files, in the order of :func:`event_files`.
        prefix: of the tags of interest.
        last_step: later points are omitted.

    Examples:
        >>> read_scalars([], "cost")
        {}
    """
    from tensorboard.compat.proto.event_pb2 import Event

    curves: dict[str, dict[int, float]] = {}
    for content in contents:
        for record in _records(content, prefix.encode()):
            event = Event.FromString(record)
            for value in event.summary.value:
                is_scalar = value.WhichOneof("value") == "simple_value"
                if (
                    is_scalar
                    and value.tag.startswith(prefix)
                    and event.step <= last_step
                ):
                    curve = curves.setdefault(value.tag, {})
                    curve[event.step] = value.simple_value
    return curves


def _records(content: bytes, text: bytes) -> Iterator[bytes]:
    """Yield the records of an event file that contain `text`. A record that a kill has
    cut off is omitted, by the file's length and the record's checksum."""
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    at = 0
    while at + 12 <= len(content):
        (size,) = struct.unpack_from("<Q", content, at)
        record = content[at + 12 : at + 12 + size]
        checksum = content[at + 12 + size : at + 16 + size]
        if text in record and checksum == struct.pack("<I", masked_crc32c(record)):
            yield record
        at += 16 + size
