"""The merge certificate: does the merged model answer as base + adapter do, measured on held-out rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM

from training import attention
from training.artifact import fingerprint_base, read_manifest
from training.batch import pack_rows, targets
from training.chat import IGNORED_LABEL, Message, TrainExample, render_example, with_default_system
from training.errors import TrainingError
from training.model import PackLoss, load_tokenizer, refuse_unsupported

CERTIFICATE_NAME = "merge_certificate.json"
PACK_TOKENS = 2048
# A merge may differ by rounding: at most this share of what the adapter itself changed, or this floor where it changed
# next to nothing. 16-bit arithmetic alone moves a 7B model's distributions by about 2e-3 nats.
MAX_SHARE_OF_CHANGE = 0.05
FLOOR_KL_NATS = {torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 1e-3}
_POSITIONS_AT_ONCE = 256

# N labelled positions, D hidden size, V vocabulary


class CertificateError(TrainingError):
    """Nothing to certify on."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """How far merged stands from base + adapter, over `positions` reply tokens of `rows` held-out rows."""

    adapter_digest: str
    base_fingerprint: str
    merged_fingerprint: str
    dtype: str
    rows: int
    positions: int
    kl_nats_mean: float  # a token's KL(base + adapter || merged)
    kl_nats_max: float
    kl_nats_base_mean: float  # a token's KL(base + adapter || base): what the adapter changed
    top1_agreement: float
    top1_agreement_base: float
    nll_nats_adapter: float
    nll_nats_merged: float
    kl_nats_allowed: float

    @property
    def passed(self) -> bool:
        return self.kl_nats_mean <= self.kl_nats_allowed


@torch.inference_mode()
def certify(
    adapter_dir: Path, base_dir: Path, merged_dir: Path, held_out: Path, rows: int, device: torch.device
) -> Certificate:
    """Measures both models on the first `rows` held-out rows and writes the certificate into `merged_dir`.

    One model is in memory at a time. Raises CertificateError where `held_out` has no rows.
    """
    manifest = read_manifest(adapter_dir)
    system = manifest.chat.default_system_prompt if manifest.chat.mode == "qwen" else None
    examples = _examples(load_tokenizer(merged_dir), held_out, rows, system)
    merged = _load(merged_dir, None, device)
    dtype = merged.dtype
    hidden_merged_ND, targets_N = _hidden(merged, examples, device)
    del merged
    reference = peft.PeftModel.from_pretrained(_load(base_dir, dtype, device), str(adapter_dir))
    hidden_adapter_ND, _ = _hidden(reference, examples, device)
    with reference.disable_adapter():
        hidden_base_ND, _ = _hidden(reference, examples, device)
    head_VD = reference.get_base_model().get_output_embeddings().weight  # LoRA never touches it
    merged_far = _compare(hidden_adapter_ND, hidden_merged_ND, targets_N, head_VD)
    base_far = _compare(hidden_adapter_ND, hidden_base_ND, targets_N, head_VD)
    certificate = Certificate(
        adapter_digest=manifest.digest,
        base_fingerprint=manifest.base.fingerprint,
        merged_fingerprint=fingerprint_base(merged_dir),
        dtype=str(dtype).removeprefix("torch."),
        rows=len(examples),
        positions=len(targets_N),
        kl_nats_mean=merged_far.kl_nats_mean,
        kl_nats_max=merged_far.kl_nats_max,
        kl_nats_base_mean=base_far.kl_nats_mean,
        top1_agreement=merged_far.top1_agreement,
        top1_agreement_base=base_far.top1_agreement,
        nll_nats_adapter=merged_far.nll_nats_left,
        nll_nats_merged=merged_far.nll_nats_right,
        kl_nats_allowed=max(FLOOR_KL_NATS[dtype], MAX_SHARE_OF_CHANGE * base_far.kl_nats_mean),
    )
    text = json.dumps({**asdict(certificate), "passed": certificate.passed}, indent=2)
    (merged_dir / CERTIFICATE_NAME).write_text(text + "\n")
    return certificate


def _examples(tokenizer: Any, held_out: Path, rows: int, system: str | None) -> list[TrainExample]:
    lines = held_out.read_text(encoding="utf-8").splitlines()[:rows]
    if not lines:
        raise CertificateError(f"{held_out} has no rows to certify on; give a file with --held-out")
    chats = [json.loads(line) for line in lines]
    conversations = [
        (*(Message(m["role"], m["content"]) for m in chat["messages"]), Message("assistant", chat["reference"]))
        for chat in chats
    ]
    return [render_example(tokenizer, with_default_system(chat, system)) for chat in conversations]


def _load(directory: Path, dtype: torch.dtype | None, device: torch.device) -> Any:
    attention.register()
    model = AutoModelForCausalLM.from_pretrained(
        str(directory), dtype=dtype or "auto", device_map={"": device}, attn_implementation=attention.NAME
    )
    refuse_unsupported(model.config)
    return model.eval()


def _hidden(model: Any, examples: Sequence[TrainExample], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the last hidden states that predict reply tokens, [N, D], and those tokens, [N]."""
    network = PackLoss(model)
    hidden, wanted = [], []
    for pack in (pack.to(device) for pack in pack_rows(examples, PACK_TOKENS)):
        targets_T = targets(pack)
        keep = targets_T != IGNORED_LABEL
        hidden.append(network.hidden(pack)[keep])
        wanted.append(targets_T[keep])
    return torch.cat(hidden), torch.cat(wanted)


@dataclass(frozen=True, slots=True)
class _Distance:
    """From one model's distributions (left) to another's (right), over all positions."""

    kl_nats_mean: float
    kl_nats_max: float
    top1_agreement: float
    nll_nats_left: float
    nll_nats_right: float


def _compare(
    left_ND: torch.Tensor, right_ND: torch.Tensor, targets_N: torch.Tensor, head_VD: torch.Tensor
) -> _Distance:
    kl, agree, nll = [], [], []
    for start in range(0, len(targets_N), _POSITIONS_AT_ONCE):
        part = slice(start, start + _POSITIONS_AT_ONCE)
        left, right = ((hidden[part] @ head_VD.T).float().log_softmax(-1) for hidden in (left_ND, right_ND))
        kl.append((left.exp() * (left - right)).sum(-1))
        agree.append(left.argmax(-1) == right.argmax(-1))
        nll.append(torch.stack([-side.gather(1, targets_N[part, None]).squeeze(1) for side in (left, right)]))
    kl_N, agree_N, nll_2N = torch.cat(kl).double(), torch.cat(agree).double(), torch.cat(nll, 1).double()
    return _Distance(
        kl_nats_mean=max(kl_N.mean().item(), 0.0),  # rounding may leave -1e-9
        kl_nats_max=max(kl_N.max().item(), 0.0),
        top1_agreement=agree_N.mean().item(),
        nll_nats_left=nll_2N[0].mean().item(),
        nll_nats_right=nll_2N[1].mean().item(),
    )
