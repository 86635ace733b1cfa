"""Attacks on a deployment of real processes: by strangers, by a malicious site, by a coordinator that controls all."""

from __future__ import annotations

import hashlib
import json
import os
import random
import socket
import ssl
import struct
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import psutil
import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.app import Message as FlowerMessage
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import PullMessagesRequest, PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree, PullObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hostile import World, identity_of
from hostile_deployment import GONE, PASSPHRASE, THIEF, VICTIM, AgentStation, DeployedSetting, Liar, Town, liar, town
from safetensors.numpy import save

from accord_client.enrolment import enrol
from accord_client.fleet import FleetConnection, Incoming
from accord_server.database import Database, RunRow
from accord_server.exchange import Failure
from accord_server.settings import CoordinatorFolder, ListenSpec
from accord_shared import PROTOCOL_VERSION
from accord_shared.errors import (
    AccordError,
    EnrolmentRefused,
    ImpostorError,
    NotAdmitted,
    ProtocolError,
    Refused,
    SettingsError,
    Unreachable,
)
from accord_shared.messages import Joined, MaskedUpload, MaskRequest, OpenRequest, Refusal, TrainReply, TrainRequest
from accord_shared.plan import Plan
from accord_shared.service import rpc
from accord_shared.service.keyfile import new_tls_key, plain_pem, read_identity
from accord_shared.service.pb import accord_pb2 as pb
from accord_shared.service.pb import accord_pb2_grpc as services
from accord_shared.service.token import Invitation
from accord_shared.signatures import Endorsement, PlanSignature, SignedModel
from accord_shared.wire import encode
from accord_simulations.deployment.processes import CALL_S, Process
from coordinator_lab import Authority as OtherAuthority
from coordinator_lab import Coordinator as Impostor
from coordinator_parts import Bank, csr

pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")  # flwr's, building bundles

MEMORY = 256 * 2**20
"""All processes together may have grown by so much after an attack."""


@pytest.fixture(scope="module")
def place() -> Iterator[Town]:
    with town() as made:
        yield made


# --- who listens


def test_nothing_listens_but_on_loopback_and_the_agent_not_at_all(place: Town) -> None:
    def listened(process: Process) -> set[tuple[str, int]]:
        found = [psutil.Process(process.pid), *process.others()]
        connections = [one for member in found for one in member.net_connections("inet")]
        listening = [one.laddr for one in connections if one.status == psutil.CONN_LISTEN]
        return {(address.ip.removeprefix("::ffff:"), address.port) for address in listening}

    assert listened(place.deployment.coordinator) == {("127.0.0.1", port) for port in place.ports.values()}
    assert listened(place.deployment.agents[VICTIM]) == set()
    assert {ListenSpec().host, ListenSpec().metrics_host} == {"127.0.0.1"}
    for folder in (place.deployment.server_folder, place.folder(VICTIM).path):
        for path in (folder, *folder.rglob("*")):
            assert path.stat().st_mode & 0o077 == 0 or path.parent.stat().st_mode & 0o077 == 0, path


# --- enrolment


def stub_of(place: Town, port: str, pair: rpc.KeyPair | None = None) -> Any:
    address = f"127.0.0.1:{place.ports[port]}"
    return closing(rpc.secure_channel(address, place.authorities, pair))


def enrol_call(place: Town, request: pb.EnrolRequest) -> Any:
    with stub_of(place, "enrolment") as channel, rpc.typed_errors("the coordinator"):
        return services.EnrolmentStub(channel).Enrol(request, timeout=CALL_S)


def test_wrong_expired_and_reused_tokens_and_replays_are_refused(place: Town, tmp_path: Path) -> None:
    token = place.invite("bank-10", valid_s=1)
    wrong = Invitation.decode(token).model_copy(update={"secret": Invitation.decode(place.invite("bank-11")).secret})
    forged = json.loads(wrong.model_dump_json()) | {"secret": "5e" * 32, "name": "bank-11"}
    with pytest.raises(EnrolmentRefused, match="wrong or was used"):
        enrol(Invitation.model_validate(forged).encode(), tmp_path / "wrong")
    time.sleep(1.1)
    with pytest.raises(EnrolmentRefused, match="expired"):
        enrol(token, tmp_path / "expired")
    bank = Bank("bank-11")
    request = bank.enrolment(place.invite("bank-11"))
    enrol_call(place, request)
    with pytest.raises(EnrolmentRefused, match="wrong or was used"):  # byte for byte
        enrol_call(place, request)
    with pytest.raises(EnrolmentRefused, match="wrong or was used"):  # the token, by somebody else
        enrol_call(place, Bank("bank-11").enrolment(request_token(request, place)))
    assert place.deployment.sites()["bank-11"].state == "pending"
    assert place.log("coordinator").count("an enrolment was refused") >= 4


def request_token(request: pb.EnrolRequest, place: Town) -> str:
    return next(token for token in place.tokens if Invitation.decode(token).secret.get_secret_value() == request.secret)


@pytest.mark.parametrize(
    "name", ["../bank-01", "a/b", "..", ".hidden", "-rf", "a\\b", "a\x1b[31m", "a\nb", "x" * 65, ""]
)
def test_no_site_has_a_name_that_is_a_path_or_a_command(place: Town, name: str) -> None:
    with pytest.raises(AccordError):
        place.invite(name)
    before = set(place.deployment.sites())
    request = Bank("bank-12").enrolment(place.invite("bank-12"))
    request.name = name
    with pytest.raises(EnrolmentRefused):
        enrol_call(place, request)
    with pytest.raises(AccordError), place.deployment.operator() as stub:
        stub.ApproveSite(pb.SiteName(name=name), timeout=CALL_S)
    assert set(place.deployment.sites()) == before


def test_a_token_of_one_site_enrols_no_other_and_no_key_of_another(place: Town) -> None:
    token = place.invite("bank-13")
    as_victim = Bank("bank-13").enrolment(token)
    as_victim.name = VICTIM
    with pytest.raises(EnrolmentRefused):
        enrol_call(place, as_victim)
    stolen_member = Bank("bank-13", identity=place.keys(VICTIM).identity)
    with pytest.raises(EnrolmentRefused, match="belong to another site"):
        enrol_call(place, stolen_member.enrolment(token))
    stolen_key = Bank("bank-13", key=place.keys(VICTIM).node)
    with pytest.raises(EnrolmentRefused, match="belong to another site"):
        enrol_call(place, stolen_key.enrolment(token))
    unsigned = Bank("bank-13").enrolment(token)
    unsigned.member_signature = Bank("bank-13").signature(unsigned.certificate_request)
    with pytest.raises(EnrolmentRefused):
        enrol_call(place, unsigned)
    enrol_call(place, Bank("bank-13").enrolment(token))  # nothing of this used it up


