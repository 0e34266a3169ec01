"""Only keys of the file are valid; a changed file counts within a second, and a bad one changes nothing."""

from __future__ import annotations

import logging
import os
import tomllib

import pytest

from serving.auth import Limits
from serving.config import ConfigError
from serving.errors import Unauthorised
from serving.keys import CHECK_S, KeyRing, main, new_key, read_keys

ENTRY = '[[key]]\nname = "ann"\nsha256 = "{}"\nkind = "inference"\nmodels = ["starter"]\n'


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys.toml"


def write(path, text):
    path.write_text(text)
    path.chmod(0o600)


def make(path, capsys, name, *flags):
    """Returns the key that the command prints."""
    assert main(["new", name, "--keys", str(path), *flags]) == 0
    return capsys.readouterr().out.strip()


def test_a_new_key_is_valid_and_its_file_holds_no_key(path, capsys):
    key = make(path, capsys, "ann", "--model", "starter", "--tokens-per-minute", "900", "--max-concurrent", "2")
    root = make(path, capsys, "root", "--admin")
    ring = KeyRing(path)
    caller = ring.caller(f"Bearer {key}")
    assert (caller.name, caller.models, caller.is_admin) == ("ann", {"starter"}, False)
    assert caller.limits == Limits(None, 900, 2)
    assert (ring.caller(f"bearer  {root} ").is_admin, ring.caller(f"bearer {root}").models) == (True, frozenset())
    text = path.read_text()
    assert key not in text
    assert root not in text
    assert path.stat().st_mode & 0o777 == 0o600


def test_defaults_of_the_command_are_all_models_or_none(path, capsys):
    for name, flags in (("all", ()), ("prometheus", ("--metrics",)), ("both", ("--admin", "--model", "*"))):
        make(path, capsys, name, *flags)
    models = {entry.name: (entry.models, entry.metrics) for entry in read_keys(path)}
    assert models == {"all": (("*",), False), "prometheus": ((), True), "both": (("*",), False)}


def test_keys_are_random_and_long():
    keys = {new_key()[0] for _ in range(100)}
    assert len(keys) == 100
    assert all(len(key) >= len("graft-") + 43 for key in keys), "32 bytes in base64"


@pytest.mark.parametrize("flags", [("ann",), ("a b",), ("x" * 65,), ("b", "--requests-per-minute", "0")])
def test_the_command_refuses_what_the_server_would(path, capsys, flags):
    make(path, capsys, "ann")
    before = path.read_text()
    assert main(["new", *flags, "--keys", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "python -m serving.keys: --keys" in err
    assert path.read_text() == before


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer  ", "Basic {key}", "{key}", "Bearer {key}x", "Bearer x{key}"])
def test_another_header_is_401_and_says_nothing_of_the_key(path, capsys, header):
    key = make(path, capsys, "ann")
    with pytest.raises(Unauthorised) as caught:
        KeyRing(path).caller(header.format(key=key))
    assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
    assert key not in caught.value.message
    assert "www-authenticate" in caught.value.headers


BAD_FILES = (
    ("", "has to hold"),
    ("key = 3", "has to hold"),
    ("nonsense", "cannot be read as TOML"),
    ('other = 1\n[[key]]\nname = "a"', "has to hold"),
    (ENTRY.format("0" * 63), "entry 1: sha256"),
    (ENTRY.format("graft-a-real-key-pasted-by-mistake"), "entry 1: sha256"),
    (ENTRY.format("0" * 64) + "request_per_minute = 3", "request_per_minute: Extra inputs"),
    (ENTRY.format("0" * 64) + "max_concurrent = 0", "max_concurrent"),
    (ENTRY.format("0" * 64) + "max_concurrent = 1.5", "max_concurrent"),
    (ENTRY.format("0" * 64) * 2, "2 entries have name ann"),
    (ENTRY.format("0" * 64) + ENTRY.format("0" * 64).replace("ann", "bob"), "2 entries have sha256"),
    (ENTRY.format("0" * 64).replace('["starter"]', "[]"), "key 'ann' may do nothing"),
    (ENTRY.format("0" * 64).replace("inference", "root"), "kind"),
)


@pytest.mark.parametrize(("text", "message"), BAD_FILES)
def test_a_bad_file_is_refused_by_entry_and_field_and_no_value_is_repeated(path, text, message):
    write(path, text)
    with pytest.raises(ConfigError, match=f"--keys {path}.*{message}") as caught:
        KeyRing(path)
    assert "pasted" not in str(caught.value)


def test_a_file_that_is_missing_is_refused(path):
    with pytest.raises(ConfigError, match="No such file"):
        KeyRing(path)


def test_a_file_that_everyone_may_read_is_warned_of_and_one_that_everyone_may_write_refused(path, capsys, caplog):
    make(path, capsys, "ann")
    path.chmod(0o644)
    KeyRing(path)
    assert f"chmod 600 {path}" in caplog.text
    path.chmod(0o602)
    with pytest.raises(ConfigError, match="everyone may write"):
        KeyRing(path)


def test_a_changed_file_counts_within_a_second_and_a_bad_one_leaves_the_old_keys(path, capsys, caplog):
    caplog.set_level(logging.INFO)
    clock, first = Clock(), make(path, capsys, "ann")
    good = path.read_text()
    ring = KeyRing(path, clock)
    second = make(path, capsys, "bob")
    with pytest.raises(Unauthorised):
        ring.caller(f"Bearer {second}")
    clock.now_s += CHECK_S
    assert ring.caller(f"Bearer {second}").name == "bob"

    write(path, "broken [")
    clock.now_s += CHECK_S
    assert ring.caller(f"Bearer {first}").name == "ann"
    clock.now_s += CHECK_S
    assert ring.caller(f"Bearer {second}").name == "bob"
    assert caplog.text.count("the keys read before stay valid") == 1

    os.remove(path)
    clock.now_s += CHECK_S
    assert ring.caller(f"Bearer {first}").name == "ann"
    write(path, good)
    clock.now_s += CHECK_S
    with pytest.raises(Unauthorised):
        ring.caller(f"Bearer {second}")
    assert first not in caplog.text


def test_the_entry_is_plain_toml(path, capsys):
    make(path, capsys, "a-1", "--requests-per-minute", "5")
    (entry,) = tomllib.loads(path.read_text())["key"]
    assert entry["requests_per_minute"] == 5
    assert set(entry) == {"name", "sha256", "kind", "models", "requests_per_minute"}
