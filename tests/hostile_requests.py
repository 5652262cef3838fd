"""Hostile requests, built by code: each with the status and the code of the error that it must end with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

JSON = {"content-type": "application/json"}
JOBS = "/v1/fine_tuning/jobs"
FORM = {"content-type": "multipart/form-data; boundary=b"}


@dataclass(frozen=True)
class Hostile:
    """One request."""

    name: str
    method: str
    path: str
    status: int
    code: str
    content: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    chunked: bool = False

    def body(self) -> Any:
        content = self.content
        if content is None or not self.chunked:
            return content

        def stream() -> Iterator[bytes]:
            for first in range(0, len(content), 2**16):
                yield content[first : first + 2**16]

        return stream()


def part(disposition: str, data: bytes = b"x") -> bytes:
    return f"--b\r\ncontent-disposition: form-data; {disposition}\r\n\r\n".encode() + data + b"\r\n"


def form(*parts: bytes, end: bytes = b"--b--\r\n") -> bytes:
    return b"".join(parts) + end


FILE = part('name="file"; filename="a"')
PURPOSE = part('name="purpose"', b"user_data")


def posted(name: str, body: bytes, code: str = "invalid_request", status: int = 400, **more: Any) -> Hostile:
    return Hostile(name, "POST", JOBS, status, code, body, JSON, **more)


def uploaded(name: str, body: bytes, code: str = "invalid_request", status: int = 400, **more: Any) -> Hostile:
    return Hostile(name, "POST", "/v1/files", status, code, body, **{"headers": FORM, **more})


def asked(name: str, path: str, code: str = "invalid_request", status: int = 400, **more: Any) -> Hostile:
    return Hostile(name, "GET", path, status, code, **more)


def registered(name: str, path: str) -> Hostile:
    body = json.dumps({"path": path}).encode()
    return Hostile(name, "POST", "/v1/files/register", 400, "invalid_request", body, JSON)


REQUESTS = [
    posted("arrays nested 100,000 deep", b"[" * 100_000),
    posted("objects nested 20,000 deep", b'{"metadata":' * 20_000 + b"1" + b"}" * 20_000),
    posted("objects nested 500 deep", b'{"method":' * 500 + b"1" + b"}" * 500),
    posted("a number of 10,000 digits", b'{"seed": 1' + b"0" * 10_000 + b"}"),
    posted("NaN", b'{"seed": NaN, "model": "tiny", "training_file": "f"}'),
    posted("half a surrogate", b'{"model": "\\ud800", "training_file": "f"}'),
    posted("bytes that are no text", b'{"model": "\xff\xfe"}'),
    posted("a NUL", b'{"model": "tiny", "training_file": "f", "metadata": {"a": "\\u0000"}}'),
    posted("100,000 keys", json.dumps({str(number): 1 for number in range(60_000)}).encode()),
    posted("a body of 2 MiB", b'{"model": "' + b"x" * 2**21 + b'"}', "request_too_large", 413),
    posted("2 MiB in chunks", b'{"model": "' + b"x" * 2**21 + b'"}', "request_too_large", 413, chunked=True),
    posted("a prototype", b'{"__proto__": {"admin": true}, "model": "tiny", "training_file": "f"}'),
    posted("another project", b'{"project": "other", "model": "tiny", "training_file": "f"}'),
    posted("remote code", b'{"trust_remote_code": true, "model": "tiny", "training_file": "f"}'),
    posted("a model by path", b'{"model": "/etc/passwd", "training_file": "f"}', "model_not_found"),
    posted("a model by a path with ..", b'{"model": "../../data", "training_file": "f"}', "model_not_found"),
    posted("an unlisted hub model", b'{"model": "evil/model", "training_file": "f"}', "model_not_found"),
    Hostile("a form as JSON", "POST", JOBS, 400, "invalid_request", form(FILE), FORM),
    uploaded("no boundary", form(FILE, PURPOSE), headers={"content-type": "multipart/form-data"}),
    uploaded("another boundary", form(FILE, PURPOSE), headers={"content-type": "multipart/form-data; boundary=c"}),
    uploaded("a form cut off", form(FILE, PURPOSE, end=b"")),
    uploaded("two files", form(FILE, FILE, PURPOSE)),
    uploaded("a file in another field", form(part('name="data"; filename="a"'), FILE, PURPOSE)),
    uploaded("no file", form(PURPOSE)),
    uploaded("a part without a name", form(part('filename="a"'), PURPOSE)),
    uploaded("40 fields", form(*[part(f'name="f{number}"') for number in range(40)], FILE)),
    uploaded("a field of 100 kB", form(part('name="purpose"', b"x" * 100_000), FILE)),
    uploaded("a field twice", form(PURPOSE, PURPOSE, FILE)),
    uploaded(
        "a filename that is no text",
        form(b'--b\r\ncontent-disposition: form-data; name="file"; filename="\xff\xfe"\r\n\r\nx\r\n', PURPOSE),
    ),
    uploaded("a part header of 100 kB", form(part(f'name="file"; filename="{"a" * 100_000}"'), PURPOSE)),
    uploaded("an unknown purpose", form(FILE, part('name="purpose"', b"assistants"))),
    uploaded(
        "9 MiB declared", form(part('name="file"; filename="a"', b"\0" * 9 * 2**20), PURPOSE), "request_too_large", 413
    ),
    uploaded(
        "9 MiB in chunks",
        form(part('name="file"; filename="a"', b"\0" * 9 * 2**20), PURPOSE),
        "request_too_large",
        413,
        chunked=True,
    ),
    registered("a registered path that leaves by ..", "../../etc"),
    registered("a registered absolute path", "/etc"),
    registered("a registered link that leaves", "link"),
    registered("a registered path with a NUL", "a\0b"),
    asked("a path with a NUL", "/v1/files/a%00b"),
    asked("a query with a NUL", "/v1/files?purpose=%00"),
    asked("a path that leaves by ..", "/v1/files/..%2f..%2fetc%2fpasswd", "unknown_url", 404),
    asked("an injected id", "/v1/files/x'%20OR%20'1'='1", "file_not_found", 404),
    asked("a limit of 20 digits", "/v1/files?limit=99999999999999999999"),
    asked("a URL of 10 kB", f"/v1/files?purpose={'x' * 10_000}", "url_too_long", 414),
    asked("a path of 9 kB", f"/v1/files/{'x' * 9_000}", "url_too_long", 414),
    asked("headers of 40 kB", "/v1/files", "headers_too_large", 431, headers={"x-a": "x" * 40_000}),
    asked("200 headers", "/v1/files", "headers_too_large", 431, headers={f"x-{n}": "x" for n in range(200)}),
    asked("a broken host", "/v1/files", "permission_denied", 403, headers={"host": "[::1"}),
    asked("another website", "/v1/files", "permission_denied", 403, headers={"origin": "https://evil.example"}),
    asked("a model id with ..", "/v1/models/..%2F..%2Fetc", "model_not_found", 404),
    asked("an event number of 30 digits", f"{JOBS}/ftjob-x/events?after_seq={'9' * 30}"),
    Hostile(
        "an idempotency key of 9,000 letters",
        "POST",
        JOBS,
        400,
        "invalid_request",
        b'{"model": "tiny", "training_file": "f"}',
        {**JSON, "idempotency-key": "k" * 9000},
    ),
    Hostile(
        "an upload of a petabyte",
        "POST",
        "/v1/uploads",
        413,
        "request_too_large",
        json.dumps({"bytes": 2**50, "filename": "a", "mime_type": "x", "purpose": "user_data"}).encode(),
        JSON,
    ),
]
