"""Evaluations in the paper's layout by one command, and recipes that the service takes as they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_server import Api, serve, write_model
from databases import copied_sqlite
from test_evaluation_report import score
from typer.testing import CliRunner

from cli.main import app
from service.api.fine_tuning.requests import CreateFineTuningJob
from service.jobs import store
from vlm_dft.evaluation.paper_table import paper_table
from vlm_dft.evaluation.provision import kind_of
from vlm_dft.results import RunResult, Score

RECIPES = Path(__file__).parent.parent / "recipes"


def scores_of(sha256: str, shift: float, **changes: Any) -> list[Score]:
    versions = ("Text Dominant", "Text Lite", "Vision Intensive", "Vision Dominant", "Vision Only")
    rates = {f"version: {name}": {"value": shift + number / 100, "n": 788.0} for number, name in enumerate(versions)}
    verse = {"metric": "mean_over_versions", "by_category": rates, "value": shift + 0.02}
    whole = {"whole": True, "model_sha256": sha256, "model_role": "tuned", **changes}
    return [
        score(benchmark="MathVerse_MINI", kind="mathverse", **verse, **whole),
        score(benchmark="MathVision", kind="mathvision", metric="acc", value=shift + 0.0125, by_category={}, **whole),
        score(benchmark="WeMath", kind="wemath", metric="score_strict", value=shift, by_category={}, **whole),
    ]


def test_table_4_has_the_papers_columns_and_a_row_per_model() -> None:
    rows = {"base": scores_of("a", 0.1), "SFT": scores_of("b", 0.2), "DFT": scores_of("c", 0.3)}
    lines = paper_table(rows).splitlines()
    header = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert header[:4] == ["", "Vision Only", "Vision Intensive", "Vision Dominant"]
    assert header[4:] == ["MathVerse Overall", "MathVision", "WeMath"]
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == [
        "base", "14.00", "12.00", "13.00", "12.00", "11.25", "10.00"
    ]  # fmt: skip
    assert [line.split("|")[1].strip() for line in lines[3:5]] == ["SFT", "DFT"]
    assert "MathVision: the whole benchmark; acc;" in paper_table(rows)
    part = {"base": scores_of("a", 0.1, whole=False, n=50, n_total=3040)[1:]}
    assert "MathVision: a SUBSET, 50 of 3040 items in the file" in paper_table(part)
    assert "| base | -           |" in paper_table(part)


def test_table_1_has_a_column_per_benchmark_and_their_mean_where_all_are_there() -> None:
    def maths(name: str, value: float) -> Score:
        return score(benchmark=name, kind="text_math", metric="average@16", value=value, by_category={})

    both = [maths("MATH-500", 0.3), maths("AIME-2024", 0.1)]
    lines = paper_table({"base": both, "DFT": both[:1]}).splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == ["", "MATH-500", "AIME-2024", "Avg."]
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == ["base", "30.00", "10.00", "20.00"]
    assert [cell.strip() for cell in lines[3].strip("|").split("|")] == ["DFT", "30.00", "-", "-"]


@pytest.mark.parametrize("change", [{"scorer": "other/v1"}, {"judge": "gpt"}, {"prompt": "cot"}, {"items_sha256": "x"}])
def test_rows_that_must_not_be_compared_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"MathVerse_MINI: base and SFT must not be compared: {next(iter(change))}"):
        paper_table({"base": scores_of("a", 0.1), "SFT": scores_of("b", 0.2, **change)})


@pytest.fixture
def api(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    url = copied_sqlite(request.getfixturevalue("_sqlite_template"), tmp_path / "vlm-dft.db")
    (tmp_path / "benchmarks" / "WeMath").mkdir(parents=True)
    with serve(tmp_path, url) as running:
        monkeypatch.setenv("OPENAI_BASE_URL", f"{running.url}/v1")
        monkeypatch.setenv("COLUMNS", "200")
        yield running


def evaluated(api: Api, model: str, scores: list[Score]) -> str:
    made = api.http().post("/v1/evaluations", json={"model": model, "benchmarks": ["WeMath"]}).json()
    claim = api.claim(made["id"])
    with api.database.write() as s:
        assert store.succeed(s, claim, RunResult(status="succeeded", scores=tuple(scores)))
    return made["id"]


def tuned(api: Api, objective: str) -> str:
    file_id = api.ready_file(api.client())
    method: Any = {"type": "supervised", "supervised": {"objective": objective}}
    job = api.client().fine_tuning.jobs.create(model="tiny", training_file=file_id, method=method)
    api.finish(api.claim(job.id))
    return str(api.client().fine_tuning.jobs.retrieve(job.id).fine_tuned_model)


def test_three_evaluations_are_printed_by_one_command(api: Api) -> None:
    ids = [
        evaluated(api, "tiny", scores_of("a", 0.1)),
        evaluated(api, tuned(api, "nll"), scores_of("b", 0.2)),
        evaluated(api, tuned(api, "dft"), scores_of("c", 0.3)),
    ]
    printed = CliRunner().invoke(app, ["table", *ids])
    assert printed.exit_code == 0, printed.output
    rows = [line.split("|") for line in printed.output.splitlines() if line.startswith("|")]
    assert [row[1].strip() for row in rows[2:]] == ["base", "SFT", "DFT"]
    assert [row[-2].strip() for row in rows[2:]] == ["10.00", "20.00", "30.00"]
    answered = json.loads(CliRunner().invoke(app, ["table", *ids, "--json"]).stdout)
    (values,) = answered["tables"]
    assert [(label, round(row["WeMath"], 6)) for label, row in values.items()] == [
        ("base", 0.1),
        ("SFT", 0.2),
        ("DFT", 0.3),
    ]
    assert answered["scores"]["DFT"][0]["model_sha256"] == "c"
    named = CliRunner().invoke(app, ["table", *ids, "--labels", "Qwen,a,b"])
    assert "| Qwen |" in named.output
    other = evaluated(api, "tiny", scores_of("d", 0.4, judge="gpt"))
    refused = CliRunner().invoke(app, ["table", ids[0], other])
    assert (refused.exit_code, "must not be compared: judge differs" in refused.output) == (1, True)


@pytest.mark.parametrize("name", ["table4-sft", "table4-dft", "table1-sft", "table1-dft"])
def test_a_recipe_is_a_request_that_the_service_takes(name: str) -> None:
    body = json.loads((RECIPES / f"{name}.json").read_text())
    request = CreateFineTuningJob.model_validate(body)
    assert request.method is not None
    assert request.evaluation is not None
    chosen = request.method.chosen
    assert (chosen.resolved_objective().name == "dft") == name.endswith("dft")
    assert (chosen.hyperparameters.learning_rate, chosen.hyperparameters.n_epochs) == (5e-5, 1)
    kinds = {kind_of(choice.name) for choice in request.evaluation.benchmarks}
    assert kinds == ({"mathverse", "mathvision", "wemath"} if "table4" in name else {"text_math"})
    if "table1" in name:
        plan = request.evaluation
        assert (plan.samples_per_item, plan.temperature, plan.max_new_tokens, plan.prompt) == (16, 1.0, 4096, "cot")


def test_the_arms_of_a_table_differ_in_their_objective_alone() -> None:
    for table in ("table4", "table1"):
        sft, dft = (json.loads((RECIPES / f"{table}-{arm}.json").read_text()) for arm in ("sft", "dft"))
        assert sft["method"]["supervised"].pop("objective") == "nll"
        assert dft["method"]["supervised"].pop("objective") == "dft"
        assert sft.pop("suffix") != dft.pop("suffix")
        assert sft == dft


def test_a_recipe_is_queued_as_it_stands(api: Api) -> None:
    body = json.loads((RECIPES / "table4-dft.json").read_text())
    for name in ("MathVerse_MINI", "MathVision"):
        (api.settings.resolved_benchmarks / name).mkdir()
    write_model(api.settings.resolved_models_dir / body["model"])
    body["training_file"] = api.ready_file(api.client())
    job = api.http().post("/v1/fine_tuning/jobs", json=body)
    assert job.status_code == 200, job.text
    assert job.json()["status"] == "queued"
