"""Weights that are not base + update are named, and an update that rounding erased is measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from training.artifact import read_manifest
from training.deltas import Deltas, read_deltas
from training.ground import Onto, ground_of
from training.survival import BrokenMergeError, measure_survival

Q0, Q1 = (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1))
UP0, HEAD, NORM = "model.layers.0.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"


class Case:
    """A base of one shard, an adapter's deltas, and the weights that their merge should hold."""

    def __init__(self, base_dir: Path, adapter: Path, folder: Path) -> None:
        self.ground = ground_of(base_dir, read_manifest(adapter), Onto.PLAIN)
        self.deltas = read_deltas(adapter)
        self.base = load_file(next(base_dir.glob("*.safetensors")))
        self.right = {
            name: self.deltas.applied(name, weight) if name in self.deltas.a_RI else weight
            for name, weight in self.base.items()
        }
        self.folder = folder

    def survival(self, weights: dict[str, torch.Tensor]):
        save_file({name: weight.contiguous() for name, weight in weights.items()}, self.folder / "model.safetensors")
        return measure_survival(self.deltas, self.ground, self.folder)

    def update(self, name: str) -> torch.Tensor:
        return self.right[name] - self.base[name]


@pytest.fixture
def case(tiny_base, tiny_adapters, tmp_path) -> Case:
    return Case(tiny_base, tiny_adapters["starter"], tmp_path)


def test_a_true_merge_holds_every_update_whole(case: Case):
    found = case.survival(case.right)
    assert found.matrices == 14
    assert [found.share_min, found.share_median, found.share] == pytest.approx([1.0] * 3, abs=1e-4)
    assert len(found.worst) == 5


def test_a_16_bit_merge_rounds_each_number_and_keeps_the_updates(case: Case):
    found = case.survival({name: weight.bfloat16() for name, weight in case.right.items()})
    assert 0.9 < found.share_min <= found.share_median < 1.1


FAULTS = {
    "a dropped layer": (lambda c: {n: c.base[n] if "layers.1" in n else c.right[n] for n in c.right}, "layers.1"),
    "half the scale": (lambda c: {n: c.right[n] - c.update(n) / 2 for n in c.right}, "not base [+] update"),
    "twice the scale": (lambda c: {n: c.right[n] + c.update(n) for n in c.right}, "not base [+] update"),
    "a transposed square matrix": (lambda c: {**c.right, Q0: c.right[Q0].T}, Q0),
    "two layers' updates swapped": (
        lambda c: {**c.right, Q0: c.base[Q0] + c.update(Q1), Q1: c.base[Q1] + c.update(Q0)},
        Q0,
    ),
    "another base": (
        lambda c: {**c.right, UP0: c.right[UP0] + torch.randn(128, 64, generator=torch.Generator().manual_seed(1)) / 5},
        UP0,
    ),
    "a head that was changed": (lambda c: {**c.right, HEAD: c.right[HEAD] * 1.001}, HEAD),
    "a missing weight": (lambda c: {n: w for n, w in c.right.items() if n != NORM}, f"{NORM}: missing"),
    "a weight too many": (lambda c: {**c.right, "score.weight": torch.ones(2)}, "score.weight: not a weight"),
    "another shape": (lambda c: {**c.right, UP0: c.right[UP0][:64]}, rf"{UP0}: shape \(64, 64\)"),
    "NaN": (lambda c: {**c.right, Q1: c.right[Q1].clone().fill_diagonal_(float("nan"))}, f"{Q1}: 64 of 4096"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused_by_the_name_of_its_matrix(case: Case, fault: str):
    plant, told = FAULTS[fault]
    with pytest.raises(BrokenMergeError, match=told):
        case.survival(plant(case))


def test_a_merge_of_a_merge_holds_the_update_twice(case: Case):
    twice = {n: case.deltas.applied(n, w) if n in case.deltas.a_RI else w for n, w in case.right.items()}
    with pytest.raises(BrokenMergeError, match=r"not base \+ update.* and 11 more"):
        case.survival(twice)


def test_an_update_below_bfloat16s_step_is_found_erased(case: Case):
    """All numbers are correctly rounded, so only the share tells: weights near 1 have a step of 2^-8."""
    case.base = {n: (w.sign() + w / 8).bfloat16().float() for n, w in case.base.items()}
    save_file(case.base, case.folder / "base.safetensors")
    tiny = Deltas(case.deltas.a_RI, {n: b / 1000 for n, b in case.deltas.b_OR.items()}, {}, case.deltas.scale)
    folder = case.folder / "erased"
    folder.mkdir()
    merged = {n: tiny.applied(n, w).bfloat16() if n in tiny.a_RI else w.bfloat16() for n, w in case.base.items()}
    save_file(merged, folder / "model.safetensors")
    (case.folder / "base").mkdir()
    (case.folder / "base.safetensors").rename(case.folder / "base" / "model.safetensors")
    ground = type(case.ground)(case.folder / "base", frozenset(), torch.float32)
    found = measure_survival(tiny, ground, folder)
    assert found.share < 0.5
    assert min(found.worst.values()) == found.share_min < 0.1


def test_small_updates_in_float16_are_told_from_those_of_another_layer(case: Case):
    """Far below float16's smallest normal number, but not below its step where a weight is small."""
    case.base = {name: weight.half() for name, weight in case.base.items()}
    save_file(case.base, case.folder / "base.safetensors")
    (case.folder / "base").mkdir()
    (case.folder / "base.safetensors").rename(case.folder / "base" / "model.safetensors")
    case.ground = type(case.ground)(case.folder / "base", frozenset(), torch.float32)
    small = Deltas(case.deltas.a_RI, {n: b / 10_000 for n, b in case.deltas.b_OR.items()}, {}, case.deltas.scale)
    right = {n: small.applied(n, w) if n in small.a_RI else w.float() for n, w in case.base.items()}
    swapped = {Q0: case.base[Q0] + right[Q1] - case.base[Q1], Q1: case.base[Q1] + right[Q0] - case.base[Q0]}
    assert max(float((right[n] - case.base[n]).abs().max()) for n in swapped) < torch.finfo(torch.half).smallest_normal
    case.deltas = small
    case.survival({n: w.half() for n, w in right.items()})
    with pytest.raises(BrokenMergeError, match=rf"{Q0}: \d+ of 4096 numbers are not base [+] update"):
        case.survival({n: w.half() for n, w in (right | swapped).items()})


def test_an_adapter_that_changes_nothing_is_refused(case: Case):
    case.deltas = Deltas(case.deltas.a_RI, {n: b * 0 for n, b in case.deltas.b_OR.items()}, {}, case.deltas.scale)
    with pytest.raises(BrokenMergeError, match="changes nothing"):
        case.survival(case.base)
