"""The places of LoRA adapters that are loaded on demand: a folder, a bucket, or the hub.

Any thread may use them. Each call may take as long as the place needs to answer, at most
`WITHIN_S` for a bucket.
"""

import re
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

from serve_app.config.loras import LoraConfig
from serve_app.errors import ConfigError, LoraNotFound, LoraSourceAway

WITHIN_S = 60.0
"""Longest time for the file of one adapter."""

SUFFIX = ".safetensors"

MOST_NAMES = 10_000
"""Names that a list has at most."""

_LONGEST_NAME = 200
"""In bytes: file systems take 255 for a part of a path."""

MOST_VISITED = 10 * MOST_NAMES
"""Files of any kind that a list looks at."""

_ON_THE_HUB = re.compile(r"[\w./-]+", re.ASCII)


@dataclass(frozen=True)
class AdapterFile:
    """The file of one adapter."""

    name: str
    size_bytes: int


class LoraSource(Protocol):
    """A place that has adapters."""

    def find(self, name: str) -> AdapterFile:
        """Look for the file of an adapter, without reading it.

        Raises:
            LoraNotFound: there is none of this name.
            LoraSourceAway: the place does not answer.
        """
        ...

    def fetched(self, file: AdapterFile) -> AbstractContextManager[Path]:
        """Have the file on this machine, for the time of the block.

        Raises:
            LoraNotFound: it has gone.
            LoraSourceAway: the place does not answer.
        """
        ...

    def names(self) -> list[str]:
        """List the names of the adapters, sorted, at most `MOST_NAMES`.

        Raises:
            LoraSourceAway: the place does not answer.
        """
        ...


def new_source(config: LoraConfig, within_s: float = WITHIN_S) -> LoraSource | None:
    """Open the source of a model; ``None`` without one. A bucket has ``within_s`` to answer.

    Raises:
        ConfigError: the address cannot be used.
    """
    match config.lora_source_kind:
        case "folder":
            assert config.lora_source_folder is not None
            return _Folder(config.lora_source_folder)
        case "bucket":
            return _Bucket(str(config.lora_source), within_s)
        case "hub":
            assert isinstance(config.lora_source, tuple)
            return _Hub(config.lora_source)
        case _:
            return None


def not_found(name: str) -> LoraNotFound:
    """Make the error for a name that the source does not have."""
    return LoraNotFound(
        f"no LoRA adapter {name[:100]!r} in the source of this server; GET /v1/loras lists them.",
        "lora",
    )


def check_name(name: str) -> None:
    """Raise `LoraNotFound` for a name that no file may have, such as one that leaves the folder."""
    if not _is_name(name):
        raise not_found(name)


def _is_name(name: str) -> bool:
    wrong = {"", ".", ".."} & set(name.split("/"))
    # Not every store takes a percent sign for itself.
    marks = not name.isprintable() or {"\\", "%"} & set(name)
    return not wrong and not marks and len(name.encode()) <= _LONGEST_NAME


