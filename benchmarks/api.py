"""Status polls of our API beside a bare FastAPI route that reads the same row, with 10,000 jobs in the store.

Both are one uvicorn process on the same SQLite file, asked in turn over kept-alive connections, for long enough to see
each other's noise. The bare route checks no key, counts no requests, logs nothing and answers the row as it is; ours
answers the job as clients know it, with its place in the queue. Beside throughput, the processor time of a request is
compared, which other work on the machine disturbs less. Lists and claims are timed in one store of 100 jobs and one of
10,000, all waiting, which is the worst case for a claim.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import delete, insert
from sqlalchemy.orm import Session

from benchmarks.datasets import write_dataset
from service.jobs import keys, store
from service.jobs.database import Database
from service.jobs.ids import new_job_id
from service.jobs.phases import Kind, Queue
from service.jobs.tables import File, Job, Outbox
from service.settings import Settings
from vlm_dft.config import RunConfig, TrainConfig
from vlm_dft.data.canonical import Message, Row, TextPart

JOBS = 10_000
FEW_JOBS = 100
ROUNDS = 7
ROUND_SECONDS = 2.0
CONNECTIONS = 8
_TICKS = os.sysconf("SC_CLK_TCK")


def bare_app() -> Any:
    """For `uvicorn --factory benchmarks.api:bare_app`: the route to compare with."""
    from fastapi import FastAPI

    app = FastAPI()
    database = Database(Settings().resolved_database_url)
    columns = [column.key for column in Job.__table__.columns]

    @app.get("/jobs/{job_id}")
    def read_job(job_id: str) -> dict[str, Any]:
        with database.read() as s:
            job = s.get_one(Job, job_id)
            return {name: getattr(job, name) for name in columns}

    return app


def measure() -> dict[str, Any]:
    """The benchmark's line; ratio is our GET job's throughput over the bare route's."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        few = _Store(Path(name, "few"), FEW_JOBS)
        many = _Store(Path(name, "many"), JOBS)
        lists, claims = _list_ratio(few, many), _claim_ratio(few, many)
        ours = stack.enter_context(_server(many, "service.api.app:create_app"))
        bare = stack.enter_context(_server(many, "benchmarks.api:bare_app"))
        poll = _request("GET", f"/v1/fine_tuning/jobs/{many.job_ids[len(many.job_ids) // 2]}", many.key)
        plain = _request("GET", f"/jobs/{many.job_ids[len(many.job_ids) // 2]}", many.key)
        rounds = [(_load(ours, poll), _load(bare, plain)) for _ in range(ROUNDS + 1)][1:]
        body = json.dumps(many.body).encode()
        submits = _load(ours, _request("POST", "/v1/fine_tuning/jobs", many.key, body))
    return {
        "ratio": statistics.median(a.per_second / b.per_second for a, b in rounds),
        "cpu_ratio": statistics.median(b.cpu_seconds / a.cpu_seconds for a, b in rounds),
        "get_job_per_second": statistics.median(a.per_second for a, _ in rounds),
        "bare_route_per_second": statistics.median(b.per_second for _, b in rounds),
        "get_job_p99_milliseconds": statistics.median(a.p99_milliseconds for a, _ in rounds),
        "submits_per_second": submits.per_second,
        "submit_p99_milliseconds": submits.p99_milliseconds,
        "list_ratio": lists,
        "claim_ratio": claims,
        "jobs": JOBS,
        "few_jobs": FEW_JOBS,
        "rounds": ROUNDS,
    }


