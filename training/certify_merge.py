"""The certified merge: one way or the better of two, in a dtype that keeps the update, and what was found in words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from training.artifact import MergeCertificate, read_manifest
from training.certificate import certify, read_held_out
from training.comparison import TRAINED, compare_variants, merge_compared
from training.deltas import read_deltas
from training.ground import Onto, ground_of, read_weight, shard_of, trained_on_nf4
from training.merge import merge, write_merged
from training.proof import DeltaSurvival, VariantDistance
from training.room import FREE_MEMORY, Room, need_of
from training.survival import measure_survival

_FLOAT16_MOST = torch.finfo(torch.float16).max


def certified_merge(
    adapter_dir: Path,
    base_dir: Path,
    out: Path,
    *,
    dtype: str,
    held_out: Path,
    rows: int,
    onto: str,
    compare: bool,
    room: Room = FREE_MEMORY,
) -> MergeCertificate:
    """Merges and certifies on the first `rows` of `held_out`, on the GPU where there is one, within `room`.

    `onto` auto compares and keeps the better; an adapter that was trained on plain weights has one way only. `dtype`
    auto is the base's own, or float16 where bfloat16 erases the update and float16 can hold the weights.
    """
    chats, manifest = read_held_out(held_out, rows), read_manifest(adapter_dir)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    written: torch.dtype | None = None if dtype == "auto" else getattr(torch, dtype)
    room.require_block(need_of(base_dir, written or torch.bfloat16))  # what is hopeless, before minutes of merging
    only = None if onto == "auto" else Onto(onto)
    if only is None and not trained_on_nf4(manifest):
        only = Onto.PLAIN

    def survival_of(merged: Path, way: Onto) -> DeltaSurvival:
        return measure_survival(read_deltas(adapter_dir), ground_of(base_dir, manifest, way), merged)

    def measure(merged: Path, way: Onto) -> MergeCertificate:
        survival, reason = survival_of(merged, way), None
        if written is None and not survival.kept and (largest := _largest_bfloat16(merged)) is not None:
            reason = f"bfloat16, the base's own, leaves {survival.share:.3f} of the update"
            if largest <= _FLOAT16_MOST:
                write_merged(adapter_dir, base_dir, merged, torch.float16, way)
                survival = survival_of(merged, way)
                reason += f", float16 {survival.share:.3f}"
            else:
                reason += f"; float16 ends at {_FLOAT16_MOST:g} and a weight is {largest:g}"
        return certify(
            adapter_dir, base_dir, merged, chats, device, way, survival=survival, dtype_reason=reason, room=room
        )

    def measure_all(merged: Mapping[Onto, Path]) -> tuple[VariantDistance, ...]:
        return compare_variants(adapter_dir, base_dir, merged, chats, device, room)

    if only is None or compare:
        return merge_compared(adapter_dir, base_dir, out, written, measure, measure_all, only)
    return merge(adapter_dir, base_dir, out, written, lambda merged: measure(merged, only), only)


def _largest_bfloat16(merged: Path) -> float | None:
    """Returns the largest absolute number of a model that has bfloat16 weights, else None."""
    weights = (read_weight(path, name) for name, path in shard_of(merged).items())
    found = [(weight.dtype, float(weight.abs().max())) for weight in weights if weight.is_floating_point()]
    return max(size for _, size in found) if any(dtype == torch.bfloat16 for dtype, _ in found) else None


def summary(adapter_dir: Path, out: Path, certificate: MergeCertificate) -> str:
    """Returns what the certificate says, in words, and the comparison where there is one."""
    lines = [_row(found) for found in certificate.comparison]
    survival = certificate.survival
    kept = (
        f", {100 * survival.share:.2f} % of the update survived (worst matrix {100 * survival.share_min:.2f} %)"
        if survival
        else ""
    )
    verdict = (
        f"passed, {out}" if certificate.passed else f"FAILED, {out} is as it was: {'; '.join(certificate.failures)}"
    )
    return "\n".join(
        [
            *([_HEAD, *lines, *_notes(certificate)] if lines else []),
            *([f"written in {certificate.dtype}: {certificate.dtype_reason}"] if certificate.dtype_reason else []),
            f"{adapter_dir} merged onto the {certificate.onto} base: on {certificate.positions} tokens of "
            f"{certificate.rows} held-out rows it stands KL {certificate.kl_nats_mean:.1e} nats from base + adapter "
            f"(allowed {certificate.kl_nats_allowed:.1e}; the base alone stands {certificate.kl_nats_base_mean:.1e}), "
            f"top-1 agreement {100 * certificate.top1_agreement:.2f} %{kept}: {verdict}",
        ]
    )


_HEAD = (
    f"{'variant':31} {'against':20} {'KL nats':>8} {'top-1':>7} {'NLL difference, 95 % interval':>31} "
    f"{'greedy prefix':>14}"
)


def _notes(certificate: MergeCertificate) -> list[str]:
    notes = [f"kept: {certificate.onto} ({certificate.onto_reason})"] if certificate.onto_reason else []
    if any(found.greedy_on == "held-out replies" for found in certificate.comparison):
        notes.append(
            "greedy prefix: along the held-out replies, since what was trained does not fit in memory to reply"
        )
    return notes


def _row(found: VariantDistance) -> str:
    low, high = found.nll_nats_interval
    against = "what was trained" if found.reference == TRAINED else found.reference
    nll = f"{found.nll_nats_difference:+.4f} [{low:+.4f}, {high:+.4f}]"
    greedy = f"{found.greedy_prefix_mean:.1f} of {found.greedy_tokens_mean:.1f}"
    return (
        f"{found.variant:31} {against:20} {found.kl_nats_mean:8.5f} {100 * found.top1_agreement:6.2f}% "
        f"{nll:>31} {greedy:>14}"
    )
