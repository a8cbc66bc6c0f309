"""JSON requests at a fraction of the processor time of the openai package, which many questions in flight make dear.

Connections stay open and are shared by threads. Proxies are those of the environment, as for other programs.
"""

from __future__ import annotations

import base64
import http.client
import json
import ssl
import time
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

import certifi

from clvr_jax.providers.endpoint import Failure, retry_after, status_failure

_GONE = (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError)


class PlainPost:
    """Requests to one server; may be used from many threads at once.

    Args:
      base_url: that paths are added to; a user and password in it become basic authentication.
      headers: of every request.
      timeout: seconds without a byte from the server.
    """

    def __init__(self, base_url: str, headers: Mapping[str, str], timeout: float):
        self._server = urlsplit(base_url)
        self._path, self._timeout = self._server.path.rstrip("/"), timeout
        self._headers = {"Content-Type": "application/json", "Accept": "application/json", **headers}
        if self._server.username is not None and "Authorization" not in headers:
            self._headers["Authorization"] = _basic(self._server)
        self._proxy = _proxy(self._server)
        if self._proxy is not None and self._server.scheme == "http":
            self._path = f"http://{self._server.netloc.rpartition('@')[2]}{self._path}"
            self._headers |= _proxy_headers(self._proxy)
        self._trusted = ssl.create_default_context()
        self._trusted.load_verify_locations(certifi.where())
        self._idle: list[http.client.HTTPConnection] = []

    def __call__(self, path: str, body: Mapping[str, Any]) -> str:
        """The body of the response. Raises: Failure; UnicodeEncodeError for text that is no valid Unicode."""
        content = json.dumps(body, ensure_ascii=False).encode()
        while True:
            is_new = not self._idle
            try:
                connection = self._idle.pop()
            except IndexError:  # another thread was quicker
                connection, is_new = self._connection(), True
            try:
                connection.request("POST", self._path + path, content, self._headers)
                response = connection.getresponse()
                data = response.read()
                break
            except TimeoutError:
                connection.close()
                raise Failure(f"no answer within {self._timeout:g} s", "down", can_retry=True) from None
            except (http.client.HTTPException, OSError) as error:
                connection.close()
                if is_new or not isinstance(error, _GONE):
                    raise Failure(f"cannot be reached ({error})", "down", can_retry=True) from None
                # The server has closed it while nobody used it.
        if response.will_close:
            connection.close()
        else:
            self._idle.append(connection)
        text = data.decode(errors="replace")
        if response.status >= 300:
            raise status_failure(
                response.status, _error(text), retry_after(dict(response.headers.items()), time.time())
            )
        return text

    def close(self) -> None:
        """Closes the connections."""
        while self._idle:
            self._idle.pop().close()

    def _connection(self) -> http.client.HTTPConnection:
        host, port = self._server.hostname or "", self._server.port
        if self._proxy is None:
            if self._server.scheme == "https":
                return http.client.HTTPSConnection(host, port, timeout=self._timeout, context=self._trusted)
            return http.client.HTTPConnection(host, port, timeout=self._timeout)
        by = self._proxy.hostname or "", self._proxy.port
        if self._server.scheme == "http":
            return http.client.HTTPConnection(*by, timeout=self._timeout)
        tunnel = http.client.HTTPSConnection(*by, timeout=self._timeout, context=self._trusted)
        tunnel.set_tunnel(host, port, _proxy_headers(self._proxy))
        return tunnel


def _proxy(server: SplitResult) -> SplitResult | None:
    proxy = urllib.request.getproxies().get(server.scheme)
    if not proxy or urllib.request.proxy_bypass(server.hostname or ""):
        return None
    return urlsplit(proxy if "//" in proxy else f"http://{proxy}")


def _proxy_headers(proxy: SplitResult) -> dict[str, str]:
    return {} if proxy.username is None else {"Proxy-Authorization": _basic(proxy)}


def _basic(address: SplitResult) -> str:
    login = f"{unquote(address.username or '')}:{unquote(address.password or '')}"
    return f"Basic {base64.b64encode(login.encode()).decode()}"


def _error(text: str) -> object:
    """The error object in a body, or the body as text."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return body.get("error", body) if isinstance(body, dict) else body
