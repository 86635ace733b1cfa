"""From requests to the sum of updates: the seam at which secure aggregation replaces the plain mean.

An `Aggregation` runs as many trips as its protocol needs and returns only the sum and who is in it; the
round never sees a single site's update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from accord_server.exchange import Exchange, Failure
from accord_shared.errors import AccordError, BudgetExhausted, ProtocolError
from accord_shared.messages import TrainReply, TrainRequest
from accord_shared.vectors import check_finite, check_length
from accord_shared.wire import payload_bytes


@dataclass(frozen=True)
class Aggregate:
    """The sum [dimension + extra coordinates] of the survivors' updates, and what the attempt moved over the wire."""

    total: npt.NDArray[np.float64]
    survivors: tuple[str, ...]
    failures: Mapping[str, str] = field(default_factory=dict)
    upload_bytes: int = 0
    download_bytes: int = 0
    trips: int = 1
    exhausted: frozenset[str] = frozenset()
    """Sites that have released all that the plan grants them."""
    forfeited: bool = False
    """Sites helped to open a sum that did not open: they take part in no other attempt of the round."""
    begun: bool = True
    """Whether sites were asked for updates at all: without enough of them that are ready nobody is."""


Begin = Callable[[tuple[str, ...]], None]
"""Told of the sites that are about to be asked for updates, before they are; what it raises ends the attempt."""


def unnoted(members: tuple[str, ...]) -> None:
    """For whoever keeps no note of attempts."""


class Aggregation(Protocol):
    """One attempt at summing the cohort's updates."""

    trips: int
    """Trips of a round in steady state."""
    bound: bool
    """Whether a further attempt of a round may ask only sites that the one before asked."""

    def collect(
        self, request: TrainRequest, cohort: tuple[str, ...], exchange: Exchange, begin: Begin = unnoted
    ) -> Aggregate:
        """Ask `cohort` to train and return the sum over those that finished (possibly none)."""


class PlainAggregation:
    """The coordinator sees each update and adds it: one trip, O(dimension) memory, no protection from it."""

    trips = 1
    bound = False

    def __init__(self, extra_coordinates: int = 0) -> None:
        self._extra = extra_coordinates
        self._exhausted: set[str] = set()

    def collect(
        self, request: TrainRequest, cohort: tuple[str, ...], exchange: Exchange, begin: Begin = unnoted
    ) -> Aggregate:
        """Sum what arrives, as it arrives; a malformed update counts as a failure of its site."""
        total = np.zeros(request.weights.shape[0] + self._extra, dtype=np.float64)
        survivors: list[str] = []
        failures: dict[str, str] = {}
        uploaded = 0
        begin(cohort)
        for site, reply in exchange.send(dict.fromkeys(cohort, request)):
            if isinstance(reply, Failure):
                failures[site] = reply.reason
                if reply.kind == BudgetExhausted.__name__:
                    self._exhausted.add(site)
                continue
            uploaded += payload_bytes(reply)
            try:
                total += _update(reply, request, len(total))
            except AccordError as error:
                failures[site] = f"{type(error).__name__}: {error}"
            else:
                survivors.append(site)
        return Aggregate(
            total=total,
            survivors=tuple(sorted(survivors)),
            failures=failures,
            upload_bytes=uploaded,
            download_bytes=payload_bytes(request) * len(cohort),
            exhausted=frozenset(self._exhausted),
        )


def _update(reply: object, request: TrainRequest, dimension: int) -> npt.NDArray[np.float32]:
    if not isinstance(reply, TrainReply):
        raise ProtocolError(f"a {type(reply).__name__} came where an update was due")
    if (reply.run_id, reply.round) != (request.run_id, request.round):
        raise ProtocolError("an update of another run or round")
    check_length(reply.update, dimension)
    check_finite(reply.update, "an update")
    return reply.update
