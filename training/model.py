"""The model under training: a frozen base, in NF4 or plain, with LoRA on its linear layers."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from training import attention
from training.batch import Pack, targets
from training.config import LoraConfig
from training.errors import TrainingError
from training.graphs import GraphedDecoder
from training.lora_linear import fuse_lora
from training.loss import ChunkNll, chunk_nll, chunk_nll_to_compile, nll_sum
from training.neftune import add_noise
from training.quantised import make_dense


class ModelError(TrainingError):
    """A model that cannot be trained here; says which and what to do."""


def load_tokenizer(directory: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(directory))


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """Returns the dtype of the arithmetic; `auto` is fp32 on a CPU, bf16 from Ampere on, fp16 (and a scaler) before."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        if device.type == "cpu" and dtype == torch.float16:
            raise ModelError("model.dtype = 'float16' needs a CUDA device; use 'auto' or 'float32' on a CPU")
        return dtype
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def nf4_config(dtype: torch.dtype, storage: torch.dtype = torch.uint8) -> BitsAndBytesConfig:
    """Returns NF4 with double quantisation, computed in `dtype`; FSDP splits codes in a `storage` of floats alone."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=storage,
    )


def load_base(
    directory: Path,
    quantisation: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    keep_dense: bool = False,
) -> Any:
    """Returns the frozen base with packed attention; NF4 with double quantisation where `quantisation` is "nf4".

    `keep_dense` makes the matrices dense at once, with the numbers that NF4 stands for, instead of twice in each step.
    """
    attention.register()
    options: dict[str, Any] = {}
    if quantisation == "nf4":
        options["quantization_config"] = nf4_config(dtype)
    model = AutoModelForCausalLM.from_pretrained(
        str(directory), dtype=dtype, device_map={"": device}, attn_implementation=attention.NAME, **options
    )
    if keep_dense:
        make_dense(model)
    refuse_unsupported(model.config)
    model.config.use_cache = False
    model.requires_grad_(False)
    check_loss(PackLoss(model))
    return model


@torch.no_grad()
def check_loss(network: PackLoss) -> None:
    """Raises ModelError where hidden states times the head are not the logits: scaled, biased or capped ones."""
    model = network.eval().model
    ids = torch.arange(1, 9, device=model.device)
    row = Pack(ids, ids, torch.arange(8, device=model.device), (8,))
    ours = float(network(row))
    logits = model(input_ids=ids[None], use_cache=False).logits[0].float()
    theirs = float(torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="sum"))
    if not math.isclose(ours, theirs, rel_tol=2e-2):
        raise ModelError(
            f"{model.config.model_type}: the loss computed here ({ours:.3f} nats over 7 tokens) is not the model's own "
            f"({theirs:.3f}): its output head does more than a product; choose another model"
        )


def refuse_unsupported(config: Any) -> None:
    """Raises ModelError for models whose loss or attention this trainer would compute wrongly."""
    if getattr(config, "final_logit_softcapping", None) or getattr(config, "attn_logit_softcapping", None):
        raise ModelError(f"{config.model_type}: logit soft-capping is not supported; choose a model without it")
    if getattr(config, "attention_dropout", 0):
        raise ModelError(f"{config.model_type}: attention dropout is not supported; set it to 0 in config.json")
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True):
        raise ModelError(
            f"{config.model_type}: a sliding window of {window} is not supported; choose a model without it"
        )


def add_lora(model: Any, lora: LoraConfig, seed: int) -> Any:
    """Returns the peft model with a fresh adapter in fp32; peft's `all-linear` never takes the output head."""
    torch.manual_seed(seed)
    wanted = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    try:
        adapted = peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=lora.rank,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=wanted,
                use_rslora=lora.rslora,
                use_dora=lora.dora,
                bias="none",
                task_type="CAUSAL_LM",
            ),
        )
    except ValueError as error:
        raise ModelError(f"lora.target_modules = {wanted!r}: {error}") from error
    base = adapted.get_base_model()
    if any(isinstance(part, BaseTunerLayer) for part in (base.get_output_embeddings(), base.get_input_embeddings())):
        raise ModelError(
            f"lora.target_modules = {wanted!r} takes in the embedding or the output head, which serving engines cannot "
            "adapt per request; leave them out, or use 'all-linear'"
        )
    fuse_lora(adapted)
    return adapted


def use_checkpointing(model: Any) -> None:
    """Recomputes each block in the backward pass: less memory for a third more arithmetic."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()


def _is_compiled(decoder: Any) -> bool:
    """Whether its blocks are; without gradients they would be another program, for a few validations."""
    return getattr(decoder.layers[0], "_compiled_call_impl", None) is not None


class PackLoss(torch.nn.Module):
    """The peft model as a function from a pack to its summed NLL, so that DDP sees one forward."""

    def __init__(self, model: Any, neftune_alpha: float | None = None) -> None:
        super().__init__()
        self.model = model
        self.neftune_alpha = neftune_alpha
        self.graphs: GraphedDecoder | None = None  # for what is trained; validation goes without
        self._of_chunk: ChunkNll = chunk_nll

    def forward(self, pack: Pack) -> torch.Tensor:
        """Returns the summed NLL in nats, fp32 scalar."""
        head_VD = self._causal().get_output_embeddings().weight
        return nll_sum(self.hidden(pack), head_VD, targets(pack), self._of_chunk)

    def hidden(self, pack: Pack) -> torch.Tensor:
        """Returns the last hidden states, [T, D]."""
        if self.graphs is not None and self.training:
            return self.graphs(pack)
        causal = self._causal()
        decoder = causal.get_decoder()
        with nullcontext() if self.training or not _is_compiled(decoder) else torch.compiler.set_stance("force_eager"):
            hidden_1TD: torch.Tensor = decoder(
                **self._inputs(pack),
                position_ids=pack.position_ids_T[None],
                **attention.rows_of(pack.row_lengths, causal.dtype, pack.input_ids_T.device),
                use_cache=False,
            ).last_hidden_state
        return hidden_1TD[0]

    def compile_blocks(self) -> None:
        """Compiles the decoder's blocks into fewer, larger kernels; the first step then takes one to two minutes."""
        self.model.enable_input_require_grads()  # else the first block is another program, compiled for itself
        for block in self._causal().get_decoder().layers:
            block.compile(dynamic=True)
        self._of_chunk = torch.compile(chunk_nll_to_compile, dynamic=True)

    def use_graphs(self, *, most_tokens: int, most_rows: int, longest_row: int) -> None:
        """Replays CUDA graphs for what is trained; the arguments bound a pack."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.graphs = GraphedDecoder(
            self._causal().get_decoder(),
            trained,
            most_tokens=most_tokens,
            most_rows=most_rows,
            longest_row=longest_row,
        )

    def _inputs(self, pack: Pack) -> dict[str, torch.Tensor]:
        if self.neftune_alpha is None or not self.training:
            return {"input_ids": pack.input_ids_T[None]}
        embeddings_TD = self._causal().get_input_embeddings()(pack.input_ids_T[None])[0]
        return {"inputs_embeds": add_noise(embeddings_TD, pack.row_lengths, self.neftune_alpha)[None]}

    def _causal(self) -> Any:
        return self.model.get_base_model() if isinstance(self.model, peft.PeftModel) else self.model
