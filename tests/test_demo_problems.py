"""The demo's problems: each answer can be read off its picture; answers are balanced; no scene is on both sides."""

from __future__ import annotations

import json
import re
import tarfile
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from PIL import Image
from throwaway import run_python

from vlm_dft.demo import wording
from vlm_dft.demo.problems import VERSIONS, Problem, chance, mixture, problems, steps_of, with_options
from vlm_dft.demo.questions import KINDS, NUMBERS, Count, Height, Highest, Together, Total
from vlm_dft.demo.scenes import COLOURS, COLUMNS, PLACE, ROWS, SHAPES, Chart, Grid, draw, is_held_out
from vlm_dft.demo.write import put, write_demo

PAIR = re.compile(rf"({'|'.join(COLOURS)}) ({'|'.join(NUMBERS)})\b")
SMALL = {"start": 60, "tune": 30, "validation": 20, "held_out": 30}


def colours_in(image: Image.Image, box: tuple[int, int, int, int]) -> list[str]:
    """Colours of the pixels in the box, without paper and ink."""
    names = {rgb: name for name, rgb in COLOURS.items()}
    pixels = [pixel for _, pixel in image.crop(box).getcolors(PLACE * PLACE * COLUMNS * ROWS) or []]
    return [names[pixel] for pixel in pixels if pixel in names]


def read_grid(image: Image.Image) -> list[tuple[str, str] | None]:
    """(colour, form) per place, from pixels alone: how wide a shape is at its top and in its middle tells its form."""
    found: list[tuple[str, str] | None] = []
    for row in range(ROWS):
        for column in range(COLUMNS):
            place = image.crop((column * PLACE, row * PLACE, (column + 1) * PLACE, (row + 1) * PLACE))
            colours = colours_in(place, (0, 0, PLACE, PLACE))
            assert len(colours) <= 1
            if not colours:
                found.append(None)
                continue
            rgb = COLOURS[colours[0]]
            widths = [sum(place.getpixel((x, y)) == rgb for x in range(PLACE)) for y in range(PLACE)]
            lines = [width for width in widths if width]
            form = "square" if lines[1] == max(lines) else "triangle" if lines[-1] == max(lines) else "circle"
            found.append((colours[0], form))
    return found


def read_chart(image: Image.Image) -> list[tuple[str, int]]:
    """(colour, height) per bar, from pixels alone."""
    found = []
    for column in range(COLUMNS):
        box = (column * PLACE, 0, (column + 1) * PLACE, ROWS * PLACE)
        (colour,) = colours_in(image, box)
        middle = column * PLACE + PLACE // 2
        height = sum(image.getpixel((middle, y)) == COLOURS[colour] for y in range(ROWS * PLACE))
        found.append((colour, round(height / 13)))
    return found


def answer_from_picture(problem: Problem) -> str:
    """The answer by a second way: from the drawn pixels and the words of the question."""
    text = problem.question.text
    named = [word for word in re.findall(r"\w+", text) if word in COLOURS]
    if "shapes" in text:
        colours = [place[0] for place in read_grid(problem.image) if place]
        return str(sum(colours.count(colour) for colour in named))
    heights = dict(read_chart(problem.image))
    if "highest" in text:
        return max(heights, key=lambda colour: heights[colour])
    return str(sum(heights[colour] for colour in named))


@pytest.mark.parametrize("held_out", [False, True])
def test_every_answer_can_be_read_off_the_picture(held_out: bool) -> None:
    asked = mixture(200, held_out=held_out, random=Random(1))
    assert {type(problem.question) for problem in asked} == set(KINDS)
    for problem in asked:
        assert problem.answer == answer_from_picture(problem), problem


def test_every_reasoning_describes_its_picture_and_ends_in_its_answer() -> None:
    for problem in mixture(200, held_out=False, random=Random(2)):
        told = problem.reasoning()
        if isinstance(problem.scene, Grid):
            places = re.findall(rf"(?:({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})|nothing)(?=[,.])", told)
            read = read_grid(problem.image)
            assert [place if all(place) else None for place in places] == read, told
        else:
            assert PAIR.findall(told)[:3] == [(colour, NUMBERS[height]) for colour, height in read_chart(problem.image)]
        word = NUMBERS[int(problem.answer)] if problem.answer.isdigit() else problem.answer
        assert word in told.rsplit(". ", 1)[-1], told


def test_reasoning_is_worded_in_many_ways() -> None:
    grid = next(p for p in mixture(50, held_out=False, random=Random(3)) if isinstance(p.question, Count))
    told = {wording.reasoning(grid.scene, grid.question, given=False, random=Random(seed)) for seed in range(200)}
    assert len(told) > 60


def test_told_facts_are_enough_for_the_answer() -> None:
    for problem in mixture(200, held_out=False, random=Random(4)):
        facts = problem.question.facts(problem.scene)
        question = problem.question
        if isinstance(question, Count):
            answer = str(facts.count(question.colour))
        elif isinstance(question, Together | Total):
            answer = str(sum(NUMBERS.index(number) for _, number in PAIR.findall(facts)))
        else:
            heights = {colour: NUMBERS.index(number) for colour, number in PAIR.findall(facts)}
            is_height = isinstance(question, Height)
            answer = str(heights[question.colour]) if is_height else max(heights, key=lambda c: heights[c])
        assert answer == problem.answer, facts


