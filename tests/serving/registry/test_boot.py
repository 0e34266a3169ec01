"""A start finds everything as it was left, and says what no longer holds."""

from __future__ import annotations

import asyncio
import gc
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from serving.engine.engine import WeightFormat
from serving.errors import AdapterRejected, Conflict, ModelNotFound, RevisionUnavailable
from serving.registry.boot import open_registry
from serving.registry.revision import Revision, RevisionStatus
from serving.registry.routing import Policy
from serving.registry.state import State, StateError
from tests.serving.registry.adapters import (
    change_manifest,
    digest_of,
    fake_engine,
    opened,
    vary,
)
from tests.tiny import make_tiny_adapter, make_tiny_model


@pytest.fixture
def root(tiny_adapters, tmp_path):
    """A root with adapters `v1` to `v4`."""
    for number in range(1, 5):
        vary(tiny_adapters["starter"], tmp_path / "root" / f"v{number}", number)
    return tmp_path / "root"


@pytest.fixture
def options(root, tmp_path):
    return {"adapter_roots": [root], "state_dir": tmp_path / "state"}


def test_a_restart_keeps_revisions_labels_policies_and_pins(tiny_base, root, options):
    async def check():
        async with opened(tiny_base, **options) as registry:
            one = await registry.register("starter", Path("v1"), "stable")
            two = await registry.register("starter", Path("v2"), "canary")
            await registry.promote("starter", "stable", two.digest)
            await registry.pin("starter", two.digest, True)
            policy = Policy({"stable": 9, "canary": 1}, sticky=True)
            await registry.set_policy("starter", policy)
            with pytest.raises(AdapterRejected):
                await registry.register("bad", bad(root))
            before = registry.revisions(), registry.labels(), await registry.refusals()
        async with opened(tiny_base, **options) as registry:
            assert (registry.revisions(), registry.labels(), await registry.refusals()) == before
            assert registry.policy("starter") == policy
            assert registry.revision("starter", two.digest).pinned
            assert set(registry.residency.resident()) == {two.digest}, "labelled and pinned ones are loaded"
            assert (await registry.roll_back("starter", "stable")).digest == one.digest

    asyncio.run(check())


def bad(root):
    shutil.copytree(root / "v1", root / "bad")
    (root / "bad" / "tokenizer.json").unlink()
    return Path("bad")


def test_without_a_state_directory_the_state_ends_with_the_registry(tiny_base, tiny_adapters):
    async def check():
        async with opened(tiny_base, adapters=tiny_adapters) as registry:
            directory = registry.directory
            assert directory.is_dir()
        assert not directory.exists()

    asyncio.run(check())
    directory = open_registry("base", tiny_base).directory  # and with one that nobody closed
    gc.collect()
    assert not directory.exists()


def test_flags_are_served_at_once_and_promoted_when_they_pass(tiny_base, tiny_adapters):
    registry = open_registry("base", tiny_base, adapters=tiny_adapters)
    digest = digest_of(tiny_adapters["starter"])
    served = [model.revision for model in registry.served().values()]
    assert served == ["base", f"starter@{digest[:12]}", f"other@{digest_of(tiny_adapters['other'])[:12]}"]
    assert registry.adapters() == 2
    for model in ("starter", "starter:stable", f"starter@{digest[:4]}"):
        assert registry.resolve(model).variant.digest == digest
    with pytest.raises(ModelNotFound):
        registry.resolve("starter:canary")

    async def check():
        engine = fake_engine()
        await engine.start()
        await registry.start(engine)
        assert [model.revision for model in registry.served().values()] == served
        assert [label.label for label in registry.labels()] == ["stable", "stable"]
        await registry.close()

    asyncio.run(check())


def test_a_flag_moves_stable_only_when_its_adapter_has_changed(tiny_base, root, options):
    flag = root.parent / "flag"

    async def boot(change=None):
        async with opened(tiny_base, adapters={"a": flag}, **options) as registry:
            if change is not None:
                await change(registry)
            return registry.resolve("a").variant.digest

    async def roll_out(registry):
        await registry.register("a", Path("v3"), "stable")

    async def check():
        shutil.copytree(root / "v1", flag)
        first = digest_of(flag)
        assert await boot() == first
        assert await boot(roll_out) == digest_of(root / "v3")
        assert await boot() == digest_of(root / "v3"), "what an administrator did holds"
        shutil.rmtree(flag)
        shutil.copytree(root / "v2", flag)
        assert await boot() == digest_of(root / "v2"), "a new adapter in the flag's place wins"
        assert await boot(roll_out) == digest_of(root / "v3")

    asyncio.run(check())


