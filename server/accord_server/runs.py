"""The runs of a coordinator: each a thread that drives `Coordinator` to its end, through restarts of everything."""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from safetensors.numpy import save
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from accord_server.absent import absent
from accord_server.aggregation import Aggregation, PlainAggregation
from accord_server.app import FlowerExchange, Timing
from accord_server.audit import AuditLog
from accord_server.backoff import Backoff
from accord_server.checkpoint import Begun, CheckpointFolder, Seal
from accord_server.database import Database, ReceiptRow, RoundRow, RunRow
from accord_server.flower import SuperLink
from accord_server.metrics import Metrics
from accord_server.rosters import Rosters
from accord_server.rounds import Coordinator, Hooks, RoundReport
from accord_server.secagg import SecureAggregation
from accord_server.settings import CoordinatorFolder, CoordinatorSettings
from accord_server.sites import ONLINE_S, Sites
from accord_server.witness import Witness
from accord_shared import PROTOCOL_VERSION
from accord_shared.canonical import decimal_string
from accord_shared.dp.accounting import noise_multiplier
from accord_shared.errors import (
    AccordError,
    AlreadyRunning,
    BadInput,
    Interrupted,
    OutputError,
    PlanError,
    RosterError,
    Unreachable,
)
from accord_shared.files import make_folder, write_atomic
from accord_shared.identity import Identity
from accord_shared.messages import Enquiry
from accord_shared.plan import Plan
from accord_shared.roster import Roster
from accord_shared.service.pb import accord_pb2 as pb
from accord_shared.signatures import PlanSignature, SignedModel
from accord_shared.vectors import Vector, check_finite

log = logging.getLogger(__name__)

ACTIVE = ("waiting", "running")
OVER = ("finished", "given-up")
GRACE_S = 10.0
ASK_AGAIN_S = 0.5
REST_S = 2.0
"""Pause after the first attempt at a round that came to nothing."""
RETRY_S = 1.0
"""First pause before a run goes on after the SuperLink, the disk or the database failed."""
MOST_RETRY_S = 30.0
LOOK_S = 0.5
"""How soon a run that waits sees that it is to stop."""
NODES_S = 15.0
"""For how long Flower's list of nodes is held, unless sites are let in or out."""
LINK_FAULTS = (httpx.HTTPError, ConnectionError, Unreachable)
OWN_FAULTS = (OutputError, AlreadyRunning, SQLAlchemyError, OSError)
"""Of the coordinator's disk or database: no site hears of them, and a run waits until they are over."""


class SitePresence:
    """`Presence` from what the sites say over their own connection."""

    def __init__(self, sites: Sites, most_skew_s: float) -> None:
        self._sites = sites
        self._most_skew_s = most_skew_s
        self._names: dict[int, str] = {}
        self._read_at, self._read_of = float("-inf"), -1
        self._seen = sites.changes

    def name_of(self, node: int) -> str:
        """The approved site of a node; empty for a node of none."""
        now, changes = time.monotonic(), self._sites.changes
        if changes != self._read_of or now - self._read_at > NODES_S:  # a site may be revoked, or have a new key
            self._read_at, self._read_of = now, changes
            try:
                self._names = {number: name for name, number in self._sites.nodes().items()}
            except OutputError as error:  # nobody is let in or out while the database is away
                log.warning("the sites' nodes are not read anew: %s", error)
        return self._names.get(node, "")

    def boot(self, site: str) -> str:
        """The agent that was heard of last."""
        return self._sites.presence(site).boot if site else ""

    def heard(self, site: str) -> float | None:
        """When it last said hello (monotonic)."""
        return self._sites.presence(site).heard

    def is_there(self, site: str) -> bool:
        """Heard of lately, not paused by its operator, and with a clock that lets it answer."""
        if not site:
            return False
        known = self._sites.presence(site)
        lately = time.monotonic() - known.heard <= ONLINE_S
        return lately and known.state != "paused" and abs(known.skew_s) <= self._most_skew_s

    def wait(self, seconds: float) -> bool:
        """Until a site comes, goes on, or is let in or out."""
        before, self._seen = self._seen, self._sites.wait(self._seen, seconds)
        return self._seen != before


