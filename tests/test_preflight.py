"""Preflights: counts equal a plain softmax's, parts are what they are called, and verdicts follow from experiments."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from api_server import Api, serve
from databases import copied_sqlite
from datasets_for_tests import shapes_dataset, sums_dataset
from test_trainer import broken_copy
from typer.testing import CliRunner

from benchmarks.calibration.__main__ import FIGURES, measure
from cli.main import app
from cli.sparkline import bars
from service.jobs import store
from vlm_dft.batches import Plan, Steps, open_corpus
from vlm_dft.config import PreflightConfig, RunConfig, TrainConfig
from vlm_dft.data.canonical import CanonicalDataset
from vlm_dft.data.encoding import IGNORED, Encoder
from vlm_dft.errors import DatasetError, NanLossError
from vlm_dft.model import load
from vlm_dft.preflight import preflight
from vlm_dft.preflight_parts import Tally, parts_of
from vlm_dft.preflight_report import PartEvidence, PreflightReport, RowEvidence, Verdict
from vlm_dft.preflight_verdict import NEW_CONTENT, NOISE, decide
from vlm_dft.results import RunResult
from vlm_dft.run_dir import RunDir


def run_in_a_process(model: Path, dataset: Path, run: RunDir, **settings: Any) -> RunResult:
    config = PreflightConfig(model=str(model), dataset=dataset, **settings)
    run.create(RunConfig(run_id="preflight", preflight=config))
    subprocess.run([sys.executable, "-m", "vlm_dft", str(run.path)], check=True, timeout=240, capture_output=True)
    result = run.read_result()
    assert result is not None
    return result


def looked_at(model: Path, dataset: Path, tmp_path: Path, **settings: Any) -> PreflightReport:
    (tmp_path / "run").mkdir()
    config = PreflightConfig(model=str(model), dataset=dataset, precision="fp32", **settings)
    report = preflight(config, RunDir(tmp_path / "run"))
    progress = RunDir(tmp_path / "run").read_progress()
    assert progress is not None
    assert progress.items_done == progress.items_total == report.num_rows
    return report


def test_counts_equal_those_of_a_plain_softmax(tiny_vlm: Path, tmp_path: Path) -> None:
    path = shapes_dataset(tmp_path / "data", 8)
    report = looked_at(tiny_vlm, path, tmp_path)
    loaded = load(tiny_vlm, precision="fp32", device="cpu")
    config = TrainConfig(model=str(tiny_vlm), dataset=path)
    corpus = open_corpus(path, Encoder(loaded.processor, config.pixels), config, tiny_vlm)
    steps = Steps(corpus, Plan(corpus.kept, 1, seed=None), micro_batch_size=1, pad_token_id=loaded.pad_token_id)
    p, entropy = [], []
    for (micro_batch,) in steps.read():
        labels = micro_batch.labels_BT.flatten()
        with torch.no_grad():
            logits = loaded.model(**micro_batch.inputs).logits.flatten(0, 1)[labels != IGNORED].double()
        logp = logits.log_softmax(-1)
        p.append(logp.gather(1, labels[labels != IGNORED].unsqueeze(1)).squeeze(1).exp())
        entropy.append(-(logp.exp() * logp).sum(-1))
    p_all, entropy_all = torch.cat(p), torch.cat(entropy)
    found = report.parts[0]
    assert (found.part, found.num_tokens) == ("all", p_all.numel())
    assert found.p_sum == pytest.approx(p_all.sum().item(), rel=1e-4)
    assert found.nll_sum == pytest.approx(-p_all.log().sum().item(), rel=1e-5)
    assert found.entropy == pytest.approx(entropy_all.mean().item(), rel=1e-5)
    assert found.p_below_01_count == int((p_all < 0.1).sum())
    assert found.dft_gradient_mass == pytest.approx((p_all * (1 - p_all)).sum().item(), rel=1e-4)
    # The four parts share all tokens; digits are among two of them.
    apart = {part.part: part.num_tokens for part in report.parts}
    assert sum(apart[part] for part in ("reasoning", "answer", "format", "end_of_turn")) == found.num_tokens
    assert apart["end_of_turn"] == report.num_rows == 8
    assert apart["format"] > 0
    assert apart["reasoning"] > 0
    # A random model finds everything improbable.
    assert report.verdict.objective.name == "nll"


def test_a_model_that_is_broken_is_named_by_its_first_row(tiny_qwen2: Path, tmp_path: Path) -> None:
    broken = broken_copy(tiny_qwen2, tmp_path / "broken")
    with pytest.raises(NanLossError, match=r"row test\.jsonl:1: the probability of a target is not finite"):
        looked_at(broken, sums_dataset(tmp_path / "dataset", 2), tmp_path)


def test_parts_are_what_they_are_called(tiny_vlm: Path) -> None:
    tokenizer = load(tiny_vlm, precision="fp32", device="cpu").tokenizer
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert isinstance(end, int)
    text = "<think>I see 3.</think>So <answer>12</answer>"
    ids = [*tokenizer(text)["input_ids"], end, *tokenizer("No 7 </think>")["input_ids"], end]
    where = parts_of(ids, tokenizer, end)
    words: dict[str, str] = {}
    for token, parts in zip(ids, where, strict=True):
        for part in parts:
            words[part] = words.get(part, "") + tokenizer.decode([token])
    assert words["reasoning"] == "I see 3"
    assert words["answer"].replace(" ", "") == "So12No7"
    assert words["digits"].replace(" ", "") == "3127"
    # A piece that has a part of a tag belongs to it, as ".</" does.
    assert words["format"].replace(" ", "") == "<think>.</think><answer></answer></think>"
    assert words["end_of_turn"] == "<|im_end|>" * 2


def test_evidence_is_sums_and_one_division() -> None:
    tally = Tally()
    logp = [math.log(p) for p in (0.5, 0.05, 0.005)]
    tally.add_row([frozenset({"answer"})] * 3, logp, [1.0, 2.0, 3.0], [True, False, False])
    tally.add_row([frozenset({"format"})], [math.log(0.05)], [0.0], [False])
    parts, rows = tally.evidence()
    answer = next(part for part in parts if part.part == "answer")
    assert (answer.num_tokens, answer.correct_count, answer.p_below_01_count, answer.p_below_001_count) == (3, 1, 2, 1)
    assert answer.mean_p == pytest.approx(0.185)
    assert answer.gradient_mass == pytest.approx(0.5 + 0.95 + 0.995)
    assert answer.dft_discards == pytest.approx(1 - (0.25 + 0.05 * 0.95 + 0.005 * 0.995) / 2.445)
    assert sum(answer.counts) == 3
    assert answer.counts[0] == 1  # 0.005; 0.05 begins the second bin
    # Tags do not make a row improbable.
    assert (rows.num_rows, rows.p_below_01_count) == (2, 1)
    assert next(part for part in parts if part.part == "reasoning").mean_p is None


def test_rows_that_are_too_long_are_counted_and_none_is_an_error(tiny_qwen2: Path, tmp_path: Path) -> None:
    path = sums_dataset(tmp_path / "data", 12)
    result = run_in_a_process(tiny_qwen2, path, RunDir(tmp_path / "run"), max_length_tokens=60, num_rows=3)
    report = result.preflight
    assert report is not None
    assert 0 < report.num_rows_too_long < 12
    assert (report.num_rows, report.num_rows_total) == (3, 12)
    assert report.data_fingerprint == CanonicalDataset.open(path).manifest.fingerprint
    with pytest.raises(DatasetError, match="no row to train on"):
        looked_at(tiny_qwen2, path, tmp_path / "run", max_length_tokens=8)
    masked = sums_dataset(tmp_path / "masked", 2, masked=(0, 1))
    with pytest.raises(DatasetError, match="no row of the sample has a token"):
        looked_at(tiny_qwen2, masked, tmp_path / "run" / "run")


FLOOR = "dft floor 0.1"
ROWS: list[dict[str, Any]] = json.loads(FIGURES.read_text()) if FIGURES.exists() else []
DEMO: list[dict[str, Any]] = json.loads(FIGURES.with_name("demo.json").read_text()) if FIGURES.exists() else []
TOLERANCE = 0.05
"""Share of the questions by which a right verdict's objective may lie behind the best of its task, over seeds."""


