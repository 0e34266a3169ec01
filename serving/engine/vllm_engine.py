"""The engine on vLLM: its AsyncLLM in this process, its steps in a process of its own, one LoRA request a revision."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Mapping
from contextlib import aclosing
from pathlib import Path
from typing import Any, get_args

from transformers import AutoConfig

from serving.engine.adapter import CONFIG_NAME, AdapterConfig, read_adapter
from serving.engine.checks import check_request, check_sizes, not_loaded
from serving.engine.engine import (
    Delta,
    EngineStats,
    Feature,
    GenerationRequest,
    Sampling,
    Syntax,
    Variant,
    VariantKind,
)
from serving.engine.layers import linear_layers
from serving.engine.vllm_output import StepMeter, delta, nothing_to_score, score
from serving.errors import AdapterRejected, EngineDead, ModelRejected, UnsupportedField

# vLLM reads these itself. It reports its use to its makers unless told not to; a fork of a process that has asked
# for CUDA cannot use it.
ENVIRONMENT: Mapping[str, str] = {"VLLM_NO_USAGE_STATS": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
GRAMMAR_FIELDS: Mapping[Syntax, str] = {Syntax.JSON_SCHEMA: "json", Syntax.LARK: "grammar"}
DEFAULT_RANK = 16
CACHE_BYTES_CPU = 4 * 2**30  # vLLM's own default is 92 % of the memory, and no start where anything else uses some
DEATH_CHECK_S = 0.5
FREE_SHARE_NEEDED = 0.05  # of a GPU at the start: with a cache of a given size vLLM only checks this, and 0.9 else


class VllmEngine:
    """Implements Engine on one base and up to `max_adapters` adapters a step; 0 leaves vLLM's LoRA support off.

    On a GPU more may be added: vLLM then reads them again as requests need them. `max_rank` is the largest
    rank that can be added. Merged models are refused: one AsyncLLM has one set of weights.
    """

    simulated = False
    weights_cost = None
    features = frozenset({Feature.GRAMMAR})

    def __init__(
        self,
        base_dir: Path,
        *,
        max_batch: int = 32,
        context_length: int | None = None,
        max_adapters: int = 8,
        max_rank: int = DEFAULT_RANK,
        cache_bytes: int | None = None,
    ) -> None:
        self.context_length = check_sizes(base_dir, max_batch, context_length)
        self._base_dir, self._max_batch, self._cache_bytes = base_dir, max_batch, cache_bytes
        self.max_adapters, self.max_rank = max_adapters, max_rank
        self._vocabulary = int(AutoConfig.from_pretrained(base_dir).vocab_size)
        self._llm: Any = None
        self._failure: EngineDead | None = EngineDead("the engine is not started")
        self._meter = StepMeter()
        self._in_flight = 0
        self._holds: int | None = None  # adapters at once; None: any number, read again as they are needed
        self._numbers: dict[str, int] = {}  # LoRA ids by digest: kept when an adapter leaves, so none is used twice
        self._adapters: dict[str, Any] = {}  # LoRARequests by digest

    async def start(self) -> None:
        if self._llm is not None:
            raise RuntimeError("the engine is started already")
        try:
            llm = await asyncio.to_thread(self._build)
            await llm.get_supported_tasks()  # cached: from here on a request is known to vLLM as soon as it is sent
        except (RuntimeError, ValueError) as error:
            raise EngineDead(f"vLLM did not start: {error}; its own messages above say why") from error
        self._llm, self._failure = llm, None

    async def stop(self) -> None:
        llm, self._llm = self._llm, None
        self._failure = EngineDead("the engine was stopped")
        self._adapters.clear()
        if llm is not None:
            from vllm.v1.engine.exceptions import EngineDeadError

            llm.output_processor.propagate_error(EngineDeadError())  # shutdown alone leaves its readers waiting
            await asyncio.to_thread(llm.shutdown)

    async def add(self, variant: Variant) -> None:
        """Checks an adapter's tensors first: vLLM loads those of another base without a word."""
        llm = self._alive()
        if variant.kind is VariantKind.MERGED:
            raise refuse_merged(variant.name)
        if variant.kind is VariantKind.BASE or variant.digest in self._adapters:
            return
        await asyncio.to_thread(self._check_adapter, variant)
        if self._holds is not None and len(self._adapters) >= self._holds:
            raise AdapterRejected(
                f"adapter {variant.name!r}: on a CPU vLLM holds the {self._holds} adapters it was started for; remove "
                "one first, or start it with more",
                param="model",
            )
        adapter = self._lora_request(variant)
        try:
            await self._ask(llm.add_lora(adapter))
        except EngineDead:
            raise
        except Exception as error:  # vLLM sends whatever its process raised
            raise AdapterRejected(f"adapter {variant.name!r}: vLLM cannot load it: {error}", param="model") from error
        self._adapters[variant.digest] = adapter

    async def remove(self, variant: Variant) -> None:
        llm = self._alive()
        adapter = self._adapters.pop(variant.digest, None)
        if adapter is not None:
            await self._ask(llm.remove_lora(adapter.lora_int_id))

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        llm = self._alive()
        if request.variant.kind is not VariantKind.BASE and request.variant.digest not in self._adapters:
            raise not_loaded(request.variant)
        check_request(request, vocabulary=self._vocabulary, context_length=self.context_length)
        if request.sampling.grammar is not None and request.logprobs is not None:
            raise UnsupportedField(  # it computes them after the grammar's mask, whatever logprobs_mode says
                "logprobs beside response_format or a call that is forced: vLLM's would not be the model's own; ask "
                "for one of the two",
                param="logprobs",
            )
        scores_only = request.sampling.max_tokens == 0
        if scores_only and (request.prompt_logprobs is None or len(request.prompt_ids) == 1):
            yield nothing_to_score(request)
            return
        self._in_flight += 1
        first = True
        try:
            async with aclosing(self._outputs(llm, request, scores_only)) as outputs:
                async for output in outputs:
                    yield score(request, output) if scores_only else delta(request, output, first=first)
                    first = False
        finally:
            self._in_flight -= 1

    def stats(self) -> EngineStats:
        """What waits is what the last step left waiting."""
        waiting = min(self._meter.waiting, self._in_flight)
        return EngineStats(running=self._in_flight - waiting, waiting=waiting, steps=self._meter.steps)

    def healthy(self) -> bool:
        return self._failure is None and not self._llm.errored

    def _build(self) -> Any:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        on_cpu = current_platform.is_cpu()
        arguments = AsyncEngineArgs(
            model=str(self._base_dir),
            dtype="float32" if on_cpu else "auto",  # half precision is many times slower on a CPU
            kv_cache_memory_bytes=self._cache_bytes or (CACHE_BYTES_CPU if on_cpu else None),
            **({} if on_cpu or self._cache_bytes is None else {"gpu_memory_utilization": FREE_SHARE_NEEDED}),
            max_model_len=self.context_length,
            max_num_seqs=self._max_batch,
            structured_outputs_config={"backend": "guidance"},  # the library that planning checks a schema with
            generation_config="vllm",  # the model's own would fill in sampling fields and stop tokens
            logprobs_mode="raw_logprobs",
            max_logprobs=-1,
            disable_log_stats=True,
            **self._lora_arguments(on_cpu),
        )
        return AsyncLLM.from_engine_args(arguments, stat_loggers=[lambda config, index: self._meter])

    def _lora_arguments(self, on_cpu: bool) -> dict[str, Any]:
        if not self.max_adapters:
            return {}
        from vllm.config.lora import MaxLoRARanks

        ranks = sorted(get_args(MaxLoRARanks))
        fitting = next((rank for rank in ranks if rank >= self.max_rank), None)
        if fitting is None:
            raise ValueError(f"max_rank {self.max_rank}: vLLM runs adapters up to rank {ranks[-1]}")
        # On a CPU vLLM 0.32 applies the last slot's adapter to base rows beside adapter rows: that slot stays empty.
        self._holds = self.max_adapters if on_cpu else None
        # Left to itself vLLM adapts lm_head too, which costs a product a step and on a CPU fails for a scored batch.
        targets = sorted({name.rpartition(".")[2] for name in linear_layers(self._base_dir)})
        return {
            "enable_lora": True,
            "max_loras": self.max_adapters + on_cpu,
            "max_lora_rank": fitting,
            "lora_target_modules": targets,
        }

    def _check_adapter(self, variant: Variant) -> None:
        read_adapter(variant, linear_layers(self._base_dir))
        config = AdapterConfig.model_validate_json((variant.path / CONFIG_NAME).read_bytes())
        problem = None
        if not self.max_adapters:
            problem = "the engine was started for no adapters; set max_adapters"
        elif config.rank_pattern or config.alpha_pattern:
            problem = "not every vLLM honours rank_pattern and alpha_pattern; use the transformers engine"
        elif config.r > self.max_rank:
            problem = f"rank {config.r} is more than the {self.max_rank} that the engine was started for"
        if problem is not None:
            raise AdapterRejected(f"adapter {variant.name!r} ({variant.path}): {problem}", param="model")

    def _lora_request(self, variant: Variant) -> Any:
        """The prefix cache knows an adapter by its LoRA name, so that is the digest."""
        from vllm.lora.request import LoRARequest

        number = self._numbers.setdefault(variant.digest, len(self._numbers) + 1)
        return LoRARequest(lora_name=variant.digest, lora_int_id=number, lora_path=str(variant.path))

    async def _outputs(self, llm: Any, request: GenerationRequest, scores_only: bool) -> AsyncGenerator[Any, None]:
        """Yields vLLM's outputs; closing it early aborts the request there."""
        from vllm.inputs import tokens_input
        from vllm.v1.engine.exceptions import EngineDeadError

        prompt_ids = list(request.prompt_ids[:-1] if scores_only else request.prompt_ids)
        outputs = llm.generate(
            tokens_input(prompt_token_ids=prompt_ids),
            _scoring_params(request) if scores_only else _params(request.sampling, request),
            request.request_id,
            lora_request=self._adapters.get(request.variant.digest),
        )
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    yield output
        except EngineDeadError as error:
            raise self._death() from error

    async def _ask(self, work: Awaitable[Any]) -> None:
        """vLLM leaves unanswered what it was asked when its process dies meanwhile; this raises EngineDead then."""
        asking = asyncio.ensure_future(work)
        try:
            while not asking.done() and self.healthy():
                await asyncio.wait([asking], timeout=DEATH_CHECK_S)
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        self._alive()
        asking.result()

    def _alive(self) -> Any:
        if not self.healthy():
            raise self._death()
        return self._llm

    def _death(self) -> EngineDead:
        if self._failure is not None:
            return EngineDead(self._failure.message)
        return EngineDead("vLLM's process ended; the server has to be restarted")


