"""A reply to a JSON format is JSON of its schema, streamed or not; an engine that cannot hold it says so."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import jsonschema_rs
import openai
import pytest
from pydantic import ValidationError

from serving.app import create_app
from serving.engine.engine import Grammar
from serving.engine.transformers_engine import TransformersEngine
from serving.errors import BadRequest
from serving.registry.boot import open_registry
from serving.response_format import ANY_OBJECT, ResponseFormat
from tests.serving.engine.schemas import SCHEMAS
from tests.tiny import running_server

USER = {"role": "user", "content": "hi"}


def json_schema(schema: object, **fields) -> dict:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **fields}}


@pytest.fixture(scope="module")
def url(tiny_base: Path, tiny_adapters: dict[str, Path]) -> Iterator[str]:
    """The app over the real engine: "base" and "starter"."""
    registry = open_registry("base", tiny_base, adapters={"starter": tiny_adapters["starter"]})
    app = create_app(engine=TransformersEngine(tiny_base, device="cpu"), registry=registry)
    with running_server(app) as url:
        yield f"{url}/v1"


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def test_a_stream_and_a_reply_say_the_same_json_of_the_schema(url):
    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:

            async def ask(name: str, schema: dict) -> None:
                fields = {
                    "model": "starter",
                    "messages": [USER],
                    "max_tokens": 250,
                    "seed": 3,
                    "response_format": json_schema(schema, strict=True),
                }
                whole = (await client.chat.completions.create(**fields)).choices[0]
                text, reason = "", None
                async for chunk in await client.chat.completions.create(**fields, stream=True):
                    text += chunk.choices[0].delta.content or ""
                    reason = chunk.choices[0].finish_reason or reason
                assert (text, reason) == (whole.message.content, whole.finish_reason)
                if reason == "stop":
                    ended.append(name)
                    jsonschema_rs.validate(schema, json.loads(text))

            ended: list[str] = []
            await asyncio.gather(*(ask(*item) for item in SCHEMAS.items()))
            assert len(ended) > len(SCHEMAS) / 2

    asyncio.run(run())


def test_json_object_is_any_object_for_chat_and_text(client):
    fields = {"model": "base", "max_tokens": 2, "seed": 1, "temperature": 0}
    held = {"response_format": {"type": "json_object"}}
    chat = client.chat.completions.create(**fields, messages=[USER], **held)
    text = client.completions.create(**fields, prompt="hi", extra_body=held)
    for choice, found in ((chat.choices[0], chat.choices[0].message.content), (text.choices[0], text.choices[0].text)):
        assert found.lstrip().startswith("{")
        assert choice.finish_reason in {"length", "stop"}


def test_type_text_changes_nothing(client):
    fields = {"model": "base", "messages": [USER], "max_tokens": 9, "temperature": 0}
    free = client.chat.completions.create(**fields)
    named = client.chat.completions.create(**fields, response_format={"type": "text"})
    assert named.choices == free.choices


def test_n_choices_are_each_held(client):
    reply = client.chat.completions.create(
        model="base", messages=[USER], n=3, seed=1, response_format=json_schema({"enum": ["a", "b", 17]})
    )
    assert all(json.loads(choice.message.content) in ("a", "b", 17) for choice in reply.choices)
    assert {choice.finish_reason for choice in reply.choices} == {"stop"}


@pytest.mark.parametrize("schema", [{"type": "objec"}, {"not": {}}, {"allOf": [{"pattern": "a"}] * 20}])
def test_a_schema_that_cannot_be_held_is_a_400_that_names_the_field(client, schema):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="base", messages=[USER], response_format=json_schema(schema), stream=True, max_tokens=5
        )
    assert caught.value.param == "response_format.json_schema.schema"
    assert caught.value.code == "unusable_schema"


def test_an_engine_without_grammars_refuses_by_name(fake_server):
    with (
        openai.OpenAI(base_url=f"{fake_server}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.BadRequestError, match="--engine transformers or vllm") as caught,
    ):
        client.chat.completions.create(model="base", messages=[USER], response_format={"type": "json_object"})
    assert (caught.value.param, caught.value.code) == ("response_format", "unsupported_field")


def test_the_schemas_text_keeps_the_order_of_its_properties():
    given = ResponseFormat.model_validate(json_schema({"properties": {"z": {}, "a": {}}}))
    assert given.grammar() == Grammar('{"properties": {"z": {}, "a": {}}}')
    assert ResponseFormat.model_validate({"type": "json_object"}).grammar() == ANY_OBJECT
    assert ResponseFormat.model_validate({"type": "text"}).grammar() is None


def test_a_schema_nested_too_deep_is_refused():
    schema: dict = {}
    for _ in range(100_000):
        schema = {"items": schema}
    given = ResponseFormat.model_construct(type="json_schema", json_schema=make_schema(schema))
    with pytest.raises(BadRequest, match="nested too deep"):
        given.grammar()
    while schema:  # freed from the outside in, which recursion would not survive
        schema = schema.pop("items", {})


def make_schema(schema: dict):
    return ResponseFormat.model_validate(json_schema({})).json_schema.model_copy(update={"definition": schema})


@pytest.mark.parametrize("name", ["", "a b", "a" * 65, "ü"])
def test_a_name_is_what_openai_allows(name):
    with pytest.raises(ValidationError):
        ResponseFormat.model_validate({"type": "json_schema", "json_schema": {"name": name, "schema": {}}})
