"""Which request a job came from, and OpenTelemetry traces when OTEL_EXPORTER_OTLP_ENDPOINT is set. Torch-free.

A request's id and trace context travel in the job's row, for the message that wakes a worker carries nothing. Without
an endpoint no span is recorded and the SDK is not needed (extra ``otel``). Spans hold ids and outcomes, never contents.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import structlog
from opentelemetry import propagate, trace

from vlm_dft.errors import VlmDftError

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_FLUSH_MILLISECONDS = 3000


class TracingError(VlmDftError):
    """Traces were asked for, but their packages are missing: install vlm-dft[otel], or unset the endpoint."""

    code = "tracing_unavailable"


def is_wanted() -> bool:
    """Whether the environment says where traces go."""
    return any(os.environ.get(name) for name in _ENDPOINTS)


@lru_cache(maxsize=1)
def configure(service: str) -> bool:
    """Send this process's spans where the environment says; returns whether it says so. After a fork, not before.

    Raises TracingError without the SDK.
    """
    if not is_wanted():
        return False
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise TracingError(f"{_ENDPOINTS[0]} is set, but {error.name} is missing: install vlm-dft[otel]") from None
    provider = TracerProvider(resource=Resource.create({"service.name": f"vlm-dft-{service}"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    return True


def flush() -> None:
    """Send what was recorded: before a process that may not come to its end in good order."""
    if force := getattr(trace.get_tracer_provider(), "force_flush", None):
        force(_FLUSH_MILLISECONDS)


def origin() -> dict[str, str]:
    """The current request's id and trace context, as far as there are any: what a job's row keeps."""
    found: dict[str, str] = {}
    propagate.inject(found)
    request_id = structlog.contextvars.get_contextvars().get("request_id")
    return {"request_id": request_id, **found} if request_id else found


@contextmanager
def attempt_span(origin: Mapping[str, str], **attributes: Any) -> Iterator[trace.Span]:
    """A span that continues the trace of the request that submitted the job."""
    context = propagate.extract(dict(origin))
    names = {f"vlm_dft.{key}": value for key, value in attributes.items()}
    with trace.get_tracer("vlm_dft").start_as_current_span(
        "vlm_dft.attempt", context=context, attributes=names
    ) as span:
        yield span
