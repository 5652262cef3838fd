"""Which benchmark items the training data already held: by question, by picture, and as the item. Torch-free.

question   half of the item's runs of 13 words stand in one training question; of shorter questions, all their words
           and no others. Words are compared without case, punctuation and LaTeX's marks; fewer than 4 say nothing, and
           fewer than 13 say nothing about an item with a picture ("What is the area?").
picture    the same file, or a perceptual hash (256 bits of brightness differences) that differs in at most 12 bits and
           the same colours: a picture that was resized or compressed again. Drawings of one layout have one hash, so
           that their fields are compared too. Pictures that are nearly blank are compared as files alone.
item       one training row has both; a picture is enough where the question says nothing, a question where there is no
           picture.

Neither alone is proof, and all three are counted. Of 393 test puzzles of PuzzleVQA, made from templates, none of them
among its 1607 training rows, 387 overlap by question, 171 by picture and 101 as items; between halves of MathVerse,
MathVision and We-Math 1 to 2 percent by question, none by picture or as items. Where their pictures come back at 70
percent as JPEG, 55 to 76 percent are found by picture, 60 to 95 by question, 54 to 76 as items.

Training rows are streamed, so that memory depends on the benchmark alone. Not covered: paraphrases, translations,
crops, and what the model saw before this training.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from vlm_dft.config import EvalConfig
from vlm_dft.data.canonical import CanonicalDataset, Row, TextPart
from vlm_dft.errors import DatasetError
from vlm_dft.evaluation.grading import Summary, mean_over_strata
from vlm_dft.evaluation.items import Benchmark, Item
from vlm_dft.results import Progress, Record
from vlm_dft.run_dir import RunDir, disk_errors, write_json

log = logging.getLogger(__name__)

REPORT_NAME = "contamination.json"
WORDS = 13
MIN_WORDS = 4
MIN_SHARE = 0.5
HASH_SIDE = 16
MAX_DIFFERING_BITS = 12
MIN_SET_BITS = 8
"""Pictures with fewer brightness steps look like each other whatever they show."""
MAX_FIELD_DIFFERENCE = 32
"""Of 255, in any of 16 x 16 fields and three colours: another shape or colour differs by more, compression by less."""
RULES = "overlap-rules/v3"

_WORD = re.compile(r"\w+")
_CHUNK_ROWS = 256


OverlapKind = Literal["question", "picture", "item"]


class Overlap(Record):
    """One benchmark item that stands in the training data."""

    item: str
    by: OverlapKind
    row: str
    """Id of the first training row like it."""
    share: float | None = None
    """Of the item's runs of words that the row holds."""
    differing_bits: int | None = None
    """Of the pictures' hashes; 0 for equal files."""


class BenchmarkOverlaps(Record):
    """One benchmark beside the training data."""

    rules: str = RULES
    data_fingerprint: str
    items_sha256: str
    rows: int
    """Training rows looked at."""
    items: int
    overlaps: tuple[Overlap, ...]
    """At most one of each kind for each item."""

    def items_by(self, *kinds: OverlapKind) -> frozenset[str]:
        """Ids of items that overlap in one of these ways."""
        return frozenset(overlap.item for overlap in self.overlaps if overlap.by in kinds)


class ContaminationReport(Record):
    """evaluation/contamination.json"""

    training_dataset: str
    checked: bool
    reason: str | None = None
    """Why nothing was checked."""
    benchmarks: dict[str, BenchmarkOverlaps]


def check(
    dataset: Path,
    benchmarks: Mapping[str, Benchmark],
    *,
    cache: Path | None = None,
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> ContaminationReport:
    """Compare every benchmark with the training data. cache: where earlier comparisons are kept.

    A dataset that is gone is told in the report, because the evaluation can go on. Raises BenchmarkError for a picture
    of the benchmark, DatasetError for one of the dataset.
    """
    try:
        data = CanonicalDataset.open(dataset)
    except DatasetError as error:
        log.warning("overlaps with the training data are not checked: %s", error.message)
        return ContaminationReport(training_dataset=str(dataset), checked=False, reason=error.message, benchmarks={})
    found = {}
    for name, benchmark in benchmarks.items():
        path = cache and cache / f"{data.manifest.fingerprint[:32]}-{benchmark.sha256[:32]}.json"
        known = _known(path, data.manifest.fingerprint, benchmark) if path else None
        found[name] = known or _compared(data, benchmark, tell)
        if path and known is None:
            with disk_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, found[name])
    return ContaminationReport(training_dataset=str(dataset), checked=True, benchmarks=found)


