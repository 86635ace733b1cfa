"""The roster that a site trusts: the first by its operator's comparison, later ones by a quorum of members."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from accord_client.settings import SiteFolder
from accord_shared.errors import AccordError, BadInput, ProtocolError, RosterError, SettingsError
from accord_shared.files import write_atomic
from accord_shared.identity import Identity
from accord_shared.roster import Roster, SignedRoster
from accord_shared.signatures import Endorsement, quorum

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Acceptance:
    """What became of a roster: adopted, or how many endorsements of how many it has."""

    adopted: bool
    endorsed: int
    needed: int

    def facts(self) -> dict[str, bool | int]:
        """For `--json`."""
        return {"adopted": self.adopted, "endorsed": self.endorsed, "needed": self.needed}


class RosterBook:
    """The accepted roster in a site's folder.

    A later roster needs the same federation and roster key, a greater serial, and endorsements of
    `quorum(accepted)` members of the accepted roster. Whoever holds the roster key alone can so invent no members.
    """

    def __init__(self, folder: SiteFolder, identity: Identity, name: str, federation: str) -> None:
        self._path = folder.roster
        self._identity = identity
        self._name = name
        self._federation = federation
        self._read: tuple[tuple[int, ...], SignedRoster | None] | None = None

    @property
    def accepted(self) -> SignedRoster | None:
        """The accepted roster; its signatures are checked whenever the file is another one.

        Raises:
            SettingsError: the file is damaged.
        """
        stamp = self._stamp()
        if self._read is None or self._read[0] != stamp:
            self._read = stamp, self._from_file() if stamp else None
        return self._read[1]

    def _stamp(self) -> tuple[int, ...]:
        """Changes with the file; empty where there is none."""
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return ()
        return found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size

    def _from_file(self) -> SignedRoster:
        try:
            signed = SignedRoster.from_json(self._path.read_bytes())
            signed.verify()
        except (OSError, RosterError) as error:
            raise SettingsError(f"{self._path} is damaged: {error}") from None
        return signed

    @property
    def roster(self) -> Roster | None:
        """The accepted roster itself."""
        accepted = self.accepted
        return None if accepted is None else accepted.roster

    @property
    def hash(self) -> str:
        """Its hash, or empty."""
        roster = self.roster
        return "" if roster is None else roster.hash

    def check(self, offered: SignedRoster) -> None:
        """Could this roster follow the accepted one?

        Raises:
            RosterError: a signature, the federation, the roster key or the serial does not fit, or this site is not on
                it with its keys.
        """
        roster = offered.verify()
        if roster.federation != self._federation:
            raise RosterError(f"the roster is of federation {roster.federation!r}, this site of {self._federation!r}")
        self._check_own_entry(roster)
        accepted = self.accepted
        if accepted is None or accepted.roster.hash == roster.hash:
            return
        if offered.key != accepted.key:
            raise RosterError(
                f"the roster is signed by key {offered.key.fingerprint[:16]}…, not by that of the accepted roster, "
                f"{accepted.key.fingerprint[:16]}…"
            )
        if roster.serial <= accepted.roster.serial:
            raise RosterError(
                f"the serial {roster.serial} of the roster is not above the accepted, {accepted.roster.serial}"
            )

    def _check_own_entry(self, roster: Roster) -> None:
        try:
            mine = roster.member(self._name)
        except ProtocolError:
            raise RosterError(f"this site, {self._name!r}, is not on the roster") from None
        if mine != self._identity.public(self._name):
            raise RosterError(f"the roster has other keys for {self._name!r} than this site holds")

    def endorse(self, wanted: str, offered: SignedRoster) -> Endorsement:
        """The operator compared the hash `wanted` out of band: this site's signed word for it.

        Raises:
            BadInput: what is offered has another hash.
            RosterError: see `check`.
        """
        if wanted.lower() != offered.roster.hash:
            raise BadInput(f"the coordinator offers roster {offered.roster.hash}, not {wanted[:64]}")
        self.check(offered)
        made = Endorsement(federation=self._federation, roster=offered.roster.hash, name=self._name)
        return made.signed(self._identity)

    def accept(self, wanted: str, offered: SignedRoster, endorsements: Iterable[Endorsement]) -> Acceptance:
        """Adopt the first roster at once, a later one if enough members endorse it, this site included.

        Raises:
            BadInput, RosterError: see `endorse`.
        """
        own = self.endorse(wanted, offered)
        if self.accepted is None:
            self._adopt(offered)
            return Acceptance(adopted=True, endorsed=0, needed=0)
        return self.adopt_by_quorum(offered, [*endorsements, own])

    def adopt_by_quorum(self, offered: SignedRoster, endorsements: Iterable[Endorsement]) -> Acceptance:
        """Adopt a later roster if enough members of the accepted one endorse it; never the first.

        Raises:
            RosterError: see `check`.
        """
        self.check(offered)
        accepted = self.roster
        if accepted is None:
            return Acceptance(adopted=False, endorsed=0, needed=0)
        needed = quorum(accepted)
        if offered.roster.hash == accepted.hash:
            return Acceptance(adopted=True, endorsed=needed, needed=needed)
        endorsed, needed = self.endorsed(offered, endorsements)
        if endorsed >= needed:
            self._adopt(offered)
        return Acceptance(adopted=endorsed >= needed, endorsed=endorsed, needed=needed)

    def endorsed(self, offered: SignedRoster, endorsements: Iterable[Endorsement]) -> tuple[int, int]:
        """How many members of the accepted roster endorse this one, and how many must (0: none is accepted yet)."""
        accepted = self.roster
        if accepted is None:
            return 0, 0
        return len(self._endorsers(accepted, offered.roster.hash, endorsements)), quorum(accepted)

    def _endorsers(self, accepted: Roster, wanted: str, endorsements: Iterable[Endorsement]) -> set[str]:
        """Names of members of the accepted roster whose word holds; anything else does not count."""
        names: set[str] = set()
        for endorsement in endorsements:
            if endorsement.roster != wanted or endorsement.federation != self._federation:
                continue
            try:
                names.add(endorsement.verify(accepted).name)
            except AccordError as error:
                log.warning("an endorsement does not count: %s", error)
        return names

    def _adopt(self, offered: SignedRoster) -> None:
        write_atomic(self._path, offered.to_json().encode(), mode=0o600)
