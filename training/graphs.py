"""CUDA graphs of the decoder: a pack's thousands of kernels start in two calls, not one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from training.batch import Pack

# T tokens of a pack, P tokens of a graph: T rounded up, D hidden size
GRANULE = 128  # tokens: matrix products round their rows up to it anyway, and there is a graph for each multiple
_WARM_UP_TOKENS = (2 * GRANULE, GRANULE)  # two sizes, so that compiled blocks are compiled for every size


@dataclass(frozen=True, slots=True)
class _Captured:
    """The two graphs of one size, and the tensors they read and write."""

    ids_P: torch.Tensor
    positions_P: torch.Tensor
    bounds: torch.Tensor
    hidden_PD: torch.Tensor
    hidden_gradient_PD: torch.Tensor
    gradients: tuple[torch.Tensor, ...]
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph


class GraphedDecoder:
    """Hidden states of packs, with gradients, by replaying graphs that are captured when a size first comes.

    A pack is padded by one more row, which adds nothing to any gradient. All sizes share one pool of memory: a forward
    pass must be followed by its backward pass before the next one. Dropout draws from the device's generator, as
    without graphs. `trained` are the decoder's parameters that get gradients; `most_tokens`, `most_rows` and
    `longest_row` bound a pack.
    """

    def __init__(
        self,
        decoder: Any,
        trained: Sequence[torch.nn.Parameter],
        *,
        most_tokens: int,
        most_rows: int,
        longest_row: int,
    ) -> None:
        self._decoder, self._trained = decoder, tuple(trained)
        self._most_tokens, self._most_rows, self._longest_row = most_tokens, most_rows, max(longest_row, GRANULE)
        self._device = self._trained[0].device
        self._anchor = torch.zeros((), device=self._device, requires_grad=True)  # makes autograd ask for a backward
        self._pool: Any = None
        self._captured: dict[int, _Captured] = {}

    def __call__(self, pack: Pack) -> torch.Tensor:
        """Returns the last hidden states, [T, D], valid until the next call."""
        tokens = pack.input_ids_T.shape[0]
        size = _rounded_up(tokens)
        captured = self._of_size(size)
        captured.ids_P[:tokens].copy_(pack.input_ids_T)
        captured.positions_P[:tokens].copy_(pack.position_ids_T)
        captured.bounds.copy_(self.bounds(pack.row_lengths, size))
        hidden: torch.Tensor = _Replay.apply(self._anchor, captured, tokens, self._trained)  # type: ignore[no-untyped-call]
        return hidden

    def restart(self, most_tokens: int) -> None:
        """Gives all memory back; packs are of at most `most_tokens` from now on."""
        self._captured.clear()
        self._most_tokens = most_tokens

    def _of_size(self, size: int) -> _Captured:
        if not self._captured:  # the largest first: what is smaller then fits into its memory
            self._pool = torch.cuda.graph_pool_handle()
            self._warm_up()
            largest = max(size, _rounded_up(self._most_tokens))
            self._captured[largest] = self._capture(largest)
        if size not in self._captured:
            self._captured[size] = self._capture(size)
        return self._captured[size]

    def bounds(self, row_lengths: Sequence[int], size: int) -> torch.Tensor:
        """Returns where rows begin and end; the padding is a row, and rows that are missing are empty."""
        lengths = torch.tensor(row_lengths)
        if len(lengths) > self._most_rows or int(lengths.max()) > self._longest_row:
            raise ValueError(f"a pack of {len(lengths)} rows up to {int(lengths.max())} tokens: graphs were made for "
                             f"{self._most_rows} up to {self._longest_row}")  # fmt: skip
        bounds = torch.full((self._most_rows + 2,), size, dtype=torch.int32)
        bounds[: len(lengths) + 1] = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        return bounds

    def _capture(self, size: int) -> _Captured:
        random_state = torch.cuda.get_rng_state(self._device)  # a run that resumes captures at other steps
        inputs = self._inputs(size)
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(forward, pool=self._pool):
            hidden_PD = self._run(*inputs)
        hidden_gradient_PD = torch.zeros_like(hidden_PD)
        with torch.cuda.graph(backward, pool=self._pool):
            gradients = torch.autograd.grad(hidden_PD, self._trained, hidden_gradient_PD)
        torch.cuda.set_rng_state(random_state, self._device)
        return _Captured(*inputs, hidden_PD.detach(), hidden_gradient_PD, gradients, forward, backward)

    def _warm_up(self) -> None:
        """What runs for the first time may wait for the device, allocate or compile: not allowed in a capture."""
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for size in _WARM_UP_TOKENS:
                hidden_PD = self._run(*self._inputs(size))
                torch.autograd.grad(hidden_PD, self._trained, torch.zeros_like(hidden_PD))
        torch.cuda.current_stream(self._device).wait_stream(side)

    def _inputs(self, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        row = torch.arange(size, device=self._device) % GRANULE
        bounds = self.bounds((GRANULE,), size).to(self._device)
        return torch.zeros_like(row), row, bounds

    def _run(self, ids_P: torch.Tensor, positions_P: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
        hidden_1PD: torch.Tensor = self._decoder(
            input_ids=ids_P[None],
            position_ids=positions_P[None],
            row_bounds=bounds,
            longest_row=self._longest_row,
            use_cache=False,
        ).last_hidden_state
        return hidden_1PD[0]


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchor: torch.Tensor, captured: _Captured, tokens: int, trained: tuple[torch.nn.Parameter, ...]
    ) -> torch.Tensor:
        captured.forward.replay()
        ctx.captured, ctx.tokens, ctx.trained = captured, tokens, trained
        return captured.hidden_PD[:tokens]

    @staticmethod
    def backward(ctx: Any, gradient_TD: torch.Tensor) -> tuple[None, None, None, None]:
        captured = ctx.captured
        captured.hidden_gradient_PD[: ctx.tokens].copy_(gradient_TD)
        captured.hidden_gradient_PD[ctx.tokens :].zero_()
        captured.backward.replay()
        _accumulate(ctx.trained, captured.gradients)
        return None, None, None, None


def _rounded_up(tokens: int) -> int:
    return -(-tokens // GRANULE) * GRANULE


def _accumulate(trained: Sequence[torch.nn.Parameter], gradients: tuple[torch.Tensor, ...]) -> None:
    """As autograd does it: the first gradient is copied, since the next replay writes over it."""
    present = [parameter.grad for parameter in trained if parameter.grad is not None]
    if present:
        torch._foreach_add_(present, gradients)
        return
    for parameter, copy in zip(trained, torch._foreach_mul(gradients, 1.0), strict=True):
        parameter.grad = copy