def verdict_of(row: dict[str, Any]) -> Verdict:
    """Of one stored row of the calibration."""
    empty = dict.fromkeys(PartEvidence.model_fields) | {"num_tokens": 0, "counts": ()}
    empty |= {name: 0 for name in PartEvidence.model_fields if name.endswith(("_sum", "_count", "_mass"))}
    parts = [
        PartEvidence.model_validate({**empty, "part": part, **row["evidence"].get(part, {})})
        for part in ("all", "reasoning", "answer", "digits", "format", "end_of_turn")
    ]
    return decide(parts, RowEvidence.model_validate(row["rows"]))


def arm_of(verdict: Verdict) -> str:
    names = {"nll (SFT)": "nll", "dft with weight_floor 0.1": FLOOR, "power with alpha 0.5": "power 0.5"}
    return names.get(verdict.label, verdict.label)


def test_the_rule_is_right_on_every_task_and_seed_of_its_experiment() -> None:
    tasks = sorted({row["task"] for row in ROWS})
    assert {"practised", "varied", "facts", "few_facts", "new_format", "no_stop", "weak", "blank"} <= set(tasks)
    for task in tasks:
        rows = [row for row in ROWS if row["task"] == task]
        assert len({row["seed"] for row in rows}) >= 3, task
        (arm,) = {arm_of(verdict_of(row)) for row in rows}
        right = {
            name: sum(row["right"][name] for row in rows) / sum(row["asked"] for row in rows)
            for name in ("nll", "dft", "power 0.5", FLOOR)
        }
        assert right[arm] >= max(right.values()) - TOLERANCE, (task, arm, right)


