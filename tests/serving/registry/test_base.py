"""A base is read whole, or refused with the reason."""

from __future__ import annotations

import json
import shutil

import pytest

from serving.errors import ModelRejected
from serving.registry.base import load_base
from tests.tiny import TINY_CONTEXT
from training.artifact import fingerprint_base
from training.chat import end_of_turn_id, template_hash


def copy_of(directory, tmp_path):
    return shutil.copytree(directory, tmp_path / "copy")


def test_it_says_what_the_directory_says(tiny_base):
    base = load_base(tiny_base)
    assert base.fingerprint == fingerprint_base(tiny_base)
    assert base.template_sha256 == template_hash(base.tokenizer)
    assert base.max_context_tokens == TINY_CONTEXT
    assert base.vocabulary.size == len(base.tokenizer)


def test_it_stops_at_the_end_of_turn_and_at_what_generation_config_lists(tiny_base, tmp_path):
    directory = copy_of(tiny_base, tmp_path)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 7]}))
    base = load_base(directory)
    assert base.stop_token_ids == {0, 7, end_of_turn_id(base.tokenizer)}


def test_the_context_is_the_models_and_never_more(tiny_base):
    base = load_base(tiny_base)
    assert base.context_length(None) == TINY_CONTEXT
    assert base.context_length(100) == 100
    with pytest.raises(ModelRejected, match=f"9999 is more than the model's {TINY_CONTEXT}"):
        base.context_length(9999)


def test_a_huge_context_is_capped_unless_asked_for(tiny_base, tmp_path):
    directory = copy_of(tiny_base, tmp_path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 131072}))
    base = load_base(directory)
    assert (base.context_length(None), base.context_length(100_000)) == (8192, 100_000)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (lambda d: (d / "model.safetensors").unlink(), "no config.json with weights"),
        (lambda d: (d / "chat_template.jinja").unlink(), "no chat template"),
        (lambda d: (d / "config.json").write_text('{"model_type": "llama"}'), "max_position_embeddings"),
        (lambda d: [(d / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")], "cannot be served"),
        (shutil.rmtree, "cannot be served"),
    ],
)
def test_a_broken_directory_is_refused_with_the_reason(tiny_base, tmp_path, broken, reason):
    directory = copy_of(tiny_base, tmp_path)
    broken(directory)
    with pytest.raises(ModelRejected, match=reason):
        load_base(directory)
