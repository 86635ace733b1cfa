"""Where a site keeps its secrets of secure aggregation: in memory, one `Member` a run.

A deployed site has `LocalMembers` in its own process. A simulation, whose workers are interchangeable, keeps the
same objects in processes of their own and talks to them by the same interface.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import replace
from typing import Protocol

from accord_client.ledger.receipts import Receipt, Statement, make_receipt
from accord_shared.errors import ProtocolError, SessionLost
from accord_shared.identity import Identity
from accord_shared.messages import (
    IntroduceRequest,
    MaskedUpload,
    MaskRequest,
    Message,
    Opened,
    OpenRequest,
    SurvivorsRequest,
)
from accord_shared.receipts import NO_LEDGER, Seen
from accord_shared.roster import Roster
from accord_shared.secagg.keys import RunTerms
from accord_shared.secagg.masking import Words
from accord_shared.secagg.member import Member

MOST_RUNS = 8
"""Runs whose secrets are kept; older ones are forgotten."""

SideRequest = IntroduceRequest | SurvivorsRequest


class Members(Protocol):
    """The site's member of each run. All raise `SessionLost` for a run that this process did not join."""

    @property
    def roster(self) -> Roster:
        """The roster that the site accepted."""

    def join(self, terms: RunTerms, ledger: Statement) -> tuple[bytes, bytes, bytes]:
        """Credential, newest bundle and receipt for a run; a run that was joined keeps its session.

        `ledger` is what the site's privacy ledger says now, here and in `mask`.
        """

    def answer(self, request: SideRequest) -> Message:
        """Messages that touch neither data nor disk."""

    def accept(self, request: MaskRequest, model_hash: str) -> dict[str, Seen]:
        """Trip 1, before training: heads of the partners' ledgers; see `Member.accept`."""

    def mask(self, run_id: str, words: Words, ledger: Statement) -> MaskedUpload:
        """Trip 1, after training; see `Member.mask`."""

    def check_receipt(self, data: bytes) -> None:
        """Raise `ProtocolError` unless these bytes are a receipt that this site made."""

    def check_opening(self, request: OpenRequest) -> str:
        """Trip 3, before it is noted on disk; the hash of the run's plan."""

    def open(self, request: OpenRequest) -> Opened:
        """Trip 3."""


class LocalMembers:
    """Members in this process."""

    def __init__(self, name: str, identity: Identity, roster: Roster) -> None:
        self._name, self._identity, self._roster = name, identity, roster
        self._members: OrderedDict[str, tuple[RunTerms, Member]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def roster(self) -> Roster:
        """The roster that the site accepted."""
        return self._roster

    def join(self, terms: RunTerms, ledger: Statement | None = None) -> tuple[bytes, bytes, bytes]:
        """Credential, newest bundle and receipt (empty without a ledger).

        Raises:
            ProtocolError: the run was joined on other terms, or the roster is another.
        """
        known = self._members.get(terms.run_id)
        if known is None:
            head = ledger.head if ledger else NO_LEDGER
            known = (terms, Member(self._name, self._identity, self._roster, terms, head=head))
            self._members[terms.run_id] = known
            while len(self._members) > MOST_RUNS:
                self._members.popitem(last=False)
        if known[0] != terms:
            raise ProtocolError("R1: the run was joined on other terms")
        if ledger is not None:
            known[1].tell_ledger(ledger.head)
        return known[1].credential, known[1].bundle, self._receipt(ledger)

    def _receipt(self, ledger: Statement | None) -> bytes:
        return make_receipt(self._name, ledger, self._identity).to_json().encode() if ledger else b""

    def _member(self, run_id: str) -> Member:
        known = self._members.get(run_id)
        if known is None:
            raise SessionLost("this process did not join the run")
        return known[1]

    def answer(self, request: SideRequest) -> Message:
        """Introduce, or sign: one at a time, or two threads could sign twice."""
        member = self._member(request.run_id)
        with self._lock:
            if isinstance(request, IntroduceRequest):
                return member.introduce(request)
            return member.sign(request)

    def accept(self, request: MaskRequest, model_hash: str) -> dict[str, Seen]:
        """Trip 1, before training."""
        return self._member(request.run_id).accept(request, model_hash)

    def mask(self, run_id: str, words: Words, ledger: Statement | None = None) -> MaskedUpload:
        """Trip 1, after training."""
        upload = self._member(run_id).mask(words, ledger.head if ledger else NO_LEDGER)
        return replace(upload, receipt=self._receipt(ledger))

    def check_receipt(self, data: bytes) -> None:
        """Raise `ProtocolError` unless these bytes are a receipt that this site made."""
        receipt = Receipt.from_json(data)
        receipt.verify(self._identity.keys)
        if receipt.site != self._name:
            raise ProtocolError(f"a receipt of {receipt.site!r}")

    def check_opening(self, request: OpenRequest) -> str:
        """Trip 3, before it is noted on disk; the hash of the run's plan."""
        return self._member(request.run_id).check_opening(request)

    def open(self, request: OpenRequest) -> Opened:
        """Trip 3."""
        return self._member(request.run_id).open(request)
