"""Each request is answered by the revision it began with, which is held exactly as long, and the answer says so."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from tests.serving.managed import USER, Managed, client, managed_server, server_starter
from tests.tiny import wait_until

SLOW = {"token_delay_s": 0.01, "end_of_turn_id": None}


@pytest.fixture
def serve(tiny_base, tiny_adapters, tmp_path):
    """`serve(**options)` starts a server whose "starter" is stable at one revision; "other" is below the root too."""
    with server_starter(tiny_base, tiny_adapters, tmp_path) as start_server:

        def start(**options) -> tuple[Managed, str, str]:
            managed = start_server(**options)
            first = managed.register("starter", "starter", "stable")["digest"]
            second = managed.register("starter", "other", "canary")["digest"]
            return managed, first, second

        yield start


@pytest.fixture(scope="module")
def only_one(tiny_base, tiny_adapters, tmp_path_factory):
    with managed_server(tiny_base, tiny_adapters, tmp_path_factory.mktemp("respond"), end_of_turn_id=None) as managed:
        first = managed.register("starter", "starter", "stable")["digest"]
        second = managed.register("starter", "other", "canary")["digest"]
        yield managed, first, second


@pytest.fixture
def shared(only_one):
    """One server for all tests that leave it as it was, but for the policy; two revisions' digests too."""
    yield only_one
    only_one[0].admin.delete("/admin/policies/starter")


def of(digest: str) -> str:
    return f"starter@{digest[:12]}"


class TestTheRevisionItBeganWith:
    def test_a_promotion_leaves_a_running_stream_and_takes_the_next_request(self, serve):
        managed, first, second = serve(**SLOW)
        alone = managed.chat("starter", max_tokens=60).json()["choices"][0]["message"]["content"]
        with managed.stream("starter", max_tokens=60) as chunks:
            chunk = next(chunks)
            assert managed.promote("starter:stable", second).status_code == 200
            assert managed.chat("starter", max_tokens=1).json()["model"] == of(second)
            rest = [chunk, *chunks]
        assert {chunk["model"] for chunk in rest} == {of(first)}
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in rest) == alone
        assert rest[-1]["choices"][0]["finish_reason"] == "length"

    def test_a_retirement_waits_for_a_running_stream_and_does_not_cut_it(self, serve):
        managed, first, second = serve(**SLOW)
        managed.promote("starter:stable", second)
        with managed.stream(of(first), max_tokens=80) as chunks:
            next(chunks)
            response = managed.admin.delete(f"/admin/revisions/{of(first)}?wait_s=0.05")
            assert (response.status_code, response.json()["status"]) == (202, "retiring")
            assert response.json()["in_flight"] == 1
            assert managed.chat(of(first)).status_code == 404, "it takes no new request"
            assert list(chunks)[-1]["choices"][0]["finish_reason"] == "length"
        response = managed.admin.delete(f"/admin/revisions/{of(first)}?wait_s=20")
        assert (response.status_code, response.json()["status"]) == (200, "retired")
        assert not response.json()["resident"]


class TestRelease:
    def test_every_way_to_end_gives_the_revision_back(self, serve):
        managed, *_ = serve()
        ways = [
            (200, {}),
            (200, {"n": 3}),
            (400, {"max_tokens": 9999}),
            (400, {"n": 16, "max_tokens": 1, "temperature": 3}),
        ]
        for status, fields in ways:
            assert managed.chat("starter", **fields).status_code == status
            assert managed.in_flight() == 0
        with managed.stream("starter", max_tokens=5) as chunks:
            assert list(chunks)
        wait_until(lambda: managed.in_flight() == 0)

    def test_a_client_that_leaves_the_stream_gives_it_back(self, serve):
        managed, first, _ = serve(**SLOW)
        with managed.stream("starter", max_tokens=400) as chunks:
            next(chunks)
            assert managed.inspect(of(first))["in_flight"] == 1
        wait_until(lambda: managed.in_flight() == 0)
        assert managed.engine.stats().running == 0

    @pytest.mark.parametrize("stream", [True, False])
    def test_a_client_that_leaves_before_the_answer_gives_it_back(self, serve, stream):
        managed, _, _ = serve(max_batch=1, **SLOW)
        with managed.stream("base", max_tokens=400) as chunks:
            next(chunks)
            body = {"model": "starter", "messages": [USER], "stream": stream}
            with pytest.raises(httpx.ReadTimeout):
                managed.user.post("/v1/chat/completions", json=body, timeout=0.3)
            wait_until(lambda: managed.in_flight() == 0)
            assert next(chunks)

    @pytest.mark.parametrize("stream", [True, False])
    def test_an_engine_that_dies_gives_it_back(self, serve, stream):
        managed, _, _ = serve(**SLOW)
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(managed.chat, "starter", max_tokens=400, stream=stream)
            wait_until(lambda: managed.in_flight() == 1)
            wait_until(lambda: managed.engine.stats().running == 1)
            managed.engine.die()
            assert "engine_dead" in running.result().text
        assert managed.in_flight() == 0


