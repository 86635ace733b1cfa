"""Attacks on shared noise, its accounting and its ledger: less noise than promised, seeds of what must stay, attempts
that cost nothing, absurd plans, ledgers that went back.

What is expected to fail is not stopped yet, and its docstring says what it would take.
"""

from __future__ import annotations

import math
import shutil
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from accord_client.gradients import GradientTape
from accord_client.ledger.entries import DataSet, Limits, Released, Reserved
from accord_client.ledger.ledger import Ledger
from accord_client.ledger.receipts import Receipt
from accord_client.site import RESTARTS
from accord_client.trainer import clipped_update
from accord_shared.dp.accounting import SLACK, epsilon, gaussian_epsilon, noise_multiplier, round_event, run_epsilon
from accord_shared.dp.discrete import (
    ROUNDING_VARIANCE,
    DiscreteGaussian,
    _reach,
    _rounding_table,
    _Table,
    _thresholds,
    round_to_integers,
)
from accord_shared.dp.events import SampledGaussian, SharedGaussian, event_from_json
from accord_shared.dp.noise import SecureGenerator
from accord_shared.dp.sharing import NoiseShares, sensitivity
from accord_shared.errors import AccordError, LimitReached, PlanError, ProtocolError, UnknownMechanism
from accord_shared.exact import exact
from accord_shared.messages import MaskedUpload, MaskRequest, Opened, OpenRequest, Refusal
from accord_shared.plan import Plan, apply_changes, make_plan
from accord_shared.quantize import _signed, decode, encode
from accord_shared.receipts import Head
from accord_shared.roster import Roster
from accord_shared.secagg import shamir
from accord_shared.secagg.dealing import map_bytes
from accord_shared.secagg.keys import Attempt, Bundle, RunTerms, unseal
from accord_shared.vectors import Vector
from adversarial.hostile import DIMENSION, World
from adversarial.hostile import Setting as PlainSetting
from conformance.federation import identity
from conformance.secure_lab import SecureLab, secure_lab_plan

ALL, WITHOUT_D = tuple(range(7)), (0, 1, 2, 4, 5, 6)


def noise_plan(changes: dict[str, Any] | None = None) -> Plan:
    """Seven banks of a thousand records, ε = 1."""
    table: dict[str, Any] = {
        "run": {"name": "hostile", "rounds": 10, "max_extra_attempts": 1},
        "model": {"source": "package:none"},
        "task": {"labels": ["a", "b"]},
        "local": {"expected_records": 1000, "clip_norm": 0.2},
        "privacy": {"noise": "cohort", "epsilon": 1.0},
        "cohort": {"size": 7, "minimum": 5, "colluders": 1},
    }
    return make_plan(apply_changes(table, changes or {}))


def shares_of(changes: dict[str, Any] | None = None, dimension: int = DIMENSION) -> NoiseShares:
    plan = noise_plan(changes)
    return NoiseShares.of(plan, dimension, noise_multiplier(plan))


# --- absurd plans: a typed refusal or a right result, never a wrong one


ABSURD: list[dict[str, Any]] = [
    {"local.learning_rate": 5e-324},
    {"local.learning_rate": 1e-320},
    {"local.learning_rate": 1e308},
    {"local.learning_rate": 1e300, "local.clip_norm": 1e6, "local.sampling_rate": 1e-6, "privacy.accountant": "rdp"},
    {"local.clip_norm": 1e-6, "local.learning_rate": 1e-9},
    {"local.clip_norm": 1e6},
    {"local.expected_records": 1},
    {"local.expected_records": 10**9, "privacy.delta": 1e-10},
    {"local.expected_records": 2**53 - 1, "privacy.delta": 1e-17},
    {"local.sampling_rate": 5e-324},
    {"local.sampling_rate": 1e-12, "privacy.accountant": "rdp"},
    {"local.sampling_rate": 1.0 - 1e-12},
    {"local.sampling_rate": 0.01, "privacy.delta": 1e-16, "privacy.accountant": "prv"},
    {"privacy.epsilon": 1e-3},
    {"privacy.epsilon": 1e-3, "privacy.accountant": "rdp"},
    {"privacy.epsilon": 1e-3, "privacy.accountant": "prv", "local.sampling_rate": 0.01},
    {"privacy.epsilon": 1e3},
    {"privacy.epsilon": 5e-324},
    {"privacy.epsilon": 1e300},
    {"privacy.delta": 1e-18},
    {"privacy.delta": 5e-324},
    {"secure_aggregation.bound": 5e-324},
    {"secure_aggregation.bound": 1e9, "secure_aggregation.bits": 62},
    {"secure_aggregation.bound": 1e300},
    {"run.rounds": 100_000, "run.max_extra_attempts": 1000},
    {"privacy.noise": "participant", "local.learning_rate": 1e308},
    {"evaluation.released_fraction": 0.5, "local.expected_records": 10**9, "privacy.delta": 1e-10},
]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("changes", ABSURD, ids=str)
def test_an_absurd_plan_is_refused_or_right(changes: dict[str, Any]) -> None:
    try:
        plan = noise_plan(changes)
        shares = NoiseShares.of(plan, 30_000, noise_multiplier(plan))
        event = round_event(plan, shares.multiplier, shares.own_multiplier)
    except PlanError:
        return
    assert event is not None
    assert run_epsilon(plan, event) <= (plan.privacy.epsilon or 0.0)
    require_promise(shares)
    largest = shares.bound * shares.scale
    off = decode(encode(np.full(30_000, 0.99 * shares.bound), shares, SecureGenerator(bytes(32))), shares, 1)
    spread = math.sqrt(float(shares.share(shares.sites)))
    assert abs(off * shares.scale - 0.99 * largest).max() < 8 * spread + 1 + largest * 1e-9