def test_an_impostor_gets_no_secret(place: Town, tmp_path: Path) -> None:
    impostor = Impostor().start()
    try:
        invitation = Invitation.decode(place.invite("bank-14"))
        bent = Invitation.model_validate(
            json.loads(invitation.model_dump_json())
            | {"address": impostor.enrolment_address, "secret": invitation.secret.get_secret_value()}
        )
        with pytest.raises(ImpostorError, match="no certificate of the authority"):
            enrol(bent.encode(), tmp_path / "site")
        assert impostor.asked == []
    finally:
        impostor.stop()


# --- the federation's API


def hello(boot: str = "5" * 32) -> pb.HelloRequest:
    return pb.HelloRequest(
        boot=boot, version="1.0", protocol=PROTOCOL_VERSION, clock_us=time.time_ns() // 1000, state="ready"
    )


def api(place: Town, pair: rpc.KeyPair | None, call: Callable[[Any], Any]) -> Any:
    with stub_of(place, "api", pair) as channel, rpc.typed_errors("the coordinator"):
        return call(services.FederationStub(channel))


def test_only_a_certificate_of_the_authority_gets_through(place: Town) -> None:
    key, other = new_tls_key(), OtherAuthority()
    forged = rpc.KeyPair(plain_pem(key), other.of_key(key.public_key(), VICTIM))
    server = place.deployment.server_folder
    for pair in (None, forged, rpc.KeyPair(plain_pem(key), (server / "certificates" / "authority.pem").read_bytes())):
        with pytest.raises((Unreachable, Refused)):
            api(place, pair, lambda stub: stub.Hello(hello(), timeout=5))
    bank = Bank("bank-15")  # a real certificate, of a site that nobody approved: it learns nothing
    pem = enrol_call(place, bank.enrolment(place.invite("bank-15"))).certificate
    pair = rpc.KeyPair(plain_pem(bank.key), pem)
    reply = api(place, pair, lambda stub: stub.Hello(hello(), timeout=5))
    assert (reply.state, reply.roster, list(reply.models)) == ("pending", "", [])
    with pytest.raises(NotAdmitted):
        FleetConnection(f"127.0.0.1:{place.ports['fleet']}", place.authorities, bank.key)


def test_a_revoked_site_is_out_at_its_next_call_on_every_port(place: Town) -> None:
    node = place.node(GONE)
    with place.client(GONE) as client:  # both connections stay open
        assert client.hello("6" * 32, "ready", "").reply.state == "approved"
        assert node.receive() is None
        with place.deployment.operator() as stub:
            stub.RevokeSite(pb.SiteName(name=GONE), timeout=CALL_S)
        with pytest.raises(NotAdmitted, match="revoked"):
            client.hello("6" * 32, "ready", "")
        for call in (client.roster, client.models, client.renew):
            with pytest.raises(NotAdmitted, match="revoked"):
                call()
        with pytest.raises(NotAdmitted):
            node.receive()
    node.close()
    with pytest.raises(NotAdmitted):
        place.node(GONE)
    with pytest.raises(AccordError, match="invite it again"), place.deployment.operator() as stub:
        stub.ApproveSite(pb.SiteName(name=GONE), timeout=CALL_S)
    again = Bank(GONE, key=place.keys(GONE).node, identity=identity_of(GONE))
    with pytest.raises(EnrolmentRefused, match="revoked"):  # its key never serves again
        enrol_call(place, again.enrolment(place.invite(GONE)))
    kinds = [entry["kind"] for entry in place.deployment.server("audit", "show", "--last", "50")["entries"]]
    assert "site.revoked" in kinds


def test_a_site_acts_for_no_other(place: Town) -> None:
    pair = place.keys(THIEF).pair()
    request = csr(new_tls_key(), VICTIM)
    thief = Bank(THIEF, identity=place.keys(THIEF).identity)
    renewal = pb.RenewRequest(certificate_request=request, member_signature=thief.signature(request), name=VICTIM)
    with pytest.raises(EnrolmentRefused, match=f"of site '{THIEF}'"):
        api(place, pair, lambda stub: stub.RenewCertificate(renewal, timeout=5))
    renewal.name = THIEF
    renewal.member_signature = Bank(VICTIM).signature(request)
    with pytest.raises(EnrolmentRefused):
        api(place, pair, lambda stub: stub.RenewCertificate(renewal, timeout=5))
    word = Endorsement(federation="hostile", roster=place.roster.roster.hash, name=VICTIM)
    for signed in (word.signed(place.keys(THIEF).identity), word.signed(place.keys(VICTIM).identity)):
        with pytest.raises(AccordError, match=f"of '{VICTIM}', not of '{THIEF}'"):
            api(place, pair, lambda stub, signed=signed: stub.EndorseRoster(endorse(signed), timeout=5))
    own = Endorsement(federation="hostile", roster=place.roster.roster.hash, name=THIEF)
    with pytest.raises(AccordError):
        api(place, pair, lambda stub: stub.EndorseRoster(endorse(own.signed(identity_of("x"))), timeout=5))
    for run in ("", "..", "../../keys", "lab-1", "x" * 4096):
        with pytest.raises(AccordError, match="no finished model"):
            api(place, pair, lambda stub, run=run: list(stub.GetModel(pb.ModelRequest(run=run), timeout=5)))


def endorse(signed: Endorsement) -> pb.EndorseRequest:
    return pb.EndorseRequest(endorsement=signed.to_json())


def test_a_node_speaks_for_no_other(place: Town) -> None:
    node = place.node(THIEF)
    numbers = place.deployment.agent(VICTIM)
    assert numbers.state == "ready"
    other = json.loads((place.folder(VICTIM).path / "node.json").read_text())["node"]
    with pytest.raises(NotAdmitted):
        node._asked(node._client.PullMessages, PullMessagesRequest(node=Node(node_id=other)))
    with pytest.raises(NotAdmitted):
        node._asked(node._client.PullObject, PullObjectRequest(node=Node(node_id=other), run_id=1, object_id="a" * 64))
    node.close()
    place.alive()


def test_no_stranger_writes_to_an_operators_terminal() -> None:
    """What a coordinator says to a site, and a site to a coordinator, is a line without escapes."""
    words = "\x1b[2J\x1b]0;owned\x07\nforged: line\u202e"
    impostor = Impostor(refuse={"Enrol": NotAdmitted(words)}).start()
    request = pb.EnrolRequest(name="x", certificate_request=Bank("x").csr())
    with (
        closing(rpc.secure_channel(impostor.enrolment_address, impostor.authority.pem)) as channel,
        pytest.raises(NotAdmitted) as told,
        rpc.typed_errors("the coordinator"),
    ):
        services.EnrolmentStub(channel).Enrol(request, timeout=CALL_S)
    impostor.stop()
    assert str(told.value).isprintable()
    assert "owned" in str(told.value)
    assert Failure.of(Refusal(words, words)).reason.isprintable()


# --- models


