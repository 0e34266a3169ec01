"""The comparison of the four ways to run an adapter with what was trained, and the choice of what to merge onto."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from training import attention
from training.artifact import AdapterManifest, MergeCertificate, read_manifest
from training.certificate import Chat, render_held_out, write_certificate
from training.chat import IGNORED_LABEL, TrainExample
from training.distance import Distance, distances
from training.ground import Onto
from training.merge import put_in_place, refuse_to_replace, write_merged
from training.proof import VariantDistance
from training.reading import Reading, head_of, load_adapted, load_merged, read

GREEDY_TOKENS = 32

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
    try:
        certificates = {}
        for way, directory in merged.items():
            write_merged(adapter_dir, base_dir, directory, dtype, way)
            certificates[way] = certify(directory, way)
        found = compare(merged)
        chosen = onto or choose(certificates, found)
        certificate = certificates[chosen].model_copy(update={"comparison": found})
        if certificate.passed:
            write_certificate(merged[chosen], certificate)
            put_in_place(merged[chosen], out)
    finally:
        for directory in merged.values():
            shutil.rmtree(directory, ignore_errors=True)
    return certificate


def choose(certificates: Mapping[Onto, MergeCertificate], comparison: Sequence[VariantDistance]) -> Onto:
    """Returns the way with the lowest held-out NLL, of those that passed; plain where none did, or both are equal."""
    nll = {found.variant: found.nll_nats_difference for found in comparison if found.reference == TRAINED}
    passed = [way for way in Onto if certificates[way].passed]
    return min(passed, key=lambda way: nll[MERGED[way]], default=Onto.PLAIN)


def compare_variants(
    adapter_dir: Path,
    base_dir: Path,
    merged: Mapping[Onto, Path],
    held_out: Sequence[Chat],
    device: torch.device,
) -> tuple[VariantDistance, ...]:
    """Measures each variant against what was trained, and the plain merge against plain base + adapter.

    One model in memory at a time. Greedy replies are made by what was trained and read by the others: up to the first
    token that another would not write, they are its own greedy reply too.
    """
    manifest = read_manifest(adapter_dir)
    examples = render_held_out(adapter_dir, held_out, manifest)
    trained = load_adapted(adapter_dir, base_dir, manifest, Onto.DEQUANTISED, torch.float32, device)
    replies = _greedy(trained, examples, manifest)
    readings = {TRAINED: _read(trained, examples, replies)}
    with trained.disable_adapter():
        readings[BASE] = _read(trained, examples, replies)
    head_VD = head_of(trained)
    del trained
    dtypes: dict[Onto, torch.dtype] = {}
    for way, directory in merged.items():
        model = load_merged(directory, device)
        readings[MERGED[way]], dtypes[way] = _read(model, examples, replies), model.dtype
        del model
    plain = load_adapted(adapter_dir, base_dir, manifest, Onto.PLAIN, dtypes[Onto.PLAIN], device)
    readings[PLAIN] = _read(plain, examples, replies)
    others = [PLAIN, *(MERGED[way] for way in merged), BASE]
    return (*_measure(TRAINED, others, readings, head_VD), *_measure(PLAIN, [MERGED[Onto.PLAIN]], readings, head_VD))


def _read(model: Any, examples: Sequence[TrainExample], replies: Sequence[TrainExample]) -> _Readings:
    return _Readings(read(model, examples), read(model, replies))


def _measure(
    reference: str, variants: Sequence[str], readings: Mapping[str, _Readings], head_VD: torch.Tensor
) -> list[VariantDistance]:
    far = distances(readings[reference].held_out, [readings[name].held_out for name in variants], head_VD)
    # What the reference itself would write, position by position: batching may have tipped a near tie in its replies.
    greedy = distances(readings[reference].greedy, [readings[name].greedy for name in variants], head_VD)
    return [_facts(name, reference, *pair) for name, pair in zip(variants, zip(far, greedy, strict=True), strict=True)]


def _facts(variant: str, reference: str, far: Distance, greedy: Distance) -> VariantDistance:
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
    )


@torch.inference_mode()
def _greedy(model: Any, examples: Sequence[TrainExample], manifest: AdapterManifest) -> list[TrainExample]:
    """Returns each example's prompt with the model's own greedy reply, which is what is labelled."""
    prompts = [example.input_ids[: _reply_start(example)] for example in examples]
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
    base = model.get_base_model()
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


def _reply_start(example: TrainExample) -> int:
    """Returns where the last labelled stretch starts: the reply that is measured, in a chat of several turns."""
    end = max(at for at, label in enumerate(example.labels) if label != IGNORED_LABEL)
    while example.labels[end - 1] != IGNORED_LABEL:
        end -= 1
    return end


def _labelled_reply(prompt: Sequence[int], reply: Sequence[int], stops: set[int]) -> TrainExample:
    end = next((at + 1 for at, token in enumerate(reply) if token in stops), len(reply))
    kept = tuple(reply[:end])
    return TrainExample((*prompt, *kept), (IGNORED_LABEL,) * len(prompt) + kept)
