"""Valid jobs, files and results for tests of the store."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from sqlalchemy import update
from sqlalchemy.orm import Session

from service.jobs.files import NewFile, create_file
from service.jobs.ids import new_id
from service.jobs.phases import Kind
from service.jobs.submission import NewJob
from service.jobs.tables import File, Job
from vlm_dft.config import EvalConfig, RunConfig, TrainConfig, ValidationConfig
from vlm_dft.results import ErrorRecord, RunResult, TrainResult, ValidationReport

RUNS = Path("/data/runs")
CRASHED = ErrorRecord(code="trainer_crashed", message="exit code 1")
NAN = ErrorRecord(code="nan_loss", message="the loss is not finite at step 3", category="user")


def new_job(project: str = "default", kind: Kind = Kind.FINE_TUNING, **fields: Any) -> NewJob:
    if kind is Kind.FINE_TUNING:
        config = RunConfig(run_id="", train=TrainConfig(model="/models/tiny", dataset=Path("/data/dataset")))
    else:
        benchmark = {"name": "mathverse", "kind": "mathverse", "path": "/data/mathverse.tsv"}
        config = RunConfig(run_id="", evaluation=EvalConfig.model_validate({"model": "/m", "benchmarks": [benchmark]}))
    defaults: dict[str, Any] = {"model": "tiny", "root": "tiny", "request": {"model": "tiny"}, "runs_dir": RUNS}
    return NewJob(project=project, kind=kind, config=config, **(defaults | fields))


def new_file(s: Session, project: str = "default", **fields: Any) -> File:
    """A training file with its validation job queued."""
    file_id = new_id("file-")
    path = fields.pop("path", Path("/data/files") / file_id)
    defaults: dict[str, Any] = {"filename": "train.jsonl", "purpose": "fine-tune", "bytes": 10, "sha256": "0" * 64}
    new = NewFile(id=file_id, project=project, path=path, **(defaults | fields))
    return create_file(s, new, runs_dir=RUNS, validation=ValidationConfig(source=path, filename=new.filename))


def trained(**fields: Any) -> RunResult:
    numbers: dict[str, Any] = {
        "steps": 40,
        "trained_tokens": 1234,
        "input_tokens": 5678,
        "num_samples": 320,
        "dropped_samples": 0,
        "first_nll": 2.0,
        "last_nll": 1.0,
        "wall_seconds": 3.0,
        "export": "export",
        "model_sha256": "a" * 64,
        "data_fingerprint": "b" * 64,
        "device": "cpu",
        "precision": "fp32",
        "image_backend": "pil",
        "versions": {},
    }
    return RunResult(status="succeeded", train=TrainResult(**(numbers | fields)))


def validated(*, accepted: bool) -> RunResult:
    report = ValidationReport(
        filename="train.jsonl",
        format="openai",
        rows=10,
        valid=10 if accepted else 0,
        invalid=0 if accepted else 10,
        images=0,
        duplicates=0,
        problems=(),
        overlong=0,
        overlong_rows=(),
        max_length_tokens=4096,
        tokens=None,
        fingerprint="c" * 64,
        dataset="dataset" if accepted else None,
    )
    if accepted:
        return RunResult(status="succeeded", validation=report)
    error = ErrorRecord(code="invalid_training_file", message="10 of 10 rows are invalid", category="user")
    return RunResult(status="failed", error=error, validation=report)


def step_metrics(step: int, nll: float = 1.5) -> dict[str, Any]:
    return {"step": step, "nll": nll, "token_accuracy": 0.5, "objective_loss": nll / 2, "time": time.time()}


def expire_lease(s: Session, job_id: str) -> None:
    """Let the job's lease have ended a second ago."""
    s.execute(update(Job).where(Job.id == job_id).values(lease_until=Job.lease_until - 1e6))
