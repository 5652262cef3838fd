"""Whether two short answers are equal: as text, as numbers, as LaTeX. Torch-free, no eval.

``is_equal`` decides as VLMEvalKit decides for MathVision, but for its accidents: it runs both answers through ``eval``
where the letters a and b are its own variables (so that "A" equals any number), functions can be called and ^ is XOR.
``is_same`` adds what only a judge finds there: sqrt(3)/2 spelled in two ways, coordinates, equal polynomials.
"""

from __future__ import annotations

from vlm_dft.evaluation import arithmetic
from vlm_dft.evaluation.latex import Comparison, LatexProcess

TOLERANCE = 1e-6


def is_equal(answer: str, reference: str, latex: LatexProcess) -> bool:
    """Equal text (case and outer white space aside), or equal plain numbers, spelled in arithmetic or LaTeX."""
    return _decide(answer, reference, latex, symbolic=False)


def is_same(answer: str, reference: str, latex: LatexProcess) -> bool:
    """The same, or LaTeX expressions that are the same or have the same value."""
    return _decide(answer, reference, latex, symbolic=True)


def _decide(answer: str, reference: str, latex: LatexProcess, *, symbolic: bool) -> bool:
    answer, reference = answer.lower().strip(), reference.lower().strip()
    if answer == reference or _close(arithmetic.value_of(answer), arithmetic.value_of(reference)):
        return True
    if not answer or not reference:
        return False
    compared = latex.compare(answer, reference, symbolic=symbolic)
    return _equal_numbers(compared) or compared.same


def _equal_numbers(compared: Comparison) -> bool:
    if compared.first is None or compared.second is None:
        return False
    return _close(arithmetic.value_of(compared.first), arithmetic.value_of(compared.second))


def _close(first: arithmetic.Number | None, second: arithmetic.Number | None) -> bool:
    if first is None or second is None:
        return False
    try:
        return abs(first - second) < TOLERANCE
    except OverflowError:  # an integer beyond the floats beside a float
        return False
