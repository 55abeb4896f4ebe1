"""Checks the English of every text that a user reads: ``python -m tools.docs.english [PATH…]``.

The rules are the project's own, because Vale downloads itself when it first runs, and 61 of
proselint's 64 findings in the documents were false alarms.

A sentence ends at a period, a question mark or an exclamation mark, not at a colon or a semicolon.
A long enumeration must become a list or a table, whose items are texts of their own. Code in
backticks, a macro, and a value in an error message count as one word each.
"""

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast

import yaml

from tools.docs.texts import Text, texts

MOST_WORDS = 25
"""In a sentence."""

_CODE = re.compile(r"(`+).+?\1|\{[^{}]*\}", re.DOTALL)
_END = re.compile(r"""[.!?]["')\]]*\s+""")
_ABBREVIATION = re.compile(r"\b(e\.g|i\.e|vs|cf|approx|incl)\.\s+$")
_OPENING = re.compile(r"""^["'(]*(what|who|whoever|whatever|whose)\b""", re.IGNORECASE)
_CONTRACTION = re.compile(
    r"\b\w+(?:n't|'(?:re|ve|ll|m|d))\b"
    r"|\b(?:it|that|there|here|what|who|how|where|let)'s\b",
    re.IGNORECASE,
)
_PERSON = re.compile(
    r"\b(?:server|gateway|replica|engine|scheduler|controller|autoscaler|planner|doctor|router|"
    r"operator|cluster|node|pod|page|request|model|pipeline|Ray|Ray Serve|Serve|Kubernetes|"
    r"KubeRay|Prometheus|Grafana|it|they)s? "
    r"(?:knows?|tells?|asks?|says?|believes?|thinks?|remembers?|forgets?|likes?)\b",
    re.IGNORECASE,
)
_QUOTED = re.compile(r"""(?<!\w)(['"])[^'"]+\1(?!\w)""")
_LONGEST_LABEL = 2
"""Words before a colon that separates no parts of a sentence, such as ``Note:``."""

_DOUBLED = re.compile(r"(?<![\w-])([a-z]+)\s+\1\b")


class Finding(NamedTuple):
    """A rule that a sentence breaks."""

    rule: str
    advice: str


@dataclass(frozen=True)
class Sentence:
    """A sentence and the line of its text at which it begins."""

    text: str
    line: int


def sentences(text: str) -> Iterator[Sentence]:
    """Split a text; a line of it may end within a sentence."""
    # Code may contain anything, and must neither end a sentence nor break a rule.
    masked = _CODE.sub(lambda match: re.sub(r"[^\n]", "`", match[0]), text)
    start = 0
    for match in _END.finditer(masked):
        if not _ABBREVIATION.search(masked[: match.end()]):
            yield _sentence(text, start, match.end())
            start = match.end()
    if text[start:].strip():
        yield _sentence(text, start, len(text))


def _sentence(text: str, start: int, end: int) -> Sentence:
    plain = text[start:end].replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    return Sentence(" ".join(plain.split()), text.count("\n", 0, start))


def findings(sentence: str) -> Iterator[Finding]:
    """Name each rule that the sentence breaks."""
    prose = _CODE.sub("`code`", sentence)
    length = sum(any(c.isalnum() for c in word) for word in re.split(r"[\s—]+", prose))
    if length > MOST_WORDS:
        yield Finding("length", f"{length} words, at most {MOST_WORDS}: make two of it, or a list")
    for match in _banned().finditer(prose):
        yield Finding("word", f"not {match[0]!r}, but: {_words()[match[0].lower()]}")
    if prose.endswith((".", ":")) and (opening := _OPENING.search(prose)):
        yield Finding("opening", f"{opening[1]!r} opens the sentence: begin with a noun")
    for match in _CONTRACTION.finditer(prose):
        yield Finding("contraction", f"write {match[0]!r} as two words")
    for match in _PERSON.finditer(prose):
        yield Finding("person", f"{match[0]!r}: software does not know, say or ask")
    unquoted = _QUOTED.sub("code", prose)
    if _colons(unquoted) > 1:
        yield Finding("colons", "a colon within a colon: make two sentences")
    if unquoted.count("; ") > 1 and prose.endswith((".", ":")):  # else a list in a cell
        yield Finding("semicolons", "three ideas: make sentences of them")
    for match in _DOUBLED.finditer(prose):
        yield Finding("doubled", f"{match[0]!r}")


def _colons(prose: str) -> int:
    """Count the colons between parts of a sentence, but after a label or before a value."""
    marks = re.findall(r"[:;]\s", prose)
    parts = pairwise(re.split(r"[:;]\s+", prose))
    return sum(
        mark[0] == ":"
        and len([word for word in before.split() if "`" not in word]) > _LONGEST_LABEL
        and not after.startswith(("`", "%"))
        for mark, (before, after) in zip(marks, parts, strict=True)
    )


@cache
def _entries() -> list[dict[str, Any]]:
    text = Path(__file__).with_name("words.yaml").read_text(encoding="utf-8")
    return cast(list[dict[str, Any]], yaml.safe_load(text))


@cache
def _words() -> dict[str, str]:
    return {word: entry["but"] for entry in _entries() for word in entry["not"]}


@cache
def _banned() -> re.Pattern[str]:
    allowed = [phrase for entry in _entries() for phrase in entry.get("except", ())]
    return re.compile(
        rf"(?<![\w/-])(?!(?:{_any_of(allowed)})\b)(?:{_any_of(_words())})(?![\w-])", re.IGNORECASE
    )


def _any_of(phrases: Iterable[str]) -> str:
    return "|".join(re.escape(phrase) for phrase in sorted(phrases, key=len, reverse=True))


def report(text: Text) -> Iterator[str]:
    """Write a line for each finding in a text."""
    for sentence in sentences(text.content):
        for finding in findings(sentence.text):
            where = (
                text.source if text.line is None else f"{text.source}:{text.line + sentence.line}"
            )
            yield f"{where}: {finding.rule}: {finding.advice}\n    {sentence.text}"


def main(paths: list[str]) -> int:
    """Print what breaks a rule, below the paths or anywhere, and return the exit status."""
    found = (line for text in texts([Path(path) for path in paths]) for line in report(text))
    lines = list(dict.fromkeys(found))
    print("\n".join(lines) if lines else "The English is right.")  # noqa: T201  what it is run for
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
