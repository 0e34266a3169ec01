"""The catalog: the base and the merged models, and what every served model is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.engine.engine import Variant, VariantKind, WeightFormat
from serving.errors import ModelRejected
from serving.registry.base import LoadedBase, end_of_turn_ids, load_base, load_tokenizer
from serving.registry.revision import DIGEST_CHARACTERS
from training.artifact import (
    AdapterManifest,
    ArtifactError,
    MergeCertificate,
    fingerprint_base,
    read_certificate,
)
from training.chat import TemplateError, template_hash


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One answerable revision. `system_prompt` is rendered where a chat has none; None leaves that to the template."""

    name: str
    variant: Variant
    system_prompt: str | None
    stop_token_ids: frozenset[int]
    created: int  # seconds since 1970
    parent: str | None
    weights: WeightFormat = WeightFormat.PLAIN  # that it is served in

    @property
    def digest(self) -> str:
        return self.variant.digest[:DIGEST_CHARACTERS]

    @property
    def is_adapter(self) -> bool:
        return self.variant.kind is VariantKind.ADAPTER

    @property
    def revision(self) -> str:
        """What a response calls the model: an adapter's name changes its meaning, so its digest is added."""
        return f"{self.name}@{self.digest}" if self.is_adapter else self.name


@dataclass(frozen=True, slots=True)
class Catalog:
    """The base and the merged models by name: what is the same from the process's start to its end."""

    base: LoadedBase
    models: Mapping[str, ServedModel]


def load_catalog(
    base_name: str, base_dir: Path, merged: Mapping[str, Path], weights: WeightFormat = WeightFormat.PLAIN
) -> Catalog:
    """Reads and verifies every directory; raises ModelRejected with all reasons at once."""
    base = load_base(base_dir, weights)
    variant = Variant(base_name, VariantKind.BASE, base.fingerprint, base_dir)
    first = ServedModel(base_name, variant, None, base.stop_token_ids, base.created, None, weights)
    models = [first, *(_load_merged(name, path, base) for name, path in merged.items())]
    return Catalog(base, {model.name: model for model in models})


def adapter_model(name: str, manifest: AdapterManifest, path: Path, base: LoadedBase, base_name: str) -> ServedModel:
    """Returns a revision whose manifest is verified and whose files lie at `path`.

    Names that share a digest share the engine's variant, so it is called by the digest.
    """
    return ServedModel(
        name=name,
        variant=Variant(manifest.digest[:DIGEST_CHARACTERS], VariantKind.ADAPTER, manifest.digest, path),
        system_prompt=manifest.chat.added_system_prompt,
        stop_token_ids=base.stop_token_ids | frozenset(manifest.chat.stop_token_ids),
        created=int(manifest.created.timestamp()),
        parent=base_name,
        weights=base.weights,
    )


def _load_merged(name: str, directory: Path, base: LoadedBase) -> ServedModel:
    try:
        fingerprint = fingerprint_base(directory)
        tokenizer = load_tokenizer(directory)
        problems = _tokenizer_problems(tokenizer, base)
        stops = end_of_turn_ids(directory, tokenizer)
        certificate = read_certificate(directory)
    except (ArtifactError, TemplateError, OSError, ValueError) as error:
        raise ModelRejected(f"merged model {name}={directory} cannot be served: {error}") from error
    if not problems and certificate is not None:
        problems = _certificate_problem(certificate, fingerprint)
    if problems:
        raise ModelRejected(f"merged model {name}={directory} is refused: {problems}")
    system_prompt = None
    if certificate is not None:  # prompts as the adapter was trained and the merge certified
        system_prompt = certificate.chat.added_system_prompt
        stops |= frozenset(certificate.chat.stop_token_ids)
    created = int((directory / "config.json").stat().st_mtime)
    variant = Variant(name, VariantKind.MERGED, fingerprint, directory)
    return ServedModel(name, variant, system_prompt, stops, created, None)


def _certificate_problem(certificate: MergeCertificate, fingerprint: str) -> str:
    if not certificate.passed:
        return "its merge certificate did not pass; merge it again"
    if certificate.merged_fingerprint != fingerprint:
        return "its files changed since the merge was certified; merge it again"
    return ""


def _tokenizer_problems(tokenizer: Any, base: LoadedBase) -> str:
    """One tokenizer renders for all models here, so a merged model's must be the base's."""
    sha256 = template_hash(tokenizer)
    problems = []
    if sha256 != base.template_sha256:
        problems.append(
            f"its template hash {sha256[:12]} is not the base's {base.template_sha256[:12]}: "
            "merge from the base that is served here, or serve it as --base"
        )
    if tokenizer.get_vocab() != base.tokenizer.get_vocab():
        problems.append("its vocabulary is not the base's: serve it as --base")
    return "; ".join(problems)
