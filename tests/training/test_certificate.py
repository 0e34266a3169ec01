"""The certificate passes a true merge and catches a false one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from training.artifact import read_certificate
from training.certificate import CertificateError, certify, read_held_out
from training.merge import merge

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


@pytest.fixture
def merged(tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path: Path, held_out: Path) -> Path:
    def measure(directory: Path):
        return certify(tiny_adapters["starter"], tiny_base, directory, read_held_out(held_out, 4), CPU)

    assert merge(tiny_adapters["starter"], tiny_base, tmp_path / "merged", None, measure).passed
    return tmp_path / "merged"


def test_a_true_merge_passes_and_says_so_on_disk(tiny_base, tiny_adapters, merged, held_out):
    certificate = certify(tiny_adapters["starter"], tiny_base, merged, read_held_out(held_out, 4), CPU)
    assert certificate.passed
    assert certificate.rows == 4
    assert certificate.kl_nats_mean < 1e-6 < certificate.kl_nats_base_mean
    assert certificate.top1_agreement_base < 1.0
    assert certificate.top1_agreement == 1.0
    assert certificate.nll_nats_merged == pytest.approx(certificate.nll_nats_adapter, abs=1e-4)
    assert read_certificate(merged) == certificate


@pytest.mark.parametrize("fault", ["no update", "twice the update", "a transposed matrix", "a layer left out"])
def test_planted_faults_fail(tiny_base, tiny_adapters, merged, held_out, fault):
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
    assert not certify(tiny_adapters["starter"], tiny_base, merged, read_held_out(held_out, 4), CPU).passed


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
