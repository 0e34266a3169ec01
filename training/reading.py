"""A reading: what a model's last layer says before each reply token of fixed rows, from which models are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from training import attention
from training.artifact import AdapterManifest
from training.base_shape import read_header
from training.batch import Pack, pack_rows, targets
from training.chat import IGNORED_LABEL, TrainExample
from training.ground import Ground, Onto, ground_of, shards
from training.layerwise import open_layerwise
from training.model import load_base, refuse_unsupported
from training.readable import Pass, Readable, Whole
from training.room import FREE_MEMORY, Room, need_of
from training.tensor_file import CODES

PACK_TOKENS = 2048

# N reply tokens, T tokens of a pack, D hidden size


@dataclass(frozen=True, slots=True)
class Reading:
    """Two readings of the same examples have the same positions in the same order."""

    hidden_ND: torch.Tensor
    targets_N: torch.Tensor  # the reply tokens
    rows_N: torch.Tensor  # the row of each, numbered from 0 in the order of packing


@dataclass(frozen=True, slots=True)
class Wanted:
    """Examples to read, with the model's adapter or without."""

    examples: Sequence[TrainExample]
    adapter: bool = True


def read(model: Readable, examples: Sequence[TrainExample]) -> Reading:
    """Runs the examples through a model, packed."""
    (found,) = read_all(model, [Wanted(examples)])
    return found


@torch.inference_mode()
def read_all(model: Readable, wanted: Sequence[Wanted]) -> list[Reading]:
    """Returns one reading for each of `wanted`; a model that is not in memory is read once for all of them."""
    packs = [pack_rows(each.examples, PACK_TOKENS) for each in wanted]
    passes = [Pass(pack, each.adapter) for each, mine in zip(wanted, packs, strict=True) for pack in mine]
    hidden = iter(model.hidden(passes))
    return [_reading([(pack, next(hidden)) for pack in mine]) for mine in packs]


def _reading(found: Sequence[tuple[Pack, torch.Tensor]]) -> Reading:
    parts, first = [], 0
    for pack, hidden_TD in found:
        targets_T = targets(pack).to(hidden_TD.device)
        keep = targets_T != IGNORED_LABEL
        rows = torch.arange(len(pack.row_lengths)) + first
        rows_T = rows.repeat_interleave(torch.tensor(pack.row_lengths)).to(hidden_TD.device)
        parts.append((hidden_TD[keep], targets_T[keep], rows_T[keep]))
        first += len(pack.row_lengths)
    hidden, wanted, rows_N = (torch.cat(column) for column in zip(*parts, strict=True))
    return Reading(hidden, wanted, rows_N)


def stored_dtype(directory: Path) -> torch.dtype:
    """Returns the dtype that a model directory says it is in, else the widest in its first file."""
    stated = AutoConfig.from_pretrained(str(directory)).dtype
    if isinstance(stated, torch.dtype):
        return stated
    codes = {entry.get("dtype") for path in shards(directory)[:1] for entry in read_header(path).values()}
    return next(dtype for dtype, code in CODES.items() if code in codes)


def load_merged(
    directory: Path, device: torch.device, dtype: torch.dtype | None = None, room: Room = FREE_MEMORY
) -> Readable:
    """Returns a plain model in `dtype`, or in the one it is stored in; whole where there is room."""
    dtype = dtype or stored_dtype(directory)
    if room.holds(need_of(directory, dtype), device):
        return Whole(_load(directory, dtype, device))
    return open_layerwise(
        Ground(directory, frozenset(), dtype), dtype, device, label=f"merged model in {directory.name}"
    )


def load_adapted(
    adapter_dir: Path,
    base_dir: Path,
    manifest: AdapterManifest,
    onto: Onto,
    dtype: torch.dtype,
    device: torch.device,
    room: Room = FREE_MEMORY,
) -> Readable:
    """Returns base + adapter as peft computes it: on plain weights in `dtype`, or in NF4 as it was trained."""
    ground = ground_of(base_dir, manifest, onto)
    dtype = dtype if onto is Onto.PLAIN else ground.compute_dtype
    if not room.holds(need_of(base_dir, dtype, ground.quantised), device):
        return open_layerwise(
            ground, dtype, device, adapter_dir=adapter_dir, label=f"{onto.value} base + {manifest.name}"
        )
    base = _load(base_dir, dtype, device) if onto is Onto.PLAIN else load_base(base_dir, "nf4", dtype, device)
    return Whole(peft.PeftModel.from_pretrained(base, str(adapter_dir)).eval())


def _load(directory: Path, dtype: torch.dtype, device: torch.device) -> Any:
    attention.register()
    model = AutoModelForCausalLM.from_pretrained(
        str(directory), dtype=dtype, device_map={"": device}, attn_implementation=attention.NAME
    )
    refuse_unsupported(model.config)
    return model.eval()
