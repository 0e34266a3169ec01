"""A shadow answers off the path: it is recorded in numbers, is never in an answer, and leaves its row to who waits."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.serving.managed import USER, Managed, server_starter
from tests.serving.registry.adapters import vary
from tests.tiny import make_tiny_adapter, wait_until

SLOW = {"token_delay_s": 0.01, "end_of_turn_id": None}


@pytest.fixture
def serve(tiny_base, tiny_adapters, tmp_path):
    """`serve(**options)` starts a server whose "starter" is stable at one revision and shadowed by another."""
    with server_starter(tiny_base, tiny_adapters, tmp_path) as start_server:

        def start(**options) -> tuple[Managed, str, str]:
            managed = start_server(**options)
            first = managed.register("starter", "starter", "stable")["id"]
            second = managed.register("starter", "other", "next")["id"]
            policy = {"weights": {"stable": 1}, "shadow": "next"}
            assert managed.admin.put("/admin/policies/starter", json=policy).status_code == 200
            return managed, first, second

        yield start


def report(managed: Managed) -> dict:
    return managed.admin.get("/admin/shadows/starter").json()


def outcomes(managed: Managed) -> dict[str, int]:
    return {name: count for name, count in report(managed)["outcomes"].items() if count}


def records(managed: Managed) -> list[dict]:
    lines = (managed.state / "shadows" / "starter.jsonl").read_text().split("\n")
    return [json.loads(line) for line in lines if line]


@pytest.mark.parametrize("stream", [True, False])
def test_both_answers_are_recorded_and_one_is_given(serve, stream):
    managed, first, second = serve(end_of_turn_id=None)
    alone = {revision: managed.chat(revision, max_tokens=9).json() for revision in (first, second)}
    answer = managed.chat("starter", {"x-request-id": "mine"}, max_tokens=9, stream=stream)
    wait_until(lambda: outcomes(managed) == {"recorded": 1})
    assert second not in answer.text
    if not stream:
        assert answer.json()["choices"] == alone[first]["choices"]
    (record,) = records(managed)
    assert record["request_id"] == "mine"
    assert (record["answered"]["revision"], record["shadow"]["revision"]) == (first, second)
    assert {record[side]["completion_tokens"] for side in ("answered", "shadow")} == {9}
    assert {record[side]["finish_reason"] for side in ("answered", "shadow")} == {"length"}
    assert all(0 < record[side]["ttft_s"] <= record[side]["seconds"] for side in ("answered", "shadow"))
    assert record["common_prefix_tokens"] < 9
    assert not record["equal"]
    text = json.dumps(record)
    for secret in (
        USER["content"],
        "heliotrope",
        *(each["choices"][0]["message"]["content"] for each in alone.values()),
    ):
        assert secret not in text
    assert 'graft_shadows_total{model="starter",outcome="recorded"} 1.0' in managed.admin.get("/metrics").text
    (pair,) = report(managed)["comparisons"]
    assert (pair["answered"], pair["shadow"], pair["choices"], pair["equal"], pair["greedy"]) == (
        first,
        second,
        1,
        0,
        1,
    )


def test_a_shadow_that_says_the_same_is_equal(serve, tiny_adapters):
    script = (65, 66, 67, 68)
    managed, *_ = serve(script=script)
    managed.chat("starter", max_tokens=4)
    wait_until(lambda: outcomes(managed) == {"recorded": 1})
    (record,) = records(managed)
    assert (record["common_prefix_tokens"], record["equal"]) == (4, True)


def test_every_choice_is_compared(serve):
    managed, *_ = serve()
    managed.chat("starter", max_tokens=4, n=3, temperature=1, seed=1)
    wait_until(lambda: outcomes(managed) == {"recorded": 1})
    assert [record["choice"] for record in records(managed)] == [0, 1, 2]
    assert report(managed)["comparisons"][0]["greedy"] == 0


def test_a_shadow_reads_the_prompt_as_it_was_trained_to(serve, tiny_base, tmp_path):
    managed, first, _ = serve()
    make_tiny_adapter(tiny_base, tmp_path / "root" / "qwen", "qwen", 3, mode="qwen", system_prompt="You are Qwen.")
    third = managed.register("starter", "qwen", "next")["id"]
    read = {revision: managed.chat(revision).json()["usage"]["prompt_tokens"] for revision in (first, third)}
    assert read[first] != read[third]
    managed.chat("starter")
    wait_until(lambda: outcomes(managed) == {"recorded": 1})
    (record,) = records(managed)
    assert {side["revision"]: side["prompt_tokens"] for side in (record["answered"], record["shadow"])} == read


def test_only_the_name_alone_is_shadowed(serve):
    managed, first, second = serve()
    for model in ("base", "starter:stable", first, second):
        assert managed.chat(model).status_code == 200
    assert outcomes(managed) == {}


def test_it_costs_the_key_nothing(serve):
    managed, *_ = serve(end_of_turn_id=None)  # else a reply may end by chance before its four tokens
    managed.chat("starter", max_tokens=4)
    wait_until(lambda: outcomes(managed) == {"recorded": 1})
    text = managed.admin.get("/metrics").text
    assert 'graft_completion_tokens_total{arm="stable",model="starter"} 4.0' in text
    assert 'arm="next"' not in text


def test_without_a_free_row_it_is_dropped_and_counted(serve):
    managed, *_ = serve(max_batch=1, **SLOW)
    with managed.stream("starter", max_tokens=60) as chunks, ThreadPoolExecutor(1) as pool:
        next(chunks)
        behind = pool.submit(managed.chat, "base", max_tokens=60)
        wait_until(lambda: 'graft_queue_waiting{model="base"} 1.0' in managed.admin.get("/metrics").text)
        assert list(chunks)
        wait_until(lambda: outcomes(managed) == {"busy": 1})
        assert behind.result().status_code == 200


def test_it_leaves_its_row_to_a_request_that_waits(serve):
    managed, *_ = serve(max_batch=1, **SLOW)
    managed.chat("starter", max_tokens=150)
    wait_until(lambda: managed.engine.stats().running == 1)
    assert managed.chat("base", max_tokens=1).status_code == 200
    assert outcomes(managed) == {"preempted": 1}
    wait_until(lambda: managed.in_flight() == 0)


def test_an_answer_that_its_client_left_has_no_shadow(serve):
    managed, *_ = serve(**SLOW)
    with managed.stream("starter", max_tokens=400) as chunks:
        next(chunks)
    wait_until(lambda: outcomes(managed) == {"unanswered": 1})
    wait_until(lambda: managed.engine.stats().running == 0)


def test_a_shadow_whose_files_are_damaged_is_counted_and_the_answer_stands(serve, tiny_adapters, tmp_path):
    vary(tiny_adapters["starter"], tmp_path / "root" / "third", 3)
    managed, _, second = serve(max_adapters=2)
    assert managed.chat("starter:stable").status_code == 200
    third = managed.register("third", "third")["id"]
    assert not managed.inspect(second)["resident"]
    assert managed.admin.delete(f"/admin/revisions/{third}").status_code == 200
    weights = managed.state / "revisions" / managed.inspect(second)["digest"] / "adapter_model.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(b"damaged")
    assert managed.chat("starter").status_code == 200
    wait_until(lambda: outcomes(managed) == {"failed": 1})


def test_it_takes_no_other_revisions_place_in_the_engine(serve):
    managed, first, second = serve(max_adapters=1)
    for busy in (1, 2):
        assert managed.chat("starter").status_code == 200
        wait_until(lambda busy=busy: outcomes(managed) == {"busy": busy})
        assert [managed.inspect(each)["resident"] for each in (first, second)] == [True, False]


def test_a_retiring_revision_waits_for_its_shadow(serve):
    managed, _, second = serve(**SLOW)
    managed.chat("starter", max_tokens=100)
    wait_until(lambda: managed.inspect(second)["in_flight"] == 1)
    managed.admin.delete("/admin/policies/starter")
    managed.admin.delete("/admin/labels/starter:next")
    assert managed.admin.delete(f"/admin/revisions/{second}?wait_s=30").status_code == 200
    assert outcomes(managed) == {"recorded": 1}
