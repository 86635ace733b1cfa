"""What a mechanism did, as data: the only language that an accountant understands."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from accord_shared.errors import UnknownMechanism


@dataclass(frozen=True)
class SampledGaussian:
    """`steps` times: Poisson-sample units at `sampling_rate`, clip to C, add N(0, (`noise_multiplier`·C)²).

    Adjacency: add or remove one unit. The divisor and the number of steps are public constants.
    """

    noise_multiplier: float
    sampling_rate: float
    steps: int

    def __post_init__(self) -> None:
        whole = type(self.steps) is int and self.steps >= 1
        if not (0 < self.noise_multiplier < math.inf and 0 < self.sampling_rate <= 1 and whole):
            raise UnknownMechanism(f"no guarantee follows from {self}")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values with the kind's name."""
        return {
            "kind": "sampled_gaussian",
            "noise_multiplier": self.noise_multiplier,
            "sampling_rate": self.sampling_rate,
            "steps": self.steps,
        }


Event = SampledGaussian


def event_from_json(value: dict[str, Any]) -> Event:
    """Read an event back.

    Raises:
        UnknownMechanism: another kind, or fields that do not fit.
    """
    fields = dict(value)
    if fields.pop("kind", None) != "sampled_gaussian":
        raise UnknownMechanism(f"unknown event kind {value.get('kind')!r}")
    try:
        return SampledGaussian(**fields)
    except TypeError:
        raise UnknownMechanism(f"malformed event {value!r}") from None


def merge(events: Iterable[Event]) -> tuple[Event, ...]:
    """The same events with equal mechanisms counted together (composition commutes)."""
    counts: dict[tuple[float, float], Event] = {}
    for event in events:
        if not isinstance(event, SampledGaussian):
            raise UnknownMechanism(f"unknown event {type(event).__name__}")
        key = (event.noise_multiplier, event.sampling_rate)
        known = counts.get(key)
        counts[key] = event if known is None else replace(known, steps=known.steps + event.steps)
    return tuple(counts.values())
