"""The response format: text, any JSON object, or JSON that fits a schema, as OpenAI writes it."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from serving.engine.engine import Grammar
from serving.errors import BadRequest
from serving.wire import Text, Wire

ANY_OBJECT = Grammar('{"type": "object"}')


class JsonSchema(Wire):
    """`strict` changes nothing: the reply fits the schema in either case, or the schema is refused."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    definition: dict[str, Any] = Field(alias="schema")
    description: Text | None = None
    strict: bool | None = None


class ResponseFormat(Wire):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise BadRequest(
                f"response_format has type {self.type!r}; "
                + ("give json_schema with it" if self.json_schema is None else "json_schema needs type json_schema"),
                param="response_format.json_schema",
            )
        return self

    def grammar(self) -> Grammar | None:
        """Returns what the reply has to be, None for free text. Raises BadRequest for a schema nested too deep."""
        if self.json_schema is None:
            return ANY_OBJECT if self.type == "json_object" else None
        try:
            return Grammar(json.dumps(self.json_schema.definition))
        except RecursionError as error:
            param = "response_format.json_schema.schema"
            raise BadRequest(f"{param} is nested too deep; simplify it", param=param, code="unusable_schema") from error
