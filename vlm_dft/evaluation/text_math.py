"""Mathematics without pictures: MATH-500, GSM8K, Minerva Math, OlympiadBench, AIME, AMC. Torch-free.

Reads the files that these benchmarks publish, told apart by their fields:

    question    problem, question or Problem
    answer      final_answer (OlympiadBench, a list); answer, after "####" where it is a solution (GSM8K); else the last
                \\boxed{} of the solution (Minerva Math)
    id          unique_id, id, ID, idx or index, else the row's number

Graded by math-verify, which finds the answer in the response and compares it with the reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from vlm_dft.evaluation.answers import marked_answer, without_reasoning
from vlm_dft.evaluation.grading import NO_ANSWER, Grade, Outcome, Summary, accuracies
from vlm_dft.evaluation.items import Benchmark, Item
from vlm_dft.evaluation.latex import LatexProcess
from vlm_dft.evaluation.sources import Record, open_source

NAMES: tuple[str, ...] = ("test.jsonl", "test.json", "test.tsv")
PUBLISHED_SIZES = {500: "MATH-500", 1319: "GSM8K", 272: "Minerva", 674: "OlympiadBench", 675: "OlympiadBench"}
"""Beside them AIME has 30 items a year and AMC 2023 has 40."""

_QUESTIONS = ("problem", "question", "Problem")
_IDS = ("unique_id", "id", "ID", "idx", "index")
_CATEGORIES = ("subject", "subfield", "type", "level")
_FINAL = "####"
_ONLY_ANSWER = "Give only the final answer, in \\boxed{}."
_REASON_FIRST = "Please reason step by step, and put your final answer within \\boxed{}."
"""The sentence with which Qwen2.5-Math and the DFT paper ask."""


def load(path: Path, prompt: Literal["direct", "cot"]) -> Benchmark:
    """Raises BenchmarkError naming file, row and field."""
    source = open_source("text_math", path, NAMES)
    items = tuple(_item(record, prompt) for record in source.records)
    return Benchmark("text_math", source.path, items, len(items))


def _item(record: Record, prompt: Literal["direct", "cot"]) -> Item:
    name = next((name for name in _QUESTIONS if record.values.get(name)), _QUESTIONS[0])
    question = record.text(name)
    if context := record.optional("context"):
        question = f"{context}\n{question}"
    found = next((name for name in _IDS if record.values.get(name) is not None), None)
    id = record.text(found) if found else str(record.number)
    categories = {name: value for name in _CATEGORIES if (value := record.optional(name))}
    return Item(
        id=id,
        group=id,
        prompt=f"{question}\n{_REASON_FIRST if prompt == 'cot' else _ONLY_ANSWER}",
        picture=None,
        answer=_answer(record),
        categories=categories,
        question=question,
    )


def _answer(record: Record) -> str:
    """The reference as LaTeX, without dollar signs."""
    if "final_answer" in record.values:
        value = record.values["final_answer"]
        text = ", ".join(record.strings("final_answer")) if isinstance(value, list) else record.text("final_answer")
    elif (given := record.optional("answer")) is not None:
        text = given.rpartition(_FINAL)[2].replace(",", "") if _FINAL in given else given
    else:
        marked = marked_answer(record.text("solution"))
        if marked is None:
            raise record.error("solution", "there is no answer field, and the solution has no \\boxed{} either")
        text = marked.text
    text = text.replace("$", "").strip()
    if not text:
        raise record.error("answer", "the reference answer is empty")
    return text.removesuffix(".0") if text.removesuffix(".0").lstrip("-").isdecimal() else text


def grade(item: Item, response: str, latex: LatexProcess) -> Grade:
    """math-verify's verdict on the response, reasoning left out."""
    response = without_reasoning(response)
    if not response.strip():
        return NO_ANSWER
    verified = latex.verify(item.answer, response)
    return NO_ANSWER if verified.extracted is None else Grade(verified.extracted, "math_verify", verified.correct)


def summarize(benchmark: Benchmark, grades: Mapping[str, Grade]) -> Summary:
    """Accuracy over all items, by subject, subfield, type or level."""
    items = benchmark.items
    return Summary(
        metric="acc",
        outcomes=tuple(Outcome(float(grades[item.id].correct), item.group) for item in items),
        by_category=accuracies(items, grades, [(name,) for name in _CATEGORIES]),
        whole=benchmark.is_whole_file and len(items) in (*PUBLISHED_SIZES, 30, 40),
    )
