"""Properties of LLaMA-Factory entries: read as it reads them, refused by name where they cannot be trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from training.dataset_info import read_entry
from training.rows import AlpacaLayout, ChatLayout, DataError

TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def info(tmp_path: Path, **entry: Any) -> Path:
    path = tmp_path / "dataset_info.json"
    path.write_text(json.dumps({"mine": entry, "other": {"file_name": "x.json"}}))
    return path


@pytest.mark.parametrize(
    ("entry", "layout"),
    [
        ({}, AlpacaLayout(system=None, history=None)),
        (
            {"columns": {"prompt": "q", "response": "a"}},
            AlpacaLayout("q", query=None, response="a", system=None, history=None),
        ),
        (
            {"columns": {"prompt": "q", "query": "c", "response": "a", "system": "s", "history": "h"}},
            AlpacaLayout("q", "c", "a", "s", "h"),
        ),
        ({"formatting": "sharegpt"}, ChatLayout(("conversations",), (("from", "value"),), SHAREGPT_ROLES, None)),
        (
            {"formatting": "sharegpt", "columns": {"messages": "talk", "system": "sys"}},
            ChatLayout(("talk",), (("from", "value"),), SHAREGPT_ROLES, "sys"),
        ),
        (
            {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": TAGS},
            ChatLayout(("messages",), (("role", "content"),), {"user": "user", "assistant": "assistant"}, None),
        ),
        (
            {"formatting": "sharegpt", "tags": TAGS | {"system_tag": "sys", "observation_tag": "tool"}},
            ChatLayout(
                ("conversations",),
                (("role", "content"),),
                {"user": "user", "assistant": "assistant", "sys": "system"},
                None,
            ),
        ),
        (
            {"formatting": "openai"},
            ChatLayout(
                ("messages",),
                (("role", "content"),),
                {"user": "user", "assistant": "assistant", "system": "system"},
                None,
            ),
        ),
    ],
)
def test_an_entry_gives_its_layout_with_unlisted_columns_absent(tmp_path: Path, entry: dict[str, Any], layout: object):
    assert read_entry(info(tmp_path, file_name="x.json", **entry), "mine").layout() == layout


def test_a_hub_entry_keeps_where_it_lies(tmp_path: Path):
    path = info(tmp_path, hf_hub_url="a/b", ms_hub_url="c/d", subset="en", split="test", folder="f", revision="r")
    entry = read_entry(path, "mine")
    assert (entry.hf_hub_url, entry.subset, entry.split, entry.folder, entry.revision) == (
        "a/b",
        "en",
        "test",
        "f",
        "r",
    )


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"file_name": "x.json", "ranking": True}, "ranking data"),
        ({"file_name": "x.json", "columns": {"prompt": "q", "response": "a", "images": "i"}}, "columns.images: is not"),
        ({"file_name": "x.json", "columns": {"prompt": "q", "response": "a", "kto_tag": "k"}}, "columns.kto_tag"),
        ({"file_name": "x.json", "columns": {"messages": "m", "tools": "t"}}, "columns.tools"),
        ({"file_name": "x.json", "num_samples": 5}, "num_samples"),
        ({"script_url": "x"}, "script_url"),
        ({"ms_hub_url": "c/d"}, "neither hf_hub_url nor file_name"),
        ({"file_name": "x.json", "formatting": "llama"}, "formatting"),
        ({"file_name": "x.json", "columns": {"prompt": "q"}}, "prompt and response"),
        ({"file_name": "x.json", "columns": {}}, "prompt and response"),
        ({"file_name": "x.json", "formatting": "sharegpt", "columns": {}}, "list messages"),
        ({"file_name": "x.json", "formatting": "sharegpt", "tags": {"role_tag": "role"}}, "role_tag, content_tag"),
        ({"file_name": 3}, "file_name"),
        ({"file_name": "x.json", "split": "test"}, "for hub data sets"),
    ],
)
def test_an_entry_that_cannot_be_trained_on_is_refused_by_name(tmp_path: Path, entry: dict[str, Any], says: str):
    with pytest.raises(DataError) as caught:
        read_entry(info(tmp_path, **entry), "mine")
    assert says in str(caught.value)
    assert "mine" in str(caught.value)


def test_an_unknown_name_gets_a_suggestion(tmp_path: Path):
    with pytest.raises(DataError, match="did you mean mine"):
        read_entry(info(tmp_path, file_name="x.json"), "mne")


@pytest.mark.parametrize(
    ("text", "says"), [(None, "no such file"), ("{", "not JSON"), ("[]", "is not in"), ("\xff", "not JSON")]
)
def test_a_file_that_is_no_dataset_info_is_refused(tmp_path: Path, text: str | None, says: str):
    path = tmp_path / "dataset_info.json"
    if text is not None:
        path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=says):
        read_entry(path, "mine")
