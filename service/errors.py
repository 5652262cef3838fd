"""Every error a request can meet, as a tree; the API renders each in OpenAI's shape. Knows no web framework.

    ServiceError                    500  internal_error
    ├── DamagedFileError            500  file_damaged             what a run wrote cannot be read any more
    ├── InvalidRequestError         400  invalid_request          a value that cannot be used
    │   ├── InvalidStateError       400  invalid_state            the object is not in a state that allows it
    │   ├── FileInUseError          400  file_in_use              a job that has not ended needs the file
    │   ├── FileNotReadyError       400  file_not_processed       the file is still being validated
    │   └── IdempotencyError        400  idempotency_key_reused   the same key with another body
    ├── AuthenticationError         401  invalid_api_key
    ├── PermissionDeniedError       403  permission_denied
    ├── NotFoundError               404  not_found                absent, or another project's
    ├── TooLargeError               413  request_too_large
    ├── QuotaExceededError          429  quota_exceeded           never retried by the client
    ├── RateLimitedError            429  rate_limit_exceeded      retried after retry_after_seconds
    ├── UnavailableError            503  unavailable              retried after retry_after_seconds
    └── StorageFullError            507  disk_full                never retried by the client

Rules: raise the most specific class; the message names the value, the place and the remedy; the docstring is the
default message; ``param`` is a dotted path into the request. 409 is not used: the stock client repeats it three times.
"""

from __future__ import annotations

from typing import Any, ClassVar


class ServiceError(Exception):
    """Something failed that has no better name: please report it with the request id."""

    status: ClassVar[int] = 500
    code: str = "internal_error"
    type: ClassVar[str] = "server_error"
    """OpenAI's error.type."""
    should_retry: ClassVar[bool] = False
    """Goes into x-should-retry, which the stock client obeys."""

    def __init__(
        self,
        message: str | None = None,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        self.message = message or (self.__doc__ or type(self).__name__).strip()
        self.param = param
        self.code = code or type(self).code
        self.retry_after_seconds = retry_after_seconds
        super().__init__(self.message)

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword arguments do not survive the default pickling of exceptions.
        return (_rebuild, (type(self), self.message, self.param, self.code, self.retry_after_seconds))


def _rebuild(
    cls: type[ServiceError], message: str, param: str | None, code: str, retry_after_seconds: float | None
) -> ServiceError:
    return cls(message, param=param, code=code, retry_after_seconds=retry_after_seconds)


class DamagedFileError(ServiceError):
    """A file that a run wrote cannot be read: restore it, or run the job again."""

    code = "file_damaged"


class InvalidRequestError(ServiceError):
    """The request cannot be used: see the message for the field and the values it takes."""

    status = 400
    code = "invalid_request"
    type = "invalid_request_error"


class InvalidStateError(InvalidRequestError):
    """The object is not in a state that allows this."""

    code = "invalid_state"


class FileInUseError(InvalidRequestError):
    """A job that has not ended needs the file: cancel it or wait for its end."""

    code = "file_in_use"


class FileNotReadyError(InvalidRequestError):
    """The file is not processed yet: wait for it (files.wait_for_processing) and submit again."""

    code = "file_not_processed"


class IdempotencyError(InvalidRequestError):
    """The Idempotency-Key was used with another body within the last 24 hours: use a new key for a new request."""

    code = "idempotency_key_reused"


class AuthenticationError(ServiceError):
    """The API key is missing or unknown: send Authorization: Bearer <key>."""

    status = 401
    code = "invalid_api_key"
    type = "authentication_error"


class PermissionDeniedError(ServiceError):
    """The API key does not allow this."""

    status = 403
    code = "permission_denied"
    type = "permission_error"


class NotFoundError(ServiceError):
    """There is no such object in this project."""

    status = 404
    code = "not_found"
    type = "invalid_request_error"


class TooLargeError(ServiceError):
    """The request body is larger than this server takes."""

    status = 413
    code = "request_too_large"
    type = "invalid_request_error"


class QuotaExceededError(ServiceError):
    """A quota of the project is used up."""

    status = 429
    code = "quota_exceeded"
    type = "insufficient_quota"

    def __init__(self, message: str | None = None, *, details: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__(message, **options)
        self.details = details or {}
        """quota, limit, used and requested: they join the error's own keys."""


class RateLimitedError(ServiceError):
    """Too many requests: slow down."""

    status = 429
    code = "rate_limit_exceeded"
    type = "rate_limit_error"
    should_retry = True


class UnavailableError(ServiceError):
    """The service cannot answer this now: try again shortly."""

    status = 503
    code = "unavailable"
    should_retry = True


class StorageFullError(ServiceError):
    """The server's disk is full: nothing was kept of this request; free space and try again."""

    status = 507
    code = "disk_full"