def test_a_bound_beyond_fixed_point_is_refused() -> None:
    """A coordinate of 10^8 came out as -10^7: past 63 bits the clamp no longer clamps, and one unit moves all."""
    with pytest.raises(PlanError, match="too wide"):
        shares_of({"secure_aggregation.bound": 1e12, "secure_aggregation.bits": 62})
    widest = shares_of({"secure_aggregation.bound": 1e5, "secure_aggregation.bits": 60})
    values = np.array([9e4, -9e4, 1e300, -1e300] * (DIMENSION // 4))
    off = decode(encode(values, widest, SecureGenerator(bytes(32))), widest, 1)
    np.testing.assert_allclose(off, np.clip(values, -1e5, 1e5), rtol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"noise_multiplier": math.nan},
        {"noise_multiplier": math.inf},
        {"noise_multiplier": 1e-200},
        {"noise_multiplier": 10**400},
        {"noise_multiplier": True},
        {"noise_multiplier": "5"},
        {"own_noise_multiplier": 1e-200},
        {"own_noise_multiplier": 3.0},
        {"own_noise_multiplier": math.nan},
        {"sampling_rate": 0},
        {"sampling_rate": math.nan},
        {"sampling_rate": 1.0000001},
        {"steps": 0},
        {"steps": True},
        {"steps": 1.0},
        {"slack": -1e-9},
        {"slack": 1},
        {"slack": math.nan},
        {"kind": "gaussian"},
        {"more": 1},
    ],
    ids=str,
)
def test_absurd_events_of_a_ledger_are_refused(changes: dict[str, Any]) -> None:
    good = SharedGaussian(2.0, 1.0, 0.5, 1, SLACK).to_json()
    assert event_from_json(good)
    with pytest.raises((UnknownMechanism, TypeError)):
        event_from_json({**good, **changes})


def test_slack_counts() -> None:
    """Of a ledger's events too; a plan whose δ does not bear it is refused before anything is calibrated."""
    event = SharedGaussian(4.0, 1.0, 1.0, 1, 2e-6)
    assert epsilon([event] * 6, 1e-5) == math.inf
    assert epsilon([event] * 4, 1e-5) == pytest.approx(gaussian_epsilon(2.0, 2e-6), rel=1e-6)
    with pytest.raises(PlanError, match="rounding costs"):
        noise_multiplier(noise_plan({"privacy.delta": 1e-19}))


def test_little_noise_is_accounted_in_a_moment() -> None:
    """What is left of many sites' noise if all others collude: its sampled loss distribution would take gigabytes."""
    event = SharedGaussian(1.0, 0.18, 0.5, 1, SLACK)
    found = epsilon([event], 1e-5, colluding=True)
    assert found == pytest.approx(gaussian_epsilon(0.18, 1e-5), rel=1e-3)
    assert found > epsilon([replace(event, own_noise_multiplier=0.2)], 1e-5, colluding=True)
    assert epsilon([SharedGaussian(1.0, 0.02, 0.1, 100, SLACK)] * 9, 1e-5, colluding=True) == math.inf  # no proof


def test_participant_noise_is_never_amplified() -> None:
    plan = noise_plan({"privacy.noise": "participant", "local.sampling_rate": 0.01})
    event = round_event(plan, 3.0)
    assert event is not None
    assert event.sampling_rate == 1.0
    assert noise_multiplier(plan) == noise_multiplier(plan.revised({"local.sampling_rate": 1.0}))


# --- shares of noise


def test_above_128_sites_what_any_count_opens_is_part_of_what_a_greater_one_opens() -> None:
    """There each holder is shown a count of its own: on a binary scale two of them open what neither opens alone."""
    for size in (128, 129):
        plan = noise_plan({"cohort.size": size, "cohort.minimum": 115, "cohort.colluders": 0})
        shares = NoiseShares.of(plan, 8, 4.0)
        require_promise(shares)
        opened = [set(shares.removed(count)) for count in range(115, size + 1)]
        assert all(fewer <= more for fewer, more in pairwise(opened)) is (size > 128)


def require_promise(shares: NoiseShares) -> None:
    """Any number of survivors, with the most colluders, hides behind z·Δ and what the continuous Gaussian lacks."""
    promised = exact(shares.multiplier) ** 2 * exact(shares.delta_steps) ** 2 + 4
    for survivors in range(shares.minimum, shares.sites + 1):
        kept = ROUNDING_VARIANCE + shares.base + sum(shares.components[index] for index in shares.kept(survivors))
        assert kept * (survivors - shares.colluders) >= promised
        opened = set(shares.removed(survivors))
        assert opened == set(range(len(shares.components))) - set(shares.kept(survivors))
    alone = shares.share(shares.sites) - 4
    assert Fraction(shares.own_multiplier) ** 2 * Fraction(shares.delta_steps) ** 2 <= alone


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cohort.colluders": 2, "cohort.minimum": 6},
        {"cohort.size": 30, "cohort.minimum": 20, "cohort.colluders": 3},
        {"cohort.size": 100, "cohort.minimum": 70, "cohort.colluders": 0},
        {"privacy.epsilon": 20.0},
    ],
    ids=str,
)
def test_every_number_of_survivors_keeps_the_promise(changes: dict[str, Any]) -> None:
    require_promise(shares_of(changes, 29_568))


