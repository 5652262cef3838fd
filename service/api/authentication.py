"""Who is calling, and may they: for every path under /v1, served or not, and /metrics. Pure ASGI, before bodies.

Without a key only where nobody else can reach us: settings bind to loopback, no key was ever set or created, and the
request itself came over loopback, from no other website. Anything else is 401 or 403. What the database said of a key
holds for CACHE_SECONDS: a key revoked by another process is refused that much later.
"""

from __future__ import annotations

import hashlib
import time
from ipaddress import ip_address
from typing import Final
from urllib.parse import urlsplit

import anyio.to_thread
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.callers import OWN_KEY, THIS_MACHINE, Caller
from service.api.errors import render
from service.api.rates import Buckets
from service.errors import AuthenticationError, PermissionDeniedError, RateLimitedError, ServiceError
from service.jobs import keys, tenancy_audit
from service.jobs.database import Database
from service.jobs.tenancy import Scope as KeyScope
from service.settings import Settings

CACHE_SECONDS: Final = 1.0
_MAX_CACHED = 10_000
_GUARDED = ("/v1", "/metrics")
_ADMIN_PATHS = ("/v1/projects", "/v1/api_keys", "/v1/audit")
_READING = frozenset({"GET", "HEAD", "OPTIONS"})
_LOOKS = frozenset({"/v1/fine_tuning/preview", "/v1/fine_tuning/estimates"})
"""Paths whose POST makes nothing and shows nothing that a key for reading could not see."""


class Authentication:
    """Puts the caller and its project into the request's state, or answers 401, 403 or 429."""

    def __init__(self, app: ASGIApp, *, settings: Settings, database: Database, secret: bytes) -> None:
        self.app = app
        self.settings = settings
        self.database = database
        self.secret = secret
        self._callers: dict[bytes, tuple[Caller, float]] = {}
        """By the hash of what was given: who that is, and until when we believe it."""
        self._buckets = Buckets()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] != "http" or not any(path == one or path.startswith(f"{one}/") for one in _GUARDED):
            await self.app(scope, receive, send)
            return
        try:
            caller = await self._caller(Headers(scope=scope), scope)
            scope["state"].update(caller=caller, project=caller.project)
            self._count(caller, scope)
            _need_scope(caller, scope)
        except ServiceError as error:
            await render(error)(scope, receive, send)
            return
        if scope["method"] in _READING:
            await self.app(scope, receive, send)
            return

        async def send_and_end(message: Message) -> None:
            # What happens behind the answer, such as publishing wake-ups, is nobody's change.
            tenancy_audit.act(None)
            await send(message)

        tenancy_audit.act(_acting(caller, scope))
        await self.app(scope, receive, send_and_end)

    async def _caller(self, headers: Headers, scope: Scope) -> Caller:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        given = given.strip() if scheme.lower() == "bearer" else ""
        own_key = self.settings.api_key
        if own_key is not None and given and keys.is_same_key(given, own_key.get_secret_value()):
            return OWN_KEY
        digest = hashlib.sha256(given.encode()).digest()
        caller, until = self._callers.get(digest, (None, 0.0))
        if caller is None or time.monotonic() > until:
            caller = await anyio.to_thread.run_sync(self._look_up, given)
            if len(self._callers) >= _MAX_CACHED:
                self._callers.clear()
            # A key that is refused is not remembered, so guesses take no memory.
            self._callers[digest] = (caller, time.monotonic() + CACHE_SECONDS)
        if caller is THIS_MACHINE:
            _need_loopback(scope, headers)
        return caller

    def _look_up(self, given: str) -> Caller:
        with self.database.read() as s:
            if self.settings.api_key is None and self.settings.is_loopback and not keys.any_key(s):
                return THIS_MACHINE
            if not given:
                raise AuthenticationError("no API key was given: send the header Authorization: Bearer <key>")
            key = keys.verify_key(s, self.secret, given)
            touch = keys.needs_touch(s, key)
        if touch:
            with self.database.write() as s:
                keys.touch_key(s, key.id)
        return Caller(
            project=key.project,
            name=key.name,
            key_id=key.id,
            scopes=frozenset(key.scopes),
            requests_per_minute=key.requests_per_minute,
        )

    def _count(self, caller: Caller, scope: Scope) -> None:
        rate = self._buckets.take(caller.bucket, caller.requests_per_minute or self.settings.requests_per_minute)
        scope["state"]["headers"] = rate.headers()
        if rate.retry_after_seconds is not None:
            raise RateLimitedError(
                f"the key {caller.name!r} has made more than {rate.limit} requests in a minute: wait, or ask an "
                "administrator to raise its requests_per_minute",
                retry_after_seconds=min(60.0, rate.retry_after_seconds),
            )


def _need_scope(caller: Caller, scope: Scope) -> None:
    path, method = scope["path"], scope["method"]
    needed = KeyScope.READ if method in _READING or path in _LOOKS else KeyScope.WRITE
    if any(path == admin or path.startswith(f"{admin}/") for admin in _ADMIN_PATHS):
        needed = KeyScope.ADMIN
    if needed not in caller.scopes:
        has = ", ".join(sorted(caller.scopes)) or "none"
        raise PermissionDeniedError(
            f"{method} {path} needs the scope {needed.value!r}; the key {caller.name!r} has {has}: use another key",
            code="insufficient_scope",
        )


def _acting(caller: Caller, scope: Scope) -> tenancy_audit.Acting:
    def object_id() -> str | None:
        return next(iter(reversed(list((scope.get("path_params") or {}).values()))), None)

    return tenancy_audit.Acting(
        project=caller.project,
        actor=caller.name,
        api_key_id=caller.key_id,
        action=lambda: getattr(scope.get("route"), "name", scope["path"]),
        object_id=object_id,
        request_id=scope["state"].get("request_id"),
    )


def _need_loopback(scope: Scope, headers: Headers) -> None:
    """Without keys, a website open in the user's browser must not reach us, nor anybody over a public address."""
    server = scope.get("server")
    origin = headers.get("origin")
    hosts = [_hostname(f"//{headers.get('host', '')}")]
    hosts += [server[0]] if server and server[1] is not None else []  # a unix socket has no port
    hosts += [_hostname(origin)] if origin is not None else []
    for host in hosts:
        if not _is_loopback(host):
            raise PermissionDeniedError(
                f"without an API key only this machine may call, not {host or 'an unnamed origin'}: "
                "set VLM_DFT_API_KEY or create a key with `vlm-dft keys create`"
            )


def _hostname(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:  # such as an unclosed bracket
        return None


def _is_loopback(host: str | None) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host or "").is_loopback
    except ValueError:
        return False