@contextmanager
def finished(place: Town, run: str) -> Iterator[Path]:
    """A run that came to its end, in which the victim took part, and its model."""
    server = CoordinatorFolder(place.deployment.server_folder)
    identity = read_identity(server.identity)
    data = save({"weights": np.zeros(2_000_000, np.float32)})
    plan = place.plan
    folder = server.runs / run / "model"
    folder.mkdir(parents=True)
    signed = SignedModel(
        run=run,
        name=plan.run.name,
        plan=plan.to_json(),
        plan_hash=plan.hash,
        digest=hashlib.sha256(data).hexdigest(),
        rounds=4,
        finished="2026-11-25T10:00:00+00:00",
    ).signed(identity)
    (folder / "weights.safetensors").write_bytes(data)
    (folder / "model.json").write_text(signed.to_json())
    row = RunRow(run=run, name="x", plan_hash=plan.hash, plan=plan.to_json(), state="finished", rounds=4)
    row.started_us, row.changed_us, row.sites = 1, 2, json.dumps([VICTIM])
    with closing(Database(server.database_url(place.settings))) as database:
        with database.session() as session:
            session.add(row)
        yield folder
        with database.session() as session:
            session.delete(session.get_one(RunRow, run))


def test_a_model_goes_to_the_sites_of_its_run_alone_and_slow_readers_halt_nobody(place: Town) -> None:
    run = "model-1"
    with finished(place, run), stub_of(place, "api", place.keys(VICTIM).pair()) as channel:
        thief = place.keys(THIEF).pair()
        assert api(place, thief, lambda stub: list(stub.ListModels(pb.Empty(), timeout=5).models)) == []
        assert list(api(place, thief, lambda stub: stub.Hello(hello(), timeout=5)).models) == []
        with pytest.raises(AccordError, match="no finished model"):
            api(place, thief, lambda stub: list(stub.GetModel(pb.ModelRequest(run=run), timeout=5)))
        stub = services.FederationStub(channel)
        assert [info.run for info in stub.ListModels(pb.Empty(), timeout=5).models] == [run]
        place.deployment.wait_for(
            "the agent's refusal", lambda: "never joined plan" in place.log(VICTIM), within_s=20
        )  # the coordinator's signature is good, but this site never saw the plan
        assert not list(place.folder(VICTIM).models.iterdir())
        slow = [stub.GetModel(pb.ModelRequest(run=run), timeout=20) for _ in range(40)]  # and nobody reads
        time.sleep(0.5)
        began = time.monotonic()
        assert api(place, thief, lambda stub: stub.Hello(hello(), timeout=5)).state == "approved"
        assert time.monotonic() - began < 3
        for call in slow:
            call.cancel()
    place.alive()


# --- TLS


def shake(port: int, context: ssl.SSLContext) -> tuple[str, str]:
    """Version and suite of a handshake."""
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection(("127.0.0.1", port), timeout=5) as raw,
        context.wrap_socket(raw, server_hostname="127.0.0.1") as secure,
    ):
        suite = secure.cipher()
        assert suite is not None
        return str(secure.version()), suite[0]


@pytest.mark.parametrize("port", ["api", "enrolment", "fleet"])
def test_old_tls_and_suites_without_aead_are_refused(place: Town, port: str) -> None:
    number = place.ports[port]
    assert shake(number, ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))[0] == "TLSv1.3"
    for suites in (
        "ECDHE-ECDSA-AES256-SHA384",
        "ECDHE-ECDSA-AES128-SHA",
        "AES256-SHA",
        "aNULL:eNULL",
        "AES128-GCM-SHA256",
    ):
        weak = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        weak.maximum_version = ssl.TLSVersion.TLSv1_2
        weak.set_ciphers(f"{suites}:@SECLEVEL=0")
        with pytest.raises((ssl.SSLError, ConnectionError)):
            shake(number, weak)
    ancient = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    ancient.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings(action="ignore"):
        ancient.minimum_version, ancient.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    with pytest.raises((ssl.SSLError, ConnectionError)):
        shake(number, ancient)
    strong = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    strong.maximum_version = ssl.TLSVersion.TLSv1_2
    if port == "fleet":
        with pytest.raises(ssl.SSLError):
            shake(number, strong)
        return
    folder = place.folder(THIEF)
    strong.load_cert_chain(folder.certificate, folder.keys / "node.pem", PASSPHRASE)
    version, suite = shake(number, strong)  # grpcio refuses no 1.2: the front in deploy/ does
    assert version == "TLSv1.2"
    assert "GCM" in suite or "CHACHA20" in suite


# --- messages that are none


def noise(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)  # noqa: S311


def pour(port: int, data: bytes, *, tls: bool = True, protocols: tuple[str, ...] = ()) -> bytes:
    """What comes back within a moment."""
    with ExitStack() as stack:
        connection: socket.socket = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=2))
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            if protocols:
                context.set_alpn_protocols(list(protocols))
            connection = stack.enter_context(context.wrap_socket(connection, server_hostname="127.0.0.1"))
        return poured(connection, data)


def poured(connection: socket.socket, data: bytes) -> bytes:
    connection.settimeout(0.2)
    answer = b""
    with suppress(OSError):
        connection.sendall(data)
    with suppress(OSError):
        while piece := connection.recv(65536):
            answer += piece
            if len(answer) > 2**20:
                break
    return answer


def frame(kind: int, flags: int, stream: int, payload: bytes, length: int | None = None) -> bytes:
    """An HTTP/2 frame, whose length may lie."""
    return (
        struct.pack(">I", len(payload) if length is None else length)[1:]
        + bytes([kind, flags])
        + struct.pack(">I", stream)
        + payload
    )


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = PREFACE + frame(4, 0, 0, b"")
HTTP2 = {
    "cut in the preface": PREFACE[:10],
    "no settings": PREFACE + noise(1, 4000),
    "garbage frames": SETTINGS + noise(2, 60_000),
    "lying length": SETTINGS + frame(1, 4, 1, b"\x82", length=2**24 - 1),
    "bad compression": SETTINGS + frame(1, 5, 1, noise(3, 400)),
    "headers without end": SETTINGS
    + frame(1, 0, 1, b"\x82")
    + frame(9, 0, 1, b"\0" + b"\x7f\xff\xff\xff\x0fa" * 2000) * 40,
    "window overflow": SETTINGS + frame(8, 0, 0, struct.pack(">I", 2**31 - 1)) * 4,
    "settings flood": PREFACE + frame(4, 0, 0, b"\0\4\0\0\0\1") * 20_000,
    "resets": SETTINGS
    + b"".join(frame(1, 5, at, b"\x82") + frame(3, 0, at, b"\0\0\0\1") for at in range(1, 20_001, 2)),
    "pings": SETTINGS + frame(6, 0, 0, b"12345678") * 20_000,
}


