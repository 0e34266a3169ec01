from __future__ import annotations

import pytest

from evalharness.errors import RecordError
from evalharness.records import (
    RECORDS_NAME,
    Record,
    RecordKind,
    SampleStatus,
    SamplingSettings,
    open_run,
    read_records,
    read_run,
    record_writer,
)
from tests.evalharness.endpoint import header, samples

URL = "http://127.0.0.1:1"


def record(sample_id: str, status: SampleStatus = SampleStatus.OK) -> Record:
    return Record(kind=RecordKind.HELD_OUT, sample_id=sample_id, arm="base", status=status, completion="text\u2028中")


def test_what_is_appended_is_read_back(tmp_path):
    with record_writer(tmp_path) as writer:
        writer.append(record("a"))
        writer.append(record("b"))
    assert list(read_records(tmp_path / RECORDS_NAME).values()) == [record("a"), record("b")]


def test_a_record_is_on_disk_before_the_next_is_asked(tmp_path):
    with record_writer(tmp_path) as writer:
        writer.append(record("a"))
        assert len(read_records(tmp_path / RECORDS_NAME)) == 1


@pytest.mark.parametrize("cut", [1, 2, 20])
def test_a_torn_last_line_is_left_out_and_overwritten(tmp_path, cut):
    with record_writer(tmp_path) as writer:
        writer.append(record("a"))
        writer.append(record("b"))
    path = tmp_path / RECORDS_NAME
    path.write_bytes(path.read_bytes()[:-cut])
    assert [r.sample_id for r in read_records(path).values()] == ["a"]
    with record_writer(tmp_path) as writer:
        writer.append(record("c"))
    assert [r.sample_id for r in read_records(path).values()] == ["a", "c"]


def test_the_last_record_of_a_key_counts(tmp_path):
    with record_writer(tmp_path) as writer:
        writer.append(record("a", SampleStatus.TIMEOUT))
        writer.append(record("a"))
    (found,) = read_records(tmp_path / RECORDS_NAME).values()
    assert found.status is SampleStatus.OK


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    (tmp_path / RECORDS_NAME).write_text("{}\n" + record("a").model_dump_json() + "\n")
    with pytest.raises(RecordError, match="line 1"):
        read_records(tmp_path / RECORDS_NAME)


def test_two_runs_cannot_write_at_once(tmp_path):
    with record_writer(tmp_path), pytest.raises(RecordError, match="another run"), record_writer(tmp_path):
        pass


def test_a_run_keeps_its_samples(tmp_path):
    held_out, prompts = samples(3), (samples(1)[0].model_copy(update={"reference": None}),)
    open_run(tmp_path / "run", header(URL, held_out), prompts, held_out)
    data = read_run(tmp_path / "run")
    assert (data.header, data.prompts, data.held_out) == (header(URL, held_out), prompts, held_out)
    assert data.records == {}


@pytest.mark.parametrize(
    "change",
    [
        {"url": "http://127.0.0.1:2"},
        {"arms": ("base", "other")},
        {"data_sha256": "0"},
        {"limit": 2},
        {"sampling": SamplingSettings(max_tokens=1)},
    ],
)
def test_other_inputs_are_refused_by_name(tmp_path, change):
    open_run(tmp_path, header(URL, samples(3)), (), samples(3))
    open_run(tmp_path, header(URL, samples(3)), (), samples(3))
    with pytest.raises(RecordError, match=next(iter(change))):
        open_run(tmp_path, header(URL, samples(3)).model_copy(update=change), (), samples(3))


def test_records_of_unknown_origin_are_refused(tmp_path):
    (tmp_path / RECORDS_NAME).write_text("")
    with pytest.raises(RecordError, match=r"run\.json"):
        open_run(tmp_path, header(URL, samples(3)), (), samples(3))


def test_a_directory_without_a_run_is_an_error(tmp_path):
    with pytest.raises(RecordError, match="run --out"):
        read_run(tmp_path)
