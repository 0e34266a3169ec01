"""The sampling fields: what chat and text completions share on the wire, and the engine requests they become."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Annotated, ClassVar

from pydantic import BeforeValidator, Field, WithJsonSchema

from serving.engine.completion import Choice
from serving.engine.engine import Feature, GenerationRequest, Grammar, Sampling
from serving.engine.grammar import check_grammar
from serving.engine.vocabulary import Vocabulary
from serving.errors import BadRequest, ContextTooLong, UnsupportedField
from serving.registry.catalog import ServedModel
from serving.response_format import ResponseFormat
from serving.wire import Harmless, Text, Wire, whole_text

MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
MAX_BIASES, MAX_BIAS = 1024, 100
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,8}")
_STOP_SCHEMA = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARACTERS}
_STOPS_SCHEMA = {"anyOf": [_STOP_SCHEMA, {"type": "array", "items": _STOP_SCHEMA, "maxItems": MAX_STOPS}]}
_BIASES_SCHEMA = {
    "type": "object",
    "propertyNames": {"pattern": f"^({_TOKEN_ID.pattern})$"},
    "additionalProperties": {"type": "number", "minimum": -MAX_BIAS, "maximum": MAX_BIAS},
    "maxProperties": MAX_BIASES,
}
# Fields of OpenAI and vLLM that both kinds of completion know, with the values that change no output.
SHARED_HARMLESS: Harmless = {
    "metadata": None,
    "prompt_cache_retention": None,
    "store": (False,),
    "service_tier": ("auto", "default"),
    "top_k": (-1, 0),
    "min_p": (0,),
    "typical_p": (1,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "ignore_eos": (False,),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "prompt_logprobs": (),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "priority": (0,),
    "lora_path": (),
}


def _stops(value: object) -> object:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("has to be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise ValueError(f"has {len(stops)} entries; at most {MAX_STOPS} are allowed")
    if not all(0 < len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        raise ValueError(f"each stop string has 1 to {MAX_STOP_CHARACTERS} characters")
    return tuple(map(whole_text, stops))


def _biases(value: object) -> object:
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        raise ValueError(f"has to be an object of at most {MAX_BIASES} token ids and numbers, such as {{'42': -100}}")
    for key, bias in value.items():
        if not (isinstance(key, str) and _TOKEN_ID.fullmatch(key)):
            raise ValueError(f"{str(key)[:40]!r} is no token id; POST /tokenize gives them")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -MAX_BIAS <= bias <= MAX_BIAS:
            raise ValueError(f"the bias of token {key} has to be a number from {-MAX_BIAS} to {MAX_BIAS}")
    return tuple((int(key), float(bias)) for key, bias in value.items())


class StreamOptions(Wire):
    harmless: ClassVar[Harmless] = {"include_obfuscation": (False,), "continuous_usage_stats": (False,)}
    include_usage: bool = False


class SamplingFields(Wire):
    model: str
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: int = Field(1, ge=1, le=16)
    stop: Annotated[tuple[str, ...], BeforeValidator(_stops), WithJsonSchema(_STOPS_SCHEMA)] = ()
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: Annotated[tuple[tuple[int, float], ...], BeforeValidator(_biases), WithJsonSchema(_BIASES_SCHEMA)] = ()
    response_format: ResponseFormat | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: Text | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None

    @property
    def routing_key(self) -> str | None:
        """Whose request it is, for sticky routing: the first that is given of the three; none changes the output."""
        return self.user or self.safety_identifier or self.prompt_cache_key

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def check_features(self, features: frozenset[Feature]) -> None:
        """Raises UnsupportedField for what the engine that runs lacks."""
        constrained = self.response_format is not None and self.response_format.type != "text"
        if constrained and Feature.GRAMMAR not in features:
            raise UnsupportedField(
                "response_format: the engine that runs here cannot hold a reply to JSON; remove it or give "
                "{'type': 'text'}, or start the server with --engine transformers or vllm",
                param="response_format",
            )

    def check_stream_options(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise BadRequest(
                "stream_options needs stream: true; set it or remove stream_options", param="stream_options"
            )


def refuse_oversized(texts: Iterable[str], vocabulary: Vocabulary, context_length: int, param: str) -> None:
    """Raises ContextTooLong for what fits into no context of this length, before time is spent on encoding it."""
    fewest = sum(map(vocabulary.fewest_tokens, texts))
    if fewest > context_length:
        raise ContextTooLong(
            f"the prompt has at least {fewest} tokens and the context {context_length}: shorten the prompt", param=param
        )


def room_for(prompt_tokens: int, asked: int | None, default: int | None, context_length: int, param: str) -> int:
    """Returns the completion tokens of a request; raises ContextTooLong, with the numbers, where they do not fit.

    `asked` None means `default`, or less where the context ends before; both None mean all that is left.
    """
    left = context_length - prompt_tokens
    if left < 0 or (left == 0 and asked != 0):
        raise ContextTooLong(
            f"the prompt has {prompt_tokens} tokens and the context {context_length}, so there is no room to reply: "
            "shorten the prompt",
            param=param,
        )
    if asked is not None and asked > left:
        raise ContextTooLong(
            f"{prompt_tokens} prompt tokens and max_tokens {asked} are {prompt_tokens + asked} tokens, but the context "
            f"has {context_length}; shorten the prompt or ask for at most {left}",
            param=param,
        )
    return min(left, left if default is None else default) if asked is None else asked


def choices_for(
    fields: SamplingFields,
    model: ServedModel,
    vocabulary: Vocabulary,
    response_id: str,
    prompts: Sequence[tuple[tuple[int, ...], int]],
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    *,
    grammar: Grammar | None = None,
    stop: tuple[str, ...] = (),
) -> tuple[Choice, ...]:
    """Returns `n` choices a prompt; each prompt comes with its completion tokens. Choice i of a prompt has seed + i.

    `grammar` stands for that of the response format, and `stop` is beside the fields' own. Raises BadRequest for a
    schema that no reply can be held to, and for a bias on what is no token.
    """
    grammar = grammar or _grammar(fields)
    _check_biases(fields, vocabulary)
    choices: list[Choice] = []
    for prompt_ids, max_tokens in prompts:
        for number in range(fields.n):
            sampling = Sampling(
                max_tokens=max_tokens,
                temperature=fields.temperature,
                top_p=fields.top_p,
                seed=None if fields.seed is None else _wrap(fields.seed + number),
                presence_penalty=fields.presence_penalty,
                frequency_penalty=fields.frequency_penalty,
                logit_bias=fields.logit_bias,
                grammar=grammar,
                stop_token_ids=model.stop_token_ids,
            )
            index = len(choices)
            request = GenerationRequest(
                f"{response_id}-{index}", model.variant, prompt_ids, sampling, logprobs, prompt_logprobs
            )
            choices.append(Choice(index, request, fields.stop + stop))
    return tuple(choices)


def _grammar(fields: SamplingFields) -> Grammar | None:
    grammar = None if fields.response_format is None else fields.response_format.grammar()
    if grammar is not None:
        check_grammar(grammar)
    return grammar


def _check_biases(fields: SamplingFields, vocabulary: Vocabulary) -> None:
    wrong = next((token_id for token_id, _ in fields.logit_bias if token_id >= vocabulary.size), None)
    if wrong is not None:
        raise BadRequest(f"logit_bias: id {wrong} is not among 0 to {vocabulary.size - 1}", param="logit_bias")


def _wrap(seed: int) -> int:
    """Keeps seed + i inside 64 bits."""
    return (seed + 2**63) % 2**64 - 2**63
