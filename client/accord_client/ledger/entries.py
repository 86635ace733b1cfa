"""What the entries of a ledger say, each kind a frozen, strict table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Self, TypeVar

from pydantic import AfterValidator, Field, PlainSerializer, PlainValidator, ValidationError

from accord_shared.dp.events import Event, SampledGaussian, SharedGaussian, event_from_json, merge
from accord_shared.errors import LedgerDamaged, ProtocolError, UnknownMechanism
from accord_shared.identity import plain_name
from accord_shared.plan import Table, first_problem


def _event(value: Any) -> Event:
    if isinstance(value, SampledGaussian | SharedGaussian):
        return value
    try:
        return event_from_json(value)
    except (UnknownMechanism, TypeError, ValueError) as error:
        raise ValueError(str(error)) from None


Name = Annotated[str, AfterValidator(plain_name)]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
LedgerId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Number = Annotated[int, Field(ge=1, lt=2**53)]
AnyEvent = Annotated[
    SampledGaussian | SharedGaussian, PlainValidator(_event), PlainSerializer(lambda event: event.to_json())
]
UpdateFile = Annotated[str, Field(pattern=r"^(plan-[0-9a-f]{64}-[01]\.f32)?$")]
Epsilon = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Spent:
    """What releases cost, as a vector space: noised events, and the number of releases that had no noise at all."""

    events: tuple[Event, ...] = field(default_factory=tuple)
    bare: int = 0

    @classmethod
    def of(cls, event: Event | None, releases: int = 1) -> Self:
        """So many releases that cost `event` each; None is no noise."""
        if releases == 0:
            return cls()
        return cls(bare=releases) if event is None else cls((replace(event, steps=event.steps * releases),))

    @classmethod
    def sum(cls, parts: Iterable[Spent]) -> Self:
        """All of them."""
        given = list(parts)
        return cls(merge(event for part in given for event in part.events), sum(part.bare for part in given))

    def __add__(self, other: Spent) -> Spent:
        return Spent.sum([self, other])

    def __sub__(self, other: Spent) -> Spent:
        """What this has beyond `other`, never less than nothing."""
        gone = other.steps()
        left = [(one, steps - gone.get(one, 0)) for one, steps in self.steps().items()]
        events = tuple(replace(one, steps=steps) for one, steps in left if steps > 0)
        return Spent(events, max(0, self.bare - other.bare))

    def steps(self) -> dict[Event, int]:
        """Number of steps of each mechanism."""
        return {replace(event, steps=1): event.steps for event in merge(self.events)}


# --- what the operator declares


class Limits(Table):
    """Most that a data set may cost at `delta`: with all else of its lineage, and (`run_…`) by any one plan.

    A run that is resumed, or started anew, under the same plan counts as the same run.
    """

    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    accountant: Annotated[str, Field(pattern="^(pld|prv|rdp)$")] = "pld"
    epsilon: Epsilon | None = None
    epsilon_all_collude: Epsilon | None = None
    run_epsilon: Epsilon | None = None
    run_epsilon_all_collude: Epsilon | None = None


class DataSet(Table):
    """An id that the operator gives to data, and the data set that it was derived from, whose budget it shares."""

    name: Name
    derived_from: Name | None = None
    limits: Limits = Limits()


# --- entries


class Made(Table):
    """The first entry: the ledger's random id."""

    ledger: LedgerId


class Declared(Table):
    """The operator's word on a data set from here on. A lineage that was declared once stays."""

    dataset: DataSet


class Reserved(Table):
    """A note: a step that is about to be trained. Nothing left the machine yet."""

    dataset: Name
    plan: Hash
    run: str
    round: Number
    attempt: Count
    event: AnyEvent | None

    def permits(self, release: Reserved) -> bool:
        """Whether `release` is what was reserved, so that its limits were checked."""
        mine, other = (self.dataset, self.plan, self.round), (release.dataset, release.plan, release.round)
        return mine == other and self.attempt == release.attempt and self.event == release.event


class Released(Reserved):
    """A step whose result may leave the machine from now on: spent for ever."""

    model: str
    update: UpdateFile
    digest: str
    cohort: tuple[str, ...]


class Attempted(Table):
    """A note: the update of this round is masked for this attempt, the `times`-th after the first."""

    plan: Hash
    round: Count
    attempt: Count
    times: Number


class Opened(Table):
    """This site helps to open a sum of the round."""

    plan: Hash
    round: Count


class Cost(Table):
    """What one plan spent of one data set."""

    dataset: Name
    plan: Hash
    events: tuple[AnyEvent, ...]
    bare: Count

    @property
    def spent(self) -> Spent:
        """The same, to count with."""
        return Spent(self.events, self.bare)


class Progress(Table):
    """How far a site went under one plan; see `Releases`."""

    plan: Hash
    releases: Count
    last_round: Count
    last_attempt: Count
    opened_round: Count


class Account(Table):
    """All that must not be forgotten when a ledger is lost: what is sealed in a receipt."""

    costs: tuple[Cost, ...] = ()
    progress: tuple[Progress, ...] = ()
    lineage: tuple[tuple[Name, Name], ...] = ()
    trail: tuple[tuple[Number, Hash], ...] = ()
    """Number and hash of entries of that ledger, newest first."""


class Imported(Table):
    """What a receipt says (`account`) and what of it this ledger lacked (`costs`, `progress`: added to its own)."""

    ledger: LedgerId
    seq: Number
    head: Hash
    account: Account
    costs: tuple[Cost, ...]
    progress: tuple[Progress, ...]


E = TypeVar("E", bound=Table)
Entry = Made | Declared | Released | Opened | Imported
Note = Reserved | Attempted
_KINDS: dict[str, type[Entry]] = {
    "made": Made,
    "dataset": Declared,
    "release": Released,
    "open": Opened,
    "import": Imported,
}
RESERVE, ATTEMPT = "reserve", "attempt"
_NOTES: dict[str, type[Note]] = {RESERVE: Reserved, ATTEMPT: Attempted}
_NAMES = {kind: name for name, kind in _KINDS.items()}


def kind_of(entry: Entry) -> str:
    """The kind's name in the file."""
    return _NAMES[type(entry)]


def made(kind: type[E], **fields: Any) -> E:
    """An entry of what a message said.

    Raises:
        ProtocolError: a number that no run has, or a name that none may have.
    """
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise ProtocolError(first_problem(error)) from None


def read_entry(kind: str, body: str) -> Entry:
    """Read an entry back.

    Raises:
        LedgerDamaged: another kind, or fields that do not fit.
    """
    return _read(_KINDS, "an entry", kind, body)


def read_note(kind: str, body: str) -> Note:
    """Read a note back.

    Raises:
        LedgerDamaged: another kind, or fields that do not fit.
    """
    return _read(_NOTES, "a note", kind, body)


def _read(kinds: Mapping[str, type[E]], what: str, kind: str, body: str) -> E:
    table = kinds.get(kind)
    if table is None:
        raise LedgerDamaged(f"the ledger has {what} of unknown kind {kind[:20]!r}")
    try:
        return table.model_validate_json(body)
    except ValidationError as error:
        raise LedgerDamaged(f"{what} of kind {kind} of the ledger is malformed: {first_problem(error)}") from None