class TestRouting:
    def arms(self, managed: Managed, requests: list[dict]) -> list[str]:
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda fields: managed.chat("starter", max_tokens=1, **fields), requests))
        for answer in answers:
            assert answer.status_code == 200
            assert answer.headers["x-adapter-revision"] == answer.json()["model"]
        return [answer.headers["x-adapter-label"] for answer in answers]

    def test_a_canary_gets_its_share(self, serve):
        managed, first, second = serve(end_of_turn_id=None)
        managed.admin.put("/admin/policies/starter", json={"weights": {"stable": 90, "canary": 10}})
        counts = Counter(self.arms(managed, [{}] * 400))
        # 40 expected, standard deviation 6: beyond 13 and 67 lies one run in 100,000.
        assert 13 <= counts["canary"] <= 67
        assert counts["stable"] == 400 - counts["canary"]
        text = managed.admin.get("/metrics").text
        for arm, count in counts.items():
            labels = f'{{arm="{arm}",model="starter",route="/v1/chat/completions",status="200"}}'
            assert f"graft_requests_total{labels} {float(count)}" in text
            assert f'graft_completion_tokens_total{{arm="{arm}",model="starter"}} {float(count)}' in text
            for family in ("ttft", "e2e", "queue"):
                assert f'graft_{family}_seconds_count{{arm="{arm}",model="starter"}} {float(count)}' in text
        assert first[:12] not in text, "revisions are no labels: they are without bound"
        assert second[:12] not in text

    @pytest.mark.parametrize("how", ["user", "safety_identifier", "prompt_cache_key", "header"])
    def test_a_routing_key_stays_on_its_arm(self, shared, how):
        managed, *_ = shared
        policy = {"weights": {"stable": 50, "canary": 50}, "sticky": True}
        managed.admin.put("/admin/policies/starter", json=policy)
        keys = [f"user-{number}" for number in range(30)]

        def fields(key):
            return {"headers": {"x-routing-key": key}} if how == "header" else {how: key}

        first, again = (self.arms(managed, [fields(key) for key in keys]) for _ in range(2))
        assert first == again
        assert set(first) == {"stable", "canary"}

    def test_the_body_goes_before_the_header(self, shared):
        managed, *_ = shared
        policy = {"weights": {"stable": 50, "canary": 50}, "sticky": True}
        managed.admin.put("/admin/policies/starter", json=policy)
        arms = self.arms(managed, [{"user": "ann", "headers": {"x-routing-key": str(n)}} for n in range(30)])
        assert len(set(arms)) == 1

    def test_an_exact_revision_has_no_arm(self, shared):
        managed, first, _ = shared
        managed.admin.put("/admin/policies/starter", json={"weights": {"canary": 1}})
        answer = managed.chat(of(first))
        assert answer.json()["model"] == of(first)
        assert "x-adapter-label" not in answer.headers
        assert managed.chat("starter:stable").headers["x-adapter-label"] == "stable"
        assert managed.chat("starter").headers["x-adapter-label"] == "canary"


class TestProvenance:
    @pytest.mark.parametrize("stream", [True, False])
    def test_an_answer_names_its_weights_and_times(self, shared, stream):
        managed, first, _ = shared
        answer = managed.chat("starter", {"x-request-id": "mine"}, stream=stream)
        assert answer.headers["x-request-id"] == "mine"
        assert answer.headers["x-adapter-revision"] == of(first)
        assert answer.headers["x-adapter-label"] == "stable"
        times = {entry.split(";")[0] for entry in answer.headers["server-timing"].split(", ")}
        assert times == {"queue", "ttft"} | (set() if stream else {"total"})
        if not stream:
            assert answer.json()["system_fingerprint"].endswith(first[:12])
        base = managed.chat("base")
        assert not {"x-adapter-revision", "x-adapter-label"} & set(base.headers)


class TestKeys:
    def test_a_key_uses_its_models_only(self, serve):
        managed, *_ = serve()
        managed.register("other", "other", "stable")
        with client(managed.url, managed.bob_key) as bob:
            for route, body in (
                ("/v1/chat/completions", {"messages": [USER]}),
                ("/v1/completions", {"prompt": "a"}),
                ("/tokenize", {"prompt": "a"}),
            ):
                assert bob.post(route, json={"model": "other", **body}).status_code == 200
                for model in ("starter", "starter:canary", "starter@00", "base", "nothing"):
                    response = bob.post(route, json={"model": model, **body})
                    assert (response.status_code, response.json()["error"]["code"]) == (403, "model_not_allowed")
            unknown = bob.get("/v1/models/other:nothing")
            assert unknown.status_code == 404
            assert "starter" not in unknown.text
            assert [model["id"] for model in bob.get("/v1/models").json()["data"]] == ["other"]
            assert bob.get("/v1/models/other").status_code == 200
            assert bob.get("/v1/models/starter").status_code == 403
        assert managed.in_flight() == 0


def test_openais_client_asks_for_names_labels_and_revisions(shared):
    managed, first, second = shared
    with openai.OpenAI(base_url=f"{managed.url}/v1", api_key=managed.user_key, max_retries=0) as sdk:
        revisions = {"starter": of(first), "starter:canary": of(second), of(second): of(second)}
        texts = {}
        for model, revision in revisions.items():
            fields = {"model": model, "messages": [USER], "temperature": 0, "max_tokens": 12}
            reply = sdk.chat.completions.create(**fields)
            assert reply.model == revision
            chunks = list(sdk.chat.completions.create(**fields, stream=True))
            assert {chunk.model for chunk in chunks} == {revision}
            texts[model] = reply.choices[0].message.content
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == texts[model]
            assert sdk.completions.create(model=model, prompt="a", max_tokens=1).model == revision
            found = sdk.models.retrieve(model)
            assert (found.id, found.revision) == (model, revision)
        assert texts["starter"] != texts["starter:canary"] == texts[of(second)]
        listed = {model.id: model for model in sdk.models.list()}
        assert list(listed) == ["base", "starter"]
        assert listed["starter"].labels == {"stable": of(first), "canary": of(second)}
        assert listed["base"].labels == {}
        with pytest.raises(openai.NotFoundError):
            sdk.chat.completions.create(model="starter:nothing", messages=[USER])
