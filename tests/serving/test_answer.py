"""An answer says which weights gave it."""

from __future__ import annotations

import importlib.metadata

from serving.answer import identify
from serving.engine.engine import WeightFormat
from serving.registry.boot import open_registry


def test_the_fingerprint_names_version_and_weights(tiny_base, tiny_adapters):
    registry = open_registry("base", tiny_base, adapters=tiny_adapters)
    version = importlib.metadata.version("graft")
    for model in registry.served().values():
        identity = identify("chatcmpl", model)
        assert identity.fingerprint == f"graft-{version}-{model.variant.digest[:12]}"
        assert identity.id.startswith("chatcmpl-")
        own = {"x-adapter-revision": model.revision} if model.is_adapter else {}
        assert identity.headers(None) == own
        assert identity.headers("canary") == {**own, "x-adapter-label": "canary"}
    assert identify("a", model).id != identify("a", model).id


def test_the_fingerprint_names_the_format_of_the_weights(tiny_base, tiny_adapters):
    registry = open_registry("base", tiny_base, merged={"whole": tiny_base}, weights=WeightFormat.NF4)
    named = {model.name: identify("a", model).fingerprint for model in registry.served().values()}
    assert named["base"].endswith(f"{registry.base.fingerprint[:12]}-nf4")
    assert named["whole"].endswith(registry.base.fingerprint[:12]), "a merged model is plain"
