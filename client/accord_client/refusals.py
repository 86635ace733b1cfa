"""Why this site refuses plans now, in full: for its own operator alone. What leaves the site is less; see `Refusal`."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from accord_shared.errors import AccordError, printable
from accord_shared.service.pb import accord_pb2 as pb

MOST_REFUSALS = 16
Causes = tuple[object, ...]


@dataclass(frozen=True)
class PlanRefusal:
    """One refusal, and what it may depend on."""

    plan_hash: str
    """Empty: it is not of a plan."""
    reason: str
    time_s: float
    causes: Causes

    def info(self) -> pb.PlanRefusal:
        """For the local API."""
        return pb.PlanRefusal(plan_hash=self.plan_hash, reason=self.reason, time_us=int(self.time_s * 1e6))


class Refusals:
    """The newest refusal of each plan, as long as nothing has changed that it may depend on.

    `causes_of` gives what a plan's refusals may depend on: a policy, a ledger, an approval. A refusal whose causes are
    others by now says nothing about now: if it still holds, the coordinator's next question brings it back.
    """

    def __init__(self, causes_of: Callable[[str], Causes], clock: Callable[[], float] = time.time) -> None:
        self._causes_of, self._clock = causes_of, clock
        self._lock = threading.Lock()
        self._known: OrderedDict[str, PlanRefusal] = OrderedDict()

    def note(self, plan_hash: str, error: AccordError) -> PlanRefusal:
        """Remember a refusal, and say so."""
        reason = printable(f"{type(error).__name__}: {error}")
        made = PlanRefusal(plan_hash, reason, self._clock(), self._causes_of(plan_hash))
        with self._lock:
            self._known[plan_hash] = made
            self._known.move_to_end(plan_hash)
            while len(self._known) > MOST_REFUSALS:
                self._known.popitem(last=False)
        return made

    def clear(self, plan_hash: str) -> None:
        """A message of the plan was answered."""
        with self._lock:
            self._known.pop(plan_hash, None)

    def standing(self) -> list[PlanRefusal]:
        """Those that hold, the newest last."""
        with self._lock:
            known = list(self._known.values())
        gone = [one for one in known if self._causes_of(one.plan_hash) != one.causes]
        with self._lock:
            for one in gone:
                if self._known.get(one.plan_hash) is one:
                    del self._known[one.plan_hash]
        return [one for one in known if one not in gone]
