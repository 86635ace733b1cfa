"""Items 6 and 7: what a site really adds, measured on its replies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from accord_shared.dp.accounting import noise_multiplier
from accord_shared.dp.noise import SecureGenerator
from accord_shared.plan import Plan
from conformance.lab import Lab, ask, clipped_sum, lab_plan, request, trained
from conformance.noise import correlation_is_zero, require_centred, require_sigma

KEY = bytes(range(32))
WIDTH = 4000  # times 5 classes: 20,000 coordinates, a standard error of 1 % on the variance


def promised(plan: Plan) -> float:
    """Standard deviation of one coordinate of a noise-only update under sgd."""
    local = plan.local
    assert local.clip_norm is not None
    one_step = noise_multiplier(plan) * local.clip_norm / (local.sampling_rate * local.expected_records)
    return float(local.learning_rate * one_step * np.sqrt(local.steps_per_round))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"local.clip_norm": 0.01, "local.expected_records": 900, "local.learning_rate": 3.0},
        {"local.steps_per_round": 4},
        {"local.sampling_rate": 0.25, "local.steps_per_round": 3},
        {"local.sampling_rate": 1e-9},
        {"privacy.epsilon": 0.5},
        {"run.rounds": 9, "run.rounds_per_site": 3},
    ],
    ids=["plain", "other-constants", "steps", "sampled", "empty-samples", "small-epsilon", "rounds-per-site"],
)
def test_updates_without_gradients_carry_exactly_the_promised_noise(changes: dict[str, Any], tmp_path: Path) -> None:
    lab, plan = Lab(tmp_path, width=WIDTH, zero_gradients=True), lab_plan(changes)
    site = lab.joined(plan, generator=SecureGenerator(KEY))
    zeros = np.zeros(5 * WIDTH, dtype=np.float32)
    updates = [trained(site.handle(request(plan, number, zeros))).update for number in (1, 2)]
    require_sigma(np.concatenate(updates), promised(plan))
    require_centred(np.concatenate(updates), promised(plan))


@pytest.mark.parametrize("units", [None, tuple(7 * row % 30 for row in range(90))], ids=["row-units", "many-rows"])
@pytest.mark.parametrize("clip_norm", [0.2, 50.0], ids=["all-clipped", "none-clipped"])
def test_an_update_is_the_clipped_sum_and_noise_and_nothing_else(
    units: tuple[int, ...] | None, clip_norm: float, tmp_path: Path
) -> None:
    """Item 11: what neighbouring data sets release differs through noise and one clipped unit alone."""
    lab = Lab(tmp_path, records=90, width=WIDTH, units=units)
    plan = lab_plan({"local.clip_norm": clip_norm, "privacy.epsilon": 200.0})
    site = lab.joined(plan, generator=SecureGenerator(KEY))
    zeros = np.zeros(5 * WIDTH, dtype=np.float32)
    update = trained(site.handle(request(plan, 1, zeros))).update.astype(np.float64)
    total = clipped_sum(lab, plan).reshape(-1)
    released = -update * plan.local.expected_records / plan.local.learning_rate
    sigma = noise_multiplier(plan) * clip_norm
    require_sigma(released - total, sigma)
    along = float((released - total) @ total / np.linalg.norm(total))  # N(0, σ²) if nothing of the signal is left
    assert abs(along) <= 5 * sigma
    flipped = total.reshape(5, WIDTH)[::-1].reshape(-1)
    assert abs(float((released - flipped) @ (total - flipped))) > 5 * sigma * np.linalg.norm(total - flipped) or (
        np.linalg.norm(total - flipped) < 10 * sigma
    )


def test_noised_sums_leave_on_a_public_grid(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    plan = lab_plan({"local.learning_rate": 1.0, "local.expected_records": 1})
    zeros = np.zeros(5 * lab.width, dtype=np.float32)
    update = trained(lab.joined(plan).handle(request(plan, 1, zeros))).update.astype(np.float64)
    assert plan.local.clip_norm is not None
    cells = update / 2.0 ** (np.floor(np.log2(noise_multiplier(plan) * plan.local.clip_norm)) - 20)
    assert (cells == np.round(cells)).all()


def updates_of(lab: Lab, plan: Plan, rounds: tuple[int, ...], **options: Any) -> list[np.ndarray[Any, Any]]:
    site, zeros = lab.joined(plan, **options), np.zeros(5 * lab.width, dtype=np.float32)
    return [trained(site.handle(request(plan, number, zeros))).update for number in rounds]


def test_noise_is_never_shared(tmp_path: Path) -> None:
    """Across sites with equal data, rounds from equal weights, restarts of process and folder, seeds of plans."""
    streams: list[np.ndarray[Any, Any]] = []
    for folder, name, seed in (("a", "site-a", 0), ("b", "site-b", 0), ("c", "site-a", 0), ("d", "site-a", 1)):
        lab = Lab(tmp_path / folder, width=WIDTH, zero_gradients=True)
        plan = lab_plan({"run.seed": seed})
        streams += updates_of(lab, plan, (1, 2), name=name)
        streams += updates_of(lab, plan, (3,), name=name)  # a new process on the same folder
    for index, one in enumerate(streams):
        for two in streams[index + 1 :]:
            assert (one == two).mean() < 1e-3  # the grid lets few coordinates meet
            assert correlation_is_zero(one, two)


def test_sites_with_equal_data_and_plan_send_different_updates(tmp_path: Path) -> None:
    plan = lab_plan()
    one = Lab(tmp_path / "a").joined(plan, name="a")
    two = Lab(tmp_path / "b").joined(plan, name="b")
    lab = Lab(tmp_path / "c")
    assert (trained(ask(one, plan, lab, 1)).update != trained(ask(two, plan, lab, 1)).update).mean() > 0.99


def test_an_attempt_that_was_lost_before_its_release_is_redrawn(tmp_path: Path) -> None:
    from accord_client import store as store_module
    from accord_shared.files import write_atomic

    lab, plan = Lab(tmp_path, width=WIDTH, zero_gradients=True), lab_plan()
    lost: list[bytes] = []

    def die(path: Path, data: bytes, **options: Any) -> None:
        write_atomic(path, data, **options)
        if path.suffix == ".f32":
            lost.append(data)
            raise KeyboardInterrupt

    site, zeros = lab.joined(plan), np.zeros(5 * WIDTH, dtype=np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module, "write_atomic", die)
        with pytest.raises(KeyboardInterrupt):
            site.handle(request(plan, 1, zeros))
    update = trained(lab.site().handle(request(plan, 1, zeros))).update
    before = np.frombuffer(lost[0][-4 * len(zeros) :], dtype="<f4")
    assert correlation_is_zero(update, before)
    assert (update == before).mean() < 1e-3
