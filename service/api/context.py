"""What surrounds every request: its id, its log line, the size limit of its body, and the answer when we crash.

Pure ASGI. Knows no resource and no database. The log never holds headers, bodies or query strings.
"""

from __future__ import annotations

import re
import time
import uuid
from importlib.metadata import version
from urllib.parse import unquote_to_bytes

import anyio
import structlog
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.errors import render, unexpected
from service.errors import InvalidRequestError, ServiceError

log = structlog.get_logger("service.api")

VERSION = version("vlm-dft")
_VERSION_HEADER = (b"x-vlm-dft-version", VERSION.encode())
_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
QUIET_PATHS = frozenset({"/healthz", "/readyz", "/metrics"})
MAX_TARGET_BYTES = 8 * 2**10
"""Path and query string together."""
MAX_HEADERS = 100
MAX_HEADERS_BYTES = 32 * 2**10
"""Names and values; uvicorn itself cuts off at 64 KiB, without our words."""
_DRAIN_BYTES = 16 * 2**20
_DRAIN_SECONDS = 5.0


class LimitedBody:
    """A request's receive channel that counts bytes and refuses more than its limit."""

    def __init__(self, receive: Receive, content_length: int | None, max_bytes: int) -> None:
        self._receive = receive
        self.content_length = content_length
        self._max_bytes = max_bytes
        self._received = 0
        self.finished = content_length == 0

    def allow(self, max_bytes: int) -> None:
        """Raise the limit, for a route that streams its body to disk."""
        self._max_bytes = max_bytes

    async def __call__(self) -> Message:
        if self.content_length is not None and self.content_length > self._max_bytes:
            raise self._too_large()
        message = await self._receive()
        if message["type"] == "http.request":
            self._received += len(message.get("body", b""))
            self.finished = not message.get("more_body", False)
            if self._received > self._max_bytes:
                raise self._too_large()
        else:
            self.finished = True
        return message

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"the request body is larger than the {self._max_bytes} bytes taken here")

    async def drain(self) -> None:
        """Read on for a while before an early answer: closing on unread data would reset the client's connection."""
        drained = 0
        with anyio.move_on_after(_DRAIN_SECONDS):
            while not self.finished and drained < _DRAIN_BYTES:
                message = await self._receive()
                drained += len(message.get("body", b""))
                self.finished = message["type"] != "http.request" or not message.get("more_body", False)


class _TargetTooLongError(ServiceError):
    """The URL is too long: send what is long as a body."""

    status = 414
    code = "url_too_long"
    type = "invalid_request_error"


class _HeadersTooLargeError(ServiceError):
    """The request's headers are too many or too large."""

    status = 431
    code = "headers_too_large"
    type = "invalid_request_error"


class RequestContext:
    """Outermost middleware: x-request-id and version on every response, one log line, 500 in the error shape."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        body = LimitedBody(receive, _content_length(headers), self.max_body_bytes)
        state = scope.setdefault("state", {})
        state.update(request_id=request_id, body=body)
        started_at = time.perf_counter()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                if not body.finished:
                    await body.drain()
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                    _VERSION_HEADER,
                    *state.get("headers", ()),
                ]
            await send(message)

        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id)
        try:
            if (refusal := _refusal(scope)) is not None:
                await render(refusal)(scope, body, send_with_id)
            else:
                await self.app(scope, body, send_with_id)
        except ClientDisconnect:
            log.info("the client left before its request had arrived")
        except Exception as error:
            # The last resort, not a swallow: the traceback is logged, and the client gets the request id of the line.
            log.exception("request failed")
            if status:
                raise
            await render(unexpected(error))(scope, body, send_with_id)
        finally:
            self._log(scope, status, time.perf_counter() - started_at)

    def _log(self, scope: Scope, status: int, seconds: float) -> None:
        write = log.debug if scope["path"] in QUIET_PATHS else log.info
        write(
            "request",
            method=scope["method"],
            path=scope["path"],
            status=status,
            milliseconds=round(seconds * 1000, 1),
            project=scope["state"].get("project"),
        )


def _content_length(headers: Headers) -> int | None:
    """The declared length; 0 when the request has no body at all."""
    if "content-length" not in headers:
        return None if "transfer-encoding" in headers else 0
    value = headers["content-length"]
    return int(value) if value.isdecimal() else None


def _refusal(scope: Scope) -> ServiceError | None:
    """What no route should have to look at."""
    query = scope.get("query_string", b"")
    target_bytes = len(scope.get("raw_path") or b"") + len(query)
    if target_bytes > MAX_TARGET_BYTES:
        return _TargetTooLongError(f"the URL has {target_bytes} bytes; at most {MAX_TARGET_BYTES} are taken")
    headers = scope["headers"]
    header_bytes = sum(len(name) + len(value) for name, value in headers)
    if len(headers) > MAX_HEADERS or header_bytes > MAX_HEADERS_BYTES:
        return _HeadersTooLargeError(
            f"the request has {len(headers)} headers of {header_bytes} bytes; at most {MAX_HEADERS} of together "
            f"{MAX_HEADERS_BYTES} bytes are taken"
        )
    # No id, name or path holds a NUL, and PostgreSQL refuses it anywhere.
    if "\0" in scope["path"] or (b"%00" in query and b"\0" in unquote_to_bytes(query)):
        return InvalidRequestError("the URL holds a NUL character")
    return None