def test_a_share_that_is_not_smooth_and_a_sum_that_wraps_are_refused() -> None:
    shares = shares_of()
    with pytest.raises(PlanError, match="not smooth"):
        replace(shares, steps=1)
    with pytest.raises(PlanError, match="could wrap"):
        replace(shares, bits=shares.bits - 4)
    with pytest.raises(PlanError, match="too many"):
        replace(shares, dimension=10**18, bits=62)


def test_sensitivity_is_above_the_worst_unit_after_the_coin() -> None:
    """A unit on all coordinates alike moves many of them by a part of a grid point: coins round up or down."""
    dimension, steps = 40_000, 1
    moved = 256.0 * steps / math.sqrt(dimension)  # 1.28 grid points each: 1 or 2
    up = moved % 1.0
    worst = math.sqrt(dimension * (1.0 + up * 3.0)) / 256.0
    assert steps * 1.02 < worst < sensitivity(steps, dimension) < worst * 1.05
    for d in (1, 100, 10**6):
        least = math.sqrt((256.0 * 5) ** 2 + d / 4 + math.sqrt(120 * math.log(2)) * (256.0 * 5 + math.sqrt(d) / 2))
        assert sensitivity(5, d) >= min(least, 256.0 * 5 + math.sqrt(d)) / 256.0


# --- samples


def test_each_row_of_the_rounding_table_is_its_distribution() -> None:
    """Distance from D(f/256, 9) of what a uniform number gives, by the table's own cells and thresholds."""
    table, reach = _rounding_table(), _reach(ROUNDING_VARIANCE)
    outcomes = table.outcomes.reshape(256, 1024)
    for f in (0, 1, 64, 127, 128, 255):
        weights = [math.exp(-((k - f / 256) ** 2) / 18) for k in range(-reach, reach + 2)]
        due = np.cumsum(weights) / sum(weights)
        below = np.array([np.count_nonzero(outcomes[f] <= k) / 1024 for k in range(-reach, reach + 2)])
        unsure = np.count_nonzero(outcomes[f] == -(1 << 15)) / 1024
        assert (below - unsure <= due + 1e-9).all()
        assert (due <= below + 1e-9).all()


def test_what_is_encoded_has_its_variance_and_no_bias() -> None:
    shares = shares_of(dimension=60_000)
    values = np.linspace(-0.7, 0.7, 60_000) * shares.clip
    off = (decode(encode(values, shares, SecureGenerator(bytes(32))), shares, 1) - values) * shares.scale
    due = float(shares.share(shares.sites))
    assert abs(off.var() / due - 1.0) < 5 * math.sqrt(2 / len(off))
    assert abs(off.mean()) < 5 * math.sqrt(due / len(off))


def test_rounding_has_its_variance_at_every_fraction() -> None:
    for fraction in (0, 13, 128, 255):
        words = np.zeros(60_000, dtype=np.uint32)
        round_to_integers(np.full(60_000, 256 * 9 + fraction), words, SecureGenerator(bytes(32)))
        values = words.view(np.int32) - 9.0 - fraction / 256
        assert abs(values.mean()) < 5 * 3 / math.sqrt(60_000)
        assert abs(values.var() / 9 - 1) < 5 * math.sqrt(2 / 60_000)


@pytest.mark.parametrize("variance", [9, 65_536, 65_537, 10**8, 10**13])
def test_no_part_of_a_seed_is_used_twice(variance: int) -> None:
    """Keystream that two levels shared would show in the variance; the undecided cells' in the tails."""
    values = DiscreteGaussian(Fraction(variance)).sample(bytes(range(32)), 200_000).astype(np.float64)
    scaled = values / math.sqrt(variance)
    assert abs(scaled.var() - 1) < 5 * math.sqrt(2 / len(scaled))
    assert abs((scaled**4).mean() - 3) < 5 * math.sqrt(96 / len(scaled))
    assert abs(np.corrcoef(scaled[1:], scaled[:-1])[0, 1]) < 5 / math.sqrt(len(scaled))


def test_bits_after_an_undecided_cell_are_uniform() -> None:
    """In a cell with two outcomes both come as often as the threshold says."""
    thresholds = _thresholds(Fraction(0), Fraction(9), -42, 42)
    table = _Table(-42, [thresholds], 16)
    cell = next(t >> 128 for t in thresholds if 0.3 < (t & (2**128 - 1)) / 2**128 < 0.7)
    due = next((t & (2**128 - 1)) / 2**128 for t in thresholds if t >> 128 == cell)
    bits = SecureGenerator(bytes(32)).uint64(40_000).reshape(-1, 2)
    found = table.decide(np.full(20_000, cell, dtype=np.int64), bits)
    assert abs(np.mean(found == found.min()) - due) < 5 * 0.5 / math.sqrt(20_000)


def test_a_number_at_a_threshold_is_above_it() -> None:
    """All 144 bits count, the last ones too."""
    thresholds = _thresholds(Fraction(0), Fraction(9), -42, 42)
    table = _Table(-42, [thresholds], 16)
    for place in (35, 42, 49):
        rest = thresholds[place] & (2**128 - 1)
        bits = np.array([divmod(number, 2**64) for number in (rest - 1, rest, rest + 1)], dtype=np.uint64)
        cells = np.full(3, thresholds[place] >> 128)
        assert table.decide(cells, bits).tolist() == [place - 42, place - 41, place - 41]


