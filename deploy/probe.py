"""What the deploy scripts ask of Python: is the port free, is the server ready, are its inputs the same, what to try.

Standard library only: it must run where curl, ss and lsof are missing.
"""

from __future__ import annotations

import hashlib
import json
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

TIMEOUT_S = 5.0
ROOT = Path(__file__).resolve().parent.parent
SHARED_SOURCES = ("training/artifact.py", "training/chat.py")  # what serving imports of training
CHANGING = ("--state", "--adapter-root")
UNAUTHORISED = 401
LISTEN = "0A"  # the state's code in /proc/net/tcp
NO_PROXY = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the server is on this machine


def port_is_free(host: str, port: str) -> tuple[int, str]:
    """Says who listens, where the port is taken."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(
                socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
            )  # as the server does: old connections may linger
            probe.bind(address)
    except (OSError, ValueError, OverflowError) as error:
        holder = ", ".join(_listeners(port)) or "a process that this user may not see"
        taken = isinstance(error, OSError) and "in use" in str(error)
        return 1, f"it is held by {holder}" if taken else f"it cannot be used: {error}"
    return 0, ""


def _listeners(port: str) -> Iterator[str]:
    """Yields process and command line; nothing where there is no /proc."""
    wanted = {f"socket:[{inode}]" for inode in _inodes(int(port))}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            links = {str(link.readlink()) for link in (process / "fd").iterdir()}
            if links & wanted:
                yield f"process {process.name} ({_command(process)})"
        except OSError:
            continue  # it ended, or is another user's


def _inodes(port: int) -> Iterator[str]:
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        lines = table.read_text().splitlines()[1:] if table.is_file() else []
        for columns in map(str.split, lines):
            if columns[3] == LISTEN and int(columns[1].rpartition(":")[2], 16) == port:
                yield columns[9]


def _command(process: Path) -> str:
    return (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()[:200]


def is_ready(url: str) -> tuple[int, str]:
    """Asks /readyz."""
    try:
        with NO_PROXY.open(url + "/readyz", timeout=TIMEOUT_S) as answer:
            return 0, f"status {answer.status}"
    except urllib.error.HTTPError as error:
        return 1, f"/readyz answers {error.code}"
    except OSError as error:
        return 1, f"/readyz does not answer: {getattr(error, 'reason', error)}"


def digest(*arguments: str) -> tuple[int, str]:
    """Names a server's inputs: its arguments, the files of the directories among them, and its own source.

    What lies in CHANGING directories changes while the server runs, by its own doing or for it to be told of.
    """
    state = hashlib.sha256(json.dumps([sys.executable, arguments]).encode())
    for flag, argument in zip(("", *arguments), arguments):  # noqa: B905 - the last flag has no argument after it
        directory = "" if flag in CHANGING else argument.rpartition("=")[2]
        files = sorted(Path(directory).rglob("*")) if directory and Path(directory).is_dir() else []
        for path in (path for path in files if path.is_file()):
            status = path.stat()  # size and time: reading gigabytes of weights would take as long as starting
            state.update(f"{path} {status.st_size} {status.st_mtime_ns}\n".encode())
    for path in (*sorted((ROOT / "serving").rglob("*.py")), *(ROOT / name for name in SHARED_SOURCES)):
        state.update(path.read_bytes())
    return 0, state.hexdigest()


def examples(url: str) -> tuple[int, str]:
    """Prints one request for each model, as the server lists them, and a streaming one."""
    try:
        with NO_PROXY.open(url + "/v1/models", timeout=TIMEOUT_S) as answer:
            models = [str(model["id"]) for model in json.load(answer)["data"]]
    except urllib.error.HTTPError as error:
        if error.code != UNAUTHORISED:
            raise
        return 0, f"# The server asks for keys; KEY is one of them\ncurl {url}/v1/models -H 'Authorization: Bearer KEY'"
    return 0, "\n\n".join([*(_curl(url, model, stream=False) for model in models), _curl(url, models[-1], stream=True)])


def _curl(url: str, model: str, *, stream: bool) -> str:
    body: dict[str, object] = {
        "model": model,
        "messages": [{"role": "user", "content": "Explain quantum computing in simple terms."}],
        "max_tokens": 64,
    }
    flag = "-sN" if stream else "-s"
    text = json.dumps({**body, "stream": True} if stream else body).replace("'", "'\\''")
    return f"curl {flag} {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{text}'"


COMMANDS: dict[str, Callable[..., tuple[int, str]]] = {
    "port": port_is_free,
    "ready": is_ready,
    "digest": digest,
    "examples": examples,
}


def main(arguments: Sequence[str]) -> int:
    """Prints the answer; exit 1 says no."""
    code, answer = COMMANDS[arguments[0]](*arguments[1:])
    sys.stdout.write(answer + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
