"""Enrolment: from a one-time token to a site's folder with keys, certificate, and what it trusts."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from cryptography.x509 import load_der_x509_csr
from pydantic import AfterValidator, Field

from accord_client.keystore import Keys, check_certificate, read_authorities
from accord_client.policy import POLICY_TEMPLATE
from accord_client.settings import CoordinatorSpec, SiteFolder, SiteSettings, settings_template
from accord_shared.errors import EnrolmentRefused, ImpostorError, RosterError, SettingsError, UntrustedPeer
from accord_shared.files import write_atomic
from accord_shared.identity import Document, PublicKeys
from accord_shared.service import rpc
from accord_shared.service.egress import Proxy
from accord_shared.service.pb import accord_pb2 as pb
from accord_shared.service.pb import accord_pb2_grpc
from accord_shared.service.token import Invitation, entity_name

ENROL_S = 30.0
Name = Annotated[str, AfterValidator(entity_name)]
Address = Annotated[str, Field(pattern=r"^([^\s:/\[\]]+|\[[0-9a-fA-F:]+\]):[0-9]{1,5}$", max_length=300)]
"""host:port."""


class Enrolment(Document):
    """`enrolment.json`: whose site this is. It is written last: a folder without it is not enrolled."""

    version: Literal[1] = 1
    name: Name
    federation: Name
    coordinator: PublicKeys
    """The keys that sign plans and finished models."""
    fleet_address: Address
    api_address: Address
    enrolled: str
    """Time, RFC 3339."""

    @classmethod
    def read(cls, folder: SiteFolder) -> Self:
        """Read a folder's enrolment.

        Raises:
            SettingsError: the site is not enrolled, or the file is damaged.
        """
        try:
            return cls.from_json(folder.enrolment.read_bytes())
        except FileNotFoundError:
            raise SettingsError(f"{folder.path} is not enrolled: `accord site enrol TOKEN` does that") from None
        except OSError as error:
            raise SettingsError(f"{folder.enrolment} cannot be read: {error.strerror}") from None
        except RosterError as error:
            raise SettingsError(f"{folder.enrolment} is damaged: {error}") from None


def enrol(
    token: str,
    path: Path,
    name: str | None = None,
    *,
    again: bool = False,
    new_key: bool = False,
    way: CoordinatorSpec | None = None,
) -> Enrolment:
    """Enrol the site in a folder: keys are made there and stay, the certificate comes.

    `name` is what the operator expects the token to say. An enrolment that failed is repeated with the same keys. With
    `again` a site whose certificate is lost or ran out gets one from the coordinator that it knows: for the keys that
    it has or, where they were revoked, for a `new_key` of its node. Its identity and ledger stay. `way` is the proxy
    that a new `site.toml` gets; one that is there counts.

    Raises:
        EnrolmentRefused: the token is wrong, used, expired or for another site; or the folder is enrolled already.
        ImpostorError: the coordinator is not the token's, or what it sent does not fit.
        Unreachable: nobody answers.
        IdentityError, OutputError: keys or folder cannot be used.
        SettingsError: `site.toml` is there and names another proxy.
    """
    invitation = Invitation.decode(token)
    if name is not None and name != invitation.name:
        raise EnrolmentRefused(f"the token is for site {invitation.name!r}, not for {name!r}")
    folder = SiteFolder(path)
    known = _known(folder, invitation, again)
    proxy = _way(folder, way).way_out(path)
    folder.make()
    keys = Keys.create(folder)
    _write_missing(folder.settings, settings_template(invitation.name, way))
    _write_missing(folder.policy, POLICY_TEMPLATE)
    request = keys.next_request(invitation.name) if new_key else keys.csr(invitation.name)
    reply = _ask(invitation, keys, request, proxy)
    enrolment = _checked(invitation, reply, request)
    if known is not None and known.coordinator != enrolment.coordinator:
        raise ImpostorError("the coordinator has other keys than at this site's first enrolment")
    write_atomic(folder.authorities, reply.authorities, mode=0o600)
    if new_key:
        keys.adopt_next(reply.certificate, reply.authorities, invitation.name)
    else:
        keys.keep_certificate(reply.certificate)
    write_atomic(folder.enrolment, enrolment.to_json(indent=1).encode(), mode=0o600)
    return enrolment


def _known(folder: SiteFolder, invitation: Invitation, again: bool) -> Enrolment | None:
    """The enrolment that is there, if another is asked for."""
    if not folder.enrolment.exists():
        return None
    known = Enrolment.read(folder)
    if not again:
        raise EnrolmentRefused(f"{folder.path} is enrolled already, as {known.name!r} of {known.federation!r}")
    if (known.name, known.federation) != (invitation.name, invitation.federation):
        raise EnrolmentRefused(
            f"the token is for {invitation.name!r} of {invitation.federation!r}, "
            f"the folder is of {known.name!r} of {known.federation!r}"
        )
    return known


def _way(folder: SiteFolder, given: CoordinatorSpec | None) -> CoordinatorSpec:
    """The one way to the coordinator: that of `site.toml`, where there is one already."""
    if not folder.settings.exists():
        return given or CoordinatorSpec()
    there = SiteSettings.read(folder).coordinator
    if given is not None and given != there:
        raise SettingsError(f"{folder.settings} is there already, with another [coordinator]: set proxy in it")
    return there


def _write_missing(path: Path, text: str) -> None:
    if not path.exists():
        write_atomic(path, text.encode(), mode=0o600)


def _ask(invitation: Invitation, keys: Keys, request: bytes, proxy: Proxy | None) -> pb.EnrolReply:
    """The one call that shows the secret: to nobody but a holder of a certificate of the token's authority."""
    name = invitation.name
    message = pb.EnrolRequest(
        name=name,
        secret=invitation.secret.get_secret_value(),
        certificate_request=request,
        member=keys.member(name).to_json(),
        member_signature=keys.vouch(name, request),
        clock_us=int(time.time() * 1e6),
    )
    who = f"the coordinator at {invitation.address}"
    try:
        with (
            rpc.secure_channel(invitation.address, invitation.authority_pem, proxy=proxy) as channel,
            rpc.typed_errors(who, proxy),
        ):
            stub: Any = accord_pb2_grpc.EnrolmentStub(channel)
            reply: pb.EnrolReply = stub.Enrol(message, timeout=ENROL_S)
            return reply
    except UntrustedPeer:
        raise ImpostorError(f"{who} has no certificate of the authority that the token names") from None


def _checked(invitation: Invitation, reply: pb.EnrolReply, request: bytes) -> Enrolment:
    """What came, if it is what was asked for.

    Raises:
        ImpostorError: it is not.
    """
    mine = read_authorities(invitation.authority_pem)
    if not set(mine) <= set(read_authorities(reply.authorities)):
        raise ImpostorError("the authorities that the coordinator sent lack the one that the token names")
    check_certificate(reply.certificate, reply.authorities, load_der_x509_csr(request).public_key(), invitation.name)
    if reply.federation != invitation.federation:
        raise ImpostorError(f"the coordinator is of federation {reply.federation[:64]!r}, not of the token's")
    try:
        return Enrolment(
            name=invitation.name,
            federation=invitation.federation,
            coordinator=PublicKeys.from_json(reply.coordinator),
            fleet_address=reply.fleet_address,
            api_address=reply.api_address,
            enrolled=datetime.now(UTC).isoformat(timespec="seconds"),
        )
    except (RosterError, ValueError):
        raise ImpostorError("what the coordinator sent of its keys and addresses is malformed") from None
