"""Parts of the VLMEvalKit backend by themselves: tables, model class, guards, judge, files, installation."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from evaluation_fixtures import PIXELS, colour_benchmark, colour_items, diverse_vlm
from PIL import Image
from vlmevalkit_fixtures import FAKE, wemath_benchmark

from vlm_dft.config import BenchmarkConfig, EvalConfig, FreezeConfig, GenerationSettings, LoraConfig
from vlm_dft.errors import BenchmarkError, ModelError
from vlm_dft.evaluation import wemath
from vlm_dft.evaluation.items import Benchmark, Item, Picture
from vlm_dft.evaluation.vlmevalkit import guards, shims
from vlm_dft.evaluation.vlmevalkit.answer_log import Answer, AnswerLog, carry_over, num_answers
from vlm_dft.evaluation.vlmevalkit.installation import REQUIREMENTS, Installation, Unavailable, find_installation
from vlm_dft.evaluation.vlmevalkit.model import AnsweringModel, Asking, read_facts
from vlm_dft.evaluation.vlmevalkit.tables import Table, table_name, table_of, write_table
from vlm_dft.evaluation.vlmevalkit.work import read_benchmark


def rows_of(path: Path) -> list[dict[str, str]]:
    csv.field_size_limit(sys.maxsize)
    with path.open(newline="") as file:
        return list(csv.DictReader(file, dialect="excel-tab"))


def picture(directory: Path, name: str = "p.png") -> Picture:
    Image.new("RGBA", (30, 30)).save(directory / name)
    return Picture("here", path=directory / name)


def written_table(table: Table, directory: Path) -> list[dict[str, str]]:
    write_table(table, directory)
    return rows_of(directory / f"{table.name}.tsv")


# Tables


def test_a_wemath_row_is_the_prompt_in_parts_and_keeps_its_place_in_the_file(tmp_path: Path) -> None:
    """VLMEvalKit puts hint, question, options and requirement together again: the text must be the item's prompt."""
    whole = wemath.load(wemath_benchmark(tmp_path / "wemath"), "cot")
    last = Benchmark("wemath", whole.path, whole.items[6:], len(whole.items))
    rows = written_table(table_of(table_name(0, "wemath", "cot"), whole, last), tmp_path)
    assert [row["index"] for row in rows] == ["6", "7", "8", "9"]
    for row, item in zip(rows, last.items, strict=True):
        options = "".join(f"{letter}. {row[letter]}\n" for letter in "ABCD")
        assert f"Question: {row['question']}\nOptions:\n{options}\n{row['requirement']}" == item.prompt
        assert (row["key"], row["ID"], row["hint"]) == (item.id.split(":")[1], "7", "")
        assert Path(row["image_path"]).read_bytes() == item.picture.encoded()  # type: ignore[union-attr]
    assert (tmp_path / "b00-WeMath_COT.tsv").is_file()


def test_a_hint_of_the_official_file_stands_apart(tmp_path: Path) -> None:
    question, options = "How many?", {"A": "1", "B": "2"}
    prompt = "Hint: look\nclosely\nQuestion: How many?\nOptions:\nA. 1\nB. 2\n"
    categories = {"steps": "2", "part": "1", "concept": "Rotation"}
    item = Item("1", "2steps:9", prompt, picture(tmp_path), "A", options, categories, question)
    (row,) = written_table(Table("b00-WeMath", "WeMath", {0: item}), tmp_path)
    assert (row["hint"], row["question"], row["requirement"]) == ("look\nclosely", "How many?", "")
    other = Item("1", "2steps:9", "something else", picture(tmp_path), "A", options, categories, question)
    with pytest.raises(BenchmarkError, match="item 1: its prompt is not made of its question"):
        write_table(Table("b00-WeMath", "WeMath", {0: other}), tmp_path)


def test_cells_survive_tabs_quotes_and_line_breaks_and_ids_never_become_paths(tmp_path: Path) -> None:
    prompt = 'one\ttwo "three"\r\nfour\\five \U0001f600'
    categories = {"version": "Text Lite", "subject": "it's plane", "subfield": "area"}
    item = Item("../../../etc/x", "g", prompt, picture(tmp_path), "'1'", {}, categories)
    (row,) = written_table(Table("b00-MathVerse", "MathVerse", {3: item}), tmp_path)
    assert (row["question"], row["item"], row["answer"]) == (prompt, "../../../etc/x", "'1'")
    # VLMEvalKit replaces ' by " before it parses the metadata.
    assert json.loads(row["metadata"].replace("'", '"')) == {"subject": "it's plane", "subfield": "area"}
    assert Path(row["image_path"]) == tmp_path / "pictures" / "b00-MathVerse" / "3.png"