def test_dft_is_advised_only_where_a_few_words_make_most_of_the_gradient() -> None:
    """The demo is no part of the experiment: pictures, right demonstrations, a start that is half as good as these."""
    for row in ROWS + DEMO:
        noise, verdict = noise_of(row), verdict_of(row)
        assert (verdict.label == "dft") <= (noise >= NOISE), (row["task"], row["seed"])
        if noise < NOISE:
            assert verdict.label == "nll (SFT)"
            assert row["right"]["nll"] >= row["right"]["dft"]
    assert max(noise_of(row) for row in DEMO) < NOISE


def test_the_bound_on_noise_lies_in_a_wide_gap() -> None:
    noisy = ("practised", "varied", "no_stop")
    over = [noise_of(row) for row in ROWS if row["task"] in noisy]
    under = [noise_of(row) for row in ROWS + DEMO if row["task"] in ("clean", "weak", "demo")]
    assert max(under) < 0.7 * NOISE < 1.3 * NOISE < min(over)


def noise_of(row: dict[str, Any]) -> float:
    return verdict_of(row).evidence["share_of_gradient_p_below_01"]


def share_of(row: dict[str, Any]) -> float:
    return verdict_of(row).evidence["share_of_words_p_below_01"]


def test_what_would_change_a_verdict_would_and_to_what_it_says() -> None:
    first = {task: next(row for row in ROWS if row["task"] == task) for task in ("blank", "clean", "facts", "weak")}
    assert [change.partition(" (now")[0] for change in verdict_of(first["blank"]).would_change] == [
        "less than 75% of words with a probability below 0.1"
    ]
    assert verdict_of(first["blank"]).would_change[0].endswith("then dft with weight_floor 0.1")
    assert any(change.endswith("then dft") for change in verdict_of(first["facts"]).would_change)
    # More noise would; an end of turn that is new changes nothing where there is no noise.
    assert "50% or more of the words' gradient in words with a probability below 0.1 (now 22%), because some" in str(
        verdict_of(first["weak"]).would_change
    )
    assert not any("end of turn" in change for change in verdict_of(first["clean"]).would_change)
    for row in ROWS:
        verdict = verdict_of(row)
        assert verdict.would_change
        assert not any(change.endswith(f"then {verdict.label}") for change in verdict.would_change)


def test_a_bound_chosen_without_a_seed_is_right_on_that_seed() -> None:
    clear = {"facts": True, "few_facts": True, "practised": False, "varied": False}
    chosen = [row for row in ROWS if row["task"] in clear]
    wins = {(row["task"], row["seed"]): row["right"]["nll"] > row["right"]["dft"] for row in chosen}
    for seed in {row["seed"] for row in chosen}:
        new = [share_of(row) for row in chosen if row["seed"] != seed and clear[row["task"]]]
        old = [share_of(row) for row in chosen if row["seed"] != seed and not clear[row["task"]]]
        bound = math.sqrt(min(new) * max(old))
        assert max(old) < NEW_CONTENT < min(new)
        for row in chosen:
            if row["seed"] == seed:
                assert (share_of(row) >= bound) == clear[row["task"]] == wins[row["task"], seed]


