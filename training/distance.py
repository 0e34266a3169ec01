"""The distance between two models' answers, token by token, and the interval of its mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from training.reading import Reading

# N reply tokens, V vocabulary, D hidden size, S bootstrap samples, R rows
_CHUNK_BYTES = 2**24  # of fp32 logits: small enough for the allocator to use the memory again
_SAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Distance:
    """From a reference's next-token distributions to a variant's; fp64 on the CPU, in nats where not bool."""

    kl_N: torch.Tensor
    agree_N: torch.Tensor  # bool: both would write the same token
    nll_reference_N: torch.Tensor
    nll_variant_N: torch.Tensor
    rows_N: torch.Tensor

    @property
    def kl_mean(self) -> float:
        return max(self.kl_N.mean().item(), 0.0)  # fp32 may leave -1e-9

    @property
    def kl_max(self) -> float:
        return max(self.kl_N.max().item(), 0.0)

    @property
    def top1_agreement(self) -> float:
        return self.agree_N.double().mean().item()

    @property
    def nll_difference(self) -> float:
        return (self.nll_variant_N - self.nll_reference_N).mean().item()

    def nll_interval(self) -> tuple[float, float]:
        """Returns the 95 % interval of `nll_difference`: percentile bootstrap over rows, whose tokens hang together."""
        rows = int(self.rows_N.max()) + 1
        sums_R = torch.zeros(rows, dtype=torch.float64)
        sums_R.index_add_(0, self.rows_N, self.nll_variant_N - self.nll_reference_N)
        counts_R = torch.bincount(self.rows_N, minlength=rows).double()
        draws_SR = torch.randint(rows, (_SAMPLES, rows), generator=torch.Generator().manual_seed(0))
        means_S = sums_R[draws_SR].sum(1) / counts_R[draws_SR].sum(1)
        low, high = means_S.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return low, high

    def agreeing_prefixes(self) -> tuple[int, ...]:
        """Returns for each row the tokens before the first at which the two would write different ones."""
        return tuple(
            int(self.agree_N[self.rows_N == row].long().cumprod(0).sum()) for row in range(int(self.rows_N.max()) + 1)
        )


@torch.inference_mode()
def distances(reference: Reading, variants: Sequence[Reading], head_VD: torch.Tensor) -> list[Distance]:
    """Returns the distance to each variant. Logits are in fp32, so that the head adds no rounding of its own."""
    step = max(_CHUNK_BYTES // (4 * head_VD.shape[0]), 1)
    parts: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in variants]
    for start in range(0, len(reference.targets_N), step):
        part = slice(start, start + step)
        targets_N1 = reference.targets_N[part, None]
        left = _log_probabilities(reference, part, head_VD)
        for number, variant in enumerate(variants):
            right = _log_probabilities(variant, part, head_VD)
            parts[number].append(
                (
                    (left.exp() * (left - right)).sum(-1).double(),
                    left.argmax(-1) == right.argmax(-1),
                    -left.gather(1, targets_N1).squeeze(1).double(),
                    -right.gather(1, targets_N1).squeeze(1).double(),
                )
            )
    return [_joined(part, reference.rows_N) for part in parts]


def _joined(parts: Sequence[tuple[torch.Tensor, ...]], rows_N: torch.Tensor) -> Distance:
    kl, agree, nll_reference, nll_variant = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    return Distance(kl, agree, nll_reference, nll_variant, rows_N.cpu())


def _log_probabilities(reading: Reading, part: slice, head_VD: torch.Tensor) -> torch.Tensor:
    return (reading.hidden_ND[part].float() @ head_VD.T).log_softmax(-1)
