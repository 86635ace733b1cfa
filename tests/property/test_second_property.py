"""Any plan, not only the frozen ones: product and second implementation agree on every byte that enters a context."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from accord_shared.canonical import decimal_string
from accord_shared.dp.sharing import NoiseShares
from accord_shared.errors import PlanError
from accord_shared.plan import Plan, make_plan
from accord_shared.quantize import Encoding, default_bound, pack
from accord_shared.secagg.masking import word_type
from accord_shared.secagg.thresholds import thresholds
from vectors import second

positive = st.floats(1e-9, 1e9)


@st.composite
def plans(draw: st.DrawFn, noise: str) -> tuple[dict[str, Any], Plan]:
    """A table with some keys left out, and its plan."""
    shared = noise in ("cohort", "participant")
    local: dict[str, Any] = {
        "expected_records": draw(st.integers(1, 10**6)),
        "sampling_rate": draw(st.floats(1e-4, 1)),
        "learning_rate": draw(positive),
    }
    if noise != "none" or draw(st.booleans()):
        local["clip_norm"] = draw(st.floats(1e-6, 1e6))
    if noise != "cohort":
        local |= {"steps_per_round": draw(st.integers(1, 40)), "momentum": draw(st.floats(0, 0.999))}
        local["optimizer"] = draw(st.sampled_from(["sgd", "adam"]))
    size = draw(st.integers(5, 60))
    table: dict[str, Any] = {
        "run": {"name": "any", "rounds": draw(st.integers(1, 1000)), "max_extra_attempts": draw(st.integers(0, 5))},
        "model": {"source": "path:m"},
        "task": {"labels": draw(st.lists(st.text(st.characters(codec="utf-8"), max_size=5), min_size=2, unique=True))},
        "local": local,
        "privacy": {"noise": noise, "delta": 1e-7} | ({} if noise == "none" else {"epsilon": draw(positive)}),
        "cohort": {"size": size},
    }
    if draw(st.booleans()):
        table["cohort"]["colluders"] = draw(st.integers(0, 3))
    if shared and noise == "cohort" and draw(st.booleans()):
        table["evaluation"] = {"released_fraction": draw(st.floats(0.001, 0.5))}
    try:
        return table, make_plan(table)
    except PlanError:
        assume(False)
        raise


@given(plans("site"))
def test_plans_have_one_form(given_plan: tuple[dict[str, Any], Plan]) -> None:
    table, plan = given_plan
    assert second.plan_canonical(table) == plan.canonical().decode()


@given(st.sampled_from(["site", "none"]).flatmap(plans), st.floats(0.2, 1e6))
@settings(max_examples=200)
def test_bounds_and_scales(given_plan: tuple[dict[str, Any], Plan], sigma: float) -> None:
    table, plan = given_plan
    noise = sigma if plan.privacy.noise == "site" else 0.0
    bound = default_bound(plan, noise)
    assert second.decimal_text(second.site_bound(table, noise)) == decimal_string(bound)
    try:
        encoding = Encoding(24, plan.cohort.size, bound)
    except PlanError:
        return
    assert second.scale_of(24, plan.cohort.size, bound) == encoding._parts
    assert second.reach_of(24, plan.cohort.size, bound) == encoding.reach


@given(st.sampled_from(["cohort", "participant"]).flatmap(plans), st.integers(1, 10**6), st.floats(0.2, 200))
@settings(max_examples=40)
def test_grids(given_plan: tuple[dict[str, Any], Plan], dimension: int, sigma: float) -> None:
    table, plan = given_plan
    colluders = plan.cohort.size - plan.noise_sharers
    try:
        shares = NoiseShares.of(plan, dimension, sigma)
    except PlanError:
        return
    found, bits = second.grid_of(table, dimension, sigma, colluders)
    assert found.facts(bits) == list(shares.facts)
    assert (found.reach, found.tail) == (shares.reach, shares.tail)
    for survivors in range(shares.minimum, shares.sites + 1):
        assert found.removed(survivors) == list(shares.removed(survivors))


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_decimals(value: float) -> None:
    text = second.decimal_text(value)
    assert text == decimal_string(value)
    assert float(text) == value
    assert math.copysign(1.0, float(text)) == math.copysign(1.0, value) or value == 0.0


@given(st.integers(8, 62), st.lists(st.integers(0, 2**62 - 1), max_size=40))
def test_packing(bits: int, values: list[int]) -> None:
    words = [value % (1 << bits) for value in values]
    data = pack(np.array(words, dtype=word_type(bits)), bits).tobytes()
    assert second.pack(words, bits) == data
    assert second.unpack(data, bits, len(words)) == words


@given(
    n=st.integers(2, 128),
    minimum=st.integers(1, 128),
    colluders=st.integers(0, 20),
    mode=st.sampled_from(["malicious", "semi_honest"]),
    own=st.booleans(),
)
def test_thresholds(n: int, minimum: int, colluders: int, mode: Any, own: bool) -> None:
    try:
        rule = thresholds(n, minimum, colluders, mode, own_noise=own)
    except PlanError:
        try:
            second.thresholds(n, minimum, colluders, mode, n, own_noise=own)
        except second.Refused:
            return
        raise
    assert second.thresholds(n, minimum, colluders, mode, n, own_noise=own) == (rule.sign, rule.share)
