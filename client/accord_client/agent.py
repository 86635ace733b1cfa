"""The site's long-lived process: it is the Flower node, has the model, the data, the keys and the privacy ledger.

One thread works (messages of rounds, one after another), one keeps in touch with the coordinator (presence, clock,
certificate, roster, models), and a local socket serves the operator. It only connects outwards.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
from flwr.app import RecordDict

from accord_client.app import answered
from accord_client.coordinator import CoordinatorClient, check_skew, new_boot
from accord_client.costs import cost_facts
from accord_client.enrolment import Enrolment
from accord_client.fleet import FleetConnection, Incoming
from accord_client.gate import Gate, stamp
from accord_client.keystore import Keys, expiry_warning
from accord_client.plans import PlanRecord
from accord_client.preparation import Preparer
from accord_client.refusals import Causes, Refusals
from accord_client.rosters import RosterBook
from accord_client.settings import SiteFolder, SiteSettings
from accord_client.telemetry import AgentMetrics
from accord_client.workplace import Workplace
from accord_shared.errors import (
    AccordError,
    ClockSkew,
    NotAdmitted,
    PlanNotApproved,
    ProtocolError,
    Refused,
    SessionLost,
    SitePaused,
    SitePreparing,
    Unreachable,
)
from accord_shared.files import only_one, write_atomic
from accord_shared.messages import Enquiry, Message
from accord_shared.service import logs, notify
from accord_shared.service.exposition import exposed
from accord_shared.service.pb import accord_pb2 as pb
from accord_shared.service.pb import accord_pb2_grpc as services
from accord_shared.service.rpc import add_health_and_reflection, local_server, private_folder

log = logging.getLogger(__name__)

HELLO_S = 5.0
RETRY_S = 1.0
"""Pause after a failure to reach the coordinator; it grows to `HELLO_S`."""
LOOK_S = 0.2
"""How often a worker that may not work looks whether it may."""
POLL_SHARE = 0.05
"""Pause between questions, as a part of the time that nothing came: idle sites ask rarely, busy ones at once."""
MOST_RUNS = 64
"""Runs whose plan is remembered, for the operator's status."""
QUIET_S = 10.0
"""Without a message for so long no round is held to be under way here."""


@dataclass
class Standing:
    """How the agent stands, for its threads and its operator."""

    approved: bool = False
    refused: str = ""
    """Why the coordinator does not take this site."""
    greeted: bool = False
    unreachable: str = ""
    skew_s: float = 0.0
    offered: str = ""
    """Hash of the coordinator's roster."""
    paused: bool = False
    training: bool = False
    heard: float = float("-inf")
    """When the last message came (monotonic)."""
    flower: str = ""
    """Why the connection to the SuperLink is not there."""
    hello: threading.Event = field(default_factory=threading.Event)
    """Set to say hello at once."""


