"""Forty ways to be wrong are refused with their reasons by the real engine, and a right adapter is not."""

from __future__ import annotations

import asyncio
import json
import math
import os
import pickle
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from serving.engine.engine import WeightFormat
from serving.engine.transformers_engine import TransformersEngine
from serving.errors import AdapterRejected
from serving.registry.probing import ALLOWED_16BIT_NATS, ALLOWED_FLOAT32_NATS, ALLOWED_NF4_SHARE
from serving.registry.revision import Reference, RevisionStatus
from tests.serving.registry.adapters import (
    change_config,
    change_manifest,
    change_tensors,
    opened,
    sign,
)
from tests.tiny import make_tiny_adapter, make_tiny_model
from training.artifact import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PROBES_NAME
from training.model import load_base
from training.probes import add_plain_scores, plain_scores, write_probes

FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


def without(part):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def each(part, change):
    return lambda tensors: {name: change(t).contiguous() if part in name else t for name, t in tensors.items()}


def at(index, value):
    def put(tensor):
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return put


def renamed(old, new):
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def edit_probes(directory, change):
    path = directory / PROBES_NAME
    probes = json.loads(path.read_text())
    change(probes)
    path.write_text(json.dumps(probes))
    sign(directory)


def write(name, data):
    def change(directory):
        (directory / name).write_bytes(data)

    return change


def signed(change):
    def both(directory):
        change(directory)
        sign(directory)

    return both


def leave(directory):
    """Puts a link where the weights were, to the same bytes elsewhere."""
    outside = directory.parent / "outside.safetensors"
    shutil.move(directory / ADAPTER_WEIGHTS, outside)
    (directory / ADAPTER_WEIGHTS).symlink_to(outside)


def tear(directory):
    path = directory / ADAPTER_WEIGHTS
    path.write_bytes(path.read_bytes()[:-1000])


def flip(directory):
    path = directory / ADAPTER_WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def tensors(change):
    return lambda directory: change_tensors(directory, change)


def config(**changes):
    return lambda directory: change_config(directory, **changes)


def manifest(section, **changes):
    return lambda directory: change_manifest(directory, section, **changes)


def probes(change):
    return lambda directory: edit_probes(directory, change)


def swap_ids(document):
    for probe in document["probes"]:
        probe["ids"].reverse()


