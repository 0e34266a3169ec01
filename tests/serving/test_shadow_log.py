"""Records survive, rotate and fold to one comparison a pair of revisions."""

from __future__ import annotations

import pytest

from serving.shadow_log import ShadowLog, ShadowRecord, ShadowSide, common_prefix


def side(revision: str, tokens: int, *, ttft_s: float | None = 0.1, seconds: float = 1.0) -> ShadowSide:
    return ShadowSide(
        revision=revision,
        prompt_tokens=5,
        completion_tokens=tokens,
        finish_reason="stop" if tokens < 9 else "length",
        ttft_s=ttft_s,
        seconds=seconds,
    )


def record(answered: ShadowSide, shadow: ShadowSide, *, temperature: float = 0.0, shared: int = 3) -> ShadowRecord:
    return ShadowRecord(
        time="2026-01-01T00:00:00Z",
        request_id="req-1",
        choice=0,
        temperature=temperature,
        answered=answered,
        shadow=shadow,
        common_prefix_tokens=shared,
        equal=shared == answered.completion_tokens == shadow.completion_tokens,
    )


def test_a_comparison_folds_the_records_of_a_pair(tmp_path):
    log = ShadowLog(tmp_path)
    log.append("a/b", [record(side("a/b@1", 3), side("a/b@2", 3))])
    log.append("a/b", [record(side("a/b@1", 5, ttft_s=None), side("a/b@2", 9, seconds=3.0), temperature=1.0)])
    log.append("a/b", [record(side("a/b@1", 4), side("a/b@3", 4), shared=0)])
    first, second = log.compare("a/b")
    assert (first.answered, first.shadow, second.shadow) == ("a/b@1", "a/b@2", "a/b@3")
    assert (first.choices, first.equal, first.greedy, first.greedy_equal) == (2, 1, 1, 1)
    assert (first.mean_answered_tokens, first.mean_shadow_tokens, first.mean_shadow_s) == (4, 6, 2.0)
    assert first.mean_answered_ttft_s == pytest.approx(0.1), "no token has no first"
    assert first.finish_reasons == {"stop/stop": 1, "stop/length": 1}
    assert log.compare("a") == []


def test_a_log_is_bounded_and_keeps_the_newest(tmp_path):
    log = ShadowLog(tmp_path, max_bytes=2000)
    for number in range(100):
        log.append("a", [record(side("a@1", number), side("a@2", number))])
    assert len(list(tmp_path.iterdir())) == 2
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 4000
    kept = [each.answered.completion_tokens for each in log.records("a")]
    assert kept == list(range(kept[0], 100))
    assert len(kept) >= 5


def test_a_torn_line_costs_one_record(tmp_path, caplog):
    log = ShadowLog(tmp_path)
    log.append("a", [record(side("a@1", 3), side("a@2", 3))])
    path = next(tmp_path.iterdir())
    path.write_text(path.read_text() + path.read_text()[:-20])
    log.append("a", [record(side("a@1", 4), side("a@2", 4))])
    assert [each.answered.completion_tokens for each in log.records("a")] == [3, 4]
    assert "no record" in caplog.text


def test_the_file_of_a_name_lies_in_the_directory(tmp_path):
    ShadowLog(tmp_path / "in").append("a/../../b", [record(side("a@1", 3), side("a@2", 3))])
    assert [path.name for path in tmp_path.rglob("*.jsonl")] == ["a~..~..~b.jsonl"]


def test_names_that_end_like_a_file_have_logs_of_their_own(tmp_path):
    log, names = ShadowLog(tmp_path, max_bytes=1), ("a", "a.1", "a.jsonl", "a.jsonl.1")
    for name in names * 2:
        log.append(name, [record(side(f"{name}@1", 3), side(f"{name}@2", 3))])
    for name in names:
        assert [each.answered.revision for each in log.records(name)] == [f"{name}@1"] * 2


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [([], [], 0), ([1], [], 0), ([1, 2], [1, 2], 2), ([1, 2, 3], [1, 9, 3], 1), ([1], [1, 2], 1)],
)
def test_the_common_prefix_is_counted_in_tokens(first, second, shared):
    assert common_prefix(first, second) == shared
