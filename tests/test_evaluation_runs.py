"""One evaluation from config to score record: resumable, honest about subsets, nothing lost on failure."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from evaluation_fixtures import PIXELS, colour_benchmark, diverse_vlm, learned_vlm

from vlm_dft.config import BenchmarkConfig, EvalConfig, PixelConfig, RunConfig
from vlm_dft.errors import BenchmarkError, ConfigError, EvaluationError
from vlm_dft.evaluation import comparable, evaluate
from vlm_dft.evaluation.generation import Generator
from vlm_dft.evaluation.item_files import ItemRecord
from vlm_dft.evaluation.predictions import Prediction, PredictionLog, read_predictions
from vlm_dft.evaluation.report import by_role, score_table
from vlm_dft.results import Score
from vlm_dft.run_dir import RunDir


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return colour_benchmark(tmp_path_factory.mktemp("colours") / "colours")


@pytest.fixture(scope="module")
def diverse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return diverse_vlm(tmp_path_factory.mktemp("diverse") / "model")


def config(benchmark: Path, limit: int | None = None, **settings: Any) -> EvalConfig:
    colours = BenchmarkConfig(name="colours", kind="mathvision", path=benchmark, limit=limit)
    defaults: dict[str, Any] = {"max_new_tokens": 12, "pixels": PIXELS, "batch_size": 3}
    return EvalConfig(model="m", benchmarks=(colours,), **(defaults | settings))


def new_run(path: Path) -> RunDir:
    path.mkdir(parents=True)
    return RunDir(path)


@pytest.fixture
def asked_ids(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the items that are really generated, in order."""
    ids: list[str] = []
    stream = Generator.stream

    def counted(self: Generator, items: Any, samples: Any = None) -> Any:
        ids.extend(item.id for item in items)
        return stream(self, items, samples)

    monkeypatch.setattr(Generator, "stream", counted)
    return ids


def test_a_model_that_learned_the_answers_scores_and_its_base_does_not(
    benchmark: Path, diverse: Path, tmp_path: Path
) -> None:
    learned = learned_vlm(tmp_path / "learned", benchmark)
    run = new_run(tmp_path / "run")
    tuned, base = evaluate(config(benchmark, max_new_tokens=32), run, tuned=str(learned), base=str(diverse))
    assert (tuned.model_role, tuned.value, tuned.numerator, tuned.denominator) == ("tuned", 1.0, 8, 8)
    assert (tuned.failure_rate, tuned.extraction_rate) == (0, 1)
    assert (base.model_role, base.numerator) == ("base", 0)
    assert base.model_sha256 != tuned.model_sha256
    assert (tuned.n, tuned.n_total, tuned.whole, tuned.scorer, tuned.judge) == (8, 8, False, "native-rules/v1", "none")
    assert tuned.by_category["level: 1"] == {"value": 1.0, "n": 4.0}
    assert tuned.generation["temperature"] == 0
    assert comparable(tuned, base) is None
    for score in (tuned, base):
        directory = run.evaluation_path(score.model_role, "colours")
        assert Score.model_validate_json((directory / "score.json").read_bytes()) == score
        predictions = read_predictions(directory)
        assert [prediction.id for prediction in predictions] == [str(index) for index in range(8)]
        assert (run.path / score.predictions).is_file()
    first = read_predictions(run.evaluation_path("tuned", "colours"))[0]
    assert (first.extracted, first.rule, first.correct, first.finish_reason) == (
        first.answer,
        "answer_tag",
        True,
        "stop",
    )
    assert first.prompt.startswith("Which colour?")
    asked = (run.items_path("colours") / "items.jsonl").read_text().splitlines()
    assert [ItemRecord.model_validate_json(line).id for line in asked] == [str(index) for index in range(8)]
    progress = run.read_progress()
    assert progress is not None
    assert (progress.phase, progress.benchmark, progress.items_done, progress.items_total) == (
        "evaluating",
        "colours",
        8,
        8,
    )
    table = score_table(by_role([tuned, base]))
    assert "| colours   | acc    | 8 | 0.0 ± 0.0 | 100.0 ± 0.0 |" in table
    assert "a subset of the published benchmark" in table


