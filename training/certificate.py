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
from training.reading import Reading, head_of, load_adapted, load_merged, read, round_anew
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
) -> MergeCertificate:
    """Measures a merged model against base + adapter as peft computes it, and writes the certificate into `merged_dir`.

    First the weights, one matrix at a time; then the answers, one model in memory at a time, in the merged dtype: a 7B
    model in 16 bits needs 15 GiB, and 2 GiB for the head in fp32. The KL allowed in 16 bits is measured in the same
    run, by rounding the merged weights anew. Raises BrokenMergeError where the weights are not base + update; those of
    whom `survival` is given are known to be.

    Numbers of random weights mean little: their answers hang on the last bit, and no adapter has taught them anything.
    """
    manifest = read_manifest(adapter_dir)
    deltas = read_deltas(adapter_dir)
    survival = survival or measure_survival(deltas, ground_of(base_dir, manifest, onto), merged_dir)
    examples = render_held_out(merged_dir, held_out, manifest)
    merged, dtype, rounding = _read_merged(merged_dir, examples, deltas, _trained_arithmetic(manifest, onto), device)
    reference = load_adapted(adapter_dir, base_dir, manifest, onto, dtype, device)
    adapter, base, head_VD = _read_reference(reference, examples)
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


def _read_merged(
    merged_dir: Path,
    examples: Sequence[TrainExample],
    deltas: Deltas,
    arithmetic: torch.dtype | None,
    device: torch.device,
) -> tuple[Reading, torch.dtype, float | None]:
    """Returns the merged model's reading in `arithmetic`, or its own dtype; that dtype; and the rounding's KL.

    That is the mean KL which rounding the weights anew makes; None in fp32.
    """
    model = load_merged(merged_dir, device)
    stored = model.dtype
    model.to(arithmetic or stored)
    reading = read(model, examples)
    if model.dtype == torch.float32:
        return reading, stored, None
    head_VD = head_of(model)
    round_anew(model, deltas.a_RI)
    (rounded,) = distances(reading, [read(model, examples)], head_VD)
    return reading, stored, rounded.kl_mean


def _read_reference(model: Any, examples: Sequence[TrainExample]) -> tuple[Reading, Reading, torch.Tensor]:
    """Returns a peft model's readings with and without its adapter, and the head that both share."""
    adapter = read(model, examples)
    with model.disable_adapter():
        base = read(model, examples)
    return adapter, base, head_of(model)


def _check_probes(adapter_dir: Path, reference: Any) -> ProbeError | None:
    """Returns None where there are no probes, or the reference does not compute as they were recorded."""
    probes = read_probes(adapter_dir)
    if probes is None or (probes.compute, probes.dtype) != probe_compute(reference):
        return None
    return probe_error(reference, probes)


def _allowed(rounding: float | None, base: Distance) -> float:
    return max(KL_RESOLUTION_NATS, min(_ROUNDINGS * (rounding or 0.0), _SHARE_OF_CHANGE * base.kl_mean))
