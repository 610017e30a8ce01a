"""Processes that the tests start, and how the tests wait for them.

- A shell that starts the tests in the background has SIGINT ignored, and children
  inherit that. `conftest.py` gives this process the default handler, and so theirs.
- How long a step takes depends on the machine and on what else it does. The tests wait
  for conditions, and give up only where something hangs.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LIMIT = 900  # seconds; what takes longer hangs


@contextlib.contextmanager
def ctrl_c(handler: Any) -> Iterator[None]:
    """Handle SIGINT so in the block. Children get the default handler where it is a
    function, and SIG_IGN where it is that."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def start(
    *command: Any,
    env: Mapping[str, str] | None = None,
    ignores_ctrl_c: bool = False,
    **options: Any,
) -> subprocess.Popen[Any]:
    """Start `command` with pipes for its output and errors, as text.

    Args:
        command: program and arguments.
        env: what is added to the environment, which has this repository on PYTHONPATH.
        ignores_ctrl_c: whether the child starts with SIGINT ignored.
        options: of `subprocess.Popen`.
    """
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with ctrl_c(signal.SIG_IGN if ignores_ctrl_c else signal.default_int_handler):
        return subprocess.Popen(
            list(map(str, command)),
            env={**os.environ, **environment, **(env or {})},
            **{**pipes, **options},
        )


def wait(process: subprocess.Popen[Any]) -> int:
    """Wait for the end of `process`, whose pipes the test sees to; its status."""
    try:
        return process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"{process.args}: hangs") from None


def finish(process: subprocess.Popen[Any]) -> tuple[Any, Any]:
    """Wait for the end of `process`, and return its output and errors."""
    try:
        return process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"{process.args}: hangs; {out!r}; {err!r}") from None


def run(*command: Any, **options: Any) -> subprocess.CompletedProcess[Any]:
    """:func:`start` a command and :func:`finish` it."""
    process = start(*command, **options)
    out, err = finish(process)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """Read `process`'s output up to a line that has `text`, and return that line."""
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return line
    raise AssertionError(f"{text!r} never came; {finish(process)[1]}")


def wait_until(condition: Callable[[], Any], what: str) -> None:
    """Wait until `condition` holds."""
    give_up = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < give_up, f"hangs before {what}"
        time.sleep(0.005)


class Driver:
    """A process that forks after its imports, so that a test may run many programs.

    ``survival_driver.py`` says what an order may have.
    """

    def __init__(self) -> None:
        # Python warns of forks beside threads; before a fork there are none of ours.
        self.process = start(
            sys.executable,
            ROOT / "tests" / "survival_driver.py",
            env={"PYTHONWARNINGS": "ignore"},
            stdin=subprocess.PIPE,
            stderr=None,
        )
        self.answers, self.orders = self.process.stdout, self.process.stdin
        assert json.loads(self.answers.readline()) == {"ready": True}

    def run(self, *argv: Any, **order: Any) -> dict[str, Any]:
        """Run a program to its end."""
        order = {"argv": list(map(str, argv)), **order}
        self.orders.write(json.dumps(order) + "\n")
        self.orders.flush()
        answer = json.loads(self.answers.readline())
        assert "Traceback" not in answer["err"], answer["err"]
        return answer

    def close(self) -> None:
        self.orders.close()
        wait(self.process)
        self.answers.close()