def test_samples_are_those_of_the_specification() -> None:
    """PROTOCOL.md, section 13, from its words: which keystream decides what, at two levels."""
    seed, count, variance = bytes(range(32)), 4000, 70_000

    def keystream(level: int, part: int, size: int) -> bytes:
        counter = bytes([level, part]) + bytes(14)
        return Cipher(algorithms.AES256(seed), modes.CTR(counter)).encryptor().update(bytes(size))

    def drawn(level: int, spread: Fraction) -> list[int]:
        reach = math.ceil(13.6 * math.sqrt(spread)) + 1
        thresholds = _thresholds(Fraction(0), spread, -reach, reach)
        tops = [threshold >> 128 for threshold in thresholds]
        further, found = keystream(level, 1, 16 * count), []
        for first in np.frombuffer(keystream(level, 0, 2 * count), dtype="<u2").tolist():
            low = bisect_left(tops, first)
            if low < len(tops) and tops[low] == first:
                high, rest = struct.unpack("<QQ", further[:16])
                further = further[16:]
                low = bisect_right(thresholds, first << 128 | high << 64 | rest)
            found.append(low - reach)
        return found

    m = math.isqrt(variance) // 100 + 1
    least = Fraction(25 * m * m, 4)
    low, high = drawn(0, least), drawn(1, (variance - least) / m**2)
    expected = [one + m * other for one, other in zip(low, high, strict=True)]
    assert DiscreteGaussian(Fraction(variance)).sample(seed, count).tolist() == expected


def test_rounding_alone_is_noise_of_variance_nine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DiscreteGaussian, "add", lambda *_, **__: None)
    shares = shares_of(dimension=60_000)
    steps = np.linspace(-3.0, 3.0, 60_000)
    off = decode(encode(steps / shares.scale, shares, SecureGenerator(bytes(32))), shares, 1) * shares.scale - steps
    assert abs(off.mean()) < 5 * 3 / math.sqrt(60_000)
    assert abs(off.var() / 9 - 1) < 5 * math.sqrt(2 / 60_000)


def test_outputs_that_never_meet_have_no_epsilon() -> None:
    """Found: 120 sites at ε = 20; alone, a site has 1/38 of a clip norm. ε = 876 was claimed, but δ is 1 at any ε.

    Samples that are off by t cost t·(1 + e^ε) of δ, not t: nothing up to ε of about 40, and no proof above.
    """
    plan = noise_plan(
        {
            "cohort.size": 120,
            "cohort.minimum": 118,
            "cohort.colluders": 0,
            "privacy.epsilon": 20.0,
            "run.rounds": 1,
            "run.max_extra_attempts": 0,
        }
    )
    shares = NoiseShares.of(plan, 1, noise_multiplier(plan))
    event = round_event(plan, shares.multiplier, shares.own_multiplier)
    assert event is not None
    farthest = _reach(shares.base) + _reach(ROUNDING_VARIANCE)
    disjoint = shares.steps > 2 * farthest + 1
    assert not disjoint or epsilon([event], plan.privacy.delta, colluding=True) == math.inf


# --- seeds of components


@dataclass(frozen=True)
class Setting(PlainSetting):
    """Seven sites that share noise."""

    def terms(self, run_id: str, roster: Roster) -> RunTerms:
        noise = shares_of()
        return replace(super().terms(run_id, roster), bits=noise.bits, bound=noise.bound, noise=noise)


def noisy_world() -> World:
    return World(Setting(bits=shares_of().bits))


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> dict[bytes, Fraction]:
    """Every seed that noise was expanded from, with its variance."""
    seeds: dict[bytes, Fraction] = {}
    whole = DiscreteGaussian.add

    def add(self: DiscreteGaussian, words: Any, seed: bytes, *, negative: bool = False) -> None:
        assert negative or seed not in seeds, "the same noise twice"
        seeds[seed] = self.variance
        whole(self, words, seed, negative=negative)

    monkeypatch.setattr(DiscreteGaussian, "add", add)
    return seeds


def rebuilt(openings: Sequence[tuple[int, bytes]], place: int) -> bytes:
    """The secret at a place of what holders opened."""
    size = shamir.SHARE_BYTES
    rows = np.stack([shamir.from_bytes(part[size * place : size * (place + 1)], 1) for _, part in openings])
    return shamir.rebuild(rows, [holder for holder, _ in openings])[0].tobytes()


@pytest.mark.parametrize("survivors", [ALL, WITHOUT_D, (0, 1, 2, 4, 5)])
def test_opened_seeds_are_those_of_the_certified_number(
    survivors: tuple[int, ...], added: dict[bytes, Fraction]
) -> None:
    """The coordinator gets the seeds of exactly what so many survivors do not need, and of nothing that stays."""
    world = noisy_world()
    run = world.run().join()
    noise = run.terms.noise
    assert noise is not None
    run.uploads(who=[name for index, name in enumerate(run.names) if index in survivors])
    run.finish(survivors)
    assert not world.refusals
    removed, dropped = noise.removed(len(survivors)), 7 - len(survivors)
    own = survivors.index(0)
    given = [(each.holder, each.shares[own]) for each in world.openings]
    assert {len(part) for _, part in given} == {shamir.SHARE_BYTES * (1 + dropped + len(removed))}
    found = [rebuilt(given, 1 + dropped + place) for place in range(len(removed))]
    assert [added[seed] for seed in found] == [noise.components[index] for index in removed]
    assert len(added) == len(noise.components) * len(survivors)


