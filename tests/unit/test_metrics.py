"""Metrics that leave a site: held-back units and noised counts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from accord_client.data import Examples, number_units
from accord_client.metrics import hold_back, released_counts
from accord_client.shapes import Shape
from accord_client.trainer import Runtime
from accord_server.rounds import _released
from accord_shared.dp.noise import SecureGenerator
from accord_shared.plan import LocalSpec

SPEC = LocalSpec(learning_rate=0.5, sampling_rate=1.0, expected_records=50, clip_norm=0.4)


def examples_of(units: list[str]) -> Examples:
    return Examples(
        texts=tuple(f"text {index} of {unit}" for index, unit in enumerate(units)),
        labels=np.zeros(len(units), dtype=np.int64),
        units=number_units(units),
    )


class OneClass:
    """A model that predicts class 0 and records that are of class 0 or 1."""

    def __init__(self, labels: list[int], units: list[int]) -> None:
        self.labels = torch.tensor(labels)
        self.units = np.array(units, dtype=np.int64)
        self.lengths, self.longest = None, 0

    def inputs(self, rows: np.ndarray, shape: Shape | None = None) -> torch.Tensor:
        return torch.zeros(len(rows), 1)

    def logits(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.tensor([1.0, 0.0]).repeat(len(inputs), 1)


def counts(batches: OneClass | None, sigma: float = 0.0, key: bytes = bytes(32)) -> np.ndarray:
    return released_counts(
        batches,  # type: ignore[arg-type]
        batches,  # type: ignore[arg-type]
        SPEC,
        noise_multiplier=sigma,
        generator=SecureGenerator(key),
        runtime=Runtime(),
    )


def test_whole_units_are_held_back_and_nothing_is_lost() -> None:
    whole = examples_of([f"unit {index % 40}" for index in range(200)])
    rest, held = hold_back(whole, 0.3)
    owners = [{text.split(" of ")[1] for text in part.texts} for part in (rest, held)]
    assert len(rest) + len(held) == 200
    assert not owners[0] & owners[1]
    assert 4 <= len(owners[1]) <= 20


def test_another_unit_moves_no_other() -> None:
    units = [f"unit {index}" for index in range(100)]
    more = examples_of(units)
    fewer = more.take([index for index in range(100) if index != 17])
    assert set(hold_back(more, 0.3)[1].texts) - set(hold_back(fewer, 0.3)[1].texts) <= {more.texts[17]}
    assert set(hold_back(fewer, 0.3)[1].texts) <= set(hold_back(more, 0.3)[1].texts)


def test_nothing_is_held_back_by_default() -> None:
    whole = examples_of(["a", "b"])
    rest, held = hold_back(whole, 0.0)
    assert rest is whole
    assert len(held) == 0


def test_counts_are_shares_of_units_in_the_scale_of_an_update() -> None:
    released = counts(OneClass([0, 1, 0, 0], [0, 0, 1, 2]))
    step = SPEC.learning_rate * 0.4 / math.sqrt(2) / 50
    assert released == pytest.approx(np.array([2.5, 3.0]) * step, rel=1e-6)
    assert _released(released.astype(np.float64)) == {"accuracy": pytest.approx(2.5 / 3)}


def test_one_unit_changes_the_counts_by_at_most_the_clip_norm() -> None:
    with_it = counts(OneClass([0, 1, 0, 0, 0, 0], [0, 0, 1, 2, 2, 2])).astype(np.float64)
    without = counts(OneClass([0, 1, 0], [0, 0, 1])).astype(np.float64)
    change = np.linalg.norm(with_it - without) * 50 / SPEC.learning_rate
    assert change <= 0.4 * (1 + 1e-6)
    assert change == pytest.approx(0.4, rel=1e-5)  # a unit that is all right uses the whole norm


@pytest.mark.parametrize(("claimed", "accepted"), [(1.0, True), (2 / 3, False), (3 / 2, False)])
def test_noise_has_the_claimed_scale(claimed: float, accepted: bool) -> None:
    sigma, draws = 3.0, 1500
    values = np.array([counts(None, sigma, index.to_bytes(32, "big")) for index in range(draws)]).ravel()
    expected = claimed * sigma * 0.4 * SPEC.learning_rate / 50
    deviation = abs(values.std() / expected - 1) * math.sqrt(2 * len(values))
    assert bool(deviation < 4) is accepted


def test_a_site_without_held_back_units_still_adds_noise() -> None:
    assert np.all(counts(None, 1.0) != 0)


def test_senseless_counts_are_no_metric() -> None:
    assert _released(np.array([3.0, -1.0])) == {}
    assert _released(np.zeros(0)) == {}
    assert _released(np.array([5.0, 2.0])) == {"accuracy": 1.0}
