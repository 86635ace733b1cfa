"""`accord server`: a folder made, a real coordinator commanded, an archive restored; refusals of one line."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from accord_server.database import Database
from accord_server.settings import CoordinatorSettings
from accord_shared.identity import Identity, Member
from accord_shared.plan import Plan
from accord_shared.roster import Roster, sign_roster
from accord_shared.service import rpc
from accord_shared.service.actor import os_user
from accord_shared.service.pb import accord_pb2 as pb
from accord_shared.service.pb import accord_pb2_grpc as services
from accord_shared.service.token import Invitation
from accord_shared.signatures import PlanSignature
from command_line import Done, Run, accord_command, ok, refused
from coordinator_parts import Bank

__all__ = ["accord_command"]

(ENTRY,) = entry_points(group="accord.commands", name="server")
PORTS = ("fleet", "api", "enrolment", "metrics")


@pytest.fixture
def run(accord_command: Callable[..., Run]) -> Run:
    """`accord server …` in an empty folder, in this process."""
    return accord_command(ENTRY, "server")


def last(done: Done) -> dict[str, Any]:
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out.splitlines()[-1])
    return found


# --- init


def test_init_makes_a_private_folder(run: Run) -> None:
    facts = last(
        run("init", "--federation", "Nord", "--host", "127.0.0.1", "--name", "coordinator.example.org", "--json")
    )
    folder = Path("accord-server")
    assert facts["enrolment"] == "127.0.0.1:9402"
    assert not facts["keys_encrypted"]
    settings = CoordinatorSettings.read(folder)
    assert settings.names == ("127.0.0.1", "coordinator.example.org")
    modes = {
        path.relative_to(folder).as_posix(): stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.rglob("*"))
    }
    assert {name: mode for name, mode in modes.items() if mode & 0o077} == dict.fromkeys(
        (f"certificates/{name}.pem" for name in ("authority", "authorities", "server")), 0o644
    )
    assert {"keys/identity.pem", "keys/server.pem", "keys/authority.pem", "state.db"} <= modes.keys()
    assert "1 entries" in ok(run("audit", "verify"))
    shown = last(run("audit", "show", "--json"))["entries"]
    assert [(one["kind"], one["subject"]) for one in shown] == [("coordinator.created", "Nord")]
    assert shown[0]["facts"]["coordinator"] == facts["coordinator"]


def test_init_touches_nothing_that_is_there(run: Run) -> None:
    ok(run("init", "--federation", "Nord"))
    before = {path: path.read_bytes() for path in Path("accord-server").rglob("*") if path.is_file()}
    refused(run("init", "--federation", "Süd"), "holds a coordinator already")
    Path("accord-server/coordinator.toml").rename("kept.toml")
    refused(run("init", "--federation", "Nord"), "a part of one: keys, certificates, state.db")
    Path("kept.toml").rename("accord-server/coordinator.toml")
    assert {path: path.read_bytes() for path in Path("accord-server").rglob("*") if path.is_file()} == before
    Path("open").mkdir(mode=0o755)
    Path("open").chmod(0o755)
    refused(run("init", "--federation", "Nord", "--folder", "open"), "closed to others")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--federation", "../x"), "name"),
        (("--federation", "a\nb"), "character"),
        (("--federation", "Nord", "--host", "a b"), "neither a host name nor an address"),
        (("--federation", "Nord", "--name", 'x"]\nversion = 2'), "character"),
        (("--federation", "Nord", "--host", "0.0.0.0"), "--name"),  # noqa: S104
        (("--federation", "Nord", "--database", "mysql://x/y"), "not supported"),
        (("--federation", "Nord", "--database", "postgresql+psycopg://a@127.0.0.1:1/b"), "cannot use the database"),
    ],
)
def test_an_init_that_fails_leaves_nothing(run: Run, options: tuple[str, ...], said: str) -> None:
    refused(run("init", *options), said)
    assert [path for path in Path().rglob("*") if path.is_file()] == []


def test_a_passphrase_encrypts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCORD_PASSPHRASE", "correct horse")
    assert last(run("init", "--federation", "Nord", "--json"))["keys_encrypted"]
    for key in Path("accord-server/keys").iterdir():
        assert b"BEGIN ENCRYPTED PRIVATE KEY" in key.read_bytes()
    monkeypatch.setenv("ACCORD_PASSPHRASE", "battery staple")
    done = run("authority", "rotate")
    refused(done, "authority.pem", "passphrase")
    assert "battery" not in done.err


# --- without a coordinator that runs


@pytest.mark.parametrize(
    "words",
    [
        ("status",),
        ("invite", "bank 1"),
        ("sites", "list"),
        ("sites", "approve", "bank 1"),
        ("sites", "revoke", "bank 1"),
        ("sites", "rotate", "bank 1"),
        ("sites", "export", "out"),
        ("runs",),
        ("watch", "x"),
        ("stop", "x"),
        ("resume", "x"),
        ("give-up", "x"),
    ],
)
def test_commands_say_that_nobody_runs(run: Run, words: tuple[str, ...]) -> None:
    refused(run(*words), "accord server init")
    ok(run("init", "--federation", "Nord"))
    refused(run(*words), "the coordinator is not running")


def test_rotation_and_retirement_on_the_folder(run: Run) -> None:
    ok(run("init", "--federation", "Nord"))
    refused(run("authority", "retire"), "nothing to retire")
    first = last(run("authority", "show", "--json"))["authorities"]
    both = last(run("authority", "rotate", "--json"))["authorities"]
    assert [one["signs"] for one in both] == [True, False]
    assert both[1]["fingerprint"] == first[0]["fingerprint"]
    refused(run("authority", "rotate"), "retire it first")
    left = last(run("authority", "retire", "--json"))["authorities"]
    assert [one["fingerprint"] for one in left] == [both[0]["fingerprint"]]
    kinds = [one["kind"] for one in last(run("audit", "show", "--json"))["entries"]]
    assert kinds == ["coordinator.created", "authority.rotated", "authority.retired"]
    ok(run("audit", "verify"))


def test_a_damaged_audit_log_is_told(run: Run) -> None:
    ok(run("init", "--federation", "Nord"))
    with closing(sqlite3.connect("accord-server/state.db")) as connection, connection:
        connection.execute("UPDATE audit SET subject = 'Süd'")
    refused(run("audit", "verify"), "entry 1 of the audit log is not what was written")


def test_bad_settings_are_named(run: Run) -> None:
    ok(run("init", "--federation", "Nord"))
    path = Path("accord-server/coordinator.toml")
    path.write_text(path.read_text() + "\ncolour = 1\n")
    for words in (("status",), ("up",), ("audit", "verify"), ("backup", "x.tar")):
        refused(run(*words), "coordinator.toml", "unknown key: clock.colour")


# --- a real coordinator


class Coordinator:
    """`accord server up` as a process in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder.with_name(f"{folder.name}.log")
        self._process = self._started()

    def _started(self) -> subprocess.Popen[bytes]:
        command = [Path(sys.executable).with_name("accord"), "server", "up", "--folder", self.folder]
        with self.log.open("ab") as log:
            return subprocess.Popen(command, stderr=log, stdin=subprocess.DEVNULL)

    def wait(self) -> None:
        """Until it answers."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self._process.poll() is None:
            if "the coordinator serves" in self.log.read_text():
                return
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    def stop(self) -> int:
        self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()  # the SuperLink ends with it
            return self._process.wait()


def configure(folder: Path) -> None:
    """Free ports."""
    path = folder / "coordinator.toml"
    text = path.read_text()
    with ExitStack() as stack:
        for name in PORTS:
            port = stack.enter_context(closing(socket.create_server(("127.0.0.1", 0)))).getsockname()[1]
            before, _, after = text.partition(f"# {name} = ")
            text = f"{before}{name} = {port}\n#{after}"
    path.write_text(text)


@pytest.fixture
def up(run: Run, monkeypatch: pytest.MonkeyPatch) -> Iterator[Coordinator]:
    """A coordinator that runs, in a folder of a short name: that of a Unix socket has at most 104 characters."""
    with tempfile.TemporaryDirectory(prefix="ac-", dir="/tmp") as short:
        monkeypatch.chdir(short)
        ok(run("init", "--federation", "Nord"))
        folder = Path(short) / "accord-server"
        configure(folder)
        started = Coordinator(folder)
        try:
            started.wait()
            yield started
        finally:
            started.stop()
            monkeypatch.undo()


def enrol(token: str, bank: Bank) -> pb.EnrolReply:
    """Over TLS, as a site does."""
    invitation = Invitation.decode(token)
    with (
        rpc.secure_channel(invitation.address, invitation.authority_pem) as channel,
        rpc.typed_errors("the coordinator"),
    ):
        reply: pb.EnrolReply = services.EnrolmentStub(channel).Enrol(bank.enrolment(token), timeout=30)  # type: ignore[no-untyped-call]
        return reply


def test_a_coordinator_is_commanded(run: Run, up: Coordinator, plan_of: Callable[..., Plan]) -> None:
    status = last(run("status", "--json"))
    assert (status["federation"], status["superlink"], status["sites_online"]) == ("Nord", True, 0)
    assert ok(run("sites", "list")) == "no site has enrolled\n"
    banks = _three_sites(run)
    _roster(run, banks)
    _runs(run, plan_of())
    _second(run, up)
    _archive(run, up)
    _revocation(run, banks)
    for line in up.log.read_text().splitlines():
        assert {"time", "level", "logger", "message"} <= json.loads(line).keys()
    assert up.stop() == 0
    _actors(run)
    refused(run("status"), "the coordinator is not running")
    assert last(run("audit", "verify", "--json"))["entries"] >= 10


def _actors(run: Run) -> None:
    """Who called the local socket, which site, or the coordinator by itself."""
    shown = last(run("audit", "show", "--json"))["entries"]
    me = f"operator {os_user()}"
    actors = {(one["kind"], one["subject"]): one["actor"] for one in shown}
    assert {actor for (kind, _), actor in actors.items() if kind == "site.invited"} == {me}
    assert actors["coordinator.created", "Nord"] == actors["site.approved", "bank 1"] == me
    assert actors["site.enrolled", "bank 1"] == "site bank 1"
    assert actors["coordinator.started", "Nord"] == actors["coordinator.stopped", "Nord"] == "coordinator"
    assert {actor for (kind, _), actor in actors.items() if kind in ("run.started", "authority.rotated")} == {me}
    assert f"by {me}" in ok(run("audit", "show"))


def _three_sites(run: Run) -> list[Bank]:
    banks = [Bank(f"bank {number}") for number in range(3)]
    refused(run("invite", "../bank"), "name '../bank'")
    refused(run("invite", "bank 0", "--valid-days", "nan"), "--valid-days")
    enrol(ok(run("invite", "bank 0")).splitlines()[-1], banks[0])
    refused(run("invite", "bank 1", "bank 1", "--out", "tokens"), "twice")
    invited = run("invite", "bank 1", "bank 2", "--out", "tokens", "--json")
    assert [one["out"] for one in last(invited)["invitations"]] == ["tokens/bank 1.token", "tokens/bank 2.token"]
    assert "accord1." not in invited.out
    for bank in banks[1:]:
        path = Path(f"tokens/{bank.name}.token")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        enrol(path.read_text(), bank)
    ok(run("invite", "bank 3", "--out", "bank.token"))
    assert stat.S_IMODE(Path("bank.token").stat().st_mode) == 0o600
    refused(run("invite", "bank 3", "--out", "bank.token"), "not overwritten")
    refused(run("invite", "bank 1", "bank 4", "--out", "tokens"), "bank 1.token exists already")
    found = last(run("sites", "list", "--json"))["sites"]
    assert [(site["name"], site["state"], site["online"]) for site in found] == [
        (f"bank {number}", "pending", False) for number in range(3)
    ]
    assert [site["fingerprint"] for site in found] == [bank.identity.public(bank.name).fingerprint for bank in banks]
    for bank in banks:
        assert last(run("sites", "approve", bank.name, "--json"))["state"] == "approved"
    refused(run("invite", "bank 0"), "enrolled already")
    refused(run("sites", "approve", "nobody"), "no site 'nobody'")
    assert last(run("sites", "rotate", "bank 0", "--json"))["name"] == "bank 0"
    return banks


def _roster(run: Run, banks: list[Bank]) -> None:
    assert last(run("sites", "export", "entries", "--json"))["names"] == [bank.name for bank in banks]
    ok(run("sites", "export", "entries"))
    members = tuple(Member.from_json(Path(f"entries/{bank.name}.json").read_bytes()) for bank in banks)
    Path("entries/bank 1.json").write_text("{}")
    refused(run("sites", "export", "entries"), "bank 1.json exists already")
    refused(run("roster", "show"), "no roster")
    roster = Roster(federation="Nord", serial=1, minimum=3, colluders=0, members=members)
    signed = sign_roster(roster, Identity.generate())
    Path("roster.json").write_text(signed.to_json())
    Path("forged.json").write_text(signed.to_json().replace('"serial":1', '"serial":2'))
    refused(run("roster", "set", "forged.json"), "forged.json", "does not verify")
    refused(run("roster", "set", "missing.json"), "missing.json")
    assert last(run("roster", "set", "roster.json", "--json"))["hash"] == roster.hash
    shown = last(run("roster", "show", "--json"))
    assert (shown["hash"], shown["endorsements"], len(shown["members"])) == (roster.hash, 0, 3)


def _runs(run: Run, plan: Plan) -> None:
    assert ok(run("runs")) == "no run was started\n"
    for words in (("runs", "--last"), ("watch",)):
        refused(run(*words), "no run was started")
    Path("plan.toml").write_text(plan.to_toml())
    Path("bad.f32").write_bytes(b"123")
    Path("nan.f32").write_bytes(np.array([np.nan], "<f4").tobytes())
    for name in ("bad.f32", "nan.f32"):
        refused(run("run", "plan.toml", "--initial", name), name, "float32")
    Path("other.json").write_text(PlanSignature.of("0" * 64, Identity.generate()).to_json())
    np.zeros(64, "<f4").tofile("initial.f32")
    signed = ("run", "plan.toml", "--initial", "initial.f32", "--signature", "other.json")
    refused(run(*signed), "other.json", "the signature is of plan")
    refused(run("run", "missing.toml"), "missing.toml")
    started = last(run("run", "plan.toml", "--initial", "initial.f32", "--json"))
    assert (started["state"], started["round"], started["rounds"]) == ("waiting", 0, 4)
    (listed,) = last(run("runs", "--json"))["runs"]
    assert (listed["run"], listed["plan_hash"]) == (started["run"], plan.hash)
    while not listed["absent"]:  # until its thread asks for sites
        time.sleep(0.1)
        (listed,) = last(run("runs", "--json"))["runs"]
    assert listed["absent"] == [{"site": f"bank {number}", "why": "offline"} for number in range(3)]
    assert "without bank 0 (offline), bank 1 (offline), bank 2 (offline)" in ok(run("runs"))
    stopped = last(run("stop", started["run"], "--json"))
    assert (stopped["state"], stopped["absent"]) == ("stopped", [])
    assert ok(run("runs", "--last")) == f"{started['run']}\n"
    for words in (("watch", started["run"], "--json"), ("watch", "--json")):
        done = run(*words)
        assert (done.code, json.loads(done.out)["state"]) == (3, "stopped")
    assert f"accord: run {started['run']} is stopped" in done.err
    assert last(run("resume", started["run"], "--json"))["state"] in ("waiting", "running")
    refused(run("stop", "../x"), "no run '../x'")
    refused(run("give-up", started["run"]), "is active")
    ok(run("stop", started["run"]))
    assert last(run("give-up", started["run"], "--json"))["state"] == "given-up"
    assert "given-up" in ok(run("runs"))
    refused(run("resume", started["run"]), "is given up")
    again = last(run("run", "plan.toml", "--initial", "initial.f32", "--json"))
    assert (again["plan_hash"], again["state"]) == (plan.hash, "waiting")
    ok(run("stop", again["run"]))


def _second(run: Run, up: Coordinator) -> None:
    """Another coordinator of the same database."""
    database = f"sqlite:///{(up.folder / 'state.db').absolute()}"
    ok(run("init", "--federation", "Nord", "--folder", "second", "--database", database))
    configure(Path("second"))
    second = Coordinator(Path("second").absolute())
    with pytest.raises(AssertionError):
        second.wait()
    assert second.stop() == 2
    said = second.log.read_text().splitlines()
    assert [line for line in said if line.startswith("accord: ")] == [
        f"accord: a coordinator that drives the runs of {database} is running already"
    ]
    assert not [line for line in said if "Traceback" in line]


def _archive(run: Run, up: Coordinator) -> None:
    facts = last(run("backup", "backup.tar", "--json"))
    assert facts["note"] is None
    assert stat.S_IMODE(Path("backup.tar").stat().st_mode) == 0o600
    refused(run("backup", "backup.tar"), "not overwritten")
    refused(run("backup", "accord-server/x.tar"), "elsewhere")
    with tarfile.open("backup.tar") as tar:
        names = set(tar.getnames())
        tar.extractall("restored", filter="data")
    assert {"coordinator.toml", "keys/identity.pem", "certificates/server.pem", "roster.json", "state.db"} <= names
    assert not [name for name in names if name.startswith(("control", "lock", "state.db-")) or name.endswith(".tmp")]
    Path("restored").chmod(0o700)
    entries = last(run("audit", "verify", "--folder", "restored", "--json"))["entries"]
    assert 0 < entries <= last(run("audit", "verify", "--json"))["entries"]
    with closing(Database(f"sqlite:///{Path('restored/state.db').absolute()}")) as database:
        assert database.path is not None
    for key in Path("restored/keys").iterdir():
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert sorted(path.name for path in Path().iterdir() if path.name.startswith(".accord")) == []


def _revocation(run: Run, banks: list[Bank]) -> None:
    assert last(run("sites", "revoke", "bank 2", "--json"))["state"] == "revoked"
    token = ok(run("invite", "bank 2")).splitlines()[-1]
    with pytest.raises(Exception, match="were revoked"):
        enrol(token, banks[2])
    refused(run("authority", "retire"), "nothing to retire")
    ok(run("authority", "rotate"))
    refused(run("authority", "retire"), "bank 0, bank 1")
    enrol(token, Bank("bank 2"))  # a token of the older authority still serves
    ok(run("authority", "retire", "--force"))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder of a short name, which is the present one."""
    with tempfile.TemporaryDirectory(prefix="ac-", dir="/tmp") as made:
        monkeypatch.chdir(made)
        yield Path(made)


def test_up_returns_when_it_is_ready_and_down_leaves_nothing_behind(run: Run, short: Path) -> None:
    folder = short / "accord-server"
    ok(run("init", "--federation", "Nord"))
    configure(folder)
    late = run("status", "--wait", "--timeout", "0.3")
    assert (late.code, late.err) == (3, "accord: not ready within 0.3 s: the coordinator is not running in "
                                        f"{folder}\n")  # fmt: skip
    try:
        assert ok(run("up", "--wait")).startswith("ready, process ")
        assert last(run("status", "--json"))["superlink"] is True
        ok(run("status", "--wait", "--timeout", "5"))
        refused(run("up", "--wait"), "it ended at once: the coordinator of", "is running already")
    finally:
        stopped = run("down")
    assert ok(stopped) == "stopped\n"
    assert stat.S_IMODE((folder / "daemon.log").stat().st_mode) == 0o600
    refused(run("down"), "the coordinator is not running")
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(folder) not in left
    assert os.environ.get("NOTIFY_SOCKET") is None
