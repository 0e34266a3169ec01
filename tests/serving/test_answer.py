"""An answer says which weights gave it."""

from __future__ import annotations

import importlib.metadata

from serving.answer import identify
from serving.registry.catalog import load_catalog


def test_the_fingerprint_names_version_and_weights(tiny_base, tiny_adapters):
    catalog = load_catalog("base", tiny_base, adapters=tiny_adapters, merged={})
    version = importlib.metadata.version("graft")
    for model in catalog:
        identity = identify("chatcmpl", model)
        assert identity.fingerprint == f"graft-{version}-{model.variant.digest[:12]}"
        assert identity.id.startswith("chatcmpl-")
        assert identity.headers() == ({"x-adapter-revision": model.revision} if model.is_adapter else {})
    assert identify("a", model).id != identify("a", model).id
