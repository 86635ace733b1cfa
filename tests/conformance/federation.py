"""Federations of real members without models: known updates, and sites that are lost, restarted or corrupt.

Everything between a site's encoded update and the coordinator's sum is product code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from accord_client.members import LocalMembers
from accord_server.aggregation import Aggregate
from accord_server.exchange import Failure, LocalExchange, Reply
from accord_server.secagg import SecureAggregation
from accord_shared import PROTOCOL_VERSION
from accord_shared.dp.noise import SecureGenerator
from accord_shared.identity import Identity
from accord_shared.messages import (
    Enquiry,
    IntroduceRequest,
    Joined,
    MaskRequest,
    Message,
    OpenRequest,
    SurvivorsRequest,
    TrainRequest,
)
from accord_shared.plan import Plan, make_plan
from accord_shared.quantize import decode, encode
from accord_shared.roster import Roster
from accord_shared.secagg.keys import RunTerms

RUN = "run"
TRIPS: dict[type[Message], int] = {MaskRequest: 1, SurvivorsRequest: 2, OpenRequest: 3}


@lru_cache(maxsize=512)
def identity(name: str) -> Identity:
    """The same keys for the same name."""
    return Identity.from_seeds(*(hashlib.sha256(f"{kind} {name}".encode()).digest() for kind in ("ed25519", "ml-dsa")))


def secure_plan(size: int, changes: Mapping[str, Any] | None = None) -> Plan:
    """A plan without a model and without noise, whose updates are within 1 of zero."""
    table: dict[str, Any] = {
        "run": {"name": "secure", "rounds": 1000},
        "model": {"source": "package:nothing"},
        "task": {"labels": ["a", "b"]},
        "local": {"expected_records": 10},
        "privacy": {"noise": "none"},
        "cohort": {"size": size},
        "secure_aggregation": {"bound": 1.0},
    }
    return make_plan({**table}).revised(dict(changes or {}))


def names_of(count: int) -> list[str]:
    """Names in ascending order."""
    return [f"site-{index:03d}" for index in range(count)]


def roster_of(names: Sequence[str], minimum: int, colluders: int = 0) -> Roster:
    """A roster of the names' identities."""
    members = tuple(identity(name).public(name) for name in sorted(names))
    return Roster(federation="test", serial=1, minimum=minimum, colluders=colluders, members=members)


class Participant:
    """A site without training: its members, an update, and what it encoded in each attempt."""

    def __init__(self, name: str, roster: Roster, terms: RunTerms) -> None:
        self.name, self._roster, self._terms = name, roster, terms
        seed = hashlib.sha256(name.encode()).digest()
        self._generator = SecureGenerator(seed)
        self.update = np.random.default_rng(list(seed)).uniform(-1, 1, terms.dimension).astype(np.float32)
        self.words: dict[tuple[int, int], npt.NDArray[Any]] = {}
        self.restart()

    def restart(self) -> None:
        """All secrets are lost."""
        self.members = LocalMembers(self.name, identity(self.name), self._roster)

    def __call__(self, message: Message) -> Message:
        if isinstance(message, Enquiry):
            return Joined(self.name, PROTOCOL_VERSION, self._terms.plan_hash, *self.members.join(self._terms))
        if isinstance(message, MaskRequest):
            self.members.accept(message, message.model_hash)
            words = encode(self.update, self._terms.encoding, self._generator)
            self.words[message.round, message.attempt] = words.copy()
            return self.members.mask(message.run_id, words)
        if isinstance(message, OpenRequest):
            self.members.check_opening(message)
            return self.members.open(message)
        assert isinstance(message, IntroduceRequest | SurvivorsRequest)
        return self.members.answer(message)


def _never(name: str, message: Message) -> bool:
    return False


def _unchanged(name: str, message: Message) -> Message:
    return message


