"""Command lines: parser, exit status, errors on one line, colours, tables, keys."""

from __future__ import annotations

import argparse
import html
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import MappingProxyType
from typing import Any, NoReturn

_CODES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "cyan": "36"}
_NO_STATUSES: Mapping[type[BaseException], int] = MappingProxyType({})


class UserError(RuntimeError):
    """A failure that the user can act on; its message is one line.

    Args:
        message: what is wrong; its lines are joined.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


def one_line(message: object) -> str:
    """Return an error, or any text, on one line.

    >>> one_line(ValueError("size mismatch:\\n\\t3 and 4"))
    'size mismatch: 3 and 4'
    """
    lines = (line.strip() for line in str(message).splitlines())
    return " ".join(filter(None, lines))


def print_error(message: object, prefix: str = "") -> None:
    """Print a message on one line of standard error, after `prefix`."""
    print(f"{prefix}{one_line(message)}", file=sys.stderr)


def print_note(message: object) -> None:
    """Print a remark that is no error on one line of standard error."""
    print_error(message, "NOTE: ")


def run_program(
    program: Callable[[], int],
    statuses: Mapping[type[BaseException], int] = _NO_STATUSES,
    prefix: str = "",
) -> int:
    """Run a program and return its exit status.

    A failure that the user can act on (ValueError, OSError, ImportError, UserError)
    ends it with one line on standard error and status 2, an interrupt with 130. If the
    reader of its output stops reading, as ``head`` does, it ends silently with 141, the
    status of SIGPIPE. Standard streams take every character: see
    :func:`replace_unencodable`.

    Args:
        program: returns the exit status, or raises SystemExit with it.
        statuses: the status of each further expected failure.
        prefix: of the line on standard error.
    """
    replace_unencodable()
    try:
        status = program()
        print(end="", flush=True)  # while a broken pipe is still caught
        return status
    except SystemExit as error:
        return int(error.code or 0)
    except KeyboardInterrupt:
        print_error("interrupted", prefix)
        return 130
    except BrokenPipeError:
        _discard_output()
        return 141
    except tuple(statuses) as error:
        print_error(error, f"{prefix}error: ")
        return next(s for kind, s in statuses.items() if isinstance(error, kind))
    except (ValueError, OSError, ImportError, UserError) as error:
        print_error(error, f"{prefix}error: ")
        return 2


def _discard_output() -> None:
    """Redirect standard output to nowhere, so that Python's last flush does not
    fail."""
    # The stream that replaces standard output may have no file descriptor.
    with suppress(AttributeError, OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Parser(argparse.ArgumentParser):
    """argparse with a program's docstring as its help and its errors on one line.

    Args:
        doc: the docstring; its first paragraph precedes the options in ``--help``, the
            rest follows them.
        options: arguments of ``argparse.ArgumentParser``.
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
        """Parse as argparse does, but refuse ``--option=--``."""
        for text in sys.argv[1:] if args is None else args:
            if text.startswith("--") and text.endswith("=--"):
                # Python 3.11 would turn this into an empty list of any type.
                self.error(f"argument {text[:-3]}: expected a value, got '--'")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Print the message on one line and exit with status 2."""
        self.exit(2, f"error: {one_line(message)} (--help lists the options)\n")


def replace_unencodable() -> None:
    """Make the standard streams replace the characters that their encoding lacks.

    Output in cp1252 then has "?" for σ, and input that cannot be decoded has U+FFFD. An
    error handler that never raises, such as backslashreplace, stays as it is.
    """
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        # A stream that replaces a standard one may have no such method.
        reconfigure = getattr(stream, "reconfigure", None)
        handlers = ("strict", "surrogateescape", "surrogatepass")  # they may raise
        if reconfigure and stream.errors in handlers:
            with suppress(OSError, ValueError):  # closed, or already read from
                reconfigure(errors="replace")


def duration(seconds: float) -> str:
    """Return a waiting time in whole seconds, minutes or hours.

    >>> duration(7.4), duration(125), duration(4000)
    ('7 s', '2 min', '1 h 07 min')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02} min"


def measured_time(seconds: float) -> str:
    """Return a measured time with three digits, in seconds, milli- or microseconds.

    >>> measured_time(0.00002), measured_time(0.0123), measured_time(1234.5)
    ('20 µs', '12.3 ms', '1,234 s')
    """
    scale, unit = next(
        (pair for pair in ((1.0, "s"), (1e-3, "ms")) if seconds >= pair[0]),
        (1e-6, "µs"),
    )
    value = seconds / scale
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def is_terminal(stream: Any) -> bool:
    """Return whether `stream` is a terminal."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # None, as under pythonw, or closed
        return False


def in_colour(stream: Any) -> bool:
    """Return whether text written to `stream` may be coloured: `stream` is a terminal
    with colours, and NO_COLOR is not set (no-color.org)."""
    wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return wanted and is_terminal(stream)


def paint(text: str, style: str, on: bool = True) -> str:
    """Return `text` with the codes of a style around it, unchanged if not `on`."""
    return f"\x1b[{_CODES[style]}m{text}\x1b[0m" if on else text


def wait_for_key(prompt: str) -> str:
    """Return the next key pressed, or "" at the end of standard input. Where standard
    input is not a terminal, return its next line without showing `prompt`."""
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
    """Yield a function that reads one key, or a line on systems without termios."""
    try:
        import termios
        import tty
    except ImportError:  # Windows
        yield sys.stdin.readline
        return
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        # Not raw, so that Ctrl-C interrupts; TCSANOW keeps the keys already pressed.
        tty.setcbreak(descriptor, termios.TCSANOW)
        # Not through sys.stdin: its buffer would hold back the rest of an arrow key.
        yield lambda: os.read(descriptor, 32).decode(errors="replace")
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def aligned(lines: Sequence[Sequence[str]], left: int) -> str:
    """Return cells as a table, with its first `left` columns flush left and the others
    flush right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in lines
    )


# Dark text on a light background is legible in light and in dark notebooks.
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
    """Return cells, of any text, as an HTML table for a notebook.

    Args:
        caption: the text above the table.
        lines: the headings and the rows.
        left: the number of columns flush left; the rest are flush right.
        verdicts: the texts of cells to colour, each "good", "bad" or "neutral".
    """

    def cell(tag: str, i: int, text: str) -> str:
        """Return the cell of column i."""
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
