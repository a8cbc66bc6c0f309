"""JSON requests at a fraction of the processor time of the openai package, which many questions in flight make dear.

Threads share a pool of connections that stay open. Proxies are those of the environment, as for other programs.
"""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

import urllib3

from clvr_jax.providers.endpoint import Failure, retry_after, status_failure


class PlainPost:
    """Requests to one server; may be used from many threads at once.

    Args:
      base_url: that paths are added to; a user and password in it become basic authentication.
      headers: of every request.
      timeout: seconds without a byte from the server.
      connections: that are kept open at most.
    """

    def __init__(self, base_url: str, headers: Mapping[str, str], timeout: float, connections: int):
        parts = urlsplit(base_url)
        self._address = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))
        self._headers = {"Content-Type": "application/json", "Accept": "application/json", **headers}
        if parts.username is not None and "Authorization" not in headers:
            self._headers |= urllib3.make_headers(basic_auth=_login(parts))
        self._timeout = timeout
        self._pool = _pool(parts.scheme, parts.hostname or "", connections)

    def __call__(self, path: str, body: Mapping[str, Any]) -> str:
        """The body of the response. Raises: Failure; UnicodeEncodeError for text that is no valid Unicode."""
        content = json.dumps(body, ensure_ascii=False).encode()
        try:
            response = self._pool.request(
                "POST",
                self._address + path,
                body=content,
                headers=self._headers,
                timeout=urllib3.Timeout(self._timeout),
                retries=False,
            )
            text = response.data.decode(errors="replace")
        except (urllib3.exceptions.HTTPError, OSError) as error:
            # urllib3 counts a refused connection among those that took too long.
            waited = isinstance(error, urllib3.exceptions.TimeoutError)
            if waited and not isinstance(error, urllib3.exceptions.NewConnectionError):
                raise Failure(f"no answer within {self._timeout:g} s", "down", can_retry=True) from None
            raise Failure(f"cannot be reached ({error})", "down", can_retry=True) from None
        if response.status >= 300:
            raise status_failure(response.status, _error(text), retry_after(response.headers, time.time()))
        return text

    def close(self) -> None:
        """Closes the connections."""
        self._pool.clear()


def _pool(scheme: str, host: str, connections: int) -> urllib3.PoolManager:
    proxy = urllib.request.getproxies().get(scheme)
    if not proxy or urllib.request.proxy_bypass(host):
        return urllib3.PoolManager(maxsize=connections)
    auth = urlsplit(proxy)
    headers: dict[str, str] = {}
    if auth.username is not None:
        headers = dict(urllib3.make_headers(proxy_basic_auth=_login(auth)))
    return urllib3.ProxyManager(proxy, maxsize=connections, proxy_headers=headers)


def _login(address: SplitResult) -> str:
    return f"{unquote(address.username or '')}:{unquote(address.password or '')}"


def _error(text: str) -> object:
    """The error object in a body, or the body as text."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return body.get("error", body) if isinstance(body, dict) else body
