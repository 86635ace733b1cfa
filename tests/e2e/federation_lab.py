"""A small federation of real processes for tests: five sites with little data, ways to hurt them, and what to hold."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil

from accord_client.coordinator import CoordinatorClient
from accord_client.enrolment import enrol
from accord_client.keystore import Keys
from accord_client.ledger.ledger import Ledger
from accord_client.rosters import RosterBook
from accord_client.settings import SiteFolder
from accord_shared.files import write_atomic
from accord_shared.identity import Identity
from accord_shared.plan import Plan
from accord_shared.roster import Roster, RosterKey, SignedRoster, sign_roster
from accord_shared.service.pb import accord_pb2 as pb
from accord_simulations.deployment.material import DATASET, Material, bank_demo, site_policy, site_settings
from accord_simulations.deployment.processes import CALL_S, Deployment, new_root

TRIP_S = 12.0
"""The coordinator waits so long for a site that says nothing."""
SHIFTED_CLOCK = Path(__file__).with_name("shifted_clock.py")


class Lab:
    """A federation that is up. Sites approve by policy, so that a test can start a run in a second."""

    def __init__(self, deployment: Deployment, material: Material) -> None:
        self.deployment = deployment
        self.material = material
        self.names = material.names
        self.relays: dict[str, list[Relay]] = {}
        self.small_disks: set[str] = set()
        self._runs = 0

    # --- from nothing to a federation, without a process a command

    def found(self, *, relayed: Sequence[str] = (), small_disks: Sequence[str] = (), stack: ExitStack) -> None:
        """Make and start everything."""
        self.deployment.make_coordinator()
        self.deployment.start_coordinator()
        for name in small_disks:
            if small_disk(self.deployment.site_folder(name), stack):
                self.small_disks.add(name)
        for name in self.names:
            self._enrol(name)
        for name in relayed:
            self._relay(name, stack)
        self._trust()
        self.deployment.start_agents()
        self.deployment.wait_ready()

    def _enrol(self, name: str) -> None:
        folder = self.deployment.site_folder(name)
        with self.deployment.operator() as stub:
            token = stub.Invite(pb.InviteRequest(name=name, valid_s=600), timeout=CALL_S).token
            enrol(token, folder)
            stub.ApproveSite(pb.SiteName(name=name), timeout=CALL_S)
        limits = {"delta": self.material.plan.privacy.delta, "run_epsilon": 50.0, "run_epsilon_all_collude": 5000.0}
        policy = {"approval": "policy", "most_rounds": 100, "datasets": {DATASET: limits}}
        write_atomic(folder / "site.toml", site_settings(name).encode(), mode=0o600)
        write_atomic(folder / "policy.toml", site_policy(self.material.plan, changes=policy).encode(), mode=0o600)
        self.material.write_records(name, folder)

    def _relay(self, name: str, stack: ExitStack) -> None:
        """All that a site sends goes through relays, which can be cut."""
        path = self.deployment.site_folder(name) / "enrolment.json"
        enrolment = json.loads(path.read_text())
        self.relays[name] = []
        for key in ("fleet_address", "api_address"):
            relay = stack.enter_context(Relay(int(enrolment[key].rpartition(":")[2])))
            self.relays[name].append(relay)
            enrolment[key] = f"127.0.0.1:{relay.port}"
        write_atomic(path, json.dumps(enrolment).encode(), mode=0o600)

    def _trust(self) -> None:
        """A roster by a key of its own, accepted by every site."""
        cohort, key = self.material.plan.cohort, Identity.generate()
        folders = {name: SiteFolder(self.deployment.site_folder(name)) for name in self.names}
        keys = {name: Keys.load(folder) for name, folder in folders.items()}
        members = tuple(keys[name].member(name) for name in sorted(self.names))
        given = {"federation": self.deployment.federation, "serial": 1, "members": members}
        roster = Roster.made({**given, "minimum": cohort.minimum, "colluders": cohort.colluders})
        signed: SignedRoster = sign_roster(roster, key)
        assert signed.key == RosterKey.made(dict(key.keys))
        with self.deployment.operator() as stub:
            stub.SetRoster(pb.RosterReply(roster=signed.to_json()), timeout=CALL_S)
        for name in self.names:
            book = RosterBook(folders[name], keys[name].identity, name, self.deployment.federation)
            with CoordinatorClient(folders[name], keys[name]) as client:
                offered = client.roster().signed
                assert offered is not None
                assert book.accept(
                    roster.hash, offered, client.endorse(book.endorse(roster.hash, offered)).endorsements
                )

    # --- runs

    def start_run(self, rounds: int = 8, changes: dict[str, Any] | None = None) -> tuple[str, Plan]:
        """Submit a plan of its own; the run's name."""
        self._runs += 1
        plan = self.material.plan.revised(
            {"run.name": f"lab-{self._runs}", "run.rounds": rounds, "run.seed": self._runs, **(changes or {})}
        )
        path = self.deployment.root / f"{plan.run.name}.toml"
        write_atomic(path, plan.to_toml().encode())
        return self.deployment.submit(path), plan

    def audit(self, kind: str, subject: str) -> list[dict[str, Any]]:
        """Entries of the audit log."""
        entries = self.deployment.server("audit", "show", "--last", "1000")["entries"]
        return [entry["facts"] for entry in entries if (entry["kind"], entry["subject"]) == (kind, subject)]

    def survivors(self, run: str) -> dict[int, list[str]]:
        """Who finished each round, by the audit log."""
        return {facts["round"]: sorted(facts["survivors"]) for facts in self.audit("round.finished", run)}

    def released(self, name: str, plan: Plan) -> list[int]:
        """Rounds of the releases that a site's own ledger has of a plan, each as often as it was charged."""
        entries = Ledger(self.deployment.site_folder(name)).entries()
        bodies = [entry["body"] for entry in entries if entry["kind"] == "release"]
        return [int(body["round"]) for body in bodies if body["plan"] == plan.hash]

    def hold_ledgers(self, run: str, plan: Plan, *, attempts: dict[int, int] | None = None) -> None:
        """What must be true of every ledger after any run: it is whole, what survived was charged, nothing twice.

        `attempts` are rounds that were tried more than once.
        """
        survivors = self.survivors(run)
        for name in self.names:
            Ledger(self.deployment.site_folder(name)).verify()
            charged = self.released(name, plan)
            for number, finished in survivors.items():
                most = (attempts or {}).get(number, 1)
                assert charged.count(number) <= most, (name, number)
                assert name not in finished or charged.count(number) >= 1, (name, number)
            assert set(charged) <= set(survivors), name

    def log_marks(self) -> dict[str, int]:
        """How long each log is now."""
        return {path.name: path.stat().st_size for path in self.deployment.logs.iterdir()}

    def show_logs(self, marks: dict[str, int]) -> None:
        """What was logged since, for whoever reads why a test failed."""
        for path in sorted(self.deployment.logs.iterdir()):
            text = path.read_bytes()[marks.get(path.name, 0) :].decode(errors="replace")
            print(f"--- {path.name}\n{text[-6000:]}")

    # --- hurting

    @contextmanager
    def wrong_clock(self, name: str, offset_s: float) -> Iterator[Path]:
        """Restart a site's agent with a clock that a file sets, and afterwards with the right one."""
        file = self.deployment.root / f"{name}.clock"
        file.write_text(str(offset_s))
        self.deployment.agents[name].stop()
        words = ["site", "up", "--folder", str(self.deployment.site_folder(name))]
        shifted = self.deployment.process(
            f"{name}-shifted", *words, command=[sys.executable, str(SHIFTED_CLOCK), str(file)]
        )
        right, self.deployment.agents[name] = self.deployment.agents[name], shifted
        try:
            shifted.start()
            yield file
        finally:
            shifted.stop()
            self.deployment.agents[name] = right
            right.start()

    @contextmanager
    def full_disk(self, name: str) -> Iterator[None]:
        """Nothing can be written in a site's folder for a while."""
        folder = self.deployment.site_folder(name)
        if name in self.small_disks:
            filler = folder / "filler"
            _fill(filler)
            try:
                yield
            finally:
                filler.unlink()
            return
        process = psutil.Process(self.deployment.agents[name].pid)
        before = process.rlimit(resource.RLIMIT_FSIZE)
        process.rlimit(resource.RLIMIT_FSIZE, (0, before[1]))
        try:
            yield
        finally:
            process.rlimit(resource.RLIMIT_FSIZE, before)


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1 << 8, 1):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError:
                continue


