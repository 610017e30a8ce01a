"""The command line, colours where somebody sees them, tables, and waiting for a key."""

from __future__ import annotations

import argparse
import html
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

_CODES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "cyan": "36"}


class Parser(argparse.ArgumentParser):
    """argparse with a program's docstring as its help, and its errors on one line.

    Parsing is the first that a program does, so it is here that its standard streams
    are made to take every character: see :func:`replace_unencodable`.

    Args:
        doc: the docstring: its first line, and what comes after the first empty one.
        options: of ``argparse.ArgumentParser``.
    """

    def __init__(self, doc: str | None = None, **options: Any) -> None:
        if doc is not None:
            description, _, epilog = doc.partition("\n\n")
            options = {
                "description": description,
                "epilog": epilog,
                "formatter_class": argparse.RawDescriptionHelpFormatter,
                "allow_abbrev": False,
                **options,
            }
        super().__init__(**options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        replace_unencodable()
        given = sys.argv[1:] if args is None else args
        for text in given:
            if text.startswith("--") and text.endswith("=--"):
                # Python 3.11 makes an empty list of this, whatever the type.
                self.error(f"argument {text[:-3]}: expected a value, got '--'")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        message = " ".join(message.splitlines())
        self.exit(2, f"error: {message} (--help lists the options)\n")


def replace_unencodable() -> None:
    """Make the standard streams replace the characters that their encoding lacks.

    Output in cp1252 has "?" for σ then, and input that cannot be decoded U+FFFD. An
    error handler that never raises, such as backslashreplace, stays as it is.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        # A stream that stands in for a standard one may have no such method.
        reconfigure = getattr(stream, "reconfigure", None)
        handlers = ("strict", "surrogateescape", "surrogatepass")  # they may raise
        if reconfigure and stream.errors in handlers:
            with suppress(OSError, ValueError):  # closed, or read from already
                reconfigure(errors="replace")


def reader_left() -> int:
    """When whoever read standard output has seen enough, as head does: nothing more is
    said. Returns the exit status, that of SIGPIPE."""
    with suppress(OSError, ValueError):  # what stands for it may be no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141


def is_terminal(stream: Any) -> bool:
    """Whether somebody sits at the other end of `stream`."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # None, as under pythonw, or closed
        return False


def in_colour(stream: Any) -> bool:
    """Whether what is written to `stream` may have colours: on a terminal that can,
    unless NO_COLOR is set (no-color.org)."""
    wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return wanted and is_terminal(stream)


def paint(text: str, style: str, on: bool = True) -> str:
    """`text` in the style of that name, or as it is if not `on`."""
    return f"\x1b[{_CODES[style]}m{text}\x1b[0m" if on else text


def wait_for_key(prompt: str) -> str:
    """The next key pressed; where standard input is no terminal, the next line of it,
    without a prompt. "" at its end."""
    if not is_terminal(sys.stdin):
        return sys.stdin.readline() if sys.stdin is not None else ""
    sys.stdout.flush()
    with _unbuffered() as key:
        print(prompt, end="", file=sys.stderr, flush=True)
        try:
            return key()
        finally:
            print(f"\r{' ' * len(prompt)}\r", end="", file=sys.stderr, flush=True)


@contextmanager
def _unbuffered() -> Iterator[Callable[[], str]]:
    """What reads one key from the terminal; a line where the system cannot."""
    try:
        import termios
        import tty
    except ImportError:  # Windows
        yield sys.stdin.readline
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        # Not raw: Ctrl-C still interrupts. Now: keys pressed already are not lost.
        tty.setcbreak(descriptor, termios.TCSANOW)
        # Not through sys.stdin, whose buffer would keep the rest of an arrow key.
        yield lambda: os.read(descriptor, 32).decode(errors="replace")
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def aligned(lines: Sequence[Sequence[str]], left: int) -> str:
    """The cells as a table: the first `left` columns flush left, the rest right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in lines
    )


# Dark text on a light ground: legible in a light notebook and in a dark one.
_VERDICTS = {
    "good": "background:#d5efdc;color:#0b4a1d",
    "bad": "background:#fbd5cf;color:#7a1208",
    "neutral": "background:#fcefc7;color:#5c4300",
}


def html_table(
    caption: str,
    lines: Sequence[Sequence[str]],
    left: int,
    verdicts: Mapping[str, str],
) -> str:
    """The cells as an HTML table for a notebook, whatever text they hold.

    Args:
        caption: what stands above it.
        lines: the headings, and the rows.
        left: how many columns are flush left; the rest are flush right.
        verdicts: the cells that are coloured, each "good", "bad" or "neutral".
    """

    def cell(tag: str, i: int, text: str) -> str:
        colour = _VERDICTS[verdicts[text]] if tag == "td" and text in verdicts else ""
        style = f"text-align:{'left' if i < left else 'right'};{colour}"
        return f'<{tag} style="{style}">{html.escape(text)}</{tag}>'

    tags = ["th", *["td"] * (len(lines) - 1)]
    rows = [
        "<tr>" + "".join(cell(tag, i, text) for i, text in enumerate(line)) + "</tr>"
        for tag, line in zip(tags, lines, strict=True)
    ]
    style = "text-align:left;white-space:pre-line"
    caption = f'<caption style="{style}">{html.escape(caption)}</caption>'
    return f"<table>{caption}{''.join(rows)}</table>"
