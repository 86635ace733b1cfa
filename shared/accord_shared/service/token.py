"""The enrolment token: what a site needs to know and trust before its first call, in one line to paste."""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from typing import Self

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from pydantic import Field, SecretStr, ValidationError, field_validator

from accord_shared.errors import EnrolmentRefused
from accord_shared.identity import plain_name
from accord_shared.plan import Table

PREFIX = "accord1."
_MOST_TEXT, _MOST_JSON = 16 * 1024, 64 * 1024
MAX_NAME_BYTES = 64
"""Of a name as UTF-8: the most that a certificate holds."""


def entity_name(value: str) -> str:
    """The name itself if it can stand in a certificate and name a file: a plain name without path characters.

    Raises:
        ValueError: it cannot.
    """
    plain_name(value)
    if len(value.encode()) > MAX_NAME_BYTES:
        raise ValueError(f"name {value!r} is more than {MAX_NAME_BYTES} bytes long")
    if value.startswith((".", "-")) or any(character in value for character in '/\\:*?"<>|'):
        raise ValueError(f'name {value!r} starts with a dot or dash, or has one of / \\ : * ? " < > |')
    return value


class Invitation(Table):
    """What a token says. It prints without its secret."""

    address: str = Field(pattern=r"^[^\s:/]+:[0-9]{1,5}$|^\[[0-9a-fA-F:]+\]:[0-9]{1,5}$")
    """host:port of `Enrolment`."""
    name: str
    """The site's name, which the coordinator chose."""
    secret: SecretStr
    """32 random bytes, hexadecimal; good for one enrolment."""
    authority: str
    """DER of the certificate of the authority to trust, base64."""
    federation: str
    expires_us: int = Field(ge=0, lt=2**53)

    @field_validator("name", "federation")
    @classmethod
    def _plain(cls, value: str) -> str:
        return entity_name(value)

    @field_validator("secret")
    @classmethod
    def _is_long(cls, value: SecretStr) -> SecretStr:
        if len(value.get_secret_value()) != 64:
            raise ValueError("the secret is not 32 bytes")
        return value

    @field_validator("authority")
    @classmethod
    def _is_certificate(cls, value: str) -> str:
        x509.load_der_x509_certificate(base64.b64decode(value, validate=True))
        return value

    @property
    def authority_pem(self) -> bytes:
        """The one authority that the enrolment call trusts."""
        return x509.load_der_x509_certificate(base64.b64decode(self.authority)).public_bytes(Encoding.PEM)

    def encode(self) -> str:
        """The token. It holds the secret."""
        fields = self.model_dump(mode="json") | {"secret": self.secret.get_secret_value()}
        packed = zlib.compress(json.dumps(fields, separators=(",", ":")).encode(), 9)
        return PREFIX + base64.urlsafe_b64encode(packed).rstrip(b"=").decode()

    @classmethod
    def decode(cls, token: str) -> Self:
        """Read a token; blanks and line breaks of a paste do not matter.

        Raises:
            EnrolmentRefused: it is not a token, or not a whole one. The message repeats nothing of it.
        """
        text = "".join(token.split())
        if not text.startswith(PREFIX) or len(text) > _MOST_TEXT:
            raise EnrolmentRefused(f"this is not an enrolment token, which starts with {PREFIX}")
        try:
            body = text.removeprefix(PREFIX)
            packed = base64.b64decode(body + "=" * (-len(body) % 4), altchars=b"-_", validate=True)
            return cls.model_validate_json(_unpacked(packed))
        except (ValidationError, ValueError, binascii.Error, zlib.error):
            raise EnrolmentRefused("the enrolment token is damaged or not whole: copy it again") from None


def _unpacked(packed: bytes) -> bytes:
    """At most 64 KiB: a token is no bomb."""
    unpacking = zlib.decompressobj()
    text = unpacking.decompress(packed, _MOST_JSON)
    if not unpacking.eof or unpacking.unused_data:
        raise ValueError("too long, or cut")
    return text
