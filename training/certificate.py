"""The merge certificate: is the merged model base + adapter, by its weights and by its answers on held-out rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from training.artifact import (
    CERTIFICATE_NAME,
    AdapterManifest,
    MergeCertificate,
    fingerprint_base,
    read_manifest,
    read_probes,
)
from training.chat import Message, TrainExample, Turns, render_example, with_default_system
from training.deltas import Deltas, read_deltas
from training.distance import Distance, distances
from training.errors import TrainingError
from training.ground import Onto, ground_of
from training.model import load_tokenizer
from training.probes import probe_compute, probe_error
from training.proof import DeltaSurvival, ProbeError
from training.readable import Readable
from training.reading import Reading, Wanted, load_adapted, load_merged, read, read_all, stored_dtype
from training.room import FREE_MEMORY, Room
from training.survival import measure_survival

# In fp32 two ways to one sum differ by 1e-6 of a logit, and the KL of a token's 50,000 probabilities by about 1e-7.
KL_RESOLUTION_NATS = 1e-5
# A merge rounds what base + adapter leaves unrounded: once as rounding anew does, and again in each product.
_ROUNDINGS = 3.0
# More than this share of what the adapter changed is no rounding, whatever the dtype.
_SHARE_OF_CHANGE = 0.5

Chat = tuple[Message, ...]


class CertificateError(TrainingError):
    """Nothing to certify on."""


def certify(
    adapter_dir: Path,
    base_dir: Path,
    merged_dir: Path,
    held_out: Sequence[Chat],
    device: torch.device,
    onto: Onto = Onto.PLAIN,
    *,
    survival: DeltaSurvival | None = None,
    dtype_reason: str | None = None,
    room: Room = FREE_MEMORY,
) -> MergeCertificate:
    """Measures a merged model against base + adapter as peft computes it, and writes the certificate into `merged_dir`.

    First the weights, one by one; then the answers, one model at a time in the merged dtype: whole where `room` holds
    it (a 7B in 16 bits needs 17 GiB), else by block (4 GiB, most of it the head in fp32). The KL allowed in 16 bits is
    measured by rounding the merged weights anew. Raises BrokenMergeError where they are not base + update; those of
    whom `survival` is given are known to be.

    Numbers of random weights mean little: their answers hang on the last bit, and no adapter has taught them anything.
    """
    manifest, deltas = read_manifest(adapter_dir), read_deltas(adapter_dir)
    survival = survival or measure_survival(deltas, ground_of(base_dir, manifest, onto), merged_dir)
    examples, dtype = render_held_out(merged_dir, held_out, manifest), stored_dtype(merged_dir)
    arithmetic = _trained_arithmetic(manifest, onto) or dtype
    merged, rounding = _read_merged(load_merged(merged_dir, device, arithmetic, room), examples, deltas)
    reference = load_adapted(adapter_dir, base_dir, manifest, onto, dtype, device, room)
    adapter, base = read_all(reference, [Wanted(examples), Wanted(examples, adapter=False)])
    head_VD = reference.head().float()
    probes = _check_probes(adapter_dir, reference)
    del reference
    merged_far, base_far = distances(adapter, [merged, base], head_VD)
    certificate = MergeCertificate(
        adapter_digest=manifest.digest,
        base_fingerprint=manifest.base.fingerprint,
        merged_fingerprint=fingerprint_base(merged_dir),
        chat=manifest.chat,
        dtype=str(dtype).removeprefix("torch."),
        rows=len(examples),
        positions=len(merged.targets_N),
        **_answers(merged_far, base_far),
        kl_nats_allowed=_allowed(rounding, base_far),
        onto=onto.value,
        kl_nats_rounding=rounding,
        survival=survival,
        dtype_reason=dtype_reason,
        probes=probes,
    )
    write_certificate(merged_dir, certificate)
    return certificate


def _answers(merged: Distance, base: Distance) -> dict[str, Any]:
    return {
        "kl_nats_mean": merged.kl_mean,
        "kl_nats_max": merged.kl_max,
        "kl_nats_base_mean": base.kl_mean,
        "top1_agreement": merged.top1_agreement,
        "top1_agreement_base": base.top1_agreement,
        "nll_nats_adapter": merged.nll_reference_N.mean().item(),
        "nll_nats_merged": merged.nll_variant_N.mean().item(),
    }


def write_certificate(merged_dir: Path, certificate: MergeCertificate) -> None:
    (merged_dir / CERTIFICATE_NAME).write_text(certificate.model_dump_json(indent=2) + "\n", encoding="utf-8")


def read_held_out(path: Path, rows: int) -> list[Chat]:
    """Returns a run's first held-out chats, references last. Raises CertificateError naming file and line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:rows]
    except OSError as error:
        raise CertificateError(f"{path}: {error.strerror}; give held-out rows to certify on with --held-out") from None
    chats = [_chat(path, number, line) for number, line in enumerate(lines, 1) if line]
    if not chats:
        raise CertificateError(f"{path} has no rows to certify on; give others with --held-out")
    return chats


def _chat(path: Path, number: int, line: str) -> Chat:
    try:
        row = json.loads(line)
        messages = [Message(message["role"], message["content"]) for message in row["messages"]]
        return (*messages, Message("assistant", row["reference"]))
    except (ValueError, KeyError, TypeError):
        raise CertificateError(f'{path}, line {number}: expected {{"messages": [...], "reference": "..."}}') from None


def render_held_out(directory: Path, chats: Sequence[Chat], manifest: AdapterManifest) -> list[TrainExample]:
    """Renders chats with a directory's tokenizer as a server of that adapter does; labels the replies it was taught."""
    tokenizer, system = load_tokenizer(directory), manifest.chat.added_system_prompt
    turns: Turns = manifest.recipe.get("data", {}).get("turns", "all")
    return [render_example(tokenizer, with_default_system(chat, system), turns=turns) for chat in chats]


def _trained_arithmetic(manifest: AdapterManifest, onto: Onto) -> torch.dtype | None:
    """Returns the 16-bit dtype that NF4 training computed in, which its merge is read in too; else None."""
    dtype: torch.dtype = getattr(torch, manifest.compute_dtype)
    return dtype if onto is Onto.DEQUANTISED and dtype != torch.float32 else None


def _read_merged(model: Readable, examples: Sequence[TrainExample], deltas: Deltas) -> tuple[Reading, float | None]:
    """Returns the merged model's reading, and the mean KL which rounding its weights anew makes; None in fp32."""
    reading = read(model, examples)
    if model.dtype == torch.float32:
        return reading, None
    model.round_anew(deltas.a_RI)
    (rounded,) = distances(reading, [read(model, examples)], model.head().float())
    return reading, rounded.kl_mean


def _check_probes(adapter_dir: Path, reference: Readable) -> ProbeError | None:
    """Returns None where there are no probes, or none were recorded as the reference computes."""
    recorded = read_probes(adapter_dir)
    for probes in (recorded, recorded and recorded.on_plain_base()):
        if probes is not None and (probes.compute, probes.dtype) == probe_compute(reference):
            return probe_error(reference, probes)
    return None


def _allowed(rounding: float | None, base: Distance) -> float:
    return max(KL_RESOLUTION_NATS, min(_ROUNDINGS * (rounding or 0.0), _SHARE_OF_CHANGE * base.kl_mean))
