"""What a check found, and how that is shown."""

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Outcome = Literal["ok", "warning", "failed"]

_WIDTH = 100


@dataclass(frozen=True)
class Finding:
    """Of one check. ``advice`` says what to do, wherever there is something to do."""

    check: str
    outcome: Outcome
    found: str
    advice: str = ""

    def __post_init__(self) -> None:
        assert bool(self.advice) == (self.outcome != "ok"), self


def ok(check: str, found: str) -> Finding:
    return Finding(check, "ok", found)


def warning(check: str, found: str, advice: str) -> Finding:
    """Pictures may come all the same."""
    return Finding(check, "warning", found, advice)


def failed(check: str, found: str, advice: str) -> Finding:
    """No picture comes, or not where it should."""
    return Finding(check, "failed", found, advice)


def any_failed(findings: Sequence[Finding]) -> bool:
    return any(finding.outcome == "failed" for finding in findings)


def table(findings: Sequence[Finding]) -> str:
    """As text: a row each, and below them each advice once, with the checks that it is for.

    Advice on what has failed comes before advice on what is warned of.
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
        # A line of its own is a command or a piece of YAML.
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
    return {
        "ok": not any_failed(findings),
        "findings": [asdict(finding) for finding in findings],
    }


def gib(size_bytes: float) -> str:
    """``1.5 GiB``; small sizes in MiB."""
    if size_bytes < 2**30:
        return f"{size_bytes / 2**20:.0f} MiB"
    return f"{size_bytes / 2**30:.1f} GiB"
