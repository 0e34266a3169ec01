"""The engine on plain transformers models: continuous batching of base, adapters and merged models in one process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import TypeVar

import torch

from serving.engine.checks import check_request, check_sizes, not_loaded
from serving.engine.engine import (
    Delta,
    EngineStats,
    Feature,
    GenerationRequest,
    Sampling,
    Variant,
    VariantKind,
    WeightFormat,
    WeightsCost,
)
from serving.engine.grammar import GrammarCompiler, Matcher
from serving.engine.kv_cache import KvCache
from serving.engine.memory import cache_budget
from serving.engine.number_format import check_format
from serving.engine.scheduler import Row, Scheduler
from serving.engine.step import Stepper
from serving.engine.threads import measure_threads
from serving.engine.weights import WeightSet, load_weights
from serving.engine.worker import Worker
from serving.errors import EngineDead, GraftError, ModelRejected

logger = logging.getLogger("graft.engine")

T = TypeVar("T")
Outbox = asyncio.Queue[Delta | GraftError]
# Prompt tokens a step. A CPU gains nothing from larger chunks (a token costs the same from 64 on), and running
# streams would stall longer: 64 take about 0.15 s. A GPU needs many tokens to be busy.
CHUNK_TOKENS_CPU, CHUNK_TOKENS_CUDA = 64, 1024


class TransformersEngine:
    """Implements Engine. One thread owns the model and steps; the event loop sends it requests and receives deltas.

    `device` defaults to a GPU where there is one; `cache_bytes` bounds the key/value cache, None leaves a share of the
    memory to it, out of which merged models are taken. `weights` is how the base is kept; `dtype` None is the
    arithmetic that suits the device.
    """

    simulated = False
    features = frozenset({Feature.GRAMMAR})

    def __init__(
        self,
        base_dir: Path,
        *,
        max_batch: int = 32,
        context_length: int | None = None,
        device: str | None = None,
        cache_bytes: int | None = None,
        weights: WeightFormat = WeightFormat.PLAIN,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.context_length = check_sizes(base_dir, max_batch, context_length)
        self._base_dir, self._max_batch, self._cache_bytes = base_dir, max_batch, cache_bytes
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._weights, self._dtype = weights, dtype
        check_format(weights, self._device, dtype)
        self._stepper: Stepper | None = None
        self._worker: Worker | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failure: EngineDead | None = EngineDead("the engine is not started")
        self._outboxes: dict[Row, Outbox] = {}
        self._grammars = GrammarCompiler(base_dir)

    @property
    def weights_cost(self) -> WeightsCost | None:
        return None if self._stepper is None else self._stepper.base.cost

    async def start(self) -> None:
        if self._worker is not None:
            raise RuntimeError("the engine is started already")
        self._loop = asyncio.get_running_loop()
        self._stepper = stepper = await asyncio.to_thread(self._load)
        self._worker = Worker(lambda: stepper.busy, self._step, self._report_death)
        self._worker.start()
        self._failure = None

    async def stop(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            await asyncio.to_thread(worker.stop)
        self._fail(EngineDead("the engine was stopped"))
        self._stepper = None

    async def add(self, variant: Variant) -> None:
        """Reads and checks the weights beside the running steps; only attaching them happens between two steps."""
        stepper, worker = self._parts()
        if stepper.knows(variant):
            return
        if variant.kind is VariantKind.MERGED:
            weights = await asyncio.to_thread(self._load_merged, stepper.base, variant)
            taken = weights.size_bytes if self._cache_bytes is None else 0
            await self._between_steps(worker, lambda: stepper.add_merged(variant, weights, taken))
            return
        updates = await asyncio.to_thread(stepper.base.read_adapter, variant)
        await self._between_steps(worker, lambda: stepper.add_adapter(variant, updates))

    async def remove(self, variant: Variant) -> None:
        stepper, worker = self._parts()
        await self._between_steps(worker, lambda: stepper.remove(variant))

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        self._check(self._parts()[0], request)
        row = Row(request, _generator(request.sampling.seed), await self._matcher(request.sampling))
        stepper, worker = self._parts()  # only now: the engine may have ended while the grammar compiled
        outbox = self._outboxes[row] = Outbox()
        worker.post(lambda: self._enter(stepper, row))
        try:
            while True:
                item = await outbox.get()
                if isinstance(item, GraftError):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            if self._outboxes.pop(row, None) is not None:
                worker.post(lambda: stepper.scheduler.drop(row))

    def stats(self) -> EngineStats:
        """Read from the other thread without a lock: each number is right, at moments a few milliseconds apart."""
        if self._stepper is None:
            return EngineStats(0, 0, 0)
        running = len(self._stepper.scheduler.active)
        return EngineStats(running, max(len(self._outboxes) - running, 0), self._stepper.steps)

    def healthy(self) -> bool:
        return self._failure is None and self._worker is not None and self._worker.alive

    def _load(self) -> Stepper:
        base = load_weights(self._base_dir, self.context_length, self._device, self._weights, self._dtype)
        cost = "" if base.cost is None else f"; {base.cost}"
        logger.info("base in %s: %.2f GiB%s", self._weights.value, base.size_bytes / 2**30, cost)
        budget = cache_budget(self._device, base.size_bytes) if self._cache_bytes is None else self._cache_bytes
        cache = KvCache(base.shape, base.dtype, base.device, self._max_batch, self.context_length, budget)
        chunk_tokens = CHUNK_TOKENS_CPU if self._device.type == "cpu" else CHUNK_TOKENS_CUDA
        threads = measure_threads(base)
        logger.info("steps of up to %d tokens take one thread, larger ones %d", threads.alone_up_to, threads.most)
        return Stepper(base, cache, Scheduler(cache, max_rows=self._max_batch, chunk_tokens=chunk_tokens), threads)

    def _load_merged(self, base: WeightSet, variant: Variant) -> WeightSet:
        try:
            weights = load_weights(variant.path, self.context_length, self._device, dtype=self._dtype)
        except (OSError, ValueError) as error:
            raise ModelRejected(f"merged model {variant.name!r} ({variant.path}): {error}", param="model") from error
        if (weights.shape, weights.vocabulary) != (base.shape, base.vocabulary):
            raise ModelRejected(
                f"merged model {variant.name!r}: {weights.shape} with a vocabulary of {weights.vocabulary}; "
                f"the base that runs here has {base.shape} and {base.vocabulary}: merge an adapter of this base",
                param="model",
            )
        return weights

    def _parts(self) -> tuple[Stepper, Worker]:
        if self._failure is not None:
            raise EngineDead(self._failure.message)
        if self._stepper is None or self._worker is None:
            raise EngineDead("the engine is not started")
        return self._stepper, self._worker

    def _check(self, stepper: Stepper, request: GenerationRequest) -> None:
        """Refuses what would fail inside a step, and there end every request."""
        if not stepper.knows(request.variant):
            raise not_loaded(request.variant)
        check_request(request, vocabulary=stepper.base.vocabulary, context_length=self.context_length)

    async def _matcher(self, sampling: Sampling) -> Matcher | None:
        """Compiles beside the running steps."""
        if sampling.grammar is None:
            return None
        return await asyncio.to_thread(self._grammars.compile, sampling.grammar, sampling.stop_token_ids)

    async def _between_steps(self, worker: Worker, job: Callable[[], T]) -> T:
        return await asyncio.wrap_future(worker.call(job))

    def _enter(self, stepper: Stepper, row: Row) -> None:
        """On the worker's thread. The variant may have been removed since the request was checked."""
        if stepper.knows(row.request.variant):
            stepper.scheduler.add(row)
        else:
            self._tell(lambda: self._end(row, not_loaded(row.request.variant)))

    def _step(self) -> None:
        """On the worker's thread."""
        assert self._stepper is not None
        deltas = self._stepper.step()
        if deltas:
            self._tell(lambda: self._deliver(deltas))

    def _report_death(self, error: Exception) -> None:
        """On the worker's thread."""
        failure = EngineDead(f"the engine failed: {type(error).__name__}: {error}")
        failure.__cause__ = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._tell(lambda: self._fail(failure))

    def _tell(self, callback: Callable[[], None]) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(callback)

    def _deliver(self, deltas: list[tuple[Row, Delta | GraftError]]) -> None:
        for row, delta in deltas:
            outbox = self._outboxes.get(row)  # None: its reader left during the step
            if outbox is None:
                continue
            outbox.put_nowait(delta)
            if isinstance(delta, GraftError) or delta.finish_reason is not None:
                del self._outboxes[row]

    def _fail(self, failure: EngineDead) -> None:
        if self._failure is None:
            self._failure = failure
        for row in list(self._outboxes):
            self._end(row, failure)

    def _end(self, row: Row, error: GraftError) -> None:
        outbox = self._outboxes.pop(row, None)
        if outbox is not None:
            outbox.put_nowait(error)


def _generator(seed: int | None) -> torch.Generator:
    """On the CPU for every device, so that a seed means the same draws everywhere."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator
