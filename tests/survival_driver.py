"""Runs programs, the main job above all, each in a child that is forked after the
imports, and lets something happen to it at a chosen moment.

Reads an order a line from standard input, as JSON, and answers each with a line:

    argv: of the program
    program: a path from the repository's root, experiments/mnist.py if absent
    processes: how many children run it together, as torchrun would start them; without
        it there is one, by itself
    ignores ctrl-c: whether SIGINT is ignored
    happening: what is to happen, a key of HAPPENINGS; None for nothing
    at: the number of the call before which it happens; or, as {"seconds": s}, the time
        after which the parent sends "signal" (SIGKILL if absent), counted from the
        moment at which "exists" is there (from the start if absent)
    moments: the calls that are counted, all of MOMENTS if absent
    user: to become, where permissions are to bind
    largest: bytes that a file may have

The answer has the exit status (negative for a signal; of several children the first
that is not 0), the output, the errors, and the number of calls that were counted.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import mmap
import os
import resource
import runpy
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What a save consists of; and the writes to the event file.
MOMENTS = ("open", "fsync", "link", "replace", "unlink", "_append")
COUNTER = mmap.mmap(-1, 8)  # shared with the children


def count() -> int:
    number = struct.unpack("q", COUNTER[:8])[0] + 1
    COUNTER[:8] = struct.pack("q", number)
    return number


def kill(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def tear(name: str, arguments: tuple) -> None:
    """Killed in the middle of a write: half of the file, or of the record, is there."""
    if name == "fsync":
        with contextlib.suppress(OSError):  # a folder
            os.ftruncate(arguments[0], os.fstat(arguments[0]).st_size // 2)
    if name == "_append":
        writer, content = arguments
        with open(writer.path, "ab") as file:
            file.write(content[: len(content) // 2])
    kill()


def fill(name: str, arguments: tuple) -> None:
    """The disk is full from here on."""
    if name in ("fsync", "open", "_append"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def lock_out(name: str, arguments: tuple) -> None:
    """The run folder becomes read-only."""
    os.chmod(sys.argv[-1], 0o555)
    os.chmod(next(Path(sys.argv[-1]).glob("events*")), 0o444)


def remove(name: str, arguments: tuple) -> None:
    """The log folder is deleted."""
    shutil.rmtree(Path(sys.argv[-1]).parent)


def interrupt(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def terminate(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def swap(name: str, arguments: tuple) -> None:
    """No hard links on this file system."""
    if name == "link":
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))


HAPPENINGS = {
    "kill": kill, "tear": tear, "full": fill, "read-only": lock_out, "gone": remove,
    "int": interrupt, "term": terminate, "no links": swap,
}  # fmt: skip
LASTING = {"full", "no links"}


def prepare(order: dict) -> None:
    """Wrap the moments' calls, in the child alone."""
    from torchbp.training import EventWriter

    happening, at = order.get("happening"), order.get("at")

    def wrap(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def wrapped(*arguments, **kwargs):
            number = count()
            if happening and not isinstance(at, dict):
                happens = number >= at if happening in LASTING else number == at
                if happens:
                    HAPPENINGS[happening](name, arguments)
            return original(*arguments, **kwargs)

        setattr(owner, name, wrapped)

    for name in order.get("moments", MOMENTS):
        wrap(EventWriter if name == "_append" else os, name)
    if "largest" in order:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["largest"],) * 2)
    if order.get("user") is not None:
        os.setgroups([])
        os.setgid(order["user"])
        os.setuid(order["user"])


def child(order: dict, streams: list, ranks: dict[str, str]) -> None:
    os.dup2(streams[0].fileno(), 1)
    os.dup2(streams[1].fileno(), 2)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    program = str(ROOT / order.get("program", "experiments/mnist.py"))
    sys.argv = [program, *order["argv"]]
    os.environ.update(ranks)
    ignored = order.get("ignores ctrl-c")
    signal.signal(
        signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler
    )
    prepare(order)
    runpy.run_path(program, run_name="__main__")


def fork(order: dict, streams: list, ranks: dict[str, str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 0
    try:
        child(order, streams, ranks)
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        status = 1
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ranks(processes: int | None) -> list[dict[str, str]]:
    """What torchrun tells each of so many processes; nothing for one by itself."""
    if processes is None:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "WORLD_SIZE": str(processes),
    }
    return [{**world, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(processes)]


def run(order: dict) -> dict:
    COUNTER[:8] = struct.pack("q", 0)
    worlds = ranks(order.get("processes"))
    streams = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
    pids = [fork(order, streams, world) for world in worlds]
    at = order.get("at")
    if isinstance(at, dict):
        while "exists" in at and not os.path.exists(at["exists"]):
            time.sleep(0.001)
        time.sleep(at["seconds"])
        os.kill(pids[0], at.get("signal", signal.SIGKILL))
    ends = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    texts = []
    for stream in streams:
        stream.seek(0)
        texts.append(stream.read())
        stream.close()
    return {
        "status": next(filter(None, ends), 0),
        "out": texts[0],
        "err": texts[1],
        "calls": struct.unpack("q", COUNTER[:8])[0],
    }


def main() -> None:
    # What a run needs, once for all children.
    import torch
    import torch.utils.tensorboard
    from tensorboard.plugins.custom_scalar import layout_pb2  # noqa: F401

    from torchbp import data

    torch.optim.SGD([torch.zeros(1, requires_grad=True)])  # its first imports much
    data.load = functools.cache(data.load)
    data.load("digits", None)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
