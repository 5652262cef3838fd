"""The real API on a real uvicorn, with the store in the worker's place: for tests of the service without a trainer.

Jobs are driven by the same store functions that a worker calls; files become processed with a canonical dataset that
is written here, so no torch and no tokenizer is needed.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import uvicorn
from sqlalchemy import select
from store_samples import trained
from throwaway import wait_until

from service.api.app import create_app
from service.jobs import keys, store
from service.jobs.database import Database
from service.jobs.phases import Queue
from service.jobs.tables import File, Job
from service.settings import Settings
from vlm_dft.data.canonical import ImagePart, Manifest, Message, Row, TextPart
from vlm_dft.data.tokens import tokenizer_sha256
from vlm_dft.results import ErrorRecord, RunResult, ValidationReport
from vlm_dft.run_dir import RunDir

CHAT_LINE = json.dumps(
    {"messages": [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "2"}]}
)
JSONL = (CHAT_LINE + "\n").encode() * 10


def write_model(directory: Path, model_type: str = "qwen2_5_vl") -> Path:
    """What the API reads of a model: its type and its tokenizer."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    (directory / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": model_type}))
    return directory


@dataclass
class Api:
    """A running server, and the ways into it."""

    settings: Settings
    database: Database
    url: str
    opened: list[Any] = field(default_factory=list)

    def client(self, key: str = "none", *, strict: bool = False, **options: Any) -> openai.OpenAI:
        client = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key, _strict_response_validation=strict, **{"timeout": 20.0, **options}
        )
        self.opened.append(client)
        return client

    def http(self, key: str | None = None) -> httpx.Client:
        """For what the stock client cannot send."""
        headers = {"authorization": f"Bearer {key}"} if key else {}
        client = httpx.Client(base_url=self.url, headers=headers, timeout=20.0)
        self.opened.append(client)
        return client

    def key(self, project: str) -> str:
        """A new key of a project."""
        with self.database.write() as s:
            return keys.create_key(s, keys.load_secret(self.settings), project, "test")[1]

    def settle(self, file_id: str, rows: Sequence[Row] | None = None, *, model: str | None = "tiny") -> None:
        """Be the CPU worker: validate the file with success, counted with the model's tokenizer."""
        claim = self._claim(Queue.CPU, lambda job: job.subject_file == file_id)
        run = RunDir(claim.run_path)
        rows = rows if rows is not None else [text_row(number) for number in range(1, 11)]
        sha256 = tokenizer_sha256(self.settings.resolved_models_dir / model) if model else None
        report = write_dataset(run.dataset_path, rows, sha256)
        with self.database.write() as s:
            assert store.succeed(s, claim, RunResult(status="succeeded", validation=report))

    def refuse(self, file_id: str, message: str) -> None:
        """Be the CPU worker: find the file unusable."""
        claim = self._claim(Queue.CPU, lambda job: job.subject_file == file_id)
        error = ErrorRecord(code="invalid_training_file", message=message, category="user")
        with self.database.write() as s:
            assert store.fail(s, claim, error, None)

    def claim(self, job_id: str) -> store.Claim:
        """Be a GPU worker that takes this job."""
        return self._claim(Queue.GPU, lambda job: job.id == job_id)

    def _claim(self, queue: Queue, wanted: Any) -> store.Claim:
        with self.database.write() as s:
            claim = store.claim(s, queue, "test:worker:1", "cpu", 60.0)
            assert claim is not None, "nothing waits"
            job = s.get(Job, claim.job_id)
            assert wanted(job), f"another job was first: {claim.job_id}"
        claim.run_path.mkdir(parents=True, exist_ok=True)
        return claim

    def finish(self, claim: store.Claim, **fields: Any) -> None:
        """End a training well, with an export on disk."""
        write_model(claim.run_path / "export")
        with self.database.write() as s:
            assert store.succeed(s, claim, trained().model_copy(update=fields))

    def ready_file(self, client: openai.OpenAI, rows: Sequence[Row] | None = None, **options: Any) -> str:
        """Id of an uploaded and processed training file."""
        file_id = client.files.create(file=("train.jsonl", JSONL), purpose="fine-tune").id
        self.settle(file_id, rows, **options)
        return file_id

    def count(self, table: type[Any], *conditions: Any) -> int:
        with self.database.read() as s:
            return len(s.scalars(select(table).where(*conditions)).all())

    def stored_names(self) -> set[str]:
        """Everything in the directory of uploaded bytes."""
        return {path.name for path in self.settings.files_dir.iterdir()}

    def known_names(self) -> set[str]:
        with self.database.read() as s:
            return {Path(path).name for path in s.scalars(select(File.path).where(File.deleted_at.is_(None)))}


def text_row(number: int, tokens: int = 12, images: Sequence[tuple[int, int]] = ()) -> Row:
    """A row of so many text tokens and pictures of these sizes."""
    pictures = tuple(ImagePart(image="x.png", sha256="0" * 64, width=w, height=h) for w, h in images)
    question = Message(role="user", content=(*pictures, TextPart(text="What is 1 + 1?")))
    answer = Message(role="assistant", content=(TextPart(text="2"),))
    return Row(id=f"train.jsonl:{number}", messages=(question, answer), text_tokens=tokens, supervised_tokens=2)


def write_dataset(directory: Path, rows: Sequence[Row], tokenizer: str | None) -> ValidationReport:
    """A canonical dataset as validation leaves it, and its report."""
    directory.mkdir(parents=True)
    lines = "".join(row.model_dump_json() + "\n" for row in rows)
    (directory / "rows.jsonl").write_text(lines)
    fingerprint = hashlib.sha256(lines.encode()).hexdigest()
    manifest = Manifest(
        rows=len(rows),
        format="openai",
        filename="train.jsonl",
        image_root=".",
        fingerprint=fingerprint,
        tokenizer_sha256=tokenizer,
    )
    (directory / "dataset.json").write_text(manifest.model_dump_json())
    return ValidationReport(
        filename="train.jsonl",
        format="openai",
        rows=len(rows),
        valid=len(rows),
        invalid=0,
        images=sum(len(row.images) for row in rows),
        duplicates=0,
        problems=(),
        overlong=0,
        overlong_rows=(),
        max_length_tokens=4096,
        tokens=None,
        fingerprint=fingerprint,
        dataset=directory.name,
    )


@contextmanager
def serve(directory: Path, database_url: str, **settings: Any) -> Iterator[Api]:
    """The API with one vision model "tiny" and one text model "tiny-text", and an empty migrated database."""
    models = directory / "models"
    if not models.exists():
        write_model(models / "tiny")
        write_model(models / "tiny-text", "qwen2")
    defaults: dict[str, Any] = {
        "data_dir": directory / "data",
        "database_url": database_url,
        "models_dir": models,
        "benchmarks": directory / "benchmarks",
        "min_free_bytes": 0,
        "poll_seconds": 0.05,
    }
    chosen = Settings(**(defaults | settings))
    config = uvicorn.Config(create_app(chosen), port=0, log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    database = Database(database_url)
    try:
        wait_until(lambda: server.started, 20, "uvicorn starts")
        port = server.servers[0].sockets[0].getsockname()[1]
        api = Api(chosen, database, f"http://127.0.0.1:{port}")
        try:
            yield api
        finally:
            for client in api.opened:
                client.close()
    finally:
        server.should_exit = True
        thread.join(20)
        database.close()
    assert not thread.is_alive()
