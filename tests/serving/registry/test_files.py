"""An adapter's files are taken whole, once, and never changed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys

import pytest

from serving.engine.engine import Variant, VariantKind
from serving.errors import AdapterRejected
from serving.registry.files import RevisionFiles, structure_problems
from tests.serving.registry.adapters import change_manifest, digest_of, vary
from training.artifact import ADAPTER_WEIGHTS, ArtifactError, hash_files, verify_adapter


@pytest.fixture
def files(tmp_path):
    return RevisionFiles(tmp_path / "revisions")


@pytest.fixture
def source(tiny_adapters, tmp_path):
    return shutil.copytree(tiny_adapters["starter"], tmp_path / "source")


def names(files):
    return sorted(path.name for path in files._root.iterdir())


def test_retraining_in_place_leaves_the_taken_revision_as_it_was(files, source, tmp_path):
    digest = files.take(source, verify_adapter).digest
    before = hash_files(files.path(digest))
    shutil.rmtree(source)
    vary(files.path(digest), source, 7)
    second = files.take(source, verify_adapter).digest
    assert digest != second
    assert names(files) == sorted([digest, second])
    assert hash_files(files.path(digest)) == before
    assert verify_adapter(files.path(digest)).digest == digest


def test_taking_again_changes_nothing_and_heals_what_was_damaged(files, source):
    digest = files.take(source, verify_adapter).digest
    weights = files.path(digest) / ADAPTER_WEIGHTS
    inode = weights.stat().st_ino
    files.take(source, verify_adapter)
    assert weights.stat().st_ino == inode
    weights.unlink()
    weights.write_bytes(b"damaged")
    variant = Variant("a", VariantKind.ADAPTER, digest, files.path(digest))
    with pytest.raises(AdapterRejected, match="changed since training"):
        files.verify(variant)
    files.take(source, verify_adapter)
    files.verify(variant)
    assert names(files) == [digest]


def test_another_manifest_under_a_fixed_digest_is_refused(files, source):
    """The digest covers the files alone; the manifest says how prompts are rendered."""
    digest = files.take(source, verify_adapter).digest
    change_manifest(source, "chat", stop_token_ids=(1, 2))
    assert digest_of(source) == digest
    with pytest.raises(ArtifactError, match="base, chat or lora differ"):
        files.take(source, verify_adapter, {digest})
    assert verify_adapter(files.path(digest)).chat != verify_adapter(source).chat
    files.take(source, verify_adapter)  # nobody answers by it, so a manifest that changed on the disk heals
    assert verify_adapter(files.path(digest)).chat == verify_adapter(source).chat
    assert names(files) == [digest]


def link_the_weights(source, outside):
    shutil.move(source / ADAPTER_WEIGHTS, outside)
    (source / ADAPTER_WEIGHTS).symlink_to(outside)


def link_the_directory(source, outside):
    source.rename(outside)
    source.symlink_to(outside)


def lay_a_pipe(source, outside):
    (source / ADAPTER_WEIGHTS).unlink()
    os.mkfifo(source / ADAPTER_WEIGHTS)


@pytest.mark.parametrize("swap", [link_the_weights, link_the_directory, lay_a_pipe])
def test_what_is_swapped_between_the_look_and_the_copy_is_refused(files, source, tmp_path, monkeypatch, swap):
    """The same bytes elsewhere, so that only where they lie can tell."""

    def look(directory):
        problems = structure_problems(directory)
        swap(directory, tmp_path / "outside")
        return problems

    monkeypatch.setattr("serving.registry.files.structure_problems", look)
    with pytest.raises(ArtifactError, match="was replaced while it was copied"):
        files.take(source, verify_adapter)
    assert names(files) == []


def test_what_is_refused_leaves_nothing(files, source):
    (source / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError):
        files.take(source, verify_adapter)
    with pytest.raises(ArtifactError, match="is no directory"):
        files.take(source / "nowhere", verify_adapter)
    assert names(files) == []


def test_removing_and_sweeping_leave_what_is_kept(files, source, tmp_path):
    digest = files.take(source, verify_adapter).digest
    second = files.take(vary(source, tmp_path / "second", 3), verify_adapter).digest
    files.remove(digest)
    files.remove(digest)
    assert names(files) == [second]
    (files._root / "0123.tmp").mkdir()
    shutil.copytree(source, files._root / digest)  # its row was never written
    assert files.sweep([second]) == sorted(["0123.tmp", digest])
    assert names(files) == [second]


KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from serving.registry import files as module
from training.artifact import verify_adapter

point, root, source = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
die = lambda *arguments, **others: os.kill(os.getpid(), signal.SIGKILL)
files = module.RevisionFiles(root)
if point == "copy":
    real, calls = shutil.copyfileobj, []
    shutil.copyfileobj = lambda *each: die() if len(calls) == 2 else (calls.append(1), real(*each))
if point == "rename":
    Path.rename = die
if point == "remove":
    digest = files.take(source, verify_adapter).digest
    shutil.rmtree = lambda path, **_: [(os.unlink(each), die()) for each in Path(path).glob("*.safetensors")]
    files.remove(digest)
files.take(source, die if point == "inspect" else verify_adapter)
"""


@pytest.mark.parametrize("point", ["copy", "inspect", "rename", "remove"])
def test_a_process_killed_while_it_copies_or_removes_leaves_only_what_a_sweep_takes(files, source, point):
    died = subprocess.run([sys.executable, "-c", KILLED, point, str(files._root), str(source)], check=False)
    assert died.returncode == -signal.SIGKILL
    left = names(files)
    assert len(left) == 1
    assert left[0].endswith(".tmp")
    assert files.sweep([]) == left
    files.take(source, verify_adapter)
