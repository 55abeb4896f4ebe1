"""The file that keeps the results of a start-up for the next one. Plain JSON.

A profile stores the fingerprint of the start-up beside its results. Only this module decides
whether results are still valid: they are if the fingerprint has not changed.
"""

import json
import logging
import uuid
from pathlib import Path
from typing import Any

from serve_app.engine.model.fingerprint import Fingerprint
from serve_app.errors import ConfigError

logger = logging.getLogger(__name__)

FORMAT = 7
"""Version of the file format. Another version of this program may use another one."""

_MOST_NAMED = 8
"""Limit of changes named in the log: another container image changes a hundred packages."""


class Profile:
    """A profile file. Several replicas may read and write it at the same time."""

    def __init__(self, path: Path, found_with: Fingerprint) -> None:
        """Open the profile at ``path``; ``found_with`` is the current fingerprint."""
        self.path = path
        self._found_with = found_with

    def read(self) -> dict[str, Any] | None:
        """Return the results of an earlier start; ``None`` without a file or after any change.

        Never returns a part of them: a change may affect every result.

        Raises:
            ConfigError: the file cannot be read, or is not a profile.
        """
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except NotADirectoryError:  # writing fails as well, and logs it
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"engine.profile_path: {self.path} cannot be read: {error}") from None
        try:
            content = json.loads(text)
            if not isinstance(content, dict):
                raise TypeError("no JSON object")
            changed = self._changes(content)
            kept = None if changed else dict(content["found"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self.damaged(error) from None
        if changed:
            logger.info("%s is not used and will be replaced; changed: %s", self.path, changed)
        return kept

    def damaged(self, error: Exception) -> ConfigError:
        """Return the error to raise for invalid content."""
        return ConfigError(f"{self.path} is not a profile of this program ({error!r}); delete it.")

    def _changes(self, content: dict[str, Any]) -> str:
        if content.get("format") != FORMAT:
            return "the version of this program"
        then = content["found_with"]
        names = [*self._found_with, *(name for name in then if name not in self._found_with)]
        changed = [name for name in names if then.get(name) != self._found_with.get(name)]
        more = f" and {len(changed) - _MOST_NAMED} more" if len(changed) > _MOST_NAMED else ""
        return ", ".join(changed[:_MOST_NAMED]) + more

    def write(self, found: dict[str, Any]) -> None:
        """Replace the file atomically. Logs a warning if that fails."""
        content = {"format": FORMAT, "found_with": self._found_with, "found": found}
        # Not in place: another replica may read or write the file at the same time.
        new = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                new.write_text(json.dumps(content, indent=1), encoding="utf-8")
                new.replace(self.path)
            finally:
                new.unlink(missing_ok=True)
        except OSError as error:
            logger.warning(
                "%s cannot be written, so the next start will certify and measure again: %s",
                self.path,
                error,
            )