def test_no_seed_is_opened_before_a_set_is_certified(added: dict[bytes, Fraction]) -> None:
    """Four of seven sign that all survived, three that d died: neither set opens, so no seed of any component does."""
    world = noisy_world()
    run = world.run().join()
    run.uploads()
    for name, survivors in zip("abcdefg", (ALL, ALL, ALL, ALL, WITHOUT_D, WITHOUT_D, WITHOUT_D), strict=True):
        run.sign(name, survivors)
    for name in "abdefg":
        for survivors in (ALL, WITHOUT_D):
            run.open(name, survivors)
    assert not world.openings
    assert added


def test_colluders_hold_too_few_shares_of_a_seed(added: dict[bytes, Fraction]) -> None:
    """What c unseals of a's components is one share each, under a threshold of four and more."""
    world = noisy_world()
    run = world.run().join()
    run.uploads()
    attempt = run.attempts["a", 1, 1]
    assert run.terms.noise is not None
    upload = next(each for each in world.uploads if each.name == "a")
    known = list(world.oracle._derived(upload, 2))
    plain = unseal(known[0].seal_up, upload.message.sealed[1], attempt.shares_data(0, 2))
    assert plain is not None
    assert len(plain) == map_bytes(7) + shamir.SHARE_BYTES * (1 + 6 + run.terms.components)
    assert run.terms.thresholds(7).share > len(world.setting.corrupt) + 1
    assert not any(seed in plain for seed in added)


def test_seeds_are_fresh_in_every_attempt(added: dict[bytes, Fraction]) -> None:
    """The fixture refuses a seed that comes twice: over sites, components and attempts."""
    world = noisy_world()
    run = world.run().join()
    for attempt in (1, 2, 3):
        run.uploads(attempt)
    assert not world.refusals
    assert run.terms.noise is not None
    assert len(added) == 3 * 7 * run.terms.components


def test_other_integers_are_another_context() -> None:
    """A site that calibrated other noise shares no mask with the others: nothing of it opens."""
    terms = noisy_world().run().terms
    noise = terms.noise
    assert noise is not None
    others = [
        replace(terms, noise=replace(noise, multiplier=noise.multiplier * 1.01)),
        replace(terms, noise=replace(noise, minimum=noise.minimum + 1)),
        replace(terms, noise=replace(noise, colluders=0)),
        replace(terms, noise=replace(noise, steps=noise.steps + 1)),
    ]
    steps = noise.steps + 1
    less = noise.multiplier * noise.delta_steps / sensitivity(steps, noise.dimension)
    finer = replace(noise, steps=steps, multiplier=less)
    assert finer.components == noise.components  # the same integers of another grid
    others.append(replace(terms, noise=finer))
    contexts = {Attempt(each, 1, 1, ("a",), (b"",), "0" * 64, b"\x09").context for each in (terms, *others)}
    assert len(contexts) == 6


# --- sparse graphs


@pytest.mark.parametrize(
    ("size", "minimum", "members", "says"),
    [
        (200, 160, 200, ""),
        (200, 160, 190, ""),
        (200, 160, 167, "on a roster of 167 a sum may miss 2 honest sites, and the noise is divided for 1"),
        (200, 160, 230, ""),
        (200, 160, 240, "240 sites with 0 colluders need 161 to sign, more than cohort.minimum = 160"),
        (200, 160, 159, "cohort.minimum = 160, but the roster has 159 members"),
        (129, 100, 110, ""),
    ],
)
def test_noise_is_divided_for_the_roster_that_is_there(size: int, minimum: int, members: int, says: str) -> None:
    """On another roster than the plan was checked for the sum may miss more honest survivors, or be none at all."""
    plan = noise_plan({"cohort.size": size, "cohort.minimum": minimum, "cohort.colluders": 0})

    def made() -> RunTerms:
        return RunTerms.of(plan, "run", "0" * 64, members, DIMENSION, 1.0)

    if not says:
        assert made().thresholds(size).sites == members
        return
    with pytest.raises(PlanError, match=says):
        made()


# --- the deployed site


SIZE = 5


def lab_of(folder: Path, **changes: Any) -> SecureLab:
    """Five deployed sites that have joined; four must survive."""
    table = {"privacy.noise": "cohort", "run.max_extra_attempts": 3, "cohort.minimum": 4, "run.rounds": 12}
    lab = SecureLab(folder, secure_lab_plan(SIZE, **{**table, **changes}), SIZE, width=40)
    lab.exchange.join()
    return lab


@pytest.fixture
def lab(tmp_path: Path) -> SecureLab:
    return lab_of(tmp_path)


def never_open(lab: SecureLab) -> None:
    lab.exchange.lost = lambda name, message: isinstance(message, OpenRequest)  # type: ignore[method-assign]


def kinds(lab: SecureLab, name: str) -> list[str]:
    return [entry["kind"] for entry in lab.labs[name].store().ledger.entries()]


def reserved(lab: SecureLab, name: str) -> Any:
    return lab.labs[name].store().ledger.verify().reservation(lab.plan.hash)


def test_every_attempt_is_reserved_charged_and_fresh(lab: SecureLab) -> None:
    """In this order, all on disk before a byte leaves; no two uploads have noise or sample in common."""
    never_open(lab)
    encoded: list[Any] = []
    name = lab.names[0]

    def watch(words: Any) -> None:
        encoded.append(_signed(words.copy(), lab.terms.bits).astype(float))
        assert kinds(lab, name)[-1:] == ["release"]
        assert reserved(lab, name) is None
        assert lab.rounds(name) == len(encoded)

    lab.members[name].before_mask = watch  # type: ignore[method-assign]
    trained = lab.sites[name]._unnoised
    generator = lab.sites[name]._generator

    def unnoised(request: MaskRequest, plan: Plan) -> Any:
        assert reserved(lab, name).attempt == request.attempt
        assert lab.sites[name]._generator is generator
        return trained(request, plan)

    lab.sites[name]._unnoised = unnoised  # type: ignore[method-assign]
    for attempt in (1, 2, 3):
        assert not lab.collect(1, attempt).survivors
    assert lab.terms.noise is not None
    due = float(lab.terms.noise.share(SIZE))
    for one, two in ((0, 1), (1, 2), (0, 2)):
        apart = encoded[one] - encoded[two]
        assert abs(apart.var() / (2 * due) - 1) < 6 * math.sqrt(2 / len(apart))
    assert not list(lab.labs[name].folder.rglob("*.f32"))


