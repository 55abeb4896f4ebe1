"""The command-line page: usage, arguments, options and exit codes of every command."""

import inspect
from collections.abc import Iterator
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from typer.main import get_command

from serve_app.cli.main import cli
from tools.docs.markdown import code, named, prose, table

PROGRAM = "diffusion-serve"

_TYPES = {"str": "text", "int": "integer", "float": "number", "Path": "path", "bool": "flag"}


def commands() -> dict[str, Any]:
    """Return the commands by name, in the order of ``--help``, as the click objects they are."""
    found: dict[str, Any] = get_command(cli).commands  # type: ignore[attr-defined]
    return found


def command_line() -> str:
    """Return a section for each command."""
    return "\n\n".join(_section(name, command) for name, command in commands().items())


def _section(name: str, command: Any) -> str:
    about = inspect.cleandoc(command.help)
    parts = [f"## {code(f'{PROGRAM} {name}')}", prose(about)]
    pieces = [_piece(one) for one in command.params if one.param_type_name == "argument"]
    pieces += [f"{_names(one)[0]} {_type(one)}" for one in command.params if _is_needed(one)]
    parts.append(f"```text\n{' '.join([PROGRAM, name, *pieces, '[OPTIONS]'])}\n```")
    for kind, title in (("argument", "Argument"), ("option", "Option")):
        rows = [_row(one) for one in command.params if one.param_type_name == kind]
        if rows:
            parts.append(table((title, "Value", "Meaning"), rows))
    parts.append(prose(command.epilog))
    return "\n\n".join(parts)


def _row(parameter: Any) -> tuple[str, str, str]:
    names = ", ".join(map(code, _names(parameter)))
    words = [named(prose(parameter.help))]
    if parameter.envvar:
        words.append(f"Environment: {code(parameter.envvar)}.")
    value = "; ".join(one for one in (_described_type(parameter), _default(parameter)) if one)
    return names, value, " ".join(words)


def _names(parameter: Any) -> list[str]:
    if parameter.param_type_name == "argument":
        return [str(parameter.name).upper()]
    return [*parameter.opts, *parameter.secondary_opts]


def _piece(argument: Any) -> str:
    [name] = _names(argument)
    return name if argument.required else f"[{name}]"


def _is_needed(parameter: Any) -> bool:
    return bool(parameter.param_type_name == "option" and parameter.required)


def _type(parameter: Any) -> str:
    return _word(_kind(parameter)).upper()


def _described_type(parameter: Any) -> str:
    kind = _kind(parameter)
    if get_origin(kind) is Literal:
        return ", ".join(map(code, get_args(kind)))
    words = [_word(kind)]
    if parameter.multiple:
        words.append("may be repeated")
    if parameter.min is not None:
        words.append(f"≥ {parameter.min:g}")
    if parameter.max is not None:
        words.append(f"≤ {parameter.max:g}")
    return ", ".join(words)


def _kind(parameter: Any) -> Any:
    """Return the annotated type, without None and without a list around it."""
    kind = parameter.type_descriptor.annotation
    if isinstance(kind, UnionType):
        [kind] = [one for one in get_args(kind) if one is not type(None)]
    if get_origin(kind) is list:
        [kind] = get_args(kind)
    return kind


def _word(kind: Any) -> str:
    return _TYPES.get(getattr(kind, "__name__", ""), "text")


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    if parameter.default is None or parameter.default is False:
        return ""
    return f"default {code(parameter.default)}"


def options() -> Iterator[tuple[str, str, str]]:
    """Yield (command, option or argument, help) of every parameter."""
    for name, command in commands().items():
        for parameter in command.params:
            for shown in _names(parameter):
                yield name, shown, parameter.help or ""
