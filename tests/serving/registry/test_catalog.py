"""The catalog finds models by name and digest, and refuses what must not run here."""

from __future__ import annotations

import json
import shutil

import pytest

from serving.engine.engine import VariantKind
from serving.errors import AdapterRejected, ModelNotFound, ModelRejected
from serving.registry.catalog import load_catalog
from tests.tiny import make_tiny_adapter, make_tiny_model
from training.artifact import MergeCertificate, fingerprint_base, read_manifest


@pytest.fixture(scope="module")
def catalog(tiny_base, tiny_adapters):
    return load_catalog("base", tiny_base, adapters=tiny_adapters, merged={})


def test_names_and_digests_resolve_to_one_revision(catalog, tiny_adapters):
    digest = read_manifest(tiny_adapters["starter"]).digest
    starter = catalog.resolve("starter")
    assert starter.variant.digest == digest
    assert starter.variant.kind is VariantKind.ADAPTER
    assert starter.revision == f"starter@{digest[:12]}"
    for model in (starter.revision, f"starter@{digest}", f"starter@{digest[:4]}"):
        assert catalog.resolve(model) is starter
    base = catalog.resolve("base")
    assert (base.revision, base.variant.kind, base.parent) == ("base", VariantKind.BASE, None)
    assert [model.name for model in catalog] == ["base", "starter", "other"]


@pytest.mark.parametrize(
    "model", ["", "nope", "starter@", "starter@ffffffffffff", "@", "starter@x@y", "Starter", "starter "]
)
def test_an_unknown_name_is_told_what_exists(catalog, model):
    with pytest.raises(ModelNotFound, match=r"served are: base, starter@\w{12}, other@\w{12}") as caught:
        catalog.resolve(model)
    assert caught.value.param == "model"


def test_a_damaged_adapter_is_refused_with_every_reason(tiny_base, tiny_adapters, tmp_path):
    directory = shutil.copytree(tiny_adapters["starter"], tmp_path / "damaged")
    (directory / "adapter_config.json").unlink()
    with (directory / "adapter_model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(AdapterRejected) as caught:
        load_catalog("base", tiny_base, adapters={"damaged": directory}, merged={})
    assert "adapter_config.json: missing" in caught.value.message
    assert "adapter_model.safetensors: changed" in caught.value.message


def test_an_adapter_of_another_base_and_template_is_refused(tiny_adapters, tmp_path):
    other = make_tiny_model(tmp_path / "other-base", seed=9)
    template = other / "chat_template.jinja"
    template.write_text(template.read_text() + "{# another #}")
    with pytest.raises(AdapterRejected) as caught:
        load_catalog("base", other, adapters=tiny_adapters, merged={})
    assert "base fingerprint" in caught.value.message
    assert "template hash" in caught.value.message


def test_an_adapter_trained_in_qwen_mode_brings_its_system_prompt(tiny_base, tmp_path):
    for mode, expected in (("qwen", "You are Qwen."), ("model", None)):
        directory = make_tiny_adapter(tiny_base, tmp_path / mode, mode, 3, mode=mode, system_prompt="You are Qwen.")
        found = load_catalog("base", tiny_base, adapters={mode: directory}, merged={})
        assert found.resolve(mode).system_prompt == expected


def test_a_merged_model_is_named_by_its_weights(tiny_base, tmp_path):
    merged = make_tiny_model(tmp_path / "merged", seed=5)
    found = load_catalog("base", tiny_base, adapters={}, merged={"merged": merged}).resolve("merged")
    assert (found.variant.kind, found.variant.digest) == (VariantKind.MERGED, fingerprint_base(merged))
    assert found.revision == "merged"


def certified(merged, adapter, **changes):
    """Writes a certificate as `training merge` does."""
    manifest = read_manifest(adapter)
    facts = {
        "adapter_digest": manifest.digest,
        "base_fingerprint": manifest.base.fingerprint,
        "merged_fingerprint": fingerprint_base(merged),
        "chat": manifest.chat,
        "dtype": "float32",
        "rows": 1,
        "positions": 1,
        "kl_nats_mean": 0.0,
        "kl_nats_max": 0.0,
        "kl_nats_allowed": 0.1,
        "kl_nats_base_mean": 1.0,
        "top1_agreement": 1.0,
        "top1_agreement_base": 0.5,
        "nll_nats_adapter": 1.0,
        "nll_nats_merged": 1.0,
    }
    text = MergeCertificate(**{**facts, **changes}).model_dump_json()
    (merged / "merge_certificate.json").write_text(text)


@pytest.mark.parametrize(("mode", "rendered"), [("qwen", "You are Qwen."), ("model", None)])
def test_a_merged_model_is_prompted_as_its_adapter_was_trained(tiny_base, tmp_path, mode, rendered):
    adapter = make_tiny_adapter(tiny_base, tmp_path / "adapter", "a", 1, mode=mode, system_prompt="You are Qwen.")
    merged = make_tiny_model(tmp_path / "merged", seed=5)
    certified(merged, adapter)
    found = load_catalog("base", tiny_base, adapters={"a": adapter}, merged={"m": merged})
    assert found.resolve("m").system_prompt == found.resolve("a").system_prompt == rendered
    assert found.resolve("m").stop_token_ids == found.resolve("a").stop_token_ids


@pytest.mark.parametrize(
    ("change", "told"),
    [({"kl_nats_mean": 0.2}, "did not pass"), ({"merged_fingerprint": "0" * 64}, "changed since the merge")],
)
def test_an_unproven_merged_model_is_refused(tiny_base, tiny_adapters, tmp_path, change, told):
    merged = make_tiny_model(tmp_path / "merged", seed=5)
    certified(merged, tiny_adapters["starter"], **change)
    with pytest.raises(ModelRejected, match=told):
        load_catalog("base", tiny_base, adapters={}, merged={"m": merged})


def test_a_merged_model_with_another_template_or_vocabulary_is_refused(tiny_base, tmp_path):
    merged = make_tiny_model(tmp_path / "merged", seed=5)
    template = merged / "chat_template.jinja"
    template.write_text(template.read_text() + "{# another #}")
    tokenizer = json.loads((merged / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 400, "content": "<|new|>"})
    (merged / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelRejected) as caught:
        load_catalog("base", tiny_base, adapters={}, merged={"merged": merged})
    assert "template hash" in caught.value.message
    assert "vocabulary" in caught.value.message


def test_an_empty_merged_directory_is_refused(tiny_base, tmp_path):
    with pytest.raises(ModelRejected, match="merged model m="):
        load_catalog("base", tiny_base, adapters={}, merged={"m": tmp_path})
