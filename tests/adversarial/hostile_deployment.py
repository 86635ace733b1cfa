"""Real processes under attack: a coordinator and one real site; the other enrolled sites are the test's to play."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import psutil
from flwr.app import Message as FlowerMessage
from flwr.app import RecordDict
from hostile import Setting, identity_of

from accord_client.coordinator import CoordinatorClient
from accord_client.enrolment import enrol
from accord_client.fleet import FleetConnection
from accord_client.keystore import Keys
from accord_client.ledger.ledger import Ledger
from accord_client.rosters import RosterBook
from accord_client.settings import SiteFolder
from accord_server.daemon import Daemon
from accord_server.flower import FastGrid
from accord_server.settings import CoordinatorSettings
from accord_shared import PROTOCOL_VERSION
from accord_shared.cli import initial_weights
from accord_shared.dp.accounting import noise_multiplier
from accord_shared.errors import SitePreparing
from accord_shared.files import write_atomic
from accord_shared.identity import Identity
from accord_shared.messages import Enquiry, Joined, Message, Refusal
from accord_shared.plan import Plan
from accord_shared.roster import Roster, SignedRoster, sign_roster
from accord_shared.secagg.keys import RunTerms
from accord_shared.secagg.masking import word_type
from accord_shared.service import keyfile
from accord_shared.service.pb import accord_pb2 as pb
from accord_shared.signatures import PlanSignature
from accord_shared.vectors import Vector
from accord_shared.wire import decode, encode
from accord_simulations.deployment.material import DATASET, Material, bank_demo, site_policy, site_settings
from accord_simulations.deployment.processes import CALL_S, Deployment, new_root

VICTIM, THIEF, GONE = "bank-01", "bank-02", "bank-03"
"""The real agent; a site that the test plays; and one that it plays, too, until it is revoked."""
PASSPHRASE = "correct-horse-of-this-test"
EPSILON = 20.0
PREPARED_S = 60.0
"""How long a site may prepare the few records of a test."""


@dataclass
class Town:
    """The deployment, and what the attackers have: the folders of all sites but the victim."""

    deployment: Deployment
    material: Material
    roster: SignedRoster
    tokens: list[str] = field(default_factory=list)
    """Secrets that were given out, for the search of the logs."""
    _keys: dict[str, Keys] = field(default_factory=dict)

    @property
    def settings(self) -> CoordinatorSettings:
        return CoordinatorSettings.read(self.deployment.server_folder)

    @property
    def ports(self) -> dict[str, int]:
        listen = self.settings.listen
        return {name: getattr(listen, name) for name in ("fleet", "api", "enrolment", "metrics")}

    @property
    def plan(self) -> Plan:
        return self.material.plan

    def folder(self, name: str) -> SiteFolder:
        return SiteFolder(self.deployment.site_folder(name))

    def keys(self, name: str) -> Keys:
        if name not in self._keys:
            self._keys[name] = Keys.load(self.folder(name))
        return self._keys[name]

    @property
    def authorities(self) -> bytes:
        return (self.deployment.server_folder / "certificates" / "authorities.pem").read_bytes()

    def invite(self, name: str, valid_s: int = 600) -> str:
        with self.deployment.operator() as stub:
            token = str(stub.Invite(pb.InviteRequest(name=name, valid_s=valid_s), timeout=CALL_S).token)
        self.tokens.append(token)
        return token

    def enrolled(self, name: str, identity: Identity | None = None) -> None:
        """Enrol a site and approve it."""
        folder = self.folder(name)
        if identity is not None:
            folder.make()
            write_atomic(folder.keys / "identity.pem", identity.to_pem(PASSPHRASE.encode()), mode=0o600)
        enrol(self.invite(name), folder.path)
        with self.deployment.operator() as stub:
            stub.ApproveSite(pb.SiteName(name=name), timeout=CALL_S)

    def client(self, name: str) -> CoordinatorClient:
        return CoordinatorClient(self.folder(name), self.keys(name))

    def node(self, name: str) -> FleetConnection:
        """A site's connection to the SuperLink."""
        address = f"127.0.0.1:{self.ports['fleet']}"
        memory = self.folder(name).path / "node.json"
        return FleetConnection(address, self.authorities, self.keys(name).node, memory)

    def log(self, name: str) -> str:
        path = self.deployment.logs / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def processes(self) -> list[psutil.Process]:
        """All processes of the coordinator and of the victim."""
        found = []
        for one in (self.deployment.coordinator, self.deployment.agents[VICTIM]):
            found += [psutil.Process(one.pid), *one.others()]
        return found

    def resident(self) -> int:
        return sum(int(process.memory_info().rss) for process in self.processes())

    def resident_of(self, name: str) -> int:
        return int(psutil.Process(self.deployment.agents[name].pid).memory_info().rss)

    def alive(self) -> None:
        """Coordinator, SuperLink and agent answer as if nothing had happened."""
        assert self.deployment.coordinator.running
        assert self.deployment.agents[VICTIM].running
        assert self.deployment.status().superlink
        self.deployment.wait_ready([VICTIM], within_s=30)

    def releases(self) -> list[dict[str, Any]]:
        """What the victim's ledger was charged."""
        ledger = Ledger(self.folder(VICTIM).path)
        ledger.verify()
        return [dict(entry["body"]) for entry in ledger.entries() if entry["kind"] == "release"]

    def charged(self, plan: Plan) -> list[tuple[int, int]]:
        """Rounds and attempts of a plan that were charged."""
        return [(one["round"], one["attempt"]) for one in self.releases() if one["plan"] == plan.hash]

    def approve_plan(self, plan: Plan) -> None:
        with self.deployment.at_site(VICTIM) as stub:
            stub.ApprovePlan(pb.PlanHash(hash=plan.hash), timeout=CALL_S)


