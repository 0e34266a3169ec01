"""Streams of base and adapters say to the bit what each says alone, while revisions come, move and go beside them."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from serving.app import create_app
from serving.engine.transformers_engine import TransformersEngine
from serving.registry.boot import open_registry
from tests.serving.managed import Managed, managed_server
from tests.tiny import make_fake_app, make_tiny_adapter, wait_until

ROUNDS = 5
TOKENS = 40
MODELS = ("base", "starter", "starter:canary", "other")


def make_real_app(
    base: Path, adapters: dict[str, Path], *, state: Path, adapter_roots: list[Path], max_adapters: int, **app: Any
) -> tuple[FastAPI, TransformersEngine]:
    registry = open_registry(
        "base", base, adapters=adapters, state_dir=state, adapter_roots=adapter_roots, max_adapters=max_adapters
    )
    engine = TransformersEngine(base, max_batch=8, context_length=512)
    return create_app(engine=engine, registry=registry, max_batch=8, **app), engine


@pytest.fixture(scope="module")
def adapters(tiny_base, tiny_adapters, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("spare")
    spare = {name: make_tiny_adapter(tiny_base, root / name, name, seed) for name, seed in (("a", 3), ("b", 4))}
    return {**tiny_adapters, **spare}


def said(managed: Managed, model: str) -> tuple[str, str]:
    """Returns the revision that answered a stream, and its text."""
    with managed.stream(model, max_tokens=TOKENS) as chunks:
        parts = list(chunks)
    (revision,) = {part["model"] for part in parts}
    assert parts[-1]["choices"][0]["finish_reason"] in {"stop", "length"}
    return revision, "".join(part["choices"][0]["delta"].get("content", "") for part in parts)


def churn(managed: Managed, first: str, second: str) -> None:
    """Registers, asks, promotes and retires other revisions; the two labels of "starter" change places each round."""
    for number in range(ROUNDS):
        path = "ab"[number % 2]
        made = managed.register("churned", path, "stable")
        assert managed.chat("churned", max_tokens=2).json()["model"] == made["id"]
        stable, canary = (second, first) if number % 2 == 0 else (first, second)
        for alias, digest in (("starter:stable", stable), ("starter:canary", canary)):
            assert managed.promote(alias, digest).status_code == 200
        assert managed.admin.delete("/admin/labels/churned:stable").status_code == 200
        retired = managed.admin.delete(f"/admin/revisions/{made['id']}?wait_s=30")
        assert (retired.status_code, retired.json()["status"]) == (200, "retired")


@pytest.mark.slow
@pytest.mark.parametrize("make_app", [make_fake_app, make_real_app])
def test_every_stream_says_what_its_revision_says_alone(tiny_base, adapters, tmp_path, make_app):
    options = {"token_delay_s": 0.002, "end_of_turn_id": None} if make_app is make_fake_app else {}
    with managed_server(tiny_base, adapters, tmp_path, make_app, max_adapters=4, **options) as managed:
        first = managed.register("starter", "starter", "stable")["digest"]
        second = managed.register("starter", "other", "canary")["digest"]
        managed.register("other", "other", "stable")
        alone = dict(said(managed, model) for model in MODELS)
        assert len(alone) == len(MODELS)
        assert len(set(alone.values())) == 3, "one digest under two names says one thing"
        done = threading.Event()

        def ask(model: str) -> list[tuple[str, str]]:
            answers = []
            while not done.is_set():
                answers.append(said(managed, model))
            return answers

        with ThreadPoolExecutor(2 * len(MODELS)) as pool:
            streams = [pool.submit(ask, model) for model in MODELS * 2]
            try:
                churn(managed, first, second)
            finally:
                done.set()
            answers = [answer for stream in streams for answer in stream.result()]
        for revision, text in answers:
            assert text == alone[revision]
        counts = Counter(revision for revision, _ in answers)
        assert set(counts) == set(alone), "each revision answered meanwhile"
        wait_until(lambda: managed.in_flight() == 0)
        assert managed.engine.stats().running == managed.engine.stats().waiting == 0
