"""Exercises: write backpropagation yourself, in nine small files, and be told which
equation is wrong, and how.

  exercises                list them, and which are done
  exercises start FOLDER   copy the files to a folder; existing ones do not change
  exercises check [NAME]   grade one file, or all up to the first that is not right;
                           with --watch again whenever a file is saved
  exercises hint NAME      show the hints, one more each time
  exercises solution NAME  show the solution

NAME is a name, a number or a file: bp2, 3 or 3_bp2.py. The files are those of the
current folder, or of --folder. The file .torchbp-exercises in it records which were
right, and the hints shown.

Exit status: 0 the file checked (last) is right, 1 it is not, 2 a usage error, 130 a
file's code was interrupted.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from textwrap import fill
from typing import Any

from torchbp._files import write_atomically
from torchbp._terminal import aligned, in_colour, paint
from torchbp.exercises.grading import WIDTH, Verdict, grade
from torchbp.exercises.material import Exercise, exercises

LOG = ".torchbp-exercises"
SECONDS = 0.2  # between two checks for a save
COMMAND = "python -m torchbp exercises"


def add_exercises(commands: Any) -> None:
    """Declare the options of `exercises`.

    Args:
        commands: the subparsers of ``python -m torchbp``.

    Examples:
        >>> parser = argparse.ArgumentParser()
        >>> add_exercises(parser.add_subparsers())
        >>> parser.parse_args(["exercises", "hint", "bp2"]).name
        'bp2'
    """
    parser = commands.add_parser(
        "exercises",
        help="write each equation yourself, and be told what is wrong",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_list)
    folder = {"metavar": "FOLDER", "help": "the folder of the files (.)"}
    parser.add_argument("--folder", default=".", **folder)
    actions = parser.add_subparsers(metavar="ACTION", title="actions")
    for run, text in (
        (_start, "copy the files to a folder"),
        (_check, "grade one file, or all up to the first that is not right"),
        (_hint, "show the hints, one more each time"),
        (_solution, "show the solution"),
    ):
        action = actions.add_parser(run.__name__[1:], help=text, description=text)
        action.set_defaults(run=run)
        if run is _start:
            action.add_argument("folder", metavar="FOLDER")
            continue
        nargs = "?" if run is _check else None
        action.add_argument("name", metavar="NAME", nargs=nargs)
        action.add_argument("--folder", default=argparse.SUPPRESS, **folder)
        if run is _check:
            help = "check again after each save"
            action.add_argument("--watch", action="store_true", help=help)


def _list(arguments: argparse.Namespace) -> int:
    """Print a table of the exercises, and which are done."""
    folder, rows = Path(arguments.folder), []
    log = _read_log(folder)
    for exercise in exercises():
        path = _find(folder, exercise)
        state = ("done" if _done(exercise, path) in log else "open") if path else ""
        rows.append([str(exercise.number), exercise.name, exercise.title, state])
    action = "check" if any(row[-1] for row in rows) else "start FOLDER"
    print(f"{aligned(rows, 4)}\n\n{COMMAND} {action}   (--help has the rest)")
    return 0


def _start(arguments: argparse.Namespace) -> int:
    """Write the files that the folder lacks."""
    folder = Path(arguments.folder)
    folder.mkdir(parents=True, exist_ok=True)
    existing = list(filter(None, [_find(folder, e) for e in exercises()]))
    for exercise in exercises():
        if not _find(folder, exercise):
            write_atomically(folder / exercise.file, exercise.template.encode())
    print(f"{len(exercises()) - len(existing)} exercises written to {folder}")
    if existing:
        print(f"not changed: {', '.join(path.name for path in existing)}")
    print("Replace the three dots in each file with your code. Then:\n")
    print(f"  cd {folder}\n  {COMMAND} check --watch")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    """Grade the chosen files, with --watch again after each save."""
    if arguments.name is None:
        folder, chosen = Path(arguments.folder), list(exercises())
    else:
        folder, *chosen = _chosen(arguments)
    if not any(_find(folder, exercise) for exercise in chosen):
        raise ValueError(
            f"{folder}: expected {chosen[0].file}, got no such file; --folder names "
            "another folder, exercises start writes the files"
        )
    status = 130
    try:
        while True:
            before, status = _saved(folder), _check_once(folder, chosen)
            if not arguments.watch:
                return status
            print(
                f"\n{time.strftime('%X')} waiting for a save; Ctrl-C ends", flush=True
            )
            while _saved(folder) == before:
                time.sleep(SECONDS)
            time.sleep(SECONDS)  # the editor may still be writing
    except KeyboardInterrupt as error:
        place = str(error)  # "" if no code of the learner's was running
        print(f"\ninterrupted in {place}" if place else "")
        return 130 if place else status


def _check_once(folder: Path, chosen: Sequence[Exercise]) -> int:
    """Grade in order, up to the first that is not right; return the exit status."""
    for exercise in chosen:
        path = _find(folder, exercise)
        verdict = Verdict("open", [f"no {exercise.file}: {COMMAND} start {folder}"])
        if path:
            verdict = grade(exercise, path)
        ok = verdict.word == "right"
        word = paint(verdict.word, "green" if ok else "red", in_colour(sys.stdout))
        print(f"{exercise.number}  {exercise.name:<16} {word}")
        for text in verdict.paragraphs:
            print("\n" + (text if "\n" in text else fill(text, WIDTH)))
        if not ok:
            print(f"\n{COMMAND} hint {exercise.name}")
            return 1
        with suppress(OSError):  # the folder may be read-only
            _write_log(folder, _done(exercise, path or folder))
    if len(chosen) > 1:
        print("\nAll are right. torchbp.backprop does the same for any network.")
    return 0


def _hint(arguments: argparse.Namespace) -> int:
    """Print the hints shown before and the next one."""
    folder, exercise = _chosen(arguments)
    shown = _read_log(folder).count(f"hint {exercise.name}") + 1
    _write_log(folder, f"hint {exercise.name}")
    for number, hint in enumerate(exercise.hints[:shown], start=1):
        print(fill(f"{number}. {hint}", WIDTH, subsequent_indent="   "))
    if shown > len(exercise.hints):
        print(f"\nThere are no more: {COMMAND} solution {exercise.name}")
    return 0


def _solution(arguments: argparse.Namespace) -> int:
    """Print the solution."""
    print(_chosen(arguments)[1].solution, end="")
    return 0


def _chosen(arguments: argparse.Namespace) -> tuple[Path, Exercise]:
    """Return the folder and the exercise of NAME: a name, a number or a file."""
    path = Path(arguments.name)
    stem = re.sub(r"(^\d+_|\.py$)", "", path.name)
    for exercise in exercises():
        if stem in (str(exercise.number), exercise.name):
            return Path(arguments.folder) / path.parent, exercise
    names = ", ".join(exercise.name for exercise in exercises())
    raise ValueError(f"NAME: expected one of {names}, got {arguments.name!r}")


def _find(folder: Path, exercise: Exercise) -> Path | None:
    """Return the learner's file, with any number: another version may have another."""
    pattern = re.compile(rf"(\d+_)?{exercise.name}\.py")
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return next((path for path in paths if pattern.fullmatch(path.name)), None)


def _saved(folder: Path) -> dict[Path, int]:
    """Return the time of each file's last save."""
    with suppress(OSError):  # an editor may be replacing one
        return {path: path.stat().st_mtime_ns for path in folder.glob("*.py")}
    return {}


def _done(exercise: Exercise, path: Path) -> str:
    """Return the log's line for a right file with this content."""
    return f"done {exercise.name} {hashlib.sha256(path.read_bytes()).hexdigest()}"


def _read_log(folder: Path) -> list[str]:
    """Return the log's lines."""
    log = folder / LOG
    if not log.is_file():
        return []
    return log.read_text(encoding="utf-8", errors="replace").splitlines()


def _write_log(folder: Path, line: str) -> None:
    """Add a line to the log: a hint's each time, any other once."""
    if line.startswith("hint") or line not in _read_log(folder):
        with (folder / LOG).open("a", encoding="utf-8") as log:
            log.write(f"{line}\n")
