"""The operator's limits: what was spent and what is about to be, against the most that is allowed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from accord_client.ledger.balance import Balance
from accord_client.ledger.entries import Limits, Spent
from accord_shared.dp.accounting import epsilon
from accord_shared.dp.events import Event
from accord_shared.errors import LimitReached, PrivacyError


@dataclass(frozen=True)
class _Cap:
    """One limit."""

    most: float
    delta: float
    accountant: str
    colluding: bool
    run: bool


def _caps(limits: Limits) -> Iterator[_Cap]:
    for most, colluding, run in (
        (limits.epsilon, False, False),
        (limits.epsilon_all_collude, True, False),
        (limits.run_epsilon, False, True),
        (limits.run_epsilon_all_collude, True, True),
    ):
        if most is not None:
            yield _Cap(most, limits.delta, limits.accountant, colluding, run)


def epsilon_of(spent: Spent, delta: float, accountant: str = "pld", *, colluding: bool = False) -> float:
    """ε of what was spent; infinite if anything left without noise."""
    if spent.bare:
        return math.inf
    events = sorted(spent.events, key=repr)  # one order, so that the accountant's cache knows them again
    return epsilon(events, delta, accountant, colluding=colluding)


class LimitCheck:
    """Compares totals with limits.

    A total that has no more of any mechanism than one which was found to fit does fit, so a round within a plan that
    was checked as a whole costs no accounting.
    """

    def __init__(self) -> None:
        self._fits: dict[_Cap, dict[Event, int]] = {}

    def check(self, balance: Balance, dataset: str, plan: str, cost: Spent) -> None:
        """Would `cost`, on top of all that is spent and reserved by others, break a limit of the lineage?

        Raises:
            LimitReached: it would.
            PrivacyError: the operator declared data sets, but not this one.
        """
        if balance.declared and dataset not in balance.declared:
            raise PrivacyError(f"data set {dataset!r} is not declared")
        family = [balance.declared[name] for name in sorted(balance.lineage(dataset)) if name in balance.declared]
        caps = [(declared.name, cap) for declared in family for cap in _caps(declared.limits)]
        if not caps:
            return
        run = balance.spent(dataset, plan) + cost
        total = balance.spent(dataset) + balance.reserved_by_others(dataset, plan) + cost
        for name, cap in caps:
            self._within(cap, run if cap.run else total, name)

    def _within(self, cap: _Cap, total: Spent, name: str) -> None:
        steps, known = total.steps(), self._fits.get(cap, {})
        if not total.bare and all(count <= known.get(one, 0) for one, count in steps.items()):
            return
        found = epsilon_of(total, cap.delta, cap.accountant, colluding=cap.colluding)
        if not found <= cap.most:
            against = "if all others collude" if cap.colluding else "against coordinator and public"
            what = f"one run on data set {name!r}" if cap.run else f"data set {name!r}"
            raise LimitReached(f"epsilon {found:.4g} of {what} ({against}) would exceed the limit of {cap.most:g}")
        self._fits[cap] = steps
