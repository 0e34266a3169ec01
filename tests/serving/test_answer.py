"""An answer says which weights gave it."""

from __future__ import annotations

import importlib.metadata

from serving.answer import identify
from serving.registry.boot import open_registry


def test_the_fingerprint_names_version_and_weights(tiny_base, tiny_adapters):
    registry = open_registry("base", tiny_base, adapters=tiny_adapters)
    version = importlib.metadata.version("graft")
    for model in registry.served():
        identity = identify("chatcmpl", model)
        assert identity.fingerprint == f"graft-{version}-{model.variant.digest[:12]}"
        assert identity.id.startswith("chatcmpl-")
        own = {"x-adapter-revision": model.revision} if model.is_adapter else {}
        assert identity.headers(None) == own
        assert identity.headers("canary") == {**own, "x-adapter-label": "canary"}
    assert identify("a", model).id != identify("a", model).id
