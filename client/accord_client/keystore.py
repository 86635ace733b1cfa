"""A site's keys, which never leave: identity (roster, sums, receipts), node key (certificate, Flower node)."""

from __future__ import annotations

import contextlib
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from accord_client.settings import SiteFolder
from accord_shared.errors import IdentityError, ImpostorError
from accord_shared.files import write_atomic
from accord_shared.frames import frame
from accord_shared.identity import Identity, Member
from accord_shared.service.keyfile import (
    new_private,
    new_tls_key,
    passphrase,
    plain_pem,
    read_identity,
    read_tls_key,
    tls_key_pem,
)
from accord_shared.service.rpc import KeyPair, private_folder

MOST_AUTHORITIES = 8
WARN_DAYS = 30
_MOST_PEM = 64 * 1024


class Keys:
    """The private keys in a site's folder, and the certificate for one of them. It does not print them.

    A renewal makes a node key of its own. The new key is on the disk before it is asked for; the new certificate is
    written beside the old one before both take their places, and `load` finishes what a crash left half done.
    """

    def __init__(self, folder: SiteFolder, identity: Identity, node: EllipticCurvePrivateKey) -> None:
        self._folder = folder
        self.identity = identity
        self._node = node
        self._lock = threading.RLock()  # key and certificate change together

    def __repr__(self) -> str:
        return "Keys(...)"

    @classmethod
    def create(cls, folder: SiteFolder) -> Self:
        """Make the keys that are not there yet: an enrolment that failed is repeated with the same.

        Raises:
            IdentityError: a key that is there cannot be used.
            OutputError: a key cannot be written.
        """
        private_folder(folder.keys)
        secret = passphrase()
        if not _identity(folder).exists():
            with new_private(_identity(folder), Identity.generate().to_pem(secret)):
                pass
        if not _node(folder).exists():
            with new_private(_node(folder), tls_key_pem(new_tls_key(), secret)):
                pass
        return cls.load(folder)

    @classmethod
    def load(cls, folder: SiteFolder) -> Self:
        """Read the keys.

        Raises:
            IdentityError: one is missing, damaged, open to others, or the passphrase does not fit.
        """
        _finish_renewal(folder)
        return cls(folder, read_identity(_identity(folder)), read_tls_key(_node(folder)))

    @property
    def node(self) -> EllipticCurvePrivateKey:
        """The key of the certificate and of the Flower node."""
        return self._node

    @property
    def certificate(self) -> x509.Certificate:
        """The certificate.

        Raises:
            IdentityError: there is none, or it is of another key.
        """
        return self._certificate()[0]

    @property
    def expires(self) -> datetime:
        """When the certificate does."""
        return self.certificate.not_valid_after_utc

    def _certificate(self) -> tuple[x509.Certificate, bytes]:
        path = self._folder.certificate
        with self._lock:
            try:
                pem = path.read_bytes()
                found = x509.load_pem_x509_certificate(pem)
            except OSError as error:
                raise IdentityError(f"{path} cannot be read: {error.strerror}") from None
            except ValueError:
                raise IdentityError(f"{path} is not a certificate") from None
            if found.public_key() != self._node.public_key():
                raise IdentityError(f"{path} is not of this site's key")
            return found, pem

    def pair(self) -> KeyPair:
        """For TLS.

        Raises:
            IdentityError: there is no certificate, or it is of another key.
        """
        with self._lock:
            return KeyPair(plain_pem(self._node), self._certificate()[1])

    def member(self, name: str) -> Member:
        """The public entry for the roster.

        Raises:
            RosterError: no member may have such a name.
        """
        return self.identity.public(name)

    def csr(self, name: str) -> bytes:
        """A certificate request, DER."""
        return _request(self._node, name)

    def vouch(self, name: str, request: bytes) -> bytes:
        """Both signatures of the member under a certificate request."""
        return self.identity.sign_both(frame("accord/1/enrol", name, request))

    def keep_certificate(self, pem: bytes) -> None:
        """Store the certificate of the present node key; see `check_certificate`."""
        write_atomic(self._folder.certificate, pem, mode=0o600)

    # --- renewal

    def next_request(self, name: str) -> bytes:
        """A certificate request of the next node key, DER. Repeated after a failure it asks for the same key."""
        path = _next_key(self._folder)
        if not path.exists():
            with new_private(path, tls_key_pem(new_tls_key(), passphrase())):
                pass
        return _request(read_tls_key(path), name)

    def adopt_next(self, pem: bytes, authorities: bytes, name: str) -> None:
        """The certificate of the next node key has come: both replace the present ones.

        Raises:
            ImpostorError: it is of another key or name, or not of the authorities.
        """
        node = read_tls_key(_next_key(self._folder))
        check_certificate(pem, authorities, node.public_key(), name)
        with self._lock:
            write_atomic(_next_certificate(self._folder), pem, mode=0o600)
            _finish_renewal(self._folder)
            self._node = node


def _identity(folder: SiteFolder) -> Path:
    return folder.keys / "identity.pem"


def _node(folder: SiteFolder) -> Path:
    return folder.keys / "node.pem"


def _next_key(folder: SiteFolder) -> Path:
    return folder.keys / "node.next.pem"


def _next_certificate(folder: SiteFolder) -> Path:
    return folder.keys / "certificate.next.pem"


def _finish_renewal(folder: SiteFolder) -> None:
    """The certificate beside is the point of no return: from then on key and certificate move, in this order."""
    if not _next_certificate(folder).exists():
        return
    with contextlib.suppress(FileNotFoundError):  # moved before a crash
        _next_key(folder).replace(_node(folder))
    with contextlib.suppress(FileNotFoundError):
        _next_certificate(folder).replace(folder.certificate)


def _request(key: EllipticCurvePrivateKey, name: str) -> bytes:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    return x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, SHA256()).public_bytes(Encoding.DER)


def expiry_warning(expires: datetime) -> str | None:
    """A line, from 30 days before the certificate expires."""
    left = expires - datetime.now(UTC)
    if left > timedelta(days=WARN_DAYS):
        return None
    when = f"{expires:%Y-%m-%d %H:%M} UTC"
    return f"the certificate expires on {when}" if left > timedelta() else f"the certificate expired on {when}"


# --- what a coordinator sends


def read_authorities(pem: bytes) -> list[x509.Certificate]:
    """Certificates of authorities.

    Raises:
        ImpostorError: none, too many, malformed, or one that is no authority's.
    """
    try:
        found = x509.load_pem_x509_certificates(pem) if len(pem) <= _MOST_PEM else []
        constraints = [one.extensions.get_extension_for_class(x509.BasicConstraints).value for one in found]
    except (ValueError, x509.ExtensionNotFound):
        found, constraints = [], []
    if not 0 < len(found) <= MOST_AUTHORITIES or not all(one.ca for one in constraints):
        raise ImpostorError("what the coordinator sent as its authorities are no certificates of authorities")
    return found


def check_certificate(pem: bytes, authorities: bytes, public: object, name: str) -> x509.Certificate:
    """The certificate that a coordinator issued, if it is of this public key and name, and of an authority.

    Raises:
        ImpostorError: it is not.
    """
    try:
        found = x509.load_pem_x509_certificate(pem)
    except ValueError:
        raise ImpostorError("what the coordinator sent as this site's certificate is none") from None
    common = [str(one.value) for one in found.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    if found.public_key() != public or common != [name]:
        raise ImpostorError("the certificate that the coordinator sent is of another key or name")
    if not any(_issued(found, authority) for authority in read_authorities(authorities)):
        raise ImpostorError("the certificate that the coordinator sent is not of its authority")
    return found


def _issued(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True
