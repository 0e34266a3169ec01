"""Writes a trained adapter directory: weights, tokenizer, template, and its manifest last."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from safetensors import SafetensorError

from training.artifact import (
    AdapterManifest,
    BaseSection,
    ChatSection,
    LoraSection,
    LossSection,
    hash_files,
    write_manifest,
)
from training.budget import is_out_of_memory
from training.chat import end_of_turn_id, template_hash
from training.config import TrainConfig
from training.disk import sync
from training.errors import TrainingError
from training.log import TrainLog
from training.prepare import system_prompt
from training.probes import add_plain_scores, plain_scores, write_probes
from training.run import Run

_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets")


def save_adapter(directory: Path, run: Run, log: TrainLog) -> AdapterManifest:
    """Writes `directory` whole or not at all; one that stood there before is replaced only at the end."""
    temporary = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    lora = run.peft_model.peft_config["default"]
    lora.base_model_name_or_path = run.base.model_id
    lora.target_modules = sorted(lora.target_modules)  # peft writes a set, whose order differs from process to process
    run.peft_model.save_pretrained(temporary, save_embedding_layers=False)
    (temporary / "README.md").unlink(missing_ok=True)  # peft's model card is an empty form
    run.tokenizer.save_pretrained(temporary)
    with run.accelerator.autocast():  # the arithmetic it was trained in
        write_probes(temporary, run.peft_model, run.tokenizer, _chat(run).added_system_prompt)
    _score_on_plain_base(temporary, run)
    manifest = _manifest(temporary, run, log)
    for path in temporary.iterdir():
        sync(path)
    write_manifest(temporary, manifest)
    sync(temporary)
    old = directory.with_name(directory.name + ".old")
    if directory.exists():
        shutil.rmtree(old, ignore_errors=True)
        directory.rename(old)
    temporary.rename(directory)
    sync(directory.parent)
    shutil.rmtree(old, ignore_errors=True)
    return manifest


def _score_on_plain_base(directory: Path, run: Run) -> None:
    """Adds what a server of the plain base must compute; a run that cannot tell is whole without, and says so."""
    try:
        scores = plain_scores(directory, run.base.directory, run.accelerator.device)
    except (OSError, SafetensorError, TrainingError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        print(
            f"the probes have no scores on the plain base, so servers check this adapter less sharply: {error}",
            file=sys.stderr,
            flush=True,
        )
        return
    if scores is not None:
        add_plain_scores(directory, scores)


def _chat(run: Run) -> ChatSection:
    return ChatSection(
        mode=run.config.data.template,
        template_sha256=template_hash(run.tokenizer),
        default_system_prompt=system_prompt(run.tokenizer, run.config.data),
        stop_token_ids=(end_of_turn_id(run.tokenizer),),
    )


def _manifest(directory: Path, run: Run, log: TrainLog) -> AdapterManifest:
    config, base = run.config, run.base
    lora = run.peft_model.peft_config["default"]
    return AdapterManifest(
        name=config.run.name,
        created=datetime.now(UTC),
        base=BaseSection(model=base.model_id, revision=base.revision, fingerprint=run.inputs["base"]),
        chat=_chat(run),
        quantisation="nf4-double" if config.model.quantisation == "nf4" else "none",
        compute_dtype=str(run.peft_model.get_base_model().dtype).removeprefix("torch."),
        lora=LoraSection(
            rank=lora.r,
            alpha=lora.lora_alpha,
            dropout=lora.lora_dropout,
            target_modules=tuple(sorted(lora.target_modules)),
        ),
        data=run.data.facts,
        recipe=config.model_dump(mode="json"),
        seed=config.run.seed,
        versions=_versions(),
        git_revision=_git_revision(),
        loss=_loss_summary(log, config),
        files=hash_files(directory),
    )


def _loss_summary(log: TrainLog, config: TrainConfig) -> LossSection:
    losses, validation, best = log.losses(), log.validation(), log.best()
    return LossSection(
        steps=losses[-1][0],
        first_nll_nats=losses[0][1],
        last_nll_nats=losses[-1][1],
        validation_first_nll_nats=validation[0][1] if validation else None,
        validation_last_nll_nats=validation[-1][1] if validation else None,
        validation_best_nll_nats=best[1] if best else None,
        weights_step=best[0] if best and config.run.early_stopping_patience else losses[-1][0],
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _git_revision() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # installed without its repository
        return None
