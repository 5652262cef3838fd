"""API keys: vdft_<32 random letters and digits>_<checksum>. Only an HMAC of a key is stored.

A key belongs to a project, has scopes (``tenancy.Scope``), and may expire. A rotated key stays good for an overlap.

The checksum lets a mistyped key, or a secret scanner, be answered without the database. A fast HMAC is enough for
keys of 165 random bits; slow password hashes guard what people choose.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from sqlalchemy import exists, or_, select, update
from sqlalchemy.orm import Session

from service.errors import AuthenticationError, InvalidStateError, NotFoundError
from service.jobs.database import clock, now
from service.jobs.ids import new_id, random_text
from service.jobs.tenancy import DEFAULT_SCOPES, ensure_project
from service.jobs.tenancy_tables import ApiKey, Project
from service.settings import Settings

PREFIX: Final = "vdft_"
TOUCH_SECONDS: Final = 60.0
"""last_used_at is at most this old: not every request is worth a write."""


def load_secret(settings: Settings) -> bytes:
    """The HMAC's key: from the settings, else from <data>/secret, which is made (0600) by whoever comes first."""
    if settings.secret is not None:
        return settings.secret.get_secret_value().encode()
    path = settings.data / "secret"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _create_private(path, secrets.token_hex(32))
    return path.read_text().strip().encode()


def _create_private(path: Path, text: str) -> None:
    """Write the file whole or not at all; the first of several processes wins."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{random_text(8)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
    finally:
        temporary.unlink()


def create_key(
    s: Session,
    secret: bytes,
    project: str,
    name: str,
    *,
    scopes: Iterable[str] = DEFAULT_SCOPES,
    expires_at: float | None = None,
    requests_per_minute: int | None = None,
    rotated_from: str | None = None,
) -> tuple[ApiKey, str]:
    """The stored key, and its text, which is shown once and never again. Its project is made when it is absent."""
    ensure_project(s, project)
    body = random_text(32)
    text = f"{PREFIX}{body}_{_checksum(body)}"
    key = ApiKey(
        id=new_id("key_"),
        project=project,
        name=name,
        prefix=text[: len(PREFIX) + 4],
        digest=_digest(secret, text),
        created_at=now(s),
        scopes=sorted(set(scopes)),
        expires_at=expires_at,
        requests_per_minute=requests_per_minute,
        rotated_from=rotated_from,
    )
    s.add(key)
    s.flush()
    return key, text


def rotate_key(s: Session, secret: bytes, key_id: str, *, overlap_seconds: float) -> tuple[ApiKey, str]:
    """A new key for the same use and lifetime; the old one ends after the overlap, or sooner by its own expiry.

    Raises NotFoundError, and InvalidStateError for a key that is not in force.
    """
    old = get_key(s, key_id, lock=True)
    time = now(s)
    if old.revoked_at is not None or (old.expires_at is not None and old.expires_at <= time):
        raise InvalidStateError(f"{key_id} was revoked or has expired: create a new key instead", param="key_id")
    lifetime = None if old.expires_at is None else old.expires_at - old.created_at
    new, text = create_key(
        s,
        secret,
        old.project,
        old.name,
        scopes=old.scopes,
        expires_at=None if lifetime is None else time + lifetime,
        requests_per_minute=old.requests_per_minute,
        rotated_from=old.id,
    )
    end = time + overlap_seconds
    old.expires_at = end if old.expires_at is None else min(end, old.expires_at)
    s.flush()
    return new, text


def get_key(s: Session, key_id: str, *, project: str | None = None, lock: bool = False) -> ApiKey:
    """A key of one project, or of any. Raises NotFoundError."""
    statement = select(ApiKey).where(ApiKey.id == key_id)
    if project is not None:
        statement = statement.where(ApiKey.project == project)
    key = s.scalars(statement.with_for_update() if lock else statement).one_or_none()
    if key is None:
        raise NotFoundError(f"there is no API key {key_id!r}", param="key_id", code="key_not_found")
    return key


def verify_key(s: Session, secret: bytes, text: str) -> ApiKey:
    """The key that a request came with; its project is the request's. Reads only, see ``touch_key``.

    Raises AuthenticationError when the key is malformed, unknown, revoked or expired, or its project is archived.
    """
    body, _, checksum = text.removeprefix(PREFIX).partition("_")
    if text.startswith(PREFIX) and hmac.compare_digest(checksum.encode(), _checksum(body).encode()):
        digest = _digest(secret, text)
        archived = exists().where(Project.id == ApiKey.project, Project.archived_at.is_not(None))
        found = select(ApiKey).where(ApiKey.digest == digest, _in_force, ~archived)
        key = s.scalars(found).one_or_none()
        # Compared again in constant time: the index lookup above is not.
        if key is not None and hmac.compare_digest(key.digest, digest):
            return key
    raise AuthenticationError(
        "the API key is unknown, was revoked or has expired: create one with `vlm-dft keys create`"
    )


_in_force = ApiKey.revoked_at.is_(None) & or_(ApiKey.expires_at.is_(None), ApiKey.expires_at > clock())


def is_same_key(given: str, expected: str) -> bool:
    """Compare a request's key with settings.api_key in constant time."""
    return hmac.compare_digest(given.encode(), expected.encode())


def needs_touch(s: Session, key: ApiKey) -> bool:
    """Whether last_used_at is old enough to be worth a write."""
    return key.last_used_at is None or now(s) - key.last_used_at > TOUCH_SECONDS


def touch_key(s: Session, key_id: str) -> None:
    """Write that the key was used now."""
    statement = update(ApiKey).where(ApiKey.id == key_id).values(last_used_at=clock())
    s.execute(statement, execution_options={"synchronize_session": False})


def revoke_key(s: Session, project: str | None, key_id: str) -> ApiKey:
    """Make the key useless. Raises NotFoundError; repeatable."""
    key = get_key(s, key_id, project=project)
    if key.revoked_at is None:
        key.revoked_at = now(s)
        s.flush()
    return key


def list_keys(s: Session, project: str | None = None) -> list[ApiKey]:
    """Keys of one project, or of all; revoked ones too."""
    statement = select(ApiKey).order_by(ApiKey.created_at, ApiKey.id)
    return list(s.scalars(statement if project is None else statement.where(ApiKey.project == project)))


def any_key(s: Session) -> bool:
    """Whether a key in force exists; then even a loopback server asks for one."""
    return bool(s.scalar(select(exists().where(_in_force))))


def _digest(secret: bytes, text: str) -> str:
    return hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()


def _checksum(body: str) -> str:
    return f"{zlib.crc32(body.encode()):08x}"