def test_a_lost_upload_and_a_restart_are_charged_too(lab: SecureLab) -> None:
    lab.exchange.reply_lost = lambda name, message: isinstance(message, MaskRequest)  # type: ignore[method-assign]
    lab.collect(1, 1)
    for name in lab.names:
        lab.start(name)
    lab.collect(1, 2)  # the sites have lost their session
    lab.collect(1, 3)
    assert all(lab.rounds(name) >= 1 for name in lab.names)
    uploads = [sum(isinstance(reply, MaskedUpload) for reply in lab.replies[name]) for name in lab.names]
    assert [lab.rounds(name) for name in lab.names] == uploads


def test_one_site_that_says_the_round_was_opened_forfeits_nothing(tmp_path: Path) -> None:
    """During an outage of another one; once that is back, the four that are honest finish the round."""
    lab = lab_of(tmp_path)
    liar, away = lab.names[1], lab.names[3]
    assert len(lab.collect(1).survivors) == SIZE
    handle = lab.sites[liar].handle

    def lie(message: Any) -> Any:
        return Refusal("RoundOpened", "") if isinstance(message, MaskRequest) else handle(message)

    lab.sites[liar].handle = lie  # type: ignore[method-assign]
    lab.exchange.lost = lambda name, message: name == away  # type: ignore[method-assign]
    first = lab.collect(2, 1)
    assert not first.survivors
    assert not first.forfeited
    lab.exchange.lost = lambda name, message: False  # type: ignore[method-assign]
    again = lab.collect(2, 2)
    assert set(again.survivors) == set(lab.names) - {liar}


def test_releases_end_with_the_reserve(tmp_path: Path) -> None:
    lab = lab_of(tmp_path, **{"run.rounds": 6, "run.rounds_per_site": 2, "run.max_extra_attempts": 1})
    never_open(lab)
    for number, attempt in ((1, 1), (1, 2), (1, 3), (2, 1), (3, 1)):
        lab.collect(number, attempt)
    for name in lab.names:
        assert lab.rounds(name) == 3
        assert sum(isinstance(reply, MaskedUpload) for reply in lab.replies[name]) == 3
        events = lab.sites[name].releases(lab.plan).events
        assert epsilon(events, lab.plan.privacy.delta, "rdp") <= (lab.plan.privacy.epsilon or 0)


def test_an_update_with_its_own_noise_is_masked_for_so_many_attempts_and_no_more(tmp_path: Path) -> None:
    lab = lab_of(tmp_path, **{"privacy.noise": "site", "run.max_extra_attempts": 0})
    never_open(lab)
    head, answers = None, []
    for attempt in range(1, RESTARTS + 3):
        lab.collect(1, attempt)
        answers.append(lab.replies[lab.names[0]][-1])
        head = head or lab.labs[lab.names[0]].store().ledger.head()
    refused = [isinstance(answer, Refusal) for answer in answers]
    uploads = sum(isinstance(reply, MaskedUpload) for reply in lab.replies[lab.names[0]])
    assert uploads == RESTARTS
    assert refused[-2:] == [True, True]
    assert lab.labs[lab.names[0]].store().ledger.head() == head  # the ledger grows by charges alone
    assert lab.rounds(lab.names[0]) == 1


def test_a_round_is_not_repeated_from_other_weights(lab: SecureLab) -> None:
    never_open(lab)
    lab.collect(1, 1)
    request = replace(lab.request(1, 2), weights=np.full(lab.dimension, 0.5, dtype=np.float32))
    aggregate = lab.aggregation.collect(request, lab.names, lab.exchange)
    assert all("from other weights" in aggregate.failures[name] for name in lab.names)
    assert {lab.rounds(name) for name in lab.names} == {1}


def test_noise_that_costs_more_than_the_plan_is_refused(lab: SecureLab) -> None:
    """Whoever calibrated: the site looks at what a release costs, when it joins and at every one."""
    name = lab.names[0]
    lab.sites[name]._noise_multiplier_of = lambda plan: 0.9 * lab.sigma
    answer = lab.sites[name].handle(replace(lab.enquiry, run_id="another"))
    assert isinstance(answer, Refusal)
    assert answer.kind == "BudgetExhausted"


def test_a_plan_beyond_the_operator_s_limit_is_refused_at_joining_and_at_every_step(lab: SecureLab) -> None:
    name = lab.names[0]
    limited = DataSet(name="default", limits=Limits(epsilon=1.0, accountant="rdp"))
    ledger = Ledger(lab.labs[name].folder / "site", datasets=[limited])
    ledger.releases(lab.plan.hash)
    with pytest.raises(LimitReached):
        ledger.check_plan("default", lab.plan.hash, round_event(lab.plan, lab.sigma), lab.plan.releases)
    lab.start(name)
    answer = lab.sites[name].handle(lab.enquiry)
    assert isinstance(answer, Refusal)
    assert answer.kind == "LimitReached"


