"""Documents that somebody vouches for with both signatures: plans, finished models, endorsements of rosters.

Each is signed under a label of its own (`frame(label, canonical bytes)`), so that no signature passes for another.
"""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, JsonValue

from accord_shared.canonical import canonical_bytes
from accord_shared.errors import ImpostorError
from accord_shared.frames import frame
from accord_shared.identity import (
    BOTH_SIGNATURES,
    ED25519_SIGNATURE,
    Document,
    Identity,
    Member,
    PublicKeys,
    ed25519_verifies,
    ml_dsa_65_verifies,
)
from accord_shared.roster import Roster

HASH = r"^[0-9a-f]{64}$"


class Vouched(Document):
    """A document with the signatures (hexadecimal, Ed25519 then ML-DSA-65) of whoever vouches for it."""

    LABEL: ClassVar[str] = ""
    signature: str = Field(default="", pattern=rf"^([0-9a-f]{{{2 * BOTH_SIGNATURES}}})?$")

    def message(self) -> bytes:
        """What is signed: all fields but the signature."""
        fields = self.model_dump(mode="json", exclude={"signature"}, exclude_none=True)
        return frame(self.LABEL, canonical_bytes(fields))

    def signed(self, identity: Identity) -> Self:
        """The same, signed."""
        return self.model_copy(update={"signature": identity.sign_both(self.message()).hex()})

    def check(self, keys: PublicKeys) -> None:
        """Check both signatures.

        Raises:
            ImpostorError: one does not verify, or there is none.
        """
        both, message = bytes.fromhex(self.signature), self.message()
        if not (
            ed25519_verifies(keys, message, both[:ED25519_SIGNATURE])
            and ml_dsa_65_verifies(keys, message, both[ED25519_SIGNATURE:])
        ):
            raise ImpostorError(f"the signature of a {type(self).__name__} is not of key {keys.fingerprint[:16]}…")


class PlanSignature(Vouched):
    """Who proposes a plan. It carries the key; a site compares its fingerprint with those that it trusts."""

    LABEL = "accord/1/plan"
    plan_hash: str = Field(pattern=HASH)
    key: PublicKeys

    @classmethod
    def of(cls, plan_hash: str, identity: Identity) -> Self:
        """Sign a plan by its hash."""
        return cls(plan_hash=plan_hash, key=identity.keys).signed(identity)

    def verify(self, plan_hash: str) -> str:
        """The signer's fingerprint.

        Raises:
            ImpostorError: the signature does not verify, or is of another plan.
        """
        self.check(self.key)
        if self.plan_hash != plan_hash:
            raise ImpostorError(f"the signature is of plan {self.plan_hash[:12]}…, not of {plan_hash[:12]}…")
        return self.key.fingerprint


class SignedModel(Vouched):
    """A finished model: what it is, and the SHA-256 of its tensors file."""

    LABEL = "accord/1/model"
    run: str
    name: str
    plan: str
    """The plan's JSON."""
    plan_hash: str = Field(pattern=HASH)
    digest: str = Field(pattern=HASH)
    rounds: int
    finished: str
    """Time, RFC 3339."""
    metrics: dict[str, JsonValue] = Field(default_factory=dict)
    """What sites released in the last round."""


class Endorsement(Vouched):
    """A member accepts a roster: compared out of band by its operator."""

    LABEL = "accord/1/endorsement"
    federation: str
    roster: str = Field(pattern=HASH)
    name: str

    def verify(self, trusted: Roster) -> Member:
        """The member that endorses, by the roster that is trusted now.

        Raises:
            ImpostorError: the signature does not verify.
            ProtocolError: it is not a member.
        """
        member = trusted.member(self.name)
        self.check(member)
        return member


def quorum(roster: Roster) -> int:
    """Members of a trusted roster that must endorse its successor: all colluders and most of the others."""
    honest = len(roster.members) - roster.colluders
    return min(len(roster.members), roster.colluders + honest // 2 + 1)
