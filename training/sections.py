"""The sections of a recipe: each field's type, bounds, default and meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelConfig(_Section):
    id: str = Field(min_length=1, description="hub id, local directory, or embedded:smollm2-135m-instruct")
    revision: str | None = Field(default=None, min_length=1, description="hub branch, tag or commit; unset: the newest")
    quantisation: Literal["nf4", "none"] = Field(
        default="nf4", description="of the frozen base: NF4 with double quantisation, or plain weights"
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        default="auto", description="of the arithmetic; auto: float32 on CPU, bfloat16 from Ampere on, else float16"
    )
    keep_dense: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="make NF4 weights dense once, when they are loaded: the same numbers, a 7B model in 14 GiB and not "
        "in 5; auto: with compiled blocks that keep activations, which hold them anyway",
    )


class DataConfig(_Section):
    dataset: str = Field(
        min_length=1,
        description="hub id, local .json/.jsonl/.parquet file, `starter`, or a name in dataset_info",
    )
    dataset_info: Annotated[Path, Field(strict=False)] | None = Field(
        default=None, description="a LLaMA-Factory dataset_info.json, in which `dataset` is then a name"
    )
    split: str = Field(default="train", min_length=1, description="of a hub data set")
    format: Literal["auto", "alpaca", "sharegpt", "openai"] = Field(
        default="auto", description="of the rows; auto: by the first row's keys"
    )
    limit: int | None = Field(default=None, ge=1, description="rows read at most, from the start; unset: all")
    held_out: int = Field(default=100, ge=0, le=100_000, description="rows kept out of training for the evaluation")
    template: Literal["model", "qwen"] = Field(
        default="model", description="the model's own chat template, or LLaMA-Factory's way with Qwen's"
    )
    turns: Literal["all", "last"] = Field(default="all", description="of a chat, whose replies are trained")
    cutoff: int = Field(default=1024, ge=16, le=1_048_576, description="tokens a row at most; more is cut and counted")
    strict: bool = Field(default=False, description="whether a bad row ends the run; else it is left out and reported")
    leakage: Literal["drop", "report", "fail"] = Field(
        default="drop", description="what becomes of training rows that repeat a held-out row, exactly or nearly"
    )


class LoraConfig(_Section):
    rank: int = Field(default=8, ge=1, le=1024, description="of the update")
    alpha: float = Field(default=16.0, gt=0, le=65_536, description="the update is scaled by alpha / rank")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="share of LoRA's inputs zeroed while training")
    target_modules: Literal["all-linear"] | Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = Field(
        default="all-linear", description="all-linear (without lm_head), or a list of module name suffixes"
    )
    rslora: bool = Field(default=False, description="scale by alpha / sqrt(rank) instead")
    dora: bool = Field(default=False, description="learn rows' lengths too (DoRA); servers refuse it unless merged")


class OptimConfig(_Section):
    learning_rate: float = Field(default=5e-5, gt=0, le=1, description="at the peak of the schedule")
    schedule: Literal["cosine", "constant", "linear"] = Field(default="cosine", description="after the warmup")
    warmup_ratio: float = Field(default=0.03, ge=0, lt=1, description="share of all steps that raises the rate from 0")
    epochs: int = Field(default=3, ge=1, le=1000, description="passes over the training rows")
    max_steps: int | None = Field(default=None, ge=1, description="optimizer steps at most; unset: by epochs alone")
    batch_size: int = Field(default=16, ge=1, le=65_536, description="rows an optimizer step, over all devices")
    micro_batch_tokens: int = Field(
        default=4096,
        ge=16,
        le=1_048_576,
        description="tokens packed in one forward pass on one device; at least cutoff",
    )
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="decoupled (AdamW)")
    max_grad_norm: float = Field(default=1.0, gt=0, le=1e6, description="gradients are scaled down to this 2-norm")
    optimizer: Literal["adamw", "paged_adamw_8bit"] = Field(
        default="adamw", description="paged_adamw_8bit needs a CUDA device"
    )
    neftune_alpha: float | None = Field(default=None, gt=0, le=1000, description="NEFTune's noise; unset: none")


class RunConfig(_Section):
    name: str = Field(pattern=_NAME, description="the model name under which the adapter is served; not `base`")
    seed: int = Field(default=42, ge=0, le=2**32 - 1, description="of LoRA's start, dropout and the row order")
    log_every: int = Field(default=10, ge=1, description="optimizer steps between progress lines; each is logged")
    save_every: int = Field(default=100, ge=1, description="optimizer steps between checkpoints")
    eval_every: int = Field(default=100, ge=1, description="optimizer steps between validation NLLs")
    eval_rows: int = Field(default=100, ge=0, description="held-out rows of a validation NLL at most; 0: none")
    keep_checkpoints: int = Field(default=2, ge=1, le=1000, description="newest checkpoints kept, beside the best")
    early_stopping_patience: int | None = Field(
        default=None, ge=1, description="validations without a lower NLL that end the run, its best kept; unset: none"
    )
    sample_prompts: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=(), description="prompts that the model answers greedily during training, into samples.md"
    )
    sample_every: int | None = Field(default=None, ge=1, description="steps between them; unset: at each validation")
    sample_tokens: int = Field(default=64, ge=1, le=4096, description="tokens of a sample at most")
    trackers: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        default=(), description="where else to log, by accelerate's names, such as tensorboard"
    )
    gradient_checkpointing: Literal["auto", "on", "off"] = Field(
        default="auto", description="recompute activations to save memory; auto: when the device needs it"
    )
    compile: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="the blocks, a minute or two at the start; auto: long 16-bit runs from Ampere on; measured on one "
        "GPU; several processes train the same adapter",
    )
    cuda_graphs: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="start a pack's kernels in two calls; auto: with compiled blocks that keep activations, on one GPU",
    )

    @model_validator(mode="after")
    def _name_is_free(self) -> RunConfig:
        if self.name == "base":
            raise ValueError("run.name = 'base' is the base model's own served name; choose another")
        return self


class TrainConfig(_Section):
    """All that decides a training run."""

    model: ModelConfig
    data: DataConfig
    lora: LoraConfig = LoraConfig()
    optim: OptimConfig = OptimConfig()
    run: RunConfig

    @model_validator(mode="after")
    def _pack_holds_a_row(self) -> TrainConfig:
        if self.optim.micro_batch_tokens < self.data.cutoff:
            raise ValueError(
                f"optim.micro_batch_tokens = {self.optim.micro_batch_tokens} cannot hold one row of "
                f"data.cutoff = {self.data.cutoff} tokens; raise the first or lower the second"
            )
        return self

    @model_validator(mode="after")
    def _early_stopping_has_rows(self) -> TrainConfig:
        patience, rows, held_out = self.run.early_stopping_patience, self.run.eval_rows, self.data.held_out
        if patience and not (rows and held_out):
            raise ValueError(
                f"run.early_stopping_patience = {patience} needs held-out rows, but data.held_out = {held_out} "
                f"and run.eval_rows = {rows}; raise both above 0, or unset it"
            )
        return self
