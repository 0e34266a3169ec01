"""The comparison of the four ways to run an adapter with what was trained, and the choice of what to merge onto."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig

from training import attention
from training.artifact import AdapterManifest, MergeCertificate, read_manifest
from training.certificate import Chat, render_held_out, write_certificate
from training.chat import IGNORED_LABEL, TrainExample
from training.distance import Distance, distances
from training.ground import Onto
from training.merge import merged_bytes, on_disk, put_in_place, refuse_to_replace, write_merged
from training.proof import GreedyOn, VariantDistance
from training.readable import Readable, Whole
from training.reading import Reading, Wanted, load_adapted, load_merged, read_all
from training.room import FREE_MEMORY, Room

GREEDY_TOKENS = 32
POLICY = "of the merges that pass, the one with the lowest held-out NLL, against what was trained"

TRAINED = "NF4 base + adapter"
PLAIN = "plain base + adapter"
MERGED = {Onto.PLAIN: "merged on the plain base", Onto.DEQUANTISED: "merged on the dequantised base"}
BASE = "NF4 base alone"


@dataclass(frozen=True, slots=True)
class _Readings:
    held_out: Reading
    greedy: Reading  # of the trained variant's greedy replies


def merge_compared(
    adapter_dir: Path,
    base_dir: Path,
    out: Path,
    dtype: torch.dtype | None,
    certify: Callable[[Path, Onto], MergeCertificate],
    compare: Callable[[Mapping[Onto, Path]], tuple[VariantDistance, ...]],
    onto: Onto | None,
) -> MergeCertificate:
    """Merges both ways, certifies and compares both, and keeps that onto `onto`, or the better where it is None.

    Returns the kept one's certificate, with the comparison in it; `out` changes only if it passed. Raises as
    `training.merge.merge` does.
    """
    refuse_to_replace(out)
    merged = {way: out.with_name(f"{out.name}.{way.value}.tmp") for way in Onto}
    with on_disk(out, len(merged) * merged_bytes(base_dir, dtype)):
        try:
            certificates = {}
            for way, directory in merged.items():
                write_merged(adapter_dir, base_dir, directory, dtype, way)
                certificates[way] = certify(directory, way)
            found = compare(merged)
            chosen, reason = (onto, f"--onto {onto.value}") if onto else choose(certificates, found)
            certificate = certificates[chosen].model_copy(update={"comparison": found, "onto_reason": reason})
            if certificate.passed:
                write_certificate(merged[chosen], certificate)
                put_in_place(merged[chosen], out)
        finally:
            for directory in merged.values():
                shutil.rmtree(directory, ignore_errors=True)
    return certificate


def choose(certificates: Mapping[Onto, MergeCertificate], comparison: Sequence[VariantDistance]) -> tuple[Onto, str]:
    """Returns the way to merge, by POLICY, and why; plain where none passed, or both are equal."""
    nll = {found.variant: found.nll_nats_difference for found in comparison if found.reference == TRAINED}
    passed = [way for way in Onto if certificates[way].passed]
    found = ", ".join(
        f"{way.value} {nll[MERGED[way]]:+.4f} nats a token" + ("" if way in passed else " but failed") for way in Onto
    )
    return min(passed, key=lambda way: nll[MERGED[way]], default=Onto.PLAIN), f"{POLICY}: {found}"


def compare_variants(
    adapter_dir: Path,
    base_dir: Path,
    merged: Mapping[Onto, Path],
    held_out: Sequence[Chat],
    device: torch.device,
    room: Room = FREE_MEMORY,
) -> tuple[VariantDistance, ...]:
    """Measures each variant against what was trained, and the plain merge against plain base + adapter.

    One model in memory at a time, or a block of it. Greedy replies are made by what was trained and read by the others:
    up to the first token that another would not write, they are its own greedy reply too. Where what was trained does
    not fit whole, each of its tokens would take a pass over its files: then the held-out replies are read instead, and
    a prefix ends where the two would first write different tokens along them.
    """
    manifest = read_manifest(adapter_dir)
    examples = render_held_out(adapter_dir, held_out, manifest)
    trained = load_adapted(adapter_dir, base_dir, manifest, Onto.DEQUANTISED, torch.float32, device, room)
    on: GreedyOn = "own replies" if isinstance(trained, Whole) else "held-out replies"
    replies = _greedy(trained, examples, manifest) if isinstance(trained, Whole) else list(map(_start, examples))
    readings = dict(zip((TRAINED, BASE), _read(trained, examples, replies, base_too=True), strict=True))
    head_VD = trained.head().float()
    del trained
    dtypes: dict[Onto, torch.dtype] = {}
    for way, directory in merged.items():
        model = load_merged(directory, device, room=room)
        (readings[MERGED[way]],), dtypes[way] = _read(model, examples, replies), model.dtype
        del model
    plain = load_adapted(adapter_dir, base_dir, manifest, Onto.PLAIN, dtypes[Onto.PLAIN], device, room)
    (readings[PLAIN],) = _read(plain, examples, replies)
    others = [PLAIN, *(MERGED[way] for way in merged), BASE]
    return (
        *_measure(TRAINED, others, readings, head_VD, on),
        *_measure(PLAIN, [MERGED[Onto.PLAIN]], readings, head_VD, on),
    )


def _read(
    model: Readable, examples: Sequence[TrainExample], replies: Sequence[TrainExample], *, base_too: bool = False
) -> list[_Readings]:
    """Returns the model's readings, and those of its base alone where they are asked for."""
    ways = (True, False) if base_too else (True,)
    found = iter(read_all(model, [Wanted(rows, way) for way in ways for rows in (examples, replies)]))
    return [_Readings(held_out, next(found)) for held_out in found]


