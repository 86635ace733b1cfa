"""What witnesses keep of a site's privacy ledger, so that an old copy is noticed and what it lacks is found again.

A receipt names the newest entry, for all to compare, and holds a summary of everything that was spent, which only the
site itself can read. It is signed, so that a coordinator cannot invent one (PROTOCOL.md, section 15).
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import Field, ValidationError

from accord_shared.errors import ProtocolError
from accord_shared.frames import frame
from accord_shared.identity import PublicKeys, ed25519_verifies
from accord_shared.plan import Table, first_problem

Base64 = Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]*={0,2}$", max_length=1 << 16)]


@dataclass(frozen=True)
class Head:
    """The newest entry of a site's privacy ledger: its number (0: there is none yet) and hash, 32 bytes."""

    seq: int = 0
    hash: bytes = bytes(32)

    def to_bytes(self) -> bytes:
        """u64 big-endian, then the hash."""
        return self.seq.to_bytes(8, "big") + self.hash


NO_LEDGER = Head()
"""Of a site that has not written anything yet."""


@dataclass(frozen=True)
class Seen:
    """A head that a site signed in one of its sessions (16 bytes; a run in one process)."""

    session: bytes
    head: Head


class Receipt(Table):
    """Signed by a site: its ledger's newest entry, and what was spent until then, sealed for itself."""

    site: str = Field(min_length=1, max_length=128)
    ledger: str = Field(pattern=r"^[0-9a-f]{32}$")
    seq: int = Field(ge=0, lt=2**53)
    hash: str = Field(pattern=r"^[0-9a-f]{64}$")
    sealed: Base64
    signature: str = Field(pattern=r"^[0-9a-f]{128}$")

    @property
    def head(self) -> Head:
        """The newest entry."""
        return Head(self.seq, bytes.fromhex(self.hash))

    @property
    def sealed_bytes(self) -> bytes:
        """The summary, sealed.

        Raises:
            ProtocolError: it is not base64.
        """
        try:
            return base64.b64decode(self.sealed, validate=True)
        except ValueError:
            raise ProtocolError("not a receipt: its sealed part is not base64") from None

    def verify(self, keys: PublicKeys) -> None:
        """Check the signature.

        Raises:
            ProtocolError: it is not one of these keys.
        """
        signed = receipt_bytes(self.site, self.ledger, self.head, self.sealed_bytes)
        if not ed25519_verifies(keys, signed, bytes.fromhex(self.signature)):
            raise ProtocolError(f"the receipt of {self.site!r} does not verify")

    def to_json(self) -> str:
        """A JSON text that `from_json` reads back to an equal receipt."""
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read a receipt.

        Raises:
            ProtocolError: it is malformed.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ProtocolError(f"not a receipt: {first_problem(error)}") from None


def receipt_bytes(site: str, ledger: str, head: Head, sealed: bytes) -> bytes:
    """What a site signs."""
    return frame("accord/1/ledger/receipt", site, bytes.fromhex(ledger), head.seq, head.hash, sealed)
