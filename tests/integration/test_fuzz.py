"""Every route of the OpenAPI document, with data that fits it and data that does not: no answer but the declared ones.

The document is walked, so a new route is fuzzed without a line here. What is sent is the same at every run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.specs.openapi import checks

from tests.serving.managed import Managed, managed_server
from tests.serving.tools.templates import CLOCK, HERMES, WEATHER, base_with
from tests.tiny import make_tiny_adapter

EXAMPLES = 25  # an operation and a mode
NOTHING_TO_GET_WRONG = {"GET /healthz", "GET /readyz"}  # no parameter and no body
CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
]
SETTINGS = settings(
    max_examples=EXAMPLES, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def managed(tiny_base, tmp_path_factory) -> Iterator[Managed]:
    """On a base whose template renders tools, so that more than a refusal of them is reached."""
    root = tmp_path_factory.mktemp("models")
    base = base_with(tiny_base, root / "base", HERMES)
    adapters = {name: make_tiny_adapter(base, root / name, name, seed) for name, seed in (("starter", 1), ("other", 2))}
    with managed_server(base, adapters, tmp_path_factory.mktemp("fuzz")) as managed:
        yield managed


def establish(managed: Managed) -> None:
    """Has two revisions with a label and a policy, whatever the operation before has removed."""
    for name in ("starter", "other"):
        managed.register(name, name, label="stable")
        response = managed.admin.put(f"/admin/policies/{name}", json={"weights": {"stable": 1}})
        assert response.status_code == 200, response.text


@pytest.fixture
def schema(managed: Managed) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_dict(managed.admin.get("/openapi.json").json())


def names_of(managed: Managed) -> dict[str, list[Any]]:
    """What exists now, by the parameter or field that it stands in."""
    revisions = managed.admin.get("/admin/revisions").json()["data"]
    ids = sorted(revision["id"] for revision in revisions)
    aliases = sorted(label["id"] for label in managed.admin.get("/admin/labels").json()["data"])
    names = ["base", "other", "starter"]
    return {
        "revision": ids,
        "alias": [*aliases, "starter:canary"],
        "name": names,
        "path": ["other", "starter"],
        "weights": [{"stable": 1}, {"stable": 3, "canary": 1}],
        "tools": [[WEATHER], [WEATHER, CLOCK]],
        **dict.fromkeys(("digest", "expected"), sorted(revision["digest"] for revision in revisions)),
        **dict.fromkeys(("model", "model_id"), names + ids + aliases),
    }


def make_likelier(case: Case, managed: Managed, draw: Callable[[Any], Any]) -> None:
    """Names what exists, three times in four, and one of two inputs: else nearly all would end at 400 and 404."""
    names = names_of(managed)
    for fields in (case.path_parameters, case.body):
        for name in sorted(fields.keys() & names.keys()) if isinstance(fields, dict) else ():
            if draw(st.integers(0, 3)):
                fields[name] = draw(st.sampled_from(names[name]))
    if case.operation.label == "POST /tokenize" and {"prompt", "messages"} <= case.body.keys():
        del case.body[draw(st.sampled_from(("messages", "prompt")))]


def send(case: Case, managed: Managed, session: requests.Session) -> Any:
    if isinstance(case.body, dict):
        case.body.pop("hub_id", None)  # it would be looked for on the network
    administers = case.path.startswith("/admin") or case.path == "/metrics"
    key = managed.admin.headers["authorization"] if administers else f"Bearer {managed.user_key}"
    return case.call(base_url=managed.url, session=session, headers={"authorization": key}, timeout=60)


def fuzz(operation: Any, mode: GenerationMode, managed: Managed, session: requests.Session) -> Counter[int]:
    """Returns how often each status was answered; an exception carries the request as a curl command."""
    statuses: Counter[int] = Counter()
    held = CHECKS if mode.is_positive else [*CHECKS, checks.negative_data_rejection]

    @SETTINGS
    @given(case=operation.as_strategy(generation_mode=mode), data=st.data())
    def probe(case: Case, data: st.DataObject) -> None:
        if mode.is_positive:
            make_likelier(case, managed, data.draw)
        response = send(case, managed, session)
        statuses[response.status_code] += 1
        asked_for_little_time = response.status_code == 504 and "x-request-timeout-s" in case.headers
        assert response.status_code < 500 or asked_for_little_time, response.text
        case.validate_response(response, checks=held)

    probe()
    return statuses


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_no_route_fails_or_answers_what_it_does_not_declare(mode, managed, schema):
    seen: dict[str, Counter[int]] = {}
    with requests.Session() as session:
        for found in schema.get_all_operations():
            operation = found.ok()
            establish(managed)
            try:
                seen[operation.label] = fuzz(operation, mode, managed, session)
            except Unsatisfiable:
                assert operation.label in NOTHING_TO_GET_WRONG
    assert len(seen) > 15
    if mode.is_positive:
        answered = {label for label, statuses in seen.items() if statuses.keys() & {200, 201, 202}}
        assert len(answered) > 0.75 * len(seen), "what only fails is hardly tested"
