"""What the source of adapters has, as far as requests have asked. Any thread may use it.

Answers are remembered for a while, bad ones too: a client that repeats a wrong name costs nothing.
"""

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from serve_app.engine.loras.source import AdapterFile, LoraSource
from serve_app.errors import InvalidLora, InvalidRequest, LoraNotFound, LoraSourceAway
from serve_app.protocol.params import AdapterSet

REMEMBERED_S = 30.0
"""Time for which an answer of the source is used again."""

LISTED_S = 10.0
"""Time for which a list of the source is used again."""

MOST_REMEMBERED = 10_000
"""Answers that are remembered."""

Answer = AdapterFile | tuple[type[InvalidRequest], str]
"""A file, or what is wrong. Not the error itself: that keeps all frames which it has passed."""


class LoraCatalog:
    """The files of the adapters that requests name."""

    def __init__(
        self,
        source: LoraSource,
        loaded_at_start: tuple[str, ...],
        max_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Know the adapters of the start, which need no file, and the memory for the others."""
        self._source = source
        self._loaded_at_start = frozenset(loaded_at_start)
        self._max_bytes = max_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._answers: OrderedDict[str, tuple[Answer, float]] = OrderedDict()
        self._listing = threading.Lock()
        self._names: list[str] | str = []  # or why there is no list
        self._listed_until = -math.inf

    def find(self, adapters: AdapterSet) -> tuple[AdapterFile, ...]:
        """Return the files of the adapters on demand among these. Waits for the source.

        Raises:
            LoraNotFound: the source does not have one.
            InvalidLora: a file was found to be unusable, or they need too much memory together.
            LoraSourceAway: the source does not answer.
        """
        files = tuple(self._find(name) for name, _ in adapters if name not in self._loaded_at_start)
        needed = sum(file.size_bytes for file in files)
        if needed > self._max_bytes:
            raise InvalidLora(
                f"the LoRA adapters of this request have {_mib(needed)} MiB, and this server has "
                f"room for {_mib(self._max_bytes)} MiB; name fewer or smaller ones.",
                "lora",
            )
        return files

    def _find(self, name: str) -> AdapterFile:
        with self._lock:
            known, until = self._answers.get(name, (None, -math.inf))
        answer = known
        if answer is None or self._clock() >= until:
            answer = self._ask(name, known)
        if isinstance(answer, AdapterFile):
            return answer
        kind, message = answer
        raise kind(message, "lora")

    def _ask(self, name: str, known: Answer | None) -> Answer:
        """Ask the source. While it is away, a file that was there counts as there."""
        answer: Answer
        try:
            answer = self._source.find(name)
        except LoraNotFound as error:
            answer = LoraNotFound, error.message
        except LoraSourceAway:
            if isinstance(known, AdapterFile):
                return known
            raise
        self._remember(name, answer)
        return answer

    def failed(self, name: str, error: InvalidRequest) -> None:
        """Remember that a file cannot be used, or has gone."""
        self._remember(name, (type(error), error.message))

    def _remember(self, name: str, answer: Answer) -> None:
        with self._lock:
            self._answers.pop(name, None)
            self._answers[name] = answer, self._clock() + REMEMBERED_S
            while len(self._answers) > MOST_REMEMBERED:
                self._answers.popitem(last=False)

    def names(self) -> list[str]:
        """List what the source has, as it was `LISTED_S` ago at most. Waits for it.

        Raises:
            LoraSourceAway: the source does not answer.
        """
        with self._listing:  # one caller asks, the others wait for the answer
            if self._clock() >= self._listed_until:
                try:
                    self._names = self._source.names()
                except LoraSourceAway as error:
                    self._names = error.message
                self._listed_until = self._clock() + LISTED_S
            names = self._names
        if isinstance(names, str):
            raise LoraSourceAway(names, "lora")
        return names


def _mib(size_bytes: int) -> int:
    return -(-size_bytes // 2**20)
