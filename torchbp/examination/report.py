"""The findings of an examination, and how they are printed."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torchbp._terminal import html_table

__all__ = ["Finding", "Report"]

STATUSES = ("fail", "warn", "pass", "not supported", "not applicable")
WIDTH = 88


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        check: its identifier, such as "first-derivatives".
        status: "pass"; "fail", where something is wrong; "warn", where it is right, but
            wasteful or fragile; "not supported", where it raises an error that says so;
            "not applicable", where there was nothing to check.
        reason: what was seen.
        fix: what to do about it; "" if nothing.

    Examples:
        >>> print(Finding("vmap", "not supported", "there is no batching rule"))
        vmap                   not supported   there is no batching rule
    """

    check: str
    status: str
    reason: str
    fix: str = ""

    @property
    def title(self) -> str:
        """The check's name with spaces."""
        return self.check.replace("-", " ").replace("N d", "N-d")

    def __str__(self) -> str:
        line = f"{self.title:<22} {self.status:<14}  {self.reason}"
        return line if len(line) <= WIDTH else line[: WIDTH - 1].rstrip() + "…"


@dataclass(frozen=True)
class Report:
    """The findings on one function, in the order of the checks.

    ``report["vmap"]`` is one of them, by the check's identifier or its title. ``str``
    prints what failed, why, and what to do about it, and names the rest; ``table()``
    has every finding.

    Attributes:
        name: the function's, with the shapes of its arguments.
        findings: one for each check.
        strict: whether warnings count as failures.
        calls: how often the function was called; 0 if a child process ended.

    Examples:
        >>> report = Report("f", (Finding("vmap", "pass", "as a loop does it"),))
        >>> report.ok, report["vmap"].status
        (True, 'pass')
        >>> print(report.brief())
        f: 1 pass
    """

    name: str
    findings: tuple[Finding, ...]
    strict: bool = False
    calls: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing failed; with `strict`, no warning either."""
        return not (self.failures or (self.strict and self.warnings))

    @property
    def failures(self) -> tuple[Finding, ...]:
        """The findings that failed."""
        return self._of("fail")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """The findings that something is right, but wasteful or fragile."""
        return self._of("warn")

    def _of(self, status: str) -> tuple[Finding, ...]:
        return tuple(f for f in self.findings if f.status == status)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __getitem__(self, check: str) -> Finding:
        """Return the finding of a check.

        Raises:
            KeyError: there is none of that identifier or title.
        """
        for finding in self.findings:
            if check in (finding.check, finding.title):
                return finding
        raise KeyError(f"expected one of {[f.check for f in self]}, got {check!r}")

    def __str__(self) -> str:
        lines = [self._head(), *_details([*self.failures, *self.warnings]), ""]
        passed = ", ".join(f.check for f in self._of("pass"))
        if passed:
            lines += _wrapped(f"pass: {passed}")
        for status in ("not supported", "not applicable"):
            reasons = defaultdict(list)
            for f in self._of(status):
                reasons[f.reason].append(f.check)
            texts = [f"{', '.join(names)}: {why}" for why, names in reasons.items()]
            if texts:
                lines += _wrapped(f"{status}: {'; '.join(texts)}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        lines = [["check", "verdict", "what was seen", "what to do"]]
        lines += [[f.title, f.status, f.reason, f.fix] for f in self]
        words = {"pass": "good", "fail": "bad", "warn": "neutral"}
        return html_table(self._head(), lines, left=4, verdicts=words)

    def table(self) -> str:
        """Return every finding in a line, and below them what failed and what to do."""
        lines = [self._head(), "", *map(str, self.findings)]
        return "\n".join([*lines, *_details([*self.failures, *self.warnings])])

    def brief(self) -> str:
        """Return what failed (with `strict`, what warns, too), why, and what to do."""
        shown = [*self.failures, *(self.warnings if self.strict else ())]
        return "\n".join([self._head(), *_details(shown)])

    def to_dict(self) -> dict[str, Any]:
        """Return the report as dicts, lists, strings and numbers, for JSON."""
        findings = [asdict(f) | {"title": f.title} for f in self]
        return {
            "name": self.name,
            "ok": self.ok,
            "strict": self.strict,
            "calls": self.calls,
            "findings": findings,
        }

    def _head(self) -> str:
        counts = [len(self._of(status)) for status in STATUSES]
        pairs = zip(counts, STATUSES, strict=True)
        summary = ", ".join(f"{count} {status}" for count, status in pairs if count)
        calls = f" ({self.calls} calls)" if self.calls else ""
        return f"{self.name}: {summary}{calls}"


def _details(findings: Iterable[Finding]) -> Iterator[str]:
    for f in findings:
        yield ""
        yield from _wrapped(f"{f.status}: {f.check}: {f.reason}")
        if f.fix:
            yield from _wrapped(f"fix: {f.fix}", "  ")


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_on_hyphens=False,
    )
