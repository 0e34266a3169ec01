"""The catalog names merged models by their weights, and refuses those that must not run here."""

from __future__ import annotations

import json

import pytest

from serving.engine.engine import VariantKind
from serving.errors import ModelRejected
from serving.registry.boot import open_registry
from serving.registry.catalog import load_catalog
from tests.tiny import make_certificate, make_tiny_adapter, make_tiny_model
from training.artifact import fingerprint_base


def test_a_merged_model_is_named_by_its_weights(tiny_base, tmp_path):
    merged = make_tiny_model(tmp_path / "merged", seed=5)
    found = load_catalog("base", tiny_base, {"merged": merged}).models["merged"]
    assert (found.variant.kind, found.variant.digest) == (VariantKind.MERGED, fingerprint_base(merged))
    assert found.revision == "merged"


@pytest.mark.parametrize(("mode", "rendered"), [("qwen", "You are Qwen."), ("model", None)])
def test_a_merged_model_is_prompted_as_its_adapter_was_trained(tiny_base, tmp_path, mode, rendered):
    adapter = make_tiny_adapter(tiny_base, tmp_path / "adapter", "a", 1, mode=mode, system_prompt="You are Qwen.")
    merged = make_tiny_model(tmp_path / "merged", seed=5)
    make_certificate(merged, adapter)
    found = open_registry("base", tiny_base, adapters={"a": adapter}, merged={"m": merged})
    assert found.resolve("m").system_prompt == found.resolve("a").system_prompt == rendered
    assert found.resolve("m").stop_token_ids == found.resolve("a").stop_token_ids


@pytest.mark.parametrize(
    ("change", "told"),
    [({"kl_nats_mean": 0.2}, "did not pass"), ({"merged_fingerprint": "0" * 64}, "changed since the merge")],
)
def test_an_unproven_merged_model_is_refused(tiny_base, tiny_adapters, tmp_path, change, told):
    merged = make_tiny_model(tmp_path / "merged", seed=5)
    make_certificate(merged, tiny_adapters["starter"], **change)
    with pytest.raises(ModelRejected, match=told):
        load_catalog("base", tiny_base, {"m": merged})


def test_a_merged_model_with_another_template_or_vocabulary_is_refused(tiny_base, tmp_path):
    merged = make_tiny_model(tmp_path / "merged", seed=5)
    template = merged / "chat_template.jinja"
    template.write_text(template.read_text() + "{# another #}")
    tokenizer = json.loads((merged / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 400, "content": "<|new|>"})
    (merged / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelRejected) as caught:
        load_catalog("base", tiny_base, {"merged": merged})
    assert "template hash" in caught.value.message
    assert "vocabulary" in caught.value.message


def test_an_empty_merged_directory_is_refused(tiny_base, tmp_path):
    with pytest.raises(ModelRejected, match="merged model m="):
        load_catalog("base", tiny_base, {"m": tmp_path})
