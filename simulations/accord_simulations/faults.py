"""Faults of simulated participants: drop out, be slow, crash. A public choice from the simulation's seed."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from accord_shared.messages import Message, TrainRequest


class Crash(BaseModel):
    """The participant (counted from 1) trains in `round`, and dies before its reply leaves."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    participant: int = Field(ge=1)
    round: int = Field(ge=1)


class FaultSpec(BaseModel):
    """A scenario's `[faults]` table."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the participants (rounded) that give no answer, drawn anew for each round."""
    slow: float = Field(default=0.0, ge=0, lt=1)
    """Fraction that answers `slow_s` seconds late."""
    slow_s: float = Field(default=1.0, ge=0, le=3600)
    crashes: tuple[Crash, ...] = ()


class SimulatedCrash(RuntimeError):
    """What a participant's process dies of when the scenario says so."""


class Faults:
    """The faults of one participant of `participants`."""

    def __init__(self, spec: FaultSpec, seed: int, participant: int, participants: int) -> None:
        self._spec, self._seed = spec, seed
        self._participant, self._participants = participant, participants

    def _drawn(self, fraction: float, round_number: int, salt: int) -> bool:
        count = round(fraction * self._participants)
        if count == 0:
            return False
        generator = np.random.default_rng([self._seed, salt, round_number])  # public: which fault, not which noise
        return self._participant in generator.permutation(self._participants)[:count]

    def handle(self, handler: Callable[[Message], Message], message: Message) -> Message:
        """The handler's answer, if the faults of this round let it through.

        Raises:
            SimulatedCrash: the participant drops out or crashes.
        """
        if not isinstance(message, TrainRequest):
            return handler(message)
        if self._drawn(self._spec.dropout, message.round, 1):
            raise SimulatedCrash("simulated dropout")
        if self._drawn(self._spec.slow, message.round, 2):
            time.sleep(self._spec.slow_s)
        reply = handler(message)
        if any((c.participant - 1, c.round) == (self._participant, message.round) for c in self._spec.crashes):
            raise SimulatedCrash("simulated crash")
        return reply
