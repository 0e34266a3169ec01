"""The table of a sweep, as Markdown and JSON: one line a run, the lowest held-out NLL marked."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from training.log import clock
from training.sweep.outcome import Outcome, Status

JSON_NAME, MARKDOWN_NAME, PLOT_NAME = "sweep.json", "sweep.md", "sweep.png"
_COSTS = ("held-out NLL", "trainable parameters", "tokens/s", "peak GiB", "steps", "stepping")


def best(outcomes: Sequence[Outcome]) -> Outcome | None:
    done = [outcome for outcome in outcomes if outcome.nll_nats is not None]
    return min(done, key=lambda outcome: outcome.nll_nats or 0.0, default=None)


def write_table(folder: Path, recipe: str, outcomes: Sequence[Outcome]) -> None:
    """Writes sweep.json and sweep.md; each is whole at any time."""
    document = {
        "format_version": 1,
        "recipe": recipe,
        "runs": [asdict(outcome) | {"status": outcome.status.value} for outcome in outcomes],
    }
    texts = {
        JSON_NAME: json.dumps(document, indent=2, ensure_ascii=False) + "\n",
        MARKDOWN_NAME: markdown(recipe, outcomes),
    }
    for name, text in texts.items():
        temporary = folder / f"{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(folder / name)


def markdown(recipe: str, outcomes: Sequence[Outcome]) -> str:
    fields, winner = list(outcomes[0].values), best(outcomes)
    head = [*fields, *_COSTS]
    lines = [f"# Sweep of {recipe}", "", _row(head), _row(["---"] * len(head))]
    lines += [_row([*map(_code, outcome.values.values()), *_cells(outcome, outcome is winner)]) for outcome in outcomes]
    before = sorted({round(outcome.nll_nats_before, 4) for outcome in outcomes if outcome.nll_nats_before is not None})
    if before:
        lines += ["", f"Held-out NLL before training: {', '.join(map(str, before))} nats a labelled token."]
    lines += [f"\nFailed: {_code(o.folder)}: {' '.join((o.error or '').split())}" for o in outcomes if o.error]
    return "\n".join([*lines, "", f"![held-out NLL]({PLOT_NAME})", ""])


def _cells(outcome: Outcome, is_best: bool) -> list[str]:
    if outcome.status is not Status.DONE or outcome.nll_nats is None:
        return [outcome.status.value, *["–"] * (len(_COSTS) - 1)]
    nll = f"{outcome.nll_nats:.4f}"
    return [
        f"**{nll}** (lowest)" if is_best else nll,
        f"{outcome.trainable_parameters:,}",
        f"{outcome.tokens_per_s:,.0f}",
        f"{outcome.peak_gib:.2f}",
        str(outcome.steps),
        clock(outcome.stepping_s or 0.0),
    ]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _code(text: str) -> str:
    return "`" + text.replace("|", "\\|") + "`"
