from __future__ import annotations

import asyncio

import pytest

from evalharness.client import Client
from evalharness.errors import ServerError
from evalharness.records import Record, RecordKind, SampleStatus
from evalharness.revisions import AnswererWatch, served_revisions
from tests.evalharness.endpoint import Answer, better_adapter, serve


def look_up(url: str, *arms: str, api_key: str | None = None) -> dict[str, str | None]:
    async def once() -> dict[str, str | None]:
        async with Client(url, timeout_s=5.0, api_key=api_key) as client:
            return await served_revisions(client, arms)

    return asyncio.run(once())


def test_our_server_tells_the_revision_and_digest_of_each_arm(fake_server):
    found = look_up(fake_server, "base", "starter")
    name, _, digest = (found["starter"] or "").partition("@")
    assert (name, len(digest)) == ("starter", 12)
    assert found["base"].startswith("base (")
    assert look_up(fake_server, f"starter@{digest}") == {f"starter@{digest}": found["starter"]}


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"revision": "starter@0123456789ab", "digest": "0123456789abcdef"}, "starter@0123456789ab"),
        ({"revision": "base", "digest": "0123456789abcdef"}, "base (0123456789ab)"),
        ({"revision": "v2"}, "v2"),
        ({"digest": "0123456789abcdef"}, "0123456789ab"),
        ({"id": "starter"}, None),
        ({"revision": {"number": 2}}, None),
    ],
)
def test_what_a_server_tells_is_kept_and_the_rest_is_none(body, told):
    server = better_adapter()
    server.models["starter"] = body
    with serve(server) as url:
        assert look_up(url, "base", "starter") == {"base": None, "starter": told}


def test_an_unknown_arm_is_named_with_those_that_exist():
    with serve(better_adapter()) as url, pytest.raises(ServerError, match=r"'starterr'.*base, starter"):
        look_up(url, "base", "starterr")


def test_a_name_that_is_served_and_not_listed_is_known():
    server = better_adapter()
    server.models["starter@01234567"] = {"revision": "starter@0123456789ab"}
    with serve(server) as url:
        assert look_up(url, "starter@01234567") == {"starter@01234567": "starter@0123456789ab"}


@pytest.mark.parametrize(("status", "says"), [(401, "--api-key-env"), (403, "--api-key-env"), (503, "repeat")])
def test_a_server_that_will_not_say_is_an_error_with_the_remedy(monkeypatch, status, says):
    monkeypatch.setattr("evalharness.client.FIRST_WAIT_S", 0.001)
    with serve(lambda path, body: Answer({}, status)) as url, pytest.raises(ServerError, match=says):
        look_up(url, "base")


def reply(model: str, fingerprint: str | None, kind: RecordKind = RecordKind.HELD_OUT, **changes: object) -> Record:
    fields = {"kind": kind, "sample_id": "s", "arm": "starter", "status": SampleStatus.OK}
    return Record.model_validate({**fields, "model": model, "system_fingerprint": fingerprint, **changes})


def test_a_change_of_model_or_fingerprint_is_said_once():
    watch = AnswererWatch([reply("starter@1", "f1")])
    assert watch.see(reply("starter@1", "f1")) is None
    said = watch.see(reply("starter@2", "f2"))
    assert said is not None
    assert "starter@2 (f2) from here on" in said
    assert "starter@1 (f1) until now" in said
    assert "--out" in said
    assert watch.see(reply("starter@2", "f2")) is None
    assert watch.see(reply("starter@2", "f3")) is not None


def test_scores_may_be_named_otherwise_than_replies_but_not_fingerprinted_otherwise():
    watch = AnswererWatch([reply("starter@1", "f1")])
    assert watch.see(reply("starter", None, RecordKind.NLL)) is None
    assert watch.see(reply("base", "f0", arm="base")) is None
    assert watch.see(reply("gone", "f9", status=SampleStatus.TIMEOUT)) is None
    assert watch.see(reply("starter", "f2", RecordKind.NLL)) is not None
