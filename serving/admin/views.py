"""The views: what the registry holds, as administration tells it."""

from __future__ import annotations

from dataclasses import asdict

from serving.admin.protocol import (
    InspectedRevision,
    LabelView,
    ManifestView,
    PolicyView,
    ProbeView,
    RefusalView,
    RevisionView,
)
from serving.registry.registry import Registry
from serving.registry.revision import Label, ProbeResult, Refusal, Revision
from serving.registry.routing import Policy
from training.artifact import AdapterManifest


def revision_view(registry: Registry, revision: Revision) -> RevisionView:
    labels = [each.label for each in registry.labels() if (each.name, each.digest) == revision.key]
    return RevisionView(
        id=revision.id,
        name=revision.name,
        digest=revision.digest,
        status=revision.status.value,
        reasons=list(revision.reasons),
        labels=labels,
        pinned=revision.pinned,
        resident=revision.digest in registry.residency.resident(),
        in_flight=registry.uses.count(revision.key),
        created=revision.created,
        rank=revision.rank,
        load_s=revision.load_s,
        probe=None if revision.probe is None else _probe_view(revision.probe),
    )


def inspected_view(registry: Registry, revision: Revision, manifest: AdapterManifest | None) -> InspectedRevision:
    view = revision_view(registry, revision).model_dump()
    return InspectedRevision(**view, manifest=None if manifest is None else _manifest_view(manifest))


def label_view(label: Label) -> LabelView:
    return LabelView(
        id=f"{label.name}:{label.label}",
        name=label.name,
        label=label.label,
        digest=label.digest,
        previous=label.previous,
        changed=label.changed,
    )


def policy_view(name: str, policy: Policy) -> PolicyView:
    return PolicyView(name=name, weights=dict(policy.weights), sticky=policy.sticky, shadow=policy.shadow)


def refusal_view(refusal: Refusal) -> RefusalView:
    return RefusalView.model_validate({**asdict(refusal), "reasons": list(refusal.reasons)})


def _probe_view(probe: ProbeResult) -> ProbeView:
    return ProbeView.model_validate({**asdict(probe), "reference": probe.reference.value})


def _manifest_view(manifest: AdapterManifest) -> ManifestView:
    return ManifestView(
        base=manifest.base.model,
        base_revision=manifest.base.revision,
        dataset=manifest.data.dataset,
        rows_train=manifest.data.rows_train,
        quantisation=manifest.quantisation,
        rank=manifest.lora.rank,
        alpha=manifest.lora.alpha,
        target_modules=list(manifest.lora.target_modules),
        steps=manifest.loss.steps,
        last_nll_nats=manifest.loss.last_nll_nats,
        git_revision=manifest.git_revision,
    )
