"""Check one training file, write it as a canonical dataset, and say what was found. Torch-free.

Every row is parsed and every picture decoded before anything is queued. Rows stream: the file never sits in memory. The
dataset appears whole or not at all. A file that is refused is no exception here: its report has dataset None, and
``refusal`` says why in one line.
"""

from __future__ import annotations

import hashlib
import os
import time
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

from vlm_dft.config import DatasetFormat, ValidationConfig
from vlm_dft.data.canonical import MANIFEST_NAME, ROWS_NAME, Manifest, Row
from vlm_dft.data.decoder import DecoderLimits, Decoders, decoders
from vlm_dft.data.formats import detect
from vlm_dft.data.problems import FileError, RowError, shown
from vlm_dft.data.process import keep_torch_out, memory_limit
from vlm_dft.data.records import Record, count_lines, read_records
from vlm_dft.data.rows import Prepared, RowReader, content_digest, count_tokens, keep_pictures
from vlm_dft.data.source import Source, open_source
from vlm_dft.data.template import ChatTemplate
from vlm_dft.data.tokenizer import load_template
from vlm_dft.data.tokens import overlong, row_tokens, tokenizer_sha256
from vlm_dft.results import Distribution, Progress, RowProblem, TokenStatistics, ValidationReport
from vlm_dft.run_dir import RunDir, directory_in_place, disk_errors, write_json

MEMORY_BYTES = 4 * 2**30
"""How much validation may need beyond what the process has mapped when it starts."""
_WORKERS = min(4, os.cpu_count() or 1)
_WINDOW_BYTES = 128 * 2**20
"""Rows in work at a time hold no more than this, beyond the one that comes next."""
_PROGRESS_SECONDS = 1.0


def validate(config: ValidationConfig, run: RunDir, *, isolated: bool = False) -> ValidationReport:
    """Validate config.source into run's dataset directory. Raises ModelError for the tokenizer, DiskFullError.

    isolated: pictures are decoded in processes of their own, so that one that breaks its decoder costs only its row.
    """
    keep_torch_out()
    template = load_template(config.tokenizer) if config.tokenizer else None
    run.write_progress(Progress(phase="validating", items_done=0))
    try:
        with (
            memory_limit(MEMORY_BYTES),
            disk_errors(run.path),
            TemporaryDirectory(prefix=".unpacked-", dir=run.path) as work,
        ):
            source = open_source(config, Path(work) / "files")
            decoder = DecoderLimits(memory_bytes=min(MEMORY_BYTES, DecoderLimits.memory_bytes))
            with (
                decoders(config.limits, config.pixels, decoder) if isolated else nullcontext() as pool,
                directory_in_place(run.dataset_path) as target,
            ):
                return _Validation(config, run, source, template, target, pool).run()
    except FileError as error:
        return _unreadable(config, error.problem)
    except _RefusedError as error:
        return error.report


def refusal(report: ValidationReport) -> str | None:
    """Why the file was refused, in one line; None when it was accepted."""
    if report.dataset is not None:
        return None
    if not report.problems:
        return f"{report.filename}: the file holds no rows"
    first = report.problems[0]
    place = ", ".join(part for part in (first.file, f"line {first.line}" if first.line else "", first.field) if part)
    if not report.rows:
        return f"{place}: {first.reason}"
    return f"{report.invalid} of {report.rows} rows are invalid; the first: {place}: {first.reason}"


class _RefusedError(Exception):
    """Unwinds the half-written dataset."""

    def __init__(self, report: ValidationReport) -> None:
        super().__init__(report.filename)
        self.report = report


@dataclass
class _Counts:
    """What is known so far."""

    rows: int = 0
    valid: int = 0
    images: int = 0
    duplicates: int = 0
    overlong: int = 0
    problems: list[RowProblem] = field(default_factory=list)
    overlong_rows: list[RowProblem] = field(default_factory=list)
    seen: set[bytes] = field(default_factory=set)
    text: array[int] = field(default_factory=lambda: array("q"))
    visual: array[int] = field(default_factory=lambda: array("q"))
    supervised: array[int] = field(default_factory=lambda: array("q"))


