"""What happens at one time on the coordinator, and what is missing there, shuts nobody out."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from accord_server.daemon import SuperLinkProcess
from accord_server.database import RunRow
from accord_server.metrics import Metrics
from accord_server.rosters import Rosters
from accord_server.runs import Runs
from accord_server.settings import CoordinatorFolder
from accord_shared.errors import Aborted, Unreachable
from accord_shared.identity import Identity
from accord_shared.service.pb import accord_pb2 as pb
from coordinator_parts import KeyRing, Parts, coordinator


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Parts]:
    with coordinator(tmp_path / "c") as made:
        yield made


class Interrupting(KeyRing):
    """Something else happens, in another thread, between a look at the keys and what follows from it."""

    meanwhile: Callable[[], object] | None = None
    thread: threading.Thread | None = None

    def nodes(self) -> dict[bytes, int]:
        if self.meanwhile is not None:
            self.thread, self.meanwhile = threading.Thread(target=self.meanwhile), None
            self.thread.start()
            self.thread.join(0.5)
        return super().nodes()


def interrupted(parts: Parts, meanwhile: Callable[[], object]) -> Interrupting:
    """Upkeep compares keys, and an operator acts meanwhile."""
    ring = Interrupting(dict(parts.ring.known))
    parts.sites._superlink = ring
    ring.meanwhile = meanwhile
    parts.sites.admit_all()
    assert ring.thread is not None
    ring.thread.join(10)
    assert not ring.thread.is_alive()
    return ring


def test_a_site_that_is_revoked_during_upkeep_stays_out(parts: Parts) -> None:
    bank, _ = parts.enrolled("a")
    parts.sites.approve("a")
    ring = interrupted(parts, lambda: parts.sites.revoke("a"))
    assert bank.public not in ring.known


def test_a_site_that_is_approved_during_upkeep_stays_in(parts: Parts) -> None:
    """Flower never admits a key again that it expelled."""
    bank, _ = parts.enrolled("a")
    expelled: list[bytes] = []
    ring = Interrupting()
    ring.expel = expelled.append  # type: ignore[method-assign,assignment]
    parts.sites._superlink = ring
    ring.meanwhile = lambda: parts.sites.approve("a")
    parts.sites.admit_all()
    assert ring.thread is not None
    ring.thread.join(10)
    assert bank.public in ring.known
    assert expelled == []


class Failing:
    """A SuperLink that is restarted, and later refuses."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)

    @contextmanager
    def run(self) -> Iterator[Any]:
        raise self.errors.pop(0)
        yield


def runs_of(parts: Parts, superlink: Any) -> Runs:
    folder = CoordinatorFolder(parts.path)
    rosters = Rosters(folder.roster, parts.settings.federation, parts.audit)
    return Runs(
        parts.database,
        parts.audit,
        folder,
        parts.settings,
        Identity.generate(),
        superlink,
        parts.sites,
        rosters,
        Metrics(),
    )


def test_a_model_that_is_lost_keeps_no_site_from_saying_hello(parts: Parts) -> None:
    row = RunRow(run="r-1", name="r", plan_hash="a" * 64, plan="{}", state="finished", rounds=1, started_us=1)
    row.changed_us, row.sites = 2, json.dumps(["a"])
    with parts.database.session() as session:
        session.add(row)
    runs = runs_of(parts, Failing())
    assert runs.models("a") == []
    model = parts.path / "runs" / "r-1" / "model"
    model.mkdir(parents=True)
    (model / "model.json").write_text('{"half')
    assert runs.models("a") == []


def test_a_run_waits_for_its_superlink_and_aborts_for_nothing_else(
    parts: Parts, plan_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accord_server.runs.RETRY_S", 0.01)
    link = Failing(Unreachable("keys are compared, but the SuperLink does not answer"), Aborted("no run"))
    runs = runs_of(parts, link)
    plan = plan_of()
    info = runs.start(pb.StartRunRequest(plan=plan.to_json(), initial=bytes(4)))
    events = list(runs.watch(info.run, lambda: True))
    assert events[-1].info.state == "aborted"
    assert events[-1].info.detail == "Aborted: no run"
    assert link.errors == []


def test_the_superlinks_log_stays_short_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It grows by whatever strangers send."""
    monkeypatch.setattr("accord_server.daemon.LOG_BYTES", 1000)
    log = tmp_path / "link.log"
    process = SuperLinkProcess(None, log)  # type: ignore[arg-type]
    process.trim_log()
    with log.open("ab", buffering=0) as file:
        file.write(b"x" * 900)
        process.trim_log()
        assert log.stat().st_size == 900
        for _ in range(5):
            file.write(b"y" * 1001)
            process.trim_log()
            assert log.stat().st_size == 0
        file.write(b"the end")
    assert log.read_bytes() == b"the end"
    assert log.with_suffix(".log.1").read_bytes() == b"y" * 1001
