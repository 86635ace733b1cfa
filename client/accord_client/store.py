"""What a site must not forget about a plan: what it has spent, and the update that it released last.

The update is written before the release, the release before the first byte leaves. A crash before the
release repeats the step at no cost, since nothing left; a crash after it sends the same bytes again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from accord_shared.dp.events import Event, event_from_json, merge
from accord_shared.errors import PrivacyError
from accord_shared.files import make_folder, write_atomic
from accord_shared.vectors import Vector


@dataclass(frozen=True)
class Releases:
    """Released rounds of one plan: how many, the last one and the weights it was trained from, their cost."""

    rounds: int = 0
    last_round: int = 0
    last_model: str = ""
    last_update: str = ""
    events: tuple[Event, ...] = field(default_factory=tuple)

    @property
    def steps(self) -> int:
        """Noisy steps that were charged."""
        return sum(event.steps for event in self.events)


class SiteStore:
    """A folder with one state file per plan and the last finished update."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def _state(self, plan_hash: str) -> Path:
        return self._folder / f"plan-{plan_hash[:16]}.json"

    def keep_plan(self, plan_hash: str, plan_json: str) -> None:
        """Remember the plan that was joined."""
        make_folder(self._folder)
        write_atomic(self._folder / f"plan-{plan_hash[:16]}.plan", plan_json.encode())

    def plan_json(self, plan_hash: str) -> str | None:
        """The plan that was joined under this hash."""
        path = self._folder / f"plan-{plan_hash[:16]}.plan"
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
            return Releases(events=events, **state)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PrivacyError(f"{path.name} is damaged, what was spent is unknown: {error}") from None

    def release(
        self, plan_hash: str, round_number: int, model_hash: str, update: Vector, event: Event | None
    ) -> Releases:
        """Store the finished update, then charge it; only after that may it be sent."""
        make_folder(self._folder)
        before = self.releases(plan_hash)
        name = f"plan-{plan_hash[:16]}-{round_number % 2}.f32"  # two names: the last one stays until replaced
        write_atomic(self._folder / name, np.ascontiguousarray(update, dtype="<f4").tobytes(), mode=0o600)
        after = replace(
            before,
            rounds=before.rounds + 1,
            last_round=round_number,
            last_model=model_hash,
            last_update=name,
            events=merge([*before.events, *([event] if event else [])]),
        )
        state = {
            "plan_hash": plan_hash,
            "rounds": after.rounds,
            "last_round": after.last_round,
            "last_model": after.last_model,
            "last_update": after.last_update,
            "events": [event.to_json() for event in after.events],
        }
        write_atomic(self._state(plan_hash), json.dumps(state).encode(), mode=0o600)
        return after

    def last_update(self, releases: Releases) -> Vector:
        """The update that was released last, bit for bit."""
        data = (self._folder / releases.last_update).read_bytes()
        return np.frombuffer(data, dtype="<f4").astype(np.float32)
