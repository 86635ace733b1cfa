"""`deployment`: what a trip and a round cost between real processes, beside a plain Flower app of the same payload.

A coordinator and its sites run as `accord demo deployment` has them: processes, TLS on loopback, secure aggregation and
shared noise. The peer is Flower's own SuperLink and SuperNodes with TLS on loopback, started by Flower's own commands
with Flower's defaults; its app only sends a vector of as many bytes to and fro, and its first trip is not counted.

A **trip** of Accord is from the first message that is sent to the last reply that is there, as the coordinator logs it:
what sites compute in it counts. **Round overhead** is a whole round, from one checkpoint to the next; the training in
it (a step of a linear head on embeddings at hand) is not taken off, so it is an upper bound. The first round, in which
sites embed their records, is left out of both. **Idle** is an agent's CPU time after the run, as a part of one core.
"""

from __future__ import annotations

import json
import shutil
import socket
import sqlite3
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import tomli_w
from pydantic import Field

from accord_client.facts import plan_facts
from accord_shared.errors import Aborted
from accord_simulations.bench._settings import BenchSettings
from accord_simulations.deployment.demo import TIMEOUTS, admit, enrol
from accord_simulations.deployment.material import Material, bank_demo
from accord_simulations.deployment.processes import COMMAND_S, Deployment, Process, free_ports, new_root, on_each
from accord_simulations.resources import versions

_FLOAT_BYTES = 4
_SETTLE_S = 40.0
"""After so long without work an agent asks most rarely."""
_APP = Path(__file__).with_name("_flower_trips.py")


class DeploymentSettings(BenchSettings):
    """Settings of `deployment`."""

    sites: int = Field(default=3, ge=3, le=20)
    rounds: int = Field(default=12, ge=3, le=1000)
    records: int = Field(default=200, ge=20, le=100_000)
    flower_trips: int = Field(default=6, ge=1, le=100)
    idle_s: float = Field(default=20.0, ge=1, le=3600)


def measure(settings: dict[str, Any], progress: Callable[[str], None]) -> dict[str, Any]:
    """Run the benchmark.

    Raises:
        PlanError: a setting is unknown or out of range.
        Aborted: a process failed.
    """
    chosen = DeploymentSettings.read(settings)
    progress(f"deployment: a coordinator and {chosen.sites} sites are started")
    material = bank_demo(chosen.sites, records=chosen.records, rounds=chosen.rounds, test_records=10)
    facts = plan_facts(material.plan)
    with (
        new_root(None, "accord-bench-") as root,
        Deployment(root, material.names, settings=TIMEOUTS, log_level="DEBUG") as deployment,
    ):
        run = _federation(deployment, material)
        progress(f"deployment: {chosen.rounds} rounds")
        rounds_s, trips = _rounds(deployment, run)
        ended = time.monotonic()
        trips_s = _trips(deployment.coordinator, trips[0])
        resident = [psutil.Process(agent.pid).memory_info().rss for agent in deployment.agents.values()]
        progress(f"deployment: {chosen.flower_trips} trips of plain Flower")
        peer = _Flower(deployment, chosen, facts["trainable_parameters"], facts["upload_bytes_per_site_round"])
        flower_s = peer.trips()
        time.sleep(max(0.0, _SETTLE_S - (time.monotonic() - ended)))
        progress(f"deployment: {chosen.idle_s:g} s without work")
        idle, idle_coordinator = _idle(deployment, chosen.idle_s)
    trip, flower = statistics.median(trips_s), statistics.median(flower_s)
    return {
        "trip_s_median": round(trip, 4),
        "trips_per_round": statistics.median(trips[1:]),
        "round_overhead_s": round(statistics.median(rounds_s), 3),
        "flower_trip_s_median": round(flower, 3),
        "trip_ratio": round(trip / flower, 4),
        "trip_s_p90": round(statistics.quantiles(trips_s, n=10)[-1], 4),
        "agent_rss_bytes": max(resident),
        "idle_cpu_fraction": round(max(idle), 5),
        "idle_cpu_fraction_coordinator": round(idle_coordinator, 5),
        "upload_bytes_per_site_round": facts["upload_bytes_per_site_round"],
        **chosen.model_dump(),
        "versions": versions(),
    }


# --- Accord


def _federation(deployment: Deployment, material: Material) -> str:
    """A run that was approved by every site and begins now."""
    deployment.make_coordinator()
    deployment.start_coordinator()
    on_each(material.names, lambda name: enrol(deployment, material, name))
    deployment.start_agents()
    admit(deployment, material)
    path = deployment.root / "plan.toml"
    material.write_plan(path)
    run = deployment.submit(path)
    deployment.approve_plan(material.plan.hash)
    return run


def _rounds(deployment: Deployment, run: str) -> tuple[list[float], list[int]]:
    """Seconds of each round but the first, and trips of every round, from the coordinator's database."""
    deployment.wait_finished(run, within_s=1800)
    with closing(sqlite3.connect(f"file:{deployment.server_folder / 'state.db'}?mode=ro", uri=True)) as database:
        found = database.execute("select finished_us, report from rounds where run = ? order by round", (run,))
        rows = found.fetchall()
    ends = [finished_us / 1e6 for finished_us, _ in rows]
    return [later - earlier for earlier, later in pairwise(ends)], [json.loads(row[1])["trips"] for row in rows]


