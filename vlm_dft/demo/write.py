"""Problems as files: WeThink records to train on, and the three benchmarks in their authors' own forms. Torch-free.

    OUT/
    ├── start.tar.gz, tune.tar.gz, validation.tar.gz   data.jsonl in WeThink's raw form, and images/
    ├── benchmarks/demo-mathverse/testmini.json        each problem in three versions, and images/
    ├── benchmarks/demo-mathvision/testmini.jsonl      half with options A-E, half free form, and images/
    ├── benchmarks/demo-wemath/testmini.json           two-step problems with their steps, and images/
    └── demo.json                                      how many there are, and what blind guessing scores

Everything but start and tune is held out. The same seed writes the same bytes. Knows nothing about models.
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

from vlm_dft.demo import wording
from vlm_dft.demo.problems import VERSIONS, Problem, chance, guesses, mixture, steps_of, with_options
from vlm_dft.demo.questions import KINDS, Together, Total
from vlm_dft.demo.scenes import seeded
from vlm_dft.run_dir import write_json

Record = dict[str, Any]

_VERSION_SHARES = {"Text Dominant": 0.2, "Vision Only": 0.2}
"""Of training problems; the rest are Vision Intensive."""
_FORMS = ("plain", "plain", "mathverse", "mathvision", "wemath")
"""The form in which a training problem is put; plain is shortest."""


def write_demo(out: Path, *, start: int, tune: int, validation: int, held_out: int, seed: int) -> Record:
    """Write all files of the module's tree; returns what demo.json holds.

    start, tune, validation: numbers of records. held_out: items per benchmark, a multiple of three.
    """
    if held_out < 3 or held_out % 3:
        raise ValueError(f"held_out {held_out} must be a positive multiple of 3: versions and steps come in threes")
    out.mkdir(parents=True, exist_ok=True)
    for name, number, is_held_out in (("start", start, False), ("tune", tune, False), ("validation", validation, True)):
        random = seeded(f"{seed}:{name}")
        asked = [put(problem, random) for problem in mixture(number, held_out=is_held_out, random=random)]
        write_archive(out / f"{name}.tar.gz", [(problem, wethink_record(problem, text)) for problem, text in asked])
    benchmarks = out / "benchmarks"
    summary: Record = {"seed": seed, "start": start, "tune": tune, "validation": validation, "benchmarks": {}}
    for name, write in (("mathverse", write_mathverse), ("mathvision", write_mathvision), ("wemath", write_wemath)):
        directory = benchmarks / f"demo-{name}"
        (directory / "images").mkdir(parents=True, exist_ok=True)
        n, guessing = write(directory, held_out, seeded(f"{seed}:{name}"))
        summary["benchmarks"][directory.name] = {"n": n, "chance": float(guessing)}
    write_json(out / "demo.json", summary)
    return summary


def put(problem: Problem, random: Random) -> tuple[Problem, str]:
    """A training problem in some version, and its text in the form of some benchmark."""
    version, options, form = random.random(), with_options(problem, random), random.choice(_FORMS)
    for name, share in _VERSION_SHARES.items():
        if version < share:
            problem = replace(problem, version=name)
            break
        version -= share
    if form == "mathverse" or problem.version == "Vision Only":
        return problem, wording.as_mathverse(problem.text)
    if form == "wemath" or random.random() < 0.5:
        problem = replace(problem, options=options.options)
    ask = {"plain": wording.as_wethink, "mathvision": wording.as_mathvision, "wemath": wording.as_wemath}[form]
    return problem, ask(problem.text, problem.options)


def wethink_record(problem: Problem, text: str) -> Record:
    """WeThink's raw form. Its answers are values, also where there are options."""
    return {
        "problem": text,
        "answer": problem.answer,
        "category": problem.question.subject,
        "abilities": problem.question.concept,
        "refined_cot": problem.reasoning(),
        "image_path": "",  # the writer knows it
        "reward": "rule-based",
    }


