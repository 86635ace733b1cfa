"""From scenario files to plans: shipped files, overrides, tuned keys, make-up rounds, the learning-rate rule."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from accord_client.data import Examples
from accord_shared.dp.accounting import noise_multiplier
from accord_shared.errors import PlanError
from accord_shared.plan import Plan
from accord_simulations.faults import Faults, FaultSpec, SimulatedCrash
from accord_simulations.population import Participant, Population
from accord_simulations.scenario import make_scenario, read_scenario, resolve, shipped, split_changes


def population(participants: int = 10, records: int = 100) -> Population:
    rows = np.arange(records, dtype=np.int64)
    examples = Examples(texts=tuple(f"text {row}" for row in rows), labels=rows % 2, units=rows)
    members = tuple(Participant(f"site-{i}", examples, examples) for i in range(participants))
    whole = replace(examples, texts=examples.texts * participants)
    return Population(("a", "b"), ("a", "b"), members, whole, examples, None, None, "made here")


def resolved(name: str, changes: dict[str, Any] | None = None, participants: int = 10) -> Plan:
    scenario, in_plan = split_changes(name, changes or {})
    return resolve(scenario, population(participants), in_plan, "sha256:" + "0" * 64).plan


@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_shipped_scenario_resolves(name: str) -> None:
    plan = resolved(name)
    assert plan.privacy.epsilon == 8.0
    assert plan.cohort.size == 10
    assert plan.local.expected_records == 100
    assert Plan.from_json(plan.to_json()) == plan


def test_dropouts_are_made_up_for_at_no_more_epsilon() -> None:
    plan = resolved("bank-demo", {"faults.dropout": 0.3, "secure_aggregation.mode": "off"})
    assert (plan.run.rounds, plan.rounds_per_site) == (143, 100)
    assert noise_multiplier(plan) == noise_multiplier(resolved("bank-demo"))
    assert plan.cohort.minimum == 2
    early = resolved("bank-demo", {"faults.dropout": 0.3, "faults.dropout_at": "upload"})
    assert (early.run.rounds, early.rounds_per_site) == (143, 100)
    explicit = resolved("bank-demo", {"faults.dropout": 0.3, "run.rounds": 50})
    assert (explicit.run.rounds, explicit.rounds_per_site) == (50, 50)


@pytest.mark.parametrize(("mode", "rounds"), [("malicious", 112), ("semi_honest", 118)])
def test_of_secure_rounds_only_losses_at_the_first_trip_are_made_up_for(mode: str, rounds: int) -> None:
    plan = resolved("bank-demo", {"faults.dropout": 0.3, "secure_aggregation.mode": mode})
    assert (plan.run.rounds, plan.rounds_per_site) == (rounds, 100)  # 100 / (1 - 0.3 / 3), 100 / (1 - 0.3 / 2)
    assert plan.cohort.minimum == 7  # two thirds of ten and one, and all that is left after the losses


def test_the_learning_rate_follows_noise_and_participants() -> None:
    at_8, at_1 = (resolved("bank-demo", {"privacy.epsilon": e}).server.learning_rate for e in (8.0, 1.0))
    # η = 1.4·N/(σ₁√n)·(1-β)/(C·T) with N = 1,000, n = 10, β = 0.8, C = 0.2, T = 100 and σ₁ = 0.60023, 3.73064
    assert at_8 == pytest.approx(1.4 * 1000 / (0.60023 * 10**0.5) * 0.2 / 20, rel=1e-3)
    assert at_1 == pytest.approx(1.4 * 1000 / (3.73064 * 10**0.5) * 0.2 / 20, rel=1e-3)
    assert resolved("bank-demo", {"server.learning_rate": 2.5}).server.learning_rate == 2.5


def test_tuned_keys_apply_when_they_match_and_yield_to_the_user() -> None:
    plain = resolved("bank-intents", {"privacy.noise": "none"})
    assert plain.privacy.epsilon is None
    assert (plain.run.rounds, plain.server.learning_rate) == (150, 200.0)
    own = resolved("bank-intents", {"privacy.noise": "none", "run.rounds": 7})
    assert (own.run.rounds, own.server.learning_rate) == (7, 200.0)
    lora = resolved("bank-intents", {"adapter.depth": "lora"})
    assert (lora.adapter.layers, lora.adapter.freeze_a, lora.run.rounds) == ("last:2", True, 8)


def test_a_cohort_much_smaller_than_a_large_population_is_refused_with_the_reason() -> None:
    """All participants are on the roster, and above 128 sites the graph spans it."""
    few = {"cohort.size": 200, "cohort.minimum": 160}
    assert resolved("bank-demo", few, participants=230).cohort.size == 200
    with pytest.raises(PlanError, match="spans the roster: 400 sites with 0 colluders need 267 to sign"):
        resolved("bank-demo", few, participants=400)
    with pytest.raises(PlanError, match=r"cohort\.minimum = 160, but the roster has 100 members"):
        resolved("bank-demo", few, participants=100)
    assert resolved("bank-demo", {**few, "secure_aggregation.mode": "off"}, participants=400).cohort.size == 200


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"population.participants": 1}, "participants"),
        ({"population.nothing": 1}, "nothing"),
        ({"compare.nobody": {}}, "compare.nobody"),
        ({"faults.dropout": 1.5}, "dropout"),
        ({"data.kind": "magic"}, "magic"),
    ],
)
def test_bad_scenarios_are_refused_by_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        split_changes("bank-demo", change)


def test_an_unknown_mode_is_refused_by_name() -> None:
    with pytest.raises(PlanError, match=r"secure_aggregation\.mode = 'perhaps'"):
        resolved("bank-demo", {"secure_aggregation.mode": "perhaps", "faults.dropout": 0.3})


def test_unknown_scenarios_name_the_shipped_ones() -> None:
    with pytest.raises(PlanError, match="bank-demo"):
        read_scenario("nope")
    with pytest.raises(PlanError, match="missing key"):
        make_scenario({})


def test_the_wanted_fraction_drops_out_of_every_round() -> None:
    from accord_shared.messages import TrainRequest

    for number in range(1, 20):
        request = TrainRequest(1, "r", "h", number, 1, np.zeros(1, dtype=np.float32))
        dropped = 0
        for index in range(10):
            try:
                Faults(FaultSpec(dropout=0.3), 0, index, 10).handle(lambda message: message, request)
            except SimulatedCrash:
                dropped += 1
        assert dropped == 3
