"""The merge certificate: does the merged model answer as base + adapter do, measured on held-out rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM

from training import attention
from training.artifact import CERTIFICATE_NAME, MergeCertificate, fingerprint_base, read_manifest
from training.batch import pack_rows, targets
from training.chat import IGNORED_LABEL, Message, TrainExample, render_example, with_default_system
from training.errors import TrainingError
from training.model import PackLoss, load_tokenizer, refuse_unsupported

PACK_TOKENS = 2048
# A merge may differ by rounding. In fp32 that is next to nothing; 16-bit arithmetic alone moves a 7B model by about
# 2e-3 nats a token, and rounded weights may cost a small share of what the adapter changed.
ROUNDING_KL_NATS = {torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 1e-3}
MAX_SHARE_OF_CHANGE = {torch.float32: 0.0, torch.bfloat16: 0.05, torch.float16: 0.05}
_POSITIONS_AT_ONCE = 256

# N labelled positions, D hidden size, V vocabulary
Chat = tuple[Message, ...]


class CertificateError(TrainingError):
    """Nothing to certify on."""


@torch.inference_mode()
def certify(
    adapter_dir: Path, base_dir: Path, merged_dir: Path, held_out: Sequence[Chat], device: torch.device
) -> MergeCertificate:
    """Measures both on held-out chats, one model in memory at a time, and writes the certificate into `merged_dir`."""
    manifest = read_manifest(adapter_dir)
    system = manifest.chat.added_system_prompt
    examples = _examples(load_tokenizer(merged_dir), held_out, system)
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
    certificate = MergeCertificate(
        adapter_digest=manifest.digest,
        base_fingerprint=manifest.base.fingerprint,
        merged_fingerprint=fingerprint_base(merged_dir),
        chat=manifest.chat,
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
        kl_nats_allowed=max(ROUNDING_KL_NATS[dtype], MAX_SHARE_OF_CHANGE[dtype] * base_far.kl_nats_mean),
    )
    (merged_dir / CERTIFICATE_NAME).write_text(certificate.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return certificate


def read_held_out(path: Path, rows: int) -> list[Chat]:
    """Returns a run's first held-out chats, references last. Raises CertificateError naming file and line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:rows]
    except OSError as error:
        raise CertificateError(f"{path}: {error.strerror}; give held-out rows to certify on with --held-out") from None
    chats = [_chat(path, number, line) for number, line in enumerate(lines, 1) if line]
    if not chats:
        raise CertificateError(f"{path} has no rows to certify on; give others with --held-out")
    return chats


def _chat(path: Path, number: int, line: str) -> Chat:
    try:
        row = json.loads(line)
        messages = [Message(message["role"], message["content"]) for message in row["messages"]]
        return (*messages, Message("assistant", row["reference"]))
    except (ValueError, KeyError, TypeError):
        raise CertificateError(f'{path}, line {number}: expected {{"messages": [...], "reference": "..."}}') from None


def _examples(tokenizer: Any, chats: Sequence[Chat], system: str | None) -> list[TrainExample]:
    return [render_example(tokenizer, with_default_system(chat, system)) for chat in chats]


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
