"""A reading holds the states before reply tokens, row by row, of a whole model or of one that is read by block."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from training.chat import TrainExample
from training.layerwise import Layerwise
from training.readable import Whole
from training.reading import load_merged, read, stored_dtype
from training.room import Room, need_of

CPU = torch.device("cpu")


def test_a_reading_predicts_the_labelled_tokens_of_each_row(tiny_base: Path):
    rows = [(tuple(range(start, start + length)), length) for start, length in ((5, 9), (60, 14), (90, 6))]
    examples = [TrainExample(ids, (-100,) * 3 + ids[3:]) for ids, _ in rows]
    model = load_merged(tiny_base, CPU)
    found = read(model, examples)
    plain = AutoModelForCausalLM.from_pretrained(tiny_base)
    for number, (ids, length) in enumerate(sorted(rows, key=lambda row: -row[1])):
        here = found.rows_N == number
        assert found.targets_N[here].tolist() == list(ids[3:])
        with torch.no_grad():
            logits = plain(torch.tensor([ids])).logits[0, 2 : length - 1]
        torch.testing.assert_close(found.hidden_ND[here] @ model.head().float().T, logits, atol=1e-4, rtol=1e-4)


def test_there_is_one_reading_of_a_model_whatever_the_room(tiny_base: Path):
    examples = [TrainExample(tuple(range(5, end)), tuple(range(5, end))) for end in (40, 20)]
    need = need_of(tiny_base, torch.float32)
    models = [load_merged(tiny_base, CPU, room=Room(size)) for size in (need.whole, need.layerwise)]
    assert [type(model) for model in models] == [Whole, Layerwise]
    whole, layerwise = (read(model, examples) for model in models)
    for name in ("hidden_ND", "targets_N", "rows_N"):
        assert torch.equal(getattr(whole, name), getattr(layerwise, name)), name


def test_a_models_dtype_is_the_one_it_says_else_its_weights(tiny_base: Path, tmp_path: Path):
    assert stored_dtype(tiny_base) == torch.float32
    AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert stored_dtype(tmp_path) == torch.bfloat16
