"""Items 5 to 11 under `cohort` and `participant` noise, through deployed sites, real members and a real coordinator."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from accord_client.conformance import Violation, check_shared_noise
from accord_server.aggregation import Aggregate
from accord_shared.dp.accounting import epsilon, plan_epsilon
from accord_shared.dp.discrete import ROUNDING_VARIANCE, DiscreteGaussian
from accord_shared.dp.noise import SecureGenerator
from accord_shared.dp.sharing import NoiseShares
from accord_shared.messages import Message, OpenRequest, Refusal, SurvivorsRequest
from accord_shared.plan import Plan
from conformance.federation import TRIPS
from conformance.lab import clipped_sum
from conformance.noise import correlation_is_zero, require_centred, require_sigma
from conformance.secure_lab import SecureLab, secure_lab_plan

SIZE, MINIMUM = 10, 7
WIDTH = 4000  # times 5 classes: 20,000 coordinates, a standard error of 1 % on the variance


def cohort_plan(**changes: Any) -> Plan:
    own = {"privacy.noise": "cohort", "cohort.minimum": MINIMUM, "run.max_extra_attempts": 2}
    return secure_lab_plan(SIZE, **{**own, **{key.replace("__", "."): value for key, value in changes.items()}})


def lab_of(folder: Path, plan: Plan, **lab: Any) -> SecureLab:
    made = SecureLab(folder, plan, plan.cohort.size, **lab)
    for index, site in enumerate(made.sites.values()):
        site._generator = SecureGenerator(index.to_bytes(32, "big"))
    made.exchange.join()
    return made


def zero_request(lab: SecureLab, number: int, attempt: int = 1) -> Aggregate:
    """One attempt at zero weights."""
    from dataclasses import replace

    request = replace(lab.request(number, attempt), weights=np.zeros(lab.dimension, dtype=np.float32))
    return lab.aggregation.collect(request, lab.names, lab.exchange)


def promised(lab: SecureLab) -> float:
    """Standard deviation of a coordinate of the sum, in units of an update: z·C, and no more than 1 % above."""
    noise = lab.terms.noise
    assert noise is not None
    assert noise.excess < 0.01
    return noise.multiplier * noise.clip * (1 + noise.excess)


def signal(lab: SecureLab, names: tuple[str, ...]) -> npt.NDArray[np.float64]:
    """The survivors' sum without any noise, by hand."""
    local = lab.plan.local
    gradient = sum(clipped_sum(lab.labs[name], lab.plan).ravel() for name in names)
    return np.asarray(gradient) * -local.learning_rate / (local.sampling_rate * local.expected_records)


@pytest.mark.parametrize("dropped", range(SIZE - MINIMUM + 1))
@pytest.mark.parametrize("colluders", [0, 1])
def test_the_sum_carries_exactly_the_promised_noise_however_many_drop_out(
    dropped: int, colluders: int, tmp_path: Path
) -> None:
    """Item 9. With c colluders the whole sum has n/(n-c) of it, of which the honest sites' part is what is promised."""
    lab = lab_of(tmp_path, cohort_plan(cohort__colluders=colluders), width=WIDTH, zero_gradients=True)
    lab.exchange.lose(dict.fromkeys(lab.names[:dropped], 1))
    aggregate = zero_request(lab, 1)
    survivors = SIZE - dropped
    assert len(aggregate.survivors) == survivors
    sigma = promised(lab) * math.sqrt(survivors / (survivors - colluders))
    require_sigma(aggregate.total, sigma)
    require_centred(aggregate.total, sigma)


@pytest.mark.parametrize("trip", [2, 3])
def test_sites_lost_after_their_upload_are_in_the_sum_and_its_noise(trip: int, tmp_path: Path) -> None:
    lab = lab_of(tmp_path, cohort_plan(), width=WIDTH, zero_gradients=True)
    lab.exchange.lose(dict.fromkeys(lab.names[:2], trip))
    aggregate = zero_request(lab, 1)
    assert len(aggregate.survivors) == SIZE
    require_sigma(aggregate.total, promised(lab))


