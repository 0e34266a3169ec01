from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


def test_the_address_is_recorded_and_may_change(tmp_path):
    open_run(tmp_path, header(URL, samples(3)), (), samples(3))
    open_run(tmp_path, header("http://127.0.0.1:2", samples(3)), (), samples(3))
    assert read_run(tmp_path).header.url == URL


@pytest.mark.parametrize("now", ["starter@2", None])
def test_other_revisions_are_refused_by_name_with_the_remedy(tmp_path, now):
    def of(revision: str | None):
        return header(URL, samples(3)).model_copy(update={"served": {"base": "base (1)", "starter": revision}})

    open_run(tmp_path, of("starter@1"), (), samples(3))
    open_run(tmp_path, of("starter@1"), (), samples(3))
    with pytest.raises(RecordError, match=rf"starter was starter@1, is now {now or 'not told'}\); give --out another"):
        open_run(tmp_path, of(now), (), samples(3))


def test_a_header_of_before_the_revisions_is_read(tmp_path):
    open_run(tmp_path, header(URL, samples(3)), (), samples(3))
    path = tmp_path / "run.json"
    path.write_text(path.read_text().replace(',\n  "served": {}', ""))
    assert "served" not in path.read_text()
    assert read_run(tmp_path).header.served == {}


@contextmanager
def full_disk(path: Path, free: int) -> Iterator[None]:
    """Lets every file of this process grow to `free` bytes more than `path` has, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("free", [0, 10])
def test_a_record_that_does_not_fit_is_an_error_and_leaves_no_part_of_it(tmp_path, free):
    path = tmp_path / RECORDS_NAME
    with record_writer(tmp_path) as writer:
        writer.append(record("a"))
        whole = path.read_bytes()
        with full_disk(path, free), pytest.raises(RecordError, match=r"could not be written.*free space"):
            writer.append(record("b"))
        assert path.read_bytes() == whole
        writer.append(record("c"))
    assert [r.sample_id for r in read_records(path).values()] == ["a", "c"]


def test_a_directory_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match="give another --out"):
        open_run(tmp_path / "file" / "run", header(URL, samples(1)), (), samples(1))


def test_records_of_unknown_origin_are_refused(tmp_path):
    (tmp_path / RECORDS_NAME).write_text("")
    with pytest.raises(RecordError, match=r"run\.json"):
        open_run(tmp_path, header(URL, samples(3)), (), samples(3))


def test_a_directory_without_a_run_is_an_error(tmp_path):
    with pytest.raises(RecordError, match="run --out"):
        read_run(tmp_path)
