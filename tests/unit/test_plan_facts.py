"""What `accord plan check` says of secure aggregation."""

from __future__ import annotations

import pytest

from accord_client.facts import secure_facts
from conformance.federation import secure_plan


def test_bytes_are_those_of_the_protocol() -> None:
    plan = secure_plan(10, {"cohort.minimum": 7})
    facts = secure_facts(plan, 1_000_000)
    shares = 9 * (2 + 36 * 10 + 16)
    assert facts["upload_bytes_per_site_round"] == 3_000_000 + 16 + 116 + shares + 36 * 10 * (1 + 9 * 3 // 10)
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
