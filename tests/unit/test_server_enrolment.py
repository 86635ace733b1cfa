"""Invitations, enrolment, renewal, admission: who gets in, once, and who does not."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from sqlalchemy import select

from accord_server.database import InvitationRow, Site, SiteKey
from accord_server.sites import ONLINE_S, old_certificates
from accord_shared.errors import AccordError, BadInput, EnrolmentRefused, NotAdmitted, ProtocolError, Unreachable
from accord_shared.identity import Identity, PublicKeys
from accord_shared.service.keyfile import new_tls_key
from accord_shared.service.pb import accord_pb2 as pb
from accord_shared.service.token import Invitation
from coordinator_parts import DAY_S, START_S, Bank, Parts, certificate, coordinator, csr, postgresql, url

__all__ = ["postgresql", "url"]


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Parts]:
    with coordinator(tmp_path / "server") as made:
        yield made


@pytest.fixture
def on_either(tmp_path: Path, url: str) -> Iterator[Parts]:
    """The parts over SQLite and over PostgreSQL."""
    with coordinator(tmp_path / "server", url) as made:
        yield made


def refused(parts: Parts, request: pb.EnrolRequest) -> str:
    """The line of a refusal, after which nothing has changed."""
    before = [info.SerializeToString() for info in parts.sites.list()], parts.audit.head()
    with pytest.raises(EnrolmentRefused) as refusal:
        parts.registrar.enrol(request)
    assert ([info.SerializeToString() for info in parts.sites.list()], parts.audit.head()) == before
    assert request.secret not in str(refusal.value) or not request.secret
    return str(refusal.value)


def states(parts: Parts) -> dict[str, str]:
    return {info.name: info.state for info in parts.sites.list()}


# --- invitations


def test_a_token_says_all_that_a_site_needs(parts: Parts) -> None:
    token, expires_us = parts.registrar.invite("Bank 01 (Nordkap)", 3600)
    found = Invitation.decode(token)
    assert (found.name, found.federation, found.address) == ("Bank 01 (Nordkap)", "Nord", "127.0.0.1:9402")
    assert found.expires_us == expires_us == int((START_S + 3600) * 1e6)
    assert found.authority_pem == parts.authority.authorities()


def test_the_secret_is_nowhere_at_the_coordinator(parts: Parts) -> None:
    token, _ = parts.registrar.invite("bank 1", 3600)
    secret = Invitation.decode(token).secret.get_secret_value()
    assert len(secret) == 64
    for path in parts.path.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert secret.encode() not in content
            assert bytes.fromhex(secret) not in content
    assert parts.kinds() == ["site.invited"]


@pytest.mark.parametrize("name", ["../bank", "a/b", ".bank", "", " x", "a\nb", "x" * 65, "c:\\bank"])
def test_names_with_paths_are_not_invited(parts: Parts, name: str) -> None:
    with pytest.raises(BadInput, match="name"):
        parts.registrar.invite(name, 3600)
    assert parts.kinds() == []


@pytest.mark.parametrize("valid_s", [0, -1, 91 * 86400])
def test_no_token_is_for_ever(parts: Parts, valid_s: int) -> None:
    with pytest.raises(BadInput, match="valid"):
        parts.registrar.invite("bank 1", valid_s)


def test_a_new_token_ends_the_one_before(parts: Parts) -> None:
    bank = Bank("bank 1")
    first, _ = parts.registrar.invite("bank 1", 3600)
    second, _ = parts.registrar.invite("bank 1", 3600)
    assert "wrong or was used" in refused(parts, bank.enrolment(first))
    parts.registrar.enrol(bank.enrolment(second))


# --- enrolment


def test_an_enrolment(on_either: Parts) -> None:
    parts, bank = on_either, Bank("bank 1")
    token, _ = parts.registrar.invite("bank 1", 3600)
    reply = parts.registrar.enrol(bank.enrolment(token))
    made = certificate(reply.certificate)
    made.verify_directly_issued_by(parts.authority.certificate())
    assert made.public_key() == bank.key.public_key()
    assert (reply.authorities, reply.federation) == (parts.authority.authorities(), "Nord")
    assert (reply.fleet_address, reply.api_address) == ("127.0.0.1:9400", "127.0.0.1:9401")
    PublicKeys.from_json(reply.coordinator)
    (info,) = parts.sites.list()
    assert (info.name, info.state, info.online) == ("bank 1", "pending", False)
    assert info.fingerprint == bank.identity.public("bank 1").fingerprint
    assert info.certificate_expires_us == int(made.not_valid_after_utc.timestamp() * 1e6)
    assert parts.ring.known == {}
    assert parts.kinds() == ["site.invited", "site.enrolled"]
    assert parts.audit.verify() == 2


def test_a_token_serves_once_and_says_the_same_as_a_wrong_one(parts: Parts) -> None:
    bank = Bank("bank 1")
    token, _ = parts.registrar.invite("bank 1", 3600)
    request = bank.enrolment(token)
    parts.registrar.enrol(request)
    replayed = refused(parts, request)
    stolen = refused(parts, Bank("bank 1").enrolment(token))
    request.secret = "0" * 64
    wrong = refused(parts, request)
    others = {refused(parts, pb.EnrolRequest(name="bank 1", secret=text)) for text in ("", "x", "0" * 63, "Ä" * 64)}
    assert {replayed, stolen, wrong, *others} == {replayed}
    assert "wrong or was used" in replayed


def test_a_token_expires(parts: Parts) -> None:
    token, _ = parts.registrar.invite("bank 1", 3600)
    parts.clock.turn(seconds=3600)
    assert "expired" in refused(parts, Bank("bank 1").enrolment(token))
    parts.clock.turn(seconds=-1)
    parts.registrar.enrol(Bank("bank 1").enrolment(token))


def test_a_token_is_for_one_name(parts: Parts) -> None:
    token, _ = parts.registrar.invite("bank 1", 3600)
    assert "for site 'bank 1'" in refused(parts, Bank("bank 2").enrolment(token))
    bank = Bank("bank 1")
    request = bank.enrolment(token)
    request.member = bank.identity.public("bank 2").to_json()
    assert "must be of 'bank 1'" in refused(parts, request)
    parts.registrar.enrol(bank.enrolment(token))  # what was refused has not used it up


def test_the_certificates_name_is_the_tokens(parts: Parts) -> None:
    bank = Bank("bank 1")
    token, _ = parts.registrar.invite("bank 1", 3600)
    made = certificate(parts.registrar.enrol(bank.enrolment(token, bank.csr("bank 2"))).certificate)
    assert [name.value for name in made.subject] == ["Nord", "bank 1"]


def test_weak_keys_are_refused(parts: Parts) -> None:
    token, _ = parts.registrar.invite("bank 1", 3600)
    weak = csr(ec.generate_private_key(ec.SECP192R1()), "bank 1")
    assert "P-256" in refused(parts, Bank("bank 1").enrolment(token, weak))
    assert "malformed" in refused(parts, Bank("bank 1").enrolment(token, b"junk"))


def test_the_member_must_sign_this_request_under_this_name(parts: Parts) -> None:
    bank, other = Bank("bank 1"), Bank("bank 1")
    token, _ = parts.registrar.invite("bank 1", 3600)
    good = bank.enrolment(token)
    for signature in (
        b"",
        good.member_signature[:-1],
        bytes([good.member_signature[0] ^ 1]) + good.member_signature[1:],
        good.member_signature[:-1] + bytes([good.member_signature[-1] ^ 1]),
        bank.signature(other.csr()),
        bank.signature(good.certificate_request, "bank 2"),
        other.signature(good.certificate_request),
        bank.identity.sign(b"x") + good.member_signature[64:],
    ):
        request = pb.EnrolRequest()
        request.CopyFrom(good)
        request.member_signature = signature
        assert "signature" in refused(parts, request)
    parts.registrar.enrol(good)


@pytest.mark.parametrize("member", ["", "{}", "[]", '{"name":"bank 1"}', "x" * 100_000, '{"name":"../x"}'])
def test_members_that_are_none(parts: Parts, member: str) -> None:
    token, _ = parts.registrar.invite("bank 1", 3600)
    request = Bank("bank 1").enrolment(token)
    request.member = member
    assert "member's entry" in refused(parts, request)


def test_keys_of_another_site_are_refused(parts: Parts) -> None:
    first, _ = parts.enrolled("bank 1")
    token, _ = parts.registrar.invite("bank 2", 3600)
    for twin in (Bank("bank 2", key=first.key), Bank("bank 2", identity=first.identity)):
        assert "belong to another site" in refused(parts, twin.enrolment(token))
    half = Identity.from_seeds(b"1" * 32, b"2" * 32), Identity.from_seeds(b"1" * 32, b"3" * 32)
    third, _ = parts.registrar.invite("bank 3", 3600)
    parts.registrar.enrol(Bank("bank 3", identity=half[0]).enrolment(third))
    assert "belong to another site" in refused(parts, Bank("bank 2", identity=half[1]).enrolment(token))


def test_one_token_at_many_hands_serves_one(on_either: Parts) -> None:
    parts = on_either
    token, _ = parts.registrar.invite("bank 1", 3600)
    requests = [Bank("bank 1").enrolment(token) for _ in range(8)]

    def attempt(request: pb.EnrolRequest) -> str:
        try:
            parts.registrar.enrol(request)
        except AccordError as error:
            return f"{type(error).__name__}: {error}"
        return "in"

    with ThreadPoolExecutor(8) as pool:
        answers = sorted(pool.map(attempt, requests))
    assert answers.count("in") == 1
    assert {answer.split(":")[0] for answer in answers} == {"in", "EnrolmentRefused"}
    with parts.database.session() as session:
        assert len(session.scalars(select(SiteKey)).all()) == 1
        assert len(session.scalars(select(InvitationRow)).all()) == 1
    assert parts.kinds().count("site.enrolled") == 1


def test_one_key_under_two_names_at_once_serves_one(on_either: Parts) -> None:
    parts, key = on_either, new_tls_key()
    banks = [Bank(f"bank {number}", key=key) for number in range(4)]
    requests = [bank.enrolment(parts.registrar.invite(bank.name, 3600)[0]) for bank in banks]

    def attempt(request: pb.EnrolRequest) -> bool:
        with suppress(EnrolmentRefused):
            parts.registrar.enrol(request)
            return True
        return False

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(attempt, requests)) == 1
    assert len(parts.sites.list()) == 1


# --- enrolling again


def test_a_site_that_takes_part_is_not_invited_again(parts: Parts) -> None:
    parts.enrolled("bank 1")
    parts.sites.approve("bank 1")
    with pytest.raises(BadInput, match="enrolled already"):
        parts.registrar.invite("bank 1", 3600)


def test_who_lost_the_answer_enrols_with_the_same_keys(parts: Parts) -> None:
    bank, _ = parts.enrolled("bank 1")
    token, _ = parts.registrar.invite("bank 1", 3600)
    made = certificate(parts.registrar.enrol(bank.enrolment(token)).certificate)
    assert parts.sites.of_certificate(made).state == "pending"


def test_who_waits_for_approval_may_come_with_new_keys(parts: Parts) -> None:
    _, old = parts.enrolled("bank 1")
    _, new = parts.enrolled("bank 1")
    assert parts.sites.of_certificate(new).state == "pending"
    with pytest.raises(NotAdmitted):
        parts.sites.of_certificate(old)


def test_a_certificate_that_ran_out_is_replaced_for_the_approved_keys(parts: Parts) -> None:
    bank, _ = parts.enrolled("bank 1")
    parts.sites.approve("bank 1")
    parts.clock.turn(days=91)
    token, _ = parts.registrar.invite("bank 1", 3600)
    for other in (Bank("bank 1"), Bank("bank 1", key=bank.key), Bank("bank 1", identity=bank.identity)):
        assert "approved with other keys" in refused(parts, other.enrolment(token))
    made = certificate(parts.registrar.enrol(bank.enrolment(token)).certificate)
    assert parts.sites.of_certificate(made).state == "approved"
    assert parts.ring.known == {bank.public: 100}


# --- approval and revocation


def test_approval_admits_the_key(on_either: Parts) -> None:
    parts = on_either
    bank, shown = parts.enrolled("bank 1")
    assert parts.sites.of_certificate(shown).state == "pending"
    assert parts.sites.approve("bank 1").state == "approved"
    assert parts.sites.approve("bank 1").state == "approved"
    assert parts.ring.known == {bank.public: 100}
    assert parts.sites.nodes() == {"bank 1": 100}
    assert parts.sites.of_certificate(shown).state == "approved"
    assert parts.kinds().count("site.approved") == 1


def test_a_revoked_site_is_out_at_once_and_its_keys_for_ever(on_either: Parts) -> None:
    parts = on_either
    bank, shown = parts.enrolled("bank 1")
    parts.sites.approve("bank 1")
    parts.sites.hello(parts.sites.of_certificate(shown), hello())
    assert parts.sites.info("bank 1").online
    info = parts.sites.revoke("bank 1")
    assert (info.state, info.online) == ("revoked", False)
    assert parts.ring.known == {}
    assert parts.sites.nodes() == {}
    with pytest.raises(NotAdmitted, match="revoked"):
        parts.sites.of_certificate(shown)
    with pytest.raises(BadInput, match="revoked"):
        parts.sites.approve("bank 1")
    with pytest.raises(BadInput, match="revoked"):
        parts.sites.rotate("bank 1")
    token, _ = parts.registrar.invite("bank 1", 3600)
    assert "were revoked" in refused(parts, bank.enrolment(token))
    other, _ = parts.registrar.invite("bank 2", 3600)
    assert "were revoked" in refused(parts, Bank("bank 2", key=bank.key).enrolment(other))
    new = Bank("bank 1", identity=bank.identity)
    parts.sites.of_certificate(certificate(parts.registrar.enrol(new.enrolment(token)).certificate))
    with pytest.raises(NotAdmitted):
        parts.sites.of_certificate(shown)
    assert parts.sites.approve("bank 1").state == "approved"
    assert list(parts.ring.known) == [new.public]


def test_a_call_that_overtakes_a_revocation_is_refused(parts: Parts) -> None:
    bank, shown = parts.enrolled("bank 1")
    site = parts.sites.of_certificate(shown)
    parts.sites.revoke("bank 1")
    with pytest.raises(NotAdmitted, match="revoked"):
        parts.sites.hello(site, hello())
    with pytest.raises(NotAdmitted, match="revoked"):
        parts.registrar.renew(site, bank.renewal())


def test_revoking_ends_open_tokens(parts: Parts) -> None:
    parts.enrolled("bank 1")
    token, _ = parts.registrar.invite("bank 1", 3600)
    parts.sites.revoke("bank 1")
    assert "wrong or was used" in refused(parts, Bank("bank 1").enrolment(token))


def test_a_superlink_that_is_away_is_told_later(parts: Parts) -> None:
    first, shown = parts.enrolled("bank 1")
    second, _ = parts.enrolled("bank 2")
    parts.sites.approve("bank 1")
    parts.ring.gone = True
    with pytest.raises(Unreachable, match="repeat it"):
        parts.sites.revoke("bank 1")
    with pytest.raises(Unreachable, match="repeat it"):
        parts.sites.approve("bank 2")
    assert states(parts) == {"bank 1": "revoked", "bank 2": "approved"}
    with pytest.raises(NotAdmitted):
        parts.sites.of_certificate(shown)
    parts.ring.gone = False
    assert list(parts.ring.known) == [first.public]
    parts.sites.revoke("bank 1")
    assert parts.ring.known == {}
    parts.ring.known[b"a stranger's"] = 7
    parts.sites.admit_all()
    assert list(parts.ring.known) == [second.public]
    assert parts.kinds().count("site.revoked") == 1


def test_unknown_names_are_refused(parts: Parts) -> None:
    for act in (parts.sites.approve, parts.sites.revoke, parts.sites.rotate, parts.sites.info):
        with pytest.raises(BadInput, match="no site"):
            act("../bank")


def test_certificates_of_nobody(parts: Parts) -> None:
    bank, shown = parts.enrolled("bank 1")
    parts.enrolled("bank 2")
    stranger = certificate(parts.authority.issue_site(Bank("bank 1").csr(), "bank 1", 90))
    renamed = certificate(parts.authority.issue_site(bank.csr(), "bank 2", 90))
    server = certificate(parts.authority.server_pair().chain)
    for one in (stranger, renamed, server):
        with pytest.raises(NotAdmitted, match="no site"):
            parts.sites.of_certificate(one)
    parts.sites.of_certificate(shown)


# --- renewal


def test_a_new_key_counts_from_its_first_call(on_either: Parts) -> None:
    parts = on_either
    bank, old = parts.enrolled("bank 1")
    parts.sites.approve("bank 1")
    site = parts.sites.of_certificate(old)
    new = Bank("bank 1", identity=bank.identity)
    parts.registrar.renew(site, new.renewal())  # the answer is lost
    newest = Bank("bank 1", identity=bank.identity)
    reply = parts.registrar.renew(parts.sites.of_certificate(old), newest.renewal())
    assert list(parts.ring.known) == [bank.public]
    shown = certificate(reply.certificate)
    parts.sites.of_certificate(shown)
    assert list(parts.ring.known) == [newest.public]
    assert parts.sites.nodes() == {"bank 1": parts.ring.known[newest.public]}
    with pytest.raises(NotAdmitted, match="replaced"):
        parts.sites.of_certificate(old)
    parts.sites.of_certificate(shown)
    with pytest.raises(EnrolmentRefused, match="make new ones"):  # a replaced key does not come back
        parts.registrar.renew(parts.sites.of_certificate(shown), bank.renewal())
    assert parts.kinds()[-1] == "site.key"


def test_the_first_call_under_a_new_key_may_be_many_at_once(on_either: Parts) -> None:
    parts = on_either
    bank, old = parts.enrolled("bank 1")
    parts.sites.approve("bank 1")
    new = Bank("bank 1", identity=bank.identity)
    shown = certificate(parts.registrar.renew(parts.sites.of_certificate(old), new.renewal()).certificate)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(parts.sites.of_certificate, [shown] * 8))
    assert {site.name for site in found} == {"bank 1"}
    assert parts.kinds().count("site.key") == 1
    assert list(parts.ring.known) == [new.public]


def test_the_same_key_gets_a_later_certificate(parts: Parts) -> None:
    bank, old = parts.enrolled("bank 1")
    parts.sites.rotate("bank 1")
    parts.clock.turn(days=70)
    made = certificate(parts.registrar.renew(parts.sites.of_certificate(old), bank.renewal()).certificate)
    assert (made.not_valid_after_utc - old.not_valid_after_utc).days == 70
    assert parts.sites.info("bank 1").certificate_expires_us == int(made.not_valid_after_utc.timestamp() * 1e6)
    assert not parts.sites.hello(parts.sites.of_certificate(made), hello()).renew


def test_renewals_that_are_refused(parts: Parts) -> None:
    bank, shown = parts.enrolled("bank 1")
    other, _ = parts.enrolled("bank 2")
    site = parts.sites.of_certificate(shown)
    taken, unsigned, renamed = Bank("bank 1", other.key, bank.identity).renewal(), bank.renewal(), bank.renewal()
    unsigned.member_signature = other.signature(unsigned.certificate_request, "bank 1")
    renamed.name = "bank 2"
    for request, said in ((taken, "belong to another site"), (unsigned, "signature"), (renamed, "of site 'bank 1'")):
        with pytest.raises(EnrolmentRefused, match=said):
            parts.registrar.renew(site, request)


# --- presence


def hello(boot: str = "a" * 32, at: float = START_S, **changes: str) -> pb.HelloRequest:
    fields = {"boot": boot, "version": "0.1.0", "state": "ready", "roster": ""} | changes
    return pb.HelloRequest(protocol=1, clock_us=int(at * 1e6), **fields)


def test_presence_and_skew(parts: Parts) -> None:
    _, shown = parts.enrolled("bank 1")
    site = parts.sites.of_certificate(shown)
    reply = parts.sites.hello(site, hello(at=START_S + 600, state="paused", roster="f" * 64))
    assert (reply.state, reply.clock_us, reply.renew) == ("pending", int(START_S * 1e6), False)
    info = parts.sites.info("bank 1")
    assert (info.online, info.paused, info.skew_s, info.roster) == (True, True, 600.0, "f" * 64)
    assert (info.seen_us, info.version) == (int(START_S * 1e6), "0.1.0")
    parts.clock.turn(seconds=ONLINE_S + 1)
    assert not parts.sites.info("bank 1").online


def test_of_two_agents_the_newer_one_stays(parts: Parts) -> None:
    site = parts.sites.of_certificate(parts.enrolled("bank 1")[1])
    for boot in ("a" * 32, "b" * 32, "b" * 32):
        parts.sites.hello(site, hello(boot))
    for _ in range(2):
        with pytest.raises(NotAdmitted, match="another agent runs under this identity"):
            parts.sites.hello(site, hello("a" * 32))
    parts.sites.hello(site, hello("b" * 32))
    assert parts.sites.presence("bank 1").boot == "b" * 32


@pytest.mark.parametrize(
    "changes",
    [
        {"boot": ""},
        {"boot": "x" * 32},
        {"boot": "a" * 65},
        {"state": "revoked"},
        {"state": ""},
        {"version": "1\n2"},
        {"version": "1" * 33},
        {"roster": "f" * 63},
    ],
)
def test_a_malformed_hello_leaves_no_trace(parts: Parts, changes: dict[str, str]) -> None:
    site = parts.sites.of_certificate(parts.enrolled("bank 1")[1])
    with pytest.raises(ProtocolError):
        parts.sites.hello(site, hello(**changes))
    assert not parts.sites.info("bank 1").online


def test_a_site_is_asked_to_renew_in_time(parts: Parts) -> None:
    bank, shown = parts.enrolled("bank 1")
    site = parts.sites.of_certificate(shown)

    def asked() -> bool:
        return parts.sites.hello(parts.sites.of_certificate(shown), hello(at=parts.clock.now)).renew

    assert not asked()
    parts.sites.rotate("bank 1")
    assert asked()
    new = Bank("bank 1", identity=bank.identity)
    shown = certificate(parts.registrar.renew(site, new.renewal()).certificate)
    assert not asked()
    parts.clock.turn(seconds=59.9 * DAY_S)
    assert not asked()
    parts.clock.turn(seconds=0.2 * DAY_S)
    assert asked()


def test_a_site_is_not_asked_for_ever_near_the_authoritys_end(parts: Parts) -> None:
    parts.clock.turn(days=3640)
    _, shown = parts.enrolled("bank 1")
    site = parts.sites.of_certificate(shown)
    assert not parts.sites.hello(site, hello(at=parts.clock.now)).renew
    assert shown.not_valid_after_utc == parts.authority.certificate().not_valid_after_utc


def test_a_rotated_authority_reaches_sites_without_enrolment(parts: Parts) -> None:
    bank, old = parts.enrolled("bank 1")
    parts.sites.approve("bank 1")
    parts.authority.rotate()
    site = parts.sites.of_certificate(old)
    assert parts.sites.hello(site, hello()).renew
    assert old_certificates(parts.database, parts.authority) == ("bank 1",)
    new = Bank("bank 1", identity=bank.identity)
    reply = parts.registrar.renew(site, new.renewal())
    made = certificate(reply.certificate)
    made.verify_directly_issued_by(parts.authority.certificate())
    assert reply.authorities == parts.authority.authorities()
    assert not parts.sites.hello(parts.sites.of_certificate(made), hello()).renew
    assert old_certificates(parts.database, parts.authority) == ()
    assert states(parts) == {"bank 1": "approved"}
    token, _ = parts.registrar.invite("bank 2", 3600)
    der = base64.b64decode(Invitation.decode(token).authority)
    assert der == base64.b64decode(parts.authority.certificate_text())


def test_the_audit_log_tells_the_whole_story(parts: Parts) -> None:
    parts.enrolled("bank 1")
    parts.sites.approve("bank 1")
    parts.sites.rotate("bank 1")
    parts.sites.revoke("bank 1")
    assert parts.kinds() == ["site.invited", "site.enrolled", "site.approved", "site.rotate", "site.revoked"]
    assert parts.audit.verify() == 5
    with parts.database.session() as session:
        assert session.get_one(Site, "bank 1").state == "revoked"
