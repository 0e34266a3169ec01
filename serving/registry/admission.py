"""The admission gate: what an adapter has to show before a request may meet it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from serving.engine.engine import Engine, Variant
from serving.errors import AdapterRejected, BadRequest
from serving.registry.base import LoadedBase
from serving.registry.probing import Scored, judge, score
from serving.registry.revision import ProbeResult, Reference
from training.artifact import (
    ADAPTER_CONFIG,
    MANIFEST_NAME,
    AdapterManifest,
    ArtifactError,
    base_problems,
    read_manifest,
    read_probes,
    verify_adapter,
)
from training.chat import Message, render_prompt

# Formats that run code when they are loaded. An adapter's weights are safetensors.
_RUNNING_CODE = {".bin", ".ckpt", ".joblib", ".npy", ".npz", ".pickle", ".pkl", ".pt", ".pth", ".py", ".so"}
_PROBE_TEXTS = (
    "Explain quantum computing in simple terms.",
    "Write a Python function that returns the factorial of n, and say how it ends.",
)


class AdmissionGate:
    """Checks directories without the engine in `inspect`, and loaded adapters on it in `probe`."""

    def __init__(self, base: LoadedBase, base_variant: Variant, max_rank: int) -> None:
        self._base, self._base_variant, self.max_rank = base, base_variant, max_rank
        self._own_probes = [render_prompt(base.tokenizer, [Message("user", text)]) for text in _PROBE_TEXTS]

    def inspect(self, directory: Path) -> AdapterManifest:
        """Returns the manifest of a whole adapter of this base and template; raises ArtifactError with all reasons."""
        problems = [
            f"{path.relative_to(directory).as_posix()}: may run code when it is loaded; only safetensors are taken"
            for path in sorted(directory.rglob("*"))
            if path.suffix.lower() in _RUNNING_CODE
        ]
        manifest = None
        try:
            manifest = verify_adapter(directory)
        except ArtifactError as error:
            problems += error.problems
            manifest = _readable_manifest(directory)
        except OSError as error:
            problems.append(f"{error.filename}: cannot be read ({error.strerror})")
        except ValueError as error:
            problems.append(f"{MANIFEST_NAME}: names what can be no file ({error})")
        if manifest is not None:
            problems += base_problems(manifest, self._base.fingerprint, self._base.template_sha256)
            problems += _rank_problems(directory, manifest, self.max_rank)
            problems += _probes_problems(directory)
        if problems or manifest is None:
            raise ArtifactError(directory, problems)
        return manifest

    async def probe(self, engine: Engine, variant: Variant) -> ProbeResult:
        """Returns what a loaded adapter computes; raises AdapterRejected where it must not answer."""
        recorded = read_probes(variant.path)
        probes = None if recorded is None else recorded.nearest(self._base.weights.value)
        wanted = [(ids, 1) for ids in self._own_probes]
        reference = None
        if probes is not None:
            wanted = [(probe.ids, probe.start) for probe in probes.probes]
            reference = Scored(
                tuple(value for probe in probes.probes for value in probe.base_logprobs),
                tuple(value for probe in probes.probes for value in probe.adapter_logprobs),
            )
        served = Scored(await _score_all(engine, self._base_variant, wanted), await _score_all(engine, variant, wanted))
        if engine.simulated:
            result, problems = judge(served, None, None, self._base.weights)
            result = replace(result, reference=Reference.SIMULATED if probes is not None else Reference.NONE)
        else:
            result, problems = judge(served, reference, probes, self._base.weights)
        if problems:
            raise AdapterRejected("; ".join(problems))
        return result


async def _score_all(engine: Engine, variant: Variant, wanted: list[tuple[tuple[int, ...], int]]) -> tuple[float, ...]:
    values: list[float] = []
    for ids, start in wanted:
        if len(ids) > engine.context_length:
            raise AdapterRejected(
                f"probes: one has {len(ids)} ids, the context here is {engine.context_length}; serve with "
                f"--context-length {len(ids)} or more"
            )
        try:
            values += await score(engine, variant, ids, start)
        except BadRequest as error:
            raise AdapterRejected(f"probes: the engine refuses one: {error.message}") from error
    return tuple(values)


def _readable_manifest(directory: Path) -> AdapterManifest | None:
    """For the reasons that stand beside those of a manifest's files."""
    try:
        return read_manifest(directory)
    except ArtifactError:
        return None


def _rank_problems(directory: Path, manifest: AdapterManifest, max_rank: int) -> list[str]:
    """A missing file is reported already; a malformed one is the engine's to refuse, unless its ranks are no ranks."""
    try:
        config: dict[str, Any] = json.loads((directory / ADAPTER_CONFIG).read_bytes())
        ranks = [config["r"], *(config.get("rank_pattern") or {}).values()]
        widest = max(int(rank) for rank in ranks)
    except OSError:
        return []
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        return [f"{ADAPTER_CONFIG}: no rank can be read ({type(error).__name__}: {error}); save it with peft"]
    problems = []
    if config["r"] != manifest.lora.rank:
        problems.append(f"{ADAPTER_CONFIG}: r is {config['r']!r}, the manifest says rank {manifest.lora.rank}")
    if widest > max_rank:
        problems.append(f"{ADAPTER_CONFIG}: rank {widest}, at most {max_rank} run here; serve with --max-rank {widest}")
    return problems


def _probes_problems(directory: Path) -> list[str]:
    try:
        read_probes(directory)
    except ArtifactError as error:
        return list(error.problems)
    return []
