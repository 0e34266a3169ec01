"""Every served model that the key may use is listed, with its revision and labels."""

from __future__ import annotations

import asyncio
from dataclasses import asdict

from serving.auth import Caller
from serving.engine.engine import WeightFormat
from serving.engine.fake_engine import FakeEngine
from serving.engine.transformers_engine import TransformersEngine
from serving.models.service import describe, list_models
from serving.registry.boot import open_registry


def test_the_list_has_every_model_before_the_weights_are_loaded(tiny_base, tiny_adapters):
    registry = open_registry("base", tiny_base, adapters=tiny_adapters)
    listed = {model.id: model for model in list_models(registry, None).data}
    assert list(listed) == ["base", "starter", "other"]
    assert (listed["base"].kind, listed["base"].parent, listed["base"].labels) == ("base", None, {})
    assert (listed["starter"].kind, listed["starter"].parent) == ("adapter", "base")
    assert listed["starter"].revision.startswith("starter@")


def test_a_model_has_the_labels_of_its_name(tiny_base, tiny_adapters):
    async def run():
        registry = open_registry("base", tiny_base, adapters=tiny_adapters)
        engine = FakeEngine(context_length=512, vocabulary_size=registry.base.vocabulary.size)
        await engine.start()
        await registry.start(engine)
        starter = registry.resolve("starter")
        await registry.promote("starter", "canary", starter.variant.digest)
        for model_id in ("starter", "starter:canary", starter.revision):
            found = describe(registry, registry.resolve(model_id), model_id)
            assert found.id == model_id
            assert found.labels == {"stable": starter.revision, "canary": starter.revision}
        await registry.close()

    asyncio.run(run())


def test_a_key_sees_its_own_models(tiny_base, tiny_adapters):
    registry = open_registry("base", tiny_base, adapters=tiny_adapters)
    caller = Caller("ann", frozenset({"other", "base"}))
    assert [model.id for model in list_models(registry, caller).data] == ["base", "other"]


def test_a_base_in_fp16_says_what_that_costs_once_it_has_loaded(tiny_base, tiny_adapters):
    async def run():
        options = {"adapters": {"starter": tiny_adapters["starter"]}, "merged": {"whole": tiny_base}}
        registry = open_registry("base", tiny_base, weights=WeightFormat.FP16, **options)
        engine = TransformersEngine(tiny_base, max_batch=2, device="cpu", weights=registry.base.weights)

        def listed():
            return {model.id: (model.weights, model.weights_cost) for model in list_models(registry, None).data}

        assert listed() == {"base": ("fp16", None), "whole": ("plain", None), "starter": ("fp16", None)}
        await engine.start()
        try:
            await registry.start(engine)
            found = listed()
            assert found["base"][1].model_dump() == asdict(engine.weights_cost)
            assert {found[name] for name in ("whole", "starter")} == {("plain", None), ("fp16", None)}
        finally:
            await engine.stop()
            await registry.close()

    asyncio.run(run())
