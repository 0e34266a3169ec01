"""The `merge` command: an adapter merged into its base, with a certificate, unless that was done already."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from training.artifact import fingerprint_base, read_certificate, read_manifest
from training.config import TrainConfig, cache_dir


def add_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=Path, help="adapter directory")
    parser.add_argument("--base", type=Path, help="the base's directory (default: as the adapter's recipe names it)")
    parser.add_argument("--out", type=Path, help="directory of the merged model (default: beside the adapter)")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "float16", "bfloat16"],
        default="auto",
        help="of the result; auto: the base's own, or float16 where bfloat16 would erase the update "
        "(default %(default)s)",
    )
    parser.add_argument("--held-out", type=Path, help="rows to certify on (default: held_out.jsonl beside the adapter)")
    parser.add_argument("--rows", type=int, default=8, help="rows to certify on (default %(default)s)")
    parser.add_argument(
        "--onto",
        choices=["plain", "dequantised", "auto"],
        default="plain",
        help="the base weights as stored, or as NF4 left them in training; auto: compare, and keep the merge with the "
        "lowest held-out NLL of those that pass (default %(default)s)",
    )
    parser.add_argument(
        "--compare", action="store_true", help="measure both merges and both unmerged forms against what was trained"
    )
    parser.add_argument(
        "--max-memory-gib",
        type=float,
        metavar="GIB",
        help="that a model may take while it is measured, beside the program itself; one that needs more is read block "
        "by block (default: what is free)",
    )
    parser.add_argument(
        "--if-changed", action="store_true", help="do nothing where this adapter is merged there already"
    )
    parser.set_defaults(run=_merge)


def _merge(arguments: argparse.Namespace, _: Sequence[str]) -> int:
    out = arguments.out or arguments.adapter.with_name("merged")
    manifest = read_manifest(arguments.adapter)
    compared = arguments.compare or arguments.onto == "auto"
    if arguments.if_changed and is_merged(manifest.digest, out, arguments.dtype, arguments.onto, compared=compared):
        print(f"{out} is up to date")
        return 0
    from training.certify_merge import certified_merge, summary
    from training.room import room_of

    base = arguments.base or base_of(manifest.recipe)
    held_out = arguments.held_out or arguments.adapter.with_name("held_out.jsonl")
    certificate = certified_merge(
        arguments.adapter,
        base,
        out,
        dtype=arguments.dtype,
        held_out=held_out,
        rows=arguments.rows,
        onto=arguments.onto,
        compare=arguments.compare,
        room=room_of(arguments.max_memory_gib),
    )
    print(summary(arguments.adapter, out, certificate))
    return 0 if certificate.passed else 1


def is_merged(digest: str, out: Path, dtype: str = "auto", onto: str = "auto", *, compared: bool = False) -> bool:
    """Whether `out` is a whole merge of that adapter, with a certificate that passed."""
    certificate = read_certificate(out)
    return (
        certificate is not None
        and certificate.passed
        and certificate.adapter_digest == digest
        and dtype in ("auto", certificate.dtype)
        and onto in ("auto", certificate.onto)
        and (bool(certificate.comparison) or not compared)
        and certificate.merged_fingerprint == fingerprint_base(out)
    )


def base_of(recipe: dict[str, object]) -> Path:
    """Returns the local directory of the base that a recipe names, fetched if need be."""
    from training.base import resolve_base

    return resolve_base(TrainConfig.model_validate(recipe, strict=False).model, cache_dir()).directory
