"""What a site must not forget about a plan: what it has spent, and the update that it released last.

The update is written before the release, the release before the first byte leaves. A crash before the
release repeats the step at no cost, since nothing left; a crash after it sends the same bytes again.
"""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from accord_client.ledger.balance import Releases
from accord_client.ledger.entries import DataSet, Released, Reserved, made
from accord_client.ledger.ledger import Ledger
from accord_shared.dp.events import Event
from accord_shared.errors import PrivacyError
from accord_shared.files import make_private, open_private, write_atomic
from accord_shared.receipts import Receipt, Seen
from accord_shared.vectors import Vector

__all__ = ["Releases", "SiteStore"]


class SiteStore:
    """A folder with the privacy ledger, the plans that were joined, and the last finished update of each.

    `durable=False` is for throw-away runs that nobody resumes: it skips waiting for the disk. `datasets` are the
    operator's; see `Ledger`.
    """

    def __init__(self, folder: Path, *, durable: bool = True, datasets: Sequence[DataSet] = ()) -> None:
        self._folder = folder
        self._durable = durable
        self.ledger = Ledger(folder, durable=durable, datasets=datasets)

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """One holder at a time, over threads and processes; the system frees it when a holder dies."""
        make_private(self._folder)
        with open_private(self._folder / "lock", "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def keep_plan(self, plan_hash: str, plan_json: str) -> None:
        """Remember the plan that was joined."""
        make_private(self._folder)
        write_atomic(self._folder / f"plan-{plan_hash}.plan", plan_json.encode(), mode=0o600)

    def plan_json(self, plan_hash: str) -> str | None:
        """The plan that was joined under this hash.

        Raises:
            PrivacyError: its file cannot be read.
        """
        path = self._folder / f"plan-{plan_hash}.plan"
        try:
            return path.read_text(encoding="utf-8") if path.exists() else None
        except (OSError, UnicodeDecodeError):
            raise PrivacyError(f"{path.name} cannot be read") from None

    def releases(self, plan_hash: str) -> Releases:
        """What was released under the plan so far.

        Raises:
            PrivacyError: the ledger is damaged: what was spent is unknown, so nothing more may be.
        """
        return self.ledger.releases(plan_hash)

    def check_plan(self, plan_hash: str, event: Event | None, releases: int, *, dataset: str = "default") -> None:
        """Before a plan is joined that may release `releases` times, each costing `event` (None: no noise).

        Raises:
            LimitReached: that, or what is left of it, is not within the operator's limits.
        """
        self.ledger.check_plan(dataset, plan_hash, event, releases)

    def reserve(
        self,
        plan_hash: str,
        round_number: int,
        event: Event | None,
        *,
        dataset: str = "default",
        run_id: str = "",
        attempt: int = 0,
    ) -> None:
        """Before training, durably. Repeated for the same step it is the same reservation.

        Raises:
            LimitReached: the step is not within the operator's limits.
        """
        self.ledger.reserve(
            made(
                Reserved, dataset=dataset, plan=plan_hash, run=run_id, round=round_number, attempt=attempt, event=event
            )
        )

    def release(
        self,
        plan_hash: str,
        round_number: int,
        model_hash: str,
        update: Vector | None,
        event: Event | None,
        cohort: tuple[str, ...] = (),
        attempt: int = 0,
        *,
        dataset: str = "default",
        run_id: str = "",
        witnessed: Mapping[str, Seen] | None = None,
    ) -> Releases:
        """Store the finished update (None: it is never sent again), then charge it; only after that may it be sent.

        Heads of peers' ledgers are remembered with it; see `Ledger.release`, also for what it raises.
        """
        step = made(
            Reserved, dataset=dataset, plan=plan_hash, run=run_id, round=round_number, attempt=attempt, event=event
        )

        def finish(before: Releases) -> Released:
            name, digest = ("", "") if update is None else self._keep(plan_hash, before, update)
            more = {"model": model_hash, "update": name, "digest": digest, "cohort": tuple(cohort)}
            return made(Released, **dict(step), **more)

        return self.ledger.release(step, finish, witnessed)

    def _keep(self, plan_hash: str, before: Releases, update: Vector) -> tuple[str, str]:
        """Write an update; its file's name and digest."""
        data = np.ascontiguousarray(update, dtype="<f4").tobytes()
        # Two names by the count of releases, not by round: rounds may be skipped, and the last update must stay
        # until the next one is charged.
        name = f"plan-{plan_hash}-{before.rounds % 2}.f32"
        write_atomic(self._folder / name, data, mode=0o600, durable=self._durable)
        return name, hashlib.sha256(data).hexdigest()

    def keep_receipt(self, receipt: Receipt) -> None:
        """A receipt that a witness showed, for `accord site ledger recover`: in the folder as receipt-NUMBER.json."""
        make_private(self._folder)
        write_atomic(self._folder / f"receipt-{receipt.seq}.json", receipt.to_json().encode(), mode=0o600)

    def note_attempt(self, plan_hash: str, attempt: int) -> None:
        """Durably: the update of the last round is masked for this attempt, so no earlier one is opened any more."""
        self.ledger.note_attempt(plan_hash, attempt)

    def note_opened(self, plan_hash: str, round_number: int) -> None:
        """Durably: this site helps to open a sum of the round, so it joins no other attempt of it."""
        self.ledger.note_opened(plan_hash, round_number)

    def last_update(self, releases: Releases) -> Vector:
        """The update that was released last, bit for bit.

        Raises:
            PrivacyError: there is none, or its file is missing or holds other bytes, which were never charged.
        """
        if not releases.last_update:
            raise PrivacyError("what was released last is not sent again")
        path = self._folder / releases.last_update
        try:
            data = path.read_bytes()
        except OSError as error:
            raise PrivacyError(f"{path.name} cannot be read: {error.strerror}") from None
        if hashlib.sha256(data).hexdigest() != releases.last_digest:
            raise PrivacyError(f"{path.name} is not the update that was released")
        return np.frombuffer(data, dtype="<f4").astype(np.float32)
