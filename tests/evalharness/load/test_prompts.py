"""The prompts of load users."""

from __future__ import annotations

import pytest

from evalharness.load.prompts import DEFAULT_PROMPTS, PromptsRefused, load_prompts


def test_without_a_file_the_built_in_prompts_are_used():
    chats = load_prompts(None)
    assert [chat[0]["content"] for chat in chats] == list(DEFAULT_PROMPTS)
    assert len(set(DEFAULT_PROMPTS)) == len(DEFAULT_PROMPTS) > 5


def test_text_has_one_prompt_a_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("One?\n\nTwo?\n")
    assert load_prompts(path) == (({"role": "user", "content": "One?"},), ({"role": "user", "content": "Two?"},))


def test_jsonl_has_whole_chats(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "One?"}]}\n')
    ((system, user),) = load_prompts(path)
    assert (system["role"], user["content"]) == ("system", "One?")


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("p.txt", "\n\n", "has no prompt"),
        ("p.jsonl", '{"messages": [{"role": "user", "content": "One?"}]}\n{"message": 1}', r"p\.jsonl:2: "),
        ("p.jsonl", '{"messages": [{"role": "robot", "content": "x"}]}', r"messages\.0\.role"),
    ],
)
def test_a_bad_file_is_refused_by_line_and_field(tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    with pytest.raises(PromptsRefused, match=says):
        load_prompts(tmp_path / name)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(PromptsRefused, match=r"--prompts .*cannot be read"):
        load_prompts(tmp_path / "none.txt")
