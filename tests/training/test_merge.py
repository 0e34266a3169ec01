"""The merge: exact in fp32, streamed over shards, and refused where adapter and base do not fit."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.tiny import make_certificate
from tests.training.test_disk import file_size_limit
from training import merge as merging
from training.artifact import (
    ADAPTER_WEIGHTS,
    PROBES_NAME,
    ArtifactError,
    fingerprint_base,
    hash_files,
    read_manifest,
    write_manifest,
)
from training.disk import DiskError
from training.merge import MergeError
from training.tensor_file import write_tensors

ROOT = Path(__file__).resolve().parent.parent.parent


def merge(adapter: Path, base: Path, out: Path, dtype: torch.dtype | None = None, kl_nats: float = 0.0):
    """Certifies without measuring, which has its own tests."""
    return merging.merge(
        adapter, base, out, dtype, lambda merged: make_certificate(merged, adapter, kl_nats_mean=kl_nats)
    )


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(5, 25)[None]).logits


@pytest.fixture
def sharded_base(tiny_base: Path, tmp_path: Path) -> Path:
    """The tiny base in several shards: the same weights, another fingerprint."""
    AutoModelForCausalLM.from_pretrained(tiny_base).save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    return tmp_path / "sharded"


def test_merged_answers_as_base_plus_adapter(tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path: Path):
    merge(tiny_adapters["starter"], tiny_base, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    plain = logits(base)
    reference = logits(peft.PeftModel.from_pretrained(base, str(tiny_adapters["starter"])))
    torch.testing.assert_close(logits(merged), reference, atol=1e-4, rtol=1e-4)
    assert (reference - plain).abs().max() > 0.1


def test_shards_merge_to_the_same_weights(tiny_base, sharded_base, tiny_adapters, tmp_path):
    adapter = shutil.copytree(tiny_adapters["starter"], tmp_path / "adapter")
    manifest = read_manifest(adapter)
    base = manifest.base.model_copy(update={"fingerprint": fingerprint_base(sharded_base)})
    write_manifest(adapter, manifest.model_copy(update={"base": base}))
    merge(adapter, sharded_base, tmp_path / "from-shards")
    merge(tiny_adapters["starter"], tiny_base, tmp_path / "whole")
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("from-shards", "whole")]
    for left, right in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(left, right)


def live_bytes() -> int:
    """Returns the bytes of all tensors made since `gc.freeze`, each storage once."""
    tensors = [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor)]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def test_at_most_one_weight_is_in_memory(tiny_base, tiny_adapters, tmp_path, monkeypatch):
    held = []

    def counted(path, kinds, tensor_of):
        def tensor_and_count(name: str) -> torch.Tensor:
            held.append(live_bytes())
            return tensor_of(name)

        write_tensors(path, kinds, tensor_and_count)

    monkeypatch.setattr(merging, "write_tensors", counted)
    gc.freeze()
    try:
        merge(tiny_adapters["starter"], tiny_base, tmp_path / "merged")
    finally:
        gc.unfreeze()
    (shard,) = tiny_base.glob("*.safetensors")
    weights = load_file(shard)
    assert len(held) == len(weights)
    deltas = sum(tensor.nbytes for tensor in load_file(tiny_adapters["starter"] / ADAPTER_WEIGHTS).values())
    largest = max(weight.nbytes for weight in weights.values())
    assert max(held) <= deltas + 2 * largest  # what was read, and what became of it
    assert max(held) < sum(weight.nbytes for weight in weights.values()) / 2


def test_a_merged_model_carries_nothing_that_makes_it_an_adapter(tiny_base, tiny_adapters, tmp_path):
    merge(tiny_adapters["starter"], tiny_base, tmp_path / "merged")
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert names.isdisjoint({PROBES_NAME, "adapter_config.json", ADAPTER_WEIGHTS, "manifest.json"})
    assert {"tokenizer.json", "chat_template.jinja", "config.json"} <= names


def test_a_given_dtype_is_written_and_stated(tiny_base, tiny_adapters, tmp_path):
    merge(tiny_adapters["starter"], tiny_base, tmp_path / "merged", torch.bfloat16)
    (shard,) = (tmp_path / "merged").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(shard).values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"


def test_another_base_is_refused_and_leaves_what_was_there(tiny_base, tiny_adapters, sharded_base, tmp_path):
    merge(tiny_adapters["starter"], tiny_base, tmp_path / "merged")
    before = hash_files(tmp_path / "merged")
    with pytest.raises(MergeError, match="is not the base"):
        merge(tiny_adapters["starter"], sharded_base, tmp_path / "merged")
    assert hash_files(tmp_path / "merged") == before


def test_a_merge_that_fails_its_certificate_replaces_nothing(tiny_base, tiny_adapters, tmp_path):
    merge(tiny_adapters["starter"], tiny_base, tmp_path / "merged")
    before = hash_files(tmp_path / "merged")
    assert not merge(tiny_adapters["other"], tiny_base, tmp_path / "merged", kl_nats=0.2).passed
    assert hash_files(tmp_path / "merged") == before
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    assert merge(tiny_adapters["other"], tiny_base, tmp_path / "merged").passed
    assert hash_files(tmp_path / "merged") != before


def test_a_directory_that_is_no_merge_is_never_replaced(tiny_base, tiny_adapters, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("")
    with pytest.raises(MergeError, match="no earlier merge"):
        merge(tiny_adapters["starter"], tiny_base, tmp_path / "precious")
    assert (tmp_path / "precious" / "thesis.txt").exists()


def kept_as_it_was(folder: Path, before: dict[str, str]) -> bool:
    return hash_files(folder / "merged") == before and [path.name for path in folder.iterdir()] == ["merged"]


def test_a_merge_that_the_disk_has_no_space_for_does_not_start(tiny_base, tiny_adapters, tmp_path, monkeypatch):
    merge(tiny_adapters["starter"], tiny_base, tmp_path / "merged")
    before = hash_files(tmp_path / "merged")
    needed = merging.merged_bytes(tiny_base, None)
    monkeypatch.setattr(merging, "free_space", lambda _: needed - 1)
    monkeypatch.setattr(merging, "write_merged", None)  # it would be called
    with pytest.raises(DiskError) as refusal:
        merge(tiny_adapters["other"], tiny_base, tmp_path / "merged")
    for part in (
        f"cannot write {tmp_path / 'merged'}",
        f"{needed:,} bytes",
        f"{needed - 1:,} ",
        "stays as it is",
        "--out",
    ):
        assert part in str(refusal.value)
    assert kept_as_it_was(tmp_path, before)


def test_a_write_that_is_refused_midway_is_told_and_leaves_the_earlier_merge(tiny_base, tiny_adapters, tmp_path):
    merge(tiny_adapters["starter"], tiny_base, tmp_path / "merged")
    before = hash_files(tmp_path / "merged")
    told = r"cannot write .*: File too large\. The merge needs"
    with pytest.raises(DiskError, match=told) as refusal, file_size_limit(100_000):
        merge(tiny_adapters["other"], tiny_base, tmp_path / "merged")
    assert "which stays as it is" in str(refusal.value)
    assert kept_as_it_was(tmp_path, before)


@pytest.mark.parametrize(("dtype", "share"), [(None, 1.0), (torch.float32, 1.0), (torch.bfloat16, 0.5)])
def test_the_space_that_is_asked_for_is_what_the_weights_take(tiny_base, tiny_adapters, tmp_path, dtype, share):
    needed = merging.merged_bytes(tiny_base, dtype)
    merge(tiny_adapters["starter"], tiny_base, tmp_path / "merged", dtype)
    (shard,) = (tmp_path / "merged").glob("*.safetensors")
    assert shard.stat().st_size == pytest.approx(needed, rel=0.02)
    assert needed == share * merging.merged_bytes(tiny_base, torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize(("spare_pages", "told"), [(-1, "no space left on its disk"), (2, "No space left on device")])
def test_a_disk_that_is_or_becomes_full_is_told_by_the_command(tiny_base, tiny_adapters, tmp_path, spare_pages, told):
    """A file system of a mount namespace's own: too small for the weights, or for what stands beside them."""
    disk, held_out = tmp_path / "disk", tmp_path / "held_out.jsonl"
    disk.mkdir()
    held_out.write_text('{"messages": [{"role": "user", "content": "walk"}], "reference": "swim"}\n')
    namespace = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*namespace, f"mount -t tmpfs tmpfs {disk}"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets no process mount a file system of its own")
    size_kib = 4 * (-(-merging.merged_bytes(tiny_base, None) // 4096) + spare_pages)
    merge_command = [sys.executable, "-m", "training", "merge", str(tiny_adapters["starter"]), "--base", str(tiny_base)]
    merge_command += ["--out", str(disk / "merged"), "--held-out", str(held_out)]
    script = f'mount -t tmpfs -o size={size_kib}k tmpfs {disk} && "$@"; code=$?; ls -A {disk}; exit $code'
    done = subprocess.run(
        [*namespace, script, "sh", *merge_command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"error: cannot write {disk}" in done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""  # nothing is left there


def test_a_changed_adapter_is_refused(tiny_base, tiny_adapters, tmp_path):
    adapter = shutil.copytree(tiny_adapters["starter"], tmp_path / "adapter")
    tensors = load_file(adapter / ADAPTER_WEIGHTS)
    save_file({name: tensor * 2 for name, tensor in tensors.items()}, adapter / ADAPTER_WEIGHTS)
    with pytest.raises(ArtifactError, match="changed since training"):
        merge(adapter, tiny_base, tmp_path / "merged")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {n.replace("layers.1", "layers.9"): v for n, v in t.items()}, "no weight for"),
        (lambda t: {n: v for n, v in t.items() if "layers.0.self_attn.q_proj.lora_A" not in n}, "lack one of"),
        (lambda t: {n: (v.repeat(2, 1) if "lora_B" in n else v) for n, v in t.items()}, "the adapter's update is"),
        (lambda t: {**t, "base_model.model.lm_head.weight": torch.zeros(2, 2)}, "not a weight of LoRA or DoRA"),
    ],
)
def test_weights_that_do_not_fit_are_named(tiny_base, tiny_adapters, tmp_path, change, message):
    adapter = shutil.copytree(tiny_adapters["starter"], tmp_path / "adapter")
    tensors = change(load_file(adapter / ADAPTER_WEIGHTS))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, adapter / ADAPTER_WEIGHTS)
    write_manifest(adapter, read_manifest(adapter).model_copy(update={"files": hash_files(adapter)}))
    with pytest.raises(MergeError, match=message):
        merge(adapter, tiny_base, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
