"""The merge command keeps what it was asked for, and its words carry the certificate's numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import make_certificate
from tests.training.test_certificate import changed_adapter
from training.__main__ import main
from training.artifact import read_certificate, read_manifest, write_manifest
from training.certify_merge import certified_merge, summary
from training.comparison import MERGED, POLICY, TRAINED
from training.deltas import MergeError
from training.ground import Onto
from training.proof import DeltaSurvival, VariantDistance
from training.room import Room, RoomError, need_of


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    row = {"id": "1", "messages": [{"role": "user", "content": "walk"}], "reference": "swim in a lake"}
    (tmp_path / "held_out.jsonl").write_text(json.dumps(row) + "\n")
    return tmp_path / "held_out.jsonl"


def test_an_adapter_trained_on_plain_weights_has_one_way(tiny_base, tiny_adapters, held_out, tmp_path):
    def run(onto: str, *, compare: bool = False):
        return certified_merge(
            tiny_adapters["starter"],
            tiny_base,
            tmp_path / "merged",
            dtype="auto",
            held_out=held_out,
            rows=1,
            onto=onto,
            compare=compare,
        )

    found = run("auto")
    assert (found.onto, found.comparison, found.passed) == ("plain", (), True)
    assert read_certificate(tmp_path / "merged") == found
    for refused in ({"onto": "dequantised"}, {"onto": "plain", "compare": True}):
        with pytest.raises(MergeError, match="no NF4 weights"):
            run(**refused)
    assert read_certificate(tmp_path / "merged") == found


@pytest.fixture
def erased(tiny_base, tiny_adapters, tmp_path) -> tuple[Path, Path]:
    """A base in bfloat16, with the older name of its dtype, and an adapter whose update is half a step or less."""
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (shard,) = base.glob("*.safetensors")
    weights = {name: weight.bfloat16() for name, weight in load_file(shard).items()}
    save_file(weights, shard, metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text()) | dict.fromkeys(("dtype", "torch_dtype"), "bfloat16")
    (base / "config.json").write_text(json.dumps(config))
    return base, changed_adapter(tiny_adapters["starter"], tmp_path / "adapter", base, {}, scale=3e-3)


def merge_in(dtype: str, base: Path, adapter: Path, held_out: Path):
    out = adapter.with_name("merged")
    found = certified_merge(adapter, base, out, dtype=dtype, held_out=held_out, rows=1, onto="plain", compare=False)
    return found, summary(adapter, out, found)


def test_an_update_that_the_bases_own_dtype_erases_is_written_in_float16_and_said_so(erased, held_out, tmp_path):
    found, text = merge_in("bfloat16", *erased, held_out)
    assert (found.passed, found.dtype_reason) == (False, None)
    assert "--dtype float16 or float32" in text
    found, text = merge_in("auto", *erased, held_out)
    assert found.passed, found.failures
    assert found.dtype == "float16"
    assert found.survival.share == pytest.approx(1.0, abs=0.1)
    assert "\nwritten in float16: bfloat16, the base's own, leaves 0." in "\n" + text
    assert read_certificate(tmp_path / "merged") == found
    (shard,) = (tmp_path / "merged").glob("*.safetensors")
    assert {weight.dtype for weight in load_file(shard).values()} == {torch.float16}
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (config["dtype"], "torch_dtype" in config) == ("float16", False)


def test_what_float16_cannot_hold_stays_and_is_sent_to_float32(erased, tiny_adapters, held_out, tmp_path):
    base, _ = erased
    (shard,) = base.glob("*.safetensors")
    weights = load_file(shard)
    weights["model.embed_tokens.weight"][-1, 0] = 1e5
    save_file(weights, shard, metadata={"format": "pt"})
    adapter = changed_adapter(tiny_adapters["starter"], tmp_path / "other", base, {}, scale=3e-3)
    found, text = merge_in("auto", base, adapter, held_out)
    assert (found.passed, found.dtype) == (False, "bfloat16")
    assert "float16 ends at 65504 and a weight is 99840" in text
    assert "write it with --dtype float32;" in text


def test_the_policy_picks_where_it_is_asked_to_and_says_why(tiny_base, tiny_adapters, held_out, tmp_path):
    adapter = shutil.copytree(tiny_adapters["starter"], tmp_path / "adapter")
    write_manifest(adapter, read_manifest(adapter).model_copy(update={"quantisation": "nf4-double"}))

    def run(onto: str, *, compare: bool):
        options = {"dtype": "auto", "held_out": held_out, "rows": 1}
        return certified_merge(adapter, tiny_base, tmp_path / "merged", onto=onto, compare=compare, **options)

    found = run("auto", compare=True)
    nll = {row.variant: row.nll_nats_difference for row in found.comparison if row.reference == TRAINED}
    assert found.onto == min(Onto, key=lambda way: nll[MERGED[way]]).value
    text = summary(adapter, tmp_path / "merged", found)
    assert f"\nkept: {found.onto} ({POLICY}: plain {nll[MERGED[Onto.PLAIN]]:+.4f} nats a token, dequantised" in text
    assert read_certificate(tmp_path / "merged") == found
    other = next(way.value for way in Onto if way.value != found.onto)
    assert run(other, compare=True).onto_reason == f"--onto {other}"
    assert read_certificate(tmp_path / "merged").onto == other


def test_a_hopeless_limit_is_refused_before_anything_is_written(tiny_base, tiny_adapters, held_out, tmp_path):
    options = {"dtype": "auto", "held_out": held_out, "rows": 1, "onto": "plain", "compare": False}
    with pytest.raises(RoomError, match="--max-memory-gib"):
        certified_merge(tiny_adapters["starter"], tiny_base, tmp_path / "merged", room=Room(1000), **options)
    assert not (tmp_path / "merged").exists()


def test_the_command_passes_its_limit_on(tiny_base, tiny_adapters, held_out, tmp_path, capsys):
    """At which the tiny model is read block by block, and says so."""
    limit = need_of(tiny_base, torch.float32).layerwise / 2**30
    words = ["merge", str(tiny_adapters["starter"]), "--base", str(tiny_base), "--out", str(tmp_path / "merged")]
    assert main([*words, "--held-out", str(held_out), "--max-memory-gib", str(limit)]) == 0
    assert "plain base + starter: block 2 of 2" in capsys.readouterr().err


def test_the_summary_has_the_verdict_its_numbers_and_the_comparison(tiny_base, tiny_adapters, tmp_path):
    merged = shutil.copytree(tiny_base, tmp_path / "merged")
    survival = DeltaSurvival(
        matrices=14, share=0.987, share_min=0.9, share_median=0.99, share_off_allowed=0.1, worst={"q": 0.9}
    )
    row = VariantDistance(
        variant="merged on the plain base",
        reference="NF4 base + adapter",
        kl_nats_mean=0.25,
        kl_nats_max=0.5,
        top1_agreement=0.75,
        nll_nats_difference=-0.0333,
        nll_nats_interval=(-0.0626, -0.0028),
        greedy_prefix_mean=5.0,
        greedy_tokens_mean=32.0,
    )
    facts = make_certificate(merged, tiny_adapters["starter"], survival=survival, comparison=(row,))
    text = summary(tiny_adapters["starter"], tmp_path / "out", facts)
    assert "98.70 % of the update survived (worst matrix 90.00 %)" in text
    assert "passed, " in text
    assert "-0.0333 [-0.0626, -0.0028]" in text
    assert "5.0 of 32.0" in text
    assert "along the held-out replies" not in text
    elsewhere = row.model_copy(update={"greedy_on": "held-out replies"})
    little = facts.model_copy(update={"comparison": (elsewhere,)})
    assert "greedy prefix: along the held-out replies" in summary(tiny_adapters["starter"], tmp_path / "out", little)
    failed = facts.model_copy(update={"kl_nats_mean": 0.2})
    assert f"FAILED, {tmp_path / 'out'} is as it was: KL 2.0e-01" in summary(
        tiny_adapters["starter"], tmp_path / "out", failed
    )