@contextmanager
def town() -> Iterator[Town]:
    """A federation that is up: one real agent, two sites that are only keys."""
    before = os.environ.get(keyfile.PASSPHRASE)
    os.environ[keyfile.PASSPHRASE] = PASSPHRASE
    try:
        material = bank_demo(3, records=40, test_records=20, rounds=4, epsilon=EPSILON)
        settings = {"rounds": {"trip_timeout_s": 20.0, "join_timeout_s": 60.0}}
        environment = {keyfile.PASSPHRASE: PASSPHRASE}
        with (
            new_root(None, "accord-hostile-") as root,
            Deployment(root, [VICTIM], federation="hostile", settings=settings, environment=environment) as deployment,
        ):
            deployment.make_coordinator()
            deployment.start_coordinator()
            made = Town(deployment, material, _founded(deployment, material))
            yield made
    finally:
        os.environ.pop(keyfile.PASSPHRASE)
        if before is not None:
            os.environ[keyfile.PASSPHRASE] = before


def _founded(deployment: Deployment, material: Material) -> SignedRoster:
    """Enrol everybody, sign the roster by a key of its own, and start the victim's agent."""
    place: Any = Town(deployment, material, None)  # type: ignore[arg-type]
    place.enrolled(VICTIM)
    for name in (THIEF, GONE):
        place.enrolled(name, identity_of(name))
    folder = place.folder(VICTIM)
    limits = {"delta": material.plan.privacy.delta, "run_epsilon": EPSILON, "run_epsilon_all_collude": 50 * EPSILON}
    policy = site_policy(material.plan, changes={"datasets": {DATASET: limits}})
    write_atomic(folder.settings, site_settings(VICTIM, agent={"poll_s": 0.02, "most_poll_s": 0.2}).encode())
    write_atomic(folder.policy, policy.encode(), mode=0o600)
    material.write_records(VICTIM, folder.path)
    signed = sign_roster(_roster(place, deployment.federation, 1), ROSTER_KEY)
    with deployment.operator() as stub:
        stub.SetRoster(pb.RosterReply(roster=signed.to_json()), timeout=CALL_S)
    with place.client(VICTIM) as client:
        RosterBook(folder, place.keys(VICTIM).identity, VICTIM, deployment.federation).accept(
            signed.roster.hash, client.roster().signed, ()
        )
    deployment.start_agents()
    deployment.wait_ready()
    return signed


ROSTER_KEY = identity_of("roster")


def _roster(place: Town, federation: str, serial: int) -> Roster:
    members = tuple(place.keys(name).member(name) for name in (VICTIM, THIEF, GONE))
    return Roster(federation=federation, serial=serial, minimum=3, colluders=1, members=members)


# --- a coordinator that keeps no rule


