"""Fetch an image by https without becoming a way into the private network. Torch-free.

Covered: the name is resolved once and the checked address is the one dialled (no rebinding); every redirect is checked
again; private, loopback, link-local, multicast and tunnelled addresses are refused; size, redirects and the whole time
are limited; proxies from the environment are not used. Not covered: what the bytes hold (``images`` decides).
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpcore

from vlm_dft.data.problems import RowError, shown

_TUNNELS = tuple(ipaddress.ip_network(net) for net in ("64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32"))
_REDIRECTS = (301, 302, 303, 307, 308)


def is_public(address: str) -> bool:
    """Whether a resolved address is one of the public Internet's, and not a way to another one."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address) and (ip.ipv4_mapped or any(ip in net for net in _TUNNELS)):
        return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


class RefusedError(Exception):
    """The address may not be dialled."""


@dataclass(frozen=True)
class Fetcher:
    """Limits of a fetch; a test replaces schemes and allowed to reach its own server."""

    max_bytes: int
    timeout_seconds: float = 10.0
    max_redirects: int = 3
    schemes: tuple[str, ...] = ("https",)
    allowed: Callable[[str], bool] = is_public
    domains: tuple[str, ...] = ()
    """Hosts that may be asked, with everything below them; empty: any public one."""

    def fetch(self, url: str, field: str) -> bytes:
        """The body. Raises RowError."""
        deadline = time.monotonic() + self.timeout_seconds
        current = url
        try:
            for _ in range(self.max_redirects + 1):
                self._check_url(current, field)
                status, location, body = self._get(current, deadline)
                if status not in _REDIRECTS:
                    break
                current = urljoin(current, location)
            else:
                raise RowError(field, "image_url_redirects", f"{shown(url)}: more than {self.max_redirects} redirects")
        except RefusedError as error:
            reason = f"{shown(current)} leads to {error}, which is no public address"
            raise RowError(field, "image_url_private", reason) from None
        except (
            httpcore.ConnectError,
            httpcore.NetworkError,
            httpcore.TimeoutException,
            httpcore.ProtocolError,
        ) as error:
            reason = f"{shown(current)} cannot be fetched: {type(error).__name__} {error}".rstrip()
            raise RowError(field, "image_url_failed", reason) from None
        if status != 200:
            raise RowError(field, "image_url_failed", f"{shown(current)} answered with status {status}")
        if len(body) > self.max_bytes:
            raise RowError(field, "image_too_large", f"{shown(current)} has more than {self.max_bytes} bytes")
        return body

    def _check_url(self, url: str, field: str) -> None:
        try:
            parts = urlsplit(url)
            usable = parts.scheme in self.schemes and parts.hostname and parts.username is None and parts.port != 0
            url.encode("ascii")
        except ValueError:
            usable = False
        if not usable:
            reason = f"{shown(url)} is no plain {' or '.join(self.schemes)} URL"
            raise RowError(field, "image_url_refused", reason)
        host = (urlsplit(url).hostname or "").rstrip(".")
        if self.domains and not any(host == domain or host.endswith(f".{domain}") for domain in self.domains):
            reason = f"{shown(host)} is none of the hosts that images are fetched from: {', '.join(self.domains)}"
            raise RowError(field, "image_url_refused", reason)

    def _get(self, url: str, deadline: float) -> tuple[int, str, bytes]:
        """(status, location, body up to one byte more than allowed)"""
        backend = CheckedBackend(self.allowed, deadline)
        timeout = dict.fromkeys(("connect", "read", "write", "pool"), self.timeout_seconds)
        with (
            httpcore.ConnectionPool(network_backend=backend, ssl_context=ssl.create_default_context()) as pool,
            pool.stream("GET", url, extensions={"timeout": timeout}) as response,
        ):
            headers = {name.lower(): value for name, value in response.headers}
            location = headers.get(b"location", b"").decode("latin-1")
            body = bytearray()
            if response.status == 200:
                for chunk in response.iter_stream():
                    body += chunk
                    if len(body) > self.max_bytes:
                        break
            return response.status, location, bytes(body)


class CheckedBackend(httpcore.NetworkBackend):
    """Dials only addresses that were checked, and nothing beyond the deadline."""

    def __init__(self, allowed: Callable[[str], bool], deadline: float) -> None:
        self._allowed = allowed
        self._deadline = deadline
        self._sync = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise httpcore.ConnectError(f"the name {host} cannot be resolved: {error}") from None
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        for address in addresses:
            if not self._allowed(address):
                raise RefusedError(address)
        stream = self._sync.connect_tcp(addresses[0], port, _left(self._deadline), None, socket_options)
        return _Timed(stream, self._deadline)


class _Timed(httpcore.NetworkStream):
    """A stream whose every operation ends by the deadline, however slowly the other side drips."""

    def __init__(self, stream: httpcore.NetworkStream, deadline: float) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _left(self._deadline))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _left(self._deadline))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        secured = self._stream.start_tls(ssl_context, server_hostname, _left(self._deadline))
        return _Timed(secured, self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise httpcore.ReadTimeout("the time for this request is over")
    return left
