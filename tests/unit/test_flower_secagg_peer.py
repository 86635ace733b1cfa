"""Flower's SecAgg+ as a peer: it runs as installed, its sum is checked, and a broken one is never measured."""

from __future__ import annotations

import numpy as np
import pytest

from accord_shared.errors import Aborted, PlanError
from accord_simulations.bench import _flower_secagg
from accord_simulations.bench._aes import aes_rate_bytes_per_s
from accord_simulations.bench._flower_secagg import measure_flower_secagg


@pytest.mark.parametrize(("clients", "dimension", "dropped"), [(4, 100, 0), (5, 50, 1)])
def test_the_average_comes_out_and_costs_are_positive(
    clients: int, dimension: int, dropped: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    averaged = []
    average = _flower_secagg._average

    def spy(survivors: list[_flower_secagg._Client]) -> np.ndarray:
        averaged.append(len(survivors))
        return average(survivors)

    monkeypatch.setattr(_flower_secagg, "_average", spy)
    result = measure_flower_secagg(clients, dimension, dropped)
    assert averaged == [clients - dropped]
    assert result.client_cpu_s > 0
    assert result.server_cpu_s > 0
    assert 8 <= result.upload_bytes_per_parameter < 20
    assert result.trips == 4


def test_a_wrong_average_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    average = _flower_secagg._average
    monkeypatch.setattr(_flower_secagg, "_average", lambda survivors: average(survivors[1:]))
    with pytest.raises(Aborted, match="wrong by"):
        measure_flower_secagg(4, 100, 0)


def test_too_few_survivors_are_not_measured() -> None:
    with pytest.raises(Aborted, match="halted with 3 clients left"):
        measure_flower_secagg(6, 10, 3)


@pytest.mark.parametrize(("clients", "dimension", "dropped"), [(1, 10, 0), (4, 0, 0), (4, 10, 4), (4, 10, -1)])
def test_numbers_out_of_range_are_refused(clients: int, dimension: int, dropped: int) -> None:
    with pytest.raises(PlanError):
        measure_flower_secagg(clients, dimension, dropped)


def test_aes_rate_is_that_of_a_computer() -> None:
    assert 1e7 < aes_rate_bytes_per_s() < 1e12
