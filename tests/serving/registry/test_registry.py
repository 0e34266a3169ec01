"""Requests keep the revision they began with, changes are whole or refused, and nothing piles up."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from serving.engine.engine import GenerationRequest, Sampling
from serving.engine.fake_engine import FakeEngine
from serving.engine.transformers_engine import TransformersEngine
from serving.errors import (
    AdapterRejected,
    BadRequest,
    Conflict,
    ModelNotFound,
    NameTaken,
    NotReady,
    PathRefused,
    RevisionUnavailable,
)
from serving.registry.boot import open_registry
from serving.registry.revision import RevisionStatus
from serving.registry.routing import Policy
from tests.serving.engine.contract import until
from tests.serving.registry.adapters import digest_of, fake_engine, opened, vary


@pytest.fixture(scope="module")
def root(tiny_adapters, tmp_path_factory):
    """A root with adapters `v1` to `v6`."""
    directory = tmp_path_factory.mktemp("root")
    for number in range(1, 7):
        vary(tiny_adapters["starter"], directory / f"v{number}", number)
    return directory


def run(check, base, root, **options):
    """Runs `check(registry, engine)` on a registry that serves v1 as a:stable."""

    async def body():
        engine = options.pop("engine", None) or fake_engine()
        async with opened(base, engine, adapter_roots=[root], **options) as registry:
            await registry.register("a", Path("v1"), "stable")
            await asyncio.wait_for(check(registry, engine), 300)

    asyncio.run(body())


def held(registry, model, key=None):
    lease = registry.lease(model, key)
    lease.release()
    return lease


async def settled():
    for _ in range(20):
        await asyncio.sleep(0.001)


def test_a_model_is_a_name_a_label_or_a_digest(tiny_base, root):
    async def check(registry, engine):
        one, two = digest_of(root / "v1"), digest_of(root / "v2")
        await registry.register("a", Path("v2"), "canary")
        for model, digest, arm in (
            ("a", one, "stable"),
            ("a:stable", one, "stable"),
            ("a:canary", two, "canary"),
            (f"a@{two}", two, None),
            (f"a@{two[:12]}", two, None),
            ("base", registry.base.fingerprint, None),
            (f"base@{registry.base.fingerprint[:6]}", registry.base.fingerprint, None),
        ):
            lease = held(registry, model)
            assert (lease.model.variant.digest, lease.arm, lease.shadow) == (digest, arm, None), model
            assert registry.resolve(model) is lease.model
        assert registry.resolve(f"a@{two}").revision == f"a@{two[:12]}"
        assert {name: model.revision for name, model in registry.served().items()} == {
            "base": "base",
            "a": f"a@{one[:12]}",
        }

    run(check, tiny_base, root)


@pytest.mark.parametrize(
    "model",
    ["", "nope", "a@", "a:", "a:nope", "a@ffffffffffff", "@", "a@x@y", "A", "a ", "base:stable", "base@", "b@1"],
)
def test_an_unknown_model_is_told_what_exists(tiny_base, root, model):
    async def check(registry, engine):
        with pytest.raises(ModelNotFound, match=r"base, a@\w{12}|live revisions of the name: a@\w{12}") as caught:
            registry.lease(model)
        assert caught.value.param == "model"

    run(check, tiny_base, root)


def test_an_ambiguous_digest_is_told_so(tiny_base, root):
    async def check(registry, engine):
        await registry.register("a", Path("v2"))
        first = digest_of(root / "v1")[0]
        shared = [number for number in range(3, 7) if digest_of(root / f"v{number}")[0] == first]
        registered = [await registry.register("a", Path(f"v{number}")) for number in (shared or range(3, 7))]
        assert registered
        prefix = next(d for d in "0123456789abcdef" if sum(r.digest[0] == d for r in registry.revisions()) != 1)
        many = [each for each in registry.revisions() if each.digest[0] == prefix]
        with pytest.raises(ModelNotFound, match="is ambiguous" if many else "does not exist"):
            registry.revision("a", prefix)
        with pytest.raises(ModelNotFound):
            registry.revision("a", "")

    run(check, tiny_base, root)


def test_nothing_is_leased_before_the_engine_runs(tiny_base, tiny_adapters):
    registry = open_registry("base", tiny_base, adapters=tiny_adapters)
    with pytest.raises(NotReady):
        registry.lease("base")
    with pytest.raises(NotReady):
        asyncio.run(registry.register("a", Path("v1")))


def test_promotion_compares_and_swaps(tiny_base, root):
    async def check(registry, engine):
        one, two, three = (digest_of(root / f"v{number}") for number in (1, 2, 3))
        await registry.register("a", Path("v2"))
        await registry.register("a", Path("v3"))
        assert (await registry.promote("a", "stable", two[:12], expected=one)).previous == one
        with pytest.raises(Conflict, match=f"points at {two[:12]}, not at the expected {one[:12]}"):
            await registry.promote("a", "stable", three, expected=one)
        with pytest.raises(Conflict, match="points at nothing"):
            await registry.promote("a", "canary", three, expected=one)
        with pytest.raises(Conflict):
            await registry.promote("a", "stable", three, expected="")
        assert registry.resolve("a").variant.digest == two
        label = await registry.promote("a", "stable", two, expected=two[:12])
        assert label.digest == two, "a digest as revisions show it"
        with pytest.raises(ModelNotFound):
            await registry.promote("a", "stable", "0" * 64)
        for label in ("", "Stable", "a b", "x" * 33, "a:b", "a@b"):
            with pytest.raises(BadRequest, match="label"):
                await registry.promote("a", label, three)

    run(check, tiny_base, root)


def test_rolling_back_goes_where_it_was_and_promoting_the_same_again_is_no_move(tiny_base, root):
    async def check(registry, engine):
        digests = [digest_of(root / f"v{number}") for number in (1, 2, 3)]
        with pytest.raises(Conflict, match="has pointed at nothing else"):
            await registry.roll_back("a", "stable")
        for number in (2, 3, 3):
            await registry.register("a", Path(f"v{number}"), "stable")
        assert (await registry.roll_back("a", "stable")).digest == digests[1]
        assert (await registry.roll_back("a", "stable")).digest == digests[0]
        await registry.promote("a", "stable", digests[2])
        await registry.retire("a", digests[1])
        await registry.promote("a", "stable", digests[0])
        await registry.promote("a", "canary", digests[0])
        await registry.roll_back("a", "stable")
        await registry.promote("a", "stable", digests[0])
        await registry.retire("a", digests[2])
        with pytest.raises(Conflict, match=f"pointed at {digests[2][:12]} before, which is not admitted"):
            await registry.roll_back("a", "stable")
        with pytest.raises(ModelNotFound, match="has no label 'nope'"):
            await registry.roll_back("a", "nope")

    run(check, tiny_base, root)


def test_policies_route_and_hold_their_labels(tiny_base, root):
    async def check(registry, engine):
        two = await registry.register("a", Path("v2"), "canary")
        three = await registry.register("a", Path("v3"), "next")
        await registry.set_policy("a", Policy({"stable": 1, "canary": 1}, sticky=True, shadow="next"))
        arms = {key: held(registry, "a", key).arm for key in map(str, range(64))}
        assert set(arms.values()) == {"stable", "canary"}
        assert {key: held(registry, "a", key).arm for key in arms} == arms
        lease = held(registry, "a")
        assert lease.shadow == three.id
        assert held(registry, "a:canary").shadow is None, "a shadow follows a name that is routed"
        await registry.promote("a", "next", two.digest)
        shadows = {held(registry, "a", key).shadow for key in arms if arms[key] == "canary"}
        assert shadows == {None}, "a revision does not shadow itself"
        assert registry.resolve("a").variant.digest == digest_of(root / "v1")
        for label in ("canary", "next"):
            with pytest.raises(Conflict, match="the policy of 'a' routes to"):
                await registry.remove_label("a", label)
        await registry.set_policy("a", None)
        await registry.remove_label("a", "canary")
        assert held(registry, "a").arm == "stable"
        for wrong in (Policy({}), Policy({"nope": 1}), Policy({"stable": 1}, shadow="nope"), Policy({"stable": 0})):
            with pytest.raises(BadRequest) as caught:
                await registry.set_policy("a", wrong)
            assert caught.value.param == "policy"
        assert registry.policy("a") is None

    run(check, tiny_base, root)


def test_a_name_that_is_never_routed_to_stable_is_resolved_by_its_heaviest_arm(tiny_base, root):
    async def check(registry, engine):
        await registry.register("b", Path("v2"), "blue")
        three = await registry.register("b", Path("v3"), "green")
        with pytest.raises(ModelNotFound):
            registry.resolve("b")
        for policy in (Policy({"blue": 1, "green": 2}), Policy({"green": 1})):
            await registry.set_policy("b", policy)
            assert registry.resolve("b").variant.digest == three.digest
            await registry.register("b", Path("v1"), "stable")  # which the policy does not route to

    run(check, tiny_base, root)


def test_what_is_listed_can_be_asked_for_and_every_name_that_answers_is_listed(tiny_base, root):
    async def check(registry, engine):
        await registry.register("b", Path("v2"), "blue")
        await registry.register("b", Path("v3"), "green")
        four = await registry.register("c", Path("v4"))
        assert set(registry.served()) == {"base", "a", "b:blue", "b:green", four.id}
        await registry.set_policy("b", Policy({"green": 1}))
        await registry.promote("c", "stable", four.digest)
        served = registry.served()
        assert set(served) == {"base", "a", "b", "c"}
        for name, model in served.items():
            assert held(registry, name).model == registry.resolve(name) == model
        (registry.directory / "revisions" / four.digest / "adapter_model.safetensors").unlink()
        for name in "ab":
            await use(registry, name)  # the only place is theirs
        with pytest.raises(RevisionUnavailable):
            await use(registry, "c")
        assert set(registry.served()) == {"base", "a", "b"}

    run(check, tiny_base, root, max_adapters=1)


def test_a_promotion_and_a_retirement_at_once_are_one_after_the_other(tiny_base, root):
    async def check(registry, engine):
        two = await registry.register("a", Path("v2"))
        for first, second, refused in ((promote, retire, 1), (retire, promote, 1)):
            outcomes = await asyncio.gather(first(registry, two), second(registry, two), return_exceptions=True)
            assert isinstance(outcomes[refused], Conflict), outcomes
            labelled = [each.label for each in registry.labels() if each.digest == two.digest]
            status = registry.revision("a", two.digest).status
            assert (labelled, status) in ((["canary"], RevisionStatus.ADMITTED), ([], RevisionStatus.RETIRED))
            if labelled:
                await registry.remove_label("a", "canary")

    async def promote(registry, revision):
        await registry.promote("a", "canary", revision.digest)

    async def retire(registry, revision):
        await registry.retire("a", revision.digest)

    run(check, tiny_base, root)


def test_a_retirement_that_is_not_waited_for_goes_on(tiny_base, root):
    async def check(registry, engine):
        one = registry.lease("a")
        await registry.remove_label("a", "stable")
        revision = await registry.retire("a", one.model.digest, wait_s=0)
        assert revision.status is RevisionStatus.RETIRING
        one.release()
        assert (await registry.retire("a", one.model.digest)).status is RevisionStatus.RETIRED

    run(check, tiny_base, root)


def test_retiring_drains_then_frees_engine_and_files(tiny_base, root, tmp_path):
    async def check(registry, engine):
        one = digest_of(root / "v1")
        lease = registry.lease("a")
        with pytest.raises(Conflict, match="a:stable points at"):
            await registry.retire("a", one)
        await registry.register("a", Path("v2"), "stable")
        retiring = asyncio.create_task(registry.retire("a", one[:12]))
        await settled()
        assert registry.revision("a", one).status is RevisionStatus.RETIRING
        for act in (lambda: registry.lease(f"a@{one}"), lambda: registry.resolve(f"a@{one}")):
            with pytest.raises(ModelNotFound, match="is retiring"):
                act()
        with pytest.raises(Conflict, match="is being retired"):
            await registry.register("a", Path("v1"))
        with pytest.raises(Conflict, match="is retiring"):
            await registry.promote("a", "stable", one)
        await lease.ready()  # the request it belongs to had not come to the engine yet
        assert [delta async for delta in engine.generate(asked(lease.model.variant))]
        assert not retiring.done()
        assert (tmp_path / "revisions" / one).is_dir()
        retiring.cancel()  # the administrator's client leaves; the drain goes on
        lease.release()
        lease.release()
        revision = await registry.retire("a", one)
        assert revision.status is RevisionStatus.RETIRED
        assert one not in engine._variants
        assert not (tmp_path / "revisions" / one).exists()
        assert await registry.retire("a", one) == revision
        with pytest.raises(ModelNotFound, match="is retired"):
            registry.lease(f"a@{one}")
        again = await registry.register("a", Path("v1"))
        assert (again.status, again.created) == (RevisionStatus.ADMITTED, revision.created)
        held(registry, f"a@{one}")

    run(check, tiny_base, root, state_dir=tmp_path)


def test_a_registration_that_is_cancelled_leaves_a_draining_request_its_weights(tiny_base, root):
    async def check(registry, engine):
        one = digest_of(root / "v1")
        lease = registry.lease("a")
        await lease.ready()
        await registry.register("a", Path("v2"), "stable")
        retiring = asyncio.create_task(registry.retire("a", one))
        deltas = engine.generate(asked(lease.model.variant))
        await anext(deltas)  # it has the only row, so the probes wait
        registering = asyncio.create_task(registry.register("b", Path("v1")))
        await until(lambda: engine.stats().waiting == 1)
        registering.cancel()
        await asyncio.gather(registering, return_exceptions=True)
        assert one in registry.residency.resident()
        await deltas.aclose()
        lease.release()
        assert (await retiring).status is RevisionStatus.RETIRED
        assert one not in engine._variants

    run(check, tiny_base, root, engine=FakeEngine(context_length=512, vocabulary_size=400, max_batch=1))


def asked(variant):
    return GenerationRequest("id", variant, (1, 2, 3), Sampling(max_tokens=4, temperature=0.0))


def test_names_share_the_files_of_one_digest_until_the_last_retires(tiny_base, root, tmp_path):
    async def check(registry, engine):
        revision = await registry.register("b", Path("v1"), "stable")
        stored = tmp_path / "revisions" / revision.digest
        await registry.remove_label("a", "stable")
        await registry.retire("a", revision.digest)
        assert stored.is_dir()
        assert revision.digest in engine._variants
        held(registry, "b")
        await registry.remove_label("b", "stable")
        await registry.retire("b", revision.digest)
        assert not stored.exists()
        assert revision.digest not in engine._variants

    run(check, tiny_base, root, state_dir=tmp_path)


def test_registering_a_known_digest_is_idempotent_and_names_are_checked(tiny_base, root):
    async def check(registry, engine):
        first = registry.revisions()
        assert await registry.register("a", Path("v1")) == first[0]
        assert registry.revisions() == first
        with pytest.raises(NameTaken) as taken:
            await registry.register("base", Path("v1"))
        assert taken.value.status == 409
        for name in ("", "a@b", "a:b", "-a", "a b", "x" * 101):
            with pytest.raises(BadRequest, match="name"):
                await registry.register(name, Path("v1"))
        with pytest.raises(BadRequest, match="label"):
            await registry.register("a", Path("v1"), "No Label")
        for path in ("../v1", str(root / "v1"), "nothing"):
            with pytest.raises(PathRefused):
                await registry.register("a", Path(path))

    run(check, tiny_base, root)


def test_a_pinned_revision_stays_and_one_place_is_left(tiny_base, root):
    async def check(registry, engine):
        one = digest_of(root / "v1")
        assert (await registry.pin("a", one, True)).pinned
        for number in range(2, 6):
            await registry.register("a", Path(f"v{number}"))
            assert one in registry.residency.resident()
        with pytest.raises(Conflict, match="would leave no place"):
            await registry.pin("a", digest_of(root / "v5"), True)
        assert not (await registry.pin("a", one, False)).pinned
        for number in (2, 3):
            await use(registry, f"a@{digest_of(root / f'v{number}')}")
        assert one not in registry.residency.resident()

    run(check, tiny_base, root, max_adapters=2)


async def use(registry, model):
    lease = registry.lease(model)
    try:
        await lease.ready()
        await lease.ready()
        return lease.model
    finally:
        lease.release()


def test_files_damaged_under_a_running_server_break_one_revision_only(tiny_base, root, tmp_path):
    async def check(registry, engine):
        await registry.register("b", Path("v2"), "stable")
        stored = tmp_path / "revisions" / digest_of(root / "v1") / "adapter_model.safetensors"
        await use(registry, "b")  # the only place is b's
        stored.unlink()
        for _ in range(2):
            with pytest.raises(RevisionUnavailable, match="safetensors: missing"):
                await use(registry, "a")
        assert registry.revision("a", digest_of(root / "v1")).status is RevisionStatus.BROKEN
        await use(registry, "b")
        assert (await registry.register("a", Path("v1"))).status is RevisionStatus.ADMITTED
        await use(registry, "a")

    run(check, tiny_base, root, state_dir=tmp_path, max_adapters=1)


def test_a_refused_adapter_changes_nothing_though_a_label_was_asked_for(tiny_base, root, tmp_path):
    bad = vary(root / "v1", root / "bad", 9)
    (bad / "tokenizer.json").unlink()

    async def check(registry, engine):
        before = registry.revisions(), registry.labels()
        with pytest.raises(AdapterRejected):
            await registry.register("a", Path("bad"), "stable")
        assert (registry.revisions(), registry.labels()) == before
        assert [(each.name, each.source) for each in await registry.refusals()] == [("a", "bad")]

    run(check, tiny_base, root)


def test_requests_at_random_and_changes_at_random_go_together(tiny_base, root):
    """Every request ends on the revision it leased, while revisions are promoted, retired and registered again."""

    async def check(registry, engine):
        draw = random.Random(1)
        stop = asyncio.Event()
        answered = []

        async def request():
            lease = registry.lease("a")
            try:
                await asyncio.sleep(draw.random() / 500)
                await lease.ready()
                deltas = [delta async for delta in engine.generate(asked(lease.model.variant))]
                answered.append((lease.model.digest, bool(deltas)))
            finally:
                lease.release()

        async def requests():
            while not stop.is_set():
                await asyncio.gather(*(request() for _ in range(4)))

        clients = [asyncio.create_task(requests()) for _ in range(3)]
        for round_number in range(24):
            number = round_number % 6 + 1
            before = registry.resolve("a").variant.digest
            revision = await registry.register("a", Path(f"v{number}"), "stable")
            if before != revision.digest:
                await registry.retire("a", before)
        stop.set()
        await asyncio.gather(*clients)
        assert len({digest for digest, _ in answered}) == 6
        assert all(ended for _, ended in answered)
        assert engine._variants == {registry.base.fingerprint, revision.digest}
        assert [each.digest for each in registry.revisions() if each.live] == [revision.digest]

    run(check, tiny_base, root, max_adapters=2)


def test_forty_revisions_churn_through_four_places_of_the_real_engine(tiny_base, tiny_adapters, tmp_path):
    engine = TransformersEngine(tiny_base, max_batch=4, context_length=128)

    async def answer(model):
        return [
            token for delta in [d async for d in engine.generate(asked(model.variant))] for token in delta.token_ids
        ]

    async def check(registry, engine):
        await churn(registry, tiny_adapters["starter"], tmp_path, 40, answer)
        stepper, _ = engine._parts()
        assert len(stepper._adapters) <= 4
        groups = {id(member.group): member.group for member in stepper.base._members.values()}
        assert {len(group._updates) for group in groups.values()} == {len(stepper._adapters)}
        await retire_all(registry)
        assert not stepper._adapters
        assert not any(group._updates for group in groups.values())

    vary(tiny_adapters["starter"], tmp_path / "v1", 999)
    run(check, tiny_base, tmp_path, engine=engine, max_adapters=4)


@pytest.mark.slow
def test_five_hundred_revisions_churn_through_four_places(tiny_base, tiny_adapters, tmp_path):
    async def answer(model):
        return model.digest

    async def check(registry, engine):
        await churn(registry, tiny_adapters["starter"], tmp_path, 500, answer)
        assert len(engine._variants) <= 5
        await retire_all(registry)
        assert engine._variants == {registry.base.fingerprint}
        assert list((registry.directory / "revisions").iterdir()) == []
        residency = registry.residency
        assert [residency._held, residency._wanted, residency._adding, residency._removing] == [{}, {}, {}, {}]
        assert not registry.uses._counts

    vary(tiny_adapters["starter"], tmp_path / "v1", 999)
    run(check, tiny_base, tmp_path, max_adapters=4)


async def churn(registry, adapter, root, count, answer):
    """Registers `count` revisions and uses them at random; each answers alike before and after it was evicted."""
    answers = {}
    for number in range(count):
        path = vary(adapter, root / f"churn{number}", number)
        revision = await registry.register("churn", Path(path.name))
        model = await use(registry, revision.id)
        answers[revision.id] = await answer(model)
        assert len(registry.residency.resident()) <= 4

    async def ask(model):
        lease = registry.lease(model)
        try:
            await lease.ready()
            assert await answer(lease.model) == answers[model]
        finally:
            lease.release()

    draw = random.Random(0)
    await asyncio.gather(*(ask(draw.choice(list(answers))) for _ in range(count)))
    assert len(registry.residency.resident()) <= 4


async def retire_all(registry):
    await registry.remove_label("a", "stable")
    for revision in registry.revisions():
        await registry.retire(revision.name, revision.digest)
    assert registry.residency.resident() == ()
