"""The coordinator's certificate authority: certificates of sites and of the server, renewed and rotated in place.

A rotation makes a new authority and lets the old one certify it once: the server shows that link in its chain, so that
sites that know only the old authority go on trusting the server, until `retire` drops the old one. There is no list of
revoked certificates: a revoked site's key is refused by name at every call (`sites.py`), and by Flower's SuperLink.
"""

from __future__ import annotations

import base64
import ipaddress
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePrivateKey, EllipticCurvePublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from accord_server.settings import CoordinatorFolder, CoordinatorSettings
from accord_shared.errors import BadInput, EnrolmentRefused, IdentityError
from accord_shared.files import write_atomic
from accord_shared.service.keyfile import (
    new_private,
    new_tls_key,
    passphrase,
    plain_pem,
    read_private,
    read_tls_key,
    tls_key_pem,
)
from accord_shared.service.rpc import KeyPair, private_folder
from accord_shared.service.token import entity_name

log = logging.getLogger(__name__)

BACKDATED = timedelta(days=1)
"""Certificates begin in the past: a site whose clock is behind is told so by the API, not by a failed handshake."""
WORTHWHILE = timedelta(hours=1)
"""A certificate is renewed for at least so much: near its authority's end there is no later one."""
MOST_REQUEST = 8192
"""Bytes of a certificate request."""
_UNITS = ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement")
_SIGNS = ("key_cert_sign", "crl_sign", "encipher_only", "decipher_only")


@dataclass(frozen=True)
class _Issuer:
    """The authority that signs now."""

    key: EllipticCurvePrivateKey
    certificate: x509.Certificate
    links: tuple[x509.Certificate, ...]
    """While a rotation is open: this authority, certified by the one before it."""


