"""Which samples share a pack and a rank: from lengths alone, so that nothing is decoded to plan. Torch-free.

The plan of a step is a function of its samples' numbers: the same at every attempt. It decides memory and speed; what a
step's gradient is made of, it never does.
Knows nothing about tensors or about how attention keeps the samples of a pack apart (``vlm_dft.attention``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_TOKENS_OF_EQUAL_ATTENTION = 32768
"""A sample of this length spends as much on attention as on all else (a 3B model: 12 x its hidden size, and a bit)."""


@dataclass(frozen=True)
class Size:
    """How large one sample is, as the image headers and its token count say."""

    tokens: int
    """Text and visual."""
    visual_tokens: int = 0

    @property
    def cost(self) -> float:
        """Computation in text tokens. A visual token costs the vision tower about what it costs the language model."""
        return self.tokens * (1 + self.tokens / _TOKENS_OF_EQUAL_ATTENTION) + self.visual_tokens


def balanced(sizes: Sequence[Size], count: int) -> list[list[int]]:
    """Samples, by their place, in count shares of like cost: the costliest first, each to the cheapest share."""
    shares = _spread(sizes, count, sum(size.tokens for size in sizes))
    assert shares is not None, "there is always room"
    return shares


def packed(sizes: Sequence[Size], pack_length: int) -> list[list[int]]:
    """Samples, by their place, in as few packs of at most pack_length tokens as best-fit finds, of like cost.

    No sample is longer than pack_length: ``batches.open_corpus`` has refused those.
    """
    fewest = _best_fit(sizes, pack_length)
    # Even packs need less memory than one full and one nearly empty; only tight ones cannot be evened out.
    even = _spread(sizes, len(fewest), pack_length)
    return fewest if even is None else even


def _best_fit(sizes: Sequence[Size], pack_length: int) -> list[list[int]]:
    """The longest first, each into the pack that it fills most."""
    packs: list[list[int]] = []
    room: list[int] = []
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place].tokens):
        tokens = sizes[place].tokens
        assert tokens <= pack_length, "refused when the dataset was opened"
        fitting = [number for number in range(len(packs)) if room[number] >= tokens]
        if fitting:
            chosen = min(fitting, key=room.__getitem__)
        else:
            chosen = len(packs)
            packs.append([])
            room.append(pack_length)
        packs[chosen].append(place)
        room[chosen] -= tokens
    return [sorted(pack) for pack in packs]


def _spread(sizes: Sequence[Size], count: int, length: int) -> list[list[int]] | None:
    """count bins of at most length tokens; None when a sample found no room."""
    bins: list[list[int]] = [[] for _ in range(count)]
    room, costs = [length] * count, [0.0] * count
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place].cost):
        size = sizes[place]
        fitting = [number for number in range(count) if room[number] >= size.tokens]
        if not fitting:
            return None
        chosen = min(fitting, key=costs.__getitem__)
        bins[chosen].append(place)
        room[chosen] -= size.tokens
        costs[chosen] += size.cost
    return [sorted(one) for one in bins]