def test_real_items_of_all_three_benchmarks_reach_a_score_record(
    shared_data: Path, diverse: Path, tmp_path: Path
) -> None:
    kinds = (("mathverse", "mathverse", 10), ("mathvision", "mathvision", 6), ("wemath", "wemath_nc", 10))
    benchmarks = tuple(
        BenchmarkConfig(name=kind, kind=kind, path=shared_data / name, limit=limit)  # type: ignore[arg-type]
        for kind, name, limit in kinds
    )
    pixels = PixelConfig(max_pixels=32 * 28 * 28)
    settings = EvalConfig(model="m", benchmarks=benchmarks, max_new_tokens=8, batch_size=4, pixels=pixels)
    scores = evaluate(settings, new_run(tmp_path / "run"), tuned=str(diverse), base=None)
    assert [(score.benchmark, score.n, score.n_total) for score in scores] == [
        ("mathverse", 10, 305),
        ("mathvision", 6, 304),
        ("wemath", 9, 268),
    ]
    assert not any(score.whole for score in scores)
    mathverse, _, wemath = scores
    assert mathverse.denominator == 5  # the mean over versions
    assert (wemath.metric, wemath.denominator) == ("score_strict_of_subset", 3)  # groups at hand, not 525
    assert {"strict", "loose", "S1", "S2"} <= wemath.by_category.keys()


SCRIPT = """
import sys
from pathlib import Path
from vlm_dft.config import EvalConfig
from vlm_dft.evaluation import evaluate
from vlm_dft.run_dir import RunDir
run, model = Path(sys.argv[1]), sys.argv[2]
evaluate(EvalConfig.model_validate_json(sys.argv[3]), RunDir(run), tuned=model, base=None)
"""


