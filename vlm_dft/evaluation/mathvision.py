"""MathVision (MATH-V): competition problems with a picture, by subject and level. Torch-free.

Reads the authors' JSONL (id, question, options, answer, level, subject, image) and VLMEvalKit's TSV (index, question
with its choices in it, choices, answer, category, image). The grade is VLMEvalKit's: the option inferred by rule, or
equality of the whole response; what it would hand to a judge is looked up by ``answers``' last rule instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from vlm_dft.evaluation.answers import marked_answer, phrased_answer, without_reasoning
from vlm_dft.evaluation.equality import is_equal
from vlm_dft.evaluation.grading import NO_ANSWER, Grade, Outcome, Summary, accuracies
from vlm_dft.evaluation.items import Benchmark, Item
from vlm_dft.evaluation.latex import LatexProcess
from vlm_dft.evaluation.options import LETTERS, infer_option
from vlm_dft.evaluation.sources import Record, Source, open_source

NAMES: tuple[str, ...] = ("MathVision.tsv", "MathVision_MINI.tsv", "test.jsonl", "testmini.jsonl")
PUBLISHED_SIZES = (3040, 304)
"""test and testmini."""
MAX_SHORT_ANSWER_CHARACTERS = 60

_ONLY_ANSWER = "Give only the final answer, in \\boxed{}; of several options, its letter."
_REASON_FIRST = "Reason step by step, then give the final answer in \\boxed{}; of several options, its letter."


def load(path: Path, prompt: Literal["direct", "cot"]) -> Benchmark:
    """Raises BenchmarkError naming file, row and field."""
    source = open_source("mathvision", path, NAMES)
    items = tuple(_item(source, record, prompt) for record in source.records)
    return Benchmark("mathvision", source.path, items, len(items))


def _item(source: Source, record: Record, prompt: Literal["direct", "cot"]) -> Item:
    options = dict(zip(LETTERS, record.strings("choices" if source.is_tsv else "options"), strict=False))
    answer = record.text("answer")
    if options and answer not in options:
        raise record.error("answer", f"{answer!r} is none of the options {', '.join(options)}")
    categories = {"subject": record.text("category" if source.is_tsv else "subject")}
    if level := record.optional("level"):
        categories["level"] = level
    id = record.text("index" if source.is_tsv else "id")
    return Item(
        id=id,
        group=id,
        prompt=_prompt(record.text("question"), options, prompt, verbatim=source.is_tsv),
        picture=source.picture(record),
        answer=answer,
        options=options,
        categories=categories,
        question=record.text("question"),
    )


def _prompt(question: str, options: Mapping[str, str], prompt: Literal["direct", "cot"], *, verbatim: bool) -> str:
    """verbatim: the file's question is a whole prompt already. Options that are letters stand in the picture."""
    lines = [question]
    if not verbatim and any(text.strip("()") != letter for letter, text in options.items()):
        lines += [f"({letter}) {text}" for letter, text in options.items()]
    if prompt == "cot":
        lines.append(_REASON_FIRST)
    elif not verbatim:
        lines.append(_ONLY_ANSWER)
    return "\n".join(lines)


def prefetched(item: Item, response: str, latex: LatexProcess) -> str | None:
    """What VLMEvalKit takes as the answer without asking a judge; None where it would ask."""
    if item.options:
        return infer_option(response, item.options)
    return response if is_equal(response, item.answer, latex) else None


def is_correct(item: Item, answer: str, latex: LatexProcess) -> bool:
    """VLMEvalKit's verdict on an extracted answer."""
    chosen = infer_option(answer, item.options) if item.options else answer
    return chosen is not None and is_equal(chosen, item.answer, latex)


def grade(item: Item, response: str, latex: LatexProcess) -> Grade:
    """Grade one response by the order that ``answers`` states."""
    response = without_reasoning(response)
    if marked := marked_answer(response):
        return Grade(marked.text, marked.rule, is_correct(item, marked.text, latex))
    if (fetched := prefetched(item, response, latex)) is not None:
        return Grade(fetched, "benchmark", is_correct(item, fetched, latex))
    if (phrased := phrased_answer(response)) is not None:
        return Grade(phrased, "phrase", is_correct(item, phrased, latex))
    short = response.strip()
    if short and not item.options and len(short) <= MAX_SHORT_ANSWER_CHARACTERS:
        return Grade(short, "benchmark", False)  # an answer and nothing else, already found unequal
    return NO_ANSWER


def summarize(benchmark: Benchmark, grades: Mapping[str, Grade]) -> Summary:
    """Accuracy over all items, by subject and by level."""
    items = benchmark.items
    return Summary(
        metric="acc",
        outcomes=tuple(Outcome(float(grades[item.id].correct), item.group) for item in items),
        by_category=accuracies(items, grades, [("subject",), ("level",)]),
        whole=benchmark.is_whole_file and len(items) in PUBLISHED_SIZES,
    )
