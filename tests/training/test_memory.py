"""The predicted memory is what the model under training really holds, part by part."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.recipes import small_config
from training.base import BaseFiles
from training.base_shape import read_shape
from training.batch import pack_rows
from training.config import TrainConfig
from training.memory import MemoryPlan, Place, plan_memory
from training.run import Run, assemble
from training.step import optimizer_step

CPU = Place("cpu", 4, recompute=False, runtime_bytes=0)


def predict(config: TrainConfig, place: Place = CPU, tokens: int = 200, labelled: int = 80) -> MemoryPlan:
    shape = read_shape(BaseFiles(Path(config.model.id), "tiny", None))
    return plan_memory(shape, config.model, config.lora, config.optim, place, tokens, labelled)


def storage_bytes(tensors: list[torch.Tensor]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


class Saved:
    """A tensor that autograd keeps, for as long as it does."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def kept_by_autograd(run: Run, rows: int) -> tuple[int, int, int]:
    """Returns the bytes that a pack's forward pass keeps for its backward pass, its tokens and its labelled tokens."""
    saved: weakref.WeakSet[Saved] = weakref.WeakSet()
    parameters = {p.untyped_storage().data_ptr() for p in run.peft_model.parameters()}
    (pack,) = pack_rows(run.data.train[:rows], 100_000)

    def note(tensor: torch.Tensor) -> Saved:
        found = Saved(tensor)
        if tensor.untyped_storage().data_ptr() not in parameters:
            saved.add(found)
        return found

    with torch.autograd.graph.saved_tensors_hooks(note, lambda found: found.tensor):
        loss = run.loss.train()(pack)
    kept = storage_bytes([found.tensor for found in saved])
    loss.backward()
    return kept, len(pack.input_ids_T), pack.labelled


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"model": {"quantisation": "nf4"}},
        {"lora": {"dropout": 0.1}},
        {"lora": {"rank": 32}},
        {"lora": {"target_modules": ["q_proj", "v_proj"]}},
        {"lora": {"dora": True}},
        {"lora": {"dora": True, "dropout": 0.1}},
        {"lora": {"dora": True, "dropout": 0.1}, "model": {"quantisation": "nf4"}},
    ],
    ids=["plain", "nf4", "dropout", "rank", "two-modules", "dora", "dora-dropout", "dora-dropout-nf4"],
)
def test_activations_are_what_autograd_keeps(tiny_base: Path, tmp_path: Path, sections: dict[str, Any]):
    config = small_config(tiny_base, tmp_path, **sections)
    kept, tokens, labelled = kept_by_autograd(assemble(config, tmp_path, tmp_path), 12)
    # The first of the two blocks keeps less: its input needs no gradient.
    assert predict(config, tokens=tokens, labelled=labelled).activations == pytest.approx(kept, rel=0.12)


@pytest.mark.parametrize(("quantisation", "dora"), [("none", False), ("nf4", False), ("none", True)])
def test_weights_and_adapter_are_what_the_model_holds(tiny_base: Path, tmp_path: Path, quantisation: str, dora: bool):
    config = small_config(tiny_base, tmp_path, model={"quantisation": quantisation}, lora={"dora": dora})
    run = assemble(config, tmp_path, tmp_path)
    optimizer_step(run, 0)
    frozen = [p for p in run.peft_model.parameters() if not p.requires_grad]
    for parameter in list(frozen):
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            frozen += [state.absmax, state.state2.absmax]
    trained = [p for p in run.peft_model.parameters() if p.requires_grad]
    states = [value for state in run.optimizer.state.values() for value in state.values() if value.numel() > 1]
    predicted = predict(config)
    assert predicted.weights == pytest.approx(storage_bytes(frozen), rel=0.02)
    assert predicted.adapter == storage_bytes(trained) * 2 + storage_bytes(states)  # gradients are as large as weights


def test_weights_that_are_kept_dense_take_what_plain_ones_do(tiny_base: Path, tmp_path: Path):
    config = small_config(tiny_base, tmp_path, model={"quantisation": "nf4", "keep_dense": "on"})
    dense = predict(config, replace(CPU, dense=True))
    assert dense.weights == predict(small_config(tiny_base, tmp_path)).weights
    frozen = [p for p in assemble(config, tmp_path, tmp_path).peft_model.parameters() if not p.requires_grad]
    assert dense.weights == pytest.approx(storage_bytes(frozen), rel=0.02)


def test_each_lever_lowers_its_part(tiny_base: Path, tmp_path: Path):
    plain = predict(small_config(tiny_base, tmp_path))
    nf4 = predict(small_config(tiny_base, tmp_path, model={"quantisation": "nf4"}))
    assert nf4.weights < plain.weights
    small = predict(small_config(tiny_base, tmp_path, lora={"rank": 2}))
    assert small.adapter == plain.adapter // 2
    paged = predict(small_config(tiny_base, tmp_path, optim={"optimizer": "paged_adamw_8bit"}))
    assert paged.adapter < plain.adapter
    recomputed = predict(small_config(tiny_base, tmp_path), Place("cpu", 4, recompute=True, runtime_bytes=0))
    assert recomputed.activations < plain.activations
    half = predict(small_config(tiny_base, tmp_path), tokens=100, labelled=40)
    assert half.activations == pytest.approx(plain.activations / 2, rel=0.01)
    cuda = predict(small_config(tiny_base, tmp_path), Place("cuda", 2, recompute=False, runtime_bytes=0))
    assert cuda.weights == plain.weights / 2


def test_the_peak_is_the_largest_of_loading_stepping_and_sampling():
    step = MemoryPlan(runtime=10, mapped=1, weights=1, adapter=2, activations=3, working=4, loading=5)
    assert step.peak == 21
    assert replace(step, loading=50).peak == 61
    assert replace(step, sampling=50).peak == 64


def test_samples_take_memory_and_dora_what_it_makes_of_a_matrix(tiny_base: Path, tmp_path: Path):
    config, dora = small_config(tiny_base, tmp_path), small_config(tiny_base, tmp_path, lora={"dora": True})
    shape = read_shape(BaseFiles(tiny_base, "tiny", None))

    def sampled(config: TrainConfig, tokens: int) -> int:
        return plan_memory(shape, config.model, config.lora, config.optim, CPU, 200, 80, tokens).sampling

    assert sampled(config, 0) == 0
    assert sampled(config, 200) == 2 * sampled(config, 100)
    matrix = 4 * (128 * (128 + 64) + 3 * 128 * 64)  # of down_proj: an identity, the update, and three copies
    assert sampled(dora, 100) - sampled(config, 100) == matrix
    few = [plan_memory(shape, each.model, each.lora, each.optim, CPU, 1, 1).working for each in (config, dora)]
    assert few[1] == max(matrix, few[0])
