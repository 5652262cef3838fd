"""What a request for a job is resolved into: every option there is, defaults, limits; and jobs of older versions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from api_server import Api, serve, text_row
from databases import copied_sqlite
from pydantic import ValidationError
from test_api_jobs import submit

from service.api.fine_tuning.requests import SupervisedMethod
from service.jobs.tables import Job
from vlm_dft.config import TrainConfig
from vlm_dft.objective_config import OBJECTIVE_OPTIONS, ObjectiveConfig


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Api]:
    """One server for the whole file: nothing here looks at how many jobs there are."""
    directory = tmp_path_factory.mktemp("api")
    url = copied_sqlite(request.getfixturevalue("_sqlite_template"), directory / "vlm-dft.db")
    benchmarks = directory / "benchmarks"
    (benchmarks / "MathVerse_MINI").mkdir(parents=True)
    (benchmarks / "wemath.tsv").write_text("index\n")
    with serve(directory, url) as running:
        yield running


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
    head = {"head_tolerance": 0, "head_backend": "linear_cross_entropy"}
    hyperparameters = {"packing": True, "vision_learning_rate": 1e-6, "merger_learning_rate": 1e-5, **head}
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
    job = submit(api, file_id, method=method_of(hyperparameters={"sample_rows": 0}))
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


def test_objectives_are_listed_with_the_options_that_requests_are_checked_with(api: Api) -> None:
    answer = api.http().get("/v1/fine_tuning/objectives").raise_for_status().json()
    listed = {each["id"]: each for each in answer["data"]}
    assert listed.keys() == OBJECTIVE_OPTIONS.keys()
    for name, known in OBJECTIVE_OPTIONS.items():
        options = listed[name]["options"]
        assert options.keys() == set(known)
        trainers = ObjectiveConfig.model_validate({"name": name})
        for option, schema in options.items():
            assert schema["default"] == getattr(trainers, option)
            assert schema["description"]
            beyond = "sideways" if "enum" in schema else schema["maximum"] + 1
            with pytest.raises(ValidationError, match=option):
                SupervisedMethod.model_validate({"objective": name, name: {option: beyond}})
