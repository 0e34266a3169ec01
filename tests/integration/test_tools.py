"""Function calls over HTTP, as OpenAI's own client sees them: scripted text, and a random model under a grammar."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import httpx
import jsonschema_rs
import openai
import pytest
from openai.types.chat import ChatCompletion
from pydantic import BaseModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from serving.app import create_app
from serving.engine.transformers_engine import TransformersEngine
from serving.registry.boot import open_registry
from tests.serving.tools.templates import CLOCK, HERMES, LLAMA, WEATHER, base_with
from tests.tiny import make_fake_app, running_server
from training.chat import Message, ToolCall, end_of_turn_id, render_prompt

USER = {"role": "user", "content": "hi"}
CITY = '{"city": "Paris", "unit": "C"}'
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {CITY}}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
FIELDS: dict[str, Any] = {"model": "base", "messages": [USER], "tools": [WEATHER, CLOCK], "temperature": 0}


@pytest.fixture(scope="module")
def bases(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {name: base_with(tiny_base, root / name, text) for name, text in (("hermes", HERMES), ("llama", LLAMA))}


@pytest.fixture
def say(bases: dict[str, Path]) -> Iterator[Callable[..., openai.OpenAI]]:
    """`say(text)` returns a client of a model that answers with this text."""
    with ExitStack() as running:

        def start(text: str, style: str = "hermes") -> openai.OpenAI:
            tokenizer = AutoTokenizer.from_pretrained(bases[style])
            script = (*tokenizer.encode(text), end_of_turn_id(tokenizer))
            app, _ = make_fake_app(bases[style], {}, script=script)
            url = running.enter_context(running_server(app))
            return running.enter_context(openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0))

        yield start


@pytest.fixture(scope="module")
def marked(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose marks are one token each, as Qwen2.5's are."""
    tokenizer = AutoTokenizer.from_pretrained(bases["hermes"])
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    model = AutoModelForCausalLM.from_pretrained(bases["hermes"])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    directory = tmp_path_factory.mktemp("marked")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def real(marked: Path) -> Iterator[openai.OpenAI]:
    """A client of the random tiny model on the engine with grammars."""
    app = create_app(engine=TransformersEngine(marked, device="cpu"), registry=open_registry("base", marked))
    with running_server(app) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def calls_of(reply: ChatCompletion) -> list[tuple[str, str]]:
    return [(call.function.name, call.function.arguments) for call in reply.choices[0].message.tool_calls or []]


def streamed(client: openai.OpenAI, **fields: Any) -> tuple[str, list[tuple[str, str]], str, list[Any]]:
    """Returns the content, the calls, the finish reason and the choices of the chunks."""
    parts = [chunk.choices[0] for chunk in client.chat.completions.create(**fields, stream=True)]
    calls = list[tuple[str, str]]()
    for delta in (call for part in parts for call in part.delta.tool_calls or []):
        if delta.id:
            assert delta.index == len(calls)
            calls.append((delta.function.name, delta.function.arguments))
        else:
            name, arguments = calls[delta.index]
            calls[delta.index] = (name, arguments + delta.function.arguments)
    return "".join(part.delta.content or "" for part in parts), calls, parts[-1].finish_reason, parts


def refused(client: openai.OpenAI, **fields: Any) -> openai.BadRequestError:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{**FIELDS, **fields})
    return caught.value


def test_text_before_calls_is_content_and_calls_are_calls(say):
    client = say(f"Let me see.\n{CALL}\n{OTHER}")
    reply = client.chat.completions.create(**FIELDS)
    assert calls_of(reply) == [("get_weather", CITY), ("clock", "{}")]
    assert (reply.choices[0].message.content, reply.choices[0].finish_reason) == ("Let me see.", "tool_calls")
    content, calls, finish, parts = streamed(client, **FIELDS)
    assert (content, calls, finish) == ("Let me see.", calls_of(reply), "tool_calls")
    pieces = [call for part in parts for call in part.delta.tool_calls or []]
    assert len(pieces) > 6, "arguments come in pieces"
    assert len({call.id for call in pieces if call.id}) == 2


def test_calls_alone_have_null_content(say):
    message = say(CALL).chat.completions.create(**FIELDS).choices[0].message
    assert message.content is None
    assert message.tool_calls[0].id.startswith("call_")


def test_json_alone_is_a_call_where_the_template_writes_it_so(say):
    client = say(f'{{"name": "get_weather", "parameters": {CITY}}}', "llama")
    assert calls_of(client.chat.completions.create(**FIELDS)) == [("get_weather", CITY)]
    assert streamed(client, **FIELDS)[:3] == ("", [("get_weather", CITY)], "tool_calls")


@pytest.mark.parametrize("text", ["Hi, no call.", CALL.replace("get_weather", "get_time"), CALL.replace("Paris", 'P"')])
def test_what_is_no_call_is_content(say, text):
    client = say(text)
    reply = client.chat.completions.create(**FIELDS).choices[0]
    assert (reply.message.content, reply.message.tool_calls, reply.finish_reason) == (text, None, "stop")


def test_without_a_choice_to_call_a_call_is_text(say):
    client = say(CALL)
    for fields in ({"tool_choice": "none"}, {"tools": []}):
        assert client.chat.completions.create(**{**FIELDS, **fields}).choices[0].message.content == CALL


def test_one_call_where_parallel_calls_are_not_wanted(say):
    client = say(f"{CALL}\n{OTHER}")
    fields = {**FIELDS, "parallel_tool_calls": False}
    reply = client.chat.completions.create(**fields)
    assert calls_of(reply) == [("get_weather", CITY)]
    assert reply.choices[0].finish_reason == "tool_calls"
    assert streamed(client, **fields)[:3] == ("", calls_of(reply), "tool_calls")


