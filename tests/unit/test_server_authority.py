"""The certificate authority: what it signs, what it refuses, and a rotation that no site notices."""

from __future__ import annotations

import os
import socket
import ssl
import stat
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from accord_server.authority import Authority, expiry
from accord_server.settings import CoordinatorSettings
from accord_shared.errors import BadInput, EnrolmentRefused, IdentityError, OutputError, Unreachable
from accord_shared.service import rpc
from accord_shared.service.keyfile import new_tls_key, plain_pem
from coordinator_parts import Bank, Clock, certificate, csr

SETTINGS = CoordinatorSettings(federation="Nord")


@pytest.fixture
def clock() -> Clock:
    return Clock(datetime.now(UTC).timestamp())  # TLS looks at the real one


@pytest.fixture
def authority(tmp_path: Path, clock: Clock) -> Authority:
    return Authority.create(tmp_path, SETTINGS, clock)


# --- certificates


def test_a_sites_certificate(authority: Authority, clock: Clock) -> None:
    bank = Bank("Sparkasse Südkap")
    made = certificate(authority.issue_site(bank.csr(), bank.name, 90))
    made.verify_directly_issued_by(authority.certificate())
    assert made.public_key() == bank.key.public_key()
    assert [name.value for name in made.subject] == ["Nord", "Sparkasse Südkap"]
    extensions = {type(extension.value): extension.value for extension in made.extensions}
    assert list(extensions[x509.ExtendedKeyUsage]) == [ExtendedKeyUsageOID.CLIENT_AUTH]  # type: ignore[call-overload]
    assert extensions[x509.BasicConstraints] == x509.BasicConstraints(ca=False, path_length=None)
    usage = made.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.digital_signature
    assert not usage.key_cert_sign
    assert timedelta(days=90, seconds=-2) < made.not_valid_after_utc - datetime.fromtimestamp(clock(), UTC)
    assert made.not_valid_before_utc < datetime.fromtimestamp(clock(), UTC) - timedelta(hours=1)
    assert made.serial_number != certificate(authority.issue_site(bank.csr(), bank.name, 90)).serial_number