@pytest.mark.parametrize("port", ["api", "enrolment"])
def test_grpc_ports_survive_what_is_no_http2(place: Town, port: str) -> None:
    before = place.resident()
    for data in (b"", b"GET / HTTP/1.1\r\n\r\n", noise(4, 100_000), b"\x16\x03\x01\xff\xff" + noise(5, 70_000)):
        pour(place.ports[port], data, tls=False)
    for data in HTTP2.values():
        pour(place.ports[port], data, protocols=("h2",))
    place.alive()
    assert place.resident() - before < MEMORY


def raw_call(channel: grpc.Channel, method: str, data: bytes) -> grpc.StatusCode:
    call = channel.unary_unary(method, request_serializer=lambda same: same, response_deserializer=lambda same: same)
    try:
        call(data, timeout=10)
    except grpc.RpcError as error:
        return error.code()  # type: ignore[attr-defined,no-any-return]
    return grpc.StatusCode.OK


def payloads() -> Iterator[bytes]:
    for seed in range(30):
        yield noise(seed, seed * 40)
    yield b"\x0a" * 5000
    yield b"\x0a\xff\xff\xff\xff\x0f"
    yield bytes.fromhex("0b") * 100_000  # groups in groups
    yield pb.EnrolRequest(name="x" * 200_000).SerializeToString()
    yield pb.EnrolRequest(secret="5e" * 32, member="[" * 100_000).SerializeToString()


def test_malformed_and_huge_messages_are_refused_by_every_method(place: Town) -> None:
    before = place.resident()
    refusals = {
        grpc.StatusCode.INTERNAL,  # not a protobuf
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.UNIMPLEMENTED,
    }
    pair = place.keys(THIEF).pair()
    methods = {
        "enrolment": ["Enrolment/Enrol", "Nothing/Here", "../Enrol"],
        "api": ["Federation/RenewCertificate", "Federation/EndorseRoster", "Coordinator/RevokeSite"],
    }
    for port, names in methods.items():
        for name in names:
            with stub_of(place, port, pair) as channel:
                for data in payloads():
                    assert raw_call(channel, f"/accord.v1.{name}", data) in refusals
                code = raw_call(channel, f"/accord.v1.{name}", bytes(17 * 2**20))
                assert code in {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNIMPLEMENTED}, code
    place.alive()
    assert place.resident() - before < MEMORY


def test_deep_and_bomb_like_documents_are_refused_with_a_line(place: Town) -> None:
    pair = place.keys(THIEF).pair()
    for text in ("[" * 100_000, '{"a":' * 20_000, "9" * 100_000, '{"name":' + "9" * 5000 + "}", "\ud83d", "\0"):
        text_ = text.encode("utf-8", "replace").decode()
        word = pb.EndorseRequest(endorsement=text_)
        with pytest.raises(AccordError) as caught:
            api(place, pair, lambda stub, word=word: stub.EndorseRoster(word, timeout=10))
        assert "internal" not in str(caught.value), text[:10]
        request = Bank("bank-16").enrolment(place.invite("bank-16"))
        request.member = text_
        with pytest.raises(EnrolmentRefused):
            enrol_call(place, request)
    place.alive()


@contextmanager
def many_streams(channel: grpc.Channel, count: int) -> Iterator[None]:
    """Calls that last for as long as the server lets them."""
    watch = health_pb2_grpc.HealthStub(channel).Watch
    calls = [watch(health_pb2.HealthCheckRequest(service="")) for _ in range(count)]
    reflect = channel.stream_stream(
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        request_serializer=lambda same: same,
        response_deserializer=lambda same: same,
    )
    silent = [reflect(waiting_forever()) for _ in range(count)]
    time.sleep(0.5)
    try:
        yield
    finally:
        for call in (*calls, *silent):
            call.cancel()


def waiting_forever() -> Iterator[bytes]:
    time.sleep(20)
    yield b""


def test_calls_without_end_keep_nobody_out(place: Town) -> None:
    with stub_of(place, "enrolment") as channel, many_streams(channel, 40):
        began = time.monotonic()
        with pytest.raises(EnrolmentRefused):
            enrol_call(place, pb.EnrolRequest(name="x", secret="5e" * 32))
        assert time.monotonic() - began < 5
    with stub_of(place, "api", place.keys(THIEF).pair()) as channel, many_streams(channel, 40):
        began = time.monotonic()
        with place.client(VICTIM) as client:
            assert client.models() == ()
        assert time.monotonic() - began < 5
    place.alive()