class LossyExchange(LocalExchange):
    """Requests that do not arrive, replies that do not, and replies that a corrupt site changes."""

    lost: Callable[[str, Message], bool] = staticmethod(_never)
    """Whether a request is lost on its way to the named site."""
    reply_lost: Callable[[str, Message], bool] = staticmethod(_never)
    """Whether the reply to a request is lost; the site has answered."""
    changed: Callable[[str, Message], Message] = staticmethod(_unchanged)
    """What arrives in the place of a site's reply."""

    def send(self, requests: Mapping[str, Message]) -> Iterator[tuple[str, Reply]]:
        for name, request in requests.items():
            reply: Reply = Failure("no reply within 1 s")
            if not self.lost(name, request):
                ((_, answer),) = super().send({name: request})
                if not self.reply_lost(name, request):
                    reply = answer if isinstance(answer, Failure) else self.changed(name, answer)
            yield name, reply

    def lose(self, from_trip: Mapping[str, int], *, replies: bool = False) -> None:
        """From now on the named sites are lost from that trip of every round on (`replies`: after they answered it)."""

        def lost(name: str, message: Message) -> bool:
            trip = TRIPS.get(type(message), 0)
            return name in from_trip and trip > (from_trip[name] if replies else from_trip[name] - 1)

        def reply_lost(name: str, message: Message) -> bool:
            return replies and TRIPS.get(type(message), 0) == from_trip.get(name, -1)

        self.lost, self.reply_lost = lost, reply_lost  # type: ignore[method-assign]

    def add(self, name: str, handler: Callable[[Message], Message]) -> None:
        """A site that comes later, and has answered the enquiry."""
        self._handlers[name] = handler
        answer = handler(self.enquiry)
        assert isinstance(answer, Joined)
        self.joined[name] = answer


@dataclass
class Federation:
    """`size` participants (or those of the roster in `joined`) and a coordinator's aggregation."""

    plan: Plan
    sites: int
    dimension: int = 5
    absent: frozenset[str] = frozenset()
    """On the roster, but not there from the start."""
    threads: int = 1
    sigma: float = 0.0
    """The plan's noise multiplier, where its sites share noise."""
    participants: dict[str, Participant] = field(init=False)

    def __post_init__(self) -> None:
        names = names_of(self.sites)
        self.roster = roster_of(names, max(2, self.plan.cohort.minimum), self.plan.cohort.colluders)
        self.terms = RunTerms.of(self.plan, RUN, self.roster.hash, self.sites, self.dimension, self.sigma)
        self.participants = {name: Participant(name, self.roster, self.terms) for name in names}
        enquiry = Enquiry(PROTOCOL_VERSION, RUN, self.plan.to_json(), self.plan.hash, self.roster.hash)
        here = {name: site for name, site in self.participants.items() if name not in self.absent}
        self.exchange = LossyExchange(here, enquiry)
        self.exchange.join()
        self.aggregation = self.new_aggregation()

    def new_aggregation(self) -> SecureAggregation:
        """The aggregation of a coordinator that knows nothing yet."""
        return SecureAggregation(self.plan, self.roster, self.dimension, self.sigma, threads=self.threads)

    @property
    def names(self) -> tuple[str, ...]:
        """All participants."""
        return tuple(self.participants)

    def collect(self, number: int, attempt: int = 1, cohort: Sequence[str] | None = None) -> Aggregate:
        """One attempt."""
        weights = np.full(self.dimension, number, dtype=np.float32)
        request = TrainRequest(PROTOCOL_VERSION, RUN, self.plan.hash, number, attempt, weights)
        return self.aggregation.collect(request, tuple(cohort or self.exchange.sites()), self.exchange)

    def expected(self, survivors: Sequence[str], number: int, attempt: int = 1) -> npt.NDArray[np.float64]:
        """What the survivors encoded, added up and decoded."""
        words = [self.participants[name].words[number, attempt] for name in survivors]
        total = np.sum(words, axis=0, dtype=np.uint64).astype(words[0].dtype)
        total &= total.dtype.type((1 << self.terms.bits) - 1)
        return decode(total, self.terms.encoding, len(survivors))

    def check(self, aggregate: Aggregate, number: int, attempt: int = 1) -> None:
        """The aggregate is the exact sum of what its survivors encoded."""
        assert aggregate.survivors, aggregate.failures
        np.testing.assert_array_equal(aggregate.total, self.expected(aggregate.survivors, number, attempt))

    def lose(self, from_trip: Mapping[str, int], *, replies: bool = False) -> None:
        """As `LossyExchange.lose`."""
        self.exchange.lose(from_trip, replies=replies)
