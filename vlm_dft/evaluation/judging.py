"""What a judge is asked about a graded response, by kind of benchmark. Torch-free.

A rule that finds the answer right is believed, and so is one that finds which option was chosen; but for We-Math's
exact matching, which VLMEvalKit too leaves out where there is a judge. Beyond that:

    options                 which option the response chose
    MathVerse, custom LaTeX what it answers, where it marked nothing; then whether that is the same as the reference
    MathVision, custom      what it answers; then the benchmark's own rule compares
    text mathematics        nothing: math-verify decides

A response without text is wrong without a judge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import NamedTuple

from vlm_dft.config import BenchmarkKind
from vlm_dft.evaluation import custom, mathverse, mathvision
from vlm_dft.evaluation.answers import marked_answer, without_reasoning
from vlm_dft.evaluation.grading import NO_ANSWER, Grade
from vlm_dft.evaluation.items import Item
from vlm_dft.evaluation.judge import Judge, JudgeReply
from vlm_dft.evaluation.latex import LatexProcess
from vlm_dft.evaluation.options import infer_option

NEVER_JUDGED: frozenset[BenchmarkKind] = frozenset({"text_math"})


class Judged(NamedTuple):
    """A grade, and what the judge said on the way to it; nothing where rules decided."""

    grade: Grade
    replies: tuple[JudgeReply, ...] = ()


def judged(kind: BenchmarkKind, item: Item, response: str, grade: Grade, judge: Judge, latex: LatexProcess) -> Judged:
    """grade: the rules'. Raises EvaluationError when the judge fails."""
    response = without_reasoning(response)
    if kind in NEVER_JUDGED or _is_believed(kind, grade) or not response.strip():
        return Judged(grade)
    if item.options:
        return _chosen(kind, item, response, judge, latex)
    return _free_form(kind, item, response, judge, latex)


def _is_believed(kind: BenchmarkKind, grade: Grade) -> bool:
    """We-Math's own rule takes the first letter of whatever is there: where a judge can look, that is no answer yet."""
    return grade.correct and not (kind == "wemath" and grade.rule == "benchmark")


def judge_all(tasks: Sequence[Callable[[], Judged]], judge: Judge, tell: Callable[[int], None]) -> list[Judged]:
    """Run the tasks, several at once, in order; the first failure ends all. tell: gets how many are done."""
    pool = ThreadPoolExecutor(judge.parallel, thread_name_prefix="judge")
    try:
        futures = [pool.submit(task) for task in tasks]
        for done, future in enumerate(as_completed(futures), start=1):
            future.result()
            tell(done)
        return [future.result() for future in futures]
    except BaseException:
        judge.stop()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _chosen(kind: BenchmarkKind, item: Item, response: str, judge: Judge, latex: LatexProcess) -> Judged:
    marked = marked_answer(response)
    letter = infer_option(marked.text if marked else response, item.options)
    if letter is not None:
        rule = marked.rule if marked else "benchmark"
        return Judged(Grade(letter, rule, _is_correct(kind, item, letter, latex)))
    letter, reply = judge.choose(item.asked, item.options, response)
    if letter is None:
        return Judged(NO_ANSWER, (reply,))
    return Judged(Grade(letter, "judge", _is_correct(kind, item, letter, latex)), (reply,))


def _free_form(kind: BenchmarkKind, item: Item, response: str, judge: Judge, latex: LatexProcess) -> Judged:
    is_compared = kind == "mathverse" or (kind == "custom" and item.categories["scoring"] == "latex")
    marked = marked_answer(response)
    replies: tuple[JudgeReply, ...] = ()
    answer = marked.text if marked and kind != "mathvision" else None
    if answer is None:
        answer, reply = judge.extract(item.asked, response)
        replies = (reply,)
        if answer is None:
            return Judged(NO_ANSWER, replies)
    correct = _is_correct(kind, item, answer, latex)
    if not correct and is_compared:
        correct, reply = judge.compare(item.asked, item.answer, answer)
        replies = (*replies, reply)
    rule = "judge" if replies or marked is None else marked.rule
    return Judged(Grade(answer, rule, correct), replies)


def _is_correct(kind: BenchmarkKind, item: Item, answer: str, latex: LatexProcess) -> bool:
    if kind == "wemath":
        return answer == item.answer
    rules = {"mathverse": mathverse.is_correct, "mathvision": mathvision.is_correct, "custom": custom.is_correct}
    return rules[kind](item, answer, latex)