def write_archive(path: Path, rows: Sequence[tuple[Problem, Record]]) -> None:
    """data.jsonl and images/ as one .tar.gz, without times, so that the same rows are the same bytes."""
    lines: list[str] = []
    with (
        path.open("wb") as file,
        gzip.GzipFile("", "wb", mtime=0, fileobj=file, compresslevel=1) as packed,
        tarfile.open(fileobj=packed, mode="w") as archive,
    ):
        for number, (problem, record) in enumerate(rows):
            name = f"images/{number:06d}.png"
            _add(archive, name, problem.png())
            lines.append(json.dumps({**record, "image_path": name}) + "\n")
        _add(archive, "data.jsonl", "".join(lines).encode())


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def write_mathverse(directory: Path, number: int, random: Random) -> tuple[int, Fraction]:
    """MathVerse's JSON: number / 3 problems in three versions each."""
    records: list[Record] = []
    asked: list[Problem] = []
    for index, drawn in enumerate(mixture(number // len(VERSIONS), held_out=True, random=random), start=1):
        for version in VERSIONS:
            problem = replace(drawn, version=version)
            asked.append(problem)
            image = "with_question" if version == "Vision Only" else "plain"
            name = f"images/{index:04d}_{image}.png"
            (directory / name).write_bytes(problem.png())
            records.append(
                {
                    "sample_index": str(len(asked)),
                    "problem_index": str(index),
                    "problem_version": version,
                    "question": problem.text,
                    "image": name,
                    "answer": problem.answer,
                    "question_type": "free-form",
                    "metadata": {
                        "split": "testmini",
                        "source": "generated",
                        "subject": problem.question.subject,
                        "subfield": problem.question.concept,
                    },
                    "query_wo": wording.as_mathverse(problem.text),
                    "query_cot": wording.as_mathverse(problem.text, reason_first=True),
                }
            )
    write_json(directory / "testmini.json", records)
    return len(records), chance(asked)


def write_mathvision(directory: Path, number: int, random: Random) -> tuple[int, Fraction]:
    """MathVision's JSONL: every second problem with options."""
    lines: list[str] = []
    asked = mixture(number, held_out=True, random=random)
    for index, drawn in enumerate(asked, start=1):
        problem = with_options(drawn, random) if index % 2 else drawn
        name = f"images/{index}.png"
        (directory / name).write_bytes(problem.png())
        record = {
            "id": str(index),
            "question": wording.mathvision_question(problem.text),
            "options": list(problem.options),
            "answer": problem.letter if problem.options else problem.answer,
            "solution": None,
            "level": problem.question.level,
            "subject": problem.question.subject,
            "image": name,
        }
        lines.append(json.dumps(record) + "\n")
    (directory / "testmini.jsonl").write_text("".join(lines))
    return len(lines), chance(asked)


def write_wemath(directory: Path, number: int, random: Random) -> tuple[int, Fraction]:
    """We-Math's JSON: number / 3 two-step problems, each after its two steps asked alone."""
    groups: list[tuple[Problem, ...]] = []
    for drawn in mixture(number // 3, held_out=True, random=random, kinds=(Together, Total)):
        groups.append(tuple(with_options(problem, random) for problem in (*steps_of(drawn), drawn)))
    records: list[Record] = []
    for part, name in enumerate(("1", "2", "multi")):
        for index, group in enumerate(groups, start=1):
            concepts = [group[0].question.concept, group[1].question.concept]
            concept = ";".join(concepts) if name == "multi" else concepts[part]
            image = f"images/{index}-{name}.png"
            (directory / image).write_bytes(group[part].png())
            records.append(
                {
                    "ID": f"2steps_{index}",
                    "split": "testmini",
                    "knowledge concept": concept,
                    "question": group[part].text,
                    "option": "; ".join(f"{a}. {b}" for a, b in zip(wording.LETTERS, group[part].options, strict=True)),
                    "answer": group[part].letter,
                    "image_path": image,
                    "key": f"2steps_{name}",
                    "question number": len(records) + 1,
                    "knowledge concept description": concept,
                }
            )
    write_json(directory / "testmini.json", records)
    return len(records), _strict_score_of_guessing(groups)


def _strict_score_of_guessing(groups: Sequence[tuple[Problem, ...]]) -> Fraction:
    """What the best blind guess of each kind of question scores: 1 for all three right, 1/2 for both steps alone."""
    guess = guesses(problem for group in groups for problem in group)
    right = [[guess[type(problem.question)] == problem.answer for problem in group] for group in groups]
    values = [Fraction(1 + flags[2], 2) if flags[0] and flags[1] else Fraction(0) for flags in right]
    return sum(values, Fraction(0)) / len(values)


def texts_to_tokenize(number: int, seed: int) -> list[str]:
    """What a tokenizer for these problems is trained on: training problems only, and the words around them."""
    random = seeded(f"{seed}:tokenizer")
    texts = [wording.SYSTEM_PROMPT, wording.REASONED, *KIND_NAMES]
    for drawn in mixture(number, held_out=False, random=random):
        problem, text = put(drawn, random)
        texts += [text, f"<think>\n{problem.reasoning()}\n</think>\n<answer>\n{problem.answer}\n</answer>"]
    return texts


KIND_NAMES = tuple(kind.concept for kind in KINDS)
