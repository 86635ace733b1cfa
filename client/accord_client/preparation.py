"""A plan's records are read and embedded before the site joins: no trip of a round contains that.

It runs in a thread of its own, since it may take hours, while rounds of other plans go on. What it makes is in the
cache on the disk (`accord site prepare` makes the same ahead), and the records stay in memory.
"""

from __future__ import annotations

import fcntl
import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from accord_client.connectors import load
from accord_client.data import Examples
from accord_client.features import FeatureCache
from accord_client.models import verified
from accord_client.policy import Policy
from accord_client.settings import SiteFolder, SiteSettings
from accord_client.trainer import Runtime
from accord_client.workspace import Workspace
from accord_shared.cli_output import duration
from accord_shared.errors import (
    AccordError,
    Interrupted,
    LimitReached,
    ModelError,
    OutputError,
    PolicyRefused,
    SitePreparing,
    Withheld,
)
from accord_shared.plan import Plan
from accord_shared.service.pb import accord_pb2 as pb

log = logging.getLogger(__name__)

PATIENCE_S = 2.0
"""For how long the first question for a plan waits: small data sets are prepared by then."""
RETRY_S, MOST_RETRY_S = 5.0, 300.0
"""Pauses before what failed is tried again; they double."""
_PUBLIC = (LimitReached, PolicyRefused, ModelError)
"""What fails without a look at the records."""
MOST_KNOWN = 16
"""Plans whose progress is remembered."""
PreparationState = Literal["reading", "embedding", "ready", "failed"]


@dataclass
class Progress:
    """How far the preparation of one plan is."""

    plan_hash: str
    stopping: Callable[[], bool] = lambda: False
    told: Callable[[Progress], None] = lambda _: None
    """Called after each step."""
    state: PreparationState = "reading"
    done: int = 0
    total: int = 0
    """Records; 0: not known yet."""
    error: AccordError | None = None
    failures: int = 0
    again_at: float = 0.0
    """When what failed may be tried again (monotonic)."""
    _began: float = 0.0
    ended: threading.Event = field(default_factory=threading.Event)

    def expect(self, total: int) -> None:
        """The records are read: so many are embedded now."""
        self.state, self.total, self._began = "embedding", total, time.monotonic()
        self.told(self)

    def add(self, records: int) -> None:
        """So many more are embedded.

        Raises:
            Interrupted: the agent stops.
        """
        self.done = min(self.total, self.done + records)
        self.told(self)
        if self.stopping():
            raise Interrupted("asked to stop")

    def end(self, error: AccordError | None = None) -> None:
        """It is done, or cannot be."""
        self.error = error
        if error is None:
            self.state, self.done = "ready", self.total
        else:
            self.state = "failed"
            self.failures += 1
            self.again_at = time.monotonic() + min(RETRY_S * 2 ** (self.failures - 1), MOST_RETRY_S)
        self.told(self)
        self.ended.set()

    @property
    def left_s(self) -> float | None:
        """Seconds that are left, at the pace so far; None: not known yet."""
        if self.state != "embedding" or not self.done:
            return None
        return (time.monotonic() - self._began) / self.done * (self.total - self.done)

    def line(self) -> str:
        """For people."""
        if self.state == "failed":
            return f"failed: {self.error}"
        if self.state != "embedding":
            return f"{self.state}, {self.total:,} records" if self.total else self.state
        left = self.left_s
        return f"{self.done:,} of {self.total:,} records embedded, {'' if left is None else duration(left)} left"

    def info(self) -> pb.PlanPreparation:
        """For the local API."""
        left = self.left_s
        return pb.PlanPreparation(
            plan_hash=self.plan_hash,
            state=self.state,
            done=self.done,
            total=self.total,
            left_s=-1.0 if left is None else left,
            problem="" if self.error is None else f"{type(self.error).__name__}: {self.error}",
        )


def read_records(plan: Plan, folder: SiteFolder, settings: SiteSettings, policy: Policy) -> Examples:
    """The records of the policy's data set as the plan's task reads them.

    Raises:
        PolicyRefused, DataError, Unreachable, SettingsError, OutputError: as `connectors.load`.
    """
    spec, dataset = policy.spec(settings.data), str(policy.dataset)
    loaded = load(spec, plan, folder.quarantine / f"{dataset}.csv", folder=folder.path)
    counts = loaded.counts
    facts = {
        "dataset": dataset,
        "rows": counts.rows,
        "accepted": counts.accepted,
        "rejected": counts.left_out,
        "empty_lines": counts.empty_lines,
        "digest": loaded.digest,
    }
    log.log(logging.WARNING if loaded.rejected else logging.INFO, "the data set is read", extra=facts)
    return loaded.examples