def test_the_sum_is_the_clipped_gradients_and_noise_and_nothing_else(tmp_path: Path) -> None:
    """Item 11: central DP-SGD on the union of all records."""
    lab = lab_of(tmp_path, cohort_plan(privacy__epsilon=30.0), width=WIDTH)
    lab.exchange.lose({lab.names[3]: 1})
    aggregate = zero_request(lab, 1)
    total = signal(lab, aggregate.survivors)
    assert len(aggregate.survivors) == SIZE - 1
    off = aggregate.total - total
    require_sigma(off, promised(lab))
    assert abs(float(off @ total / np.linalg.norm(total))) <= 5 * promised(lab)
    without = signal(lab, aggregate.survivors[1:])  # one bank less is told apart: the check can fail
    wrong = aggregate.total - without
    assert abs(float(wrong @ (total - without) / np.linalg.norm(total - without))) > 5 * promised(lab)


def test_a_whole_update_is_the_unit_of_participant_noise(tmp_path: Path) -> None:
    plan = cohort_plan(privacy__noise="participant", local__steps_per_round=5, local__learning_rate=50.0)
    lab = lab_of(tmp_path, plan, width=40)
    noise = lab.terms.noise
    assert noise is not None
    off = np.concatenate([zero_request(lab, number).total for number in range(1, 5)])
    sigma = promised(lab)
    assert np.std(off) < 1.3 * math.hypot(sigma, SIZE * noise.clip / math.sqrt(lab.dimension))
    from accord_client.trainer import clipped_update

    workspace = lab.labs[lab.names[0]].workspace(plan)
    update = clipped_update(
        workspace.model,
        workspace.batches(lab.labs[lab.names[0]].examples),
        plan.local,
        np.zeros(lab.dimension, dtype=np.float32),
        generator=SecureGenerator(),
        runtime=workspace.runtime,
    )
    assert 0.999 * 0.5 < np.linalg.norm(update) <= 0.5


# --- attempts, charges


def spent(lab: SecureLab, name: str, *, colluding: bool = False) -> float:
    events = lab.sites[name].releases(lab.plan).events
    return epsilon(events, lab.plan.privacy.delta, lab.plan.privacy.accountant, colluding=colluding)


def fail_openings(lab: SecureLab, *, survivors: bool = True) -> None:
    """Nobody gets trip 2 (or 3): what was uploaded is never opened."""
    kind = SurvivorsRequest if survivors else OpenRequest
    lab.exchange.lost = lambda name, message: isinstance(message, kind)


def test_a_repeated_attempt_is_fresh_and_charged_again(tmp_path: Path) -> None:
    """Item 5: one-shot plus one charge per repeated attempt; item 6: no noise or sample in common."""
    lab = lab_of(tmp_path, cohort_plan(), width=WIDTH, zero_gradients=True)
    encoded: list[dict[str, Any]] = []

    def watch(name: str, kept: dict[str, Any]) -> None:
        lab.members[name].before_mask = lambda words: kept.__setitem__(name, words.view(np.int16).astype(float))

    for attempt in (1, 2):
        encoded.append({})
        for name in lab.names:
            watch(name, encoded[-1])
        fail_openings(lab)
        assert not zero_request(lab, 1, attempt).survivors
    for name in lab.names:
        assert lab.rounds(name) == 2
        assert spent(lab, name) == pytest.approx(plan_epsilon(lab.plan, 2), rel=1e-6)
        assert correlation_is_zero(encoded[0][name], encoded[1][name])
    first, second = (encoded[0][name] for name in lab.names[:2])
    assert correlation_is_zero(first, second)
    lab.exchange.lost = lambda name, message: False
    assert len(zero_request(lab, 1, 3).survivors) == SIZE
    assert spent(lab, lab.names[0]) == pytest.approx(plan_epsilon(lab.plan, 3), rel=1e-6)


