"""The file of a first day: every row is on disk as soon as it is known.

The file is replaced as a whole, so that it is valid JSON whenever the program ends.
"""

import json
import math
import time
from pathlib import Path
from typing import Any, Literal

State = Literal["running", "done", "failed", "skipped", "stopped"]
"""State of a section; "stopped" means that time ran out in the middle of it."""

FINAL: tuple[State, ...] = ("done", "failed", "skipped", "stopped")

Values = dict[str, Any]


class Results:
    """Rows and states of sections, printed and written one by one.

    Attributes:
        values: content of the file.
    """

    def __init__(self, path: Path, header: Values | None = None) -> None:
        """Read the file if it exists; ``header`` is written into a new one.

        Raises:
            SystemExit: the file has results of another kind of run.
        """
        self._path = path
        if path.exists():
            self.values: Values = json.loads(path.read_text())
            if header is not None and self.values["rehearsal"] != header["rehearsal"]:
                raise SystemExit(
                    f"{path} has {'a rehearsal' if self.values['rehearsal'] else 'a real run'}. "
                    "Name another file with --output, or delete this one."
                )
            return
        self.values = {**(header or {}), "sections": {}, "rows": []}
        self._write()

    def begin_call(self) -> None:
        """Forget which sections failed, were stopped or did not fit, so that they run again."""
        sections = self.values["sections"]
        self.values["sections"] = {
            name: section for name, section in sections.items() if section["state"] == "done"
        }
        self._write()

    def state(self, section: str) -> State | None:
        """Return the state of a section; None before it began in this call."""
        found: State | None = self.values["sections"].get(section, {}).get("state")
        return found

    def mark(self, section: str, state: State, reason: str = "", took_s: float = 0.0) -> None:
        """Set the state of a section, and print it unless it only begins."""
        self.values["sections"][section] = {
            "state": state,
            "reason": reason,
            "took_s": round(took_s, 1),
            "at": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
        }
        self._write()
        if state != "running":
            after = f": {reason}" if reason else f", {took_s:.1f} s"
            print(f"== {section}: {state}{after}", flush=True)

    def running(self) -> str | None:
        """Return the section that was begun and has not ended."""
        for name, section in self.values["sections"].items():
            if section["state"] == "running":
                return str(name)
        return None

    def has(self, section: str, row: str) -> bool:
        """Return True if the row is known, perhaps from an earlier call."""
        return self.find(section, row) is not None

    def find(self, section: str, row: str) -> Values | None:
        """Return a row that is known, or None."""
        for found in self.values["rows"]:
            if (found["section"], found["row"]) == (section, row):
                known: Values = found
                return known
        return None

    def add(self, section: str, row: str, values: Values) -> None:
        """Print a row and write it; a row of the same name is replaced."""
        values = _plain(values)
        new = {"section": section, "row": row, **values}
        rows = self.values["rows"]
        self.values["rows"] = [
            old for old in rows if (old["section"], old["row"]) != (section, row)
        ] + [new]
        self._write()
        shown = ", ".join(f"{name} {_shown(value)}" for name, value in values.items())
        print(f"{section} | {row} | {shown}", flush=True)

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        part = self._path.with_name(f"{self._path.name}.part")
        part.write_text(json.dumps(self.values, indent=1, allow_nan=False) + "\n")
        part.replace(self._path)


def _plain(value: Any) -> Any:
    """Return ``value`` for JSON, which has no infinity and no NaN: they become texts."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
