"""An examination in a child process, for code that may end the process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from torchbp.examination.report import Finding


def in_a_child(run: Callable[[], Iterator[Any]], checks: Sequence[str]) -> list[Any]:
    """What `run` yields (a name, findings, the number of calls) in a child process.

    If that ends too early, the check that was running has failed, and those after it
    are not applicable.

    Raises:
        ValueError: this process cannot be forked, or autograd could not run in a fork
            of it.
        Exception: what `run` raises.
    """
    if "fork" not in multiprocessing.get_all_start_methods():
        raise ValueError("isolate: expected a system that forks processes")
    if torch.cuda.is_initialized():
        raise ValueError("isolate: expected no CUDA in use: it cannot be forked")
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(run, sender), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python's own, about threads and fork
        child.start()
    sender.close()
    received: list[Any] = []
    try:
        while True:
            item = receiver.recv()
            if isinstance(item, BaseException):
                raise item
            received.append(item)
    except EOFError:
        child.join()
    finally:
        child.kill()
        child.join()
        receiver.close()
    whole = len(received) > 1 and isinstance(received[-1], int)
    return received if whole else _completed(received, checks, child.exitcode or 0)


def _send(run: Callable[[], Iterator[Any]], sender: Any) -> None:
    torch.set_num_threads(1)  # threads of the parent are not there
    try:
        _check_autograd()
        for item in run():
            sender.send(item)
    except Exception as error:
        sender.send(error)
    sender.close()
    os._exit(0)  # what the parent registered for its exit is the parent's


def _check_autograd() -> None:
    """Refuse to examine where torch's autograd refuses to run: in a fork of a process
    in which it has started threads, for a GPU or for a backward inside a backward."""
    x = torch.zeros((), dtype=torch.float32, device="cpu", requires_grad=True)
    try:
        x.neg().backward()
    except RuntimeError:
        raise ValueError(
            "isolate: expected a process in which autograd has started no threads; "
            "examine in a fresh one: python -m torchbp examine ... --isolate"
        ) from None


def _completed(received: list[Any], checks: Sequence[str], status: int) -> list[Any]:
    """What came, the check at which the process ended, and the rest."""
    name, *findings = received or ["fn"]
    died = signal.Signals(-status).name if status < 0 else f"status {status}"
    rest = list(checks[len(findings) :]) or ["forward"]
    findings.append(
        Finding(
            rest[0],
            "fail",
            f"the process ended in this check with {died}",
            "look for memory read or freed behind torch's back: NumPy, ctypes, C code",
        )
    )
    for check in rest[1:]:
        findings.append(Finding(check, "not applicable", f"see {rest[0]}"))
    return [name, *findings, 0]
