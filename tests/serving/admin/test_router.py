"""An administrator changes over HTTP what answers, every change is told as it is, and nobody else can."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import httpx
import pytest

from tests.serving.managed import client, managed_server
from tests.tiny import make_fake_app, running_server, wait_until

NAME = "team/starter-1.0_x"  # a path has to carry each of these characters


@pytest.fixture(scope="module")
def shared(tiny_base, tiny_adapters, tmp_path_factory):
    """One server for all tests here; each uses names of its own."""
    with managed_server(tiny_base, tiny_adapters, tmp_path_factory.mktemp("admin"), max_adapters=4) as managed:
        yield managed


def error(response: httpx.Response, status: int, code: str) -> dict:
    assert (response.status_code, response.json()["error"]["code"]) == (status, code), response.text
    return response.json()["error"]


def test_a_revision_is_registered_listed_and_inspected(shared):
    made = shared.register(NAME, "starter", "stable")
    assert made["id"] == f"{NAME}@{made['digest'][:12]}"
    assert (made["status"], made["labels"], made["pinned"], made["resident"]) == ("admitted", ["stable"], False, True)
    assert made["probe"]["from_base_nats"] > 0
    assert shared.register(NAME, "starter")["id"] == made["id"], "again: the same"
    listed = shared.admin.get("/admin/revisions").json()["data"]
    assert [each["id"] for each in listed if each["name"] == NAME] == [made["id"]]
    for revision in (made["id"], f"{NAME}@{made['digest'][:4]}", f"{NAME}@{made['digest']}"):
        found = shared.inspect(revision)
        assert found["id"] == made["id"]
        assert (found["manifest"]["rank"], found["manifest"]["dataset"], found["in_flight"]) == (4, "none", 0)
    quoted = shared.admin.get("/admin/revisions/team%2Fstarter-1.0_x%40" + made["digest"])
    assert quoted.json()["id"] == made["id"]
    assert shared.chat(NAME).json()["model"] == made["id"]


def test_labels_move_with_an_expectation_and_roll_back(shared):
    first = shared.register("moves", "starter", "stable")["digest"]
    second = shared.register("moves", "other")["digest"]
    moved = shared.promote("moves:stable", second, expected=first)
    assert (moved.status_code, moved.json()["digest"], moved.json()["previous"]) == (200, second, first)
    error(shared.promote("moves:stable", second, expected=first), 409, "conflict")
    assert shared.chat("moves").json()["model"] == f"moves@{second[:12]}"
    back = shared.admin.post("/admin/labels/moves:stable/rollback")
    assert back.json()["digest"] == first
    assert shared.chat("moves").json()["model"] == f"moves@{first[:12]}"
    error(shared.admin.post("/admin/labels/moves:stable/rollback"), 409, "conflict")
    assert shared.promote("moves:canary", second).json()["id"] == "moves:canary"
    labels = {each["id"]: each["digest"] for each in shared.admin.get("/admin/labels").json()["data"]}
    assert (labels["moves:stable"], labels["moves:canary"]) == (first, second)
    assert shared.admin.delete("/admin/labels/moves:canary").json() == {"id": "moves:canary", "deleted": True}
    error(shared.admin.delete("/admin/labels/moves:canary"), 404, "model_not_found")


def test_a_retired_revision_is_freed_and_its_name_leaves_the_metrics(shared):
    made = shared.register("gone", "starter", "stable")
    assert shared.chat("gone").status_code == 200
    text = shared.admin.get("/metrics").text
    assert 'graft_resident_revisions{model="gone"} 1.0' in text
    assert float(text.split("graft_load_seconds_count ")[1].split()[0]) >= 1
    error(shared.admin.delete(f"/admin/revisions/{made['id']}"), 409, "conflict")
    shared.admin.delete("/admin/labels/gone:stable")
    retired = shared.admin.delete(f"/admin/revisions/{made['id']}")
    assert (retired.status_code, retired.json()["status"]) == (200, "retired")
    assert shared.inspect(made["id"])["manifest"] is None
    assert shared.chat("gone").status_code == 404
    assert 'model="gone"' not in shared.admin.get("/metrics").text
    assert shared.register("gone", "starter")["status"] == "admitted", "it can come back"


def test_pins(shared):
    made = shared.register("pinned", "other")
    assert shared.admin.put(f"/admin/revisions/{made['id']}/pin").json()["pinned"]
    assert shared.inspect(made["id"])["pinned"]
    assert not shared.admin.delete(f"/admin/revisions/{made['id']}/pin").json()["pinned"]


def test_policies_are_set_told_and_removed(shared):
    shared.register("routed/it", "starter", "stable")
    shared.register("routed/it", "other", "canary")
    path = "/admin/policies/routed/it"
    error(shared.admin.get(path), 404, "model_not_found")
    policy = {"weights": {"stable": 90, "canary": 10}, "sticky": True, "shadow": "canary"}
    made = shared.admin.put(path, json=policy)
    assert made.json() == {"object": "policy", "name": "routed/it", **policy}
    assert shared.admin.get(path).json() == made.json()
    message = error(shared.admin.put(path, json={"weights": {"stable": 1, "nope": 1}}), 400, "invalid_value")["message"]
    assert "nope" in message
    for bad in ({}, {"weights": {}}, {"weights": {"stable": 0}}, {"weights": {"stable": 1}, "stikcy": True}):
        assert shared.admin.put(path, json=bad).status_code == 400
    assert shared.admin.get(path).json() == made.json(), "what was refused changed nothing"
    error(shared.admin.delete("/admin/labels/routed/it:canary"), 409, "conflict")
    assert shared.admin.delete(path).json()["deleted"]
    error(shared.admin.delete(path), 404, "model_not_found")


def test_a_bad_adapter_is_refused_with_every_reason_and_recorded(shared, tiny_adapters):
    root = shared.state.parent / "root"
    shutil.copytree(tiny_adapters["starter"], root / "bad")
    (root / "bad" / "adapter_model.safetensors").write_bytes(b"no weights")
    (root / "bad" / "evil.bin").write_bytes(b"a pickle")
    response = shared.admin.post("/admin/revisions", json={"name": "bad", "path": "bad"})
    found = error(response, 422, "adapter_rejected")
    assert len(found["reasons"]) >= 1
    assert all(reason in found["message"] for reason in found["reasons"])
    assert any("evil.bin" in reason for reason in found["reasons"])
    newest = shared.admin.get("/admin/revisions").json()["refusals"][0]
    assert (newest["name"], newest["source"], newest["reasons"]) == ("bad", "bad", found["reasons"])
    assert shared.chat("bad").status_code == 404


def test_a_file_whose_name_is_no_unicode_is_refused_in_words_that_can_be_read_again(shared, tiny_adapters):
    directory = shutil.copytree(tiny_adapters["starter"], shared.state.parent / "root" / "odd")
    Path(os.fsdecode(os.fsencode(directory) + b"/\xff.bin")).write_bytes(b"")
    response = shared.admin.post("/admin/revisions", json={"name": "odd", "path": "odd"})
    reasons = error(response, 422, "adapter_rejected")["reasons"]
    assert any(reason.startswith(r"\udcff.bin: may run code") for reason in reasons)
    assert shared.admin.get("/admin/revisions").json()["refusals"][0]["reasons"] == reasons


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        ({"name": "x", "path": "../root/starter"}, 400, "path_refused", "path"),
        ({"name": "x", "path": "/etc"}, 400, "path_refused", "path"),
        ({"name": "x", "path": "nothing"}, 400, "path_refused", "path"),
        ({"name": "base", "path": "starter"}, 409, "name_taken", "name"),
        ({"name": "a b", "path": "starter"}, 400, "invalid_value", "name"),
        ({"name": "x", "path": "starter", "label": "A!"}, 400, "invalid_value", "label"),
        ({"name": "x"}, 400, "invalid_value", "path"),
        ({"name": "x", "path": "starter", "hub_id": "a/b"}, 400, "invalid_value", "path"),
        ({"name": "x", "path": "starter", "hub_revision": "v1"}, 400, "invalid_value", "hub_revision"),
        ({"name": "x", "paht": "starter"}, 400, "unknown_field", "paht"),
        ({"path": "starter"}, 400, "missing_field", "name"),
    ],
)
def test_what_cannot_be_registered_is_told_by_name(shared, body, status, code, param):
    assert error(shared.admin.post("/admin/revisions", json=body), status, code)["param"] == param


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/admin/revisions/nothing", 400),
        ("GET", "/admin/revisions/nothing@", 400),
        ("GET", "/admin/revisions/nothing@ab", 404),
        ("DELETE", "/admin/revisions/nothing@ab", 404),
        ("DELETE", "/admin/revisions/nothing@ab?wait_s=-1", 400),
        ("DELETE", "/admin/revisions/nothing@ab?wait_s=soon", 400),
        ("PUT", "/admin/revisions/nothing@ab/pin", 404),
        ("POST", "/admin/labels/nothing/rollback", 400),
        ("POST", "/admin/labels/nothing:stable/rollback", 404),
        ("DELETE", "/admin/labels/nothing", 400),
        ("GET", "/admin/policies/nothing", 404),
        ("GET", "/admin/shadows/nothing", 404),
        ("GET", "/admin/nothing", 404),
        ("PATCH", "/admin/labels", 405),
    ],
)
def test_what_is_not_there_is_an_error_of_the_request(shared, method, path, status):
    response = shared.admin.request(method, path)
    assert response.status_code == status, response.text
    assert response.json()["error"]["message"]


def admin_routes(url: str, key: str) -> list[tuple[str, str]]:
    with client(url, key) as asking:
        paths = asking.get("/openapi.json").json()["paths"]
    return [
        (method.upper(), path) for path, methods in paths.items() if path.startswith("/admin") for method in methods
    ]


def test_no_route_is_open_without_the_admin_key(shared):
    routes = admin_routes(shared.url, shared.user_key)
    assert len(routes) >= 14
    with httpx.Client(base_url=shared.url) as nobody:
        for method, path in routes:
            assert nobody.request(method, path).status_code == 401
            assert nobody.request(method, path, headers={"authorization": "Bearer no"}).status_code == 401
            error(shared.user.request(method, path), 403, "admin_key_required")


def test_without_keys_nobody_administers(tiny_base):
    app, _ = make_fake_app(tiny_base, {})
    with running_server(app) as url, client(url, "any") as anyone:
        routes = admin_routes(url, "any")
        assert len(routes) >= 14
        for method, path in routes:
            assert "--keys" in error(anyone.request(method, path), 403, "admin_key_required")["message"]


def test_an_admin_key_asks_no_model(shared):
    error(shared.admin.post("/v1/completions", json={"model": "base", "prompt": "a"}), 403, "model_not_allowed")
    wait_until(lambda: shared.in_flight() == 0)
