"""One typed message per protocol step. `wire` alone knows how Flower carries them.

A site never sends example counts, losses or metrics: only its name, keys, a finished update (masked, unless the
plan says `secure_aggregation.mode = "off"`), or the kind and one line of a refusal. The fields of secure
aggregation are specified in shared/PROTOCOL.md.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from accord_shared.errors import REFUSALS, REFUSALS_IN_WORDS, AccordError, ProtocolError, Withheld
from accord_shared.vectors import Vector

Octets = npt.NDArray[np.uint8]
"""A long byte string, which travels as an array."""


@dataclass(frozen=True)
class Enquiry:
    """Coordinator → node, before the first round: the plan (data, never code); who are you?"""

    protocol: int
    run_id: str
    plan_json: str
    plan_hash: str
    roster_hash: str
    """Empty where the plan does without secure aggregation."""
    receipt: bytes = b""
    """To a site whose ledger went back: the newest receipt that the coordinator has of it."""
    plan_signature: str = ""
    """JSON of the plan's `PlanSignature`; empty where sites ask for none."""
    noise_multiplier: str = ""
    """The coordinator's σ as its shortest decimal, for a site to compare with its own; empty where it is not told."""


@dataclass(frozen=True)
class Joined:
    """Node → coordinator: this site takes part in the plan. Keys are empty without secure aggregation."""

    site: str
    protocol: int
    plan_hash: str
    credential: bytes = b""
    bundle: bytes = b""
    receipt: bytes = b""
    """Of the site's privacy ledger, for the coordinator to keep; only the site can read it."""


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
class IntroduceRequest:
    """Coordinator → site: agree on a post-quantum secret with each of these peers."""

    run_id: str
    names: tuple[str, ...]
    credentials: tuple[bytes, ...]


@dataclass(frozen=True)
class Introduced:
    """Site → coordinator: one introduction for each peer."""

    run_id: str
    introductions: tuple[bytes, ...]


@dataclass(frozen=True)
class MaskRequest:
    """Coordinator → site, trip 1: train from these weights [dimension] and upload masked for this cohort."""

    protocol: int
    run_id: str
    plan_hash: str
    roster_hash: str
    round: int
    attempt: int
    cohort: tuple[str, ...]
    bundles: tuple[bytes, ...]
    coordinator: bytes
    """The coordinator's X25519 key of the attempt: uploads are authenticated to it."""
    peers: tuple[str, ...]
    """Peers that are new to the receiver, with their `credentials` and `introductions`."""
    credentials: tuple[bytes, ...]
    introductions: tuple[bytes, ...]
    weights: Vector
    choices: tuple[bytes, ...] = ()
    """Sparse graph: whom each site of the cohort chose, bit maps over the roster, in cohort order."""

    @property
    def model_hash(self) -> str:
        """SHA-256 of the weights' bytes, hexadecimal."""
        return hashlib.sha256(self.weights.tobytes()).hexdigest()


@dataclass(frozen=True)
class MaskedUpload:
    """Site → coordinator, trip 1: the masked update, packed, and sealed shares of what masks it."""

    run_id: str
    round: int
    attempt: int
    payload: Octets
    sealed: tuple[bytes, ...]
    next_bundle: bytes
    tag: bytes
    receipt: bytes = b""
    """As in `Joined`."""


@dataclass(frozen=True)
class SurvivorsRequest:
    """Coordinator → site, trip 2: is this the set whose sum is opened? Ascending cohort indices."""

    run_id: str
    round: int
    attempt: int
    survivors: tuple[int, ...]


@dataclass(frozen=True)
class SurvivorsSigned:
    """Site → coordinator, trip 2: its one signature for the attempt."""

    run_id: str
    round: int
    attempt: int
    signature: bytes


@dataclass(frozen=True)
class OpenRequest:
    """Coordinator → site, trip 3: the certified set, and the shares sealed for the receiver."""

    run_id: str
    round: int
    attempt: int
    survivors: tuple[int, ...]
    signers: tuple[int, ...]
    signatures: tuple[bytes, ...]
    sealed: tuple[bytes, ...]


@dataclass(frozen=True)
class Opened:
    """Site → coordinator, trip 3: per survivor whose holder it is, one kind of share of each secret."""

    run_id: str
    round: int
    attempt: int
    shares: tuple[bytes, ...]


_NO_WORDS = "see the site's own log"


@dataclass(frozen=True)
class Refusal:
    """Site → coordinator: no, by the name of a typed error and one line without private data."""

    kind: str
    reason: str

    @staticmethod
    def of(error: Exception) -> Refusal:
        """The refusal that tells `error` to the other side.

        Kinds in `REFUSALS` go by their name, those in `REFUSALS_IN_WORDS` with their words. Anything else may depend on
        private records: it is the same refusal, byte for byte, whatever happened.
        """
        if type(error).__name__ not in REFUSALS:
            return Refusal(kind=Withheld.__name__, reason=_NO_WORDS)
        in_words = isinstance(error, REFUSALS_IN_WORDS)
        reason = next(iter(str(error).splitlines()), "")[:300] if in_words else _NO_WORDS
        return Refusal(kind=type(error).__name__, reason=reason)

    def error(self) -> AccordError:
        """The typed error again; an unknown kind reads as `ProtocolError`."""
        return REFUSALS.get(self.kind, ProtocolError)(self.reason)


Message = (
    Enquiry
    | Joined
    | TrainRequest
    | TrainReply
    | IntroduceRequest
    | Introduced
    | MaskRequest
    | MaskedUpload
    | SurvivorsRequest
    | SurvivorsSigned
    | OpenRequest
    | Opened
    | Refusal
)
