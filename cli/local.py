"""`vlm-dft train`: validate and fine-tune on this machine with no service in sight, as `python -m vlm_dft` does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from cli.client import EXIT_FAILED, EXIT_USAGE, AsJson, messages, out, print_error, print_json
from cli.requests import put_pairs
from cli.submit import print_problems
from vlm_dft.config import RunConfig
from vlm_dft.results import RunResult
from vlm_dft.run_dir import RunDir

_STDERR = 2
"""Its file descriptor, for a process of which standard output is not wanted."""


def train(
    training_file: Annotated[Path, typer.Argument(exists=True, help="JSONL, archive or dataset directory.")],
    model: Annotated[Path, typer.Option(exists=True, file_okay=False, help="Directory of the base model.")],
    run_dir: Annotated[Path, typer.Option(help="Where everything is written.")],
    objective: Annotated[str, typer.Option(help="nll (SFT), dft, or another of the family.")] = "dft",
    validation_file: Annotated[Path | None, typer.Option(exists=True)] = None,
    lora: Annotated[bool, typer.Option("--lora")] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE of TrainConfig, as in objective.alpha=0.5; repeatable.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Validate a file, then fine-tune on it, in this terminal."""
    train_config: dict[str, Any] = {
        "model": str(model.resolve()),
        "objective": {"name": objective},
        "adapter": {"type": "lora" if lora else "full"},
    }
    put_pairs(train_config, set_ or [])
    train_config["dataset"] = str(_validated(training_file, model, run_dir / "training-file", train_config, as_json))
    if validation_file:
        held_out = _validated(validation_file, model, run_dir / "validation-file", train_config, as_json)
        train_config["validation_dataset"] = str(held_out)
    result = _run(RunDir(run_dir), {"run_id": run_dir.name, "train": train_config}, as_json)
    assert result.train is not None, "a training that succeeded has its result"
    if as_json:
        _print_result(result, run_dir)
        return
    out.print(
        f"succeeded: {result.train.steps} steps, NLL {result.train.first_nll:.3f} -> "
        f"{result.train.last_nll:.3f}: {run_dir / result.train.export}",
        highlight=False,
        markup=False,
    )


def _validated(source: Path, model: Path, run_dir: Path, fields: dict[str, object], as_json: bool) -> Path:
    validation = {
        "source": str(source.resolve()),
        "filename": source.name,
        "tokenizer": str(model.resolve()),
        **{key: fields[key] for key in ("max_length_tokens", "pixels") if key in fields},
    }
    run = RunDir(run_dir)
    result = _run(run, {"run_id": run_dir.name, "validation": validation}, as_json)
    assert result.validation is not None, "a validation that succeeded has its report"
    counts = f"{result.validation.valid} valid of {result.validation.rows} rows"
    messages(as_json).print(f"{source.name}: {counts}", highlight=False, markup=False)
    return run.dataset_path.resolve()


def _print_result(result: RunResult, run_dir: Path) -> None:
    print_json({"run_dir": str(run_dir), **result.model_dump(mode="json")})


def _run(run: RunDir, document: dict[str, object], as_json: bool) -> RunResult:
    """Run one directory in a process of its own; leave with its error, as JSON its result, when it fails."""
    try:
        run.create(RunConfig.model_validate(document))
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            print_error(problem["msg"], word=f"{'.'.join(map(str, problem['loc']))}:")
        raise typer.Exit(EXIT_USAGE) from None
    command = [sys.executable, "-m", "vlm_dft", str(run.path)]
    process = subprocess.run(command, stdout=_STDERR if as_json else None, env=os.environ, check=False)
    result = run.read_result()
    if result is None:
        print_error(f"with exit code {process.returncode}; nothing was announced in {run.path}", word="crashed")
        raise typer.Exit(EXIT_FAILED)
    if result.status != "succeeded":
        error = result.error
        print_error(f"{error.code}: {error.message}" if error else "", word=result.status)
        print_problems(result.validation.problems if result.validation else ())
        if as_json:
            _print_result(result, run.path)
        raise typer.Exit(EXIT_FAILED)
    return result
