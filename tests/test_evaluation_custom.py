"""A user's own benchmark: both file forms, four ways of scoring, and complaints that name the row."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from evaluation_fixtures import PIXELS, diverse_vlm
from PIL import Image
from test_evaluation_runs import new_run

from vlm_dft.config import BenchmarkConfig, EvalConfig, Scoring
from vlm_dft.errors import BenchmarkError, EvaluationError
from vlm_dft.evaluation import custom, evaluate
from vlm_dft.evaluation.benchmarks import load_benchmark
from vlm_dft.evaluation.items import Benchmark, Item
from vlm_dft.evaluation.latex import LatexProcess


@pytest.fixture(scope="module")
def latex() -> Iterator[LatexProcess]:
    with LatexProcess() as process:
        yield process


def read(path: Path, scoring: Scoring | None = None) -> Benchmark:
    return load_benchmark(BenchmarkConfig(name="mine", kind="custom", path=path, scoring=scoring), "direct")


def written(directory: Path, *rows: dict[str, Any]) -> Path:
    path = directory / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_tsv_and_a_jsonl_give_the_same_items(tmp_path: Path) -> None:
    Image.new("RGB", (56, 56), "red").save(tmp_path / "red.png")
    encoded = base64.b64encode((tmp_path / "red.png").read_bytes()).decode()
    lines = [
        "index\tquestion\tanswer\timage\tA\tB\tcategory\tscoring",
        f"q1\tWhich colour?\tB\t{encoded}\tblue\tred\tcolours\t",
        "q2\tHow many?\t1,200\t\t\t\tsums\tnumber",
    ]
    (tmp_path / "mine.tsv").write_text("\n".join(lines) + "\n")
    rows = [
        {"id": "q1", "question": "Which colour?", "answer": "red", "image": "red.png", "options": ["blue", "red"]}
        | {"category": "colours"},
        {"id": "q2", "question": "How many?", "answer": "1,200", "scoring": "number", "category": "sums"},
    ]
    tsv, jsonl = read(tmp_path / "mine.tsv"), read(written(tmp_path, *rows))
    assert tsv.sha256 == jsonl.sha256
    first, second = jsonl.items
    assert (first.answer, first.categories["scoring"]) == ("B", "option")
    assert first.prompt.splitlines()[1:3] == ["(A) blue", "(B) red"]
    assert (first.picture is None, second.picture is None) == (False, True)


@pytest.mark.parametrize(
    ("row", "response", "correct"),
    [
        ({"options": {"a": "x", "b": "y"}, "answer": "b"}, "The answer is B.", True),
        ({"options": ["x", "y"], "answer": "y"}, "\\boxed{A}", False),
        ({"scoring": "number", "answer": "1200"}, "It costs 1,200.00 in all.", True),
        ({"scoring": "number", "answer": "0.75"}, "\\boxed{3/4}", True),
        ({"scoring": "number", "answer": "5"}, "5 apples and 6 pears", False),
        ({"scoring": "number", "answer": "5"}, "none", False),
        ({"scoring": "latex", "answer": "\\frac{\\sqrt{3}}{2}"}, "\\boxed{\\sqrt{3}/2}", True),
        ({"scoring": "latex", "answer": "x+1"}, "\\boxed{1+x}", True),
        ({"scoring": "exact", "answer": "New  York"}, "<answer>new york</answer>", True),
        ({"scoring": "exact", "answer": "1/2"}, "\\boxed{0.5}", False),
        ({"answer": "1/2"}, "\\boxed{0.5}", True),
    ],
)
def test_each_way_of_scoring_decides(
    tmp_path: Path, latex: LatexProcess, row: dict[str, Any], response: str, correct: bool
) -> None:
    (item,) = read(written(tmp_path, {"question": "q", **row})).items
    assert custom.grade(item, response, latex).correct == correct


def test_the_whole_file_may_be_scored_in_one_way(tmp_path: Path) -> None:
    path = written(tmp_path, {"question": "q", "answer": "5"}, {"question": "r", "answer": "a", "scoring": "exact"})
    assert [item.categories["scoring"] for item in read(path, "number").items] == ["number", "exact"]
    with pytest.raises(ValueError, match="scoring belongs to custom benchmarks"):
        BenchmarkConfig(name="x", kind="wemath", path=path, scoring="number")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "1"}, "row 1: question: the field is absent"),
        ({"question": "q"}, "row 1: answer: the field is absent"),
        ({"question": "q", "answer": "C", "options": ["x", "y"]}, "'C' is neither the letter nor the text of one"),
        ({"question": "q", "answer": "C", "scoring": "option"}, "there are none: give options"),
        ({"question": "q", "answer": "many", "scoring": "number"}, "'many' is no number"),
        ({"question": "q", "answer": "1", "scoring": "eval"}, "'eval' is none of option, number, latex, exact"),
        ({"question": "q", "answer": "1", "image": "../../etc/passwd"}, "leaves the benchmark's directory"),
        ({"question": "q", "answer": "1", "image": "gone.png"}, "'gone.png' does not exist: put the image at"),
    ],
)
def test_a_bad_row_is_named_by_file_row_and_field(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(BenchmarkError, match=message):
        read(written(tmp_path, row))


def test_hostile_predictions_are_wrong_in_every_way_of_scoring(tmp_path: Path, latex: LatexProcess) -> None:
    proof = tmp_path / "proof"
    code = f"__import__('pathlib').Path('{proof}').write_text('run')"
    items: list[Item] = []
    for scoring in ("number", "latex", "exact"):
        items += read(written(tmp_path, {"question": "q", "answer": "41", "scoring": scoring})).items
    items += read(written(tmp_path, {"question": "q", "answer": "A", "options": ["one", "two"]})).items
    for text in (
        code,
        f"\\boxed{{{code}}}",
        "9**9**9**9",
        "1" * 100_000,
        "-+.," * 50_000,
        "1/" * 50_000,
        "{" * 100_000,
    ):
        for item in items:
            assert not custom.grade(item, text, latex).correct
    assert not proof.exists()


def test_a_custom_benchmark_is_scored_like_any_other(tiny_qwen2: Path, tmp_path: Path) -> None:
    Image.new("RGB", (56, 56), "red").save(tmp_path / "red.png")
    rows = [{"question": f"Say {n}", "answer": str(n), "scoring": "number", "category": "n"} for n in range(4)]
    text = EvalConfig(
        model="m",
        benchmarks=(BenchmarkConfig(name="mine", kind="custom", path=written(tmp_path, *rows)),),
        max_new_tokens=4,
    )
    (score,) = evaluate(text, new_run(tmp_path / "text"), tuned=str(tiny_qwen2), base=None)
    assert (score.kind, score.metric, score.n, score.whole, score.scorer) == (
        "custom",
        "acc",
        4,
        True,
        "native-rules/v1",
    )
    assert set(score.by_category) == {"category: n", "scoring: number"}
    path = written(tmp_path, *rows, {"question": "colour?", "answer": "red", "image": "red.png", "scoring": "exact"})
    pictured = text.model_copy(
        update={"benchmarks": (BenchmarkConfig(name="mine", kind="custom", path=path),), "pixels": PIXELS}
    )
    with pytest.raises(EvaluationError, match="is a text model and cannot see the pictures of mine"):
        evaluate(pictured, new_run(tmp_path / "blind"), tuned=str(tiny_qwen2), base=None)
    vision = diverse_vlm(tmp_path / "vision")
    (score,) = evaluate(pictured, new_run(tmp_path / "seeing"), tuned=str(vision), base=None)
    assert score.n == 5