BAD = {
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "no manifest.json"),
    "a manifest that is no JSON": (write("manifest.json", b"{"), "manifest.json: "),
    "a manifest of another format": (write("manifest.json", b"{}"), "Field required"),
    "a torn file": (tear, f"{ADAPTER_WEIGHTS}: changed since training"),
    "a flipped bit": (flip, f"{ADAPTER_WEIGHTS}: changed since training"),
    "a torn file with its hash": (signed(tear), f"{ADAPTER_WEIGHTS} cannot be read"),
    "a missing file": (lambda d: (d / "tokenizer.json").unlink(), "tokenizer.json: missing"),
    "a missing file that the manifest does not know": (
        signed(lambda d: (d / "chat_template.jinja").unlink()),
        "chat_template.jinja: required, but not in the manifest",
    ),
    "an extra file": (write("special_tokens_map.json", b"{}"), "special_tokens_map.json: added since training"),
    "an empty file of weights": (signed(write(ADAPTER_WEIGHTS, b"")), f"{ADAPTER_WEIGHTS} cannot be read"),
    "pickled weights": (signed(write("adapter_model.bin", pickle.dumps({}))), "adapter_model.bin: may run code"),
    "a PyTorch file": (signed(write("extra.pt", b"x")), "extra.pt: may run code"),
    "a module": (signed(write("modeling.py", b"x = 1")), "modeling.py: may run code"),
    "a link that leaves": (leave, f"{ADAPTER_WEIGHTS}: a link that leaves the adapter"),
    "a link to nothing": (lambda d: (d / "more").symlink_to("nothing"), "more: a link to no file"),
    "a directory linked in": (lambda d: (d / "more").symlink_to("/etc"), "more: a link that leaves the adapter"),
    "a pipe": (lambda d: os.mkfifo(d / "pipe"), "pipe: neither a file nor a directory"),
    "a foreign base": (manifest("base", fingerprint="0" * 64), "base fingerprint 000000000000"),
    "a foreign template": (manifest("chat", template_sha256="0" * 64), "template hash 000000000000"),
    "a file outside by its name": (manifest("", files={"../x": "0" * 64}), "../x: lies outside the adapter"),
    "a file's name that none can have": (manifest("", files={"a\0b": "0" * 64}), "names what can be no file"),
    "NaN": (tensors(each("q_proj.lora_A", at((0, 0), torch.nan))), "q_proj.lora_A: holds NaN or infinite"),
    "infinity": (tensors(each("down_proj.lora_B", at((0, 0), torch.inf))), "down_proj.lora_B: holds NaN or infinite"),
    "values that overflow": (tensors(each("lora_B", lambda t: t * 1e38)), "are not finite"),
    "half a pair": (tensors(without(f"{FIRST}.lora_B")), "q_proj: has lora_A only"),
    "no tensors": (tensors(lambda _: {}), "and no tensor belongs to it; and 9 more"),
    "a transposed half": (tensors(each("q_proj.lora_A", lambda t: t.T)), "q_proj.lora_A: shape (64, 4)"),
    "a square update transposed": (tensors(each("lora_A", lambda t: t.flip(1))), "from those that peft computed"),
    "a dropped layer": (tensors(without("layers.1.")), "layers.1.mlp.down_proj', and no tensor belongs to it"),
    "a dropped module": (tensors(without("up_proj")), "mlp.up_proj', and no tensor belongs to it"),
    "another architecture's modules": (tensors(renamed("self_attn", "attention")), "no linear layer of this base"),
    "an adapter of the embedding": (
        tensors(renamed("layers.0.self_attn.q_proj", "embed_tokens")),
        "the embedding or of lm_head is not supported",
    ),
    "DoRA": (config(use_dora=True), "use_dora=True is not supported"),
    "DoRA's vectors": (
        tensors(lambda t: {**t, f"{FIRST}.lora_magnitude_vector": torch.ones(64)}),
        "DoRA is not supported",
    ),
    "modules to save": (config(modules_to_save=["lm_head"]), "modules_to_save=['lm_head'] is not supported"),
    "trained biases": (config(bias="all"), "adapter_config.json: bias"),
    "no LoRA": (config(peft_type="IA3"), "adapter_config.json: peft_type"),
    "a start that changes the base": (config(init_lora_weights="pissa"), "also changes the base's weights"),
    "another scale": (config(lora_alpha=16), "from those that peft computed"),
    "the scale of rsLoRA": (config(use_rslora=True), "from those that peft computed"),
    "another rank": (config(r=8), "r is 8, the manifest says rank 4"),
    "no rank": (config(r=None), "no rank can be read"),
    "an infinite rank": (config(r=math.inf), "no rank can be read"),
    "a configuration nested without end": (signed(write(ADAPTER_CONFIG, b"[" * 10**6)), "no rank can be read"),
    "a rank pattern": (config(rank_pattern={"q_proj": 2}), "q_proj.lora_A: shape (4, 64), this base and rank need (2"),
    "a rank above the limit": (config(rank_pattern={"q_proj": 64}), "serve with --max-rank 64"),
    "zeros": (tensors(each("lora_B", torch.zeros_like)), "it changes nothing"),
    "other weights": (tensors(each("lora_B", lambda t: t * 1.5)), "from those that peft computed"),
    "a single wrong layer": (
        tensors(each("layers.0.mlp.down_proj.lora_B", lambda t: -t)),
        "from those that peft computed",
    ),
    "weights rounded to one bit of precision": (
        tensors(each("lora_", lambda t: t.to(torch.float8_e5m2).float())),
        "from those that peft computed",
    ),
    "probes that are none": (signed(write(PROBES_NAME, b"{}")), "probes.json: "),
    "probes of another vocabulary": (
        probes(lambda d: d["probes"][0]["ids"].__setitem__(0, 10**6)),
        "probes: the engine refuses one",
    ),
    "probes of another text": (probes(swap_ids), "from those that peft computed"),
}


