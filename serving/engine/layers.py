"""The layers of a base that an adapter can change, read from its configuration alone."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def linear_layers(base_dir: Path) -> dict[str, tuple[int, int]]:
    """Returns (in, out) features by the name that peft gives a layer; no weight is read or allocated."""
    config = AutoConfig.from_pretrained(base_dir)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    return {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
