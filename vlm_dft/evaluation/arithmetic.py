"""The value of a plain arithmetic expression such as 3/4 or 2*(5+1), without eval. Torch-free.

Names, calls, comparisons and everything else that is not a number and + - * / // % ** give None: text that a model
wrote is parsed, never run. Sizes are bounded, so that 9**9**9**9 costs nothing.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from typing import Any

MAX_CHARACTERS = 200
MAX_POWER_BITS = 4096
"""Largest result of an integer power, in bits; larger ones answer None."""

Number = int | float | complex

# Checked before ast sees the text: no names, strings, brackets or keywords can be spelled with these.
_PLAIN = re.compile(r"[0-9eEjJ_+\-*/%.()\s]+")
_BINARY: dict[type[ast.operator], Callable[[Any, Any], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Number]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def value_of(text: str) -> Number | None:
    """The number that text spells in Python's arithmetic, or None."""
    text = text.strip()
    if len(text) > MAX_CHARACTERS or not _PLAIN.fullmatch(text):
        return None
    try:
        return _value(ast.parse(text, mode="eval").body)
    except (SyntaxError, ArithmeticError, TypeError, ValueError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> Number:
    match node:
        case ast.Constant(value=int() | float() | complex() as number):
            return number
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](_value(operand))
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_value(left), _value(right))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_value(left), _value(right))
    raise ValueError(f"{type(node).__name__} is not arithmetic")


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * abs(exponent) > MAX_POWER_BITS:
        raise ValueError("the power is too large")
    return base**exponent
