"""Every error has OpenAI's shape and says which value, where, and what to do; nothing is queued on any of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import openai
import pytest
from api_server import Api, serve, text_row

from service.api.app import create_app
from service.jobs.tables import Job
from service.settings import Settings


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Api]:
    """One server for the whole file: no test here leaves anything behind."""
    from databases import copied_sqlite

    directory = tmp_path_factory.mktemp("api")
    url = copied_sqlite(request.getfixturevalue("_sqlite_template"), directory / "vlm-dft.db")
    with serve(directory, url) as running:
        yield running


@pytest.fixture(scope="module")
def file_id(api: Api) -> str:
    """A processed text file whose rows have 12 and 120 tokens."""
    return api.ready_file(api.client(), [text_row(1), text_row(2, 120)])


def supervised(**fields: Any) -> dict[str, Any]:
    return {"method": {"type": "supervised", "supervised": fields}}


def hyper(**numbers: Any) -> dict[str, Any]:
    return supervised(hyperparameters=numbers)


PREFIX = "method.supervised.hyperparameters"
REFUSED: list[tuple[dict[str, Any], str, str]] = [
    (hyper(learning_rate=-1e-5), f"{PREFIX}.learning_rate", "greater than 0, got -1e-05"),
    (hyper(learning_rate=1e6), f"{PREFIX}.learning_rate", "less than or equal to 1"),
    (hyper(learning_rate="fast"), f"{PREFIX}.learning_rate", "valid number, got 'fast'"),
    (hyper(n_epochs=0), f"{PREFIX}.n_epochs", "greater than or equal to 1"),
    (hyper(n_epochs="3"), f"{PREFIX}.n_epochs", "valid integer"),
    (hyper(batch_size=True), f"{PREFIX}.batch_size", "valid integer"),
    (hyper(batch_size=10**9), f"{PREFIX}.batch_size", "65536"),
    (hyper(dft_floor=0.1), f"{PREFIX}.dft_floor", "known are: learning_rate,"),
    (hyper(learning_rate=1e-5, learning_rate_multiplier=1), PREFIX, "not both"),
    (supervised(objective="rl"), "method.supervised.objective", "'nll', 'sft', 'dft', 'dft_nll', 'power', "),
    (supervised(objective="dft", power={"alpha": 1}), "method.supervised", 'objective is "dft"'),
    (supervised(objective="power", power={"beta": 1}), "method.supervised.power.beta", "known are: alpha"),
    (
        supervised(objective="psft", psft={"clip_ratio_high": -1}),
        "method.supervised.psft.clip_ratio_high",
        "equal to 0",
    ),
    (supervised(objective="threshold", threshold={"kind": "p"}), "method.supervised.threshold.kind", "'top_p', "),
    (supervised(objective="deft", deft={}), "method.supervised.deft", "known are: hyperparameters,"),
    (
        supervised(objective="dft", dft={"weight_floor": 0.5, "weight_cap": 0.1}),
        "method.supervised",
        "below weight_floor",
    ),
    (supervised(training={"jit": True}), "method.supervised.training.jit", "known are: patch_cache, vision_cache,"),
    (
        supervised(training={"vision_cache": True}, freeze={"merger": False}),
        "method.supervised",
        "frozen vision tower and merger",
    ),
    (supervised(training={"vision_cache": True, "patch_cache": True}), "method.supervised", "leave one out"),
    (hyper(packing=True, micro_batch_size=2), PREFIX, "means nothing with packing"),
    (hyper(head_backend="liger"), f"{PREFIX}.head_backend", "'linear_cross_entropy' or 'triton'"),
    (
        supervised(objective="asft", hyperparameters={"head_backend": "triton"}),
        f"{PREFIX}.head_backend",
        "triton has not the base model's distribution, which asft needs: leave it out",
    ),
    (
        hyper(head_backend="linear_cross_entropy", precision="bf16"),
        f"{PREFIX}.head_backend",
        "needs precision fp32: leave it out",
    ),
    (hyper(vision_learning_rate=1e-5), f"{PREFIX}.vision_learning_rate", "leaves the vision part as it is"),
    (supervised(adapter={"type": "lora"}, freeze={"merger": False}), "method.supervised.freeze", "full fine-tuning"),
    (supervised(objective="nll", dft={"weight_floor": 0.1}), "method.supervised", 'objective is "nll"'),
    (supervised(objective="dft", dft={"weight_floor": 2}), "method.supervised.dft.weight_floor", "equal to 1"),
    (supervised(adapter={"type": "lora", "r": 0}), "method.supervised.adapter.r", "equal to 1"),
    (supervised(adapter={"type": "lora", "rank": 8}), "method.supervised.adapter.rank", "not known here"),
    (supervised(freeze={"tower": True}), "method.supervised.freeze.tower", "not known here"),
    (supervised(pixels={"min_pixels": 2_000_000}), "method.supervised.pixels", "larger than max_pixels"),
    (supervised(freeze={"language_model": True}), "method.supervised.freeze", "nothing is left to train"),
    ({"method": {"type": "dpo"}}, "method.type", "'supervised' or 'dft', got 'dpo'"),
    ({"method": {"type": "dft", "dft": {"weight_floor": -1}}}, "method.dft.weight_floor", "equal to 0"),
    ({"method": {"type": "dft", "supervised": {}}}, "method", 'type is "dft"'),
    ({"method": {"supervised": {}}}, "method.type", "required"),
    ({"model": "gpt-4o"}, "model", "base models: tiny, tiny-text"),
    ({"training_file": "file-x"}, "training_file", "no file 'file-x'"),
    ({"validation_file": "file-x"}, "validation_file", "no file 'file-x'"),
    ({"training_file": None}, "training_file", "required"),
    ({"suffix": "a:b"}, "suffix", "pattern"),
    ({"suffix": "x" * 65}, "suffix", "64"),
    ({"seed": -1}, "seed", "equal to 0"),
    ({"metadata": {"k" * 65: "v"}}, "metadata." + "k" * 65, "64"),
    ({"metadata": {"k": "v" * 513}}, "metadata.k", "512"),
    ({"metadata": {"k": "\0"}}, "metadata.k", "U+0000"),
    ({"metadata": {str(n): "" for n in range(17)}}, "metadata", "16"),
    ({"integrations": [{"type": "wandb", "wandb": {"project": "p"}}]}, "integrations", "leave it out"),
    ({"hyperparameters": {"n_epochs": -1}}, "hyperparameters.n_epochs", "equal to 1"),
    ({"hyperparameters": {"n_epochs": 1}, **hyper(n_epochs=2)}, "hyperparameters", "there only"),
    ({"evaluation": {"benchmarks": ["mathverse"]}}, "evaluation.benchmarks.0.name", "no benchmark 'mathverse'"),
    ({"evaluation": {"benchmarks": []}}, "evaluation.benchmarks", "at least 1"),
    ({"priority": "urgent"}, "priority", "'low', 'normal' or 'high'"),
    ({"trust_remote_code": True}, "trust_remote_code", "known are: model, training_file"),
]


@pytest.mark.parametrize(("fields", "param", "words"), REFUSED, ids=[param + words[:20] for _, param, words in REFUSED])
def test_a_wrong_job_is_refused_with_its_param(
    api: Api, file_id: str, fields: dict[str, Any], param: str, words: str
) -> None:
    body = {"model": "tiny", "training_file": file_id, **fields}
    response = api.http().post("/v1/fine_tuning/jobs", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert words in error["message"]
    assert error["message"].startswith(param) or param == "metadata"
    assert error["type"] == "invalid_request_error"
    assert response.headers["x-should-retry"] == "false"
    assert api.count(Job, Job.kind == "fine_tuning") == 0


def test_rows_that_do_not_fit_are_named_before_anything_is_queued(api: Api, file_id: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        api.client().fine_tuning.jobs.create(
            model="tiny",
            training_file=file_id,
            method={"type": "supervised", "supervised": {"hyperparameters": {"max_length_tokens": 100}}},  # type: ignore
        )
    error: Any = caught.value.body
    assert (caught.value.code, caught.value.param, error["num_rows"]) == ("sample_too_long", "training_file", 1)
    assert error["rows"][0]["line"] == 2
    assert "120 tokens" in error["message"]
    assert 'on_overlong to "drop"' in error["message"]
    assert api.count(Job, Job.kind == "fine_tuning") == 0


BODIES: list[tuple[bytes, str]] = [
    (b"{", "not valid JSON"),
    (b"", "JSON object is needed"),
    (b"[]", "JSON object is needed"),
    (b'"text"', "JSON object is needed"),
    (b"[" * 100_000, "cannot be read"),
    (b'{"metadata":' * 20_000 + b"1" + b"}" * 20_000, "cannot be read"),
    (b'{"model": "' + b"x" * 300 + b'"}', "255"),
    (b'{"model": 1' + b"0" * 5000 + b"}", "cannot be read"),
    (b'{"model": "\\ud800"}', "model"),
    (b"\xff\xfe", "not valid JSON"),
    (b'{"seed": NaN, "model": "tiny", "training_file": "f"}', "seed"),
]


@pytest.mark.parametrize(("body", "words"), BODIES, ids=[str(body[:16]) for body, _ in BODIES])
def test_a_hostile_body_is_a_clear_400(api: Api, body: bytes, words: str) -> None:
    headers = {"content-type": "application/json"}
    response = api.http().post("/v1/fine_tuning/jobs", content=body, headers=headers)
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert words in response.json()["error"]["message"]


def test_another_content_type_is_told_to_be_json(api: Api) -> None:
    response = api.http().post("/v1/fine_tuning/jobs", content=b"{}", headers={"content-type": "text/plain"})
    assert response.status_code == 400
    assert "content-type application/json" in response.json()["error"]["message"]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_large_json_body_is_413_in_the_same_shape(api: Api, chunked: bool) -> None:
    content = json.dumps({"model": "x" * 2**20}).encode() * 2

    def stream() -> Iterator[bytes]:
        yield content

    response = api.http().post(
        "/v1/fine_tuning/jobs",
        content=stream() if chunked else content,
        headers={"content-type": "application/json"},
    )
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "unknown_url"),
        ("POST", "/v1/fine_tuning/jobs/ftjob-x/explode", 404, "unknown_url"),
        ("GET", "/nothing", 404, "unknown_url"),
        ("PUT", "/v1/files", 405, "method_not_allowed"),
        ("GET", "/v1/files/", 404, "unknown_url"),
        ("GET", "/v1/fine_tuning/jobs/ftjob-x", 404, "job_not_found"),
        ("POST", "/v1/fine_tuning/jobs/ftjob-x/cancel", 404, "job_not_found"),
        ("GET", "/v1/fine_tuning/jobs/ftjob-x/events", 404, "job_not_found"),
        ("GET", "/v1/fine_tuning/jobs/ftjob-x/events/stream", 404, "job_not_found"),
        ("GET", "/v1/fine_tuning/jobs/ftjob-x/checkpoints", 404, "job_not_found"),
        ("GET", "/v1/fine_tuning/jobs/ftjob-x/metrics", 404, "job_not_found"),
        ("GET", "/v1/fine_tuning/jobs/ftjob-x/logs", 404, "job_not_found"),
        ("GET", "/v1/files/..%2f..%2fetc%2fpasswd", 404, "unknown_url"),
        ("GET", "/v1/files/a%00b", 400, "invalid_request"),
        ("GET", "/v1/models/a%2Fb", 404, "model_not_found"),
        ("DELETE", "/v1/models/tiny", 400, "invalid_state"),
        ("GET", "/v1/evaluations/eval-x", 404, "job_not_found"),
        ("GET", "/v1/evaluations/eval-x/items", 404, "job_not_found"),
        ("GET", "/v1/fine_tuning/jobs?limit=0", 400, "invalid_request"),
        ("GET", "/v1/fine_tuning/jobs?limit=ten", 400, "invalid_request"),
        ("GET", "/v1/fine_tuning/jobs?after=ftjob-x", 400, "invalid_request"),
        ("GET", "/v1/fine_tuning/jobs?metadata=x", 400, "invalid_request"),
        ("GET", "/v1/files?order=up", 400, "invalid_request"),
        ("GET", "/v1/files?purpose=%00", 400, "invalid_request"),
        ("GET", "/v1/files?limit=99999999999999999999", 400, "invalid_request"),
    ],
)
def test_wrong_urls_and_queries_have_the_same_shape(api: Api, method: str, path: str, status: int, code: str) -> None:
    response = api.http().request(method, path)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert response.headers["x-should-retry"] == "false"
    assert response.headers["x-request-id"].startswith("req_")


def test_the_param_of_a_query_is_its_name(api: Api) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        api.client().fine_tuning.jobs.list(limit=1000)
    assert caught.value.param == "limit"
    assert "100, got '1000'" in caught.value.message


def test_every_answer_has_a_request_id_and_the_version(api: Api) -> None:
    response = api.http().get("/healthz", headers={"x-request-id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    assert response.headers["x-vlm-dft-version"]
    forged = api.http().get("/healthz", headers={"x-request-id": "a b"})
    assert forged.headers["x-request-id"].startswith("req_")


def test_an_error_is_sent_once_by_the_stock_client(api: Api) -> None:
    requests: list[httpx.Request] = []
    client = api.client(http_client=openai.DefaultHttpxClient(event_hooks={"request": [requests.append]}))
    with pytest.raises(openai.BadRequestError):
        client.fine_tuning.jobs.create(model="tiny", training_file="file-x")
    assert len(requests) == 1
    client.close()


def test_a_database_that_is_away_is_503_with_a_time_to_come_back(tmp_path: Path) -> None:
    url = "postgresql+psycopg://nobody@127.0.0.1:1/none?connect_timeout=2"
    app = create_app(Settings(data_dir=tmp_path, database_url=url))

    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app)  # no lifespan: a server does not start without its database
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return [await client.get(path) for path in ("/v1/files", "/readyz")]

    response, ready = anyio.run(ask)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "unavailable")
    assert response.headers["x-should-retry"] == "true"
    assert 1 <= int(response.headers["retry-after"]) <= 60
    assert (ready.status_code, ready.json()["status"]) == (503, "down")
    assert "nobody" not in response.text + ready.text
