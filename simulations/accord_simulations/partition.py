"""Who holds which records: the ways in which a simulated population divides one data set.

A privacy unit (a row, or a customer with all its rows) is never divided. The generator is numpy's
PCG64 on the run's public seed: right for a reproducible simulation, and never a source of
cryptographic randomness or of privacy noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from accord_client.data import Examples
from accord_shared.errors import PlanError

Indices = npt.NDArray[np.int64]

FORMS = '"iid", "dirichlet:ALPHA", "zipf:S" or "column:NAME"'
"""What a `partition` may be."""


@dataclass(frozen=True)
class Shares:
    """Row indices per participant.

    `train` divides the training rows: every row once, no participant without rows, ascending. `test`
    follows each participant's own distribution; its shares may overlap, and may be empty. `names` are
    the participants' own names where the data gives them (a column's values), else None.
    """

    train: tuple[Indices, ...]
    test: tuple[Indices, ...]
    names: tuple[str, ...] | None = None


@dataclass(frozen=True)
class PartitionSpec:
    """A parsed partition: `kind` and its number (`dirichlet`, `zipf`) or its column (`column`)."""

    kind: str
    number: float = 0.0
    column: str = ""


def parse(spec: str) -> PartitionSpec:
    """Reads "iid", "dirichlet:ALPHA" (ALPHA > 0), "zipf:S" (S >= 0) or "column:NAME".

    Raises:
        PlanError: anything else.
    """
    kind, colon, argument = spec.partition(":")
    if spec == "iid":
        return PartitionSpec("iid")
    if kind == "column" and argument:
        return PartitionSpec("column", column=argument)
    if kind not in ("dirichlet", "zipf") or not colon:
        raise PlanError(f"partition {spec!r}: must be {FORMS}")
    number = _number(spec, argument)
    if number < 0 or (kind == "dirichlet" and number == 0):
        bound = "ALPHA > 0" if kind == "dirichlet" else "S >= 0"
        raise PlanError(f"partition {spec!r}: {kind} needs {bound}")
    return PartitionSpec(kind, number)


def partition(spec: str, *, train: Examples, test: Examples, participants: int, rng: np.random.Generator) -> Shares:
    """Divides the privacy units of `train` over participants and gives each a fitting part of `test`.

    - `iid`: equal sizes (±1 unit), mixed content. Every participant is tested on the whole test split.
    - `zipf:S`: sizes ∝ 1/rank^S (at least 1 unit), mixed content. Tested on the whole test split.
    - `dirichlet:ALPHA`: for each class, the proportions over participants ~ Dirichlet(ALPHA·1); test
      rows are dealt per class with the same proportions. Nobody is left empty: a unit is taken from
      the largest. A unit of several labels counts by its most frequent one.
    - `column:NAME`: one participant per value, largest first. Fewer participants than values: the
      smaller values join them in turn. More: the largest values are split further. Tested on the test
      rows of the participant's values (a value that no training row has is in nobody's test share).

    The same arguments and generator state give the same shares.

    Raises:
        PlanError: an unknown `spec`, fewer units than participants, or no such column.
    """
    parsed = parse(spec)
    if participants < 1:
        raise PlanError(f"participants = {participants}: must be at least 1")
    if participants > train.n_units:
        raise PlanError(f"{participants} participants, but only {train.n_units} units of privacy to share out")
    divide = _DIVIDERS[parsed.kind]
    return divide(parsed, train, test, participants, rng)


# --- even and power-law sizes


def _iid(_spec: PartitionSpec, train: Examples, test: Examples, participants: int, rng: np.random.Generator) -> Shares:
    groups = np.array_split(rng.permutation(train.n_units), participants)
    return Shares(_rows_of(train, groups), _everything(test, participants))


def _zipf(spec: PartitionSpec, train: Examples, test: Examples, participants: int, rng: np.random.Generator) -> Shares:
    sizes = zipf_sizes(train.n_units, participants, spec.number)
    groups = np.split(rng.permutation(train.n_units), np.cumsum(sizes)[:-1])
    return Shares(_rows_of(train, groups), _everything(test, participants))


def zipf_sizes(total: int, participants: int, exponent: float) -> Indices:
    """Whole sizes ∝ 1/rank^exponent, each at least 1, that sum to `total`: [participants], descending."""
    weights = np.arange(1, participants + 1, dtype=np.float64) ** -exponent
    exact = total * weights / weights.sum()
    sizes = np.maximum(1, np.floor(exact)).astype(np.int64)
    while sizes.sum() > total:  # the minimum of 1 gave out too much
        sizes[int(np.argmax(sizes))] -= 1
    by_remainder = np.argsort(sizes - exact, kind="stable")
    sizes[by_remainder[: total - int(sizes.sum())]] += 1
    return np.sort(sizes)[::-1].copy()


# --- label skew


def _dirichlet(
    spec: PartitionSpec, train: Examples, test: Examples, participants: int, rng: np.random.Generator
) -> Shares:
    n_classes = int(max(train.labels.max(), test.labels.max(initial=0))) + 1
    # [n_classes, participants]: drawn before any dealing, so train and test share them
    proportions = np.stack([_simplex(spec.number, participants, rng) for _ in range(n_classes)])
    unit_labels = _majority(train.units, train.labels, train.n_units)
    groups = _fill_empty(_deal(unit_labels, proportions, rng))
    return Shares(_rows_of(train, groups), tuple(np.sort(g) for g in _deal(test.labels, proportions, rng)))


def _simplex(alpha: float, size: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Dirichlet(alpha·1) of `size`; below floating point's reach it is its limit, a random corner."""
    drawn: npt.NDArray[np.float64] = rng.dirichlet(np.full(size, alpha))
    if np.isfinite(drawn).all() and drawn.sum() > 0.5:
        return drawn
    corner: npt.NDArray[np.float64] = np.eye(size, dtype=np.float64)[rng.integers(size)]
    return corner


