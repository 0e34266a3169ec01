"""The schemas: what constrained completions are held to in tests, each bounded, so that a random model ends."""

from __future__ import annotations

from typing import Any

TEXT = {"type": "string", "maxLength": 12}


def record(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


SCHEMAS: dict[str, dict[str, Any]] = {
    "flat": record(name=TEXT, age={"type": "integer", "minimum": 0, "maximum": 150}),
    "nested": record(a=record(b=record(c={"type": "boolean"}, d={"type": "null"}))),
    "enum": record(kind={"enum": ["red", "green", 3, None]}),
    "const": record(version={"const": "v1"}),
    "array": {"type": "array", "items": {"type": "integer", "minimum": -9, "maximum": 9}, "minItems": 2, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": [TEXT, {"type": "boolean"}], "items": False, "minItems": 2},
    "number": record(x={"type": "number", "minimum": -1, "maximum": 1, "multipleOf": 0.25}),
    "unicode": record(größe={"enum": ["klein", "groß", "非常に大きい", "🦊"]}, 名前=TEXT),
    "pattern": record(code={"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}),
    "format": record(day={"type": "string", "format": "date"}),
    "union": {"anyOf": [record(a=TEXT), {"type": "array", "items": TEXT, "maxItems": 2}]},
    "optional": {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    },
    "reference": {
        "$defs": {"leaf": record(v={"type": "boolean"})},
        **record(left={"$ref": "#/$defs/leaf"}, right={"$ref": "#/$defs/leaf"}),
    },
    "scalar": {"type": "integer", "minimum": 10, "maximum": 99},
}
