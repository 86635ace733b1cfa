"""The institutions of a federation: who may connect, who is there, and whose certificate is due.

A site that renews its certificate with a new key goes on under the old one until it first calls with the new one, so
that a lost answer shuts nobody out. From then on the old key is refused.
"""

from __future__ import annotations

import hashlib
import logging
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Protocol

import httpx
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID
from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from accord_server.audit import AuditLog
from accord_server.authority import WORTHWHILE, Authority
from accord_server.database import Database, InvitationRow, Site, SiteKey
from accord_server.settings import CoordinatorSettings
from accord_shared.errors import BadInput, NotAdmitted, ProtocolError, Unreachable
from accord_shared.service.actor import act_as
from accord_shared.service.pb import accord_pb2 as pb
from accord_shared.signatures import HASH

log = logging.getLogger(__name__)

ONLINE_S = 45.0
"""A site that was heard of within three idle pauses is online."""
_STATES = ("ready", "paused", "preparing", "waiting", "refusing")
_KNOWN_BOOTS = 64


class SuperLinkLike(Protocol):
    """What the coordinator commands of its SuperLink. Keys are PEM."""

    def admit(self, public_key: bytes) -> int:
        """Let a key connect; its node."""

    def expel(self, public_key: bytes) -> None:
        """Refuse a key from its next request on."""

    def nodes(self) -> dict[bytes, int]:
        """Node of each key that is admitted."""


@dataclass
class Presence:
    """What was last heard of a site."""

    boot: str = ""
    seen_s: float = 0.0
    """Unix time; 0: never since the coordinator started."""
    heard: float = float("-inf")
    """The same, monotonic: a clock that is set keeps no site away."""
    skew_s: float = 0.0
    """The site's clock minus the coordinator's."""
    state: str = ""
    version: str = ""
    roster: str = ""
    superseded: deque[str] = field(default_factory=lambda: deque(maxlen=_KNOWN_BOOTS))

    def online(self, now: float) -> bool:
        """Whether it was heard of lately."""
        return now - self.seen_s <= ONLINE_S


