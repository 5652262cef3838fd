"""A user's own benchmark: questions with or without a picture, graded as each row, or the whole file, says. Torch-free.

Fields of a row (TSV columns, or keys of JSONL and JSON):

    question    what is asked
    answer      the reference; for options a letter, or the text of one of them
    image       a path beside the file, in a TSV also base64; or image_path; neither: a question without a picture
    options     a list, or an object letter -> text; in a TSV also columns A, B, C, ...
    scoring     option, number, latex or exact; else what BenchmarkConfig.scoring says, else option where there are any
    id, index   unique; else the row's number
    category    a breakdown of the score

number takes the number that the response ends with where the model marked no answer; latex compares as text, number or
expression; exact compares text, but for case and white space.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from vlm_dft.config import Scoring
from vlm_dft.evaluation import arithmetic
from vlm_dft.evaluation.answers import marked_answer, phrased_answer, without_reasoning
from vlm_dft.evaluation.equality import TOLERANCE, is_same
from vlm_dft.evaluation.grading import NO_ANSWER, Grade, Outcome, Summary, accuracies
from vlm_dft.evaluation.items import Benchmark, Item
from vlm_dft.evaluation.latex import LatexProcess
from vlm_dft.evaluation.options import LETTERS, infer_option
from vlm_dft.evaluation.sources import Record, Source, open_source

NAMES: tuple[str, ...] = ("benchmark.tsv", "benchmark.jsonl", "test.tsv", "test.jsonl")
MAX_SHORT_ANSWER_CHARACTERS = 60

_ONLY_ANSWER = "Give only the final answer, in \\boxed{}"
_REASON_FIRST = "Reason step by step, then give the final answer in \\boxed{}"
_NUMBER = re.compile(r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?:\s?/\s?\d+)?")
_SPACE = re.compile(r"\s+")


def load(path: Path, prompt: Literal["direct", "cot"], scoring: Scoring | None = None) -> Benchmark:
    """Raises BenchmarkError naming file, row and field."""
    source = open_source("custom", path, NAMES)
    items = tuple(_item(source, record, prompt, scoring) for record in source.records)
    return Benchmark("custom", source.path, items, len(items))


def _item(source: Source, record: Record, prompt: Literal["direct", "cot"], default: Scoring | None) -> Item:
    options = _options(source, record)
    scoring = record.optional("scoring") or default or ("option" if options else "latex")
    if scoring not in get_args(Scoring):
        raise record.error("scoring", f"{scoring!r} is none of {', '.join(get_args(Scoring))}")
    id = record.optional("id") or record.optional("index") or str(record.number)
    question = record.text("question")
    has_picture = record.optional("image") or record.optional("image_path")
    categories = {"scoring": scoring}
    if category := record.optional("category"):
        categories["category"] = category
    return Item(
        id=id,
        group=id,
        prompt=_prompt(question, options, prompt),
        picture=source.picture(record) if has_picture else None,
        answer=_answer(record, options, scoring),
        options=options if scoring == "option" else {},
        categories=categories,
        question=question,
    )


def _options(source: Source, record: Record) -> dict[str, str]:
    if not record.values.get("options"):
        columns = ((letter, record.optional(letter)) for letter in LETTERS if source.is_tsv)
        return {letter: text for letter, text in columns if text is not None}
    if not isinstance(record.literal("options"), dict):
        return dict(zip(LETTERS, record.strings("options"), strict=False))
    return {letter.strip().upper(): str(text) for letter, text in record.mapping("options").items()}


def _answer(record: Record, options: Mapping[str, str], scoring: str) -> str:
    answer = record.text("answer").strip()
    if scoring == "number" and number_in(answer) is None:
        raise record.error("answer", f"{answer!r} is no number, but the row is scored by number")
    if scoring != "option":
        return answer
    if answer.upper() in options:
        return answer.upper()
    letters = [letter for letter, text in options.items() if _plain(text) == _plain(answer)]
    if len(letters) != 1:
        known = ", ".join(options) or "none: give options"
        raise record.error("answer", f"{answer!r} is neither the letter nor the text of one option; there are {known}")
    return letters[0]


def _prompt(question: str, options: Mapping[str, str], prompt: Literal["direct", "cot"]) -> str:
    lines = [question, *(f"({letter}) {text}" for letter, text in options.items())]
    of_options = "; of the options, its letter." if options else "."
    return "\n".join([*lines, (_REASON_FIRST if prompt == "cot" else _ONLY_ANSWER) + of_options])


def number_in(text: str) -> float | None:
    """The last number that text spells, thousands separated by commas or not, a fraction by its value."""
    found = _NUMBER.findall(text)
    value = arithmetic.value_of(found[-1].replace(",", "")) if found else None
    return None if value is None or isinstance(value, complex) else float(value)


def _plain(text: str) -> str:
    return _SPACE.sub(" ", text.strip()).casefold()


def is_correct(item: Item, answer: str, latex: LatexProcess) -> bool:
    """The verdict on an extracted answer."""
    match item.categories["scoring"]:
        case "option":
            return infer_option(answer, item.options) == item.answer
        case "number":
            found, reference = number_in(answer), number_in(item.answer)
            assert reference is not None, "load has checked it"
            return found is not None and abs(found - reference) <= TOLERANCE * max(1.0, abs(reference))
        case "latex":
            return is_same(answer, item.answer, latex)
        case _:
            return _plain(answer) == _plain(item.answer)


def grade(item: Item, response: str, latex: LatexProcess) -> Grade:
    """Grade one response by the order that ``answers`` states."""
    response = without_reasoning(response)
    if marked := marked_answer(response):
        return Grade(marked.text, marked.rule, is_correct(item, marked.text, latex))
    if item.options and (chosen := infer_option(response, item.options)) is not None:
        return Grade(chosen, "benchmark", chosen == item.answer)
    if (phrased := phrased_answer(response)) is not None:
        return Grade(phrased, "phrase", is_correct(item, phrased, latex))
    if item.categories["scoring"] == "number" and (numbers := _NUMBER.findall(response)):
        return Grade(numbers[-1], "benchmark", is_correct(item, numbers[-1], latex))
    short = response.strip()
    if short and not item.options and len(short) <= max(MAX_SHORT_ANSWER_CHARACTERS, len(item.answer)):
        return Grade(short, "benchmark", is_correct(item, short, latex))
    return NO_ANSWER


def summarize(benchmark: Benchmark, grades: Mapping[str, Grade]) -> Summary:
    """Accuracy over all items, by category and kind of scoring. What the user gave is the whole benchmark."""
    items = benchmark.items
    return Summary(
        metric="acc",
        outcomes=tuple(Outcome(float(grades[item.id].correct), item.group) for item in items),
        by_category=accuracies(items, grades, [("category",), ("scoring",)]),
        whole=benchmark.is_whole_file,
    )