@pytest.mark.chaos
def test_kill_9_loses_a_batch_at_most_and_nothing_is_generated_twice(
    benchmark: Path, diverse: Path, tmp_path: Path, asked_ids: list[str]
) -> None:
    settings = config(benchmark, batch_size=1, max_new_tokens=200, temperature=1.0)
    whole = new_run(tmp_path / "whole")
    expected = evaluate(settings, whole, tuned=str(diverse), base=None)
    asked_ids.clear()
    run = new_run(tmp_path / "run")
    path = run.evaluation_path("tuned", "colours") / "predictions.jsonl"
    arguments = [sys.executable, "-c", SCRIPT, str(run.path), str(diverse), settings.model_dump_json()]
    process = subprocess.Popen(arguments, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with path.open("ab") as file:
        file.write(b'{"id": "torn')  # as if it had been killed while writing
    kept = {json.loads(line)["id"] for line in path.read_bytes().split(b"\n")[:-1]}
    assert 3 <= len(kept) < 8
    (score,) = evaluate(settings, run, tuned=str(diverse), base=None)
    assert sorted(asked_ids) == sorted({str(index) for index in range(8)} - kept)
    assert path.read_bytes().count(b"\n") == 8
    found = {entry.id: entry for entry in read_predictions(path.parent)}
    assert found == {entry.id: entry for entry in read_predictions(whole.evaluation_path("tuned", "colours"))}
    ignored = {"wall_seconds": 0.0}
    assert score.model_copy(update=ignored) == expected[0].model_copy(update=ignored)


def test_a_later_attempt_goes_on_from_an_earlier_one(
    benchmark: Path, diverse: Path, tmp_path: Path, asked_ids: list[str]
) -> None:
    first = new_run(tmp_path / "attempt-1")
    evaluate(config(benchmark, limit=4), first, tuned=str(diverse), base=None)
    asked_ids.clear()
    second = new_run(tmp_path / "attempt-2")
    (score,) = evaluate(config(benchmark, resume_from=first.path), second, tuned=str(diverse), base=None)
    assert sorted(asked_ids) == ["4", "5", "6", "7"]
    assert (score.n, len(read_predictions(second.evaluation_path("tuned", "colours")))) == (8, 8)
    assert len(read_predictions(first.evaluation_path("tuned", "colours"))) == 4


def test_an_attempt_killed_early_does_not_hide_the_answers_of_those_before_it(
    benchmark: Path, diverse: Path, tmp_path: Path, asked_ids: list[str]
) -> None:
    first = new_run(tmp_path / "attempt-1")
    evaluate(config(benchmark, limit=4), first, tuned=str(diverse), base=None)
    second = new_run(tmp_path / "attempt-2")  # it never came to its first answer
    second.create(RunConfig(run_id="x", evaluation=config(benchmark, resume_from=first.path)))
    asked_ids.clear()
    third = new_run(tmp_path / "attempt-3")
    evaluate(config(benchmark, resume_from=second.path), third, tuned=str(diverse), base=None)
    assert sorted(asked_ids) == ["4", "5", "6", "7"]


@pytest.mark.parametrize("change", [{"max_new_tokens": 5}, {"pixels": PixelConfig(max_pixels=8 * 28 * 28)}])
def test_predictions_of_other_settings_are_set_aside_not_mixed(
    benchmark: Path, diverse: Path, tmp_path: Path, asked_ids: list[str], change: dict[str, Any]
) -> None:
    run = new_run(tmp_path / "run")
    (before,) = evaluate(config(benchmark, limit=2), run, tuned=str(diverse), base=None)
    asked_ids.clear()
    (after,) = evaluate(config(benchmark, limit=2, **change), run, tuned=str(diverse), base=None)
    assert sorted(asked_ids) == ["0", "1"]
    assert comparable(before, after) is not None
    directory = run.evaluation_path("tuned", "colours")
    aside = list(directory.glob("predictions.*.jsonl"))
    assert len(aside) == 1
    assert aside[0].read_bytes().count(b"\n") == 2


def test_a_bad_benchmark_fails_before_any_model_is_loaded(benchmark: Path, tmp_path: Path) -> None:
    absent = BenchmarkConfig(name="absent", kind="wemath", path=tmp_path / "absent")
    settings = config(benchmark)
    settings = settings.model_copy(update={"benchmarks": (*settings.benchmarks, absent)})
    with pytest.raises(BenchmarkError, match="wemath is not at"):
        evaluate(settings, new_run(tmp_path / "run"), tuned="/no/such/model", base=None)


def test_two_benchmarks_in_one_directory_are_refused(benchmark: Path, tmp_path: Path) -> None:
    settings = config(benchmark)
    names = ("mathvision:a", "mathvision-a")
    twins = tuple(settings.benchmarks[0].model_copy(update={"name": name}) for name in names)
    with pytest.raises(ConfigError, match="'mathvision:a' and 'mathvision-a' would write to the same directory"):
        evaluate(
            settings.model_copy(update={"benchmarks": twins}), new_run(tmp_path / "run"), tuned="/no/model", base=None
        )


def test_a_text_model_cannot_be_scored_on_pictures(benchmark: Path, tiny_qwen2: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="cannot see the pictures of colours"):
        evaluate(config(benchmark), new_run(tmp_path / "run"), tuned=str(tiny_qwen2), base=None)


def test_a_picture_damaged_half_way_keeps_the_predictions_before_it(diverse: Path, tmp_path: Path) -> None:
    """The header was read at the start; the pixels only fail when they are decoded."""
    benchmark = colour_benchmark(tmp_path / "colours")
    from PIL import Image

    victim = benchmark / "images" / "0.png"  # the smallest picture with the shortest prompt is asked last
    Image.effect_noise((56, 56), 50).save(victim)
    whole = victim.read_bytes()
    victim.write_bytes(whole[: len(whole) // 2])
    run = new_run(tmp_path / "run")
    with pytest.raises(BenchmarkError, match=r"row 1: image: the image is damaged"):
        evaluate(config(benchmark, batch_size=1), run, tuned=str(diverse), base=None)
    assert len(read_predictions(run.evaluation_path("tuned", "colours"))) >= 1


def prediction(id: str, text: str = "x") -> Prediction:
    return Prediction(
        id=id,
        prompt="q",
        prediction=text,
        extracted=None,
        rule="none",
        answer="1",
        correct=False,
        finish_reason="stop",
        num_generated_tokens=1,
    )


def test_a_torn_last_line_is_cut_and_appending_goes_on(tmp_path: Path) -> None:
    log = PredictionLog.open(tmp_path, {"model": "a"})
    log.append([prediction("1"), prediction("2", "line\nbreak \u2028 and \U0001f600")])
    path = tmp_path / "predictions.jsonl"
    with path.open("ab") as file:
        file.write(b'{"id":"3","pro')
    again = PredictionLog.open(tmp_path, {"model": "a"})
    assert list(again.done) == ["1", "2"]
    again.append([prediction("3")])
    assert [entry.id for entry in read_predictions(tmp_path)] == ["1", "2", "3"]
    assert read_predictions(tmp_path)[1].prediction == "line\nbreak \u2028 and \U0001f600"


def test_a_line_that_is_no_prediction_is_named(tmp_path: Path) -> None:
    (tmp_path / "predictions.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(EvaluationError, match=r"predictions\.jsonl: line 1 is not a prediction"):
        read_predictions(tmp_path)


def test_an_empty_answer_is_a_failure() -> None:
    assert prediction("1", " \n").failed
    assert not prediction("1", "12").failed


def test_loaders_rules_and_reports_need_no_torch() -> None:
    """Where torch cannot be imported, everything but generation works."""
    script = """
import sys
for name in ("torch", "torchvision", "transformers"):
    sys.modules[name] = None
import vlm_dft.evaluation, vlm_dft.evaluation.benchmarks, vlm_dft.evaluation.report
import vlm_dft.evaluation.predictions, vlm_dft.evaluation.latex
from vlm_dft.evaluation.equality import is_equal
from vlm_dft.evaluation.latex import LatexProcess
with LatexProcess() as latex:
    assert is_equal("\\\\frac{1}{2}", "0.5", latex)
"""
    subprocess.run([sys.executable, "-c", script], check=True)
