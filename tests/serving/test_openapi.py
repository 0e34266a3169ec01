"""The document says what the server does: its statuses, envelopes, bodies and streams."""

from __future__ import annotations

import importlib.metadata
import json

import jsonschema_rs
import pytest

from serving.openapi import describe
from tests.serving.bad_inputs import BAD_INPUTS, CALLING, CHAT, RESULT
from tests.serving.tools.templates import CLOCK, WEATHER
from tests.tiny import make_fake_app


@pytest.fixture(scope="module")
def document(tiny_base) -> dict:
    app, _ = make_fake_app(tiny_base, {})
    return app.openapi()


def validator(document: dict, name: str) -> jsonschema_rs.Validator:
    return jsonschema_rs.validator_for({**document, "$ref": f"#/components/schemas/{name}"})


def operations(document: dict) -> list[tuple[str, dict]]:
    return [(path, each) for path, methods in document["paths"].items() for each in methods.values()]


def test_every_error_is_the_envelope_and_none_is_fastapis(document):
    assert len(operations(document)) > 15
    for path, operation in operations(document):
        for status, answer in operation["responses"].items():
            assert answer["headers"]["x-request-id"]["required"]
            if int(status) >= 400:
                schema = answer["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/ErrorEnvelope"}, f"{path} {status}"
    assert "HTTPValidationError" not in json.dumps(document)


def test_what_a_route_can_answer_is_declared(document):
    completions = set(document["paths"]["/v1/chat/completions"]["post"]["responses"])
    assert completions == {"200", "400", "401", "403", "404", "408", "413", "429", "500", "503", "504"}
    assert set(document["paths"]["/healthz"]["get"]["responses"]) == {"200", "408", "413", "500", "503"}
    assert {"409", "422"} <= set(document["paths"]["/admin/revisions"]["post"]["responses"])


def test_it_can_be_described_again_and_again(document):
    before = json.dumps(document)
    assert json.dumps(describe(document)) == before


def test_a_path_without_listed_answers_is_a_mistake(document):
    with pytest.raises(KeyError, match="lists no answers of /new"):
        describe({**document, "paths": {"/new": {"get": {"responses": {}}}}})


def test_the_version_is_the_packages(document):
    assert document["info"]["version"] == importlib.metadata.version("graft")


def test_streams_are_described_with_their_chunks(document):
    for path, chunk in (("/v1/chat/completions", "ChatChunk"), ("/v1/completions", "Completion")):
        content = document["paths"][path]["post"]["responses"]["200"]["content"]
        assert content["text/event-stream"]["schema"]["x-event-schema"]["title"] == chunk
        assert "$ref" in content["application/json"]["schema"]
    assert list(document["paths"]["/metrics"]["get"]["responses"]["200"]["content"]) == ["text/plain"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"stop": "a"},
        {"stop": ["a", "b"], "temperature": None, "logit_bias": {"5": -100}},
        {"user": "x", "metadata": {"any": 1}, "tools": [], "tool_choice": "auto", "store": False, "top_k": -1},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}, "strict": True}}},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}], "name": None}]},
        {"stream": True, "stream_options": {"include_usage": True}},
        {"tools": [WEATHER, CLOCK], "tool_choice": "required", "parallel_tool_calls": False},
        {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "get_weather"}}},
        {
            "messages": [
                CALLING,
                RESULT,
                {**CALLING, "content": "text"},
                {**RESULT, "content": [{"type": "text", "text": "a"}]},
            ]
        },
    ],
)
def test_a_body_that_is_accepted_fits(document, fields):
    body = {"model": "base", "messages": [{"role": "user", "content": "hi"}], **fields}
    validator(document, "ChatRequest").validate(body)


def test_bodies_that_are_refused_for_their_fields_do_not_fit(document):
    """But for what no schema says: tokens that do not fit the context, and fields that do not agree."""
    checker = validator(document, "ChatRequest")
    refused = [
        body
        for path, body, status, _, code in BAD_INPUTS
        if path == CHAT and isinstance(body, dict) and status == 400 and code in {"unknown_field", "missing_field"}
    ]
    unsupported = [body for path, body, _, _, code in BAD_INPUTS if path == CHAT and code == "unsupported_field"]
    elsewhere = [
        body
        for body in unsupported
        if body.get("response_format") == {"type": "json_object"} or "tools" in body or CALLING in body["messages"]
    ]
    assert len(refused) > 5
    assert len(unsupported) > 10
    assert len(elsewhere) == 5, "which another engine or template accepts"
    for body in [*refused, *(body for body in unsupported if body not in elsewhere)]:
        assert not checker.is_valid(body), body