@pytest.fixture(scope="module")
def adapter(tiny_base, tmp_path_factory):
    return make_tiny_adapter(tiny_base, tmp_path_factory.mktemp("right") / "adapter", "right", 11)


def real_engine(base):
    return TransformersEngine(base, max_batch=4, context_length=512)


def test_forty_kinds_of_bad_adapters_are_refused_and_what_serves_goes_on(tiny_base, adapter, tmp_path):
    """One registry meets all of them, so that what one leaves behind would be seen with the next."""

    async def check():
        engine = real_engine(tiny_base)
        options = {"adapters": {"right": adapter}, "adapter_roots": [tmp_path], "state_dir": tmp_path / "state"}
        async with opened(tiny_base, engine, **options) as registry:
            served, answers = registry.resolve("right"), {}
            for number, (kind, (change, reason)) in enumerate(BAD.items()):
                directory = shutil.copytree(adapter, tmp_path / str(number) / "bad")
                change(directory)
                answers[kind] = (reason, await refusal(registry, f"{number}/bad"))
            assert {
                kind: told
                for kind, (reason, told) in answers.items()
                if reason not in told or not told.startswith("422")
            } == {}
            assert registry.resolve("right") == served
            assert [each.id for each in registry.revisions()] == [served.revision]
            assert registry.residency.resident() == (served.variant.digest,)
            assert [path.name for path in (tmp_path / "state" / "revisions").iterdir()] == [served.variant.digest]
            assert len(await registry.refusals()) == len(BAD)
            lease = registry.lease("right")
            await lease.ready()
            lease.release()

    assert len(BAD) >= 40
    asyncio.run(check())


async def refusal(registry, path):
    try:
        await registry.register("bad", Path(path), "stable")
    except AdapterRejected as error:
        return f"{error.status}: {error.message}"
    return "admitted"


def test_every_reason_is_told_at_once(tiny_base, adapter, tmp_path):
    directory = shutil.copytree(adapter, tmp_path / "bad")
    change_manifest(directory, "base", fingerprint="0" * 64)
    change_manifest(directory, "chat", template_sha256="0" * 64)
    change_manifest(directory, "lora", rank=5)
    (directory / "tokenizer.json").unlink()
    (directory / "extra.pkl").write_bytes(b"")

    async def check():
        async with opened(tiny_base, adapter_roots=[tmp_path]) as registry:
            told = await refusal(registry, "bad")
            for reason in ("base fingerprint", "template hash", "rank 5", "tokenizer.json: missing", "may run code"):
                assert reason in told
            assert (await registry.refusals())[0].reasons[0].startswith("extra.pkl")

    asyncio.run(check())


def test_an_adapter_of_another_base_with_the_same_shape_is_found_out_by_its_probes(tiny_base, tmp_path):
    """Its manifest is forged: the fingerprint alone would not see it."""
    other = make_tiny_model(tmp_path / "other", seed=5)
    directory = make_tiny_adapter(other, tmp_path / "foreign", "foreign", 1)

    async def check():
        async with opened(tiny_base, real_engine(tiny_base), adapter_roots=[tmp_path]) as registry:
            base = registry.base.fingerprint
            change_manifest(directory, "base", fingerprint=base)
            assert "from those that peft computed" in await refusal(registry, "foreign")

    asyncio.run(check())


