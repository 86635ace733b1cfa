"""Enrolment and the calls after it, against real TLS servers: what an impostor or a liar sends is refused."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography import x509
from pydantic import SecretStr
from safetensors.numpy import save

from accord_client import coordinator as client_code
from accord_client.coordinator import CoordinatorClient, check_skew, new_boot
from accord_client.enrolment import Enrolment, enrol
from accord_client.keystore import Keys
from accord_client.policy import Policy
from accord_client.rosters import RosterBook
from accord_client.settings import SiteFolder, SiteSettings
from accord_client.store import SiteStore
from accord_shared import PROTOCOL_VERSION
from accord_shared.errors import (
    AccordError,
    ClockSkew,
    EnrolmentRefused,
    ImpostorError,
    NonFinite,
    NotAdmitted,
    OutputError,
    ProtocolError,
    RosterError,
    SettingsError,
    Unreachable,
    UntrustedPeer,
)
from accord_shared.frames import frame
from accord_shared.identity import Identity, Member, verify_both
from accord_shared.roster import Roster, sign_roster
from accord_shared.service import keyfile
from accord_shared.service.keyfile import new_tls_key
from accord_shared.service.pb import accord_pb2 as pb
from conftest import plan_of
from coordinator_lab import FEDERATION, SITE, Authority, Coordinator

KEY = Identity.from_seeds(b"\x07" * 32, b"\x08" * 32)
PLAN = plan_of()
WEIGHTS = np.arange(6, dtype=np.float32)
TENSORS = save({"weights": WEIGHTS})


@pytest.fixture(autouse=True)
def _no_passphrase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(keyfile.PASSPHRASE, raising=False)


@pytest.fixture
def coordinator() -> Iterator[Coordinator]:
    lab = Coordinator().start()
    yield lab
    lab.stop()


@pytest.fixture
def folder(tmp_path: Path) -> SiteFolder:
    return SiteFolder(tmp_path / "site")


@pytest.fixture
def client(coordinator: Coordinator, folder: SiteFolder) -> Iterator[CoordinatorClient]:
    """A site that enrolled."""
    enrol(coordinator.token(), folder.path)
    with CoordinatorClient(folder, Keys.load(folder)) as made:
        yield made


def refused_line(kind: type[AccordError], call: Callable[[], object]) -> str:
    with pytest.raises(kind) as refused:
        call()
    line = str(refused.value)
    assert "\n" not in line
    assert "5e5e" not in line
    return line


# --- enrolment


def test_a_site_enrols(coordinator: Coordinator, folder: SiteFolder) -> None:
    made = enrol(coordinator.token(), folder.path, SITE)
    assert made == Enrolment.read(folder)
    assert (made.name, made.federation, made.coordinator) == (SITE, FEDERATION, coordinator.identity.keys)
    assert (made.api_address, made.fleet_address) == (coordinator.api_address, coordinator.fleet_address)
    keys = Keys.load(folder)
    assert keys.pair().chain == folder.certificate.read_bytes()
    assert folder.authorities.read_bytes() == coordinator.authority.pem
    assert SiteSettings.read(SiteFolder.opened(folder.path)).name == SITE
    assert Policy.read(folder.policy).models == ()
    for path in (folder.path, *folder.path.rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path


def test_what_is_sent_is_vouched_for_and_no_private_key(coordinator: Coordinator, folder: SiteFolder) -> None:
    enrol(coordinator.token(), folder.path)
    (asked,) = coordinator.asked
    member = Member.from_json(asked.member)
    verify_both(member, frame("accord/1/enrol", SITE, asked.certificate_request), asked.member_signature)
    assert member == Keys.load(folder).member(SITE)
    assert asked.secret == "5e" * 32
    assert abs(asked.clock_us / 1e6 - time.time()) < 60
    sent = asked.SerializeToString()
    scalar = Keys.load(folder).node.private_numbers().private_value.to_bytes(32, "big")
    assert scalar not in sent
    assert b"PRIVATE" not in sent


@pytest.mark.parametrize("token", ["", "accord1.", "accord2.abc", "accord1.!!!", "accord1.AAAA", "x" * 100_000])
def test_a_token_that_is_none_makes_no_folder(token: str, folder: SiteFolder) -> None:
    refused_line(EnrolmentRefused, lambda: enrol(token, folder.path))
    assert not folder.path.exists()


def test_a_token_for_another_name_is_not_used(coordinator: Coordinator, folder: SiteFolder) -> None:
    line = refused_line(EnrolmentRefused, lambda: enrol(coordinator.token(), folder.path, "Bank 02"))
    assert "Bank 02" in line
    assert not coordinator.asked
    assert not folder.path.exists()


def test_an_impostor_never_sees_the_secret(coordinator: Coordinator, folder: SiteFolder) -> None:
    """It has the address and a certificate with the same names, of an authority of the same name."""
    impostor = Coordinator(authority=Authority()).start()
    try:
        token = coordinator.token(address=impostor.enrolment_address)
        line = refused_line(ImpostorError, lambda: enrol(token, folder.path))
        assert "has no certificate of the authority" in line
        assert not impostor.asked
        assert not folder.enrolment.exists()
    finally:
        impostor.stop()
    enrol(coordinator.token(), folder.path)


def test_a_coordinator_under_another_name_is_an_impostor(coordinator: Coordinator, folder: SiteFolder) -> None:
    """Its certificate is of the right authority, for 127.0.0.1 alone."""
    address = coordinator.enrolment_address.replace("127.0.0.1", "localhost")
    with pytest.raises((ImpostorError, Unreachable)):
        enrol(coordinator.token(address=address), folder.path)
    assert not coordinator.asked
    assert not folder.enrolment.exists()


def test_a_site_s_certificate_makes_no_coordinator(coordinator: Coordinator, folder: SiteFolder) -> None:
    key = new_tls_key()
    pem = coordinator.authority.of_key(key.public_key(), "127.0.0.1")
    coordinator.pair = type(coordinator.pair)(keyfile.plain_pem(key), pem)
    refused_line(ImpostorError, lambda: enrol(coordinator.token(), folder.path))
    assert not coordinator.asked


def test_a_failed_enrolment_is_repeated_with_the_same_keys(coordinator: Coordinator, folder: SiteFolder) -> None:
    coordinator.refuse["Enrol"] = EnrolmentRefused("the token expired")
    assert refused_line(EnrolmentRefused, lambda: enrol(coordinator.token(), folder.path)) == "the token expired"
    assert not folder.enrolment.exists()
    coordinator.refuse.clear()
    enrol(coordinator.token(), folder.path)
    first, second = coordinator.asked
    assert first.member == second.member
    keys = [x509.load_der_x509_csr(asked.certificate_request).public_key() for asked in (first, second)]
    assert keys[0] == keys[1]


def test_nobody_answers(coordinator: Coordinator, folder: SiteFolder) -> None:
    coordinator.stop()
    line = refused_line(Unreachable, lambda: enrol(coordinator.token(), folder.path))
    assert line.endswith("cannot be reached: the connection is refused")


def test_an_operator_s_files_are_not_overwritten(coordinator: Coordinator, folder: SiteFolder) -> None:
    coordinator.refuse["Enrol"] = EnrolmentRefused("no")
    refused_line(EnrolmentRefused, lambda: enrol(coordinator.token(), folder.path))
    folder.policy.write_text("# mine\n")
    coordinator.refuse.clear()
    enrol(coordinator.token(), folder.path)
    assert folder.policy.read_text() == "# mine\n"


def test_an_enrolled_folder_is_not_enrolled_again(coordinator: Coordinator, folder: SiteFolder) -> None:
    enrol(coordinator.token(), folder.path)
    before = Keys.load(folder).pair()
    assert SITE in refused_line(EnrolmentRefused, lambda: enrol(coordinator.token(), folder.path))
    assert len(coordinator.asked) == 1
    enrol(coordinator.token(), folder.path, again=True)  # an expired certificate, a new invitation
    assert Keys.load(folder).pair().key == before.key
    for other in ({"name": "Bank 02"}, {"federation": "Sued"}):
        refused_line(EnrolmentRefused, lambda other=other: enrol(coordinator.token(**other), folder.path, again=True))


def test_a_revoked_site_comes_back_with_a_new_node_key(coordinator: Coordinator, folder: SiteFolder) -> None:
    enrol(coordinator.token(), folder.path)
    before = Keys.load(folder)
    coordinator.refuse["Enrol"] = EnrolmentRefused("the keys were revoked: make new ones")
    refused_line(EnrolmentRefused, lambda: enrol(coordinator.token(), folder.path, again=True, new_key=True))
    assert Keys.load(folder).pair() == before.pair()
    coordinator.refuse.clear()
    enrol(coordinator.token(), folder.path, again=True, new_key=True)
    after = Keys.load(folder)
    assert after.node.public_key() != before.node.public_key()
    assert after.identity.keys == before.identity.keys
    assert after.pair().chain == folder.certificate.read_bytes()


def test_enrolled_again_it_is_the_same_coordinator(coordinator: Coordinator, folder: SiteFolder) -> None:
    enrol(coordinator.token(), folder.path)
    coordinator.identity = Identity.generate()
    line = refused_line(ImpostorError, lambda: enrol(coordinator.token(), folder.path, again=True))
    assert "other keys" in line
    assert Enrolment.read(folder).coordinator != coordinator.identity.keys


def test_a_folder_open_to_others_is_refused(coordinator: Coordinator, folder: SiteFolder) -> None:
    folder.path.mkdir(mode=0o755)
    folder.path.chmod(0o755)
    refused_line(OutputError, lambda: enrol(coordinator.token(), folder.path))
    assert not coordinator.asked


OTHER = Authority()
LIES: dict[str, dict[str, Any]] = {
    "no certificate": {"certificate": b""},
    "garbage": {"certificate": b"garbage"},
    "certificate of another key": {"certificate": None},
    "certificate of another authority": {"authorities": OTHER.pem},
    "no authorities": {"authorities": b""},
    "garbled authorities": {"authorities": b"garbage"},
    "other federation": {"federation": "Sued"},
    "no coordinator keys": {"coordinator": ""},
    "half coordinator keys": {"coordinator": '{"ed25519": "00"}'},
    "address without port": {"api_address": "127.0.0.1"},
    "address with a path": {"fleet_address": "127.0.0.1:80/x y"},
}


@pytest.mark.parametrize("lie", LIES)
def test_a_reply_that_does_not_fit_leaves_no_enrolment(lie: str, coordinator: Coordinator, folder: SiteFolder) -> None:
    changes = dict(LIES[lie])
    if changes.get("certificate", "") is None:
        changes["certificate"] = coordinator.authority.of_key(new_tls_key().public_key(), SITE)

    def bend(reply: Any) -> Any:
        for key, value in changes.items():
            setattr(reply, key, value)
        return reply

    coordinator.bend["Enrol"] = bend
    refused_line(ImpostorError, lambda: enrol(coordinator.token(), folder.path))
    assert not folder.enrolment.exists()
    assert not folder.certificate.exists()
    with pytest.raises(SettingsError, match="not enrolled"):
        Enrolment.read(folder)


def test_another_authority_than_the_token_s_does_not_take_over(coordinator: Coordinator, folder: SiteFolder) -> None:
    def bend(reply: Any) -> Any:
        key = x509.load_der_x509_csr(coordinator.asked[-1].certificate_request).public_key()
        reply.certificate, reply.authorities = OTHER.of_key(key, SITE), OTHER.pem
        return reply

    coordinator.bend["Enrol"] = bend
    assert "lack the one that the token names" in refused_line(
        ImpostorError, lambda: enrol(coordinator.token(), folder.path)
    )
    assert not folder.enrolment.exists()


@pytest.mark.parametrize("damage", ["cut", "empty", "unknown key", "bad name"])
def test_a_damaged_enrolment_is_said(damage: str, client: CoordinatorClient, folder: SiteFolder) -> None:
    text = folder.enrolment.read_text()
    folder.enrolment.write_text(
        {
            "cut": text[:-5],
            "empty": "",
            "unknown key": json.dumps(json.loads(text) | {"more": 1}),
            "bad name": json.dumps(json.loads(text) | {"name": "../up"}),
        }[damage]
    )
    with pytest.raises(SettingsError, match=r"enrolment\.json is damaged"):
        Enrolment.read(folder)


# --- presence


def test_hello(client: CoordinatorClient, coordinator: Coordinator) -> None:
    boot = new_boot()
    greeting = client.hello(boot, "paused", "f" * 64)
    assert greeting.reply.state == "approved"
    assert abs(greeting.skew_s) < 5
    asked = coordinator.asked[-1]
    assert (asked.boot, asked.state, asked.roster, asked.protocol) == (boot, "paused", "f" * 64, PROTOCOL_VERSION)
    assert new_boot() != boot


@pytest.mark.parametrize(("off", "words"), [(-600.0, "600 s ahead of"), (600.0, "600 s behind")])
def test_a_clock_that_is_off_is_named(
    off: float, words: str, client: CoordinatorClient, coordinator: Coordinator
) -> None:
    coordinator.clock = lambda: time.time() + off
    skew = client.hello(new_boot(), "ready", "").skew_s
    assert abs(skew + off) < 5
    with pytest.raises(ClockSkew, match=words):
        check_skew(skew, 60.0)
    coordinator.clock = time.time
    check_skew(client.hello(new_boot(), "ready", "").skew_s, 60.0)  # it recovers by itself


@pytest.mark.parametrize("error", [NotAdmitted("this site was revoked"), NotAdmitted("another agent runs")])
def test_refusals_come_typed(error: AccordError, client: CoordinatorClient, coordinator: Coordinator) -> None:
    coordinator.refuse["Hello"] = error
    assert refused_line(NotAdmitted, lambda: client.hello(new_boot(), "ready", "")) == str(error)


def test_a_coordinator_that_went_away_and_came_back(client: CoordinatorClient, coordinator: Coordinator) -> None:
    address = coordinator.api_address
    coordinator.stop()
    assert address in refused_line(Unreachable, lambda: client.hello(new_boot(), "ready", ""))


def test_an_expired_certificate_is_said(
    client: CoordinatorClient, coordinator: Coordinator, folder: SiteFolder
) -> None:
    keys = Keys.load(folder)
    keys.keep_certificate(coordinator.authority.of_key(keys.node.public_key(), SITE, days=-2))
    client.close()
    line = refused_line(NotAdmitted, lambda: client.hello(new_boot(), "ready", ""))
    assert "certificate expired on" in line
    assert "--again" in line


def test_another_server_at_the_address_is_not_spoken_to(client: CoordinatorClient, coordinator: Coordinator) -> None:
    coordinator.pair = OTHER.server()
    client.close()
    line = refused_line(UntrustedPeer, lambda: client.hello(new_boot(), "ready", ""))
    assert "its certificate is of an authority that is not trusted here" in line
    assert not [asked for asked in coordinator.asked if isinstance(asked, pb.HelloRequest)]


def test_authorities_are_rotated(client: CoordinatorClient, coordinator: Coordinator, folder: SiteFolder) -> None:
    new = Authority("next")
    coordinator.trusted = coordinator.authority.pem + new.pem
    client.hello(new_boot(), "ready", "")
    assert folder.authorities.read_bytes() == coordinator.trusted
    coordinator.pair = new.server()
    client.close()
    client.hello(new_boot(), "ready", "")
    coordinator.authority, coordinator.trusted = new, coordinator.trusted
    client.renew()
    coordinator.trusted = new.pem
    client.close()
    client.hello(new_boot(), "ready", "")
    assert folder.authorities.read_bytes() == new.pem


@pytest.mark.parametrize("authorities", [OTHER.pem, b"garbage"])
def test_strange_authorities_are_not_kept(
    authorities: bytes, client: CoordinatorClient, coordinator: Coordinator, folder: SiteFolder
) -> None:
    before = folder.authorities.read_bytes()

    def bend(reply: Any) -> Any:
        reply.authorities = authorities
        return reply

    coordinator.bend["Hello"] = bend
    refused_line(ImpostorError, lambda: client.hello(new_boot(), "ready", ""))
    assert folder.authorities.read_bytes() == before


# --- renewal


def test_a_certificate_is_renewed_and_used(
    client: CoordinatorClient, coordinator: Coordinator, folder: SiteFolder
) -> None:
    before = Keys.load(folder)
    client.renew()
    asked = coordinator.asked[-1]
    verify_both(before.member(SITE), frame("accord/1/enrol", SITE, asked.certificate_request), asked.member_signature)
    after = Keys.load(folder)
    assert after.node.public_key() != before.node.public_key()
    client.hello(new_boot(), "ready", "")
    assert coordinator.peers[-1].public_key() == after.node.public_key()


def test_a_renewal_whose_answer_is_lost_asks_for_the_same_key(
    client: CoordinatorClient, coordinator: Coordinator, folder: SiteFolder
) -> None:
    before = Keys.load(folder).pair()
    coordinator.refuse["Renew"] = Unreachable("cut")
    refused_line(Unreachable, client.renew)
    assert Keys.load(folder).pair() == before
    coordinator.refuse.clear()
    client.renew()
    asked = [one for one in coordinator.asked if isinstance(one, pb.RenewRequest)]
    first, second = (x509.load_der_x509_csr(one.certificate_request).public_key() for one in asked)
    assert first == second == Keys.load(folder).node.public_key()


def test_a_renewal_takes_no_certificate_of_another_key(
    client: CoordinatorClient, coordinator: Coordinator, folder: SiteFolder
) -> None:
    before = Keys.load(folder).pair()

    def bend(reply: Any) -> Any:
        reply.certificate = coordinator.authority.of_key(new_tls_key().public_key(), SITE)
        return reply

    coordinator.bend["Renew"] = bend
    refused_line(ImpostorError, client.renew)
    assert Keys.load(folder).pair() == before


# --- rosters


def test_a_roster_is_compared_endorsed_and_adopted(
    client: CoordinatorClient, coordinator: Coordinator, folder: SiteFolder
) -> None:
    assert client.roster().signed is None
    keys = Keys.load(folder)
    others = [Identity.generate().public(name) for name in ("Bank 02", "Bank 03")]
    fields = {"federation": FEDERATION, "serial": 0, "minimum": 2, "colluders": 0}
    signed = sign_roster(Roster.made({**fields, "members": (keys.member(SITE), *others)}), KEY)
    coordinator.roster = signed.to_json()
    book = RosterBook(folder, keys.identity, SITE, FEDERATION)
    offered = client.roster()
    assert offered.signed == signed
    answer = client.endorse(book.endorse(signed.roster.hash, signed))
    assert [one.name for one in answer.endorsements] == [SITE]
    assert book.accept(signed.roster.hash, signed, answer.endorsements).adopted


@pytest.mark.parametrize("text", ["{}", "garbage"])
def test_a_malformed_roster_is_refused(text: str, client: CoordinatorClient, coordinator: Coordinator) -> None:
    coordinator.roster = text
    refused_line(RosterError, client.roster)


# --- models


@pytest.fixture
def joined(client: CoordinatorClient, folder: SiteFolder) -> CoordinatorClient:
    """A site that joined the plan."""
    SiteStore(folder.path).keep_plan(PLAN.hash, PLAN.to_json())
    return client


def test_a_model_is_fetched_once_and_verified(
    joined: CoordinatorClient, coordinator: Coordinator, folder: SiteFolder
) -> None:
    made = coordinator.finish("run-1", PLAN, TENSORS)
    (info,) = joined.models()
    assert (info.run, info.plan_hash, info.digest) == ("run-1", PLAN.hash, made.digest)
    fetched = joined.fetch_model("run-1")
    assert (fetched.document, fetched.plan) == (made, PLAN)
    assert fetched.tensors.read_bytes() == TENSORS
    np.testing.assert_array_equal(fetched.weights(6), WEIGHTS)
    coordinator.models.clear()
    assert joined.fetch_model("run-1") == fetched
    fetched.tensors.write_bytes(TENSORS[:-1] + b"\x01")
    assert "not those that were signed" in refused_line(ImpostorError, lambda: joined.fetch_model("run-1"))


def test_a_long_model_comes_in_chunks(joined: CoordinatorClient, coordinator: Coordinator) -> None:
    data = save({"weights": np.ones(700_000, dtype=np.float32)})
    coordinator.finish("run-1", PLAN, data)
    assert joined.fetch_model("run-1").tensors.read_bytes() == data


def test_a_full_disk_leaves_nothing_half(
    joined: CoordinatorClient, coordinator: Coordinator, folder: SiteFolder
) -> None:
    data = save({"weights": np.ones(700_000, dtype=np.float32)})
    coordinator.finish("run-1", PLAN, data)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(data) - 1, hard))
    try:
        assert "cannot write the model" in refused_line(OutputError, lambda: joined.fetch_model("run-1"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    nothing_left(folder)
    joined.fetch_model("run-1")


def nothing_left(folder: SiteFolder) -> None:
    assert not list(folder.models.iterdir())


def test_a_model_with_another_digest_is_refused(
    joined: CoordinatorClient, coordinator: Coordinator, folder: SiteFolder
) -> None:
    made = coordinator.finish("run-1", PLAN, TENSORS)
    for data in (TENSORS[:-1], TENSORS + b"\x00", b"", TENSORS[:-1] + b"\x01"):
        coordinator.models["run-1"] = (made, data)
        refused_line(ImpostorError, lambda: joined.fetch_model("run-1"))
        nothing_left(folder)


STOLEN = Identity.generate()


@pytest.mark.parametrize(
    "forge",
    [
        lambda made: made.signed(STOLEN),
        lambda made: made.model_copy(update={"signature": ""}),
        lambda made: made.model_copy(update={"rounds": 9}),
        lambda made: made.model_copy(update={"metrics": {"accuracy": 1.0}}),
        lambda made: made.model_copy(update={"signature": made.signature[:128] + "00" * 3309}),
    ],
)
def test_a_model_that_the_coordinator_did_not_sign_is_refused(
    forge: Any, joined: CoordinatorClient, coordinator: Coordinator, folder: SiteFolder
) -> None:
    made = coordinator.finish("run-1", PLAN, TENSORS)
    coordinator.models["run-1"] = (forge(made), TENSORS)
    assert "signature" in refused_line(ImpostorError, lambda: joined.fetch_model("run-1"))
    nothing_left(folder)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"run": "run-2"}, "of run 'run-2'"),
        ({"plan": plan_of({"run.rounds": 5}).to_json()}, "does not have the hash"),
        ({"plan": "{}"}, "does not have the hash"),
        ({"plan_hash": "0" * 64}, "does not have the hash"),
    ],
)
def test_a_signed_document_that_contradicts_itself_is_refused(
    changes: dict[str, Any], word: str, joined: CoordinatorClient, coordinator: Coordinator, folder: SiteFolder
) -> None:
    coordinator.finish("run-1", PLAN, TENSORS, changes)
    assert word in refused_line(ImpostorError, lambda: joined.fetch_model("run-1"))
    nothing_left(folder)


def test_a_model_of_a_plan_that_was_never_joined_is_refused(
    joined: CoordinatorClient, coordinator: Coordinator, folder: SiteFolder
) -> None:
    coordinator.finish("run-1", plan_of({"run.rounds": 5}), TENSORS)
    assert "never joined" in refused_line(NotAdmitted, lambda: joined.fetch_model("run-1"))
    nothing_left(folder)


@pytest.mark.parametrize("run", ["../up", "/x", "..", "a/b"])
def test_a_run_s_name_leads_nowhere_else(run: str, joined: CoordinatorClient, coordinator: Coordinator) -> None:
    coordinator.finish(run, PLAN, TENSORS)
    refused_line(SettingsError, lambda: joined.fetch_model(run))


def test_streams_that_do_not_fit_are_refused(
    joined: CoordinatorClient, coordinator: Coordinator, folder: SiteFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    coordinator.finish("run-1", PLAN, TENSORS)
    for bend, kind in (
        (lambda _: [], ProtocolError),
        (lambda chunks: chunks[1:], ProtocolError),
        (lambda chunks: [pb.Chunk(document="{"), *chunks[1:]], RosterError),
    ):
        coordinator.bend["GetModel"] = bend
        refused_line(kind, lambda: joined.fetch_model("run-1"))
        nothing_left(folder)
    coordinator.bend.clear()
    monkeypatch.setattr(client_code, "MOST_MODEL", 10)
    assert "longer than 10 bytes" in refused_line(ProtocolError, lambda: joined.fetch_model("run-1"))
    nothing_left(folder)
    monkeypatch.undo()
    joined.fetch_model("run-1")


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"garbage", ProtocolError),
        (save({"other": WEIGHTS}), ProtocolError),
        (save({"weights": WEIGHTS, "more": WEIGHTS}), ProtocolError),
        (save({"weights": WEIGHTS.astype(np.float64)}), ProtocolError),
        (save({"weights": WEIGHTS.reshape(2, 3)}), ProtocolError),
        (save({"weights": WEIGHTS[:5]}), ProtocolError),
        (save({"weights": np.array([np.nan] * 6, dtype=np.float32)}), NonFinite),
    ],
)
def test_weights_that_are_none_are_refused(
    data: bytes, kind: type[AccordError], joined: CoordinatorClient, coordinator: Coordinator
) -> None:
    coordinator.finish("run-1", PLAN, data)
    fetched = joined.fetch_model("run-1")
    refused_line(kind, lambda: fetched.weights(6))


def test_the_token_s_secret_does_not_print(coordinator: Coordinator) -> None:
    from accord_shared.service.token import Invitation

    assert "5e5e" not in repr(Invitation.decode(coordinator.token(secret=SecretStr("5e" * 32))))
