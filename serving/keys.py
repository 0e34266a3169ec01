"""The key file: which keys are valid, by their SHA-256, and what each may do; `python -m serving.keys new` adds one."""

from __future__ import annotations

import argparse
import hashlib
import hmac
import json
import logging
import os
import secrets
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StringConstraints, ValidationError

from serving.auth import Caller, Limits
from serving.config import ConfigError
from serving.errors import Unauthorised

logger = logging.getLogger("graft.keys")
CHECK_S = 1.0  # a changed file, and with it a revoked key, is noticed this soon
SECRET_BYTES = 32

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Count = Annotated[StrictInt, Field(ge=1)]


class KeyEntry(BaseModel):
    """One [[key]] of the file. An admin key does inference only where `models` says so."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    kind: Literal["inference", "admin"]
    models: tuple[str, ...] = ()
    metrics: StrictBool = False  # may read /metrics
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    max_concurrent: Count | None = None

    def caller(self) -> Caller:
        limits = Limits(self.requests_per_minute, self.tokens_per_minute, self.max_concurrent)
        return Caller(self.name, frozenset(self.models), self.kind == "admin", self.metrics, limits)


class KeyRing:
    """Finds a key's caller. It follows its file, and keeps the keys it has where the changed file is bad."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises ConfigError where the file is bad."""
        self._path = path
        self._clock = clock
        self._checked_s = clock()
        self._state = _state(path)
        self._callers = _load(path)

    def caller(self, authorization: str) -> Caller:
        """Takes the Authorization header; raises Unauthorised where it carries no valid key."""
        self._follow()
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthorised("the request carries no key; send it as a header: Authorization: Bearer KEY")
        # A key is 256 random bits: nothing to guess, so a slow or salted hash would protect nothing more.
        digest = hashlib.sha256(key.strip().encode()).digest()
        found = [caller for own, caller in self._callers if hmac.compare_digest(own, digest)]
        if not found:
            raise Unauthorised("the key is not valid here; check it, or ask for one of this server")
        return found[0]

    def _follow(self) -> None:
        now_s = self._clock()
        if now_s < self._checked_s + CHECK_S:
            return
        self._checked_s = now_s
        state = _state(self._path)
        if state == self._state:
            return
        self._state = state
        try:
            self._callers = _load(self._path)
            logger.info("--keys %s: read again, %d keys", self._path, len(self._callers))
        except ConfigError as error:
            logger.error("%s; the keys read before stay valid", error)


def read_keys(path: Path) -> tuple[KeyEntry, ...]:
    """Raises ConfigError that names the entry, the field and the remedy; it repeats no value, which might be a key."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--keys {path}: cannot be read as TOML: {error}") from None
    tables = document.get("key")
    if set(document) != {"key"} or not isinstance(tables, list):
        raise ConfigError(f"--keys {path}: has to hold [[key]] entries and nothing else; see python -m serving.keys -h")
    entries = tuple(_entry(path, number, table) for number, table in enumerate(tables, 1))
    for field in ("name", "sha256"):
        value, count = Counter(getattr(entry, field) for entry in entries).most_common(1)[0]
        if count > 1:
            raise ConfigError(f"--keys {path}: {count} entries have {field} {value}; give each key its own")
    return entries


def new_key() -> tuple[str, str]:
    """Returns a fresh key and its SHA-256."""
    key = f"graft-{secrets.token_urlsafe(SECRET_BYTES)}"
    return key, hashlib.sha256(key.encode()).hexdigest()


def add_entry(path: Path, entry: KeyEntry) -> None:
    """Appends to the file, or starts it, readable by its owner only. Raises ConfigError where the name is taken."""
    if path.exists() and entry.name in {known.name for known in read_keys(path)}:
        raise ConfigError(f"--keys {path}: {entry.name!r} is there already; choose another name, or delete its entry")
    fields = entry.model_dump(exclude_defaults=True)
    lines = [f"{name} = {json.dumps(value)}" for name, value in fields.items()]
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(descriptor, "a", encoding="utf-8") as file:
        file.write("\n".join(["", "[[key]]", *lines, ""]))


def main(arguments: Sequence[str]) -> int:
    """Prints the new key, the only time it is to be seen; the file keeps its hash."""
    given = _parser().parse_args(arguments)
    key, sha256 = new_key()
    fields = {name: value for name, value in vars(given).items() if name not in {"command", "keys", "admin"}}
    kind = "admin" if given.admin else "inference"
    fields["models"] = given.models or ([] if given.admin or given.metrics else ["*"])
    try:
        add_entry(given.keys, _entry(given.keys, None, {**fields, "sha256": sha256, "kind": kind}))
    except (ConfigError, OSError) as error:
        print(f"python -m serving.keys: {error}", file=sys.stderr)
        return 2
    print(key)
    print(f"{given.name!r} was added to {given.keys}; the key above is shown this once", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m serving.keys", description="Keys of the server.")
    commands = parser.add_subparsers(dest="command", required=True)
    new = commands.add_parser("new", help="make a key, print it, and add its entry to the key file")
    new.add_argument("name")
    new.add_argument("--keys", type=Path, required=True, metavar="FILE", help="the server's key file; made if absent")
    new.add_argument("--admin", action="store_true", help="for /admin/*; inference only with --model")
    new.add_argument("--metrics", action="store_true", help="may read /metrics; inference only with --model")
    new.add_argument("--model", dest="models", action="append", help="a model it may use; repeat for more (all)")
    new.add_argument("--requests-per-minute", type=int, metavar="COUNT")
    new.add_argument("--tokens-per-minute", type=int, metavar="COUNT", help="prompt and completion together")
    new.add_argument("--max-concurrent", type=int, metavar="COUNT", help="requests at once")
    return parser


def _load(path: Path) -> tuple[tuple[bytes, Caller], ...]:
    entries = read_keys(path)
    mode = path.stat().st_mode
    if mode & 0o002:
        raise ConfigError(f"--keys {path}: everyone may write to it, and so make keys; chmod 600 {path}")
    if mode & 0o004:
        logger.warning("--keys %s: everyone may read it; chmod 600 %s", path, path)
    return tuple((bytes.fromhex(entry.sha256), entry.caller()) for entry in entries)


def _state(path: Path) -> tuple[int, ...]:
    """Changes with the file; a file that is gone has a state too."""
    try:
        status = path.stat()
    except OSError:
        return ()
    return status.st_mtime_ns, status.st_size, status.st_ino, status.st_mode


def _entry(path: Path, number: int | None, table: Any) -> KeyEntry:
    where = f"--keys {path}" + (f", entry {number}" if number else "")
    try:
        entry = KeyEntry.model_validate(table)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        raise ConfigError(f"{where}: {'; '.join(problems)}") from None
    if entry.kind == "inference" and not (entry.models or entry.metrics):
        raise ConfigError(f'{where}: key {entry.name!r} may do nothing; give models = ["*"], or names of models')
    return entry


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