def test_the_engine_computes_what_peft_does_and_an_adapter_without_probes_is_admitted_as_such(
    tiny_base, adapter, tmp_path
):
    shutil.copytree(adapter, tmp_path / "with")
    bare = shutil.copytree(adapter, tmp_path / "without")
    (bare / PROBES_NAME).unlink()
    sign(bare)

    async def check():
        async with opened(tiny_base, real_engine(tiny_base), adapter_roots=[tmp_path]) as registry:
            revision = await registry.register("a", Path("with"))
            assert revision.status is RevisionStatus.ADMITTED
            assert revision.probe.reference is Reference.MATCHED
            assert revision.probe.from_reference_nats < 1e-4 < revision.probe.from_base_nats
            assert revision.load_s > 0
            revision = await registry.register("a", Path("without"))
            assert revision.probe.reference is Reference.NONE
            assert revision.probe.from_reference_nats is None
        async with opened(tiny_base, adapter_roots=[tmp_path]) as registry:
            assert (await registry.register("a", Path("with"))).probe.reference is Reference.SIMULATED

    asyncio.run(check())


def references(compute, dtype, *, base_nats=0.0, effect=1.0, adapter_nats=0.0):
    """Makes the probes those of another training: on a base that lies apart, with another effect, or rounded."""

    def change(document):
        document.update(compute=compute, dtype=dtype)
        for probe in document["probes"]:
            pairs = list(zip(probe["base_logprobs"], probe["adapter_logprobs"], strict=True))
            probe["base_logprobs"] = [base + base_nats for base, _ in pairs]
            probe["adapter_logprobs"] = [
                base + base_nats + effect * (adapter - base) + adapter_nats for base, adapter in pairs
            ]

    return probes(change)


# Allowed nats, or None for a refusal; beside NF4 a share of the distance from the base.
TOLERANCES = {
    "a quantised base": (references("nf4", "bfloat16", base_nats=0.4), ALLOWED_NF4_SHARE),
    "an effect that quantisation moved": (
        references("nf4", "bfloat16", base_nats=0.4, effect=0.8),
        0.8 * ALLOWED_NF4_SHARE,
    ),
    "twice the scale of NF4": (references("nf4", "bfloat16", base_nats=0.4, effect=0.5), None),
    "the other way than NF4": (references("nf4", "bfloat16", effect=-1.0), None),
    "rounding of 16 bits": (references("plain", "bfloat16", adapter_nats=0.02), 0.05),
    "rounding of half the precision": (references("plain", "float16", base_nats=0.02, adapter_nats=-0.05), 0.05),
    "more than rounding of 16 bits": (references("plain", "bfloat16", adapter_nats=0.2), None),
    "another base in 16 bits": (references("plain", "bfloat16", base_nats=0.4), None),
    "an engine that rounds more than peft": (references("plain", "float32", base_nats=0.02), 0.05),
    "rounding that float32 has not": (references("plain", "float32", adapter_nats=0.02), None),
}


def test_what_is_allowed_is_what_the_precisions_of_training_and_engine_explain(tiny_base, adapter, tmp_path):
    async def check():
        async with opened(tiny_base, real_engine(tiny_base), adapter_roots=[tmp_path]) as registry:
            for number, (kind, (change, allowed)) in enumerate(TOLERANCES.items()):
                change(shutil.copytree(adapter, tmp_path / str(number)))
                if allowed is None:
                    assert "from those that peft computed" in await refusal(registry, str(number)), kind
                    continue
                found = (await registry.register("a", Path(str(number)))).probe
                share = found.from_base_nats if "nf4" in (tmp_path / str(number) / PROBES_NAME).read_text() else 1.0
                assert found.reference is Reference.MATCHED, kind
                assert found.allowed_nats == pytest.approx(allowed * share, rel=1e-3), kind
                assert found.from_reference_nats <= found.allowed_nats, kind

    asyncio.run(check())


def test_probes_longer_than_the_context_say_what_to_serve_with(tiny_base, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "a")

    async def check():
        engine = TransformersEngine(tiny_base, max_batch=2, context_length=16)
        async with opened(tiny_base, engine, adapter_roots=[tmp_path]) as registry:
            assert "--context-length" in await refusal(registry, "a")

    asyncio.run(check())


