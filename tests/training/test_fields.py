"""Properties of the words for a settings field."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field

from training.fields import allowed, suggest, wants_text


class Shapes(BaseModel):
    count: int = Field(ge=1, le=9, description="of things")
    share: float | None = Field(gt=0, lt=1, description="a share")
    kind: Literal["a", "b"] = Field(description="which")
    names: Literal["all"] | Annotated[tuple[str, ...], Field(min_length=1)] = Field(description="whose")
    path: Annotated[Path, Field(strict=False)] | None = Field(description="where")
    flag: bool = Field(description="whether")
    word: str = Field(pattern="^x$", min_length=1, description="what")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("count", "a whole number, >= 1, <= 9 (of things)"),
        ("share", "a number or none, > 0, < 1 (a share)"),
        ("kind", "'a' or 'b' (which)"),
        ("names", "'all' or a list of text (whose)"),
        ("path", "a path or none (where)"),
        ("flag", "true or false (whether)"),
        ("word", "text, of length >= 1, matching ^x$ (what)"),
    ],
)
def test_allowed_is_read_from_the_fields_own_constraints(name: str, words: str):
    assert allowed(Shapes.model_fields[name]) == words


def test_only_text_fields_want_text():
    assert [name for name, field in Shapes.model_fields.items() if wants_text(field)] == ["kind", "path", "word"]


def test_a_suggestion_is_the_nearest_name_else_all_of_them():
    assert suggest("rnk", ["rank", "alpha"], prefix="lora.") == "; did you mean lora.rank?"
    assert suggest("zzz", ["rank", "alpha"], prefix="lora.") == "; known: lora.rank, lora.alpha"