@pytest.mark.parametrize("kind", KINDS)
def test_answers_come_equally_often(kind: type[Count]) -> None:
    counts = Counter(problem.answer for problem in problems(kind, 40, held_out=True, random=Random(5)))
    assert counts == dict.fromkeys(kind.answers, 10)
    assert kind.distractor not in kind.answers


def test_blind_guessing_is_right_one_time_in_four() -> None:
    assert chance(mixture(20 * len(KINDS), held_out=True, random=Random(6))) == 1 / 4


def test_options_hold_the_answer_once_and_every_letter_is_right_sometimes() -> None:
    asked = [
        with_options(problem, Random(i)) for i, problem in enumerate(mixture(200, held_out=True, random=Random(7)))
    ]
    for problem in asked:
        assert len(set(problem.options)) == 5
        assert problem.options[wording.LETTERS.index(problem.letter)] == problem.answer
    assert set(Counter(problem.letter for problem in asked)) == set(wording.LETTERS)


def test_no_scene_is_on_both_sides_whatever_the_seeds() -> None:
    sides = [{p.scene for p in mixture(400, held_out=side, random=Random(8))} for side in (False, True)]
    assert not sides[0] & sides[1]
    assert all(is_held_out(scene) is side for side in (False, True) for scene in sides[side])


def test_different_scenes_are_different_pictures() -> None:
    scenes = {problem.scene for problem in mixture(600, held_out=False, random=Random(9))}
    pictures = {draw(scene, jitter=Random(0)).tobytes() for scene in scenes}
    assert len(pictures) == len(scenes)


def test_question_in_the_picture_is_drawn_inside_it_and_differs_by_question() -> None:
    captions = {
        question: draw(Grid((None,) * 6), question.caption, jitter=Random(0))
        for question in (
            *(Count(colour) for colour in COLOURS),
            *(Height(colour) for colour in COLOURS),
            *(kind(a, b) for kind in (Together, Total) for a in COLOURS for b in COLOURS if a != b),
            Highest(),
        )
    }
    assert len({image.tobytes() for image in captions.values()}) == len(captions)
    for question, image in captions.items():
        strip = image.crop((0, ROWS * PLACE + 1, image.width, image.height))
        for edge in ((strip.width - 1, 0, strip.width, strip.height), (0, strip.height - 1, strip.width, strip.height)):
            assert [colour for _, colour in strip.crop(edge).getcolors() or []] == [(255, 255, 255)], question


def test_steps_of_a_two_step_problem_lead_to_its_answer() -> None:
    for problem in mixture(60, held_out=True, random=Random(10), kinds=(Together, Total)):
        first, second = steps_of(problem)
        assert first.answer == answer_from_picture(first)
        assert NUMBERS[int(first.answer)] in [number for _, number in PAIR.findall(second.text)]
        assert second.answer == problem.answer
        assert isinstance(first.scene, Grid | Chart)


def test_training_problems_take_every_version_and_form() -> None:
    random = Random(11)
    asked = [put(problem, random) for problem in mixture(300, held_out=False, random=random)]
    assert {problem.version for problem, _ in asked} == set(VERSIONS)
    starts = Counter(text.split("\n")[0].split(" ")[0] for _, text in asked)
    assert {"How", "Which", "Please", "According", "Question:", "The"} <= set(starts)
    assert any(problem.options for problem, _ in asked)
    for problem, text in asked:
        assert (problem.question.text in text) is (problem.version != "Vision Only")


def test_same_seed_writes_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    trees = []
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        write_demo(tmp_path / name, **SMALL, seed=seed)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        trees.append({str(path.relative_to(tmp_path / name)): path.read_bytes() for path in files})
    assert trees[0] == trees[1]
    assert trees[0].keys() == trees[2].keys()
    assert trees[0]["start.tar.gz"] != trees[2]["start.tar.gz"]


def test_no_training_picture_is_among_the_held_out_ones(tmp_path: Path) -> None:
    write_demo(tmp_path, **SMALL, seed=1)

    def pictures(name: str) -> set[bytes]:
        with tarfile.open(tmp_path / name) as archive:
            files = [archive.extractfile(member) for member in archive if member.name.endswith(".png")]
            return {file.read() for file in files if file}

    training = pictures("start.tar.gz") | pictures("tune.tar.gz")
    held_out = pictures("validation.tar.gz") | {path.read_bytes() for path in tmp_path.rglob("*.png")}
    assert len(held_out) == 20 + 20 + 30 + 10  # validation, MathVerse (two per problem), MathVision, We-Math (groups)
    assert not training & held_out


def test_command_writes_data_without_torch_and_refuses_odd_sizes(tmp_path: Path) -> None:
    sizes = ["--train", "10", "--tune", "5", "--validation", "5", "--held-out", "6"]
    code = (
        f"import runpy, sys; sys.modules['torch'] = None; sys.argv = ['demo', {str(tmp_path / 'out')!r}, *{sizes!r}]; "
        "runpy.run_module('vlm_dft.demo', run_name='__main__')"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "demo.json").read_text())["start"] == 10
    refused = run_python("-m", "vlm_dft.demo", str(tmp_path / "odd"), "--held-out", "7")
    assert refused.returncode == 2
    assert "multiple of 3" in refused.stderr
