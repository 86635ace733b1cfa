"""A site's receipts of its own ledger: made for witnesses to keep, and opened again by the site alone."""

from __future__ import annotations

import base64
import secrets
import zlib
from dataclasses import dataclass
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pydantic import ValidationError

from accord_client.ledger.entries import Account
from accord_shared.errors import ProtocolError
from accord_shared.frames import frame
from accord_shared.identity import PublicKeys
from accord_shared.receipts import Head, receipt_bytes
from accord_shared.receipts import Receipt as PublicReceipt

_KEY = b"accord/1/ledger/receipt/key"
_NONCE, _BLOCK = 12, 1024
"""Bytes: of AES-GCM's nonce, and what a summary is padded to, so that its length tells little."""


class Signer(Protocol):
    """What an `Identity` can do, wherever its keys are."""

    @property
    def keys(self) -> PublicKeys:
        """The public keys."""

    def sign(self, message: bytes) -> bytes:
        """The Ed25519 signature."""

    def derive(self, label: bytes) -> bytes:
        """32 secret bytes for one purpose."""


class Receipt(PublicReceipt):
    """A receipt that its site can open."""

    def open(self, identity: Signer) -> Account:
        """What was spent, verified and unsealed.

        Raises:
            ProtocolError: the receipt is not one of this identity.
        """
        self.verify(identity.keys)
        sealed = self.sealed_bytes
        try:
            cipher, bound = AESGCM(identity.derive(_KEY)), _bound(self.site, self.ledger, self.head)
            text = cipher.decrypt(sealed[:_NONCE], sealed[_NONCE:], bound)
            return Account.model_validate_json(zlib.decompressobj().decompress(text))
        except (InvalidTag, ValidationError, ValueError, zlib.error):
            raise ProtocolError(f"the receipt of {self.site!r} cannot be opened") from None


@dataclass(frozen=True)
class Statement:
    """What a site has to tell its witnesses now: the ledger's id, its newest entry, and what was spent."""

    ledger: str
    head: Head
    account: Account


def make_receipt(site: str, statement: Statement, identity: Signer) -> Receipt:
    """Seal and sign."""
    ledger, head = statement.ledger, statement.head
    text = zlib.compress(statement.account.model_dump_json().encode())
    text += bytes(-len(text) % _BLOCK)
    nonce = secrets.token_bytes(_NONCE)
    sealed = nonce + AESGCM(identity.derive(_KEY)).encrypt(nonce, text, _bound(site, ledger, head))
    return Receipt(
        site=site,
        ledger=ledger,
        seq=head.seq,
        hash=head.hash.hex(),
        sealed=base64.b64encode(sealed).decode(),
        signature=identity.sign(receipt_bytes(site, ledger, head, sealed)).hex(),
    )


def _bound(site: str, ledger: str, head: Head) -> bytes:
    return frame("accord/1/ledger/receipt/sealed", site, bytes.fromhex(ledger), head.seq, head.hash)