class _Folder:
    """A folder of this machine, or one that is mounted here."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, name: str) -> AdapterFile:
        check_name(name)
        try:
            status = self._path(name).stat()
        except (FileNotFoundError, NotADirectoryError):
            if not self._folder.is_dir():
                raise _away("its folder has gone") from None
            raise not_found(name) from None
        except OSError as error:
            raise _away(error.strerror or type(error).__name__) from None
        if not stat.S_ISREG(status.st_mode):
            raise not_found(name)
        return AdapterFile(name, status.st_size)

    @contextmanager
    def fetched(self, file: AdapterFile) -> Iterator[Path]:
        self.find(file.name)
        yield self._path(file.name)

    def names(self) -> list[str]:
        try:
            visited = islice(self._folder.rglob(f"*{SUFFIX}"), MOST_VISITED)
            paths = [path for path in visited if path.is_file()]
        except OSError as error:
            raise _away(error.strerror or type(error).__name__) from None
        names = (path.relative_to(self._folder).with_suffix("").as_posix() for path in paths)
        return _listed(names)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}{SUFFIX}"


class _Bucket:
    """A prefix of a bucket. A file is on this machine only while it is loaded."""

    def __init__(self, url: str, within_s: float) -> None:
        # Only a bucket needs obstore.
        from serve_app.buckets import FAILURES, open_bucket, reason_of

        self._failures, self._reason_of = FAILURES, reason_of
        try:
            self._store = open_bucket(url, within_s)
        except (*FAILURES, ValueError) as error:
            raise ConfigError(
                f"model.lora_source is {url!r}, which cannot be used: {reason_of(error)}"
            ) from None

    def find(self, name: str) -> AdapterFile:
        import obstore

        check_name(name)
        with self._translated(name):
            meta = obstore.head(self._store, f"{name}{SUFFIX}")
        return AdapterFile(name, meta["size"])

    @contextmanager
    def fetched(self, file: AdapterFile) -> Iterator[Path]:
        import obstore

        with TemporaryDirectory(prefix="lora-") as folder:
            path = Path(folder) / f"adapter{SUFFIX}"
            with self._translated(file.name), path.open("wb") as opened:
                for chunk in obstore.get(self._store, f"{file.name}{SUFFIX}").stream():
                    opened.write(chunk)
            yield path

    def names(self) -> list[str]:
        import obstore

        found: list[str] = []
        visited = 0
        with self._translated(""):
            for page in obstore.list(self._store):
                found += (one["path"].removesuffix(SUFFIX) for one in page if _is_file(one["path"]))
                visited += len(page)
                if len(found) >= MOST_NAMES or visited >= MOST_VISITED:
                    break
        return _listed(found)

    @contextmanager
    def _translated(self, name: str) -> Iterator[None]:
        """Convert the errors of a request to the bucket."""
        try:
            yield
        except FileNotFoundError:
            raise not_found(name) from None
        except self._failures as error:
            raise _away(self._reason_of(error)) from None


class _Hub:
    """The repositories of the hub that an operator allows."""

    def __init__(self, allowed: tuple[str, ...]) -> None:
        self._allowed = allowed

    def find(self, name: str) -> AdapterFile:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        cached = self._cached(name)
        if cached is not None:
            return AdapterFile(name, cached.stat().st_size)
        repository, file = self._located(name)
        with _translated_hub_errors(name):
            meta = get_hf_file_metadata(hf_hub_url(repository, file))
        return AdapterFile(name, meta.size or 0)

    @contextmanager
    def fetched(self, file: AdapterFile) -> Iterator[Path]:
        from huggingface_hub import hf_hub_download

        repository, path = self._located(file.name)
        with _translated_hub_errors(file.name):
            local = self._cached(file.name) or Path(hf_hub_download(repository, path))
        yield local

    def names(self) -> list[str]:
        return _listed(pattern for pattern in self._allowed if "*" not in pattern)

    def _located(self, name: str) -> tuple[str, str]:
        """Return the repository and the file in it."""
        check_name(name)
        owner, _, rest = name.partition("/")
        repository, _, file = rest.partition("/")
        full = f"{owner}/{repository}"
        allowed = any(fnmatchcase(full, pattern) for pattern in self._allowed)
        if not repository or not allowed or not _ON_THE_HUB.fullmatch(name):
            raise not_found(name)
        if not file:
            return full, f"pytorch_lora_weights{SUFFIX}"  # where diffusers saves adapters
        return full, f"{file.removesuffix(SUFFIX)}{SUFFIX}"

    def _cached(self, name: str) -> Path | None:
        """Return the file if the cache of the hub has it, as it also is without a network."""
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            path = try_to_load_from_cache(*self._located(name))
        except HFValidationError:  # no repository can have the name
            raise not_found(name) from None
        return Path(path) if isinstance(path, str) else None


@contextmanager
def _translated_hub_errors(name: str) -> Iterator[None]:
    from httpx import HTTPError  # of huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

    try:
        yield
    except (EntryNotFoundError, RepositoryNotFoundError) as error:
        # The error of a file that is not in the cache, without a network, is of both kinds.
        if isinstance(error, FileNotFoundError):
            raise _away(str(error)) from None
        raise not_found(name) from None
    except (HTTPError, OSError, ValueError) as error:
        raise _away(str(error)) from None


def _is_file(path: str) -> bool:
    return path.endswith(SUFFIX)


def _listed(names: Iterator[str] | list[str]) -> list[str]:
    return sorted(filter(_is_name, names))[:MOST_NAMES]


def _away(reason: str) -> LoraSourceAway:
    first, _, _ = reason.strip().partition("\n")
    return LoraSourceAway(
        f"the source of the LoRA adapters cannot be read now: {first[:300]}; try again later.",
        "lora",
    )
