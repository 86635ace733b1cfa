"""Sentences from templates: slots, inline alternatives, and the noise of people typing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TypeVar

import numpy as np

T = TypeVar("T")
Slots = Mapping[str, Sequence[str]]
"""Phrases per slot name; a phrase may hold slots and alternatives itself."""

_PART = re.compile(r"\{(\w+)\}|\[([^\[\]]*)\]")
_BLOCK = 4096


class Dice:
    """Cheap scalar draws, in blocks, from one seeded generator (PCG64: reproducible, not secret)."""

    def __init__(self, *seeds: int) -> None:
        self.rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seeds)))
        self._block: list[float] = []

    def uniform(self) -> float:
        """A number in [0, 1)."""
        if not self._block:
            self._block = self.rng.random(_BLOCK).tolist()
        return self._block.pop()

    def below(self, n: int) -> int:
        """A number from 0 to n-1."""
        return int(self.uniform() * n)

    def pick(self, items: Sequence[T]) -> T:
        """One of the items, all equally likely."""
        return items[self.below(len(items))]

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.uniform() < probability


@cache
def _parse(template: str) -> tuple[tuple[str, str | tuple[str, ...]], ...]:
    """Splits into ("text", …), ("slot", name) and ("any", alternatives)."""
    parts: list[tuple[str, str | tuple[str, ...]]] = []
    end = 0
    for match in _PART.finditer(template):
        parts.append(("text", template[end : match.start()]))
        slot, alternatives = match.groups()
        parts.append(("slot", slot) if slot else ("any", tuple(alternatives.split("|"))))
        end = match.end()
    parts.append(("text", template[end:]))
    return tuple(part for part in parts if part[1])


def expand(template: str, slots: Slots, dice: Dice) -> str:
    """Fills `{slot}` and `[this|that]` with random choices, slots within phrases too."""
    out: list[str] = []
    for kind, value in _parse(template):
        if isinstance(value, tuple):
            out.append(expand(dice.pick(value), slots, dice))
        else:
            out.append(value if kind == "text" else expand(dice.pick(slots[value]), slots, dice))
    return "".join(out)


def sentence(clause: str) -> str:
    """The clause with a capital first letter."""
    return clause[:1].upper() + clause[1:]


_SHORTHAND = (("please", "pls"), (" you ", " u "), (" and ", " & "), ("thanks", "thx"), ("because", "cos"))


def typed(text: str, dice: Dice, typo_rate: float) -> str:
    """The text as somebody types it: sometimes lower case, shorthand, without the full stop, misspelt.

    `typo_rate` is the chance that a message has slips of the finger at all (one to three).
    """
    if dice.chance(0.22):
        text = text.lower()
    if dice.chance(0.10):
        for plain, short in _SHORTHAND:
            text = text.replace(plain, short)
    if dice.chance(0.12):
        text = text.replace("'", "")
    if dice.chance(0.25):
        text = text.rstrip(".")
    if dice.chance(typo_rate):
        for _ in range(1 + dice.below(3)):
            text = _slip(text, dice)
    return text


def _slip(text: str, dice: Dice) -> str:
    """Swaps, drops or doubles one letter inside the text."""
    at = 1 + dice.below(max(1, len(text) - 3))
    pair = text[at : at + 2]
    if not pair.isalpha():
        return text
    return text[:at] + dice.pick((pair[::-1], pair[0], pair[0] + pair)) + text[at + 2 :]
