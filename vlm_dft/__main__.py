"""python -m vlm_dft RUN_DIR: do what RUN_DIR/config.json says, and leave result.json behind as the last thing.

Exit codes:
    0   result.json says succeeded
    1   result.json says failed; without a result.json of this process, it crashed, and its traceback is in the log
    2   the command line is wrong: no such directory
    75  result.json says interrupted: SIGTERM or SIGINT came, a checkpoint was written, start again to go on
    76  the supervisor was gone and the process ended itself, without a result.json (``vlm_dft.watchdog``)

Output goes to the terminal; whoever starts this supervised redirects it to log.txt. Under torchrun every rank runs
this, the first one speaks. A validation runs without torch.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from vlm_dft import logs
from vlm_dft.config import EvalConfig, RunConfig, TrainConfig, ValidationConfig
from vlm_dft.errors import VlmDftError
from vlm_dft.interruption import Interrupted, StopRequest
from vlm_dft.isolation import block_sockets
from vlm_dft.results import ErrorRecord, RunResult
from vlm_dft.run_dir import RunDir
from vlm_dft.watchdog import die_with_parent, follow_lease

EXIT_CODES = {"succeeded": 0, "failed": 1, "interrupted": 75}

log = logging.getLogger("vlm_dft")


def main(arguments: list[str] | None = None) -> int:
    """Run; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m vlm_dft", description="Run what RUN_DIR/config.json says.")
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    run = RunDir(parser.parse_args(arguments).run_dir.absolute())
    block_sockets()
    if not run.path.is_dir():
        print(f"vlm_dft: {run.path} is not a directory", file=sys.stderr)
        return 2
    logs.configure(logging.INFO if _is_first_rank() else logging.WARNING)
    stop = StopRequest()
    stop.install()
    result = _result(run, stop)
    with stop.put_off():
        _write(run, result)
    return EXIT_CODES[result.status]


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _result(run: RunDir, stop: StopRequest) -> RunResult:
    if _is_first_rank():
        run.result_path.unlink(missing_ok=True)
    try:
        config = run.read_config()
        logs.name_lines(config)
        if config.supervision is not None:
            die_with_parent()
            follow_lease(run.lease_path, config.supervision.lease_timeout_seconds)
        return _execute(config, run, stop)
    except VlmDftError as error:
        log.error("%s: %s", error.code, error.message, exc_info=error)
        return RunResult(status="failed", error=_record(error))
    except Interrupted as interrupted:
        log.warning("interrupted: %s", interrupted)
        return RunResult(status="interrupted")


def _write(run: RunDir, result: RunResult) -> None:
    """The first rank's word counts; a failure is told by whichever rank met it, unless another did before."""
    if _is_first_rank() or (result.status == "failed" and not run.result_path.exists()):
        run.write_result(result)
        log.info("%s: %s", run.result_path, result.status)


def _execute(config: RunConfig, run: RunDir, stop: StopRequest) -> RunResult:
    if config.validation is not None:
        return _validate(config.validation, run)
    if config.preflight is not None:
        with _uncollected():
            from vlm_dft.preflight import preflight
        return RunResult(status="succeeded", preflight=preflight(config.preflight, run, stop=stop))
    if config.train is None:
        assert config.evaluation is not None, "RunConfig checks that there is something to do"
        return _evaluate(config.evaluation, run, RunResult(status="succeeded"), None)
    with _uncollected():
        from vlm_dft.environment import recorded_environment
        from vlm_dft.trainer import train
    with recorded_environment(run, config.train) if _is_first_rank() else nullcontext():
        result = RunResult(status="succeeded", train=train(config.train, run, stop=stop))
    _free_memory()
    if config.evaluation is None or not _is_first_rank():
        return result
    return _evaluate(config.evaluation, run, result, config.train)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Import without the garbage collector, and never let it look through that again: a fifth of the start's time."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _validate(config: ValidationConfig, run: RunDir) -> RunResult:
    from vlm_dft.data.validation import refusal, validate

    report = validate(config, run, isolated=True)
    reason = refusal(report)
    if reason is None:
        return RunResult(status="succeeded", validation=report)
    error = ErrorRecord(code="invalid_training_file", message=reason, category="user")
    return RunResult(status="failed", error=error, validation=report)


def _evaluate(config: EvalConfig, run: RunDir, result: RunResult, trained: TrainConfig | None) -> RunResult:
    """Scores added to result; after a training, a failing evaluation does not fail the run."""
    from vlm_dft.evaluation import evaluate

    tuned = config.model or str(run.export_path)
    if trained is not None and config.training_dataset is None:
        config = config.model_copy(update={"training_dataset": trained.dataset})
    base = trained if config.include_base else None
    try:
        scores = evaluate(config, run, tuned=tuned, base=base and base.model, base_revision=base and base.revision)
    except VlmDftError as error:
        if trained is None:
            raise
        log.error("the evaluation failed: %s", error.message, exc_info=error)
        return result.model_copy(update={"evaluation_error": _record(error)})
    return result.model_copy(update={"scores": scores})


def _free_memory() -> None:
    """The trained model is garbage by now, in cycles; the evaluation needs its memory."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _record(error: VlmDftError) -> ErrorRecord:
    return ErrorRecord(
        code=error.code,
        message=error.message,
        param=error.param,
        hint=error.hint,
        category=error.category,
        retryable=error.retryable,
    )


if __name__ == "__main__":
    sys.exit(main())