def step(number: int, event: Any, plan: str = "a") -> Reserved:
    return Reserved(dataset="d", plan=plan * 64, run="r", round=number, attempt=1, event=event)


def release(ledger: Ledger, entry: Reserved, **options: Any) -> None:
    ledger.release(entry, lambda _: Released(**dict(entry), model="m", update="", digest="", cohort=()), **options)


def test_limits_hold_at_reserve_and_at_release(tmp_path: Path) -> None:
    """Of one data set, by two plans in turns and in two processes."""
    event = SampledGaussian(5.0, 1.0, 1)
    most = epsilon([event] * 2, 1e-5) + 1e-9
    ledger = Ledger(tmp_path, datasets=[DataSet(name="d", limits=Limits(epsilon=most))])
    ledger.reserve(step(1, event))
    rival = Ledger(tmp_path)
    rival.reserve(step(1, event, "b"))
    with pytest.raises(LimitReached):
        rival.reserve(step(1, event, "c"))
    with pytest.raises(LimitReached):
        release(rival, step(1, event, "c"))
    with pytest.raises(LimitReached):
        release(rival, step(1, SampledGaussian(2.0, 1.0, 1), "b"))  # another step than was reserved
    release(ledger, step(1, event))
    release(rival, step(1, event, "b"))
    for number in (1, 2):
        with pytest.raises(LimitReached):
            ledger.reserve(step(number + 1, event))
    assert ledger.epsilon("d", 1e-5) <= most


def test_a_clipped_update_is_within_its_norm(lab: SecureLab) -> None:
    plan = lab.plan.revised({"privacy.noise": "participant", "local.learning_rate": 1e4, "local.steps_per_round": 3})
    one = lab.labs[lab.names[0]]
    workspace = one.workspace(plan)
    weights: Vector = np.zeros(lab.dimension, dtype=np.float32)
    batches = workspace.batches(one.examples)
    update = clipped_update(
        workspace.model, batches, plan.local, weights, generator=SecureGenerator(), runtime=workspace.runtime
    )
    assert 0.99 * 0.5 < np.linalg.norm(update) <= 0.5


@pytest.mark.parametrize("tokens", [1, 32])
@pytest.mark.parametrize(("inputs", "upstream"), [(2e-23, 1e17), (1e-30, 1e25), (1e17, 2e-23), (1e-38, 1e30)])
def test_no_unit_is_longer_than_its_clip_norm_because_squares_vanish(
    tokens: int, inputs: float, upstream: float
) -> None:
    """Weights are the coordinator's: inputs of 2e-23 have no square in fp32, so a norm read 0 and nothing was clipped.

    One token of each unit is as usual, so that a scale for the whole unit is not enough.
    """
    layer = torch.nn.Linear(384, 384, bias=False)
    tape = GradientTape(layer)
    signs = torch.randn(2, tokens, 384, generator=torch.Generator().manual_seed(1)).sign()
    sizes = torch.full((2, tokens, 1), inputs)
    slopes = torch.full((2, tokens, 1), upstream)
    if tokens > 1:
        sizes[:, 0], slopes[:, 0] = 1.0, 1e-9
    with tape.recording(torch.arange(2), 2):
        (layer(signs * sizes) * slopes).sum().backward()
    clipped = tape.clip(1e-6)
    assert clipped.rejected in (0, 2)
    assert float(clipped.total.norm()) <= 2e-6
    assert clipped.rejected or float(clipped.norms.min()) > 1e-6


# --- ledgers that went back


def save(lab: SecureLab, name: str) -> Path:
    target = lab.labs[name].folder / "backup"
    shutil.copytree(lab.labs[name].folder / "site", target)
    return target


def set_back(lab: SecureLab, name: str, saved: Path) -> None:
    """The disk is restored and the process starts anew; the coordinator keeps no receipts."""
    folder = lab.labs[name].folder / "site"
    shutil.rmtree(folder)
    shutil.copytree(saved, folder)
    lab.start(name)
    lab.aggregation = lab.new_aggregation()
    for each in lab.names:
        lab.exchange.joined[each] = lab.sites[each].handle(lab.enquiry)  # type: ignore[assignment]


def rolled_back(lab: SecureLab) -> str:
    """The first site has forgotten two of three rounds, which all others have seen."""
    name = lab.names[0]
    assert len(lab.collect(1).survivors) == SIZE
    saved = save(lab, name)
    for number in (2, 3):
        assert len(lab.collect(number).survivors) == SIZE
    set_back(lab, name, saved)
    return name


def test_partners_refuse_a_ledger_that_went_back(lab: SecureLab) -> None:
    name = rolled_back(lab)
    aggregate = lab.collect(4)
    assert not aggregate.survivors
    for other in lab.names[1:]:
        assert "went back or forked" in aggregate.failures[other]
        assert lab.rounds(other) == 3
    assert name not in aggregate.failures


@pytest.mark.xfail(strict=True, reason="R11 compares numbers only, and a refused attempt makes the number grow")
def test_a_ledger_that_went_back_does_not_overtake_what_peers_saw(lab: SecureLab) -> None:
    """Each refused attempt adds two entries to the old copy: after two of them its number is the greatest again.

    Two releases are forgotten, and nobody notices. A number does not show that what was seen is among what is there
    now: for that a partner needs an inclusion proof, such as a Merkle tree's (RFC 6962), of the head that it knows.
    """
    name = rolled_back(lab)
    for attempt in range(1, 9):
        assert name not in lab.collect(4, attempt).survivors


