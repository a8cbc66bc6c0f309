"""The part of the Hugging Face Hub's protocol that downloads use, over HTTP on the loopback interface."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "1234567890abcdef1234567890abcdef12345678"


@dataclass
class Hub:
    """One repository and how the server behaves; the requests it got.

    files: path -> content. gated: files may not be read without `token`. status: answer everything with it.
    drop: file whose first transfer breaks off in the middle.
    """

    repository: str
    files: dict[str, bytes]
    gated: bool = False
    token: str | None = None
    status: int | None = None
    drop: str | None = None
    url: str = ""
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)

    def fetched(self) -> list[str]:
        """Files that were asked for, in the order of their names."""
        mark = f"/resolve/{COMMIT}/"
        return sorted({path.split(mark)[1] for verb, path, _ in self.requests if verb == "GET" and mark in path})


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serves until the block ends; `hub.url` says where."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args):
            pass

        def do_HEAD(self):
            self.respond()

        def do_GET(self):
            self.respond()

        def respond(self):
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path, {name.lower(): value for name, value in self.headers.items()}))
            if hub.status is not None:
                return self.answer(hub.status)
            api, files = f"/api/models/{hub.repository}/", f"/{hub.repository}/resolve/"
            if path.startswith(files):
                return self.file(*path.removeprefix(files).split("/", 1))
            if not path.startswith(api):
                return self.answer(404, {"X-Error-Code": "RepoNotFound"})
            kind, revision = path.removeprefix(api).split("/", 1)
            if revision not in ("main", COMMIT, "v1"):
                return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
            if kind == "revision":
                return self.answer(200, {}, {"id": hub.repository, "sha": COMMIT, "siblings": []})
            return self.answer(
                200,
                {},
                [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in hub.files.items()
                ],
            )

        def file(self, revision, name):
            if hub.gated and self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self.answer(401, {"X-Error-Code": "GatedRepo"})
            content = hub.files[name]
            begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
            headers = {
                "X-Repo-Commit": COMMIT,
                "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
                "Accept-Ranges": "bytes",
                "Content-Length": str(len(content) - begin),
            }
            if begin:
                headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
            self.send(206 if begin else 200, headers)
            if self.command == "HEAD":
                return
            if hub.drop == name:
                hub.drop = None
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
                return
            self.wfile.write(content[begin:])

        def answer(self, status, headers=None, body=None):
            content = json.dumps(body).encode() if body is not None else b""
            self.send(
                status, {"Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})}
            )
            if self.command != "HEAD":
                self.wfile.write(content)

        def send(self, status, headers):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
