"""Runs a service under uvicorn until a signal ends it."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn

from clvr_jax.errors import ClvrError
from clvr_jax.serving.app import make_app
from clvr_jax.serving.service import Service


def serve(service: Service, host: str, port: int, key: str | None, on_start: Callable[[int], None]) -> int:
    """Serves until SIGTERM or Ctrl-C; running loops are drained then.

    Args:
      service: what is served.
      host, port: to listen on; port 0 takes a free one.
      key: see `make_app`.
      on_start: called with the port once the server listens.
    Returns: the port.
    Raises: ClvrError if the address is in use or not of this machine; KeyboardInterrupt after Ctrl-C.
    """
    listening = _listen(host, port)
    chosen: int = listening.getsockname()[1]

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            # At once, while uvicorn waits for open connections, which end with their loops.
            threading.Thread(target=service.drain, name="clvr-drain", daemon=True).start()
            super().handle_exit(sig, frame)

    config = uvicorn.Config(
        make_app(service, key),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(service.limits.drain_seconds) + 15,
    )
    # uvicorn raises the signal again at its end; a server that SIGTERM ended has done what it was asked to.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        on_start(chosen)
        Server(config).run(sockets=[listening])
    finally:
        signal.signal(signal.SIGTERM, before)
        listening.close()
    return chosen


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(512)
    except OSError as error:
        raise ClvrError(f"{host}:{port}: cannot listen ({error.strerror or error}); choose another --port") from error
    return listening
