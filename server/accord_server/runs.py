"""The runs of a coordinator: each a thread that drives `Coordinator` to its end, through restarts of everything."""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

import httpx
import numpy as np
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from safetensors.numpy import save
from sqlalchemy import select

from accord_server.aggregation import Aggregation, PlainAggregation
from accord_server.app import FlowerExchange, Timing
from accord_server.audit import AuditLog
from accord_server.checkpoint import CheckpointFolder, Seal
from accord_server.database import Database, ReceiptRow, RoundRow, RunRow
from accord_server.flower import SuperLink
from accord_server.metrics import Metrics
from accord_server.rosters import Rosters
from accord_server.rounds import Coordinator, RoundReport
from accord_server.secagg import SecureAggregation
from accord_server.settings import CoordinatorFolder, CoordinatorSettings
from accord_server.sites import Sites
from accord_server.witness import Witness
from accord_shared import PROTOCOL_VERSION
from accord_shared.canonical import decimal_string
from accord_shared.dp.accounting import noise_multiplier
from accord_shared.errors import AccordError, BadInput, Interrupted, PlanError, RosterError, Unreachable
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
GRACE_S = 10.0
ASK_AGAIN_S = 2.0
RETRY_S = 1.0
"""Pause before a run goes on after the SuperLink failed."""
NODES_S = 2.0
"""For how long Flower's list of nodes is held."""


class SitePresence:
    """`Presence` from what the sites say over their own connection."""

    def __init__(self, sites: Sites, most_skew_s: float) -> None:
        self._sites = sites
        self._most_skew_s = most_skew_s
        self._names: dict[int, str] = {}
        self._read_at = float("-inf")

    def name_of(self, node: int) -> str:
        """The approved site of a node; empty for a node of none."""
        now = time.monotonic()
        if now - self._read_at > NODES_S:  # known ones too: a site may be revoked, or have a new key
            self._read_at = now
            self._names = {number: name for name, number in self._sites.nodes().items()}
        return self._names.get(node, "")

    def boot(self, site: str) -> str:
        """The agent that was heard of last."""
        return self._sites.presence(site).boot if site else ""

    def is_there(self, site: str) -> bool:
        """Heard of lately, not paused by its operator, and with a clock that lets it answer."""
        if not site:
            return False
        known = self._sites.presence(site)
        return known.online(time.time()) and known.state != "paused" and abs(known.skew_s) <= self._most_skew_s


