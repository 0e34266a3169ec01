"""The catalog: maps a request's model name to the base, a merged model or one adapter revision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.engine.engine import Variant, VariantKind
from serving.errors import AdapterRejected, ModelNotFound, ModelRejected
from serving.registry.base import LoadedBase, end_of_turn_ids, load_base, load_tokenizer
from training.artifact import (
    ArtifactError,
    MergeCertificate,
    base_problems,
    fingerprint_base,
    read_certificate,
    verify_adapter,
)
from training.chat import TemplateError, template_hash

DIGEST_CHARACTERS = 12  # as many as a revision shows


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One answerable revision. `system_prompt` is rendered where a chat has none; None leaves that to the template."""

    name: str
    variant: Variant
    system_prompt: str | None
    stop_token_ids: frozenset[int]
    created: int  # seconds since 1970
    parent: str | None

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
    """All served models by name; a lookup never changes anything, so every model may be in flight at once."""

    base: LoadedBase
    models: Mapping[str, ServedModel]

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self.models.values())

    def resolve(self, model: str) -> ServedModel:
        """Takes `name` or `name@digest` (any leading part of the digest); raises ModelNotFound with what exists."""
        name, at, digest = model.partition("@")
        found = self.models.get(name)
        if found is None or (at and not (digest and found.variant.digest.startswith(digest))):
            known = ", ".join(served.revision for served in self)
            raise ModelNotFound(f"model {model[:200]!r} does not exist; served are: {known}", param="model")
        return found


def load_catalog(
    base_name: str, base_dir: Path, *, adapters: Mapping[str, Path], merged: Mapping[str, Path]
) -> Catalog:
    """Reads and verifies every directory; raises ModelRejected or AdapterRejected with all reasons at once."""
    base = load_base(base_dir)
    variant = Variant(base_name, VariantKind.BASE, base.fingerprint, base_dir)
    first = ServedModel(base_name, variant, None, base.stop_token_ids, base.created, None)
    models = [first, *(_load_merged(name, path, base) for name, path in merged.items())]
    models += [load_adapter(name, path, base, base_name) for name, path in adapters.items()]
    return Catalog(base, {model.name: model for model in models})


def load_adapter(name: str, directory: Path, base: LoadedBase, base_name: str) -> ServedModel:
    """Raises AdapterRejected where the adapter is damaged, or was made for another base or template."""
    try:
        manifest = verify_adapter(directory)
    except ArtifactError as error:
        raise AdapterRejected(f"adapter {name}={directory} is refused: {'; '.join(error.problems)}") from error
    if problems := base_problems(manifest, base.fingerprint, base.template_sha256):
        raise AdapterRejected(f"adapter {name}={directory} is refused: {'; '.join(problems)}")
    return ServedModel(
        name=name,
        variant=Variant(name, VariantKind.ADAPTER, manifest.digest, directory),
        system_prompt=manifest.chat.added_system_prompt,
        stop_token_ids=base.stop_token_ids | frozenset(manifest.chat.stop_token_ids),
        created=int(manifest.created.timestamp()),
        parent=base_name,
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
