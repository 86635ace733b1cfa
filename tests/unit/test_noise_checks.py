"""Tests of randomness: they accept what is right and catch what is broken, by how little."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from accord_client.conformance import Violation, check_generator, check_noise, check_sampling
from accord_client.noise_checks import noise_checks, sampling_checks
from accord_shared.dp.noise import SecureGenerator
from accord_shared.plan import Plan
from conftest import plan_of

Array = npt.NDArray[np.float64]
RELEASES, WIDTH = 20, 20_000


def noise(seed: int, releases: int = RELEASES, width: int = WIDTH) -> Array:
    return np.random.default_rng(seed).normal(size=(releases, width))


@pytest.mark.parametrize("seed", range(3))
def test_right_noise_is_accepted(seed: int) -> None:
    assert all(check.passed for check in noise_checks(2.5 * noise(seed), 2.5))


def test_noise_on_a_coarse_grid_is_accepted() -> None:
    """Integers of a small σ meet by chance."""
    check_noise(np.rint(5.0 * noise(0)), 5.0 * np.sqrt(1 + 1 / 300))


def _repeat(values: Array) -> Array:
    values[7] = values[2]
    return values


def _negate(values: Array) -> Array:
    values[7] = -values[2]
    return values


def _partly(values: Array) -> Array:
    values[7, : WIDTH // 5] = values[2, : WIDTH // 5]
    return values


def _tile(values: Array) -> Array:
    return np.concatenate([values[:, : WIDTH // 2], values[:, : WIDTH // 2]], axis=1)


def _neighbours(values: Array) -> Array:
    return np.repeat(values[:, : WIDTH // 2], 2, axis=1)


def _mirror(values: Array) -> Array:
    values[:, WIDTH // 2 :] = -values[:, : WIDTH // 2][:, ::-1]
    return values


def _signs(values: Array) -> Array:
    half = values[:, : WIDTH // 2] * np.random.default_rng(5).choice([-1, 1], (len(values), WIDTH // 2))
    return np.concatenate([values[:, : WIDTH // 2], half], axis=1)


def _few_pairs(values: Array) -> Array:
    values[:, 4000:4003] = -values[:, [17, 9000, 12_345]]
    return values


def _shuffled(values: Array) -> Array:
    values[:, np.random.default_rng(3).permutation(WIDTH)[:4000]] = values[:, :4000]
    return values


def _wave(values: Array) -> Array:
    wave: Array = values + 0.1 * np.sin(np.arange(WIDTH) * 0.7)
    return wave


BROKEN: dict[str, tuple[Callable[[Array], Array], str]] = {
    "reused": (_repeat, "noise of two releases"),
    "reused, sign changed": (_negate, "noise of two releases"),
    "a fifth reused": (_partly, "noise of two releases"),
    "tiled": (_tile, "noise of two coordinates"),
    "neighbours": (_neighbours, "noise of two coordinates"),
    "mirrored": (_mirror, "noise of two coordinates"),
    "random signs": (_signs, "noise of two coordinates"),
    "three pairs": (_few_pairs, "coordinates that go together"),
    "shuffled pairs": (_shuffled, "coordinates that go together"),
    "a wave": (_wave, "a frequency"),
    "0.98 sigma": (lambda values: 0.98 * values, "variance"),
    "1.02 sigma": (lambda values: 1.02 * values, "variance"),
    "off centre": (lambda values: values + 0.02, "mean"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_noise_is_caught(name: str) -> None:
    breaks, test = BROKEN[name]
    failed = {check.name for check in noise_checks(breaks(noise(1)), 1.0) if not check.passed}
    assert test in failed
    with pytest.raises(Violation):
        check_noise(breaks(noise(1)), 1.0)


def sample(rate: float, rounds: int = 60, units: int = 384) -> npt.NDArray[np.bool_]:
    return SecureGenerator(bytes(32)).bernoulli(rate, rounds * units).reshape(rounds, units)


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.99, 1.0])
def test_right_samples_are_accepted(rate: float) -> None:
    assert all(check.passed for check in sampling_checks(sample(rate), rate))


def test_wrong_samples_are_caught() -> None:
    right = sample(0.1)
    for name, wrong in {
        "sampling rate": sample(0.2),
        "sampling rate by unit": np.tile(right[0], (60, 1)),
        "sampling rate by round": np.repeat(right[:, :1], 384, axis=1),
        "samples of two rounds": np.repeat(right[::2], 2, axis=0),
    }.items():
        assert name in {check.name for check in sampling_checks(wrong, 0.1) if not check.passed}
    missing = np.ones((60, 384), dtype=bool)
    missing[3, 7] = False
    assert not sampling_checks(missing, 1.0)[0].passed


def sampled_plan(rate: float = 0.1) -> Plan:
    return plan_of({"local.sampling_rate": rate})


@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_the_product_samples_at_the_plan_s_rate(rate: float) -> None:
    check_sampling(sampled_plan(rate), generator=SecureGenerator(bytes(32)))


def test_sampling_at_twice_the_rate_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    bernoulli = SecureGenerator.bernoulli
    monkeypatch.setattr(SecureGenerator, "bernoulli", lambda self, rate, count: bernoulli(self, 2 * rate, count))
    with pytest.raises(Violation, match="sampling rate"):
        check_sampling(sampled_plan(), generator=SecureGenerator(bytes(32)))


def test_one_sample_for_all_rounds_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    bernoulli = SecureGenerator.bernoulli
    monkeypatch.setattr(
        SecureGenerator, "bernoulli", lambda _, rate, count: bernoulli(SecureGenerator(bytes(32)), rate, count)
    )
    with pytest.raises(Violation, match="sampling rate"):
        check_sampling(sampled_plan())


def test_generators_are_keyed_by_the_operating_system() -> None:
    check_generator()


@pytest.mark.parametrize("key", [bytes(32), b"short" * 2])
def test_a_generator_with_a_key_of_its_own_choice_is_caught(key: bytes) -> None:
    with pytest.raises(Violation):
        check_generator(lambda: SecureGenerator(key.ljust(32, b"\0")))
    with pytest.raises(Violation):
        check_generator(lambda: SecureGenerator(os.urandom(2) * 16))
