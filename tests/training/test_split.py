"""Properties of the held-out split: stable, exact, without leaks."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.chat import Message
from training.rows import Conversation, DataError
from training.split import dataset_sha256, near_duplicates, split_held_out, write_held_out


def chat(number: int, user: str, reply: str = "a reply", *before: Message) -> Conversation:
    return Conversation(number, number, (*before, Message("user", user), Message("assistant", reply)))


def contents(rows: tuple[Conversation, ...]) -> list[tuple[Message, ...]]:
    return [row.messages for row in rows]


MANY = [chat(number, f"question {number}", f"answer {number}") for number in range(60)]


def test_every_row_falls_on_one_side_and_the_count_is_exact():
    train, held_out = split_held_out(MANY, 20)
    assert (len(train), len(held_out)) == (40, 20)
    assert sorted(row.number for row in (*train, *held_out)) == list(range(60))
    assert [row.number for row in train] == sorted(row.number for row in train)


@given(st.randoms(use_true_random=False))
def test_the_split_does_not_depend_on_the_order(shuffler: random.Random):
    mixed = list(MANY)
    shuffler.shuffle(mixed)
    assert contents(split_held_out(mixed, 20)[1]) == contents(split_held_out(MANY, 20)[1])


def test_a_smaller_held_out_is_a_first_part_of_a_larger_one():
    assert split_held_out(MANY, 20)[1][:7] == split_held_out(MANY, 7)[1]


def test_the_split_is_the_same_on_every_machine():
    assert [row.number for row in split_held_out(MANY, 5)[1]] == [49, 1, 54, 11, 22]


@given(st.lists(st.integers(0, 12), min_size=20, max_size=40), st.integers(0, 5))
def test_equal_prompts_fall_on_one_side(prompts: list[int], held_out: int):
    rows = [chat(i, ("  What  is" if i % 2 else "what IS ") + f"{prompt}?", f"{i}") for i, prompt in enumerate(prompts)]
    try:
        train, kept = split_held_out(rows, held_out)
    except DataError:
        return
    sides = [{row.prompt_text.casefold().split()[-1] for row in side} for side in (train, kept)]
    assert not sides[0] & sides[1]
    assert len(kept) == held_out


@pytest.mark.parametrize("held_out", [60, 61, 1000])
def test_a_split_that_leaves_nothing_to_train_on_is_refused(held_out: int):
    with pytest.raises(DataError, match=f"held_out = {held_out} cannot be taken from 60 rows"):
        split_held_out(MANY, held_out)


def test_a_held_out_of_none_keeps_every_row():
    assert split_held_out(MANY, 0) == (tuple(MANY), ())


def test_the_hash_follows_content_and_order_only():
    rows = MANY[:3]
    renumbered = [Conversation(9, None, row.messages) for row in rows]
    assert dataset_sha256(rows) == dataset_sha256(renumbered)
    assert len({dataset_sha256(rows), dataset_sha256(rows[::-1]), dataset_sha256(rows[:2])}) == 3


def test_held_out_rows_are_written_for_the_evaluation(tmp_path: Path):
    path = tmp_path / "held_out.jsonl"
    system = Message("system", "Be brief.")
    earlier = (system, Message("user", "hi"), Message("assistant", "fox"))
    rows = [chat(1, "说\n\u2028", "你好"), chat(2, "and?", "dog", *earlier), chat(3, "说\n\u2028", "你好")]
    write_held_out(path, rows)
    lines = [json.loads(line) for line in path.read_bytes().decode().split("\n")[:-1]]
    assert [list(line) for line in lines] == [["id", "messages", "reference"]] * 3
    assert lines[0]["messages"] == [{"role": "user", "content": "说\n\u2028"}]
    assert [line["reference"] for line in lines] == ["你好", "dog", "你好"]
    assert [message["role"] for message in lines[1]["messages"]] == ["system", "user", "assistant", "user"]
    assert len({line["id"] for line in lines}) == 3
    assert lines[2]["id"] == lines[0]["id"] + "-2"


def test_near_duplicates_finds_a_reworded_copy_on_either_part():
    held_out = [
        chat(1, "Why does bread dough need time to rest after kneading it?", "Gluten relaxes in that time."),
        chat(2, "How far is the moon?", "The moon is about 384,400 kilometers away, a little over a light second."),
        chat(3, "为什么面团揉完之后需要静置一段时间？", "因为面筋会放松。"),
    ]
    train = [
        chat(10, "So why does bread dough need time to rest after kneading?", "Yeast works."),
        chat(
            11, "Distance of the moon", "Well, the moon is about 384,400 kilometers away, a little over a light second!"
        ),
        chat(12, "请问为什么面团揉完之后需要静置一段时间", "酵母在工作。"),
        chat(13, "Why does a cat purr?", "It is content, in pain, or asking for food."),
    ]
    found = {(pair.train.number, pair.held_out.number, pair.part) for pair in near_duplicates(train, held_out)}
    assert found == {(10, 1, "prompt"), (11, 2, "reply"), (12, 3, "prompt")}
    (first, *_) = near_duplicates(train, held_out)
    assert str(first) == "89% of held-out row 1's prompt is in training row 10"


def test_short_prompts_that_share_a_phrase_are_no_duplicates():
    assert near_duplicates([chat(1, "What is the sun?")], [chat(2, "What is the", "other")]) == []


def test_a_higher_threshold_finds_no_more():
    train, held_out = [chat(1, "one two three four five six")], [chat(2, "one two three four five nine", "other")]
    assert [len(near_duplicates(train, held_out, limit)) for limit in (0.5, 0.75, 0.76)] == [1, 1, 0]


def test_a_leak_is_exact_where_only_case_and_white_space_differ():
    reply = "The moon is about 384,400 kilometers away, a little over a light second."
    (near, exact) = near_duplicates(
        [chat(1, "one", f"Well. {reply}"), chat(2, "two", f" {reply.upper()}\n")], [chat(3, "How far is it?", reply)]
    )
    assert (near.exact, exact.exact) == (False, True)
