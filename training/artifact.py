"""The adapter directory: its manifest, the hashes that tie it to a base and a template, and their verification."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from training.errors import TrainingError
from training.proof import ChatSection as ChatSection  # noqa: PLC0414 - both are part of what this file gives
from training.proof import MergeCertificate as MergeCertificate  # noqa: PLC0414
from training.proof import Section

MANIFEST_NAME = "manifest.json"
CERTIFICATE_NAME = "merge_certificate.json"
PROBES_NAME = "probes.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
REQUIRED_FILES = (ADAPTER_WEIGHTS, ADAPTER_CONFIG, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".safetensors.index.json")


class ArtifactError(TrainingError):
    """A directory that is not a whole, untouched adapter; `problems` has one line for each fault."""

    def __init__(self, directory: Path, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__(f"{directory}: " + "; ".join(self.problems))


class BaseSection(Section):
    model: str  # hub id or path as the recipe names it
    revision: str | None
    fingerprint: str  # see fingerprint_base


class LoraSection(Section):
    rank: int
    alpha: float
    dropout: float
    target_modules: tuple[str, ...]


class DataSection(Section):
    dataset: str
    sha256: str
    rows_train: int
    rows_held_out: int
    rows_rejected: int
    tokens_lost: int  # content tokens cut to fit the cutoff
    split_rule: str


class LossSection(Section):
    """NLL in nats a labelled token."""

    steps: int
    first_nll_nats: float
    last_nll_nats: float
    validation_first_nll_nats: float | None
    validation_last_nll_nats: float | None
    validation_best_nll_nats: float | None = None
    weights_step: int | None = None  # whose weights these are: the best's under early stopping; None: the last's


class AdapterManifest(Section):
    format_version: Literal[1] = 1
    name: str
    created: datetime
    base: BaseSection
    chat: ChatSection
    quantisation: str  # of the base during training: "nf4-double" or "none"
    compute_dtype: str
    lora: LoraSection
    data: DataSection
    recipe: dict[str, Any]
    seed: int
    versions: dict[str, str]
    git_revision: str | None
    loss: LossSection
    files: dict[str, str]  # relative path -> sha256, all files but the manifest

    @property
    def digest(self) -> str:
        """The sha256 that names this revision: over the hashes of its files."""
        return _hash_of_hashes(self.files)


class Probe(Section):
    """Natural logarithms of the probabilities of `ids[start:]`, each given all ids before it."""

    ids: tuple[Annotated[int, Field(ge=0)], ...]
    start: int = Field(ge=1)  # nothing predicts the first id
    base_logprobs: tuple[Annotated[float, Field(allow_inf_nan=False)], ...]
    adapter_logprobs: tuple[Annotated[float, Field(allow_inf_nan=False)], ...]

    @model_validator(mode="after")
    def _lengths_agree(self) -> Probe:
        scored = len(self.ids) - self.start
        if scored < 1 or {len(self.base_logprobs), len(self.adapter_logprobs)} != {scored}:
            raise ValueError(
                f"{len(self.ids)} ids from start {self.start} need {scored} log-probabilities of base and of adapter, "
                f"not {len(self.base_logprobs)} and {len(self.adapter_logprobs)}"
            )
        return self


class PlainScores(Section):
    """The probes' log-probabilities on the base's own weights in float32, a row for each probe: what servers run."""

    dtype: Literal["float32"] = "float32"
    base_logprobs: tuple[tuple[Annotated[float, Field(allow_inf_nan=False)], ...], ...]
    adapter_logprobs: tuple[tuple[Annotated[float, Field(allow_inf_nan=False)], ...], ...]


class Probes(Section):
    """What peft computed with base and adapter when the training ended: a server must compute the same."""

    format_version: Literal[1] = 1
    compute: Literal["plain", "nf4"]  # the base under peft: its own weights, or quantised
    dtype: str  # of the arithmetic: float32, bfloat16 or float16
    probes: tuple[Probe, ...] = Field(min_length=1)
    plain: PlainScores | None = None  # where the training computed otherwise

    @model_validator(mode="after")
    def _rows_agree(self) -> Probes:
        wanted = [len(probe.ids) - probe.start for probe in self.probes]
        for rows in (self.plain.base_logprobs, self.plain.adapter_logprobs) if self.plain else ():
            if [len(row) for row in rows] != wanted:
                raise ValueError(f"plain: {[len(row) for row in rows]} log-probabilities, not {wanted}, as the probes")
        return self

    def on_plain_base(self) -> Probes | None:
        """Returns the probes as computed in float32 on the base's own weights; None where they were not."""
        if self.plain is None:
            return self if (self.compute, self.dtype) == ("plain", "float32") else None
        scores = zip(self.probes, self.plain.base_logprobs, self.plain.adapter_logprobs, strict=True)
        rows = tuple(
            Probe(ids=probe.ids, start=probe.start, base_logprobs=base, adapter_logprobs=adapter)
            for probe, base, adapter in scores
        )
        return Probes(compute="plain", dtype=self.plain.dtype, probes=rows)

    def nearest(self, kept: str) -> Probes:
        """Returns what is nearest to a base that is kept as `kept` ("plain", "nf4" or another quantisation)."""
        return self if kept == self.compute == "nf4" else self.on_plain_base() or self


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint_base(model_dir: Path) -> str:
    """Returns the sha256 over a base model's config and weight files' hashes: what an adapter was trained against.

    Names of files count, so a resharded copy is another base. Raises ArtifactError where there are no weights.
    """
    files = sorted(path for path in model_dir.glob("*") if path.name.endswith(_WEIGHT_SUFFIXES))
    config = model_dir / "config.json"
    if not files or not config.is_file():
        raise ArtifactError(
            model_dir, ["no config.json with weights; give a model directory, or a hub id while online"]
        )
    return _hash_of_hashes({path.name: sha256_file(path) for path in (config, *files)})


