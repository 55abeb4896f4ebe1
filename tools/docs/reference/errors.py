"""The errors page: every error with its status, code, type and headers."""

from collections.abc import Iterator

from serve_app.errors import Cancelled, ConfigError, DiffusionServeError
from serve_app.gateway.errors import error_headers
from tools.docs.markdown import code, prose, table


def errors(
    kind: type[DiffusionServeError] = DiffusionServeError,
) -> list[type[DiffusionServeError]]:
    """Return an error class and all below it, parents first. Only public ones of `serve_app`."""
    below = [one for one in kind.__subclasses__() if one.__module__ == "serve_app.errors"]
    return [kind, *(error for child in below for error in errors(child))]


def errors_table() -> str:
    """Return a table of the errors that a client can receive, by status."""
    received = sorted(filter(_is_received, errors()), key=lambda one: one.status)
    return table(
        ("Status", "`code`; `type`", "Meaning", "Retry; headers"), map(_response_row, received)
    )


def error_classes() -> str:
    """Return the exception classes with their codes, as a table for users of the Python API."""
    return table(("Exception", "Base class", "`code`, meaning"), map(_class_row, errors()))


def _response_row(kind: type[DiffusionServeError]) -> tuple[str, ...]:
    headers = error_headers(kind("message"))
    return (
        str(kind.status),
        f"{code(kind.code)}; {code(kind.type)}",
        meaning(kind),
        "; ".join([_retry(kind.status, headers), *_shown(headers)]),
    )


def _class_row(kind: type[DiffusionServeError]) -> tuple[str, ...]:
    [parent] = kind.__bases__
    about = code(kind.code)
    if not _is_received(kind):  # the table of responses has the meaning of the others
        about = f"{about}: {meaning(kind)}"
    return code(kind.__name__), code(parent.__name__), about


def _is_received(kind: type[DiffusionServeError]) -> bool:
    """Return whether a client can receive the error."""
    return not issubclass(kind, ConfigError | Cancelled)


def meaning(kind: type[DiffusionServeError]) -> str:
    """Return the first paragraph of an error's docstring."""
    return prose((kind.__doc__ or "").split("\n\n")[0])


def _retry(status: int, headers: dict[str, str]) -> str:
    if "Retry-After" in headers:
        return "yes, after the time in `Retry-After`"
    if "x-should-retry" in headers:
        if status < 500:
            return "no"
        return "no: it would take as long again" if status == 504 else "no: it would fail again"
    return "yes, once or twice"


def _shown(headers: dict[str, str]) -> Iterator[str]:
    for name, value in headers.items():
        if name != "Retry-After":  # in the words before
            yield code(f"{name}: {value}")
