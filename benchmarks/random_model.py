"""Random weights of a known model's shape: they cost the same time and memory as the real ones, and need no hub.

python -m benchmarks.random_model qwen2-7b --tokenizer DIR --out DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaForCausalLM

QWEN2_7B: dict[str, Any] = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": False,
}
SMOLLM2_135M: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
SHAPES: dict[str, tuple[Any, Any, dict[str, Any], torch.dtype]] = {
    "qwen2-7b": (Qwen2Config, Qwen2ForCausalLM, QWEN2_7B, torch.bfloat16),
    "smollm2-135m": (LlamaConfig, LlamaForCausalLM, SMOLLM2_135M, torch.float32),
}


def write(shape: str, tokenizer_dir: Path, out: Path) -> Path:
    """Writes a model of `shape` with random weights and the tokenizer's special tokens; returns `out`."""
    config_class, model_class, sizes, dtype = SHAPES[shape]
    tokenizer = AutoTokenizer.from_pretrained(str(tokenizer_dir))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    config = config_class(**sizes, eos_token_id=end, pad_token_id=end, bos_token_id=end, dtype=dtype)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model: Any = model_class(config)
    model.save_pretrained(str(out))
    tokenizer.save_pretrained(str(out))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory of a ChatML tokenizer")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    print(write(arguments.shape, arguments.tokenizer, arguments.out))


if __name__ == "__main__":
    main()
