"""Structured logs of every process of the service: one JSON object per line on stderr (readable on a terminal).

Lines of libraries come out in the same form: Celery's, uvicorn's, the database's. Request, job and attempt are bound
once, by whoever begins them; a line within a span names its trace. Secrets are blanked in all of them.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any, Final, TextIO

import structlog
from opentelemetry import trace
from structlog.types import Processor

from service.redaction import redact_event

_QUIET: Final = {
    # One line per wake-up and per redelivered duplicate says nothing that the job's own lines do not.
    "celery.worker.strategy": logging.WARNING,
    "celery.app.trace": logging.WARNING,
    "httpx": logging.WARNING,
    "aiobotocore": logging.WARNING,
    "botocore": logging.WARNING,
}


def _name_trace(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"] = trace.format_trace_id(context.trace_id)
    return event


def _name_logger(logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    record = event.get("_record")  # a library's line
    event["logger"] = logger.name if record is None else record.name
    return event


class _Logger(structlog.WriteLogger):
    """Straight to stderr: a request's line costs no more than it must."""

    def __init__(self, name: str = "service") -> None:
        super().__init__(sys.stderr)
        self.name = name


_SHARED: Final[list[Processor]] = [
    structlog.contextvars.merge_contextvars,
    structlog.processors.add_log_level,
    _name_logger,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    _name_trace,
    structlog.processors.format_exc_info,
    redact_event,
]


class _Stderr(logging.StreamHandler[TextIO]):
    """Writes to whatever stderr is at the time of writing."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # pyright: ignore[reportIncompatibleVariableOverride] - looked up anew for each line
        return sys.stderr


def configure(level: int = logging.INFO) -> None:
    """Set up structlog and the standard library's logging of this process; again is no harm."""
    renderer = structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[*_SHARED, renderer],
        logger_factory=_Logger,
        wrapper_class=structlog.make_filtering_bound_logger(level),
        cache_logger_on_first_use=False,
    )
    output = _Stderr()
    output.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=_SHARED,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    root = logging.getLogger()
    # Other handlers are whoever's put them there; ours, and those of a library's default configuration, are replaced.
    root.handlers = [handler for handler in root.handlers if type(handler) not in (_Stderr, logging.StreamHandler)]
    root.addHandler(output)
    root.setLevel(level)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        library = logging.getLogger(name)
        library.handlers, library.propagate = [], True
    for name, quiet in _QUIET.items():
        logging.getLogger(name).setLevel(quiet)