def _measure(
    reference: str,
    variants: Sequence[str],
    readings: Mapping[str, _Readings],
    head_VD: torch.Tensor,
    on: GreedyOn,
) -> list[VariantDistance]:
    far = distances(readings[reference].held_out, [readings[name].held_out for name in variants], head_VD)
    # What the reference itself would write, position by position: batching may have tipped a near tie in its replies.
    greedy = distances(readings[reference].greedy, [readings[name].greedy for name in variants], head_VD)
    return [
        _facts(name, reference, held_out, replies, on)
        for name, held_out, replies in zip(variants, far, greedy, strict=True)
    ]


def _facts(variant: str, reference: str, far: Distance, greedy: Distance, on: GreedyOn) -> VariantDistance:
    prefixes = greedy.agreeing_prefixes()
    return VariantDistance(
        variant=variant,
        reference=reference,
        kl_nats_mean=far.kl_mean,
        kl_nats_max=far.kl_max,
        top1_agreement=far.top1_agreement,
        nll_nats_difference=far.nll_difference,
        nll_nats_interval=far.nll_interval(),
        greedy_prefix_mean=sum(prefixes) / len(prefixes),
        greedy_tokens_mean=len(greedy.rows_N) / len(prefixes),
        greedy_on=on,
    )


@torch.inference_mode()
def _greedy(trained: Whole, examples: Sequence[TrainExample], manifest: AdapterManifest) -> list[TrainExample]:
    """Returns each example's prompt with the model's own greedy reply, which is what is labelled."""
    prompts = [example.input_ids[: _last_reply(example).start] for example in examples]
    stops = list(manifest.chat.stop_token_ids)
    longest = max(map(len, prompts))
    ids = torch.tensor([[stops[0]] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    settings = GenerationConfig(
        do_sample=False,
        repetition_penalty=1.0,
        max_new_tokens=GREEDY_TOKENS,
        eos_token_id=stops,
        pad_token_id=stops[0],
        use_cache=True,
    )
    model, base = trained.model, trained.base
    base.set_attn_implementation("sdpa")  # packed attention takes no batch
    try:
        out = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=settings
        )
    finally:
        base.set_attn_implementation(attention.NAME)
    return [
        _labelled_reply(prompt, row[longest:].tolist(), set(stops)) for prompt, row in zip(prompts, out, strict=True)
    ]


def _last_reply(example: TrainExample) -> slice:
    """Returns the last labelled stretch: the reply that is measured, in a chat of several turns."""
    start = last = max(at for at, label in enumerate(example.labels) if label != IGNORED_LABEL)
    while example.labels[start - 1] != IGNORED_LABEL:
        start -= 1
    return slice(start, last + 1)


def _start(example: TrainExample) -> TrainExample:
    """Returns the example up to GREEDY_TOKENS tokens of the reply that is measured, which is what is labelled."""
    reply = _last_reply(example)
    return _labelled_reply(example.input_ids[: reply.start], example.input_ids[reply][:GREEDY_TOKENS], set())


def _labelled_reply(prompt: Sequence[int], reply: Sequence[int], stops: set[int]) -> TrainExample:
    end = next((at + 1 for at, token in enumerate(reply) if token in stops), len(reply))
    kept = tuple(reply[:end])
    return TrainExample((*prompt, *kept), (IGNORED_LABEL,) * len(prompt) + kept)