def report_overlaps(
    config: EvalConfig, run: RunDir, benchmarks: Mapping[str, Benchmark]
) -> dict[str, BenchmarkOverlaps]:
    """Benchmark -> its overlaps with the training data; empty when that data is not known.

    Adds to evaluation/contamination.json what is not there yet: two backends may share one evaluation.
    """
    if config.training_dataset is None or not benchmarks:
        return {}

    def tell(done: int, total: int) -> None:
        what = "overlaps with the training data"
        run.write_progress(Progress(phase="evaluating", benchmark=what, items_done=done, items_total=total))

    cache = config.score_cache and config.score_cache / "overlaps"
    report = check(config.training_dataset, benchmarks, cache=cache, tell=tell)
    path = run.path / "evaluation" / REPORT_NAME
    path.parent.mkdir(exist_ok=True)
    earlier = ContaminationReport.model_validate_json(path.read_bytes()).benchmarks if path.is_file() else {}
    write_json(path, report.model_copy(update={"benchmarks": earlier | report.benchmarks}))
    return report.benchmarks


def without_overlaps(benchmark: Benchmark, summary: Summary, overlaps: BenchmarkOverlaps) -> dict[str, Any]:
    """A score's fields about the training data: how many items stand in it in which way, and the value without them."""
    whole, any_way = overlaps.items_by("item"), overlaps.items_by("item", "question", "picture")
    return {
        "contaminated": len(whole),
        "contaminated_questions": len(overlaps.items_by("question")),
        "contaminated_pictures": len(overlaps.items_by("picture")),
        "clean_value": _value_without(benchmark, summary, whole),
        "clean_value_strict": _value_without(benchmark, summary, any_way),
    }


def _value_without(benchmark: Benchmark, summary: Summary, overlapping: Collection[str]) -> float | None:
    """Without the groups that hold one of these items; None where none is left."""
    groups = {item.group for item in benchmark.items if item.id in overlapping}
    clean = [outcome for outcome in summary.outcomes if outcome.group not in groups]
    return mean_over_strata(clean).value if clean else None


def _known(path: Path, fingerprint: str, benchmark: Benchmark) -> BenchmarkOverlaps | None:
    try:
        known = BenchmarkOverlaps.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        log.warning("%s is damaged (%s): comparing anew", path, type(error).__name__)
        return None
    fits = (known.rules, known.data_fingerprint, known.items_sha256) == (RULES, fingerprint, benchmark.sha256)
    return known if fits else None


def _compared(data: CanonicalDataset, benchmark: Benchmark, tell: Callable[[int, int], None]) -> BenchmarkOverlaps:
    questions, pictures = Questions(benchmark.items), Pictures(benchmark.items)
    whole: dict[str, Overlap] = {}
    rows = 0
    with ThreadPoolExecutor(4, thread_name_prefix="picture") as pool:  # Pillow decodes outside the interpreter's lock
        for chunk in _chunks(iter(data)):
            pictures.look(data, chunk, pool)
            for row in chunk:
                for id in questions.with_picture(questions.look(row), pictures.held(row)):
                    whole.setdefault(id, Overlap(item=id, by="item", row=row.id))
            rows += len(chunk)
            tell(rows, len(data))
    overlaps = [*whole.values(), *questions.found.values(), *pictures.found.values()]
    order = {item.id: number for number, item in enumerate(benchmark.items)}
    return BenchmarkOverlaps(
        data_fingerprint=data.manifest.fingerprint,
        items_sha256=benchmark.sha256,
        rows=rows,
        items=len(benchmark.items),
        overlaps=tuple(sorted(overlaps, key=lambda overlap: (order[overlap.item], overlap.by))),
    )


def _chunks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while chunk := list(islice(rows, _CHUNK_ROWS)):
        yield chunk


