"""Chat templates that render tools, each with calls in its own form, and the tiny base with one of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

_HEAD = (
    "{% if tools %}{{ '<|im_start|>system\\nFunctions:\\n' }}"
    "{% for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}"
)
_TURN = "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
_RESULT = "{{ '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}"
_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"


def chatml(call: str, *, head: str = _HEAD, result: str = _RESULT, before: str = "", gap: str = "\\n") -> str:
    """Returns a template; `call` writes one, and `gap` stands between two."""
    text = "{% if m.content %}{{ m.content + '\\n' }}{% endif %}"
    calls = f"{{% for c in m.tool_calls %}}{call}{{% if not loop.last %}}{{{{ '{gap}' }}}}{{% endif %}}{{% endfor %}}"
    made = "{{ '<|im_start|>assistant\\n' }}" + before + text + calls + "{{ '<|im_end|>\\n' }}"
    turns = f"{{% if m.role == 'tool' %}}{result}{{% elif m.tool_calls %}}{made}{{% else %}}{_TURN}{{% endif %}}"
    return f"{head}{{% for m in messages %}}{turns}{{% endfor %}}{_PROMPT}"


def _json(key: str) -> str:
    written = """{{ '{"name": "' + c.function.name + '", "KEY": ' }}{{ c.function.arguments | tojson }}{{ '}' }}"""
    return written.replace("KEY", key)


HERMES_CALL = "{{ '<tool_call>\\n' }}" + _json("arguments") + "{{ '\\n</tool_call>' }}"
HERMES = chatml(HERMES_CALL)
LLAMA = chatml(
    _json("parameters"), before="{% if m.tool_calls | length > 1 %}{{ raise_exception('one call at once') }}{% endif %}"
)
XML = chatml("{{ '<tool_call><function=' + c.function.name + '></function></tool_call>' }}")
MARKED = chatml("{{ '<|endoftext|>' }}" + _json("arguments"))  # the mark is a control token, which no text shows
DEAF = chatml(HERMES_CALL, result="")
MUTE = chatml("", head="")

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}, "unit": {"enum": ["C", "F"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock"}}


def base_with(tiny_base: Path, folder: Path, template: str) -> Path:
    """Returns a copy of the base whose chat template is this one."""
    directory = shutil.copytree(tiny_base, folder)
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    return directory