def test_the_reserve_ends(tmp_path: Path) -> None:
    """rounds_per_site and max_extra_attempts together, never more: however the coordinator spreads its attempts."""
    lab = lab_of(tmp_path, cohort_plan(run__rounds=6, run__rounds_per_site=2))
    fail_openings(lab)
    for attempt in range(1, 5):
        zero_request(lab, 1, attempt)
    assert {lab.rounds(name) for name in lab.names} == {4}
    assert spent(lab, lab.names[0]) <= (lab.plan.privacy.epsilon or 0)
    lab.exchange.lost = lambda name, message: False
    for number in (1, 2, 3):
        refused = zero_request(lab, number, 5)
        assert not refused.survivors
        assert all("BudgetExhausted" in reason for name, reason in refused.failures.items() if name in lab.names)
    assert {lab.rounds(name) for name in lab.names} == {4}


def test_a_restart_between_attempts_charges_again_and_never_less(tmp_path: Path) -> None:
    lab = lab_of(tmp_path, cohort_plan())
    fail_openings(lab)
    zero_request(lab, 1, 1)
    for name in lab.names:
        lab.start(name)
    lab.exchange.lost = lambda name, message: False
    attempts = [zero_request(lab, 1, attempt) for attempt in (2, 3, 4)]  # the sites join and are introduced again
    assert next(each.survivors for each in attempts if each.survivors) == lab.names
    assert {lab.rounds(name) for name in lab.names} == {2}


def test_an_opened_round_is_never_repeated(tmp_path: Path) -> None:
    lab = lab_of(tmp_path, cohort_plan())
    assert zero_request(lab, 1, 1).survivors == lab.names
    again = zero_request(lab, 1, 2)
    assert not again.survivors
    assert {lab.rounds(name) for name in lab.names} == {1}


def test_nothing_of_a_shared_update_is_kept_on_disk(tmp_path: Path) -> None:
    """What left carries a share of noise only: its bytes are in memory until they are masked, and nowhere else."""
    lab = lab_of(tmp_path, cohort_plan())
    zero_request(lab, 1)
    kept = [path for path in tmp_path.rglob("*.f32") if path.stat().st_size]
    assert not kept


