"""Download of images from URLs that a server returns: without keys, within limits, and not from the local network."""

from __future__ import annotations

import ipaddress
import socket
import time
import urllib.request
from collections.abc import Callable, Set
from typing import TypeVar

import httpx2

from clvr_jax.providers.failures import Failure, retry_after
from clvr_jax.providers.http_client import BoundedClient

T = TypeVar("T")

_ALLOW = "if it is right, add the host to image_hosts of the endpoint"
_IN_LOCAL_NETWORK = f"is in the local network and is not downloaded from; {_ALLOW}"


def download(
    url: str, known_hosts: Set[str], new_client: Callable[[], BoundedClient], decode: Callable[[bytes], T]
) -> T:
    """Downloads and decodes the content of an http(s) URL.

    Args:
      url: never part of an error message, because it may give access to the image.
      known_hosts: hosts that may be in the local network and that redirects may lead to: the endpoint's own host, and
        those that the user allows.
      new_client: returns a client with a limit on the size of the content.
      decode: the content -> the result; raises Failure. The bytes count as held in memory until it returns.
    Returns: the decoded content.
    Raises: Failure.
    """
    if not url.startswith(("http://", "https://")):
        raise Failure(
            "the image's URL is neither http(s) nor data, perhaps a path on the server's disk; set the response "
            "format to b64_json",
            "malformed",
        )
    client = new_client()
    try:
        target = httpx2.URL(url)
        client.check_redirect = lambda origin, after: _check_redirect(origin, after, known_hosts)
        client.check_peer = lambda origin, address: _check_peer(origin, address, known_hosts)
        _check_host(target, known_hosts)
        return decode(_content(client.get(target), target.host))
    except (httpx2.InvalidURL, httpx2.UnsupportedProtocol, UnicodeError):
        raise Failure("the image's URL is invalid", "malformed") from None
    except httpx2.HTTPError as error:
        raise Failure(f"the image at {target.host} cannot be downloaded ({error})", "down", can_retry=True) from None
    except Failure as failure:
        failure.message = f"the image at {target.host}: {failure.message}"
        raise
    finally:
        client.held.release()
        client.close()


def _content(response: httpx2.Response, host: str) -> bytes:
    status = response.status_code
    if response.is_success:
        return response.content
    message = f"cannot be downloaded (HTTP {status})"
    if status in (408, 425, 429) or status >= 500:
        raise Failure(message, "down", can_retry=True, wait=retry_after(response.headers, time.time()))
    raise Failure(message, "malformed")


def _check_redirect(origin: httpx2.URL, target: httpx2.URL, known_hosts: Set[str]) -> None:
    if target.host != origin.host and target.host not in known_hosts:
        raise Failure(f"redirects to another host, {target.host}; {_ALLOW}", "malformed")
    _check_host(target, known_hosts)


def _check_host(url: httpx2.URL, known_hosts: Set[str]) -> None:
    """Raises Failure for a host of the local network that is not known.

    A proxy resolves names itself; with a proxy only literal addresses can be checked.
    """
    host = url.host
    if host in known_hosts:
        return
    if any(not _is_public(address) for address in ([host] if _is_proxied(url) else _addresses(host))):
        raise Failure(_IN_LOCAL_NETWORK, "malformed")


def _check_peer(url: httpx2.URL, address: str, known_hosts: Set[str]) -> None:
    """Raises Failure if a connection leads into the local network, as a name may resolve differently a second time."""
    if url.host not in known_hosts and not _is_proxied(url) and not _is_public(address):
        raise Failure(_IN_LOCAL_NETWORK, "malformed")


def _is_proxied(url: httpx2.URL) -> bool:
    return url.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(url.host)


def _addresses(host: str) -> list[str]:
    try:
        return [str(entry[4][0]) for entry in socket.getaddrinfo(host, None)]
    except (OSError, UnicodeError):
        raise Failure("its name cannot be resolved", "down", can_retry=True) from None


def _is_public(address: str) -> bool:
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address.lower() != "localhost"
    mapped = getattr(found, "ipv4_mapped", None)
    return (mapped or found).is_global
