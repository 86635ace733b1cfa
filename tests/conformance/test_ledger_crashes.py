"""A crash at any instant never makes the ledger count less than what left the machine.

Two ways to die: at each SQL statement and file that is written, with the folder kept exactly as the death left it;
and real processes that are killed with SIGKILL at random moments.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accord_client import store as store_module
from accord_client.ledger import chain
from accord_client.ledger.entries import DataSet, Limits
from accord_client.store import SiteStore
from accord_shared.dp.events import SampledGaussian
from accord_shared.errors import LimitReached
from accord_shared.files import write_atomic
from accord_shared.vectors import Vector

PLAN, OTHER = "a" * 64, "b" * 64
EVENT = SampledGaussian(5.0, 1.0, 1)
ROUNDS = 3


class Crash(BaseException):
    """The process dies here: nothing catches it."""


class Death:
    """Dies at its `at`-th boundary (0: never), and keeps the folder as it is at that moment."""

    def __init__(self, folder: Path, at: int) -> None:
        self.folder, self.at, self.seen = folder, at, 0
        self.left = folder.parent.with_name(f"{folder.parent.name}+") / folder.name

    def boundary(self) -> None:
        self.seen += 1
        if self.seen == self.at:
            shutil.copytree(self.folder, self.left)
            raise Crash

    def around(self, action: Callable[[], Any]) -> Any:
        """Before and after `action` is a boundary."""
        self.boundary()
        result = action()
        self.boundary()
        return result

    @contextmanager
    def spared(self) -> Iterator[None]:
        """Nobody dies here, and nothing is counted."""
        at, seen, self.at = self.at, self.seen, 0
        yield
        self.at, self.seen = at, seen


def armed(patch: pytest.MonkeyPatch, folder: Path, at: int) -> Death:
    """Puts a `Death` around every SQL statement, commit and file of the store."""
    death = Death(folder, at)

    class Connection(sqlite3.Connection):
        def execute(self, *arguments: Any) -> Any:
            return death.around(lambda: super(Connection, self).execute(*arguments))

    def write(path: Path, data: bytes, **options: Any) -> None:
        death.around(lambda: write_atomic(path, data, **options))

    chain.close_all()
    folder.mkdir(parents=True, exist_ok=True)
    patch.setattr(chain, "Connection", Connection)
    patch.setattr(chain, "write_atomic", write)
    patch.setattr(store_module, "write_atomic", write)
    return death


@pytest.fixture(autouse=True)
def close_after() -> Iterator[None]:
    """No connection of a dead process stays."""
    yield
    chain.close_all()


def update_of(number: int, draw: int) -> Vector:
    return np.array([number, draw], dtype=np.float32)


def run(store: SiteStore, sent: list[bytes], first: int, last: int, *, resend: bool) -> None:
    """What a site does for each round; `sent` is all that ever left.

    With `resend` (noise `site`) the last update goes out again after a crash, else a released attempt never does.
    """
    for number in range(first, last + 1):
        before = store.releases(PLAN)
        if resend and before.last_round == number:
            sent.append(store.last_update(before).tobytes())
            continue
        attempt = before.last_attempt + 1 if before.last_round == number else 1
        store.reserve(PLAN, number, EVENT, attempt=attempt)
        update = update_of(number, len(sent))
        store.release(PLAN, number, "m", update if resend else None, EVENT, ("a", "b"), attempt)
        sent.append(update.tobytes())
        store.note_opened(PLAN, number)


def at_every_boundary(folder: Path, patch: pytest.MonkeyPatch, *, resend: bool) -> int:
    """Dies once at each boundary of a run, restarts on what is left; how many boundaries there are."""
    for at in itertools.count(1):
        sent: list[bytes] = []
        death = armed(patch, folder / f"{at}" / "site", at)
        try:
            run(SiteStore(death.folder, durable=False), sent, 1, ROUNDS, resend=resend)
        except Crash:
            left = SiteStore(death.left, durable=False)
        else:
            return death.seen
        left_machine = len(sent)
        assert left.releases(PLAN).rounds in (left_machine, left_machine + 1)
        run(left, sent, max(1, left.releases(PLAN).last_round), ROUNDS, resend=resend)
        after = left.ledger.verify().plan(PLAN)
        assert after.rounds == after.steps >= len(set(sent))
        assert after.rounds <= ROUNDS + (0 if resend else 1)
        assert after.last_round == ROUNDS
        if resend:  # one update a round, whatever died
            assert len(set(sent)) == len({update[:4] for update in sent}) == ROUNDS
    raise AssertionError("it never ends")


@pytest.mark.parametrize("resend", [True, False], ids=["site", "shared"])
def test_a_death_at_any_boundary_never_under_counts(
    resend: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert at_every_boundary(tmp_path, monkeypatch, resend=resend) > 100


def test_a_reservation_that_a_dead_process_left_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until its own plan replaces it: what both plans may still release stays within the limit."""
    most = 3.0
    limits = [DataSet(name="default", limits=Limits(epsilon=most, accountant="rdp"))]
    alone = None
    for at in itertools.count(1):
        death = armed(monkeypatch, tmp_path / f"{at}" / "site", at)
        folder, ended = death.folder, False
        try:
            SiteStore(folder, durable=False, datasets=limits).reserve(PLAN, 1, EVENT)
            ended = True
        except Crash:
            folder = death.left
        armed(monkeypatch, folder, 0)
        store = SiteStore(folder, durable=False, datasets=limits)
        kept = store.ledger.verify().reservation(PLAN) is not None
        done = releases_until_refused(store, OTHER)
        alone = alone or done
        assert done == alone - kept
        if kept:
            store.reserve(PLAN, 1, EVENT)
            store.release(PLAN, 1, "m", None, EVENT)
        assert store.ledger.epsilon("default", 1e-5, "rdp") <= most
        if ended:
            return


