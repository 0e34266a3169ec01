"""Every line is JSON, and no exception's message, which may quote a prompt, gets into one."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest

from serving.logs import JsonLines

MARKER = "the quick brown secret"


def line(message, *args, exc_info=None):
    record = logging.LogRecord("graft.test", logging.ERROR, __file__, 1, message, args, exc_info)
    return JsonLines().format(record)


def test_a_line_has_time_level_logger_and_message():
    read = json.loads(line("request %s\nfailed", "id-1"))
    assert read.pop("time").endswith("Z")
    assert read == {"level": "error", "logger": "graft.test", "message": "request id-1\nfailed"}


def test_a_line_that_is_json_already_stays():
    assert line("%s", '{"event": "request"}') == '{"event": "request"}'


def test_an_exception_is_its_type_and_place_and_so_is_its_cause():
    def inner():
        raise KeyError(MARKER)

    def outer():
        try:
            inner()
        except KeyError as error:
            raise ValueError(f"cannot read {MARKER}") from error

    with pytest.raises(ValueError, match=MARKER) as caught:
        outer()
    text = line("failed", exc_info=(caught.type, caught.value, caught.tb))
    exception = json.loads(text)["exception"]
    assert exception.startswith("ValueError < outer (")
    assert "from KeyError < inner (" in exception
    assert f"{__file__}:" in exception
    assert "secret" not in text


def test_every_logger_writes_json_to_standard_error():
    code = (
        "import logging; from serving.logs import log_as_json; log_as_json('info'); "
        "logging.getLogger('other').info('a'); logging.getLogger('other').debug('b')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [json.loads(each)["message"] for each in done.stderr.splitlines()] == ["a"]
    assert done.stdout == ""
