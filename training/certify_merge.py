"""The command `merge`: merges one way or the better of two, certifies, and says what was found."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from training.artifact import MergeCertificate, read_manifest
from training.certificate import certify, read_held_out
from training.comparison import TRAINED, compare_variants, merge_compared
from training.ground import Onto, trained_on_nf4
from training.merge import merge
from training.proof import VariantDistance


def certified_merge(
    adapter_dir: Path,
    base_dir: Path,
    out: Path,
    *,
    dtype: str | None,
    held_out: Path,
    rows: int,
    onto: str,
    compare: bool,
) -> MergeCertificate:
    """Merges and certifies on the first `rows` of `held_out`, on the GPU where there is one.

    `onto` auto compares and keeps the better; an adapter that was trained on plain weights has one way only.
    """
    chats = read_held_out(held_out, rows)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    written: torch.dtype | None = getattr(torch, dtype) if dtype else None
    only = None if onto == "auto" else Onto(onto)
    if only is None and not trained_on_nf4(read_manifest(adapter_dir)):
        only = Onto.PLAIN

    def measure(merged: Path, way: Onto) -> MergeCertificate:
        return certify(adapter_dir, base_dir, merged, chats, device, way)

    def measure_all(merged: Mapping[Onto, Path]) -> tuple[VariantDistance, ...]:
        return compare_variants(adapter_dir, base_dir, merged, chats, device)

    if only is None or compare:
        return merge_compared(adapter_dir, base_dir, out, written, measure, measure_all, only)
    return merge(adapter_dir, base_dir, out, written, lambda merged: measure(merged, only), only)


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
            *([_HEAD, *lines] if lines else []),
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


def _row(found: VariantDistance) -> str:
    low, high = found.nll_nats_interval
    against = "what was trained" if found.reference == TRAINED else found.reference
    nll = f"{found.nll_nats_difference:+.4f} [{low:+.4f}, {high:+.4f}]"
    greedy = f"{found.greedy_prefix_mean:.1f} of {found.greedy_tokens_mean:.1f}"
    return (
        f"{found.variant:31} {against:20} {found.kl_nats_mean:8.5f} {100 * found.top1_agreement:6.2f}% "
        f"{nll:>31} {greedy:>14}"
    )