class _Validation:
    """One run over one source."""

    def __init__(
        self,
        config: ValidationConfig,
        run: RunDir,
        source: Source,
        template: ChatTemplate | None,
        target: Path,
        decoders: Decoders | None,
    ) -> None:
        self.config = config
        self.directory = run
        self.source = source
        self.template = template
        self.target = target
        self.decoders = decoders
        self.counts = _Counts()
        self.fingerprint = hashlib.sha256()
        self.started = time.monotonic()
        self.reported = self.started
        self.total = count_lines(source.data_file)

    def run(self) -> ValidationReport:
        """The report of an accepted file. Raises _RefusedError with that of a refused one, FileError."""
        records = read_records(self.source.data_file, self.source.name, self.config.limits.max_row_bytes)
        first, records = _peek(records)
        chosen = self._format(first)
        reader = RowReader(self.config, self.source, chosen, self.decoders)
        with (self.target / ROWS_NAME).open("w", encoding="utf-8") as rows:
            for record, outcome in _in_order(reader, records):
                self._take(record, outcome, rows)
        counts = self.counts
        invalid = counts.rows - counts.valid
        refused = counts.valid == 0 or invalid > self.config.max_invalid_fraction * counts.rows
        report = self._report(chosen, None if refused else self.directory.dataset_path.name)
        if refused:
            raise _RefusedError(report)
        self._write_manifest(report)
        self._progress(done=True)
        return report

    def _format(self, first: list[Record]) -> DatasetFormat:
        if self.config.format != "auto":
            return self.config.format
        for record in first:
            if isinstance(record.value, dict):
                found = detect(record.value)
                if found:
                    return found
                reason = (
                    f"the row's fields {shown(sorted(record.value), 120)} are of no known format: problem, answer, "
                    "refined_cot and image_path (WeThink), messages (OpenAI) or conversations (ShareGPT) are expected"
                )
                raise FileError(self.source.name, "unknown_format", reason, line=record.number)
        return "openai"  # no row is an object: each will be reported as that

    def _take(self, record: Record, outcome: Prepared | RowError, rows: IO[str]) -> None:
        counts = self.counts
        counts.rows += 1
        try:
            if isinstance(outcome, RowError):
                raise outcome
            row = count_tokens(outcome, self.template) if self.template else outcome.row
        except RowError as error:
            if len(counts.problems) < self.config.limits.max_reported_rows:
                counts.problems.append(error.at(self.source.name, record.number))
        else:
            if self.source.copies:
                keep_pictures(outcome, self.target)
            rows.write(row.model_dump_json() + "\n")
            self._count(row)
        self._progress(position=record.position)

    def _count(self, row: Row) -> None:
        counts = self.counts
        counts.valid += 1
        counts.images += len(row.images)
        digest = content_digest(row)
        self.fingerprint.update(digest)
        counts.duplicates += digest[:16] in counts.seen
        counts.seen.add(digest[:16])
        if row.text_tokens is None or row.supervised_tokens is None:
            return
        tokens = row_tokens(row, self.config.pixels)
        counts.text.append(row.text_tokens)
        counts.visual.append(tokens - row.text_tokens)
        counts.supervised.append(row.supervised_tokens)
        if tokens > self.config.max_length_tokens:
            counts.overlong += 1
            if len(counts.overlong_rows) < self.config.limits.max_reported_rows:
                counts.overlong_rows.append(overlong(row.id, tokens, self.config.max_length_tokens))

    def _progress(self, *, position: int = 0, done: bool = False) -> None:
        now = time.monotonic()
        if not done and now - self.reported < _PROGRESS_SECONDS:
            return
        self.reported = now
        size = self.source.data_file.stat().st_size
        remaining = 0.0 if done else (now - self.started) * (size - position) / max(position, 1)
        total = self.counts.rows if done else self.total
        progress = Progress(
            phase="validating", items_done=self.counts.rows, items_total=total, seconds_remaining=max(0.0, remaining)
        )
        self.directory.write_progress(progress)

    def _write_manifest(self, report: ValidationReport) -> None:
        manifest = Manifest(
            rows=report.valid,
            format=report.format,
            filename=report.filename,
            image_root="." if self.source.copies else str(self.source.root),
            fingerprint=report.fingerprint,
            tokenizer_sha256=report.tokens.tokenizer_sha256 if report.tokens else None,
        )
        write_json(self.target / MANIFEST_NAME, manifest)

    def _report(self, chosen: DatasetFormat, dataset: str | None) -> ValidationReport:
        counts = self.counts
        return ValidationReport(
            filename=self.config.filename,
            format=chosen,
            rows=counts.rows,
            valid=counts.valid,
            invalid=counts.rows - counts.valid,
            images=counts.images,
            duplicates=counts.duplicates,
            problems=tuple(counts.problems),
            overlong=counts.overlong,
            overlong_rows=tuple(counts.overlong_rows),
            max_length_tokens=self.config.max_length_tokens,
            tokens=self._tokens(),
            fingerprint=self.fingerprint.hexdigest(),
            dataset=dataset,
        )

    def _tokens(self) -> TokenStatistics | None:
        config, counts = self.config, self.counts
        if not config.tokenizer or not counts.text:
            return None
        return TokenStatistics(
            tokenizer=config.tokenizer,
            tokenizer_sha256=tokenizer_sha256(config.tokenizer),
            min_pixels=config.pixels.min_pixels,
            max_pixels=config.pixels.max_pixels,
            text=Distribution.of(counts.text),
            visual=Distribution.of(counts.visual),
            supervised=Distribution.of(counts.supervised),
            total=Distribution.of([text + visual for text, visual in zip(counts.text, counts.visual, strict=True)]),
        )