def write_manifest(directory: Path, manifest: AdapterManifest) -> None:
    """Writes the manifest last and whole, so that a directory without one is known to be unfinished."""
    temporary = directory / (MANIFEST_NAME + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(manifest.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(directory / MANIFEST_NAME)


def hash_files(directory: Path) -> dict[str, str]:
    """Returns the sha256 of each file below `directory` but the manifest, by relative path."""
    return {name: sha256_file(directory / name) for name in sorted(_file_names(directory))}


def read_manifest(directory: Path) -> AdapterManifest:
    """Raises ArtifactError where the manifest is absent or malformed; does not read the other files."""
    path = directory / MANIFEST_NAME
    try:
        return AdapterManifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ArtifactError(
            directory, [f"no {MANIFEST_NAME}: not a Graft adapter, or its training did not finish"]
        ) from None
    except ValidationError as error:
        raise ArtifactError(directory, _details(MANIFEST_NAME, error)) from None


def read_certificate(merged_dir: Path) -> MergeCertificate | None:
    """Returns the certificate of a merged model, or None for one that Graft did not merge. Raises ArtifactError."""
    path = merged_dir / CERTIFICATE_NAME
    if not path.is_file():
        return None
    try:
        return MergeCertificate.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ArtifactError(merged_dir, _details(CERTIFICATE_NAME, error)) from None


def read_probes(directory: Path) -> Probes | None:
    """Returns an adapter's probes, or None for one that was trained before there were any. Raises ArtifactError."""
    path = directory / PROBES_NAME
    if not path.is_file():
        return None
    try:
        return Probes.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ArtifactError(directory, _details(PROBES_NAME, error)) from None


def verify_adapter(directory: Path) -> AdapterManifest:
    """Returns the manifest of a whole adapter; raises ArtifactError naming every file missing, changed or added."""
    manifest = read_manifest(directory)
    missing = [f"{name}: required, but not in the manifest" for name in REQUIRED_FILES if name not in manifest.files]
    changed = [problem for name, digest in manifest.files.items() if (problem := _check(directory, name, digest))]
    # Loaders read what they find: an added special_tokens_map.json would change prompts.
    added = [f"{name}: added since training; remove it" for name in _file_names(directory) - set(manifest.files)]
    problems = missing + changed + sorted(added)
    if problems:
        raise ArtifactError(directory, problems)
    return manifest


def base_problems(manifest: AdapterManifest, fingerprint: str, template_sha256: str) -> list[str]:
    """Returns why an adapter must not run on a base with this fingerprint and template; empty where it may."""
    problems = []
    if manifest.base.fingerprint != fingerprint:
        problems.append(
            f"base fingerprint {manifest.base.fingerprint[:12]} (trained on {manifest.base.model}) is not "
            f"{fingerprint[:12]}, the base that runs here: serve that base, or train the adapter on this one"
        )
    if manifest.chat.template_sha256 != template_sha256:
        problems.append(
            f"template hash {manifest.chat.template_sha256[:12]} is not {template_sha256[:12]}, "
            "the one that runs here: prompts would differ from those it was trained on"
        )
    return problems


def _file_names(directory: Path) -> set[str]:
    found = (path for path in directory.rglob("*") if path.is_file() and path.name != MANIFEST_NAME)
    return {path.relative_to(directory).as_posix() for path in found}


def _check(directory: Path, name: str, digest: str) -> str | None:
    path = directory / name
    if not path.resolve().is_relative_to(directory.resolve()):
        return f"{name}: lies outside the adapter"
    if not path.is_file():
        return f"{name}: missing"
    return None if sha256_file(path) == digest else f"{name}: changed since training (sha256 differs)"


def _hash_of_hashes(files: Mapping[str, str]) -> str:
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _details(name: str, error: ValidationError) -> list[str]:
    return [f"{name}: {'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in error.errors()]
