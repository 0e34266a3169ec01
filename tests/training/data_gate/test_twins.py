"""Properties of twins: every similar pair is found, as a plain comparison of all pairs would."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.chat import Message
from training.data_gate.twins import Twin, find_twins
from training.rows import Conversation
from training.words import words


def chat(number: int, text: str) -> Conversation:
    prompt, _, reply = text.partition("|")
    return Conversation(number, number, (Message("user", prompt), Message("assistant", reply)))


def grams(conversation: Conversation) -> set[tuple[str, ...]]:
    found = [*words(f"{conversation.prompt_text}\n{conversation.reply_text}"), "", ""]
    return {tuple(found[at : at + 3]) for at in range(len(found) - 2)}


def similarity(left: Conversation, right: Conversation) -> float:
    both, either = grams(left) & grams(right), grams(left) | grams(right)
    return len(both) / len(either) if either else 0.0


@given(st.randoms(use_true_random=False), st.sampled_from([0.5, 0.7, 0.9, 1.0]))
def test_no_similar_pair_is_missed_and_none_is_invented(source: random.Random, limit: float):
    rows: list[list[str]] = []
    for _ in range(30):
        row = list(source.choice(rows)) if rows and source.random() < 0.5 else source.choices("abcdefgh", k=12)
        row[source.randrange(len(row))] = source.choice("abcdefgh")
        rows.append(row[: source.randint(1, 12)])
    chats = [chat(number, "|".join([" ".join(row), "x y"])) for number, row in enumerate(rows, 1)]
    found = find_twins(chats, limit)
    having = {b.number for at, b in enumerate(chats) for a in chats[:at] if similarity(a, b) >= limit}
    assert {twin.row for twin in found} == having
    for twin in found:
        assert twin.earlier < twin.row
        assert twin.similarity == pytest.approx(similarity(chats[twin.earlier - 1], chats[twin.row - 1]))


def test_a_row_with_one_word_changed_is_a_twin_in_english_and_chinese():
    english = (
        "Why does bread dough need rest?|Because gluten relaxes in that time, and the dough rolls out more easily."
    )
    chinese = "为什么面团需要静置？|因为面筋在这段时间里会放松，面团就更容易擀开，烤出来也更松软。"
    chats = [
        chat(1, english), chat(2, chinese), chat(3, "Why is the sky blue?|Air scatters short waves most."),
        chat(4, english.replace("easily", "quickly")), chat(5, chinese.replace("松软", "好吃")),
    ]  # fmt: skip
    found = find_twins(chats)
    assert [(twin.row, twin.earlier) for twin in found] == [(4, 1), (5, 2)]
    assert all(0.7 <= twin.similarity < 1 for twin in found)


@pytest.mark.parametrize("texts", [[], ["a|b"], ["?|!", "?|!"]])
def test_few_rows_and_rows_without_words_have_no_twins(texts: list[str]):
    assert find_twins([chat(number, text) for number, text in enumerate(texts, 1)]) == []


def test_short_rows_compare_too():
    assert find_twins([chat(7, "hi|yes"), chat(9, "Hi!|Yes.")]) == [Twin(9, 7, 1.0)]
