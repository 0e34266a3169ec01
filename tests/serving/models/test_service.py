"""Every served model is listed with its revision."""

from __future__ import annotations

from serving.models.service import describe, list_models
from serving.registry.catalog import load_catalog


def test_the_list_has_every_model(tiny_base, tiny_adapters):
    catalog = load_catalog("base", tiny_base, adapters=tiny_adapters, merged={})
    listed = {model.id: model for model in list_models(catalog).data}
    assert list(listed) == ["base", "starter", "other"]
    assert (listed["base"].kind, listed["base"].parent) == ("base", None)
    assert (listed["starter"].kind, listed["starter"].parent) == ("adapter", "base")
    assert listed["starter"].revision.startswith("starter@")
    assert describe(catalog.resolve("starter"), "starter@ab").id == "starter@ab"
