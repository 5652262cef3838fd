"""Triton kernels of the loss head: imported by ``vlm_dft.heads.triton_head`` alone, and only when it is asked for.

Logits are made a tile at a time and never leave the chip. No atomics: every result has one writer, so that two runs
give the same bits. Knows nothing about objectives, autograd or what is done with partial results.

Shapes: N rows, D hidden size, V vocabulary, S splits of it; tiles of TILE_N rows, TILE_V words and TILE_D features.
"""

from __future__ import annotations

from typing import Final

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

INTERPRETED: Final = bool(triton.knobs.runtime.interpret)
"""TRITON_INTERPRET=1 was set when triton was imported: kernels run on a CPU, with numpy."""

TOP: Final = tl.constexpr(32)
"""How many of the largest logits of a row each split keeps: a power of two."""

# Below every logit, and finite: 0 x -inf would be NaN.
_LOWEST: Final = tl.constexpr(-1e30)


@triton.jit
def _logits(
    hidden, weight, bias, first_row, first_word, num_rows, vocabulary, features: tl.constexpr,
    HAS_BIAS: tl.constexpr, WIDEN: tl.constexpr, TILE_N: tl.constexpr, TILE_V: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """One tile of logits in float32, _LOWEST beyond the vocabulary."""
    rows, words, columns = tl.arange(0, TILE_N), tl.arange(0, TILE_V), tl.arange(0, TILE_D)
    row_known, word_known = rows < num_rows - first_row, words < vocabulary - first_word
    # 64 bits up to the tile, 32 within it: a register each rather than two.
    left_places = hidden + first_row.to(tl.int64) * features + (rows[:, None] * features + columns[None, :])
    right_places = weight + first_word.to(tl.int64) * features + (words[None, :] * features + columns[:, None])
    tile = tl.zeros((TILE_N, TILE_V), dtype=tl.float32)
    for start in range(0, features, TILE_D):
        inside = columns < features - start
        left = tl.load(left_places + start, mask=row_known[:, None] & inside[None, :], other=0.0)
        right = tl.load(right_places + start, mask=word_known[None, :] & inside[:, None], other=0.0)
        if WIDEN:  # the interpreter multiplies no bfloat16
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        tile = tl.dot(left, right, tile, input_precision="ieee")
    if HAS_BIAS:
        tile += tl.load(bias + first_word + words, mask=word_known, other=0.0)[None, :]
    return tl.where(word_known[None, :], tile, _LOWEST)


@triton.jit
def statistics_kernel(
    hidden, weight, bias, labels, partial, top, num_rows, vocabulary, features: tl.constexpr, words_per_split, stride,
    HAS_BIAS: tl.constexpr, WANT_TOP: tl.constexpr, WIDEN: tl.constexpr,
    TILE_N: tl.constexpr, TILE_V: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """Of each row and split, with x = logit - largest: largest, sum e^x, sum e^x x, sum e^2x, the target's logit.

    partial is 5 x S x N float32, stride elements from one number to the next; top, S x N x TOP, gets the largest logits
    where they are wanted. The target's logit is 0 in splits that do not have it.
    """
    split = tl.program_id(1)
    first_row = tl.program_id(0) * TILE_N
    rows = first_row + tl.arange(0, TILE_N)
    label = tl.load(labels + rows, mask=rows < num_rows, other=-1)
    largest = tl.full((TILE_N,), _LOWEST, dtype=tl.float32)
    total = tl.zeros((TILE_N,), dtype=tl.float32)
    total_x = tl.zeros((TILE_N,), dtype=tl.float32)
    total_squares = tl.zeros((TILE_N,), dtype=tl.float32)
    target = tl.zeros((TILE_N,), dtype=tl.float32)
    best = tl.full((TILE_N, TOP), _LOWEST, dtype=tl.float32)
    first = split * words_per_split
    start = first
    last = tl.minimum(first + words_per_split, vocabulary)
    while start < last:
        words = start + tl.arange(0, TILE_V)
        tile = _logits(
            hidden, weight, bias, first_row, start, num_rows, vocabulary, features,
            HAS_BIAS, WIDEN, TILE_N, TILE_V, TILE_D,
        )  # fmt: skip
        target += tl.sum(tl.where(words[None, :] == label[:, None], tile, 0.0), axis=1)
        above = tl.maximum(largest, tl.max(tile, axis=1))
        step = largest - above
        shrink = tl.exp(step)
        x = tile - above[:, None]
        e = tl.exp(x)
        total_x = shrink * (total_x + total * step) + tl.sum(e * x, axis=1)
        total = shrink * total + tl.sum(e, axis=1)
        total_squares = shrink * shrink * total_squares + tl.sum(e * e, axis=1)
        largest = above
        start += TILE_V
        if WANT_TOP:
            both = tl.join(best, tl.topk(tile, TOP))
            best = tl.topk(tl.reshape(both, (TILE_N, 2 * TOP)), TOP)
    place = partial + split.to(tl.int64) * num_rows + rows
    known = rows < num_rows
    tl.store(place, largest, mask=known)
    tl.store(place + stride, total, mask=known)
    tl.store(place + 2 * stride, total_x, mask=known)
    tl.store(place + 3 * stride, total_squares, mask=known)
    tl.store(place + 4 * stride, target, mask=known)
    if WANT_TOP:
        entries = (split.to(tl.int64) * num_rows + rows)[:, None] * TOP + tl.arange(0, TOP)[None, :]
        tl.store(top + entries, best, mask=known[:, None])


@triton.jit
def gradient_kernel(
    hidden, weight, bias, labels, largest, share, coefficient, gradient,
    num_rows, vocabulary, features: tl.constexpr, first_word, num_words,
    HAS_BIAS: tl.constexpr, WIDEN: tl.constexpr, TILE_N: tl.constexpr, TILE_V: tl.constexpr, TILE_D: tl.constexpr,
):  # fmt: skip
    """``share e^(logit - largest) - coefficient onehot`` of num_words words from first_word on: N x num_words."""
    first_row, first_place = tl.program_id(0) * TILE_N, tl.program_id(1) * TILE_V
    rows = first_row + tl.arange(0, TILE_N)
    places = first_place + tl.arange(0, TILE_V)
    words = first_word + places
    tile = _logits(
        hidden, weight, bias, first_row, first_word + first_place, num_rows, vocabulary, features,
        HAS_BIAS, WIDEN, TILE_N, TILE_V, TILE_D,
    )  # fmt: skip
    known = rows < num_rows
    label = tl.load(labels + rows, mask=known, other=-1)
    above = tl.load(largest + rows, mask=known, other=0.0)
    part = tl.load(share + rows, mask=known, other=0.0)
    whole = tl.load(coefficient + rows, mask=known, other=0.0)
    found = tl.exp(tile - above[:, None]) * part[:, None]
    found -= tl.where(words[None, :] == label[:, None], whole[:, None], 0.0)
    entries = rows.to(tl.int64)[:, None] * num_words + places[None, :]
    tl.store(
        gradient + entries,
        found.to(gradient.dtype.element_ty),
        mask=known[:, None] & (places < num_words)[None, :],
    )
