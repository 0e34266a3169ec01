"""The wire model: a request body whose every field is typed, known to be harmless, or refused by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError


def whole_text(text: str) -> str:
    """JSON can write half a surrogate pair, which is no text and breaks tokenizers; raises ValueError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} is half a surrogate pair; send whole Unicode text") from None
    return text


MAX_NAME_CHARACTERS = 100  # of an unknown field: more is neither compared nor repeated
Text = Annotated[str, AfterValidator(whole_text)]
Harmless = Mapping[str, tuple[object, ...] | None]


class Wire(BaseModel):
    """`harmless` lists OpenAI's other fields with the values that change no output; None stands for any value.

    `remedies` says for some of them what to do instead. A null is an absent field, as OpenAI's clients mean it.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
    harmless: ClassVar[Harmless] = {}
    remedies: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        fields = {field.alias or own: field for own, field in cls.model_fields.items()}
        return {name: value for name, value in data.items() if cls._keeps(name, value, fields)}

    @classmethod
    def _keeps(cls, name: str, value: object, fields: Mapping[str, FieldInfo]) -> bool:
        if name in fields:
            return value is not None or fields[name].is_required()
        if name not in cls.harmless:
            raise _unknown(name, [*fields, *cls.harmless])
        allowed = cls.harmless[name]
        if value is None or allowed is None or any(_same(value, other) for other in allowed):
            return False
        raise unsupported(cls.remedies.get(name) or _removal(allowed), name)

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Adds what the fields do not say: a null is an absent field, and the harmless values of the others."""
        reference = handler(core_schema)
        schema = handler.resolve_ref_schema(reference)
        required, properties = schema.get("required", []), schema["properties"]
        for name in properties.keys() - set(required):
            properties[name] = _or_null(properties[name])
        for name, allowed in cls.harmless.items():
            if allowed is None:
                properties[name] = {"description": "Changes no output."}
            else:
                choice = {"enum": [*allowed, None]}
                properties[name] = {"description": "Changes no output; other values are refused.", **choice}
        return reference


def _same(value: object, other: object) -> bool:
    """Python's True equals 1; JSON's does not."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _unknown(name: str, known: list[str]) -> PydanticCustomError:
    # JSON can name half a surrogate pair, pydantic cannot.
    name = name[:MAX_NAME_CHARACTERS].encode("utf-8", "backslashreplace").decode()
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else "remove it"
    return PydanticCustomError("unknown_field", "is no field of this request; {hint}", {"field": name, "hint": hint})


def unsupported(remedy: str, name: str | None = None) -> PydanticCustomError:
    """Is for a known value that would change the output, of field `name`, or of the one that is validated."""
    context = {"remedy": remedy} if name is None else {"remedy": remedy, "field": name}
    return PydanticCustomError("unsupported_field", "is not supported and would change the output; {remedy}", context)


def _removal(allowed: tuple[object, ...]) -> str:
    return f"remove it or give {' or '.join(map(repr, allowed))}" if allowed else "remove it"


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    if {"type": "null"} in schema.get("anyOf", []):
        return schema
    outer: dict[str, Any] = {key: schema.pop(key) for key in ("default", "title", "description") if key in schema}
    if outer.get("default") == []:  # what an absent field is read as, not a value that it takes
        del outer["default"]
    return {"anyOf": [schema, {"type": "null"}], **outer}