def releases_until_refused(store: SiteStore, plan: str) -> int:
    for number in itertools.count(1):
        try:
            store.reserve(plan, number, EVENT)
        except LimitReached:
            return number - 1
        store.release(plan, number, "m", None, EVENT)
    raise AssertionError("it never ends")


@settings(max_examples=30, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["reserve", "release", "open", "close"]), st.sampled_from([PLAN, OTHER])), max_size=12
    ),
    deaths=st.lists(st.integers(1, 60), max_size=4),
)
def test_any_interleaving_with_deaths_never_under_counts(
    steps: list[tuple[str, str]], deaths: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    sent, left = Counter[str](), [*deaths, 0]
    with pytest.MonkeyPatch.context() as patch:
        death = armed(patch, tmp_path_factory.mktemp("deaths") / "0" / "site", left.pop(0))
        store = SiteStore(death.folder, durable=False)
        for action, plan in steps:
            try:
                do(store, action, plan, sent)
            except Crash:
                death = armed(patch, death.left, left.pop(0))
                store = SiteStore(death.folder, durable=False)
            with death.spared():
                for each in (PLAN, OTHER):
                    assert sent[each] <= store.releases(each).rounds <= sent[each] + len(deaths)
        chain.close_all()


def do(store: SiteStore, action: str, plan: str, sent: Counter[str]) -> None:
    number = store.releases(plan).last_round + 1
    if action == "reserve":
        store.reserve(plan, number, EVENT)
    elif action == "open":
        store.note_opened(plan, number)
    elif action == "close":
        chain.close_all()
    else:
        store.release(plan, number, "m", update_of(number, 0), EVENT)
        sent[plan] += 1


# --- real processes

KILLS, KILL_ROUNDS = 12, 400


def serve(folder: Path, plan: str, ready: int) -> None:
    """Releases round after round; a line in `sent` is what left the machine."""
    store = SiteStore(folder / "site")
    sent = os.open(folder / f"sent-{plan[0]}", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.write(ready, b".")
    for number in range(store.releases(plan).last_round + 1, KILL_ROUNDS + 1):
        with store.exclusive():
            store.reserve(plan, number, EVENT)
            store.release(plan, number, "m", update_of(number, 0), EVENT)
        os.write(sent, f"{number}\n".encode())
        store.note_opened(plan, number)


def fork(folder: Path, plan: str) -> int:
    ready, started = os.pipe()
    child = os.fork()
    if child == 0:
        serve(folder, plan, started)
        os._exit(0)
    os.read(ready, 1)
    return child


def kill(folder: Path, plans: str) -> None:
    """Kills servers of all plans at random moments, and looks each time at what is left."""
    moments, killed = random.Random(1), 0  # noqa: S311  (when to kill, nothing else)
    for _ in range(KILLS):
        servers = [fork(folder, plan * 64) for plan in plans]
        time.sleep(moments.uniform(0.0, 0.1))
        for server in servers:
            os.kill(server, signal.SIGKILL)
        codes = [os.waitstatus_to_exitcode(os.waitpid(server, 0)[1]) for server in servers]
        killed += codes.count(-signal.SIGKILL)
        check(folder, plans, killed)
    print(killed)


def check(folder: Path, plans: str, killed: int) -> None:
    store = SiteStore(folder / "site")
    balance = store.ledger.verify()
    for plan in plans:
        left = [int(line) for line in (folder / f"sent-{plan}").read_text().split()]
        releases = balance.plan(plan * 64)
        assert len(left) <= releases.rounds == releases.steps <= len(left) + killed
        assert max(left, default=0) <= releases.last_round
        if releases.rounds:
            assert store.last_update(releases)[0] == releases.last_round


@pytest.mark.parametrize("plans", ["a", "ab"], ids=["one process", "two at once"])
def test_kill_9_never_under_counts(plans: str, tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from conformance.test_ledger_crashes import kill; "
    command = [sys.executable, "-c", f"{code} kill(Path(sys.argv[1]), sys.argv[2])", str(tmp_path), plans]
    tests = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=tests, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= KILLS // 2
