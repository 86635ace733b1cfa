"""Simulated participants in Ray's actors: the deployed `Site`, fed from the run's work folder.

Actors are interchangeable, so nothing of a participant lives in them: records and embeddings are read from
the work folder (memory-mapped), what was spent and released is written there, as on a real site's disk.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from flwr.app import Context

from accord_client.data import Examples
from accord_client.features import FeatureCache
from accord_client.site import Site
from accord_client.store import SiteStore
from accord_client.trainer import Runtime
from accord_client.workspace import Workspace
from accord_shared.files import make_private, open_private, write_atomic
from accord_shared.messages import Message
from accord_shared.plan import Plan
from accord_simulations.faults import Faults, FaultSpec
from accord_simulations.vault import VaultAddress, VaultMembers


@dataclass(frozen=True)
class WorkFolder:
    """Where one simulated federation keeps its participants. Small: it travels with every message."""

    root: Path
    cache: Path
    participants: int
    seed: int
    runtime: Runtime
    faults: FaultSpec
    noise_multiplier: float
    """σ of the plan, calibrated once by the harness for all its processes."""
    durable: bool = True
    vault: VaultAddress | None = None
    """Where the participants keep the secrets of secure aggregation; none where the plan does without."""
    trips: int = 1
    """Trips of a round."""

    def store(self, index: int) -> SiteStore:
        """The durable state of participant `index` (from 0)."""
        return SiteStore(self.root / "sites" / f"{index:04d}", durable=self.durable)

    def _records(self, index: int) -> Path:
        return self.root / "records" / f"{index:04d}.json"

    def put_records(self, index: int, name: str, examples: Examples) -> None:
        """Give participant `index` its records."""
        make_private(self.root / "records")
        value = {
            "name": name,
            "texts": examples.texts,
            "labels": examples.labels.tolist(),
            "units": examples.units.tolist(),
        }
        write_atomic(self._records(index), json.dumps(value).encode(), mode=0o600)

    def records(self, index: int) -> tuple[str, Examples]:
        """Name and records of participant `index`."""
        value = json.loads(self._records(index).read_text())
        return value["name"], Examples(
            texts=tuple(value["texts"]),
            labels=np.asarray(value["labels"], dtype=np.int64),
            units=np.asarray(value["units"], dtype=np.int64),
        )

    def note_busy(self, index: int, start_s: float, end_s: float) -> None:
        """Append when a participant was at work: the harness' clock, never released."""
        folder = make_private(self.root / "busy")
        with open_private(folder / f"{os.getpid()}.csv", "a") as file:
            file.write(f"{index},{start_s:.6f},{end_s:.6f}\n")

    def busy(self) -> list[tuple[int, float, float]]:
        """(participant, start, end) of all work so far, in seconds since the epoch."""
        rows = []
        for path in sorted((self.root / "busy").glob("*.csv")):
            for line in path.read_text().splitlines():
                index, start, end = line.split(",")
                rows.append((int(index), float(start), float(end)))
        return rows


@lru_cache(maxsize=4)
def _workspace(plan_json: str, cache: Path, runtime: Runtime) -> Workspace:
    """One workspace per process and plan: all participants of an actor train in the same model object."""
    return Workspace(Plan.from_json(plan_json), FeatureCache(cache), runtime)


@lru_cache(maxsize=2048)
def make_site(work: WorkFolder, index: int) -> Site:
    """The site of participant `index`, once per process."""
    name, examples = work.records(index)
    return Site(
        name,
        store=work.store(index),
        workspace_of=lambda plan: _workspace(plan.to_json(), work.cache, work.runtime),
        examples_of=lambda _: examples,
        noise_multiplier_of=lambda _: work.noise_multiplier,
        members=VaultMembers(work.vault, index) if work.vault is not None else None,
        least_secure_aggregation="off",
        accept_without_privacy=True,  # simulated participants have nothing to lose
    )


@dataclass(frozen=True)
class ParticipantHandler:
    """What Flower calls for a node: its participant, behind its faults, with a clock around."""

    work: WorkFolder

    def __call__(self, context: Context) -> ParticipantCall:
        """The handler of the node that `context` names."""
        return ParticipantCall(self.work, int(context.node_config["partition-id"]))


@dataclass(frozen=True)
class ParticipantCall:
    """One participant's answer to one message."""

    work: WorkFolder
    index: int

    def __call__(self, message: Message) -> Message:
        """Answer `message`, or fail as the scenario wants."""
        site = make_site(self.work, self.index)
        faults = Faults(self.work.faults, self.work.seed, self.index, self.work.participants, self.work.trips)
        start = time.time()
        try:
            return faults.handle(site.handle, message)
        finally:
            self.work.note_busy(self.index, start, time.time())
