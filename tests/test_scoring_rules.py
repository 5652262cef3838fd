"""Where the answer is found, when two answers are equal, and what a hostile prediction can do: nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_dft.evaluation import arithmetic, mathverse, mathvision, wemath
from vlm_dft.evaluation.answers import marked_answer, phrased_answer, without_reasoning
from vlm_dft.evaluation.equality import is_equal, is_same
from vlm_dft.evaluation.grading import Grade, Outcome, mean_over_strata
from vlm_dft.evaluation.items import Item
from vlm_dft.evaluation.latex import LatexProcess
from vlm_dft.evaluation.options import infer_option


@pytest.fixture(scope="module")
def latex() -> Iterator[LatexProcess]:
    with LatexProcess() as process:
        yield process


FREE = Item("1", "1", "q", None, "12", {}, {"subject": "algebra", "version": "Vision Only"})
CHOICE = Item("2", "2", "q", None, "B", {"A": "3", "B": "4", "C": "5"}, {"subject": "algebra"})


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<think>1, 2 ... 7</think><answer>12</answer>", "12"),
        ("<answer>7</answer> no, wait: <answer> 12 </answer>", "12"),
        ("<ANSWER>12</ANSWER>", "12"),
        ("<answer>\\boxed{12}</answer> and \\boxed{13}", "12"),
        ("first \\boxed{7}, so \\boxed{12}.", "12"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\fbox {12}", "12"),
        ("{ unbalanced \\boxed{12}", "12"),
        ("\\boxed{12} then \\boxed{13", "12"),
        ("<answer>12", None),
        ("12", None),
        ("<answer></answer>", None),
        ("<Thought process>: <<x>> <Answer>: <<B>>", None),
    ],
)
def test_the_last_answer_tag_wins_over_the_last_box(response: str, answer: str | None) -> None:
    marked = marked_answer(without_reasoning(response))
    assert (marked.text if marked else None) == answer


def test_reasoning_is_no_answer() -> None:
    assert without_reasoning("<think>maybe \\boxed{7}</think>\n12") == "\n12"
    assert without_reasoning("<think>maybe \\boxed{7}, cut off") == ""
    assert without_reasoning("<think>a</think>b<think>c") == ""
    assert without_reasoning("plain") == "plain"


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("The answer is 12. Because 3 x 4.", "12"),
        ("The answer is 2.5.", "2.5"),
        ("**Answer:** $12$", "12"),
        ("Final answer: 7\nNo. Answer = 12", "12"),
        ("It is 12", None),
        ("The answer is", None),
    ],
)
def test_a_phrase_gives_the_answer_to_the_end_of_its_sentence(response: str, answer: str | None) -> None:
    assert phrased_answer(response) == answer


@pytest.mark.parametrize(
    ("response", "grade"),
    [
        ("<answer>12.0</answer>", Grade("12.0", "answer_tag", True)),
        ("\\boxed{24/2}", Grade("24/2", "boxed", True)),
        ("$12$", Grade("$12$", "benchmark", True)),
        ("13", Grade("13", "benchmark", False)),
        ("There are three rows of four, so the answer is 12.", Grade("12", "phrase", True)),
        ("I see many triangles and cannot count them all; perhaps a dozen or so.", Grade(None, "none", False)),
        ("", Grade(None, "none", False)),
    ],
)
def test_free_form_grades_follow_the_documented_order(response: str, grade: Grade, latex: LatexProcess) -> None:
    assert mathvision.grade(FREE, response, latex) == grade
    assert mathverse.grade(FREE, response, latex) == grade


@pytest.mark.parametrize("response", ["<answer>B</answer>", "<answer>4</answer>", "\\boxed{(B)}", "B. 4", "Answer: B"])
def test_an_option_may_be_named_by_letter_or_text(response: str, latex: LatexProcess) -> None:
    for benchmark in (mathvision, mathverse):
        assert benchmark.grade(CHOICE, response, latex).correct
        assert not benchmark.grade(CHOICE, response.replace("B", "C").replace("4", "5"), latex).correct


def test_mathverse_takes_an_options_text_as_the_reference_for_its_letter(latex: LatexProcess) -> None:
    """Some of its multiple-choice answers are texts, some letters in brackets."""
    options = {"A": "090^\\circ T", "B": "180^\\circ T"}
    item = Item("1", "1", "q", None, "090^\\circ T", options, {"version": "Text Lite"})
    assert mathverse.grade(item, "A", latex).correct
    assert mathverse.grade(item, "090^\\circ T", latex).correct
    assert not mathverse.grade(item, "B", latex).correct


def test_mathverse_accepts_another_spelling_of_an_expression(latex: LatexProcess) -> None:
    for answer, reference in [
        ("\\sqrt{3}/2", "\\frac{\\sqrt{3}}{2}"),
        ("(2, -2)", "(2,-2)"),
        ("x^2+4x+5", "(x+2)^2+1"),
    ]:
        assert is_same(answer, reference, latex)
        assert not is_equal(answer, reference, latex)  # VLMEvalKit's rule knows plain numbers only
    assert not is_same("x^2+4x+6", "(x+2)^2+1", latex)


def test_wemath_exact_matching_is_as_strict_as_the_official_one() -> None:
    for right in ("B", "B. 4", "Answer: B", "<Answer>: <<B>>"):
        assert wemath.exact_option(right) == "B"
    for wrong in ("The answer is B", "answer: B", "Answer: (B)", "Answer", ""):
        assert wemath.exact_option(wrong) != "B"


@pytest.mark.parametrize(
    ("text", "value"),
    [("3/4", 0.75), ("-(2+3)*4", -20), ("2**10", 1024), ("7//2", 3), ("1e3", 1000.0), (" 12 ", 12)],
)
def test_arithmetic_is_computed(text: str, value: float) -> None:
    assert arithmetic.value_of(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "9**9**9**9",
        "2**99999",
        "1/0",
        "abs(3)",
        "x",
        "[1]",
        "1 if 1 else 2",
        "(1,2)",
        "3<5",
        "'a'",
        "1e999**2",
        "(" * 150,
    ],
)
def test_what_is_not_bounded_arithmetic_has_no_value(text: str) -> None:
    assert arithmetic.value_of(text) in (None, float("inf"))


@settings(deadline=None)  # the machine may be busy
@given(st.text(alphabet="0123456789+-*/%.()eEj_ \n\t", max_size=60))
def test_arithmetic_never_raises(text: str) -> None:
    arithmetic.value_of(text)


HOSTILE = [
    "9**9**9**9",
    "9^{9^{9^{9}}}",
    "9!!!!!!!!!",
    "\\sum_{n=1}^{10^{10^{10}}} n",
    "{" * 1_000_000,
    "\\boxed{" * 200_000,
    "<answer>" * 200_000,
    "answer is " * 200_000,
    "\\frac{1}{" * 40,
    "(" * 390,
    "1" * 5_000,
    "\x00\ud800\u202e",
]
CODE = "__import__('pathlib').Path({path!r}).write_text('run')"


def test_hostile_predictions_neither_hang_nor_run(tmp_path: Path) -> None:
    """Each is graded (pytest's timeout would see a hang), counts as wrong, and code in it is never run."""
    proof = tmp_path / "proof"
    code = CODE.format(path=str(proof))
    with LatexProcess() as latex:
        latex.start()
        for text in [*HOSTILE, code, f"\\boxed{{{code}}}", f"<answer>{code}</answer>", f"\\operatorname{{{code}}}"]:
            for module in (mathvision, mathverse, wemath):
                for item in (FREE, CHOICE):
                    assert not module.grade(item, text, latex).correct
        assert latex.num_killed > 0
        assert is_equal("\\frac{1}{2}", "0.5", latex)  # and the parser works again
    assert not proof.exists()


@settings(deadline=None)  # the machine may be busy
@given(st.text(max_size=200))
def test_extraction_takes_any_text(text: str) -> None:
    response = without_reasoning(text)
    marked_answer(response)
    phrased_answer(response)
    infer_option(response, {"A": "1", "B": "2"})
    wemath.exact_option(response)


def test_the_standard_error_is_the_textbook_one_for_independent_items() -> None:
    estimate = mean_over_strata([Outcome(value, str(index)) for index, value in enumerate([1, 1, 1, 0])])
    assert (estimate.numerator, estimate.denominator) == (3, 4)
    assert estimate.standard_error == pytest.approx((0.75 * 0.25 / 3) ** 0.5)


def test_the_standard_error_counts_a_problem_once_however_many_versions_it_has() -> None:
    """Five versions answered alike are worth one item, not five."""
    alone = mean_over_strata([Outcome(value, str(index)) for index, value in enumerate([1, 1, 1, 0])])
    fivefold = [
        Outcome(value, str(index), version)
        for index, value in enumerate([1, 1, 1, 0])
        for version in mathverse.VERSIONS
    ]
    estimate = mean_over_strata(fivefold)
    assert estimate.value == alone.value
    assert estimate.standard_error == pytest.approx(alone.standard_error)


def test_versions_weigh_the_same_whatever_their_size() -> None:
    outcomes = [
        Outcome(1, "a", "first"),
        Outcome(0, "b", "second"),
        Outcome(0, "c", "second"),
        Outcome(0, "d", "second"),
    ]
    estimate = mean_over_strata(outcomes)
    assert (estimate.numerator, estimate.denominator) == (1, 2)


def test_one_group_alone_has_the_largest_standard_error() -> None:
    assert mean_over_strata([Outcome(1, "a"), Outcome(1, "a")]).standard_error == 0.5
