"""LaTeX answers compared by latex2sympy2-extended and math-verify, in a child process that cannot hang. Torch-free.

The grammar recurses and sympy computes whatever it is told to; a prediction can be anything. So the parsers run as
``python -m vlm_dft.evaluation.latex_child`` under limits that kill it, and it is started again when needed.
Knows nothing about benchmarks. Not covered: processor time below the limit, a few seconds per pair of answers.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from importlib.util import find_spec
from types import TracebackType
from typing import Any, NamedTuple, Self

from vlm_dft.errors import EvaluationError

MAX_CHARACTERS = 400
MAX_DEPTH = 24
"""Nesting of brackets; answers of benchmarks have one or two."""
MAX_RESPONSE_CHARACTERS = 16_000
"""Of a response that math-verify looks through, counted from its end."""
_READY = b"ready\n"
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)


class Comparison(NamedTuple):
    """What the parser made of two answers."""

    first: str | None
    """The expression as sympy prints it; None when it is not LaTeX mathematics."""
    second: str | None
    same: bool
    """Whether they are the same expression or have the same value; false where that was not asked."""


class Verification(NamedTuple):
    """What math-verify made of a response."""

    extracted: str | None
    """The answer it found, as sympy prints it; None when it found none."""
    correct: bool


NOT_COMPARED = Comparison(None, None, False)
NOT_VERIFIED = Verification(None, False)


class LatexProcess:
    """The child process; use it as a context manager. Threads wait for each other."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self.num_killed = 0
        """Pairs whose comparison ran into a limit; they count as different."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None

    def compare(self, first: str, second: str, *, symbolic: bool) -> Comparison:
        """Parse both; symbolic: compare them as expressions too. Raises EvaluationError when the parser is missing."""
        if not (plausible(first) and plausible(second)):
            return NOT_COMPARED
        answer = self._ask(["compare", first, second, symbolic])
        return NOT_COMPARED if answer is None else Comparison(*answer)

    def verify(self, reference: str, response: str) -> Verification:
        """math-verify's verdict. Raises EvaluationError when it is missing."""
        if find_spec("math_verify") is None:
            raise EvaluationError("text mathematics needs math-verify: pip install 'vlm-dft[eval]'")
        answer = self._ask(["verify", reference, response[-MAX_RESPONSE_CHARACTERS:]])
        return NOT_VERIFIED if answer is None else Verification(*answer)

    def _ask(self, request: list[Any]) -> list[Any] | None:
        """The child's answer; None when a limit ended it."""
        with self._lock:
            return self._ask_child(request)

    def _ask_child(self, request: list[Any]) -> list[Any] | None:
        child = self.start()
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(json.dumps(request).encode() + b"\n")
            child.stdin.flush()
            answer = child.stdout.readline()
        except BrokenPipeError:
            answer = b""
        if not answer.endswith(b"\n"):  # a timer or the memory limit ended it
            self.num_killed += 1
            self.close()
            return None
        return json.loads(answer)

    def start(self) -> subprocess.Popen[bytes]:
        """The running child, started if need be. Raises EvaluationError when it cannot run at all."""
        if self._child is None:
            if find_spec("latex2sympy2_extended") is None:
                raise EvaluationError(
                    "scoring needs latex2sympy2-extended, which is not installed: pip install 'vlm-dft[eval]'"
                )
            self._child = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "vlm_dft.evaluation.latex_child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={name: value for name, value in os.environ.items() if not _SECRET.search(name)},
            )
            assert self._child.stdout is not None
            if self._child.stdout.readline() != _READY:
                self.close()
                raise EvaluationError(
                    "the LaTeX parser does not start: run `python -m vlm_dft.evaluation.latex_child` to see why"
                )
        return self._child


def plausible(text: str) -> bool:
    """Whether it is worth parsing: short and not deeply nested."""
    if len(text) > MAX_CHARACTERS:
        return False
    depth = 0
    for character in text:
        depth += (character in "{([") - (character in "})]")
        if depth > MAX_DEPTH:
            return False
    return True