@pytest.fixture
def api(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Api]:
    url = copied_sqlite(request.getfixturevalue("_sqlite_template"), tmp_path / "vlm-dft.db")
    with serve(tmp_path, url) as running:
        yield running


def report_of(parts: list[PartEvidence], rows: RowEvidence) -> PreflightReport:
    return PreflightReport(
        num_rows=2,
        num_rows_total=2,
        num_rows_too_long=0,
        parts=tuple(parts),
        rows=rows,
        verdict=decide(parts, rows),
        data_fingerprint="f",
        device="cpu",
        precision="fp32",
        wall_seconds=0.1,
    )


def test_a_preflight_is_queued_run_and_shown(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    client = api.client()
    file_id = api.ready_file(client)
    body = {"model": "tiny", "training_file": file_id, "num_rows": 2, "metadata": {"team": "x"}}
    made: Any = client.post("/fine_tuning/preflights", cast_to=object, body=body)
    assert (made["object"], made["status"], made["report"]) == ("fine_tuning.preflight", "queued", None)
    claim = api.claim(made["id"])
    config = RunConfig.model_validate(claim.config)
    assert config.preflight is not None
    assert config.preflight.num_rows == 2
    tally = Tally()
    tally.add_row([frozenset({"answer"})], [math.log(0.9)], [0.1], [True])
    parts, rows = tally.evidence()
    result = RunResult(status="succeeded", preflight=report_of(list(parts), rows))
    with api.database.write() as s:
        assert store.succeed(s, claim, result)
    path = f"/fine_tuning/preflights/{made['id']}"
    shown: Any = client.get(path, cast_to=object)
    assert shown["status"] == "succeeded"
    assert shown["report"]["verdict"]["objective"]["name"] == "nll"
    listed: Any = client.get("/fine_tuning/preflights", cast_to=object)
    assert [each["id"] for each in listed["data"]] == [made["id"]]
    assert client.fine_tuning.jobs.list().data == []


def test_a_preflight_can_be_cancelled_and_refuses_what_a_job_refuses(api: Api) -> None:
    client = api.client()
    file_id = api.ready_file(client)
    made: Any = client.post("/fine_tuning/preflights", cast_to=object, body={"model": "tiny", "training_file": file_id})
    ended: Any = client.post(f"/fine_tuning/preflights/{made['id']}/cancel", cast_to=object)
    assert ended["status"] == "cancelled"
    assert api.http().get(f"/v1/fine_tuning/preflights/{ended['id']}/logs").json()["text"] == ""
    assert api.http().get(f"/v1/fine_tuning/jobs/{ended['id']}/logs").status_code == 404
    for wrong in ({"model": "none"}, {"num_rows": 0}, {"rows": 5}):
        body = {"model": "tiny", "training_file": file_id, **wrong}
        with pytest.raises(openai.BadRequestError, match=next(iter(wrong))):
            client.post("/fine_tuning/preflights", cast_to=object, body=body)


def test_the_command_prints_the_verdict_before_the_evidence(capsys: pytest.CaptureFixture[str]) -> None:
    from cli.preflight_report import print_report

    tally = Tally()
    tally.add_row([frozenset({"answer"})] * 2, [math.log(0.02), math.log(0.9)], [1.0, 0.1], [False, True])
    parts, rows = tally.evidence()
    print_report(report_of(list(parts), rows).model_dump(mode="json"))
    printed = capsys.readouterr().out
    assert printed.index("nll (SFT)") < printed.index("would change it") < printed.index("DFT discards")
    assert bars([0, 1, 8]) == " ▁█"
    assert CliRunner().invoke(app, ["preflight", "train.jsonl", "--model", "tiny", "--json"]).exit_code == 2


def test_a_small_part_of_the_experiment_run_again_has_the_winners_that_the_verdicts_name(tmp_path: Path) -> None:
    for task, winner, loser in (("known_homes", "dft", "nll"), ("new_homes", "nll", "dft")):
        row = measure(task, 0, tmp_path, ("nll", "dft"))
        assert arm_of(verdict_of(row)) == winner, task
        assert row["right"][winner] >= row["right"][loser] + 4, row["right"]
