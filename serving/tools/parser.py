"""The call parser: a reply's text in, content and function calls out, piece by piece as the text comes."""

from __future__ import annotations

import enum
import json
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from serving.tools.call_format import CallFormat
from serving.tools.call_text import WHITE, Reading, begun, follow, read_head
from serving.tools.json_text import ObjectScanner, read_object


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class CallBegin:
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of the JSON text of the arguments, as the model wrote it."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBroken:
    """The call that began is none: `text` is all that was read of it, and its rest follows as content."""

    text: str


Event = Content | CallBegin | CallArguments | CallBroken


class _State(enum.Enum):
    TEXT = "text"  # before an opening mark
    START = "start"  # of the reply, or of what follows a call, where calls have no marks
    HEAD = "head"  # before the arguments
    ANY_ORDER = "any_order"  # what may be a call with its keys in another order
    ARGUMENTS = "arguments"
    TAIL = "tail"  # after the arguments
    CONTENT = "content"  # no call can come


class CallParser:
    """Reads one reply. What is no call of one of `names` is content, malformed calls too, as it was written.

    White space around calls is dropped. Without `several` what follows the first call is content. `whole` counts the
    calls whose arguments are a JSON object; `broken` those that turned out to be none.
    """

    def __init__(self, form: CallFormat, names: AbstractSet[str], *, several: bool) -> None:
        self._form, self._names, self._several = form, names, several
        self._tail = ("}", form.closing) if form.closing else ("}",)
        self._steps = {
            _State.TEXT: self._text,
            _State.START: self._start,
            _State.HEAD: self._head,
            _State.ANY_ORDER: self._any_order,
            _State.ARGUMENTS: self._read_arguments,
            _State.TAIL: self._read_tail,
            _State.CONTENT: self._content,
        }
        self._state = self._between = _State.TEXT if form.opening else _State.START
        self._buffer = ""  # come, but not yet understood
        self._white = ""  # white space that a call may follow
        self._raw = ""  # what was read of the present call
        self._arguments = ""
        self._scanner = ObjectScanner()
        self._events: list[Event] = []
        self.whole = self.broken = 0

    def push(self, text: str) -> list[Event]:
        self._buffer += text
        while self._buffer and self._steps[self._state]():
            pass
        return self._take()

    def end(self, *, truncated: bool) -> list[Event]:
        """Gives out what was held back. A call that is cut off by a limit stays one, with the arguments it has."""
        if self._state is _State.TAIL:  # a stop string may have cut the closing mark off
            self._move(len(self._buffer))
            self._complete()
        elif self._state is _State.ANY_ORDER:
            self._finish_any_order(self._buffer)
        elif self._state is _State.HEAD or (self._state is _State.ARGUMENTS and not truncated):
            self._give_up()
        rest = self._white + self._buffer
        if rest.strip(WHITE) or not self.whole:
            self._events += [Content(rest)] if rest else []
        return self._take()

    def _take(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _say(self, text: str) -> None:
        text = self._white + text
        said = text.rstrip(WHITE)
        self._white = text[len(said) :]
        if said:
            self._events.append(Content(said))

    def _move(self, count: int) -> str:
        """Takes characters off the buffer, as part of a call."""
        moved, self._buffer = self._buffer[:count], self._buffer[count:]
        self._raw += moved
        return moved

    # Each step reads from the buffer, and returns whether another look at it can tell more.

    def _content(self) -> bool:
        self._say(self._buffer)
        self._buffer = ""
        return False

    def _text(self) -> bool:
        mark = self._form.opening
        at = self._buffer.find(mark)
        said = len(self._buffer) - begun(self._buffer, mark) if at < 0 else at
        self._say(self._buffer[:said])
        self._buffer = self._buffer[said:]
        if at >= 0:
            self._raw, self._white = self._white, ""
            self._move(len(mark))
            self._state = _State.HEAD
        return at >= 0

    def _start(self) -> bool:
        text = self._buffer.lstrip(WHITE)
        if text:
            self._state = _State.HEAD if text[0] == "{" else _State.CONTENT
        return bool(text)

    def _head(self) -> bool:
        found = read_head(self._buffer, self._form.arguments_key)
        if found is Reading.OPEN:
            return False
        if isinstance(found, Reading) or found[0] not in self._names:
            if self._form.closing:
                self._state = _State.ANY_ORDER
            else:
                self._give_up()
            return True
        name, brace = found
        self._move(brace)
        self._events.append(CallBegin(name))
        self._arguments, self._scanner, self._state = "", ObjectScanner(), _State.ARGUMENTS
        return True

    def _any_order(self) -> bool:
        inside, mark, _ = self._buffer.partition(self._form.closing)
        if mark:
            self._finish_any_order(inside, mark)
        return bool(mark)

    def _finish_any_order(self, inside: str, mark: str = "") -> None:
        self._move(len(inside + mark))
        call = read_object(inside) or {}
        name, arguments = call.get("name"), call.get(self._form.arguments_key)
        if len(call) == 2 and isinstance(name, str) and name in self._names and isinstance(arguments, dict):
            self._events += [CallBegin(name), CallArguments(json.dumps(arguments, ensure_ascii=False))]
            self._complete()
        else:
            self._give_up()

    def _read_arguments(self) -> bool:
        end = self._scanner.end_in(self._buffer)
        piece = self._move(len(self._buffer) if end is None else end)
        self._arguments += piece
        self._events.append(CallArguments(piece))
        if end is not None:
            self._state = _State.TAIL
            if read_object(self._arguments) is None:
                self._give_up()
        return end is not None

    def _read_tail(self) -> bool:
        end = follow(self._buffer, self._tail)
        if end is Reading.OTHER:
            self._give_up()
        elif not isinstance(end, Reading):
            self._move(end)
            self._complete()
        return end is not Reading.OPEN

    def _complete(self) -> None:
        self.whole += 1
        self._raw, self._state = "", self._between if self._several else _State.CONTENT

    def _give_up(self) -> None:
        """What was read of a call becomes content."""
        if self._state in (_State.ARGUMENTS, _State.TAIL):
            self.broken += 1
            self._events.append(CallBroken(self._raw))
        else:
            self._say(self._raw)
        self._raw, self._state = "", _State.TEXT if self._form.opening else _State.CONTENT
