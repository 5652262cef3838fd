"""What VLMEvalKit's judge sends, with the key that it never sees, within a budget, and remembered on disk.

Stands in for ``requests`` in VLMEvalKit's client: the key is in no environment variable, argument, log or status file.
A reply at temperature 0 is kept by a hash over address and request, so that a rerun pays only for what is new; asked
again by the same process, it is asked for anew, because VLMEvalKit asks again what it could not use. Torch-free.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from vlm_dft.frozen import Frozen
from vlm_dft.run_dir import disk_errors, write_json


class JudgeRules(Frozen):
    """judge.json."""

    max_requests: int
    cache: Path
    """Directory of remembered replies."""
    failure: Path
    """File that says that the budget is spent."""


class Reply(NamedTuple):
    """As much of a response as VLMEvalKit looks at."""

    status_code: int
    text: str


class JudgeRequests:
    """See the module's docstring. post: the real ``requests.post``."""

    def __init__(self, rules: JudgeRules, key: str | None, post: Callable[..., Any]) -> None:
        self._rules, self._key, self._post = rules, key, post
        self._lock = threading.Lock()
        self._asked: set[str] = set()
        self._num_requests = 0

    def post(self, url: str, *, headers: dict[str, str], data: str, **kwargs: Any) -> Any:
        """Raises RuntimeError when the budget is spent; VLMEvalKit takes any exception for a lost request."""
        path = self._path(url, data)
        if (remembered := self._remembered(path)) is not None:
            return Reply(200, remembered)
        self._count()
        response = self._post(
            url, headers={**headers, "Authorization": f"Bearer {self._key or 'none'}"}, data=data, **kwargs
        )
        if response.status_code == 200 and json.loads(data).get("temperature") == 0:
            with self._lock, disk_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, {"reply": response.text})
        return response

    def _path(self, url: str, data: str) -> Path:
        digest = hashlib.sha256(json.dumps([url, data]).encode()).hexdigest()
        return self._rules.cache / digest[:2] / f"{digest}.json"

    def _remembered(self, path: Path) -> str | None:
        with self._lock:
            if path.name in self._asked:
                return None
            self._asked.add(path.name)
        try:
            return json.loads(path.read_bytes())["reply"]
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # a damaged file is asked for again
            return None

    def _count(self) -> None:
        with self._lock:
            if self._num_requests < self._rules.max_requests:
                self._num_requests += 1
                return
            message = (
                f"the judge's budget of {self._rules.max_requests} requests is spent: raise judge.max_requests; what "
                "was judged is remembered, and predictions are kept"
            )
            param = "evaluation.judge.max_requests"
            write_json(self._rules.failure, {"class": "EvaluationError", "message": message, "param": param})
        raise RuntimeError(message)
