"""The probes of an adapter: log-probabilities of fixed replies, which show later whether it works as it was trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from training.artifact import PROBES_NAME, PlainScores, Probe, Probes, read_probes
from training.batch import join_rows, targets
from training.chat import IGNORED_LABEL, Message, TrainExample, render_example, with_default_system
from training.ground import Ground
from training.layerwise import open_layerwise
from training.proof import ProbeError
from training.readable import Pass, Readable, Whole

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
    was_training = model.training
    model.eval()
    try:
        scores = _score(Whole(model), rows)
    finally:
        model.train(was_training)
    compute, dtype = probe_compute(Whole(model))
    probes = tuple(
        Probe(ids=ids, start=start, base_logprobs=base, adapter_logprobs=adapter)
        for (ids, start), base, adapter in zip(rows, *scores, strict=True)
    )
    _write(directory, Probes(compute=compute, dtype=dtype, probes=probes))


def plain_scores(adapter_dir: Path, base_dir: Path, device: torch.device) -> PlainScores | None:
    """Scores an adapter's probes on the base's own weights in fp32, a block of them in memory at a time.

    Returns None where they were recorded so. Raises OSError where the base's files are gone, HollowError where they
    cannot be read by block.
    """
    probes = read_probes(adapter_dir)
    if probes is None or probes.on_plain_base() is not None:
        return None
    ground = Ground(base_dir, frozenset(), torch.float32)
    model = open_layerwise(ground, torch.float32, device, adapter_dir=adapter_dir)
    base, adapter = _score(model, [(probe.ids, probe.start) for probe in probes.probes])
    return PlainScores(base_logprobs=tuple(base), adapter_logprobs=tuple(adapter))


def add_plain_scores(adapter_dir: Path, plain: PlainScores) -> None:
    """Writes probes.json anew, with a reference for servers of the plain base."""
    probes = read_probes(adapter_dir)
    assert probes is not None  # they were scored
    _write(adapter_dir, probes.model_copy(update={"plain": plain}))


def _write(directory: Path, probes: Probes) -> None:
    (directory / PROBES_NAME).write_text(probes.model_dump_json(indent=1) + "\n", encoding="utf-8")


def probe_compute(model: Readable) -> tuple[Literal["nf4", "plain"], str]:
    """Returns how a model's base is kept, and the dtype of its arithmetic, such as float32."""
    return "nf4" if model.nf4 else "plain", str(model.dtype).removeprefix("torch.")


def probe_error(model: Readable, probes: Probes) -> ProbeError:
    """Scores the probes by a model that should compute as they were recorded: same weights, same arithmetic.

    Another quantisation of the base moves a small model's log-probabilities as far as its adapter does.
    """
    rows = [(probe.ids, probe.start) for probe in probes.probes]
    recorded = _joined(probe.adapter_logprobs for probe in probes.probes)
    found = _joined(_score(model, rows)[1])
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


def _score(model: Readable, rows: Sequence[_Row]) -> tuple[list[tuple[float, ...]], list[tuple[float, ...]]]:
    """Returns each row's log-probabilities without the adapter, and with it."""
    pack = join_rows([TrainExample(ids, (IGNORED_LABEL,) * start + ids[start:]) for ids, start in rows])
    base_TD, adapter_TD = model.hidden([Pass(pack, adapter=False), Pass(pack)])  # one pack: NF4 is made dense once
    head_VD, targets_T = model.head(), targets(pack).to(base_TD.device)
    lengths = [len(ids) - start for ids, start in rows]
    return _logprobs(base_TD, head_VD, targets_T, lengths), _logprobs(adapter_TD, head_VD, targets_T, lengths)


@torch.no_grad()
def _logprobs(
    hidden_TD: torch.Tensor, head_VD: torch.Tensor, targets_T: torch.Tensor, lengths: Sequence[int]
) -> list[tuple[float, ...]]:
    scored_T = targets_T != IGNORED_LABEL
    wanted_N = targets_T[scored_T]
    logits_NV = torch.nn.functional.linear(hidden_TD[scored_T], head_VD)
    scores_N = logits_NV.float().log_softmax(-1).gather(1, wanted_N[:, None]).squeeze(1)
    return [tuple(round(min(score, 0.0), 6) for score in part.tolist()) for part in scores_N.split(list(lengths))]
