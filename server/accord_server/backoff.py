"""Pauses between tries: longer each time, never in step with others."""

from __future__ import annotations

import random
import time


class Backoff:
    """Pauses from `first_s`, doubled up to `most_s`, each shortened at random by up to a half.

    After a quiet time they begin anew.
    """

    def __init__(self, first_s: float, most_s: float) -> None:
        self._first_s, self._most_s = first_s, most_s
        self._next_s = first_s
        self._until = float("-inf")

    def pause_s(self) -> float:
        """The pause before the next try, in seconds."""
        if time.monotonic() > self._until + 2 * self._most_s:
            self._next_s = self._first_s
        whole, self._next_s = self._next_s, min(2 * self._next_s, self._most_s)
        pause = whole * random.uniform(0.5, 1.0)  # noqa: S311 - no secret
        self._until = time.monotonic() + pause
        return pause
