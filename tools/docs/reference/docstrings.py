"""Reads docstrings of attributes, which Python does not keep, from the source."""

import ast
import inspect
import textwrap
from itertools import pairwise
from types import ModuleType

from tools.docs.markdown import prose


def attribute_docstrings(owner: type | ModuleType) -> dict[str, str]:
    """Return the docstring of each attribute of a class or a module, in Markdown.

    A docstring is the string directly below an assignment. Attributes without one are left out.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
    body = tree.body
    if inspect.isclass(owner):
        [definition] = tree.body
        assert isinstance(definition, ast.ClassDef)
        body = definition.body
    found = {}
    for statement, below in pairwise(body):
        match statement, below:
            case (
                (ast.Assign(targets=[ast.Name(name)]) | ast.AnnAssign(target=ast.Name(name))),
                ast.Expr(ast.Constant(str(text))),
            ):
                found[name] = prose(inspect.cleandoc(text))
    return found
