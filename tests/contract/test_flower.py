"""What Accord uses of flwr's insides, against the pinned flwr: a real SuperLink process, TLS, nodes and a run."""

from __future__ import annotations

import inspect
import io
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import flwr
import httpx
import numpy as np
import pytest
from flwr.app import Message as FlowerMessage
from flwr.common.serde import fab_to_proto
from flwr.proto.control_pb2 import ListRunsRequest, StartRunRequest
from flwr.supercore.fab import Fab
from pydantic import SecretStr

from accord_client.fleet import FleetConnection
from accord_server.authority import Authority
from accord_server.flower import SuperLink, _bundle
from accord_server.settings import CoordinatorFolder, CoordinatorSettings
from accord_server.superlink import CLOSED, SuperLinkSettings
from accord_shared.errors import NotAdmitted, Unreachable
from accord_shared.messages import TrainReply, TrainRequest
from accord_shared.service.egress import Proxy
from accord_shared.service.keyfile import new_tls_key, public_pem
from accord_shared.service.rpc import private_folder
from accord_shared.wire import decode, encode
from networks import ConnectProxy, listening

pytestmark = pytest.mark.filterwarnings(
    "ignore:GitWildMatchPattern:DeprecationWarning"
)  # flwr's, where it builds bundles


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Link:
    """A SuperLink process and what is needed to speak to it."""

    settings: SuperLinkSettings
    commands: SuperLink
    process: subprocess.Popen[bytes]
    authorities: bytes

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.settings.port}"

    def site(self, key: object, proxy: Proxy | None = None) -> FleetConnection:
        return FleetConnection(self.address, self.authorities, key, proxy=proxy)  # type: ignore[arg-type]


def started(folder: Path, settings: SuperLinkSettings, authorities: bytes) -> Link:
    settings.socket.unlink(missing_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "accord_server.superlink"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "FLWR_TELEMETRY_ENABLED": "0", "FLWR_HOME": str(folder)},
        process_group=0,
    )
    assert process.stdin is not None
    process.stdin.write(settings.to_line())
    process.stdin.flush()
    commands = SuperLink(settings)
    deadline = time.monotonic() + 60
    while not commands.is_ready():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return Link(settings, commands, process, authorities)


def ended(link: Link) -> None:
    link.commands.close()
    assert link.process.stdin is not None
    link.process.stdin.close()
    assert link.process.wait(15) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return private_folder(tmp_path_factory.mktemp("l") / "c")


@pytest.fixture(scope="module")
def settings(folder: Path) -> SuperLinkSettings:
    Authority.create(folder, CoordinatorSettings.made({"federation": "test"}))
    paths = CoordinatorFolder(folder)
    return SuperLinkSettings(
        host="127.0.0.1",
        port=free_port(),
        certificate=paths.server_certificate,
        key=paths.server_key,
        socket=folder / "l.sock",
        database=None,
        control_token=SuperLinkSettings.new_secret(),
        superexec_secret=SuperLinkSettings.new_secret(),
    )


@pytest.fixture(scope="module")
def link(folder: Path, settings: SuperLinkSettings) -> Iterator[Link]:
    running = started(folder, settings, CoordinatorFolder(folder).authorities.read_bytes())
    yield running
    ended(running)


