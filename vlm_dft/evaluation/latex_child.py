"""The process that parses what models wrote: ``python -m vlm_dft.evaluation.latex_child``, spoken to by ``latex``.

One JSON request per line, one JSON answer per line:

    ["compare", first, second, symbolic]   ->  [first as sympy prints it or null, the same of second, same]
    ["verify", reference, response]        ->  [extracted or null, correct]

Each request has so much processor and real time; then the kernel ends the process, whatever it computes. Once it reads
requests it may not write files, start processes or open sockets. Nothing in a request reaches eval: sympy reads even
numbers by it, so here its eval takes numbers only, by their digits; and math-verify hands plain expressions to it, so
here the LaTeX grammar parses those.
"""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import signal
import sys
from typing import Any

MAX_CPU_SECONDS = {"compare": 2.0, "verify": 5.0}
"""Of processor time, so that a busy machine gives the same verdicts as an idle one."""
MAX_SECONDS = 120.0
"""Of real time; only a machine that swaps comes here."""
MAX_MEMORY_BYTES = 2 * 2**30
MAX_PRINTED_CHARACTERS = 400

_NUMBER = re.compile(r"(?P<sign>-?)\s*(?P<kind>Integer|Float)\s*\(\s*'?(?P<digits>[\d.eE+-]{1,400})'?\s*\)")
_FORBIDDEN = (
    "subprocess.",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
    "socket.",
    "ctypes.dlopen",
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC


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


def compare(first: str, second: str, symbolic: bool) -> list[Any]:
    """Both as sympy prints them, and whether they are the same expression, where that is asked."""
    parsed = _parsed(first), _parsed(second)
    comparable = symbolic and parsed[0] is not None and parsed[1] is not None
    return [*map(_printed, parsed), comparable and _same(*parsed)]


def verify(reference: str, response: str) -> list[Any]:
    """math-verify's extraction from the response, and its verdict; its own timers are off, ours run."""
    import math_verify

    gold = math_verify.parse(f"${reference}$", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    found = math_verify.parse(response, parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    correct = math_verify.verify(gold, found, timeout_seconds=None)
    return [_printed(found[0]) if found else None, bool(correct)]


def read_number(code: str, *_: Any) -> Any:
    """In the place of sympy's eval of what its tokenizer wrote: one number. Raises ValueError for anything else."""
    import sympy

    found = _NUMBER.fullmatch(code.strip())
    if found is None:
        raise ValueError("only numbers are read")
    number = getattr(sympy, found["kind"])(found["digits"] if found["kind"] == "Float" else int(found["digits"]))
    return -number if found["sign"] else number


def forbid_eval() -> None:
    """Leave sympy's parser nothing but numbers."""
    import sympy.parsing.sympy_parser

    sympy.parsing.sympy_parser.eval_expr = read_number


def load_math_verify() -> None:
    """Import it, with parse_expr replaced: what it gets is digits and operators, which are LaTeX as well."""
    import math_verify.parser

    def without_eval(text: str, evaluate: bool = True) -> Any:
        from latex2sympy2_extended import latex2sympy

        return latex2sympy(text.replace("**", "^").replace("\u00d7", "*").replace("\u00f7", "/"))

    math_verify.parser.parse_expr = without_eval
    for module in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(module).setLevel(logging.CRITICAL)


def _printed(expression: Any) -> str | None:
    return None if expression is None else str(expression)[:MAX_PRINTED_CHARACTERS]


def forbid(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook: end the process when it is about to touch anything outside."""
    writes = event == "open" and isinstance(arguments[2], int) and bool(arguments[2] & _WRITING)
    if writes or event.startswith(_FORBIDDEN):
        os._exit(13)


def main() -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever prints goes to stderr
    sys.dont_write_bytecode = True
    forbid_eval()
    _parsed("1")  # imports sympy and builds the parser's tables before the clock runs
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    sys.addaudithook(forbid)
    answers.write(b"ready\n")
    answers.flush()
    for line in sys.stdin.buffer:
        name, *arguments = json.loads(line)
        if name == "verify" and "math_verify" not in sys.modules:
            load_math_verify()
        signal.setitimer(signal.ITIMER_PROF, MAX_CPU_SECONDS[name])
        signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS)
        answer = {"compare": compare, "verify": verify}[name](*arguments)
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main()