def refuse_merged(name: str) -> ModelRejected:
    """A second AsyncLLM would need a second model's memory, split before either starts, for what a server can do."""
    return ModelRejected(
        f"merged model {name!r}: vLLM runs one set of weights here, the base and its adapters; serve the merged model "
        "as --base of a server of its own, or use --engine transformers",
        param="model",
    )


def _params(sampling: Sampling, request: GenerationRequest, **others: Any) -> Any:
    """Every field that changes the output is given; penalties count generated tokens only, as OpenAI's do."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

    grammar = sampling.grammar
    fields = {
        "n": 1,
        "max_tokens": sampling.max_tokens,
        "min_tokens": 0,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": 0,
        "min_p": 0.0,
        "seed": None if sampling.seed is None else sampling.seed % 2**63,  # vLLM takes -1 for no seed
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repetition_penalty": 1.0,
        "stop_token_ids": sorted(sampling.stop_token_ids),
        "logit_bias": dict(sampling.logit_bias) or None,
        "structured_outputs": grammar and StructuredOutputsParams(**{GRAMMAR_FIELDS[grammar.syntax]: grammar.text}),
        "ignore_eos": grammar is None,  # the stop token ids are all there is, but a grammar ends with the tokenizer's
        "logprobs": request.logprobs,
        "prompt_logprobs": request.prompt_logprobs,
        "detokenize": False,
        "output_kind": RequestOutputKind.DELTA,
    }
    return SamplingParams(**{**fields, **others})


def _scoring_params(request: GenerationRequest) -> Any:
    """vLLM always generates, so it is given the prompt without its last token, and that one to generate."""
    forced = Sampling(max_tokens=1, temperature=0.0)
    return _params(forced, request, allowed_token_ids=[request.prompt_ids[-1]], logprobs=request.prompt_logprobs)
