"""One typed message per protocol step. `wire` alone knows how Flower carries them.

A site never sends example counts, losses or metrics: only its name, a finished update, or the
kind and one line of a refusal.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from accord_shared.errors import REFUSALS, REFUSALS_IN_WORDS, AccordError, ProtocolError
from accord_shared.vectors import Vector


@dataclass(frozen=True)
class Enquiry:
    """Coordinator → node, before the first round: the plan (data, never code); who are you?"""

    protocol: int
    run_id: str
    plan_json: str
    plan_hash: str


@dataclass(frozen=True)
class Joined:
    """Node → coordinator: this site takes part in the plan."""

    site: str
    protocol: int
    plan_hash: str


@dataclass(frozen=True)
class TrainRequest:
    """Coordinator → site: train from these weights [dimension]."""

    protocol: int
    run_id: str
    plan_hash: str
    round: int
    attempt: int
    weights: Vector

    @property
    def model_hash(self) -> str:
        """SHA-256 of the weights' bytes, hexadecimal."""
        return hashlib.sha256(self.weights.tobytes()).hexdigest()


@dataclass(frozen=True)
class TrainReply:
    """Site → coordinator: the finished update [dimension], clipped and noised as the plan says."""

    run_id: str
    round: int
    attempt: int
    update: Vector


@dataclass(frozen=True)
class Refusal:
    """Site → coordinator: no, by the name of a typed error and one line without private data."""

    kind: str
    reason: str

    @staticmethod
    def of(error: AccordError) -> Refusal:
        """The refusal that tells `error` to the other side.

        Only refusals about public things (`REFUSALS_IN_WORDS`) travel with their words: a `DataError` quotes
        cells of private records, and is named only.
        """
        in_words = isinstance(error, REFUSALS_IN_WORDS)
        reason = next(iter(str(error).splitlines()), "")[:300] if in_words else "see the site's own log"
        return Refusal(kind=type(error).__name__, reason=reason)

    def error(self) -> AccordError:
        """The typed error again; an unknown kind reads as `ProtocolError`."""
        return REFUSALS.get(self.kind, ProtocolError)(self.reason)


Message = Enquiry | Joined | TrainRequest | TrainReply | Refusal
