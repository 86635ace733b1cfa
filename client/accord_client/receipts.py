"""What witnesses keep of a site's ledger, so that an old copy of it is noticed and what it lacks is found again.

A receipt names the newest entry, for all to compare, and holds a summary of everything that was spent, which only
the site itself can read. It is signed, so that a coordinator cannot invent one.
"""

from __future__ import annotations

import base64
import secrets
import zlib
from typing import Annotated, Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pydantic import Field, ValidationError

from accord_client.entries import Account, Hash, LedgerId, Name, Number
from accord_shared.errors import ProtocolError
from accord_shared.frames import frame
from accord_shared.identity import PublicKeys, ed25519_verifies
from accord_shared.plan import Table, first_problem
from accord_shared.secagg.keys import Head

_KEY = b"accord/1/ledger/receipt/key"
_NONCE, _BLOCK = 12, 1024
"""Bytes: of AES-GCM's nonce, and what a summary is padded to, so that its length tells little."""

Base64 = Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]*={0,2}$")]


class Signer(Protocol):
    """What an `Identity` can do, wherever its keys are."""

    @property
    def keys(self) -> PublicKeys:
        """The public keys."""

    def sign(self, message: bytes) -> bytes:
        """The Ed25519 signature."""

    def derive(self, label: bytes) -> bytes:
        """32 secret bytes for one purpose."""


class Receipt(Table):
    """Signed by a site: its ledger's newest entry, and what was spent until then, sealed for itself."""

    site: Name
    ledger: LedgerId
    seq: Number
    hash: Hash
    sealed: Base64
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]

    @property
    def head(self) -> Head:
        """The newest entry."""
        return Head(self.seq, bytes.fromhex(self.hash))

    def verify(self, keys: PublicKeys) -> None:
        """Check the signature.

        Raises:
            ProtocolError: it is not one of these keys.
        """
        signed = _signed(self.site, self.ledger, self.head, _bytes(self.sealed))
        if not ed25519_verifies(keys, signed, bytes.fromhex(self.signature)):
            raise ProtocolError(f"the receipt of {self.site!r} does not verify")

    def open(self, identity: Signer) -> Account:
        """What was spent, verified and unsealed.

        Raises:
            ProtocolError: the receipt is not one of this identity.
        """
        self.verify(identity.keys)
        sealed = _bytes(self.sealed)
        try:
            cipher, bound = AESGCM(identity.derive(_KEY)), _bound(self.site, self.ledger, self.head)
            text = cipher.decrypt(sealed[:_NONCE], sealed[_NONCE:], bound)
            return Account.model_validate_json(zlib.decompressobj().decompress(text))
        except (InvalidTag, ValidationError, ValueError, zlib.error):
            raise ProtocolError(f"the receipt of {self.site!r} cannot be opened") from None

    def to_json(self) -> str:
        """A JSON text that `from_json` reads back to an equal receipt."""
        return self.model_dump_json()

    @staticmethod
    def from_json(text: str | bytes) -> Receipt:
        """Read a receipt.

        Raises:
            ProtocolError: it is malformed.
        """
        try:
            return Receipt.model_validate_json(text)
        except ValidationError as error:
            raise ProtocolError(f"not a receipt: {first_problem(error)}") from None


def make_receipt(site: str, ledger: str, head: Head, account: Account, identity: Signer) -> Receipt:
    """Seal and sign."""
    text = zlib.compress(account.model_dump_json().encode())
    text += bytes(-len(text) % _BLOCK)
    nonce = secrets.token_bytes(_NONCE)
    sealed = nonce + AESGCM(identity.derive(_KEY)).encrypt(nonce, text, _bound(site, ledger, head))
    return Receipt(
        site=site,
        ledger=ledger,
        seq=head.seq,
        hash=head.hash.hex(),
        sealed=base64.b64encode(sealed).decode(),
        signature=identity.sign(_signed(site, ledger, head, sealed)).hex(),
    )


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise ProtocolError("not a receipt: its sealed part is not base64") from None


def _bound(site: str, ledger: str, head: Head) -> bytes:
    return frame("accord/1/ledger/receipt/sealed", site, bytes.fromhex(ledger), head.seq, head.hash)


def _signed(site: str, ledger: str, head: Head, sealed: bytes) -> bytes:
    return frame("accord/1/ledger/receipt", site, bytes.fromhex(ledger), head.seq, head.hash, sealed)