def request_line(path: str, *headers: str, body: bytes = b"", length: int | None = None) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Type: {PROTOBUF_MEDIA_TYPE}", *headers]
    if length is not None:
        lines.append(f"Content-Length: {length}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def test_the_fleet_port_survives_what_is_no_request(place: Town) -> None:
    port, before = place.ports["fleet"], place.resident()
    for data in (b"", noise(6, 100_000), b"GET / HTTP/1.1\r\n\r\n"):
        pour(port, data, tls=False)
    path = "/v1/fleet/pull-messages"
    for data in (
        noise(7, 100_000),
        *HTTP2.values(),
        request_line(path, "A: " + "a" * 2**20),
        request_line(path, *["B: b"] * 50_000),
        request_line(path, length=100, body=b"cut"),
        request_line(path, length=-1),
        request_line(path, f"Content-Length: {'9' * 6000}"),
        request_line(path, "Content-Length: 3", "Content-Length: 30", body=b"abc"),
        request_line("/v1/fleet/" + "../" * 3000 + "control/list-nodes", length=0),
        request_line("/v1/fleet/%2e%2e/control/list-nodes", length=0),
        request_line("/v1/fleet/..%2fcontrol%2flist-nodes", length=0),
        request_line("//v1/control/list-nodes", length=0),
        request_line("/v1/fleet/register-node/", length=0),
        request_line("/v1/fleet/%72egister-node", length=0),
    ):
        answer = pour(port, data)
        assert not answer.startswith(b"HTTP/1.1 2"), data[:80]
    assert pour(port, request_line(path, length=2**40)).startswith(b"HTTP/1.1 413")
    place.alive()
    assert place.resident() - before < MEMORY


def test_bodies_in_pieces_are_refused_whatever_length_they_claim(place: Town) -> None:
    before = place.resident()
    pieces = b"100000\r\n" + b"x" * 2**20 + b"\r\n"
    for headers in (["Transfer-Encoding: chunked"], ["Transfer-Encoding: chunked", "Content-Length: 10"]):
        answer = pour(place.ports["fleet"], request_line("/v1/fleet/pull-messages", *headers, body=pieces * 100))
        assert answer[:12] in (b"HTTP/1.1 411", b"HTTP/1.1 400", b""), answer[:40]
    assert place.resident() - before < 64 * 2**20
    place.alive()


def test_bodies_of_many_strangers_fill_no_memory(place: Town) -> None:
    before, whole = place.resident(), 60 * 2**20
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with ExitStack() as stack:
        waiting = []
        for _ in range(20):
            raw = stack.enter_context(socket.create_connection(("127.0.0.1", place.ports["fleet"]), timeout=5))
            secure = stack.enter_context(context.wrap_socket(raw, server_hostname="127.0.0.1"))
            secure.sendall(request_line("/v1/fleet/push-object", length=whole, body=bytes(2**20)))
            secure.settimeout(0.05)
            waiting.append(secure)
        refused, deadline = 0, time.monotonic() + 10
        while refused < 20 - 8 and time.monotonic() < deadline:
            for secure in list(waiting):
                with suppress(TimeoutError):
                    assert secure.recv(64).startswith(b"HTTP/1.1 503")
                    waiting.remove(secure)
                    refused += 1
        assert refused == 20 - 8
        assert place.resident() - before < MEMORY
    place.alive()


@pytest.mark.slow
def test_connections_of_many_strangers_leave_a_run_alone(place: Town) -> None:
    """They take all file descriptors that the coordinator may have; it goes on, and serves again once they leave."""
    process = psutil.Process(place.deployment.coordinator.pid)
    before = process.rlimit(psutil.RLIMIT_NOFILE)
    run, plan = waiting_run(place, "crowd")
    place.deployment.wait_for("the victim's answer", lambda: plan.hash in place.deployment.plans(VICTIM))
    most = process.num_fds() + 20
    process.rlimit(psutil.RLIMIT_NOFILE, (most, before[1]))
    try:
        with ExitStack() as stack:
            for _ in range(100):
                stack.enter_context(socket.create_connection(("127.0.0.1", place.ports["enrolment"]), timeout=5))
            place.deployment.wait_for("the last one", lambda: process.num_fds() >= most - 1)
            time.sleep(1)
    finally:
        process.rlimit(psutil.RLIMIT_NOFILE, before)
    place.alive()
    assert place.deployment.run(run).state == "waiting"
    assert stopped(place, run) < 5


def test_an_enrolled_node_sends_nested_and_broken_protobufs(place: Town) -> None:
    node = place.node(THIEF)
    tree = ObjectTree(object_id="a" * 64)
    for _ in range(90):
        tree = ObjectTree(object_id="a" * 64, children=[tree])
    push = PushMessagesRequest(node=node._node, message_object_trees=[tree])
    for message in (push, PushMessagesRequest(node=node._node)):
        with pytest.raises((Unreachable, NotAdmitted)):
            node._asked(node._client.PushMessages, message)
    assert node.receive() is None
    node.close()
    place.alive()


def test_metrics_survive_what_is_no_request(place: Town) -> None:
    port, before = place.ports["metrics"], place.resident()
    for data in (
        b"",
        noise(8, 100_000),
        PREFACE,
        b"GET /metrics HTTP/1.1\r\nA: " + b"a" * 2**20,
        b"GET /" + b"../" * 30_000 + b" HTTP/1.1\r\n\r\n",
        b"POST /metrics HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\nx",
        b"GET /metrics?name[]=" + b"a" * 60_000 + b" HTTP/1.1\r\n\r\n",
    ):
        pour(port, data, tls=False)
    text = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
    assert "accord_sites" in text
    assert place.resident() - before < MEMORY


# --- the local sockets


def sockets(place: Town) -> dict[str, Path]:
    return {
        "coordinator": place.deployment.server_folder / "control" / "coordinator.sock",
        "agent": place.folder(VICTIM).control / "agent.sock",
        "superlink": place.deployment.server_folder / "flower" / "link.sock",
    }


def test_another_user_of_the_machine_does_not_reach_the_sockets(place: Town) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root becomes somebody else")
    script = (
        "import os, socket, sys\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n"
        "        socket.socket(socket.AF_UNIX).connect(path)\n"
        "    except PermissionError:\n"
        "        continue\n"
        "    sys.exit(f'connected to {path}')\n"
    )
    for above in (place.deployment.root, place.folder(VICTIM).path.parent):  # what is above keeps nobody out
        above.chmod(0o755)
    paths = list(map(str, sockets(place).values()))
    assert all(Path(path).exists() for path in paths)
    done = subprocess.run(
        [sys.executable, "-S", "-c", script, *paths], capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == 0, done.stderr


def test_who_reaches_a_socket_still_needs_the_token_of_this_start(place: Town) -> None:
    found = sockets(place)
    for token in (None, "", "0" * 64, "~" * 4000):
        for name, method in (("coordinator", "Coordinator/Status"), ("agent", "Agent/Status")):
            with closing(grpc.insecure_channel(f"unix:{found[name]}")) as channel:
                call = channel.unary_unary(f"/accord.v1.{method}")
                metadata = [] if token is None else [("accord-token", token)]
                with pytest.raises(grpc.RpcError) as caught:
                    call(b"", metadata=metadata, timeout=5)
                assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED  # type: ignore[attr-defined]
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(found["superlink"]))) as client:
        for path in ("control/list-nodes", "control/start-run", "runtime/acquire-task"):
            answer = client.post(f"http://x/v1/{path}", headers={"authorization": "Bearer x"}, content=b"")
            assert answer.status_code in (400, 401, 403, 404, 415, 422), (path, answer.status_code)


def test_local_sockets_survive_what_is_no_message(place: Town) -> None:
    before = place.resident()
    for path in sockets(place).values():
        for data in (b"", noise(9, 100_000), *HTTP2.values(), b"GET / HTTP/1.1\r\n\r\n"):
            with closing(socket.socket(socket.AF_UNIX)) as connection:
                connection.connect(str(path))
                poured(connection, data)
    for name in ("../..", "x" * 10_000, "\x1b[2J"):
        for command in ("StopRun", "ResumeRun"):
            with pytest.raises(AccordError, match="no run"), place.deployment.operator() as stub:
                getattr(stub, command)(pb.RunName(run=name), timeout=CALL_S)
    for given in ("../../keys/node", "..", "", "a" * 7, "g" * 64, "a" * 64, "*"):
        for command in ("ShowPlan", "ApprovePlan"):
            with pytest.raises(AccordError), place.deployment.at_site(VICTIM) as stub:
                getattr(stub, command)(pb.PlanHash(hash=given), timeout=CALL_S)
    place.alive()
    assert place.resident() - before < MEMORY


# --- two agents with one identity


def test_one_folder_has_one_agent(place: Town) -> None:
    done = place.deployment.command("site", "up", "--folder", str(place.folder(VICTIM).path))
    assert done.returncode == 2
    assert "is running already" in done.stderr
    assert done.stderr.count("\n") == 1
    done = place.deployment.command("server", "up", "--folder", str(place.deployment.server_folder))
    assert done.returncode == 2
    assert "is running already" in done.stderr
    place.alive()


