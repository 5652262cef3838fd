"""LaTeX answers compared by latex2sympy2-extended in a child process that cannot hang or eat the machine. Torch-free.

The grammar recurses and sympy computes whatever it is told to; a prediction can be anything. So the parser runs as
``python -m vlm_dft.evaluation.latex`` with a memory limit and a timer that kills it, and is started again when needed.
Knows nothing about benchmarks. Not covered: processor time below the limit, MAX_CPU_SECONDS per pair of answers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from types import TracebackType
from typing import Any, NamedTuple, Self

from vlm_dft.errors import EvaluationError

MAX_CHARACTERS = 400
MAX_DEPTH = 24
"""Nesting of brackets; answers of benchmarks have one or two."""
MAX_CPU_SECONDS = 2.0
"""Of processor time, so that a busy machine gives the same verdicts as an idle one."""
MAX_SECONDS = 120.0
"""Of real time; only a machine that swaps comes here."""
MAX_MEMORY_BYTES = 2 * 2**30
_READY = b"ready\n"


class Comparison(NamedTuple):
    """What the parser made of two answers."""

    first: str | None
    """The expression as sympy prints it; None when it is not LaTeX mathematics."""
    second: str | None
    same: bool
    """Whether they are the same expression or have the same value; false where that was not asked."""


NOT_COMPARED = Comparison(None, None, False)


class LatexProcess:
    """The child process; use it as a context manager. Not for use by several threads at once."""

    def __init__(self) -> None:
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
        if not (_plausible(first) and _plausible(second)):
            return NOT_COMPARED
        child = self.start()
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(json.dumps([first, second, symbolic]).encode() + b"\n")
            child.stdin.flush()
            answer = child.stdout.readline()
        except BrokenPipeError:
            answer = b""
        if not answer.endswith(b"\n"):  # the timer or the memory limit ended it
            self.num_killed += 1
            self.close()
            return NOT_COMPARED
        return Comparison(*json.loads(answer))

    def start(self) -> subprocess.Popen[bytes]:
        """The running child, started if need be. Raises EvaluationError when it cannot run at all."""
        if self._child is None:
            if find_spec("latex2sympy2_extended") is None:
                raise EvaluationError(
                    "scoring needs latex2sympy2-extended, which is not installed: pip install 'vlm-dft[eval]'"
                )
            self._child = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "vlm_dft.evaluation.latex"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            assert self._child.stdout is not None
            if self._child.stdout.readline() != _READY:
                self.close()
                raise EvaluationError(
                    "the LaTeX parser does not start: run `python -m vlm_dft.evaluation.latex` to see why"
                )
        return self._child


def _plausible(text: str) -> bool:
    """Whether it is worth parsing: short and not deeply nested."""
    if len(text) > MAX_CHARACTERS:
        return False
    depth = 0
    for character in text:
        depth += (character in "{([") - (character in "})]")
        if depth > MAX_DEPTH:
            return False
    return True


def _parsed(text: str) -> Any:
    from latex2sympy2_extended import latex2sympy

    try:
        return latex2sympy(text)
    # The parser raises bare Exception, and sympy nearly everything else, for text that is not mathematics.
    except Exception:  # noqa: BLE001
        return None


def _same(first: Any, second: Any) -> bool:
    import sympy

    try:
        if first == second:
            return True
        difference = sympy.expand(first - second)
        return bool(difference == 0 or (difference.is_number and abs(complex(difference.evalf())) < 1e-6))
    except Exception:  # noqa: BLE001 - sets, intervals, tuples and relations have no difference
        return False


def _main() -> None:
    import resource
    import signal

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints goes to stderr
    _parsed("1")  # imports sympy and builds the parser's tables before the clock runs
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)  # the kernel ends the process, whatever it computes
    answers.write(_READY)
    answers.flush()
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, MAX_CPU_SECONDS)
        signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
        *texts, symbolic = json.loads(line)
        first, second = (_parsed(text) for text in texts)
        comparable = symbolic and first is not None and second is not None
        answer = [_printed(first), _printed(second), comparable and _same(first, second)]
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _printed(expression: Any) -> str | None:
    return None if expression is None else str(expression)


if __name__ == "__main__":
    _main()
