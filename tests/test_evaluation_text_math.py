"""Text mathematics: published files are read, math-verify decides, average@k and pass@k are what they say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_evaluation_runs import new_run

from vlm_dft.config import BenchmarkConfig, EvalConfig
from vlm_dft.errors import BenchmarkError, ConfigError
from vlm_dft.evaluation import comparable, evaluate, latex_child, text_math
from vlm_dft.evaluation.benchmarks import load_benchmark
from vlm_dft.evaluation.grading import Grade, Outcome, Summary, average
from vlm_dft.evaluation.items import Benchmark
from vlm_dft.evaluation.latex import LatexProcess
from vlm_dft.evaluation.predictions import read_predictions


@pytest.fixture(scope="module")
def latex() -> Iterator[LatexProcess]:
    with LatexProcess() as process:
        yield process


def read(path: Path, prompt: Any = "cot") -> Benchmark:
    return load_benchmark(BenchmarkConfig(name="x", kind="text_math", path=path), prompt)


def written(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_math500_and_gsm8k_are_read_whole(shared_data: Path) -> None:
    math500, gsm8k = read(shared_data / "math500"), read(shared_data / "gsm8k" / "test.jsonl")
    assert (len(math500.items), len(gsm8k.items)) == (500, 1319)
    first = math500.items[0]
    assert (first.id, first.answer) == ("test/precalculus/807.json", "\\left( 3, \\frac{\\pi}{2} \\right)")
    assert first.categories == {"subject": "Precalculus", "level": "2"}
    assert first.prompt.endswith("\nPlease reason step by step, and put your final answer within \\boxed{}.")
    assert gsm8k.items[0].answer == "18"
    assert all(item.answer.lstrip("-").replace(".", "").isdigit() for item in gsm8k.items)
    everything_right = {item.id: Grade("x", "math_verify", True) for item in math500.items}
    assert text_math.summarize(math500, everything_right).whole
    assert not text_math.summarize(math500.first(20), everything_right).whole


@pytest.mark.parametrize(
    ("row", "question", "answer"),
    [
        ({"problem": "P", "solution": "so \\boxed{1.6} cm", "type": "Astronomy", "idx": 0}, "P", "1.6"),
        ({"id": 1606, "question": "Q", "final_answer": ["$69$,$84$"], "subfield": "Algebra"}, "Q", "69,84"),
        ({"id": 1606, "question": "Q", "context": "C", "final_answer": ["2"]}, "C\nQ", "2"),
        ({"id": 60, "problem": "A", "solution": "no box", "answer": "204"}, "A", "204"),
        ({"id": 0, "problem": "M", "question": "M", "answer": 27.0}, "M", "27"),
        ({"question": "G", "answer": "16 - 3 = <<16-3=13>>13\n#### 1,013"}, "G", "1013"),
        ({"ID": "2024-I-1", "Problem": "H", "Solution": "s", "Answer": 1, "answer": "025"}, "H", "025"),
    ],
)
def test_the_fields_of_each_published_file_are_understood(
    tmp_path: Path, row: dict[str, Any], question: str, answer: str
) -> None:
    (item,) = read(written(tmp_path / "test.jsonl", row), "direct").items
    assert (item.question, item.answer, item.picture) == (question, answer, None)


def test_a_row_without_an_answer_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "test.jsonl", {"problem": "a", "answer": "1"}, {"problem": "b", "solution": "none"})
    with pytest.raises(BenchmarkError, match="row 2: solution: there is no answer field"):
        read(path)


def test_every_published_solution_is_right_and_every_other_one_wrong(shared_data: Path, latex: LatexProcess) -> None:
    """MATH-500's own solutions are graded right; the solution of the next problem is graded as its answer deserves."""
    rows = [json.loads(line) for line in (shared_data / "math500/test.jsonl").read_text().splitlines()]
    items = read(shared_data / "math500").items
    for item, row, other in list(zip(items, rows, rows[1:], strict=False))[:150]:
        assert text_math.grade(item, row["solution"], latex).correct, item.id
        if other["answer"].removeprefix("x=") != row["answer"]:
            assert not text_math.grade(item, other["solution"], latex).correct, item.id


@pytest.mark.parametrize(
    ("response", "correct"),
    [
        ("so it is $\\frac{1}{2}$", True),
        ("the answer is 0.5.", True),
        ("\\boxed{2^{-1}}", True),
        ("half is 1/2", True),
        ("<think>1/2</think> \\boxed{3}", False),
        ("<think>\\boxed{1/2}", False),
        ("", False),
        ("no number", False),
    ],
)
def test_an_answer_is_right_however_it_is_spelled(
    tmp_path: Path, latex: LatexProcess, response: str, correct: bool
) -> None:
    (item,) = read(written(tmp_path / "test.jsonl", {"problem": "p", "answer": "\\frac12"})).items
    assert text_math.grade(item, response, latex).correct == correct


