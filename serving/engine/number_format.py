"""The number format of a base's weights: what it needs, and how transformers loads a model in it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from serving.engine.engine import WeightFormat
from serving.engine.product import is_nf4
from serving.errors import ModelRejected

NF4_PACKAGES = ("accelerate", "bitsandbytes")  # what transformers loads NF4 with


def compute_dtype(device: torch.device) -> torch.dtype:
    """fp32 on a CPU, where half precision is many times slower; bf16 on a GPU that has it, else fp16."""
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def check_format(weights: WeightFormat, device: torch.device, dtype: torch.dtype | None) -> None:
    """Raises ModelRejected for a format that cannot be had here; `dtype` is what was asked of the arithmetic."""
    missing = [name for name in NF4_PACKAGES if find_spec(name) is None] if weights is WeightFormat.NF4 else []
    if missing:
        raise ModelRejected(
            f"--weights nf4 needs {' and '.join(missing)}, not installed here: pip install {' '.join(missing)}, or "
            "serve with --weights plain",
            param="weights",
        )
    if weights is WeightFormat.FP16 and device.type != "cpu":
        raise ModelRejected(
            f"--weights fp16 is for CPUs; on {device.type} plain weights have 16 bits: use --weights plain or nf4",
            param="weights",
        )
    if weights is WeightFormat.FP16 and dtype not in {None, torch.float32}:
        raise ModelRejected(f"--weights fp16 computes in float32, not in {dtype}: leave the dtype out", param="weights")
    if weights is WeightFormat.FP16 and not has_fbgemm():
        raise ModelRejected(
            "--weights fp16 needs a PyTorch with FBGEMM, which this CPU's has not: use --weights plain", param="weights"
        )


def has_fbgemm() -> bool:
    """Whether this PyTorch has Meta's library for x86 CPUs, whose product takes 16-bit weights and fp32 inputs."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def load_model(directory: Path, device: torch.device, weights: WeightFormat, dtype: torch.dtype) -> PreTrainedModel:
    """Returns transformers' own model, to read from; NF4 as training loads it, fp16 not rounded yet."""
    if weights is not WeightFormat.NF4:
        plain: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa")
        model: PreTrainedModel = plain.eval().to(device)
        return model
    model = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=dtype,
        device_map={"": device},
        attn_implementation="sdpa",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
    ).eval()
    for module in model.modules():
        if is_nf4(module):
            module.train()  # else a CPU with AVX512-BF16 lays the codes out anew at the first call, and rounds inputs
    return model


def round_in_place(model: PreTrainedModel) -> None:
    """Rounds every linear layer's weight to fp16; an embedding that shares the head's stays."""
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.weight = torch.nn.Parameter(module.weight.half().to(module.weight.dtype), requires_grad=False)
