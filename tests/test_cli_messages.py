"""What the command line says is what the service said, brackets and all, and never a traceback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import openai
import pytest
import typer

from cli.client import EXIT_UNREACHABLE, get, readable_errors
from cli.comparison_table import print_comparison
from cli.watch import print_result

LOG = "[rank0]: ValueError in [/usr/lib/x.py]"
"""Read as rich's markup, the first bracket would vanish and the second raise."""


@contextmanager
def answering(status: int, body: str, kind: str = "application/json") -> Iterator[openai.OpenAI]:
    """A client of a server that answers everything so."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("content-type", kind)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        with openai.OpenAI(base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key="none", max_retries=0) as made:
            yield made
        server.shutdown()


def test_messages_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    print_result({"id": "ftjob-1", "status": "failed", "error": {"code": "trainer_crashed", "message": LOG}})
    error = {"message": LOG, "type": "invalid_request_error", "param": "a[/b]", "code": None}
    with answering(400, json.dumps({"error": error})) as client, pytest.raises(typer.Exit), readable_errors():
        get(client, "/models")
    told = capsys.readouterr().err
    assert told.count(LOG) == 2
    assert "param=a[/b]" in told


def test_another_service_is_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    with (
        answering(200, "<html>hello</html>", "text/html") as client,
        pytest.raises(typer.Exit) as left,
        readable_errors(),
    ):
        get(client, "/models")
    assert left.value.exit_code == EXIT_UNREACHABLE
    assert "is no vlm-dft service" in capsys.readouterr().err


def test_a_comparison_may_be_called_anything(capsys: pytest.CaptureFixture[str]) -> None:
    shown = {"id": "ftcmp-1", "name": LOG, "status": "queued", "differences": [], "terms": {}, "arms": []}
    print_comparison({**shown, "benchmarks": []}, [])
    assert LOG in capsys.readouterr().out
