"""Every command that shows or makes something has --json, and prints then one document and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from api_server import Api, serve
from databases import copied_sqlite
from test_import_job import ANSWERED
from typer.core import TyperGroup
from typer.main import get_command
from typer.testing import CliRunner

from cli.client import out
from cli.main import app, log_to_stderr
from service.jobs import store
from service.jobs.phases import Queue
from service.settings import get_settings
from vlm_dft.results import Progress
from vlm_dft.run_dir import RunDir

WITHOUT = {
    "up": "runs until it is stopped",
    "work": "runs until it is stopped",
    "demo": "prints a story as it goes",
    "migrate": "says one line when it is done",
}
GPU = {
    "index": 0,
    "uuid": "GPU-1",
    "name": "NVIDIA H100",
    "memory_total_gib": 79.6,
    "memory_used_gib": 70.25,
    "utilisation_percent": 97,
    "temperature_celsius": 60,
}


def commands(group: TyperGroup, *above: str) -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if isinstance(command, TyperGroup):
            yield from commands(command, *above, name)
        if not isinstance(command, TyperGroup) or command.invoke_without_command:
            yield " ".join((*above, name)), command


def test_every_command_that_shows_or_makes_something_has_json() -> None:
    group = get_command(app)
    assert isinstance(group, TyperGroup)
    known = dict(commands(group))
    assert {"jobs", "models", "models delete", "keys create", "benchmarks list", "train", "gc"} <= known.keys()
    has = {name: any("--json" in parameter.opts for parameter in command.params) for name, command in known.items()}
    assert {name for name, having in has.items() if not having} == WITHOUT.keys()


def run(*words: str, code: int = 0) -> Any:
    done = CliRunner().invoke(app, [*words, "--json"], env={"COLUMNS": "200"})
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


@pytest.fixture
def api(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    """A service with its database where the commands of its own machine find it, too."""
    (tmp_path / "data").mkdir()
    url = copied_sqlite(request.getfixturevalue("_sqlite_template"), tmp_path / "data" / "vlm-dft.db")
    (tmp_path / "benchmarks" / "WeMath").mkdir(parents=True)
    with serve(tmp_path, url) as running:
        monkeypatch.setenv("OPENAI_BASE_URL", f"{running.url}/v1")
        monkeypatch.setenv("VLM_DFT_DATA_DIR", str(tmp_path / "data"))
        monkeypatch.setenv("VLM_DFT_BENCHMARKS", str(tmp_path / "benchmarks"))
        get_settings.cache_clear()
        yield running
    get_settings.cache_clear()


def test_commands_of_the_services_machine_print_json(api: Api, tmp_path: Path) -> None:
    assert run("projects", "create", "shell", "--max-files", "2")["max_files"] == 2
    assert run("projects", "limit", "shell", "--unlimited", "max_files")["max_files"] is None
    assert run("projects", "archive", "shell")["status"] == "archived"
    assert run("projects", "unarchive", "shell") in run("projects", "list")["data"]
    made = run("keys", "create", "--project", "shell", "--name", "[red]")
    newer = run("keys", "rotate", made["id"])
    assert newer["rotated_from"] == made["id"]
    assert newer["key"] != made["key"]
    assert run("keys", "revoke", newer["id"])["status"] == "revoked"
    listed = run("keys", "list", "--project", "shell")["data"]
    assert [(key["id"], key["name"], "key" in key) for key in listed] == [
        (made["id"], "[red]", False),
        (newer["id"], "[red]", False),
    ]
    assert "[red]" in CliRunner().invoke(app, ["keys", "list"]).stdout
    change = run("audit", "--object", newer["id"])["data"][0]
    assert (change["object"], change["action"]) == ("audit_event", "keys revoke")
    assert run("gc") == {"removed": True, "given_up": [], "data": []}
    assert run("backup", str(tmp_path / "backup"))["database"] == "sqlite"
    assert run("benchmarks", "list")["unknown"] == []
    assert run("benchmarks", "regression")["items"] == 60
    assert "regression" in [each["name"] for each in run("benchmarks", "list")["data"]]


def test_commands_of_a_client_print_json(api: Api, tmp_path: Path) -> None:
    client = api.client()
    file_id = api.ready_file(client)
    (tmp_path / "job.json").write_text(json.dumps(ANSWERED))
    job = run("import-job", str(tmp_path / "job.json"), "--training-file", file_id, "--model", "tiny", "--no-watch")
    assert (job["status"], job["seed"]) == ("queued", 42)
    claim = api.claim(job["id"])
    RunDir(claim.run_path).log_path.write_text("[red]step 1\n")
    assert run("logs", job["id"])["text"] == "[red]step 1\n"
    api.finish(claim)
    tuned = client.fine_tuning.jobs.retrieve(job["id"]).fine_tuned_model
    assert tuned is not None
    assert run("models", "delete", tuned)["deleted"] is True
    assert run("eval", "tiny", "--benchmarks", "WeMath", "--no-watch")["object"] == "evaluation"


def test_jobs_and_workers_are_shown_as_the_dashboard_shows_them(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    # COLUMNS would be read when the module is first imported, by whichever test does that.
    monkeypatch.setattr(out, "_width", 200)
    client = api.client()
    file_id = api.ready_file(client)
    jobs = [client.fine_tuning.jobs.create(model="tiny", training_file=file_id) for _ in range(3)]
    claim = api.claim(jobs[0].id)
    with api.database.write() as s:
        store.register_worker(s, "test:worker:1", host="box", queue=Queue.GPU, pid=1, devices=[GPU], versions={})
        progress = Progress(phase="running", step=3, total_steps=12, seconds_remaining=185.0)
        assert store.renew(s, claim, 60.0, progress)
    printed = CliRunner().invoke(app, ["jobs"]).stdout
    third, second, first = (line for line in printed.splitlines() if "ftjob-" in line)
    assert "step 3/12, 3 min 05 s left" in first
    assert "position 1, waiting for gpu, starts at about" in second
    assert "position 2" in third
    evaluation = run("eval", "tiny", "--benchmarks", "WeMath", "--no-watch")
    printed = CliRunner().invoke(app, ["jobs", "--kind", "evaluations"]).stdout
    assert re.search(rf"{evaluation['id']} +queued +tiny +WeMath +position 3", printed)
    assert "there are no preflights yet" in CliRunner().invoke(app, ["jobs", "--kind", "preflights"]).stdout
    assert run("jobs", "--kind", "comparisons")["data"] == []
    printed = CliRunner().invoke(app, ["workers"]).stdout
    assert "0: NVIDIA H100  70.2 of 79.6 GiB  97 %" in printed
    assert jobs[0].id in printed
    assert run("workers")["data"][0]["devices"] == [GPU]


def test_a_refusal_leaves_standard_output_empty(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = [(["logs", "ftjob-none"], 1), (["keys", "revoke", "key-none"], 1), (["gc", "--all"], 2)]
    for words, code in refused:
        answer = CliRunner().invoke(app, [*words, "--json"])
        assert (answer.exit_code, answer.stdout) == (code, "")
        assert answer.stderr
    monkeypatch.setenv("OPENAI_BASE_URL", "http://[::1]:9/v1")
    monkeypatch.setattr("openai._base_client.BaseClient._calculate_retry_timeout", lambda *_: 0.0)
    answer = CliRunner().invoke(app, ["workers", "--json"])
    assert (answer.exit_code, answer.stdout) == (3, "")
    assert "http://[::1]:9/v1" in answer.stderr


def test_what_our_own_code_logs_is_no_output_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    before = structlog.get_config()
    structlog.reset_defaults()
    try:
        log_to_stderr()
        structlog.get_logger("service").error("a GPU does not answer")
    finally:
        structlog.configure(**before)
    told = capsys.readouterr()
    assert told.out == ""
    assert "a GPU does not answer" in told.err
