"""A benchmark as VLMEvalKit reads it: a TSV with the columns that its data set classes know, and pictures as files.

Written anew from our items, whatever file they came from: VLMEvalKit asks and scores exactly those. A row's index is
the item's place in the whole file, so that it never depends on how many are asked. Pictures stand by path, each row its
own: VLMEvalKit would decode base64 into a cache that it never refreshes, and drop transparency in another way than we
do. Torch-free. Knows nothing about processes.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vlm_dft.config import BenchmarkConfig, BenchmarkKind, EvalConfig
from vlm_dft.errors import BenchmarkError
from vlm_dft.evaluation.items import Benchmark, Item
from vlm_dft.run_dir import disk_errors, write_atomically

CLASSES: dict[BenchmarkKind, str] = {"mathverse": "MathVerse", "mathvision": "MathVision", "wemath": "WeMath"}
"""Kind -> VLMEvalKit's data set class."""


@dataclass(frozen=True)
class Table:
    """One benchmark as a VLMEvalKit data set."""

    name: str
    """b00-WeMath: VLMEvalKit's own name after a number, which keeps its downloads and checksums out of the way."""
    class_name: str
    rows: dict[int, Item]
    """Index -> item, in the order they are asked."""


def refusal(config: EvalConfig, entry: BenchmarkConfig) -> str | None:
    """Why VLMEvalKit cannot score this benchmark; None when it can."""
    if entry.kind not in CLASSES:
        return f"VLMEvalKit has no benchmark of the kind {entry.kind}"
    if config.samples_per_item > 1:
        return f"VLMEvalKit asks each question once, not {config.samples_per_item} times"
    if config.judge is None and entry.kind != "wemath":
        return f"VLMEvalKit cannot score {CLASSES[entry.kind]} without a judge, and the evaluation has none"
    return None


def table_name(position: int, kind: BenchmarkKind, prompt: str) -> str:
    """position: of the benchmark in the evaluation. VLMEvalKit's We-Math asks for reasoning when COT is in the name."""
    suffix = "_COT" if kind == "wemath" and prompt == "cot" else ""
    return f"b{position:02d}-{CLASSES[kind]}{suffix}"


def table_of(name: str, whole: Benchmark, chosen: Benchmark) -> Table:
    """The chosen items of a benchmark with their places in the whole of it."""
    kept = {item.id for item in chosen.items}
    rows = {index: item for index, item in enumerate(whole.items) if item.id in kept}
    return Table(name, CLASSES[whole.kind], rows)


def write_table(table: Table, data_root: Path) -> None:
    """Write data_root/<name>.tsv and its pictures. Raises BenchmarkError for a picture that cannot be read."""
    pictures = data_root / "pictures" / table.name
    with disk_errors(pictures):
        pictures.mkdir(parents=True, exist_ok=True)
    columns = _COLUMNS[table.class_name]
    rows = [
        {"index": str(index), "item": item.id, "image_path": str(_picture(pictures, index, item)), **columns(item)}
        for index, item in table.rows.items()
    ]
    header = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, header, restval="", dialect="excel-tab", quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(data_root / f"{table.name}.tsv", text.getvalue().encode())


def _picture(directory: Path, index: int, item: Item) -> Path:
    """A file of the row's own: the encoded picture as it is, under a name that says its format."""
    assert item.picture is not None, "a benchmark with an item without picture is refused before"
    data = item.picture.encoded()
    with Image.open(io.BytesIO(data)) as image:
        suffix = (image.format or "png").lower()
    path = directory / f"{index}.{suffix}"
    if not path.is_file() or path.read_bytes() != data:
        write_atomically(path, data)
    return path


def _mathverse(item: Item) -> dict[str, str]:
    metadata = json.dumps({name: item.categories[name] for name in ("subject", "subfield")})
    return {
        "question": item.prompt,
        "query_cot": item.prompt,
        "question_for_eval": item.asked,
        "answer": item.answer,
        "problem_version": item.categories["version"],
        "metadata": metadata.replace("'", "\\u0027"),  # VLMEvalKit turns every ' into "
    }


def _mathvision(item: Item) -> dict[str, str]:
    return {
        "question": item.prompt,
        "choices": repr(list(item.options.values())),
        "answer": item.answer,
        "category": item.categories["subject"],
    }


def _wemath(item: Item) -> dict[str, str]:
    """The parts that VLMEvalKit puts together to the item's prompt again."""
    options = "".join(f"{letter}. {text}\n" for letter, text in item.options.items())
    hint, found, requirement = item.prompt.partition(f"Question: {item.question}\nOptions:\n{options}")
    if not found:
        raise BenchmarkError(f"item {item.id}: its prompt is not made of its question and options")
    row = {"question": item.question, **item.options, "answer": item.answer}
    row |= {"hint": hint.removeprefix("Hint: ").rstrip("\n"), "requirement": requirement.removeprefix("\n")}
    steps, part = item.categories["steps"], item.categories["part"]
    row |= {"key": f"{steps}steps_{part}", "ID": item.group.removeprefix(f"{steps}steps:")}
    return {**row, "knowledge concept": item.categories["concept"]}


_COLUMNS: dict[str, Callable[[Item], dict[str, str]]] = {
    "MathVerse": _mathverse,
    "MathVision": _mathvision,
    "WeMath": _wemath,
}


def without_picture(benchmark: Benchmark) -> Item | None:
    """The first item that VLMEvalKit could not show."""
    return next((item for item in benchmark.items if item.picture is None), None)
