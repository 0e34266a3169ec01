"""The probes of an adapter: log-probabilities of fixed replies, which show later whether it works as it was trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from training.artifact import PROBES_NAME, Probe, Probes
from training.batch import join_rows, targets
from training.chat import IGNORED_LABEL, Message, TrainExample, render_example, with_default_system
from training.model import PackLoss
from training.proof import ProbeError

# Short, and of several kinds: what an adapter changes in one it may leave alone in another.
_CHATS = (
    ("What is a tide?", "A tide is the slow rise and fall of the sea, caused by the pull of the moon and the sun."),
    ("Name three things to take on a day's walk.", "Take these:\n\n- water\n- a map\n- a warm coat"),
    ("Correct this sentence: She go to work by train.", "She goes to work by train."),
    ("Why does bread rise?", "Yeast eats sugar and gives off gas, which the dough holds in small bubbles."),
    ("Write a Python function that doubles a number.", "```python\ndef double(x):\n    return 2 * x\n```"),
    ("用一句话解释什么是影子。", "影子是物体挡住光以后留下的暗处。"),
)

_Row = tuple[tuple[int, ...], int]  # ids, and where the reply starts


def write_probes(directory: Path, model: Any, tokenizer: Any, system: str | None) -> None:
    """Writes probes.json: each reply scored by the trained peft model, with the adapter on and off.

    `system` is the text that a server adds where a chat has no system message, or None. The base has to be loaded with
    packed attention. On a CPU the same model writes the same bytes.
    """
    rows = [_render(tokenizer, question, answer, system) for question, answer in _CHATS]
    compute, dtype = probe_compute(model)
    probes = Probes(
        compute=compute,
        dtype=dtype,
        probes=tuple(
            Probe(ids=ids, start=start, base_logprobs=base_logprobs, adapter_logprobs=adapter_logprobs)
            for (ids, start), (base_logprobs, adapter_logprobs) in zip(rows, _score(model, rows), strict=True)
        ),
    )
    (directory / PROBES_NAME).write_text(probes.model_dump_json(indent=1) + "\n", encoding="utf-8")


def probe_compute(model: Any) -> tuple[Literal["nf4", "plain"], str]:
    """Returns how a peft model's base is kept, and the dtype of its arithmetic, such as float32."""
    base = model.get_base_model()
    kept: Literal["nf4", "plain"] = "nf4" if getattr(base, "is_loaded_in_4bit", False) else "plain"
    return kept, str(base.dtype).removeprefix("torch.")


def probe_error(model: Any, probes: Probes) -> ProbeError:
    """Scores the probes by a peft model that should compute as they were recorded: same weights, same arithmetic.

    Another quantisation of the base moves a small model's log-probabilities as far as its adapter does.
    """
    rows = [(probe.ids, probe.start) for probe in probes.probes]
    recorded = _joined(probe.adapter_logprobs for probe in probes.probes)
    found = _joined(adapter for _, adapter in _score(model, rows))
    base = _joined(probe.base_logprobs for probe in probes.probes)
    return ProbeError(
        error_nats=float((found - recorded).abs().mean()), effect_nats=float((base - recorded).abs().mean())
    )


def _joined(rows: Iterable[tuple[float, ...]]) -> torch.Tensor:
    return torch.tensor([number for row in rows for number in row], dtype=torch.float64)


def _render(tokenizer: Any, question: str, answer: str, system: str | None) -> _Row:
    """Returns a chat's ids up to its end-of-turn token, and where the reply starts."""
    chat = with_default_system((Message("user", question), Message("assistant", answer)), system)
    example = render_example(tokenizer, chat)
    labelled = [at for at, label in enumerate(example.labels) if label != IGNORED_LABEL]
    return example.input_ids[: labelled[-1] + 1], labelled[0]


def _score(model: Any, rows: Sequence[_Row]) -> list[tuple[tuple[float, ...], tuple[float, ...]]]:
    """Returns each row's log-probabilities without and with the adapter; dropout is off, and then as it was."""
    was_training = model.training
    model.eval()
    try:
        with model.disable_adapter():
            base = _reply_logprobs(model, rows)
        adapter = _reply_logprobs(model, rows)
    finally:
        model.train(was_training)
    return list(zip(base, adapter, strict=True))


@torch.no_grad()
def _reply_logprobs(model: Any, rows: Sequence[_Row]) -> list[tuple[float, ...]]:
    """Computes all rows in one pack: NF4 weights are made dense once."""
    examples = [TrainExample(ids, (IGNORED_LABEL,) * start + ids[start:]) for ids, start in rows]
    pack = join_rows(examples).to(model.device)
    targets_T = targets(pack)
    scored_T = targets_T != IGNORED_LABEL
    logits_NV = model.get_base_model().get_output_embeddings()(PackLoss(model).hidden(pack)[scored_T])
    wanted_N = targets_T[scored_T]
    scores_N = logits_NV.float().log_softmax(-1).gather(1, wanted_N[:, None]).squeeze(1)
    found = scores_N.split([len(ids) - start for ids, start in rows])
    return [tuple(round(min(score, 0.0), 6) for score in part.tolist()) for part in found]
