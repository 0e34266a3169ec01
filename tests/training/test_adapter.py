"""A trained adapter directory carries the probes of the very model that was trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training.recipes import small_config
from training import adapter as adapter_module
from training.artifact import PROBES_NAME, read_probes, verify_adapter
from training.certificate import certify, read_held_out
from training.ground import Onto
from training.merge import merge
from training.probes import probe_error
from training.reading import load_adapted
from training.train import train

CPU = torch.device("cpu")


@pytest.mark.parametrize("lora", [{"dropout": 0.1}, {"dora": True, "rslora": True}])
def test_a_run_on_nf4_records_probes_that_loading_it_again_repeats(tiny_base: Path, tmp_path: Path, lora):
    config = small_config(
        tiny_base, tmp_path, model={"quantisation": "nf4"}, lora=lora, optim={"learning_rate": 2e-2, "max_steps": 3}
    )
    manifest = train(config, tmp_path / "run", tmp_path)
    adapter = tmp_path / "run" / "adapter"
    assert PROBES_NAME in verify_adapter(adapter).files
    probes = read_probes(adapter)
    assert (probes.compute, probes.dtype, probes.plain.dtype) == ("nf4", "float32", "float32")
    again = probe_error(load_adapted(adapter, tiny_base, manifest, Onto.DEQUANTISED, torch.float32, CPU), probes)
    assert again.error_nats < 1e-4 < again.effect_nats
    chats = read_held_out(tmp_path / "run" / "held_out.jsonl", 4)
    for onto in Onto:
        found = merge(
            adapter,
            tiny_base,
            tmp_path / onto.value,
            None,
            lambda merged, onto=onto: certify(adapter, tiny_base, merged, chats, CPU, onto),
            onto,
        )
        assert found.passed, found.failures
        assert found.probes.error_nats < 1e-4  # on either base there is a reference


def test_a_run_that_cannot_read_its_base_again_is_whole_without_scores_on_it(tiny_base, tmp_path, monkeypatch, capsys):
    def gone(*_: object) -> None:
        raise FileNotFoundError(2, "No such file or directory", "model.safetensors")

    monkeypatch.setattr(adapter_module, "plain_scores", gone)
    train(small_config(tiny_base, tmp_path, model={"quantisation": "nf4"}), tmp_path / "run", tmp_path)
    verify_adapter(tmp_path / "run" / "adapter")
    assert read_probes(tmp_path / "run" / "adapter").plain is None
    assert "the probes have no scores on the plain base" in capsys.readouterr().err
