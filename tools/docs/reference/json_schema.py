"""Types, ranges and defaults of JSON schemas, as readers of a table expect them.

Configuration and HTTP API both come as JSON schemas from pydantic.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from tools.docs.markdown import code

Schema = Mapping[str, Any]

_LIMITS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
    "maxLength": "at most {} characters",
    "maxItems": "at most {} items",
}


def type_of(schema: Schema) -> str:
    """Return the type of a field, such as ``integer`` or ``list of text``. Null is left out."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[-1]
        if name == "JsonValue":  # pydantic's own
            return "any value"
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema or "oneOf" in schema:
        members = schema.get("anyOf", schema.get("oneOf", ()))
        return " or ".join(type_of(one) for one in members if one.get("type") != "null")
    if "const" in schema:
        return code(json.dumps(schema["const"]))
    if "enum" in schema:
        return ", ".join(code(json.dumps(value)) for value in schema["enum"])
    match schema.get("type"):
        case "string":
            return "file" if schema.get("format") == "binary" else "text"
        case "array":
            if "prefixItems" in schema:
                return f"list of {len(schema['prefixItems'])} {_plural(schema['prefixItems'][0])}"
            return f"list of {_plural(schema['items'])}"
        case "object":
            values = schema.get("additionalProperties")
            return (
                f"mapping of names to {_plural(values)}" if isinstance(values, dict) else "object"
            )
        case None:
            return "any value"
        case simple:
            return str(simple)


def range_of(schema: Schema) -> str:
    """Return the bounds of a field, such as ``1 to 100``; empty if it has none."""
    words = []
    shown = {name: _number(schema[name]) for name in _LIMITS if name in schema}
    if "minimum" in shown and "maximum" in shown:
        words.append(f"{shown.pop('minimum')} to {shown.pop('maximum')}")
    if "prefixItems" in schema:
        shown.pop("maxItems", None)
    words += [_LIMITS[name].format(number) for name, number in shown.items()]
    if schema.get("minLength"):
        words.append("not empty")
    for member in (*schema.get("anyOf", ()), *schema.get("prefixItems", ())[:1]):
        words += [range_of(member)]
    if "items" in schema:
        words += [range_of(schema["items"])]
    return ", ".join(word for word in words if word)


def default_of(schema: Schema, required: bool) -> str:
    """Return the default of a field; empty if it is null, so that the description explains it."""
    if required:
        return "required"
    value = schema.get("default")
    return "" if value is None else f"default {code(json.dumps(value))}"


def value_of(schema: Schema, required: bool) -> str:
    """Return type, range and default of a field, as one cell of a table."""
    parts = (type_of(schema), range_of(schema), default_of(schema, required))
    return "; ".join(part for part in parts if part)


def _plural(schema: Schema) -> str:
    kind = type_of(schema)
    if kind in ("integer", "number", "file", "object"):
        return f"{kind}s"
    return kind.replace("any value", "any values").replace("list of", "lists of")


def _number(value: float) -> str:
    if value >= 2**53:  # the largest seed, which FastAPI's model of OpenAPI rounds
        return f"2^{math.log2(value):.0f} - 1"
    return f"{int(value):,}" if value == int(value) else f"{value:g}"
