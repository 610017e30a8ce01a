"""Event files, which TensorBoard reads, in a folder of any name."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from typing import Any


def event_writer(folder: str | os.PathLike[str], **options: Any) -> Any:
    """Return a ``SummaryWriter`` whose event file lies in `folder`.

    TensorBoard takes only paths that UTF-8 can encode. Others have bytes that are not
    UTF-8 or, under LC_ALL=C without Python's UTF-8 mode, any character beyond ASCII:
    for them it is given a link to the folder, which is removed with the writer.

    Args:
        folder: of the event file; it exists.
        options: of ``torch.utils.tensorboard.SummaryWriter``.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with event_writer(folder) as writer:
        ...         writer.add_scalar("cost", 0.5, 1)
        ...     print(len(os.listdir(folder)), "file")
        1 file
    """
    from torch.utils.tensorboard import SummaryWriter

    path = os.fspath(folder)
    try:
        path.encode()
    except UnicodeEncodeError:
        place = tempfile.mkdtemp(prefix="torchbp-")
        link = os.path.join(place, "events")
        os.symlink(os.path.abspath(path), link, target_is_directory=True)
        writer = SummaryWriter(link, **options)
        weakref.finalize(writer, shutil.rmtree, place, ignore_errors=True)
        return writer
    return SummaryWriter(path, **options)
