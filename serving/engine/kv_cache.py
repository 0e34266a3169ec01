"""The key/value cache: one slot a running row, in memory that grows with the rows and their length."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# S slot, K key/value head, L position, D head dimension, T token of a forward pass
FIRST_ROWS, FIRST_LENGTH = 1, 256


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What a model needs cached for one token."""

    layers: int
    kv_heads: int
    head_dim: int

    def token_bytes(self, dtype: torch.dtype) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * dtype.itemsize


class KvCache:
    """Keys and values of `rows` slots up to `length` positions each; both grow by `reserve`, never over the budget."""

    def __init__(
        self, shape: CacheShape, dtype: torch.dtype, device: torch.device, max_rows: int, max_length: int, budget: int
    ) -> None:
        self.rows, self.length, self.max_length = FIRST_ROWS, min(FIRST_LENGTH, max_length), max_length
        self._shape, self._max_rows = shape, max_rows
        self._token_bytes, self._budget = shape.token_bytes(dtype), budget
        if self._budget_tokens < max_length:
            raise ValueError(
                f"a row of context_length {max_length} needs {max_length * self._token_bytes / 2**30:.2f} GiB "
                f"of cache and {budget / 2**30:.2f} GiB may be used: lower context_length to {self._budget_tokens}, "
                "or raise --cache-gib"
            )
        size = (self.rows, shape.kv_heads, self.length, shape.head_dim)
        self.keys = [torch.zeros(size, dtype=dtype, device=device) for _ in range(shape.layers)]  # each SKLD
        self.values = [torch.zeros(size, dtype=dtype, device=device) for _ in range(shape.layers)]

    def reserve(self, rows: int, length: int) -> bool:
        """Makes room for `rows` rows of up to `length` positions; False, and no change, where the budget forbids it."""
        if rows <= self.rows and length <= self.length and self._fits(self.rows, self.length):
            return True
        grown = (min(_doubled(FIRST_ROWS, rows), self._max_rows), min(_doubled(FIRST_LENGTH, length), self.max_length))
        widest = (max(self.rows, grown[0]), max(self.length, grown[1]))
        # All of the budget at once: what is asked for alone would be copied again for every token that follows.
        filled = (rows, min(self._budget_tokens // max(rows, 1), self.max_length))
        for size in (widest, grown, filled):
            if size[1] >= length and self._fits(*size):
                self._resize(*size)
                return True
        return False

    def give_up(self, size: int) -> bool:
        """Lowers the budget by `size` bytes; False, and no change, where no row of the whole context would fit.

        A cache that is larger than the rest shrinks in the next `reserve`. A negative size gives bytes back.
        """
        if self._budget - size < self.max_length * self._token_bytes:
            return False
        self._budget -= size
        return True

    @property
    def _budget_tokens(self) -> int:
        return self._budget // self._token_bytes

    def _fits(self, rows: int, length: int) -> bool:
        return rows * length <= self._budget_tokens

    def places(self, slots_T: torch.Tensor, positions_T: torch.Tensor) -> torch.Tensor:
        """Returns where each head of each token is stored, for `write`: TK flattened; true until the cache grows."""
        heads_K = torch.arange(self._shape.kv_heads, device=slots_T.device)
        places_TK = (slots_T[:, None] * self._shape.kv_heads + heads_K) * self.length + positions_T[:, None]
        return places_TK.flatten()

    def write(self, layer: int, places: torch.Tensor, keys_TKD: torch.Tensor, values_TKD: torch.Tensor) -> None:
        """Stores one key and value of each token."""
        head_dim = self._shape.head_dim
        for cached, new in ((self.keys[layer], keys_TKD), (self.values[layer], values_TKD)):
            cached.view(-1, head_dim).index_copy_(0, places, new.reshape(-1, head_dim))

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` positions of one slot over another."""
        for cached in (*self.keys, *self.values):
            cached[target, :, :length].copy_(cached[source, :, :length])

    def _resize(self, rows: int, length: int) -> None:
        kept_rows, kept_length = min(rows, self.rows), min(length, self.length)
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                # Zeros, not empty: a masked position is multiplied by 0, and 0 times a stray NaN is NaN.
                new = old.new_zeros((rows, self._shape.kv_heads, length, self._shape.head_dim))
                new[:kept_rows, :, :kept_length].copy_(old[:kept_rows, :, :kept_length])
                tensors[layer] = new
        self.rows, self.length = rows, length


def _doubled(start: int, needed: int) -> int:
    while start < needed:
        start *= 2
    return start
