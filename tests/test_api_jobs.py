"""What a job shows and leaves behind; a repeated submit makes one job; names, numbers and models are resolved."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from api_server import Api, serve, text_row
from databases import copied_sqlite
from store_samples import step_metrics
from throwaway import wait_until

from service.api.fine_tuning.requests import SupervisedMethod
from service.jobs import store
from service.jobs.phases import Kind
from service.jobs.tables import Job, Outbox
from vlm_dft.config import TrainConfig
from vlm_dft.objective_config import OBJECTIVE_OPTIONS, ObjectiveConfig
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


def test_auto_and_nothing_mean_the_papers_settings(api: Api) -> None:
    file_id = api.ready_file(api.client())
    auto: Any = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto", "precision": "auto"}
    plain = submit(api, file_id, method=None, hyperparameters=None, suffix=None, metadata=None, integrations=None)
    explicit = submit(api, file_id, method={"type": "supervised", "supervised": {"hyperparameters": auto}})
    deprecated = submit(api, file_id, hyperparameters={"n_epochs": "auto"}, integrations=[])
    for job in (plain, explicit, deprecated):
        train = job["resolved_config"]["train"]
        assert (train["learning_rate"], train["n_epochs"], train["lr_schedule"]) == (5e-5, 1, "cosine")
        assert (train["warmup_ratio"], train["objective"]["name"], train["adapter"]) == (0.1, "nll", {"type": "full"})
        assert job["hyperparameters"] == {"n_epochs": 1, "batch_size": 16, "learning_rate_multiplier": 1.0}
    lora = submit(api, file_id, method={"type": "supervised", "supervised": {"adapter": {"type": "lora"}}})
    adapter = lora["resolved_config"]["train"]["adapter"]
    assert (adapter["r"], adapter["alpha"]) == (8, 16)
    assert lora["method"]["supervised"]["adapter"] == adapter


def method_of(**supervised: Any) -> dict[str, Any]:
    return {"type": "supervised", "supervised": supervised}


OPTIONS: dict[str, dict[str, Any]] = {
    "dft": {"weight_floor": 0.1, "weight_cap": 0.9},
    "dft_nll": {"nll_share": 0.3},
    "power": {"alpha": 0.5},
    "threshold": {"kind": "bottom_logp", "probability": 0.2},
    "eaft": {"alpha": 2.0},
    "asft": {"kl_weight": 0.1},
    "iw_sft": {"temperature": 1.0, "weight_cap": 3.0},
    "psft": {"clip_ratio_high": 0.1},
}


def test_every_option_of_every_objective_can_be_asked_for(api: Api) -> None:
    file_id = api.ready_file(api.client())
    for name, known in OBJECTIVE_OPTIONS.items():
        options = OPTIONS.get(name, {})
        assert options.keys() == set(known)
        job = submit(api, file_id, method=method_of(objective=name, **({name: options} if options else {})))
        assert (job["objective"], job["method"]["supervised"]["objective"]) == (name, name)
        found = job["resolved_config"]["train"]["objective"]
        assert {option: found[option] for option in known} == options
        shown = {key: job["method"]["supervised"].get(key) for key in OBJECTIVE_OPTIONS}
        assert shown == dict.fromkeys(OBJECTIVE_OPTIONS) | ({name: options} if options else {})
        # What is shown can be asked for again.
        supervised = job["method"]["supervised"]
        supervised["hyperparameters"].pop("learning_rate_multiplier")
        again = submit(api, file_id, method=method_of(**supervised))
        assert again["resolved_config"]["train"] == job["resolved_config"]["train"]


def test_options_that_are_not_given_are_the_trainers(api: Api) -> None:
    for name, known in OBJECTIVE_OPTIONS.items():
        method = SupervisedMethod.model_validate({"objective": name, **({name: {}} if known else {})})
        assert method.resolved_objective() == ObjectiveConfig.model_validate({"name": name})
    assert SupervisedMethod(objective="sft").resolved_objective().name == "nll"


def test_how_a_training_runs_is_resolved_into_the_services_directories(api: Api) -> None:
    file_id = api.ready_file(api.client(), [text_row(1, images=[(56, 56)])])
    hyperparameters = {"packing": True, "head_tolerance": 0, "vision_learning_rate": 1e-6, "merger_learning_rate": 1e-5}
    tuned = submit(
        api,
        file_id,
        method=method_of(
            hyperparameters=hyperparameters,
            freeze={"vision_tower": False, "merger": False},
            training={"patch_cache": True, "compile": True, "fsdp": True},
        ),
    )
    train = tuned["resolved_config"]["train"]
    assert {name: train[name] for name in hyperparameters} == hyperparameters
    cache = {"directory": str(api.settings.data / "cache" / "images"), "max_gib": api.settings.cache_gib}
    assert (train["patch_cache"], train["vision_cache"], train["compile"], train["fsdp"]) == (cache, None, True, True)
    asked = {"patch_cache": True, "vision_cache": False, "compile": True, "fsdp": True}
    assert tuned["method"]["supervised"]["training"] == asked
    adapter = {"type": "lora", "r": 4, "targets": "language", "quantization": "nf4"}
    lora = submit(api, file_id, method=method_of(adapter=adapter, training={"vision_cache": True}))
    train = lora["resolved_config"]["train"]
    assert (train["vision_cache"], train["patch_cache"]) == (cache, None)
    assert {name: train["adapter"][name] for name in adapter} == adapter


def test_a_job_that_an_older_version_stored_is_shown_with_the_trainers_defaults(api: Api) -> None:
    file_id = api.ready_file(api.client())
    job = submit(api, file_id)
    required = [name for name, field in TrainConfig.model_fields.items() if field.is_required()]
    with api.database.write() as s:
        row = s.get(Job, job["id"])
        assert row is not None
        row.config = {"train": {name: row.config["train"][name] for name in required}}
    shown = api.http().get(f"/v1/fine_tuning/jobs/{job['id']}").json()
    assert shown["method"] == job["method"]
    assert (shown["seed"], shown["objective"], shown["hyperparameters"]) == (42, "nll", job["hyperparameters"])


def test_everything_asked_for_is_in_the_resolved_configuration(api: Api) -> None:
    file_id = api.ready_file(api.client())
    supervised = {
        "objective": "dft",
        "dft": {"weight_floor": 0.1},
        "hyperparameters": {"max_steps": 40, "learning_rate": 1e-3, "micro_batch_size": 4, "lr_schedule": "constant"},
        "freeze": {"vision_tower": False},
        "pixels": {"max_pixels": 50176},
    }
    evaluation = {"benchmarks": ["mathverse_mini", {"name": "wemath", "limit": 3}], "limit": 9, "include_base": True}
    job = submit(
        api,
        file_id,
        validation_file=file_id,
        seed=3,
        priority="high",
        method={"type": "supervised", "supervised": supervised},
        evaluation=evaluation,
    )
    config = job["resolved_config"]
    train = config["train"]
    assert (train["max_steps"], train["learning_rate"], train["lr_schedule"], train["seed"]) == (
        40,
        1e-3,
        "constant",
        3,
    )
    assert train["objective"] == {"name": "dft", "weight_floor": 0.1}
    assert (train["freeze"]["vision_tower"], train["pixels"]["max_pixels"]) == (False, 50176)
    assert train["validation_dataset"] == train["dataset"]
    assert [(b["name"], b["kind"], b["limit"]) for b in config["evaluation"]["benchmarks"]] == [
        ("MathVerse_MINI", "mathverse", 9),
        ("wemath", "wemath", 3),
    ]
    assert config["evaluation"]["pixels"] == train["pixels"]  # training and evaluation see the same pictures
    assert config["evaluation"]["include_base"]
    assert (job["priority"], job["seed"], config["run_id"]) == ("high", 3, job["id"])
    assert job["data_fingerprint"] == api.http().get(f"/v1/files/{file_id}").json()["fingerprint"]
    assert job["method"]["supervised"]["hyperparameters"]["learning_rate_multiplier"] == 20.0


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


def test_a_text_model_gets_no_pictures(api: Api) -> None:
    client = api.client()
    file_id = api.ready_file(client, [text_row(1, images=[(56, 56)])])
    for body in (
        {"training_file": file_id},
        {"training_file": api.ready_file(client), "evaluation": {"benchmarks": ["wemath"]}},
        {"training_file": api.ready_file(client), "method": method_of(training={"vision_cache": True})},
    ):
        response = api.http().post("/v1/fine_tuning/jobs", json={"model": "tiny-text", **body})
        assert (response.status_code, response.json()["error"]["code"]) == (400, "model_without_vision")


def test_lengths_are_exact_for_the_pixels_of_the_job(api: Api) -> None:
    """A picture of 560 x 560 is 400 visual tokens, or 100 under max_pixels 280 x 280."""
    file_id = api.ready_file(api.client(), [text_row(1, 12, images=[(560, 560)])])

    def ask(**fields: Any) -> int:
        body = {"type": "supervised", "supervised": fields}
        request = {"model": "tiny", "training_file": file_id, "method": body}
        return api.http().post("/v1/fine_tuning/jobs", json=request).status_code

    assert ask(hyperparameters={"max_length_tokens": 411}) == 400
    assert ask(hyperparameters={"max_length_tokens": 412}) == 200
    assert ask(hyperparameters={"max_length_tokens": 111}, pixels={"max_pixels": 78400}) == 400
    assert ask(hyperparameters={"max_length_tokens": 112}, pixels={"max_pixels": 78400}) == 200
    assert ask(hyperparameters={"max_length_tokens": 111, "on_overlong": "drop"}) == 200
    assert ask(hyperparameters={"packing": True, "pack_length_tokens": 411}) == 400
    assert ask(hyperparameters={"packing": True, "pack_length_tokens": 412}) == 200


def test_a_file_counted_with_another_tokenizer_is_taken_with_a_warning(api: Api) -> None:
    file_id = api.ready_file(api.client(), model="tiny-text")
    job = submit(api, file_id)
    warning = api.http().get(f"/v1/fine_tuning/jobs/{job['id']}/events").json()["data"][0]
    assert (warning["level"], warning["seq"]) == ("warn", 2)
    assert "the trainer counts" in warning["message"]


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
        wait_until(lambda: len(list(messages.iterdir())) == 2, 5, "both wake-ups")
        wait_until(lambda: api.count(Outbox) == 0, 5, "an empty outbox")
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
