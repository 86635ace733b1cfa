"""Secure aggregation in trips: a round's sum that opens as a whole or not at all (PROTOCOL.md, section 7)."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from accord_server.aggregation import Aggregate, Begin, unnoted
from accord_server.exchange import Exchange, Failure
from accord_server.membership import Membership
from accord_server.witness import Witness
from accord_shared import PROTOCOL_VERSION
from accord_shared.errors import (
    AccordError,
    BudgetExhausted,
    Interrupted,
    LedgerBehind,
    LedgerRolledBack,
    OutputError,
    ProtocolError,
    RoundOpened,
    SessionLost,
    Unreachable,
)
from accord_shared.messages import MaskedUpload, MaskRequest, Message, Opened, SurvivorsSigned, TrainRequest
from accord_shared.plan import Plan
from accord_shared.quantize import decode
from accord_shared.roster import Roster
from accord_shared.secagg.collector import Collector
from accord_shared.secagg.keys import Attempt, RunTerms
from accord_shared.wire import payload_bytes

log = logging.getLogger(__name__)

_Due = TypeVar("_Due", MaskedUpload, SurvivorsSigned, Opened)

_JOINING_TRIPS = 2
"""Joining again, introductions: what a round may have to wait for before its own trips."""


class SecureAggregation:
    """Sums of encoded updates that open only as a whole. One object serves one run.

    `dimension` is the model's, `noise_multiplier` the plan's σ. `witness` remembers the sites' ledgers. `threads` is a
    performance flag: in how many the coordinator takes masks away.
    """

    bound = True  # R2

    def __init__(
        self,
        plan: Plan,
        roster: Roster,
        dimension: int,
        noise_multiplier: float,
        *,
        threads: int = 1,
        witness: Witness | None = None,
    ) -> None:
        self._roster, self._threads = roster, threads
        self._terms = RunTerms.of(plan, "", roster.hash, len(roster.members), dimension, noise_multiplier)
        self._membership = Membership(roster, witness)
        self._private = X25519PrivateKey.generate()
        self._exhausted: set[str] = set()
        self._asked: tuple[int, tuple[str, ...]] = (0, ())
        """The last round whose updates were asked for, and the cohort of its first attempt."""
        self._barred: tuple[int, set[str]] = (0, set())
        """The sites that say of this round that they helped to open it: they are asked for no other attempt of it."""
        self.trips = 3 if self._terms.mode == "malicious" else 2

    def collect(
        self, request: TrainRequest, cohort: tuple[str, ...], exchange: Exchange, begin: Begin = unnoted
    ) -> Aggregate:
        """One attempt. Without survivors nothing was opened; `forfeited` says whether sites helped in vain.

        Raises:
            OutputError, Unreachable: the coordinator's own database, disk or SuperLink fails: no fault of any site.
        """
        self._terms = replace(self._terms, run_id=request.run_id)
        trips = _Trips(exchange, self._membership, self._terms)
        opening = begun = False
        total, survivors = np.zeros(0), tuple[str, ...]()
        for name in exchange.restarted():
            self._membership.lose(name)
        try:
            members = self._members(self._allowed(request.round, cohort), trips)
            if len(members) < self._terms.minimum:  # an update without enough others would be released in vain
                raise ProtocolError(f"{len(members)} sites are ready, a sum needs {self._terms.minimum}")
            attempt = self._begin(request, members)
            begin(members)
            begun = True
            collector = Collector(attempt, self._roster, self._private)
            self._collect_uploads(attempt, request, collector, trips)
            certified = collector.close()
            if self._terms.mode == "malicious":
                asked = dict.fromkeys(collector.survivors, certified)
                trips.gather(attempt.cohort, asked, SurvivorsSigned, collector.add_signature)
            openings = collector.open_requests()
            opening = True
            trips.gather(attempt.cohort, openings, Opened, collector.add_opening)
            total = decode(collector.finish(threads=self._threads), self._terms.encoding, len(collector.survivors))
            survivors = tuple(members[index] for index in collector.survivors)
        except (Interrupted, OutputError, Unreachable):
            raise
        except AccordError as error:
            trips.failures["the attempt"] = f"{type(error).__name__}: {error}"
        return replace(self._aggregate(total, survivors, trips, opening=opening), begun=begun)

    def _aggregate(
        self, total: npt.NDArray[np.float64], survivors: tuple[str, ...], trips: _Trips, *, opening: bool
    ) -> Aggregate:
        self._exhausted |= trips.refused[BudgetExhausted.__name__]
        return Aggregate(
            total=total,
            survivors=survivors,
            failures=trips.failures,
            upload_bytes=trips.up_bytes,
            download_bytes=trips.down_bytes,
            trips=trips.count,
            exhausted=frozenset(self._exhausted),
            forfeited=not survivors and (opening or self._is_barred(trips.refused[RoundOpened.__name__])),
        )

    def _is_barred(self, refused: set[str]) -> bool:
        """Whether so many sites say that they opened the round that the others are too few: one may lie or err."""
        number, first = self._asked
        if not refused:
            return False
        if number != self._barred[0]:
            self._barred = (number, set())
        self._barred[1].update(refused)
        return len(set(first) - self._barred[1] - self._exhausted) < self._terms.minimum

    def _allowed(self, number: int, cohort: tuple[str, ...]) -> tuple[str, ...]:
        """In a further attempt of a round only the sites of the first: the others' presence would be refused (R2)."""
        asked, first = self._asked
        barred = self._barred[1] if number == self._barred[0] else ()
        return tuple(name for name in (first if number == asked else cohort) if name not in barred)

    def _members(self, cohort: Sequence[str], trips: _Trips) -> tuple[str, ...]:
        """The cohort's sites that are ready; waits for introductions only where too few are."""
        able = [name for name in cohort if name not in self._exhausted]
        for _ in range(_JOINING_TRIPS):
            enough = len(self._membership.ready(able)) >= self._terms.minimum
            if (enough and not self._membership.stale) or not trips.join():
                break
        self._membership.take_in(self._terms, trips.exchange.joined)
        return self._membership.ready(able)

    def _begin(self, request: TrainRequest, members: tuple[str, ...]) -> Attempt:
        return Attempt(
            terms=self._terms,
            round=request.round,
            attempt=request.attempt,
            cohort=members,
            bundles=tuple(self._membership[name].bundle for name in members),
            model_hash=request.model_hash,
            coordinator=self._private.public_key().public_bytes_raw(),
            choices=tuple(self._membership[name].choice for name in members) if self._terms.sparse else (),
        )

    def _collect_uploads(self, attempt: Attempt, request: TrainRequest, collector: Collector, trips: _Trips) -> None:
        plain = MaskRequest(
            protocol=PROTOCOL_VERSION,
            run_id=self._terms.run_id,
            plan_hash=self._terms.plan_hash,
            roster_hash=self._terms.roster_hash,
            round=request.round,
            attempt=request.attempt,
            cohort=attempt.cohort,
            bundles=attempt.bundles,
            coordinator=attempt.coordinator,
            peers=(),
            credentials=(),
            introductions=(),
            weights=request.weights,
            choices=attempt.choices,
        )
        if request.round != self._asked[0]:
            self._asked = (request.round, attempt.cohort)
        told = {name: dict(self._membership[name].waiting) for name in attempt.cohort}
        requests = {index: _with_introductions(plain, told[name]) for index, name in enumerate(attempt.cohort)}

        def add(index: int, upload: MaskedUpload) -> None:
            collector.add_upload(index, upload)
            self._note_upload(attempt.cohort[index], told[attempt.cohort[index]], upload)

        trips.gather(attempt.cohort, requests, MaskedUpload, add, least=self._terms.minimum)
        self._membership.witness.keep()

    def _note_upload(self, name: str, told: Mapping[str, tuple[bytes, bytes]], upload: MaskedUpload) -> None:
        """It has read what it was told, and has a new bundle."""
        session = self._membership[name]
        session.bundle = upload.next_bundle
        if upload.receipt:
            self._hear_receipt(name, upload.receipt)
        for peer, entry in told.items():
            if session.waiting.get(peer) == entry:
                del session.waiting[peer]

    def _hear_receipt(self, name: str, receipt: bytes) -> None:
        """A receipt that is not kept is no reason to lose an upload: the site's peers watch its ledger too."""
        try:
            self._membership.witness.hear(name, receipt)
        except (LedgerRolledBack, ProtocolError) as error:
            log.warning("the ledger of %s: %s", name, str(error))


