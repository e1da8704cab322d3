"""A Hugging Face Hub on the loopback address, for files that a test makes."""

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What a server gives, and what it was asked.

    Attributes:
        files: contents by `owner/name/file`.
        breaks: how many answers break off after half of what was asked for.
        damaged: whether the bytes are other ones than the announced SHA-256 is of.
        requests: method, path and Range of each request.
        address: `http://127.0.0.1:PORT`.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    breaks: int = 0
    damaged: bool = False
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    address: str = ""


@contextmanager
def serving() -> Iterator[Hub]:
    """A Hub that runs in a thread until the context ends."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            asked = self.headers.get("Range")
            hub.requests.append((self.command, self.path, asked))
            found = re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/[\w.-]+/([\w./-]+)", self.path)
            content = hub.files.get("/".join(found.groups())) if found else None
            if content is None:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            digest = hashlib.sha256(content).hexdigest()
            if hub.damaged:
                content = content[:-1] + bytes([content[-1] ^ 1])
            start = int(asked.removeprefix("bytes=").split("-")[0]) if asked and body else 0
            self.send_response(206 if start else 200)
            if start:
                self.send_header(
                    "Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}"
                )
            for name, value in {
                "ETag": f'"{digest}"',
                "X-Linked-Etag": f'"{digest}"',
                "X-Linked-Size": str(len(content)),
                "X-Repo-Commit": COMMIT,
                "Accept-Ranges": "bytes",
                "Content-Length": str(len(content) - start),
            }.items():
                self.send_header(name, value)
            self.end_headers()
            if not body:
                return
            if hub.breaks:
                hub.breaks -= 1
                self.wfile.write(content[start : start + (len(content) - start) // 2])
                self.close_connection = True
            else:
                self.wfile.write(content[start:])

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