def _deal(labels: Indices, proportions: npt.NDArray[np.float64], rng: np.random.Generator) -> list[Indices]:
    """Deals items [n] with `labels` per class by `proportions` [n_classes, participants]."""
    hands: list[list[Indices]] = [[] for _ in range(proportions.shape[1])]
    for label, shares in enumerate(proportions):
        items = rng.permutation(np.flatnonzero(labels == label))
        cuts = np.rint(np.cumsum(shares)[:-1] * len(items)).astype(np.int64)
        for hand, part in zip(hands, np.split(items, cuts), strict=True):
            hand.append(part)
    return [np.concatenate(hand) for hand in hands]


def _fill_empty(groups: list[Indices]) -> list[Indices]:
    """Moves one unit from the (then) largest group to each empty one."""
    filled = list(groups)
    for i, group in enumerate(groups):
        if len(group):
            continue
        largest = max(range(len(filled)), key=lambda j: len(filled[j]))
        filled[i], filled[largest] = filled[largest][-1:], filled[largest][:-1]
    return filled


# --- natural: the values of a column


def _column(
    spec: PartitionSpec, train: Examples, test: Examples, participants: int, rng: np.random.Generator
) -> Shares:
    for examples in (train, test):
        if spec.column not in examples.columns:
            raise PlanError(f"partition column:{spec.column}: the data has no column {spec.column!r}")
    values, codes = np.unique(train.columns[spec.column], return_inverse=True)
    unit_values = _majority(train.units, codes.astype(np.int64), train.n_units)
    sizes = np.bincount(unit_values, minlength=len(values))
    by_size = [int(v) for v in np.argsort(-sizes, kind="stable") if sizes[v]]
    owned = [by_size[i::participants] for i in range(min(participants, len(by_size)))]
    parts = _parts([int(sum(sizes[v] for v in own)) for own in owned], participants)
    groups: list[Indices] = []
    tests: list[Indices] = []
    names: list[str] = []
    for own, n_parts in zip(owned, parts, strict=True):
        members = np.flatnonzero(np.isin(unit_values, own))
        groups += np.array_split(rng.permutation(members) if n_parts > 1 else members, n_parts)
        tests += [np.flatnonzero(np.isin(test.columns[spec.column], values[own]))] * n_parts
        names += _names(str(values[own[0]]), len(own), n_parts)
    return Shares(_rows_of(train, groups), tuple(tests), _distinct(names))


def _parts(sizes: list[int], participants: int) -> list[int]:
    """Into how many parts each value goes: every further part splits the value of the largest parts."""
    parts = [1] * len(sizes)
    for _ in range(participants - len(sizes)):
        parts[max(range(len(sizes)), key=lambda i: sizes[i] / parts[i])] += 1
    return parts


def _names(value: str, n_values: int, n_parts: int) -> list[str]:
    if n_parts > 1:
        return [f"{value}-{part}" for part in range(1, n_parts + 1)]
    return [value if n_values == 1 else f"{value}+{n_values - 1}"]


def _distinct(names: list[str]) -> tuple[str, ...]:
    if len(set(names)) == len(names):
        return tuple(names)
    return tuple(f"{i:02d}-{name}" for i, name in enumerate(names, start=1))


# --- shared parts


def _rows_of(examples: Examples, groups: list[Indices]) -> tuple[Indices, ...]:
    """The ascending rows of each group of units."""
    owner = np.empty(examples.n_units, dtype=np.int64)
    for i, group in enumerate(groups):
        owner[group] = i
    row_owner = owner[examples.units]
    order = np.argsort(row_owner, kind="stable")
    cuts = np.cumsum(np.bincount(row_owner, minlength=len(groups)))[:-1]
    return tuple(np.split(order, cuts))


def _everything(test: Examples, participants: int) -> tuple[Indices, ...]:
    return (np.arange(len(test), dtype=np.int64),) * participants


def _majority(units: Indices, codes: Indices, n_units: int) -> Indices:
    """The most frequent code of each unit's rows, the smallest at a tie: [n_units]."""
    n_codes = int(codes.max()) + 1
    pairs, counts = np.unique(units * n_codes + codes, return_counts=True)
    unit, code = pairs // n_codes, pairs % n_codes
    best_first = np.lexsort((code, -counts, unit))
    firsts = np.searchsorted(unit[best_first], np.arange(n_units))
    majority: Indices = code[best_first[firsts]]
    return majority


def _number(spec: str, argument: str) -> float:
    try:
        number = float(argument)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise PlanError(f"partition {spec!r}: {argument!r} is not a finite number")
    return number


_Divider = Callable[[PartitionSpec, Examples, Examples, int, np.random.Generator], Shares]
_DIVIDERS: dict[str, _Divider] = {"iid": _iid, "zipf": _zipf, "dirichlet": _dirichlet, "column": _column}
