"""The disk: refused writes are told with their cause and remedy, other errors stay what they are."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from training.disk import DiskError, disk_failures, free_space, write_whole

WRITERS: dict[str, Callable[[Path], object]] = {
    "ours": lambda path: write_whole(path, b"0" * 2000),
    "safetensors": lambda path: save_file({"x": torch.zeros(2000)}, path),
}


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Lets no file of this process grow beyond `size` bytes; Python has the signal ignored, so a write fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("writer", WRITERS)
def test_a_refused_write_says_where_why_and_what_to_do(tmp_path: Path, writer: str):
    with pytest.raises(DiskError) as refusal, disk_failures(tmp_path), file_size_limit(1000):
        WRITERS[writer](tmp_path / "x")
    for part in (str(tmp_path), "File too large", "checkpoints", "--resume"):
        assert part in str(refusal.value)


def test_a_full_disk_is_named(tmp_path: Path):
    """/dev/full is a real device whose every write fails for lack of space."""
    with pytest.raises(DiskError, match="No space left on device"), disk_failures(tmp_path):
        Path("/dev/full").write_bytes(b"x")


def test_of_a_copy_the_file_that_was_written_is_named(tmp_path: Path):
    (tmp_path / "source").write_bytes(b"0" * 2000)
    with pytest.raises(DiskError) as refusal, disk_failures(tmp_path, "Do this."), file_size_limit(1000):
        shutil.copyfile(tmp_path / "source", tmp_path / "copy")
    assert str(refusal.value) == f"cannot write {tmp_path / 'copy'}: File too large. Do this."


def test_free_space_is_that_of_the_disk_below_the_nearest_folder(tmp_path: Path):
    found = free_space(tmp_path / "not" / "there")
    assert 0 < found <= shutil.disk_usage(tmp_path).total
    assert free_space(Path("/proc/self")) == 0


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)),
        PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/data/rows.jsonl"),  # read, not written
        ValueError("no"),
    ],
)
def test_other_errors_stay_what_they_are(tmp_path: Path, error: Exception):
    with pytest.raises(type(error)), disk_failures(tmp_path):
        raise error


def test_a_run_directory_that_may_not_be_written_is_named(tmp_path: Path):
    with pytest.raises(DiskError, match=r"cannot write .*train_log\.jsonl: Permission denied"), disk_failures(tmp_path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / "train_log.jsonl"))


def test_a_whole_write_replaces_nothing(tmp_path: Path):
    write_whole(tmp_path / "x", b"first")
    with pytest.raises(FileExistsError):
        write_whole(tmp_path / "x", b"second")
    assert (tmp_path / "x").read_bytes() == b"first"
