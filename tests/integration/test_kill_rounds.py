"""A server that is killed under load, again and again, comes back with its registry whole and every label in place."""

from __future__ import annotations

import multiprocessing
import random
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext
from pathlib import Path

import httpx
import pytest

from serving.keys import KeyEntry, add_entry, new_key
from tests.integration.killed_server import PRELOAD, serve
from tests.tiny import wait_until

ROUNDS = 100
SEED = 20261124
STREAMS = 3
pytestmark = pytest.mark.slow


@dataclass
class Site:
    """What outlives the kills: directories and keys, and what the administrator was told."""

    context: ForkServerContext
    folder: Path
    base: Path
    secrets: dict[str, str]
    digests: list[str] = field(default_factory=list)
    told: str = ""  # where live:stable points by the last answer
    asked: str = ""  # where the last request, answered or not, would have it point
    promotions: int = 0
    answers: list[str] = field(default_factory=list)  # revisions that answered

    @contextmanager
    def running(self) -> Iterator[str]:
        """Yields the URL of a server that is ready; kills it at the end."""
        ours, theirs = self.context.Pipe()
        arguments = (str(self.base), str(self.folder / "state"), str(self.folder / "root"), str(self.folder / "keys"))
        process = self.context.Process(target=serve, args=(*arguments, theirs))
        process.start()
        try:
            assert ours.poll(30), "the server did not start"
            url = f"http://127.0.0.1:{ours.recv()}"
            wait_until(lambda: httpx.get(f"{url}/readyz").status_code == 200)
            yield url
        finally:
            process.kill()
            process.join()

    def client(self, url: str, key: str) -> httpx.Client:
        return httpx.Client(base_url=url, headers={"authorization": f"Bearer {self.secrets[key]}"}, timeout=20)

    def stream(self, url: str) -> None:
        """Asks again and again until the server is gone."""
        body = {"model": "live", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 40, "stream": True}
        with self.client(url, "user") as client:
            try:
                while True:
                    with client.stream("POST", "/v1/chat/completions", json=body) as response:
                        assert response.status_code == 200, response.read()
                        self.answers.append(response.headers["x-adapter-revision"])
                        for _ in response.iter_lines():
                            pass
            except httpx.TransportError:
                return

    def administer(self, url: str) -> None:
        """Promotes in turn, and registers and retires a spare revision beside it, until the server is gone."""
        with self.client(url, "ops") as client:
            try:
                while True:
                    self.asked = self.digests[self.promotions % 2]
                    done = client.put("/admin/labels/live:stable", json={"digest": self.asked})
                    assert done.status_code == 200, done.text
                    self.told, self.promotions = self.asked, self.promotions + 1
                    client.post("/admin/revisions", json={"name": "spare", "path": "other"}).raise_for_status()
                    client.delete(f"/admin/revisions/spare@{self.digests[1]}").raise_for_status()
            except httpx.TransportError:
                return


@pytest.fixture
def site(tiny_base: Path, tiny_adapters: dict[str, Path], tmp_path: Path) -> Site:
    for name, path in tiny_adapters.items():
        shutil.copytree(path, tmp_path / "root" / name)
    secrets = {}
    for name, kind, models in (("ops", "admin", []), ("user", "inference", ["*"])):
        secrets[name], sha256 = new_key()
        add_entry(tmp_path / "keys", KeyEntry(name=name, sha256=sha256, kind=kind, models=models))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return Site(context, tmp_path, tiny_base, secrets)


@pytest.mark.timeout(1200)
def test_a_hundred_kills_under_load_corrupt_nothing_and_lose_no_label(site):
    randomness = random.Random(SEED)
    with site.running() as url, site.client(url, "ops") as ops:
        for path in ("starter", "other"):
            body = {"name": "live", "path": path, "label": "stable" if path == "starter" else "canary"}
            site.digests.append(ops.post("/admin/revisions", json=body).raise_for_status().json()["digest"])
    site.told = site.asked = site.digests[0]
    for number in range(ROUNDS):
        with site.running() as url:
            check_labels(site, url, number)
            workers = [threading.Thread(target=site.stream, args=(url,)) for _ in range(STREAMS)]
            workers.append(threading.Thread(target=site.administer, args=(url,)))
            for worker in workers:
                worker.start()
            threading.Event().wait(randomness.uniform(0, 0.3))
        for worker in workers:
            worker.join(timeout=30)
            assert not worker.is_alive()
        with sqlite3.connect(site.folder / "state" / "registry.sqlite") as database:
            assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert site.promotions > ROUNDS / 4, "the administrator was hardly heard"
    assert len(set(site.answers)) == 2, "both revisions answered at some time"


def check_labels(site: Site, url: str, number: int) -> None:
    """The label is where the administrator was told, or where the request that the kill cut off would have it."""
    with site.client(url, "ops") as ops, site.client(url, "user") as user:
        labels = {each["id"]: each["digest"] for each in ops.get("/admin/labels").raise_for_status().json()["data"]}
        assert labels["live:stable"] in {site.told, site.asked}, f"seed {SEED}, round {number}"
        assert labels["live:canary"] == site.digests[1]
        site.told = site.asked = labels["live:stable"]
        body = {"model": "live", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
        answer = user.post("/v1/chat/completions", json=body).raise_for_status()
        assert answer.json()["model"] == f"live@{site.told[:12]}"