class Agent:
    """All parts of a running site."""

    def __init__(self, folder: Path) -> None:
        self._folder = SiteFolder.opened(folder)
        self._settings = SiteSettings.read(self._folder)
        self._keys = Keys.load(self._folder)
        self._enrolment = Enrolment.read(self._folder)
        if self._enrolment.name != self._settings.name:
            log.warning("site.toml names %s: the enrolled name counts", self._settings.name)
        self._client = CoordinatorClient(self._folder, self._keys)
        name, federation = self._enrolment.name, self._enrolment.federation
        self._rosters = RosterBook(self._folder, self._keys.identity, name, federation)
        self._gate = Gate(self._folder, self._enrolment.coordinator.fingerprint, self._settings.data)
        self._workplace = Workplace(
            self._folder, self._settings, name, self._keys.identity, self._rosters, lambda: self._gate.policy
        )
        self.stopping = threading.Event()
        self._preparer = Preparer(self._workplace.prepare, self._workplace.is_prepared, self.stopping.is_set)
        self._refusals = Refusals(self._causes)
        self._plan_of_run: OrderedDict[str, str] = OrderedDict()
        self._metrics = AgentMetrics()
        self._unwanted: set[str] = set()
        """Runs whose models were refused."""
        self.boot = new_boot()
        self.standing = Standing(paused=self._paused_file.exists())

    @property
    def _paused_file(self) -> Path:
        """A pause outlives the process."""
        return self._folder.path / "paused"

    def serve(self) -> None:
        """Until `stopping` is set. The message that is worked on is answered first.

        Raises:
            AccordError: settings, policy, data or model cannot be used.
        """
        self._workplace.check()
        with ExitStack() as stack:
            stack.callback(self._client.close)
            agent = self._settings.agent
            if agent.metrics:
                stack.enter_context(exposed(self._metrics.registry, agent.metrics_host, agent.metrics))
            local = local_server(self._folder.control, "agent", AgentService(self).add_to)
            local.start()
            stack.callback(lambda: local.stop(1.0).wait(5.0))
            threads = [
                threading.Thread(target=self._keep_in_touch, name="touch", daemon=True),
                threading.Thread(target=self._work, name="work", daemon=True),
            ]
            for thread in threads:
                thread.start()
            log.info("the agent is up", extra={"site": self._enrolment.name, "pid": os.getpid()})
            notify.ready(f"site {self._enrolment.name}")
            while not self.stopping.wait(1.0):
                notify.alive()
            notify.stopping("the last message is answered")
            self.standing.hello.set()
            for thread in threads:
                thread.join(60)
            log.info("the agent stops")

    # --- in touch

    def _keep_in_touch(self) -> None:
        pause = RETRY_S
        while not self.stopping.is_set():
            try:
                self._greet()
                pause = HELLO_S
            except NotAdmitted as error:
                self._note_refusal(str(error))
                pause = HELLO_S
            except AccordError as error:
                self._note_unreachable(f"{type(error).__name__}: {error}")
                pause = min(2 * pause, HELLO_S)
            except Exception:
                log.exception("keeping in touch failed")
                pause = HELLO_S
            self.standing.hello.wait(pause)
            self.standing.hello.clear()

    def _greet(self) -> None:
        """Say hello, and see to what the coordinator tells."""
        standing = self.standing
        greeting = self._client.hello(self.boot, self._says(), self._rosters.hash)
        reply = greeting.reply
        if standing.refused or standing.unreachable or not standing.greeted:
            log.info("in touch with the coordinator", extra={"state": reply.state})
        self._note_skew(greeting.skew_s)
        standing.refused = standing.unreachable = ""
        standing.greeted, standing.approved = True, reply.state == "approved"
        standing.offered = reply.roster
        self._metrics.show(standing.skew_s, self._keys.expires.timestamp(), connected=standing.approved)
        if reply.renew and self._may_renew():
            self._client.renew()
            log.info("the certificate is new", extra={"expires": self._keys.expires.isoformat()})
        if reply.roster and self._rosters.hash and reply.roster != self._rosters.hash:
            self._follow_roster()
        for model in reply.models:
            self._fetch(model.run)

    def _may_renew(self) -> bool:
        """A new key is another node: what the old one was asked in this round is lost. Not in a round, but in time."""
        quiet = not self.standing.training and time.monotonic() - self.standing.heard > QUIET_S
        return quiet or self._keys.expires - datetime.now(UTC) < timedelta(days=1)

    def _note_skew(self, skew_s: float) -> None:
        before, now = self._skewed(self.standing.skew_s), self._skewed(skew_s)
        self.standing.skew_s = skew_s
        if now != before:
            log.log(logging.ERROR if now else logging.INFO, "%s", now or "the clock is right again")

    def _skewed(self, skew_s: float) -> str:
        try:
            check_skew(skew_s, self._settings.agent.most_skew_s)
        except ClockSkew as error:
            return str(error)
        return ""

    def _note_refusal(self, reason: str) -> None:
        if self.standing.refused != reason:
            log.error("the coordinator refuses this site: %s", reason)
        self.standing.refused, self.standing.approved = reason, False

    def _note_unreachable(self, reason: str) -> None:
        if self.standing.unreachable != reason:
            log.warning("%s", reason)
        self.standing.unreachable = reason
        self._metrics.show(self.standing.skew_s, self._keys.expires.timestamp(), connected=False)

    def _follow_roster(self) -> None:
        """A later roster is adopted by quorum; what waits for this site's operator is told in the status."""
        offered = self._client.roster()
        if offered.signed is None:
            return
        done = self._rosters.adopt_by_quorum(offered.signed, offered.endorsements)
        if done.adopted:
            log.warning("roster %s is adopted by quorum", offered.signed.roster.hash)

    def _fetch(self, run: str) -> None:
        """Have finished models at hand; one that cannot be had keeps nothing else up, and is not asked for again."""
        if run in self._unwanted:
            return
        try:
            if not (self._folder.model(run) / "model.json").exists():
                fetched = self._client.fetch_model(run)
                self._workplace.end(fetched.plan.hash)
                log.info("the finished model is here", extra={"run": run})
        except Unreachable:
            raise
        except AccordError as error:
            if isinstance(error, Refused):  # not where the disk was full
                self._unwanted.add(run)
            log.warning("the model of run %s is not taken: %s", run, error)

    # --- work

    def _obstacle(self) -> tuple[str, str]:
        """State and reason why this site takes no messages now; empty where it does."""
        standing = self.standing
        if standing.refused:
            return "revoked" if "revoked" in standing.refused else "waiting", standing.refused
        if not standing.greeted:
            return "connecting", standing.unreachable or "no answer of the coordinator yet"
        if not standing.approved:
            return "pending", "the coordinator's operator has not approved this site yet"
        if skewed := self._skewed(standing.skew_s):
            return "waiting", skewed
        return "", ""

    def _work(self) -> None:
        pause = RETRY_S
        while not self.stopping.is_set():
            if self._obstacle()[0]:
                self.stopping.wait(LOOK_S)
                continue
            try:
                with self._connection() as connection:
                    self.standing.flower, pause = "", RETRY_S
                    self._take_messages(connection)
            except (Unreachable, NotAdmitted) as error:
                if self.standing.flower != str(error):
                    log.warning("%s", error)
                self.standing.flower = str(error)
                self.standing.hello.set()
                self.stopping.wait(pause)
                pause = min(2 * pause, HELLO_S)
            except Exception:
                log.exception("the connection to the SuperLink failed")
                self.stopping.wait(HELLO_S)

    @contextmanager
    def _connection(self) -> Iterator[FleetConnection]:
        connection = FleetConnection(
            self._enrolment.fleet_address,
            self._client.authorities,
            self._keys.node,
            self._folder.path / "node.json",
            self._client.proxy,
        )
        try:
            yield connection
        finally:
            connection.close()

    def _take_messages(self, connection: FleetConnection) -> None:
        """Until something stands in the way. A message comes once: its answer is kept until it is delivered."""
        agent, key, self.standing.heard = self._settings.agent, self._keys.node, time.monotonic()
        while not self.stopping.is_set() and not self._obstacle()[0] and self._keys.node is key:
            try:
                incoming = connection.receive()
            except ProtocolError as error:
                log.warning("%s", error)
                continue
            if incoming is not None:
                self._answer(connection, incoming)
                continue
            idle = time.monotonic() - self.standing.heard
            self.stopping.wait(min(max(agent.poll_s, POLL_SHARE * idle), agent.most_poll_s))

    def _answer(self, connection: FleetConnection, incoming: Incoming) -> None:
        began = time.monotonic()
        self.standing.training = True
        try:
            content = answered(self._handle, incoming.content)
        finally:
            self.standing.training = False
        self._metrics.answered(time.monotonic() - began)
        self._deliver(connection, incoming, content)

    def _deliver(self, connection: FleetConnection, incoming: Incoming, content: RecordDict) -> None:
        """Send an answer; through a cut of the network for as long as somebody waits for it.

        Raises:
            NotAdmitted: the SuperLink does not know this node any more.
        """
        metadata = incoming.message.metadata
        until = metadata.created_at + metadata.ttl
        while True:
            try:
                connection.answer(incoming, content)
                return
            except Unreachable as error:
                if time.time() >= until or self.stopping.wait(RETRY_S):
                    log.warning("an answer could not be delivered: %s", error)
                    return
            except NotAdmitted:
                log.warning("an answer is not wanted any more")
                raise

    def _handle(self, message: Message) -> Message:
        """A message of the coordinator, behind the gate."""
        plan_hash = self._plan_hash(message)
        try:
            if self.standing.paused and self._gate.begins_work(message):
                raise SitePaused("this site is paused by its operator")
            self._gate.check(message, datetime.now())
            if isinstance(message, Enquiry):
                self._workplace.note_run(message.plan_hash, message.run_id)
                self._preparer.require(self._gate.book.find(message.plan_hash).parsed)
            reply = self._workplace.site.answer(message)
        except (SessionLost, SitePreparing):  # what follows by itself
            raise
        except AccordError as error:
            refusal = self._refusals.note(plan_hash, error)
            log.warning("refused: %s", refusal.reason, extra={"plan": plan_hash})
            raise
        except Exception as error:  # a fault of this program: what it says may quote records, and goes nowhere
            self._refusals.note(
                plan_hash, AccordError(f"{type(error).__name__}, an internal error: see the agent's log")
            )
            raise
        if self._gate.begins_work(message):
            self._refusals.clear(plan_hash)
        self.standing.heard = time.monotonic()  # what is refused is no reason to look for more at once
        return reply

    def _plan_hash(self, message: Message) -> str:
        """Whose plan's a message is; empty if unknown."""
        run = str(getattr(message, "run_id", ""))
        if isinstance(message, Enquiry):
            self._plan_of_run[run] = message.plan_hash
            while len(self._plan_of_run) > MOST_RUNS:
                self._plan_of_run.popitem(last=False)
        return str(getattr(message, "plan_hash", "")) or self._plan_of_run.get(run, "")

    def _causes(self, plan_hash: str) -> Causes:
        """Whatever a refusal may depend on that changes without a word of the coordinator."""
        folder, data = self._folder, self._settings.data.values()
        named = (folder.path / str(getattr(spec, "path", "")) for spec in data)
        ledger = (folder.path / f"ledger.db{suffix}" for suffix in ("", "-wal"))
        record = folder.plans / f"{plan_hash}.json"
        files = tuple(stamp(path) for path in (folder.policy, record, *ledger, *named))
        try:
            self._gate.policy.check_hours(datetime.now())
            hours = ""
        except AccordError as error:
            hours = type(error).__name__
        return (*files, self._rosters.hash, self.standing.paused, hours)

    def _says(self) -> str:
        """One of the few words that a Hello has for how this site stands: none of them depends on records."""
        if self.standing.paused:
            return "paused"
        if self._preparer.busy:
            return "preparing"
        refusals = self._refusals.standing()
        if any(one.reason.startswith(PlanNotApproved.__name__) for one in refusals):
            return "waiting"
        return "refusing" if refusals else "ready"

    # --- for the operator

    def pause(self, *, on: bool) -> None:
        """Take part in no further round, also after a restart; or do again."""
        if on:
            write_atomic(self._paused_file, b"")
        else:
            self._paused_file.unlink(missing_ok=True)
        self.standing.paused = on
        self.standing.hello.set()
        log.info("paused" if on else "resumed")

    def status(self) -> pb.AgentStatus:
        """How the site stands."""
        standing, refusals = self.standing, self._refusals.standing()
        state, detail = self._obstacle()
        if not state:
            idle = "preparing" if self._preparer.busy else "ready"
            busy = "training" if standing.training else "connecting" if standing.flower else idle
            state = "paused" if standing.paused else busy
            detail = standing.flower or standing.unreachable or (refusals[-1].reason if refusals else "")
        if not self._rosters.hash and state == "ready":
            state, detail = "waiting", "no roster is accepted yet: `accord site roster accept HASH`"
        expires = self._keys.expires
        warning = expiry_warning(expires)
        return pb.AgentStatus(
            name=self._enrolment.name,
            state=state,
            detail=detail,
            coordinator=self._enrolment.api_address,
            skew_s=standing.skew_s,
            certificate_expires_us=int(expires.timestamp() * 1e6),
            roster=self._rosters.hash,
            roster_offered=standing.offered if standing.offered != self._rosters.hash else "",
            warnings=[warning] if warning else [],
            runs=self._workplace.runs(),
            process_id=os.getpid(),
            preparations=[one.info() for one in self._preparer.progress()],
            refusals=[one.info() for one in refusals],
        )

    def approve(self, plan_hash: str) -> pb.PlanInfo:
        """Let a plan begin, and prepare its records at once.

        Raises:
            BadInput, PolicyRefused: as `PlanBook.approve`.
        """
        costed = self.plan(plan_hash)  # before its records take the machine
        record = self._gate.approve(plan_hash)
        self._preparer.start(record.parsed)
        info = record.info()
        info.cost = costed.cost
        return info

    def plan(self, plan_hash: str) -> pb.PlanInfo:
        """A plan that was offered, and what it costs.

        Raises:
            BadInput: as `PlanBook.find`.
        """
        return self._costed(self._gate.find(plan_hash))

    def _costed(self, record: PlanRecord) -> pb.PlanInfo:
        info = record.info()
        info.cost = json.dumps(cost_facts(self._folder, record.parsed))
        return info

    @property
    def gate(self) -> Gate:
        """What stands between the coordinator and the site."""
        return self._gate


