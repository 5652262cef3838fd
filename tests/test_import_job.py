"""OpenAI's jobs are taken as they are, and what cannot be honoured here is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.import_job import JobFileError, request_of
from cli.main import app
from service.api.fine_tuning.requests import CreateFineTuningJob

ANSWERED = {  # the fields of OpenAI's fine_tuning.job object
    "object": "fine_tuning.job",
    "id": "ftjob-abc123",
    "model": "gpt-4o-2024-08-06",
    "created_at": 1721764800,
    "fine_tuned_model": "ft:gpt-4o-2024-08-06:org:geo:9x",
    "organization_id": "org-123",
    "result_files": ["file-abc123"],
    "status": "succeeded",
    "validation_file": None,
    "training_file": "file-abc123",
    "hyperparameters": {"n_epochs": 3, "batch_size": "auto", "learning_rate_multiplier": 0.3},
    "user_provided_suffix": "geo",
    "trained_tokens": 5768,
    "integrations": [],
    "seed": 42,
    "metadata": {"team": "x"},
    "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 4, "batch_size": "auto"}}},
}


def test_an_answered_job_becomes_a_request_that_this_service_takes() -> None:
    request = request_of(ANSWERED, "dft")
    body = CreateFineTuningJob.model_validate({"model": "tiny", "training_file": "file-1", **request})
    assert body.method is not None
    chosen = body.method.chosen
    assert chosen.resolved_objective().name == "dft"
    numbers = chosen.hyperparameters.resolved()
    assert numbers["n_epochs"] == 4
    assert numbers["learning_rate"] == pytest.approx(0.3 * 5e-5)
    assert (body.seed, body.suffix, body.metadata) == (42, "geo", {"team": "x"})


def test_a_request_with_deprecated_hyperparameters_is_taken_too() -> None:
    sent = {"model": "gpt-4o-mini", "training_file": "file-1", "hyperparameters": {"n_epochs": "auto"}}
    assert request_of(sent, "nll")["method"]["supervised"] == {
        "objective": "nll",
        "hyperparameters": {"n_epochs": "auto"},
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": {"type": "dpo", "dpo": {}}}, "method.type is 'dpo'"),
        ({"integrations": [{"type": "wandb"}]}, "integrations: there is none here"),
        ({"hyperparameters": {"beta": 0.1}}, "beta is not among n_epochs"),
        ({"hyperparameters": [1]}, "hyperparameters: an object is expected"),
        ({"method": "supervised"}, "method: an object is expected"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(JobFileError, match=message):
        request_of({**ANSWERED, **change}, "nll")


def test_command_prints_the_request_or_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    path.write_text(json.dumps(ANSWERED))
    options = ["--training-file", "train.jsonl", "--model", "tiny", "--dry-run"]
    answer = CliRunner().invoke(app, ["import-job", str(path), *options])
    assert json.loads(answer.output)["seed"] == 42
    for text, reason in (("[]", "this is no fine-tuning job"), ("{", "Expecting property name")):
        path.write_text(text)
        answer = CliRunner().invoke(app, ["import-job", str(path), *options])
        assert answer.exit_code == 1
        assert reason in answer.output