def test_a_call_that_the_limit_cuts_off_ends_with_length(say, bases):
    client = say(CALL)
    begun = AutoTokenizer.from_pretrained(bases["hermes"]).encode(CALL[: CALL.index("ris")])
    fields = {**FIELDS, "max_tokens": len(begun)}
    reply = client.chat.completions.create(**fields)
    (name, arguments), *_ = calls_of(reply)
    assert name == "get_weather"
    assert CITY.startswith(arguments)
    assert reply.choices[0].finish_reason == "length"
    assert streamed(client, **fields)[1:3] == ([(name, arguments)], "length")


def test_logprobs_are_of_every_token(say):
    client = say(f"Well. {CALL}")
    fields = {**FIELDS, "logprobs": True}
    reply = client.chat.completions.create(**fields)
    entries = reply.choices[0].logprobs.content
    assert "".join(entry.token for entry in entries) == f"Well. {CALL}"
    parts = streamed(client, **fields)[3]
    assert [entry.token for part in parts if part.logprobs for entry in part.logprobs.content] == [
        entry.token for entry in entries
    ]


def test_a_call_and_its_result_are_read_as_training_reads_them(say, bases):
    client = say(CALL)
    first = client.chat.completions.create(**FIELDS).choices[0].message
    messages = [
        USER,
        first.model_dump(),
        {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "21 °C"},
    ]
    reply = client.chat.completions.create(**{**FIELDS, "messages": messages})
    call = ToolCall(first.tool_calls[0].id, "get_weather", json.loads(CITY))
    chat = [Message("user", "hi"), Message("assistant", "", (call,)), Message("tool", "21 °C", tool_call_id=call.id)]
    ids = render_prompt(AutoTokenizer.from_pretrained(bases["hermes"]), chat, [WEATHER, CLOCK])
    body = {"model": "base", "messages": messages, "tools": [WEATHER, CLOCK]}
    url = str(client.base_url).replace("/v1/", "/tokenize")
    assert httpx.post(url, json=body).json()["tokens"] == list(ids)
    assert reply.usage.prompt_tokens == len(ids)


def test_what_the_engine_or_the_format_does_not_allow_is_named(say):
    client = say(CALL)
    assert refused(client, tool_choice="required").param == "tool_choice"
    strict = {**CLOCK, "function": {**CLOCK["function"], "strict": True}}
    assert refused(client, tools=[WEATHER, strict]).param == "tools[1].function.strict"
    error = refused(client, response_format={"type": "json_object"})
    assert error.param == "response_format"


def test_a_model_whose_template_renders_no_tools_says_so(fake_server):
    with openai.OpenAI(base_url=f"{fake_server}/v1", api_key="none", max_retries=0) as client:
        error = refused(client, model="starter")
    assert (error.param, error.code) == ("tools", "unsupported_field")
    assert "model 'starter' cannot call functions: its chat template renders no tools" in error.message


@pytest.mark.parametrize("seed", range(3))
def test_a_required_call_fits_its_schema_even_from_a_random_model(real, seed):
    fields = {**FIELDS, "temperature": 1, "seed": seed, "tool_choice": "required", "parallel_tool_calls": False}
    reply = real.chat.completions.create(**fields, max_tokens=170)
    assert reply.choices[0].finish_reason == "tool_calls"
    ((name, arguments),) = calls_of(reply)
    assert reply.choices[0].message.content is None
    if name == "get_weather":
        jsonschema_rs.validate(WEATHER["function"]["parameters"], json.loads(arguments))
    else:
        assert (name, json.loads(arguments)) == ("clock", {})
    assert streamed(real, **fields, max_tokens=170)[:3] == ("", [(name, arguments)], "tool_calls")


def test_openais_own_parser_reads_strict_calls_whole_and_streamed(real):
    class GetWeather(BaseModel):
        city: Literal["Paris", "Rome"]
        tomorrow: bool

    fields = {**FIELDS, "tools": [openai.pydantic_function_tool(GetWeather)], "tool_choice": "required"}
    fields = {**fields, "parallel_tool_calls": False, "max_tokens": 170}
    whole = real.chat.completions.parse(**fields).choices[0].message.tool_calls
    with real.chat.completions.stream(**fields) as stream:
        seen = {event.type for event in stream}
        parts = stream.get_final_completion().choices[0].message.tool_calls
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= seen
    for calls in (whole, parts):
        assert isinstance(calls[0].function.parsed_arguments, GetWeather)
    assert whole[0].function.arguments == parts[0].function.arguments


def test_the_function_that_is_named_is_called(real):
    for name in ("get_weather", "clock"):
        choice = {"type": "function", "function": {"name": name}}
        reply = real.chat.completions.create(**{**FIELDS, "temperature": 1}, seed=1, tool_choice=choice, max_tokens=170)
        assert [called for called, _ in calls_of(reply)] == [name]


def test_strict_tools_leave_text_free(real):
    strict = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}
    for seed in range(3):
        reply = real.chat.completions.create(**{**FIELDS, "tools": [strict], "temperature": 1}, seed=seed, max_tokens=9)
        assert reply.choices[0].message.content
        assert not reply.choices[0].message.tool_calls


def test_parameters_that_no_grammar_holds_are_refused_where_they_have_to_be_held(real):
    odd = {"type": "function", "function": {"name": "odd", "parameters": {"properties": {"a": {"not": {}}}}}}
    error = refused(real, tools=[CLOCK, odd], tool_choice="required")
    assert (error.param, error.code) == ("tools[1].function.parameters", "unusable_schema")
    assert real.chat.completions.create(**{**FIELDS, "tools": [odd]}, max_tokens=2).choices
