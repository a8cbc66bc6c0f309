"""A bucket of Google Cloud Storage on loopback, with faults on request.

The server is gcp-storage-emulator. It ignores preconditions, sends neither generations nor stored lengths, and forgets
a resumable upload that is complete; locks, TensorStore and repeated requests depend on these. They are added here as
Google documents them.
"""

import io
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage
from typing_extensions import override

BUCKET = "runs"


def forget_clients() -> None:
    """Makes this process connect again, as the environment says; libraries keep clients."""
    from etils.epath import backend
    from gcsfs import GCSFileSystem
    from orbax.checkpoint._src.path import gcs_utils

    from clvr_jax.files.buckets import objects

    objects._client.cache_clear()
    gcs_utils.get_bucket.cache_clear()
    type(backend.fsspec_backend)._get_filesystem.cache_clear()
    GCSFileSystem.clear_instance_cache()


@dataclass(frozen=True)
class Seen:
    """A request: its method, the object's name ("" for a list or the bucket), and whether it changes the bucket."""

    method: str
    name: str
    url: str

    @property
    def writes(self) -> bool:
        """Whether it changes the bucket."""
        return self.method != "GET"


@dataclass
class InjectedFault:
    """A fault that the server has: `kind` is an HTTP status such as 503, or "slow", "torn" or "lost".

    A torn response ends after half of its bytes. A lost one is not sent at all, though the request was obeyed.
    times: number of requests that meet it. applies: chooses these requests. reason: in the body of the response.
    """

    kind: int | str
    times: int = 1
    applies: Callable[[Seen], bool] = lambda seen: True
    reason: str = "injected"
    met: int = field(default=0, init=False)


class BucketServer:
    """The server with one bucket, `BUCKET`; `url` is its address."""

    def __init__(self) -> None:
        for name in ("api", "storage", "server", "gcp_storage_emulator"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)  # it logs each object that does not exist
        self.storage = _Storage(use_memory_fs=True)
        buckets.create_bucket(BUCKET, self.storage)
        self.faults: list[InjectedFault] = []
        self.seen: list[Seen] = []
        self.completed: dict[str, bytes] = {}
        self.before_answer: Callable[[Seen], None] = lambda seen: None
        self.lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self, self.storage))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a process for which gs:// is this server."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "NO_GCE_CHECK": "true",
            "NO_PROXY": "127.0.0.1",
        }

    def objects(self, prefix: str = "") -> dict[str, bytes]:
        """Returns the content of all objects by name, without what stands for directories."""
        with self.lock:
            names = [found["name"] for found in self.storage.get_file_list(BUCKET, prefix or None)[0]]
            return {name: self.storage.get_file(BUCKET, name) for name in names if not name.endswith("/")}

    @contextmanager
    def with_faults(self, *faults: InjectedFault) -> Iterator[None]:
        """Has faults while the block runs."""
        with self.lock:
            self.faults = list(faults)
        try:
            yield
        finally:
            with self.lock:
                self.faults = []

    def fault(self, seen: Seen) -> InjectedFault | None:
        """Returns the fault that a request meets."""
        for fault in self.faults:
            if fault.met < fault.times and fault.applies(seen):
                fault.met += 1
                return fault
        return None

    def generation(self, name: str) -> int:
        """Returns the generation of an object; 0 if there is none."""
        try:
            return int(self.storage.get_file_obj(BUCKET, name)["generation"])
        except NotFound:
            return 0

    def empty(self) -> None:
        """Deletes all objects, and what was seen."""
        with self.lock:
            self.storage.wipe()
            buckets.create_bucket(BUCKET, self.storage)
            self.faults, self.seen = [], []
            self.before_answer = lambda seen: None

    def close(self) -> None:
        """Ends the server."""
        self._server.shutdown()
        self._server.server_close()


class _Storage(Storage):
    """Storage that lists the names between two others, as TensorStore asks for them."""

    bounds: tuple[str, str | None] = ("", None)

    def get_file_list(self, *arguments: Any, **options: Any) -> Any:
        (first, last), self.bounds = self.bounds, ("", None)
        files, prefixes = super().get_file_list(*arguments, **options)
        return [each for each in files if first <= each["name"] and (last is None or each["name"] < last)], prefixes


