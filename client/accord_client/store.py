"""What a site must not forget about a plan: what it has spent, and the update that it released last.

The update is written before the release, the release before the first byte leaves. A crash before the
release repeats the step at no cost, since nothing left; a crash after it sends the same bytes again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from accord_shared.dp.events import Event, event_from_json, merge
from accord_shared.errors import PrivacyError
from accord_shared.files import make_folder, write_atomic
from accord_shared.vectors import Vector

_UPDATE = re.compile(r"plan-[0-9a-f]{64}-[01]\.f32")


@dataclass(frozen=True)
class Releases:
    """Released rounds of one plan: how many, the last one and the weights it was trained from, their cost."""

    rounds: int = 0
    last_round: int = 0
    last_model: str = ""
    last_update: str = ""
    last_digest: str = ""
    """File name and SHA-256 of the update that was released last."""
    last_cohort: tuple[str, ...] = ()
    """Under secure aggregation: the cohort of the last round's first attempt."""
    last_attempt: int = 0
    """The last attempt of the last round that the update was masked for, in any run or process."""
    opened_round: int = 0
    """The last round of which this site helped to open a sum."""
    events: tuple[Event, ...] = field(default_factory=tuple)

    def check(self) -> None:
        """Raise `ValueError` unless the values are what `SiteStore.release` writes."""
        counts = (self.rounds, self.last_round)
        if not all(type(count) is int and count >= 1 for count in counts) or self.rounds > self.last_round:
            raise ValueError(f"{self.rounds} rounds up to round {self.last_round}")
        if not isinstance(self.last_model, str) or not isinstance(self.last_digest, str):
            raise ValueError("no digest of a model or update")
        if not _UPDATE.fullmatch(self.last_update):
            raise ValueError("no name of an update")
        if type(self.opened_round) is not int or not all(isinstance(name, str) for name in self.last_cohort):
            raise ValueError("no cohort or opened round")
        if type(self.last_attempt) is not int:
            raise ValueError("no attempt")

    @property
    def steps(self) -> int:
        """Noisy steps that were charged."""
        return sum(event.steps for event in self.events)


class SiteStore:
    """A folder with one state file per plan and the last finished update.

    `durable=False` is for throw-away runs that nobody resumes: it skips waiting for the disk.
    """

    def __init__(self, folder: Path, *, durable: bool = True) -> None:
        self._folder = folder
        self._durable = durable

    def _state(self, plan_hash: str) -> Path:
        return self._folder / f"plan-{plan_hash}.json"

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """One holder at a time, over threads and processes; the system frees it when a holder dies."""
        make_folder(self._folder)
        with (self._folder / "lock").open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def keep_plan(self, plan_hash: str, plan_json: str) -> None:
        """Remember the plan that was joined."""
        make_folder(self._folder)
        write_atomic(self._folder / f"plan-{plan_hash}.plan", plan_json.encode())

    def plan_json(self, plan_hash: str) -> str | None:
        """The plan that was joined under this hash."""
        path = self._folder / f"plan-{plan_hash}.plan"
        return path.read_text() if path.exists() else None

    def releases(self, plan_hash: str) -> Releases:
        """What was released under the plan so far.

        Raises:
            PrivacyError: the state file is damaged: what was spent is unknown, so nothing more may be.
        """
        path = self._state(plan_hash)
        if not path.exists():
            return Releases()
        try:
            state: dict[str, Any] = json.loads(path.read_text())
            if state.pop("plan_hash") != plan_hash:
                raise PrivacyError(f"{path.name} belongs to another plan")
            events = tuple(event_from_json(event) for event in state.pop("events"))
            releases = Releases(events=events, last_cohort=tuple(state.pop("last_cohort")), **state)
            releases.check()
            return releases
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise PrivacyError(f"{path.name} is damaged, what was spent is unknown: {error}") from None

    def release(
        self,
        plan_hash: str,
        round_number: int,
        model_hash: str,
        update: Vector,
        event: Event | None,
        cohort: tuple[str, ...] = (),
        attempt: int = 0,
    ) -> Releases:
        """Store the finished update, then charge it; only after that may it be sent."""
        make_folder(self._folder)
        before = self.releases(plan_hash)
        data = np.ascontiguousarray(update, dtype="<f4").tobytes()
        # Two names by the count of releases, not by round: rounds may be skipped, and the last update must stay
        # until the next one is charged.
        name = f"plan-{plan_hash}-{before.rounds % 2}.f32"
        write_atomic(self._folder / name, data, mode=0o600, durable=self._durable)
        after = replace(
            before,
            rounds=before.rounds + 1,
            last_round=round_number,
            last_model=model_hash,
            last_update=name,
            last_digest=hashlib.sha256(data).hexdigest(),
            last_cohort=cohort,
            last_attempt=attempt,
            events=merge([*before.events, *([event] if event else [])]),
        )
        self._write(plan_hash, after)
        return after

    def note_attempt(self, plan_hash: str, attempt: int) -> None:
        """Durably: the update of the last round is masked for this attempt, so no earlier one is opened any more."""
        self._write(plan_hash, replace(self.releases(plan_hash), last_attempt=attempt))

    def note_opened(self, plan_hash: str, round_number: int) -> None:
        """Durably: this site helps to open a sum of the round, so it joins no other attempt of it."""
        before = self.releases(plan_hash)
        self._write(plan_hash, replace(before, opened_round=max(before.opened_round, round_number)))

    def _write(self, plan_hash: str, releases: Releases) -> None:
        state = {field.name: getattr(releases, field.name) for field in fields(releases)}
        state |= {"plan_hash": plan_hash, "events": [event.to_json() for event in releases.events]}
        write_atomic(self._state(plan_hash), json.dumps(state).encode(), mode=0o600, durable=self._durable)

    def last_update(self, releases: Releases) -> Vector:
        """The update that was released last, bit for bit.

        Raises:
            PrivacyError: the file is missing or holds other bytes, which were never charged.
        """
        path = self._folder / releases.last_update
        try:
            data = path.read_bytes()
        except OSError as error:
            raise PrivacyError(f"{path.name} cannot be read: {error.strerror}") from None
        if hashlib.sha256(data).hexdigest() != releases.last_digest:
            raise PrivacyError(f"{path.name} is not the update that was released")
        return np.frombuffer(data, dtype="<f4").astype(np.float32)
