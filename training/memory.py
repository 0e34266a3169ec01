"""The predicted peak memory of a run, part by part, from its recipe and its base's shape."""

from __future__ import annotations

from dataclasses import dataclass

from training.base_shape import BaseShape, Linear
from training.config import LoraConfig, ModelConfig, OptimConfig
from training.loss import CHUNK_BYTES

NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # a code; a byte for 64 of them; 4 bytes for 256 of those
_FP32 = 4
_ADAM_BYTES = {"adamw": 2 * _FP32, "paged_adamw_8bit": 2}


@dataclass(frozen=True, slots=True)
class Place:
    """Where and how a run computes. `runtime_bytes`: Python, its packages and the rows; none of it on a GPU."""

    device: str  # "cpu" or "cuda"
    number_bytes: int  # of the compute dtype
    recompute: bool  # gradient checkpointing
    runtime_bytes: int
    dense: bool = False  # NF4 weights are made dense when they are loaded


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes held at the peak of a step, which comes with the loss or at the start of its backward pass."""

    runtime: int
    mapped: int  # the weight files' pages, which count as a CPU process's own
    weights: int
    adapter: int  # LoRA's weights, gradients and optimizer state
    activations: int  # kept for the backward pass
    working: int  # the loss's logits, the first block's gradients, or what DoRA makes of a matrix
    loading: int  # held beside the runtime while the weights are read; a peak of its own
    sampling: int = 0  # what the samples' passes hold at once, between two steps; a peak of its own

    @property
    def peak(self) -> int:
        model = self.weights + self.adapter
        step = model + self.activations + self.working
        return self.runtime + self.mapped + max(step, self.loading, model + self.sampling)


def plan_memory(
    shape: BaseShape,
    model: ModelConfig,
    lora: LoraConfig,
    optim: OptimConfig,
    place: Place,
    tokens: int,
    labelled: int,
    sampled: int = 0,
) -> MemoryPlan:
    """Predicts the peak for packs of `tokens` tokens, `labelled` of them trained, and samples of `sampled` tokens."""
    quantised = model.quantisation == "nf4" and not place.dense
    weights = _weights(shape, place.number_bytes, quantised=quantised)
    trained = lora.rank * sum(linear.inputs + linear.outputs for linear in adapted(shape, lora))
    trained += sum(linear.outputs for linear in adapted(shape, lora)) if lora.dora else 0  # the lengths of the rows
    gradients = labelled * shape.hidden * (_FP32 + place.number_bytes)  # see training.loss: computed with the value
    return MemoryPlan(
        runtime=place.runtime_bytes,
        mapped=shape.file_bytes if place.device == "cpu" else 0,
        weights=weights,
        adapter=trained * (2 * _FP32 + _ADAM_BYTES[optim.optimizer]),
        activations=tokens * _kept(shape, lora, place)
        + gradients
        + _kept_matrices(shape, lora, place, quantised=quantised),
        working=max(
            _loss(shape, place, labelled),
            _first_backward(shape, lora, place, tokens, quantised=quantised),
            _dora_matrix(shape, lora, place),
        ),
        loading=_loading(shape, weights, place),
        sampling=_sampling(shape, place, sampled, quantised=quantised) + _dora_matrix(shape, lora, place)
        if sampled
        else 0,
    )


def adapted(shape: BaseShape, lora: LoraConfig) -> tuple[Linear, ...]:
    """Returns the linear layers that get LoRA, as peft chooses them."""
    if isinstance(lora.target_modules, str):
        return shape.linears
    return tuple(linear for linear in shape.linears if linear.name in lora.target_modules)


def _weights(shape: BaseShape, number_bytes: int, *, quantised: bool) -> int:
    numbers = sum(linear.inputs * linear.outputs for linear in shape.linears)
    return round(numbers * (NF4_BYTES if quantised else number_bytes)) + shape.other * number_bytes


def _loading(shape: BaseShape, weights: int, place: Place) -> int:
    """The largest tensor is there twice: as it was read, and as it is kept."""
    return weights + shape.vocabulary * shape.hidden * place.number_bytes


def _kept(shape: BaseShape, lora: LoraConfig, place: Place) -> int:
    """Bytes a token that wait for the backward pass."""
    block = _block(shape, lora, place)
    ends = shape.hidden * (2 * place.number_bytes + _FP32)  # embeddings, last hidden states, the last norm's input
    if place.recompute:
        return shape.layers * shape.hidden * place.number_bytes + block + ends
    return shape.layers * block + ends


def _block(shape: BaseShape, lora: LoraConfig, place: Place) -> int:
    """Bytes a token that a block keeps: norms' inputs in fp32, attention's and the MLP's operands, LoRA's inputs."""
    heads = 2 * shape.query + 2 * shape.key_value
    if place.device == "cuda" and place.number_bytes < _FP32:
        heads = 4 * shape.query  # keys and values repeated for each query head
    own = 2 * shape.hidden * _FP32 + (heads + 3 * shape.mlp) * place.number_bytes
    return own + round(_lora_inputs(shape, lora, place) / shape.layers)


def _lora_inputs(shape: BaseShape, lora: LoraConfig, place: Place) -> float:
    """Bytes a token that the LoRA layers keep: their inputs, shared by neighbours, dropout's masks, and A's outputs.

    DoRA's layers keep what base and update make of them too, and with dropout each has an input of its own.
    """
    chosen = adapted(shape, lora)
    groups = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    shared = {groups.get(linear.name, linear.name): linear.inputs for linear in chosen}
    own = sum(linear.inputs for linear in chosen)
    inputs = own if lora.dora and lora.dropout else shape.layers * sum(shared.values())
    results = 2 * sum(linear.outputs for linear in chosen) if lora.dora else 0
    masks = own if lora.dropout else 0  # a byte each
    return (sum(lora.rank for _ in chosen) + inputs + results) * place.number_bytes + masks


def _kept_matrices(shape: BaseShape, lora: LoraConfig, place: Place, *, quantised: bool) -> int:
    """With dropout DoRA multiplies by the dense matrix itself, and autograd keeps it: NF4 saves nothing then."""
    if not (lora.dora and lora.dropout and quantised):
        return 0
    numbers = sum(linear.inputs * linear.outputs for linear in adapted(shape, lora))
    return numbers * place.number_bytes // (shape.layers if place.recompute else 1)


def _dora_matrix(shape: BaseShape, lora: LoraConfig, place: Place) -> int:
    """DoRA makes a matrix's update by an identity as wide as its input, and its rows' lengths from three copies."""
    if not lora.dora:
        return 0
    return max(
        linear.inputs * (linear.inputs + linear.outputs) * _FP32
        + 3 * linear.inputs * linear.outputs * place.number_bytes
        for linear in adapted(shape, lora)
    )


def _sampling(shape: BaseShape, place: Place, tokens: int, *, quantised: bool) -> int:
    """A pass without gradients: a block's hidden states and its MLP's operands, and one dequantised matrix."""
    wide = tokens * (3 * shape.hidden * _FP32 + 3 * shape.mlp * place.number_bytes)
    return wide + (shape.mlp * shape.hidden * place.number_bytes if quantised else 0)


def _loss(shape: BaseShape, place: Place, labelled: int) -> int:
    logits = min(CHUNK_BYTES, labelled * shape.vocabulary * _FP32)
    return round(logits * (2 + 2 * (place.number_bytes < _FP32) * place.number_bytes / _FP32))


def _first_backward(shape: BaseShape, lora: LoraConfig, place: Place, tokens: int, *, quantised: bool) -> int:
    """The last block's MLP: three gradients as wide as it is, one in fp32 for LoRA, and one dequantised matrix."""
    wide = tokens * (3 * shape.mlp + 2 * shape.hidden) * place.number_bytes
    dequantised = shape.mlp * shape.hidden * place.number_bytes if quantised else 0
    return wide + dequantised + (tokens * shape.mlp * _FP32 if lora.dropout else 0)