@dataclass
class _Trips:
    """The trips of one attempt: what they move, and who failed. New sites are brought in beside them."""

    exchange: Exchange
    membership: Membership
    terms: RunTerms
    failures: dict[str, str] = field(default_factory=dict)
    refused: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Names of the sites that refused, by the kind of the refusal."""
    up_bytes: int = 0
    down_bytes: int = 0
    count: int = 0

    def gather(
        self,
        cohort: Sequence[str],
        requests: Mapping[int, Message],
        due: type[_Due],
        add: Callable[[int, _Due], object],
        least: int = 0,
    ) -> None:
        """One trip of the protocol; `add` takes in each reply of the kind that is due, or refuses it.

        Nobody is asked where fewer than `least` can be by now.
        """
        index = {name: place for place, name in enumerate(cohort)}
        wanted = {cohort[place]: request for place, request in requests.items()}
        if least and len(reachable := wanted.keys() & set(self.exchange.present())) < least:
            raise ProtocolError(f"{len(reachable)} of the sites are still there, a sum needs {least}: none was asked")
        for name, reply in self._run(wanted):
            if not isinstance(reply, due):
                self.failures[name] = f"ProtocolError: a {type(reply).__name__} came"
                continue
            try:
                add(index[name], reply)
            except ProtocolError as error:
                self.failures[name] = f"{type(error).__name__}: {error}"

    def join(self) -> bool:
        """One trip for sites that are not ready alone; False if there is nothing to ask."""
        side = self._side(())
        for _ in self._send({}, side):
            pass
        return bool(side)

    def _run(self, requests: Mapping[str, Message]) -> Iterator[tuple[str, Message]]:
        return self._send(requests, self._side(requests))

    def _side(self, busy: Container[str]) -> dict[str, Message]:
        """What sites that have nothing else to do are asked, to be ready for a later round."""
        wanted = self.membership.requests(self.terms, self.exchange.joined, self.exchange.enquiry)
        return {name: request for name, request in wanted.items() if name not in busy}

    def _send(self, requests: Mapping[str, Message], side: Mapping[str, Message]) -> Iterator[tuple[str, Message]]:
        """Yields replies to `requests`; those to `side` go to the membership."""
        everything = {**side, **requests}
        if not everything:
            return
        self.count += 1
        unique = {id(request): request for request in everything.values()}  # most are one object: measured once
        sizes = {key: payload_bytes(request) for key, request in unique.items()}
        self.down_bytes += sum(sizes[id(request)] for request in everything.values())
        for name, reply in self.exchange.send(everything):
            if isinstance(reply, Failure):
                self._fail(name, reply)
                continue
            self.up_bytes += payload_bytes(reply)
            if name in requests:
                yield name, reply
            else:
                self.membership.hear(name, side[name], reply)

    def _fail(self, name: str, failure: Failure) -> None:
        self.failures[name] = failure.reason
        self.refused[failure.kind].add(name)
        if failure.kind == SessionLost.__name__:
            self.membership.lose(name)
        if failure.kind == LedgerRolledBack.__name__:
            self.membership.told(name)
        if failure.kind == LedgerBehind.__name__:
            self.membership.refresh()


def _with_introductions(request: MaskRequest, waiting: Mapping[str, tuple[bytes, bytes]]) -> MaskRequest:
    """The same object where nobody is new: it is encoded once for all."""
    if not waiting:
        return request
    credentials, introductions = zip(*waiting.values(), strict=True)
    return replace(request, peers=tuple(waiting), credentials=credentials, introductions=introductions)