@pytest.mark.xfail(strict=True, reason="the coordinator decides which of two bundles partners are shown")
def test_a_coordinator_cannot_hide_a_ledger_from_the_partners(lab: SecureLab) -> None:
    """It shows the first bundle for ever, as after a lost upload: partners never see a newer head.

    The site would have to refuse its own bundle once its head is older than that of its last upload.
    """
    name = lab.names[0]
    note = lab.aggregation._note_upload

    def stale(who: str, told: Any, upload: MaskedUpload) -> None:
        shown = lab.aggregation._membership[who].bundle
        note(who, told, upload)
        lab.aggregation._membership[who].bundle = shown if who == name else upload.next_bundle

    lab.aggregation._note_upload = stale  # type: ignore[method-assign]
    rolled_back(lab)
    assert name not in lab.collect(4).survivors


@pytest.mark.xfail(strict=True, reason="a partner that refuses is a dropout to the others")
def test_one_partner_that_saw_more_stops_the_attempt(tmp_path: Path) -> None:
    """Four of five suffice: the attempt goes on without the one that noticed, and opens."""
    lab = lab_of(tmp_path)
    name, witness = lab.names[0], lab.names[4]
    saved: dict[str, Path] = {}
    assert len(lab.collect(1).survivors) == SIZE
    saved = {each: save(lab, each) for each in lab.names[:4]}
    for number in (2, 3):
        assert len(lab.collect(number).survivors) == SIZE
    for each in lab.names[1:4]:  # as if the others had not been in these rounds' cohorts
        shutil.rmtree(lab.labs[each].folder / "site")
        shutil.copytree(saved[each], lab.labs[each].folder / "site")
        lab.start(each)
    set_back(lab, name, saved[name])
    assert witness not in saved
    assert name not in lab.collect(4).survivors


def test_a_head_is_signed(lab: SecureLab) -> None:
    lab.collect(1)
    bundle = next(reply for reply in lab.replies[lab.names[0]] if isinstance(reply, MaskedUpload)).next_bundle
    member = lab.roster.member(lab.names[0])
    read = Bundle.read(bundle, lab.terms, member)
    assert read.head.seq >= 2
    for place in range(52, 92):
        changed = bytearray(bundle)
        changed[place] ^= 1
        with pytest.raises(ProtocolError):
            Bundle.read(bytes(changed), lab.terms, member)


def test_receipts_of_others_older_ones_and_changed_ones(lab: SecureLab) -> None:
    """Only its own receipt makes a site stop; an older one of the same ledger is nothing new."""
    lab.collect(1)
    name, other = lab.names[:2]
    site, witness = lab.sites[name], lab.aggregation._membership.witness
    old, foreign = Receipt.from_json(witness.receipt(name)), Receipt.from_json(witness.receipt(other))
    lab.collect(2)
    assert not isinstance(site.handle(replace(lab.enquiry, receipt=old.to_json().encode())), Refusal)
    forged = [
        foreign,
        old.model_copy(update={"seq": 99}),
        old.model_copy(update={"hash": "0" * 64}),
        old.model_copy(update={"sealed": foreign.sealed}),
        old.model_copy(update={"ledger": "0" * 32}),
        old.model_copy(update={"signature": foreign.signature}),
        foreign.model_copy(update={"site": name}),
    ]
    ledger = lab.labs[name].store().ledger
    for receipt in (*forged, ledger.receipt("another", identity(name))):
        answer = site.handle(replace(lab.enquiry, receipt=receipt.to_json().encode()))
        assert isinstance(answer, Refusal)
        assert answer.kind == "ProtocolError"
    for receipt in forged:
        with pytest.raises(AccordError):
            ledger.recover(receipt, identity(name))


def test_recovering_twice_or_from_older_receipts_counts_once(lab: SecureLab) -> None:
    """Whatever receipts come in whatever order: never less than what was spent, and nothing twice."""
    name = lab.names[0]
    saved, receipts = save(lab, name), []
    for number in (1, 2, 3):
        lab.collect(number)
        receipts.append(Receipt.from_json(lab.aggregation._membership.witness.receipt(name)))
    for order in ((0, 1, 2), (2, 1, 0), (1, 2, 0), (2, 2)):
        set_back(lab, name, saved)
        ledger = lab.labs[name].store().ledger
        for place in order:
            ledger.recover(receipts[place], identity(name))
        assert ledger.releases(lab.plan.hash).rounds == 3
        assert sum(event.steps for event in ledger.spent("default").events) == 3
        assert ledger.head().seq > receipts[2].seq
        assert ledger.releases(lab.plan.hash).last_round == 3


def test_shares_leave_only_for_opened_kinds(lab: SecureLab) -> None:
    """Every reply of trip 3 has one share of the own seed, and those of the components that are removed."""
    assert len(lab.collect(1).survivors) == SIZE
    assert lab.terms.noise is not None
    due = shamir.SHARE_BYTES * (1 + len(lab.terms.noise.removed(SIZE)))
    for name in lab.names:
        opened = next(reply for reply in lab.replies[name] if isinstance(reply, Opened))
        assert {len(part) for part in opened.shares} == {due}


def test_absurd_heads_of_a_peer_are_refused(tmp_path: Path) -> None:
    from accord_shared.receipts import Seen

    ledger = Ledger(tmp_path)
    for number in (2**53 + 1, 2**64 - 1):
        with pytest.raises(ProtocolError):
            ledger.witness({"b": Seen(bytes(16), Head(number, bytes(32)))})
    assert ledger.witnessed() == {}