def test_a_damaged_revision_is_broken_and_the_rest_serves(tiny_base, root, options):
    async def check():
        async with opened(tiny_base, **options) as registry:
            one = await registry.register("a", Path("v1"), "stable")
            two = await registry.register("b", Path("v2"), "stable")
            three = await registry.register("c", Path("v3"), "stable")
        revisions = options["state_dir"] / "revisions"
        (revisions / one.digest / "tokenizer.json").unlink()
        change_manifest(revisions / two.digest, "chat", default_system_prompt="Obey.")
        async with opened(tiny_base, **options) as registry:
            assert [model.name for model in registry.served().values()] == ["base", "c"]
            for name, reason in (("a", "tokenizer.json: missing"), ("b", "manifest.json: changed since")):
                for model in (name, f"{name}:stable"):
                    with pytest.raises(RevisionUnavailable, match=reason):
                        registry.lease(model)
            assert {label.name for label in registry.labels()} == {"a", "b", "c"}, "the labels stay"
            assert registry.revision("c", three.digest).status is RevisionStatus.ADMITTED
            healed = await registry.register("a", Path("v1"))
            assert (healed.status, healed.reasons) == (RevisionStatus.ADMITTED, ())
            assert registry.resolve("a").variant.digest == one.digest
            assert (await registry.register("b", Path("v2"))).status is RevisionStatus.ADMITTED
            assert registry.resolve("b").system_prompt is None, "not that of the changed manifest"

    asyncio.run(check())


def test_a_broken_revision_keeps_its_pin_and_its_place(tiny_base, root, options):
    async def check():
        async with opened(tiny_base, **options) as registry:
            one = await registry.register("a", Path("v1"))
            await registry.pin("a", one.digest, True)
        (options["state_dir"] / "revisions" / one.digest / "tokenizer.json").unlink()
        async with opened(tiny_base, max_adapters=2, **options) as registry:
            two = await registry.register("a", Path("v2"))
            with pytest.raises(Conflict, match="would leave no place"):
                await registry.pin("a", two.digest, True)
            await registry.register("a", Path("v1"))
            for name in ("v3", "v4"):
                await registry.register("a", Path(name))
                assert one.digest in registry.residency.resident()
        (options["state_dir"] / "revisions" / one.digest / "tokenizer.json").unlink()
        async with opened(tiny_base, max_adapters=2, **options) as registry:
            assert not (await registry.pin("a", one.digest, False)).pinned
            assert registry.revision("a", one.digest).status is RevisionStatus.BROKEN
            assert (await registry.pin("a", two.digest, True)).pinned

    asyncio.run(check())


def test_a_flag_heals_its_revision_and_leaves_the_label(tiny_base, root, options):
    async def check():
        async with opened(tiny_base, adapters={"a": root / "v1"}, **options) as registry:
            await registry.register("a", Path("v2"), "stable")
        damaged = options["state_dir"] / "revisions" / digest_of(root / "v1") / "tokenizer.json"
        damaged.unlink()
        async with opened(tiny_base, adapters={"a": root / "v1"}, **options) as registry:
            assert registry.resolve("a").variant.digest == digest_of(root / "v2")
            assert registry.revision("a", digest_of(root / "v1")).status is RevisionStatus.ADMITTED
        assert damaged.is_file()

    asyncio.run(check())


def test_on_another_base_every_revision_is_broken_and_on_its_own_again_whole(tiny_base, options, tmp_path):
    other = make_tiny_model(tmp_path / "other", seed=3)

    async def check():
        async with opened(tiny_base, **options) as registry:
            await registry.register("a", Path("v1"), "stable")
        async with opened(other, **options) as registry:
            with pytest.raises(RevisionUnavailable, match="base fingerprint"):
                registry.lease("a")
        async with opened(tiny_base, **options) as registry:
            registry.lease("a").release()

    asyncio.run(check())


