"""Run blocks of code, each as if it were the only one.

    python block_driver.py FILE

FILE has a JSON list of programs. Each runs in a fork of this process, which has
imported torch, with an empty namespace, an empty working directory, and warnings as
errors. Prints a JSON list of [exit status, what was printed], error messages included.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any, NoReturn

import torch  # noqa: F401

import torchbp  # noqa: F401


def run(code: str) -> tuple[int, str]:
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as output:
        pid = os.fork()
        if pid == 0:
            run_in_child(code, folder, output)
        _, status = os.waitpid(pid, 0)
        output.seek(0)
        return os.waitstatus_to_exitcode(status), output.read().decode()


def run_in_child(code: str, folder: str, output: Any) -> NoReturn:
    status = 0
    try:
        os.chdir(folder)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        warnings.simplefilter("error")
        exec(compile(code, "block", "exec"), {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    programs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(json.dumps([run(code) for code in programs]))
