"""VLMEvalKit as a process that lies about how it went: a score comes only from what it really wrote."""

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
from evaluation_fixtures import colour_benchmark, diverse_vlm
from vlmevalkit_fixtures import NUM_ITEMS, answered_work, eval_config, fake_installation, wemath_benchmark

from vlm_dft.config import BenchmarkConfig, VlmevalkitConfig
from vlm_dft.errors import EvaluationError, OutOfMemoryError
from vlm_dft.evaluation import backends, comparable, evaluate
from vlm_dft.evaluation.items import Item
from vlm_dft.evaluation.predictions import read_predictions
from vlm_dft.evaluation.vlmevalkit import process
from vlm_dft.evaluation.vlmevalkit import work as working
from vlm_dft.evaluation.vlmevalkit.backend import predictions_of, score_of, written
from vlm_dft.evaluation.vlmevalkit.installation import Installation
from vlm_dft.evaluation.vlmevalkit.work import Work
from vlm_dft.results import Score
from vlm_dft.run_dir import RunDir
from vlm_dft.tiny import build_tiny_vlm


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wemath_benchmark(tmp_path_factory.mktemp("wemath") / "wemath")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """As much of a model directory as is looked at where every answer is known."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "tokenizer.json").write_text("{}")
    return directory


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    (tmp_path / "run").mkdir()
    return RunDir(tmp_path / "run")


def one_group_right(item: Item) -> str:
    return "Answer: B" if item.group == "2steps:1" else "\\boxed{B}"  # which exact matching takes for none


def work_of(
    benchmark: Path, run: RunDir, installation: Installation, model: Path, limit: int | None = None, **settings: Any
) -> Work:
    return answered_work(eval_config(benchmark, limit, **settings), run, installation, model, one_group_right)


def scored(work: Work) -> Score:
    """What evaluate does with the one benchmark once VLMEvalKit has ended."""
    (entry,) = work.asked
    predictions = predictions_of(work, entry)
    return written(work, entry, score_of(work, entry, predictions, seconds=1.0), predictions)


def starts(installation: Installation, mode: str) -> int:
    path = installation.root / f"{mode}.starts"
    return int(path.read_text()) if path.exists() else 0


def test_a_score_is_what_vlmevalkit_decided_row_by_row(
    benchmark: Path, model: Path, run: RunDir, tmp_path: Path
) -> None:
    """Rows come shuffled, percentages as text with a sign; the score is over the groups at hand, not over 525."""
    work = work_of(benchmark, run, fake_installation(tmp_path), model)
    work.infer()
    work.score()
    score = scored(work)
    assert (score.metric, score.numerator, score.denominator) == ("score_strict_of_subset", 1, 3)
    assert (score.scorer, score.judge, score.prompt) == ("vlmeval@fake", "exact_matching", "direct")
    assert (score.n, score.n_total, score.whole) == (NUM_ITEMS, NUM_ITEMS, False)
    assert (score.failure_rate, score.extraction_rate) == (0, 0.3)
    assert score.by_category["S1"] == {"value": 2 / 7, "n": 7}
    directory = run.evaluation_path("tuned", "wemath")
    assert Score.model_validate_json((directory / "score.json").read_bytes()) == score
    predictions = read_predictions(directory)
    assert [entry.id for entry in predictions] == [item.id for item in work.asked[0].chosen.items]
    assert [entry.correct for entry in predictions] == [True] * 3 + [False] * 7
    assert (predictions[0].extracted, predictions[0].rule, predictions[-1].extracted) == ("B", "benchmark", None)
    native = score.model_copy(update={"scorer": "native-rules/v1"})
    assert comparable(score, native) == "scorer differs: 'vlmeval@fake' and 'native-rules/v1'"


def test_a_model_that_solves_nothing_has_the_score_zero(
    benchmark: Path, model: Path, run: RunDir, tmp_path: Path
) -> None:
    """VLMEvalKit would divide by the number of solved problems and end with an error."""
    work = answered_work(eval_config(benchmark), run, fake_installation(tmp_path), model, lambda item: "")
    work.infer()
    work.score()
    score = scored(work)
    assert (score.value, score.failure_rate, score.extraction_rate) == (0, 1, 0)


@pytest.mark.parametrize("death", ["crash", "sigterm", "half"])
def test_a_start_that_dies_is_followed_by_one_that_reuses(
    benchmark: Path, model: Path, run: RunDir, tmp_path: Path, death: str
) -> None:
    installation = fake_installation(tmp_path, infer=[death, "ok"], eval_=["crash", "ok"])
    work = work_of(benchmark, run, installation, model)
    work.infer()
    work.score()
    assert (starts(installation, "infer"), starts(installation, "eval")) == (2, 2)
    arguments = [json.loads(line) for line in (installation.root / "arguments.jsonl").read_text().splitlines()]
    assert all("--reuse" in line for line in arguments if "infer" in line[line.index("--mode") + 1])
    assert [line[line.index("--reuse-aux") + 1] for line in arguments] == ["infer", "all", "infer", "all"]


def test_a_start_that_always_dies_is_given_up_with_its_reason(
    benchmark: Path, model: Path, run: RunDir, tmp_path: Path
) -> None:
    installation = fake_installation(tmp_path, infer=["crash"])
    with pytest.raises(EvaluationError, match=r"wrote nothing to .*it exited with code 1; see .*log.txt") as caught:
        work_of(benchmark, run, installation, model).infer()
    assert starts(installation, "infer") == working.MAX_STARTS
    assert "evaluate again" in (caught.value.hint or "")


def test_what_an_earlier_start_wrote_does_not_count_for_one_that_came_to_nothing(
    benchmark: Path, model: Path, run: RunDir, tmp_path: Path
) -> None:
    installation = fake_installation(tmp_path, eval_=["ok", "crash"])
    work = work_of(benchmark, run, installation, model)
    work.infer()
    work.score()
    with pytest.raises(EvaluationError, match="wrote nothing to"):
        work.score()


def test_exit_code_0_with_an_error_is_a_failure_and_is_not_repeated(
    benchmark: Path, model: Path, run: RunDir, tmp_path: Path
) -> None:
    installation = fake_installation(tmp_path, eval_=["error"])
    work = work_of(benchmark, run, installation, model)
    work.infer()
    with pytest.raises(EvaluationError, match="failed on b00-WeMath: float division by zero"):
        work.score()
    assert starts(installation, "eval") == 1


@pytest.mark.chaos
def test_a_start_that_hangs_is_ended_with_its_whole_group(
    benchmark: Path, model: Path, run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "TERM_SECONDS", 0.2)
    installation = fake_installation(tmp_path, infer=["hang", "ok"])
    limits = VlmevalkitConfig(stall_timeout_seconds=3)
    work = work_of(benchmark, run, installation, model, vlmevalkit=limits)
    work.infer()
    assert starts(installation, "infer") == 2
    assert is_gone(int((installation.root / "child.pid").read_text()))


@pytest.mark.chaos
def test_a_start_that_takes_too_long_is_ended_and_not_repeated(
    benchmark: Path, model: Path, run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "TERM_SECONDS", 0.2)
    installation = fake_installation(tmp_path, infer=["hang"])
    limits = VlmevalkitConfig(total_timeout_seconds=3)
    with pytest.raises(EvaluationError, match="its time was up"):
        work_of(benchmark, run, installation, model, vlmevalkit=limits).infer()
    assert starts(installation, "infer") == 1


@pytest.mark.chaos
def test_a_stop_request_leaves_no_process_behind(
    benchmark: Path, model: Path, run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlm_dft.interruption import Interrupted

    installation = fake_installation(tmp_path, infer=["hang"])
    work = work_of(benchmark, run, installation, model)
    child = installation.root / "child.pid"

    def interrupt(*_: object) -> None:
        if child.exists() and child.read_text():
            raise Interrupted("SIGTERM")

    monkeypatch.setattr(working.Meter, "tell", interrupt)
    with pytest.raises(Interrupted):
        work.infer()
    assert is_gone(int(child.read_text()))


@pytest.mark.chaos
def test_vlmevalkits_process_does_not_outlive_ours(benchmark: Path, model: Path, run: RunDir, tmp_path: Path) -> None:
    installation = fake_installation(tmp_path, infer=["hang"])
    script = """
