"""The log: one JSON object a line, on standard error, with nothing that a request said."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback


class JsonLines(logging.Formatter):
    """Writes a record as JSON; one that is a JSON object already, as the access log's, stays as it is.

    An exception is its type and its frames: its message may quote a prompt. Who logs one that quotes none puts the
    message into the record's own.
    """

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if message.startswith("{") and message.endswith("}"):
            return message
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": message,
        }
        if record.exc_info and record.exc_info[1] is not None:
            line["exception"] = "; from ".join(_describe(error) for error in _chain(record.exc_info[1]))
        return json.dumps(line)


def _chain(error: BaseException) -> list[BaseException]:
    """Returns the error, then what caused it."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return chain


def _describe(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return " < ".join([type(error).__name__, *(f"{at.name} ({at.filename}:{at.lineno})" for at in reversed(frames))])


def log_as_json(level: str) -> None:
    """Has every logger write to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level.upper(), handlers=[handler])
