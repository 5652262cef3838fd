"""Who is calling: a bearer key's project, for every path under /v1, served or not. Pure ASGI, before any body is read.

Without a key only where nobody else can reach us: settings bind to loopback, no key was ever set or created, and the
request itself came over loopback, from no other website. Anything else is 401 or 403.
"""

from __future__ import annotations

from ipaddress import ip_address
from urllib.parse import urlsplit

import anyio.to_thread
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.errors import render
from service.errors import AuthenticationError, PermissionDeniedError, ServiceError
from service.jobs import keys
from service.jobs.database import Database
from service.settings import Settings

DEFAULT_PROJECT = "default"
_GUARDED = "/v1"


class Authentication:
    """Puts the caller's project into the request's state, or answers 401 or 403."""

    def __init__(self, app: ASGIApp, *, settings: Settings, database: Database, secret: bytes) -> None:
        self.app = app
        self.settings = settings
        self.database = database
        self.secret = secret

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] != "http" or not (path == _GUARDED or path.startswith(f"{_GUARDED}/")):
            await self.app(scope, receive, send)
            return
        try:
            project = await anyio.to_thread.run_sync(self._project, scope)
        except ServiceError as error:
            await render(error)(scope, receive, send)
            return
        scope["state"]["project"] = project
        await self.app(scope, receive, send)

    def _project(self, scope: Scope) -> str:
        headers = Headers(scope=scope)
        scheme, _, given = headers.get("authorization", "").partition(" ")
        given = given.strip() if scheme.lower() == "bearer" else ""
        own_key = self.settings.api_key
        if own_key is not None and given and keys.is_same_key(given, own_key.get_secret_value()):
            return DEFAULT_PROJECT
        with self.database.read() as s:
            if own_key is None and self.settings.is_loopback and not keys.any_key(s):
                _need_loopback(scope, headers)
                return DEFAULT_PROJECT
            if not given:
                raise AuthenticationError("no API key was given: send the header Authorization: Bearer <key>")
            key = keys.verify_key(s, self.secret, given)
            touch = keys.needs_touch(s, key)
        if touch:
            with self.database.write() as s:
                keys.touch_key(s, key.id)
        return key.project


def _need_loopback(scope: Scope, headers: Headers) -> None:
    """Without keys, a website open in the user's browser must not reach us, nor anybody over a public address."""
    server = scope.get("server")
    origin = headers.get("origin")
    hosts = [urlsplit(f"//{headers.get('host', '')}").hostname]
    hosts += [server[0]] if server and server[1] is not None else []  # a unix socket has no port
    hosts += [urlsplit(origin).hostname] if origin is not None else []
    for host in hosts:
        if not _is_loopback(host):
            raise PermissionDeniedError(
                f"without an API key only this machine may call, not {host or 'an unnamed origin'}: "
                "set VLM_DFT_API_KEY or create a key with `vlm-dft keys create`"
            )


def _is_loopback(host: str | None) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host or "").is_loopback
    except ValueError:
        return False
