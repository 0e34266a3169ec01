"""The revisions' files: each adapter once, below its digest, copied whole and never changed."""

from __future__ import annotations

import os
import shutil
import stat
import uuid
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path

from serving.engine.engine import Variant
from serving.errors import AdapterRejected
from serving.registry.revision import DIGEST_CHARACTERS
from training.artifact import MANIFEST_NAME, AdapterManifest, ArtifactError, read_manifest, verify_adapter

REVISIONS = "revisions"  # below the state directory; each start removes what a process that died left there
_TEMPORARY = ".tmp"


class RevisionFiles:
    """`root` holds a directory for each digest; what is in one does not change until `remove`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(parents=True, exist_ok=True)

    def path(self, digest: str) -> Path:
        return self._root / digest

    def take(
        self, source: Path, inspect: Callable[[Path], AdapterManifest], fixed: Container[str] = ()
    ) -> AdapterManifest:
        """Copies an adapter in and returns its manifest; raises ArtifactError with all faults.

        The copy is what is inspected, so the source, a real path, may change meanwhile. A whole copy that is there
        already stays, unless its manifest is another and its digest is not among the `fixed`.
        """
        if problems := structure_problems(source):
            raise ArtifactError(source, problems)
        temporary = self._root / f"{uuid.uuid4().hex}{_TEMPORARY}"
        try:
            _copy(source, temporary)
            manifest = inspect(temporary)
            self._keep(temporary, self.path(manifest.digest), manifest.digest in fixed)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return manifest

    def verify(self, variant: Variant) -> None:
        """Raises AdapterRejected where the files of a variant are not those that were taken."""
        try:
            verify_adapter(variant.path)
        except (ArtifactError, OSError) as error:
            raise AdapterRejected(f"its stored files changed: {error}") from error

    def remove(self, digest: str) -> None:
        """Renames first, so that a process that dies here leaves no half of a revision under its name."""
        temporary = self._root / f"{digest}{_TEMPORARY}"
        if self.path(digest).exists():
            shutil.rmtree(temporary, ignore_errors=True)
            self.path(digest).rename(temporary)
            shutil.rmtree(temporary)

    def sweep(self, kept: Iterable[str]) -> list[str]:
        """Removes what a process that died left behind; returns the names."""
        left = {path.name for path in self._root.iterdir()} - set(kept)
        for name in left:
            shutil.rmtree(self._root / name)
        return sorted(left)

    def _keep(self, temporary: Path, target: Path, is_fixed: bool) -> None:
        """The digest does not cover the manifest, so one that would change prompts under the same digest is refused."""
        try:
            stored = verify_adapter(target)
        except (ArtifactError, OSError):  # absent, or damaged: then this heals it
            pass
        else:
            given = read_manifest(temporary)
            if (given.base, given.chat, given.lora) == (stored.base, stored.chat, stored.lora):
                return
            if is_fixed:
                revision = stored.digest[:DIGEST_CHARACTERS]
                raise ArtifactError(
                    temporary,
                    [f"{MANIFEST_NAME}: base, chat or lora differ from the manifest that revision {revision} has"],
                )
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        _sync(self._root)


def structure_problems(directory: Path) -> list[str]:
    """Returns what must not even be read: links that leave the directory, pipes, devices, sockets."""
    if not directory.is_dir():
        return ["is no directory; give the one that the training wrote"]
    inside = directory.resolve()
    problems = []
    for path in _walk(directory):
        name = path.relative_to(directory).as_posix()
        if path.is_symlink() and not path.resolve().is_relative_to(inside):
            problems.append(f"{name}: a link that leaves the adapter; put the file itself there")
        elif path.is_symlink() and not path.is_file():
            problems.append(f"{name}: a link to no file; put the file itself there")
        elif not path.is_symlink() and not stat.S_ISREG(path.lstat().st_mode):
            problems.append(f"{name}: neither a file nor a directory; remove it")
    return problems


def _walk(directory: Path) -> Iterator[Path]:
    """Yields all that is no directory, following no link."""
    for path in sorted(directory.iterdir()):
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)
        else:
            yield path


def _copy(source: Path, target: Path) -> None:
    target.mkdir()
    for path in _walk(source):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        _copy_file(path, copy, source)
    for directory in {target, *(path.parent for path in _walk(target))}:
        _sync(directory)


def _copy_file(path: Path, copy: Path, inside: Path) -> None:
    """Judges what it has opened: since `structure_problems`, a name may have become a link that leaves, or a pipe."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        real = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if not (stat.S_ISREG(os.fstat(descriptor).st_mode) and real.is_relative_to(inside)):
            name = path.relative_to(inside).as_posix()
            raise ArtifactError(inside, [f"{name}: was replaced while it was copied; register what does not change"])
        with open(descriptor, "rb", closefd=False) as source, copy.open("xb") as target:
            shutil.copyfileobj(source, target)
    finally:
        os.close(descriptor)
    copy.chmod(0o444)
    _sync(copy)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
