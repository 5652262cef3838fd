"""Our rules against VLMEvalKit itself, on the real benchmarks: run where VLM_DFT_VLMEVAL_PYTHON and _ROOT are set.

Predictions are made up, in every form that models use, from the items' right and wrong answers. The judge is a server
that decides by our rules, so that what is compared is all that VLMEvalKit does around it: inference of options,
equality, files, aggregation.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from evaluation_fixtures import diverse_vlm
from judge_stub import KEY, RuleJudge, judge_server
from vlmevalkit_fixtures import answered_work

from vlm_dft.config import BenchmarkConfig, EvalConfig, JudgeConfig, PixelConfig
from vlm_dft.evaluation import backends, mathverse, wemath
from vlm_dft.evaluation.answers import marked_answer, without_reasoning
from vlm_dft.evaluation.benchmarks import RULES
from vlm_dft.evaluation.grading import Grade
from vlm_dft.evaluation.items import Item
from vlm_dft.evaluation.latex import LatexProcess
from vlm_dft.evaluation.options import infer_option
from vlm_dft.evaluation.predictions import read_predictions
from vlm_dft.evaluation.vlmevalkit import outcome
from vlm_dft.evaluation.vlmevalkit.installation import Installation, find_installation
from vlm_dft.evaluation.vlmevalkit.work import Asked, Work
from vlm_dft.run_dir import RunDir

pytestmark = pytest.mark.timeout(900)

DATA = (("mathverse", "mathverse"), ("mathvision", "mathvision"), ("wemath", "wemath_nc"))
FORMS = (
    *("\\boxed{%s}", "The answer is %s.", "%s", "<answer>%s</answer>", "(%s)", "**%s**", "Answer: (%s)", "$%s$"),
    *("First we look at it. So the result follows.\n\nAnswer: %s", "It is %s because the others do not fit."),
    *("Step 1: a = 3. Step 2: b = 4.\nTherefore, the final answer is \\boxed{%s}.", "Final answer: $%s$"),
    *("<Thought process>: <<we count>> <Answer>: <<%s>>", "<think>maybe B or C</think>\n\\boxed{%s}"),
)
WITHOUT_ANSWER = ("", "I cannot tell.", "nan", "NA", "None", "007", "\r\n\ttabs\x07 and \U0001f600", '"quoted"')
HOSTILE = (
    "__import__('os').system('touch {path}')",
    "open('{path}', 'w').write('x')",
    "[x for x in ().__class__.__base__.__subclasses__() if x.__name__ == 'Popen'][0](['touch', '{path}'])",
    "9**9**9**9",
    "\\frac" + "{" * 300,
    "\\boxed{{__import__('os').system('touch {path}')}}",
    "9^{{9^{{9^{{9^{{9}}}}}}}}",
    "../../../../{path}",
    "; touch {path}",
    "$(touch {path})",
)


@pytest.fixture(scope="module")
def installation(vlmeval_environment: dict[str, str]) -> Installation:
    found = find_installation(vlmeval_environment)
    assert isinstance(found, Installation), found
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return diverse_vlm(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def latex() -> Iterator[LatexProcess]:
    with LatexProcess() as process:
        yield process


def made_up(item: Item) -> str:
    """A response to the item, the same in every run: right three times of five."""
    draw = random.Random(hashlib.sha256(f"{item.id} {item.prompt}".encode()).digest())
    is_right = draw.random() < 0.6
    if item.options:
        answer = item.answer.strip("() ") if is_right else draw.choice(list(item.options))
    else:
        answer = item.answer if is_right else draw.choice(("12", "0.5", "\\frac{1}{2}", "7 cm", "x^2+1"))
    form = draw.choice((*FORMS, "option text", "nothing"))
    if form == "nothing":
        return draw.choice(WITHOUT_ANSWER)
    return item.options.get(answer, answer) if form == "option text" else form % answer


def config(shared_data: Path, kinds: tuple[str, ...], limit: int | None = None, **settings: Any) -> EvalConfig:
    entries = [
        BenchmarkConfig(name=kind, kind=kind, path=shared_data / name, limit=limit)  # type: ignore[arg-type]
        for kind, name in DATA
        if kind in kinds
    ]
    return EvalConfig(model="m", benchmarks=tuple(entries), backend="vlmevalkit", **settings)


def native(entry: Asked, work: Work, latex: LatexProcess) -> dict[str, Grade]:
    grade, answers = RULES[entry.config.kind].grade, work.answers_of(entry)
    return {item.id: grade(item, answers[index].text, latex) for index, item in entry.table.rows.items()}


def text(entry: Asked, work: Work) -> dict[str, str]:
    answers = work.answers_of(entry)
    return {item.id: answers[index].text for index, item in entry.table.rows.items()}


def differing(first: dict[str, Grade], second: dict[str, Grade]) -> list[str]:
    assert first.keys() == second.keys()
    return [id for id in first if first[id].correct != second[id].correct]


def test_wemath_without_a_judge_is_graded_alike(
    shared_data: Path, installation: Installation, model: Path, tmp_path: Path, latex: LatexProcess
) -> None:
    work = answered_work(config(shared_data, ("wemath",)), RunDir(tmp_path), installation, model, made_up)
    work.infer()
    work.score()
    (entry,) = work.asked
    theirs = outcome.read_grades(work.newest_run(), entry.table, outcome.EXACT_MATCHING)
    responses = text(entry, work)
    exact = {item.id: wemath.grade_exactly(item, responses[item.id]) for item in entry.chosen.items}
    assert (len(theirs), differing(theirs, exact)) == (268, [])
    # Quirk 1: VLMEvalKit sees no answer in \boxed{B}, in <answer>B</answer>, and after reasoning that names others.
    marked = {id for id, response in responses.items() if marked_answer(without_reasoning(response))}
    assert set(differing(theirs, native(entry, work, latex))) <= marked
    assert len(marked) < 134, "more than half of the rows are compared with all that our rules do"


def test_judged_benchmarks_are_graded_alike(
    shared_data: Path,
    installation: Installation,
    model: Path,
    tmp_path: Path,
    latex: LatexProcess,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """MathVerse and MathVision by row and as scores; We-Math as VLMEvalKit infers options where there is a judge."""
    monkeypatch.setenv("VLM_DFT_JUDGE_API_KEY", KEY)
    judge = RuleJudge(mathverse.load(shared_data / "mathverse", "direct").items)
    with judge_server(judge.answer) as (url, requests):
        endpoint = JudgeConfig(base_url=url, model="stub/judge")
        settings = config(shared_data, ("mathverse", "mathvision", "wemath"), judge=endpoint)
        work = answered_work(settings, RunDir(tmp_path), installation, model, made_up)
        work.infer()
        work.score()
        assert {request["authorization"] for request in requests} == {f"Bearer {KEY}"}
        assert {request["body"]["model"] for request in requests} == {"stub/judge"}
    judge.close()
    by_kind = {entry.config.kind: entry for entry in work.asked}
    theirs = {kind: outcome.read_grades(work.newest_run(), entry.table, "judge") for kind, entry in by_kind.items()}
    ours = {kind: native(by_kind[kind], work, latex) for kind in ("mathverse", "mathvision")}
    assert differing(theirs["mathverse"], ours["mathverse"]) == []
    # Quirk 2: it infers MathVision's options from the whole response, marks included, where one-letter options such as
    # "A" are found inside words: <answer>E</answer> chooses A.
    quirks = differing(theirs["mathvision"], ours["mathvision"])
    assert set(quirks) <= {id for id, response in text(by_kind["mathvision"], work).items() if marked_answer(response)}
    assert len(quirks) <= 3
    for kind, grades in ours.items():
        agreed = grades | {id: theirs[kind][id] for id in quirks if id in grades}
        summarize, chosen = RULES[kind].summarize, by_kind[kind].chosen
        assert summarize(chosen, theirs[kind]) == summarize(chosen, agreed)
    entry = by_kind["wemath"]
    responses = text(entry, work)
    for item in entry.chosen.items:
        response = responses[item.id]
        letter = infer_option(response, item.options) or infer_option(RuleJudge.choose(response), item.options)
        assert theirs["wemath"][item.id].correct == (letter == item.answer), (item.id, response)
    for path in work.path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def test_hostile_predictions_run_nothing(
    shared_data: Path, installation: Installation, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without our guards VLMEvalKit evaluates MathVision's predictions as Python."""
    monkeypatch.setenv("VLM_DFT_JUDGE_API_KEY", KEY)
    trace = tmp_path / "trace"

    def hostile(item: Item) -> str:
        return HOSTILE[int(item.id) % len(HOSTILE)].format(path=trace)

    judge = RuleJudge()
    with judge_server(judge.answer) as (url, _):
        endpoint = JudgeConfig(base_url=url, model="stub")
        settings = config(shared_data, ("mathvision",), limit=60, judge=endpoint)
        work = answered_work(settings, RunDir(tmp_path / "run"), installation, model, hostile)
        work.infer()
        work.score()
    judge.close()
    assert not trace.exists()


def test_a_model_answers_alike_behind_both_backends(
    shared_data: Path, model: Path, tmp_path: Path, vlmeval_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in vlmeval_environment.items():
        monkeypatch.setenv(name, value)
    benchmark = BenchmarkConfig(name="wemath", kind="wemath", path=shared_data / "wemath_nc", limit=20)
    pixels = PixelConfig(max_pixels=32 * 28 * 28)
    settings = EvalConfig(model="m", benchmarks=(benchmark,), max_new_tokens=8, pixels=pixels, prompt="cot")
    answers = {}
    for name in ("vlmevalkit", "native"):
        run = RunDir(tmp_path / name)
        run.path.mkdir()
        chosen = settings.model_copy(update={"backend": name})
        (score,) = backends.evaluate(chosen, run, tuned=str(model), base=None)
        assert (score.n, score.metric) == (18, "score_strict_of_subset")
        found = read_predictions(run.evaluation_path("tuned", "wemath"))
        answers[name] = {entry.id: (entry.prompt, entry.prediction, entry.finish_reason) for entry in found}
    assert answers["vlmevalkit"] == answers["native"]
    assert len(set(answers["native"].values())) > 10
