"""The certificate passes a true merge and catches a false one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from training import merge as merging
from training.artifact import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MergeCertificate,
    fingerprint_base,
    hash_files,
    read_certificate,
    read_manifest,
    write_manifest,
)
from training.certificate import CertificateError, certify, read_held_out, render_held_out
from training.chat import IGNORED_LABEL, Message
from training.deltas import Deltas, read_deltas
from training.errors import TrainingError
from training.ground import Onto
from training.merge import merge
from training.model import load_tokenizer
from training.room import FREE_MEMORY, Room, need_of
from training.survival import BrokenMergeError

CPU = torch.device("cpu")


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    path = tmp_path / "held_out.jsonl"
    rows = [
        {"id": str(n), "messages": [{"role": "user", "content": f"walk {n}"}], "reference": "swim in a lake " * 4}
        for n in range(6)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def merge_certified(
    adapter: Path, base: Path, out: Path, held_out: Path, dtype: torch.dtype | None = None
) -> MergeCertificate:
    """Merges with a certificate on four held-out rows."""
    chats = read_held_out(held_out, 4)
    return merge(adapter, base, out, dtype, lambda directory: certify(adapter, base, directory, chats, CPU))


@pytest.fixture
def merged(tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path: Path, held_out: Path) -> Path:
    assert merge_certified(tiny_adapters["starter"], tiny_base, tmp_path / "merged", held_out).passed
    return tmp_path / "merged"


def changed_adapter(adapter: Path, directory: Path, base: Path, config: dict[str, object], scale: float = 1.0) -> Path:
    """Returns a copy with another adapter_config.json, and updates scaled by `scale`, that verifies for `base`."""
    shutil.copytree(adapter, directory)
    (directory / ADAPTER_CONFIG).write_text(
        json.dumps(json.loads((directory / ADAPTER_CONFIG).read_text()) | config), encoding="utf-8"
    )
    tensors = load_file(directory / ADAPTER_WEIGHTS)
    tensors = {name: tensor * scale if "lora_B" in name else tensor for name, tensor in tensors.items()}
    save_file(tensors, directory / ADAPTER_WEIGHTS)
    manifest = read_manifest(adapter)
    section = manifest.base.model_copy(update={"fingerprint": fingerprint_base(base)})
    write_manifest(directory, manifest.model_copy(update={"base": section, "files": hash_files(directory)}))
    return directory


def test_a_true_merge_passes_and_says_so_on_disk(tiny_base, tiny_adapters, merged, held_out):
    certificate = certify(tiny_adapters["starter"], tiny_base, merged, read_held_out(held_out, 4), CPU)
    assert certificate.passed
    assert certificate.rows == 4
    assert certificate.kl_nats_mean < 1e-6 < certificate.kl_nats_base_mean
    assert certificate.top1_agreement_base < 1.0
    assert certificate.top1_agreement == 1.0
    assert certificate.nll_nats_merged == pytest.approx(certificate.nll_nats_adapter, abs=1e-4)
    assert certificate.survival.share == pytest.approx(1.0, abs=1e-4)
    assert certificate.probes.error_nats < 1e-4 < certificate.probes.effect_nats
    assert certificate.kl_nats_rounding is None
    assert read_certificate(merged) == certificate


def test_a_merge_in_16_bits_is_held_to_the_rounding_measured_in_its_own_run(
    tiny_base, tiny_adapters, held_out, tmp_path
):
    adapter = tiny_adapters["starter"]
    found = merge_certified(adapter, tiny_base, tmp_path / "bf16", held_out, torch.bfloat16)
    assert found.passed, found.failures
    assert found.dtype == "bfloat16"
    assert 0 < found.kl_nats_rounding < found.kl_nats_base_mean
    assert found.kl_nats_allowed == pytest.approx(3 * found.kl_nats_rounding)
    assert found.probes is None  # recorded in fp32


@pytest.mark.parametrize("fault", ["no update", "twice the update", "a transposed matrix", "a layer left out"])
def test_planted_faults_are_refused_by_the_name_of_a_matrix(tiny_base, tiny_adapters, merged, held_out, fault):
    (shard,) = merged.glob("*.safetensors")
    right, base = load_file(shard), load_file(next(tiny_base.glob("*.safetensors")))
    if fault == "no update":
        wrong = base
    elif fault == "twice the update":
        wrong = {name: 2 * right[name] - base[name] for name in right}
    elif fault == "a transposed matrix":
        name = "model.layers.0.self_attn.q_proj.weight"
        wrong = {**right, name: right[name].T.contiguous()}
    else:
        wrong = {name: base[name] if "layers.1" in name else right[name] for name in right}
    save_file(wrong, shard, metadata={"format": "pt"})
    with pytest.raises(BrokenMergeError, match=r"model\.layers\.\d\.\w+\.\w+\.weight: \d+ of \d+ numbers are not base"):
        certify(tiny_adapters["starter"], tiny_base, merged, read_held_out(held_out, 4), CPU)


def wrong_scale(factor: float):
    def read(adapter: Path) -> Deltas:
        found = read_deltas(adapter)
        return Deltas(found.a_RI, found.b_OR, found.magnitude_O, found.scale * factor)

    return read


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_wrong_formula_fails_against_peft(monkeypatch, tiny_base, tiny_adapters, held_out, tmp_path, factor):
    """The merge and the check of its weights share this project's formula; the answers come from peft's."""
    monkeypatch.setattr(merging, "read_deltas", wrong_scale(factor))
    monkeypatch.setattr("training.certificate.read_deltas", wrong_scale(factor))
    adapter = tiny_adapters["starter"]
    found = merge_certified(adapter, tiny_base, tmp_path / "merged", held_out)
    assert any("KL" in reason and "is above 1.0e-05" in reason for reason in found.failures)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("config", [{"lora_alpha": 16}, {"lora_alpha": 4}, {"use_rslora": True}])
def test_an_adapter_of_another_scale_than_trained_fails_by_its_probes(
    tiny_base, tiny_adapters, held_out, tmp_path, config
):
    adapter = changed_adapter(tiny_adapters["starter"], tmp_path / "adapter", tiny_base, config)
    found = merge_certified(adapter, tiny_base, tmp_path / "merged", held_out)
    (reason,) = found.failures
    assert "from its probes" in reason


def test_an_update_that_bfloat16_erased_fails_by_its_survival(tiny_base, tiny_adapters, held_out, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (shard,) = base.glob("*.safetensors")
    weights = {name: weight.bfloat16() for name, weight in load_file(shard).items()}
    save_file(weights, shard, metadata={"format": "pt"})
    adapter = changed_adapter(tiny_adapters["starter"], tmp_path / "adapter", base, {}, scale=1e-4)
    found = merge_certified(adapter, base, tmp_path / "merged", held_out)
    assert any("left by rounding" in reason and "--dtype float16 or float32" in reason for reason in found.failures)
    assert abs(found.survival.share - 1) > 0.1
    assert f"{next(iter(found.survival.worst))} " in " ".join(found.failures)


@pytest.mark.parametrize(("turns", "measured"), [(None, ["one", "two"]), ("all", ["one", "two"]), ("last", ["two"])])
def test_the_replies_that_were_trained_are_measured(tiny_base, tiny_adapters, turns, measured):
    manifest = read_manifest(tiny_adapters["starter"])
    recipe = {"data": {"turns": turns}} if turns else {}
    chat = (Message("user", "a"), Message("assistant", "one"), Message("user", "b"), Message("assistant", "two"))
    (example,) = render_held_out(tiny_base, [chat], manifest.model_copy(update={"recipe": recipe}))
    text = load_tokenizer(tiny_base).decode([label for label in example.labels if label != IGNORED_LABEL])
    assert text == "".join(f"{reply}<|im_end|>" for reply in measured)


@pytest.mark.parametrize("trained_in", ["float32", "bfloat16"])
def test_a_dequantised_merge_is_what_was_trained(tiny_base, tiny_adapters, held_out, tmp_path, trained_in):
    adapter = shutil.copytree(tiny_adapters["starter"], tmp_path / "adapter")
    changes = {"quantisation": "nf4-double", "compute_dtype": trained_in}
    write_manifest(adapter, read_manifest(adapter).model_copy(update=changes))
    chats = read_held_out(held_out, 4)

    def measure(onto: Onto):
        return lambda directory: certify(adapter, tiny_base, directory, chats, CPU, onto)

    found = merge(adapter, tiny_base, tmp_path / "nf4", None, measure(Onto.DEQUANTISED), Onto.DEQUANTISED)
    assert found.passed, found.failures
    assert (found.onto, found.dtype) == ("dequantised", "float32")
    assert found.kl_nats_mean < (1e-6 if trained_in == "float32" else 3 * found.kl_nats_rounding)
    assert found.kl_nats_base_mean > 1e-6
    with pytest.raises(TrainingError, match=r"numbers are not base \+ update"):
        measure(Onto.PLAIN)(tmp_path / "nf4")


@pytest.mark.parametrize(
    ("trained_in", "onto", "dtype"),
    [
        ("float32", Onto.PLAIN, None),
        ("float32", Onto.PLAIN, torch.bfloat16),
        ("float32", Onto.DEQUANTISED, None),
        ("bfloat16", Onto.DEQUANTISED, None),
    ],
)
def test_a_certificate_in_little_memory_has_the_same_numbers(
    tiny_base, tiny_adapters, held_out, tmp_path, trained_in, onto, dtype
):
    """Bit for bit, but where the reference is an NF4 base in bfloat16, whose dense layers round once less."""
    adapter = shutil.copytree(tiny_adapters["starter"], tmp_path / "adapter")
    changes = {"quantisation": "nf4-double", "compute_dtype": trained_in}
    write_manifest(adapter, read_manifest(adapter).model_copy(update=changes))
    chats, found = read_held_out(held_out, 4), []
    for room in (FREE_MEMORY, Room(need_of(tiny_base, torch.float32).layerwise)):

        def measure(directory: Path, room: Room = room) -> MergeCertificate:
            return certify(adapter, tiny_base, directory, chats, CPU, onto, room=room)

        found.append(merge(adapter, tiny_base, tmp_path / "merged", dtype, measure, onto))
    whole, layerwise = found
    assert whole.passed, whole.failures
    if trained_in == "float32":
        assert layerwise == whole
    else:
        assert layerwise.passed, layerwise.failures
        assert layerwise.kl_nats_base_mean == pytest.approx(whole.kl_nats_base_mean, rel=0.05)
        assert layerwise.kl_nats_rounding == whole.kl_nats_rounding


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "No such file"),
        ("", "no rows"),
        ('{"messages": [], "reference": "x"}\n{"torn', "line 2"),
        ('{"instruction": "a", "input": "", "output": "b"}', "line 1"),
    ],
)
def test_held_out_rows_that_cannot_be_read_are_named(tmp_path, text, told):
    path = tmp_path / "rows.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(CertificateError, match=told):
        read_held_out(path, 4)


def test_a_line_separator_inside_a_row_is_text(tmp_path):
    row = {"messages": [{"role": "user", "content": "a\u2028b"}], "reference": "c"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n")
    assert read_held_out(tmp_path / "rows.jsonl", 4)[0][0].content == "a\u2028b"
