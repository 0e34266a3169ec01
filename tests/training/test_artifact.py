"""Properties of the adapter directory's contract: whole or refused, and every fault by name."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from training.artifact import (
    MANIFEST_NAME,
    REQUIRED_FILES,
    AdapterManifest,
    ArtifactError,
    BaseSection,
    ChatSection,
    DataSection,
    LoraSection,
    LossSection,
    base_problems,
    fingerprint_base,
    hash_files,
    read_manifest,
    verify_adapter,
    write_manifest,
)


def manifest_of(files: dict[str, str]) -> AdapterManifest:
    return AdapterManifest(
        name="starter",
        created=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        base=BaseSection(model="tiny", revision=None, fingerprint="f" * 64),
        chat=ChatSection(
            mode="model", template_sha256="a" * 64, default_system_prompt="你好 {x}\n", stop_token_ids=(2, 7)
        ),
        quantisation="nf4-double",
        compute_dtype="float32",
        lora=LoraSection(rank=8, alpha=16.0, dropout=0.05, target_modules=("q_proj", "v_proj")),
        data=DataSection(
            dataset="starter",
            sha256="d" * 64,
            rows_train=380,
            rows_held_out=100,
            rows_rejected=0,
            tokens_lost=0,
            split_rule="rule",
        ),
        recipe={"lora": {"rank": 8}},
        seed=42,
        versions={"torch": "2.13.0"},
        git_revision=None,
        loss=LossSection(
            steps=3,
            first_nll_nats=2.5,
            last_nll_nats=1.5,
            validation_first_nll_nats=None,
            validation_last_nll_nats=None,
        ),
        files=files,
    )


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    directory = tmp_path / "adapter"
    (directory / "extra").mkdir(parents=True)
    for name in (*REQUIRED_FILES, "extra/notes.txt"):
        (directory / name).write_text(f"content of {name}")
    write_manifest(directory, manifest_of(hash_files(directory)))
    return directory


def problems_of(directory: Path) -> tuple[str, ...]:
    with pytest.raises(ArtifactError) as caught:
        verify_adapter(directory)
    assert str(directory) in str(caught.value)
    assert caught.value.problems
    return caught.value.problems


def test_a_manifest_survives_writing_and_reading(adapter: Path):
    assert verify_adapter(adapter) == manifest_of(hash_files(adapter))
    assert not list(adapter.glob("*.tmp"))


@pytest.mark.parametrize("name", [*REQUIRED_FILES, "extra/notes.txt"])
def test_a_changed_file_is_named(adapter: Path, name: str):
    path = adapter / name
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    (problem,) = problems_of(adapter)
    assert problem.startswith(f"{name}: changed")


@pytest.mark.parametrize("name", [*REQUIRED_FILES, "extra/notes.txt"])
def test_a_missing_file_is_named(adapter: Path, name: str):
    (adapter / name).unlink()
    assert problems_of(adapter) == (f"{name}: missing",)


def test_an_added_file_is_named(adapter: Path):
    (adapter / "special_tokens_map.json").write_text("{}")
    (problem,) = problems_of(adapter)
    assert problem.startswith("special_tokens_map.json: added")


def test_every_fault_is_named_at_once(adapter: Path):
    (adapter / REQUIRED_FILES[0]).unlink()
    (adapter / REQUIRED_FILES[1]).write_text("other")
    (adapter / "new").write_text("")
    assert [problem.split(":")[0] for problem in problems_of(adapter)] == [*sorted(REQUIRED_FILES[:2]), "new"]


def test_a_required_file_must_stand_in_the_manifest(adapter: Path):
    files = hash_files(adapter)
    del files[REQUIRED_FILES[0]]
    (adapter / REQUIRED_FILES[0]).unlink()
    write_manifest(adapter, manifest_of(files))
    assert problems_of(adapter) == (f"{REQUIRED_FILES[0]}: required, but not in the manifest",)


@pytest.mark.parametrize("name", ["../secret", "extra/../../secret", "/etc/hostname"])
def test_a_path_out_of_the_adapter_is_refused_even_with_the_right_hash(adapter: Path, name: str):
    secret = adapter.parent / "secret"
    secret.write_text("secret")
    path = adapter / name
    digest = hash_files(adapter.parent)["secret"] if path.name == "secret" else "0" * 64
    write_manifest(adapter, manifest_of(hash_files(adapter) | {name: digest}))
    assert problems_of(adapter) == (f"{name}: lies outside the adapter",)


def test_a_link_out_of_the_adapter_is_refused(adapter: Path):
    outside = adapter.parent / "weights"
    (adapter / REQUIRED_FILES[0]).rename(outside)
    (adapter / REQUIRED_FILES[0]).symlink_to(outside)
    assert problems_of(adapter) == (f"{REQUIRED_FILES[0]}: lies outside the adapter",)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_torn_manifest_is_refused(adapter: Path, share: float):
    path = adapter / MANIFEST_NAME
    data = path.read_bytes().rstrip()
    path.write_bytes(data[: int(len(data) * share)])
    (problem,) = problems_of(adapter)
    assert problem.startswith(MANIFEST_NAME)


def test_a_manifest_that_is_not_text_is_refused(adapter: Path):
    (adapter / MANIFEST_NAME).write_bytes(b"\xff\xfe\x00")
    assert problems_of(adapter)[0].startswith(MANIFEST_NAME)


def test_a_directory_without_a_manifest_is_unfinished(adapter: Path):
    (adapter / MANIFEST_NAME).unlink()
    assert "did not finish" in problems_of(adapter)[0]


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("format_version", 2, "format_version"),
        ("surprise", 1, "surprise"),
        ("seed", "many", "seed"),
        ("lora", {"rank": 8}, "lora.alpha"),
        ("base", None, "base"),
    ],
)
def test_a_manifest_of_another_shape_names_the_field(adapter: Path, key: str, value: object, named: str):
    path = adapter / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ArtifactError, match=named):
        read_manifest(adapter)


def test_the_digest_names_the_files_and_nothing_else(adapter: Path):
    manifest = read_manifest(adapter)
    assert manifest.digest == manifest.model_copy(update={"name": "other"}).digest
    (adapter / "extra" / "notes.txt").write_text("changed")
    assert manifest_of(hash_files(adapter)).digest != manifest.digest


def test_base_problems_say_which_hash_differs_and_why():
    manifest = manifest_of({})
    assert base_problems(manifest, "f" * 64, "a" * 64) == []
    (base,) = base_problems(manifest, "0" * 64, "a" * 64)
    assert "tiny" in base
    assert "ffffffffffff" in base
    assert "000000000000" in base
    (template,) = base_problems(manifest, "f" * 64, "1" * 64)
    assert "template" in template
    assert len(base_problems(manifest, "0" * 64, "1" * 64)) == 2


def test_a_base_fingerprint_follows_config_and_weights_only(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    first = fingerprint_base(tmp_path)
    (tmp_path / "README.md").write_text("words")
    assert fingerprint_base(tmp_path) == first
    (tmp_path / "model.safetensors").write_bytes(b"Weights")
    changed = fingerprint_base(tmp_path)
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert len({first, changed, fingerprint_base(tmp_path)}) == 3


@pytest.mark.parametrize("present", ["config.json", "model.safetensors"])
def test_a_folder_that_is_no_model_has_no_fingerprint(tmp_path: Path, present: str):
    (tmp_path / present).write_text("{}")
    with pytest.raises(ArtifactError, match=r"no config\.json with weights"):
        fingerprint_base(tmp_path)
