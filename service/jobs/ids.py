"""Identifiers: OpenAI's prefixes and 24 random characters. Lower case, so that they are safe as file names anywhere."""

from __future__ import annotations

import secrets
import string
from typing import Final

from service.jobs.phases import Kind

_ALPHABET: Final = string.digits + string.ascii_lowercase
JOB_PREFIX: Final = {
    Kind.FINE_TUNING: "ftjob-",
    Kind.EVALUATION: "eval-",
    Kind.FILE_VALIDATION: "val-",
    Kind.PREFLIGHT: "preflight-",
}


def random_text(length: int) -> str:
    """Unguessable letters and digits; 24 of them hold 124 bits."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))


def new_id(prefix: str) -> str:
    """Such as file-0c9..., upload_..., ftckpt_..."""
    return prefix + random_text(24)


def new_job_id(kind: Kind) -> str:
    return new_id(JOB_PREFIX[kind])


def short_id(job_id: str) -> str:
    """The end of a job's id, as used in model names."""
    return job_id[-8:]
