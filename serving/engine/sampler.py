"""The sampler: from logits to each row's next token and its log-probabilities, in one pass over all rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from serving.engine.engine import TokenLogprob
from serving.engine.scheduler import Row

# R row, V vocabulary, K most probable tokens
NUCLEUS_TOKENS = 256  # top_p sorts that many tokens, and all of them only where these hold too little


@dataclass(frozen=True, slots=True)
class Drawn:
    token_id: int
    logprob: TokenLogprob | None


def sample(rows: Sequence[Row], logits_RV: torch.Tensor) -> list[Drawn]:
    """Draws one token a row from float32 logits. A row's draw depends on its own logits and generator only."""
    adjusted_RV = _constrained(rows, _shifted(rows, logits_RV))
    tokens_R = adjusted_RV.argmax(dim=-1)
    drawing = [index for index, row in enumerate(rows) if row.request.sampling.temperature > 0]
    if drawing:
        picked = torch.tensor(drawing, device=logits_RV.device)
        tokens_R[picked] = _draw([rows[index] for index in drawing], adjusted_RV[picked])
    tokens: list[int] = tokens_R.tolist()
    logprobs = _requested_logprobs(rows, logits_RV, tokens)
    return [Drawn(token, logprob) for token, logprob in zip(tokens, logprobs, strict=True)]


def score(logits_RV: torch.Tensor, tokens: Sequence[int], tops: Sequence[int]) -> list[TokenLogprob]:
    """Returns each row's log-probability of a given token, with its `tops` best alternatives."""
    logprobs_RV = torch.log_softmax(logits_RV, dim=-1)
    chosen = logprobs_RV.gather(1, torch.tensor(tokens, device=logits_RV.device)[:, None])[:, 0].tolist()
    best = logprobs_RV.topk(min(max(tops), logits_RV.shape[1]), dim=-1)
    values, indices = best.values.tolist(), best.indices.tolist()
    return [
        TokenLogprob(token, logprob, tuple(zip(indices[row][:top], values[row][:top], strict=True)))
        for row, (token, logprob, top) in enumerate(zip(tokens, chosen, tops, strict=True))
    ]


def _requested_logprobs(
    rows: Sequence[Row], logits_RV: torch.Tensor, tokens: Sequence[int]
) -> Iterator[TokenLogprob | None]:
    tops = {index: row.request.logprobs for index, row in enumerate(rows) if row.request.logprobs is not None}
    scored: dict[int, TokenLogprob] = {}
    if tops:
        picked = torch.tensor(list(tops), device=logits_RV.device)
        scored = dict(zip(tops, score(logits_RV[picked], [tokens[i] for i in tops], list(tops.values())), strict=True))
    return (scored.get(index) for index in range(len(rows)))


def _shifted(rows: Sequence[Row], logits_RV: torch.Tensor) -> torch.Tensor:
    """OpenAI: over generated tokens, logit -= count * frequency_penalty + (count > 0) * presence_penalty; the bias is
    added to it."""
    shifts: dict[tuple[int, int], float] = {}  # by row and token
    for index, row in enumerate(rows):
        sampling = row.request.sampling
        shifts |= {(index, token): bias for token, bias in sampling.logit_bias}
        if sampling.frequency_penalty or sampling.presence_penalty:
            for token, count in row.counts.items():
                penalty = count * sampling.frequency_penalty + sampling.presence_penalty
                shifts[index, token] = shifts.get((index, token), 0.0) - penalty
    if not shifts:
        return logits_RV
    shifted_RV = logits_RV.clone()
    where = torch.tensor(list(shifts), device=logits_RV.device)
    shifted_RV[where[:, 0], where[:, 1]] += torch.tensor(list(shifts.values()), device=logits_RV.device)
    return shifted_RV


def _constrained(rows: Sequence[Row], logits_RV: torch.Tensor) -> torch.Tensor:
    """Gives the tokens that a row's grammar forbids a probability of 0."""
    masks = {index: row.matcher.allowed(logits_RV.shape[1]) for index, row in enumerate(rows) if row.matcher}
    if not masks:
        return logits_RV
    constrained_RV = logits_RV.clone()
    for index, allowed_V in masks.items():
        constrained_RV[index].masked_fill_(~allowed_V.to(logits_RV.device), -torch.inf)
    return constrained_RV


def _draw(rows: Sequence[Row], logits_RV: torch.Tensor) -> torch.Tensor:
    """Inverse transform sampling: one uniform number a token, from the row's own generator."""
    uniform_R = torch.stack([torch.rand((), generator=row.generator, dtype=torch.float64) for row in rows])
    uniform_R = uniform_R.to(logits_RV.device)
    temperature_R = logits_RV.new_tensor([row.request.sampling.temperature for row in rows], dtype=torch.float64)
    # The maximum is subtracted first, so that a tiny temperature cannot overflow.
    scaled_RV = (logits_RV - logits_RV.amax(dim=-1, keepdim=True)) / temperature_R[:, None]
    probs_RV = torch.softmax(scaled_RV, dim=-1)
    top_p = [row.request.sampling.top_p for row in rows]
    tokens_R = _invert(probs_RV, uniform_R)
    cut = [index for index, limit in enumerate(top_p) if limit < 1]
    if cut:
        picked = torch.tensor(cut, device=logits_RV.device)
        limit_R = probs_RV.new_tensor([top_p[index] for index in cut])
        tokens_R[picked] = _draw_nucleus(probs_RV[picked], limit_R, uniform_R[picked])
    return tokens_R


def _draw_nucleus(probs_RV: torch.Tensor, top_p_R: torch.Tensor, uniform_R: torch.Tensor) -> torch.Tensor:
    """Draws among the fewest most probable tokens that hold `top_p` together; always at least one."""
    vocabulary = probs_RV.shape[1]
    best_RK, tokens_RK = probs_RV.topk(min(NUCLEUS_TOKENS, vocabulary), dim=-1)
    if bool((best_RK.sum(dim=-1) < top_p_R).any()):
        best_RK, tokens_RK = probs_RV.sort(dim=-1, descending=True)
    before_RK = best_RK.cumsum(dim=-1) - best_RK
    kept_RK = before_RK < top_p_R[:, None]
    kept_RK[:, 0] = True
    chosen_R = _invert(best_RK * kept_RK, uniform_R)
    return tokens_RK.gather(1, chosen_R[:, None])[:, 0]


def _invert(weights_RV: torch.Tensor, uniform_R: torch.Tensor) -> torch.Tensor:
    """Returns the index where the cumulative weight passes `uniform` of the whole; never one of weight 0."""
    cumulative_RV = weights_RV.cumsum(dim=-1)
    target_R1 = uniform_R[:, None] * cumulative_RV[:, -1:]
    index_R = torch.searchsorted(cumulative_RV, target_R1, right=True)[:, 0]
    return index_R.clamp_(max=weights_RV.shape[1] - 1)