class Authority:
    """The authority of a coordinator's folder. It follows changes that another process makes to the files.

    Raises from every method `IdentityError` where a key cannot be read.
    """

    def __init__(self, folder: Path, settings: CoordinatorSettings, clock: Callable[[], float] = time.time) -> None:
        self._folder, self._settings, self._clock = CoordinatorFolder(folder), settings, clock
        self._lock = threading.RLock()
        self._issuer_cache: tuple[object, _Issuer] | None = None
        self._pair_cache: tuple[object, KeyPair] | None = None
        self._chain_seen: object = None

    @classmethod
    def create(cls, folder: Path, settings: CoordinatorSettings, clock: Callable[[], float] = time.time) -> Authority:
        """Make the authority, the server's key and its certificate.

        Raises:
            OutputError: there are keys already, or the folder cannot be written.
        """
        made = cls(folder, settings, clock)
        paths = made._folder
        private_folder(paths.keys)
        private_folder(paths.certificates)
        key = new_tls_key()
        certificate = made._self_signed(key)
        with (
            new_private(paths.authority_key, _bundle(key, (certificate,))),
            new_private(paths.server_key, tls_key_pem(new_tls_key(), passphrase())),
        ):
            made._publish((certificate,))
            made.renew_server_if_due()
        return made

    @classmethod
    def load(cls, folder: Path, settings: CoordinatorSettings, clock: Callable[[], float] = time.time) -> Authority:
        """Read the authority, and finish a rotation that a crash cut short.

        Raises:
            IdentityError: a key is missing, damaged, open to others, or its passphrase does not fit.
        """
        found = cls(folder, settings, clock)
        issuer = found._issuer()
        if found._folder.authority.read_bytes() != _pem(issuer.certificate):
            found._publish((issuer.certificate, *found._trusted()))
        if not found.expired:
            found.renew_server_if_due()
        return found

    # --- certificates

    def issue_site(self, request: bytes, name: str, days: int) -> bytes:
        """A certificate (PEM) of a site, for TLS clients, from its request (PKCS #10, DER).

        Only the key is taken from the request; the name is the coordinator's.

        Raises:
            EnrolmentRefused: it is malformed, its signature does not verify, or its key is not on P-256.
        """
        key = requested_key(request)
        entity_name(name)
        usage = _Usage(self._name(name), key, days, ExtendedKeyUsageOID.CLIENT_AUTH)
        return _pem(self._issued(usage))

    def issue_server(self, key: EllipticCurvePublicKey, names: Iterable[str], days: int) -> bytes:
        """A certificate chain (PEM) of a server for these host names and addresses."""
        alternatives = x509.SubjectAlternativeName([_general_name(name) for name in names])
        usage = _Usage(self._name("Accord coordinator"), key, days, ExtendedKeyUsageOID.SERVER_AUTH, alternatives)
        return _pem(self._issued(usage), *self._issuer().links)

    def _issued(self, usage: _Usage) -> x509.Certificate:
        issuer, now = self._issuer(), self._now()
        if self.expired:
            raise IdentityError("the authority's certificate has ended: `accord server authority rotate` makes another")
        builder = (
            _builder(usage.subject, usage.key, now - BACKDATED, self.latest_end(usage.days))
            .issuer_name(issuer.certificate.subject)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage("digital_signature"), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage.purpose]), critical=False)
            .add_extension(_authority_id(issuer.key), critical=False)
        )
        if usage.names is not None:
            builder = builder.add_extension(usage.names, critical=False)
        return builder.sign(issuer.key, SHA256())

    def latest_end(self, days: int) -> datetime:
        """When a certificate of so many days would end that is made now: none outlives its authority."""
        return min(self._now() + timedelta(days=days), self.certificate().not_valid_after_utc)

    # --- the server

    def server_pair(self) -> KeyPair:
        """The server's key (not encrypted) and chain."""
        with self._lock:
            paths = self._folder
            stamp = _stamp(paths.server_key, paths.server_certificate)
            if self._pair_cache is None or self._pair_cache[0] != stamp:
                key = read_tls_key(paths.server_key)
                self._pair_cache = stamp, KeyPair(plain_pem(key), _read(paths.server_certificate))
            return self._pair_cache[1]

    def server_expiry(self) -> datetime:
        """When the server's certificate ends."""
        return expiry(_read(self._folder.server_certificate))

    def renew_server_if_due(self) -> bool:
        """Renew the server's certificate where it is missing, in its last third, of another authority or other names.

        The key stays. True: there is a new one since the last call, also where another process made it; gRPC follows by
        itself, the SuperLink wants SIGHUP.
        """
        with self._lock:
            if self._server_is_due():
                self.renew_server()
            before, self._chain_seen = self._chain_seen, _stamp(self._folder.server_certificate)
            return before not in (None, self._chain_seen)

    def renew_server(self) -> None:
        """A new certificate of the server."""
        key = read_tls_key(self._folder.server_key).public_key()
        chain = self.issue_server(key, self._settings.names, self._settings.certificates.server_days)
        write_atomic(self._folder.server_certificate, chain)
        log.info("the server's certificate is new", extra={"expires": expiry(chain).isoformat()})

    def _server_is_due(self) -> bool:
        if not self._folder.server_certificate.exists():
            return True
        chain, issuer = x509.load_pem_x509_certificates(_read(self._folder.server_certificate)), self._issuer()
        end, days = chain[0].not_valid_after_utc, self._settings.certificates.server_days
        late = end - self._now() < timedelta(days=days) / 3 and self.latest_end(days) - end > WORTHWHILE
        names = chain[0].extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return (
            late
            or chain[0].issuer != issuer.certificate.subject
            or tuple(chain[1:]) != issuer.links
            or list(names) != [_general_name(name) for name in self._settings.names]
        )

    # --- the authorities

    def authorities(self) -> bytes:
        """PEM of every authority to trust."""
        return _read(self._folder.authorities)

    def certificate(self) -> x509.Certificate:
        """Of the authority that signs now."""
        return self._issuer().certificate

    def certificate_text(self) -> str:
        """The same, DER in base64, as tokens carry it."""
        return base64.b64encode(self.certificate().public_bytes(Encoding.DER)).decode()

    def is_of_current(self, certificate: bytes) -> bool:
        """Whether the authority that signs now issued a certificate (PEM)."""
        return x509.load_pem_x509_certificate(certificate).issuer == self.certificate().subject

    @property
    def expired(self) -> bool:
        """Whether the authority that signs now has come to its end, and all of its certificates."""
        return self.certificate().not_valid_after_utc <= self._now()

    @property
    def rotating(self) -> bool:
        """Whether an older authority is trusted beside the one that signs now."""
        return len(self._trusted()) > 1

    def rotate(self) -> x509.Certificate:
        """Make a new authority that signs from now on. The old one stays trusted until `retire`.

        Raises:
            BadInput: a rotation is open already.
        """
        with self._lock:
            if self.rotating:
                raise BadInput("an older authority is still trusted: retire it first")
            old, key = self._issuer(), new_tls_key()
            new = self._self_signed(key)
            links, older = ((), ()) if self.expired else ((_linked(new, old),), (old.certificate,))
            self._publish((new, *older), signs=old.certificate)
            write_atomic(self._folder.authority_key, _bundle(key, (new, *links)), mode=0o600)  # from here on it signs
            self._publish((new, *older))
            self.renew_server()
            return new

    def retire(self) -> x509.Certificate:
        """Trust the newest authority alone; the one that is left. Certificates of others are refused from then on.

        Raises:
            BadInput: there is no other.
        """
        with self._lock:
            if not self.rotating:
                raise BadInput("no older authority is trusted: there is nothing to retire")
            issuer = self._issuer()
            write_atomic(self._folder.authority_key, _bundle(issuer.key, (issuer.certificate,)), mode=0o600)
            self._publish((issuer.certificate,))
            self.renew_server()
            return issuer.certificate

    def _issuer(self) -> _Issuer:
        with self._lock:
            path = self._folder.authority_key
            stamp = _stamp(path)
            if self._issuer_cache is None or self._issuer_cache[0] != stamp:
                self._issuer_cache = stamp, _read_issuer(path)
            return self._issuer_cache[1]

    def _trusted(self) -> tuple[x509.Certificate, ...]:
        return tuple(x509.load_pem_x509_certificates(self.authorities()))

    def _publish(self, trusted: tuple[x509.Certificate, ...], signs: x509.Certificate | None = None) -> None:
        """Write the public files: who is trusted, and who signs."""
        write_atomic(self._folder.authorities, _pem(*dict.fromkeys(trusted)))
        write_atomic(self._folder.authority, _pem(signs or trusted[0]))

    def _self_signed(self, key: EllipticCurvePrivateKey) -> x509.Certificate:
        now = self._now()
        subject = self._name(f"Accord authority {secrets.token_hex(4)}")
        end = now + timedelta(days=self._settings.certificates.authority_days)
        return (
            _builder(subject, key.public_key(), now - BACKDATED, end)
            .issuer_name(subject)
            .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
            .add_extension(_key_usage("key_cert_sign"), critical=True)
            .add_extension(_authority_id(key), critical=False)
            .sign(key, SHA256())
        )

    def _name(self, common: str) -> x509.Name:
        federation = x509.NameAttribute(NameOID.ORGANIZATION_NAME, self._settings.federation)
        return x509.Name([federation, x509.NameAttribute(NameOID.COMMON_NAME, common)])

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock(), UTC)


