"""A real HTTP server on loopback that answers like an OpenAI-compatible one, or misbehaves as it is told."""

import base64
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from PIL import Image

KEY = "sk-test-0123456789abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Reply:
    """What the server says; content is JSON unless it is bytes, or a function that yields bytes for as long as anyone
    reads them."""

    content: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0


@dataclass(frozen=True)
class Seen:
    """A request as it arrived; names of headers in lower case."""

    path: str
    headers: dict[str, str]
    body: bytes
    time: float

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.body)


class LoopbackServer:
    """Gives the replies of `script` in order, the last one for ever. `seen`: requests; `peak`: most at once."""

    def __init__(self) -> None:
        self.script: list[Reply | Callable[[Seen], Reply]] = []
        self.seen: list[Seen] = []
        self.peak = self._in_flight = 0
        self._crowd: int | None = None
        self._changed = threading.Condition()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # head and body leave together, or the client's kernel acknowledges the head 40 ms late

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                owner._answer(
                    self, Seen(self.path, {k.lower(): v for k, v in self.headers.items()}, body, time.monotonic())
                )

            def do_GET(self) -> None:
                owner._answer(
                    self, Seen(self.path, {k.lower(): v for k, v in self.headers.items()}, b"", time.monotonic())
                )

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 256
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # clients that lost patience are part of the game

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def in_flight(self) -> int:
        """Requests that have arrived and are not answered yet."""
        return self._in_flight

    def hold_until(self, crowd: int) -> None:
        """Answers nobody until so many requests wait, and 0.3 s more, in which one too many would show."""
        self._crowd = crowd

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, handler: BaseHTTPRequestHandler, seen: Seen) -> None:
        with self._changed:
            step = self.script[min(len(self.seen), len(self.script) - 1)]
            self.seen.append(seen)
            self._in_flight += 1
            self.peak = max(self.peak, self._in_flight)
            self._changed.notify_all()
            if self._crowd is not None:
                self._changed.wait_for(lambda: self._crowd is None or self.peak >= self._crowd, 20)
        if self._crowd is not None:
            time.sleep(0.3)
            self._crowd = None
        reply = step(seen) if callable(step) else step
        time.sleep(reply.delay)
        is_stream = callable(reply.content)
        is_bytes = is_stream or isinstance(reply.content, bytes)
        content = reply.content if is_bytes else json.dumps(reply.content).encode()
        with self._changed:
            self._in_flight -= 1
        handler.send_response(reply.status)
        handler.send_header("Content-Type", "application/json")
        handler.close_connection = is_stream
        handler.send_header(*(("Connection", "close") if is_stream else ("Content-Length", str(len(content)))))
        for name, value in reply.headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        for chunk in content() if is_stream else [content]:
            handler.wfile.write(chunk)


@contextmanager
def dripping(head: bytes) -> Iterator[str]:
    """A server that sends `head`, then a byte at a time, until it is closed."""
    over = threading.Event()

    def drip(connection: socket.socket) -> None:
        with connection:
            connection.sendall(head)
            while not over.wait(0.05):
                try:
                    connection.sendall(b"x")
                except OSError:
                    return

    def serve() -> None:
        while not over.is_set():
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=drip, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            over.set()


def completion(text: str | None, tokens: tuple[int, int] = (11, 7), finish: str = "stop", **message: Any) -> Reply:
    """A chat completion."""
    return Reply(
        {
            "id": "c",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": [
                {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text, **message}}
            ],
            "usage": {"prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens)},
        }
    )


def failure(status: int, message: str = "no", headers: dict[str, str] | None = None, **error: Any) -> Reply:
    """An error in OpenAI's form."""
    return Reply({"error": {"message": message, **error}}, status, headers or {})


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(height, width, 3) uint8 noise."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def pictures(content: bytes | str, **more: Any) -> Reply:
    """An images response: bytes as base64, a string as URL."""
    entry = {"url": content} if isinstance(content, str) else {"b64_json": base64.b64encode(content).decode()}
    return Reply({"created": 0, "data": [entry], **more})
