"""The tools on the wire: the functions that a request offers, its choice among them, and calls of earlier turns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, PlainValidator, StringConstraints, WithJsonSchema

from serving.errors import BadRequest
from serving.tools.json_text import checked_json
from serving.wire import Harmless, Text, Wire
from training.chat import ToolCall

MAX_TOOLS = 128
NAME_PATTERN = "^[a-zA-Z0-9_-]{1,64}$"
NO_CHOICE = "give 'none', 'auto', 'required' or {'type': 'function', 'function': {'name': '...'}}"
_SCHEMA_SCHEMA = {
    "type": "object",
    "properties": {
        "type": {"const": "object"},
        "properties": {"type": "object", "additionalProperties": {"type": ["object", "boolean"]}},
        "required": {"type": "array", "items": {"type": "string"}},
    },
}
_NAMED_SCHEMA = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {"name": {"type": "string", "pattern": NAME_PATTERN}},
            "required": ["name"],
            "additionalProperties": False,
        },
    },
    "required": ["type", "function"],
    "additionalProperties": False,
}
_CHOICE_SCHEMA = {"anyOf": [{"enum": ["none", "auto", "required"]}, _NAMED_SCHEMA]}


def _parameters(schema: dict[str, Any]) -> dict[str, Any]:
    """Whether a reply can be held to it is seen where one has to be."""
    if schema.get("type", "object") != "object":
        raise ValueError("has a type that is not 'object'; arguments are an object, whose members are its properties")
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, dict) or not all(isinstance(each, dict | bool) for each in properties.values()):
        raise ValueError("properties has to be an object of JSON Schemas by name")
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise ValueError("required has to be a list of names")
    checked_json(schema)
    return schema


def _arguments(text: str) -> str:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error}); give the text of an object, '{{}}' for no arguments") from None
    if not isinstance(value, dict):
        raise ValueError("is not the text of a JSON object; give '{}' for no arguments")
    checked_json(value)
    return text


Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]


class FunctionDefinition(Wire):
    """Without `parameters` the function takes none; `strict` holds its calls to them by a grammar."""

    name: Name
    description: Text | None = None
    parameters: Annotated[dict[str, Any], AfterValidator(_parameters), WithJsonSchema(_SCHEMA_SCHEMA)] | None = None
    strict: bool | None = None

    def arguments_schema(self) -> dict[str, Any]:
        """Returns what the arguments of a call have to fit."""
        if self.parameters is None:
            return {"type": "object", "properties": {}, "additionalProperties": False}
        return {"type": "object", **self.parameters}


class Tool(Wire):
    type: Literal["function"]
    function: FunctionDefinition

    def for_template(self) -> dict[str, Any]:
        """Returns the tool as chat templates take it: all that is given but `strict`, which tells a model nothing."""
        function = self.function
        fields = {"name": function.name, "description": function.description, "parameters": function.parameters}
        return {"type": "function", "function": {name: value for name, value in fields.items() if value is not None}}


class CalledFunction(Wire):
    name: Name
    arguments: Annotated[Text, AfterValidator(_arguments)]


class MadeCall(Wire):
    """A call of an earlier turn."""

    harmless: ClassVar[Harmless] = {"index": None}  # what is left of a stream's deltas
    id: Text = Field(min_length=1)
    type: Literal["function"] = "function"
    function: CalledFunction

    def to_call(self) -> ToolCall:
        return ToolCall(self.id, self.function.name, json.loads(self.function.arguments))


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """`name` is the one function that is required."""

    mode: Literal["none", "auto", "required"]
    name: str | None = None


def _choice(value: object) -> ToolChoice:
    if value in ("none", "auto", "required"):
        return ToolChoice(value)
    function = value.get("function") if isinstance(value, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if value != {"type": "function", "function": {"name": name}} or not isinstance(name, str):
        raise ValueError(f"is no choice; {NO_CHOICE}")
    return ToolChoice("required", name)


Choice = Annotated[ToolChoice, PlainValidator(_choice), WithJsonSchema(_CHOICE_SCHEMA)]
Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS)]


def check_names(tools: Sequence[Tool], choice: ToolChoice | None) -> None:
    """Raises BadRequest where two tools share a name, and for a choice of what is not offered."""
    names: dict[str, int] = {}
    for index, tool in enumerate(tools):
        first = names.setdefault(tool.function.name, index)
        if first != index:
            param = f"tools[{index}].function.name"
            raise BadRequest(
                f"{param} {tool.function.name!r} is the name of tools[{first}] too; rename one", param=param
            )
    if choice is None or choice.mode != "required":
        return
    if not tools:
        given = "a function" if choice.name is None else f"function {choice.name[:64]!r}"
        raise BadRequest(
            f"tool_choice asks for {given}, but there are no tools; give tools with it", param="tool_choice"
        )
    if choice.name is not None and choice.name not in names:
        raise BadRequest(
            f"tool_choice: function {choice.name[:64]!r} is not among tools; they have {_listed(list(names))}",
            param="tool_choice",
        )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
