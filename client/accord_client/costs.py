"""What a plan would cost a site's data set, beside what is spent of it and what its operator allows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from accord_client.ledger.balance import Balance
from accord_client.ledger.chain import Chain
from accord_client.ledger.entries import Limits, Spent
from accord_client.ledger.ledger import Ledger
from accord_client.ledger.limits import epsilon_of
from accord_client.policy import Policy
from accord_client.settings import SiteFolder
from accord_shared.dp.accounting import noise_multiplier, round_event
from accord_shared.dp.events import Event
from accord_shared.dp.sharing import NoiseShares
from accord_shared.errors import AccordError, PolicyRefused, printable
from accord_shared.plan import Plan


class Change(NamedTuple):
    """One ε: before the plan, after all that it may still release, and the most that is allowed (None: no limit)."""

    spent: float
    after: float
    most: float | None

    def facts(self) -> dict[str, Any]:
        """For a program; null where there is no bound."""
        spent, after = (value if math.isfinite(value) else None for value in (self.spent, self.after))
        return {"spent": spent, "after": after, "most": self.most, "fits": self.most is None or self.after <= self.most}


class PlanCost(NamedTuple):
    """Both ε of a data set and its lineage, at its own delta."""

    dataset: str
    delta: float
    epsilon: Change
    """Against coordinator and public."""
    epsilon_all_collude: Change


def plan_cost(folder: SiteFolder, plan: Plan) -> PlanCost:
    """What the plan would add, as the ledger will count it when the plan is joined.

    Raises:
        PolicyRefused: the policy names no data set.
        ModelError: the cost depends on the model's size, and the model is not here.
        SettingsError, PrivacyError: policy or ledger cannot be used.
    """
    policy = Policy.read(folder.policy)
    limits = policy.limits.get(policy.dataset or "")
    if policy.dataset is None or limits is None:
        raise PolicyRefused("dataset: none of this site's may be trained on")
    balance = Ledger(folder.path).verify() if Chain(folder.path).exists() else Balance()
    for declared in policy.datasets():
        balance.declare(declared)
    name = policy.dataset
    left = max(0, plan.releases - balance.plan(plan.hash).rounds)
    before = balance.spent(name) + balance.reserved_by_others(name, plan.hash)
    after = before + Spent.of(release_event(plan, lambda: _parameters(plan)), left)
    public, colluding = (
        Change(_epsilon(before, limits, all_), _epsilon(after, limits, all_), most)
        for all_, most in ((False, limits.epsilon), (True, limits.epsilon_all_collude))
    )
    return PlanCost(name, limits.delta, public, colluding)


def _epsilon(spent: Spent, limits: Limits, colluding: bool) -> float:
    return epsilon_of(spent, limits.delta, limits.accountant, colluding=colluding)


def cost_facts(folder: SiteFolder, plan: Plan) -> dict[str, Any]:
    """The cost for a program, or the `problem` why it cannot be said here."""
    try:
        cost = plan_cost(folder, plan)
    except AccordError as error:
        return {"problem": printable(str(error))}
    changes = {"epsilon": cost.epsilon, "epsilon_all_collude": cost.epsilon_all_collude}
    return {"dataset": cost.dataset, "delta": cost.delta} | {key: change.facts() for key, change in changes.items()}


def _parameters(plan: Plan) -> int:
    from accord_client.facts import trainable_parameters

    return trainable_parameters(plan)


def release_event(plan: Plan, parameters: Callable[[], int]) -> Event | None:
    """What each release of a plan costs; `parameters` counts the trainable ones, where the cost depends on them."""
    z, own = noise_multiplier(plan), None
    if plan.shared_noise:
        own = NoiseShares.of(plan, parameters() + plan.extra_coordinates, z).own_multiplier
    return round_event(plan, z, own)
