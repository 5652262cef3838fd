"""A judge for tests: a real HTTP server with OpenAI's chat completions, whose verdicts follow from what it is asked.

extract answers the last number of the response, choose the option whose text the response names as "pick-LETTER",
compare whether two numbers are equal. ``plan`` says what goes wrong before that, one entry per request.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-secret-of-the-judge"


@dataclass
class StubJudge:
    """What it was asked, and what it is to do."""

    url: str = ""
    plan: list[int | str] = field(default_factory=list)
    """Next replies: a status code, or a text in the place of the verdict; used up one by one."""
    always: int | str | None = None
    """The same for every request after the plan."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def next_trouble(self) -> int | str | None:
        with self.lock:
            return self.plan.pop(0) if self.plan else self.always

    def tasks(self) -> list[str]:
        """The user's text of every request but the preflight's."""
        texts = [request["messages"][1]["content"] for request in self.requests]
        return [text for text in texts if "What is 1 + 1?" not in text]


def verdict(user: str) -> str:
    if compared := re.search(r"Reference answer: (.*)\nAnswer to compare: (.*)\n", user):
        first, second = (re.sub(r"[^\d.]", "", text).rstrip(".") for text in compared.groups())
        same = bool(first and second) and float(first) == float(second)
        return f"They differ or not.\nVERDICT: {'SAME' if same else 'DIFFERENT'}"
    response = re.search(r"<(response-\w+)>\n(.*)\n</\1>", user, re.DOTALL)
    assert response is not None
    if "letter of the option" in user:
        letters = re.findall(r"pick-([A-Z])", response[2])
        return f"**ANSWER:** ({letters[-1]})" if letters else "ANSWER: NONE"
    numbers = re.findall(r"\d+(?:\.\d+)?", response[2])
    return f"I read.\nANSWER: {numbers[-1] if numbers else 'NONE'}"


@contextmanager
def stub_judge() -> Iterator[StubJudge]:
    """A running judge that takes no request without KEY."""
    judge = StubJudge()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            key = self.headers.get("authorization", "").removeprefix("Bearer ")
            with judge.lock:
                judge.requests.append(body)
                judge.keys.add(key)
            trouble = judge.next_trouble()
            if key != KEY:
                return self._answer(401, {"error": {"message": f"Incorrect API key provided: {key}"}})
            if isinstance(trouble, int):
                return self._answer(trouble, {"error": {"message": "trouble"}})
            text = trouble if trouble is not None else verdict(body["messages"][1]["content"])
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            self._answer(200, {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]})
            return None

        def _answer(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    judge.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield judge
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