def test_a_copied_folder_takes_over_and_both_sides_say_so(place: Town) -> None:
    """The thief has the victim's folder: an agent of it says hello, as a second process would."""
    with place.client(VICTIM) as copy:
        copy.hello("7" * 32, "ready", place.roster.roster.hash)
        status = place.deployment.wait_for_agent(
            VICTIM, "to be told", lambda status: "another agent" in status.detail, within_s=20
        )
        assert status.state == "waiting"
        assert "a new agent takes over" in place.log("coordinator")
        assert "another agent runs under this identity" in place.log(VICTIM)
    agent = place.deployment.agents[VICTIM]  # its operator starts it again, and the copy is out
    agent.kill()
    agent.start()
    place.deployment.wait_ready()
    with place.client(VICTIM) as copy, pytest.raises(NotAdmitted, match="another agent"):
        copy.hello("7" * 32, "ready", "")


# --- a malicious site in a run


def waiting_run(place: Town, name: str) -> tuple[str, Plan]:
    """A run that asks its sites to join, and waits for more."""
    plan = place.plan.revised({"run.name": name})
    initial = np.zeros(4, dtype="<f4").tobytes()
    with place.deployment.operator() as stub:
        return str(stub.StartRun(pb.StartRunRequest(plan=plan.to_json(), initial=initial), timeout=CALL_S).run), plan


def stopped(place: Town, run: str) -> float:
    """Seconds that the operator's stop takes."""
    began = time.monotonic()
    with place.deployment.operator() as stub:
        info = stub.StopRun(pb.RunName(run=run), timeout=CALL_S)
    assert info.state == "stopped", info
    return time.monotonic() - began


def asked(node: FleetConnection) -> Incoming:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with suppress(NotAdmitted):  # what was asked was taken back while its objects were fetched
            if (incoming := node.receive()) is not None:
                return incoming
        time.sleep(0.02)
    raise AssertionError("the node was asked nothing")


def push(node: FleetConnection, incoming: Incoming, reply: FlowerMessage, *, objects: bool = True, **lies: Any) -> None:
    """Flower's way to answer, with `lies` in what the objects say."""
    true = reply.metadata.reply_to_message_id
    reply.metadata.__dict__.update(_src_node_id=node.node, **lies)
    reply.metadata.__dict__["_message_id"] = reply.object_id
    every, tree = get_all_nested_objects(reply), get_object_tree(reply)
    bare = message_to_proto(reply)
    bare.ClearField("content")
    bare.content.SetInParent()
    bare.metadata.reply_to_message_id = true
    pushed = node._asked(
        node._client.PushMessages,
        PushMessagesRequest(node=node._node, messages_list=[bare], message_object_trees=[tree]),
    )
    assert pushed.objects_to_push
    if not objects:
        return
    from flwr.supercore.inflatable.inflatable_protobuf_utils import make_push_object_fn_protobuf
    from flwr.supercore.inflatable.inflatable_utils import push_objects

    send = make_push_object_fn_protobuf(
        lambda request: node._asked(node._client.PushObject, request), node._node, incoming.run, pushed.session_id
    )
    push_objects(every, send, object_ids_to_push=set(pushed.objects_to_push))


def joined(name: str, plan: Plan) -> RecordDict:
    return encode(Joined(name, PROTOCOL_VERSION, plan.hash))


LIES: dict[str, Callable[[FleetConnection, Incoming, Plan], None]] = {
    "another message's answer": lambda node, got, plan: push(
        node, got, FlowerMessage(joined(THIEF, plan), reply_to=got.message), _reply_to_message_id="b" * 64
    ),
    "another's answer": lambda node, got, plan: push(
        node, got, FlowerMessage(joined(VICTIM, plan), reply_to=got.message)
    ),
    "objects never come": lambda node, got, plan: push(
        node, got, FlowerMessage(joined(THIEF, plan), reply_to=got.message), objects=False
    ),
    "not a message of Accord": lambda node, got, plan: push(
        node, got, FlowerMessage(RecordDict({"x": MetricRecord({"y": 1.0})}), reply_to=got.message)
    ),
    "nothing": lambda node, got, plan: push(node, got, FlowerMessage(RecordDict(), reply_to=got.message)),
    "not a joining": lambda node, got, plan: push(
        node, got, FlowerMessage(encode(TrainReply("r", 1, 1, np.zeros(3, np.float32))), reply_to=got.message)
    ),
    "a wrong type": lambda node, got, plan: push(
        node, got, FlowerMessage(RecordDict({"accord.fields": ConfigRecord({"message": [1, 2]})}), reply_to=got.message)
    ),
    "arrays where scalars belong": lambda node, got, plan: push(
        node,
        got,
        FlowerMessage(
            RecordDict({"accord.fields": ArrayRecord({"message": as_array(b"\x80\x04.")})}), reply_to=got.message
        ),
    ),
}


def as_array(data: bytes) -> Any:
    from flwr.app import Array

    return Array(dtype="object", shape=(1,), stype="pickle", data=data)


@pytest.mark.parametrize("lie", LIES)
def test_no_answer_of_one_site_ends_or_halts_a_run(place: Town, lie: str) -> None:
    node = place.node(THIEF)
    with place.client(THIEF) as client:
        client.hello("8" * 32, "ready", "")
        run, plan = waiting_run(place, f"lie-{list(LIES).index(lie)}")
        LIES[lie](node, asked(node), plan)
        place.deployment.wait_for(
            "the victim's answer", lambda: plan.hash in place.deployment.plans(VICTIM), within_s=20
        )
        time.sleep(0.5)
        info = place.deployment.run(run)
        assert info.state == "waiting", info
        assert stopped(place, run) < 5
    node.close()
    assert f"{VICTIM!r}" not in [line for line in place.log("coordinator").splitlines() if "joined as" in line]


# --- a coordinator that controls everything


def test_an_impostor_in_the_coordinators_place_hears_nothing(place: Town) -> None:
    """Nobody but a holder of a certificate of the enrolled authority is spoken to, on either port."""
    deployment = place.deployment
    assert deployment.coordinator.stop() == 0  # for good: the next one is a liar
    other, impostor = OtherAuthority(), Impostor()
    impostor.trusted = other.pem

    def add(server: grpc.Server) -> None:
        services.add_FederationServicer_to_server(impostor, server)

    pair = other.server()
    server = rpc.secure_server(f"127.0.0.1:{place.ports['api']}", lambda: pair, add)
    server.start()
    try:
        status = deployment.wait_for_agent(
            VICTIM,
            "to see through it",
            lambda status: "authority that is not trusted" in place.log(VICTIM),
            within_s=30,
        )
        assert status.state != "training"
        assert impostor.asked == []
    finally:
        server.stop(0).wait()


@pytest.fixture(scope="module")
def master(place: Town) -> Iterator[Liar]:
    """From here on nobody is honest but the victim."""
    with liar(place) as made:
        yield made