@dataclass
class _Active:
    """A run whose thread is alive."""

    thread: threading.Thread
    stopping: threading.Event = field(default_factory=threading.Event)
    """Stop now."""
    by_operator: bool = False


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
    ) -> None:
        self._database, self._audit, self._folder, self._settings = database, audit, folder, settings
        self._identity, self._superlink, self._sites = identity, superlink, sites
        self._rosters, self._metrics = rosters, metrics
        self._active: dict[str, _Active] = {}
        self._lock = threading.RLock()
        self._changed = threading.Condition()
        self._draining = threading.Event()
        self._witnesses: dict[str, Witness] = {}
        self._documents: dict[str, SignedModel] = {}
        """Of finished runs: every hello of a site asks for them."""
        self._round_began: dict[str, float] = {}

    # --- for the operator

    def start(self, request: pb.StartRunRequest) -> pb.RunInfo:
        """Begin a new run of a plan.

        Raises:
            PlanError: it is malformed, or needs a roster that is not there or too small.
            ImpostorError: the signature does not verify.
            BadInput: the initial weights do not fit, or the plan has a run that is not at its end.
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
        with self._lock, self._database.session() as session:
            open_runs = select(RunRow.run).where(RunRow.plan_hash == plan.hash, RunRow.state != "finished")
            other = session.scalar(open_runs)
            if other is not None:
                raise BadInput(f"run {other} of this plan is not at its end: resume it, or change the plan's name")
            make_folder(folder)
            write_atomic(folder / "initial.f32", initial.astype("<f4").tobytes())
            write_atomic(folder / "plan.json", plan.to_json().encode())
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
            session.add(row)
            self._audit.add(session, "run.started", run, plan=plan.hash, signer=signature.key.fingerprint)
        self._launch(run)
        return self.info(run)

    def _check_roster(self, plan: Plan) -> None:
        if plan.secure_aggregation.mode == "off":
            return
        try:
            roster = self._rosters.roster
        except RosterError as error:
            raise PlanError(str(error)) from None
        if plan.cohort.minimum > len(roster.members):
            members = len(roster.members)
            raise PlanError(f"cohort.minimum = {plan.cohort.minimum}, but the roster has {members} members")

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
        active.thread.join(30)
        return self.info(run)

    def resume(self, run: str) -> pb.RunInfo:
        """Continue a run that was stopped or aborted.

        Raises:
            BadInput: there is no such run, it is active, or at its end.
        """
        info = self.info(run)
        if info.state == "finished":
            raise BadInput(f"run {run} is at its end")
        with self._lock:
            if run in self._active:
                raise BadInput(f"run {run} is active")
            self._audit.note("run.resumed", run, round=info.round)
            self._set(run, "waiting", "resumed by the operator")
            self._launch(run)
        return self.info(run)

    def info(self, run: str) -> pb.RunInfo:
        """One run.

        Raises:
            BadInput: there is none of this name.
        """
        with self._database.session() as session:
            row = session.get(RunRow, run)
            if row is None:
                raise BadInput(f"there is no run {run[:64]!r}")
            return _info(row)

    def all(self) -> tuple[pb.RunInfo, ...]:
        """All runs, oldest first."""
        with self._database.session() as session:
            return tuple(_info(row) for row in session.scalars(select(RunRow).order_by(RunRow.started_us)))

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
        with self._database.session() as session:
            return [(row.round, row.report) for row in session.scalars(query)]

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
        for info in self.all():
            if info.state in ACTIVE:
                log.info("the run goes on", extra={"run": info.run, "round": info.round})
                self._audit.note("run.continued", info.run, round=info.round)
                self._launch(info.run)

    def drain(self, seconds: float) -> None:
        """Let rounds come to their end for so long, then stop; active runs stay active in the database."""
        self._draining.set()
        with self._lock:
            active = list(self._active.values())
        deadline = time.monotonic() + seconds
        for one in active:
            one.thread.join(max(0.0, deadline - time.monotonic()))
        for one in active:
            one.stopping.set()
        for one in active:
            one.thread.join(10)

    # --- a run's thread

    def _launch(self, run: str) -> None:
        with self._lock:
            thread = threading.Thread(target=self._drive, args=(run,), name=f"run-{run}", daemon=True)
            self._active[run] = _Active(thread)
            thread.start()

    def _drive(self, run: str) -> None:
        active = self._active[run]
        try:
            state, detail = self._until_done(run, active)
        finally:
            with self._lock:
                self._active.pop(run, None)
        if state:
            self._set(run, state, detail)
            self._audit.note(f"run.{state}", run, detail=detail)
        self._tell()

    def _until_done(self, run: str, active: _Active) -> tuple[str, str]:
        """State and detail at the end; an empty state where the coordinator stops and the run does not."""
        while True:
            try:
                self._attempt(run, active)
            except Interrupted:
                break
            except (httpx.HTTPError, ConnectionError, Unreachable) as error:
                log.warning("the SuperLink failed (%s): the run goes on soon", type(error).__name__, extra={"run": run})
                self._set(run, "waiting", "for the SuperLink")
                if self._draining.is_set() or active.stopping.wait(RETRY_S):
                    break
            except AccordError as error:
                if self._draining.is_set():  # its sites may be stopping too: the next start tries again
                    break
                log.error("the run aborted: %s", error, extra={"run": run})
                return "aborted", f"{type(error).__name__}: {error}"
            except Exception as error:
                log.exception("the run failed", extra={"run": run})
                return "aborted", f"internal error: {type(error).__name__}"
            else:
                return "finished", ""
        return ("stopped", "by the operator") if active.by_operator else ("", "")

    def _attempt(self, run: str, active: _Active) -> None:
        """Drive a run from its last checkpoint to its end."""
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
            checkpoints=CheckpointFolder(folder / "checkpoint", self._seal()),
            observer=lambda report, weights: self._observe(run, report),
        )
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
        rounds = self._settings.rounds
        timing = Timing(rounds.trip_timeout_s, rounds.join_timeout_s, grace_s=GRACE_S, ask_again_s=ASK_AGAIN_S)
        self._set(run, "waiting", f"for {plan.cohort.minimum} sites")
        with self._superlink.run() as grid:
            exchange = FlowerExchange(
                grid,
                timing,
                active.stopping.is_set,
                enquiry,
                SitePresence(self._sites, self._settings.clock.most_skew_s),
                self._draining.is_set,
            )
            exchange.join(plan.cohort.minimum, plan.cohort.size)
            self._set(run, "running", f"{len(exchange.sites())} sites")
            self._round_began[run] = time.monotonic()
            weights = coordinator.run(exchange)
        self._finish(run, plan, coordinator, weights)

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

    def _observe(self, run: str, report: RoundReport) -> None:
        """After each round's checkpoint.

        Raises:
            Interrupted: the coordinator is stopping.
        """
        now, text = _now_us(), json.dumps(report.to_json())
        with self._database.session() as session:
            row = session.get_one(RunRow, run)
            row.round, row.changed_us = report.round, now
            row.metrics = json.dumps(dict(report.released))
            row.sites = json.dumps(sorted({*json.loads(row.sites), *report.survivors}))
            row.detail = f"{len(report.survivors)} of {report.cohort} sites finished round {report.round}"
            session.merge(RoundRow(run=run, round=report.round, report=text, finished_us=now))
            self._audit.add(
                session,
                "round.finished",
                run,
                round=report.round,
                survivors=list(report.survivors),
                aborted_attempts=report.aborted_attempts,
            )
        self._count(run, report)
        log.info("round %d is done", report.round, extra={"run": run, "survivors": len(report.survivors)})
        self._tell()
        if self._draining.is_set():
            raise Interrupted("the coordinator is stopping")

    def _count(self, run: str, report: RoundReport) -> None:
        now = time.monotonic()
        if run in self._round_began:
            self._metrics.round_s.observe(now - self._round_began[run])
        self._round_began[run] = now
        self._metrics.rounds.inc()
        self._metrics.aborted.inc(report.aborted_attempts)
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

    def _set(self, run: str, state: str, detail: str) -> None:
        with self._database.session() as session:
            row = session.get_one(RunRow, run)
            row.state, row.detail, row.changed_us = state, detail[:500], _now_us()
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