def _peek(records: Iterator[Record]) -> tuple[list[Record], Iterator[Record]]:
    """The first records up to the first object, and all records."""
    first = []
    for record in records:
        first.append(record)
        if isinstance(record.value, dict):
            break
    return first, _chained(first, records)


def _chained(first: list[Record], rest: Iterator[Record]) -> Iterator[Record]:
    yield from first
    yield from rest


def _in_order(reader: RowReader, records: Iterable[Record]) -> Iterator[tuple[Record, Prepared | RowError]]:
    """Prepare records in threads, give them back in order, hold only a few."""
    pending: deque[tuple[Record, Future[Prepared | RowError]]] = deque()
    held = 0
    pool = ThreadPoolExecutor(_WORKERS)
    try:
        for record in records:
            pending.append((record, pool.submit(_prepared, reader, record)))
            held += record.size
            while len(pending) > 1 and (len(pending) > 4 * _WORKERS or held > _WINDOW_BYTES):
                done, future = pending.popleft()
                held -= done.size
                yield done, future.result()
        for record, future in pending:
            yield record, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _prepared(reader: RowReader, record: Record) -> Prepared | RowError:
    if isinstance(record.value, RowError):
        return record.value
    try:
        return reader.prepare(record.value, record.number)
    except RowError as error:
        return error
    except MemoryError:
        return RowError("", "row_needs_too_much_memory", "the row and its pictures need too much memory together")


def _unreadable(config: ValidationConfig, problem: RowProblem) -> ValidationReport:
    """The report of a file that could not be read to its end."""
    return ValidationReport(
        filename=config.filename,
        format=config.format,
        rows=0,
        valid=0,
        invalid=0,
        images=0,
        duplicates=0,
        problems=(problem,),
        overlong=0,
        overlong_rows=(),
        max_length_tokens=config.max_length_tokens,
        tokens=None,
        fingerprint="",
        dataset=None,
    )