def words_of(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def runs_of(words: list[str]) -> list[str]:
    """Every run of WORDS words; of a shorter text, the text, marked as whole."""
    if len(words) < WORDS:
        return [" ".join(["<whole>", *words])] if len(words) >= MIN_WORDS else []
    return [" ".join(words[start : start + WORDS]) for start in range(len(words) - WORDS + 1)]


class Questions:
    """The benchmark's questions, and which of them a training row held."""

    def __init__(self, items: Iterable[Item]) -> None:
        self.found: dict[str, Overlap] = {}
        self._items: dict[str, set[str]] = defaultdict(set)
        """Run of words -> ids of the items that hold it."""
        self._num_runs: dict[str, int] = {}
        self._shown: set[str] = set()
        """Ids of items with a picture."""
        for item in items:
            if item.picture is not None:
                self._shown.add(item.id)
            words = words_of(item.question)
            runs = set(runs_of(words)) if item.picture is None or len(words) >= WORDS else set()
            self._num_runs[item.id] = len(runs)
            for run in runs:
                self._items[run].add(item.id)

    def look(self, row: Row) -> set[str]:
        """Ids of the items whose question the row holds."""
        held = set()
        for text in _questions(row):
            counts = Counter(id for run in set(runs_of(words_of(text))) for id in self._items.get(run, ()))
            for id, count in counts.items():
                share = count / self._num_runs[id]
                if share >= MIN_SHARE:
                    held.add(id)
                    self.found.setdefault(id, Overlap(item=id, by="question", row=row.id, share=share))
        return held

    def with_picture(self, questions: set[str], pictures: set[str]) -> set[str]:
        """Of what one row holds, the items that it holds whole."""
        return {id for id in pictures if id in questions or not self._num_runs[id]} | (questions - self._shown)


def _questions(row: Row) -> Iterator[str]:
    for message in row.messages:
        if message.role == "user":
            yield " ".join(part.text for part in message.content if isinstance(part, TextPart))


class Pictures:
    """The benchmark's pictures, and which of them the training data held."""

    def __init__(self, items: Iterable[Item]) -> None:
        self.found: dict[str, Overlap] = {}
        self._ids: list[str] = []
        self._files: dict[str, list[str]] = defaultdict(list)
        hashes, colours = [], []
        for item in items:
            if item.picture is None:
                continue
            self._files[sha256(item.picture.encoded()).hexdigest()].append(item.id)
            look = look_of(item.picture.decoded())
            if look is not None:
                self._ids.append(item.id)
                hashes.append(look.hash_4)
                colours.append(look.fields_HWC)
        self._hashes_N4 = np.stack(hashes) if hashes else np.zeros((0, 4), np.uint64)
        self._fields_NHWC = np.stack(colours) if colours else np.zeros((0, HASH_SIDE, HASH_SIDE, 3), np.int16)
        self._seen: dict[str, frozenset[str]] = {}
        """Hash of a training picture -> ids of the items whose picture it is."""

    def look(self, data: CanonicalDataset, rows: Iterable[Row], pool: ThreadPoolExecutor) -> None:
        """Raises DatasetError for a picture that cannot be read."""
        if not self._files:
            return
        new: dict[str, tuple[str, Path]] = {}
        for row in rows:
            for part in row.images:
                if part.sha256 in self._seen:
                    continue
                self._seen[part.sha256] = frozenset(self._files.get(part.sha256, ()))
                for id in self._seen[part.sha256]:
                    self.found[id] = Overlap(item=id, by="picture", row=row.id, differing_bits=0)
                new[part.sha256] = (row.id, data.image_path(part))
        looks = pool.map(_look_of_file, (path for _, path in new.values()))
        for (digest, (row_id, _)), look in zip(new.items(), looks, strict=True):
            if look is not None:
                self._seen[digest] |= self._compare(row_id, look)

    def held(self, row: Row) -> set[str]:
        """Ids of the items whose picture the row shows; look has seen it."""
        return set().union(*(self._seen.get(part.sha256, ()) for part in row.images))

    def _compare(self, row_id: str, look: Look) -> set[str]:
        alike = set()
        differing_N = np.bitwise_count(self._hashes_N4 ^ look.hash_4).sum(axis=1)
        for number in np.flatnonzero(differing_N <= MAX_DIFFERING_BITS):
            if np.abs(self._fields_NHWC[number] - look.fields_HWC).max() > MAX_FIELD_DIFFERENCE:
                continue
            id, differing = self._ids[number], int(differing_N[number])
            alike.add(id)
            known = self.found.get(id)
            if known is None or (known.differing_bits or 0) > differing:
                self.found[id] = Overlap(item=id, by="picture", row=row_id, differing_bits=differing)
        return alike


@dataclass(frozen=True)
class Look:
    """What is compared of a picture."""

    hash_4: np.ndarray
    """256 bits as 4 uint64: whether each of 16 x 16 fields is darker than its right neighbour."""
    fields_HWC: np.ndarray
    """Mean colours of 16 x 16 fields, int16."""


def _look_of_file(path: Path) -> Look | None:
    try:
        with Image.open(path) as image:
            image.draft("RGB", (4 * HASH_SIDE, 4 * HASH_SIDE))  # a JPEG is decoded small
            return look_of(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DatasetError(f"{path}: the training picture cannot be read ({error})") from None


def look_of(image: Image.Image) -> Look | None:
    """None for a picture that is nearly blank."""
    if image.mode in ("P", "LA", "PA", "RGBA"):  # transparency means white paper
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        paper.alpha_composite(image)
        image = paper
    small = image.convert("L").resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.BOX)
    brightness_HW = np.asarray(small, dtype=np.int16)
    bits_HW = brightness_HW[:, 1:] > brightness_HW[:, :-1]
    if bits_HW.sum() < MIN_SET_BITS:
        return None
    colours = image.convert("RGB").resize((HASH_SIDE, HASH_SIDE), Image.Resampling.BOX)
    return Look(np.packbits(bits_HW.reshape(-1)).view(np.uint64), np.asarray(colours, dtype=np.int16))
