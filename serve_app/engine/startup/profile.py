"""The file that keeps what a start-up found out, for the next one. Plain JSON.

Knows no more of the content than what it was found with: that it is used only if that has not
changed is decided here, and nowhere else.
"""

import json
import logging
import uuid
from pathlib import Path
from typing import Any

from serve_app.engine.model.fingerprint import Fingerprint
from serve_app.errors import ConfigError

logger = logging.getLogger(__name__)

FORMAT = 2
"""Of the file. Another one is of another version of this program."""

_MOST_NAMED = 8
"""Of what has changed: another image changes a hundred packages."""


class Profile:
    """One file. Several replicas may read and write it at the same time."""

    def __init__(self, path: Path, found_with: Fingerprint) -> None:
        """``found_with``: everything that the content depends on, as it is now."""
        self.path = path
        self._found_with = found_with

    def read(self) -> dict[str, Any] | None:
        """What an earlier start kept; none if there is none, or if anything is not as it was then.

        Never a part of it: what changed may have changed any of it.

        Raises:
            ConfigError: if the file cannot be read, or is not one of this program.
        """
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except NotADirectoryError:  # nor can it be written, which is told then
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
            logger.info("%s is not used and will be replaced, changed: %s", self.path, changed)
        return kept

    def damaged(self, error: Exception) -> ConfigError:
        """What to raise if the content turns out to be none."""
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
        """Replace the file, in one go. If that cannot be done, it is logged."""
        content = {"format": FORMAT, "found_with": self._found_with, "found": found}
        # Not in place: another replica may read it, or write its own, at the same time.
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
                "%s cannot be written, the next start finds out all anew: %s", self.path, error
            )