# The model class


class Rows:
    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.iloc = rows

    def __len__(self) -> int:
        return len(self.iloc)


class Dataset:
    """What VLMEvalKit's data set is to a model."""

    dataset_name = "b00-MathVision"

    def __init__(self, rows: list[dict[str, str]]) -> None:
        self.data = Rows(rows)

    def build_prompt(self, line: dict[str, str]) -> list[dict[str, str]]:
        return [{"type": "image", "value": line["image_path"]}, {"type": "text", "value": line["question"]}]

    def dump_image(self, line: Any) -> None: ...


class Asked:
    """A colour benchmark as VLMEvalKit would ask it, and the model class behind it."""

    def __init__(self, tmp_path: Path, model: Path, **settings: Any) -> None:
        config = EvalConfig(
            model="m",
            benchmarks=(BenchmarkConfig(name="c", kind="mathvision", path=colour_benchmark(tmp_path / "colours")),),
        )
        entry = read_benchmark(config, 0, config.benchmarks[0])
        self.dataset = Dataset(written_table(entry.table, tmp_path))
        self.answers = tmp_path / "answers"
        self.answers.mkdir()
        defaults = {"max_new_tokens": 8, "batch_size": 3}
        asking = Asking(
            model=str(model),
            revision=None,
            settings=GenerationSettings(**(defaults | settings)),
            pixels=PIXELS,
            answers=self.answers,
        )
        self.path = tmp_path / "asking.json"
        self.path.write_text(asking.model_dump_json())

    def model(self) -> AnsweringModel:
        answerer = AnsweringModel(str(self.path))
        answerer.set_dump_image(self.dataset.dump_image)
        return answerer

    def all(self, answerer: AnsweringModel) -> list[str]:
        rows = self.dataset.data.iloc
        return [answerer.generate(self.dataset.build_prompt(row), self.dataset.dataset_name) for row in rows]


@pytest.fixture(scope="module")
def diverse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return diverse_vlm(tmp_path_factory.mktemp("diverse") / "model")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_model_class_answers_as_the_native_backend_does(tmp_path: Path, diverse: Path, temperature: float) -> None:
    from vlm_dft.evaluation.generation import Generator
    from vlm_dft.model import load

    asked = Asked(tmp_path, diverse, temperature=temperature)
    answers = asked.all(asked.model())
    generator = Generator(load(str(diverse)), GenerationSettings(max_new_tokens=8, temperature=temperature), PIXELS)
    assert answers == [answer.text for answer in generator.answers(colour_items(tmp_path / "colours"))]
    assert len(set(answers)) > 3
    assert read_facts(asked.answers)["precision"] == "float32"