def test_every_number_of_an_unmasked_update_stays_at_the_site(tmp_path: Path) -> None:
    """Item 11: no key of any message that a site sends may hold as many numbers as an update, but the payload."""
    lab = lab_of(tmp_path, cohort_plan(), width=200)
    zero_request(lab, 1)
    noise = lab.terms.noise
    assert noise is not None
    for reply in lab.replies[lab.names[0]]:
        for field, value in vars(reply).items():
            size = value.nbytes if isinstance(value, np.ndarray) else len(str(value))
            if field == "payload":
                assert size == -(-lab.dimension * noise.bits // 8)
            elif isinstance(value, np.ndarray):
                raise AssertionError(f"{type(reply).__name__}.{field} is an array")


# --- empty samples, bad records


def test_an_empty_sample_uploads_noise_and_is_charged(tmp_path: Path) -> None:
    """Item 10."""
    lab = lab_of(tmp_path, cohort_plan(local__sampling_rate=1e-9, privacy__accountant="pld"), width=WIDTH)
    aggregate = zero_request(lab, 1)
    assert aggregate.survivors == lab.names
    require_sigma(aggregate.total, promised(lab))
    assert lab.rounds(lab.names[0]) == 1


def test_a_record_that_is_not_a_number_counts_for_nothing(tmp_path: Path) -> None:
    """Item 10: its gradient is rejected, the others' are summed."""
    lab = lab_of(tmp_path, cohort_plan(privacy__epsilon=30.0), width=400)
    clean = zero_request(lab, 1).total
    broken = lab_of(tmp_path / "broken", cohort_plan(privacy__epsilon=30.0), width=400)
    site = broken.sites[broken.names[0]]
    workspace = site._workspace_of(broken.plan)
    records, held = site._records(broken.plan, workspace)
    features = records.features.clone()  # type: ignore[attr-defined]
    features[0] = math.nan
    from dataclasses import replace

    site._batches[broken.plan.hash] = (replace(records, features=features), held)  # type: ignore[type-var]
    total = zero_request(broken, 1).total
    assert np.isfinite(total).all()
    unit = broken.terms.noise.clip if broken.terms.noise else 0.0
    assert np.linalg.norm(total - clean) < unit + 3 * promised(lab) * math.sqrt(lab.dimension)


def test_weights_of_another_length_or_not_numbers_are_refused(tmp_path: Path) -> None:
    lab = lab_of(tmp_path, cohort_plan())
    from dataclasses import replace

    for weights in (np.zeros(3, dtype=np.float32), np.full(lab.dimension, np.nan, dtype=np.float32)):
        aggregate = lab.aggregation.collect(replace(lab.request(1), weights=weights), lab.names, lab.exchange)
        assert not aggregate.survivors
        assert all(isinstance(reply, Refusal) for reply in _last_replies(lab))
    assert {lab.rounds(name) for name in lab.names} == {0}


def _last_replies(lab: SecureLab) -> list[Message]:
    return [lab.replies[name][-1] for name in lab.names]


def test_trips_are_those_of_the_protocol() -> None:
    assert set(TRIPS.values()) == {1, 2, 3}


# --- the reusable check, and what it must refuse


def test_the_suite_accepts_plans_and_refuses_what_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, source = cohort_plan(cohort__colluders=1), SecureGenerator(bytes(32))
    check_shared_noise(plan, 29_568, generator=source)
    for broken, patch in BROKEN.items():
        with monkeypatch.context() as patched:
            patch(patched)
            assert _violates(plan, source), f"not noticed: {broken}"


def _violates(plan: Plan, source: SecureGenerator) -> bool:
    try:
        check_shared_noise(plan, 29_568, generator=source)
    except Violation:
        return True
    return False


def _half_the_noise(patched: pytest.MonkeyPatch) -> None:
    whole = DiscreteGaussian.add

    def add(self: DiscreteGaussian, words: Any, seed: bytes, *, negative: bool = False) -> None:
        whole(DiscreteGaussian(max(self.variance / 4, Fraction(9))), words, seed, negative=negative)

    patched.setattr(DiscreteGaussian, "add", add)


def _no_base(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(DiscreteGaussian, "add", lambda *_, **__: None)


def _static_share(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(NoiseShares, "kept", lambda self, survivors: ())


def _no_colluders(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(NoiseShares, "share", lambda self, survivors: Fraction(self.variance) / survivors)


def _one_seed(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(SecureGenerator, "uint64", lambda self, count: np.arange(count, dtype=np.uint64))


BROKEN = {
    "noise / 2": _half_the_noise,
    "no base noise": _no_base,
    "a static share": _static_share,
    "colluders forgotten": _no_colluders,
    "the same noise twice": _one_seed,
}


@pytest.mark.slow
def test_five_hundred_sites_share_participant_noise_on_a_sparse_graph(tmp_path: Path) -> None:
    """Five percent drop out; the sum misses a few whose partners they were, and still carries what is promised."""
    plan = secure_lab_plan(
        500,
        **{"privacy.noise": "participant", "cohort.minimum": 450, "run.max_extra_attempts": 0, "privacy.epsilon": 8.0},
    )
    lab = lab_of(tmp_path, plan, width=1000, zero_gradients=True)
    lab.exchange.lose(dict.fromkeys(lab.names[:25], 1))
    aggregate = zero_request(lab, 1)
    noise = lab.terms.noise
    assert noise is not None
    assert 450 <= len(aggregate.survivors) <= 475, aggregate.failures
    assert noise.colluders > 0  # honest survivors that a sum may miss
    share = float(
        ROUNDING_VARIANCE + noise.base + sum(noise.components[i] for i in noise.kept(len(aggregate.survivors)))
    )
    require_sigma(aggregate.total, math.sqrt(share * len(aggregate.survivors)) / noise.scale)
    assert share * (len(aggregate.survivors) - noise.colluders) >= float(noise.variance)
