"""The disk under a run: writes that are whole and durable, and a full disk told as what it is."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from training.errors import TrainingError

_REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
_REFUSED_OR_UNREADABLE = {errno.EACCES, errno.EIO}  # of a file elsewhere, such as the base's, it is reading that failed
_SAFETENSORS_ERRNO = re.compile(r"\(os error (\d+)\)")  # it raises an error of its own, with the number in its text


class DiskError(TrainingError):
    """A write that the disk refused; says which directory, why and what to do."""


@contextmanager
def disk_failures(out: Path, remedy: str | None = None) -> Iterator[None]:
    """Raises DiskError where a write below `out` is refused: disk full, over quota, read only, broken.

    `remedy` says what stays as it is and what to do; None: that of a training run in `out`.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _errno(error)
        name = (number in _REFUSED and getattr(error, "filename2", None)) or getattr(error, "filename", None)
        elsewhere = name is not None and not Path(os.fsdecode(name)).is_relative_to(out)
        if number not in _REFUSED and (number not in _REFUSED_OR_UNREADABLE or elsewhere):
            raise
        resume = (
            f"Whole checkpoints in {out / 'checkpoints'} stay as they are: free some space or mend the disk, then go "
            "on with --resume"
        )
        raise DiskError(f"cannot write {name or out}: {os.strerror(number)}. {remedy or resume}") from error


def free_space(path: Path) -> int:
    """Returns the bytes that can be written to the disk that holds `path`, which need not be there yet."""
    return shutil.disk_usage(next(folder for folder in (path, *path.absolute().parents) if folder.exists())).free


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that must not exist yet, and has the disk hold it. Raises OSError."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Has the disk hold what was written to a file or directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _errno(error: OSError | SafetensorError) -> int:
    if isinstance(error, OSError):
        return error.errno or 0
    found = _SAFETENSORS_ERRNO.search(str(error))
    return int(found[1]) if found else 0
