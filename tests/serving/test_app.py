"""The whole app over HTTP, as OpenAI's own client and as a rude one see it."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import openai
import pytest
from transformers import PreTrainedTokenizerBase

from serving.app import create_app
from serving.engine.engine import WeightFormat
from serving.engine.fake_engine import FakeEngine
from serving.engine.transformers_engine import TransformersEngine
from serving.errors import AdapterRejected
from serving.generation import INLINE_BYTES
from serving.keys import KeyEntry, KeyRing, add_entry, new_key
from serving.logs import JsonLines
from serving.registry.boot import open_registry
from tests.serving.bad_inputs import BAD_INPUTS
from tests.tiny import make_fake_app, make_tokenizer, running_server, wait_until

USER = {"role": "user", "content": "hi"}
SPOKEN = "Hi 🦊👩🏽‍💻 你好,世界 – naïve. END of it"


@pytest.fixture(scope="module")
def client(fake_server):
    with openai.OpenAI(base_url=f"{fake_server}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def serve(tiny_base, tiny_adapters):
    """Serves an app of its own: `serve(**options)` returns its URL and engine."""
    running = []

    def start(*, wait_ready=True, **options):
        app, engine = make_fake_app(tiny_base, tiny_adapters, **options)
        context = running_server(app, wait_ready=wait_ready)
        running.append(context)
        return context.__enter__(), engine

    yield start
    for context in running:
        context.__exit__(None, None, None)


def chat(url, *, key=None, headers=None, **fields):
    body = {"model": "base", "messages": [USER], **fields}
    return httpx.post(f"{url}/v1/chat/completions", json=body, headers={**bearer(key), **(headers or {})}, timeout=60)


def bearer(key) -> dict:
    return {} if key is None else {"authorization": f"Bearer {key}"}


def waiting(url, key=None) -> int:
    """Returns how many completions wait at the gateway."""
    text = httpx.get(f"{url}/metrics", headers=bearer(key), timeout=60).text
    return sum(int(float(line.split()[-1])) for line in text.splitlines() if line.startswith("graft_queue_waiting{"))


async def told(go: threading.Event) -> None:
    while not go.is_set():  # noqa: ASYNC110 - another thread sets it
        await asyncio.sleep(0.02)


def hold(engine) -> threading.Event:
    """Has the engine make no step until the event is set, so that a slow machine changes nothing meanwhile."""
    go, step = threading.Event(), engine._step

    async def held():
        await told(go)
        await step()

    engine._step = held
    return go


def send(url, route="/v1/chat/completions", **fields) -> socket.socket:
    """Returns the connection of a request whose answer nobody reads; its client leaves by closing it."""
    body = json.dumps({"model": "base", "temperature": 0, **fields}).encode()
    connection = socket.create_connection((httpx.URL(url).host, httpx.URL(url).port))
    head = f"POST {route} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def make_keys(folder, **entries):
    """Returns the ring and the keys by name; each may read metrics."""
    made = {}
    for name, fields in entries.items():
        made[name], sha256 = new_key()
        entry = KeyEntry(**{"kind": "inference", "metrics": True, **fields}, name=name, sha256=sha256)
        add_entry(folder / "keys.toml", entry)
    return KeyRing(folder / "keys.toml"), made


def envelope(response) -> dict:
    """Returns the error after holding its shape."""
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["code"], str)
    return body["error"]


class TestOpenAIsClient:
    def test_a_chat_completion(self, client):
        reply = client.chat.completions.create(model="base", messages=[USER], max_tokens=6, temperature=0)
        assert reply.object == "chat.completion"
        assert reply.choices[0].message.role == "assistant"
        assert reply.choices[0].finish_reason in {"stop", "length"}
        assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
        assert reply.model == "base"
        assert reply.system_fingerprint.startswith("graft-")

    def test_each_model_answers_for_itself(self, client):
        replies = {}
        for model in ("base", "starter", "other"):
            raw = client.chat.completions.with_raw_response.create(
                model=model, messages=[USER], max_tokens=12, temperature=0
            )
            reply = raw.parse()
            replies[model] = reply.choices[0].message.content
            assert reply.model.split("@")[0] == model
            assert raw.headers.get("x-adapter-revision") == (None if model == "base" else reply.model)
            again = client.chat.completions.create(model=reply.model, messages=[USER], max_tokens=12, temperature=0)
            assert again.choices[0].message.content == replies[model]
        assert len(set(replies.values())) == 3

    def test_a_stream_says_what_the_reply_says(self, client):
        fields = {"model": "starter", "messages": [USER], "max_tokens": 30, "seed": 7, "n": 2}
        whole = client.chat.completions.create(**fields)
        chunks = list(client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
        assert chunks[-1].usage == whole.usage
        for choice in whole.choices:
            own = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == choice.index]
            assert "".join(part.delta.content or "" for part in own) == choice.message.content
            assert own[-1].finish_reason == choice.finish_reason

    def test_the_async_client_runs_all_models_at_once(self, fake_server):
        async def run():
            async with openai.AsyncOpenAI(base_url=f"{fake_server}/v1", api_key="none", max_retries=0) as client:

                async def ask(model):
                    stream = await client.chat.completions.create(
                        model=model, messages=[USER], max_tokens=10, temperature=0, stream=True
                    )
                    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

                models = ["base", "starter", "other"] * 4
                return models, await asyncio.gather(*map(ask, models))

        models, texts = asyncio.run(run())
        assert len(set(zip(models, texts, strict=True))) == 3

    def test_n_choices_are_seed_plus_i(self, client):
        def texts(**fields):
            reply = client.chat.completions.create(model="base", messages=[USER], max_tokens=10, **fields)
            assert [choice.index for choice in reply.choices] == list(range(len(reply.choices)))
            return [choice.message.content for choice in reply.choices]

        three = texts(n=3, seed=40)
        assert [texts(seed=40 + i)[0] for i in range(3)] == three
        assert len(set(three)) > 1

    def test_logprobs(self, client):
        reply = client.chat.completions.create(
            model="base", messages=[USER], max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
        )
        content = reply.choices[0].logprobs.content
        raw = b"".join(bytes(entry.bytes) for entry in content if not entry.token.startswith("<|"))
        assert raw.decode(errors="replace") == reply.choices[0].message.content
        for entry in content:
            assert len(entry.top_logprobs) == 3
            assert entry.top_logprobs[0].token == entry.token

    def test_echo_scores_a_prompt(self, client, fake_server):
        url = f"{fake_server}/tokenize"
        ids = httpx.post(url, json={"model": "starter", "messages": [USER]}).json()["tokens"]
        reply = client.completions.create(model="starter", prompt=ids, echo=True, logprobs=0, max_tokens=0)
        choice = reply.choices[0]
        assert choice.text.startswith("<|im_start|>system\n")
        assert choice.logprobs.token_logprobs[0] is None
        assert all(value <= 0 for value in choice.logprobs.token_logprobs[1:])
        assert len(choice.logprobs.tokens) == len(ids) == reply.usage.prompt_tokens
        for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
            assert choice.text[offset:].startswith(token)
        assert (choice.finish_reason, reply.usage.completion_tokens) == ("length", 0)

    def test_text_completions_stream_and_take_many_prompts(self, client):
        fields = {"model": "base", "prompt": ["a", "the fox"], "max_tokens": 6, "temperature": 0, "echo": True}
        whole = client.completions.create(**fields)
        pairs = zip(whole.choices, fields["prompt"], strict=True)
        assert all(choice.text.startswith(prompt) for choice, prompt in pairs)
        parts = list(client.completions.create(**fields, stream=True))
        for choice in whole.choices:
            assert "".join(p.choices[0].text for p in parts if p.choices[0].index == choice.index) == choice.text

    def test_models_are_listed_and_found(self, client):
        listed = {model.id: model for model in client.models.list()}
        assert list(listed) == ["base", "starter", "other"]
        revision = listed["starter"].revision
        assert client.models.retrieve(revision).digest == listed["starter"].digest
        with pytest.raises(openai.NotFoundError) as caught:
            client.models.retrieve("nope")
        assert caught.value.code == "model_not_found"

    def test_errors_are_typed(self, client):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="base", messages=[USER], max_tokens=9999)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
        assert caught.value.request_id
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="gpt-4o", messages=[USER])

    def test_harmless_fields_are_accepted(self, client):
        client.chat.completions.create(
            model="base",
            messages=[{"role": "developer", "content": "brief"}, {**USER, "name": "ann"}],
            max_tokens=2,
            user="u",
            metadata={"a": "b"},
            store=False,
            service_tier="auto",
            parallel_tool_calls=True,
            response_format={"type": "text"},
            tools=[],
            tool_choice="none",
            logit_bias={},
            modalities=["text"],
            safety_identifier="s",
            prompt_cache_key="k",
            seed=None,
        )
        client.completions.create(model="base", prompt="a", max_tokens=2, best_of=1)


class TestText:
    def script(self):
        return tuple(make_tokenizer().encode(SPOKEN))

    def test_characters_are_never_split(self, serve):
        url, _ = serve(script=self.script(), end_of_turn_id=None)
        body = {"model": "base", "messages": [USER], "max_tokens": len(self.script()), "temperature": 0, "stream": True}
        contents = []
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    contents.append(json.loads(line[6:])["choices"][0]["delta"].get("content", ""))
        assert "".join(contents) == SPOKEN
        assert "\ufffd" not in "".join(contents)
        assert len(contents) > 20

    def test_a_stop_string_across_tokens_ends_the_text_before_it(self, serve):
        url, engine = serve(script=self.script(), end_of_turn_id=None)
        for stop, expected in (("END", SPOKEN[: SPOKEN.index("END")]), (["世界", "zzz"], "Hi 🦊👩🏽‍💻 你好,")):
            choice = chat(url, temperature=0, max_tokens=60, stop=stop).json()["choices"][0]
            assert choice["message"]["content"] == expected
            assert choice["finish_reason"] == "stop"
        wait_until(lambda: engine.stats().running == 0)

    def test_an_end_of_turn_token_stops_and_is_not_counted(self, serve):
        end = make_tokenizer().convert_tokens_to_ids("<|im_end|>")
        url, _ = serve(script=(*make_tokenizer().encode("ok"), end), end_of_turn_id=None)
        body = chat(url, temperature=0, logprobs=True).json()
        assert body["choices"][0]["message"]["content"] == "ok"
        assert body["choices"][0]["finish_reason"] == "stop"
        assert body["usage"]["completion_tokens"] == len(make_tokenizer().encode("ok"))


class TestBadInput:
    def test_the_sweep_is_wide(self):
        assert len(BAD_INPUTS) >= 40
        assert len({code for *_, code in BAD_INPUTS}) >= 8

    @pytest.mark.parametrize(("route", "body", "status", "param", "code"), BAD_INPUTS)
    def test_it_is_answered_by_name_and_the_server_goes_on(self, fake_server, route, body, status, param, code):
        raw = body.encode() if isinstance(body, str) else body
        payload = {"content": raw} if isinstance(raw, bytes) else {"json": raw}
        response = httpx.post(fake_server + route, headers={"content-type": "application/json"}, **payload)
        error = envelope(response)
        assert (response.status_code, error["param"], error["code"]) == (status, param, code), error["message"]
        assert error["type"] == "invalid_request_error"
        if param is not None and status == 400:
            assert param.split("[")[0].split(".")[0] in error["message"] or "tokens" in error["message"]
        assert httpx.get(f"{fake_server}/readyz").status_code == 200

    def test_a_suggestion_is_made(self, fake_server):
        assert "did you mean temperature?" in envelope(chat(fake_server, temprature=1))["message"]

    def test_a_form_is_no_json(self, fake_server):
        response = httpx.post(f"{fake_server}/v1/chat/completions", data={"model": "base"})
        assert (response.status_code, envelope(response)["code"]) == (400, "invalid_json")

    @pytest.mark.parametrize("headers", [{}, {"content-type": "application/x-www-form-urlencoded"}])
    def test_json_needs_no_content_type(self, fake_server, headers):
        body = json.dumps({"model": "base", "messages": [USER], "max_tokens": 1}).encode()
        url = f"{fake_server}/v1/chat/completions"
        assert httpx.post(url, content=body, headers=headers).status_code == 200

    def test_unknown_routes_and_methods(self, fake_server):
        for path in ("/", "/v1/nope", "/v1/chat/completions/", "/v1/chat"):
            response = httpx.get(fake_server + path)
            assert (response.status_code, envelope(response)["code"]) == (404, "route_not_found")
        response = httpx.get(f"{fake_server}/v1/chat/completions")
        assert (response.status_code, envelope(response)["code"]) == (405, "method_not_allowed")
        assert response.headers["allow"] == "POST"
        assert httpx.delete(f"{fake_server}/v1/models/base").status_code == 405

    def test_a_body_over_the_limit_is_413_in_chunks_too(self, serve):
        url, _ = serve(body_limit_bytes=2000)
        big = json.dumps({"model": "base", "messages": [{"role": "user", "content": "x" * 3000}]}).encode()
        for content in (big, (big[start : start + 100] for start in range(0, len(big), 100))):
            response = httpx.post(f"{url}/v1/chat/completions", content=content)
            assert (response.status_code, envelope(response)["code"]) == (413, "body_too_large")
        small = json.dumps({"model": "base", "messages": [USER], "max_tokens": 1}).encode()
        chunked = httpx.post(f"{url}/v1/chat/completions", content=(bytes([byte]) for byte in small))
        assert chunked.status_code == 200

    @pytest.mark.parametrize("framing", ["content-length: 4000", "transfer-encoding: chunked"])
    def test_a_body_that_trickles_in_is_408_and_its_connection_is_cut(self, serve, framing):
        url, engine = serve(deadline_s=60.0)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\nx-request-timeout-s: 0.5\r\n{framing}\r\n\r\n"
        byte = b"1\r\n \r\n" if "chunked" in framing else b" "
        with socket.create_connection((httpx.URL(url).host, httpx.URL(url).port)) as slow:
            slow.settimeout(0.05)
            slow.sendall(head.encode())
            answer = b""
            while b"timeout_error" not in answer:
                slow.sendall(byte)
                with suppress(TimeoutError):
                    answer += slow.recv(65536)
            slow.settimeout(60)
            with suppress(ConnectionResetError):  # bytes that it sent meanwhile met a closed connection
                assert slow.recv(65536) == b""
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ")
        assert b"connection: close" in head.lower()
        error = json.loads(body)["error"]
        assert (error["type"], error["param"], error["code"]) == ("timeout_error", None, "body_too_slow")
        assert "of the body came in 0.5 s" in error["message"]
        assert engine.stats().running == 0


class TestLeaving:
    def test_a_client_that_leaves_a_stream_frees_the_work(self, serve):
        url, engine = serve(token_delay_s=0.05, end_of_turn_id=None)
        body = {"model": "base", "messages": [USER], "max_tokens": 400, "temperature": 0, "n": 2, "stream": True}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as response:
            chunks = response.iter_bytes()  # kept: httpx leaves the stream with its iterator
            next(chunks)
            assert engine.stats().running == 2
        wait_until(lambda: engine.stats().running == 0)
        assert engine.aborted == 2
        assert chat(url, max_tokens=2).status_code == 200

    def test_a_client_that_leaves_before_its_reply_frees_the_work(self, serve):
        url, engine = serve(end_of_turn_id=None)
        hold(engine)
        with send(url, messages=[USER]):
            wait_until(lambda: engine.stats().running == 1)
        wait_until(lambda: engine.stats().running == 0)
        assert engine.aborted == 1
        wait_until(lambda: 'status="499"' in httpx.get(f"{url}/metrics").text)

    def test_a_client_that_leaves_the_queue_makes_room(self, serve):
        url, engine = serve(max_batch=1, max_queue=1, end_of_turn_id=None)
        go = hold(engine)
        with ThreadPoolExecutor(2) as pool:
            running = pool.submit(chat, url, temperature=0, max_tokens=2)
            wait_until(lambda: engine.stats().running == 1)
            with send(url, "/v1/completions", prompt="a"):
                wait_until(lambda: waiting(url) == 1)
                assert chat(url).status_code == 429
            wait_until(lambda: waiting(url) == 0)
            after = pool.submit(chat, url, temperature=0, max_tokens=2)
            wait_until(lambda: waiting(url) == 1)
            go.set()
            assert [running.result().status_code, after.result().status_code] == [200, 200]

    @pytest.mark.slow
    def test_two_hundred_that_leave_leave_nothing_behind(self, serve, tmp_path):
        """32 of them have a row and their first token, the others wait."""
        ring, made = make_keys(tmp_path, ann={"models": ["*"], "tokens_per_minute": 120_000, "max_concurrent": 200})
        url, engine = serve(token_delay_s=0.5, end_of_turn_id=None, keys=ring)  # minutes until one ends by itself
        before = engine.stats().steps
        body = json.dumps({"model": "base", "messages": [USER], "temperature": 0, "stream": True}).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {made['ann']}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        ).encode()

        async def crowd():
            address = httpx.URL(url)
            clients = [await asyncio.open_connection(address.host, address.port) for _ in range(200)]
            for _, writer in clients:
                writer.write(head + body)
            await asyncio.to_thread(wait_until, lambda: waiting(url, made["ann"]) == 168, 60)
            await asyncio.to_thread(wait_until, lambda: engine.stats().steps >= before + 2 * 32, 60)
            assert engine.stats().running == 32
            for _, writer in clients:
                writer.close()

        asyncio.run(asyncio.wait_for(crowd(), 150))
        wait_until(lambda: engine.stats().running == 0 and waiting(url, made["ann"]) == 0, 60)
        assert engine.aborted >= 32, "a row that comes free may go to one whose leaving is still to be seen"
        answer = chat(url, key=made["ann"], max_tokens=1)
        assert answer.status_code == 200
        assert int(answer.headers["x-ratelimit-remaining-tokens"]) > 100_000, "200 x 512 had been reserved"

    def test_a_slow_reader_holds_up_nobody_and_loses_nothing(self, tiny_base, tiny_adapters):
        app, engine = make_fake_app(tiny_base, tiny_adapters, max_batch=8, max_queue=0, script=(60,) * 400)
        sent = []

        async def counted(scope, receive, send):
            async def count(message):
                await send(message)
                sent.append(len(message.get("body", b"")))

            await app(scope, receive, count if scope.get("path") == "/v1/chat/completions" else send)

        fields = {"max_tokens": 400, "n": 8, "temperature": 0, "logprobs": True, "top_logprobs": 20, "stream": True}
        body = json.dumps({"model": "base", "messages": [USER], **fields}).encode()
        with running_server(counted) as url, socket.socket() as slow:
            steps = engine.stats().steps
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect((httpx.URL(url).host, httpx.URL(url).port))
            slow.sendall(b"POST /v1/chat/completions HTTP/1.0\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            # All is made with hardly anything read: a step for each prompt and each token.
            wait_until(lambda: engine.stats().steps == steps + 8 * 401 and engine.stats().running == 0, timeout_s=120)
            before = sum(sent)
            other = httpx.post(f"{url}/v1/completions", json={"model": "base", "prompt": "a"}, timeout=60)
            assert other.status_code == 200
            received = b"".join(iter(lambda: slow.recv(2**20), b""))
        assert received.endswith(b"data: [DONE]\n\n")
        assert received.count(b'"finish_reason":"length"') == 8
        assert before < sum(sent) * 0.9, "the server wrote no more than the socket took"


class TestKeys:
    def test_a_key_uses_its_models_alone_and_openais_client_understands(self, serve, tmp_path):
        ring, made = make_keys(tmp_path, ann={"models": ["starter"]}, root={"kind": "admin"})
        url, _ = serve(keys=ring)
        with openai.OpenAI(base_url=f"{url}/v1", api_key=made["ann"], max_retries=0) as client:
            reply = client.chat.completions.create(model="starter", messages=[USER], max_tokens=2)
            assert client.completions.create(model=reply.model, prompt="a", max_tokens=1).model == reply.model
            for model in ("base", "nope"):
                with pytest.raises(openai.PermissionDeniedError, match="may not use model") as caught:
                    client.chat.completions.create(model=model, messages=[USER])
                assert (caught.value.code, caught.value.param) == ("model_not_allowed", "model")
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError) as caught,
        ):
            client.chat.completions.create(model="starter", messages=[USER])
        assert caught.value.code == "invalid_api_key"
        assert envelope(chat(url, key=made["root"]))["code"] == "model_not_allowed", "an admin key does no inference"
        tokenized = httpx.post(f"{url}/tokenize", json={"model": "base", "prompt": "a"}, headers=bearer(made["ann"]))
        assert envelope(tokenized)["code"] == "model_not_allowed"

    def test_a_key_learns_nothing_of_other_models(self, serve, tmp_path):
        ring, made = make_keys(tmp_path, ann={"models": ["starter"]})
        url, _ = serve(keys=ring)
        listed = httpx.get(f"{url}/v1/models", headers=bearer(made["ann"])).json()["data"]
        assert [model["id"] for model in listed] == ["starter"]
        answers = [httpx.get(f"{url}/v1/models/{name}", headers=bearer(made["ann"])) for name in ("base", "nope")]
        answers.append(chat(url, key=made["ann"], model="other"))
        for answer in answers:
            assert (answer.status_code, envelope(answer)["code"]) == (403, "model_not_allowed")
            assert "other@" not in answer.text
        absent = chat(url, key=made["ann"], model="starter@ffff")
        assert absent.status_code == 404
        assert "base" not in absent.text

    def test_administration_is_closed_without_keys(self, fake_server):
        answer = httpx.get(f"{fake_server}/admin/revisions")
        assert (answer.status_code, envelope(answer)["code"]) == (403, "admin_key_required")

    def test_the_schema_shows_the_key_and_the_probes_need_none(self, serve, tmp_path):
        ring, made = make_keys(tmp_path, ann={"models": ["*"]})
        url, _ = serve(keys=ring)
        schema = httpx.get(f"{url}/openapi.json", headers=bearer(made["ann"])).json()
        assert schema["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
        assert schema["paths"]["/v1/chat/completions"]["post"]["security"] == [{"key": []}]
        assert schema["paths"]["/readyz"]["get"]["security"] == []
        assert httpx.get(f"{url}/openapi.json").status_code == 401


class TestLimits:
    def test_answers_say_what_is_left_and_a_refusal_when_to_come_back(self, serve, tmp_path):
        limits = {"models": ["*"], "requests_per_minute": 3, "tokens_per_minute": 600}
        ring, made = make_keys(tmp_path, ann=limits)
        url, _ = serve(keys=ring, end_of_turn_id=None)
        answer = chat(url, key=made["ann"], max_tokens=4)
        used = answer.json()["usage"]["total_tokens"]
        assert answer.headers["x-ratelimit-remaining-requests"] == "2"
        assert 600 - used <= int(answer.headers["x-ratelimit-remaining-tokens"]) <= 600 - used + 20
        refused = chat(url, key=made["ann"], n=5, max_tokens=300)
        assert (refused.status_code, envelope(refused)["code"]) == (400, "over_tokens_per_minute")
        assert chat(url, key=made["ann"], max_tokens=100).status_code == 200
        refused = chat(url, key=made["ann"], max_tokens=1)
        assert (refused.status_code, envelope(refused)["code"]) == (429, "rate_limit_exceeded")
        assert 1 <= int(refused.headers["retry-after"]) <= 20
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        text = httpx.get(f"{url}/metrics", headers=bearer(made["ann"])).text
        assert 'graft_rate_limited_total{key="ann",limit="requests"} 1.0' in text

    def test_a_stream_tells_its_reservation(self, serve, tmp_path):
        ring, made = make_keys(tmp_path, ann={"models": ["*"], "tokens_per_minute": 10_000})
        url, _ = serve(keys=ring)
        answer = chat(url, key=made["ann"], max_tokens=100, stream=True)
        assert 9_800 < int(answer.headers["x-ratelimit-remaining-tokens"]) < 9_950


class TestFairness:
    def test_a_rare_adapter_is_served_beside_a_busy_ones_queue(self, serve):
        url, engine = serve(max_batch=2, end_of_turn_id=None)
        go, generate, began = hold(engine), engine.generate, []

        def noted(request):
            began.append(request.variant.digest)
            return generate(request)

        engine.generate = noted
        fields = {"model": "starter", "prompt": ["a"] * 50, "max_tokens": 5, "temperature": 0}
        with ThreadPoolExecutor(3) as pool:
            sent = [pool.submit(httpx.post, f"{url}/v1/completions", json=fields, timeout=60) for _ in range(2)]
            wait_until(lambda: waiting(url) == 98)
            sent.append(pool.submit(chat, url, model="other", max_tokens=1, temperature=0))
            wait_until(lambda: waiting(url) == 99)
            go.set()
            assert [future.result().status_code for future in sent] == [200] * 3
        assert len(began) == 101
        assert [digest != began[0] for digest in began].index(True) == 3, (
            "it had to wait for two rows, not for a hundred"
        )


class TestDeadline:
    def test_before_the_first_byte_it_is_504_and_not_asked_again(self, serve):
        url, engine = serve(end_of_turn_id=None)
        hold(engine)
        answer = chat(url, headers={"x-request-timeout-s": "0.2"})
        assert (answer.status_code, envelope(answer)["code"]) == (504, "deadline_exceeded")
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=2) as client,
            pytest.raises(openai.InternalServerError),
        ):
            client.chat.completions.create(
                model="base", messages=[USER], extra_headers={"x-request-timeout-s": "0.2"}, temperature=0
            )
        assert engine.stats().running == 0
        text = httpx.get(f"{url}/metrics").text
        assert 'route="/v1/chat/completions",status="504"} 2.0' in text, "and no third time"

    def test_inside_a_stream_it_is_an_error_event(self, serve):
        url, engine = serve(token_delay_s=0.05, end_of_turn_id=None, deadline_s=2.0)
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            stream = client.chat.completions.create(model="base", messages=[USER], stream=True, temperature=0)
            assert next(stream).choices
            with pytest.raises(openai.APIError) as caught:
                list(stream)
        assert caught.value.code == "deadline_exceeded"
        wait_until(lambda: engine.stats().running == 0)
        wait_until(lambda: 'code="deadline_exceeded"' in httpx.get(f"{url}/metrics").text)

    def test_a_header_that_is_no_time_is_named(self, fake_server):
        answer = chat(fake_server, headers={"x-request-timeout-s": "soon"})
        assert (answer.status_code, envelope(answer)["param"]) == (400, "x-request-timeout-s")


class TestStall:
    def test_a_stalled_engine_is_not_ready_until_it_goes_on(self, serve):
        url, engine = serve(stall_s=0.3)
        go = hold(engine)
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(chat, url, max_tokens=1)
            wait_until(lambda: httpx.get(f"{url}/readyz").status_code == 503)
            for answer in (httpx.get(f"{url}/readyz"), chat(url)):
                assert (answer.status_code, envelope(answer)["code"]) == (503, "engine_stalled")
            assert httpx.get(f"{url}/healthz").status_code == 200
            assert "graft_engine_stalled 1.0" in httpx.get(f"{url}/metrics").text
            go.set()
            assert running.result().status_code == 200
        wait_until(lambda: httpx.get(f"{url}/readyz").status_code == 200)
        assert "graft_engine_stalled 0.0" in httpx.get(f"{url}/metrics").text


class TestTrouble:
    def test_a_server_that_stops_is_not_ready(self, serve):
        stopping = []
        url, _ = serve(stopping=lambda: bool(stopping))
        stopping.append(True)
        answer = httpx.get(f"{url}/readyz")
        assert (answer.status_code, envelope(answer)["code"]) == (503, "stopping")
        assert chat(url, max_tokens=1).status_code == 200, "what still comes is answered"

    def test_an_overfull_queue_is_429_with_retry_after(self, serve):
        url, engine = serve(max_batch=1, max_queue=1, end_of_turn_id=None)
        go = hold(engine)
        with ThreadPoolExecutor(2) as pool:
            running = [pool.submit(chat, url, temperature=0, max_tokens=2) for _ in range(2)]
            wait_until(lambda: waiting(url) == 1)
            response = chat(url, max_tokens=1)
            assert (response.status_code, envelope(response)["type"]) == (429, "rate_limit_error")
            assert 0 < int(response.headers["retry-after"]) <= 120
            go.set()
            assert [future.result().status_code for future in running] == [200, 200]

    def test_before_it_is_ready_it_is_alive_and_says_when_to_retry(self, serve, monkeypatch):
        go, start = threading.Event(), FakeEngine.start

        async def start_when_told(engine):
            await told(go)
            await start(engine)

        monkeypatch.setattr(FakeEngine, "start", start_when_told)
        url, _ = serve(wait_ready=False)
        assert httpx.get(f"{url}/healthz").status_code == 200
        for response in (httpx.get(f"{url}/readyz"), chat(url)):
            assert (response.status_code, envelope(response)["code"]) == (503, "not_ready")
            assert response.headers["retry-after"]
        assert httpx.get(f"{url}/v1/models").status_code == 200
        assert "graft_engine_ready 0.0" in httpx.get(f"{url}/metrics").text
        go.set()
        wait_until(lambda: httpx.get(f"{url}/readyz").status_code == 200)
        assert chat(url, max_tokens=1).status_code == 200

    def test_a_dead_engine_is_503_everywhere(self, serve):
        url, engine = serve()
        engine.die()
        for response in (chat(url), httpx.get(f"{url}/readyz"), httpx.get(f"{url}/healthz")):
            assert (response.status_code, envelope(response)["code"]) == (503, "engine_dead")

    def test_an_engine_that_cannot_start_is_told(self, serve, monkeypatch):
        heard = []

        async def refuse(engine, variant):
            raise AdapterRejected(f"{variant.name} has modules that the base lacks")

        monkeypatch.setattr(FakeEngine, "add", refuse)
        url, _ = serve(wait_ready=False, on_failure=heard.append)
        wait_until(lambda: bool(heard))
        assert "modules that the base lacks" in envelope(httpx.get(f"{url}/healthz"))["message"]

    @pytest.mark.parametrize("stream", [True, False])
    def test_a_death_during_a_reply_raises_in_openais_client(self, serve, stream):
        url, engine = serve(token_delay_s=0.02, end_of_turn_id=None)
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
            ThreadPoolExecutor(1) as pool,
        ):
            fields = {"model": "base", "messages": [USER], "temperature": 0, "stream": stream}

            def ask():
                reply = client.chat.completions.create(**fields)
                return list(reply) if stream else reply

            before = engine.stats().steps  # of the start's probes
            running = pool.submit(ask)
            wait_until(lambda: engine.stats().steps > before + 5)
            engine.die()
            with pytest.raises(openai.APIError) as caught:
                running.result()
        assert caught.value.code == "engine_dead"
        if stream:
            counted = 'graft_stream_errors_total{arm="",code="engine_dead",model="base"} 1.0'
            wait_until(lambda: counted in httpx.get(f"{url}/metrics").text)
        else:
            assert isinstance(caught.value, openai.InternalServerError)


class TestLogs:
    def test_no_line_quotes_a_prompt_or_a_reply(self, serve, caplog):
        """Whatever becomes of the request, and at every level."""
        said, answered = "heliotrope", "marzipan and more"
        script = tuple(make_tokenizer().encode(answered))
        url, engine = serve(script=script, token_delay_s=0.01)
        caplog.set_level(logging.DEBUG)
        message = {"role": "user", "content": said}
        fields = {"messages": [message], "temperature": 0, "max_tokens": len(script)}
        assert answered in chat(url, **fields).text
        assert "[DONE]" in chat(url, **fields, stream=True).text
        with httpx.stream("POST", f"{url}/v1/completions", json={"model": "base", "prompt": said, "stream": True}) as r:
            next(r.iter_bytes())
        for wrong in ({"top_p": said}, {said: 1}, {"messages": said}, {"messages": [{**message, "role": said}]}):
            assert chat(url, **{**fields, **wrong}).status_code == 400
        assert chat(url, **fields, model=said).status_code == 404
        assert httpx.post(f"{url}/v1/chat/completions", content=said.encode()).status_code == 400

        async def broken(request):
            raise ValueError(f"cannot run {said}")
            yield

        engine.generate = broken
        assert chat(url, **fields).status_code == 500
        # A line is written when its request has ended, which may be after its answer was read.
        own = '"path": "/v1/'
        wait_until(lambda: sum(own in record.getMessage() for record in list(caplog.records)) >= 10)
        lines = [JsonLines().format(record) for record in caplog.records if not record.name.startswith("http")]
        requests = [json.loads(line) for line in lines if own in line]
        assert {"request_id", "key", "queue_s", "model"} <= set(requests[0])
        assert any("ValueError" in line for line in lines), "the bug is logged"
        for line in lines:
            assert said not in line
            assert "marzipan" not in line


class TestMetrics:
    def test_labels_are_bounded(self, serve):
        url, _ = serve()
        for model in ("base", "starter", "nope", "starter@ffff"):
            chat(url, model=model, max_tokens=3, temperature=0)
        httpx.get(f"{url}/secret/path")
        text = httpx.get(f"{url}/metrics").text
        assert (
            'graft_requests_total{arm="stable",model="starter",route="/v1/chat/completions",status="200"} 1.0' in text
        )
        assert 'graft_requests_total{arm="",model="",route="/v1/chat/completions",status="404"} 2.0' in text
        assert 'route="unmatched",status="404"' in text
        assert "nope" not in text
        assert "secret" not in text
        assert "graft_engine_steps_total" in text

    def test_a_form_that_is_json_counts_for_its_route(self, serve):
        url, _ = serve()
        body = json.dumps({"model": "base", "messages": [USER], "max_tokens": 1})
        headers = {"content-type": "application/x-www-form-urlencoded"}
        assert httpx.post(f"{url}/v1/chat/completions", content=body, headers=headers).status_code == 200
        text = httpx.get(f"{url}/metrics").text
        assert 'graft_requests_total{arm="",model="base",route="/v1/chat/completions",status="200"} 1.0' in text
        assert "unmatched" not in text


class TestTimings:
    ROUTES = (("/v1/chat/completions", {"messages": [USER]}), ("/v1/completions", {"prompt": "a"}))

    def times(self, response) -> dict[str, float]:
        entries = [entry.split(";dur=") for entry in response.headers["server-timing"].split(", ")]
        return {name: float(value) for name, value in entries}

    def test_an_answer_says_when_it_was_taken_up_began_and_ended(self, serve):
        url, _ = serve(token_delay_s=0.02, end_of_turn_id=None)
        for route, fields in self.ROUTES:
            body = {"model": "base", "max_tokens": 8, "temperature": 0, **fields}
            times = self.times(httpx.post(url + route, json=body))
            assert list(times) == ["queue", "ttft", "total"]
            assert 0 < times["queue"] < times["ttft"] < times["total"] < 30_000
            assert times["ttft"] - times["queue"] >= 38, "a step for the prompt and one for the token"
            assert times["total"] - times["ttft"] >= 130, "seven tokens"

    def test_a_stream_says_what_it_knows_when_it_begins(self, serve):
        url, _ = serve(token_delay_s=0.02, end_of_turn_id=None)
        for route, fields in self.ROUTES:
            body = {"model": "base", "max_tokens": 4, "temperature": 0, "stream": True, **fields}
            with httpx.stream("POST", url + route, json=body) as response:
                times = self.times(response)
            assert list(times) == ["queue", "ttft"]
            assert 0 < times["queue"] < times["ttft"]

    def test_the_wait_for_a_row_is_queue(self, serve):
        url, engine = serve(token_delay_s=0.02, max_batch=1, end_of_turn_id=None)
        go = hold(engine)
        with ThreadPoolExecutor(2) as pool:
            running = pool.submit(chat, url, temperature=0, max_tokens=20)
            wait_until(lambda: engine.stats().running == 1)
            next_one = pool.submit(chat, url, temperature=0, max_tokens=1)
            wait_until(lambda: waiting(url) == 1)
            go.set()
            assert running.result().status_code == 200
            assert self.times(next_one.result())["queue"] > 400, "twenty tokens of another"

    def test_a_prompt_that_is_only_scored_has_no_first_token(self, fake_server):
        body = {"model": "base", "prompt": "the fox", "echo": True, "logprobs": 0, "max_tokens": 0}
        assert list(self.times(httpx.post(f"{fake_server}/v1/completions", json=body))) == ["queue", "total"]


class TestPlanning:
    @pytest.fixture
    def encoded(self, monkeypatch) -> list[tuple[str, str]]:
        """Thread and text of each encoding."""
        seen: list[tuple[str, str]] = []
        encode = PreTrainedTokenizerBase.encode

        def spy(tokenizer, text, *args, **options):
            seen.append((threading.current_thread().name, text))
            return encode(tokenizer, text, *args, **options)

        monkeypatch.setattr(PreTrainedTokenizerBase, "encode", spy)
        return seen

    def test_every_route_encodes_long_bodies_in_the_one_thread_that_is_not_the_event_loops(self, serve, encoded):
        url, _ = serve()
        long = b" " * INLINE_BYTES
        encoded.clear()
        routes = [
            ("/v1/chat/completions", {"messages": [USER], "max_tokens": 1}),
            ("/v1/completions", {"prompt": "a", "max_tokens": 1}),
            ("/tokenize", {"messages": [USER]}),
            ("/tokenize", {"prompt": "a"}),
        ]
        with ThreadPoolExecutor(8) as pool:
            bodies = [(path, json.dumps({"model": "base", **body}).encode() + long) for path, body in routes * 4]
            sent = [pool.submit(httpx.post, url + path, content=content) for path, content in bodies]
            assert [future.result().status_code for future in sent] == [200] * 16
        assert len(encoded) >= 16
        assert len({thread for thread, _ in encoded}) == 1
        assert encoded[0][0].startswith("planner")

    def test_what_finds_the_queue_full_is_refused_before_it_is_encoded(self, serve, encoded):
        url, engine = serve(max_batch=1, max_queue=0, end_of_turn_id=None)
        go = hold(engine)
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(chat, url, max_tokens=1)
            wait_until(lambda: engine.stats().running == 1)
            encoded.clear()
            for stream in (True, False):
                refused = chat(url, max_tokens=1, stream=stream)
                assert (refused.status_code, envelope(refused)["code"]) == (429, "overloaded")
            assert encoded == []
            go.set()
            assert running.result().status_code == 200
        assert chat(url, max_tokens=1).status_code == 200

    def test_what_can_never_run_is_refused_before_it_is_encoded(self, serve, encoded):
        url, _ = serve()
        encoded.clear()
        controls, long = "<|im_end|>" * 600, "x" * 500_000
        cases = [
            ("/v1/chat/completions", {"messages": [{**USER, "content": text}]}, "context_length_exceeded")
            for text in (controls, long)
        ]
        cases += [("/tokenize", {"messages": [{**USER, "content": controls}]}, "context_length_exceeded")]
        cases += [(path, {"prompt": long}, "context_length_exceeded") for path in ("/tokenize", "/v1/completions")]
        cases += [("/v1/completions", {"prompt": ["a"] * 100, "n": 3}, "too_many_completions")]
        for path, body, code in cases:
            response = httpx.post(url + path, json={"model": "base", **body}, timeout=30)
            assert (response.status_code, envelope(response)["code"]) == (400, code)
        assert encoded == []


def test_who_waits_for_it_hears_that_requests_can_run(tiny_base):
    registry, told = open_registry("base", tiny_base), []
    engine = FakeEngine(context_length=64, vocabulary_size=registry.base.vocabulary.size)
    app = create_app(engine=engine, registry=registry, on_ready=lambda: told.append(registry.lease("base").model.name))
    with running_server(app) as url:
        assert told == ["base"]
        assert chat(url, max_tokens=1).status_code == 200


def test_the_request_id_is_kept(fake_server):
    response = httpx.get(f"{fake_server}/healthz", headers={"x-request-id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"


def test_a_base_in_fp16_names_its_format_and_cost_wherever_it_is_asked(tiny_base):
    registry = open_registry("base", tiny_base, weights=WeightFormat.FP16)
    engine = TransformersEngine(tiny_base, max_batch=2, device="cpu", weights=registry.base.weights)
    with running_server(create_app(engine=engine, registry=registry, max_batch=2)) as url:
        model = httpx.get(f"{url}/v1/models/base", timeout=60).json()
        answer = chat(url, max_tokens=2).json()
        metrics = httpx.get(f"{url}/metrics", timeout=60).text
    assert model["weights"] == "fp16"
    cost = model["weights_cost"]["kl_nats"]
    assert cost > 0
    assert answer["system_fingerprint"].endswith(f"{registry.base.fingerprint[:12]}-fp16")
    assert f'graft_weights_kl_nats{{model="base"}} {cost}' in metrics
