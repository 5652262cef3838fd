"""Every line of every process is one JSON object, names its request and trace, and holds no secret."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from service import logs


@pytest.fixture
def configured() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    logs.configure()
    yield
    root.handlers, root.level = handlers, level
    structlog.reset_defaults()


def lines(capfd: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capfd.readouterr().err.splitlines()]


@pytest.mark.usefixtures("configured")
def test_our_lines_and_those_of_libraries_come_out_alike(capfd: pytest.CaptureFixture[str]) -> None:
    with structlog.contextvars.bound_contextvars(request_id="req_1", job_id="ftjob-1", attempt=2):
        structlog.get_logger("worker.app").info("attempt ended", outcome="succeeded")
        logging.getLogger("uvicorn.error").warning("started on %d", 8000)
        try:
            raise ValueError("why")
        except ValueError:
            logging.getLogger("library").exception("it failed")
    ours, theirs, failed = lines(capfd)
    for line in (ours, theirs, failed):
        assert (line["request_id"], line["job_id"], line["attempt"]) == ("req_1", "ftjob-1", 2)
        assert line["timestamp"].endswith("Z")
    assert (ours["logger"], ours["level"], ours["outcome"]) == ("worker.app", "info", "succeeded")
    assert (theirs["logger"], theirs["level"], theirs["event"]) == ("uvicorn.error", "warning", "started on 8000")
    assert "ValueError: why" in failed["exception"]


@pytest.mark.usefixtures("configured")
def test_no_line_holds_a_secret(capfd: pytest.CaptureFixture[str]) -> None:
    structlog.get_logger("a").info("asked", authorization="Bearer hidden-1")
    logging.getLogger("b").warning("cannot reach postgresql+psycopg://user:hidden-2@db/jobs")
    assert "hidden" not in json.dumps(lines(capfd))


@pytest.mark.usefixtures("configured")
def test_a_line_within_a_span_names_its_trace(capfd: pytest.CaptureFixture[str]) -> None:
    from opentelemetry import trace

    number = 0x0AF7651916CD43DD8448EB211C80319C
    context = trace.SpanContext(number, 1, is_remote=True, trace_flags=trace.TraceFlags(1))
    with trace.use_span(trace.NonRecordingSpan(context)):
        structlog.get_logger("a").info("within")
    structlog.get_logger("a").info("without")
    within, without = lines(capfd)
    assert within["trace_id"] == "0af7651916cd43dd8448eb211c80319c"
    assert "trace_id" not in without


@pytest.mark.usefixtures("configured")
def test_configuring_twice_writes_each_line_once(capfd: pytest.CaptureFixture[str]) -> None:
    logs.configure()
    logging.getLogger("library").warning("once")
    assert len(lines(capfd)) == 1
