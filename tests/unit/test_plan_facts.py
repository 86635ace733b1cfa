"""What `accord plan check` says of secure aggregation."""

from __future__ import annotations

import pytest

from accord_client.facts import secure_facts
from conformance.federation import secure_plan


def test_bytes_are_those_of_the_protocol() -> None:
    plan = secure_plan(10, {"cohort.minimum": 7})
    facts = secure_facts(plan, 1_000_000)
    shares = 9 * (2 + 36 * 10 + 16)
    assert facts["upload_bytes_per_site_round"] == 3_000_000 + 16 + 156 + shares + 36 * 10 * (1 + 9 * 3 // 10)
    assert facts["upload_bytes_per_site_round"] < 3_010_000
    assert (facts["signatures_needed"], facts["shares_needed"], facts["neighbours"]) == (7, 6, "all")
    assert facts["wrap_probability"] == 0.0
    assert facts["coordinate_bound"] > 0


@pytest.mark.parametrize(("bits", "payload"), [(16, 2_000_000), (20, 2_500_000), (24, 3_000_000)])
def test_bits_decide_the_payload(bits: int, payload: int) -> None:
    plan = secure_plan(5, {"secure_aggregation.bits": bits})
    assert 0 < secure_facts(plan, 1_000_000)["upload_bytes_per_site_round"] - payload < 4000


def test_a_sparse_graph_names_its_neighbours() -> None:
    plan = secure_plan(1000, {"cohort.minimum": 900})
    assert secure_facts(plan, 30_000)["neighbours"] == 15


def test_shared_noise_shows_its_second_epsilon_and_its_components() -> None:
    plan = secure_plan(
        10,
        {
            "cohort.minimum": 7,
            "privacy.noise": "cohort",
            "privacy.epsilon": 1.0,
            "local.clip_norm": 0.2,
            "run.rounds": 10,
            "secure_aggregation.bound": None,
        },
    )
    facts = secure_facts(plan, 29_568)
    assert (facts["noise_components"], facts["modulus_bits"]) == (3, 16)
    assert 3.0 < facts["epsilon_all_collude"] < 4.0
    assert facts["wrap_probability"] == 2.0**-40
    shares = 9 * (2 + 36 * 13 + 16)
    assert facts["upload_bytes_per_site_round"] == 2 * 29_568 + 16 + 156 + shares + 36 * 10 * (1 + 9 * 3 // 10)