def small_disk(folder: Path, stack: ExitStack) -> bool:
    """A file system of its own for a folder, where that is allowed."""
    if os.geteuid() != 0:
        return False
    folder.mkdir(mode=0o700, parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m,mode=0700", "accord-lab", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        return False
    stack.callback(subprocess.run, ["umount", "-l", str(folder)], check=False, capture_output=True)
    return True


class Relay:
    """A TCP relay on loopback. While it is cut nothing passes, and nobody is told: packets are lost on the way."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._open: asyncio.Event
        self._tasks: set[asyncio.Task[None]] = set()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)
        self.port = 0

    def __enter__(self) -> Relay:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._done.set)
        self._thread.join()

    def cut(self) -> None:
        """Lose everything from now on."""
        self._loop.call_soon_threadsafe(self._open.clear)

    def mend(self) -> None:
        """Pass again, what was held too: TCP would have sent it again."""
        self._loop.call_soon_threadsafe(self._open.set)

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._open, self._done = asyncio.Event(), asyncio.Event()
        self._open.set()
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._done.wait()
        server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._open.wait()
            to_reader, to_writer = await asyncio.open_connection("127.0.0.1", self._target)
            await asyncio.gather(self._pass(reader, to_writer), self._pass(to_reader, writer))
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                await self._open.wait()
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()


@contextmanager
def small_federation(sites: int = 5, *, relayed: Sequence[str] = (), small_disks: Sequence[str] = ()) -> Iterator[Lab]:
    """A federation that is up, and afterwards gone."""
    material = bank_demo(sites, records=40, test_records=20, rounds=8, epsilon=8.0)
    settings = {"rounds": {"trip_timeout_s": TRIP_S, "join_timeout_s": 120.0}}
    with ExitStack() as stack:
        root = stack.enter_context(new_root(None, "accord-lab-"))
        disks = stack.enter_context(ExitStack())
        deployment = stack.enter_context(Deployment(root, material.names, federation="lab", settings=settings))
        lab = Lab(deployment, material)
        try:
            lab.found(relayed=relayed, small_disks=small_disks, stack=disks)
        except BaseException:
            lab.show_logs({})
            raise
        yield lab
