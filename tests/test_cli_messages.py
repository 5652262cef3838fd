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
from typer.testing import CliRunner

from cli.client import EXIT_UNREACHABLE, get, readable_errors
from cli.comparison_table import print_comparison
from cli.main import app
from cli.requests import evaluation_of
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


def test_settings_that_cannot_be_used_are_named_by_their_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLM_DFT_PORT", "abc")
    answer = CliRunner().invoke(app, ["up"])
    assert answer.exit_code == 2
    assert "VLM_DFT_PORT: Input should be a valid integer" in answer.stderr


def test_parts_of_a_request_are_made_of_what_is_typed() -> None:
    gate = ["regression.max_drop=0.05", "mathvision.min_value=0.3", "mathvision.min_gain=0"]
    assert evaluation_of("mathvision, regression", 5, regression="regression", gate=gate)["evaluation"] == {
        "benchmarks": [{"name": "mathvision", "limit": 5}, {"name": "regression", "limit": 5}],
        "include_base": True,
        "regression": ["regression"],
        "gate": [
            {"benchmark": "regression", "max_drop": 0.05},
            {"benchmark": "mathvision", "min_value": 0.3, "min_gain": 0},
        ],
    }
    with pytest.raises(typer.BadParameter, match="--limit says something of --benchmarks"):
        evaluation_of(None, 5)
    with pytest.raises(typer.BadParameter, match="--gate says something of --benchmarks"):
        evaluation_of(None, None, gate=["a.min_value=1"])
    with pytest.raises(typer.BadParameter, match=r"BENCHMARK\.RULE"):
        evaluation_of("a", None, gate=["min_value=1"])


def test_a_comparison_may_be_called_anything(capsys: pytest.CaptureFixture[str]) -> None:
    shown = {"id": "ftcmp-1", "name": LOG, "status": "queued", "differences": [], "terms": {}, "arms": []}
    print_comparison({**shown, "benchmarks": [], "sweep": []}, [])
    assert LOG in capsys.readouterr().out
