"""The bad inputs: route, body, and the status, param and code that must answer."""

from __future__ import annotations

from typing import Any

USER = {"role": "user", "content": "hi"}
SCHEMA = {"name": "any", "schema": {}}


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "base", "messages": [USER], **fields}


def text(**fields: Any) -> dict[str, Any]:
    return {"model": "base", "prompt": "hi", **fields}


def tool(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **fields}}


def calling(**fields: Any) -> dict[str, Any]:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}", **fields}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


TOOL, CALLING = tool(), calling()
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "5"}
NAMED = {"type": "function", "function": {"name": "g"}}
DEEP: dict[str, Any] = {}
for _ in range(70):
    DEEP = {"properties": {"a": DEEP}}
CHAT, TEXT, TOKENIZE = "/v1/chat/completions", "/v1/completions", "/tokenize"
VALUE, MISSING, UNSUPPORTED, UNKNOWN = "invalid_value", "missing_field", "unsupported_field", "unknown_field"

# A str or bytes is sent as it stands, with a JSON content type.
BAD_INPUTS: list[tuple[str, Any, int, str | None, str]] = [
    (CHAT, "{", 400, None, "invalid_json"),
    (CHAT, "", 400, None, MISSING),
    (CHAT, "[]", 400, None, VALUE),
    (CHAT, '"hi"', 400, None, VALUE),
    (CHAT, "null", 400, None, MISSING),
    (CHAT, b"\xff\xfe{}", 400, None, "invalid_json"),
    (CHAT, "[" * 100_000, 400, None, "invalid_json"),
    (
        CHAT,
        '{"model": "base", "messages": [{"role": "user", "content": "\\ud800"}]}',
        400,
        "messages[0].content",
        VALUE,
    ),
    (
        CHAT,
        '{"model": "base", "messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
        400,
        "temperature",
        VALUE,
    ),
    (CHAT, '{"model": "base", "messages": [{"role": "user", "content": "a"}], "top_p": Infinity}', 400, "top_p", VALUE),
    (CHAT, '{"model": "base", "messages": [{"role": "user", "content": "a"}], "\\ud800": 1}', 400, "\\ud800", UNKNOWN),
    (CHAT, '{"seed": ' + "9" * 5000 + "}", 400, None, "invalid_json"),
    (CHAT, {"messages": [USER]}, 400, "model", MISSING),
    (CHAT, {"model": "base"}, 400, "messages", MISSING),
    (CHAT, chat(model=None), 400, "model", VALUE),
    (CHAT, chat(model=5), 400, "model", VALUE),
    (CHAT, chat(model="gpt-4o"), 404, "model", "model_not_found"),
    (CHAT, chat(model="starter@ffff"), 404, "model", "model_not_found"),
    (CHAT, chat(model=""), 404, "model", "model_not_found"),
    (CHAT, chat(messages=[]), 400, "messages", VALUE),
    (CHAT, chat(messages="hi"), 400, "messages", VALUE),
    (CHAT, chat(messages=["hi"]), 400, "messages[0]", VALUE),
    (CHAT, chat(messages=[{"content": "hi"}]), 400, "messages[0].role", MISSING),
    (CHAT, chat(messages=[{"role": "user"}]), 400, "messages[0].content", MISSING),
    (CHAT, chat(messages=[{"role": "wizard", "content": "hi"}]), 400, "messages[0].role", VALUE),
    (CHAT, chat(messages=[USER, {"role": "tool", "content": "hi"}]), 400, "messages[1].tool_call_id", MISSING),
    (CHAT, chat(messages=[USER, {"role": "function", "content": "hi"}]), 400, "messages[1].role", UNSUPPORTED),
    (CHAT, chat(messages=[USER, CALLING, {**RESULT, "tool_call_id": "c2"}]), 400, "messages[2].tool_call_id", VALUE),
    (CHAT, chat(messages=[USER, CALLING, USER, RESULT]), 400, "messages[3].tool_call_id", VALUE),
    (CHAT, chat(messages=[RESULT]), 400, "messages[0].tool_call_id", VALUE),
    (CHAT, chat(messages=[{**USER, "tool_call_id": "c1"}]), 400, "messages[0].tool_call_id", VALUE),
    (CHAT, chat(messages=[USER, CALLING, RESULT]), 400, "messages", UNSUPPORTED),  # the template renders none
    (
        CHAT,
        chat(messages=[{"role": "assistant", "content": None, "tool_calls": [{}]}]),
        400,
        "messages[0].tool_calls[0].id",
        MISSING,
    ),
    (CHAT, chat(messages=[calling(name="a b")]), 400, "messages[0].tool_calls[0].function.name", VALUE),
    (CHAT, chat(messages=[calling(arguments="[]")]), 400, "messages[0].tool_calls[0].function.arguments", VALUE),
    (CHAT, chat(messages=[calling(arguments="{")]), 400, "messages[0].tool_calls[0].function.arguments", VALUE),
    (CHAT, chat(messages=[{"role": "user", "content": None}]), 400, "messages[0].content", MISSING),
    (CHAT, chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), 400, "messages[0].content", VALUE),
    (
        CHAT,
        chat(messages=[{"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}}]}]),
        400,
        "messages[0].content",
        VALUE,
    ),
    (CHAT, chat(messages=[USER] * 513), 400, "messages", VALUE),
    (CHAT, chat(messages=[{**USER, "mood": "good"}]), 400, "messages[0].mood", UNKNOWN),
    (CHAT, chat(messages=[{**CALLING, **USER}]), 400, "messages[0].tool_calls", VALUE),
    (CHAT, chat(messages=[{**USER, "function_call": {"name": "f"}}]), 400, "messages[0].function_call", UNSUPPORTED),
    (CHAT, chat(messages=[{"role": "user", "content": "word " * 3000}]), 400, "messages", "context_length_exceeded"),
    (CHAT, chat(max_tokens=100_000), 400, "messages", "context_length_exceeded"),
    (CHAT, chat(max_tokens=-1), 400, "max_tokens", VALUE),
    (CHAT, chat(max_tokens=0), 400, "max_tokens", VALUE),
    (CHAT, chat(max_tokens="5"), 400, "max_tokens", VALUE),
    (CHAT, chat(max_tokens=5.5), 400, "max_tokens", VALUE),
    (CHAT, chat(max_tokens=True), 400, "max_tokens", VALUE),
    (CHAT, chat(max_tokens=5, max_completion_tokens=6), 400, "max_completion_tokens", VALUE),
    (CHAT, chat(temperature=-0.1), 400, "temperature", VALUE),
    (CHAT, chat(temperature=2.1), 400, "temperature", VALUE),
    (CHAT, chat(temperature="hot"), 400, "temperature", VALUE),
    (CHAT, chat(top_p=0), 400, "top_p", VALUE),
    (CHAT, chat(top_p=1.5), 400, "top_p", VALUE),
    (CHAT, chat(n=0), 400, "n", VALUE),
    (CHAT, chat(n=17), 400, "n", VALUE),
    (CHAT, chat(stop=["a"] * 17), 400, "stop", VALUE),
    (CHAT, chat(stop=""), 400, "stop", VALUE),
    (CHAT, chat(seed=2**64), 400, "seed", VALUE),
    (CHAT, chat(presence_penalty=2.5), 400, "presence_penalty", VALUE),
    (CHAT, chat(frequency_penalty=-3), 400, "frequency_penalty", VALUE),
    (CHAT, chat(logprobs=3), 400, "logprobs", VALUE),
    (CHAT, chat(top_logprobs=3), 400, "top_logprobs", VALUE),
    (CHAT, chat(logprobs=True, top_logprobs=21), 400, "top_logprobs", VALUE),
    (CHAT, chat(stream="yes"), 400, "stream", VALUE),
    (CHAT, chat(stream_options={"include_usage": True}), 400, "stream_options", VALUE),
    (CHAT, chat(stream=True, stream_options={"usage": True}), 400, "stream_options.usage", UNKNOWN),
    (CHAT, chat(tools=[TOOL]), 400, "tools", UNSUPPORTED),  # the template renders none
    (CHAT, chat(tools=[{"type": "function"}]), 400, "tools[0].function", MISSING),
    (CHAT, chat(tools=[{**TOOL, "type": "custom"}]), 400, "tools[0].type", VALUE),
    (CHAT, chat(tools=[tool(name="a b")]), 400, "tools[0].function.name", VALUE),
    (CHAT, chat(tools=[TOOL, tool(name="a" * 65)]), 400, "tools[1].function.name", VALUE),
    (CHAT, chat(tools=[TOOL, TOOL]), 400, "tools[1].function.name", VALUE),
    (CHAT, chat(tools=[tool(name=f"f{at}") for at in range(129)]), 400, "tools", VALUE),
    (CHAT, chat(tools=[tool(parameters={"type": "array"})]), 400, "tools[0].function.parameters", VALUE),
    (CHAT, chat(tools=[tool(parameters=["a"])]), 400, "tools[0].function.parameters", VALUE),
    (CHAT, chat(tools=[tool(parameters=DEEP)]), 400, "tools[0].function.parameters", VALUE),
    (CHAT, chat(tools=[tool(schema={})]), 400, "tools[0].function.schema", UNKNOWN),
    (CHAT, chat(tools=[tool(strict=True)]), 400, "tools[0].function.strict", UNSUPPORTED),  # the fake engine's
    (CHAT, chat(tools=[TOOL], tool_choice="required"), 400, "tool_choice", UNSUPPORTED),  # the fake engine's
    (CHAT, chat(tools=[TOOL], tool_choice=NAMED), 400, "tool_choice", VALUE),
    (CHAT, chat(tools=[TOOL], tool_choice="any"), 400, "tool_choice", VALUE),
    (CHAT, chat(tools=[TOOL], tool_choice={"type": "function"}), 400, "tool_choice", VALUE),
    (CHAT, chat(tools=[TOOL], parallel_tool_calls="no"), 400, "parallel_tool_calls", VALUE),
    (CHAT, chat(tool_choice="required"), 400, "tool_choice", VALUE),
    (CHAT, chat(tool_choice=NAMED), 400, "tool_choice", VALUE),
    (CHAT, chat(functions=[{"name": "f"}]), 400, "functions", UNSUPPORTED),
    (CHAT, chat(response_format={"type": "json_object"}), 400, "response_format", UNSUPPORTED),  # the fake engine's
    (CHAT, chat(response_format="json"), 400, "response_format", VALUE),
    (CHAT, chat(response_format={"type": "xml"}), 400, "response_format.type", VALUE),
    (CHAT, chat(response_format={"type": "json_schema"}), 400, "response_format.json_schema", VALUE),
    (CHAT, chat(response_format={"type": "text", "json_schema": SCHEMA}), 400, "response_format.json_schema", VALUE),
    (
        CHAT,
        chat(response_format={"type": "json_schema", "json_schema": {"schema": {}}}),
        400,
        "response_format.json_schema.name",
        MISSING,
    ),
    (
        CHAT,
        chat(response_format={"type": "json_schema", "json_schema": {**SCHEMA, "schemas": 1}}),
        400,
        "response_format.json_schema.schemas",
        UNKNOWN,
    ),
    (CHAT, chat(logit_bias={"five": 10}), 400, "logit_bias", VALUE),
    (CHAT, chat(logit_bias={"5": 101}), 400, "logit_bias", VALUE),
    (CHAT, chat(logit_bias={"5": True}), 400, "logit_bias", VALUE),
    (CHAT, chat(logit_bias={"99999": 1}), 400, "logit_bias", VALUE),
    (CHAT, chat(audio={"voice": "x"}), 400, "audio", UNSUPPORTED),
    (CHAT, chat(modalities=["text", "audio"]), 400, "modalities", UNSUPPORTED),
    (CHAT, chat(reasoning_effort="high"), 400, "reasoning_effort", UNSUPPORTED),
    (CHAT, chat(store=True), 400, "store", UNSUPPORTED),
    (CHAT, chat(top_k=40), 400, "top_k", UNSUPPORTED),
    (CHAT, chat(min_p=0.1), 400, "min_p", UNSUPPORTED),
    (CHAT, chat(temprature=1), 400, "temprature", UNKNOWN),
    (TEXT, text(prompt=[]), 400, "prompt", VALUE),
    (TEXT, text(prompt=""), 400, "prompt[0]", VALUE),
    (TEXT, text(prompt=[["a"]]), 400, "prompt", VALUE),
    (TEXT, text(prompt=[1, "a"]), 400, "prompt", VALUE),
    (TEXT, text(prompt=[5, 99_999]), 400, "prompt[0]", VALUE),
    (TEXT, text(prompt=[[5], [-1]]), 400, "prompt[1]", VALUE),
    (TEXT, text(prompt=[5] * 513, max_tokens=0), 400, "prompt", "context_length_exceeded"),
    (TEXT, text(prompt=["a"] * 300), 400, None, "too_many_completions"),
    (TEXT, text(max_tokens=-1), 400, "max_tokens", VALUE),
    (TEXT, text(logprobs=21), 400, "logprobs", VALUE),
    (TEXT, text(logprobs=True), 400, "logprobs", VALUE),
    (TEXT, text(suffix="end"), 400, "suffix", UNSUPPORTED),
    (TEXT, text(best_of=3), 400, "best_of", UNSUPPORTED),
    (TEXT, text(messages=[USER]), 400, "messages", UNKNOWN),
    (TEXT, '{"model": "base", "prompt": "\\ud800"}', 400, "prompt", VALUE),
    (TEXT, '{"model": "base", "prompt": ["a", "\\ud800"]}', 400, "prompt", VALUE),
    (TEXT, '{"model": "base", "prompt": "a", "stop": "\\ud800"}', 400, "stop", VALUE),
    (TOKENIZE, '{"model": "base", "prompt": "\\ud800"}', 400, "prompt", VALUE),
    (TOKENIZE, {"model": "base"}, 400, "prompt", VALUE),
    (TOKENIZE, {"model": "base", "prompt": "a", "messages": [USER]}, 400, "prompt", VALUE),
    (TOKENIZE, {"model": "nope", "prompt": "a"}, 404, "model", "model_not_found"),
    (TOKENIZE, {"model": "base", "prompt": 5}, 400, "prompt", VALUE),
    (TOKENIZE, {"model": "base", "messages": []}, 400, "messages", VALUE),
    (TOKENIZE, {"model": "base", "messages": [USER] * 513}, 400, "messages", VALUE),
    (TOKENIZE, {"model": "base", "messages": [USER], "tools": [TOOL]}, 400, "tools", UNSUPPORTED),
    (TOKENIZE, {"model": "base", "messages": [USER], "tools": [TOOL, TOOL]}, 400, "tools[1].function.name", VALUE),
    (TOKENIZE, {"model": "base", "messages": [RESULT]}, 400, "messages[0].tool_call_id", VALUE),
    (TOKENIZE, {"model": "base", "prompt": "a", "tools": [TOOL]}, 400, "tools", VALUE),
]