@dataclass
class _Active:
    """A run whose thread is alive."""

    thread: threading.Thread | None = None
    stopping: threading.Event = field(default_factory=threading.Event)
    """Stop now."""
    by_operator: bool = False
    trouble: str = ""
    """What it waits for that its row in the database cannot tell of."""
    exchange: FlowerExchange | None = None

    def join(self, seconds: float) -> None:
        """Wait for the thread's end."""
        if self.thread is not None:
            self.thread.join(max(0.0, seconds))


class Runs:
    """Starts, stops, resumes and shows runs. State is in the database, models and checkpoints in the folder."""

    def __init__(
        self,
        database: Database,
        audit: AuditLog,
        folder: CoordinatorFolder,
        settings: CoordinatorSettings,
        identity: Identity,
        superlink: SuperLink,
        sites: Sites,
        rosters: Rosters,
        metrics: Metrics,
        claim: Callable[[], None] = lambda: None,
    ) -> None:
        """`claim` raises where the runs of the database are not (any more) this process' to drive."""
        self._database, self._audit, self._folder, self._settings = database, audit, folder, settings
        self._identity, self._superlink, self._sites = identity, superlink, sites
        self._rosters, self._metrics, self._claim = rosters, metrics, claim
        self._active: dict[str, _Active] = {}
        self._lock = threading.RLock()
        self._changed = threading.Condition()
        self._draining = threading.Event()
        self._witnesses: dict[str, Witness] = {}
        self._documents: dict[str, SignedModel] = {}
        """Of finished runs: every hello of a site asks for them."""
        self._round_began: dict[str, float] = {}
        self._known: dict[str, pb.RunInfo] = {}
        """As the database had them when it last answered."""
        self._receipts_due = False

    # --- for the operator

    def start(self, request: pb.StartRunRequest) -> pb.RunInfo:
        """Begin a new run of a plan.

        Raises:
            PlanError: it is malformed, or needs a roster that is not there or too small.
            ImpostorError: the signature does not verify.
            BadInput: the initial weights do not fit, or the plan has a run that is not at its end, or rounds of it
                that nobody answers again.
        """
        plan = Plan.from_json(request.plan)
        self._check_roster(plan)
        signature = PlanSignature.from_json(request.signature) if request.signature else None
        signature = signature or PlanSignature.of(plan.hash, self._identity)
        signature.verify(plan.hash)
        initial = _initial(request.initial)
        run = f"{plan.run.name}-{secrets.token_hex(4)}"
        folder = self._folder.runs / run
        now = _now_us()
        row = RunRow(
            run=run,
            name=plan.run.name,
            plan_hash=plan.hash,
            plan=plan.to_json(),
            signature=signature.to_json(),
            state="waiting",
            rounds=plan.run.rounds,
            started_us=now,
            changed_us=now,
        )
        with self._lock:
            try:
                with self._database.session() as session:
                    self._write_new(session, plan, folder, initial)
                    session.add(row)
                    self._audit.add(session, "run.started", run, plan=plan.hash, signer=signature.key.fingerprint)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            self._known[run] = _info(row)
            self._launch(run)
        return self.info(run)

    def _write_new(self, session: Session, plan: Plan, folder: Path, initial: Vector) -> None:
        """A new run's folder, unless another run of the plan is in its way."""
        before = session.scalars(select(RunRow).where(RunRow.plan_hash == plan.hash)).all()
        for other in before:
            if other.state not in OVER:
                raise BadInput(
                    f"run {other.run} of this plan is not at its end: resume it, give it up, or change the plan's name"
                )
        given_up = [row.run for row in before if row.state == "given-up"]
        spent = max((CheckpointFolder(self._checkpoints(name)).begun().round for name in given_up), default=0)
        if spent >= plan.run.rounds:
            raise BadInput(f"all {spent} rounds of this plan were begun by runs that were given up: change its name")
        make_folder(folder)
        write_atomic(folder / "initial.f32", initial.astype("<f4").tobytes())
        write_atomic(folder / "plan.json", plan.to_json().encode())
        if spent:  # sites answer none of these again
            CheckpointFolder(folder / "checkpoint").begin(Begun(spent, closed=True))

    def _checkpoints(self, run: str) -> Path:
        return self._folder.runs / run / "checkpoint"

    def _check_roster(self, plan: Plan) -> None:
        if plan.secure_aggregation.mode == "off":
            return
        try:
            roster = self._rosters.roster
        except RosterError as error:
            raise PlanError(str(error)) from None
        plan.check_roster(len(roster.members))

    def stop(self, run: str) -> pb.RunInfo:
        """Stop a run; `resume` continues it at the round that it was in.

        Raises:
            BadInput: there is no such run, or it is not active.
        """
        self.info(run)
        with self._lock:
            active = self._active.get(run)
            if active is None:
                raise BadInput(f"run {run} is not active")
            active.by_operator = True
            active.stopping.set()
        active.join(30)
        return self.info(run)

    def resume(self, run: str) -> pb.RunInfo:
        """Continue a run that was stopped or aborted.

        Raises:
            BadInput: there is no such run, it is active, at its end, or given up.
        """
        info = self.info(run)
        with self._lock:
            self._check_idle(info)
            with self._database.session() as session:
                row = session.get_one(RunRow, run)
                row.state, row.detail, row.changed_us = "waiting", "resumed by the operator", _now_us()
                self._audit.add(session, "run.resumed", run, round=info.round)
            self._launch(run)
        return self.info(run)

    def give_up(self, run: str) -> pb.RunInfo:
        """End a run that was stopped or aborted for good: it can not be resumed, and its plan may have a new one.

        Raises:
            BadInput: there is no such run, it is active, at its end, or given up.
        """
        info = self.info(run)
        with self._lock:
            self._check_idle(info)
            with self._database.session() as session:
                row = session.get_one(RunRow, run)
                row.detail = f"by the operator, was {info.state}: {row.detail}"[:500].rstrip(": ")
                row.state, row.changed_us = "given-up", _now_us()
                self._audit.add(session, "run.given-up", run, round=info.round)
        self._tell()
        return self.info(run)

    def _check_idle(self, info: pb.RunInfo) -> None:
        if info.state in OVER:
            raise BadInput(f"run {info.run} is {'at its end' if info.state == 'finished' else 'given up'}")
        if info.run in self._active:
            raise BadInput(f"run {info.run} is active")

    def info(self, run: str) -> pb.RunInfo:
        """One run.

        Raises:
            BadInput: there is none of this name.
        """
        found = next((info for info in self.all() if info.run == run), None)
        if found is None:
            raise BadInput(f"there is no run {run[:64]!r}")
        return found

    def all(self) -> tuple[pb.RunInfo, ...]:
        """All runs, oldest first. While the database is away: as they were, and what each that is active waits for.

        Raises:
            OutputError: the database is away, and was since this process began.
        """
        try:
            with self._database.session() as session:
                rows = session.scalars(select(RunRow).order_by(RunRow.started_us)).all()
                found = {row.run: _info(row) for row in rows}
        except OutputError:
            with self._lock:
                found = dict(self._known)
            if not found:
                raise
        with self._lock:
            self._known = found
            shown = tuple(self._as_it_is(info) for info in found.values())
        with suppress(OutputError):  # while the database is away nobody is named
            for info in shown:
                self._name_absent(info)
        return shown

    def _name_absent(self, info: pb.RunInfo) -> None:
        """Of an active run: who does not take part now, and why."""
        active = self._active.get(info.run)
        exchange = active.exchange if active is not None else None
        if exchange is None:
            return
        hashed = exchange.enquiry.roster_hash
        members = self._rosters.roster.members if hashed else ()
        wanted = [member.name for member in members] if hashed else sorted(self._sites.states())
        info.absent.extend(
            absent(
                wanted,
                self._sites,
                joined=set(exchange.sites()),
                failed=set(exchange.doubted()),
                refusals=dict(exchange.refused),
                roster=hashed,
                most_skew_s=self._settings.clock.most_skew_s,
                now=time.time(),
            )
        )

    def _as_it_is(self, known: pb.RunInfo) -> pb.RunInfo:
        """What the database says, corrected by what this process knows: only a run that has a thread is active."""
        info = pb.RunInfo()
        info.CopyFrom(known)
        active = self._active.get(info.run)
        if active is not None and active.trouble:
            info.state, info.detail = "waiting", active.trouble
        elif active is None and info.state in ACTIVE and not self._draining.is_set():
            info.state, info.detail = "stopped", "nobody drives it: `accord server resume` goes on"
        return info

    def watch(self, run: str, is_heard: Callable[[], bool]) -> Iterator[pb.RunEvent]:
        """Where a run stands, then each change with the rounds that were finished, until it is not active."""
        shown, last = 0, b""
        while is_heard():
            info = self.info(run)
            for number, report in self._reports(run, shown):
                shown = number
                yield pb.RunEvent(info=info, report=report)
            if info.SerializeToString(deterministic=True) != last:
                last = info.SerializeToString(deterministic=True)
                yield pb.RunEvent(info=info)
            if info.state not in ACTIVE:
                return
            with self._changed:
                self._changed.wait(1.0)

    def _reports(self, run: str, after: int) -> list[tuple[int, str]]:
        query = select(RoundRow).where(RoundRow.run == run, RoundRow.round > after).order_by(RoundRow.round)
        try:
            with self._database.session() as session:
                return [(row.round, row.report) for row in session.scalars(query)]
        except OutputError:  # later
            return []

    # --- for the sites

    def models(self, site: str) -> list[pb.ModelInfo]:
        """Finished models that a site took part in, and that are still on the disk."""
        query = select(RunRow).where(RunRow.state == "finished").order_by(RunRow.changed_us)
        with self._database.session() as session:
            rows = [row for row in session.scalars(query) if site in json.loads(row.sites)]
        found = [(row, self._document(row.run)) for row in rows]
        return [
            pb.ModelInfo(
                run=row.run,
                name=row.name,
                plan_hash=row.plan_hash,
                digest=signed.digest,
                finished_us=row.changed_us,
            )
            for row, signed in found
            if signed is not None
        ]

    def model(self, site: str, run: str) -> tuple[SignedModel, bytes]:
        """A finished model and its tensors file.

        Raises:
            BadInput: there is none that this site took part in.
        """
        signed = self._document(run) if run in {info.run for info in self.models(site)} else None
        if signed is None:
            raise BadInput(f"there is no finished model of run {run[:64]!r} for this site")
        return signed, (self._folder.runs / run / "model" / "weights.safetensors").read_bytes()

    def _document(self, run: str) -> SignedModel | None:
        """What is signed of a model; None: it is lost, which keeps no site from saying hello."""
        if run in self._documents:
            return self._documents[run]
        try:
            self._documents[run] = SignedModel.from_json(
                (self._folder.runs / run / "model" / "model.json").read_bytes()
            )
        except (OSError, AccordError) as error:
            log.warning("the model of a finished run cannot be read: %s", type(error).__name__, extra={"run": run})
            return None
        return self._documents[run]

    # --- for the daemon

    def resume_all(self) -> None:
        """Continue what was active when the coordinator stopped."""
        with self._database.session() as session:
            active = session.scalars(select(RunRow).where(RunRow.state.in_(ACTIVE)).order_by(RunRow.started_us)).all()
            for row in active:
                self._audit.add(session, "run.continued", row.run, round=row.round)
        for row in active:
            log.info("the run goes on", extra={"run": row.run, "round": row.round})
            self._launch(row.run)

    def drain(self, seconds: float) -> None:
        """Let rounds come to their end for so long, then stop; active runs stay active in the database."""
        self._draining.set()
        with self._lock:
            active = list(self._active.values())
        deadline = time.monotonic() + seconds
        for one in active:
            one.join(deadline - time.monotonic())
        for one in active:
            one.stopping.set()
        for one in active:
            one.join(10)

    # --- a run's thread

    def _launch(self, run: str) -> None:
        with self._lock:
            active = self._active[run] = _Active()
            active.thread = threading.Thread(target=self._drive, args=(run, active), name=f"run-{run}", daemon=True)
            active.thread.start()

    def _drive(self, run: str, active: _Active) -> None:
        try:
            try:
                state, detail = self._until_done(run, active)
            except BaseException as error:
                log.exception("the run failed", extra={"run": run})
                state, detail = "aborted", f"internal error: {type(error).__name__}"
            if state:
                self._end(run, active, state, detail)
        finally:
            with self._lock:
                self._active.pop(run, None)
            self._tell()

    def _until_done(self, run: str, active: _Active) -> tuple[str, str]:
        """State and detail at the end; an empty state where the coordinator stops and the run does not."""
        backoff = Backoff(RETRY_S, MOST_RETRY_S)
        while True:
            try:
                return "finished", self._attempt(run, active)
            except Interrupted:
                break
            except LINK_FAULTS as error:
                self._trouble(run, active, f"for the SuperLink ({type(error).__name__})")
            except FileNotFoundError as error:
                return "aborted", f"a file of the run is missing: {Path(str(error.filename)).name}"
            except OWN_FAULTS as error:
                self._trouble(run, active, _own_fault(error))
            except AccordError as error:
                if self._draining.is_set():  # its sites may be stopping too: the next start tries again
                    break
                log.error("the run aborted: %s", error, extra={"run": run})
                return "aborted", f"{type(error).__name__}: {error}"
            if self._to_stop(active, backoff.pause_s()):
                break
        return ("stopped", "by the operator") if active.by_operator else ("", "")

    def _trouble(self, run: str, active: _Active, what: str) -> None:
        """The run waits for something of the coordinator's own; its row cannot say so where that is the database."""
        log.warning("the run waits %s", what, extra={"run": run})
        active.trouble = what[:500]
        self._tell()

    def _to_stop(self, active: _Active, seconds: float) -> bool:
        """After a pause, or as soon as the run or the coordinator is to stop."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if self._draining.is_set() or active.stopping.wait(min(left, LOOK_S)):
                return True
        return False

    def _kept(self, run: str, active: _Active, write: Callable[[], None]) -> None:
        """Write what must not be lost: what sites released is theirs no more. Again for as long as it fails.

        Raises:
            Interrupted: the run was asked to stop before it could be written.
        """
        backoff = Backoff(RETRY_S, MOST_RETRY_S)
        while True:
            try:
                self._claim()
                write()
            except OWN_FAULTS as error:
                self._trouble(run, active, _own_fault(error))
                if active.stopping.wait(backoff.pause_s()):
                    raise Interrupted("asked to stop while a round could not be written") from None
            else:
                active.trouble = ""
                return

    def _end(self, run: str, active: _Active, state: str, detail: str) -> None:
        """Note how the run ended, for as long as that fails and this process is there."""
        backoff = Backoff(RETRY_S, MOST_RETRY_S)
        while True:
            try:
                with self._database.session() as session:
                    row = session.get_one(RunRow, run)
                    row.state, row.detail, row.changed_us = state, detail[:500], _now_us()
                    self._audit.add(session, f"run.{state}", run, detail=detail)
            except OWN_FAULTS as error:
                self._trouble(run, active, f"to be noted as {state}, {_own_fault(error)}")
                if self._draining.wait(backoff.pause_s()):
                    return
            else:
                return

    def _attempt(self, run: str, active: _Active) -> str:
        """Drive a run from its last checkpoint to its end; why that came before its last round, if so."""
        self._claim()
        with self._database.session() as session:
            row = session.get_one(RunRow, run)
        plan = Plan.from_json(row.plan)
        folder = self._folder.runs / run
        initial = _initial((folder / "initial.f32").read_bytes())
        secured = plan.secure_aggregation.mode != "off"
        roster = self._rosters.roster if secured else None
        coordinator = Coordinator(
            plan,
            run,
            initial,
            aggregation=self._aggregation(plan, roster, len(initial)),
            checkpoints=CheckpointFolder(self._checkpoints(run), self._seal()),
            observer=lambda report, weights: self._observe(run, active, report),
            hooks=Hooks(
                guard=partial(self._guard, run),
                keep=partial(self._kept, run, active),
                in_vain=partial(self._note_in_vain, run),
            ),
        )
        self._catch_up(run, coordinator.history)
        weights = coordinator.weights
        if coordinator.finished_rounds < plan.run.rounds:
            roster_hash = roster.hash if roster is not None else ""
            enquiry = Enquiry(
                PROTOCOL_VERSION,
                run,
                row.plan,
                row.plan_hash,
                roster_hash,
                plan_signature=row.signature,
                noise_multiplier=decimal_string(noise_multiplier(plan)),
            )
            weights = self._train(run, active, plan, enquiry, coordinator)
        self._finish(run, plan, coordinator, weights)
        return coordinator.ended

    def _train(self, run: str, active: _Active, plan: Plan, enquiry: Enquiry, coordinator: Coordinator) -> Vector:
        """The rounds that are left."""
        rounds = self._settings.rounds
        timing = Timing(
            rounds.trip_timeout_s, rounds.join_timeout_s, grace_s=GRACE_S, ask_again_s=ASK_AGAIN_S, rest_s=REST_S
        )
        self._set(run, active, "waiting", f"for {plan.cohort.minimum} sites")
        with self._superlink.run() as grid:
            exchange = FlowerExchange(
                grid,
                timing,
                active.stopping.is_set,
                enquiry,
                SitePresence(self._sites, self._settings.clock.most_skew_s),
                self._draining.is_set,
            )
            active.exchange = exchange
            exchange.join(plan.cohort.minimum, plan.cohort.size)
            self._set(run, active, "running", f"{len(exchange.sites())} sites")
            self._round_began[run] = time.monotonic()
            return coordinator.run(exchange)

    def _guard(self, run: str, number: int, attempt: int) -> None:
        """Before sites are asked: the runs are still ours to drive, and what comes of this one can be written."""
        self._claim()
        with self._database.session() as session:
            row = session.get_one(RunRow, run)
            row.changed_us = _now_us()
            if attempt > 1:
                row.detail = f"attempt {attempt} at round {number}"

    def _note_in_vain(self, run: str, number: int, attempt: int) -> None:
        self._metrics.aborted.inc()
        log.warning("attempt %d at round %d came to nothing", attempt, number, extra={"run": run})

    def _aggregation(self, plan: Plan, roster: Roster | None, dimension: int) -> Aggregation:
        if roster is None:
            return PlainAggregation(plan.extra_coordinates)
        return SecureAggregation(plan, roster, dimension, noise_multiplier(plan), witness=self._witness(roster))

    def _witness(self, roster: Roster) -> Witness:
        """One for all runs of a roster, with the receipts that the database has."""
        with self._lock:
            if roster.hash not in self._witnesses:
                witness = Witness(roster, self._keep_receipts)
                names = {member.name for member in roster.members}
                with self._database.session() as session:
                    rows = session.scalars(select(ReceiptRow)).all()
                witness.restore(json.dumps({row.site: row.receipt for row in rows if row.site in names}))
                self._witnesses[roster.hash] = witness
            return self._witnesses[roster.hash]

    def _keep_receipts(self, text: str) -> None:
        """In mid-attempt: a database that fails costs no attempt, and is told with the round's end."""
        try:
            self._write_receipts(text)
            self._receipts_due = False
        except OutputError as error:
            log.warning("receipts of ledgers are written later: %s", error)
            self._receipts_due = True

    def _write_receipts(self, text: str) -> None:
        with self._database.session() as session:
            known = {row.site: row for row in session.scalars(select(ReceiptRow))}
            for site, receipt in json.loads(text).items():
                if site not in known:
                    session.add(ReceiptRow(site=site, receipt=receipt, changed_us=_now_us()))
                elif known[site].receipt != receipt:
                    known[site].receipt, known[site].changed_us = receipt, _now_us()

    def _seal(self) -> Seal | None:
        if not self._settings.rounds.encrypt_checkpoints:
            return None
        return Seal(AESGCM(self._identity.derive(b"checkpoint")))

    def _observe(self, run: str, active: _Active, report: RoundReport) -> None:
        """After each round's checkpoint.

        Raises:
            Interrupted: the coordinator is stopping.
        """
        self._kept(run, active, lambda: self._write_rounds(run, [report.to_json()], report.round))
        if self._receipts_due:
            with self._lock:
                witnesses = list(self._witnesses.values())
            for witness in witnesses:
                witness.keep()
        self._count(run, report)
        log.info("round %d is done", report.round, extra={"run": run, "survivors": len(report.survivors)})
        self._tell()
        if self._draining.is_set():
            raise Interrupted("the coordinator is stopping")

    def _catch_up(self, run: str, history: Sequence[Mapping[str, Any]]) -> None:
        """Tell the database of rounds that were finished when it was away or the coordinator died."""
        with self._database.session() as session:
            known = set(session.scalars(select(RoundRow.round).where(RoundRow.run == run)))
            before = session.get_one(RunRow, run).round
        missing = [report for report in history if report["round"] not in known]
        if missing or before != len(history):
            self._write_rounds(run, missing, len(history))
        if before > len(history):
            self._audit.note("run.fell-back", run, round=len(history), was=before)

    def _write_rounds(self, run: str, reports: Sequence[Mapping[str, Any]], reached: int) -> None:
        now = _now_us()
        with self._database.session() as session:
            row = session.get_one(RunRow, run)
            row.round, row.changed_us = reached, now
            for report in reports:
                number, survivors = int(report["round"]), list(report["survivors"])
                row.metrics = json.dumps(dict(report["released"]))
                row.sites = json.dumps(sorted({*json.loads(row.sites), *survivors}))
                row.detail = f"{len(survivors)} of {report['cohort']} sites finished round {number}"
                session.merge(RoundRow(run=run, round=number, report=json.dumps(dict(report)), finished_us=now))
                self._audit.add(
                    session,
                    "round.finished",
                    run,
                    round=number,
                    survivors=survivors,
                    aborted_attempts=report["aborted_attempts"],
                )

    def _count(self, run: str, report: RoundReport) -> None:
        now = time.monotonic()
        if run in self._round_began:
            self._metrics.round_s.observe(now - self._round_began[run])
        self._round_began[run] = now
        self._metrics.rounds.inc()
        self._metrics.upload.inc(report.upload_bytes)
        self._metrics.download.inc(report.download_bytes)

    def _finish(self, run: str, plan: Plan, coordinator: Coordinator, weights: Vector) -> None:
        """Sign the model. A run whose coordinator died just here is finished anew from its last checkpoint."""
        folder = self._folder.runs / run / "model"
        make_folder(folder)
        data = save({"weights": np.ascontiguousarray(weights, dtype=np.float32)})
        history = coordinator.history
        signed = SignedModel(
            run=run,
            name=plan.run.name,
            plan=plan.to_json(),
            plan_hash=plan.hash,
            digest=hashlib.sha256(data).hexdigest(),
            rounds=coordinator.finished_rounds,
            finished=datetime.now(UTC).isoformat(timespec="seconds"),
            metrics=history[-1]["released"] if history else {},
        ).signed(self._identity)
        write_atomic(folder / "weights.safetensors", data)
        write_atomic(folder / "model.json", signed.to_json().encode())
        log.info("the run is finished", extra={"run": run, "rounds": coordinator.finished_rounds})

    def _set(self, run: str, active: _Active, state: str, detail: str) -> None:
        with self._database.session() as session:
            row = session.get_one(RunRow, run)
            row.state, row.detail, row.changed_us = state, detail[:500], _now_us()
        active.trouble = ""
        self._tell()

    def _tell(self) -> None:
        with self._changed:
            self._changed.notify_all()


def _initial(data: bytes) -> Vector:
    """Raw little-endian float32.

    Raises:
        BadInput: empty, or not whole numbers of four bytes.
        NonFinite: NaN or infinity.
    """
    if not data or len(data) % 4:
        raise BadInput("the initial weights are not little-endian float32")
    weights = np.frombuffer(data, dtype="<f4").astype(np.float32)
    check_finite(weights, "the initial weights")
    return weights


def _own_fault(error: BaseException) -> str:
    line = str(error) if isinstance(error, AccordError) else f"{type(error).__name__} {getattr(error, 'strerror', '')}"
    return f"for the coordinator's disk or database: {line}"


def _info(row: RunRow) -> pb.RunInfo:
    return pb.RunInfo(
        run=row.run,
        name=row.name,
        plan_hash=row.plan_hash,
        state=row.state,
        round=row.round,
        rounds=row.rounds,
        detail=row.detail,
        started_us=row.started_us,
        changed_us=row.changed_us,
        metrics=row.metrics,
    )


def _now_us() -> int:
    return time.time_ns() // 1000