def test_a_bad_adapter_differs_in_what_it_says(adapter, tmp_path):
    directory = shutil.copytree(adapter, tmp_path / "a")
    change_tensors(directory, each("q_proj.lora_A", lambda t: t * 2))
    before, after = load_file(adapter / ADAPTER_WEIGHTS), load_file(directory / ADAPTER_WEIGHTS)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "q_proj.lora_A" in name}
    assert changed


def make_nf4_probes(base, directory):
    """Makes an adapter's probes those of a training on the NF4 base."""
    trained = peft.PeftModel.from_pretrained(load_base(base, "nf4", torch.float32, torch.device("cpu")), str(directory))
    write_probes(directory, trained, AutoTokenizer.from_pretrained(base), None)
    sign(directory)


def test_on_the_base_that_was_trained_on_nf4_is_held_to_what_float32_explains(tiny_base, adapter, tmp_path):
    _, right, wrong = (shutil.copytree(adapter, tmp_path / name) for name in ("plain", "right", "wrong"))
    for directory in (right, wrong):
        make_nf4_probes(tiny_base, directory)
    change_tensors(wrong, each("lora_B", lambda t: t * 1.02))

    async def check():
        engine = TransformersEngine(tiny_base, max_batch=4, context_length=512, weights=WeightFormat.NF4)
        options = {"adapter_roots": [tmp_path], "weights": WeightFormat.NF4}
        async with opened(tiny_base, engine, **options) as registry:
            found = (await registry.register("a", Path("right"))).probe
            assert found.reference is Reference.MATCHED
            assert found.from_reference_nats < 1e-4
            assert found.allowed_nats == ALLOWED_FLOAT32_NATS
            assert "from those that peft computed (nf4, float32)" in await refusal(registry, "wrong")
            found = (await registry.register("a", Path("plain"))).probe
            assert found.allowed_nats > 10 * ALLOWED_FLOAT32_NATS, "a plain reference is another base than this"
        async with opened(tiny_base, real_engine(tiny_base), adapter_roots=[tmp_path]) as registry:
            assert (await registry.register("a", Path("wrong"))).probe.allowed_nats > 10 * ALLOWED_FLOAT32_NATS

    asyncio.run(check())


def test_on_the_plain_base_an_nf4_training_is_held_to_its_scores_there(tiny_base, adapter, tmp_path):
    """Without them half the scale is not told apart from the right one."""
    right, half = (shutil.copytree(adapter, tmp_path / name) for name in ("right", "half"))
    for directory in (right, half):
        make_nf4_probes(tiny_base, directory)
        add_plain_scores(directory, plain_scores(directory, tiny_base, torch.device("cpu")))
        sign(directory)
    change_tensors(half, each("lora_B", lambda t: t * 0.5))

    async def check():
        async with opened(tiny_base, real_engine(tiny_base), adapter_roots=[tmp_path]) as registry:
            found = (await registry.register("a", Path("right"))).probe
            assert found.from_reference_nats < 1e-4
            assert found.allowed_nats == ALLOWED_FLOAT32_NATS
            assert "from those that peft computed (plain, float32)" in await refusal(registry, "half")

    asyncio.run(check())


def test_an_fp16_base_is_held_to_what_16_bits_explain(tiny_base, adapter, tmp_path):
    _, wrong = (shutil.copytree(adapter, tmp_path / name) for name in ("right", "wrong"))
    change_tensors(wrong, each("lora_B", lambda t: t * 1.5))

    async def check():
        engine = TransformersEngine(tiny_base, max_batch=4, context_length=512, device="cpu", weights=WeightFormat.FP16)
        options = {"adapter_roots": [tmp_path], "weights": WeightFormat.FP16}
        async with opened(tiny_base, engine, **options) as registry:
            found = (await registry.register("a", Path("right"))).probe
            assert found.allowed_nats == ALLOWED_16BIT_NATS
            assert 1e-6 < found.from_reference_nats < 0.01
            assert "from those that peft computed" in await refusal(registry, "wrong")

    asyncio.run(check())
