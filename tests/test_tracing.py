"""One request can be followed: its id and its trace go from the API through the job's row to worker and trainer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from databases import copied_sqlite
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

TRACE = "0af7651916cd43dd8448eb211c80319c"
SCRIPT = """
import json, sys
from pathlib import Path
from api_server import JSONL, serve
from service import tracing
from service.jobs.phases import Queue
from service.jobs.tables import Attempt
from service import logs
from worker import app
from worker.supervise import StopFlag

directory, url, trace = sys.argv[1:]
headers = {"x-request-id": "my-request", "traceparent": f"00-{trace}-b7ad6b7169203331-01"}
with serve(Path(directory), url, models_dir=Path(directory) / "none") as api:
    client = api.http()
    form = {"files": {"file": ("t.jsonl", JSONL)}, "data": {"purpose": "fine-tune"}}
    answer = client.post("/v1/files", **form, headers=headers)
    assert answer.status_code == 200, answer.text
    client.get("/healthz", headers=headers)
    logs.configure()
    assert app.run_next(api.database, api.settings, Queue.CPU, StopFlag())
    with api.database.read() as s:
        (attempt,) = s.query(Attempt).all()
    print(json.dumps({"job": attempt.job_id, "run": attempt.run_path, "exit": attempt.exit_reason}))
tracing.flush()
"""


@pytest.fixture
def collector() -> Iterator[tuple[str, list[tuple[str, Span]]]]:
    """A real OTLP/HTTP receiver: its URL, and (service, span) of everything that was exported to it."""
    spans: list[tuple[str, Span]] = []

    class Collecting(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
            for resource in request.resource_spans:
                names = {one.key: one.value.string_value for one in resource.resource.attributes}
                spans.extend((names["service.name"], span) for scope in resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Collecting)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", spans
    server.shutdown()
    server.server_close()
    thread.join(5)


@pytest.fixture
def sqlite_url(_sqlite_template: Path, tmp_path: Path) -> str:
    return copied_sqlite(_sqlite_template, tmp_path / "one.db")


def test_an_upload_is_followed_from_the_request_to_the_trainers_log(
    tmp_path: Path, sqlite_url: str, collector: tuple[str, list[tuple[str, Span]]]
) -> None:
    url, spans = collector
    arguments = [str(tmp_path), sqlite_url, TRACE]
    here = Path(__file__).parent
    environment = os.environ | {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "PYTHONPATH": f"{here}:{here.parent}"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["exit"] == "succeeded"

    by_name = {span.name: span for _, span in spans}
    assert set(by_name) == {"POST /v1/files", "vlm_dft.attempt"}, "health checks are not traced"
    request, attempt = by_name["POST /v1/files"], by_name["vlm_dft.attempt"]
    assert {span.trace_id.hex() for span in by_name.values()} == {TRACE}
    assert attempt.parent_span_id == request.span_id
    values = {one.key: one.value for one in attempt.attributes}
    assert values["vlm_dft.job_id"].string_value == found["job"]
    assert values["vlm_dft.outcome"].string_value == "succeeded"

    lines = (Path(found["run"]) / "log.txt").read_text().splitlines()
    ids = f"[job={found['job']} attempt=1 request=my-request]"
    assert lines
    assert all(ids in line for line in lines), lines
    logged = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    ended = next(line for line in logged if line["event"] == "attempt ended")
    assert (ended["job_id"], ended["attempt"], ended["request_id"]) == (found["job"], 1, "my-request")
    assert next(line for line in logged if line["event"] == "request" and line["method"] == "POST")["request_id"] == (
        "my-request"
    )


def test_an_endpoint_without_the_sdk_is_a_clear_error() -> None:
    code = """
import sys
sys.modules["opentelemetry.sdk.trace"] = None
from service import tracing
try:
    tracing.configure("api")
except tracing.TracingError as error:
    print(error.message)
"""
    environment = os.environ | {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert "install vlm-dft[otel]" in done.stdout, done.stderr
