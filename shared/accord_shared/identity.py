"""Long-lived signing identities: Ed25519 (RFC 8032) and ML-DSA-65 (FIPS 204, empty context), PROTOCOL.md section 2.

Every message carries an Ed25519 signature; what has to outlive Ed25519 (rosters, credentials, introductions) carries
both. Private keys never print, pickle or copy.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from typing import NoReturn, Self

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PrivateKey, MLDSA65PublicKey
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from pydantic import ValidationError, field_validator, model_validator

from accord_shared.errors import IdentityError, ProtocolError, RosterError
from accord_shared.frames import hash_frame
from accord_shared.pkcs8 import encrypt_pkcs8
from accord_shared.plan import Table, first_problem

ED25519_PUBLIC, ML_DSA_65_PUBLIC = 32, 1952
"""Public keys, bytes."""
ED25519_SIGNATURE, ML_DSA_65_SIGNATURE = 64, 3309
"""Signatures, bytes."""
BOTH_SIGNATURES = ED25519_SIGNATURE + ML_DSA_65_SIGNATURE
"""The Ed25519 signature followed by the ML-DSA-65 signature: 3,373 bytes."""
SEED = 32
"""Seed of either private key, bytes."""
MAX_NAME = 64
"""Characters of a name."""

_PEM = re.compile(rb"-----BEGIN (?P<kind>(?:ENCRYPTED )?PRIVATE KEY)-----.*?-----END (?P=kind)-----", re.DOTALL)


def plain_name(value: str) -> str:
    """The name itself if it looks like what it is: printable, NFC, no blank at an end or doubled, at most 64 long.

    Raises:
        ValueError: it does not (pydantic turns this into a `RosterError`).
    """
    shown = repr(value[: MAX_NAME + 1])
    if not 0 < len(value) <= MAX_NAME:
        raise ValueError(f"name {shown} is not 1 to {MAX_NAME} characters long")
    if not value.isprintable() or " ".join(value.split(" ")) != " ".join(value.split()):
        raise ValueError(f"name {shown} has a character that does not print, or a stray blank")
    if unicodedata.normalize("NFC", value) != value:
        raise ValueError(f"name {shown} is not in Unicode normal form C")
    return value


def check_hex(what: str, value: str, size: int) -> None:
    """Checks that a text is `size` bytes in lower-case hexadecimal: one spelling, so equal bytes are equal texts.

    Raises:
        ValueError: it is not. The message does not repeat the text.
    """
    if not re.fullmatch(rf"[0-9a-f]{{{2 * size}}}", value):
        raise ValueError(f"{what} is not {2 * size} lower-case hexadecimal digits ({size} bytes)")


class Document(Table):
    """A frozen, strict table that is stored as JSON; what is wrong with it is a `RosterError` of one line."""

    @classmethod
    def made(cls, fields: dict[str, object]) -> Self:
        """Validate fields.

        Raises:
            RosterError: one line that names what is wrong.
        """
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise RosterError(first_problem(error)) from None

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read the JSON form.

        Raises:
            RosterError: it is malformed; one line that names what is wrong.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise RosterError(first_problem(error)) from None

    def to_json(self, indent: int | None = None) -> str:
        """A JSON text that `from_json` reads back to an equal value."""
        return self.model_dump_json(exclude_none=True, indent=indent)


class PublicKeys(Document):
    """An Ed25519 and an ML-DSA-65 public key, lower-case hexadecimal (32 and 1,952 bytes)."""

    ed25519: str
    ml_dsa_65: str

    @property
    def owner(self) -> str:
        """Whose keys these are, in words."""
        return "public keys"

    @model_validator(mode="after")
    def _lengths(self) -> Self:
        check_hex(f"{self.owner}: ed25519", self.ed25519, ED25519_PUBLIC)
        check_hex(f"{self.owner}: ml_dsa_65", self.ml_dsa_65, ML_DSA_65_PUBLIC)
        return self

    @property
    def fingerprint(self) -> str:
        """What people compare: SHA-256 of `frame("accord/1/fingerprint", ed25519, ml_dsa_65)`, hexadecimal."""
        keys = bytes.fromhex(self.ed25519), bytes.fromhex(self.ml_dsa_65)
        return hash_frame("accord/1/fingerprint", *keys).hex()


class Member(PublicKeys):
    """A participant of a federation: its name and its public keys."""

    name: str

    @field_validator("name")
    @classmethod
    def _plain(cls, value: str) -> str:
        return plain_name(value)

    @property
    def owner(self) -> str:
        """The member, in words."""
        return f"member {self.name!r}"


class Identity:
    """A pair of private keys. It signs; it does not print, pickle or copy."""

    __slots__ = ("_ed25519", "_ml_dsa_65")

    def __init__(self, ed25519: Ed25519PrivateKey, ml_dsa_65: MLDSA65PrivateKey) -> None:
        self._ed25519 = ed25519
        self._ml_dsa_65 = ml_dsa_65

    @staticmethod
    def generate() -> Identity:
        """New keys from the operating system's generator."""
        return Identity(Ed25519PrivateKey.generate(), MLDSA65PrivateKey.generate())

    @staticmethod
    def from_seeds(ed25519: bytes, ml_dsa_65: bytes) -> Identity:
        """The keys of two 32-byte seeds (RFC 8032, section 5.1.5; FIPS 204, algorithm 6).

        Raises:
            IdentityError: a seed is not 32 bytes.
        """
        if (len(ed25519), len(ml_dsa_65)) != (SEED, SEED):
            raise IdentityError(f"a seed of a private key is not {SEED} bytes")
        return Identity(Ed25519PrivateKey.from_private_bytes(ed25519), MLDSA65PrivateKey.from_seed_bytes(ml_dsa_65))

    @property
    def keys(self) -> PublicKeys:
        """The public keys."""
        return PublicKeys.made(self._public())

    def public(self, name: str) -> Member:
        """The member entry of these keys.

        Raises:
            RosterError: no member may have such a name.
        """
        return Member.made({"name": name, **self._public()})

    def sign(self, message: bytes) -> bytes:
        """The Ed25519 signature, 64 bytes."""
        return self._ed25519.sign(message)

    def sign_both(self, message: bytes) -> bytes:
        """The Ed25519 signature and the ML-DSA-65 signature (hedged: it differs every time), 3,373 bytes."""
        return self._ed25519.sign(message) + self._ml_dsa_65.sign(message)

    def derive(self, label: bytes) -> bytes:
        """32 secret bytes for one purpose that `label` names: HKDF-SHA-256 (RFC 5869) of the Ed25519 seed.

        One-way: neither the seed nor what another label gives follows from it.
        """
        return HKDF(SHA256(), 32, b"accord/1/identity/derive", label).derive(self._ed25519.private_bytes_raw())

    def to_pem(self, passphrase: bytes | None) -> bytes:
        """Two PKCS #8 PEM blocks, Ed25519 first; encrypted (scrypt, AES-256) if there is a passphrase.

        Raises:
            IdentityError: the passphrase is empty.
        """
        if passphrase == b"":
            raise IdentityError("the passphrase is empty")
        return b"".join(_block(key, passphrase) for key in (self._ed25519, self._ml_dsa_65))

    @staticmethod
    def from_pem(data: bytes, passphrase: bytes | None) -> Identity:
        """Read what `to_pem` wrote.

        Raises:
            IdentityError: not an identity, a passphrase is missing or wrong, or one is given for plain keys.
        """
        blocks = [match.group() for match in _PEM.finditer(data)]
        ed25519, ml_dsa_65 = [_loaded(block, passphrase) for block in blocks] if len(blocks) == 2 else (None, None)
        if not isinstance(ed25519, Ed25519PrivateKey) or not isinstance(ml_dsa_65, MLDSA65PrivateKey):
            raise IdentityError("not an identity: it takes an Ed25519 and an ML-DSA-65 private key, in this order")
        return Identity(ed25519, ml_dsa_65)

    def _public(self) -> dict[str, object]:
        ed25519 = self._ed25519.public_key().public_bytes_raw()
        return {"ed25519": ed25519.hex(), "ml_dsa_65": self._ml_dsa_65.public_key().public_bytes_raw().hex()}

    def __repr__(self) -> str:
        return "Identity(...)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an Identity is neither pickled nor copied")


