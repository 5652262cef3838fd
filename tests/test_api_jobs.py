"""What a job shows and leaves behind; a repeated submit makes one job."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from api_server import Api, serve
from databases import copied_sqlite
from store_samples import step_metrics
from throwaway import wait_until

from service.jobs import store
from service.jobs.phases import Kind
from service.jobs.tables import Job, Outbox
from vlm_dft.results import ErrorRecord, Histogram, Progress
from vlm_dft.run_dir import RunDir

CRASHED = ErrorRecord(code="trainer_crashed", message="exit code 1", retryable=True)


@pytest.fixture
def api(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Api]:
    url = copied_sqlite(request.getfixturevalue("_sqlite_template"), tmp_path / "vlm-dft.db")
    benchmarks = tmp_path / "benchmarks"
    (benchmarks / "MathVerse_MINI").mkdir(parents=True)
    (benchmarks / "wemath.tsv").write_text("index\n")
    (benchmarks / "notes.txt").write_text("none of ours")
    with serve(tmp_path, url) as running:
        yield running


def submit(api: Api, file_id: str, headers: dict[str, str] | None = None, **fields: Any) -> Any:
    body = {"model": "tiny", "training_file": file_id, **fields}
    response = api.http().post("/v1/fine_tuning/jobs", json=body, headers=headers or {})
    assert response.status_code == 200, response.text
    return response.json()


def test_a_tuned_model_can_be_tuned_again_and_is_kept_while_needed(api: Api) -> None:
    client = api.client()
    file_id = api.ready_file(client)
    first = submit(api, file_id)
    claim = api.claim(first["id"])
    api.finish(claim)
    name = client.fine_tuning.jobs.retrieve(first["id"]).fine_tuned_model
    second = submit(api, file_id, model=name, suffix="two")
    assert second["resolved_config"]["train"]["model"] == str(claim.run_path / "export")
    with pytest.raises(openai.BadRequestError) as caught:
        client.models.delete(name or "")
    assert caught.value.code == "invalid_state"
    api.finish(api.claim(second["id"]))
    tuned = api.http().get(f"/v1/models/ft:tiny:default:two:{second['id'][-8:]}").json()
    assert (tuned["parent"], tuned["root"], tuned["objective"], tuned["job_id"]) == (name, "tiny", "nll", second["id"])


def test_a_repeated_submit_makes_one_job(api: Api) -> None:
    file_id = api.ready_file(api.client())
    first = submit(api, file_id, {"x-stainless-retry-count": "0"})
    assert submit(api, file_id, {"x-stainless-retry-count": "1"})["id"] == first["id"]
    assert submit(api, file_id, {"x-stainless-retry-count": "0"})["id"] != first["id"]  # on purpose
    other = submit(api, file_id, {"x-stainless-retry-count": "1"}, suffix="other")  # its first try never arrived
    assert api.count(Job, Job.kind == Kind.FINE_TUNING) == 3
    keyed = submit(api, file_id, {"idempotency-key": "k"})
    assert submit(api, file_id, {"idempotency-key": "k"})["id"] == keyed["id"]
    assert submit(api, file_id, {"idempotency-key": "l"})["id"] not in (keyed["id"], other["id"])
    body = {"model": "tiny", "training_file": file_id, "suffix": "x"}
    response = api.http().post("/v1/fine_tuning/jobs", json=body, headers={"idempotency-key": "k"})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "idempotency_key_reused")
    assert api.count(Job, Job.kind == Kind.FINE_TUNING) == 5


def test_a_repetition_is_answered_even_when_it_could_not_be_submitted_any_more(api: Api) -> None:
    client = api.client()
    file_id = api.ready_file(client)
    first = submit(api, file_id, {"idempotency-key": "k"})
    client.fine_tuning.jobs.cancel(first["id"])
    client.files.delete(file_id)
    assert submit(api, file_id, {"idempotency-key": "k"})["status"] == "cancelled"


def test_simultaneous_repetitions_make_one_job(tmp_path: Path, database_url: str) -> None:
    with serve(tmp_path, database_url) as api:
        file_id = api.ready_file(api.client())
        ids: list[str] = []
        threads = [
            threading.Thread(target=lambda: ids.append(submit(api, file_id, {"idempotency-key": "k"})["id"]))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(ids) == 8
        assert len(set(ids)) == 1
        assert api.count(Job, Job.kind == Kind.FINE_TUNING) == 1


def test_progress_and_estimate_are_shown_while_it_runs(api: Api) -> None:
    job = submit(api, api.ready_file(api.client()))
    claim = api.claim(job["id"])
    progress = Progress(phase="running", step=10, total_steps=40, tokens_per_second=100.0, seconds_remaining=60.0)
    with api.database.write() as s:
        assert store.renew(s, claim, 60.0, progress)
    shown = api.http().get(f"/v1/fine_tuning/jobs/{job['id']}").json()
    assert (shown["phase"], shown["attempt"], shown["queue"]) == ("running", 1, None)
    assert (shown["progress"]["percent"], shown["progress"]["step"]) == (25.0, 10)
    assert shown["estimated_finish"] > shown["created_at"]


def write_metrics(path: Path, steps: Iterator[int] | range, nll: float) -> None:
    path.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({**step_metrics(step, nll), "learning_rate": 0.1}) for step in steps]
    RunDir(path).metrics_path.write_text("\n".join(lines) + '\n{"step": 99, "torn')


def test_metrics_of_all_attempts_hold_each_step_once(api: Api) -> None:
    job = submit(api, api.ready_file(api.client()))
    first = api.claim(job["id"])
    write_metrics(first.run_path, range(1, 8), 2.0)
    RunDir(first.run_path).log_path.write_text("first attempt\n")
    with api.database.write() as s:
        store.crash(s, first, "killed", CRASHED, max_crashes=3)
    second = api.claim(job["id"])
    write_metrics(second.run_path, range(5, 11), 1.0)
    held_out = {"step": 10, "valid_nll": 0.9, "valid_token_accuracy": 0.5, "time": 1.0}
    with RunDir(second.run_path).metrics_path.open("w") as file:
        lines = [step_metrics(step, 1.0) for step in range(5, 11)] + [held_out]
        file.writelines(json.dumps(line) + "\n" for line in lines)
    RunDir(second.run_path).log_path.write_text("line one\nline two\n")

    path = f"/v1/fine_tuning/jobs/{job['id']}"
    data = api.http().get(f"{path}/metrics").json()["data"]
    assert [(line["step"], line["nll"], line["attempt"]) for line in data] == [
        *((step, 2.0, 1) for step in range(1, 5)),
        *((step, 1.0, 2) for step in range(5, 11)),
    ]
    assert data[-1]["valid_nll"] == 0.9
    ranged = api.http().get(f"{path}/metrics?from_step=4&to_step=6").json()["data"]
    assert [line["step"] for line in ranged] == [4, 5, 6]
    assert api.http().get(f"{path}/metrics?from_step=4&to_step=3").json()["error"]["param"] == "to_step"
    assert api.http().get(f"{path}/logs").json()["text"] == "line one\nline two\n"
    assert api.http().get(f"{path}/logs?tail_bytes=12").json()["text"] == "line two\n"
    assert api.http().get(f"{path}/logs?attempt=1").json()["text"] == "first attempt\n"
    assert api.http().get(f"{path}/logs?attempt=3").status_code == 404
    attempts = api.http().get(f"{path}/attempts").json()["data"]
    assert [(a["attempt"], a["exit_reason"]) for a in attempts] == [(1, "killed"), (2, None)]


def test_histograms_of_all_attempts_are_shown_once(api: Api) -> None:
    job = submit(api, api.ready_file(api.client()))
    first = api.claim(job["id"])
    for step, split in ((0, "train"), (0, "validation"), (2, "train"), (4, "train")):
        write_histograms(first.run_path, step, split, (1, 2))
    with api.database.write() as s:
        store.crash(s, first, "killed", CRASHED, max_crashes=3)
    second = api.claim(job["id"])
    write_histograms(second.run_path, 4, "train", (5, 6))
    write_histograms(second.run_path, 6, "train", (7, 8), parts=("reasoning",))  # killed before the other line

    path = f"/v1/fine_tuning/jobs/{job['id']}/histograms"
    data = api.http().get(path).json()["data"]
    assert [(h["step"], h["split"], h["part"], h["counts"], h["attempt"]) for h in data] == [
        *((0, split, *rest) for split in ("train", "held_out") for rest in three([1, 2], 1)),
        *((2, "train", *rest) for rest in three([1, 2], 1)),
        *((4, "train", *rest) for rest in three([5, 6], 2)),
        (6, "train", "reasoning", [7, 8], 2),
    ]
    assert data[0]["bin_edges"] == [0.0, 0.5, 1.0]
    assert (data[2]["num_tokens"], data[2]["num_rows"]) == (6, 1)
    assert {h["step"] for h in api.http().get(f"{path}?from_step=1&to_step=3").json()["data"]} == {2}
    assert api.http().get(f"{path}?from_step=4&to_step=3").json()["error"]["param"] == "to_step"
    assert api.http(api.key("other")).get(path).json()["error"]["code"] == "job_not_found"


def three(counts: list[int], attempt: int) -> list[tuple[str, list[int], int]]:
    return [("reasoning", counts, attempt), ("answer", counts, attempt), ("all", [2 * n for n in counts], attempt)]


def write_histograms(
    path: Path, step: int, split: Any, counts: tuple[int, int], parts: Any = ("reasoning", "answer")
) -> None:
    for part in parts:
        RunDir(path).append_histogram(
            Histogram(
                step=step, split=split, part=part, counts=counts, num_tokens=sum(counts), num_rows=1, time=float(step)
            )
        )


def test_outputs_of_a_job_that_never_ran_are_empty(api: Api) -> None:
    path = f"/v1/fine_tuning/jobs/{submit(api, api.ready_file(api.client()))['id']}"
    assert api.http().get(f"{path}/metrics").json()["data"] == []
    assert api.http().get(f"{path}/histograms").json()["data"] == []
    assert api.http().get(f"{path}/logs").json() == {
        "object": "job.log",
        "job_id": path.rsplit("/", 1)[1],
        "attempt": None,
        "text": "",
    }
    assert api.http().get(f"{path}/checkpoints").json()["data"] == []


def test_events_can_be_followed_in_ascending_order(api: Api) -> None:
    job = submit(api, api.ready_file(api.client()))
    claim = api.claim(job["id"])
    with api.database.write() as s:
        store.record_metrics(s, claim, [step_metrics(step) for step in range(1, 6)])
    path = f"/v1/fine_tuning/jobs/{job['id']}/events"
    seen: list[int] = []
    while True:
        page = api.http().get(path, params={"order": "asc", "after_seq": seen[-1] if seen else 0, "limit": 2}).json()
        seen += [event["seq"] for event in page["data"]]
        if not page["has_more"]:
            break
    assert seen == [1, 2, 3, 4, 5, 6, 7]
    assert api.http().get(path, params={"after": "x", "after_seq": 1}).json()["error"]["param"] == "after_seq"


def read_stream(lines: Iterator[str]) -> Iterator[tuple[str | None, str, Any]]:
    """(id, event, data) of each message."""
    fields: dict[str, str] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(":")
            fields[name] = value.strip()
        elif "data" in fields:
            yield fields.get("id"), fields.get("event", "message"), json.loads(fields["data"])
            fields = {}


def test_the_event_stream_follows_replays_and_ends(api: Api) -> None:
    job = submit(api, api.ready_file(api.client()))
    path = f"/v1/fine_tuning/jobs/{job['id']}/events/stream"
    with api.http().stream("GET", path) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        messages = read_stream(response.iter_lines())
        assert next(messages)[2]["message"].startswith("Created")
        api.finish(api.claim(job["id"]))  # while the stream is open
        rest = list(messages)
    ids = [message[0] for message in rest]
    assert ids[:-1] == [str(seq) for seq in range(2, len(rest) + 1)]
    assert rest[-1][1:] == ("done", {"status": "succeeded"})
    with api.http().stream("GET", path, headers={"last-event-id": "2"}) as response:
        replayed = list(read_stream(response.iter_lines()))
    assert [message[0] for message in replayed] == ids[1:]
    refused = api.http().get(path, headers={"last-event-id": "x"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "last-event-id")


def test_a_submit_publishes_its_wake_up_and_survives_a_dead_broker(tmp_path: Path, request: Any) -> None:
    url = copied_sqlite(request.getfixturevalue("_sqlite_template"), tmp_path / "vlm-dft.db")
    with serve(tmp_path / "up", url) as api:
        submit(api, api.ready_file(api.client()))
        messages = api.settings.data / "queue" / "messages"
        # For the validation, and for the job; sent after the answer.
        wait_until(lambda: len(list(messages.iterdir())) == 2, 20, "both wake-ups")
        wait_until(lambda: api.count(Outbox) == 0, 20, "an empty outbox")
    models = tmp_path / "up" / "models"
    with serve(tmp_path / "down", url, broker_url="redis://127.0.0.1:1/0", models_dir=models) as api:
        file_id = api.ready_file(api.client())
        assert submit(api, file_id)["status"] == "queued"
        assert api.count(Outbox) == 2  # the janitor will publish them


def test_a_finished_job_shows_its_steps_result_and_scores(api: Api) -> None:
    job = submit(api, api.ready_file(api.client()))
    claim = api.claim(job["id"])
    progress = Progress(phase="evaluating", benchmark="wemath", items_done=3, items_total=4)
    with api.database.write() as s:
        assert store.renew(s, claim, 60.0, progress)
    running = api.http().get(f"/v1/fine_tuning/jobs/{job['id']}").json()
    assert (running["phase"], running["progress"]["percent"], running["scores"]) == ("evaluating", 75.0, [])
    failure = ErrorRecord(code="evaluation_failed", message="no picture", category="server")
    api.finish(claim, evaluation_error=failure)
    done = api.http().get(f"/v1/fine_tuning/jobs/{job['id']}").json()
    assert (done["status"], done["evaluation_error"]["code"], done["error"]) == ("succeeded", "evaluation_failed", None)
    assert (done["progress"]["step"], done["progress"]["total_steps"], done["progress"]["percent"]) == (40, 40, 100.0)
    assert (done["result"]["last_nll"], done["trained_tokens"]) == (1.0, 1234)