import pathlib, sys
from vlm_dft.evaluation.vlmevalkit.installation import Installation
from vlm_dft.evaluation.vlmevalkit.process import Deadline, environment, run_once
root, work = map(pathlib.Path, sys.argv[1:])
installation = Installation(pathlib.Path(sys.executable), root, "fake", {})
run_once(installation, ["--mode", "infer"], environment(work, work, {}), work, Deadline(600, 1e9), lambda: None)
"""
    process = subprocess.Popen([sys.executable, "-c", script, str(installation.root), str(run.path)])
    child = installation.root / "child.pid"
    deadline = time.monotonic() + 60
    while not (child.exists() and child.read_text()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    gone = is_gone(int((installation.root / "own.pid").read_text()))
    os.kill(int(child.read_text()), signal.SIGKILL)  # the stand-in's own child knows nothing of us
    assert gone


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("short", "has 9 rows where 10 items were asked"),
        ("marker", "holds 'Failed to obtain answer via API.', which is not what the model answered"),
    ],
)
def test_predictions_that_are_not_the_answers_are_refused(
    benchmark: Path, model: Path, run: RunDir, tmp_path: Path, fault: str, message: str
) -> None:
    with pytest.raises(EvaluationError, match=message):
        work_of(benchmark, run, fake_installation(tmp_path, infer=[fault]), model).infer()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no-table", "score.csv is absent"),
        ("wrong-table", r"Score \(Strict\) is 12.34, but the rows add up to 99.6"),
        ("nan", r"CompleteMastery \(Strict\) count: no count in 'nan%'"),
        ("skip", "left b00-WeMath out: No infer result found"),
    ],
)
def test_a_score_table_that_is_absent_or_wrong_fails_the_score(
    benchmark: Path, model: Path, run: RunDir, tmp_path: Path, fault: str, message: str
) -> None:
    work = work_of(benchmark, run, fake_installation(tmp_path, eval_=[fault]), model)
    work.infer()
    with pytest.raises(EvaluationError, match=message):
        work.score()


def test_no_secret_and_no_rank_reaches_vlmevalkit(
    benchmark: Path, model: Path, run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("VLM_DFT_SECRET", "OPENAI_API_KEY", "HF_TOKEN", "MMEVAL_ROOT", "RANK", "WORLD_SIZE", "HTTP_PROXY"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    installation = fake_installation(tmp_path)
    work = work_of(benchmark, run, installation, model)
    work.infer()
    work.score()
    found = json.loads((installation.root / "infer.environment.json").read_text())
    assert "secret" not in found.values()
    assert (found["PRED_FORMAT"], found["LMUData"], found["CUDA_VISIBLE_DEVICES"]) == ("tsv", str(work.data), "0")
    assert found["HOME"] != os.environ.get("HOME")
    assert json.loads((installation.root / "eval.environment.json").read_text())["CUDA_VISIBLE_DEVICES"] == ""


def test_what_the_model_class_raises_arrives_as_what_it_is(
    benchmark: Path, model: Path, run: RunDir, tmp_path: Path
) -> None:
    work = work_of(benchmark, run, fake_installation(tmp_path, infer=["error"]), model)
    failure = {"class": "OutOfMemoryError", "message": "no memory left", "param": "evaluation.batch_size"}

    def start_then_fail(*_: object) -> process.End:
        (work.answers / "failure.json").write_text(json.dumps(failure))
        return process.End("ended", 0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(working, "run_once", start_then_fail)
        with pytest.raises(OutOfMemoryError, match="no memory left") as caught:
            work.infer()
    assert caught.value.param == "evaluation.batch_size"


def test_another_setting_has_another_directory_and_a_larger_limit_keeps_the_answers(
    benchmark: Path, model: Path, run: RunDir, tmp_path: Path
) -> None:
    installation = fake_installation(tmp_path)
    first = work_of(benchmark, run, installation, model, limit=3)
    assert first.path != work_of(benchmark, run, installation, model, max_new_tokens=7).path
    config = eval_config(benchmark)
    whole = [working.read_benchmark(config, 0, config.benchmarks[0])]
    larger = Work(config, run, installation, whole, first.model)
    assert larger.path == first.path
    assert list(first.asked[0].table.rows) == [0, 1, 2]
    assert len(whole[0].table.rows) == NUM_ITEMS


def test_a_later_attempt_takes_over_the_answers_of_an_earlier_one(
    benchmark: Path, model: Path, run: RunDir, tmp_path: Path
) -> None:
    installation = fake_installation(tmp_path)
    first = work_of(benchmark, run, installation, model)
    (tmp_path / "later").mkdir()
    config = eval_config(benchmark, resume_from=run.path)
    later = Work(config, RunDir(tmp_path / "later"), installation, first.asked, first.model)
    later.prepare()
    assert later.answers_path(later.asked[0]).read_bytes() == first.answers_path(first.asked[0]).read_bytes()
    later.infer()
    assert len(later.answers_of(later.asked[0])) == NUM_ITEMS


def is_gone(pid: int) -> bool:
    """Whether the process has ended; a moment is given to whoever reaps it."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def test_both_backends_share_an_evaluation_its_order_and_the_score_cache(
    benchmark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """auto: We-Math by VLMEvalKit, whose process loads the model; MathVision, for want of a judge, natively."""
    installation = fake_installation(tmp_path)
    monkeypatch.setattr(backends, "find_installation", lambda: installation)
    tuned, base = diverse_vlm(tmp_path / "tuned"), build_tiny_vlm(tmp_path / "base", seed=3)
    colours = BenchmarkConfig(name="colours", kind="mathvision", path=colour_benchmark(tmp_path / "colours"))
    config = eval_config(benchmark, limit=6, max_new_tokens=4, score_cache=tmp_path / "cache")
    config = config.model_copy(update={"backend": "auto", "benchmarks": (*config.benchmarks, colours)})
    found = {}
    for name in ("first", "second"):
        run = RunDir(tmp_path / name)
        run.path.mkdir()
        found[name] = evaluate(config, run, tuned=str(tuned), base=str(base))
        for score in found[name]:
            assert len(read_predictions((run.path / score.predictions).parent)) == score.n
    progress = RunDir(tmp_path / "first").read_progress()
    assert progress is not None
    assert (progress.phase, progress.benchmark, progress.items_done) == ("evaluating", "wemath", 6)
    described = [(score.model_role, score.benchmark, score.scorer.split("@")[0]) for score in found["first"]]
    assert described == [
        ("tuned", "wemath", "vlmeval"),
        ("tuned", "colours", "native-rules/v1"),
        ("base", "wemath", "vlmeval"),
        ("base", "colours", "native-rules/v1"),
    ]
    assert all(score.generation["precision"] == "float32" for score in found["first"])
    assert [score.from_cache for score in found["second"]] == [True] * 4
    assert [score.value for score in found["second"]] == [score.value for score in found["first"]]
    assert starts(installation, "infer") == 2  # one model each, none in the second run