def open_workspace(plan: Plan, folder: SiteFolder, runtime: Runtime) -> Workspace:
    """The model is compared with the plan's digest here: with all embeddings cached nobody else would load it."""
    verified(plan.model)
    return Workspace(plan, FeatureCache(folder.cache), runtime)


def prepare(
    plan: Plan,
    folder: SiteFolder,
    settings: SiteSettings,
    policy: Policy,
    runtime: Runtime,
    progress: Progress,
    check: Callable[[Workspace], None] = lambda _: None,
) -> tuple[Workspace, Examples]:
    """Read and embed all that a plan trains on; one process at a time, so that none does what another one does.

    `check` may refuse before anything is read.

    Raises:
        AccordError: data or model cannot be used, or the disk is too small for the embeddings (before they are made).
    """
    path = folder.cache / "prepare.lock"
    try:
        file = path.open("wb")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        workspace = open_workspace(plan, folder, runtime)
        check(workspace)
        examples = read_records(plan, folder, settings, policy)
        progress.expect(len(examples))
        workspace.prepare(examples, progress.add)
    return workspace, examples


class Preparer:
    """Prepares plans one after another.

    `make` prepares one, `is_ready` says whether all of it is still at hand.
    """

    def __init__(
        self,
        make: Callable[[Plan, Progress], None],
        is_ready: Callable[[Plan], bool],
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._make, self._is_ready, self._stopping = make, is_ready, stopping
        self._known: OrderedDict[str, Progress] = OrderedDict()
        self._waiting: queue.SimpleQueue[tuple[Plan, Progress]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self, plan: Plan) -> Progress:
        """Begin, unless it is under way, done, or failed only lately."""
        with self._lock:
            known = self._known.get(plan.hash)
            if known is not None and self._stands(plan, known):
                return known
            made = Progress(plan.hash, self._stopping, failures=known.failures if known is not None else 0)
            self._known[plan.hash] = made
            self._known.move_to_end(plan.hash)
            while len(self._known) > MOST_KNOWN:
                self._known.popitem(last=False)
            self._waiting.put((plan, made))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="prepare", daemon=True)
                self._thread.start()
            return made

    def _stands(self, plan: Plan, known: Progress) -> bool:
        if not known.ended.is_set():
            return True
        return time.monotonic() < known.again_at if known.error is not None else self._is_ready(plan)

    def require(self, plan: Plan) -> None:
        """Before a plan is joined.

        Raises:
            SitePreparing: it goes on; the words are the same whatever the data are.
            LimitReached, PolicyRefused, ModelError: it cannot be.
            Withheld: it failed, for a reason that may depend on the records.
        """
        if self._is_ready(plan):
            return
        begun = plan.hash in self._known
        progress = self.start(plan)
        progress.ended.wait(0.0 if begun else PATIENCE_S)
        if progress.error is not None:
            if isinstance(progress.error, _PUBLIC):
                raise type(progress.error)(str(progress.error))
            raise Withheld(f"{type(progress.error).__name__}: {progress.error}")
        if not progress.ended.is_set():
            raise SitePreparing("this site still prepares its records for the plan")

    def progress(self) -> list[Progress]:
        """Of the plans that were asked for, the newest last."""
        with self._lock:
            return list(self._known.values())

    @property
    def busy(self) -> bool:
        """Whether something is prepared now."""
        return any(not one.ended.is_set() for one in self.progress())

    def _work(self) -> None:
        while not self._stopping():
            plan, progress = self._waiting.get()
            try:
                if not self._is_ready(plan):
                    self._make(plan, progress)
            except AccordError as error:
                log.warning("a plan's records cannot be prepared: %s: %s", type(error).__name__, error)
                progress.end(error)
            except Exception as error:  # its text may quote records
                log.exception("a plan's records cannot be prepared")
                progress.end(AccordError(type(error).__name__))
            else:
                log.info("the records are prepared", extra={"plan": plan.hash, "records": progress.total})
                progress.end()