@dataclass(frozen=True)
class _Usage:
    """What a certificate is for."""

    subject: x509.Name
    key: EllipticCurvePublicKey
    days: int
    purpose: x509.ObjectIdentifier
    names: x509.SubjectAlternativeName | None = None


# --- parts


def requested_key(request: bytes) -> EllipticCurvePublicKey:
    """The key of a certificate request (PKCS #10, DER), whose holder signed it.

    Raises:
        EnrolmentRefused: it is malformed, its signature does not verify, or its key is not on P-256.
    """
    if len(request) > MOST_REQUEST:
        raise EnrolmentRefused(f"the certificate request is longer than {MOST_REQUEST} bytes")
    try:
        parsed = x509.load_der_x509_csr(request)
        key, signed = parsed.public_key(), parsed.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature):
        raise EnrolmentRefused("the certificate request is malformed") from None
    if not isinstance(key, EllipticCurvePublicKey) or not isinstance(key.curve, SECP256R1):
        raise EnrolmentRefused("the key of the certificate request is not an elliptic-curve key on P-256")
    if not signed:
        raise EnrolmentRefused("the certificate request is not signed by its own key")
    return key


def expiry(certificate: bytes) -> datetime:
    """When the first certificate of a PEM ends."""
    return x509.load_pem_x509_certificate(certificate).not_valid_after_utc


def public_key_pem(key: EllipticCurvePublicKey) -> str:
    """A public key as Flower and the database hold it: SubjectPublicKeyInfo, PEM."""
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def _read_issuer(path: Path) -> _Issuer:
    key = read_tls_key(path)
    try:
        certificate, *links = x509.load_pem_x509_certificates(read_private(path))
    except ValueError:
        raise IdentityError(f"{path} has no certificate of the authority") from None
    if certificate.public_key() != key.public_key():
        raise IdentityError(f"{path}: the certificate is not the key's")
    return _Issuer(key, certificate, tuple(links))


def _bundle(key: EllipticCurvePrivateKey, certificates: tuple[x509.Certificate, ...]) -> bytes:
    """Key and certificates in one file, so that a rotation is one rename."""
    return tls_key_pem(key, passphrase()) + _pem(*certificates)


def _linked(new: x509.Certificate, old: _Issuer) -> x509.Certificate:
    """A new authority, certified by the old one until that one ends."""
    key = new.public_key()
    if not isinstance(key, EllipticCurvePublicKey):
        raise IdentityError("an authority's key is not an elliptic-curve key")
    end = min(new.not_valid_after_utc, old.certificate.not_valid_after_utc)
    return (
        _builder(new.subject, key, new.not_valid_before_utc, end)
        .issuer_name(old.certificate.subject)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage("key_cert_sign"), critical=True)
        .add_extension(_authority_id(old.key), critical=False)
        .sign(old.key, SHA256())
    )


def _builder(
    subject: x509.Name, key: EllipticCurvePublicKey, start: datetime, end: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _authority_id(key: EllipticCurvePrivateKey) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())


def _key_usage(*allowed: str) -> x509.KeyUsage:
    return x509.KeyUsage(**{name: name in allowed for name in (*_UNITS, *_SIGNS)})


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(*certificates: x509.Certificate) -> bytes:
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise IdentityError(f"{path} cannot be read: {error.strerror}") from None


def _stamp(*paths: Path) -> object:
    """Changes when a file is replaced."""
    try:
        return tuple((found.st_ino, found.st_mtime_ns, found.st_size) for found in (path.stat() for path in paths))
    except OSError as error:
        raise IdentityError(f"{error.filename} cannot be read: {error.strerror}") from None
