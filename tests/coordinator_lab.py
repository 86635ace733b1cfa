"""A coordinator of tests: real gRPC servers with TLS on 127.0.0.1 whose answers a test can bend."""

from __future__ import annotations

import base64
import hashlib
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from pydantic import SecretStr

from accord_shared.errors import AccordError, BadInput
from accord_shared.identity import Identity
from accord_shared.plan import Plan
from accord_shared.service import rpc
from accord_shared.service.keyfile import new_tls_key, plain_pem
from accord_shared.service.pb import accord_pb2 as pb
from accord_shared.service.pb import accord_pb2_grpc
from accord_shared.service.token import Invitation
from accord_shared.signatures import SignedModel

COORDINATOR = Identity.from_seeds(b"\x0a" * 32, b"\x0b" * 32)
SITE = "Bank 01 (Nordkap)"
FEDERATION = "Nord"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Authority:
    """A P-256 authority."""

    def __init__(self, name: str = "authority") -> None:
        self.key = new_tls_key()
        self.certificate = self._signed(name, self.key.public_key(), None, 3650)

    def _signed(self, name: str, key: Any, server: bool | None, days: float) -> x509.Certificate:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        issuer = subject if server is None else self.certificate.subject
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=400))
            .not_valid_after(now + timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=server is None, path_length=None), critical=True)
        )
        if server is not None:
            usage = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
            builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        if server:
            names = [x509.IPAddress(ip_address("127.0.0.1"))]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self.key, SHA256())

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    def server(self) -> rpc.KeyPair:
        key = new_tls_key()
        return rpc.KeyPair(
            plain_pem(key), self._signed("server", key.public_key(), True, 90).public_bytes(Encoding.PEM)
        )

    def site(self, request: bytes, name: str, days: float = 90) -> bytes:
        return self.of_key(x509.load_der_x509_csr(request).public_key(), name, days)

    def of_key(self, key: Any, name: str, days: float = 90) -> bytes:
        return self._signed(name, key, False, days).public_bytes(Encoding.PEM)


Bend = Callable[[Any], Any]


@dataclass
class Coordinator(accord_pb2_grpc.EnrolmentServicer, accord_pb2_grpc.FederationServicer):
    """Its answers; `bend` changes one by the name of its call, `refuse` ends it by an error."""

    authority: Authority = field(default_factory=Authority)
    identity: Identity = COORDINATOR
    asked: list[Any] = field(default_factory=list)
    bend: dict[str, Bend] = field(default_factory=dict)
    refuse: dict[str, AccordError] = field(default_factory=dict)
    clock: Callable[[], float] = time.time
    trusted: bytes = b""
    state: str = "approved"
    roster: str = ""
    endorsements: list[str] = field(default_factory=list)
    models: dict[str, tuple[SignedModel, bytes]] = field(default_factory=dict)
    peers: list[x509.Certificate] = field(default_factory=list)

    def start(self) -> Coordinator:
        self.trusted = self.authority.pem
        self.pair = self.authority.server()
        self.enrolment_address = f"127.0.0.1:{free_port()}"
        self.api_address = f"127.0.0.1:{free_port()}"
        self.fleet_address = f"127.0.0.1:{free_port()}"

        def add(adder: Any) -> rpc.Add:
            return lambda server: adder(self, server)

        self._servers = [
            rpc.secure_server(
                self.enrolment_address, lambda: self.pair, add(accord_pb2_grpc.add_EnrolmentServicer_to_server)
            ),
            rpc.secure_server(
                self.api_address,
                lambda: self.pair,
                add(accord_pb2_grpc.add_FederationServicer_to_server),
                clients_of=lambda: self.trusted,
            ),
        ]
        for server in self._servers:
            server.start()
        return self

    def stop(self) -> None:
        for server in self._servers:
            server.stop(0).wait()

    def token(self, **changes: Any) -> str:
        der = self.authority.certificate.public_bytes(Encoding.DER)
        fields: dict[str, Any] = {
            "address": self.enrolment_address,
            "name": SITE,
            "secret": SecretStr("5e" * 32),
            "authority": base64.b64encode(der).decode(),
            "federation": FEDERATION,
            "expires_us": int((time.time() + 3600) * 1e6),
        }
        return Invitation(**(fields | changes)).encode()

    def _answer(self, call: str, request: Any, reply: Any, context: grpc.ServicerContext | None = None) -> Any:
        self.asked.append(request)
        if context is not None:
            self.peers.append(rpc.peer_certificate(context))
        if call in self.refuse:
            raise self.refuse[call]
        return self.bend.get(call, lambda same: same)(reply)

    def Enrol(self, request: Any, context: Any) -> Any:  # noqa: N802
        reply = pb.EnrolReply(
            certificate=self.authority.site(request.certificate_request, request.name),
            authorities=self.trusted,
            coordinator=self.identity.keys.to_json(),
            fleet_address=self.fleet_address,
            api_address=self.api_address,
            federation=FEDERATION,
        )
        return self._answer("Enrol", request, reply)

    def Hello(self, request: Any, context: Any) -> Any:  # noqa: N802
        reply = pb.HelloReply(clock_us=int(self.clock() * 1e6), state=self.state, authorities=self.trusted)
        return self._answer("Hello", request, reply, context)

    def RenewCertificate(self, request: Any, context: Any) -> Any:  # noqa: N802
        pem = self.authority.site(request.certificate_request, request.name)
        return self._answer("Renew", request, pb.RenewReply(certificate=pem, authorities=self.trusted), context)

    def GetRoster(self, request: Any, context: Any) -> Any:  # noqa: N802
        return self._answer("GetRoster", request, self._roster(), context)

    def EndorseRoster(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.endorsements.append(request.endorsement)
        return self._answer("EndorseRoster", request, self._roster(), context)

    def _roster(self) -> Any:
        return pb.RosterReply(roster=self.roster, endorsements=self.endorsements)

    def ListModels(self, request: Any, context: Any) -> Any:  # noqa: N802
        infos = [
            pb.ModelInfo(run=run, name=made.name, plan_hash=made.plan_hash, digest=made.digest, finished_us=1)
            for run, (made, _) in self.models.items()
        ]
        return self._answer("ListModels", request, pb.ModelList(models=infos), context)

    def GetModel(self, request: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        if request.run not in self.models:
            raise BadInput(f"no finished model of run {request.run!r}")
        document, data = self.models[request.run]
        chunks = [pb.Chunk(document=document.to_json()), *(pb.Chunk(data=part) for part in rpc.chunks(data))]
        yield from self._answer("GetModel", request, chunks, context)

    def finish(self, run: str, plan: Plan, data: bytes, changes: dict[str, Any] | None = None) -> SignedModel:
        """A finished model; `changes` are made before it is signed."""
        fields: dict[str, Any] = {
            "run": run,
            "name": plan.run.name,
            "plan": plan.to_json(),
            "plan_hash": plan.hash,
            "digest": hashlib.sha256(data).hexdigest(),
            "rounds": plan.run.rounds,
            "finished": "2026-11-25T10:00:00+00:00",
        }
        made = SignedModel(**(fields | (changes or {}))).signed(self.identity)
        self.models[run] = (made, data)
        return made


def key_of(pair: rpc.KeyPair) -> EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    key = load_pem_private_key(pair.key, None)
    assert isinstance(key, EllipticCurvePrivateKey)
    return key


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """All of them at the same time, in threads."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [done.result() for done in [pool.submit(call) for call in calls]]
