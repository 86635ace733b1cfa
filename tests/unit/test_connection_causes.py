"""A connection that fails says why: each cause by a server that fails so, over gRPC and over the fleet's HTTP."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable
from contextlib import ExitStack
from ipaddress import ip_address
from pathlib import Path
from unittest.mock import patch

import pytest

import coordinator_lab
from accord_client.fleet import tls_version
from accord_shared.errors import Unreachable, UntrustedPeer
from accord_shared.service import rpc
from accord_shared.service.causes import UNKNOWN, cause_of
from accord_shared.service.egress import Proxy
from accord_shared.service.keyfile import new_tls_key, plain_pem
from accord_shared.service.pb import accord_pb2 as pb
from accord_shared.service.pb import accord_pb2_grpc
from coordinator_lab import Authority, free_port
from networks import Answer, ConnectProxy, listening, tls_server

AUTHORITY, OTHER = Authority(), Authority("other")


def pem(folder: Path, authority: Authority = AUTHORITY, *, days: float = 90, address: str = "127.0.0.1") -> Path:
    key = new_tls_key()
    with patch.object(coordinator_lab, "ip_address", lambda _: ip_address(address)):
        certificate = authority._signed("server", key.public_key(), True, days)
    path = folder / "server.pem"
    path.write_bytes(plain_pem(key) + certificate.public_bytes(coordinator_lab.Encoding.PEM))
    return path


def by_grpc(address: str, proxy: Proxy | None = None) -> Unreachable:
    with (
        rpc.secure_channel(address, AUTHORITY.pem, proxy=proxy) as channel,
        pytest.raises(Unreachable) as error,
        rpc.typed_errors("the peer", proxy),
    ):
        accord_pb2_grpc.FederationStub(channel).Hello(pb.HelloRequest(), timeout=2)
    return error.value


def by_http(address: str, proxy: Proxy | None = None) -> Unreachable:
    with patch("accord_client.fleet.CALL_S", 2.0), pytest.raises(Unreachable) as error:
        tls_version(address, AUTHORITY.pem, proxy)
    return error.value


def version(most: ssl.TLSVersion) -> Callable[[ssl.SSLContext], None]:
    def change(context: ssl.SSLContext) -> None:
        context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.maximum_version = most

    return change


def asks_for_a_certificate(context: ssl.SSLContext) -> None:
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=AUTHORITY.pem.decode())


def speaks_plainly(connection: socket.socket) -> None:
    connection.recv(100)
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def says_nothing(connection: socket.socket) -> None:
    time.sleep(4)


SERVERS: dict[str, tuple[Callable[[Path], Answer], str]] = {
    "expired": (lambda at: tls_server(pem(at, days=-1)), "its certificate has expired"),
    "unknown": (lambda at: tls_server(pem(at, OTHER)), "its certificate is of an authority that is not trusted here"),
    "name": (lambda at: tls_server(pem(at, address="127.0.0.9")), "its certificate is for another name"),
    "version": (
        lambda at: tls_server(pem(at), version(ssl.TLSVersion.TLSv1_1)),
        "it has no TLS version in common with this side",
    ),
    "client": (lambda at: tls_server(pem(at), asks_for_a_certificate), "it refuses the certificate that was shown"),
    "signature": (
        lambda at: tls_server(pem(at, Authority())),  # of the trusted one's name
        "its certificate is of an authority that is not trusted here",
    ),
    "plain": (lambda _: speaks_plainly, "what answers there does not speak TLS"),
    "closes": (lambda _: lambda one: one.close(), "it closes the connection"),
    "silent": (lambda _: says_nothing, "no answer in time"),
}


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
@pytest.mark.parametrize("kind", SERVERS)
def test_each_cause_is_said_and_no_other(kind: str, tmp_path: Path) -> None:
    make, wanted = SERVERS[kind]
    with listening(make(tmp_path)) as port:
        for error in (by_grpc(f"127.0.0.1:{port}"), by_http(f"127.0.0.1:{port}")):
            assert str(error).partition(" cannot be reached: ")[2].startswith(wanted)
            assert isinstance(error, UntrustedPeer) == (kind in ("unknown", "signature"))


def test_the_fleet_alone_wants_tls_1_3(tmp_path: Path) -> None:
    with listening(tls_server(pem(tmp_path), version(ssl.TLSVersion.TLSv1_2))) as port:
        assert "no TLS version in common" in str(by_http(f"127.0.0.1:{port}"))


def test_another_service_at_the_port(tmp_path: Path) -> None:
    with listening(tls_server(pem(tmp_path), lambda one: one.set_alpn_protocols(["http/1.1"]))) as port:
        assert "does not speak gRPC" in str(by_grpc(f"127.0.0.1:{port}"))
        assert tls_version(f"127.0.0.1:{port}", AUTHORITY.pem, None) == "TLSv1.3"


@pytest.mark.parametrize(
    ("address", "wanted"),
    [("127.0.0.1:{free}", "the connection is refused"), ("no-such-host.invalid:443", "its name is not known")],
)
def test_nobody_there(address: str, wanted: str) -> None:
    at = address.format(free=free_port())
    assert {str(error).partition(": ")[2] for error in (by_grpc(at), by_http(at))} == {wanted}


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        (ConnectProxy(credentials="u:p"), "the proxy wants other credentials (407)"),
        (ConnectProxy(status=403), "the proxy does not let it through (403)"),
        (ConnectProxy(status=502), "the proxy does not let it through (502)"),
    ],
)
def test_the_proxy_says_no(answer: ConnectProxy, wanted: str) -> None:
    with listening(answer) as port:
        proxy = Proxy(f"127.0.0.1:{port}")
        for error in (by_grpc("api.example:443", proxy), by_http("fleet.example:443", proxy)):
            assert str(error).endswith(f"cannot be reached through the proxy {proxy.address}: {wanted}")


def test_the_proxy_is_not_there_or_is_none(tmp_path: Path) -> None:
    with ExitStack() as stack:
        cases = {
            f"127.0.0.1:{free_port()}": "of the proxy: the connection is refused",
            "no-such-proxy.invalid:3128": "of the proxy: its name is not known",
        }
        stranger = stack.enter_context(listening(lambda one: one.sendall(b"SSH-2.0-x\r\n")))
        for address, wanted in cases.items():
            for error in (by_grpc("api.example:443", Proxy(address)), by_http("fleet.example:443", Proxy(address))):
                assert str(error).endswith(wanted)
        assert "does not speak HTTP" in str(by_grpc("api.example:443", Proxy(f"127.0.0.1:{stranger}")))


@pytest.mark.parametrize("text", ["", "Invalid certificate verification context: OK", "ssl", "handshake", "GOT 1407"])
def test_what_is_not_known_is_no_guess(text: str) -> None:
    assert cause_of(text) == UNKNOWN
