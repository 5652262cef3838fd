"""Structured logs of the API: one JSON object per line on stderr, with the request's id, without secrets."""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog

from service.redaction import redact_event


def _to_stderr(*_: Any) -> structlog.WriteLogger:
    """Whatever stderr is at the time of writing."""
    return structlog.WriteLogger(sys.stderr)


def configure_logs() -> None:
    """Set structlog up for this process."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            redact_event,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=_to_stderr,
        cache_logger_on_first_use=False,
    )
