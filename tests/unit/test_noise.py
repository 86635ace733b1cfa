"""The one generator: its distribution, its grid, and that no copy of it ever repeats."""

from __future__ import annotations

import copy
import math
import os
import pickle

import numpy as np
import pytest
from scipy import stats

from accord_shared.dp.noise import SecureGenerator, snap
from accord_shared.errors import PrivacyError
from conformance.noise import correlation_is_zero, require_centred, require_sigma

KEY = bytes(range(32))
MANY = 400_000


def test_gaussian_noise_is_normal() -> None:
    values = SecureGenerator(KEY).gaussian(MANY, 2.5)
    require_sigma(values, 2.5)
    require_centred(values, 2.5)
    assert stats.kstest(values / 2.5, "norm").pvalue > 1e-4
    assert stats.kstest(values / 2.4, "norm").pvalue < 1e-4
    assert abs(stats.skew(values)) < 5 * math.sqrt(6 / MANY)
    assert abs(stats.kurtosis(values)) < 5 * math.sqrt(24 / MANY)


@pytest.mark.parametrize("bound", [2.0, 3.0, 4.0])
def test_tails_weigh_what_they_should(bound: float) -> None:
    values = SecureGenerator(KEY).gaussian(MANY)
    expected = MANY * 2 * stats.norm.sf(bound)
    assert abs((np.abs(values) > bound).sum() - expected) < 5 * math.sqrt(expected)
    assert np.abs(values).max() < 8.6


def test_neighbours_and_halves_are_uncorrelated() -> None:
    values = SecureGenerator(KEY).gaussian(MANY)
    half = MANY // 2
    assert correlation_is_zero(values[:-1], values[1:])
    assert correlation_is_zero(values[:half], values[half:])
    assert correlation_is_zero(np.square(values[: 1 << 15]), np.square(values[1 << 15 : 1 << 16]))  # Box-Muller pairs


@pytest.mark.parametrize("count", [0, 1, 2, 3, (1 << 16) - 1, 1 << 16, (1 << 16) + 1])
def test_every_length_is_filled(count: int) -> None:
    values = SecureGenerator(KEY).gaussian(count)
    assert values.shape == (count,)
    assert np.isfinite(values).all()
    assert (values != 0).all()


@pytest.mark.parametrize("rate", [1e-3, 0.1, 1 / 3, 0.5, 0.999])
def test_coins_fall_at_their_rate(rate: float) -> None:
    hits = int(SecureGenerator(KEY).bernoulli(rate, MANY).sum())
    assert abs(hits - MANY * rate) < 5 * math.sqrt(MANY * rate * (1 - rate))


def test_sure_coins_are_sure() -> None:
    generator = SecureGenerator(KEY)
    assert generator.bernoulli(1.0, 1000).all()
    assert not generator.bernoulli(0.0, 1000).any()
    assert generator.bernoulli(math.nextafter(1.0, 0.0), 1000).all()


@pytest.mark.parametrize("rate", [-0.1, 1.0001, math.nan, math.inf])
def test_other_rates_are_refused(rate: float) -> None:
    with pytest.raises(PrivacyError):
        SecureGenerator(KEY).bernoulli(rate, 3)


@pytest.mark.parametrize("scale", [-1.0, math.nan, math.inf])
def test_other_scales_are_refused(scale: float) -> None:
    with pytest.raises(PrivacyError):
        SecureGenerator(KEY).gaussian(3, scale)


def test_an_injected_key_repeats_and_no_key_never_does() -> None:
    assert (SecureGenerator(KEY).gaussian(9) == SecureGenerator(KEY).gaussian(9)).all()
    assert (SecureGenerator().gaussian(9) != SecureGenerator().gaussian(9)).all()


def test_a_stream_goes_on() -> None:
    generator = SecureGenerator(KEY)
    assert not set(generator.uint64(1000)) & set(generator.uint64(1000))


def test_copies_draw_a_stream_of_their_own() -> None:
    generator = SecureGenerator(KEY)
    copies = [copy.copy(generator), copy.deepcopy(generator), pickle.loads(pickle.dumps(generator))]  # noqa: S301
    streams = [tuple(each.uint64(4)) for each in (generator, *copies)]
    assert len(set(streams)) == 4
    assert KEY not in pickle.dumps(generator)


def test_a_fork_draws_a_stream_of_its_own() -> None:
    generator = SecureGenerator(KEY)
    generator.uint64(5)
    children = []
    for _ in range(2):
        ready, write = os.pipe()
        if os.fork() == 0:
            os.write(write, generator.uint64(4).tobytes())
            os._exit(0)
        children.append(os.read(ready, 32))
        os.wait()
    assert len({*children, generator.uint64(4).tobytes()}) == 3


def test_the_key_is_not_shown() -> None:
    generator = SecureGenerator(KEY)
    assert repr(generator) == str(generator) == "SecureGenerator(…)"
    assert not any(value == KEY for value in vars(generator).values())


@pytest.mark.parametrize("scale", [1e-9, 0.3, 1.0, 7.0, 1e6])
def test_snapping_leaves_a_public_grid_far_finer_than_the_noise(scale: float) -> None:
    values = SecureGenerator(KEY).gaussian(1000, scale) + 0.1 * scale
    snapped = snap(values, scale)
    grid = 2.0 ** (math.floor(math.log2(scale)) - 20)
    assert (snapped / grid == np.round(snapped / grid)).all()
    assert np.abs(snapped - values).max() <= grid / 2
    assert scale / 2**21 < grid <= scale / 2**20
    require_sigma(snapped[:0:-1] - 0.1 * scale, scale)


def test_nothing_is_snapped_without_noise() -> None:
    values = np.array([0.1, 0.2])
    assert snap(values, 0.0) is values
