"""What VLMEvalKit's scorers may do, and what they must tell us. In VLMEvalKit's process only; nothing of it is edited.

Python looks a global name up in its module before the built-ins: a module's ``eval`` or ``len`` is replaced by setting
a global of that name there.

    mathv.eval          evaluates model output. Here it reads literals and plain arithmetic; all else raises, as most
                        output did before. (So "A" no longer equals every number: ``eval`` found the scorer's variable.)
    mathv.latex2sympy   parses model output, in a process of its own: limited in length, depth and memory.
    wemath.len          makes a rate over no problem NaN instead of ending the scoring (an untrained model solves none).
    multiple_choice     its judge prompt for WeMath depends on the data set's name, before which ours puts a number.
    gpt.requests        asks the judge with the key that VLMEvalKit does not have: see ``judge_requests``.

Which row was right, VLMEvalKit does not always write down: MathVision's verdicts, and WeMath's without a judge, go to
``<result file>.verdicts.jsonl`` as it decides them. Knows nothing about scores.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm_dft.evaluation import arithmetic, latex
from vlm_dft.evaluation.vlmevalkit.judge_requests import JudgeRequests, JudgeRules

VERDICTS_SUFFIX = ".verdicts.jsonl"
PREFIX = re.compile(r"^b\d+-")
"""What stands before VLMEvalKit's own name in a data set's name."""
MAX_LATEX_BYTES = 2 * 2**30
"""Address space that the parser's process may take beyond what it has."""


def install(judge: JudgeRules | None, judge_key: str | None) -> None:
    """All of them."""
    utils = "vlmeval.dataset.utils"
    guard_mathvision(importlib.import_module(f"{utils}.mathv"))
    guard_wemath(importlib.import_module(f"{utils}.wemath"))
    guard_multiple_choice(importlib.import_module(f"{utils}.multiple_choice"))
    if judge is not None:
        client: Any = importlib.import_module("vlmeval.api.gpt")
        client.requests = JudgeRequests(judge, judge_key, client.requests.post)


def guard_mathvision(module: Any) -> None:
    """See the module's docstring."""
    verdicts: list[dict[str, Any]] = []
    plain_check, plain_accuracy, parse = module.post_check, module.MATH_V_acc, module.latex2sympy

    def post_check(line: Any, prefetch: bool = False) -> Any:
        answer = plain_check(line, prefetch=prefetch)
        if not prefetch:
            verdicts.append({"index": int(line["index"]), "extracted": str(line["res"]), "correct": bool(answer)})
        return answer

    def accuracy(result_file: str) -> Any:
        verdicts.clear()
        table = plain_accuracy(result_file)
        write_verdicts(result_file, verdicts)
        return table

    module.eval = harmless_eval
    module.latex2sympy = limited(parse)
    module.post_check = post_check
    module.MATH_V_acc = accuracy


def guard_wemath(module: Any) -> None:
    """See the module's docstring."""
    plain_load = module.load_and_process_data

    def load(path: str) -> Any:
        table = plain_load(path)
        if "processed_answer" in table:  # without a judge
            columns = zip(table["index"], table["processed_answer"], table["joker"], strict=True)
            rows = [
                {"index": int(index), "extracted": letter if isinstance(letter, str) else None, "correct": bool(right)}
                for index, letter, right in columns
            ]
            write_verdicts(path, rows)
        return table

    def count(rows: Any) -> Any:
        import numpy as np

        return np.int64(len(rows))

    module.load_and_process_data = load
    module.len = count


def guard_multiple_choice(module: Any) -> None:
    """See the module's docstring."""
    plain = module.mcq_vanilla_eval

    def mcq_vanilla_eval(
        model: Any, data: Any, meta: Any, nproc: int, result_file: str, dataset_name: str | None = None
    ) -> Any:
        return plain(model, data, meta, nproc, result_file, PREFIX.sub("", dataset_name or ""))

    module.mcq_vanilla_eval = mcq_vanilla_eval


def harmless_eval(text: str) -> Any:
    """The value of plain arithmetic or of a literal. Raises ValueError for everything else, whatever it is."""
    value = arithmetic.value_of(str(text))
    if value is not None:
        return value
    try:
        return ast.literal_eval(text)
    except (SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"not a literal: {type(error).__name__}") from None


def limited(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """parse, for text of plausible size, in this process under a memory limit. Raises ValueError for other text."""
    parent = os.getpid()

    def parse_limited(text: str) -> Any:
        if not latex.plausible(text):
            raise ValueError("too long or too deep")
        if os.getpid() != parent:  # VLMEvalKit parses in a process that it forks for each pair of answers
            _limit_memory()
        return parse(text)

    return parse_limited


def write_verdicts(result_file: str, rows: list[dict[str, Any]]) -> None:
    Path(result_file + VERDICTS_SUFFIX).write_text("".join(json.dumps(row) + "\n" for row in rows))


def _limit_memory() -> None:
    import resource

    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:  # no Linux: VLMEvalKit's own time limit remains
        return
    limit = pages * resource.getpagesize() + MAX_LATEX_BYTES
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
