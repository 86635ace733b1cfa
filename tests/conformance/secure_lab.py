"""Deployed sites under secure aggregation in one process: real members, real coordinator, folders on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from accord_client.ledger.receipts import Statement
from accord_client.members import LocalMembers
from accord_client.site import Site
from accord_server.aggregation import Aggregate
from accord_server.secagg import SecureAggregation
from accord_shared import PROTOCOL_VERSION
from accord_shared.dp.accounting import noise_multiplier
from accord_shared.messages import Enquiry, MaskedUpload, Message, Refusal, TrainRequest
from accord_shared.plan import Plan
from accord_shared.secagg.keys import RunTerms
from accord_shared.secagg.masking import Words
from conformance.federation import RUN, LossyExchange, identity, names_of, roster_of
from conformance.lab import Lab, dimension, lab_plan

SIZE = 3


class Crash(BaseException):
    """The process dies here: nothing catches it but the test's supervisor."""


def secure_lab_plan(size: int = SIZE, **changes: Any) -> Plan:
    secure = {"secure_aggregation.mode": "malicious", "cohort.size": size, "cohort.minimum": None}
    return lab_plan({"privacy.accountant": "rdp", **secure, **changes})


class Watched(LocalMembers):
    """Members that tell when they are about to mask, and with what."""

    before_mask: Callable[[Words], None] = staticmethod(lambda words: None)

    def mask(self, run_id: str, words: Words, ledger: Statement | None = None) -> MaskedUpload:
        self.before_mask(words)
        return super().mask(run_id, words, ledger)


class SecureLab:
    """Sites on folders, with members and a coordinator."""

    def __init__(self, folder: Path, plan: Plan, sites: int = SIZE, **lab: Any) -> None:
        self.plan, self.names = plan, tuple(names_of(sites))
        self.roster = roster_of(self.names, plan.cohort.minimum, plan.cohort.colluders)
        self.labs = {name: Lab(folder / name, data_seed=index, **lab) for index, name in enumerate(self.names)}
        self.requests: dict[str, list[Message]] = {name: [] for name in self.names}
        self.replies: dict[str, list[Message]] = {name: [] for name in self.names}
        self.sites: dict[str, Site] = {}
        self.members: dict[str, Watched] = {}
        for name in self.names:
            self.start(name)
        self.sigma = noise_multiplier(plan)
        self.dimension = dimension(plan, self.labs[self.names[0]])
        self.terms = RunTerms.of(plan, RUN, self.roster.hash, sites, self.dimension, self.sigma)
        handlers = {name: self._handler(name) for name in self.names}
        self.exchange = LossyExchange(handlers, self.enquiry)
        self.aggregation = self.new_aggregation()

    def new_aggregation(self) -> SecureAggregation:
        """The aggregation of a coordinator that knows nothing yet."""
        return SecureAggregation(self.plan, self.roster, self.dimension, self.sigma)

    @property
    def enquiry(self) -> Enquiry:
        return Enquiry(PROTOCOL_VERSION, RUN, self.plan.to_json(), self.plan.hash, self.roster.hash)

    def start(self, name: str) -> Site:
        """A new process of the site: nothing but its folder and identity is left."""
        self.members[name] = Watched(name, identity(name), self.roster)
        self.sites[name] = self.labs[name].site(
            name, members=self.members[name], least_secure_aggregation="malicious", accept_without_privacy=False
        )
        return self.sites[name]

    def _handler(self, name: str) -> Callable[[Message], Message]:
        def handle(message: Message) -> Message:
            self.requests[name].append(message)
            try:
                reply = self.sites[name].handle(message)
            except Crash:
                self.start(name)
                reply = Refusal("AccordError", "crashed")
            self.replies[name].append(reply)
            return reply

        return handle

    def request(self, number: int, attempt: int = 1) -> TrainRequest:
        weights = np.full(self.dimension, 0.01 * number, dtype=np.float32)
        return TrainRequest(PROTOCOL_VERSION, RUN, self.plan.hash, number, attempt, weights)

    def collect(self, number: int, attempt: int = 1, cohort: tuple[str, ...] = ()) -> Aggregate:
        return self.aggregation.collect(self.request(number, attempt), cohort or self.names, self.exchange)

    def rounds(self, name: str) -> int:
        return self.sites[name].releases(self.plan).rounds

    def last_update(self, name: str) -> np.ndarray[Any, Any]:
        store = self.labs[name].store()
        return store.last_update(store.releases(self.plan.hash))

    def last(self, name: str, kind: type[Message]) -> Any:
        return next(message for message in reversed(self.requests[name]) if isinstance(message, kind))
