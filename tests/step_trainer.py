"""A small trainer that keeps the run directory's contract: for tests of what supervises it.

Started through settings.trainer_python as `-m vlm_dft RUN_DIR` would be. The job's dataset names a JSON plan:
{"step_seconds": 0.1, "crash": {"1": 3}, "stubborn": false, "unsupervised": false}: attempt 1 exits at step 3; a
stubborn one ignores SIGTERM; an unsupervised one neither follows its lease nor its parent (the control of the tests).
Each step is journalled with attempt and process id, so that overlapping executions show.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from vlm_dft.results import Progress, RunResult, StepMetrics, TrainResult
from vlm_dft.run_dir import CHECKPOINT_MARKER, RunDir, directory_in_place, write_json
from vlm_dft.watchdog import die_with_parent, follow_lease

STEP_SECONDS = 0.15


def journal(run: RunDir, step: int, what: str = "step") -> None:
    attempt = int(run.path.name.removeprefix("attempt-"))
    facts = {"attempt": attempt, "pid": os.getpid(), "step": step, "what": what, "time": time.monotonic()}
    line = json.dumps(facts)
    descriptor = os.open(run.path.parent / "journal.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, line.encode() + b"\n")
    os.close(descriptor)


def metrics(step: int) -> StepMetrics:
    numbers = dict.fromkeys(StepMetrics.model_fields, 1.0)
    return StepMetrics.model_validate(numbers | {"step": step, "num_tokens": 8, "input_tokens": 16, "num_samples": 1})


def checkpoint(run: RunDir, step: int, keep: int) -> None:
    with directory_in_place(run.checkpoint_path(step)) as directory:
        write_json(directory / "state.json", {"step": step})
        write_json(directory / CHECKPOINT_MARKER, {"step": step, "metrics": {"nll": 1.0 / step}})
    for old in run.complete_checkpoints()[:-keep]:
        (old.path / CHECKPOINT_MARKER).unlink()


def main() -> None:
    run = RunDir(Path(sys.argv[-1]))
    config = run.read_config()
    assert config.train is not None
    train = config.train
    # A real dataset instead of a plan: this job came through the API.
    plan = json.loads(train.dataset.read_text()) if train.dataset.is_file() else {"step_seconds": STEP_SECONDS}
    if not plan.get("unsupervised"):
        die_with_parent()
        assert config.supervision is not None
        follow_lease(run.lease_path, config.supervision.lease_timeout_seconds)
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: None if plan.get("stubborn") else asked.append(number))
    attempt = run.path.name.removeprefix("attempt-")
    resumed = None
    if train.resume_from is not None:
        resumed = json.loads((train.resume_from / "state.json").read_bytes())["step"]
    total = train.max_steps or 5
    journal(run, resumed or 0, "start")
    for step in range((resumed or 0) + 1, total + 1):
        time.sleep(plan["step_seconds"])
        journal(run, step)
        run.append_metrics(metrics(step))
        run.write_progress(Progress(phase="running", step=step, total_steps=total))
        if plan.get("crash", {}).get(attempt) == step:
            print(f"about to fail at step {step}", flush=True)
            os._exit(3)
        if step % train.checkpoint_every_steps == 0 or asked:
            checkpoint(run, step, train.keep_checkpoints)
        if asked:
            run.write_result(RunResult(status="interrupted"))
            journal(run, step, "interrupted")
            return
    run.export_path.mkdir()
    journal(run, total, "end")
    run.write_result(RunResult(status="succeeded", train=result(total, resumed)))


def result(steps: int, resumed: int | None) -> TrainResult:
    return TrainResult(
        steps=steps,
        trained_tokens=8 * steps,
        input_tokens=16 * steps,
        num_samples=steps,
        dropped_samples=0,
        first_nll=1.0,
        last_nll=1.0,
        wall_seconds=1.0,
        resumed_from_step=resumed,
        export="export",
        model_sha256="0" * 64,
        data_fingerprint="0" * 64,
        device="cpu",
        precision="fp32",
        image_backend="none",
        versions={},
    )


if __name__ == "__main__":
    main()