def _trips(coordinator: Process, first: int) -> list[float]:
    """Seconds of each trip after the `first`, from the coordinator's log."""
    entries = [json.loads(line) for line in coordinator.log.read_text().splitlines() if line.startswith("{")]
    return [entry["seconds"] for entry in entries if entry.get("message") == "trip"][first:]


def _idle(deployment: Deployment, seconds: float) -> tuple[list[float], float]:
    """CPU time of each agent, and of the coordinator with its SuperLink, as parts of one core."""
    groups = [[psutil.Process(agent.pid), *agent.others()] for agent in deployment.agents.values()]
    groups.append([psutil.Process(deployment.coordinator.pid), *deployment.coordinator.others()])
    before, started = [_cpu_s(group) for group in groups], time.monotonic()
    time.sleep(seconds)
    elapsed = time.monotonic() - started
    *agents, coordinator = [(_cpu_s(group) - was) / elapsed for group, was in zip(groups, before, strict=True)]
    return agents, coordinator


def _cpu_s(processes: list[psutil.Process]) -> float:
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))


# --- Flower


@dataclass(frozen=True)
class _Flower:
    """Flower's own processes, started in the deployment's folder and ended with it. Its certificate serves them too."""

    deployment: Deployment
    settings: DeploymentSettings
    dimension: int
    upload_bytes: int

    @property
    def _folder(self) -> Path:
        return self.deployment.root / "flower"

    def trips(self) -> list[float]:
        """Seconds of each trip.

        Raises:
            Aborted: Flower failed.
        """
        superlink, *ports = free_ports(1 + self.settings.sites)
        address, trusted = f"127.0.0.1:{superlink}", self.deployment.server_folder / "certificates" / "authorities.pem"
        out = self._app(address, trusted)
        processes = [self._superlink(superlink, trusted)]
        processes[0].start()
        self._wait_until_listening(processes[0], superlink)
        for number, port in enumerate(ports):
            words = ["--root-certificates", str(trusted), "--superlink", address, "--port", str(port)]
            processes.append(self._process(f"supernode-{number}", "flower-supernode", *words))
            processes[-1].start()
        self._submit()
        limit = 60.0 + 30.0 * (1 + self.settings.flower_trips)
        self.deployment.wait_for("Flower's trips", out.exists, *processes, within_s=limit)
        for process in reversed(processes):
            process.stop()
            process.clear()
        found: dict[str, Any] = json.loads(out.read_text())
        if "trip_s" not in found:
            raise Aborted(f"Flower: {found.get('problem')}")
        return [float(seconds) for seconds in found["trip_s"]]

    def _process(self, name: str, script: str, *words: str) -> Process:
        return self.deployment.process(f"flower-{name}", *words, command=[str(Path(sys.executable).with_name(script))])

    def _superlink(self, port: int, trusted: Path) -> Process:
        folder = self.deployment.server_folder
        return self._process(
            "superlink",
            "flower-superlink",
            *("--host", "127.0.0.1", "--port", str(port), "--disable-runtime-dependency-installation"),
            *("--ssl-certfile", str(folder / "certificates" / "server.pem")),
            *("--ssl-keyfile", str(folder / "keys" / "server.pem"), "--ssl-ca-certfile", str(trusted)),
        )

    def _wait_until_listening(self, process: Process, port: int) -> None:
        def listening() -> bool:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                return True
            return False

        self.deployment.wait_for("Flower's SuperLink", listening, process)

    def _app(self, address: str, trusted: Path) -> Path:
        """Write the app and how its SuperLink is reached; where its result will be."""
        app, out = self._folder / "app", self._folder / "trips.json"
        app.mkdir(parents=True)
        shutil.copy(_APP, app / "flower_trips.py")
        config = {
            "nodes": self.settings.sites,
            "trips": self.settings.flower_trips,
            "values-down": self.dimension,
            "values-up": -(-self.upload_bytes // _FLOAT_BYTES),
            "out": str(out),
        }
        components = {"serverapp": "flower_trips:server", "clientapp": "flower_trips:client"}
        about = {"name": "flower-trips", "version": "1.0.0", "license": "Apache-2.0", "dependencies": ["flwr"]}
        flower = {"publisher": "accord", "fab-include": ["*.py"], "components": components, "config": config}
        build = {"requires": ["hatchling"], "build-backend": "hatchling.build"}
        table = {"build-system": build, "project": about, "tool": {"flwr": {"app": flower}}}
        (app / "pyproject.toml").write_text(tomli_w.dumps(table))
        peer = {"address": address, "root-certificates": str(trusted)}
        (self._folder / "config.toml").write_text(tomli_w.dumps({"superlink": {"default": "bench", "bench": peer}}))
        return out

    def _submit(self) -> None:
        done = subprocess.run(
            [str(Path(sys.executable).with_name("flwr")), "run", str(self._folder / "app"), "bench"],
            env=self.deployment.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            check=False,
        )
        if done.returncode:
            raise Aborted(f"flwr run: {done.stdout.strip()[-300:]} {done.stderr.strip()[-300:]}")