def test_flags_that_cannot_be_served_stop_the_start_with_every_reason(tiny_base, tiny_adapters, tmp_path):
    directory = shutil.copytree(tiny_adapters["starter"], tmp_path / "damaged")
    (directory / "adapter_config.json").unlink()
    with (directory / "adapter_model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(AdapterRejected) as caught:
        open_registry("base", tiny_base, adapters={"damaged": directory}, state_dir=tmp_path / "state")
    assert "adapter_config.json: missing" in caught.value.message
    assert "adapter_model.safetensors: changed" in caught.value.message
    other = make_tiny_model(tmp_path / "other", seed=9)
    template = other / "chat_template.jinja"
    template.write_text(template.read_text() + "{# another #}")
    with pytest.raises(AdapterRejected, match=r"base fingerprint .* template hash"):
        open_registry("base", other, adapters=tiny_adapters, state_dir=tmp_path / "state")
    open_registry("base", tiny_base, state_dir=tmp_path / "state")  # neither of them kept the lock


def test_an_adapter_trained_in_qwen_mode_brings_its_system_prompt(tiny_base, tmp_path):
    for mode, expected in (("qwen", "You are Qwen."), ("model", None)):
        directory = make_tiny_adapter(tiny_base, tmp_path / mode, mode, 3, mode=mode, system_prompt="You are Qwen.")
        found = open_registry("base", tiny_base, adapters={mode: directory})
        assert found.resolve(mode).system_prompt == expected


def test_two_servers_cannot_share_a_state(tiny_base, options):
    registry = open_registry("base", tiny_base, **options)
    with pytest.raises(StateError, match="another server uses it"):
        open_registry("base", tiny_base, **options)
    asyncio.run(registry.close())
    asyncio.run(open_registry("base", tiny_base, **options).close())


def test_more_pins_than_places_are_told_at_the_start(tiny_base, options):
    async def check():
        async with opened(tiny_base, **options, max_adapters=3) as registry:
            for number in (1, 2):
                revision = await registry.register("a", Path(f"v{number}"))
                await registry.pin("a", revision.digest, True)

    asyncio.run(check())
    with pytest.raises(StateError, match=r"--max-adapters 2: 2 revisions are pinned; give at least 3"):
        open_registry("base", tiny_base, **options, max_adapters=2)


def test_the_largest_rank_is_that_of_what_is_known_and_at_least_sixteen(tiny_base, tiny_adapters, tmp_path):
    assert open_registry("base", tiny_base, adapters=tiny_adapters).max_rank == 16
    assert open_registry("base", tiny_base, max_rank=64).max_rank == 64
    with pytest.raises(AdapterRejected, match="rank 4, at most 2 run here; serve with --max-rank 4"):
        open_registry("base", tiny_base, adapters=tiny_adapters, max_rank=2)
    state = State(tmp_path / "state")
    with state.transaction() as change:
        change.put_revision(Revision("gone", "a" * 64, RevisionStatus.RETIRED, 1.0, 64, "b" * 64))
    state.close()
    assert open_registry("base", tiny_base, state_dir=tmp_path / "state").max_rank == 16, "what is gone needs no room"
    wide = shutil.copytree(tiny_adapters["starter"], tmp_path / "wide")
    change_manifest(wide, "lora", rank=32)
    with pytest.raises(AdapterRejected, match="r is 4, the manifest says rank 32"):
        open_registry("base", tiny_base, adapters={"wide": wide})


KILLED = """
import asyncio, os, signal, sys
from pathlib import Path
from serving.registry import enrolment
from tests.serving.registry.adapters import opened

base, root, states = map(Path, sys.argv[1:4])

def die(*arguments, **others):
    os.kill(os.getpid(), signal.SIGKILL)

async def change(point):
    async with opened(base, adapter_roots=[root], state_dir=states / point) as registry:
        one = registry.resolve("a").variant.digest
        if point == "register":
            enrolment.AdmissionGate.probe = die
        await registry.register("a", Path("v2"), "stable")
        if point == "retire":
            enrolment.Enrolment.take_out = die
        if point == "remove":
            enrolment.RevisionFiles.remove = die
        await registry.retire("a", one)

asyncio.run(change(sys.argv[4]))
"""


@pytest.mark.slow
def test_a_server_killed_inside_a_change_starts_again_with_its_labels(tiny_base, root, tmp_path):
    lives = {"register": "v1", "retire": "v2", "remove": "v2"}

    def options(point):
        return {"adapter_roots": [root], "state_dir": tmp_path / "states" / point}

    def kill():
        words = [sys.executable, "-c", KILLED, str(tiny_base), str(root), str(tmp_path / "states")]
        return [process.wait() for process in [subprocess.Popen([*words, point]) for point in lives]]

    async def check():
        for point in lives:
            async with opened(tiny_base, **options(point)) as registry:
                await registry.register("a", Path("v1"), "stable")
        assert await asyncio.to_thread(kill) == [-signal.SIGKILL] * 3
        for point, name in lives.items():
            digest = digest_of(root / name)
            async with opened(tiny_base, **options(point)) as registry:
                assert registry.resolve("a").variant.digest == digest
                assert {each.digest for each in registry.revisions() if each.live} == {digest}
                assert [path.name for path in (options(point)["state_dir"] / "revisions").iterdir()] == [digest]

    asyncio.run(check())


def test_a_state_that_was_probed_on_another_format_of_the_base_says_so(tiny_base, tmp_path, caplog):
    for weights, told in (("plain", 0), ("plain", 0), ("nf4", 1), ("nf4", 1)):
        registry = open_registry("base", tiny_base, state_dir=tmp_path, weights=WeightFormat(weights))
        asyncio.run(registry.close())
        assert caplog.text.count("were probed on a base in plain, not in nf4 as now") == told
