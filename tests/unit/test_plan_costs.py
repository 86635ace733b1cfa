"""What an operator sees before a plan is approved is what the ledger counts when it is joined."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from accord_client.cli_site.plan import cost_lines
from accord_client.costs import Change, cost_facts, plan_cost
from accord_client.ledger.entries import DataSet, Limits
from accord_client.policy import Policy
from accord_client.settings import SiteFolder
from accord_client.store import SiteStore
from accord_shared.dp.accounting import noise_multiplier, round_event
from accord_shared.dp.sharing import NoiseShares
from accord_shared.errors import LimitReached, ModelError, PolicyRefused
from accord_shared.plan import Plan
from conftest import plan_of

DELTA = 1e-6


def site(path: Path, **limits: Any) -> SiteFolder:
    folder = SiteFolder(path)
    given = {"epsilon": 8.0, "epsilon_all_collude": 40.0, "delta": DELTA, "accountant": "rdp"} | limits
    table = {"dataset": "cases", "datasets": {"cases": given | {"derived_from": "raw"}, "raw": given}}
    folder.policy.write_text(tomli_w.dumps(table))
    return folder


def store(folder: SiteFolder) -> SiteStore:
    return SiteStore(folder.path, durable=False, datasets=Policy.read(folder.policy).datasets())


def shared() -> Plan:
    return plan_of(
        {
            "privacy.noise": "cohort",
            "privacy.delta": DELTA,
            "privacy.epsilon": 2.0,
            "cohort.size": 5,
            "cohort.minimum": 4,
            "secure_aggregation.mode": "malicious",
            "run.max_extra_attempts": 1,
        }
    )


@pytest.mark.parametrize("plan", [plan_of({"privacy.epsilon": 2.0, "privacy.delta": DELTA}), shared()])
def test_the_cost_is_what_the_ledger_will_count(plan: Plan, tmp_path: Path) -> None:
    folder = site(tmp_path)
    earlier = plan_of({"run.name": "earlier", "privacy.delta": DELTA})
    before = round_event(earlier, noise_multiplier(earlier), None)
    for number in (1, 2):
        store(folder).release(earlier.hash, number, "m", None, before, dataset="raw")  # the lineage's, not its own
    cost = plan_cost(folder, plan)
    assert (cost.dataset, cost.delta) == ("cases", DELTA)
    z = noise_multiplier(plan)
    own = NoiseShares.of(plan, 3 * 384, z).own_multiplier if plan.shared_noise else None
    event = round_event(plan, z, own)
    ledger = SiteStore(folder.path, durable=False).ledger
    assert cost.epsilon.spent == pytest.approx(ledger.epsilon("cases", DELTA, "rdp"))
    for key, change in (("epsilon", cost.epsilon), ("epsilon_all_collude", cost.epsilon_all_collude)):
        assert 0 < change.spent < change.after
        for factor, fits in ((1.000001, True), (0.999999, False)):
            limits = Limits(delta=DELTA, accountant="rdp", **{key: change.after * factor})
            own_store = SiteStore(folder.path, durable=False, datasets=[DataSet(name="cases", limits=limits)])
            if fits:
                own_store.check_plan(plan.hash, event, plan.releases, dataset="cases")
            else:
                with pytest.raises(LimitReached):
                    own_store.check_plan(plan.hash, event, plan.releases, dataset="cases")
    assert (cost.epsilon_all_collude.after > cost.epsilon.after) == plan.shared_noise


def test_what_a_plan_has_spent_itself_is_not_counted_twice(tmp_path: Path) -> None:
    folder, plan = site(tmp_path), plan_of({"privacy.delta": DELTA})
    event = round_event(plan, noise_multiplier(plan), None)
    fresh = plan_cost(folder, plan)
    store(folder).release(plan.hash, 1, "m", None, event, dataset="cases")
    begun = plan_cost(folder, plan)
    assert fresh.epsilon.spent == 0
    assert begun.epsilon.spent > 0
    assert begun.epsilon.after == pytest.approx(fresh.epsilon.after)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (Change(3.21, 4.6, 8.0), "3.21 → 4.6 of 8"),
        (Change(3.21, 8.6, 8.0), "3.21 → 8.6 of 8: more than allowed"),
        (Change(0, 1.0, None), "0 → 1 (no limit)"),
        (Change(1.0, float("inf"), 8.0), "1 → no bound of 8: more than allowed"),
    ],
)
def test_lines_for_people(change: Change, line: str) -> None:
    one = json.loads(json.dumps(change.facts()))
    lines = cost_lines({"dataset": "cases", "delta": 1e-6, "epsilon": one, "epsilon_all_collude": one})
    assert lines[0].split(maxsplit=2)[2] == "cases, delta 1e-06"
    assert lines[1].partition(" ")[2].strip() == line
    assert lines[2].endswith(line)


def test_where_it_cannot_be_said(tmp_path: Path) -> None:
    folder = site(tmp_path)
    with pytest.raises(ModelError):
        plan_cost(folder, shared().revised({"model.source": "package:no_such_model"}))
    folder.policy.write_text("version = 1\n")
    with pytest.raises(PolicyRefused):
        plan_cost(folder, plan_of())
    assert cost_lines(cost_facts(folder, plan_of()))[0].endswith(
        "not known: dataset: none of this site's may be trained on"
    )
