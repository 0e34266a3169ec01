"""Nothing but the probes passes without a key, a key passes where its entry says, and as often."""

from __future__ import annotations

import json

import pytest

from serving.auth import ANONYMOUS
from serving.gate import Gate, described
from serving.keys import KeyEntry, KeyRing, add_entry, new_key
from serving.limits import Limiter
from tests.serving.test_middleware import call, header, recorder

ENTRIES = {
    "ann": {"kind": "inference", "models": ("starter",), "requests_per_minute": 2, "max_concurrent": 9},
    "free": {"kind": "inference", "models": ("*",)},
    "root": {"kind": "admin"},
    "prometheus": {"kind": "inference", "metrics": True},
}
INFERENCE = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/v1/anything", "//admin", "/adminx")
ADMIN = ("/admin", "/admin/", "/admin/revisions")


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Returns (the ring, a key for each of ENTRIES)."""
    path, made = tmp_path_factory.mktemp("gate") / "keys.toml", {}
    for name, fields in ENTRIES.items():
        made[name], sha256 = new_key()
        add_entry(path, KeyEntry(name=name, sha256=sha256, **fields))
    return KeyRing(path), made


def gate(ring):
    """Returns the recorder over a gate, and the facts of the requests that passed."""
    passed = []

    async def app(scope, receive, send):
        passed.append(scope["state"]["facts"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    return recorder(Gate(app, keys=ring, limiter=Limiter(), deadline_s=600.0)), passed


def send(app, path, key=None, method="POST", **headers):
    """Returns (status, error code or None, the messages)."""
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    if key is not None:
        pairs.append((b"authorization", f"Bearer {key}".encode()))
    sent = call(app, path=path, headers=pairs, method=method)
    body = sent[1]["body"]
    return sent[0]["status"], json.loads(body)["error"]["code"] if body else None, sent


def test_without_a_key_only_the_probes_answer(keys):
    app, passed = gate(keys[0])
    for path in ("/healthz", "/readyz"):
        assert send(app, path, method="GET")[0] == 200
    count = len(passed)
    for path in (*INFERENCE, *ADMIN, "/metrics", "/openapi.json", "/v1/models", "/", "/healthz/", "/readyz/../metrics"):
        for method in ("GET", "POST", "HEAD", "OPTIONS", "DELETE"):
            status, code, sent = send(app, path, method=method)
            assert (status, code) == (401, "invalid_api_key")
            assert header(sent, b"www-authenticate").startswith("Bearer")
            assert header(sent, b"x-request-id")
    assert len(passed) == count


def test_each_kind_of_key_passes_where_it_may(keys):
    ring, made = keys
    for name, path, code in [
        *(("free", path, None) for path in (*INFERENCE, "/openapi.json")),
        *(("free", path, "admin_key_required") for path in ADMIN),
        *(("root", path, None) for path in (*ADMIN, "/metrics")),
        ("free", "/metrics", "metrics_not_allowed"),
        ("prometheus", "/metrics", None),
        ("prometheus", "/admin/revisions", "admin_key_required"),
    ]:
        app, passed = gate(ring)
        assert send(app, path, made[name])[1] == code, (name, path)
        assert [facts.caller.name for facts in passed] == ([name] if code is None else [])


def test_without_a_ring_inference_is_open_and_administration_closed():
    app, passed = gate(None)
    for path in (*INFERENCE, "/metrics", "/openapi.json"):
        assert send(app, path)[0] == 200
    assert all(facts.caller is ANONYMOUS for facts in passed)
    for path in ADMIN:
        status, code, sent = send(app, path)
        assert (status, code) == (403, "admin_key_required")
        assert b"--keys FILE" in sent[1]["body"]


def test_requests_are_counted_refused_and_told_in_headers(keys):
    ring, made = keys
    app, _ = gate(ring)
    assert send(app, "/v1/models", made["ann"], method="GET")[0] == 200, "and not counted"
    for remaining in ("1", "0"):
        status, _, sent = send(app, "/tokenize", made["ann"])
        assert (status, header(sent, b"x-ratelimit-remaining-requests")) == (200, remaining)
        assert header(sent, b"x-ratelimit-limit-requests") == "2"
    status, code, sent = send(app, "/tokenize", made["ann"])
    assert (status, code) == (429, "rate_limit_exceeded")
    assert 1 <= int(header(sent, b"retry-after")) <= 30
    assert header(sent, b"x-ratelimit-remaining-requests") == "0"
    assert not header(send(app, "/tokenize", made["free"])[2], b"x-ratelimit-limit-requests")


def test_the_timeout_header_lowers_the_servers():
    app, passed = gate(None)
    for headers in ({}, {"x_request_timeout_s": "2.5"}, {"x_request_timeout_s": "1e9"}):
        send(app, "/v1/completions", **headers)
    assert [facts.timeout_s for facts in passed] == [600.0, 2.5, 600.0]


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon", "", "1s"])
def test_a_timeout_that_is_none_is_named(value):
    app, passed = gate(None)
    status, code, sent = send(app, "/v1/completions", x_request_timeout_s=value)
    assert (status, code, passed) == (400, "invalid_value", [])
    assert b"x-request-timeout-s" in sent[1]["body"]


def test_the_schema_says_where_a_key_is_needed():
    schema = {"paths": {"/readyz": {"get": {}}, "/v1/models": {"get": {}}, "/tokenize": {"post": {}}}}
    assert described(schema) is schema
    assert schema["paths"]["/readyz"]["get"]["security"] == []
    assert schema["paths"]["/tokenize"]["post"]["security"] == [{"key": []}]
    assert schema["components"]["securitySchemes"]["key"] == {"type": "http", "scheme": "bearer"}
