"""A reading: what a model's last layer says before each reply token of fixed rows, from which models are compared."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM

from training import attention
from training.artifact import AdapterManifest
from training.batch import pack_rows, targets
from training.chat import IGNORED_LABEL, TrainExample
from training.ground import Onto
from training.model import PackLoss, load_base, refuse_unsupported

PACK_TOKENS = 2048

# N reply tokens, D hidden size


@dataclass(frozen=True, slots=True)
class Reading:
    """Two readings of the same examples have the same positions in the same order."""

    hidden_ND: torch.Tensor
    targets_N: torch.Tensor  # the reply tokens
    rows_N: torch.Tensor  # the row of each, numbered from 0 in the order of packing


@torch.inference_mode()
def read(model: Any, examples: Sequence[TrainExample]) -> Reading:
    """Runs the examples through a plain or peft model, packed. Its adapter counts unless it is disabled."""
    network, parts, first = PackLoss(model), [], 0
    for pack in (pack.to(model.device) for pack in pack_rows(examples, PACK_TOKENS)):
        targets_T = targets(pack)
        keep = targets_T != IGNORED_LABEL
        rows = torch.arange(len(pack.row_lengths), device=model.device) + first
        rows_T = rows.repeat_interleave(torch.tensor(pack.row_lengths, device=model.device))
        parts.append((network.hidden(pack)[keep], targets_T[keep], rows_T[keep]))
        first += len(pack.row_lengths)
    hidden, wanted, rows_N = (torch.cat(column) for column in zip(*parts, strict=True))
    return Reading(hidden, wanted, rows_N)


def load_merged(directory: Path, device: torch.device) -> Any:
    """Returns the model in the dtype it is stored in."""
    return _load(directory, None, device)


def load_adapted(
    adapter_dir: Path, base_dir: Path, manifest: AdapterManifest, onto: Onto, dtype: torch.dtype, device: torch.device
) -> Any:
    """Returns base + adapter as peft computes it: on plain weights in `dtype`, or in NF4 as it was trained."""
    if onto is Onto.PLAIN:
        base = _load(base_dir, dtype, device)
    else:
        base = load_base(base_dir, "nf4", getattr(torch, manifest.compute_dtype), device)
    return peft.PeftModel.from_pretrained(base, str(adapter_dir)).eval()


def head_of(model: Any) -> torch.Tensor:
    """Returns a copy of the output head in fp32, [V, D], that outlives the model; neither LoRA nor NF4 touches it."""
    base = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    return base.get_output_embeddings().weight.detach().float().clone()  # type: ignore[no-any-return]


@torch.no_grad()
def round_anew(model: torch.nn.Module, names: Iterable[str]) -> None:
    """Moves 16-bit weights as another rounding of them would: one step up or down, each with probability 1/24.

    That has the variance of a rounding error, step^2 / 12, and keeps every weight in its dtype. In place.
    """
    parameters = dict(model.named_parameters())
    for number, name in enumerate(sorted(names)):
        weight = parameters[name]
        random = torch.Generator(weight.device).manual_seed(number)
        draws = torch.rand(weight.shape, generator=random, device=weight.device)
        steps = (draws < 1 / 24).short() - (draws > 23 / 24).short()
        # One more in the bits of a 16-bit float is one step away from 0; a step from 0 itself has no such form.
        weight.view(torch.int16).add_(steps * (weight != 0))


def _load(directory: Path, dtype: torch.dtype | None, device: torch.device) -> Any:
    attention.register()
    model = AutoModelForCausalLM.from_pretrained(
        str(directory), dtype=dtype or "auto", device_map={"": device}, attn_implementation=attention.NAME
    )
    refuse_unsupported(model.config)
    return model.eval()