def test_nothing_that_a_model_wrote_is_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself math-verify evaluates "3*(5+1)/2", and sympy every number: the control shows that we would see it."""
    import math_verify.parser
    from sympy.parsing import sympy_parser

    evaluated: list[str] = []
    original = sympy_parser.eval_expr

    def noted(code: str, *arguments: Any) -> Any:
        evaluated.append(code)
        return original(code, *arguments)

    monkeypatch.setattr(sympy_parser, "eval_expr", noted)
    monkeypatch.setattr(math_verify.parser, "parse_expr", math_verify.parser.parse_expr)
    math_verify.parser.parse_expr_cached.cache_clear()
    assert latex_child.verify("9", "the answer is 3*(5+1)/2")[1]
    assert len(evaluated) > 1
    evaluated.clear()
    latex_child.load_math_verify()
    latex_child.forbid_eval()
    math_verify.parser.parse_expr_cached.cache_clear()
    math_verify.parser.parse_latex_cached.cache_clear()
    assert latex_child.verify("9", "the answer is 3*(5+1)/2") == ["(3*(1 + 5))/2", True]
    assert latex_child.verify("8", "the answer is 2^3")[1]
    assert latex_child.verify("1.5", "\\boxed{\\frac{3}{2}}")[1]
    assert not evaluated


@pytest.mark.parametrize(
    "code", ["Symbol ('x')", "Integer (1 )+Integer (1 )", "Integer (__import__('os'))", "", "x" * 500]
)
def test_only_numbers_are_read(code: str) -> None:
    with pytest.raises(ValueError, match="only numbers are read"):
        latex_child.read_number(code)


@pytest.mark.parametrize(("code", "value"), [("Integer (12 )", 12), ("Float ('1.5e3' )", 1500), ("-Integer (3 )", -3)])
def test_numbers_are_read_by_their_digits(code: str, value: float) -> None:
    assert float(latex_child.read_number(code)) == value


HOSTILE = ["9^9^9^9^9", "9**9**9**9", "\\boxed{9^{9^{9^9}}}", "1+" * 8000, "(" * 16_000, "\\( a " * 4000, "$" * 16_000]
HOSTILE += ["\\sum_{n=1}^{10^{10}} n", "\\int_0^1 " * 500, "\x00\ud800\u202e", "\\boxed{" * 3000, "9!!!!!!!!"]


def test_hostile_responses_neither_hang_nor_run(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    code = f"__import__('pathlib').Path('{proof}').write_text('run')"
    (item,) = read(written(tmp_path / "test.jsonl", {"problem": "p", "answer": "41"})).items
    with LatexProcess() as process:
        for text in [*HOSTILE, code, f"\\boxed{{{code}}}", f"the answer is {code}", f"${code}$"]:
            assert not text_math.grade(item, text, process).correct
        assert text_math.grade(item, "\\boxed{41}", process).correct
    assert not proof.exists()


def test_average_at_k_is_the_mean_over_passes_and_pass_at_k_counts_any() -> None:
    def one(*values: int) -> Summary:
        outcomes = tuple(Outcome(float(value), str(index)) for index, value in enumerate(values))
        return Summary("acc", outcomes, {"level: 1": {"value": float(values[0]), "n": 1.0}}, whole=True)

    summary = average([one(1, 0, 0), one(1, 1, 0), one(0, 1, 0), one(0, 1, 0)])
    assert (summary.metric, summary.whole) == ("average@4", True)
    assert (summary.estimate.numerator, summary.estimate.denominator) == (0.5 + 0.75, 3)
    assert summary.by_category == {
        "pass@4": {"value": pytest.approx(2 / 3), "n": 3.0},
        "level: 1": {"value": 0.5, "n": 1.0},
    }
    alone = average([one(1, 0, 0)])
    assert (alone.metric, "pass@1" in alone.by_category) == ("acc", False)
    spread = average([one(1, 0, 1), one(1, 0, 1)]).estimate.standard_error
    assert spread == pytest.approx(one(1, 0, 1).estimate.standard_error), "samples are no independent items"


def test_a_text_model_is_scored_by_samples_that_differ_and_are_not_generated_twice(
    tiny_qwen2: Path, tmp_path: Path
) -> None:
    rows = [{"problem": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(3)]
    path = written(tmp_path / "sums.jsonl", *rows)
    benchmarks = (BenchmarkConfig(name="sums", kind="text_math", path=path),)
    settings = EvalConfig(
        model="m", benchmarks=benchmarks, temperature=1.0, samples_per_item=3, max_new_tokens=6, batch_size=4
    )
    run = new_run(tmp_path / "run")
    (score,) = evaluate(settings, run, tuned=str(tiny_qwen2), base=None)
    assert (score.metric, score.n, score.denominator, score.generation["samples_per_item"]) == ("average@3", 3, 3, 3)
    assert score.scorer.startswith("math-verify/0.9")
    assert "pass@3" in score.by_category
    first = read_predictions(run.evaluation_path("tuned", "sums"))
    assert sorted((p.id, p.sample) for p in first) == [(str(n), s) for n in (1, 2, 3) for s in range(3)]
    assert len({p.prediction for p in first if p.id == "1"}) == 3
    other = new_run(tmp_path / "other")
    resumed = settings.model_copy(update={"resume_from": run.path, "batch_size": 1})
    (again,) = evaluate(resumed, other, tuned=str(tiny_qwen2), base=None)
    assert comparable(score, again) is None
    assert {p.key: p for p in read_predictions(other.evaluation_path("tuned", "sums"))} == {p.key: p for p in first}
    fewer = settings.model_copy(update={"samples_per_item": 1})
    (single,) = evaluate(fewer, new_run(tmp_path / "single"), tuned=str(tiny_qwen2), base=None)
    alone = read_predictions(tmp_path / "single/evaluation/tuned/sums")
    assert {p.id: p.prediction for p in alone} == {p.id: p.prediction for p in first if p.sample == 0}
    assert comparable(score, single) is not None


def test_samples_need_a_temperature_and_no_steps(tmp_path: Path) -> None:
    benchmarks = (BenchmarkConfig(name="w", kind="wemath", path=tmp_path),)
    with pytest.raises(ValueError, match="at temperature 0 all samples are the same"):
        EvalConfig(model="m", benchmarks=benchmarks, samples_per_item=2)
    settings = EvalConfig(model="m", benchmarks=benchmarks, samples_per_item=2, temperature=1)
    with pytest.raises(ConfigError, match="samples_per_item must be 1, not 2"):
        evaluate(settings, new_run(tmp_path / "run"), tuned="nowhere", base=None)
