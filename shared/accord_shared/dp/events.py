"""What a mechanism did, as data: the only language that an accountant understands."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
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
        _require_mechanism(self, self.noise_multiplier, self.sampling_rate, self.steps)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values with the kind's name."""
        return {"kind": "sampled_gaussian", **asdict(self)}


@dataclass(frozen=True)
class SharedGaussian:
    """`steps` times: a sum over sites to which each adds its share of integer noise under secure aggregation.

    As `SampledGaussian`, for whoever does not know the noise of the honest sites; whoever knows that of all other sites
    is left with `own_noise_multiplier`. Each step adds `slack` to δ: what rounding to integers may let through
    (PROTOCOL.md, section 13). Under `participant` noise the unit is a site and `sampling_rate` is 1.
    """

    noise_multiplier: float
    own_noise_multiplier: float
    sampling_rate: float
    steps: int
    slack: float

    def __post_init__(self) -> None:
        _require_mechanism(self, self.noise_multiplier, self.sampling_rate, self.steps)
        _require_mechanism(self, self.own_noise_multiplier, self.sampling_rate, self.steps)
        if not (self.own_noise_multiplier <= self.noise_multiplier and 0 <= self.slack < 1):
            raise UnknownMechanism(f"no guarantee follows from {self}")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values with the kind's name."""
        return {"kind": "shared_gaussian", **asdict(self)}


Event = SampledGaussian | SharedGaussian
_NOISE = (1e-100, 1e100)
"""Of noise multipliers: their squares are still numbers."""
_KINDS: dict[str, type[Event]] = {"sampled_gaussian": SampledGaussian, "shared_gaussian": SharedGaussian}


def _require_mechanism(event: Event, noise_multiplier: float, sampling_rate: float, steps: int) -> None:
    given = (noise_multiplier, sampling_rate)
    numbers = type(steps) is int and all(isinstance(value, int | float) and value is not True for value in given)
    if not (numbers and _NOISE[0] <= noise_multiplier <= _NOISE[1] and 0 < sampling_rate <= 1 and steps >= 1):
        raise UnknownMechanism(f"no guarantee follows from {event}")


def event_from_json(value: dict[str, Any]) -> Event:
    """Read an event back.

    Raises:
        UnknownMechanism: another kind, or fields that do not fit.
    """
    fields = dict(value)
    kind = _KINDS.get(str(fields.pop("kind", None)))
    if kind is None:
        raise UnknownMechanism(f"unknown event kind {value.get('kind')!r}")
    try:
        return kind(**fields)
    except TypeError:
        raise UnknownMechanism(f"malformed event {value!r}") from None


def merge(events: Iterable[Event]) -> tuple[Event, ...]:
    """The same events with equal mechanisms counted together (composition commutes)."""
    counts: dict[Event, int] = {}
    for event in events:
        if not isinstance(event, SampledGaussian | SharedGaussian):
            raise UnknownMechanism(f"unknown event {type(event).__name__}")
        one = replace(event, steps=1)
        counts[one] = counts.get(one, 0) + event.steps
    return tuple(replace(one, steps=steps) for one, steps in counts.items())
