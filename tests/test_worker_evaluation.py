"""An evaluation's later attempts are told where the earlier ones left their answers."""

from __future__ import annotations

import sys
from pathlib import Path

from worker_stack import running_stack, step_settings

from service.jobs import store
from service.jobs.phases import Kind, Queue
from vlm_dft.config import RunConfig
from vlm_dft.run_dir import RunDir
from worker.record import Outcome
from worker.supervise import Attempt, StopFlag


def test_each_later_attempt_of_an_evaluation_goes_on_from_the_one_before(tmp_path: Path) -> None:
    python = tmp_path / "crashing-python"
    python.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'raise SystemExit(9)'\n")
    python.chmod(0o755)
    evaluation = {"model": "/none", "benchmarks": [{"name": "a", "kind": "wemath", "path": "/none"}]}
    with running_stack(step_settings(tmp_path, trainer_python=python, max_crashes=3)) as stack:
        new = store.NewJob(
            project="default",
            kind=Kind.EVALUATION,
            request={},
            config=RunConfig.model_validate({"run_id": "?", "evaluation": evaluation}),
            runs_dir=stack.settings.runs_dir,
            model="tiny",
            root="tiny",
        )
        with stack.database.write() as s:
            job_id = store.submit(s, new).id
        outcomes = []
        for _ in range(3):
            with stack.database.write() as s:
                claim = store.claim(s, Queue.GPU, "test", "cpu", stack.settings.lease_seconds)
            assert claim is not None
            outcomes.append(Attempt(stack.database, stack.settings, claim, num_gpus=0, stop=StopFlag()).run())
        assert outcomes == [Outcome.RECOVERING, Outcome.RECOVERING, Outcome.FAILED]
        attempts = [RunDir(stack.settings.runs_dir / job_id / f"attempt-{n}") for n in (1, 2, 3)]
        configs = [run.read_config().evaluation for run in attempts]
    resumed = [config.resume_from for config in configs if config]
    assert resumed == [None, attempts[0].path, attempts[1].path]