class _Store:
    """A database with so many waiting jobs, a model and a file to submit more, and a key."""

    def __init__(self, directory: Path, jobs: int) -> None:
        directory.mkdir()
        model = directory / "models" / "tiny"
        model.mkdir(parents=True)
        (model / "config.json").write_text('{"model_type": "qwen2"}')
        (model / "tokenizer.json").write_text("{}")
        self.environment = {
            **os.environ,
            "VLM_DFT_DATA_DIR": str(directory / "data"),
            "VLM_DFT_MODELS_DIR": str(directory / "models"),
            "VLM_DFT_REQUESTS_PER_MINUTE": "1000000000",
            "VLM_DFT_MIN_FREE_BYTES": "0",
        }
        settings = Settings(data_dir=directory / "data")
        self.database = Database(settings.resolved_database_url)
        self.database.upgrade()
        config = RunConfig(run_id="", train=TrainConfig(model=str(model), dataset=directory / "dataset"))
        file_id = self._file(directory / "dataset")
        new = store.NewJob(
            project="default",
            kind=Kind.FINE_TUNING,
            request={"model": "tiny"},
            config=config,
            runs_dir=settings.runs_dir,
            model="tiny",
            root="tiny",
            training_file=file_id,
        )
        with self.database.write() as s:
            self.job_ids = self._copies(s, store.submit(s, new), jobs)
        with self.database.write() as s:
            s.execute(delete(Outbox))  # their wake-ups were published
            self.key = keys.create_key(s, keys.load_secret(settings), "default", "benchmark")[1]
        self.body = {"model": "tiny", "training_file": file_id}

    def _copies(self, s: Session, job: Job, jobs: int) -> list[str]:
        """More waiting jobs like this one, some of other projects; ids of those that are the default project's."""
        values = {column.key: getattr(job, column.key) for column in Job.__table__.columns}
        projects = ["default" if number % 4 else f"team-{number % 3}" for number in range(1, jobs)]
        copies = [
            values | {"id": new_job_id(Kind.FINE_TUNING), "project": project, "queued_at": job.queued_at + number}
            for number, project in enumerate(projects)
        ]
        s.execute(insert(Job), copies)
        return [job.id, *(copy["id"] for copy in copies if copy["project"] == "default")]

    def _file(self, dataset: Path) -> str:
        """A processed training file."""
        question = Message(role="user", content=(TextPart(text="How many?"),))
        row = Row(id="rows.jsonl:1", messages=(question, Message(role="assistant", content=(TextPart(text="2"),))))
        dataset.mkdir()
        write_dataset(dataset, [row])
        with self.database.write() as s:
            file = File(
                id="file-of-the-benchmark",
                project="default",
                filename="rows.jsonl",
                purpose="fine-tune",
                bytes=1,
                status="processed",
                path=str(dataset),
                options={},
                created_at=0.0,
                dataset_path=str(dataset),
                fingerprint="0" * 64,
            )
            s.add(file)
            return file.id


def _list_ratio(few: _Store, many: _Store) -> float:
    def read(which: _Store) -> float:
        began = time.process_time()
        with which.database.read() as s:
            assert len(store.list_jobs(s, "default", Kind.FINE_TUNING, limit=20).rows) == 20
        return time.process_time() - began

    return _paired(read, few, many)


def _claim_ratio(few: _Store, many: _Store) -> float:
    def take(which: _Store) -> float:
        began = time.process_time()
        with which.database.write() as s:
            claim = store.claim(s, Queue.GPU, "benchmark:gpu:1", "cpu", 60.0)
        seconds = time.process_time() - began
        assert claim is not None
        with which.database.write() as s:
            assert store.release(s, claim, "benchmark")
        return seconds

    return _paired(take, few, many)


def _paired(timed: Any, few: _Store, many: _Store, rounds: int = 60) -> float:
    """Median of one operation's time in the large store over its time in the small one, taken in turn."""
    pairs = [(timed(many), timed(few)) for _ in range(rounds + 10)][10:]
    return statistics.median(pair[0] for pair in pairs) / statistics.median(pair[1] for pair in pairs)


@dataclass(frozen=True)
class _Server:
    port: int
    pid: int

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS


@contextmanager
def _server(which: _Store, factory: str) -> Iterator[_Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "--factory", factory, "--port", str(port), "--no-access-log"]
    log = which.environment["VLM_DFT_DATA_DIR"] + ".log"
    with Path(log).open("ab") as output:
        process = subprocess.Popen(command, env=which.environment, stdout=output, stderr=output)
    try:
        while True:
            assert process.poll() is None, Path(log).read_text()
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                time.sleep(0.05)
        yield _Server(port, process.pid)
    finally:
        process.kill()
        process.wait()


def _request(method: str, path: str, key: str, body: bytes = b"") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {key}\r\n"
    if body:
        head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + body


@dataclass(frozen=True)
class _Load:
    per_second: float
    cpu_seconds: float
    """Of the server, for one request."""
    p99_milliseconds: float


def _load(server: _Server, request: bytes) -> _Load:
    """Ask over several connections, each again as soon as it is answered."""
    connections = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(CONNECTIONS)]
    sent = []
    for connection in connections:
        connection.sendall(request)
        sent.append(time.perf_counter())
    cpu, began, latencies = server.cpu_seconds(), time.perf_counter(), []
    while time.perf_counter() - began < ROUND_SECONDS:
        for number, connection in enumerate(connections):
            _read_answer(connection)
            now = time.perf_counter()
            latencies.append(now - sent[number])
            sent[number] = now
            connection.sendall(request)
    seconds, cpu = time.perf_counter() - began, server.cpu_seconds() - cpu
    for connection in connections:
        _read_answer(connection)
        connection.close()
    p99 = sorted(latencies)[len(latencies) * 99 // 100]
    return _Load(len(latencies) / seconds, cpu / len(latencies), 1000 * p99)


def _read_answer(connection: socket.socket) -> None:
    data = connection.recv(1 << 16)
    head, _, body = data.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), data.decode()
    missing = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0]) - len(body)
    while missing > 0:
        missing -= len(connection.recv(1 << 16))