def test_what_was_answered_is_never_asked_again(tmp_path: Path, diverse: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm_dft.evaluation.generation import Generator

    asked = Asked(tmp_path, diverse)
    answers = asked.all(asked.model())
    path = asked.answers / "b00-MathVision.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:5]) + lines[5][:10])  # killed while writing the sixth
    kept = {json.loads(line)["index"] for line in lines[:5]}
    generated: list[str] = []
    plain = Generator.answers

    def counted(self: Generator, items: Any) -> Any:
        generated.extend(item.id for item in items)
        return plain(self, items)

    monkeypatch.setattr(Generator, "answers", counted)
    assert asked.all(asked.model()) == answers
    assert sorted(generated) == sorted({str(index) for index in range(8)} - {str(index) for index in kept})
    assert num_answers(path) == 8
    generated.clear()
    monkeypatch.setattr(AnsweringModel, "_loaded", lambda self: pytest.fail("nothing is missing"))
    assert asked.all(asked.model()) == answers


def test_an_adapter_answers_as_its_merged_model_would(tmp_path: Path, diverse: Path) -> None:
    import torch

    from vlm_dft.model import adapt, load, save_model

    loaded = load(str(diverse))
    adapted: Any = adapt(loaded.model, LoraConfig(r=4), FreezeConfig(), seed=0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    (tmp_path / "merged").mkdir()
    save_model(merged, loaded.processor, tmp_path / "merged")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(diverse)
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    answers = {}
    for name in ("adapter", "merged"):
        (tmp_path / f"asked-{name}").mkdir()
        asked = Asked(tmp_path / f"asked-{name}", tmp_path / name)
        answers[name] = asked.all(asked.model())
    (tmp_path / "asked-base").mkdir()
    asked = Asked(tmp_path / "asked-base", diverse)
    assert answers["adapter"] == answers["merged"] != asked.all(asked.model())


def test_what_fails_in_the_model_class_is_left_with_its_own_error(tmp_path: Path, diverse: Path) -> None:
    asked = Asked(tmp_path, tmp_path / "absent")
    with pytest.raises(ModelError):
        asked.all(asked.model())
    failure = json.loads((asked.answers / "failure.json").read_text())
    assert (failure["class"], failure["param"]) == ("ModelError", "model")
    assert "absent" in failure["message"]


def test_answers_of_an_earlier_attempt_are_taken_over_once(tmp_path: Path) -> None:
    answer = Answer(index=1, prompt="p", text="t\n\u2028", finish_reason="stop", num_tokens=1)
    empty, full, here = (tmp_path / name for name in ("empty", "full", "here"))
    empty.write_bytes(b'{"index"')
    AnswerLog.open(full).append([answer])
    carry_over(here, [tmp_path / "absent", empty, full])
    assert AnswerLog.open(here).done == {1: answer}
    AnswerLog.open(here).append([answer.model_copy(update={"index": 2})])
    carry_over(here, [full])
    assert set(AnswerLog.open(here).done) == {1, 2}


# Guards and shims


HOSTILE = (
    "__import__('os').system('touch {path}')",
    "open('{path}', 'w').write('x')",
    "(lambda: open('{path}', 'w'))()",
    "[open('{path}', 'w') for _ in [1]]",
    "9**9**9**9",
    "a",
    "A",
    "(" * 5000,
    "-" * 100_000 + "1",
    "1\x00",
)


@pytest.mark.parametrize("text", HOSTILE)
def test_evaluation_of_model_output_runs_nothing(text: str, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    with pytest.raises(ValueError):
        guards.harmless_eval(text.format(path=path) if "{path}" in text else text)
    assert not path.exists()


def test_literals_and_arithmetic_have_their_values() -> None:
    values = [guards.harmless_eval(text) for text in ("3/4", "2*(5+1)", "['(A)', 'x']", "[]", "-0.5")]
    assert values == [0.75, 12, ["(A)", "x"], [], -0.5]


def fake_mathv() -> Any:
    """A scorer that uses ``eval`` as VLMEvalKit's does."""
    source = """
def latex2sympy(text):
    return text
def equal(first, second):
    try:
        return abs(eval(first) - eval(second)) < 1e-6
    except Exception:
        return latex2sympy(first) == latex2sympy(second)
def post_check(line, prefetch=False):
    return equal(line["res"], line["answer"])
def MATH_V_acc(result_file):
    rows = [{"index": n, "res": r, "answer": "7"} for n, r in enumerate(["7.0", "a", "8"])]
    return [post_check(row) for row in rows]
"""
    module = types.ModuleType("mathv")
    exec(source, vars(module))
    return module


def test_a_guarded_scorer_evaluates_numbers_alone_and_tells_each_verdict(tmp_path: Path) -> None:
    """Unguarded, "a" would be whatever variable the scorer has of that name."""
    module = fake_mathv()
    guards.guard_mathvision(module)
    trace = tmp_path / "trace"
    assert module.MATH_V_acc(str(tmp_path / "result.tsv")) == [True, False, False]
    assert module.post_check({"index": 0, "res": f"open({str(trace)!r}, 'w')", "answer": "7"}) is False
    assert not trace.exists()
    lines = (tmp_path / "result.tsv.verdicts.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"index": 0, "extracted": "7.0", "correct": True},
        {"index": 1, "extracted": "a", "correct": False},
        {"index": 2, "extracted": "8", "correct": False},
    ]


def test_latex_of_absurd_size_is_not_parsed() -> None:
    parse = guards.limited(lambda text: text)
    assert parse("\\frac{1}{2}") == "\\frac{1}{2}"
    for text in ("{" * 100, "1" * 10_000):
        with pytest.raises(ValueError):
            parse(text)


def test_vlmevalkits_own_prompt_for_wemath_is_asked_for_by_its_own_name() -> None:
    names: list[str] = []
    module: Any = types.SimpleNamespace(mcq_vanilla_eval=lambda *arguments: names.append(arguments[5]))
    guards.guard_multiple_choice(module)
    for name in ("b00-WeMath", "b12-WeMath_COT"):
        module.mcq_vanilla_eval(None, None, None, 4, "file", name)
    assert names == ["WeMath", "WeMath_COT"]


def test_device_names_that_are_no_numbers_are_numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for given, expected in (("2,3", "2,3"), ("", ""), ("GPU-8a1b,MIG-77", "0,1")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        shims.number_devices()
        assert os.environ["CUDA_VISIBLE_DEVICES"] == expected


def test_text_columns_are_read_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    pandas = pytest.importorskip("pandas")
    monkeypatch.setattr(pandas, "read_csv", pandas.read_csv)
    shims.read_text_as_text()
    table = "index\tprediction\tA\tD\n1\tNA\t007\t\n2\t\t1.50\tx\n3\t12\tNA\t\n"
    read = pandas.read_csv(io.StringIO(table), sep="\t")
    assert (list(read["prediction"]), list(read["A"])) == (["NA", "", "12"], ["007", "1.50", "NA"])
    assert (list(read["D"].isna()), list(read["index"])) == ([True, False, True], [1, 2, 3])
    assert pandas.read_csv(io.StringIO("prediction\n12\n"))["prediction"][0] == 12


# Where it is


def environment(python: str, root: Path) -> dict[str, str]:
    return {"VLM_DFT_VLMEVAL_PYTHON": python, "VLM_DFT_VLMEVAL_ROOT": str(root)}


def checkout(tmp_path: Path) -> Path:
    for name in ("run.py", "vlmeval/__init__.py", "vlmeval/dataset/utils/wemath.py", "vlmeval/dataset/utils/mathv.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text((FAKE / name).read_text())
    return tmp_path


@pytest.mark.parametrize(
    ("python", "root", "reason", "remedy"),
    [
        ("", "", "VLM_DFT_VLMEVAL_PYTHON and VLM_DFT_VLMEVAL_ROOT are not set", "pip install"),
        (sys.executable, "", "VLM_DFT_VLMEVAL_ROOT is not set", "clone https://github.com/open-compass/VLMEvalKit"),
        (sys.executable, "/no/such", "/no/such/run.py does not exist", "run.py is not part of its wheel"),
        ("/no/python", "here", "/no/python cannot be started: No such file", "VLM_DFT_VLMEVAL_PYTHON"),
        ("/bin/false", "here", "/bin/false failed: exit code 1", "VLM_DFT_VLMEVAL_PYTHON"),
        (sys.executable, "here", "does not have", "-m pip install "),
    ],
)
def test_what_is_missing_is_named_with_its_remedy(
    tmp_path: Path, python: str, root: str, reason: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REQUIREMENTS, "no_such_module_of_ours", "no-such-package")
    found = find_installation(environment(python, checkout(tmp_path) if root == "here" else Path(root) if root else ""))  # type: ignore[arg-type]
    assert isinstance(found, Unavailable)
    assert reason in found.reason
    assert remedy in found.remedy
    assert found.is_configured == bool(python or root)


def test_the_scorer_is_named_by_its_commit_and_says_when_its_files_were_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlm_dft.evaluation.vlmevalkit import installation

    monkeypatch.setattr(installation, "REQUIREMENTS", {"json": "json"})

    def scorer() -> str:
        installation._look.cache_clear()
        found = find_installation(environment(sys.executable, tmp_path))
        assert isinstance(found, Installation), found
        return found.scorer

    root = checkout(tmp_path)
    without_git = scorer()
    assert without_git.startswith("vlmeval@files-")
    git = ["git", "-C", str(root), "-c", "user.name=x", "-c", "user.email=x@x"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "--short=8", "HEAD"], check=True, capture_output=True, text=True)
    assert scorer() == f"vlmeval@{head.stdout.strip()}"
    (root / "run.py").write_text("changed")
    assert scorer() == f"vlmeval@{head.stdout.strip()}-dirty"
