"""We-Math: two- and three-step problems, each with its steps asked alone. Torch-free.

Reads the authors' JSON (ID, key, question, option, answer, "knowledge concept", image_path) and VLMEvalKit's TSV
(index, ID, key, question, A..H, answer, "knowledge concept", image, hint, requirement). A group is one multi-step
problem with its steps. Grades are VLMEvalKit's exact matching where the model marked no answer itself.

Its score is (groups - IK - RM - IG / 2) / groups over the groups at hand. VLMEvalKit divides by 525 whatever there is,
so that three wrong answers on a subset score 99 %: here a subset is scored over its own groups, and marked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from vlm_dft.evaluation.answers import marked_answer, without_reasoning
from vlm_dft.evaluation.grading import NO_ANSWER, Grade, Summary
from vlm_dft.evaluation.items import Benchmark, Item
from vlm_dft.evaluation.latex import LatexProcess
from vlm_dft.evaluation.options import infer_option
from vlm_dft.evaluation.sources import Record, Source, open_source
from vlm_dft.evaluation.wemath_dimensions import summarize_groups

NAMES: tuple[str, ...] = ("WeMath.tsv", "testmini.json")
PUBLISHED_GROUPS = 525
PUBLISHED_ROWS = 1740
LETTERS = "ABCDEFGH"

_KEY = re.compile(r"([23])steps_([123]|multi)")
_NOISE = re.compile(r"[<>:.]")
_TEMPLATE = (
    "Think briefly, then choose one option, in exactly this form:\n<Thought process>: <<...>> <Answer>: <<letter>>"
)


def load(path: Path, prompt: Literal["direct", "cot"]) -> Benchmark:
    """Raises BenchmarkError naming file, row and field."""
    source = open_source("wemath", path, NAMES)
    items = tuple(_item(source, record, prompt) for record in source.records)
    return Benchmark("wemath", source.path, items, len(items))


def _item(source: Source, record: Record, prompt: Literal["direct", "cot"]) -> Item:
    key = record.text("key")
    found = _KEY.fullmatch(key)
    if found is None or (found[1] == "2" and found[2] == "3"):
        raise record.error("key", f"{key!r} is none of 2steps_1, 2steps_2, 2steps_multi, 3steps_1 ... 3steps_multi")
    group = f"{found[1]}steps:{record.text('ID')}"
    options = _columns(record) if source.is_tsv else _listed(record)
    answer = record.text("answer")
    if answer not in options:
        raise record.error("answer", f"{answer!r} is none of the options {', '.join(options)}")
    return Item(
        id=record.text("index") if source.is_tsv else f"{record.text('ID')}:{key}",
        group=group,
        prompt=_prompt(record, options, prompt, is_tsv=source.is_tsv),
        picture=source.picture(record),
        answer=answer,
        options=options,
        categories={"steps": found[1], "part": found[2], "concept": record.text("knowledge concept")},
        question=record.text("question"),
    )


def _columns(record: Record) -> dict[str, str]:
    columns = ((letter, record.optional(letter)) for letter in LETTERS)
    return {letter: text for letter, text in columns if text is not None}


def _listed(record: Record) -> dict[str, str]:
    """The authors' one string, "A. 300;B. 400; C. No correct answer", read letter by letter."""
    text = record.text("option")
    starts: list[tuple[str, int, int]] = []
    position = 0
    for letter in LETTERS:
        found = re.compile(rf"(?:^|[;\s])\s*{letter}\s*\.").search(text, position)
        if found is None:
            break
        starts.append((letter, found.start(), found.end()))
        position = found.end()
    if len(starts) < 2 or text[: starts[0][1]].strip():
        raise record.error("option", f"not a list of options such as 'A. 3; B. 4': {text[:80]!r}")
    ends = [start for _, start, _ in starts[1:]] + [len(text)]
    return {letter: text[begin:end].strip(" ;\t\n") for (letter, _, begin), end in zip(starts, ends, strict=True)}


def _prompt(record: Record, options: Mapping[str, str], prompt: Literal["direct", "cot"], *, is_tsv: bool) -> str:
    """The form that the field evaluates with: hint, question, options; for cot the file's own requirement, or ours."""
    lines = [f"Question: {record.text('question')}", "Options:"]
    lines += [f"{letter}. {text}" for letter, text in options.items()]
    if hint := record.optional("hint"):
        lines.insert(0, f"Hint: {hint}")
    text = "\n".join(lines) + "\n"
    if prompt == "direct":
        return text
    return f"{text}\n{record.text('requirement') if is_tsv else _TEMPLATE}"


def exact_option(response: str) -> str | None:
    """VLMEvalKit's exact matching: the first character after the last "Answer", bare of <>:. , if it is A to H."""
    text = _NOISE.sub("", response.rsplit("Answer", maxsplit=1)[-1].strip()).strip()
    return text[0] if text and text[0] in LETTERS else None


def grade_exactly(item: Item, response: str) -> Grade:
    """VLMEvalKit's grade without a judge. It takes \\boxed{B}, "The answer is B" and "Answer: (B)" for no answer."""
    chosen = exact_option(response)
    return NO_ANSWER if chosen is None else Grade(chosen, "benchmark", chosen == item.answer)


def grade(item: Item, response: str, latex: LatexProcess) -> Grade:
    """Grade one response by the order that ``answers`` states; latex is not needed for options."""
    response = without_reasoning(response)
    if marked := marked_answer(response):
        return Grade(marked.text, marked.rule, infer_option(marked.text, item.options) == item.answer)
    return grade_exactly(item, response)


def summarize(benchmark: Benchmark, grades: Mapping[str, Grade]) -> Summary:
    """Strict four-dimensional score. Raises BenchmarkError when no group is complete."""
    summary, num_groups = summarize_groups(benchmark, grades)
    published = num_groups == PUBLISHED_GROUPS and benchmark.num_total == PUBLISHED_ROWS
    return Summary(
        metric=summary.metric if published else f"{summary.metric}_of_subset",
        outcomes=summary.outcomes,
        by_category=summary.by_category,
        whole=published and benchmark.is_whole_file,
    )
