"""The predicted memory is what the model under training really holds, part by part."""

from __future__ import annotations

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


def kept_by_autograd(run: Run, rows: int) -> tuple[int, int, int]:
    """Returns the bytes that a pack's forward pass keeps for its backward pass, its tokens and its labelled tokens."""
    saved: list[torch.Tensor] = []
    parameters = {p.untyped_storage().data_ptr() for p in run.peft_model.parameters()}
    (pack,) = pack_rows(run.data.train[:rows], 100_000)

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = run.loss.train()(pack)
    kept = storage_bytes(saved)
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
    ],
    ids=["plain", "nf4", "dropout", "rank", "two-modules"],
)
def test_activations_are_what_autograd_keeps(tiny_base: Path, tmp_path: Path, sections: dict[str, Any]):
    config = small_config(tiny_base, tmp_path, **sections)
    kept, tokens, labelled = kept_by_autograd(assemble(config, tmp_path, tmp_path), 12)
    # The first of the two blocks keeps less: its input needs no gradient.
    assert predict(config, tokens=tokens, labelled=labelled).activations == pytest.approx(kept, rel=0.12)


@pytest.mark.parametrize("quantisation", ["none", "nf4"])
def test_weights_and_adapter_are_what_the_model_holds(tiny_base: Path, tmp_path: Path, quantisation: str):
    config = small_config(tiny_base, tmp_path, model={"quantisation": quantisation})
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


def test_the_peak_is_the_larger_of_loading_and_stepping():
    step = MemoryPlan(runtime=10, mapped=1, weights=1, adapter=2, activations=3, working=4, loading=5)
    assert step.peak == 21
    assert MemoryPlan(runtime=10, mapped=1, weights=1, adapter=2, activations=3, working=4, loading=50).peak == 61
