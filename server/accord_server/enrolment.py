"""Enrolment: from a one-time token to a certificate, and from a certificate to the next."""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pydantic import SecretStr
from sqlalchemy import delete, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from accord_server.audit import AuditLog
from accord_server.authority import Authority, expiry, public_key_pem, requested_key
from accord_server.database import Database, InvitationRow, Site, SiteKey
from accord_server.settings import CoordinatorSettings
from accord_server.sites import current_key, find_key, key_digest
from accord_shared.errors import AccordError, BadInput, EnrolmentRefused, ProtocolError, RosterError
from accord_shared.frames import frame
from accord_shared.identity import Member, PublicKeys, verify_both
from accord_shared.service.pb import accord_pb2 as pb
from accord_shared.service.token import Invitation, entity_name

log = logging.getLogger(__name__)

LABEL = "accord/1/enrol"
MOST_VALID_S = 90 * 86400
MOST_MEMBER = 16 * 1024
"""Bytes of a member's JSON."""
_WRONG = "the token is wrong or was used already: ask the coordinator's operator for another"
_TAKEN = "the member's keys or the certificate's key belong to another site, or were revoked: make new ones"


class Registrar:
    """Invites and enrols sites, for any number of threads and processes."""

    def __init__(
        self,
        database: Database,
        authority: Authority,
        audit: AuditLog,
        settings: CoordinatorSettings,
        coordinator: PublicKeys,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._database, self._authority, self._audit = database, authority, audit
        self._settings, self._coordinator, self._clock = settings, coordinator, clock

    def invite(self, name: str, valid_s: int) -> tuple[str, int]:
        """A new token for a site of this name, and when it ends, in microseconds; an earlier unused one ends now.

        Raises:
            BadInput: the name cannot be a site's, it takes part already, or the time is out of range.
        """
        try:
            entity_name(name)
        except ValueError as error:
            raise BadInput(str(error)) from None
        if not 0 < valid_s <= MOST_VALID_S:
            raise BadInput(f"a token is valid for 1 second to {MOST_VALID_S // 86400} days")
        secret, expires_us = secrets.token_hex(32), self._now_us() + valid_s * 1_000_000
        with self._database.session() as session:
            self._refuse_enrolled(session, name)
            session.execute(delete(InvitationRow).where(InvitationRow.name == name, InvitationRow.used_us.is_(None)))
            session.add(InvitationRow(digest=_digest(secret), name=name, expires_us=expires_us))
            self._audit.add(session, "site.invited", name, expires_us=expires_us)
        return self._token(name, secret, expires_us), expires_us

    def _refuse_enrolled(self, session: Session, name: str) -> None:
        """A site that takes part renews its certificate by itself, as long as that holds."""
        site, key = session.get(Site, name), find_key(session, name)
        if site is not None and site.state == "approved" and key is not None and key.expires_us > self._now_us():
            raise BadInput(f"site {name!r} has enrolled already: revoke it before it is invited again")

    def _token(self, name: str, secret: str, expires_us: int) -> str:
        return Invitation(
            address=self._settings.enrolment_address,
            name=name,
            secret=SecretStr(secret),
            authority=self._authority.certificate_text(),
            federation=self._settings.federation,
            expires_us=expires_us,
        ).encode()

    def enrol(self, request: pb.EnrolRequest) -> pb.EnrolReply:
        """Use up a token: the site is known from now on, and pending. Nothing is used up where it is refused.

        An approved site that has lost its certificate, or let it run out, gets another for the keys that it has.

        Raises:
            EnrolmentRefused: the token is wrong, used, expired or another site's; the request is malformed, not signed
                by the member, or brings keys of another site.
        """
        try:
            with _new_keys(), self._database.session() as session:
                certificate = self._enrolled(session, request)
        except EnrolmentRefused as error:
            log.warning("an enrolment was refused: %s", error)
            raise
        log.info("a site enrolled", extra={"site": request.name})
        return pb.EnrolReply(
            certificate=certificate,
            authorities=self._authority.authorities(),
            coordinator=self._coordinator.to_json(),
            fleet_address=self._settings.fleet_address,
            api_address=self._settings.api_address,
            federation=self._settings.federation,
        )

    def _enrolled(self, session: Session, request: pb.EnrolRequest) -> bytes:
        name = self._use(session, request)
        member = _member(name, request)
        with _refused_as_enrolment():
            verify_both(member, frame(LABEL, name, request.certificate_request), request.member_signature)
        site = session.get(Site, name, with_for_update=True)
        if site is not None and site.state == "approved":
            return self._certified_again(session, site, member, request.certificate_request)
        return self._certified(session, site, member, request.certificate_request)

    def _certified(self, session: Session, site: Site | None, member: Member, request: bytes) -> bytes:
        """A site that is new, was revoked, or still waits for its approval."""
        _refuse_known_member(session, member)
        if site is None:
            site = Site(name=member.name)
            session.add(site)
        elif site.state == "pending":
            session.execute(delete(SiteKey).where(SiteKey.site == site.name, SiteKey.state != "gone"))
        site.state, site.fingerprint, site.member = "pending", member.fingerprint, member.to_json()
        site.enrolled_us, site.renew = self._now_us(), False
        session.flush()  # its key refers to it
        key, certificate = self._new_key(session, site.name, request)
        key.state = "current"
        self._audit.add(session, "site.enrolled", site.name, fingerprint=member.fingerprint, key=key.digest)
        return certificate

    def _certified_again(self, session: Session, site: Site, member: Member, request: bytes) -> bytes:
        """A site whose certificate ran out or got lost; its keys are those that the operator approved."""
        key = current_key(session, site.name)
        if (site.fingerprint, key.digest) != (member.fingerprint, key_digest(requested_key(request))):
            raise EnrolmentRefused(f"site {site.name!r} was approved with other keys: it must be revoked first")
        return self._certify_present(session, site, key, request)

    def _use(self, session: Session, request: pb.EnrolRequest) -> str:
        """The name that a token is for. The token is used up with the transaction; of two, one waits, and finds it so.

        The secret is looked up by its hash, whose comparison tells nothing of it.
        """
        if not re.fullmatch(r"[0-9a-f]{64}", request.secret):
            raise EnrolmentRefused(_WRONG)
        now, digest = self._now_us(), _digest(request.secret)
        unused = (InvitationRow.digest == digest) & InvitationRow.used_us.is_(None)
        used = session.execute(update(InvitationRow).where(unused).values(used_us=now).returning(InvitationRow))
        row = used.scalar_one_or_none()
        if row is None:
            raise EnrolmentRefused(_WRONG)
        if row.expires_us <= now:
            raise EnrolmentRefused("the token has expired: ask the coordinator's operator for another")
        if row.name != request.name:
            raise EnrolmentRefused(f"the token is for site {row.name!r}")
        return row.name

    def _new_key(self, session: Session, name: str, request: bytes) -> tuple[SiteKey, bytes]:
        """A key that no site ever had (the table sees to it), as the site's next one, and its certificate."""
        certificate = self._authority.issue_site(request, name, self._settings.certificates.site_days)
        public = requested_key(request)
        key = SiteKey(digest=key_digest(public), site=name, state="next", public_key=public_key_pem(public))
        _certify(key, certificate)
        session.add(key)
        session.flush()
        return key, certificate

    def renew(self, site: Site, request: pb.RenewRequest) -> pb.RenewReply:
        """A new certificate for a site that calls with its present one.

        With a new key it counts from the site's first call under it; until then the present one goes on.

        Raises:
            EnrolmentRefused: the request is malformed, not signed by the member, or brings a key that was used before.
            NotAdmitted: the site was revoked meanwhile.
        """
        if request.name != site.name:
            raise EnrolmentRefused(f"this certificate is of site {site.name!r}")
        member = Member.from_json(site.member)
        with _refused_as_enrolment():
            verify_both(member, frame(LABEL, site.name, request.certificate_request), request.member_signature)
        with _new_keys(), self._database.session() as session:
            certificate = self._renewed(session, site.name, request.certificate_request)
        return pb.RenewReply(certificate=certificate, authorities=self._authority.authorities())

    def _renewed(self, session: Session, name: str, request: bytes) -> bytes:
        site = session.get_one(Site, name, with_for_update=True)
        present = current_key(session, name)
        if key_digest(requested_key(request)) == present.digest:
            return self._certify_present(session, site, present, request)
        session.execute(delete(SiteKey).where(SiteKey.site == name, SiteKey.state == "next"))
        key, certificate = self._new_key(session, name, request)
        self._audit.add(session, "site.certificate", name, key=key.digest, expires_us=key.expires_us)
        return certificate

    def _certify_present(self, session: Session, site: Site, key: SiteKey, request: bytes) -> bytes:
        certificate = self._authority.issue_site(request, site.name, self._settings.certificates.site_days)
        _certify(key, certificate)
        site.renew = False
        self._audit.add(session, "site.certificate", site.name, key=key.digest, expires_us=key.expires_us)
        return certificate

    def _now_us(self) -> int:
        return int(self._clock() * 1e6)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _certify(key: SiteKey, certificate: bytes) -> None:
    key.certificate, key.expires_us = certificate.decode(), int(expiry(certificate).timestamp() * 1e6)


def _member(name: str, request: pb.EnrolRequest) -> Member:
    if len(request.member) > MOST_MEMBER:
        raise EnrolmentRefused("the member's entry is too long")
    try:
        member = Member.from_json(request.member)
    except RosterError as error:
        raise EnrolmentRefused(f"the member's entry is malformed: {error}") from None
    if member.name != name:
        raise EnrolmentRefused(f"the member's entry must be of {name!r}, as the token")
    return member


def _refuse_known_member(session: Session, member: Member) -> None:
    """One key under two names would be one site that counts twice."""
    for other in session.scalars(select(Site.member).where(Site.name != member.name)):
        known = Member.from_json(other)
        if known.ed25519 == member.ed25519 or known.ml_dsa_65 == member.ml_dsa_65:
            raise EnrolmentRefused(_TAKEN)


@contextmanager
def _refused_as_enrolment() -> Iterator[None]:
    try:
        yield
    except ProtocolError as error:
        raise EnrolmentRefused(str(error)) from None


@contextmanager
def _new_keys() -> Iterator[None]:
    """No key comes twice: rows stay, and the database refuses a second one, also of two at one time."""
    try:
        yield
    except AccordError as error:
        if isinstance(error.__cause__, IntegrityError):
            raise EnrolmentRefused(_TAKEN) from None
        raise
