"""The roster: who belongs to a federation, signed by a key that the coordinator never has (PROTOCOL.md, section 3).

A signed roster carries the key that signed it, so its signature alone says nothing about who wrote it: a site pins
the roster's hash (`SignedRoster.verify(pinned)`).
"""

from __future__ import annotations

from bisect import bisect_left
from functools import lru_cache
from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from accord_shared.canonical import canonical_bytes, canonical_hash
from accord_shared.errors import ProtocolError, RosterError
from accord_shared.frames import frame
from accord_shared.identity import (
    ED25519_SIGNATURE,
    ML_DSA_65_SIGNATURE,
    Document,
    Identity,
    Member,
    PublicKeys,
    check_hex,
    ed25519_verifies,
    ml_dsa_65_verifies,
    plain_name,
)

__all__ = [
    "MAX_MEMBERS",
    "Member",
    "Roster",
    "RosterDraft",
    "RosterFile",
    "RosterKey",
    "RosterSignature",
    "SignedRoster",
    "sign_roster",
]

MAX_MEMBERS = 100_000


class RosterDraft(Document):
    """A roster that may still lack members. Members are ascending by name (code points), names and keys distinct."""

    version: Literal[1] = 1
    federation: str
    serial: int = Field(ge=0, lt=2**53)
    """Counts the changes: a later roster of a federation has a greater serial."""
    minimum: int = Field(ge=2, le=MAX_MEMBERS)
    """Least sites whose sum may be opened; a plan may ask for more, never for less."""
    colluders: int = Field(ge=0)
    """Most sites that may help the coordinator; a plan may ask for more, never for less."""
    members: Annotated[tuple[Member, ...], Field(max_length=MAX_MEMBERS)] = ()

    @field_validator("federation")
    @classmethod
    def _plain(cls, value: str) -> str:
        return plain_name(value)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.colluders >= self.minimum:
            raise ValueError(f"colluders = {self.colluders} must be less than minimum = {self.minimum}")
        names = [member.name for member in self.members]
        for first, second in pairwise(names):
            if first >= second:
                raise ValueError(f"members are not ascending by name, or not distinct: {first!r}, {second!r}")
        _refuse_shared_keys(self.members)
        return self

    def canonical(self) -> bytes:
        """The bytes that are hashed and signed: RFC 8785 JSON."""
        return canonical_bytes(self.model_dump())

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical bytes, hexadecimal."""
        return _hash(self)

    def member(self, name: str) -> Member:
        """The member of this name.

        Raises:
            ProtocolError: there is none.
        """
        return self.members[self.place(name)]

    def place(self, name: str) -> int:
        """The place of the member of this name, from 0.

        Raises:
            ProtocolError: there is none.
        """
        at = bisect_left(self.members, name, key=lambda member: member.name)
        if at == len(self.members) or self.members[at].name != name:
            raise ProtocolError(f"{name[:64]!r} is not on the roster")
        return at

    def added(self, *members: Member) -> Self:
        """The next roster, with these members.

        Raises:
            RosterError: a name or a key is on the roster already.
        """
        return self._next((*self.members, *members))

    def without(self, name: str) -> Self:
        """The next roster, without this member.

        Raises:
            ProtocolError: there is no such member.
            RosterError: too few would be left.
        """
        gone = self.member(name)
        return self._next(tuple(member for member in self.members if member != gone))

    def _next(self, members: tuple[Member, ...]) -> Self:
        ordered = tuple(sorted(members, key=lambda member: member.name))
        return self.made({**dict(self), "serial": self.serial + 1, "members": ordered})


@lru_cache(maxsize=16)
def _hash(roster: RosterDraft) -> str:
    """Kept by value, not in the object: no copy with other members can carry it along."""
    return canonical_hash(roster.model_dump())


class Roster(RosterDraft):
    """A whole roster: it has at least `minimum` members."""

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if len(self.members) < self.minimum:
            raise ValueError(f"minimum = {self.minimum}, but the roster has {len(self.members)} members")
        return self


def _refuse_shared_keys(members: tuple[Member, ...]) -> None:
    """One key under two names would be one site that counts twice."""
    for kind in ("ed25519", "ml_dsa_65"):
        owners: dict[str, str] = {}
        for member in members:
            owner = owners.setdefault(getattr(member, kind), member.name)
            if owner != member.name:
                raise ValueError(f"members {owner!r} and {member.name!r} have the same {kind} key")


class RosterKey(PublicKeys):
    """The public keys that sign a federation's rosters; the private ones are never on the coordinator."""

    @property
    def owner(self) -> str:
        """The roster key, in words."""
        return "roster key"


class RosterSignature(Document):
    """Both signatures, hexadecimal (64 and 3,309 bytes)."""

    ed25519: str
    ml_dsa_65: str

    @model_validator(mode="after")
    def _lengths(self) -> Self:
        check_hex("signature: ed25519", self.ed25519, ED25519_SIGNATURE)
        check_hex("signature: ml_dsa_65", self.ml_dsa_65, ML_DSA_65_SIGNATURE)
        return self


class SignedRoster(Document):
    """A roster, the key that signed it, and the signatures. Reading it checks no signature: `verify` does."""

    roster: Roster
    key: RosterKey
    signature: RosterSignature

    def verify(self, pinned: str | None = None) -> Roster:
        """The roster, after checking both signatures and, if given, that its hash is the pinned one.

        Raises:
            RosterError: a signature does not verify, or the hash differs.
        """
        message, signature = _message(self.roster), self.signature
        if not ed25519_verifies(self.key, message, bytes.fromhex(signature.ed25519)):
            raise RosterError("the Ed25519 signature of the roster does not verify")
        if not ml_dsa_65_verifies(self.key, message, bytes.fromhex(signature.ml_dsa_65)):
            raise RosterError("the ML-DSA-65 signature of the roster does not verify")
        if pinned is not None and pinned != self.roster.hash:
            raise RosterError(f"the roster is not the pinned one: its hash is {self.roster.hash}")
        return self.roster


class RosterFile(Document):
    """A roster on its way to being signed. With a signature its JSON is that of a `SignedRoster`."""

    roster: RosterDraft
    key: RosterKey
    signature: RosterSignature | None = None

    def signed(self) -> SignedRoster:
        """The signed roster (signatures not checked yet).

        Raises:
            RosterError: it is not signed, or has too few members.
        """
        if self.signature is None:
            raise RosterError("the roster is not signed")
        return SignedRoster.from_json(self.to_json())


def _message(roster: RosterDraft) -> bytes:
    return frame("accord/1/roster", roster.canonical())


def sign_roster(roster: Roster, identity: Identity) -> SignedRoster:
    """Sign a roster with the roster key (both signatures)."""
    both = identity.sign_both(_message(roster)).hex()
    cut = 2 * ED25519_SIGNATURE
    signature = RosterSignature(ed25519=both[:cut], ml_dsa_65=both[cut:])
    return SignedRoster(roster=roster, key=RosterKey.made(dict(identity.keys)), signature=signature)
