"""The variants stand where they must: the dequantised merge is what was trained, the plain one what is served."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.tiny import make_certificate
from training.artifact import hash_files, read_certificate, read_manifest, write_manifest
from training.certificate import certify, read_held_out, render_held_out
from training.comparison import (
    BASE,
    GREEDY_TOKENS,
    MERGED,
    PLAIN,
    POLICY,
    TRAINED,
    choose,
    compare_variants,
    merge_compared,
)
from training.ground import Onto
from training.merge import write_merged
from training.proof import VariantDistance
from training.room import Room, need_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def adapter(tiny_adapters, tmp_path_factory) -> Path:
    """An adapter that says it was trained on NF4."""
    found = shutil.copytree(tiny_adapters["starter"], tmp_path_factory.mktemp("nf4") / "adapter")
    write_manifest(found, read_manifest(found).model_copy(update={"quantisation": "nf4-double"}))
    return found


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "held_out.jsonl"
    rows = [
        {"id": str(n), "messages": [{"role": "user", "content": f"walk {n}"}], "reference": "swim in a lake " * (2 + n)}
        for n in range(4)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_held_out(path, 4)


@pytest.fixture(scope="module")
def compared(tiny_base, adapter, chats, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "merged"
    certificate = merge_compared(
        adapter,
        tiny_base,
        out,
        None,
        lambda merged, onto: certify(adapter, tiny_base, merged, chats, CPU, onto),
        lambda merged: compare_variants(adapter, tiny_base, merged, chats, CPU),
        Onto.DEQUANTISED,
    )
    return out, certificate


def test_every_variant_is_measured_against_what_was_trained(compared):
    _, certificate = compared
    found = {(row.variant, row.reference): row for row in certificate.comparison}
    assert list(found) == [
        (PLAIN, TRAINED),
        (MERGED[Onto.PLAIN], TRAINED),
        (MERGED[Onto.DEQUANTISED], TRAINED),
        (BASE, TRAINED),
        (MERGED[Onto.PLAIN], PLAIN),
    ]
    same, other = found[MERGED[Onto.DEQUANTISED], TRAINED], found[MERGED[Onto.PLAIN], TRAINED]
    assert same.kl_nats_mean < 1e-6 < other.kl_nats_mean
    assert found[MERGED[Onto.PLAIN], PLAIN].kl_nats_mean < 1e-6
    assert same.greedy_prefix_mean == same.greedy_tokens_mean > other.greedy_prefix_mean
    assert other.kl_nats_mean == pytest.approx(found[PLAIN, TRAINED].kl_nats_mean, rel=1e-2)
    for row in certificate.comparison:
        assert row.nll_nats_interval[0] <= row.nll_nats_difference <= row.nll_nats_interval[1]


def test_the_chosen_merge_alone_is_left_with_the_comparison_in_its_certificate(compared):
    out, certificate = compared
    assert certificate.onto == "dequantised"
    assert certificate.onto_reason == "--onto dequantised"
    assert certificate.passed
    assert read_certificate(out) == certificate
    assert [path.name for path in out.parent.iterdir()] == ["merged"]


def test_in_little_memory_the_numbers_are_the_same_and_prefixes_are_those_of_held_out_replies(
    compared, tiny_base, adapter, chats, tmp_path
):
    _, certificate = compared
    merged = {way: tmp_path / way.value for way in Onto}
    for way, directory in merged.items():
        write_merged(adapter, tiny_base, directory, None, way)
    room = Room(need_of(tiny_base, torch.float32).layerwise)
    found = compare_variants(adapter, tiny_base, merged, chats, CPU, room)
    assert {row.greedy_on for row in certificate.comparison} == {"own replies"}
    assert {row.greedy_on for row in found} == {"held-out replies"}
    greedy = ("greedy_prefix_mean", "greedy_tokens_mean", "greedy_on")
    for row, whole in zip(found, certificate.comparison, strict=True):
        assert row.model_dump(exclude=set(greedy)) == whole.model_dump(exclude=set(greedy))
        assert row.greedy_prefix_mean <= row.greedy_tokens_mean
        assert row.greedy_tokens_mean == pytest.approx(held_out_tokens(tiny_base, adapter, chats))
    (dequantised,) = (row for row in found if row.variant == MERGED[Onto.DEQUANTISED])
    assert dequantised.greedy_prefix_mean == dequantised.greedy_tokens_mean
    assert min(row.greedy_prefix_mean for row in found) < dequantised.greedy_prefix_mean


def held_out_tokens(base: Path, adapter: Path, chats) -> float:
    """Returns the mean length of the held-out replies, cut as greedy replies are."""
    examples = render_held_out(base, chats, read_manifest(adapter))
    return sum(min(example.labelled, GREEDY_TOKENS) for example in examples) / len(examples)


def distance(onto: Onto, difference: float) -> VariantDistance:
    return VariantDistance(
        variant=MERGED[onto],
        reference=TRAINED,
        kl_nats_mean=0.1,
        kl_nats_max=0.2,
        top1_agreement=0.9,
        nll_nats_difference=difference,
        nll_nats_interval=(difference - 0.1, difference + 0.1),
        greedy_prefix_mean=1.0,
        greedy_tokens_mean=2.0,
    )


@pytest.mark.parametrize(
    ("plain", "dequantised", "kl_plain", "kl_dequantised", "chosen"),
    [
        (-0.03, 0.0, 0.0, 0.0, Onto.PLAIN),
        (0.03, 0.0, 0.0, 0.0, Onto.DEQUANTISED),
        (0.0, 0.0, 0.0, 0.0, Onto.PLAIN),
        (-0.03, 0.0, 0.2, 0.0, Onto.DEQUANTISED),
        (0.03, 0.0, 0.2, 0.2, Onto.PLAIN),
    ],
)
def test_the_lowest_held_out_nll_wins_among_those_that_pass(
    tiny_base, tiny_adapters, tmp_path, plain, dequantised, kl_plain, kl_dequantised, chosen
):
    shutil.copytree(tiny_base, tmp_path / "merged")
    certificates = {
        onto: make_certificate(tmp_path / "merged", tiny_adapters["starter"], kl_nats_mean=kl)
        for onto, kl in ((Onto.PLAIN, kl_plain), (Onto.DEQUANTISED, kl_dequantised))
    }
    found, reason = choose(certificates, [distance(Onto.PLAIN, plain), distance(Onto.DEQUANTISED, dequantised)])
    assert found is chosen
    assert reason.startswith(f"{POLICY}: plain {plain:+.4f} nats a token")
    assert ("but failed" in reason) == (kl_plain + kl_dequantised > 0)


def test_where_none_passes_nothing_is_replaced(tiny_base, adapter, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "merge_certificate.json").write_text("of before")
    before = hash_files(tmp_path)
    certificate = merge_compared(
        adapter,
        tiny_base,
        tmp_path / "merged",
        None,
        lambda merged, onto: make_certificate(merged, adapter, kl_nats_mean=0.2, onto=onto.value),
        lambda merged: tuple(distance(onto, 0.0) for onto in merged),
        None,
    )
    assert not certificate.passed
    assert len(certificate.comparison) == 2
    assert hash_files(tmp_path) == before
