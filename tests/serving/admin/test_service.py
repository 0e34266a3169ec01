"""An adapter that comes from a hub goes through the same gate as one from a path, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from serving.admin.protocol import RegisterRequest
from serving.admin.service import Administration
from serving.engine.fake_engine import FakeEngine
from serving.engine.host import EngineHost
from serving.errors import AdapterRejected, HubUnreachable
from serving.fair_queue import FairQueue
from serving.generation import Generation
from serving.limits import Limiter
from serving.metrics import Metrics
from serving.registry.boot import open_registry
from serving.shadow import Shadows
from serving.shadow_log import ShadowLog
from tests.serving.admin.hub_server import running_hub
from tests.serving.engine.contract import until
from training.artifact import hash_files, read_manifest, write_manifest


def with_administration(tiny_base, state, hub, check):
    async def run():
        registry = open_registry("base", tiny_base, state_dir=state)
        engine = FakeEngine(context_length=512, vocabulary_size=registry.base.vocabulary.size)
        host, metrics = EngineHost(engine, registry.start), Metrics(engine.stats)
        generation = Generation(host, registry.base.vocabulary, metrics, FairQueue(1, 1), Limiter())
        shadows = Shadows(generation, registry, metrics, ShadowLog(state), max_batch=1)
        host.start()
        try:
            await until(host.ready)
            await check(Administration(registry, shadows, hub), registry)
        finally:
            await host.stop()
            await registry.close()
            generation.close()

    asyncio.run(run())


@pytest.fixture
def files(tiny_adapters, tmp_path_factory):
    """An adapter as the training writes it, without peft's model card."""
    directory = tmp_path_factory.mktemp("hub") / "adapter"
    shutil.copytree(tiny_adapters["starter"], directory)
    (directory / "README.md").unlink()
    write_manifest(directory, read_manifest(directory).model_copy(update={"files": hash_files(directory)}))
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_an_adapter_comes_from_a_hub(tiny_base, files, tmp_path):
    seen: set[Path] = set()

    class Watching(dict[str, bytes]):
        def __getitem__(self, name: str) -> bytes:
            seen.update(tmp_path.rglob("hub-*"))
            return super().__getitem__(name)

    files = Watching(files | {"README.md": b"no part of it", ".gitattributes": b"nor this"})

    async def check(administration, registry):
        body = RegisterRequest(name="starter", hub_id="ann/tuned", hub_revision="v1", label="stable")
        made = await administration.register(body)
        assert (made.status, made.labels) == ("admitted", ["stable"])
        assert registry.resolve("starter").revision == made.id
        assert not list(tmp_path.rglob("hub-*"))

    with running_hub("ann/tuned", files) as (url, _):
        with_administration(tiny_base, tmp_path, url, check)
    (within,) = seen
    within.mkdir()  # as a process that was killed leaves it
    open_registry("base", tiny_base, state_dir=tmp_path)
    assert not within.exists()


def test_a_bad_one_is_refused_by_the_hubs_id(tiny_base, files, tmp_path):
    files["adapter_model.safetensors"] = b"damaged"

    async def check(administration, registry):
        with pytest.raises(AdapterRejected, match="starter=ann/tuned is refused"):
            await administration.register(RegisterRequest(name="starter", hub_id="ann/tuned"))
        assert registry.revisions() == []
        assert not list(tmp_path.rglob("hub-*"))

    with running_hub("ann/tuned", files) as (url, _):
        with_administration(tiny_base, tmp_path, url, check)


def test_without_a_network_nothing_is_left(tiny_base, tmp_path):
    async def check(administration, registry):
        with pytest.raises(HubUnreachable, match="register it by `path`"):
            await administration.register(RegisterRequest(name="starter", hub_id="ann/tuned"))
        assert not list(tmp_path.rglob("hub-*"))

    with_administration(tiny_base, tmp_path, "http://127.0.0.1:9", check)
