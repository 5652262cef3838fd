"""Judges for tests: over HTTP as a hosted one, answering VLMEvalKit's requests by rule."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from vlm_dft.evaluation import mathverse
from vlm_dft.evaluation.answers import marked_answer, phrased_answer, without_reasoning
from vlm_dft.evaluation.items import Item
from vlm_dft.evaluation.latex import LatexProcess

KEY = "sk-the-judges-own-key"
_EXTRACT = re.compile(r".*\nModel (?:response: '(.*)'\nExtracted Answer: |respone: (.*)Extracted answer:)\Z", re.DOTALL)
_COMPARE = re.compile(r"(.*)\n\s+\[Standard Answer\]: (.*?)\n\s+\[Model_answer\] : (.*)\n\s+Judgement:\Z", re.DOTALL)
_CHOOSE = re.compile(r".*\nAnswer: (.*)\nYour output: \Z", re.DOTALL)


class RuleJudge:
    """Repeats MathVerse's responses and compares them by our rules; elsewhere finds what the native rules find."""

    def __init__(self, mathverse_items: Iterable[Item] = ()) -> None:
        self._items = {(item.asked, item.answer): item for item in mathverse_items}
        self._lock = threading.Lock()
        self._latex = LatexProcess()

    def close(self) -> None:
        self._latex.close()

    def answer(self, prompt: str) -> str:
        if compared := _COMPARE.match(prompt):
            item = self._items[compared[1].rpartition("[Question]: ")[2], compared[2]]
            with self._lock:
                return str(int(mathverse.grade(item, compared[3], self._latex).correct))
        if extracted := _EXTRACT.match(prompt):
            return (extracted[1] or "null") if extracted[1] is not None else self.extract(extracted[2])
        if chosen := _CHOOSE.match(prompt):
            return self.choose(chosen[1])
        return "ready"

    @staticmethod
    def extract(response: str) -> str:
        response = without_reasoning(response)
        marked = marked_answer(response)
        return (marked.text if marked else phrased_answer(response)) or response.strip() or "null"

    @staticmethod
    def choose(response: str) -> str:
        marked = marked_answer(without_reasoning(response))
        return marked.text if marked and len(marked.text) == 1 else "Z"


@contextmanager
def judge_server(answer: Callable[[str], str]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Base URL ending in /v1, and the requests so far: authorization and body."""
    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append({"authorization": self.headers["Authorization"], "body": body})
            content = body["messages"][-1]["content"]
            text = content if isinstance(content, str) else "".join(part["text"] for part in content)
            reply = json.dumps({"choices": [{"message": {"role": "assistant", "content": answer(text)}}]}).encode()
            self.send_response(200 if self.path == "/v1/chat/completions" else 404)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, format: str, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
