"""Faults of simulated participants: drop out, be slow, crash. A public choice from the simulation's seed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from accord_shared.messages import MaskRequest, Message, OpenRequest, SurvivorsRequest, TrainRequest

TRIPS = {"malicious": 3, "semi_honest": 2, "off": 1}
"""Trips of a round by the mode of secure aggregation."""


class Crash(BaseModel):
    """The participant (counted from 1) trains in `round`, and dies before its reply leaves."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    participant: int = Field(ge=1)
    round: int = Field(ge=1)


class FaultSpec(BaseModel):
    """A scenario's `[faults]` table."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the participants (rounded) that are lost in a round, drawn anew for each round."""
    dropout_at: Literal["any", "upload"] = "any"
    """From which trip of the round on they are lost: any trip alike, or always the first."""
    slow: float = Field(default=0.0, ge=0, lt=1)
    """Fraction that answers `slow_s` seconds late."""
    slow_s: float = Field(default=1.0, ge=0, le=3600)
    crashes: tuple[Crash, ...] = ()


class SimulatedCrash(RuntimeError):
    """What a participant's process dies of when the scenario says so."""


class Faults:
    """The faults of one participant of `participants`."""

    def __init__(self, spec: FaultSpec, seed: int, participant: int, participants: int, trips: int = 1) -> None:
        self._trips = trips
        self._spec, self._seed = spec, seed
        self._participant, self._participants = participant, participants

    def _drawn(self, fraction: float, round_number: int, salt: int) -> bool:
        count = round(fraction * self._participants)
        if count == 0:
            return False
        generator = np.random.default_rng([self._seed, salt, round_number])  # public: which fault, not which noise
        return self._participant in generator.permutation(self._participants)[:count]

    def _lost_from(self, round_number: int, trips: int) -> int:
        """The trip of the round (from 1) at which a lost participant is lost."""
        if self._spec.dropout_at == "upload":
            return 1
        drawn = np.random.default_rng([self._seed, 3, round_number, self._participant]).integers(trips)
        return int((1, 3, 2)[drawn] if trips < 3 else drawn + 1)

    def handle(self, handler: Callable[[Message], Message], message: Message) -> Message:
        """The handler's answer, if the faults of this round let it through.

        Raises:
            SimulatedCrash: the participant drops out or crashes.
        """
        if not isinstance(message, TrainRequest | MaskRequest | SurvivorsRequest | OpenRequest):
            return handler(message)
        trip = _trip(message)
        if self._drawn(self._spec.dropout, message.round, 1) and trip >= self._lost_from(message.round, self._trips):
            raise SimulatedCrash("simulated dropout")
        if trip > 1:
            return handler(message)
        if self._drawn(self._spec.slow, message.round, 2):
            time.sleep(self._spec.slow_s)
        reply = handler(message)
        if any((c.participant - 1, c.round) == (self._participant, message.round) for c in self._spec.crashes):
            raise SimulatedCrash("simulated crash")
        return reply


def _trip(message: TrainRequest | MaskRequest | SurvivorsRequest | OpenRequest) -> int:
    """Where in the round a message comes, from 1; the last trip of two counts as the third."""
    if isinstance(message, OpenRequest):
        return 3
    return 2 if isinstance(message, SurvivorsRequest) else 1
