"""Plans that were offered to a site, and what its operator said to each: one file a plan hash."""

from __future__ import annotations

import fcntl
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from accord_shared.errors import BadInput, OutputError, PlanError, PlanNotApproved, PolicyRefused, SettingsError
from accord_shared.files import write_atomic
from accord_shared.plan import Plan, Table, first_problem, read_plan
from accord_shared.service.pb import accord_pb2 as pb
from accord_shared.service.rpc import private_folder

PlanState = Literal["waiting", "approved", "refused"]
MOST_PLANS = 1000
"""Plans that are remembered: a coordinator that offers without end fills no disk."""
MOST_BYTES = 2**20
_HASH = re.compile(r"[0-9a-f]{64}")


class PlanRecord(Table):
    """A plan that was offered."""

    hash: str = Field(pattern=r"^[0-9a-f]{64}$")
    plan: str
    """JSON."""
    signer: str
    """Fingerprint of the keys that signed it last."""
    problem: str | None = None
    """Why the policy refuses it."""
    approved_us: int | None = None
    seen_us: int
    """When it was offered first, microseconds since the epoch."""

    @property
    def state(self) -> PlanState:
        """A refusal by the policy stands above an approval."""
        if self.problem is not None:
            return "refused"
        return "waiting" if self.approved_us is None else "approved"

    @property
    def detail(self) -> str:
        """Why it is refused, or what it asks of the site, in one line."""
        return self.problem if self.problem is not None else _asks(self.parsed)

    @property
    def parsed(self) -> Plan:
        """The plan itself."""
        return Plan.from_json(self.plan)

    def info(self) -> pb.PlanInfo:
        """The same for the local API."""
        return pb.PlanInfo(
            hash=self.hash,
            plan=self.plan,
            state=self.state,
            detail=self.detail,
            seen_us=self.seen_us,
            signer=self.signer,
        )


def _asks(plan: Plan) -> str:
    privacy, cohort = plan.privacy, plan.cohort
    spends = "no differential privacy" if privacy.epsilon is None else f"epsilon {privacy.epsilon:g}, {privacy.delta:g}"
    return (
        f"{spends}; unit {plan.privacy_unit}; noise {privacy.noise}, at most {plan.releases} releases; "
        f"secure aggregation {plan.secure_aggregation.mode}, {cohort.minimum} of {cohort.size} sites, "
        f"{cohort.colluders} colluders"
    )


class PlanBook:
    """The plans in a site's folder. Durable, and safe among threads and processes; it keeps nothing in memory."""

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._clock = clock

    def offer(self, plan: Plan, signer: str, problem: str | None, *, automatic: bool = False) -> PlanRecord:
        """Note that a plan was offered; `problem` is why the policy refuses it now, `automatic` approves it if not.

        Raises:
            PolicyRefused: it is too large, or too many are remembered already.
            SettingsError: what is remembered of it is damaged.
        """
        with self._locked():
            known, now = self._find(plan.hash), self._now()
            if known is None:
                self._check_room(plan)
            automatic = automatic and problem is None
            approved = known.approved_us if known is not None else None
            record = PlanRecord(
                hash=plan.hash,
                plan=plan.to_json(),
                signer=signer,
                problem=problem,
                approved_us=now if approved is None and automatic else approved,
                seen_us=now if known is None else known.seen_us,
            )
            if record != known:
                self._write(record)
            return record

    def approve(self, plan_hash: str) -> PlanRecord:
        """The operator's yes.

        Raises:
            BadInput: no such plan was offered.
            PolicyRefused: the policy refuses it.
        """
        with self._locked():
            record = self.find(plan_hash)
            if record.problem is not None:
                raise PolicyRefused(record.problem)
            if record.approved_us is None:
                record = record.model_copy(update={"approved_us": self._now()})
                self._write(record)
            return record

    def require(self, plan_hash: str) -> None:
        """May this plan be worked on?

        Raises:
            PolicyRefused: the policy refuses it.
            PlanNotApproved: nobody approved it, or it was never offered.
            SettingsError: what is remembered of it is damaged.
        """
        record = self._find(plan_hash) if _HASH.fullmatch(plan_hash) else None
        if record is None:
            raise PlanNotApproved(f"plan {plan_hash[:12]}… was never offered to this site")
        if record.problem is not None:
            raise PolicyRefused(record.problem)
        if record.approved_us is None:
            raise PlanNotApproved(f"plan {plan_hash[:12]}… waits for this site's operator to approve it")

    def find(self, plan_hash: str) -> PlanRecord:
        """The plan of a hash, or of the first 8 or more digits of one.

        Raises:
            BadInput: none, or more than one.
            SettingsError: what is remembered of it is damaged.
        """
        if not re.fullmatch(r"[0-9a-f]{8,64}", plan_hash):
            raise BadInput(f"{plan_hash[:64]!r} is no plan hash: at least 8 of its hexadecimal digits are needed")
        found = [path for path in self._files() if path.stem.startswith(plan_hash)]
        if len(found) != 1:
            raise BadInput(f"{len(found) or 'no'} plans of hash {plan_hash} were offered to this site")
        return _read(found[0])

    def records(self) -> tuple[PlanRecord, ...]:
        """All of them, the newest last.

        Raises:
            SettingsError: one is damaged.
        """
        return tuple(sorted((_read(path) for path in self._files()), key=lambda record: record.seen_us))

    def _files(self) -> list[Path]:
        return [path for path in self._folder.glob("*.json") if _HASH.fullmatch(path.stem)]

    def _find(self, plan_hash: str) -> PlanRecord | None:
        path = self._folder / f"{plan_hash}.json"
        return _read(path) if path.exists() else None

    def _check_room(self, plan: Plan) -> None:
        if len(plan.to_json()) > MOST_BYTES:
            raise PolicyRefused(f"the plan is longer than {MOST_BYTES} bytes")
        if len(self._files()) >= MOST_PLANS:
            raise PolicyRefused(f"{MOST_PLANS} plans were offered already: the operator has to remove some")

    def _write(self, record: PlanRecord) -> None:
        write_atomic(self._folder / f"{record.hash}.json", record.model_dump_json(indent=1).encode(), mode=0o600)

    def _now(self) -> int:
        return int(self._clock() * 1e6)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time: the agent, and a command while no agent runs."""
        path = private_folder(self._folder) / "lock"
        try:
            file = path.open("wb")
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}") from None
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _read(path: Path) -> PlanRecord:
    try:
        record = PlanRecord.model_validate_json(path.read_bytes())
        sound = record.hash == path.stem == Plan.from_json(record.plan).hash
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise SettingsError(f"{path} is damaged: {first_problem(error)}") from None
    except PlanError as error:
        raise SettingsError(f"{path} is damaged: {error}") from None
    if not sound:
        raise SettingsError(f"{path} is damaged: its plan has another hash")
    return record


def plan_named(folder: Path, text: str) -> Plan:
    """A plan by the hash under which it was offered, or from a file of TOML.

    Raises:
        BadInput: it is neither; a `PlanError` where the file holds no plan.
    """
    if re.fullmatch(r"[0-9a-f]{8,64}", text):
        return PlanBook(folder).find(text).parsed
    return read_plan(Path(text))