DOWNGRADES: dict[str, dict[str, Any]] = {
    "privacy.noise": {"privacy.noise": "none", "privacy.epsilon": None},
    "secure_aggregation.mode": {"secure_aggregation.mode": "semi_honest"},
    "cohort.minimum": {"cohort.size": 2, "cohort.minimum": 2, "cohort.colluders": 0, "privacy.noise": "site"},
    "cohort.colluders": {"cohort.colluders": 0},
    "run.rounds": {"run.rounds": 5},
    "run.max_extra_attempts": {"run.max_extra_attempts": 3},
    "privacy.epsilon": {"privacy.epsilon": 20.1},
    "privacy.delta": {"privacy.delta": 1e-3},
    "model.digest": {"model.digest": "sha256:" + "0" * 64},
}


@pytest.mark.parametrize("key", DOWNGRADES)
def test_a_plan_that_protects_less_is_refused_and_cannot_be_approved(place: Town, master: Liar, key: str) -> None:
    plan = place.plan.revised({"run.name": f"down-{key.replace('_', '-')}", **DOWNGRADES[key]})
    refusal = master.refused(master.enquiry(plan), "PolicyRefused")
    assert refusal.reason.startswith(f"{key}: this site's policy asks for"), refusal
    with pytest.raises(AccordError, match=key), place.deployment.at_site(VICTIM) as stub:
        stub.ApprovePlan(pb.PlanHash(hash=plan.hash), timeout=CALL_S)
    master.refused(mask_request(master, plan), "PolicyRefused")
    assert key in place.log(VICTIM)
    assert place.charged(plan) == []


def test_an_agent_survives_what_is_no_message(place: Town, master: Liar) -> None:
    """Through Flower, by whoever commands the SuperLink."""
    kinds = "Enquiry", "MaskRequest", "OpenRequest", "Refusal", "Joined", "__class__", ""
    contents = [
        RecordDict(),
        RecordDict({"x": MetricRecord({"y": 1.0})}),
        RecordDict({"accord.fields": MetricRecord({"message": 1.0})}),
        RecordDict({"accord.fields": ArrayRecord({"message": as_array(b"\x80\x04.")})}),
        RecordDict({"accord.fields": ConfigRecord({"message": [1, 2]})}),
        RecordDict({"accord.fields": ConfigRecord({"message": "TrainRequest"}), "accord.vectors": ArrayRecord()}),
        *(RecordDict({"accord.fields": ConfigRecord({"message": kind})}) for kind in kinds),
        *(RecordDict({"accord.fields": ConfigRecord({"message": kind, "run_id": "x" * 10**6})}) for kind in kinds),
    ]
    before = place.resident_of(VICTIM)
    for content in contents:
        assert isinstance(master.send(content), Refusal)
    weights = np.zeros(5_000_000, np.float32)
    master.refused(TrainRequest(PROTOCOL_VERSION, "r", "a" * 64, 1, 1, weights), "PlanNotApproved", "ProtocolError")
    for version in (0, 2, 2**53):
        master.refused(master.enquiry(place.plan, protocol=version), "PlanNotApproved", "ProtocolError")
    place.deployment.wait_ready()
    assert place.resident_of(VICTIM) - before < MEMORY
    assert place.releases() == []


def everything(place: Town) -> set[str]:
    """Files of the whole deployment by name, but databases' own, caches, and what the coordinator writes."""
    root = place.deployment.root
    found = {path for path in root.rglob("*") if place.deployment.server_folder not in path.parents}
    return {path.name for path in found if "cache" not in path.parts and not path.name.startswith("ledger.")}


def mask_request(master: Liar, plan: Plan, **changes: Any) -> MaskRequest:
    """A request that begins work, by a coordinator that does not care."""
    fields: dict[str, Any] = {
        "protocol": PROTOCOL_VERSION,
        "run_id": "run-1",
        "plan_hash": plan.hash,
        "roster_hash": master.town.roster.roster.hash,
        "round": 1,
        "attempt": 1,
        "cohort": (VICTIM, THIEF, GONE),
        "bundles": (b"", b"", b""),
        "coordinator": bytes(32),
        "peers": (),
        "credentials": (),
        "introductions": (),
        "weights": master.weights,
    }
    return MaskRequest(**(fields | changes))


def test_forged_altered_and_unsigned_plans_are_refused(place: Town, master: Liar) -> None:
    plan, other = place.plan.revised({"run.name": "forged"}), place.plan.revised({"run.name": "other"})
    master.refused(master.enquiry(plan, signature=""), "ImpostorError")
    stranger = PlanSignature.of(plan.hash, identity_of("stranger"))
    assert "signer" in master.refused(master.enquiry(plan, signature=stranger.to_json()), "PolicyRefused").reason
    worn = stranger.model_copy(update={"key": master.identity.keys})  # the coordinator's key, another's signature
    master.refused(master.enquiry(plan, signature=worn.to_json()), "ImpostorError")
    theirs = PlanSignature.of(other.hash, master.identity)
    master.refused(master.enquiry(plan, signature=theirs.to_json()), "ImpostorError")
    relabelled = theirs.model_copy(update={"plan_hash": plan.hash})
    master.refused(master.enquiry(plan, signature=relabelled.to_json()), "ImpostorError")
    good = PlanSignature.of(plan.hash, master.identity)
    cut = good.model_copy(update={"signature": good.signature[:-2] + "00"})
    master.refused(master.enquiry(plan, signature=cut.to_json()), "ImpostorError")
    for text in ("{", "[" * 10_000, "null", '{"plan_hash": 1}', "\x00"):
        master.refused(master.enquiry(plan, signature=text), "PlanError", "ProtocolError")
    altered = place.plan.revised({"run.name": "forged", "run.seed": 99})
    master.refused(master.enquiry(plan, plan_json=altered.to_json()), "ProtocolError")
    for text in ("{}", "[" * 10_000, plan.to_json().replace('"noise"', '"nois"'), "\x00" * 100):
        master.refused(master.enquiry(plan, plan_json=text), "PlanError", "ProtocolError")
    for run in ("", "../../keys", "a" * 128, "\x1b[2J\n"):
        master.refused(master.enquiry(plan, run=run), "PlanNotApproved", "ProtocolError")
    assert place.releases() == []
    place.deployment.wait_ready()


def test_a_plan_that_changes_after_its_approval_waits_again(place: Town, master: Liar) -> None:
    plan = place.plan.revised({"run.name": "changing"})
    master.refused(master.enquiry(plan), "PlanNotApproved")
    place.approve_plan(plan)
    before = everything(place)
    for run in ("run-1", "../../keys", "\x1b[2J\n"):  # a run's name is no path
        assert isinstance(master.ask(master.enquiry(plan, run=run)), Joined)
    assert everything(place) - before == {f"plan-{plan.hash}.plan"}
    for changes in ({"run.seed": 7}, {"local.clip_norm": plan.local.clip_norm * 2}, {"run.rounds": 3}):
        changed = plan.revised(changes)
        master.refused(master.enquiry(changed), "PlanNotApproved")
        master.refused(mask_request(master, changed), "PlanNotApproved")
        master.refused(master.enquiry(changed, plan_hash=plan.hash), "ProtocolError")
        master.refused(master.enquiry(plan, plan_json=changed.to_json()), "ProtocolError")
    master.refused(mask_request(master, plan, plan_hash="../../keys/identity"), "PlanNotApproved", "ProtocolError")
    assert place.releases() == []


