"""A server with keys over a FakeEngine, and what an administrator and a user ask of it over HTTP."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from serving.keys import KeyEntry, KeyRing, add_entry, new_key
from tests.tiny import make_fake_app, running_server

USER = {"role": "user", "content": "a word that nobody logs: heliotrope"}


@dataclass(frozen=True)
class Managed:
    url: str
    engine: Any  # a FakeEngine unless another app is made
    admin: httpx.Client
    user: httpx.Client
    user_key: str
    bob_key: str  # may use "other" only
    state: Path

    def register(self, name: str, path: str, label: str | None = None) -> dict[str, Any]:
        response = self.admin.post("/admin/revisions", json={"name": name, "path": path, "label": label})
        assert response.status_code == 201, response.text
        return response.json()

    def promote(self, alias: str, digest: str, expected: str | None = None) -> httpx.Response:
        return self.admin.put(f"/admin/labels/{alias}", json={"digest": digest, "expected": expected})

    def inspect(self, revision: str) -> dict[str, Any]:
        response = self.admin.get(f"/admin/revisions/{revision}")
        assert response.status_code == 200, response.text
        return response.json()

    def in_flight(self) -> int:
        return sum(each["in_flight"] for each in self.admin.get("/admin/revisions").json()["data"])

    def chat(self, model: str, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
        body = {"model": model, "messages": [USER], "temperature": 0, "max_tokens": 8, **fields}
        return self.user.post("/v1/chat/completions", json=body, headers=headers)

    @contextmanager
    def stream(self, model: str, **fields: Any) -> Iterator[Iterator[dict[str, Any]]]:
        """Yields the chunks of a stream that has begun."""
        body = {"model": model, "messages": [USER], "temperature": 0, "stream": True, **fields}
        with self.user.stream("POST", "/v1/chat/completions", json=body) as response:
            assert response.status_code == 200, response.read()
            yield (json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {"))


@contextmanager
def managed_server(
    base: Path,
    adapters: dict[str, Path],
    directory: Path,
    make_app: Callable[..., tuple[FastAPI, Any]] = make_fake_app,
    **options: Any,
) -> Iterator[Managed]:
    """Serves the base as "base"; the adapters lie below the adapter root, each under its name there."""
    root, keys = directory / "root", directory / "keys.toml"
    for name, path in adapters.items():
        shutil.copytree(path, root / name)
    secrets = {}
    for name, kind, models in (("ops", "admin", []), ("ann", "inference", ["*"]), ("bob", "inference", ["other"])):
        secrets[name], sha256 = new_key()
        add_entry(keys, KeyEntry(name=name, sha256=sha256, kind=kind, models=models, metrics=kind == "admin"))
    state = directory / "state"
    app, engine = make_app(base, {}, keys=KeyRing(keys), state=state, adapter_roots=[root], **options)
    with (
        running_server(app) as url,
        client(url, secrets["ops"]) as admin,
        client(url, secrets["ann"]) as user,
    ):
        yield Managed(url, engine, admin, user, secrets["ann"], secrets["bob"], state)


def client(url: str, key: str) -> httpx.Client:
    return httpx.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=30)


@contextmanager
def server_starter(base: Path, adapters: dict[str, Path], directory: Path) -> Iterator[Callable[..., Managed]]:
    """Yields `start(**options)`, which starts a managed server; all end with it."""
    with ExitStack() as running:
        yield lambda **options: running.enter_context(managed_server(base, adapters, directory, **options))
