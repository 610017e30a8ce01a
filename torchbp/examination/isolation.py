"""Keep an examination away from the caller's state, and from the caller's process."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from torchbp.examination.report import Finding


@contextmanager
def undisturbed(inputs: tuple[Any, ...]) -> Iterator[None]:
    """Run with grad on, autocast and inference mode off; restore the caller's modes and
    random state."""
    devices = sorted(
        {t.device.index for t in inputs if isinstance(t, Tensor) and t.is_cuda}
    )
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in {"cpu", *(t.device.type for t in inputs if isinstance(t, Tensor))}:
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.callback(random.setstate, random.getstate())
        if "numpy" in sys.modules:
            numpy = sys.modules["numpy"].random
            stack.callback(numpy.set_state, numpy.get_state())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield


def in_a_child(run: Callable[[], Iterator[Any]], checks: Sequence[str]) -> list[Any]:
    """Return what `run` yields (a name, findings, the number of calls) in a child
    process.

    If that ends too early, the running check has failed, and those after it are not
    applicable.

    Args:
        run: the examination.
        checks: the checks that it runs, in order.

    Raises:
        ValueError: processes cannot be forked on this system, CUDA is in use, or
            autograd cannot run in a fork of this process.
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
    """Send what `run` yields or raises, and end the process."""
    torch.set_num_threads(1)  # a fork has none of its parent's threads
    try:
        _check_autograd()
        for item in run():
            sender.send(item)
    except Exception as error:
        sender.send(error)
    sender.close()
    os._exit(0)  # without the parent's exit handlers


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
    """What was received, the check at which the process ended, and the rest."""
    name, *findings = received or ["fn"]
    died = signal.Signals(-status).name if status < 0 else f"status {status}"
    first, *rest = checks[len(findings) :] or ["forward"]
    findings.append(
        Finding(
            first,
            "fail",
            f"the process ended in this check with {died}",
            "look for memory that NumPy, ctypes or C code reads or frees",
        )
    )
    findings += [Finding(check, "not applicable", f"see {first}") for check in rest]
    return [name, *findings, 0]