def answer_one(site: FleetConnection, within_s: float = 20.0) -> None:
    """Wait for one message and answer with its weights plus one."""
    deadline = time.monotonic() + within_s
    while (incoming := site.receive()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    request = decode(incoming.content)
    assert isinstance(request, TrainRequest)
    site.answer(incoming, encode(TrainReply(request.run_id, request.round, request.attempt, request.weights + 1)))


def test_flwr_is_the_version_that_is_pinned() -> None:
    assert flwr.__version__.startswith("1.41.")


def test_a_message_goes_out_and_its_answer_comes_back(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    """Straight, and through a proxy that wants credentials."""
    monkeypatch.setenv("no_proxy", "*")
    proxy = ConnectProxy("site:secret")
    with listening(proxy) as port:
        exchanged(link, Proxy(f"127.0.0.1:{port}", SecretStr("site:secret")))
    assert set(proxy.targets) == {link.address}
    assert proxy.refused == 0


def exchanged(link: Link, proxy: Proxy) -> None:
    keys = [new_tls_key(), new_tls_key()]
    nodes = [link.commands.admit(public_pem(key)) for key in keys]
    assert [link.commands.admit(public_pem(key)) for key in keys] == nodes
    sites = [link.site(keys[0]), link.site(keys[1], proxy)]
    weights = np.arange(70_000, dtype=np.float32)
    threads = [threading.Thread(target=answer_one, args=(site,)) for site in sites]
    with link.commands.run() as grid:
        assert sorted(grid.get_node_ids()) == sorted(nodes)
        for thread in threads:
            thread.start()
        content = encode(TrainRequest(1, "run", "a" * 64, 1, 1, weights))
        sent = list(
            grid.push_messages(
                [FlowerMessage(content, dst_node_id=node, message_type="train", ttl=60) for node in nodes]
            )
        )
        answers: list[FlowerMessage] = []
        deadline = time.monotonic() + 20
        while len(answers) < 2 and time.monotonic() < deadline:
            had = {answer.metadata.reply_to_message_id for answer in answers}
            answers += grid.pull_messages([identity for identity in sent if identity not in had])
            time.sleep(0.02)
        for thread in threads:
            thread.join()
        assert {answer.metadata.reply_to_message_id for answer in answers} == set(sent)
        assert not [answer.error.reason for answer in answers if answer.has_error()]
        for answer in answers:
            reply = decode(answer.content)
            assert isinstance(reply, TrainReply)
            np.testing.assert_array_equal(reply.update, weights + 1)
    for site in sites:
        site.close()


def test_a_key_that_was_expelled_is_refused_at_its_next_request(link: Link) -> None:
    key = new_tls_key()
    link.commands.admit(public_pem(key))
    site = link.site(key)
    assert site.receive() is None
    link.commands.expel(public_pem(key))
    with pytest.raises(NotAdmitted):
        site.receive()
    site.close()
    with pytest.raises(NotAdmitted):
        link.site(key)


def test_a_key_that_nobody_admitted_is_refused(link: Link) -> None:
    with pytest.raises(NotAdmitted):
        link.site(new_tls_key())


def test_a_node_that_could_not_say_goodbye_comes_back(link: Link, tmp_path: Path) -> None:
    key, memory = new_tls_key(), tmp_path / "node.json"
    link.commands.admit(public_pem(key))
    first = FleetConnection(link.address, link.authorities, key, memory)
    first._ended.set()  # as if it had been killed
    first._client.close()
    second = FleetConnection(link.address, link.authorities, key, memory)
    assert second.node == first.node
    assert second.receive() is None
    second.close()


@pytest.mark.parametrize(
    "path",
    ["/v1/control/list-nodes", "/v1/control/start-run", "/v1/runtime/acquire-task", "/docs", "/openapi.json", *CLOSED],
)
def test_sites_reach_the_fleet_api_alone(link: Link, path: str) -> None:
    verify = ssl.create_default_context(cadata=link.authorities.decode())
    with httpx.Client(verify=verify, trust_env=False) as client:
        assert client.post(f"https://{link.address}{path}", content=b"").status_code == 404
        assert client.get(f"https://{link.address}{path}").status_code == 404


def test_bodies_of_unknown_length_are_refused(link: Link) -> None:
    verify = ssl.create_default_context(cadata=link.authorities.decode())
    url = f"https://{link.address}/v1/fleet/push-object"
    with httpx.Client(verify=verify, trust_env=False) as client:
        assert client.post(url, content=iter([b"x"])).status_code == 411


def test_longer_bodies_than_any_message_are_refused_unread(link: Link) -> None:
    context = ssl.create_default_context(cadata=link.authorities.decode())
    head = f"POST /v1/fleet/push-object HTTP/1.1\r\nHost: x\r\nContent-Length: {2**40}\r\n\r\n"
    with (
        socket.create_connection(("127.0.0.1", link.settings.port)) as raw,
        context.wrap_socket(raw, server_hostname="127.0.0.1") as secure,
    ):
        secure.sendall(head.encode())
        assert secure.recv(64).startswith(b"HTTP/1.1 413 ")


def test_tls_1_2_is_refused_on_both_sides(link: Link, tmp_path: Path, settings: SuperLinkSettings) -> None:
    old = ssl.create_default_context(cadata=link.authorities.decode())
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection(("127.0.0.1", link.settings.port)) as raw, pytest.raises(ssl.SSLError):
        old.wrap_socket(raw, server_hostname="127.0.0.1")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(settings.certificate, settings.key)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def shake() -> None:
            raw, _ = server.accept()
            with raw, pytest.raises(ssl.SSLError):
                context.wrap_socket(raw, server_side=True)

        thread = threading.Thread(target=shake)
        thread.start()
        with pytest.raises(Unreachable, match="TLS"):
            FleetConnection(f"127.0.0.1:{server.getsockname()[1]}", link.authorities, new_tls_key())
        thread.join()


def test_another_authority_is_refused(link: Link, tmp_path: Path) -> None:
    other = private_folder(tmp_path / "other")
    Authority.create(other, CoordinatorSettings.made({"federation": "test"}))
    with pytest.raises(Unreachable, match="certificate"):
        FleetConnection(link.address, CoordinatorFolder(other).authorities.read_bytes(), new_tls_key())


def test_without_the_token_nobody_commands(link: Link) -> None:
    thief = SuperLink(link.settings.model_copy(update={"control_token": SuperLinkSettings.new_secret()}))
    assert not thief.is_ready()
    with pytest.raises(httpx.HTTPStatusError):
        thief.admit(public_pem(new_tls_key()))
    thief.close()


def malicious_bundle(marker: Path) -> Fab:
    """A bundle whose every module writes a file when it is imported."""
    code = f"from pathlib import Path\nPath({str(marker)!r}).write_text('ran')\nserver = client = None\n"
    content = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(_bundle().content)) as ours, zipfile.ZipFile(content, "w") as theirs:
        for name in ours.namelist():
            theirs.writestr(name, code if name == "app.py" else ours.read(name))
        theirs.writestr("accord_client/__init__.py", code)
    return Fab("", content.getvalue(), {})


def test_a_malicious_bundle_has_no_effect_anywhere(link: Link, tmp_path: Path) -> None:
    """Somebody with the coordinator's token submits code: neither the coordinator nor any site fetches or runs it."""
    marker, key = tmp_path / "marker", new_tls_key()
    link.commands.admit(public_pem(key))
    site = link.site(key)
    control = link.commands._control
    run = control.StartRun(StartRunRequest(fab=fab_to_proto(malicious_bundle(marker)))).run_id
    assert run
    thread = threading.Thread(target=answer_one, args=(site,))
    with link.commands.run() as grid:  # the coordinator meets the other run's task, and leaves it alone
        assert grid.run.run_id != run
        thread.start()
        content = encode(TrainRequest(1, "run", "a" * 64, 1, 1, np.zeros(4, np.float32)))
        node = link.commands.nodes()[public_pem(key)]
        list(grid.push_messages([FlowerMessage(content, dst_node_id=node, message_type="train", ttl=60)]))
        thread.join()
    site.close()
    assert not marker.exists()
    link.commands.stop_runs()
    runs = control.ListRuns(ListRunsRequest()).run_dict
    assert runs[run].status.status == "finished"
    assert not hasattr(FleetConnection, "get_fab")
    assert "GetFab" not in inspect.getsource(sys.modules[FleetConnection.__module__])


def test_in_a_file_nodes_survive_a_restart_and_runs_do_not(
    tmp_path: Path, folder: Path, settings: SuperLinkSettings
) -> None:
    own = private_folder(tmp_path / "s")
    changed = {"socket": own / "l.sock", "database": own / "link.db", "port": free_port()}
    again = settings.model_copy(update=changed)
    authorities = CoordinatorFolder(folder).authorities.read_bytes()
    first, key = started(own, again, authorities), new_tls_key()
    node = first.commands.admit(public_pem(key))
    started_run = first.commands._control.StartRun(StartRunRequest(fab=fab_to_proto(_bundle()))).run_id
    os.killpg(first.process.pid, signal.SIGKILL)
    first.process.wait()
    first.commands.close()
    assert first.process.stdin is not None
    first.process.stdin.close()
    second = started(own, again, authorities)
    assert second.commands.nodes()[public_pem(key)] == node
    second.commands.stop_runs()
    assert second.commands._control.ListRuns(ListRunsRequest()).run_dict[started_run].status.status == "finished"
    with second.commands.run() as grid:
        assert grid.run.run_id != started_run
    ended(second)


def test_the_process_ends_with_whoever_started_it(tmp_path: Path, settings: SuperLinkSettings) -> None:
    own = private_folder(tmp_path / "e")
    changed = {"socket": own / "l.sock", "database": own / "link.db", "port": free_port()}
    line = settings.model_copy(update=changed).to_line()
    parent = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-m', 'accord_server.superlink'], stdin=subprocess.PIPE)\n"
        "child.stdin.write(sys.stdin.buffer.readline()); child.stdin.flush()\n"
        "print(child.pid, flush=True); time.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(line)
    process.stdin.close()
    child = int(process.stdout.readline())
    while not (own / "l.sock").exists():
        time.sleep(0.05)
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 15
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
