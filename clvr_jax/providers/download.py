"""Images behind an address that a server gives: fetched without keys, within bounds, and not from the own network."""

from __future__ import annotations

import ipaddress
import socket
import time
import urllib.request
from collections.abc import Callable, Set

import httpx2

from clvr_jax.providers.base64_text import read_data_url
from clvr_jax.providers.failures import Failure, retry_after
from clvr_jax.providers.http_client import BoundedClient

MAX_BYTES = 64 * 2**20
"""Most bytes of an image that is fetched."""

_ALLOW = "if it is right, add the host to image_hosts of the endpoint"
_IN_OWN_NETWORK = f"is in the own network and is not fetched; {_ALLOW}"


def download(url: str, known_hosts: Set[str], new_client: Callable[[int], BoundedClient]) -> bytes:
    """Fetches what is found at an http(s) or data URL.

    Args:
      url: it is shown in no error, for it may be a password to what it points at.
      known_hosts: hosts that may be in the own network, and that redirects may lead to: the endpoint's own, and those
        that the user allows.
      new_client: most bytes of a response -> a client for it.
    Raises: Failure.
    """
    if url.startswith("data:"):
        return read_data_url(url)
    if not url.startswith(("http://", "https://")):
        raise Failure(
            "the image's address is neither http(s) nor data, perhaps a path on the server's disk; set the response "
            "format to b64_json",
            "malformed",
        )
    client = new_client(MAX_BYTES)
    try:
        target = httpx2.URL(url)
        client.check_redirect = lambda origin, after: _check_redirect(origin, after, known_hosts)
        client.check_peer = lambda origin, address: _check_peer(origin, address, known_hosts)
        _check_host(target, known_hosts)
        return _content(client.get(target), target.host)
    except (httpx2.InvalidURL, httpx2.UnsupportedProtocol, UnicodeError):
        raise Failure("the image's address makes no sense", "malformed") from None
    except httpx2.HTTPError as error:
        raise Failure(f"the image at {target.host} cannot be fetched ({error})", "down", can_retry=True) from None
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
    message = f"cannot be fetched (HTTP {status})"
    if status in (408, 425, 429) or status >= 500:
        raise Failure(message, "down", can_retry=True, wait=retry_after(response.headers, time.time()))
    raise Failure(message, "malformed")


def _check_redirect(origin: httpx2.URL, target: httpx2.URL, known_hosts: Set[str]) -> None:
    if target.host != origin.host and target.host not in known_hosts:
        raise Failure(f"redirects to another host, {target.host}; {_ALLOW}", "malformed")
    _check_host(target, known_hosts)


def _check_host(url: httpx2.URL, known_hosts: Set[str]) -> None:
    """Raises Failure for a host of the own network that is not known.

    A proxy resolves names itself, so behind one only the host as it is written can be checked.
    """
    host = url.host
    if host in known_hosts:
        return
    if any(not _is_public(address) for address in ([host] if _is_proxied(url) else _addresses(host))):
        raise Failure(_IN_OWN_NETWORK, "malformed")


def _check_peer(url: httpx2.URL, address: str, known_hosts: Set[str]) -> None:
    """Raises Failure if the connection leads into the own network: a name may have changed its address meanwhile."""
    if url.host not in known_hosts and not _is_proxied(url) and not _is_public(address):
        raise Failure(_IN_OWN_NETWORK, "malformed")


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