def test_a_lying_coordinator_never_gets_more_than_the_plan_grants(place: Town, master: Liar) -> None:
    """It replays, skips, goes back, bends weights, changes runs; each release is charged, none beyond the plan."""
    plan = place.plan.revised({"run.name": "lies", "run.rounds": 3, "run.max_extra_attempts": 1})
    assert plan.releases == 4
    master.refused(master.enquiry(plan), "PlanNotApproved")
    place.approve_plan(plan)
    setting = DeployedSetting(
        names=(VICTIM, THIEF, GONE), corrupt=(), plan=plan, signed=place.roster, parameters=len(master.weights)
    )
    world = World(setting, {VICTIM: AgentStation(master, plan)})
    honest = world.run("lies-1").join()

    def words(upload: MaskedUpload | None) -> bytes:
        assert upload is not None, world.refusals[-1]
        return upload.payload.tobytes()

    def no(kind: type[AccordError], says: str, upload: Any) -> None:
        assert upload is None
        assert type(world.refusals[-1]) is kind, world.refusals[-1]
        assert says in str(world.refusals[-1]), world.refusals[-1]

    first = honest.mask_request(VICTIM, 1)
    seen = [words(honest.send_mask(VICTIM, first))]
    assert place.charged(plan) == [(1, 1)]
    no(ProtocolError, "past", honest.send_mask(VICTIM, first))  # byte for byte
    master.refused(TrainRequest(PROTOCOL_VERSION, "lies-1", plan.hash, 1, 1, master.weights), "ProtocolError")
    no(ProtocolError, "other weights", honest.upload(VICTIM, 2, seed=1))
    for number in (0, 4, 2**31):
        assert honest.upload(VICTIM, 1, round_number=number) is None
    assert honest.upload(VICTIM, 1, round_number=2, cohort=(VICTIM,)) is None
    assert honest.upload(VICTIM, 1, round_number=2, roster_hash="0" * 64) is None
    assert honest.upload(VICTIM, 1, round_number=2, weights=master.weights[:-1]) is None
    assert honest.upload(VICTIM, 1, round_number=2, weights=master.weights * np.float32("nan")) is None
    assert place.charged(plan) == [(1, 1)]
    other = world.run("lies-2").join()  # the same round once more, as another run
    no(ProtocolError, "past", other.upload(VICTIM, 1))
    assert place.charged(plan) == [(1, 1)]
    assert master.ask(OpenRequest("lies-1", 1, 1, (0, 1, 2), (), (), (b"", b"", b""))) == world_refusal(master)

    place.deployment.agents[VICTIM].kill()  # and its memory is gone
    place.deployment.start_agents()
    place.deployment.wait_ready()
    master.refused(first, "SessionLost", "ProtocolError")
    again = world.run("lies-1").join()
    assert again.send_mask(VICTIM, first) is None
    assert place.charged(plan) == [(1, 1)]

    seen.append(words(again.upload(VICTIM, 1, round_number=3)))  # skipped 2, and can not go back
    no(ProtocolError, "past", again.upload(VICTIM, 1, round_number=2))
    no(ProtocolError, "past", again.upload(VICTIM, 1, round_number=1))
    seen.append(words(again.upload(VICTIM, 2, round_number=3)))
    seen.append(words(again.upload(VICTIM, 3, round_number=3)))
    assert again.upload(VICTIM, 4, round_number=3) is None
    assert master.kept[-1][1].kind == "BudgetExhausted"  # type: ignore[union-attr]
    assert place.charged(plan) == [(1, 1), (3, 1), (3, 2), (3, 3)]
    assert again.upload(VICTIM, 5, round_number=3) is None
    assert len(place.charged(plan)) == plan.releases
    assert len(set(seen)) == len(seen)
    for words_ in seen:  # masked: as good as uniform, whatever was trained
        assert len(set(words_)) > 200
    kinds = {type(reply) for _, reply in master.kept}
    assert TrainReply not in kinds


def world_refusal(master: Liar) -> Any:
    """What was just answered, if it was a refusal."""
    reply = master.kept[-1][1]
    assert isinstance(reply, Refusal), reply
    return reply


def test_models_of_other_names_and_signers_leave_nothing_on_the_disk(place: Town, master: Liar) -> None:
    """The coordinator announces models of runs whose names are paths, and none that it can show."""
    folder = place.folder(VICTIM)
    before = set(folder.path.rglob("*"))
    with place.client(VICTIM) as client:
        for run in ("../../etc", "/etc/passwd", "..", ".hidden", "a/b", "", "\x00", "x" * 200):
            with pytest.raises(SettingsError, match="not the name of a run"):
                client.fetch_model(run)
        with pytest.raises(AccordError, match="no finished model"):
            client.fetch_model("lies-1")
    made = {path for path in set(folder.path.rglob("*")) - before if "cache" not in path.parts}
    assert made <= {folder.models}, made


def test_no_secret_is_in_any_log_or_message(place: Town, master: Liar) -> None:
    secrets = {PASSPHRASE.encode()}
    for token in place.tokens:
        secrets |= {token.encode(), Invitation.decode(token).secret.get_secret_value().encode()}
    for control in (place.deployment.server_folder / "control", place.folder(VICTIM).control):
        secrets |= {path.read_bytes() for path in control.glob("*.token")}
    for settings in (master.daemon._process._settings,):
        secrets |= {
            settings.control_token.get_secret_value().encode(),
            settings.superexec_secret.get_secret_value().encode(),
        }
    logs = [*place.deployment.logs.glob("*.log"), *(place.deployment.server_folder / "flower").glob("*.log*")]
    assert {path.stem for path in logs} >= {"coordinator", VICTIM, "link"}
    for path in logs:
        text = path.read_bytes()
        assert not [secret for secret in secrets if secret in text], path
        assert b"PRIVATE KEY" not in text, path
        assert b"Traceback" not in text, path
    for path in (*place.deployment.logs.glob("*.log"),):
        for line in path.read_text().splitlines():
            if line.endswith("File descriptor limit reached. Retrying."):  # grpc's own, which nothing silences
                continue
            assert json.loads(line)["message"], line  # one object a line, whatever strangers called themselves
    agent = psutil.Process(place.deployment.agents[VICTIM].pid)
    for process in (agent, psutil.Process(master.daemon._process._process.pid)):  # type: ignore[union-attr]
        assert not [secret for secret in secrets if secret.decode() in " ".join(process.cmdline())]
