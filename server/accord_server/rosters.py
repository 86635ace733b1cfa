"""The roster that the coordinator serves, and who endorses it. It only passes on: sites decide what they trust."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from accord_server.audit import AuditLog
from accord_shared.errors import AccordError, RosterError
from accord_shared.files import write_atomic
from accord_shared.roster import Roster, SignedRoster
from accord_shared.service.pb import accord_pb2 as pb
from accord_shared.signatures import Endorsement, quorum

MOST_ENDORSEMENTS = 10_000


class Rosters:
    """The signed roster in a file, and beside it the endorsements of its members."""

    def __init__(self, path: Path, federation: str, audit: AuditLog) -> None:
        self._path, self._federation, self._audit = path, federation, audit
        self._endorsements = path.with_name("endorsements.json")
        self._lock = threading.Lock()

    @property
    def signed(self) -> SignedRoster | None:
        """The roster, if there is one."""
        return SignedRoster.from_json(self._path.read_bytes()) if self._path.exists() else None

    @property
    def roster(self) -> Roster:
        """The roster.

        Raises:
            RosterError: there is none yet.
        """
        signed = self.signed
        if signed is None:
            raise RosterError("there is no roster yet: `accord server roster set` loads one")
        return signed.roster

    @property
    def hash(self) -> str:
        """Its hash; empty without a roster."""
        signed = self.signed
        return signed.roster.hash if signed is not None else ""

    def set(self, text: str) -> pb.RosterInfo:
        """Serve a roster, or a later one.

        Raises:
            RosterError: a signature does not verify, it is of another federation or key, or not later.
        """
        new = SignedRoster.from_json(text)
        new.verify()
        if new.roster.federation != self._federation:
            raise RosterError(f"the roster is of {new.roster.federation!r}, not of {self._federation!r}")
        with self._lock:
            old = self.signed
            if old is not None and old.key != new.key:
                raise RosterError("the roster is signed by another key than the one before")
            if old is not None and old != new and new.roster.serial <= old.roster.serial:
                raise RosterError(f"the roster has serial {new.roster.serial}, the present one {old.roster.serial}")
            if old is None or old.roster != new.roster:
                self._audit.note("roster.set", new.roster.hash, serial=new.roster.serial)
                write_atomic(self._endorsements, b"[]")
                write_atomic(self._path, new.to_json().encode())
        return self.info()

    def endorsements(self) -> tuple[Endorsement, ...]:
        """Of the present roster."""
        if not self._endorsements.exists():
            return ()
        texts = json.loads(self._endorsements.read_bytes())
        return tuple(Endorsement.from_json(text) for text in texts)

    def endorse(self, site: str, text: str) -> None:
        """Keep a site's endorsement. Only sites judge who counts; here the signature and the name are checked.

        Raises:
            RosterError: it is of another roster or site, or the site is not on the roster.
            ImpostorError: the signature does not verify.
        """
        given = Endorsement.from_json(text)
        with self._lock:
            signed = self.signed
            if signed is None or given.roster != signed.roster.hash or given.federation != self._federation:
                raise RosterError("the endorsement is of another roster than the present one")
            if given.name != site:
                raise RosterError(f"the endorsement is of {given.name!r}, not of {site!r}")
            try:
                given.verify(signed.roster)
            except AccordError as error:
                raise RosterError(str(error)) from None
            kept = {old.name: old for old in self.endorsements()}
            if given.name not in kept and len(kept) < MOST_ENDORSEMENTS:
                kept[given.name] = given
                self._audit.note("roster.endorsed", given.roster, by=site)
                data = json.dumps([kept[name].to_json() for name in sorted(kept)])
                write_atomic(self._endorsements, data.encode())

    def reply(self) -> pb.RosterReply:
        """Roster and endorsements as sites ask for them."""
        with self._lock:
            signed = self.signed
            if signed is None:
                return pb.RosterReply()
            return pb.RosterReply(roster=signed.to_json(), endorsements=[one.to_json() for one in self.endorsements()])

    def info(self) -> pb.RosterInfo:
        """For the operator."""
        signed = self.signed
        if signed is None:
            return pb.RosterInfo()
        roster = signed.roster
        return pb.RosterInfo(
            hash=roster.hash,
            serial=roster.serial,
            members=len(roster.members),
            endorsements=len(self.endorsements()),
            quorum=quorum(roster),
        )