class Sites:
    """The sites, for any number of threads."""

    def __init__(
        self,
        database: Database,
        audit: AuditLog,
        superlink: SuperLinkLike,
        authority: Authority,
        settings: CoordinatorSettings,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database, self._audit, self._superlink = database, audit, superlink
        self._authority, self._settings, self._clock = authority, settings, clock
        self._lock = threading.Lock()
        self._admitting = threading.RLock()
        """Held while the SuperLink is told of keys: a list of keys that is out of date by then would undo a word."""
        self._presence: dict[str, Presence] = {}
        self._names: dict[str, str] = {}
        """Sites by the digest of the key that they showed last, for while the database is away."""
        self._changed = threading.Condition()
        self.changes = 0
        """Counts what `wait` waits for."""

    def wait(self, seen: int, seconds: float) -> int:
        """Until `changes` is not `seen` any more, at most so long: sites come, pause, or are let in or out."""
        with self._changed:
            self._changed.wait_for(lambda: self.changes != seen, seconds)
            return self.changes

    def _tell(self) -> None:
        with self._changed:
            self.changes += 1
            self._changed.notify_all()

    # --- for the operator

    def list(self) -> tuple[pb.SiteInfo, ...]:
        """All sites, by name."""
        with self._database.session() as session:
            return tuple(self._info(session, site) for site in session.scalars(select(Site).order_by(Site.name)).all())

    def info(self, name: str) -> pb.SiteInfo:
        """One site.

        Raises:
            BadInput: there is none of this name.
        """
        with self._database.session() as session:
            return self._info(session, _site(session, name))

    def approve(self, name: str) -> pb.SiteInfo:
        """Let a pending site take part.

        Raises:
            BadInput: there is no such site, or it is revoked.
            Unreachable: the SuperLink does not answer; it is told by `admit_all`.
        """
        with self._database.session() as session:
            site = _site(session, name)
            if site.state == "revoked":
                raise BadInput(f"site {name!r} is revoked: invite it again")
            if site.state != "approved":
                site.state = "approved"
                self._audit.add(session, "site.approved", name, fingerprint=site.fingerprint)
            key, info = current_key(session, name), self._info(session, site)
        with self._admitting, _superlink(f"{name!r} is approved"):
            self._superlink.admit(key.public_key.encode())
        self._tell()
        return info

    def revoke(self, name: str) -> pb.SiteInfo:
        """Refuse a site from its next call on. Keys that were ever admitted never serve again.

        Raises:
            BadInput: there is no such site.
            Unreachable: the SuperLink does not answer: repeat it.
        """
        with self._database.session() as session:
            site = _site(session, name)
            keys = session.scalars(select(SiteKey).where(SiteKey.site == name)).all()
            if site.state != "revoked":
                self._audit.add(session, "site.revoked", name, fingerprint=site.fingerprint, was=site.state)
            for key in keys:
                if site.state == "pending" or key.state == "next":  # nobody ever trusted it
                    session.delete(key)
                key.state = "gone"
            site.state, site.renew = "revoked", False
            session.execute(delete(InvitationRow).where(InvitationRow.name == name, InvitationRow.used_us.is_(None)))
            session.flush()
            info = self._info(session, site)
        with self._lock:
            self._presence.pop(name, None)
            self._names = {digest: site for digest, site in self._names.items() if site != name}
        self._tell()
        with self._admitting, _superlink(f"{name!r} is revoked"):
            for key in keys:
                self._superlink.expel(key.public_key.encode())
        return info

    def rotate(self, name: str) -> pb.SiteInfo:
        """Ask a site for a new key and certificate, at its next call.

        Raises:
            BadInput: there is no such site, or it is revoked.
        """
        with self._database.session() as session:
            site = _site(session, name)
            if site.state == "revoked":
                raise BadInput(f"site {name!r} is revoked")
            site.renew = True
            self._audit.add(session, "site.rotate", name)
            return self._info(session, site)

    # --- for the sites

    def of_certificate(self, certificate: x509.Certificate) -> Site:
        """The site that shows a certificate, which TLS has checked: this thread acts for it now.

        Its first call with a new key ends the old one.

        Raises:
            NotAdmitted: the site is unknown or revoked, or the key was replaced.
        """
        key, name = certificate.public_key(), _common_name(certificate)
        if not isinstance(key, EllipticCurvePublicKey):
            raise NotAdmitted("the certificate's key is not one of a site")
        with self._database.session() as session:
            found = session.get(SiteKey, key_digest(key))
            site = session.get(Site, name)
            if site is None or found is None or found.site != name:
                raise NotAdmitted("this certificate is of no site that the coordinator knows")
            if site.state == "revoked":
                raise NotAdmitted("this site was revoked")
            if found.state == "gone":
                raise NotAdmitted("this certificate was replaced by a newer one")
            act_as(f"site {name}")
            old = self._promoted(session, site, found) if found.state == "next" else None
        if old is not None:
            self._replace(site, old, found)
        with self._lock:
            self._names = {digest: known for digest, known in self._names.items() if known != name}
            self._names[found.digest] = name
        return site

    def _promoted(self, session: Session, site: Site, new: SiteKey) -> SiteKey | None:
        """The key that a new one replaces; None where another call was faster."""
        session.refresh(site, with_for_update=True)
        session.refresh(new)
        if new.state != "next":
            return None
        old = current_key(session, site.name)
        old.state, new.state, site.renew = "gone", "current", False
        self._audit.add(session, "site.key", site.name, key=new.digest, replaces=old.digest)
        return old

    def _replace(self, site: Site, old: SiteKey, new: SiteKey) -> None:
        with self._admitting, _superlink(f"{site.name!r} has a new key"):
            if site.state == "approved":
                self._superlink.admit(new.public_key.encode())
            self._superlink.expel(old.public_key.encode())
        self._tell()

    def hello(self, site: Site, request: pb.HelloRequest, now: float | None = None) -> pb.HelloReply:
        """Note that a site is there; the answer, which still lacks authorities, roster and models.

        Raises:
            NotAdmitted: a newer agent runs under this identity, or the site was revoked meanwhile.
            ProtocolError: the request is malformed.
        """
        _check(request)
        at = self._clock() if now is None else now
        with self._database.session() as session:
            key = current_key(session, site.name)
        self._note(site.name, request, at)
        return pb.HelloReply(
            clock_us=int(at * 1e6),
            state=site.state,
            certificate_expires_us=key.expires_us,
            renew=site.renew or self._is_due(key, at),
        )

    def hear(self, certificate: x509.Certificate, request: pb.HelloRequest) -> None:
        """Note that a site is there while the database is away: its key was the right one when it was last asked."""
        _check(request)
        key = certificate.public_key()
        with self._lock:
            name = self._names.get(key_digest(key)) if isinstance(key, EllipticCurvePublicKey) else None
        if name is not None:
            self._note(name, request, self._clock())

    def _note(self, name: str, request: pb.HelloRequest, now: float) -> None:
        with self._lock:
            known = self._presence.setdefault(name, Presence())
            before = known.boot, known.state, known.online(now)
            if request.boot in known.superseded:
                raise NotAdmitted("another agent runs under this identity")
            if request.boot != known.boot:
                if known.online(now) and known.boot:
                    log.warning("a new agent takes over", extra={"site": name})
                known.superseded.append(known.boot)  # at first an empty one, which no agent may have
                known.boot = request.boot
            known.seen_s, known.state, known.roster = now, request.state, request.roster
            known.skew_s, known.version = request.clock_us / 1e6 - now, request.version
            known.heard = time.monotonic()
            changed = before != (known.boot, known.state, True)
        if changed:
            self._tell()

    def presence(self, name: str) -> Presence:
        """What was last heard of a site since the coordinator started."""
        with self._lock:
            return self._presence.get(name, Presence())

    def _is_due(self, key: SiteKey, now: float) -> bool:
        """A certificate in its last third (or its last `warn_days`, if that is later), or of an older authority."""
        spec = self._settings.certificates
        end = datetime.fromtimestamp(key.expires_us / 1e6, UTC)
        before = min(timedelta(days=spec.warn_days), timedelta(days=spec.site_days) / 3)
        late = end - datetime.fromtimestamp(now, UTC) < before
        worthwhile = self._authority.latest_end(spec.site_days) - end > WORTHWHILE
        return (late and worthwhile) or not self._authority.is_of_current(key.certificate.encode())

    # --- for the daemon

    def admit_all(self) -> None:
        """Make the SuperLink admit the keys of approved sites and no others; at its every start, and now and then.

        Raises:
            Unreachable: it does not answer.
        """
        with self._admitting, _superlink("keys are compared"):
            with self._database.session() as session:
                wanted = {key.public_key.encode() for key in _approved_keys(session)}
            known = self._superlink.nodes().keys()
            for key in known - wanted:
                self._superlink.expel(key)
            for key in wanted - known:
                self._superlink.admit(key)

    def states(self) -> dict[str, str]:
        """State of every site, by name: pending, approved or revoked."""
        with self._database.session() as session:
            return {row.name: row.state for row in session.execute(select(Site.name, Site.state))}

    def nodes(self) -> dict[str, int]:
        """Flower's node of each approved site, by name.

        Raises:
            Unreachable: the SuperLink does not answer.
        """
        with self._database.session() as session:
            keys = {key.site: key.public_key.encode() for key in _approved_keys(session)}
        with _superlink("nodes are listed"):
            known = self._superlink.nodes()
        return {name: known[key] for name, key in sorted(keys.items()) if key in known}

    def _info(self, session: Session, site: Site) -> pb.SiteInfo:
        now, seen = self._clock(), self.presence(site.name)
        key = find_key(session, site.name)
        return pb.SiteInfo(
            name=site.name,
            state=site.state,
            fingerprint=site.fingerprint,
            member=site.member,
            enrolled_us=site.enrolled_us,
            seen_us=int(seen.seen_s * 1e6),
            certificate_expires_us=key.expires_us if key is not None else 0,
            online=site.state != "revoked" and seen.online(now),
            roster=seen.roster,
            skew_s=seen.skew_s,
            version=seen.version,
            paused=seen.state == "paused",
            says=seen.state,
        )


def key_digest(key: EllipticCurvePublicKey) -> str:
    """SHA-256 of a public key's SubjectPublicKeyInfo, hexadecimal."""
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def current_key(session: Session, name: str) -> SiteKey:
    """The key under which a site is known now.

    Raises:
        NotAdmitted: it was revoked.
    """
    found = find_key(session, name)
    if found is None:
        raise NotAdmitted("this site was revoked")
    return found


def _site(session: Session, name: str) -> Site:
    """A site, locked until the transaction ends."""
    site = session.get(Site, name, with_for_update=True)
    if site is None:
        raise BadInput(f"there is no site {name[:64]!r}")
    return site


def find_key(session: Session, name: str) -> SiteKey | None:
    """The key under which a site is known now, unless it was revoked."""
    return session.scalar(select(SiteKey).where(SiteKey.site == name, SiteKey.state == "current"))


def _approved_keys(session: Session) -> Sequence[SiteKey]:
    approved = select(Site.name).where(Site.state == "approved")
    return session.scalars(select(SiteKey).where(SiteKey.state == "current", SiteKey.site.in_(approved))).all()


def old_certificates(database: Database, authority: Authority) -> tuple[str, ...]:
    """Names of sites whose certificate is of an authority that does not sign any more."""
    with database.session() as session:
        keys = session.scalars(select(SiteKey).where(SiteKey.state == "current").order_by(SiteKey.site)).all()
    return tuple(key.site for key in keys if not authority.is_of_current(key.certificate.encode()))


def _common_name(certificate: x509.Certificate) -> str:
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if len(names) == 1 else ""


def _check(request: pb.HelloRequest) -> None:
    """Refuse what no agent says, before it is kept or shown."""
    if not re.fullmatch(r"[0-9a-f]{16,64}", request.boot):
        raise ProtocolError("boot is not 16 to 64 hexadecimal digits")
    if request.state not in _STATES:
        raise ProtocolError(f"state is not one of {', '.join(_STATES)}")
    if not re.fullmatch(r"[0-9A-Za-z.+-]{1,32}", request.version):
        raise ProtocolError("version is not a version of Accord")
    if request.roster and not re.fullmatch(HASH, request.roster):
        raise ProtocolError("roster is not a hash")
    if not 0 <= request.clock_us < 2**53:
        raise ProtocolError("clock_us is not a time")


@contextmanager
def _superlink(what: str) -> Iterator[None]:
    try:
        yield
    except (httpx.HTTPError, OSError) as error:
        log.warning("the SuperLink does not answer: %s", type(error).__name__)
        raise Unreachable(f"{what}, but the SuperLink does not answer: repeat it") from None
