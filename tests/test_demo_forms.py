"""What the demo writes is what the validation, the loaders and the scorers take, and chance is what guessing scores."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from random import Random

import pytest

from vlm_dft.config import RunConfig, ValidationConfig
from vlm_dft.data.canonical import CanonicalDataset
from vlm_dft.data.validation import validate
from vlm_dft.demo import wording
from vlm_dft.demo.problems import guesses, mixture, with_options
from vlm_dft.demo.questions import KINDS
from vlm_dft.demo.write import write_demo
from vlm_dft.evaluation import mathverse, mathvision, wemath
from vlm_dft.evaluation.latex import LatexProcess
from vlm_dft.run_dir import RunDir

MODULES = {"demo-mathverse": mathverse, "demo-mathvision": mathvision, "demo-wemath": wemath}
KEYS = {
    "demo-mathverse": {
        "sample_index",
        "problem_index",
        "problem_version",
        "question",
        "image",
        "answer",
        "question_type",
        "metadata",
        "query_wo",
        "query_cot",
    },
    "demo-mathvision": {"id", "question", "options", "answer", "solution", "level", "subject", "image"},
    "demo-wemath": {
        "ID",
        "split",
        "knowledge concept",
        "question",
        "option",
        "answer",
        "image_path",
        "key",
        "question number",
        "knowledge concept description",
    },
}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("demo")
    write_demo(directory, start=40, tune=10, validation=10, held_out=60, seed=3)
    return directory


def records_of(directory: Path) -> list[dict]:
    (file,) = directory.glob("testmini.*")
    text = file.read_text()
    return json.loads(text) if file.suffix == ".json" else [json.loads(line) for line in text.splitlines()]


def test_validation_accepts_the_records_and_keeps_answers_and_reasoning(out: Path, tmp_path: Path) -> None:
    config = ValidationConfig(source=out / "start.tar.gz", filename="start.tar.gz", system_prompt=wording.SYSTEM_PROMPT)
    run = RunDir(tmp_path)
    run.create(RunConfig(run_id="demo", validation=config))
    report = validate(config, run)
    assert (report.format, report.rows, report.invalid, report.images) == ("wethink", 40, 0, 40)
    with tarfile.open(out / "start.tar.gz") as archive:
        file = archive.extractfile("data.jsonl")
        assert file is not None
        records = [json.loads(line) for line in file]
    for record, row in zip(records, CanonicalDataset.open(run.dataset_path), strict=True):
        reply = "".join(part.text for part in row.messages[-1].content if part.type == "text")
        assert reply == f"<think>\n{record['refined_cot']}\n</think>\n<answer>\n{record['answer']}\n</answer>"
        assert row.messages[0].content[0].text == wording.SYSTEM_PROMPT
        assert row.answer == record["answer"]


@pytest.mark.parametrize("name", MODULES)
def test_records_have_the_keys_of_the_authors_files(name: str, out: Path, shared_data: Path) -> None:
    written = records_of(out / "benchmarks" / name)
    assert all(record.keys() == KEYS[name] for record in written)
    folder = {"demo-wemath": "wemath_nc"}.get(name, name.removeprefix("demo-"))
    (real,) = (path for path in (shared_data / folder).glob("testmini*"))
    text = real.read_text()
    first = json.loads(text)[0] if real.suffix == ".json" else json.loads(text.splitlines()[0])
    assert KEYS[name] == first.keys() - {"visualizer_pid"}


@pytest.mark.parametrize("name", MODULES)
def test_right_answers_score_one_and_the_best_guess_scores_the_stated_chance(name: str, out: Path) -> None:
    module = MODULES[name]
    benchmark = module.load(out / "benchmarks" / name, "direct")
    stated = json.loads((out / "demo.json").read_text())["benchmarks"][name]
    assert len(benchmark.items) == stated["n"] == 60

    def score(responses: dict[str, str]) -> float:
        with LatexProcess() as latex:
            grades = {item.id: module.grade(item, responses[item.id], latex) for item in benchmark.items}
        return module.summarize(benchmark, grades).estimate.value

    values = {item.id: item.options.get(item.answer, item.answer) for item in benchmark.items}
    assert score({id: f"<think>\nso\n</think>\n<answer>\n{value}\n</answer>" for id, value in values.items()}) == 1.0

    best = best_guess_by_question([(item.id, item.prompt, values[item.id]) for item in benchmark.items], name, out)
    assert score({id: f"<answer>{guess}</answer>" for id, guess in best.items()}) == pytest.approx(stated["chance"])


def best_guess_by_question(items: list[tuple[str, str, str]], name: str, out: Path) -> dict[str, str]:
    """The most frequent answer of the item's kind of question, which is told by its words (or, unseen, its record)."""
    texts = {id: prompt for id, prompt, _ in items}
    if name == "demo-mathverse":  # a question in the picture is that of the same problem's other versions
        by_problem = {
            record["problem_index"]: record["question"] for record in records_of(out / "benchmarks" / name)[1::3]
        }
        records = records_of(out / "benchmarks" / name)
        texts = {record["sample_index"]: by_problem[record["problem_index"]] for record in records}
    kinds = {id: kind_of(text) for id, text in texts.items()}
    answers: dict[str, list[str]] = {}
    for id, _, value in items:
        answers.setdefault(kinds[id], []).append(value)
    # The first of the most frequent ones, as Counter.most_common has it.
    return {id: max(answers[kinds[id]], key=answers[kinds[id]].count) for id, _, _ in items}


def kind_of(text: str) -> str:
    if "highest" in text:
        return "highest"
    if "together" in text:
        return "together" if "shapes" in text else "total"
    return "count" if "shapes" in text else "height"


def test_training_prompts_are_the_evaluations_own(out: Path) -> None:
    """What the model is asked in training, word for word: were the evaluation's words to change, this would fail."""
    verse = mathverse.load(out / "benchmarks" / "demo-mathverse", "direct")
    for record, item in zip(records_of(out / "benchmarks" / "demo-mathverse"), verse.items, strict=True):
        assert item.prompt == wording.as_mathverse(record["question"])
    vision = mathvision.load(out / "benchmarks" / "demo-mathvision", "direct")
    for record, item in zip(records_of(out / "benchmarks" / "demo-mathvision"), vision.items, strict=True):
        text = record["question"].removesuffix("\n<image1>")
        assert item.prompt == wording.as_mathvision(text, record["options"])
    groups = wemath.load(out / "benchmarks" / "demo-wemath", "direct")
    for item in groups.items:
        text = item.prompt.split("\n")[0].removeprefix("Question: ")
        assert item.prompt == wording.as_wemath(text, list(item.options.values()))


def test_a_guesser_names_one_answer_per_kind() -> None:
    asked = [with_options(problem, Random(0)) for problem in mixture(50, held_out=True, random=Random(0))]
    assert guesses(asked).keys() == set(KINDS)
