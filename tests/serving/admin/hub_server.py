"""A model hub's HTTP interface, as far as the hub's own client asks it for a snapshot."""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c" * 40


@contextmanager
def running_hub(
    repo: str, files: Mapping[str, bytes], status: int = 200, *, cuts: bool = False
) -> Iterator[tuple[str, list[str]]]:
    """Yields the hub's URL and the paths of the files that were fetched from it; a `status` but 200 refuses all.

    With `cuts` the connection is reset within each file.
    """
    fetched: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.answer(with_body=False)

        def do_GET(self):
            self.answer(with_body=True)

        def answer(self, *, with_body):
            path = self.path.split("?")[0]
            if status != 200 or repo not in path:
                code, body, kind = (404 if status == 200 else status), b"{}", "application/json"
            elif path.startswith(f"/api/models/{repo}/revision/"):
                names = [{"rfilename": name} for name in files]
                code, kind = 200, "application/json"
                body = json.dumps({"id": repo, "sha": COMMIT, "siblings": names}).encode()
            elif path.startswith(f"/api/models/{repo}/tree/{COMMIT}"):
                tree = [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in files.items()]
                code, body, kind = 200, json.dumps(tree).encode(), "application/json"
            else:
                name = path.removeprefix(f"/{repo}/resolve/{COMMIT}/")
                code, body, kind = 200, files[name], "application/octet-stream"
                if with_body:
                    fetched.append(name)
                if with_body and cuts:
                    self.cut(len(body))
                    return
            self.send_response(code)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            self.send_header("etag", f'"{hashlib.sha1(body).hexdigest()}"')
            self.send_header("x-repo-commit", COMMIT)
            if code == 404:
                self.send_header("x-error-code", "RepoNotFound")
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def cut(self, length):
            self.send_response(200)
            self.send_header("content-length", str(length))
            self.end_headers()
            self.close_connection = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
            self.rfile.close()
            self.connection.close()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", fetched
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)
