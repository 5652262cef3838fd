"""Errors as OpenAI's clients read them: one shape, 400 instead of 422, and an explicit word on retrying.

The rules are in ``service.errors`` and ``vlm_dft.errors``; this file only renders them. It knows no resource.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, ValidationError
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from starlette.exceptions import HTTPException

from service.api.openapi import allowed_methods
from service.errors import (
    InvalidRequestError,
    NotFoundError,
    QuotaExceededError,
    ServiceError,
    StorageFullError,
    TooLargeError,
    UnavailableError,
)
from service.redaction import redacted
from vlm_dft.errors import DiskFullError, VlmDftError

Model = TypeVar("Model", bound=BaseModel)

_MAX_SHOWN_CHARACTERS = 80
_ABSENT: Any = object()


class ErrorObject(BaseModel):
    """What went wrong, with which value, and what to do."""

    message: str
    type: str
    param: str | None
    code: str | None

    model_config = ConfigDict(extra="allow")


class DetailedRequestError(InvalidRequestError):
    """A refused request with more to say than a sentence, such as the rows at fault; the keys join OpenAI's four."""

    def __init__(self, message: str, *, param: str, code: str, details: dict[str, Any]) -> None:
        super().__init__(message, param=param, code=code)
        self.details = details


class ErrorBody(BaseModel):
    """The body of every answer that is not 2xx."""

    error: ErrorObject


def error_response(
    status: int,
    error: ErrorObject,
    *,
    should_retry: bool = False,
    retry_after_seconds: float | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """The answer to a failed request; 429 and 503 always say when to come back."""
    merged = {**(headers or {}), "x-should-retry": "true" if should_retry else "false"}
    if status in (429, 503) or retry_after_seconds is not None:
        merged["retry-after"] = str(max(1, round(retry_after_seconds if retry_after_seconds is not None else 5)))
    shown = error.model_copy(update={"message": redacted(error.message)})
    return JSONResponse(ErrorBody(error=shown).model_dump(), status_code=status, headers=merged)


def render(error: ServiceError) -> JSONResponse:
    """The answer of a ServiceError."""
    details = error.details if isinstance(error, DetailedRequestError | QuotaExceededError) else {}
    body = ErrorObject(message=error.message, type=error.type, param=error.param, code=error.code, **details)
    headers = {"www-authenticate": "Bearer"} if error.status == 401 else None
    return error_response(
        error.status,
        body,
        should_retry=error.should_retry,
        retry_after_seconds=error.retry_after_seconds,
        headers=headers,
    )


def render_library_error(error: VlmDftError) -> JSONResponse:
    """The answer of an error of the training library met while a request was checked."""
    if isinstance(error, DiskFullError):
        return render(StorageFullError(error.message))
    status, kind = (400, "invalid_request_error") if error.category == "user" else (500, "server_error")
    hint = {"hint": error.hint} if error.hint else {}
    body = ErrorObject(message=error.message, type=kind, param=error.param, code=error.code, **hint)
    return error_response(status, body)


def unexpected(error: Exception) -> ServiceError:
    """What to answer for an exception that nothing else knew: a database that is away or a full disk, else our bug."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or (isinstance(error, OperationalError) and "disk is full" in str(error.orig)):
        return StorageFullError()
    if isinstance(error, OperationalError | PoolTimeoutError):
        return UnavailableError("the database cannot be reached or is overloaded: try again shortly")
    return ServiceError()


def invalid_request(errors: Sequence[Mapping[str, Any]], body: Any) -> InvalidRequestError:
    """The first problem that pydantic found, as one sentence with a dotted param."""
    first = errors[0]
    location, kind, context = first["loc"], first["type"], first.get("ctx") or {}
    if kind == "json_invalid":
        where = location[-1] if isinstance(location[-1], int) else 0
        return InvalidRequestError(f"the body is not valid JSON: {context.get('error')} at character {where}")
    if tuple(location) == ("body",) and kind not in ("value_error", "unknown_key"):
        return InvalidRequestError("a JSON object is needed as body, with content-type application/json")
    param = dotted(location, kind, body)
    if kind == "unknown_key":
        param = ".".join(part for part in (param, context["key"]) if part)
    if kind == "missing":
        return InvalidRequestError(f"{param} is required", param=param)
    if kind == "extra_forbidden":
        reason = "this key is not known here"
    elif kind == "value_error":
        reason = str(context.get("error", first["msg"]))
    else:
        reason = first["msg"][0].lower() + first["msg"][1:] + _shown(first.get("input"), kind)
    return InvalidRequestError(f"{param}: {reason}" if param else reason, param=param or None)


def validated(model: type[Model], values: Any) -> Model:
    """An instance of the model. Raises InvalidRequestError as FastAPI's own validation would be answered."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        errors = [{**problem, "loc": ("body", *problem["loc"])} for problem in error.errors(include_url=False)]
        raise invalid_request(errors, values) from None


def dotted(location: Sequence[str | int], kind: str, body: Any) -> str:
    """Dotted path of a problem inside the request, without pydantic's names for the branches of a union."""
    if location[0] != "body":
        return ".".join(str(part) for part in location[1:])
    kept: list[str] = []
    value: Any = body
    for index, part in enumerate(location[1:], start=2):
        inner = _inside(value, part)
        if inner is not _ABSENT:
            value = inner
        elif not (kind == "missing" and index == len(location)):
            continue
        kept.append(str(part))
    return ".".join(kept)


def _inside(value: Any, part: str | int) -> Any:
    if isinstance(value, dict):
        return value.get(part, _ABSENT)
    if isinstance(value, list) and isinstance(part, int) and part < len(value):
        return value[part]
    return _ABSENT


def _shown(value: Any, kind: str) -> str:
    if kind == "unknown_key" or isinstance(value, dict | list):
        return ""
    text = repr(value)
    return f", got {text if len(text) <= _MAX_SHOWN_CHARACTERS else text[:_MAX_SHOWN_CHARACTERS] + '...'}"


def _render_http_exception(request: Request, error: HTTPException) -> JSONResponse:
    path = request.url.path
    if error.status_code == 404:
        message = f"unknown URL: {request.method} {path}; GET /openapi.json lists the paths that are served"
        return render(NotFoundError(message, code="unknown_url"))
    if error.status_code == 413:
        return render(TooLargeError(str(error.detail)))
    if error.status_code == 400:
        return render(InvalidRequestError("the body cannot be read: it is no JSON, or is nested too deeply"))
    message, headers = f"{error.detail}: {request.method} {path}", dict(error.headers or {})
    if error.status_code == 405:
        headers["allow"] = ", ".join(allowed_methods(request.app, path))
        message = f"{message}; this URL takes {headers['allow']}"
    code = str(error.detail).lower().replace(" ", "_")
    body = ErrorObject(message=message, type="invalid_request_error", param=None, code=code)
    return error_response(error.status_code, body, headers=headers)


def install_error_rendering(app: FastAPI) -> None:
    """Make every exception that a request can meet answer in the one shape; the rest is RequestContext's 500."""

    @app.exception_handler(ServiceError)
    async def service_error(request: Request, error: ServiceError) -> JSONResponse:
        return render(error)

    @app.exception_handler(VlmDftError)
    async def library_error(request: Request, error: VlmDftError) -> JSONResponse:
        return render_library_error(error)

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        return render(invalid_request(error.errors(), error.body))

    @app.exception_handler(HTTPException)
    async def http_exception(request: Request, error: HTTPException) -> JSONResponse:
        return _render_http_exception(request, error)