def _block(key: Ed25519PrivateKey | MLDSA65PrivateKey, passphrase: bytes | None) -> bytes:
    if passphrase is None:
        return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return encrypt_pkcs8(key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()), passphrase)


def _loaded(block: bytes, passphrase: bytes | None) -> PrivateKeyTypes:
    if b" ENCRYPTED " in block and passphrase is None:
        raise IdentityError("the private key is encrypted and no passphrase is given")
    if b" ENCRYPTED " not in block and passphrase is not None:
        raise IdentityError("a passphrase is given, but the private key is not encrypted")
    try:
        return load_pem_private_key(block, passphrase)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # `from None`: no detail of a secret goes further
        raise IdentityError("the passphrase is wrong or the private key is damaged") from None


# --- verifying


@lru_cache(maxsize=8192)
def _ed25519_key(public: str) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))


@lru_cache(maxsize=1024)
def _ml_dsa_65_key(public: str) -> MLDSA65PublicKey:
    return MLDSA65PublicKey.from_public_bytes(bytes.fromhex(public))


def _verifies(key: Ed25519PublicKey | MLDSA65PublicKey, message: bytes, signature: bytes) -> bool:
    try:
        key.verify(signature, message)
    except InvalidSignature:
        return False
    return True


def ed25519_verifies(keys: PublicKeys, message: bytes, signature: bytes) -> bool:
    """Whether an Ed25519 signature (64 bytes) is one of these keys."""
    return len(signature) == ED25519_SIGNATURE and _verifies(_ed25519_key(keys.ed25519), message, signature)


def ml_dsa_65_verifies(keys: PublicKeys, message: bytes, signature: bytes) -> bool:
    """Whether an ML-DSA-65 signature (3,309 bytes, empty context) is one of these keys."""
    return len(signature) == ML_DSA_65_SIGNATURE and _verifies(_ml_dsa_65_key(keys.ml_dsa_65), message, signature)


def verify(member: Member, message: bytes, signature: bytes) -> None:
    """Check a member's Ed25519 signature.

    Raises:
        ProtocolError: it does not verify; the member is named.
    """
    if not ed25519_verifies(member, message, signature):
        raise ProtocolError(f"the Ed25519 signature of {member.name!r} does not verify")


def verify_both(member: Member, message: bytes, signatures: bytes) -> None:
    """Check a member's Ed25519 and ML-DSA-65 signatures, one after the other in 3,373 bytes.

    Raises:
        ProtocolError: one does not verify; the member is named.
    """
    if len(signatures) != BOTH_SIGNATURES:
        raise ProtocolError(f"the signatures of {member.name!r} are not {BOTH_SIGNATURES} bytes")
    verify(member, message, signatures[:ED25519_SIGNATURE])
    if not ml_dsa_65_verifies(member, message, signatures[ED25519_SIGNATURE:]):
        raise ProtocolError(f"the ML-DSA-65 signature of {member.name!r} does not verify")