@dataclass
class Liar:
    """Everything that a coordinator has: its keys, its SuperLink, and the ear of all sites."""

    town: Town
    daemon: Daemon
    grid: FastGrid
    weights: Vector
    kept: list[tuple[Message, Message]] = field(default_factory=list)
    """Everything that was said to the victim, and its answers."""

    @cached_property
    def identity(self) -> Identity:
        return keyfile.read_identity(self.town.deployment.server_folder / "keys" / "identity.pem")

    def ask(self, message: Message, within_s: float = 30.0) -> Message:
        """The victim's answer to a message, once it has prepared its records."""
        deadline = time.monotonic() + PREPARED_S
        while True:
            reply = self.told(message, within_s)
            assert reply is not None, f"no answer to {type(message).__name__}"
            prepares = isinstance(reply, Refusal) and reply.kind == SitePreparing.__name__
            if not prepares or time.monotonic() > deadline:
                return reply
            time.sleep(0.1)

    def send(self, content: RecordDict) -> Message:
        """The victim's answer to anything at all."""
        reply = self._told(content, 30.0)
        assert reply is not None
        return reply

    def told(self, message: Message, within_s: float) -> Message | None:
        reply = self._told(encode(message), within_s)
        if reply is not None:
            self.kept.append((message, reply))
        return reply

    def _told(self, content: RecordDict, within_s: float) -> Message | None:
        node = self.daemon._sites.nodes()[VICTIM]
        self.town.deployment.wait_for("the victim's node", lambda: node in set(self.grid.get_node_ids()))
        sent = FlowerMessage(content, dst_node_id=node, message_type="train", ttl=within_s)
        (identity,) = self.grid.push_messages([sent])
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            for answer in self.grid.pull_messages([identity]):
                assert not answer.has_error(), answer.error.reason
                return decode(answer.content)
            time.sleep(0.01)
        return None

    def refused(self, message: Message, *kinds: str) -> Refusal:
        """The victim refuses, by one of these errors."""
        reply = self.ask(message)
        assert isinstance(reply, Refusal), reply
        assert reply.kind in kinds, reply
        return reply

    def enquiry(self, plan: Plan, run: str = "run-1", signature: str | None = None, **changes: Any) -> Enquiry:
        """A plan as the coordinator offers it, signed by itself."""
        signed = PlanSignature.of(plan.hash, self.identity).to_json() if signature is None else signature
        fields: dict[str, Any] = {
            "protocol": PROTOCOL_VERSION,
            "run_id": run,
            "plan_json": plan.to_json(),
            "plan_hash": plan.hash,
            "roster_hash": self.town.roster.roster.hash,
            "plan_signature": signed,
        }
        return Enquiry(**(fields | changes))


@contextmanager
def liar(place: Town) -> Iterator[Liar]:
    """The honest coordinator is stopped; another takes over its folder and ports."""
    if place.deployment.coordinator.running:
        assert place.deployment.coordinator.stop() == 0
    daemon = Daemon(place.deployment.server_folder)
    servers = []
    try:
        daemon._start_superlink()
        for server in daemon._servers():
            server.start()
            servers.append(server)
        place.deployment.wait_ready([VICTIM], within_s=60)
        with daemon._superlink.run() as grid:
            yield Liar(place, daemon, grid, np.asarray(initial_weights(place.plan), dtype=np.float32))
    finally:
        for server in servers:
            server.stop(0).wait()
        daemon._superlink.close()
        daemon._process.stop()
        daemon._database.close()


@dataclass(frozen=True)
class DeployedSetting(Setting):
    """Who is there, by the deployment's own roster and plan."""

    plan: Plan | None = None
    signed: SignedRoster | None = None
    parameters: int = 0

    def roster(self) -> Roster:
        assert self.signed is not None
        return self.signed.roster

    def terms(self, run_id: str, roster: Roster) -> RunTerms:
        assert self.plan is not None
        return RunTerms.of(
            self.plan, run_id, roster.hash, len(roster.members), self.parameters, noise_multiplier(self.plan)
        )

    def update(self, name: str, round_number: int) -> Any:
        terms = self.terms("", self.roster())
        return np.zeros(terms.dimension, dtype=word_type(terms.bits))


class AgentStation:
    """The victim, through its SuperLink."""

    def __init__(self, liar: Liar, plan: Plan) -> None:
        self._liar, self._plan = liar, plan

    def join(self, run: Any) -> tuple[bytes, bytes]:
        reply = self._liar.ask(self._liar.enquiry(self._plan, run.terms.run_id))
        assert isinstance(reply, Joined), reply
        return reply.credential, reply.bundle

    def ask(self, message: Message) -> Message:
        reply = self._liar.ask(message)
        if isinstance(reply, Refusal):
            raise reply.error()
        return reply

    def truth(self, round_number: int) -> Any:
        del round_number
