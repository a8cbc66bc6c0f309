"""An OpenAI-compatible endpoint for benchmarks: a process of its own that answers after a fixed time and costs little.

A server with a thread for each request would spend more on its threads than its clients spend on calling it, on the
same cores; this one has an event loop.
"""

import asyncio
import contextlib
import json
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

LOOK = 0.05
"""Seconds between two looks at how many requests it has in hand."""

ChatResponse = Callable[[str, dict[str, Any]], dict[str, Any]]
"""(path, JSON of the request) -> JSON of the response; importable, for it runs in the other process."""


class Endpoint:
    """A running endpoint: `url`, and `seen()`."""

    def __init__(self, url: str, pipe: Connection):
        self.url, self._pipe = url, pipe

    def seen(self) -> tuple[int, list[int]]:
        """Requests so far; and, at each look since the first of them, those read and not answered yet."""
        self._pipe.send(None)
        requests, looks = self._pipe.recv()
        return requests, looks


@contextmanager
def endpoint(answer: ChatResponse, delay: float) -> Iterator[Endpoint]:
    """Serves on loopback until the block ends; `delay`: seconds from a request to its answer."""
    context = multiprocessing.get_context("spawn")
    ours, its = context.Pipe()
    process = context.Process(target=_run, args=(its, answer, delay), daemon=True)
    process.start()
    try:
        yield Endpoint(ours.recv(), ours)
    finally:
        process.terminate()
        process.join()


def _run(pipe: Connection, answer: ChatResponse, delay: float) -> None:
    asyncio.run(_serve(pipe, answer, delay))


async def _serve(pipe: Connection, answer: ChatResponse, delay: float) -> None:
    requests = in_hand = 0
    looks: list[int] = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal requests, in_hand
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):  # the client has gone
            while True:
                path, body = await _request(reader)
                requests, in_hand = requests + 1, in_hand + 1
                content = json.dumps(answer(path, json.loads(body))).encode()
                await asyncio.sleep(delay)
                head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
                writer.write(head.encode() + content)
                await writer.drain()
                in_hand -= 1
        writer.close()

    server = await asyncio.start_server(connected, "127.0.0.1", 0, limit=1 << 24)
    host, port = server.sockets[0].getsockname()[:2]
    pipe.send(f"http://{host}:{port}/v1")
    while True:
        await asyncio.sleep(LOOK)
        if requests:
            looks.append(in_hand)
        if pipe.poll():
            pipe.recv()
            pipe.send((requests, looks))


async def _request(reader: asyncio.StreamReader) -> tuple[str, bytes]:
    """Path and body of the next request."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    length = next(int(line[15:]) for line in head.split("\r\n") if line.lower().startswith("content-length:"))
    return head.split(" ", 2)[1], await reader.readexactly(length)
