"""MathVerse: one problem in five versions that move its text into the picture. Torch-free.

Reads the authors' JSON (sample_index, problem_index, problem_version, question, query_wo, query_cot, answer,
question_type, metadata, image) and VLMEvalKit's TSV (index, problem_version, question, query_cot, answer, metadata,
image). The score is the unweighted mean of the versions' accuracies. VLMEvalKit grades MathVerse by a judge alone; what
it takes without one is text equality, which is kept, and options and LaTeX are compared by rule beside it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from vlm_dft.evaluation.answers import marked_answer, phrased_answer, without_reasoning
from vlm_dft.evaluation.equality import is_same
from vlm_dft.evaluation.grading import NO_ANSWER, Grade, Outcome, Summary, accuracies
from vlm_dft.evaluation.items import Benchmark, Item
from vlm_dft.evaluation.latex import LatexProcess
from vlm_dft.evaluation.options import LETTERS, infer_option
from vlm_dft.evaluation.sources import Record, Source, open_source

NAMES: tuple[str, ...] = ("MathVerse_MINI.tsv", "testmini.json")
VERSIONS = ("Text Dominant", "Text Lite", "Vision Intensive", "Vision Dominant", "Vision Only")
PUBLISHED_PROBLEMS = 788
TEXT_ONLY = "Text Only"
"""The authors' sixth version, which has no picture."""
MAX_SHORT_ANSWER_CHARACTERS = 60

_CHOICES = re.compile(r"\nChoices?:\s*\n", re.IGNORECASE)
_CHOICE = re.compile(r"^\(?([A-H])\)?\s*[.:)]\s*(.*)$")
_UNKNOWN_OPTIONS = dict.fromkeys(LETTERS[:6], "")
"""Where the options stand in the picture, only letters can be recognised."""


def load(path: Path, prompt: Literal["direct", "cot"]) -> Benchmark:
    """Raises BenchmarkError naming file, row and field."""
    source = open_source("mathverse", path, NAMES)
    items = tuple(_item(source, record, prompt) for record in source.records)
    return Benchmark("mathverse", source.path, items, len(items))


def _item(source: Source, record: Record, prompt: Literal["direct", "cot"]) -> Item:
    version = record.text("problem_version")
    if version not in (*VERSIONS, TEXT_ONLY):
        raise record.error("problem_version", f"{version!r} is none of {', '.join(VERSIONS)}")
    metadata = record.mapping("metadata")
    for key in ("subject", "subfield"):
        if not isinstance(metadata.get(key), str):
            raise record.error(f"metadata.{key}", "the field is absent or not text")
    answer = record.text("answer")
    asked = record.text("query_cot" if prompt == "cot" else "question" if source.is_tsv else "query_wo")
    return Item(
        id=record.text("index" if source.is_tsv else "sample_index"),
        group=record.optional("problem_index") or record.text("index"),
        prompt=asked,
        picture=None if version == TEXT_ONLY else source.picture(record),
        answer=answer,
        options=_options(record, answer),
        categories={"version": version, "subject": metadata["subject"], "subfield": metadata["subfield"]},
        question=record.optional("question_for_eval" if source.is_tsv else "question") or "",
    )


def _options(record: Record, answer: str) -> dict[str, str]:
    """Letter -> text from the list under "Choices:"; letters alone where the text does not hold the list."""
    question = (record.optional("question") or "").rstrip()
    if listed := _CHOICES.search(question):
        lines = [line.strip() for line in question[listed.end() :].splitlines() if line.strip()]
        matches = [_CHOICE.match(line) for line in lines]
        options = {match.group(1): match.group(2) for match in matches if match}
        if len(options) > 1:
            return options
    kind = record.optional("question_type")
    is_choice = kind == "multi-choice" if kind else re.fullmatch(r"\(?[A-F]\)?", answer.strip()) is not None
    return dict(_UNKNOWN_OPTIONS) if is_choice else {}


def is_correct(item: Item, answer: str, latex: LatexProcess) -> bool:
    """Equal text, the same option, or the same expression."""
    if answer.strip() == item.answer.strip():
        return True
    if item.options:
        chosen = infer_option(answer, item.options)
        return chosen is not None and chosen == infer_option(item.answer, item.options)
    return is_same(answer, item.answer, latex)


def grade(item: Item, response: str, latex: LatexProcess) -> Grade:
    """Grade one response by the order that ``answers`` states."""
    response = without_reasoning(response)
    if marked := marked_answer(response):
        return Grade(marked.text, marked.rule, is_correct(item, marked.text, latex))
    if item.options and (chosen := infer_option(response, item.options)) is not None:
        return Grade(chosen, "benchmark", is_correct(item, chosen, latex))
    if (phrased := phrased_answer(response)) is not None:
        return Grade(phrased, "phrase", is_correct(item, phrased, latex))
    short = response.strip()
    if short and not item.options and len(short) <= MAX_SHORT_ANSWER_CHARACTERS:
        return Grade(short, "benchmark", is_correct(item, short, latex))
    return NO_ANSWER


def summarize(benchmark: Benchmark, grades: Mapping[str, Grade]) -> Summary:
    """Mean over versions; accuracy by version, subject and subfield, and by the latter two within each version."""
    items = benchmark.items
    outcomes = tuple(Outcome(float(grades[item.id].correct), item.group, item.categories["version"]) for item in items)
    names = [("version",), ("subject",), ("subfield",), ("version", "subject"), ("version", "subfield")]
    return Summary(
        metric="mean_over_versions",
        outcomes=outcomes,
        by_category=accuracies(items, grades, names),
        whole=benchmark.is_whole_file and _is_published(items),
    )


def _is_published(items: tuple[Item, ...]) -> bool:
    """All five versions of all problems, or one version of all: VLMEvalKit publishes both."""
    counts = Counter(item.categories["version"] for item in items)
    complete = all(count == PUBLISHED_PROBLEMS for count in counts.values())
    return complete and TEXT_ONLY not in counts and len(counts) in (1, len(VERSIONS))
