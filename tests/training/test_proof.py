"""A certificate fails by each of its numbers, and says which and by how much."""

from __future__ import annotations

import pytest

from tests.tiny import make_certificate
from training.artifact import CERTIFICATE_NAME, MergeCertificate, read_certificate
from training.proof import DeltaSurvival, ProbeError

WHOLE = DeltaSurvival(
    matrices=14, share=0.99, share_min=0.4, share_median=0.98, share_off_allowed=0.1, worst={"q.weight": 0.4}
)
SURE = ProbeError(error_nats=0.06, effect_nats=0.5)


@pytest.fixture
def certificate(tiny_base, tiny_adapters, tmp_path) -> MergeCertificate:
    for path in tiny_base.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return make_certificate(tmp_path, tiny_adapters["starter"], survival=WHOLE, probes=SURE)


def test_what_is_within_bounds_passes_and_is_read_back(certificate, tmp_path):
    assert certificate.passed
    assert read_certificate(tmp_path) == certificate


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"kl_nats_mean": 0.2}, "KL 2.0e-01 nats a token is above 1.0e-01"),
        ({"kl_nats_mean": float("nan")}, "KL nan"),
        (
            {"survival": WHOLE.model_copy(update={"share": 0.5})},
            "0.500 of the update is left by rounding, not 0.9 to 1.1",
        ),
        ({"survival": WHOLE.model_copy(update={"share": 2.0})}, "2.000 of the update"),
        ({"survival": WHOLE.model_copy(update={"share_median": 0.2})}, "worst: q.weight 0.400"),
        ({"probes": SURE.model_copy(update={"error_nats": 0.13})}, "0.130 nats a token from its probes"),
        ({"probes": ProbeError(error_nats=float("nan"), effect_nats=1.0)}, "nan nats"),
    ],
)
def test_each_number_out_of_bounds_is_named(certificate, change, told):
    failed = certificate.model_copy(update=change)
    assert not failed.passed
    (reason,) = failed.failures
    assert told in reason


def test_a_certificate_from_before_survival_was_measured_is_still_read(certificate, tmp_path):
    names = {"onto", "kl_nats_rounding", "survival", "probes", "comparison"}
    (tmp_path / CERTIFICATE_NAME).write_text(certificate.model_dump_json(exclude=names))
    assert read_certificate(tmp_path).passed
