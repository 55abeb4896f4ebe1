"""The classes of the installed diffusers, read from its source files without importing it.

Importing diffusers takes seconds, because it imports torch. Whatever these files do not tell is
unknown (None), and found when the model is loaded.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class Signature:
    """The parameters of a function, by name, and those without a default."""

    names: frozenset[str]
    required: frozenset[str]


@dataclass(frozen=True)
class PipelineSource:
    """What the source of a pipeline class tells: its components and the arguments of a call."""

    components: Signature | None
    optional_components: frozenset[str]
    call: Signature | None


def is_stock(name: str) -> bool | None:
    """Return whether diffusers has a public class of this name."""
    names = _public_names()
    return None if names is None else name in names


def is_network(name: str) -> bool:
    """Return whether a class of diffusers is a network, which has weights."""
    return name in _network_names()


def has_own_module(library: str) -> bool:
    """Return whether ``library`` is the folder of a pipeline family, with classes of its own."""
    package = _package()
    return package is not None and (package / "pipelines" / library / "__init__.py").is_file()


@cache
def read_pipeline_source(name: str) -> PipelineSource | None:
    """Find a pipeline class in the source of diffusers."""
    package = _package()
    if package is None:
        return None
    line = f"\nclass {name}("
    for file in sorted((package / "pipelines").rglob("pipeline_*.py")):
        text = file.read_text(encoding="utf-8")
        if line in text:
            return _of_class(text[text.index(line) :], name)
    return None


def _of_class(text: str, name: str) -> PipelineSource | None:
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            functions = {f.name: f for f in node.body if isinstance(f, ast.FunctionDef)}
            return PipelineSource(
                _signature(functions.get("__init__")),
                frozenset(_optional_components(node)),
                _signature(functions.get("__call__")),
            )
    return None


def _optional_components(node: ast.ClassDef) -> Iterator[str]:
    for part in node.body:
        targets = part.targets if isinstance(part, ast.Assign) else []
        if any(isinstance(t, ast.Name) and t.id == "_optional_components" for t in targets):
            yield from _strings(part)


def _signature(function: ast.FunctionDef | None) -> Signature | None:
    if function is None:
        return None
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args][1:]  # without self
    without = positional[: len(positional) - len(arguments.defaults)]
    optional = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    required = [*without, *(argument for argument, default in optional if default is None)]
    return Signature(
        frozenset(argument.arg for argument in [*positional, *arguments.kwonlyargs]),
        frozenset(argument.arg for argument in required),
    )


def _package() -> Path | None:
    spec = find_spec("diffusers")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


@cache
def _parsed_package() -> ast.Module | None:
    package = _package()
    if package is None:
        return None
    return ast.parse((package / "__init__.py").read_text(encoding="utf-8"))


@cache
def _public_names() -> frozenset[str] | None:
    """Return all strings of the package's module: its names, and some more."""
    module = _parsed_package()
    return None if module is None else frozenset(_strings(module))


@cache
def _network_names() -> frozenset[str]:
    """Return the names that the package lists as its models."""
    module = _parsed_package()
    calls = [] if module is None else [n for n in ast.walk(module) if isinstance(n, ast.Call)]
    return frozenset(
        name
        for call in calls
        if ast.unparse(call.func) == "_import_structure['models'].extend"
        for name in _strings(call)
    )


def _strings(node: ast.AST) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value
