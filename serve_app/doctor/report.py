"""Findings of checks, as a table and as JSON."""

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Outcome = Literal["ok", "warning", "failed"]

_WIDTH = 100


@dataclass(frozen=True)
class Finding:
    """The result of one check. ``advice`` says what to do; it is empty only if all is ok."""

    check: str
    outcome: Outcome
    found: str
    advice: str = ""

    def __post_init__(self) -> None:
        assert bool(self.advice) == (self.outcome != "ok"), self


def ok(check: str, found: str) -> Finding:
    """Make the finding of a check that passed."""
    return Finding(check, "ok", found)


def warning(check: str, found: str, advice: str) -> Finding:
    """Make a finding despite which requests may succeed."""
    return Finding(check, "warning", found, advice)


def failed(check: str, found: str, advice: str) -> Finding:
    """Make a finding that keeps requests from succeeding, or from running where they should."""
    return Finding(check, "failed", found, advice)


def any_failed(findings: Sequence[Finding]) -> bool:
    """Return whether any check failed."""
    return any(finding.outcome == "failed" for finding in findings)


def table(findings: Sequence[Finding]) -> str:
    """Format as text: one row each, and below them each advice once, with its checks.

    Advice on failures comes before advice on warnings.
    """
    width = max(len(finding.check) for finding in findings)
    lines = [f"{'check':<{width}}  outcome  found"]
    for finding in findings:
        start = f"{finding.check:<{width}}  {finding.outcome:<7}  "
        lines.append(_wrapped(finding.found, start, " " * len(start)))
    by_advice: dict[str, list[Finding]] = {}
    for finding in findings:
        if finding.advice:
            by_advice.setdefault(finding.advice, []).append(finding)
    for advice, advised in sorted(by_advice.items(), key=lambda item: not any_failed(item[1])):
        lines += ["", ", ".join(finding.check for finding in advised) + ":"]
        # An indented line is a command or a piece of YAML.
        lines += [_wrapped(line, "  ", "  ") for line in advice.splitlines()]
    return "\n".join(lines)


def _wrapped(text: str, first: str, others: str) -> str:
    if text.startswith(" "):
        return first + text
    return textwrap.fill(
        text,
        max(_WIDTH, len(others) + 40),
        initial_indent=first,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    )


def as_json(findings: Sequence[Finding]) -> dict[str, Any]:
    """Return the findings as JSON values, for programs."""
    return {
        "ok": not any_failed(findings),
        "findings": [asdict(finding) for finding in findings],
    }


def gib(size_bytes: float) -> str:
    """Format a size as ``1.5 GiB``, or in MiB below 1 GiB."""
    if size_bytes < 2**30:
        return f"{size_bytes / 2**20:.0f} MiB"
    return f"{size_bytes / 2**30:.1f} GiB"
