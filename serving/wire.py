"""The wire model: a request body whose every field is typed, known to be harmless, or refused by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


def whole_text(text: str) -> str:
    """JSON can write half a surrogate pair, which is no text and breaks tokenizers; raises ValueError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} is half a surrogate pair; send whole Unicode text") from None
    return text


Text = Annotated[str, AfterValidator(whole_text)]
Harmless = Mapping[str, tuple[object, ...] | None]


class Wire(BaseModel):
    """`harmless` lists OpenAI's other fields with the values that change no output; None stands for any value.

    A null is an absent field, as OpenAI's clients mean it.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
    harmless: ClassVar[Harmless] = {}

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if cls._keeps(name, value)}

    @classmethod
    def _keeps(cls, name: str, value: object) -> bool:
        if name in cls.model_fields:
            return value is not None or cls.model_fields[name].is_required()
        if name not in cls.harmless:
            raise _unknown(name, [*cls.model_fields, *cls.harmless])
        allowed = cls.harmless[name]
        if value is None or allowed is None or any(_same(value, other) for other in allowed):
            return False
        raise _unsupported(name, value, allowed)


def _same(value: object, other: object) -> bool:
    """Python's True equals 1; JSON's does not."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _unknown(name: str, known: list[str]) -> PydanticCustomError:
    name = name.encode("utf-8", "backslashreplace").decode()  # JSON can name half a surrogate pair, pydantic cannot
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else "remove it"
    return PydanticCustomError("unknown_field", "is no field of this request; {hint}", {"field": name, "hint": hint})


def _unsupported(name: str, value: object, allowed: tuple[object, ...]) -> PydanticCustomError:
    choice = f"remove it or give {' or '.join(map(repr, allowed))}" if allowed else "remove it"
    message = "is not supported and would change the output; {choice}"
    return PydanticCustomError("unsupported_field", message, {"field": name, "choice": choice})
