"""The merge command keeps what it was asked for, and its words carry the certificate's numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.tiny import make_certificate
from training.artifact import read_certificate
from training.certify_merge import certified_merge, summary
from training.deltas import MergeError
from training.proof import DeltaSurvival, VariantDistance


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
            dtype=None,
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
    failed = facts.model_copy(update={"kl_nats_mean": 0.2})
    assert f"FAILED, {tmp_path / 'out'} is as it was: KL 2.0e-01" in summary(
        tiny_adapters["starter"], tmp_path / "out", failed
    )