class _Handler(RequestHandler):
    """Answers one request; the response is complete in memory before any of it is sent, or is not sent."""

    def __init__(self, server: BucketServer, *arguments: Any):
        self._bucket = server
        super().__init__(*arguments)

    def handle_one_request(self) -> None:
        socket, self.wfile = self.wfile, io.BytesIO()
        self._added: dict[str, str] = {}
        try:
            super().handle_one_request()
            answer = self.wfile.getvalue()
        finally:
            self.wfile = socket
        if self._fault is not None and self._fault.kind in ("torn", "lost"):
            answer = answer[: len(answer) // 2] if self._fault.kind == "torn" else b""
            self.close_connection = True
        if self._fault is not None and self._fault.kind == "slow":
            time.sleep(1)
        if self._seen is not None:
            self._bucket.before_answer(self._seen)
        try:
            socket.write(answer)
        except OSError:  # the client has gone
            self.close_connection = True

    _fault: InjectedFault | None = None
    _seen: Seen | None = None

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        url = urlparse(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        _, _, encoded = url.path.partition("/o/")
        name = query.get("name") or unquote(encoded)
        if query.get("uploadType") == "multipart":
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.rfile = io.BytesIO(body)
            name, _ = json.JSONDecoder().raw_decode(body[body.index(b"{") :].decode("latin-1"))
            name = name["name"].encode("latin-1").decode()
        seen = Seen(self.command, name, self.path)
        with self._bucket.lock:
            self._bucket.seen.append(seen)
            self._fault = self._bucket.fault(seen)
        self._seen = seen
        if self._fault is not None and isinstance(self._fault.kind, int):
            return self._refuse(self._fault.kind, self._fault.reason)
        self._name, self._query = name, query
        return True

    @override
    def do_GET(self) -> None:
        self._handle(super().do_GET)

    @override
    def do_POST(self) -> None:
        self._handle(super().do_POST)

    @override
    def do_PUT(self) -> None:
        self._handle(super().do_PUT)

    @override
    def do_DELETE(self) -> None:
        self._handle(super().do_DELETE)

    @override
    def do_PATCH(self) -> None:
        self._handle(super().do_PATCH)

    def _handle(self, answer: Callable[[], None]) -> None:
        with self._bucket.lock:
            self._bucket.storage.bounds = self._query.get("startOffset", ""), self._query.get("endOffset")
            found = self._bucket.generation(self._name) if self._name else 0
            if "ifGenerationMatch" in self._query and int(self._query["ifGenerationMatch"]) != found:
                self._refuse(412, "conditionNotMet")
                return
            if self.command == "GET" and self._query.get("ifGenerationNotMatch") == str(found) and found:
                self._refuse(304, "notModified")
                return
            if self.command == "GET" and found:
                self._added = {"x-goog-generation": str(found), "x-goog-metageneration": "1"}
                size = self._bucket.storage.get_file_obj(BUCKET, self._name)["size"]
                self._added |= {"x-goog-stored-content-length": str(size), "x-goog-stored-content-encoding": "identity"}
            upload = self._query.get("upload_id", "")
            if upload in self._bucket.completed:  # its response was lost
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self.wfile.write(self._bucket.completed[upload])
                return
            answer()
            if upload and self.wfile.getvalue().startswith(b"HTTP/1.0 200"):
                self._bucket.completed[upload] = self.wfile.getvalue()

    def end_headers(self) -> None:
        for name, value in self._added.items():
            self.send_header(name, value)
        super().end_headers()

    def _refuse(self, status: int, reason: str) -> bool:
        length = int(self.headers.get("Content-Length") or 0)
        self.rfile.read(length)  # a client that is still sending would take the end of the connection for an error
        error = {"code": status, "message": reason, "errors": [{"reason": reason, "message": reason}]}
        body = b"" if status == 304 else json.dumps({"error": error}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        return False
