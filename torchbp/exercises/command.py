"""python -m torchbp exercises: list, start, check, hint, solution."""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
import time
from pathlib import Path
from textwrap import wrap
from typing import Any

from torchbp._files import write_atomically
from torchbp._terminal import aligned, in_colour, paint
from torchbp.exercises.grading import Verdict, grade
from torchbp.exercises.material import Exercise, exercises

EXERCISES = """\
Nine small files in which you write backpropagation yourself, and a grader that tells
you which equation is wrong, and how.

  start FOLDER    copy the files there (nothing in it is overwritten)
  check [NAME]    grade one, or all in order up to the first that is not right
  hint NAME       one hint more each time
  solution NAME   the solution
  (nothing)       list them, and which are done

They look for the files in the current folder, or in --folder FOLDER. What was right and
which hints were shown stands in the file .torchbp-exercises there. NAME is a name, a
number or a file: bp2, 3 or 3_bp2.py.

Exit status: 0 what was checked is right, 1 it is not, 2 a usage error.
"""
LOG = ".torchbp-exercises"
SECONDS = 0.2  # between two looks at the files
WIDTH = 80


def add_exercises(commands: Any) -> None:
    """Declare `exercises` and its actions.

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
        description=EXERCISES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_list, folder=".")
    actions = parser.add_subparsers(metavar="ACTION")
    folder = {"metavar": "FOLDER", "help": "where the files are (.)"}
    parser.add_argument("--folder", **folder)
    start = actions.add_parser("start", help="copy the files to a folder")
    start.add_argument("folder", metavar="FOLDER")
    start.set_defaults(run=_start)
    check = actions.add_parser("check", help="grade what is written")
    check.add_argument("name", nargs="?", metavar="NAME")
    check.add_argument("--watch", action="store_true", help="again after each save")
    check.set_defaults(run=_check)
    hint = actions.add_parser("hint", help="show one hint more")
    hint.add_argument("name", metavar="NAME")
    hint.set_defaults(run=_hint)
    solution = actions.add_parser("solution", help="show the solution")
    solution.add_argument("name", metavar="NAME")
    solution.set_defaults(run=_solution)
    for action in (check, hint):
        action.add_argument("--folder", default=argparse.SUPPRESS, **folder)


def _list(arguments: argparse.Namespace) -> int:
    folder = Path(arguments.folder)
    log, rows = _read_log(folder), []
    for exercise in exercises():
        path = _find(folder, exercise)
        state = "" if path is None else "open"
        if path and any(line.startswith(f"done {exercise.name} ") for line in log):
            state = "done" if _done(exercise, path) in log else "changed since done"
        rows.append([str(exercise.number), exercise.name, exercise.title, state])
    print(aligned(rows, 4))
    action = "check" if any(row[-1] for row in rows) else "start FOLDER"
    print(f"\npython -m torchbp exercises {action}   (--help lists what else there is)")
    return 0


def _start(arguments: argparse.Namespace) -> int:
    folder = Path(arguments.folder)
    folder.mkdir(parents=True, exist_ok=True)
    left = []
    for exercise in exercises():
        if path := _find(folder, exercise):
            left.append(path.name)
        else:
            write_atomically(folder / exercise.file, exercise.template.encode())
    print(f"{len(exercises()) - len(left)} exercises written to {folder}")
    if left:
        print("left as they were: " + ", ".join(left))
    print(
        f"Open {exercises()[0].file} there, put your code in place of each ..., and\n\n"
        f"  cd {folder}\n  python -m torchbp exercises check --watch"
    )
    return 0


def _check(arguments: argparse.Namespace) -> int:
    folder, chosen = Path(arguments.folder), exercises()
    if arguments.name is not None:
        chosen = (_named(arguments.name),)
    if not any(_find(folder, exercise) for exercise in chosen):
        raise ValueError(f"expected {chosen[0].file} in {folder} (start {folder})")
    try:
        while True:
            before = _stamps(folder, chosen)
            status = _check_once(folder, chosen)
            if not arguments.watch:
                return status
            print("\nwaiting for a change (Ctrl-C ends)", flush=True)
            try:
                while _stamps(folder, chosen) == before:
                    time.sleep(SECONDS)
            except KeyboardInterrupt:
                print()
                return status
            print()
    except KeyboardInterrupt as error:
        print(f"\ninterrupted{f' in {error}' if str(error) else ''}")
        return 130


def _stamps(folder: Path, chosen: tuple[Exercise, ...]) -> list[tuple[int, int] | None]:
    """When each file was last saved, and its size."""
    stamps: list[tuple[int, int] | None] = []
    for exercise in chosen:
        try:
            status = (_find(folder, exercise) or folder / exercise.file).stat()
            stamps.append((status.st_mtime_ns, status.st_size))
        except OSError:  # an editor is just replacing it
            stamps.append(None)
    return stamps


def _check_once(folder: Path, chosen: tuple[Exercise, ...]) -> int:
    """Grade in order, up to the first that is not right; return the exit status."""
    colour = in_colour(sys.stdout)
    for exercise in chosen:
        path = _find(folder, exercise)
        verdict = Verdict(False, [f"not there: exercises start {folder} adds it"])
        if path is not None:
            verdict = grade(exercise, path)
        word = "right" if verdict.ok else "wrong"
        shown = paint(word, "green" if verdict.ok else "red", colour)
        print(f"{exercise.number}  {exercise.name:<16} {shown}")
        if verdict.lines:
            print()
        for line in verdict.lines:
            print("\n".join(wrap(line, WIDTH) if line[:1].isalpha() else [line]))
        if not verdict.ok:
            print(f"\npython -m torchbp exercises hint {exercise.name}")
            return 1
        if path is not None:
            _write_log(folder, _done(exercise, path))
    if len(chosen) > 1:
        print(f"\nAll {len(chosen)} are right.")
    return 0


def _hint(arguments: argparse.Namespace) -> int:
    folder, exercise = Path(arguments.folder), _named(arguments.name)
    shown = _read_log(folder).count(f"hint {exercise.name}") + 1
    for number, hint in enumerate(exercise.hints[:shown], start=1):
        print("\n".join(wrap(f"{number}. {hint}", WIDTH, subsequent_indent="   ")))
    if shown <= len(exercise.hints):
        _write_log(folder, f"hint {exercise.name}")
    else:
        print(f"There are no more: python -m torchbp exercises solution {exercise.name}")
    return 0


def _solution(arguments: argparse.Namespace) -> int:
    print(_named(arguments.name).solution, end="")
    return 0


def _named(name: str) -> Exercise:
    """The exercise of that name, number or file."""
    stem = Path(name).name.removesuffix(".py")
    for exercise in exercises():
        if stem == str(exercise.number) or _pattern(exercise).fullmatch(f"{stem}.py"):
            return exercise
    names = ", ".join(exercise.name for exercise in exercises())
    raise ValueError(f"NAME: expected one of {names}, got {name!r}")


def _pattern(exercise: Exercise) -> re.Pattern[str]:
    """Its file's name, whatever number another version has given it."""
    return re.compile(rf"(\d+_)?{exercise.name}\.py")


def _find(folder: Path, exercise: Exercise) -> Path | None:
    """The learner's file."""
    if not folder.is_dir():
        return None
    paths = sorted(folder.iterdir())
    return next((p for p in paths if _pattern(exercise).fullmatch(p.name)), None)


def _done(exercise: Exercise, path: Path) -> str:
    """The line of the log that says that this very file is right."""
    return f"done {exercise.name} {hashlib.sha256(path.read_bytes()).hexdigest()}"


def _read_log(folder: Path) -> list[str]:
    try:
        text = (folder / LOG).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    return text.splitlines()


def _write_log(folder: Path, line: str) -> None:
    """Add a line; one of a file that is done only once."""
    if line.startswith("hint") or line not in _read_log(folder):
        with (folder / LOG).open("a", encoding="utf-8") as log:
            log.write(f"{line}\n")
