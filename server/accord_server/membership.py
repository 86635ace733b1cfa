"""Who can take part in secure aggregation: sessions, introductions, and what each site still has to be told.

PROTOCOL.md, section 6. A new session (a joiner, a site that restarted) is introduced beside the trips of others; only
where too few sites are ready does a round wait for it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from accord_server.witness import Witness
from accord_shared.errors import LedgerRolledBack, ProtocolError
from accord_shared.messages import Enquiry, Introduced, IntroduceRequest, Joined, Message
from accord_shared.roster import Roster
from accord_shared.secagg.choices import chose
from accord_shared.secagg.keys import Bundle, Credential, Party, RunTerms, verify_introduction

log = logging.getLogger(__name__)


@dataclass
class Session:
    """A site's present session, as the coordinator knows it."""

    id: bytes
    credential: bytes
    choice: bytes
    """Sparse graph: whom the site chose, a bit map over the roster."""
    bundle: bytes
    """The newest that arrived."""
    answered: bytes = b""
    """The one that came with the newest answer to an enquiry."""
    waiting: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)
    """Credential and introduction of peers that it is told of with its next request."""
    ready: bool = False
    """Whether it has introduced itself to everybody who was there before."""


class Membership:
    """The sessions of one run. `witness` remembers the sites' ledgers: one that went back is not taken in."""

    def __init__(self, roster: Roster, witness: Witness | None = None) -> None:
        self._roster = roster
        self.witness = witness or Witness(roster)
        self.stale = False
        """Whether peers saw newer heads of ledgers than those in the bundles: all are asked for fresh ones."""
        self._rolled_back: dict[str, bytes] = {}
        """Sites to tell of the newest receipt that is known of them."""
        self._terms: RunTerms
        self._sessions: dict[str, Session] = {}
        self._lost: set[str] = set()
        self._refused: dict[str, bytes] = {}
        self._choices: dict[str, bytes] = {}
        """What each site chose when it first joined: an honest one never chooses otherwise in a run."""

    def __getitem__(self, name: str) -> Session:
        return self._sessions[name]

    def ready(self, names: Sequence[str]) -> tuple[str, ...]:
        """Those of `names` that can take part now, ascending."""
        return tuple(sorted(name for name in names if name in self._sessions and self._sessions[name].ready))

    def lose(self, name: str) -> None:
        """A site says that it has no secrets of the run any more: it is asked to join again."""
        self._sessions.pop(name, None)
        self._lost.add(name)

    def refresh(self) -> None:
        """A site saw a newer ledger of a peer, in another run: everybody is asked for a fresh bundle."""
        self.stale = True

    def told(self, name: str) -> None:
        """A site knows that its ledger went back: it is asked no further until it joins again."""
        self._rolled_back.pop(name, None)

    def take_in(self, terms: RunTerms, joined: Mapping[str, Joined]) -> None:
        """Read the newest answers to the enquiry: new sessions, fresh bundles."""
        self._terms = terms
        for name, reply in joined.items():
            self._enter(terms, name, reply)

    def requests(self, terms: RunTerms, joined: Mapping[str, Joined], enquiry: Enquiry) -> dict[str, Message]:
        """What brings the sites that are not ready one trip further."""
        self.take_in(terms, joined)
        fresh = sorted(name for name, session in self._sessions.items() if not session.ready)
        wanted: dict[str, Message] = dict.fromkeys(sorted(self._lost), enquiry)
        if self.stale:
            self.stale = False
            wanted |= dict.fromkeys(sorted(self._sessions), enquiry)
        wanted |= {name: replace(enquiry, receipt=data) for name, data in sorted(self._rolled_back.items())}
        for name in fresh:
            peers = self._to_introduce(name)
            self._sessions[name].ready = not peers
            if peers:
                credentials = tuple(self._sessions[peer].credential for peer in peers)
                wanted[name] = IntroduceRequest(run_id=terms.run_id, names=peers, credentials=credentials)
        return wanted

    def hear(self, name: str, request: Message, reply: Message) -> None:
        """Take in the answer to one of `requests`."""
        session = self._sessions.get(name)
        if isinstance(reply, Joined):
            self._lost.discard(name)  # the exchange keeps the answer; `requests` takes it from there
        elif session is None:
            return
        elif isinstance(reply, Introduced) and isinstance(request, IntroduceRequest):
            self._introduce(name, request, reply)

    def _enter(self, terms: RunTerms, name: str, joined: Joined) -> None:
        """Take in a new session, after its signatures; one that does not verify is asked no further."""
        session = self._sessions.get(name)
        current = session.credential if session is not None else self._refused.get(name)
        if session is not None and current == joined.credential and session.answered != joined.bundle:
            self._renew(terms, session, name, joined)
        if current == joined.credential or name in self._lost:
            return
        try:
            credential = Credential.read(joined.credential, terms, self._roster, name)
            bundle = Bundle.read(joined.bundle, terms, self._roster.member(name))
            if self._choices.get(name, credential.choice) != credential.choice:
                raise ProtocolError("it chose other neighbours before")
            if bundle.session != credential.session:
                raise ProtocolError("credential and bundle are of two sessions")
            self.witness.see(name, bundle.head, joined.receipt)
        except LedgerRolledBack as error:
            log.warning("%s is not taken in: %s", name, error)
            self._refused[name] = joined.credential
            self._sessions.pop(name, None)
            self._rolled_back[name] = self.witness.receipt(name)
            return
        except ProtocolError as error:
            log.warning("%s is not taken in: %s", name, error)
            self._refused[name] = joined.credential
            return
        self._choices[name] = credential.choice
        self._sessions[name] = Session(
            id=credential.session,
            credential=joined.credential,
            choice=credential.choice,
            bundle=joined.bundle,
            answered=joined.bundle,
        )

    def _renew(self, terms: RunTerms, session: Session, name: str, joined: Joined) -> None:
        """A fresh bundle of a session that is known."""
        session.answered = joined.bundle
        try:
            bundle = Bundle.read(joined.bundle, terms, self._roster.member(name))
            self.witness.see(name, bundle.head, joined.receipt)
        except (ProtocolError, LedgerRolledBack) as error:
            log.warning("a bundle of %s is not taken: %s", name, error)
            return
        if bundle.session == session.id and bundle.generation > Bundle.parse(session.bundle).generation:
            session.bundle = joined.bundle

    def _to_introduce(self, name: str) -> tuple[str, ...]:
        """Peers that `name` encapsulates to: whoever is ready, and of those that are as new the lesser names."""
        return tuple(
            peer
            for peer, session in sorted(self._sessions.items())
            if peer != name and (session.ready or peer < name) and self._are_neighbours(name, peer)
        )

    def _are_neighbours(self, name: str, peer: str) -> bool:
        """In a complete graph all are; in a sparse one those of which one chose the other."""
        own, other = self._sessions[name].choice, self._sessions[peer].choice
        if not own:
            return True
        return chose(own, self._roster.place(peer)) or chose(other, self._roster.place(name))

    def _introduce(self, name: str, request: IntroduceRequest, reply: Introduced) -> None:
        """Keep what `name` made for its peers; a site that made one that a peer would refuse takes no part."""
        member = self._roster.member(name)
        if len(reply.introductions) != len(request.names):
            return
        own = self._sessions[name]
        for peer, credential, introduction in zip(request.names, request.credentials, reply.introductions, strict=True):
            other = self._sessions.get(peer)
            if other is None or other.credential != credential:
                return  # it joined again meanwhile: `name` is asked once more
            try:
                verify_introduction(self._terms, introduction, member, Party(name, own.id), Party(peer, other.id))
            except ProtocolError as error:
                log.warning("%s is not taken in: %s", name, error)
                self._sessions.pop(name)
                self._refused[name] = own.credential
                return
            own.waiting.pop(peer, None)
            other.waiting[name] = (own.credential, introduction)
        own.ready = True