def test_a_request_decides_nothing_but_the_key(authority: Authority) -> None:
    key = new_tls_key()
    asked = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "another bank")]))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("coordinator.example.org")]), critical=False)
        .sign(key, SHA256())
    )
    made = certificate(authority.issue_site(asked.public_bytes(Encoding.DER), "bank 1", 90))
    assert [name.value for name in made.subject] == ["Nord", "bank 1"]
    assert not made.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert list(made.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [
        ExtendedKeyUsageOID.CLIENT_AUTH
    ]
    with pytest.raises(x509.ExtensionNotFound):
        made.extensions.get_extension_for_class(x509.SubjectAlternativeName)


def _broken(request: bytes) -> bytes:
    """The same with another signature."""
    return request[:-1] + bytes([request[-1] ^ 1])


WEAK = {
    "P-384": lambda: csr(ec.generate_private_key(ec.SECP384R1()), "x"),
    "secp256k1": lambda: csr(ec.generate_private_key(ec.SECP256K1()), "x"),
    "RSA 1024": lambda: csr(rsa.generate_private_key(65537, 1024), "x"),  # type: ignore[arg-type]  # noqa: S505
    "RSA 3072": lambda: csr(rsa.generate_private_key(65537, 3072), "x"),  # type: ignore[arg-type]
    "Ed25519": lambda: (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .sign(ed25519.Ed25519PrivateKey.generate(), None)
        .public_bytes(Encoding.DER)
    ),
}


@pytest.mark.parametrize("kind", list(WEAK))
def test_other_keys_are_refused(authority: Authority, kind: str) -> None:
    with pytest.raises(EnrolmentRefused, match="P-256"):
        authority.issue_site(WEAK[kind](), "bank 1", 90)


def test_requests_that_are_none(authority: Authority) -> None:
    good = Bank("bank 1").csr()
    with pytest.raises(EnrolmentRefused, match="not signed by its own key"):
        authority.issue_site(_broken(good), "bank 1", 90)
    for wrong in (b"", b"x" * 100, good[:-10], good + b"x", authority.certificate().public_bytes(Encoding.DER)):
        with pytest.raises(EnrolmentRefused, match="malformed"):
            authority.issue_site(wrong, "bank 1", 90)
    with pytest.raises(EnrolmentRefused, match="longer"):
        authority.issue_site(b"0" * 10_000, "bank 1", 90)
    with pytest.raises(ValueError, match="name"):
        authority.issue_site(good, "../bank", 90)


def test_no_certificate_outlives_its_authority(tmp_path: Path, clock: Clock) -> None:
    settings = CoordinatorSettings.made({"federation": "N", "certificates": {"authority_days": 10}})
    authority = Authority.create(tmp_path, settings, clock)
    made = certificate(authority.issue_site(Bank("b").csr(), "b", 90))
    assert made.not_valid_after_utc == authority.certificate().not_valid_after_utc


# --- files


def test_files_and_their_modes(tmp_path: Path, clock: Clock) -> None:
    old = os.umask(0)
    try:
        Authority.create(tmp_path, SETTINGS, clock).rotate()
    finally:
        os.umask(old)
    modes = {str(path.relative_to(tmp_path)): stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes == {
        "keys": 0o700,
        "certificates": 0o700,
        "keys/authority.pem": 0o600,
        "keys/server.pem": 0o600,
        "certificates/authority.pem": 0o644,
        "certificates/authorities.pem": 0o644,
        "certificates/server.pem": 0o644,
    }
    with pytest.raises(OutputError, match="never overwritten"):
        Authority.create(tmp_path, SETTINGS, clock)
    (tmp_path / "keys" / "authority.pem").chmod(0o640)
    with pytest.raises(IdentityError, match="can be read by others"):
        Authority.load(tmp_path, SETTINGS, clock)


def test_keys_are_encrypted_where_there_is_a_passphrase(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCORD_PASSPHRASE", "correct horse")
    authority = Authority.create(tmp_path, SETTINGS, clock)
    authority.rotate()
    for name in ("authority", "server"):
        assert b"BEGIN ENCRYPTED PRIVATE KEY" in (tmp_path / "keys" / f"{name}.pem").read_bytes()
    pair = Authority.load(tmp_path, SETTINGS, clock).server_pair()
    assert b"BEGIN PRIVATE KEY" in pair.key
    assert "PRIVATE" not in repr(pair)
    monkeypatch.setenv("ACCORD_PASSPHRASE", "battery staple")
    with pytest.raises(IdentityError, match="passphrase") as refusal:
        Authority.load(tmp_path, SETTINGS, clock)
    assert "battery" not in str(refusal.value)


def test_a_key_and_a_certificate_that_do_not_belong_together(tmp_path: Path, clock: Clock) -> None:
    authority = Authority.create(tmp_path, SETTINGS, clock)
    path = tmp_path / "keys" / "authority.pem"
    path.write_bytes(plain_pem(new_tls_key()) + authority.certificate().public_bytes(Encoding.PEM))
    with pytest.raises(IdentityError, match="not the key's"):
        Authority.load(tmp_path, SETTINGS, clock)
    path.write_bytes(plain_pem(new_tls_key()))
    with pytest.raises(IdentityError, match="no certificate"):
        Authority.load(tmp_path, SETTINGS, clock)


# --- the server's certificate


def test_the_server_is_renewed_in_its_last_third(authority: Authority, clock: Clock) -> None:
    first = authority.server_pair()
    clock.turn(days=59)
    assert not authority.renew_server_if_due()
    clock.turn(days=2)
    assert authority.renew_server_if_due()
    second = authority.server_pair()
    assert second.key == first.key
    assert expiry(second.chain) - expiry(first.chain) > timedelta(days=60)
    assert authority.server_expiry() == expiry(second.chain)
    assert not authority.renew_server_if_due()


def test_the_server_is_renewed_for_other_names(tmp_path: Path, authority: Authority, clock: Clock) -> None:
    names = {"public": {"host": "coordinator.example.org", "names": ["10.0.0.1"]}}
    moved = CoordinatorSettings.made({"federation": "Nord", **names})
    pair = Authority.load(tmp_path, moved, clock).server_pair()
    found = certificate(pair.chain).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(name.value) for name in found] == ["coordinator.example.org", "10.0.0.1"]
    assert authority.server_pair() == pair  # a second object follows the file


def test_a_change_by_another_process_is_told_once(tmp_path: Path, authority: Authority, clock: Clock) -> None:
    daemon = Authority.load(tmp_path, SETTINGS, clock)
    assert not daemon.renew_server_if_due()
    authority.rotate()
    assert daemon.certificate() == authority.certificate()
    assert daemon.renew_server_if_due()
    assert not daemon.renew_server_if_due()


# --- rotation


def test_rotation_and_retirement(tmp_path: Path, authority: Authority) -> None:
    old, bank = authority.certificate(), Bank("bank 1")
    first = authority.issue_site(bank.csr(), bank.name, 90)
    assert authority.is_of_current(first)
    new = authority.rotate()
    assert new != old
    assert authority.rotating
    assert not authority.is_of_current(first)
    assert set(x509.load_pem_x509_certificates(authority.authorities())) == {old, new}
    assert authority.is_of_current(authority.issue_site(bank.csr(), bank.name, 90))
    with pytest.raises(BadInput, match="retire it first"):
        authority.rotate()
    assert authority.retire() == new
    assert x509.load_pem_x509_certificates(authority.authorities()) == [new]
    assert (tmp_path / "certificates" / "authority.pem").read_bytes() == new.public_bytes(Encoding.PEM)
    assert len(x509.load_pem_x509_certificates(authority.server_pair().chain)) == 1
    with pytest.raises(BadInput, match="nothing to retire"):
        authority.retire()
    authority.rotate()


def test_near_its_end_an_authority_does_not_renew_for_ever(authority: Authority, clock: Clock) -> None:
    clock.turn(days=3640)
    assert authority.renew_server_if_due()
    clock.turn(days=1)
    assert not authority.renew_server_if_due()
    assert authority.server_expiry() == authority.certificate().not_valid_after_utc


def test_an_authority_that_has_ended_is_replaced(tmp_path: Path, authority: Authority, clock: Clock) -> None:
    clock.turn(days=3700)
    late = Authority.load(tmp_path, SETTINGS, clock)
    assert late.expired
    with pytest.raises(IdentityError, match="authority rotate"):
        late.issue_site(Bank("b").csr(), "b", 90)
    new = late.rotate()
    assert not late.rotating
    assert x509.load_pem_x509_certificates(late.authorities()) == [new]
    certificate(late.server_pair().chain).verify_directly_issued_by(new)
    certificate(late.issue_site(Bank("b").csr(), "b", 90)).verify_directly_issued_by(new)
    assert authority.certificate() == new


@pytest.mark.parametrize("writes", range(1, 6))
def test_a_crash_within_a_rotation_leaves_a_sound_authority(
    tmp_path: Path, authority: Authority, clock: Clock, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    from accord_server import authority as module

    old, real, done = authority.certificate(), module.write_atomic, 0

    def crash(path: Path, data: bytes, **options: int) -> None:
        nonlocal done
        done += 1
        if done > writes:
            raise KeyboardInterrupt
        real(path, data, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "write_atomic", crash)
    with pytest.raises(KeyboardInterrupt):
        authority.rotate()
    monkeypatch.setattr(module, "write_atomic", real)
    after = Authority.load(tmp_path, SETTINGS, clock)
    trusted = x509.load_pem_x509_certificates(after.authorities())
    assert {old, after.certificate()} <= set(trusted)
    assert (tmp_path / "certificates" / "authority.pem").read_bytes() == after.certificate().public_bytes(Encoding.PEM)
    for root in (old, after.certificate()):
        assert _handshake(after, root.public_bytes(Encoding.PEM))
    after.retire()
    assert x509.load_pem_x509_certificates(after.authorities()) == [after.certificate()]


# --- real TLS


@contextmanager
def _serving(authority: Authority, folder: Path) -> Iterator[int]:
    """Python's TLS 1.3 server, as the SuperLink's port is: strict, with client certificates if shown."""
    key, chain = folder / "tls.key", folder / "tls.pem"
    pair = authority.server_pair()
    key.write_bytes(pair.key)
    chain.write_bytes(pair.chain)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(chain, key)
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:

        def answer() -> None:
            raw, _ = listener.accept()
            try:
                with context.wrap_socket(raw, server_side=True) as connection:
                    connection.sendall(b"hello")
            except OSError:
                raw.close()

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            thread.join()


def _handshake(authority: Authority, root: bytes) -> bool:
    """Whether who knows only this root trusts the server."""
    context = ssl.create_default_context(cadata=root.decode())
    context.verify_flags |= ssl.VERIFY_X509_STRICT
    context.verify_flags &= ~ssl.VERIFY_X509_PARTIAL_CHAIN
    with _serving(authority, authority._folder.path) as port:
        try:
            with (
                socket.create_connection(("127.0.0.1", port)) as raw,
                context.wrap_socket(raw, server_hostname="127.0.0.1") as connection,
            ):
                return connection.recv(5) == b"hello"
        except ssl.SSLCertVerificationError:
            return False


def _calls(authority: Authority, roots: bytes, pair: rpc.KeyPair | None) -> bool:
    """Whether a site with these roots and this certificate gets through gRPC with client certificates."""
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    port = _free_port()
    server = rpc.secure_server(
        f"127.0.0.1:{port}",
        authority.server_pair,
        lambda made: rpc.add_health_and_reflection(made, "accord.v1.Federation"),
        clients_of=authority.authorities,
        workers=2,
    )
    server.start()
    try:
        with rpc.secure_channel(f"127.0.0.1:{port}", roots, pair) as channel, rpc.typed_errors("the coordinator"):
            reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)  # type: ignore[no-untyped-call]
            return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)
    except Unreachable:
        return False
    finally:
        server.stop(None).wait()


def _free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port: int = listener.getsockname()[1]
        return port


def test_a_rotation_shuts_nobody_out_until_it_is_retired(authority: Authority) -> None:
    bank, newer = Bank("bank 1"), Bank("bank 1")
    old_root = authority.authorities()
    old_pair = rpc.KeyPair(plain_pem(bank.key), authority.issue_site(bank.csr(), bank.name, 90))
    assert _calls(authority, old_root, old_pair)
    authority.rotate()
    both, new_root = authority.authorities(), authority.certificate().public_bytes(Encoding.PEM)
    new_pair = rpc.KeyPair(plain_pem(newer.key), authority.issue_site(newer.csr(), newer.name, 90))
    for roots in (old_root, both, new_root):  # who was away, who has learnt, who enrols now
        assert _handshake(authority, roots)
        assert _calls(authority, roots, old_pair)
        assert _calls(authority, roots, new_pair)
    authority.retire()
    assert _calls(authority, new_root, new_pair)
    assert _calls(authority, both, new_pair)
    assert not _handshake(authority, old_root)
    assert not _calls(authority, old_root, new_pair)
    assert not _calls(authority, new_root, old_pair)


def test_impostors_do_not_get_through(tmp_path: Path, authority: Authority, clock: Clock) -> None:
    (tmp_path / "other").mkdir(mode=0o700)
    other, bank = Authority.create(tmp_path / "other", SETTINGS, clock), Bank("bank 1")
    good = rpc.KeyPair(plain_pem(bank.key), authority.issue_site(bank.csr(), bank.name, 90))
    forged = rpc.KeyPair(plain_pem(bank.key), other.issue_site(bank.csr(), bank.name, 90))
    assert _calls(authority, authority.authorities(), good)
    assert not _calls(authority, authority.authorities(), forged)
    assert not _calls(authority, authority.authorities(), None)
    assert not _calls(other, authority.authorities(), good)
    assert not _calls(authority, authority.authorities(), authority.server_pair())  # a server is no client
    clock.turn(days=-200)
    expired = rpc.KeyPair(plain_pem(bank.key), authority.issue_site(bank.csr(), bank.name, 90))
    assert not _calls(authority, authority.authorities(), expired)
