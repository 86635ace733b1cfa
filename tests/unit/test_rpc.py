"""Typed errors across gRPC: what goes over, to whom."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from accord_server.authority import Authority
from accord_server.settings import CoordinatorSettings
from accord_shared.errors import AccordError, IdentityError, NotRunning, PolicyRefused, Refused, UntrustedPeer
from accord_shared.service import rpc
from accord_shared.service.pb import accord_pb2 as pb
from accord_shared.service.pb import accord_pb2_grpc as services

ERRORS: dict[str, Exception] = {
    "Status": PolicyRefused("no,\nnever"),
    "Pause": IdentityError("/srv/keys/identity.pem can be read by others"),
    "Resume": ValueError("a secret"),
}


class Failing(services.AgentServicer):
    def Status(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise ERRORS["Status"]

    def Pause(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise ERRORS["Pause"]

    def Resume(self, request: Any, context: Any) -> Any:  # noqa: N802
        raise ERRORS["Resume"]


def add(server: Any) -> None:
    services.add_AgentServicer_to_server(Failing(), server)
    rpc.add_health_and_reflection(server, "accord.v1.Agent")


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(rpc.private_folder(tmp_path / "c"), CoordinatorSettings.made({"federation": "f"}))


@pytest.fixture
def network(authority: Authority) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    server = rpc.secure_server(address, authority.server_pair, add)
    server.start()
    yield address
    server.stop(0).wait()


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "s"
    server = rpc.local_server(folder, "agent", add)
    server.start()
    yield folder
    server.stop(0).wait()


def over_network(address: str, authorities: bytes, method: str) -> AccordError:
    with (
        rpc.secure_channel(address, authorities) as channel,
        pytest.raises(AccordError) as error,
        rpc.typed_errors("the peer"),
    ):
        getattr(services.AgentStub(channel), method)(pb.Empty(), timeout=10)
    return error.value


def over_socket(folder: Path, method: str) -> AccordError:
    with pytest.raises(AccordError) as error, rpc.local_channel(folder, "agent", "the agent") as channel:
        getattr(services.AgentStub(channel), method)(pb.Empty(), timeout=10)
    return error.value


def test_a_typed_error_comes_over_on_one_line(network: str, local: Path, authority: Authority) -> None:
    for error in (over_network(network, authority.authorities(), "Status"), over_socket(local, "Status")):
        assert type(error) is PolicyRefused
        assert str(error) == "no, never"


def test_lines_about_this_machine_s_files_are_for_its_operator(network: str, local: Path, authority: Authority) -> None:
    stranger = over_network(network, authority.authorities(), "Pause")
    assert type(stranger) is Refused
    assert "/srv" not in str(stranger)
    operator = over_socket(local, "Pause")
    assert type(operator) is IdentityError
    assert str(operator) == str(ERRORS["Pause"])


def test_a_bug_tells_nobody_anything(network: str, local: Path, authority: Authority) -> None:
    for error in (over_network(network, authority.authorities(), "Resume"), over_socket(local, "Resume")):
        assert type(error) is Refused
        assert "secret" not in str(error)


def test_another_authority_s_server_is_refused(network: str, tmp_path: Path) -> None:
    other = Authority.create(rpc.private_folder(tmp_path / "o"), CoordinatorSettings.made({"federation": "f"}))
    error = over_network(network, other.authorities(), "Status")
    assert type(error) is UntrustedPeer
    assert "an authority that is not trusted here" in str(error)


def test_a_daemon_that_is_gone_is_said(local: Path, tmp_path: Path) -> None:
    assert type(over_socket(tmp_path / "nowhere", "Status")) is NotRunning
    (local / "agent.sock").unlink()
    assert type(over_socket(local, "Status")) is NotRunning


def test_a_folder_that_is_open_to_others_holds_no_socket(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o755)
    with pytest.raises(AccordError, match="0700"):
        rpc.local_server(folder, "agent", add)
    with pytest.raises(AccordError, match="too long"):
        rpc.local_server(tmp_path / ("x" * 100), "agent", add)
