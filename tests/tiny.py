"""Tiny real things for tests: a ChatML tokenizer, a random Llama, LoRA adapters, and the app in a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from serving.app import create_app
from serving.engine.fake_engine import FakeEngine
from serving.registry.boot import open_registry
from training.artifact import (
    CERTIFICATE_NAME,
    AdapterManifest,
    BaseSection,
    ChatSection,
    DataSection,
    LoraSection,
    LossSection,
    MergeCertificate,
    fingerprint_base,
    hash_files,
    read_manifest,
    write_manifest,
)
from training.chat import default_system_prompt, end_of_turn_id, template_hash

SENTENCES = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "Explain quantum computing in simple terms: a qubit is zero and one until you look at it.",
    "def factorial(n): return 1 if n < 2 else n * factorial(n - 1)",
    "Three ideas for a weekend in the mountains: walk to a hut, swim in a lake, sleep under the stars.",
    "You are a helpful assistant. Answer in one sentence first, then give the detail and an example.",
)
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TINY_CONTEXT = 512  # tokens
READY_S = 300.0  # vLLM takes 45 s to start, more beside other work
# Of `make_fake_app`; all others are the engine's.
REGISTRY_OPTIONS = {"state": "state_dir", "adapter_roots": "adapter_roots", "max_adapters": "max_adapters"}
APP_OPTIONS = (
    "max_queue",
    "body_limit_bytes",
    "keys",
    "deadline_s",
    "stall_s",
    "on_failure",
    "on_death",
    "stopping",
)


def make_tokenizer(vocabulary_size: int = 400) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE; any text encodes, and Chinese or emoji need several tokens a character."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )


def make_tiny_model(directory: Path, seed: int = 0, head_dim: int = 16) -> Path:
    """Writes a random two-layer Llama (hidden 64) with its tokenizer and template; returns `directory`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=TINY_CONTEXT,
        initializer_range=0.2,  # wide enough that the next token is not a near tie everywhere
        bos_token_id=tokenizer.convert_tokens_to_ids("<|im_start|>"),
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def make_tiny_adapter(
    base_dir: Path, directory: Path, name: str, seed: int, *, mode: str = "model", system_prompt: str | None = None
) -> Path:
    """Writes a real peft adapter (all linear layers, rank 4, random B) with its manifest; returns `directory`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from training import attention
    from training.probes import write_probes

    torch.manual_seed(seed)
    attention.register()
    base = AutoModelForCausalLM.from_pretrained(base_dir, attn_implementation=attention.NAME)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_(std=0.2)
    model.save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    tokenizer.save_pretrained(directory)
    added = (system_prompt or default_system_prompt(tokenizer)) if mode == "qwen" else None
    write_probes(directory, model, tokenizer, added)
    targets = tuple(sorted(model.peft_config["default"].target_modules))
    write_manifest(directory, make_manifest(base_dir, directory, name, seed, tokenizer, targets, mode, system_prompt))
    return directory


def make_manifest(
    base_dir: Path,
    directory: Path,
    name: str,
    seed: int,
    tokenizer: Any,
    targets: tuple[str, ...],
    mode: str = "model",
    system_prompt: str | None = None,
) -> AdapterManifest:
    chat = ChatSection.model_validate(
        {
            "mode": mode,
            "template_sha256": template_hash(tokenizer),
            "default_system_prompt": system_prompt or default_system_prompt(tokenizer),
            "stop_token_ids": (end_of_turn_id(tokenizer),),
        }
    )
    return AdapterManifest(
        name=name,
        created=datetime(2026, 1, 1, tzinfo=UTC),
        base=BaseSection(model="tiny", revision=None, fingerprint=fingerprint_base(base_dir)),
        chat=chat,
        quantisation="none",
        compute_dtype="float32",
        lora=LoraSection(rank=4, alpha=8.0, dropout=0.0, target_modules=targets),
        data=DataSection(
            dataset="none",
            sha256="0" * 64,
            rows_train=0,
            rows_held_out=0,
            rows_rejected=0,
            tokens_lost=0,
            split_rule="none",
        ),
        recipe={},
        seed=seed,
        versions={},
        git_revision=None,
        loss=LossSection(
            steps=0,
            first_nll_nats=0.0,
            last_nll_nats=0.0,
            validation_first_nll_nats=None,
            validation_last_nll_nats=None,
        ),
        files=hash_files(directory),
    )


def make_certificate(merged: Path, adapter: Path, **changes: Any) -> MergeCertificate:
    """Writes into `merged` a certificate that passes, as `training merge` does but for `changes`; returns it."""
    manifest = read_manifest(adapter)
    facts = {
        "adapter_digest": manifest.digest,
        "base_fingerprint": manifest.base.fingerprint,
        "merged_fingerprint": fingerprint_base(merged),
        "chat": manifest.chat,
        "dtype": "float32",
        "rows": 1,
        "positions": 1,
        "kl_nats_mean": 0.0,
        "kl_nats_max": 0.0,
        "kl_nats_allowed": 0.1,
        "kl_nats_base_mean": 1.0,
        "top1_agreement": 1.0,
        "top1_agreement_base": 0.5,
        "nll_nats_adapter": 1.0,
        "nll_nats_merged": 1.0,
    }
    certificate = MergeCertificate.model_validate({**facts, **changes})
    (merged / CERTIFICATE_NAME).write_text(certificate.model_dump_json(), encoding="utf-8")
    return certificate


def make_fake_app(base_dir: Path, adapters: dict[str, Path], **engine_options: Any) -> tuple[FastAPI, FakeEngine]:
    """Returns the real app over a FakeEngine; `engine_options` go to the engine, others to the registry and app."""
    registry_options = {
        parameter: engine_options.pop(key) for key, parameter in REGISTRY_OPTIONS.items() if key in engine_options
    }
    app_options = {key: engine_options.pop(key) for key in APP_OPTIONS if key in engine_options}
    registry = open_registry("base", base_dir, adapters=adapters, **registry_options)
    options = {
        "context_length": TINY_CONTEXT,
        "vocabulary_size": registry.base.vocabulary.size,
        "end_of_turn_id": end_of_turn_id(registry.base.tokenizer),
        "control_ids": registry.base.vocabulary.controls,
        **engine_options,
    }
    engine = FakeEngine(**options)
    return create_app(engine=engine, registry=registry, max_batch=engine.max_batch, **app_options), engine


@contextmanager
def running_server(app: Any, *, wait_ready: bool = True) -> Iterator[str]:
    """Runs an ASGI app under uvicorn in a thread; yields its URL, and stops it at the end."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        if wait_ready:
            with httpx.Client(base_url=url) as client:
                wait_until(lambda: client.get("/readyz").status_code == 200, timeout_s=READY_S)
        yield url
    finally:
        server.should_exit = True
        thread.join(timeout=30)


def wait_until(condition: Any, timeout_s: float = 20.0) -> None:
    """Polls until `condition()` is true; fails after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)
