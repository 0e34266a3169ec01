"""One step of the engine: plan, one forward pass a set of weights, sample, and what it means for each row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from serving.engine.attention import Span, make_plan
from serving.engine.engine import Delta, FinishReason, Variant, VariantKind
from serving.engine.kv_cache import KvCache
from serving.engine.mixed_lora import AdapterSlice, LoraFactors
from serving.engine.sampler import Drawn, sample, score
from serving.engine.scheduler import Row, Scheduler, Work
from serving.engine.threads import StepThreads
from serving.engine.weights import Forward, WeightSet
from serving.errors import GraftError, ModelRejected

SCORED_AT_ONCE = 128  # prompt positions whose logits exist at one time: 25 MB each pass with a vocabulary of 49k


@dataclass(frozen=True, slots=True)
class Placed:
    """A row's work, and where its tokens stand in the batch."""

    work: Work
    span: Span


class Stepper:
    """Owns the weights, the cache and the rows; used by one thread."""

    def __init__(self, base: WeightSet, cache: KvCache, scheduler: Scheduler, threads: StepThreads) -> None:
        self.base, self.scheduler, self.steps = base, scheduler, 0
        self._threads = threads
        self._cache = cache
        self._merged: dict[Variant, WeightSet] = {}
        self._taken: dict[Variant, int] = {}  # bytes of the cache's budget
        self._adapters: set[Variant] = set()

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.active or self.scheduler.waiting)

    def knows(self, variant: Variant) -> bool:
        return variant.kind is VariantKind.BASE or variant in self._merged or variant in self._adapters

    def add_merged(self, variant: Variant, weights: WeightSet, taken: int = 0) -> None:
        """Takes `taken` bytes from the cache's budget; raises ModelRejected where too little of it would be left."""
        if not self._cache.give_up(taken):
            raise ModelRejected(
                f"merged model {variant.name!r}: beside its {taken / 2**30:.2f} GiB of weights the memory holds no row "
                f"of context_length {self._cache.max_length}: lower --context-length, serve fewer merged models, or "
                "set --cache-gib",
                param="model",
            )
        self._merged[variant], self._taken[variant] = weights, taken

    def add_adapter(self, variant: Variant, updates: dict[str, LoraFactors]) -> None:
        self.base.attach(variant, updates)
        self._adapters.add(variant)

    def remove(self, variant: Variant) -> None:
        users = sum(row.request.variant == variant for row in self.scheduler.rows)
        if users:
            raise RuntimeError(f"{variant.name!r} still answers {users} requests; remove it when they have ended")
        self._merged.pop(variant, None)
        self._cache.give_up(-self._taken.pop(variant, 0))
        if variant in self._adapters:
            self._adapters.discard(variant)
            self.base.detach(variant)

    def step(self) -> list[tuple[Row, Delta | GraftError]]:
        """Runs every row one step further; returns what there is to report. A finished row has left already."""
        work = sorted(self.scheduler.plan(), key=self._batch_order)
        ready: list[Row] = []
        logits: list[torch.Tensor] = []
        for _, group in groupby(work, key=lambda item: id(self._weights(item.row))):
            placed = _place(list(group))
            weights = self._weights(placed[0].work.row)
            self._threads.take(sum(item.work.count for item in placed))
            hidden_TH = weights.forward(self._batch(placed))
            self._score_prompts(weights, placed, hidden_TH)
            ending = [item for item in placed if item.work.completes]
            if ending:
                last_T = torch.tensor([item.span.first + item.span.count - 1 for item in ending], device=weights.device)
                logits.append(weights.logits(hidden_TH[last_T]))
                ready += [item.work.row for item in ending]
        for item in work:
            item.row.cached += item.count
        self.steps += 1
        drawn = sample(ready, torch.cat(logits)) if ready else []
        return [(row, self._advance(row, one)) for row, one in zip(ready, drawn, strict=True)]

    def _weights(self, row: Row) -> WeightSet:
        return self._merged.get(row.request.variant, self.base)

    def _batch_order(self, work: Work) -> tuple[int, int, int]:
        """Sets of weights apart, then adapters together, then by slot, so that decoding rows lie as in the cache."""
        variant = work.row.request.variant
        weights = id(self._merged[variant]) if variant in self._merged else 0
        return weights, hash(variant) if variant in self._adapters else 0, work.slot

    def _batch(self, placed: Sequence[Placed]) -> Forward:
        device = self.base.device
        ids = [
            token for item in placed for token in item.work.row.ids[item.span.start : item.span.start + item.span.count]
        ]
        spans = [item.span for item in placed]
        plan = make_plan(self._cache, spans)
        return Forward(torch.tensor(ids, device=device), plan.positions_T, plan, tuple(self._slices(placed)))

    def _slices(self, placed: Sequence[Placed]) -> Iterator[AdapterSlice]:
        for variant, group in groupby(placed, key=lambda item: item.work.row.request.variant):
            spans = [item.span for item in group]
            if variant in self._adapters:
                yield AdapterSlice(variant, spans[0].first, spans[-1].first + spans[-1].count)

    def _score_prompts(self, weights: WeightSet, placed: Sequence[Placed], hidden_TH: torch.Tensor) -> None:
        """Position p scores token p + 1; what a preempted row has scored before is not scored again."""
        for item in placed:
            row, span = item.work.row, item.span
            prompt, top = row.request.prompt_ids, row.request.prompt_logprobs
            if top is None:
                continue
            end = min(span.length, len(prompt) - 1)
            for start in range(max(span.start, len(row.prompt_logprobs) - 1), end, SCORED_AT_ONCE):
                stop = min(start + SCORED_AT_ONCE, end)
                offset = span.first - span.start
                logits_PV = weights.logits(hidden_TH[offset + start : offset + stop])
                row.prompt_logprobs += score(logits_PV, prompt[start + 1 : stop + 1], [top] * (stop - start))

    def _advance(self, row: Row, drawn: Drawn) -> Delta | GraftError:
        request = row.request
        if row.matcher is not None and row.matcher.problem is not None:
            self.scheduler.drop(row)
            return row.matcher.problem
        first = row.generated == 0
        scores = tuple(row.prompt_logprobs) if first and request.prompt_logprobs is not None else None
        reason = None
        token: tuple[int, ...] = ()
        if request.sampling.max_tokens == 0:
            reason = FinishReason.LENGTH
        elif drawn.token_id in request.sampling.stop_token_ids:
            reason = FinishReason.STOP
        else:
            token = (drawn.token_id,)
            row.ids.append(drawn.token_id)
            row.counts[drawn.token_id] += 1
            full = row.generated == request.sampling.max_tokens or len(row.ids) == self._cache.max_length
            reason = FinishReason.LENGTH if full else None
            if row.matcher is not None and row.matcher.accept(drawn.token_id):
                reason = FinishReason.STOP
        if reason is not None:
            self.scheduler.drop(row)
        logprobs = (drawn.logprob,) if token and drawn.logprob is not None else ()
        return Delta(token, logprobs, scores, reason, row.waited_s if first else None)


def _place(work: Sequence[Work]) -> list[Placed]:
    placed, first = [], 0
    for item in work:
        placed.append(Placed(item, Span(item.slot, item.row.cached, first, item.count)))
        first += item.count
    return placed