class AgentService(services.AgentServicer):
    """For the operator, over the local socket."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def add_to(self, server: grpc.Server) -> None:
        """Serve it."""
        services.add_AgentServicer_to_server(self, server)
        add_health_and_reflection(server, "accord.v1.Agent")

    def Status(self, request: pb.Empty, context: grpc.ServicerContext) -> pb.AgentStatus:  # noqa: N802
        """How the site stands."""
        return self._agent.status()

    def Pause(self, request: pb.Empty, context: grpc.ServicerContext) -> pb.AgentStatus:  # noqa: N802
        """Take part in no further round."""
        self._agent.pause(on=True)
        return self._agent.status()

    def Resume(self, request: pb.Empty, context: grpc.ServicerContext) -> pb.AgentStatus:  # noqa: N802
        """Take part again."""
        self._agent.pause(on=False)
        return self._agent.status()

    def ListPlans(self, request: pb.Empty, context: grpc.ServicerContext) -> pb.PlanList:  # noqa: N802
        """Plans that were ever offered."""
        return pb.PlanList(plans=[record.info() for record in self._agent.gate.records()])

    def ShowPlan(self, request: pb.PlanHash, context: grpc.ServicerContext) -> pb.PlanInfo:  # noqa: N802
        """One of them."""
        return self._agent.plan(request.hash)

    def ApprovePlan(self, request: pb.PlanHash, context: grpc.ServicerContext) -> pb.PlanInfo:  # noqa: N802
        """Let one begin."""
        return self._agent.approve(request.hash)


def run(folder: Path, log_level: str = "INFO") -> None:
    """Run the agent of a folder until SIGTERM or SIGINT.

    Raises:
        AccordError: it cannot start.
    """
    os.umask(0o077)
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    site = SiteFolder.opened(folder)
    private_folder(site.path)
    logs.configure(log_level)
    with only_one(site.path / "agent.lock", f"the agent of {folder}"):
        agent = Agent(folder)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: agent.stopping.set())
        with contextlib.suppress(KeyboardInterrupt):
            agent.serve()
