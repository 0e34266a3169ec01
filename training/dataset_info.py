"""An entry of LLaMA-Factory's dataset_info.json: where a data set lies and which columns and tags it has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from training.chat import Role
from training.fields import suggest
from training.rows import ALPACA, OPENAI, SHAREGPT, AlpacaLayout, ChatLayout, DataError, Layout


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Columns(_Part):
    """As LLaMA-Factory reads it: once `columns` stands in an entry, a column it does not list is None."""

    prompt: str | None = None
    query: str | None = None
    response: str | None = None
    history: str | None = None
    system: str | None = None
    messages: str | None = None


class Tags(_Part):
    """As with columns: once `tags` stands in an entry, a tag it does not list is None."""

    role_tag: str | None = None
    content_tag: str | None = None
    user_tag: str | None = None
    assistant_tag: str | None = None
    system_tag: str | None = None
    observation_tag: str | None = None  # tool turns: rows that have them are refused one by one
    function_tag: str | None = None


class Entry(_Part):
    hf_hub_url: str | None = None
    file_name: str | None = None
    ms_hub_url: str | None = None  # the same set on another hub; never read
    om_hub_url: str | None = None
    formatting: Literal["alpaca", "sharegpt", "openai"] = "alpaca"
    ranking: bool = False
    subset: str | None = None
    split: str | None = None
    folder: str | None = None
    revision: str | None = None
    columns: Columns | None = None
    tags: Tags | None = None

    @model_validator(mode="after")
    def _supported(self) -> Entry:
        if self.ranking:
            raise ValueError("ranking data (chosen and rejected replies) is not for supervised training")
        if self.hf_hub_url is None and self.file_name is None:
            raise ValueError("neither hf_hub_url nor file_name is given")
        if self.hf_hub_url is None and (self.subset or self.split or self.folder or self.revision):
            raise ValueError("subset, split, folder and revision are for hub data sets; this one is a file")
        self.layout()
        return self

    def layout(self) -> Layout:
        """Raises ValueError where a needed column or tag is not listed."""
        return self._alpaca() if self.formatting == "alpaca" else self._chat()

    def _alpaca(self) -> AlpacaLayout:
        columns = self.columns
        if columns is None:  # LLaMA-Factory reads no system and no history column then
            return AlpacaLayout(system=None, history=None)
        if columns.prompt is None or columns.response is None:
            raise ValueError(f"columns must list prompt and response (such as {ALPACA.prompt} and {ALPACA.response})")
        return AlpacaLayout(columns.prompt, columns.query, columns.response, columns.system, columns.history)

    def _chat(self) -> ChatLayout:
        default = SHAREGPT if self.formatting == "sharegpt" else OPENAI
        column, system = default.columns[0], None
        if self.columns is not None:
            if self.columns.messages is None:
                raise ValueError(f"columns must list messages (such as {column})")
            column, system = self.columns.messages, self.columns.system
        form, roles = default.forms[0], _DEFAULT_ROLES[self.formatting]
        if self.tags is not None:
            form, roles = _from_tags(self.tags)
        return ChatLayout((column,), (form,), roles, system)


_DEFAULT_ROLES: dict[str, dict[str, Role]] = {
    "sharegpt": {"human": "user", "gpt": "assistant", "system": "system"},
    "openai": {"user": "user", "assistant": "assistant", "system": "system"},
}


def read_entry(path: Path, name: str) -> Entry:
    """Returns the entry `name`. Raises DataError where there is none, or one that cannot be trained on."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"data.dataset_info = {str(path)!r}: no such file") from None
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    if not isinstance(entries, dict) or name not in entries:
        known = list(entries) if isinstance(entries, dict) else []
        raise DataError(f"data.dataset = {name!r} is not in {path}" + suggest(name, known))
    try:
        return Entry.model_validate(entries[name])
    except ValidationError as error:
        raise DataError(f"{path}: {name}: " + "; ".join(_problem(dict(detail)) for detail in error.errors())) from None


def _from_tags(tags: Tags) -> tuple[tuple[str, str], dict[str, Role]]:
    if not (tags.role_tag and tags.content_tag and tags.user_tag and tags.assistant_tag):
        raise ValueError("tags must list role_tag, content_tag, user_tag and assistant_tag")
    roles: dict[str, Role] = {tags.user_tag: "user", tags.assistant_tag: "assistant"}
    if tags.system_tag:
        roles[tags.system_tag] = "system"
    return (tags.role_tag, tags.content_tag), roles


def _problem(detail: dict[str, object]) -> str:
    location = ".".join(str(part) for part in detail["loc"]) if isinstance(detail["loc"], tuple) else ""
    message = str(detail["msg"]).removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        message = "is not supported (images, tools, preference data and other hubs are not)"
    return f"{location}: {message}" if location else message
