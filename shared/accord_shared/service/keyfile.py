"""Private keys at rest: files of mode 0600, encrypted where there is a passphrase.

The passphrase comes from the environment or, under systemd, from a credential (`LoadCredential=accord-passphrase:…`).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, generate_private_key
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from accord_shared.errors import BadInput, IdentityError, OutputError
from accord_shared.files import write_atomic
from accord_shared.identity import Identity
from accord_shared.pkcs8 import encrypt_pkcs8

PASSPHRASE = "ACCORD_PASSPHRASE"  # noqa: S105 - the variable's name
CREDENTIAL = "accord-passphrase"


def passphrase() -> bytes | None:
    """The passphrase of this process's keys; None: they are not encrypted."""
    given = os.environ.get(PASSPHRASE, "").encode("utf-8", "surrogateescape")
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    if given or not folder:
        return given or None
    path = Path(folder) / CREDENTIAL
    return path.read_bytes().strip(b"\r\n") or None if path.exists() else None


def read_private(path: Path) -> bytes:
    """The bytes of a private file.

    Raises:
        IdentityError: it is not there, or others can read it.
    """
    data, mode = _read(path)
    _refuse_open(path, mode)
    return data


def _read(path: Path) -> tuple[bytes, int]:
    try:
        with path.open("rb") as file:
            return file.read(), stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    except OSError as error:
        raise IdentityError(f"{path} cannot be read: {error.strerror}") from None


def _refuse_open(path: Path, mode: int) -> None:
    if mode & 0o077:
        raise IdentityError(f"{path} can be read by others: chmod 600 it, and hold its key for exposed")


@contextmanager
def new_private(path: Path, data: bytes) -> Iterator[None]:
    """Write a new file of mode 0600; it goes again if what follows fails.

    Its name is taken first, so that no two commands write one file.

    Raises:
        OutputError: it exists, or cannot be written.
    """
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        raise OutputError(f"{path} exists already: a private key is never overwritten") from None
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from None
    try:
        write_atomic(path, data, mode=0o600)
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def read_identity(path: Path) -> Identity:
    """An identity's private keys.

    Raises:
        IdentityError: not an identity, open to others, or the passphrase does not fit; the file is named.
    """
    data, mode = _read(path)
    try:
        identity = Identity.from_pem(data, passphrase())
    except BadInput as error:
        raise IdentityError(f"{path}: {error} ({PASSPHRASE} holds the passphrase)") from None
    _refuse_open(path, mode)
    return identity


def new_tls_key() -> EllipticCurvePrivateKey:
    """A key for certificates, and for a site's Flower node: ECDSA on P-256."""
    return generate_private_key(SECP256R1())


def tls_key_pem(key: EllipticCurvePrivateKey, secret: bytes | None) -> bytes:
    """PKCS #8 PEM; encrypted (scrypt, AES-256) if there is a passphrase."""
    if secret is None:
        return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return encrypt_pkcs8(key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()), secret)


def read_tls_key(path: Path) -> EllipticCurvePrivateKey:
    """Read what `tls_key_pem` gave.

    Raises:
        IdentityError: another kind of key, open to others, or the passphrase does not fit; the file is named.
    """
    data, secret = read_private(path), passphrase()
    encrypted = b" ENCRYPTED " in data
    try:
        key = load_pem_private_key(data, secret if encrypted else None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # `from None`: no detail of a secret goes further
        why = "the passphrase is missing or wrong" if encrypted else "it is damaged"
        raise IdentityError(f"{path} cannot be used: {why} ({PASSPHRASE} holds the passphrase)") from None
    if not isinstance(key, EllipticCurvePrivateKey):
        raise IdentityError(f"{path} is not an elliptic-curve key")
    return key


def plain_pem(key: EllipticCurvePrivateKey) -> bytes:
    """Unencrypted PKCS #8 PEM, for a TLS library in this process; it goes to no disk."""
    return tls_key_pem(key, None)


def public_pem(key: EllipticCurvePrivateKey) -> bytes:
    """The public key as Flower and the coordinator's records hold it: SubjectPublicKeyInfo, PEM."""
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
